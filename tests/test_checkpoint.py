"""Checkpoints: what comes back, what damage is seen, what a crash at each moment of a write leaves."""

import hashlib
import os
import warnings

import pytest
import torch

from ffkernels import checkpoint
from ffkernels.checkpoint import CheckpointError

CONTENT = {"net": {"w": torch.arange(6.0).reshape(2, 3)}, "history": [{"epoch": 1, "loss": [0.1, None], "ok": True}]}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def test_round_trip_also_through_torch_load(tmp_path):
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    assert same(checkpoint.load(tmp_path / "a.pt"), CONTENT)
    assert same(torch.load(tmp_path / "a.pt", weights_only=True), CONTENT)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_every_truncation_and_every_flipped_byte_is_seen(tmp_path):
    path = tmp_path / "a.pt"
    checkpoint.save(path, CONTENT)
    good = path.read_bytes()
    for i in {*range(0, len(good), 37), *range(len(good) - 75, len(good))}:
        path.write_bytes(good[:i])
        with pytest.raises(CheckpointError, match=r"a\.pt: truncated or not a checkpoint"):
            checkpoint.load(path)
        path.write_bytes(good[:i] + bytes([good[i] ^ 0x20]) + good[i + 1 :])
        with pytest.raises(CheckpointError, match=r"a\.pt: (truncated|damaged)"):
            checkpoint.load(path)


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_objects_other_than_plain_data_are_refused_and_never_run(tmp_path):
    path, target = tmp_path / "a.pt", tmp_path / "run-by-the-pickle"
    checkpoint.save(path, {"net": Malicious(target)})  # with a valid checksum
    with pytest.raises(CheckpointError, match=r"a\.pt: refused, because it holds more than tensors and plain data"):
        checkpoint.load(path)
    assert not target.exists()
    torch.load(path, weights_only=False)  # the file would have done it
    assert target.exists()


def test_a_checksummed_file_that_is_no_archive_is_refused(tmp_path):
    payload = b"garbage"
    (tmp_path / "a.pt").write_bytes(payload + f"\nsha256:{hashlib.sha256(payload).hexdigest()}\n".encode())
    with pytest.raises(CheckpointError, match=r"a\.pt: refused"):
        checkpoint.load(tmp_path / "a.pt")
    checkpoint.save(tmp_path / "a.pt", [1, 2])
    with pytest.raises(CheckpointError, match="must hold a dict, holds list"):
        checkpoint.load(tmp_path / "a.pt")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent.pt")


def test_the_last_two_are_kept_in_order_of_number(tmp_path):
    assert checkpoint.load_latest(tmp_path) is None
    for number in (8, 9, 999_999, 1_000_000):
        checkpoint.save_numbered(tmp_path, number, {"number": number})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1000000.pt", "checkpoint-999999.pt"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.load_latest(tmp_path) == {"number": 1_000_000}


def test_the_one_before_a_damaged_one_is_used_with_a_warning(tmp_path):
    first, second = (checkpoint.save_numbered(tmp_path, n, {"number": n}) for n in (1, 2))
    second.write_bytes(second.read_bytes()[:100])
    with pytest.warns(UserWarning, match=r"checkpoint-000002\.pt: truncated.*using checkpoint-000001\.pt"):
        assert checkpoint.load_latest(tmp_path) == {"number": 1}
    first.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no usable checkpoint: .*000002\.pt: truncated.*000001\.pt: truncated"):
        checkpoint.load_latest(tmp_path)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path, monkeypatch, step):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"number": 1})

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            checkpoint.save(path, {"number": 2})
    assert checkpoint.load(path) == {"number": 1}
    assert os.listdir(tmp_path) == ["a.pt"]


def test_data_and_then_the_name_are_synced_to_disk(tmp_path, monkeypatch):
    events = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        real_fsync(handle)

    def replace(source, target):
        events.append("replace")
        assert os.path.dirname(source) == os.path.dirname(target)  # across file systems it would not be atomic
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    assert events == ["file", "replace", "folder"]


def test_what_a_crash_left_is_swept_up(tmp_path):
    (tmp_path / ".checkpoint-000001.pt.123.tmp").write_bytes(b"half")
    assert checkpoint.load_latest(tmp_path) is None
    checkpoint.save_numbered(tmp_path, 1, {})
    assert os.listdir(tmp_path) == ["checkpoint-000001.pt"]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # the child neither computes nor takes a lock
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_killed_in_the_middle_of_a_write(tmp_path, step):
    """A process killed before its data are synced, and before they get their name, leaves the checkpoint before."""
    checkpoint.save_numbered(tmp_path, 1, CONTENT)
    child = os.fork()
    if child == 0:
        setattr(os, step, lambda *args: os.kill(os.getpid(), 9))
        checkpoint.save_numbered(tmp_path, 2, {"never": "seen"})
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    assert len(os.listdir(tmp_path)) == 2  # the temporary file lies there
    assert same(checkpoint.load_latest(tmp_path), CONTENT)
