"""Tests that need a GPU, on a pretended one (pretend_gpu.py): their Python, which nothing else runs without a GPU.

All of them: PYTHONPATH=tests python -m pytest -p pretend_gpu -m gpu -k "not threads and not beside"
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
FILES = ("test_gpu.py", "test_capture.py", "test_dropout.py", "test_minibatches.py")
MIXED = """
import pytest
import torch

def test_devices_are_not_mixed():
    x, y = torch.ones(3, device="cuda"), torch.ones(3)
    assert x.is_cuda and not y.is_cuda and (x + 1).device == torch.device("cuda", 0)
    assert torch.equal(x.cpu() + y, (x + y.cuda()).cpu())
    with pytest.raises(RuntimeError, match="on cuda:0 and on cpu"):
        x + y
    with pytest.raises(TypeError, match="numpy"):
        x.numpy()

def test_a_graph_runs_again():
    x = torch.zeros(3, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = x.add_(1) * 2
    assert torch.equal(x.cpu(), torch.zeros(3))
    for i in range(1, 4):
        graph.replay()
        assert torch.equal(x.cpu(), torch.full((3,), 1.0 * i))
        assert torch.equal(y.cpu(), torch.full((3,), 2.0 * i))
"""

COLUMNS = """
import pytest
from ffkernels.benchmark import gpu
from ffkernels.benchmark.cases import Case
from ffkernels.benchmark.formats import FORMATS
from ffkernels.benchmark.measure import checked
from ffkernels.benchmark.problem import Problem

CASES = [Case(kind, 6, (40, 20)) for kind in ("step", "forward")]
CASES += [Case(kind, 6, (40, 20, 30)) for kind in ("network", "labels", "predict")]

@pytest.mark.parametrize("case", CASES, ids=lambda case: case.kind)
def test_columns(case):
    fmt = FORMATS["medium"]
    columns = gpu.columns(fmt)
    del columns["compile"]  # for which there must be a GPU
    timed, errors, left_out = checked(Problem(case, "cuda", fmt.dtype, gpu.INPUTS), columns)
    assert not left_out
    assert timed.keys() == {name for name, column in columns.items() if column.has(case)}
    for column in timed.values():
        column.run()
"""

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")


def pretending(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "pretend_gpu", "-p", "no:cacheprovider", *arguments],
        capture_output=True, text=True, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout)[1])


def test_the_pretence_itself(tmp_path):
    (tmp_path / "test_mixed.py").write_text(MIXED)
    assert pretending(str(tmp_path / "test_mixed.py"), "-c", os.devnull, "--rootdir", str(tmp_path)) == 2


@pytest.mark.slow
def test_the_benchmarks_columns_are_right(tmp_path):
    """Those in CUDA graphs, too: their warm-up, reset and inputs in turns."""
    (tmp_path / "test_columns.py").write_text(COLUMNS)
    assert pretending(str(tmp_path / "test_columns.py"), "-c", os.devnull, "--rootdir", str(tmp_path)) == 5


@pytest.mark.slow
def test_tests_for_a_gpu_run():
    files = [str(HERE / name) for name in FILES]
    assert pretending(*files, "-m", "gpu", "-k", "not threads and not beside") > 80
