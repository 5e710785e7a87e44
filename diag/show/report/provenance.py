"""Where the numbers come from: manifests of runs as terms and values for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from diag.results.left_out import left_out

NOTES = {
    "as_computed": (
        "values as_computed: biases are in the values. Each row of the attention pattern sums to 1, so a "
        "constant in V (the projection's bias, the norm's shift) enters every output and every value and "
        "moves their cosine without any redundancy between tokens. Libraries that fold biases away report "
        "other numbers."
    ),
    "bias_free": (
        "values bias_free: the constant that the projection's bias and the norm's shift add to every value "
        "was taken out before anything was measured. Libraries that keep biases report other cosines."
    ),
    "excluded": (
        "first token excluded: the first token of a causal model sees only itself, so its output is its "
        "value whatever the model learned. It is left out of every number about outputs and attention."
    ),
}
"""What a convention of values, and of the first token, means."""

MODEL = (
    *("resolved", "family", "tower", "layers", "inputs", "revision", "checkpoint", "weights"),
    *("weights_sha256", "model_args", "patch_size", "image_size", "context", "bos", "preprocessing"),
)
"""What is shown of a model's entry in a manifest; `INPUT` of an input's."""
INPUT = ("source", "count", "sha256", "content")
TERMS = {
    "resolved": "resolved to",
    "weights_sha256": "weights SHA-256",
    "model_args": "model arguments",
    "bos": "BOS",
    "sha256": "SHA-256 of all",
    "content": "SHA-256 of those measured",
}
"""What the page calls them, where it is not the key in words."""

Terms = tuple[tuple[str, str], ...]
FAILURES_SHOWN = 50


@dataclass(frozen=True)
class Source:
    """One run: terms about the whole, about each model and input, what failed, and the whole plan as JSON."""

    name: str
    status: str
    command: str
    terms: Terms
    models: tuple[tuple[str, Terms], ...]
    inputs: tuple[tuple[str, Terms], ...]
    failures: tuple[tuple[str, str], ...]
    more_failures: int
    plan: str


def source(name: str, manifest: Mapping[str, Any]) -> Source:
    """The manifest of a run or attend folder for people. What the manifest does not hold is left out."""
    plan, environment = manifest.get("plan") or {}, manifest.get("environment") or {}
    packages = environment.get("packages") or {}
    inputs = manifest.get("inputs") or {}
    if "source" in inputs:  # a sweep has one kind
        inputs = {"input": inputs}
    if manifest.get("input"):  # an attend folder has one
        inputs = {manifest["input"].get("kind", "input"): manifest["input"]}
    failures = [
        (str(key), str(why))
        for part in ("failed_models", "failed_inputs")
        for key, why in (manifest.get(part) or {}).items()
    ]
    return Source(
        name=name,
        status=str(manifest.get("status", "unknown")),
        command=str(manifest.get("command", "")),
        terms=_terms(
            {
                "status": manifest.get("status"),
                "measured": _day(manifest.get("started")),
                "took": f"{manifest['seconds']:.0f} s" if manifest.get("seconds") is not None else None,
                "device": manifest.get("device"),
                "dtype": plan.get("dtype"),
                "seed of the bootstrap": plan.get("seed"),
                "attnbias": environment.get("attnbias"),
                "source revision": environment.get("git"),
                "python": environment.get("python"),
                "platform": environment.get("platform"),
                "packages": ", ".join(f"{key} {found}" for key, found in packages.items() if found),
                "key of the run": manifest.get("key"),
            }
        ),
        models=tuple(_model(entry) for entry in manifest.get("models") or [manifest.get("model")] if entry),
        inputs=tuple((str(kind), _terms(_named(found, INPUT))) for kind, found in inputs.items()),
        failures=tuple(failures[:FAILURES_SHOWN]),
        more_failures=max(len(failures) - FAILURES_SHOWN, 0),
        plan=json.dumps(plan, indent=1, ensure_ascii=False),
    )


def notes(values: Iterable[Any], first_tokens: Iterable[Any]) -> list[str]:
    """What has to be said about how values and the first token were taken, each once."""
    return [NOTES[name] for name in dict.fromkeys(map(str, [*values, *first_tokens])) if name in NOTES]


def _model(entry: Mapping[str, Any]) -> tuple[str, Terms]:
    terms = _named(entry, MODEL) | {
        "notes": "; ".join(map(str, entry.get("notes") or [])),
        "layers left out": "; ".join(left_out(entry)),
    }
    return str(entry.get("given", "")), _terms(terms)


def _named(entry: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    return {TERMS.get(key, key.replace("_", " ")): entry.get(key) for key in keys}


def _terms(found: Mapping[str, Any]) -> Terms:
    return tuple((term, _said(value)) for term, value in found.items() if value not in (None, "", {}, [], ()))


def _said(value: Any) -> str:
    """Nested values in one line, without the signs of JSON."""
    if isinstance(value, Mapping):
        return "; ".join(f"{key.replace('_', ' ')} {_said(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_said, value))
    return str(value)


def _day(moment: Any) -> str | None:
    """`2026-01-31 12:00 UTC` for the manifest's `2026-01-31T12:00:00Z`."""
    return f"{moment[:10]} {moment[11:16]} UTC" if isinstance(moment, str) and len(moment) >= 16 else None
