"""What a model's answer hangs on, token by token: gradients of one number at the states that tokens have.

The states are what enters the first block of a tower, or for cross-attention the encoder's tokens as the
decoder reads them: one more forward pass, in which they are taken for inputs, and one backward pass to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.linalg import vecdot, vector_norm

from diag.errors import UserError
from diag.measure.batch_size import is_out_of_memory
from diag.models.base import Batch, Model, Tower
from diag.models.cross import CROSS, REAL_ROWS
from diag.models.hooks.layers import Layer
from diag.results.agreement import GRADIENT, GRADIENT_X_INPUT

Explained = Callable[[Any], Float[Tensor, " batch"]]
"""What a model returned → the number of each input that saliency is of."""


def saliency(
    model: nn.Module, tower: Tower, batch: Batch, explained: Explained
) -> dict[str, Float64[Tensor, "batch token"]]:
    """By kind: ‖g_j‖, and |g_j · x_j|; x_j what token j enters with, g_j the gradient of `explained` there.

    Raises UserError, naming the layer, where a tower's block or a decoder's memory is not understood, and
    where nothing of the answer depends on it.
    """
    states = States()
    taken = _memory(tower, batch, states) if tower.meaning.get(CROSS) else _entering(model, tower, states)
    with torch.inference_mode(False), torch.enable_grad(), taken, _told_without_gradients(tower):
        scores = explained(tower.forward(batch))
        if states.leaf is None or not scores.requires_grad:
            raise UserError(
                f"what the {tower.name} tower answers does not depend on its tokens by a gradient",
                "name what is explained with of=, from what the model returns, without detaching it",
            )
        (gradient,) = torch.autograd.grad(scores.double().sum(), states.leaf)
    x, g = (one.detach().double() for one in (states.leaf, gradient))
    if states.tokens_first:
        x, g = x.transpose(0, 1), g.transpose(0, 1)
    x, g = (one.flatten(1, -2) for one in (x, g))  # [batch, token, dim], also of a grid
    return {GRADIENT_X_INPUT: vecdot(g, x).abs(), GRADIENT: vector_norm(g, dim=-1)}


@contextmanager
def _told_without_gradients(tower: Tower) -> Iterator[None]:
    """Raises UserError with what PyTorch says where a part of a model has no gradient."""
    try:
        yield
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"the {tower.name} tower gives no gradients: {said}",
            "leave saliency out, or give a model whose parts can all be trained",
        ) from error


def explained_of(model: Model, tower: Tower, batch: Batch) -> tuple[Explained, str]:
    """What is explained of a model by name, and in words: the class logit, or the loss of the next token.

    Raises UserError where it ends in neither.
    """
    if tower.ending == "class logits":
        return partial(torch.amax, dim=-1), "logit of the predicted class"
    if tower.language_head is not None:
        head = tower.language_head()
        return lambda result: next_token_loss(head(result.last_hidden_state), batch.data), "next-token loss"
    raise UserError(
        f"'{model.name}' ends in {_ENDS.get(tower.ending, tower.ending)}: no loss has gradients there",
        "give a classifier or a causal language model; or diag.attend.agreement(module, batches, of=…)",
    )


_ENDS = {"embedding": "an embedding", "token states": "states of tokens"}


def explained_by_default(result: Any, data: Any) -> Tensor:
    """What is explained of a module: its `logits`, or the tensor that it returns, of classes or next tokens.

    The predicted class's logit; with `decoder_input_ids`, the mean loss of their next token.
    Raises UserError for anything else.
    """
    logits = getattr(result, "logits", result)
    ids = data.get("decoder_input_ids") if isinstance(data, Mapping) else None
    if isinstance(logits, Tensor) and logits.ndim == 2:
        return logits.amax(-1)
    if isinstance(logits, Tensor) and logits.ndim == 3 and ids is not None:
        return next_token_loss(logits, ids, data.get(REAL_ROWS))
    raise UserError(
        "what the module returns is no logits of classes, nor of the next of its decoder_input_ids",
        "say what is explained: of=lambda result: …, one number per input",
    )


def next_token_loss(logits: Tensor, ids: Tensor, real: Tensor | None = None) -> Float64[Tensor, " batch"]:
    """Mean cross-entropy of the next token, nats per token, over those that are real."""
    each = nn.functional.cross_entropy(logits[:, :-1].double().transpose(1, 2), ids[:, 1:], reduction="none")
    counted = torch.ones_like(each) if real is None else real[:, 1:].to(each)
    return (each * counted).sum(1) / counted.sum(1).clamp(min=1)


# --- the states, taken for inputs


@dataclass
class States:
    """What tokens enter with, as the leaf of a graph.

    given: what the model goes on with in the place of `of`. tokens_first: whether inputs are the second axis.
    """

    leaf: Tensor | None = None
    given: Tensor | None = None
    of: Tensor | None = None
    tokens_first: bool = False

    def taken(self, x: Tensor) -> Tensor:
        if self.given is None:
            self.of, self.leaf = x, x.detach().clone().requires_grad_()
            self.given = self.leaf.clone()  # a model may add to it in place, which a leaf does not allow
        return self.given


@contextmanager
def _entering(model: nn.Module, tower: Tower, states: States) -> Iterator[None]:
    """The stream that enters the block of the tower's first layer."""
    block = _numbered(model, tower.layers[0])
    states.tokens_first = not getattr(tower.layers[0].module, "batch_first", True)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        slot = next(slot for slot, x in _slots(args, kwargs) if isinstance(x, Tensor) and x.ndim >= 3)
        return _with(args, kwargs, {slot: states.taken(_at(args, kwargs, slot))})

    with _hooks([(block, enter)]):
        yield


def _numbered(model: nn.Module, layer: Layer) -> nn.Module:
    """The innermost module around a layer that is told from its like by a number: it reads the stream.

    Raises UserError, naming the layer, where there is none.
    """
    parts = layer.path.split(".")
    ends = [end for end in range(1, len(parts)) if parts[end - 1].isdigit()]
    if not ends:
        raise UserError(
            f"layer '{layer.path}' stands in no numbered block: where its tokens enter is not known",
            "give a model whose blocks are a list, such as blocks.0, blocks.1",
        )
    return model.get_submodule(".".join(parts[: ends[-1]]))


@contextmanager
def _memory(tower: Tower, batch: Batch, states: States) -> Iterator[None]:
    """What all cross-attention of a tower reads: one tensor, the same object in every layer."""
    slot = _memory_slot(tower, batch)
    states.tokens_first = not getattr(tower.layers[0].module, "batch_first", True)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        memory = _at(args, kwargs, slot) if states.of is None else states.of
        leaf = states.taken(memory)
        return _with(args, kwargs, {at: leaf for at, x in _slots(args, kwargs) if x is memory})

    with _hooks([(layer.module, enter) for layer in tower.layers]):
        yield


def _memory_slot(tower: Tower, batch: Batch) -> int | str:
    """Where the first cross-attention is handed the memory: what is as long as its keys, and no query.

    Raises UserError, naming the layer, where nothing is, or several things are.
    """
    seen = dict[str, dict[int | str, Tensor]]()
    keys = dict[str, int]()

    def enter(layer: Layer, module: nn.Module, args: Any, kwargs: Any) -> None:
        seen[layer.path] = {slot: x for slot, x in _slots(args, kwargs) if _is_states(x)}

    hooks = _hooks([(layer.module, partial(enter, layer)) for layer in tower.layers])
    watched = tower.capture(tower.layers, lambda call: keys.update({call.module: call.keys}))
    with torch.inference_mode(), hooks, watched:
        tower.forward(batch)
    first, *others = seen.values()
    path, rows_first = tower.layers[0].path, getattr(tower.layers[0].module, "batch_first", True)
    queries = {id(x) for x in list(first.values())[:1]}  # what a module is handed first
    found = {
        id(x): slot
        for slot, x in reversed(first.items())
        if x.shape[1 if rows_first else 0] == keys.get(path)
        and id(x) not in queries
        and all(any(x is other for other in each.values()) for each in others)
    }
    if len(found) != 1:
        raise UserError(
            f"layer '{path}' is handed {len(found) or 'no'} tensors that may be what it attends to",
            "give a model whose cross-attention is handed the encoder's states as one tensor",
        )
    return next(iter(found.values()))


def _is_states(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim == 3


def _slots(args: Any, kwargs: Any) -> list[tuple[int | str, Any]]:
    return [*enumerate(args), *kwargs.items()]


def _at(args: Any, kwargs: Any, slot: int | str) -> Any:
    return args[slot] if isinstance(slot, int) else kwargs[slot]


def _with(args: Any, kwargs: Any, new: Mapping[int | str, Tensor]) -> tuple[Any, Any]:
    changed = tuple(new.get(place, x) for place, x in enumerate(args))
    return changed, {name: new.get(name, x) for name, x in kwargs.items()}


@contextmanager
def _hooks(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    with ExitStack() as stack:
        for module, hook in hooks:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield
