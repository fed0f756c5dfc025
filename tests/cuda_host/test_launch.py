"""csrc/cuda/launch.cu, compiled by the C++ compiler against a runtime that writes down what it is asked for
(runtime/): which calls are made, in which order, on which stream, and what becomes of errors. It knows of CUDA what
that runtime was written to know, and proves no more."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

from .gpu import MATHS, SOURCES, shared_bytes

RUNTIME = Path(__file__).parent / "runtime"
MAJOR, MINOR, MULTIPROCESSORS, COOPERATIVE, SHARED = 75, 76, 16, 95, 97  # cudaDeviceAttr
MALLOC_FAILED, NO_IMAGE, TOO_LARGE = 2, 209, 720
GLOBAL = 0  # the capture mode in which every thread starts
PER_THREAD = 2  # cudaStreamPerThread
KIB = 1024


class Host:
    """The launcher in a library of its own; each test has one, since it remembers devices and streams."""

    def __init__(self, path):
        self.library = ctypes.CDLL(str(path))
        for name in ("take_calls", "device", "words", "stream", "launch"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for which, value in {MAJOR: 9, MINOR: 0, MULTIPROCESSORS: 132, COOPERATIVE: 1, SHARED: 227 * KIB}.items():
            self.library.set_attribute(which, value)

    def calls(self):
        return [line.split() for line in self.library.take_calls().decode().splitlines()]

    def _checked(self, message):
        if message:
            raise RuntimeError(message.decode())

    def device(self, index):
        numbers = (ctypes.c_int * 8)()
        self._checked(self.library.device(index, numbers))
        return list(numbers)

    def words(self, index, stream, count):
        at = ctypes.c_uint64()
        self._checked(self.library.words(index, ctypes.c_uint64(stream), ctypes.c_int64(count), ctypes.byref(at)))
        return at.value

    def stream(self, index):
        self._checked(self.library.stream(index))

    def launch(self, stream):
        self._checked(self.library.launch(ctypes.c_uint64(stream)))

    def fail(self, call, error):
        self.library.fail(call.encode(), error)


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    source = folder / "launch.cpp"
    source.write_text(f'#include "{SOURCES / "cuda" / "launch.cu"}"\n')
    command = [*shlex.split(os.environ.get("CXX", "c++")), "-std=c++17", "-O0", "-fPIC", "-shared"]
    command += ["-I", str(RUNTIME), "-I", str(SOURCES), str(source), str(RUNTIME / "runtime.cpp")]
    command += [str(SOURCES / "cuda" / "plan.cpp"), "-ldl", "-o", str(folder / "launch.so")]
    subprocess.run(command, check=True)
    return folder / "launch.so"


@pytest.fixture
def host(library, tmp_path):
    copy = tmp_path / "launch.so"  # a file that is loaded already would be the same library again
    copy.write_bytes(library.read_bytes())
    return Host(copy)


def test_a_device_is_looked_up_once_and_its_kernels_get_their_shared_memory_first(host):
    assert host.device(1) == [90, 132, 1, 3, 3, 3, 3, 3]
    asked = [call for call in host.calls() if call[0] in ("allow", "occupancy")]
    expected = []
    for math in MATHS:
        expected += [["allow", math, str(shared_bytes(math))], ["occupancy", math, "128", str(shared_bytes(math))]]
    assert asked == expected
    host.device(1)
    assert host.calls() == []
    host.device(0)
    assert {call[1] for call in host.calls() if call[0] == "attribute"} == {"0"}


def test_a_device_without_the_shared_memory_holds_no_block(host):
    host.library.set_attribute(SHARED, 48 * KIB)
    assert host.device(0)[3:] == [0] * 5


def test_a_lookup_that_fails_is_named_and_done_again(host):
    host.fail("allow", NO_IMAGE)
    with pytest.raises(RuntimeError, match="kernel ff_stages_bf16 on this GPU: cudaErrorName: what it means"):
        host.device(0)
    assert host.library.last_error() == 0  # nobody else is told of it
    host.fail("", 0)
    assert host.device(0)[3:] == [3] * 5


def test_words_belong_to_a_stream_and_are_zeroed_there(host):
    first = host.words(0, 0, 100)
    assert host.calls() == [["malloc", str(4 << 14)], ["memset", str(first), "0", str(4 << 14), "0"]]
    assert host.words(0, 0, 1 << 14) == first
    assert host.calls() == []
    others = {first, host.words(0, 0x1000, 100), host.words(1, 0, 100)}
    assert len(others) == 3
    assert [call[4] for call in host.calls() if call[0] == "memset"] == [str(0x1000), "0"]


def test_words_grow_by_doubling_at_least(host):
    first = host.words(0, 0, 1)
    second = host.words(0, 0, (1 << 14) + 1)
    assert second != first
    assert [call[1] for call in host.calls() if call[0] == "malloc"] == [str(4 << 14), str(4 << 15)]


def test_no_words_for_a_graph_or_for_many_streams(host):
    host.library.set_capturing(0x2000)
    assert host.words(0, 0x2000, 100) == 0
    assert host.words(0, PER_THREAD, 100) == 0
    assert host.calls() == []


def test_memory_that_cannot_be_had_is_asked_for_again(host):
    host.fail("malloc", MALLOC_FAILED)
    with pytest.raises(RuntimeError, match="cudaMalloc of a workspace"):
        host.words(0, 0, 100)
    assert host.library.last_error() == 0
    host.fail("", 0)
    assert host.words(0, 0, 100) != 0


def test_another_threads_capture_neither_fails_nor_is_broken(host):
    """torch captures in the mode that forbids every thread to allocate: an attempt would break that capture, too."""
    host.library.set_other_captures(1)
    assert host.device(0)[3:] == [3] * 5
    assert host.words(0, 0, 100) != 0
    assert host.library.capture_mode() == GLOBAL
    host.fail("malloc", MALLOC_FAILED)
    with pytest.raises(RuntimeError, match="cudaMalloc"):
        host.words(0, 0x1000, 100)
    assert host.library.capture_mode() == GLOBAL


def test_launches_go_to_the_stream_and_are_cooperative_where_asked(host):
    host.launch(0x3000)
    assert host.calls() == [
        ["launch", "bf16", "7", "128", str(shared_bytes("bf16")), "1", str(0x3000), "0", "2"],
        ["launch", "fp16", "5", "128", str(shared_bytes("fp16")), "0", str(0x3000), "2", "3"],
    ]


def test_a_refused_launch_says_what_it_was_and_ends_the_call(host):
    host.fail("launch", TOO_LARGE)
    message = "ff_step_ of 128 x 784 -> 500: launch of ff_stages_bf16 on 7 blocks of 128 threads: cudaErrorName"
    with pytest.raises(RuntimeError, match=message):
        host.launch(0)
    assert len(host.calls()) == 1
    assert host.library.last_error() == 0


@pytest.mark.skipif(torch.version.cuda is not None, reason="for a torch without CUDA")
def test_without_a_cuda_torch_there_is_no_stream(host):
    with pytest.raises(RuntimeError, match="torch is not a CUDA build, or not loaded"):
        host.stream(0)
