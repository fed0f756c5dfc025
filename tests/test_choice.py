"""The choice between a GPU's two backends: predictions by shape, what explains them, and why CUDA cannot run."""

import dataclasses
import itertools
import re

import cases
import pytest
import torch

import ffkernels as ff
from ffkernels import _extension, backends, choice, cost
from ffkernels.triton.plan import Layer

ARCHS = (("sm_80", 108), ("sm_86", 84), ("sm_89", 128), ("sm_90", 132), ("sm_100", 148), ("sm_120", 170))


def layers(rows, *widths, dtype="bfloat16"):
    return tuple(Layer(rows, k, n, dtype) for k, n in itertools.pairwise(widths))


@pytest.mark.parametrize(("arch", "multiprocessors"), ARCHS)
def test_small_networks_run_in_one_launch(arch, multiprocessors):
    """Where launches cost more than arithmetic, whatever the GPU."""
    for rows, widths in ((64, (784, 500, 500)), (250, (784, 1000, 1000, 1000))):
        assert choice.predict("ff_network_step_", layers(rows, *widths), arch, multiprocessors).faster == "cuda"


@pytest.mark.parametrize(("arch", "multiprocessors"), [("sm_90", 132), ("sm_100", 148)])
def test_large_products_run_on_instructions_that_only_triton_emits(arch, multiprocessors):
    assert choice.predict("ff_step_", layers(4096, 2000, 2000), arch, multiprocessors).faster == "triton"


def test_cuda_launches_count_the_work():
    """Three layers: four stages, of which only the first is a launch; products as the least possible, plus padding."""
    la = layers(256, 768, 1024, 1024, 1024)
    stages = choice.cuda_launches("ff_network_step_", la)
    assert [s.launches for s in stages] == [1, 0, 0, 0]
    assert [s.barriers for s in stages] == [0, 1, 1, 1]
    least = cost.minimum("ff_network_step_", [cost.Layer(x.rows, x.depth, x.cols) for x in la])
    assert sum(s.flops for s in stages) == least.flops  # all sizes are multiples of a tile
    shared = 2 * 256 * 1024 * 2  # y of the lower two, which two products of one stage read
    counted = sum(s.bytes for s in stages) + shared
    assert abs(counted - least.bytes) / least.bytes < 0.02
    assert choice.cuda_launches("ff_forward", la[:1]) == (stages[0],)
    odd = choice.cuda_launches("ff_forward", layers(100, 500, 70))[0]
    assert odd.flops == 2 * 128 * 512 * 128
    assert odd.grid == (4,)


def test_minibatches_of_a_launch_overlap():
    """Each begins two stages behind the one before; together they do the work of as many steps."""
    la = layers(250, 784, 1000, 1000, 1000)
    one, several = (choice.cuda_launches("ff_network_step_", la, n) for n in (1, 5))
    assert len(several) == 4 + 2 * 4
    assert [s.launches for s in several] == [1] + [0] * 11
    assert [s.barriers for s in several] == [0] + [1] * 11
    for name in ("flops", "bytes_read", "bytes_written", "bytes_requested"):
        assert sum(getattr(s, name) for s in several) == 5 * sum(getattr(s, name) for s in one)
    assert several[2].grid == (one[2].grid[0] + one[0].grid[0],)
    alone, together = (choice.predict("ff_network_step_", la, "sm_90", 132, n) for n in (1, 5))
    assert together.cuda < 0.9 * 5 * alone.cuda
    assert together.triton == 5 * alone.triton
    mixed = [la[0], dataclasses.replace(la[1], dtype="float32", precision="highest")]
    for separate in (layers(6, *[8] * 10), mixed):  # not one launch a step: nothing overlaps
        steps = [choice.cuda_launches("ff_network_step_", separate, n) for n in (1, 3)]
        assert steps[1] == 3 * steps[0]


@pytest.mark.parametrize("op", cases.OPS)
def test_layers_of_a_call(op):
    """Rows, depth, columns and precision of every op, from its flat arguments."""
    given = cases.arguments(op, rows=6, depth=8, cols=5)
    if op == "ff_network_step_":
        for layer in given["layers"]:
            layer.precision = "high"
    else:
        given["precision"] = "high"
    x, *args = cases.flat(op, given)
    found = choice.layers_of_call(op, x, args)
    rows = 12 if "label" in op else 6
    shapes = [(la.rows, la.depth, la.cols, la.inputs, la.precision) for la in found]
    assert shapes[0] == (rows, 8, 5, 6, "high")
    assert len(shapes) == 1 or shapes[1][:3] == (6, 5, found[1].cols)
    assert all(la.dtype == "float32" for la in found)


@pytest.fixture
def two_backends(monkeypatch):
    """As if there were a GPU, for which both backends can run; each overload says its name."""
    monkeypatch.setattr(backends, "_chosen", {})
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._UNAVAILABLE, name, lambda: None)
        for op in cases.OPS:
            monkeypatch.setitem(backends._KERNELS, (op, name), backends.Kernel(("cpu",), cases.DTYPES))
    monkeypatch.setattr(choice, "_gpu", lambda index: ("sm_90", 132))
    monkeypatch.setattr(backends, "_overload", lambda op, backend: lambda *args: backend)
    with ff.use_backend("auto"):
        yield


def test_auto_decides_by_shape(two_backends):
    for rows, width, expected in ((64, 512, "cuda"), (16384, 4096, "triton")):
        x, weight = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(width, width, dtype=torch.bfloat16)
        args = cases.flat("ff_forward", {"x": x, "weight": weight})
        assert backends.kernel("ff_forward", x)(*args) == expected
        text = ff.explain("ff_forward", x, weight)
        assert f"runs on '{expected}'" in text
        assert "predicted to take" in text
    assert "depends on the shapes" in ff.explain("ff_forward", x)


def test_labels_and_minibatches_are_explained(two_backends):
    """A labelled step multiplies its inputs once for both labels; several minibatches overlap in one launch only."""
    x, weights = torch.empty(250, 784).bfloat16(), [torch.empty(1000, k).bfloat16() for k in (784, 1000, 1000)]
    given = [
        ff.explain("ff_network_step_", x, *weights),
        ff.explain("ff_network_step_", x.expand(4, -1, -1), *weights),
        ff.explain("ff_network_step_", x, *weights, labelled=True),
        ff.explain("ff_label_step_", x, weights[0]),
        ff.explain("ff_step_", x.repeat(2, 1), weights[0]),
    ]
    assert all("predicted to take" in text for text in given)
    plain, several, labelled, layer, rows = (
        {name: int(time) for name, time in re.findall(r"(cuda|triton):? (?:.*?to take )?(\d+) us", text)}
        for text in given
    )
    assert several["triton"] == pytest.approx(4 * plain["triton"], abs=4)
    assert 3 * plain["cuda"] < several["cuda"] < 0.9 * 4 * plain["cuda"]
    assert plain["cuda"] < labelled["cuda"] < 2 * plain["cuda"]
    assert layer["cuda"] <= rows["cuda"]


def test_a_setting_is_not_overruled(two_backends):
    x, weight = torch.empty(16384, 4096, dtype=torch.bfloat16), torch.empty(4096, 4096, dtype=torch.bfloat16)
    args = cases.flat("ff_forward", {"x": x, "weight": weight})
    with ff.use_backend("cuda"):
        assert backends.kernel("ff_forward", x)(*args) == "cuda"
        assert "predicted" not in ff.explain("ff_forward", x, weight)


def test_shapes_do_not_decide_where_there_is_no_product(two_backends, monkeypatch):
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._KERNELS, ("apply_gradient_", name), backends.Kernel(("cpu",), cases.DTYPES))
    weight = torch.empty(4096, 4096)
    assert backends.kernel("apply_gradient_", weight)(weight) == "cuda"
    assert "runs on 'cuda'" in ff.explain("apply_gradient_", weight)


def test_values_are_looked_at_on_request(monkeypatch):
    monkeypatch.setattr(backends, "_chosen", {})
    given = cases.arguments("ff_step_")
    given["sign"][0] = 0.5
    args = cases.flat("ff_step_", given)
    monkeypatch.setenv("FFKERNELS_CHECK", "1")
    with pytest.raises(ValueError, match=r"sign must hold \+1"):
        backends._overload("ff_step_", "cuda")(*args)
    monkeypatch.delenv("FFKERNELS_CHECK")
    assert backends._overload("ff_step_", "cuda") is torch.ops.ffkernels.ff_step_.cuda


BUILT = {"cuda": "13.0", "cuda_archs": ["8.0", "9.0+PTX"]}
SEEN = {
    "driver": "13.0", "runtime": "13.0", "error": None, "kernel_error": None,
    "devices": [{"name": "A GPU", "capability": "9.0", "multiprocessors": 132, "memory_bytes": 1 << 30}],
}  # fmt: skip
REASONS = [
    ({"cuda": None}, {}, "13.0", "built without CUDA (FFKERNELS_BUILD=cuda"),
    ({}, {}, None, f"torch {torch.__version__} is built without CUDA"),
    ({}, {"driver": None}, "13.0", "there is no NVIDIA driver"),
    ({}, {"error": "too old"}, "13.0", "the CUDA driver 13.0 cannot be used: too old"),
    ({}, {"devices": []}, "13.0", "there is no CUDA device"),
    ({}, {"devices": [{"capability": "7.5"}]}, "13.0", "the GPU has compute capability 7.5, its kernels need 8.0"),
    ({}, {"kernel_error": "no image"}, "13.0", "was compiled for 8.0, 9.0+PTX, not for the GPU's 9.0: no image"),
]


@pytest.mark.parametrize(("build", "seen", "torch_cuda", "message"), REASONS, ids=[r[3][:30] for r in REASONS])
def test_why_cuda_cannot_run(monkeypatch, build, seen, torch_cuda, message):
    monkeypatch.setattr(_extension, "unavailable", lambda: None)
    monkeypatch.setattr(_extension, "build_info", lambda: BUILT | build)
    monkeypatch.setattr(_extension, "cuda_devices", lambda: SEEN | seen)
    monkeypatch.setattr(torch.version, "cuda", torch_cuda)
    assert message in backends._cuda_unavailable()


def test_cuda_runs_where_nothing_speaks_against_it(monkeypatch):
    test_why_cuda_cannot_run(monkeypatch, {"cuda": None}, {}, "13.0", "built without CUDA")
    monkeypatch.setattr(_extension, "build_info", lambda: BUILT)
    monkeypatch.setattr(backends, "_out_of_date", lambda backend, key: None)
    assert backends._cuda_unavailable() is None
