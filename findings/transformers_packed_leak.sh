#!/usr/bin/env bash
# transformers 5.23.0: `position_ids` that start again keep packed texts apart only where no cache is used.
#
# A row that holds two texts, its positions 0 1 2 3 0 1 2 3 and no attention mask, is recognised as packed and each
# text attends to itself alone; but the function that makes the mask looks at positions only where there is no
# key-value cache, and a plain forward makes one, `use_cache` being on by default, in evaluation too. So the second
# text attends to the first, silently; `use_cache=False` parts them, and an attention mask of ones beside it joins
# them again. gpt-oss does not hand its positions to that function: its texts are never kept apart.
#
# Seen, as the change of the second text's states when a token of the first is another one, by default, without a
# cache, without a cache but with a mask of ones: Llama 0.570, 0, 0.570; GPT-2 0.117, 0, 0.117; gpt-oss 1.500 in all
# three. Numbers follow the random weights; which of them are 0 does not.
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
narrow["num_key_value_heads"] = 4
experts = {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
models = {
    "Llama": transformers.LlamaModel(transformers.LlamaConfig(**sizes, **narrow)),
    "GPT-2": transformers.GPT2Model(transformers.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4)),
    "gpt-oss": transformers.GptOssModel(transformers.GptOssConfig(**sizes, **narrow, **experts)),
}
texts = torch.tensor([[3, 7, 9, 12, 20, 2, 4, 8]])
positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
other = texts.clone()
other[0, 1] = 33
ways = {
    "by default": {},
    "without a cache": {"use_cache": False},
    "and a mask of ones": {"use_cache": False, "attention_mask": torch.ones_like(texts)},
}


def second(model, ids, **options):
    """The states of the second text of the row."""
    with torch.no_grad():
        return model(input_ids=ids, **options).last_hidden_state[0, -4:]


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
moved, apart = {}, {}
for name, model in models.items():
    model.eval().set_attn_implementation("eager")
    moved[name] = []
    for way in ways.values():
        before, after = (second(model, ids, position_ids=positions, **way) for ids in (texts, other))
        moved[name].append(float((before - after).abs().max()))
    packed = second(model, texts, position_ids=positions, use_cache=False)
    apart[name] = float((packed - second(model, texts[:, 4:])).abs().max())
    print(f"{name}: the second text moves by", ", ".join(f"{m:.3f} {w}" for m, w in zip(moved[name], ways)))
    print(f"{name}: without a cache the second text is {apart[name]:.1e} from what it is alone")
for name in ("Llama", "GPT-2"):
    assert moved[name][0] > 0.01 and moved[name][1] == 0 and moved[name][2] > 0.01 and apart[name] < 1e-5
assert min(moved["gpt-oss"]) > 0.01 and apart["gpt-oss"] > 0.01
PYTHON
