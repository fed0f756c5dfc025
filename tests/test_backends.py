"""Which backend runs: settings, refusals, explanations, and what an import does not do."""

import json
import os
import subprocess
import sys
import textwrap

import cases
import processor
import pytest
import torch

import ffkernels as ff
from ffkernels import _extension, backends


def python(code, **environment):
    """Run code in a fresh interpreter; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


X = torch.ones(2, 3)
EXTENSION = _extension.unavailable()
SETTINGS = [
    "auto", "reference", pytest.param("cpu", marks=pytest.mark.skipif(EXTENSION is not None, reason=f"{EXTENSION}"))
]  # fmt: skip


def test_use_backend_as_a_context_manager():
    before = ff.current_backend()
    with ff.use_backend("reference") as chosen:
        assert chosen.name == ff.current_backend() == "reference"
        with ff.use_backend("auto"):
            assert ff.current_backend() == "auto"
        assert ff.current_backend() == "reference"
    assert ff.current_backend() == before


def test_use_backend_made_before_is_the_setting_of_its_block():
    made = ff.use_backend("reference")
    ff.use_backend("auto")
    for _ in range(2):
        with made:
            assert ff.current_backend() == "reference"
        assert ff.current_backend() == "auto"


def test_use_backend_restores_after_an_error():
    before = ff.current_backend()
    with pytest.raises(KeyError), ff.use_backend("reference"):
        raise KeyError
    assert ff.current_backend() == before


def test_use_backend_as_a_setter():
    before = ff.current_backend()
    try:
        ff.use_backend("reference")
        assert ff.current_backend() == "reference"
        assert "'reference'" in ff.explain("ff_forward", X)
    finally:
        ff.use_backend(before)


@pytest.mark.parametrize("name", ["gpu", "", "CPU", None, 3])
def test_unknown_names(name):
    before = ff.current_backend()
    with pytest.raises(ValueError, match="backend must be one of"):
        ff.use_backend(name)
    assert ff.current_backend() == before


def test_auto_looks_at_no_gpu_for_tensors_on_a_cpu(monkeypatch):
    """A process that computes on its CPU takes no memory of a GPU, and may fork children that use one."""

    def looked():
        pytest.fail("looked for a GPU")

    for name in ("triton", "cuda"):
        monkeypatch.setitem(backends._UNAVAILABLE, name, looked)
    monkeypatch.setattr(backends, "_chosen", {})
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with ff.use_backend("auto"):
        ff.ff_forward(X, X)
        assert "not cuda: its ff_forward runs on cuda tensors, not on cpu" in ff.explain("ff_forward", X)


@pytest.mark.parametrize("name", backends.BACKENDS)
def test_a_backend_that_cannot_run_says_why(name, monkeypatch):
    monkeypatch.setitem(backends._UNAVAILABLE, name, lambda: "the moon is full")
    before = ff.current_backend()
    with pytest.raises(RuntimeError, match=f"'{name}' cannot run here: the moon is full"):
        ff.use_backend(name)
    assert ff.current_backend() == before


def test_every_backend_is_available_or_has_a_reason():
    for name in backends.BACKENDS:
        reason = backends.unavailable(name)
        if reason is None:
            with ff.use_backend(name):
                assert ff.current_backend() == name
        else:
            with pytest.raises(RuntimeError, match="cannot run here"):
                ff.use_backend(name)


def pretend(monkeypatch, kernels):
    """A "triton" backend that is available and has the given kernels only."""
    monkeypatch.setitem(backends._UNAVAILABLE, "triton", lambda: None)
    for op in cases.OPS:
        monkeypatch.delitem(backends._KERNELS, (op, "triton"), raising=False)
    for op, kernel in kernels.items():
        monkeypatch.setitem(backends._KERNELS, (op, "triton"), kernel)
    monkeypatch.setattr(backends, "_chosen", {})


def test_triton_kernels_serve_cuda_and_hip_tensors():
    """The dispatch key of tensors in torch's HIP builds is "CUDA" (masquerading) or "HIP": registered for either."""
    for op in ("ff_forward", "ff_step_", "ff_label_step_", "ff_network_step_", "apply_gradient_"):
        for key in ("CUDA", "HIP"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"ffkernels::{op}.triton", key), (op, key)


def test_a_chosen_backend_without_the_kernel_refuses_and_auto_goes_on(monkeypatch):
    pretend(monkeypatch, {"ff_grad": backends.Kernel(("cuda",), (torch.float16,))})
    with ff.use_backend("triton"):
        with pytest.raises(RuntimeError, match=r"ff_forward: backend 'triton' cannot run it: it has no kernel"):
            ff.ff_forward(X, X)
        given = cases.arguments("ff_grad")
        with pytest.raises(RuntimeError, match=r"its ff_grad runs on cuda tensors, not on cpu"):
            cases.call("ff_grad", given)
        with pytest.raises(RuntimeError, match=r"its ff_grad takes torch\.float16, not torch\.float32"):
            backends._select("ff_grad", "cuda", torch.float32)
    with ff.use_backend("auto"):
        cases.call("ff_grad", given)
        assert "its ff_grad runs on cuda tensors, not on cpu" in ff.explain("ff_grad", X)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("op", cases.OPS)
def test_auto_never_raises(op, dtype):
    with ff.use_backend("auto"):
        cases.call(op, cases.arguments(op, dtype=dtype))


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_backend_that_explain_names_is_the_one_that_runs(setting):
    seen = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with ff.use_backend(setting), Seen():
        ff.ff_forward(X, X)
        (backend,) = (name for name in backends.BACKENDS if f"runs on '{name}'" in ff.explain("ff_forward", X))
    assert f"ffkernels.ff_forward.{backend}" in seen
    assert setting in ("auto", backend)


OTHERS = ("apply_gradient_", "ff_network_forward", "ff_head_step_", "draw_other_labels", "draw_hard_inputs")


@pytest.mark.parametrize("setting", SETTINGS)
def test_info_is_true_under_every_setting(setting):
    with ff.use_backend("auto"):
        registered = (*cases.OPS, *OTHERS)
        auto = {op: backends._select(op, "cpu", torch.float32)[0] for op in registered}
    with ff.use_backend(setting):
        info = ff.info()
    assert json.loads(json.dumps(info)) == info
    assert info["backend"] == setting
    assert info["torch"] == torch.__version__
    assert info["threads"] == torch.get_num_threads()
    assert set(info["backends"]) == set(backends.BACKENDS)
    assert info["auto"]["cpu"] == auto  # whatever the setting is
    for name, entry in info["backends"].items():
        assert entry["available"] == (entry["reason"] is None) == (backends.unavailable(name) is None)
        assert entry["ops"] == [op for op in sorted(registered) if (op, name) in backends._KERNELS]


def test_an_import_loads_neither_triton_nor_the_extension():
    out = python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import ffkernels
        new = set(sys.modules) - before
        print([m for m in new if m.split(".")[0] in ("triton", "sklearn", "matplotlib", "pooch")],
              [lib for lib in torch.ops.loaded_libraries if "_C" in lib])
        """
    )
    assert out == "[] []"


def test_all_works_with_the_extension_hidden():
    out = python(
        """
        from pathlib import Path
        from ffkernels import _extension
        _extension._LIBRARY = Path("/nonexistent/_C.abi3.so")
        import torch
        import ffkernels as ff
        net = ff.FFNet.from_sizes([6, 4], num_classes=2)
        net.fit(torch.rand(8, 6), torch.arange(8) % 2, epochs=1, progress=False)
        net.predict(torch.rand(8, 6))
        assert set(ff.info()["auto"]["cpu"].values()) == {"reference"}
        assert ff.info()["build"] is None
        assert "cpu: the compiled extension is not built" in ff.explain("ff_forward", torch.ones(1))
        try:
            ff.use_backend("cpu")
        except RuntimeError as error:
            print(error)
        """
    )
    assert "backend 'cpu' cannot run here: the compiled extension is not built" in out


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("reference", "reference"),
        ("", "auto"),
        ("auto", "auto"),
        ("tpu", "ValueError environment variable FFKERNELS_BACKEND must be one of"),
    ],
)
def test_the_environment_variable(value, expected):
    out = python(
        """
        import torch
        import ffkernels as ff
        try:
            ff.ff_forward(torch.ones(2, 3), torch.ones(2, 3))
            print(ff.current_backend())
        except Exception as error:
            print(type(error).__name__, error)
        """,
        FFKERNELS_BACKEND=value,
    )
    assert out.startswith(expected)


def test_the_environment_variable_names_a_backend_that_cannot_run():
    out = python(
        """
        import torch
        import ffkernels as ff
        from ffkernels import backends
        backends._UNAVAILABLE["cuda"] = lambda: "there is no GPU"
        try:
            ff.ff_forward(torch.ones(2, 3), torch.ones(2, 3))
        except RuntimeError as error:
            print(error)
        """,
        FFKERNELS_BACKEND="cuda",
    )
    assert out == "ff_forward: backend 'cuda' cannot run it: there is no GPU"


@pytest.mark.skipif(EXTENSION is not None, reason=f"{EXTENSION}")
def test_bf16_products_are_found_where_they_are(monkeypatch):
    """What the command line's precision depends on, for every instruction set that this machine can be held to."""
    expected = {"portable": False, "avx2": False, "avx512": "avx512_bf16" in processor.flags(), "amx": True}
    for isa in _extension.cpu_isa()["available"]:
        monkeypatch.setenv("FFKERNELS_CPU_ISA", isa)
        assert backends.has_bf16_products(torch.device("cpu")) == expected[isa], isa
    assert not backends.has_bf16_products(torch.device("meta"))


@pytest.mark.skipif(EXTENSION is not None, reason=f"{EXTENSION}")
def test_what_is_asked_of_the_machine_does_not_depend_on_torchs_defaults():
    expected, dtype = backends.has_bf16_products(torch.device("cpu")), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert backends.has_bf16_products(torch.device("cpu")) == expected
    finally:
        torch.set_default_dtype(dtype)
