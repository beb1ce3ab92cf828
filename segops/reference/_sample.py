"""One call of an operator, as the test battery and the documentation see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Sample:
    """Shapes of the tensor arguments, and the other arguments, of one call of a public function.

    Attributes:
        name: What is special about the sample; the test's id.
        shapes: Argument name to shape, in the order of the public signature.
        kwargs: Every other argument.
        tiny: Small enough for gradcheck and for backends that are interpreted or emulated.
        scale: Standard deviation of the random inputs.
    """

    name: str
    shapes: dict[str, Shape]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    scale: float = 1.0

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
        """Random inputs: drawn in float64, rounded to ``dtype``, so that every dtype sees the same numbers."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: (self.scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(device, dtype)
            for name, shape in self.shapes.items()
        }


Samples = Callable[[], list[Sample]]
