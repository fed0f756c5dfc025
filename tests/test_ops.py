"""Every op on every backend that can run it here: accuracy against float64, odd inputs, and what is left alone."""

import math

import cases
import independent
import pytest
import torch

import ffkernels as ff

SHAPES = [(1, 3, 1), (2, 8, 5), (33, 123, 110), (64, 255, 129)]  # rows, depth, cols
SHAPES.append(pytest.param((255, 507, 123), marks=pytest.mark.slow))
OPTIONS = [
    {},
    {"normalize": "rms", "activation": "gelu", "goodness": "sum"},
    {"normalize": "none", "activation": "silu", "temperature": 0.5},
    {"activation": "tanh", "threshold": 0.3, "goodness": "sum"},
    {"normalize": "rms", "activation": "leaky_relu"},
]
LOSS_OPTIONS = ("goodness", "threshold", "temperature")


def arguments(op, target, shape, options=None, **more):
    rows, depth, cols = shape
    given = cases.arguments(op, rows=rows, depth=depth, cols=cols, dtype=target.dtype, device=target.device, **more)
    options = {n: v for n, v in (options or {}).items() if op.endswith("step_") or n not in LOSS_OPTIONS}
    if op == "ff_network_step_":
        given["layers"] = [ff.FFLayer(**{**vars(record), **options}) for record in given["layers"]]
        return given
    return given | options


def run(op, given):
    """What the op gave and what it wrote, by the names of `independent.computed_by_torch`; the rest is unchanged."""
    given = cases.copied(given)
    before = {name: t.clone() for name, t in cases.tensors(given).items()}
    forward = op in ("ff_forward", "ff_label_forward")
    values = cases.call(op, given | {"return_p": True} if forward else given)
    names = {
        "ff_forward": ("y", "goodness", "p"), "ff_label_forward": ("y", "goodness", "p"),
        "ff_grad": ("grad_weight", "grad_bias"), "ff_update_": (), "ff_network_step_": ("goodness", "loss"),
    }.get(op, ("y", "goodness", "loss"))  # fmt: skip
    results = {name: t for name, t in zip(names, values or (), strict=True) if t is not None}
    for name, t in cases.tensors(given).items():
        if op in cases.IN_PLACE and name.startswith(("weight", "bias", "state.", "layers.")):
            results[name.replace("layers.", "").replace("state.", "")] = t
        else:
            assert torch.equal(t.nan_to_num(), before[name].nan_to_num()), f"{name} changed"
    return results


def check(op, given, dtype):
    results = run(op, given)
    exact = independent.computed_by_torch(op, given, torch.float64)
    rounded = independent.computed_by_torch(op, given, dtype)
    for name, true in exact.items():
        independent.assert_as_exact_as_torch(results[name], true, rounded[name], name)
    return results


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@cases.each_op_on_backends()
def test_shapes(op, target, shape):
    results = check(op, arguments(op, target, shape, optimizer="sgd-momentum"), target.dtype)
    for name, t in results.items():
        kept = name.split(".")[-1] in ("y", "p", "weight", "bias", "grad_weight", "grad_bias")
        assert t.dtype == (target.dtype if kept else cases.acc(target.dtype)), name
        assert t.is_contiguous(), name
        assert t.device.type == target.device


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(map(str, options.values())) or "defaults")
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@cases.each_op_on_backends(dtypes=(torch.float32,))
def test_options(op, target, with_bias, options):
    given = arguments(op, target, (33, 23, 18), options, optimizer="sgd-damped-decay", bias=with_bias)
    check(op, given, target.dtype)


@pytest.mark.parametrize("name", ["adam", "adam-decay", "adamw"])
@cases.each_op_on_backends(ops=cases.IN_PLACE)
def test_adam(op, target, name):
    """The moments hold the gradient. The step is taken from the op's own: for a gradient near 0 its sign is chance."""
    optimizer = cases.OPTIMIZERS[name]
    given = arguments(op, target, (33, 23, 18), optimizer=name)
    results = run(op, given)
    exact = independent.computed_by_torch(op, given, torch.float64)
    rounded = independent.computed_by_torch(op, given, target.dtype)
    start = {n.replace("layers.", "").replace("state.", ""): t for n, t in cases.tensors(given).items()}
    (beta1, beta2), moments = optimizer.betas, [n for n in results if "exp_avg" in n]
    assert len(moments) == (8 if op == "ff_network_step_" else 4)
    for n in moments:
        if name != "adam-decay" or target.dtype != torch.float16:  # there torch's own decay underflows
            independent.assert_as_exact_as_torch(results[n], exact[n], rounded[n], n)
        if "exp_avg_sq" in n:
            continue
        param = n.replace("exp_avg_bias", "bias").replace("exp_avg", "weight")
        mean = results[n].double() / (1 - beta1)
        square = results[n.replace("exp_avg", "exp_avg_sq")].double() / (1 - beta2)
        decay = optimizer.lr * optimizer.weight_decay if name == "adamw" else 0
        expected = start[param].double() * (1 - decay) - optimizer.lr * mean / (square.sqrt() + optimizer.eps)
        rounding = torch.finfo(target.dtype).eps * expected.abs() + 1e-5 * optimizer.lr
        assert ((results[param].double() - expected).abs() <= rounding).all(), param


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", cases.OPTIMIZERS)
@cases.on_backends("ff_update_", dtypes=(torch.float32,))
def test_every_optimizer_over_steps(target, name, steps):
    given = arguments("ff_update_", target, (9, 23, 18), optimizer=name)
    optimizer, exact = given["optimizer"], cases.copied(given)
    for n, t in exact.items():
        exact[n] = t.double() if isinstance(t, torch.Tensor) else t
    twin = independent.torch_optimizer(optimizer, [exact["weight"], exact["bias"]])
    for _ in range(steps):
        x = independent.normalized(exact["x"])
        dz = 2 * exact["coef"][:, None] * exact["y"] + exact["row_term"][:, None] * exact["col_term"]
        exact["weight"].grad, exact["bias"].grad = dz.T @ x, dz.sum(0)
        twin.step()
        ff.ff_update_(**given)
    independent.assert_close(given["weight"], exact["weight"], 1e-5, "weight")
    independent.assert_close(given["bias"], exact["bias"], 1e-5, "bias")
    assert given["state"]["step"] == steps


@cases.each_op_on_backends()
def test_the_same_call_gives_the_same_bits(op, target):
    given = arguments(op, target, (33, 123, 110))
    first, second = run(op, given), run(op, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---------------------------------------------------------------------------------------------------------------------
# Odd inputs


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 1), (7, 1, 4), (1, 5, 6), (6, 4, 1)], ids=str)
@cases.each_op_on_backends(ops=[op for op in cases.OPS if "label" not in op], dtypes=(torch.float32,))
def test_one_row_one_column(op, target, shape):
    check(op, arguments(op, target, shape, optimizer="sgd"), target.dtype)


@pytest.mark.parametrize("candidates", [0, 2])
@cases.each_op_on_backends(ops=("ff_forward", "ff_grad", "ff_label_forward"))
def test_no_rows(op, target, candidates):
    rows = 4 if candidates == 0 and op == "ff_label_forward" else 0
    given = arguments(op, target, (rows, 8, 5))
    if op == "ff_label_forward":
        given["labels"] = given["labels"][:, :candidates]
    results = run(op, given)
    if op == "ff_grad":
        assert not results["grad_weight"].any()
        assert not results["grad_bias"].any()
        assert results["grad_weight"].shape == (5, 8)
    else:
        assert [tuple(results[n].shape) for n in ("y", "goodness", "p")] == [(0, 5), (0,), (0, 5)]


@cases.on_backends("ff_update_")
def test_an_update_without_rows_only_decays(target):
    given = arguments("ff_update_", target, (0, 8, 5), optimizer="sgd")
    weight = given["weight"].clone()
    results = run("ff_update_", given)
    assert torch.equal(results["weight"], weight)
    assert results["step"] == 1


LAYOUTS = {
    "transposed": lambda t: t.T.contiguous().T,
    "every second column": lambda t: torch.stack([t, -t], -1).flatten(1)[:, ::2],
    "every second row": lambda t: torch.stack([t, -t], 1).flatten(0, 1)[::2],
    "from an odd address": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "one row expanded": lambda t: t[:1].expand(t.shape),
    "one column expanded": lambda t: t[:, :1].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@cases.each_op_on_backends(dtypes=(torch.float32, torch.bfloat16))
def test_layouts_of_what_is_only_read(op, target, layout):
    given = arguments(op, target, (6, 8, 5), optimizer="sgd-momentum")
    names = ["x"] + ["y"] * ("y" in given) + ["weight"] * (op not in cases.IN_PLACE)
    strided = given | {name: LAYOUTS[layout](given[name]) for name in names}
    assert not all(strided[name].is_contiguous() for name in names) or layout == "from an odd address"
    plain = strided | {name: strided[name].contiguous() for name in names}
    before = {name: strided[name].clone() for name in names}
    if op not in cases.IN_PLACE:
        results = dict(enumerate(cases.call(op, strided)))
        expected = dict(enumerate(cases.call(op, plain)))
    else:
        expected = run(op, plain)
        written = {n: cases.copied(v) for n, v in strided.items() if n not in names}  # copies would lose the strides
        cases.call(op, strided | written)
        state = cases.tensors(written)
        results = {n.replace("layers.", "").replace("state.", ""): t for n, t in state.items()}
        expected = {n: t for n, t in expected.items() if n in results}
        results = {n: results[n] for n in expected}
        assert expected
    for name in expected:
        assert results[name].is_contiguous()
        independent.assert_close(results[name], expected[name], 1e-6 if target.dtype == torch.float32 else 1e-2, name)
    for name in names:
        assert torch.equal(strided[name], before[name])


@pytest.mark.parametrize("layout", ["strided", "expanded"])
@cases.on_backends("ff_step_", dtypes=(torch.float32,))
def test_layouts_of_vectors(target, layout):
    given = arguments("ff_step_", target, (6, 8, 5), {"normalize": "rms"})
    vectors = ("sign", "x_sqnorm", "row_term", "col_term")

    def change(t):
        return torch.stack([t, -t], -1).flatten()[::2] if layout == "strided" else t[:1].expand(len(t))

    strided = {name: change(given[name]) for name in vectors}
    plain = run("ff_step_", given | {name: t.contiguous() for name, t in strided.items()})
    fresh = cases.copied(given) | strided
    ff.ff_step_(**fresh)
    independent.assert_close(fresh["weight"], plain["weight"], 1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@cases.on_backends("ff_forward")
def test_a_bad_row_spoils_no_other(target, value):
    given = arguments("ff_forward", target, (6, 8, 5)) | {"x_sqnorm": None}
    clean = run("ff_forward", given)
    given["x"][2, 3] = value
    others = [0, 1, 3, 4, 5]
    y, goodness, p = ff.ff_forward(**given, return_p=True)
    assert y[2].isnan().all()  # also of infinity: its row scale is 0
    for name, t in (("y", y), ("goodness", goodness), ("p", p)):
        assert torch.equal(t[others], clean[name][others])


@cases.each_op_on_backends(ops=("ff_step_", "ff_network_step_", "ff_label_step_"), dtypes=(torch.float32,))
def test_nan_reaches_the_loss(op, target):
    given = arguments(op, target, (6, 8, 5))
    given["x"][2, 7] = math.nan
    results = run(op, given | ({} if op == "ff_label_step_" else {"x_sqnorm": None}))
    assert results["loss"].isnan().all()


@pytest.mark.parametrize("normalize", independent.NORMALIZATIONS)
@cases.each_op_on_backends(ops=("ff_forward", "ff_grad", "ff_step_"))
def test_zero_rows(op, target, normalize):
    given = arguments(op, target, (6, 8, 5), {"normalize": normalize}, optimizer="sgd-momentum") | {"x_sqnorm": None}
    given["x"][1:3] = 0
    results = check(op, given, target.dtype)
    assert all(t.isfinite().all() for t in results.values())
    if op == "ff_forward":
        assert torch.equal(results["y"][1], given["bias"].relu())


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in Triton's interpreter
@pytest.mark.parametrize(("goodness", "temperature"), [(1e4, 1.0), (1e30, 1.0), (1e30, 1e-10)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@cases.each_op_on_backends(ops=("ff_step_", "ff_network_step_"), dtypes=(torch.float32,))
def test_huge_goodness(op, target, goodness, temperature, sign):
    """g - theta of +-1e4 and beyond: loss and gradient are finite and right, where exp() overflows at 89.

    At the smallest temperature g / T is infinite.
    """
    like = {"dtype": target.dtype, "device": target.device}
    x, weight = torch.full((2, 1), math.sqrt(goodness), **like), torch.ones(1, 1, **like)
    rate = 0.25 / goodness  # the gradient is 2 c y x
    optimizer = ff.SGD(lr=rate)
    signs = torch.full((2,), sign, **like)
    state = optimizer.init_state(weight)
    options = {"normalize": "none", "threshold": 0.0, "temperature": temperature}
    if op == "ff_step_":
        _, total, loss = ff.ff_step_(x, signs, weight, None, state, optimizer, **options)
    else:
        record = ff.FFLayer(weight, None, state, optimizer, **options)
        total, loss = ff.ff_network_step_(x, signs, [record])
    assert total.flatten().tolist() == pytest.approx([goodness] * 2, rel=1e-6)
    assert loss.item() == pytest.approx(0.0 if sign > 0 else goodness, rel=1e-6)
    assert weight.item() == pytest.approx(1.0 if sign > 0 else 0.5, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 1e-3, 20.0])
@pytest.mark.parametrize("distance", [0.0, 3.0, -3.0, 88.0, -88.0, 1e4, -1e4, 1e30, 1e37])
def test_logistic_loss_is_finite_for_every_finite_goodness(dtype, temperature, distance):
    goodness, sign = torch.tensor([2e4 + distance] * 2, dtype=dtype), torch.tensor([1.0, -1.0], dtype=dtype)
    loss, coef = ff.logistic_loss(goodness, sign, threshold=2e4, temperature=temperature)
    u = (float(goodness[0]) - 2e4) / temperature
    positive = temperature * (math.log1p(math.exp(-abs(u))) + max(-u, 0))
    negative = temperature * (math.log1p(math.exp(-abs(u))) + max(u, 0))
    rounding = 1e-5 if dtype == torch.float32 else 1e-12
    assert loss.item() == pytest.approx((positive + negative) / 2, rel=rounding)
    share = 1 / (1 + math.exp(-u)) if u > -700 else 0.0  # sigmoid(u)
    expected = [-(1 / (1 + math.exp(u)) if u < 700 else 0.0) / 2, share / 2]
    assert coef.tolist() == pytest.approx(expected, rel=rounding, abs=1e-30)


@cases.each_op_on_backends(ops=("ff_network_step_",), dtypes=(torch.float32,))
def test_peer_means_stay_where_no_row_is_positive(op, target):
    given = arguments(op, target, (33, 23, 11))
    given["sign"] = -torch.ones_like(given["sign"])
    means = [record.peer_mean for record in given["layers"] if record.peer]
    before = [mean.clone() for mean in means]
    ff.ff_network_step_(**given)
    assert means
    assert all(torch.equal(mean, old) for mean, old in zip(means, before, strict=True))


@cases.each_op_on_backends(ops=sorted(cases.IN_PLACE), dtypes=(torch.float32,))
def test_autograd_knows_what_was_written(op, target):
    """Its version counts: else a backward pass would use a weight that has changed since, and not say so."""
    given = arguments(op, target, (9, 7, 5))
    before = {name: t._version for name, t in cases.tensors(given).items()}
    cases.call(op, given)
    after = {name: t._version for name, t in cases.tensors(given).items()}
    written = {name for name in before if name.startswith(("weight", "bias", "state.", "layers."))}
    assert len(written) >= 3
    assert {name for name in before if after[name] > before[name]} == written


@cases.on_backends("ff_step_", dtypes=(torch.float16, torch.bfloat16))
def test_small_coefficients_do_not_underflow(target):
    """Over many rows c is about 1 / (N M): y c vanishes in fp16 unless it is scaled."""
    given = arguments("ff_step_", target, (2048, 32, 64), optimizer="sgd-momentum") | {
        "row_term": None,
        "col_term": None,
    }
    results = run("ff_step_", given)
    exact = independent.computed_by_torch("ff_step_", given, torch.float64)
    for name in ("momentum_buffer", "momentum_buffer_bias"):
        independent.assert_close(results[name], exact[name], 1e-2, name)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@cases.each_op_on_backends(dtypes=(torch.float32,))
def test_precision(op, target, precision):
    given = arguments(op, target, (33, 123, 110), optimizer="sgd-momentum")
    if op == "ff_network_step_":
        given["layers"] = [ff.FFLayer(**vars(record) | {"precision": precision}) for record in given["layers"]]
    else:
        given["precision"] = precision
    results = run(op, given)
    exact = independent.computed_by_torch(op, given, torch.float64)
    rounded = independent.computed_by_torch(op, given, torch.bfloat16 if precision == "medium" else torch.float32)
    for name, true in exact.items():
        allowed = rounded[name]
        if precision == "high":  # TF32, or three bf16 products
            allowed = true + 5e-4 * true.abs().max()
        independent.assert_as_exact_as_torch(results[name], true, allowed, name)


@cases.each_op_on_backends()
def test_autocast_changes_nothing(op, target):
    """Under it torch's own products would be of bf16."""
    given = arguments(op, target, (17, 23, 11))
    expected = run(op, given)
    with torch.autocast(target.device, torch.bfloat16):
        results = run(op, given)
    assert all(torch.equal(t, expected[name]) for name, t in results.items())


@pytest.mark.parametrize("op", cases.OPS)
def test_a_tangent_is_refused_not_dropped(op):
    """What torch.func.jvp sends through an op would come out as 0."""
    given = cases.arguments(op)
    before = cases.tensors(cases.copied(given))

    def through(x):
        return cases.call(op, given | {"x": x})

    with pytest.raises(RuntimeError, match=rf"{op}: x has a tangent.*x.detach\(\)"):
        torch.func.jvp(through, (given["x"],), (torch.ones_like(given["x"]),))
    assert all(torch.equal(t, before[name]) for name, t in cases.tensors(given).items())


@cases.on_backends("ff_forward", dtypes=(torch.float32,))
def test_no_precision_is_torchs_setting(target):
    given = arguments("ff_forward", target, (33, 123, 110))
    before = torch.get_float32_matmul_precision()
    try:
        for setting in ("highest", "medium"):
            torch.set_float32_matmul_precision(setting)
            expected = ff.ff_forward(**given, precision=setting)
            for a, b in zip(ff.ff_forward(**given), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_float32_matmul_precision(before)


def test_no_precision_where_torch_has_none_in_its_words():
    """Its newer settings, by backend and operation, make the one for all of them unreadable."""
    given, before = cases.arguments("ff_forward"), torch.get_float32_matmul_precision()
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        with pytest.raises(RuntimeError, match=r"precision must be one of \['highest', 'high', 'medium'\].*got None"):
            ff.ff_forward(**given)
        ff.ff_forward(**given, precision="high")
    finally:
        torch.set_float32_matmul_precision(before)


@cases.on_backends("ff_step_", dtypes=(torch.float32,))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float16, torch.float64])
def test_signs_of_any_real_dtype(target, dtype):
    given = arguments("ff_step_", target, (6, 8, 5))
    expected = run("ff_step_", given)
    results = run("ff_step_", given | {"sign": given["sign"].to(dtype)})
    assert torch.equal(results["weight"], expected["weight"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@cases.on_backends("ff_label_forward", dtypes=(torch.float32,))
def test_labels_of_any_integer_dtype(target, dtype):
    given = arguments("ff_label_forward", target, (6, 8, 5))
    expected = run("ff_label_forward", given)
    results = run("ff_label_forward", given | {"labels": given["labels"].to(dtype)})
    assert torch.equal(results["y"], expected["y"])


def test_p_of_relu_is_y_itself():
    given = cases.arguments("ff_forward")
    y, _, p = ff.ff_forward(**given, return_p=True)
    assert p is y
    assert len(ff.ff_forward(**given)) == 2
