"""FFNet.fit: what is trained, in what order, from which draws, and what is reported."""

import itertools

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import ffkernels as ff
from ffkernels.batches import Draws

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
