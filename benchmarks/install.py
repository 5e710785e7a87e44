"""What each extra of the package brings: a wheel of this checkout in bare environments, one probe in each.

    python benchmarks/install.py FOLDER [--constraint constraints.txt] [--extras vision,text]

Prints docs/install.md's table. An environment of an extra is the base one, files linked, and what pip adds.
Sizes are of site-packages without pip; times are processor time, medians of three processes. FOLDER takes
6 GB, most of which is torch. POSIX only.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
TIMES = 3

OWN_MODULE = """
import diag, torch
layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
print(diag.probe(model, [torch.randn(4, 16, 64)]).layers)
"""
OPEN_CLIP_TRAIN = """
from diag.studies.train.clip_arguments import open_clip_train
print(open_clip_train().__name__)
"""
VISION = "-m diag probe -m demo:vit-p16 --images demo --limit 4 -o run --overwrite"
TEXT = "-m diag probe -m demo:lm --texts demo --limit 4 -o run --overwrite"

PROBES: dict[str, tuple[str, Sequence[str]]] = {
    "base": ("a module of PyTorch's own, `diag.probe`", ("-c", OWN_MODULE)),
    "vision": ("`attnbias probe -m demo:vit-p16`", VISION.split()),
    "text": ("`attnbias probe -m demo:lm`", TEXT.split()),
    "tl": ("`attnbias probe -m tl:FOLDER`", TEXT.replace("demo:lm", "tl:LM").split()),
    "train": ("open_clip_train imported", ("-c", OPEN_CLIP_TRAIN)),
    "all": ("`attnbias probe -m demo:vit-p16 -m demo:lm`", f"{VISION} -m demo:lm --texts demo".split()),
}
"""What is measured in each environment: in words, and what Python is told."""


class Place(NamedTuple):
    """An environment."""

    folder: Path

    @property
    def packages(self) -> Path:
        """Its site-packages."""
        return next(self.folder.glob("lib/python*/site-packages"))

    def python(self, *words: str) -> str:
        """Runs its Python outside the checkout; what it printed. Raises CalledProcessError."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
        # not resolved: Python finds its environment by where the link lies
        command = [str(self.folder / "bin" / "python"), *words]
        ended = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if ended.returncode:
            print(ended.stderr[-2000:], file=sys.stderr)
            ended.check_returncode()
        return ended.stdout

    def install(self, *words: str) -> None:
        """Has pip install."""
        self.python("-m", "pip", "install", "--quiet", "--disable-pip-version-check", *words)

    def copy(self, name: str) -> Place:
        """Another one with the same packages, as links to the same files."""
        other = self.folder.with_name(name)
        shutil.rmtree(other, ignore_errors=True)
        shutil.copytree(self.folder, other, symlinks=True, copy_function=os.link)
        return Place(other)

    def size(self) -> tuple[int, int]:
        """Packages, and bytes of their files."""
        found = [
            file for file in self.packages.rglob("*") if file.is_file() and "__pycache__" not in file.parts
        ]
        sizes = [
            file.stat().st_size for file in found if file.relative_to(self.packages).parts[0][:4] != "pip"
        ]
        return len(list(self.packages.glob("*.dist-info"))) - 1, sum(sizes)

    def seconds(self, *words: str) -> float:
        """Processor time of a process, with those that it starts."""
        taken = []
        for _ in range(TIMES):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            self.python(*words)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return statistics.median(taken)


def main() -> None:
    """Prints a line of Markdown per environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--constraint", type=Path, default=ROOT / "constraints.txt")
    parser.add_argument("--extras", default=",".join(PROBES))
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", given.folder, ROOT], check=True
    )
    (wheel,) = given.folder.glob("attnbias-*.whl")
    constraint = ("--constraint", str(given.constraint.resolve()))
    base = Place(given.folder.resolve() / "base")
    if not base.folder.exists():
        subprocess.run([sys.executable, "-m", "venv", base.folder], check=True)
    base.install("--force-reinstall", "--no-deps", str(wheel))
    base.install(*constraint, str(wheel))
    print(f"wheel: {wheel.stat().st_size / 1e6:.1f} MB\n")
    print("| installed | packages | MB | beyond base | --help, s | import, s | probe, s | what is probed |")
    print("|---|---|---|---|---|---|---|---|")
    least = base.size()[1]
    for name in given.extras.split(","):
        place = base
        if name != "base":
            place = base.copy(name)
            place.install(*constraint, f"{wheel}[{name}]")
        words, probe = PROBES[name]
        lm = str(place.packages / "diag" / "models" / "families" / "embedded" / "lm")
        times = [
            place.seconds("-m", "diag", "--help"),
            place.seconds("-c", "import diag; diag.probe"),
            place.seconds(*(word.replace("tl:LM", f"tl:{lm}") for word in probe)),
        ]
        count, size = place.size()
        cells = [
            f"[{name}]" if name != "base" else "base",
            count,
            f"{size / 1e6:,.0f}",
            f"{(size - least) / 1e6:,.0f}",
        ]
        print("|", " | ".join([*map(str, cells), *(f"{time:.1f}" for time in times), words]), "|", flush=True)
        if place is not base:
            shutil.rmtree(place.folder)


if __name__ == "__main__":
    main()
