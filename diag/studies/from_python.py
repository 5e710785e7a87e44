"""The verbs that come after a probe, from Python: `diag.compare`, `diag.intervene`, `diag.report`.

`diag.attend` is a module, with its own functions (`docs/attend.md`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diag.errors import UserError
from diag.results.collect import Collection, Run, collected, read_run
from diag.run.in_memory import Probe
from diag.studies.compare import Comparison
from diag.studies.compare import compare as compared

if TYPE_CHECKING:
    from diag.show.report import Report
    from diag.studies.intervene.run import Sweep

Measured = Probe | str | Path
"""A run: what `diag.probe` handed out, or a run folder."""


def compare(
    *runs: Measured, control: str | None = None, growth: tuple[int, int] | None = None, seed: int = 0
) -> Comparison:
    """Profiles, differences and a verdict of runs side by side; `print` shows them as the command line does.

    runs: each what `diag.probe` handed out, or a run folder. Inputs that two of them share are resampled
        together, so that what they have in common cancels in their difference.
    control, growth: as `diag.studies.compare.compare` has them.

    Raises UserError where there is no run, or a folder holds none.

    >>> from diag.run.api import probe
    >>> found = compare(*(probe(f"demo:vit-p{size}", "demo", limit=2) for size in (16, 8)))
    >>> bool(found.differences["paired"].all())
    True
    """
    return compared(_side_by_side(runs), growth=growth, seed=seed, control=control)


def report(*runs: Measured, path: str | Path = "report.html", title: str | None = None) -> Report:
    """Writes runs as one self-contained HTML page, whose place is `report(…).path`.

    runs: as in `compare`; folders of attend, compare, intervene, train, audit and readout may be among them.

    Raises UserError where nothing can be read, or where something lies at `path` that is no report.
    """
    from diag.show.report import of_another_verb, write_page

    folders = [Path(run).expanduser() for run in runs if isinstance(run, str | Path)]
    others = [folder for folder in folders if of_another_verb(folder)]
    measured = [
        run for run in runs if not isinstance(run, str | Path) or Path(run).expanduser() not in others
    ]
    collection = Collection.empty() if others and not measured else _side_by_side(measured)
    return write_page(collection, others, Path(path), title=title)


def intervene(
    model: str,
    interventions: Sequence[str] | str = ("xsa",),
    *,
    images: str | Path | None = None,
    texts: str | Path | None = None,
    scopes: Sequence[str] | str = ("one", "first", "last"),
    heads: bool = False,
    layers: Sequence[int] | str | None = None,
    limit: int = 32,
    seq_len: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str = "float32",
    seed: int = 0,
    folder: str | Path | None = None,
    overwrite: bool = False,
) -> Sweep:
    """Changes each layer's attention in turn: what it costs, and whether the bias predicts it.

    model, interventions, scopes and sources are those of `attnbias intervene`, and so is the folder that is
    written: what is there already is read. The result has `sensitivity` and `relations`, both tables.

    Raises UserError for what you can mend.
    """
    from diag.studies.intervene.plan import IntervenePlan
    from diag.studies.intervene.run import run_intervene

    plan = IntervenePlan.checked(
        models=(model,),
        interventions=_words(interventions),
        scopes=_words(scopes),
        images=None if images is None else str(images),
        texts=None if texts is None else str(texts),
        heads=heads,
        layers=None if layers is None else _words(layers),
        limit=limit,
        seq_len=seq_len,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    return run_intervene(plan, None if folder is None else Path(folder), overwrite=overwrite)


def _side_by_side(runs: Iterable[Measured]) -> Collection:
    """Runs in memory and in folders, in order. A model's name is that of its run in memory."""
    named = list[tuple[str, Run]]()
    for run in runs:
        if isinstance(run, Probe):
            named.append((str(run.layers["model"].iloc[0]), run.as_run()))
        elif isinstance(run, str | Path):
            folder = Path(run).expanduser()
            named.append((folder.resolve().name, read_run(folder)))
        else:
            raise UserError(
                f"a {type(run).__name__} is given where a run is due",
                "give what diag.probe handed out, or a run folder, each by itself: compare(a, b)",
            )
    return collected(named)


def _words(given: Sequence[object] | object) -> tuple[object, ...]:
    """What is no list is a list of one."""
    return tuple(given) if isinstance(given, Sequence) and not isinstance(given, str) else (given,)
