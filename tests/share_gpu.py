"""`torchrun --nproc-per-node N share_gpu.py -m MODULE ...`, or `SCRIPT ...`: its ranks share the first GPU and speak
through gloo, as NCCL gives each one of its own."""

import os
import runpy
import sys
from typing import Any

from torch import distributed as dist


def main() -> None:
    # DeepSpeed computes on the GPU of this number.
    os.environ["LOCAL_RANK"] = "0"
    join = dist.init_process_group

    def join_through_gloo(_: str, **settings: Any) -> None:
        join("gloo", **settings)

    dist.init_process_group = join_through_gloo
    del sys.argv[0]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
