"""The command line: what it prints, writes and returns; its JSON; and one clear line for everything that goes wrong."""

import argparse
import dataclasses
import json
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_data import NAMES, idx_bytes, write_folder

import ffkernels as ff
from ffkernels import cli, data, run, training
from ffkernels.commands import train
from ffkernels.config import TrainConfig
from ffkernels.data import load_mnist
from ffkernels.presets import PRESETS
from ffkernels.run import RunFolder


@pytest.fixture(autouse=True)
def _settings():
    """The commands set threads and backend for their process."""
    threads = torch.get_num_threads()
    with ff.use_backend(ff.current_backend()):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def data_dir(tmp_path):
    write_folder(tmp_path / "tiny", rows=(24, 12), size=(4, 5), classes=3)
    return tmp_path / "tiny"


def options(data_dir):
    return ["--data", "mnist", "--data-dir", str(data_dir), "--hidden", "6", "5", "--epochs", "2", "--threads", "1"]


@pytest.fixture
def run_dir(data_dir, tmp_path, capsys):
    """A finished run."""
    assert cli.main(["train", *options(data_dir), "--run-dir", str(tmp_path / "run"), "--quiet"]) == 0
    capsys.readouterr()
    return tmp_path / "run"


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


def test_predict_by_known_data_and_by_files(data_dir, run_dir, tmp_path, capsys):
    dataset = load_mnist(data_dir)
    expected = ff_predictions(run_dir, dataset.x_test)
    error = 100 * (expected != dataset.y_test).double().mean().item()
    last = f"error: {error:.2f} % of 12"
    base = ["predict", "--run", str(run_dir)]

    assert cli.main([*base, "--data-dir", str(data_dir), "--json", str(tmp_path / "p.json")]) == 0
    assert capsys.readouterr().out.splitlines() == [last]
    found = json.loads((tmp_path / "p.json").read_text())
    assert found["predictions"] == expected.tolist()
    assert found["error"] == error

    images, labels = (data_dir / f"t10k-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    printed = [str(v) for v in expected.tolist()]
    assert cli.main([*base, "--input", str(images)]) == 0
    assert capsys.readouterr().out.splitlines() == printed
    assert cli.main([*base, "--input", str(images), "--labels", str(labels)]) == 0
    assert capsys.readouterr().out.splitlines() == [*printed, last]

    np.save(tmp_path / "y.npy", dataset.y_test.numpy().astype(np.int16))
    bytes_ = (dataset.x_test * 255).round().to(torch.uint8).numpy()
    for name, array in {
        "flat floats": dataset.x_test.numpy(),
        "doubles": dataset.x_test.double().numpy().reshape(12, 4, 5),
        "bytes": bytes_.reshape(12, 1, 4, 5),
    }.items():
        np.save(tmp_path / "x.npy", array)
        outputs = [tmp_path / "labels.txt", tmp_path / "labels.npy"]
        for output in outputs:
            arguments = ["--input", str(tmp_path / "x.npy"), "--labels", str(tmp_path / "y.npy")]
            assert cli.main([*base, *arguments, "--output", str(output)]) == 0
            assert capsys.readouterr().out.splitlines() == [last], name
        assert outputs[0].read_text().split() == printed
        assert np.load(outputs[1]).tolist() == expected.tolist()


def test_a_standardised_run_predicts_and_evaluates_standardised_pixels(data_dir, tmp_path, capsys):
    path = tmp_path / "run"
    flags = ["--standardize", "0.9", "0.2", "--validation", "8", "--quiet"]
    assert cli.main(["train", *options(data_dir), *flags, "--run-dir", str(path)]) == 0
    dataset = load_mnist(data_dir)
    scaled = (dataset.x_test - 0.9) / 0.2
    expected = ff_predictions(path, scaled)
    error = f"{100 * (expected != dataset.y_test).double().mean().item():.2f} %"
    assert f"test error: {error}" in capsys.readouterr().out
    held_out = ff_predictions(path, (dataset.x_train[-8:] - 0.9) / 0.2) != dataset.y_train[-8:]
    result = json.loads((path / "result.json").read_text())
    assert result["validation_error"] == 100 * held_out.double().mean().item()
    assert not torch.equal(expected, ff_predictions(path, dataset.x_test))
    images = str(data_dir / "t10k-images-idx3-ubyte.gz")
    for source in (["--data-dir", str(data_dir)], ["--input", images]):
        assert cli.main(["predict", "--run", str(path), *source, "--json", str(tmp_path / "p.json")]) == 0
        assert json.loads((tmp_path / "p.json").read_text())["predictions"] == expected.tolist()


def ff_predictions(run_dir, x):
    """By hand, from the checkpoint: config and state_dict are all that a net takes."""
    stored = json.loads((run_dir / "config.json").read_text())["arguments"]
    net = ff.FFNet(
        [
            ff.FFLinear(k, n, normalize=stored["normalize"], goodness=stored["goodness"], threshold=float(n),
                        temperature=stored["temperature"])
            for k, n in ((20, 6), (6, 5))
        ],
        num_classes=3,
    )  # fmt: skip
    net.load_state_dict(torch.load(run_dir / "checkpoint-000002.pt", weights_only=True)["net"])
    return net.predict(x)


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


def test_every_choice_of_a_run_has_a_flag_whose_help_states_its_default():
    (commands,) = [a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    assert set(commands.choices) == {"info", "train", "predict", "bench"}
    actions = {a.dest: a for a in commands.choices["train"]._actions}
    for field in dataclasses.fields(TrainConfig):
        action = actions[field.name]
        assert action.default is argparse.SUPPRESS  # so that --resume knows what was given
        assert re.search(r"\(default: .+\)$", action.help)
        if isinstance(field.default, (int, float)):
            assert action.help.endswith(f"(default: {field.default})")
    for command in commands.choices.values():
        assert "--json" in command.format_help()
        assert command.get_default("command") is not None


def test_flags_reach_the_config(data_dir, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        train, "_create", lambda path, name, config, dataset, launch: seen.append((path, config)) or sys.exit(9)
    )
    flags = ["--activation", "gelu", "--normalize", "l2", "--label-strength", "2", "--goodness", "mean", "--threshold",
             "2.5", "--temperature", "0.5", "--head-layers", "2", "1", "--head-lr", "0.3", "--head-weight-decay",
             "0.01", "--mode", "simultaneous", "--batch-size", "7", "--optimizer", "sgd",
             "--lr", "0.1", "--lr-schedule", "constant", "--momentum", "0.5", "--weight-decay", "0.25",
             "--precision", "medium", "--backend", "reference", "--device", "cpu", "--seed", "3",
             "--validation", "5", "--validate-every", "2", "--shift", "1", "--init", "normal", "--direction",
             "minimize", "--peer", "0.03", "--dropout", "0.1", "--loss", "hinge", "--alpha", "3", "--margin", "2",
             "--negatives", "hard", "--predict", "both", "--predict-layers", "2", "--candidates", "2",
             "--average", "0.9", "--warmup", "0.1", "--selected", "0.5", "--selected-floor", "0.2",
             "--standardize", "0.2", "0.4", "--receptive-field", "3", "--noise",
             "0.25"]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["train", *options(data_dir), *flags, "--run-dir", "there"])
    assert seen == [
        (
            "there",
            TrainConfig(
                data="mnist", data_dir=str(data_dir), validation=5, hidden=(6, 5), activation="gelu", normalize="l2",
                goodness="mean", threshold=2.5, temperature=0.5, label_strength=2.0, epochs=2, mode="simultaneous",
                batch_size=7, optimizer="sgd", lr=0.1, lr_schedule="constant", momentum=0.5, weight_decay=0.25,
                precision="medium", backend="reference", device="cpu", threads=1, seed=3, validate_every=2, shift=1,
                init="normal", direction="minimize", peer=0.03, dropout=0.1, loss="hinge", alpha=3.0, margin=2.0,
                negatives="hard", head_layers=(2, 1), head_lr=0.3, head_weight_decay=0.01, predict="both",
                predict_layers=(2,), candidates=2, average=0.9, warmup=0.1, selected=0.5, selected_floor=0.2,
                standardize=(0.2, 0.4), receptive_field=3, noise=0.25,
            ),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_flags_that_the_list_shows(name, data_dir, tmp_path, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(data, "load", lambda *args: load_mnist(data_dir))
    monkeypatch.setattr(
        train, "_create", lambda path, name, config, dataset, launch: seen.append((name, config)) or sys.exit(9)
    )
    with pytest.raises(SystemExit) as ended:
        cli.main(["train", "--list-presets"])
    assert ended.value.code == 0
    (shown,) = re.findall(rf"(?:^|\n){name}\n(.*?)(?:\n\n(?=\S)|\n$)", capsys.readouterr().out, re.DOTALL)
    flags = shown[shown.index("  --") :].split()
    for arguments in (["--preset", name], flags, ["--preset", name, "--seed", "7", "--hidden", "5", "4", "3"]):
        with pytest.raises(SystemExit):
            cli.main(["train", *arguments])
    (folder, preset), (_, same), (_, changed) = seen
    assert folder == f"tiny-{name}"
    assert dataclasses.asdict(preset) == dataclasses.asdict(same)
    assert type(preset) is PRESETS[name]
    assert dataclasses.asdict(changed) == {**dataclasses.asdict(preset), "seed": 7, "hidden": (5, 4, 3)}
    assert dataclasses.asdict(preset.resolved()) == dataclasses.asdict(same.resolved())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_on_other_idx_data_twice_to_the_same_bits(name, tmp_path, monkeypatch):
    """As USPS is to MNIST: images of another size, a number of classes of their own; nothing but --data-dir says so."""
    monkeypatch.setattr(run, "draw", lambda *args: None)  # takes most of the time
    write_folder(tmp_path / "other", rows=(24, 12), size=(5, 6), classes=4)
    flags = ["--data-dir", str(tmp_path / "other"), "--hidden", "8", "7", "6", "--epochs", "2", "--validation", "6",
             "--batch-size", "2", "--threads", "1", "--quiet"]  # fmt: skip
    if PRESETS[name]().head_epochs:
        flags += ["--head-epochs", "2"]
    nets = []
    for folder in ("a", "b"):
        assert cli.main(["train", "--preset", name, *flags, "--run-dir", str(tmp_path / folder)]) == 0
        nets.append(RunFolder.open(tmp_path / folder).load_net())
    first, again = (net.state_dict() for net in nets)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert nets[0].num_classes == 4
    assert nets[0].predict(torch.rand(3, 30)).max() < 4
    untrained = RunFolder.open(tmp_path / "a").build_net()
    assert not torch.equal(untrained.stack[0].weight, nets[0].stack[0].weight)


USAGE = {
    "--hidden 0": r"hidden\[0\] must be in \[1, ",
    "--hidden": "--hidden: expected at least one argument",
    "--epochs 0": r"epochs must be in \[1, ",
    "--epochs two": "invalid int value: 'two'",
    "--batch-size -1": r"batch_size must be in \[1, ",
    "--threads 0": r"threads must be in \[1, ",
    "--validation -1": r"validation must be in \[0, ",
    "--seed -1": r"seed must be in \[0, ",
    "--lr -1": "lr must be finite and >= 0.0, got -1.0",
    "--lr inf": "lr must be finite",
    "--weight-decay nan": "weight_decay must be finite",
    "--threshold nan": "threshold must be finite and >= 0, got nan",
    "--threshold wide": "must be a number or one of width, half-width, got 'wide'",
    "--temperature 0": "temperature must be finite and > 0, got 0",
    "--label-strength inf": "label_strength must be finite",
    "--momentum 0.5": "momentum is for optimizer 'sgd' or 'hinton_sgd', the optimizer is 'adam'",
    "--optimizer hinton_sgd --momentum 1": "momentum must be finite and in",
    "--negatives hard": "negatives 'hard' needs a softmax head: name the layers it looks at in head_layers",
    "--selected 0.5": "selected 0.5 needs a softmax head",
    "--head-layers 1 --selected 1.5": "selected must be at most 1, got 1.5",
    "--standardize 0.1": "standardize must hold a mean and a deviation, or nothing, got",
    "--standardize 0.1 0": r"standardize\[1\] must be finite and > 0, got 0.0",
    "--negatives hard --negatives-once --head-layers 1": "negatives_once must be False for negatives 'hard'",
    "--negatives permuted --predict both": "predict 'both' needs a softmax head",
    "--receptive-field -1": r"receptive_field must be in \[0, 32768\]",
    "--recurrent --receptive-field 3": "receptive_field must be 0 for a recurrent net, got 3",
    "--selected-floor 0": "selected_floor must be finite and > 0",
    "--head-layers 1 --head-epochs 2 --selected 0.5": "head_epochs must be 0 but .* with all inputs selected",
    "--predict both": "predict 'both' needs a softmax head",
    "--candidates 3": "candidates 3 needs a softmax head",
    "--negatives hybrid --head-layers 1": "negatives 'hybrid' needs predict 'head', head_epochs and no recurrent net",
    "--head-epochs 2": "head_epochs must be 0 but for a net with head_layers",
    "--head-layers 1 --head-epochs 2 --average 0.9": "head_epochs must be 0 but for a net with head_layers",
    "--blurs 14": r"blurs must be in \[0, 13\]",
    "--recurrent --mode greedy": "mode must be 'simultaneous' for a recurrent net, got 'greedy'",
    "--recurrent --dropout 0.1": "dropout must be 0.0 for a recurrent net",
    "--recurrent --damping 1": r"damping must be in \[0, 1\)",
    "--recurrent --judged 3 3": "judged must hold at least one iteration, each once",
    "--head-layers 3": r"head_layers must be in \[1, 2\]",
    "--head-layers 1 1": "head_layers must name each layer once",
    "--predict-layers 0": r"predict_layers must be in \[1, 2\]",
    "--head-layers 1 --mode greedy": "mode must be 'simultaneous' with a head",
    "--head-layers 1 --head-lr -1": "lr must be finite and >= 0.0, got -1.0",
    "--average 1": "average must be a decay in",
    "--warmup 1": "warmup must be a share",
    "--dropout 1": "dropout must be",
    "--peer -1": "peer must be finite and >= 0",
    "--shift -1": "shift must be in",
    "--noise -1": "deviation must be finite and >= 0",
    "--affine 10 0.1": "affine must hold degrees, a share and pixels, or nothing, got",
    "--affine 10 1 1": r"scale must be in \[0, 1\), got 1.0",
    "--affine 10 0.1 1 --shift 1": "shift must be 0 with affine",
    "--loss symba --alpha 0": "alpha must be finite and > 0",
    "--loss hinge --margin -1": "margin must be finite and >= 0",
    "--validate-every 0": "validate_every must be in",
    "--optimizer sgd --momentum -1": "momentum must be finite and >= 0",
    "--optimizer lion": "invalid choice: 'lion'",
    "--activation step": "invalid choice: 'step'",
    "--precision low": "invalid choice: 'low'",
    "--backend tpu": "invalid choice: 'tpu'",
    "--device nowhere": "device must be a torch device like 'cpu' or 'cuda', got 'nowhere'",
    "--data digits --data-dir .": "data_dir is for data 'mnist'",
    "--preset best": "invalid choice: 'best'",
    "--preset hinton --resume x": "--preset cannot go with --resume",
    "--speed 3": "unrecognized arguments: --speed 3",
}


@pytest.mark.parametrize("flags", USAGE)
def test_usage_errors_leave_nothing_and_exit_2(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        cli.main(["train", *flags.split()])
    assert error.value.code == 2
    assert re.search(USAGE[flags], capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: COMMAND"),
        ("predict --input x", "the following arguments are required: --run"),
        ("predict --run x", "give either --input FILE, or --data"),
        ("predict --run x --input y --data mnist", "give either --input FILE, or --data"),
        ("predict --run x --data mnist --labels y", "--labels goes with --input"),
        ("predict --run x --input y --threads 0", "--threads must be at least 1, got 0"),
    ],
)
def test_usage_errors_of_other_commands(arguments, message, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(arguments.split())
    assert error.value.code == 2
    usage, last = capsys.readouterr().err.splitlines()  # a line each: the options would hide what is wrong
    assert usage.startswith("usage: ")
    assert re.search(message, last)


def one_error_line(capsys):
    captured = capsys.readouterr()
    assert re.fullmatch(r"error: .+\n", captured.err)
    return captured.err


def test_runtime_errors_are_one_line_and_exit_1(data_dir, run_dir, tmp_path, capsys):
    train = ["train", *options(data_dir), "--run-dir", str(tmp_path / "new")]
    predict = ["predict", "--run", str(run_dir)]
    np.save(tmp_path / "small.npy", np.zeros((2, 7), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((2, 20), np.int32))
    np.save(tmp_path / "object.npy", np.array([{}, {}]), allow_pickle=True)
    (tmp_path / "bad.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "labels").write_bytes(idx_bytes((2,), (0, 1)))
    images = str(data_dir / "t10k-images-idx3-ubyte.gz")
    for arguments, message in (
        ([*train[:-1], str(run_dir)], "holds a run already: continue it with --resume"),
        ([*train, "--data-dir", "/nowhere"], "data folder /nowhere does not exist"),
        ([*train, "--json", "/nowhere/x.json"], "/nowhere/x.json: there is no such folder"),
        ([*train, "--device", "xpu"], "device 'xpu' cannot be used here: .*not compiled with XPU"),
        ([*train, "--validation", "24"], "validation must be less than the 24 training rows"),
        ([*train[:-1], str(data_dir / "train-images-idx3-ubyte.gz" / "x")], "train-images"),
        (["train", "--resume", str(tmp_path)], "holds no run"),
        (["predict", "--run", str(tmp_path), "--data", "mnist"], "holds no run"),
        ([*predict, "--input", str(tmp_path / "absent.npy")], "absent.npy: no such file"),
        ([*predict, "--input", str(tmp_path / "absent")], "absent: no such file"),
        ([*predict, "--input", str(tmp_path / "bad.npy")], "bad.npy: not a usable .npy file"),
        ([*predict, "--input", str(tmp_path / "object.npy")], "object.npy: not a usable .npy file"),
        ([*predict, "--input", str(tmp_path / "ints.npy")], "ints.npy: must hold unsigned bytes or floating-point"),
        ([*predict, "--input", str(tmp_path / "small.npy")], "has 7 pixels an image, the run in .* trained on 20"),
        ([*predict, "--input", images, "--labels", str(tmp_path / "labels")], "labels: 2 labels, but .* has 12 images"),
        ([*predict, "--input", images, "--labels", str(tmp_path / "small.npy")], r"must hold integers of shape \(B,\)"),
        ([*predict, "--input", images, "--output", "/nowhere/labels.txt"], "No such file or directory"),
    ):
        assert cli.main(arguments) == 1
        assert re.search(message, one_error_line(capsys))
        with pytest.raises((OSError, ValueError, RuntimeError), match=message):
            cli.main([*arguments, "--debug"])
        capsys.readouterr()
    assert not (tmp_path / "new").exists()


def test_more_classes_than_pixels_leave_no_run(tmp_path, capsys):
    write_folder(tmp_path / "few", rows=(8, 8), size=(1, 3), classes=5)
    assert cli.main(["train", *options(tmp_path / "few"), "--run-dir", str(tmp_path / "run")]) == 1
    assert "num_classes must be in [2, 3]" in one_error_line(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")
def test_a_damaged_checkpoint_is_a_warning_then_an_error(run_dir, data_dir, capsys):
    predict = ["predict", "--run", str(run_dir), "--data-dir", str(data_dir)]
    (run_dir / "checkpoint-000002.pt").write_bytes(b"")
    assert cli.main(predict) == 0
    assert re.fullmatch(r"warning: .*000002\.pt: truncated.*using checkpoint-000001\.pt.*\n", capsys.readouterr().err)
    (run_dir / "checkpoint-000001.pt").write_bytes(b"")
    assert cli.main(predict) == 1
    assert "has no usable checkpoint" in one_error_line(capsys)


def test_interrupted_between_epochs_says_how_to_go_on(data_dir, tmp_path, capsys, monkeypatch):
    real, path = training.error_percent, tmp_path / "run"

    def interrupted_in_the_second_epoch(*args, **kwargs):
        if list(path.glob("checkpoint-*")):
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(training, "error_percent", interrupted_in_the_second_epoch)
    assert cli.main(["train", *options(data_dir), "--run-dir", str(path)]) == 130
    expected = f"\ninterrupted; continue with: python -m ffkernels train --resume {path}\n"
    assert capsys.readouterr().err == expected
    monkeypatch.undo()
    assert cli.main(["train", "--resume", str(path), "--quiet"]) == 0
    assert len((path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_ctrl_c_in_a_real_process(data_dir, tmp_path):
    path = tmp_path / "run"
    arguments = [*options(data_dir), "--epochs", "100000", "--run-dir", str(path), "--quiet"]
    process = subprocess.Popen(
        [sys.executable, "-m", "ffkernels", "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in the background inherit it ignored
    )
    try:
        deadline = time.monotonic() + 180
        while not list(path.glob("checkpoint-*.pt")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=180)
    finally:
        process.kill()
        process.communicate()  # closes the pipes, whatever happened
    assert process.returncode == 130
    assert out == ""
    assert err.strip() == f"interrupted; continue with: python -m ffkernels train --resume {path}"
    subprocess.run(
        [sys.executable, "-m", "ffkernels", "predict", "--run", path, "--data-dir", data_dir],
        check=True, capture_output=True,
    )  # fmt: skip


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
