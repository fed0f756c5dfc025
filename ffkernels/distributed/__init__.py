"""Training by several processes on torch.distributed: data parallel, layer pipelines, and both on a device mesh.

    torchrun --nproc-per-node 4 train.py

    from ffkernels import distributed

    distributed.start()
    model = distributed.DataParallelFF(net)  # or PipelineFF(net)
    model.fit(images, labels, epochs=10, batch_size=1024)
    distributed.stop()

Every collective has the process group's timeout, and a failure names the rank (`RankError`).
"""

from .data import ShardedSampler
from .group import TIMEOUT, RankError, launched, start, stop
from .model import ParallelStep
from .parallel import DataParallelFF, PipelineFF

__all__ = [
    "TIMEOUT",
    "DataParallelFF",
    "ParallelStep",
    "PipelineFF",
    "RankError",
    "ShardedSampler",
    "launched",
    "start",
    "stop",
]
