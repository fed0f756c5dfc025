"""Wrong arguments of one rank, and ones that are not the same on all, end all ranks before anything is computed."""

import json
import re

from ranks import TESTS, Ranks

DISAGREE = {
    # what all ranks raise
    "rows": r"rows of data must be the same on all ranks, got 40 on rank 0 and 48 on rank 1",
    "batch_size": r"batch_size must be the same on all ranks, got 24 on rank 0 and 25 on rank 1",
    "validation": r"rows of validation must be the same on all ranks, got 75 on rank 0 and None on rank 1",
    "width": r"layer 1 must be the same on all ranks, got .*out_features=16, .* on rank 0 and .*out_features=17, .* 1",
    "width of a pipeline": r"layer 1 must be the same on all ranks, got .*16.* on rank 0 and .*17.* on rank 1",
    "predict": r"rows of x must be the same on all ranks, got 40 on rank 0 and 48 on rank 1",
    "optimizer": r"layer 1 must be the same on all ranks, got .*lr=0\.01, .* on rank 0 and .*lr=1\.01, .* on rank 1",
}
WRONG = {
    # the rank that raises, and what
    "labels": (1, "TypeError", "labels must hold integers, got torch.float32"),
    "dropout": (1, "ValueError", "net must be a plain FFNet for several processes, it has dropout"),
    "step": (1, "ValueError", "x_pos must have shape (M, K) = (75, 12), got (75, 11)"),
    "step of a pipeline": (0, "ValueError", "x_pos must have shape (M, K) = (75, 12), got (75, 11)"),
}


def test_arguments_of_one_rank_end_all():
    with Ranks(2, TESTS / "ranks_disagree.py") as ranks:
        texts = ranks.succeed()
    found = {rank: json.loads(text.splitlines()[-1]) for rank, text in texts.items()}
    assert found[0].keys() == {*DISAGREE, *WRONG, "stop"}
    for rank in (0, 1):
        for case, message in DISAGREE.items():
            kind, text, _ = found[rank][case]
            assert kind == "ValueError", text
            assert re.fullmatch(message, text), text
        assert found[rank]["stop"] == 2  # records: rank 1 alone wanted to stop
    for case, (rank, kind, message) in WRONG.items():
        assert found[rank][case] == [kind, message, []]
        assert found[1 - rank][case] == ["RankError", f"rank {rank} failed: {kind}: {message}", [rank]]
