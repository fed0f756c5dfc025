"""FFLinear, one Forward-Forward layer as a module. It holds tensors and calls the ops."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, ops
from .network import FFLayer
from .optim import Adam, Optimizer, state_dtype
from .peer import START, new_mean, terms
from .state import OptimizerState


class LayerStep(NamedTuple):
    """What FFLinear.step returns; y and goodness are from before the update."""

    y_pos: Tensor  # (M_pos, N)
    y_neg: Tensor  # (M_neg, N)
    goodness_pos: Tensor  # (M_pos,): g
    goodness_neg: Tensor  # (M_neg,): g
    loss: Tensor  # ()


class FFLinear(nn.Module):
    """One Forward-Forward layer (Hinton 2022): y = act(r x W^T + b), trained by its own goodness, without autograd.

    The constructor is nn.Linear's, then the keywords of `ff_step_`. Parameters do not require grad: nothing flows back.

    Args:
        in_features, out_features: K and N.
        bias, device, dtype: as for nn.Linear.
        normalize, eps, activation, goodness, threshold, temperature, precision: as for `ff_step_`.
        optimizer: the fused optimizer of `step`; its state is part of the module's state_dict.
        peer: strength of peer normalisation in training (`ffkernels.peer`), >= 0; about 0.03. Its running mean is part
            of the state_dict.
        dropout: probability with which `FFNet`'s training steps drop each of the layer's inputs, in [0, 1); 0 in a
            first layer whose input holds the label.

    Shapes: x (*, K) -> y (*, N), goodness (*,).

    Raises:
        TypeError, ValueError: an option that the ops would refuse.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        normalize: str = "l2",
        eps: float = 1e-4,
        activation: str = "relu",
        goodness: str = "mean",
        threshold: float = 2.0,
        temperature: float = 1.0,
        optimizer: Optimizer = Adam(lr=0.03),  # noqa: B008  (frozen)
        precision: str | None = None,
        peer: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        checks.count("in_features", in_features, 1, 2**31, "K of x (M, K)")
        checks.count("out_features", out_features, 1, 2**31, "N of y (M, N)")
        checks.option("normalize", normalize, checks.NORMALIZE)
        checks.number("eps", eps, 0.0)
        checks.option("activation", activation, checks.ACTIVATIONS)
        checks.loss_options(threshold, temperature, goodness)
        if precision is not None:
            checks.precision(precision)
        checks.dropout(dropout)
        self.in_features, self.out_features = in_features, out_features
        self.normalize, self.eps, self.activation, self.precision = normalize, eps, activation, precision
        self.reduction, self.threshold, self.temperature = goodness, threshold, temperature
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(out_features, in_features, **options), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, **options), requires_grad=False) if bias else None
        if self.weight.dtype not in checks.DTYPES:
            raise TypeError(f"dtype must be one of {[str(d) for d in checks.DTYPES]}, got {self.weight.dtype}")
        self.reset_parameters()
        self.optimizer = optimizer
        self.peer, self.dropout = peer, dropout

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation: W and b uniform in +-1 / sqrt(K)."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @property
    def optimizer(self) -> Optimizer:
        """The fused optimizer. Assigning one whose state has other tensors starts with fresh state."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, value: Optimizer) -> None:
        if not isinstance(value, Optimizer):
            raise TypeError(f"optimizer must be ffkernels.SGD, Adam, AdamW or HintonSGD, got {type(value).__name__}")
        names = value.state_names(self.bias is not None)
        if "optimizer_state" not in self._modules or tuple(self.state) != names:
            self.optimizer_state = OptimizerState(value.init_state(self.weight, self.bias))
        self._optimizer = value

    @property
    def state(self) -> dict[str, Tensor]:
        """The optimizer's state, as the ops take it."""
        return self.optimizer_state.tensors()

    @property
    def peer(self) -> float:
        """Strength of peer normalisation. Its running mean begins when a strength is first assigned."""
        return self._peer

    @peer.setter
    def peer(self, value: float) -> None:
        checks.number("peer", value, 0.0)
        if value and "peer_state" not in self._modules:
            mean = self.weight.new_full((self.out_features,), START, dtype=state_dtype(self.weight.dtype))
            self.peer_state = OptimizerState({"mean": mean})
        self._peer = value

    @property
    def peer_mean(self) -> Tensor | None:
        """(N,): the running mean activity on positive rows, where the layer has peer normalisation."""
        return self.peer_state.tensors()["mean"] if self.peer else None

    @property
    def divisor(self) -> int:
        """E: g = G / E."""
        return self.out_features if self.reduction == "mean" else 1

    def as_layer(self) -> FFLayer:
        """What the layer holds, as ff_network_step_ takes it."""
        # every self.weight would be a search through three dictionaries
        parameters: dict[str, Any] = self._parameters
        modules: dict[str, Any] = self._modules
        mean = modules["peer_state"]._buffers["mean"] if self.peer else None
        return FFLayer(
            parameters["weight"], parameters["bias"], modules["optimizer_state"]._buffers, self._optimizer,
            self.threshold, self.temperature, self.reduction, self.normalize, self.eps, self.activation, self.precision,
            self.peer, mean, self.dropout,
        )  # fmt: skip

    def peer_options(
        self,
        sign: Tensor,  # (M,): of the rows of a step
    ) -> dict[str, Any]:
        """The keywords of the ops that update with peer normalisation; none for a layer without it."""
        if self.peer_mean is None:
            return {}
        row_term, col_term = terms(sign, self.peer_mean, self.peer, self.divisor)
        return {"row_term": row_term, "col_term": col_term}

    def watch_peers(
        self,
        y: Tensor,  # (M, N)
        sign: Tensor,  # (M,)
    ) -> None:
        """After a step: what its positive rows did enters the running mean, where the layer has one."""
        if self.peer_mean is not None:
            self.peer_mean.copy_(new_mean(self.peer_mean, y, sign))

    def forward_options(self) -> dict[str, Any]:
        """The keywords that every op takes of this layer."""
        return {
            "normalize": self.normalize,
            "eps": self.eps,
            "activation": self.activation,
            "precision": self.precision,
        }

    def step_options(self) -> dict[str, Any]:
        """The keywords of ff_step_ and ff_label_step_."""
        return {
            **self.forward_options(),
            "threshold": self.threshold,
            "temperature": self.temperature,
            "goodness": self.reduction,
        }

    def _run(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor, got {type(x).__name__}")
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must have shape (*, K) with K = {self.in_features}, got {tuple(x.shape)}")
        y, goodness = ops.ff_forward(x.reshape(-1, x.shape[-1]), self.weight, self.bias, **self.forward_options())
        return y.reshape(*x.shape[:-1], self.out_features), goodness.reshape(x.shape[:-1])

    def forward(
        self,
        x: Tensor,  # (*, K)
    ) -> Tensor:  # (*, N)
        return self._run(x)[0]

    def goodness(
        self,
        x: Tensor,  # (*, K)
    ) -> Tensor:  # (*,) accumulation dtype
        """g of each row: the sum or the mean of squares, as the constructor's ``goodness`` says."""
        return self._run(x)[1] / self.divisor

    def step(
        self,
        x_pos: Tensor,  # (M_pos, K)
        x_neg: Tensor,  # (M_neg, K)
    ) -> LayerStep:
        """One training step on positive and negative rows. The loss is the mean over all of them."""
        x, sign = join(x_pos, x_neg)
        y, goodness, loss = ops.ff_step_(
            x, sign, self.weight, self.bias, self.state, self.optimizer, **self.peer_options(sign),
            **self.step_options(),
        )  # fmt: skip
        self.watch_peers(y, sign)
        g, m = goodness / self.divisor, x_pos.shape[0]
        return LayerStep(y[:m], y[m:], g[:m], g[m:], loss)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"normalize={self.normalize!r}, activation={self.activation!r}, goodness={self.reduction!r}, "
            f"threshold={self.threshold}, temperature={self.temperature}, optimizer={self.optimizer}"
            + (f", peer={self.peer}" if self.peer else "")
            + (f", dropout={self.dropout}" if self.dropout else "")
        )


def join(
    x_pos: Tensor,  # (M_pos, K)
    x_neg: Tensor,  # (M_neg, K)
) -> tuple[Tensor, Tensor]:  # x (M_pos + M_neg, K), sign (M_pos + M_neg,)
    """Positive and negative rows as the ops take them."""
    checks.matrix("x_pos", x_pos)
    checks.matrix("x_neg", x_neg)
    checks.like("x_neg", x_neg, (len(x_neg), x_pos.shape[1]), "(M, K)", x_pos.dtype, x_pos.device)
    return torch.cat([x_pos, x_neg]), signs(x_pos.shape[0], x_neg.shape[0], x_pos)


def signs(positives: int, negatives: int, x: Tensor) -> Tensor:
    """+1 for the positive rows, then -1 for the negative ones, as the ops take them beside x."""
    sign = torch.ones(positives + negatives, dtype=state_dtype(x.dtype), device=x.device)
    sign[positives:] = -1
    return sign
