"""The CPU kernels on every instruction set of this machine against float64."""

import pytest
import torch

import ffkernels as ff


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.bfloat16, 2**-7), (torch.float32, 2**-20)])
@pytest.mark.parametrize("depth", [1, 3])
def test_rows_of_y_longer_than_a_strip_of_x(depth, dtype, allowed):
    """A row of y that must be converted or gathered has a place of its own, however few columns x has."""
    rows, cols = 100, 300
    x, y = torch.randn(rows, depth).to(dtype), torch.randn(cols, rows).to(dtype).T
    coef, weight = torch.randn(rows), torch.zeros(cols, depth, dtype=dtype)
    grad, _ = ff.ff_grad(x, y, coef, weight, normalize="none", precision="highest")
    exact = (2 * coef[:, None] * y).double().T @ x.double()
    assert (grad - exact).abs().max() <= allowed * exact.abs().max()
