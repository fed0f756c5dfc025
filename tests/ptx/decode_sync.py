"""Decoding of control flow, calls, barriers, fences and operations between lanes."""

from __future__ import annotations

from . import syntax as ast
from .decode import CUSTOM, PROPAGATE, STRICT, Decoder, opcode
from .decode_memory import SCOPES, semantics
from .syntax import type_size


@opcode("bra")
def bra(d, ops, m):
    m.take("uni")
    m.done()
    d.emit_branch(ops[0].name)


@opcode("brx")
def brx(d, ops, m):
    m.take("idx")
    m.take("uni")
    m.done()
    targets = d.frame.fn.branch_targets.get(ops[1].name)
    if targets is None:
        d.fail(f"no .branchtargets {ops[1].name}")
    # the engine reads the targets from the branches that follow, which are never run themselves
    d.emit("brx", (), [d.src(ops[0], "u32")], (len(d.rows) + 1, len(targets)), policy=STRICT)
    guard, d.insn = d.insn, ast.Insn(d.insn.opcode, (), None, False, d.insn.line, d.insn.loc)
    if guard.guard is not None:
        d.fail("a guarded brx is not implemented")
    for target in targets:
        d.emit_branch(target)


@opcode("ret")
def ret(d, ops, m):
    m.take("uni")
    m.done()
    if d.frame.prefix == "":
        d.emit("exit", policy=STRICT)
    else:
        d.emit_branch(None)


@opcode("exit")
def exit_(d, ops, m):
    m.done()
    d.emit("exit", policy=STRICT)


@opcode("trap")
def trap(d, ops, m):
    m.done()
    d.emit("trap")


@opcode("call")
def call(d, ops, m):
    m.take("uni")
    m.done()
    results, arguments = (), ()
    ops = list(ops)
    if isinstance(ops[0], ast.Group):
        results = ops.pop(0).items
    target = ops.pop(0)
    if ops and isinstance(ops[0], ast.Group):
        arguments = ops.pop(0).items
    if isinstance(target, ast.Reg) or ops:
        d.fail("indirect calls are not implemented")
    callee = d.module.functions.get(target.name)
    if callee is None:
        d.fail(f"no function {target.name}")
    if callee.name == "__assertfail":
        return d.emit("assertfail")
    if callee.body is None:
        d.fail(f"extern function {callee.name} is not implemented")
    bound = {}
    for param, arg in zip([*callee.params, *callee.results], [*arguments, *results], strict=True):
        if not isinstance(arg, ast.Sym):
            d.fail("arguments must be .param variables")
        bound[param.name] = d.symbol(arg.name, d.frame)
    d.inline(callee, bound)


# -- barriers and fences -------------------------------------------------------------------------------------------
@opcode("bar", "barrier")
def barrier(d, ops, m):
    aligned = m.text.startswith("bar.") or m.take("aligned")
    m.take("cta")
    if m.take("cluster"):
        m.fail("thread block clusters are not implemented")
    if m.take("warp"):
        m.need("sync")
        m.done()
        return d.emit("bar.warp.sync", (), [d.src(ops[0], "b32")], policy=STRICT)
    ops = list(ops)
    dsts, predicate, negated = [], [], False
    kind = m.need("sync", "arrive", "red")
    code = {"sync": 0, "arrive": 1}.get(kind)
    if kind == "red":
        op = m.need("popc", "and", "or")
        result = m.type() if op == "popc" else m.need("pred")
        code = {"popc": 2, "and": 3, "or": 4}[op]
        dsts = [d.dst(ops.pop(0), result)]
        p, negated = d.pred_src(ops.pop())
        predicate = [p]
    m.done()
    counted = len(ops) > 1
    srcs = [d.src(o, "u32") for o in ops] + predicate
    d.emit("barrier", dsts, srcs, (code, aligned, counted, negated), policy=STRICT)


@opcode("membar")
def membar(d, ops, m):
    scope = {"cta": "cta", "gl": "gpu", "sys": "sys"}[m.need("cta", "gl", "sys")]
    m.done()
    d.emit("fence", flags=semantics("generic", "sc", scope))


@opcode("fence")
def fence(d, ops, m):
    if m.take("proxy"):
        return _proxy_fence(d, ops, m)
    if m.take("mbarrier_init"):
        # orders mbarrier.init before remote operations of a cluster; in a cluster of one block a barrier does that
        m.need("release")
        m.need("cluster")
        m.done()
        return d.emit("nop")
    order = m.choice("sc", "acq_rel", "acquire", "release", default="acq_rel")
    scope = m.need(*SCOPES)
    m.done()
    d.emit("fence", flags=semantics("generic", order, scope))


def _proxy_fence(d: Decoder, ops, m):
    if m.take("async"):
        m.choice("shared::cta", "shared::cluster", "global")
        m.done()
        d.uses_async = True
        return d.emit("fence.proxy.async")
    if m.take("alias"):
        m.done()
        return d.emit("nop")
    if m.take("tensormap::generic"):
        order, scope = m.need("acquire", "release"), m.need(*SCOPES)
        m.done()
        return d.emit("fence", flags=semantics("generic", order, scope))
    m.fail("not implemented")


@opcode("griddepcontrol")
def griddepcontrol(d, ops, m):
    m.need("wait", "launch_dependents")
    m.done()
    d.emit("nop")  # kernels run one after another here


@opcode("setmaxnreg")
def setmaxnreg(d, ops, m):
    m.need("inc", "dec")
    m.take("sync")
    m.take("aligned")
    m.type()
    m.done()
    d.emit("nop")  # registers are not a limited resource here


@opcode("nanosleep")
def nanosleep(d, ops, m):
    m.type()
    m.done()
    d.emit("nanosleep", (), [d.src(ops[0], "u32")])


# -- between lanes -------------------------------------------------------------------------------------------------
@opcode("shfl")
def shfl(d, ops, m):
    if not m.take("sync"):
        m.fail("only .sync is implemented")
    mode = m.need("up", "down", "bfly", "idx")
    kind = m.type()
    m.done()
    pair = isinstance(ops[0], ast.Pair)
    dsts = [d.dst(ops[0].first if pair else ops[0], kind)]
    if pair:
        dsts.append(d.dst(ops[0].second, "pred"))
    srcs = [d.src(ops[1], kind), *(d.src(o, "b32") for o in ops[2:5])]
    d.emit("shfl", dsts, srcs, (("up", "down", "bfly", "idx").index(mode),), policy=CUSTOM)


@opcode("vote")
def vote(d, ops, m):
    if not m.take("sync"):
        m.fail("only .sync is implemented")
    mode = m.need("all", "any", "uni", "ballot")
    kind = m.need("b32") if mode == "ballot" else m.need("pred")
    m.done()
    p, negated = d.pred_src(ops[1])
    imm = (("all", "any", "uni", "ballot").index(mode), negated)
    d.emit("vote", [d.dst(ops[0], kind)], [p, d.src(ops[2], "b32")], imm, policy=CUSTOM)


@opcode("match")
def match(d, ops, m):
    every = m.need("any", "all") == "all"
    m.take("sync")
    kind = m.type()
    m.done()
    pair = isinstance(ops[0], ast.Pair)
    dsts = [d.dst(ops[0].first if pair else ops[0], "b32")]
    if pair:
        dsts.append(d.dst(ops[0].second, "pred"))
    d.emit("match", dsts, [d.src(ops[1], kind), d.src(ops[2], "b32")], (every, type_size(kind)), policy=STRICT)


@opcode("redux")
def redux(d, ops, m):
    m.take("sync")
    op = m.need("add", "min", "max", "and", "or", "xor")
    kind = m.type()
    m.done()
    if kind not in ("u32", "s32", "b32"):
        m.fail("type not implemented")
    imm = (("add", "min", "max", "and", "or", "xor").index(op), kind == "s32")
    d.emit("redux", [d.dst(ops[0], kind)], [d.src(ops[1], kind), d.src(ops[2], "b32")], imm, policy=STRICT)


@opcode("elect")
def elect(d, ops, m):
    m.take("sync")
    m.done()
    dsts = [d.dst(ops[0].first, "b32"), d.dst(ops[0].second, "pred")]
    d.emit("elect", dsts, [d.src(ops[1], "b32")], policy=STRICT)


@opcode("activemask")
def activemask(d, ops, m):
    kind = m.type()
    m.done()
    d.emit("activemask", [d.dst(ops[0], kind)], policy=PROPAGATE)
