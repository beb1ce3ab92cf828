"""What a bench_X.py declares: named real shapes, necessary work, and the rivals a user would otherwise take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from _peaks import Work
from torch import Tensor

from segops.reference._sample import Sample

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
FORWARD, TRAINING = "forward", "forward+backward"
Function = Callable[..., Tensor]


class Unavailable(Exception):
    """A rival cannot run a case; the sentence goes into the table."""


@dataclass(frozen=True)
class Rival:
    """One way of getting the same values.

    Attributes:
        name: The column. Several rivals of one name are variants: the fastest of them is the column.
        prepare: (sample, dtype, device, direction) -> function of the sample's tensors; raises Unavailable.
        variant: Which formulation this is.
        layouts: The memory formats to try; the rival keeps its best one whatever the layout of the row.
        compiled: Specialised to a shape at its first call, which is not timed.
    """

    name: str
    prepare: Callable[[Sample, torch.dtype, str, str], Function]
    variant: str = ""
    layouts: tuple[str, ...] = ("nchw",)
    compiled: bool = False


@dataclass(frozen=True)
class Row:
    """One line of the results: a case, and how it is called.

    Attributes:
        backend: Asked for by name; None leaves the choice to the router.
        isa: Cap on the CPU instruction set; None is none.
        rivals: Names of the columns measured beside it.
        rival_memory: Measure the rivals' peak memory too; a rival over the bounds is then not timed.
        series: Rows of one series grow in order; a rival that went over the bounds is not tried on the larger ones.
        gates: What ``report.py --check`` asks of the row: rival -> times faster, "floor" -> percent of the floor.
    """

    sample: Sample
    dtype: torch.dtype
    layout: str
    direction: str
    device: str = "cpu"
    backend: str | None = None
    isa: str | None = None
    rivals: tuple[str, ...] = ("eager",)
    rival_memory: bool = False
    series: str | None = None
    gates: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parts = [self.sample.name, str(self.dtype).removeprefix("torch."), self.layout, self.direction]
        return "-".join(parts + [part for part in (self.device, self.backend, self.isa) if part not in (None, "cpu")])


@dataclass(frozen=True)
class Suite:
    """The benchmark of one op.

    Attributes:
        op: Its name.
        function: The public function.
        rows: (device) -> rows, those that share inputs side by side.
        work: (sample, dtype, direction) -> one Work per pass over memory (forward, backward); their floors add up.
        extra_memory: (sample, dtype) -> bytes that a forward call may take beyond its output.
        rivals: In the order of the columns.
        tiny: A small sample of the same kind, for warming up and for choosing among variants.
        part: (tensors, kwargs) -> the same for the leading channels of the output only, where the float64 oracle of the
            whole would not fit; None checks everything.
        checked: The sample that the comparison is made on instead, where the oracle of the whole would not fit and the
            output cannot be cut; None is the sample itself.
    """

    op: str
    function: Function
    rows: Callable[[str], Sequence[Row]]
    work: Callable[[Sample, torch.dtype, str], list[Work]]
    extra_memory: Callable[[Sample, torch.dtype], int]
    rivals: Sequence[Rival]
    tiny: Callable[[Sample], Sample]
    part: Callable[[dict[str, Tensor], dict], tuple[dict[str, Tensor], dict]] | None = None
    checked: Callable[[Sample], Sample] | None = None


def shapes(sample: Sample) -> dict[str, list | None]:
    """Argument name to shape, or to a list of shapes, of any depth; None where there is no tensor."""
    return {name: None if spec is None else list(getattr(spec, "shape", spec)) for name, spec in sample.shapes.items()}
