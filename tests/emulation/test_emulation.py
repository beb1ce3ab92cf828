"""The emulator can fail: what it is there to notice, it notices."""

from __future__ import annotations

import contextlib
import itertools
import os
import re

import pytest
import torch

from . import build

BARRIERS = [
    (source.stem, i)
    for source in sorted((build.ROOT / "csrc" / "cuda").glob("*.cu"))
    for i, line in enumerate(source.read_text().splitlines(), 1)
    if re.match(r"\s*__syncthreads\(\);", line)
]
ORDERS = {"forward": 0, "reverse": 1, "shuffled": 2}
BORDERS = ("zero", "mask", "shift")


@pytest.fixture(scope="module", autouse=True)
def ops():
    try:
        build.load()
    except build.Unavailable as error:
        if "cuda-emulated" in os.environ.get("SEGOPS_REQUIRE", "").split(","):
            pytest.fail(f"cuda-emulated is required (SEGOPS_REQUIRE) and cannot run: {error}")
        pytest.skip(str(error))
    return torch.ops.segops_emulated


@contextlib.contextmanager
def scheduled(ops, order="forward", seed=0, reverse_blocks=False, without_barrier=0):
    ops.schedule(ORDERS[order], seed, reverse_blocks)
    ops.drop_barrier(without_barrier)
    try:
        yield
    finally:
        ops.schedule(0, 0, False)
        ops.drop_barrier(0)


def local_attention(ops, shape, kernel_size, dilation, num_heads, border, dtype=torch.float32, layout="contiguous"):
    """Output, log-sum-exp and all gradients on fixed random inputs."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad_out = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(4)
    )
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    lse = torch.full((shape[0], num_heads, *shape[2:]), torch.nan, dtype=statistic)
    grad_lse = torch.randn(lse.shape, generator=generator, dtype=statistic)
    out, *gradients = (torch.full_like(query, torch.nan) for _ in range(4))
    window = list(kernel_size), list(dilation), num_heads, 0.3, BORDERS.index(border)
    ops.local_attention(out, lse, query, key, value, *window)
    ops.local_attention_backward(*gradients, grad_out, grad_lse, query, key, value, out, lse, *window)
    return [out, lse, *gradients]


def guarded(like):
    """NaN of a tensor's layout, in memory that goes on around it: a kernel without its barrier may write there."""
    memory = torch.full((like.numel() + 128,), torch.nan, dtype=like.dtype)
    return memory.as_strided(like.shape, like.stride(), 64)


def rearrange(ops, shape, scale_factor, size, classes, dtype=torch.float32, layout="contiguous", temperature=None):
    """Output of ``dupsample_rearrange`` and of its backward on fixed random inputs."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(shape[0], scale_factor**2 * classes, shape[1] * shape[2], generator=generator).to(dtype)
    bias = torch.randn(columns.shape[1], generator=generator).to(dtype)
    grad_out = torch.randn(shape[0], classes, *size, generator=generator).to(dtype)
    grad_out = grad_out.contiguous(memory_format=memory_format)
    statistic = torch.float64 if dtype == torch.float64 else torch.float32
    temperature = None if temperature is None else torch.tensor([temperature], dtype=statistic)
    out, grad_columns = guarded(grad_out), guarded(columns)
    ops.dupsample_rearrange(out, columns, bias, temperature, scale_factor)
    ops.dupsample_rearrange_backward(grad_columns, grad_out, temperature, scale_factor)
    return [out, grad_columns]


def strips(ops, shape, kernel_size, lengths, dtype=torch.float32, layout="contiguous"):
    """Output of ``multi_scale_strip_conv`` and all gradients on fixed random inputs."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    generator = torch.Generator().manual_seed(0)
    x, grad_out, scaled, scale = (
        torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format) for _ in range(4)
    )
    count = kernel_size[0] * kernel_size[1] + 2 * sum(lengths)
    taps = torch.randn(shape[1], count, generator=generator).to(dtype)
    biases = torch.randn(shape[1], 1 + 2 * len(lengths), generator=generator).to(dtype)
    out, grad_x, grad_taps, grad_biases = (torch.full_like(like, torch.nan) for like in (x, x, taps, biases))
    windows = list(kernel_size), list(lengths)
    ops.multi_scale_strip_conv(out, x, taps, biases, *windows)
    gradients = grad_x, grad_taps, grad_biases
    ops.multi_scale_strip_conv_backward(*gradients, grad_out, x, taps, biases, scaled, scale, *windows)
    return [out, *gradients]


def sums_by_class(ops, shape, classes, per_image, dtype=torch.float32, layout="contiguous"):
    """Sums and counts of ``class_centers``, and the gradient of its backward, on fixed random inputs."""
    memory_format = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}[layout]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype).contiguous(memory_format=memory_format)
    labels = torch.randint(classes + 1, (shape[0], *shape[2:]), generator=generator, dtype=torch.int16)
    groups = (shape[0], classes) if per_image else (classes,)
    sums = torch.full((*groups, shape[1]), torch.nan, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    counts, grad = torch.full(groups, -1), torch.full_like(x, torch.nan)
    ops.class_centers(sums, counts, x, labels, 255)
    ops.class_centers_backward(grad, sums, labels, 255)
    return [sums, counts, grad]


# Between them: several tiles per axis, 1 to 16 threads per strip, windows in one and in several blocks, each border.
CALLS = {
    "several_tiles": (local_attention, (1, 16, 30, 61), (5, 5), (1, 1), 1, "zero", torch.bfloat16, "channels_last"),
    "rows_of_pixels": (local_attention, (2, 8, 9, 40), (5, 5), (2, 3), 2, "mask", torch.float16, "contiguous"),
    "pushed_windows": (local_attention, (1, 24, 12, 16), (5, 5), (2, 3), 1, "shift", torch.float32, "channels_last"),
    "groups_of_phases": (local_attention, (1, 3, 9, 40), (5, 5), (3, 17), 1, "zero", torch.float32, "contiguous"),
    "window_in_blocks": (local_attention, (1, 20, 9, 14), (7, 3), (1, 2), 2, "shift", torch.float32, "contiguous"),
    "float64": (local_attention, (1, 6, 7, 9), (5, 3), (2, 1), 1, "mask", torch.float64, "contiguous"),
    "pixels_fastest": (rearrange, (1, 3, 15), 8, (24, 113), 3, torch.bfloat16, "contiguous", -0.7),
    "classes_fastest": (rearrange, (2, 4, 8), 4, (14, 32), 21, torch.float32, "channels_last"),
    "odd_strides": (rearrange, (1, 5, 7), 3, (14, 20), 5, torch.float64, "contiguous", 2.0),
    "classes_of_images": (sums_by_class, (2, 67, 7, 11), 5, True, torch.float32, "contiguous"),
    "classes_in_spans": (sums_by_class, (2, 6, 33, 35), 300, False, torch.bfloat16, "channels_last"),
    "classes_in_float64": (sums_by_class, (1, 3, 5, 8), 140, False, torch.float64, "contiguous"),
    "strips_in_tiles": (strips, (1, 2, 21, 70), (5, 5), (7, 11), torch.float32, "contiguous"),
    "strips_of_one_tile": (strips, (2, 3, 7, 9), (3, 5), (3, 5, 9), torch.bfloat16, "channels_last"),
}
# Those whose kernels every barrier is taken out of.
WITHOUT_BARRIER = {
    "local_attention": ("pushed_windows", "several_tiles"),
    "class_centers": ("classes_of_images", "classes_in_spans"),
    "dupsample": ("pixels_fastest", "classes_fastest"),
    "multi_scale_strip_conv": ("strips_of_one_tile", "strips_in_tiles"),
}


def run(ops, name):
    function, *arguments = CALLS[name]
    return function(ops, *arguments)


@pytest.fixture(scope="module")
def expected(ops):
    return {name: run(ops, name) for name in CALLS}


@pytest.mark.parametrize("name", CALLS)
def test_orders_of_threads_and_blocks_agree_bit_for_bit(ops, expected, name):
    assert not any(tensor.isnan().any() for tensor in expected[name])
    for order, reverse_blocks in itertools.product(ORDERS, (False, True)):
        with scheduled(ops, order, seed=17, reverse_blocks=reverse_blocks):
            actual = run(ops, name)
        for a, b in zip(actual, expected[name], strict=True):
            assert torch.equal(a, b), (order, reverse_blocks)


@pytest.mark.parametrize(("source", "line"), BARRIERS)
def test_no_barrier_can_be_taken_out(ops, expected, source, line):
    """Each __syncthreads() of the kernels in turn: without it, some order of threads gives another result or NaN."""
    for name, order in itertools.product(WITHOUT_BARRIER[source], ORDERS):
        with scheduled(ops, order, seed=3, without_barrier=line):
            actual = run(ops, name)
        if not all(torch.equal(a, b) for a, b in zip(actual, expected[name], strict=True)):
            return
    pytest.fail(f"{source}.cu:{line} is not needed, or its lack is not seen")


def test_the_kernels_have_barriers():
    assert {source for source, _ in BARRIERS} == set(WITHOUT_BARRIER)
    assert len(BARRIERS) >= 8


@pytest.mark.parametrize(
    ("grid", "block", "shared", "message"),
    [
        ((1, 65536, 1), (32, 1, 1), 0, "grid of 1 x 65536 x 1"),
        ((1, 1, 65536), (32, 1, 1), 0, "grid of 1 x 1 x 65536"),
        ((1, 1, 1), (1056, 1, 1), 0, "a block has 1056 threads"),
        ((1, 1, 1), (33, 1, 1), 0, "a block has 33 threads"),
        ((1, 1, 1), (32, 1, 1), (99 << 10) + 1, "bytes of shared memory"),
    ],
)
def test_launch_limits(ops, grid, block, shared, message):
    with pytest.raises(RuntimeError, match=message):
        ops.probe_limits(torch.zeros(1), list(grid), list(block), shared)


def test_a_launch_within_limits_runs_and_an_empty_one_is_none(ops):
    ops.probe_limits(torch.zeros(1), [3, 2, 2], [32, 4, 8], 99 << 10)
    ops.probe_limits(torch.zeros(1), [0, 1, 1], [32, 1, 1], 0)


def test_vector_loads_assert_alignment(ops):
    x = torch.zeros(64)
    ops.probe_alignment(x, 4)
    with pytest.raises(RuntimeError, match="multiple of 16"):
        ops.probe_alignment(x, 1)


def test_a_barrier_that_one_thread_skips_is_an_error(ops):
    ops.probe_barrier(torch.zeros(1), False)
    with pytest.raises(RuntimeError, match="not all threads reach"):
        ops.probe_barrier(torch.zeros(1), True)


def test_shared_memory_is_poisoned_for_every_block(ops):
    seen = torch.zeros(3, 32)
    ops.probe_shared(seen)
    assert seen.isnan().all()


def test_a_write_past_shared_memory_is_an_error(ops):
    with pytest.raises(RuntimeError, match="past shared memory"):
        ops.probe_overrun(torch.zeros(1), 256)
