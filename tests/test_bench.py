"""The benchmark suite: every column computes its case, counts and ratios add up, the command writes what it shows."""

import json
from contextlib import nullcontext

import pytest
import torch

from ffkernels import SGD, Adam, _extension, cli
from ffkernels.benchmark import command, measure, report
from ffkernels.benchmark.cases import CASES, Case
from ffkernels.benchmark.check import Truth, allowed, require_right
from ffkernels.benchmark.columns import COLUMNS, FUSED, Products
from ffkernels.benchmark.limit import bandwidth, limit, peaks
from ffkernels.benchmark.problem import Problem
from ffkernels.benchmark.timing import ROUNDS, Timed, interleaved, wall

EXTENSION = _extension.unavailable()
pytestmark = pytest.mark.skipif(EXTENSION is not None, reason=f"{EXTENSION}")

TINY = [
    Case("forward", 6, (40, 20)),
    Case("step", 6, (40, 20)),
    Case("network", 6, (40, 20, 30), SGD(lr=100.0, momentum=0.9)),
    Case("labels", 6, (40, 20, 30)),
    Case("predict", 30, (40, 20, 30)),
]
COMPILED = ("compile", "compile medium")
CHECKED = [
    pytest.param(case, name, marks=[pytest.mark.slow] * (name in COMPILED), id=f"{case.kind}-{name}")
    for case in TINY
    for name, column in COLUMNS.items()
    if column.precision is not None and column.has(case)
]


def first_run(case, name):
    """The errors of a column's first run."""
    problem, column = Problem(case), COLUMNS[name]
    made = column.make(problem)
    with column.settings():
        result = made.run()
    return Truth(problem).errors(made, result)


@pytest.mark.parametrize(("case", "name"), CHECKED)
def test_every_column_computes_its_case(case, name):
    torch.compiler.reset()
    errors = first_run(case, name)
    expected = {
        "forward": {"y", "goodness"},
        "predict": {"prediction"},
    }.get(case.kind, {"goodness", "loss", "moment", "change"})  # fmt: skip
    assert expected <= errors.keys()
    require_right(name, errors, COLUMNS[name].precision)


def test_low_precision_runs_in_low_precision_where_the_machine_has_it():
    medium, highest = (first_run(TINY[1], f"ffkernels {precision}")["moment"] for precision in ("medium", "highest"))
    if _extension.cpu_isa()["used"] in ("portable", "avx2"):  # no bf16 products: float32
        assert medium == highest
    else:
        assert medium > 10 * highest


class Spoiled:
    """A right column with one thing made wrong after its run."""

    def __init__(self, problem, what):
        self.inner, self.what, self.problem = COLUMNS["eager"].make(problem), what, problem
        self.weights = self.inner.weights

    def run(self):
        result = self.inner.run()
        with torch.no_grad():
            if self.what == "no update":
                for w, before in zip(self.weights, self.problem.weights, strict=True):
                    w.copy_(before)
            elif self.what == "moment":
                self.inner.moments()[0].mul_(1.01)
            elif self.what == "constant prediction":
                result["prediction"].zero_()
            elif self.what == "fewer predictions":
                result["prediction"] = result["prediction"][1:]
            else:
                result[self.what] = [t * 1.001 for t in result[self.what]]
        return result

    def moments(self):
        return self.inner.moments()


@pytest.mark.parametrize(
    ("case", "what"),
    [
        (TINY[1], "no update"),
        (TINY[2], "no update"),
        (TINY[1], "moment"),
        (TINY[3], "goodness"),
        (TINY[1], "loss"),
        (TINY[4], "constant prediction"),
        (TINY[4], "fewer predictions"),
    ],
)
def test_a_wrong_result_is_refused(case, what):
    problem = Problem(case)
    column = Spoiled(problem, what)
    errors = Truth(problem).errors(column, column.run())
    with pytest.raises(RuntimeError, match="eager: the result is wrong and will not be timed: relative error"):
        require_right("eager", errors, "highest")


def test_nan_is_wrong():
    with pytest.raises(RuntimeError, match="of y, allowed"):
        require_right("x", {"y": float("nan")}, "medium")


def test_allowed_change_is_wider_than_the_gradients_error():
    assert allowed("change", "medium") == pytest.approx(2 * 0.03**0.5)
    assert allowed("y", "medium") == 0.03


def test_measuring_refuses_a_wrong_column(monkeypatch):
    spoiled = {"spoiled": measure.COLUMNS["eager"].__class__(lambda problem: Spoiled(problem, "moment"))}
    monkeypatch.setattr(measure, "COLUMNS", spoiled)
    with pytest.raises(RuntimeError, match="step 6 x 40->20, spoiled: the result is wrong"):
        measure.measure(TINY[1], 0.0)


def test_counts_by_hand():
    step = Case("step", 64, (784, 500))
    weights = 784 * 500
    assert step.flops == 2 * 2 * 128 * 784 * 500
    assert step.bytes_moved == 4 * (128 * 784 + 128 * 500 + 6 * weights)  # weight and two moments, read and written
    assert step.working_set == 4 * (128 * 784 + 128 * 500 + 3 * weights)
    forward = Case("forward", 64, (784, 500))
    assert forward.flops == step.flops // 2
    assert forward.bytes_moved == forward.working_set == 4 * (128 * 784 + 128 * 500 + weights)
    network = Case("network", 10, (30, 20, 40), SGD(momentum=0.9))
    assert network.flops == 2 * 2 * 20 * (30 * 20 + 20 * 40)
    assert network.bytes_moved == 4 * (20 * 30 + 4 * (30 * 20 + 20 * 40))
    assert Case("network", 10, (30, 20), SGD()).bytes_moved == 4 * (20 * 30 + 2 * 600)
    labels = Case("labels", 10, (30, 20, 40))
    assert labels.flops == 2 * 2 * (10 * 30 * 20 + 20 * 20 * 40)  # layer 1 once for both kinds of rows
    predict = Case("predict", 100, (30, 20, 40))
    assert predict.flops == 2 * (100 * 30 * 20 + 10 * 100 * 20 * 40)
    assert predict.bytes_moved == 4 * (100 * 30 + 30 * 20 + 20 * 40)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.kind)
def test_the_bare_products_are_the_cases_own(case):
    calls = Products(Problem(case), torch.float32).calls
    assert sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b, _ in calls) == case.flops
    assert all(out.shape == (a.shape[0], b.shape[1]) for a, b, out in calls)


def test_names_are_short_and_differ():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert {"step 1024 x 2000->2000", "network 64 x 784-500-500", "network 100 x 784-4x2000"} <= set(names)


def test_limit_is_the_slower_of_arithmetic_and_memory():
    case = Case("step", 64, (784, 500))
    assert limit(case.flops, case.bytes_moved, 1e12, 1e15) == pytest.approx(200_704_000 / 1e12)
    assert limit(case.flops, case.bytes_moved, 1e15, 1e10) == pytest.approx(10_065_408 / 1e10)


def test_peaks_are_measured_for_each_precision():
    found = peaks()
    assert found.keys() == {"highest", "high", "medium"}
    assert all(1e8 < value < 1e16 for value in found.values())
    assert 1e7 < bandwidth(1 << 20) < 1e14


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda ops: ops.cpu_peak("low", 1), "precision must be highest, high or medium, got low"),
        (lambda ops: ops.cpu_peak("high", 0), "threads must be in .* got 0"),
        (lambda ops: ops.cpu_bandwidth(100, 1), "bytes must be at least 4096, got 100"),
        (lambda ops: ops.cpu_bandwidth(5000, -1), "threads must be in .* got -1"),
    ],
)
def test_peaks_refuse_what_makes_no_sense(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(torch.ops.ffkernels)


class Clock:
    """Time that only functions under test let pass."""

    def __init__(self):
        self.now, self.order = 0.0, []

    def function(self, name, *seconds):
        costs = iter(seconds)

        def run():
            self.order.append(name)
            self.now += next(costs, seconds[-1])

        return run


def test_functions_are_timed_in_turns():
    clock, entered = Clock(), []

    class Settings:
        def __enter__(self):
            entered.append(len(clock.order))
            clock.now += 100.0  # settings are made before the clock starts

        def __exit__(self, *_):
            pass

    functions = {
        "a": Timed(clock.function("a", 1.0), Settings),
        "b": Timed(clock.function("b", 2.0, 2.0, 7.0, 2.0), Settings),
    }
    samples = interleaved(functions, 18.0, wall(lambda: clock.now))
    assert clock.order == ["a", "a", "b", "b", *["a", "b"] * 6]  # two to warm up, then 18 s / 3 s rounds
    assert entered == list(range(16))
    assert samples["a"] == pytest.approx([1.0] * 6)
    assert samples["b"] == pytest.approx([7.0, *[2.0] * 5])


def test_short_functions_are_called_several_times_a_sample():
    clock = Clock()
    timed = Timed(clock.function("a", 1e-3), nullcontext)
    assert interleaved({"a": timed}, 0.0, wall(lambda: clock.now)) == {"a": pytest.approx([1e-3] * ROUNDS[0])}
    assert len(clock.order) == 2 + 5 * ROUNDS[0]


BEGIN, END = (mark.format("measured") for mark in (report.BEGIN, report.END))
RECORD = {
    "name": "step 1 x 2->3",
    "seconds": {
        name: {"median": median}
        for name, median in {
            "autograd": 0.012, "eager": 0.009, "compile": 0.006, "mm float32": 0.003, "mm bf16": 0.001,
            "ffkernels medium": 0.002, "ffkernels high": 0.004, "ffkernels highest": 0.24,
        }.items()
    },
    "flops": 500_000_000,
    "bytes": 120_000_000,
    "bandwidth": 1e11,  # 1.2 ms, less than "highest" and more than "medium" computes
    "left_out": {"compile medium": "no compiler"},
}  # fmt: skip


def test_ratios_by_hand():
    found = report.with_ratios(RECORD, PEAK)
    assert found["limit"] == pytest.approx({"highest": 5e-3, "high": 1.2e-3, "medium": 1.2e-3})
    assert found["ratios"]["medium"] == pytest.approx(
        {"autograd": 6, "eager": 4.5, "compile": 3, "mm float32": 1.5, "mm bf16": 0.5, "of limit": 0.6}
    )
    assert found["ratios"]["highest"]["of limit"] == pytest.approx(5 / 240)


PEAK = {"highest": 1e11, "high": 1e12, "medium": 5e11}  # 5 ms, 0.5 ms, 1 ms of arithmetic


def run_of(*records):
    machine = {
        "ffkernels": "1", "cpu": "Z80", "cores": 1, "threads": 1, "isa": "portable", "torch": "2", "torch_isa": "none",
        "environment": {"FFKERNELS_CPU_ISA": "portable"}, "python": "3", "system": "CP/M",
    }  # fmt: skip
    cases = [report.with_ratios(record, PEAK) for record in records]
    return {"date": "1976-07-01", "machine": machine, "peak": PEAK, "cases": cases}


def test_tables_show_ratios_first_then_times():
    lines = report.text(run_of(RECORD)).splitlines()
    assert "Z80, 1 cores, 1 threads, portable" in lines[0]
    assert lines[0].endswith("1976-07-01, FFKERNELS_CPU_ISA=portable")
    assert lines[1] == "measured peak, TFLOP/s: medium 0.50, high 1.00, highest 0.10"
    assert [line.split() for line in lines[4:8]] == [
        ["case", "precision", "autograd", "eager", "compile", "compile", "bf16", "GEMMs", "fp32", "GEMMs", "bf16", "of",
         "limit", "ms"],
        ["step", "1", "x", "2->3", "medium", "6.00x", "4.50x", "3.00x", "-", "1.50x", "0.50x", "60%", "2.00"],
        ["high", "3.00x", "2.25x", "1.50x", "-", "0.75x", "0.25x", "30%", "4.00"],
        ["highest", "0.05x", "0.04x", "0.03x", "-", "0.01x", "0.00x", "2%", "240"],
    ]  # fmt: skip
    times = lines[-2].split()
    assert times == ["step", "1", "x", "2->3", "12.0", "9.00", "6.00", "-", "-", "3.00", "1.00", "2.00", "4.00", "240",
                     "1.20", "5.00"]  # fmt: skip
    assert lines[-1] == "compile medium is left out: no compiler"


def test_markdown_goes_between_the_marks():
    document = f"# Title\n\n{BEGIN}\nold\n{END}\nrest\n"
    new = report.replaced(document, report.markdown(run_of(RECORD)))
    assert new.startswith(f"# Title\n\n{BEGIN}\n\nMachine: Z80,")
    assert new.endswith(f"\n\n{END}\nrest\n")
    assert "| step 1 x 2->3 | medium | 6.00x | 4.50x | 3.00x | - | 1.50x | 0.50x | 60% | 2.00 |" in new.splitlines()
    assert "old" not in new
    assert report.replaced(new, "x") == report.replaced(document, "x")


@pytest.fixture
def tiny_suite(monkeypatch):
    """Two cases that take no time, without the columns that torch must compile."""
    monkeypatch.setattr(command, "CASES", TINY[:2])
    monkeypatch.setattr(command, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "COLUMNS", {name: c for name, c in COLUMNS.items() if name not in COMPILED})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_the_command_prints_writes_and_draws(tiny_suite, tmp_path, capsys):
    files = {kind: tmp_path / f"run.{kind}" for kind in ("json", "png", "md")}
    files["md"].write_text(f"{BEGIN}\n{END}\n")
    options = ["--json", str(files["json"]), "--png", str(files["png"]), "--markdown", str(files["md"])]
    assert cli.main(["bench", "--threads", "1", *options]) == 0
    printed = capsys.readouterr()
    assert printed.err.splitlines() == ["1/2 forward 6 x 40->20", "2/2 step 6 x 40->20"]
    run = json.loads(files["json"].read_text())
    assert printed.out == report.text(run) + "\n"
    assert run.keys() == {"date", "machine", "peak", "cases"}
    assert run["machine"].keys() >= {"cpu", "cores", "threads", "isa", "torch", "python"}
    assert run["machine"]["threads"] == 1
    assert run["peak"].keys() == {"highest", "high", "medium"}
    forward, step = run["cases"]
    assert (step["name"], step["kind"], step["batch"], step["sizes"]) == ("step 6 x 40->20", "step", 6, [40, 20])
    assert (step["flops"], step["bytes"], step["rounds"]) == (TINY[1].flops, TINY[1].bytes_moved, ROUNDS[0])
    assert step["optimizer"] == repr(Adam(lr=1e-3))
    assert forward["optimizer"] is None
    assert step["seconds"].keys() == COLUMNS.keys() - set(COMPILED)
    assert forward["seconds"].keys() == COLUMNS.keys() - {*COMPILED, "autograd"}
    assert all(0 < t["min"] <= t["median"] <= t["max"] for t in step["seconds"].values())
    for precision in ("highest", "high", "medium"):
        peak = run["peak"][precision]
        assert step["limit"][precision] == limit(TINY[1].flops, TINY[1].bytes_moved, peak, step["bandwidth"])
        assert step["ratios"][precision] == report.ratios(step, precision)
    assert set(FUSED) <= step["errors"].keys()
    assert "mm bf16" not in step["errors"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "| forward 6 x 40->20 | medium |" in files["md"].read_text()


def test_a_run_can_be_shown_again(tiny_suite, tmp_path, capsys, monkeypatch):
    source, png = tmp_path / "run.json", tmp_path / "run.png"
    source.write_text(json.dumps(run_of(RECORD)))
    monkeypatch.setattr(command, "Run", None)
    assert cli.main(["bench", "--from", str(source), "--png", str(png)]) == 0
    assert capsys.readouterr().out == report.text(run_of(RECORD)) + "\n"
    assert png.stat().st_size > 10_000


def test_only_and_quick_choose_cases(capsys):
    assert cli.main(["bench", "--list", "--only", "784-4x2000", "predict"]) == 0
    assert capsys.readouterr().out.splitlines() == ["network 100 x 784-4x2000", "predict 10000 x 784-500-500"]
    assert cli.main(["bench", "--list", "--quick"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in CASES if case.quick]
    assert cli.main(["bench", "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [case.name for case in CASES]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "no such case"], "no case has this in its name"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
    ],
)
def test_usage_errors(options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *options])
    usage, last = capsys.readouterr().err.splitlines()
    assert usage == "usage: python -m ffkernels bench [OPTION ...]"
    assert message in last


@pytest.mark.parametrize("option", ["--json", "--png", "--markdown", "--from"])
def test_what_cannot_be_written_or_read_is_refused_before_measuring(option, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "Run", None)
    assert cli.main(["bench", option, str(tmp_path / "no" / "such" / "file")]) == 1
    assert "error: " in capsys.readouterr().err


def test_files_that_hold_something_else_are_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "Run", None)
    other = tmp_path / "other"
    other.write_text("[1]")
    assert cli.main(["bench", "--from", str(other)]) == 1
    assert "does not hold a run of python -m ffkernels bench" in capsys.readouterr().err
    assert cli.main(["bench", "--markdown", str(other)]) == 1
    assert f"{other}: it must hold the lines" in capsys.readouterr().err
    assert other.read_text() == "[1]"


def test_the_highest_peak_of_a_run_counts(monkeypatch):
    found = iter([{"highest": 3.0, "medium": 5.0}, {"highest": 4.0, "medium": 2.0}])
    monkeypatch.setattr(measure, "peaks", lambda: next(found))
    monkeypatch.setattr(measure, "COLUMNS", {"eager": COLUMNS["eager"]})
    run = measure.Run()
    run.add(TINY[0], 0.0)
    assert run.peak == {"highest": 4.0, "medium": 5.0}
    assert run.machine["threads"] == torch.get_num_threads()


def test_without_the_extension_the_command_says_why(capsys, monkeypatch):
    monkeypatch.setattr("ffkernels.backends.unavailable", lambda backend: "it is not built")
    assert cli.main(["bench"]) == 1
    assert "error: the benchmarks need the CPU kernels: it is not built" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_compiler_torch_compile_is_left_out(monkeypatch):
    import torch._inductor.config as config

    monkeypatch.setattr(measure, "COLUMNS", {name: COLUMNS[name] for name in ("eager", "compile", *FUSED)})
    with config.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}):
        found = measure.measure(TINY[0], 0.0)
    assert found.left_out.keys() == {"compile"}
    assert "found no C++ compiler" in found.left_out["compile"]
    assert found.samples.keys() == {"eager", *FUSED}


@pytest.mark.parametrize(("capability", "kept"), [(None, True), ("avx2", False)])
def test_code_compiled_for_more_than_torch_may_use_is_not_taken(monkeypatch, capability, kept):
    import torch._inductor.config as config

    torch.backends.cpu.get_cpu_capability()  # torch reads the variable once: now, and not below
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    if capability:
        monkeypatch.setenv("ATEN_CPU_CAPABILITY", capability)
    seen = []

    class Looking(COLUMNS["eager"].make):
        def run(self):
            seen.append(config.fx_graph_cache)
            return super().run()

    with config.patch(fx_graph_cache=True):
        measure.checked(Problem(TINY[0]), {"looking": COLUMNS["eager"].__class__(Looking)})
    assert seen == [kept]


def test_help_names_every_option(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    text = capsys.readouterr().out
    for option in ("--quick", "--only", "--list", "--threads", "--from", "--png", "--markdown", "--json"):
        assert option in text
