"""The house: which file may import which, and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import diag
from diag.attention import AttentionCall

HOUSE = Path(diag.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

FLOORS: dict[str, int] = {
    "errors": 0,
    "ranges": 0,
    "tars": 0,
    "attention": 0,
    "sampling": 0,
    "values": 0,
    "pattern": 0,
    "softmax": 0,
    "memory": 1,
    "batches": 2,
    "readings": 0,
    "records": 0,
    "kernels": 1,
    "metrics": 1,
    "interventions": 1,
    "variants": 1,
    "aside": 1,
    "moments": 1,
    "share": 1,
    "claims": 1,
    "inputs": 1,
    "collect": 1,
    "published": 1,
    "profiles": 2,
    "words": 3,
    "seam": 2,
    "models": 3,
    "shape": 2,
    "divergence": 2,
    "groups": 3,
    "collected": 4,
    "prefetch": 4,
    "secondary_sinks": 1,
    "stream": 2,
    "blocks": 2,
    "branches": 3,
    "gates": 3,
    "geometry": 1,
    "shape_blocks": 1,
    "edited": 4,
    "measure": 4,
    "figures": 4,
    "activations": 5,
    "config": 5,
    "run": 5,
    "shards": 5,
    "forecast": 5,
    "ledger": 5,
    "finish": 5,
    "cache": 5,
    "compare": 5,
    "attend": 5,
    "writeup": 5,
    "intervene": 5,
    "report": 5,
    "train": 5,
    "monitor": 5,
    "monitor_hf": 5,
    "terminal": 5,
    "cli": 6,
    "api": 6,
    "__init__": 6,
    "__main__": 6,
}
"""A file (or folder) imports from lower floors; from its own floor only what `BESIDE` lists."""

BESIDE = {
    ("records", "errors"),
    ("ranges", "errors"),
    ("metrics", "kernels"),
    ("attention", "errors"),
    ("tars", "errors"),
    ("attention", "sampling"),
    ("attention", "softmax"),
    ("pattern", "attention"),
    ("pattern", "sampling"),
    ("softmax", "attention"),
    ("softmax", "pattern"),
    ("softmax", "kernels"),
    ("values", "attention"),
    ("values", "kernels"),
    ("shape_blocks", "kernels"),
    ("shape_blocks", "geometry"),
    ("readings", "sampling"),
    ("run", "config"),
    ("run", "shards"),
    ("run", "ledger"),
    ("run", "finish"),
    ("finish", "config"),
    ("finish", "ledger"),
    ("shards", "config"),
    ("forecast", "config"),
    ("forecast", "shards"),
    ("intervene", "shards"),
    ("run", "activations"),
    ("measure", "edited"),
    ("measure", "collected"),
    ("blocks", "seam"),
    ("intervene", "config"),
    ("train", "config"),
    ("train", "run"),
    ("train", "intervene"),
    ("train", "monitor"),
    ("monitor_hf", "monitor"),
    ("intervene", "cache"),
    ("intervene", "run"),
    ("intervene", "terminal"),
    ("cache", "config"),
    ("cache", "run"),
    ("attend", "config"),
    ("attend", "run"),
    ("writeup", "attend"),
    ("writeup", "cache"),
    ("writeup", "compare"),
    ("writeup", "config"),
    ("report", "compare"),
    ("compare", "config"),
    ("__main__", "cli"),
}

ONLY: dict[str, set[str]] = {
    "inputs": {"errors", "tars"},
    "kernels": {"errors", "attention", "softmax", "values"},
    "models": {"errors", "ranges", "attention", "inputs", "seam", "variants"},
    "variants": {"errors", "ranges"},
    "collect": {"errors", "records"},
    "profiles": {"errors", "records", "collect"},
    "words": {"errors", "records", "collect", "profiles"},
    "figures": {"errors"},
    "records": {"errors"},
}
"""What a file may import, where that is less than its floor allows."""

LIBRARIES = {
    "timm": {"models/timm.py", "train/folders.py", "variants/in_timm.py"},
    "open_clip": {"models/open_clip.py"},
    "transformers": {"models/hf.py", "monitor_hf.py", "variants/in_transformers.py"},
    "transformer_lens": {"models/lens.py"},
}
"""Library of a model family -> the files that import it on top, all of them loaded with the family."""


def name_of(file: Path) -> str:
    return ".".join(["diag", *file.relative_to(HOUSE).with_suffix("").parts]).removesuffix(".__init__")


MODULES = {name_of(file) for file in FILES}


def room_of(module: str) -> str:
    """`diag.models.timm` -> `models`; `diag` -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that is imported, `from diag import run` counted as `diag.run`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: write imports in full"
            base = node.module or ""
            inner = [f"{base}.{alias.name}" for alias in node.names]
            found = [name for name in inner if name in MODULES]
            if len(found) < len(inner):
                found.append(base)
            yield from ((name, node) for name in found)


def on_top(tree: ast.Module) -> ast.Module:
    """The statements that run when the module is imported, but for imports of types."""
    checked = {
        id(node) for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
    }
    kept = ast.Module([node for node in tree.body if id(node) not in checked], [])
    return _Unrun().visit(kept)


class _Unrun(ast.NodeTransformer):
    """Takes out the bodies of functions and methods: they run later."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        return None

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        return None


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(HOUSE)) for file in FILES])
def test_a_file_imports_from_lower_floors_only(file: Path) -> None:
    room = room_of(name_of(file))
    assert room in FLOORS, f"'{room}' has no floor yet"
    for name, node in imports_of(ast.parse(file.read_text(encoding="utf-8"))):
        if name.split(".")[0] != "diag":
            continue
        other = room_of(name)
        place = f"{file.relative_to(HOUSE)}:{node.lineno} imports {name}"
        if other == room:
            continue
        below = FLOORS[other] < FLOORS[room] or (room, other) in BESIDE
        assert below, f"{place}: floor {FLOORS[other]} is not below floor {FLOORS[room]}"
        assert other in ONLY.get(room, FLOORS), f"{place}: '{room}' may import {sorted(ONLY[room])}"


def test_the_floors_are_told_apart() -> None:
    """A negative control: what is read from a file with a wrong import is that import."""
    tree = ast.parse(
        "def f():\n    from diag.metrics import METRICS\n    from diag import measure, __all__\n"
    )
    assert [name for name, _ in imports_of(tree)] == ["diag.metrics", "diag.measure", "diag"]
    assert [name for name, _ in imports_of(on_top(tree))] == []
    assert FLOORS["metrics"] > FLOORS["attention"]


def test_imports_go_round_nowhere() -> None:
    graph = {}
    for file in FILES:
        imported = imports_of(on_top(ast.parse(file.read_text(encoding="utf-8"))))
        graph[name_of(file)] = {name for name, _ in imported if name in MODULES and name != name_of(file)}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert "diag.attention" in graph["diag.seam"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_by_its_family_only(library: str) -> None:
    importing = set()
    for file in FILES:
        tree = on_top(ast.parse(file.read_text(encoding="utf-8")))
        if any(name.split(".")[0] == library for name, _ in imports_of(tree)):
            importing.add(file.relative_to(HOUSE).as_posix())
    assert importing == LIBRARIES[library]


@pytest.mark.parametrize("file", FILES, ids=[str(file.relative_to(HOUSE)) for file in FILES])
def test_a_file_says_first_what_it_is_for(file: Path) -> None:
    assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))


def loaded_after(*modules: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter that imported `modules`."""
    code = f"import {', '.join(modules)}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


FIGURES = (
    "diag.figures",
    "diag.figures.attend",
    "diag.figures.strip",
    "diag.figures.curves",
    "diag.figures.heatmaps",
    "diag.figures.write",
    "diag.figures.training",
    "diag.figures.alphas",
    "diag.figures.compensation",
    "diag.figures.gain",
    "diag.figures.gain_relation",
    "diag.figures.training_curves",
)
DRAWING = (
    "diag.records",
    "diag.collect",
    "diag.profiles",
    "diag.words",
    "diag.compare",
    "diag.report",
    "diag.train.outcomes",
    "diag.train.said",
    *FIGURES,
)
NAMING = (
    "diag",
    "diag.cli",
    "diag.config",
    "diag.cache",
    "diag.terminal",
    "diag.models.names",
    "diag.inputs",
)


def test_neither_tables_nor_figures_load_torch() -> None:
    loaded = loaded_after(*DRAWING)
    assert loaded.isdisjoint({"torch", "torchvision", *LIBRARIES})
    assert {"pandas", "matplotlib"} <= loaded


def test_neither_names_nor_inputs_load_torch() -> None:
    assert loaded_after(*NAMING).isdisjoint({"torch", "torchvision", "matplotlib", *LIBRARIES})


@pytest.mark.parametrize("module", ["diag", "diag.cli"])
def test_help_is_instant(module: str) -> None:
    assert loaded_after(module).isdisjoint({"torch", "numpy", "pandas", "matplotlib", "PIL", "pydantic"})


def test_no_family_is_loaded_before_it_is_named() -> None:
    loaded = loaded_after(
        "diag.api",
        "diag.run",
        "diag.measure",
        "diag.models",
        "diag.models.base",
        "diag.models.own",
        "diag.monitor",
        "diag.models.demo",
    )
    assert "torch" in loaded
    assert loaded.isdisjoint(LIBRARIES)


def test_a_family_loads_its_own_library() -> None:
    """A negative control of the test above."""
    loaded = loaded_after("diag.models.timm")
    assert "timm" in loaded
    assert loaded.isdisjoint({"open_clip", "transformer_lens"})


def test_shapes_of_signatures_are_checked_in_tests() -> None:
    """The pytest option is on: a call with tensors of the wrong shape does not come into being."""
    flat = torch.zeros(2, 3)
    with pytest.raises(TypeCheckError):
        AttentionCall(0, "x", flat, flat, flat, flat, None, False, 1.0)
