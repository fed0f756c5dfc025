"""How a pipeline's stages share the layers, and how ranks share minibatches; no process is started."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ffkernels as ff
from ffkernels import batches
from ffkernels.batches import Draws
from ffkernels.distributed import DataParallelFF, PipelineFF, ShardedSampler
from ffkernels.distributed.data import Shards, shares
from ffkernels.distributed.layout import GRAIN, Span, balanced, counted_costs, whole_layers


def cost_of(spans, costs):
    return sum(costs[s.index] * (s.last - s.first) / s.total for s in spans)


@given(
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    stages=st.integers(1, 8),
    seed=st.integers(0, 1000),
)
def test_every_column_stands_on_one_stage(widths, stages, seed):
    if stages > len(widths):
        with pytest.raises(ValueError, match="needs as many layers"):
            balanced([1.0] * len(widths), widths, stages, [True] * len(widths))
        return
    g = torch.Generator().manual_seed(seed)
    costs = (torch.rand(len(widths), generator=g) + 0.01).tolist()
    cuttable = (torch.rand(len(widths), generator=g) < 0.7).tolist()
    plan = balanced(costs, widths, stages, cuttable)
    assert len(plan) == stages
    assert all(plan)
    flat = [s for spans in plan for s in spans]
    columns = [(s.index, c) for s in flat for c in range(s.first, s.last)]
    assert columns == [(i, c) for i, n in enumerate(widths) for c in range(n)]
    for s in flat:
        assert s.whole or (cuttable[s.index] and s.first % GRAIN == 0)
    for before, after in itertools.pairwise(plan):
        assert before[-1].head == after[0].tail  # a cut layer stands on two stages that follow on one another
        assert not any(s.head for s in before[:-1])
        assert not any(s.tail for s in after[1:])
    # no division into whole layers is better
    best_whole = best(costs, stages)
    assert max(cost_of(spans, costs) for spans in plan) <= best_whole * 1.0001


def best(costs, stages):
    if stages == 1:
        return sum(costs)
    return min(max(sum(costs[:i]), best(costs[i:], stages - 1)) for i in range(1, len(costs) - stages + 2))


def test_two_stages_of_four_equal_layers_are_even():
    net = ff.FFNet.from_sizes([784, 2000, 2000, 2000, 2000], num_classes=10, device="meta")
    costs = counted_costs(net.stack, 512)
    plan = balanced(costs, [2000] * 4, 2, [False, True, True, True])
    parts = [cost_of(spans, costs) for spans in plan]
    assert max(parts) < 1.01 * sum(parts) / 2
    whole = balanced(costs, [2000] * 4, 2, [False] * 4)
    assert max(cost_of(spans, costs) for spans in whole) > 1.15 * sum(parts) / 2


def test_whole_layers_by_counts():
    assert whole_layers([2, 1], [5, 6, 7]) == [[Span(0, 0, 5, 5), Span(1, 0, 6, 6)], [Span(2, 0, 7, 7)]]
    with pytest.raises(ValueError, match=r"stages must add up to the net's 3 layers, got \[1, 1\]"):
        whole_layers([1, 1], [5, 6, 7])
    with pytest.raises(ValueError, match=r"stages\[0\]"):
        whole_layers([0, 3], [5, 6, 7])


def test_a_part_of_a_layer_computes_its_columns():
    layer = ff.FFLinear(6, 40, dtype=torch.float64, optimizer=ff.Adam())
    layer.step(torch.rand(5, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64))
    head, tail = Span(0, 0, 16, 40).part(layer), Span(0, 16, 40, 40).part(layer)
    x = torch.rand(3, 6, dtype=torch.float64)
    assert torch.equal(torch.cat([head(x), tail(x)], 1), layer(x))
    assert {n: t.shape for n, t in head.state.items()}["exp_avg"] == (16, 6)
    assert torch.equal(tail.state["exp_avg_sq_bias"], layer.state["exp_avg_sq_bias"][16:])
    assert head.state["step"] == 1
    before = layer.weight.clone()
    head.weight.zero_()
    assert torch.equal(layer.weight, before)
    assert Span(0, 0, 40, 40).part(layer) is layer


# ---------------------------------------------------------------------------------------------------------------------
# minibatches


@pytest.mark.parametrize("replicas", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3, 16, 50, 64])
def test_parts_of_minibatches_are_those_of_one_process(replicas, batch_size):
    x = torch.arange(50.0)[:, None].repeat(1, 4)
    labels = torch.arange(50) % 3
    parts = [Shards(x, labels, batch_size, replicas, rank) for rank in range(replicas)]
    alone, draws = batches.make_batches(x, labels, batch_size), Draws(7, 2)
    sizes = [part.sampler.sizes() for part in parts]
    together = zip(*(part.epoch(7, 2, 3) for part in parts), strict=True)
    count = 0
    for i, (batch, found) in enumerate(zip(alone.epoch(draws), together, strict=True)):
        wrong = ff.wrong_labels(batch[1], 3, draws["negatives"])
        for t, own in zip((*batch[:2], wrong), zip(*found, strict=True), strict=True):
            assert torch.equal(torch.cat(own), t)
        assert [len(own[0]) for own in found] == [s[i][1] for s in sizes] == shares(len(batch[0]), replicas)
        assert {s[i][0] for s in sizes} == {len(batch[0])}
        count += 1
    assert count == len(parts[0].sampler)


def test_a_sampler_is_a_loaders():
    sampler = ShardedSampler(10, 4, replicas=2, rank=1, seed=3)
    data = torch.utils.data.TensorDataset(torch.arange(10))
    first = [b[0].tolist() for b in torch.utils.data.DataLoader(data, batch_sampler=sampler)]
    assert [len(b) for b in first] == [2, 2, 1]
    sampler.set_epoch(2)
    assert first != [b[0].tolist() for b in torch.utils.data.DataLoader(data, batch_sampler=sampler)]
    sampler.set_epoch(1)
    assert first == list(sampler)
    plain = ShardedSampler(5, 2, replicas=1, rank=0, shuffle=False)
    assert list(plain) == [[0, 1], [2, 3], [4]]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on one core
@pytest.mark.parametrize("workers", [0, 2])
def test_a_dataset_gives_what_tensors_give(workers):
    x, labels = torch.rand(11, 4), torch.arange(11) % 3
    data = torch.utils.data.TensorDataset(x, labels)
    for rank in range(3):
        a, b = (Shards(*d, 2, 3, rank, workers) for d in ((x, labels), (data, None)))
        for left, right in zip(a.epoch(0, 1, 3), b.epoch(0, 1, 3), strict=True):
            assert all(torch.equal(p, q) for p, q in zip(left, right, strict=True))


@pytest.mark.parametrize(
    ("data", "labels", "error", "message"),
    [
        (torch.rand(3, 4), None, ValueError, "labels must be given"),
        (torch.utils.data.TensorDataset(torch.rand(3, 4)), torch.zeros(3).long(), ValueError, "labels must be None"),
        (torch.utils.data.DataLoader(torch.rand(3, 4)), None, TypeError, "data must be tensors or a dataset"),
        (torch.rand(0, 4), torch.zeros(0).long(), ValueError, "data must have at least one row"),
        (7, None, TypeError, "data must be tensors or a dataset"),
    ],
)
def test_bad_data(data, labels, error, message):
    with pytest.raises(error, match=message):
        Shards(data, labels, 4, 1, 0)


@pytest.mark.parametrize("model", [DataParallelFF, PipelineFF])
def test_without_a_process_group(model):
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised: start the processes with torchrun"):
        model(ff.FFNet.from_sizes([4, 3], num_classes=2))
