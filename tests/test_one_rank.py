"""torch.distributed with one rank, in this process: it trains as one process does, and what it refuses, and how."""

import inspect
import os
import re

import pytest
import ranks_train
import torch
import torch.distributed as dist
from ranks import TESTS, free_port

import ffkernels as ff
from ffkernels import cli, distributed, training
from ffkernels.config import TrainConfig
from ffkernels.distributed import DataParallelFF, PipelineFF, run
from ffkernels.distributed.fit import fit
from ffkernels.distributed.model import ALONE


@pytest.fixture
def launched(monkeypatch):
    """torchrun's variables for one process."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "GLOO_SOCKET_IFNAME": "lo"}
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", **where}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def group(launched):
    distributed.start(timeout=20)
    yield
    distributed.stop()


def test_a_process_group_that_is_not_ours_has_a_watch_of_its_own(launched, monkeypatch):
    for _ in range(2):
        monkeypatch.setenv("MASTER_PORT", str(free_port()))
        dist.init_process_group("gloo")
        try:
            DataParallelFF(net())
            store = dist.PrefixStore("ffkernels", dist.distributed_c10d._get_default_store())
            assert store.check(["status/0"])
        finally:
            dist.destroy_process_group()
    distributed.stop()


@pytest.mark.parametrize("where", ["examples/many_processes.md", "ffkernels/distributed/__init__.py"])
def test_what_the_documents_show_runs(launched, where):
    text = (TESTS.parent / where).read_text()
    if where.endswith(".md"):
        (code,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    else:
        code = "\n".join(re.findall(r"^ {4}(?!torchrun)(.*)", text.split('"""')[1], re.MULTILINE))
    x, labels = ranks_train.data()
    given = {"net": ranks_train.make(dtype=torch.float32), "images": x, "labels": labels}
    before = given["net"].stack[0].weight.clone()
    exec(code, given)
    assert not dist.is_initialized()
    assert (given["net"].stack[0].weight - before).abs().max() > 1e-2


def net(sizes=(6, 5, 4), **options):
    return ff.FFNet.from_sizes(sizes, num_classes=3, **options)


@pytest.mark.parametrize("kind", [DataParallelFF, PipelineFF])
def test_one_rank_is_one_process(group, kind):
    ours, theirs = ranks_train.make(), ranks_train.make()
    records = ranks_train.fit(kind(ours), {})
    expected = ranks_train.fit(theirs, {})
    assert [r["loss"] for r in records] == [pytest.approx(r["loss"], rel=1e-9) for r in expected]
    for name, t in ours.state_dict().items():
        assert torch.allclose(t, theirs.state_dict()[name], rtol=1e-9, atol=1e-12), name


def test_low_precision_gradients_of_micro_batches_are_weighted_after_they_are_made(group):
    low = {"dtype": torch.bfloat16, "optimizer": "sgd"}
    ours, theirs, start = (ranks_train.make(**low) for _ in range(3))
    ranks_train.fit(PipelineFF(ours, micro_batches=3), {"epochs": 1})
    ranks_train.fit(theirs, {"epochs": 1})
    for mine, other, before in zip(ours.stack, theirs.stack, start.stack, strict=True):
        moved, apart = (mine.weight - before.weight).norm(), (mine.weight - other.weight).norm()
        assert apart < 0.1 * moved


def head():
    return ff.SoftmaxHead([5], 3, optimizer=ff.SGD(lr=0.1))


def averaged():
    found = net()
    found.average = ff.WeightAverage(found)
    return found


@pytest.mark.parametrize("kind", [DataParallelFF, PipelineFF])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ff.FFNet([ff.FFLinear(6, 5)], num_classes=3, head=head()), "a softmax head"),
        (averaged, "an average of its weights"),
        (lambda: net(dropout=0.1), "dropout"),
        (lambda: ff.FFNet([ff.FFLinear(6, 5)], num_classes=3, minimize=True), "minimize"),
        (lambda: ff.FFNet([ff.FFLinear(6, 5)], num_classes=3, label_strength=None), "no label_strength"),
        (lambda: ff.RecurrentFFNet.from_sizes([6, 5], num_classes=3), "recurrent layers"),
    ],
    ids=["head", "average", "dropout", "minimize", "unlabelled", "recurrent"],
)
def test_nets_that_one_process_trains(group, kind, make, message):
    with pytest.raises(ValueError, match=f"net must be a plain FFNet for several processes, it has {message}"):
        kind(make())


@pytest.mark.parametrize(
    ("kind", "options", "error", "message"),
    [
        (DataParallelFF, {"compress": "fp8"}, ValueError, r"compress must be one of .*'none', 'bf16'.* got 'fp8'"),
        (DataParallelFF, {"check_every": -1}, ValueError, "check_every must be in .* got -1"),
        (PipelineFF, {"stages": "even"}, ValueError, "stages must be one of .*'auto'.* got 'even'"),
        (PipelineFF, {"stages": [1, 1]}, ValueError, "stages must name 1 stages, one a rank, got 2"),
        (PipelineFF, {"micro_batches": 0}, ValueError, "micro_batches must be in .* got 0"),
        (PipelineFF, {"update": "epoch"}, ValueError, "update must be one of .*'batch', 'microbatch'.* got 'epoch'"),
        (PipelineFF, {"rows": 0}, ValueError, "rows must be in .* got 0"),
    ],
)
def test_bad_arguments(group, kind, options, error, message):
    with pytest.raises(error, match=message):
        kind(net(), **options)


def test_every_option_of_one_process_is_one_of_several_or_refused():
    alone, several = (set(inspect.signature(f).parameters) for f in (training.fit, fit))
    assert alone - several - {"net"} == set(ALONE)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"constraint": lambda net: None}, TypeError, r"constraint is for FFNet\.fit in one process"),
        ({"loss": ff.Hinge()}, TypeError, r"loss is for FFNet\.fit in one process"),
        ({"negatives": ff.HardLabels()}, TypeError, r"negatives is for FFNet\.fit in one process"),
        ({"augment": lambda x, g: x}, TypeError, r"augment is for FFNet\.fit in one process"),
        ({"selection": ff.HardInputs()}, TypeError, r"selection is for FFNet\.fit in one process"),
        ({"spool_dir": "spool"}, TypeError, r"spool_dir is for FFNet\.fit in one process"),
        ({"epochs": 0}, ValueError, "epochs must be in .* got 0"),
        ({"mode": "layerwise"}, ValueError, "mode must be one of .*'greedy'.* got 'layerwise'"),
        ({"batch_size": 0}, ValueError, "batch_size must be in .* got 0"),
        ({"validation": 3}, TypeError, r"validation must be \(x, labels\), got int"),
    ],
)
def test_bad_options_of_fit(group, options, error, message):
    model = DataParallelFF(net(sizes=(12, 5)))
    before = {name: t.clone() for name, t in model.net.state_dict().items()}
    with pytest.raises(error, match=message):
        model.fit(*ranks_train.data(), **{"epochs": 1, "progress": False, **options})
    assert all(torch.equal(t, before[name]) for name, t in model.net.state_dict().items())


@pytest.mark.parametrize("kind", [DataParallelFF, PipelineFF])
@pytest.mark.parametrize("given", ["x_pos", "x_neg"])
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (None, ValueError, "x_pos and x_neg must be given on the first stage"),
        (torch.rand(6), ValueError, r"{} must be 2-dimensional, got shape \(6,\)"),
        (torch.rand(4, 7), ValueError, r"{} must have shape \(M, K\) = \(4, 6\), got \(4, 7\)"),
        (torch.rand(4, 6).double(), TypeError, r"{} must be torch\.float32"),
    ],
)
def test_bad_rows_of_a_step(group, kind, given, wrong, error, message):
    model = kind(net())
    before = {name: t.clone() for name, t in model.net.state_dict().items()}
    with pytest.raises(error, match=message.format(given)):
        model.step(**{"x_pos": torch.rand(4, 6), "x_neg": torch.rand(4, 6), given: wrong})
    assert all(torch.equal(t, before[name]) for name, t in model.net.state_dict().items())
    model.step(torch.rand(4, 6), torch.rand(3, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "hinton"], r"not for several processes: .*negatives 'hard'.*head_layers"),
        (["--loss", "symba"], "not for several processes: loss 'symba'"),
        (["--stages", "2"], r"stages must be in \[1, 1\]"),
        (["--micro-batches", "2"], r"micro_batches must be 1 without a pipeline \(stages 1\), got 2"),
    ],
)
def test_the_command_line_refuses_before_it_makes_a_folder(launched, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--data", "digits", *arguments]) == 1
    assert os.listdir(tmp_path) == []
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error


@pytest.mark.parametrize(
    ("given", "stages", "message"),
    [
        ({"hidden": (5,)}, 2, "stages must be at most the net's 1 layers, got 2"),
        ({"hidden": (5, 4), "mode": "greedy"}, 2, "mode must be 'simultaneous' with a pipeline"),
    ],
)
def test_a_division_that_does_not_fit_the_run_is_known_before_it_begins(given, stages, message):
    run.check_config(TrainConfig(**given), run.Division())
    with pytest.raises(ValueError, match=message):
        run.check_config(TrainConfig(**given), run.Division(stages=stages))


def test_attempts_of_torchrun_share_no_keys(launched, monkeypatch):
    """The agent's store stays from one attempt to the next; addresses of dead processes would still be in it."""
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=True)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for attempt in ("0", "1"):
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
        distributed.start(timeout=20)
        store = dist.distributed_c10d._get_default_store()
        assert not store.check(["address"])
        store.set("address", attempt)
        assert agent.num_keys() > 0
        distributed.stop()
