"""The machine code in the extension: no spills, registers and shared memory for the blocks that the plan counts on, and
main loops that multiply on tensor cores while the next tiles are on their way."""

import functools
import glob
import io
import os
import re
import shutil
import subprocess
import sysconfig
import zipfile
from collections import Counter

import pytest
from ptx.limits import blocks_per_sm, limits

from ffkernels import _extension

from .gpu import MATHS, REGISTERS, Gpu, needs_kernels, shared_bytes

pytestmark = [needs_kernels, pytest.mark.slow]
ARCHS = ("80", "86", "89", "90", "100", "120")
BUILT = [a.removesuffix("+PTX").replace(".", "") for a in (_extension.build_info() or {}).get("cuda_archs", [])]
on_each_arch = pytest.mark.parametrize("arch", [a for a in ARCHS if a in BUILT])


@functools.cache
def cuobjdump(*options):
    """What cuobjdump says of the extension; it comes with Triton and with the toolkit."""
    found = [
        shutil.which("cuobjdump"),
        *glob.glob(sysconfig.get_path("purelib") + "/triton/backends/nvidia/bin/cuobjdump"),
        "/usr/local/cuda/bin/cuobjdump",
    ]
    tool = next(path for path in found if path and os.access(path, os.X_OK))
    done = subprocess.run([tool, *options, str(_extension._LIBRARY)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def resources(arch):
    """By kernel: registers, and bytes of stack and local memory, where spills go."""
    found = {}
    for name, numbers in re.findall(
        r"Function (\w+):\n\s+(.*)", cuobjdump("--dump-resource-usage", "-arch", f"sm_{arch}")
    ):
        if name.startswith("ff_stages_"):
            found[name.removeprefix("ff_stages_")] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", numbers)}
    return found


def instructions(arch, math):
    """(address, text) of a kernel's machine code."""
    text = cuobjdump("--dump-sass", "-arch", f"sm_{arch}", "-fun", f"ff_stages_{math}")
    return [(int(at, 16), code.strip()) for at, code in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]*);", text)]


def opcode(text):
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def main_loops(code):
    """The innermost loops that start asynchronous loads: the instructions of each."""
    loops = []
    for at, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) <= at:
            loops.append((int(target[1], 16), at))
    starts = [at for at, text in code if opcode(text).startswith("LDGDEPBAR")]
    around = {
        min(((lo, hi) for lo, hi in loops if lo <= at <= hi), key=lambda r: r[1] - r[0], default=None) for at in starts
    }
    # the loads before a main loop stand in outer loops, which hold several commits
    inner = [r for r in around if r and sum(r[0] <= at <= r[1] for at in starts) == 1]
    return [[text for at, text in code if lo <= at <= hi] for lo, hi in sorted(inner)]


@pytest.mark.skipif(os.environ.get("FFKERNELS_CI") != "1", reason="asked of the build in CI only")
def test_every_architecture_is_built():
    assert set(ARCHS) <= set(BUILT)
    assert _extension.build_info()["cuda_archs"][-1].endswith("+PTX")  # for GPUs that come later


@pytest.mark.skipif(os.environ.get("FFKERNELS_CI") != "1", reason="asked of the build in CI only")
def test_a_wheel_of_every_architecture_is_small():
    """A wheel is the package, compressed; 20 MB are allowed."""
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as wheel:
            for path in _extension._LIBRARY.parent.rglob("*"):
                if path.suffix in (".py", ".so"):
                    wheel.write(path)
        assert file.tell() < 20e6


@on_each_arch
def test_no_spills(arch):
    assert set(resources(arch)) == set(MATHS)
    for math, used in resources(arch).items():
        assert (used["STACK"], used["LOCAL"]) == (0, 0), f"ff_stages_{math}"


@on_each_arch
def test_as_many_blocks_fit_as_the_plan_counts_on(arch):
    """What the occupancy API says on that device, from the compiled registers; tests of plans assume no more."""
    lim = limits(int(arch))
    for i, math in enumerate(MATHS):
        used = resources(arch)[math]
        assert used["REG"] <= REGISTERS
        assert used["SHARED"] == (1024 if int(arch) >= 90 else 0)  # the system's own, from sm_90 on
        fitting = blocks_per_sm(lim, 128, shared_bytes(math), used["REG"])
        assert Gpu(int(arch)).blocks()[i] <= fitting
        assert fitting >= (3 if lim.shared_per_sm > 128 * 1024 else 1)


@on_each_arch
@pytest.mark.parametrize("math", MATHS)
def test_main_loops_load_while_they_multiply(arch, math):
    code = instructions(arch, math)
    assert not [text for _, text in code if opcode(text).startswith(("LDL", "STL"))]
    loops = main_loops(code)
    assert len(loops) == 2  # of the forward pass and of the update
    for loop in loops:
        count = Counter(opcode(text).split(".")[0] for text in loop)
        assert count["LDGSTS"] >= 8  # copies from global to shared memory that nobody waits for at once
        if math == "f32":
            assert count["FFMA"] >= 64
        else:
            assert count["HMMA"] >= 16
        (left,) = re.findall(r"DEPBAR\.LE SB0, 0x([0-9a-f]+)", "\n".join(loop))
        assert int(left, 16) >= 1  # loads in flight behind those that are waited for


def unordered(code):
    """What is wrong about the accesses by which blocks wait for each other, and about loads of what others write.

    An acquire empties L1 (CCTL.IVALL) before anything else is loaded, or a line from before the wait would still be
    read there; a release waits for the stores before it (MEMBAR) before it counts. A load that the compiler takes for
    one of constants (LDG.E.CONSTANT) goes by neither.
    """
    wrong, fenced, stale = [], False, None
    for _, text in code:
        op = opcode(text)
        if op.startswith("MEMBAR") and op.endswith(".GPU"):
            fenced = True
        elif op == "CCTL.IVALL":
            stale = None
        elif op.startswith(("LDG", "ATOMG", "RED", "STG", "BAR", "EXIT", "BRA")):
            if stale:
                wrong.append(f"{text} follows {stale} without CCTL.IVALL")
                stale = None
            if ".CONSTANT" in op:
                wrong.append(f"{text} takes memory for constant")
            if op.startswith("ATOMG") and not fenced:
                wrong.append(f"{text} without MEMBAR")
            if op.startswith("ATOMG") or (op.startswith("LDG.") and ".STRONG.GPU" in op):
                stale = text
            fenced = False
    return wrong


@on_each_arch
@pytest.mark.parametrize("math", MATHS)
def test_what_other_blocks_write_is_read_after_them(arch, math):
    code = instructions(arch, math)
    strong = Counter(opcode(text).split(".")[0] for _, text in code if ".STRONG.GPU" in text)
    assert strong["LDG"] >= 1  # of the grid's barrier
    assert strong["ATOMG"] >= 6  # beside it: tiles of rows, of columns, of weights, all rows of a layer, the last block
    assert unordered(code) == []


def test_an_access_without_its_order_is_seen():
    acquire = ["LDG.E.STRONG.GPU R2, [R4.64]", "CCTL.IVALL", "LDG.E R2, [R6.64]"]
    release = ["STG.E [R6.64], R2", "MEMBAR.ALL.GPU", "ERRBAR", "ATOMG.E.ADD.STRONG.GPU PT, R3, [R4.64], R5"]

    def found(*lines):
        return unordered(list(enumerate(lines)))

    assert found(*release, *acquire[1:], *acquire) == []
    assert found(acquire[0], acquire[2]) == [f"{acquire[2]} follows {acquire[0]} without CCTL.IVALL"]
    assert found(release[0], *release[2:], "CCTL.IVALL") == [f"{release[3]} without MEMBAR"]
    assert found(*release, "BAR.SYNC 0x0") == [f"BAR.SYNC 0x0 follows {release[3]} without CCTL.IVALL"]
    assert found("LDG.E.CONSTANT R2, [R4.64]") == ["LDG.E.CONSTANT R2, [R4.64] takes memory for constant"]


def test_a_spill_or_a_loop_that_waits_is_seen():
    """The checks above on made-up machine code."""
    text = [(0, "MOV R1, c[0x0][0x28]"), (16, "LDGSTS.E [R2], [R4.64]"), (32, "LDGDEPBAR"), (48, "DEPBAR.LE SB0, 0x0")]
    assert main_loops([*text, (64, "@P0 BRA 0x10")]) == [[t for _, t in text[1:]] + ["@P0 BRA 0x10"]]
    assert main_loops(text) == []
    assert opcode("@!P0 LDL.64 R2, [R1]").startswith("LDL")
