"""The ops on the CUDA kernels as compiled, run by the PTX interpreter on CPU tensors."""

from __future__ import annotations

import math
from pathlib import Path

import cases
import ptx
import torch
from ptx import In, Out

from ffkernels.checks import precision as default_precision

from . import params as layout
from .params import ACTIVATIONS, NORMALIZE, OPTIMIZERS, ROW_WORDS, TILE

SOURCES = Path(__file__).resolve().parents[2] / "csrc"
_MATH_OF_PRECISION = {"highest": "f32", "high": "tf32", "medium": "f32_bf16"}
_UNIT = {"bf16": 2, "fp16": 2}


def module(math_: str, arch: str = "sm_80") -> str:
    return ptx.compile_cuda(SOURCES / "cuda" / f"stages_{math_}.cu", arch, includes=[SOURCES])


def math_of(dtype: torch.dtype, precision: str | None = None) -> str:
    if dtype == torch.float32:
        return _MATH_OF_PRECISION[precision or default_precision(None)]
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]


def shared_bytes(math_: str) -> int:
    return layout.PIPELINE * (2 * layout.TILE_BYTES + TILE * 4 * (2 if math_ == "fp16" else 1)) + 16


def tiles(n: int) -> int:
    return -(-n // TILE)


def bare(t):
    return t.tensor if isinstance(t, (In, Out)) else t


def matrix(t):
    """The last two dimensions of t; a third one is of minibatches."""
    return {"data": t, "row_stride": bare(t).stride(-2), "col_stride": bare(t).stride(-1)}


def vector(t):
    return {} if t is None else {"data": t, "stride": bare(t).stride(-1)}


def minibatch_stride(t, dims):
    """From one minibatch to the next, where t has more than ``dims`` dimensions."""
    return bare(t).stride(0) if t is not None and bare(t).dim() > dims else 0


def _optimizer(o, state, has_bias):
    if o is None:
        return {"kind": 0}
    hyper = o.hyper
    kind = OPTIMIZERS.index(o.kind)
    slots = list(state.values())[1:]
    own = len(slots) // (2 if has_bias else 1)
    out = {"kind": kind, "step": state["step"], "lr": hyper[0]}
    if isinstance(o.lr, torch.Tensor):
        out["lr_tensor"] = In(o.lr)
    for i in range(own):
        out[f"slot[{i}]"] = slots[i]
        if has_bias:
            out[f"bias_slot[{i}]"] = slots[own + i]
    if o.kind == "sgd":
        out |= dict(zip(("momentum", "dampening", "weight_decay", "nesterov"), hyper[1:], strict=True))
        out["nesterov"] = int(out["nesterov"])
    elif o.kind == "hinton_sgd":
        out |= {"momentum": hyper[1], "weight_decay": hyper[2]}
    else:
        out |= dict(zip(("beta1", "beta2", "eps", "weight_decay"), hyper[1:], strict=True))
        for i, beta in enumerate(hyper[1:3], 1):
            out[f"rest{i}"] = 1 - beta
            out[f"log_beta{i}"] = math.log(beta) if beta > 0 else -math.inf
    return out


class Launch:
    """A network of layers for one launch: params.h's struct by path, and the workspace that fits it."""

    def __init__(self, math_, rows, base_rows=None, minibatches=1):
        self.math, self.rows, self.base_rows, self.minibatches = math_, rows, base_rows or rows, minibatches
        self.values = {
            "rows": rows, "positive_rows": rows // 2, "labels.candidates": 1, "minibatches.end": minibatches,
        }  # fmt: skip
        self.layers = []
        self.words = None

    def add(self, **layer):
        self.layers.append(layer)

    @property
    def stages(self):
        return len(self.layers) + 1 + layout.BEHIND * (self.minibatches - 1)

    def run(self, begin, end, *, grid=None, sms=4, seed=0, cooperative=None, arch="sm_80", text=None):
        values, count = dict(self.values), len(self.layers)
        values |= {"layers": count, "stage_begin": begin, "stage_end": end}
        widest = max(v["cols"] for v in self.layers)
        weight_tiles = max(tiles(v["cols"]) * tiles(v["depth"]) for v in self.layers)
        base, most = tiles(self.base_rows), tiles(self.base_rows if count == 1 else self.rows)
        values |= {
            "workspace.row_tiles": most, "workspace.weight_tiles": weight_tiles, "workspace.widest": widest,
        }  # fmt: skip
        split = 0
        for i, v in enumerate(self.layers):
            v = {"splits": 1} | v
            _flatten(values, f"layer[{i}]", v | {"split_offset": split})
            if v["splits"] > 1:
                split += tiles(v["cols"]) * tiles(v["depth"]) * v["splits"] * layout.SPLIT_FLOATS
        if self.words is None:
            self.words = torch.zeros(ROW_WORDS + count * (most + 2 * weight_tiles), dtype=torch.int32)
            sizes = {
                "partial": count * 2 * self.rows * tiles(widest), "loss_partial": count * most,
                "rows": (count * layout.ROW_VECTORS + 1) * self.rows, "split": split,
                "columns": count * (2 + most) * widest,
            }  # fmt: skip
            self.scratch = {n: Out(torch.full((max(size, 1),), math.nan)) for n, size in sizes.items()}
        values["workspace.words"] = self.words
        for n, t in self.scratch.items():
            values[f"workspace.{n}"] = t
        items = [0] * self.stages
        for turn in range(self.minibatches):
            for i, v in enumerate(self.layers, layout.BEHIND * turn):
                items[i] += (base if i == 0 else tiles(self.rows)) * tiles(v["cols"])
                items[i + 1] += tiles(v["cols"]) * tiles(v["depth"]) * v.get("splits", 1)
        grid = grid or max(1, min(max(items[begin:end]), 3 * sms))
        cooperative = end - begin > 1 if cooperative is None else cooperative
        return ptx.run(
            text or module(self.math, arch), f"ff_stages_{self.math}", grid, layout.THREADS, shared_bytes(self.math),
            [layout.pack(values)], cooperative=cooperative, sms=sms, seed=seed, registers=168,
        )  # fmt: skip

    def idle(self):
        """Whether the words are as the next launch needs them."""
        words = self.words.clone()
        words[:2] &= 0x7FFFFFFF
        return not words.any()


def _flatten(values, path, value):
    if isinstance(value, dict):
        for name, part in value.items():
            _flatten(values, f"{path}.{name}", part)
    elif value is not None:
        values[path] = value


def _layer(x, weight, bias, given):
    return {
        "cols": weight.shape[0], "depth": weight.shape[1], "x": matrix(x), "weight": matrix(weight),
        "bias": bias, "bias_stride": 1 if bias is None else bias.stride(0),
        "normalize": NORMALIZE.index(given.get("normalize", "l2")),
        "activation": ACTIVATIONS.index(given.get("activation", "relu")), "eps": given.get("eps", 1e-4),
    }  # fmt: skip


def _labels(launch, given, labels, separate, dtype):
    strength = torch.tensor(given.get("strength", 1.0)).to(dtype).item()
    launch.values |= {
        "labels.candidates": len(labels) if separate else labels[0].shape[1],
        "labels.num_classes": given["num_classes"], "labels.separate": int(separate), "labels.strength": strength,
    }  # fmt: skip
    for i, t in enumerate(labels):
        launch.values |= {
            f"labels.label[{i}]": In(t), f"labels.row_stride[{i}]": t.stride(-1 if separate else 0),
            f"labels.minibatch_stride[{i}]": t.stride(0) if separate and t.dim() == 2 else 0,
        }  # fmt: skip
    if not separate:
        launch.values["labels.candidate_stride"] = labels[0].stride(1)


def _padded(rows, width, dtype, count):
    """The buffers between two layers: (count, rows, width)."""
    return Out(torch.full((count, rows, -(-width // 16) * 16), math.nan, dtype=dtype)[:, :, :width])


def run(op, given, *, multi_launch=False, splits=1, reports=None, keep=False, **options):
    """The results of ``op`` by twin.run's names. With ``keep`` the arguments are updated, otherwise copies of them."""
    if not keep and op in cases.IN_PLACE:
        given = given | {n: cases.copied(given[n]) for n in ("weight", "bias", "state", "layers") if n in given}
    x = given["x"]
    dtype = x.dtype
    labels = None
    if op in ("ff_label_step_", "ff_network_step_") and (given.get("labels") or "labels_pos" in given):
        labels = given.get("labels") or (given["labels_pos"], given["labels_neg"])
    base = x.shape[-2]
    rows = base * (2 if labels else given["labels"].shape[1] if op == "ff_label_forward" else 1)
    records = given["layers"] if op == "ff_network_step_" else None
    first = vars(records[0]) if records else given
    minibatches = x.shape[0] if x.dim() == 3 else 1
    launch = Launch(math_of(dtype, first.get("precision")), rows, base, minibatches)
    if labels:
        _labels(launch, given, labels, True, dtype)
    elif op == "ff_label_forward":
        _labels(launch, given, [given["labels"]], False, dtype)
    results, written = {}, {}

    def curved(layer):
        return layer.get("activation", "relu") != "relu"

    def forward(layer, source, y, with_p, goodness):
        values = _layer(source, layer["weight"], layer["bias"], layer)
        shape, strides = y.tensor.shape[-2:], y.tensor.stride()[-2:]
        p = Out(torch.empty_strided(shape, strides, dtype=dtype)) if with_p else None
        values |= {
            "forward": 1, "y": y, "p": p, "y_stride": strides[0], "y_minibatch": minibatch_stride(y, 2),
            "goodness": goodness,
        }  # fmt: skip
        return values, p

    def loss(values, layer, sign, to):
        mean = layer.get("goodness", "mean") == "mean"
        values |= {
            "loss": to, "sign": vector(sign), "threshold": layer.get("threshold", 2.0),
            "temperature": layer.get("temperature", 1.0), "divisor": layer["weight"].shape[0] if mean else 1.0,
        }  # fmt: skip

    def update(values, layer, y):
        values |= {
            "update": 1, "splits": splits, "gradient_y": matrix(y), "row_term": vector(layer.get("row_term")),
            "col_term": vector(layer.get("col_term")),
            "optimizer": _optimizer(layer.get("optimizer"), layer.get("state"), layer["bias"] is not None),
        }  # fmt: skip

    if op == "ff_network_step_":
        sign, sqnorm = given.get("sign"), given.get("x_sqnorm")
        if given.get("dropout_seed") is not None:
            launch.values["dropout_seed"] = In(given["dropout_seed"])
        count, in_turn = len(records), min(minibatches, layout.IN_TURN)
        totals = Out(torch.full((minibatches, count, rows), math.nan))
        losses = Out(torch.full((minibatches, count), math.nan))
        launch.values |= {
            "minibatches.sign": minibatch_stride(sign, 1), "minibatches.goodness": count * rows,
            "minibatches.loss": count, "minibatches.dropout_seed": 1,
        }  # fmt: skip
        known, to_next = vector(sqnorm), minibatch_stride(sqnorm, 1)
        for i, record in enumerate(records):
            layer = vars(record)
            y = _padded(rows, record.weight.shape[0], dtype, in_turn)
            if record.dropout:
                x = _padded(rows, record.weight.shape[1], dtype, in_turn)
                known, to_next = vector(Out(torch.full((rows,), math.nan))), 0
            goodness = (totals, 4 * rows * i)
            values, p = forward(layer, x, y, curved(layer), goodness)
            values |= {
                "x_minibatch": minibatch_stride(x, 2), "x_sqnorm": known, "x_sqnorm_minibatch": to_next,
                "dropout": record.dropout, "layer_index": i, "peer": record.peer,
            }  # fmt: skip
            if record.peer:
                values["peer_mean"] = record.peer_mean
            loss(values, layer, sign, (losses, 4 * i))
            update(values, layer, y if p is None else p)
            launch.add(**values)
            x, known, to_next = y, {"data": goodness, "stride": 1}, count * rows
        stages = launch.stages
    elif op in ("ff_grad", "ff_update_"):
        layer = given
        values = _layer(x, layer["weight"], layer["bias"], layer)
        values |= {"coef": vector(given["coef"]), "x_sqnorm": vector(given.get("x_sqnorm"))}
        update(values, layer, given["y"])
        if op == "ff_grad":
            results["grad_weight"] = torch.full(given["weight"].shape, math.nan, dtype=dtype)
            values["grad_weight"] = Out(results["grad_weight"])
            if given["bias"] is not None:
                results["grad_bias"] = torch.full(given["bias"].shape, math.nan, dtype=dtype)
                values["grad_bias"] = Out(results["grad_bias"])
        launch.add(**values)
        stages = 2
    else:
        layer = given
        step = op.endswith("step_")
        y = Out(torch.full((rows, layer["weight"].shape[0]), math.nan, dtype=dtype))
        goodness, total = Out(torch.full((rows,), math.nan)), Out(torch.full((), math.nan))
        values, p = forward(layer, x, y, curved(layer) or not step, goodness)
        values["x_sqnorm"] = vector(given.get("x_sqnorm"))
        results |= {"y": y.tensor, "goodness": goodness.tensor}
        if step:
            loss(values, layer, given.get("sign"), total)
            results["loss"] = total.tensor
            update(values, layer, y if p is None else p)
        else:
            results["p"] = p.tensor
        launch.add(**values)
        stages = 2 if step else 1
    done = []
    if multi_launch:
        for stage in range(stages):
            done.append(launch.run(stage, stage + 1, **options))
    else:
        done.append(launch.run(0, stages, **options))
    if reports is not None:
        reports += done
    assert launch.idle(), launch.words
    if op == "ff_network_step_":
        results |= {"goodness": totals.tensor, "loss": losses.tensor}
        if given["x"].dim() == 2:
            results |= {n: results[n][0] for n in ("goodness", "loss")}
    if op in cases.IN_PLACE:
        kept = {n: given[n] for n in ("weight", "bias", "state", "layers") if given.get(n) is not None}
        written = cases.tensors(kept)
        results |= {n.replace("state.", "").replace("layers.", ""): t for n, t in written.items() if "step" not in n}
    return results
