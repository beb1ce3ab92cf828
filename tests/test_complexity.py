"""The modules do as many operations as the papers print."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from segops.nn import DUpsampling

_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "complexity.py"
_NAME = "segops_benchmark_complexity"


# Rows whose figure in the paper is not to be had; the note under the table says why.
DIFFER = {
    "parameters": {"Table 5, B w/ CC", "Table 6, T (a)"},
    "GFLOPs": {
        "Table 8, SegNeXt-B, 2048x1024", "Table 8, SegNeXt-L, 2048x1024", "Table 5, B w/ CC", "Table 6, T (a)",
        "Table 7, S w/o MSCA",
    },
    "HFGD": {
        f"{row}; ResNet-50, {backbone}"
        for row in (
            "SemanticFPN", "self-attention with CAR, stride 8", "HFGD, OS 4", "HFGD, OS 2", "HFGD, OS 1 (section 9)",
        )
        for backbone in ("iSeg's", "7x7 stem")
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def complexity():
    spec = importlib.util.spec_from_file_location(_NAME, _PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[_NAME] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[_NAME]


def test_every_figure_of_dupsampling(complexity):
    section = complexity.dupsampling()
    assert len(section.rows) == 6 + 8 + 2
    assert [row.name for row in section.rows if row.printed != row.paper] == []
    # Three digits behind the point, so that a change of structure cannot hide in the paper's rounding.
    expected = [0.797, 1.133, 1.147, 1.227, 1.577, 1.564]
    expected += [5.527, 1.147, 22.340, 1.564, 5.527, 1.932, 0.411, 1.981, 43.653, 25.137]
    assert [round(row.ours, 3) for row in section.rows] == expected


def test_parameters_of_segnext(complexity):
    """SegNeXt-T, -S, -B and -L to the last one, with 150 classes."""
    rows = complexity.segnext_parameters().rows
    assert [round(row.ours * 1e6) for row in rows[:4]] == [4_263_414, 13_932_886, 27_636_310, 48_926_550]
    expected = [27.636, 27.637, 27.374, 27.439, 4.338, 4.206, 4.263, 4.272, 4.209, 13.841]
    assert [round(row.ours, 3) for row in rows[4:]] == expected
    assert {row.name for row in rows if row.printed != row.paper} == DIFFER["parameters"]


def test_cost_of_segnext(complexity):
    rows = complexity.segnext().rows
    assert {row.name for row in rows if row.printed != row.paper} == DIFFER["GFLOPs"]
    products = [6.404, 50.129, 15.646, 124.064, 34.663, 274.883, 69.686, 552.649]
    assert [round(row.products, 3) for row in rows[:8]] == products
    by_convention = [6.592, 15.851, 34.894, 69.953]
    assert [round(row.ours, 3) for row in rows[:8:2]] == by_convention
    expected = [34.894, 40.918, 32.326, 32.865, 10.058, 4.910, 6.592, 12.062, 6.496, 15.714]
    assert [round(row.ours, 3) for row in rows[8:]] == expected


def test_cost_of_hfgd(complexity):
    """The paper's own figures cannot be had; ours to the last digit, and where they come from."""
    section = complexity.hfgd()
    assert {row.name for row in section.rows if row.printed != row.paper} == DIFFER["HFGD"]
    ours = [round(row.ours, 2) for row in section.rows if row.name.endswith("iSeg's")]
    assert ours == [48.61, 162.68, 70.0, 138.15, 469.49]
    with complexity.FAKE:
        image = torch.empty(1, 3, 513, 513)
        costs = [
            complexity.products_of(complexity.resnet50(iseg=iseg, output_stride=stride), image)[""]
            for iseg, stride in ((True, 32), (True, 8), (False, 32), (False, 8))
        ]
    assert [round(cost, 2) for cost in costs] == [26.44, 108.8, 19.3, 101.66]
    parts = [[round(part, 2) for part in complexity.hfgd_parts(output_stride=s).values()] for s in (4, 2)]
    assert parts == [[0.64, 17.37, 18.75, 1.09, 3.27, 2.2, 0.25], [0.64, 17.37, 58.01, 4.33, 12.99, 17.38, 1.0]]
    # 129 rows and columns of 129 x 129 pixels, 256 channels of queries and of values.
    assert complexity.hfgd_parts()["axial attention"] == pytest.approx(2 * 129**3 * 512 / 1e9)


def test_counts_by_hand(complexity):
    with complexity.FAKE:
        net = nn.Sequential(nn.Conv2d(6, 4, 3, stride=2, groups=2), nn.BatchNorm2d(4), DUpsampling(4, 3, 2))
        without_bias = DUpsampling(4, 3, 2, bias=False)
        x, y = torch.empty(1, 6, 11, 7), torch.empty(1, 4, 5, 3)
        counts = [complexity.count(lambda: net[:2](x), net), complexity.count(lambda: net(x), net)]
        counts.append(complexity.count(lambda: without_bias(y), without_bias))
    convolution, layer = 5 * 3 * 4 * 3 * 9, 5 * 3 * 4 * 12
    assert counts == [
        complexity.Operations(convolution),
        complexity.Operations(convolution + layer, 5 * 3 * 12 * 2),
        complexity.Operations(layer, 5 * 3 * 12),
    ]


def test_tables_are_printed(complexity, capsys):
    complexity.main()
    out = capsys.readouterr().out
    assert "22.340     22.34" in out
    assert "2 per multiply-add" in out
    assert "SegNeXt-T, 512x512       6.592       6.6       6.404" in out
    assert out.count("differs") == sum(len(rows) for rows in DIFFER.values())


def test_a_row_that_differs_is_marked(complexity):
    row = complexity.Row("changed", 1.236, "1.23")
    assert "differs" in list(complexity.table(complexity.Section("paper", "", (row,))))[2]
