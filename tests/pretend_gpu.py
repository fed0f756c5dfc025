"""A pytest plugin that pretends there is a GPU: the tests that need one run as far as their Python goes.

    pytest -p pretend_gpu -m gpu        with tests/ on PYTHONPATH

Tensors say that they are on cuda:0 and hold a tensor of the CPU, on which all is computed: ffkernels' ops, whichever
backend is asked for, by the reference. An operation on tensors of both devices raises, as it would on a GPU. Streams
are none. A capture changes nothing, and a replay runs what was captured. Threads that a test starts do not pretend.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from ffkernels import backends, minibatches

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
PROPERTIES = SimpleNamespace(name="pretended", major=9, minor=0, multi_processor_count=132)


class OnGpu(torch.Tensor):
    """A tensor that says so."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=GPU
        )

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return Pretended().__torch_function__(function, types, args, kwargs)


class Graph:
    """A CUDA graph: what ran between begin and end of its capture, with the results' memory."""

    capturing = None

    def __init__(self):
        self.calls, self.before = [], []

    @contextlib.contextmanager
    def capture(self, stream=None):
        Graph.capturing = self
        yield
        Graph.capturing = None
        for t, value in reversed(self.before):  # a capture on a GPU runs nothing
            t.copy_(value)

    def run(self, function, args, kwargs):
        self.before += [(t, t.clone()) for t in _tensors((args, kwargs)) if 0 not in t.stride()]
        results = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, results))
        return results

    def replay(self):
        for function, args, kwargs, results in self.calls:
            for old, new in zip(_tensors(results), _tensors(function(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def __init__(self, *_):
        pass

    def wait_stream(self, other):
        pass

    def synchronize(self):
        pass


def _tensors(value):
    return [t for t in tree_flatten(value)[0] if isinstance(t, torch.Tensor)]


def _run(function, args, kwargs):
    return function(*args, **kwargs)


def _names(device, value):
    return (isinstance(value, torch.device) and value.type == device.type) or (
        isinstance(value, str) and value.split(":")[0] == device.type
    )


class Pretended(TorchFunctionMode):
    """Every function of torch goes through here."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        values, _ = tree_flatten((args, kwargs))
        pretended = [t for t in values if isinstance(t, OnGpu)]
        if name == "__get__" and pretended:
            known = {"device": GPU, "is_cuda": True, "is_cpu": False}
            if function.__self__.__name__ in known:
                return known[function.__self__.__name__]
        if name == "_has_compatible_shallow_copy_type":
            return False
        if name == "cuda":
            return args[0] if pretended else OnGpu(args[0].detach().clone())
        to_gpu, to_cpu = (any(_names(device, v) for v in values) for device in (GPU, CPU))
        if not (pretended or to_gpu) or function is torch.device or name in ("_make_wrapper_subclass", "__repr__"):
            return function(*args, **kwargs)
        others = [t for t in values if isinstance(t, torch.Tensor) and not isinstance(t, OnGpu)]
        if pretended and name not in ("to", "copy_") and any(t.dim() for t in others):
            raise RuntimeError(f"{function} of tensors on cuda:0 and on cpu")
        if pretended and name in ("numpy", "__array__", "data_ptr"):
            raise TypeError(f"{name} of a tensor on cuda:0")
        return self._computed(function, name, args, kwargs, pretended, to_gpu or not (to_cpu or name == "cpu"))

    def _computed(self, function, name, args, kwargs, pretended, on_gpu):
        def held(value):
            return value.held if isinstance(value, OnGpu) else CPU if _names(GPU, value) else value

        if isinstance(function, torch._ops.OpOverload) and function.namespace == "ffkernels":
            op = function._schema.name.removeprefix("ffkernels::")
            function = getattr(torch.ops.ffkernels, op).reference
            if op == "ff_network_step_":
                function = minibatches.one_by_one(function, lambda *_: None)
        args, kwargs, own = tree_map(held, args), tree_map(held, kwargs), {id(t.held): t for t in pretended}
        results = (Graph.capturing.run if Graph.capturing else _run)(function, args, kwargs)

        def given(value):
            if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu):
                return value
            if not on_gpu:
                return value.clone() if id(value) in own else value
            return own[id(value)] if id(value) in own else OnGpu(value)

        return tree_map(given, results)


def pytest_configure():
    """Before tests are collected, which ask for a GPU then."""
    nothing = contextlib.nullcontext
    replaced = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "get_device_capability": lambda *_: (9, 0), "get_device_properties": lambda *_: PROPERTIES,
        "is_current_stream_capturing": lambda: False, "synchronize": lambda *_: None, "_sleep": lambda _: None,
        "Stream": Stream, "current_stream": Stream, "stream": lambda _: nothing(), "device": lambda _: nothing(),
        "CUDAGraph": Graph, "graph": lambda graph, stream=None: graph.capture(stream),
    }  # fmt: skip
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
    for name in ("triton", "cuda"):
        backends._UNAVAILABLE[name] = lambda: None


@pytest.fixture(autouse=True)
def _pretend():
    with Pretended():
        yield
