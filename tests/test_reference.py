"""The reference, which defines all kernels, against autograd and torch.optim."""

import dataclasses
import itertools

import cases
import hypothesis
import independent
import pytest
import torch
from hypothesis import strategies as st

import ffkernels as ff

pytestmark = pytest.mark.usefixtures("_reference")


@pytest.fixture
def _reference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small only wait for other threads
    with ff.use_backend("reference"):
        yield
    torch.set_num_threads(threads)


def pair(weight, bias, optimizer):
    """The same layer twice: tensors for the ops, and one that trains by autograd."""
    theirs = independent.AutogradLayer(weight, bias, optimizer)
    weight, bias = weight.clone(), None if bias is None else bias.clone()
    return (weight, bias, optimizer.init_state(weight, bias), optimizer), theirs


def params_of(ours):
    return [p for p in ours[:2] if p is not None]


@pytest.mark.parametrize(
    "with_bias", [pytest.param(True, id="bias"), pytest.param(False, id="no-bias", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize(
    "activation",
    [a if a in ("relu", "gelu") else pytest.param(a, marks=pytest.mark.slow) for a in independent.ACTIVATIONS],
)
@pytest.mark.parametrize("goodness", independent.REDUCTIONS)
@pytest.mark.parametrize("normalize", independent.NORMALIZATIONS)
def test_fifty_steps_equal_autograd_and_torch_optim(normalize, goodness, activation, optimizer, with_bias):
    options = {"normalize": normalize, "goodness": goodness, "activation": activation, "threshold": 1.5}
    options["temperature"] = 0.7 if with_bias else 1.0
    generator = torch.Generator().manual_seed(1)
    _, _, weight, bias = cases.layer(1, 7, 5, bias=with_bias, dtype=torch.float64)
    ours, theirs = pair(weight, bias, cases.OPTIMIZERS[optimizer])
    for step in range(50):
        x = torch.randn(6, 7, generator=generator, dtype=torch.float64)
        sign = torch.where(torch.rand(6, generator=generator) < 0.5, 1.0, -1.0).double()
        results = ff.ff_step_(x, sign, *ours, **options)
        expected = theirs.step(x, sign, **options)
        for what, result, true in zip(("y", "goodness", "loss"), results, expected, strict=True):
            independent.assert_close(result, true, 1e-10, f"{what} of step {step}")
        for what, result, true in zip(("weight", "bias"), params_of(ours), theirs.params, strict=False):
            independent.assert_close(result, true, 1e-10, f"{what} after step {step}")
    slots, state = ("exp_avg", "exp_avg_sq", "momentum_buffer"), ours[2]
    for (name, param), slot in itertools.product(zip(("", "_bias"), theirs.params, strict=False), slots):
        if slot + name in state:
            independent.assert_close(state[slot + name], theirs.optimizer.state[param][slot], 1e-10, slot + name)
    assert state["step"] == 50


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
@pytest.mark.parametrize("activation", independent.ACTIVATIONS)
@pytest.mark.parametrize("normalize", independent.NORMALIZATIONS)
def test_every_float32_step_equals_autograd_and_torch_optim(normalize, activation, optimizer):
    options = {"normalize": normalize, "activation": activation}
    generator = torch.Generator().manual_seed(1)
    _, _, weight, bias = cases.layer(1, 20, 30)
    # Adam's first step has the size of its rate however small a gradient, whose rounding may be as large as itself
    optimizer = cases.OPTIMIZERS[optimizer]
    ours, theirs = pair(weight / 4, bias / 4, dataclasses.replace(optimizer, lr=optimizer.lr / 10))
    for step in range(10):
        x = torch.randn(16, 20, generator=generator)
        sign = torch.where(torch.rand(16, generator=generator) < 0.5, 1.0, -1.0)
        results = ff.ff_step_(x, sign, *ours, **options)
        expected = theirs.step(x, sign, **options)
        for what, result, true in zip(("y", "goodness", "loss"), results, expected, strict=True):
            independent.assert_close(result, true, 1e-5, f"{what} of step {step}")
        for what, result, true in zip(("weight", "bias"), params_of(ours), theirs.params, strict=True):
            independent.assert_close(result, true, 1e-5, f"{what} after step {step}")
            result.copy_(true.detach())  # both take each step from the same place


# ---------------------------------------------------------------------------------------------------------------------
# Properties: what the ops say of one another, over shapes, options and seeds.

layers = st.builds(
    lambda rows, depth, cols, bias, seed: cases.layer(rows, depth, cols, bias=bias, dtype=torch.float64, seed=seed),
    st.integers(1, 9),
    st.integers(1, 12),
    st.integers(1, 10),
    st.booleans(),
    st.integers(0, 2**31),
)
layer_options = st.fixed_dictionaries(
    {
        "normalize": st.sampled_from(independent.NORMALIZATIONS),
        "eps": st.sampled_from([1e-8, 1e-4, 0.1]),
        "activation": st.sampled_from(list(independent.ACTIVATIONS)),
    }
)
loss_options = st.fixed_dictionaries(
    {
        "threshold": st.floats(0, 5),
        "temperature": st.floats(0.1, 3),
        "goodness": st.sampled_from(independent.REDUCTIONS),
    }
)
optimizers = st.sampled_from(list(cases.OPTIMIZERS.values()))


def on_copies(op, given):
    """The results of an op and what it made of its arguments."""
    given = cases.copied(given)
    return cases.call(op, given), cases.tensors(given)


def assert_same(result, expected, relative=1e-9):
    assert result.keys() == expected.keys()
    for name in result:
        independent.assert_close(result[name], expected[name], relative, name)


@hypothesis.given(layers, layer_options, loss_options, optimizers)
def test_step_is_forward_loss_and_update(layer, options, loss, optimizer):
    x, sign, weight, bias = layer
    state = optimizer.init_state(weight, bias)
    update = {"x": x, "weight": weight, "bias": bias, "state": state, "optimizer": optimizer, **options}
    (y, goodness, value), after = on_copies("ff_step_", {**update, "sign": sign, **loss})

    y_alone, goodness_alone, p = ff.ff_forward(x, weight, bias, return_p=True, **options)
    divisor = weight.shape[0] if loss["goodness"] == "mean" else 1
    value_alone, coef = ff.logistic_loss(
        goodness_alone, sign, divisor=divisor, threshold=loss["threshold"], temperature=loss["temperature"]
    )
    _, after_update = on_copies("ff_update_", {**update, "y": p, "coef": coef})

    for result, expected in ((y, y_alone), (goodness, goodness_alone), (value, value_alone)):
        independent.assert_close(result, expected, 1e-12)
    del after["sign"], after_update["y"], after_update["coef"]
    assert_same(after, after_update, 1e-12)


@hypothesis.given(layers, layer_options, optimizers, st.integers(1, 4))
def test_update_is_gradient_and_torch_optim(layer, options, optimizer, steps):
    x, _, weight, bias = layer
    generator = torch.Generator().manual_seed(0)
    ours, theirs = pair(weight, bias, optimizer)
    for _ in range(steps):
        p = torch.rand(len(x), len(weight), generator=generator, dtype=torch.float64)
        coef = torch.randn(len(x), generator=generator, dtype=torch.float64)
        grads = ff.ff_grad(x, p, coef, weight, bias, **options)
        for param, grad in zip(theirs.params, grads, strict=False):
            param.grad = grad
        theirs.optimizer.step()
        ff.ff_update_(x, p, coef, *ours, **options)
    for result, expected in zip(params_of(ours), theirs.params, strict=True):
        independent.assert_close(result, expected.detach(), 1e-9)


@hypothesis.given(layers, layer_options, loss_options)
def test_gradient_is_autograds(layer, options, loss):
    x, sign, weight, bias = layer
    expected = independent.gradient(x, sign, weight, bias, **options, **loss)
    _, goodness, p = ff.ff_forward(x, weight, bias, return_p=True, **options)
    divisor = weight.shape[0] if loss.pop("goodness") == "mean" else 1
    _, coef = ff.logistic_loss(goodness, sign, divisor=divisor, **loss)
    grads = ff.ff_grad(x, p, coef, weight, bias, **options)
    assert (grads[1] is None) == (bias is None)
    for grad, true in zip(grads, expected, strict=False):
        assert (grad - true).abs().max() <= 1e-9 * true.abs().max() + 1e-15


@hypothesis.given(layers, layer_options, loss_options, optimizers)
def test_peer_terms_add_their_outer_product_to_dz(layer, options, loss, optimizer):
    x, sign, weight, bias = layer
    peer = {
        "row_term": torch.linspace(-1, 1, len(x), dtype=torch.float64),
        "col_term": torch.linspace(0.5, -0.3, len(weight), dtype=torch.float64),
    }
    expected = independent.gradient(x, sign, weight, bias, **options, **loss, **peer)
    # plain SGD with a rate of 1 subtracts the gradient itself
    for_gradient = ff.SGD(lr=1.0)
    ours, _ = pair(weight, bias, for_gradient)
    ff.ff_step_(x, sign, *ours, **options, **loss, **peer)
    for before, after, true in zip((weight, bias), params_of(ours), expected, strict=False):
        assert (before - after - true).abs().max() <= 1e-9 * (true.abs().max() + before.abs().max())


@pytest.mark.parametrize("op", [op for op in cases.OPS if "label" not in op])
@hypothesis.given(
    normalize=st.sampled_from(independent.NORMALIZATIONS),
    shape=st.fixed_dictionaries({name: st.integers(1, 12) for name in ("rows", "depth", "cols")}),
    seed=st.integers(0, 2**31),
)
def test_a_given_sqnorm_is_the_computed_one(op, normalize, shape, seed):
    given = cases.arguments(op, dtype=torch.float64, seed=seed, **shape)
    if op == "ff_network_step_":
        for record in given["layers"]:
            record.normalize = normalize
    else:
        given["normalize"] = normalize
    results, after = on_copies(op, given)
    without, after_without = on_copies(op, {**given, "x_sqnorm": None})
    del after["x_sqnorm"]
    assert_same(after, after_without)
    for a, b in zip(results or (), without or (), strict=True):
        independent.assert_close(a, b, 1e-9)
    if normalize == "none" or op == "ff_network_step_":
        return
    other, after_other = on_copies(op, {**given, "x_sqnorm": given["x_sqnorm"] * 4 + 1})
    changed = [*after_other.values(), *(other or ())]
    assert not all(torch.equal(a, b) for a, b in zip(changed, [*after.values(), *(results or ())], strict=False))


@hypothesis.given(
    rows=st.integers(1, 7), classes=st.integers(1, 6), extra=st.integers(0, 5), seed=st.integers(0, 2**31),
    strength=st.sampled_from([1.0, 0.0, -2.5, 0.3]), options=layer_options, optimizer=optimizers, loss=loss_options,
)  # fmt: skip
def test_label_ops_are_the_ops_on_overlays(rows, classes, extra, seed, strength, options, optimizer, loss):
    generator = torch.Generator().manual_seed(seed)
    x, _, weight, bias = cases.layer(rows, classes + extra, 5, dtype=torch.float64, seed=seed)
    labels = torch.randint(classes, (rows, 3), generator=generator)
    each = {"num_classes": classes, "strength": strength}

    written = independent.overlay(x.repeat_interleave(3, 0), labels.flatten(), classes, strength)
    results = ff.ff_label_forward(x, labels, weight, bias, return_p=True, **each, **options)
    for result, expected in zip(results, ff.ff_forward(written, weight, bias, return_p=True, **options), strict=True):
        independent.assert_close(result, expected, 1e-9)

    positive, negative = labels[:, 0], labels[:, 1]
    written = torch.cat([independent.overlay(x, label, classes, strength) for label in (positive, negative)])
    sign = torch.cat([torch.ones(rows), -torch.ones(rows)]).double()
    update = {"weight": weight, "bias": bias, "state": optimizer.init_state(weight, bias), "optimizer": optimizer}
    update |= {**options, **loss}
    results, after = on_copies(
        "ff_label_step_", {"x": x, "labels_pos": positive, "labels_neg": negative, **each} | update
    )
    expected, after_rows = on_copies("ff_step_", {"x": written, "sign": sign, **update})
    for result, true in zip(results, expected, strict=True):
        independent.assert_close(result, true, 1e-9)
    for name in ("x", "labels_pos", "labels_neg"):
        del after[name]
    for name in ("x", "sign"):
        del after_rows[name]
    assert_same(after, after_rows)


@hypothesis.given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5), rows=st.integers(1, 6), seed=st.integers(0, 2**31),
    options=layer_options, loss=loss_options, optimizer=optimizers, with_labels=st.booleans(), bias=st.booleans(),
)  # fmt: skip
def test_network_step_is_a_chain_of_steps(widths, rows, seed, options, loss, optimizer, with_labels, bias):
    x, sign, _, _ = cases.layer(rows, widths[0], 1, dtype=torch.float64, seed=seed)
    members = [cases.layer(1, k, n, bias=bias, dtype=torch.float64, seed=seed) for k, n in itertools.pairwise(widths)]
    records = [
        ff.FFLayer(m.weight, m.bias, optimizer.init_state(m.weight, m.bias), optimizer, **loss, **options)
        for m in members
    ]
    alone = cases.copied(records)
    if with_labels:
        positive, negative = torch.zeros(rows, dtype=torch.long), torch.full((rows,), widths[0] - 1)
        label = {"labels": (positive, negative), "num_classes": widths[0], "strength": 2.0}
        goodness, losses = ff.ff_network_step_(x, None, records, **label)
        x = torch.cat([independent.overlay(x, each, widths[0], 2.0) for each in (positive, negative)])
        sign = torch.cat([torch.ones(rows), -torch.ones(rows)]).double()
    else:
        goodness, losses = ff.ff_network_step_(x, sign, records)
    for i, layer in enumerate(alone):
        x, expected, loss_alone = ff.ff_step_(
            x, sign, layer.weight, layer.bias, layer.state, optimizer, **loss, **options
        )
        independent.assert_close(goodness[i], expected, 1e-9, f"goodness of layer {i}")
        independent.assert_close(losses[i], loss_alone, 1e-9, f"loss of layer {i}")
    assert_same(cases.tensors(records), cases.tensors(alone))


@hypothesis.given(layers, layer_options, loss_options, optimizers, st.randoms(use_true_random=False))
def test_the_order_of_rows_does_not_matter(layer, options, loss, optimizer, random):
    x, sign, weight, bias = layer
    order = list(range(len(x)))
    random.shuffle(order)
    update = {"weight": weight, "bias": bias, "state": optimizer.init_state(weight, bias), "optimizer": optimizer}
    update |= {**options, **loss}
    (y, goodness, value), after = on_copies("ff_step_", {"x": x, "sign": sign, **update})
    (y2, goodness2, value2), after2 = on_copies("ff_step_", {"x": x[order], "sign": sign[order], **update})
    independent.assert_close(y2, y[order], 1e-12)
    independent.assert_close(goodness2, goodness[order], 1e-12)
    independent.assert_close(value2, value, 1e-12)
    for name in ("x", "sign"):
        del after[name], after2[name]
    assert_same(after2, after, 1e-7)  # Adam divides sums of a few rows' gradients, which may cancel


@hypothesis.given(layers, optimizers, st.floats(0, 1, width=32))
def test_a_rate_in_a_tensor_is_that_rate(layer, optimizer, rate):
    x, sign, weight, bias = layer
    lr = torch.tensor(0.5)
    given = {"x": x, "sign": sign, "weight": weight, "bias": bias, "state": optimizer.init_state(weight, bias)}
    in_tensor = dataclasses.replace(optimizer, lr=lr)
    lr.fill_(rate)  # changed in place after the optimizer was made
    _, after = on_copies("ff_step_", {**given, "optimizer": in_tensor})
    _, expected = on_copies("ff_step_", {**given, "optimizer": dataclasses.replace(optimizer, lr=rate)})
    assert_same(after, expected, 1e-12)
    assert lr == rate


def test_medium_rounds_the_operands_to_bfloat16_and_nothing_else():
    x, sign, weight, bias = cases.layer(33, 123, 110)
    options = {"normalize": "none", "precision": "medium"}
    y, goodness, _ = ff.ff_forward(x, weight, bias, return_p=True, **options)
    _, true, total = independent.forward(
        x.bfloat16().double(), weight.bfloat16().double(), bias.double(), normalize="none"
    )
    independent.assert_close(y, true, 1e-6)
    independent.assert_close(goodness, total, 1e-6)
    grad, _ = ff.ff_grad(x, y, sign, weight, bias, **options)
    scaled = (2 * sign[:, None] * y).bfloat16().double()
    independent.assert_close(grad, scaled.T @ x.bfloat16().double(), 1e-6)
