"""The seam: every attention call is seen as the model used it, nothing changes, nothing is left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from attention_modules import (
    PUBLIC,
    Attention,
    Broken,
    Cross,
    FiveDimensions,
    MergedHeads,
    Stack,
    TorchAttention,
    WindowsInBatch,
    assert_untouched,
)
from reference import dense_pattern, float64
from surveys import layers_on, meaning_on
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as imported_early
from torch.overrides import TorchFunctionMode

from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.attention.visibility import Visibility
from diag.errors import MeasurementError, UserError
from diag.models.hooks.layers import Layer, attention_modules
from diag.models.hooks.seam import attention_calls, refuse_compiled

# --- models -----------------------------------------------------------------------------------------


def listed(module: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...] = Attention) -> list[Layer]:
    found = [(path, child) for path, child in module.named_modules() if isinstance(child, kind)]
    return [Layer(i, path, child) for i, (path, child) in enumerate(found)]


@dataclass(frozen=True)
class Case:
    """A model, what it is called with, its layers, and the shape of every call's output."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    shape: tuple[int, int, int, int]
    kv_heads: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    kind: type[nn.Module] | str = Attention
    flash: bool = True

    @property
    def layers(self) -> list[Layer]:
        if not self.flash:  # where heads are is found by test
            return layers_on(self.module, *self.arguments, **self.options)
        if isinstance(self.kind, str):
            return list(attention_modules(self.module))
        return listed(self.module, self.kind)

    def run(self) -> Tensor:
        result = self.module(*self.arguments, **self.options)
        return result[0] if isinstance(result, tuple | transformers.utils.ModelOutput) else result


def stack(make: Callable[..., nn.Module], x: Tensor, *masks: Tensor, **case: Any) -> Case:
    """Two layers of a kind; `layer` holds their arguments, the rest is the case's."""
    options = case.pop("layer", {})
    shape = case.pop("shape", (2, 2, x.shape[1], 8))
    return Case(Stack(make(**options), make(**options)).eval(), (x, *masks), shape, **case)


def build_encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.TransformerEncoder(layer, 2).eval()


def build_timm(name: str, **sizes: Any) -> nn.Module:
    module = timm.create_model(name, pretrained=False, num_classes=0, **sizes).eval()
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = True
    return module


def build_llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        attn_implementation="sdpa",
    )
    return transformers.LlamaModel(config).eval()


SWIN = {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2,), "num_heads": (2,)}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
RIGHT_PADDING = torch.tensor([[True] * 9, [True] * 6 + [False] * 3])
LEFT_PADDING = torch.tensor([[1] * 9, [0] * 3 + [1] * 6])


def build_cases() -> dict[str, Case]:
    torch.manual_seed(0)
    x, ids = torch.randn(2, 9, 16), torch.randint(0, 50, (2, 9))
    boolean, bias = torch.rand(2, 1, 9, 9) < 0.7, torch.randn(1, 2, 9, 9)
    padding = RIGHT_PADDING[:, None, None]
    merged = boolean.expand(-1, 2, -1, -1).flatten(0, 1)
    torch_padding = {"src_key_padding_mask": ~RIGHT_PADDING}
    torch_mha = {"kind": nn.MultiheadAttention}
    grouped = {"heads": 4, "kv_heads": 2, "enable_gqa": True}
    left = {"attention_mask": LEFT_PADDING}
    return {
        "attribute": stack(Attention, x),
        "imported early": stack(Attention, x, layer={"call": imported_early}),
        "causal": stack(Attention, x, layer={"is_causal": True}),
        "scale": stack(Attention, x, layer={"scale": 1.0}),
        "boolean mask": stack(Attention, x, boolean),
        "padding": stack(Attention, x, padding),
        "additive mask": stack(Attention, x, torch.zeros(2, 1, 9, 9).masked_fill(~boolean, -torch.inf)),
        "bias per head": stack(Attention, x, bias),
        "mask of two dimensions": stack(Attention, x, boolean[0, 0]),
        "grouped": stack(Attention, x, layer=grouped, shape=(2, 4, 9, 8)),
        "grouped, masked": stack(Attention, x, boolean, layer=grouped, shape=(2, 4, 9, 8)),
        "one KV head, no flag": stack(
            Attention, x, layer={"heads": 4, "kv_heads": 1}, shape=(2, 4, 9, 8), kv_heads=1
        ),
        "merged heads": stack(MergedHeads, x, flash=False),
        "merged heads, one mask": stack(MergedHeads, x, boolean[0], flash=False),
        "merged heads, masks": stack(MergedHeads, x, merged, flash=False),
        "five dimensions": stack(FiveDimensions, x, shape=(6, 2, 3, 8), flash=False),
        "five dimensions, mask": stack(
            FiveDimensions, x, boolean[0, 0, :3, :3], shape=(6, 2, 3, 8), flash=False
        ),
        "windows in the batch": stack(WindowsInBatch, x, shape=(6, 2, 3, 8)),
        "MultiheadAttention": stack(TorchAttention, x, **torch_mha),
        "MultiheadAttention, mask": stack(TorchAttention, x, ~boolean[0, 0], **torch_mha),
        "TransformerEncoder": Case(build_encoder(), (x,), (2, 2, 9, 8), **torch_mha),
        "TransformerEncoder, padding": Case(
            build_encoder(), (x,), (2, 2, 9, 8), options=torch_padding, **torch_mha
        ),
        "bfloat16": Case(Stack(Attention(), Attention()).eval().bfloat16(), (x.bfloat16(),), (2, 2, 9, 8)),
        "timm vit": Case(
            build_timm("vit_tiny_patch16_224", **VIT),
            (torch.randn(2, 3, 32, 32),),
            (2, 4, 17, 8),
            kv_heads=4,
            kind="named",
        ),
        "timm swin": Case(
            build_timm("swin_tiny_patch4_window7_224", **SWIN),
            (torch.randn(2, 3, 32, 32),),
            (8, 2, 16, 8),
            kind="named",
        ),
        "llama": Case(build_llama(), (ids,), (2, 4, 9, 8), kind="named"),
        "llama, left padding": Case(
            build_llama(), (ids,), (2, 4, 9, 8), kv_heads=4, options=left, kind="named"
        ),
    }


CASES = build_cases()
every_case = pytest.mark.parametrize("name", CASES)


@pytest.fixture(autouse=True)
def _one_route() -> Iterator[None]:
    """Observing is bit-identical given the same switches: the fused path of eval mode is one of them."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.inference_mode():
        yield
    torch.backends.mha.set_fastpath_enabled(before)


def seen(case: Case, on_call: Callable[[AttentionCall], Tensor | None] | None = None) -> Tensor:
    with attention_calls(case.layers, on_call or (lambda call: None)):
        return case.run()


# --- every call is seen, and nothing changes --------------------------------------------------------


@every_case
def test_every_call_is_seen_and_rebuilds_its_output(name: str) -> None:
    case, calls = CASES[name], []
    with attention_calls(case.layers, calls.append) as sightings:
        case.run()
    layers = case.layers
    assert len(layers) == 2
    assert [(call.layer, call.module) for call in calls] == [(0, layers[0].path), (1, layers[1].path)]
    assert sightings.calls == {layer.path: 1 for layer in layers}
    assert sightings.skipped == {}
    for call in calls:
        assert tuple(call.output.shape) == case.shape
        assert call.kv_heads == case.kv_heads
        assert (call.log_normaliser is not None) == case.flash
        value = float64(call.value.repeat_interleave(call.group, 1))
        rebuilt = dense_pattern(call) @ value
        error = np.linalg.norm(rebuilt - float64(call.output)) / np.linalg.norm(rebuilt)
        assert error < (1e-2 if call.output.dtype == torch.bfloat16 else 1e-6)


@every_case
def test_the_output_is_the_same_to_the_bit(name: str) -> None:
    case = CASES[name]
    expected = case.run()
    assert torch.equal(seen(case), expected)
    assert torch.equal(seen(case, lambda call: call.output.clone()), expected)
    assert_untouched(case.module)


@every_case
def test_a_replaced_output_flows_on(name: str) -> None:
    case, before, after = CASES[name], [], []
    expected = seen(case, lambda call: before.append(call.value))

    def zeros(call: AttentionCall) -> Tensor:
        after.append(call.value)
        return torch.zeros_like(call.output)

    assert not torch.equal(seen(case, zeros), expected)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])


def test_a_replaced_output_is_what_the_projection_reads() -> None:
    layer, x = Attention().eval(), torch.randn(2, 5, 16)
    with attention_calls(listed(layer), lambda call: torch.ones_like(call.output)):
        output = layer(x)
    assert torch.equal(output, x + layer.out(torch.ones(2, 5, 16)))


@pytest.mark.parametrize("name", ["attribute", "causal", "grouped", "merged heads", "five dimensions"])
def test_queries_keys_and_values_are_those_of_the_projections(name: str) -> None:
    case, calls = CASES[name], []
    seen(case, calls.append)
    attention, (x,) = case.layers[0].module, case.arguments
    if name == "five dimensions":
        x = x.unflatten(1, (3, -1)).flatten(0, 1)
    query, key, value = attention.heads(x)
    for part, expected in (("query", query), ("key", key), ("value", value)):
        torch.testing.assert_close(getattr(calls[0], part), expected)
    assert calls[0].causal == (name == "causal")
    assert calls[0].scale == pytest.approx(8**-0.5)


def test_the_scale_is_the_one_that_was_asked_for() -> None:
    calls: list[AttentionCall] = []
    seen(CASES["scale"], calls.append)
    assert [call.scale for call in calls] == [1.0, 1.0]


def test_the_fast_path_of_torch_encoders_is_seen() -> None:
    """In evaluation mode they run fused, with no Python call inside, unless the seam keeps them off it."""
    case, calls = CASES["TransformerEncoder, padding"], []
    torch.backends.mha.set_fastpath_enabled(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it uses nested tensors, which warn
        fused = case.run()
    probed = seen(case, calls.append)
    assert len(calls) == 2
    assert torch.backends.mha.get_fastpath_enabled()
    kept = fused.abs().sum(-1) > 0  # the fused path leaves padding at zero
    torch.testing.assert_close(probed[kept], fused[kept])


def test_left_padding_hides_the_padding_only() -> None:
    padded: list[AttentionCall] = []
    seen(CASES["llama, left padding"], padded.append)
    assert padded[0].visibility.keys.tolist() == LEFT_PADDING.bool().tolist()
    assert padded[0].visibility.count[1, 0].tolist()[3:] == [1, 2, 3, 4, 5, 6]
    plain: list[AttentionCall] = []
    seen(CASES["llama"], plain.append)
    # the padded route repeats the KV heads: query head h reads KV head h // group
    torch.manual_seed(0)
    assert (plain[0].group, padded[0].group) == (2, 1)
    assert torch.equal(padded[0].value[:, 0], padded[0].value[:, 1])
    assert not torch.equal(padded[0].value[:, 1], padded[0].value[:, 2])


def test_gradients_and_autocast_are_kept() -> None:
    calls: list[AttentionCall] = []
    with torch.inference_mode(False), torch.enable_grad():
        layer, x = Attention().eval(), torch.randn(2, 5, 16)
        expected = torch.autograd.grad(layer(x).sum(), layer.q.weight)[0]
        with attention_calls(listed(layer), calls.append):
            output = layer(x)
        torch.testing.assert_close(torch.autograd.grad(output.sum(), layer.q.weight)[0], expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = layer(x)
        with attention_calls(listed(layer), calls.append):
            output = layer(x)
        assert torch.equal(output, expected)
    assert calls[1].output.dtype == torch.bfloat16


def test_calls_outside_listed_layers_pass_through() -> None:
    case, calls = CASES["attribute"], []
    expected = case.run()
    with attention_calls(case.layers[1:], calls.append):
        output = case.run()
        F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 8))
    assert [call.layer for call in calls] == [1]
    assert torch.equal(output, expected)


def test_no_layer_is_no_work() -> None:
    case = CASES["attribute"]
    with attention_calls([], pytest.fail):
        case.run()


# --- nothing is left behind -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Attention, TorchAttention])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_everything_is_restored_after_an_exception_in_on_call(
    kind: type[nn.Module], error: type[BaseException]
) -> None:
    module, x = Stack(kind()).eval(), torch.randn(2, 5, 16)
    layers = listed(module, (Attention, nn.MultiheadAttention))

    def fail(call: AttentionCall) -> None:
        raise error("inside on_call")

    with pytest.raises(error, match="inside on_call"), attention_calls(layers, fail):
        module(x)
    assert_untouched(module)
    calls: list[AttentionCall] = []
    with attention_calls(layers, calls.append):
        module(x)
    assert len(calls) == 1


def test_everything_is_restored_after_an_exception_in_forward() -> None:
    module, x = Stack(Attention(), Broken()).eval(), torch.randn(2, 5, 16)
    layers = listed(module, (Attention, Broken))
    with pytest.raises(RuntimeError, match="inside forward"), attention_calls(layers, lambda call: None):
        module(x)
    assert_untouched(module)


def test_everything_is_restored_after_an_exception_in_the_block() -> None:
    case = CASES["attribute"]
    with pytest.raises(ZeroDivisionError), attention_calls(case.layers, lambda call: None):
        _ = 1 / 0
    assert_untouched(case.module)


def test_a_model_that_recovers_from_an_error_goes_on_being_seen() -> None:
    """The failed layer is off the stack: a later call outside listed layers is not taken for its own."""

    class Recovering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Broken(), Attention()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.first(x)
            except RuntimeError:
                F.scaled_dot_product_attention(*torch.ones(3, 1, 1, 2, 8))
                return self.second(x)

    module, calls = Recovering().eval(), []
    with attention_calls(listed(module, (Broken, Attention)), calls.append):
        module(torch.randn(2, 5, 16))
    assert [call.module for call in calls] == ["second"]


def test_hooks_of_others_stay() -> None:
    case, ran = CASES["attribute"], []
    handle = case.layers[0].module.register_forward_hook(lambda *args: ran.append(1))
    try:
        seen(case)
        case.run()
    finally:
        handle.remove()
    assert len(ran) == 2


@pytest.mark.parametrize("name", ["attribute", "MultiheadAttention"])
def test_captures_nest(name: str) -> None:
    """The outer one changes the output first, the inner one sees what it made of it; both are undone."""
    case, outer, inner = CASES[name], [], []
    expected = seen(case, lambda call: call.output * 2)
    with attention_calls(case.layers, lambda call: outer.append(call) or call.output * 2):
        with attention_calls(case.layers, inner.append):
            output = case.run()
        case.run()
    assert (len(outer), len(inner)) == (4, 2)
    assert torch.equal(inner[0].output, outer[0].output * 2)
    assert torch.equal(output, expected)
    assert_untouched(case.module)


def test_other_function_modes_still_see_the_call() -> None:
    class Counting(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += func is PUBLIC
            return func(*args, **(kwargs or {}))

    case = CASES["attribute"]
    with Counting() as mode:
        seen(case)
    assert mode.calls == 2


# --- a blind probe is an error ----------------------------------------------------------------------


class Bypassed(nn.Module):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return x


def test_a_layer_without_a_call_is_named() -> None:
    module = Stack(Attention(), Bypassed()).eval()
    layers = listed(module, (Attention, Bypassed))
    message = r"(?m)^layer 'layers\.1' finished without a call of attention that is seen$"
    with (
        pytest.raises(MeasurementError, match=message) as error,
        attention_calls(layers, lambda call: None),
    ):
        module(torch.randn(2, 5, 16))
    assert "--layers" in error.value.tip
    assert_untouched(module)


def test_cross_attention_and_pooling_pass_through_with_a_note() -> None:
    module, x = Stack(Attention(), Cross()).eval(), torch.randn(2, 9, 16)
    expected, calls = module(x), []
    with attention_calls(listed(module), calls.append) as sightings:
        assert torch.equal(module(x), expected)
    assert [call.module for call in calls] == ["layers.0"]
    assert sightings.skipped == {"layers.1": "5 queries over 9 keys: cross-attention or pooling"}


def test_dropped_attention_weights_are_refused() -> None:
    module = Stack(Attention(dropout_p=0.1))
    message = r"layer 'layers\.0' drops attention weights .*p = 0\.1"
    with (
        pytest.raises(MeasurementError, match=message) as error,
        attention_calls(listed(module), lambda call: None),
    ):
        module(torch.randn(2, 5, 16))
    assert "model.eval()" in error.value.tip


def test_dropout_outside_listed_layers_is_none_of_our_business() -> None:
    module = Stack(Attention(), Attention(dropout_p=0.1))
    with attention_calls(listed(module)[:1], lambda call: None):
        module(torch.randn(2, 5, 16))


def traced(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still out there
        return torch.jit.trace(module, torch.randn(2, 5, 16))


def test_traced_modules_are_refused() -> None:
    with torch.inference_mode(False):
        module = traced(Attention().eval())
    with pytest.raises(UserError, match=r"^layer 'blocks\.3' is a compiled \w+: .* not visible") as error:
        refuse_compiled([Layer(0, "blocks.3", module)])
    assert "original nn.Module" in error.value.tip
    with pytest.raises(UserError, match=r"^the model is a compiled"):
        meaning_on(module, pytest.fail)


def test_where_heads_are_is_not_guessed() -> None:
    layer = MergedHeads().eval()
    with (
        pytest.raises(MeasurementError, match="attends over 3 axes, and where its heads are is not known"),
        attention_calls(listed(layer), lambda call: None),
    ):
        layer(torch.randn(2, 5, 16))


# --- masks shared between layers --------------------------------------------------------------------


class OwnMask(Attention):
    """Builds its mask, which hides one key, and drops it."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        own = torch.ones(2, 1, 1, x.shape[1], dtype=torch.bool)
        own[..., self.hidden] = False
        return super().forward(x, own)


def test_layers_share_the_structure_of_one_mask() -> None:
    case, calls = CASES["padding"], []
    seen(case, calls.append)
    assert calls[0].visibility is calls[1].visibility
    assert calls[0].visibility.keys.tolist() == RIGHT_PADDING.tolist()


def test_masks_at_the_same_address_are_not_confused() -> None:
    module, shown = Stack(*(OwnMask(hidden) for hidden in range(8))).eval(), []

    def note(call: AttentionCall) -> None:  # keeps neither the call nor its mask
        assert "visibility" in vars(call)
        fresh = Visibility.of(call.mask, call.causal, call.output)
        shown.append((call.visibility.keys.tolist(), fresh.keys.tolist()))

    with attention_calls(listed(module), note):
        module(torch.randn(2, 9, 16))
    assert len(shown) == 8
    for hidden, (shared, fresh) in enumerate(shown):
        assert shared == fresh == [[key != hidden for key in range(9)]] * 2


def test_two_masks_that_alternate_are_told_apart() -> None:
    boolean = torch.ones(9, 9, dtype=torch.bool)
    window = boolean.tril().triu(-2)

    class Alternating(Stack):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            for i, layer in enumerate(self.layers):
                x = layer(x, window if i % 2 else boolean.tril())
            return x

    module, calls = Alternating(*(Attention() for _ in range(4))).eval(), []
    with attention_calls(listed(module), calls.append):
        module(torch.randn(2, 9, 16))
    # boolean.tril() is new each time, the window is one tensor
    assert [call.visibility.rule for call in calls] == ["causal", "general", "causal", "general"]
    assert [int(call.visibility.count.max()) for call in calls] == [9, 3, 9, 3]


# --- what the output projection read ----------------------------------------------------------------


class Gated(Attention):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.gate = nn.Parameter(torch.full((16,), 0.5))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x))
        return self.out(y.transpose(1, 2).flatten(2) * self.gate)


class Unprojected(Attention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)


class Transposed(Attention):
    """As GPT-2 multiplies: weights the other way round."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)
        return torch.addmm(self.out.bias, y.flatten(0, 1), self.out.weight).view(x.shape)


class OfTwoStreams(Attention):
    """MM-DiT: the first tokens and the others have projections of their own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.other = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.scaled_dot_product_attention(*self.heads(x)).transpose(1, 2).flatten(2)
        return torch.cat([self.out(y[:, :2]), self.other(y[:, 2:])], 1)


class AndMore(TorchAttention):
    """A listed module that goes on with a linear layer of its own after PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.more = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.more(super().forward(x, mask))


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (Attention, "as captured"),
        (Transposed, "as captured"),
        (OfTwoStreams, "as captured"),
        (Gated, "modified"),
        (Unprojected, "unknown"),
        (AndMore, "as captured"),
    ],
)
def test_what_the_projection_read_is_told(kind: type[nn.Module], expected: str) -> None:
    module, x = kind().eval(), torch.randn(2, 5, 16)
    with attention_calls([Layer(0, "attention", module)], lambda call: None) as sightings:
        module(x)
    assert sightings.projection == {"attention": expected}


# --- finding the layers -----------------------------------------------------------------------------


def tree(kind: str, **children: nn.Module) -> nn.Module:
    """A module of a class named `kind`."""
    module = type(kind, (nn.Module,), {})()
    for name, child in children.items():
        module.add_module(name, child)
    return module


def paths(root: nn.Module, **options: Any) -> list[str]:
    return [layer.path for layer in attention_modules(root, **options)]


def test_the_innermost_modules_named_as_attention_are_listed() -> None:
    def block() -> nn.Module:
        inner = tree("BertSdpaSelfAttention", query=nn.Linear(2, 2))
        return tree("Block", attention=tree("BertAttention", self=inner, output=tree("BertAttentionOutput")))

    root = tree("Model", layer=nn.ModuleList([block(), block()]), head=tree("Head"))
    assert paths(root) == ["layer.0.attention.self", "layer.1.attention.self"]
    assert [layer.index for layer in attention_modules(root)] == [0, 1]
    assert paths(root, prefix="text.") == ["text.layer.0.attention.self", "text.layer.1.attention.self"]


@pytest.mark.parametrize("name", ["Attn", "SelfAttention", "MultiheadAttention", "LlamaSdpaAttn"])
def test_usual_names_are_found(name: str) -> None:
    assert paths(tree("Block", a=tree(name), b=tree("Mlp"))) == ["a"]


@pytest.mark.parametrize(
    "child",
    [
        {"attn_pool": tree("Attention")},
        {"head": tree("AttentionPoolLatent")},
        {"head": tree("AttentionPoolingHead", attention=tree("MultiheadAttention"))},
        {"crossattention": tree("Wrapper", attention=tree("Attention"))},
        {"cross_attn": tree("Attention")},
        {"attn": tree("T5LayerCrossAttention")},
        {"encoder_attn": tree("BartAttention")},
        {"EncDecAttention": tree("T5Attention")},
        {"attn_drop": tree("AttentionDropout")},
        {"norm": tree("AttentionNorm")},
    ],
)
def test_pooling_cross_attention_and_parts_are_not_listed(child: dict[str, nn.Module]) -> None:
    assert paths(tree("Block", **child)) == []
    assert paths(tree("Block", self_attn=tree("Attention"), **child)) == ["self_attn"]


def test_shifted_windows_hide_what_lies_across_the_border() -> None:
    """Swin writes -100 where others write -inf; such keys are not seen."""
    module = build_timm("swin_tiny_patch4_window7_224", **SWIN)
    calls: list[AttentionCall] = []
    with torch.inference_mode(), attention_calls(attention_modules(module), calls.append):
        module(torch.randn(1, 3, 32, 32))
    plain, shifted = calls[0], calls[1]
    assert (plain.visibility.count == 16).all()
    counts = shifted.visibility.count.flatten(1)  # [window, token]
    # windows of 4 x 4 shifted by 2: the first is whole, two are halved, the last is quartered
    assert [row.unique().tolist() for row in counts] == [[16], [8], [8], [4]]
    seen = pattern_rows(shifted) > 0
    assert torch.equal(seen.sum(-1)[:, 0], counts)
