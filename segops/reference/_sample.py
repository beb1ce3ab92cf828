"""One call of an operator, as the test battery and the documentation see it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Shape = tuple[int, ...]
Inputs = dict[str, Any]  # tensors, and lists of them


@dataclass(frozen=True)
class Labels:
    """A label map: random classes, of which the share ``ignored`` is ``ignore_index``."""

    shape: Shape
    classes: int
    ignored: float = 0.1
    dtype: torch.dtype = torch.int64
    ignore_index: int = 255

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        labels = torch.randint(self.classes, self.shape, generator=generator)
        ignored = torch.rand(self.shape, generator=generator) < self.ignored
        return labels.masked_fill(ignored, self.ignore_index).to(self.dtype)


@dataclass(frozen=True)
class Uniform:
    """Floats between two bounds: class weights, temperatures."""

    shape: Shape
    low: float
    high: float

    def draw(self, generator: torch.Generator) -> torch.Tensor:
        return self.low + (self.high - self.low) * torch.rand(self.shape, generator=generator, dtype=torch.float64)


Spec = Shape | list[Any] | Labels | Uniform | None


@dataclass(frozen=True)
class Sample:
    """The tensor arguments, by what they are drawn from, and the other arguments, of one call of a public function.

    Attributes:
        name: What is special about the sample; the test's id.
        shapes: Argument name to a shape (normal numbers), ``Labels``, ``Uniform``, None (an absent tensor), or a list
            of these (a list of tensors, of any depth).
        kwargs: Every other argument.
        tiny: Small enough for gradcheck and for backends that are interpreted or emulated.
        scale: Standard deviation of the normal inputs.
        differentiable: Arguments that have a gradient; None means all.
    """

    name: str
    shapes: Mapping[str, Spec]
    kwargs: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    scale: float = 1.0
    differentiable: tuple[str, ...] | None = None

    def tensors(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Random inputs: drawn in float64, rounded to ``dtype``, so that every dtype sees the same numbers."""
        generator = torch.Generator().manual_seed(seed)

        def draw(spec: Spec) -> Any:
            if isinstance(spec, list):
                return [draw(shape) for shape in spec]
            if spec is None:
                return None
            if isinstance(spec, tuple):
                normal = torch.randn(spec, generator=generator, dtype=torch.float64)
                return (self.scale * normal).to(device, dtype)
            drawn = spec.draw(generator)
            return drawn.to(device, dtype) if drawn.is_floating_point() else drawn.to(device)

        return {name: draw(spec) for name, spec in self.shapes.items()}


Samples = Callable[[], list[Sample]]
