"""The notebooks run from top to bottom on the embedded models, and hold no logic and no stale output."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

UNDRAWN = "import diag.run.finish as finish; finish.draw = lambda *tables: []"
"""Put into a notebook: what it draws itself is looked at, and the figures of its run folder take longest."""


def code_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_there_are_two() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["gpt2_depth", "patch_sizes"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# jupyter's client asks for paths that it will name differently one day
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    notebook = nbformat.read(path, as_version=4)
    first = code_of(notebook)[0]
    first.source = "\n".join([*first.source.splitlines()[:-1], "limit = 4", UNDRAWN])
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in code_of(notebook) for output in cell.get("outputs", [])]
    kinds = [kind for output in outputs for kind in output.get("data", {})]
    assert kinds.count("image/png") >= 2
    assert kinds.count("text/html") >= 2
    assert not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_thin(path: Path) -> None:
    for cell in code_of(nbformat.read(path, as_version=4)):
        assert cell.outputs == []
        source = "\n".join(line for line in cell.source.splitlines() if not line.startswith("%"))
        logic = ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try, ast.Lambda
        assert not [node for node in ast.walk(ast.parse(source)) if isinstance(node, logic)]
