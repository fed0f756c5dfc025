"""Run folders: what they hold, and that a run stopped at any moment ends where the uninterrupted one ends."""

import dataclasses
import json
import os
import random
import signal
import struct
import subprocess
import sys
import time

import pytest
import torch

from ffkernels import checkpoint, plots, run
from ffkernels.config import TrainConfig
from ffkernels.data import Dataset
from ffkernels.presets import PRESETS
from ffkernels.run import RunError, RunFolder

TIMING = ("seconds", "rows_per_second")
CONFIG = TrainConfig(data="mnist", hidden=(8, 6), epochs=4, batch_size=16, device="cpu")


@pytest.fixture(scope="module")
def dataset():
    """Three noisy patterns of 4 x 5 pixels."""
    g = torch.Generator().manual_seed(0)
    patterns, y = torch.rand(3, 20, generator=g), torch.arange(60) % 3
    x = (patterns[y] + 0.2 * torch.rand(60, 20, generator=g)).clamp(0, 1)
    return Dataset("patterns", x[:48], y[:48], x[48:], y[48:], (1, 4, 5), 3)


def train(folder, dataset, **options):
    return run.train(folder, dataset, progress=False, **options)


def what_remains(path):
    """A finished run without its timing: last checkpoint, metrics, result."""
    content = checkpoint.load_latest(path)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((path / "result.json").read_text())
    del result["training_seconds"]
    for record in (*content["history"], *lines):
        for name in TIMING:
            assert record.pop(name) > 0
    return content, lines, result


def assert_same(a, b):
    (content_a, *rest_a), (content_b, *rest_b) = a, b
    assert rest_a == rest_b
    assert content_a["history"] == content_b["history"]
    assert content_a["net"].keys() == content_b["net"].keys()
    for name, t in content_a["net"].items():
        assert torch.equal(t, content_b["net"][name]), name


VARIANTS = {
    "adam, linear": {},
    "greedy": {"mode": "greedy", "epochs": 2},
    "sgd, constant, held out rows": {"optimizer": "sgd", "lr_schedule": "constant", "validation": 8},
    "hinton": {
        "optimizer": "hinton_sgd", "peer": 0.1, "dropout": 0.2, "negatives": "hard", "head_layers": (1, 2),
        "predict": "both", "average": 0.9, "shift": 1, "init": "normal", "warmup": 0.2, "validate_every": 3,
        "selected": 0.5, "receptive_field": 3, "noise": 0.3,
    },
    "pairs, low is positive": {"loss": "pair", "direction": "minimize", "lr_schedule": "constant-linear"},
    "without labels": {
        "negatives": "hybrid", "blurs": 2, "predict": "head", "head_layers": (1, 2), "head_epochs": 2, "epochs": 2,
    },
    "without labels, greedy": {
        "negatives": "hybrid", "predict": "head", "head_layers": (2,), "head_epochs": 2, "epochs": 1, "mode": "greedy",
    },
    "recurrent": {"recurrent": True, "learned": (2, 3), "judged": (3,), "negatives": "hard", "head_layers": (1, 2)},
    "standardised, wrong labels drawn once, greedy": {
        "standardize": (0.4, 0.3), "label_strength": 2.0, "shift": 1, "negatives": "permuted", "negatives_once": True,
        "mode": "greedy", "epochs": 2,
    },
    "adamw, one layer, affine": {"affine": (10.0, 0.1, 1.0), "optimizer": "adamw", "weight_decay": 0.1, "hidden": (5,)},
}  # fmt: skip


# What makes a preset small; each has four epochs in all.
SMALL = {
    "usual": {"epochs": 2, "validation": 8},
    "unsupervised": {"hidden": (8, 6, 5), "epochs": 2, "head_epochs": 2, "batch_size": 16},
    **{name: {"epochs": 4, "batch_size": 16} for name in ("hinton", "hinton-jitter", "recurrent")},
}


@pytest.mark.parametrize("variant", [*VARIANTS, *PRESETS])
def test_stopped_after_any_epoch_it_ends_the_same(tmp_path, dataset, variant, monkeypatch):
    monkeypatch.setattr(run, "draw", lambda *args: None)  # takes most of the time
    if variant in PRESETS:
        config = PRESETS[variant](**{"hidden": (8, 6), "device": "cpu"} | SMALL[variant])
    else:
        config = dataclasses.replace(CONFIG, **VARIANTS[variant])
    whole = RunFolder.create(tmp_path / "whole", config, dataset)
    result = train(whole, dataset)
    expected = what_remains(whole.path)
    assert result["epochs"] == len(expected[1]) == 4

    stopped = RunFolder.create(tmp_path / "stopped", config, dataset).path

    def stop(record):
        raise KeyboardInterrupt

    for done in range(1, 5):  # one epoch in each sitting
        with pytest.raises(KeyboardInterrupt):
            train(RunFolder.open(stopped), dataset, report=stop)
        assert len((stopped / "metrics.jsonl").read_text().splitlines()) == done
        assert not (stopped / "result.json").exists()
    train(RunFolder.open(stopped), dataset)
    assert_same(what_remains(stopped), expected)


def test_another_seed_ends_elsewhere(tmp_path, dataset):
    """The comparisons above can fail."""
    a, b = (RunFolder.create(tmp_path / str(s), dataclasses.replace(CONFIG, seed=s), dataset) for s in (0, 1))
    train(a, dataset)
    train(b, dataset)
    with pytest.raises(AssertionError):
        assert_same(what_remains(a.path), what_remains(b.path))


@pytest.mark.parametrize("ahead", ["", '{"epoch": 3}\n', '{"epoch": 3, "lo'])
def test_damaged_checkpoint_and_metrics_that_are_ahead(tmp_path, dataset, ahead):
    whole, other = (RunFolder.create(tmp_path / n, CONFIG, dataset) for n in ("whole", "other"))
    train(whole, dataset)

    def stop(record):
        if record["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(other, dataset, report=stop)
    newest = checkpoint.checkpoints(other.path)[0]
    newest.write_bytes(newest.read_bytes()[:-100])
    with open(other.path / "metrics.jsonl", "a") as file:
        file.write(ahead)
    with pytest.warns(UserWarning, match=r"checkpoint-000002\.pt: truncated.*using checkpoint-000001\.pt"):
        train(RunFolder.open(other.path), dataset)
    assert_same(what_remains(other.path), what_remains(whole.path))


def test_what_a_run_leaves(tmp_path, dataset):
    folder = RunFolder.create(tmp_path / "a" / "b", CONFIG, dataset)
    records = []
    result = train(folder, dataset, report=records.append)
    names = sorted(os.listdir(folder.path))
    assert names == [
        "checkpoint-000003.pt", "checkpoint-000004.pt", "config.json", "error.png", "goodness.png", "metrics.jsonl",
        "result.json",
    ]  # fmt: skip
    config = json.loads((folder.path / "config.json").read_text())
    assert config["arguments"]["hidden"] == [8, 6]
    assert None not in [config["arguments"][n] for n in ("lr", "precision", "device", "threads", "epochs")]
    assert config["data"]["rows_train"] == 48
    assert config["versions"]["torch"] == torch.__version__
    assert "backends" in config["machine"]
    assert json.loads((folder.path / "result.json").read_text()) == result
    assert result["parameters"] == 20 * 8 + 8 + 8 * 6 + 6
    assert result["training_seconds"] == sum(r["seconds"] for r in records)
    assert [json.loads(line) for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == records
    rates = [0.003 * (1 - (epoch + 2 / 3) / 4) for epoch in range(4)]  # of the last of an epoch's three batches
    assert [r["lr"] for r in records] == pytest.approx(rates)
    net = folder.load_net()
    assert result["test_error"] == 100 * (net.predict(dataset.x_test) != dataset.y_test).double().mean().item()
    assert result["test_error"] == records[-1]["error"]  # without held out rows


def test_held_out_rows_are_not_trained_on(tmp_path, dataset):
    """Training with rows held out is training without them."""
    held = RunFolder.create(tmp_path / "held", dataclasses.replace(CONFIG, validation=8), dataset)
    result = train(held, dataset)
    fewer = dataclasses.replace(dataset, x_train=dataset.x_train[:40], y_train=dataset.y_train[:40])
    without = RunFolder.create(tmp_path / "without", CONFIG, fewer)
    train(without, fewer)
    for a, b in zip(held.load_net().parameters(), without.load_net().parameters(), strict=True):
        assert torch.equal(a, b)
    predicted = held.load_net().predict(dataset.x_train[40:])
    assert result["validation_error"] == 100 * (predicted != dataset.y_train[40:]).double().mean().item()
    with pytest.raises(ValueError, match="validation must be less than the 48 training rows, got 48"):
        run.split(dataset, 48)


def test_a_folder_with_a_run_is_not_started_again(tmp_path, dataset):
    folder = RunFolder.create(tmp_path, CONFIG, dataset)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(RunError, match=f"holds a run already: continue it with --resume {tmp_path}"):
        RunFolder.create(tmp_path, dataclasses.replace(CONFIG, seed=3), dataset)
    assert (tmp_path / "config.json").read_bytes() == before
    train(folder, dataset)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match="holds a run already"):  # its checkpoints would be taken for the new run's
        RunFolder.create(tmp_path, CONFIG, dataset)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: None, "holds no run"),
        (lambda c: "{", r"config\.json cannot be used"),
        (lambda c: "[]", r"config\.json cannot be used"),
        (lambda c: json.dumps({**c, "format": 2}), "format is 2, this version reads 1"),
        (lambda c: json.dumps({**c, "arguments": {"speed": 1}}), r"unknown arguments \['speed'\]"),
        (lambda c: json.dumps({**c, "arguments": {"lr": -1}}), "lr must be finite and >= 0.0, got -1"),
        (lambda c: json.dumps({k: v for k, v in c.items() if k != "data"}), r"cannot be used: it has no 'data'"),
        (lambda c: json.dumps({**c, "data": {"name": "x", "num_classes": 3}}), r"no \['fingerprint', 'image_shape'\]"),
        (lambda c: json.dumps({**c, "data": 3}), r"config\.json cannot be used"),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, dataset, change, message):
    RunFolder.create(tmp_path, CONFIG, dataset)
    changed = change(json.loads((tmp_path / "config.json").read_text()))
    (tmp_path / "config.json").unlink()
    if changed is not None:
        (tmp_path / "config.json").write_text(changed)
    with pytest.raises(RunError, match=message):
        RunFolder.open(tmp_path)


def test_other_data_and_other_nets_are_refused(tmp_path, dataset):
    folder = RunFolder.create(tmp_path, CONFIG, dataset)
    with pytest.raises(RunError, match="has no checkpoint yet"):
        folder.load_net()
    other = dataclasses.replace(dataset, y_test=dataset.y_test.flip(0))
    with pytest.raises(RunError, match=r"the data are not those .* started on"):
        train(folder, other)
    assert os.listdir(tmp_path) == ["config.json"]
    train(folder, dataset)
    folder.config = dataclasses.replace(folder.config, hidden=(8, 7))
    with pytest.raises(RunError, match=r"does not fit its config\.json"):
        folder.load_net()
    checkpoint.save_numbered(tmp_path, 5, {"format": 2})
    with pytest.raises(RunError, match="format is 2, this version reads 1"):
        RunFolder.open(tmp_path).load_net()


def test_more_epochs_where_that_is_the_same_run(tmp_path, dataset):
    constant = dataclasses.replace(CONFIG, lr_schedule="constant")
    whole = RunFolder.create(tmp_path / "whole", constant, dataset)
    train(whole, dataset)
    short = RunFolder.create(tmp_path / "short", dataclasses.replace(constant, epochs=2), dataset)
    train(short, dataset)
    short.extend(4)
    train(RunFolder.open(short.path), dataset)
    assert_same(what_remains(short.path), what_remains(whole.path))
    with pytest.raises(RunError, match=r"epochs is 4 in .*, got 3"):
        short.extend(3)
    for i, change in enumerate(({"lr_schedule": "linear"}, {"mode": "greedy"}, {"warmup": 0.5})):
        folder = RunFolder.create(tmp_path / str(i), dataclasses.replace(constant, **change), dataset)
        folder.extend(4)
        with pytest.raises(RunError, match=r"epochs is 4 in .*, got 5"):
            folder.extend(5)
        assert RunFolder.open(folder.path).config.epochs == 4


def test_a_run_with_an_average_predicts_by_it(tmp_path, dataset, monkeypatch):
    pictured = []
    monkeypatch.setattr(plots, "goodness_histograms", lambda path, positive, *args, **kwargs: pictured.append(positive))
    folder = RunFolder.create(tmp_path, dataclasses.replace(CONFIG, average=0.9, validate_every=3), dataset)
    result = train(folder, dataset)
    weights = checkpoint.load_latest(tmp_path)["net"]
    net = folder.load_net()
    assert torch.equal(net.layers[0].weight, weights["average.layers_0_weight"])
    assert not torch.equal(net.layers[0].weight, weights["layers.0.weight"])
    assert result["test_error"] == 100 * (net.predict(dataset.x_test) != dataset.y_test).double().mean().item()
    own = net.label_goodness(dataset.x_test, dataset.y_test[:, None])[:, :, 0]
    assert torch.allclose(pictured[0], own)  # a mean error of a few rows may be the same by chance
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["error"] is None for r in lines] == [True, True, False, False]
    assert lines[-1]["error"] == result["test_error"]


def test_numbers_that_json_does_not_have_become_null():
    text = run.to_json({"a": [float("nan"), float("inf"), 1.5], "b": (True, None, "nan")})
    assert json.loads(text) == {"a": [None, None, 1.5], "b": [True, None, "nan"]}


def test_without_matplotlib_the_run_is_complete_but_for_pictures(tmp_path, dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    folder = RunFolder.create(tmp_path, CONFIG, dataset)
    with pytest.warns(UserWarning, match=r"no pictures: matplotlib is needed.*ffkernels\[train\]"):
        result = train(folder, dataset)
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert not list(tmp_path.glob("*.png"))


def png_size(path):
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", header[16:])


@pytest.mark.parametrize("layers", [1, 3, 6])
def test_pictures_grow_with_the_layers(tmp_path, layers):
    g = torch.randn(2, layers, 50, generator=torch.Generator().manual_seed(0))
    plots.goodness_histograms(tmp_path / "g.png", g[0] + 2, g[1], [1.0] * layers, title="t", unit="sum of squares")
    width, height = png_size(tmp_path / "g.png")
    assert width == 576 * min(layers, 3)
    assert height == 456 * (2 if layers > 3 else 1)


def test_the_histograms_are_of_test_rows_under_their_own_and_a_wrong_label(tmp_path, dataset, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "goodness_histograms", lambda path, *args, **kwargs: seen.append(args))
    folder = RunFolder.create(tmp_path, CONFIG, dataset)
    train(folder, dataset)
    ((positive, negative, thresholds),) = seen
    every = folder.load_net().label_goodness(dataset.x_test)  # (L, B, C)
    rows, y = torch.arange(12), dataset.y_test
    assert torch.allclose(positive, every[:, rows, y])
    wrong = [torch.isclose(negative, every[:, rows, (y + shift) % 3]).all(0) for shift in (1, 2)]
    assert (wrong[0] | wrong[1]).all()
    assert thresholds == [8.0, 6.0]


def figure_of(monkeypatch, draw):
    """The matplotlib figure that ``draw`` would write."""
    found = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: found.append(figure))
    draw()
    return found[0]


def test_histograms_hold_every_row_and_the_threshold(monkeypatch):
    positive, negative = torch.tensor([[3.0, 4.0, 5.0, 1.0]] * 2), torch.tensor([[0.0, 1.0, 4.0, 0.5]] * 2)
    figure = figure_of(
        monkeypatch,
        lambda: plots.goodness_histograms("g.png", positive, negative, [2.0, 3.5], title="t", unit="mean of squares"),
    )
    axes, second = figure.axes
    assert second.lines[0].get_xdata()[0] == 3.5
    assert second.get_title() == "Layer 2: above threshold 50.0% pos., 25.0% neg."
    assert sum(bar.get_height() for bar in axes.patches) == 8
    assert axes.lines[0].get_xdata()[0] == 2.0
    assert axes.get_title() == "Layer 1: above threshold 75.0% pos., 25.0% neg."
    assert axes.get_xlabel() == "goodness g (mean of squares)"
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["positive rows", "negative rows", "threshold 2"]


def test_histograms_of_constant_and_of_infinite_goodness(tmp_path):
    flat, bad = torch.zeros(1, 4), torch.full((1, 4), float("inf"))
    plots.goodness_histograms(tmp_path / "flat.png", flat, flat, [2.0], title="t", unit="u")
    plots.goodness_histograms(tmp_path / "bad.png", flat, bad, [2.0], title="t", unit="u")
    assert png_size(tmp_path / "flat.png") == png_size(tmp_path / "bad.png")


def test_error_curve_of_a_greedy_run(monkeypatch):
    history = [
        {"epoch": e, "layer": e // 3, "loss": [1.0 / e, None] if e < 3 else [None, 1.0 / e], "error": 10.0 / e}
        for e in range(1, 5)
    ]
    figure = figure_of(monkeypatch, lambda: plots.error_curve("e.png", history, title="t", measured_on="validation"))
    left, right = figure.axes
    assert list(left.lines[0].get_ydata()) == [10.0, 5.0, 10.0 / 3, 2.5]
    assert left.get_title() == "Error on the validation set"
    assert [list(line.get_xdata()) for line in right.lines[:2]] == [[1, 2], [3, 4]]
    assert left.lines[1].get_xdata()[0] == right.lines[2].get_xdata()[0] == 2.5  # the next layer begins


# ---------------------------------------------------------------------------------------------------------------------
# kill -9


def write_idx_folder(folder, dataset):
    folder.mkdir()
    for split, x, y in (("train", dataset.x_train, dataset.y_train), ("t10k", dataset.x_test, dataset.y_test)):
        pixels = (x * 255).to(torch.uint8).flatten().tolist()
        header = bytes([0, 0, 8, 3]) + struct.pack(">3I", len(x), *dataset.image_shape[1:])
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header + bytes(pixels))
        header = bytes([0, 0, 8, 1]) + struct.pack(">I", len(y))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header + bytes(y.tolist()))
    return folder


def command(*args, script=None):
    how = ["-m", "ffkernels"] if script is None else ["-c", script]
    return [sys.executable, *how, "train", "--quiet", *map(str, args)]


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_the_same(tmp_path, dataset):
    data = write_idx_folder(tmp_path / "patterns", dataset)
    options = ("--data", "mnist", "--data-dir", data, "--hidden", 32, 32, "--epochs", 150, "--threads", 1)
    subprocess.run(command(*options, "--run-dir", tmp_path / "whole"), check=True, capture_output=True)
    expected = what_remains(tmp_path / "whole")

    path, random_delay = tmp_path / "killed", random.Random(0)
    done = 0
    for sitting in range(5):
        args = ("--resume", path) if sitting else (*options, "--run-dir", path)
        process = subprocess.Popen(command(*args), stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 60
            while not (latest := checkpoint.checkpoints(path) if path.exists() else []) or latest[0].name <= (
                f"checkpoint-{done:06d}.pt"
            ):
                assert process.poll() is None, "training ended before it was killed"
                assert time.monotonic() < deadline
                time.sleep(0.001)
            time.sleep(random_delay.uniform(0, 0.1))
        finally:
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
        done = len(checkpoint.load_latest(path)["history"])
    assert 5 <= done < 150
    subprocess.run(command("--resume", path), check=True, capture_output=True)
    assert_same(what_remains(path), expected)


DIE = """
import os, sys
from ffkernels import checkpoint, cli
real, calls = getattr(os, {name!r}), 0
def die(*args):
    global calls
    calls += {name!r} == "fsync" or "checkpoint" in os.path.basename(args[0])
    if calls == {call}:
        os.kill(os.getpid(), 9)
    return real(*args)
setattr(os, {name!r}, die)
sys.exit(cli.main())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "call"), [("fsync", 5), ("fsync", 6), ("replace", 1), ("replace", 3)])
def test_killed_while_a_checkpoint_is_written(tmp_path, dataset, name, call):
    """Before the data are synced, between that and the rename, and after it but before the folder is synced."""
    data = write_idx_folder(tmp_path / "patterns", dataset)
    options = ("--data", "mnist", "--data-dir", data, "--hidden", 8, 6, "--epochs", 4, "--threads", 1)
    killed = subprocess.run(
        command(*options, "--run-dir", tmp_path / "killed", script=DIE.format(name=name, call=call)), check=False
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "result.json").exists()
    subprocess.run(command("--resume", tmp_path / "killed"), check=True, capture_output=True)
    subprocess.run(command(*options, "--run-dir", tmp_path / "whole"), check=True, capture_output=True)
    assert_same(what_remains(tmp_path / "killed"), what_remains(tmp_path / "whole"))
    assert not list((tmp_path / "killed").glob(".*.tmp"))
