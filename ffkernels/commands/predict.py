"""``python -m ffkernels predict``."""

from __future__ import annotations

import argparse
import dataclasses
import io
from pathlib import Path
from typing import Any

import torch

from .. import backends, data
from ..checkpoint import write_atomic
from ..config import DATA
from ..data import extra, read_images, read_labels
from ..run import RunFolder
from .output import Output, check_target
from .train import set_up


def predict(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    out = Output(args)
    if (args.input is None) == (args.data is None and args.data_dir is None):
        parser.error("give either --input FILE, or --data (with --data-dir) for the test set of known data")
    if args.labels is not None and args.input is None:
        parser.error("--labels goes with --input; --data has its own labels")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    if args.output is not None:
        check_target(args.output)
    folder = RunFolder.open(args.run)
    if args.device is not None:
        folder.config = dataclasses.replace(folder.config, device=args.device)
    set_up(folder.config.threads if args.threads is None else args.threads, args.backend, folder.config.device)
    if args.input is not None:
        x, labels = read_images(args.input), None if args.labels is None else read_labels(args.labels)
        source = args.input
    else:
        dataset = data.load(args.data or "mnist", args.data_dir)
        x, labels, source = dataset.x_test, dataset.y_test, f"the test set of {dataset.name}"
    net, x = folder.load_net(), folder.config.pixels(x)
    inputs = net.layers[0].in_features
    if x.shape[1] != inputs:
        raise ValueError(f"{source} has {x.shape[1]} pixels an image, the run in {args.run} was trained on {inputs}")
    if labels is not None and len(labels) != len(x):
        raise ValueError(f"{args.labels}: {len(labels)} labels, but {args.input} has {len(x)} images")
    predicted = net.predict(x.to(folder.config.device)).cpu()
    content: dict[str, Any] = {"run": str(args.run), "source": str(source), "predictions": predicted.tolist()}
    if args.output is not None:
        _write_labels(Path(args.output), predicted)
    elif args.input is not None:
        out.say("\n".join(map(str, predicted.tolist())))
    if labels is not None:
        content["error"] = 100.0 * (predicted != labels).double().mean().item()
        out.result(f"error: {content['error']:.2f} % of {len(labels):,}")
    out.write_json(content)
    return 0


def _write_labels(path: Path, labels: torch.Tensor) -> None:
    """A .npy file (int64) by its name, else text with a label a line."""
    if path.suffix == ".npy":
        buffer = io.BytesIO()
        extra("numpy").save(buffer, labels.numpy())
        write_atomic(path, buffer.getvalue())
    else:
        write_atomic(path, "".join(f"{v}\n" for v in labels.tolist()).encode())


def add_predict(commands: Any) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        "predict",
        usage="%(prog)s --run DIR [OPTION ...]",
        help="label images with a trained network",
        description="Label images with the network of a run. Labels of --input are printed, one a line, unless\n"
        "--output takes them; where the true labels are known, the error is printed last.",
        epilog="examples:\n"
        "  python -m ffkernels predict --run runs/wide --input images.npy --output labels.txt\n"
        "  python -m ffkernels predict --run runs/wide --data mnist    the error on the test set\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--run", required=True, metavar="DIR", help="folder of a run, as train makes it")
    p.add_argument("--input", metavar="FILE", help="images: an idx file, or .npy of shape (B, K), (B, H, W) or "
                   "(B, 1, H, W); unsigned bytes are divided by 255, floats are taken as they are")  # fmt: skip
    p.add_argument("--labels", metavar="FILE", help="the true labels of --input: idx or .npy")
    p.add_argument("--data", choices=DATA, help="use the test set of these data (default with --data-dir: mnist)")
    p.add_argument("--data-dir", metavar="DIR", help="folder with four idx files like MNIST's")
    p.add_argument("--output", metavar="FILE", help="write the labels: .npy by its name, else text with one a line")
    p.add_argument("--backend", choices=("auto", *backends.BACKENDS),
                   help="whose kernels run (default: auto, or FFKERNELS_BACKEND)")  # fmt: skip
    p.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1, ... (default: the run's)")
    p.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: the run's)")
    p.add_argument("--quiet", action="store_true", help="print the error only")
    return p
