"""`diag.metrics_of`: attention that was captured anywhere gives the numbers of a probe."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from reference import make_call
from torch import Tensor, nn

import diag
from diag.attention.call import AttentionCall
from diag.attention.pattern import pattern_rows
from diag.errors import UserError
from diag.metrics.default import METRICS, per_input

TEXTS = ["def f(x): return x " * 20, "for i in range(10): print(i) " * 20]


@pytest.fixture(scope="module")
def calls() -> list[AttentionCall]:
    return diag.capture("demo:lm", TEXTS, seq_len=24)


@pytest.fixture(scope="module")
def probed() -> pd.DataFrame:
    return diag.probe("demo:lm", TEXTS, seq_len=24).samples


def sorted_values(table: pd.DataFrame) -> np.ndarray:
    table = table.assign(metric=table["metric"].astype(str))
    return table.sort_values(["layer", "input", "head", "metric"])["value"].to_numpy()


def cache_of(calls: list[AttentionCall]) -> dict[str, Tensor]:
    """As `run_with_cache` of transformer-lens returns it: tokens before heads."""
    cache = {}
    for call in calls:
        place = f"blocks.{call.layer}.attn.hook_"
        cache |= {f"{place}v": call.value.transpose(1, 2), f"{place}z": call.output.transpose(1, 2)}
        cache |= {f"{place}pattern": pattern_rows(call), f"{place}q": call.output}
    return cache


def test_a_captured_call_and_a_cache_give_the_numbers_of_the_probe(
    calls: list[AttentionCall], probed: pd.DataFrame
) -> None:
    ours = pd.concat([diag.metrics_of(call) for call in calls])
    assert list(ours.columns) == ["layer", "input", "head", "metric", "value"]
    theirs = probed.assign(input=probed["input_index"])
    theirs = theirs[theirs["metric"].isin(METRICS)]
    assert len(ours) == len(theirs) > 0
    np.testing.assert_allclose(sorted_values(ours), sorted_values(theirs), rtol=2e-6, atol=2e-6)
    of_cache = diag.metrics_of(cache_of(calls))
    np.testing.assert_allclose(sorted_values(of_cache), sorted_values(ours), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_tensors_in_each_form_give_the_numbers_of_the_call(causal: bool, kv_heads: int) -> None:
    call = make_call(causal=causal, heads=4, kv_heads=kv_heads)
    wanted = {name: numbers.numpy() for name, numbers in per_input(call).items()}
    common: dict[str, Any] = {"value": call.value, "output": call.output}
    scores = {"query": call.query, "key": call.key, "scale": call.scale}
    forms: dict[str, dict[str, Any]] = {
        "pattern": common | {"pattern": pattern_rows(call)},
        "no output": {"value": call.value, "pattern": pattern_rows(call)},
        "arrays": {"value": call.value.numpy(), "pattern": pattern_rows(call).numpy()},
        "query and key": common | scores | {"causal": causal},
        "a mask": common | scores | {"mask": torch.ones(call.tokens, call.tokens).tril().bool()},
    }
    if causal:
        half = {"mask": torch.ones(call.tokens, call.tokens).bool()}
        forms |= {
            "both": common | scores | half | {"causal": True},
            "an added mask and both": {"value": call.value}
            | scores
            | {"causal": True, "mask": torch.zeros(call.tokens, call.tokens, dtype=torch.float64)},
        }
    else:
        forms.pop("a mask")
    for form, given in forms.items():
        table = diag.metrics_of(**given)
        for name, numbers in wanted.items():
            found = table[table["metric"] == name].pivot(index="input", columns="head", values="value")
            np.testing.assert_allclose(found.to_numpy(), numbers, atol=2e-5, err_msg=f"{form}: {name}")


def test_without_weights_what_needs_none_is_measured() -> None:
    call = make_call()
    table = diag.metrics_of(value=call.value, output=call.output).set_index("metric")["value"]
    assert table.loc[["entropy", "self_part"]].isna().all()
    np.testing.assert_allclose(
        table.loc["cos_y_vself"], per_input(call, ["cos_y_vself"])["cos_y_vself"].flatten()
    )


def test_one_head_and_one_input_need_no_axes() -> None:
    call = make_call(heads=1, kv_heads=1, batch=1)
    whole = diag.metrics_of(value=call.value, pattern=pattern_rows(call))
    bare = diag.metrics_of(value=call.value[0, 0], pattern=pattern_rows(call)[0, 0])
    pd.testing.assert_frame_equal(whole, bare)


def test_per_token_numbers_average_to_those_of_the_input() -> None:
    call = make_call(causal=True)
    chosen = torch.arange(call.tokens) % 2 == 0
    names = ["cos_y_vself", "entropy", "sink_strength", "value_similarity"]
    each = diag.metrics_of(call, metrics=names, per="token", tokens=chosen)
    assert set(each["metric"]) == {"cos_y_vself", "entropy"}  # the others are of all tokens together
    assert len(each) == 2 * call.batch * call.heads * call.tokens
    assert not each.dropna()["token"].isin(np.flatnonzero(~chosen)).any()
    mean = each.groupby(["metric", "input", "head"])["value"].mean()
    whole = diag.metrics_of(call, metrics=["cos_y_vself", "entropy"], tokens=chosen)
    wanted = whole.set_index(["metric", "input", "head"])["value"]
    np.testing.assert_allclose(mean, wanted.loc[mean.index], atol=1e-6)


class Odd:
    """No tensor."""


THREE = {name: np.eye(3) for name in ("value", "query", "key")}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "nothing is given"),
        ({"value": np.eye(3)}, "value= is given"),
        ({"value": np.eye(3), "query": np.eye(3)}, "value=, query= is given"),
        ({"value": np.eye(3), "pattern": np.eye(4)}, r"value has the shape \[1, 1, 3, 3\]"),
        (
            {"value": np.eye(3), "pattern": np.eye(3), "query": np.eye(3), "key": np.eye(3)},
            "query= and key= besides",
        ),
        ({"value": np.eye(3), "pattern": np.eye(3), "output": np.ones((3, 3))}, "not what the weights make"),
        ({"value": Odd(), "pattern": np.eye(3)}, "value is a Odd"),
        ({"value": np.ones(3), "pattern": np.eye(3)}, r"value has the shape \[3\]"),
        ({"value": np.eye(3), "pattern": np.eye(3), "per": "head"}, "per = 'head'"),
        ({"value": np.eye(3), "pattern": np.eye(3), "metrics": "entrpy"}, "no metric 'entrpy'"),
        ({"value": np.eye(3), "pattern": np.eye(3), "tokens": [True]}, r"tokens has the shape \[1, 1\]"),
        (
            {"value": np.eye(3), "pattern": np.eye(3), "metrics": "value_similarity", "per": "token"},
            "all tokens",
        ),
        ({"value": np.eye(3), "pattern": np.eye(3), "metrics": []}, "no metric is named"),
        ({"value": np.eye(3) * 1j, "pattern": np.eye(3)}, "value holds complex128"),
        ({"value": torch.eye(3).to_sparse(), "pattern": np.eye(3)}, "value is not dense"),
        ({"value": np.ones((0, 4)), "pattern": np.ones((0, 0))}, r"value has the shape \[0, 4\]"),
        (THREE | {"mask": np.ones((3, 3), int)}, "mask holds whole numbers"),
        (THREE | {"mask": np.ones((2, 3), bool)}, r"mask has the shape \[1, 1, 2, 3\], beside scores"),
        (THREE | {"scale": "x"}, "scale = 'x'"),
        ({"call": {"a": 1}}, "a dict was given, and no values"),
        ({"call": {"blocks.0.attn.hook_v": 1}}, r"the cache lacks blocks\.0\.attn\.hook_pattern"),
        ({"call": make_call(), "value": np.eye(3)}, "a call was given, and value besides"),
    ],
)
def test_what_does_not_fit_is_told(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told) as error:
        diag.metrics_of(**given)
    assert error.value.tip


class Saved:
    """As nnsight hands out what a trace saved: the tensor is its `value`."""

    def __init__(self, value: Tensor) -> None:
        self.value = value


def test_output_attentions_with_values_give_the_numbers_of_the_probe() -> None:
    """Of every layer at once; values are caught by hooks on the projections, as anybody would."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "vocab_size": 50}
    config = transformers.LlamaConfig(
        **sizes, num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = transformers.LlamaModel(config).eval()
    ids = torch.randint(0, 50, (2, 12))
    values = list[Tensor]()

    def caught(module: nn.Module, args: object, output: Tensor) -> None:
        values.append(output.unflatten(-1, (2, 8)).transpose(1, 2))

    hooks = [layer.self_attn.v_proj.register_forward_hook(caught) for layer in model.layers]
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    for hook in hooks:
        hook.remove()
    ours = diag.metrics_of(value=values, pattern=attentions)
    assert sorted(set(ours["layer"])) == [0, 1, 2]
    theirs = diag.probe(model, [{"input_ids": ids}]).samples
    theirs = theirs[theirs["metric"].isin(METRICS)].assign(input=lambda table: table["input_index"])
    np.testing.assert_allclose(sorted_values(ours), sorted_values(theirs), rtol=2e-5, atol=2e-5)
    proxies = {"value": [Saved(x) for x in values], "pattern": tuple(map(Saved, attentions))}
    pd.testing.assert_frame_equal(diag.metrics_of(**proxies), ours)
    one = diag.metrics_of(value=Saved(values[0]), pattern=Saved(attentions[0]))
    pd.testing.assert_frame_equal(one, ours[ours["layer"] == 0])
    with pytest.raises(UserError, match=r"layers differ in number: \{'value': 2, 'pattern': 3\}"):
        diag.metrics_of(value=values[:2], pattern=attentions)
    with pytest.raises(UserError, match="pattern of layer 1 is None"):
        diag.metrics_of(value=values[:2], pattern=[attentions[0], None])
