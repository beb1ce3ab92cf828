"""confusion_matrix's own laws, beyond what the battery asks of every op."""

from __future__ import annotations

import itertools

import pytest
import torch

import segops
from segops import confusion_matrix

from .lanes import every_lane

torch.manual_seed(0)

DTYPES = (torch.uint8, torch.int16, torch.int32, torch.int64)


def counted(prediction, target, classes, ignore_index):
    """One pixel after the other."""
    counts = torch.zeros(classes, classes, dtype=torch.int64)
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != ignore_index:
            counts[t, p] += 1
    return counts


@every_lane
@pytest.mark.parametrize(("classes", "ignore_index"), [(1, 255), (2, 255), (5, 3), (19, -1), (300, 1000)])
def test_rows_are_targets(lane, classes, ignore_index):
    prediction, target = torch.randint(classes, (2, 3, 31, 17))
    target[torch.rand(target.shape) < 0.2] = ignore_index
    expected = counted(prediction, target, classes, ignore_index)
    with lane.active():
        actual = confusion_matrix(
            prediction.to(lane.device), target.to(lane.device), classes, ignore_index=ignore_index
        )
    assert actual.dtype == torch.int64
    assert torch.equal(actual.cpu(), expected)


@every_lane
def test_every_pair_of_dtypes(lane):
    prediction, target = torch.randint(7, (2, 1, 9, 11), device=lane.device)
    with lane.active():
        expected = confusion_matrix(prediction, target, 7)
        for a, b in itertools.product(DTYPES, DTYPES):
            assert torch.equal(confusion_matrix(prediction.to(a), target.to(b), 7), expected), (a, b)


@every_lane
@pytest.mark.parametrize(
    "shape", [(), (13,), (4, 5), (2, 3, 4), (2, 1, 3, 5), (2, 2, 2, 2, 3), (0,), (2, 0, 3)], ids=str
)
def test_any_shape(lane, shape):
    prediction, target = (torch.randint(3, shape) for _ in range(2))
    with lane.active():
        actual = confusion_matrix(prediction.to(lane.device), target.to(lane.device), 3)
    assert torch.equal(actual.cpu(), counted(prediction, target, 3, 255))


@every_lane
def test_a_label_out_of_range(lane):
    if lane.device == "cuda":
        pytest.skip("on a GPU labels are not checked")
    prediction, target = torch.zeros(2, 2, 3, 4, dtype=torch.int16)
    prediction[0, 1, 2], target[0, 1, 2] = 9, 255  # not counted: not looked at
    with lane.active():
        confusion_matrix(prediction, target, 3)
        prediction[1, 0, 3] = 3
        with pytest.raises(ValueError, match=r"confusion_matrix: prediction must be in \[0, 3\), got 3 at \[1, 0, 3\]"):
            confusion_matrix(prediction, target, 3)
        target[1, 2, 1] = -2
        with pytest.raises(
            ValueError, match=r"confusion_matrix: target must be in \[0, 3\) or ignore_index=255, got -2 at \[1, 2, 1\]"
        ):
            confusion_matrix(prediction, target, 3)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_more_than_2_31_elements(backend):
    device = "cpu" if backend == "cpu" else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    prediction, target = torch.randint(4, (2, 1, 64, 1024), device=device, dtype=torch.uint8)
    copies = 2**15 + 1
    with segops.use_backend(backend):
        once = confusion_matrix(prediction, target, 4)
        actual = confusion_matrix(prediction.expand(copies, -1, -1), target.expand(copies, -1, -1), 4)
    assert prediction.numel() * copies > 2**31
    assert torch.equal(actual, copies * once)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prediction": [1]}, TypeError, "prediction must be a tensor of labels, got list"),
        ({"prediction": torch.zeros(2, 3)}, TypeError, "prediction must have dtype uint8, int16, int32 or int64"),
        ({"target": torch.zeros(2, 3, dtype=torch.bool)}, TypeError, "target must have dtype uint8, int16, int32"),
        (
            {"target": torch.zeros(3, 2).long()},
            ValueError,
            r"prediction must have target's shape \(3, 2\), got \(2, 3\)",
        ),
        ({"target": torch.zeros(2, 3, device="meta").long()}, ValueError, "target must be on device cpu"),
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 2.0}, TypeError, "num_classes must be an int, got 2.0"),
        ({"ignore_index": None}, TypeError, "ignore_index must be an int, got None"),
    ],
)
def test_wrong_arguments(change, error, message):
    good = {"prediction": torch.zeros(2, 3).long(), "target": torch.zeros(2, 3).long(), "num_classes": 2}
    with pytest.raises(error, match=f"confusion_matrix: {message}"):
        confusion_matrix(**{**good, **change})
