"""The ops by the formulas of docs and reference, in any float dtype, with the products and roundings of a kernel.

In float64 with plain products this is what is true (test_cpu_kernels.py holds it against autograd); with a kernel's
products and storage it is the same computation done by torch, whose error a kernel may make twice.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import cases
import independent
import torch
from torch import Tensor

import ffkernels as ff


def bf16(t: Tensor) -> Tensor:
    return t.bfloat16().to(t.dtype)


def plain_product(a: Tensor, b: Tensor) -> Tensor:  # (M, K), (N, K) -> (M, N)
    return a @ b.T


def bf16_product(a: Tensor, b: Tensor) -> Tensor:
    return bf16(a) @ bf16(b).T


def split_product(a: Tensor, b: Tensor) -> Tensor:
    """Three of the four products of operands that are each the sum of two bf16."""
    high_a, high_b = bf16(a), bf16(b)
    low_a, low_b = bf16(a - high_a), bf16(b - high_b)
    return high_a @ high_b.T + (high_a @ low_b.T + low_a @ high_b.T)


class Arithmetic(NamedTuple):
    dtype: torch.dtype = torch.float64
    product: Callable[[Tensor, Tensor], Tensor] = plain_product
    stored: Callable[[Tensor], Tensor] = lambda t: t  # what memory keeps of y, p, weights and gradients
    scales_x: bool = False  # the gradient's product is of dz and r x, not of r dz and x


EXACT = Arithmetic()
FLOAT32 = Arithmetic(torch.float32)
HIGH = Arithmetic(torch.float32, split_product)
MEDIUM = Arithmetic(torch.float32, bf16_product)
BF16 = Arithmetic(torch.float32, bf16_product, bf16)


def in_one_thread(function):
    # these tensors are small, and a pool of threads that waits for busy cores takes longer than its work
    @functools.wraps(function)
    def wrapped(*args):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return wrapped


@in_one_thread
def computed(op: str, given: dict, how: Arithmetic = EXACT) -> dict[str, Tensor]:
    """The results of ``op`` by name; for in-place ops also what they leave in weight, bias and state."""
    given = {n: t.to(how.dtype) if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}
    x, layer = given["x"], {"normalize": "l2", "eps": 1e-4, "activation": "relu"} | given
    if op == "ff_label_forward":
        candidates = given["labels"].shape[1]
        x = _overlay(x.repeat_interleave(candidates, 0), given["labels"].flatten(), given)
    elif given.get("labels_pos") is not None:
        x, sign = _label_rows(x, given["labels_pos"], given["labels_neg"], given)
    elif given.get("labels") is not None:
        x, sign = _label_rows(x, *given["labels"], given)
    else:
        sign = given.get("sign")
    if op == "ff_network_step_":
        return _network(x, sign, given, how)
    if op in ("ff_forward", "ff_label_forward"):
        y, total, p = _forward(x, layer, how)
        return {"y": y, "goodness": total, "p": p}
    if op in ("ff_grad", "ff_update_"):
        grads = _gradient(x, given["y"], given["coef"], layer, how)
        if op == "ff_grad":
            return {n: how.stored(g) for n, g in zip(("grad_weight", "grad_bias"), grads, strict=False)}
        return _updated(layer, grads, how)
    return _step(x, sign, layer, how)


def _overlay(x, labels, given):
    x = x.clone()
    x[:, : given["num_classes"]] = 0
    x[torch.arange(len(x)), labels] = given.get("strength", 1.0)
    return x


def _label_rows(x, positive, negative, given):
    sign = x.new_ones(2 * len(x))
    sign[len(x) :] = -1
    return torch.cat([_overlay(x, positive, given), _overlay(x, negative, given)]), sign


# The label's columns, of which all but one are 0, are multiplied apart, in the accumulation dtype.
def _times_weight(x, layer, how):
    labels = layer.get("num_classes") or 0
    weight = layer["weight"]
    return how.product(x[:, labels:], weight[:, labels:]) + x[:, :labels] @ weight[:, :labels].T


def _row_scale(x, layer):
    if layer["normalize"] == "none":
        return x.new_ones(len(x))
    q = x.square().sum(1) if layer.get("x_sqnorm") is None else layer["x_sqnorm"]
    return 1 / ((q / (1 if layer["normalize"] == "l2" else x.shape[1])).sqrt() + layer["eps"])


def _forward(x, layer, how):
    z = _row_scale(x, layer)[:, None] * _times_weight(x, layer, how)
    if layer["bias"] is not None:
        z = z + layer["bias"]
    z.requires_grad_()
    with torch.enable_grad():
        y = independent.ACTIVATIONS[layer["activation"]](z)
    (slope,) = torch.autograd.grad(y.sum(), z)
    y = y.detach()
    return how.stored(y), y.square().sum(1), how.stored(y * slope)


def _gradient(x, p, coef, layer, how):
    dz = 2 * coef[:, None] * p
    if layer.get("row_term") is not None:
        dz = dz + layer["row_term"][:, None] * layer["col_term"]
    scaled = dz * _row_scale(x, layer)[:, None]
    labels = layer.get("num_classes") or 0
    left, right = (dz, x * _row_scale(x, layer)[:, None]) if how.scales_x else (scaled, x)
    by_weight = torch.cat([scaled.T @ x[:, :labels], how.product(left.T, right[:, labels:].T)], 1)
    return [by_weight, dz.sum(0)][: 1 if layer["bias"] is None else 2]


def _updated(layer, grads, how):
    """One step of torch.optim from the state as it is."""
    params = [t.clone() for t in (layer["weight"], layer["bias"]) if t is not None]
    optimizer, state = independent.torch_optimizer(layer["optimizer"], params), layer["state"]
    for param, grad, suffix in zip(params, grads, ("", "_bias"), strict=False):
        param.grad = grad
        if state["step"] > 0:
            slots = {n: state[n + suffix].to(how.dtype, copy=True) for n in _slots(state)}
            count = {"step": state["step"].float().clone()} if "exp_avg" in state else {}
            optimizer.state[param] |= slots | count
    optimizer.step()
    results = {}
    for param, name, suffix in zip(params, ("weight", "bias"), ("", "_bias"), strict=False):
        results[name] = how.stored(param)
        results |= {n + suffix: optimizer.state[param][n] for n in _slots(state)}
    return results


def _slots(state):
    return [n for n in state if n != "step" and not n.endswith("_bias")]


def _step(x, sign, layer, how):
    y, total, p = _forward(x, layer, how)
    options = {"threshold": layer.get("threshold", 2.0), "temperature": layer.get("temperature", 1.0)}
    divisor = layer["weight"].shape[0] if layer.get("goodness", "mean") == "mean" else 1
    g = (total / divisor).requires_grad_()
    with torch.enable_grad():
        loss = independent.loss_of(g, sign, **options)
    (by_mean,) = torch.autograd.grad(loss, g)
    grads = _gradient(x, p, by_mean / divisor, layer, how)
    return {"y": y, "goodness": total, "loss": loss.detach()} | _updated(layer, grads, how)


def _network(x, sign, given, how):
    results, totals, losses, sqnorm = {}, [], [], given.get("x_sqnorm")
    sign = sign.to(how.dtype)
    for i, record in enumerate(given["layers"]):
        if record.dropout:
            x, sqnorm = how.stored(independent.dropped(x, record.dropout, given["dropout_seed"], i)), None
        tensors = {
            n: None if t is None else t.to(how.dtype) for n, t in vars(record).items() if n in ("weight", "bias")
        }
        layer = _step(
            x, sign, vars(record) | tensors | independent.peer_terms(record, sign) | {"x_sqnorm": sqnorm}, how
        )
        x, sqnorm = layer.pop("y"), layer.pop("goodness")
        totals.append(sqnorm)
        losses.append(layer.pop("loss"))
        results |= {f"{i}.{n}": t for n, t in layer.items()}
        if record.peer:
            results[f"{i}.peer_mean"] = independent.peer_mean_after(record, x, sign)
    return {"goodness": torch.stack(totals), "loss": torch.stack(losses), **results}


RESULTS = {
    "ff_forward": ("y", "goodness", "p"),
    "ff_label_forward": ("y", "goodness", "p"),
    "ff_grad": ("grad_weight", "grad_bias"),
    "ff_update_": (),
    "ff_network_step_": ("goodness", "loss"),
}


def run(op: str, given: dict) -> dict[str, Tensor]:
    """What the op itself gives, by the same names. Arguments that it writes to are copied before."""
    if op in cases.IN_PLACE:
        given = given | {n: cases.copied(given[n]) for n in ("weight", "bias", "state", "layers") if n in given}
    if op in ("ff_forward", "ff_label_forward"):
        given["return_p"] = True
    values = getattr(ff, op)(**given)
    names = RESULTS.get(op, ("y", "goodness", "loss"))
    results = {n: t for n, t in zip(names, values or (), strict=True) if t is not None}
    if op in cases.IN_PLACE:
        written = cases.tensors(
            {n: given[n] for n in ("weight", "bias", "state", "layers") if given.get(n) is not None}
        )
        results |= {n.replace("state.", "").replace("layers.", ""): t for n, t in written.items() if "step" not in n}
    return results


def assert_as_exact(results: dict, exact: dict, twin: dict) -> None:
    """Each result's largest error is at most twice the twin's, + 1e-5 of the largest value."""
    assert results.keys() == exact.keys() == twin.keys()
    for name, true in exact.items():
        assert results[name].shape == true.shape, name
        if true.numel() == 0:
            continue
        error = (results[name] - true).abs().max()
        allowed = 2 * (twin[name] - true).abs().max() + 1e-5 * true.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def python(script: str, *args: str, **environment: str) -> str:
    """What a script prints in a process of its own, where the CPU backend runs."""
    environment = os.environ | {"FFKERNELS_BACKEND": "cpu"} | environment
    done = subprocess.run([sys.executable, "-c", script, *args], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout
