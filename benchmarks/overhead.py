"""What probing costs: time and memory of four ways to get such statistics, as ratios to the plain forward.

    python benchmarks/overhead.py                    # every model, every method (about ten minutes)
    python benchmarks/overhead.py --case gpt2-1024 --methods plain,probe
    python benchmarks/overhead.py --growth           # one layer, 1k to 16k tokens

Each measurement runs in a process of its own, so that no method inherits another one's memory, and the
processes of a round follow each other (plain, probe, dense, lens, plain, …), so that a slow moment of the
machine hits all of them. With `--threads 1` time is that of the processor, which other programs on the
machine hardly disturb; with more threads it is the clock's, for a machine that does nothing else. Memory
is the peak beyond the loaded model. Weights are random: neither time nor memory depends on them. Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor, nn

    from diag.models.base import Tower

CASES = {
    "vit-196": "ViT-B/16, 196 patches, batch 8",
    "vit-4096": "ViT-B/16, 4,096 patches, batch 1",
    "vit-16384": "ViT-B/16, 16,384 patches, batch 1",
    "gpt2-1024": "GPT-2 small, 1,024 tokens, batch 1",
    "gpt2-4096": "GPT-2 small, 4,096 tokens, batch 1",
    "gpt2-16384": "GPT-2 small, 16,384 tokens, batch 1",
}
METHODS = {
    "plain": "the model's forward, PyTorch's fused attention",
    "probe": "every metric of attnbias, beyond 2,048 tokens from 1,024 sampled query rows",
    "exact": "every metric of attnbias from every query row",
    "dense": "eager attention with patterns kept, token x token cosines, 4 statistics",
    "lens": "TransformerLens run_with_cache, then the same 4 statistics",
}
GROWTH = (1024, 4096, 16384)
HEADS, HEAD_DIM = 12, 64
VOCABULARY = 50257
MEBIBYTE = 1 << 20

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


# --- in the child process: one method on one model


def timed(run: Run, repeats: int) -> Cost:
    """Warms up with one run, then takes the median time of `repeats` runs; the peak is that of all."""
    clock = time.process_time if os.environ.get("OMP_NUM_THREADS") == "1" else time.perf_counter
    before = _restart_peak()
    run()
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        seconds.append(clock() - start)
    return Cost(statistics.median(seconds), _peak() - before)


def child(case: str, method: str, repeats: int) -> Cost:
    """Loads the model of a case and measures one method on it."""
    import torch

    torch.manual_seed(0)
    shape = Shape.of(case)
    if method == "lens":
        with tempfile.TemporaryDirectory() as folder:
            run = lens_run(shape, Path(folder))
    else:
        model = build(shape, eager=method == "dense")
        data = model_input(shape)
        runs = {"plain": plain_run, "probe": probe_run, "dense": dense_run}
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
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_positions=shape.tokens, use_cache=False)
    config._attn_implementation = "eager" if eager else "sdpa"
    return GPT2LMHeadModel(config).eval()


def model_input(shape: Shape) -> Tensor:
    """Random pixels or token ids."""
    import torch

    if shape.family == "vit":
        return torch.randn(shape.batch, 3, _side(shape), _side(shape))
    return torch.randint(0, VOCABULARY, (shape.batch, shape.tokens))


def plain_run(model: nn.Module, data: Tensor, shape: Shape) -> Run:
    """The forward alone."""
    return lambda: model(data)


def probe_run(model: nn.Module, data: Tensor, shape: Shape, *, exact: bool = False) -> Run:
    """The package's own loop, as `attnbias probe` runs it; its first batch, the warm-up, passes the gate."""
    from diag.measure import measure
    from diag.models.base import Sample
    from diag.sampling import RowSampling

    def endless() -> Iterator[Sample]:
        while True:
            yield Sample("input", lambda: None)

    tower, sampling = tower_of(model, data, shape), RowSampling(above=None) if exact else RowSampling()
    batches = measure(tower, endless(), sampling=sampling, batch_size=shape.batch)
    return lambda: next(batches)


def tower_of(model: nn.Module, data: Tensor, shape: Shape) -> Tower:
    """A tower that runs the model on the same data whatever the samples are."""
    from diag.models.base import Batch, Tower
    from diag.seam import attention_modules

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


def growth_child(method: str, tokens: int, repeats: int) -> Cost:
    """One causal layer at `tokens` tokens: its attention alone, or with every metric after it."""
    import torch

    from diag.attention import AttentionCall
    from diag.kernels.flash import attention_with_normaliser
    from diag.metrics import per_input

    def layer(query: Tensor, key: Tensor, value: Tensor) -> None:
        output, normaliser = attention_with_normaliser(query, key, value, None, 0.0, True, None, False)
        if method == "statistics":
            scale = HEAD_DIM**-0.5
            call = AttentionCall(
                0, "layer", query, key, value, output, None, True, scale, log_normaliser=normaliser
            )
            per_input(call)

    torch.manual_seed(0)
    with torch.inference_mode():
        layer(*torch.randn(3, 1, HEADS, 64, HEAD_DIM))  # the libraries' own buffers are no growth
        tensors = torch.randn(3, 1, HEADS, tokens, HEAD_DIM)
        return timed(lambda: layer(*tensors), repeats)


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


def _restart_peak() -> int:
    """Forgets the peak so far (loading may need more than running) and returns the memory held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- in the parent process: rounds of children, and the table. It never loads torch, because a
# child starts with its parent's peak.


def in_process(arguments: list[str], threads: int) -> Cost:
    """One measurement in a process of its own. Raises RuntimeError with the child's last words."""
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")])),
    }
    command = [sys.executable, str(Path(__file__).resolve()), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        if done.returncode < 0:
            last = f"ended by signal {-done.returncode}; 9 is what too little memory looks like"
        raise RuntimeError(f"{' '.join(arguments[:3])}: {last}")
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def rounds(jobs: dict[str, list[str]], repeats: int, threads: int) -> dict[str, Cost]:
    """The medians of `repeats` interleaved rounds; a job that fails is told and left out."""
    costs: dict[str, list[Cost]] = {}
    for number in range(repeats):
        for name, arguments in list(jobs.items()):
            with _telling(f"round {number + 1} of {repeats}: {' '.join(arguments[1:3])}"):
                try:
                    costs.setdefault(name, []).append(in_process(arguments, threads))
                except RuntimeError as error:
                    print(f"\n{error}", file=sys.stderr)
                    del jobs[name]
    return {
        name: Cost(statistics.median(c.seconds for c in own), int(statistics.median(c.memory for c in own)))
        for name, own in costs.items()
        if own
    }


def compare(case: str, methods: list[str], repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per method of a case, with ratios to plain where plain was measured."""
    runs = 3 if Shape.of(case).tokens <= 1024 else 1
    jobs = {
        method: ["--child", case, method, str(runs)]
        for method in methods
        if method != "lens" or case.startswith("gpt2")
    }
    costs = rounds(jobs, repeats, threads)
    plain = costs.get("plain")
    return [
        {
            "case": case,
            "method": method,
            "seconds": cost.seconds,
            "times_plain": cost.seconds / plain.seconds if plain else None,
            "memory_mib": cost.memory / MEBIBYTE,
            "memory_times_plain": cost.memory / plain.memory if plain else None,
        }
        for method, cost in costs.items()
    ]


def growth(repeats: int, threads: int) -> list[dict[str, Any]]:
    """One row per length: what the statistics of one layer add to its attention."""
    rows = []
    for tokens in GROWTH:
        jobs = {
            method: ["--growth-child", method, str(tokens), "3" if tokens <= 4096 else "1"]
            for method in ("attention", "statistics")
        }
        alone, both = (rounds(jobs, repeats, threads)[name] for name in jobs)
        extra = both.memory - alone.memory
        rows.append(
            {
                "tokens": tokens,
                "attention_seconds": alone.seconds,
                "extra_seconds": both.seconds - alone.seconds,
                "extra_mib": extra / MEBIBYTE,
                "extra_bytes_per_token": extra / tokens,
                "pattern_mib": HEADS * tokens**2 * 4 / MEBIBYTE,
            }
        )
    return rows


def show_case(rows: list[dict[str, Any]]) -> None:
    """A case as a plain table of 80 columns."""
    print(f"\n{CASES[rows[0]['case']]}")
    print(f"{'':8}{'seconds':>10}{'x plain':>10}{'peak MiB':>11}{'x plain':>10}")
    for row in rows:
        ratios = [row["times_plain"], row["memory_times_plain"]]
        time_ratio, memory_ratio = ("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)
        print(
            f"{row['method']:8}{row['seconds']:>10.3f}{time_ratio:>10}"
            f"{row['memory_mib']:>11,.0f}{memory_ratio:>10}",
            flush=True,
        )


def show_growth(rows: list[dict[str, Any]]) -> None:
    """The growth as a plain table of 80 columns."""
    print(f"\nevery metric of one causal layer, {HEADS} heads of {HEAD_DIM}: what it adds to the attention")
    print(f"{'tokens':>8}{'attention':>11}{'extra':>10}{'extra MiB':>11}{'bytes/token':>13}{'T x T MiB':>11}")
    for row in rows:
        print(
            f"{row['tokens']:>8,}{row['attention_seconds']:>9.3f} s{row['extra_seconds']:>8.3f} s"
            f"{row['extra_mib']:>11,.0f}{row['extra_bytes_per_token']:>13,.0f}{row['pattern_mib']:>11,.0f}"
        )


@contextlib.contextmanager
def _telling(what: str) -> Iterator[None]:
    """Says what is running, on a terminal only."""
    shown = sys.stderr.isatty()
    if shown:
        print(f"\r\033[K{what}", end="", file=sys.stderr, flush=True)
    yield
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def main() -> None:
    """Reads the command line; with --child or --growth-child, measures and prints one JSON line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="methods: " + "; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    parser.add_argument("--case", choices=[*CASES, "all"], default="all", help="the model (default: all)")
    parser.add_argument("--methods", default=",".join(METHODS), help="any of %(default)s (lens: GPT-2 only)")
    parser.add_argument(
        "--growth", action="store_true", help="one layer at growing lengths, instead of models"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: every core)")
    parser.add_argument("--json", action="store_true", help="JSON instead of a table")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--growth-child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        case, method, repeats = options.child
        print(json.dumps(child(case, method, int(repeats))))
        return
    if options.growth_child:
        method, tokens, repeats = options.growth_child
        print(json.dumps(growth_child(method, int(tokens), int(repeats))))
        return
    methods = options.methods.split(",")
    if unknown := set(methods) - set(METHODS):
        parser.error(f"unknown method '{unknown.pop()}'; methods are {', '.join(METHODS)}")
    found = []
    if options.growth:
        found = growth(options.repeats, options.threads)
        if not options.json:
            show_growth(found)
    else:
        for case in CASES if options.case == "all" else [options.case]:
            rows = compare(case, methods, options.repeats, options.threads)
            found += rows
            if rows and not options.json:
                show_case(rows)
    if options.json:
        print(json.dumps({"threads": options.threads, "repeats": options.repeats, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
