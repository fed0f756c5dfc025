"""csrc/cuda/params.h in Python: the kernels' argument, made of tensors. test_params.py compares the layouts."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int32, c_int64, c_uint64

import torch
from ptx import In, Out, Struct

TILE, THREADS, PIPELINE, MAX_LAYERS, TILE_BYTES = 64, 128, 3, 8, 8192
BEHIND, IN_TURN = 2, 2  # stages from one minibatch to the next; buffers for what a layer hands on
ROW_WORDS = 3 + MAX_LAYERS + IN_TURN * MAX_LAYERS
ROW_VECTORS = 4
SPLIT_FLOATS = TILE * TILE + TILE
NORMALIZE = ("none", "l2", "rms")
ACTIVATIONS = ("relu", "leaky_relu", "gelu", "silu", "tanh")
OPTIMIZERS = ("store", "sgd", "adam", "adamw", "hinton_sgd")
MATHS = ("bf16", "fp16", "f32", "tf32", "f32_bf16")


class Matrix(ctypes.Structure):
    _fields_ = [("data", c_uint64), ("row_stride", c_int64), ("col_stride", c_int64)]


class Vector(ctypes.Structure):
    _fields_ = [("data", c_uint64), ("stride", c_int64)]


class Optimizer(ctypes.Structure):
    _fields_ = [
        ("kind", c_int32), ("nesterov", c_int32), ("lr_tensor", c_uint64), ("step", c_uint64),
        ("slot", c_uint64 * 2), ("bias_slot", c_uint64 * 2), ("lr", c_float), ("weight_decay", c_float),
        ("momentum", c_float), ("dampening", c_float), ("beta1", c_float), ("beta2", c_float), ("eps", c_float),
        ("rest1", c_float), ("rest2", c_float), ("log_beta1", c_float), ("log_beta2", c_float),
    ]  # fmt: skip


class Labels(ctypes.Structure):
    _fields_ = [
        ("candidates", c_int32), ("num_classes", c_int32), ("separate", c_int32), ("strength", c_float),
        ("label", c_uint64 * 2), ("row_stride", c_int64 * 2), ("candidate_stride", c_int64),
        ("minibatch_stride", c_int64 * 2),
    ]  # fmt: skip


class Layer(ctypes.Structure):
    _fields_ = [
        ("cols", c_int32), ("depth", c_int32), ("x", Matrix), ("weight", Matrix), ("bias", c_uint64),
        ("bias_stride", c_int64), ("x_sqnorm", Vector), ("x_minibatch", c_int64), ("x_sqnorm_minibatch", c_int64),
        ("normalize", c_int32), ("activation", c_int32), ("eps", c_float), ("forward", c_int32), ("y", c_uint64),
        ("p", c_uint64), ("y_stride", c_int64), ("y_minibatch", c_int64), ("goodness", c_uint64), ("loss", c_uint64),
        ("sign", Vector), ("threshold", c_float), ("temperature", c_float), ("divisor", c_float),
        ("update", c_int32), ("splits", c_int32), ("split_offset", c_int64), ("coef", Vector),
        ("gradient_y", Matrix), ("row_term", Vector), ("col_term", Vector), ("grad_weight", c_uint64),
        ("grad_bias", c_uint64), ("given_weight", c_uint64), ("given_bias", c_uint64), ("optimizer", Optimizer),
        ("peer_mean", c_uint64), ("peer", c_float), ("dropout", c_double), ("layer_index", c_int32),
    ]  # fmt: skip


class Workspace(ctypes.Structure):
    _fields_ = [
        *((n, c_uint64) for n in ("words", "partial", "loss_partial", "rows", "split", "columns")),
        *((n, c_int32) for n in ("row_tiles", "weight_tiles", "widest")),
    ]


class Minibatches(ctypes.Structure):
    _fields_ = [
        ("begin", c_int32), ("end", c_int32),
        *((n, c_int64) for n in ("sign", "goodness", "loss", "dropout_seed")),
    ]  # fmt: skip


class Params(ctypes.Structure):
    _fields_ = [
        ("layers", c_int32), ("stage_begin", c_int32), ("stage_end", c_int32), ("rows", c_int32),
        ("positive_rows", c_int32), ("minibatches", Minibatches), ("labels", Labels),
        ("dropout_seed", c_uint64), ("workspace", Workspace), ("layer", Layer * MAX_LAYERS),
    ]  # fmt: skip


def _layout(kind, start=0):
    """(offset, path, type) of every number of a struct."""
    found = []
    for name, field in kind._fields_:
        at = start + getattr(kind, name).offset
        if issubclass(field, ctypes.Array):
            each, count = field._type_, field._length_
        else:
            each, count = field, None
        for i in range(count or 1):
            path = name if count is None else f"{name}[{i}]"
            if issubclass(each, ctypes.Structure):
                found += [(o, f"{path}.{p}", k) for o, p, k in _layout(each, at + i * ctypes.sizeof(each))]
            else:
                found.append((at + i * ctypes.sizeof(each), path, each))
    return found


FIELDS = {path: (offset, kind) for offset, path, kind in _layout(Params)}


def pack(values: dict) -> Struct:
    """The argument from its fields by path ("layer[0].x.data": tensor, ...); what is not named is 0.

    A pointer is a tensor, or one and how many bytes behind its begin.
    """
    raw, pointers = bytearray(ctypes.sizeof(Params)), {}
    for path, value in values.items():
        at, kind = FIELDS[path]
        if isinstance(value, (torch.Tensor, In, Out, tuple)):
            pointers[at] = value
        elif value is not None:
            raw[at : at + ctypes.sizeof(kind)] = bytes(kind(value))
    return Struct(bytes(raw), pointers)
