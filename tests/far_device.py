"""A device that is not there: tensors that call another device their home and are computed on the CPU. It holds no test.

A machine without a GPU can so be asked what would go wrong on one: tensors of two devices in one operation, and waiting for
the device, which a step must not do. What comes out is what the CPU computes, bit for bit. PyTorch calls the device "meta",
the only one that autograd takes to be elsewhere without asking a driver for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
CPU, FAR = torch.device("cpu"), torch.device("meta")
# operations whose result has a size, or is a number, that only the device knows
WAITING = {
    aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten.bincount, aten._unique2, aten.unique_dim,
    aten.unique_consecutive, aten.repeat_interleave,
}  # fmt: skip
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class WaitedError(Exception):
    """The program would have stood still until the device had answered."""


class TwoDevicesError(Exception):
    """One operation was given tensors of both devices."""


class FarTensor(torch.Tensor):
    """A tensor on the device that is not there; `here` is what it really is."""

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> FarTensor:
        return torch.Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype, device=FAR
        )

    def __init__(self, here: torch.Tensor) -> None:
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        raise RuntimeError("far tensors are computed with inside far_device() alone")


class _Computes(TorchDispatchMode):
    """Carries out every operation on the CPU, and says what a real device would mind."""

    def __init__(self) -> None:
        super().__init__()
        self.strict = False

    def waits(self, what: object) -> None:
        if self.strict:
            raise WaitedError(str(what))

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        far = [tensor for tensor in tensors if isinstance(tensor, FarTensor)]
        if any(tensor.device == FAR and not isinstance(tensor, FarTensor) for tensor in tensors):
            raise WaitedError(
                "torch.tensor(..., device=...) copies from the CPU: make it there and move it without blocking"
            )
        operation, home = function.overloadpacket, FAR if far else CPU
        target = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), home)
        if operation in (aten._to_copy, aten.to):
            if target != home and not (target == FAR and kwargs.get("non_blocking")):
                self.waits(f"copy from {home} to {target}")
        elif operation is aten.copy_:
            target = FAR if isinstance(args[0], FarTensor) else CPU
            blocking = not (kwargs.get("non_blocking") or args[2:] == (True,))
            if far and len(far) < len(tensors) and (target != FAR or blocking):
                self.waits("copy_ between devices")
        elif far:
            # a number may come along from the CPU
            if any(tensor.dim() for tensor in tensors if not isinstance(tensor, FarTensor)):
                raise TwoDevicesError(
                    f"{function} was given {[(tuple(tensor.shape), str(tensor.device)) for tensor in tensors]}"
                )
            mask = operation in INDEXING and any(index is not None and index.dtype == torch.bool for index in args[1])
            if (operation in WAITING and kwargs.get("output_size") is None) or mask:
                self.waits(function)

        def here(leaf: Any) -> Any:
            return leaf.here if isinstance(leaf, FarTensor) else CPU if isinstance(leaf, torch.device) else leaf

        found = function(*tree_map(here, args), **tree_map(here, kwargs))
        if target != FAR:
            return found
        # what was changed in place stays the tensor that it was
        known = {id(tensor.here): tensor for tensor in far}

        def there(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else FarTensor(leaf)

        with torch.inference_mode(False):
            return tree_map(there, found)


@contextlib.contextmanager
def far_device() -> Iterator[_Computes]:
    """Inside, `FAR` is a device like any other. With `strict` set on what is given, waiting for it is an error."""
    autocast, mode = torch.autocast, _Computes()

    def knowing_far(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return contextlib.nullcontext() if device_type == FAR.type else autocast(device_type, *args, **kwargs)

    torch.autocast = knowing_far
    try:
        with mode:
            yield mode
    finally:
        torch.autocast = autocast


@contextlib.contextmanager
def strictly(mode: _Computes) -> Iterator[None]:
    """Inside, waiting for the device is an error."""
    before, mode.strict = mode.strict, True
    try:
        yield
    finally:
        mode.strict = before
