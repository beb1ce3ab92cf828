"""Fresh memory is poisoned: under this setting torch fills what it allocates with NaN (the largest value for integers),
in the compiled ops' outputs too, so a kernel that leaves a hole fails."""

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def lane(request):
    """The lane, if it can run the op: the test's parameter "name", else the X of its file test_X.py."""
    op = request.node.callspec.params.get("name") or request.module.__name__.rpartition(".test_")[2]
    request.param.skip_if_missing(op)
    return request.param
