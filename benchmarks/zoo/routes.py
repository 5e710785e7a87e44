"""The two ways in which attnbias is asked for a model: as a module on ready batches, and by name."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from zoo.case import Case, forward, inputs_of
from zoo.evidence import Evidence, gathered
from zoo.judge import FALSE, REFUSED, Answer, Verdict, judged
from zoo.reference import METRICS

TEXTS = [
    "A cat sat on the warm mat while it rained outside, and slept.",
    "Zebras graze far from rivers; lions watch them through tall grass.",
]
WORST_FIRST = ("wrong", "silently incomplete", FALSE)


def as_module(case: Case) -> Verdict:
    """`diag.probe(module, batches)`, judged."""
    seen = module_evidence(case)
    if seen.coupled and isinstance(case.batch, Mapping) and "attention_mask" in case.batch:
        # the model itself gives an input other outputs where another one is padded
        whole = torch.ones_like(case.batch["attention_mask"])
        case.batch = {**case.batch, "attention_mask": whole}
        seen = module_evidence(case)
        seen.notes.append("judged without padding, beside which the model itself gives other outputs")
    # padding that it makes itself, such as that of durations, is not there in an input alone
    batches = inputs_of(case) if seen.coupled and not seen.failed else [case.batch]
    return judged(seen, asked(case.module, batches))


def module_evidence(case: Case) -> Evidence:
    """What the judge sees of a module and its batch."""
    each = inputs_of(case)
    mask = case.batch.get("attention_mask") if isinstance(case.batch, Mapping) else None
    masks = list(mask.bool()) if mask is not None and mask.ndim == 2 else None
    found = gathered(case.module, lambda batch: forward(case.module, batch), case.batch, each, masks)
    if isinstance(case.batch, Mapping):
        found.texts = frozenset(x.shape[-1] for name, x in case.batch.items() if name.endswith("input_ids"))
    return found


def asked(model: Any, inputs: Any, **options: Any) -> Answer:
    """What attnbias answers."""
    import diag

    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            found = diag.probe(model, inputs, metrics=list(METRICS), batch_size=2, **options)
    except diag.UserError as error:
        return Answer(error=str(error))
    except Exception as error:
        return Answer(error=f"{type(error).__name__}: {error}", raw=True)
    if found.failed:
        return Answer(error=f"inputs failed: {found.failed}")
    return Answer(found.samples, getattr(found, "skipped", {}))


def by_name(case: Case) -> Verdict:
    """`diag.probe(folder, inputs)` for each tower that attnbias finds in the folder; the worst verdict."""
    from diag import UserError
    from diag.models import load
    from diag.models.names.resolve import parse

    name = str(case.folder)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = load(parse(name), device="cpu", dtype=torch.float32)
    except UserError as error:
        return judged(module_evidence(case), Answer(error=str(error)))
    except Exception as error:
        return Verdict(FALSE, [f"{type(error).__name__}: {error}"])
    verdicts = [of_tower(case, name, loaded, kind) for kind in loaded.towers]
    order = [*WORST_FIRST, REFUSED, "partial (named)", "exact"]
    worst = min(verdicts, key=lambda verdict: order.index(verdict.word))
    if len(verdicts) > 1:
        told = [f"{kind}: {v.word}" for kind, v in zip(loaded.towers, verdicts, strict=True)]
        worst.reasons = [*worst.reasons, f"towers: {', '.join(told)}"]
    return worst


def of_tower(case: Case, name: str, loaded: Any, kind: str) -> Verdict:
    """One tower's verdict."""
    from diag.inputs.given import as_inputs
    from diag.run.shards import tower_samples

    tower = loaded.towers[kind]
    given: Any = TEXTS if tower.input_kind == "text" else images()
    if getattr(tower, "frames", None):
        given = clips_in(Path(name) / "clips", tower.frames)
    length = {}
    if tower.input_kind == "text" and not tower.facts.get("context"):
        length = {"seq_len": 16}
    elif tower.input_kind == "text":
        length = {"seq_len": min(16, tower.facts["context"])}
    wanted = [name for name in ("patch", "image", "text", "all") if name in tower.token_sets]
    answer = asked(name, given, limit=2, tokens=wanted, **length)
    if "takes exactly" in answer.error:
        length = {}
        answer = asked(name, [text * 6 for text in given], limit=2, tokens=wanted)
        given = [text * 6 for text in given]
    try:
        samples = tower_samples(
            tower, as_inputs(given, tower.input_kind), limit=2, seq_len=length.get("seq_len")
        )
        with contextlib.redirect_stderr(io.StringIO()):
            each = [tower.encode([sample]) for sample in samples]
            together = tower.encode(samples) if tower.max_batch is None else None
    except Exception as error:
        return (
            Verdict(FALSE, [answer.error or f"{type(error).__name__}: {error}"])
            if answer.samples is None
            else Verdict("wrong", [str(error)])
        )
    if together is None:
        together = each[0]
    prefix = case.prefix if kind == "vision" else None
    seen = gathered(loaded.module, tower.forward, together, each, prefix=prefix)
    seen.coupled = seen.coupled and tower.max_batch is None
    if tower.input_kind == "text":
        seen.texts = frozenset(call.lengths[0] for call in seen.calls[0]) if seen.calls else frozenset()
    return judged(seen, answer)


def clips_in(folder: Path, frames: int) -> str:
    """A folder of two clips, one of each image, in a folder of frames for each."""
    for number, image in enumerate(images()):
        (folder / f"clip-{number}").mkdir(parents=True, exist_ok=True)
        for frame in range(frames):
            image.rotate(frame).save(folder / f"clip-{number}" / f"frame-{frame:03d}.png")
    return str(folder)


def images() -> list[Image.Image]:
    """Two different images of noise over a gradient."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 200, (2, 96, 96, 3), dtype=np.uint8)
    ramp = np.linspace(0, 55, 96, dtype=np.uint8)[:, None]
    return [Image.fromarray(noise[0] + ramp[..., None]), Image.fromarray(noise[1] + ramp.T[..., None])]
