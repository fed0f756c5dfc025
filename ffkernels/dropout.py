"""Dropout by a counter-based generator: whether an input is kept is a function of (seed, layer, row, column) alone.

So a fused step needs no stored mask, makes the same mask again for the update, and every backend makes the same one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .optim import state_dtype

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(
    seed: Tensor,  # (1,) int64: the key, low and high half
    counter: list[Tensor],  # four of one shape, int64 in [0, 2^32)
) -> list[Tensor]:  # four of that shape, int64 in [0, 2^32)
    """Philox4x32-10 (Salmon et al. 2011, section 4.3), in int64 since torch has little for unsigned integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        # the product's upper half is right although it may have become negative: the shift's copies are masked off
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = ((b >> 32) & _LOW) ^ c1 ^ k0, b & _LOW, ((a >> 32) & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) & _LOW, (k1 + _KEY_STEPS[1]) & _LOW
    return [c0, c1, c2, c3]


def drop_below(p: float) -> int:
    """An input is dropped where its 32 random bits are below this number."""
    return int(p * 2.0**32)


def dropout(
    x: Tensor,  # (M, K)
    p: float,
    seed: Tensor,  # (1,) int64
    layer: int,
) -> Tensor:  # (M, K)
    """x_mk / (1 - p) where it is kept, 0 where it is dropped (Srivastava et al. 2014, section 10, inverted).

    The bits of columns 4 j to 4 j + 3 of row m are the four words of Philox at the counter (j, m, layer, 0). The
    product is taken in the accumulation dtype and rounded to x's.

    Args:
        p: probability of dropping, in [0, 1).
        layer: index of the layer whose input x is.
    """
    rows, cols = x.shape
    groups = torch.arange((cols + 3) // 4, device=x.device).expand(rows, -1)
    row = torch.arange(rows, device=x.device)[:, None].expand_as(groups)
    words = philox(seed, [groups, row, torch.full_like(groups, layer), torch.zeros_like(groups)])
    kept = torch.stack(words, 2).flatten(1)[:, :cols] >= drop_below(p)
    # where, not a product: what is dropped is 0 even if it was not finite
    return torch.where(kept, x.to(state_dtype(x.dtype)) * (1 / (1 - p)), 0).to(x.dtype)
