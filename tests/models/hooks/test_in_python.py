"""What is compiled, scripted or another library's runs as Python, is seen like PyTorch's own, or is named."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from attention_modules import Attention, Stack, assert_untouched
from reference import dense_pattern, float64
from surveys import layers_on, meaning_on
from torch import Tensor, nn
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from diag.attention.call import AttentionCall
from diag.errors import MeasurementError, UserError
from diag.models.hooks.in_python import WHAT_TO_TYPE
from diag.models.hooks.layers import Layer
from diag.models.hooks.seam import attention_calls

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning"),
]

TOKENS = 7
X = torch.randn(2, TOKENS, 16, generator=torch.Generator().manual_seed(0))
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 2, 2]])
SLOPES = torch.tensor([0.5, -0.25])
BEFORE, SAME = (
    torch.ones(TOKENS, TOKENS).tril().bool(),
    DOCUMENTS[:, None, :, None] == DOCUMENTS[:, None, None],
)
DISTANCE = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def calls_of(module: nn.Module, *given: Tensor) -> list[AttentionCall]:
    """The calls of the layers that the tests of meaning find; the output is the same, and nothing stays."""
    given = given or (X,)
    kept, expected = list[AttentionCall](), module(*given)
    with attention_calls(layers_on(module, *given), kept.append):
        assert torch.equal(module(*given), expected)
    assert_untouched(module)
    return kept


def assert_rebuilds(call: AttentionCall, bias: Tensor | None = None) -> None:
    """That the weights of a call are softmax(scale QKᵀ + bias), and give its output, densely in float64."""
    assert call.query is not None
    assert call.key is not None
    scores = float64(call.query) @ float64(call.key.repeat_interleave(call.group, 1)).swapaxes(-1, -2)
    scores = scores * call.scale + (0 if bias is None else float64(bias))
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    np.testing.assert_allclose(dense_pattern(call), weights, atol=1e-6)
    used = weights @ float64(call.value.repeat_interleave(call.group, 1))
    np.testing.assert_allclose(float64(call.output), used, atol=1e-5)


def hidden(shown: Tensor) -> Tensor:
    return torch.zeros(shown.shape).masked_fill(~shown, -torch.inf)


# --- flex_attention -----------------------------------------------------------------------------------


def flexed(
    score_mod: Any = None, mask_mod: Any = None, batch: int | None = None, **options: Any
) -> nn.Module:
    def call(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        mask = mask_mod and create_block_mask(mask_mod, batch, None, TOKENS, TOKENS, device="cpu")
        return flex_attention(q, k, v, score_mod, mask, **options)

    return Stack(*(Attention(call=call, kv_heads=1 if options.get("enable_gqa") else 2) for _ in range(2)))


FLEXED = {
    "plain": (flexed(), None),
    "scale, shared heads": (flexed(scale=0.3, enable_gqa=True), None),
    "causal": (flexed(mask_mod=lambda b, h, i, j: i >= j), hidden(BEFORE)),
    "documents": (
        flexed(mask_mod=lambda b, h, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j], batch=2),
        hidden(SAME),
    ),
    "bias": (flexed(lambda s, b, h, i, j: s + SLOPES[h] * (i - j).abs()), SLOPES[:, None, None] * DISTANCE),
    "bias, causal": (
        flexed(lambda s, b, h, i, j: s - (i - j).abs(), lambda b, h, i, j: i >= j),
        hidden(BEFORE) - DISTANCE,
    ),
    "hiding scores": (flexed(lambda s, b, h, i, j: torch.where(i >= j, s, -torch.inf)), hidden(BEFORE)),
}


@pytest.mark.parametrize("name", FLEXED)
def test_flex_attention_is_seen_with_its_masks(name: str) -> None:
    module, bias = FLEXED[name]
    first, second = calls_of(module.eval())
    for call in (first, second):
        assert_rebuilds(call, bias)
    assert (first.visibility.rule == "causal") == ("causal" in name or "hiding" in name)
    assert not torch.equal(first.output, second.output)


def test_layers_share_a_flex_mask() -> None:
    def before(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return i >= j

    first, second = calls_of(flexed(mask_mod=before).eval())
    assert first.mask is second.mask


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_weights_of_a_soft_cap_are_those_of_its_formula(masked: bool, kv_heads: int) -> None:
    def capped(s: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return 0.2 * torch.tanh(s / 0.2)

    mask_mod = (lambda b, h, i, j: i >= j) if masked else None
    module = flexed(capped, mask_mod, enable_gqa=True) if kv_heads == 1 else flexed(capped, mask_mod)
    first, second = calls_of(module.eval())
    assert first.visibility.rule == ("causal" if masked else "full")
    q, k = (float64(x) for x in module.layers[0].heads(X)[:2])
    scores = 0.2 * np.tanh(q @ k.swapaxes(-1, -2) * 8**-0.5 / 0.2)
    weights = np.exp(scores + (float64(hidden(BEFORE)) if masked else 0))
    weights /= weights.sum(-1, keepdims=True)
    assert first.pattern is not None
    np.testing.assert_allclose(float64(first.pattern), weights, atol=1e-6)
    for call in (first, second):
        used = float64(call.pattern) @ float64(call.value)
        np.testing.assert_allclose(float64(call.output), used, atol=1e-6)


def in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
    """Blocks of 128 that leave keys out: what is run without a compiler sees these, too."""
    blocks = torch.tensor([[[0, 1], [1, 0]]], dtype=torch.int32)[None]
    short = BlockMask.from_kv_blocks(torch.ones(1, 1, 2, dtype=torch.int32), blocks, seq_lengths=(200, 200))
    return flex_attention(q, k, v, block_mask=short)


def test_flex_attention_that_is_told_by_blocks_alone_is_named() -> None:
    reason = "it calls flex_attention with a BlockMask whose blocks hide what its mask_mod shows"
    x = torch.randn(2, 200, 16)
    with pytest.raises(MeasurementError) as error:
        meaning_on(Stack(Attention(call=in_blocks)).eval(), x)
    assert str(error.value) == f"layer 'layers.0' cannot be read: {reason}"
    assert error.value.tip == WHAT_TO_TYPE
    module = Stack(Attention(), Attention(call=in_blocks)).eval()
    (tower,) = meaning_on(module, x).towers
    assert [layer.index for layer in tower.layers] == [0]
    assert tower.skipped == {"layers.1": reason}
    listed = [Layer(i, f"layers.{i}", layer) for i, layer in enumerate(module.layers)]
    with (
        pytest.raises(MeasurementError, match=r"^layer 'layers\.1' cannot be read: it calls flex_attention"),
        attention_calls(listed, lambda call: None),
    ):
        module(x)


# --- compiled and scripted ----------------------------------------------------------------------------


def whole_in_place(module: nn.Module) -> nn.Module:
    module.compile(backend="eager")
    return module


def blocks_in_place(module: nn.Module) -> nn.Module:
    for layer in module.layers:
        layer.compile(backend="eager")
    module(X)  # compiled before it is watched
    return module


def one_wrapped(module: nn.Module) -> nn.Module:
    module.layers[1] = torch.compile(module.layers[1], backend="eager")
    return module


def with_function(call: Callable[..., Tensor]) -> Callable[[nn.Module], nn.Module]:
    def change(module: nn.Module) -> nn.Module:
        for layer in module.layers:
            layer.call = call
        return module

    return change


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask)


def quietly(make: Callable[[], Any]) -> Any:
    with warnings.catch_warnings(), torch.inference_mode(False):
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still out there
        return make()


QKV = (torch.ones(2, 2, TOKENS, 8),) * 3
TRACED = quietly(lambda: torch.jit.trace(attended, QKV))
COMPILED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "in place": whole_in_place,
    "wrapped": lambda module: torch.compile(module, backend="eager"),
    "blocks in place": blocks_in_place,
    "one wrapped": one_wrapped,
    "compiled function": with_function(torch.compile(attended, backend="eager")),
    "compiled flex_attention": with_function(
        lambda q, k, v, mask: torch.compile(flex_attention, backend="eager")(q, k, v)
    ),
    "scripted function": with_function(quietly(lambda: torch.jit.script(attended))),
    "traced function": with_function(lambda q, k, v, mask: TRACED(q, k, v)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_what_is_compiled_is_seen_as_it_is_written(name: str) -> None:
    plain = Stack(Attention(), Attention(), Attention()).eval()
    expected = calls_of(plain)
    module = COMPILED[name](plain)
    layers, kept = layers_on(module, X), list[AttentionCall]()
    with attention_calls(layers, kept.append):
        module(X)
    assert [layer.index for layer in layers] == [0, 1, 2]
    assert [layer.path.replace("_orig_mod.", "").replace("._orig_mod", "") for layer in layers] == [
        f"layers.{i}" for i in range(3)
    ]
    for call, other in zip(kept, expected, strict=True):
        torch.testing.assert_close(call.output, other.output, atol=1e-6, rtol=1e-5)
        assert_rebuilds(call)


@pytest.mark.parametrize("make", [torch.jit.script, lambda module: torch.jit.trace(module, X)])
def test_scripted_modules_are_named_where_they_attend(make: Callable[[nn.Module], nn.Module]) -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.unflatten(2, [2, 8]).transpose(1, 2)
            y = torch.nn.functional.scaled_dot_product_attention(q, q, q)
            return x + y.transpose(1, 2).flatten(2)

    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.relu()

    sequence = nn.Sequential(Attention(), quietly(lambda: make(Mapped())), Attention()).eval()
    assert [layer.path for layer in layers_on(sequence, X)] == ["0", "2"]
    sequence[1] = quietly(lambda: make(Plain()))
    with pytest.raises(UserError, match=r"^layer '1' is a compiled \w+: its attention calls are not visible"):
        meaning_on(sequence, X)


def test_exported_modules_are_seen() -> None:
    layer = quietly(lambda: Attention().eval())
    exported = quietly(lambda: torch.export.export(layer, (torch.ones(2, TOKENS, 16),)).module())
    kept = list[AttentionCall]()
    with attention_calls(layers_on(exported, X), kept.append):
        exported(X)
    (call,), (expected,) = kept, calls_of(layer)
    assert torch.equal(call.value, expected.value)
    assert_rebuilds(call)


# --- xformers and flash-attn ---------------------------------------------------------------------------

flash_attn_func: Any = None  # as after `from flash_attn import flash_attn_func`
flash_attn_qkvpacked_func: Any = None
flash_attn_kvpacked_func: Any = None
flash_attn_varlen_func: Any = None
memory_efficient_attention: Any = None
sageattn: Any = None


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """`[batch, token, head, dim]`, as both have it; calls PyTorch's own, as stand-ins for them do."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale, enable_gqa=True)
    return y.transpose(1, 2)


class LowerTriangularMask:
    pass


class Odd:
    pass


class Materialised:
    def materialize(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        return (-DISTANCE).expand(shape).to(device, dtype)


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both, with the functions and the arguments that they document."""

    def func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
    ) -> Any:
        y = dense(q, k, v, None, causal, softmax_scale)
        return (y, None, None) if return_attn_probs else y

    def qkvpacked(qkv: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
        return dense(*qkv.unbind(2), None, causal, None)

    def kvpacked(q: Tensor, kv: Tensor, dropout_p: float = 0.0, causal: bool = False) -> Tensor:
        return dense(q, *kv.unbind(2), None, causal, None)

    def varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> Tensor:
        return dense(q[None], k[None], v[None], None, False, None)[0]

    def efficient(
        query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None, p: float = 0.0, scale: Any = None
    ) -> Tensor:
        causal = isinstance(attn_bias, LowerTriangularMask)
        attn_bias = None if isinstance(attn_bias, Odd) else attn_bias
        if isinstance(attn_bias, Materialised):
            attn_bias = -DISTANCE.to(query.dtype)
        one = query.ndim == 3
        given = [x[:, :, None] if one else x for x in (query, key, value)]
        y = dense(*given, None if causal else attn_bias, causal, scale)
        return y[:, :, 0] if one else y

    functions = {
        "flash_attn_func": func,
        "flash_attn_qkvpacked_func": qkvpacked,
        "flash_attn_kvpacked_func": kvpacked,
        "flash_attn_varlen_func": varlen,
    }

    def sage(q: Tensor, k: Tensor, v: Tensor, tensor_layout: str = "HND") -> Tensor:
        return dense(q, k, v, None, False, None)

    flash, ops, sages = (ModuleType(name) for name in ("flash_attn", "xformers.ops", "sageattention"))
    vars(sages).update(sageattn=sage)
    vars(flash).update(functions)
    vars(ops).update(memory_efficient_attention=efficient, LowerTriangularMask=LowerTriangularMask)
    for module in (flash, ops, sages):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name, function in {**functions, "memory_efficient_attention": efficient, "sageattn": sage}.items():
        monkeypatch.setattr(sys.modules[__name__], name, function)


def of_tokens(call: Callable[..., Any], kv_heads: int = 2) -> nn.Module:
    """Layers that call a function in axes `[batch, token, head, dim]`."""

    def turned(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        return call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return Stack(*(Attention(call=turned, kv_heads=kv_heads) for _ in range(2))).eval()


OF_TOKENS: dict[str, tuple[Callable[..., Any], Tensor | None]] = {
    "flash": (lambda q, k, v: flash_attn_func(q, k, v), None),
    "flash, causal, scaled": (lambda q, k, v: flash_attn_func(q, k, v, 0.0, 0.2, True), hidden(BEFORE)),
    "flash, with more": (lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True)[0], None),
    "flash, packed": (lambda q, k, v: flash_attn_qkvpacked_func(torch.stack([q, k, v], 2)), None),
    "flash, half packed": (
        lambda q, k, v: flash_attn_kvpacked_func(q, torch.stack([k, v], 2), causal=True),
        hidden(BEFORE),
    ),
    "xformers": (lambda q, k, v: memory_efficient_attention(q, k, v, scale=0.4), None),
    "xformers, bias": (lambda q, k, v: memory_efficient_attention(q, k, v, hidden(BEFORE)), hidden(BEFORE)),
    "xformers, causal": (
        lambda q, k, v: memory_efficient_attention(q, k, v, LowerTriangularMask()),
        hidden(BEFORE),
    ),
    "xformers, made": (lambda q, k, v: memory_efficient_attention(q, k, v, Materialised()), -DISTANCE),
}


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize("name", OF_TOKENS)
def test_functions_of_xformers_and_flash_attn_are_seen(name: str) -> None:
    call, bias = OF_TOKENS[name]
    before = flash_attn_func
    calls = calls_of(of_tokens(call))
    assert [call.layer for call in calls] == [0, 1]
    for one in calls:
        assert one.output.shape == (2, 2, TOKENS, 8)
        assert_rebuilds(one, bias)
    assert flash_attn_func is before


@pytest.mark.usefixtures("libraries")
def test_grouped_heads_and_one_head_without_an_axis() -> None:
    for call in calls_of(of_tokens(lambda q, k, v: flash_attn_func(q, k, v), kv_heads=1)):
        assert call.group == 2
        assert_rebuilds(call)

    def one_head(q: Tensor, k: Tensor, v: Tensor, mask: None) -> Tensor:
        return memory_efficient_attention(q[:, 0], k[:, 0], v[:, 0])[:, None]

    (call,) = calls_of(Stack(Attention(heads=1, call=one_head)).eval())
    assert call.output.shape == (2, 1, TOKENS, 8)
    assert_rebuilds(call)


@pytest.mark.usefixtures("libraries")
def test_what_is_put_in_the_place_of_an_output_flows_on() -> None:
    module = of_tokens(lambda q, k, v: flash_attn_func(q, k, v, return_attn_probs=True)[0])
    layers = layers_on(module, X)
    with attention_calls(layers, lambda call: torch.ones_like(call.output)):
        output = module(X)
    ones = torch.ones(2, TOKENS, 16)
    assert torch.equal(output, X + module.layers[0].out(ones) + module.layers[1].out(ones))


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (
            lambda q, k, v: flash_attn_func(q, k, v, window_size=(2, 0)),
            "flash_attn_func of flash_attn with window_size",
        ),
        (
            lambda q, k, v: flash_attn_func(q, k, v, softcap=30.0),
            "flash_attn_func of flash_attn with softcap",
        ),
        (
            lambda q, k, v: flash_attn_func(q, k, v, alibi_slopes=SLOPES),
            "flash_attn_func of flash_attn with alibi_slopes",
        ),
        (
            lambda q, k, v: flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), X, X).view_as(q),
            "flash_attn_varlen_func of flash_attn",
        ),
        (
            lambda q, k, v: memory_efficient_attention(q, k, v, Odd()),
            "memory_efficient_attention of xformers.ops with Odd",
        ),
        (lambda q, k, v: sageattn(q, k, v, tensor_layout="NHD"), "sageattn of sageattention"),
    ],
)
def test_what_of_them_cannot_be_read_is_named(call: Callable[..., Any], reason: str) -> None:
    with pytest.raises(MeasurementError) as error:
        meaning_on(of_tokens(call), X)
    assert str(error.value) == f"layer 'layers.0' cannot be read: it calls {reason}"
    assert error.value.tip == WHAT_TO_TYPE


@pytest.mark.usefixtures("libraries")
def test_everything_is_restored_and_captures_nest() -> None:
    module = of_tokens(lambda q, k, v: flash_attn_func(q, k, v))
    layers, functions = layers_on(module, X), (flash_attn_func, memory_efficient_attention)
    scripted, inner, outer = torch.jit.ScriptFunction.__call__, list[Any](), list[Any]()
    with attention_calls(layers, outer.append), attention_calls(layers[1:], inner.append):
        assert flash_attn_func is not functions[0]
        module(X)
    assert [len(outer), len(inner)] == [2, 1]
    with pytest.raises(KeyError), attention_calls(layers, {}.__getitem__):
        module(X)
    assert (flash_attn_func, memory_efficient_attention) == functions
    assert torch.jit.ScriptFunction.__call__ is scripted
    assert flex.flex_attention is flex_attention
    assert_untouched(module)


# --- through transformers -----------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_models_of_transformers_with_flex_attention_are_those_with_sdpa(window: int | None) -> None:
    config = transformers.MistralConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        sliding_window=window,
    )
    model = transformers.MistralModel(config).eval()
    ids, mask = torch.randint(3, 60, (2, TOKENS)), torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :3] = 0
    kept: dict[str, list[AttentionCall]] = {"sdpa": [], "flex_attention": []}
    for name, calls in kept.items():
        model.set_attn_implementation(name)
        layers = layers_on(model, input_ids=ids, attention_mask=mask)
        with attention_calls(layers, calls.append):
            model(input_ids=ids, attention_mask=mask)
    for one, other in zip(kept["sdpa"], kept["flex_attention"], strict=True):
        real = mask.bool()[:, None, :, None].expand(one.output.shape)
        torch.testing.assert_close(one.output[real], other.output[real], atol=1e-5, rtol=1e-4)
        seen = [np.nan_to_num(dense_pattern(call))[0, :, 3:] for call in (one, other)]
        np.testing.assert_allclose(seen[0], seen[1], atol=1e-5)
