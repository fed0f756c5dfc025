"""Losses of one's own: functions of the goodness, trained by the same kernels.

    python examples/custom_loss.py --epochs 30

A loss gives its value and its derivative by the goodness; ffkernels does the rest. Prints the test error on
scikit-learn's digits with the built-in loss, with a squared hinge whose derivative is written by hand, and with the
same by autograd, which ends at the same error. Exits with status 1 if these two differ.
"""

import argparse
import sys

import torch

import ffkernels as ff
from ffkernels.data import load_digits


def squared_hinge(goodness, sign, margin=1.0):
    """mean_m max(0, margin - s_m (g_m - 1))^2, for g that is a mean of squares."""
    short = torch.relu(margin - sign * (goodness - 1.0))
    return short.square().mean(), -2 * sign * short / len(goodness)


def by_autograd(function):
    """A loss from its formula alone: autograd differentiates a function of one number a row, which costs little."""

    def loss(goodness, sign):
        with torch.enable_grad():
            g = goodness.detach().requires_grad_()
            value = function(g, sign)
            (derivative,) = torch.autograd.grad(value, g)
        return value.detach(), derivative

    return loss


@by_autograd
def same_by_autograd(goodness, sign):
    return torch.relu(1.0 - sign * (goodness - 1.0)).square().mean()


def test_error(data, loss, epochs, width):
    torch.manual_seed(0)
    net = ff.FFNet.from_sizes(
        [64, width, width], num_classes=10, normalize="rms", goodness="mean", threshold=1.0, temperature=0.1,
        optimizer=ff.Adam(lr=0.003),
    )  # fmt: skip
    options = {"batch_size": 50, "schedule": ff.Schedule(decay_from=0.0), "progress": False}
    net.fit(data.x_train, data.y_train, epochs=epochs, loss=loss, **options)
    return ff.error_percent(net, data.x_test, data.y_test)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30, help="passes over the training set (default: %(default)s)")
    parser.add_argument("--width", type=int, default=100, help="units in each of two layers (default: %(default)s)")
    args = parser.parse_args()
    data, errors = load_digits(), {}
    losses = {"logistic, built in": None, "squared hinge": squared_hinge, "by autograd": same_by_autograd}
    for name, loss in losses.items():
        errors[name] = test_error(data, loss, args.epochs, args.width)
        print(f"{name:20} test error {errors[name]:5.2f} %", flush=True)
    return 0 if abs(errors["squared hinge"] - errors["by autograd"]) < 1.0 else 1


if __name__ == "__main__":
    sys.exit(main())
