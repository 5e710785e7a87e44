#!/usr/bin/env bash
# transformers 5.23.0: a causal 4-D attention mask turns a model's sliding window off.
#
# A mask of four dimensions is taken as it is, in the place of the model's own: it is not joined to the sliding window
# of the configuration, which acts only through the mask that the library makes. So a mask that hides nothing but later
# tokens (what a causal model hides already) lets each token see all earlier ones, without an error or a warning; where
# layers with a window alternate with full ones, all get the same mask. A 2-D mask of ones changes nothing.
#
# Seen, as the distance of the states from those without a mask, window 3, 8 tokens: Mistral 0 with the 2-D mask,
# 1.271 with the 4-D one, which gives the states of the same weights with a window longer than the text; gpt-oss, one
# layer in two with a window, 0, 1.151 and likewise. Numbers follow the random weights; which of them are 0 does not.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" - <<'PYTHON'
import torch
import transformers

narrow = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
narrow |= {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
narrow |= {"num_attention_heads": 4, "num_key_value_heads": 4}
experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
text = torch.tensor([[3, 7, 9, 12, 20, 2, 4, 8]])
ones = torch.ones_like(text)
length = text.shape[1]
causal = torch.full((1, 1, length, length), torch.finfo(torch.float32).min).triu(1)


def mistral(window):
    return transformers.MistralModel(transformers.MistralConfig(**narrow, sliding_window=window))


def gpt_oss(window):
    return transformers.GptOssModel(transformers.GptOssConfig(**narrow, **experts, sliding_window=window))


def states(model, mask=None):
    with torch.no_grad():
        return model.eval()(input_ids=text, attention_mask=mask).last_hidden_state


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
for make in (mistral, gpt_oss):
    torch.manual_seed(0)
    model, wide = make(3), make(100)
    wide.load_state_dict(model.state_dict())
    plain, flat, own = states(model), states(model, ones), states(model, causal)
    two, four, without = (float((a - b).abs().max()) for a, b in ((plain, flat), (plain, own), (states(wide), own)))
    harmless = float((states(wide) - states(wide, causal)).abs().max())
    print(f"{make.__name__}: the 2-D mask changes {two:.3f}, the 4-D mask {four:.3f};")
    print(f"  with the 4-D mask {without:.1e} from the model without a window, which it changes by {harmless:.1e}")
    assert two == 0 and four > 0.01 and without < 1e-5 and harmless < 1e-5
PYTHON
