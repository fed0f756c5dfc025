"""Times of several functions side by side, in one process: A B C ... A B C ..."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

SAMPLE = 5e-3  # seconds that a sample takes at least: functions that are over sooner are called several times
ROUNDS = (5, 60)  # at least and at most


@dataclass(frozen=True)
class Timed:
    """A function and the settings that it runs under, which are made before the clock starts."""

    run: Callable[[], Any]
    settings: Callable[[], AbstractContextManager[Any]]


def _seconds(timed: Timed, calls: int, clock: Callable[[], float]) -> float:
    with timed.settings():
        start = clock()
        for _ in range(calls):
            timed.run()
        return (clock() - start) / calls


def interleaved(
    functions: dict[str, Timed], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds a call, one sample a round for each function; what else the machine does in a round falls on all alike.

    Args:
        seconds: how long to take, about; there are at least 5 rounds.
    """
    first = {name: min(_seconds(f, 1, clock) for _ in range(2)) for name, f in functions.items()}  # also warms up
    calls = {name: max(1, math.ceil(SAMPLE / max(t, 1e-9))) for name, t in first.items()}
    a_round = sum(calls[name] * t for name, t in first.items())
    rounds = min(max(ROUNDS[0], int(seconds / a_round)), ROUNDS[1])
    samples: dict[str, list[float]] = {name: [] for name in functions}
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name, f in functions.items():
                samples[name].append(_seconds(f, calls[name], clock))
    finally:
        gc.enable()
    return samples
