"""The CPU kernels and memory: edited weights are noticed, steps allocate nothing, too little of it changes nothing."""

import ctypes
import platform
from pathlib import Path

import cases
import pytest
import torch
import twin

import ffkernels as ff
from ffkernels import _extension

pytestmark = pytest.mark.skipif(_extension.unavailable() is not None, reason=f"{_extension.unavailable()}")

slow = pytest.mark.slow
ISAS = (_extension.cpu_isa() or {"available": []})["available"]


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CPU_ISA", request.param)
    with ff.use_backend("cpu"):
        yield request.param


# ---------------------------------------------------------------------------------------------------------------------
# No copy of the weights outlives a call


def in_place(layer, value):
    with torch.no_grad():
        layer.weight.copy_(value)


def through_data(layer, value):
    layer.weight.data[:] = value


def through_numpy(layer, value):
    layer.weight.detach().numpy()[:] = value.numpy()


def loaded(layer, value):
    layer.load_state_dict(layer.state_dict() | {"weight": value})


def replaced(layer, value):
    layer.weight = torch.nn.Parameter(value.clone(), requires_grad=False)


def one_element(layer, value):
    value[:] = layer.weight.detach()
    value[3, 5] += 2
    layer.weight.data[3, 5] += 2


@pytest.mark.parametrize("edit", [in_place, through_data, through_numpy, loaded, replaced, one_element])
@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_edited_weights_are_noticed(isa, precision, edit):
    """The layer computes as one that has never seen other weights."""
    x = torch.rand(40, 50)
    layer = ff.FFLinear(50, 60, precision=precision, optimizer=ff.SGD(lr=0.1))
    layer.step(x[:20], x[20:])
    layer(x)
    before = layer(x).clone()
    value = torch.randn(60, 50)
    edit(layer, value)
    fresh = ff.FFLinear(50, 60, precision=precision, optimizer=ff.SGD(lr=0.1))
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, value)
    assert not torch.equal(layer(x), before)
    for _ in range(2):
        assert torch.equal(layer(x), fresh(x))
        for a, b in zip(layer.step(x[:20], x[20:]), fresh.step(x[:20], x[20:]), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(layer.weight, fresh.weight)


# ---------------------------------------------------------------------------------------------------------------------
# Steady state


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets a variable of glibc's malloc")
@pytest.mark.parametrize("op", ["ff_network_step_", "ff_label_step_"])
def test_steps_allocate_nothing_large(op):
    """With malloc told to map whatever has 64 KiB or more, each new block costs page faults. In 500 steps there are
    none but for what the process does beside; the outputs are smaller here."""
    script = """if True:
        import resource, sys, torch, ffkernels as ff
        op, x, adam = sys.argv[1], torch.rand(128, 200), ff.Adam()
        sign, labels = torch.tensor([1.0, -1.0]).repeat(64), torch.arange(60) % 10
        layers = [ff.FFLinear(k, n, optimizer=adam, precision="medium") for k, n in ((200, 150), (150, 220))]
        weight = torch.randn(100, 200)
        state = adam.init_state(weight)

        def step():
            if op == "ff_network_step_":
                return ff.ff_network_step_(x, sign, layers)
            return ff.ff_label_step_(x[:60], labels, labels.flip(0), weight, None, state, adam, num_classes=10)

        def faults():
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

        for _ in range(50):
            step()
        before = faults()
        for _ in range(500):
            step()
        print(faults() - before)
    """
    assert int(twin.python(script, op, MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TOP_PAD_="0")) < 200


# ---------------------------------------------------------------------------------------------------------------------
# Out of memory


@pytest.mark.skipif(platform.system() != "Linux", reason="limits its address space")
@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=slow if op != "ff_network_step_" else ()) for op in cases.IN_PLACE]
)
def test_out_of_memory_changes_nothing(op):
    """With so little memory that outputs, scratch memory or, in a network, the second layer's have no room. With enough
    the same call goes through."""
    script = """if True:
        import resource, sys, torch, ffkernels as ff
        op, tests = sys.argv[1:]
        sys.path.insert(0, tests)
        import cases
        torch.set_num_threads(1)
        rows, depth, cols = (2600, 30, 4000) if op == "ff_network_step_" else (2600, 4000, 500)
        given = cases.arguments(op, rows=rows, depth=depth, cols=cols)
        if op == "ff_network_step_":  # the first layer needs little, the second much
            w = torch.randn(500, cols)
            given["layers"][1] = ff.FFLayer(w, None, ff.Adam().init_state(w), ff.Adam())
        cases.call(op, cases.arguments(op))  # loads what a first call loads
        written = {n: given[n] for n in ("weight", "bias", "state", "layers") if n in given}
        before, failures = cases.tensors(cases.copied(written)), 0
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        for extra in range(0, 100, 8):
            resource.setrlimit(resource.RLIMIT_AS, (used + extra * 2**20, resource.RLIM_INFINITY))
            try:
                cases.call(op, given)
                break
            except (MemoryError, RuntimeError) as error:
                assert "alloc" in str(error) or "empty_strided" in str(error), error
            finally:
                resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            failures += 1
            for name, t in cases.tensors(written).items():
                assert torch.equal(t, before[name]), (extra, name)
        else:
            cases.call(op, given)
        for name, t in cases.tensors(written).items():
            assert not torch.equal(t, before[name]), name
        print(failures)
    """
    assert int(twin.python(script, op, str(Path(__file__).parent))) >= 4


# ---------------------------------------------------------------------------------------------------------------------
# Arguments leave nothing behind


def heap_in_use():
    """Bytes that malloc has given out, from glibc."""
    info = type("mallinfo2", (ctypes.Structure,), {"_fields_": [(f"f{i}", ctypes.c_size_t) for i in range(10)]})
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = info
    return mallinfo2().f7  # uordblks


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
@pytest.mark.parametrize("op", ["ff_forward", "ff_network_step_"])
def test_a_call_leaks_nothing(op):
    """Strings above all, which torch's own conversion leaks, 50 bytes each: they tear the heap into pieces."""
    x, sign = torch.rand(4, 5), torch.tensor([1.0, -1.0, 1.0, -1.0])
    layers = [ff.FFLinear(5, 3, optimizer=ff.SGD(lr=0.1), peer=0.1), ff.FFLinear(3, 4, optimizer=ff.SGD(lr=0.1))]
    weight, bias, sqnorm = torch.rand(3, 5), torch.rand(3), torch.rand(4)

    def call():
        if op == "ff_forward":
            ff.ff_forward(x, weight, bias, x_sqnorm=sqnorm)
        else:
            ff.ff_network_step_(x, sign, layers)

    with ff.use_backend("cpu"):
        for _ in range(50):
            call()
        before = heap_in_use()
        for _ in range(1000):
            call()
        assert heap_in_use() - before < 20_000
