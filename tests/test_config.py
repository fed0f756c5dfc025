"""What a run's configuration builds."""

import dataclasses

import pytest
import torch

import ffkernels as ff
from ffkernels.config import TrainConfig


def test_config_builds_what_it_says():
    config = TrainConfig(hidden=(6, 5), threshold=2.0, temperature=3.0, label_strength=4.0, optimizer="sgd", seed=5)
    before = torch.random.get_rng_state()
    net, again = config.build_net((1, 4, 5), 3), config.build_net((1, 4, 5), 3)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    other = dataclasses.replace(config, seed=6).build_net((1, 4, 5), 3)
    assert not torch.equal(net.layers[0].weight, other.layers[0].weight)
    assert [(a.in_features, a.out_features, a.threshold, a.temperature) for a in net.layers] == [
        (20, 6, 2.0, 3.0), (6, 5, 2.0, 3.0),
    ]  # fmt: skip
    assert (net.num_classes, net.label_strength) == (3, 4.0)
    assert net.layers[0].optimizer == ff.SGD(lr=0.003, momentum=0.9)
    for threshold, expected in (("width", [6.0, 5.0]), ("half-width", [3.0, 2.5])):
        built = TrainConfig(hidden=(6, 5), threshold=threshold).build_net((1, 4, 5), 3)
        assert [layer.threshold for layer in built.layers] == expected
    for name, expected in (("linear", 0.25), ("constant", 1.0), ("constant-linear", 0.5)):
        assert TrainConfig(lr_schedule=name).build_schedule()(0.75) == expected
    assert TrainConfig(warmup=0.5).build_schedule()(0.25) == 0.5 * 0.75


def test_config_builds_the_pieces():
    once = TrainConfig(negatives="permuted", negatives_once=True)
    assert once.build_negatives((1, 4, 5)) == ff.DrawnOnce(ff.PermutedLabels())
    scaled = TrainConfig(standardize=(0.25, 0.5), shift=1)
    assert scaled.build_augment((1, 4, 5)) == ff.Chain((ff.Shift(1, (1, 4, 5), fill=-0.5),))
    warp = ff.Affine(degrees=10.0, scale=0.1, pixels=1.5, image_shape=(1, 4, 5))
    assert TrainConfig(affine=(10.0, 0.1, 1.5), noise=0.5).build_augment((1, 4, 5)) == ff.Chain((warp, ff.Noise(0.5)))
    x = torch.rand(3, 20)
    assert torch.equal(scaled.pixels(x), (x - 0.25) / 0.5)
    assert TrainConfig().pixels(x) is x
    config = TrainConfig(
        hidden=(6, 5), init="normal", peer=0.1, dropout=0.2, direction="minimize", negatives="hard", head_layers=(2, 1),
        head_lr=0.3, head_weight_decay=0.01, predict="both", predict_layers=(2,), candidates=2, average=0.9, shift=2,
        optimizer="hinton_sgd", weight_decay=0.1, selected=0.3,
    )  # fmt: skip
    net = config.build_net((1, 4, 5), 3)
    assert [(layer.peer, layer.dropout) for layer in net.layers] == [(0.1, 0.0), (0.1, 0.2)]
    assert net.layers[0].optimizer == ff.HintonSGD(lr=0.04, momentum=0.9, weight_decay=0.1)
    assert not net.layers[0].bias.any()
    wide = dataclasses.replace(config, hidden=(400, 5)).build_net((1, 10, 10), 3)
    assert wide.layers[0].weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert (net.minimize, net.predict_by, net.predict_layers, net.candidates) == (True, "both", (1,), 2)
    assert (net.head.layers, net.head.optimizer) == ((1, 0), ff.HintonSGD(lr=0.3, weight_decay=0.01))
    assert net.average.decay == 0.9
    assert config.build_negatives((1, 4, 5)) == ff.HardLabels()
    assert config.build_selection() == ff.HardInputs(0.3, 0.1)
    assert TrainConfig().build_selection() is None
    without = {"negatives": "hybrid", "blurs": 3, "predict": "head", "head_layers": (2,), "head_epochs": 1}
    assert TrainConfig(**without).build_negatives((1, 4, 5)) == ff.HybridImages((1, 4, 5), blurs=3)
    assert TrainConfig(**without).build_net((1, 4, 5), 3).label_strength is None
    dynamics = {"damping": 0.5, "learned": (2, 3), "judged": (3,)}
    recurrent = TrainConfig(recurrent=True, hidden=(6, 5), label_strength=3.0, **dynamics).build_net((1, 4, 5), 3)
    assert isinstance(recurrent, ff.RecurrentFFNet)
    assert [(a.in_features, a.out_features) for a in recurrent.layers] == [(25, 6), (9, 5)]
    assert (recurrent.damping, recurrent.learned, recurrent.judged) == (0.5, (2, 3), (3,))
    assert recurrent.label_strength == 3.0
    assert config.build_augment((1, 4, 5)) == ff.Chain((ff.Shift(2, (1, 4, 5)),))
    assert config.build_losses() is None
    plain = TrainConfig(hidden=(6, 5), loss="hinge", margin=2.0)
    assert (plain.build_augment((1, 4, 5)), plain.build_negatives((1, 4, 5))) == (None, ff.UniformLabels())
    assert plain.build_losses() == [ff.Hinge(2.0, 6.0), ff.Hinge(2.0, 5.0)]
    assert (plain.build_net((1, 4, 5), 3).head, plain.build_net((1, 4, 5), 3).average) == (None, None)
    assert TrainConfig(loss="symba", alpha=2.0).build_losses() == [ff.SymBa(2.0)] * 2
    assert TrainConfig(loss="pair", alpha=2.0).build_losses() == [ff.PairSoftplus(2.0, 1.0)] * 2
    assert TrainConfig(optimizer="adamw", weight_decay=0.5).build_optimizer() == ff.AdamW(lr=0.003, weight_decay=0.5)


def test_one_number_where_several_are_asked_for_is_named():
    for options in ({"hidden": 500}, {"standardize": None}, {"head_layers": "12"}):
        (name,) = options
        with pytest.raises(TypeError, match=f"{name} must be a sequence of numbers, got {options[name]!r}"):
            TrainConfig(**options)
    assert TrainConfig(learned=range(2, 4)).learned == (2, 3)
