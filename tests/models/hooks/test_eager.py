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
from torch.utils._python_dispatch import TorchDispatchMode

import diag
from diag.attention.call import AttentionCall
from diag.attention.visibility import Visibility
from diag.errors import MeasurementError, UserError
from diag.models.hooks.depth import EAGER
from diag.models.hooks.eager import Followed
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


def by_softmin(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.softmin(-scores_of(q, k, mask), dim=-1) @ v


def by_the_normaliser(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def by_the_first_norm(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.normalize(scores_of(q, k, mask).exp(), p=1, dim=-1) @ v


def divided_afterwards(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    return scores.exp() @ v / scores.exp().sum(-1, keepdim=True)


def divided_afterwards_by_a_reciprocal(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = scores_of(q, k, mask)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return (1 / (weights.sum(-1) + 1e-9))[..., None] * torch.einsum("bhij,bhjd->bhid", weights, v)


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


def by_other_names(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.linalg.matmul(torch.special.softmax(scores_of(q, k, mask), -1), v)


def by_named_arguments(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return torch.matmul(input=torch.softmax(input=scores_of(q, k, mask), dim=-1), other=v)


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
    by_softmin,
    by_the_normaliser,
    by_the_first_norm,
    divided_afterwards,
    divided_afterwards_by_a_reciprocal,
    by_exponentials_in_place,
    with_casts_and_dropout,
    with_a_column_for_a_sink,
    masked_afterwards,
    masked_afterwards_alone,
    by_other_names,
    by_named_arguments,
    added_to_nothing,
    written_over_their_scores,
    all_in_place,
    with_scores_that_are_used_again,
    with_keys_in_another_order,
]


def in_blocks(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Keys in turn, as flash attention has them."""
    output, total = torch.zeros_like(q), torch.zeros_like(q[..., :1])
    for keys, values in zip(k.split(3, -2), v.split(3, -2), strict=True):
        weights = scores_of(q, keys, None).exp()
        output, total = output + weights @ values, total + weights.sum(-1, keepdim=True)
    return output / total


def with_a_column_for_the_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    output = scores_of(q, k, None).exp() @ F.pad(v, (0, 1), value=1.0)
    return output[..., :-1] / output[..., -1:]


def divided_by_more_than_the_sum(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, None).exp()
    return weights @ v / (1 + weights.sum(-1, keepdim=True))


def divided_once_for_each_input(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """What all inputs share is multiplied first."""
    weights = scores_of(q[:1], k[:1], None).exp()
    return weights @ v[:1] / weights.sum(-1, keepdim=True).expand(len(q), -1, -1, -1)


def added_to_something(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    weights = scores_of(q, k, None).softmax(-1).flatten(0, 1)
    return torch.baddbmm(v.flatten(0, 1), weights, v.flatten(0, 1)).view(q.shape)


def by_a_sum_of_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return (scores_of(q, k, None).softmax(-1)[..., None] * v[..., None, :, :]).sum(-2)


UNSEEN = [
    in_blocks,
    with_a_column_for_the_sum,
    divided_by_more_than_the_sum,
    divided_once_for_each_input,
    added_to_something,
    by_a_sum_of_products,
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


@pytest.mark.parametrize("written", UNSEEN)
def test_attention_that_is_not_seen_is_said_to_be_there(written: Written) -> None:
    """Alone, and beside a layer that is measured."""
    with pytest.raises(UserError) as told:
        meaning_on(Stack(Attention(call=written)).eval(), torch.randn(2, TOKENS, 16))
    said = "the model computes attention itself, in 'layers.0', and what it weighs is not seen"
    assert str(told.value) == said
    both = Stack(Attention(), Attention(call=written)).eval()
    (tower,) = meaning_on(both, torch.randn(2, TOKENS, 16)).towers
    assert tower.skipped == {"layers.1": EAGER}


def test_no_matrix_of_tokens_is_copied_to_follow_it() -> None:
    """Queries and keys that are merged into one axis are let go of; so are scores that would be copied."""
    followed, scores = Followed(), torch.randn(2, 4, TOKENS, TOKENS)

    def run(func: Callable[..., Tensor], *args: Any) -> Tensor:
        result = func(*args)
        with Largest() as made:
            followed.seen(func, args, {}, result)
        assert made.elements <= TOKENS
        return result

    weights = run(torch.softmax, scores.transpose(0, 1), -1)
    moved = run(Tensor.permute, weights, (0, 2, 1, 3))
    assert followed.known[moved].axis == 3
    assert followed.known[moved].scores.shape == moved.shape
    merged = run(Tensor.reshape, run(Tensor.transpose, moved, 1, 2), (8, TOKENS, TOKENS))
    assert followed.known[merged].axis == 2
    assert followed.known[merged].scores is None
    alone = run(Tensor.transpose, run(Tensor.narrow, run(Tensor.contiguous, merged), 0, 0, 1), 1, 2)
    assert followed.known[alone].axis == 1
    chosen = run(torch.index_select, merged, 1, torch.tensor([2, 3]))
    assert followed.known[chosen].axis == 2
    assert run(Tensor.flatten, merged, 1) not in followed.known


@pytest.mark.parametrize("written", [by_the_normaliser, divided_afterwards])
def test_weights_that_are_known_by_their_sums_are_so_in_half_a_format(written: Written) -> None:
    module, x = Attention(heads=4, call=written).eval().bfloat16(), torch.randn(1, TOKENS, 16).bfloat16()
    call, _ = one_call(module, x)
    q, k, v = (part.double() for part in module.heads(x))
    assert call.pattern is not None
    torch.testing.assert_close(call.pattern.double(), scores_of(q, k, None).softmax(-1), rtol=0.05, atol=0)
    torch.testing.assert_close(call.pattern.double() @ v, call.output.double(), rtol=0.02, atol=0.02)


def test_an_output_that_is_divided_in_place_is_replaced_in_place() -> None:
    def divided(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = scores_of(q, k, mask).detach().exp().flatten(0, 1)
        output = torch.baddbmm(v.new_zeros(1), weights, v.detach().flatten(0, 1))
        output.div_(weights.sum(-1, keepdim=True))
        return output.view(q.shape)

    module, x = Attention(heads=4, call=divided).eval(), torch.randn(2, TOKENS, 16)
    q, k, v = module.heads(x)
    expected = scores_of(q, k, None).softmax(-1) @ v
    outputs = list[Tensor]()
    _, doubled = one_call(module, x, on_call=lambda call: outputs.append(call.output * 2) or outputs[-1])
    torch.testing.assert_close(outputs[0], 2 * expected)
    torch.testing.assert_close(doubled, x + module.out(2 * expected.transpose(1, 2).flatten(2)))


class Largest(TorchDispatchMode):
    """How many elements the largest tensor has that is made, and is no view."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not func.is_view:
            self.elements = max(self.elements, result.numel())
        return result


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


def test_other_numbers_of_keys_are_told() -> None:
    class Pooled(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            q, k, v = self.heads(x)
            y = scores_of(q, k[..., ::3, :], None).softmax(-1) @ v[..., ::3, :]
            return x + self.out(y.transpose(1, 2).flatten(2))

    (tower,) = meaning_on(Stack(Attention(), Pooled()).eval(), torch.randn(2, 9, 16)).towers
    assert {layer.path: layer.form.keys_of for layer in tower.layers} == {
        "layers.0": "own",
        "layers.1": "others",
    }
    assert tower.skipped == {}


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


# --- what is done to them ---------------------------------------------------------------------------

SINKS = torch.linspace(-1, 2, 4).view(1, 4, 1, 1)
MIX = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)) / 2


def causal(q: Tensor, k: Tensor) -> Tensor:
    return scores_of(q, k.repeat_interleave(2, 1), CAUSAL, torch.finfo(q.dtype).min)


def capped(q: Tensor, k: Tensor) -> Tensor:
    scores = (q @ k.repeat_interleave(2, 1).mT).tanh() * 3
    return scores.masked_fill(~CAUSAL, torch.finfo(q.dtype).min).softmax(-1)


def with_sinks(q: Tensor, k: Tensor) -> Tensor:
    scores = causal(q, k)
    sinks = SINKS.to(q.dtype).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def mixed(q: Tensor, k: Tensor) -> Tensor:
    weights = scores_of(q, k.repeat_interleave(2, 1), None).softmax(-1)
    return torch.einsum("gh,bhij->bgij", MIX.to(q.dtype), weights)


WEIGHED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k: causal(q, k).softmax(-1),
    "late": lambda q, k: causal(q, k).softmax(-1),
    "capped": capped,
    "sinks": with_sinks,
    "mixed": mixed,
}


def masked(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    others = weights * (1 - torch.eye(TOKENS))
    scale = weights.sum(-1, keepdim=True) / others.sum(-1, keepdim=True)
    return torch.where(scale.isfinite(), (others * scale) @ v, weights @ v)


def even(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    return (seen / seen.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)) @ v


def exclusive(weights: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    y, own = weights @ v, F.normalize(v, dim=-1)
    return y - 0.5 * (y * own).sum(-1, keepdim=True) * own


EDITS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "identity=0": lambda weights, v, seen: weights @ v,
    "mask_self": masked,
    "uniform": even,
    "gated_xsa=0.5": exclusive,
    "identity=0.3": lambda weights, v, seen: 0.7 * (weights @ v) + 0.3 * v,
}


@pytest.mark.parametrize("form", WEIGHED)
def test_edits_and_sums_are_those_of_the_formula(form: str) -> None:
    """Of grouped heads, in batches of several inputs and of one: densely, in float64, layer by layer."""
    weigh = WEIGHED[form]

    def written(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        v = v.repeat_interleave(2, 1)
        if form == "late":
            weights = causal(q, k).exp()
            return weights @ v / weights.sum(-1, keepdim=True)
        return weigh(q, k) @ v

    torch.manual_seed(0)
    module = Stack(*(Attention(heads=4, kv_heads=2, call=written) for _ in range(2))).eval()
    exact, x = copy.deepcopy(module).double(), torch.randn(3, TOKENS, 16)
    seen, first = (torch.ones(TOKENS, TOKENS), 0) if form == "mixed" else (CAUSAL.double(), 1)
    for edit, change in EDITS.items():
        given = {"metrics": ["cos_y_vself", "row_sum"], "intervene": [edit], "batch_size": 2}
        if form == "mixed" and edit == "mask_self":
            with pytest.raises(MeasurementError, match="has weights that are negative"):
                diag.probe(module, [x], **given)
            continue
        found = diag.probe(module, [x], **given).samples.sort_values(["input_index", "head"])
        stream = x.double()
        for number, layer in enumerate(exact.layers):
            q, k, v = layer.heads(stream)
            weights, v = weigh(q, k).detach(), v.repeat_interleave(2, 1).detach()
            y = change(weights, v, seen)
            stream = stream + layer.out(y.transpose(1, 2).flatten(2))
            cosines = F.cosine_similarity(y, v, dim=-1)
            for metric, of_token in (("cos_y_vself", cosines), ("row_sum", weights.sum(-1))):
                told = found[(found["layer"] == number) & (found["metric"] == metric)]["value"]
                expected = of_token[..., first:].mean(-1).flatten()
                np.testing.assert_allclose(told, expected, atol=1e-5, err_msg=f"{edit} {metric}")
    means = diag.probe(module, [x], metrics=["cos_y_vself"]).layers["mean"]
    with diag.Monitor(module.train(), x, every=1, metrics=["cos_y_vself"]) as monitor:
        module(x)
        told = monitor.step(1)
    expected = [*means, means.mean()]
    assert [told[f"attnbias/cos_y_vself/{at}"] for at in ("layer_00", "layer_01", "mean")] == pytest.approx(
        expected, abs=1e-6
    )


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
