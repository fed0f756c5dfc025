"""Several processes train as one does: data parallel, pipelines and both, on two to four real processes over gloo."""

import pytest
import ranks_train
import torch
from ranks import TESTS, Ranks
from ranks_train import RUNS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """The folder of ranks_train.py's results, after one start of four processes."""
    folder = tmp_path_factory.mktemp("ranks")
    with Ranks(4, TESTS / "ranks_train.py", folder) as ranks:
        ranks.succeed()
    return folder


def load(folder, name):
    return torch.load(folder / f"{name}.pt", weights_only=False)


def alone(made, fitted):
    """The same training in this process."""
    net = ranks_train.make(**made)
    given = dict(fitted)
    given.pop("dataset", None)
    if "same_as" in given:
        given["batch_size"] = given.pop("same_as")
    return net, ranks_train.fit(net, given)


def compare(found, expected, tolerance):
    assert found.keys() == expected.keys()
    for name, t in expected.items():
        scale = max(t.abs().max().item(), 1e-3)
        assert (found[name] - t).abs().max().item() <= tolerance * scale, name


def close(a, b, tolerance):
    return a == pytest.approx(b, rel=tolerance, abs=tolerance)


# float64: one order of summation differs from another by 1e-12; an update with a wrong row would be off by 1e-3
TOLERANCE = {"data-float32": 2e-4, "data-bf16": 0.05}


@pytest.mark.parametrize("name", RUNS)
def test_ranks_train_as_one_process(outputs, name):
    ranks, _, _, made, fitted = RUNS[name]
    found, tolerance = load(outputs, name), TOLERANCE.get(name, 1e-8)
    net, records = alone(made, fitted)
    compare(found["state"], net.state_dict(), tolerance)
    for ours, theirs in zip(found["records"], records, strict=True):
        assert (ours["epoch"], ours["layer"]) == (theirs["epoch"], theirs["layer"])
        assert ours["lr"] == pytest.approx(theirs["lr"])
        assert ours["rows_per_second"] == pytest.approx(2 * ranks_train.ROWS / ours["seconds"])
        assert abs(ours["error"] - theirs["error"]) <= (10 if tolerance > 1e-6 else 0)
        for quantity in ("loss", "goodness_positive", "goodness_negative"):
            for a, b in zip(ours[quantity], theirs[quantity], strict=True):
                assert (a is None) == (b is None)
                assert a is None or close(a, b, tolerance)
    everyone = [load(outputs, f"ranks-{r}")[name] for r in range(ranks)]
    assert all(own["records"] == found["records"] for own in everyone)
    if "shape" not in fitted:
        expected = net.predict(ranks_train.data()[0][:31].to(net.layers[0].weight.dtype))
        assert all(torch.equal(own["predicted"], expected) for own in everyone) or tolerance > 1e-6


@pytest.mark.parametrize("kind", ["data", "pipeline"])
def test_steps_are_those_of_all_rows_together(outputs, kind):
    net = ranks_train.make()
    for step in range(3):
        done = net.step(*ranks_train.rows_of(step))
        expected = (done.loss, done.goodness_pos.mean(1), done.goodness_neg.mean(1))
        for rank in range(4):
            for a, b in zip(load(outputs, f"ranks-{rank}")[f"steps-{kind}"][step], expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-9, atol=0)
    compare(load(outputs, f"steps-{kind}")["state"], net.state_dict(), 1e-8)


def test_weights_that_differ_are_found(outputs):
    for rank in range(3):
        message, ranks = load(outputs, f"ranks-{rank}")["check"]
        assert ranks == (1,)
        assert "other weights than the rest are on ranks [1]" in message
    assert "check" not in load(outputs, "ranks-3")


def test_auto_cuts_layers_and_counts_do_not(outputs):
    def cut(name):
        return [s for spans in load(outputs, name)["stages"] for s in spans if s[2] - s[1] < s[3]]

    assert cut("pipeline-2") == []  # of this net two stages of whole layers are the cheapest
    assert len(cut("pipeline-3")) == 4  # two layers, each on two stages
    assert cut("pipeline-4")
    assert cut("mesh") == []  # two stages too
    assert cut("pipeline-counts") == []
