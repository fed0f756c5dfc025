"""The command line: what train and info print, write and return; their JSON; how a run goes on."""

import json
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from command_line import options
from idx_files import NAMES, write_folder

import ffkernels as ff
from ffkernels import cli
from ffkernels.commands import train

pytestmark = pytest.mark.usefixtures("settings_of_commands")


def test_train_ends_with_error_and_seconds_and_writes_the_same_as_json(data_dir, tmp_path, capsys):
    target = tmp_path / "out.json"
    arguments = ["train", *options(data_dir), "--run-dir", str(tmp_path / "run"), "--json", str(target)]
    assert cli.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(target.read_text())
    assert lines[-2] == f"test error: {found['result']['test_error']:.2f} %"
    assert lines[-1] == f"training seconds: {found['result']['training_seconds']:.1f}"
    assert lines[0].startswith("tiny: 24 training and 12 test rows; net 20-6-5 on cpu")
    for line, record in zip(lines[1:3], found["history"], strict=True):
        assert line == (
            f"epoch {record['epoch']}/2: loss {record['loss'][0]:.3g} {record['loss'][1]:.3g}, "
            f"error {record['error']:.2f} %, {record['rows_per_second']:,.0f} rows/s"
        )
    assert found["arguments"]["hidden"] == [6, 5]
    assert found["run_dir"] == str(tmp_path / "run")


def test_quiet_prints_the_last_lines_only(data_dir, tmp_path, capsys):
    arguments = ["train", *options(data_dir), "--run-dir", str(tmp_path / "run"), "--quiet", "--validation", "6"]
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    pattern = r"validation error: \d+\.\d\d %\ntest error: \d+\.\d\d %\ntraining seconds: \d+\.\d\n"
    assert re.fullmatch(pattern, captured.out)
    assert captured.err == ""


def test_json_on_stdout_stands_there_alone(data_dir, run_dir, capsys):
    for arguments in (
        ["info"],
        ["train", "--resume", str(run_dir)],
        ["predict", "--run", str(run_dir), "--data-dir", str(data_dir)],
    ):
        assert cli.main([*arguments, "--json", "-"]) == 0
        captured = capsys.readouterr()
        assert isinstance(json.loads(captured.out), dict)
        assert captured.err != ""


def test_run_folder_of_its_own_under_runs(data_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *args: "20300102-030405")
    for expected in ("20300102-030405-tiny", "20300102-030405-tiny-2"):  # two in one second
        assert cli.main(["train", *options(data_dir), "--quiet"]) == 0
        assert (tmp_path / "runs" / expected / "result.json").exists()


def test_runs_that_start_at_the_same_time_have_different_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *args: "20300102-030405")
    together = threading.Barrier(8)

    def start(_):
        together.wait()
        return train._new_folder("tiny")

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(start, range(8)))
    assert len(folders) == 8 == len(list((tmp_path / "runs").iterdir()))


def test_a_data_folder_alone_says_what_data(data_dir, tmp_path, capsys):
    arguments = ["train", *options(data_dir)[2:], "--run-dir", str(tmp_path / "run"), "--quiet"]
    assert cli.main(arguments) == 0
    assert cli.main(["train", "--resume", str(tmp_path / "run"), "--data-dir", str(data_dir), "--quiet"]) == 0
    first, again = capsys.readouterr().out.split("test error: ")[1:]
    assert first == again


@pytest.mark.parametrize(
    ("folder", "prefix", "size"),
    [("FashionMNIST/raw", "", 28), ("KMNIST/raw", "", 28), ("usps", "usps-", 16)],
)
def test_data_in_the_form_of_mnist_are_trained_on_without_a_change(tmp_path, capsys, folder, prefix, size):
    (tmp_path / folder).mkdir(parents=True)
    names = [prefix + name for name in NAMES]
    write_folder(tmp_path / folder, rows=(20, 10), size=(size, size), classes=10, names=names)
    arguments = ["--data-dir", str(tmp_path), "--run-dir", str(tmp_path / "run"), "--hidden", "6", "--epochs", "1"]
    assert cli.main(["train", "--preset", "hinton", *arguments, "--head-layers", "1", "--predict-layers", "1"]) == 0
    name = folder.split("/")[0]
    assert f"{name}: 20 training and 10 test rows; net {size * size}-6 on cpu" in capsys.readouterr().out


def test_resume_takes_what_agrees_and_refuses_what_contradicts(data_dir, run_dir, capsys):
    result = (run_dir / "result.json").read_text()
    again = ["train", "--resume", str(run_dir), "--quiet"]
    assert cli.main([*again, *options(data_dir)]) == 0
    assert (run_dir / "result.json").read_text() == result
    for flags, message in {
        ("--hidden", "6", "4"): r"--hidden \[6, 4\] contradicts the run in .*run, which was started with \(6, 5\)",
        ("--lr", "0.1"): r"--lr 0\.1 contradicts the run in .*run, which was started with 0\.003",
        ("--seed", "1"): "--seed 1 contradicts the run in",
        ("--lr-schedule", "constant"): "--lr-schedule constant contradicts",
        ("--run-dir", "x"): "not allowed with argument --resume",
    }.items():
        with pytest.raises(SystemExit) as error:
            cli.main([*again, *flags])
        assert error.value.code == 2
        assert re.search(message, capsys.readouterr().err)


def test_resume_finds_data_that_were_moved(data_dir, run_dir, tmp_path, capsys):
    moved = data_dir.rename(tmp_path / "moved")
    assert cli.main(["train", "--resume", str(run_dir)]) == 1
    assert capsys.readouterr().err == f"error: data folder {data_dir} does not exist\n"
    assert cli.main(["train", "--resume", str(run_dir), "--data-dir", str(moved)]) == 0
    write_folder(moved, rows=(24, 9), size=(4, 5), classes=3)
    assert cli.main(["train", "--resume", str(run_dir), "--data-dir", str(moved)]) == 1
    assert "the data are not those" in capsys.readouterr().err


def test_resume_extends_a_run_with_a_constant_rate(data_dir, tmp_path, capsys):
    path = tmp_path / "run"
    flags = [*options(data_dir), "--lr-schedule", "constant", "--quiet"]
    assert cli.main(["train", *flags, "--run-dir", str(path)]) == 0
    assert cli.main(["train", "--resume", str(path), "--epochs", "3", "--quiet"]) == 0
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 3
    assert cli.main(["train", "--resume", str(path), "--epochs", "2"]) == 1
    assert "epochs is 3" in capsys.readouterr().err
    config = (path / "config.json").read_bytes()
    write_folder(data_dir, rows=(24, 9), size=(4, 5), classes=3)
    assert cli.main(["train", "--resume", str(path), "--epochs", "4"]) == 1  # on other data
    assert (path / "config.json").read_bytes() == config


def test_info_prints_what_its_json_holds(tmp_path, capsys):
    assert cli.main(["info", "--json", str(tmp_path / "i.json")]) == 0
    text = capsys.readouterr().out
    found = json.loads((tmp_path / "i.json").read_text())
    assert found == {"ffkernels": ff.__version__, **json.loads(json.dumps(ff.info()))}
    for name, backend in found["backends"].items():
        (line,) = re.findall(rf"^  {name} .*$", text.partition("backends:")[2], re.MULTILINE)
        if backend["available"]:
            assert line.split("has ")[1] == ", ".join(backend["ops"])
        else:
            assert backend["reason"] in line
    for op, backend in found["auto"]["cpu"].items():
        assert re.search(rf"^  {op} +{backend}$", text, re.MULTILINE)


def test_without_triton_nothing_else_is_said():
    """Not by torch either, parts of which, where it was built with CUDA, warn when they are imported without triton."""
    code = "import sys; sys.modules['triton'] = None; import torch; torch.version.cuda = '13.0'; "
    code += "from ffkernels import cli; sys.exit(cli.main(['info']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"triton +cannot run: ", done.stdout)


def test_the_backend_of_the_environment_is_kept_unless_a_flag_says_otherwise(data_dir, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(train, "train", lambda *args, **kwargs: used.append(ff.current_backend()) or sys.exit(9))
    for name, flags in (("a", []), ("b", ["--backend", "auto"])):
        with ff.use_backend("reference"), pytest.raises(SystemExit):
            cli.main(["train", *options(data_dir), "--run-dir", str(tmp_path / name), *flags])
    assert used == ["reference", "auto"]
    with ff.use_backend("auto"), pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(tmp_path / "a")])
    assert used[2] == "reference"  # the run's


def test_version(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["--version"])
    assert error.value.code == 0
    assert capsys.readouterr().out == f"ffkernels {ff.__version__}\n"
