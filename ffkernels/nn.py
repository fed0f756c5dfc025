"""FFNet, a sequence of Forward-Forward layers as a module: forward passes, prediction, and one step of training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import checks, label_ops, network, ops
from .dropout import dropout as drop
from .labels import neutral, overlay
from .layer import FFLinear, join

if TYPE_CHECKING:
    from .average import WeightAverage
    from .capture import CapturedStep
    from .head import SoftmaxHead
    from .training import Record

PREDICT = ("goodness", "head", "both")


class NetStep(NamedTuple):
    """What FFNet.step returns; goodness is from before the update."""

    goodness_pos: Tensor  # (L, M_pos): g
    goodness_neg: Tensor  # (L, M_neg): g
    loss: Tensor  # (L,)


class FFNet(nn.Module):
    """A sequence of FFLinear layers, each trained by its own goodness; classifies by goodness over candidate labels.

    Args:
        layers: FFLinear modules, from the input on.
        num_classes: C; needed by fit, predict and label_goodness, which write the label over the first C inputs.
        label_strength: the value written for the label, in the units of the input. None: no label is written; the net
            is then trained without labels (fit's ``negatives`` are images) and predicts by its head.
        minimize: train positive rows to a low goodness and negative rows to a high one (Hinton 2022, section 2, names
            both); predict then takes the label with the lowest. Peer normalisation acts on the rows that are to rise.
        head: a softmax on the layers' activities, trained by fit beside the layers; predict may use it.
        predict_by, predict_layers, candidates: what `predict` does where its arguments say nothing.

    Attributes:
        average: None, or a `WeightAverage` of this net, which fit then updates after every step and uses for the
            error that it measures. ``net.average.copy_to(net)`` makes it the net's weights.

    Inputs are flat (B, K) or images (B, C, H, W), which are flattened; a label is written over every channel of them.

    Raises:
        TypeError, ValueError: no layers, or widths that do not follow on one another; a head of another net.
    """

    layered = True  # each layer's input is the output of the one below, so that fit may train layer by layer

    def __init__(
        self,
        layers: Iterable[FFLinear],
        *,
        num_classes: int | None = None,
        label_strength: float | None = 1.0,
        minimize: bool = False,
        head: SoftmaxHead | None = None,
        predict_by: str = "goodness",
        predict_layers: Sequence[int] | None = None,
        candidates: int | None = None,
    ) -> None:
        super().__init__()
        members = list(layers)
        if not members:
            raise ValueError("layers must hold at least one FFLinear, got none")
        for i, layer in enumerate(members):
            if not isinstance(layer, FFLinear):
                raise TypeError(f"layers[{i}] must be an FFLinear, got {type(layer).__name__}")
        self._check_widths(members, num_classes)
        if num_classes is not None:
            checks.count("num_classes", num_classes, 2, members[0].in_features, "labels are written over the input")
        if label_strength is not None:
            checks.number("label_strength", label_strength)
        self.layers = nn.ModuleList(members)
        self.num_classes, self.minimize = num_classes, bool(minimize)
        self.label_strength = None if label_strength is None else float(label_strength)
        if head is not None:
            head.check_fits([layer.out_features for layer in members], num_classes)
        self.head = head
        self.average: WeightAverage | None = None
        self._check_predict(predict_by, predict_layers, candidates)
        self.predict_by, self.candidates = predict_by, candidates
        self.predict_layers = None if predict_layers is None else tuple(predict_layers)

    def _check_widths(self, members: list[FFLinear], num_classes: int | None) -> None:
        for i, (layer, before) in enumerate(zip(members[1:], members[:-1], strict=True), 1):
            if layer.in_features != before.out_features:
                raise ValueError(
                    f"layers[{i}] must take in_features = {before.out_features}, the width of the layer before it, got "
                    f"{layer.in_features}"
                )

    @classmethod
    def from_sizes(
        cls,
        sizes: Sequence[int],
        *,
        num_classes: int | None = None,
        label_strength: float | None = 1.0,
        **layer_options: Any,
    ) -> FFNet:
        """A net of widths ``sizes`` (input first, at least two numbers); ``layer_options`` go to every FFLinear."""
        if len(sizes) < 2:
            raise ValueError(f"sizes must hold the input's width and at least one layer's, got {list(sizes)}")
        layers = [FFLinear(k, n, **layer_options) for k, n in pairwise(sizes)]
        return cls(layers, num_classes=num_classes, label_strength=label_strength)

    @property
    def stack(self) -> list[FFLinear]:
        """The layers as a plain list."""
        return [*self.layers._modules.values()]  # type: ignore[list-item]  # __init__ has seen to it

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, part: slice) -> FFNet:
        """Consecutive layers as a net of their own: the same modules, not copies.

        Where the first layer is not among them, no label stands in the input and ``num_classes`` is None.
        """
        if not isinstance(part, slice):
            raise TypeError(f"FFNet takes slices (net[:2]; one layer is net.layers[0]), got {part!r}")
        layers = self.stack[part]
        classes = self.num_classes if layers and layers[0] is self.stack[0] else None
        return FFNet(layers, num_classes=classes, label_strength=self.label_strength, minimize=self.minimize)

    # -- inference

    def _rows(self, x: Tensor, name: str = "x") -> Tensor:  # (B, K)
        checks.inputs(name, x)
        return x.flatten(1) if x.dim() == 4 else x

    def _classes(self) -> int:
        if self.num_classes is None:
            raise ValueError("num_classes must be given to FFNet for labels to be written over the input, got None")
        return self.num_classes

    def _strength(self) -> float:
        if self.label_strength is None:
            raise ValueError("label_strength must be a number for labels to be written over the input, it is None")
        return self.label_strength

    def _candidates(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor | None,
    ) -> Tensor:  # (B, C)
        """The labels given; where none are, all of them for every input."""
        checks.inputs("x", x)
        return torch.arange(self._classes(), device=x.device).expand(len(x), -1) if labels is None else labels

    def overlay(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B,)
    ) -> Tensor:
        """x with the labels written over it, as the net reads them: `ffkernels.overlay`."""
        return overlay(x, labels, self._classes(), self._strength())

    def climb(
        self,
        rows: Tensor,  # (M, K)
    ) -> tuple[Tensor, list[Tensor]]:  # y (M, N_L) of the last layer; G of each layer
        """All layers' forward pass of rows as they are."""
        return self._climb(rows, None, 0)

    def _climb(
        self,
        y: Tensor,  # (M, K) of layers[first]
        sqnorm: Tensor | None,  # (M,): |y|^2 where it is known
        first: int,
    ) -> tuple[Tensor, list[Tensor]]:  # y of the last layer, G of the layers from first on
        totals = []
        for layer in self.stack[first:]:
            y, sqnorm = ops.ff_forward(y, layer.weight, layer.bias, x_sqnorm=sqnorm, **layer.forward_options())
            totals.append(sqnorm)
        return y, totals

    def climb_labels(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor,  # (B, C)
    ) -> tuple[Tensor, list[Tensor]]:  # y (B C, N_L) of the last layer, the rows of one input together; G of each layer
        """All layers' forward pass of each input under each of its labels."""
        checks.inputs("x", x)
        classes, first = self._classes(), self.stack[0]
        if x.dim() == 4 and x.shape[1] > 1:  # the label stands in every channel, not in the first columns alone
            checks.labels("labels", labels, x, dims=2)
            images = x.repeat_interleave(labels.shape[1], dim=0)
            rows = self.overlay(images, labels.flatten()).flatten(1)
            y, goodness = ops.ff_forward(rows, first.weight, first.bias, **first.forward_options())
        else:
            y, goodness = label_ops.ff_label_forward(
                self._rows(x), labels, first.weight, first.bias, num_classes=classes, strength=self._strength(),
                **first.forward_options(),
            )  # fmt: skip
        y, totals = self._climb(y, goodness, 1)
        return y, [goodness, *totals]

    def _g(
        self,
        totals: Tensor,  # (L, M) or (S, L, M): G of each layer
    ) -> Tensor:
        divisors = [layer.divisor for layer in self.stack]
        if len({*divisors}) == 1:
            return totals if divisors[0] == 1 else totals / divisors[0]
        return torch.stack([t / each for t, each in zip(totals.unbind(-2), divisors, strict=True)], -2)

    def forward(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
    ) -> Tensor:  # (B, N_L)
        """y of the last layer."""
        return self._climb(self._rows(x), None, 0)[0]

    def goodness(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
    ) -> Tensor:  # (L, B)
        """g of every layer for inputs taken as they are (a label, if any, is already in them)."""
        return self._g(torch.stack(self._climb(self._rows(x), None, 0)[1]))

    def label_goodness(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        labels: Tensor | None = None,  # (B, C)
    ) -> Tensor:  # (L, B, C)
        """g of every layer under each candidate label; None: all ``num_classes`` of them."""
        labels = self._candidates(x, labels)
        _, totals = self.climb_labels(x, labels)
        return self._g(torch.stack(totals)).reshape(len(self.layers), *labels.shape)

    def neutral_pass(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
    ) -> tuple[list[Tensor], list[Tensor]]:  # y (B, N_l) and G (B,) of every layer
        """All layers' forward pass under the neutral label, which is every label a little: what the head looks at.

        Of the input as it is where no labels are written over it.
        """
        checks.inputs("x", x)
        label: dict[str, Any] = {}
        if self.label_strength is not None:
            label = {"num_classes": self._classes(), "strength": self._strength()}
        if label and x.dim() == 4 and x.shape[1] > 1:  # it stands in every channel, not in the first columns alone
            x, label = neutral(x, **label), {}
        ys, totals = network.ff_network_forward(self._rows(x), self.stack, **label)
        return ys, [*totals.unbind()]

    def _check_predict(self, by: str, layers: Sequence[int] | None, candidates: int | None) -> list[int]:
        """The layers that count."""
        checks.option("predict_by", by, PREDICT)
        if self.head is None and (by != "goodness" or candidates is not None):
            raise ValueError(f"prediction by {by!r} with candidates {candidates!r} needs a net with a head")
        if candidates is not None:
            checks.count("candidates", candidates, 1, self._classes(), "labels that the head lets through")
        count = len(self.layers)
        chosen = list(range(count) if layers is None else layers if isinstance(layers, Iterable) else ())
        if not chosen or not all(isinstance(i, int) and -count <= i < count for i in chosen):
            raise ValueError(f"layers must hold indices of the {count} layers, got {layers!r}")
        return chosen

    def label_scores(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        *,
        layers: Sequence[int] | None = None,
        by: str | None = None,
        candidates: int | None = None,
    ) -> Tensor:  # (B, C) accumulation dtype
        """What `predict` takes the largest of; arguments as there. -inf for labels that the head did not let through.

        By "goodness" the sum over layers of g (-g if the net minimises it), by "head" its log-probabilities, by "both"
        the sum of these and of the log-probabilities mean_l g_l / T_l, normalised over the labels.
        """
        by = self.predict_by if by is None else by
        candidates = self.candidates if candidates is None else candidates
        chosen = self._check_predict(by, self.predict_layers if layers is None else layers, candidates)
        log_p = None
        if self.head is not None and (by != "goodness" or candidates is not None):
            log_p = self.head.logits(*self.neutral_pass(x)).log_softmax(1)
        if by == "head" and log_p is not None:
            return log_p
        labels = None
        if log_p is not None and candidates is not None:
            labels = log_p.topk(candidates, dim=1).indices
        g = self.label_goodness(x, labels)[chosen]
        if by == "both":
            g = g / (len(chosen) * g.new_tensor([self.stack[i].temperature for i in chosen])[:, None, None])
        scores = -g.sum(0) if self.minimize else g.sum(0)
        if by == "both" and log_p is not None:
            scores = scores.log_softmax(1) + (log_p if labels is None else log_p.gather(1, labels))
        if labels is None:
            return scores
        return scores.new_full((len(x), self._classes()), -torch.inf).scatter(1, labels, scores)

    def predict(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        *,
        layers: Sequence[int] | None = None,
        by: str | None = None,
        candidates: int | None = None,
        batch_size: int = 1024,
    ) -> Tensor:  # (B,) int64
        """The label with the best score: by goodness, accumulated over layers, by the softmax head, or by both.

        Both ways are Hinton's (2022, section 3.3). Arguments that are None take what the constructor was given.

        Args:
            layers: indices of the layers whose goodness counts; None: all.
            by: "goodness"; "head": one pass instead of one for each label; "both".
            candidates: measure the goodness of just so many labels, those that the head finds the most likely. The
                result is exactly that of all labels wherever the winner among all of them is let through.
            batch_size: inputs at a time (memory: batch_size * num_classes rows).
        """
        checks.inputs("x", x)
        checks.count("batch_size", batch_size, 1, 2**31, "inputs at a time")
        parts = [
            self.label_scores(part, layers=layers, by=by, candidates=candidates).argmax(1)
            for part in x.split(batch_size)
        ]
        return torch.cat(parts)

    # -- training

    def _dropout_seed(self, given: Tensor | None, minibatches: int = 1) -> Tensor | None:
        """A seed from torch's own generator where one is needed and none is given."""
        if given is not None or not any(layer.dropout for layer in self.stack):
            return given
        return torch.randint(2**62, (minibatches,), device=self.stack[0].weight.device)

    def step(
        self,
        x_pos: Tensor,  # (M_pos, K)
        x_neg: Tensor,  # (M_neg, K)
        *,
        dropout_seed: Tensor | None = None,  # (1,)
    ) -> NetStep:
        """One training step of all layers, each fed by what the layer below gave before its own update.

        dropout_seed: int64; None draws one from torch's generator where a layer has dropout.
        """
        x, sign = join(self._rows(x_pos, "x_pos"), self._rows(x_neg, "x_neg"))
        if self.minimize:
            sign = -sign
        seed, layers = self._dropout_seed(dropout_seed), [layer.as_layer() for layer in self.stack]
        if seed is not None and layers[0].dropout:  # a net cut out of a larger one
            x, layers[0] = drop(x, layers[0].dropout, seed, 0), replace(layers[0], dropout=0.0)
        totals, loss = network.ff_network_step_(x, sign, layers, dropout_seed=seed)
        g, m = self._g(totals), x_pos.shape[0]
        return NetStep(g[:, :m], g[:, m:], loss)

    def label_step(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W); (S, B, K) for S minibatches
        labels_pos: Tensor,  # (B,) or (S, B)
        labels_neg: Tensor,  # (B,) or (S, B)
        *,
        dropout_seed: Tensor | None = None,  # (1,) or (S,)
    ) -> NetStep:
        """`step` on x under its true labels (positive) and under wrong ones (negative).

        Several minibatches are as many steps, on "cuda" in one launch; the results then are (S, L, B) and (S, L).
        """
        several = isinstance(x, Tensor) and x.dim() == 3
        if not several:
            checks.inputs("x", x)
        classes = self._classes()
        if x.dim() == 4 and x.shape[1] > 1:
            pos, neg = (self.overlay(x, labels) for labels in (labels_pos, labels_neg))
            return self.step(pos, neg, dropout_seed=dropout_seed)
        up_down = (labels_neg, labels_pos) if self.minimize else (labels_pos, labels_neg)
        totals, loss = network.ff_network_step_(
            x if several else self._rows(x), None, self.stack, labels=up_down, num_classes=classes,
            strength=self._strength(), dropout_seed=self._dropout_seed(dropout_seed, len(x) if several else 1),
        )  # fmt: skip
        up, down = self._g(totals).chunk(2, -1)
        return NetStep(down, up, loss) if self.minimize else NetStep(up, down, loss)

    def capture(self, *inputs: Tensor) -> CapturedStep:
        """A training step on inputs like these as a CUDA graph: the host launches it at once, however many kernels run.

        Args:
            inputs: (x_pos, x_neg) captures `step`, (x, labels_pos, labels_neg) captures `label_step`. Their shapes and
                dtypes are those of every later call; their values do not matter and nothing is trained.

        Returns:
            A function of such inputs that returns what the step would; see `ffkernels.capture.CapturedStep`.

        Raises:
            TypeError, RuntimeError: wrong inputs, or inputs that are not on a GPU.
        """
        from .capture import CapturedStep

        return CapturedStep(self, inputs)

    def fit(self, data: Any, labels: Tensor | None = None, **options: Any) -> list[Record]:
        """Train on tensors or on a DataLoader; see `ffkernels.training.fit` for the options and what it returns."""
        from .training import fit  # training imports this module

        return fit(self, data, labels, **options)
