"""Real processes for the tests of ffkernels.distributed: started with torchrun's variables, never left behind."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

TESTS = Path(__file__).parent
LIMIT = 120  # seconds until a group of processes counts as hung


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(**more):
    path = os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")])
    quiet = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TORCH_CPP_LOG_LEVEL": "FATAL", "GLOO_SOCKET_IFNAME": "lo"}
    return {**os.environ, **quiet, **more}


class Ranks:
    """``count`` processes that run a script, each with a rank; used as a context manager."""

    def __init__(self, count, *arguments):
        port, self.started = str(free_port()), time.monotonic()
        common = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.processes = [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(count)
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.communicate()

    def kill(self, rank, how=signal.SIGKILL):
        self.processes[rank].send_signal(how)

    def wait(self, ranks=None, limit=LIMIT):
        """The output of each of ``ranks`` (None: all) when they have ended; fails when they do not end in time."""
        end, texts = time.monotonic() + limit, {}
        for rank in range(len(self.processes)) if ranks is None else ranks:
            try:
                texts[rank] = self.processes[rank].communicate(timeout=max(0.1, end - time.monotonic()))[0]
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} has not ended within {limit} s") from None
        return texts

    def succeed(self):
        """The outputs of all ranks, which must end well."""
        texts = self.wait()
        for rank, process in enumerate(self.processes):
            assert process.returncode == 0, f"rank {rank} ended with {process.returncode}:\n{texts[rank]}"
        return texts
