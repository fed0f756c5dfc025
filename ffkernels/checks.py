"""Argument checks of the ops. Each raises an error that names the argument, what was given and what is allowed.

Shapes, dtypes, devices and options are checked on every call. The kernels for CPU tensors do it themselves, in C++,
where it costs nothing, and refuse in few words; what is here then runs to say in full what is wrong (`registry.call`).
Before every call run only the checks of what a kernel cannot see: numbers that are none, tensors that require grad.
Values inside tensors (signs, labels) are checked on CPU; on a GPU only with FFKERNELS_CHECK=1, because looking would
stall the stream.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .optim import _Base, state_dtype, state_names

NORMALIZE = ("l2", "rms", "none")
ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh")
GOODNESS = ("sum", "mean")
PRECISIONS = ("highest", "high", "medium")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PLAIN = (Tensor, torch.nn.Parameter)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def option(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}")


def number(name: str, value: object, low: float = -math.inf, *, above: bool = False) -> None:
    """A finite number >= low (> low with ``above``)."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (-math.inf < value < math.inf and (value > low if above else value >= low)):
        bound = "" if low == -math.inf else f" and {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be finite{bound}, got {value!r}")


def plain_numbers(**options: object) -> None:
    """What a kernel cannot see, since its arguments are floats by then: that a value was no number."""
    for name, value in options.items():
        if type(value) is not float:
            number(name, value)


def share(name: str, value: object) -> None:
    """A number in (0, 1]."""
    number(name, value, 0.0, above=True)
    if value > 1:  # type: ignore[operator]  # number has seen that it is one
        raise ValueError(f"{name} must be at most 1, got {value!r}")


def count(name: str, value: object, low: int, high: int, why: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be in [{low}, {high}] ({why}), got {value}")


def _torch_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as error:
        raise RuntimeError(
            f"precision must be one of {list(PRECISIONS)} where torch.backends.*.fp32_precision was set, got None: "
            "torch.get_float32_matmul_precision() says nothing then"
        ) from error


# torch.compile cannot trace it, but compiles again where the setting has changed. This is what
# torch.compiler.assume_constant_result does, which imports all of torch._dynamo (and triton) at once.
_torch_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]


def precision(value: str | None) -> str:
    """``value``, or torch's own setting for None."""
    if value is None:
        return _torch_precision()
    if value not in PRECISIONS:
        option("precision", value, PRECISIONS)
    return value


def no_grad(op: str, state: Mapping[str, object] | None = None, **tensors: object) -> None:
    """The ops have no autograd: a tensor that expects a gradient through them is a mistake to name, not to ignore."""
    for name, t in tensors.items():
        if isinstance(t, Tensor) and t.requires_grad:
            _refuse_grad(op, name)
    for name, t in state.items() if state else ():
        if isinstance(t, Tensor) and t.requires_grad:
            _refuse_grad(op, f"state[{name!r}]")
    if forward_ad._current_level >= 0:  # forward-mode differentiation is going on
        for name, t in tensors.items():
            if isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None:
                raise RuntimeError(
                    f"{op}: {name} has a tangent, but ffkernels ops have no autograd; pass {name}.detach()"
                )


def _refuse_grad(op: str, name: str) -> NoReturn:
    raise RuntimeError(
        f"{op}: {name} requires grad, but ffkernels ops have no autograd; "
        f"call it under torch.no_grad() or pass {name}.detach()"
    )


def matrix(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() != 2:
        raise ValueError(f"{name} must be 2-dimensional, got shape {tuple(t.shape)}")


def inputs(name: str, t: Tensor) -> None:
    """Rows (B, K) or images (B, C, H, W)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() not in (2, 4):
        raise ValueError(f"{name} must have shape (B, K) or (B, C, H, W), got {tuple(t.shape)}")


def like(
    name: str,
    t: Tensor,
    shape: tuple[int, ...],
    what: str,  # the shape in symbols
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.layout is not torch.strided:
        raise TypeError(f"{name} must be dense (torch.strided), got {t.layout}")
    if t.shape != shape:
        raise ValueError(f"{name} must have shape {what} = {tuple(shape)}, got {tuple(t.shape)}")
    if t.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {t.dtype}")
    if t.device != device:
        raise ValueError(f"{name} must be on {device} as x is, got {t.device}")


def layer(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    normalize: str,
    eps: float,
    activation: str,
    width: int | None = None,
) -> None:
    """What every op asks of a layer and its input; ``width`` is K where x is not the layer's own input."""
    matrix("x", x)
    matrix("weight", weight)
    n, k = weight.shape
    if x.layout is not torch.strided or weight.layout is not torch.strided:
        name, layout = ("weight", weight.layout) if x.layout is torch.strided else ("x", x.layout)
        raise TypeError(f"{name} must be dense (torch.strided), got {layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be one of {[str(d) for d in DTYPES]}, got {x.dtype}")
    if k == 0 or n == 0:
        raise ValueError(f"weight must have shape (N, K) with N, K >= 1, got {tuple(weight.shape)}")
    given = x.shape[1] if width is None else width
    if given != k:
        got = (x.shape[0], given)
        raise ValueError(f"x must have shape (M, K) with K = {k} as weight (N, K) has, got {got}")
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} as x is, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device} as x is, got {weight.device}")
    if bias is not None:
        like("bias", bias, (n,), "(N,)", x.dtype, x.device)
    if normalize not in NORMALIZE:
        option("normalize", normalize, NORMALIZE)
    number("eps", eps, 0.0)
    if activation not in ACTIVATIONS:
        option("activation", activation, ACTIVATIONS)


def minibatches(name: str, t: Tensor) -> None:
    """One minibatch (M, K), or several of the same size (S, M, K)."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dim() not in (2, 3):
        raise ValueError(f"{name} must be (M, K), or (S, M, K) for S minibatches, got shape {tuple(t.shape)}")


def per_row(name: str, t: Tensor, x: Tensor, rows: int | None = None) -> None:
    """A vector over the rows, of each minibatch if x has several, in the accumulation dtype."""
    shape = x.shape[:-1] if rows is None else (rows,)
    like(name, t, shape, "(M,)" if len(shape) == 1 else f"(S, M) of x {tuple(x.shape)}", state_dtype(x.dtype), x.device)


def peer_terms(row_term: Tensor | None, col_term: Tensor | None, x: Tensor, weight: Tensor, rows: int) -> None:
    if (row_term is None) != (col_term is None):
        raise ValueError(
            f"row_term and col_term must be given together, got only {'row_term' if col_term is None else 'col_term'}"
        )
    if row_term is not None and col_term is not None:
        per_row("row_term", row_term, x, rows)
        like("col_term", col_term, (weight.shape[0],), "(N,)", state_dtype(x.dtype), x.device)


def non_empty(x: Tensor) -> None:
    if x.shape[-2] == 0:
        raise ValueError(f"x must have at least one row (the loss is a mean over rows), got {tuple(x.shape)}")
    if x.shape[0] == 0:
        raise ValueError(f"x must have at least one minibatch, got {tuple(x.shape)}")


def loss_options(threshold: float, temperature: float, goodness: str) -> None:
    number("threshold", threshold, 0.0)
    number("temperature", temperature, 0.0, above=True)
    if goodness not in GOODNESS:
        option("goodness", goodness, GOODNESS)


def peer_mean(
    peer: object,
    mean: Tensor | None,  # (N,)
    weight: Tensor,  # (N, K)
) -> None:
    number("peer", peer, 0.0)
    if peer:
        if mean is None:
            raise ValueError(
                f"peer_mean must be a tensor of shape (N,) where peer is not 0, got None and peer {peer!r}"
            )
        like("peer_mean", mean, (weight.shape[0],), "(N,)", state_dtype(weight.dtype), weight.device)


def dropout(p: object) -> None:
    number("dropout", p, 0.0)
    if p >= 1.0:  # type: ignore[operator]  # number() has seen to it
        raise ValueError(f"dropout must be in [0, 1), got {p!r}")


def dropout_seed(seed: object, x: Tensor) -> None:
    if not isinstance(seed, Tensor):
        raise TypeError(f"dropout_seed must be a tensor where a layer has dropout, got {type(seed).__name__}")
    if seed.dtype != torch.int64:
        raise TypeError(f"dropout_seed must be torch.int64, got {seed.dtype}")
    shape, what = ((1,), "(1,)") if x.dim() == 2 else ((x.shape[0],), "(S,)")
    like("dropout_seed", seed, shape, what, torch.int64, x.device)


def labels(name: str, t: Tensor, x: Tensor, dims: int, several: bool = False) -> None:
    """(B,) or (B, C) by ``dims``; with ``several`` minibatches in x (S, B, K) one dimension more."""
    what = f"(S, B) of x {tuple(x.shape)}" if several else "(B,)" if dims == 1 else "(B, C)"
    if not isinstance(t, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(t).__name__}")
    if t.dtype not in _INTEGERS:
        raise TypeError(f"{name} must hold integers, got {t.dtype}")
    if t.dim() != dims + several:
        raise ValueError(f"{name} must have shape {what}, got {tuple(t.shape)}")
    if several and t.shape != x.shape[:2]:
        raise ValueError(f"{name} must have shape {what} = {tuple(x.shape[:2])}, got {tuple(t.shape)}")
    if t.shape[0] != x.shape[0]:
        raise ValueError(f"{name} must have shape {what} with B = {x.shape[0]} as x (B, K) has, got {tuple(t.shape)}")
    if t.device != x.device:
        raise ValueError(f"{name} must be on {x.device} as x is, got {t.device}")


def as_labels(name: str, t: Tensor, x: Tensor, dims: int, several: bool = False) -> Tensor:
    """The labels as the kernels take them, int64; looked at here only where they are something else."""
    if isinstance(t, Tensor) and t.dtype == torch.int64:
        return t
    labels(name, t, x, dims, several)
    return t.long()


def as_sign(sign: Tensor, x: Tensor) -> Tensor:
    """``sign`` as the kernels take it, in the accumulation dtype."""
    if not isinstance(sign, Tensor):
        raise TypeError(f"sign must be a tensor, got {type(sign).__name__}")
    if sign.dtype == torch.bool or sign.dtype.is_complex:
        raise TypeError(f"sign must hold the numbers +1 and -1, got {sign.dtype}")
    acc = state_dtype(x.dtype)
    return sign if sign.dtype == acc else sign.to(acc)


def label_options(num_classes: object, strength: object, x: Tensor) -> None:
    count("num_classes", num_classes, 1, x.shape[-1], "labels are written over the first columns of x (B, K)")
    number("strength", strength)
    largest = torch.finfo(x.dtype).max if x.dtype.is_floating_point else math.inf
    if abs(strength) > largest:  # type: ignore[arg-type]  # number has seen that it is one
        raise ValueError(f"strength must be finite in {x.dtype} as x is, got {strength!r}")


def plain_label_options(num_classes: object, strength: object, x: Tensor) -> None:
    """As plain_numbers."""
    if type(num_classes) is not int or type(strength) is not float:
        label_options(num_classes, strength, x)


def flat_state(optimizer: object, state: Mapping[str, Tensor], bias: Tensor | None) -> list[Tensor]:
    """The state's tensors in the ops' order."""
    if not isinstance(optimizer, _Base):
        raise TypeError(f"optimizer must be ffkernels.SGD, Adam, AdamW or HintonSGD, got {type(optimizer).__name__}")
    return optimizer.flatten(state, bias is not None)


def named_state(state: Sequence[Tensor], optimizer: str, bias: Tensor | None) -> dict[str, Tensor]:
    """A flat state's tensors by name; ValueError if they are too few or too many."""
    return dict(zip(state_names(optimizer, len(state), bias is not None), state, strict=True))


def given_state(
    state: Sequence[Tensor],
    optimizer: str,
    lr: Tensor | None,
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> None:
    """The types of lr and a flat state; the rest of it is left to state_tensors."""
    if lr is not None and lr.device != weight.device:
        raise ValueError(f"lr must be on {weight.device} as weight is, got {lr.device}")
    for name, t in named_state(state, optimizer, bias).items():
        if not isinstance(t, Tensor):
            raise TypeError(f"state[{name!r}] must be a tensor, got {type(t).__name__}")


def state_tensors(
    state: Sequence[Tensor],
    optimizer: str,
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
) -> None:
    """A flat state, of tensors, against the parameters that it belongs to."""
    dtype, device = state_dtype(weight.dtype), weight.device
    for name, t in named_state(state, optimizer, bias).items():
        shape = () if name == "step" else bias.shape if bias is not None and name.endswith("_bias") else weight.shape
        if t.shape != shape or t.dtype != dtype or t.device != device:
            raise ValueError(
                f"state[{name!r}] must be {dtype} {tuple(shape)} on {device}, "
                f"got {t.dtype} {tuple(t.shape)} on {t.device}"
            )


def updated(
    weight: Tensor,  # (N, K)
    bias: Tensor | None,  # (N,)
    state: Sequence[Tensor],
    optimizer: str,
    owner: str = "",
) -> dict[str, Tensor]:
    """What an optimizer's step writes, by name."""
    found = {f"{owner}weight": weight}
    if bias is not None:
        found[f"{owner}bias"] = bias
    return found | {f"{owner}state[{name!r}]": t for name, t in named_state(state, optimizer, bias).items()}


def targets(written: Mapping[str, Tensor], read: Mapping[str, Tensor | None]) -> None:
    """In-place targets must be contiguous and share memory with no other argument."""
    first = next(iter(written.values()))
    if torch.compiler.is_compiling() or type(first) not in PLAIN or first.is_meta:
        return  # traced tensors have no addresses; the kernels look again
    names, spans = list(written), []
    for i, (name, t) in enumerate(written.items()):
        if not t.is_contiguous():
            raise ValueError(
                f"{name} is updated in place and must be contiguous, "
                f"got a tensor of shape {tuple(t.shape)} with strides {t.stride()}"
            )
        start = t.data_ptr()
        spans.append((start, start + t.nbytes, i))
    spans.sort()
    if shared := [sorted((i, j)) for (_, end, i), (start, _, j) in itertools.pairwise(spans) if start < end]:
        name, other = (names[i] for i in min(shared))
        raise ValueError(f"{name} and {other} are updated in place and must not share memory, but do")
    for other, seen in read.items():
        if seen is not None and seen.numel():
            start = seen.data_ptr()
            last = sum((n - 1) * s for n, s in zip(seen.shape, seen.stride(), strict=True))
            stop = start + seen.element_size() * (1 + last)
            for low, high, i in spans:
                if low < stop and start < high:
                    raise ValueError(
                        f"{names[i]} is updated in place and must not share memory with another argument, "
                        f"but does with {other} {tuple(seen.shape)}"
                    )


def _look_inside(t: Tensor) -> bool:
    return t.device.type == "cpu" or os.environ.get("FFKERNELS_CHECK") == "1"


def sign_values(sign: Tensor) -> None:
    if _look_inside(sign) and not bool((sign.abs() == 1).all()):
        bad = sign[sign.abs() != 1][0].item()
        raise ValueError(f"sign must hold +1 (positive rows) and -1 (negative rows) only, got {bad:g}")


def label_values(name: str, t: Tensor, num_classes: int) -> None:
    t = t.long()  # num_classes may be too large for t's own dtype
    if _look_inside(t) and t.numel() and not bool(((t >= 0) & (t < num_classes)).all()):
        bad = t[(t < 0) | (t >= num_classes)][0].item()
        raise ValueError(f"{name} must be in [0, {num_classes}) as num_classes says, got {bad}")


def draw_values(draws: Tensor) -> None:
    fine = (draws >= 0) & (draws < 1)
    if _look_inside(draws) and not bool(fine.all()):
        raise ValueError(f"draws must be in [0, 1), got {draws[~fine][0].item():g}")
