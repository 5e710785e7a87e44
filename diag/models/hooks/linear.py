"""Layers without softmax: where values are handed to a recurrence or a linear attention, and what it returns.

Their weights are never made, but values V and outputs Y are there. Libraries put the recurrence into a
function of its own, with arguments that are called alike everywhere: `query, key, value` with decays (delta
rules, gated linear attention, retention, RWKV), or `hidden_states, dt, A, B, C` (state spaces: Mamba). Such
functions are looked up by the arguments that they take, where the forward of a module finds them, and stand
behind a dispatcher while a model is watched. Where the recurrence is written out in the forward itself, a
table says which parts of the module hold V and Y.

That the arguments are what they are called is tested (`diag.models.hooks.axis`): Y is linear in V, and V
follows the token that it is of.
"""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache, wraps
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diag.models.hooks.eager import LOGARITHM, SOFTMAX, Followed, name_in_torch
from diag.models.hooks.layout import PLAIN, TOKENS_FIRST, Layout
from diag.models.hooks.products import PRODUCTS

SOFTMAX_NAMES = re.compile(
    r"eager|flash_att|sdpa|scaled_dot|flex|xformers|memory_eff|sage|softmax|multi_head", re.IGNORECASE
)
"""Functions of queries, keys and values that are softmax attention."""
STEP_NAMES = re.compile(r"update|step|decod")
"""Functions for one more token of a text that is written; a pass over whole inputs never calls them."""
RECURRENT_NAMES = re.compile(
    r"delta|kda|gla|retention|rwkv|wkv|scan|lightning|linear_?att|recurren|mamba|ss[dm]|mlstm", re.IGNORECASE
)
"""What a kernel that cannot be looked into is called where it is a recurrence."""

ATTENTION = {"scaled_dot_product_attention", "multi_head_attention_forward"}
"""Functions of PyTorch with a softmax inside."""


@dataclass(frozen=True)
class Recurrence:
    """How a layer without softmax mixes its tokens, as the tests of meaning found it.

    called: the name of the function, or of the class where it is written out. causal: whether a token is
    read by later ones only.
    """

    called: str
    causal: bool = True


@dataclass(frozen=True)
class Role:
    """Which of a function's arguments are what.

    value: its values. gate: what its output is multiplied with at the end, if anything.
    channels_first: whether tokens are the last axis, `[batch, channel, token]`.
    """

    value: str
    gate: str | None = None
    channels_first: bool = False


class Mixing:
    """One call of a mixer without softmax.

    called: as in `Recurrence`. value: `[batch, token, head, dim]` or `[batch, head, token, dim]`, as the
    mixer has it; where each channel has weights of its own, all of them are one head. usual: which of the
    two it is by custom.
    """

    def __init__(self, called: str, value: Tensor, usual: Layout) -> None:
        self.called, self.value, self.usual = called, value, usual

    def run(self) -> tuple[Any, Tensor | None]:
        """What the caller is given, and Y in the axes of V; None where that is nothing of its shape."""
        raise NotImplementedError

    def of(self, value: Tensor) -> Tensor | None:
        """Y of other values; None where that cannot be asked."""
        raise NotImplementedError

    def with_output(self, result: Any, output: Tensor) -> Any:
        """What the caller is given with another Y."""
        raise NotImplementedError


class FunctionMixing(Mixing):
    """A function that is handed values."""

    def __init__(self, function: Callable, role: Role, bound: inspect.BoundArguments, usual: Layout) -> None:
        self.function, self.role, self.bound = function, role, bound
        value = bound.arguments[role.value]
        usual = usual if value.ndim == 4 else TOKENS_FIRST
        super().__init__(function.__qualname__, self._in_heads(value), usual)

    def run(self) -> tuple[Any, Tensor | None]:
        result = self._called({})
        gated = self.role.gate is not None and self.bound.arguments.get(self.role.gate) is not None
        output = self._output(self._called({self.role.gate: None}) if gated else result)
        width = None if output is None else output.shape[-1]
        rest = self.value[..., width:]
        if output is None or self.value[..., :width].shape != output.shape or not bool((rest == 1).all()):
            return result, None
        self.value = self.value[..., :width]  # a column of ones beside values gives the sums of weights
        return result, output

    def of(self, value: Tensor) -> Tensor | None:
        given = self._in_heads(self.bound.arguments[self.role.value])
        whole = torch.cat([value, given[..., value.shape[-1] :]], -1)
        other: dict[str | None, Tensor | None] = {self.role.value: self._as_given(whole)}
        if self.role.gate is not None:
            other[self.role.gate] = None
        return self._output(self._called(other))

    def with_output(self, result: Any, output: Tensor) -> Any:
        changed = self._as_given(output)
        gate = None if self.role.gate is None else self.bound.arguments.get(self.role.gate)
        if gate is not None:
            changed = changed * F.silu(gate)
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    def _called(self, others: Mapping[str | None, Tensor | None]) -> Any:
        """The function on its arguments, some of them others."""
        given = self.bound.arguments | {name: x for name, x in others.items() if name is not None}
        bound = inspect.BoundArguments(self.bound.signature, given)
        return self.function(*bound.args, **bound.kwargs)

    def _output(self, result: Any) -> Tensor | None:
        found = result[0] if isinstance(result, tuple) and result else result
        given = self.bound.arguments[self.role.value]
        if not isinstance(found, Tensor) or found.ndim != given.ndim:
            return None
        return self._in_heads(found)

    def _in_heads(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return x
        return (x.transpose(1, 2) if self.role.channels_first else x).unsqueeze(2)

    def _as_given(self, x: Tensor) -> Tensor:
        if self.bound.arguments[self.role.value].ndim == 4:
            return x
        x = x.squeeze(2)
        return x.transpose(1, 2) if self.role.channels_first else x


class WrittenOut(Mixing):
    """A recurrence in the forward of a module: what two of its parts were given."""

    def __init__(self, called: str, value: Tensor, read: Tensor) -> None:
        super().__init__(called, value, TOKENS_FIRST)
        self.read = read

    def run(self) -> tuple[Any, Tensor | None]:
        return self.read, self.read.view(self.value.shape)

    def of(self, value: Tensor) -> Tensor | None:
        return None

    def with_output(self, result: Any, output: Tensor) -> Any:
        return output.reshape(self.read.shape)


@dataclass(frozen=True)
class Parts:
    """Of a class that writes its recurrence out: which of its modules makes values, and which reads outputs.

    values: `[batch, token, head, dim]` of what the first one returns. before: the one that reads Y.
    """

    made_by: str
    values: Callable[[Any, Tensor], Tensor]
    read_by: str


def _last_of_three(mixer: Any, made: Tensor) -> Tensor:
    """Heads in turn, each with its query, key and value."""
    return made.unflatten(-1, (mixer.num_attention_heads, 3, -1))[..., 2, :]


def _in_heads(mixer: Any, made: Tensor) -> Tensor:
    """Heads in turn."""
    return made.unflatten(-1, (mixer.heads, -1))


WRITTEN_OUT = {
    "MiniMaxLightningAttention": Parts("act_fn", _last_of_three, "norm"),
    "SanaLinearAttnProcessor2_0": Parts("to_v", _in_heads, "to_out.0"),
}
"""Class, of a module or of the processor that it runs -> its parts; `tests/models/hooks/test_linear.py` holds
each line against the recurrence itself."""


def _written_out(module: nn.Module) -> str | None:
    """The class whose recurrence a module's forward writes out, if it is one of the table."""
    classes = (type(module).__name__, type(getattr(module, "processor", None)).__name__)
    return next((name for name in classes if name in WRITTEN_OUT), None)


@lru_cache(maxsize=4096)
def role_of(function: Callable) -> Role | None:
    """What a function's arguments are, by their names; None where it is no recurrence."""
    name = function.__name__
    if SOFTMAX_NAMES.search(name) or STEP_NAMES.search(name):
        return None
    try:
        names = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    if names.keys() >= {"hidden_states", "recurrent_gate"}:  # a gated recurrence of each channel (Griffin)
        return Role("hidden_states")
    if names.keys() >= {"A", "B", "C"}:
        given = [one for one in ("hidden_states", "x", "u") if one in names]
        if not given or names.keys().isdisjoint({"dt", "delta"}):
            return None
        # of one channel each, as in Mamba-1, or of heads, as in Mamba-2
        single = "chunk_size" not in names
        return Role(given[0], "z" if "z" in names else None, channels_first=single)
    for key, value in (("key", "value"), ("k", "v")):
        asking = {"query", "q", "r", "receptance", "time_decay"}
        if names.keys() >= {key, value} and not names.keys().isdisjoint(asking):
            return Role(value)
    return None


Handler = Callable[[Mixing], Any]


class _Handlers(threading.local):
    """Who is told of a thread's recurrences; None at the end while one is running."""

    def __init__(self) -> None:
        self.stack: list[Handler | None] = []


_HANDLERS, _LOCK = _Handlers(), threading.Lock()
_PLACED: dict[tuple[int, str], tuple[int, Callable | None]] = {}
"""Functions behind a dispatcher, by namespace and name: how often one was asked for, and what was there."""


@contextmanager
def mixers_told(modules: Iterable[nn.Module], handler: Handler) -> Iterator[None]:
    """Under this, `handler` runs the mixers without softmax that these modules call, in this thread."""
    by_class = dict[type, list[nn.Module]]()
    for module in modules:
        if type(module).__module__.partition(".")[0] != "torch":
            by_class.setdefault(type(module), []).append(module)
    spaces = {id(space): space for kind in by_class if (space := _namespace(kind)) is not None}
    with ExitStack() as undone:
        for space in spaces.values():
            for name, function in _functions(space):
                undone.enter_context(_placed(space, name, function, TOKENS_FIRST))
        for kind, alike in by_class.items():
            names = _names_in(kind)
            for module in alike:
                own = names | {name for name, _ in _functions(vars(module))}
                if next(module.parameters(), None) is not None:
                    own -= {"forward"}  # it has projections of its own: what it is handed are no values
                for name in own:
                    undone.enter_context(_placed(vars(module), name, getattr(module, name), PLAIN))
                if (written := _written_out(module)) is not None:
                    undone.enter_context(_parts_told(module, written))
        _HANDLERS.stack.append(handler)
        try:
            yield
        finally:
            _HANDLERS.stack.pop()


def _names_in(kind: type[nn.Module]) -> set[str]:
    """The methods of a class that are recurrences."""
    written = (above for above in kind.__mro__ if above.__module__.partition(".")[0] != "torch")
    return {name for above in written for name, _ in _functions(vars(above))}


def recurrent_modules(root: nn.Module) -> list[str]:
    """Paths of the modules whose forward calls a recurrence; nothing is run."""
    return [path for path, module in root.named_modules() if is_recurrent(module)]


def is_recurrent(module: nn.Module) -> bool:
    """Whether the forward of a module calls a recurrence, or is one, as far as its code tells."""
    kind = type(module)
    space = _namespace(kind)
    if space is None or kind.__module__.partition(".")[0] == "torch":
        return False
    called = set(inspect.unwrap(kind.forward).__code__.co_names)
    names = {name for name, _ in _functions(space)} | _names_in(kind)
    own = "forward" in names and next(module.parameters(), None) is None
    return own or bool(called & (names - {"forward"})) or _written_out(module) is not None


def _namespace(kind: type[nn.Module]) -> dict[str, Any] | None:
    """Where the forward of a class finds functions; None of PyTorch's own."""
    found = getattr(inspect.unwrap(kind.forward), "__globals__", None)
    return None if found is None or found.get("__name__", "").partition(".")[0] == "torch" else found


def _functions(space: Mapping[str, Any]) -> list[tuple[str, Callable]]:
    """The recurrences among what is in a namespace, a class or a module."""
    return [
        (name, x) for name, x in list(space.items()) if isinstance(x, FunctionType) and role_of(x) is not None
    ]


@contextmanager
def _placed(space: dict[str, Any], name: str, function: Callable, usual: Layout) -> Iterator[None]:
    """A dispatcher in the place of a function; the last one to leave puts back what was there."""
    place = (id(space), name)
    with _LOCK:
        count, before = _PLACED.get(place, (0, space.get(name)))
        _PLACED[place] = (count + 1, before)
        if not count:
            space[name] = _dispatcher(function, usual)
    try:
        yield
    finally:
        with _LOCK:
            count, before = _PLACED.pop(place)
            if count > 1:
                _PLACED[place] = (count - 1, before)
            elif before is None:
                del space[name]
            else:
                space[name] = before


def _dispatcher(function: Callable, usual: Layout) -> Callable:
    role, signature = role_of(function), inspect.signature(function)
    assert role is not None

    @wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        handler = _HANDLERS.stack[-1] if _HANDLERS.stack else None
        if handler is None:
            return function(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        value = bound.arguments.get(role.value)
        if not isinstance(value, Tensor) or value.ndim not in (3, 4):
            return function(*args, **kwargs)
        return _handled(handler, FunctionMixing(function, role, bound, usual))

    return told


def _handled(handler: Handler, mixing: Mixing) -> Any:
    """Told of once: a recurrence that calls another one is one."""
    _HANDLERS.stack.append(None)
    try:
        return handler(mixing)
    finally:
        _HANDLERS.stack.pop()


@contextmanager
def _parts_told(module: nn.Module, called: str) -> Iterator[None]:
    parts, held = WRITTEN_OUT[called], list[Tensor]()
    maker, reader = (module.get_submodule(path) for path in (parts.made_by, parts.read_by))

    def made(_: nn.Module, args: Any, output: Tensor) -> None:
        held[:] = [parts.values(module, output)]

    def read(_: nn.Module, args: Any) -> Any:
        handler = _HANDLERS.stack[-1] if _HANDLERS.stack else None
        if handler is None or not held:
            return None
        return (_handled(handler, WrittenOut(called, held.pop(), args[0])),)

    with ExitStack() as undone:
        undone.callback(maker.register_forward_hook(made).remove)
        # before all others, which may take the part that reads for one that calls
        undone.callback(reader.register_forward_pre_hook(read, prepend=True).remove)
        yield


class Inside(TorchFunctionMode):
    """What is seen inside a mixer.

    softmax: whether a softmax or an attention call was, or exponentials that were divided by their sum and
    multiplied with something. products: whether a matrix product was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.softmax = self.products = False
        self.followed = Followed()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, weighed = name_in_torch(func), self.followed.product_of(func, args, kwargs)
        result = func(*args, **kwargs)
        begun = self.followed.seen(func, args, kwargs, result)
        of_softmax = name in SOFTMAX | ATTENTION | {LOGARITHM}
        self.softmax |= of_softmax or weighed is not None or begun is not None
        self.products |= name in PRODUCTS
        return result


def is_without_softmax(mixing: Mixing, inside: Inside) -> bool:
    """Whether what was seen inside a mixer, or its name where nothing was, is that of one without softmax."""
    return not inside.softmax and (inside.products or bool(RECURRENT_NAMES.search(mixing.called)))


def is_linear(mixing: Mixing, output: Tensor) -> bool:
    """Whether twice the values give twice the output; also where that cannot be asked."""
    twice = mixing.of(mixing.value * 2)
    # a half format rounds twice a number as it does the number
    return twice is None or bool((twice - 2 * output).abs().max() <= 1e-3 * output.abs().max())
