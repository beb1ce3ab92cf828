"""Fused against reference on this machine: same weights, same batch; differences, time and peak memory of a step."""

from __future__ import annotations

import argparse
import contextlib
import copy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import segops
from memory import peak_mib
from network import MODELS
from segops.nn import SegmentationModel

SIDES = ("fused", "reference")


def compare(
    checkpoint: Path, model: SegmentationModel, image: Tensor, target: Tensor, ignore_index: int, rounds: int
) -> dict:
    """Compares the two sides.

    Args:
        checkpoint: Written by train.py; the memory is measured in fresh processes that load it.
        model: The model in it, on the device to compare on. It is not changed.
        image: [B, 3, H, W], the batch.
        target: [B, H, W].
        ignore_index: Label without loss.
        rounds: Timed steps of each side, after one that is not timed.

    Returns:
        Plain numbers: ``device``, ``backends``, ``logits``, ``gradient``, ``step_ms``, ``peak_mib``.
    """
    models = {side: copy.deepcopy(model).train() for side in SIDES}
    steps = {side: _step_of(models[side], image, target, ignore_index) for side in SIDES}
    logits, gradients, backends = {}, {}, {}
    for side in SIDES:
        with _backend(side), segops.record() as log:
            torch.manual_seed(0)  # the same dropout on both sides
            logits[side] = models[side].logits(image).detach()
            torch.manual_seed(0)
            gradients[side] = _gradients(models[side], image, target, ignore_index)
        backends[side] = {call.op: call.backend for call in log}
    worst = max(gradients["fused"], key=lambda name: _difference(gradients, name))
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(rounds + 1):
        for side in SIDES:
            with _backend(side):
                times[side].append(_seconds(steps[side], image.device))
    return {
        "device": str(image.device) if image.device.type == "cpu" else torch.cuda.get_device_name(image.device),
        "threads": torch.get_num_threads(),
        "batch": list(image.shape),
        "backends": backends,
        "logits": {"difference": _difference(logits), "magnitude": float(logits["reference"].abs().max())},
        "gradient": {
            "of": worst,
            "difference": _difference(gradients, worst),
            "magnitude": float(gradients["reference"][worst].abs().max()),
        },
        "step_ms": {side: 1e3 * min(seconds[1:]) for side, seconds in times.items()},
        "peak_mib": {side: _peak_in_fresh_process(checkpoint, side, image) for side in SIDES},
    }


def table(result: dict) -> str:
    """The lines that train.py prints."""
    fused, reference = result["step_ms"]["fused"], result["step_ms"]["reference"]
    less, more = result["peak_mib"]["fused"], result["peak_mib"]["reference"]
    logits, gradient = result["logits"], result["gradient"]
    ran = [
        f"  {f'{op} ran on':31}{backend:>12}{result['backends']['reference'].get(op, '-'):>12}"
        for op, backend in result["backends"]["fused"].items()
        if not op.endswith("_backward")
    ]
    batch = "x".join(map(str, result["batch"]))
    return "\n".join(
        [
            f"fused against reference on {result['device']}, {result['threads']} CPU threads, batch {batch}",
            f"  {'':31}{'fused':>12}{'reference':>12}{'ratio':>9}",
            *ran,
            f"  {'ms per training step':31}{fused:12.1f}{reference:12.1f}{reference / fused:8.2f}x",
            f"  {'peak memory of a step, MiB':31}{less:12.1f}{more:12.1f}{more / max(less, 1e-9):8.2f}x",
            f"  largest difference of the logits   {logits['difference']:.1e}  "
            f"(largest logit: {logits['magnitude']:.1e})",
            f"  largest difference of any gradient {gradient['difference']:.1e}  "
            f"(that of {gradient['of']}, whose largest entry is {gradient['magnitude']:.1e})",
            "  time: forward, loss, backward and update; sides interleaved, minimum of the rounds",
            "  memory: high-water mark of a fresh process above its mark after a small warm-up step",
        ]
    )


def _backend(side: str) -> contextlib.AbstractContextManager:
    return segops.use_backend("reference") if side == "reference" else contextlib.nullcontext()


def _step_of(model: SegmentationModel, image: Tensor, target: Tensor, ignore_index: int) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        optimizer.zero_grad()
        model(image, target, ignore_index=ignore_index)["loss"].backward()
        optimizer.step()

    return step


def _gradients(model: SegmentationModel, image: Tensor, target: Tensor, ignore_index: int) -> dict[str, Tensor]:
    wanted = {"the image": image.clone().requires_grad_(), **dict(model.named_parameters())}
    loss = model(wanted["the image"], target, ignore_index=ignore_index)["loss"]
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


def _difference(sides: dict, name: str | None = None) -> float:
    fused, reference = (sides[side] if name is None else sides[side][name] for side in SIDES)
    return float((fused - reference).abs().max())


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _peak_in_fresh_process(checkpoint: Path, side: str, image: Tensor) -> float:
    command = [sys.executable, __file__, str(checkpoint), side, image.device.type, str(torch.get_num_threads())]
    run = subprocess.run([*command, *map(str, image.shape)], stdout=subprocess.PIPE, text=True, check=True)
    return float(run.stdout.split()[-1])


def _main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one training step in this process, in MiB.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("device")
    parser.add_argument("threads", type=int)
    parser.add_argument("shape", type=int, nargs=4, metavar="B C H W")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    saved = torch.load(args.checkpoint, weights_only=True)
    model = MODELS[saved["recipe"]["model"]].build(**saved["network"])
    model.load_state_dict(saved["model"])
    model.to(args.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    batch, channels, *size = args.shape
    ignore_index = saved["network"].get("ignore_index", 255)

    def step(height: int, width: int) -> None:
        optimizer.zero_grad(set_to_none=False)
        image = torch.rand(batch, channels, height, width, device=args.device)
        target = torch.zeros(batch, height, width, dtype=torch.int64, device=args.device)
        model(image, target, ignore_index=ignore_index)["loss"].backward()
        optimizer.step()

    with _backend(args.side):
        step(*(min(32, side) for side in size))
        print(peak_mib(lambda: step(*size), args.device))


if __name__ == "__main__":
    _main()
