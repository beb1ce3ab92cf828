"""examples/predict.py as its user runs it, on checkpoints of train.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLES = Path(__file__).parents[1] / "examples"
SIZES = {"wide.jpg": (90, 41), "tall.png": (33, 70)}


def run(script: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    options = ("--steps", 2, "--batch-size", 2, "--crop", 64, "--show", 1, "--compare", 0, "--out", out)
    run("train.py", "--model", "segnext-t", *options)
    return out / "checkpoint.pt"


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    return folder


@pytest.mark.parametrize("options", [(), ("--tile", 32, "--overlap", 8), ("--flip", "--scales", 0.5, 1)], ids=str)
def test_masks_and_overlays(checkpoint, images, tmp_path, options):
    out = tmp_path / "out"
    done = run("predict.py", "--checkpoint", checkpoint, "--images", images, "--out", out, *options)
    assert "2/2" in done.stderr
    assert "written: 2 images" in done.stdout
    for folder, mode in (("masks", "L"), ("overlays", "RGB")):
        assert sorted(path.name for path in (out / folder).iterdir()) == ["tall.png", "wide.png"]
        for name, size in SIZES.items():
            with Image.open(out / folder / f"{Path(name).stem}.png") as picture:
                assert (picture.mode, picture.size) == (mode, size)
    with Image.open(out / "masks" / "tall.png") as mask:
        assert np.asarray(mask).max() < 8
    with Image.open(out / "overlays" / "tall.png") as overlay, Image.open(images / "tall.png") as image:
        assert (np.abs(np.asarray(overlay).astype(int) - np.asarray(image)) <= 128).all()


def test_wrong_input_is_one_line(checkpoint, images, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    arguments = {"--checkpoint": checkpoint, "--images": images, "--out": tmp_path / "out"}
    for change, words in (
        ({"--images": tmp_path / "nowhere"}, "nowhere: no such folder"),
        ({"--images": empty}, "empty: no images"),
        ({"--checkpoint": tmp_path / "none.pt"}, "none.pt: no such checkpoint"),
        ({"--checkpoint": images / "tall.png"}, "tall.png: cannot be loaded"),
    ):
        done = run("predict.py", *(part for pair in {**arguments, **change}.items() for part in pair), code=2)
        (line,) = done.stderr.splitlines()
        assert words in line
    (images / "wide.jpg").write_bytes(b"no image")
    done = run("predict.py", *(part for pair in arguments.items() for part in pair), code=2)
    assert "wide.jpg: cannot be decoded" in done.stderr.splitlines()[-1]
    (images / "tall.jpg").write_bytes(b"")
    done = run("predict.py", *(part for pair in arguments.items() for part in pair), code=2)
    assert "another image has the same name" in done.stderr
    done = run("predict.py", *(part for pair in arguments.items() for part in pair), "--tile", 32, code=2)
    assert "--overlap must be smaller than --tile 32, got 64" in done.stderr


@pytest.fixture
def predict(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    names = ("predict", "train", "data", "network", "picture", "compare", "scenes", "memory")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import predict

    yield predict
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("length", "tile", "overlap"), [(100, 32, 8), (33, 32, 31), (32, 32, 0), (5, 32, 8), (64, 32, 0)]
)
def test_spans_keep_every_pixel_once(predict, length, tile, overlap):
    kept = np.zeros(length, int)
    spans = list(predict.spans(length, tile, overlap))
    for start, end, keep in spans:
        assert end - start == min(tile, length)
        assert start <= keep.start <= keep.stop <= end
        assert keep.start == 0 or keep.start - start >= overlap // 2
        assert keep.stop == length or end - keep.stop >= overlap // 2
        kept[keep] += 1
    assert (kept == 1).all()


class Pixelwise(torch.nn.Module):
    """Logits of every pixel from that pixel."""

    class decode_head:
        align_corners = False

    def logits(self, image):
        return torch.cat([image[:, :1], image[:, 1:2], 0.2 + 0 * image[:, :1]], 1)

    def predict(self, image):
        return self.logits(image).argmax(1).to(torch.uint8)


def test_tiles_flips_and_scales_of_a_pixelwise_network(predict):
    image = torch.rand(1, 3, 75, 52, generator=torch.Generator().manual_seed(0))
    whole = Pixelwise().predict(image)
    parse = predict.arguments().parse_args
    always = ["--checkpoint", "c", "--images", "i", "--out", "o"]
    tiled = predict.segment(Pixelwise(), image, parse([*always, "--tile", "20", "--overlap", "6"]))
    assert torch.equal(tiled, whole.long())
    flipped = predict.segment(Pixelwise(), image, parse([*always, "--flip"]))
    assert torch.equal(flipped, whole)
    larger = torch.nn.functional.interpolate(image, (150, 104), mode="bilinear")
    views = [Pixelwise().logits(image), Pixelwise().logits(larger)]
    views[1] = torch.nn.functional.interpolate(views[1], (75, 52), mode="bilinear")
    expected = torch.stack([view.softmax(1) for view in views]).mean(0).argmax(1)
    scaled = predict.segment(Pixelwise(), image, parse([*always, "--scales", "1", "2"]))
    assert (scaled == expected).double().mean() > 0.999
