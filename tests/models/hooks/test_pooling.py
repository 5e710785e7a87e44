"""Other numbers of queries and keys: what is pooled is found and measured, what is of others is named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from attention_modules import Attention, Stack
from reference import dense_pattern
from torch import Tensor, nn

from diag.attention.call import AttentionCall
from diag.errors import MeasurementError
from diag.measure.edited_model import by_own_numbers
from diag.measure.loop import measure
from diag.models.families.from_module import from_module
from diag.models.hooks.interventions import parse
from diag.models.hooks.meaning import IN_PARTS, Meaning, meaning_of
from diag.models.hooks.seam import attention_calls
from diag.models.hooks.seen import LEARNED, NO_QUERIES, OVERLAP, REASONS
from diag.models.hooks.squares import in_squares
from diag.run.api import probe


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def meaning_on(module: nn.Module, *given: Tensor) -> Meaning:
    other = [x.clone() for x in given]
    other[0][0] = torch.randn_like(other[0][0])
    return meaning_of(module.eval(), lambda x: module(*x), given, tuple(other), inputs=len(given[0]))


def told(module: nn.Module, *given: Tensor) -> str:
    """What is found of a layer behind a plain one: "own", "pooled" or "others", or why it is not measured."""
    (tower,) = meaning_on(Stack(Attention(), module), *given).towers
    found = {layer.path: layer.form.keys_of for layer in tower.layers} | dict(tower.skipped)
    (path,) = found.keys() - {"layers.0"}
    assert path.startswith("layers.1")
    assert tower.depth == 2
    return found[path]


# --- handmade: 36 tokens, 6 x 6


def squares(x: Tensor, side: int = 2, width: int = 6) -> Tensor:
    """Tokens `[…, token, dim]` averaged in squares of a grid."""
    grid = x.unflatten(-2, (-1, side, width // side, side))
    return grid.mean((-4, -2)).flatten(-3, -2)


class Changed(Attention):
    """Attention over what functions make of its queries, and of its keys and values."""

    def __init__(
        self,
        of_keys: Callable[[Tensor], Tensor],
        of_queries: Callable[[Tensor], Tensor] = lambda q: q,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.of_keys, self.of_queries = of_keys, of_queries

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = self.call(self.of_queries(q), self.of_keys(k), self.of_keys(v))
        return self.out(y.transpose(1, 2).flatten(2))


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def convolved(x: Tensor) -> Tensor:
    """A mean over 3 x 3 places, in steps of two."""
    grid = x.unflatten(2, (6, 6)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    pooled = F.avg_pool2d(grid, 3, 2, 1, count_include_pad=False)
    return pooled.flatten(2).mT.unflatten(0, (len(x), -1))


CASES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "squares": (squares, lambda q: q, "pooled"),
    "overlapping squares": (convolved, lambda q: q, "pooled"),
    "strided keys": (lambda k: k.unflatten(2, (6, 6))[:, :, ::2, ::2].flatten(2, 3), lambda q: q, "pooled"),
    "squares in another order": (lambda k: squares(k).flip(2), lambda q: q, "others"),
    "runs of four": (lambda k: k.unflatten(2, (-1, 4)).mean(3), lambda q: q, "others"),
    "no squares": (lambda k: k[:, :, ::3], lambda q: q, "others"),
    "strided queries": (
        lambda k: k,
        lambda q: q.unflatten(2, (6, 6))[:, :, ::2, ::2].flatten(2, 3),
        "others",
    ),
    "the first queries": (lambda k: k, lambda q: q[:, :, :5], "others"),
    "its own and pooled ones": (lambda k: torch.cat([k, squares(k)], 2), lambda q: q, "others"),
}


@pytest.mark.parametrize("call", [F.scaled_dot_product_attention, written_out], ids=["fused", "written out"])
@pytest.mark.parametrize("case", CASES)
def test_keys_and_queries_of_the_same_tokens_are_found(case: str, call: Callable[..., Tensor]) -> None:
    of_keys, of_queries, kind = CASES[case]
    assert told(Changed(of_keys, of_queries, call=call), torch.randn(2, 36, 16)) == kind


def test_keys_that_a_module_is_handed_are_found_where_they_were_pooled() -> None:
    class Handing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            pooled = squares(x)
            return x + self.mha(x, pooled, pooled, need_weights=False)[0]

    assert told(Handing(), torch.randn(2, 36, 16)) == "pooled"


MANY = "36 queries over 9 keys: cross-attention or pooling"


class Asking(Attention):
    """Queries of `x` over keys of something else that the module holds."""

    def __init__(
        self, memory: Callable[[Tensor], Tensor], call: Any = F.scaled_dot_product_attention
    ) -> None:
        super().__init__(call=call)
        self.memory = memory

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        (q, _, _), (_, k, v) = self.heads(x), self.heads(self.memory(x))
        return self.out(self.call(q, k, v).transpose(1, 2).flatten(2))


def learned_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return written_out(torch.ones_like(q[:, :, :4]), k, v)


OTHERS: dict[str, tuple[nn.Module, str]] = {
    "memory of its own": (Asking(lambda x: torch.ones(len(x), 9, 16)), MANY),
    "one query": (
        Changed(lambda k: k, lambda q: q.mean(2, keepdim=True)),
        "1 queries over 36 keys: cross-attention or pooling",
    ),
    "a cache beside its own keys": (
        Changed(lambda k: torch.cat([torch.ones_like(k[:, :, :3]), squares(k)], 2)),
        "36 queries over 12 keys: cross-attention or pooling",
    ),
    "learned queries": (
        Changed(lambda k: k, lambda q: torch.ones_like(q[:, :, :4])),
        "4 queries over 36 keys: cross-attention or pooling",
    ),
    "learned queries, written out": (
        Changed(lambda k: k, call=learned_queries),
        "4 queries over 36 keys: cross-attention or pooling, or a softmax that is not over keys",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_of_the_same_tokens_is_named(case: str) -> None:
    module, why = OTHERS[case]
    assert told(module, torch.randn(2, 36, 16)) == why


def test_keys_of_a_second_argument_are_of_others() -> None:
    """Also where that was pooled of the first one before: what runs the module has mixed its tokens."""

    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.decoder = Attention(), nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            memory = squares(self.encoder(x))
            return x + self.decoder(x, memory, memory, need_weights=False)[0]

    (tower,) = meaning_on(Reads(), torch.randn(2, 36, 16)).towers
    assert [layer.path for layer in tower.layers] == ["encoder"]
    assert tower.skipped == {"decoder": MANY}


class Halo(Attention):
    """Blocks of four tokens, whose keys are also those of the blocks beside them."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        blocks = [F.pad(y, (0, 0, 2, 2)).unfold(2, 8, 4).mT for y in (k, v)]
        y = F.scaled_dot_product_attention(q.unflatten(2, (-1, 4)), *blocks).flatten(2, 3)
        return self.out(y.transpose(1, 2).flatten(2))


def test_windows_that_overlap_are_no_pooling() -> None:
    assert told(Halo(), torch.randn(2, 36, 16)) == REASONS[OVERLAP]


# --- reasons


def in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.chunk(3, 2)], 2)


def weights_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.cat([part @ v for part in (q @ k.mT).softmax(-1).chunk(2, 2)], 2)


def keys_in_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.mT).softmax(-1)
    return weights[..., :18] @ v[:, :, :18] + weights[..., 18:] @ v[:, :, 18:]


@pytest.mark.parametrize("call", [in_chunks, weights_in_chunks, keys_in_chunks])
def test_attention_in_parts_is_no_cross_attention(call: Callable[..., Tensor]) -> None:
    module = Changed(lambda k: k, call=call)
    assert told(module, torch.randn(2, 36, 16)) == IN_PARTS
    with pytest.raises(MeasurementError, match=r"no layer can be measured .* in parts") as error:
        meaning_on(module, torch.randn(2, 36, 16))
    assert error.value.tip == "call attention once, for all queries and keys"


class Efficient(nn.Module):
    """Efficient attention: a softmax over features of queries, and one over tokens of keys."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.num_heads = nn.Linear(16, 48), 1

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return x + q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Mixed(nn.Module):
    """A learned matrix mixes tokens, whatever they are."""

    def __init__(self) -> None:
        super().__init__()
        self.weights, self.v = nn.Parameter(torch.randn(36, 36)), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.weights.softmax(-1) @ self.v(x)


@pytest.mark.parametrize(
    ("module", "tokens", "why"),
    [
        (Mixed(), 36, REASONS[LEARNED]),
        (Efficient(), 16, REASONS[NO_QUERIES]),
        (
            Efficient(),
            36,
            "16 queries over 36 keys: cross-attention or pooling, or a softmax that is not over keys",
        ),
    ],
    ids=["a learned matrix", "as many features as tokens", "features"],
)
def test_what_has_no_queries_is_no_cross_attention(module: nn.Module, tokens: int, why: str) -> None:
    with pytest.raises(MeasurementError) as error:
        meaning_on(nn.Sequential(module), torch.randn(2, tokens, 16))
    assert f"('0': {why})" in str(error.value)


def test_squares_are_told_by_what_changed() -> None:
    """Token 7 of 4 x 4 is at the end of the second row: of 2 x 2 squares, in the second one."""
    token, key, other = (torch.tensor([number]) for number in (7, 1, 2))
    assert in_squares([(token, key)], 16, 4, set())
    assert not in_squares([(token, other)], 16, 4, set())
    assert not in_squares([(token, key), (token, other)], 16, 4, set())
    assert in_squares([(key, token)], 4, 16, set())  # queries in squares of keys
    assert in_squares([(token + 1, key + 1)], 17, 5, set())  # behind a class token
    assert in_squares([(token + 1, key)], 17, 4, set())
    assert not in_squares([(token, key)], 16, 3, set())
    wide = torch.tensor([9])  # of 2 x 8: in the second row
    assert in_squares([(wide, torch.tensor([0]))], 16, 4, {2, 8})
    assert not in_squares([(wide, torch.tensor([0]))], 16, 4, set())  # 4 x 4: in the third
    assert not in_squares([], 16, 4, set())


# --- real architectures


def segformer() -> nn.Module:
    sizes = {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 40, 64], "num_attention_heads": [1, 2, 5, 8]}
    return transformers.SegformerModel(transformers.SegformerConfig(**sizes))


POOLED, OTHER = "pooled", "others"
MODELS: dict[str, tuple[Callable[[], nn.Module], int, dict[str, str], int]] = {
    "pvt_v2_b0": (
        lambda: timm.create_model("pvt_v2_b0"),
        64,
        {f"stages.{s}.blocks.{n}.attn": POOLED for s in range(3) for n in range(2)},
        8,
    ),
    "segformer": (segformer, 64, {f"stages.{s}.blocks.0.attention": POOLED for s in range(3)}, 4),
    "mvitv2_tiny": (
        lambda: timm.create_model("mvitv2_tiny", img_size=128),
        128,
        {f"stages.{s}.blocks.{n}.attn": POOLED for s, n in ((0, 0), (1, 1))}
        | {f"stages.{s}.blocks.0.attn": OTHER for s in (2, 3)},
        10,
    ),
    "hiera_tiny_224": (
        lambda: timm.create_model("hiera_tiny_224", img_size=64),
        64,
        {f"blocks.{n}.attn": OTHER for n in (1, 3, 10)},
        12,
    ),
    "nextvit_small": (
        lambda: timm.create_model("nextvit_small"),
        64,
        {f"stages.{s}.blocks.{n}.e_mhsa": OTHER for s, n in ((1, 3), (2, 4), (2, 9))},
        20,
    ),
    "levit_128s": (
        lambda: timm.create_model("levit_128s"),
        224,
        {f"stages.{s}.downsample.attn_downsample": OTHER for s in (1, 2)},
        11,
    ),
}


class Patterns:
    """The weights of every softmax of a pass, read off the functions and not off the seam."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[Tensor] = []
        fused, softmax = F.scaled_dot_product_attention, Tensor.softmax

        def attending(q: Tensor, k: Tensor, v: Tensor, *more: Any, **options: Any) -> Tensor:
            assert not any(x is not None for x in more)
            scale = options.get("scale") or q.shape[-1] ** -0.5
            self.seen.append(torch.softmax(q.double() @ k.double().mT * scale, -1))
            return fused(q, k, v, *more, **options)

        def normalised(x: Tensor, *more: Any, **options: Any) -> Tensor:
            self.seen.append(torch.softmax(x.double(), -1))
            return softmax(x, *more, **options)

        monkeypatch.setattr(F, "scaled_dot_product_attention", attending)
        monkeypatch.setattr(Tensor, "softmax", normalised)


WEIGHED = ("entropy", "entropy_normalized", "first_weight", "row_sum", "attention_distance")
OF_VALUES = (
    "cos_y_vself",
    "self_weight",
    "value_similarity",
    "cos_y_vpartner",
    "previous_weight",
    "near_share",
)


def distance(pattern: Tensor, size: int) -> Tensor:
    """Mean distance in pixels, `[input, head]`: a key is in the middle of its square."""
    side, fewer = (math.isqrt(number) for number in pattern.shape[-2:])
    step, stride = size / side, side // fewer
    tokens = torch.cartesian_prod(torch.arange(side), torch.arange(side)).double() * step
    corners = torch.cartesian_prod(torch.arange(fewer), torch.arange(fewer)).double() * stride
    middles = (corners + (stride - 1) / 2) * step
    return (pattern * (tokens[:, None] - middles).norm(dim=-1)).sum(-1).mean(-1)


@pytest.mark.parametrize("name", MODELS)
def test_real_layers_are_measured_where_a_pattern_is_enough(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against dense float64 of the weights as the functions made them; distances by their definition."""
    build, size, unequal, depth = MODELS[name]
    with torch.inference_mode(False):
        model = build().eval()
    images = torch.randn(2, 3, size, size)
    _, (tower,), samples = from_module(model, [images], apart=False)
    assert {
        layer.path: layer.form.keys_of for layer in tower.layers if layer.form.keys_of != "own"
    } == unequal
    assert tower.depth == depth
    assert [tower.places[layer.index].path for layer in tower.layers] == [
        layer.path for layer in tower.layers
    ]
    chosen = [layer.index for layer in tower.layers if layer.path in unequal]
    placed = replace(tower, name="vision", facts={"image_size": size})
    (measured,) = measure(placed, samples, metrics=[*WEIGHED, *OF_VALUES], token_sets=["all"], layers=chosen)
    with monkeypatch.context() as patch:
        patterns = Patterns(patch)
        model(images)
    seen = [pattern for pattern in patterns.seen if pattern.shape[-1] != pattern.shape[-2]]
    assert len(seen) == len(measured) == len(unequal)
    for values, pattern in zip(measured, seen, strict=True):
        kind, keys = unequal[values.module], pattern.shape[-1]
        assert values.facts.value_from == kind
        got = dict(zip(values.metrics, values.values[0], strict=True))  # [input, head] each
        rows = pattern.transpose(1, 2) if pattern.ndim == 5 else pattern[:, None]  # [input, window, head, …]
        entropy = -torch.xlogy(rows, rows).sum(-1).mean((1, 3))
        np.testing.assert_allclose(got["entropy"], entropy, rtol=1e-5)
        np.testing.assert_allclose(got["entropy_normalized"], entropy / math.log(keys), rtol=1e-5)
        np.testing.assert_allclose(got["first_weight"], rows[..., 0].mean((1, 3)), rtol=1e-5)
        np.testing.assert_allclose(got["row_sum"], np.ones_like(got["row_sum"]), rtol=1e-5)
        if kind == POOLED:
            np.testing.assert_allclose(got["attention_distance"], distance(pattern, size), rtol=1e-5)
        else:
            assert np.isnan(got["attention_distance"]).all()
        assert np.isnan([got[metric] for metric in OF_VALUES]).all()
    # as a module, tokens have no places
    (plain,) = measure(
        tower, samples, metrics=["entropy", "attention_distance"], token_sets=["all"], layers=chosen
    )
    for values, same in zip(measured, plain, strict=True):
        np.testing.assert_array_equal(same.values[0, 0], values.values[0, 0])
        assert np.isnan(same.values[0, 1]).all()


def test_a_pooled_call_is_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys and values as PVT's weights make them, in float64; what is returned goes on."""
    with torch.inference_mode(False):
        model = timm.create_model("pvt_v2_b0").eval()
    images, path = torch.randn(2, 3, 64, 64), "stages.1.blocks.0.attn"
    _, (tower,), _ = from_module(model, [images])
    (layer,) = (each for each in tower.layers if each.path == path)
    read: list[Tensor] = []
    module = model.get_submodule(path)
    kept = module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    calls: list[AttentionCall] = []
    with attention_calls([layer], calls.append):
        expected = model(images)
    kept.remove()
    (call,), x = calls, read[0].double()
    exact = deepcopy(module).double()
    q = exact.q(x).unflatten(-1, (2, -1)).transpose(1, 2)
    pooled = exact.sr(x.mT.unflatten(-1, (8, 8))).flatten(2).mT
    k, v = exact.kv(exact.norm(pooled)).unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    assert (call.keys_of, call.tokens, call.keys, call.causal, call.mask) == ("pooled", 64, 4, False, None)
    for found, wanted in ((call.query, q), (call.key, k), (call.value, v)):
        assert found is not None
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    weights = torch.from_numpy(dense_pattern(call))
    torch.testing.assert_close(weights, (q @ k.mT * 32**-0.5).softmax(-1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(call.output.double(), weights @ v, rtol=1e-4, atol=1e-5)
    with attention_calls([layer], lambda call: call.output):
        assert torch.equal(model(images), expected)
    with attention_calls([layer], lambda call: torch.zeros_like(call.output)):
        assert not torch.allclose(model(images), expected)


def test_stream_metrics_leave_out_layers_that_make_another_stream() -> None:
    """Hiera's blocks that pool their queries: their neighbours have the numbers that they had."""
    with torch.inference_mode(False):
        model = timm.create_model("hiera_tiny_224", img_size=64).eval()
    run = probe(model, [torch.randn(2, 3, 64, 64)], metrics=["entropy", "attention_update_ratio"])
    means = run.layers.pivot_table(index="layer", columns="metric", values="mean", dropna=False)
    assert [*means.index] == [*range(12)]
    assert means["entropy"].notna().all()
    assert [*means.index[means["attention_update_ratio"].isna()]] == [1, 3, 10]


def test_an_edit_is_of_the_layers_that_have_what_it_needs() -> None:
    with torch.inference_mode(False):
        model = timm.create_model("pvt_v2_b0").eval()
    _, (tower,), _ = from_module(model, [torch.randn(2, 3, 64, 64)])
    named = {
        "xsa": (6, 7),
        "identity": (6, 7),
        "mask_self": (6, 7),
        "uniform": None,
        "random_direction": None,
    }
    for name, layers in named.items():
        (edit,) = by_own_numbers([parse(name)], tower.layers, tower.places)
        assert (edit.layers and tuple(sorted(edit.layers))) == layers
    for name in named:
        (edit,) = by_own_numbers([parse(f"{name}:0")], tower.layers, tower.places)
        assert edit.layers == {0}
