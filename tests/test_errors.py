"""Bad input: every case names the argument and what was given, and changes nothing."""

import gc
import math
import weakref
from dataclasses import replace
from typing import NamedTuple

import cases
import pytest
import torch

import ffkernels as ff

NAN, INF = math.nan, math.inf


class Bad(NamedTuple):
    label: str
    op: str | None  # None: run() does something else than to call an op
    given: object  # () -> the arguments
    run: object  # (arguments) -> None
    error: type
    says: tuple[str, ...]  # what the message holds: the argument's name, what was given


TABLE: list[Bad] = []


def bad_call(op, label, change, error, *says, **options):
    """A call of an op with valid arguments but for what ``change`` does to them."""

    def given():
        valid = cases.arguments(op, **options)
        valid.update(change(valid) or {})
        return valid

    TABLE.append(Bad(f"{op}: {label}", op, given, lambda valid: cases.call(op, valid), error, says))


def bad(label, run, error, *says):
    """Something else: ``run`` gets a net that must stay as it is."""

    def given():
        return {"net": ff.FFNet.from_sizes([12, 6, 4], num_classes=3)}

    TABLE.append(Bad(label, None, given, lambda valid: run(valid["net"]), error, says))


# ---------------------------------------------------------------------------------------------------------------------
# Every tensor of every op: its type, rank, length, dtype, device, and that it requires no grad.

WRONG_DTYPE = {"x": torch.int64, "sign": torch.bool, "labels": torch.float32, "labels_pos": torch.float32}
WRONG_DTYPE["labels_neg"] = torch.float32

for _op in cases.OPS:
    for _name, _tensor in cases.arguments(_op).items():
        if not isinstance(_tensor, torch.Tensor):
            continue
        _shape = str((1, *_tensor.shape))
        bad_call(_op, f"{_name} is no tensor", lambda a, n=_name: {n: "spam"}, TypeError, _name, "str")
        bad_call(_op, f"{_name} of another rank", lambda a, n=_name: {n: a[n][None]}, ValueError, _name, _shape)
        if _name not in ("x", "weight"):  # which say what M, K and N are
            _longer = str((_tensor.shape[0] + 1, *_tensor.shape[1:]))
            bad_call(
                _op, f"{_name} too long", lambda a, n=_name: {n: torch.cat([a[n], a[n][:1]])}, ValueError,
                _name, _longer,
            )  # fmt: skip
        _dtype = WRONG_DTYPE.get(_name, torch.float16)
        bad_call(
            _op, f"{_name} of another dtype", lambda a, n=_name, d=_dtype: {n: a[n].to(d)}, TypeError,
            _name, str(_dtype),
        )  # fmt: skip
        bad_call(_op, f"{_name} on meta", lambda a, n=_name: {n: a[n].to("meta")}, ValueError, "must be on", "meta")
        if _tensor.is_floating_point():
            bad_call(
                _op, f"{_name} requires grad", lambda a, n=_name: {n: a[n].requires_grad_()}, RuntimeError,
                _op, f"{_name} requires grad", f"{_name}.detach()",
            )  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Shapes that do not fit one another, and options.

for _op in cases.OPS:
    if _op == "ff_network_step_":
        continue
    bad_call(_op, "K of x and weight", lambda a: {"x": a["x"][:, 1:]}, ValueError, "x", "K = 8", "(6, 7)")
    bad_call(_op, "no outputs", lambda a: {"weight": a["weight"][:0]}, ValueError, "weight", "(0, 8)")
    bad_call(
        _op, "no inputs", lambda a: {"x": a["x"][:, :0], "weight": a["weight"][:, :0]}, ValueError, "weight", "(5, 0)"
    )  # fmt: skip
    bad_call(_op, "N of weight and bias", lambda a: {"weight": a["weight"][:4]}, ValueError, "bias", "(4,)", "(5,)")
    bad_call(_op, "normalize", lambda a: {"normalize": "L2"}, ValueError, "normalize", "'l2'", "'L2'")
    bad_call(_op, "activation", lambda a: {"activation": "elu"}, ValueError, "activation", "'relu'", "'elu'")
    bad_call(_op, "precision", lambda a: {"precision": "low"}, ValueError, "precision", "'medium'", "'low'")
    bad_call(_op, "eps is None", lambda a: {"eps": None}, TypeError, "eps", "None")
    bad_call(_op, "complex", lambda a: {"x": a["x"].to(torch.complex64)}, TypeError, "x", "complex64")
    bad_call(_op, "sparse x", lambda a: {"x": a["x"].to_sparse()}, TypeError, "x", "sparse")
    bad_call(_op, "sparse weight", lambda a: {"weight": a["weight"].to_sparse()}, TypeError, "weight", "sparse")
    for _value in (-1e-4, NAN, INF):
        bad_call(_op, f"eps {_value}", lambda a, v=_value: {"eps": v}, ValueError, "eps", repr(_value))

for _op in ("ff_step_", "ff_label_step_"):
    bad_call(_op, "no rows", lambda a: {n: t[:0] for n, t in a.items() if n in ("x", "sign", "x_sqnorm")}, ValueError,
             "x", "at least one row", "(0, 8)")  # fmt: skip
    bad_call(_op, "goodness", lambda a: {"goodness": "max"}, ValueError, "goodness", "'mean'", "'max'")
    bad_call(_op, "threshold is a string", lambda a: {"threshold": "2"}, TypeError, "threshold", "'2'")
    for _name, _value in [("threshold", -1.0), ("threshold", NAN), ("threshold", INF), ("temperature", 0.0),
                          ("temperature", -1.0), ("temperature", INF)]:  # fmt: skip
        bad_call(_op, f"{_name} {_value}", lambda a, n=_name, v=_value: {n: v}, ValueError, _name, repr(_value))
for _op in ("ff_grad", "ff_update_", "ff_step_", "ff_label_step_"):
    bad_call(_op, "row_term alone", lambda a: {"col_term": None}, ValueError, "row_term", "col_term", "together")
    bad_call(_op, "col_term alone", lambda a: {"row_term": None}, ValueError, "row_term", "col_term", "together")

for _value in (0.0, 2.0, -1.5, NAN):
    for _op in ("ff_step_", "ff_network_step_"):
        bad_call(_op, f"sign {_value}", lambda a, v=_value: {"sign": a["sign"].index_fill(0, torch.tensor(3), v)},
                 ValueError, "sign", f"{_value:g}")  # fmt: skip

for _op, _names in [("ff_label_forward", ["labels"]), ("ff_label_step_", ["labels_pos", "labels_neg"])]:
    for _name in _names:
        bad_call(_op, f"{_name} too large", lambda a, n=_name: {n: a[n] + 1}, ValueError, _name, "[0, 3)", "got 3")
        bad_call(_op, f"{_name} negative", lambda a, n=_name: {n: a[n] - 1}, ValueError, _name, "[0, 3)", "got -1")
    bad_call(_op, "num_classes beyond K", lambda a: {"num_classes": 9}, ValueError, "num_classes", "[1, 8]", "9")
    bad_call(_op, "num_classes 0", lambda a: {"num_classes": 0}, ValueError, "num_classes", "0")
    bad_call(_op, "num_classes 3.0", lambda a: {"num_classes": 3.0}, TypeError, "num_classes", "3.0")
    bad_call(_op, "num_classes None", lambda a: {"num_classes": None}, TypeError, "num_classes", "None")
    bad_call(_op, "strength", lambda a: {"strength": NAN}, ValueError, "strength", "nan")
    bad_call(_op, "strength in float32", lambda a: {"strength": -1e39}, ValueError, "strength", "float32", "-1e+39")
    bad_call(_op, "strength in bf16", lambda a: {"strength": 3.4e38}, ValueError, "strength", "bfloat16", "3.4e+38",
             dtype=torch.bfloat16)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# In-place targets, state and optimizer.


def replaced_state(a, name, tensor):
    return {"state": {**a["state"], name: tensor}}


for _op in ("ff_update_", "ff_step_", "ff_label_step_"):
    bad_call(_op, "weight not contiguous", lambda a: {"weight": a["weight"].T.contiguous().T}, ValueError,
             "weight", "contiguous", "(5, 8)", "(1, 5)")  # fmt: skip
    bad_call(_op, "weight expanded", lambda a: {"weight": a["weight"][:1].expand(5, 8)}, ValueError,
             "weight", "contiguous", "(0, 1)")  # fmt: skip
    bad_call(_op, "bias strided", lambda a: {"bias": torch.ones(10)[::2]}, ValueError, "bias", "contiguous", "(2,)")
    bad_call(_op, "state not contiguous", lambda a: replaced_state(a, "exp_avg", torch.zeros(8, 5).T), ValueError,
             "state", "contiguous", "(1, 5)")  # fmt: skip
    bad_call(
        _op, "weight is a view of x", lambda a: {"weight": a["x"][:5]}, ValueError, "weight", "share memory", "x (6, 8)"
    )
    bad_call(
        _op, "weight begins in x", lambda a: {"weight": a["x"][1:]}, ValueError, "weight", "share memory", "x (6, 8)"
    )
    bad_call(_op, "bias within weight", lambda a: {"bias": a["weight"][4, 3:]}, ValueError, "weight", "share memory")
    bad_call(_op, "one moment twice", lambda a: replaced_state(a, "exp_avg_sq", a["state"]["exp_avg"]), ValueError,
             "state", "share memory")  # fmt: skip
    bad_call(_op, "a moment is the weight", lambda a: replaced_state(a, "exp_avg", a["weight"]), ValueError,
             "state", "share memory")  # fmt: skip
    bad_call(_op, "lr is the step", lambda a: {"optimizer": ff.Adam(lr=a["state"]["step"])}, ValueError, "share memory",
             "state['step']", "lr ()")  # fmt: skip
    bad_call(_op, "optimizer of torch.optim", lambda a: {"optimizer": torch.optim.SGD([a["weight"]])}, TypeError,
             "optimizer", "ffkernels.SGD", "SGD")  # fmt: skip
    bad_call(_op, "optimizer by name", lambda a: {"optimizer": "adam"}, TypeError, "optimizer", "str")
    bad_call(_op, "state of another optimizer", lambda a: {"state": ff.SGD(momentum=0.5).init_state(a["weight"])},
             ValueError, "state", "'exp_avg'", "'momentum_buffer'")  # fmt: skip
    bad_call(_op, "no state", lambda a: {"state": None}, ValueError, "state", "'exp_avg'", "NoneType")
    bad_call(_op, "state without the bias", lambda a: {"state": ff.Adam().init_state(a["weight"])}, ValueError,
             "state", "'exp_avg_bias'")  # fmt: skip
    bad_call(_op, "state of other shape", lambda a: replaced_state(a, "exp_avg", torch.zeros(4, 8)), ValueError,
             "state['exp_avg']", "(5, 8)", "(4, 8)")  # fmt: skip
    bad_call(_op, "state of other dtype", lambda a: replaced_state(a, "exp_avg_sq", torch.zeros(5, 8).bfloat16()),
             ValueError, "state['exp_avg_sq']", "torch.bfloat16")  # fmt: skip
    bad_call(_op, "state on meta", lambda a: replaced_state(a, "exp_avg_bias", torch.zeros(5, device="meta")),
             ValueError, "state['exp_avg_bias']", "meta")  # fmt: skip
    bad_call(_op, "step is a number", lambda a: replaced_state(a, "step", 0), TypeError, "state['step']", "int")
    bad_call(_op, "step is a vector", lambda a: replaced_state(a, "step", torch.zeros(1)), ValueError,
             "state['step']", "(1,)")  # fmt: skip
    bad_call(_op, "state is a list", lambda a: {"state": list(a["state"].values())}, ValueError, "state", "list")
    bad_call(_op, "state requires grad", lambda a: replaced_state(a, "exp_avg", torch.zeros(5, 8).requires_grad_()),
             RuntimeError, _op, "state['exp_avg'] requires grad")  # fmt: skip
    bad_call(_op, "lr requires grad", lambda a: {"optimizer": ff.Adam(lr=torch.tensor(0.1, requires_grad=True))},
             RuntimeError, _op, "lr requires grad")  # fmt: skip
    bad_call(_op, "lr on meta", lambda a: {"optimizer": ff.Adam(lr=torch.tensor(0.1, device="meta"))}, ValueError,
             "lr", "cpu", "meta")  # fmt: skip

bad_call("ff_update_", "coef shares memory", lambda a: {"coef": a["weight"].view(-1)[3:9]}, ValueError, "share memory")
bad_call("ff_step_", "sign shares memory", lambda a: {"sign": a["weight"].view(-1)[:6].fill_(1)}, ValueError,
         "share memory", "(6,)")  # fmt: skip
bad_call("ff_label_step_", "labels too short", lambda a: {"labels_neg": a["labels_neg"][:5]}, ValueError,
         "labels_neg", "B = 6", "(5,)")  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# ff_network_step_: the second layer's faults name the layer.


def second(**changes):
    return lambda a: {"layers": [a["layers"][0], ff.FFLayer(**{**vars(a["layers"][1]), **changes})]}


def two_labels(a):
    return {"sign": None, "x_sqnorm": None, "num_classes": 3, "labels": (torch.zeros(6).long(), torch.ones(6).long())}


def as_integers(a, count):
    """The first layer's weight, of zeros, seen as int64."""
    return a["layers"][0].weight.zero_().view(-1).view(torch.int64)[:count]


def several(a, count=2):
    stacked = {n: a[n].expand(count, *a[n].shape).contiguous() for n in ("x", "sign", "x_sqnorm")}
    return {**stacked, "dropout_seed": a["dropout_seed"].repeat(count)}


for _label, _change, _error, *_says in [
    ("no layers", lambda a: {"layers": []}, ValueError, "layers", "none"),
    ("layers is one layer", lambda a: {"layers": a["layers"][0]}, TypeError, "layers", "FFLayer"),
    ("layers of nn.Linear", lambda a: {"layers": [torch.nn.Linear(8, 5)]}, TypeError, "layers[0]", "Linear"),
    (
        "one layer twice",
        lambda a: {"layers": [a["layers"][0], second()(a)["layers"][1], a["layers"][1]]},
        ValueError,
        "layers[2]",
        "K = 5",
        "4",
    ),
    ("the same square layer twice", lambda a: {"layers": [a["layers"][0]] * 2, "x": a["x"]}, ValueError, "layers[1]"),
    ("width", second(weight=torch.ones(4, 6)), ValueError, "layers[1]", "x", "K = 6"),
    ("bias", second(bias=torch.ones(5)), ValueError, "layers[1]", "bias", "(5,)"),
    ("weight on meta", second(weight=torch.ones(4, 5, device="meta")), ValueError, "layers[1]", "weight", "meta"),
    ("weight dtype", second(weight=torch.ones(4, 5).double()), TypeError, "layers[1]", "weight", "float64"),
    (
        "weight grad",
        second(weight=torch.ones(4, 5).requires_grad_()),
        RuntimeError,
        "layers[1]",
        "weight requires grad",
    ),
    ("state", second(state={}), ValueError, "layers[1]", "state", "[]"),
    ("optimizer", second(optimizer=None), TypeError, "layers[1]", "optimizer", "NoneType"),
    ("threshold", second(threshold=-2.0), ValueError, "layers[1]", "threshold", "-2.0"),
    ("activation", second(activation="swish"), ValueError, "layers[1]", "activation", "'swish'"),
    (
        "state dtype",
        second(state=ff.Adam().init_state(torch.ones(4, 5).double(), torch.ones(4))),
        ValueError,
        "layers[1]",
        "state['step']",
        "float64",
    ),
    ("lr of one layer", second(optimizer=ff.Adam(lr=torch.tensor(0.1))), ValueError, "lr", "1 of 2"),
    ("no sign", lambda a: {"sign": None}, ValueError, "sign", "labels", "neither"),
    ("sign and labels", lambda a: {"labels": two_labels(a)["labels"]}, ValueError, "sign", "labels", "both"),
    ("labels not a pair", lambda a: {**two_labels(a), "labels": 3}, TypeError, "labels", "int"),
    ("labels out of range", lambda a: {**two_labels(a), "num_classes": 1}, ValueError, "labels_neg", "[0, 1)", "1"),
    (
        "labels of another length",
        lambda a: {**two_labels(a), "x": a["x"][:5]},
        ValueError,
        "labels[0]",
        "B = 5",
        "(6,)",
    ),
    ("labels without num_classes", lambda a: {**two_labels(a), "num_classes": None}, TypeError, "num_classes", "None"),
    ("labels and x_sqnorm", lambda a: {**two_labels(a), "x_sqnorm": a["x_sqnorm"]}, ValueError, "x_sqnorm", "labels"),
    ("no rows", lambda a: {"x": a["x"][:0]}, ValueError, "x", "(0, 8)"),
    ("peer", second(peer=-0.1), ValueError, "layers[1]", "peer", ">= 0", "-0.1"),
    ("peer is a string", second(peer="0.1"), TypeError, "layers[1]", "peer", "'0.1'"),
    ("no peer_mean", second(peer_mean=None), ValueError, "layers[1]", "peer_mean", "(N,)", "None"),
    ("peer_mean shape", second(peer_mean=torch.ones(5)), ValueError, "layers[1]", "peer_mean", "(4,)", "(5,)"),
    ("peer_mean dtype", second(peer_mean=torch.ones(4).half()), TypeError, "layers[1]", "peer_mean", "float16"),
    ("peer_mean grad", second(peer_mean=torch.ones(4).requires_grad_()), RuntimeError, "layers[1]", "peer_mean"),
    (
        "peer_mean strides",
        second(peer_mean=torch.ones(8)[::2]),
        ValueError,
        "layers[1].peer_mean",
        "contiguous",
        "(2,)",
    ),
    ("peer_mean in x", lambda a: second(peer_mean=a["x"][0, :4])(a), ValueError, "layers[1].peer_mean", "x (6, 8)"),
    (
        "labels in weight",
        lambda a: {**two_labels(a), "labels": (as_integers(a, 6), torch.ones(6).long())},
        ValueError,
        "layers[0].weight",
        "share memory",
        "labels[0] (6,)",
    ),
    (
        "dropout_seed in weight",
        lambda a: {"dropout_seed": as_integers(a, 1)},
        ValueError,
        "layers[0].weight",
        "share memory",
        "dropout_seed (1,)",
    ),
    ("precision", second(precision="low"), ValueError, "layers[1]", "precision", "'low'"),
    ("sparse bias", second(bias=torch.ones(4).to_sparse()), TypeError, "layers[1]", "bias", "dense", "sparse"),
    ("dropout 1", second(dropout=1.0), ValueError, "layers[1]", "dropout", "[0, 1)", "1.0"),
    ("dropout negative", second(dropout=-0.5), ValueError, "layers[1]", "dropout", "-0.5"),
    ("dropout is a bool", second(dropout=True), TypeError, "layers[1]", "dropout", "True"),
    (
        "dropout of the first layer",
        lambda a: {"layers": [replace(a["layers"][0], dropout=0.5), a["layers"][1]]},
        ValueError,
        "layers[0]",
        "dropout",
        "0.5",
    ),
    ("no minibatch", lambda a: several(a, 0), ValueError, "x", "minibatch", "(0, 6, 8)"),
    ("no rows in minibatches", lambda a: {"x": a["x"][None, :0]}, ValueError, "x", "row", "(1, 0, 8)"),
    ("minibatches of minibatches", lambda a: {"x": a["x"][None, None]}, ValueError, "x", "(S, M, K)", "(1, 1, 6, 8)"),
    ("sign of one minibatch", lambda a: several(a) | {"sign": a["sign"]}, ValueError, "sign", "(S, M)", "(2, 6)"),
    (
        "sign in one of them",
        lambda a: several(a) | {"sign": several(a)["sign"] * torch.tensor([[1], [3]])},
        ValueError,
        "sign",
        "3",
    ),
    ("x_sqnorm of one minibatch", lambda a: several(a) | {"x_sqnorm": a["x_sqnorm"]}, ValueError, "x_sqnorm", "(2, 6)"),
    ("labels of one minibatch", lambda a: several(a) | two_labels(a), ValueError, "labels[0]", "(S, B)", "(6,)"),
    (
        "labels of too many",
        lambda a: several(a) | {**two_labels(a), "labels": (torch.ones(3, 6).long(),) * 2},
        ValueError,
        "labels[0]",
        "(2, 6)",
        "(3, 6)",
    ),
    (
        "one dropout_seed for two",
        lambda a: several(a) | {"dropout_seed": a["dropout_seed"]},
        ValueError,
        "dropout_seed",
        "(S,)",
        "(2,)",
        "(1,)",
    ),
    (
        "minibatches of another width",
        lambda a: several(a) | {"x": torch.ones(2, 6, 7)},
        ValueError,
        "layers[0]",
        "x",
        "K = 8",
        "(6, 7)",
    ),
    ("no dropout_seed", lambda a: {"dropout_seed": None}, TypeError, "dropout_seed", "NoneType"),
    ("dropout_seed shape", lambda a: {"dropout_seed": torch.tensor(3)}, ValueError, "dropout_seed", "(1,)", "()"),
    ("dropout_seed dtype", lambda a: {"dropout_seed": torch.ones(1)}, TypeError, "dropout_seed", "int64", "float32"),
]:
    bad_call("ff_network_step_", _label, _change, _error, *_says)
bad_call("ff_network_step_", "layers share state", lambda a: {"layers": [a["layers"][0]] * 2}, ValueError,
         "layers[0].weight", "layers[1].weight", "share memory", rows=6, depth=5, cols=5)  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, modules, labels, training and backends.

for _make, _name, _value, _error in [
    (ff.SGD, "lr", -1.0, ValueError), (ff.SGD, "lr", NAN, ValueError), (ff.Adam, "lr", INF, ValueError),
    (ff.Adam, "lr", "0.1", TypeError), (ff.SGD, "momentum", -0.1, ValueError), (ff.SGD, "momentum", NAN, ValueError),
    (ff.HintonSGD, "momentum", 1.0, ValueError), (ff.HintonSGD, "weight_decay", -0.1, ValueError),
    (ff.HintonSGD, "lr", "0.1", TypeError),
    (ff.SGD, "dampening", INF, ValueError), (ff.SGD, "weight_decay", -1, ValueError),
    (ff.SGD, "nesterov", 1, TypeError),
    (ff.AdamW, "weight_decay", NAN, ValueError), (ff.Adam, "eps", -1e-8, ValueError), (ff.Adam, "eps", True, TypeError),
    (ff.Adam, "betas", 0.9, TypeError), (ff.FFLinear, "optimizer", "adam", TypeError),
]:  # fmt: skip
    bad(f"{_make.__name__}: {_name} {_value!r}", lambda net, m=_make, n=_name, v=_value: m(
        **({"in_features": 2, "out_features": 2} if m is ff.FFLinear else {}), **{n: v}),
        _error, _name, "str" if _make is ff.FFLinear else repr(_value))  # fmt: skip

X, LABELS = torch.ones(6, 12), torch.arange(6) % 3
for _label, _run, _error, *_says in [
    ("Adam: betas", lambda net: ff.Adam(betas=(0.9, 1.0)), ValueError, "betas[1]", "1.0"),
    ("SGD: nesterov", lambda net: ff.SGD(nesterov=True), ValueError, "nesterov", "momentum 0.0"),
    ("SGD: nesterov, damped", lambda net: ff.SGD(momentum=0.9, dampening=0.1, nesterov=True), ValueError, "nesterov",
     "dampening 0.1"),
    ("SGD: lr tensor", lambda net: ff.SGD(lr=torch.ones(1)), ValueError, "lr", "(1,)"),
    ("FFLinear: in_features", lambda net: ff.FFLinear(0, 2), ValueError, "in_features", "0"),
    ("FFLinear: out_features", lambda net: ff.FFLinear(2, 2.0), TypeError, "out_features", "2.0"),
    ("FFLinear: dtype", lambda net: ff.FFLinear(2, 2, dtype=torch.int8), (TypeError, RuntimeError), "dtype"),
    ("FFLinear: activation", lambda net: ff.FFLinear(2, 2, activation="x"), ValueError, "activation", "'x'"),
    ("FFLinear: goodness", lambda net: ff.FFLinear(2, 2, goodness="x"), ValueError, "goodness", "'x'"),
    ("FFLinear: threshold", lambda net: ff.FFLinear(2, 2, threshold=-1), ValueError, "threshold", "-1"),
    ("FFLinear: precision", lambda net: ff.FFLinear(2, 2, precision="x"), ValueError, "precision", "'x'"),
    ("FFLinear(x): width", lambda net: net.layers[0](torch.ones(2, 11)), ValueError, "x", "K = 12", "(2, 11)"),
    ("FFLinear(x): a number", lambda net: net.layers[0](torch.tensor(1.0)), ValueError, "x", "()"),
    ("FFLinear(x): no tensor", lambda net: net.layers[0]([1.0]), TypeError, "x", "list"),
    ("FFLinear(x): grad", lambda net: net.layers[0](X.clone().requires_grad_()), RuntimeError, "x requires grad"),
    ("FFLinear.step: widths", lambda net: net.layers[0].step(X, X[:, 1:]), ValueError, "x_neg", "(6, 11)"),
    ("FFLinear.step: no tensor", lambda net: net.layers[0].step(X, 3), TypeError, "x_neg", "int"),
    ("FFNet: no layers", lambda net: ff.FFNet([]), ValueError, "layers", "none"),
    ("FFNet: nn.Linear", lambda net: ff.FFNet([torch.nn.Linear(2, 2)]), TypeError, "layers[0]", "Linear"),
    ("FFNet: widths", lambda net: ff.FFNet([ff.FFLinear(2, 3), ff.FFLinear(2, 3)]), ValueError, "layers[1]", "3", "2"),
    ("FFNet: num_classes", lambda net: ff.FFNet([ff.FFLinear(2, 3)], num_classes=3), ValueError, "num_classes", "3"),
    ("FFNet: one class", lambda net: ff.FFNet([ff.FFLinear(2, 3)], num_classes=1), ValueError, "num_classes", "1"),
    ("FFNet: strength", lambda net: ff.FFNet([ff.FFLinear(2, 3)], label_strength=NAN), ValueError, "label_strength"),
    ("FFNet.from_sizes", lambda net: ff.FFNet.from_sizes([3]), ValueError, "sizes", "[3]"),
    ("FFNet[0]", lambda net: net[0], TypeError, "slices", "0"),
    ("FFNet(x): rank", lambda net: net(torch.ones(12)), ValueError, "x", "(12,)"),
    ("FFNet(x): no tensor", lambda net: net([1.0]), TypeError, "x", "list"),
    ("FFNet.step: no tensor", lambda net: net.step(X, None), TypeError, "x_neg", "NoneType"),
    ("FFNet.predict: layers", lambda net: net.predict(X, layers=[2]), ValueError, "layers", "[2]"),
    ("FFNet.predict: no tensor", lambda net: net.predict([1.0]), TypeError, "x", "list"),
    ("FFNet.predict: batch_size", lambda net: net.predict(X, batch_size=0), ValueError, "batch_size", "0"),
    ("FFNet.predict: num_classes", lambda net: ff.FFNet.from_sizes([12, 3]).predict(X), ValueError, "num_classes"),
    ("label_step: labels", lambda net: net.label_step(X, LABELS + 1, LABELS), ValueError, "labels_pos", "[0, 3)", "3"),
    ("label_goodness: labels", lambda net: net.label_goodness(X, LABELS), ValueError, "labels", "(B, C)", "(6,)"),
    ("overlay: rank", lambda net: ff.overlay(torch.ones(2, 3, 4), LABELS[:2], 2), ValueError, "x", "(2, 3, 4)"),
    ("overlay: labels", lambda net: ff.overlay(X, LABELS[:5], 3), ValueError, "labels", "B = 6", "(5,)"),
    ("overlay: range", lambda net: ff.overlay(X, LABELS - 1, 3), ValueError, "labels", "[0, 3)", "-1"),
    ("overlay: num_classes", lambda net: ff.overlay(torch.ones(6, 3, 2, 2), LABELS, 5), ValueError, "num_classes", "5"),
    ("overlay: strength", lambda net: ff.overlay(X, LABELS, 3, INF), ValueError, "strength", "inf"),
    ("wrong_labels: range", lambda net: ff.wrong_labels(LABELS, 2), ValueError, "labels", "[0, 2)", "2"),
    ("wrong_labels: one class", lambda net: ff.wrong_labels(LABELS, 1), ValueError, "num_classes", "1"),
    ("wrong_labels: a number", lambda net: ff.wrong_labels(torch.tensor(1), 3), ValueError, "labels", "()"),
    ("wrong_labels: list", lambda net: ff.wrong_labels([1, 2], 3), TypeError, "labels", "list"),
    ("logistic_loss: sign", lambda net: ff.logistic_loss(torch.ones(2), torch.tensor([1.0, 0.5])), ValueError, "sign",
     "0.5"),
    ("logistic_loss: dtype", lambda net: ff.logistic_loss(torch.ones(2).half(), X), TypeError, "goodness", "float16"),
    ("logistic_loss: divisor", lambda net: ff.logistic_loss(torch.ones(2), torch.ones(2), divisor=0), ValueError,
     "divisor", "0"),
    ("fit: epochs", lambda net: net.fit(X, LABELS, epochs=0), ValueError, "epochs", "0"),
    ("fit: mode", lambda net: net.fit(X, LABELS, epochs=1, mode="both"), ValueError, "mode", "'both'"),
    ("fit: lr", lambda net: net.fit(X, LABELS, epochs=1, lr=-1.0), ValueError, "lr", "-1.0"),
    ("fit: lr function", lambda net: net.fit(X, LABELS, epochs=1, lr=lambda t: NAN), TypeError, "lr", "function"),
    ("fit: no labels", lambda net: net.fit(X, epochs=1), ValueError, "labels", "None"),
    ("fit: lengths", lambda net: net.fit(X, LABELS[:4], epochs=1), ValueError, "labels", "B = 6", "(4,)"),
    ("fit: label values", lambda net: net.fit(X, LABELS + 1, epochs=1), ValueError, "labels", "[0, 3)", "3"),
    ("fit: no rows", lambda net: net.fit(X[:0], LABELS[:0], epochs=1), ValueError, "data", "(0, 12)"),
    ("fit: width", lambda net: net.fit(X[:, 1:], LABELS, epochs=1), ValueError, "data", "12 inputs", "(6, 11)"),
    ("fit: data rank", lambda net: net.fit(X[:, :, None], LABELS, epochs=1), ValueError, "data", "(6, 12, 1)"),
    ("fit: integers", lambda net: net.fit(X.long(), LABELS, epochs=1), TypeError, "x", "int64"),
    ("fit: data", lambda net: net.fit(3, epochs=1), TypeError, "data", "int"),
    ("fit: empty loader", lambda net: net.fit([], epochs=1), ValueError, "data", "empty"),
    ("fit: loader of tensors", lambda net: net.fit([X, X, X], epochs=1), TypeError, "(x, labels)", "Tensor"),
    ("fit: loader of lists", lambda net: net.fit([([1], LABELS)], epochs=1), TypeError, "x", "list"),
    ("fit: validation", lambda net: net.fit(X, LABELS, epochs=1, validation=X), TypeError, "validation", "Tensor"),
    ("fit: validation x", lambda net: net.fit(X, LABELS, epochs=1, validation=([1], LABELS)), TypeError,
     "validation[0]"),
    ("fit: validation labels", lambda net: net.fit(X, LABELS, epochs=1, validation=(X, LABELS[:2])), ValueError,
     "validation[1]", "(2,)"),
    ("fit: optimizer", lambda net: net.fit(X, LABELS, epochs=1, optimizer=ff.Adam()), TypeError, "optimizer", "Adam"),
    ("fit: another net's optimizer", lambda net: net.fit(
        X, LABELS, epochs=1, optimizer=torch.optim.SGD(ff.FFNet.from_sizes([3, 3]).parameters())),
     ValueError, "optimizer", "none of them"),
    ("error_percent: lengths", lambda net: ff.error_percent(net, X, LABELS[:1]), ValueError, "labels", "(1,)"),
    ("EarlyStopping", lambda net: ff.EarlyStopping(0), ValueError, "patience", "0"),
    ("use_backend", lambda net: ff.use_backend("gpu"), ValueError, "backend", "'gpu'", "'reference'"),
]:  # fmt: skip
    bad(_label, _run, _error, *_says)


def bits(t):
    return t.detach().contiguous().flatten().view(torch.uint8).tolist()


def message_of(row):
    """The error's text, having seen that nothing changed."""
    given = row.given()
    watched = {name: t for name, t in cases.tensors(given).items() if not t.is_meta and not t.is_sparse}
    before = {name: t.detach().clone() for name, t in watched.items()}
    with pytest.raises(row.error) as caught:
        row.run(given)
    for name, t in watched.items():
        assert bits(t) == bits(before[name]), f"{name} changed"
    return str(caught.value)


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.label)
def test_bad_input(row):
    backends = ["reference"] if row.op is None else sorted({t.backend for t in cases.targets(row.op)})
    messages = set()
    for backend in backends:
        with ff.use_backend(backend):
            messages.add(message_of(row))
    assert len(messages) == 1, "the backends say different things"
    (message,) = messages
    for part in row.says:
        assert part in message


@pytest.mark.parametrize("op", cases.OPS)
def test_a_refused_call_keeps_no_argument_alive(op):
    """Not even until the next garbage collection: who catches the error may need the memory."""
    given = cases.arguments(op)
    given["x"] = torch.ones(6, 9)  # K is 8
    x = weakref.ref(given["x"])
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ValueError, match="K = 8"):
            cases.call(op, given)
        del given
        assert x() is None
    finally:
        gc.enable()


def test_the_table_is_large_and_names_no_case_twice():
    labels = [row.label for row in TABLE]
    assert len(labels) == len(set(labels)) >= 200
    assert {row.op for row in TABLE} == {None, *cases.OPS}
