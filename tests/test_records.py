"""FFNet.fit: records, callbacks, learning rates, loaders' lengths, the progress bar."""

import pytest
import torch
from test_training import LABELS, MODES, X, fit, make, same_bits, state

import ffkernels as ff
from ffkernels import training
from ffkernels.batches import Draws
from ffkernels.nn import NetStep


@MODES
def test_records(mode):
    net, mine = make(), []
    validation = (X[:10], LABELS[:10])
    records = fit(net, mode=mode, validation=validation, lr=0.01, schedule=lambda t: 1 - t, callbacks=[
        lambda net, history: mine.append((len(history), ff.error_percent(net, *validation))) and None])  # fmt: skip
    assert [r["epoch"] for r in records] == list(range(1, 4 if mode == "simultaneous" else 7))
    assert [r["layer"] for r in records] == ([None] * 3 if mode == "simultaneous" else [0] * 3 + [1] * 3)
    for r in records:
        assert set(r) == {
            "epoch", "layer", "loss", "goodness_positive", "goodness_negative", "lr", "rows_per_second", "seconds",
            "error",
        }  # fmt: skip
        trained = [0, 1] if r["layer"] is None else [r["layer"]]
        for name in ("loss", "goodness_positive", "goodness_negative"):
            assert [i for i, value in enumerate(r[name]) if value is not None] == trained
        assert r["seconds"] > 0
        assert r["rows_per_second"] == pytest.approx(100 / r["seconds"])
        own = (r["epoch"] - 1) % 3
        assert r["lr"] == pytest.approx(0.01 * (1 - (own + 0.75) / 3), rel=1e-5)  # of the last of four minibatches
    if mode == "simultaneous":
        assert [r["error"] for r in records] == [error for _, error in mine]
    assert [count for count, _ in mine] == list(range(1, len(records) + 1))


def test_means_are_over_rows_not_batches():
    net = make(optimizer=ff.SGD(lr=0.0))
    (record,) = fit(net, epochs=1, batch_size=48, seed=2)  # batches of 48 and 2
    draws = Draws(2, 1)
    order = torch.randperm(len(X), generator=draws["order"])
    wrong = torch.cat([ff.wrong_labels(LABELS[rows], 3, draws["negatives"]) for rows in order.split(48)])
    positive, negative = (net.goodness(ff.overlay(X[order], labels, 3)) for labels in (LABELS[order], wrong))
    assert record["goodness_positive"] == pytest.approx(positive.mean(1).tolist(), rel=1e-4)
    assert record["goodness_negative"] == pytest.approx(negative.mean(1).tolist(), rel=1e-4)
    g, sign = torch.cat([positive, negative], 1), torch.cat([torch.ones(50), -torch.ones(50)])
    expected = [ff.logistic_loss(each, sign)[0].item() for each in g]
    assert record["loss"] == pytest.approx(expected, rel=1e-4)


def test_every_seed_epoch_and_purpose_has_random_numbers_of_its_own():
    keys = [(s, e, p) for s in (0, 1) for e in (1, 2) for p in ("order", "negatives")]
    numbers = {tuple(torch.rand(3, generator=Draws(seed, epoch)[purpose]).tolist()) for seed, epoch, purpose in keys}
    assert len(numbers) == len(keys)


def test_negatives_are_drawn_anew_every_epoch():
    draws = [ff.wrong_labels(LABELS, 3, Draws(0, epoch)["negatives"]) for epoch in (1, 2)]
    assert not torch.equal(*draws)


@MODES
def test_a_true_callback_stops_and_all_are_called(mode):
    called = []
    records = fit(make(), mode=mode, callbacks=[
        lambda net, history: called.append("a") or True, lambda net, history: called.append("b")])  # fmt: skip
    stages = 1 if mode == "simultaneous" else 2
    assert len(records) == stages
    assert called == ["a", "b"] * stages


def test_early_stopping():
    stop = ff.EarlyStopping(patience=2)
    history = []
    for error, expected in [
        (9.0, False),
        (8.0, False),
        (8.0, False),
        (8.5, True),
        (7.0, False),
        (7.5, False),
        (7.5, True),
    ]:
        history.append({"layer": None, "error": error})
        assert stop(None, history) == expected
    history.append({"layer": 1, "error": 50.0})  # another layer's counts on its own
    assert not stop(None, history)
    with pytest.raises(ValueError, match="monitor must be a number"):
        ff.EarlyStopping(2, "loss")(None, [{"layer": None, "loss": [1.0]}])


def test_early_stopping_ends_fit():
    net = make(optimizer=ff.SGD(lr=0.0))  # learns nothing: no new minimum after the first epoch
    assert len(fit(net, epochs=20, validation=(X, LABELS), callbacks=[ff.EarlyStopping(3)])) == 4


@MODES
@pytest.mark.parametrize("own", [False, True], ids=["fused", "torch.optim"])
def test_a_rate_and_a_schedule(mode, own):
    asked, nets = [], [make(optimizer=ff.SGD(lr=rate)) for rate in (0.25, 9.0, 0.5, 9.0)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=net.layers[0].optimizer.lr) if own else None for net in nets]
    options = [{}, {"lr": 0.25}, {"schedule": lambda t: asked.append(t) or 0.5}, {"lr": 0.5, "schedule": lambda t: 0.5}]
    for net, optimizer, more in zip(nets, optimizers, options, strict=True):
        fit(net, mode=mode, optimizer=optimizer, **more)
        assert same_bits(state(nets[0]), state(net))
    assert asked == pytest.approx([i / 12 for i in range(12)] * (1 if mode == "simultaneous" else 2))
    assert nets[1].layers[0].optimizer == ff.SGD(lr=9.0)


@pytest.mark.parametrize("own", [False, True], ids=["fused", "torch.optim"])
def test_a_failure_restores_the_optimizers(own):
    net = make(optimizer=ff.SGD(lr=0.25))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5) if own else None

    def fail(net, history):
        raise KeyError

    with pytest.raises(KeyError):
        fit(net, lr=0.125, optimizer=optimizer, callbacks=[fail])
    assert [layer.optimizer for layer in net.layers] == [ff.SGD(lr=0.25)] * 2
    if own:
        assert optimizer.param_groups[0]["lr"] == 0.5
    fit(net, lr=0.125, optimizer=optimizer)
    assert not own or optimizer.param_groups[0]["lr"] == 0.5


def test_a_rate_under_another_default_dtype():
    net = make()
    torch.set_default_dtype(torch.float64)
    try:
        (record,) = fit(net, epochs=1, lr=0.5)
    finally:
        torch.set_default_dtype(torch.float32)
    assert record["lr"] == 0.5


def test_a_scheduler_of_torchs_keeps_its_rates():
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    records = fit(net, optimizer=optimizer, callbacks=[lambda net, history: scheduler.step()])
    assert [r["lr"] for r in records] == [1.0, 0.5, 0.25]
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_a_callback_may_give_a_layer_another_optimizer():
    net = make(optimizer=ff.SGD(lr=0.5))

    def slower(net, history):
        net.layers[0].optimizer = ff.SGD(lr=0.25)

    assert [r["lr"] for r in fit(net, callbacks=[slower])] == [0.5, 0.25, 0.25]
    assert net.layers[0].optimizer == ff.SGD(lr=0.25)


def test_records_do_not_depend_on_how_often_the_progress_bar_looks():
    def spread(*shape):  # sums of numbers so different are rounded, each order in its own way
        return torch.rand(shape, generator=g) * 10.0 ** torch.randint(-15, 15, shape, generator=g)

    pairs = []
    for often in (False, True):
        g, sums = torch.Generator().manual_seed(0), training.Sums(2, True, torch.device("cpu"))
        for _ in range(2 * training.Sums.AT_ONCE + 3):
            sums.add(7, NetStep(spread(2, 3), spread(2, 3), spread(2)), spread())
            if often:
                sums.means()
        pairs.append(sums.means())
    assert all(torch.equal(a, b) for a, b in zip(*pairs, strict=True))


class Counted:
    """A loader that gives more or fewer batches than its length."""

    def __init__(self, length, given):
        self.length, self.given = length, given

    def __len__(self):
        return self.length

    def __iter__(self):
        return iter([(X, LABELS)] * self.given)


def test_a_loader_that_gives_more_than_its_length_and_one_that_gives_nothing():
    asked = []
    fit(make(), Counted(2, 3), epochs=2, schedule=lambda t: asked.append(t) or 1.0)
    assert asked == [0.0, 0.25, 0.25, 0.5, 0.75, 0.75]
    with pytest.raises(ValueError, match="the loader must give 2 batches in every epoch, as its length says, got none"):
        fit(make(), Counted(2, 0))


def test_arrays_are_no_tensors():
    with pytest.raises(ValueError, match="data must be a tensor with labels, got ndarray"):
        fit(make(), X.numpy(), LABELS.numpy())


def test_error_percent_of_what_has_no_error():
    net = make()
    for x, labels, error, message in (
        (X[:0], LABELS[:0], ValueError, "x must have at least one row"),
        (X, LABELS + 1, ValueError, r"labels must be in \[0, 3\)"),
        (X.byte(), LABELS, TypeError, "got torch.uint8"),
    ):
        with pytest.raises(error, match=message):
            ff.error_percent(net, x, labels)


@MODES
def test_the_progress_bar(mode, capsys):
    fit(make(), mode=mode, epochs=1, progress=True)
    text = capsys.readouterr().err
    for title in ["training"] if mode == "simultaneous" else ["layer 1/2", "layer 2/2"]:
        assert title in text
    assert "4/4" in text
    fit(make(), mode=mode, epochs=1, progress=False)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("with_head", [True, False], ids=["head", "no-head"])
def test_means_over_more_steps_than_are_added_up_at_once(with_head):
    g, sizes = torch.Generator().manual_seed(0), [3] * training.Sums.AT_ONCE + [5, 2]
    sums, steps = training.Sums(2, with_head, torch.device("cpu")), []
    for chosen in sizes:
        pos, neg, loss, head = (torch.rand(shape, generator=g) for shape in ((2, chosen), (2, chosen), (2,), ()))
        steps.append((pos, neg, loss * torch.ones(chosen, 1), head))
        sums.add(2 * chosen, NetStep(pos, neg, loss), head if with_head else None)
        if len(steps) == 10:
            sums.means()  # as the progress bar does
    means, head_mean = sums.means()
    pos, neg, loss = (torch.cat([s[i] for s in steps], dim).double() for i, dim in ((0, 1), (1, 1), (2, 0)))
    assert torch.allclose(means, torch.stack([loss.mean(0), pos.mean(1), neg.mean(1)]))
    assert sums.inputs == 2 * sum(sizes)
    if with_head:
        expected = sum(n * s[3].item() for n, s in zip(sizes, steps, strict=True)) / sum(sizes)
        assert head_mean.item() == pytest.approx(expected)
    else:
        assert head_mean is None


def test_what_the_progress_bar_says():
    means = torch.tensor([[1.0, 2.0], [10.0, 20.0], [3.0, 4.0]])
    assert training.status(7, means, None, 5000.0) == "epoch 7, loss 1 2, g+ 10 20, g- 3 4, 5,000 rows/s"
    assert (
        training.status(7, means[:, :1], torch.tensor(0.25), 5.0) == "epoch 7, loss 1, g+ 10, g- 3, head 0.25, 5 rows/s"
    )
    assert training.status(7, means[:, :0], torch.tensor(0.25), 5.0) == "epoch 7, head 0.25, 5 rows/s"
