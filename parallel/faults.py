"""Which rank was the first with a value that is not finite: sums over ranks make it everybody's.

The local losses tell without any cost. Gradients are looked at one by one only when asked for, because that is a pass
over all of them.
"""

import json
import socket
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from parallel.launch import gather_texts


@dataclass(frozen=True)
class Fault:
    """What was not finite on a rank before anything was summed over ranks: its share of the `loss`, and the gradients
    of `parameters`, in the order in which a backward pass comes to them."""

    rank: int
    host: str
    loss: bool
    parameters: tuple[str, ...] = ()


class GradientWatch:
    """While it is entered, looks at the gradients of the parameters of this rank, if it is `active`. What a device
    holds is not read until `names`."""

    def __init__(self, module: nn.Module, *, active: bool) -> None:
        self._parameters = dict(module.named_parameters()) if active else {}
        self._bad: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def __enter__(self) -> "GradientWatch":
        # ZeRO 2 and 3 sum gradients over ranks as they come.
        self._hooks = [
            parameter.register_hook(partial(self._look, name)) for name, parameter in self._parameters.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        for name, parameter in self._parameters.items():
            marked: Any = parameter
            total = getattr(parameter, "main_grad", None)
            total = parameter.grad if total is None else None if marked.main_grad_is_old else total
            if total is not None:
                self._look(name, total)

    def _look(self, name: str, gradient: Tensor) -> None:
        bad = ~torch.isfinite(gradient.detach()).all()
        self._bad[name] = self._bad[name] | bad if name in self._bad else bad

    def names(self) -> tuple[str, ...]:
        """The parameters of which some gradient was not finite."""
        return tuple(name for name in reversed(self._parameters) if name in self._bad and bool(self._bad[name]))


def gather_faults(rank: int, losses: Tensor, watch: GradientWatch) -> list[Fault]:
    """The faults of all ranks that have one, known to all; `losses` are this rank's own. A collective of all ranks."""
    fault = Fault(rank, socket.gethostname(), not bool(losses.isfinite().all()), watch.names())
    found = [json.loads(text) for text in gather_texts(json.dumps(asdict(fault)))]
    faults = [Fault(**{**values, "parameters": tuple(values["parameters"])}) for values in found]
    return [fault for fault in faults if fault.loss or fault.parameters]
