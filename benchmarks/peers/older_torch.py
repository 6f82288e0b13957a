"""Imported before torchtitan 0.3.0: gives torch 2.11 two names that torchtitan imports for FSDP and, on one GPU without
it, never uses."""

import torch.distributed.fsdp as fsdp
import torch.distributed.fsdp._fully_shard._fsdp_common as common

for _module, _name in ((fsdp, "DataParallelMeshDims"), (common, "ShardPlacementResult")):
    if not hasattr(_module, _name):
        setattr(_module, _name, object)
