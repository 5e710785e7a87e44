"""The house: which folder may import which, and what stays unloaded until it is needed."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch
from jaxtyping import TypeCheckError

import diag
from diag.attention.call import AttentionCall
from diag.models.families import FAMILIES

HOUSE = Path(diag.__file__).parent
FILES = sorted(HOUSE.rglob("*.py"))

FLOORS: dict[str, int] = {
    "errors": 1,
    "inputs": 2,
    "attention": 2,
    "variants": 2,
    "models": 3,
    "metrics": 3,
    "results": 4,
    "measure": 5,
    "show": 5,
    "run": 6,
    "studies": 7,
    "cli": 8,
    "__init__": 9,
    "__main__": 9,
}
"""Every entry at the top of the package. What is in one imports from its own folder and from lower floors."""

LIBRARIES = {
    "timm": {
        "models/families/demo.py",
        "models/families/timm/load.py",
        "models/families/timm/registry.py",
        "variants/in_timm.py",
    },
    "open_clip": {"models/families/open_clip/load.py"},
    "transformers": {
        "models/families/demo.py",
        "models/families/hf/files.py",
        "models/families/hf/head.py",
        "models/families/hf/load.py",
        "studies/monitor/hf_trainer.py",
        "variants/in_transformers.py",
    },
    "diffusers": {
        "models/families/diffusers/feeding.py",
        "models/families/diffusers/load.py",
    },
    "transformer_lens": {"models/families/transformer_lens.py"},
}
"""Library of a model family -> the files that import it on top, or, among models, anywhere."""


def name_of(file: Path) -> str:
    return ".".join(["diag", *file.relative_to(HOUSE).with_suffix("").parts]).removesuffix(".__init__")


@cache
def tree_of(file: Path) -> ast.Module:
    """Only to be read."""
    return ast.parse(file.read_text(encoding="utf-8"))


MODULES = {name_of(file) for file in FILES}


def room_of(module: str) -> str:
    """`diag.models.names.series` -> `models`; `diag` -> `__init__`."""
    return [*module.split("."), "__init__"][1]


def imports_of(tree: ast.AST) -> Iterator[tuple[str, ast.stmt]]:
    """Every module that is imported, `from diag import run` counted as `diag.run.run`."""
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


def test_the_rooms_are_those_of_the_plan() -> None:
    entries = {path.stem if path.suffix == ".py" else path.name for path in HOUSE.iterdir()}
    assert entries - {"__pycache__"} == set(FLOORS)


def test_a_file_imports_from_lower_floors_only() -> None:
    wrong = []
    for file in FILES:
        room = room_of(name_of(file))
        for name, node in imports_of(tree_of(file)):
            if name.split(".")[0] != "diag" or room_of(name) == room:
                continue
            if FLOORS[room_of(name)] >= FLOORS[room]:
                wrong.append(f"{file.relative_to(HOUSE)}:{node.lineno} imports {name}")
    assert wrong == []


def test_the_floors_are_told_apart() -> None:
    """A negative control: what is read from a file with a wrong import is that import."""
    tree = ast.parse(
        "def f():\n    from diag.metrics.default import METRICS\n    from diag.measure import loop, __all__\n"
    )
    assert [name for name, _ in imports_of(tree)] == [
        "diag.metrics.default",
        "diag.measure.loop",
        "diag.measure",
    ]
    assert [name for name, _ in imports_of(on_top(tree))] == []
    assert FLOORS["metrics"] > FLOORS["attention"]


def test_imports_go_round_nowhere() -> None:
    """Those inside functions count: one that only breaks a circle hides it."""
    graph = {}
    for file in FILES:
        imported = imports_of(tree_of(file))
        graph[name_of(file)] = {name for name, _ in imported if name in MODULES and name != name_of(file)}
    assert list(TopologicalSorter(graph).static_order())  # raises CycleError
    assert "diag.attention.call" in graph["diag.models.hooks.seam"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_by_its_family_only(library: str) -> None:
    importing = set()
    for file in FILES:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if room_of(name_of(file)) != "models":
            tree = on_top(tree)
        if any(name.split(".")[0] == library for name, _ in imports_of(tree)):
            importing.add(file.relative_to(HOUSE).as_posix())
    assert importing == LIBRARIES[library]


def test_a_file_says_first_what_it_is_for() -> None:
    assert [str(file.relative_to(HOUSE)) for file in FILES if not ast.get_docstring(tree_of(file))] == []


def loaded_after(*modules: str) -> set[str]:
    """Top-level names in `sys.modules` of a fresh interpreter that imported `modules`."""
    code = f"import {', '.join(modules)}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


FIGURES = (
    "diag.show.figures",
    "diag.show.figures.attend",
    "diag.show.figures.strip",
    "diag.show.figures.curves",
    "diag.show.figures.heatmaps",
    "diag.show.figures.write",
    "diag.show.figures.training",
    "diag.show.figures.gain",
    "diag.show.figures.training_curves",
)
DRAWING = (
    "diag.results.tables",
    "diag.results.collect",
    "diag.results.profiles",
    "diag.show.words",
    "diag.studies.compare",
    "diag.show.report",
    "diag.studies.train.outcomes",
    "diag.studies.train.summary",
    *FIGURES,
)
NAMING = (
    "diag",
    "diag.cli",
    "diag.run.plan",
    "diag.run.cache",
    "diag.run.finished",
    "diag.studies.comparisons",
    "diag.show.terminal",
    "diag.models.names.resolve",
    "diag.inputs.images",
    "diag.metrics.registry",
)


PUBLIC = (
    "import diag.figures.curves as there, diag.show.figures.curves as home",
    "import diag.show.figures.curves as home, diag.figures.curves as there",
    "import diag.figures.curves; there, home = diag.figures.curves, diag.show.figures.curves",
    "import diag.results.collect as home, diag; there = diag.collect",
    "import diag.profiles.curves as there, diag.results.profiles.curves as home",
)


@pytest.mark.parametrize("imports", PUBLIC)
def test_a_public_module_is_the_module_where_it_lives(imports: str) -> None:
    code = f"{imports}; from importlib import reload; assert there is home is reload(home)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_modules_are_there_without_an_import_of_their_own() -> None:
    code = "import diag; diag.variants.apply, diag.collect.collect, diag.figures.FIGURES"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_public_module_that_is_not_there_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'diag\.figures\.nowhere'"):
        importlib.import_module("diag.figures.nowhere")


def test_neither_tables_nor_figures_load_torch() -> None:
    loaded = loaded_after(*DRAWING)
    assert loaded.isdisjoint({"torch", "torchvision", *LIBRARIES})
    assert {"pandas", "matplotlib"} <= loaded


def test_neither_names_nor_inputs_load_torch() -> None:
    assert loaded_after(*NAMING).isdisjoint({"torch", "torchvision", "matplotlib", *LIBRARIES})
    assert loaded_after("diag.metrics.registry").isdisjoint({"numpy", "pandas"})


@pytest.mark.parametrize("module", ["diag", "attnbias", "diag.cli"])
def test_help_is_instant(module: str) -> None:
    assert loaded_after(module).isdisjoint({"torch", "numpy", "pandas", "matplotlib", "PIL", "pydantic"})


def test_no_family_is_loaded_before_it_is_named() -> None:
    loaded = loaded_after(
        "diag.run.api",
        "diag.run.run",
        "diag.measure.loop",
        "diag.models",
        "diag.models.base",
        "diag.models.families.from_module",
        "diag.studies.monitor.monitor",
        *FAMILIES.values(),
    )
    assert "torch" in loaded
    assert loaded.isdisjoint(LIBRARIES)


def test_what_a_family_tells_of_itself_needs_no_torch() -> None:
    assert loaded_after(*FAMILIES.values()).isdisjoint({"torch", *LIBRARIES})


def test_a_family_loads_its_own_library() -> None:
    """A negative control of the test above."""
    loaded = loaded_after("diag.models.families.timm.load")
    assert "timm" in loaded
    assert loaded.isdisjoint({"open_clip", "transformer_lens"})


def test_what_is_checked_is_there(pytestconfig: pytest.Config) -> None:
    """Modules of `attention` are named one by one: its kernels are read by Triton as they are written."""
    *checked, _ = pytestconfig.getoption("--jaxtyping-packages").split(",")
    assert set(checked) - MODULES == set()
    assert {name_of(file) for file in (HOUSE / "attention").glob("[!_]*.py")} - set(checked) == set()


def test_shapes_of_signatures_are_checked_in_tests() -> None:
    """The pytest option is on: a call with tensors of the wrong shape does not come into being."""
    flat = torch.zeros(2, 3)
    with pytest.raises(TypeCheckError):
        AttentionCall(0, "x", flat, flat, flat, flat, None, False, 1.0)


def test_the_page_about_the_architecture_shows_these_floors() -> None:
    page = (HOUSE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d) \| `(\w+)(?:/|\.py)` \|", page, re.MULTILINE)
    assert {room: int(floor) for floor, room in rows} == {
        room: floor for room, floor in FLOORS.items() if not room.startswith("__")
    }
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", page)
    top = HOUSE.parent
    assert len(named) > 15
    assert [path for path in named if not (HOUSE / path).exists() and not (top / path).exists()] == []
