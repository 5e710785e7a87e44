"""Text models on the hub that `attnbias models QUERY` finds without a network, and what lies in its cache.

Any other ORG/NAME works as well; these are the ones that people ask for by a part of the name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from diag.models.family import Listed

MODELS = {
    "EleutherAI": "gpt-neo-125m gpt-neo-1.3B gpt-neo-2.7B gpt-j-6b gpt-neox-20b",
    "openai": "gpt-oss-20b gpt-oss-120b",
    "meta-llama": "Llama-2-7b-hf Llama-2-13b-hf Meta-Llama-3-8B Llama-3.1-8B Llama-3.1-70B Llama-3.2-1B "
    "Llama-3.2-3B",
    "mistralai": "Mistral-7B-v0.1 Mistral-7B-v0.3 Mixtral-8x7B-v0.1 Mistral-Nemo-Base-2407",
    "Qwen": "Qwen2-0.5B Qwen2.5-0.5B Qwen2.5-1.5B Qwen2.5-7B Qwen3-0.6B Qwen3-1.7B Qwen3-4B Qwen3-8B",
    "google": "gemma-2b gemma-7b gemma-2-2b gemma-2-9b gemma-3-270m gemma-3-1b-pt",
    "microsoft": "phi-1_5 phi-2 Phi-3-mini-4k-instruct Phi-4-mini-instruct deberta-v3-base",
    "facebook": "opt-125m opt-350m opt-1.3b opt-2.7b opt-6.7b bart-base",
    "bigscience": "bloom-560m bloom-1b1 bloom-1b7 bloom-7b1",
    "tiiuae": "falcon-7b Falcon3-1B-Base",
    "allenai": "OLMo-1B-hf OLMo-7B-hf OLMo-2-0425-1B OLMo-2-1124-7B",
    "HuggingFaceTB": "SmolLM-135M SmolLM2-135M SmolLM2-360M SmolLM2-1.7B SmolLM3-3B-Base",
    "TinyLlama": "TinyLlama_v1.1 TinyLlama-1.1B-Chat-v1.0",
    "ibm-granite": "granite-3.3-2b-base",
    "roneneldan": "TinyStories-1M TinyStories-33M",
    "distilbert": "distilgpt2 distilbert-base-uncased distilroberta-base",
    "google-bert": "bert-base-uncased bert-base-cased bert-large-uncased bert-base-multilingual-cased",
    "FacebookAI": "roberta-base roberta-large xlm-roberta-base",
    "google-t5": "t5-small t5-base t5-large",
    "answerdotai": "ModernBERT-base ModernBERT-large",
    "sentence-transformers": "all-MiniLM-L6-v2 all-mpnet-base-v2",
}
"""Organisation -> names of its models."""

HERE = "in the cache of the hub"


def listed() -> Iterator[Listed]:
    """Every one of them as a row, and the other models whose files lie in the cache."""
    there = cached()
    known = [f"{organisation}/{name}" for organisation, names in MODELS.items() for name in names.split()]
    for name in dict.fromkeys([*known, *sorted(there)]):
        yield Listed(name, f"hf:{name}", "text" if name in known else "", "", HERE if name in there else "")


def cached() -> set[str]:
    """The repositories of models of which the cache of the hub holds anything; none without its library."""
    if find_spec("huggingface_hub") is None:
        return set()
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = Path(HF_HUB_CACHE)
    try:
        entries = [entry.name for entry in os.scandir(folder) if entry.name.startswith("models--")]
    except OSError:
        return set()
    return {name.removeprefix("models--").replace("--", "/", 1) for name in entries}
