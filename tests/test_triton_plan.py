"""What the Triton backend would launch: grids, tiles, splits and the work counted, by shape and architecture."""

import contextlib
import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from ffkernels.triton import device, plan, tiles, tune
from ffkernels.triton.plan import Layer
from ffkernels.triton.tiles import DEVICES, KIB, TABLE, Tile, candidates, ceil_div

ARCHS = list(DEVICES)
KINDS = ("16bit", "tf32", "medium", "exact")
SHAPES = [(128, 784, 500), (256, 784, 2000), (512, 2000, 2000), (8192, 2000, 2000), (100000, 784, 500), (1, 3, 1)]
LAYERS = [Layer(*shape) for shape in SHAPES]
# Layers that have parts of a wave, or of a tile, with names for the test's report
layers = pytest.mark.parametrize("layer", LAYERS, ids=lambda la: f"{la.rows}x{la.depth}x{la.cols}")
archs = pytest.mark.parametrize("arch", ARCHS)


def test_table_covers_every_device_and_kind():
    assert set(TABLE) == set(DEVICES)
    for arch in ARCHS:
        for kind in KINDS:
            assert candidates(arch, kind)
            assert candidates(arch, kind, update=True)


@archs
def test_tiles_fit_the_device(arch):
    found = DEVICES[arch]
    for kind in KINDS:
        item = 2 if kind == "16bit" else 4
        for update, labelled in itertools.product((False, True), repeat=2):
            for tile in candidates(arch, kind, update, labelled):
                assert tile.shared(item) <= found.shared, (kind, tile)
                # accumulators take at most half of the 64 K registers, and each thread at most 128 of them
                assert tile.m * tile.n <= 32768
                assert tile.m * tile.n // (tile.warps * found.warp_size) <= 128
                assert all(n & (n - 1) == 0 for n in (tile.m, tile.n, tile.k, tile.warps))


@archs
def test_rows_of_narrow_loads_take_smaller_tiles(arch):
    for kind, update, labelled in itertools.product(KINDS, (False, True), (False, True)):
        every = candidates(arch, kind, update, labelled)
        smaller = candidates(arch, kind, update, labelled, narrow=True)
        assert smaller == every[len(every) // 2 :] != ()
    forward, update, *_ = plan.plan("ff_step_", Layer(8192, 4098, 4098, x_unit=2, y_unit=2), arch)
    assert forward.tile in candidates(arch, "16bit", narrow=True)
    assert update.tile in candidates(arch, "16bit", True, narrow=True)


@pytest.mark.parametrize(("unit", "large"), [(0, True), (4, True), (2, False), (1, False)])
def test_what_narrow_is(unit, large):
    for units in ({"x_unit": unit}, {"w_unit": unit}):
        forward = plan.plan("ff_forward", Layer(8192, 2000, 2000, **units), "sm_90")[0]
        assert (forward.tile == candidates("sm_90", "16bit")[0]) == large
    for units in ({"x_unit": unit}, {"y_unit": unit}):
        update = plan.plan("ff_step_", Layer(8192, 2000, 2000, **units), "sm_90")[1]
        assert (update.tile == candidates("sm_90", "16bit", True)[0]) == large


def test_labelled_products_take_their_own_tiles():
    labelled = Layer(8192, 4096, 4096, candidates=2, num_classes=10)
    forward, update, *_ = plan.plan("ff_label_step_", labelled, "sm_80")
    assert forward.tile in candidates("sm_80", "16bit", labelled=True)
    assert update.tile in candidates("sm_80", "16bit", True, True)
    assert plan.plan("ff_step_", replace(labelled, candidates=0), "sm_80")[0].tile not in candidates(
        "sm_80", "16bit", labelled=True
    )


@pytest.mark.parametrize(
    ("arch", "found"), [("sm_80", "sm_80"), ("sm_87", "sm_86"), ("sm_103", "sm_100"), ("sm_121", "sm_120"),
                        ("gfx950", "gfx942"), ("sm_75", "sm_80")],
)  # fmt: skip
def test_unknown_architectures_take_the_nearest(arch, found):
    assert tiles.nearest(arch) == found


@archs
@layers
def test_grids_cover_the_result(arch, layer):
    forward, update, *_ = plan.plan("ff_step_", layer, arch)
    assert forward.blocks == ceil_div(layer.rows, forward.tile.m) * ceil_div(layer.cols, forward.tile.n)
    tiles_of_weight = ceil_div(layer.cols, update.tile.m) * ceil_div(layer.depth, update.tile.n)
    assert update.grid == (tiles_of_weight + 1, update.splits), "one more program computes the loss"
    assert update.splits * update.split_rows >= layer.rows
    assert (update.splits - 1) * update.split_rows < layer.rows, "a split without rows"
    assert update.split_rows % update.tile.k == 0, "a tile of rows must not reach into the next split"


@archs
def test_launches_of_each_op(arch):
    small, wide = Layer(512, 784, 32), Layer(512, 2000, 2000)
    names = [launch.kernel for launch in plan.plan("ff_forward", small, arch)]
    assert names == ["forward_kernel"], "one tile of columns holds whole rows"
    names = [launch.kernel for launch in plan.plan("ff_forward", wide, arch)]
    assert names == ["forward_kernel", "goodness_kernel"]
    assert [launch.kernel for launch in plan.plan("ff_step_", wide, arch)] == ["forward_kernel", "update_kernel"]
    tall = Layer(100000, 784, 100)
    names = [launch.kernel for launch in plan.plan("ff_step_", tall, arch)]
    assert names == ["forward_kernel", "update_kernel", "reduce_kernel"]
    labelled = replace(wide, candidates=2, num_classes=10)
    names = [launch.kernel for launch in plan.plan("ff_label_step_", labelled, arch)]
    assert names == ["label_forward_kernel", "label_update_kernel"]
    names = [launch.kernel for launch in plan.plan("ff_grad", wide, arch)]
    assert names == ["sqnorm_kernel", "update_kernel"]
    assert len(plan.plan("ff_update_", replace(wide, sqnorm_parts=1), arch)) == 1
    with pytest.raises(ValueError, match="no plan for 'ff_backward'"):
        plan.plan("ff_backward", wide, arch)


def test_a_network_has_two_launches_a_layer_and_a_stage_more_than_layers():
    net = tuple(Layer(512, k, 2000) for k in (784, 2000, 2000, 2000))
    launches = plan.plan("ff_network_step_", net, "sm_90")
    assert [launch.kernel for launch in launches].count("forward_kernel") == 4
    assert len(launches) == 8
    stages = [[launch.kernel for launch in launches if launch.stage == i] for i in range(5)]
    assert stages == [["forward_kernel"], *[["forward_kernel", "update_kernel"]] * 3, ["update_kernel"]]
    # the forward of layer 2 adds up what each tile of layer 1 left
    assert launches[1].constants["PARTS"] >= ceil_div(2000, launches[0].tile.n)


@archs
@layers
def test_the_choice_is_the_least_predicted_time(arch, layer):
    found = DEVICES[arch]
    shape = (layer.rows, layer.cols, layer.depth)
    best = tiles.choose(found, *shape, "16bit", 2)
    clocks = [tiles.predicted_clocks(t, found, *shape, "16bit", 2) for t in candidates(arch, "16bit")]
    assert tiles.predicted_clocks(best, found, *shape, "16bit", 2) == min(clocks)


def test_large_products_take_large_tiles_and_small_ones_fill_the_gpu():
    for arch in ("sm_80", "sm_90"):
        large = plan.plan("ff_forward", Layer(8192, 4096, 4096), arch)[0]
        small = plan.plan("ff_forward", Layer(128, 784, 500), arch)[0]
        assert large.tile.m * large.tile.n >= 128 * 128
        assert small.tile.m * small.tile.n < large.tile.m * large.tile.n
        assert small.blocks >= 16


@archs
def test_split_where_there_are_few_weights_and_many_rows(arch):
    def splits(*shape):
        return plan.plan("ff_update_", Layer(*shape, sqnorm_parts=1), arch)[0].splits

    assert splits(256, 2000, 2000) == 1
    assert splits(16384, 256, 256) > 1
    assert splits(100000, 100, 100) >= splits(4096, 100, 100) >= 1


def test_a_split_pays_in_the_prediction():
    found = DEVICES["sm_90"]
    tile, splits = tiles.choose_split(found, 500, 784, 100000, "16bit", 2)
    whole = min(tiles.predicted_clocks(t, found, 500, 784, 100000, "16bit", 2) for t in candidates("sm_90", "16bit"))
    assert splits > 1
    assert tiles.predicted_clocks(tile, found, 500, 784, 100000, "16bit", 2, splits) < whole


@pytest.mark.parametrize("shape", [(4096, 4096), (100, 8192), (8192, 100), (64, 64)])
def test_grouped_order_reads_fewer_operand_rows(shape):
    """Blocks that run at once in groups of g rows of tiles read g m + w / g n rows: no worse than column by column."""
    found, tile = DEVICES["sm_90"], Tile(128, 128, 64, 8, 4)
    group = tiles.group_rows(tile, found, *shape, 2)
    rows, cols = (ceil_div(size, 128) for size in shape)
    at_once = min(rows * cols, found.sms * tiles.blocks_per_sm(tile, found, 2))

    def touched(g):
        height = min(g, rows)
        return max(height, ceil_div(at_once, cols)) + min(cols, ceil_div(at_once, height))

    assert group & (group - 1) == 0
    assert 1 <= group <= 16
    assert touched(group) <= touched(1)


@pytest.mark.parametrize(
    ("stride", "width", "item", "address", "arch", "kind", "expected"),
    [
        (2000, 2000, 2, 0, "sm_90", "16bit", 0),  # by descriptor
        (2000, 2000, 2, 0, "sm_80", "16bit", 16),
        (2000, 2000, 2, 8, "sm_90", "16bit", 16),  # the first row starts in the middle of 16 bytes
        (500, 500, 2, 0, "sm_90", "16bit", 4),  # 1000 bytes a row: loads of 8 bytes
        (512, 500, 2, 0, "sm_90", "16bit", 0),  # the same with a padded stride
        (785, 785, 2, 0, "sm_90", "16bit", 1),
        (500, 500, 4, 0, "sm_90", "tf32", 0),
        (512, 512, 4, 0, "sm_90", "exact", 16),  # through registers
        (512, 512, 2, 0, "gfx942", "16bit", 16),
    ],
)
def test_how_a_matrix_may_be_loaded(stride, width, item, address, arch, kind, expected):
    assert plan.unit(stride, width, item, address, DEVICES[arch], kind) == expected


@pytest.mark.parametrize("width", [1, 15, 16, 500, 2000])
def test_padded_rows_start_on_16_bytes(width):
    assert plan.padded(width) >= width
    assert plan.padded(width) * 2 % 16 == 0
    assert plan.padded(width) - width < plan.PAD


def test_work_of_a_step_is_counted():
    m, k, n = 512, 2000, 2000
    forward, update = plan.plan("ff_step_", Layer(m, k, n), "sm_90")
    tiles_n = ceil_div(n, forward.tile.n)
    assert forward.bytes_read == 2 * (m * k + n * k + n)
    assert forward.bytes_written == 2 * m * n + 4 * m * tiles_n + 4 * m
    parameters = (n * k + n) * (2 + 8)
    assert update.bytes_written == parameters + 4 * m + 4
    assert update.bytes_read == 2 * (m * k + m * n) + parameters + 4 * m * (tiles_n + 1) + 4 * m + 4
    least = 2 * m * k * n
    for launch in (forward, update):
        assert least <= launch.flops <= 1.3 * least  # padding of tiles
        assert launch.bytes_requested >= launch.bytes_read * 0.9


@pytest.mark.parametrize("shape", [(256, 784, 2000), (512, 2000, 2000), (4096, 2000, 2000), (8192, 2000, 2000)])
def test_a_step_moves_little_more_than_it_must(shape):
    m, k, n = shape
    least = 2 * (m * k + n * k + n + m * n) + 2 * (m * k + m * n) + 2 * (n * k + n) * 10
    for arch in ("sm_80", "sm_90", "sm_100"):
        launches = plan.plan("ff_step_", Layer(m, k, n), arch)
        assert len(launches) == 2
        assert sum(launch.bytes_read + launch.bytes_written for launch in launches) <= 1.15 * least


# ---------------------------------------------------------------------------------------------------------------------
# Measured tiles


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(tiles, "measured_forward", {})
    monkeypatch.setattr(tiles, "measured_update", {})
    monkeypatch.setattr(tune, "_loaded", set())
    yield
    plan.plan.cache_clear()


def test_the_fastest_tile_is_kept_and_used(fresh):
    table, options = tiles.measured_forward, list(candidates("sm_90", "16bit"))
    shape = (100, 200, 300, "16bit")

    def timer(run):
        return {options[0]: 3.0, options[1]: 1.0}.get(table[shape], 2.0)

    tune._fastest(table, shape, options, lambda: None, timer)
    assert table == {shape: options[1]}
    assert tiles.choose(DEVICES["sm_90"], *shape[:3], "16bit", 2) == options[1]
    assert plan.plan("ff_forward", Layer(100, 300, 200), "sm_90")[0].tile == options[1]


def test_a_tile_that_fails_is_passed_over(fresh):
    options = list(candidates("sm_90", "16bit"))

    def timer(run):
        if tiles.measured_forward[1, 2, 3, "16bit"] == options[0]:
            raise RuntimeError("out of resource: shared memory")
        return 1.0

    tune._fastest(tiles.measured_forward, (1, 2, 3, "16bit"), options, lambda: None, timer)
    assert tiles.measured_forward[1, 2, 3, "16bit"] == options[1]


def test_no_tile_at_all_is_an_error_and_leaves_nothing(fresh):
    def timer(run):
        raise RuntimeError("no device")

    with pytest.raises(RuntimeError, match="no tile runs"):
        tune._fastest(tiles.measured_forward, (1, 2, 3, "16bit"), [Tile(64, 64, 64, 4, 4)], lambda: None, timer)
    assert not tiles.measured_forward


def test_measured_tiles_outlive_the_process(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path))
    path = tune.cache_file("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "tiles-nvidia-h100-80gb-hbm3.json"
    tiles.measured_forward[1, 2, 3, "16bit"] = Tile(64, 64, 64, 4, 4)
    tiles.measured_update[4, 5, 6, "tf32"] = (Tile(32, 64, 32, 4, 4), 8)
    tune.save(path)
    assert len(json.loads(path.read_text())) == 2
    before = dict(tiles.measured_forward), dict(tiles.measured_update)
    tiles.measured_forward.clear()
    tiles.measured_update.clear()
    tune.load(path)
    assert (tiles.measured_forward, tiles.measured_update) == before
    path.write_text("not json")
    tune.load(path)
    assert (tiles.measured_forward, tiles.measured_update) == before


def test_tuning_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("FFKERNELS_AUTOTUNE", raising=False)
    assert not tune.enabled()
    monkeypatch.setenv("FFKERNELS_AUTOTUNE", "1")
    assert tune.enabled()


def test_times_are_taken_on_the_tensors_device(fresh, monkeypatch):
    """do_bench takes events of the current device, which need not be the tensors'."""
    on = []

    @contextlib.contextmanager
    def using(given):
        on.append(given)
        yield
        on.pop()

    def timer(run):
        assert on == [like.device]
        return 1.0

    monkeypatch.setattr(torch.cuda, "device", using)
    like = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, is_cuda=True)
    tune.measure(Layer(20, 24, 18, "float32"), DEVICES["sm_90"], like, timer)
    assert len(tiles.measured_forward) == len(tiles.measured_update) == 1


def test_a_cache_that_cannot_be_written_is_a_warning(fresh, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FFKERNELS_CACHE", str(tmp_path / "file"))  # no folder
    monkeypatch.setattr(tune, "measure", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    with pytest.warns(UserWarning, match=r"for this process only: .*file/tiles-nvidia-h100.json cannot be written"):
        tune.ensure(Layer(20, 24, 18), DEVICES["sm_90"], SimpleNamespace(device=None, is_cuda=True))


# ---------------------------------------------------------------------------------------------------------------------
# The device


def test_a_cpu_is_no_gpu_unless_one_stands_in(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="CUDA and HIP tensors, not on cpu"):
        device.describe(torch.device("cpu"))
    with device.stand_in("sm_90") as found:
        assert device.describe(torch.device("cpu")) is found
        assert device.unavailable() is None
    assert device.stand_ins() == ()


def test_a_hip_device_is_known_by_its_gcn_name(monkeypatch):
    """As torch's HIP builds tell it: the device type is "cuda"."""
    properties = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=304, major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    device._of_index.cache_clear()
    try:
        assert device.describe(torch.device("cuda", 0)) == DEVICES["gfx942"]
    finally:
        device._of_index.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "missing", lambda: None)
    monkeypatch.setattr(device, "no_start", lambda: None)
    assert device.unavailable() is None, "no compute capability is asked for"


def test_why_it_is_unavailable(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "missing", lambda: None)
    assert device.unavailable() == "there is no CUDA or HIP device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert device.unavailable() == "the GPU is older than sm_80"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(device, "no_start", lambda: "no compiler")
    assert device.unavailable() == "no compiler"
    monkeypatch.setattr(device, "missing", lambda: "triton is not installed")
    assert device.unavailable() == "triton is not installed"


def test_a_driver_that_does_not_start_is_a_reason(monkeypatch):
    """Here for want of a GPU; on a machine that has one, of a C compiler or Python's headers."""
    runtime = pytest.importorskip("triton.runtime")

    class Driver:
        @property
        def active(self):
            raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(runtime, "driver", Driver())
    reason = device.no_start.__wrapped__()
    assert reason.startswith("Triton does not start (it needs a C compiler, Python.h")
    assert reason.endswith("RuntimeError: Failed to find C compiler.")


def test_shared_memory_of_the_devices_is_their_architectures():
    for found in DEVICES.values():
        assert found.shared <= found.shared_sm
        assert math.isclose(found.shared / KIB, round(found.shared / KIB))
