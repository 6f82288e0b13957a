"""Triton kernels for what is bound by memory on a GPU.

Each has the same result as a few lines of plain torch, which stay in the module that uses it, run everywhere else and
are what tests hold it against. Modules here import triton: they are imported where a tensor is on a GPU, or where
Triton's interpreter runs them on a CPU (TRITON_INTERPRET=1).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def skipping_launches(instead: Callable[[tuple[Any, ...]], None]) -> Iterator[None]:
    """Where tensors have no memory: hands the arguments of every kernel to `instead`, and launches nothing."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    launches: dict[Any, Any] = {kernel: kernel.run for kernel in (JITFunction, InterpretedFunction)}

    def skip(kernel: Any, *arguments: Any, **_: Any) -> None:
        instead(arguments)

    for kernel in launches:
        kernel.run = skip
    try:
        yield
    finally:
        for kernel, launch in launches.items():
            kernel.run = launch
