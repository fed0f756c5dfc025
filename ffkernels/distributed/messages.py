"""Tensors from one stage of a pipeline to another: several under way, in queues that are bounded at both ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .group import message_limit, watch

IN_FLIGHT = 4  # micro-batches between two stages, at most

Shape = tuple[tuple[int, ...], torch.dtype]


class Inbox:
    """Tensors from another stage, received ahead of their use."""

    def __init__(self, shapes: Iterator[list[Shape]], device: torch.device, **sender: Any) -> None:
        self._shapes, self._device, self._sender = shapes, device, sender
        self._limit = message_limit(sender["group"], device)
        self._coming: deque[list[tuple[Any, Tensor]]] = deque()
        for _ in range(IN_FLIGHT):
            self._expect()

    def _expect(self) -> None:
        shapes = next(self._shapes, None)
        if shapes is None:
            return
        tensors = [torch.empty(shape, dtype=dtype, device=self._device) for shape, dtype in shapes]
        self._coming.append([(watch().run(dist.irecv, t, **self._sender), t) for t in tensors])

    def take(self) -> list[Tensor]:
        parts = self._coming.popleft()
        for work, _ in parts:
            watch().wait(work, self._limit)
        self._expect()
        return [t for _, t in parts]


class Outbox:
    """Tensors on their way to another stage; waits when too many of them have not been taken."""

    def __init__(self, device: torch.device, **receiver: Any) -> None:
        self._receiver, self._limit = receiver, message_limit(receiver["group"], device)
        self._going: deque[list[tuple[Any, Tensor]]] = deque()

    def put(self, *tensors: Tensor) -> None:
        while len(self._going) >= IN_FLIGHT:
            self._settle()
        self._going.append([(watch().run(dist.isend, t, **self._receiver), t) for t in tensors])

    def _settle(self) -> None:
        for work, _ in self._going.popleft():
            watch().wait(work, self._limit)

    def flush(self) -> None:
        while self._going:
            self._settle()
