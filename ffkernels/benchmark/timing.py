"""Times of several functions side by side, in one process: A B C ... A B C ..."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

SAMPLE = 5e-3  # seconds that a sample takes at least: functions that are over sooner are called several times
ROUNDS = (5, 60)  # at least and at most


@dataclass(frozen=True)
class Timed:
    """A function and the settings that it runs under, which are made before the clock starts."""

    run: Callable[[], Any]
    settings: Callable[[], AbstractContextManager[Any]]


Sample = Callable[[Timed, int], float]  # seconds a call, of so many calls


def wall(clock: Callable[[], float] = time.perf_counter) -> Sample:
    """By the clock, all calls together."""

    def sample(timed: Timed, calls: int) -> float:
        with timed.settings():
            start = clock()
            for _ in range(calls):
                timed.run()
            return (clock() - start) / calls

    return sample


class Events:
    """By CUDA events around each call, on a GPU that holds nothing of the call before in its L2 cache.

    Before each call twice the size of L2 is written and the next input is taken (``rotate``). That gives the host a
    start (about 40 us on an H100, by the datasheet): what it prepares for longer is timed with the wait for it, as it
    would be in training. A CUDA graph does without.
    """

    def __init__(self, device: torch.device, rotate: Callable[[], None]) -> None:
        self.rotate = rotate
        size = max(2 * torch.cuda.get_device_properties(device).L2_cache_size, 1 << 20)
        self._flushed = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self, timed: Timed, calls: int) -> float:
        """Seconds a call: the mean of ``calls``."""
        pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        with timed.settings():
            for start, end in pairs:
                self.rotate()
                self._flushed.zero_()
                start.record()
                timed.run()
                end.record()
            torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / calls / 1e3


def interleaved(
    functions: dict[str, Timed], seconds: float, sample: Sample | None = None, least: float = SAMPLE
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round for each function; what else the machine does in a round falls on all alike.

    Args:
        seconds: how long to take, about; there are at least 5 rounds.
        sample: how a sample is taken; None: by the clock.
        least: seconds that the calls of a sample take together.
    """
    sample = sample or wall()
    first = {name: min(sample(f, 1) for _ in range(2)) for name, f in functions.items()}  # also warms up
    calls = {name: max(1, math.ceil(least / max(t, 1e-9))) for name, t in first.items()}
    a_round = sum(calls[name] * t for name, t in first.items())
    rounds = min(max(ROUNDS[0], int(seconds / a_round)), ROUNDS[1])
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, f in functions.items():
                samples[name].append(sample(f, calls[name]))
    finally:
        gc.enable()
    return samples
