"""One training step of fit: neutral pass and head, negatives, then the layers' step, fused where the loss allows it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .batches import Draws
from .dropout import dropout
from .labels import overlay
from .loss import Logistic, Loss
from .negatives import Negatives
from .nn import FFLinear, FFNet, signs
from .peer import new_mean, terms


class Stage:
    """What one epoch trains: all layers at once, or one layer on what the frozen ones below it give.

    Args:
        only: the index of that layer; None: all.
        optimizer: of torch.optim, instead of the layers' fused ones.
        losses: one for each layer of the net; None: the logistic loss of the fused step.
    """

    def __init__(
        self,
        net: FFNet,
        only: int | None,
        optimizer: torch.optim.Optimizer | None,
        negatives: Negatives,
        losses: Sequence[Loss] | None,
    ) -> None:
        self.net, self.only, self.optimizer, self.negatives = net, only, optimizer, negatives
        self.trained = range(len(net)) if only is None else range(only, only + 1)
        self.layers = [net.stack[i] for i in self.trained]
        self.below = net[: self.trained.start] if self.trained.start else None
        self.from_input = net if only is None else net[: self.trained.stop]
        self.has_dropout = any(layer.dropout for layer in self.layers)
        self.fused = optimizer is None and losses is None
        chosen = [Logistic(layer.threshold, layer.temperature) for layer in net.stack] if losses is None else losses
        self.losses = [chosen[i] for i in self.trained]

    def step(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B,)
        draws: Draws,
    ) -> tuple[Tensor, Tensor | None]:
        """Train on one minibatch.

        Returns:
            (3, trained layers): loss, mean g of the positives, mean g of the negatives; and the head's loss ().
        """
        logits = head_loss = None
        if self.net.head is not None:
            logits, head_loss = self.net.head.step(*self.net.neutral_pass(x), labels)
        wrong = self.negatives(labels, self.net.num_classes or 0, draws["negatives"], logits)
        seed = None
        if self.has_dropout:
            seed = torch.randint(2**62, (1,), generator=draws["dropout"]).to(x.device)
        up, down = (wrong, labels) if self.net.minimize else (labels, wrong)
        if self.fused and self.below is None:
            options = {} if seed is None else {"dropout_seed": seed}
            g_pos, g_neg, loss = self.from_input.label_step(x, labels, wrong, **options)
            return torch.stack([loss, g_pos.mean(1), g_neg.mean(1)]), head_loss
        step = self._fused_above if self.fused else self._layer_by_layer
        g_up, g_down, loss = step(x, up, down, seed)
        g_pos, g_neg = (g_down, g_up) if self.net.minimize else (g_up, g_down)
        return torch.stack([loss, g_pos.mean(1), g_neg.mean(1)]), head_loss

    def _fused_above(
        self, x: Tensor, up: Tensor, down: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # g (1, B) of the rows that are to rise and to fall, loss (1,)
        """One layer on the output of the frozen ones."""
        assert self.below is not None
        y, totals = self.below.climb_labels(x, torch.stack([up, down], 1))
        sign = signs(len(x), len(x), y).view(2, -1).T.flatten()  # the two rows of an image stand together
        layer = self.layers[0]
        y, sqnorm = _drop(layer, self.trained.start, y, totals[-1], seed)
        record = dataclasses.replace(layer.as_layer(), dropout=0.0)
        total, loss = ops.ff_network_step_(y, sign, [record], x_sqnorm=sqnorm)
        g = total / layer.divisor
        return g[:, 0::2], g[:, 1::2], loss

    @torch.no_grad()
    def _layer_by_layer(
        self, x: Tensor, up: Tensor, down: Tensor, seed: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:  # as _fused_above, with all trained layers
        """Any loss, any optimizer. The gradients of one of torch.optim's are written where it looks for them."""
        sqnorm = None
        if self.below is None:
            both = [overlay(x, each, self.net.num_classes or 0, self.net.label_strength) for each in (up, down)]
            y = torch.cat(both).flatten(1)
        else:
            y, totals = self.below.climb_labels(x, torch.stack([up, down], 1))
            y, sqnorm = _halves(y), _halves(totals[-1])
        sign = signs(len(x), len(x), y)
        gs, losses, updates = [], [], []
        for i, layer, loss_of in zip(self.trained, self.layers, self.losses, strict=True):
            inputs, sqnorm = _drop(layer, i, y, sqnorm, seed)
            y, total, p = ops.ff_forward(
                inputs, layer.weight, layer.bias, x_sqnorm=sqnorm, return_p=True, **layer.forward_options()
            )
            gs.append(total / layer.divisor)
            loss, coef = loss_of(gs[-1], sign)
            losses.append(loss)
            updates.append((layer, inputs, sqnorm, y, p, coef / layer.divisor))
            sqnorm = total
        if self.optimizer is not None:
            self.optimizer.zero_grad()  # in greedy training, of the layers that were trained before
        for update in updates:  # once every loss is there: a loss that fails has changed nothing
            self._update(sign, *update)
        if self.optimizer is not None:
            self.optimizer.step()
        g = torch.stack(gs)
        return g[:, : len(x)], g[:, len(x) :], torch.stack(losses)

    def _update(
        self, sign: Tensor, layer: FFLinear, x: Tensor, sqnorm: Tensor | None, y: Tensor, p: Tensor, coef: Tensor
    ) -> None:
        options, mean = layer.forward_options(), layer.peer_mean
        if mean is not None:
            options["row_term"], options["col_term"] = terms(sign, mean, layer.peer, layer.divisor)
            mean.copy_(new_mean(mean, y, sign))
        if self.optimizer is None:
            ops.ff_update_(
                x, p, coef, layer.weight, layer.bias, layer.state, layer.optimizer, x_sqnorm=sqnorm, **options
            )
            return
        layer.weight.grad, grad_bias = ops.ff_grad(x, p, coef, layer.weight, layer.bias, x_sqnorm=sqnorm, **options)
        if layer.bias is not None:
            layer.bias.grad = grad_bias


def _drop(
    layer: FFLinear, index: int, x: Tensor, sqnorm: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The layer's input with its dropout, and its squared norm where that is still known."""
    return (dropout(x, layer.dropout, seed, index), None) if layer.dropout and seed is not None else (x, sqnorm)


def _halves(
    t: Tensor,  # (2 B, ...): the two rows of an image together
) -> Tensor:  # the first rows of all images, then the second ones
    return t.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
