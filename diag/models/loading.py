"""What the families share as they load: a model made ready, and errors of libraries and the hub in words."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diag.errors import UserError, did_you_mean
from diag.inputs.outside import reason
from diag.models.base import Tower
from diag.models.hooks.layers import Layer, attention_modules
from diag.models.hooks.linear import recurrent_modules
from diag.models.hooks.survey import watched
from diag.models.names.spec import LOCAL, ModelSpec
from diag.models.weights import refuse_non_finite

UNREACHABLE = frozenset(
    {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError", "TransportError", "URLError"}
)


def ready(
    module: nn.Module, source: str, *, device: str | torch.device | None, dtype: torch.dtype | None
) -> nn.Module:
    """Moves a model, puts it into evaluation mode without gradients, and refuses non-finite weights.

    device, dtype: None for a model that has them already.
    """
    module.requires_grad_(False).eval()
    kept: dict[str, Any] = {"device": device, "dtype": dtype}
    # what is None is not named at all: quantised models refuse any format
    module.to(**{name: value for name, value in kept.items() if value is not None})
    refuse_non_finite(module, source)
    return module


def build_towers(
    builders: Mapping[str, Callable[[], Tower]], notes: list[str], *, needed: str | None = None
) -> dict[str, Tower]:
    """The towers that can be built; why another one cannot is added to `notes`.

    needed: one that may not be left out.
    Raises UserError where that one, or no tower at all, can be built.
    """
    towers, refusals = {}, []
    for kind, build in builders.items():
        try:
            towers[kind] = build()
        except UserError as refusal:
            if kind == needed:
                raise
            refusals.append(refusal)
            notes.append(f"no {kind} tower: {refusal}")
    if not towers:
        raise refusals[0]
    return towers


def layers_of(
    root: nn.Module,
    source: str,
    tower: str,
    *,
    prefix: str = "",
    run: Callable[[], object] | None = None,
) -> tuple[Layer, ...]:
    """The self-attention layers below `root`, by their names; or else mixers without softmax, or what calls
    attention.

    run: runs `root` once; None where names alone are to tell.
    Raises UserError for a tower without any.
    """
    layers = attention_modules(root, prefix=prefix)
    if not layers:
        paths = recurrent_modules(root)
        layers = tuple(Layer(i, prefix + path, root.get_submodule(path)) for i, path in enumerate(paths))
    if not layers and run is not None:
        with torch.inference_mode():
            called = dict.fromkeys(call.path for call in watched(root, run, asked=False).seen)
        layers = tuple(Layer(i, prefix + path, root.get_submodule(path)) for i, path in enumerate(called))
    if not layers:
        raise UserError(
            f"{source}: no self-attention layer found in its {tower} tower",
            "attnbias measures transformers; 'attnbias models QUERY' finds one",
        )
    return layers


@contextmanager
def hub(repository: str, file: str, *, download: str = "", revision: str | None = None) -> Iterator[None]:
    """Turns a failed download into two lines that name repository, file and the command that fetches it.

    download: what follows the repository in that command.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kinds = {kind.__name__ for link in _chain(error) for kind in type(link).__mro__}
        page, at = f"https://huggingface.co/{repository}", f" --revision {revision}" if revision else ""
        command = f"hf download {repository}" + (f" {download}" if download else "") + at
        if "GatedRepoError" in kinds:
            why = f"'{repository}' asks you to accept its licence before '{file}' can be downloaded"
            tip = f"accept it at {page}, then: hf auth login"
        elif "RevisionNotFoundError" in kinds:
            why, tip = f"'{repository}' has no revision '{revision}'", f"see {page}/tree/main"
        elif "RepositoryNotFoundError" in kinds or "HFValidationError" in kinds:
            why = f"'{repository}' is not on the Hugging Face Hub (looking for '{file}')"
            tip = f"check the name; if it is private: hf auth login, then {command}"
        elif "RemoteEntryNotFoundError" in kinds:
            why = f"'{repository}' has no file '{file}' that can be loaded"
            tip = f"see {page}/tree/{revision or 'main'}"
        elif kinds & UNREACHABLE:
            why = f"'{file}' of '{repository}' is not on this machine and the hub cannot be reached"
            tip = f"where there is a network: {command}"
        else:
            raise
        raise UserError(why, tip) from error


@contextmanager
def single_precision() -> Iterator[None]:
    """Float32 as torch's default: libraries make buffers and pixels in it, whatever a notebook has set."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What libraries draw in here follows from a seed; afterwards torch's generators are as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


@contextmanager
def theirs(what: str, tip: str) -> Iterator[None]:
    """Where a library is at work on files of others: any of its errors becomes two lines.

    what: what could not be done, in words. Nothing of ours runs in here, whose faults would be hidden.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # a library may raise anything
        raise UserError(f"{what}: {first_line(error)}", tip) from error


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line; of a KeyError that is the name of what is missing."""
    return f"it lacks {reason(error)}" if isinstance(error, KeyError) and str(error) else reason(error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def unknown_argument(key: str, allowed: Sequence[str], source: str) -> UserError:
    """The error for an argument that a model does not take, with near names."""
    return UserError(
        f"{source} does not take the argument '{key}'",
        did_you_mean(key, allowed) or "see the model's own options",
    )


@contextmanager
def constructing(spec: ModelSpec, allowed: Sequence[str]) -> Iterator[None]:
    """Turns what a library's constructor says about its arguments into two lines.

    allowed: arguments that people give; the nearest one is proposed for an unknown one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever names, arguments and config files make a library say
        match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if match and match[1] in spec.model_args:
            raise unknown_argument(match[1], allowed, spec.base) from None
        local = spec.name.startswith(LOCAL) and not spec.model_args
        raise UserError(
            f"{spec.resolved} cannot be built: {first_line(error)}",
            "check its config file, or save the model again"
            if local
            else "check the name and its arguments; 'attnbias models QUERY' shows what is published",
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keeps libraries from logging while a model loads; what matters is raised or noted instead.

    `logging.warning` on an unconfigured root installs a handler for good: that is undone too.
    """
    root = logging.getLogger()
    handlers, disabled = list(root.handlers), root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
