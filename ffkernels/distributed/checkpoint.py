"""Checkpoints by several processes through torch.distributed.checkpoint, for any number of them to go on from.

A checkpoint is a folder: torch's files, to which every rank writes its share, and manifest.json with the records and
the files' checksums. It gets its name when all is written, so a folder with the name is whole. torch's files hold
pickled metadata: as with any file of that format, load only what you trust.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..checkpoint import CheckpointError, prune, sync_folder, write_atomic
from .group import watch
from .model import ParallelModel

FORMAT = 1
MANIFEST = "manifest.json"


def save_numbered(folder: str | Path, number: int, model: ParallelModel, history: list[Any]) -> Path:
    """Write checkpoint ``number`` of ``folder`` and remove all but the last two. Every rank of the model calls it.

    Until all ranks have written their share, the folder's other checkpoints stay as they are.

    Raises:
        OSError: it could not be written. RankError: another rank died, hangs or failed.
    """
    path = Path(folder) / f"checkpoint-{number:06d}"
    temporary = path.with_name(f".{path.name}.tmp")
    with watch().guard():
        if model.main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        model._from_main(None)  # the folder is there
        state, group = model.state_dict(), model.group
        rank, alone = dist.get_rank(group), dist.get_world_size(group) == 1
        writer = dcp.FileSystemWriter(temporary)
        watch().run(dcp.save, state, storage_writer=writer, process_group=group, no_dist=alone)
        own = {p.name: _digest(p) for p in temporary.glob(f"__{rank}_*")}
        parts: list[Any] = [None] * dist.get_world_size(group)
        watch().run(dist.all_gather_object, parts, own, group=group)
        if model.main:
            files = {name: digest for part in parts for name, digest in part.items()}
            files[".metadata"] = _digest(temporary / ".metadata")
            content = {"format": FORMAT, "history": history, "files": files}
            write_atomic(temporary / MANIFEST, json.dumps(content).encode() + b"\n")
            shutil.rmtree(path, ignore_errors=True)  # one that could not be used, else training would not be here
            os.replace(temporary, path)
            sync_folder(path.parent)
            prune(path.parent)
        model._from_main(None)  # the checkpoint is whole
    return path


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _by_parts(file)


def _by_parts(file: Any) -> str:  # Python 3.10
    digest = hashlib.sha256()
    while part := file.read(1 << 20):
        digest.update(part)
    return digest.hexdigest()


def check(path: str | Path) -> list[Any]:
    """The records of a checkpoint, all of whose files are as they were written.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint.
    """
    path = Path(path)
    try:
        content = json.loads((path / MANIFEST).read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path}: its format is {content['format']!r}, this version reads {FORMAT}")
        for name, digest in content["files"].items():
            if _digest(path / name) != digest:
                raise CheckpointError(f"{path}: damaged ({name} does not have the checksum that was stated)")
        return list(content["history"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({error})") from error


def load(path: str | Path) -> dict[str, Any]:
    """The whole content, tensors on the CPU, in one process: {"format", "net": a state_dict, "history"}.

    Raises:
        CheckpointError: it is damaged, or not a checkpoint.
    """
    history = check(path)
    reader = dcp.FileSystemReader(path)
    state: dict[str, Tensor] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _read(reader, state)
    return {"format": FORMAT, "net": state, "history": history}


def _read(reader: dcp.FileSystemReader, state: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this is one process
        dcp.load(state, storage_reader=reader, no_dist=True)


def load_into(path: str | Path, model: ParallelModel) -> None:
    """Put a checkpoint's weights and optimizer state into ``model``; each rank reads its own layers."""
    state = model.wanted_state()
    _read(dcp.FileSystemReader(path), state)
    model.load_state_dict(state)
