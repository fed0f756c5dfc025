"""Faults planted in the CUDA host code, each of which the tests named beside it must catch.

    python tests/cuda_host/faults.py            all of them; exit status 1 if one survives

All are compiled at once, into a library of the host code alone: the environment says which of them is on. What that
code would launch runs in the PTX interpreter, as in all tests here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mutate
from mutate import ROOT, Fault

PLANTED = "FFKERNELS_TEST_FAULT"
PLANTED_H = f"""#pragma once
#include <cstdlib>
inline bool planted(int i) {{
  const char* on = std::getenv("{PLANTED}");
  return on && std::atoi(on) == i;
}}
"""
NONE = """#include "cuda/device.h"
std::string ffkernels::cuda::devices() { return R"({"driver": null})"; }
extern "C" void none() { __builtin_trap(); }
"""
SOURCES = ("ops.cpp", "cuda/call.cpp", "cuda/layer_ops.cpp", "cuda/network_ops.cpp", "cuda/plan.cpp", "cuda/record.cpp")


def _ops(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/cuda_host/test_ops.py::{name}" for name in names)


def _plans(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/cuda_host/test_plan.py::{name}" for name in names)


def _minibatches(*names: str) -> tuple[str, ...]:
    return tuple(f"tests/cuda_host/test_minibatches.py::{name}" for name in names)


# old and new are expressions of one type
FAULTS = [
    Fault("more blocks than are resident", "cuda/plan.cpp", "std::min(items, device.capacity(part.math))", "items",
          _plans("test_blocks_that_wait_for_each_other_are_resident")),
    Fault("blocks that wait for each other in an ordinary launch", "cuda/plan.cpp", "end - stage > 1", "false",
          _ops("test_ops[ff_step_-highest]")),
    Fault("the last stage is not run", "cuda/plan.cpp", "part.params.stage_end = end",
          "part.params.stage_end = end - 1",
          _ops("test_ops[ff_step_-highest]")),
    Fault("layers of different precision in one launch", "cuda/plan.cpp",
          "problem.maths[begin + count] == part.math", "true", _ops("test_layers_of_different_precision")),
    Fault("no room for the sums of dropped inputs", "cuda/plan.cpp", "partial_count(problem.rows, widest)",
          "partial_count(problem.rows, widest) / 2", _ops("test_ops[ff_network_step_-highest]")),
    Fault("no room for the counters of columns", "cuda/plan.cpp", "word_count(layers, row_tiles, weight_tiles)",
          "word_count(layers, row_tiles, weight_tiles) - 2 * weight_tiles", _ops("test_ops[ff_network_step_-highest]")),
    Fault("y of a layer over the y that is still read", "cuda/network_ops.cpp", "i % 3", "i & 1",
          _ops("test_networks[4-False]")),
    Fault("one p for all layers", "cuda/network_ops.cpp", "i % 2", "0 * i",
          _ops("test_options[ff_network_step_-gelu]")),
    Fault("every layer has the first one's goodness", "cuda/network_ops.cpp", "total + i * rows", "total + 0 * rows",
          _ops("test_networks[2-False]")),
    Fault("columns that lie apart are taken as neighbours", "cuda/call.cpp", "t.stride(cols)", "int64_t{1}",
          _ops("test_strided_arguments[ff_forward]")),
    Fault("a bias that lies apart is taken as contiguous", "cuda/call.cpp", "bias->stride(0)", "int64_t{1}",
          _ops("test_strided_arguments[ff_forward]")),
    Fault("labels that lie apart are taken as contiguous", "cuda/call.cpp", "labels.row_stride[c] = t.stride(rows)",
          "labels.row_stride[c] = 1", _ops("test_strided_arguments[ff_label_step_]")),
    Fault("negative rows count as positive", "cuda/call.cpp", 'checked_int(x.size(rows), "x")',
          'checked_int(2 * x.size(rows), "x")', _ops("test_ops[ff_label_step_-highest]")),
    Fault("the second moment is corrected as the first", "cuda/call.cpp", "std::log(given.beta2)",
          "std::log(given.beta1)", _ops("test_optimizers[adam]")),
    Fault("the bias's moments change places", "optimizer_arguments.h", "flat.state[1 + slots + i]",
          "flat.state[2 * slots - i]", _ops("test_optimizers[adam]")),
    Fault("every layer has the first one's learning rate", "network_arguments.h", "n.hypers[5 * i]", "n.hypers[0]",
          _ops("test_every_layer_has_its_own_optimizer[False]")),
    Fault("every layer has the first one's tensor of it", "network_arguments.h", "n.lrs[i]", "n.lrs[0]",
          _ops("test_every_layer_has_its_own_optimizer[True]")),
    Fault("one buffer for what a layer hands on, of all minibatches", "cuda/network_ops.cpp",
          "several ? rows * widest : 0", "int64_t{0}", _minibatches("test_one_launch[2-2-False-bf16]")),
    Fault("every minibatch has the first one's rows", "cuda/call.cpp", "*minibatch = t.stride(0)", "*minibatch = 0",
          _minibatches("test_one_launch[1-2-False-bf16]")),
    Fault("every minibatch has the first one's loss", "cuda/network_ops.cpp", "minibatches.loss = layers",
          "minibatches.loss = 0", _minibatches("test_one_launch[1-2-False-bf16]")),
    Fault("every minibatch has the first one's dropout", "cuda/network_ops.cpp", "network.dropout_seed->stride(0)",
          "int64_t{0}", _minibatches("test_all_that_a_step_can_have[False]")),
    Fault("minibatches overlap where a step is several launches", "cuda/plan.cpp", "parts.size() == 1 ? all : 1", "all",
          _minibatches("test_layers_of_different_precision_take_turns")),
    Fault("minibatches have the blocks of one", "cuda/plan.cpp", "step < steps()", "step < 1",
          _plans("test_a_grid_for_minibatches_that_overlap")),
    Fault("a target may be an input", "arguments.h", "a.first >= b.second || b.first >= a.second", "true",
          _plans("test_targets_that_share_memory_are_refused[ff_update_]")),
    Fault("memory may be freed", "arguments.h", "end * width_of(dtype) <= bytes", "true",
          _plans("test_wrong_arguments_are_refused_and_change_nothing[ff_forward]")),
]  # fmt: skip


def build(folder: Path) -> Path:
    """The host code with all faults in it, as an extension that knows no other kernels."""
    import torch

    files: dict[str, str] = {}
    for i, fault in enumerate(FAULTS):
        text = files.get(fault.file) or (ROOT / "csrc" / fault.file).read_text()
        if text.count(fault.old) != 1:
            raise RuntimeError(f"{fault.old!r} stands {text.count(fault.old)} times in {fault.file}, not once")
        files[fault.file] = text.replace(fault.old, f"(planted({i}) ? ({fault.new}) : ({fault.old}))")
    csrc = folder / "csrc"
    for file in (ROOT / "csrc").rglob("*.[ch]*"):
        copy = csrc / file.relative_to(ROOT / "csrc")
        copy.parent.mkdir(parents=True, exist_ok=True)
        name = str(file.relative_to(ROOT / "csrc"))
        text = files.get(name, file.read_text())
        copy.write_text(f'#include "planted.h"\n{text}' if name in files else text)
    (csrc / "planted.h").write_text(PLANTED_H)
    (csrc / "build_info.inc").write_text('R"json({"cuda": "", "cuda_archs": []})json"\n')
    (csrc / "none.cpp").write_text(NONE)
    torch_folder = Path(torch.__file__).parent
    flags = ["-O0", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-DFFKERNELS_WITH_CUDA"]
    flags += ["-I", str(csrc), "-isystem", str(torch_folder / "include")]
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    objects = []
    for source in (*SOURCES, "none.cpp"):
        objects.append(str(folder / f"{source.replace('/', '_')}.o"))
        subprocess.run([*compiler, *flags, "-c", str(csrc / source), "-o", objects[-1]], check=True)
    # the kernels of other devices, and the launcher, which no test calls
    names = {"defined": set(), "undefined": set()}
    for kind, found in names.items():
        done = subprocess.run(["nm", f"--{kind}-only", *objects], check=True, capture_output=True, text=True)
        found |= set(re.findall(r"\b[A-Za-z] (_ZNK?9ffkernels\w+)$", done.stdout, re.MULTILINE))
    missing = [f"-Wl,--defsym={name}=none" for name in sorted(names["undefined"] - names["defined"])]
    library = folder / "_C.abi3.so"
    link = [
        *compiler,
        "-shared",
        *objects,
        *missing,
        "-L",
        str(torch_folder / "lib"),
        "-ltorch_cpu",
        "-o",
        str(library),
    ]
    subprocess.run(link, check=True)
    return library


def begin(library: Path, fault: Fault | None) -> None:
    """In a process of its own: its extension is the library, with the fault in it."""
    from ffkernels import _extension

    _extension._LIBRARY = library
    os.environ[PLANTED] = str(-1 if fault is None else FAULTS.index(fault))


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        library = build(Path(folder))
        return mutate.report(
            FAULTS, partial(mutate.run, jobs=1, prepare=lambda *_: ROOT, begin=partial(begin, library))
        )


if __name__ == "__main__":
    sys.exit(main())
