"""One step of fit: neutral pass, head, selection, negatives, then the layers' step, fused where the loss allows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import network, ops
from .batches import Draws
from .dropout import dropout
from .hybrid import ImageNegatives
from .layer import FFLinear, signs
from .loss import Logistic, Loss, evaluate
from .negatives import Negatives
from .nn import FFNet, NetStep
from .selection import Selection


class Stage:
    """What one epoch trains: all layers at once, or one layer on what the frozen ones below it give.

    Args:
        only: the index of that layer; None: all.
        optimizer: of torch.optim, instead of the layers' fused ones.
        losses: one for each layer of the net; None: the logistic loss of the fused step.
        epochs: how long it lasts. with_head: whether the net's head is trained beside the layers. measured: whether
            the net's error means anything meanwhile.
        selection: which inputs of a minibatch the layers learn from, chosen by the head; None: all.
    """

    copies = 2  # rows that are trained on for each input

    def __init__(
        self,
        net: FFNet,
        only: int | None,
        optimizer: torch.optim.Optimizer | None,
        negatives: Negatives | ImageNegatives,
        losses: Sequence[Loss] | None,
        *,
        epochs: int,
        with_head: bool,
        measured: bool,
        selection: Selection | None = None,
    ) -> None:
        self.net, self.only, self.optimizer = net, only, optimizer
        self.images = negatives.images if isinstance(negatives, ImageNegatives) else None
        self.wrong_labels = None if isinstance(negatives, ImageNegatives) else negatives
        self.selection = selection
        self.epochs, self.with_head, self.measured = epochs, with_head, measured
        self.first_epoch = (only or 0) * epochs + 1
        self.trained = range(len(net)) if only is None else range(only, only + 1)
        self.layers = [net.stack[i] for i in self.trained]
        self.below = net[: self.trained.start] if self.trained.start else None
        self.from_input = net if only is None else net[: self.trained.stop]
        self._kept: tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]] | None = None  # see _climb
        self.has_dropout = any(layer.dropout for layer in self.layers)
        self.fused = optimizer is None and losses is None
        chosen = [Logistic(layer.threshold, layer.temperature) for layer in net.stack] if losses is None else losses
        self.losses = [chosen[i] for i in self.trained]

    def step(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B,)
        draws: Draws,
        wrong: Tensor | None = None,  # (B,)
    ) -> tuple[NetStep, Tensor | None]:
        """Train on one minibatch. ``wrong``: the negatives' labels, where they are not drawn here.

        Returns:
            What the trained layers' step gave, and the head's loss ().
        """
        logits = head_loss = None
        head = self.net.head if self.with_head else None
        if head is not None:
            logits, head_loss = head.step(*self.net.neutral_pass(x), labels)
            if self.selection is not None:
                rows = self.selection(labels, draws["selection"], logits)
                x, labels, logits = (t.index_select(0, rows) for t in (x, labels, logits))
                wrong = None if wrong is None else wrong[rows]
        seed = None
        if self.has_dropout:
            seed = torch.randint(2**62, (1,), generator=draws["dropout"]).to(x.device)
        if self.images is not None:
            return self._images(x, self.images(x, draws["negatives"]), seed), head_loss
        fixed = wrong is not None
        if wrong is None:
            assert self.wrong_labels is not None
            wrong = self.wrong_labels(labels, self.net.num_classes or 0, draws["negatives"], logits)
        if self.fused and self.below is None:
            options = {} if seed is None else {"dropout_seed": seed}
            return self.from_input.label_step(x, labels, wrong, **options), head_loss
        up, down = (wrong, labels) if self.net.minimize else (labels, wrong)
        return self._labelled(x, up, down, seed, keep=fixed), head_loss

    def _images(
        self,
        x_pos: Tensor,  # (B, K) or (B, C, H, W)
        x_neg: Tensor,  # likewise
        seed: Tensor | None,
    ) -> NetStep:
        """Positives and negatives as they are, without labels."""
        up, down = (x_neg, x_pos) if self.net.minimize else (x_pos, x_neg)
        y, sqnorm = torch.cat([up, down]).flatten(1), None
        if self.below is not None:
            y, totals = self.below.climb(y)
            sqnorm = totals[-1]
        return self._update_layers(y, sqnorm, seed)

    def _update_layers(
        self,
        y: Tensor,  # (2 B, K): the rows that are to rise, then those that are to fall
        sqnorm: Tensor | None,  # (2 B,)
        seed: Tensor | None,
    ) -> NetStep:
        up = len(y) // 2
        step = self._fused if self.fused else self._layer_by_layer
        g, loss = step(y, sqnorm, signs(up, up, y), seed)
        return NetStep(g[:, up:], g[:, :up], loss) if self.net.minimize else NetStep(g[:, :up], g[:, up:], loss)

    def _fused(
        self, y: Tensor, sqnorm: Tensor | None, sign: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # g (trained layers, M), loss (trained layers,)
        """The trained layers on the rows that enter the first of them."""
        y, sqnorm = _drop(self.layers[0], self.trained.start, y, sqnorm, seed)
        records = [layer.as_layer() for layer in self.layers]
        records[0] = dataclasses.replace(records[0], dropout=0.0)
        totals, loss = network.ff_network_step_(y, sign, records, x_sqnorm=sqnorm, dropout_seed=seed)
        return torch.stack([total / layer.divisor for total, layer in zip(totals, self.layers, strict=True)]), loss

    def _labelled(self, x: Tensor, up: Tensor, down: Tensor, seed: Tensor | None, *, keep: bool) -> NetStep:
        """The trained layers on x under two labels, where label_step does not do it all; ``keep``: as for `_climb`."""
        sqnorm = None
        if self.below is None:
            y = torch.cat([self.net.overlay(x, each) for each in (up, down)]).flatten(1)
        else:
            y, sqnorm = self._climb(self.below, x, up, down, keep=keep)
        return self._update_layers(y, sqnorm, seed)

    def _climb(
        self, below: FFNet, x: Tensor, up: Tensor, down: Tensor, *, keep: bool
    ) -> tuple[Tensor, Tensor]:  # (2 B, K), (2 B,): the rows of all images under the first label, then the others
        """What the frozen layers give for x under two labels, and its squared norm.

        ``keep``: remember it, for as long as the very same tensors come again.
        """
        if self._kept is not None and all(a is b for a, b in zip(self._kept[0], (x, up, down), strict=True)):
            return self._kept[1]
        self._kept = None
        y, totals = below.climb_labels(x, torch.stack([up, down], 1))
        result = _halves(y), _halves(totals[-1])
        if keep:
            self._kept = (x, up, down), result
        return result

    @torch.no_grad()
    def _layer_by_layer(
        self, y: Tensor, sqnorm: Tensor | None, sign: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor]:  # as _fused
        """Any loss, any optimizer. The gradients of one of torch.optim's are written where it looks for them."""
        gs, losses, updates = [], [], []
        for i, layer, loss_of in zip(self.trained, self.layers, self.losses, strict=True):
            inputs, sqnorm = _drop(layer, i, y, sqnorm, seed)
            y, total, p = ops.ff_forward(
                inputs, layer.weight, layer.bias, x_sqnorm=sqnorm, return_p=True, **layer.forward_options()
            )
            gs.append(total / layer.divisor)
            loss, coef = evaluate(loss_of, gs[-1], sign)
            losses.append(loss)
            updates.append((layer, inputs, sqnorm, y, p, coef / layer.divisor))
            sqnorm = total
        if self.optimizer is not None:
            self.optimizer.zero_grad()  # in greedy training, of the layers that were trained before
        for update in updates:  # once every loss is there: a loss that fails has changed nothing
            self._update(sign, *update)
        if self.optimizer is not None:
            self.optimizer.step()
        return torch.stack(gs), torch.stack(losses)

    def _update(
        self, sign: Tensor, layer: FFLinear, x: Tensor, sqnorm: Tensor | None, y: Tensor, p: Tensor, coef: Tensor
    ) -> None:
        options: dict[str, Any] = {**layer.forward_options(), **layer.peer_options(sign)}
        layer.watch_peers(y, sign)
        if self.optimizer is None:
            ops.ff_update_(
                x, p, coef, layer.weight, layer.bias, layer.state, layer.optimizer, x_sqnorm=sqnorm, **options
            )
            return
        layer.weight.grad, grad_bias = ops.ff_grad(x, p, coef, layer.weight, layer.bias, x_sqnorm=sqnorm, **options)
        if layer.bias is not None:
            layer.bias.grad = grad_bias


class HeadStage:
    """Epochs in which the net's head alone is trained, on frozen layers."""

    copies, with_head, measured = 1, True, True

    def __init__(self, net: FFNet, epochs: int, *, first_epoch: int) -> None:
        self.net, self.epochs, self.first_epoch = net, epochs, first_epoch
        self.only = len(net)
        self.trained = range(len(net), len(net))

    def step(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B,)
        draws: Draws,
        wrong: Tensor | None = None,  # (B,), not used
    ) -> tuple[NetStep, Tensor | None]:  # as Stage.step
        assert self.net.head is not None
        _, loss = self.net.head.step(*self.net.neutral_pass(x), labels)
        nothing = loss.new_empty((0, len(x)))
        return NetStep(nothing, nothing, nothing[:, 0]), loss


def _drop(
    layer: FFLinear, index: int, x: Tensor, sqnorm: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The layer's input with its dropout, and its squared norm where that is still known."""
    return (dropout(x, layer.dropout, seed, index), None) if layer.dropout and seed is not None else (x, sqnorm)


def _halves(
    t: Tensor,  # (2 B, ...): the two rows of an image together
) -> Tensor:  # the first rows of all images, then the second ones
    return t.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
