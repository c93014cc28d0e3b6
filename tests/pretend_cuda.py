"""A CUDA device that is not there: what is planned for a GPU is tested on a machine without one.

Inside `pretend_cuda()`, tensors made on or moved to "cuda" compute on the CPU, say that they are on
cuda:0, and refuse what CUDA refuses: an operator with a tensor on the CPU, unless that has no
dimensions or is an index. Kernels cannot be compiled for it.
"""

import contextlib
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from flexsparse import launch

CUDA = torch.device("cuda:0")
MOVES = (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_)
GETTERS = {Tensor.device: CUDA, Tensor.is_cuda: True, Tensor.is_cpu: False}
mapped: list = []  # the functions being mapped by torch.vmap, whose tensors are its own


class OnCuda(Tensor):
    """A tensor that says it is on cuda:0; `host` holds its numbers."""

    @staticmethod
    def __new__(cls, host):
        return Tensor._make_wrapper_subclass(
            cls, host.shape, strides=host.stride(), dtype=host.dtype, device=CUDA
        )

    def __init__(self, host):
        self.host = host

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if any(x not in KNOWN for x in types):
            return NotImplemented  # from_mask_mod's stand-ins trace it
        return run(func, args, kwargs or {})


KNOWN = (OnCuda, Tensor, torch.nn.Parameter)


class _Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


@contextlib.contextmanager
def pretend_cuda(*, by_default=False):
    """Have a device "cuda"; by_default also makes it the default, as torch.set_default_device."""
    default = torch.device("cuda") if by_default else contextlib.nullcontext()
    plain = mock.patch.object(launch, "has_own_operators", return_value=False)
    with mock.patch.object(torch, "vmap", _vmap), plain, _Mode(), default:
        yield


def run(func, args, kwargs):
    """What `func` gives, on the device where CUDA would give it."""
    owner = getattr(func, "__self__", None)
    if getattr(func, "__name__", "") == "__get__" and owner in GETTERS:
        return GETTERS[owner] if isinstance(args[0], OnCuda) else func(*args)
    if func is torch.device:
        return func(*args, **kwargs)
    leaves = tree_leaves((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    there = [x for x in tensors if isinstance(x, OnCuda)]
    if func is Tensor.numpy and there:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")
    if there and func not in MOVES and not mapped:
        _refuse_mixed(func, args, tensors)
    if there and any(map(_is_stand_in, tensors)):
        return _traced(func, args, kwargs)
    is_moved = _moves_to_cuda(func, args, leaves, there)
    if func is Tensor.cuda:
        func, args, kwargs = Tensor.clone, args[:1], {}
    of_host = {id(x.host): x for x in there}
    result = func(*tree_map(_on_host, args), **tree_map(_on_host, kwargs))

    def placed(x):
        if type(x) is not Tensor:
            return x
        if is_moved:
            return of_host.get(id(x)) if id(x) in of_host else OnCuda(x)
        return x.clone() if id(x) in of_host else x  # a move from CUDA is a copy

    return tree_map(placed, result)


def _on_host(x):
    if isinstance(x, OnCuda):
        return x.host
    return "cpu" if _is_device(x) and torch.device(x).type == "cuda" else x


def _is_device(x):
    if isinstance(x, str):
        return x.split(":")[0] in ("cpu", "cuda", "meta")
    return isinstance(x, torch.device)


def _is_stand_in(x):
    """Whether it is one of those from_mask_mod traces with."""
    return type(x) not in KNOWN


def _moves_to_cuda(func, args, leaves, there):
    """Whether the result is on CUDA."""
    if mapped or func is Tensor.cpu:
        return False
    devices = [x for x in leaves if _is_device(x)]
    if devices:
        return torch.device(devices[0]).type == "cuda"
    if func is Tensor.cuda:
        return True
    if func is Tensor.copy_:
        return isinstance(args[0], OnCuda)
    if func is Tensor.to and isinstance(args[1], Tensor):
        return isinstance(args[1], OnCuda)
    return bool(there)


def _refuse_mixed(func, args, tensors):
    if all(isinstance(x, OnCuda) or _is_stand_in(x) or x.dim() == 0 for x in tensors):
        return
    if func is Tensor.__getitem__ and isinstance(args[0], OnCuda):
        return
    if func is Tensor.__setitem__ and isinstance(args[0], OnCuda):
        value = args[2]
        if not isinstance(value, Tensor) or isinstance(value, OnCuda) or value.dim() == 0:
            return
    raise RuntimeError(f"Expected all tensors to be on the same device: {func} of cuda:0 and cpu")


def _traced(func, args, kwargs):
    """Leave an operator to from_mask_mod's tracer."""
    if func is Tensor.__getitem__:  # which would ask CUDA for its current device
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        func, args = torch.ops.aten.index.Tensor, (args[0], list(index))
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


_torch_vmap = torch.vmap


def _vmap(func, *dims, **options):
    real = _torch_vmap(func, *dims, **options)

    def call(*args):
        is_there = any(isinstance(x, OnCuda) for x in tree_leaves(args))
        mapped.append(func)
        try:
            result = real(*tree_map(_on_host, args))
        finally:
            mapped.pop()
        return tree_map(lambda x: OnCuda(x) if is_there and not mapped else x, result)

    return call
