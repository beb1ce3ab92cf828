"""What only a GPU can show of the compiled CUDA kernels: stream, device guard, determinism, no synchronisation.

    python benchmarks/gpu_check.py            all checks
    python benchmarks/gpu_check.py --small    a few small calls, for compute-sanitizer
    python benchmarks/gpu_check.py --profile  each kernel once at LDv2's shape, for a profiler

Exits with 1 if a check fails; each check prints one line.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

import segops
from segops import _native
from segops.reference.local_attention import local_attention as reference
from segops.testing import compare

WINDOW = dict(kernel_size=5, dilation=6, num_heads=4)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str = "cuda") -> list[Tensor]:
    memory_format = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator)
        .to(device, dtype)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
        for _ in range(3)
    ]


def run(tensors: list[Tensor], **window) -> list[Tensor]:
    """Output, log-sum-exp and gradients by the CUDA kernels."""
    with segops.use_backend("cuda"):
        out, lse = segops.local_attention(*tensors, **window, return_lse=True)
        return [out, lse, *torch.autograd.grad(out.float().square().sum() + lse.sum(), tensors)]


def oracle(tensors: list[Tensor], kernel_size, dilation, num_heads, border="zero") -> list[Tensor]:
    wide = [x.detach().double().requires_grad_() for x in tensors]
    scale = (wide[0].shape[1] // num_heads) ** -0.5
    out, lse = reference(*wide, (kernel_size,) * 2, (dilation,) * 2, num_heads, scale, border)
    return [out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), wide)]


def check_values(shape: tuple[int, ...], dtype: torch.dtype, layout: str, **window) -> None:
    tensors = inputs(shape, dtype, layout)
    actual, expected = run(tensors, **window), oracle(tensors, **window)
    for name, a, e in zip(("out", "lse", "grad_query", "grad_key", "grad_value"), actual, expected, strict=True):
        # The loss rounds out before it squares it: gradients inherit that dtype's rounding.
        relative = (a.double() - e).square().mean().sqrt() / e.square().mean().sqrt().clamp_min(1e-30)
        bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}[dtype]
        if not relative <= bound:
            raise AssertionError(f"{name}: RMS error {float(relative):.2g}, allowed {bound:.2g}; {compare(name, a, e)}")


def check_current_stream() -> None:
    """On a side stream behind a long wait, the kernels see what that stream wrote."""
    tensors = inputs((2, 128, 40, 56), torch.float32, "channels_last")
    expected = run(tensors, **WINDOW)
    late = [torch.zeros_like(x).requires_grad_() for x in tensors]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        with torch.no_grad():
            for x, source in zip(late, tensors, strict=True):
                x.copy_(source)
        actual = run(late, **WINDOW)
    stream.synchronize()
    if not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)):
        raise AssertionError("kernels did not run on the current stream")


def check_no_synchronisation() -> None:
    tensors = inputs((2, 128, 40, 56), torch.bfloat16, "nchw")
    run(tensors, **WINDOW)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(tensors, **WINDOW)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A call that waited for the GPU would return after the sleep.
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    run(tensors, **WINDOW)
    done.record()
    if done.query():
        raise AssertionError("a call waited for the GPU")
    torch.cuda.synchronize()


def check_graph_capture() -> None:
    tensors = inputs((2, 128, 40, 56), torch.bfloat16, "channels_last")
    expected = run(tensors, **WINDOW)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(tensors, **WINDOW)
    graph.replay()
    torch.cuda.synchronize()
    if not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True)):
        raise AssertionError("a captured graph gives another result")


def check_determinism() -> None:
    for layout in ("nchw", "channels_last"):
        tensors = inputs((2, 256, 97, 97), torch.bfloat16, layout)
        first = run(tensors, kernel_size=5, dilation=6, num_heads=8)
        for _ in range(20):
            again = run(tensors, kernel_size=5, dilation=6, num_heads=8)
            if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
                raise AssertionError(f"two runs differ ({layout})")


def check_device_guard() -> None:
    """Tensors on the last GPU while the first is current; with one GPU, only that the current one stays."""
    last = torch.cuda.device_count() - 1
    torch.cuda.set_device(0)
    tensors = inputs((1, 128, 20, 30), torch.float32, "nchw", f"cuda:{last}")
    actual = run(tensors, **WINDOW)
    if torch.cuda.current_device() != 0 or any(a.device.index != last for a in actual):
        raise AssertionError("the current device changed")
    for a, e in zip(actual, oracle(tensors, **WINDOW), strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-4, atol=1e-4)


def check_many_elements() -> None:
    """More than 2^31 elements: offsets are 64 bits wide."""
    image = inputs((1, 64, 40, 40), torch.bfloat16, "channels_last")
    with torch.no_grad(), segops.use_backend("cuda"):
        many = [x.detach().expand(22_000, -1, -1, -1) for x in image]
        out = segops.local_attention(*many, kernel_size=3, dilation=6, num_heads=4)
        one = segops.local_attention(*image, kernel_size=3, dilation=6, num_heads=4)
    if out.numel() <= 2**31 or not torch.equal(out[-1:], one) or not torch.equal(out[11_000:11_001], one):
        raise AssertionError("the last images differ from the first")


def checks(small: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    if small:
        for layout, border in itertools.product(("nchw", "channels_last"), ("zero", "mask", "shift")):
            for size, shape in ((5, (1, 32, 20, 24)), (7, (1, 16, 15, 24))):
                window = dict(kernel_size=size, dilation=2, num_heads=2, border=border)
                name = f"values bfloat16 {layout} {border} k{size}"
                yield name, lambda s=shape, l=layout, w=window: check_values(s, torch.bfloat16, l, **w)
        return
    for dtype, layout, border in itertools.product(dtypes, ("nchw", "channels_last"), ("zero", "mask", "shift")):
        for size, dilation, heads, shape in (
            (5, 6, 8, (2, 256, 64, 96)),
            (3, 4, 1, (1, 512, 33, 35)),
            (7, 3, 2, (1, 64, 41, 64)),
        ):
            window = dict(kernel_size=size, dilation=dilation, num_heads=heads, border=border)
            name = f"values {str(dtype).removeprefix('torch.')} {layout} {border} k{size}"
            yield name, lambda s=shape, d=dtype, l=layout, w=window: check_values(s, d, l, **w)
    yield "current stream", check_current_stream
    yield "no synchronisation", check_no_synchronisation
    yield "graph capture", check_graph_capture
    yield "determinism", check_determinism
    yield "device guard", check_device_guard
    yield "more than 2^31 elements", check_many_elements


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    reason = _native.why_not("_C_cuda") or (None if torch.cuda.is_available() else "no GPU")
    if reason is not None:
        print(f"FAIL cannot run: {reason}")
        return 1
    if args.profile:
        run(inputs((2, 256, 128, 128), torch.bfloat16, "channels_last"), kernel_size=5, dilation=6, num_heads=8)
        torch.cuda.synchronize()
        return 0
    failed = 0
    for name, check in checks(args.small):
        try:
            check()
            print(f"ok   {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
