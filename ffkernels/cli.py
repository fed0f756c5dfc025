"""The command line: ``python -m ffkernels info | train | predict | bench``."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TextIO

from . import __version__
from .benchmark.command import add_bench, bench
from .commands.info import add_info, info
from .commands.output import Output
from .commands.predict import add_predict, predict
from .commands.train import add_train, train_command


def _bench(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    out = Output(args)
    out.write_json(bench(args, parser, out.result))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ffkernels",
        usage="%(prog)s [-h] [--version] {info,train,predict,bench} ...",
        description="Forward-Forward training with fused kernels. Each command has its own --help.",
    )
    parser.add_argument("--version", action="version", version=f"ffkernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)
    runs: list[tuple[argparse.ArgumentParser, Callable[..., int]]] = [
        (add_info(commands), info),
        (add_train(commands), train_command),
        (add_predict(commands), predict),
        (add_bench(commands), _bench),
    ]
    for command, run in runs:
        command.add_argument(
            "--json", metavar="FILE", help="write every number as JSON; - writes it to stdout, and the text to stderr"
        )
        command.add_argument("--debug", action="store_true", help="show where in the code an error arose")
        command.set_defaults(command=run, parser=command, interrupted="nothing was written")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; ``argv`` is what follows the program's name (None: the process's own).

    Returns:
        The exit status: 0, 1 after an error, 130 after Ctrl-C, 141 where the reader of the output has left (as head
        does). A usage error leaves with SystemExit(2).
    """
    try:
        try:
            return _main(argv)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _let_go(sys.stdout)
        return 141  # what a shell says of a program that SIGPIPE has ended


def _let_go(stream: TextIO) -> None:
    """What is still in the stream's buffer has nowhere to go; without this the interpreter complains at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def _main(argv: Sequence[str] | None) -> int:
    args = build_parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            return int(args.command(args, args.parser))
        except KeyboardInterrupt:
            print(f"\ninterrupted; {args.interrupted}", file=sys.stderr)
            return 130
        except BrokenPipeError:
            if args.command is train_command:
                print(f"the reader of the output has left; {args.interrupted}", file=sys.stderr)
            raise
        except (OSError, ValueError, TypeError, RuntimeError, ImportError) as error:
            if args.debug:
                raise
            print(f"error: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
            return 1
