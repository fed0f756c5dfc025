"""The ops as torch sees them: opcheck, fake kernels, tracing, torch.compile and export."""

import cases
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

import ffkernels as ff
from ffkernels import backends, reference

# every op once, in-place ops with every optimizer, each with and without a bias
CALLS = [
    pytest.param(
        op,
        optimizer,
        bias,
        id=f"{op}-{optimizer}-{'bias' if bias else 'no-bias'}",
        marks=[] if optimizer in ("sgd", "adam") else pytest.mark.slow,
    )
    for op in cases.OPS
    for optimizer in (cases.OPTIMIZERS if op in cases.IN_PLACE else ["adam"])
    for bias in (True, False)
]


def overloads(op, dtype=torch.float32):
    """The overloads of an op that can run here: the one that chooses, and each backend's."""
    names = ["default", *sorted({t.backend for t in cases.targets(op, (dtype,)) if t.device == "cpu"})]
    return [getattr(getattr(torch.ops.ffkernels, op), name) for name in names]


def flat(op, optimizer="adam", bias=True, **more):
    return cases.flat(op, cases.arguments(op, optimizer=optimizer, bias=bias) | more)


def copy(args):
    return tree_map_only(torch.Tensor, torch.clone, args)


@pytest.mark.parametrize(("op", "optimizer", "bias"), CALLS)
def test_opcheck(op, optimizer, bias):
    for overload in overloads(op):
        torch.library.opcheck(overload, copy(flat(op, optimizer, bias)), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("op", cases.OPS)
def test_opcheck_of_autograd_and_aot_dispatch(op, bias):
    for overload in overloads(op):
        torch.library.opcheck(
            overload,
            copy(flat(op, bias=bias)),
            test_utils=("test_autograd_registration", "test_aot_dispatch_dynamic"),
        )


VARIANTS = {
    "plain": {},
    "return_p": {"return_p": True, "activation": "tanh"},
    "transposed x": {"x": torch.rand(8, 6).T},
    "expanded x": {"x": torch.rand(1, 8).expand(6, 8)},
    "transposed weight": {"weight": torch.rand(8, 5).T},
    "one row": {"x": torch.rand(1, 8), "rows": 1},
    "one output": {"cols": 1},
    "no rows": {"rows": 0},
    "bfloat16": {"dtype": torch.bfloat16},
    "float64": {"dtype": torch.float64},
}


REFUSED = [("no rows", op) for op in cases.IN_PLACE if op.endswith("step_")]
REFUSED += [("transposed weight", op) for op in cases.IN_PLACE]  # test_errors.py shows how


@pytest.mark.parametrize(("variant", "op"), [(v, op) for v in VARIANTS for op in cases.OPS if (v, op) not in REFUSED])
def test_fake_kernels_agree_with_real_ones(op, variant):
    changes = dict(VARIANTS[variant])
    made = {n: changes.pop(n) for n in ("rows", "cols", "dtype") if n in changes}
    given = cases.arguments(op, **made)
    if "return_p" in changes and "forward" not in op:
        del changes["return_p"]
    if op == "ff_network_step_":
        changes.pop("activation", None)
    args = cases.flat(op, given | changes)
    with FakeTensorMode() as mode:
        fake_args = tree_map_only(torch.Tensor, mode.from_tensor, args)
        # also of backends that cannot run here: their schemas are registered everywhere
        fakes = [getattr(getattr(torch.ops.ffkernels, op), b)(*fake_args) for b in ("default", *backends.BACKENDS)]
    for overload in overloads(op, given["x"].dtype):
        real = tree_flatten(overload(*copy_with_strides(args)))[0]
        for fake in fakes:
            fake = tree_flatten(fake)[0]
            assert len(fake) == len(real)
            for f, r in zip(fake, real, strict=True):
                if r is None:
                    assert f is None
                    continue
                what = [(t.shape, t.dtype, t.stride(), t.device, t.storage_offset()) for t in (f, r)]
                assert what[0] == what[1]


def copy_with_strides(args):
    def one(t):
        base = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
        return t if 0 in t.stride() else base.copy_(t)

    return tree_map_only(torch.Tensor, one, args)


# ---------------------------------------------------------------------------------------------------------------------
# No construct that would stall a stream or break a CUDA graph: .item(), .cpu(), shapes that depend on data.

MAKES = tuple(f"aten.{name}" for name in ("new_", "empty", "arange", "ones", "full", "zeros", "scalar_tensor"))
FORBIDDEN = (
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "unique",
    "_to_cpu",
    "is_nonzero",
    "equal.default",
)


def trace(function, args):
    """The graph of a function, traced with symbolic shapes, over the tensors among ``args``."""
    leaves, spec = tree_flatten(args)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def of_tensors(*tensors):
        filled = list(leaves)
        for place, t in zip(places, tensors, strict=True):
            filled[place] = t
        return function(*tree_unflatten(filled, spec))

    graph = make_fx(of_tensors, tracing_mode="symbolic")(*(leaves[i].clone() for i in places)).graph
    return [node for node in graph.nodes if node.op == "call_function"]


def assert_graph_safe(nodes):
    assert nodes
    for node in nodes:
        name = str(node.target)
        assert not any(word in name for word in FORBIDDEN), name
        device = node.kwargs.get("device")
        assert device is None or name.startswith(MAKES), f"{name} moves to {device}"
        assert not free_unbacked_symbols(node.meta.get("val")), f"{name} has a shape that depends on data"


@pytest.mark.parametrize(("op", "optimizer", "bias"), CALLS)
def test_the_reference_looks_at_no_value(op, optimizer, bias):
    activation = "gelu" if bias else "relu"
    given = cases.arguments(op, optimizer=optimizer, bias=bias)
    if op == "ff_network_step_":
        for record in given["layers"]:
            record.activation = activation
    else:
        given["activation"] = activation
    assert_graph_safe(trace(getattr(reference, op), cases.flat(op, given)))


@pytest.mark.parametrize("op", [op for op in cases.OPS if "step" in op or "update" in op])
def test_nor_does_it_at_a_rate_in_a_tensor(op):
    given = cases.arguments(op)
    optimizer = ff.Adam(lr=torch.tensor(0.1))
    if op == "ff_network_step_":
        for record in given["layers"]:
            record.optimizer = optimizer
    else:
        given["optimizer"] = optimizer
    assert_graph_safe(trace(getattr(reference, op), cases.flat(op, given)))


@pytest.mark.parametrize(
    "function",
    [lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x.nonzero(), lambda x: x + 1 if x.sum() > 0 else x],
    ids=["item", "mask", "nonzero", "branch"],
)
def test_the_trace_finds_what_it_looks_for(function):
    with pytest.raises((RuntimeError, AssertionError)):
        assert_graph_safe(trace(function, (torch.ones(3),)))


# ---------------------------------------------------------------------------------------------------------------------
# torch.compile


def outcome(op, function, given):
    """Results and everything that may have been written."""
    given = cases.copied(given)
    results = [t for t in tree_flatten(function(given))[0] if isinstance(t, torch.Tensor)]
    return results + list(cases.tensors(given).values())


def assert_same(results, expected):
    assert len(results) == len(expected) > 0
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a, b)
        assert a.dtype == b.dtype


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("op", cases.OPS)
def test_compiled_fullgraph(op, bias):
    torch.compiler.reset()
    compiled = torch.compile(lambda given: cases.call(op, given), fullgraph=True, backend="aot_eager")
    given = cases.arguments(op, bias=bias, optimizer="sgd-nesterov")
    assert_same(outcome(op, compiled, given), outcome(op, lambda given: cases.call(op, given), given))


@pytest.mark.parametrize("op", ["ff_forward", "ff_step_", "ff_network_step_", "ff_label_step_"])
def test_compiled_with_dynamic_shapes(op):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda g: cases.call(op, g), fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (11, 13, 17):  # equal to no other size
        given = cases.arguments(op, rows=rows)
        assert_same(outcome(op, compiled, given), outcome(op, lambda given: cases.call(op, given), given))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_compiled_by_inductor():
    torch.compiler.reset()

    def train(x, sign, weight, bias, state):
        y, goodness, loss = ff.ff_step_(x.tanh(), sign, weight, bias, state, ff.Adam(lr=0.1), normalize="rms")
        y2, goodness2 = ff.ff_forward(y * 2, weight[:, :5], bias, x_sqnorm=goodness * 4)
        grad, _ = ff.ff_grad(y * 2, y2, goodness2, weight[:, :5].contiguous(), None)
        return y2.sum() + loss, grad.exp()

    given = cases.arguments("ff_step_", rows=6, depth=8, cols=5)
    given = [given[n] for n in ("x", "sign", "weight", "bias", "state")]
    compiled = torch.compile(train, fullgraph=True)
    for _ in range(2):
        ours, theirs = cases.copied(given), cases.copied(given)
        for a, b in zip(compiled(*ours), train(*theirs), strict=True):
            assert torch.allclose(a, b, rtol=1e-5)
        for a, b in zip(cases.tensors(ours).values(), cases.tensors(theirs).values(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_a_compiled_function_follows_use_backend(monkeypatch):
    torch.compiler.reset()
    ran = []
    for target in cases.targets("ff_forward", (torch.float32,)):
        overload = getattr(torch.ops.ffkernels.ff_forward, target.backend)
        seen = lambda *args, o=overload: ran.append(o._overloadname) or o(*args)  # noqa: E731
        monkeypatch.setattr(torch.ops.ffkernels.ff_forward, target.backend, seen)
    x, weight = torch.rand(6, 8), torch.rand(5, 8)
    compiled = torch.compile(lambda x, w: ff.ff_forward(x, w)[1], fullgraph=True, backend="aot_eager")
    for target in cases.targets("ff_forward", (torch.float32,)):
        if target.device != "cpu":
            continue
        with ff.use_backend(target.backend):
            expected = ff.ff_forward(x, weight)[1]
            assert torch.equal(compiled(x, weight), expected)
            assert ran == [target.backend] * 2
            ran.clear()


def test_a_compiled_function_follows_torchs_precision():
    torch.compiler.reset()
    x, weight = torch.rand(33, 123), torch.rand(110, 123)
    compiled = torch.compile(lambda x, w: ff.ff_forward(x, w)[1], fullgraph=True, backend="aot_eager")
    before, seen = torch.get_float32_matmul_precision(), []
    try:
        with ff.use_backend("reference"):
            for setting in ("highest", "medium", "highest"):
                torch.set_float32_matmul_precision(setting)
                seen.append(compiled(x, weight))
                assert torch.equal(seen[-1], ff.ff_forward(x, weight)[1])
    finally:
        torch.set_float32_matmul_precision(before)
    assert not torch.equal(seen[0], seen[1])


def test_a_compiled_function_checks_too():
    torch.compiler.reset()
    compiled = torch.compile(lambda x, w: ff.ff_forward(x, w)[0], backend="aot_eager")
    with pytest.raises(ValueError, match="x must have shape"):
        compiled(torch.ones(2, 7), torch.ones(5, 8))


@pytest.mark.parametrize("rows", [3, 17])
def test_a_net_compiles_for_inference(rows):
    torch.compiler.reset()
    net = ff.FFNet.from_sizes([12, 7, 5], num_classes=3)
    x = torch.rand(rows, 12)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), net(x))
    goodness = torch.compile(net.label_goodness, fullgraph=True, backend="aot_eager")
    assert torch.equal(goodness(x), net.label_goodness(x))


def test_a_net_exports():
    net = ff.FFNet.from_sizes([12, 7, 5], num_classes=3)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(net, (torch.rand(4, 12),), dynamic_shapes=({0: batch},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("ffkernels.ff_forward.default") == 2
    for rows in (2, 9):
        x = torch.rand(rows, 12)
        assert torch.equal(program.module()(x), net(x))
