"""Where a command's text and JSON go."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomic
from ..run import to_json


class Output:
    """Where a command's text and JSON go.

    Raises:
        FileNotFoundError: the folder of the JSON file does not exist: known before the command has worked for it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.json_target: str | None = args.json
        if args.json not in (None, "-") and not Path(args.json).absolute().parent.is_dir():
            raise FileNotFoundError(f"{args.json}: there is no such folder")
        self.quiet: bool = getattr(args, "quiet", False)
        self.stream = sys.stderr if args.json == "-" else sys.stdout  # stdout is then for the JSON alone

    def say(self, text: str) -> None:
        """What --quiet leaves out."""
        if not self.quiet:
            self.result(text)

    def result(self, text: str) -> None:
        print(text, file=self.stream, flush=True)

    def write_json(self, content: dict[str, Any]) -> None:
        if self.json_target == "-":
            print(to_json(content, indent=2), flush=True)
        elif self.json_target is not None:
            write_atomic(self.json_target, to_json(content, indent=2).encode() + b"\n")
