"""The README shows the committed results, and nothing else."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

_PATH = Path(__file__).resolve().parent.parent / "benchmarks" / "report.py"


@pytest.fixture(scope="module")
def report():
    spec = importlib.util.spec_from_file_location("segops_benchmark_report", _PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_agrees_with_results(report):
    assert report.verify() is None


def test_a_changed_result_is_seen(report, tmp_path, monkeypatch):
    if not report.ops():
        pytest.skip("no committed results")
    op = report.ops()[0]
    machine, results = next(iter(report.load(op).items()))
    results["rows"][0]["seconds"]["segops"]["min"] *= 2
    (tmp_path / machine).mkdir()
    (tmp_path / machine / f"{op}.json").write_text(json.dumps(results))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert report.verify() is not None
