"""Memory of one fused tail, as the high-water mark of this process: ``python -m tests.ops.memory NAME THREADS``.

Prints as JSON the bytes that the call took beyond what was there before it, the bytes of its outputs, and those of one
weight gradient. Batches of 8 maps of 512 x 512 pixels with 150 classes.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
from pathlib import Path

import torch

import segops

M_MMAP_THRESHOLD = -3
CLEAR = Path("/proc/self/clear_refs")


def head(n, cells):
    weight = (torch.randn(16 * 16 * 150, 64) / 8).requires_grad_()
    return {"x": torch.randn(n, 64, cells, cells, requires_grad=True), "weight": weight,
            "bias": torch.zeros(16 * 16 * 150, requires_grad=True), "scale_factor": 16,
            "temperature": torch.ones(1, requires_grad=True)}  # fmt: skip


def inputs_of(name, n, pixels):
    if name == "axial_attention":  # self-attention of a map in one row, as in HFGD's encoder
        q, k, v = (torch.randn(1, c, 1, n * pixels * 4, requires_grad=True) for c in (64, 64, 512))
        return {"query": q, "key": k, "value": v, "order": ("width",), "scale": 0.1}
    if name == "axial_attention_forward":  # the decoder's map of a 513 x 513 crop
        q, k, v = (torch.randn(1, 256, 129, 129) for _ in range(3))
        return {"query": q, "key": k, "value": v, "num_heads": 4}
    if name == "car_losses":
        labels = torch.randint(150, (n, pixels, pixels), dtype=torch.uint8)
        features = torch.randn(n, 512, pixels // 8, pixels // 8, requires_grad=True)
        return {"features": features, "labels": labels, "num_classes": 150}
    if name.startswith("dupsample"):
        inputs = head(n, pixels // 16)
    else:
        inputs = {"logits": torch.randn(n, 150, pixels // 4, pixels // 4, requires_grad=True)}
        if name.endswith("argmax"):
            inputs["scale_factor"] = 4
    if name.endswith("entropy"):
        inputs["target"] = torch.randint(150, (n, pixels, pixels), dtype=torch.uint8)
    return inputs


def call(name, inputs):
    result = getattr(segops, name.removesuffix("_forward"))(**inputs)
    if name == "car_losses":
        return torch.autograd.grad(sum(result), inputs["features"])
    if not result.requires_grad or name.endswith("argmax"):
        return [result]
    wanted = [x for x in inputs.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return [result.detach(), *torch.autograd.grad(result.sum(), wanted)]


def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def main(name, threads):
    torch.set_num_threads(threads)
    # By default glibc raises the threshold after the first large free; memory is then reused, or not, by luck.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)
    with segops.use_backend("cpu"):
        call(name, inputs_of(name, 1, 32))
        inputs = inputs_of(name, 8, 512)
        CLEAR.write_text("5")  # resets the high-water mark
        before = status("VmRSS")
        outputs = call(name, inputs)
        taken = status("VmHWM") - before
    weight = inputs["weight"].nbytes if "weight" in inputs else 0
    print(json.dumps({"taken": taken, "outputs": sum(x.nbytes for x in outputs), "weight": weight}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
