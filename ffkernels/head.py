"""The one-pass softmax head: labels an input from the layers' activities, and finds labels that are easily confused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import backends, checks, ops, reference_head
from .head_step import ff_head_step_
from .optim import Optimizer, state_dtype
from .state import OptimizerState, at_least_float32

_EPS = 1e-4  # of the rms normalisation


class SoftmaxHead(nn.Module):
    """A linear softmax on the normalised activities of chosen layers, run on the neutral label (Hinton 2022, 3.3).

    logits = sum_l n_l S_l^T with n_l = y_l / (rms(y_l) + 1e-4), trained by the cross entropy. The layers below never
    see its gradient. A step is ff_head_step_ where the backend has it. Elsewhere, and for the logits alone, the other
    ops compute it: normalising is the row scale of ff_forward, and ff_update_ with y = d loss / d logits and c = 1/2 is
    the gradient and the optimizer's step of a linear layer.

    Args:
        widths: N of every layer of the net.
        num_classes: C.
        layers: indices of the layers that it sees. None: all but the first, or the only one.
        optimizer: of its weights, which start at 0 and stay float32 (float64 beside a float64 net), also where the net
            is cast to bf16 or fp16.

    Raises:
        TypeError, ValueError: a layer that is not there, or named twice.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_classes: int,
        *,
        layers: Sequence[int] | None = None,
        optimizer: Optimizer,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        checks.count("num_classes", num_classes, 2, 2**31, "labels")
        chosen = list(range(len(widths) > 1, len(widths)) if layers is None else layers)
        if not chosen or len(set(chosen)) != len(chosen) or not all(0 <= i < len(widths) for i in chosen):
            raise ValueError(f"layers must hold different indices of the {len(widths)} layers, got {chosen}")
        self.layers, self.num_classes, self.optimizer = tuple(chosen), num_classes, optimizer
        shapes = [(num_classes, widths[i]) for i in chosen]
        self.weights = nn.ParameterList(
            nn.Parameter(torch.zeros(shape, dtype=state_dtype(dtype)), requires_grad=False) for shape in shapes
        )
        self.states = nn.ModuleList(OptimizerState(optimizer.init_state(w)) for w in self.weights)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SoftmaxHead:
        return super()._apply(at_least_float32(fn), recurse)

    def check_fits(self, widths: Sequence[int], num_classes: int | None) -> None:
        """ValueError if the head was made for another net."""
        seen = [w.shape[1] for w in self.weights]
        if (
            num_classes != self.num_classes
            or max(self.layers) >= len(widths)
            or seen != [widths[i] for i in self.layers]
        ):
            raise ValueError(
                f"head must be made for the net: it takes layers {self.layers} of widths {seen} and gives "
                f"{self.num_classes} classes; the net has widths {list(widths)} and {num_classes} classes"
            )

    def logits(
        self,
        ys: Sequence[Tensor],  # (B, N_l) of every layer of the net
        totals: Sequence[Tensor],  # (B,): their goodness G
    ) -> Tensor:  # (B, C), in the weights' dtype
        parts = []
        for i, weight in zip(self.layers, self.weights, strict=True):
            # the ops have no identity: z is relu(z) - relu(-z)
            signed, y, sqnorm = torch.cat([weight, -weight]), ys[i].to(weight.dtype), totals[i].to(weight.dtype)
            both, _ = ops.ff_forward(y, signed, x_sqnorm=sqnorm, normalize="rms", eps=_EPS, precision="highest")
            parts.append(both[:, : self.num_classes] - both[:, self.num_classes :])
        return torch.stack(parts).sum(0)

    def step(
        self,
        ys: Sequence[Tensor],  # (B, N_l) of every layer of the net
        totals: Sequence[Tensor],  # (B,)
        labels: Tensor,  # (B,)
    ) -> tuple[Tensor, Tensor]:  # logits (B, C) from before the update, loss ()
        """One step down the mean cross entropy."""
        modules: dict[str, Any] = self._modules  # ParameterList and ModuleList would make many calls of what follows
        weights: list[Tensor] = [*modules["weights"]._parameters.values()]
        dtype = weights[0].dtype
        y = [ys[i] if ys[i].dtype == dtype else ys[i].to(dtype) for i in self.layers]
        sqnorm = [totals[i] if totals[i].dtype == dtype else totals[i].to(dtype) for i in self.layers]
        states = [state._buffers for state in modules["states"]._modules.values()]
        if backends.has_kernel("ff_head_step_", y[0]):
            return ff_head_step_(y, sqnorm, labels, weights, states, self.optimizer, eps=_EPS)
        logits = self.logits(ys, totals)
        loss, error = reference_head.cross_entropy(logits, labels.long())
        half = error.new_full((len(labels),), 0.5)
        for weight, state, own_y, q in zip(weights, states, y, sqnorm, strict=True):
            ops.ff_update_(
                own_y, error, half, weight, None, state, self.optimizer, x_sqnorm=q, normalize="rms", eps=_EPS,
                precision="highest",
            )  # fmt: skip
        return logits, loss

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, layers={self.layers}, optimizer={self.optimizer}"
