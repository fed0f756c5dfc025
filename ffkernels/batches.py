"""Minibatches of labelled inputs, and the random numbers of an epoch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sized
from typing import Any

import torch
from torch import Tensor

from . import checks


def epoch_generator(seed: int, epoch: int, purpose: str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone: an epoch's draws need no state from the epoch before."""
    digest = hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Draws:
    """The random numbers of one epoch: a generator for each purpose, so that none depends on another's use."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch
        self._generators: dict[str, torch.Generator] = {}

    def __getitem__(self, purpose: str) -> torch.Generator:
        if purpose not in self._generators:
            self._generators[purpose] = epoch_generator(self.seed, self.epoch, purpose)
        return self._generators[purpose]


def beside(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs on the weight's device and, where they are floats, in its dtype; integers stay what they are."""
    return x.to(weight.device, weight.dtype if x.is_floating_point() else x.dtype)


Batch = tuple[Tensor, Tensor, Tensor | None]  # x, labels and, where they are drawn once, the negatives' labels


class TensorBatches:
    """Shuffled minibatches of tensors.

    Attributes:
        wrong: the negatives' labels (B,), where they are drawn once for all rows.
    """

    def __init__(self, x: Tensor, labels: Tensor, batch_size: int) -> None:
        self.x, self.labels, self.batch_size = x, labels, batch_size
        self.wrong: Tensor | None = None

    def __len__(self) -> int:
        return math.ceil(len(self.x) / self.batch_size)

    def epoch(self, draws: Draws) -> Iterator[Batch]:
        if self.batch_size >= len(self.x):  # a copy of everything in another order would be the same batch
            yield self.x, self.labels, self.wrong
            return
        order = torch.randperm(len(self.x), generator=draws["order"]).to(self.x.device)
        for rows in order.split(self.batch_size):
            # quicker than x[rows]
            x, labels = self.x.index_select(0, rows), self.labels.index_select(0, rows)
            yield x, labels, None if self.wrong is None else self.wrong[rows]


class LoaderBatches:
    """Minibatches of a loader, in its own order."""

    def __init__(self, loader: Iterable[Any], length: int) -> None:
        self.loader, self.length = loader, length

    def __len__(self) -> int:
        return self.length

    def epoch(self, draws: Draws) -> Iterator[Batch]:
        empty = True
        for item in self.loader:
            empty = False
            if not isinstance(item, (tuple, list)) or len(item) != 2:
                raise TypeError(f"the loader must give (x, labels), got {type(item).__name__}")
            x, labels = item
            checks.inputs("x", x)
            checks.labels("labels", labels, x, dims=1)
            yield x, labels, None
        if empty:
            raise ValueError(f"the loader must give {self.length} batches in every epoch, as its length says, got none")


def given_tensors(data: Any, labels: Tensor | None, other: str) -> tuple[Any, Tensor | None]:
    """x and labels as fit takes them, checked; or ``data`` that is ``other`` than tensors, and None."""
    if isinstance(data, (tuple, list)) and len(data) == 2 and labels is None and isinstance(data[0], Tensor):
        data, labels = data
    if not isinstance(data, Tensor):
        if labels is not None:
            raise ValueError(
                f"labels must be None with {other}, which gives them itself; data must be a tensor with labels, got "
                f"{type(data).__name__}"
            )
        return data, None
    if labels is None:
        raise ValueError("labels must be given with a tensor of inputs, got None")
    checks.inputs("data", data)
    checks.labels("labels", labels, data, dims=1)
    if len(data) == 0:
        raise ValueError(f"data must have at least one row, got shape {tuple(data.shape)}")
    return data, labels


def make_batches(data: Any, labels: Tensor | None, batch_size: int) -> TensorBatches | LoaderBatches:
    """Minibatches of what fit was given, checked."""
    data, labels = given_tensors(data, labels, "a loader")
    if labels is not None:
        return TensorBatches(data, labels, batch_size)
    if not (isinstance(data, Iterable) and isinstance(data, Sized)):
        raise TypeError(
            f"data must be tensors or a loader with a length that gives (x, labels), got {type(data).__name__}"
        )
    if len(data) == 0:
        raise ValueError("data must give at least one batch, got an empty loader")
    return LoaderBatches(data, len(data))
