"""What aten operators that move entries about, or fold them up, mean on arrays of expressions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from flexsparse.tracing.arrays import Array, Call, Place, Places, Rule, broadcast_shape
from flexsparse.tracing.scalars import INTEGERS, Scalars, Untranslatable
from flexsparse.tree import Expr

UNROLL = 256  # entries that a reduction writes out


def _moved(call: Call, places_in_self: Callable[[Places], Places]) -> Array:
    x: Array = call.values["self"]
    return Array(call.shape, x.dtype, lambda places: x.at(places_in_self(places)))


def _same(call: Call) -> Array:
    return _moved(call, lambda places: places)


def _dim(call: Call, extra: int = 0) -> int:
    dim: int = call.values["dim"]
    return dim % (len(call.values["self"].shape) + extra) if dim < 0 else dim


def _unsqueeze(call: Call) -> Array:
    dim = _dim(call, extra=1)
    return _moved(call, lambda places: places[:dim] + places[dim + 1 :])


def _reshape(call: Call) -> Array:
    if call.dtype != call.values["self"].dtype:
        raise Untranslatable("the bits of one dtype read as another")  # view(dtype)
    s, source, shape = call.scalars, call.values["self"].shape, call.shape

    def places_in_self(places: Places) -> Places:
        flat: Place = 0
        for place, n in zip(places, shape, strict=True):
            flat = _plus(s, _times(s, flat, n), place)
        result: list[Place] = []
        for n in reversed(source):
            flat, place = _divmod(s, flat, n)
            result.insert(0, place)
        return tuple(result)

    # dimensions of one entry come and go without arithmetic
    kept = [i for i, n in enumerate(source) if n != 1]
    if [source[i] for i in kept] == [n for n in shape if n != 1]:

        def squeezed(places: Places) -> Places:
            moving = iter(x for x, n in zip(places, shape, strict=True) if n != 1)
            return tuple(next(moving) if n != 1 else 0 for n in source)

        return _moved(call, squeezed)
    return _moved(call, places_in_self)


def _permute(call: Call) -> Array:
    n = len(call.shape)
    if "dims" in call.values:
        dims = [d % n for d in call.values["dims"]]
    else:
        dims = list(range(n))
        a, b = (call.values.get(x, i) % n for i, x in enumerate(("dim0", "dim1"))) if n else (0, 0)
        if n:
            dims[a], dims[b] = b, a
    return _moved(call, lambda places: tuple(places[dims.index(d)] for d in range(n)))


def _expand(call: Call) -> Array:
    x: Array = call.values["self"]
    return Array(call.shape, x.dtype, x.spread)


def _select(call: Call) -> Array:
    dim = _dim(call)
    size = call.values["self"].shape[dim]
    index = call.values["index"] % size
    return _moved(call, lambda places: (*places[:dim], index, *places[dim:]))


def _slice(call: Call) -> Array:
    s, dim, step = call.scalars, _dim(call), call.values["step"]
    size = call.values["self"].shape[dim]
    start, _, _ = slice(call.values["start"], call.values["end"], step).indices(size)

    def places_in_self(places: Places) -> Places:
        at = _plus(s, _times(s, places[dim], step), start)
        return (*places[:dim], at, *places[dim + 1 :])

    return _moved(call, places_in_self)


def _unbind(call: Call) -> list[Array]:
    x, dim = call.values["self"], _dim(call)
    shape = x.shape[:dim] + x.shape[dim + 1 :]

    def part(index: int) -> Array:
        return Array(shape, x.dtype, lambda p: x.at((*p[:dim], index, *p[dim:])))

    return [part(i) for i in range(x.shape[dim])]


def _stack(call: Call) -> Array:
    parts = call.values["tensors"]
    n = len(call.shape)
    dim = call.values["dim"] % n
    return _pick(call, dim, [(i, p, False) for i, p in enumerate(parts)])


def _concatenate(call: Call) -> Array:
    parts = [x for x in call.values["tensors"] if x.shape != (0,)]
    dim = call.values["dim"] % len(call.shape)
    starts = itertools.accumulate((x.shape[dim] for x in parts), initial=0)
    return _pick(call, dim, [(start, p, True) for start, p in zip(starts, parts, strict=False)])


def _pick(call: Call, dim: int, parts: list[tuple[int, Array, bool]]) -> Array:
    """The part that a coordinate falls into, of (its start, the part, if it has the dimension)."""
    s = call.scalars

    def entry(places: Places) -> Expr:
        at = places[dim]
        if not isinstance(at, int) and len(parts) > UNROLL:
            raise Untranslatable(f"a choice between {len(parts)} tensors")
        result: Expr | None = None
        for start, part, has_dim in parts:
            size = part.shape[dim] if has_dim else 1
            if isinstance(at, int):
                if not start <= at < start + size:
                    continue
                inner: Place = at - start
            else:
                inner = _plus(s, at, -start)
                inner = s.extremum(torch.int64, "maximum", inner, s.const(0, torch.int64))
                inner = s.extremum(torch.int64, "minimum", inner, s.const(size - 1, torch.int64))
            own = (*places[:dim], *((inner,) if has_dim else ()), *places[dim + 1 :])
            found = s.cast(part.at(own), part.dtype, call.dtype)
            if result is None:
                result = found
            else:
                here = s.compare(torch.int64, ">=", at, s.const(start, torch.int64))
                result = s.choose(call.dtype, here, found, result)
        assert result is not None
        return result

    return Array(call.shape, call.dtype, entry)


def _index(call: Call) -> Array:
    s, x, indices = call.scalars, call.values["self"], call.values["indices"]
    chosen = [i for i, index in enumerate(indices) if index is not None]
    for i in chosen:
        if indices[i].dtype in (torch.bool, torch.uint8):
            raise Untranslatable("indexing with booleans")
    shape = broadcast_shape([indices[i].shape for i in chosen])
    # indices that stand side by side are replaced in place, others move to the front
    first = chosen[0] if chosen == list(range(chosen[0], chosen[-1] + 1)) else 0
    rest = [i for i in range(len(x.shape)) if i not in chosen]

    def entry(places: Places) -> Expr:
        taken = places[first : first + len(shape)]
        kept = iter(places[:first] + places[first + len(shape) :])
        own: list[Place] = [None] * len(x.shape)
        for i in rest:
            own[i] = next(kept)
        for i in chosen:
            own[i] = s.place(indices[i].spread(taken), x.shape[i])
        return x.at(tuple(own))  # type: ignore[no-any-return]

    return Array(call.shape, x.dtype, entry)


def _index_select(call: Call) -> Array:
    s, index, dim = call.scalars, call.values["index"], _dim(call)
    size = call.values["self"].shape[dim]

    def places_in_self(places: Places) -> Places:
        at = index.at(places[dim : dim + len(index.shape)])
        return (*places[:dim], s.place(at, size, wraps=False), *places[dim + 1 :])

    return _moved(call, places_in_self)


def _gather(call: Call) -> Array:
    s, index, dim = call.scalars, call.values["index"], _dim(call)
    size = call.values["self"].shape[dim]

    def places_in_self(places: Places) -> Places:
        at = s.place(index.at(places), size, wraps=False)
        return (*places[:dim], at, *places[dim + 1 :])

    return _moved(call, places_in_self)


def _reduction(op: str) -> Rule:
    def rule(call: Call) -> Array:
        s, x = call.scalars, call.values["self"]
        dims = call.values.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        n = len(x.shape)
        over = {d % n for d in dims} if dims else set(range(n))
        count = math.prod(x.shape[d] for d in over)
        if count > UNROLL or count == 0:
            raise Untranslatable(f"a reduction of {count} entries")
        if op == "+" and call.dtype not in INTEGERS:
            raise Untranslatable("a sum of floats, whose order matters")
        keeps = call.values.get("keepdim", False)

        def entry(places: Places) -> Expr:
            kept = iter(places)
            fixed = [None if d in over else next(kept) for d in range(n)]
            if keeps:
                fixed = [None if d in over else places[d] for d in range(n)]
            result: Expr | None = None
            for inside in itertools.product(*(range(x.shape[d]) for d in sorted(over))):
                reduced = iter(inside)
                own = tuple(next(reduced) if d in over else fixed[d] for d in range(n))
                value = s.cast(x.at(own), x.dtype, call.dtype)
                if result is None:
                    result = value
                elif op in ("minimum", "maximum"):
                    result = s.extremum(call.dtype, op, result, value)
                elif op in ("&", "|"):
                    result = s.logic(op, result, value)
                else:
                    result = s.arithmetic(call.dtype, op, result, value)
            assert result is not None
            return result

        return Array(call.shape, call.dtype, entry)

    return rule


def _times(s: Scalars, place: Place, n: int) -> Place:
    if isinstance(place, int):
        return place * n
    return place if n == 1 else s.integer(torch.int64, "*", place, s.const(n, torch.int64))


def _plus(s: Scalars, place: Place, other: Place) -> Place:
    if isinstance(place, int) and isinstance(other, int):
        return place + other
    a, b = (s.const(x, torch.int64) if isinstance(x, int) else x for x in (place, other))
    if 0 in (place, other):
        return b if isinstance(place, int) else a
    return s.integer(torch.int64, "+", a, b)


def _divmod(s: Scalars, place: Place, n: int) -> tuple[Place, Place]:
    if isinstance(place, int):
        return divmod(place, n)
    size = s.const(n, torch.int64)
    return s.integer(torch.int64, "//", place, size), s.integer(torch.int64, "%", place, size)


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("alias", "detach", "clone", "lift", "lift_fresh", "lift_fresh_copy"), _same),
    "unsqueeze": _unsqueeze,
    **dict.fromkeys(("squeeze", "view", "reshape", "_unsafe_view", "_reshape_copy"), _reshape),
    **dict.fromkeys(("permute", "transpose", "t"), _permute),
    "expand": _expand,
    "select": _select,
    "slice": _slice,
    "unbind": _unbind,
    "stack": _stack,
    "cat": _concatenate,
    "index": _index,
    "index_select": _index_select,
    "gather": _gather,
    "any": _reduction("|"),
    "all": _reduction("&"),
    "sum": _reduction("+"),
    "amin": _reduction("minimum"),
    "amax": _reduction("maximum"),
}
