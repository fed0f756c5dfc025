"""What plain torch does for a case on a GPU, counted: launches, bytes and flops, without a GPU and without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cost import Work
from .cases import Case
from .problem import Problem
from .torch_columns import Autograd


def _is_view(func: Any) -> bool:
    """Whether an operation only looks at memory in another way: an output that aliases an input it does not write."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


_NO_LAUNCH = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")  # memory, left as it is
_WRITE_ONLY = ("copy_", "fill_", "zero_")  # the old contents do not matter


class Counter(TorchDispatchMode):
    """Adds up what the operations run under it launch, read, write and compute.

    Each operation that touches memory counts as one launch, reads each of its inputs once and writes each of its
    outputs once: torch's own kernels need at least that. Views and uninitialised memory count nothing.
    """

    def __init__(self) -> None:
        # warns of a missing triton when it is imported, which is nothing to those who count nothing
        from torch.utils.flop_counter import flop_registry

        super().__init__()
        self.work, self._flops = Work(0, 0, 0, 0), flop_registry

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if func.namespace != "aten" or name in _NO_LAUNCH or _is_view(func):
            return out
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        # what is written in place is an input that the schema marks, nested in lists for fused optimizers
        mutated = [
            t
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for t in tree_leaves(value)
            if isinstance(t, Tensor)
        ]
        outputs = mutated or [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        if name in _WRITE_ONLY:
            inputs = [t for t in inputs if all(t is not m for m in mutated)]
        count_flops = self._flops.get(func.overloadpacket)
        flops = 0 if count_flops is None else count_flops(*args, **kwargs, out_val=out)
        self.work += Work(flops, _bytes(inputs), _bytes(outputs))
        return out


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def autograd(case: Case, dtype: torch.dtype) -> Work:
    """What the usual implementation (torch_columns.Autograd) takes for a run of ``case`` with tensors of ``dtype``."""
    with FakeTensorMode():
        column = Autograd(Problem(case, dtype=dtype), dtype)
        column.run()  # the first step makes the optimizer's state
        with Counter() as counter:
            column.run()
    return counter.work
