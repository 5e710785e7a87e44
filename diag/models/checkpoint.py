"""Checkpoint files, read without running their code: which tensors they hold, under which names.

Training programs wrap the weights, average them, and put prefixes before their names. What is taken of a
file, where it holds several sets, is said in a note; `checkpoint_key=` takes another one.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from diag.errors import UserError, one_of
from diag.inputs.outside import reason, regular
from diag.models.names.spec import CHECKPOINT, CHECKPOINT_KEY
from diag.models.weights import up_to_three
from diag.variants import METADATA

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training programs put the weights, beside the optimiser's state."""

AVERAGED = ("state_dict_ema", "model_ema")
"""Keys of weights that were averaged over training, which timm takes before those."""

WRAPPED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What parallel and compiled training puts into names, at the front or before any part."""

TAKES = "--checkpoint takes a .safetensors or a weights-only .pt file"
WHOLE = "save it with torch.save(model.state_dict(), FILE)"


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds for a model: name → tensor, path → variant of what was changed, and what to know."""

    tensors: dict[str, Tensor]
    variants: dict[str, str]
    notes: tuple[str, ...] = ()


def read_checkpoint(
    file: Path, module: nn.Module | None = None, *, key: str | None = None, averaged: bool = False
) -> Checkpoint:
    """The tensors of a .safetensors file, or of a .pt file that holds nothing but weights, on the CPU.

    Of a training checkpoint the weights are taken, and their names without the prefixes of parallel
    training, at any depth.

    module: the model that they are for; a prefix that all names share, and none of its own, is left out.
    key: which part is taken (`state_dict_ema`, `model.state_dict`, or the beginning of tensors' names); None
        for the weights. averaged: those averaged over training before others, where there are both.
    Raises UserError if the file is missing, damaged, or could run code on loading; if it holds no named
    tensors there, two of one name, or some that are no plain arrays.
    """
    _refuse_no_file(file)
    if file.suffix == ".safetensors":
        loaded, variants = _safetensors(file), _header_variants(file)
    else:
        loaded, variants = _pickle(file), {}
    where, found = _part(loaded, file, key, averaged)
    names = Names(module)
    tensors = names.of(found, file)
    _refuse_special(tensors, file)
    said = {path: entry.get(METADATA) for path, entry in _metadata(found, file).items()}
    variants |= {names.cleaned(path): str(kind) for path, kind in said.items() if kind}
    others = [name for name in (*AVERAGED, *WRAPPERS) if name != where and any(_sets(loaded.get(name)))]
    notes = [] if not where or key or not {where, *others} & {*AVERAGED} else [_choice(where, others)]
    return Checkpoint(tensors, variants, (*notes, *names.notes))


def read_variants(file: Path) -> dict[str, str]:
    """Path → variant of the modules that were changed when a checkpoint was saved (`diag.variants`).

    Read from the header of a safetensors file, or from the metadata of a state dict; empty where nothing
    was changed. Raises UserError as `read_checkpoint` does.
    """
    _refuse_no_file(file)
    return _header_variants(file) if file.suffix == ".safetensors" else read_checkpoint(file).variants


# --- files


def _refuse_no_file(file: Path) -> None:
    if not os.path.lexists(file):
        raise UserError(f"checkpoint '{file}' does not exist", TAKES)
    regular(file, "checkpoint", TAKES)


def _safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except Exception as error:  # whatever a damaged file makes the library say
        raise _damaged(file, error) from None


def _header_variants(file: Path) -> dict[str, str]:
    try:
        with safe_open(file, "pt") as opened:
            text = (opened.metadata() or {}).get(METADATA, "{}")
    except Exception as error:  # as above
        raise _damaged(file, error) from None
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    return checked_variants(said, f"checkpoint '{file}'")


def checked_variants(said: Any, source: str) -> dict[str, str]:
    """Path → variant, as a file says. Raises UserError where that is no such mapping."""
    if not isinstance(said, Mapping) or not all(isinstance(kind, str) for kind in said.values()):
        raise UserError(
            f"{source}: '{METADATA}' is {str(said)[:80]!r}, no mapping of modules to variants",
            "save the model again as it was trained, or without that entry",
        )
    return {str(path): kind for path, kind in said.items()}


def _pickle(file: Path) -> Any:
    try:
        # timm's checkpoints hold the options of their training in one; it runs nothing
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*TorchScript archive")  # it is refused below
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle makes torch raise nearly anything
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise UserError(
                f"checkpoint '{file}' holds more than weights and could run code: not loaded",
                "save the weights alone: torch.save(model.state_dict(), FILE)",
            ) from None
        if "TorchScript" in str(error):
            raise UserError(
                f"checkpoint '{file}' is a TorchScript archive, not weights",
                "save the weights alone: torch.save(torch.jit.load(FILE).state_dict(), NEW_FILE)",
            ) from None
        raise _damaged(file, error) from None


def _damaged(file: Path, error: Exception) -> UserError:
    return UserError(
        f"checkpoint '{file}' cannot be read: {reason(error)[:120]}", f"copy or download it again; {TAKES}"
    )


# --- which part of a file


def _part(loaded: Any, file: Path, key: str | None, averaged: bool) -> tuple[str, Mapping[str, Any]]:
    """Where the weights are, and they. Raises UserError, naming what is there, if that is not clear."""
    if key is not None:
        found = _at(loaded, key, file)
        if not _tensors(found):
            raise _none_there(file, loaded, f"no named tensors under '{key}'")
        return key, found
    path: list[str] = []
    found = loaded
    while isinstance(found, Mapping):
        order = (*AVERAGED, *WRAPPERS) if averaged else WRAPPERS
        inner = next((name for name in order if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        path.append(inner)
        found = found[inner]
    if not _tensors(found):
        raise _none_there(file, loaded, "no named tensors")
    return ".".join(path), found


def _metadata(part: Any, file: Path) -> Mapping[str, Mapping[str, Any]]:
    """What torch keeps beside the tensors of a state dict, by module. Raises UserError where it is none."""
    said = getattr(part, "_metadata", {})
    entries = said.values() if isinstance(said, Mapping) else [said]
    wrong = [entry for entry in entries if not isinstance(entry, Mapping)]
    if wrong or not all(isinstance(path, str) for path in said):
        what = f"{str(wrong[0])[:80]!r}, no mapping" if wrong else "of modules without a name"
        raise UserError(f"checkpoint '{file}': '_metadata' of its state dict is {what}", WHOLE)
    return said  # type: ignore[no-any-return]


def _at(loaded: Any, key: str, file: Path) -> Any:
    """What lies under a key, or a path of keys with dots; else the tensors whose names begin with it."""
    if not isinstance(loaded, Mapping):
        return None
    if key in loaded:
        return loaded[key]
    for name, inner in loaded.items():
        if isinstance(name, str) and key.startswith(f"{name}.") and isinstance(inner, Mapping):
            return _at(inner, key[len(name) + 1 :], file)
    front = f"{key}."
    part = OrderedDict({name.removeprefix(front): x for name, x in loaded.items() if _begins(name, front)})
    said = _metadata(loaded, file)
    part._metadata = {name.removeprefix(front): x for name, x in said.items() if _begins(name, front)}  # type: ignore[attr-defined]
    return part


def _begins(name: Any, front: str) -> bool:
    return isinstance(name, str) and name.startswith(front)


def _none_there(file: Path, loaded: Any, lacks: str) -> UserError:
    sets = {path: len(tensors) for path, tensors in _sets(loaded)}
    if not sets:
        there = [f"'{name}'" for name in loaded] if isinstance(loaded, Mapping) else []
        beside = f"; it holds {up_to_three(there)}" if there else f"; it is a {type(loaded).__name__}"
        return UserError(f"checkpoint '{file}' holds {lacks}{beside}", WHOLE)
    told = up_to_three([f"'{path}' ({count} tensors)" for path, count in sets.items() if path] or ["more"])
    forms = [f"-m NAME,{CHECKPOINT}={file},{CHECKPOINT_KEY}={path}" for path in sets if path]
    tip = f"pick one: {' or '.join(forms[:2])}" if forms else WHOLE
    return UserError(f"checkpoint '{file}' holds {lacks}, but {told}", tip)


def _sets(loaded: Any, path: str = "", depth: int = 3) -> Iterator[tuple[str, Mapping[str, Tensor]]]:
    if not isinstance(loaded, Mapping):
        return
    if tensors := _tensors(loaded):
        yield path, tensors
    for name, inner in loaded.items() if depth else ():
        if isinstance(name, str):
            yield from _sets(inner, f"{path}.{name}" if path else name, depth - 1)


def _tensors(part: Any) -> dict[str, Tensor]:
    if not isinstance(part, Mapping):
        return {}
    return {name: x for name, x in part.items() if isinstance(name, str) and isinstance(x, Tensor)}


def _choice(taken: str, others: list[str]) -> str:
    """What was taken of a file with averaged weights, and what takes the others."""
    kind = "the weights averaged over training" if taken in AVERAGED else "the weights"
    keys = one_of(f"{CHECKPOINT_KEY}={name}" for name in others)
    return f"{kind} were taken, '{taken}'" + (f"; {keys} takes the others" if others else "")


# --- names


class Names:
    """Names of tensors as the model has them. notes: what was left out of them."""

    def __init__(self, module: nn.Module | None) -> None:
        self.expected = set() if module is None else set(module.state_dict())
        self.prefix = ""
        self.notes: tuple[str, ...] = ()

    def of(self, part: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
        """The tensors of a part, by the model's names. Raises UserError where two names become one."""
        tensors: dict[str, Tensor] = {}
        came_from: dict[str, str] = {}
        for name, value in _tensors(part).items():
            short = self._unwrapped(name)
            if short in tensors:
                raise UserError(
                    f"checkpoint '{file}': '{came_from[short]}' and '{name}' are one name, '{short}'",
                    "save the weights of one model alone: torch.save(model.state_dict(), FILE)",
                )
            tensors[short], came_from[short] = value, name
        if "n_averaged" not in self.expected:
            tensors.pop("n_averaged", None)  # of how many steps: torch's AveragedModel counts beside them
        own = {name.partition(".")[0] for name in self.expected}
        while own and len(heads := {name.partition(".")[0] for name in tensors}) == 1 and not heads & own:
            if not all("." in name for name in tensors):
                break
            front = f"{heads.pop()}."
            tensors = {name.removeprefix(front): value for name, value in tensors.items()}
            self.prefix += front
            self.notes = (f"every name in the checkpoint begins with '{self.prefix}': left out",)
        return tensors

    def cleaned(self, path: str) -> str:
        """A module's path as `of` changed the names below it."""
        return self._unwrapped(path).removeprefix(self.prefix)

    def _unwrapped(self, name: str) -> str:
        if name in self.expected:
            return name
        return ".".join(part for part in name.split(".") if part not in WRAPPED) or name


def _refuse_special(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Raises UserError for a tensor that is no plain array of numbers."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            kind, tip = "has no data", "save the model after its weights were loaded"
        elif tensor.is_quantized:
            kind, tip = "is quantised", "save it dequantised: tensor.dequantize()"
        elif tensor.layout != torch.strided:
            kind, tip = f"is stored as {tensor.layout}", "save it dense: tensor.to_dense()"
        else:
            continue
        raise UserError(f"checkpoint '{file}': the tensor '{name}' {kind}", tip)
