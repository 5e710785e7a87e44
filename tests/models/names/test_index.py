"""Indexes of names: as a library has them, made anew when it changes, never in the way if there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from timm.models import _registry

from diag.errors import UserError
from diag.models.families.timm import FAMILY, registry
from diag.models.names import index
from diag.models.names.index import caches, keep, kept
from diag.models.names.resolve import listing, parse

NAMES = {"models": ["one", "two"]}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of indexes, of a user who has none yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "attnbias"


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Path:
    """An installed library of one file."""
    package, told = tmp_path / "site" / "made_library", tmp_path / "site" / "made_library-1.0.dist-info"
    package.mkdir(parents=True)
    told.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: made_library\nVersion: 1.0\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    return package


def test_an_index_is_found_again(library: Path, cache: Path) -> None:
    assert kept("made_library") == {}
    keep("made_library", NAMES)
    keep("made_library", NAMES)
    assert kept("made_library") == NAMES
    assert len(list(cache.iterdir())) == 1  # nothing beside it is left


def newer(package: Path) -> None:
    file = package.parent / "made_library-1.0.dist-info" / "METADATA"
    file.write_text(file.read_text().replace("Version: 1.0", "Version: 1.1"))


CHANGES: dict[str, Callable[[Path], object]] = {
    "version": newer,
    "file": lambda package: (package / "__init__.py").write_text("# another one"),
    "time": lambda package: os.utime(package / "__init__.py", (1, 1)),
    "more": lambda package: (package / "more.py").touch(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_index_holds_for_one_installation(library: Path, cache: Path, change: str) -> None:
    keep("made_library", NAMES)
    (library / "cache.bin").touch()  # no code: nothing has changed
    assert kept("made_library") == NAMES
    CHANGES[change](library)
    assert kept("made_library") == {}
    keep("made_library", {"models": []})
    assert kept("made_library") == {"models": []}
    assert len(list(cache.iterdir())) == 1  # it takes the place of the earlier one


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"stamp": 3, "names": {}}', "no names"])
def test_a_broken_index_is_none(library: Path, cache: Path, content: bytes | str) -> None:
    keep("made_library", NAMES)
    (file,) = cache.iterdir()
    broken = json.dumps({**json.loads(file.read_text()), "names": 3}).encode()
    file.write_bytes(content if isinstance(content, bytes) else broken)
    assert kept("made_library") == {}
    keep("made_library", NAMES)
    assert kept("made_library") == NAMES


def test_what_cannot_be_written_is_let_be(
    library: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.parent.write_text("a file in the place of the folder")
    keep("made_library", NAMES)
    assert kept("made_library") == {}
    cache.parent.unlink()

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(index.os, "replace", full)
        keep("made_library", NAMES)
    assert list(cache.iterdir()) == []
    keep("no_such_library", NAMES)
    keep("json", NAMES)  # without a version of its own
    assert list(cache.iterdir()) == []


def test_indexes_lie_where_caches_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    for given, folder in {
        "/c": "/c",
        "": "/home/somebody/.cache",
        "relative": "/home/somebody/.cache",
    }.items():
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert caches() == Path(folder) / "attnbias"
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # of a user without a home
    assert caches() is None


# --- timm's


@pytest.fixture
def unimported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """`unimported()`: timm is not there, and what was read of its index is forgotten."""
    monkeypatch.delitem(sys.modules, "timm")  # which puts it back in the end

    def forget() -> None:
        sys.modules.pop("timm", None)
        registry._indexed.cache_clear()

    forget()
    return forget


def test_the_index_says_what_timm_says(unimported: Callable[[], None], cache: Path) -> None:
    first = registry.timm_registry()
    assert "timm" in sys.modules
    (file,) = cache.iterdir()
    unimported()
    second = registry.timm_registry()
    names = [*timm.list_models(), *timm.list_pretrained()]
    assert list(second.models()) == list(first.models()) == timm.list_models()
    assert list(second.published("")) == list(first.published("")) == timm.list_pretrained()
    for architecture in ("vit_base_patch16_224", "vit_base_patch16_clip_224", "resnet50", "vit_nowhere"):
        assert list(second.published(architecture)) == list(first.published(architecture))
    renamed = next(iter(_registry._deprecated_models))
    for name in [*timm.list_models(), renamed, "vit_nowhere", "hasattr"]:
        assert second.has(name) == timm.is_model(name)
    assert {name: second.config(name) for name in names}.keys() == {*names}
    for name in names:
        one, other = first.config(name), second.config(name)
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert list(one.size) == list(other.size)
            assert (one.licence, one.tag, one.quickgelu) == (other.licence, other.tag, other.quickgelu)
    assert sum(config.quickgelu for name in names if (config := second.config(name))) > 10
    assert "timm" not in sys.modules
    file.write_text(file.read_text().replace('"size"', '"sizes"'))
    unimported()
    assert registry.timm_registry().models() == timm.list_models()
    assert "timm" in sys.modules  # that index was broken
    assert '"size"' in file.read_text()


def test_a_model_of_ones_own_is_found_though_there_is_an_index(
    unimported: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.timm_registry()  # fills the index
    unimported()
    with pytest.raises(UserError, match="'timm:vit_of_mine' not found in timm"):
        parse("timm:vit_of_mine")
    assert "timm" not in sys.modules
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(_registry._model_entrypoints, "vit_of_mine", lambda: None)
    assert parse("vit_of_mine", random_init=True).resolved == "timm:vit_of_mine"


NAMED = """
import sys
from diag.cli import main
from diag.errors import UserError
from diag.models.names.resolve import parse
assert parse("vit_base_patch16_224").resolved == "timm:vit_base_patch16_224"
assert parse("ViT-B-16/openai").family == "open_clip" and parse("org/name").family == "hf"
for mistyped in ("timm:vit_bse_patch16_224", "vit_base_patch16_24", "timm:vit_base_patch16_224.augrg_in1k"):
    try:
        parse(mistyped)
    except UserError as error:
        assert "augreg_in1k'" in error.tip, error.tip
    else:
        raise AssertionError(mistyped)
sys.argv = ["attnbias", "models", "patch8 augreg"]
try:
    main()
except SystemExit as ended:
    print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
    raise
"""


def test_names_are_checked_and_listed_without_a_library(unimported: Callable[[], None]) -> None:
    registry.timm_registry()  # fills the index
    done = subprocess.run([sys.executable, "-c", NAMED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "timm:vit_base_patch8_224.augreg_in21k" in done.stdout
    loaded = set(done.stderr.split())
    assert loaded.isdisjoint({"torch", "torchvision", "timm", "open_clip", "transformers"}), loaded
    assert "diag" in loaded
    listed = {row["resolves_to"]: row for row in listing("patch8 augreg")}
    assert listed["timm:vit_base_patch8_224.augreg_in21k"] == {
        **listed["timm:vit_base_patch8_224.augreg_in21k"],
        **FAMILY.row("vit_base_patch8_224.augreg_in21k").__dict__,
    }
