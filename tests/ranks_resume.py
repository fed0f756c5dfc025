"""What each rank runs for test_distributed.py: trainings that other numbers of processes have begun.

python ranks_resume.py FOLDER

Goes on with FOLDER/<name>-run of ranks_train.RESUMED and with FOLDER/alone-run, which one process has begun; the first
rank writes FOLDER/<name>-resumed.pt.
"""

import sys
from pathlib import Path

import ranks_train
import torch
import torch.distributed as dist

from ffkernels import distributed
from ffkernels.config import TrainConfig
from ffkernels.distributed import run
from ffkernels.run import RunFolder


def main(folder):
    torch.set_num_threads(1)
    distributed.start(timeout=60)
    for name, (kind, arguments) in {**ranks_train.RESUMED, "alone": ("data", {})}.items():
        _, _, _, made, fitted = ranks_train.RUNS.get(name, (1, "data", {}, {}, {}))
        model = ranks_train.model_of(kind, ranks_train.make(**made), None, None, arguments)
        history = run.restore(RunFolder(folder / f"{name}-run", TrainConfig(), {}), model)
        records = ranks_train.fit(model, fitted, history=history)
        state = model.full_state_dict()
        if dist.get_rank() == 0:
            torch.save({"state": state, "records": records}, folder / f"{name}-resumed.pt")
    dist.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
