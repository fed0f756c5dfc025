"""Small idx files in the form of MNIST's."""

import gzip
import struct

NAMES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx_bytes(shape, values, code=0x08):
    """An idx file's content."""
    return bytes([0, 0, code, len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + bytes(values)


def write_folder(folder, *, rows=(6, 4), size=(3, 5), classes=4, pack=gzip.compress, suffix=".gz", names=NAMES):
    """MNIST's four files with pixels that count up; returns the raw content of each."""
    folder.mkdir(exist_ok=True)
    contents = []
    for count in rows:
        pixels = [i % 256 for i in range(count * size[0] * size[1])]
        contents += [idx_bytes((count, *size), pixels), idx_bytes((count,), [i % classes for i in range(count)])]
    for name, content in zip(names, contents, strict=True):
        (folder / (name + suffix)).write_bytes(pack(content))
    return contents
