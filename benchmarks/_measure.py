"""How one row becomes one result: gate, memory, then segops and its rivals timed in turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import _calls
import _memory
import torch
from _peaks import Work
from _suite import FORWARD, Row, Suite, Unavailable, shapes
from torch.utils._pytree import tree_map_only

import segops
from segops import _native, testing

ROUNDS = 10
LABELS_THAT_MAY_DIFFER = 1e-5
FEWEST = 3  # rounds of a rival that is too slow for ROUNDS; one where a single call takes twice the budget


class WrongResult(AssertionError):
    """A case whose values are wrong has no time."""


class Clock:
    """The timer of pytest-benchmark. It advances by what was measured, so that host and device time look the same."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def run(self, measured: Callable[[], float]) -> float:
        seconds = measured()
        self.now += seconds
        return seconds


CLOCK = Clock()


@dataclass
class Contender:
    """A call that is ready to be timed; ``note`` says which variant, ``seconds`` are its rounds."""

    call: _calls.Call
    note: str = ""
    measured: Callable[[], float] = lambda: math.nan
    seconds: list[float] = field(default_factory=list)
    rounds: int = ROUNDS


@dataclass
class Limits:
    """Of one rival on one row: seconds spent timing it, seconds of a single call, gigabytes."""

    budget: float = 3.0
    call: float = 60.0
    gigabytes: float = 10.0
    rounds: int = ROUNDS


class Runner:
    """Measures rows one after the other; keeps what neighbours share: the oracle, compiled rivals, chosen variants."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._oracle: tuple[tuple, list, list] | None = None
        self._chosen: dict[tuple, tuple[int, str, _calls.Call] | str] = {}
        self._over: dict[tuple[str, str], str] = {}  # (series, rival) -> what it ran into

    def measure(self, suite: Suite, row: Row, benchmark, module: str) -> dict:
        """The row's result; ``benchmark`` is the pytest-benchmark fixture. Raises WrongResult."""
        result = {
            "op": suite.op,
            "case": row.sample.name,
            "shape": shapes(row.sample),
            "arguments": row.sample.kwargs,
            "dtype": str(row.dtype).removeprefix("torch."),
            "layout": row.layout,
            "direction": row.direction,
            "device": row.device,
            "isa": row.isa or (_native.cpu_isa() if row.device == "cpu" else None),
            "series": row.series,
            "gates": dict(row.gates),
            "work": [vars(work) for work in suite.work(row.sample, row.dtype, row.direction)],
        }
        with _calls.chosen(row):
            mine = Contender(_calls.ours(suite, row))
            with segops.record() as log:
                values = mine.call()
            result["backend"] = "+".join(dict.fromkeys(entry.backend for entry in log))
            result["error"], oracle = self._gate(suite, row, values)
            result["output_bytes"] = sum(value.nbytes for value in values)
        del values
        result["memory"] = {"segops": self._memory(suite, module, row, None)}
        result["memory_allowed"] = suite.extra_memory(row.sample, row.dtype) if row.direction == FORWARD else None
        rivals, reasons = {}, {}
        for name in row.rivals:
            try:
                rivals[name] = self._rival(suite, module, row, name, oracle, result["memory"])
            except Unavailable as why:
                reasons[name] = str(why)
        if row.dtype in (torch.float16, torch.bfloat16):
            rivals["float32"] = Contender(_calls.ours(suite, replace(row, dtype=torch.float32)))
        with _calls.chosen(row):
            self._interleave(row, mine, rivals, benchmark)
        result["seconds"] = {"segops": _summary(mine), **{name: _summary(rival) for name, rival in rivals.items()}}
        result["ratio"] = {name: min(rival.seconds) / min(mine.seconds) for name, rival in rivals.items()}
        result["reasons"] = reasons
        if row.device == "cuda":
            with _calls.chosen(row):
                result["wall_seconds"] = min(_wall(mine.call)() for _ in range(self.limits.rounds))
        return result

    def _gate(self, suite: Suite, row: Row, values: tuple) -> tuple[dict[str, float], torch.Tensor]:
        names = ["out", *(f"grad_{name}" for name in _calls.gradient_names(row.sample))]
        partial = suite.part is not None and row.series is not None
        sample = row.sample if suite.checked is None else suite.checked(row.sample)
        if sample is not row.sample:
            values = _calls.ours(suite, row, sample)()
        key = (row.sample.name, row.dtype, row.direction, row.device)
        if self._oracle is None or self._oracle[0] != key:
            self._oracle = None
            tensors, kwargs = sample.tensors(row.dtype, row.device), sample.kwargs
            if partial:
                tensors, kwargs = suite.part(tensors, kwargs)
            with segops.use_backend("reference"):
                eager = _calls.call(suite.function, sample, tensors, row.direction, kwargs)()
                wide = tree_map_only(torch.Tensor, lambda x: x.double() if x.is_floating_point() else x, tensors)
                oracle = _calls.call(suite.function, sample, wide, row.direction, kwargs, rounded=row.dtype)()
            self._oracle = (key, oracle, eager)
        _, oracle, eager = self._oracle
        errors = {}
        for name, value, expected, plain in zip(names[: len(values)], values, oracle, eager, strict=True):
            if not expected.is_floating_point():  # labels: two classes may be as good as equal
                errors[name] = float((value != expected).double().mean())
                if errors[name] > LABELS_THAT_MAY_DIFFER:
                    raise WrongResult(f"{row}: {name}: {errors[name]:.2g} of the labels differ")
                continue
            found = testing.compare(name, _like(value, expected), expected, plain)
            if found.failure is not None:
                raise WrongResult(f"{row}: {found.failure}")
            errors[name] = found.rms_ratio
        return errors, oracle[0]

    def _memory(self, suite: Suite, module: str, row: Row, rival: tuple[int, str] | None) -> dict:
        return _memory.of_row(suite, module, row, rival, self.limits.call, self.limits.gigabytes)

    def _rival(self, suite: Suite, module: str, row: Row, name: str, oracle: torch.Tensor, memory: dict) -> Contender:
        """The fastest variant of the column, warmed up, checked and weighed. Raises Unavailable."""
        over = self._over.get((row.series, name))
        if over is not None:
            raise Unavailable(over)
        key = (row.sample.name, row.dtype, row.direction, row.device, name)
        if key not in self._chosen:
            self._forget_all_but(row)
            self._chosen[key] = self._choose(suite, row, name)
        chosen = self._chosen[key]
        if isinstance(chosen, str):
            raise Unavailable(chosen)
        index, layout, call = chosen
        if row.rival_memory:
            memory[name] = self._memory(suite, module, row, (index, layout))
            if "reason" in memory[name]:
                if row.series is not None:
                    self._over[row.series, name] = f"{memory[name]['reason']} at {row.sample.name}"
                raise Unavailable(memory[name]["reason"])
        try:
            values = call()  # compiles
            if suite.checked is not None:
                values = _calls.theirs(suite.rivals[index], layout, row, suite.checked(row.sample))()
        except Exception as error:
            self._chosen[key] = f"{type(error).__name__}: {_first_line(error)}"
            raise Unavailable(self._chosen[key]) from None
        # Only that it computes the same thing: a rival is not held to our accuracy.
        error = _difference(name, _like(values[0], oracle), oracle)
        if not error < 20 * testing.TOLERANCES[row.dtype].rms:
            raise Unavailable(f"computes something else (error {error:.1g})")
        variant = suite.rivals[index].variant
        return Contender(call, ", ".join(part for part in (variant, layout) if part))

    def _choose(self, suite: Suite, row: Row, name: str) -> tuple[int, str, _calls.Call] | str:
        """(index, layout, call) of the fastest variant, or why there is none.

        All run on a small map; those within half of the best there run once more at the size of the row.
        """
        candidates = [
            (index, layout)
            for index, rival in enumerate(suite.rivals)
            if rival.name == name
            for layout in rival.layouts
        ]
        if not candidates:
            raise KeyError(f"{suite.op}: no rival called {name!r}")
        reason, small = "", []
        for index, layout in candidates:
            try:
                small.append((index, layout, _calls.theirs(suite.rivals[index], layout, row, suite.tiny(row.sample))))
            except Unavailable as why:
                reason = str(why)
        if len(small) <= 1:
            return (*small[0][:2], _calls.theirs(suite.rivals[small[0][0]], small[0][1], row)) if small else reason
        trials = []
        for index, layout, call in small:
            try:
                call()
                trials.append((min(_once(call, row.device) for _ in range(2)), index, layout))
            except Exception as error:
                reason = f"{type(error).__name__}: {_first_line(error)}"
        if not trials:
            return reason
        near = [trial for trial in sorted(trials) if trial[0] <= 1.5 * min(trials)[0]][:2]
        calls = [(index, layout, _calls.theirs(suite.rivals[index], layout, row)) for _, index, layout in near]
        if len(calls) == 1 or row.series is not None:
            return calls[0]
        return min(calls, key=lambda found: _once(found[2], row.device))

    def _forget_all_but(self, row: Row) -> None:
        """Frees the inputs of earlier cases; and compiled code, so that the recompilation limit is never met."""
        key = (row.sample.name, row.dtype, row.direction, row.device)
        if any(kept[:4] != key for kept in self._chosen):
            self._chosen = {kept: value for kept, value in self._chosen.items() if kept[:4] == key}
            torch._dynamo.reset()
            gc.collect()

    def _interleave(self, row: Row, mine: Contender, rivals: dict[str, Contender], benchmark) -> None:
        """One round of each in turn. pytest-benchmark's rounds are ours; its setup is where the rivals run."""
        rounds = self.limits.rounds
        for contender in (mine, *rivals.values()):
            contender.measured = _stopwatch(contender.call, row.device)
        mine.measured()
        for rival in rivals.values():
            seconds = rival.measured()
            slow = seconds > (self.limits.budget if row.series is not None else 2 * self.limits.budget)
            fewest = 1 if slow else min(FEWEST, rounds)
            rival.rounds = max(fewest, min(rounds, int(self.limits.budget / seconds)))
        done = 0

        def the_rivals() -> None:
            nonlocal done
            for rival in rivals.values():
                if done * rival.rounds // rounds != (done - 1) * rival.rounds // rounds:  # spread evenly
                    rival.seconds.append(rival.measured())
            done += 1

        def ours() -> None:
            mine.seconds.append(CLOCK.run(mine.measured))

        benchmark.pedantic(ours, setup=the_rivals, rounds=rounds)


def _like(value: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """The part of ``value`` that ``Suite.part`` keeps."""
    return value if value.shape == expected.shape else value[:, : expected.shape[1]]


def _difference(name: str, value: torch.Tensor, oracle: torch.Tensor) -> float:
    if oracle.is_floating_point():
        return testing.compare(name, value, oracle).rms_ratio
    return float((value != oracle).double().mean())


def _summary(contender: Contender) -> dict:
    summary = {
        "min": min(contender.seconds),
        "median": statistics.median(contender.seconds),
        "rounds": len(contender.seconds),
    }
    return {**summary, "variant": contender.note} if contender.note else summary


def _stopwatch(call: _calls.Call, device: str) -> Callable[[], float]:
    return _wall(call) if device == "cpu" else _on_device(call)


def _once(call: _calls.Call, device: str) -> float:
    return _stopwatch(call, device)()


def _wall(call: _calls.Call) -> Callable[[], float]:
    def measured() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return measured


def _on_device(call: _calls.Call, replays: int = 20) -> Callable[[], float]:
    """Median seconds of a CUDA graph's replays, the L2 cache cleared before each; events around the call where it
    cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    run: Callable[[], object] = call
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
        run = graph.replay
    except Exception as error:
        warnings.warn(f"timed without a CUDA graph: {_first_line(error)}", stacklevel=2)
        torch.cuda.synchronize()
    cache = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def measured() -> float:
        spans = []
        for _ in range(replays):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.zero_()
            start.record()
            run()
            end.record()
            spans.append((start, end))
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in spans) / 1e3

    return measured


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:160] if lines else "no message"


def work_of(result: dict) -> list[Work]:
    return [Work(**work) for work in result["work"]]
