"""Several softmax maps of one layer, followed to where the module adds them up (differential attention).

A module may call attention more than once over the same values, or once with more heads than it has, and
go on with a weighted sum: y = Σ_k c_k y_k. Neither of its maps is the layer's then, their sum is. What the
module does with the outputs is followed, tensor by tensor: each element of a tensor is known as a sum of
coefficients times elements of outputs. Rearranging moves elements, scaling and adding change the sum; the
first tensor in which all outputs are added up is y, as the module itself made it. There the following ends.

Of each tensor are kept a place (which token of which input) and, for each term, a coefficient and an atom
(which channel of which call), as integers that are expanded: memory is O(token + channel) as a rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from diag.attention.call import AttentionCall, WeightMap
from diag.errors import MeasurementError

SAME = {"contiguous", "clone", "to", "float", "double", "half", "bfloat16", "type", "type_as"}
MOVED = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "moveaxis", "swapaxes"),
    *("swapdims", "squeeze", "unsqueeze", "chunk", "split", "tensor_split", "unbind", "getitem", "select"),
    *("narrow", "index_select", "expand", "expand_as", "view_as", "reshape_as"),
}
JOINED = {"cat", "concat", "concatenate", "stack"}
ADDED = {"add": 1.0, "radd": 1.0, "iadd": 1.0, "sub": -1.0, "subtract": -1.0, "isub": -1.0, "rsub": -1.0}
SCALED = {"mul", "rmul", "multiply", "imul"}
DIVIDED = {"div", "divide", "true_divide", "truediv", "itruediv"}
SUMMED = {"sum", "mean"}
"""Names of functions, without underscores, by what they do to a tensor that is followed."""

WRITING = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__setitem__"}
"""Operators that write to their first argument, as functions do whose names end in an underscore."""

Term = tuple[Tensor, Tensor]
"""Coefficient and atom of each element, expanded to the shape of the tensor."""


@dataclass(eq=False)
class _Followed:
    """A tensor whose elements are sums of elements of outputs; `added`: whether any were added up so far."""

    tensor: Tensor
    place: Tensor
    terms: tuple[Term, ...]
    added: bool = False


class Combination:
    """The calls of one run of a module, and what becomes of their outputs.

    name: of the layer, for errors.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[AttentionCall] = []
        self.known: dict[int, _Followed] = {}
        self.last: _Followed | None = None  # in which all that there was had been added up
        self.atoms = 0

    def note_call(self, call: AttentionCall, output: Tensor) -> None:
        """Begins to follow the output of a call, as the module has it; of the usual four axes only."""
        batch, heads, tokens, dim = call.output.shape
        channel = torch.arange(heads * dim, device=output.device).view(1, heads, 1, dim) + self.atoms
        place = torch.arange(batch * tokens, device=output.device).view(batch, 1, tokens, 1)
        dtype = torch.promote_types(output.dtype, torch.float32)
        one = torch.ones(1, 1, 1, 1, dtype=dtype, device=output.device)
        if output.shape == call.output.shape:
            term = (one.expand(output.shape), channel.expand(output.shape))
            self.known[id(output)] = _Followed(output, place.expand(output.shape), (term,))
        self.atoms += heads * dim
        self.calls.append(call)

    def is_read_by(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether a function is about to read the sum of all maps: now it can be handed on, and changed."""
        if self.last is None or name_of(func) == "get":  # an attribute
            return False
        return self._is_whole(self.last) and any(x is self.last.tensor for x in tensors_in(args, kwargs))

    def seen(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        """A function has run; what it returned is followed, if it is of a kind that can be."""
        if not any(self._of(x) for x in tensors_in(args, kwargs)):
            return
        found = self._results(func, args, kwargs, result) if self._is_followed(func, args) else []
        if in_place(func) and args and isinstance(args[0], Tensor):
            memory = args[0].untyped_storage().data_ptr()  # what else lies there has changed as well
            self.known = {
                key: one
                for key, one in self.known.items()
                if one.tensor.untyped_storage().data_ptr() != memory
            }
        for one in found:
            self.known[id(one.tensor)] = one
            if one.added and name_of(func) in JOINED | ADDED.keys() | SUMMED and self._is_whole(one):
                self.last = one

    @property
    def adds_up(self) -> bool:
        """Whether the module adds up maps over the same values, or has such maps and does something else."""
        if self.last is not None and self._is_whole(self.last):
            try:
                return bool(self.combined().maps)
            except MeasurementError:
                pass
        pairs = [(a, b) for place, a in enumerate(self.calls) for b in self.calls[:place]]
        return any(_alike(a.value, b.value) or _same_weights(a, b) for a, b in pairs)

    def combined(self) -> AttentionCall:
        """The layer's own call: its output is the module's sum, its weights are those of the maps added up.

        Raises MeasurementError, naming the layer, where that is not what the module does.
        """
        if self.last is None or not self._is_whole(self.last):
            self._refuse("in a way that is not understood")
        return self._call_of(self.last)

    def replace(self, call: AttentionCall, output: Tensor) -> None:
        """Puts another output into the sum that the module goes on with. call: what `combined` gave."""
        assert self.last is not None
        if call.output.untyped_storage().data_ptr() != self.last.tensor.untyped_storage().data_ptr():
            self._refuse("in an order of its own, so that the sum cannot be changed")
        call.output.copy_(output)

    # --- following

    def _of(self, x: Any) -> _Followed | None:
        return self.known.get(id(x)) if isinstance(x, Tensor) else None

    def _is_whole(self, one: _Followed) -> bool:
        """Whether every channel of every call is in it."""
        atoms = [_small(atom).flatten() for _, atom in one.terms]
        return len(torch.cat(atoms).unique()) == self.atoms

    def _is_followed(self, func: Callable, args: Sequence[Any]) -> bool:
        name = name_of(func)
        if not args:
            return False
        if name in JOINED:
            return all(self._of(x) is not None for x in args[0])
        of = [self._of(x) is not None for x in args[:2]]
        if name in ADDED:
            return all(of) or (any(of) and any(isinstance(x, int | float) and x == 0 for x in args[:2]))
        if name in SCALED:
            return sum(of) == 1
        if name in DIVIDED:
            return of == [True, False]
        return of[0] and name in SAME | MOVED | SUMMED | {"neg"}

    def _results(
        self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
    ) -> list[_Followed]:
        name = name_of(func)
        if name in JOINED:
            return self._joined(name, args, kwargs, result)
        if name in ADDED:
            return self._added(name, args, kwargs, result)
        if name in SUMMED:
            return self._summed(name, args, kwargs, result)
        one = self._of(args[0]) or self._of(args[1])
        assert one is not None
        if name in MOVED:
            return _moved(name, func, one, args[1:], kwargs, result)
        if name in SCALED | DIVIDED:
            factor = args[1] if one is self._of(args[0]) else args[0]
            return [_scaled(one, factor, result, divided=name in DIVIDED)]
        if name == "neg":
            return [_scaled(one, -1.0, result)]
        return [replace(one, tensor=result)] if result.shape == one.place.shape else []

    def _joined(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[_Followed]:
        parts = [self.known[id(x)] for x in args[0]]
        dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        if len({len(part.terms) for part in parts}) > 1:
            return []

        def joined(shadows: Sequence[Tensor]) -> Tensor:
            return _put_together(shadows, dim, result.shape, stacked=name == "stack")

        columns = zip(*(part.terms for part in parts), strict=True)
        terms = tuple((joined([c for c, _ in of]), joined([a for _, a in of])) for of in columns)
        place = joined([part.place for part in parts])
        return [_Followed(result, place, terms, any(part.added for part in parts))]

    def _added(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[_Followed]:
        one, other = (self._of(x) for x in args[:2])
        if name == "rsub":
            one, other, args = other, one, (args[1], args[0])
        sign = ADDED[name] * kwargs.get("alpha", 1.0)
        if one is None or other is None:  # the other one is a 0
            kept = one or other
            assert kept is not None
            return [_scaled(kept, 1.0 if other is None else sign, result)]
        if not one.place.shape == other.place.shape == result.shape or not _equal(one.place, other.place):
            return []
        return [_Followed(result, one.place, (*one.terms, *_scaled(other, sign, result).terms), added=True)]

    def _summed(
        self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any], result: Tensor
    ) -> list[_Followed]:
        one = self.known[id(args[0])]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        if not isinstance(dim, int) or result.ndim != one.place.ndim - 1:
            return []
        places = one.place.unbind(dim)
        if not all(_equal(places[0], place) for place in places[1:]):
            return []
        weight = 1 / len(places) if name == "mean" else 1.0
        terms = tuple(
            (c * weight, a) for term in one.terms for c, a in zip(*(x.unbind(dim) for x in term), strict=True)
        )
        return [_Followed(result, places[0], terms, added=True)]

    # --- reading

    def _call_of(self, made: _Followed) -> AttentionCall:
        calls, first = self.calls, self.calls[0]
        if any((c.batch, c.tokens) != (first.batch, first.tokens) for c in calls):
            self._refuse("of different lengths")
        alone = first.mask is None or first.mask.ndim < 4 or first.mask.shape[1] == 1
        if not alone or any(
            not _alike(c.mask, first.mask) or (c.causal, c.hidden) != (first.causal, first.hidden)
            for c in calls
        ):
            self._refuse("under different masks")
        of_places, of_channels = self._axes(made)
        place = _laid_out(made.place, of_places, of_channels)[:, 0]
        order = place.argsort() if (place.diff() < 0).any() else None
        every = torch.arange(first.batch * first.tokens, device=place.device)
        if not torch.equal(place if order is None else place[order], every):
            self._refuse("of other tokens than its own")
        terms = [[_laid_out(x, of_places, of_channels) for x in term] for term in made.terms]
        atoms = [
            self._decoded(atom[0].tolist()) for _, atom in terms
        ]  # per term and channel: call, head, dim
        same = [next(k for k, other in enumerate(calls) if _same_weights(one, other)) for one in calls]
        groups: dict[tuple, list[int]] = {}
        for channel, of_channel in enumerate(zip(*atoms, strict=True)):
            groups.setdefault(tuple((same[k], h) for k, h, _ in of_channel), []).append(channel)
        heads, dim = len(groups), len(next(iter(groups.values())))
        if any(len(channels) != dim for channels in groups.values()):
            self._refuse("whose heads differ in size")
        channels = [channel for group in groups.values() for channel in group]
        output = made.tensor.permute(*_order(made.tensor.ndim, of_places, of_channels))
        if order is not None or channels != list(range(len(channels))):
            flat = output.reshape(len(every), -1)[:, channels]
            output = flat if order is None else flat[order]
        output = output.reshape(first.batch, first.tokens, heads, dim).transpose(1, 2)
        values = [[self._value_channel(*term[c]) for c in channels] for term in atoms]
        if any(ids != values[0] and not self._equal_values(values[0], ids) for ids in values[1:]):
            self._refuse("over different values")
        owners = [list(of) for of in zip(*groups, strict=True)]  # per term and head: call, head
        keys = [[(k, h // calls[k].group) for k, h in of] for of in owners]
        rows = [tuple(values[0][head * dim : (head + 1) * dim]) for head in range(heads)]
        group = _largest_group([rows, *keys])
        maps = tuple(
            self._map(of, of_keys[::group], self._coefficient(coefficient, order, channels, heads))
            for of, of_keys, (coefficient, _) in zip(owners, keys, terms, strict=True)
        )
        value = self._values([channel for row in rows[::group] for channel in row], heads // group)
        return replace(
            first, query=None, key=None, value=value, output=output, log_normaliser=None, maps=maps
        )

    def _axes(self, made: _Followed) -> tuple[list[int], list[int]]:
        """Along which axes of a tensor tokens lie, and along which channels."""
        axes = range(made.tensor.ndim)
        of_places = [axis for axis in axes if _varies(made.place, axis)]
        of_channels = [axis for axis in axes if any(_varies(atom, axis) for _, atom in made.terms)]
        rest = {axis for axis in axes if made.tensor.shape[axis] > 1}
        if {*of_places} & {*of_channels} or rest - {*of_places, *of_channels}:
            self._refuse("in a way that is not understood")
        return of_places, of_channels

    def _decoded(self, atoms: Sequence[int]) -> list[tuple[int, int, int]]:
        """Call, head and dim of each atom."""
        where = [
            (k, head, dim)
            for k, call in enumerate(self.calls)
            for head in range(call.heads)
            for dim in range(call.output.shape[-1])
        ]
        return [where[atom] for atom in atoms]

    def _value_channel(self, call: int, head: int, dim: int) -> tuple[int, int, int]:
        """Of which call, KV head and dim the value behind an atom is; the first call that has that value."""
        value = self.calls[call].value
        first = next(k for k, other in enumerate(self.calls) if _alike(other.value, value))
        return first, head // self.calls[call].group, dim

    def _equal_values(self, some: Sequence[tuple], others: Sequence[tuple]) -> bool:
        return torch.equal(self._values(some, 1), self._values(others, 1))

    def _values(self, channels: Sequence[tuple[int, int, int]], kv_heads: int) -> Tensor:
        """The values of some channels, `[batch, kv_head, token, dim]`; a call's own tensor if it is."""
        whole = self.calls[channels[0][0]].value
        every = [(channels[0][0], h, d) for h in range(whole.shape[1]) for d in range(whole.shape[3])]
        if [*channels] == every and kv_heads == whole.shape[1]:
            return whole
        first, flat = dict[int, int](), list[Tensor]()
        for call in dict.fromkeys(k for k, _, _ in channels):
            first[call] = sum(x.shape[-1] for x in flat)
            flat.append(self.calls[call].value.transpose(1, 2).flatten(2))  # [batch, token, channel]
        index = [first[k] + h * self.calls[k].value.shape[-1] + d for k, h, d in channels]
        return torch.cat(flat, -1)[..., index].unflatten(-1, (kv_heads, -1)).transpose(1, 2)

    def _coefficient(
        self, found: Tensor, order: Tensor | None, channels: Sequence[int], heads: int
    ) -> Tensor:
        """`[batch or 1, head or 1, token or 1]` from `[place or 1, channel or 1]`."""
        if found.shape[0] > 1 and order is not None:
            found = found[order]
        if found.shape[1] > 1:
            of_heads = found[:, channels].unflatten(1, (heads, -1))
            if not (of_heads == of_heads[..., :1]).all():
                self._refuse("with coefficients that differ within a head")
            found = of_heads[..., 0]
        batch = self.calls[0].batch if found.shape[0] > 1 else 1
        return found.unflatten(0, (batch, -1)).transpose(1, 2)

    def _map(
        self, owners: Sequence[tuple[int, int]], keys: Sequence[tuple[int, int]], coefficient: Tensor
    ) -> WeightMap:
        used = [self.calls[k] for k in dict.fromkeys(k for k, _ in owners)]
        if len({call.scale for call in used}) > 1:
            self._refuse("of different scales")
        query, key, normaliser = ([getattr(c, name) for c in self.calls] for name in _OF_MAPS)
        known = all(call.log_normaliser is not None for call in used)
        return WeightMap(
            _heads(query, owners),
            _heads(key, keys),
            used[0].scale,
            coefficient,
            _heads(normaliser, owners) if known else None,
        )

    def _refuse(self, how: str) -> NoReturn:
        raise MeasurementError(
            f"layer '{self.name}' combines several maps {how}: which output is its own is not known",
            "leave it out with --layers; understood are sums of multiples of outputs over the same values",
        )


_OF_MAPS = ("query", "key", "log_normaliser")


def name_of(func: Callable) -> str:
    """What a function is called, whether it is a method, an operator or works in place."""
    return getattr(func, "__name__", "").strip("_")


def in_place(func: Callable) -> bool:
    """Whether it writes to its first argument: `add_`, `+=`, an assignment to a part."""
    name = getattr(func, "__name__", "")
    return name in WRITING or (name.endswith("_") and not name.endswith("__"))


def tensors_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors among arguments, those in lists included."""
    for x in (*args, *kwargs.values()):
        if isinstance(x, Tensor):
            yield x
        elif isinstance(x, tuple | list):
            yield from (one for one in x if isinstance(one, Tensor))


def _moved(
    name: str, func: Callable, one: _Followed, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any
) -> list[_Followed]:
    """The parts that a function gives which only rearranges elements."""
    if name.startswith("view"):  # what is expanded cannot always be viewed
        func = Tensor.reshape if name == "view" else Tensor.reshape_as

    def moved(shadow: Tensor) -> Sequence[Tensor]:
        found = func(shadow, *args, **kwargs)
        return [found] if isinstance(found, Tensor) else found

    results = [result] if isinstance(result, Tensor) else result
    places = moved(one.place)
    terms = [[moved(x) for x in term] for term in one.terms]
    return [
        _Followed(part, places[n], tuple((c[n], a[n]) for c, a in terms), one.added)
        for n, part in enumerate(results)
    ]


def _scaled(one: _Followed, factor: Any, result: Tensor, *, divided: bool = False) -> _Followed:
    """Times a number, or a tensor that broadcasts; its own elements may be broadcast as well."""
    factor = factor.detach() if isinstance(factor, Tensor) else torch.tensor(factor, dtype=torch.float64)
    factor = factor.to(one.terms[0][0]).reciprocal() if divided else factor.to(one.terms[0][0])
    factor = _small(factor.expand(result.shape))
    terms = tuple(
        ((_small(c.expand(result.shape)) * factor).expand(result.shape), a.expand(result.shape))
        for c, a in one.terms
    )
    return _Followed(result, one.place.expand(result.shape), terms, one.added)


def _put_together(shadows: Sequence[Tensor], dim: int, shape: torch.Size, *, stacked: bool) -> Tensor:
    """`cat` or `stack` that leaves expanded what is expanded in all of them."""
    shadows = [x.unsqueeze(dim) for x in shadows] if stacked else shadows
    dim = dim % shadows[0].ndim
    for axis in range(len(shape)):
        if axis != dim and all(x.stride(axis) == 0 for x in shadows):
            shadows = [x.narrow(axis, 0, 1) for x in shadows]
    return torch.cat([*shadows], dim).expand(shape)


def _small(x: Tensor) -> Tensor:
    """An expanded tensor without its repetitions."""
    for axis in range(x.ndim):
        if x.stride(axis) == 0 and x.shape[axis] > 1:
            x = x.narrow(axis, 0, 1)
    return x


def _varies(x: Tensor, axis: int) -> bool:
    x = _small(x)
    return x.shape[axis] > 1 and bool((x != x.narrow(axis, 0, 1)).any())


def _equal(one: Tensor, other: Tensor) -> bool:
    """Whether two expanded tensors of one shape are equal."""
    return one is other or bool((_small(one) == _small(other)).all())


def _order(ndim: int, of_places: Sequence[int], of_channels: Sequence[int]) -> list[int]:
    rest = [axis for axis in range(ndim) if axis not in (*of_places, *of_channels)]
    return [*of_places, *of_channels, *rest]


def _laid_out(x: Tensor, of_places: Sequence[int], of_channels: Sequence[int]) -> Tensor:
    """`[place or 1, channel or 1]`: one of what is the same for all."""
    for axes in (of_places, of_channels):
        if all(x.stride(axis) == 0 for axis in axes):
            for axis in axes:
                x = x.narrow(axis, 0, 1)
    places = math.prod(x.shape[axis] for axis in of_places)
    return x.permute(*_order(x.ndim, of_places, of_channels)).reshape(places, -1)


def _alike(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same, or equal."""
    if one is None or other is None:
        return one is other
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return (one.data_ptr(), one.stride()) == (other.data_ptr(), other.stride()) or torch.equal(one, other)


def _same_weights(one: AttentionCall, other: AttentionCall) -> bool:
    return one.scale == other.scale and _alike(one.query, other.query) and _alike(one.key, other.key)


def _largest_group(of_heads: Sequence[Sequence[Any]]) -> int:
    """How many heads that follow each other share all of what is listed for each head."""
    heads = len(of_heads[0])
    for group in range(heads, 1, -1):
        if heads % group == 0 and all(x[h] == x[h - h % group] for x in of_heads for h in range(heads)):
            return group
    return 1


def _heads(tensors: Sequence[Tensor], chosen: Sequence[tuple[int, int]]) -> Tensor:
    """Some heads, each of some tensor `[batch, head, …]`: a view where they are of one and evenly apart."""
    of, heads = {k for k, _ in chosen}, [h for _, h in chosen]
    if len(of) > 1:
        return torch.stack([tensors[k][:, h] for k, h in chosen], 1)
    step = max(1, heads[1] - heads[0]) if len(heads) > 1 else 1
    evenly = range(heads[0], heads[-1] + 1, step)
    return tensors[of.pop()][:, slice(evenly.start, evenly.stop, step) if heads == [*evenly] else heads]
