"""Kernels run under Triton's interpreter where there is no GPU; that must be said before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
