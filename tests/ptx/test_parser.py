"""PTX text: what the parser takes, and that it refuses what it does not know."""

import re
from pathlib import Path

import pytest
import torch

from . import Unsupported, decode, run
from .parser import parse
from .syntax import Addr, Imm, Loc, Pair, PtxSyntaxError, Reg, Sym, Vec

HEAD = ".version 9.0\n.target sm_90a, texmode_independent\n.address_size 64\n"


def body(text, entry=".visible .entry k()"):
    return parse(f"{HEAD}{entry} {{ {text} }}").functions["k"]


def test_module():
    module = parse(
        HEAD
        + """// a comment
        .file 1 "dir/a.cu", 0, 12
        /* another,
           longer */
        .extern .shared .align 16 .b8 dynamic[];
        .visible .global .align 4 .u32 table[2][3] = {{1, 0x2, 0b11}, {-4, 5U, 06}};
        .const .f64 pi = 0d400921FB54442D18;
        .extern .func (.param .b32 r) outside (.param .b64 a);
        .weak .entry k(.param .u64 .ptr .global .align 1 a, .param .align 8 .b8 s[24])
        .maxntid 128, 1, 1
        .minnctapersm 2
        { .pragma "nounroll"; ret; }
        .section .debug_str { .b8 1, 2 }
        """
    )
    assert (module.version, module.target, module.arch, module.files) == ((9, 0), "sm_90a", 90, {1: "dir/a.cu"})
    assert module.variables["dynamic"].size == 0
    assert [i.value for i in module.variables["table"].init] == [1, 2, 3, -4, 5, 6]
    assert module.variables["pi"].init[0].bits == 0x400921FB54442D18
    k = module.functions["k"]
    assert [(p.name, p.align, p.size) for p in k.params] == [("a", 8, 8), ("s", 8, 24)]
    assert k.directives == {".maxntid": [128, 1, 1], ".minnctapersm": [2]}
    assert module.functions["outside"].body is None


def test_operands():
    fn = body(
        """.reg .b32 %r<4>; .reg .pred %p, q; .reg .b64 %rd<2>; .shared .b32 s;
        ld.shared.v2.u32 {%r0, _}, [s+4]; st.global.u32 [%rd1+-8], 0x10; @!%p setp.lt.and.s32 %p|q, %r1, -3, !q;
        mov.f32 %r2, 0f3F800000; add.f64 %rd0, %rd1, 1.5e1; mov.u32 %r3, s; cp.x [%rd0, {%r1, %r2}], [%r3];"""
    )
    load, store, compare, constant, decimal, symbol, coordinates = fn.body
    assert isinstance(load.operands[0], Vec)
    assert load.operands[1] == Addr(Sym("s"), 4)
    assert store.operands == (Addr(Reg("%rd1", "b64"), -8), Imm(16))
    assert (compare.guard.name, compare.guard_negated) == ("%p", True)
    assert compare.operands[0] == Pair(Reg("%p", "pred"), Reg("q", "pred"))
    assert constant.operands[1] == Imm(1.0, 0x3F800000)
    assert decimal.operands[2] == Imm(15.0)
    assert symbol.operands[1] == Sym("s")
    assert coordinates.operands[0].coords == (Reg("%r1", "b32"), Reg("%r2", "b32"))


def test_scopes():
    """Inline assembly declares its own registers and labels: the inner name hides the outer."""
    fn = body(
        """.reg .b32 %r; .reg .pred %p; mov.u32 %r, 1;
        { .reg .b32 %r; mov.u32 %r, 2; LOOP: @%p bra LOOP; } { .reg .b32 %r; LOOP: mov.u32 %r, 3; @%p bra LOOP;
        } mov.u32 %r, 4;"""
    )
    names = [i.operands[0].name for i in fn.body]
    assert names[0] == names[5]
    assert len({names[0], names[1], names[3]}) == 3
    targets = [fn.labels[i.operands[0].name] for i in fn.body if i.opcode == "bra"]
    assert targets == [2, 3]


def test_locations():
    """.loc has no semicolon; inlined code counts for the line that the author of the kernel wrote."""
    fn = body(
        """.reg .b32 %r;
        .loc 1 10 3 // a comment
        mov.u32 %r, 1;
        .loc 2 50 1, function_name $L__info_string0, inlined_at 1 11 5
        mov.u32 %r, 2;
        .loc 3 70 1, function_name $L__info_string1, inlined_at 2 50 1
        mov.u32 %r, 3;
        .loc 1 0 3
        mov.u32 %r, 4;"""
    )
    assert [i.loc for i in fn.body] == [Loc(1, 10), Loc(1, 11), Loc(1, 11), Loc(1, 11)]
    assert [i.line for i in fn.body] == [6, 8, 10, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mov.u32 %r, 1;", "line 4: register %r is not declared"),
        (".reg .v4 .b32 %r;", "line 4: register type .v4 is not supported"),
        (".reg .b32 %r; mov.u32 %r 1;", "line 4: expected ';'"),
        (".unknown 3;", "line 4: unknown directive in a function"),
        ("ret; `", "unexpected character"),
    ],
)
def test_syntax_errors(text, message):
    with pytest.raises(PtxSyntaxError, match=re.escape(message)):
        body(text)


def test_unclosed_body():
    with pytest.raises(PtxSyntaxError, match="not closed"):
        parse(HEAD + ".entry k() { ret;")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bra NOWHERE;", "no label NOWHERE"),
        ("mov.u64 %d, nothing;", "no variable nothing"),
        ("add.u32 %d, %d, %d;", "%d has 64 bits, the instruction needs 32 bits"),
        ("call (r), outside, (r);", "extern function outside is not implemented"),
        ("call (r), %d, (r);", "indirect calls are not implemented"),
        ("call again;", "recursion through again is not implemented"),
        ("mov.u32 %e, %smid.x;", "is not declared"),
        ("fma.f32x4 %e, %e, %e, %e;", "no type"),
        ("shfl.up.b32 %e, %e, 1, 0;", "only .sync is implemented"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%e], 32;", "not implemented"),
    ],
)
def test_what_is_not_implemented_names_itself(text, message):
    module = (
        f"{HEAD}.extern .func (.param .b32 r) outside (.param .b32 a);\n.func again() {{ call again; ret; }}\n"
        f".entry k() {{ .reg .b64 %d; .reg .b32 %e; .param .b32 r;\n{text}\nret; }}"
    )
    with pytest.raises((Unsupported, PtxSyntaxError), match=re.escape(message)):
        run(module, "k", 1, 1, 0, [])


def test_every_opcode_has_a_test():
    """Each opcode that the decoder takes stands in a test of this folder."""
    run(HEAD + ".entry k() { ret; }", "k", 1, 1, 0, [])  # registers the opcodes
    text = "".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py") if p.name != "test_parser.py")
    missing = [
        name for name in decode.OPCODES if not re.search(rf"(?<![\w.]){name}[.{{ ;]", text) and f'"{name}"' not in text
    ]
    assert missing == []


def test_none_is_null():
    """None is a null pointer."""
    text = f"""{HEAD}.entry k(.param .u64 a, .param .u64 b) {{
        .reg .b64 %a, %b; ld.param.u64 %a, [a]; ld.param.u64 %b, [b]; st.global.u64 [%b], %a; ret; }}"""
    out = torch.ones(1, dtype=torch.int64)
    run(text, "k", 1, 1, 0, [None, out])
    assert out == 0
