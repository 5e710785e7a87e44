#!/usr/bin/env bash
# transformers 5.23.0: `_init_weights` leaves a loaded model as it is, and draws its deep copy anew.
#
# `model.apply(model._init_weights)` gives a model random weights, to compare a trained model with an untrained one.
# `from_pretrained` marks each parameter that it read, and the functions that initialise leave marked ones alone, so on
# a loaded model that call changes nothing and says nothing. `copy.deepcopy` drops the marks of parameters: the same
# call on a copy changes all of them. Modules are marked too, and their marks are copied: `init_weights()`, which looks
# at those, leaves the copy as it is. A control that was made so is the trained model itself.
#
# Seen, as the number of parameters that change, after `apply` on the model that was built, on the one that was loaded,
# on a copy of that, and after `init_weights()` on such a copy: Llama 20, 0, 20, 0 of 20; GPT-2 28, 0, 28, 0 of 28.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.15.0 transformers==5.23.0
HF_HUB_OFFLINE=1 "$place/env/bin/python" - "$place" <<'PYTHON'
import copy
import sys

import torch
import transformers

transformers.logging.disable_progress_bar()
sizes = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
configs = {
    "Llama": transformers.LlamaConfig(**sizes, **narrow),
    "GPT-2": transformers.GPT2Config(**sizes, n_embd=32, n_layer=2, n_head=4),
}


def changed(model, initialise):
    """How many parameters of the model have another value after `initialise(model)`."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    initialise(model)
    return sum(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))


def apply(model):
    model.apply(model._init_weights)


print(f"transformers {transformers.__version__}, torch {torch.__version__}")
for name, config in configs.items():
    torch.manual_seed(0)
    built = transformers.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.fill_(7)  # a value that no initialisation gives: what keeps it was left alone
    folder = f"{sys.argv[1]}/{name}"
    built.save_pretrained(folder)
    loaded = transformers.AutoModel.from_pretrained(folder)
    one, two = copy.deepcopy(loaded), copy.deepcopy(loaded)
    found = [changed(model, apply) for model in (built, loaded, one)]
    found.append(changed(two, lambda model: model.init_weights()))
    total = len(list(loaded.parameters()))
    print(f"{name}: `apply` changes {found[0]} of {total} as built, {found[1]} loaded, {found[2]} in a copy;")
    print(f"  `init_weights()` changes {found[3]} in a copy")
    assert found == [total, 0, total, 0]
PYTHON
