"""The compiled extension: its kernel of ff_forward against float64, wrong calls, and how it is loaded."""

import itertools

import cases
import pytest
import torch
import torch.nn.functional as F

from ffkernels import _extension

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason=f"{_extension.unavailable()}")

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
NORMALIZATIONS = ("l2", "rms", "none")
EPS = 1e-4


def kernel(
    x, weight, bias=None, x_sqnorm=None, *, normalize="l2", activation="relu", precision="highest", return_p=True
):
    op = torch.ops.ffkernels.ff_forward.cpu
    return op(x, weight, bias, x_sqnorm, normalize, EPS, activation, precision, return_p)


def computed_by_torch(x, weight, bias=None, x_sqnorm=None, *, normalize="l2", activation="relu", dtype=torch.float64):
    """The same three results, each step rounded to dtype; the derivative is autograd's."""
    x, weight = x.to(dtype), weight.to(dtype)
    if normalize != "none":
        sqnorm = x.square().sum(1) if x_sqnorm is None else x_sqnorm.to(dtype)
        x = x / ((sqnorm / (1 if normalize == "l2" else x.shape[1])).sqrt() + EPS)[:, None]
    z = F.linear(x, weight, None if bias is None else bias.to(dtype)).requires_grad_()
    with torch.enable_grad():
        y = ACTIVATIONS[activation](z)
    (derivative,) = torch.autograd.grad(y.sum(), z)
    y = y.detach()
    accumulated = y.to(torch.promote_types(dtype, torch.float32))
    return y, accumulated.square().sum(1), y * derivative


def assert_as_exact_as_torch(results, exact, rounded):
    for name, result, true, torch_result in zip(("y", "goodness", "p"), results, exact, rounded, strict=True):
        error = (result.double() - true).abs().max()
        allowed = 2 * (torch_result.double() - true).abs().max() + 1e-5 * true.abs().max().clamp(min=1)
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def layer(rows, depth, cols, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, depth, generator=generator)
    weight = torch.randn(cols, depth, generator=generator)
    bias = torch.randn(cols, generator=generator)
    return x.to(dtype), weight.to(dtype), bias.to(dtype)


# Register tiles are 4 to 32 rows and 12 to 48 columns, depending on the instruction set.
@pytest.mark.parametrize(
    ("rows", "depth", "cols"),
    [
        (1, 1, 1),
        (1, 7, 3),
        (5, 1, 2),
        (3, 513, 1),
        (4, 256, 12),
        (2, 255, 507),
        (97, 123, 255),
        (96, 300, 97),
        (193, 257, 96),
        (64, 784, 500),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes(rows, depth, cols, dtype):
    arguments = layer(rows, depth, cols, dtype)
    results = kernel(*arguments)
    assert_as_exact_as_torch(results, computed_by_torch(*arguments), computed_by_torch(*arguments, dtype=dtype))
    y, goodness, p = results
    assert (y.dtype, goodness.dtype, p.dtype) == (dtype, torch.float32, dtype)
    assert all(result.is_contiguous() for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_options(dtype, activation, normalize, with_bias):
    x, weight, bias = layer(33, 123, 110, dtype)
    arguments = (x, weight / 4, bias if with_bias else None)
    options = {"normalize": normalize, "activation": activation}
    exact = computed_by_torch(*arguments, **options)
    assert_as_exact_as_torch(
        kernel(*arguments, **options), exact, computed_by_torch(*arguments, **options, dtype=dtype)
    )


@pytest.mark.parametrize(("precision", "unit"), [("highest", 2**-23), ("high", 2**-16), ("medium", 2**-8)])
def test_precision(precision, unit):
    """Each rounds its operands to a relative error of at most the unit."""
    x, weight, _ = layer(33, 123, 110)
    y, _, _ = kernel(x, weight, normalize="none", precision=precision)
    exact = torch.relu(x.double() @ weight.double().T)
    assert ((y - exact).abs() <= 2 * unit * (x.abs() @ weight.abs().T)).all()


def test_bfloat16_goodness_is_of_unrounded_y():
    arguments = layer(17, 300, 400, torch.bfloat16)
    y, goodness, _ = kernel(*arguments)
    _, exact, _ = computed_by_torch(*arguments)
    assert torch.allclose(goodness.double(), exact, rtol=3e-6)
    assert not torch.allclose(y.double().square().sum(1), exact, rtol=3e-6)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_given_sqnorm_is_used(normalize):
    arguments = (*layer(9, 31, 17), torch.linspace(1, 50, 9))
    exact = computed_by_torch(*arguments, normalize=normalize)
    rounded = computed_by_torch(*arguments, normalize=normalize, dtype=torch.float32)
    assert_as_exact_as_torch(kernel(*arguments, normalize=normalize), exact, rounded)


def test_without_p():
    x, weight, bias = layer(9, 31, 17, torch.bfloat16)
    y, goodness, p = kernel(x, weight, bias, return_p=False)
    assert p.shape == (0,)
    assert p.dtype == torch.bfloat16
    assert torch.equal(y, kernel(x, weight, bias)[0])
    assert torch.equal(goodness, kernel(x, weight, bias)[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_rows(dtype):
    x, weight, bias = layer(0, 31, 17, dtype)
    y, goodness, p = kernel(x, weight, bias, torch.empty(0))
    assert (y.shape, goodness.shape, p.shape) == ((0, 17), (0,), (0, 17))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_arguments(dtype):
    base_x, base_weight, base_bias = layer(62, 300, 110, dtype)
    sqnorm = torch.linspace(1, 50, 40)
    variants = [
        (base_x.t()[:110], base_weight[:70, :62], base_bias[:70]),  # a transposed x
        (base_x[:, 1::3], base_weight.t()[:100].t(), base_bias),  # every third column, from an odd address on
        (base_x[:1].expand(20, -1), base_weight[::2], base_bias[::2]),  # one row twenty times
        (base_x[:20], base_weight, base_bias[:1].expand(110), sqnorm[::2]),  # one bias for all
        (base_x.flip(0)[3:23], base_weight[7:8], base_bias[7:8], sqnorm[20:]),
    ]
    for arguments in variants:
        copies = [argument.contiguous() for argument in arguments]
        for result, of_copies in zip(kernel(*arguments), kernel(*copies), strict=True):
            assert torch.equal(result, of_copies)


def test_same_bits_for_any_number_of_threads():
    cases = [layer(200, 784, 500), layer(3, 2000, 700), layer(130, 97, 300, torch.bfloat16)]
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 7, 1):
            torch.set_num_threads(number)
            results.append([kernel(*case, activation="gelu") for case in cases])
    finally:
        torch.set_num_threads(threads)
    for other, (a, b) in itertools.product(results[1:], enumerate(results[0])):
        assert all(torch.equal(one, two) for one, two in zip(other[a], b, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_row(activation):
    x, weight, bias = layer(6, 40, 30)
    clean = kernel(x, weight, bias, activation=activation)
    x[2, 17] = torch.nan
    others = [0, 1, 3, 4, 5]
    for result, before in zip(kernel(x, weight, bias, activation=activation), clean, strict=True):
        assert result[2].isnan().all()
        assert torch.equal(result[others], before[others])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_stays_in_its_column(activation):
    x, weight, bias = layer(6, 40, 30)
    clean_y, _, clean_p = kernel(x, weight, bias, activation=activation)
    weight[7, 3] = torch.nan
    y, goodness, p = kernel(x, weight, bias, activation=activation)
    assert goodness.isnan().all()
    for result, before in ((y, clean_y), (p, clean_p)):
        assert result[:, 7].isnan().all()
        assert torch.equal(result[:, :7], before[:, :7])
        assert torch.equal(result[:, 8:], before[:, 8:])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
def test_infinity(activation, value):
    x, weight, bias = layer(3, 5, 4)
    bias[1] = value
    y, goodness, _ = kernel(x, weight, bias, activation=activation)
    # In float64: torch's float32 gelu of infinity depends on the length of the tensor.
    expected = ACTIVATIONS[activation](torch.full((3,), value, dtype=torch.float64))
    assert torch.allclose(y[:, 1].double(), expected, equal_nan=True)
    assert torch.allclose(goodness, y.square().sum(1), equal_nan=True)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_zero_rows(normalize):
    x, weight, bias = layer(8, 40, 30)
    x[3] = 0
    y, goodness, _ = kernel(x, weight, bias, normalize=normalize)
    assert torch.equal(y[3], bias.relu())
    assert torch.allclose(goodness[3], bias.relu().square().sum())


def test_huge_and_tiny_values():
    x, weight, bias = layer(5, 10, 30)
    x *= torch.tensor([1e-30, 1e-10, 1.0, 1e10, 1e17])[:, None]
    arguments = (x, weight, bias)
    assert_as_exact_as_torch(
        kernel(*arguments), computed_by_torch(*arguments), computed_by_torch(*arguments, dtype=torch.float32)
    )
    # Where the squared norm is too large for float32 the row's scale is 0, and so the bias is all that is left.
    y, _, _ = kernel(x * 1e10, weight, bias)
    assert torch.equal(y[4], bias.relu())


X, WEIGHT, BIAS, SQNORM = torch.ones(4, 6), torch.ones(3, 6), torch.ones(3), torch.ones(4)
EMPTIED = torch.ones(4, 6)
EMPTIED.untyped_storage().resize_(0)
SHORTENED = torch.ones(4, 6)[1:]
SHORTENED.untyped_storage().resize_(4 * 23)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(6)}, "x: must have 2 dim"),
        ({"x": torch.ones(1, 4, 6)}, "x: must have 2 dim"),
        ({"x": X.double()}, "x: must be float32 or bfloat16"),
        ({"x": X.half()}, "x: must be float32 or bfloat16"),
        ({"x": X.long()}, "x: must be float32 or bfloat16"),
        ({"x": torch.ones(4, 5)}, "weight"),
        (
            {"x": torch.ones(1, 1).expand(2**62, 1), "weight": torch.ones(3, 1), "x_sqnorm": None},
            "more values than there are addresses",
        ),
        ({"x": EMPTIED}, "x: reaches beyond its storage"),
        ({"weight": SHORTENED}, "weight: reaches beyond its storage"),
        ({"weight": torch.ones(6)}, "weight: must have 2 dim"),
        ({"weight": WEIGHT.t()}, "weight"),
        ({"weight": WEIGHT.bfloat16()}, "weight"),
        ({"weight": torch.ones(0, 6)}, "weight: must not be empty"),
        ({"x": torch.ones(4, 0), "weight": torch.ones(3, 0)}, "weight: must not be empty"),
        ({"bias": torch.ones(4)}, "bias"),
        ({"bias": torch.ones(3, 1)}, "bias: must have 1 dim"),
        ({"bias": torch.tensor(1.0)}, "bias: must have 1 dim"),
        ({"bias": BIAS.bfloat16()}, "bias"),
        ({"x_sqnorm": torch.ones(3)}, "x_sqnorm"),
        ({"x_sqnorm": torch.ones(4, 1)}, "x_sqnorm: must have 1 dim"),
        ({"x_sqnorm": SQNORM.double()}, "x_sqnorm"),
        ({"normalize": "L2"}, "normalize.*L2"),
        ({"activation": "elu"}, "activation.*elu"),
        ({"precision": ""}, "precision"),
    ],
)
def test_wrong_calls_raise(changed, message):
    arguments = {"x": X, "weight": WEIGHT, "bias": BIAS, "x_sqnorm": SQNORM} | changed
    with pytest.raises(RuntimeError, match=message):
        kernel(**arguments)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("dropout_seed", lambda seed: seed[:0], "dropout_seed: must have size 1"),
        ("dropout_seed", lambda seed: seed.repeat(2), "dropout_seed: must have size 1"),
        ("dropouts", lambda p: [0.5, *p[1:]], "dropout: must be .* 0 in the first layer"),
        ("peer_means", lambda means: means[:-1], "peer_means: too few"),
        ("biases", lambda biases: biases[:-1], "biases: too few"),
        ("state_sizes", lambda sizes: [n + 1 for n in sizes], "state"),
        ("hypers", lambda numbers: numbers[:-1], "hyper: must hold 5 numbers"),
        ("eps", lambda numbers: numbers[:-1], "every list must have an entry a layer"),
    ],
)
def test_wrong_network_calls_raise_and_change_nothing(name, change, message):
    op = torch.ops.ffkernels.ff_network_step_.cpu
    given = cases.arguments("ff_network_step_", dtype=torch.float32)
    args = list(cases.flat("ff_network_step_", given))
    before = [t.clone() for t in cases.tensors(given["layers"]).values()]
    at = [argument.name for argument in op._schema.arguments].index(name)
    args[at] = change(args[at])
    with pytest.raises(RuntimeError, match=message):
        op(*args)
    assert all(map(torch.equal, before, cases.tensors(given["layers"]).values()))


def test_build_info():
    info = _extension.build_info()
    assert set(info) == {"version", "compiler", "cuda", "cuda_archs", "torch", "torch_abi", "sources"}
    assert "csrc/ops.cpp" in info["sources"]
    assert ("csrc/cuda/device.cu" in info["sources"]) == (info["cuda"] is not None) == bool(info["cuda_archs"])


def test_cuda_devices_says_what_is_there():
    devices = _extension.cuda_devices()
    assert set(devices) == {"driver", "runtime", "error", "kernel_error", "devices"}
    if torch.cuda.is_available() and devices["runtime"]:
        assert len(devices["devices"]) == torch.cuda.device_count()
        assert devices["kernel_error"] is None
    else:
        assert devices["error"]
        assert devices["devices"] == []


def test_missing_extension_is_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(_extension, "_LIBRARY", tmp_path / "_C.abi3.so")
    assert "not built" in _extension.unavailable.__wrapped__()


def test_broken_extension_is_explained(monkeypatch, tmp_path):
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(b"not a library")
    monkeypatch.setattr(_extension, "_LIBRARY", library)
    reason = _extension.unavailable.__wrapped__()
    assert "does not load" in reason
    assert str(library) in reason
