"""The products and roundings of each kind of arithmetic, for the twin; see ../twin.py."""

import torch
import twin


def _fp16(t):
    return t.half().to(t.dtype)


def _tf32(t):
    bits = t.float().contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32).to(t.dtype)


TWINS = {
    "bf16": twin.BF16,
    "fp16": twin.Arithmetic(torch.float32, lambda a, b: _fp16(a) @ _fp16(b).T, _fp16, scales_x=True),
    "f32": twin.FLOAT32,
    "tf32": twin.Arithmetic(torch.float32, lambda a, b: _tf32(a) @ _tf32(b).T),
    "f32_bf16": twin.MEDIUM,
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = {"f32": "highest", "tf32": "high", "f32_bf16": "medium"}
