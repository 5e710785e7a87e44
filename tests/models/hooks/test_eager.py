"""Attention that a model writes out itself is the call that PyTorch's function would have made."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from attention_modules import Attention, Stack, assert_untouched
from surveys import layers_on, meaning_on
from torch import Tensor, nn

import diag
from diag.attention.call import AttentionCall
from diag.attention.visibility import Visibility
from diag.errors import MeasurementError
from diag.models.hooks.layers import Layer
from diag.models.hooks.meaning import SEVERAL
from diag.models.hooks.seam import attention_calls

Written = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""Attention of `[batch, head, token, dim]`, which it returns; the mask is True where a key is seen."""


def scores_of(q: Tensor, k: Tensor, mask: Tensor | None, hidden: float = -torch.inf) -> Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores if mask is None else scores.masked_fill(~mask, hidden)


def by_matmul(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.softmax(scores_of(q, k, mask), dim=-1) @ v


def by_merged_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, mask).flatten(0, 1).softmax(-1)
    return torch.bmm(weights, v.flatten(0, 1)).view(q.shape)


def by_einsum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.einsum("b h i j, b h j d -> b i h d", scores_of(q, k, mask).softmax(-1), v).transpose(1, 2)


def by_einsum_over_the_second_axis(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = torch.softmax(scores_of(q, k, mask).permute(2, 3, 0, 1), dim=1)  # [query, key, batch, head]
    return torch.einsum("ijbn,jbnd->ibnd", weights, v.permute(2, 0, 1, 3)).permute(1, 2, 0, 3)


def with_values_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, mask).softmax(dim=-1)
    return (v.mT @ weights.mT).mT


def by_logarithms(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.matmul(F.log_softmax(scores_of(q, k, mask), -1).exp(), v)


def by_exponentials(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (weights / weights.sum(-1, keepdim=True)) @ v


def by_the_special_function(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.special.softmax(scores_of(q, k, mask), -1) @ v


def by_softmin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.softmin(-scores_of(q, k, mask), dim=-1) @ v


def by_the_normaliser(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def by_the_first_norm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.normalize(scores_of(q, k, mask).exp(), p=1, dim=-1) @ v


def by_exponentials_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = torch.exp(scores_of(q, k, mask))
    weights /= weights.sum(-1, keepdim=True)
    return weights @ v


def with_casts_and_dropout(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask, torch.finfo(q.dtype).min)
    weights = F.softmax(scores, dim=-1, dtype=torch.float64).to(q.dtype)
    return torch.matmul(F.dropout(weights, 0.5, training=False), v).contiguous()


def with_a_column_for_a_sink(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    never = torch.full_like(scores[..., :1], -torch.inf)
    return torch.cat([scores, never], -1).softmax(-1)[..., :-1] @ v


def masked_afterwards(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, mask, -1e4).softmax(-1)
    return (weights if mask is None else weights.masked_fill(~mask, 0.0)) @ v


def masked_afterwards_alone(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, None).softmax(-1)
    if mask is not None:
        weights = weights * mask
        weights = weights / weights.sum(-1, keepdim=True)
    return weights @ v


def by_the_logarithm_of_the_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    return (scores - torch.logsumexp(scores, -1)[..., None]).exp() @ v


def by_other_names(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.linalg.matmul(torch.special.softmax(scores_of(q, k, mask), -1), v)


def by_named_arguments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.matmul(input=torch.softmax(input=scores_of(q, k, mask), dim=-1), other=v)


def by_the_opposite(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.softmin(-scores_of(q, k, mask), -1) @ v


def added_to_nothing(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, mask).softmax(-1).flatten(0, 1)
    return torch.baddbmm(v.new_zeros(1), weights, v.flatten(0, 1), beta=0).view(q.shape)


def written_over_their_scores(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask).detach()
    return torch.softmax(scores, -1, out=scores) @ v.detach()


def all_in_place(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask).detach()
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True)) @ v.detach()


def with_scores_that_are_used_again(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask).detach()
    weights = scores.softmax(-1)
    scores.zero_()
    return weights @ v.detach()


def with_keys_in_another_order(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return scores_of(q, k, mask).flip(-1).softmax(-1).roll(1, -1).roll(-1, -1).flip(-1) @ v


WRITTEN: list[Written] = [
    by_matmul,
    by_merged_heads,
    by_einsum,
    by_einsum_over_the_second_axis,
    with_values_first,
    by_logarithms,
    by_exponentials,
    by_the_special_function,
    by_softmin,
    by_the_normaliser,
    by_the_first_norm,
    by_exponentials_in_place,
    with_casts_and_dropout,
    with_a_column_for_a_sink,
    masked_afterwards,
    masked_afterwards_alone,
    by_the_logarithm_of_the_sum,
    by_other_names,
    by_named_arguments,
    by_the_opposite,
    added_to_nothing,
    written_over_their_scores,
    all_in_place,
    with_scores_that_are_used_again,
    with_keys_in_another_order,
]
TOKENS = 9
CAUSAL = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
PADDED = (torch.arange(TOKENS) < 7) & torch.ones(2, 1, 1, 1, dtype=torch.bool)
WINDOW = CAUSAL & ~CAUSAL.tril(-3)


def one_call(module: nn.Module, *arguments: Any, on_call: Any = None) -> tuple[AttentionCall, Tensor]:
    """The only call of a module's first layer, and what the module returns."""
    (layer,), calls = layers_on(module, *arguments), list[AttentionCall]()
    with attention_calls([layer], lambda call: calls.append(call) or (on_call and on_call(call))) as seen:
        output = module(*arguments)
    assert_untouched(module)
    assert seen.projection == {layer.name: "as captured"}
    (call,) = calls
    return call, output


@pytest.mark.parametrize("written", WRITTEN)
@pytest.mark.parametrize("mask", [None, CAUSAL, PADDED, WINDOW], ids=["full", "causal", "padded", "window"])
def test_what_is_written_out_is_the_call_of_the_fused_function(written: Written, mask: Tensor | None) -> None:
    """Weights, values, output and who sees whom; an output that is replaced goes the same way."""
    torch.manual_seed(0)
    fused, x = Attention(heads=4).eval(), torch.randn(2, TOKENS, 16)
    eager = Attention(heads=4, call=written).eval()
    eager.load_state_dict(fused.state_dict())
    (expected, doubled), (found, again) = (
        one_call(m, x, mask, on_call=lambda call: call.output * 2) for m in (fused, eager)
    )
    assert found.query is None
    assert found.key is None
    assert found.pattern is not None
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(found.output, expected.output)
    assert expected.query is not None
    assert expected.key is not None
    pattern = scores_of(expected.query, expected.key, mask).softmax(-1)
    torch.testing.assert_close(found.pattern, pattern)
    torch.testing.assert_close(again, doubled)
    assert found.visibility.rule == expected.visibility.rule
    assert torch.equal(found.visibility.count, expected.visibility.count.expand_as(found.visibility.count))


def shared_value_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.einsum("bhij,bjd->bhid", scores_of(q, k, mask).softmax(-1), v[:, 0])


def test_values_that_all_heads_share() -> None:
    call, _ = one_call(Attention(heads=4, kv_heads=1, call=shared_value_heads).eval(), torch.randn(2, 9, 16))
    assert call.value.shape == (2, 4, 9, 8)
    assert torch.equal(call.value, call.value[:, :1].expand(-1, 4, -1, -1))


class TalkingHeads(Attention):
    """Scores and weights are mixed between heads, the weights by a linear layer on the last axis."""

    def __init__(self) -> None:
        super().__init__(heads=4)
        self.before, self.after = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
        self.used: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        weights = self.before(scores_of(q, k, mask)).softmax(-1)
        self.used = self.after(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.out((self.used @ v).transpose(1, 2).flatten(2))


class Reattention(TalkingHeads):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        weights = scores_of(q, k, mask).softmax(-1)
        self.used = torch.einsum("bhij,hg->bgij", weights, self.after.weight)
        return x + self.out((self.used @ v).transpose(1, 2).flatten(2))


class Gated(TalkingHeads):
    """ConViT: the sum of two softmaxes, gated by head."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.heads(x)
        gate = torch.sigmoid(self.after.bias).view(1, -1, 1, 1)
        places = -(torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])).abs().float()
        of_places = places.expand(1, 4, -1, -1).softmax(-1)
        self.used = (1 - gate) * scores_of(q, k, mask).softmax(-1) + gate * of_places
        self.used = self.used / self.used.sum(-1, keepdim=True)
        return x + self.out((self.used @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [TalkingHeads, Reattention, Gated])
def test_the_pattern_is_what_multiplied_the_values(kind: type[TalkingHeads]) -> None:
    module = kind().eval()
    call, _ = one_call(module, torch.randn(2, 9, 16))
    assert call.pattern is not None
    assert module.used is not None
    assert torch.equal(call.pattern, module.used)
    torch.testing.assert_close(call.pattern @ call.value, call.output)
    assert call.visibility.rule == "full"


def test_torch_attention_with_its_weights_is_that_without() -> None:
    class Torch(nn.Module):
        def __init__(self, weights: bool) -> None:
            super().__init__()
            self.mha, self.weights = nn.MultiheadAttention(16, 2, batch_first=True), weights

        def forward(self, x: Tensor) -> Tensor:
            hidden = ~torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
            return self.mha(x, x, x, attn_mask=hidden, need_weights=self.weights)[0]

    plain, with_weights = Torch(False).eval(), Torch(True).eval()
    with_weights.load_state_dict(plain.state_dict())
    x = torch.randn(3, 9, 16)
    (expected, output), (found, other) = one_call(plain, x), one_call(with_weights, x)
    torch.testing.assert_close(found.output, expected.output)
    torch.testing.assert_close(found.value, expected.value)
    torch.testing.assert_close(other, output)
    assert found.visibility.rule == expected.visibility.rule == "causal"


def test_one_head_without_a_projection_is_told_by_the_axis_test() -> None:
    class Bare(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x @ x.mT).softmax(-1) @ x

    (layer,) = layers_on(nn.Sequential(Bare()).eval(), torch.randn(2, 9, 16))
    assert layer.form.layout is not None
    assert layer.form.layout.split(torch.zeros(2, 9, 16)).shape == (2, 1, 9, 16)


class Weigh(nn.Module):
    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        return scores_of(q, k, CAUSAL).softmax(-1)


class Gather(nn.Module):
    def forward(self, weights: Tensor, v: Tensor) -> Tensor:
        return weights @ v


@pytest.mark.parametrize("apart", [False, True], ids=["in the parent", "in a sibling"])
def test_weights_may_be_made_in_another_module_than_the_product(apart: bool) -> None:
    """The module that multiplies is the layer; none that is listed runs where its weights are made."""

    class Parted(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.weigh, self.gather = Weigh(), Gather()

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x)
            weights = self.weigh(q, k) if apart else scores_of(q, k, CAUSAL).softmax(-1)
            return x + self.out(self.gather(weights, v).transpose(1, 2).flatten(2))

    module, x = Stack(Parted()).eval(), torch.randn(2, TOKENS, 16)
    (call,) = diag.capture(module, x)
    q, k, v = module.layers[0].heads(x)
    torch.testing.assert_close(call.pattern, scores_of(q, k, CAUSAL).softmax(-1))
    torch.testing.assert_close(call.value, v)
    assert call.module == "layers.0.gather"
    assert call.visibility.rule == "causal"


def test_keys_are_seen_where_scores_show_them_or_something_gave_them_weight() -> None:
    places = torch.rand(TOKENS, TOKENS)

    def added(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (scores_of(q, k, CAUSAL).softmax(-1) + places) @ v

    def chosen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = scores_of(q, k, CAUSAL).softmax(-1)  # one key alone, gradients of all
        return (F.one_hot(weights.argmax(-1), TOKENS) - weights.detach() + weights) @ v

    for written, rule in ((added, "full"), (chosen, "causal")):
        call, _ = one_call(Attention(call=written).eval(), torch.randn(2, TOKENS, 16))
        assert call.visibility.rule == rule


def test_dropped_weights_are_refused() -> None:
    def dropping(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.dropout(scores_of(q, k, mask).softmax(-1), 0.25) @ v

    module = Stack(Attention(call=dropping))
    with (
        pytest.raises(MeasurementError, match=r"'layers\.0' drops attention weights at random \(p = 0.25\)"),
        attention_calls([Layer(0, "layers.0", module.layers[0])], lambda call: None),
    ):
        module(torch.randn(2, 9, 16))


def test_other_numbers_of_keys_are_named() -> None:
    class Pooled(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x)
            y = scores_of(q, k[..., ::3, :], None).softmax(-1) @ v[..., ::3, :]
            return x + self.out(y.transpose(1, 2).flatten(2))

    (tower,) = meaning_on(Stack(Attention(), Pooled()).eval(), torch.randn(2, 9, 16)).towers
    assert [layer.path for layer in tower.layers] == ["layers.0"]
    assert tower.skipped == {"layers.1": "9 queries over 3 keys: cross-attention or pooling"}


def test_weights_that_are_used_twice_are_not_taken_for_windows() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x)
            weights = scores_of(q, k, mask).softmax(-1)
            return x + self.out((weights @ v * torch.sigmoid(weights @ k)).transpose(1, 2).flatten(2))

    (tower,) = meaning_on(Stack(Attention(), Twice()).eval(), torch.randn(2, 9, 16)).towers
    assert tower.skipped == {"layers.1": SEVERAL}


# --- models that can do both ------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
TEXT = {"vocab_size": 99, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BOTH: dict[str, Callable[[str], tuple[nn.Module, Any]]] = {}


def of_both(build: Callable[[str], tuple[nn.Module, Any]]) -> Callable[[str], tuple[nn.Module, Any]]:
    BOTH[build.__name__] = build
    return build


def texts() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (3, 24), generator=torch.Generator().manual_seed(0))
    real = torch.ones_like(ids)
    real[1, 18:], real[2, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": real}


@of_both
def llama(how: str) -> tuple[nn.Module, Any]:
    config = transformers.LlamaConfig(**SMALL, **TEXT, num_key_value_heads=2, attn_implementation=how)
    return transformers.LlamaModel(config), texts()


@of_both
def mistral(how: str) -> tuple[nn.Module, Any]:
    config = transformers.MistralConfig(
        **SMALL, **TEXT, num_key_value_heads=2, sliding_window=8, attn_implementation=how
    )
    return transformers.MistralModel(config), texts()


@of_both
def bert(how: str) -> tuple[nn.Module, Any]:
    return transformers.BertModel(transformers.BertConfig(**SMALL, **TEXT, attn_implementation=how)), texts()


@of_both
def swin(how: str) -> tuple[nn.Module, Any]:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2), num_heads=(2, 4))
    return fused(model, how), torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))


@of_both
def sam_windows(how: str) -> tuple[nn.Module, Any]:
    """Windows that are filled up, and positions that are added to the scores."""
    model = timm.create_model("samvit_base_patch16", img_size=160, depth=3, embed_dim=32, num_heads=2)
    return fused(model, how), torch.randn(2, 3, 160, 160, generator=torch.Generator().manual_seed(0))


def fused(model: nn.Module, how: str) -> nn.Module:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = how == "sdpa"
    return model


@pytest.mark.parametrize("name", BOTH)
def test_both_ways_give_the_same_table(name: str) -> None:
    """All default metrics of all layers, of tokens that are padded on either side and of windows."""
    tables = []
    state: dict[str, Any] = {}
    for how in ("sdpa", "eager"):
        torch.manual_seed(0)
        model, batch = BOTH[name](how)
        state = state or copy.deepcopy(model.state_dict())
        model.load_state_dict(state)
        probe = diag.probe(model.eval(), [batch])
        assert not probe.skipped
        tables.append(probe.layers)
    pd.testing.assert_frame_equal(*tables, rtol=2e-5, atol=2e-6)


# --- who sees whom, by scores -----------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e4, -1e3, -500.0])
@pytest.mark.parametrize("mask", [CAUSAL, PADDED, WINDOW], ids=["causal", "padded", "window"])
def test_what_scores_hide_is_what_their_mask_hides(mask: Tensor, hidden: float) -> None:
    scores = 5 * torch.randn(2, 4, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
    output = torch.zeros(2, 4, TOKENS, 8)
    expected = Visibility.of(mask, False, output)
    scores = scores + torch.zeros(mask.shape).masked_fill(~mask, hidden)
    found = Visibility.of_scores(scores, output)
    assert found.rule == expected.rule
    assert torch.equal(found.count.expand(2, 4, -1), expected.count.expand(2, 4, -1))
    assert found.mask is None


def test_scores_that_are_far_apart_hide_nothing() -> None:
    """A key that underflows is seen, if scores lead down to it in steps."""
    scores = -torch.linspace(0, 200, TOKENS).expand(1, 2, TOKENS, TOKENS)
    assert (scores.softmax(-1) == 0).any()
    found = Visibility.of_scores(scores, torch.zeros(1, 2, TOKENS, 8))
    assert found.rule == "full"
    assert found.keys is None


def test_a_row_that_is_hidden_whole_sees_nothing() -> None:
    scores = torch.zeros(1, 1, 4, 4)
    scores[..., 0, :] = torch.finfo(torch.float32).min
    scores[..., 1:, 0] = torch.finfo(torch.float32).min
    found = Visibility.of_scores(scores, torch.zeros(1, 1, 4, 8))
    np.testing.assert_array_equal(found.count.squeeze(), [0, 3, 3, 3])
