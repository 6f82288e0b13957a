"""Triton kernels for what is bound by memory on a GPU.

Each has the same result as a few lines of plain torch, which stay in the module that uses it, run everywhere else and
are what tests hold it against. Modules here import triton: they are imported where a tensor is on a GPU, or where
Triton's interpreter runs them on a CPU (TRITON_INTERPRET=1).
"""
