"""The coverage program: a sample of its models by both routes, and its judge on tables that are wrong."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

from zoo import routes
from zoo.builders import verdict_of
from zoo.case import Case
from zoo.evidence import Evidence
from zoo.judge import EXACT, FALSE, PARTIAL, REFUSED, SILENT, WRONG, Answer, judged
from zoo.observer import Call, observed
from zoo.provenance import CROSS, MIXED, ORDER, OWN, POOLED

pytestmark = pytest.mark.filterwarnings("ignore")


class Attention(nn.Module):
    """Self-attention over `[input, token, 16]`; `of` says whose values, and over what."""

    num_heads = 2

    def __init__(self, of: str = "tokens") -> None:
        super().__init__()
        self.of = of
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if other is not None:
            k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(other).chunk(3, -1)[1:])
        if self.of == "channels":
            y = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        elif self.of == "inputs":  # input 0 gets the rows of input 1
            y = F.scaled_dot_product_attention(q.flip(0), k.flip(0), v.flip(0)).flip(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Crossed(Model):
    """Each layer reads the values of another sequence of the same length."""

    def forward(self, x: Tensor) -> Tensor:
        other = x.cumsum(1)
        for layer in self.layers:
            x = layer(x, other)
        return x


def evidence_of(module: nn.Module) -> tuple[Case, Evidence]:
    torch.manual_seed(0)
    case = Case("made", "made", module.eval(), torch.randn(2, 8, 16))
    return case, routes.module_evidence(case)


@pytest.fixture(scope="module")
def right() -> tuple[Evidence, pd.DataFrame]:
    """A model of two layers, and its table, which is right."""
    torch.manual_seed(1)
    case, seen = evidence_of(Model(Attention(), Attention()))
    answer = routes.asked(case.module, [case.batch])
    assert answer.samples is not None
    assert judged(seen, answer).word == EXACT
    return seen, answer.samples


DOCTORED = {
    "a number": lambda table: table.assign(value=table["value"] + 2e-5 * (table["metric"] == "cos_y_vself")),
    "inputs exchanged": lambda table: table.assign(input_index=1 - table["input_index"]),
    "an input left out": lambda table: table[table["input_index"] == 0],
    "heads exchanged": lambda table: table.assign(head=1 - table["head"]),
    "a head left out": lambda table: table[table["head"] == 0],
    "layers exchanged": lambda table: table.assign(layer=1 - table["layer"]),
    "layers from one": lambda table: table.assign(layer=table["layer"] + 1),
    "another module": lambda table: table.assign(
        module=table["module"].map({"layers.0": "layers.1", "layers.1": "layers.0"})
    ),
}


@pytest.mark.parametrize("fault", DOCTORED)
def test_a_doctored_table_is_wrong(right: tuple[Evidence, pd.DataFrame], fault: str) -> None:
    seen, table = right
    found = judged(seen, Answer(DOCTORED[fault](table)))
    assert found.word == WRONG
    assert found.reasons


def test_a_layer_that_is_neither_there_nor_named(right: tuple[Evidence, pd.DataFrame]) -> None:
    seen, table = right
    one = table[table["module"] == "layers.0"]
    assert judged(seen, Answer(one)).word == SILENT
    assert judged(seen, Answer(one, {"layers.1": "why"})).word == PARTIAL


def test_refusals_are_checked(right: tuple[Evidence, pd.DataFrame]) -> None:
    seen, _ = right
    assert judged(seen, Answer(error="the model computes attention itself")).word == FALSE
    assert judged(seen, Answer(error="KeyError: 0", raw=True)).word == FALSE
    for module in (nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), Written("merged")):
        _, attends = evidence_of(module)
        for reason in ("X made no self-attention call", "the model computes attention itself"):
            assert judged(attends, Answer(error=reason)).word == FALSE
    _, none = evidence_of(nn.Linear(16, 16))
    assert judged(none, Answer(error="Linear made no self-attention call")).word == REFUSED


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (Model(Attention("channels")), "channels"),
        (Crossed(Attention(), Attention()), "other tokens"),
    ],
    ids=["channels", "cross-attention of equal length"],
)
def test_what_a_call_is_over_is_seen(module: nn.Module, why: str) -> None:
    """A table of a call that is not over its own tokens is wrong, whatever is in it."""
    _case, seen = evidence_of(module)
    lines = [
        {"tower": "module", "layer": 0, "module": "layers.0", "tokens": "all", "metric": "self_weight"}
        | {"input": str(i), "input_index": i, "head": h, "value": 0.5}
        for i in range(2)
        for h in range(2)
    ]
    found = judged(seen, Answer(pd.DataFrame(lines)))
    assert found.word == WRONG
    assert why in " ".join(found.reasons)


def test_rows_of_another_input_are_seen() -> None:
    """Numbers of input 1 under the name of input 0: layers that swap inputs before they attend."""
    case, seen = evidence_of(Model(Attention("inputs")))
    plain = Model(Attention()).eval()
    plain.load_state_dict(case.module.state_dict())
    right = routes.asked(plain, [case.batch])
    assert right.samples is not None
    swapped = right.samples.assign(input_index=1 - right.samples["input_index"])
    assert judged(seen, right).word == EXACT
    assert judged(seen, Answer(swapped)).word == WRONG


def _eager(module: nn.Module) -> list[Call]:
    x = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0))
    return [call for call in observed(module.eval(), lambda: module(x)) if call.eager]


class Written(nn.Module):
    """Attention that is written out; `how` says how."""

    num_heads = 2

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.qkv = how, nn.Linear(16, 48)
        self.mix, self.sink = nn.Linear(2, 2), nn.Parameter(torch.tensor([1.0, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (2, 8)) for part in self.qkv(x).chunk(3, -1)
        )  # [input, token, head, dim]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
        v = v.transpose(1, 2)
        if self.how == "merged":  # [input · head, token, dim], values on the left
            a = scores.flatten(0, 1).softmax(-1)
            y = torch.bmm(v.flatten(0, 1).mT, a.mT).mT.unflatten(0, (len(x), 2))
        elif self.how == "keys in the middle":
            a = scores.permute(0, 3, 1, 2).softmax(1)
            y = torch.einsum("bjhi,bhjd->bhid", a, v)
        elif self.how == "talking heads":
            y = self.mix(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v
        elif self.how == "a sink":
            sink = self.sink.view(1, 2, 1, 1).expand(len(x), 2, x.shape[1], 1)
            y = torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v
        elif self.how == "exp over its sum":
            raised = (scores - scores.amax(-1, keepdim=True)).exp()
            y = (raised / raised.sum(-1, keepdim=True)) @ v
        elif self.how == "a causal mask":
            hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            y = scores.masked_fill(hidden, torch.finfo(x.dtype).min).softmax(-1) @ v
        else:
            y = scores.log_softmax(-1).exp() @ v
        self.y, self.v = y, v
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    "how",
    [
        "merged",
        "keys in the middle",
        "talking heads",
        "a sink",
        "exp over its sum",
        "a causal mask",
        "log softmax",
    ],
)
def test_attention_that_is_written_out_is_followed(how: str) -> None:
    """The weights are those that multiplied V, in the axes of the softmax; a token meets its own value."""
    torch.manual_seed(2)
    module = Written(how)
    _case, seen = evidence_of(module)
    (call,) = _eager(module)
    assert call.pattern is not None
    assert call.value is not None
    assert call.output is not None
    assert call.seen is not None
    shape = (2, 2, 6)
    assert torch.equal(call.value.reshape(*shape, 8), module.v.double())
    assert torch.equal(call.output.reshape(*shape, 8), module.y.double())
    torch.testing.assert_close(call.pattern @ call.value, call.output, rtol=0, atol=1e-6)
    sums = call.pattern.sum(-1).reshape(shape)
    assert bool((sums - 1).abs().max() < 1e-6) == (how not in ("talking heads", "a sink"))
    hidden = torch.ones(6, 6).triu(1).bool() if how == "a causal mask" else torch.zeros(6, 6).bool()
    assert torch.equal(~call.seen.reshape(*shape, 6)[0, 0], hidden)
    assert set(seen.kinds.values()) == {OWN}


class Reversed(Written):
    """Queries meet the values of tokens in the opposite order, or values that are made of many tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        v = v.flip(1) if self.how == "reversed" else v.cumsum(1)
        return x + (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize(("how", "kind"), [("reversed", ORDER), ("summed", MIXED)])
def test_values_of_other_tokens_are_seen_in_eager_attention(how: str, kind: str) -> None:
    _case, seen = evidence_of(Reversed(how))
    assert set(seen.kinds.values()) == {kind}


@pytest.mark.parametrize("front", [False, True], ids=["behind", "in front"])
def test_keys_without_a_token_are_told_from_pooled_ones(front: bool) -> None:
    """A learned key beside the tokens' own leaves them their own values; keys of other tokens do not."""

    class Memory(Written):
        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            more = self.qkv.bias.view(3, 1, 1, 16)[1:].expand(2, len(x), 1, 16)
            if self.how == "pooled":
                more = torch.stack([k.mean(1, keepdim=True), v.mean(1, keepdim=True)])
            k, v = (
                torch.cat([m, own] if front else [own, m], 1) for m, own in zip(more, (k, v), strict=True)
            )
            return x + F.scaled_dot_product_attention(q, k, v)

    _case, seen = evidence_of(Memory("learned"))
    assert set(seen.kinds.values()) == {OWN}
    assert seen.calls[0][0].own == int(front)
    _case, seen = evidence_of(Memory("pooled"))
    assert set(seen.kinds.values()) == {POOLED}


class Fewer(Written):
    """Keys that are pooled from the tokens, or a memory in their place."""

    def __init__(self, how: str, *, fused: bool = False) -> None:
        super().__init__(how)
        self.fused, self.memory = fused, nn.Parameter(torch.randn(1, 4, 16))

    def forward(self, x: Tensor) -> Tensor:
        q, _, _ = self.qkv(x).chunk(3, -1)
        less = x.unflatten(1, (-1, 2)).mean(2) if self.how == "pooled" else self.memory.expand(len(x), -1, -1)
        _, k, v = self.qkv(less).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v) if self.fused else (q @ k.mT / 8**0.5).softmax(-1) @ v
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
def test_pooled_keys_are_measured_by_their_weights(fused: bool) -> None:
    case, seen = evidence_of(Model(Attention(), Fewer("pooled", fused=fused)))
    assert {path: kind for (path, *_), kind in seen.kinds.items()} == {"layers.0": OWN, "layers.1": POOLED}
    answer = routes.asked(case.module, [case.batch])
    assert answer.samples is not None
    assert judged(seen, answer).word == EXACT
    table = answer.samples
    pooled = table["module"] == "layers.1"
    doctored = {
        "weights": table["value"] + 1e-4 * (pooled & (table["metric"] == "entropy")),
        "a value of its own": table["value"].where(~(pooled & (table["metric"] == "cos_y_vself")), 0.5),
    }
    for value in doctored.values():
        assert judged(seen, Answer(table.assign(value=value))).word == WRONG
    assert judged(seen, Answer(table[~pooled], {"layers.1": "why"})).word == PARTIAL
    assert judged(seen, Answer(table.assign(value_from="own"))).word == WRONG
    _, memory = evidence_of(Model(Attention(), Fewer("memory", fused=fused)))
    assert set(memory.kinds.values()) == {OWN, CROSS}
    assert judged(memory, answer).word == WRONG


SAMPLE = [
    ("torch", "module", "Transformer (batch_first)", EXACT),
    ("torch", "module", "TransformerEncoder (sequence first)", EXACT),
    ("torch", "module", "MultiheadAttention (need_weights)", EXACT),
    ("timm", "module", "test_vit", EXACT),
    ("timm", "name", "test_vit", EXACT),
    ("timm", "module", "xcit_nano_12_p16_224 (fused)", REFUSED),
    ("timm", "name", "pvt_v2_b0", EXACT),
    ("open_clip", "name", "ViT-M-16-alt", EXACT),
    ("transformers", "module", "bert", EXACT),
    ("transformers", "module", "t5", EXACT),
    ("transformers", "name", "bart", EXACT),
    ("transformers", "module", "llama", EXACT),
    ("transformers", "name", "yolos", EXACT),
    ("transformers", "module", "albert", EXACT),
    ("transformers", "module", "qwen3_next", EXACT),
    ("torch", "module", "MultiheadAttention (add_zero_attn)", EXACT),
    ("timm", "module", "vit_tiny_patch16_224 (attn_layer=diff)", EXACT),
    ("timm", "module", "cait_xxs24_224", EXACT),
    ("timm", "module", "convit_tiny", EXACT),
    ("transformers", "module", "gptj", EXACT),
    ("transformers", "module", "bloom", EXACT),
    ("transformers", "module", "deberta", EXACT),
    ("transformers", "module", "xlnet", EXACT),
    ("transformers", "module", "gpt_oss", EXACT),
    ("transformers", "module", "gemma2", EXACT),
    ("transformers", "module", "swinv2", EXACT),
]


@pytest.mark.parametrize(
    ("library", "route", "name", "word"), SAMPLE, ids=["|".join(one[:3]) for one in SAMPLE]
)
def test_a_sample_is_right(library: str, route: str, name: str, word: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = verdict_of(library, route, name)
    assert found.word == word, found.reasons
