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
        y = x * 2
    for i in range(3):
        x.fill_(i)
        graph.replay()
        assert i == 0 or torch.equal(y.cpu(), torch.full((3,), 2.0 * i))
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
def test_tests_for_a_gpu_run(tmp_path):
    files = [str(HERE / name) for name in FILES]
    assert pretending(*files, "-m", "gpu", "-k", "not threads and not beside") > 80
