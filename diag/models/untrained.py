"""Untrained twins: a model's architecture with fresh weights, as its library initialises them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from diag.errors import UserError
from diag.models import load
from diag.models.base import Model
from diag.models.loading import seeded
from diag.models.names.spec import ModelSpec
from diag.variants import restore

TIP = "give the model by its name, or its modules a reset_parameters() that sets every parameter"

RECIPES = (("reset_parameters", "_reset_parameters"), ("init_weights",))
"""Methods that set parameters, of PyTorch's modules (with an underscore in its multi-head attention) and of
libraries, in their order."""

HAS_BEGUN = "_is_hf_initialized"
"""What transformers marks as initialised, it does not initialise again."""


def untrained_twin(
    spec: ModelSpec,
    seed: int,
    variants: Mapping[str, str],
    *,
    device: str | torch.device,
    dtype: torch.dtype,
) -> Model:
    """The model of a spec without its weights, initialised by its own library.

    seed: of what is drawn. variants: what training changed in its attention (`diag.variants.variants_in`),
    which is part of its architecture.
    Raises UserError as `diag.models.load` does, and where a family has no recipe.
    """
    fresh = replace(spec, random_init=True, checkpoint=None, checkpoint_key=None, seed=seed)
    model = load(fresh, device=device, dtype=dtype)
    if variants:
        restore(model.module, variants)
        like = next(model.module.parameters())
        model.module.to(like.device, like.dtype).eval()
    return model


def reinitialised(module: nn.Module, seed: int) -> nn.Module:
    """A copy of one's own module with fresh weights: each part's `reset_parameters`, then its `init_weights`,
    where there are such, parts before what they are parts of.

    Every parameter has to be set by one of them, and without reading what was there: the copy is filled with
    NaN first, and what still is NaN was not set. Raises UserError, naming the first such parameter.
    """
    twin = copy.deepcopy(module)
    with torch.no_grad(), seeded(seed):
        for parameter in twin.parameters():
            if parameter.is_floating_point():
                parameter.fill_(torch.nan)
        for one in (*twin.parameters(), *twin.modules()):
            one.__dict__.pop(HAS_BEGUN, None)
        for names in RECIPES:
            for part in reversed([*twin.modules()]):
                if begin := next((found for name in names if (found := _recipe(part, name))), None):
                    begin()
    left = [name for name, parameter in twin.named_parameters() if not bool(parameter.isfinite().all())]
    if left:
        more = f", nor of {len(left) - 1} more parameters" if len(left) > 1 else ""
        raise UserError(
            f"how '{left[0]}' of {type(module).__name__} begins is not known{more}: no reset_parameters or "
            "init_weights sets it",
            TIP,
        )
    return twin.train(module.training)


def _recipe(part: nn.Module, name: str) -> Callable[[], object] | None:
    """A module's method of that name, where it needs nothing to be given."""
    found = getattr(part, name, None)
    if not callable(found):
        return None
    needs = (one for one in inspect.signature(found).parameters.values() if one.default is one.empty)
    return None if any(one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD) for one in needs) else found
