"""Training on digits with each precision and instruction set of the CPU kernels ends where the reference does."""

import pytest
import torch

import ffkernels as ff
from ffkernels import _extension, data
from ffkernels.presets import PRESETS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_extension.unavailable() is not None, reason=f"{_extension.unavailable()}"),
]
ISAS = (_extension.cpu_isa() or {"available": []})["available"]
SEEDS = range(3)


def errors(backend, precision):
    """Error in % on the test set after a short training, once a seed: 7 to 13."""
    pytest.importorskip("sklearn")
    digits, found = data.load_digits(), []
    for seed in SEEDS:
        torch.manual_seed(seed)
        net = ff.FFNet.from_sizes(
            [64, 200, 200], num_classes=10, normalize="rms", threshold=1.0, optimizer=ff.Adam(lr=0.01),
            precision=precision,
        )  # fmt: skip
        with ff.use_backend(backend):
            net.fit(digits.x_train, digits.y_train, epochs=12, batch_size=100, progress=False, seed=seed)
            found.append(ff.error_percent(net, digits.x_test, digits.y_test))
    return torch.tensor(found)


@pytest.fixture(scope="module")
def of_reference():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # its tensors are small
    found = errors("reference", "highest")
    torch.set_num_threads(threads)
    return found


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("isa", ISAS)
def test_the_error_is_the_references(isa, precision, of_reference, monkeypatch):
    """Seeds differ by 2 points and more; with the same seed, rounding moves a few of the 355 test images."""
    monkeypatch.setenv("FFKERNELS_CPU_ISA", isa)
    difference = errors("cpu", precision) - of_reference
    assert difference.abs().max() <= 2
    assert difference.mean().abs() <= 1


def hinton(backend, threads=None, epochs=6):
    """The preset, smaller, on digits: the net, and its test error in %."""
    pytest.importorskip("sklearn")
    digits, before = data.load_digits(), torch.get_num_threads()
    config = PRESETS["hinton"](data="digits", hidden=(200, 200, 200), dropout=0.1, batch_size=100)
    net = config.build_net((1, 8, 8), 10)
    torch.set_num_threads(threads or before)
    try:
        with ff.use_backend(backend):
            net.fit(
                digits.x_train, digits.y_train, epochs=epochs, batch_size=config.batch_size, progress=False,
                schedule=config.build_schedule(), negatives=config.build_negatives((1, 8, 8)),
                augment=config.build_augment((1, 8, 8)),
            )  # fmt: skip
            net.average.copy_to(net)
            return net, ff.error_percent(net, digits.x_test, digits.y_test)
    finally:
        torch.set_num_threads(before)


def test_hintons_recipe_gives_the_same_bits_with_any_number_of_threads():
    nets = [hinton("cpu", threads, epochs=2)[0] for threads in (1, 2, 3)]
    first, *others = [net.state_dict() for net in nets]
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_hintons_recipe_ends_where_the_reference_does():
    (_, ours), (_, theirs) = hinton("cpu", epochs=12), hinton("reference", epochs=12)
    assert max(ours, theirs) < 10
    assert abs(ours - theirs) <= 2
