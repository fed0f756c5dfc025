"""FFLinear and FFNet: what they share with torch's modules, and what they compute."""

import copy
import io
import pickle

import cases
import independent
import pytest
import torch
from torch import nn

import ffkernels as ff


def small_net(**options):
    torch.manual_seed(1)
    return ff.FFNet.from_sizes([12, 7, 5], num_classes=3, **options)


def data(rows=9, width=12, classes=3):
    generator = torch.Generator().manual_seed(2)
    return torch.rand(rows, width, generator=generator), torch.randint(classes, (rows,), generator=generator)


def trained_net(**options):
    net = small_net(**options)
    x, labels = data()
    net.label_step(x.to(net.layers[0].weight.dtype), labels, (labels + 1) % 3)
    return net


def everything(module):
    return {name: t.clone() for name, t in module.state_dict().items()}


def assert_same_state(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def step(net):
    x, labels = data()
    return net.label_step(x.to(net.layers[0].weight.dtype), labels, (labels + 1) % 3)


# ---------------------------------------------------------------------------------------------------------------------
# FFLinear beside nn.Linear


@pytest.mark.parametrize(
    ("args", "options"),
    [
        ((6, 4), {}),
        ((6, 4, False), {}),
        ((6, 4), {"bias": False, "dtype": torch.float64}),
        ((6, 4, True, "cpu", torch.bfloat16), {}),
        ((6, 4), {"device": "meta"}),
    ],
)
def test_the_constructor_is_nn_linears(args, options):
    torch.manual_seed(0)
    ours = ff.FFLinear(*args, **options)
    torch.manual_seed(0)
    theirs = nn.Linear(*args, **options)
    assert (ours.in_features, ours.out_features) == (theirs.in_features, theirs.out_features)
    parameters = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == parameters.keys()
    for name, p in ours.named_parameters():
        assert (p.shape, p.dtype, p.device) == (parameters[name].shape, parameters[name].dtype, parameters[name].device)
        assert not p.requires_grad
        if not p.is_meta:
            bound = 6**-0.5
            assert p.abs().max() <= bound * 1.01
            assert p.abs().max() > bound / 2


def test_the_initialisation_is_nn_linears():
    torch.manual_seed(0)
    ours = ff.FFLinear(100, 200)
    torch.manual_seed(0)
    theirs = nn.Linear(100, 200)
    assert torch.allclose(ours.weight, theirs.weight, atol=1e-7)
    assert torch.allclose(ours.bias, theirs.bias, atol=1e-7)


def test_nn_linears_state_loads():
    layer, linear = ff.FFLinear(6, 4), nn.Linear(6, 4)
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert all(name.startswith("optimizer_state.") for name in result.missing_keys)
    assert torch.equal(layer.weight, linear.weight)


@pytest.mark.parametrize("normalize", independent.NORMALIZATIONS)
@pytest.mark.parametrize("activation", independent.ACTIVATIONS)
def test_forward_and_goodness(normalize, activation):
    layer = ff.FFLinear(6, 4, normalize=normalize, activation=activation, dtype=torch.float64, goodness="sum")
    x = torch.rand(5, 6, dtype=torch.float64)
    _, y, total = independent.forward(x, layer.weight, layer.bias, normalize=normalize, activation=activation)
    independent.assert_close(layer(x), y, 1e-12)
    independent.assert_close(layer.goodness(x), total, 1e-12)
    layer.reduction = "mean"
    independent.assert_close(layer.goodness(x), total / 4, 1e-12)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (1, 6), (2, 3, 6), (2, 0, 6)])
def test_leading_dimensions(shape):
    layer, x = ff.FFLinear(6, 4), torch.rand(shape)
    y, goodness = layer(x), layer.goodness(x)
    assert (y.shape, goodness.shape) == ((*shape[:-1], 4), shape[:-1])
    if x.numel():
        assert torch.allclose(y.reshape(-1, 4), layer(x.reshape(-1, 6)))


def test_step_is_the_op():
    layer = ff.FFLinear(6, 4, optimizer=ff.SGD(lr=0.1, momentum=0.5), goodness="sum", threshold=1.0, temperature=0.5)
    twin = independent.AutogradLayer(layer.weight, layer.bias, layer.optimizer)
    x_pos, x_neg = torch.rand(5, 6), torch.rand(3, 6)
    result = layer.step(x_pos, x_neg)
    x, sign = torch.cat([x_pos, x_neg]), torch.tensor([1.0] * 5 + [-1.0] * 3)
    y, total, loss = twin.step(x, sign, goodness="sum", threshold=1.0, temperature=0.5)
    for ours, true in zip(result, (y[:5], y[5:], total[:5], total[5:], loss), strict=True):
        independent.assert_close(ours, true, 1e-5)
    independent.assert_close(layer.weight, twin.weight.detach(), 1e-5)


def test_repr_names_the_options():
    text = repr(ff.FFLinear(6, 4, normalize="rms", threshold=3.5, optimizer=ff.SGD(lr=0.25)))
    for part in ("in_features=6", "out_features=4", "bias=True", "'rms'", "threshold=3.5", "SGD(lr=0.25"):
        assert part in text


# ---------------------------------------------------------------------------------------------------------------------
# Saving, copying, moving


def through_torch_save(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_state_dict(net):
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = small_net(optimizer=net.layers[0].optimizer)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


WAYS = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "torch.save": through_torch_save,
    "state_dict": through_state_dict,
    "state_dict assigned": lambda net: assigned(net),
}


def assigned(net):
    other = small_net(optimizer=net.layers[0].optimizer)
    other.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    return other


@pytest.mark.parametrize(
    "optimizer", [ff.SGD(), ff.SGD(momentum=0.5), ff.Adam(), ff.Adam(lr=torch.tensor(0.1))], ids=str
)
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_trains_on_like_the_original(way, optimizer):
    net = trained_net(optimizer=optimizer)
    other = WAYS[way](net)
    assert_same_state(everything(other), everything(net))
    before = everything(net)
    step(other)
    assert_same_state(everything(net), before)  # nothing is shared
    step(net)
    assert_same_state(everything(other), everything(net))
    assert not torch.equal(net.layers[0].weight, before["layers.0.weight"])


def test_state_dict_names():
    names = set(small_net().layers[0].state_dict())
    slots = ("step", "exp_avg", "exp_avg_sq", "exp_avg_bias", "exp_avg_sq_bias")
    assert names == {"weight", "bias", *(f"optimizer_state.{s}" for s in slots)}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_to_dtype_keeps_state_at_least_float32(dtype):
    net = trained_net().to(dtype)
    for name, t in net.state_dict().items():
        kept = torch.float64 if dtype == torch.float64 else torch.float32
        assert t.dtype == (kept if "optimizer_state" in name else dtype), name
    assert step(net).loss.isfinite().all()
    back = net.float()
    assert {t.dtype for t in back.state_dict().values()} == {torch.float32}
    step(back)


def test_state_survives_a_cast_unrounded():
    net = trained_net()
    before = everything(net)
    net.bfloat16().float()
    for name, t in net.state_dict().items():
        if "optimizer_state" in name:
            assert torch.equal(t, before[name]), name


def test_meta_and_to_empty():
    net = small_net()
    loaded = everything(trained_net())
    net.to("meta")
    assert all(t.is_meta for t in net.state_dict().values())
    assert {t.dtype for t in net.bfloat16().layers[0].state.values()} == {torch.float32}
    net.float().to_empty(device="cpu")
    assert not any(t.is_meta for t in net.state_dict().values())
    net.load_state_dict(loaded)
    assert_same_state(everything(net), loaded)
    step(net)


def test_a_net_made_on_meta():
    with torch.device("meta"):
        net = small_net()
    assert all(t.is_meta for t in net.state_dict().values())
    net.load_state_dict(everything(trained_net()), assign=True)
    step(net)


def test_swapping_the_optimizer():
    net = trained_net()
    layer = net.layers[0]
    state = {name: t.clone() for name, t in layer.state.items()}
    layer.optimizer = ff.AdamW(lr=0.5)  # the same tensors: goes on
    assert_same_state(layer.state, state)
    layer.optimizer = ff.SGD(lr=0.1, momentum=0.9)
    assert set(layer.state) == {"step", "momentum_buffer", "momentum_buffer_bias"}
    assert not any(t.any() for t in layer.state.values())
    assert "layers.0.optimizer_state.momentum_buffer" in net.state_dict()
    step(net)
    assert layer.state["step"] == 1
    with pytest.raises(TypeError, match="optimizer must be ffkernels"):
        layer.optimizer = torch.optim.Adam


def test_train_eval_and_parameters():
    net = small_net()
    assert len(list(net.parameters())) == 4
    assert net.eval() is net
    assert torch.equal(net.train()(data()[0]), net.eval()(data()[0]))


# ---------------------------------------------------------------------------------------------------------------------
# FFNet


def test_step_trains_every_layer_on_what_the_one_below_gave_before():
    net = small_net(optimizer=ff.SGD(lr=0.5), dtype=torch.float64)
    alone = [independent.AutogradLayer(layer.weight, layer.bias, layer.optimizer) for layer in net.layers]
    x_pos, x_neg = torch.rand(5, 12).double(), torch.rand(4, 12).double()
    result = net.step(x_pos, x_neg)
    x, sign = torch.cat([x_pos, x_neg]), torch.tensor([1.0] * 5 + [-1.0] * 4).double()
    for i, (layer, twin) in enumerate(zip(net.layers, alone, strict=True)):
        x, total, loss = twin.step(x, sign)
        independent.assert_close(result.goodness_pos[i], total[:5] / layer.out_features, 1e-10)
        independent.assert_close(result.goodness_neg[i], total[5:] / layer.out_features, 1e-10)
        independent.assert_close(result.loss[i], loss, 1e-10)
        independent.assert_close(layer.weight, twin.weight.detach(), 1e-10)


@pytest.mark.parametrize("shape", [(12,), (1, 3, 4), (3, 2, 2)], ids=str)
def test_label_step_is_step_on_overlays(shape):
    x, labels = torch.rand(6, *shape).double(), torch.tensor([0, 1, 2, 0, 1, 2])
    wrong = (labels + 1) % 3
    nets = [small_net(dtype=torch.float64, optimizer=ff.SGD(lr=0.5), label_strength=2.0) for _ in range(2)]
    ours = nets[0].label_step(x, labels, wrong)
    theirs = nets[1].step(*(ff.overlay(x, each, 3, 2.0) for each in (labels, wrong)))
    for a, b in zip(ours, theirs, strict=True):
        independent.assert_close(a, b, 1e-10)
    for (name, a), b in zip(nets[0].state_dict().items(), nets[1].state_dict().values(), strict=True):
        independent.assert_close(a, b, 1e-10, name)


@pytest.mark.parametrize("layers", [None, [0], [1], [-1, 0]])
@pytest.mark.parametrize("shape", [(12,), (1, 3, 4), (3, 2, 2)], ids=str)
def test_predict_is_the_best_label_of_a_loop(shape, layers):
    net = small_net(dtype=torch.float64, goodness="sum", normalize="none")
    x = torch.randn(40, *shape).double()
    scores = []
    for label in range(3):
        y, total = ff.overlay(x, torch.full((40,), label), 3).flatten(1), 0
        for i, layer in enumerate(net.layers):
            _, y, goodness = independent.forward(y, layer.weight, layer.bias, normalize="none")
            if layers is None or i in [j % 2 for j in layers]:
                total = total + goodness
        scores.append(total)
    expected = torch.stack(scores).argmax(0)
    assert len(expected.unique()) > 1 or layers is not None
    for batch_size in (1024, 4, 1):
        assert torch.equal(net.predict(x, layers=layers, batch_size=batch_size), expected)
    every = net.label_goodness(x)
    assert every.shape == (2, 40, 3)
    chosen = [0, 1] if layers is None else layers
    independent.assert_close(every[chosen].sum(0), torch.stack(scores, 1), 1e-10)


def test_predict_of_nothing():
    assert small_net().predict(torch.rand(0, 12)).shape == (0,)


def test_label_goodness_of_chosen_labels():
    net, (x, _) = small_net(), data()
    every = net.label_goodness(x)
    candidates = torch.tensor([[2, 0]] * len(x))
    assert torch.allclose(net.label_goodness(x, candidates), every[:, :, [2, 0]])


def test_goodness_of_inputs_as_they_are():
    net, (x, labels) = small_net(), data()
    given = net.goodness(ff.overlay(x, labels, 3))
    expected = net.label_goodness(x, labels[:, None])[:, :, 0]
    assert torch.allclose(given, expected, rtol=1e-4, atol=1e-6)


def test_slices_share_their_layers():
    net = ff.FFNet.from_sizes([12, 7, 5, 4], num_classes=3, label_strength=2.0)
    assert [len(part) for part in (net, net[:1], net[1:], net[-1:])] == [3, 1, 2, 1]
    assert net[1:2].layers[0] is net.layers[1]
    assert (net[:2].num_classes, net[:2].label_strength) == (3, 2.0)
    x = torch.rand(4, 12)
    assert torch.allclose(net[1:](net[:1](x)), net(x), rtol=1e-4, atol=1e-6)
    narrow = ff.FFNet.from_sizes([12, 2, 5], num_classes=3)  # a layer with fewer inputs than classes
    assert torch.allclose(narrow[1:](narrow[:1](x)), narrow(x), rtol=1e-4, atol=1e-6)
    assert narrow[1:].num_classes is None


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_dtype_trains(dtype):
    net = small_net(dtype=dtype)
    before = everything(net)
    loss = step(net).loss
    assert loss.dtype == cases.acc(dtype)
    assert loss.isfinite().all()
    assert all(not torch.equal(before[n], t) for n, t in net.state_dict().items() if n.endswith("weight"))


def test_peer_normalisation_of_a_layer_is_that_of_a_net_of_one():
    torch.manual_seed(0)
    layer = ff.FFLinear(7, 6, peer=0.5, optimizer=ff.HintonSGD(lr=0.1, weight_decay=0.01))
    net = ff.FFNet([copy.deepcopy(layer)])
    x_pos, x_neg = torch.randn(5, 7), torch.randn(3, 7)
    for _ in range(3):
        layer.step(x_pos, x_neg)
        net.step(x_pos, x_neg)
    for name, t in layer.state_dict().items():
        independent.assert_close(net.layers[0].state_dict()[name], t, 1e-5, name)
    assert (layer.peer_mean != 0.5).all()


def test_peer_normalisation_may_begin_and_end_later():
    layers = [ff.FFLinear(7, 6, peer=peer, optimizer=ff.SGD(lr=0.1)) for peer in (0.1, 0.0)]
    layers[1].load_state_dict(layers[0].state_dict(), strict=False)
    layers[1].peer = 0.1
    x_pos, x_neg = torch.randn(5, 7), torch.randn(5, 7)
    for layer in layers:
        layer.step(x_pos, x_neg)
    assert_same_state(everything(layers[0]), everything(layers[1]))
    layers[1].peer = 0.0
    assert layers[1].peer_mean is None
    layers[1].step(x_pos, x_neg)
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="peer must be finite and >= 0"):
            layers[1].peer = bad


def test_peer_mean_is_saved_and_stays_float32():
    layer = ff.FFLinear(7, 6, peer=0.1)
    layer.step(torch.randn(5, 7), torch.randn(5, 7))
    other = ff.FFLinear(7, 6, peer=0.1)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.peer_mean, layer.peer_mean)
    assert layer.to(torch.bfloat16).peer_mean.dtype == torch.float32
    assert "peer=0.1" in repr(layer)
    assert ff.FFLinear(7, 6).peer_mean is None
