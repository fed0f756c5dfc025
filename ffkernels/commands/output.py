"""Where a command's text and JSON go."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from ..checkpoint import write_atomic
from ..run import to_json


def check_target(path: str | Path) -> None:
    """OSError where a file cannot be written: said before the work, not after it."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, must be a file to be written")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} cannot be written: the folder {path.parent} does not allow it")


class Output:
    """Where a command's text and JSON go.

    Raises:
        OSError: the JSON has nowhere to go.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.json_target: str | None = args.json
        if self.json_target not in (None, "-"):
            check_target(self.json_target)
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
