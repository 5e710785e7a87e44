"""Random small modules, and whether what attnbias says of their calls is what they were built to mean.

    python benchmarks/meaning_fuzz.py --tries 2000
    python benchmarks/meaning_fuzz.py --seed 17      # one module, shown

A seed says how a module lays out heads, inputs and windows, what fills these up, which tokens stand in front,
how heads share keys, what a mask hides, and which layers are no self-attention over tokens. The module keeps
queries, keys and values of every layer in plain axes, of which the judge computes cosines of y_i and v_i in
float64. Exit code 1 if a table is wrong, lacks a layer without a word, or an exception is no sentence.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diag.errors import UserError
from diag.measure.loop import measure
from diag.models.families.from_module import from_module

WIDTH = 16
TOLERANCE = 1e-5
METRIC = "cos_y_vself"

EXACT, NAMED, REFUSED = "exact", "some layers named", "refused"
WRONG, SILENT, RAISED = "wrong", "silently incomplete", "raw exception"
FAULTS = (WRONG, SILENT, RAISED)

FUSED = ("plain", "windows first", "windows, heads", "heads, windows", "merged", "heads first", "in turn")
WRITTEN = ("matmul", "einsum", "einsum, keys first")


@dataclass(frozen=True)
class Built:
    """How a module is built.

    window: how many tokens a window has, 0 for none. every: whether each layer has windows, or each second
        one; two have, as one alone may have prefix tokens that no other layer has.
    shift: whether every second layer's windows are shifted. prefix, suffix: learned tokens beside the others.
    other: what the last layer attends over, where that is not its own tokens. ids: whether it reads ids.
    sequence_first: whether inputs lie along the second axis. decoder: whether a second tower asks the first.
    lengths: tokens of the inputs of each batch. rows: how many inputs each has.
    """

    layout: str
    heads: int
    shared: int
    dim: int
    depth: int
    window: int
    every: int
    shift: bool
    causal: str
    masked: str
    prefix: int
    suffix: int
    other: str
    ids: bool
    sequence_first: bool
    decoder: bool
    rows: int
    lengths: tuple[int, ...]

    @staticmethod
    def drawn(seed: int) -> Built:
        """What a seed says."""
        draw = Random(seed)
        window = draw.choice([0, 0, 2, 3, 4, 5])
        masked = draw.choice(["", "", "", "-inf", "-1e4", "lowest"]) if not window else ""
        decoder = not window and not masked and draw.random() < 0.15
        ids = draw.random() < 0.25
        heads, every = draw.choice([1, 2, 4]), draw.choice([1, 1, 2])
        first = draw.randint(3, 12)
        beside = (0, 0) if window else draw.choice([(0, 0), (0, 0), (1, 0), (2, 0), (0, 1), (1, 2)])
        return Built(
            layout=draw.choice(FUSED + WRITTEN),
            heads=heads,
            shared=draw.choice([n for n in (1, 1, 2, 4) if heads % n == 0]),
            dim=draw.choice([2, 4, 8]),
            depth=draw.randint(2, 4) if every == 1 else draw.randint(3, 4),
            window=window,
            every=every,
            shift=draw.random() < 0.3,
            causal=draw.choice(["", "", "", "flag", "mask"]) if not beside[0] + beside[1] else "",
            masked=masked,
            prefix=beside[0],
            suffix=beside[1],
            other=draw.choice([""] * 6 + ["channels", "rolled keys"]) if not window else "",
            ids=ids,
            sequence_first=not masked and not decoder and draw.random() < 0.2,
            decoder=decoder,
            rows=draw.randint(1, 3),
            lengths=tuple(draw.choice([first, draw.randint(3, 12)]) for _ in range(2)),
        )


class Layer(nn.Module):
    """Attention over `[input, token, channel]` as a seed says.

    kept: queries, keys and values of the last run, `[input, window, token, head, dim]`, and which are real,
    `[input, window, token]`.
    """

    def __init__(self, built: Built, number: int) -> None:
        super().__init__()
        self.built, last = built, number == built.depth - 1
        self.window = built.window if number % built.every == 0 else 0
        self.shift = built.window // 2 if built.shift and number % 2 and self.window else 0
        self.other = built.other if last else ""
        inner = built.heads * built.dim
        self.q, self.out = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)
        self.kv = nn.Linear(WIDTH, 2 * inner // built.shared)
        self.norm = nn.LayerNorm(WIDTH)
        self.kept: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor, real: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        built, tokens = self.built, x.shape[1]
        read = self.norm(x)
        of_keys = read if memory is None else memory
        there = torch.ones(x.shape[:2], dtype=torch.bool) if real is None else real
        q, (k, v) = self.parts(self.q(read)), (self.parts(y) for y in self.kv(of_keys).chunk(2, -1))
        if built.layout not in (*FUSED[:1], *FUSED[6:]) or memory is not None:  # who cannot share repeats
            k, v = (y.repeat_interleave(built.shared, 3) for y in (k, v))
        if self.other == "rolled keys":
            k, v = k.roll(1, 2), v.roll(1, 2)
        self.kept = (q, k, v, self.cut(there[..., None])[..., 0])
        y = self.attend(q, k, v, real)
        return x + self.out(self.joined(y.flatten(3), tokens))

    def cut(self, x: Tensor) -> Tensor:
        """To `[input, window, token, channel]`, filled up with zeros."""
        if not self.window:
            return x[:, None]
        x = F.pad(x, (0, 0, 0, -x.shape[1] % self.window)).roll(self.shift, 1)
        return x.unflatten(1, (-1, self.window))

    def joined(self, x: Tensor, tokens: int) -> Tensor:
        """Back to `[input, token, channel]`."""
        return x.flatten(1, 2).roll(-self.shift, 1)[:, :tokens]

    def parts(self, x: Tensor) -> Tensor:
        """To `[input, window, token, head, dim]`."""
        return self.cut(x).unflatten(-1, (-1, self.built.dim))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, real: Tensor | None) -> Tensor:
        built, layout = self.built, self.built.layout
        inputs, windows, tokens, heads, _ = q.shape
        mask = self.mask(tokens, k.shape[2], real)
        if layout in WRITTEN:
            return self.written(q, k, v, mask)
        flag = built.causal == "flag" and mask is None and tokens == k.shape[2]
        if mask is None and built.causal and not flag:
            mask = torch.ones(tokens, k.shape[2], dtype=torch.bool).tril()
        shared = heads // k.shape[3] > 1

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if self.other == "channels":
                return F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
            own = mask
            if mask is not None and mask.ndim == 4 and q.ndim == 3:  # heads stand behind inputs
                own = mask.repeat_interleave(heads, 0)[:, 0]
            return F.scaled_dot_product_attention(q, k, v, own, is_causal=flag, enable_gqa=shared)

        if layout == "in turn":
            each = [call(*(x[:, w].transpose(1, 2) for x in (q, k, v))) for w in range(windows)]
            return torch.stack([y.transpose(1, 2) for y in each], 1)
        if layout in ("plain", "windows first"):
            axes = (0, 1) if layout == "plain" else (1, 0)
            y = call(*(x.permute(*axes, 3, 2, 4).flatten(0, 1) for x in (q, k, v)))
            y = y.unflatten(0, (inputs, windows) if layout == "plain" else (windows, inputs))
            return y.permute(*axes, 3, 2, 4)
        if (
            mask is not None
            and mask.ndim == 4
            and layout in ("windows, heads", "heads, windows", "heads first")
        ):
            y = call(*(x.permute(0, 1, 3, 2, 4).flatten(0, 1) for x in (q, k, v)))  # a mask of the usual axes
            return y.unflatten(0, (inputs, windows)).permute(0, 1, 3, 2, 4)
        if layout == "windows, heads":
            return call(*(x.transpose(2, 3) for x in (q, k, v))).transpose(2, 3)
        if layout == "heads, windows":
            return call(*(x.permute(0, 3, 1, 2, 4) for x in (q, k, v))).permute(0, 2, 3, 1, 4)
        order = (0, 1, 3, 2, 4) if layout == "merged" else (3, 0, 1, 2, 4)
        sizes = (inputs, windows, heads) if layout == "merged" else (heads, inputs, windows)
        y = call(*(x.permute(order).flatten(0, 2) for x in (q, k, v))).unflatten(0, sizes)
        return y.permute(0, 1, 3, 2, 4) if layout == "merged" else y.permute(1, 2, 3, 0, 4)

    def written(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The softmax is the module's own."""
        if self.other == "channels":
            q, k, v = (x.transpose(2, 4) for x in (q, k, v))
        if self.built.layout == "matmul":
            scores = q.transpose(2, 3) @ k.permute(0, 1, 3, 4, 2)
        else:
            scores = torch.einsum("nwqhd,nwkhd->nwhqk", q, k)
        scores = scores * q.shape[-1] ** -0.5
        if mask is not None and self.other != "channels":
            scores = scores + (mask if mask.ndim == 2 else mask[:, None])
        elif self.built.causal and self.other != "channels" and scores.shape[-1] == scores.shape[-2]:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        if self.built.layout == "matmul":
            y = (scores.softmax(-1) @ v.transpose(2, 3)).transpose(2, 3)
        elif self.built.layout == "einsum":
            y = torch.einsum("nwhqk,nwkhd->nwqhd", scores.softmax(-1), v)
        else:
            y = torch.einsum("nwkhd,nwhkq->nwqhd", v, scores.mT.softmax(-2))
        return y.transpose(2, 4) if self.other == "channels" else y

    def mask(self, queries: int, keys: int, real: Tensor | None) -> Tensor | None:
        """What hides padding of a batch, and later tokens with it, if anything: `[input, 1, query, key]`."""
        if real is None or queries != keys:
            return None
        lowest = {"-inf": -torch.inf, "-1e4": -1e4}.get(self.built.masked, torch.finfo(torch.float32).min)
        shown = real[:, None, None].expand(-1, 1, queries, -1)
        if self.built.causal:
            shown = shown & torch.ones(queries, keys, dtype=torch.bool).tril()
        return torch.zeros(shown.shape).masked_fill(~shown, lowest)

    def right(self) -> Tensor:
        """Of the last run, the mean cosine of y_i and v_i over tokens that see several, `[input, head]`."""
        *parts, real = self.kept
        q, k, v = (x.transpose(2, 3).double() for x in parts)  # [input, window, head, token, dim]
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.built.masked:
            scores = scores.masked_fill(~real[:, :, None, None], -torch.inf)
        if self.built.causal:
            scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf)
        cosine = F.cosine_similarity(scores.softmax(-1) @ v, v, dim=-1)  # [input, window, head, token]
        counted = real[:, :, None] & ((scores > -torch.inf).sum(-1) > 1)  # one key alone tells nothing
        return cosine.where(counted, 0).sum((1, 3)) / counted.sum((1, 3))


class Module(nn.Module):
    """Layers in one tower, or in two of which the second one asks the first."""

    def __init__(self, built: Built) -> None:
        super().__init__()
        self.built = built
        self.words = nn.Embedding(50, WIDTH) if built.ids else nn.Identity()
        self.places = nn.Parameter(torch.randn(40, WIDTH))
        self.tokens = nn.Parameter(torch.randn(1, built.prefix + built.suffix, WIDTH))
        self.blocks = nn.ModuleList(Layer(built, n) for n in range(built.depth))
        if built.decoder:
            self.writer = nn.ModuleList(Layer(built, n) for n in range(2))
            self.cross = nn.ModuleList(Layer(built, 0) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, tgt: Tensor | None = None) -> Tensor:
        x = self.read(x)
        front, back = (
            part.expand(len(x), -1, -1)
            for part in self.tokens.split([self.built.prefix, self.built.suffix], 1)
        )
        x = torch.cat([front, x, back], 1)
        real = attention_mask
        if real is not None:
            real = F.pad(real.bool(), (self.built.prefix, self.built.suffix), value=True)
        for layer in self.blocks:
            x = layer(x, real)
        if tgt is not None:
            memory, x = x, self.read(tgt)
            for own, asks in zip(self.writer, self.cross, strict=True):
                x = asks(own(x), None, memory)
        return x.transpose(0, 1) if self.built.sequence_first else x

    def read(self, x: Tensor) -> Tensor:
        x = self.words(x)
        x = x.transpose(0, 1) if self.built.sequence_first else x
        return x + self.places[: x.shape[1]]

    def to_be_measured(self) -> dict[str, Layer]:
        """Layers over their own tokens, by path."""
        return {
            path: module
            for path, module in self.named_modules()
            if isinstance(module, Layer) and not module.other and not path.startswith("cross")
        }


def batches_of(built: Built, seed: int) -> list[Tensor | dict[str, Tensor]]:
    """What the module is given."""
    generator = torch.Generator().manual_seed(seed)
    made = list[Tensor | dict[str, Tensor]]()

    def drawn(tokens: int) -> Tensor:
        shape = (tokens, built.rows) if built.sequence_first else (built.rows, tokens)
        if built.ids:
            return torch.randint(0, 50, shape, generator=generator)
        return torch.randn(*shape, WIDTH, generator=generator)

    for tokens in built.lengths:
        x = drawn(tokens)
        if built.masked:
            lengths = torch.randint(2, tokens + 1, (built.rows, 1), generator=generator)
            mask = torch.arange(tokens) < lengths
            made.append({"x": x, "attention_mask": mask.long()})
        elif built.decoder:
            made.append({"x": x, "tgt": drawn(tokens + 2)})
        else:
            made.append(x)
    return made


def judged(seed: int, built: Built | None = None) -> tuple[str, str]:
    """A verdict on one module, and why."""
    built = built or Built.drawn(seed)
    torch.manual_seed(seed)
    module, batches = Module(built).eval(), batches_of(built, seed)
    right = dict[str, list[Tensor]]()
    with torch.inference_mode():
        for batch in batches:
            module(**batch) if isinstance(batch, dict) else module(batch)
            for path, layer in module.to_be_measured().items():
                right.setdefault(path, []).append(layer.right())
    try:
        found, skipped = _measured(module, batches)
    except UserError as error:
        return REFUSED, str(error)
    except Exception as error:  # whatever it is, it is no sentence
        return RAISED, f"{type(error).__name__}: {error}"
    wrong = [f"'{path}' is measured, and attends to others" for path in found.keys() - right.keys()]
    for path in found.keys() & right.keys():
        expected = torch.cat(right[path])
        if found[path].shape != expected.shape:
            wrong.append(f"'{path}': {list(found[path].shape)} numbers, not {list(expected.shape)}")
        elif not torch.allclose(found[path], expected, rtol=0, atol=TOLERANCE, equal_nan=True):
            wrong.append(f"'{path}' is {float((found[path] - expected).abs().max()):.1e} off")
    if wrong:
        return WRONG, "; ".join(sorted(wrong))
    missing = [path for path in right if path not in found]
    unnamed = [path for path in missing if not any(one.startswith(path) for one in skipped)]
    if unnamed:
        return SILENT, ", ".join(unnamed)
    return (NAMED, skipped[missing[0]]) if missing and missing[0] in skipped else (EXACT, "")


def _measured(
    module: Module, batches: Sequence[Tensor | dict[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The numbers of each layer, `[input, head]`, by path; and what is skipped."""
    _, towers, samples = from_module(module, batches)
    found, skipped = dict[str, list[Tensor]](), dict[str, str]()
    for tower in towers:
        skipped |= tower.skipped
        paths = {layer.index: layer.path for layer in tower.layers}
        for of_batch in measure(tower, samples, metrics=[METRIC], token_sets=["all"]):
            for values in of_batch:
                numbers = torch.as_tensor(values.values).reshape(-1, values.values.shape[-1])
                found.setdefault(paths[values.layer], []).append(numbers)
    return {path: torch.cat(of) for path, of in found.items()}, skipped


def main() -> int:
    """Tries modules and prints how many of each kind ended how."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    options.add_argument("--tries", type=int, default=200)
    options.add_argument("--first", type=int, default=0, help="the first seed")
    options.add_argument("--seed", type=int, help="one module, shown")
    given = options.parse_args()
    if given.seed is not None:
        built = Built.drawn(given.seed)
        print(*(f"{one.name}: {getattr(built, one.name)}" for one in fields(built)), sep="\n")
        print(*judged(given.seed, built), sep=": ")
        return 0
    began, ended, refused = time.time(), Counter[str](), Counter[str]()
    for seed in range(given.first, given.first + given.tries):
        verdict, why = judged(seed)
        ended[verdict] += 1
        if verdict in FAULTS:
            print(f"{seed}: {verdict}: {why}", flush=True)
        elif verdict == REFUSED:
            refused[why] += 1
    print(", ".join(f"{verdict} {count}" for verdict, count in ended.most_common()))
    print(*(f"  {count} {why}" for why, count in refused.most_common()), sep="\n")
    print(f"{given.tries} tries in {time.time() - began:.0f} s")
    return int(any(ended[verdict] for verdict in FAULTS))


if __name__ == "__main__":
    sys.exit(main())
