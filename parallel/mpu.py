"""The mesh in the words of Megatron's "model parallel unit", which DeepSpeed asks for groups and places."""

from typing import Any

from parallel.mesh import Mesh


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
