"""Runs the launches of Triton code on CPU tensors: `kernel[grid](...)` goes to the interpreter inside a context."""

from __future__ import annotations

import contextlib

from .compilers import compile_triton, run_compiled
from .report import Report


@contextlib.contextmanager
def triton_launches(arch: int = 80, **run_options):
    """While open, launches of @triton.jit functions compile for sm_<arch> and run here; yields the list of their
    reports.

    The code around the kernels (grids, options, scratch tensors) runs as it is, on CPU tensors. run_options go to
    run().
    """
    from triton.runtime.jit import JITFunction

    reports: list[Report] = []

    def launch(self, *args, grid, warmup=False, **kwargs):
        names = self.arg_names
        given = dict(zip(names, args, strict=False))
        given.update((key, kwargs.pop(key)) for key in list(kwargs) if key in names)
        for param in self.params:
            if param.name not in given and param.has_default:
                given[param.name] = param.default
        constants = {p.name: given[p.name] for p in self.params if p.is_constexpr}
        rest = [given[name] for name in names if name not in constants]
        options = {key: kwargs.pop(key) for key in ("num_warps", "num_stages") if key in kwargs}
        kernel = compile_triton(self, rest, constants, arch, **options, **kwargs)
        size = grid({**given, **options}) if callable(grid) else grid
        reports.append(run_compiled(kernel, size, rest, **run_options))

    original = JITFunction.run
    JITFunction.run = launch
    try:
        yield reports
    finally:
        JITFunction.run = original
