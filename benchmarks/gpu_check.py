"""What only a GPU can show of every op: stream, device guard, no synchronisation, capture in a graph.

    python benchmarks/gpu_check.py            all checks
    python benchmarks/gpu_check.py --small    each op's smallest sample once, for compute-sanitizer
    python benchmarks/gpu_check.py --profile  local_attention once at LDv2's shape, for a profiler

Values are the battery's business (tests/ops). Exits with 1 if a check fails; each check prints one line.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import segops
from segops import _dispatch
from segops.reference._sample import Inputs, Sample

BACKENDS = ("triton", "cuda")
Case = tuple[str, Sample, str]  # op, call, backend


def cases() -> Iterator[Case]:
    """Each op on each GPU backend that has it, on the first of its samples that is more than a pixel."""
    for name, op in _dispatch.OPS.items():
        if name.endswith("_backward"):
            continue
        samples = importlib.import_module(f"segops.reference.{name}").sample_inputs()
        sample = next(s for s in samples if s.tiny and s.name != "one_pixel")
        for row in op.backends["cuda"]:
            if row.run is not None:
                yield name, sample, row.name


def inputs(case: Case, dtype: torch.dtype = torch.float32, device: str = "cuda") -> Inputs:
    return case[1].tensors(dtype, device)


def run(case: Case, tensors: Inputs) -> list[Tensor]:
    """Outputs and gradients. Nothing here waits for the GPU: labels are not checked there by default."""
    name, sample, backend = case
    wanted = [
        key
        for key, x in tensors.items()
        if isinstance(x, Tensor)
        and x.is_floating_point()
        and (sample.differentiable is None or key in sample.differentiable)
    ]
    leaves = {key: tensors[key].detach().requires_grad_() for key in wanted}
    function = getattr(importlib.import_module(f"segops.ops.{name}"), name)
    with segops.use_backend(backend):
        out = function(**{**tensors, **leaves}, **sample.kwargs)
        outputs = list(out) if isinstance(out, tuple) else [out]
        differentiable = [o for o in outputs if o.requires_grad]
        if not differentiable:
            return outputs
        gradients = torch.autograd.grad(
            differentiable, list(leaves.values()), [torch.ones_like(o) for o in differentiable]
        )
    return [*(o.detach() for o in outputs), *gradients]


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def check_current_stream(case: Case) -> None:
    """On a side stream behind a long wait, the kernels see what that stream wrote."""
    tensors = inputs(case)
    expected = run(case, tensors)
    late = tree_map_only(Tensor, torch.zeros_like, tensors)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, source in zip(tree_leaves(late), tree_leaves(tensors), strict=True):
            if x is not None:
                x.copy_(source)
        actual = run(case, late)
    stream.synchronize()
    if not same(actual, expected):
        raise AssertionError("kernels did not run on the current stream")


def check_no_synchronisation(case: Case) -> None:
    tensors = inputs(case)
    run(case, tensors)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(case, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # A call that waited for the GPU would return after the sleep.
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    done = torch.cuda.Event()
    run(case, tensors)
    done.record()
    if done.query():
        raise AssertionError("a call waited for the GPU")
    torch.cuda.synchronize()


def check_graph_capture(case: Case) -> None:
    tensors = inputs(case)
    expected = run(case, tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = run(case, tensors)
    graph.replay()
    torch.cuda.synchronize()
    if not same(actual, expected):
        raise AssertionError("a captured graph gives another result")


def check_device_guard(case: Case) -> None:
    """Tensors on the last GPU while the first is current; with one GPU, only that the current one stays."""
    last = torch.cuda.device_count() - 1
    torch.cuda.set_device(0)
    expected = run(case, inputs(case))
    actual = run(case, inputs(case, device=f"cuda:{last}"))
    if torch.cuda.current_device() != 0 or any(a.device.index != last for a in actual):
        raise AssertionError("the current device changed")
    if not same([a.cuda(0) for a in actual], expected):
        raise AssertionError("another GPU gives another result")


CHECKS = (check_current_stream, check_no_synchronisation, check_graph_capture, check_device_guard)


def checks(small: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    for case in cases():
        name = f"{case[0]} {case[2]}"
        if small:
            yield name, lambda c=case: run(c, inputs(c, torch.bfloat16))
            continue
        for check in CHECKS:
            yield f"{name} {check.__name__.removeprefix('check_')}", lambda c=case, f=check: f(c)


def profile() -> None:
    sample = Sample("ldv2", dict.fromkeys(("query", "key", "value"), (2, 256, 128, 128)),
                    {"kernel_size": 5, "dilation": 6, "num_heads": 8})  # fmt: skip
    case = ("local_attention", sample, "cuda")
    tensors = {k: x.contiguous(memory_format=torch.channels_last) for k, x in inputs(case, torch.bfloat16).items()}
    run(case, tensors)
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("FAIL cannot run: no GPU")
        return 1
    if args.profile:
        profile()
        return 0
    failed = 0
    for name, check in checks(args.small):
        try:
            check()
            torch.cuda.synchronize()
            print(f"ok   {name}", flush=True)
        except Exception as error:
            failed += 1
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
    print(f"{failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
