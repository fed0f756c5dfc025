"""The data loaders: idx files of every kind of damage, folders of other sizes, the download, the digits' split."""

import dataclasses
import functools
import gzip
import hashlib
import http.server
import os
import sys
import threading

import numpy as np
import pytest
import torch
from idx_files import NAMES, idx_bytes, write_folder

from ffkernels import data


@pytest.mark.parametrize(("pack", "suffix"), [(gzip.compress, ".gz"), (bytes, ""), (gzip.compress, ""), (bytes, ".gz")])
def test_folder_of_another_image_size_and_class_count(tmp_path, pack, suffix):
    write_folder(tmp_path / "shapes", pack=pack, suffix=suffix)
    found = data.load_mnist(tmp_path / "shapes")
    assert (found.name, found.image_shape, found.num_classes) == ("shapes", (1, 3, 5), 4)
    assert found.x_train.shape == (6, 15)
    assert found.x_test.shape == (4, 15)
    assert found.x_train.dtype == torch.float32
    assert found.y_train.dtype == torch.int64
    expected = torch.arange(90).reshape(6, 15) % 256
    assert torch.equal(found.x_train, expected.float() / 255)
    assert found.y_train.tolist() == [0, 1, 2, 3, 0, 1]


@pytest.mark.parametrize(
    "names",
    [
        [n.replace("-idx", ".idx") for n in NAMES],
        [n.replace("t10k", "test") for n in NAMES],
        [f"emnist-letters-{n}" for n in NAMES],
        [n.replace("-", "_") for n in NAMES],
        [f"USPS_{n}" for n in NAMES],
    ],
)
def test_usual_variants_of_the_file_names(tmp_path, names):
    write_folder(tmp_path, names=names)
    assert data.load_mnist(tmp_path).x_test.shape == (4, 15)


def test_a_file_beside_its_gzipped_form_is_one_file(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, pack=bytes, suffix="")
    assert data.load_mnist(str(tmp_path)).x_train.shape == (6, 15)


def test_several_candidates_are_refused_by_name(tmp_path):
    write_folder(tmp_path, names=[f"emnist-letters-{n}" for n in NAMES])
    write_folder(tmp_path, names=[f"emnist-digits-{n}" for n in NAMES])
    with pytest.raises(
        ValueError, match=r"one file of train images, has \['emnist-digits-train-images.*emnist-letters"
    ):
        data.load_mnist(tmp_path)


@pytest.mark.parametrize(
    ("given", "files", "name"),
    [
        ("FashionMNIST", "FashionMNIST/raw", "FashionMNIST"),  # torchvision, and what its user may point at
        ("FashionMNIST/raw", "FashionMNIST/raw", "FashionMNIST"),
        (".", "KMNIST/raw", "KMNIST"),
        (".", "usps", "usps"),
    ],
)
def test_folders_as_torchvision_and_archives_leave_them(tmp_path, given, files, name):
    (tmp_path / files).mkdir(parents=True)
    write_folder(tmp_path / files, size=(16, 16), classes=10, rows=(20, 10))
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README").write_text("")
    found = data.load_mnist(tmp_path / given)
    assert (found.name, found.image_shape, found.num_classes) == (name, (1, 16, 16), 10)


def test_a_folder_named_like_a_file_is_not_taken_for_it(tmp_path):
    write_folder(tmp_path, pack=bytes, suffix="", names=[n.replace("-idx", ".idx") for n in NAMES])
    for name in NAMES:  # each file once more in a folder of its own name
        (tmp_path / name).mkdir()
    write_folder(tmp_path / NAMES[0])
    assert data.load_mnist(tmp_path).x_train.shape == (6, 15)


def test_the_files_may_not_lie_deeper_nor_in_several_folders(tmp_path):
    for name in ("MNIST", "KMNIST"):
        (tmp_path / "data" / name / "raw").mkdir(parents=True)
        write_folder(tmp_path / "data" / name / "raw")
    with pytest.raises(FileNotFoundError, match=rf"^{tmp_path} has no file train-images-idx3-ubyte"):
        data.load_mnist(tmp_path)
    with pytest.raises(ValueError, match=r"must hold one set of data, has \['KMNIST/raw', 'MNIST/raw'\]: name one"):
        data.load_mnist(tmp_path / "data")
    write_folder(tmp_path / "data", size=(2, 2))  # what lies nearer is meant
    assert data.load_mnist(tmp_path / "data").image_shape == (1, 2, 2)


GOOD = idx_bytes((2, 2, 2), range(8))
DAMAGED = {
    "empty file": (b"", "not an idx file"),
    "text": (b"label,pixel\n1,2\n", "not an idx file"),
    "wrong magic": (b"\1" + GOOD[1:], "not an idx file"),
    "unknown type": (idx_bytes((2, 2, 2), range(8), code=0x07), "not an idx file"),
    "floats": (idx_bytes((2, 2, 2), bytes(32), code=0x0D), r"must hold unsigned bytes \(idx type 08\), holds float"),
    "no dimensions": (bytes([0, 0, 8, 0, 5]), "must have 3 dimensions, has 0"),
    "wrong dimensions": (idx_bytes((8,), range(8)), "must have 3 dimensions, has 1"),
    "truncated header": (GOOD[:9], "truncated: 9 bytes, less than its header of 16"),
    "truncated": (GOOD[:-1], r"truncated: 23 bytes, but shape \(2, 2, 2\) takes 24"),
    "trailing bytes": (GOOD + b"\0", r"bytes left over at its end: 25 bytes, but shape \(2, 2, 2\) takes 24"),
    "giant shape": (idx_bytes((2**32 - 1,) * 3, range(8)), "truncated: 24 bytes"),
    "no images": (idx_bytes((0, 2, 2), ()), r"is empty: its shape is \(0, 2, 2\)"),
    "truncated gzip": (gzip.compress(GOOD)[:-9], "damaged or truncated gzip"),
    "flipped gzip": (gzip.compress(GOOD)[:-8] + b"\0" * 8, "damaged or truncated gzip"),
    "no deflate data": (gzip.compress(GOOD)[:10] + b"\xff" * 20, "damaged or truncated gzip"),
    "garbage after gzip": (gzip.compress(GOOD) + b"more", "damaged or truncated gzip"),
    "gzipped garbage": (gzip.compress(b"garbage"), "not an idx file"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_named_with_the_reason(tmp_path, case):
    content, message = DAMAGED[case]
    path = tmp_path / "some-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"some-idx3-ubyte: .*{message}"):
        data.read_idx(path, dims=(3,))


def test_read_idx_without_dims_takes_any(tmp_path):
    for shape in [(8,), (2, 4), (2, 2, 2), (1, 2, 2, 2)]:
        (tmp_path / "x").write_bytes(idx_bytes(shape, range(8)))
        assert torch.equal(data.read_idx(tmp_path / "x"), torch.arange(8, dtype=torch.uint8).reshape(shape))


class Malicious:
    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_npy_files_are_never_unpickled(tmp_path):
    np.save(tmp_path / "x.npy", np.array([Malicious(tmp_path / "run-by-the-pickle")]), allow_pickle=True)
    for read in (data.read_images, data.read_labels):
        with pytest.raises(ValueError, match=r"x\.npy: not a usable \.npy file"):
            read(tmp_path / "x.npy")
    assert not (tmp_path / "run-by-the-pickle").exists()
    np.load(tmp_path / "x.npy", allow_pickle=True)  # the file would have done it
    assert (tmp_path / "run-by-the-pickle").exists()


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent: no such file"):
        data.read_idx(tmp_path / "absent")
    with pytest.raises(ValueError, match="is a folder"):
        data.read_idx(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        data.load_mnist(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file is not a folder"):
        data.load_mnist(tmp_path / "file")
    write_folder(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no file t10k-labels-idx1-ubyte\[\.gz\]"):
        data.load_mnist(tmp_path)


def test_files_that_do_not_fit_each_other(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(idx_bytes((5,), range(5)))
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz: 5 labels, but .*train-images.* has 6 images"):
        data.load_mnist(tmp_path)
    write_folder(tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(idx_bytes((4, 5, 3), bytes(60)))
    with pytest.raises(ValueError, match=r"t10k-images.*: images of 5 x 3 pixels, but .*train-images.* has 3 x 5"):
        data.load_mnist(tmp_path)


def test_fingerprint_tells_data_apart(tmp_path):
    write_folder(tmp_path)
    found, again = data.load_mnist(tmp_path), data.load_mnist(tmp_path)
    assert found.fingerprint() == again.fingerprint()
    for name in ("x_train", "y_train", "x_test", "y_test"):
        changed = getattr(found, name).clone()
        changed.view(-1)[-1] += 1
        assert dataclasses.replace(found, **{name: changed}).fingerprint() != found.fingerprint()


def test_digits_are_split_by_class_and_always_alike():
    found = data.load_digits()
    assert found.x_train.shape == (1442, 64)
    assert found.x_test.shape == (355, 64)
    assert (found.x_train.min(), found.x_train.max()) == (0, 1)
    whole = found.y_train.bincount() + found.y_test.bincount()
    assert found.y_test.bincount().tolist() == (whole // 5).tolist()
    # the split is part of every published figure: it must not change with a version of anything
    assert found.fingerprint() == "9afdfae46408056900b9cf2f3d270fd98e287a34078fa0c58a78bdaf18bd3f73"


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"sklearn is needed.*pip install 'ffkernels\[train\]'"):
        data.load_digits()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """A server on this machine in the place of MNIST's mirrors, and an empty cache. Gives the folder it serves and what
    was asked of it."""
    served, requests = tmp_path / "served", []
    contents = write_folder(served)
    assert len(contents) == 4

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format, *args):
            requests.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(served)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    base = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(data, "MIRRORS", (f"{base}/nothing-here/", f"{base}/"))
    sums = {f"{n}.gz": hashlib.sha256((served / f"{n}.gz").read_bytes()).hexdigest() for n in NAMES}
    monkeypatch.setattr(data, "MNIST_SHA256", sums)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield served, requests
    server.shutdown()
    thread.join()
    server.server_close()


def test_download_tries_the_next_mirror_and_is_cached(mirror):
    _, requests = mirror
    found = data.load_mnist()
    assert (found.name, found.x_train.shape) == ("mnist", (6, 15))
    assert any("nothing-here" in r for r in requests)
    requests.clear()
    assert data.load_mnist().fingerprint() == found.fingerprint()
    assert not requests


def test_download_with_a_wrong_checksum_is_refused(mirror, tmp_path):
    served, _ = mirror
    content = bytearray((served / "t10k-labels-idx1-ubyte.gz").read_bytes())
    content[-1] ^= 1
    (served / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(OSError, match=r"t10k-labels-idx1-ubyte.gz could not be downloaded.*--data-dir.*hash"):
        data.load_mnist()
    assert not list((tmp_path / "cache").rglob("t10k-labels*"))


def test_known_checksums_are_of_the_four_files():
    assert list(data.MNIST_SHA256) == [f"{n}.gz" for n in NAMES]
    assert all(len(s) == 64 for s in data.MNIST_SHA256.values())
