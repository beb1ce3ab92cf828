"""segops.metrics against counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist

from segops.metrics import ConfusionMatrix


def test_counts_rows_are_targets():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 0, 1, 255]]))
    assert matrix.counts.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]


def test_scores():
    matrix = ConfusionMatrix(4, ignore_index=7, class_names=("a", "b", "c", "d"))
    matrix.update(torch.tensor([0, 0, 1, 1, 3, 2]), torch.tensor([0, 0, 0, 1, 1, 7]))
    scores = matrix.compute()
    assert scores.iou["a"] == pytest.approx(2 / 3)
    assert scores.iou["b"] == pytest.approx(1 / 3)
    assert math.isnan(scores.iou["c"])  # predicted on an ignored pixel only
    assert scores.iou["d"] == 0  # predicted, never there
    assert scores.miou == pytest.approx(1 / 3)
    assert scores.accuracy == pytest.approx(3 / 5)
    assert scores.mean_accuracy == pytest.approx((2 / 3 + 1 / 2) / 2)  # of a and b: the others are in no target
    assert scores.dice == pytest.approx((4 / 5 + 2 / 4 + 0) / 3)  # 2 right / (in target + in prediction)


def test_batches_add_up_and_reset_forgets():
    prediction, target = torch.randint(0, 5, (2, 6, 11, 13))
    whole, parts = ConfusionMatrix(5), ConfusionMatrix(5)
    whole.update(prediction, target)
    for p, t in zip(prediction, target, strict=True):
        parts.update(p.to(torch.uint8), t.to(torch.int32))
    assert torch.equal(whole.counts, parts.counts)
    assert whole.counts.sum() == target.numel()
    whole.reset()
    assert not whole.counts.any()


def test_nothing_counted_is_nan():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0]), torch.tensor([255]))
    scores = matrix.compute()
    assert all(math.isnan(x) for x in (scores.miou, scores.accuracy, scores.mean_accuracy, scores.dice))


def _rank(rank, file, results):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    matrix = ConfusionMatrix(3)
    matrix.update(torch.full((4, 5), rank), torch.full((4, 5), 2 * rank))
    matrix.sync()
    results.put(matrix.counts.tolist())
    dist.destroy_process_group()


def test_sync_adds_up_the_counts_of_two_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in ranks:
        process.start()
    for _ in ranks:
        assert results.get(timeout=120) == [[20, 0, 0], [0, 0, 0], [0, 20, 0]]
    for process in ranks:
        process.join(60)
        assert process.exitcode == 0


def test_sync_of_one_process_is_nothing():
    matrix = ConfusionMatrix(2)
    matrix.update(torch.tensor([0, 1]), torch.tensor([0, 0]))
    matrix.sync()
    assert matrix.counts.tolist() == [[1, 1], [0, 0]]


def test_refuses():
    with pytest.raises(ValueError, match="class_names must be 3 names, got 2"):
        ConfusionMatrix(3, class_names=("a", "b"))
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"target's shape \(2,\), got \(3,\)"):
        matrix.update(torch.zeros(3, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"target must be in \[0, 3\) or ignore_index=255, got 11 at \[0\]"):
        matrix.update(torch.tensor([0]), torch.tensor([11]))
    with pytest.raises(ValueError, match=r"prediction must be in \[0, 3\), got 3 at \[0\]"):
        matrix.update(torch.tensor([3]), torch.tensor([0]))
    assert not matrix.counts.any()
