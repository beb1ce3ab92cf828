"""examples/dupsampling_upper_bound.py as its user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segops import _native
from tests.test_train_example import write_camvid

SCRIPT = Path(__file__).parents[1] / "examples" / "dupsampling_upper_bound.py"

if _native.why_not("_labels"):
    pytest.skip(_native.why_not("_labels"), allow_module_level=True)


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    ran = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == code, ran.stdout + ran.stderr
    return ran


def rows(text: str) -> list[list[str]]:
    return [words for words in map(str.split, text.splitlines()) if words[1:2] in (["val"], ["test"])]


def test_scenes_give_table_and_picture(tmp_path):
    out = tmp_path / "new" / "out"
    ran = run("--out", out, "--scale-factors", 8, "--channels", 32, 4, 192)
    assert sorted(path.name for path in out.iterdir()) == ["reconstructions.png", "table.txt"]
    table = (out / "table.txt").read_text()
    assert table.startswith("# python examples/dupsampling_upper_bound.py --out")
    assert rows(ran.stdout) == rows(table)
    assert [row[:2] for row in rows(table)] == [["8", "val"], ["8", "test"]]
    for row in rows(table):
        bilinear, *by_channels = map(float, row[2:])
        assert by_channels == sorted(by_channels)
        assert by_channels[0] < bilinear < by_channels[1] < by_channels[2] <= 1
    with Image.open(out / "reconstructions.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > picture.height > 150
    assert "label maps: 100%" in ran.stderr


def test_folder_and_autoencoder(tmp_path):
    data, out, table = write_camvid(tmp_path / "data"), tmp_path / "out", tmp_path / "tables" / "camvid.txt"
    ran = run(
        "--data", data, "--out", out, "--table", table, "--scale-factors", 4, "--channels", 2, "--autoencoder", 2,
        "--batch-size", 2, "--crop", 32,
    )  # fmt: skip
    assert "train 3, val 2 label maps, 3 classes" in ran.stdout
    assert len(rows(ran.stdout)) == 1  # no test folder
    assert "label autoencoder on val after 2 steps" in table.read_text()
    assert [path.name for path in out.iterdir()] == ["reconstructions.png"]


def relabel(folder: Path) -> None:
    label = np.zeros((33, 50), np.uint8)
    label[7, 9] = 200
    Image.fromarray(label).save(folder / "valannot" / "val0.png")


@pytest.mark.parametrize(
    ("harm", "arguments", "words"),
    [
        (None, ["--channels", 49, "--scale-factors", 4], "channels must be at most scale_factor² * num_classes = 48"),
        (None, ["--show", 2], "--show must be less than the 2 maps of val, got 2"),
        (relabel, [], "val0.png: label 200 is not in [0, 3)"),
        (lambda folder: (folder / "val").rename(folder / "gone"), [], "no such folder"),
    ],
    ids=["channels", "show", "label", "folder"],
)
def test_wrong_input_is_one_line(tmp_path, harm, arguments, words):
    data = write_camvid(tmp_path / "data")
    if harm:
        harm(data)
    ran = run("--data", data, "--out", tmp_path / "out", *arguments, code=2)
    assert words in ran.stderr.splitlines()[-1]
    assert ran.stderr.splitlines()[-1].startswith("dupsampling_upper_bound.py: error: ")
    assert not (tmp_path / "out").exists()
    assert not ran.stdout


def test_a_wrong_label_of_test_is_named(tmp_path):
    data = write_camvid(tmp_path / "data")
    (data / "test").mkdir()
    (data / "testannot").mkdir()
    Image.new("RGB", (8, 8)).save(data / "test" / "last.png")
    Image.new("L", (8, 8), 9).save(data / "testannot" / "last.png")
    ran = run("--data", data, "--out", tmp_path / "out", "--channels", 2, "--scale-factors", 4, code=2)
    assert "last.png) has label 9 at row 0, column 0" in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
