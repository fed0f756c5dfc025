"""Every op on the CUDA kernels as nvcc compiled them, in the PTX interpreter, against float64.

The interpreter checks bounds, initialisation and races of every access on the way.
"""

import itertools

import cases
import pytest
import torch
import twin

import ffkernels as ff

from . import emulate
from .arithmetic import DTYPES, PRECISIONS, TWINS
from .params import MATHS

pytestmark = pytest.mark.needs("nvcc")
slow = pytest.mark.slow
# rows, depth, cols; a tile is 64 by 64, a slab of the summed dimension 64 elements of 2 bytes or 32 of 4
SHAPES = [(1, 1, 1), (67, 131, 70)]
LONG = [(3, 500, 65), (64, 64, 128), (130, 33, 2), (2, 17, 200)]
OPTIONS = [
    {"activation": "gelu", "normalize": "rms", "goodness": "sum", "threshold": 0.7, "eps": 1e-2},
    {"activation": "silu", "normalize": "none", "temperature": 0.5},
    {"activation": "tanh", "goodness": "sum", "threshold": 0.3, "eps": 0.5},
    {"activation": "leaky_relu", "normalize": "rms", "strength": 2.5},
]
ONLY_OF = {
    "goodness": cases.STEPS, "threshold": cases.STEPS, "temperature": cases.STEPS,
    "strength": ("ff_label_forward", "ff_label_step_"),
}  # fmt: skip
OPTIMIZERS = [*cases.OPTIMIZERS, "hinton"]


def arguments(op, shape, math, *, peers=True, sqnorm=True, seed=0, **options):
    """Arguments of ``op`` in the types and precision of ``math``; plain SGD, so that an update shows the gradient."""
    rows, depth, cols = shape
    chosen = options.pop("optimizer", "sgd-plain")
    given = cases.arguments(
        op, rows=rows, depth=depth, cols=cols, seed=seed, optimizer="sgd-plain" if chosen == "hinton" else chosen,
        dtype=DTYPES.get(math, torch.float32), bias=options.pop("bias", True),
    )  # fmt: skip
    if chosen == "hinton":
        hinton = ff.HintonSGD(lr=0.5, momentum=0.8, weight_decay=0.1)
        given |= {"optimizer": hinton, "state": hinton.init_state(given["weight"], given["bias"])}
    options = {n: v for n, v in options.items() if op in ONLY_OF.get(n, cases.OPS)}
    if math in PRECISIONS:
        options["precision"] = PRECISIONS[math]
    g = torch.Generator().manual_seed(seed)
    # random: what cancels over the rows tells little about a sum
    given |= {n: torch.randn(len(given[n]), generator=g) / rows for n in ("coef", "row_term") if n in given}
    if not peers:
        given |= {n: None for n in ("row_term", "col_term") if n in given}
    if not sqnorm and "x_sqnorm" in given:
        given["x_sqnorm"] = None
    if "num_classes" in given:
        classes = options["num_classes"] = min(3, depth)
        for name in ("labels", "labels_pos", "labels_neg"):
            if name in given:
                size = (rows, classes) if name == "labels" else (rows,)
                options[name] = torch.randint(classes, size, generator=g)
    if op == "ff_network_step_":
        return given | {"layers": [ff.FFLayer(**vars(record) | options) for record in given["layers"]]}
    return given | options


def assert_exact(op, given, math, results):
    exact, rounded = twin.computed(op, given), twin.computed(op, given, TWINS[math])
    if "loss" in exact:
        # One number, which the twin may hit by luck: its error is that of its goodness, in which the loss has slope 1.
        layers = [vars(record) for record in given.get("layers", ())] or [given]
        divisors = [len(v["weight"]) if v.get("goodness", "mean") == "mean" else 1 for v in layers]
        error = (rounded["goodness"] - exact["goodness"]).abs().mean(-1) / torch.tensor(divisors)
        rounded["loss"] = exact["loss"] + error.reshape(exact["loss"].shape)
    for name in exact:
        if name.endswith("peer_mean"):  # a tenth of a mean of y, whose own rounding the twin's mean may cancel by luck
            usual = (exact["goodness"][int(name[0])].max() / len(exact[name])).sqrt()
            least = 0.1 * torch.finfo(DTYPES.get(math, torch.float32)).eps / 2 * usual
            rounded[name] = exact[name] + (rounded[name] - exact[name]).abs().max().clamp(min=least)
    twin.assert_as_exact(results, exact, rounded)


def check(op, given, math, **launch):
    results = emulate.run(op, given, **launch)
    assert_exact(op, given, math, results)
    return results


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(*(t[name].reshape(-1).view(torch.uint8) for t in (a, b))), name


each_math = pytest.mark.parametrize("math", MATHS)


@each_math
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("shape", [*SHAPES, *(pytest.param(s, marks=slow) for s in LONG)], ids=str)
def test_every_op(math, op, shape):
    check(op, arguments(op, shape, math), math)


@each_math
@pytest.mark.parametrize("op", cases.OPS)
@pytest.mark.parametrize("options", [pytest.param(o, marks=slow if i else ()) for i, o in enumerate(OPTIONS)], ids=str)
def test_options(math, op, options):
    check(op, arguments(op, (9, 40, 66), math, peers=False, sqnorm=False, **options), math)


@each_math
@pytest.mark.parametrize("op", ["ff_grad", "ff_step_", "ff_network_step_", "ff_label_step_"])
def test_without_bias(math, op):
    check(op, arguments(op, (9, 40, 66), math, peers=False, sqnorm=False, bias=False), math)


@pytest.mark.parametrize("math", ["f32", "bf16", pytest.param("fp16", marks=slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("first", [True, False])
def test_optimizers(math, optimizer, first):
    """The first step and a later one: moments and momentum start from 0, or from what is there."""
    given = arguments("ff_update_", (5, 18, 7), math, optimizer=optimizer)
    if not first:
        g = torch.Generator().manual_seed(1)
        for name, t in given["state"].items():
            t.copy_(torch.full((), 7.0) if name == "step" else torch.rand(t.shape, generator=g) * 0.01)
    step = given["state"]["step"].item()
    kept = given | {"state": cases.copied(given["state"])}
    results = check("ff_update_", kept, math)
    assert kept["state"]["step"] == step  # of a copy, which emulate.run updates
    assert results.keys() >= {"weight", "bias"}


@pytest.mark.parametrize("kind", [ff.SGD, ff.Adam])
def test_lr_and_step_are_read_from_tensors(kind):
    """As a captured CUDA graph would see them: changed in place between launches."""
    given = arguments("ff_update_", (5, 18, 7), "f32")
    optimizer = kind(lr=torch.tensor(0.25))
    given |= {"optimizer": optimizer, "state": optimizer.init_state(given["weight"], given["bias"])}
    by_number = given | {"optimizer": kind(lr=0.25)}
    same_bits(emulate.run("ff_update_", given), emulate.run("ff_update_", by_number))
    optimizer.lr.fill_(0.5)
    layer = cases.copied({n: given[n] for n in ("weight", "bias", "state")})
    for steps in (1, 2):
        emulate.run("ff_update_", given | layer, keep=True)
        assert layer["state"]["step"] == steps
    with ff.use_backend("reference"):
        twice = cases.copied({n: given[n] for n in ("weight", "bias", "state")})
        for _ in range(2):
            ff.ff_update_(**(given | twice))
    torch.testing.assert_close(layer["weight"], twice["weight"], rtol=1e-4, atol=1e-5)


@each_math
@pytest.mark.parametrize("splits", [2, pytest.param(4, marks=slow)])
@pytest.mark.parametrize("op", ["ff_update_", "ff_label_step_"])
def test_split_rows(math, op, splits):
    """Rows in parts that several blocks take, added in the parts' order."""
    given = arguments(op, (250, 40, 66), math)
    results = check(op, given, math, splits=splits)
    same_bits(results, emulate.run(op, given, splits=splits, seed=3, grid=5))


def test_more_splits_than_rows_is_as_exact():
    check("ff_update_", arguments("ff_update_", (70, 20, 10), "bf16"), "bf16", splits=2, grid=1)
    check("ff_update_", arguments("ff_update_", (130, 20, 10), "f32"), "f32", splits=3)


def network(math, widths, rows, *, labels=False, seed=0, **options):
    """A network of len(widths) - 1 layers with different options in each."""
    torch.manual_seed(seed)
    dtype = DTYPES.get(math, torch.float32)
    layers = []
    for i, (depth, cols) in enumerate(itertools.pairwise(widths)):
        weight, bias = torch.randn(cols, depth).to(dtype), torch.randn(cols).to(dtype) if i != 1 else None
        optimizer = [ff.SGD(lr=1.0), ff.Adam(lr=0.01), ff.SGD(lr=0.5, momentum=0.9)][i % 3]
        layers.append(ff.FFLayer(
            weight, bias, optimizer.init_state(weight, bias), optimizer, activation=["relu", "gelu"][i // 2],
            normalize=["l2", "rms", "none"][i % 3], threshold=1.0 + i, precision=PRECISIONS.get(math), **options,
        ))  # fmt: skip
    x = torch.randn(rows, widths[0]).to(dtype)
    if labels:
        positive, negative = torch.randint(5, (2, rows))
        return {"x": x, "sign": None, "layers": layers, "labels": (positive, negative), "num_classes": 5}
    return {"x": x, "sign": torch.randint(0, 2, (rows,)) * 2.0 - 1, "layers": layers}


@each_math
@pytest.mark.parametrize("widths", [(70, 33), (70, 33, 65), (20, 80, 6, 9), (12, 9, 70, 65, 3)], ids=str)
@pytest.mark.parametrize("labels", [False, True])
def test_networks(math, widths, labels):
    reports = []
    check("ff_network_step_", network(math, widths, 35, labels=labels), math, reports=reports)
    assert len(reports) == 1  # one launch


@pytest.mark.parametrize("math", ["bf16", "f32"])
def test_any_grid_gives_the_same_bits(math):
    """1 to 8 multiprocessors, other orders of the blocks, and a launch a stage."""
    given = network(math, (70, 130, 65, 9), 100, labels=True)
    first = emulate.run("ff_network_step_", given, splits=2, grid=1, sms=1)
    for sms in range(1, 9):
        same_bits(first, emulate.run("ff_network_step_", given, splits=2, sms=sms, seed=sms))
    same_bits(first, emulate.run("ff_network_step_", given, splits=2, multi_launch=True, sms=3, seed=6))


@pytest.mark.parametrize("op", ["ff_forward", "ff_grad", "ff_label_forward"])
@pytest.mark.parametrize("math", ["bf16", "f32_bf16"])
def test_strided_arguments(op, math):
    """Transposed, with a stride between columns, or starting at any element: the guarded loads."""
    given = arguments(op, (67, 70, 75), math)
    for name in ("x", "weight", "y"):
        if name in given:
            t = given[name]
            wide = torch.zeros(t.shape[1], t.shape[0], dtype=t.dtype)
            given[name] = wide.T.copy_(t)
    check(op, given, math)
    for offset in (1, 2, 4):
        for name in ("x", "weight", "y"):
            if name in given:
                t = given[name]
                room = torch.zeros(t.shape[0] * 80 + 8, dtype=t.dtype)
                given[name] = room.as_strided(t.shape, (80, 1), offset).copy_(t)
        check(op, given, math)


@pytest.mark.parametrize("op", ["ff_grad", "ff_update_"])
def test_no_rows(op):
    given = arguments(op, (1, 20, 70), "bf16", peers=False, optimizer="sgd-momentum")
    given |= {n: given[n][:0] for n in ("x", "y", "coef", "x_sqnorm")}
    results = emulate.run(op, given)
    exact = twin.computed(op, given)
    for name in results:
        assert torch.equal(results[name].double(), exact[name].double()), name


@each_math
@pytest.mark.parametrize("kind", ["nan", "inf", "zero row", "tiny row"])
def test_special_values(math, kind):
    """NaN and infinity reach what they must and nothing else; rows of zeros and near them stay finite."""
    given = arguments("ff_step_", (70, 40, 66), math, peers=False, sqnorm=False)
    given["x"][3] = {"nan": torch.nan, "inf": torch.inf, "zero row": 0.0, "tiny row": 1e-4}[kind]
    results = emulate.run("ff_step_", given)
    if kind in ("nan", "inf"):
        for name in ("y", "goodness"):
            assert results[name][3].isnan().all()
            rest = torch.arange(70) != 3
            assert results[name][rest].isfinite().all()
        assert results["loss"].isnan()
        assert results["weight"].isnan().all()
    else:
        assert all(t.isfinite().all() for t in results.values())
        assert_exact("ff_step_", given, math, results)


@pytest.mark.parametrize("math", ["bf16", "f32"])
def test_huge_goodness(math):
    """Goodness of 1e30: the loss is as large and stays finite, the coefficients are those of a step function."""
    given = arguments("ff_step_", (9, 40, 66), math, peers=False, sqnorm=False)
    given["weight"] *= 1e14
    results = check("ff_step_", given, math)
    assert results["goodness"].max() > 1e28
    assert results["loss"].isfinite()


def test_fp16_coefficients_may_be_tiny():
    """c y underflows in fp16, whose smallest number is 6e-8; the update scales it."""
    given = arguments("ff_grad", (70, 40, 66), "fp16", peers=False)
    small = given | {"coef": given["coef"] * 2**-30}
    results, plain = emulate.run("ff_grad", small), emulate.run("ff_grad", given)
    exact = twin.computed("ff_grad", small)
    error = (results["grad_weight"].double() - exact["grad_weight"]).abs().max()
    assert plain["grad_weight"].abs().max() > 1e-3
    assert error <= 2**-24  # the gradient's own type can hold no more


def test_training_follows_the_reference():
    """20 steps of a small network on labelled inputs."""
    torch.manual_seed(0)
    means = torch.randn(10, 54)
    given = network("f32", (64, 48, 40), 1, labels=True)
    layers = cases.copied(given["layers"])
    for record in layers:
        record.optimizer = ff.SGD(lr=2.0, momentum=0.9)
        record.state = record.optimizer.init_state(record.weight, record.bias)
    reference = cases.copied(layers)
    gaps = []
    for _ in range(20):
        positive = torch.randint(10, (64,))
        negative = (positive + torch.randint(1, 10, (64,))) % 10
        x = torch.cat([torch.zeros(64, 10), means[positive] + 0.3 * torch.randn(64, 54)], 1)
        step = {"x": x, "sign": None, "labels": (positive, negative), "num_classes": 10, "strength": 3.0}
        results = emulate.run("ff_network_step_", step | {"layers": layers}, keep=True)
        with ff.use_backend("reference"):
            goodness, loss = ff.ff_network_step_(layers=reference, **step)
        torch.testing.assert_close(results["goodness"], goodness, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(results["loss"], loss, rtol=1e-3, atol=1e-4)
        gaps.append((goodness[:, :64].mean(1) - goodness[:, 64:].mean(1)).min())
    assert gaps[-1] > gaps[0] + 0.1  # it has learnt something
    for mine, theirs in zip(layers, reference, strict=True):
        torch.testing.assert_close(mine.weight, theirs.weight, rtol=1e-3, atol=1e-3)
        assert mine.state["step"] == 20
