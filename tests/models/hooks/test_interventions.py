"""Interventions against dense float64 references, their identities, their gradients, and their spelling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import CASES, OTHER_TOKENS, dense_pattern, float64, make_call, with_maps, with_pattern
from torch import Tensor

from diag.attention.call import AttentionCall
from diag.errors import MeasurementError, UserError
from diag.models.hooks.beside import Beside, HeldOut, HeldOutLayer
from diag.models.hooks.interventions import INTERVENTIONS, SHARE, WHOLE, parse

ON_ATTENTION = [name for name, entry in INTERVENTIONS.items() if entry.where == "attention"]
every_case = pytest.mark.parametrize("case", CASES)


def values(call: AttentionCall) -> np.ndarray:
    return float64(call.value).repeat(call.group, axis=1)


def output(text: str, call: AttentionCall) -> Tensor:
    return parse(text).output(call, beside(call))


def beside(call: AttentionCall, **more: object) -> Beside:
    """What edits are told: every second key is an image's, and what three other inputs gave."""
    image = torch.arange(call.keys) % 2 == 0
    drawn = torch.randn(
        3, 3, call.heads, call.value.shape[-1], generator=torch.Generator().manual_seed(3)
    ).double()
    others = HeldOut(("x", "y", "z"), {call.layer: HeldOutLayer(*drawn.unbind(0))})
    ids = tuple(f"own {number}" for number in range(call.batch))
    told = Beside(ids=ids, image=lambda call: image[None], held_out=others)
    return replace(told, **more)  # type: ignore[arg-type]


def outside(call: AttentionCall) -> np.ndarray:
    none = np.zeros(call.output.shape)
    return none if call.outside is None else none + float64(call.outside)


def close(found: Tensor, expected: np.ndarray, call: AttentionCall) -> None:
    tolerance = 2e-5 if call.output.dtype == torch.float32 else 4e-2
    assert found.shape == call.output.shape
    assert found.dtype == call.output.dtype
    np.testing.assert_allclose(float64(found), expected, atol=tolerance, rtol=tolerance)


def projected_out(y: np.ndarray, v: np.ndarray, strength: float = 1.0) -> np.ndarray:
    z = y.copy()
    for place in np.ndindex(*y.shape[:3]):
        if np.linalg.norm(v[place]) > 0:
            unit = v[place] / np.linalg.norm(v[place])
            z[place] = y[place] - strength * (y[place] @ unit) * unit
    return z


@every_case
def test_xsa_is_the_projection(case: str) -> None:
    call = CASES[case]
    close(output("xsa", call), projected_out(float64(call.output), values(call)), call)


@pytest.mark.parametrize("case", [name for name, call in CASES.items() if call.output.dtype == torch.float32])
def test_after_xsa_y_is_orthogonal_to_v(case: str) -> None:
    call = CASES[case]
    z, y, v = float64(output("xsa", call)), float64(call.output), values(call)
    scale = np.linalg.norm(y, axis=-1) * np.linalg.norm(v, axis=-1)
    assert np.all(np.abs((z * v).sum(-1)) <= 1e-5 * scale + 1e-12)


@every_case
def test_twice_equals_once(case: str) -> None:
    call = CASES[case]
    once = output("xsa", call)
    close(output("xsa", replace(call, output=once)), float64(once), call)


@every_case
def test_gates_of_nothing_and_of_all(case: str) -> None:
    call = CASES[case]
    assert torch.equal(output("gated_xsa=0", call), call.output)
    assert torch.equal(output("identity=0", call), call.output)
    assert torch.equal(output("random_direction=0", call), call.output)
    close(output("gated_xsa=1", call), float64(output("xsa", call)), call)
    close(output("identity=1", call), values(call), call)
    close(output("gated_xsa=0.25", call), projected_out(float64(call.output), values(call), 0.25), call)


@every_case
def test_mask_self_is_the_renormalised_pattern(case: str) -> None:
    """To the sum that they had; what comes of no token stays."""
    call = CASES[case]
    pattern, v, expected = dense_pattern(call), values(call), float64(call.output).copy()
    if (pattern < 0).any():
        with pytest.raises(MeasurementError, match=r"layer 'layer' has weights that are negative"):
            output("mask_self", call)
        return
    for b, h, i in np.ndindex(*pattern.shape[:3]):
        others = pattern[b, h, i].copy()
        others[i] = 0
        if others.sum() > 0:
            attended = (others * pattern[b, h, i].sum() / others.sum()) @ v[b, h]
            expected[b, h, i] = attended + outside(call)[b, h, i]
    close(output("mask_self", call), expected, call)


def test_mask_self_of_added_maps_is_refused_and_what_needs_y_and_v_alone_is_not() -> None:
    call = with_maps(make_call(), -0.4)
    with pytest.raises(MeasurementError, match=r"layer 'layer' adds up 2 maps") as caught:
        output("mask_self", call)
    assert "mask_self" in str(caught.value.tip)
    value = call.value.double()
    unit = value / value.norm(dim=-1, keepdim=True)
    y = call.output.double()
    close(output("xsa", call), float64(y - (y * unit).sum(-1, keepdim=True) * unit), call)


@pytest.mark.parametrize("name", ["xsa", "gated_xsa", "identity", "mask_self"])
def test_what_needs_a_value_of_its_own_is_refused_where_keys_are_of_other_tokens(name: str) -> None:
    call = OTHER_TOKENS["pooled keys"]
    with pytest.raises(MeasurementError, match=r"layer 'layer' attends to keys that are not its tokens' own"):
        output(name, call)
    expected = float64(call.value).mean(2, keepdims=True) + np.zeros(call.output.shape)
    close(output("uniform", call), expected, call)
    assert output("random_direction", call).shape == call.output.shape


def test_mask_self_is_exact_where_a_token_attends_to_itself_almost_alone() -> None:
    call = make_call(tokens=6)
    sharp = replace(call, query=call.key * 12, causal=True)
    pattern = dense_pattern(sharp)
    assert (pattern.diagonal(axis1=2, axis2=3) > 1 - 1e-9).any()
    others = np.where(np.eye(6, dtype=bool), 0, pattern)
    expected = others / others.sum(-1, keepdims=True).clip(1e-300) @ values(sharp)
    found = float64(output("mask_self", sharp))
    np.testing.assert_allclose(found[:, :, 1:], expected[:, :, 1:], atol=2e-5)
    np.testing.assert_array_equal(found[:, :, 0], float64(sharp.output)[:, :, 0])


@every_case
def test_uniform_is_the_mean_of_the_visible_values(case: str) -> None:
    call = CASES[case]
    pattern, v, expected = dense_pattern(call), values(call), float64(call.output).copy()
    for b, h, i in np.ndindex(*pattern.shape[:3]):
        visible = call.visibility.visible_rows
        seen = pattern[b, h, i] != 0
        if visible is not None:
            seen = visible.expand(call.batch, call.heads, -1, -1)[b, h, i].numpy()
        if seen.any():
            expected[b, h, i] = pattern[b, h, i].sum() * v[b, h][seen].mean(0) + outside(call)[b, h, i]
    close(output("uniform", call), expected, call)


def test_a_pattern_that_a_library_made_does_as_well() -> None:
    call = CASES["causal"]
    for name in ("mask_self", "uniform", "xsa"):
        close(output(name, with_pattern(call)), float64(output(name, call)), call)


def test_a_random_direction_is_fixed_unit_and_its_own_in_every_layer_and_head() -> None:
    call = make_call()
    removed = float64(call.output - output("random_direction", call))
    unit = removed / np.linalg.norm(removed, axis=-1, keepdims=True)
    along = np.abs(np.einsum("bhtd,hd->bht", unit, unit[0, :, 0]))
    np.testing.assert_allclose(along, 1, atol=1e-4)
    assert abs(unit[0, 0, 0] @ unit[0, 1, 0]) < 0.9
    assert torch.equal(output("random_direction", call), output("random_direction", call))
    assert not torch.equal(
        output("random_direction", call), output("random_direction", replace(call, layer=1))
    )
    share = (removed**2).sum() / (float64(call.output) ** 2).sum()
    assert 0.2 / 16 < share < 5 / 16  # of 16 dimensions, one


@every_case
def test_a_matched_direction_takes_as_much_of_each_token_as_the_projection(case: str) -> None:
    call = CASES[case]
    tolerance = 2e-5 if call.output.dtype == torch.float32 else 4e-2
    y, projected, matched = (
        float64(x) for x in (call.output, output("xsa", call), output("matched_direction", call))
    )
    for found, wanted in ((y - matched, y - projected), (matched, projected)):
        found, wanted = np.linalg.norm(found, axis=-1), np.linalg.norm(wanted, axis=-1)
        np.testing.assert_allclose(found, wanted, atol=5 * tolerance, rtol=tolerance)


def test_a_matched_direction_has_nothing_of_v_but_what_both_have_of_y() -> None:
    call = make_call(tokens=40, dim=64)
    y, removed = float64(call.output), float64(call.output - output("matched_direction", call))
    y, v, removed = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (y, values(call), removed))
    expected = (y * v).sum(-1) * (y * removed).sum(-1)
    chance = (1 - (y * v).sum(-1) ** 2) / np.sqrt(64)  # of a random direction beside y
    assert np.abs((removed * v).sum(-1) - expected).mean() < 1.2 * chance.mean()
    half = float64(call.output - output("matched_direction=0.5", call))
    np.testing.assert_allclose(half * 2, float64(call.output - output("matched_direction", call)), atol=1e-5)


@pytest.mark.parametrize("name", ON_ATTENTION)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_flow(name: str, causal: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, 2, 2)
    )
    strength = {WHOLE: "=2", SHARE: "=0.1" if "sink" in name else "=0.3"}.get(
        str(INTERVENTIONS[name].allowed), "=0.3"
    )
    text = name if INTERVENTIONS[name].strength is None else name + strength

    def changed(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=True
        )
        return output(text, AttentionCall(0, "a", query, key, value, y, None, causal, 0.5))

    assert torch.autograd.gradcheck(changed, (query, key, value))


def test_gradients_are_finite_at_a_zero_value() -> None:
    call = make_call(tokens=4)
    value = call.value.clone()
    value[:, :, 1] = 0
    value.requires_grad_()
    output("xsa", replace(call, value=value)).sum().backward()
    assert value.grad is not None
    assert value.grad.isfinite().all()


def test_grouped_heads_need_no_copy_of_keys_or_values() -> None:
    call = make_call(heads=8, kv_heads=2)
    full = replace(call, key=call.key.repeat_interleave(4, 1), value=call.value.repeat_interleave(4, 1))
    for name in ON_ATTENTION:
        close(output(name, call), float64(output(name, full)), call)


# --- layers, heads and strengths --------------------------------------------------------------------


def test_some_heads_only() -> None:
    call = make_call()
    found = output("xsa:0-3/1,3", call)
    assert torch.equal(found[:, [0, 2]], call.output[:, [0, 2]])
    assert torch.equal(found[:, [1, 3]], output("xsa", call)[:, [1, 3]])


def test_a_head_that_is_not_there() -> None:
    with pytest.raises(UserError, match="layer 0 has no head 4") as caught:
        output("xsa:0/4", make_call())
    assert caught.value.tip == "its heads are 0 to 3"


def test_strengths_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "alpha.csv"
    file.write_text("layer,head,strength\n0,1,1\n0,2,0.5\n1,0,1\n")
    call = make_call()
    found = output(f"gated_xsa={file}", call)
    assert torch.equal(found[:, [0, 3]], call.output[:, [0, 3]])
    torch.testing.assert_close(found[:, 1], output("xsa", call)[:, 1])
    torch.testing.assert_close(found[:, 2], output("gated_xsa=0.5", call)[:, 2])


def test_a_file_without_the_columns(tmp_path: Path) -> None:
    file = tmp_path / "alpha.csv"
    file.write_text("layer,alpha\n0,1\n")
    with pytest.raises(UserError, match="has no column 'head'") as caught:
        parse(f"gated_xsa={file}")
    assert caught.value.tip == "columns are layer, head, strength"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "cannot read strengths"),
        (b"\xff\xfe\x00", "cannot read strengths"),
        (b"layer,head,strength\n0,first,1\n", "cannot read strengths"),
        (b"layer,head,strength\n0,,1\n", "cannot read strengths"),
        (b"layer,head,strength\n0,1,\n", "a row has none"),
    ],
)
def test_a_file_that_is_no_table_of_strengths(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "alpha.csv"
    file.write_bytes(content)
    with pytest.raises(UserError, match=told) as caught:
        parse(f"gated_xsa={file}")
    assert caught.value.tip == "columns are layer, head, strength"


@pytest.mark.parametrize(
    ("text", "layers", "heads", "strength"),
    [
        ("xsa", None, None, 1.0),
        ("xsa:8-11", {8, 9, 10, 11}, None, 1.0),
        ("gated-xsa=0.5:0,2", {0, 2}, None, 0.5),
        ("gated_xsa", None, None, 0.5),
        ("identity=.3:1/0-2", {1}, {0, 1, 2}, 0.3),
        ("skip:3", {3}, None, 1.0),
        ("cb_s=0.2", None, None, 0.2),
    ],
)
def test_spelling(text: str, layers: set[int] | None, heads: set[int] | None, strength: float) -> None:
    edit = parse(text)
    assert (edit.layers, edit.heads, edit.strength) == (layers, heads, strength)
    assert edit.at(8) == (layers is None or 8 in layers)


@pytest.mark.parametrize(
    ("text", "message", "tip"),
    [
        ("xsb", "there is no intervention 'xsb'", "did you mean 'xsa'?"),
        ("xsa=0.5", "'xsa' takes no strength", "write xsa"),
        ("xsa:5-2", "does not understand '5-2'", "for example xsa:0,5-11"),
        ("gated_xsa=much", "'much' is neither a number nor a file", "for example gated_xsa=0.5"),
        ("window=0", "0 is not a whole number above 0", "for example window=64"),
        ("top_keys=2.5", "2.5 is not a whole number above 0", "for example top_keys=64"),
        ("redistribute=1.5", "1.5 is not a number from 0 to 1", "for example redistribute=0.5"),
        ("sink_zero=nan", "nan is not a number from 0 to 1", "for example sink_zero=0.5"),
        ("zero=0.5", "'zero' takes no strength", "write zero"),
        ("skip:1/2", "'skip' changes a whole branch, not heads", "give layers only"),
    ],
)
def test_mistakes(text: str, message: str, tip: str) -> None:
    with pytest.raises(UserError) as caught:
        parse(text)
    assert str(caught.value) == f"--intervene {text}: {message}"
    assert caught.value.tip == tip


# --- branches ---------------------------------------------------------------------------------------


def test_context_broadcasting() -> None:
    x = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0))
    mean = x.mean(1, keepdim=True)
    torch.testing.assert_close(INTERVENTIONS["cb"].change(x, None, 1.0), (x + mean) / 2)
    torch.testing.assert_close(INTERVENTIONS["cb_s"].change(x, None, 0.2), x + 0.2 * mean)
    assert not INTERVENTIONS["skip"].change(x, None, 1.0).any()
    # what is alike in all tokens stays, what differs is halved
    torch.testing.assert_close(INTERVENTIONS["cb"].change(x, None, 1.0).mean(1, keepdim=True), mean)
    real = torch.tensor([[True] * 5, [True, True, False, False, False]])
    padded = INTERVENTIONS["cb_s"].change(x, real, 1.0) - x
    torch.testing.assert_close(padded[0, :1], mean[0])
    torch.testing.assert_close(padded[1, :1], x[1, :2].mean(0, keepdim=True))


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_every_line_of_the_table_explains_itself(name: str) -> None:
    entry = INTERVENTIONS[name]
    assert entry.definition.endswith((".", ":", "."))
    assert entry.where in ("attention", "output gate", "attention branch", "mlp branch")
    assert entry.source
