"""Optimizers that run inside the fused update: SGD, Adam and AdamW with torch.optim's names and formulas, HintonSGD.

An optimizer here is a frozen description; the tensors it works on are a plain dict, made by ``init_state``. The dict is
flat so that it can live in a module's buffers: ``step`` is shared by weight and bias, every other entry of the bias has
the suffix ``_bias``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

__all__ = ["SGD", "Adam", "AdamW", "HintonSGD", "Optimizer", "state_dtype"]


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of optimizer state, goodness and loss beside ``dtype``: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _check_number(owner: str, name: str, value: object, low: float, high: float = math.inf, *, open_high=False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    in_range = low <= value < high if open_high else low <= value <= high
    if not (math.isfinite(value) and in_range):
        allowed = f"in [{low}, {high})" if open_high else (f"in [{low}, {high}]" if high < math.inf else f">= {low}")
        raise ValueError(f"{owner}: {name} must be finite and {allowed}, got {value!r}")


def _check_lr(owner: str, lr: object) -> None:
    if isinstance(lr, Tensor):
        if lr.dim() != 0 or lr.dtype != torch.float32:
            raise ValueError(
                f"{owner}: lr as a tensor must be 0-dimensional float32, got shape {tuple(lr.shape)} {lr.dtype}"
            )
    else:
        _check_number(owner, "lr", lr, 0.0)


_ADAM, _MOMENTUM = ("exp_avg", "exp_avg_sq"), ("momentum_buffer",)
# the keys of a state by the weight's slots and whether there is a bias
_NAMES: dict[tuple[tuple[str, ...], bool], tuple[str, ...]] = {
    (slots, has_bias): ("step", *slots, *(f"{s}_bias" for s in slots if has_bias))
    for slots in (_ADAM, _MOMENTUM, ())
    for has_bias in (True, False)
}


def state_names(kind: str, length: int, has_bias: bool) -> tuple[str, ...]:
    """Keys of a flat state of ``length`` tensors."""
    slots = _ADAM if kind in ("adam", "adamw") else () if kind == "sgd" and length == 1 else _MOMENTUM
    names = _NAMES[slots, has_bias]
    if len(names) != length:
        raise ValueError(f"state must hold {len(names)} tensors {list(names)} for {kind!r}, got {length}")
    return names


@dataclass(frozen=True)
class _Base:
    """What the optimizers share: the state's layout and the flat form that the ops take."""

    lr: float | Tensor
    kind: ClassVar[str]  # the name under which the registered ops know the formula

    def _slots(self) -> tuple[str, ...]:
        """Names of the tensors that the state holds for the weight (and once more for the bias)."""
        raise NotImplementedError

    def _hyper(self) -> tuple[float, ...]:
        """The hyper-parameters without lr, in the order in which the ops take them."""
        raise NotImplementedError

    def state_names(self, has_bias: bool) -> tuple[str, ...]:
        """Keys of ``state`` in the order in which the ops take its tensors."""
        return _NAMES[self._slots(), has_bias]

    def init_state(
        self,
        weight: Tensor,  # (N, K)
        bias: Tensor | None = None,  # (N,)
    ) -> dict[str, Tensor]:
        """Zero state for ``weight`` and ``bias``: ``step`` (), and for each slot a tensor like the parameter.

        All are float32 (float64 beside float64 parameters) and on the weight's device, whatever the weight's dtype, so
        that a step can be captured in a CUDA graph and low-precision weights keep full-precision moments.
        """
        dtype = state_dtype(weight.dtype)
        state = {"step": torch.zeros((), dtype=dtype, device=weight.device)}
        for name in self._slots():
            state[name] = torch.zeros_like(weight, dtype=dtype, memory_format=torch.contiguous_format).detach()
        if bias is not None:
            for name in self._slots():
                state[f"{name}_bias"] = torch.zeros_like(bias, dtype=dtype).detach()
        return state

    @property
    def hyper(self) -> list[float]:
        """The hyper-parameters in the ops' order: lr (0 where lr is a tensor), then four of the formula's own."""
        return [0.0 if isinstance(self.lr, Tensor) else float(self.lr), *self._hyper()]

    def flatten(self, state: Mapping[str, Tensor], has_bias: bool) -> list[Tensor]:
        """The tensors of ``state`` in the ops' order; ValueError names what is missing."""
        names = _NAMES[self._slots(), has_bias]
        try:
            return [*map(state.__getitem__, names)]
        except (KeyError, TypeError, AttributeError):
            given = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(
                f"state: {type(self).__name__} needs {list(names)} (optimizer.init_state makes them), got {given}"
            ) from None


@dataclass(frozen=True)
class SGD(_Base):
    """Stochastic gradient descent with momentum: the formula and argument names of ``torch.optim.SGD``.

    Args:
        lr: learning rate >= 0; a float, or a 0-dimensional float32 tensor on the weight's device that may be changed in
            place between steps (no recompilation, no new CUDA graph).
        momentum, dampening, weight_decay: >= 0. nesterov needs momentum > 0 and dampening = 0.

    Raises:
        ValueError, TypeError: a value that is not finite, out of range or not a number.
    """

    lr: float | Tensor = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False

    kind: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        _check_lr("SGD", self.lr)
        for name in ("momentum", "dampening", "weight_decay"):
            _check_number("SGD", name, getattr(self, name), 0.0)
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"SGD: nesterov must be True or False, got {self.nesterov!r}")
        if self.nesterov and (self.momentum <= 0 or self.dampening != 0):
            raise ValueError(
                "SGD: nesterov needs momentum > 0 and dampening = 0, "
                f"got momentum {self.momentum!r} and dampening {self.dampening!r}"
            )

    def _slots(self) -> tuple[str, ...]:
        return _MOMENTUM if self.momentum else ()

    def _hyper(self) -> tuple[float, ...]:
        return (self.momentum, self.dampening, self.weight_decay, float(self.nesterov))


@dataclass(frozen=True)
class Adam(_Base):
    """Adam (Kingma & Ba 2015, algorithm 1): the formula and argument names of ``torch.optim.Adam``.

    Args:
        lr: learning rate >= 0; a float, or a 0-dimensional float32 tensor on the weight's device that may be changed in
            place between steps (no recompilation, no new CUDA graph).
        betas: decay of the first and second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: L2 penalty added to the gradient, >= 0.

    Raises:
        ValueError, TypeError: a value that is not finite, out of range or not a number.
    """

    lr: float | Tensor = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    kind: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        _check_lr(owner, self.lr)
        if not isinstance(self.betas, (tuple, list)) or len(self.betas) != 2:
            raise TypeError(f"{owner}: betas must be two numbers, got {self.betas!r}")
        for i, beta in enumerate(self.betas):
            _check_number(owner, f"betas[{i}]", beta, 0.0, 1.0, open_high=True)
        object.__setattr__(self, "betas", tuple(self.betas))
        _check_number(owner, "eps", self.eps, 0.0)
        _check_number(owner, "weight_decay", self.weight_decay, 0.0)

    def _slots(self) -> tuple[str, ...]:
        return _ADAM

    def _hyper(self) -> tuple[float, ...]:
        return (*self.betas, self.eps, self.weight_decay)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019): ``torch.optim.AdamW``; arguments as for `Adam`."""

    weight_decay: float = 1e-2

    kind: ClassVar[str] = "adamw"


@dataclass(frozen=True)
class HintonSGD(_Base):
    """Stochastic gradient descent as Hinton's published Forward-Forward code has it.

    v <- momentum v + (1 - momentum) g from v = 0, weight <- weight - lr (v + weight_decay weight), and the bias alike
    without weight decay. Unlike `SGD` the momentum averages gradients, so that it does not change their scale, and the
    weight decay is no part of it.

    Args:
        lr: learning rate >= 0; a float, or a 0-dimensional float32 tensor on the weight's device that may be changed in
            place between steps (no recompilation, no new CUDA graph).
        momentum: in [0, 1). weight_decay: >= 0.

    Raises:
        ValueError, TypeError: a value that is not finite, out of range or not a number.
    """

    lr: float | Tensor = 0.01
    momentum: float = 0.9
    weight_decay: float = 0.0

    kind: ClassVar[str] = "hinton_sgd"

    def __post_init__(self) -> None:
        _check_lr("HintonSGD", self.lr)
        _check_number("HintonSGD", "momentum", self.momentum, 0.0, 1.0, open_high=True)
        _check_number("HintonSGD", "weight_decay", self.weight_decay, 0.0)

    def _slots(self) -> tuple[str, ...]:
        return _MOMENTUM

    def _hyper(self) -> tuple[float, ...]:
        return (self.momentum, self.weight_decay, 0.0, 0.0)


Optimizer = SGD | Adam | AdamW | HintonSGD
