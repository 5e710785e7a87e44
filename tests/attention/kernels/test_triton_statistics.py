"""The fused statistics of CUDA against the dense float64 reference.

Without a device the kernels run in Triton's interpreter on the CPU (see conftest.py), in tiles of a few rows
so that short sequences hold several; with one they are compiled and run there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from reference import (
    CASES,
    additive,
    dense_pattern,
    dense_scores,
    dense_visible,
    key_padding,
    make_call,
    random_bias,
    random_mask,
    window,
    with_other_keys,
)
from torch import Tensor

from diag.attention import kernels
from diag.attention import softmax_statistics as softmax
from diag.attention.call import AttentionCall, first_key
from diag.attention.containers import SoftmaxStatistics
from diag.attention.sampling import RowSample

triton_scores = pytest.importorskip("diag.attention.kernels.triton_scores", reason="Triton is not installed")
from diag.attention.kernels.triton_received import received  # noqa: E402
from diag.attention.kernels.triton_statistics import row_statistics, softmax_statistics  # noqa: E402

Blocks = triton_scores.Blocks
DEVICE = "cpu" if triton_scores.INTERPRETED else "cuda"
NAMES = ("entropy", "sum_of_squares", "self_weight", "first_weight", "log_normaliser")
TOLERANCE = 1e-5 if DEVICE == "cpu" else 1e-4  # tensor cores add in another order


def long(tokens: int = 37, **options: object) -> AttentionCall:
    """A call of several tiles, with a last one that is not full."""
    return make_call(**{"batch": 1, "heads": 2, "tokens": tokens, **options})


PADDED = key_padding([range(5, 30)], 37)
HOLES = random_mask(1, 2, 37, 37)
BLIND = HOLES.clone()
BLIND[0, 1, 3:30] = False  # whole tiles of rows that see nothing, in one head
BLIND[:, :, :, 33] = False
LOWER = torch.ones(37, 37, dtype=torch.bool).tril()
LONG = {
    "full": long(),
    "causal": long(causal=True),
    "one whole tile": long(tokens=32),
    "one token more than a tile": long(tokens=33, causal=True),
    "key padding": long(mask=PADDED),
    "key padding, causal": long(mask=PADDED, causal=True),
    "two dimensions": long(mask=LOWER),
    "window": long(mask=window(37, 4, 0)),
    "holes": long(mask=HOLES),
    "rows that see nothing": long(mask=BLIND),
    "rows that see nothing, causal": long(mask=BLIND, causal=True, kv_heads=1),
    "bias": long(mask=random_bias(1, 2, 37, 37), causal=True),
    "bias of keys": long(mask=random_bias(1, 1, 1, 37)),
    "bias of queries": long(mask=random_bias(1, 2, 37, 1)),
    "additive -inf": long(mask=additive(BLIND, -torch.inf) + random_bias(1, 2, 37, 37)),
    "additive lowest": long(mask=additive(PADDED & LOWER, torch.finfo(torch.float32).min)),
    "additive, half": long(mask=additive(HOLES, -65504.0, torch.float16), dtype=torch.float16),
    "additive, float64": long(mask=random_bias(1, 1, 37, 37).double()),
    "transposed mask": long(mask=HOLES.transpose(2, 3)),
    "grouped": long(heads=4, kv_heads=2, causal=True),
    "bfloat16": long(dtype=torch.bfloat16, causal=True, kv_heads=1),
    "float16": long(dtype=torch.float16),
    "head size 80": long(dim=80, causal=True),
    "head size 96, bfloat16": long(dim=96, dtype=torch.bfloat16),
    "head size 256": long(dim=256),
    "head size 5": long(dim=5),
    "large scores": replace(long(), scale=3.0),
    "small scores": replace(long(causal=True), scale=1e-3),
}
SHORT = [
    "one token",
    "one token, causal",
    "two tokens, causal",
    "zero vectors",
    "mask per head, unseen keys",
    "no real token",
    "causal left padding",
    "log-normaliser given",
]
SHORT_CASES = {name: call for name, call in CASES.items() if name in SHORT}


def on_device(call: AttentionCall) -> AttentionCall:
    return replace(call, **{name: x.to(DEVICE) for name, x in vars(call).items() if isinstance(x, Tensor)})


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """`tiles(rows, keys)` makes the kernels work in tiles of that size."""

    def choose(rows: int, keys: int) -> None:
        monkeypatch.setattr(triton_scores, "blocks", lambda *given: Blocks(rows, keys, 4, 1))

    choose(32, 16)
    return choose


def dense_statistics(call: AttentionCall) -> dict[str, np.ndarray]:
    """Each statistic of each row from the whole float64 pattern; zeros where a row sees nothing."""
    pattern, scores = dense_pattern(call), dense_scores(call)
    logarithm = np.log(pattern, out=np.zeros_like(pattern), where=pattern > 0)
    highest = np.maximum(scores.max(-1), -1e300)
    first = first_key(call)
    return {
        "entropy": -(pattern * logarithm).sum(-1),
        "sum_of_squares": (pattern**2).sum(-1),
        "self_weight": np.diagonal(pattern, axis1=-2, axis2=-1),
        "first_weight": np.stack([pattern[b, :, :, first[b]] for b in range(call.batch)]),
        "log_normaliser": highest + np.log(np.maximum(np.exp(scores - highest[..., None]).sum(-1), 1e-300)),
    }


def assert_statistics_match(call: AttentionCall) -> None:
    measured, expected = softmax_statistics(on_device(call)), dense_statistics(call)
    sees = dense_visible(call).any(-1)
    for name in NAMES:
        values = getattr(measured, name).cpu().numpy()
        assert values.dtype == np.float32
        assert values.shape == call.output.shape[:3], name
        np.testing.assert_allclose(values[sees], expected[name][sees], TOLERANCE, TOLERANCE, err_msg=name)
        assert (values[~sees] == (np.float32(-1e30) if name == "log_normaliser" else 0)).all(), name


@pytest.mark.parametrize("valued", [False, True])
def test_keys_that_are_no_tokens_take_their_part(
    valued: bool, tiles: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    padded = make_call(kv_heads=2, mask=key_padding([range(13), range(4, 13)], 13))
    call = with_other_keys(padded, valued=valued)
    monkeypatch.setattr(kernels, "_has_triton", lambda call: True)
    found, sees = kernels.fused_statistics(on_device(call)), dense_visible(call).any(-1)
    assert found is not None
    assert found.log_normaliser is not None
    np.testing.assert_array_equal(found.log_normaliser.cpu(), call.log_normaliser)
    expected = dense_statistics(call) | {"row_sum": dense_pattern(call).sum(-1)}
    for name in (*NAMES[:4], "row_sum"):
        values = getattr(found, name).cpu().numpy()
        np.testing.assert_allclose(values[sees], expected[name][sees], TOLERANCE, TOLERANCE, err_msg=name)


@pytest.mark.parametrize("name", LONG)
def test_statistics_match_the_dense_reference(name: str, tiles: Callable[[int, int], None]) -> None:
    assert_statistics_match(LONG[name])


@pytest.mark.parametrize("name", SHORT_CASES)
def test_short_calls_match_the_dense_reference(name: str) -> None:
    assert_statistics_match(SHORT_CASES[name])


@pytest.mark.parametrize("shape", [(16, 32), (16, 16)])
@pytest.mark.parametrize("name", ["causal", "rows that see nothing, causal"])
def test_any_tiles_will_do(name: str, shape: tuple[int, int], tiles: Callable[[int, int], None]) -> None:
    tiles(*shape)
    assert_statistics_match(LONG[name])


def test_layouts_of_models_are_read_in_place(tiles: Callable[[int, int], None]) -> None:
    """Queries and keys cut out of one projection and transposed, with the mask of a longer sequence."""
    packed = torch.randn(1, 20, 3, 2, 16, generator=torch.Generator().manual_seed(0)).permute(2, 0, 3, 1, 4)
    mask = random_mask(1, 1, 40, 40)[:, :, 3:23, 5:25]
    call = replace(make_call(batch=1, heads=2, tokens=20), query=packed[0], key=packed[1], mask=mask)
    assert not call.query.is_contiguous()
    assert_statistics_match(call)


def test_an_entropy_that_is_nearly_none_keeps_its_digits(tiles: Callable[[int, int], None]) -> None:
    """`lse - Σ A s` would leave rounding of scores near 400: the sum over 2^(s-m) (s-m) does not cancel."""
    query = torch.zeros(1, 1, 20, 16)
    query[..., 0] = 20.0
    key = torch.zeros(1, 1, 20, 16)
    key[..., 0] = torch.linspace(15.0, 20.0, 20)
    call = replace(make_call(batch=1, heads=1, tokens=20), query=query, key=key, scale=1.0)
    measured = softmax_statistics(on_device(call)).entropy.cpu().numpy()
    np.testing.assert_allclose(measured, dense_statistics(call)["entropy"], rtol=1e-4)
    assert 0 < measured.max() < 0.05


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # what the interpreter takes a maximum with
def test_what_is_not_a_number_is_not_hidden(tiles: Callable[[int, int], None]) -> None:
    call = long(causal=True)
    assert call.query is not None
    query = call.query.clone()
    query[0, 1, 20] = torch.nan
    found = softmax_statistics(on_device(replace(call, query=query)))
    for name in NAMES:
        broken = getattr(found, name).isnan().cpu()
        assert broken[0, 1, 20], name
        assert broken.sum() == 1, name


def test_padding_may_hold_anything(tiles: Callable[[int, int], None]) -> None:
    call = LONG["key padding"]
    assert call.key is not None
    key = call.key.clone()
    key[:, :, :5] = torch.nan
    expected = softmax_statistics(on_device(call))
    found = softmax_statistics(on_device(replace(call, key=key)))
    assert torch.equal(found.entropy, expected.entropy)
    assert torch.equal(found.first_weight, expected.first_weight)


def test_the_same_bits_on_every_run(tiles: Callable[[int, int], None]) -> None:
    call = on_device(LONG["holes"])
    one, other = softmax_statistics(call), softmax_statistics(call)
    for name in NAMES:
        assert torch.equal(getattr(one, name), getattr(other, name))


def test_sampled_rows_are_picked(tiles: Callable[[int, int], None]) -> None:
    call = on_device(long(causal=True))
    index = torch.tensor([[2, 11, 30]], device=DEVICE)
    sample = RowSample(index, torch.ones(1, 3, device=DEVICE), torch.arange(3, device=DEVICE)[None])
    whole, some = softmax_statistics(call), softmax_statistics(replace(call, sample=sample))
    assert torch.equal(some.entropy, whole.entropy[:, :, [2, 11, 30]])
    assert torch.equal(some.sum_of_squares, whole.sum_of_squares[:, :, [2, 11, 30]])
    assert torch.equal(some.self_weight, whole.self_weight)  # of all rows


# --- what is asked for ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "bias", "rows that see nothing", "grouped"])
def test_weights_on_chosen_keys(name: str, tiles: Callable[[int, int], None]) -> None:
    call = LONG[name]
    chosen = torch.tensor([[0, 17, 36]])
    found = row_statistics(on_device(call), chosen.to(DEVICE)).chosen_weight
    expected = np.moveaxis(dense_pattern(call)[..., chosen[0].numpy()], -1, 0)
    assert found.shape == (3, *call.output.shape[:3])
    np.testing.assert_allclose(found.cpu().numpy(), expected, TOLERANCE, TOLERANCE)


def plane(tokens: int) -> Tensor:
    """Places of patches of 14 pixels, 6 to a row."""
    index = torch.arange(tokens)
    return torch.stack([index // 6, index % 6], 1) * 14.0


@pytest.mark.parametrize(
    ("name", "on_plane", "prefix"),
    [
        ("causal", False, 0),
        ("causal", True, 3),
        ("rows that see nothing", True, 0),
        ("rows that see nothing", False, 3),
    ],
)
def test_mean_distances(name: str, on_plane: bool, prefix: int, tiles: Callable[[int, int], None]) -> None:
    call = LONG[name]
    places = plane(37) if on_plane else None
    found = row_statistics(
        on_device(call),
        torch.zeros(1, 0, dtype=torch.long, device=DEVICE),
        distances=True,
        places=places,
        prefix=prefix,
    )
    index = np.arange(37.0)
    apart = np.abs(index[:, None] - index)
    if places is not None:
        apart = np.linalg.norm(places.numpy()[:, None] - places.numpy(), axis=-1)
    pattern = dense_pattern(call)[..., prefix:]
    mass = pattern.sum(-1)
    np.testing.assert_allclose(found.placed.cpu().numpy(), mass, TOLERANCE, TOLERANCE)
    for power, measured in ((1, found.distance), (2, found.distance_square)):
        expected = (pattern * apart[:, prefix:] ** power).sum(-1) / np.where(mass > 0, mass, 1)
        np.testing.assert_allclose(measured.cpu().numpy(), expected, 10 * TOLERANCE, 10 * TOLERANCE)
    assert (found.distance > 0).any()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("full", (16, 16)),
        ("causal", (32, 16)),
        ("causal", (16, 32)),
        ("bias", (32, 16)),
        ("rows that see nothing, causal", (16, 32)),
        ("head size 80", (32, 32)),
    ],
)
def test_received_attention(name: str, shape: tuple[int, int], tiles: Callable[[int, int], None]) -> None:
    """Column sums over the rows of two sets, and of rows by weight."""
    tiles(*shape)
    call = LONG[name]
    sees = torch.from_numpy(dense_visible(call).any(-1))
    some = torch.arange(37) > 9
    weights = torch.rand(37, generator=torch.Generator().manual_seed(0))
    givers = torch.stack([sees.float(), (sees & some).float(), sees * weights])
    moved = on_device(call)
    found = received(moved, softmax_statistics(moved).log_normaliser, givers.to(DEVICE))
    expected = np.einsum("sbhi,bhij->sbhj", givers.double().numpy(), dense_pattern(call))
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.cpu().numpy(), expected, 2 * TOLERANCE, 2 * TOLERANCE)


def test_rows_that_give_nothing_may_hold_anything(tiles: Callable[[int, int], None]) -> None:
    call = on_device(long())
    lse = softmax_statistics(call).log_normaliser
    givers = torch.ones(1, 1, 2, 37, device=DEVICE)
    givers[..., 4] = 0
    broken = lse.clone()
    broken[..., 4] = torch.nan
    assert torch.equal(received(call, broken, givers), received(call, lse, givers))


# --- who takes which call ---------------------------------------------------------------------------


def test_what_the_kernel_does_not_know_is_left_to_plain_pytorch() -> None:
    calls = {
        "float64": CASES["float64"],
        "pattern": CASES["full; pattern given"],
        "head size": make_call(dim=257),
        "trained": replace(make_call(), query=make_call().query.requires_grad_()),
    }
    assert triton_scores.supports(on_device(make_call()))
    for name, call in calls.items():
        assert not triton_scores.supports(on_device(call)), name
    with torch.no_grad():
        assert triton_scores.supports(on_device(calls["trained"]))


def test_offsets_beyond_32_bits_are_left_to_plain_pytorch() -> None:
    call = make_call(batch=1, heads=1, tokens=2, dim=4)
    far = torch.zeros(1).as_strided((1, 1, 2, 4), (0, 0, 0, 0))
    assert triton_scores.reach(call.query) == 7
    assert triton_scores.reach(far) == 0
    assert (
        triton_scores.reach(torch.empty(1, 1, 3, 4, device="meta").as_strided((1, 1, 3, 4), (1, 1, 9, 1)))
        == 21
    )


def test_the_fused_statistics_are_used_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    found = SoftmaxStatistics(*torch.zeros(5, 2, 4, 13))
    call = make_call()
    assert kernels.fused_statistics(call) is None  # on the CPU
    monkeypatch.setattr(softmax, "fused_statistics", lambda given: found if given is call else None)
    assert softmax.softmax_statistics(call) is found
    assert softmax.softmax_statistics(make_call()) is not found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_calls_on_cuda_take_the_fused_route() -> None:
    """Without a change of tiles, and long enough for several."""
    call = long(tokens=700, heads=4, kv_heads=2, dim=64, causal=True, dtype=torch.bfloat16)
    moved = on_device(call)
    fused = kernels.fused_statistics(moved)
    assert fused is not None
    taken, plain = softmax.softmax_statistics(moved), softmax.softmax_statistics(call)
    for name in NAMES:
        assert torch.equal(getattr(taken, name), getattr(fused, name))
        torch.testing.assert_close(getattr(fused, name).cpu(), getattr(plain, name), rtol=1e-4, atol=1e-4)
