"""RecurrentFFNet: its dynamics and its training against the formulas written out, and its life as a module."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F

import ffkernels as ff
from ffkernels.training import error_percent

CLASSES = 3


def make(sizes=(12, 7, 5), dtype=torch.float64, **options):
    torch.manual_seed(1)
    options = {"normalize": "rms", "goodness": "sum", "threshold": 4.0, "temperature": 2.0, "dtype": dtype} | options
    return ff.RecurrentFFNet.from_sizes(sizes, num_classes=CLASSES, label_strength=1.5, **options)


def images(rows=6, width=12, dtype=torch.float64):
    return torch.rand(rows, width, generator=torch.Generator().manual_seed(0), dtype=dtype)


def unit(x):
    return x / (x.square().mean(1, keepdim=True).sqrt() + 1e-4)


def answer(layer, below, above):
    x = torch.cat([below, above], 1)
    r = 1 / (x.square().mean(1, keepdim=True).sqrt() + layer.eps)
    z = r * x @ layer.weight.T + layer.bias
    return z, torch.relu(z) if layer.activation == "relu" else torch.tanh(z)


def by_hand(net, x, labels, iterations):
    """z and y of every layer in every iteration, with gradients to each layer's own parameters only."""
    image, top = unit(x), 1.5 * F.one_hot(labels, CLASSES).to(x.dtype)
    widths = [layer.out_features for layer in net.layers]
    states = []
    for i, layer in enumerate(net.layers):
        above = widths[i + 1] if i + 1 < len(widths) else CLASSES
        below = unit(states[-1]) if states else image
        states.append(answer(layer, below, torch.zeros(len(x), above, dtype=x.dtype))[1].detach())
    entered, responses = [], []
    for _ in range(iterations):
        shown = [image, *map(unit, states), top]
        answers = [answer(layer, shown[i], shown[i + 2]) for i, layer in enumerate(net.layers)]
        entered.append([z for z, _ in answers])
        responses.append([y for _, y in answers])
        states = [
            net.damping * old + (1 - net.damping) * y.detach() for old, y in zip(states, responses[-1], strict=True)
        ]
    return entered, responses


@pytest.mark.parametrize("sizes", [(12, 7), (12, 7, 5), (12, 4, 5, 6)])
def test_goodness_is_the_mean_over_the_judged_iterations(sizes):
    net, x = make(sizes, judged=(2, 4), damping=0.25), images()
    found = net.label_goodness(x)
    assert found.shape == (len(sizes) - 1, 6, CLASSES)
    for label in range(CLASSES):
        _, responses = by_hand(net, x, torch.full((6,), label), 4)
        expected = torch.stack([(responses[1][i] ** 2 + responses[3][i] ** 2).sum(1) / 2 for i in range(len(net))])
        torch.testing.assert_close(found[:, :, label], expected)
    labels = torch.tensor([[2, 0]]).expand(6, -1)
    torch.testing.assert_close(net.label_goodness(x, labels), found[:, :, [2, 0]])
    assert torch.equal(net.predict(x, layers=[0]), found[0].argmax(1))
    # the label arrives at a layer only once it has come down to it
    assert torch.allclose(make(sizes, judged=(1,)).label_goodness(x)[0].std(1), torch.zeros(6).double()) == (
        len(sizes) > 2
    )


@pytest.mark.parametrize("sizes", [(12, 7), (12, 7, 5), (12, 4, 5, 6)])
@pytest.mark.parametrize("activation", ["relu", "tanh"])
def test_a_step_is_autograd_through_each_answer_alone(sizes, activation):
    options = {"optimizer": ff.SGD(lr=0.1, momentum=0.9), "learned": (1, 3, 4), "activation": activation, "peer": 0.2}
    ours, theirs, start = (make(sizes, **options) for _ in range(3))
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    x, labels = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    wrong, rows = (labels + 1) % CLASSES, x.repeat(2, 1)
    sign = torch.ones(12).double()
    sign[6:] = -1
    means = [torch.full((width,), 0.5).double() for width in sizes[1:]]
    for _ in range(2):
        found = ours.label_step(x, labels, wrong)
        entered, learned = ([each[0], *each[2:]] for each in by_hand(theirs, rows, torch.cat([labels, wrong]), 4))
        g = torch.stack([torch.stack([y.square().sum(1) for y in at]) for at in learned])  # (3, L, 12)
        losses = (2.0 * F.softplus(-sign * (g - 4.0) / 2.0)).mean((0, 2))
        optimizer.zero_grad()
        # peer normalisation as a loss of its own: on the positive rows, and on what enters the activation
        drawn = [(0.2 * (m - m.mean()) * at[i][:6]).sum() for i, m in enumerate(means) for at in entered]
        (losses.sum() + sum(drawn) * 2 / (3 * 12)).backward()
        columns = [torch.stack([at[i][:6].detach() for at in learned]).mean((0, 1)) for i in range(len(means))]
        means = [0.9 * m + 0.1 * column for m, column in zip(means, columns, strict=True)]
        optimizer.step()
        torch.testing.assert_close(found.loss, losses.detach())
        torch.testing.assert_close(found.goodness_pos, g.detach().mean(0)[:, :6])
        torch.testing.assert_close(found.goodness_neg, g.detach().mean(0)[:, 6:])
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach())
        assert not torch.equal(a, before)


def test_images_and_flat_rows_are_the_same():
    net, x = make(), images()
    assert torch.equal(net.label_goodness(x.view(6, 1, 3, 4)), net.label_goodness(x))
    assert torch.equal(net(x.view(6, 3, 2, 2)), net(x))
    assert net.goodness(x).shape == (2, 6)
    torch.testing.assert_close(net(x).square().sum(1), net.goodness(x)[-1])


def patterns():
    g = torch.Generator().manual_seed(0)
    centres, y = (torch.rand(CLASSES, 12, generator=g) > 0.5).float(), torch.arange(90) % CLASSES
    return (centres[y] + 0.1 * torch.rand(90, 12, generator=g)).clamp(0, 1), y


def fit(net, **options):
    x, y = patterns()
    settings = {"epochs": 4, "batch_size": 15, "progress": False, "lr": 0.01, "schedule": ff.Schedule(decay_from=0.0)}
    return net.fit(x, y, **settings | options)


LEARNS = {"threshold": 16.0, "temperature": 16.0, "optimizer": ff.Adam(), "learned": (1, 2, 3, 4)}


def test_it_learns():
    net, (x, y) = make((12, 20, 16), torch.float32, **LEARNS), patterns()
    records = fit(net, epochs=15, validation=(x, y))
    assert records[-1]["error"] == error_percent(net, x, y) <= 10.0
    for first, last in zip(records[0]["loss"], records[-1]["loss"], strict=True):
        assert last < first


def test_the_same_seed_gives_the_same_bits():
    nets = [make((12, 20, 16), torch.float32, **LEARNS) for _ in range(3)]
    for net, seed in zip(nets, (3, 3, 4), strict=True):
        fit(net, epochs=2, seed=seed)
    a, b, c = (net.state_dict() for net in nets)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_training_resumes_from_the_state_dict_to_the_same_bits():
    options = {"schedule": None}
    whole, first, second = (make((12, 8, 6), torch.float32, optimizer=ff.Adam()) for _ in range(3))
    fit(whole, epochs=4, **options)
    history = fit(first, epochs=2, **options)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    fit(second, epochs=4, history=history, **options)
    for name, t in whole.state_dict().items():
        assert torch.equal(t, second.state_dict()[name])


def test_copies_and_casts():
    net, x = make(dtype=torch.float32), images(dtype=torch.float32)
    twin = copy.deepcopy(net)
    y = torch.tensor([0, 1, 2, 0, 1, 2])
    twin.label_step(x, y, (y + 1) % 3)
    assert not torch.equal(twin.layers[0].weight, net.layers[0].weight)
    low = net.to(torch.bfloat16)
    g = low.label_step(x.bfloat16(), y, (y + 1) % 3).goodness_pos
    assert g.dtype == torch.float32
    assert g.isfinite().all()
    assert low.label_goodness(x.bfloat16()).shape == (2, 6, 3)


def test_rows_of_zeros_and_huge_rows_stay_finite():
    net = make(dtype=torch.float32)
    x = torch.stack([torch.zeros(12), torch.full((12,), 1e15)])
    y = torch.tensor([0, 1])
    assert net.label_goodness(x).isfinite().all()
    assert net.label_step(x, y, 1 - y).loss.isfinite().all()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: make(damping=1.0), ValueError, r"damping must be in \[0, 1\), got 1.0"),
        (lambda: make(learned=(0,)), ValueError, r"learned\[0\] must be in"),
        (lambda: make(learned=(2, 3, 2)), ValueError, r"learned must hold .* each once, got \[2, 3, 2\]"),
        (lambda: make(judged=()), ValueError, "judged must hold at least one"),
        (lambda: make(judged=(3, 0)), ValueError, r"judged\[1\] must be in"),
        (lambda: make((12,)), ValueError, "sizes must hold"),
        (lambda: ff.RecurrentFFNet.from_sizes([4, 3]), ValueError, "num_classes must be given"),
        (
            lambda: ff.RecurrentFFNet([ff.FFLinear(12, 7), ff.FFLinear(7, 5)], num_classes=3),
            ValueError,
            r"layers\[1\] must take in_features = 7 \+ 3, the widths below and above it, got 7",
        ),
        (
            lambda: ff.RecurrentFFNet([ff.FFLinear(5, 7), ff.FFLinear(10, 5)], num_classes=3),
            ValueError,
            r"layers\[0\] must take in_features = inputs \+ 5, the width above it, got 5",
        ),
        (lambda: make()[:1], TypeError, "cannot be taken apart"),
        (lambda: make().step(images(), images()), TypeError, "call label_step"),
        (lambda: make().label_goodness(images(width=11)), ValueError, "x must have 12 inputs a row, got 11"),
        (lambda: make().label_goodness(images(), torch.full((6, 1), 3)), ValueError, "labels must be in"),
        (lambda: fit(make(dtype=torch.float32), mode="greedy"), TypeError, "cannot be taken apart"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("option", ["loss", "optimizer", "negatives"])
def test_fit_refuses_what_the_net_has_no_step_for(option):
    net = make(dtype=torch.float32)
    given = {
        "loss": ff.Logistic(4.0, 2.0),
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "negatives": ff.HybridImages((1, 3, 4)),
    }
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=rf"{option} .*must be"):
        fit(net, **{option: given[option]})
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_head_sees_the_pass_upwards_and_finds_hard_negatives():
    torch.manual_seed(1)
    layers = [ff.FFLinear(12 + 16, 20, normalize="rms"), ff.FFLinear(20 + 3, 16, normalize="rms")]
    head = ff.SoftmaxHead([20, 16], CLASSES, layers=[0, 1], optimizer=ff.HintonSGD(lr=0.3))
    net = ff.RecurrentFFNet(layers, num_classes=CLASSES, head=head, predict_by="head")
    x, y = patterns()
    records = fit(net, negatives=ff.HardLabels(), validation=(x, y), lr=0.001, epochs=6)
    assert records[-1]["head_loss"] < records[0]["head_loss"]
    assert records[-1]["error"] == 0
    ys, totals = net.neutral_pass(x)
    assert torch.equal(ys[-1], net(x))
    torch.testing.assert_close(totals[0], ys[0].square().sum(1))
    assert torch.equal(net.predict(x), head.logits(ys, totals).argmax(1))


def test_minimised_goodness_swaps_what_rises():
    up, down = (make(minimize=m, optimizer=ff.SGD(lr=0.1)) for m in (False, True))
    x, y = images(), torch.tensor([0, 1, 2, 0, 1, 2])
    wrong = (y + 1) % 3
    a, b = up.label_step(x, y, wrong), down.label_step(x, wrong, y)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.goodness_pos, b.goodness_neg)
    for p, q in zip(up.parameters(), down.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    torch.testing.assert_close(down.label_scores(x), -down.label_goodness(x).sum(0))
