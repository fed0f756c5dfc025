"""The layout of the kernels' argument in Python is that of the C++ compiler."""

import ctypes
import subprocess

from ptx import engine

from . import emulate, params


def test_layout(tmp_path):
    paths = {path: offset for path, (offset, _) in params.FIELDS.items() if "layer[" not in path or "layer[1]" in path}
    checks = [f'static_assert(offsetof(Params, {path}) == {offset}, "{path}");' for path, offset in paths.items()]
    math_ = [f'static_assert(shared_bytes(Math::{m}) == {emulate.shared_bytes(m)}, "{m}");' for m in params.MATHS]
    source = tmp_path / "layout.cpp"
    source.write_text(f"""
#include <cstddef>
#include "cuda/params.h"
using namespace ffkernels::cuda;
static_assert(sizeof(Params) == {ctypes.sizeof(params.Params)}, "size");
static_assert(kTile == {params.TILE} && kThreads == {params.THREADS} && kMaxLayers == {params.MAX_LAYERS}, "sizes");
static_assert(kRowWords == {params.ROW_WORDS} && kRowVectors == {params.ROW_VECTORS}, "workspace");
static_assert(kSplitFloats == {params.SPLIT_FLOATS} && kBehind == {params.BEHIND} && kInTurn == {params.IN_TURN}, "");
{chr(10).join(checks + math_)}
""")
    command = [engine.compiler(), "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", f"-I{emulate.SOURCES}"]
    done = subprocess.run([*command, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(checks) > 80
