"""examples/train.py as its user runs it: a process of its own, on made-up scenes and on folders in CamVid layout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
TINY = ("--batch-size", "2", "--crop", "32", "--width", "8", "--threads", "1", "--compare", "0")
VOID = 11


def train(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    # One OpenMP thread: the tests run beside each other.
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "train.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == code, run.stdout + run.stderr
    return run


def write_camvid(root: Path, void: int = VOID) -> Path:
    """Images of different sizes, smaller and larger than a crop; three classes and void."""
    rng = np.random.default_rng(0)
    for split, sizes in {"train": [(48, 40), (37, 61), (20, 70)], "val": [(50, 33), (29, 64)]}.items():
        for folder in (root / split, root / f"{split}annot"):
            folder.mkdir(parents=True)
        for i, (width, height) in enumerate(sizes):
            label = np.repeat(np.arange(height) * 3 // height, width).reshape(height, width).astype(np.uint8)
            image = np.clip(label[..., None] * 90 + rng.normal(40, 8, (height, width, 3)), 0, 255).astype(np.uint8)
            label[:3, :5] = void
            Image.fromarray(image).save(root / split / f"{split}{i}.jpg")
            Image.fromarray(label).save(root / f"{split}annot" / f"{split}{i}.png")
        (root / f"{split}.txt").write_text("".join(f"{split}{i}\n" for i in range(len(sizes))))
    entries = [{"id": i, "name": name, "rgb": [80 * i, 9, 9]} for i, name in enumerate(("top", "middle", "bottom"))]
    about = {"num_classes": 3, "ignore_index": VOID, "classes": entries}
    (root / "classes.json").write_text(json.dumps(about))
    return root


def test_scenes_give_scores_picture_and_table(tmp_path):
    out = tmp_path / "new" / "run"
    run = train("--steps", 2, "--out", out, *TINY, "--compare", 1, "--show", 2)
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint.pt", "predictions.png", "results.json"]
    with Image.open(out / "predictions.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    results = json.loads((out / "results.json").read_text())
    assert set(results["scores"]["iou"]) >= {"sky", "road", "building", "car"}
    assert results["majority_class"]["miou"] < 0.2
    against = results["fused_against_reference"]
    assert set(against["backends"]["reference"].values()) == {"reference"}
    assert against["logits"]["difference"] <= 1e-4 * against["logits"]["magnitude"]
    assert against["gradient"]["difference"] <= 1e-3 * against["gradient"]["magnitude"]
    assert min(*against["step_ms"].values(), *against["peak_mib"].values()) > 0
    for words in ("mIoU", "the majority class everywhere", "ms per training step", "peak memory", "largest difference"):
        assert words in run.stdout
    assert "2/2" in run.stderr  # the progress bar


def test_camvid_folder_and_resume_equals_uninterrupted(tmp_path):
    data = write_camvid(tmp_path / "data")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run = train("--data", data, "--steps", 5, "--out", whole, *TINY)
    for name in ("top", "middle", "bottom"):
        assert name in run.stdout

    stopped = train("--data", data, "--steps", 5, "--stop-at", 2, "--out", parts, *TINY)
    assert "go on with --resume" in stopped.stdout
    assert [path.name for path in parts.iterdir()] == ["checkpoint.pt"]
    train("--resume", parts / "checkpoint.pt", "--threads", 1, "--compare", 0)
    once, twice = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    assert once["step"] == twice["step"] == 5
    for part in ("model", "optimizer", "schedule", "rng"):
        assert_identical(once[part], twice[part])

    other = train("--resume", parts / "checkpoint.pt", "--crop", 64, code=2)
    assert other.stderr.strip().endswith("checkpoint.pt: was made with --crop 32, not 64")


def test_dupsampling_with_and_without_temperature(tmp_path):
    out = tmp_path / "out"
    run = train("--model", "dupsampling", "--steps", 3, "--out", out, *TINY, "--compare", 1, "--temperature-plot")
    names = ["checkpoint.pt", "predictions.png", "results.json", "temperature.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    with Image.open(out / "temperature.png") as picture:
        assert picture.format == "PNG"
    results = json.loads((out / "results.json").read_text())
    learned, vanilla = results["losses"], results["losses_with_t_1"]
    assert len(learned) == len(vanilla) == 3
    assert learned[0] == vanilla[0]  # the same weights, W and batch
    assert learned[2] != vanilla[2]
    assert "dupsample_cross_entropy ran on" in run.stdout
    against = results["fused_against_reference"]
    assert set(against["backends"]["fused"]) >= {"dupsample", "dupsample_cross_entropy"}
    assert against["gradient"]["difference"] <= 1e-3 * against["gradient"]["magnitude"]


def test_dupsampling_starts_from_the_training_labels_and_resumes(tmp_path):
    data = write_camvid(tmp_path / "data")
    options = ("--model", "dupsampling", "--dup-channels", 9, "--data", data, *TINY)
    train(*options, "--steps", 1, "--lr", 1e-9, "--out", tmp_path / "start")
    start = torch.load(tmp_path / "start" / "checkpoint.pt", weights_only=True)["model"]
    w, mean = (start[f"decode_head.upsample.{name}"] for name in ("weight", "bias"))
    w = w.flatten(1)
    torch.testing.assert_close(w.T @ w, torch.eye(9), rtol=0, atol=1e-4)  # principal components
    shares = mean.view(256, 3).sum(1)
    assert shares.min() < shares.max() < 1 + 1e-4  # shares of the classes at each pixel; void and padding have none

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*options, "--steps", 4, "--out", whole)
    train(*options, "--steps", 4, "--stop-at", 2, "--out", parts)
    resumed = train("--resume", parts / "checkpoint.pt", "--threads", 1, "--compare", 0)
    assert "label maps" not in resumed.stderr  # W is in the checkpoint
    once, twice = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    for part in ("model", "optimizer", "losses"):
        assert_identical(once[part], twice[part])

    other = train("--resume", parts / "checkpoint.pt", "--model", "gald", code=2)
    assert other.stderr.strip().endswith("checkpoint.pt: was made with --model dupsampling, not gald")


def test_segnext_and_resume_equals_uninterrupted(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = ("--model", "segnext-t", *TINY, "--crop", 64, "--show", 1)
    train(*options, "--steps", 3, "--out", whole)
    train(*options, "--steps", 3, "--stop-at", 1, "--out", parts)
    train("--resume", parts / "checkpoint.pt", "--threads", 1, "--compare", 0)
    once, twice = (torch.load(out / "checkpoint.pt", weights_only=True) for out in (whole, parts))
    for part in ("model", "optimizer", "losses"):
        assert_identical(once[part], twice[part])


@pytest.mark.parametrize("model", ["hfgd-os2", "semanticfpn"])
def test_hfgd_and_its_baseline(tmp_path, model):
    options = ("--data", write_camvid(tmp_path / "data"), "--steps", 2, "--show", 1, *TINY, "--crop", 64)
    train("--model", model, "--out", tmp_path / "out", *options, "--compare", int(model == "hfgd-os2"))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert np.isfinite(results["losses"]).tolist() == [True, True]
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.format == "PNG"


def test_unknown_backbone_is_a_usage_error(tmp_path):
    run = train("--model", "hfgd-os4", "--backbone", "mscan-x", "--out", tmp_path / "out", code=2)
    assert "must be one of 't', 's', 'b', 'l', got 'x'" in run.stderr


def test_temperature_plot_needs_a_temperature(tmp_path):
    run = train("--temperature-plot", "--out", tmp_path / "out", code=2)
    assert "--temperature-plot needs --model dupsampling, not gald" in run.stderr
    assert not (tmp_path / "out").exists()


def assert_identical(first, second) -> None:
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_identical(first[key], second[key])
    else:
        assert first == second


def remove(path: Path) -> None:
    path.unlink()


def shrink(path: Path) -> None:
    with Image.open(path) as file:
        smaller = file.resize((7, 9))
    smaller.save(path)


def relabel(path: Path) -> None:
    with Image.open(path) as file:
        label = np.array(file)
    label[5, 5] = 17
    Image.fromarray(label).save(path)


@pytest.mark.parametrize(
    ("harm", "file", "words"),
    [
        (None, "nowhere", ["no such folder"]),
        (remove, "valannot/val1.png", ["val/val1.jpg", "has no label"]),
        (shrink, "trainannot/train2.png", ["is 7x9, but its image", "is 20x70"]),
        (relabel, "valannot/val0.png", ["label 17 is not in [0, 3)", "--ignore-index 17"]),
    ],
    ids=["missing folder", "missing label", "sizes differ", "label out of range"],
)
def test_wrong_data_is_one_line(tmp_path, harm, file, words):
    data = write_camvid(tmp_path / "data")
    if harm:
        harm(data / file)
    out = tmp_path / "out"
    run = train("--data", data if harm else data / file, "--out", out, "--steps", 1, *TINY, code=2)
    (line,) = run.stderr.splitlines()
    for word in (file, *words):
        assert word in line
    assert not out.exists()
    assert not run.stdout


@pytest.fixture
def data_module(monkeypatch):
    """examples/ is not a package; its modules are importable only when it is on the path."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.delitem(sys.modules, "data", raising=False)
    import data

    yield data
    sys.modules.pop("data")


def test_more_wrong_data(tmp_path, data_module):
    def error_of(root: Path, **options) -> str:
        with pytest.raises(data_module.DataError) as caught:
            data_module.open_folder(root, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    data = write_camvid(tmp_path / "listed")
    (data / "val.txt").write_text("val0\nval7\n")
    assert "val.txt: names 'val7'" in error_of(data)

    data = write_camvid(tmp_path / "broken")
    (data / "train" / "train1.jpg").write_bytes(b"no image")
    assert "train1.jpg: cannot be decoded" in error_of(data)

    data = write_camvid(tmp_path / "cut")
    label = data / "trainannot" / "train0.png"
    label.write_bytes(label.read_bytes()[:-40])
    assert "train0.png: cannot be decoded" in error_of(data)

    data = write_camvid(tmp_path / "colours")
    Image.new("RGB", (50, 33)).save(data / "valannot" / "val0.png")
    assert "val0.png: expected one channel of class ids" in error_of(data)

    data = write_camvid(tmp_path / "json")
    (data / "classes.json").write_text("{")
    assert "classes.json: " in error_of(data)

    data = write_camvid(tmp_path / "split")
    (data / "val").rename(data / "validation")
    assert error_of(data).endswith("val: no such folder")

    data = write_camvid(tmp_path / "few")
    assert "label 2 is not in [0, 2); " in error_of(data, num_classes=2)


def test_folder_without_lists_and_classes(tmp_path, data_module):
    data = write_camvid(tmp_path / "data", void=255)
    for name in ("train.txt", "val.txt", "classes.json"):
        (data / name).unlink()
    classes, train_set, val_set = data_module.open_folder(data)
    assert classes.names == ("class 0", "class 1", "class 2")
    assert classes.ignore_index == 255
    assert (len(train_set), len(val_set)) == (3, 2)
    assert len(set(classes.colours)) == 3

    data = write_camvid(tmp_path / "void 11")
    (data / "classes.json").unlink()
    assert len(data_module.open_folder(data)[0].names) == 12
    assert len(data_module.open_folder(data, ignore_index=VOID)[0].names) == 3


def test_lists_may_hold_paths(tmp_path, data_module):
    data = write_camvid(tmp_path / "data")
    (data / "train.txt").write_text("/SegNet/CamVid/train/train2.png /SegNet/CamVid/trainannot/train2.png\n")
    assert [path.name for path in data_module.open_folder(data)[1].images] == ["train2.jpg"]


def test_wrong_network_is_a_usage_error(tmp_path):
    run = train("--num-heads", 5, "--out", tmp_path / "out", code=2)
    assert "must be a multiple of num_heads=5" in run.stderr
    assert not (tmp_path / "out").exists()
