"""The untrained null: twins with fresh weights beside a model, in a run folder and in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from attention_modules import Attention, Stack
from commands import Ended
from torch import nn

import diag
from diag.errors import UserError
from diag.measure.loop import measure
from diag.metrics.catalogue import OF_UNTRAINED, OVER_UNTRAINED
from diag.metrics.names import metric_names
from diag.metrics.nulls import NULL_METRICS
from diag.models import load
from diag.models.names.resolve import parse
from diag.models.untrained import reinitialised, untrained_twin
from diag.results.tables import read_layers, read_manifest, read_samples
from diag.run.plan import ProbePlan
from diag.run.processes import Share
from diag.run.run import run_probe, run_share
from diag.variants import variants_in

pytestmark = pytest.mark.usefixtures("undrawn")

Attnbias = Callable[..., Ended]
CPU: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
NAMES = ("cos_y_vself", "value_similarity", *NULL_METRICS)
OURS = [OF_UNTRAINED["cos_y_vself"], OVER_UNTRAINED, OF_UNTRAINED["value_similarity"]]
FILES = ("layers.csv", "heads.parquet", "samples.parquet")


def plan(**changes: Any) -> ProbePlan:
    given = {"models": ("demo:lm",), "texts": __file__, "limit": 40, "seq_len": 8, "layers": (0,)}
    return ProbePlan.checked(**(given | {"metrics": NAMES, "null": "untrained=2"} | changes))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diag.run.finish.draw", lambda *_: [])
        run_probe(plan(), folder)
    return folder


def test_rows_of_the_null_are_the_mean_of_twins_that_were_measured_alone(whole: Path) -> None:
    """Input by input, as `--random-init` with those seeds would give it."""
    samples = read_samples(whole)
    alone = []
    for seed in range(2):
        twin = untrained_twin(parse("demo:lm"), seed, {}, **CPU)
        tower = twin.tower("text")
        texts = diag.texts(__file__)
        some = [sample for sample, _ in zip(tower.samples(texts, 8), range(40), strict=False)]
        batches = list(measure(tower, some, metrics=NAMES[:2], layers=[0]))
        alone.append(np.concatenate([batch[0].values[0] for batch in batches], 1))  # [metric, input, head]
    for place, metric in enumerate(NAMES[:2]):
        rows = samples[samples["metric"] == OF_UNTRAINED[metric]].sort_values(["input_index", "head"])
        expected = np.mean([one[place] for one in alone], 0).ravel()
        np.testing.assert_allclose(rows["value"], expected, atol=1e-6)
    assert np.abs(alone[0] - alone[1]).max() > 1e-3  # the control: seeds differ
    wide = samples.pivot_table(index=["input_index", "head"], columns="metric", values="value", observed=True)
    left = wide["cos_y_vself"] - wide["cos_y_vself_untrained"]
    np.testing.assert_allclose(wide[OVER_UNTRAINED], left, atol=1e-12)


def test_the_model_keeps_its_numbers_and_the_folder_one_line(whole: Path, tmp_path: Path) -> None:
    run_probe(plan(null=None), tmp_path / "without")
    beside, alone = read_layers(whole), read_layers(tmp_path / "without")
    assert list(beside["metric"]) == [*alone["metric"], *OURS]
    assert beside["model"].unique().tolist() == ["demo:lm"]
    pd.testing.assert_frame_equal(beside[: len(alone)], alone)
    hashes = read_manifest(whole)["models"][0]["untrained"]
    assert len({*hashes, read_manifest(whole)["models"][0]["weights_sha256"]}) == 3


def test_processes_batches_and_shards_change_nothing(whole: Path, tmp_path: Path) -> None:
    """Two processes on shards of their own write the bytes of one; other batches give the same numbers."""
    folder = tmp_path / "shared"
    assert run_share(plan(), folder, Share(0, 2)) is None
    assert run_share(plan(), folder, Share(1, 2)) is not None
    assert all((folder / name).read_bytes() == (whole / name).read_bytes() for name in FILES)
    run_probe(plan(batch_size=20), tmp_path / "batches")  # and shards of 20 inputs
    ours, theirs = (
        read_samples(one).sort_values(["metric", "input_index", "head"])
        for one in (
            whole,
            tmp_path / "batches",
        )
    )
    np.testing.assert_allclose(ours["value"], theirs["value"], atol=1e-6)


def test_twins_are_measured_on_what_is_kept(tmp_path: Path) -> None:
    """Beyond --keep-samples a model has moments only; its twins are compared on the inputs that are kept."""
    run_probe(plan(keep_samples=5, metrics=NAMES[:2]), tmp_path / "run")
    counts = read_layers(tmp_path / "run").set_index("metric")["n"]
    assert counts["cos_y_vself"] == 40
    assert (counts[OURS] == 5).all()


def test_what_training_changed_in_attention_is_architecture() -> None:
    trained = load(parse("demo:grid-p16-xsa"), **CPU)
    changed = variants_in(trained.module)
    twin = untrained_twin(parse("demo:grid-p16-xsa"), 0, changed, **CPU)
    assert variants_in(twin.module) == changed
    assert changed


def test_random_weights_follow_from_their_seed() -> None:
    torch.manual_seed(5)
    before = torch.rand(1)
    hashes = [
        untrained_twin(parse("demo:vit-p16"), seed, {}, **CPU).facts["weights_sha256"] for seed in (0, 1, 0)
    ]
    assert hashes[0] == hashes[2] != hashes[1]
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), before)  # and nobody else's draws do


def test_a_twin_that_is_not_finite_is_told_apart_from_the_model() -> None:
    class Wide(nn.Linear):
        def reset_parameters(self) -> None:
            nn.init.constant_(self.weight, 1e30)
            nn.init.zeros_(self.bias)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = Wide(8, 24)
            nn.init.normal_(self.qkv.weight)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return nn.functional.scaled_dot_product_attention(*(part[:, None] for part in (q, k, v)))

    torch.manual_seed(0)
    with pytest.raises(UserError, match=r"the untrained twin \(seed 0\), not the model"):
        diag.probe(Own().eval(), [torch.randn(2, 5, 8)], metrics=["cos_y_vself"], null="untrained=1")


@pytest.mark.parametrize(
    ("changes", "said", "tip"),
    [
        (
            {"null": "trained"},
            "--null is untrained, or untrained=N, N seeds from 1 to 16",
            "given: 'trained'",
        ),
        ({"null": "untrained=0"}, "--null is untrained, or untrained=N", "given: 'untrained=0'"),
        ({"null": "untrained="}, "--null is untrained, or untrained=N", "given: 'untrained='"),
        ({"null": "untrained", "random_init": True}, "compares with random weights", "leave one of them out"),
        ({"null": "untrained", "keep_samples": 0}, "keeps none", "--keep-samples 64"),
        ({"null": "untrained", "metrics": ("entropy",)}, "none is measured", "name one with --metrics"),
        ({"metrics": (OVER_UNTRAINED,)}, "is of another model, beside this one", "--null untrained"),
        ({"metrics": ("untrained",)}, "is of another model, beside this one", "--null untrained"),
    ],
)
def test_nulls_of_nothing_are_refused(changes: dict[str, Any], said: str, tip: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        run_probe(plan(**({"null": None} | changes)), tmp_path / "run")
    assert error.value.tip is not None
    assert tip in error.value.tip
    assert not (tmp_path / "run").exists()


def test_a_plan_without_a_null_keeps_its_key() -> None:
    """What was measured by an earlier version of the same number is found again."""
    assert plan(null="untrained").null == "untrained=3"
    assert plan(null="untrained").key({}) == plan(null="untrained=3").key({})
    assert plan(null=None).key({}) != plan().key({})
    assert metric_names(["nulls"]) == [*NULL_METRICS]


# --- own modules


BATCHES = [torch.randn(3, 9, 16, generator=torch.Generator().manual_seed(0))]


def test_a_module_of_ones_own_is_initialised_by_its_own_parts() -> None:
    module = Stack(Attention(4), Attention(4)).eval()
    found = diag.probe(module, iter(BATCHES), null="untrained=2", metrics=["cos_y_vself"])
    wide = found.samples.pivot_table(index=["layer", "input", "head"], columns="metric", values="value")
    twins = [diag.probe(reinitialised(module, seed), BATCHES, metrics=["cos_y_vself"]) for seed in range(2)]
    for twin in twins:
        assert twin.layers["mean"].ne(found.layers["mean"].iloc[0]).all()
    expected = np.mean(
        [twin.samples.set_index(["layer", "input", "head"])["value"].sort_index() for twin in twins], axis=0
    )
    np.testing.assert_allclose(wide["cos_y_vself_untrained"], expected, atol=1e-6)
    np.testing.assert_allclose(
        wide[OVER_UNTRAINED], wide["cos_y_vself"] - wide["cos_y_vself_untrained"], atol=1e-12
    )


def test_a_named_model_in_memory_has_its_twins_too() -> None:
    found = diag.probe("demo:vit-p16", "demo", null="untrained=1", metrics=["cos_y_vself"], limit=2)
    assert set(found.layers["metric"]) == {"cos_y_vself", "cos_y_vself_untrained", OVER_UNTRAINED}


class WithToken(nn.Module):
    """Holds a parameter that nothing sets."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.token = Stack(Attention(4)), nn.Parameter(torch.zeros(1, 1, 16))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x + self.token)


class Begun(WithToken):
    """Says how its token begins."""

    def init_weights(self) -> None:
        nn.init.normal_(self.token)


def test_a_parameter_whose_beginning_nobody_knows_is_named() -> None:
    module = WithToken().eval()
    before = {name: x.clone() for name, x in module.state_dict().items()}
    with pytest.raises(UserError, match="how 'token' of WithToken begins is not known") as error:
        diag.probe(module, BATCHES, null="untrained", metrics=["cos_y_vself"])
    assert error.value.tip is not None
    assert "reset_parameters() that sets every parameter" in error.value.tip
    assert all(
        torch.equal(x, before[name]) for name, x in module.state_dict().items()
    )  # its own are untouched
    twin = reinitialised(Begun().eval(), 0)
    assert all(x.isfinite().all() for x in twin.parameters())
    assert not twin.training


def test_transformers_begin_as_their_library_has_it() -> None:
    """Not as PyTorch's layers would alone: what is marked as initialised is initialised again."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, vocab_size=50, initializer_range=0.5)
    module = transformers.AutoModel.from_config(config).eval()
    twin = reinitialised(nn.Sequential(module).eval(), 0)[0]
    weights = [one.layers[0].self_attn.q_proj.weight for one in (module, twin)]
    assert not torch.equal(*weights)
    assert [float(weight.detach().std()) for weight in weights] == pytest.approx([0.5, 0.5], rel=0.1)
    plain = reinitialised(nn.TransformerEncoderLayer(16, 2, batch_first=True).eval(), 0)
    assert all(x.isfinite().all() for x in plain.parameters())
