"""Operations between lanes, barriers and control flow (9.7.9, 9.7.12, 9.7.13)."""

import pytest
import torch

from . import Out, run
from .snippet import evaluate, from_ints, samples, to_ints

HEAD = ".version 8.8\n.target sm_80\n.address_size 64\n"
LANES = torch.arange(32, dtype=torch.int32)


def shfl(mode, lane, b, c):
    """The source lane and validity, from the definition in 9.7.9 (shfl.sync)."""
    clamp, segment = c & 31, c >> 8 & 31
    top = (lane & segment) | (clamp & ~segment & 31)
    bottom = lane & segment
    j = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | (b & ~segment & 31)}[mode]
    valid = j >= top if mode == "up" else j <= top
    return (j, True) if valid else (lane, False)


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize("group", [4, 8, 32])
@pytest.mark.parametrize("b", [0, 1, 3, 16, 31])
def test_shfl(mode, group, b):
    c = (32 - group) << 8 | (0 if mode == "up" else 31)
    value, valid = evaluate(
        f"shfl.sync.{mode}.b32 %o0|%o1, %i0, {b}, {c}, -1;", [("s32", 100 + LANES)], ["s32", "pred"]
    )
    want = [shfl(mode, lane, b, c) for lane in range(32)]
    assert value.tolist() == [100 + j for j, _ in want]
    assert valid.tolist() == [int(v) for _, v in want]


def test_vote_and_activemask():
    for bits in (0, 0xFFFFFFFF, 0x0F0F1234):
        p = from_ints([bits >> i & 1 for i in range(32)], "pred")
        body = (
            "vote.sync.ballot.b32 %o0, %i0, -1; vote.sync.all.pred %o1, %i0, -1; vote.sync.any.pred %o2, %i0, -1;"
            "vote.sync.uni.pred %o3, %i0, -1; vote.sync.ballot.b32 %o4, !%i0, -1; activemask.b32 %o5;"
        )
        ballot, every, some, uniform, negated, active = evaluate(
            body, [("pred", p)], ["b32", "pred", "pred", "pred", "b32", "b32"]
        )
        assert set(ballot.tolist()) == {bits}
        assert set(negated.tolist()) == {bits ^ 0xFFFFFFFF}
        assert every.tolist() == [int(bits == 0xFFFFFFFF)] * 32
        assert some.tolist() == [int(bits != 0)] * 32
        assert uniform.tolist() == [int(bits in (0, 0xFFFFFFFF))] * 32
        assert set(active.tolist()) == {0xFFFFFFFF}


@pytest.mark.parametrize("kind", ["b32", "b64"])
def test_match(kind):
    values = [i * i % 7 << (40 if kind == "b64" else 0) for i in range(32)]
    x = from_ints(values, kind)
    some, every, agree = evaluate(
        f"match.any.sync.{kind} %o0, %i0, -1; match.all.sync.{kind} %o1|%o2, %i0, -1;",
        [(kind, x)],
        ["b32", "b32", "pred"],
    )
    assert some.tolist() == [sum(1 << j for j, other in enumerate(values) if other == v) for v in values]
    assert not every.any()
    assert not agree.any()
    _, every, agree = evaluate(
        f"match.any.sync.{kind} %o0, %i0, -1; match.all.sync.{kind} %o1|%o2, %i0, -1;",
        [(kind, from_ints([9] * 32, kind))],
        ["b32", "b32", "pred"],
    )
    assert set(every.tolist()) == {0xFFFFFFFF}
    assert agree.all()


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_redux(kind):
    values = samples(kind, 0, 32)
    body = (
        f"redux.sync.add.{kind} %o0, %i0, -1; redux.sync.min.{kind} %o1, %i0, -1; redux.sync.max.{kind} %o2, %i0, -1;"
    )
    total, low, high = (to_ints(o, kind) for o in evaluate(body, [(kind, from_ints(values, kind))], [kind] * 3))
    mask = 0xFFFFFFFF
    assert {v & mask for v in total} == {sum(values) & mask}
    assert (set(low), set(high)) == ({min(values)}, {max(values)})
    body = "redux.sync.and.b32 %o0, %i0, -1; redux.sync.or.b32 %o1, %i0, -1; redux.sync.xor.b32 %o2, %i0, -1;"
    outs = [set(to_ints(o, "u32")) for o in evaluate(body, [(kind, from_ints(values, kind))], ["b32"] * 3)]
    conj, disj, parity = mask, 0, 0
    for v in values:
        conj, disj, parity = conj & v, disj | v, parity ^ v
    assert outs == [{conj & mask}, {disj & mask}, {parity & mask}]


def test_elect():
    lane, leader = evaluate("elect.sync %o0|%o1, -1;", [("s32", LANES)], ["b32", "pred"], target="sm_90")
    assert leader.sum() == 1
    assert set(lane.tolist()) == {leader.tolist().index(1)}


def test_sync_operations_of_disjoint_groups():
    """Half-warps that have diverged each shuffle under their own mask; bar.warp.sync brings them together."""
    body = """.reg .pred %half; setp.lt.u32 %half, %i0, 16; @%half bra LOW;
        shfl.sync.bfly.b32 %o0, %i0, 1, 31, 0xffff0000; redux.sync.add.u32 %o1, %i0, 0xffff0000; bra.uni DONE;
        LOW: shfl.sync.bfly.b32 %o0, %i0, 2, 31, 0x0000ffff; redux.sync.add.u32 %o1, %i0, 0x0000ffff;
        DONE: bar.warp.sync -1; activemask.b32 %o2;"""
    swapped, total, active = evaluate(body, [("u32", LANES.view(torch.uint32))], ["u32", "u32", "b32"])
    assert swapped.tolist() == [i ^ 2 for i in range(16)] + [i ^ 1 for i in range(16, 32)]
    assert total.tolist() == [120] * 16 + [376] * 16
    assert set(active.tolist()) == {0xFFFFFFFF}


def test_divergent_loop_reconverges():
    """Each lane loops its own number of times; all are together after the loop."""
    body = """.reg .pred %more; mov.u32 %o0, 0; mov.u32 %t3, 0;
        AGAIN: setp.lt.u32 %more, %t3, %i0; @!%more bra OUT; add.u32 %o0, %o0, %t3; add.u32 %t3, %t3, 1; bra.uni AGAIN;
        OUT: activemask.b32 %o1;"""
    total, active = evaluate(body, [("u32", LANES.view(torch.uint32))], ["u32", "b32"])
    assert total.tolist() == [n * (n - 1) // 2 for n in range(32)]
    assert set(active.tolist()) == {0xFFFFFFFF}


def test_indexed_branch():
    """9.7.12, brx.idx"""
    body = """.reg .b32 %w; and.b32 %w, %i0, 3; TABLE: .branchtargets A, B, C, D; brx.idx %w, TABLE;
        A: mov.u32 %o0, 10; bra END; B: mov.u32 %o0, 20; bra END; C: mov.u32 %o0, 30; bra END; D: mov.u32 %o0, 40;
        END: """
    (out,) = evaluate(body, [("u32", LANES.view(torch.uint32))], ["u32"])
    assert out.tolist() == [10, 20, 30, 40] * 8


def test_calls():
    """9.7.12, call and ret: parameters by value, a guarded call, an early return, a call from a called function."""
    functions = """
    .func (.param .b32 r) inner(.param .b32 x) { .reg .b32 %a; ld.param.b32 %a, [x]; mul.lo.u32 %a, %a, 3;
    st.param.b32 [r], %a; ret; }
    .func (.param .b32 r) outer(.param .align 4 .b8 pair[8]) {
        .reg .b32 %a, %b; .reg .pred %p; ld.param.v2.b32 {%a, %b}, [pair]; setp.gt.u32 %p, %a, 20;
        st.param.b32 [r], %b; @%p ret;
        { .param .b32 arg; .param .b32 res; st.param.b32 [arg], %a; call (res), inner, (arg); ld.param.b32 %a, [res]; }
        st.param.b32 [r], %a; ret; }"""
    body = """.reg .pred %even; and.b32 %t3, %i0, 1; setp.eq.u32 %even, %t3, 0; mov.u32 %o0, 7;
        { .param .align 4 .b8 arg[8]; .param .b32 res; st.param.v2.b32 [arg], {%i0, 1000}; st.param.b32 [res], 7;
          @%even call.uni (res), outer, (arg); ld.param.b32 %o0, [res]; }"""
    (out,) = evaluate(body, [("u32", LANES.view(torch.uint32))], ["u32"], declarations=functions)
    assert out.tolist() == [7 if i % 2 else (1000 if i > 20 else 3 * i) for i in range(32)]


def test_exit_leaves_the_others():
    text = f"""{HEAD}.visible .entry k(.param .u64 a) {{ .reg .b64 %p; .reg .b32 %t, %b; .reg .pred %odd;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [a]; mad.wide.u32 %p, %t, 4, %p; and.b32 %b, %t, 1;
        setp.ne.u32 %odd, %b, 0;
        @%odd exit; st.global.b32 [%p], %t; ret; }}"""
    out = torch.full((64,), -1, dtype=torch.int32)
    run(text, "k", 1, 64, 0, [out])
    assert out.tolist() == [-1 if i % 2 else i for i in range(64)]


@pytest.mark.parametrize(
    "form",
    ["bar.sync 0;", "barrier.sync 0;", "barrier.sync.aligned 3;", "bar.cta.sync 2, 128;", "barrier.cta.sync 5, 128;"],
)
def test_barrier_orders_shared_memory(form):
    """9.7.13, bar and barrier"""
    body = f"""shl.b32 %t3, %t0, 2; mov.u32 %t4, room; add.u32 %t3, %t3, %t4; st.shared.b32 [%t3], %i0;
        {form} xor.b32 %t5, %t0, 64; shl.b32 %t5, %t5, 2; add.u32 %t5, %t5, %t4; ld.shared.b32 %o0, [%t5];"""
    x = torch.arange(128, dtype=torch.int32)
    (out,) = evaluate(body, [("s32", x)], ["s32"], block=128, declarations=".shared .align 4 .b8 room[512];")
    assert torch.equal(out, x ^ 64)


def test_barrier_reductions():
    body = """.reg .pred %p, %q; setp.lt.u32 %p, %i0, 40; bar.red.popc.u32 %o0, 0, %p; bar.red.popc.u32 %o1, 1, !%p;
        barrier.red.and.pred %o2, 2, %p; barrier.red.or.pred %o3, 3, %p; setp.ge.u32 %q, %i0, 0;
        bar.red.and.pred %o4, 4, 128, %q;"""
    x = from_ints(list(range(128)), "u32")
    popc, rest, every, some, true = evaluate(body, [("u32", x)], ["u32", "u32", "pred", "pred", "pred"], block=128)
    assert set(popc.tolist()) == {40}
    assert set(rest.tolist()) == {88}
    assert (every.any(), some.all(), true.all()) == (False, True, True)


def test_arrive_lets_the_producer_go_on():
    """bar.arrive: two warps produce and do not wait, two consume."""
    text = f"""{HEAD}.visible .entry k(.param .u64 o) {{ .shared .align 4 .b8 room[256]; .reg .b64 %p;
    .reg .b32 %t, %a, %v; .reg .pred %prod;
        mov.u32 %t, %tid.x; setp.lt.u32 %prod, %t, 64; mov.u32 %a, room; @!%prod bra CONSUME;
        mad.lo.u32 %a, %t, 4, %a; st.shared.b32 [%a], %t; bar.arrive 1, 128; ret;
        CONSUME: bar.sync 1, 128; sub.u32 %t, 127, %t; mad.lo.u32 %a, %t, 4, %a; ld.shared.b32 %v, [%a];
        ld.param.u64 %p, [o]; mad.wide.u32 %p, %t, 4, %p; st.global.b32 [%p], %v; ret; }}"""
    out = torch.zeros(64, dtype=torch.int32)
    run(text, "k", 1, 128, 0, [Out(out)])
    assert torch.equal(out, torch.arange(64, dtype=torch.int32))


def test_fences_and_hints_run():
    body = """membar.cta; membar.gl; membar.sys; fence.acq_rel.gpu; fence.sc.cta; fence.acquire.sys;
    fence.release.gpu; fence.proxy.async;
        fence.proxy.alias; fence.mbarrier_init.release.cluster; griddepcontrol.wait; griddepcontrol.launch_dependents;
        setmaxnreg.dec.sync.aligned.u32 40; nanosleep.u32 10; mov.u32 %o0, %i0;"""
    (out,) = evaluate(body, [("s32", LANES)], ["s32"], target="sm_90a")
    assert torch.equal(out, LANES)


def test_lanes_that_wait_for_each_other():
    """A lane spins on a flag that another lane of its warp sets later: both make progress (independent thread
    scheduling).
    """
    text = f"""{HEAD}.visible .entry k(.param .u64 f, .param .u64 o) {{ .reg .b64 %p, %o; .reg .b32 %t, %v;
    .reg .pred %first, %set;
        mov.u32 %t, %tid.x; ld.param.u64 %p, [f]; ld.param.u64 %o, [o]; setp.eq.u32 %first, %t, 0; @!%first bra SETTER;
        SPIN: ld.acquire.gpu.global.u32 %v, [%p]; setp.eq.u32 %set, %v, 5; @!%set bra SPIN; st.global.u32 [%o], %v; ret;
        SETTER: setp.eq.u32 %first, %t, 1; @%first st.release.gpu.global.u32 [%p], 5; ret; }}"""
    flag, out = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(text, "k", 1, 32, 0, [flag, out])
    assert out == 5
