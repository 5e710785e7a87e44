"""Plans: what a command will do, checked before anything runs, and the key that identifies its result."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from diag.errors import UserError
from diag.inputs.images import images
from diag.inputs.items import Inputs
from diag.inputs.texts import texts
from diag.models.names.arguments import local_files
from diag.models.names.resolve import parse
from diag.models.names.spec import ModelSpec
from diag.results.writing import file_stem
from diag.run.environment import version

RUNS = Path("runs")
"""Where every verb writes unless told otherwise, so that one finds what another measured."""

HOW = frozenset({"device", "batch_size", "workers"})
"""What a plan says of how it is carried out, not of what is measured."""

SHARD_INPUTS = 16
"""Inputs per shard: what an interruption can lose. Larger batches and very many inputs have larger shards."""
MOST_SHARD_INPUTS = 256
MANY_SHARDS, FEW_SHARDS = 1024, 16


def _known_dtype(dtype: str) -> str:
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError("is one of float32, bfloat16, float16")
    return dtype


Dtype = Annotated[str, AfterValidator(_known_dtype)]
"""The name of a format that a model can be loaded in."""


class Plan(BaseModel):
    """What a verb needs to know; frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def checked(cls, **fields: Any) -> Self:
        """A plan from options. Raises UserError in the words of the command line."""
        try:
            return cls(**fields)
        except ValidationError as error:
            (option, *_), reason, given = mistake(error)
            flag = "--" + str(option).replace("_", "-")
            raise UserError(f"{flag} {reason}", f"given: {given!r}") from error


def mistake(error: ValidationError) -> tuple[tuple[int | str, ...], str, Any]:
    """The first thing that is wrong with a plan: where, why in words, and what was given."""
    first = error.errors()[0]
    return first["loc"], first["msg"].removeprefix("Value error, "), first["input"]


class ProbePlan(Plan):
    """Everything that `attnbias probe` needs to know."""

    models: tuple[str, ...] = Field(min_length=1)
    images: str | None = None
    texts: str | None = None
    limit: int = Field(default=64, gt=0)
    seq_len: int | None = Field(default=None, gt=0)
    metrics: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None
    tokens: tuple[str, ...] | None = None
    values: str = "as_computed"
    intervene: tuple[str, ...] = ()
    checkpoint: Path | None = None
    model_args: tuple[str, ...] = ()
    random_init: bool = False
    trust_remote_code: bool = False
    dtype: Dtype = "float32"
    seed: int = Field(default=0, ge=0)
    save_activations: int = Field(default=0, ge=0)
    keep_samples: int = Field(default=4096, ge=0)
    exact: bool = False
    sampled_rows: int | None = Field(default=None, ge=64)
    # below: how, not what; they do not change the result
    device: str = "auto"
    batch_size: int = Field(default=8, ge=0)  # 0: as many as memory allows
    workers: int | None = Field(default=None, ge=0)

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

    @field_validator("sampled_rows")
    @classmethod
    def _pairs_of_rows(cls, rows: int | None) -> int | None:
        if rows is not None and rows % 2:
            raise ValueError("is an even number: rows are drawn in pairs")
        return rows

    def key(self, inputs: dict[str, str]) -> str:
        """Identifies the result: the plan without its `how`, the inputs' digests and local weights.

        inputs: kind -> digest.
        """
        what = self.model_dump(mode="json", exclude=set(HOW))
        local = [path for name in self.models for path in local_files(name)]
        if self.checkpoint is not None and os.path.exists(self.checkpoint):
            local.append(self.checkpoint)
        files = {str(path): _stamp(path) for path in local}
        document = {"plan": what, "inputs": inputs, "files": files, "version": version()}
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


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


def _stamp(path: Path) -> list[list[str | int]]:
    """Names, sizes and times of a file, or of the files that lie directly in a folder."""
    files = sorted(p for p in path.iterdir() if p.is_file()) if path.is_dir() else [path]
    return [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files]
