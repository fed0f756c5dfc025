"""The CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer: `make sanitize` runs this.

1. cpu/driver.cpp, which runs the kernels without torch, under each of them.
2. A fault for each, planted in a copy of the sources, which it must report (tests/test_sanitize.py runs these too).
3. The extension under address and undefined, with the tests that pytest's arguments select: what checks the arguments
   and makes the outputs is only in there.

Scratch memory is one block that the kernels cut up themselves. In the copies that are compiled here the gaps between
its arrays are marked as out of bounds. AMX's tiles are computed in software here, since no sanitizer sees what the
instructions load and store.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import edited
import torch
from edited import AMX_FLAGS, AMX_IN_SOFTWARE, Edit, build_extension, compiler, copy_of_sources

SOURCES = ("portable", "avx2", "avx512", "amx", "isa")
MEMORY, THREADS = "address,undefined", "thread"
FLAGS = ("-std=c++17", "-O1", "-g1", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all")
# What every test of the kernels' arithmetic is made of, and the calls that must fail
FILES = ("cpu_kernels", "head_step", "network_forward", "apply_gradient", "extension", "errors")
TESTS = [*(f"tests/test_{name}.py" for name in FILES), "-m", "not slow"]
TESTS += ["-k", "not in_its_own_way"]  # without -O2 gcc makes no fused multiply-add: avx2 gives portable's bits


RED_ZONES = [
    Edit("cpu/layer.h", "#pragma once\n", "#pragma once\n#include <sanitizer/asan_interface.h>\n"),
    Edit(
        "cpu/layer.h",
        r"used \+= (round_up\(count \* [^;]*, 64\)) \+ 64;",
        r"const int64_t whole = \1 + 64, bytes = count * static_cast<int64_t>(sizeof(V)); used += whole;"
        r"if (base) { ASAN_UNPOISON_MEMORY_REGION(pointer, bytes);"
        r"ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(pointer) + bytes, whole - bytes); }",
    ),
]
# W in several blocks where rows are many, without the size that takes
SMALL_BLOCKS = Edit("cpu/layer.h", "kWeightBytes = 1 << 20", "kWeightBytes = 1 << 14")


class Fault(NamedTuple):
    sanitizer: str
    edits: list[Edit]
    report: str


FAULTS = {
    "a row of results written one too far": Fault(
        MEMORY, [Edit("cpu/elementwise.h", r"i < used; \+\+i\) set\(", "i <= used; ++i) set(")],
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "scratch arrays one value short": Fault(
        MEMORY, [*RED_ZONES, Edit("cpu/layer.h", r"bytes = count \*", "bytes = (count - (count > 0)) *")],
        "AddressSanitizer: use-after-poison",
    ),
    "a vector loaded through a pointer to vectors": Fault(
        MEMORY,
        [Edit("cpu/simd.h", r"__builtin_memcpy\(&v, p, sizeof v\)", "v = *reinterpret_cast<const Vector*>(p)")],
        "runtime error: load of misaligned address",
    ),
    "threads whose shares overlap": Fault(
        THREADS, [Edit("cpu/layer.h", r"\(thread \+ 1\) \* each\)\}", "(thread + 1) * each + 1)}")],
        "ThreadSanitizer: data race",
    ),
    "a strip of rows read before it is packed": Fault(
        THREADS, [Edit("cpu/layer.h", r"while \(done_\[strip\]\.load", "while (false && done_[strip].load")],
        "ThreadSanitizer: data race",
    ),
    "threads of the head whose shares overlap": Fault(
        THREADS, [Edit("cpu/head.h", r"\(thread \+ 1\) \* each\)", "(thread + 1) * each + 1)")],
        "ThreadSanitizer: data race",
    ),
}  # fmt: skip


def build_driver(folder: Path, sanitizer: str, edits: Iterable[Edit] = (), isas: Iterable[str] = SOURCES) -> Path:
    """The driver with the kernels of ``isas``; with not all of them, only those can be run."""
    csrc = copy_of_sources(folder, [*edits, SMALL_BLOCKS, *AMX_IN_SOFTWARE])
    include = Path(torch.__file__).parent / "include"
    flags = [*FLAGS, *AMX_FLAGS, f"-fsanitize={sanitizer}", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    flags += ["-I", str(csrc), "-isystem", str(include)]
    files = [*(csrc / "cpu" / f"{name}.cpp" for name in isas), Path(__file__).parent / "cpu" / "driver.cpp"]
    if set(isas) != set(SOURCES):
        flags.append("-DPORTABLE_ONLY")
    running: list[subprocess.Popen] = []
    for file in files:
        running.append(subprocess.Popen([*compiler(), *flags, "-c", str(file), "-o", str(folder / f"{file.stem}.o")]))
        if len(running) % (os.cpu_count() or 1) == 0:
            running[-1].wait()
    if any(process.wait() for process in running):
        raise RuntimeError("sanitize.py: compilation failed, see above")
    driver = folder / "driver"
    objects = [str(folder / f"{file.stem}.o") for file in files]
    subprocess.run([*compiler(), f"-fsanitize={sanitizer}", *objects, "-o", str(driver), "-lpthread"], check=True)
    return driver


def run_driver(driver: Path, *isas: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"TSAN_OPTIONS": "halt_on_error=1"}
    return subprocess.run([str(driver), *isas], env=environment, capture_output=True, text=True)


def caught(fault: Fault, folder: Path) -> bool:
    """Whether the sanitizer reports the fault in the portable kernels."""
    driver = build_driver(folder, fault.sanitizer, fault.edits, ("portable",))
    done = run_driver(driver, "portable")
    return done.returncode != 0 and fault.report in done.stderr


def run_tests(folder: Path, arguments: list[str]) -> int:
    """Run pytest with the extension, built under address and undefined; its exit status."""
    edits = [*RED_ZONES, *AMX_IN_SOFTWARE]
    build_extension(folder, edits, [*FLAGS[1:], *AMX_FLAGS, f"-fsanitize={MEMORY}"])
    libraries = [
        subprocess.check_output([*compiler(), f"-print-file-name=lib{name}.so"], text=True).strip()
        for name in ("asan", "ubsan")
    ]
    # python itself leaks; torch's workers exit without freeing
    environment = {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    return edited.run_tests(folder, arguments, environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", default=TESTS, help="pytest's arguments, after --")
    arguments = parser.parse_args()
    failed, start = [], time.monotonic()

    def report(what: str, good: bool) -> None:
        print(f"{time.monotonic() - start:4.0f} s  {what}: {'ok' if good else 'FAILED'}", flush=True)
        if not good:
            failed.append(what)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for sanitizer, edits in ((MEMORY, RED_ZONES), (THREADS, [])):
            driver = build_driver(folder / sanitizer, sanitizer, edits)
            for isa in run_driver(driver).stdout.strip().split(","):
                done = run_driver(driver, isa)
                report(f"{isa} kernels under {sanitizer}", done.returncode == 0 and "clean" in done.stdout)
                if done.returncode:
                    print(done.stderr)
        for i, (what, fault) in enumerate(FAULTS.items()):
            report(f"planted fault ({what}) is caught", caught(fault, folder / str(i)))
        good = run_tests(folder / "extension", arguments.tests) == 0
        report(f"the extension under {MEMORY}", good)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
