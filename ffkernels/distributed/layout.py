"""Which layers, or columns of a layer, each stage of a pipeline holds."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..cost import Layer, minimum
from ..layer import FFLinear

GRAIN = 16  # columns: a layer is cut at a multiple of it, so that rows of both parts stay aligned
FLOPS_PER_BYTE = 64.0  # flops that take as long as a byte to or from memory; docs/scale.md has what decided it


@dataclass(frozen=True)
class Span:
    """Columns [first, last) of the ``total`` of layer ``index``.

    Where a layer is cut between two stages, the one with its first columns holds the head, the next one the tail.
    """

    index: int
    first: int
    last: int
    total: int

    @property
    def whole(self) -> bool:
        return self.last - self.first == self.total

    @property
    def head(self) -> bool:
        return self.last < self.total

    @property
    def tail(self) -> bool:
        return self.first > 0

    def part(self, layer: FFLinear) -> FFLinear:
        """The layer itself where the span is all of it, else a copy of these columns (rows of W)."""
        if self.whole:
            return layer
        part = copy.deepcopy(layer)
        part.out_features = self.last - self.first
        part.weight = nn.Parameter(self.of(layer.weight), requires_grad=False)
        if layer.bias is not None:
            part.bias = nn.Parameter(self.of(layer.bias), requires_grad=False)
        for name, t in layer.state.items():
            part.optimizer_state.register_buffer(name, self.of(t))
        return part

    def of(self, t: Tensor) -> Tensor:
        """Its rows of a tensor of the layer's state, on memory of their own; of the step count, all of it."""
        return t.detach()[self.first : self.last].clone() if t.dim() else t.detach().clone()


def whole_layers(counts: Sequence[int], widths: Sequence[int]) -> list[list[Span]]:
    """Stages of ``counts`` whole layers each, in order.

    Raises:
        TypeError, ValueError: they do not add up to the layers that there are.
    """
    for i, count in enumerate(counts):
        checks.count(f"stages[{i}]", count, 1, len(widths), "layers of a stage")
    if sum(counts) != len(widths):
        raise ValueError(f"stages must add up to the net's {len(widths)} layers, got {list(counts)}")
    spans = iter([Span(i, 0, n, n) for i, n in enumerate(widths)])
    return [[next(spans) for _ in range(count)] for count in counts]


def counted_costs(layers: Sequence[FFLinear], rows: int) -> list[float]:
    """What a training step of each layer costs: flops, and bytes at FLOPS_PER_BYTE each, as `ffkernels.cost` counts.

    ``rows`` is M, positive and negative rows together; the first layer shares its products between both.
    """
    costs = []
    for i, layer in enumerate(layers):
        options: dict[str, Any] = {"dtype": layer.weight.dtype, "bias": layer.bias is not None, "slots": _slots(layer)}
        images = max(1, rows // 2) if i == 0 else None
        work = minimum("ff_step_", Layer(rows, layer.in_features, layer.out_features, images=images, **options))
        costs.append(work.flops + FLOPS_PER_BYTE * work.bytes)
    return costs


def _slots(layer: FFLinear) -> int:
    return sum(t.dim() == 2 for t in layer.state.values())


def balanced(costs: Sequence[float], widths: Sequence[int], stages: int, cuttable: Sequence[bool]) -> list[list[Span]]:
    """The division into stages whose most expensive stage is the cheapest.

    Args:
        costs, widths: of each layer. A part of a layer costs in proportion to its columns.
        cuttable: layers of which one stage may hold the first columns and the next one the rest.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if stages > len(costs):
        raise ValueError(f"a pipeline of {stages} stages needs as many layers, the net has {len(costs)}")
    low, high = sum(costs) / stages, sum(costs)
    best = _fill(costs, widths, stages, cuttable, high)
    for _ in range(50):
        middle = (low + high) / 2
        found = _fill(costs, widths, stages, cuttable, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    assert best is not None  # with room for all in one stage, each gets a layer
    return best


def _fill(
    costs: Sequence[float], widths: Sequence[int], stages: int, cuttable: Sequence[bool], room: float
) -> list[list[Span]] | None:
    """Fill stages in turn, none beyond ``room``; None where it is not enough."""
    layers, at, begun = len(costs), 0, 0  # begun: columns of layer `at` that the stage before holds
    plan: list[list[Span]] = []
    for stage in range(stages):
        spans: list[Span] = []
        left, later = room, stages - stage - 1
        while at < layers:
            if spans and layers - at <= later:
                break  # every later stage needs a layer
            n, each = widths[at], costs[at] / widths[at]
            if (n - begun) * each <= left * (1 + 1e-9):
                spans.append(Span(at, begun, n, n))
                left -= (n - begun) * each
                at, begun = at + 1, 0
                continue
            columns = int(left / each) // GRAIN * GRAIN
            if begun == 0 and cuttable[at] and later and GRAIN <= columns <= n - GRAIN and layers - at > later - 1:
                spans.append(Span(at, 0, columns, n))
                begun = columns
            break
        if not spans:
            return None
        plan.append(spans)
    return plan if at == layers else None
