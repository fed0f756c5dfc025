"""Learning rate schedules: what the rate is multiplied by as training goes on."""

from __future__ import annotations

from dataclasses import dataclass

from . import checks


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up from 0, then constant, then linear to 0; any of the three may be left out.

    Args:
        warmup: share of the training in which the factor rises from 0 to 1, in [0, 1). 0: none.
        decay_from: share of the training after which it falls, in [0, 1]; the two factors are multiplied. 1: never;
            0: linear to zero from the start.

    Raises:
        TypeError, ValueError: a share that is not in its range.
    """

    warmup: float = 0.0
    decay_from: float = 1.0

    def __post_init__(self) -> None:
        for name in ("warmup", "decay_from"):
            value = getattr(self, name)
            checks.number(name, value, 0.0)
            if value > 1 or (name == "warmup" and value == 1):
                raise ValueError(f"{name} must be a share of the training, at most 1, got {value!r}")

    def __call__(
        self,
        progress: float,  # in [0, 1): the share of the steps that are done
    ) -> float:
        rising = progress / self.warmup if progress < self.warmup else 1.0
        falling = (1 - progress) / (1 - self.decay_from) if progress > self.decay_from else 1.0
        return rising * falling
