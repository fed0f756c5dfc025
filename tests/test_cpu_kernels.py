"""The CPU kernels on every instruction set of this machine against float64."""

import functools

import cases
import hypothesis.strategies as st
import independent
import pytest
import torch
import twin
from hypothesis import given as property_of

import ffkernels as ff
from ffkernels import _extension

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason=f"{_extension.unavailable()}")

ISAS = (_extension.cpu_isa() or {"available": []})["available"]
MODES = ("highest", "high", "medium", "bf16")  # a precision of float32, or bf16 tensors
TWINS = {"highest": twin.FLOAT32, "high": twin.HIGH, "medium": twin.MEDIUM, "bf16": twin.BF16}
slow = pytest.mark.slow
# Few rows, where threads split columns. Tiles are 4 to 32 rows and 12 to 48 columns, strips of rows 32 to 36.
SHAPES = [  # rows, depth, cols
    (1, 1, 1), (2, 15, 1000), (15, 16, 17), (16, 17, 15), (17, 31, 33), (31, 33, 16), (33, 2, 31), (33, 255, 31),
]  # fmt: skip
LONG = [(33, 255, 507), (255, 507, 31), (507, 16, 255), (1000, 1, 33), (2, 1000, 255), (1, 1000, 2)]
SHAPES += [pytest.param(shape, marks=slow) for shape in LONG]
# Many rows, where threads split them: several blocks of rows (2048), the last one small.
MANY_ROWS = [(2100, 33, 17), pytest.param((4100, 15, 2), marks=slow), pytest.param((1000, 507, 100), marks=slow)]
# Several blocks of the forward pass's columns (300 rows of W are over 1 MB), of the gradient's columns and of its depth
# (over 256): with a thread a row block, and with one thread, for which 520 rows are many.
WIDE = [(1030, 1000, 300), (520, 2100, 300)]
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


def arguments(op, shape, mode, options=(), *, classes=3, peers=True, seed=0, **more):
    """Arguments of ``op``; its optimizer is plain SGD, so that an update shows the gradient and nothing else."""
    rows, depth, cols = shape
    torch.manual_seed(seed)
    given = cases.arguments(
        op, rows=rows, depth=depth, cols=cols, seed=seed, optimizer=more.pop("optimizer", "sgd-plain"),
        dtype=torch.bfloat16 if mode == "bf16" else torch.float32, **more,
    )  # fmt: skip
    options = {n: v for n, v in dict(options).items() if op in ONLY_OF.get(n, cases.OPS)}
    if mode != "bf16":
        options["precision"] = mode
    # random: what cancels over the rows tells little about a sum
    given |= {n: torch.randn(len(given[n])) / rows for n in ("coef", "row_term") if n in given}
    if not peers:
        options |= {n: None for n in ("row_term", "col_term") if n in given}
    if "num_classes" in given:
        g = torch.Generator().manual_seed(seed)
        options["num_classes"] = classes = min(classes, depth)
        for name in ("labels", "labels_pos", "labels_neg"):
            if name in given:
                size = (rows, classes) if name == "labels" else (rows,)
                options[name] = torch.randint(classes, size, generator=g)
    if op == "ff_network_step_":
        options |= {} if peers else {"peer": 0.0, "peer_mean": None, "dropout": 0.0}
        return given | {"layers": [ff.FFLayer(**vars(record) | options) for record in given["layers"]]}
    return given | options


def check(op, given, mode):
    twin.assert_as_exact(twin.run(op, given), twin.computed(op, given), twin.computed(op, given, TWINS[mode]))


@functools.lru_cache(maxsize=1)
def expected(op, shape, mode):
    given = arguments(op, shape, mode)
    return given, twin.computed(op, given), twin.computed(op, given, TWINS[mode])


@pytest.fixture
def isa(request, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CPU_ISA", request.param)
    with ff.use_backend("cpu"):
        yield request.param


# the topmost decorator varies first, so that `expected` computes once for all
on_each_isa = pytest.mark.parametrize("isa", ISAS, indirect=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# ---------------------------------------------------------------------------------------------------------------------
# The twin itself, and what is forced


@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_the_formulas_are_autograds(op, options):
    options = {n: v for n, v in options.items() if n not in ("eps", "strength")}  # what independent.py leaves out
    given = arguments(op, (17, 31, 33), "highest", options, optimizer="sgd-nesterov")
    results, by_autograd = twin.computed(op, given), independent.computed_by_torch(op, given, torch.float64)
    assert results.keys() == by_autograd.keys()
    for name, true in by_autograd.items():
        given_sqnorm = 1e-6 if "x_sqnorm" in given else 1e-12  # it is float32, and ignored by independent.py
        independent.assert_close(results[name], true, given_sqnorm, name)


def test_each_instruction_set_computes_in_its_own_way(monkeypatch):
    """Forcing one has an effect: sums of products come out differently rounded."""
    given = arguments("ff_forward", (33, 1000, 31), "medium", {"normalize": "none"})
    results = {}
    for name in ISAS:
        monkeypatch.setenv("FFKERNELS_CPU_ISA", name)
        assert torch.ops.ffkernels.cpu_isa().split()[1] == name
        results[name] = twin.run("ff_forward", given)["y"]
    for i, a in enumerate(ISAS):
        assert not any(torch.equal(results[a], results[b]) for b in ISAS[:i]), a


def test_an_instruction_set_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("FFKERNELS_CPU_ISA", "sse9")
    with pytest.raises(RuntimeError, match=f"FFKERNELS_CPU_ISA must be one of {','.join(ISAS)}.*sse9"):
        twin.run("ff_forward", arguments("ff_forward", (2, 3, 4), "highest"))


@on_each_isa
@pytest.mark.parametrize("op", cases.OPS)
def test_a_precision_that_brings_nothing_is_the_one_above(isa, op):
    """Without bf16 products all three are float32; "high" needs tiles."""
    same = {"amx": (), "avx512": ("high",)}.get(isa, ("high", "medium"))
    highest = twin.run(op, arguments(op, (33, 255, 31), "highest"))
    for precision in ("high", "medium"):
        results = twin.run(op, arguments(op, (33, 255, 31), precision))
        assert (precision in same) == all(torch.equal(results[n], highest[n]) for n in highest), precision


# ---------------------------------------------------------------------------------------------------------------------
# Shapes


@on_each_isa
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", cases.OPS)
def test_shapes(isa, op, mode, shape):
    given, exact, rounded = expected(op, shape, mode)
    twin.assert_as_exact(twin.run(op, given), exact, rounded)


@on_each_isa
@pytest.mark.parametrize("shape", MANY_ROWS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", cases.OPS)
def test_blocks_of_rows(isa, op, mode, shape):
    given, exact, rounded = expected(op, shape, mode)
    twin.assert_as_exact(twin.run(op, given), exact, rounded)


@slow
@on_each_isa
@pytest.mark.parametrize("shape", WIDE, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["ff_forward", "ff_grad", "ff_step_", "ff_label_step_"])
def test_blocks_of_columns(isa, op, mode, shape, threads):
    threads(1 if shape[0] < 1024 else 2)
    given, exact, rounded = expected(op, shape, mode)
    twin.assert_as_exact(twin.run(op, given), exact, rounded)


@on_each_isa
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 2**-7), (torch.float32, 2**-20)])
@pytest.mark.parametrize("depth", [1, 3])
def test_rows_of_y_longer_than_a_strip_of_x(isa, depth, dtype, allowed):
    """A row of y that must be converted or gathered has a place of its own, however few columns x has."""
    rows, cols = 100, 300
    x, y = torch.randn(rows, depth).to(dtype), torch.randn(cols, rows).to(dtype).T
    coef, weight = torch.randn(rows), torch.zeros(cols, depth, dtype=dtype)
    grad, _ = ff.ff_grad(x, y, coef, weight, normalize="none", precision="highest")
    exact = (2 * coef[:, None] * y).double().T @ x.double()
    assert (grad - exact).abs().max() <= allowed * exact.abs().max()


# ---------------------------------------------------------------------------------------------------------------------
# Options


@on_each_isa
@pytest.mark.parametrize(("bias", "peers"), [(True, True), (False, False)])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["activation"])
@pytest.mark.parametrize("mode", ["highest", "bf16"])
@pytest.mark.parametrize("op", cases.OPS)
def test_options(isa, op, mode, options, bias, peers):
    check(op, arguments(op, (37, 45, 53), mode, options, bias=bias, peers=peers), mode)


@on_each_isa
@pytest.mark.parametrize("classes", [1, 2, 10])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("op", ["ff_label_forward", "ff_label_step_"])
def test_labels(isa, op, mode, classes):
    shape = (40, 15, 33) if op == "ff_label_forward" else (40, 300, 270)
    check(op, arguments(op, shape, mode, {"strength": -1.5}, classes=classes), mode)


@on_each_isa
@pytest.mark.parametrize("mode", ["highest", "bf16"])
def test_more_classes_than_the_gradient_has_columns_in_a_block(isa, mode):
    check("ff_label_step_", arguments("ff_label_step_", (9, 310, 19), mode, classes=300, peers=False), mode)


@on_each_isa
@pytest.mark.parametrize("op", ["ff_label_forward", "ff_label_step_", "ff_network_step_"])
def test_a_strength_that_is_no_bf16_is_rounded_as_x_is(isa, op):
    """0.3 is 0.30078125 there, as `overlay` writes it."""

    def run(strength):
        given = arguments(op, (9, 15, 19), "bf16")
        if op == "ff_network_step_":
            labels = (torch.arange(9) % 3, (torch.arange(9) + 1) % 3)
            given |= {"sign": None, "x_sqnorm": None, "labels": labels, "num_classes": 3}
        return twin.run(op, given | {"strength": strength})

    rounded, exact = run(0.3), run(0.30078125)
    assert all(torch.equal(t, exact[name]) for name, t in rounded.items())


@on_each_isa
@pytest.mark.parametrize("mode", MODES)
def test_labelled_network(isa, mode):
    given = arguments("ff_network_step_", (40, 30, 50), mode)
    labels = (torch.arange(40) % 10, (torch.arange(40) + 3) % 10)
    given |= {"sign": None, "x_sqnorm": None, "labels": labels, "num_classes": 10, "strength": 2.0}
    check("ff_network_step_", given, mode)


@on_each_isa
@pytest.mark.parametrize("mode", MODES)
def test_p_of_relu_is_y(isa, mode):
    """The public function does not ask for it; the op may be."""
    x, _, weight, bias = cases.layer(33, 31, 50, dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    precision = "highest" if mode == "bf16" else mode
    y, _, p = torch.ops.ffkernels.ff_forward.cpu(x, weight, bias, None, "l2", 1e-4, "relu", precision, True)
    assert torch.equal(p, y)


@on_each_isa
@pytest.mark.parametrize("cols", [1, 5, 17, 33])
def test_an_infinite_scale_ends_with_the_columns(isa, cols):
    """Beside them a vector holds zeros: times infinity, they must not enter the goodness."""
    options = {"x_sqnorm": torch.zeros(3), "eps": 0.0, "precision": "highest"}
    y, goodness = ff.ff_forward(torch.ones(3, 4), -torch.ones(cols, 4), **options)
    assert torch.equal(y, torch.zeros(3, cols))
    assert torch.equal(goodness, torch.zeros(3))


# ---------------------------------------------------------------------------------------------------------------------
# Precision "high" beside float32


@on_each_isa
@pytest.mark.parametrize("op", ["ff_forward", "ff_grad"])
def test_high_beside_float32(isa, op):
    """Root mean square of the error. Two bf16 hold 16 bits: three products are off by 2^-18 or so, however many rows
    and columns are summed up, where float32's error is 2^-21 to 2^-22. Without tiles "high" is float32."""
    given = arguments(op, (500, 500, 100), "high", {"normalize": "none"}, peers=False)
    name = "y" if op == "ff_forward" else "grad_weight"
    result = twin.run(op, given)[name]
    exact, by_torch = (twin.computed(op, given, how)[name] for how in (twin.EXACT, twin.FLOAT32))
    error, of_torch, scale = (t.square().mean().sqrt() for t in (result - exact, by_torch - exact, exact))
    assert error <= (2**-17 * scale if isa == "amx" else 4 * of_torch)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers, on given gradients


@on_each_isa
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("mode", ["highest", "bf16"])
def test_optimizers(isa, mode, optimizer, steps):
    """The identity as x and coefficients of 1/2 make the gradient y itself: what is compared is the optimizer."""
    dtype = torch.bfloat16 if mode == "bf16" else torch.float32
    cols, depth = 70, 45
    _, _, weight, bias = cases.layer(1, depth, cols, dtype=dtype)
    x, optimizer = torch.eye(depth).to(dtype), cases.OPTIMIZERS[optimizer]
    state = optimizer.init_state(weight, bias)
    given = {"x": x, "weight": weight, "bias": bias, "optimizer": optimizer, "state": state, "normalize": "none"}
    given |= {"coef": torch.full((depth,), 0.5)}
    for step in range(steps):
        given["y"] = (torch.randn(depth, cols) * 10.0 ** torch.randint(-4, 3, (depth, cols))).to(dtype)
        exact, rounded = twin.computed("ff_update_", given), twin.computed("ff_update_", given, TWINS[mode])
        results = twin.run("ff_update_", given)
        twin.assert_as_exact(results, exact, rounded)
        ff.ff_update_(**given, precision="highest")
        assert given["state"]["step"] == step + 1


# ---------------------------------------------------------------------------------------------------------------------
# Any shape and options


@st.composite
def calls(draw, op):
    options = {
        "normalize": draw(st.sampled_from(independent.NORMALIZATIONS)),
        "activation": draw(st.sampled_from(list(independent.ACTIVATIONS))),
        "eps": draw(st.sampled_from([1e-4, 0.5])),
        "goodness": draw(st.sampled_from(independent.REDUCTIONS)),
        "threshold": draw(st.sampled_from([0.0, 0.5, 3.0])),
        "temperature": draw(st.sampled_from([0.5, 1.0, 2.0])),
        "strength": draw(st.sampled_from([1.0, -0.5, 3.0])),
    }
    shape = (draw(st.integers(1, 70)), draw(st.integers(1, 100)), draw(st.integers(1, 300)))
    mode = draw(st.sampled_from(MODES))
    more = {"classes": draw(st.integers(1, 12)), "bias": draw(st.booleans()), "peers": draw(st.booleans())}
    return mode, arguments(op, shape, mode, options, seed=draw(st.integers(0, 1000)), **more)


@on_each_isa
@pytest.mark.parametrize("op", cases.OPS)
def test_any_call(isa, op):
    @property_of(calls(op))
    def holds(call):
        mode, given = call
        check(op, given, mode)

    holds()
