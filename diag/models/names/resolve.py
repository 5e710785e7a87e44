"""What a name on the command line stands for: `[family:]name[@revision][,key=value]` to a `ModelSpec`.

Resolving is separate from loading and imports nothing heavy; each family is asked what its names mean, and
asks its library only where a name could belong to it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from diag.errors import UserError, did_you_mean, one_of
from diag.models.families import FAMILIES, all_families, family_of
from diag.models.family import LIST_TIP, Listed
from diag.models.names import series
from diag.models.names.aliases import aliases
from diag.models.names.arguments import merged, read, split
from diag.models.names.hub import listed
from diag.models.names.spec import (
    CHECKPOINT,
    CHECKPOINT_KEY,
    HUB,
    SCHEMAS,
    ModelSpec,
    folder_named,
    looks_like_path,
    written,
)

LANGUAGE_MODELS = {
    "llama": "meta-llama/Llama-3.2-1B",
    "mistral": "mistralai/Mistral-7B-v0.1",
    "qwen": "Qwen/Qwen3-0.6B",
    "gemma": "google/gemma-3-1b-pt",
    "phi": "microsoft/phi-2",
    "opt": "facebook/opt-125m",
    "olmo": "allenai/OLMo-1B-hf",
    "smollm": "HuggingFaceTB/SmolLM2-135M",
    "t5": "google-t5/t5-small",
    "bert": "google-bert/bert-base-uncased",
    "roberta": "FacebookAI/roberta-base",
}
"""How names of language models begin, which registries of image models only resemble; and one of each."""

NO_REGISTRY = 'names of timm and open_clip are known with pip install "attnbias[vision]"'
"""The tip for a name that may be one of theirs, where they are not installed."""

LONGEST_NAME = 4096
"""Bytes of a name as typed: the longest path that a system takes."""


def parse(
    text: str,
    *,
    checkpoint: str | Path | None = None,
    model_args: Sequence[str] = (),
    random_init: bool = False,
    trust_remote_code: bool = False,
) -> ModelSpec:
    """Resolves one name as typed.

    checkpoint, model_args: what holds for every model beside what the name itself says; `key=value`
        each, values are Python literals, anything else is a string.
    Raises UserError for unknown names (with near ones), ambiguous names (with the explicit forms),
    arguments that are not `key=value`, and arguments that are given twice and differ.

    >>> parse("pythia-160m@step3000").resolved
    'hf:EleutherAI/pythia-160m@step3000'
    """
    _refuse_unwritable(text)
    name, pairs = split(text)
    common = read(model_args)
    if checkpoint is not None:
        common[CHECKPOINT] = Path(checkpoint)
    given = merged(read(pairs, text.strip()), common, text.strip())
    prefix, rest = _split_family(name)
    file, key = given.pop(CHECKPOINT, None), given.pop(CHECKPOINT_KEY, None)
    if key is not None and file is None:
        raise UserError(
            f"'{text.strip()}' gives {CHECKPOINT_KEY} without a checkpoint",
            f"name the file, too: {CHECKPOINT}=FILE,{CHECKPOINT_KEY}={key}",
        )
    asked = ModelSpec(
        name,
        prefix or "",
        rest,
        checkpoint=file,
        checkpoint_key=key if key is None else str(key),
        model_args=given,
        random_init=random_init,
        trust_remote_code=trust_remote_code,
    )
    candidates = [_in_family(asked)] if prefix else _candidates(asked)
    if not candidates:
        raise unknown(name)
    if len(candidates) > 1:
        typed = "".join(f",{pair}" for pair in pairs)
        raise UserError(
            f"model '{name}' is ambiguous",
            f"write {one_of(dict.fromkeys(spec.base + typed for spec in candidates))}",
        )
    return replace(candidates[0], given=text.strip())


def unknown(given: str) -> UserError:
    """The error for a name that nothing knows, with up to three near ones."""
    typed = given.lower()
    begun = (name for word, name in LANGUAGE_MODELS.items() if typed.startswith(word) and "vit" not in typed)
    example = next(begun, None)
    if example is None:
        there = [family for family in all_families() if all(map(find_spec, family.needs))]
        known = [*aliases(), *(name for family in there for name in family.names())]
        tip = did_you_mean(given, known) or (NO_REGISTRY if find_spec("timm") is None else LIST_TIP)
    else:
        tip = did_you_mean(given, aliases()) or f"name it as the hub does, ORG/NAME: for example -m {example}"
    return UserError(f"model '{given}' not found", tip)


def listing(query: str | None = None) -> list[dict[str, str]]:
    """Rows `name, resolves_to, tokens, licence, note` for `attnbias models [QUERY]`.

    Without a query: the short names and the embedded models. With one: every name of every
    registry that contains all its words, text models on the hub, and series, as `--series NAME`.
    """
    always = [family for family in all_families() if family.always_listed]
    rows = []
    for name, entry in aliases().items():
        full = entry["model"] + written(entry.get("model_args", {}))
        rows.append(Listed(name, full, entry["tokens"], entry["licence"], entry.get("note", "")))
    rows += [family.row(name) for family in always for name in family.names()]
    if query:
        words = query.lower().split()

        def matches(text: str) -> bool:
            return all(word in text.lower() for word in words)

        rows = [row for row in rows if matches(f"{row.name} {row.resolves_to}")]
        for family in all_families():
            if not family.always_listed:
                names = (name for name in family.names() if matches(f"{family.prefix}:{name}"))
                rows += [family.row(name) for name in names]
        known = {row.resolves_to for row in rows}
        rows += [row for row in listed() if matches(row.resolves_to) and row.resolves_to not in known]
        rows += map(_of_series, series.listing(query))
    return [asdict(row) for row in rows]


def _of_series(row: Mapping[str, Any]) -> Listed:
    members = row["members"]
    return Listed(
        f"--series {row['name']}", f"{len(members)} models, {members[0]} … {members[-1]}", note=row["varies"]
    )


def _refuse_unwritable(text: str) -> None:
    """Raises UserError for a name that no file and no table could hold."""
    odd = next((character for character in text if unicodedata.category(character) in ("Cc", "Cs")), None)
    if odd is not None:
        raise UserError(
            f"the model's name {text[:80]!r} holds the character {odd!r}", "names are text on one line"
        )
    if len(text.encode()) > LONGEST_NAME:
        raise UserError(
            f"the model's name '{text[:40]}…' is {len(text.encode()):,} bytes long",
            f"names and paths have at most {LONGEST_NAME:,}",
        )


def _split_family(given: str) -> tuple[str | None, str]:
    head, colon, rest = given.partition(":")
    if not colon or given.startswith(SCHEMAS) or "/" in head or len(head) == 1:
        return None, given
    if head not in FAMILIES:
        near = did_you_mean(head, FAMILIES)
        raise UserError(
            f"model '{given}': there is no family '{head}'", near or f"families are {one_of(FAMILIES)}"
        )
    return head, rest


def _split_revision(spec: ModelSpec) -> ModelSpec:
    if "@" not in spec.name or folder_named(spec.name):
        return spec
    base, _, revision = spec.name.rpartition("@")
    return replace(spec, name=base, revision=revision)


def _in_family(asked: ModelSpec) -> ModelSpec:
    """Resolves a name whose family is known."""
    spec = _split_revision(asked)
    family = family_of(spec.family)
    if not spec.name:
        raise UserError(f"model '{spec.given}' has no name after '{spec.family}:'", LIST_TIP)
    if "," in spec.name and not family.tagged and not folder_named(spec.name):
        raise _no_argument(spec.given)
    return family.named(spec)


def _candidates(asked: ModelSpec) -> list[ModelSpec]:
    """Every reading of a name without a family; folders and short names first."""
    given = asked.given
    if given.startswith(HUB):
        return [replace(asked, family=family.prefix) for family in all_families() if family.hub]
    found = []
    # later lines of the table are asked first, those that take nearly everything in the end
    families = all_families()[::-1]
    families.sort(key=lambda family: family.fallback)
    folder = folder_named(given)
    if folder:
        told = ((family.prefix, family.in_folder(folder, given)) for family in families)
        # the last family knows every folder, or says what it lacks
        prefix, name = next((prefix, name) for prefix, name in told if name is not None)
        found.append(replace(asked, family=prefix, name=name))
    elif looks_like_path(given):
        raise UserError(
            f"folder '{given}' does not exist", "-m takes a folder with config.json, or a model's name"
        )
    spec = _split_revision(asked)
    entry = aliases().get(spec.name.lower())
    if entry:
        return [*found, _of_alias(spec, entry)]
    for family in families:
        if not (family.fallback and found) and family.claims(spec):
            found.append(_in_family(replace(asked, family=family.prefix)))
    if not found and "," in spec.name:
        raise _no_argument(given)
    return found


def _no_argument(given: str) -> UserError:
    name, _, rest = given.partition(",")
    tagged = " and ".join(family.prefix for family in all_families() if family.tagged)
    return UserError(
        f"'{rest.strip()}' in '{given}' is not key=value",
        f"for example {name},img_size=384; only {tagged} names take ARCHITECTURE,TAG",
    )


def _of_alias(spec: ModelSpec, entry: Mapping[str, Any]) -> ModelSpec:
    own = None if spec.published else entry.get("with_checkpoint")
    prefix, _, name = (own or entry["model"]).partition(":")
    full = replace(spec, family=prefix, name=name)
    if not own:
        arguments = {**entry.get("model_args", {}), **spec.model_args}
        full = replace(full, model_args=arguments, note=entry.get("note"))
    return family_of(prefix).named(full)
