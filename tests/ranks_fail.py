"""What each rank runs for test_failures.py: a training that goes on until a rank fails.

python ranks_fail.py KIND HOW FOLDER: KIND data, pipeline or mesh; HOW rank 1 fails: hang, raise, or nothing (it
is killed or stopped from outside). Prints "ready" when training runs and the error with which it ends.
"""

import sys
import time
from pathlib import Path

import ranks_train
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from ffkernels import distributed
from ffkernels.distributed import checkpoint

TIMEOUT = 6.0  # seconds


def main(kind, how, folder):
    torch.set_num_threads(1)
    distributed.start(timeout=TIMEOUT)
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "pipeline")) if kind == "mesh" else None
    model = ranks_train.model_of(kind, ranks_train.make(), None, mesh, {})

    def callback(model, records):
        checkpoint.save_numbered(folder, len(records), model, records)
        if len(records) == 2:
            print("ready", flush=True)
        if len(records) == 3 and rank == 1 and how == "raise":
            raise ZeroDivisionError("of the user's own")
        if len(records) == 3 and rank == 1 and how == "hang":
            print("hangs", flush=True)
            time.sleep(1000)

    start = time.monotonic()
    x, labels = ranks_train.data()
    try:
        model.fit(x, labels, epochs=100_000, batch_size=24, progress=False, callbacks=[callback])
    except distributed.RankError as error:
        print(f"RankError after {time.monotonic() - start:.1f} s: {error.ranks} {error}", flush=True)
        distributed.stop()
        sys.exit(3)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
