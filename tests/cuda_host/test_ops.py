"""The .cuda ops, from their flat arguments to their results: checks, plan, argument bytes and compiled kernels."""

import itertools

import cases
import pytest
import test_apply_gradient
import torch
import twin
from cuda_kernels.arithmetic import TWINS

import ffkernels as ff
from ffkernels import choice, cost, ops
from ffkernels.triton.plan import Layer

from .gpu import Gpu, needs_kernels, running

pytestmark = needs_kernels
slow = pytest.mark.slow


MODES = {  # precision of float32 tensors or their dtype: that dtype, and the same computation by torch
    "highest": (torch.float32, TWINS["f32"]),
    "high": (torch.float32, TWINS["tf32"]),
    "medium": (torch.float32, TWINS["f32_bf16"]),
    "bf16": (torch.bfloat16, TWINS["bf16"]),
    "fp16": (torch.float16, TWINS["fp16"]),
}


def arguments(op, shape, mode, *, optimizer="sgd-plain", classes=3, **options):
    """Plain SGD shows the gradient and nothing else; Adam would show the sign of its rounding where it is near 0."""
    rows, depth, cols = shape
    given = cases.arguments(op, rows=rows, depth=depth, cols=cols, optimizer=optimizer, dtype=MODES[mode][0])
    given |= {n: torch.randn(len(given[n])) / rows for n in ("coef", "row_term") if n in given}
    if "precision" not in options and MODES[mode][0] == torch.float32:
        options["precision"] = mode
    if "num_classes" in given:
        given["num_classes"] = classes
    if op == "ff_network_step_":
        return given | {"layers": [ff.FFLayer(**vars(layer) | options) for layer in given["layers"]]}
    return given | options


def check(op, given, mode="highest", gpu=None):
    """Runs the public function on the interpreter and compares; what was launched."""
    with running(gpu) as launched:
        results = twin.run(op, given)
    twin.assert_as_exact(results, twin.computed(op, given), twin.computed(op, given, MODES[mode][1]))
    return [] if launched[0] is None else launched[0].plan["launches"]


# ---------------------------------------------------------------------------------------------------------------------
# Every op and arithmetic


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", cases.OPS)
def test_ops(op, mode):
    launches = check(op, arguments(op, (70, 45, 83), mode), mode)
    assert len(launches) == 1
    assert launches[0]["cooperative"] == (op not in ("ff_forward", "ff_label_forward"))


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "gelu", "normalize": "rms", "eps": 1e-2},
        {"activation": "silu", "normalize": "none"},
        {"activation": "tanh", "eps": 0.5},
        {"activation": "leaky_relu", "normalize": "rms"},
    ],
    ids=lambda o: o["activation"],
)
@pytest.mark.parametrize("op", cases.OPS)
def test_options(op, options):
    if op.endswith("step_"):
        options = options | {"goodness": "sum", "threshold": 0.7, "temperature": 0.5}
    check(op, arguments(op, (7, 20, 33), "highest", **options))


@pytest.mark.parametrize("op", cases.OPS)
def test_nothing_optional(op):
    """No bias, no peers, no known norms."""
    given = cases.arguments(op, rows=9, depth=20, cols=17, bias=False, optimizer="sgd")
    check(op, given | {n: None for n in ("x_sqnorm", "row_term", "col_term") if n in given})


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_optimizers(optimizer):
    given = arguments("ff_update_", (9, 20, 17), "highest", optimizer=optimizer)
    for _ in range(2):  # the first step of a momentum buffer is special
        check("ff_update_", given)
        with running():
            ff.ff_update_(**given)
        assert given["state"]["step"].item() >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (66, 68), (129, 255)], ids=str)
def test_the_optimizer_alone(shape, dtype):
    """The optimizer's step alone: one ordinary launch, near the least memory traffic."""
    with running(Gpu(multiprocessors=3)) as launched:
        test_apply_gradient.check(cases.Target("cuda", "cpu", dtype), shape, "adam", bias=True, steps=1)
    (launch,) = launched[0].plan["launches"]
    assert not launch["cooperative"]
    least = shape[0] * (shape[1] + 1) * (4 + 2 * dtype.itemsize + 4 * 4)  # gradient, weight and two moments
    assert launched[0].reports[0].l2_unique_bytes <= 1.02 * least + 1024  # whole sectors, and the step count


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_the_optimizer_alone_over_steps(optimizer):
    with running():
        test_apply_gradient.check(cases.Target("cuda", "cpu", torch.float32), (5, 70), optimizer, bias=True, steps=2)


def test_a_given_gradient_of_any_alignment():
    """Gradients are parts of a larger buffer where processes add them up."""
    given = test_apply_gradient.arguments(cases.Target("cuda", "cpu", torch.float32), (6, 8), ff.SGD(lr=1.0))
    rows = torch.cat([torch.zeros(1), given["grad_weight"].flatten()])
    given["grad_weight"] = rows[1:].view(6, 8)
    expected = given["weight"] - given["grad_weight"]
    with running():
        ops.apply_gradient_(**given)
    assert torch.equal(given["weight"], expected)


@pytest.mark.parametrize("op", cases.IN_PLACE)
def test_learning_rate_in_a_tensor(op):
    given = arguments(op, (5, 8, 6), "highest", optimizer="sgd")
    rate = torch.tensor(0.25)
    by_tensor, by_number = ff.SGD(lr=rate), ff.SGD(lr=0.25)
    results = []
    for optimizer in (by_tensor, by_number):
        own = cases.copied(given)
        if op == "ff_network_step_":
            own["layers"] = [ff.FFLayer(**vars(r) | {"optimizer": optimizer}) for r in own["layers"]]
        else:
            own["optimizer"] = optimizer
        with running():
            results.append(twin.run(op, own))
    assert all(torch.equal(results[0][n], results[1][n]) for n in results[0])


@pytest.mark.parametrize("op", cases.OPS)
def test_strided_arguments(op):
    """Every tensor that may be strided is: columns apart, transposed, or every other element of a vector."""
    given = arguments(op, (10, 12, 9), "highest", optimizer="sgd-plain")
    free = {n: t for n, t in given.items() if isinstance(t, torch.Tensor) and t.numel() > 1}
    if op in cases.IN_PLACE:
        free = {n: t for n, t in free.items() if n not in ("weight", "bias")}
    for name, t in free.items():
        given[name] = t.T.contiguous().T if t.dim() == 2 else torch.stack([t, t], 1)[:, 0]
        assert not given[name].is_contiguous()
    check(op, given)


@pytest.mark.parametrize("op", ["ff_forward", "ff_grad", "ff_update_", "ff_label_forward"])
def test_no_rows(op):
    given = arguments(op, (0, 12, 9), "highest")
    check(op, given)


def test_labels_out_of_range_do_no_harm():
    """On a GPU nobody looks at their values: what they give is undefined, but no access leaves a tensor."""
    given = arguments("ff_label_step_", (10, 12, 9), "highest")
    with running():
        ff.ff_label_step_(**given | {"labels_pos": torch.full((10,), 1 << 40), "labels_neg": torch.full((10,), -1)})


# ---------------------------------------------------------------------------------------------------------------------
# Devices: how many blocks there are and in which order they start changes no bit


@slow
@pytest.mark.parametrize("mode", ["highest", "bf16"])
@pytest.mark.parametrize("op", ["ff_step_", "ff_network_step_", "ff_label_step_"])
def test_the_device_changes_no_bit(op, mode):
    given = arguments(op, (130, 40, 70), mode)
    plans, results = [], []
    gpus = [
        Gpu(multiprocessors=1, resident=(1,) * 5),
        Gpu(multiprocessors=3),
        Gpu(multiprocessors=8, seed=5),
        Gpu(capability=90, multiprocessors=2),
        Gpu(cooperative=False),
    ]
    for gpu in gpus:
        with running(gpu) as launched:
            results.append(twin.run(op, given))
        plans.append(launched[0].plan["launches"])
    assert all(torch.equal(r[n], results[0][n]) for r in results for n in r)
    assert [len(p) for p in plans] == [1, 1, 1, 1, 2 + (op == "ff_network_step_")]
    assert plans[0][0]["grid"] == 1 < plans[2][0]["grid"]


@pytest.mark.parametrize("mode", ["highest", "fp16"])
@pytest.mark.parametrize("labelled", [False, True])
def test_split_updates(mode, labelled):
    """Few weight tiles and many rows: the rows of a weight tile are shared out."""
    given = network([40, 30, 20], 330, mode, labelled=labelled)
    gpu = Gpu(multiprocessors=8)
    launches = check("ff_network_step_", given, mode, gpu)
    assert len(launches) == 1
    assert launches[0]["grid"] > 6  # without splits no stage has more work items than 6 + 1 tiles


# ---------------------------------------------------------------------------------------------------------------------
# Networks


def network(widths, rows, mode, *, labelled=False, optimizer="sgd-plain", seed=0, **options):
    g = torch.Generator().manual_seed(seed)
    dtype = MODES[mode][0]
    if dtype == torch.float32:
        options.setdefault("precision", mode)

    def random(*shape):
        return torch.randn(*shape, generator=g).to(dtype)

    layers = []
    for depth, cols in itertools.pairwise(widths):
        weight, bias = random(cols, depth), random(cols)
        chosen = cases.OPTIMIZERS[optimizer]
        layers.append(ff.FFLayer(weight, bias, chosen.init_state(weight, bias), chosen, **options))
    sign = torch.randint(0, 2, (rows,), generator=g) * 2.0 - 1
    given = {"x": random(rows, widths[0]), "sign": sign, "layers": layers}
    if labelled:
        positive = torch.randint(5, (rows,), generator=g)
        given |= {"sign": None, "labels": (positive, (positive + 1) % 5), "num_classes": 5, "strength": 1.5}
    return given


@pytest.mark.parametrize("labelled", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_networks(layers, labelled):
    given = network([40, 66, 30, 70, 20][: layers + 1], 70, "bf16", labelled=labelled, optimizer="sgd-momentum")
    launches = check("ff_network_step_", given, "bf16")
    assert len(launches) == 1


@pytest.mark.parametrize("tensors", [False, True])
def test_every_layer_has_its_own_optimizer(tensors):
    given = network([12, 9, 8, 7], 20, "highest")
    for layer, kind, lr in zip(given["layers"], (ff.SGD, ff.AdamW, ff.HintonSGD), (0.5, 0.02, 0.25), strict=True):
        layer.optimizer = kind(lr=torch.tensor(lr) if tensors else lr)
        layer.state = layer.optimizer.init_state(layer.weight, layer.bias)
    check("ff_network_step_", given)


@slow
@pytest.mark.parametrize("labelled", [False, True])
def test_deep_network(labelled):
    """More layers than a launch takes."""
    given = network([12] + [8] * 17, 6, "highest", labelled=labelled, activation="gelu")
    launches = check("ff_network_step_", given)
    assert len(launches) == 3


def test_layers_of_different_precision():
    given = network([20, 12, 16, 8], 30, "highest", labelled=True)
    for layer, precision in zip(given["layers"], ("highest", "medium", "medium"), strict=True):
        layer.precision = precision
    launches = check("ff_network_step_", given, "medium")
    assert [launch["kernel"] for launch in launches] == ["ff_stages_f32", "ff_stages_f32_bf16"]


@slow
def test_twenty_steps_of_a_digits_network_follow_the_reference():
    """Real images, a labelled first layer, Adam: weights stay as close to float64's as torch's float32 does."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x, labels = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    g = torch.Generator().manual_seed(1)
    wrong = (labels + torch.randint(1, 10, labels.shape, generator=g)) % 10
    runs = {}
    for name in ("kernel", "reference", "exact"):
        given = network([64, 40, 32], 1, "highest", labelled=True, optimizer="adam")
        given |= {"num_classes": 10, "strength": 1.0}
        if name == "exact":
            for layer in given["layers"]:
                layer.weight, layer.bias = layer.weight.double(), layer.bias.double()
                layer.state = layer.optimizer.init_state(layer.weight, layer.bias)
        losses = []
        for i in range(20):
            batch = slice(50 * i, 50 * (i + 1))
            rows = x[batch].to(given["layers"][0].weight.dtype)
            step = given | {"x": rows, "labels": (labels[batch], wrong[batch])}
            if name == "kernel":
                with running():
                    losses.append(ff.ff_network_step_(**step)[1])
            else:
                with ff.use_backend("reference"):
                    losses.append(ff.ff_network_step_(**step)[1])
        runs[name] = [torch.stack(losses), *(t for layer in given["layers"] for t in (layer.weight, layer.bias))]
    assert runs["exact"][0][-1].sum() < runs["exact"][0][0].sum()  # it learns
    for kernel, reference, exact in zip(*runs.values(), strict=True):
        allowed = 2 * (reference - exact).abs().max() + 1e-5 * exact.abs().max()
        assert (kernel - exact).abs().max() <= allowed


@slow
def test_a_module_trains():
    """FFNet on the kernels: the public road, module to launch."""
    torch.manual_seed(0)
    net = ff.FFNet.from_sizes([20, 16, 12], num_classes=4)
    with running() as launched:
        net.fit(torch.rand(32, 20), torch.arange(32) % 4, epochs=2, batch_size=16, progress=False)
        predicted = net.predict(torch.rand(8, 20))
    assert predicted.shape == (8,)
    steps = [done.plan for done in launched if done.plan["call"].startswith("ff_network_step_")]
    assert len(steps) == 4
    assert all(len(plan["launches"]) == 1 for plan in steps)


# ---------------------------------------------------------------------------------------------------------------------
# Memory traffic, counted


@slow
@pytest.mark.parametrize(
    ("rows", "widths"), [(64, (784, 500)), (64, (784, 500, 500)), (250, (784, 1000, 1000, 1000))], ids=str
)
def test_bytes_are_those_of_the_cost_model(rows, widths):
    """Distinct bytes of each stage, with a launch for each so that they are counted apart; no bank is waited for."""
    given = network(list(widths), rows, "bf16", optimizer="adam")
    with running(Gpu(multiprocessors=4, cooperative=False)) as launched:
        twin.run("ff_network_step_", given)
    reports = launched[0].reports
    layers = [Layer(rows, depth, cols) for depth, cols in itertools.pairwise(widths)]
    stages = choice.cuda_launches("ff_network_step_", layers)
    assert len(reports) == len(stages)
    for report, stage in zip(reports, stages, strict=True):
        assert abs(report.l2_unique_bytes - stage.bytes) / stage.bytes < 0.02
        assert report.tensor_flops == stage.flops
        assert [c for c in report.conflicts() if c.opcode.startswith(("ldmatrix", "cp.async"))] == []
    least = cost.minimum("ff_network_step_", [cost.Layer(la.rows, la.depth, la.cols) for la in layers])
    assert sum(r.l2_unique_bytes for r in reports) <= 1.15 * least.bytes
