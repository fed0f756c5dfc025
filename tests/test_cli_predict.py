"""The command line: what predict prints and writes."""

import json
import re

import numpy as np
import pytest
import torch
from command_line import options

import ffkernels as ff
from ffkernels import cli
from ffkernels.data import load_mnist

pytestmark = pytest.mark.usefixtures("settings_of_commands")


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


def test_a_run_of_another_machine_predicts_on_a_device_of_this_one(data_dir, run_dir, capsys):
    config = json.loads((run_dir / "config.json").read_text())
    config["arguments"]["device"] = "cuda:77"
    (run_dir / "config.json").write_text(json.dumps(config))
    base = ["predict", "--run", str(run_dir), "--data-dir", str(data_dir)]
    assert cli.main(base) == 1
    assert "error: device 'cuda:77' cannot be used here: " in capsys.readouterr().err
    assert cli.main([*base, "--device", "cpu"]) == 0
    assert re.fullmatch(r"error: \d+\.\d\d % of 12\n", capsys.readouterr().out)


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
