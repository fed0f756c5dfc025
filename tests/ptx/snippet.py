"""Runs a few PTX instructions on every lane, for tests of single opcodes."""

from __future__ import annotations

import random

import torch

from .driver import Out, run
from .syntax import type_size

TORCH = {
    "u8": torch.uint8, "s8": torch.int8, "b8": torch.uint8, "u16": torch.uint16, "s16": torch.int16,
    "b16": torch.uint16, "u32": torch.uint32,
    "s32": torch.int32, "b32": torch.uint32, "u64": torch.uint64, "s64": torch.int64, "b64": torch.uint64,
    "f16": torch.float16,
    "bf16": torch.bfloat16, "f32": torch.float32, "f64": torch.float64, "f16x2": torch.uint32,
    "bf16x2": torch.uint32, "tf32": torch.uint32,
    "f32x2": torch.uint64, "u16x2": torch.uint32, "s16x2": torch.uint32, "pred": torch.uint8,
}  # fmt: skip


def module(
    body: str, inputs: list[str], outputs: list[str], target: str, declarations: str = "", prologue: str = ""
) -> str:
    """A kernel that loads %i0.. from its first arguments, runs `body`, and stores %o0.. to the others."""
    lines = [f".version 8.8\n.target {target}\n.address_size 64", declarations]
    params = ", ".join(f".param .u64 p{k}" for k in range(len(inputs) + len(outputs)))
    lines.append(f".visible .entry k({params})\n{{")
    lines.append(".reg .b64 %a<40>; .reg .b32 %t<8>; .reg .b16 %h<8>; .reg .pred %q<8>;")
    kinds = [*(("i", k, t) for k, t in enumerate(inputs)), *(("o", k, t) for k, t in enumerate(outputs))]
    for name, k, kind in kinds:
        register = "pred" if kind == "pred" else f"b{max(8 * type_size(kind), 16)}"
        lines.append(f".reg .{register} %{name}{k};")
    # the linear thread number, over blocks
    lines.append(
        "mov.u32 %t0, %tid.x; mov.u32 %t1, %ntid.x; mov.u32 %t2, %ctaid.x; mad.lo.u32 %t7, %t1, %t2, %t0;" + prologue
    )
    for index, (_, _, kind) in enumerate(kinds):
        size = 1 if kind == "pred" else type_size(kind)
        lines.append(f"ld.param.u64 %a{index}, [p{index}]; mad.wide.u32 %a{index}, %t7, {size}, %a{index};")
    for k, kind in enumerate(inputs):
        if kind == "pred":
            lines.append(f"ld.global.u8 %h0, [%a{k}]; setp.ne.u16 %i{k}, %h0, 0;")
        else:
            lines.append(f"ld.global.b{8 * type_size(kind)} %i{k}, [%a{k}];")
    lines.append(body)
    for k, kind in enumerate(outputs):
        at = f"%a{len(inputs) + k}"
        if kind == "pred":
            lines.append(f"selp.u16 %h0, 1, 0, %o{k}; st.global.u8 [{at}], %h0;")
        else:
            lines.append(f"st.global.b{8 * type_size(kind)} [{at}], %o{k};")
    lines.append("ret;\n}")
    return "\n".join(lines)


def evaluate(body, inputs, outputs, *, target="sm_80", block=32, declarations="", prologue="", dynamic_shared=0):
    """The outputs, a list of tensors, of `body` run by one thread an input element.

    inputs: (PTX type, tensor) pairs; outputs: PTX types.
    """
    count = inputs[0][1].numel() if inputs else block
    if count % block:
        raise ValueError(f"{count} elements for blocks of {block}")
    text = module(body, [t for t, _ in inputs], outputs, target, declarations, prologue)
    results = [torch.zeros(count, dtype=TORCH[t]) for t in outputs]
    args = [*(x for _, x in inputs), *(Out(r) for r in results)]
    run(text, "k", count // block, block, dynamic_shared, args)
    return results


def samples(kind: str, seed: int, count: int = 256) -> list[int]:
    """Integers of a type: the ones where definitions differ, then random ones of all magnitudes."""
    bits = 8 * type_size(kind)
    signed = kind[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    rng = random.Random(f"{kind}{seed}")
    edges = [0, 1, 2, high, high - 1, low, low + 1, high // 2, high // 2 + 1, *([-1, -2] if signed else [])]
    rng.shuffle(edges)
    while len(edges) < count:
        value = rng.getrandbits(rng.randint(1, bits))
        edges.append(value - (1 << bits) if value > high else value)
    return edges


def from_ints(values: list[int], kind: str) -> torch.Tensor:
    """A tensor with these integers as bits of a type."""
    size = 1 if kind == "pred" else type_size(kind)
    data = b"".join((v & ((1 << 8 * size) - 1)).to_bytes(size, "little") for v in values)
    return torch.frombuffer(bytearray(data), dtype=TORCH[kind])


def to_ints(tensor: torch.Tensor, kind: str) -> list[int]:
    """The elements of a tensor as integers of a type."""
    size = 1 if kind == "pred" else type_size(kind)
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return [int.from_bytes(raw[i : i + size], "little", signed=kind[0] == "s") for i in range(0, len(raw), size)]
