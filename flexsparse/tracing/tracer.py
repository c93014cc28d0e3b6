"""The tracer: what a mask_mod calls, operator by operator, while it runs once on index tensors."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from flexsparse.errors import MaskError
from flexsparse.expr import Mask
from flexsparse.tensors import Table
from flexsparse.tracing.arrays import Array, Call, Places, constant
from flexsparse.tracing.aten import translate
from flexsparse.tracing.opaque import Program, elementwise
from flexsparse.tracing.scalars import NoRule, Scalars, Untranslatable
from flexsparse.tracing.stand_in import StandIn, ValueNeededError, described
from flexsparse.tree import VARIABLES, Expr


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows the index tensors through the operators that a mask_mod calls.

    Each tensor that depends on an index has an Array, a meta tensor that is asked for shapes and
    dtypes, and a slot in the program of all calls.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.scalars = Scalars()
        self.program = Program()
        self.arrays: dict[int, Array] = {}
        self.metas: dict[int, Tensor] = {}
        self.tables: dict[int, tuple[Tensor, Table]] = {}
        self.constants: dict[int, tuple[Tensor, Array]] = {}
        self.made_here: dict[int, Tensor] = {}
        self.alive: list[Tensor] = []
        self.viewed: set[int] = set()
        self.indices = []
        for variable in VARIABLES:
            index = StandIn(torch.empty((), dtype=torch.int64, device="meta"), device)
            self._follow(index, index.meta, self._variable(variable))
            self.program.input(index)
            self.indices.append(index)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, which takes seconds, to say so

    def _variable(self, name: str) -> Array:
        return Array((), torch.int64, lambda places: self.scalars.variable(name))

    def _follow(self, tensor: Tensor, meta: Tensor, array: Array) -> None:
        self.arrays[id(tensor)] = array
        self.metas[id(tensor)] = meta
        self.alive.append(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise MaskError(
                f"It draws random numbers (aten.{name}), so that no two readings of it agree. Draw "
                "them once, outside, and read the tensor with table[index]."
            )
        tensors = _tensors_in((args, kwargs))
        followed = [x for x in tensors if id(x) in self.arrays]
        if func._schema.is_mutable:
            return self._in_place(func, name, args, kwargs, bool(followed))
        if not followed:
            return self._for_real(func, args, kwargs, tensors)
        if torch.Tag.data_dependent_output in func.tags:
            raise ValueNeededError
        metas = pytree.tree_map_only(Tensor, self._meta, (args, kwargs))
        device = kwargs.get("device") or followed[0].device
        if "device" in kwargs:
            metas[1]["device"] = "meta"
        made: Any = described(name, _by_name(func, *metas))
        if made is None:
            if torch.Tag.dynamic_output_shape in func.tags:
                raise ValueNeededError
            made = func(*metas[0], **metas[1])
        several = isinstance(made, (tuple, list))
        outputs: list[Tensor] = [StandIn(x, device) for x in (made if several else [made])]
        if any(x.alias_info is not None for x in func._schema.arguments):
            self.viewed.update(map(id, [*tensors, *outputs]))
        self._translate(func, name, args, kwargs, metas, outputs)
        return outputs if several else outputs[0]

    def _meta(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self.metas:
            self.metas[id(tensor)] = tensor.to("meta")
            self.alive.append(tensor)
        return self.metas[id(tensor)]

    def _for_real(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Run an operator that no index has a part in, and watch what it read."""
        out = func(*args, **kwargs)
        read = self._tables_of(tensors)
        for x in _tensors_in(out):
            self.made_here[id(x)] = x
            if read:
                self.tables[id(x)] = (x, Table(x.detach(), read))
        return out

    def _tables_of(self, tensors: list[Tensor]) -> tuple[Table, ...]:
        return tuple(table for x in tensors if (table := self._watched(x)) is not None)

    def _watched(self, tensor: Tensor) -> Table | None:
        """A captured tensor, or one computed from captured ones, as a table; None for others."""
        if id(tensor) not in self.tables:
            if id(tensor) in self.made_here:
                return None
            table = Table(tensor)
            if tensor.requires_grad:
                # a tensor detached in here counts its versions apart
                table = Table(tensor.detach(), (table,))
            self.tables[id(tensor)] = (tensor, table)
        return self.tables[id(tensor)][1]

    def _in_place(self, func: Any, name: str, args: Any, kwargs: Any, followed: bool) -> Any:
        """Run `x &= y` for real, or else let the operator that makes a new tensor stand for x."""
        target: Any = args[0] if args else None
        functional = getattr(torch.ops.aten, name.removesuffix("_"), None)
        functional = getattr(functional, func._overloadname, None)
        if id(target) not in self.arrays and id(target) not in self.made_here:
            what = "a captured tensor"
        elif not name.endswith("_") or functional is None or self._is_shared(target, followed):
            what = "a tensor that others are made from"
        else:
            what = ""
        if what:
            raise MaskError(
                f"It writes to {what} in place (aten.{name}). Make a new tensor instead: "
                "x = x & y, or torch.where."
            )
        if not followed:
            out = func(*args, **kwargs)
            read = self._tables_of(_tensors_in((args, kwargs)))
            if read:
                # detached, as results are: the next write would make a change of this one
                self.tables[id(target)] = (target, Table(target.detach(), read))
            return out
        result = self.__torch_dispatch__(functional, (), args, kwargs)
        if result.dtype != target.dtype:
            to_copy = torch.ops.aten._to_copy.default
            result = self.__torch_dispatch__(to_copy, (), (result,), {"dtype": target.dtype})
        self._follow(target, self.metas[id(result)], self.arrays[id(result)])
        self.program.alias(target, result)
        return target

    def _is_shared(self, target: Tensor, followed: bool) -> bool:
        """Whether other tensors would change with this one."""
        if id(target) in self.arrays:
            return id(target) in self.viewed
        memory = target.untyped_storage().data_ptr()
        others = [x for x, _ in self.constants.values()]
        if followed:
            others += [x for x in self.made_here.values() if x is not target]
        return any(x.untyped_storage().data_ptr() == memory for x in others)

    def _array(self, tensor: Tensor) -> Array:
        if id(tensor) in self.arrays:
            return self.arrays[id(tensor)]
        if id(tensor) not in self.constants:
            array = constant(self.scalars, tensor, self._watched(tensor))
            self.constants[id(tensor)] = (tensor, array)
        return self.constants[id(tensor)][1]

    def _translate(
        self, func: Any, name: str, args: Any, kwargs: Any, metas: Any, outputs: list[Tensor]
    ) -> None:
        """Give each output an Array: by the rule of the operator, or opaque."""
        self.program.call(func, args, kwargs, outputs, self._watched)
        arguments = pytree.tree_map_only(Tensor, self._array, (args, kwargs))
        values, raw = _by_name(func, *arguments), _by_name(func, *metas)
        call = Call(self.scalars, values, raw, tuple(outputs[0].shape), outputs[0].dtype)
        try:
            made = translate(name, call)
        except Untranslatable:
            made = None
        own_name = f"aten.{name}"
        pointwise = torch.Tag.pointwise in func.tags and len(outputs) == 1

        def no_rule(places: Places) -> Expr:
            raise NoRule(own_name)

        for i, output in enumerate(outputs):

            def opaque(places: Places, reason: Untranslatable, output: Tensor = output) -> Expr:
                if pointwise:
                    with contextlib.suppress(Untranslatable):
                        return elementwise(
                            self.scalars, own_name, func, arguments, output.dtype, places
                        )
                blamed = str(reason) if isinstance(reason, NoRule) else own_name
                return self.program.opaque(self.scalars, blamed, output, places)

            if made is None:
                array = Array(tuple(output.shape), output.dtype, no_rule)
            else:
                array = made[i] if isinstance(made, list) else made
                # operators that share a name, as view(shape) and view(dtype) do, share a rule
                assert (array.shape, array.dtype) == (tuple(output.shape), output.dtype), own_name
            array.otherwise = opaque
            self._follow(output, output.meta, array)  # type: ignore[attr-defined]
            if not array.shape:
                array.at(())  # one by one, so that a long chain of operators is no deep recursion

    def mask(self, result: Any, name: str) -> Mask:
        """The mask that a tensor returned by the mask_mod stands for."""
        wants = "Return one boolean: a comparison, or several combined with & | ~"
        if not isinstance(result, Tensor):
            as_tensor = (
                ", or q_idx.new_ones((), dtype=torch.bool) for a constant"
                if isinstance(result, bool)
                else ""
            )
            raise MaskError(
                f"It returned {type(result).__name__}, not a tensor. {wants}{as_tensor}."
            )
        array = self._array(result)
        if array.shape:
            raise MaskError(
                f"It returned a tensor of shape {array.shape} for one place. {wants}; reduce it "
                "with .any() or .all()."
            )
        if array.dtype != torch.bool:
            is_score = array.dtype.is_floating_point
            hint = " (what adds to a score is a score_mod)" if is_score else ""
            raise MaskError(f"It returned {array.dtype}{hint}. {wants}; `x != 0` makes a boolean.")
        mask = array.at(())
        assert isinstance(mask, Mask)
        return mask


def _tensors_in(tree: Any) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def _by_name(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """The arguments of an operator by the names in its schema, defaults included."""
    named = {}
    for i, argument in enumerate(func._schema.arguments):
        if i < len(args):
            named[argument.name] = args[i]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        else:
            named[argument.name] = argument.default_value
    return named
