"""``python -m ffkernels train``."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import backends, checks, data
from ..config import (
    BATCH_SIZE,
    DATA,
    DIRECTIONS,
    EPOCHS,
    INIT,
    LOSSES,
    LR,
    MOMENTUM,
    NEGATIVES,
    OPTIMIZERS,
    SCHEDULES,
    THRESHOLDS,
    TrainConfig,
)
from ..data import Dataset
from ..nn import PREDICT
from ..presets import PRESETS, describe
from ..run import RunFolder, check_spooled, split, train
from ..training import MODES, Record
from .output import Output

# Of a resumed run: where things are on this machine may change, what is computed may not.
_FREE_ON_RESUME = ("data_dir", "epochs")
# Flags of several processes, with their defaults: how the work is divided, not what is computed.
_DIVISION = {"stages": 1, "micro_batches": 1, "compress": "none", "check_every": 0}


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of TrainConfig for which a flag was given: flags have no defaults of their own."""
    names = [f.name for f in dataclasses.fields(TrainConfig)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if "data_dir" in given:
        given["data_dir"] = str(Path(given["data_dir"]).absolute())  # a run may be resumed from another folder
        given.setdefault("data", "mnist")
    return given


def train_command(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # torchrun's
        return _train_together(args, parser)
    for flag, value in _DIVISION.items():
        if getattr(args, flag) != value:
            parser.error(f"--{flag.replace('_', '-')} is for several processes: start them with torchrun")
    out = Output(args)
    folder, dataset = _prepare(args, parser)
    show_bar = not (args.no_progress or args.quiet) and sys.stderr.isatty()
    return _run(folder, dataset, out, functools.partial(train, spool_dir=args.spool_dir), show_bar=show_bar)


def _train_together(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """What each process does that torchrun has started: the first one speaks, and prepares the folder."""
    from ..distributed import group, run  # imports torch.distributed

    if args.spool_dir is not None:
        parser.error("--spool-dir is for one process")
    if not args.timeout > 0:
        parser.error(f"--timeout must be more than 0 seconds, got {args.timeout:g}")
    device = group.start(args.timeout)
    try:
        with group.watch().guard():
            rank = int(os.environ["RANK"])
            division = run.Division(args.stages, args.micro_batches, args.compress, args.check_every)
            division.check()
            path = None
            if rank == 0:
                out = Output(args)
                if run.restarted() and args.resume is None:
                    path = Path(args.run_dir) if args.run_dir else run.begun(Path("runs"))
                    if path is not None and (path / "config.json").exists():
                        args.resume, args.run_dir, args.preset = str(path), None, None
                folder, dataset = _prepare(
                    args, parser, launch=run.launch_key(), check=lambda config: run.check_config(config, division)
                )
                path = folder.path
            path = group.from_first(path)
            if rank:
                folder = RunFolder.open(path)
                data_dir = _given(args).get("data_dir", folder.config.data_dir)
                dataset = data.load(folder.config.data, data_dir)
            folder.config = dataclasses.replace(folder.config, device=str(device))
        args.interrupted = f"continue with --resume {path}"
        show_bar = rank == 0 and not (args.no_progress or args.quiet) and sys.stderr.isatty()
        if rank:
            set_up(folder.config.threads, folder.config.backend, folder.config.device)
            run.train(folder, dataset, division, progress=False)
            return 0
        return _run(folder, dataset, out, functools.partial(run.train, division=division), show_bar=show_bar)
    finally:
        group.stop()


def _prepare(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    launch: str | None = None,
    check: Callable[[TrainConfig], None] = lambda config: None,
) -> tuple[RunFolder, Dataset]:
    """The run's folder, new or as it was left, and its data. ``check``: what it may raise, before a folder is made."""
    given = _given(args)
    if args.resume is not None:
        if args.preset is not None:
            parser.error("--preset cannot go with --resume: a run has its own configuration")
        folder = RunFolder.open(args.resume)
        _refuse_contradictions(folder, given, parser)
        config = folder.config
        check(config)
        dataset = data.load(config.data, given.get("data_dir", config.data_dir))
        folder.check_data(dataset)
        if "epochs" in given:
            folder.extend(given["epochs"])
    else:
        try:
            config = PRESETS[args.preset](**given) if args.preset else TrainConfig(**given)
        except (TypeError, ValueError) as error:
            parser.error(str(error))
        check(config)
        dataset = data.load(config.data, config.data_dir)
        set_up(config.threads, config.backend, config.device)
        if args.spool_dir is not None:
            check_spooled(config, dataset, args.spool_dir)
        name = "-".join(filter(None, (dataset.name, args.preset)))
        folder = _create(args.run_dir, name, config, dataset, launch)
    args.interrupted = f"continue with: python -m ffkernels train --resume {folder.path}"
    return folder, dataset


def _create(path: str | Path | None, name: str, config: TrainConfig, dataset: Dataset, launch: str | None) -> RunFolder:
    """The new run's folder, made only once nothing speaks against the run any more; None: one of its own under runs."""
    split(dataset, config.validation)
    config.resolved().build_net(dataset.image_shape, dataset.num_classes)
    return RunFolder.create(path or _new_folder(name), config, dataset, launch)


def _refuse_contradictions(folder: RunFolder, given: dict[str, Any], parser: argparse.ArgumentParser) -> None:
    for name, value in given.items():
        stored = getattr(folder.config, name)
        if name not in _FREE_ON_RESUME and (tuple(value) if isinstance(value, list) else value) != stored:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} {value} contradicts the run in {folder.path}, which was started with {stored}")


def set_up(threads: int | None, backend: str | None, device: str | None) -> None:
    """Threads and backend of this process, where None leaves what is.

    Raises:
        ValueError: the device is not there. RuntimeError: the backend cannot run.
    """
    if device is not None:
        try:
            torch.empty(1, device=device).cpu()
        except (RuntimeError, AssertionError, NotImplementedError) as error:  # an AssertionError: torch without CUDA
            raise ValueError(f"device {device!r} cannot be used here: {str(error).splitlines()[0]}") from error
    if threads is not None:
        torch.set_num_threads(threads)
    if backend is not None:
        backends.use_backend(backend)


def _new_folder(name: str) -> Path:
    """A folder that this process has made, whatever others start in the same second."""
    stem = Path("runs") / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}"
    path, n = stem, 1
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            n += 1
            path = stem.with_name(f"{stem.name}-{n}")


def _run(folder: RunFolder, dataset: Dataset, out: Output, train: Callable[..., Any], *, show_bar: bool) -> int:
    config = folder.config
    assert config.epochs is not None
    set_up(config.threads, config.backend, config.device)
    sizes = "-".join(str(n) for n in (dataset.x_train.shape[1], *config.hidden))
    out.say(
        f"{dataset.name}: {len(dataset.x_train):,} training and {len(dataset.x_test):,} test rows; net {sizes} on "
        f"{config.device}, backend {config.backend}; run folder {folder.path}"
    )
    total = config.epochs * (len(config.hidden) if config.mode == "greedy" else 1) + config.head_epochs

    def report(record: Record) -> None:
        if not show_bar:
            losses = " ".join("-" if v is None else f"{v:.3g}" for v in record["loss"])
            error = "" if record["error"] is None else f"error {record['error']:.2f} %, "
            rate = f"{record['rows_per_second']:,.0f} rows/s"
            out.say(f"epoch {record['epoch']}/{total}: loss {losses}, {error}{rate}")

    result = train(folder, dataset, progress=show_bar, report=report)
    metrics = (folder.path / "metrics.jsonl").read_text().splitlines()
    out.write_json(
        {
            "run_dir": str(folder.path),
            "arguments": dataclasses.asdict(config),
            "data": folder.data,
            "history": [json.loads(line) for line in metrics],
            "result": result,
        }
    )
    if "validation_error" in result:
        out.result(f"validation error: {result['validation_error']:.2f} %")
    out.result(f"test error: {result['test_error']:.2f} %")
    out.result(f"training seconds: {result['training_seconds']:.1f}")
    return 0


class _ListPresets(argparse.Action):
    def __call__(self, *args: Any, **kwargs: Any) -> None:
        print(describe())
        raise SystemExit(0)


def _threshold(text: str) -> float | str:
    if text in THRESHOLDS:
        return text
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or one of {', '.join(THRESHOLDS)}, got {text!r}") from None


def _by_name(defaults: dict[str, Any]) -> str:
    return ", ".join(f"{value} for {name}" for name, value in defaults.items())


def add_train(commands: Any) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        "train",
        usage="%(prog)s [OPTION ...]",  # all of them before an error's one line would hide it
        help="train a network and measure its test error",
        description="Train a Forward-Forward network. The run's folder keeps its configuration, metrics, checkpoints\n"
        "and pictures; a run that was stopped, in whatever way, goes on with --resume.",
        epilog="examples:\n"
        "  python -m ffkernels train                          scikit-learn's digits, in seconds\n"
        "  python -m ffkernels train --preset hinton --seed 1\n"
        "  python -m ffkernels train --data mnist --hidden 1000 1000 --epochs 20 --run-dir runs/wide\n"
        "  python -m ffkernels train --data mnist --data-dir fashion-mnist/   any data in MNIST's idx format\n"
        "  python -m ffkernels train --resume runs/wide       go on where it stopped\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {f.name: f.default for f in dataclasses.fields(TrainConfig)}

    def flag(group: Any, name: str, text: str, *, shown: str | None = None, **options: Any) -> None:
        field = name.removeprefix("--").replace("-", "_")
        default = defaults[field] if shown is None else shown
        if isinstance(default, tuple):
            default = " ".join(map(str, default))
        # no default here: what was not given is TrainConfig's or, with --resume, the run's to say
        group.add_argument(name, default=argparse.SUPPRESS, help=f"{text} (default: {default})", **options)

    g = p.add_argument_group("preset", "a run with a name; every flag below overrides its field of the preset")
    g.add_argument("--preset", choices=PRESETS, help="take these settings for what no flag gives")
    g.add_argument(
        "--list-presets", action=_ListPresets, nargs=0, help="show the presets and their settings, then exit"
    )

    g = p.add_argument_group("data")
    flag(g, "--data", "digits: 1,797 images of 8 x 8, nothing to download; mnist: 70,000 of 28 x 28", choices=DATA)
    flag(g, "--data-dir", "folder with MNIST's four idx files, or any like them", shown="download once", metavar="DIR")
    flag(g, "--validation", "training rows to hold out and measure each epoch's error on", type=int, metavar="ROWS")
    flag(g, "--validate-every", "epochs from one measurement of the error to the next", type=int, metavar="N")
    flag(g, "--standardize", "subtract MEAN from every pixel in [0, 1], then divide by STD", type=float, nargs="*",
         metavar=("MEAN", "STD"), shown="pixels as they are")  # fmt: skip
    flag(g, "--shift", "move each image by up to so many pixels every time, at random", type=int, metavar="PIXELS")
    flag(g, "--affine", "turn each image by up to DEGREES, stretch it by up to SHARE and move it by up to PIXELS every "
         "time, at random", type=float, nargs="*", metavar=("DEGREES", "SHARE PIXELS"), shown="none")  # fmt: skip
    flag(
        g,
        "--noise",
        "standard deviation of noise on every pixel, after they are standardised",
        type=float,
        metavar="STD",
    )

    g = p.add_argument_group("network")
    flag(g, "--hidden", "width of each layer", type=int, nargs="+", metavar="N")
    flag(g, "--receptive-field", "side of the window of the image that each unit of the first layer sees; 0: all of it",
         type=int, metavar="PIXELS")  # fmt: skip
    flag(g, "--recurrent", "let every layer see the layer above too, the last one the label",
         action=argparse.BooleanOptionalAction)  # fmt: skip
    flag(g, "--damping", "of a recurrent net: the part of a state that stays", type=float, metavar="D")
    flag(g, "--learned", "iterations of a recurrent net that it learns from", type=int, nargs="+", metavar="I")
    flag(g, "--judged", "iterations of a recurrent net whose goodness counts", type=int, nargs="+", metavar="I")
    flag(g, "--init", "initial weights: as nn.Linear's, or normal with variance 1 / inputs and biases 0", choices=INIT)
    flag(g, "--activation", "what follows each product", choices=checks.ACTIVATIONS)
    flag(g, "--normalize", "how a layer scales each input row", choices=checks.NORMALIZE)
    flag(g, "--label-strength", "value written for the label over the first pixels", type=float, metavar="S")
    flag(g, "--dropout", "share of each layer's inputs, but the first's, that is dropped", type=float, metavar="P")
    flag(g, "--peer", "strength of peer normalisation, which keeps units from idling", type=float, metavar="LAMBDA")

    g = p.add_argument_group("objective")
    flag(g, "--goodness", "sum or mean of a layer's squared activations", choices=checks.GOODNESS)
    flag(g, "--threshold", "goodness between positives and negatives: a number, or the layer's 'width' or 'half-width'",
         type=_threshold, metavar="THETA")  # fmt: skip
    flag(g, "--temperature", "softness of the threshold, in units of goodness", type=float, metavar="T")
    flag(g, "--direction", "of the positives' goodness", choices=DIRECTIONS)
    flag(g, "--loss", "on the goodness; only 'logistic' runs inside the fused step", choices=LOSSES)
    flag(g, "--alpha", "slope of losses 'symba' and 'pair'", type=float, metavar="A")
    flag(g, "--margin", "of losses 'pair' and 'hinge'", type=float, metavar="M")
    flag(g, "--negatives", "wrong labels: each as likely (uniform), the images' own in another order (permuted), or "
         "as likely as the head finds them (hard); hybrid: mixtures of two images, so that the layers learn without "
         "labels", choices=NEGATIVES)  # fmt: skip
    flag(g, "--negatives-once", "draw the wrong labels once, the same for all epochs",
         action=argparse.BooleanOptionalAction)  # fmt: skip
    flag(g, "--blurs", "of the random masks that mix hybrids; more make larger patches", type=int, metavar="N")

    g = p.add_argument_group("softmax head and prediction", "layers are numbered from 1")
    flag(g, "--head-layers", "train a softmax on these layers under a neutral label", type=int, nargs="*", metavar="L",
         shown="no head")  # fmt: skip
    flag(g, "--head-lr", "the head's learning rate", type=float, metavar="R")
    flag(g, "--head-weight-decay", "the head's weight decay", type=float, metavar="D")
    flag(g, "--head-epochs", "train the head so long after the layers, which are then frozen, not beside them",
         type=int, metavar="N")  # fmt: skip
    flag(g, "--predict", "by the goodness of every label, by the head in one pass, or by both", choices=PREDICT)
    flag(g, "--predict-layers", "layers whose goodness counts", type=int, nargs="*", metavar="L", shown="all")
    flag(g, "--candidates", "labels whose goodness is measured, the head's first choices", type=int, metavar="N",
         shown="all")  # fmt: skip
    flag(g, "--selected", "share of each batch that the layers learn from, mostly what the head labels badly",
         type=float, metavar="SHARE")  # fmt: skip
    flag(g, "--selected-floor", "added to each image's 1 - probability: the larger, the more evenly they are drawn",
         type=float, metavar="P")  # fmt: skip
    flag(g, "--average", "largest decay of the average of weights that predicts; 0: none", type=float, metavar="D")

    g = p.add_argument_group("training")
    flag(g, "--epochs", "passes over the data; with 'greedy' for each layer", type=int, metavar="N",
         shown=_by_name(EPOCHS))  # fmt: skip
    flag(g, "--mode", "simultaneous: all layers on every batch; greedy: one layer after the other", choices=MODES)
    flag(g, "--batch-size", "images a batch, each once with its label and once with a wrong one", type=int, metavar="N",
         shown=_by_name(BATCH_SIZE))  # fmt: skip
    flag(g, "--optimizer", "as in torch.optim; hinton_sgd: Hinton's form of momentum", choices=OPTIMIZERS)
    flag(g, "--lr", "learning rate", type=float, metavar="R", shown=_by_name(LR))
    flag(g, "--lr-schedule", "linear: to 0 over the run; constant-linear: over its second half", choices=SCHEDULES)
    flag(g, "--warmup", "share of the run in which the learning rate rises from 0", type=float, metavar="SHARE")
    flag(g, "--momentum", "of sgd and hinton_sgd", type=float, metavar="M", shown=f"{MOMENTUM:g}")
    flag(g, "--weight-decay", "of the optimizer", type=float, metavar="D")
    flag(g, "--seed", "of initial weights, order and wrong labels: the same seed gives the same net", type=int)

    g = p.add_argument_group("machine")
    flag(g, "--precision", "of float32 products: highest, high (TF32 or like it) or medium (bf16)",
         choices=checks.PRECISIONS, shown="medium where the machine multiplies bf16 faster, else torch's")  # fmt: skip
    flag(g, "--backend", "whose kernels run", choices=("auto", *backends.BACKENDS), shown="auto, or FFKERNELS_BACKEND")
    flag(g, "--device", "cpu, cuda, cuda:1, ...", shown="a GPU if there is one", metavar="DEVICE")
    flag(g, "--threads", "CPU threads", type=int, metavar="N", shown="torch's")

    g = p.add_argument_group("several processes", "torchrun --nproc-per-node 4 -m ffkernels train ...")
    g.add_argument("--stages", type=int, default=1, metavar="N",
                   help="stages of a layer pipeline; processes / stages of them share each minibatch (1)")  # fmt: skip
    g.add_argument("--micro-batches", type=int, default=1, metavar="N", help="parts of a minibatch in a pipeline (1)")
    g.add_argument("--compress", choices=("none", "bf16"), default="none", help="how gradients are sent (none)")
    g.add_argument("--check-every", type=int, default=0, metavar="STEPS",
                   help="compare all processes' weights bit by bit (0: never)")  # fmt: skip
    g.add_argument("--timeout", type=float, default=600.0, metavar="SECONDS",
                   help="how long a process waits for the others before it stops with an error (600)")  # fmt: skip
    g = p.add_argument_group("the run's folder")
    place = g.add_mutually_exclusive_group()
    place.add_argument("--run-dir", metavar="DIR", help="folder for this run (default: runs/<time>-<data>)")
    place.add_argument("--resume", metavar="DIR", help="go on with the run in DIR, with its configuration")
    g.add_argument("--spool-dir", metavar="DIR", help="with --mode greedy: keep activations in files there, so that "
                   "memory need hold one layer only")  # fmt: skip
    g = p.add_argument_group("output")
    g.add_argument("--no-progress", action="store_true", help="print a line an epoch instead of a progress bar")
    g.add_argument("--quiet", action="store_true", help="print the last lines only")
    return p
