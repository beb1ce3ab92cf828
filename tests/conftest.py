"""Set before triton is first imported: the interpreter is how Triton kernels run where there is no GPU."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
