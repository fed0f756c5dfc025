"""The CPU kernels and threads: the same bits for any number, several callers at once, the GIL, DataLoader workers."""

import os
import sys
import threading
import time

import cases
import pytest
import torch
import twin
from torch.utils.data import DataLoader, Dataset

import ffkernels as ff
from ffkernels import _extension

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason=f"{_extension.unavailable()}")

ISAS = (_extension.cpu_isa() or {"available": []})["available"]
# A core wants up to 2e7 flops for each thread. 1,100 rows are many for two threads and few for three.
FEW_ROWS, SOME_ROWS, MANY_ROWS = (100, 500, 550), (1100, 100, 250), (2600, 40, 260)


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CPU_ISA", request.param)
    with ff.use_backend("cpu"):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def arguments(op, shape, dtype=torch.float32, precision="medium", seed=0):
    rows, depth, cols = shape
    torch.manual_seed(seed)
    given = cases.arguments(op, rows=rows, depth=depth, cols=cols, dtype=dtype, optimizer="sgd-momentum", seed=seed)
    if op == "ff_network_step_":
        given["layers"] = [ff.FFLayer(**vars(record) | {"precision": precision}) for record in given["layers"]]
        return given
    return given | {"precision": precision}


def assert_same_bits(results, expected):
    assert results.keys() == expected.keys()
    for name in expected:
        assert torch.equal(results[name], expected[name]), name


def tasks():
    """How many threads this process has."""
    return len(os.listdir("/proc/self/task"))


@pytest.mark.parametrize("shape", [FEW_ROWS, SOME_ROWS, pytest.param(MANY_ROWS, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, p) for p in ("highest", "high", "medium")]
                         + [(torch.bfloat16, "medium")], ids=str)  # fmt: skip
@pytest.mark.parametrize("op", cases.OPS)
def test_same_bits_for_any_number_of_threads(isa, op, dtype, precision, shape, threads):
    given = arguments(op, shape, dtype, precision)
    threads(1)
    expected = twin.run(op, given)
    for number in (2, 3, 5, 2, 1):
        threads(number)
        assert_same_bits(twin.run(op, given), expected)


def test_as_many_threads_as_torch_is_told(threads):
    """In a process of its own, whose pool nothing has filled before."""
    script = """if True:
        import os, sys, torch, ffkernels as ff
        torch.set_num_threads(int(sys.argv[1]))
        x, w = torch.randn(512, 512), torch.randn(512, 512)
        before = len(os.listdir("/proc/self/task"))
        ff.ff_forward(x, w)
        print(len(os.listdir("/proc/self/task")) - before)
    """
    for number in (1, 3):
        assert int(twin.python(script, str(number))) == number - 1


def test_several_callers_at_once(isa):
    """Each python thread has its own weights and scratch memory; x is shared."""
    shapes = [(40 + 30 * i, 200, 150 + 20 * i) for i in range(4)]
    jobs = [[arguments("ff_step_", shapes[i], seed=i), 20] for i in range(4)]

    def steps(given, count):
        given = cases.copied(given)
        return [torch.cat([t.flatten().clone() for t in ff.ff_step_(**given)]) for _ in range(count)], given

    alone = [steps(*job) for job in jobs]
    together, start = [None] * 4, threading.Barrier(4)

    def work(i):
        start.wait()
        together[i] = steps(*jobs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for (outputs, after), (expected, expected_after) in zip(together, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected, strict=True))
        assert torch.equal(after["weight"], expected_after["weight"])


def test_python_runs_during_a_kernel(threads, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CPU_ISA", "portable")
    threads(1)
    x, weight, times = torch.randn(2000, 1000), torch.randn(1000, 1000), []

    def call():
        times.append(time.perf_counter())
        with ff.use_backend("cpu"):
            ff.ff_forward(x, weight, precision="highest")
        times.append(time.perf_counter())

    worker = threading.Thread(target=call)
    worker.start()
    ticks = []
    while worker.is_alive():
        ticks.append(time.perf_counter())
        time.sleep(1e-4)
    begin, end = times
    inside = [t for t in ticks if begin < t < end]
    gaps = [b - a for a, b in zip([begin, *inside], [*inside, end], strict=True)]
    assert max(gaps) < (end - begin) / 2, f"no python for {max(gaps):.3f} s of {end - begin:.3f} s"


class Stepping(Dataset):
    """Each item is made by a kernel's step."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        given = arguments("ff_step_", (300, 300, 300), seed=index)
        before = tasks()
        y, _, _ = ff.ff_step_(**given)
        return y, tasks() - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # two workers, where there is one core
def test_a_worker_of_a_data_loader_stays_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = [Stepping()[i][0] for i in range(4)]  # the parent's pool has threads, which a fork does not copy
    finally:
        torch.set_num_threads(before)
    loader = DataLoader(Stepping(), batch_size=None, num_workers=2, multiprocessing_context="fork")
    for (y, more), own in zip(loader, expected, strict=True):
        assert torch.equal(y, own)
        assert more == 0
