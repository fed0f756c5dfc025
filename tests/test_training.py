"""FFNet.fit: what is trained, in what order, from which draws, and what is reported."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ffkernels as ff
from ffkernels import training
from ffkernels.batches import Draws
from ffkernels.nn import NetStep

X = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
LABELS = torch.randint(3, (50,), generator=torch.Generator().manual_seed(1))


def make(sizes=(12, 7, 5), **options):
    torch.manual_seed(1)
    return ff.FFNet.from_sizes(sizes, num_classes=3, **options)


def fit(net, *data, **options):
    return net.fit(*(data or (X, LABELS)), **{"epochs": 3, "batch_size": 16, "progress": False} | options)


LEARNABLE = X[:, 3:6].argmax(1)


def state(net):
    return {name: t.clone() for name, t in net.state_dict().items()}


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_times(records):
    return [{k: v for k, v in r.items() if k not in ("seconds", "rows_per_second")} for r in records]


MODES = pytest.mark.parametrize("mode", ["simultaneous", "greedy"])


@MODES
def test_the_same_seed_gives_the_same_bits(mode):
    nets, records = [make(), make(), make()], []
    for net, seed in zip(nets, (5, 5, 6), strict=True):
        torch.manual_seed(seed + len(records))  # torch's own generator is not used
        records.append(fit(net, mode=mode, seed=seed))
    assert same_bits(state(nets[0]), state(nets[1]))
    assert without_times(records[0]) == without_times(records[1])
    assert not same_bits(state(nets[0]), state(nets[2]))


@MODES
@pytest.mark.parametrize("stop", [1, 2, 4, 6])
def test_history_resumes_to_the_same_bits(mode, stop):
    straight, resumed = make(), make()
    records = fit(straight, mode=mode, epochs=4)
    fit_until = itertools.count(1)

    class Killed(Exception):
        pass

    saved = {}

    def kill(net, history):
        if next(fit_until) == stop:
            saved.update(state(net))
            saved_records.extend(history)
            raise Killed

    saved_records = []
    if stop <= len(records):
        with pytest.raises(Killed):
            fit(resumed, mode=mode, epochs=4, callbacks=[kill])
        resumed = make()
        resumed.load_state_dict(saved)
    rest = fit(resumed, mode=mode, epochs=4, history=saved_records)
    assert without_times(rest) == without_times(records)
    assert same_bits(state(resumed), state(straight))


def test_a_layer_that_was_stopped_early_stays_stopped_after_a_resume():
    class StopFirstLayer:
        def __call__(self, net, history):
            return history[-1]["layer"] == 0 and history[-1]["epoch"] == 2

    straight, resumed = make(), make()
    records = fit(straight, mode="greedy", callbacks=[StopFirstLayer()])
    assert [(r["layer"], r["epoch"]) for r in records] == [(0, 1), (0, 2), (1, 4), (1, 5), (1, 6)]
    saved = {}
    fit(
        resumed, mode="greedy",
        callbacks=[StopFirstLayer(), lambda net, history: len(history) == 3 and saved.update(state(net))],
    )  # fmt: skip
    resumed = make()
    resumed.load_state_dict(saved)
    rest = fit(resumed, mode="greedy", history=records[:3])
    assert without_times(rest) == without_times(records)
    assert same_bits(state(resumed), state(straight))


def by_hand(net, mode, epochs, batch_size, seed):
    """fit's order of things, on overlays."""
    for stage in [range(len(net))] if mode == "simultaneous" else [range(i, i + 1) for i in range(len(net))]:
        for epoch in range(epochs):
            number = (stage.start if mode == "greedy" else 0) * epochs + epoch + 1
            draws = Draws(seed, number)
            for rows in torch.randperm(len(X), generator=draws["order"]).split(batch_size):
                wrong = ff.wrong_labels(LABELS[rows], 3, draws["negatives"])
                x = [ff.overlay(X[rows].to(net.layers[0].weight.dtype), each, 3) for each in (LABELS[rows], wrong)]
                for i in range(stage.stop):
                    y = net.layers[i].step(*x)[:2] if i in stage else [net.layers[i](part) for part in x]
                    x = list(y)


@MODES
@pytest.mark.parametrize("optimizer", [ff.SGD(lr=0.3), ff.Adam(lr=0.01)], ids=["sgd", "adam"])
def test_fit_is_the_layers_steps(mode, optimizer):
    ours, theirs = (make(dtype=torch.float64, optimizer=optimizer) for _ in range(2))
    fit(ours, mode=mode, epochs=2, seed=3)
    by_hand(theirs, mode, 2, 16, 3)
    for (name, a), b in zip(state(ours).items(), state(theirs).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


@MODES
@pytest.mark.parametrize("shape", [(12,), (1, 3, 4), (3, 2, 2)], ids=str)
@pytest.mark.parametrize(
    ("fused", "torchs"),
    [
        (ff.SGD(lr=0.3, momentum=0.5), lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.5)),
        (ff.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
    ],
    ids=["sgd", "adam"],
)
def test_an_optimizer_of_torch_equals_the_fused_one(mode, shape, fused, torchs):
    ours, theirs = (make(dtype=torch.float64, optimizer=fused) for _ in range(2))
    x = X.double().view(-1, *shape)
    first = fit(ours, x, LABELS, mode=mode)
    second = fit(theirs, x, LABELS, mode=mode, optimizer=torchs(theirs.parameters()))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9)
    for a, b in zip(first, second, strict=True):
        for name in ("loss", "goodness_positive"):
            for ours_value, theirs_value in zip(a[name], b[name], strict=True):
                assert (ours_value is None) == (theirs_value is None)
                assert ours_value is None or ours_value == pytest.approx(theirs_value, rel=1e-6)


@MODES
def test_any_optimizer_of_torch_trains(mode):
    net = make()
    before = state(net)
    fit(net, mode=mode, optimizer=torch.optim.RMSprop(net.parameters(), lr=0.01))
    after = state(net)
    for name in before:
        changed = not torch.equal(before[name], after[name])
        assert changed == ("optimizer_state" not in name), name


def test_greedy_trains_one_layer_after_the_other():
    net, seen = make(), []
    fit(net, mode="greedy", callbacks=[lambda net, history: seen.append(state(net)) and None])
    for before, after in itertools.pairwise(seen[:3]):
        assert torch.equal(before["layers.1.weight"], after["layers.1.weight"])
        assert not torch.equal(before["layers.0.weight"], after["layers.0.weight"])
    for before, after in itertools.pairwise(seen[3:]):
        assert torch.equal(before["layers.0.weight"], after["layers.0.weight"])
        assert not torch.equal(before["layers.1.weight"], after["layers.1.weight"])


def test_a_loader_is_used_in_its_own_order():
    class Loader(list):
        pass

    batches = Loader([(X[:20], LABELS[:20]), (X[20:], LABELS[20:])])
    ours, theirs = make(), make()
    fit(ours, batches, epochs=2)
    for epoch in (1, 2):
        draws = Draws(0, epoch)
        for x, labels in batches:
            theirs.label_step(x, labels, ff.wrong_labels(labels, 3, draws["negatives"]))
    assert same_bits(state(ours), state(theirs))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this process may use cores
@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader(workers):
    loader = DataLoader(
        TensorDataset(X, LABELS), batch_size=16, shuffle=True, num_workers=workers,
        generator=torch.Generator().manual_seed(4),
    )  # fmt: skip
    records = fit(make(), loader)
    assert len(records) == 3
    assert records[-1]["loss"][0] < records[0]["loss"][0]


def test_labels_need_not_be_int64_nor_x_of_the_nets_dtype():
    ours, theirs = make(), make()
    fit(ours, X.double().float().double(), LABELS.to(torch.uint8))
    fit(theirs)
    assert same_bits(state(ours), state(theirs))


# ---------------------------------------------------------------------------------------------------------------------
# Records, callbacks, rates, progress


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


@pytest.mark.parametrize(("mode", "epochs"), [("simultaneous", 25), pytest.param("greedy", 25, marks=pytest.mark.slow)])
def test_it_learns_digits(mode, epochs):
    datasets = pytest.importorskip("sklearn.datasets")
    x, labels = (torch.from_numpy(t) for t in datasets.load_digits(return_X_y=True))
    x, order = (x / 16).float(), torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    torch.manual_seed(0)
    net = ff.FFNet.from_sizes(
        [64, 200, 200], num_classes=10, normalize="rms", threshold=1.0, optimizer=ff.Adam(lr=0.01)
    )  # fmt: skip
    assert ff.error_percent(net, x[test], labels[test]) > 60
    records = net.fit(x[train], labels[train], epochs=epochs, mode=mode, batch_size=100, progress=False)
    assert ff.error_percent(net, x[test], labels[test]) < 10
    last = records[-1]
    layer = last["layer"] or 0
    assert last["goodness_positive"][layer] > 1 > last["goodness_negative"][layer]  # either side of the threshold


def fixed_by_hand(net, once, mode, batch_size):
    """fit with labels drawn once, through a function that looks up what belongs to each image."""
    wrong = once.draw(LABELS, 3, 0)
    place = {tuple(image.tolist()): i for i, image in enumerate(X)}
    rows = []

    def keep(x, generator):
        rows[:] = [place[tuple(image.tolist())] for image in x]
        return x

    def look_up(labels, num_classes, generator, logits):
        return wrong[rows]

    return fit(net, mode=mode, batch_size=batch_size, negatives=look_up, augment=keep)


@MODES
@pytest.mark.parametrize("batch_size", [16, 50])
@pytest.mark.parametrize("kind", [ff.UniformLabels(), ff.PermutedLabels()], ids=["uniform", "permuted"])
def test_negatives_drawn_once_belong_to_their_images_in_all_epochs(mode, batch_size, kind):
    once = ff.DrawnOnce(kind)
    ours, theirs, anew = make((12, 7, 5, 4)), make((12, 7, 5, 4)), make((12, 7, 5, 4))
    records = fit(ours, mode=mode, batch_size=batch_size, negatives=once)
    assert without_times(records) == without_times(fixed_by_hand(theirs, once, mode, batch_size))
    assert same_bits(state(ours), state(theirs))
    fit(anew, mode=mode, batch_size=batch_size, negatives=kind)
    assert not same_bits(state(ours), state(anew))


def test_negatives_drawn_once_are_those_of_a_training_that_goes_on():
    straight, resumed = make(), make()
    options = {"mode": "greedy", "batch_size": 50, "negatives": ff.DrawnOnce(ff.PermutedLabels())}
    records = fit(straight, **options)
    saved = []

    def stop(net, history):
        saved[:] = history
        if len(history) == 5:  # in the second layer
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(resumed, callbacks=[stop], **options)
    assert without_times(fit(resumed, history=saved, **options)) == without_times(records)
    assert same_bits(state(resumed), state(straight))


@pytest.mark.parametrize(("once", "calls"), [(True, 1 + 1), (False, 3 + 3)])
def test_frozen_layers_run_once_where_their_input_stays_the_same(once, calls, monkeypatch):
    seen, climb = [], ff.FFNet.climb_labels
    monkeypatch.setattr(ff.FFNet, "climb_labels", lambda net, *args: seen.append(len(net)) or climb(net, *args))
    kind = ff.PermutedLabels()
    fit(make((12, 7, 5, 4)), mode="greedy", batch_size=50, negatives=ff.DrawnOnce(kind) if once else kind)
    assert sorted(seen) == [1] * (calls // 2) + [2] * (calls // 2)


def test_negatives_drawn_once_need_tensors():
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=16)
    with pytest.raises(TypeError, match="data must be tensors for negatives drawn once, got DataLoader"):
        fit(make(), loader, negatives=ff.DrawnOnce(ff.UniformLabels()))
