"""The model of many devices: against cases that are worked out by hand, and its own limits."""

import dataclasses

import pytest

from ffkernels.benchmark import scale
from ffkernels.cost import DEVICES

H100 = DEVICES["H100"]
NET = scale.Net((4096,) * 9, 4096)


def test_all_reduce_by_hand():
    assert scale.all_reduce(1e9, 1) == 0
    assert scale.all_reduce(1e9, 2) == pytest.approx(1e9 / 450e9 + 2 * 3e-6)
    assert scale.all_reduce(1e9, 16) == pytest.approx(2 * 15 / 16 * 1e9 / 50e9 + 8 * 8e-6)


def test_a_layers_time_by_hand():
    device = dataclasses.replace(H100, rates={"bf16": 1e14}, bandwidth=1e12, launch_seconds=1e-6)
    assert scale.seconds(1e12, 1e9, 2, device) == pytest.approx(1e12 / 0.5e14 + 2e-6)  # half of the peak
    assert scale.seconds(1e6, 1e9, 1, device) == pytest.approx(1e-3 + 1e-6)  # memory is slower
    assert NET.gradient_bytes(0) == 4096 * 4096 * 2


def test_one_device_computes_and_no_more():
    for kind in ("ff", "bp"):
        work = sum(f + r for f, r in scale.layer_times(NET, kind, NET.images, H100))
        assert scale.data_parallel(NET, kind, 1, H100) == pytest.approx(work)
        assert scale.pipeline(NET, kind, 1, 1, H100) == pytest.approx(work)


def test_ff_does_four_units_of_work_and_backpropagation_three():
    large = scale.Net((16384,) * 3, 65536)  # arithmetic alone
    times = {k: scale.layer_times(large, k, large.images, H100)[1] for k in ("ff", "bp")}
    assert sum(times["ff"]) / sum(times["bp"]) == pytest.approx(4 / 3, rel=0.01)


def test_ff_hides_every_reduction_that_backpropagation_shows():
    """Where the wires are quicker than the arithmetic, FF takes its arithmetic; backpropagation waits for layer 1."""
    net = scale.Net((4096,) * 9, 1 << 17)
    for devices in (2, 8):
        for kind in ("ff", "bp"):
            work = sum(f + r for f, r in scale.layer_times(net, kind, net.images / devices, H100))
            extra = scale.data_parallel(net, kind, devices, H100) - work
            first = scale.all_reduce(net.gradient_bytes(0), devices)
            assert extra == pytest.approx(0 if kind == "ff" else first, abs=1e-9)


def test_slow_wires_bound_both():
    devices = 1024
    wires = sum(scale.all_reduce(NET.gradient_bytes(i), devices) for i in range(NET.layers))
    for kind in ("ff", "bp"):
        assert scale.data_parallel(NET, kind, devices, H100) >= wires * 0.999
    assert scale.data_parallel(NET, "ff", devices, H100) == pytest.approx(wires, rel=0.01)


def test_the_bubble():
    for kind, expected in (("ff", 1.0), ("bp", (8 + 3) / 8)):
        stage = scale.stage_times(NET, kind, 4, NET.images / 8, H100)[0]
        found = scale.pipeline(NET, kind, 4, 8, H100)
        hops = (8 + 3) * 2 * (NET.images / 8 * 4096 * 2 / 450e9 + 3e-6) if kind == "bp" else 0
        assert found - hops == pytest.approx(8 * expected * stage)
    assert scale.activations("bp", 4, 8, "gpipe") == 8
    assert scale.activations("bp", 4, 8) == 4
    assert scale.activations("ff", 4, 8) == 1


@pytest.mark.parametrize("kind", ["ff", "bp"])
def test_pipelines_share_a_minibatch(kind):
    """Two pipelines of four stages: half of the images each, and every stage's gradients are summed over both."""
    net = scale.Net((4096,) * 9, 1 << 17)
    stage = sum(f + r for f, r in scale.layer_times(net, kind, net.images / 16, H100)) / 4
    found, rows = scale.pipeline(net, kind, 4, 8, H100, replicas=2), net.images / 16
    hop = rows * 4096 * 2 / 450e9 + 3e-6
    reduce = scale.all_reduce(2 * net.gradient_bytes(0), 2)
    assert found == pytest.approx(8 * stage if kind == "ff" else 11 * (stage + 2 * hop) + reduce)


def test_slow_wires_bound_an_ff_pipeline():
    narrow = scale.Net((512,) * 17, 1 << 16)  # little arithmetic for each value sent
    hop = 2 * narrow.images / 8 * 512 * 2 / 50e9 + 8e-6
    assert scale.pipeline(narrow, "ff", 16, 8, H100) == pytest.approx(8 * hop)
    few = scale.Net((8192,) * 3, 64)  # few images for each weight
    reduce = scale.all_reduce(few.gradient_bytes(0), 32)
    assert scale.pipeline(few, "ff", 2, 1, H100, replicas=32) == pytest.approx(reduce)


def test_a_pipeline_has_no_more_stages_than_layers():
    for kind in ("ff", "bp"):
        assert scale.best_of_both(scale.Net((4096, 4096, 4096), 1 << 16), kind, 64, H100)[1] <= 2


def test_the_table():
    rows = scale.table(NET, (1, 8, 64, 4096))
    assert [r["devices"] for r in rows] == [1, 8, 64, 4096]
    for row in rows:
        for kind in ("ff", "bp"):
            single = [row[f"{kind} {how}"] for how in ("data", "pipeline") if f"{kind} {how}" in row]
            assert row[f"{kind} both"] <= min(single) * 1.0001
    assert "ff pipeline" not in rows[2]  # 64 devices, 8 layers


def test_stages_that_share_cores():
    assert scale.pipeline_on_cores([1.0], 2, 30) == pytest.approx(1)
    assert scale.pipeline_on_cores([0.5, 0.5], 2, 1) == pytest.approx(1)  # nothing is side by side
    assert scale.pipeline_on_cores([0.5, 0.5], 2, 9) == pytest.approx(9 / 5)  # 8 times half of it, and the first one
    assert scale.pipeline_on_cores([0.25] * 4, 2, 10**6) == pytest.approx(2, rel=1e-5)
    assert scale.pipeline_on_cores([0.25] * 4, 8, 10**6) == pytest.approx(4, rel=1e-5)
    assert scale.pipeline_on_cores([0.8, 0.2], 2, 10**6) == pytest.approx(1.25, rel=1e-5)
