"""Entropy per image against the images: correlations by hand, intervals by brute force, a real run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import rankdata, spearmanr

from diag.errors import UserError
from diag.inputs.complexity import MEASURES, complexity_of
from diag.inputs.images import images
from diag.results.bootstrap import drawn
from diag.results.correlation import ranks
from diag.run.api import probe
from diag.show.figures.complexity import complexity_figure
from diag.studies.attend import against_complexity
from diag.studies.attend.complexity import correlation


def test_ranks_of_resamples_are_those_of_the_values_written_out() -> None:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 4, 9).astype(float)
    counts = drawn(9, 1, 20)
    found = ranks(np.broadcast_to(values, counts.shape), counts.astype(float))
    for row, count in zip(found, counts, strict=True):
        expected = rankdata(np.repeat(values, count))
        np.testing.assert_allclose(np.repeat(row, count), expected)


def test_an_interval_is_that_of_resampled_images() -> None:
    generator = np.random.default_rng(3)
    part = pd.DataFrame({"value": generator.normal(size=14)})
    part["edge_density"] = part["value"] + generator.normal(size=14)
    found = correlation(part, "edge_density", seed=5)
    assert found["rho"] == pytest.approx(spearmanr(part["value"], part["edge_density"]).statistic)
    again = [
        spearmanr(*(np.repeat(part[name], count) for name in ("value", "edge_density"))).statistic
        for count in drawn(14, 5)
    ]
    np.testing.assert_allclose((found["ci_low"], found["ci_high"]), np.quantile(again, (0.025, 0.975)))
    part["edge_density"] = -part["value"]
    assert [correlation(part, "edge_density", 0)[name] for name in ("rho", "ci_low", "ci_high")] == [
        -1,
        -1,
        -1,
    ]


def test_a_probe_of_the_photographs() -> None:
    given = images("demo")
    run = probe("demo:vit-p16", given, limit=8, metrics=["entropy", "self_weight"])
    found = against_complexity(run, given)
    assert len(found.correlations) == 6 * len(MEASURES)
    assert set(found.correlations["n"]) == {8}
    read = {item.id: complexity_of(item.read()) for item in list(given)[:8]}
    for layer in (0, 5):
        rows = run.samples[(run.samples["metric"] == "entropy") & (run.samples["layer"] == layer)]
        per_image = rows.groupby("input", observed=True)["value"].mean()
        for measure in MEASURES:
            expected = spearmanr(per_image, [read[name][measure] for name in per_image.index]).statistic
            lines = found.correlations
            line = lines[(lines["layer"] == layer) & (lines["measure"] == measure)].iloc[0]
            assert line["rho"] == pytest.approx(expected)
            assert line["ci_low"] <= line["rho"] <= line["ci_high"]
    figure = complexity_figure(found.points, found.correlations, layer=5)
    axes = figure.subfigs[0].axes
    assert [len(ax.lines[0].get_xdata()) for ax in axes[:2]] == [8, 8]
    with pytest.raises(UserError, match="3 of the run's 8 images are among those given"):
        against_complexity(run, list(given)[:3])
    with pytest.raises(UserError, match="holds no 'effective_keys' of single inputs"):
        against_complexity(run, given, "effective_keys")
