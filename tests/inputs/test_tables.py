"""Tables of others: text stays text, and what is wrong is told with file, column and row."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from diag.errors import UserError
from diag.inputs.csv_injection import to_csv, with_guard
from diag.inputs.tables import ANY, COUNT, GRID, NAME, NUMBER, OPEN, PLACE, TEXT, WHOLE, Layout, read_table

LAYOUT = Layout(
    {"model": NAME, "layer": PLACE, "mean": NUMBER, "n": COUNT},
    {"note": TEXT, "row": GRID, "col": GRID, "seed": WHOLE, "loss": OPEN, "size": ANY},
    key=("model", "layer"),
    span=("row", "col"),
    rows=True,
)
GOOD: dict[str, list[Any]] = {
    "model": ["a", "a", "b"],
    "layer": [0, 1, 0],
    "mean": [0.5, None, -1],
    "n": [8] * 3,
}


def read(file: Path, layout: Layout = LAYOUT) -> pd.DataFrame:
    return read_table(file, layout, "the table", tip="measure again")


def test_a_folder_with_a_colon_in_its_name_is_no_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`demo:vit-p8/samples.parquet`, typed as a relative path."""
    monkeypatch.chdir(tmp_path)
    file = Path("demo:vit-p8/t.parquet")
    file.parent.mkdir()
    pd.DataFrame(GOOD).to_parquet(file.absolute())
    assert len(read(file)) == 3


def test_text_is_text_and_only_an_empty_field_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text(
        "model,layer,mean,n,note,size,more\n001,0,0.5,8,NA,16,1\nNA,1,,8,,16x8,2\nnull,2,1e-3,8,1.50,8,3\n"
    )
    found = read(file)
    assert list(found["model"]) == ["001", "NA", "null"]
    assert found["note"].tolist()[::2] == ["NA", "1.50"]
    assert found["note"].isna().tolist() == [False, True, False]
    assert found["mean"].isna().tolist() == [False, True, False]
    assert found["layer"].dtype == found["n"].dtype == np.dtype("int64")
    assert list(found["size"]) == ["16", "16x8", "8"]
    assert list(found["more"]) == [1, 2, 3]  # undeclared: as it comes


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no column": ({"mean": None, "n": None}, "it has no column 'mean' or 'n'"),
    "no name": ({"model": ["a", None, "b"]}, "column 'model' holds nothing in {1}, where a text is due"),
    "text for a number": ({"mean": [1, 2, "abc"]}, "column 'mean' holds 'abc' in {2}, where a finite number"),
    "NA for a number": ({"mean": ["NA", 2, 3]}, "column 'mean' holds 'NA' in {0}, where a finite number"),
    "infinity": ({"mean": [1, -np.inf, 2]}, "column 'mean' holds -inf in {1}, where a finite number is due"),
    "beyond axes": ({"mean": [1, 2, 1e200]}, "column 'mean' holds 1e+200 in {2}, where a finite number"),
    "truth": ({"mean": [True, False, True]}, "column 'mean' holds True in {0}, where a finite number is due"),
    "half a layer": ({"layer": [0, 0.5, 1]}, "column 'layer' holds 0.5 in {1}, where a whole number from -1"),
    "a million layers": ({"layer": [0, 1, 10**6]}, "column 'layer' holds 1000000 in {2}, where a whole"),
    "no count": ({"n": [8, 8, None]}, "column 'n' holds nothing in {2}, where a whole number is due"),
    "beyond 64 bits": ({"seed": [0, 1, 2.0**70]}, "column 'seed' holds 1.1805916207174113e+21 in {2}"),
    "a picture beyond reason": (
        {"row": [0, 1, 2000], "col": [0, 900, 0]},
        "columns 'row' and 'col' span 1,802,",
    ),
    "a row again": ({"layer": [0, 0, 0]}, "{1} repeats model a, layer 0"),
}


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(("change", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_told_by_column_and_row(
    tmp_path: Path, change: dict[str, Any], said: str, suffix: str
) -> None:
    columns = {name: values for name, values in (GOOD | change).items() if values is not None}
    file = tmp_path / f"t{suffix}"
    mixed = any(len({type(value) is str for value in values}) > 1 for values in change.values() if values)
    if suffix == ".csv":
        pd.DataFrame(columns).to_csv(file, index=False)
        said = said.format("line 2", "line 3", "line 4")
    elif mixed and "model" not in change:
        pytest.skip("a column of Parquet is of one type")
    else:
        pd.DataFrame(columns).to_parquet(file)
        said = said.format("row 0", "row 1", "row 2")
    with pytest.raises(UserError) as caught:
        read(file)
    assert str(caught.value).startswith(f"cannot read the table '{file}': {said}")
    assert caught.value.tip == "measure again"


def test_what_may_be_infinite_or_missing(tmp_path: Path) -> None:
    more = {"loss": [np.inf, None, 1.0], "seed": [None, 1, 2], "row": [None] * 3, "col": [1, 2, 3]}
    for name, write in (("t.csv", pd.DataFrame.to_csv), ("t.parquet", pd.DataFrame.to_parquet)):
        write(pd.DataFrame(GOOD | more), tmp_path / name, index=False)
        assert np.isinf(read(tmp_path / name)["loss"].iloc[0])


def test_columns_of_parquet_of_the_wrong_kind(tmp_path: Path) -> None:
    file = tmp_path / "t.parquet"
    pd.DataFrame(GOOD | {"model": [1, 2, 3]}).to_parquet(file)
    with pytest.raises(UserError, match="column 'model' holds 1 in row 0, where a text is due"):
        read(file)
    pd.DataFrame(GOOD).astype({"model": "category"}).to_parquet(file)
    assert list(read(file)["model"]) == ["a", "a", "b"]
    pd.DataFrame(GOOD | {"mean": [[1.0], [2.0], [3.0]]}).to_parquet(file)
    with pytest.raises(UserError, match=r"column 'mean' holds \[1\.\] in row 0"):
        read(file)


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    said = {
        "none.csv": (None, "No such file"),
        "pipe.csv": (None, "it is no plain file"),
        "empty.csv": (b"", "it is empty"),
        "bytes.csv": (b"model,layer,mean,n\n\xff,1,2,3\n", "it is not UTF-8"),
        "long.csv": (b"model,layer,mean,n\na,1,2,3\nb,1,2,3,4,5\n", "Error tokenizing data"),
        "wide.csv": (b"model,layer,mean,n\na,1,2,3,4\n", "its lines have more fields than its heading"),
        "excel.csv": (b"model;layer;mean;n\na;1;2,5;3\n", "its fields are separated by ';'"),
        "uneven.csv": (b"model;layer;mean;n\na;1;2,5;3\na;1;2,5;3,5\n", "its fields are separated by ';'"),
        "whole.csv": (b"model;layer;mean;n\na;1;2;3\n", "its fields are separated by ';'"),
        "bare.csv": (b"model,layer,mean,n\n", "it has no rows"),
        "text.parquet": (b"model", "Parquet"),
        "empty.parquet": (b"", "Parquet"),
    }
    for name, (content, why) in said.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="cannot read the table") as caught:
            read(tmp_path / name)
        assert why in str(caught.value), name


FORMULAS = ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "'=1+1", "''-x", "'quoted'", "-0.5", "+1 %", "-", "plain"]


def test_formulas_are_guarded_in_csv_and_read_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    table = pd.DataFrame({"model": FORMULAS, "layer": range(len(FORMULAS)), "mean": -0.5, "n": 1})
    to_csv(table, file)
    assert list(read(file)["model"]) == FORMULAS
    raw = pd.read_csv(file, dtype=str, keep_default_na=False)
    assert all(raw["mean"] == "-0.5")  # a number stays one
    assert [name for name in raw["model"] if name[0] in "=@\t\r"] == []
    assert list(raw["model"][-5:]) == FORMULAS[-5:]
    plain = table.assign(model="demo:vit-p8")
    assert with_guard(plain) is plain
