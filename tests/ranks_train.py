"""What each rank runs for test_distributed.py: many trainings in one start of the processes.

python ranks_train.py FOLDER [NAME...]

Writes FOLDER/<name>.pt from the first rank of each training (or of those named), and FOLDER/ranks-<rank>.pt; and for
ranks_resume.py a folder FOLDER/<name>-run with the checkpoint after the first epoch.
"""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import ffkernels as ff
from ffkernels import distributed
from ffkernels.distributed import DataParallelFF, PipelineFF, checkpoint

ROWS, INPUTS, CLASSES = 75, 12, 3  # 75 rows: the last minibatch is smaller than the others, and than the ranks
SIZES = (INPUTS, 40, 48, 33, 21)
OPTIMIZERS = {"adam": ff.Adam(lr=0.01), "sgd": ff.SGD(lr=0.1, momentum=0.9)}


def data(dtype=torch.float32, shape=(INPUTS,)):
    g = torch.Generator().manual_seed(3)
    x = torch.rand(ROWS, *shape, generator=g).to(dtype)
    return x, torch.randint(CLASSES, (ROWS,), generator=g)


def make(optimizer="adam", dtype=torch.float64, sizes=SIZES, **options):
    torch.manual_seed(1)
    return ff.FFNet.from_sizes(
        sizes, num_classes=CLASSES, dtype=dtype, optimizer=OPTIMIZERS[optimizer], **{"normalize": "rms", **options}
    )  # fmt: skip


def options(**more):
    x, labels = data()
    rate = {"lr": 0.02, "schedule": lambda t: 1 - t}
    return {
        "epochs": 2, "batch_size": 24, "seed": 5, "progress": False, "validation": (x[:20], labels[:20]), **rate, **more
    }  # fmt: skip


SAME = {"batch_size": 25, "same_as": 5, "schedule": None}  # minibatches of 25 in 5 parts are minibatches of 5
# name: (ranks, kind, arguments of the model, arguments of make, arguments of fit)
RUNS = {
    **{f"data-{n}": (n, "data", {}, {}, {}) for n in (2, 3, 4)},
    "data-float32": (3, "data", {"check_every": 2}, {"dtype": torch.float32}, {}),
    "data-sgd-gelu": (2, "data", {}, {"optimizer": "sgd", "activation": "gelu"}, {}),
    "data-greedy": (3, "data", {}, {}, {"mode": "greedy"}),
    "data-few-rows": (4, "data", {}, {}, {"batch_size": 2, "epochs": 1}),
    "data-images": (2, "data", {}, {}, {"shape": (3, 2, 2)}),
    "data-bf16": (2, "data", {"compress": "bf16"}, {"dtype": torch.float32}, {}),
    "data-wide": (3, "data", {}, {"sizes": (INPUTS, 800, 700, 20)}, {"epochs": 1}),  # a layer with its own bucket
    "data-dataset": (3, "data", {}, {}, {"dataset": True}),
    **{f"pipeline-{n}": (n, "pipeline", {}, {}, {}) for n in (2, 3, 4)},
    "pipeline-counts": (3, "pipeline", {"stages": [1, 2, 1]}, {}, {}),
    "pipeline-micro": (3, "pipeline", {"micro_batches": 3}, {}, {}),
    "pipeline-micro-more": (2, "pipeline", {"micro_batches": 7}, {"optimizer": "sgd"}, {}),
    "pipeline-microbatch": (3, "pipeline", {"micro_batches": 5, "update": "microbatch"}, {}, SAME),
    "pipeline-images": (2, "pipeline", {"micro_batches": 2}, {}, {"shape": (3, 2, 2)}),
    "pipeline-gelu": (2, "pipeline", {}, {"activation": "gelu", "normalize": "l2", "goodness": "sum"}, {}),
    "data-peer": (3, "data", {}, {"peer": 0.1}, {}),
    "pipeline-peer": (2, "pipeline", {}, {"peer": 0.1}, {}),
    "mesh": (4, "mesh", {}, {}, {}),
    "mesh-peer": (4, "mesh", {"micro_batches": 2}, {"peer": 0.1}, {"batch_size": 7}),
    "mesh-micro": (4, "mesh", {"micro_batches": 2, "check_every": 1}, {}, {}),
    "mesh-few-rows": (4, "mesh", {"micro_batches": 2}, {}, {"batch_size": 1, "epochs": 1}),
}

# trainings of RUNS that other numbers of ranks go on with after the first epoch: how two of them do
RESUMED = {
    "data-4": ("pipeline", {}),
    "data-peer": ("data", {}),
    "data-greedy": ("data", {}),
    "pipeline-4": ("data", {}),
    "pipeline-micro": ("pipeline", {"micro_batches": 2}),
    "mesh-micro": ("data", {"check_every": 1}),
}


class Pairs(torch.utils.data.Dataset):
    """Rows one by one."""

    def __init__(self, x, labels):
        self.x, self.labels = x, labels

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], self.labels[i]


def model_of(kind, net, group, mesh, arguments):
    if kind == "data":
        return DataParallelFF(net, group, **arguments)
    if kind == "pipeline":
        return PipelineFF(net, process_group=group, rows=48, **arguments)
    return PipelineFF(net, mesh=mesh, rows=48, **arguments)


def save_first(folder):
    """A callback that writes the checkpoint after the first epoch."""

    def save(model, records):
        if len(records) == 1:
            checkpoint.save_numbered(folder, 1, model, records)

    return save


def fit(model, given, **more):
    given = {**given, **more}
    given.pop("same_as", None)
    shape, dataset = given.pop("shape", (INPUTS,)), given.pop("dataset", False)
    x, labels = data(shape=shape)
    given = options(**given) | {"validation": (x[:20], labels[:20])}
    return model.fit(Pairs(x, labels), **given) if dataset else model.fit(x, labels, **given)


def rows_of(step):
    """Positive and negative rows of a step, as many as a rank may have."""
    g = torch.Generator().manual_seed(step)
    return [torch.randn(n, INPUTS, generator=g, dtype=torch.float64) for n in (13, 9)]


def main(folder, names):
    torch.set_num_threads(1)
    distributed.start(timeout=60)
    rank = dist.get_rank()
    groups = {n: dist.new_group(list(range(n)), timeout=timedelta(seconds=60)) for n in (2, 3, 4)}
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline"))
    seen = {}
    for name, (ranks, kind, arguments, made, fitted) in RUNS.items():
        if rank >= ranks or (names and name not in names):
            continue
        sizes = made.get("sizes", SIZES)
        model = model_of(kind, make(**{**made, "sizes": sizes}), groups[ranks], mesh, arguments)
        saved = [save_first(folder / f"{name}-run")] if name in RESUMED else []
        if saved and rank == 0:
            (folder / f"{name}-run").mkdir()
        records = fit(model, fitted, callbacks=saved)
        state, predicted = model.full_state_dict(), model.predict(data()[0][:31]) if "shape" not in fitted else None
        stages = [[(s.index, s.first, s.last, s.total) for s in spans] for spans in model.stages]
        seen[name] = {"records": records, "predicted": predicted}
        if rank == 0:
            torch.save({"state": state, "records": records, "stages": stages}, folder / f"{name}.pt")
    # steps of one's own loop: the ranks' parts differ in size, and one has none
    for kind, arguments in (("data", {}), ("pipeline", {"micro_batches": 2})):
        model, losses = model_of(kind, make(peer=0.1), groups[4], None, arguments), []
        for step in range(3):
            pos, neg = rows_of(step)
            if kind == "data":
                pos, neg = pos.split([4, 5, 0, 4])[rank], neg.split([3, 4, 0, 2])[rank]
            losses.append(model.step(pos, neg) if kind == "data" or rank == 0 else model.step())
        seen[f"steps-{kind}"] = [tuple(loss) for loss in losses]
        state = model.full_state_dict()
        if rank == 0:
            torch.save({"state": state}, folder / f"steps-{kind}.pt")
    # weights that differ are found
    model = DataParallelFF(make(), groups[3], check_every=2) if rank < 3 else None
    if model is not None:
        model.step(*rows_of(0))
        if rank == 1:
            model.net.layers[2].weight[3, 4] += 1e-6
        try:
            model.step(*rows_of(1))
        except distributed.RankError as error:
            seen["check"] = str(error), error.ranks
    torch.save(seen, folder / f"ranks-{rank}.pt")
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
