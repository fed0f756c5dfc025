"""A network that several processes train together: what DataParallelFF and PipelineFF share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .. import checks
from ..checkpoint import bytes_of
from ..nn import FFLinear, FFNet
from ..training import Record
from .data import shares
from .group import RankError, agreement, message_limit, watch
from .layout import Span
from .stage import Links, Micro, Rows, Stage

COMPRESSION = ("none", "bf16")
UPDATES = ("batch", "microbatch")
# options of FFNet.fit
ALONE = ("head_epochs", "optimizer", "loss", "negatives", "selection", "augment", "constraint", "spool_dir", "device")


class ParallelStep(NamedTuple):
    """What a step returns on every rank: means over the global batch, from before the update."""

    loss: Tensor  # (L,)
    goodness_pos: Tensor  # (L,): g
    goodness_neg: Tensor  # (L,): g


class ParallelModel:
    """What DataParallelFF and PipelineFF share.

    Attributes:
        net: the net that was given; the layers that this rank holds are trained in place, unless they are cut.
        group: the process group of all its ranks.
    """

    def __init__(
        self,
        net: FFNet,
        group: Any,
        links: Links,
        stages: list[list[Span]],
        *,
        micro_batches: int,
        update: str,
        compress: str,
        check_every: int,
    ) -> None:
        with agreement(group) as same:
            for what, found in {
                "a softmax head": net.head is not None,
                "an average of its weights": net.average is not None,
                "dropout": any(layer.dropout for layer in net.stack),
                "minimize": net.minimize,
                "no label_strength": net.label_strength is None,
                "recurrent layers": not net.layered,
            }.items():
                if found:
                    raise ValueError(f"net must be a plain FFNet for several processes, it has {what}")
            checks.count("micro_batches", micro_batches, 1, 2**31, "parts of a minibatch")
            checks.option("update", update, UPDATES)
            checks.option("compress", compress, COMPRESSION)
            checks.count("check_every", check_every, 0, 2**31, "steps between two checks; 0: none")
            if update == "microbatch" and links.data is not None:
                raise ValueError("update 'microbatch' is for one pipeline; over several, make the minibatches smaller")
            same |= {"the number of layers": len(net), "num_classes": net.num_classes}
            same |= {f"layer {i + 1}": f"{la.extra_repr()}, {la.weight.dtype}" for i, la in enumerate(net.stack)}
            same |= {"label_strength": net.label_strength, "stages": stages, "micro_batches": micro_batches}
            same |= {"update": update, "compress": compress, "check_every": check_every}
        self.net, self.group, self.links, self.stages = net, group, links, stages
        self.micro_batches, self.update, self.compress, self.check_every = micro_batches, update, compress, check_every
        self.replicas = 1 if links.data is None else dist.get_world_size(links.data)
        self.replica = 0 if links.data is None else dist.get_rank(links.data)
        self.layers: list[tuple[Span, FFLinear]] = [(s, s.part(net.stack[s.index])) for s in stages[links.place]]
        # without other ranks to sum with, and where every micro-batch has its own update, a layer's step is one call
        self.direct = self.replicas == 1 and (update == "microbatch" or micro_batches == 1)
        self._steps = 0
        self._stage: Stage | None = None
        watch()
        if links.data is not None:
            with torch.no_grad():
                for t in self._tensors():
                    watch().run(dist.broadcast, t, group=links.data, group_src=0)

    @property
    def main(self) -> bool:
        """Whether this is the rank that reports: the first of all."""
        return self.links.place == 0 and self.replica == 0

    @property
    def device(self) -> torch.device:
        return self.layers[0][1].weight.device

    def _tensors(self) -> list[Tensor]:
        return [t for _, layer in self.layers for t in layer.state_dict().values()]

    def _over_all(self, t: Tensor) -> Tensor:
        """Sum ``t`` over all ranks, in place."""
        for group in (self.links.pipe, self.links.data):
            if group is not None:
                watch().run(dist.all_reduce, t, group=group)
        return t

    def _from_main(self, value: Any) -> Any:
        """The object that the first rank has."""
        box = [value]
        for group in (self.links.pipe, self.links.data):
            if group is not None:
                watch().run(dist.broadcast_object_list, box, group=group, group_src=0)
        return box[0]

    def anywhere(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        return bool(self._over_all(torch.tensor(float(here), device=self.device)))

    # -- training

    def stage(self, trained: range | None = None) -> Stage:
        """This rank's work where the layers ``trained`` (None: all) learn."""
        wanted = range(len(self.net)) if trained is None else trained
        if self._stage is None or self._stage.trained != wanted:
            self._stage = Stage(
                self.layers,
                len(self.net),
                self.links,
                num_classes=self.net.num_classes or 0,
                strength=self.net.label_strength or 0.0,
                direct=self.direct,
                compress=self.compress == "bf16",
                trained=wanted,
            )
        return self._stage

    def plan(self, positives: int, negatives: int, everyone: tuple[int, int], paired: bool) -> list[Micro]:
        """The micro-batches of a minibatch: rows of this rank's part, and of all (positive, negative)."""
        parts = list(zip(shares(positives, self.micro_batches), shares(negatives, self.micro_batches), strict=True))
        parts = [(p, n) for p, n in parts if p + n] or [(0, 0)]
        own, last = self.update == "microbatch", len(parts) - 1
        return [
            Micro(p, n, (p + n) / sum(everyone), p / everyone[0], own or i == last, paired)
            for i, (p, n) in enumerate(parts)
        ]

    def paired(self, images: bool, trained: range | None) -> bool:
        """Whether the two rows of a labelled input stand together: where the first layer shares products between both
        and has no fused step of its own here."""
        return not images and not (self.direct and (trained is None or trained.start == 0))

    def labelled(self, x: Tensor, labels: Tensor, negatives: Tensor, plan: Sequence[Micro]) -> Iterator[Rows]:
        """A minibatch's inputs, cut as planned, for the first stage."""
        sizes = [m.positives for m in plan]
        pairs = torch.stack([labels, negatives], 1)
        for part, own in zip(x.split(sizes), pairs.split(sizes), strict=True):
            if part.dim() == 4 and part.shape[1] > 1:  # the label stands in every channel
                yield Rows(torch.cat([self.net.overlay(part, own[:, i]) for i in (0, 1)]).flatten(1))
            else:
                yield Rows(part.flatten(1), own)

    def step(self, x_pos: Tensor | None = None, x_neg: Tensor | None = None) -> ParallelStep:
        """One training step on the rows that all ranks give together, as `FFNet.step` on all of them.

        Args:
            x_pos, x_neg: (M_pos, K) and (M_neg, K), this rank's part, of any size; given on the first stage of a
                pipeline only.

        Raises:
            TypeError, ValueError: a wrong argument here, before anything has changed.
            RankError: another rank died, hangs, failed or had a wrong argument.
        """
        own, everyone = self._counts(x_pos, x_neg)
        with watch().guard():
            stage = self.stage()
            plan = self.plan(own[0], own[1], (everyone[0], everyone[1]), False)
            stage.sums.zero_()
            stage.begin(plan)
            for micro, given in zip(plan, self._cut(x_pos, x_neg, plan), strict=True):
                stage.feed(micro, given)
            stage.end()
            self.count_step()
            loss, pos, neg = self._over_all(stage.sums.clone()).to(stage.acc)
            return ParallelStep(loss / sum(everyone), pos / everyone[0], neg / everyone[1])

    def _counts(self, x_pos: Tensor | None, x_neg: Tensor | None) -> tuple[list[int], list[int]]:
        """Positive and negative rows of this replica, and of all."""
        own, error = [0, 0, 0], None  # positive rows, negative rows, wrong arguments
        if self.links.place == 0:
            try:
                own = [*self._rows(x_pos, x_neg), 0]
            except (TypeError, ValueError) as caught:
                own, error = [0, 0, 1], caught
        counts = torch.tensor(own)
        if self.links.pipe is not None:
            watch().run(dist.broadcast, counts, group=self.links.pipe, group_src=0)
        everyone = counts.clone()
        if self.links.data is not None:
            watch().run(dist.all_reduce, everyone, group=self.links.data)
        positives, negatives, wrong = everyone.tolist()
        if wrong:
            with agreement(self.group):  # tells the others
                if error is not None:
                    raise error
        if not positives or not negatives:
            raise ValueError(
                f"x_pos and x_neg must have at least one row on some rank, got {[positives, negatives]} in all"
            )
        return counts[:2].tolist(), [positives, negatives]

    def _rows(self, x_pos: Tensor | None, x_neg: Tensor | None) -> tuple[int, int]:
        """How many positive and negative rows the first stage was given, after a look at them."""
        if x_pos is None or x_neg is None:
            raise ValueError("x_pos and x_neg must be given on the first stage of a pipeline, got None")
        weight = self.layers[0][1].weight
        for name, x in (("x_pos", x_pos), ("x_neg", x_neg)):
            checks.matrix(name, x)
            checks.like(name, x, (len(x), weight.shape[1]), "(M, K)", weight.dtype, weight.device)
        return len(x_pos), len(x_neg)

    def _cut(self, x_pos: Tensor | None, x_neg: Tensor | None, plan: Sequence[Micro]) -> Iterator[Rows | None]:
        if x_pos is None or x_neg is None or self.links.place:
            yield from [None] * len(plan)
            return
        parts = (x.split([getattr(m, n) for m in plan]) for x, n in ((x_pos, "positives"), (x_neg, "negatives")))
        for pos, neg in zip(*parts, strict=True):
            yield Rows(torch.cat([pos, neg]))

    def count_step(self) -> None:
        """Count a minibatch, and look whether all ranks still agree where ``check_every`` asks for it."""
        self._steps += 1
        if self.check_every and self._steps % self.check_every == 0:
            self.check()

    def check(self) -> None:
        """Compare the weights and optimizer state of the ranks that should have the same ones, bit by bit.

        Raises:
            RankError: they differ; names the ranks.
        """
        if self._stage is not None:
            self._stage.synchronize()
        if self.links.data is None:
            return
        digest = hashlib.blake2b(digest_size=16)
        for t in self._tensors():
            held = t.detach().cpu().contiguous()
            digest.update(bytes_of(held))
        found: list[Any] = [None] * self.replicas
        watch().run(dist.all_gather_object, found, digest.hexdigest(), group=self.links.data)
        usual = max(set(found), key=found.count)
        ranks = dist.get_process_group_ranks(self.links.data)
        wrong = tuple(rank for rank, other in zip(ranks, found, strict=True) if other != usual)
        if wrong:
            raise RankError(f"after step {self._steps} other weights than the rest are on ranks {list(wrong)}", wrong)

    def fit(self, data: Any, labels: Tensor | None = None, **options: Any) -> list[Record]:
        """Train on labelled inputs; see `ffkernels.distributed.fit.fit` for the options and what it returns.

        Raises:
            TypeError: an option that `FFNet.fit` has and several processes have not.
        """
        from .fit import fit

        for name in ALONE:
            if options.get(name) is not None:
                raise TypeError(
                    f"{name} is for FFNet.fit in one process; several have the logistic loss of the layers, "
                    f"their fused optimizers and uniformly drawn wrong labels"
                )
        return fit(self, data, labels, **options)

    # -- prediction

    def predict(
        self,
        x: Tensor,  # (B, K) or (B, C, H, W)
        *,
        layers: Sequence[int] | None = None,
        batch_size: int = 1024,
    ) -> Tensor:  # (B,) int64
        """`FFNet.predict` on every rank, each given the same x; the ranks share the work."""
        with agreement(self.group) as same:
            checks.inputs("x", x)
            checks.count("batch_size", batch_size, 1, 2**31, "inputs at a time")
            same |= {"rows of x": len(x), "batch_size": batch_size, "layers": layers and list(layers)}
        count, default = len(self.net), self.net.predict_layers
        chosen = [i % count for i in (layers if layers is not None else default or range(count))]
        with watch().guard():
            sizes = shares(len(x), self.replicas)
            part = x.split(sizes)[self.replica] if len(x) else x
            chunks = [c for c in part.split(batch_size) if len(c)]
            weight = self.layers[0][1].weight

            def given() -> Iterator[Tensor]:
                return (c.to(weight.device, weight.dtype) for c in chunks)

            own = [s.argmax(1) for s in self.stage().scores([len(c) for c in chunks], given, chosen)]
            predicted = torch.zeros(len(x), dtype=torch.int64, device=self.device)
            if own:
                start = sum(sizes[: self.replica])
                predicted[start : start + len(part)] = torch.cat(own)
            return self._over_all(predicted)

    # -- weights

    def state_dict(self) -> dict[str, Tensor]:
        """The entries of the net's state_dict that this rank holds, whole layers only.

        Collective over a pipeline: of a layer that is cut between two stages, the one with its last columns has all.
        """
        if self._stage is not None:
            self._stage.synchronize()
        found: dict[str, Tensor] = {}
        for span, layer in self.layers:
            for name, t in layer.state_dict().items():
                if span.head:
                    if t.dim():
                        self._settle(dist.isend, t.contiguous(), group_dst=self.links.place + 1)
                    continue
                if span.tail and t.dim():
                    head = t.new_empty((span.first, *t.shape[1:]))
                    self._settle(dist.irecv, head, group_src=self.links.place - 1)
                    t = torch.cat([head, t])
                found[f"layers.{span.index}.{name}"] = t
        return found

    def _settle(self, start: Callable[..., Any], t: Tensor, **other: int) -> None:
        """Send or receive a tensor in the pipeline, and wait until that is done."""
        pipe = self.links.pipe
        watch().wait(watch().run(start, t, group=pipe, **other), message_limit(pipe, t.device))

    def full_state_dict(self) -> dict[str, Tensor]:
        """The whole net's state_dict, on the CPU, on every rank: `FFNet.load_state_dict` takes it. Collective."""
        own = {name: t.cpu() for name, t in self.state_dict().items()}
        if self.links.pipe is None:
            return own
        parts: list[Any] = [None] * self.links.places
        watch().run(dist.all_gather_object, parts, own, group=self.links.pipe)
        return {name: t for part in parts for name, t in part.items()}

    def wanted_state(self) -> dict[str, Tensor]:
        """Tensors to load a state_dict into, for `load_state_dict`: of the layers of which this rank holds a part."""
        return {
            f"layers.{span.index}.{name}": t if span.whole else torch.empty((span.total, *t.shape[1:])[: t.dim()]).to(t)
            for span, layer in self.layers
            for name, t in layer.state_dict().items()
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take this rank's layers from a state_dict of the net, which may hold others too."""
        for span, layer in self.layers:
            prefix = f"layers.{span.index}."
            own = {name: state[prefix + name] for name in layer.state_dict()}
            layer.load_state_dict({name: t if span.whole else span.of(t) for name, t in own.items()})
