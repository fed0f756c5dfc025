"""RecurrentFFNet: layers that see the layer below and the layer above, and settle over a few iterations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, ops
from .layer import FFLinear, signs
from .loss import logistic_loss
from .nn import FFNet, NetStep

EPS = 1e-4  # beside the root mean square of a layer's activity


class _Iteration(NamedTuple):
    """What happened in one iteration, for each layer."""

    inputs: list[Tensor]  # (M, K_l)
    y: list[Tensor]  # (M, N_l)
    p: list[Tensor]  # (M, N_l): y act'(z), as ff_update_ takes it
    totals: list[Tensor]  # (M,): G


class RecurrentFFNet(FFNet):
    """A Forward-Forward net with top-down connections (Hinton 2022, section 3.4): every layer's input is what the layer
    below and the layer above it gave in the iteration before; above the last layer stands the label.

    An image is shown for several iterations, in which all layers respond at the same time. A layer's state is
    ``damping`` of its former state and the rest of its new response. What a layer shows to its neighbours is its state
    with a root mean square of 1, as the image has it; the label is ``label_strength`` at its class. The states begin
    with one pass from the image upwards, with nothing above. In training the image is shown under its own label
    (positive) and under a wrong one (negative); the goodness that counts is of the responses, before damping.

    Args:
        layers: FFLinear modules, from the input on; layer l has in_features = width below + width above, the last
            one width below + num_classes. `from_sizes` makes them.
        num_classes: C. label_strength: the label's value, where its neighbours have a root mean square of 1.
        damping: the part of the former state that stays, in [0, 1).
        learned: the iterations, from 1 on, that training learns from; it stops after the last of them. Hinton ran 8.
        judged: the iterations whose goodness is averaged for prediction.
        options: minimize, head, predict_by, predict_layers, candidates, as for `FFNet`. A head sees the pass upwards.

    Raises:
        TypeError, ValueError: no layers, or widths that do not follow on one another; another option.
    """

    layered = False

    def __init__(
        self,
        layers: Iterable[FFLinear],
        *,
        num_classes: int,
        label_strength: float | None = 1.0,
        damping: float = 0.3,
        learned: Sequence[int] = range(1, 9),
        judged: Sequence[int] = (3, 4, 5),
        **options: Any,
    ) -> None:
        checks.count("num_classes", num_classes, 2, 2**31, "the label stands above the last layer")
        if label_strength is None:
            raise ValueError("label_strength must be a number: a RecurrentFFNet learns from labels")
        super().__init__(layers, num_classes=num_classes, label_strength=label_strength, **options)
        if any(layer.dropout for layer in self.stack):
            raise ValueError("dropout must be 0 in the layers of a RecurrentFFNet")
        check_dynamics(damping, learned, judged)
        self.damping, self.learned, self.judged = float(damping), tuple(learned), tuple(judged)

    @classmethod
    def from_sizes(
        cls,
        sizes: Sequence[int],
        *,
        num_classes: int | None = None,
        label_strength: float | None = 1.0,
        minimize: bool = False,
        damping: float = 0.3,
        learned: Sequence[int] = range(1, 9),
        judged: Sequence[int] = (3, 4, 5),
        **layer_options: Any,
    ) -> RecurrentFFNet:
        """A net of widths ``sizes`` (input first, at least two numbers); ``layer_options`` go to every FFLinear."""
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold the input's width and at least one layer's, got {list(sizes)}")
        if num_classes is None:
            raise ValueError("num_classes must be given: the label stands above the last layer")
        layers = [
            FFLinear(below + above, own, **layer_options)
            for below, own, above in zip(sizes, sizes[1:], (*sizes[2:], num_classes), strict=False)
        ]
        return cls(
            layers, num_classes=num_classes, label_strength=label_strength, minimize=minimize, damping=damping,
            learned=learned, judged=judged,
        )  # fmt: skip

    def _check_widths(self, members: list[FFLinear], num_classes: int | None) -> None:
        above = [layer.out_features for layer in members[1:]] + [num_classes or 0]
        for i, (layer, width) in enumerate(zip(members, above, strict=True)):
            if i:
                below = members[i - 1].out_features
                if layer.in_features != below + width:
                    raise ValueError(
                        f"layers[{i}] must take in_features = {below} + {width}, the widths below and above it, got "
                        f"{layer.in_features}"
                    )
            elif layer.in_features <= width:
                raise ValueError(
                    f"layers[0] must take in_features = inputs + {width}, the width above it, got {layer.in_features}"
                )

    def __getitem__(self, part: slice) -> FFNet:
        """The net itself for a slice of all layers; a part of them would not run by itself."""
        if not isinstance(part, slice) or len(self.stack[part]) != len(self):
            raise TypeError(f"RecurrentFFNet cannot be taken apart (its layers are net.layers[i]), got {part!r}")
        return self

    @property
    def inputs(self) -> int:
        """K: pixels of an image."""
        return self.stack[0].in_features - self._above(0)

    def _above(self, i: int) -> int:
        return self.stack[i + 1].out_features if i + 1 < len(self) else self._classes()

    # -- the dynamics

    def _image(self, x: Tensor) -> Tensor:  # (B, K), rms 1
        x = self._rows(x)
        if x.shape[1] != self.inputs:
            raise ValueError(f"x must have {self.inputs} inputs a row, got {x.shape[1]}")
        return _unit(x)

    def _bottom_up(
        self,
        image: Tensor,  # (B, K)
    ) -> tuple[list[Tensor], list[Tensor]]:  # states, each (B, N_l); their G, each (B,)
        """One pass upwards, with zeros in the place of what is above."""
        states: list[Tensor] = []
        totals = []
        for i, layer in enumerate(self.stack):
            below = image if i == 0 else _unit(states[-1])
            x = torch.cat([below, below.new_zeros(len(below), self._above(i))], 1)
            y, total = ops.ff_forward(x, layer.weight, layer.bias, **layer.forward_options())
            states.append(y)
            totals.append(total)
        return states, totals

    def _settle(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B, C)
        iterations: int,
    ) -> Iterator[_Iteration]:
        """Show each input under each of its labels; rows (B C), those of one input together."""
        checks.inputs("x", x)
        checks.labels("labels", labels, x, dims=2)
        checks.label_values("labels", labels, self._classes())
        image, copies = self._image(x), labels.shape[1]
        states = [y.repeat_interleave(copies, 0) for y in self._bottom_up(image)[0]]
        image = image.repeat_interleave(copies, 0)
        label = image.new_zeros(len(image), self._classes())
        label.scatter_(1, labels.flatten()[:, None].long(), self._strength())
        for _ in range(iterations):
            shown = [image, *map(_unit, states), label]  # every layer reads its two neighbours
            now = _Iteration([], [], [], [])
            for i, layer in enumerate(self.stack):
                own = torch.cat([shown[i], shown[i + 2]], 1)
                y, total, p = ops.ff_forward(own, layer.weight, layer.bias, return_p=True, **layer.forward_options())
                states[i] = self.damping * states[i] + (1 - self.damping) * y
                for kept, value in zip(now, (own, y, p, total), strict=True):
                    kept.append(value)
            yield now

    # -- inference

    def label_goodness(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor | None = None,  # (B, C)
    ) -> Tensor:  # (L, B, C)
        """g of every layer under each candidate label, the mean over the ``judged`` iterations; None: all labels."""
        labels = self._candidates(x, labels)
        totals = [now.totals for now in self._settle(x, labels, max(self.judged))]
        g = torch.stack([self._g(torch.stack(totals[t - 1])) for t in self.judged]).mean(0)
        return g.reshape(len(self), *labels.shape)

    def neutral_pass(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
    ) -> tuple[list[Tensor], list[Tensor]]:  # y (B, N_l) and G (B,) of every layer
        """The pass upwards, with nothing above: it has no label."""
        return self._bottom_up(self._image(x))

    def forward(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
    ) -> Tensor:  # (B, N_L)
        """y of the last layer in the pass upwards, with nothing above."""
        return self.neutral_pass(x)[0][-1]

    def goodness(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
    ) -> Tensor:  # (L, B)
        """g of every layer in the pass upwards, with nothing above."""
        return self._g(torch.stack(self.neutral_pass(x)[1]))

    # -- training

    def step(self, x_pos: Tensor, x_neg: Tensor, *, dropout_seed: Tensor | None = None) -> NetStep:
        raise TypeError("RecurrentFFNet has its label above the last layer, not in its input: call label_step")

    def label_step(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels_pos: Tensor,  # (B,)
        labels_neg: Tensor,  # (B,)
        *,
        dropout_seed: Tensor | None = None,
    ) -> NetStep:
        """A step of every layer on x under its true labels (positive) and under wrong ones (negative).

        Every layer makes one update, for the mean of its losses in the ``learned`` iterations, after the last of them.
        The goodness returned is the mean over them, too.
        """
        checks.inputs("x", x)
        checks.labels("labels_pos", labels_pos, x, dims=1)
        checks.labels("labels_neg", labels_neg, x, dims=1)
        shown = self._settle(x, torch.stack([labels_pos, labels_neg], 1), max(self.learned))
        kept = [now for t, now in enumerate(shown, 1) if t in self.learned]
        sign = signs(len(x), len(x), x).view(2, -1).T.repeat(len(kept), 1).flatten()  # an input's two rows together
        if self.minimize:
            sign = -sign
        losses, means = [], []
        for i, layer in enumerate(self.stack):
            total = torch.cat([now.totals[i] for now in kept])
            loss, coef = logistic_loss(
                total, sign, divisor=layer.divisor, threshold=layer.threshold, temperature=layer.temperature
            )
            inputs, y, p = (torch.cat([getattr(now, name)[i] for now in kept]) for name in ("inputs", "y", "p"))
            ops.ff_update_(
                inputs, p, coef, layer.weight, layer.bias, layer.state, layer.optimizer, **layer.peer_options(sign),
                **layer.forward_options(),
            )  # fmt: skip
            layer.watch_peers(y, sign)
            losses.append(loss)
            means.append(total.view(len(kept), -1).mean(0))
        g = self._g(torch.stack(means))
        return NetStep(g[:, 0::2], g[:, 1::2], torch.stack(losses))


def check_dynamics(damping: object, learned: Sequence[int], judged: Sequence[int]) -> None:
    """What RecurrentFFNet asks of these arguments."""
    checks.number("damping", damping, 0.0)
    if damping >= 1.0:  # type: ignore[operator]  # number() has seen to it
        raise ValueError(f"damping must be in [0, 1), got {damping!r}")
    for name, iterations in (("learned", learned), ("judged", judged)):
        for i, iteration in enumerate(iterations):
            checks.count(f"{name}[{i}]", iteration, 1, 2**31, "an iteration, from 1 on")
        if not iterations or len(set(iterations)) != len(iterations):
            raise ValueError(f"{name} must hold at least one iteration, each once, got {list(iterations)}")


def _unit(
    x: Tensor,  # (M, N)
) -> Tensor:  # (M, N)
    """Rows with a root mean square of 1."""
    return x / (x.square().mean(1, keepdim=True).sqrt() + EPS)
