"""Every stream metric against a dense float64 reference, hand-made streams, and transformer-lens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from commands import Ended, probe_of
from PIL import Image
from reference import make_call
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from diag.attention.call import AttentionCall
from diag.attention.states import BlockStates, Updates
from diag.measure.loop import measure
from diag.metrics.catalogue import CATALOGUE
from diag.metrics.readings import reduce
from diag.metrics.registry import registered
from diag.metrics.secondary_sinks import alike_first, secondary_sink_lives
from diag.metrics.stream import STREAM_METRICS, Stream, StreamReadings
from diag.models.base import Batch, Sample
from diag.models.families import transformer_lens as lens
from diag.models.families.demo import build_vit
from diag.models.families.timm.load import vision_model
from diag.models.hooks.block_parts import find_blocks
from diag.models.hooks.layers import attention_modules
from diag.models.hooks.residual import check_states, projection_error, stream_states
from diag.models.hooks.seam import attention_calls
from diag.models.names.resolve import parse
from diag.models.names.spec import ModelSpec

WITHIN = [name for name, metric in STREAM_METRICS.items() if metric.reads == "block"]
TOLERANCE = dict.fromkeys(WITHIN, 1e-5)


# --- the reference ------------------------------------------------------------------------------------


def per_input(
    states: BlockStates, names: Sequence[str] = tuple(registered("block")), tokens: Tensor | None = None
) -> dict[str, Tensor]:
    """The named metrics of one block (all that need no other layer), one number per input."""
    on, of = Stream(states, tokens), STREAM_METRICS
    return {name: reduce([of[name].compute(on)], states.batch, of[name].reduce)[:, 0] for name in names}


def cos(a: np.ndarray, b: np.ndarray) -> float:
    norms = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norms if norms else 0.0


def reference(states: BlockStates, tokens: Tensor, weight: Tensor) -> dict[str, np.ndarray]:
    """Every metric of one block, one token at a time in float64; `weight` is W_O."""
    names = ("before", "attention_update", "middle", "mlp_update", "after")
    arrays = {name: getattr(states, name).double().numpy() for name in names}
    call = states.call
    assert call is not None
    value = call.value.double().repeat_interleave(call.group, 1).numpy()
    output, matrix = call.output.double().numpy(), weight.double().numpy()
    found: dict[str, list[float]] = {name: [] for name in WITHIN}
    for b in range(states.batch):
        x = {name: array[b] for name, array in arrays.items()}
        counted = [t for t in range(states.tokens) if tokens.expand(states.batch, -1)[b, t]]
        rows: dict[str, list[float]] = {name: [] for name in WITHIN}
        for t in counted:
            first, middle = (
                cos(x["attention_update"][t], x["before"][t]),
                cos(x["mlp_update"][t], x["middle"][t]),
            )
            rows["attention_stream_cosine"].append(first)
            rows["attention_stream_energy"].append(first**2)
            rows["mlp_stream_cosine"].append(middle)
            rows["mlp_stream_energy"].append(middle**2)
            for name, update, stream in (
                ("attention_update_ratio", "attention_update", "before"),
                ("mlp_update_ratio", "mlp_update", "middle"),
            ):
                below = np.linalg.norm(x[stream][t])
                if below:
                    rows[name].append(float(np.linalg.norm(x[update][t]) / below))
            into_stream = [matrix @ np.concatenate(list(heads[b, :, t])) for heads in (value, output)]
            rows["value_stream_cosine"].append(cos(into_stream[0], x["before"][t]))
            seen = int(call.visibility.count.expand(states.batch, 1, -1)[b, 0, t])
            if seen > 1:
                rows["output_value_cosine"].append(cos(into_stream[1], into_stream[0]))
            rows["block_influence"].append(1 - cos(x["before"][t], x["after"][t]))
            if states.previous is not None:
                earlier = [p[b].double().numpy() for p in (states.previous.attention, states.previous.block)]
                rows["update_cosine_previous"].append(cos(x["attention_update"][t], earlier[0][t]))
                rows["delta_cosine_previous"].append(cos(x["after"][t] - x["before"][t], earlier[1][t]))
        after = x["after"][counted]
        if len(counted) > 1:
            pairs = [cos(after[i], after[j]) for i in range(len(after)) for j in range(len(after)) if i != j]
            rows["token_similarity"].append(float(np.mean(pairs)))
            whole = np.linalg.norm(after)
            if whole:
                rows["token_distance"].append(float(np.linalg.norm(after - after.mean(0)) / whole))
        if len(counted):
            magnitudes = np.sort(np.abs(after).ravel())
            middle_one = magnitudes[(len(magnitudes) - 1) // 2]
            if middle_one:
                rows["massive_activation"].append(float(magnitudes[-1] / middle_one))
        for name in WITHIN:
            found[name].append(float(np.mean(rows[name])) if rows[name] else math.nan)
    return {name: np.array(numbers) for name, numbers in found.items()}


WEIGHT = torch.randn(24, 32, generator=torch.Generator().manual_seed(5))


def project(heads: Tensor) -> Tensor:
    return heads.transpose(1, 2).flatten(2).float() @ WEIGHT.T


def make_states(
    batch: int = 2,
    tokens: int = 9,
    *,
    causal: bool = True,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
) -> BlockStates:
    """Random states with a common direction, so that no cosine is trivially near zero."""
    generator = torch.Generator().manual_seed(batch * 100 + tokens)

    def draw(scale: float = 1.0) -> Tensor:
        shared = torch.randn(24, generator=generator)
        return ((torch.randn(batch, tokens, 24, generator=generator) + shared) * scale).to(dtype)

    call = make_call(
        batch=batch, heads=4, kv_heads=kv_heads, tokens=tokens, dim=8, causal=causal, dtype=dtype, seed=1
    )
    return BlockStates(
        3, "blocks.3.attn", "pre-norm", draw(3), draw(), draw(3), draw(0.5), draw(3),
        call, project, None, Updates(draw(), draw()),
    )  # fmt: skip


def assert_matches(
    states: BlockStates, tokens: Tensor | None = None, tolerance: Mapping[str, float] = TOLERANCE
) -> dict[str, Tensor]:
    among = torch.ones(1, states.tokens, dtype=torch.bool) if tokens is None else tokens
    if states.real is not None:
        among = among & states.real
    measured = per_input(states, tokens=tokens)
    assert list(measured) == WITHIN
    for name, expected in reference(states, among, WEIGHT).items():
        assert measured[name].dtype == torch.float64
        assert measured[name].shape == (states.batch,)
        np.testing.assert_allclose(
            measured[name], expected, rtol=tolerance[name], atol=tolerance[name], err_msg=name
        )
    return measured


# --- against the reference ----------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_metrics_match_the_reference(causal: bool, kv_heads: int) -> None:
    measured = assert_matches(make_states(causal=causal, kv_heads=kv_heads))
    for name, numbers in measured.items():
        assert numbers.isfinite().all(), name
        assert numbers.abs().min() > 1e-3, f"{name} is trivially zero here"


@pytest.mark.parametrize("subset", ["prefix dropped", "every other", "one each", "none", "differs"])
def test_token_sets_match_the_reference(subset: str) -> None:
    position = torch.arange(9)
    tokens = {
        "prefix dropped": position[None] >= 2,
        "every other": position[None] % 2 == 0,
        "one each": torch.stack([position == 3, position == 8]),
        "none": torch.zeros(1, 9, dtype=torch.bool),
        "differs": torch.stack([position < 4, position >= 4]),
    }[subset]
    assert_matches(make_states(), tokens)


def test_padding_never_counts_whatever_it_holds() -> None:
    real = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    plain = make_states()
    states = replace(plain, real=real)
    expected = assert_matches(states)
    for junk in (torch.nan, torch.inf, 1e30):
        filled = {
            name: getattr(states, name).masked_fill(~real[..., None], junk)
            for name in ("before", "attention_update", "middle", "mlp_update", "after")
        }
        measured = per_input(replace(states, **filled))
        for name in WITHIN:
            assert torch.equal(measured[name], expected[name]), (name, junk)
    assert not torch.equal(expected["token_similarity"], per_input(plain)["token_similarity"])


def test_padding_of_the_attention_mask_counts_as_padding() -> None:
    real = torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    states = make_states(causal=False)
    masked = replace(states, call=replace(states.call, mask=real[:, None, None]))
    measured, expected = per_input(masked), per_input(replace(states, real=real))
    for name in WITHIN:
        torch.testing.assert_close(measured[name], expected[name])


def test_one_token_alone() -> None:
    measured = assert_matches(make_states(tokens=1))
    pairs = {"token_similarity", "token_distance", "output_value_cosine"}
    for name, numbers in measured.items():
        assert bool(numbers.isnan().all()) == (name in pairs), name


def test_zero_vectors_have_no_direction() -> None:
    states = make_states()
    zeroed = {
        name: getattr(states, name).masked_fill(torch.arange(9)[:, None] % 3 == 0, 0.0)
        for name in ("before", "attention_update", "middle", "mlp_update", "after")
    }
    assert_matches(replace(states, **zeroed))
    nothing = {name: torch.zeros_like(getattr(states, name)) for name in zeroed}
    measured = assert_matches(replace(states, **nothing))
    assert (measured["attention_stream_cosine"] == 0).all()
    assert (measured["block_influence"] == 1).all()
    for name in ("attention_update_ratio", "mlp_update_ratio", "token_distance", "massive_activation"):
        assert measured[name].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_formats_are_read_in_float32(dtype: torch.dtype) -> None:
    """The reference reads the very same rounded numbers, so that only the arithmetic differs."""
    assert_matches(make_states(dtype=dtype))


def test_values_that_are_not_finite_do_not_vanish() -> None:
    states = make_states()
    broken = states.after.clone()
    broken[0, 4, 3] = torch.inf
    for name in ("block_influence", "token_similarity", "token_distance", "massive_activation"):
        assert per_input(replace(states, after=broken), [name])[name][0].isinf(), name


def test_what_is_not_known_is_undefined_not_zero() -> None:
    states = make_states()
    for changed in (
        replace(states, call=None),
        replace(states, to_stream=None),
        replace(states, call=make_call(batch=4, heads=4, tokens=9, dim=8)),  # windows in the batch
    ):
        measured = per_input(changed, ["value_stream_cosine", "output_value_cosine", "block_influence"])
        assert measured["value_stream_cosine"].isnan().all()
        assert measured["output_value_cosine"].isnan().all()
        assert measured["block_influence"].isfinite().all()
    measured = per_input(replace(states, previous=None))
    assert measured["update_cosine_previous"].isnan().all()
    assert measured["delta_cosine_previous"].isnan().all()


# --- hand-made streams --------------------------------------------------------------------------------


def test_an_update_along_the_stream_is_all_redundant() -> None:
    states = make_states()
    states = replace(states, attention_update=2 * states.before, mlp_update=-0.5 * states.middle)
    measured = per_input(states)
    for name, expected in {
        "attention_stream_cosine": 1.0,
        "attention_stream_energy": 1.0,
        "attention_update_ratio": 2.0,
        "mlp_stream_cosine": -1.0,
        "mlp_stream_energy": 1.0,
        "mlp_update_ratio": 0.5,
    }.items():
        np.testing.assert_allclose(measured[name], expected, rtol=1e-6, err_msg=name)


def test_block_influence_keeps_its_digits() -> None:
    """1 - cos in float32 would be 0 or a multiple of 6e-8."""
    states = make_states()
    sideways = torch.zeros_like(states.before)
    sideways[..., 0], sideways[..., 1] = -states.before[..., 1], states.before[..., 0]
    flat = torch.zeros_like(states.before)
    flat[..., :2] = states.before[..., :2]
    angle = 1e-4
    measured = per_input(replace(states, before=flat, after=flat + angle * sideways), ["block_influence"])
    np.testing.assert_allclose(measured["block_influence"], angle**2 / 2, rtol=1e-2)


def test_similarity_and_distance_of_extreme_streams() -> None:
    states = make_states()
    same = states.after[:, :1].expand(-1, 9, -1)
    measured = per_input(replace(states, after=same))
    np.testing.assert_allclose(measured["token_similarity"], 1, rtol=1e-6)
    np.testing.assert_allclose(measured["token_distance"], 0, atol=1e-6)
    apart = torch.eye(9, 24).expand(2, -1, -1)
    measured = per_input(replace(states, after=apart))
    np.testing.assert_allclose(measured["token_similarity"], 0, atol=1e-7)
    np.testing.assert_allclose(measured["token_distance"], math.sqrt(8 / 9), rtol=1e-6)


def test_a_massive_activation_is_told() -> None:
    states = make_states()
    after = torch.ones_like(states.after)
    after[1, 4, 7] = -500
    measured = per_input(replace(states, after=after), ["massive_activation"])["massive_activation"]
    assert measured.tolist() == [1, 500]
    dropped = per_input(replace(states, after=after), ["massive_activation"], torch.arange(9)[None] != 4)
    assert dropped["massive_activation"].tolist() == [1, 1]


def test_readings_have_the_shape_that_reduce_takes() -> None:
    on = Stream(make_states())
    for name in WITHIN:
        reduced = reduce([STREAM_METRICS[name].compute(on)], 2, STREAM_METRICS[name].reduce)
        assert reduced.shape == (2, 1), name


def test_every_metric_says_what_it_is() -> None:
    for name in STREAM_METRICS:
        assert CATALOGUE[name].definition, name
        assert "\n" not in CATALOGUE[name].definition, name
        assert CATALOGUE[name].source, name
        assert CATALOGUE[name].unit, name


# --- several layers -----------------------------------------------------------------------------------


def test_a_layer_is_compared_with_the_one_before() -> None:
    first = replace(make_states(), layer=0, previous=None)
    second = replace(make_states(tokens=9), layer=1, previous=None, attention_update=-first.attention_update)
    later = replace(second, layer=5)
    collected = StreamReadings(["update_cosine_previous", "delta_cosine_previous"], depth=8)
    everything = {"all": torch.ones(1, 9, dtype=torch.bool)}
    for states in (first, second, later):
        collected.add(states, everything)
    found = collected.finished()

    def of(layer: int, name: str) -> list[float]:
        return reduce([found[layer]["all"][name]], 2, "mean")[:, 0].tolist()

    assert all(math.isnan(value) for value in of(0, "update_cosine_previous"))
    np.testing.assert_allclose(of(1, "update_cosine_previous"), -1, rtol=1e-6)
    np.testing.assert_allclose(of(1, "delta_cosine_previous"), 1, rtol=1e-6)
    # layer 5 does not follow layer 1
    assert all(math.isnan(value) for value in of(5, "delta_cosine_previous"))


def test_a_stage_of_another_shape_is_not_compared() -> None:
    collected = StreamReadings(["delta_cosine_previous"], depth=2)
    collected.add(replace(make_states(tokens=9), layer=0, previous=None), {"all": torch.ones(1, 9).bool()})
    collected.add(replace(make_states(tokens=4), layer=1, previous=None), {"all": torch.ones(1, 4).bool()})
    reading = collected.finished()[1]["all"]["delta_cosine_previous"]
    assert reduce([reading], 2, "mean").isnan().all()


def sink_states(layers: int, lives: Mapping[int, range], depth_of_first: range) -> list[BlockStates]:
    """Blocks in which token t points where the first one points in the layers `lives[t]`, else elsewhere."""
    found = []
    for layer in range(layers):
        after = torch.eye(9, 24).expand(2, -1, -1).clone()
        after[:, 0, 0] = 50 if layer in depth_of_first else 1
        for token, life in lives.items():
            if layer in life:
                after[:, token] = 0
                after[:, token, 0], after[:, token, token] = -3, 0.5
        found.append(replace(make_states(), layer=layer, after=after, previous=None, real=None))
    return found


def sinks_of(states: list[BlockStates], depth: int, tokens: Tensor | None = None) -> dict[str, np.ndarray]:
    names = ["secondary_sinks", "secondary_sink_lifetime", "block_influence"]
    collected = StreamReadings(names, depth)
    for one in states:
        collected.add(one, {"all": torch.ones(1, 9, dtype=torch.bool) if tokens is None else tokens})
    found = collected.finished()
    return {
        name: np.stack([reduce([found[one.layer]["all"][name]], 2, "mean")[:, 0].numpy() for one in states])
        for name in names
    }


def test_secondary_sinks_are_counted_where_they_begin() -> None:
    # the first token stands in layers 2 to 16 of 20; token 8 points there only after it has fallen
    lives = {3: range(5, 9), 4: range(5, 11), 6: range(10, 11), 7: range(0, 20), 8: range(17, 20)}
    states = sink_states(20, lives, range(2, 17))
    found = sinks_of(states, 20)
    expected = np.zeros((20, 2))
    expected[5] = 2  # tokens 3 and 4; 6 is noise, 7 stands as long as the first one
    np.testing.assert_array_equal(found["secondary_sinks"], expected)
    lifetime = found["secondary_sink_lifetime"]
    np.testing.assert_allclose(lifetime[5], (4 / 20 + 6 / 20) / 2)
    assert np.isnan(np.delete(lifetime, 5, 0)).all()
    only = torch.arange(9)[None] == 4
    assert sinks_of(states, 20, only)["secondary_sinks"][5].tolist() == [1, 1]
    np.testing.assert_allclose(sinks_of(states, 20, only)["secondary_sink_lifetime"][5], 6 / 20)


def test_secondary_sinks_need_every_layer() -> None:
    states = sink_states(20, {3: range(5, 9)}, range(2, 17))
    for some in (states[:10], states[:4] + states[5:]):
        found = sinks_of(some, 20)
        assert np.isnan(found["secondary_sinks"]).all()
        assert np.isnan(found["secondary_sink_lifetime"]).all()
        assert np.isfinite(found["block_influence"]).all()


def published(alike: np.ndarray, norms: np.ndarray) -> dict[int, list[int]]:
    """The rule as the code of 2512.22213 has it: token -> layers, for one input."""
    step = norms[1:] - norms[:-1]
    start = int(np.argmax(step)) + 1
    end = int(np.argmin(step[start:])) + start + 1 if start < len(step) else len(norms)
    found: dict[int, list[int]] = {}
    for layer in range(start, end):
        for token in np.flatnonzero(alike[layer]):
            found.setdefault(int(token), []).append(layer)
    depth = len(norms)
    return {token: layers for token, layers in found.items() if 4 < len(layers) < depth - 15}


def test_at_40_layers_the_rule_is_the_published_one() -> None:
    generator = torch.Generator().manual_seed(0)
    alike = torch.rand(40, 3, 30, generator=generator) < torch.rand(3, 30, generator=generator)
    norms = torch.rand(40, 3, generator=generator)
    norms[4:36] += 10
    norms[36:] *= 0.1
    created, lifetime = secondary_sink_lives(alike, norms)
    total = 0
    for b in range(3):
        expected = published(alike[:, b].numpy(), norms[:, b].numpy())
        total += len(expected)
        where = {int(token): int(layer) for layer, token in created[:, b].nonzero()}
        assert where == {token: layers[0] for token, layers in expected.items()}
        for token, layers in expected.items():
            assert lifetime[b, token].item() == pytest.approx(len(layers) / 40)
    assert total > 10


def test_the_first_real_token_is_the_measure() -> None:
    states = torch.randn(2, 6, 8)
    states[0, 4], states[1, 5] = -2 * states[0, 0], 3 * states[1, 2]
    states[1, :2] = torch.nan
    real = torch.tensor([[True] * 6, [False] * 2 + [True] * 4])
    alike, norm = alike_first(states, real)
    assert alike.nonzero().tolist() == [[0, 4], [1, 5]]
    torch.testing.assert_close(norm, torch.stack([states[0, 0].norm(), states[1, 2].norm()]))
    assert not alike_first(torch.zeros(1, 6, 8), torch.ones(1, 6, dtype=torch.bool))[0].any()


# --- another library's numbers ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints with a tokenizer of words, for transformer-lens."""

    def save(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        tokens = {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
        sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4}
        sizes |= {"intermediate_size": 48, "max_position_embeddings": 24}
        model: nn.Module
        if kind == "gpt2":
            small = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 24}
            model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, **tokens))
        elif kind == "llama":
            config = transformers.LlamaConfig(**sizes, **tokens, num_key_value_heads=2)
            model = transformers.LlamaForCausalLM(config)
        else:
            config = transformers.GPTNeoXConfig(**sizes, **tokens, use_parallel_residual=kind == "neox")
            model = transformers.GPTNeoXForCausalLM(config)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=0.8 if name.endswith("weight") else 0, std=0.2)
            else:
                torch.nn.init.normal_(parameter, std=0.15)
        model.save_pretrained(folder)
        words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w0"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, bos_token="w0", eos_token="w1", pad_token="w1"
        ).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("kind", ["gpt2", "neox", "neox-sequential", "llama"])
def test_the_stream_is_that_of_transformer_lens(kind: str, folder_of: Callable[[str], Path]) -> None:
    """`hook_resid_pre`, `hook_attn_out`, `hook_resid_mid`, `hook_mlp_out`, `hook_resid_post`."""
    folder, ids = folder_of(kind), torch.randint(2, 60, (2, 9))
    ours = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    states: list[BlockStates] = []
    blocks = find_blocks(ours, attention_modules(ours))
    with torch.no_grad(), stream_states(blocks, states.append):
        ours(input_ids=ids, use_cache=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    bridge = TransformerBridge.boot_transformers(str(folder), device="cpu", tokenizer=tokenizer)
    names = {
        "before": "hook_resid_pre",
        "attention_update": "hook_attn_out",
        "middle": "hook_resid_mid",
        "mlp_update": "hook_mlp_out",
        "after": "hook_resid_post",
    }
    if kind == "neox":
        del names["middle"]  # a parallel block has none
    with torch.no_grad():
        _, cache = bridge.eval().run_with_cache(ids)
    for layer, s in enumerate(states):
        for name, hook in names.items():
            other = cache[f"blocks.{layer}.{hook}"]
            torch.testing.assert_close(getattr(s, name), other, rtol=1e-5, atol=1e-5)
            assert other.abs().mean() > 0.05, f"{name} of nothing would prove nothing"


@pytest.mark.parametrize("kind", ["gpt2", "neox"])
def test_the_bridge_of_transformer_lens_has_blocks_too(kind: str, folder_of: Callable[[str], Path]) -> None:
    model = lens.load(parse(f"tl:{folder_of(kind)}"), device="cpu", dtype=torch.float32)
    tower = model.tower("text")
    blocks = find_blocks(model.module, tower.layers)
    states: list[BlockStates] = []
    calls: list[AttentionCall] = []
    with torch.no_grad(), tower.capture(tower.layers, calls.append), stream_states(blocks, states.append):
        tower.forward(Batch(("a", "b"), torch.randint(2, 60, (2, 9))))
    for block, s, call in zip(blocks, states, calls, strict=True):
        check_states(block, s)
        assert projection_error(block, replace(s, call=call)) < 1e-5


# --- a model, from end to end ---------------------------------------------------------------------------


def test_a_model_of_two_layers_is_read_through_both_seams() -> None:
    """Calls and states meet: what the loop does, with a layer's call kept until its block has finished."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaModel._from_config(config, attn_implementation="sdpa").eval()
    layers = attention_modules(model)
    blocks = find_blocks(model, layers)
    pending: dict[int, AttentionCall] = {}
    collected = StreamReadings(list(STREAM_METRICS), depth=2)

    def on_block(states: BlockStates) -> None:
        collected.add(replace(states, call=pending.pop(states.layer)), {"all": torch.ones(1, 9).bool()})

    with (
        torch.inference_mode(),
        attention_calls(layers, lambda call: pending.update({call.layer: call})),
        stream_states(blocks, on_block),
    ):
        model(input_ids=torch.randint(2, 50, (3, 9)))
    assert not pending
    found = collected.finished()
    assert list(found) == [0, 1]
    numbers = {
        (layer, name): reduce([found[layer]["all"][name]], 3, "mean")[:, 0]
        for layer in found
        for name in STREAM_METRICS
    }
    first = {"update_cosine_previous", "delta_cosine_previous"}
    for (layer, name), values in numbers.items():
        missing = (name in first and layer == 0) or name == "secondary_sink_lifetime"
        assert bool(values.isnan().all()) == missing, (layer, name)


def pixels_of(image: Image.Image) -> Tensor:
    """`[3, 64, 64]`"""
    return torch.from_numpy(np.array(image.resize((64, 64)), np.float32)).permute(2, 0, 1)


def test_the_loop_gives_the_numbers_of_the_functions() -> None:
    """Batches, token sets and heads: what `measure` yields is what `per_input` says of the same states."""
    torch.manual_seed(0)
    module = build_vit(16).eval()
    model = vision_model(
        ModelSpec("x", "timm", "x"), module, pixels_of, preprocessing={"size": (64, 64)},
        device="cpu", dtype=torch.float32,
    )  # fmt: skip
    tower = model.tower("vision")
    images = torch.randn(5, 3, 64, 64)
    tower = replace(
        tower, encode=lambda chunk: Batch(tuple(s.id for s in chunk), torch.stack([s.read() for s in chunk]))
    )
    samples = [Sample(str(i), lambda i=i: images[i]) for i in range(5)]  # type: ignore[misc]
    blocks, names = find_blocks(module, tower.layers), ["cos_y_vself", *STREAM_METRICS]
    sets = ["patch", "cls"]
    batches = list(measure(tower, samples, metrics=names, token_sets=sets, blocks=blocks, batch_size=3))
    calls: list[AttentionCall] = []
    states: list[BlockStates] = []
    with (
        torch.inference_mode(),
        attention_calls(tower.layers, calls.append),
        stream_states(blocks, states.append),
    ):
        module(images)
    for layer in range(6):
        of_layer = [
            [part for part in batch if part.layer == layer and not part.of_heads] for batch in batches
        ]
        values = np.concatenate([part.values for (part,) in of_layer], axis=2)
        assert values.shape == (2, len(STREAM_METRICS), 5, 1)
        for number, token_set in enumerate(sets):
            expected = per_input(
                replace(states[layer], call=calls[layer]), WITHIN, tower.tokens_in(token_set, 17)[None]
            )
            for place, name in enumerate(STREAM_METRICS):
                if name in WITHIN and not name.endswith("previous"):
                    np.testing.assert_allclose(
                        values[number, place, :, 0], expected[name], rtol=2e-5, atol=2e-6, err_msg=name
                    )
    of_heads = [part for part in batches[0] if part.of_heads]
    assert {part.metrics for part in of_heads} == {("cos_y_vself",)}
    assert [part.values.shape for part in of_heads] == [(2, 1, 3, 3)] * 6


def test_numbers_of_layers_are_in_the_tables_of_layers_only(attnbias: Callable[..., Ended]) -> None:
    ended = attnbias(
        "probe", "-m", "demo:lm", "--texts", "demo", "--limit", 2, "--metrics", "stream,entropy", "-o", "run"
    )
    assert ended.code == 0
    layers, heads = pd.read_csv("run/layers.csv"), pd.read_parquet("run/heads.parquet")
    assert set(layers["metric"]) == {*STREAM_METRICS, "entropy"}
    assert set(heads["metric"]) == {"entropy"}
    samples = pd.read_parquet("run/samples.parquet")
    assert set(samples.loc[samples["metric"] == "block_influence", "head"]) == {-1}
    assert layers.loc[layers["metric"] == "block_influence", "n"].tolist() == [2] * 6


def test_a_run_of_stream_metrics_alone(attnbias: Callable[..., Ended]) -> None:
    ended = attnbias(*probe_of("block_influence", limit=2))
    assert ended.code == 0
    assert "BI" in ended.out
    assert len(pd.read_csv("run/layers.csv")) == 6
    assert pd.read_parquet("run/heads.parquet").empty
