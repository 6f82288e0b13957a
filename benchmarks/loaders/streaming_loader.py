"""mosaicml-streaming's side of loader_speed.py: fixed-size samples in MDS shards, shuffled by StreamingDataset."""

import json
import sys
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from typing import Any

import numpy as np
import torch
from timing import time_batches
from torch.utils.data import DataLoader


def stand_in(name: str, attribute: str) -> None:
    """Takes the place of a module of torchvision, which only image datasets need and no CPU build of torch can load."""
    sys.modules[name] = module_from_spec(ModuleSpec(name, None))
    setattr(sys.modules[name], attribute, type(attribute, (), {}))


stand_in("torchvision", "datasets")
stand_in("torchvision.datasets", "VisionDataset")
stand_in("torchvision.transforms", "functional")
stand_in("torchvision.transforms.functional", "to_tensor")

from streaming import MDSWriter, StreamingDataset  # noqa: E402
from streaming.base.util import clean_stale_shared_memory  # noqa: E402


def prepare(source: str, folder: str, seq_len: int) -> None:
    """Writes the concatenated documents, cut into samples, without compression."""
    tokens = np.load(f"{source}/tokens.npy")
    width = seq_len + 1
    with MDSWriter(out=folder, columns={"tokens": f"ndarray:uint16:{width}"}) as out:
        for row in tokens[: len(tokens) // width * width].reshape(-1, width):
            out.write({"tokens": row})


def measure(request: dict[str, Any]) -> float:
    """Tokens a second of shuffled samples."""
    clean_stale_shared_memory()
    dataset = StreamingDataset(local=request["folder"], shuffle=True, batch_size=request["batch_size"])
    loader = DataLoader(dataset, request["batch_size"], num_workers=request["workers"], drop_last=True)
    return time_batches(
        lambda: (batch["tokens"] for batch in loader),
        request["seq_len"],
        request["seconds"],
        getattr(torch, request["dtype"]),
    )


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    if request["do"] == "prepare":
        prepare(request["source"], request["folder"], request["seq_len"])
    else:
        print(measure(request))
