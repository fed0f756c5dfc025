"""The reader of PTX that finds registers of wgmma products in flight, on a loop with one product a round."""

import pytest

from ffkernels.triton.in_flight import touched

PTX = """
.visible .entry kernel() {
\tmov.b32 %r1, 0;
$L__BB0_1: // the loop
\tBEFORE
\twgmma.fence.sync.aligned;
\t// begin inline asm
\twgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10,%r11,%r12,%r13}, {%r20,%r21,%r22,%r23}, %rd1, %p1, 1, 1, 1;
\t// end inline asm
\twgmma.commit_group.sync.aligned;
\tBESIDE
\twgmma.wait_group.sync.aligned WAIT;
\t@%p2 bra $L__BB0_1;
\tAFTER
\twgmma.wait_group.sync.aligned 0;
\tst.global.b32 [%rd2], %r10;
\tret;
}
"""
WAITED = {"BEFORE": "", "BESIDE": "", "AFTER": "", "WAIT": "0"}
SPIN = """{
\t.reg .pred complete;
\twaitLoop:
\tmbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], %r2;
\t@!complete bra.uni waitLoop;
\t}"""


def found(**parts):
    text = PTX
    for name, value in {**WAITED, **parts}.items():
        text = text.replace(name, value)
    return [(t.text.removeprefix("@%p3 ").split()[0], t.registers) for t in touched(text)]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({}, []),
        ({"BEFORE": "ld.shared.v2.b32 {%r20, %r21}, [%r1+16];"}, []),  # the round before was waited for
        ({"BEFORE": "ld.shared.v2.b32 {%r20, %r21}, [%r1+16];", "WAIT": "1"}, ["ld.shared.v2.b32"]),
        ({"BEFORE": "ld.shared.v2.b32 {%r30, %r20}, [%r22];"}, []),
        ({"BESIDE": "mov.b32 %r21, 0;"}, ["mov.b32"]),
        ({"BESIDE": "add.f32 %r1, %r20, %r21;"}, []),  # sources may be read
        ({"BESIDE": "add.f32 %r1, %r12, %r21;"}, ["add.f32"]),  # accumulators may not
        ({"BESIDE": "@%p3 mov.b32 %r13, 0;"}, ["mov.b32"]),
        ({"BESIDE": "st.shared.b32 [%r1], %r10;"}, ["st.shared.b32"]),
        ({"BESIDE": "st.shared.b32 [%r1], %r20;"}, []),
        ({"AFTER": "mov.b32 %r20, 0;", "WAIT": "1"}, ["mov.b32"]),
        ({"AFTER": "mov.b32 %r20, 0;"}, []),
        ({"BEFORE": SPIN, "WAIT": "1"}, []),
        ({"BEFORE": SPIN, "BESIDE": SPIN + " mov.b32 %r20, 0;"}, ["mov.b32"]),
    ],
)
def test_what_is_found(parts, expected):
    assert [name for name, _ in found(**parts)] == expected


def test_the_registers_are_named():
    assert found(BESIDE="mov.b32 %r21, %r20;") == [("mov.b32", ("%r21",))]
