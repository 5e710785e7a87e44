"""What a name on the command line stands for: `[family:]name[@revision][,key=value]` to a `ModelSpec`.

Resolving is separate from loading and imports nothing heavy; the registries of timm and open_clip
are asked only where a name could belong to them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diag.errors import UserError, did_you_mean, one_of
from diag.models.names.arguments import CHECKPOINT, SCHEMAS, merged, read, split, written
from diag.models.names.registries import (
    aliases,
    demo_models,
    every_name,
    open_clip_configs,
    open_clip_row,
    short_rows,
    timm_pretrained,
    timm_row,
)

FAMILIES = ("timm", "open_clip", "hf", "tl", "demo")
LIST_TIP = "'attnbias models' lists short names, 'attnbias models QUERY' searches every name"

_TIMM_NAME = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)?")
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, of which family, with which weights.

    given: what the user typed. name: the name inside the family.
    checkpoint: a file with the weights; None for the published ones.
    random_init: no weights at all, for tests and floors.
    trust_remote_code: whether code inside a hub repository may run.
    note: what the user should know about the resolution; printed with it.
    """

    given: str
    family: str
    name: str
    revision: str | None = None
    checkpoint: Path | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    random_init: bool = False
    trust_remote_code: bool = False
    note: str | None = None

    @property
    def base(self) -> str:
        """The full name without arguments."""
        return f"{self.family}:{self.name}" + (f"@{self.revision}" if self.revision else "")

    @property
    def resolved(self) -> str:
        """The full name that resolves to the same model without any alias, arguments in order."""
        file = {} if self.checkpoint is None else {CHECKPOINT: self.checkpoint}
        return self.base + written({**self.model_args, **file})


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
    name, pairs = split(text)
    common = read(model_args)
    if checkpoint is not None:
        common[CHECKPOINT] = Path(checkpoint)
    given = merged(read(pairs, text.strip()), common, text.strip())
    file = given.pop(CHECKPOINT, None)
    family, rest = _split_family(name)
    own_weights = file is not None or random_init
    candidates = [_in_family(family, rest, name)] if family else _candidates(name, own_weights)
    if not candidates:
        raise unknown(name)
    if len(candidates) > 1:
        typed = "".join(f",{pair}" for pair in pairs)
        raise UserError(
            f"model '{name}' is ambiguous",
            f"write {one_of(dict.fromkeys(spec.base + typed for spec in candidates))}",
        )
    spec = replace(
        candidates[0],
        given=text.strip(),
        checkpoint=file,
        model_args={**candidates[0].model_args, **given},
        random_init=random_init,
        trust_remote_code=trust_remote_code,
    )
    if own_weights:
        return _without_tag(spec) if spec.family == "open_clip" else spec
    return _native_activation(spec) if spec.family == "timm" else spec


def _without_tag(spec: ModelSpec) -> ModelSpec:
    """An open_clip architecture whose weights come from elsewhere."""
    return spec if spec.name.startswith(SCHEMAS) else replace(spec, name=spec.name.partition("/")[0])


def unknown(given: str) -> UserError:
    """The error for a name that nothing knows, with up to three near ones."""
    return UserError(f"model '{given}' not found", did_you_mean(given, every_name()) or LIST_TIP)


def listing(query: str | None = None) -> list[dict[str, str]]:
    """Rows `name, resolves_to, tokens, licence, note` for `attnbias models [QUERY]`.

    Without a query: the short names and the embedded models. With one: every name of every
    registry that contains all its words.
    """
    rows = short_rows()
    if not query:
        return rows
    words = query.lower().split()

    def matches(text: str) -> bool:
        return all(word in text.lower() for word in words)

    found = [row for row in rows if matches(f"{row['name']} {row['resolves_to']}")]
    found += [timm_row(name) for name in timm_pretrained() if matches(f"timm:{name}")]
    return found + [open_clip_row(name) for name in open_clip_configs() if matches(f"open_clip:{name}")]


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


def _split_revision(name: str) -> tuple[str, str | None]:
    if "@" not in name or _folder(name):
        return name, None
    base, _, revision = name.rpartition("@")
    return base, revision


def _folder(name: str) -> Path | None:
    path = Path(name).expanduser()
    return path if name and path.is_dir() else None


def _in_family(family: str, rest: str, given: str) -> ModelSpec:
    """Resolves a name whose family was given."""
    name, revision = _split_revision(rest)
    spec = ModelSpec(given, family, name, revision)
    if not name:
        raise UserError(f"model '{given}' has no name after '{family}:'", LIST_TIP)
    if "," in name and family != "open_clip" and not _folder(name):
        raise _no_argument(given)
    if family in ("hf", "tl"):
        return _hub_or_folder(spec)
    if family == "demo":
        if name not in demo_models():
            raise UserError(f"model '{given}' not found", f"embedded models: {_list(demo_models())}")
    elif family == "timm":
        if not name.startswith(SCHEMAS):
            _check_timm(name, given)
    else:
        if revision and not name.startswith("hf-hub:"):
            raise UserError(
                f"model '{given}': open_clip names weights by tag, not by revision",
                "write open_clip:NAME/TAG",
            )
        spec = replace(spec, name=_open_clip_name(name, given))
    if revision and family == "demo":
        raise UserError(f"model '{given}': embedded models have no revisions", f"write demo:{name}")
    return spec


def _hub_or_folder(spec: ModelSpec) -> ModelSpec:
    name = spec.name
    if _folder(name):
        return spec
    alias = aliases().get(name.lower(), {}).get("model", "")
    if alias.startswith("hf:"):
        return replace(spec, name=alias.removeprefix("hf:"))
    if _looks_like_path(name):
        raise UserError(f"folder '{name}' does not exist", f"{spec.family}: takes a folder or ORG/NAME")
    return spec


def _looks_like_path(name: str) -> bool:
    return name.startswith(("./", "../", "/", "~")) or name.endswith("/") or name.count("/") > 1


def _candidates(given: str, own_weights: bool) -> list[ModelSpec]:
    """Every reading of a name without a family; folders and short names first."""
    found = []
    if given.startswith("hf-hub:"):
        return [ModelSpec(given, family, given) for family in ("timm", "open_clip")]
    folder = _folder(given)
    if folder:
        found.append(_of_folder(given, folder))
    elif _looks_like_path(given):
        raise UserError(
            f"folder '{given}' does not exist", "-m takes a folder with config.json, or a model's name"
        )
    name, revision = _split_revision(given)
    entry = aliases().get(name.lower())
    if entry:
        return [*found, _of_alias(given, entry, revision, own_weights)]
    architecture = re.split("[/,]", name)[0]
    if architecture in open_clip_configs():
        found.append(_in_family("open_clip", given, given))
    elif near := _near_architecture(architecture, name):
        raise UserError(f"model '{given}' not found", near)
    if _TIMM_NAME.fullmatch(name) and _timm_knows(name):
        found.append(_in_family("timm", given, given))
    if not found and "," in name:
        raise _no_argument(given)
    if not found and _HUB_NAME.fullmatch(name):
        found.append(ModelSpec(given, "hf", name, revision))
    return found


def _no_argument(given: str) -> UserError:
    name, _, rest = given.partition(",")
    return UserError(
        f"'{rest.strip()}' in '{given}' is not key=value",
        f"for example {name},img_size=384; only open_clip names take ARCHITECTURE,TAG",
    )


def _near_architecture(architecture: str, name: str) -> str | None:
    """The tip for a mistyped `ViT-B-16/tag`, which would otherwise pass for a hub repository."""
    import difflib

    if architecture == name or not architecture.startswith(("ViT-", "EVA", "coca_", "RN", "PE-", "ViTamin-")):
        return None
    near = difflib.get_close_matches(architecture, list(open_clip_configs()), n=3, cutoff=0.85)
    return f"did you mean {one_of(n + name[len(architecture) :] for n in near)}?" if near else None


def _of_alias(given: str, entry: Mapping[str, Any], revision: str | None, own_weights: bool) -> ModelSpec:
    own = entry.get("with_checkpoint") if own_weights else None
    family, _, name = (own or entry["model"]).partition(":")
    if revision and family == "open_clip":
        raise UserError(
            f"model '{given}': open_clip names weights by tag, not by revision", "write open_clip:NAME/TAG"
        )
    return ModelSpec(
        given,
        family,
        name,
        revision,
        model_args={} if own else entry.get("model_args", {}),
        note=None if own else entry.get("note"),
    )


def _of_folder(given: str, folder: Path) -> ModelSpec:
    if (folder / "open_clip_config.json").is_file():
        return ModelSpec(given, "open_clip", f"local-dir:{folder}")
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"folder '{given}' has no config.json",
            "-m takes a folder that save_pretrained wrote, or a model's name",
        )
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise UserError(
            f"'{file}' is not JSON: {error}", "save the model again with save_pretrained"
        ) from None
    if "architecture" in config and "model_type" not in config:
        return ModelSpec(given, "timm", f"local-dir:{folder}")
    return ModelSpec(given, "hf", str(folder))


def _open_clip_name(name: str, given: str) -> str:
    """`ARCHITECTURE` or `ARCHITECTURE/TAG`, checked against the configs that exist."""
    if name.startswith(SCHEMAS):
        return name
    architecture, _, tag = name.replace(",", "/", 1).partition("/")
    if architecture not in open_clip_configs():
        near = did_you_mean(architecture, open_clip_configs())
        raise UserError(f"model '{given}' not found in open_clip", near or LIST_TIP)
    return f"{architecture}/{tag.strip()}" if tag else architecture


def _timm_knows(name: str) -> bool:
    import timm

    return timm.is_model(name.partition(".")[0])


def _check_timm(name: str, given: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = did_you_mean(name, [*timm_pretrained(), *timm.list_models()])
        raise UserError(f"model '{given}' not found in timm", near or LIST_TIP)
    tags = [n.partition(".")[2] for n in timm_pretrained() if n.partition(".")[0] == architecture]
    if tag and tag not in tags:
        some = f"its tags include {one_of(tags[:3])}" if tags else "it has no published weights"
        raise UserError(f"timm's '{architecture}' has no weights '{tag}'", did_you_mean(tag, tags) or some)


def _native_activation(spec: ModelSpec) -> ModelSpec:
    """CLIP weights that were trained with QuickGELU, moved to the timm variant that computes it.

    timm builds `*_clip_224.openai` and its like with GELU, which changes every layer silently; its
    registry says so in a note. DFN weights carry no note.
    Raises UserError where timm has no such variant.
    """
    if spec.name.startswith(SCHEMAS):
        return spec
    from timm.models import get_pretrained_cfg

    config = get_pretrained_cfg(spec.name)
    architecture, _, tag = spec.name.partition(".")
    tag = tag or (config and config.tag) or ""
    if "_clip_" not in architecture or "quickgelu" in architecture or config is None:
        return spec
    native = any("natively QuickGELU" in note for note in config.notes or ()) or tag in ("dfn2b", "dfn5b")
    if not native:
        return spec
    variant = architecture.replace("_clip_", "_clip_quickgelu_")
    if f"{variant}.{tag}" in timm_pretrained():
        note = f"weights trained with QuickGELU: '{variant}' computes it, '{architecture}' does not"
        return replace(spec, name=f"{variant}.{tag}", note=note)
    size = re.match(r"vit_([a-z]+)_patch(\d+)", architecture)
    letter = {"base": "B", "large": "L", "huge": "H", "gigantic": "bigG"}.get(size[1], "") if size else ""
    own = f"ViT-{letter}-{size[2]}-quickgelu" if size else ""
    use = f"open_clip:{own}/{tag}" if own in open_clip_configs() else "open_clip's '-quickgelu' variant"
    raise UserError(
        f"'{spec.resolved}' would run with GELU, but its weights were trained with QuickGELU", f"use {use}"
    )


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"demo:{name}" for name in names)
