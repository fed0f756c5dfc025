"""Which backends can run an op here, and valid arguments of every op to start from."""

from typing import NamedTuple

import pytest
import torch

import ffkernels as ff
from ffkernels import backends, label_ops, network, ops

OPS = ("ff_forward", "ff_grad", "ff_update_", "ff_step_", "ff_network_step_", "ff_label_forward", "ff_label_step_")
IN_PLACE = tuple(op for op in OPS if op.endswith("_"))
STEPS = tuple(op for op in OPS if op.endswith("step_"))
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OPTIMIZERS = {
    "sgd": ff.SGD(lr=0.02),
    "sgd-plain": ff.SGD(lr=1.0),
    "sgd-momentum": ff.SGD(lr=0.01, momentum=0.9),
    "sgd-damped-decay": ff.SGD(lr=0.02, momentum=0.8, dampening=0.3, weight_decay=0.01),
    "sgd-nesterov": ff.SGD(lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.02),
    "adam": ff.Adam(lr=0.01),
    "adam-decay": ff.Adam(lr=0.02, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.03),
    "adamw": ff.AdamW(lr=0.01, weight_decay=0.1),
    "hinton": ff.HintonSGD(lr=0.02, momentum=0.8, weight_decay=0.05),
}


class Target(NamedTuple):
    backend: str
    device: str
    dtype: torch.dtype

    def __str__(self):
        return f"{self.backend}-{self.device}-{str(self.dtype).removeprefix('torch.')}"


def targets(op, dtypes=DTYPES):
    """Every backend, device and dtype that can run ``op`` on this machine: a backend needs only to be registered."""
    return [
        Target(backend, device, dtype)
        for backend in backends.BACKENDS
        for device in DEVICES
        for dtype in dtypes
        if backends.refusal(backend, op, device, dtype) is None
    ]


def on_backends(op, dtypes=DTYPES):
    """Run a test that takes ``target`` on each of them."""
    return pytest.mark.parametrize("target", targets(op, dtypes), indirect=True, ids=str)


def each_op_on_backends(ops=OPS, dtypes=DTYPES):
    """Run a test that takes ``op`` and ``target`` for each op on each of them."""
    pairs = [pytest.param(op, target, id=f"{op}-{target}") for op in ops for target in targets(op, dtypes)]
    return pytest.mark.parametrize(("op", "target"), pairs, indirect=["target"])


def acc(dtype):
    """The accumulation dtype beside ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Layer(NamedTuple):
    x: torch.Tensor  # (M, K)
    sign: torch.Tensor  # (M,)
    weight: torch.Tensor  # (N, K)
    bias: torch.Tensor | None  # (N,)


def layer(rows, depth, cols, *, bias=True, dtype=torch.float32, device="cpu", seed=0):
    """Random tensors of a layer, whose goodness lies around the usual threshold under l2 normalisation."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=g, dtype=torch.float64)
    weight = torch.randn(cols, depth, generator=g, dtype=torch.float64)
    offset = torch.randn(cols, generator=g, dtype=torch.float64) if bias else None
    sign = torch.randint(0, 2, (rows,), generator=g) * 2 - 1
    x, weight = x.to(device, dtype), weight.to(device, dtype)
    return Layer(x, sign.to(device, acc(dtype)), weight, offset if offset is None else offset.to(device, dtype))


def arguments(op, *, rows=6, depth=8, cols=5, bias=True, optimizer="adam", dtype=torch.float32, device="cpu", seed=0):
    """Valid keyword arguments of ``op``, with every optional tensor given."""
    x, sign, weight, offset = layer(rows, depth, cols, bias=bias, dtype=dtype, device=device, seed=seed)
    like = {"dtype": acc(dtype), "device": device}
    sqnorm, per_row, per_col = x.to(acc(dtype)).square().sum(1), torch.linspace(-1, 1, rows, **like), None
    per_col = torch.linspace(-0.1, 0.1, cols, **like)
    labels = (torch.arange(rows, device=device) % 3, (torch.arange(rows, device=device) + 1) % 3)
    base = {"x": x, "weight": weight, "bias": offset}
    chosen = OPTIMIZERS[optimizer]
    update = {**base, "state": chosen.init_state(weight, offset), "optimizer": chosen}
    peer = {"row_term": per_row, "col_term": per_col}
    coef = {"y": torch.rand(rows, cols, device=device).to(dtype), "coef": per_row / rows}
    if op == "ff_forward":
        return {**base, "x_sqnorm": sqnorm}
    if op == "ff_grad":
        return {**base, **coef, **peer, "x_sqnorm": sqnorm}
    if op == "ff_update_":
        return {**update, **coef, **peer, "x_sqnorm": sqnorm}
    if op == "ff_step_":
        return {**update, **peer, "sign": sign, "x_sqnorm": sqnorm}
    if op == "ff_network_step_":
        _, _, w2, b2 = layer(1, cols, 4, bias=bias, dtype=dtype, device=device, seed=seed + 1)
        layers = [
            ff.FFLayer(w, b, chosen.init_state(w, b), chosen, peer=0.3, peer_mean=torch.rand(len(w), **like))
            for w, b in ((weight, offset), (w2, b2))
        ]
        layers[1].dropout = 0.25
        extra = {"x_sqnorm": sqnorm, "dropout_seed": torch.tensor([seed - 2**40], device=device)}
        return {"x": x, "sign": sign, "layers": layers, **extra}
    if op == "ff_label_forward":
        return {**base, "labels": torch.stack(labels, 1), "num_classes": 3}
    return {
        **update, "labels_pos": labels[0], "labels_neg": labels[1], "num_classes": 3,
        "row_term": torch.cat([per_row, -per_row]), "col_term": per_col,
    }  # fmt: skip


def minibatches(count, *, labelled=False, **options):
    """Arguments of ff_network_step_ for ``count`` minibatches, with all that it may be given."""
    singles = [arguments("ff_network_step_", seed=s, **options) for s in range(count)]
    given = singles[0] | {n: torch.stack([g[n] for g in singles]) for n in ("x", "sign", "x_sqnorm")}
    given["dropout_seed"] = torch.cat([g["dropout_seed"] for g in singles])
    if labelled:
        positive = torch.arange(given["sign"].numel(), device=given["x"].device).view(given["sign"].shape) % 3
        given |= {"sign": None, "x_sqnorm": None, "labels": (positive, (positive + 1) % 3), "num_classes": 3}
    return given


def of_minibatch(given, s):
    """Of such arguments, those of one minibatch; the layers are the same."""
    rows = {n: given[n][s] for n in ("x", "sign", "x_sqnorm") if given.get(n) is not None}
    if given.get("labels") is not None:
        rows["labels"] = tuple(t[s] for t in given["labels"])
    if given.get("dropout_seed") is not None:
        rows["dropout_seed"] = given["dropout_seed"][s : s + 1]
    return given | rows


def call(op, given):
    return getattr(ff, op)(**given)


def tensors(given, prefix=""):
    """All tensors among arguments, by name; those of state and layers too."""
    found = {}
    for name, value in given.items() if isinstance(given, dict) else enumerate(given):
        name = f"{prefix}{name}"
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, (dict, list, tuple)):
            found |= tensors(value, f"{name}.")
        elif isinstance(value, ff.FFLayer):
            found |= tensors(vars(value), f"{name}.")
        elif isinstance(value, torch.nn.Module):
            found |= tensors(value.state_dict(), f"{name}.")
    return found


def copied(value):
    """The same arguments on memory of their own, whatever their strides were."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: copied(v) for name, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    if isinstance(value, ff.FFLayer):
        return ff.FFLayer(**copied(vars(value)))
    return value


def flat(op, given, module=None):
    """The flat arguments with which the public function, in ``module``, would call the registered op."""
    seen, module = [], module or (network if "network" in op else label_ops if "label" in op else ops)

    class Stop(Exception):
        pass

    def record(name, *args):
        seen[:] = args
        raise Stop

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "call", record)
        with pytest.raises(Stop):
            getattr(module, op)(**given)
    return tuple(seen)
