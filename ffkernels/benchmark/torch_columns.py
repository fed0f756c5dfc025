"""A case in plain torch: the usual implementation on autograd, and a gradient derived by hand, eager or compiled.

All follow one specification (Hinton 2022): l2 normalisation, relu, goodness as the mean of squares, logistic loss
around the threshold 2, every layer fed by what the layer below gave before its own update.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..optim import SGD, Adam
from .cases import CLASSES
from .problem import Problem

EPS, THRESHOLD, STRENGTH = 1e-4, 2.0, 1.0
Result = dict[str, Any]  # Tensor, or a list with one a layer


def _overlay(
    x: Tensor,  # (B, K)
    labels: Tensor,  # (B,)
) -> Tensor:  # (B, K)
    x = x.clone()
    x[:, :CLASSES] = 0.0
    return x.scatter_(1, labels[:, None], STRENGTH)


def _normalized(
    x: Tensor,  # (M, K)
) -> Tensor:  # (M, K)
    return x / (x.norm(2, 1, keepdim=True) + EPS)


def _forward(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor,  # (N,)
) -> tuple[Tensor, Tensor]:  # y (M, N), goodness (M,)
    y = functional.linear(_normalized(x), weight, bias).relu()
    return y, y.square().sum(1)


def _gradient(
    x: Tensor,  # (M, K)
    sign: Tensor,  # (M,)
    weight: Tensor,  # (N, K)
    bias: Tensor,  # (N,)
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # y (M, N), goodness (M,), loss (), dW (N, K), db (N,)
    x = _normalized(x)
    y = functional.linear(x, weight, bias).relu()
    goodness = y.square().sum(1)
    v = -sign * (goodness / len(weight) - THRESHOLD)
    coef = -sign * v.sigmoid() / (len(weight) * len(x))
    dz = 2 * coef[:, None] * y
    return y, goodness, functional.softplus(v).mean(), dz.T @ x, dz.sum(0)


def _label_goodness(
    x: Tensor,  # (B, K)
    labels: Tensor,  # (B,)
    weights: list[Tensor],
    biases: list[Tensor],
) -> Tensor:  # (B,): summed over layers
    y, total = _overlay(x, labels), x.new_zeros(len(x))
    for w, b in zip(weights, biases, strict=True):
        y, goodness = _forward(y, w, b)
        total = total + goodness / len(w)
    return total


def _train(
    x: Tensor,  # (M, K)
    sign: Tensor,  # (M,)
    weights: list[Tensor],
    biases: list[Tensor],
    update: Callable[[int, Tensor, Tensor], None],  # of a layer, with its gradients
) -> Result:
    totals, losses = [], []
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x, goodness, loss, dw, db = _gradient(x, sign, w, b)
        totals.append(goodness)
        losses.append(loss)
        update(i, dw, db)
    return {"y": x, "goodness": totals, "loss": losses}


def _torch_optimizer(optimizer: SGD | Adam, parameters: list[Tensor]) -> torch.optim.Optimizer:
    if isinstance(optimizer, SGD):
        return torch.optim.SGD(parameters, lr=optimizer.lr, momentum=optimizer.momentum, fused=True)
    return torch.optim.Adam(
        parameters, lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps, fused=True,
        capturable=parameters[0].is_cuda,
    )  # fmt: skip


def _formula_(optimizer: SGD | Adam, param: Tensor, grad: Tensor, state: dict[str, Tensor], suffix: str) -> None:
    """The optimizer's step on one parameter, in place."""
    if isinstance(optimizer, SGD):
        buffer = state[f"momentum_buffer{suffix}"].mul_(optimizer.momentum).add_(grad)
        param.sub_(optimizer.lr * buffer)
        return
    (beta1, beta2), step = optimizer.betas, state["step"]
    grad = grad.to(step.dtype)
    first = state[f"exp_avg{suffix}"].lerp_(grad, 1 - beta1)
    second = state[f"exp_avg_sq{suffix}"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt() + optimizer.eps
    param.sub_(optimizer.lr / (1 - beta1**step) * first / root)


class TorchColumn:
    """A case's tensors in torch, of the given dtype, and the passes without training."""

    def __init__(self, problem: Problem, dtype: torch.dtype | None = None) -> None:
        self.case, self.problem, dtype = problem.case, problem, dtype or problem.dtype
        self.inputs = [x.to(dtype) for x in problem.inputs]
        self.sign = problem.sign.to(dtype)
        self.weights = [w.to(dtype, copy=True) for w in problem.weights]
        self.biases = [b.to(dtype, copy=True) for b in problem.biases]
        self.forward: Callable[..., Any] = _forward
        self.label_goodness: Callable[..., Any] = _label_goodness

    @property
    def x(self) -> Tensor:
        return self.inputs[self.problem.turn]

    def run(self) -> Result:
        """Compute the case once."""
        if self.case.trains:
            return self.step()
        with torch.no_grad():
            if self.case.kind == "predict":
                return {"prediction": self.goodness_by_label().argmax(1)}
            y, goodness = self.forward(self.x, self.weights[0], self.biases[0])
            return {"y": y, "goodness": goodness}

    def goodness_by_label(self) -> Tensor:  # (B, C)
        """One pass through the network for each label, as is usual."""
        labels = torch.arange(CLASSES, device=self.x.device)[:, None].expand(-1, len(self.x))
        return torch.stack([self.label_goodness(self.x, one, self.weights, self.biases) for one in labels], 1)

    def rows(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the first layer sees of an input: positive rows and negative ones."""
        if self.case.labelled:
            return _overlay(x, self.problem.labels), _overlay(x, self.problem.wrong)
        return x[: self.case.batch], x[self.case.batch :]

    def all_rows(self, x: Tensor) -> Tensor:
        return torch.cat(self.rows(x)) if self.case.labelled else x

    def step(self) -> Result:
        raise NotImplementedError

    def moments(self) -> list[Tensor]:
        """The first moment of each layer's weight."""
        raise NotImplementedError


class Autograd(TorchColumn):
    """The usual implementation: a pass for either kind of rows, loss.backward(), each layer's own torch optimizer."""

    def __init__(self, problem: Problem, dtype: torch.dtype | None = None) -> None:
        super().__init__(problem, dtype)
        self.optimizers = [
            _torch_optimizer(self.case.optimizer, [w.requires_grad_(), b.requires_grad_()])
            for w, b in zip(self.weights, self.biases, strict=True)
        ]

    def step(self) -> Result:
        (pos, neg), totals, losses = self.rows(self.x), [], []
        for w, b, optimizer in zip(self.weights, self.biases, self.optimizers, strict=True):
            (pos, g_pos), (neg, g_neg) = _forward(pos, w, b), _forward(neg, w, b)
            v = torch.cat([THRESHOLD - g_pos / len(w), g_neg / len(w) - THRESHOLD])
            loss = functional.softplus(v).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            pos, neg = pos.detach(), neg.detach()
            totals.append((g_pos.detach(), g_neg.detach()))
            losses.append(loss.detach())
        return {"y": (pos, neg), "goodness": totals, "loss": losses}

    def moments(self) -> list[Tensor]:
        return [_first_moment(o.state[w]) for o, w in zip(self.optimizers, self.weights, strict=True)]


class Eager(TorchColumn):
    """The gradient derived by hand, torch's fused optimizer."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if self.case.trains:
            self.optimizer = _torch_optimizer(self.case.optimizer, [*self.weights, *self.biases])

    def reset(self) -> None:
        """Parameters and moments as they were at first, in the same memory."""
        with torch.no_grad():
            for own, first in zip(
                [*self.weights, *self.biases], [*self.problem.weights, *self.problem.biases], strict=True
            ):
                own.copy_(first)
        if self.case.trains:
            for state in self.optimizer.state.values():
                for t in state.values():
                    t.zero_()

    def _set_gradient(self, layer: int, dw: Tensor, db: Tensor) -> None:
        self.weights[layer].grad, self.biases[layer].grad = dw, db

    def step(self) -> Result:
        with torch.no_grad():
            result = _train(self.all_rows(self.x), self.sign, self.weights, self.biases, self._set_gradient)
            self.optimizer.step()
        return result

    def moments(self) -> list[Tensor]:
        return [_first_moment(self.optimizer.state[w]) for w in self.weights]


class Compiled(TorchColumn):
    """The gradient derived by hand and the optimizer's formula, all of a step in one graph under torch.compile."""

    def __init__(self, problem: Problem, mode: str | None = None) -> None:
        super().__init__(problem)
        optimizer = self.case.optimizer
        self.states = [optimizer.init_state(w, b) for w, b in zip(self.weights, self.biases, strict=True)]

        def step(
            x: Tensor, sign: Tensor, weights: list[Tensor], biases: list[Tensor], states: list[dict[str, Tensor]]
        ) -> Result:
            def update(layer: int, dw: Tensor, db: Tensor) -> None:
                states[layer]["step"].add_(1)
                _formula_(optimizer, weights[layer], dw, states[layer], "")
                _formula_(optimizer, biases[layer], db, states[layer], "_bias")

            return _train(self.all_rows(x), sign, weights, biases, update)

        self.compiled_step = torch.compile(step, dynamic=False, fullgraph=True, mode=mode)
        self.forward = torch.compile(_forward, dynamic=False, fullgraph=True, mode=mode)
        self.label_goodness = torch.compile(_label_goodness, dynamic=False, fullgraph=True, mode=mode)

    def step(self) -> Result:
        with torch.no_grad():
            return self.compiled_step(self.x, self.sign, self.weights, self.biases, self.states)

    def moments(self) -> list[Tensor]:
        return [_first_moment(s) for s in self.states]


def _first_moment(state: dict[str, Tensor]) -> Tensor:
    return state["exp_avg"] if "exp_avg" in state else state["momentum_buffer"]
