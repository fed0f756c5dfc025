"""FFNet.fit with a head, negatives, losses, dropout, peer normalisation and an average."""

import pytest
import torch
from test_training import LABELS, LEARNABLE, MODES, X, fit, make, same_bits, state, without_times

import ffkernels as ff


def make_full(minimize=False, head=True, dropout=0.25, activation="relu", **options):
    """A net with everything that training may have."""
    torch.manual_seed(1)
    options = {"goodness": "sum", "threshold": 3.0, "temperature": 2.0, "activation": activation} | options
    layers = [
        ff.FFLinear(k, n, peer=0.1, dropout=dropout if i else 0, optimizer=ff.HintonSGD(lr=0.1), **options)
        for i, (k, n) in enumerate([(12, 7), (7, 5), (5, 6)])
    ]
    own = ff.SoftmaxHead([7, 5, 6], 3, optimizer=ff.HintonSGD(lr=0.5), dtype=layers[0].weight.dtype) if head else None
    net = ff.FFNet(layers, num_classes=3, minimize=minimize, head=own)
    net.average = ff.WeightAverage(net, every=2)
    return net


FULL = {
    "schedule": ff.Schedule(0.2, 0.5), "negatives": ff.HardLabels(), "augment": ff.Shift(1, (1, 3, 4)), "seed": 4,
    "validation": (X[:9], LABELS[:9]),
}  # fmt: skip


@pytest.mark.parametrize("loss", [None, ff.SymBa(0.5)], ids=["fused", "layer by layer"])
@pytest.mark.parametrize("stop", [1, 3])
def test_with_everything_it_resumes_to_the_same_bits(loss, stop):
    straight, resumed, saved = make_full(), make_full(), {}
    records = fit(straight, epochs=4, loss=loss, **FULL)

    def kill(net, history):
        if len(history) == stop:
            saved.update(net=state(net), history=list(history))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(resumed, epochs=4, loss=loss, callbacks=[kill], **FULL)
    resumed = make_full()
    resumed.load_state_dict(saved["net"])
    rest = fit(resumed, epochs=4, loss=loss, history=saved["history"], **FULL)
    assert without_times(rest) == without_times(records)
    assert same_bits(state(resumed), state(straight))
    other = make_full()
    fit(other, epochs=4, loss=loss, **FULL | {"seed": 5})
    assert not same_bits(state(other), state(straight))


@pytest.mark.parametrize("activation", ["relu", "tanh"])
@pytest.mark.parametrize("minimize", [False, True])
@pytest.mark.parametrize("goodness", ["sum", "mean"])
@MODES
def test_layer_by_layer_is_the_fused_step(mode, minimize, goodness, activation):
    options = {
        "minimize": minimize, "goodness": goodness, "activation": activation, "head": mode != "greedy",
        "dropout": 0.25 * (mode != "greedy"), "dtype": torch.float64,
    }  # fmt: skip
    ours, theirs = make_full(**options), make_full(**options)
    more = FULL if mode != "greedy" else FULL | {"negatives": None}
    first = fit(ours, mode=mode, **more)
    second = fit(theirs, mode=mode, loss=ff.Logistic(3.0, 2.0), **more)
    for (name, a), b in zip(state(ours).items(), state(theirs).values(), strict=True):
        assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name
    for a, b in zip(first, second, strict=True):
        for name in ("loss", "goodness_positive", "goodness_negative"):
            assert [v is None or pytest.approx(v, rel=1e-6) for v in a[name]] == [v is None or v for v in b[name]]
    means = [layer.peer_mean for layer in ours.layers]
    assert not any(torch.equal(m, torch.full_like(m, 0.5)) for m in means)


@pytest.mark.parametrize("minimize", [False, True])
def test_the_direction_is_that_of_the_positives(minimize):
    for kind in (None, ff.SymBa(0.5)):
        net = make_full(minimize=minimize, head=False, dropout=0.0)
        (*_, last) = fit(net, epochs=60, loss=kind)
        assert (last["goodness_positive"][0] < last["goodness_negative"][0]) == minimize


def test_a_loss_of_ones_own():
    calls = []

    def logistic(goodness, sign):
        calls.append((goodness.shape, sign.tolist()))
        u = -sign * (goodness - 3.0) / 2.0
        return 2.0 * torch.nn.functional.softplus(u).mean(), -sign * torch.sigmoid(u) / len(sign)

    ours, theirs = make_full(dtype=torch.float64), make_full(dtype=torch.float64)
    fit(ours, loss=[logistic] * 3, **FULL)
    fit(theirs, **FULL)
    assert all(
        torch.allclose(a, b, rtol=1e-7) for a, b in zip(state(ours).values(), state(theirs).values(), strict=True)
    )
    assert calls[0] == ((32,), [1.0] * 16 + [-1.0] * 16)


def test_a_loss_that_fails_changes_nothing():
    def fail(goodness, sign):
        raise ZeroDivisionError

    net = make_full(head=False)
    before = state(net)
    with pytest.raises(ZeroDivisionError):
        fit(net, loss=[ff.Logistic(), ff.Logistic(), fail])
    assert same_bits(before, state(net))


@pytest.mark.parametrize("head_epochs", [0, 2])
def test_the_last_error_of_greedy_training_is_that_of_predict(head_epochs):
    torch.manual_seed(3)
    head = ff.SoftmaxHead([7, 5], 3, optimizer=ff.SGD(lr=0.1)) if head_epochs else None
    layers = [ff.FFLinear(12, 7), ff.FFLinear(7, 5)]
    net = ff.FFNet(layers, num_classes=3, predict_layers=[-1], head=head)
    records = fit(net, mode="greedy", head_epochs=head_epochs, validation=(X, LABELS))
    assert records[-1]["error"] == ff.error_percent(net, X, LABELS)
    assert records[-1]["error"] != ff.error_percent(net, X, LABELS, layers=[0, 1])


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda g, s: g.mean(), TypeError, r"loss must return two tensors, .*, got Tensor"),
        (lambda g, s: (0.5, s), TypeError, "what loss returns first must be a tensor, got float"),
        (lambda g, s: (g, s), ValueError, r"what loss returns first must have shape \(\) = \(\), got \(32,\)"),
        (lambda g, s: (g.mean(), s[:3]), ValueError, r"d loss / d g must have shape \(2 B,\) = \(32,\), got \(3,\)"),
        (lambda g, s: (g.mean(), s.half()), TypeError, "d loss / d g must be torch.float32, got torch.float16"),
    ],
)
def test_what_a_loss_of_ones_own_must_return(loss, error, message):
    net = make_full(head=False)
    before = state(net)
    with pytest.raises(error, match=message):
        fit(net, loss=loss)
    assert same_bits(before, state(net))


def test_negatives_of_ones_own():
    seen = []

    def next_label(labels, num_classes, generator, logits):
        seen.append(logits)
        return (labels + 1) % num_classes

    ours, theirs = make_full(dropout=0.0), make_full(dropout=0.0)
    fit(ours, epochs=1, batch_size=50, negatives=next_label)
    theirs.head.step(*theirs.neutral_pass(X), LABELS)
    theirs.label_step(X, LABELS, (LABELS + 1) % 3)
    assert same_bits(state(ours), state(theirs))
    assert seen[0].shape == (50, 3)


def test_the_average_is_what_is_measured():
    net, validation = make_full(dropout=0.0), (X, LEARNABLE)
    (*_, last) = fit(net, *validation, **FULL | {"validation": validation})
    assert not torch.equal(net.layers[0].weight, net.average.layers_0_weight)
    assert last["error"] != ff.error_percent(net, *validation)
    net.average.copy_to(net)
    assert last["error"] == ff.error_percent(net, *validation)


def test_the_head_is_in_the_records_and_learns():
    (first, *_, last) = fit(make_full(dropout=0.0), X, LEARNABLE, epochs=60, lr=0.5)
    assert last["head_loss"] < 0.8 * first["head_loss"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_net_with_everything_trains_after_a_cast(dtype):
    net, acc = make_full().to(dtype), torch.float64 if dtype == torch.float64 else torch.float32
    for name, t in net.state_dict().items():
        plain = name.startswith("layers") and name.endswith((".weight", ".bias"))
        assert t.dtype == (dtype if plain else acc), name
    before = state(net)
    (*_, last) = fit(net, **FULL | {"validation": (X[:9].to(dtype), LABELS[:9])})
    assert last["head_loss"] > 0
    assert not torch.equal(before["head.weights.0"], net.head.weights[0])
    for by in ("goodness", "head", "both"):
        assert net.predict(X.to(dtype), by=by).shape == (50,)


def test_the_heads_rate_follows_the_schedule_alone():
    net, rates = make_full(), []
    owners = (*net.layers, net.head)

    def look(net, history):
        rates.append([float(owner.optimizer.lr) for owner in owners])

    fit(net, lr=0.25, schedule=lambda t: 1 - t, callbacks=[look])
    for epoch, found in enumerate(rates):
        factor = 1 - (epoch + 0.75) / 3
        assert found == pytest.approx([0.25 * factor] * 3 + [0.5 * factor])
    assert net.head.optimizer == ff.HintonSGD(lr=0.5)


def test_errors_are_measured_now_and_then():
    records = fit(make(), epochs=5, validation=(X, LABELS), validate_every=2)
    assert [r["error"] is not None for r in records] == [False, True, False, True, True]
    stop = ff.EarlyStopping(1)
    assert not stop(None, [{"layer": None, "error": e} for e in (9.0, None)])
    assert stop(None, [{"layer": None, "error": e} for e in (9.0, None, 9.5)])
    assert not stop(None, [{"layer": None, "error": e} for e in (9.0, None, 8.5)])


def test_arguments_of_the_pieces():
    for options, message in (
        ({"loss": [ff.SymBa()]}, "loss must be a function, or one for each of the 2 layers"),
        ({"loss": "symba"}, "loss must be a function"),
        ({"schedule": 0.5}, "schedule must be a function"),
        ({"negatives": "hard"}, "negatives must be a function"),
        ({"augment": 1}, "augment must be a function"),
        ({"validate_every": 0}, "validate_every"),
        ({"validation": (X[:0], LABELS[:0])}, r"validation\[0\] must have at least one row"),
        ({"validation": (X[:, :5], LABELS)}, r"validation\[0\] must have .*, each of 12 inputs, got \(50, 5\)"),
        ({"validation": (X, LABELS + 1)}, r"validation\[1\] must be in \[0, 3\) as num_classes says, got 3"),
        ({"validation": (X.byte(), LABELS)}, r"validation\[0\] must hold floats, .*, got torch.uint8"),
        ({"negatives": ff.HardLabels()}, "HardLabels needs a net with a softmax head"),
        ({"callbacks": 5}, "not iterable"),
        ({"callbacks": [5]}, r"callbacks\[0\] must be a function, got int"),
        (
            {"history": [{"layer": 0}]},
            r'mode \'simultaneous\', whose "layer" is in \[None\]; history\[0\] is of "layer" 0',
        ),
        ({"history": [{}]}, r"history\[0\] is \{\}"),
        ({"mode": "greedy", "history": [{"layer": None}]}, r'"layer" is in \[0, 1\]; history\[0\] is of "layer" None'),
    ):
        net = make()
        before, optimizers = state(net), [layer.optimizer for layer in net.layers]
        with pytest.raises((TypeError, ValueError), match=message):
            fit(net, lr=0.5, **options)
        assert same_bits(before, state(net))
        assert [layer.optimizer for layer in net.layers] == optimizers
    with pytest.raises(ValueError, match="mode must be 'simultaneous' for a net with a head"):
        fit(make_full(), mode="greedy")


def test_labels_and_widths_that_do_not_fit_are_seen_before_the_first_step():
    for x, labels, message in (
        (X, torch.cat([LABELS[:-1], torch.tensor([3])]), r"labels must be in \[0, 3\) as num_classes says, got 3"),
        (torch.rand(50, 13), LABELS, r"data must have at least one row, each of 12 inputs, got \(50, 13\)"),
    ):
        net = make_full()
        before = state(net)
        with pytest.raises(ValueError, match=message):
            fit(net, x, labels, batch_size=10, seed=2)
        assert same_bits(before, state(net))


@pytest.mark.parametrize("loss", [None, ff.SymBa()], ids=["fused", "layer by layer"])
def test_the_label_is_not_dropped(loss):
    net = make_full()
    net.layers[0].dropout = 0.25
    before = state(net)
    with pytest.raises(ValueError, match="dropout must be 0 in the first layer of a net whose input holds the label"):
        fit(net, loss=loss)
    assert same_bits(before, state(net))


def test_an_average_or_an_optimizer_of_something_else_is_refused():
    net = make_full()
    net.average = ff.WeightAverage(make())
    with pytest.raises(ValueError, match=r"average must be made for the net: it holds .*, the net has"):
        fit(net)
    net = make_full()
    with pytest.raises(ValueError, match="optimizer must hold parameters of the net's layers"):
        fit(net, optimizer=torch.optim.SGD(net.head.parameters(), lr=0.1))


def test_numbers_of_a_loss_that_is_not_finite_are_warned_of_once():
    with pytest.warns(UserWarning, match=r"a loss is not finite after epoch 1 \(nan, nan\)") as seen:
        fit(make(), loss=lambda g, sign: (g.mean() * torch.nan, g * torch.nan))
    assert [w.filename for w in seen] == [__file__.replace("test_training_pieces", "test_training")]  # its fit


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_draws_do_not_depend_on_the_default_dtype(backend):
    options = FULL | {"augment": ff.Affine(5, 0.1, 1, (1, 3, 4)), "selection": ff.HardInputs()}
    nets = [make_full(), make_full()]
    with ff.use_backend(backend):
        fit(nets[0], **options)
        torch.set_default_dtype(torch.float64)
        try:
            fit(nets[1], **options)
        finally:
            torch.set_default_dtype(torch.float32)
    assert same_bits(state(nets[0]), state(nets[1]))
