#!/usr/bin/env bash
# transformers 5.23.0: AIMv2's text model is causal only in a batch that holds padding.
#
# Its attention module says that it is not causal; causality comes from the mask alone, and the function that makes the
# mask leaves it out where no key is hidden but by causality, for PyTorch's own `is_causal` to take its place. So a text
# alone, or in a batch of equal lengths, attends to later tokens, and beside a shorter one it does not: its first
# token depends on its last one or not, by what else is in the batch. Other models of this library are causal in both.
#
# Seen, as the change of the first token's state when the last token is another one: 0.336 alone, 0 beside padding;
# GPT-2 0 and 0. Numbers follow the random weights; which of them are 0 does not.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
import torch
import transformers

torch.manual_seed(0)
sizes = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
aimv2 = transformers.Aimv2TextModel(transformers.Aimv2TextConfig(**sizes, **narrow)).eval()
gpt2 = transformers.GPT2Model(transformers.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4)).eval()
texts = torch.tensor([[3, 7, 9, 12, 20, 2], [4, 8, 15, 2, 0, 0]])
real = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
other = texts.clone()
other[0, -1] = 33


def moved(model, rows):
    """How far the first token of the first text moves when its last token is another one."""
    with torch.no_grad():
        before, after = (
            model(input_ids=ids[:rows], attention_mask=real[:rows]).last_hidden_state[0, 0] for ids in (texts, other)
        )
    return float((before - after).abs().max())


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
found = {type(model).__name__: [moved(model, rows) for rows in (1, 2)] for model in (aimv2, gpt2)}
for name, (alone, beside) in found.items():
    print(f"{name}: the first token moves by {alone:.3f} alone, by {beside:.3f} beside a padded text")
assert found["Aimv2TextModel"][0] > 0.01 and found["Aimv2TextModel"][1] == 0
assert found["GPT2Model"] == [0, 0]
PYTHON
