"""Processes that work together: their start under torchrun, and an error that names the rank when one of them stops.

Transport, collectives and their timeouts are torch.distributed's. What it leaves open is who is to blame: a collective
that fails says that a connection closed or that time is up. `Watch` therefore keeps a line of status for each rank in
the process group's own store, and reads those of the others when a collective has failed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

TIMEOUT = 600.0  # seconds that a collective may take
_BEAT = 0.3  # seconds between two signs of life
_PATIENCE = 4  # beats without a sign: the rank is gone
_LINGER = 6.0  # seconds for which the rank that holds the store waits for the others to read it


class RankError(RuntimeError):
    """A rank that died, hangs, failed or has other weights than the others; ``ranks`` are those to blame."""

    def __init__(self, message: str, ranks: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.ranks = ranks


def launched() -> bool:
    """Whether torchrun (or what sets the same variables) has started this process."""
    return dist.is_available() and "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(timeout: float = TIMEOUT) -> torch.device:
    """Join the processes that torchrun has started, over NCCL where each has a GPU, else over gloo.

    Args:
        timeout: seconds that any collective may take before it fails.

    Returns:
        The device of this process.
    """
    use_gpu = torch.cuda.is_available() and dist.is_nccl_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        limit = timedelta(seconds=timeout)
        given: dict[str, Any] = {}
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and _one_machine():
            # torchrun's store outlives the attempts: without a prefix, gloo may find the addresses of dead processes.
            # Agents of several machines count their restarts apart, so that the prefix would not be the same there.
            store, rank, size = next(rendezvous("env://", timeout=limit))
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            given = {"store": dist.PrefixStore(f"attempt-{attempt}", store), "rank": rank, "world_size": size}
        # gloo stays for the tensors of the CPU: counts, records and checkpoints
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_gpu else "gloo", timeout=limit, **given)
    return device


def _one_machine() -> bool:
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")


def stop() -> None:
    """Leave the processes joined by `start`."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None
    if dist.is_initialized():
        dist.destroy_process_group()


def from_first(value: Any) -> Any:
    """The object that the first of all ranks has."""
    box = [value]
    watch().run(dist.broadcast_object_list, box, src=0)
    return box[0]


@contextmanager
def agreement(group: Any) -> Iterator[dict[str, Any]]:
    """A block that looks at this rank's arguments, and puts into the dict those that all ranks must have in common.

    What is wrong with one rank's arguments thereby ends all ranks of ``group`` at once; none waits for another.

    Raises:
        What the block raises, on the rank where it does; RankError on the others.
        ValueError: an argument is not the same on all ranks; on all of them.
    """
    own: dict[str, Any] = {}
    error: Exception | None = None
    try:
        yield own
    except Exception as caught:
        error = caught
    ranks = dist.get_process_group_ranks(group)
    found: list[Any] = [None] * len(ranks)
    watch().run(dist.all_gather_object, found, (own, None if error is None else _told(error)), group=group)
    if error is not None:
        raise error
    failed = {rank: text for rank, (_, text) in zip(ranks, found, strict=True) if text is not None}
    if failed:
        raise RankError("; ".join(f"rank {r} failed: {text}" for r, text in failed.items()), tuple(failed))
    first = found[0][0]
    for rank, (other, _) in zip(ranks, found, strict=True):
        for name in (name for name in first if other.get(name) != first[name]):
            raise ValueError(
                f"{name} must be the same on all ranks, got {first[name]} on rank {ranks[0]} and {other.get(name)} on "
                f"rank {rank}"
            )


def _told(error: BaseException) -> str:
    """An error's name and first line, for other ranks."""
    text = str(error).partition("\n")[0]
    return f"{type(error).__name__}{': ' if text else ''}{text}"


def timeout_of(group: Any) -> timedelta:
    """What a collective of the group may take."""
    return group._get_backend(group._device_types[0]).options._timeout


def message_limit(group: Any, device: torch.device) -> timedelta | None:
    """What isend and irecv of the group may take, for Work.wait.

    gloo's have the timeout with which the group was made, half an hour for those of a device mesh, whatever was set
    later. NCCL's are ended by its watchdog.
    """
    return timeout_of(group) if device.type == "cpu" else None


class Watch:
    """This rank's signs of life, and who is to blame for a failed collective. `watch` gives the process's own.

    A status is "<beats> <state>"; the state is "runs", or "waits" inside a collective. A rank whose beats stand still
    is dead or stopped; one that beats and runs while the others wait hangs in its own code.
    """

    def __init__(self) -> None:
        self.world, self.rank, self.size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
        store: Any = dist.distributed_c10d._get_default_store()
        # connections of their own: one of the two threads may have to wait in its connection
        self._beats_store = dist.PrefixStore("ffkernels", store.clone())
        self._store = dist.PrefixStore("ffkernels", store.clone())
        self._holds_store = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self._state, self._beats, self._blamed = "runs", 0, False
        self._ended = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._live, name="ffkernels-watch", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        self._beats += 1
        self._beats_store.set(f"status/{self.rank}", f"{self._beats} {self._state}")

    def _live(self) -> None:
        while not self._ended.wait(_BEAT):
            try:
                self._beat()
            except Exception:
                return  # the store has gone with its holder; the next collective will tell

    def close(self) -> None:
        self._ended.set()
        self._thread.join()

    # -- collectives

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        self._state = "waits"
        try:
            yield
        except RuntimeError as error:
            raise self.blame(error) from error
        finally:
            self._state = "runs"

    def run(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of torch.distributed; RankError names the rank that made it fail."""
        with self._waiting():
            return collective(*args, **kwargs)

    def wait(self, work: Any, limit: timedelta | None = None) -> None:
        """Wait for a collective that was started with async_op; of isend or irecv with the `message_limit`."""
        with self._waiting():
            work.wait(*([] if limit is None else [limit]))

    # -- failures

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Tell the other ranks what went wrong here, so that they can say it."""
        try:
            yield
        except RankError:
            raise
        except BaseException as error:
            self._note(f"failed: {_told(error)}")
            raise

    def _note(self, text: str) -> None:
        with suppress(RuntimeError):  # the store may have gone with its holder
            self._store.set(f"note/{self.rank}", text)

    def _read(self, kind: str) -> dict[int, str]:
        keys = {r: f"{kind}/{r}" for r in range(self.size) if r != self.rank}
        return {r: self._store.get(key).decode() for r, key in keys.items() if self._store.check([key])}

    def blame(self, error: BaseException) -> RankError:
        """The error that names the rank because of which a collective failed here; the others can read it, too."""
        reason = str(error).partition("\n")[0]
        if self._blamed:
            return RankError(f"rank {self.rank}: the process group has failed already ({reason})")
        self._blamed = True
        try:
            before = self._read("status")
            time.sleep(_PATIENCE * _BEAT)
            ranks, what = self._judge(before, self._read("status"), self._read("note"))
        except RuntimeError:
            ranks, what = (0,), "rank 0, which holds the store, has ended"
        self._note(f"blames {' '.join(map(str, ranks))}: {what}")
        self._linger()
        return RankError(f"{what}; rank {self.rank} stops ({reason})", ranks)

    def _judge(
        self, before: dict[int, str], after: dict[int, str], notes: dict[int, str]
    ) -> tuple[tuple[int, ...], str]:
        failed = {r: n.partition(": ")[2] for r, n in notes.items() if n.startswith("failed: ")}
        if failed:
            return tuple(failed), "; ".join(f"rank {r} failed: {text}" for r, text in failed.items())
        gone = tuple(r for r, status in after.items() if before.get(r) == status and r not in notes)
        if gone:
            return gone, f"{_named(gone)} died or was stopped (no sign of life)"
        for note in notes.values():  # one that was nearer has seen it, and may have ended since
            if note.startswith("blames "):
                ranks, _, what = note.removeprefix("blames ").partition(": ")
                if ranks:
                    return tuple(map(int, ranks.split())), what
        running = tuple(r for r, status in after.items() if status.endswith("runs") and r not in notes)
        if running:
            return running, f"{_named(running)} hangs (alive, but in no collective while others wait)"
        return (), "no rank could be found that died or hangs"

    def _linger(self) -> None:
        end = time.monotonic() + _LINGER
        while self._holds_store and time.monotonic() < end and len(self._read("note")) < self.size - 1:
            statuses = self._read("status")
            time.sleep(_PATIENCE * _BEAT)
            notes = self._read("note")
            if all(r in notes or statuses.get(r) == status for r, status in self._read("status").items()):
                return


def _named(ranks: tuple[int, ...]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


_watch: Watch | None = None


def watch() -> Watch:
    """The process's Watch, made when the first of its groups is; another one after torch.distributed's own restart."""
    global _watch
    if _watch is not None and _watch.world is not dist.group.WORLD:
        _watch.close()
        _watch = None
    if _watch is None:
        _watch = Watch()
    return _watch
