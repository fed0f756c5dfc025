"""Forward-Forward layers written the ordinary way: torch.nn.functional, autograd and torch.optim.

Nothing here is taken from the package but the optimizers' descriptions; the tests compare the package with it.
"""

import functools

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
    u = -sign * (goodness - threshold) / temperature
    return temperature * torch.logaddexp(u, torch.zeros_like(u)).mean()


class HintonSGD(torch.optim.Optimizer):
    """The updates of Hinton's published code; the parameters are weight, bias."""

    def __init__(self, params, lr, momentum, weight_decay):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        for i, param in enumerate(group["params"]):
            velocity = self.state[param].setdefault("momentum_buffer", torch.zeros_like(param))
            velocity.mul_(group["momentum"]).add_(param.grad, alpha=1 - group["momentum"])
            step = velocity if i == 1 else velocity + group["weight_decay"] * param
            param.sub_(group["lr"] * step)


def torch_optimizer(optimizer, params):
    """torch.optim's own optimizer of the same description, or the one above."""
    if isinstance(optimizer, ff.HintonSGD):
        return HintonSGD(params, optimizer.lr, optimizer.momentum, optimizer.weight_decay)
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


def peer_terms(record, sign):
    """What peer normalisation adds to dz: a over the rows, d over the columns."""
    if not record.peer:
        return {}
    divisor = record.weight.shape[0] if record.goodness == "mean" else 1
    mean = record.peer_mean.to(sign.dtype)
    return {
        "row_term": 2 / (divisor * len(sign)) * (sign == 1).to(sign.dtype),
        "col_term": record.peer * (mean - mean.mean()),
    }


def peer_mean_after(record, y, sign):
    mean = record.peer_mean.to(y.dtype)
    return 0.9 * mean + 0.1 * y[sign == 1].mean(0) if bool((sign == 1).any()) else mean


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011) in Python's integers."""
    for _ in range(10):
        a, b = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [b >> 32 ^ counter[1] ^ key[0], b & 0xFFFFFFFF, a >> 32 ^ counter[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return counter


@functools.lru_cache
def kept(rows, cols, p, seed, layer):
    """(rows, cols) of 0 and 1: what dropout keeps of a layer's input."""
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    words = [[w for j in range(0, cols, 4) for w in philox([j // 4, m, layer, 0], key)][:cols] for m in range(rows)]
    return torch.tensor(words, dtype=torch.float64).ge(p * 2**32).double()


def dropped(x, p, seed, layer):
    return x * kept(*x.shape, p, int(seed), layer).to(x.device, x.dtype) / (1 - p) if p else x


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
    """Error against float64 at most twice torch's in the dtype at hand, + 1e-5 of the largest value.

    One rounding of the largest value is free too: torch may have been lucky where there are but few numbers.
    """
    assert result.shape == exact.shape, f"{what}: shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    error = (result.double() - exact).abs().max()
    scale = exact.abs().max() * (1e-5 + torch.finfo(rounded.dtype).eps / 2)
    allowed = 2 * (rounded.double() - exact).abs().max() + scale
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


# ---------------------------------------------------------------------------------------------------------------------
# Every op once more, in any dtype: in float64 what is true, in another dtype what torch makes of it.


def computed_by_torch(op, given, dtype):
    """The results of ``op`` by name, each step rounded to ``dtype``; after the update also parameters and state."""
    given = {name: _cast(value, dtype) for name, value in given.items()}
    options = {n: given[n] for n in ("normalize", "activation", "goodness", "threshold", "temperature") if n in given}
    peer = {n: given[n] for n in ("row_term", "col_term") if given.get(n) is not None}
    layer = {n: options.pop(n) for n in ("goodness", "threshold", "temperature") if n in options}
    x, weight, bias = given["x"], given.get("weight"), given.get("bias")
    if op == "ff_label_forward":
        candidates = given["labels"].shape[1]
        x = overlay(x.repeat_interleave(candidates, 0), given["labels"].flatten(), given["num_classes"])
    if op == "ff_label_step_":
        x = torch.cat([overlay(x, given[n], given["num_classes"]) for n in ("labels_pos", "labels_neg")])
        sign = torch.ones(len(x), dtype=dtype, device=x.device)
        sign[len(sign) // 2 :] = -1
        given["sign"] = sign
    if op in ("ff_forward", "ff_label_forward"):
        z, y, total = forward(x, weight, bias, **options)
        return {"y": y, "goodness": total, "p": y * _slope(z, options.get("activation", "relu"))}
    if op in ("ff_grad", "ff_update_"):
        dz = 2 * given["coef"][:, None] * given["y"]
        if peer:
            dz = dz + peer["row_term"][:, None] * peer["col_term"]
        grads = [dz.T @ normalized(x, options.get("normalize", "l2")), dz.sum(0)][: 1 if bias is None else 2]
        if op == "ff_grad":
            return dict(zip(("grad_weight", "grad_bias"), grads, strict=False))
        twin = AutogradLayer(weight, bias, given["optimizer"])
        for param, grad in zip(twin.params, grads, strict=True):
            param.grad = grad
        twin.optimizer.step()
        return _after(twin)
    if op == "ff_network_step_":
        results, totals, losses = {}, [], []
        for i, record in enumerate(given["layers"]):
            twin = AutogradLayer(record.weight.to(dtype), _cast(record.bias, dtype), record.optimizer)
            x, sign = dropped(x, record.dropout, given["dropout_seed"], i), given["sign"]
            x, total, loss = twin.step(
                x, sign, **peer_terms(record, sign), goodness=record.goodness, threshold=record.threshold,
                temperature=record.temperature,
                normalize=record.normalize, activation=record.activation,
            )  # fmt: skip
            totals.append(total)
            losses.append(loss)
            results |= {f"{i}.{name}": t for name, t in _after(twin).items()}
            if record.peer:
                results[f"{i}.peer_mean"] = peer_mean_after(record, x, sign)
        return {"goodness": torch.stack(totals), "loss": torch.stack(losses), **results}
    twin = AutogradLayer(weight, bias, given["optimizer"])
    y, total, loss = twin.step(x, given["sign"], **options, **layer, **peer)
    return {"y": y, "goodness": total, "loss": loss, **_after(twin)}


def _cast(value, dtype):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _slope(z, activation):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[activation](z).sum(), z)[0]


def _after(twin):
    results = {}
    for name, param in zip(("weight", "bias"), twin.params, strict=False):
        results[name] = param.detach()
        for slot, t in twin.optimizer.state[param].items():
            if slot != "step" and t is not None:
                results[slot if name == "weight" else f"{slot}_bias"] = t
    return results
