"""The methods that `overhead.py` compares, each on one model with random weights: a process of its own.

    python benchmarks/methods.py CASE METHOD REPEATS       # a model
    python benchmarks/methods.py layer METHOD TOKENS REPEATS  # one causal layer

Prints seconds and bytes as one JSON line. Linux only.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from diag.models.base import Tower

HEADS, HEAD_DIM = 12, 64
VOCABULARY = 50257
WRITTEN_OUT = {
    "gptj": ("GPTJConfig", "GPTJForCausalLM"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM"),
    "gptoss": ("GptOssConfig", "GptOssForCausalLM"),
}
"""Models that compute their softmax themselves: classes of configuration and model."""

Run = Callable[[], object]


class Cost(NamedTuple):
    """Seconds of one run, and the peak of resident memory in bytes beyond what was there before it."""

    seconds: float
    memory: int


class Shape(NamedTuple):
    """How large a case is: tokens without prefix, and inputs in one forward."""

    family: str
    tokens: int
    batch: int

    @staticmethod
    def of(case: str) -> Shape:
        """The shape behind a case's name."""
        family, tokens = case.split("-")
        return Shape(family, int(tokens), 8 if case == "vit-196" else 1)


def timed(run: Run, repeats: int) -> Cost:
    """Warms up with one run, then takes the median time of `repeats` runs; the peak is that of all."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    before = restart_peak()
    run()
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return Cost(statistics.median(seconds), peak() - before)


def measured(case: str, method: str, repeats: int) -> Cost:
    """Loads the model of a case and measures one method on it."""
    import torch

    torch.manual_seed(0)
    shape = Shape.of(case)
    if method == "lens":
        with tempfile.TemporaryDirectory() as folder:
            run = lens_run(shape, Path(folder))
    else:
        model = build(shape, eager=method in ("dense", "nnsight"))
        data = model_input(shape, model)
        runs = {"plain": plain_run, "probe": probe_run, "dense": dense_run, "nnsight": nnsight_run}
        runs["exact"] = functools.partial(probe_run, exact=True)
        run = runs[method](model, data, shape)
    with torch.inference_mode():
        return timed(run, repeats)


def build(shape: Shape, *, eager: bool) -> nn.Module:
    """The model with random weights; `eager` materialises the pattern."""
    if shape.family == "vit":
        import timm

        model = timm.create_model("vit_base_patch16_224", img_size=_side(shape))
        for block in model.blocks:
            block.attn.fused_attn = not eager
        return model.eval()
    if shape.family in WRITTEN_OUT:
        return _written_out(shape)
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    implementation = "eager" if eager else "sdpa"
    if shape.family == "gpt2":
        config = GPT2Config(n_positions=shape.tokens, use_cache=False)
        config._attn_implementation = implementation
        return GPT2LMHeadModel(config).eval()
    # the shape of TinyLlama: 1.1 billion weights, 32 query heads on 4 KV heads
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=shape.tokens,
        use_cache=False,
    )
    config._attn_implementation = implementation
    return LlamaForCausalLM(config).eval()


def _written_out(shape: Shape) -> nn.Module:
    """A model of the size of GPT-2 small that computes its softmax itself.

    gptj: as it was written. gemma2: scores are capped. gptoss: a sink in every softmax.
    """
    import transformers

    config_of, model_of = WRITTEN_OUT[shape.family]
    sizes = {"vocab_size": VOCABULARY, "use_cache": False, "max_position_embeddings": shape.tokens}
    if shape.family == "gptj":
        sizes |= {"n_embd": 768, "n_layer": 12, "n_head": HEADS, "rotary_dim": 64}
    else:
        sizes |= {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": HEADS}
        sizes |= {"num_key_value_heads": 4, "head_dim": HEAD_DIM, "intermediate_size": 2048}
    if shape.family == "gptoss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 128}
    return getattr(transformers, model_of)(getattr(transformers, config_of)(**sizes)).eval()


def model_input(shape: Shape, model: nn.Module) -> Tensor:
    """Random pixels or token ids."""
    import torch

    if shape.family == "vit":
        return torch.randn(shape.batch, 3, _side(shape), _side(shape))
    return torch.randint(0, model.config.vocab_size, (shape.batch, shape.tokens))


def plain_run(model: nn.Module, data: Tensor, shape: Shape) -> Run:
    """The forward alone."""
    return lambda: model(data)


def probe_run(model: nn.Module, data: Tensor, shape: Shape, *, exact: bool = False) -> Run:
    """The package's own loop, as `attnbias probe` runs it; its first batch, the warm-up, passes the gate."""
    from diag.attention.sampling import RowSampling
    from diag.measure.loop import measure
    from diag.models.base import Sample

    def endless() -> Iterator[Sample]:
        while True:
            yield Sample("input", lambda: None)

    tower, sampling = tower_of(model, data, shape), RowSampling(above=None) if exact else RowSampling()
    batches = measure(tower, endless(), sampling=sampling, batch_size=shape.batch)
    return lambda: next(batches)


def tower_of(model: nn.Module, data: Tensor, shape: Shape) -> Tower:
    """A tower that runs the model on the same data whatever the samples are."""
    from diag.models.base import Batch, Tower
    from diag.models.hooks.layers import attention_modules

    vision = shape.family == "vit"
    return Tower(
        name="vision" if vision else "text",
        layers=attention_modules(model),
        samples=lambda inputs, length: iter(()),
        encode=lambda samples: Batch(tuple(sample.id for sample in samples), data),
        forward=lambda batch: model(batch.data),
        prefix=("cls",) if vision else (),
    )


def dense_run(model: nn.Module, data: Tensor, shape: Shape) -> Run:
    """Hooks keep every layer's pattern, values and outputs; the statistics follow after the forward."""
    kept: dict[str, list[Tensor]] = {"pattern": [], "value": [], "output": []}

    def projected(module: nn.Module, args: tuple[Tensor, ...], result: Tensor) -> None:
        kept["value"].append(_split_heads(result.chunk(3, dim=-1)[2]))

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["output"].append(_split_heads(args[0]))

    def dropped(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        kept["pattern"].append(args[0])

    vision = shape.family == "vit"
    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in ("qkv", "c_attn"):
            module.register_forward_hook(projected)
        elif path.endswith(("attn.proj", "attn.c_proj")):
            module.register_forward_pre_hook(read)
        elif name == "attn_drop":
            module.register_forward_pre_hook(dropped)

    def run() -> None:
        for tensors in kept.values():
            tensors.clear()
        if vision:
            model(data)
        else:
            kept["pattern"].extend(model(data, output_attentions=True).attentions)
        for parts in zip(*kept.values(), strict=True):
            dense_statistics(*parts)

    return run


def nnsight_run(model: nn.Module, data: Tensor, shape: Shape) -> Run:
    """An nnsight trace keeps every layer's pattern, values and outputs; the same statistics follow."""
    from nnsight import NNsight

    traced = NNsight(model)
    vision = shape.family == "vit"

    def run() -> None:
        with traced.trace(data):
            kept = list().save()  # noqa: C408 (nnsight saves a list that is made in the trace)
            if vision:
                for block in traced.blocks:
                    kept.append((block.attn.qkv.output, block.attn.attn_drop.input, block.attn.proj.input))
            else:
                for block in traced.transformer.h:
                    value, output = block.attn.c_attn.output, block.attn.c_proj.input
                    kept.append((value, block.attn.output[1], output))
        for projected, pattern, output in kept:
            value = _split_heads(projected.chunk(3, dim=-1)[2])
            dense_statistics(pattern, value, _split_heads(output))

    return run


def lens_run(shape: Shape, folder: Path) -> Run:
    """TransformerLens on a folder in Hugging Face format, its cache told to keep only what is read."""
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    build(shape, eager=False).save_pretrained(folder)
    _save_tokenizer(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu")
    bridge.eval()
    data = torch.randint(0, VOCABULARY, (shape.batch, shape.tokens))
    layers = range(len(bridge.blocks))
    wanted = ("attn.hook_v", "attn.hook_z", "attn.hook_pattern")

    def run() -> None:
        gc.collect()  # the last run's cache sits in reference cycles: two of them would count
        _, cache = bridge.run_with_cache(data, names_filter=lambda name: name.endswith(wanted))
        for layer in layers:
            value, output = (cache[f"blocks.{layer}.attn.hook_{name}"] for name in ("v", "z"))
            pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
            value = value.repeat_interleave(output.shape[2] // value.shape[2], dim=2)  # grouped heads
            dense_statistics(pattern, value.transpose(1, 2), output.transpose(1, 2))

    return run


def dense_statistics(
    pattern: Float[Tensor, "batch head token token"],
    value: Float[Tensor, "batch head token dim"],
    output: Float[Tensor, "batch head token dim"],
) -> dict[str, Tensor]:
    """The bias, value similarity, self weight and entropy as public replications compute them, per head."""
    from torch.nn.functional import cosine_similarity, normalize

    unit = normalize(value, dim=-1)
    cosines = unit @ unit.transpose(-1, -2)  # [batch, head, token, token]
    tokens = cosines.shape[-1]
    return {
        "cos_y_vself": cosine_similarity(output, value, dim=-1).mean(-1),
        "value_similarity": (cosines.sum((-1, -2)) - tokens) / (tokens * (tokens - 1)),
        "self_weight": pattern.diagonal(dim1=-2, dim2=-1).mean(-1),
        "entropy": -(pattern * (pattern + 1e-12).log()).sum(-1).mean(-1),
    }


def layer(method: str, tokens: int, repeats: int) -> Cost:
    """One causal layer: its attention alone, or with every metric after it, from all rows or from some."""
    import torch

    from diag.attention.call import AttentionCall
    from diag.attention.kernels.flash import attention_with_normaliser
    from diag.attention.sampling import RowSampling, sample_rows
    from diag.metrics.default import per_input

    sampling = RowSampling()
    sampled = method == "sampled" and sampling.applies(tokens)

    def run(query: Tensor, key: Tensor, value: Tensor) -> None:
        output, normaliser = attention_with_normaliser(query, key, value, None, 0.0, True, None, False)
        if method == "attention":
            return
        call = AttentionCall(
            0, "layer", query, key, value, output, None, True, HEAD_DIM**-0.5, log_normaliser=normaliser
        )
        if sampled and call.tokens == tokens:
            call = replace(
                call, sample=sample_rows([torch.ones(1, tokens, dtype=torch.bool)], ["input"], sampling)
            )
        per_input(call)

    torch.manual_seed(0)
    with torch.inference_mode():
        run(*torch.randn(3, 1, HEADS, 64, HEAD_DIM))  # the libraries' own buffers are no growth
        tensors = torch.randn(3, 1, HEADS, tokens, HEAD_DIM)
        return timed(lambda: run(*tensors), repeats)


def _side(shape: Shape) -> int:
    return 16 * round(shape.tokens**0.5)


def _split_heads(x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch head token dim"]:
    return x.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)


def _save_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes: the bridge asks for one, the token ids do not come from it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    first = next(iter(alphabet))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=first, eos_token=first, pad_token=first
    )
    fast.save_pretrained(folder)


def restart_peak() -> int:
    """Forgets the peak so far (loading may need more than running) and returns the memory held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def peak() -> int:
    """The peak of resident memory since it was last forgotten, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Reads the command line, measures, prints."""
    case, method, *numbers = sys.argv[1:]
    cost = layer(method, *map(int, numbers)) if case == "layer" else measured(case, method, int(numbers[0]))
    print(json.dumps(cost))


if __name__ == "__main__":
    main()
