"""Triton kernels as compiled for sm_80 and sm_90, executed by the PTX interpreter through the backend's own launcher.

Every access is checked while they run; results are compared with float64, and between two orders of the blocks.
"""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor

import cases
import independent
import ptx
import pytest
import torch
import twin
from test_ops import check, run
from triton_cases import (
    ARCHS,
    MODES,
    assert_as_planned,
    chosen,
    compiled_once,  # noqa: F401
    kind_of,
    on_ptx,
    recorded_plans,
    table,
)

import ffkernels as ff
from ffkernels.triton import in_flight, plan, tiles, tune

pytest.importorskip("triton")
aot = pytest.importorskip("ffkernels.triton.aot")
pytestmark = pytest.mark.usefixtures("compiled_once")


def truncated(t):
    """To TF32 as tensor cores read float32: Triton hands it over as it is, and the last 13 bits are not looked at."""
    return (t.float().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32).to(t.dtype)


TF32 = twin.Arithmetic(torch.float32, lambda a, b: truncated(a) @ truncated(b).T)


def arguments(op, mode, shape, **more):
    """Valid arguments in a mode; the optimizer keeps the gradient, so that it is seen."""
    dtype, precision = MODES[mode]
    rows, depth, cols = shape
    given = cases.arguments(op, rows=rows, depth=depth, cols=cols, dtype=dtype, optimizer="sgd-momentum", **more)
    if op == "ff_network_step_":
        for record in given["layers"]:
            record.precision = precision
    else:
        given["precision"] = precision
    return given


def verify(op, mode, given):
    """Results against float64 by the rule of all backends, with TF32 as test_ops.test_precision has it."""
    if mode not in ("tf32", "medium"):
        return check(op, given, MODES[mode][0])
    results = run(op, given)
    if mode == "tf32":
        exact, rounded = twin.computed(op, given), twin.computed(op, given, TF32)
        twin.assert_as_exact({name: results[name] for name in exact}, exact, rounded)
        return results
    exact = independent.computed_by_torch(op, given, torch.float64)
    for name, true in exact.items():
        bf16 = independent.computed_by_torch(op, given, torch.bfloat16)[name]
        independent.assert_as_exact_as_torch(results[name], true, bf16, name)
    return results


def matrix(update):
    for arch in ARCHS:
        for mode in MODES:
            for i, tile in enumerate(table(arch, mode, update)):
                yield pytest.param(arch, mode, tile, id=f"sm_{arch}-{mode}-{tile.m}x{tile.n}x{tile.k}-{i}")


def labelled_matrix():
    for arch in ARCHS:
        for mode in MODES:
            pairs = aot.pairs_of(f"sm_{arch}", kind_of(mode), labelled=True)
            for i, (tile, update) in enumerate(pairs):
                name = f"{tile.m}x{tile.n}x{tile.k}-{update.m}x{update.n}x{update.k}"
                yield pytest.param(arch, mode, tile, update, id=f"sm_{arch}-{mode}-{name}-{i}")


def in_both_orders(op, mode, given, arch, tile, splits=1, update=None, counted=True):
    with on_ptx(arch, tile, splits, update) as reports, recorded_plans() as planned:
        first = verify(op, mode, given)
    if counted:
        assert_as_planned(reports, planned)
    with on_ptx(arch, tile, splits, update, seed=7):
        second = run(op, given)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    return [report.kernel for report in reports]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "mode", "tile"), list(matrix(update=False)))
def test_forward(arch, mode, tile):
    """Two tiles each way and ragged edges; rows of whole 16 bytes, so that copies are as wide as they get."""
    given = arguments("ff_forward", mode, (tile.m + 6, 2 * tile.k + 8, tile.n + 8)) | {"x_sqnorm": None}
    assert in_both_orders("ff_forward", mode, given, arch, tile) == ["forward_kernel", "goodness_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "mode", "tile"), list(matrix(update=True)))
def test_update(arch, mode, tile):
    given = arguments("ff_update_", mode, (2 * tile.k + 6, tile.n + 8, tile.m + 8))
    assert in_both_orders("ff_update_", mode, given, arch, tile) == ["update_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "mode", "tile"), list(matrix(update=True)))
def test_step(arch, mode, tile):
    """The loss inside the update, over four blocks of rows: its main loop goes round with products in flight."""
    given = arguments("ff_step_", mode, (3 * tile.k + 6, tile.n + 8, tile.m + 8)) | {"row_term": None, "col_term": None}
    assert in_both_orders("ff_step_", mode, given, arch, tile) == ["forward_kernel", "update_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "mode", "tile", "update"), list(labelled_matrix()))
def test_labelled_step(arch, mode, tile, update):
    given = arguments("ff_label_step_", mode, (update.k + 6, update.n + 8, max(tile.n, update.m) + 8))
    names = in_both_orders("ff_label_step_", mode, given, arch, tile, update=update)
    assert names == ["label_forward_kernel", "label_update_kernel"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("arch", ARCHS)
def test_split_step(arch, mode):
    """Three launches: forward, the parts of the gradient, their sum and the optimizer. Rows of odd length."""
    tile = table(arch, mode, True)[-1]
    given = arguments("ff_step_", mode, (3 * tile.k + 5, tile.n + 3, tile.m + 9))
    names = in_both_orders("ff_step_", mode, given, arch, tile, splits=2)
    assert names == ["forward_kernel", "update_kernel", "reduce_kernel"]


def test_why_a_forward_waits_for_its_products(monkeypatch):
    """One load for a wgmma and for something else: the compiler frees its buffer when only the other use is done.

    common.settled keeps clear of it. Where this test fails, the compiler has been mended.
    """
    tile = table(90, "bf16")[-1]
    given = arguments("ff_forward", "bf16", (tile.m, 4 * tile.k, tile.n)) | {"x_sqnorm": None}
    monkeypatch.setattr(plan, "settles", lambda *args: False)
    with on_ptx(90, tile), pytest.raises(ptx.PtxFault, match=r"read by wgmma .* not waited for"):
        ff.ff_forward(**given)


def many_parts(mode):
    """A step whose forward leaves 32 parts of the goodness, in rows that are copied 16 bytes at a time."""
    given = arguments("ff_step_", mode, (208, 40, 32 * 32)) | {"row_term": None, "col_term": None}
    return given, table(90, mode)[-1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "fp16", "medium"])
def test_many_parts_of_the_goodness(mode):
    given, tile = many_parts(mode)
    assert in_both_orders("ff_step_", mode, given, 90, tile) == ["forward_kernel", "update_kernel"]


def test_why_an_update_waits_for_its_products(monkeypatch):
    """Otherwise an operand is made in registers that the product of the round before still reads.

    Both the PTX interpreter and the reader of PTX (in_flight.py) find it.
    """
    given, tile = many_parts("bf16")
    monkeypatch.setattr(plan, "settles", lambda *args: False)
    given["x_sqnorm"] = torch.ones(208)  # so that the forward has nothing to wait for
    with on_ptx(90, tile), pytest.raises(ptx.PtxFault, match="writes a source of a wgmma") as caught:
        ff.ff_step_(**given)
    with aot.compiling("sm_90") as kernels, chosen(tile), monkeypatch.context() as patch:
        patch.setattr(aot, "ROWS", 208)
        patch.setattr(aot, "DEPTH", 40)
        patch.setattr(aot, "COLS", 1024)
        aot._launch(aot.Variant("ff_step_", "bf16", tile, tile, optimizer="momentum"))
    found = in_flight.touched(kernels[-1].asm["ptx"])
    assert found
    assert all(t.text.startswith("ld.shared") for t in found)
    assert caught.value.opcode.startswith("ld.shared")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["bf16", "fp16", "tf32", "medium"])
def test_no_update_touches_registers_in_flight(mode, monkeypatch):
    """On every tile of the table for sm_90; in bf16 from one part of the goodness to 32."""
    monkeypatch.setattr(aot, "ROWS", 4096)
    monkeypatch.setattr(aot, "DEPTH", 256)
    narrow = table(90, mode)[-1]
    for tile in table(90, mode, True):
        for parts in (1, 8, 32) if mode == "bf16" else (32,):
            monkeypatch.setattr(aot, "COLS", narrow.n * parts)
            variant = aot.Variant("ff_step_", mode, narrow, tile)
            assert [c.in_flight for c in compiled(variant)] == [0, 0], (tile, parts)


def compiled(variant):
    """As aot.compile_variant, without the machine code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aot, "of_cubins", lambda cubins, arch: [None] * len(cubins))
        return aot.compile_variants("sm_90", [variant])


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_adam_and_hinton_over_steps(arch):
    """The optimizers' epilogues as compiled, on two steps: the second takes the state that the first has left."""
    for name in ("adamw", "hinton"):
        given = cases.arguments("ff_update_", rows=9, depth=24, cols=18, optimizer=name)
        expected = cases.copied(given)
        with on_ptx(arch):
            for _ in range(2):
                ff.ff_update_(**given)
        with ff.use_backend("reference"):
            for _ in range(2):
                ff.ff_update_(**expected)
        for t, true in zip(cases.tensors(given).values(), cases.tensors(expected).values(), strict=True):
            independent.assert_close(t, true, 1e-5, name)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_network_step(arch):
    """Peer normalisation, dropout and the chain of layers, as compiled; a launch more for the layer with dropout."""
    given = arguments("ff_network_step_", "bf16", (40, 96, 48))
    tile = table(arch, "bf16", True)[-1]
    # the plan leaves out what peer normalisation adds, and plans dropout by itself
    names = in_both_orders("ff_network_step_", "bf16", given, arch, tile, counted=False)
    layer = ["forward_kernel", "update_kernel"]
    assert names == [*layer, "dropout_kernel", *layer]


@pytest.mark.slow
def test_a_layer_is_measured_on_scratch_tensors(monkeypatch):
    """tune.measure, with a timer that runs each op on one tile and prefers another."""
    monkeypatch.setattr(tiles, "measured_forward", {})
    monkeypatch.setattr(tiles, "measured_update", {})
    seen = []

    def timer(run):
        if run not in seen:
            run()
            seen.append(run)
            return 2.0
        return 1.0

    with on_ptx(80) as reports:
        tune.measure(plan.Layer(20, 24, 18), tiles.DEVICES["sm_80"], torch.empty(0, dtype=torch.bfloat16), timer)
    plan.plan.cache_clear()
    assert [report.kernel for report in reports] == ["forward_kernel", "update_kernel"]
    assert tiles.measured_forward == {(20, 18, 24, "16bit"): table(80, "bf16")[1]}
    assert tiles.measured_update == {(18, 24, 20, "16bit"): (table(80, "bf16", True)[1], 1)}


def test_updates_run_beside_the_next_forward(monkeypatch):
    """The order of launches and waits on two streams, with streams that only write down what is asked of them."""
    from types import SimpleNamespace

    from ffkernels.triton import launch

    seen, now = [], ["main"]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            seen.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        before, now[0] = now[0], stream.name
        yield
        now[0] = before

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_side_stream", lambda index: Stream("side"))
    x = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))

    def named(name):
        return lambda: seen.append(f"{name} on {now[0]}")

    with launch._beside(x) as beside:
        for i in (1, 2):
            launch.run([named(f"forward {i}")], x)
            beside([named(f"update {i}")])
    assert seen == [
        "forward 1 on main", "side waits for main", "update 1 on side",
        "forward 2 on main", "side waits for main", "update 2 on side", "main waits for side",
    ]  # fmt: skip


def test_each_thread_has_a_side_stream_of_its_own(monkeypatch):
    """With one for all, a graph that one thread captures would take in what another one launches there."""
    from ffkernels.triton import launch

    monkeypatch.setattr(launch, "_of_thread", threading.local())
    monkeypatch.setattr(torch.cuda, "Stream", lambda index: object())
    with ThreadPoolExecutor(1) as other:
        there = other.submit(launch._side_stream, 0).result()
    here = launch._side_stream(0)
    assert here is launch._side_stream(0)
    assert len({id(s) for s in (here, there, launch._side_stream(1))}) == 3


def test_no_device_is_asked_for_a_number():
    from ffkernels.triton import launch

    with torch.device("meta"):  # as the default device: a tensor there has no value
        assert launch._stored(0.1, torch.empty(0, dtype=torch.float16)) == 0.0999755859375
