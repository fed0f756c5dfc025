"""One rank's work: its layers' part of every micro-batch, taken from the rank before and handed to the rank after.

Nothing flows back in Forward-Forward training, so a stage goes on to the next micro-batch as soon as it has sent the
one before. Where a layer is cut between two stages, the one that holds its last columns returns the rows' goodness,
which the one before needs for its share of the gradient; until then that share waits, and the stage goes on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import label_ops, ops
from ..labels import overlay
from ..layer import FFLinear, signs
from ..loss import logistic_loss
from ..optim import Optimizer, state_dtype
from .layout import Span
from .messages import IN_FLIGHT, Inbox, Outbox, Shape
from .reduce import Bucket, buckets, frozen_rate

_BACK = 1  # the tag of what returns, which may overtake what goes forward


class Micro(NamedTuple):
    """What every stage knows of a micro-batch before it comes."""

    positives: int  # rows of this rank's part
    negatives: int
    weight: float  # its rows as a part of the whole minibatch's, over all ranks
    positive_weight: float  # the same of the positive rows
    last: bool  # of its minibatch
    paired: bool  # the positive and the negative row of an input stand together; else all positives come first

    @property
    def rows(self) -> int:
        return self.positives + self.negatives

    def signs(self, like: Tensor) -> Tensor:  # (M,)
        if not self.paired:
            return signs(self.positives, self.negatives, like)
        sign = signs(self.rows, 0, like)
        sign[1::2] = -1
        return sign


class Rows(NamedTuple):
    """The first stage's input of a micro-batch: rows as they are, or inputs under pairs of labels."""

    x: Tensor  # (M, K), or (B, K) with pairs
    pairs: Tensor | None = None  # (B, 2): the true label and a wrong one


@dataclass(frozen=True)
class Links:
    """The process groups of a rank.

    Attributes:
        pipe: stages in order, for what goes forward; back: the same ranks, for what returns; None: one stage.
        data: ranks that hold the same layers; None: one rank holds them.
        place, places: of this stage in the pipeline.
    """

    pipe: Any = None
    back: Any = None
    data: Any = None
    place: int = 0
    places: int = 1


@dataclass
class _Waiting:
    """A cut layer's share of a micro-batch whose goodness has yet to come back."""

    x: Tensor  # (M, K)
    sqnorm: Tensor | None  # (M,)
    p: Tensor  # (M, n)
    micro: Micro
    optimizer: Optimizer


class Stage:
    """A rank's layers and what it does with them.

    Args:
        layers: with their spans, in order. trained: indices of the layers that learn; the others only run.
        num_classes, strength: of the labels written over the input.
        direct: every micro-batch is a minibatch of this rank alone, and its update is part of the layer's step.
        compress: reduce gradients in bf16.
    """

    def __init__(
        self,
        layers: Sequence[tuple[Span, FFLinear]],
        depth: int,
        links: Links,
        *,
        num_classes: int,
        strength: float,
        direct: bool,
        compress: bool,
        trained: range | None = None,
    ) -> None:
        self.layers, self.links, self.direct = list(layers), links, direct
        self.num_classes, self.strength = num_classes, strength
        self.trained = range(depth) if trained is None else trained
        self.device, self.dtype = self.layers[0][1].weight.device, self.layers[0][1].weight.dtype
        self.acc = state_dtype(self.dtype)
        # loss, g of positive rows, g of negative rows: sums over this rank's rows, by layer
        self.sums = torch.zeros(3, depth, dtype=torch.float64, device=self.device)
        self._bucket: dict[int, Bucket] = {}
        self._waiting: deque[_Waiting] = deque()
        self._inbox: Inbox | None = None
        self._outbox: Outbox | None = None
        self._goodness_in: Inbox | None = None
        self._goodness_out: Outbox | None = None
        if not direct:
            own = [(s, layer) for s, layer in self.layers if s.index in self.trained]
            for layer in [a for s, a in own if not s.whole]:  # these are complete at times of their own
                self._bucket[id(layer)] = Bucket([layer], links.data, compress)
            for bucket in buckets([a for s, a in own if s.whole], links.data, compress):
                self._bucket |= {id(layer): bucket for layer in bucket.layers}

    @property
    def first(self) -> bool:
        return self.links.place == 0

    @property
    def last(self) -> bool:
        return self.links.place == self.links.places - 1

    def divisor(self, span: Span, layer: FFLinear) -> int:
        """E of the whole layer."""
        return span.total if layer.reduction == "mean" else 1

    # -- training

    def begin(self, plan: Sequence[Micro]) -> None:
        """Get ready for the micro-batches of ``plan``; `feed` then takes one after the other."""
        links, plan = self.links, [m for m in plan if m.rows]
        if not self.first:
            shapes = (self._message(m.rows) for m in plan)
            self._inbox = Inbox(shapes, self.device, group=links.pipe, group_src=links.place - 1)
            if self.layers[0][0].tail:
                self._goodness_out = Outbox(self.device, group=links.back, group_dst=links.place - 1, tag=_BACK)
        if not self.last:
            self._outbox = Outbox(self.device, group=links.pipe, group_dst=links.place + 1)
            if self.layers[-1][0].head:
                back: Iterator[list[Shape]] = ([((m.rows,), self.acc)] for m in plan)
                source = {"group": links.back, "group_src": links.place + 1, "tag": _BACK}
                self._goodness_in = Inbox(back, self.device, **source)

    def _message(self, rows: int) -> list[Shape]:
        """What comes from the stage before: x and |x|^2; of a cut first layer also the head's y and goodness."""
        span, layer = self.layers[0]
        shapes: list[Shape] = [((rows, layer.in_features), self.dtype), ((rows,), self.acc)]
        return [*shapes, ((rows, span.first), self.dtype), ((rows,), self.acc)] if span.tail else shapes

    def feed(self, micro: Micro, given: Rows | None = None) -> None:
        """Train on the next micro-batch; ``given`` on the first stage only."""
        if not micro.rows:
            self._keep_order()
            for _, layer in self.layers:
                if id(layer) in self._bucket:
                    self._settle(layer)
                    self._bucket[id(layer)].add(layer, [], layer.optimizer, micro.last)
            return
        sqnorm: Tensor | None = None
        head: list[Tensor] = []
        if self._inbox is not None:
            x, sqnorm, *head = self._inbox.take()
        else:
            assert given is not None
            x = given.x
        sign = micro.signs(x)
        for at, (span, layer) in enumerate(self.layers):
            if span.index >= self.trained.stop:
                break
            pairs = given.pairs if given is not None and at == 0 else None
            if span.head:
                self._settle(layer)
                y, total, p = self._forward(layer, x, sqnorm)
                if sqnorm is None:
                    sqnorm = x.to(self.acc).square().sum(1)
                assert self._outbox is not None
                self._outbox.put(x, sqnorm, y, total)
                self._waiting.append(_Waiting(x, sqnorm, p, micro, frozen_rate(layer.optimizer)))
                return
            x, sqnorm = self._layer(span, layer, x, sqnorm, sign, micro, pairs, head if at == 0 else [])
        if self._outbox is not None:
            assert sqnorm is not None
            self._outbox.put(x, sqnorm)

    def _forward(self, layer: FFLinear, x: Tensor, sqnorm: Tensor | None) -> tuple[Tensor, ...]:
        options = {**layer.forward_options(), "x_sqnorm": sqnorm, "return_p": True}
        return ops.ff_forward(x, layer.weight, layer.bias, **options)

    def _settle(self, layer: FFLinear) -> None:
        """Give the layer every update that it still has to get before its next micro-batch."""
        if self._waiting and layer is self.layers[-1][1]:
            all_of_them = self.direct or self._waiting[-1].micro.last
            while self._waiting and (all_of_them or len(self._waiting) >= IN_FLIGHT):
                self._catch_up()
        if (bucket := self._bucket.get(id(layer))) is not None:
            bucket.apply()

    def _keep_order(self) -> None:
        """Before reductions of a minibatch start: start those of the one before. All ranks then have the same order."""
        while any(waiting.micro.last for waiting in self._waiting):
            self._catch_up()

    def _catch_up(self) -> None:
        """Finish the oldest share of a cut layer, with the goodness that comes back."""
        assert self._goodness_in is not None
        waiting, (span, layer) = self._waiting.popleft(), self.layers[-1]
        (total,) = self._goodness_in.take()
        _, coef = self._loss(span, layer, total, waiting.micro.signs(total))
        self._learn(layer, waiting.x, waiting.p, coef, waiting.sqnorm, waiting.micro, waiting.optimizer)

    def _loss(self, span: Span, layer: FFLinear, total: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        return logistic_loss(
            total, sign, divisor=self.divisor(span, layer), threshold=layer.threshold, temperature=layer.temperature
        )

    def _layer(
        self,
        span: Span,
        layer: FFLinear,
        x: Tensor,  # (M, K), or (B, K) with pairs
        sqnorm: Tensor | None,  # (M,)
        sign: Tensor,  # (M,)
        micro: Micro,
        pairs: Tensor | None,  # (B, 2)
        head: list[Tensor],  # y (M, first) and goodness (M,) of a cut layer's first columns
    ) -> tuple[Tensor, Tensor]:  # y (M, N), goodness (M,) of the whole layer
        learns = span.index in self.trained
        labels: dict[str, Any] = {"num_classes": self.num_classes, "strength": self.strength}
        if learns and self.direct and span.whole and (pairs is None or not micro.paired):
            held: dict[str, Any] = {
                "weight": layer.weight, "bias": layer.bias, "state": layer.state, "optimizer": layer.optimizer,
                **layer.step_options(), **layer.peer_options(sign),
            }  # fmt: skip
            if pairs is None:
                y, total, loss = ops.ff_step_(x, sign, x_sqnorm=sqnorm, **held)
            else:
                y, total, loss = label_ops.ff_label_step_(x, pairs[:, 0], pairs[:, 1], **labels, **held)
            layer.watch_peers(y, sign)
            self._count(span, layer, total, sign, loss)
            return y, total
        self._settle(layer)
        if pairs is not None:
            options = layer.forward_options()
            y, total, p = label_ops.ff_label_forward(
                x, pairs, layer.weight, layer.bias, **labels, **options, return_p=True
            )
            if learns:
                x = overlay(x.repeat_interleave(2, dim=0), pairs.flatten(), **labels)
        else:
            y, total, p = self._forward(layer, x, sqnorm)
        if head:
            total = head[1] + total
            assert self._goodness_out is not None
            self._goodness_out.put(total)
            y = torch.cat([head[0], y], 1)
        if learns:
            loss, coef = self._loss(span, layer, total, sign)
            self._count(span, layer, total, sign, loss)
            peers = None if layer.peer_mean is None else (sign, y)
            self._learn(layer, x, p, coef, sqnorm, micro, layer.optimizer, peers)
        return y, total

    def _learn(
        self,
        layer: FFLinear,
        x: Tensor,
        p: Tensor,
        coef: Tensor,
        sqnorm: Tensor | None,
        micro: Micro,
        optimizer: Optimizer,
        peers: tuple[Tensor, Tensor] | None = None,  # sign (M,) and y (M, N), with peer normalisation
    ) -> None:
        options = {**layer.forward_options(), "x_sqnorm": sqnorm}
        if peers is not None:
            options |= layer.peer_options(peers[0])
        if self.direct:
            ops.ff_update_(x, p, coef, layer.weight, layer.bias, layer.state, optimizer, **options)
        else:
            if micro.last:
                self._keep_order()
            # coef is that of the micro-batch's own mean; low-precision gradients keep its size until they are summed
            early = self.dtype == self.acc
            if early:
                coef = coef * micro.weight
                if "row_term" in options:
                    options["row_term"] = options["row_term"] * micro.weight
            grads = ops.ff_grad(x, p, coef, layer.weight, layer.bias, **options)
            acc = [g if early else g.to(self.acc).mul_(micro.weight) for g in grads if g is not None]
            if peers is not None:
                positive = peers[1][peers[0] > 0].to(self.acc)
                acc.append(positive.sum(0) * (micro.positive_weight / max(1, micro.positives)))
            self._bucket[id(layer)].add(layer, acc, optimizer, micro.last)

    def _count(self, span: Span, layer: FFLinear, total: Tensor, sign: Tensor, loss: Tensor) -> None:
        g, positive = total.double() / self.divisor(span, layer), sign > 0
        sums = torch.stack([loss.double() * len(total), (g * positive).sum(), (g * ~positive).sum()])
        self.sums[:, span.index] += sums

    def synchronize(self) -> None:
        """Finish every update that is under way: the weights are then those after the last micro-batch fed."""
        while self._waiting:
            self._catch_up()
        for bucket in {id(b): b for b in self._bucket.values()}.values():
            bucket.apply()

    def end(self) -> None:
        """Finish what `begin` planned, when all of it was fed."""
        self.synchronize()
        for box in (self._outbox, self._goodness_out):
            if box is not None:
                box.flush()
        self._inbox = self._outbox = self._goodness_in = self._goodness_out = None

    # -- prediction

    def scores(
        self,
        sizes: Sequence[int],
        given: Callable[[], Iterator[Tensor]],
        counted: Sequence[int],
    ) -> Iterator[Tensor]:
        """The sum of g over the layers ``counted`` of inputs under every label, (B, C) each; on the last stage only.

        Args:
            sizes: inputs of each part. given: the parts x (B, K) or (B, C, H, W), called on the first stage only.
        """
        classes, links = self.num_classes, self.links
        if not self.first:
            shapes = ([*self._message(n * classes), ((n * classes,), self.acc)] for n in sizes)
            inbox = Inbox(shapes, self.device, group=links.pipe, group_src=links.place - 1)
        else:
            parts = given()
        outbox = None if self.last else Outbox(self.device, group=links.pipe, group_dst=links.place + 1)
        for n in sizes:
            if self.first:
                x, score, pairs = self._under_labels(next(parts))
                sqnorm, head = None, []
            else:
                x, sqnorm, *head, score = inbox.take()
                pairs = None
            for span, layer in self.layers:
                options = layer.forward_options()
                before = x, sqnorm
                if pairs is not None:
                    labels: dict[str, Any] = {"num_classes": classes, "strength": self.strength}
                    x, total = label_ops.ff_label_forward(x, pairs, layer.weight, layer.bias, **labels, **options)
                    pairs = None
                else:
                    x, total = ops.ff_forward(x, layer.weight, layer.bias, x_sqnorm=sqnorm, **options)
                if span.head:
                    assert outbox is not None
                    q = before[0].to(self.acc).square().sum(1) if before[1] is None else before[1]
                    outbox.put(before[0], q, x, total, score)
                    break
                if head:
                    x, total, head = torch.cat([head[0], x], 1), head[1] + total, []
                if span.index in counted:
                    score = score + total / self.divisor(span, layer)
                sqnorm = total
            else:
                if outbox is not None:
                    assert sqnorm is not None
                    outbox.put(x, sqnorm, score)
                else:
                    yield score.view(n, classes)
        if outbox is not None:
            outbox.flush()

    def _under_labels(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows or inputs for the first layer, their score of 0, and the labels (B, C) if the layer is to write them."""
        labels = torch.arange(self.num_classes, device=x.device).expand(len(x), -1)
        score = torch.zeros(labels.numel(), dtype=self.acc, device=x.device)
        if x.dim() == 4 and x.shape[1] > 1:
            images = x.repeat_interleave(self.num_classes, dim=0)
            return overlay(images, labels.flatten(), self.num_classes, self.strength).flatten(1), score, None
        return x.flatten(1), score, labels
