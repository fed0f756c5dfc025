"""A network's training step as a CUDA graph: one launch a step from the host, whatever the number of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .nn import FFNet, NetStep


def on_gpu(t: Tensor) -> bool:
    return t.is_cuda


class CapturedStep:
    """What `FFNet.capture` returns: call it with inputs of the captured shapes to run one training step.

    The results lie in memory of the graph: the next call overwrites them. Weights, optimizer state and learning rates
    that are tensors may be changed in place between calls; another optimizer, other options or moving the network to
    another device need a new capture.
    """

    def __init__(self, net: FFNet, inputs: tuple[Tensor, ...]) -> None:
        for i, t in enumerate(inputs):
            if not isinstance(t, Tensor):
                raise TypeError(f"inputs must be tensors, got {type(t).__name__} as number {i}")
            if not on_gpu(t):
                raise RuntimeError(f"a CUDA graph holds work on a GPU; input {i} is on {t.device}")
        if len(inputs) not in (2, 3):
            raise TypeError(f"capture takes (x_pos, x_neg) or (x, labels_pos, labels_neg), got {len(inputs)} tensors")
        self._inputs = tuple(t.clone() for t in inputs)
        step: Callable[..., NetStep] = net.step if len(inputs) == 2 else net.label_step

        def run() -> NetStep:
            return step(*self._inputs)  # seeds of dropout are drawn by the graph: torch's generator counts replays

        # The first run compiles kernels and allocates what later ones reuse, which a capture must not do. It trains, so
        # what it has changed is put back.
        before = {name: t.clone() for name, t in net.state_dict().items()}
        side = torch.cuda.Stream(inputs[0].device)
        side.wait_stream(torch.cuda.current_stream(inputs[0].device))
        try:
            with torch.cuda.stream(side):
                run()
        finally:
            torch.cuda.current_stream(inputs[0].device).wait_stream(side)
            with torch.no_grad():
                for name, t in net.state_dict().items():
                    t.copy_(before[name])
        self._graph = torch.cuda.CUDAGraph()
        # by itself torch would capture on the current device, which need not be the inputs'
        with torch.cuda.graph(self._graph, stream=side):
            self._result = run()

    def __call__(self, *inputs: Tensor) -> NetStep:
        if len(inputs) != len(self._inputs):
            raise TypeError(f"this step was captured with {len(self._inputs)} inputs, got {len(inputs)}")
        for i, (own, given) in enumerate(zip(self._inputs, inputs, strict=True)):
            if given.shape != own.shape or given.dtype != own.dtype:
                raise ValueError(
                    f"input {i} must be {own.dtype} {tuple(own.shape)} as captured, "
                    f"got {given.dtype} {tuple(given.shape)}"
                )
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._result
