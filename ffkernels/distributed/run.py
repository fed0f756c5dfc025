"""A training run in a folder by the processes that torchrun started: `ffkernels.run.train` with a part for each."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from .. import checkpoint, checks
from ..config import TrainConfig
from ..data import Dataset
from ..nn import FFNet
from ..run import RunError, RunFolder, finish, split, to_json
from ..training import Record
from . import checkpoint as sharded
from .group import watch
from .model import COMPRESSION, ParallelModel
from .parallel import DataParallelFF, PipelineFF


@dataclass(frozen=True)
class Division:
    """How the ranks share the work. Another division gives the same net up to the rounding of sums.

    Attributes:
        stages: of a pipeline of layers; the minibatches are shared by as many pipelines as there are ranks for.
        micro_batches, compress, check_every: as for PipelineFF.
    """

    stages: int = 1
    micro_batches: int = 1
    compress: str = COMPRESSION[0]
    check_every: int = 0

    def check(self) -> None:
        """ValueError where the processes that there are cannot be divided so."""
        size = dist.get_world_size()
        checks.count("stages", self.stages, 1, size, "stages of a pipeline")
        if size % self.stages:
            raise ValueError(f"stages must divide the {size} processes, got {self.stages}")
        checks.count("micro_batches", self.micro_batches, 1, 2**31, "parts of a minibatch")
        if self.micro_batches > 1 and self.stages == 1:
            raise ValueError(f"micro_batches must be 1 without a pipeline (stages 1), got {self.micro_batches}")
        checks.count("check_every", self.check_every, 0, 2**31, "steps between two checks; 0: none")

    def model(self, net: FFNet, rows: int) -> ParallelModel:
        """The net, divided. ``rows``: of a minibatch, positive and negative."""
        self.check()
        size = dist.get_world_size()
        options: dict[str, Any] = {"compress": self.compress, "check_every": self.check_every}
        if self.stages == 1:
            return DataParallelFF(net, **options)
        kind = net.stack[0].weight.device.type
        mesh = init_device_mesh(kind, (size // self.stages, self.stages), mesh_dim_names=("data", "pipeline"))
        return PipelineFF(net, mesh=mesh, rows=rows, micro_batches=self.micro_batches, **options)


def launch_key() -> str | None:
    """What the attempts of one torchrun have in common; None where torchrun has not started this process."""
    run = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if run is None else f"{run} {socket.gethostname()} {os.getppid()}"


def restarted() -> bool:
    """Whether torchrun has started the processes again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def begun(runs: Path) -> Path | None:
    """The run under ``runs`` that an earlier attempt of the same torchrun has begun."""
    found = []
    for path in runs.glob("*/config.json"):
        try:
            if RunFolder.open(path.parent).launch == launch_key():
                found.append(path.parent)
        except RunError:
            continue
    return max(found, key=lambda p: p.stat().st_mtime, default=None)


def check_config(config: TrainConfig, division: Division) -> None:
    """ValueError names what one process can do and several cannot, or not when divided so."""
    simple = {
        "loss": "logistic", "negatives": "uniform", "shift": 0, "affine": (), "noise": 0.0, "head_layers": (),
        "average": 0.0, "dropout": 0.0, "direction": "maximize", "candidates": None, "recurrent": False,
        "negatives_once": False, "receptive_field": 0,
    }  # fmt: skip
    if other := {name: getattr(config, name) for name, value in simple.items() if getattr(config, name) != value}:
        raise ValueError(
            f"not for several processes: {', '.join(f'{name} {value!r}' for name, value in other.items())}"
        )
    if division.stages > len(config.hidden):
        raise ValueError(f"stages must be at most the net's {len(config.hidden)} layers, got {division.stages}")
    if division.stages > 1 and config.mode == "greedy":
        raise ValueError("mode must be 'simultaneous' with a pipeline: in 'greedy' mode one layer trains at a time")


def restore(folder: RunFolder, model: ParallelModel) -> list[Record]:
    """Put the newest usable checkpoint, of however many processes, into ``model``; the records so far."""

    def look(path: Path) -> tuple[Path, list[Record]]:
        return path, sharded.check(path) if path.is_dir() else checkpoint.load(path)["history"]

    path, history = model._from_main((checkpoint.latest(folder.path, look) or (None, [])) if model.main else None)
    try:
        if path is not None and path.is_dir():
            sharded.load_into(path, model)
        elif path is not None:
            model.load_state_dict(checkpoint.load(path)["net"])
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunError(f"{path} does not fit the run's config.json: {error}") from error
    return history


def train(
    folder: RunFolder,
    dataset: Dataset,
    division: Division,
    *,
    progress: bool = True,
    report: Callable[[Record], None] = lambda record: None,
) -> dict[str, Any] | None:
    """Train the folder's run to its end, from its last checkpoint if it has one, on all ranks.

    Returns:
        On the first rank what result.json holds; None on the others.

    Raises:
        As `ffkernels.run.train`; RankError where another rank died, hangs or failed.
    """
    config = folder.config
    with watch().guard():
        folder.check_data(dataset)
        check_config(config, division)
        dataset = config.prepare(dataset)
        x, y, measured_on = split(dataset, config.validation)
        model = division.model(folder.build_net(), 2 * (config.batch_size or 1))
        history = restore(folder, model)
        if model.main:
            folder.rewind(history)

        def save(model: ParallelModel, history: list[Record]) -> None:
            if model.main:
                with open(folder.path / "metrics.jsonl", "a") as file:
                    file.write(to_json(history[-1]) + "\n")
            sharded.save_numbered(folder.path, len(history), model, history)
            if model.main:
                report(history[-1])

        history = model.fit(
            x, y, epochs=config.epochs, mode=config.mode, batch_size=config.batch_size, seed=config.seed,
            schedule=config.build_schedule(), validation=measured_on, validate_every=config.validate_every,
            callbacks=[save], history=history, progress=progress,
        )  # fmt: skip
        result = None
        if model.main:
            whole = RunFolder(folder.path, dataclasses.replace(config, device="cpu"), folder.data, folder.launch)
            result = finish(folder, whole.load_net().to(model.device), dataset, history)
        model._from_main(None)  # nobody leaves before the first rank is done
    return result
