"""Published numbers: what is there, what a name stands for, and when a measured value is within."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from diag.errors import UserError
from diag.results import published


def measured(
    values: dict[int, float], *, half: float = 0.01, model: str = "gpt2", metric: str = "cos_y_vself"
) -> pd.DataFrame:
    """A per-layer table with the same interval around every value."""
    return pd.DataFrame(
        {
            "model": model,
            "metric": metric,
            "layer": list(values),
            "mean": list(values.values()),
            "ci_low": [value - half for value in values.values()],
            "ci_high": [value + half for value in values.values()],
            "n": 32,
            "values": "bias_free",
            "n_tokens": 128,
            "first_token": "excluded",
        }
    )


class TestCurves:
    def test_every_curve_is_there_and_whole(self) -> None:
        table = published.curves()
        assert list(table.columns) == list(published.COLUMNS)
        layers = table.groupby(["model", "metric"])["layer"].agg(["count", "max"])
        assert (layers["count"] == layers["max"] + 1).all()
        assert {"gpt2", "gpt2-medium", "gpt2-large", "clip-vit-b-14-cc12m", "gpt2-384"} <= set(table["model"])
        assert table["value"].between(-1, 1).all()
        assert (table["uncertainty"] > 0).all()
        assert set(table["source"]) == set(published.SETTINGS)

    def test_one_model(self) -> None:
        table = published.curves("gpt2-medium")
        assert set(table["model"]) == {"gpt2-medium"}
        assert len(table) == 3 * 24

    def test_an_unknown_model_names_near_ones(self) -> None:
        with pytest.raises(UserError, match="nothing is published here for 'gpt2-larg'") as raised:
            published.curves("gpt2-larg")
        assert "did you mean 'gpt2-large'" in str(raised.value.tip)

    def test_a_file_of_ones_own(self, tmp_path: Path) -> None:
        file = tmp_path / "mine.csv"
        published.curves("gpt2").to_csv(file, index=False)
        pd.testing.assert_frame_equal(published.curves(file=file), published.curves("gpt2"))
        file.write_text("model,layer\na,1\n")
        with pytest.raises(UserError, match="has no column 'metric', 'value', 'uncertainty' or 'source'"):
            published.curves(file=file)
        with pytest.raises(UserError, match="cannot read published values from"):
            published.curves(file=tmp_path / "none.csv")

    def test_the_posts_numbers(self) -> None:
        table = published.accuracy()
        assert list(table["change"]) == [-7.47, -2.35, 3.44, 1.73]
        np.testing.assert_allclose(table["similarity_baseline"][:3], [0.055, 0.069, 0.224], atol=5e-4)
        np.testing.assert_allclose(table["similarity_xsa"][:3], [0.554, 0.490, 0.459], atol=5e-4)

    def test_the_ladder(self) -> None:
        table = published.ladder()
        assert len(table) == 9
        share = 100 * (1 - table["cos_y_vpartner"] / table["cos_y_vself"])
        np.testing.assert_allclose(share, table["self_specific_percent"], atol=1.0)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("gpt2", "gpt2"),
        ("gpt2-small", "gpt2"),
        ("hf:openai-community/gpt2", "gpt2"),
        ("openai-community/gpt2-large", "gpt2-large"),
        ("tl:gpt2-medium", "gpt2-medium"),
        ("gpt2-xl", None),
        ("gpt2@main", None),
        ("gpt2,n_layer=2", None),
        ("demo:lm", None),
        ("vit-b-16", None),
    ],
)
def test_what_a_name_stands_for(model: str, name: str | None) -> None:
    assert published.name_of(model) == name


class TestReproduction:
    def test_within_is_interval_and_uncertainty(self) -> None:
        known = published.curves("gpt2").query("metric == 'cos_y_vself'").set_index("layer")
        off, theirs = known["uncertainty"], known["value"]
        table = measured(
            {
                0: theirs[0] + 0.01 + off[0] - 1e-6,  # just inside
                1: theirs[1] + 0.01 + off[1] + 1e-6,  # just outside
                2: theirs[2] - 0.01 - off[2] + 1e-6,
                3: theirs[3] - 0.01 - off[3] - 1e-6,
            }
        )
        found = published.reproduction(table, "gpt2")
        assert list(found.columns) == [
            *("metric", "layer", "published", "uncertainty", "measured", "ci_low", "ci_high"),
            *("difference", "within", "source"),
        ]
        assert list(found["within"]) == [True, False, True, False]
        np.testing.assert_allclose(found["difference"], found["measured"] - found["published"])

    def test_without_an_interval_the_uncertainty_alone_decides(self) -> None:
        table = measured({0: 0.7229, 1: 0.6485}).assign(ci_low=np.nan, ci_high=np.nan)
        assert list(published.reproduction(table, "gpt2")["within"]) == [True, False]

    def test_the_verdict(self) -> None:
        table = published.reproduction(measured({0: 0.722, 1: 0.6, 2: 0.582}), "gpt2")
        assert published.verdict(table, "gpt2", not_measured=33) == (
            "gpt2: 2 of 3 published values are within uncertainty and interval; largest difference −0.047 "
            "(cos_y_vself, layer 1); 33 more are published and were not measured"
        )

    def test_another_name(self) -> None:
        table = measured({0: 0.7}, model="demo:lm")
        assert len(published.reproduction(table, "demo:lm", "gpt2")) == 1
        with pytest.raises(UserError, match="nothing is published here for 'demo:lm'"):
            published.reproduction(table, "demo:lm")

    def test_a_model_that_is_not_there(self) -> None:
        with pytest.raises(UserError, match="'gpt2-medium' is not in the table"):
            published.reproduction(measured({0: 0.7}), "gpt2-medium")

    def test_two_ways_of_measuring_are_refused(self) -> None:
        table = pd.concat([measured({0: 0.7}), measured({0: 0.6}).assign(values="as_computed")])
        with pytest.raises(UserError, match="'gpt2' was measured in several ways"):
            published.reproduction(table, "gpt2")

    def test_metrics_that_nobody_published(self) -> None:
        with pytest.raises(UserError, match="no value of 'gpt2' was measured") as raised:
            published.reproduction(measured({0: 2.0}, metric="entropy"), "gpt2")
        assert raised.value.tip == "measure --metrics cos_y_vself,value_similarity,self_weight"

    def test_settings_that_differ_are_said(self) -> None:
        source = "FrancescoPaoloL/xsa_POC"
        table = measured({0: 0.7})
        assert published.other_settings(table, "gpt2", source) == []
        other = table.assign(values="as_computed", n_tokens=64)
        assert published.other_settings(other, "gpt2", source) == [
            "values as computed (published: bias free)",
            "T 64 (published: 128)",
        ]
        assert published.other_settings(other, "gpt2", "nobody") == []
