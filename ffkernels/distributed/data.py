"""Each rank's part of every minibatch: the minibatches and their wrong labels are those of one process.

A global minibatch of rows is the same for every number of ranks, as in `ffkernels.training.fit`; each rank takes the
next of nearly equal parts of it (they differ by a row at most; where rows are few, some are empty).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from .. import checks
from ..batches import Draws, given_tensors


def shares(rows: int, parts: int) -> list[int]:
    """``rows`` in ``parts`` nearly equal numbers, the larger ones first."""
    return [rows // parts + (i < rows % parts) for i in range(parts)]


class ShardedSampler(Sampler[list[int]]):
    """A DataLoader's batch_sampler that gives a rank its part of every global minibatch.

    As torch's DistributedSampler it is seeded and shuffled anew by `set_epoch`; unlike it, it repeats and drops no row,
    and the global minibatches do not depend on the number of ranks: they are those of `FFNet.fit` with the same seed.

    Args:
        length: rows of the data. batch_size: rows of a global minibatch.
        replicas, rank: how many share each minibatch, and which of them this is.
        seed: of the order; shuffle: False keeps the data's own.
    """

    def __init__(
        self, length: int, batch_size: int, *, replicas: int, rank: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        checks.count("length", length, 1, 2**62, "rows of the data")
        checks.count("batch_size", batch_size, 1, 2**31, "rows of a global minibatch")
        checks.count("replicas", replicas, 1, 2**31, "ranks that share a minibatch")
        checks.count("rank", rank, 0, replicas - 1, "one of the replicas")
        self.length, self.batch_size, self.replicas, self.rank = length, batch_size, replicas, rank
        self.seed, self.shuffle, self.epoch = seed, shuffle, 1

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as for ``epoch``, counted from 1."""
        self.epoch = epoch

    def __len__(self) -> int:
        return math.ceil(self.length / self.batch_size)

    def sizes(self) -> list[tuple[int, int]]:
        """Rows of each minibatch, and of this rank's part of it."""
        full, rest = divmod(self.length, self.batch_size)
        return [(n, shares(n, self.replicas)[self.rank]) for n in [self.batch_size] * full + [rest] * (rest > 0)]

    def __iter__(self) -> Iterator[list[int]]:
        return (rows.tolist() for rows in self.rows())

    def rows(self) -> Iterator[Tensor]:
        """The rank's rows of each minibatch, as indices."""
        if self.shuffle and self.batch_size < self.length:  # all rows in another order would be the same minibatch
            order = torch.randperm(self.length, generator=Draws(self.seed, self.epoch)["order"])
        else:
            order = torch.arange(self.length)
        for batch in order.split(self.batch_size):
            yield batch.split(shares(len(batch), self.replicas))[self.rank]


class Shards:
    """What a rank trains on: its part of the minibatches of tensors or of a dataset with a row for each index."""

    def __init__(
        self, data: Any, labels: Tensor | None, batch_size: int, replicas: int, rank: int, workers: int = 0
    ) -> None:
        data, labels = given_tensors(data, labels, "a dataset")
        if isinstance(data, DataLoader) or not (hasattr(data, "__getitem__") and isinstance(data, Sized)):
            raise TypeError(
                f"data must be tensors or a dataset with an index and a length that gives (x, label) (the batches are "
                f"made here: their parts belong to ranks), got {type(data).__name__}"
            )
        checks.count("the number of rows of data", len(data), 1, 2**62, "at least one")
        self.data: Any = data
        self.labels, self.workers = labels, workers
        self.sampler = ShardedSampler(len(data), batch_size, replicas=replicas, rank=rank)

    @property
    def images(self) -> bool:
        """Whether the label stands in several channels of an input."""
        x = self.data if isinstance(self.data, Tensor) else torch.as_tensor(self.data[0][0])[None]
        return x.dim() == 4 and x.shape[1] > 1

    def epoch(self, seed: int, epoch: int, num_classes: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The rank's x (B, K) or (B, C, H, W), labels (B,) and wrong labels (B,) of each minibatch."""
        self.sampler.seed = seed
        self.sampler.set_epoch(epoch)
        generator, (replica, replicas) = Draws(seed, epoch)["negatives"], (self.sampler.rank, self.sampler.replicas)
        for (rows, _), (x, labels) in zip(self.sampler.sizes(), self._loaded(), strict=True):
            checks.label_values("labels", labels, num_classes)
            # what wrong_labels draws for the whole minibatch
            shift = torch.randint(1, num_classes, (rows,), generator=generator).split(shares(rows, replicas))[replica]
            yield x, labels, (labels + shift.to(labels.device)) % num_classes

    def _loaded(self) -> Iterator[tuple[Tensor, Tensor]]:
        if isinstance(self.data, Tensor):
            assert self.labels is not None
            for rows in self.sampler.rows():
                rows = rows.to(self.data.device)
                yield self.data[rows], self.labels[rows].long()
            return
        parts = [rows for rows in self.sampler if rows]  # a loader cannot make a batch of no rows
        loaded = iter(DataLoader(self.data, batch_sampler=parts, num_workers=self.workers))
        for _, own in self.sampler.sizes():
            if own:
                x, labels = next(loaded)
                yield x, labels.long()
            else:
                yield torch.as_tensor(self.data[0][0])[None][:0], torch.zeros(0, dtype=torch.long)
