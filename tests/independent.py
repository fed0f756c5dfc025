"""Forward-Forward layers written the ordinary way: torch.nn.functional, autograd and torch.optim.

Nothing here is taken from the package but the optimizers' descriptions; the tests compare the package with it.
"""

import torch
import torch.nn.functional as F

import ffkernels as ff

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
NORMALIZATIONS = ("l2", "rms", "none")
REDUCTIONS = ("sum", "mean")


def normalized(x, normalize="l2", eps=1e-4):
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if normalize == "l2":
        return x / (norm + eps)
    if normalize == "rms":
        return x / (norm / x.shape[1] ** 0.5 + eps)
    return x


def forward(x, weight, bias=None, *, normalize="l2", eps=1e-4, activation="relu"):
    """z, y and the sum of y's squares, all in the dtype of the arguments."""
    z = F.linear(normalized(x, normalize, eps), weight, bias)
    y = ACTIVATIONS[activation](z)
    return z, y, y.square().sum(1)


def loss_of(goodness, sign, *, threshold=2.0, temperature=1.0):
    # not F.softplus, which is linear above 20 and so off by 2e-9 there
    return temperature * torch.log1p(torch.exp(-sign * (goodness - threshold) / temperature)).mean()


def torch_optimizer(optimizer, params):
    """torch.optim's own optimizer of the same description."""
    if isinstance(optimizer, ff.SGD):
        return torch.optim.SGD(
            params, optimizer.lr, optimizer.momentum, optimizer.dampening, optimizer.weight_decay, optimizer.nesterov
        )
    kind = torch.optim.AdamW if isinstance(optimizer, ff.AdamW) else torch.optim.Adam
    return kind(params, optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay)


class AutogradLayer:
    """A layer that trains by backward() and torch.optim."""

    def __init__(self, weight, bias, optimizer):
        self.weight = weight.detach().clone().requires_grad_()
        self.bias = None if bias is None else bias.detach().clone().requires_grad_()
        self.params = [self.weight] if bias is None else [self.weight, self.bias]
        self.optimizer = torch_optimizer(optimizer, self.params)

    def loss(
        self, x, sign, *, goodness="mean", threshold=2.0, temperature=1.0, row_term=None, col_term=None, **options
    ):
        z, y, total = forward(x, self.weight, self.bias, **options)
        g = total / self.weight.shape[0] if goodness == "mean" else total
        loss = loss_of(g, sign, threshold=threshold, temperature=temperature)
        # a term whose derivative by z is the outer product of row_term and col_term
        extra = 0 if row_term is None else (row_term[:, None] * col_term * z).sum()
        return y, total, loss, extra

    def step(self, x, sign, **options):
        """y, goodness and loss from before the update."""
        self.optimizer.zero_grad()
        y, total, loss, extra = self.loss(x, sign, **options)
        (loss + extra).backward()
        self.optimizer.step()
        return y.detach(), total.detach(), loss.detach()


def gradient(x, sign, weight, bias=None, **options):
    """The gradients of the loss by weight and bias."""
    layer = AutogradLayer(weight, bias, ff.SGD())
    _, _, loss, extra = layer.loss(x, sign, **options)
    return torch.autograd.grad(loss + extra, layer.params)


def overlay(x, labels, num_classes, strength=1.0):
    """x (B, K) with each label one-hot over the first columns."""
    x = x.clone()
    for row, label in zip(x, labels.tolist(), strict=True):
        row[:num_classes] = 0
        row[label] = strength
    return x


def assert_close(result, expected, relative, what="result"):
    """The largest error against the largest expected magnitude; both must be finite."""
    result, expected = result.double(), expected.double()
    assert result.shape == expected.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error, scale = (result - expected).abs().max(), expected.abs().max()
    assert error <= relative * scale, f"{what}: error {error:.3g}, allowed {relative:g} x {scale:.3g}"


def assert_as_exact_as_torch(result, exact, rounded, what="result"):
    """Error against float64 at most twice torch's in the dtype at hand, + 1e-5 of the largest value."""
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (result.double() - exact).abs().max()
    allowed = 2 * (rounded.double() - exact).abs().max() + 1e-5 * exact.abs().max()
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
