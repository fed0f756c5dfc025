"""A notebook in the form of a script: train a Forward-Forward net on handwritten digits, then look inside.

    python examples/explore.py --epochs 40 --out pictures

Runs as it is, or cell by cell in an editor that knows "# %%". Writes three pictures: error.png (error and loss over
the epochs), goodness.png (how goodness separates true from wrong labels) and receptive_fields.png (what the units of
the first layer look for).
"""

# %% Settings
import argparse
from pathlib import Path

import torch

import ffkernels as ff
from ffkernels import plots
from ffkernels.data import load_digits

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--epochs", type=int, default=40, help="passes over the training set (default: %(default)s)")
parser.add_argument("--width", type=int, default=200, help="units in each of two layers (default: %(default)s)")
parser.add_argument("--out", type=Path, default=Path("pictures"), help="folder for the pictures (default: %(default)s)")
args, _ = parser.parse_known_args()  # a notebook's kernel has arguments of its own
args.out.mkdir(parents=True, exist_ok=True)

# %% Data: 1,797 digits of 8 x 8 pixels that come with scikit-learn
digits = load_digits()
print(f"{len(digits.x_train)} images to train on, {len(digits.x_test)} to test")

# %% Two layers. The label is written over the first 10 pixels; each layer learns to be active where it is the true one
torch.manual_seed(0)
net = ff.FFNet.from_sizes(
    [64, args.width, args.width],
    num_classes=digits.num_classes,
    normalize="rms",
    goodness="sum",
    threshold=float(args.width),
    temperature=10.0,
    optimizer=ff.Adam(lr=0.003),
)
history = net.fit(
    digits.x_train,
    digits.y_train,
    epochs=args.epochs,
    batch_size=50,
    schedule=ff.Schedule(decay_from=0.0),
    validation=(digits.x_test, digits.y_test),
    progress=False,
)
print(f"test error: {history[-1]['error']:.2f} %")

# %% The error over the epochs, and each layer's own loss
plots.error_curve(args.out / "error.png", history, title="digits", measured_on="test")

# %% Goodness of every layer, under the true label and under a wrong one
wrong = ff.wrong_labels(digits.y_test, digits.num_classes)
both = [net.label_goodness(digits.x_test, labels[:, None])[:, :, 0] for labels in (digits.y_test, wrong)]
plots.goodness_histograms(
    args.out / "goodness.png", *both, [layer.threshold for layer in net.stack], title="digits", unit="sum of squares"
)

# %% The weights of the first layer, as images; the first ten pixels are the label's
plots.receptive_fields(
    args.out / "receptive_fields.png", net.stack[0].weight, digits.image_shape, title="first layer's weights"
)
print(f"pictures: {args.out}/error.png, goodness.png, receptive_fields.png")
