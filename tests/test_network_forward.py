"""ff_network_forward: the same bits as ff_forward layer by layer, and the neutral label without a copy of x."""

from itertools import pairwise

import pytest
import torch

import ffkernels as ff
from ffkernels import backends

OPTIONS = [
    {"normalize": "rms", "eps": 1e-3, "precision": "medium"}, {"activation": "gelu", "precision": "high"},
    {"normalize": "none", "precision": "highest"},
]  # fmt: skip


def arguments(rows=6, widths=(13, 8, 5, 17), dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    layers = []
    for i, (k, n) in enumerate(pairwise(widths)):
        weight = (torch.randn(n, k, generator=g) / k**0.5).to(dtype)
        bias = None if i == 1 else torch.randn(n, generator=g).to(dtype)
        layers.append(ff.FFLayer(weight, bias, ff.Adam().init_state(weight, bias), ff.Adam(), **OPTIONS[i]))
    return torch.randn(rows, widths[0], generator=g).to(dtype), layers


def one_by_one(x, layers, sqnorm=None):
    ys, totals = [], []
    for r in layers:
        x, sqnorm = ff.ff_forward(x, r.weight, r.bias, x_sqnorm=sqnorm, normalize=r.normalize, eps=r.eps,
                                  activation=r.activation, precision=r.precision)  # fmt: skip
        ys.append(x)
        totals.append(sqnorm)
    return [*ys, *totals]


def assert_same(results, expected):
    ys, totals = results
    for ours, theirs in zip([*ys, *totals], expected, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, (1, 1, 1, 1)), (33, (130, 255, 31, 507)), (0, (4, 3, 2, 1))], ids=str)
def test_as_layer_by_layer(everywhere, shape, dtype):
    x, layers = arguments(*shape, dtype=dtype)
    assert_same(ff.ff_network_forward(x, layers), one_by_one(x, layers))
    sqnorm = torch.linspace(1, 2, len(x))
    assert_same(ff.ff_network_forward(x, layers, x_sqnorm=sqnorm), one_by_one(x, layers, sqnorm))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_neutral_label_is_read_and_not_written(everywhere, dtype):
    x, layers = arguments(40, dtype=dtype)
    before = x.clone()
    for given in (x, x.T.contiguous().T)[: 1 if everywhere == "reference" else 2]:  # torch's products depend on strides
        results = ff.ff_network_forward(given, layers, num_classes=7, strength=2.5)
        assert_same(results, one_by_one(ff.neutral(x, 7, 2.5), layers))
        assert torch.equal(given, before)


def test_backends_without_it_compose_it(monkeypatch):
    x, layers = arguments()
    fused = ff.ff_network_forward(x, layers, num_classes=3)
    monkeypatch.setattr(backends, "has_kernel", lambda op, x: False)
    assert_same(fused, [*(composed := ff.ff_network_forward(x, layers, num_classes=3))[0], *composed[1]])


def flat(x, layers, num_classes=0):
    return (
        x, None, num_classes, 2.0, [r.weight for r in layers], [r.bias for r in layers if r.bias is not None],
        [r.bias is not None for r in layers], [r.normalize for r in layers], [r.eps for r in layers],
        [r.activation for r in layers], [r.precision for r in layers],
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_opcheck(backend):
    if backends.unavailable(backend):
        pytest.skip(backends.unavailable(backend))
    torch.library.opcheck(getattr(torch.ops.ffkernels.ff_network_forward, backend), flat(*arguments(), num_classes=2))


def test_compiled():
    torch.compiler.reset()
    x, layers = arguments()
    compiled = torch.compile(ff.ff_network_forward, fullgraph=True, backend="aot_eager")
    ys, totals = ff.ff_network_forward(x, layers, num_classes=4)
    assert_same(compiled(x, layers, num_classes=4), [*ys, *totals])


BAD = {
    "no tensor": (lambda x, la: ("spam", la, {}), TypeError, "x must be a tensor, got str"),
    "rank": (lambda x, la: (x[None], la, {}), ValueError, "x must be 2-dimensional"),
    "width": (lambda x, la: (x[:, 1:], la, {}), ValueError, r"layers\[0\]: x must have shape .* K = 13"),
    "order": (lambda x, la: (x, [la[0], la[2]], {}), ValueError, r"layers\[1\]: x must have shape .* K = 5"),
    "dtype": (lambda x, la: (x.bfloat16(), la, {}), TypeError, r"layers\[0\]: weight must be torch.bfloat16"),
    "grad": (lambda x, la: (x.requires_grad_(), la, {}), RuntimeError, "ff_network_forward: x requires grad"),
    "layers": (lambda x, la: (x, [], {}), ValueError, "layers must hold at least one layer"),
    "classes": (lambda x, la: (x, la, {"num_classes": 14}), ValueError, r"num_classes must be in \[1, 13\].*got 14"),
    "strength": (lambda x, la: (x, la, {"num_classes": 3, "strength": float("nan")}), ValueError, "strength must be"),
    "sqnorm": (lambda x, la: (x, la, {"x_sqnorm": torch.ones(5)}), ValueError, r"x_sqnorm must have shape"),
    "both": (lambda x, la: (x, la, {"x_sqnorm": torch.ones(6), "num_classes": 3}), ValueError, "x_sqnorm must be None"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(everywhere, case):
    change, error, message = BAD[case]
    x, layers, options = change(*arguments())
    with pytest.raises(error, match=message):
        ff.ff_network_forward(x, layers, **options)


def test_meta_among_others(everywhere):
    """torch would run the fake kernel, whose results have no values."""
    x, layers = arguments()
    layers[1].weight = layers[1].weight.to("meta")
    with pytest.raises(ValueError, match=r"layers\[1\]: weight must be on cpu"):
        ff.ff_network_forward(x, layers)


def test_of_the_net():
    """The neutral pass of flat inputs, of images of one channel and of several, and of a net without labels."""
    torch.manual_seed(0)
    for shape, strength in (((6, 12), 2.0), ((6, 1, 3, 4), 2.0), ((6, 3, 2, 2), 2.0), ((6, 12), None)):
        net = ff.FFNet.from_sizes([12, 6, 4], num_classes=3, label_strength=strength)
        x = torch.rand(shape)
        rows = (x if strength is None else ff.neutral(x, 3, strength)).flatten(1)
        assert_same(net.neutral_pass(x), one_by_one(rows, [layer.as_layer() for layer in net.stack]))
