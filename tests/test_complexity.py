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
    assert "differs" not in out


def test_a_row_that_differs_is_marked(complexity):
    row = complexity.Row("changed", 1.236, "1.23")
    assert "differs" in list(complexity.table(complexity.Section("paper", "", (row,))))[2]
