"""apply_gradient_: an optimizer's step from a gradient that is there already, on every backend that has it."""

import cases
import independent
import pytest
import torch

import ffkernels as ff
from ffkernels import ops

SHAPES = [(1, 1), (5, 8), (129, 255), (300, 520)]  # cols, depth: within a block of the kernels, and over several
TARGETS = cases.on_backends("apply_gradient_")


def arguments(target, shape, optimizer, *, bias=True, seed=0):
    cols, depth = shape
    _, _, weight, offset = cases.layer(1, depth, cols, bias=bias, dtype=target.dtype, device=target.device, seed=seed)
    like = {"dtype": cases.acc(target.dtype), "device": target.device}
    g = torch.Generator().manual_seed(seed + 1)
    grads = [torch.randn(t.shape, generator=g).to(**like) if t is not None else None for t in (weight, offset)]
    return {
        "grad_weight": grads[0], "grad_bias": grads[1], "weight": weight, "bias": offset,
        "state": optimizer.init_state(weight, offset), "optimizer": optimizer,
    }  # fmt: skip


def check(target, shape, name, bias, steps):
    given = arguments(target, shape, cases.OPTIMIZERS[name], bias=bias)
    params = [t.double() for t in (given["weight"], given["bias"]) if t is not None]
    exact = independent.torch_optimizer(given["optimizer"], params)
    for step in range(1, steps + 1):
        ops.apply_gradient_(**given)
        for param, grad in zip(params, (given["grad_weight"], given["grad_bias"]), strict=False):
            param.grad = grad.double()
        exact.step()
        assert given["state"]["step"].item() == step
        eps = torch.finfo(target.dtype).eps
        for ours, theirs in zip((given["weight"], given["bias"]), params, strict=False):
            assert ((ours.double() - theirs).abs() <= step * (eps * theirs.abs() + 1e-5)).all()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@TARGETS
def test_shapes_and_dtypes(target, shape, bias):
    check(target, shape, "sgd-momentum", bias, 1)


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
@cases.on_backends("apply_gradient_", dtypes=(torch.float32,))
def test_every_optimizer_over_steps(target, name):
    check(target, (37, 91), name, True, 3)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_bits_do_not_depend_on_threads(threads):
    target, before = cases.Target("cpu", "cpu", torch.float32), torch.get_num_threads()
    results = []
    for count in (1, threads):
        given = arguments(target, (500, 784), ff.Adam(lr=0.01))
        torch.set_num_threads(count)
        try:
            with ff.use_backend("cpu"):
                ops.apply_gradient_(**given)
        finally:
            torch.set_num_threads(before)
        results.append([given["weight"], given["bias"], *given["state"].values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_it_is_the_update_of_the_same_gradient():
    """ff_grad and apply_gradient_ do what ff_update_ does."""
    fused = cases.arguments("ff_update_", rows=40, depth=30, cols=20, optimizer="adamw")
    apart = cases.copied(fused)
    ff.ff_update_(**fused)
    optimizer, state = apart.pop("optimizer"), apart.pop("state")
    grads = ff.ff_grad(**apart)
    ops.apply_gradient_(*grads, apart["weight"], apart["bias"], state, optimizer)
    for a, b in zip((fused["weight"], fused["bias"]), (apart["weight"], apart["bias"]), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def _transposed(t):
    return t.T.contiguous().T


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad_weight": torch.ones(4, 8)}, ValueError, r"grad_weight must have shape \(N, K\) = \(5, 8\), got \(4, 8"),
        ({"grad_weight": torch.ones(5, 8).double()}, TypeError, "grad_weight must be torch.float32"),
        ({"grad_weight": _transposed(torch.ones(5, 8))}, ValueError, "grad_weight must be contiguous"),
        ({"grad_bias": torch.ones(10)[::2]}, ValueError, "grad_bias must be contiguous"),
        ({"grad_bias": None}, ValueError, "grad_bias must be given with a bias and only then"),
        ({"grad_bias": torch.ones(4)}, ValueError, r"grad_bias must have shape \(N,\)"),
        ({"grad_weight": torch.ones(5, 8).requires_grad_()}, RuntimeError, "grad_weight requires grad"),
        ({"optimizer": torch.optim.Adam}, TypeError, "optimizer must be ffkernels"),
        ({"weight": torch.ones(5, 8).int()}, ValueError, "weight must be"),
    ],
)
def test_errors_change_nothing(change, error, message):
    given = arguments(cases.Target("auto", "cpu", torch.float32), (5, 8), ff.Adam()) | change
    before = cases.copied({n: v for n, v in given.items() if n != "optimizer"})
    with pytest.raises(error, match=message):
        ops.apply_gradient_(**given)
    for name, t in cases.tensors(before).items():
        assert torch.equal(t, cases.tensors(given)[name])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_target_that_is_the_gradient_is_refused(backend):
    given = arguments(cases.Target(backend, "cpu", torch.float32), (5, 8), ff.SGD())
    given["grad_weight"] = given["weight"]
    with ff.use_backend(backend), pytest.raises(ValueError, match="must not share memory"):
        ops.apply_gradient_(**given)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    "name", ["default", *sorted({t.backend for t in cases.targets("apply_gradient_", (torch.float32,))})]
)
def test_opcheck(name, bias):
    given = arguments(cases.Target("reference", "cpu", torch.float32), (5, 8), ff.Adam(lr=0.01), bias=bias)
    torch.library.opcheck(
        getattr(torch.ops.ffkernels.apply_gradient_, name), cases.flat("apply_gradient_", given, ops),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )  # fmt: skip
