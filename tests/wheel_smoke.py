"""Run by `make wheel-check` from outside the checkout: does the installed wheel compute, backward included?"""

import sys
from pathlib import Path

import torch

import segops

assert Path(segops.__file__).is_relative_to(sys.prefix), f"imported the checkout, not the wheel: {segops.__file__}"
print(segops.info())

tensors = [x.requires_grad_() for x in torch.randn(3, 1, 8, 9, 11, dtype=torch.float64).unbind()]
results = {}
for backend in ("cpu", "reference"):
    with segops.use_backend(backend):
        out = segops.local_attention(*tensors, kernel_size=5, dilation=3, num_heads=2)
        results[backend] = (out, *torch.autograd.grad(out.square().sum(), tensors))
for fused, plain in zip(results["cpu"], results["reference"], strict=True):
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
half = segops.local_attention(*(x.bfloat16() for x in tensors), kernel_size=5)
assert half.dtype == torch.bfloat16
assert half.isfinite().all()
learned = segops.dupsampling.fit([torch.arange(60).view(6, 10) // 15], num_classes=4, scale_factor=2, channels=16)
assert segops.dupsampling.reconstruct([torch.arange(60).view(6, 10) // 15], learned).scores[16].miou == 1
print(f"wheel smoke test passed on torch {torch.__version__}")
