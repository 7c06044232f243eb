"""A GPU for machines without one, on which nothing is computed: torch's fake tensors, which have shapes and a device.

It finds what a real GPU does not report: operations for which the host waits until all queued work is done. Reading a
value (`item`, `tolist`, `bool`) raises torch's DataDependentOutputException, and tensors of both devices in one
operation FakeTensorDeviceMismatchError. Copies between the devices that the host waits for are counted.

Tensors of the CPU are real, and zero where they were copied from the GPU. What asks the driver does not work: backward
passes, autocast, streams and events.
"""

import traceback
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)


class FakeGpu(FakeTensorMode):
    """A context in which tensors can be on GPU.

    `waits` has a line for each copy that the host waits for: those without non_blocking, and those from host memory
    that is not pinned.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        self._pinned: dict[int, torch.Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, dict(kwargs or {})
        if name in ("_pin_memory", "pin_memory"):
            return self._pin(args[0].clone())
        if kwargs.get("pin_memory"):
            return self._pin(func(*args, **{**kwargs, "pin_memory": False}))
        if not any(_is_on_gpu(value) for value in tree_leaves((args, kwargs))):
            return func(*args, **kwargs)
        if name == "to":  # which inference mode does not take apart
            with self:
                return func.decompose(*args, **kwargs)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name == "_to_copy":
            self._note_copy(args[0], result, kwargs.get("non_blocking", False))
            if result.device.type == "cpu":
                return torch.zeros(result.shape, dtype=result.dtype)
        elif name == "copy_":
            self._note_copy(args[1], result, kwargs.get("non_blocking", (*args, False)[2]))
        return result

    def _note_copy(self, source: torch.Tensor, copy: torch.Tensor, non_blocking: bool) -> None:
        is_to_gpu = source.device.type == "cpu" and copy.device.type == "cuda"
        is_from_gpu = source.device.type == "cuda" and copy.device.type == "cpu"
        is_pageable = is_to_gpu and source.untyped_storage().data_ptr() not in self._pinned
        if (is_to_gpu or is_from_gpu) and (not non_blocking or is_pageable):
            self.waits.append(f"{source.device} to {copy.device}, {_caller()}")

    def _pin(self, tensor: torch.Tensor) -> torch.Tensor:
        self._pinned[tensor.untyped_storage().data_ptr()] = tensor
        return tensor


def _is_on_gpu(value: Any) -> bool:
    return isinstance(value, FakeTensor) or (isinstance(value, torch.device) and value.type == "cuda")


def _caller() -> str:
    """Return the innermost line of code that is neither torch's nor this file's."""
    frames = [each for each in traceback.extract_stack() if "/torch/" not in each.filename]
    frame = [each for each in frames if each.filename != __file__][-1]
    return f"{frame.filename}:{frame.lineno}: {frame.line}"
