"""The command line: its flags and presets, what they make of a run, and which are refused."""

import argparse
import dataclasses
import re
import sys

import pytest
import torch
from command_line import options
from idx_files import write_folder

from ffkernels import cli, data, run
from ffkernels.commands import train
from ffkernels.config import TrainConfig
from ffkernels.data import load_mnist
from ffkernels.presets import PRESETS
from ffkernels.run import RunFolder

pytestmark = pytest.mark.usefixtures("settings_of_commands")


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
    wanted = arguments.partition(" ")[0] or "{info,train,predict,bench}"
    assert re.match(rf"usage: python -m ffkernels .*{wanted}", usage)
    assert re.search(message, last)
