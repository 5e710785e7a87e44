"""What calls mean is found by test: on modules whose names lie, and on real architectures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from attention_modules import Attention, Broken, Stack, TorchAttention, assert_untouched
from surveys import layers_on, meaning_on
from torch import Tensor, nn

import diag
from diag.attention.call import AttentionCall
from diag.attention.pattern import attend, pattern_rows
from diag.errors import UserError
from diag.measure.loop import measure
from diag.models.families.from_module import from_module
from diag.models.hooks.content import INPUTS, OTHERWISE, WINDOWS
from diag.models.hooks.layout import PLAIN, Layout, layout_of
from diag.models.hooks.meaning import BESIDE_OWN, EAGER, SEVERAL, Meaning, meaning_of
from diag.models.hooks.seam import attention_calls
from diag.models.hooks.seen import CHANNELS, ELSEWHERE, EVERYTHING, HEADS, ORDER, OVERLAP, REASONS

TEXT = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NARROW = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
SEQ2SEQ = {
    f"{part}_{name}": value
    for part in ("encoder", "decoder")
    for name, value in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 16))
} | {"d_model": 16}


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


def images(size: int = 32, inputs: int = 2) -> Tensor:
    return torch.randn(inputs, 3, size, size)


def ids(tokens: int = 9, inputs: int = 2) -> Tensor:
    return torch.stack([torch.randperm(50)[:tokens] + 3 for _ in range(inputs)])


def told(found: Meaning) -> dict[str, dict[int, str]]:
    """Tower → number of each layer → its name."""
    return {one.name: {layer.index: layer.name for layer in one.layers} for one in found.towers}


# --- axis -------------------------------------------------------------------------------------------


class OverChannels(Attention):
    """XCiT: the softmax is over channels."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.transpose(-1, -2) for part in self.heads(x))
        y = F.scaled_dot_product_attention(q, k, v).transpose(-1, -2)
        return x + self.out(y.transpose(1, 2).flatten(2))


class OverHeads(Attention):
    """`[batch, token, head, dim]`, as other libraries want it: PyTorch attends over heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in self.heads(x)))
        return x + self.out(y.flatten(2))


class Shifted(Attention):
    """Keys and values stand elsewhere than their queries."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k.roll(1, 2), v.roll(1, 2))
        return x + self.out(y.transpose(1, 2).flatten(2))


class OverAll(Attention):
    """Every value has seen all tokens before."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + x.cumsum(1).flip(1).cumsum(1), mask)


class Nearby(Attention):
    """Convolutional projections (CvT): values are made of neighbours."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x + x.roll(1, 1), mask)


class Learned(Attention):
    """As many learned queries as tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(torch.ones_like(q), k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Positioned(nn.Module):
    """DETR: queries and keys have positions, values have not, and attention gets them apart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(16, 2, batch_first=True)
        self.places = torch.randn(9, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        placed = x + self.places
        return x + self.inner(placed, placed, x, need_weights=False)[0]


class Handing(nn.Module):
    """What attends is a module without weights, which is handed queries, keys and values."""

    class Attend(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    def __init__(self) -> None:
        super().__init__()
        self.parts, self.inner = Attention(), self.Attend()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x + self.parts.out(self.inner(*self.parts.heads(x)).transpose(1, 2).flatten(2))


class Functional(nn.Module):
    """Three depths in one module's forward."""

    def __init__(self) -> None:
        super().__init__()
        self.depths = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for depth in self.depths:
            x = x + depth.out(F.scaled_dot_product_attention(*depth.heads(x)).transpose(1, 2).flatten(2))
        return x


class TwoBranches(Attention):
    """Two maps, each over values of its own."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(q, k, v) + F.scaled_dot_product_attention(-q, k, v.flip(-1))
        return x + self.out(y.transpose(1, 2).flatten(2))


class Both(Attention):
    """Its own tokens first, then another sequence of the same length, in one forward."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        own = F.scaled_dot_product_attention(*self.heads(x))
        q, (_, k, v) = self.heads(x)[0], self.heads(memory)
        return x + self.out((own + F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (OverChannels, CHANNELS),
        (OverHeads, HEADS),
        (Shifted, ORDER),
        (OverAll, EVERYTHING),
        (Learned, ELSEWHERE),
    ],
)
def test_what_is_not_over_its_own_tokens_is_named(layer: type[nn.Module], reason: str) -> None:
    (tower,) = meaning_on(Stack(Attention(), layer()).eval(), torch.randn(2, 9, 16)).towers
    assert [one.path for one in tower.layers] == ["layers.0"]
    assert (tower.skipped, tower.depth) == ({"layers.1": REASONS[reason]}, 2)


@pytest.mark.parametrize(
    ("layer", "path"), [(Positioned, "inner"), (Handing, "inner"), (Attention, ""), (TorchAttention, "mha")]
)
def test_own_tokens_are_found_however_they_are_handed_on(layer: type[nn.Module], path: str) -> None:
    found = layers_on(Stack(layer(), layer()).eval(), torch.randn(2, 9, 16))
    assert [one.path for one in found] == [f"layers.{i}.{path}".rstrip(".") for i in (0, 1)]
    assert {one.form.value_from for one in found} == {"own"}


def test_values_that_are_made_of_neighbours_are_told() -> None:
    (first, second) = layers_on(Stack(Attention(), Nearby()).eval(), torch.randn(2, 9, 16))
    assert (first.form.value_from, second.form.value_from) == ("own", "mixed")


class WrittenOut(Functional):
    """The same, its softmax its own, and causal."""

    def forward(self, x: Tensor) -> Tensor:
        for depth in self.depths:
            q, k, v = depth.heads(x)
            later = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            weights = (q @ k.mT * 8**-0.5).masked_fill(later, -torch.inf).softmax(-1)
            x = x + depth.out((weights @ v).transpose(1, 2).flatten(2))
        return x


class AcrossAxes(Attention):
    """Rows of a grid of three by three, then its columns, in one forward."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for _ in range(2):
            rows = x.unflatten(1, (3, 3)).flatten(0, 1)
            rows = rows + self.out(
                F.scaled_dot_product_attention(*self.heads(rows)).transpose(1, 2).flatten(2)
            )
            x = rows.unflatten(0, (-1, 3)).transpose(1, 2).flatten(1, 2)
        return x


@pytest.mark.parametrize("module", [TwoBranches(), AcrossAxes()])
def test_several_calls_of_one_run_are_not_taken_for_windows(module: nn.Module) -> None:
    with pytest.raises(UserError, match=SEVERAL):
        meaning_on(module.eval(), torch.randn(2, 9, 16))


@pytest.mark.parametrize(("kind", "options"), [(Functional, {}), (WrittenOut, {"is_causal": True})])
@pytest.mark.parametrize("within", [False, True])
def test_calls_that_follow_each_other_are_layers_of_their_own(
    kind: type[Functional], options: dict, within: bool
) -> None:
    torch.manual_seed(0)
    module, x = kind().eval(), torch.randn(2, 9, 16)
    apart = Stack(*module.depths).eval()
    for layer in module.depths:
        layer.options = options
    around = nn.Sequential(nn.Linear(16, 16), module) if within else module
    given = around[0](x) if within else x
    (tower,) = meaning_on(around, x).towers
    assert [layer.index for layer in tower.layers] == [0, 1, 2]
    names = [f"{'1' * within} (call {i})".strip() for i in range(3)]
    assert [layer.name for layer in tower.layers] == names
    calls, expected, last = list[AttentionCall](), list[AttentionCall](), list[AttentionCall]()
    with attention_calls(tower.layers, calls.append) as sightings:
        output = around(x)
    with attention_calls(layers_on(apart, x), expected.append):
        torch.testing.assert_close(apart(given), output)
    assert [(call.layer, call.module) for call in calls] == list(enumerate(names))
    assert sightings.projection == dict.fromkeys(names, "as captured")
    for call, other in zip(calls, expected, strict=True):
        torch.testing.assert_close(call.value, other.value)
        torch.testing.assert_close(call.output, other.output)
        assert call.visibility.rule == other.visibility.rule
    with attention_calls(tower.layers[2:], last.append):
        around(x)
    assert [call.module for call in last] == names[2:]
    assert torch.equal(last[0].value, calls[2].value)
    with attention_calls(tower.layers[:1], lambda call: torch.zeros_like(call.output)):
        silenced = around(x)
    with attention_calls(layers_on(apart, x)[:1], lambda call: torch.zeros_like(call.output)):
        torch.testing.assert_close(silenced, apart(given))


def test_the_numbers_of_a_model_that_is_one_function_are_those_of_its_layers() -> None:
    module = Functional().eval()
    x = [torch.randn(2, 9, 16)]
    one, apart = (diag.probe(each, x).layers for each in (module, Stack(*module.depths).eval()))
    torch.testing.assert_close(
        torch.tensor(one["mean"].to_numpy()), torch.tensor(apart["mean"].to_numpy()), equal_nan=True
    )
    assert one["layer"].tolist() == apart["layer"].tolist()
    chosen = diag.probe(module, x, layers=[1]).layers
    assert set(chosen["layer"]) == {1}
    torch.testing.assert_close(
        torch.tensor(chosen["mean"].to_numpy()),
        torch.tensor(one.loc[one["layer"] == 1, "mean"].to_numpy()),
        equal_nan=True,
    )


def test_of_two_calls_the_one_over_its_own_tokens_is_measured() -> None:
    module, x, calls = Both().eval(), torch.randn(2, 9, 16), list[AttentionCall]()
    (layer,) = layers_on(module, x, torch.randn(2, 9, 16))
    assert layer.form.calls == frozenset({0})
    with attention_calls([layer], calls.append):
        module(x, torch.randn(2, 9, 16))
    (call,) = calls
    assert torch.equal(call.value, module.heads(x)[2])


def test_values_of_an_earlier_layer_are_told() -> None:
    class Sharing(Stack):
        """Gemma-3n: a layer takes keys and values of the one before."""

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            first, second = self.layers
            y = first(x)
            _, k, v = first.heads(x)
            q = second.heads(y)[0]
            return y + second.down(second.attend(q, k, v))

    class Second(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.attend = Handing.Attend()

        def down(self, y: Tensor) -> Tensor:
            return self.out(y.transpose(1, 2).flatten(2))

    first, second = layers_on(Sharing(Attention(), Second()).eval(), torch.randn(2, 9, 16))
    assert (first.form.value_from, second.form.value_from) == ("own", "layer 0")


# --- owner ------------------------------------------------------------------------------------------


class Windows(Attention):
    """Windows of three tokens, in the order that is asked for."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        windows = x.unflatten(1, (3, -1))
        windows = windows.transpose(0, 1) if self.first else windows
        y = super().forward(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        return (y.transpose(0, 1) if self.first else y).flatten(1, 2)


class TwoViews(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        both = super().forward(torch.cat([x, x.flip(2)]))
        return both[: len(x)] + both[len(x) :]


class Mixing(Attention):
    """Inputs see each other."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x - x.mean(0), mask)


class Tiled(Attention):
    """SmolVLM: of each input as many tiles as are not empty."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        tiles = x.unflatten(1, (3, -1))
        kept = tiles.abs().sum((2, 3)) > 0
        made = torch.zeros_like(tiles)
        made[kept] = super().forward(tiles[kept])
        return made.flatten(1, 2)


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (Attention(), INPUTS),
        (Windows(first=False), WINDOWS),
        (Windows(first=True), OTHERWISE),
        (TwoViews(), OTHERWISE),
        (Mixing(), OTHERWISE),
    ],
)
def test_whose_the_rows_are_is_found(layer: nn.Module, rows: str) -> None:
    found = meaning_on(layer.eval(), torch.randn(2, 9, 16))
    assert (found.rows, found.random, found.sequence_first) == (rows, False, False)


@pytest.mark.parametrize(
    ("layer", "alike", "read", "after"),
    [
        # two inputs, then the second alone: what comes after the last attention runs once
        (Attention(), 0, [2, 1], [2]),
        (Windows(first=False), 0, [2, 1], [2]),
        # where this is not plain, another first input is put beside the second
        (Windows(first=True), 0, [2, 1, 2], [2]),
        (Mixing(), 0, [2, 1, 2, 2], [2]),
        (Attention(), 9, [2, 1, 2], [2]),
        (Attention(), 4, [2, 1], [2]),
        (Windows(first=False), 3, [2, 1, 2], [2]),
    ],
)
def test_a_plain_model_is_told_by_its_second_input_alone(
    layer: nn.Module, alike: int, read: list[int], after: list[int]
) -> None:
    """alike: how many tokens at the beginning are the same in both inputs."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = layer, nn.Linear(16, 50)

        def forward(self, x: Tensor) -> Tensor:
            ran.append(len(x))
            y = self.layer(x)
            of_head.append(len(y))
            return self.head(y)

    ran, of_head = list[int](), list[int]()
    module, x = Whole().eval(), torch.randn(2, 9, 16)
    x[1, :alike] = x[0, :alike]
    other = torch.cat([torch.randn(1, 9, 16), x[1:]])
    meaning_of(module, module, x, other, inputs=2, last=x[1:])
    assert (ran, of_head) == (read, after)


def test_in_half_precision_an_input_is_not_compared_with_itself_alone() -> None:
    ran = list[int]()
    module, x = Attention().eval().bfloat16(), torch.randn(2, 9, 16).bfloat16()
    module.register_forward_pre_hook(lambda module, args: ran.append(len(args[0])))
    other = torch.cat([torch.randn(1, 9, 16).bfloat16(), x[1:]])
    assert meaning_of(module, module, x, other, inputs=2, last=x[1:]).rows == INPUTS
    assert ran == [2, 2]


def test_unequal_tiles_are_not_shared_out_evenly() -> None:
    x = torch.randn(2, 9, 16)
    x[1, 3:] = 0  # three tiles and one: four rows for two inputs
    assert meaning_on(Tiled().eval(), x).rows == OTHERWISE


def test_sequences_that_come_first_are_found() -> None:
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32), 1, enable_nested_tensor=False
    ).eval()
    assert meaning_on(encoder, torch.randn(2, 16, 16)).sequence_first


def test_a_model_that_draws_is_found() -> None:
    class Drawing(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return super().forward(x + torch.randn_like(x), mask)

    assert meaning_on(Drawing().eval(), torch.randn(2, 9, 16)).random


# --- content ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "rows"), [(64, 9), (20, 1)])
def test_what_fills_up_windows_is_padding(size: int, rows: int) -> None:
    """SAM: windows of 7 × 7 patches over 16 × 16 of them, or over 5 × 5."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "output_channels": 8}
    config = transformers.SamVisionConfig(
        **sizes, image_size=size, patch_size=4, window_size=7, global_attn_indexes=[2]
    )
    found = layers_on(transformers.SamVisionModel(config).eval(), images(size))
    side = -(-size // 4 // 7) * 7
    real = torch.zeros(side, side, dtype=torch.bool)
    real[: size // 4, : size // 4] = True
    windows = real.unflatten(0, (-1, 7)).unflatten(2, (-1, 7)).transpose(1, 2).reshape(rows, 49)
    for layer in found[:2]:
        (padding,) = layer.form.padding
        assert padding is not None
        assert torch.equal(padding, ~windows)
    assert found[2].form.padding == ()


@pytest.mark.parametrize("faint", [1.0, 2e-5])
def test_padding_between_tokens_is_found_where_no_later_layer_shows_it(faint: float) -> None:
    """faint: how much of the values is of the input; every second token has a fiftieth of that."""
    places, of_input = torch.randn(9, 16), faint * torch.tensor([1.0, 0.02]).repeat(5)[:9, None]

    class Filled(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            filled = torch.zeros(len(x), 4, 4, 16)
            filled[:, :3, :3] = (places + of_input * x).unflatten(1, (3, 3))
            y = super().forward(filled.flatten(1, 2)).unflatten(1, (4, 4))[:, :3, :3].flatten(1, 2)
            return places + of_input * (x + y)

    first, second = layers_on(Stack(Filled(), Attention()).eval(), torch.randn(2, 9, 16))
    real = torch.zeros(4, 4, dtype=torch.bool)
    real[:3, :3] = True
    assert torch.equal(first.form.padding[0], ~real.flatten()[None])
    assert second.form.padding == ()


class WithClassTokens(nn.Module):
    """16 patches in windows of four, each with a class token of its own, which layers over all keep."""

    def __init__(self, *over_all: bool) -> None:
        super().__init__()
        self.layers, self.over_all = nn.ModuleList([Attention() for _ in over_all]), over_all
        self.token = nn.Parameter(torch.randn(1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (4, 4)).flatten(0, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        for layer, joined in zip(self.layers, self.over_all, strict=True):
            x = layer(x.reshape(-1, 20, 16)).reshape(-1, 5, 16) if joined else layer(x)
        return x


@pytest.mark.parametrize("over_all", [(False, False), (False, True), (True, False), (True, False, True)])
def test_a_class_token_of_each_window_is_no_padding(over_all: tuple[bool, ...]) -> None:
    (tower,) = meaning_on(WithClassTokens(*over_all).eval(), torch.randn(2, 16, 16)).towers
    assert all(layer.form.padding == () for layer in tower.layers)
    assert (tower.side_by_side, dict(tower.joined)) == (4 if any(over_all) else 1, {})


def test_padding_that_shifts_is_padding_in_each_layer() -> None:
    """Windows of two places, 3 of 4 filled: what fills them stands elsewhere in the second layer."""

    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([Attention(), Attention()])

        def forward(self, x: Tensor) -> Tensor:
            for layer, shift in zip(self.layers, (0, 1), strict=True):
                filled = F.pad(x, (0, 0, 0, 1)).roll(shift, 1)
                out = layer(filled.unflatten(1, (2, 2)).flatten(0, 1))
                x = out.unflatten(0, (-1, 2)).flatten(1, 2).roll(-shift, 1)[:, :3]
            return x

    first, second = layers_on(Filled().eval(), torch.randn(2, 3, 16))
    assert first.form.padding[0].tolist() == [[False, False], [False, True]]
    assert second.form.padding[0].tolist() == [[True, False], [False, False]]


def test_layers_that_are_not_measured_tell_of_padding_too() -> None:
    """SepViT: one layer with constant tokens at its end may have prefix tokens there; a second one, which
    calls attention in a way that is not understood, shows that they are none.
    """

    class FilledUp(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.inner(F.pad(x, (0, 0, 0, 1)))[:, :-1]

    module = Stack(FilledUp(Attention()), FilledUp(TwoBranches())).eval()
    (tower,) = meaning_on(module, torch.randn(2, 3, 16)).towers
    (layer,) = tower.layers
    assert (layer.path, tower.skipped) == ("layers.0.inner", {"layers.1.inner": SEVERAL})
    assert layer.form.padding[0].tolist() == [[False, False, False, True]]


@pytest.mark.parametrize("stages", [[1, 3], [0, 2]], ids=["windows first", "all tokens first"])
def test_class_tokens_of_windows_count_where_they_stand(stages: list[int]) -> None:
    """RF-DETR: layers over all tokens see four windows side by side, each behind its class token."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "num_windows": 2}
    config = transformers.RfDetrDinov2Config(**sizes, image_size=32, patch_size=4, out_indices=stages)
    module = transformers.AutoBackbone.from_config(config).eval()
    _, (tower, *_), samples = from_module(module, [images()], apart=False)
    assert all(layer.form.padding == () for layer in tower.layers)
    (told,) = meaning_on(module, images()).towers
    assert (told.side_by_side, dict(told.joined)) == (4, {})
    tower = replace(tower, name="vision", prefix=("cls",), side_by_side=4)
    calls: list[AttentionCall] = []
    with attention_calls(tower.layers, calls.append):
        tower.forward(tower.encode(samples))
    shapes = {(8, 17), (2, 68)}
    assert {(call.batch, call.tokens) for call in calls} == shapes
    (found,) = measure(tower, samples, metrics=["cos_y_vself"], token_sets=["patch", "all", "cls"])
    for call, values in zip(calls, found, strict=True):
        cosine = F.cosine_similarity(call.output, call.value, dim=-1).transpose(1, 2)
        cosine = cosine.reshape(2, 4, 17, 2)  # input, window, token, head
        expected = [cosine[:, :, part].mean((1, 2)) for part in (slice(1, None), slice(None), slice(1))]
        torch.testing.assert_close(torch.as_tensor(values.values)[:, 0].float(), torch.stack(expected))


def test_what_patches_were_grouped_to_has_nothing_beside_it() -> None:
    """GroupViT: six group tokens stand behind 16 patches, then three behind six groups."""
    config = transformers.GroupViTVisionConfig(
        **NARROW,
        image_size=32,
        patch_size=8,
        depths=[2, 2, 2],
        num_hidden_layers=6,
        num_group_tokens=[6, 3, 0],
        num_output_groups=[6, 3, 0],
    )
    (tower,) = meaning_on(transformers.GroupViTVisionModel(config).eval(), images()).towers
    assert dict(tower.joined) == {9: (0, 0), 3: (0, 0)}


def test_a_class_token_beside_fewer_patches_still_stands_there() -> None:
    """PiT: patches are pooled between its stages, and the class token is handed on."""
    module = timm.create_model("pit_ti_224", img_size=64, depth=(2, 2, 2)).eval()
    (tower,) = meaning_on(module, images(64)).towers
    assert dict(tower.joined) == {}


@pytest.mark.parametrize(("first", "second"), [(20, 64), (64, 20)])
def test_windows_of_another_size_are_refused_where_they_cannot_be_looked_at(first: int, second: int) -> None:
    """One window of 7 × 7 over 5 × 5 patches says nothing of nine over 16 × 16."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 8}
    config = transformers.SamVisionConfig(
        **sizes, image_size=first, patch_size=4, window_size=7, global_attn_indexes=[], use_abs_pos=False
    )
    module = transformers.SamVisionModel(config).eval()
    module.vision_encoder.patch_embed.forward = lambda x: module.vision_encoder.patch_embed.projection(
        x
    ).permute(0, 2, 3, 1)
    counts = {20: "1 window", 64: "9 windows"}
    text = rf"fills its windows up, {counts[first]} of 49 tokens for the first input and not "
    _, (tower,), samples = from_module(module, [images(first), images(second)])
    assert tower.look_again is not None
    unasked = replace(tower, look_again=None)
    with pytest.raises(UserError, match=text) as error:
        list(measure(unasked, samples, metrics=["cos_y_vself"]))
    assert error.value.tip == "give inputs of one size, and those of another size in a run of their own"


def test_a_beginning_that_is_the_same_in_every_text_is_no_padding() -> None:
    config = transformers.GPT2Config(**TEXT, n_embd=16, n_layer=3, n_head=2)
    texts = ids()
    texts[:, 0] = 1
    model = transformers.GPT2Model(config).eval()
    found = layers_on(model, texts.clone())
    assert all(layer.form.padding == () for layer in found)


def test_ids_that_are_the_same_in_another_order_are_no_padding() -> None:
    """`a b a b c`: two places on, every second id is itself again."""
    config = transformers.BertConfig(**TEXT, **NARROW, num_hidden_layers=2)
    texts = torch.tensor([[5, 6, 5, 6, 7, 5, 6, 5, 6], [3, 4, 5, 6, 7, 8, 9, 10, 11]])
    found = layers_on(transformers.BertModel(config).eval(), texts)
    assert all(layer.form.padding == () for layer in found)


# --- heads ------------------------------------------------------------------------------------------


class Merged(Attention):
    """Heads in the batch, in front of inputs or behind them."""

    def __init__(self, first: bool) -> None:
        super().__init__(heads=4)
        self.first, self.nhead = first, 4
        del self.num_heads

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        parts = [part.transpose(0, 1) if self.first else part for part in self.heads(x)]
        y = F.scaled_dot_product_attention(*(part.flatten(0, 1) for part in parts))
        y = y.unflatten(0, parts[0].shape[:2])
        y = y.transpose(0, 1) if self.first else y
        return x + self.out(y.transpose(1, 2).flatten(2))


class WindowsBeforeHeads(Attention):
    """Twins: `[batch, window, head, token, dim]`, with as many windows as heads."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x.unflatten(1, (2, -1))))
        return x + self.out(y.transpose(-2, -3).flatten(-2)).flatten(1, 2)


@pytest.mark.parametrize(
    ("layer", "layout", "rows", "heads"),
    [
        (Merged(first=False), Layout(1, 4), 2, 4),
        (Merged(first=True), Layout(0, 4), 2, 4),
        (WindowsBeforeHeads(), Layout(2), 4, 2),
        (Attention(), PLAIN, 2, 2),
    ],
)
def test_heads_are_where_the_projection_reads_them(
    layer: nn.Module, layout: Layout, rows: int, heads: int
) -> None:
    x, calls = torch.randn(2, 8, 16), list[AttentionCall]()
    (found,) = layers_on(layer.eval(), x)
    assert found.form.layout == layout
    expected = layer(x)
    with attention_calls([found], lambda call: calls.append(call) or call.output.clone()):
        assert torch.equal(layer(x), expected)
    assert calls[0].output.shape == (rows, heads, 16 // rows, 8)
    value = layer.v(x).unflatten(-1, (heads, 8)).transpose(1, 2)
    value = value.unflatten(2, (rows // 2, -1)).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(calls[0].value, value)


def test_a_layout_splits_and_joins() -> None:
    for layout, shape in (
        (Layout(1), (2, 3, 4, 5, 6)),
        (Layout(2), (2, 3, 4, 5, 6)),
        (Layout(0, 3), (6, 5, 4)),
    ):
        x = torch.randn(shape)
        assert torch.equal(layout.joined(layout.split(x), x), x)
        read = layout.split(x).transpose(1, 2).flatten(2)
        assert layout_of(x, read.flatten(0, 1).flip(0)) == layout  # in any order of tokens


# --- towers -----------------------------------------------------------------------------------------


def bart() -> nn.Module:
    return transformers.BartModel(transformers.BartConfig(**TEXT, **SEQ2SEQ))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
    return transformers.T5Model(transformers.T5Config(**TEXT, **sizes))


def whisper() -> nn.Module:
    sizes = {"max_source_positions": 9, "num_mel_bins": 8, "decoder_start_token_id": 1}
    return transformers.WhisperModel(transformers.WhisperConfig(**TEXT, **SEQ2SEQ, **sizes))


def torchs() -> nn.Module:
    return nn.Transformer(16, 2, 2, 2, 16, batch_first=True)


SEQUENCES: dict[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]] = {
    bart: lambda: {"input_ids": ids()},
    t5: lambda: {"input_ids": ids(), "decoder_input_ids": ids()},
    whisper: lambda: {"input_features": torch.randn(2, 8, 18), "decoder_input_ids": ids()},
    torchs: lambda: {"src": torch.randn(2, 9, 16), "tgt": torch.randn(2, 9, 16)},
}


@pytest.mark.parametrize("build", SEQUENCES)
def test_encoder_and_decoder_are_two_towers_and_cross_attention_is_neither(
    build: Callable[[], nn.Module],
) -> None:
    found = meaning_on(build().eval(), **SEQUENCES[build]())
    assert [(one.name, [layer.index for layer in one.layers], one.depth) for one in found.towers] == [
        ("encoder", [0, 1], 2),
        ("decoder", [0, 1], 2),
    ]
    cross = {path: why for one in found.towers for path, why in one.skipped.items()}
    assert list(cross.values()) == [REASONS[ELSEWHERE]] * 2
    assert all("decoder" in path for path in cross)


def test_padding_belongs_to_the_tower_whose_masks_hide_it() -> None:
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0
    found = meaning_on(bart().eval(), input_ids=ids(), attention_mask=mask, real=mask.bool())
    assert [one.hides_padding for one in found.towers] == [True, False]


def test_depth_that_shares_weights_is_numbered_by_run() -> None:
    config = transformers.AlbertConfig(**TEXT, **NARROW, embedding_size=16, num_hidden_layers=3)
    model, calls = transformers.AlbertModel(config).eval(), list[AttentionCall]()
    found = layers_on(model, ids())
    assert [(layer.index, layer.run, layer.form.runs) for layer in found] == [(0, 0, 3), (1, 1, 3), (2, 2, 3)]
    with attention_calls(found[1:], calls.append):
        model(ids())
    assert [call.layer for call in calls] == [1, 2]


def test_a_hybrid_keeps_its_numbers_and_tells_its_mixers() -> None:
    linear = {"num_value_heads": 2, "num_key_heads": 2, "key_head_dim": 8, "value_head_dim": 8}
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    config = transformers.Qwen3NextConfig(
        **TEXT,
        **NARROW,
        **experts,
        **{f"linear_{name}": value for name, value in linear.items()},
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=16,
        shared_expert_intermediate_size=8,
    )
    (tower,) = meaning_on(transformers.Qwen3NextModel(config).eval(), ids()).towers
    linear = {i: f"layers.{i}.linear_attn" for i in range(3)}
    assert told(Meaning((tower,), INPUTS)) == {"": linear | {3: "layers.3.self_attn"}}
    assert [layer.form.mixer for layer in tower.layers] == ["linear"] * 3 + ["softmax"]
    assert tower.skipped == {}


@pytest.mark.parametrize(
    ("name", "numbers", "depth"),
    [
        ("pvt_v2_b0", list(range(8)), 8),
        ("nextvit_small", [6, 11, 16, 19], 20),
        ("swin_tiny_patch4_window7_224", list(range(12)), 12),
    ],
)
def test_stages_are_counted_through(name: str, numbers: list[int], depth: int) -> None:
    module = timm.create_model(name).eval()
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = True
    size = 224 if "swin" in name else 64
    (tower,) = meaning_on(module, images(size)).towers
    assert ([layer.index for layer in tower.layers], tower.depth) == (numbers, depth)
    assert len(tower.skipped) == depth - len(numbers)


def test_class_attention_and_channels_leave_nothing_to_measure() -> None:
    module = timm.create_model("xcit_nano_12_p16_224", embed_dim=32, depth=2, num_heads=4).eval()
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = True
    with pytest.raises(
        UserError, match=r"no layer attends to its own tokens \('blocks\.0\.attn': .* channels"
    ):
        meaning_on(module, images(64))


# --- finding them -----------------------------------------------------------------------------------


def test_modules_without_numbers_are_the_layers_of_one_tower_as_they_run() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.later, self.sooner, self.pool = Attention(), TorchAttention(), Handmade()

        def forward(self, x: Tensor) -> Tensor:
            return self.pool(self.later(self.sooner(x)))

    module = Mixer().eval()
    (tower,) = meaning_on(module, torch.randn(2, 9, 16)).towers
    assert [(layer.index, layer.path) for layer in tower.layers] == [(0, "sooner.mha"), (1, "later")]
    assert tower.layers[0].module is module.sooner.mha
    assert tower.skipped == {"pool": EAGER}
    assert_untouched(module)


class Asking(Attention):
    """Cross-attention."""

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:  # type: ignore[override]
        (q, _, _), (_, k, v) = self.heads(x), self.heads(memory)
        return x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SideBySide(nn.Module):
    """Encoder and decoder, whose layers stand under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.reads, self.thinks, self.writes, self.tells = (Attention() for _ in range(4))
        self.asks = Asking()

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        memory = self.thinks(self.reads(memory))
        return self.tells(self.asks(self.writes(x), memory))


def test_encoder_and_decoder_side_by_side_are_two_towers() -> None:
    found = meaning_on(SideBySide().eval(), torch.randn(2, 5, 16), torch.randn(2, 9, 16))
    assert told(found) == {"reads": {0: "reads", 1: "thinks"}, "writes": {0: "writes", 1: "tells"}}
    assert found.towers[1].skipped == {"asks": "5 queries over 9 keys: cross-attention or pooling"}


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_a_module_in_training_mode_is_found_too(context: Callable[[], Any]) -> None:
    with torch.inference_mode(False), context():
        found = meaning_on(Stack(Attention(dropout_p=0.5)).train(), torch.randn(2, 5, 16))
    assert told(found) == {"": {0: "layers.0"}}


class Handmade(nn.Module):
    """Weights and values are multiplied element by element: no product of theirs is seen."""

    def forward(self, x: Tensor) -> Tensor:
        weights = (x @ x.transpose(1, 2)).softmax(-1)
        return (weights[..., None] * x[:, None]).sum(2)


def test_a_module_whose_weights_are_lost_is_named() -> None:
    module = nn.Sequential(Handmade())
    with pytest.raises(UserError, match=r"computes attention itself, in '0', and what it weighs is not seen"):
        meaning_on(module, torch.randn(2, 5, 16))
    assert_untouched(module)


def test_where_there_is_no_attention_that_is_said() -> None:
    module = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1))
    with pytest.raises(UserError, match=r"(?m)^Sequential made no self-attention call$"):
        meaning_on(module, torch.randn(2, 5, 16))


def test_everything_is_restored_after_an_exception() -> None:
    module = Stack(Attention(), Broken())
    with pytest.raises(RuntimeError, match="inside forward"):
        meaning_on(module, torch.randn(2, 5, 16))
    assert_untouched(module)


def test_prefix_tokens_of_attention_side_by_side_are_no_padding() -> None:
    """Two attentions of one block read the same states: the class token is constant in both, and counts."""
    module = timm.create_model(
        "vit_small_patch16_18x2_224", img_size=32, embed_dim=32, depth=2, num_heads=2
    ).eval()
    (tower,) = meaning_on(module, images(32)).towers
    assert len(tower.layers) == 4
    assert all(not layer.form.padding or layer.form.padding[0] is None for layer in tower.layers)


@pytest.mark.parametrize("weights", [False, True], ids=["fused", "with its weights"])
@pytest.mark.parametrize("kind", [{"add_bias_kv": True}, {"add_zero_attn": True}], ids=["bias", "zero"])
def test_extra_keys_are_no_tokens(kind: dict[str, bool], weights: bool) -> None:
    """Rows of the tokens sum to less than 1; what is missing of Y is what the extra keys gave."""

    class Torch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mha = nn.MultiheadAttention(16, 2, batch_first=True, **kind)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mha(x, x, x, need_weights=weights)[0]

    module, x, calls = Torch().eval(), torch.randn(2, 9, 16), list[AttentionCall]()
    (layer,) = layers_on(module, x)
    assert layer.form.extra == (0, 1)
    with attention_calls([layer], calls.append):
        module(x)
    (call,) = calls
    pattern = pattern_rows(call)
    assert call.tokens == pattern.shape[-1] == 9
    assert (pattern.sum(-1) < 1).all()
    torch.testing.assert_close(attend(call), call.output)


@pytest.mark.parametrize("handed", [False, True], ids=["itself", "handed on"])
def test_memory_keys_in_front_of_the_tokens(handed: bool) -> None:
    """Also where the module that attends is handed queries, keys and values."""

    class Attend(nn.Module):
        def forward(self, *given: Any) -> Tensor:
            return F.scaled_dot_product_attention(*given)

    class Memory(Attention):
        def __init__(self) -> None:
            super().__init__(call=Attend() if handed else F.scaled_dot_product_attention)
            self.memory = nn.Parameter(torch.randn(2, 1, 2, 3, 8))

        def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().heads(x)
            k, v = (
                torch.cat([m.expand(len(x), -1, -1, -1), y], 2)
                for m, y in zip(self.memory, (k, v), strict=True)
            )
            return q, k, v

    (layer,) = layers_on(Memory().eval(), torch.randn(2, 9, 16))
    assert layer.form.extra == (3, 0)


def test_keys_that_are_made_of_tokens_are_not_extra_keys() -> None:
    class Compressed(Attention):
        def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            q, k, v = super().heads(x)
            return q, *(torch.cat([y, y.unflatten(2, (3, 3)).mean(3)], 2) for y in (k, v))

    (tower,) = meaning_on(Stack(Attention(), Compressed()).eval(), torch.randn(2, 9, 16)).towers
    forms = [layer.form for layer in tower.layers]
    assert [(form.keys_of, form.extra) for form in forms] == [("own", (0, 0)), ("others", (0, 0))]


def test_windows_that_overlap_are_named() -> None:
    module = timm.create_model("volo_d1_224", img_size=64)
    found = meaning_on(module.eval(), images(64))
    told = {path: why for tower in found.towers for path, why in tower.skipped.items()}
    assert told["network.0.0.attn"] == REASONS[OVERLAP]


def test_values_that_are_not_finite_are_no_cross_attention() -> None:
    with pytest.raises(UserError, match=r"'layers\.0' gives values that are not finite for the first inputs"):
        meaning_on(Stack(Attention()).eval(), torch.full((2, 9, 16), torch.nan))


def test_scores_outside_the_largest_are_no_change_of_a_query() -> None:
    """Weights of the largest scores only, in a module that is handed queries, keys and values."""

    class Weigh(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = q @ k.mT
            least = scores.topk(3, -1).values[..., -1:]
            return scores.masked_fill(scores < least, torch.finfo(scores.dtype).min).softmax(-1) @ v

    class Sparse(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.weigh = Weigh()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return x + self.out(self.weigh(*self.heads(x)).transpose(1, 2).flatten(2))

    (layer,) = layers_on(Sparse().eval(), torch.randn(2, 9, 16))
    assert layer.path == "weigh"


def test_a_module_that_is_made_while_the_model_runs_is_no_trouble() -> None:
    """BigBird changes its attention in its first forward; what begins parameters is called by keywords."""

    class Late(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            nn.Linear(4, 4)
            return super().forward(x, mask)

    (layer,) = layers_on(Late().eval(), torch.randn(2, 9, 16))
    assert layer.index == 0


def test_a_token_that_joins_behind_layers_over_pooled_keys_is_known() -> None:
    """PVT's class token stands before the patches of its last stage, the first one with keys of its own."""
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 2], "num_attention_heads": [1, 1, 2, 2]}
    module = transformers.PvtModel(transformers.PvtConfig(image_size=64, mlp_ratios=[1] * 4, **sizes)).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    (tower,) = meaning_on(module, images(64)).towers
    assert dict(tower.joined) == {5: (1, 0)}


def test_a_token_that_joins_the_others_later_is_known() -> None:
    """ConViT's class token stands before the patches in its last two blocks only."""
    sizes = {"img_size": 32, "depth": 5, "embed_dim": 32, "num_heads": 4}
    module = timm.create_model("convit_tiny", local_up_to_layer=3, **sizes).eval()
    (tower,) = meaning_on(module, images(32)).towers
    assert dict(tower.joined) == {5: (1, 0)}


def test_windows_beside_a_text_are_filled_up_too() -> None:
    """Ids in another order may be the same at a place: nothing of the text is padding; windows are."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            swin = "swin_tiny_patch4_window7_224"
            self.image = timm.create_model(swin, img_size=32, window_size=3, depths=(2, 2), num_heads=(2, 2))
            self.text = transformers.BertModel(transformers.BertConfig(**TEXT, **NARROW, num_hidden_layers=2))

        def forward(self, pixels: Tensor, ids: Tensor) -> Any:
            return self.image(pixels), self.text(ids)

    image, text = meaning_on(Both().eval(), images(32), ids()).towers
    assert any(x is not None for layer in image.layers for x in layer.form.padding)
    assert not any(x is not None for layer in text.layers for x in layer.form.padding)


@pytest.mark.parametrize("fused", [False, True], ids=["written out", "fused"])
def test_keys_of_other_tokens_beside_its_own_are_no_extra_keys(fused: bool) -> None:
    """A class token that attends to itself and to patches, which are handed over beside it."""

    class Classes(Attention):
        def forward(self, x: Tensor, context: Tensor) -> Tensor:
            q = self.heads(x)[0]
            _, k, v = self.heads(torch.cat([x, context], 1))
            y = F.scaled_dot_product_attention(q, k, v) if fused else (q @ k.mT).softmax(-1) @ v
            return x + self.out(y.transpose(1, 2).flatten(2))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.classes = nn.ModuleList([Attention()]), nn.ModuleList([Classes()])
            self.token = nn.Parameter(torch.randn(1, 1, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            return self.classes[0](self.token.expand(len(x), -1, -1), context=x)

    (tower,) = meaning_on(Model().eval(), torch.randn(2, 9, 16)).towers
    assert [layer.path for layer in tower.layers] == ["blocks.0"]
    assert tower.skipped == {"classes.0": "1 queries over 10 keys: cross-attention or pooling"}


def test_a_call_over_another_stream_is_named() -> None:
    """LiLT: a layer attends to texts and to layouts, only the call over what it reads first is its own."""
    config = transformers.LiltConfig(**TEXT, **NARROW | {"hidden_size": 48}, num_hidden_layers=2)
    boxes = torch.randint(0, 50, (2, 9, 1)).expand(-1, -1, 4)  # valid with coordinates in any order
    (tower,) = meaning_on(transformers.LiltModel(config).eval(), ids(), bbox=boxes).towers
    assert [layer.form.calls for layer in tower.layers] == [frozenset({1})] * 2
    assert tower.skipped == {f"encoder.layer.{n}.attention.self (call 0)": BESIDE_OWN for n in range(2)}


def test_tokens_in_front_of_other_streams_are_found_in_every_layer() -> None:
    """ProphetNet: predicting streams stand behind the main one, and attend to its keys and their own."""

    class Streams(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            (q, k, v), (q2, k2, v2) = (self.heads(part) for part in x.chunk(2, 1))
            main = F.scaled_dot_product_attention(q, k, v)
            keys, values = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
            other = F.scaled_dot_product_attention(q2, keys, values)
            return x + self.out(torch.cat([main, other], 2).transpose(1, 2).flatten(2))

    (tower,) = meaning_on(Stack(Streams(), Streams()).eval(), torch.randn(2, 24, 16)).towers
    assert [(layer.path, layer.form.calls) for layer in tower.layers] == [
        (f"layers.{n}", frozenset({0})) for n in range(2)
    ]
    why = "12 queries over 24 keys of its tokens, beside the call that is the layer's"
    assert tower.skipped == {f"layers.{n} (call 1)": why for n in range(2)}


def test_one_window_beside_a_text_is_filled_up_too() -> None:
    """A single window, which all layers have: nothing of the text is padding, though its ids may stay."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.text = Stack(Attention(), Attention()), Stack(Attention(), Attention())
            self.words = nn.Embedding(60, 16)

        def forward(self, x: Tensor, ids: Tensor) -> Any:
            filled = F.pad(x.unflatten(1, (2, 2)), (0, 0, 0, 2, 0, 2)).flatten(1, 2)
            for layer in self.image.layers:
                x = layer(filled).unflatten(1, (4, 4))[:, :2, :2]
                filled = F.pad(x, (0, 0, 0, 2, 0, 2)).flatten(1, 2)
            return filled, self.text(self.words(ids))

    image, text = meaning_on(Both().eval(), torch.randn(2, 4, 16), ids()).towers
    real = F.pad(torch.ones(2, 2), (0, 2, 0, 2)).flatten().bool()
    for layer in image.layers:
        assert layer.form.padding[0] is not None
        assert torch.equal(layer.form.padding[0], ~real[None])
    assert all(layer.form.padding == () for layer in text.layers)


def test_a_router_of_experts_holds_no_place() -> None:
    """A mixture of experts multiplies weights with what each expert made of a token."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(16, 4), nn.Linear(16, 4 * 16)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)[..., None, :]
            return x + (weights @ self.experts(x).unflatten(-1, (4, 16)))[..., 0, :]

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.experts = Attention(), Experts()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            return self.experts(self.attention(x))

    (tower,) = meaning_on(Stack(Block(), Block(), Block()).eval(), torch.randn(2, 9, 16)).towers
    assert [(layer.index, layer.path) for layer in tower.layers] == [
        (i, f"layers.{i}.attention") for i in range(3)
    ]
    assert not tower.skipped
