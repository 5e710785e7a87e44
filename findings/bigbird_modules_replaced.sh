#!/usr/bin/env bash
# transformers 5.23.0: one short text makes BigBird another model, for good, and takes away the hooks on its attention.
#
# Block-sparse attention needs some length; a shorter text switches the model to full attention. That is said in a
# warning. What is not said: in that forward each layer's attention module is taken out and a new one with the same
# weights put in, so that a hook that was placed before never fires, in this pass or any later one; and the switch
# stays. A long text that comes afterwards is computed with full attention, and its states are other ones than those of
# the same model that has seen no short text: what a text gives depends on the texts before it.
#
# Seen: the hook fires 1 time in a model that sees a long text only, and 0 times where a short one came first; the long
# text's states differ by 0.006. The number follows the random weights; that it is not 0 does not.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
import torch
import transformers

transformers.logging.set_verbosity_error()
config = transformers.BigBirdConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=128,
    block_size=4,
    num_random_blocks=1,
    attention_type="block_sparse",
)
long = torch.arange(64)[None] % 50
short = long[:, :12]


def seen(*texts):
    """How often a hook on the first layer's attention fires, and the states of the last text."""
    torch.manual_seed(0)
    model = transformers.BigBirdModel(config).eval()
    fired = []
    model.encoder.layer[0].attention.self.register_forward_hook(lambda *_: fired.append(1))
    with torch.no_grad():
        states = [model(input_ids=text).last_hidden_state for text in texts]
    return len(fired), states[-1]


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
alone, of_alone = seen(long)
behind, of_behind = seen(short, long)
apart = float((of_alone - of_behind).abs().max())
print(f"the hook fires {alone} time where the long text is the first, {behind} times in both behind a short one")
print(f"the long text's states differ by {apart:.3f}")
assert (alone, behind) == (1, 0)
assert apart > 1e-4
again, of_again = seen(long)
assert again == 1 and torch.equal(of_again, of_alone)
PYTHON
