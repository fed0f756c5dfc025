"""``python -m ffkernels info``: what was built, what this machine can run, what would be chosen."""

from __future__ import annotations

import argparse
from typing import Any

from .. import __version__, backends
from .output import Output


def add_info(commands: Any) -> argparse.ArgumentParser:
    p: argparse.ArgumentParser = commands.add_parser(
        "info", help="what was built, what this machine can run, what would be chosen"
    )
    return p


def info(args: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    out, found = Output(args), {"ffkernels": __version__, **backends.info()}
    out.result(_describe(found))
    out.write_json(found)
    return 0


def _describe(found: dict[str, Any]) -> str:
    lines = [
        f"ffkernels {found['ffkernels']}, torch {found['torch']}, Python {found['python']}, "
        f"{found['threads']} CPU threads",
        "",
    ]
    if found["build"] is None:
        lines.append("compiled extension: not there")
    else:
        lines.append("compiled extension:")
        lines += [f"  {name:<14}{_listed(value)}" for name, value in found["build"].items()]
    if found["cpu_isa"] is not None:
        isa = found["cpu_isa"]
        lines.append(f"CPU kernels: {isa['used']} (this machine has {', '.join(isa['available'])})")
    if found["cuda"] is not None:
        lines.append("CUDA runtime:")
        lines += [f"  {name:<14}{_listed(value)}" for name, value in found["cuda"].items()]
    lines.append("backends:")
    for name, backend in found["backends"].items():
        state = f"has {', '.join(backend['ops'])}" if backend["available"] else f"cannot run: {backend['reason']}"
        lines.append(f"  {name:<14}{state}")
    for device, chosen in found["auto"].items():
        lines.append(f"setting {found['backend']!r}; for float32 tensors on {device} 'auto' chooses:")
        lines += [f"  {op:<20}{backend}" for op, backend in chosen.items()]
    return "\n".join(lines)


def _listed(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_listed, value)) or "none"
    return "none" if value is None else str(value)
