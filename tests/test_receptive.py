"""Local receptive fields: windows of pixels, kept through every way of training."""

import pytest
import torch
from test_training import LABELS, X, fit, same_bits, state
from test_training_pieces import FULL, make_full

import ffkernels as ff
from ffkernels.config import TrainConfig

SHAPE = (1, 3, 4)  # of X, whose first three pixels are the labels'


def fields(size=2, seed=0):
    return ff.ReceptiveFields(size, SHAPE, 7, num_classes=3, seed=seed)


def test_every_unit_sees_a_window_and_the_label():
    mask = ff.ReceptiveFields(2, (2, 4, 5), 500, num_classes=3).mask
    assert mask.shape == (500, 40)
    assert mask[:, :3].all()
    assert set(mask.unique().tolist()) == {0, 1}
    places = set()
    for row in mask[:, 20:].view(500, 4, 5):  # the second channel, over which no label is written
        down, right = (int(each.min()) for each in row.nonzero(as_tuple=True))
        assert row.sum() == row[down : down + 2, right : right + 2].sum() == 4
        places.add((down, right))
    assert len(places) == 12  # all of them
    hidden = mask[:, :20].clone()
    hidden[:, :3] = mask[:, 20:23]
    assert torch.equal(hidden, mask[:, 20:])
    assert ff.ReceptiveFields(3, SHAPE, 500).mask.view(500, 3, 4).sum((1, 2)).eq(9).all()
    assert ff.ReceptiveFields(5, SHAPE, 7).mask.all()  # as large as the image


def test_the_windows_are_the_seeds():
    assert torch.equal(fields(seed=1).mask, fields(seed=1).mask)
    assert not torch.equal(fields(seed=1).mask, fields(seed=2).mask)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("loss", [None, ff.SymBa(0.5)], ids=["fused", "layer by layer"])
def test_weights_stay_in_the_windows_and_learn_there(loss, backend):
    net, constraint = make_full(), fields()
    constraint.begin(net)
    net.average = ff.WeightAverage(net, every=2)
    before = net.layers[0].weight.clone()
    with ff.use_backend(backend):
        fit(net, loss=loss, constraint=constraint, **FULL)
    closed = constraint.mask == 0
    assert closed.any(1).all()
    for weight in (net.layers[0].weight, net.average.layers_0_weight):
        assert not weight[closed].any()
        assert (weight != before)[~closed].all()
    free = make_full()
    fit(free, loss=loss, **FULL)
    assert free.layers[0].weight[closed].all()


def test_the_constraint_comes_after_every_step():
    calls = []
    fit(make_full(), constraint=lambda net: calls.append(net.layers[0].weight.clone()), **FULL)
    trained = make_full()
    records = fit(trained, **FULL)
    assert len(calls) == len(records) * -(-len(X) // 16)
    assert torch.equal(calls[-1], trained.layers[0].weight)


def test_a_config_begins_with_the_windows():
    config = TrainConfig(hidden=(300, 5), init="normal", receptive_field=3, average=0.9, seed=5)
    net, dense = config.build_net((1, 9, 10), 4), TrainConfig(hidden=(300, 5), init="normal", seed=5)
    mask = config.build_constraint((1, 9, 10), 4).mask
    assert torch.equal(mask, ff.ReceptiveFields(3, (1, 9, 10), 300, num_classes=4, seed=5).mask)
    assert torch.equal(net.layers[0].weight, dense.build_net((1, 9, 10), 4).layers[0].weight * mask * 10**0.5)
    assert torch.equal(net.average.layers_0_weight, net.layers[0].weight)
    assert dense.build_constraint((1, 9, 10), 4) is None
    whole, all_seen = (c.build_net((1, 2, 3), 4).layers[0].weight for c in (config, dense))
    assert torch.equal(whole, all_seen)
    without = {"negatives": "hybrid", "predict": "head", "head_layers": (2,), "head_epochs": 1}
    bare = TrainConfig(hidden=(300, 5), receptive_field=3, **without).build_constraint((1, 9, 10), 4).mask
    assert bare.sum(1).eq(9).all()


def test_wrong_fields_are_refused():
    for options, message in (
        ({"size": 0}, r"size must be in \[1, 32768\]"),
        ({"num_classes": 13}, r"num_classes must be in \[0, 12\]"),
        ({"units": 0}, "units must be"),
        ({"image_shape": (28, 28)}, r"image_shape must be \(C, H, W\), got \(28, 28\)"),
        ({"image_shape": (1, 0, 28)}, r"image_shape\[1\] must be in \[1, "),
    ):
        with pytest.raises(ValueError, match=message):
            ff.ReceptiveFields(**{"size": 2, "image_shape": SHAPE, "units": 7} | options)
    net = make_full()
    before = state(net)
    with pytest.raises(ValueError, match=r"weight of shape \(6, 12\), .* got \(7, 12\)"):
        ff.ReceptiveFields(2, SHAPE, 6).begin(net)
    with pytest.raises(TypeError, match="constraint must be a function, got int"):
        net.fit(X, LABELS, epochs=1, constraint=3)
    assert same_bits(before, state(net))
