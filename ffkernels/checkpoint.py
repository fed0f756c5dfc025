"""Checkpoints that survive a crash at any moment: written atomically, checked when read, the last two kept."""

from __future__ import annotations

import ctypes
import hashlib
import io
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

KEPT = 2
T = TypeVar("T")
_NAME = re.compile(r"checkpoint-(\d{6,})(\.pt)?")  # without .pt: a folder that several processes wrote
# After what torch.save writes, so that torch.load reads the file too: archives are read from their end's index.
_TRAILER = re.compile(rb"\nsha256:([0-9a-f]{64})\n")
_TRAILER_BYTES = 73


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file and says why."""


def bytes_of(t: torch.Tensor) -> Any:
    """A CPU tensor's content, for a digest; without numpy, which may not be there. ``t`` must be contiguous."""
    return (ctypes.c_char * t.nbytes).from_address(t.data_ptr())


def write_atomic(path: str | Path, data: bytes) -> None:
    """Write a file so that it holds either what it held before or all of ``data``, whatever happens meanwhile.

    Raises:
        OSError: it could not be written; the file is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder outlive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def save(path: str | Path, content: dict[str, Any]) -> None:
    """Write ``content`` atomically, with its checksum.

    Args:
        content: nested dicts, lists and tuples of tensors, numbers, strings, bools and None: what `load` gives back.
            torch.load(path, weights_only=True) reads the file as well.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getvalue()
    write_atomic(path, payload + b"\nsha256:" + hashlib.sha256(payload).hexdigest().encode() + b"\n")


def load(path: str | Path) -> dict[str, Any]:
    """The content that `save` wrote, its tensors on the CPU. Nothing in the file is executed (weights_only).

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is truncated, damaged, not a checkpoint, or holds objects other than plain data.
    """
    if Path(path).is_dir():
        from .distributed import checkpoint as sharded  # imports torch.distributed

        return sharded.load(path)
    data = Path(path).read_bytes()
    payload, trailer = data[:-_TRAILER_BYTES], _TRAILER.fullmatch(data[-_TRAILER_BYTES:])
    if trailer is None:
        raise CheckpointError(f"{path}: truncated or not a checkpoint (it does not end with a checksum)")
    if hashlib.sha256(payload).hexdigest().encode() != trailer[1]:
        raise CheckpointError(f"{path}: damaged (its content does not have the checksum that it states)")
    try:
        content = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        # torch's own message recommends to load it without this protection
        raise CheckpointError(f"{path}: refused, because it holds more than tensors and plain data") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: must hold a dict, holds {type(content).__name__}")
    return content


def checkpoints(folder: str | Path) -> list[Path]:
    """The checkpoint files in ``folder``, newest (largest number) first."""
    numbered = [(int(m[1]), p) for p in Path(folder).iterdir() if (m := _NAME.fullmatch(p.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def save_numbered(folder: str | Path, number: int, content: dict[str, Any]) -> Path:
    """`save` as checkpoint ``number`` >= 0 of ``folder``; then remove all but the last two and what crashes left."""
    path = Path(folder) / f"checkpoint-{number:06d}.pt"
    save(path, content)
    prune(folder)
    return path


def prune(folder: str | Path) -> None:
    """Remove all but the last two checkpoints of ``folder``, and what crashes left."""
    for old in [*checkpoints(folder)[KEPT:], *Path(folder).glob(".*.tmp")]:
        if old.is_dir():
            shutil.rmtree(old)
        else:
            old.unlink(missing_ok=True)


def load_latest(folder: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint of ``folder`` that can be used; a UserWarning names each newer one that cannot.

    Returns:
        Its content, or None where the folder has no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none can be used.
    """
    return latest(folder, load)


def latest(folder: str | Path, look: Callable[[Path], T]) -> T | None:
    """What ``look`` gives for the newest checkpoint for which it raises no CheckpointError; else as `load_latest`."""
    problems: list[str] = []
    for path in checkpoints(folder):
        try:
            content = look(path)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            warnings.warn(f"{problem}; using {path.name}, the one before, instead", stacklevel=2)
        return content
    if problems:
        raise CheckpointError(f"{folder} has no usable checkpoint: {'; '.join(problems)}")
    return None
