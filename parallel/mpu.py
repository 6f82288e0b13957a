"""What DeepSpeed is told: its settings, and the mesh in the words of Megatron's "model parallel unit", which it asks
for groups and places."""

from typing import Any

import torch

from parallel.mesh import Mesh
from parallel.optimizer import OptimizerConfig, ZeroConfig


class Mpu:
    """What DeepSpeed asks about the layout. Layers are divided, tensors are not: a "model parallel" group is a
    pipeline, or the half of it that holds the whole model."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> Any:
        return self._mesh.replicas

    def get_data_parallel_rank(self) -> int:
        return int(self._mesh.replicas.rank())

    def get_data_parallel_world_size(self) -> int:
        return int(self._mesh.replicas.size())

    def get_model_parallel_group(self) -> Any:
        return self._mesh.model

    def get_model_parallel_rank(self) -> int:
        return int(self._mesh.model.rank())

    def get_model_parallel_world_size(self) -> int:
        return int(self._mesh.model.size())

    def get_tensor_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        return 1

    get_pipeline_model_parallel_group = get_model_parallel_group
    get_pipeline_model_parallel_rank = get_model_parallel_rank
    get_pipeline_model_parallel_world_size = get_model_parallel_world_size


def settings(
    config: OptimizerConfig, zero: ZeroConfig, dtype: torch.dtype, micro_batch_size: int, bucket_elements: int
) -> dict[str, Any]:
    """DeepSpeed's configuration; it communicates `bucket_elements` at a time."""
    return {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": config.clip,
        "steps_per_print": None,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": zero.stage,
            "offload_optimizer": {"device": zero.offload, "pin_memory": torch.cuda.is_available()},
            "overlap_comm": False,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
        },
    }
