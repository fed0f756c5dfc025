"""FFNet.capture: on a GPU as it is, elsewhere with stand-ins for torch's graphs."""

import contextlib

import pytest
import torch

import ffkernels as ff
from ffkernels import capture

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Graph:
    """A graph that runs again what ran while it was captured."""

    def __init__(self):
        self.replays = 0

    def replay(self):
        self.replays += 1


class Stream:
    def __init__(self, device=None):
        self.device = device

    def wait_stream(self, other):
        pass


@pytest.fixture
def stand_ins(monkeypatch):
    monkeypatch.setattr(capture, "on_gpu", lambda t: True)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    captured_on = []

    def graph(captured, stream=None):
        captured_on.append(stream)
        return contextlib.nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", graph)
    return captured_on


def network(**options):
    torch.manual_seed(0)
    return ff.FFNet.from_sizes([12, 8, 6], num_classes=3, **options)


def inputs():
    x = torch.rand(5, 12)
    labels = torch.arange(5) % 3
    return x, labels, (labels + 1) % 3


@pytest.mark.parametrize("labelled", [True, False])
def test_capturing_trains_nothing_but_what_the_graph_holds(stand_ins, labelled):
    net, twin = network(), network()
    given = inputs() if labelled else (torch.rand(5, 12), torch.rand(4, 12))
    step = net.capture(*given)
    (twin.label_step if labelled else twin.step)(*given)  # the stand-in of a capture runs once
    for (name, t), other in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(t, other), name
    result = step(*given)
    assert step._graph.replays == 1
    assert result.loss.shape == (2,)


def test_the_capture_is_on_the_inputs_device(stand_ins):
    given = inputs()
    network().capture(*given)
    assert [stream.device for stream in stand_ins] == [given[0].device]


def test_inputs_are_copied_to_where_the_graph_reads_them(stand_ins):
    net = network()
    x, pos, neg = inputs()
    step = net.capture(x, pos, neg)
    step(x + 1, pos, neg)
    assert torch.equal(step._inputs[0], x + 1)
    assert step._inputs[0].data_ptr() != x.data_ptr()


def test_a_failed_warm_up_leaves_the_network_as_it_was(stand_ins, monkeypatch):
    net = network()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    plain = net.label_step

    def failing(*args):
        plain(*args)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(net, "label_step", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        net.capture(*inputs())
    for name, t in net.state_dict().items():
        assert torch.equal(t, before[name]), name


def test_wrong_inputs_are_named(stand_ins):
    net = network()
    step = net.capture(*inputs())
    x, pos, neg = inputs()
    with pytest.raises(TypeError, match="captured with 3 inputs, got 2"):
        step(x, pos)
    with pytest.raises(ValueError, match=r"input 0 must be torch.float32 \(5, 12\) as captured, got .*\(4, 12\)"):
        step(x[:4], pos, neg)
    with pytest.raises(TypeError, match="got 1 tensors"):
        net.capture(x)
    with pytest.raises(TypeError, match="inputs must be tensors, got list as number 1"):
        net.capture(x, [1])


def test_a_cpu_has_no_graphs():
    with pytest.raises(RuntimeError, match="input 0 is on cpu"):
        network().capture(*inputs())


@GPU
@pytest.mark.parametrize("options", [{}, {"peer": 0.1}], ids=["plain", "peer"])
def test_a_captured_step_is_the_step(options):
    net, twin = network(**options).cuda(), network(**options).cuda()
    given = [t.cuda() for t in inputs()]
    step = net.capture(*given)
    for _ in range(3):
        result = step(*given)
        expected = twin.label_step(*given)
        assert torch.equal(result.loss, expected.loss)
    for (name, t), other in zip(net.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(t, other), name
