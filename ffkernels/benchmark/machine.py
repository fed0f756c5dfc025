"""The machine and the software that a run was made with; nothing that names the machine itself."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any

import torch

from .. import __version__, _extension

# Variables by which torch or this package are held to a lower instruction set.
_HELD_BY = ("FFKERNELS_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")


def _cpu_model() -> str:
    """The processor's own name, as far as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """As JSON holds it; the extension must be there."""
    isa = _extension.cpu_isa()
    assert isa is not None
    return {
        "ffkernels": __version__,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": isa["used"],
        "torch": torch.__version__,
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "environment": {name: os.environ[name] for name in _HELD_BY if os.environ.get(name)},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
