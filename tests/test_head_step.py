"""The softmax head's ops on every backend and instruction set that has them."""

from dataclasses import replace

import cases
import independent
import pytest
import torch
from torch.utils._pytree import tree_map_only

import ffkernels as ff
from ffkernels import _extension, backends, head_step
from ffkernels.head_step import draw_hard_inputs, draw_other_labels, ff_head_step_

ISAS = (_extension.cpu_isa() or {"available": []})["available"]
# rows, classes, widths: within a part of the columns (512) and a chunk of rows (128), and over several; whole vectors,
# groups of 4 rows and of 5 classes, and what is left over
SHAPES = [
    (1, 2, (1,)), (3, 1, (17,)), (5, 6, (33, 16)), (31, 10, (255, 507)), (130, 11, (513, 2)), (250, 10, (1000, 1031)),
]  # fmt: skip


def arguments(rows=6, classes=3, widths=(8, 5), optimizer="sgd-plain", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    ys = [torch.randn(rows, n, generator=g, dtype=torch.float64).to(dtype) for n in widths]
    weights = [torch.randn(classes, n, generator=g, dtype=torch.float64).to(dtype) / n**0.5 for n in widths]
    chosen = cases.OPTIMIZERS[optimizer]
    return {
        "ys": ys, "sqnorms": [y.square().sum(1) for y in ys],
        "labels": torch.randint(classes, (rows,), generator=g), "weights": weights,
        "states": [chosen.init_state(w, None) for w in weights], "optimizer": chosen,
    }  # fmt: skip


def run(given):
    given = cases.copied(given)
    logits, loss = ff_head_step_(**given)
    return {"logits": logits, "loss": loss} | {f"weight{i}": w for i, w in enumerate(given["weights"])}, given


def by_autograd(given, dtype):
    """The same through autograd and torch.optim."""
    ys = [y.to(dtype) for y in given["ys"]]
    weights = [w.to(dtype).clone().requires_grad_() for w in given["weights"]]
    logits = sum(independent.normalized(y, "rms") @ w.T for y, w in zip(ys, weights, strict=True))
    loss = torch.nn.functional.cross_entropy(logits, given["labels"])
    loss.backward()
    for w in weights:
        independent.torch_optimizer(given["optimizer"], [w]).step()
    results = {"logits": logits, "loss": loss} | {f"weight{i}": w for i, w in enumerate(weights)}
    return {name: t.detach() for name, t in results.items()}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(everywhere, shape):
    given = arguments(*shape)
    results, _ = run(given)
    exact, rounded = (by_autograd(given, dtype) for dtype in (torch.float64, torch.float32))
    for name, true in exact.items():
        independent.assert_as_exact_as_torch(results[name], true, rounded[name], name)
        assert results[name].dtype == torch.float32
        assert results[name].is_contiguous()


@pytest.mark.parametrize("name", cases.OPTIMIZERS)
def test_every_optimizer(everywhere, name):
    given = arguments(33, 7, (23, 18), name)
    exact, rounded = (by_autograd(given, dtype) for dtype in (torch.float64, torch.float32))
    results, after = run(given)
    assert [state["step"].item() for state in after["states"]] == [1, 1]
    for i in range(2):
        independent.assert_as_exact_as_torch(results[f"weight{i}"], exact[f"weight{i}"], rounded[f"weight{i}"], name)


def test_float64():
    given = arguments(9, 4, (7, 5), dtype=torch.float64)
    results, _ = run(given)
    for name, true in by_autograd(given, torch.float64).items():
        assert torch.allclose(results[name], true, rtol=1e-12), name


def test_as_the_composition_of_the_other_ops(everywhere, monkeypatch):
    """What backends without it run, over steps, with lr as a tensor."""
    rate, results = torch.tensor(0.3), []
    for fused in (True, False):
        monkeypatch.setattr(backends, "has_kernel", lambda op, y, fused=fused: fused)
        head = ff.SoftmaxHead((23, 18), 4, layers=[0, 1], optimizer=ff.HintonSGD(lr=rate, weight_decay=0.01))
        for seed in range(3):
            given = arguments(33, 4, (23, 18), seed=seed)
            logits, loss = head.step(given["ys"], given["sqnorms"], given["labels"].int())
        results.append([logits, loss, *head.state_dict().values()])
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_the_bits_do_not_depend_on_threads(isa, monkeypatch):
    monkeypatch.setenv("FFKERNELS_CPU_ISA", isa)
    before, results = torch.get_num_threads(), []
    given = arguments(125, 10, (1000, 2000), "hinton")
    try:
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            with ff.use_backend("cpu"):
                results.append(cases.tensors(dict(enumerate(run(given)))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(t, other[name]) for name, t in results[0].items())


def test_rows_anywhere_in_memory(everywhere):
    given = arguments(33, 3, (23, 18))
    plain, _ = run(given)
    wide = torch.rand(33, 60)
    wide[:, 7:30] = given["ys"][0]
    labels = torch.zeros(33, 2, dtype=torch.int64)
    labels[:, 1] = given["labels"]
    sqnorms = [torch.stack([q, q], 1)[:, 0] for q in given["sqnorms"]]
    given |= {"ys": [wide[:, 7:30], given["ys"][1].T.contiguous().T], "labels": labels[:, 1], "sqnorms": sqnorms}
    logits, loss = ff_head_step_(**given)
    results = {"logits": logits, "loss": loss} | {f"weight{i}": w for i, w in enumerate(given["weights"])}
    for name, t in plain.items():  # torch's own products depend on strides
        assert torch.allclose(results[name], t, atol=1e-6), name
        assert everywhere == "reference" or torch.equal(results[name], t), name


def test_large_and_odd_values(everywhere):
    given = arguments(5, 3, (4,))
    given["weights"][0][:] = torch.tensor([[3e4] * 4, [-3e4] * 4, [0.0] * 4])
    given["ys"][0][:] = 1.0
    given["sqnorms"][0][:] = 4.0
    given["labels"][:] = torch.tensor([0, 0, 1, 0, 0])
    given["ys"][0][3], given["ys"][0][4] = torch.nan, torch.inf
    given["sqnorms"][0][4] = 1.0  # so that infinite logits, and their difference, are met
    logits, loss = ff_head_step_(**cases.copied(given))
    assert logits[:3].tolist() == [[pytest.approx(s * 1.2e5, rel=1e-3) for s in (1, -1, 0)]] * 3
    assert logits[3].isnan().all()
    assert loss.isnan()
    for name in ("ys", "sqnorms"):
        given[name] = [t[:3] for t in given[name]]
    _, loss = ff_head_step_(**given | {"labels": given["labels"][:3]})
    assert loss.item() == pytest.approx(2.4e5 / 3, rel=1e-3)  # two right ones, and one as wrong as can be


BAD = [
    ({"ys": []}, ValueError, "must be as many, at least one"),
    ({"ys": [torch.rand(6, 8), torch.rand(5, 5)]}, ValueError, r"ys\[1\] must have shape \(B, N\) = \(6, 5\)"),
    ({"ys": [torch.rand(6, 8).bfloat16(), torch.rand(6, 5)]}, TypeError, r"ys\[0\] must be torch.float32 or"),
    ({"ys": [torch.rand(6, 8), torch.rand(6, 5).double()]}, TypeError, r"ys\[1\] must be torch.float32"),
    ({"ys": [torch.rand(0, 8), torch.rand(0, 5)]}, ValueError, r"ys\[0\] must not be empty"),
    ({"ys": [torch.rand(6, 8), torch.rand(6)]}, ValueError, r"ys\[1\] must be 2-dimensional"),
    ({"sqnorms": [torch.rand(6), torch.rand(5)]}, ValueError, r"sqnorms\[1\] must have shape"),
    ({"weights": [torch.rand(3, 8), torch.rand(4, 5)]}, ValueError, r"weights\[1\] must have shape \(C, N\) = \(3, 5"),
    ({"weights": [torch.rand(8, 3).T, torch.rand(3, 5)]}, ValueError, "must be contiguous"),
    ({"labels": torch.zeros(6)}, TypeError, "labels must hold integers"),
    ({"labels": torch.zeros(5, dtype=torch.int64)}, ValueError, r"labels must have shape \(B,\)"),
    ({"labels": torch.tensor([0, 1, 2, 3, 0, 0])}, ValueError, r"labels must be in \[0, 3\).*got 3"),
    ({"labels": torch.tensor([0, 1, 2, -1, 0, 0])}, ValueError, r"labels must be in \[0, 3\).*got -1"),
    ({"eps": -1.0}, ValueError, "eps must be"),
    ({"optimizer": torch.optim.Adam}, TypeError, "optimizer must be ffkernels"),
    ({"states": [{"step": torch.zeros(())}, {}]}, ValueError, r"states\[1\]: state: SGD needs \['step'\]"),
    ({"states": [{"step": torch.zeros(())}, {"step": torch.zeros(1)}]}, ValueError, r"states\[1\]: state\['step'\]"),
    ({"sqnorms": [torch.rand(6).requires_grad_(), torch.rand(6)]}, RuntimeError, r"sqnorms\[0\] requires grad"),
    ({"weights": [torch.rand(3, 8), torch.rand(3, 5).requires_grad_()]}, RuntimeError, r"weights\[1\] requires grad"),
    ({"optimizer": ff.SGD(torch.tensor(0.1, requires_grad=True))}, RuntimeError, "lr requires grad"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=[message for *_, message in BAD])
def test_errors_change_nothing(everywhere, change, error, message):
    given = arguments() | change
    before = cases.tensors(cases.copied({n: v for n, v in given.items() if n != "optimizer"}))
    with pytest.raises(error, match=message):
        ff_head_step_(**given)
    after = cases.tensors(given)
    assert all(torch.equal(t, after[name]) for name, t in before.items())


def test_shared_memory_is_refused(everywhere):
    given = arguments(3, 3, (8, 8))
    optimizer = replace(given["optimizer"], lr=given["states"][1]["step"])
    for change in (
        {"weights": [given["weights"][0]] * 2},
        {"ys": [given["ys"][0], given["weights"][1]]},
        {"optimizer": optimizer},
    ):
        with pytest.raises(ValueError, match="must not share memory"):
            ff_head_step_(**given | change)


@pytest.mark.parametrize("optimizer", ["hinton", "adam", "sgd-plain"])
def test_opcheck(optimizer):
    args = cases.flat("ff_head_step_", arguments(optimizer=optimizer), head_step)
    for name in ("default", *sorted({t.backend for t in cases.targets("ff_head_step_", (torch.float32,))})):
        overload = getattr(torch.ops.ffkernels.ff_head_step_, name)
        own = tree_map_only(torch.Tensor, torch.clone, args)
        torch.library.opcheck(overload, own, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_compiled():
    given = arguments(33, 4, (23, 18), "adam")
    plain, _ = run(given)
    compiled = torch.compile(ff_head_step_, fullgraph=True, backend="aot_eager")
    logits, loss = compiled(**given)
    assert torch.equal(logits, plain["logits"])
    assert torch.equal(loss, plain["loss"])
    assert all(torch.equal(w, plain[f"weight{i}"]) for i, w in enumerate(given["weights"]))


# ---------------------------------------------------------------------------------------------------------------------
# draw_other_labels


def test_other_labels_are_where_the_draw_falls(everywhere):
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().expand(8, 4)
    labels = torch.tensor([0, 0, 0, 1, 1, 3, 2, 2], dtype=torch.uint8)
    # the others' limits: beside 0 at 2/9, 5/9, 1; 1 at 1/8, 4/8, 1; 3 at 1/6, 3/6, 1; 2 at 1/7, 3/7
    draws = torch.tensor([0.0, 0.23, 0.56, 0.12, 0.13, 0.99, 1 / 7 + 1e-5, 1 - 2.0**-24])
    assert draw_other_labels(logits, labels, draws).tolist() == [1, 2, 3, 0, 2, 2, 1, 3]


def test_other_labels_as_probable_as_softmax_says(everywhere):
    g = torch.Generator().manual_seed(0)
    logits, labels = 3 * torch.randn(1, 5, generator=g).expand(20000, 5), torch.full((20000,), 2)
    drawn = draw_other_labels(logits, labels, torch.rand(20000, generator=g))
    others = logits[0].clone()
    others[2] = -torch.inf
    shares = torch.bincount(drawn, minlength=5) / 20000
    assert drawn.dtype == torch.int64
    assert shares[2] == 0
    assert torch.allclose(shares, others.softmax(0), atol=0.015)


def test_bad_labels_and_draws(everywhere):
    logits = torch.randn(4, 3)
    for labels, draws, error in (
        (torch.tensor([0, 1, 2, 3]), torch.rand(4), ValueError),
        (torch.zeros(3).long(), torch.rand(4), ValueError),
        (torch.zeros(4).long(), torch.rand(5), ValueError),
        (torch.zeros(4).long(), torch.rand(4).double(), TypeError),
        (torch.zeros(4).long(), torch.tensor([0.5, 1.0, 0.0, 0.1]), ValueError),
        (torch.zeros(4).long(), torch.tensor([0.5, torch.nan, 0.0, 0.1]), ValueError),
    ):
        with pytest.raises(error):
            draw_other_labels(logits, labels, draws)
    with pytest.raises(ValueError, match=r"logits must be \(B, C\) of C >= 2 classes, got \(4, 1\)"):
        draw_other_labels(logits[:, :1], torch.zeros(4).long(), torch.rand(4))


def test_opcheck_of_draws():
    for name in ("default", "reference", "cpu"):
        overload = getattr(torch.ops.ffkernels.draw_other_labels, name)
        torch.library.opcheck(overload, (torch.randn(6, 3), torch.arange(6) % 3, torch.rand(6)))


# ---------------------------------------------------------------------------------------------------------------------
# draw_hard_inputs


@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
def test_hard_inputs_have_the_largest_keys(everywhere, scale):
    g = torch.Generator().manual_seed(1)
    logits, labels = scale * torch.randn(5, 130, generator=g).T, torch.randint(5, (130,), generator=g).int()
    draws = torch.rand(130, generator=g, dtype=torch.float64)
    for count in (0, 1, 52, 129, 130):
        drawn = draw_hard_inputs(logits, labels, draws, 0.2, count)
        p = logits.double().softmax(1)[range(130), labels.tolist()]
        keys = draws.log() / (1.2 - p)
        assert drawn.tolist() == sorted(keys.argsort(descending=True)[:count].tolist())


def test_hard_inputs_that_are_nothing(everywhere):
    """A draw of 0 comes last, a row whose probability nobody knows first."""
    logits, draws = torch.randn(4, 3), torch.tensor([0.5, 0.0, 0.9, 0.1], dtype=torch.float64)
    logits[3, 0] = torch.nan
    labels = torch.zeros(4, dtype=torch.int64)
    assert draw_hard_inputs(logits, labels, draws, 0.1, 1).tolist() == [3]
    assert draw_hard_inputs(logits, labels, draws, 0.1, 3).tolist() == [0, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.tensor([0, 1, 2, 3])}, r"labels must be in \[0, 3\).*got 3"),
        ({"labels": torch.zeros(3)}, "labels must hold integers"),
        ({"draws": torch.rand(4)}, "draws must be torch.float64"),
        ({"draws": torch.rand(5).double()}, r"draws must have shape \(B,\)"),
        ({"draws": torch.tensor([0.5, 0.0, -0.1, 0.9]).double()}, r"draws must be in \[0, 1\), got -0.1"),
        ({"draws": torch.tensor([0.5, 0.0, 1.0, 0.9]).double()}, r"draws must be in \[0, 1\), got 1"),
        ({"floor": 0.0}, "floor must be finite and > 0"),
        ({"count": 5}, r"count must be in \[0, 4\]"),
        ({"count": -1}, r"count must be in \[0, 4\]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_hard_inputs(everywhere, change, message):
    given = {"labels": torch.zeros(4).long(), "draws": torch.rand(4).double(), "floor": 0.1, "count": 2}
    with pytest.raises((TypeError, ValueError), match=message):
        draw_hard_inputs(torch.randn(4, 3), **given | change)


def test_opcheck_of_hard_inputs():
    for name in ("default", "reference", "cpu"):
        overload = getattr(torch.ops.ffkernels.draw_hard_inputs, name)
        args = (torch.randn(6, 3), torch.arange(6) % 3, torch.rand(6).double(), 0.1, 4)
        torch.library.opcheck(overload, args)
