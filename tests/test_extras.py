"""What works without the libraries of the extras, and what is said where one is needed.

A library of which `sys.modules` says None is not there, for imports and for whoever asks beforehand. What
these libraries left loaded from other tests would still be used: each case runs what asks before it imports.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from commands import Ended
from PIL import Image

import diag
from diag.errors import EXTRAS, UserError, need
from diag.models.families import all_families

Attnbias = Callable[..., Ended]

ROOT = Path(diag.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OPTIONAL = (*EXTRAS, "open_clip_train", "tokenizers", "wandb")

BASE = """
import sys
for library in {libraries!r}:
    sys.modules[library] = None
import importlib, pkgutil
import torch
import diag
lacking = []
for module in pkgutil.walk_packages(diag.__path__, "diag."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        lacking.append((module.name, error.name))
loaded = [library for library in {libraries!r} if sys.modules.get(library)]
torch.manual_seed(0)
layer = torch.nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0)
model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
run = diag.probe(model, [torch.randn(2, 9, 32)])
print((lacking, loaded, run.layers["layer"].nunique(), bool(run.layers["mean"].notna().all())))
"""


def names_in(requirements: list[str]) -> set[str]:
    return {package_of(line).lower().replace("_", "-") for line in requirements}


def package_of(line: str) -> str:
    return line.split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library of any extra; an image to be named."""
    for library in OPTIONAL:
        monkeypatch.setitem(sys.modules, library, None)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "x.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_base_installation_imports_everything_but_what_loads_a_librarys_models() -> None:
    """And measures a module of PyTorch alone."""
    ended = subprocess.run(
        [sys.executable, "-c", BASE.format(libraries=OPTIONAL)], capture_output=True, text=True, check=True
    )
    lacking, loaded, layers, numbers = ast.literal_eval(ended.stdout.splitlines()[-1])
    assert loaded == []
    assert (layers, numbers) == (2, True)
    allowed = ("diag.models.families.", "diag.variants.in_", "diag.studies.monitor.hf_trainer")
    assert lacking, "a negative control: without timm its models cannot be loaded"
    assert [name for name, _ in lacking if not name.startswith(allowed)] == []


@pytest.mark.parametrize(
    ("words", "what", "package", "extra"),
    [
        ("probe -m demo:vit-p8 --images demo", "a bundled photograph", "scikit-image", "vision"),
        ("probe -m demo:vit-p8 --images demo-crops", "a bundled photograph", "scikit-image", "vision"),
        ("probe -m demo:vit-p8 --images x.png", "'demo:vit-p8'", "timm", "vision"),
        (
            "probe -m timm:vit_base_patch16_224 --images x.png",
            "'timm:vit_base_patch16_224'",
            "timm",
            "vision",
        ),
        ("probe -m vit-b-16 --images x.png", "'vit-b-16'", "open_clip_torch", "vision"),
        ("probe -m open_clip:ViT-B-14 --images x.png", "'open_clip:ViT-B-14'", "open_clip_torch", "vision"),
        ("probe -m demo:lm --texts demo", "'demo:lm'", "transformers", "text"),
        ("probe -m gpt2 --texts demo", "'gpt2'", "transformers", "text"),
        ("probe -m org/name --texts hf:set", "'hf:set'", "datasets", "text"),
        ("probe -m tl:gpt2 --texts demo", "'tl:gpt2'", "transformer-lens", "tl"),
        ("probe -m diffusers:org/name --images x.png", "'diffusers:org/name'", "diffusers", "diffusers"),
        ("compare -m demo:lm --texts demo", "'demo:lm'", "transformers", "text"),
        ("train smoke", "a bundled photograph", "scikit-image", "vision"),
        ("train language", "a language model to train", "transformers", "text"),
    ],
)
def test_what_is_missing_is_named_with_its_extra(
    words: str, what: str, package: str, extra: str, bare: Path, attnbias: Attnbias
) -> None:
    ended = attnbias(*words.split())
    assert ended.code == 2
    assert ended.lines[-2:] == [
        f"error: {what} needs {package}, which is not installed",
        f'tip: pip install "attnbias[{extra}]"',
    ]


def test_names_are_listed_without_the_libraries_that_know_more(bare: Path, attnbias: Attnbias) -> None:
    assert attnbias("models").code == 0
    listed = attnbias("models", "vit")
    assert (listed.code, listed.err) == (0, "")
    assert "demo:vit-p8" in listed.out
    assert not any(line.split()[1:2] == ["timm:vit_base_patch16_224"] for line in listed.out.splitlines())
    ended = attnbias("probe", "-m", "vit_base_patch16_224", "--images", "x.png")
    assert ended.lines == [
        "error: model 'vit_base_patch16_224' not found",
        'tip: names of timm and open_clip are known with pip install "attnbias[vision]"',
    ]


def test_from_python_it_is_the_same_sentence(bare: Path) -> None:
    for given, inputs, extra in (("demo:lm", ["a text"], "text"), ("demo:vit-p8", "x.png", "vision")):
        with pytest.raises(UserError, match=f"'{given}' needs ") as caught:
            diag.probe(given, inputs)
        assert caught.value.tip == f'pip install "attnbias[{extra}]"'
    value = torch.randn(1, 2, 5, 4)
    output = value.mean(dim=2, keepdim=True).expand_as(value)
    found = diag.metrics_of(value=value, output=output, pattern=torch.full((1, 2, 5, 5), 0.2))
    cosines = torch.cosine_similarity(output.double(), value.double(), dim=-1).mean(dim=-1).flatten()
    measured = torch.tensor(found.query("metric == 'cos_y_vself'")["value"].to_list())
    assert torch.allclose(measured.double(), cosines, atol=1e-6)


def test_an_import_that_nobody_foresaw_names_the_extra_too(
    bare: Path, attnbias: Attnbias, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trips(*given: object, **named: object) -> None:
        import transformers.models  # noqa: F401

    monkeypatch.setattr("diag.models.names.resolve.listing", trips)
    ended = attnbias("models")
    assert ended.lines == [
        "error: this needs transformers, which is not installed",
        'tip: pip install "attnbias[text]"',
    ]


def test_what_is_installed_is_not_missed() -> None:
    need("nothing", *EXTRAS)


def test_every_extra_brings_what_it_is_named_for() -> None:
    """And none of it is in the base installation."""
    extras = PROJECT["optional-dependencies"]
    base = names_in(PROJECT["dependencies"])
    for library, (package, extra) in EXTRAS.items():
        brought = names_in(extras[extra])
        if library == "webdataset":  # by open_clip_train's own extra
            assert any(line.startswith("open-clip-torch[training]") for line in extras[extra])
        else:
            assert package.replace("_", "-") in brought
        assert package.replace("_", "-") not in base
    assert extras["all"] == ["attnbias[vision,text,tl,train,diffusers]"]
    assert set(EXTRAS) >= {library for family in all_families() for library in family.needs}


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])
    assert [author["name"] for author in citation["authors"]] == [one["name"] for one in PROJECT["authors"]]
