"""A rank dies, is stopped, hangs or fails: the others end in time, name it, and leave the last checkpoint whole."""

import re
import signal
import time

import pytest
import ranks_train
from ranks import TESTS, Ranks

from ffkernels import checkpoint

pytestmark = pytest.mark.slow


def until(ranks, text):
    """Read the ranks' output until each has said ``text``; what they say later is kept for `Ranks.wait`."""
    for process in ranks:
        for line in process.stdout:
            if line.strip() == text:
                break
        else:
            raise AssertionError(f"a rank has ended without saying {text!r}")


CASES = {
    # kind, how rank 1 fails by itself or which signal it gets, what the others say of it
    "killed": ("pipeline", signal.SIGKILL, r"rank 1 died or was stopped"),
    "stopped": ("mesh", signal.SIGSTOP, r"rank 1 died or was stopped"),
    "hangs": ("data", "hang", r"rank 1 hangs \(alive, but in no collective while others wait\)"),
    "fails": ("pipeline", "raise", r"rank 1 failed: ZeroDivisionError: of the user's own"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_others_end_and_name_the_rank(tmp_path, case):
    kind, how, message = CASES[case]
    count = 4 if kind == "mesh" else 3
    own = how if isinstance(how, str) else "nothing"
    with Ranks(count, TESTS / "ranks_fail.py", kind, own, tmp_path) as ranks:
        until(ranks.processes, "ready")
        if not isinstance(how, str):
            ranks.kill(1, how)
        start, others = time.monotonic(), [r for r in range(count) if r != 1]
        texts = ranks.wait(others, limit=60)
        assert time.monotonic() - start < 45  # the timeout of 6 s, then looking who it was; on a busy machine
        for rank in others:
            assert ranks.processes[rank].returncode == 3, texts[rank]
            found = re.search(r"RankError after [\d.]+ s: \((\d+),\) (.*)", texts[rank])
            assert found, texts[rank]
            assert found[1] == "1"
            assert re.search(message, found[2]), texts[rank]
    whole = checkpoint.load_latest(tmp_path)
    assert len(whole["history"]) >= 2
    net = ranks_train.make()
    net.load_state_dict(whole["net"])
