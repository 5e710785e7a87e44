"""What `diag.probe` hands out: the tables of a run in memory, and how they are kept and read again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from diag.errors import UserError
from diag.inputs.items import sha256
from diag.inputs.outside import mapping_in
from diag.inputs.tables import NUMBER, PLACE, Layout, read_table
from diag.results.collect import Run
from diag.results.folder import HEADS, LAYERS, MANIFEST, SAMPLES, TOKENS
from diag.results.hashes import hashes
from diag.results.manifest import FORMAT, again
from diag.results.manifest import PROBE as VERB
from diag.results.staging import is_empty, staged
from diag.results.tables import layer_samples, read_heads, read_layers, read_manifest, read_samples, tables
from diag.results.writing import json_text, write, write_json
from diag.run.environment import environment
from diag.run.run_folder import PROBE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAVED = "diag.Probe"
"""In the manifest of a folder that `Probe.save` wrote: its tables follow from its samples."""


@dataclass(frozen=True, repr=False)
class Probe:
    """What was measured.

    layers: one row per (model, tower, layer, tokens, metric): mean over heads within each input, then
        mean, std, 95 % bootstrap interval and n over inputs.
    heads: the same per head. samples: one value per input, layer, head and metric.
    failed: inputs that could not be read, or gave values that are not finite, with the reason.
    skipped: layers that are not measured, by path, with the reason.
    depths: how many layers each tower has, also where only some are measured.
    meaning: what was found about the calls of each tower: whose their rows are, whether the model is random …
    tokens: one value per layer, token set, metric, input, head and token that counts; of
        `probe(…, per_token=True)`, and of metrics that have one for each token.
    manifest: the plan, the inputs and the models, as a run folder has them.
    """

    layers: pd.DataFrame
    heads: pd.DataFrame
    samples: pd.DataFrame
    failed: dict[str, str]
    skipped: dict[str, str] = field(default_factory=dict)
    meaning: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    depths: dict[str, int] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)
    tokens: pd.DataFrame | None = None

    @property
    def notes(self) -> list[str]:
        """Sentences about what is empty in these tables, and where."""
        empty = (said for entry in self.manifest.get("models", ()) for said in entry.get("emptied", ()))
        return list(dict.fromkeys(empty))

    def __repr__(self) -> str:
        """In one line: the model, and how much of what there is; the numbers are in the tables."""
        lines = []
        for (model, tower), part in self.layers.groupby(["model", "tower"], sort=False):
            layers, depth = part["layer"].nunique(), self.depths.get(str(tower), 0)
            of = f" of {depth}" if layers < depth else ""
            sets, metrics = "+".join(map(str, part["tokens"].unique())), part["metric"].nunique()
            sizes = _count(layers, "layer", of), _count(metrics, "metric"), f"n = {part['n'].max()}"
            lines.append(f"{model} {tower}, {sets}: {', '.join(sizes)}")
        failed = f"; {len(self.failed)} failed" if self.failed else ""
        return f"Probe({'; '.join(lines)}{failed})"

    def plot(self) -> dict[str, Figure]:
        """The figures of a run folder, by name: curves per layer and layer × head maps."""
        from diag.show.figures import draw_run

        lines = self.layers[["model", "tower"]].drop_duplicates().itertuples(index=False)
        depths = {(model, tower): self.depths[tower] for model, tower in lines if tower in self.depths}
        return {name: figure for name, (figure, _) in draw_run(self.layers, self.heads, depths).items()}

    def save(self, folder: str | Path) -> Path:
        """Writes a folder that `Probe.load`, `diag.compare` and the command line read as a run; its path.

        Raises UserError for a folder in which anything lies but an earlier `Probe`, or that cannot be
        written.
        """
        folder = Path(folder).expanduser()
        if not folder.is_dir() and folder.exists():
            raise UserError(f"'{folder}' is a file", "give a folder")
        if not is_empty(folder) and mapping_in(folder / MANIFEST).get("saved") != SAVED:
            raise UserError(f"'{folder}' is not empty and holds no saved Probe", "give another folder")
        with staged(folder, PROBE) as place:
            for name, table in ((SAMPLES, self.samples), (LAYERS, self.layers), (HEADS, self.heads)):
                write(table, place / name)
            if self.tokens is not None:
                write(self.tokens, place / TOKENS)
            document = {
                "format": FORMAT,
                "kind": VERB,
                "saved": SAVED,
                "status": "partial" if self.failed else "complete",
                "key": sha256(json_text(self.manifest)),
                **self.manifest,
                "failed_inputs": self.failed,
                "skipped": self.skipped,
                "meaning": self.meaning,
                "depths": self.depths,
                "environment": environment(),
                "tables": hashes(place, (SAMPLES, LAYERS, HEADS, TOKENS)),
            }
            write_json(document, place / MANIFEST)
        return folder

    @staticmethod
    def load(folder: str | Path) -> Probe:
        """What `save` wrote, number for number; also the folder of a run of the command line.

        Raises UserError for a folder that holds neither.
        """
        folder = Path(folder).expanduser()
        found = read_manifest(folder)
        samples = read_samples(folder)
        if found.get("saved") == SAVED:
            layers, heads = tables(samples, seed=int(samples["seed"].iloc[0]))
        else:
            layers, heads = read_layers(folder), read_heads(folder)
        entries = found["models"]
        return Probe(
            layers,
            heads,
            samples,
            found["failed_inputs"],
            found.get("skipped") or {k: v for entry in entries for k, v in entry["skipped_layers"].items()},
            found.get("meaning") or {entry["tower"]: entry["meaning"] for entry in entries},
            found.get("depths") or {entry["tower"]: entry["layers"] for entry in entries},
            {name: found[name] for name in ("plan", "inputs", "models", "device") if name in found},
            _tokens(folder),
        )

    def as_run(self) -> Run:
        """As runs of folders are compared; nothing is written."""
        manifest = {"key": sha256(json_text(self.manifest)), **self.manifest, "failed_inputs": self.failed}
        return Run(self.layers, self.heads, layer_samples(self.samples), manifest, Path("memory"))


def _tokens(folder: Path) -> pd.DataFrame | None:
    """The numbers of single tokens of a folder, where they were kept."""
    layout = Layout({**dict.fromkeys(("layer", "head", "token"), PLACE), "value": NUMBER}, {})
    file = folder / TOKENS
    return read_table(file, layout, "table", tip=again(folder, VERB)) if file.exists() else None


def _count(number: int, what: str, of: str = "") -> str:
    """`1 of 12 layers`, `3 metrics`."""
    return f"{number}{of} {what}{'' if number == 1 and not of else 's'}"
