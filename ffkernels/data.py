"""Labelled images to train on: scikit-learn's digits, MNIST, and any folder of idx files like MNIST's."""

from __future__ import annotations

import gzip
import hashlib
import importlib
import math
import os
import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import bytes_of

MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
_SPLITS = ("train", "t10k|test")  # in the files' names; regular expressions
_KINDS = {"images": 3, "labels": 1}  # likewise, with their dimensions
_IDX_TYPES = {
    0x08: "unsigned byte", 0x09: "signed byte", 0x0B: "short", 0x0C: "int", 0x0D: "float", 0x0E: "double",
}  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """Images with labels, split into a training and a test set.

    Attributes:
        name: what the data are called in titles and run folders.
        x_train (B, K), x_test (B', K): float32 in [0, 1], the images flattened row by row.
        y_train (B,), y_test (B',): int64 in [0, num_classes).
        image_shape: (channels, height, width), whose product is K: ``x.view(-1, *image_shape)`` gives images.
        num_classes: one more than the largest label.
    """

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    image_shape: tuple[int, int, int]
    num_classes: int

    def fingerprint(self) -> str:
        """A SHA-256 over all pixels and labels, as hexadecimal digits: the same for the same data only."""
        digest = hashlib.sha256()
        for t in (self.x_train, self.y_train, self.x_test, self.y_test):
            t = t.contiguous()
            digest.update(f"{t.dtype} {tuple(t.shape)}".encode())
            digest.update(bytes_of(t))
        return digest.hexdigest()


def extra(module: str) -> Any:
    """Import a package that only training from the command line needs; the error names the extra that has it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is needed for this: pip install 'ffkernels[train]' ({error})") from error


def standardize(
    x: Tensor,  # (B, K)
    mean: float,
    std: float,
) -> Tensor:
    """(x - mean) / std: pixels of mean 0 and variance 1, where these are the mean and the deviation of all of them."""
    return (x - mean) / std


def load_digits() -> Dataset:
    """The 1,797 real handwritten digits of 8 x 8 pixels that scikit-learn ships; nothing is downloaded.

    Pixels are divided by 16, their largest value. scikit-learn has no split of them, so a fifth of each class (355 in
    all) is the test set, drawn once and for all with a fixed seed.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    bunch = extra("sklearn.datasets").load_digits()
    x = torch.from_numpy(bunch.data).float() / 16
    y = torch.from_numpy(bunch.target).long()
    draw = random.Random(0)  # its random() gives the same numbers in every version of Python
    test: list[int] = []
    for label in range(10):
        rows = sorted((y == label).nonzero().flatten().tolist(), key=lambda _: draw.random())
        test += rows[: len(rows) // 5]
    chosen = torch.zeros(len(x), dtype=torch.bool)
    chosen[test] = True
    return Dataset("digits", x[~chosen], y[~chosen], x[chosen], y[chosen], (1, 8, 8), 10)


def load_mnist(data_dir: str | Path | None = None) -> Dataset:
    """MNIST, or any data in the same form (Fashion-MNIST, KMNIST, ...): other image sizes and classes are fine.

    Args:
        data_dir: a folder that holds the four files train-images-idx3-ubyte, train-labels-idx1-ubyte,
            t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, as they are or gzipped (.gz); "test" for "t10k", "." or
            "_" for "-" and a prefix that ends in one of them (emnist-letters-) are accepted too. The files may lie up
            to two folders below, as torchvision leaves them (FashionMNIST/raw). The data take the name of their folder,
            "raw" aside. None: MNIST itself, downloaded once, checked against its SHA-256 and kept in pooch's cache
            folder for ffkernels.

    Raises:
        FileNotFoundError, NotADirectoryError: a missing folder or file.
        ValueError: a file that is damaged or not idx, files that do not fit each other, more than one candidate for a
            file or for the folder.
        ImportError: pooch is not installed (needed for the download only).
        OSError: the download failed.
    """
    if data_dir is None:
        name, paths = "mnist", _download()
    else:
        folder = _data_folder(Path(data_dir))
        place = folder.resolve()
        name = (place.parent if place.name == "raw" else place).name or "mnist"
        paths = [_find(folder, split, kind) for split in _SPLITS for kind in _KINDS]
    x_train, y_train, train_shape = _read_pair(*paths[:2])
    x_test, y_test, test_shape = _read_pair(*paths[2:])
    if train_shape != test_shape:
        raise ValueError(
            f"{paths[2]}: images of {test_shape[0]} x {test_shape[1]} pixels, but {paths[0]} has "
            f"{train_shape[0]} x {train_shape[1]}"
        )
    num_classes = 1 + int(max(y_train.max(), y_test.max()))
    return Dataset(name, x_train, y_train, x_test, y_test, (1, *train_shape), num_classes)


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """The data "digits" or "mnist", the latter from ``data_dir`` where one is given; see `load_mnist`."""
    return load_digits() if name == "digits" and data_dir is None else load_mnist(data_dir)


def read_idx(
    path: str | Path,
    dims: Sequence[int] | None = None,
) -> Tensor:
    """The content of an idx file of unsigned bytes (the format of MNIST's files), gzipped or not.

    Args:
        dims: the numbers of dimensions that are allowed; None: any.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not idx, truncated, with bytes left over, of another type or number of dimensions; names the file.
    """
    data = _read_bytes(Path(path))
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES:
        raise ValueError(f"{path}: not an idx file (it must begin with 00 00, a type and the number of dimensions)")
    if data[2] != 0x08:
        raise ValueError(f"{path}: must hold unsigned bytes (idx type 08), holds {_IDX_TYPES[data[2]]} ({data[2]:02X})")
    ndim = data[3]
    if ndim == 0 or (dims is not None and ndim not in dims):
        allowed = "at least 1" if dims is None else " or ".join(map(str, dims))
        raise ValueError(f"{path}: must have {allowed} dimensions, has {ndim}")
    header = 4 + 4 * ndim
    if len(data) < header:
        raise ValueError(f"{path}: truncated: {len(data)} bytes, less than its header of {header}")
    shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, header, 4)]
    expected = header + math.prod(shape)
    if len(data) != expected:
        what = "truncated" if len(data) < expected else "bytes left over at its end"
        raise ValueError(f"{path}: {what}: {len(data)} bytes, but shape {tuple(shape)} takes {expected}")
    if 0 in shape:
        raise ValueError(f"{path}: is empty: its shape is {tuple(shape)}")
    return torch.frombuffer(data, dtype=torch.uint8, offset=header).reshape(shape)


def read_images(path: str | Path) -> Tensor:
    """Images without labels: an idx file, or a .npy file of shape (B, K), (B, H, W) or (B, 1, H, W).

    Returns:
        (B, K) float32. Unsigned bytes are divided by 255; floating-point pixels are taken as they are.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or of another type or shape; names the file.
        ImportError: numpy is not installed (needed for .npy only).
    """
    path = Path(path)
    images = _read_npy(path) if path.suffix == ".npy" else read_idx(path, dims=(3,))
    if images.dim() not in (2, 3, 4) or (images.dim() == 4 and images.shape[1] != 1) or images.numel() == 0:
        raise ValueError(f"{path}: must have shape (B, K), (B, H, W) or (B, 1, H, W), has {tuple(images.shape)}")
    if images.dtype == torch.uint8:
        return images.flatten(1).float().div_(255)
    if not images.is_floating_point():
        raise ValueError(f"{path}: must hold unsigned bytes or floating-point numbers, holds {images.dtype}")
    return images.flatten(1).float()


def read_labels(path: str | Path) -> Tensor:
    """Labels (B,) int64 from an idx or .npy file; errors as for `read_images`."""
    path = Path(path)
    labels = _read_npy(path) if path.suffix == ".npy" else read_idx(path, dims=(1,))
    if labels.dim() != 1 or labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"{path}: must hold integers of shape (B,), holds {labels.dtype} {tuple(labels.shape)}")
    return labels.long()


def _read_npy(path: Path) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return torch.from_numpy(extra("numpy").load(path, allow_pickle=False))
    except (ValueError, EOFError, TypeError) as error:
        raise ValueError(f"{path}: not a usable .npy file: {error}") from error


def _read_bytes(path: Path) -> bytearray:
    """The file's content, unpacked if it is gzipped: looked at, not guessed from the name."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, must be an idx file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        return bytearray(raw)
    try:
        return bytearray(gzip.decompress(raw))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged or truncated gzip file: {error}") from error


def _data_folder(given: Path) -> Path:
    """``given`` itself, or the one folder at most two levels below it that holds any of the files."""
    if not given.exists():
        raise FileNotFoundError(f"data folder {given} does not exist")
    if not given.is_dir():
        raise NotADirectoryError(f"data folder {given} is not a folder")
    level = [given]
    for _ in range(3):
        found = [folder for folder in level if any(_named(folder, s, k) for s in _SPLITS for k in _KINDS)]
        if len(found) > 1:
            names = [str(folder.relative_to(given)) for folder in found]
            raise ValueError(f"{given} must hold one set of data, has {names}: name one of these folders")
        if found:
            return found[0]
        below = (p for folder in level for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
        level = sorted(p for p in below if os.access(p, os.R_OK | os.X_OK))
    return given  # the error will name what it lacks


def _named(folder: Path, split: str, kind: str) -> list[Path]:
    """The files in ``folder`` whose name says that they are of this split and kind."""
    pattern = re.compile(rf"(.*[-_.])?({split})[-_.]{kind}[-_.]idx{_KINDS[kind]}[-_.]ubyte(\.gz)?", re.IGNORECASE)
    found = sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name) and p.is_file())
    return [p for p in found if p.suffix != ".gz" or p.with_suffix("") not in found]  # the same file twice


def _find(folder: Path, split: str, kind: str) -> Path:
    found = _named(folder, split, kind)
    if not found:
        raise FileNotFoundError(f"{folder} has no file {split.partition('|')[0]}-{kind}-idx{_KINDS[kind]}-ubyte[.gz]")
    if len(found) > 1:
        raise ValueError(f"{folder} must have one file of {split} {kind}, has {[p.name for p in found]}")
    return found[0]


def _read_pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """x (B, H W) float32 in [0, 1], y (B,) int64, (H, W)."""
    images = read_idx(images_path, dims=(3,))
    labels = read_idx(labels_path, dims=(1,))
    if len(images) != len(labels):
        raise ValueError(f"{labels_path}: {len(labels)} labels, but {images_path} has {len(images)} images")
    return images.flatten(1).float().div_(255), labels.long(), (images.shape[1], images.shape[2])


def _download() -> list[Path]:
    """MNIST's four files in pooch's cache, in the order of MNIST_SHA256; nothing is fetched that is there already."""
    pooch = extra("pooch")
    cache = Path(pooch.os_cache("ffkernels")) / "mnist"
    return [_retrieve(pooch, name, known_hash, cache) for name, known_hash in MNIST_SHA256.items()]


def _retrieve(pooch: Any, name: str, known_hash: str, cache: Path) -> Path:
    failures = []
    for mirror in MIRRORS:
        try:
            return Path(pooch.retrieve(mirror + name, f"sha256:{known_hash}", fname=name, path=cache))
        except (OSError, ValueError) as error:  # network errors are OSErrors; ValueError is a wrong checksum
            failures.append(f"{mirror}: {error}")
    raise OSError(
        f"{name} could not be downloaded; put MNIST's four files into a folder and pass it as data_dir "
        f"(--data-dir). {' | '.join(failures)}"
    )
