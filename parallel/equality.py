"""Whether copies on several ranks are equal bit for bit, by hashes of 64 bits.

    h(x) = Σ m_i (w_i xor (w_i >> 32)) mod 2^64        w_i: 8 bytes of x        m_i: odd, from the place i

Nothing is lost for one word, so every change of it, a flipped bit above all, changes h; changes of several go unseen by
chance alone. Without the shift, two flipped signs would cancel. Long tensors are hashed in parts: h ← h p + h_part with
an odd p.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch import distributed as dist

BYTES_AT_ONCE = 1 << 22
# Odd numbers with bits all over, as signed ones: 2^64 over the golden ratio, and a constant of MurmurHash3.
_LOWER_HALF = (1 << 32) - 1
_PLACES, _MIX = -7046029254386353131, -4417276706812531889


@dataclass(frozen=True)
class Difference:
    """A tensor whose copies differ, and the ranks that agree with one another, the largest party first."""

    name: str
    parties: tuple[tuple[int, ...], ...]


def fingerprint(tensor: Tensor) -> Tensor:
    """A hash of the bits of a tensor: int64, without dimensions, on its device."""
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    found = torch.zeros((), dtype=torch.int64, device=raw.device)
    factors = torch.empty(0, dtype=torch.int64, device=raw.device)
    for part in raw.split(BYTES_AT_ONCE):
        words = _words(part)
        if len(factors) < len(words):
            factors = _factors(len(words), raw.device)
        folded = words ^ ((words >> 32) & _LOWER_HALF)
        found = found * _MIX + (folded * factors[: len(words)]).sum()
    return found


def _words(part: Tensor) -> Tensor:
    """Bytes as int64, with zeros behind them where that is needed."""
    if part.numel() % 8 or part.storage_offset() % 8:
        padded = part.new_zeros(-(-part.numel() // 8) * 8)
        padded[: part.numel()] = part
        part = padded
    return part.view(torch.int64)


def _factors(count: int, device: torch.device) -> Tensor:
    places = torch.arange(1, count + 1, device=device) * _PLACES
    return ((places ^ (places >> 31)) * _MIX) | 1


def find_differences(tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> list[Difference]:
    """Of tensors that all ranks of a group hold, those whose bits are not the same everywhere. A collective of the
    group; every rank finds the same."""
    if not tensors or group.size() == 1:
        return []
    names = sorted(tensors)
    hashes = torch.stack([fingerprint(tensors[name]) for name in names])
    everywhere = [torch.empty_like(hashes) for _ in range(group.size())]
    dist.all_gather(everywhere, hashes, group=group)
    table = torch.stack(everywhere)
    if bool((table == table[0]).all()):
        return []
    by_name = zip(names, table.T.tolist(), strict=True)
    ranks = dist.get_process_group_ranks(group)
    return [Difference(name, parties(ranks, values)) for name, values in by_name if len(set(values)) > 1]


def parties(ranks: Sequence[int], values: Sequence[object]) -> tuple[tuple[int, ...], ...]:
    """Ranks by what they hold, the largest party first, of equal ones that of the lowest rank."""
    found: dict[object, list[int]] = {}
    for rank, value in zip(ranks, values, strict=True):
        found.setdefault(value, []).append(rank)
    return tuple(tuple(party) for party in sorted(found.values(), key=lambda party: (-len(party), party)))
