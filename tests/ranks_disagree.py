"""What each of two ranks runs for test_disagreement.py: arguments that are wrong on rank 1, or not the same on both.

Prints a JSON object: for each case the error's type, its message and the ranks that it names.
"""

import json

import ranks_train
import torch
import torch.distributed as dist

import ffkernels as ff
from ffkernels import distributed
from ffkernels.distributed import DataParallelFF, PipelineFF


def net(width=16, **options):
    torch.manual_seed(1)
    return ff.FFNet.from_sizes([ranks_train.INPUTS, width, 8], num_classes=3, **options)


def fit(x, labels, **options):
    model = DataParallelFF(net())
    return len(model.fit(x, labels, **{"epochs": 3, "batch_size": 24, "progress": False, **options}))


def cases(rank):
    x, labels = ranks_train.data()
    rows = slice(0, 40 + 8 * rank)
    return {
        "rows": lambda: fit(x[rows], labels[rows]),
        "batch_size": lambda: fit(x, labels, batch_size=24 + rank),
        "validation": lambda: fit(x, labels, validation=None if rank else (x, labels)),
        "labels": lambda: fit(x, labels.float() if rank else labels),
        "width": lambda: DataParallelFF(net(16 + rank)),
        "width of a pipeline": lambda: PipelineFF(net(16 + rank), stages=[1, 1]),
        "optimizer": lambda: DataParallelFF(net(optimizer=ff.Adam(lr=0.01 + rank))),
        "dropout": lambda: DataParallelFF(net(dropout=0.1 * rank)),
        "predict": lambda: DataParallelFF(net()).predict(x[rows]),
        "step": lambda: DataParallelFF(net()).step(x[:, rank:], x),
        "step of a pipeline": lambda: PipelineFF(net(), stages=[1, 1]).step(x[:, 1 - rank :], x),
        # after all of them the ranks still understand each other
        "stop": lambda: fit(x, labels, callbacks=[lambda model, records: rank == 1 and len(records) == 2]),
    }


def main():
    torch.set_num_threads(1)
    distributed.start(timeout=20)
    found = {}
    for name, case in cases(dist.get_rank()).items():
        try:
            found[name] = case()
        except (TypeError, ValueError, RuntimeError) as error:
            found[name] = [type(error).__name__, str(error), list(getattr(error, "ranks", ()))]
    print(json.dumps(found))
    distributed.stop()


if __name__ == "__main__":
    main()
