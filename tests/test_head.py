"""The softmax head: its logits, its step, and prediction by it."""

import pytest
import torch

import ffkernels as ff

WIDTHS = (7, 5, 6)


def make_head(dtype=torch.float64, **options):
    head = ff.SoftmaxHead(WIDTHS, 3, **{"optimizer": ff.HintonSGD(lr=0.3, weight_decay=0.1), "dtype": dtype} | options)
    generator = torch.Generator().manual_seed(0)
    for weight in head.weights:
        weight.copy_(torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return head


def activities(rows=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    ys = [torch.rand(rows, n, generator=generator, dtype=torch.float64).to(dtype) for n in WIDTHS]
    return ys, [y.square().sum(1) for y in ys]


def formula(head, ys):
    parts = [
        ys[i] / (ys[i].square().mean(1, keepdim=True).sqrt() + 1e-4) @ w.T
        for i, w in zip(head.layers, head.weights, strict=True)
    ]
    return sum(parts)


@pytest.mark.parametrize("layers", [None, (0,), (2, 0)])
def test_logits(layers):
    head = make_head(layers=layers)
    assert head.layers == ((1, 2) if layers is None else layers)
    ys, totals = activities()
    assert torch.allclose(head.logits(ys, totals), formula(head, ys), rtol=1e-12)


@pytest.mark.parametrize(
    "optimizer", [ff.HintonSGD(lr=0.3, weight_decay=0.1), ff.Adam(lr=0.01)], ids=["hinton", "adam"]
)
def test_a_step_is_that_of_autograd(optimizer):
    head, (ys, totals) = make_head(optimizer=optimizer), activities()
    labels = torch.arange(9, dtype=torch.uint8) % 3
    theirs = [w.detach().clone().requires_grad_() for w in head.weights]
    momentum = [torch.zeros_like(w) for w in theirs]
    adam = torch.optim.Adam(theirs, lr=0.01)
    for _ in range(4):
        n = [ys[i] / (ys[i].square().mean(1, keepdim=True).sqrt() + 1e-4) for i in head.layers]
        expected = sum(a @ w.T for a, w in zip(n, theirs, strict=True))
        their_loss = torch.nn.functional.cross_entropy(expected, labels.long())
        logits, loss = head.step(ys, totals, labels)
        assert torch.allclose(logits, expected, rtol=1e-9)
        assert loss.item() == pytest.approx(their_loss.item(), rel=1e-9)
        adam.zero_grad()
        their_loss.backward()
        if isinstance(optimizer, ff.Adam):
            adam.step()
            continue
        with torch.no_grad():
            for w, v in zip(theirs, momentum, strict=True):
                v.mul_(0.9).add_(w.grad, alpha=0.1)
                w -= 0.3 * (v + 0.1 * w)
    for ours, w in zip(head.weights, theirs, strict=True):
        assert torch.allclose(ours, w, rtol=1e-8)


def test_beside_low_precision_activities_it_stays_float32():
    head = make_head(torch.bfloat16)
    ys, totals = activities(dtype=torch.bfloat16)
    logits, loss = head.step(ys, [t.float() for t in totals], torch.arange(9) % 3)
    assert logits.dtype == loss.dtype == head.weights[0].dtype == torch.float32


def test_arguments():
    for layers in ((), (3,), (-1,), (1, 1)):
        with pytest.raises(ValueError, match="layers must hold different indices of the 3 layers"):
            make_head(layers=layers)
    with pytest.raises(ValueError, match="num_classes"):
        ff.SoftmaxHead(WIDTHS, 1, optimizer=ff.SGD())
    layers = [ff.FFLinear(8, 7), ff.FFLinear(7, 5), ff.FFLinear(5, 6)]
    ff.FFNet(layers, num_classes=3, head=make_head())
    for members, classes in ((layers, 4), (layers[:2], 3), ([*layers[:2], ff.FFLinear(5, 7)], 3)):
        with pytest.raises(ValueError, match="head must be made for the net"):
            ff.FFNet(members, num_classes=classes, head=make_head())


# ---------------------------------------------------------------------------------------------------------------------
# prediction


def make_net(**options):
    torch.manual_seed(0)
    sizes = ((12, 7, 2.0), (7, 5, 3.0), (5, 6, 1.5))
    layers = [ff.FFLinear(k, n, dtype=torch.float64, temperature=t) for k, n, t in sizes]
    return ff.FFNet(layers, num_classes=3, head=make_head(), **options)


X = torch.rand(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def expected_scores(net, x, by, layers):
    neutral = torch.cat([torch.full((len(x), 3), 1 / 3, dtype=x.dtype), x[:, 3:]], 1)
    ys = [net[: i + 1](neutral) for i in range(3)]
    log_p = formula(net.head, ys).log_softmax(1)
    g = torch.stack([net.goodness(ff.overlay(x, torch.full((len(x),), c), 3)) for c in range(3)], 2)[layers]
    sign = -1 if net.minimize else 1
    if by == "both":
        temperatures = g.new_tensor([net.stack[i].temperature for i in layers])[:, None, None]
        return log_p + (sign * (g / temperatures).mean(0)).log_softmax(1)
    return log_p if by == "head" else sign * g.sum(0)


@pytest.mark.parametrize("by", ["goodness", "head", "both"])
@pytest.mark.parametrize("layers", [[0, 1, 2], [1, 2]], ids=str)
@pytest.mark.parametrize("minimize", [False, True])
def test_scores(by, layers, minimize):
    net = make_net(minimize=minimize, predict_by=by, predict_layers=layers)
    expected = expected_scores(net, X, by, layers)
    assert torch.allclose(net.label_scores(X), expected, rtol=1e-9)
    assert torch.allclose(make_net(minimize=minimize).label_scores(X, by=by, layers=layers), expected, rtol=1e-9)
    assert torch.equal(net.predict(X, batch_size=7), expected.argmax(1))


@pytest.mark.parametrize("by", ["goodness", "both"])
def test_candidates(by):
    net = make_net(predict_by=by, candidates=2)
    whole, pruned = net.label_scores(X, candidates=3), net.label_scores(X)
    assert torch.allclose(make_net(predict_by=by).label_scores(X), whole)
    worst = net.label_scores(X, by="head").argmin(1)
    kept = torch.arange(3) != worst[:, None]
    assert (pruned[~kept] == -torch.inf).all()
    if by == "goodness":
        assert torch.allclose(pruned[kept], whole[kept])
    # exactly the winner among all wherever it was let through
    through = kept.gather(1, whole.argmax(1)[:, None])[:, 0]
    assert 0 < through.sum() < len(X) + (by == "both")  # with the head in the score, hardly ever
    assert torch.equal(net.predict(X)[through], whole.argmax(1)[through])
    assert torch.equal(net.predict(X, candidates=1), net.predict(X, by="head"))


def test_images_under_the_neutral_label():
    torch.manual_seed(0)
    layers = [ff.FFLinear(24, 7), ff.FFLinear(7, 5), ff.FFLinear(5, 6)]
    net = ff.FFNet(layers, num_classes=3, head=make_head(torch.float32))
    x = torch.rand(4, 2, 3, 4)
    by_hand = x.clone().flatten(2)
    by_hand[:, :, :3] = 1 / 3
    ys, totals = net.neutral_pass(x)
    assert torch.allclose(ys[2], net(by_hand.flatten(1)))
    assert torch.allclose(totals[1], ys[1].square().sum(1))


def test_prediction_arguments():
    for options, message in (
        ({"predict_by": "vote"}, "predict_by must be one of"),
        ({"candidates": 4}, r"candidates must be in \[1, 3\]"),
        ({"predict_layers": []}, "layers must hold indices"),
        ({"predict_layers": [3]}, "layers must hold indices"),
        ({"predict_layers": 1}, "layers must hold indices of the 3 layers, got 1"),
        ({"predict_layers": [1.0]}, r"layers must hold indices of the 3 layers, got \[1.0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            make_net(**options)
    for options in ({"by": "head"}, {"by": "both"}, {"candidates": 2}):
        net = ff.FFNet.from_sizes([8, 7], num_classes=3)
        with pytest.raises(ValueError, match="needs a net with a head"):
            net.predict(torch.rand(2, 8), **options)
