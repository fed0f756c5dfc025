"""The widely copied Forward-Forward layer, written with autograd and with ffkernels: the same losses, step by step.

    python examples/drop_in.py --steps 30

Both columns train one layer on scikit-learn's digits: positive rows carry their own label in the first ten pixels,
negative rows another one. Exits with status 1 if the losses differ.
"""

import argparse
import sys

import torch
from sklearn.datasets import load_digits

import ffkernels as ff


class AutogradLayer(torch.nn.Linear):
    """The usual way: normalise, Linear, ReLU, mean of squares, loss, backward(), Adam."""

    def __init__(self, in_features, out_features, threshold=2.0, lr=0.03):
        super().__init__(in_features, out_features)
        self.threshold, self.adam = threshold, torch.optim.Adam(self.parameters(), lr=lr)

    def forward(self, x):
        return torch.relu(super().forward(x / (x.norm(dim=1, keepdim=True) + 1e-4)))

    def step(self, x_pos, x_neg):
        g_pos, g_neg = (self(x).square().mean(1) for x in (x_pos, x_neg))
        loss = torch.log(1 + torch.exp(torch.cat([self.threshold - g_pos, g_neg - self.threshold]))).mean()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return loss.detach()


class FusedLayer(ff.FFLinear):
    """The same with ffkernels: these are FFLinear's defaults, written out."""

    def __init__(self, in_features, out_features, threshold=2.0, lr=0.03):
        options = {"normalize": "l2", "eps": 1e-4, "activation": "relu", "goodness": "mean"}
        super().__init__(in_features, out_features, threshold=threshold, optimizer=ff.Adam(lr=lr), **options)

    def step(self, x_pos, x_neg):
        return super().step(x_pos, x_neg).loss


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="training steps (default: %(default)s)")
    parser.add_argument("--width", type=int, default=500, help="outputs of the layer (default: %(default)s)")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="allowed relative difference of the losses")
    args = parser.parse_args()
    torch.manual_seed(0)
    x, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    x_pos = ff.overlay(x.float() / 16, labels, num_classes=10)
    x_neg = ff.overlay(x.float() / 16, ff.wrong_labels(labels, num_classes=10), num_classes=10)

    usual, fused = AutogradLayer(64, args.width), FusedLayer(64, args.width)
    fused.load_state_dict(usual.state_dict(), strict=False)  # the same start

    largest = 0.0
    print("step   autograd  ffkernels")
    for step in range(1, args.steps + 1):
        a, b = usual.step(x_pos, x_neg).item(), fused.step(x_pos, x_neg).item()
        largest = max(largest, abs(a - b) / abs(a))
        print(f"{step:4d} {a:10.6f} {b:10.6f}")
    print(f"largest relative difference: {largest:.1e}")
    return 0 if largest <= args.tolerance else 1


if __name__ == "__main__":
    sys.exit(main())
