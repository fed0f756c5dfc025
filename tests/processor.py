"""What /proc/cpuinfo says that the processor has."""

import re
from pathlib import Path


def flags() -> set[str]:
    cpuinfo = Path("/proc/cpuinfo")
    return set(re.findall(r"\w+", cpuinfo.read_text())) if cpuinfo.exists() else set()
