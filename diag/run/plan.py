"""Plans: what a command will do, checked before anything runs, and the key that identifies its result."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from diag.errors import LARGEST, UserError, ranges
from diag.inputs.images import images
from diag.inputs.items import Inputs, sha256
from diag.inputs.mistakes import mistake
from diag.inputs.texts import texts
from diag.metrics.names import metric_names
from diag.models.families import family_of
from diag.models.names.arguments import local_files, read
from diag.models.names.changes import strengths_file
from diag.models.names.resolve import parse
from diag.models.names.spec import CHECKPOINT, ModelSpec, folder_named, written
from diag.results.caveats import BY_DEFAULT
from diag.results.folder import MANIFEST, PLAN
from diag.results.hashes import sha256_of
from diag.results.writing import file_stem
from diag.run.environment import version

RUNS = Path("runs")
"""Where every verb writes unless told otherwise, so that one finds what another measured."""

HOW = frozenset({"device", "batch_size", "workers", "figures"})
"""What a plan says of how it is carried out, not of what is measured."""

SHARD_INPUTS = 16
"""Inputs per shard: what an interruption can lose. Larger batches and very many inputs have larger shards."""
MOST_SHARD_INPUTS = 256
MANY_SHARDS, FEW_SHARDS = 1024, 16


UNTRAINED, SEEDS, MOST_SEEDS = "untrained", 3, 16
"""What `--null` may name, and how many seeds that is, unless it says so."""

MOST_TOKENS = 2**31 - 1
MOST_WORKERS = 4096

WEIGHTS = frozenset({".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".npz", ".msgpack", ".h5"})
"""Endings of the files that hold weights; looked for in so many folders below one another."""
WEIGHTS_BELOW = 3

ADAPTER = "adapter_config.json"
"""What lies in a folder whose weights are not all: transformers adds them where peft is installed."""


DTYPES = {
    "float32": ("fp32", "f32", "float", "single"),
    "bfloat16": ("bf16",),
    "float16": ("fp16", "f16", "half"),
}
"""Formats of numbers, and what else they are called."""

SETS = {
    "patch": ("patches",),
    "cls": ("class", "cls_token"),
    "registers": ("register", "reg"),
    "image": ("images",),
    "text": ("texts",),
}
"""Token sets, and what else people call them."""


def _known_dtype(dtype: str) -> str:
    name = _own_name(dtype.lower().removeprefix("torch."), DTYPES)
    if name not in DTYPES:
        raise ValueError(f"is one of {', '.join(DTYPES)}")
    return name


def _own_name(given: str, names: Mapping[str, Sequence[str]]) -> str:
    """The name that something has here, whatever it was called; what is not known stays."""
    return next((name for name, others in names.items() if given in others), given)


Dtype = Annotated[str, AfterValidator(_known_dtype)]
"""The name of a format that a model can be loaded in."""


class Plan(BaseModel):
    """What a verb needs to know; frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    flags: ClassVar[Mapping[str, str]] = {"models": "--model", "model_args": "--model-arg"}
    """Options that are not called like their field."""

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """A plan from options. Raises UserError in the words of the command line."""
        try:
            return cls(**fields)
        except ValidationError as error:
            place, reason, given = mistake(error)
            option = str(place[0]) if place else "what is given"
            flag = cls.flags.get(option, "--" + option.replace("_", "-")) if place else option
            raise UserError(f"{flag} {reason}", f"given: {as_typed(given)}") from error


def as_typed(given: Any) -> str:
    """A value as it stood on the command line: of several, with commas; one that is long, in part."""
    several = isinstance(given, list | tuple)
    text = ",".join(map(str, given)) if several else str(given)
    text = text if len(text) <= 80 else f"{text[:60]}…"
    return f"'{text}'" if several or isinstance(given, str | Path) else text


class ProbePlan(Plan):
    """Everything that `attnbias probe` needs to know."""

    models: tuple[str, ...] = Field(min_length=1)
    images: str | None = None
    texts: str | None = None
    limit: int = Field(default=64, gt=0, le=LARGEST)
    seq_len: int | None = Field(default=None, ge=2, le=MOST_TOKENS)  # one token has no others to share with
    metrics: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    tokens: tuple[str, ...] | None = None
    values: str = "as_computed"
    intervene: tuple[str, ...] = ()
    null: str | None = None
    checkpoint: Path | None = None
    model_args: tuple[str, ...] = ()
    random_init: bool = False
    trust_remote_code: bool = False
    allow_random: bool = False
    dtype: Dtype = "float32"
    seed: int = Field(default=0, ge=0, le=LARGEST)
    save_activations: int = Field(default=0, ge=0, le=LARGEST)
    keep_samples: int = Field(default=4096, ge=0, le=LARGEST)
    exact: bool = False
    sampled_rows: int | None = Field(default=None, ge=64, le=LARGEST)
    # below: how, not what; they do not change the result
    device: str = "auto"
    batch_size: int = Field(default=8, ge=0, le=LARGEST)  # 0: as many as memory allows
    workers: int | None = Field(default=None, ge=0, le=MOST_WORKERS)
    figures: Literal["none", "png", "all"] = "all"

    @field_validator("layers", mode="before")
    @classmethod
    def _in_words(cls, given: Any) -> Any:
        """`("0,5-7", "last")` → (0, 5, 6, 7, -1). Raises UserError, which pydantic lets through."""
        if not isinstance(given, list | tuple):
            return given
        read = [ranges(x, "--layers", "0,5-11", from_end=True) if isinstance(x, str) else (x,) for x in given]
        return tuple(itertools.chain.from_iterable(read))

    @field_validator("tokens")
    @classmethod
    def _by_own_names(cls, sets: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return sets and tuple(dict.fromkeys(_own_name(name, SETS) for name in sets))

    @field_validator("metrics", "layers", "tokens")
    @classmethod
    def _not_empty(cls, names: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        if names == ():
            raise ValueError("names nothing")
        return names

    @field_validator("values")
    @classmethod
    def _known_values(cls, values: str) -> str:
        if values.replace("-", "_") not in ("as_computed", "bias_free"):
            raise ValueError("is as-computed or bias-free")
        return values.replace("-", "_")

    @field_validator("null")
    @classmethod
    def _known_null(cls, null: str | None) -> str | None:
        name, _, count = (null or "").partition("=")
        seeds = int(count) if re.fullmatch("[0-9]{1,3}", count) else 0 if "=" in (null or "") else SEEDS
        if null is not None and not (name.strip() == UNTRAINED and 1 <= seeds <= MOST_SEEDS):
            raise ValueError(f"is {UNTRAINED}, or {UNTRAINED}=N, N seeds from 1 to {MOST_SEEDS}")
        return null and f"{UNTRAINED}={seeds}"

    @field_validator("sampled_rows")
    @classmethod
    def _pairs_of_rows(cls, rows: int | None) -> int | None:
        if rows is not None and rows % 2:
            raise ValueError("is an even number: rows are drawn in pairs")
        return rows

    @property
    def named(self) -> str:
        """The column `inputs`: whether anybody named any."""
        return BY_DEFAULT if self.images is None and self.texts is None else "given"

    @property
    def seeds(self) -> int:
        """Of the untrained twins that each model is measured beside."""
        return seeds_in(self.null)

    def key(self, inputs: dict[str, str]) -> str:
        """Identifies the result: the plan without its `how`, the inputs' stamps, and the files that it names.

        Of models and checkpoints, sizes and times are in it; of tables of strengths, the content; of models
        on the hub, the commit.
        inputs: kind -> stamp.
        """
        what = self.model_dump(mode="json", exclude=set(HOW))
        what |= {kind: _given(what[kind]) for kind in ("images", "texts")}
        what |= self._meant()
        if self.null is None:
            del what["null"]  # runs without one have the keys that they had
        commits = {name: commit for name in self.models if (commit := _commit(name))}
        local = [path for name in self.models for path in local_files(name)]
        local += [base for path in local if (base := _base_of(path))]
        common = (self.checkpoint, read(self.model_args).get(CHECKPOINT))
        local += [Path(path).absolute() for path in common if path is not None and os.path.exists(path)]
        files: dict[str, Any] = {str(path): _stamp(path) for path in local}
        files |= {str(path): _content(path) for path in filter(None, map(strengths_file, self.changes))}
        document: dict[str, Any] = {"plan": what, "inputs": inputs, "files": files, "version": version()}
        if any(os.path.exists(path / ADAPTER) for path in local):
            document["peft"] = _peft()  # without it, such a folder is loaded as another model
        if commits:
            document["commits"] = commits
        return sha256(json.dumps(document, sort_keys=True))

    def _meant(self) -> dict[str, Any]:
        """Fields that can be typed in several ways, in the one that stands for all: groups of metrics are
        written out, layers and arguments in order, a checkpoint's path is whole.

        Which layer -1 is only the loaded model tells.
        """
        try:
            metrics = metric_names(self.metrics)
        except UserError:  # which is told where they are read
            metrics = list(self.metrics or ())
        arguments = read(self.model_args)
        if CHECKPOINT in arguments:
            arguments[CHECKPOINT] = Path(arguments[CHECKPOINT]).absolute()
        return {
            "metrics": metrics,
            "layers": self.layers and sorted(set(self.layers)),
            "model_args": written(arguments),
            "checkpoint": self.checkpoint and str(self.checkpoint.absolute()),
        }

    @property
    def changes(self) -> tuple[str, ...]:
        """Everything that is done to attention, as typed."""
        return self.intervene


def seeds_in(null: str | None) -> int:
    """How many seeds the `null` of a plan is of: `untrained=3` → 3, None → 0."""
    return 0 if null is None else int(null.partition("=")[2])


def what_differs(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Why two documents of runs (`plan.json`) have different keys, as words behind "holds another run".

    Nothing where the plans differ, or say nothing: that needs no words.
    """
    plans = []
    for document in (ours, theirs):
        plan = document.get("plan")
        plans.append({k: v for k, v in plan.items() if k not in HOW} if isinstance(plan, dict) else None)
    if plans[0] is None or plans[0] != plans[1]:
        return ""
    stamps = [_stamps_in(document) for document in (ours, theirs)]
    if stamps[1] and stamps[0] != stamps[1]:
        return ": its inputs were replaced since (names, sizes or times have changed)"
    return ": model files were replaced since, or it is of another version of attnbias"


def _stamps_in(document: Mapping[str, Any]) -> dict[str, str]:
    inputs = document.get("inputs")
    known = inputs.items() if isinstance(inputs, dict) else ()
    return {kind: given["stamp"] for kind, given in known if isinstance(given, dict) and "stamp" in given}


def specs_of(plan: ProbePlan) -> list[ModelSpec]:
    """What the plan's model names resolve to."""
    return [
        parse(
            name,
            checkpoint=plan.checkpoint,
            model_args=plan.model_args,
            random_init=plan.random_init,
            trust_remote_code=plan.trust_remote_code,
        )
        for name in plan.models
    ]


def shard_inputs(plan: ProbePlan) -> int:
    """Inputs per shard of a run that begins: 16, doubled while there would be more than 1,024 shards.

    A batch does not go beyond its shard: where its size is found automatically, few shards leave it room.
    A folder keeps the size that it began with.
    """
    many = MANY_SHARDS if plan.batch_size else FEW_SHARDS
    size = SHARD_INPUTS
    while size < MOST_SHARD_INPUTS and size * many < plan.limit:
        size *= 2
    return max(size, plan.batch_size)


def inputs_of(plan: ProbePlan) -> dict[str, Inputs]:
    """The plan's inputs by tower; the demo sets of both kinds where none were named."""
    given = {}
    if plan.images is not None:
        given["vision"] = images(plan.images)
    if plan.texts is not None:
        given["text"] = texts(plan.texts)
    if not given:
        given = {"vision": images("demo"), "text": texts("demo")}
    return given


def default_folder(plan: ProbePlan, key: str, root: Path = RUNS) -> Path:
    """Where a plan's run lies unless the user says otherwise: the models' names and the key of the result."""
    return root / f"{file_stem('+'.join(plan.models))[:60]}-{key[:8]}"


def _given(source: str | None) -> str | None:
    """Inputs as a key has them: of files their stamp says all, however and from wherever a path was typed."""
    return source if source is None or source == "demo" or source.startswith("hf:") else "files"


def _stamp(path: Path) -> list[list[str | int]]:
    """Names, sizes and times of a file, or of what a model can be loaded from in a folder."""
    files = sorted(model_files(path)) if path.is_dir() else [path]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _commit(name: str) -> str | None:
    """The commit that a name on the hub stands for now, where it names none itself."""
    try:
        spec = parse(name)
    except UserError:  # which is told where the plan's names are resolved
        return None
    commit = family_of(spec.family).commit(spec)
    return None if commit == spec.revision else commit


def _base_of(folder: Path) -> Path | None:
    """The folder of the model that an adapter is put onto, where that lies on this disk."""
    file = folder / ADAPTER
    try:
        named = json.loads(file.read_bytes()).get("base_model_name_or_path") if file.is_file() else None
    except (OSError, ValueError, AttributeError):  # which is told where it is loaded
        return None
    return folder_named(named) if isinstance(named, str) else None


def _content(file: Path) -> str:
    """The hash of a file, empty where it cannot be read: that is told where it is read."""
    try:
        return sha256_of(file)
    except OSError:
        return ""


def _peft() -> str | None:
    """The version of peft that is installed."""
    try:
        return metadata.version("peft")
    except metadata.PackageNotFoundError:
        return None


def model_files(folder: Path, below: int = 0) -> Iterator[Path]:
    """All files that lie directly in a folder, and the weights below it: an index may name them there.

    What attnbias wrote below it, such as saved activations, is not the model's. Raises no error for what
    cannot be listed.
    """
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        path = folder / entry.name
        if entry.is_file() and (not below or path.suffix in WEIGHTS):
            yield path
        elif entry.is_dir() and below < WEIGHTS_BELOW and not entry.name.startswith("."):
            ours = (path / PLAN).exists() or (path / MANIFEST).exists()
            yield from () if ours else model_files(path, below + 1)
