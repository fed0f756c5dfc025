"""DataParallelFF and PipelineFF: how the ranks share a network and its minibatches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .. import checks
from ..nn import FFNet
from .group import timeout_of
from .layout import Span, balanced, counted_costs, whole_layers
from .model import ParallelModel
from .stage import Links


class DataParallelFF(ParallelModel):
    """A net that every rank holds, each trained on its part of every minibatch, as one process would on all of it.

    A layer's gradient is all-reduced while the next layers run, and applied before the layer's next minibatch. Loss
    and goodness are means over the global minibatch; the ranks' parts may differ in size, or be empty.

    Args:
        net: the same on every rank; it is trained in place. The first rank's weights and state are taken by all.
        process_group: the ranks; None: all of them.
        compress: "bf16" halves what is sent, at 8 bits of precision; "none".
        check_every: compare all ranks' weights bit by bit every so many steps; 0: never.

    Raises:
        RankError: from any method, where another rank died, hangs or failed.
    """

    def __init__(self, net: FFNet, process_group: Any = None, *, compress: str = "none", check_every: int = 0) -> None:
        group = _group(process_group)
        links = Links(data=group if dist.get_world_size(group) > 1 else None)
        stages = [[Span(i, 0, layer.out_features, layer.out_features) for i, layer in enumerate(net.stack)]]
        super().__init__(
            net, group, links, stages, micro_batches=1, update="batch", compress=compress, check_every=check_every
        )


class PipelineFF(ParallelModel):
    """Consecutive layers on consecutive ranks: minibatches stream through them, with no bubble after the first ones.

    Nothing flows back, so a stage trains on the next minibatch while the stages above still train on the one before,
    and every layer sees the same minibatches in the same order as in one process.

    Args:
        net: the whole net, the same on every rank (built on the CPU where it is larger than a device).
        stages: layers of each stage; or "auto": the division with the least counted cost of its slowest stage, which
            may cut a layer between two stages (its first columns on one, the rest on the next).
        process_group: the ranks, in the order of the stages; None: all of them.
        mesh: instead of a group, a device mesh with dimensions named "data" and "pipeline": each of its pipelines
            trains on its part of every minibatch, and gradients are all-reduced over "data".
        micro_batches: parts in which a minibatch goes through the pipeline; 1: as a whole, and several minibatches are
            under way.
        update: "batch": the weights change once a minibatch; "microbatch": with every part of it, as in one process
            with minibatches of that size.
        rows: positive and negative rows of a minibatch, for the counted cost.
        device: of this rank's layers; None: where they are.
        compress, check_every: as for DataParallelFF, over "data".

    Raises:
        RankError: from any method, where another rank died, hangs or failed.
    """

    def __init__(
        self,
        net: FFNet,
        stages: str | Sequence[int] = "auto",
        process_group: Any = None,
        *,
        mesh: DeviceMesh | None = None,
        micro_batches: int = 1,
        update: str = "batch",
        rows: int = 512,
        device: torch.device | str | None = None,
        compress: str = "none",
        check_every: int = 0,
    ) -> None:
        if mesh is not None:
            if process_group is not None:
                raise ValueError("process_group must be None with a mesh, which has its own groups")
            if set(mesh.mesh_dim_names or ()) != {"data", "pipeline"}:
                raise ValueError(f"mesh must have dimensions 'data' and 'pipeline', got {mesh.mesh_dim_names}")
        pipe = _group(process_group) if mesh is None else mesh["pipeline"].get_group()
        data = None if mesh is None else mesh["data"].get_group()
        if mesh is not None:
            if mesh.size() != dist.get_world_size():
                raise ValueError(f"mesh must hold all {dist.get_world_size()} ranks, holds {mesh.size()}")
            for group in (mesh["pipeline"].get_group(), mesh["data"].get_group()):
                group.set_timeout(timeout_of(dist.group.WORLD))  # a mesh gives its groups half an hour
        places = dist.get_world_size(pipe)
        widths = [layer.out_features for layer in net.stack]
        if isinstance(stages, str):
            checks.option("stages", stages, ("auto",))
            checks.count("rows", rows, 1, 2**31, "of a minibatch")
            # the first layer shares its products between the labels; peers are all of a layer's units
            cuttable = [i > 0 and not layer.peer for i, layer in enumerate(net.stack)]
            plan = balanced(counted_costs(net.stack, rows), widths, places, cuttable)
        else:
            plan = whole_layers(stages, widths)
            if len(plan) != places:
                raise ValueError(f"stages must name {places} stages, one a rank, got {len(plan)}")
        if device is not None:
            for span in plan[dist.get_rank(pipe)]:
                net.stack[span.index].to(device)
        on_cpu = net.stack[plan[dist.get_rank(pipe)][0].index].weight.device.type == "cpu"
        cut = any(not span.whole for spans in plan for span in spans)
        links = Links(
            pipe=pipe if places > 1 else None,
            back=pipe if on_cpu or not cut else _again(pipe),
            data=data if data is not None and dist.get_world_size(data) > 1 else None,
            place=dist.get_rank(pipe),
            places=places,
        )
        super().__init__(
            net,
            pipe if mesh is None else dist.group.WORLD,
            links,
            plan,
            micro_batches=micro_batches,
            update=update,
            compress=compress,
            check_every=check_every,
        )


def _group(process_group: Any) -> Any:
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed is not initialised: start the processes with torchrun and call "
            "ffkernels.distributed.start(), or torch.distributed.init_process_group()"
        )
    return dist.group.WORLD if process_group is None else process_group


def _again(group: Any) -> Any:
    """Another process group of the same ranks: NCCL knows no tags, and runs what is in one group in its order."""
    ranks = dist.get_process_group_ranks(group)
    return dist.new_group(ranks, use_local_synchronization=True, timeout=timeout_of(group))
