#!/usr/bin/env bash
# transformers 5.23.0: YOLOS takes the mask of padding that its processor makes, and does not use it.
#
# The image processor fills images of unequal sizes up to the largest one and hands over which pixels are real
# (`pixel_mask`), as that of DETR does, whose attention hides the others. YOLOS has no argument of that name; the mask
# goes into its keyword arguments without a word. Padding becomes patches like others, which every token attends to, and
# the grid of position embeddings is that of the filled-up size: the boxes of an image depend on how large the images
# beside it are.
#
# Seen, for one image alone and beside a larger one: the same numbers with the mask as without it, and class logits that
# move by 1.0 times their spread over the detections. The number follows the random weights; that it is not 0 does not.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.15.0 torchvision==0.29.2 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
import numpy
import torch
import transformers
from PIL import Image

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
config = transformers.YolosConfig(image_size=[64, 96], num_detection_tokens=5, num_labels=3, **narrow)
model = transformers.YolosForObjectDetection(config).eval()
with torch.no_grad():
    for parameter in model.parameters():  # fresh weights are too small for tokens to tell anything apart
        parameter.add_(0.3 * torch.randn_like(parameter))
drawn = numpy.random.default_rng(0)
small, large = (
    Image.fromarray(drawn.integers(0, 256, (*size, 3), dtype=numpy.uint8)) for size in ((64, 64), (96, 128))
)
processor = transformers.YolosImageProcessor(do_resize=False)
alone, together = (processor(images=images, return_tensors="pt") for images in ([small], [small, large]))
assert together["pixel_mask"][0].float().mean() < 1
with torch.no_grad():
    first, beside, unmasked = (
        model(**given).logits[0] for given in (alone, together, {"pixel_values": together["pixel_values"]})
    )
moved = float((first - beside).abs().max() / first.std(0).max())
print(f"transformers {transformers.__version__}, torch {torch.__version__}")
print(f"with the mask as without it: {torch.equal(beside, unmasked)}")
print(f"logits of the small image beside the large one: moved by {moved:.1f} times their spread over detections")
assert torch.equal(beside, unmasked)
assert moved > 0.01
PYTHON
