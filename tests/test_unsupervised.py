"""Training without labels: positives and hybrids as they are, and a head trained afterwards on frozen layers."""

import copy
import itertools

import pytest
import torch

import ffkernels as ff
from ffkernels import training
from ffkernels.batches import epoch_generator

SHAPE = (1, 4, 4)


def stripes():
    """Four kinds of stripes under noise: what tells them apart is their long-range structure."""
    g = torch.Generator().manual_seed(0)
    grid = torch.arange(4)
    kinds = torch.stack([(grid[:, None] + 0 * grid) % 2, (grid + 0 * grid[:, None]) % 2, (grid[:, None] + grid) % 2,
                         ((grid[:, None] + grid) // 2) % 2]).flatten(1)  # fmt: skip
    y = torch.arange(120) % 4
    return (kinds[y] + 0.3 * torch.rand(120, 16, generator=g)).clamp(0, 1), y


X, Y = stripes()


def make(sizes=(16, 20, 12), head=True, **options):
    torch.manual_seed(1)
    options = {"normalize": "rms", "goodness": "sum", "threshold": 12.0, "temperature": 6.0} | options
    stack = [ff.FFLinear(k, n, **options) for k, n in itertools.pairwise(sizes)]
    softmax = ff.SoftmaxHead(sizes[1:], 4, layers=range(len(stack)), optimizer=ff.HintonSGD(lr=0.3)) if head else None
    return ff.FFNet(stack, num_classes=4, label_strength=None, head=softmax, predict_by="head" if head else "goodness")


def fit(net, **options):
    settings = {"epochs": 3, "head_epochs": 2, "batch_size": 24, "negatives": ff.HybridImages(SHAPE, blurs=2)}
    return net.fit(X, Y, progress=False, **settings | options)


def layers_of(net):
    return {name: t.clone() for name, t in net.layers.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def by_hand(net, mode, epochs, blurs):
    """The layers' steps on images and hybrids of each minibatch."""
    for stage in [range(len(net))] if mode == "simultaneous" else [range(i, i + 1) for i in range(len(net))]:
        for epoch in range(epochs):
            number = (stage.start if mode == "greedy" else 0) * epochs + epoch + 1
            masks = epoch_generator(0, number, "negatives")
            for rows in torch.randperm(len(X), generator=epoch_generator(0, number, "order")).split(24):
                x = X[rows].to(net.layers[0].weight.dtype)
                pair = [x, ff.hybrid_images(x, SHAPE, blurs=blurs, generator=masks)]
                for i in range(stage.stop):
                    layer = net.layers[i]
                    pair = list(layer.step(*pair)[:2]) if i in stage else [layer(part) for part in pair]


@pytest.mark.parametrize("mode", ["simultaneous", "greedy"])
@pytest.mark.parametrize("peer", [0.0, 0.1])
def test_fit_is_the_layers_steps_on_images_and_hybrids(mode, peer):
    ours, theirs = (make(dtype=torch.float64, optimizer=ff.SGD(lr=0.1), peer=peer) for _ in range(2))
    fit(ours, mode=mode, epochs=2)
    by_hand(theirs, mode, 2, 2)
    a, b = layers_of(ours), layers_of(theirs)
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_the_layers_never_see_a_label():
    nets = [make(), make()]
    for net, labels in zip(nets, (Y, Y.flip(0)), strict=True):
        net.fit(X, labels, epochs=2, head_epochs=1, negatives=ff.HybridImages(SHAPE), progress=False)
    assert same(layers_of(nets[0]), layers_of(nets[1]))
    assert not same(nets[0].head.state_dict(), nets[1].head.state_dict())


def test_the_head_learns_on_frozen_layers_alone():
    net, alone = make(), make()
    records = fit(net, epochs=4, head_epochs=6, validation=(X, Y))
    fit(alone, epochs=4, head_epochs=1)
    assert same(layers_of(net), layers_of(alone))
    assert [(r["epoch"], r["layer"]) for r in records] == [*((e, None) for e in range(1, 5)),
                                                          *((e, 2) for e in range(5, 11))]  # fmt: skip
    for record in records[:4]:
        assert record["error"] is None  # the head knows nothing yet
        assert "head_loss" not in record
        assert None not in record["loss"]
    for record in records[4:]:
        assert record["loss"] == [None, None]
    assert records[-1]["head_loss"] < records[4]["head_loss"]
    assert records[-1]["error"] == training.error_percent(net, X, Y) < 10
    (y, totals), (ys, neutral_totals) = net.climb(X), net.neutral_pass(X)
    assert torch.equal(ys[-1], y)
    assert torch.equal(neutral_totals[0], totals[0])


@pytest.mark.parametrize("mode", ["simultaneous", "greedy"])
def test_the_same_seed_gives_the_same_bits_and_history_resumes_to_them(mode):
    whole, other = make(), make()
    records = fit(whole, mode=mode)
    fit(other, mode=mode, seed=1)
    assert not same(layers_of(whole), layers_of(other))
    for stop in range(1, len(records)):
        first, second, saved = make(), make(), {}

        def save(net, history, stop=stop, saved=saved):
            if len(history) == stop:
                saved.update(copy.deepcopy(net.state_dict()))

        fit(first, mode=mode, callbacks=[save])
        second.load_state_dict(saved)
        fit(second, mode=mode, history=records[:stop])
        assert same(second.state_dict(), whole.state_dict())


def test_images_of_ones_own_any_loss_and_any_optimizer():
    class Inverted:
        def images(self, x, generator):
            return 1 - x

    fused, by_loss, by_optimizer = (make(head=False, optimizer=ff.SGD(lr=0.05)) for _ in range(3))
    options = {"negatives": Inverted(), "head_epochs": 0}
    records = fit(fused, **options)
    fit(by_loss, loss=ff.Logistic(12.0, 6.0), **options)
    fit(by_optimizer, optimizer=torch.optim.SGD(by_optimizer.parameters(), lr=0.05), **options)
    for name, t in layers_of(fused).items():
        torch.testing.assert_close(layers_of(by_loss)[name], t)
        if "state" not in name:
            torch.testing.assert_close(layers_of(by_optimizer)[name], t)
    up, down = fused.goodness(X).mean(1), fused.goodness(1 - X).mean(1)
    assert (up > down).all()
    assert records[-1]["goodness_positive"][0] > records[-1]["goodness_negative"][0]
    minimal = make(head=False, optimizer=ff.SGD(lr=0.05))
    minimal.minimize = True
    fit(minimal, **options)
    assert (minimal.goodness(X).mean(1) < minimal.goodness(1 - X).mean(1)).all()


def test_four_dimensional_images_are_the_same():
    flat, images = make(), make()
    fit(flat)
    images.fit(
        X.view(-1, *SHAPE), Y, epochs=3, head_epochs=2, batch_size=24, negatives=ff.HybridImages(blurs=2),
        progress=False,
    )  # fmt: skip
    assert same(flat.state_dict(), images.state_dict())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fit(make(), negatives=None), "negatives must be images .* for a net with label_strength None"),
        (
            lambda: fit(ff.FFNet.from_sizes([16, 5], num_classes=4), head_epochs=0),
            "negatives must be images .* its label_strength is 1.0",
        ),
        (lambda: fit(make(head=False)), "head_epochs must be 0 .* got one without a head"),
        (lambda: fit(make(), head_epochs=-1), "head_epochs must be in"),
        (lambda: make(head=False).predict(X), "label_strength must be a number .* it is None"),
        (lambda: make().label_step(X, Y, Y), "label_strength must be a number"),
        (lambda: ff.HybridImages(blurs=99), r"blurs must be in \[0, 13\]"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_average_and_head_epochs_do_not_go_together():
    net = make()
    net.average = ff.WeightAverage(net)
    with pytest.raises(ValueError, match="got one with an average"):
        fit(net)
