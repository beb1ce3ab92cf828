"""The docstrings' examples run, and every public name has a docstring."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import segops

MODULES = [
    name
    for _, name, _ in pkgutil.walk_packages(segops.__path__, "segops.")
    if not name.startswith(("segops.kernels", "segops._C", "segops.__main__"))
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch, "segops": segops})
    assert result.failed == 0


def test_examples_of_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    scope = {"image": torch.rand(2, 3, 64, 96), "target": torch.randint(0, 19, (2, 64, 96))}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, scope)
    assert not scope["model"].training  # when it predicts


def test_public_functions_and_modules_have_examples():
    public = [getattr(segops, name) for name in segops.__all__ if inspect.isfunction(getattr(segops, name))]
    public += [getattr(importlib.import_module("segops.nn"), n) for n in importlib.import_module("segops.nn").__all__]
    for thing in public:
        assert inspect.getdoc(thing), thing
    operators = [getattr(segops, name) for name in segops.ops.__all__] + [segops.compat.na2d, *public[-2:]]
    for thing in operators:
        assert ">>>" in inspect.getdoc(thing), f"{thing.__name__} has no example"
