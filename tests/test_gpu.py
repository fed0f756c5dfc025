"""What only a GPU has: streams, graphs, threads that launch side by side, a second GPU."""

from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch

import ffkernels as ff
from ffkernels import backends

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SLEEP = 50_000_000  # clocks of a GPU: about 30 ms


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if (reason := backends.unavailable(request.param)) is not None:
        pytest.skip(reason)
    with ff.use_backend(request.param):
        yield request.param


each_op = pytest.mark.parametrize("op", cases.OPS)


def arguments(op, device="cuda", seed=0):
    """Larger than a tile each way, so that blocks have something to wait for."""
    return cases.arguments(op, rows=150, depth=200, cols=130, device=device, seed=seed)


def outcome(results, given):
    """All that a call gives and changes."""
    results = {"result": results} if isinstance(results, torch.Tensor) else results or {}
    return cases.tensors(results, "result ") | cases.tensors(given)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name].cpu(), expected[name].cpu()), name


@each_op
def test_an_op_runs_on_the_current_stream(op, backend):
    """Its x is not there yet, and no other stream waits for it."""
    given = arguments(op)
    twin, late = cases.copied(given), cases.copied(given)
    late["x"].zero_()
    expected = outcome(cases.call(op, twin), twin)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP)
        late["x"].copy_(given["x"])
        found = outcome(cases.call(op, late), late)
    stream.synchronize()
    assert_same(found, expected)


@each_op
def test_replays_of_a_graph_are_calls(op, backend):
    given = arguments(op)
    twin = cases.copied(given)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        cases.call(op, cases.copied(given))  # compiles, and allocates what a capture must not
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = cases.call(op, given)
    for _ in range(3):
        graph.replay()
        expected = outcome(cases.call(op, twin), twin)
        assert_same(outcome(results, given), expected)


def test_threads_on_streams_of_their_own(backend):
    """They share what the backend keeps from call to call."""

    def train(seed):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            given = arguments("ff_network_step_", seed=seed)
            for _ in range(20):
                results = cases.call("ff_network_step_", given)
        stream.synchronize()
        return outcome(results, given)

    alone = [train(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(train, range(4)))
    for found, expected in zip(together, alone, strict=True):
        assert_same(found, expected)


def test_a_first_call_beside_another_threads_capture(backend):
    """It allocates and loads kernels, which torch's way of capturing forbids to all threads."""
    captured, beside = arguments("ff_step_"), arguments("ff_step_")
    cases.call("ff_step_", cases.copied(captured))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for size in (1 << 10, 8 << 20):  # torch's allocator itself may ask for nothing new meanwhile
            torch.empty(size, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()

    def call():
        with torch.cuda.stream(stream):
            return outcome(cases.call("ff_step_", beside), beside)

    graph = torch.cuda.CUDAGraph()
    with ThreadPoolExecutor(1) as pool:
        with torch.cuda.graph(graph):
            results = cases.call("ff_step_", captured)
            found = pool.submit(call).result()
        torch.cuda.synchronize()
    graph.replay()
    assert_same(found, outcome(results, captured))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a GPU beside the first")
@each_op
def test_the_tensors_device_need_not_be_the_current_one(op, backend):
    expected, given = arguments(op, "cuda:0"), arguments(op, "cuda:1")
    expected = outcome(cases.call(op, expected), expected)
    found = outcome(cases.call(op, given), given)
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda", 1) for t in found.values())
    assert_same(found, expected)
