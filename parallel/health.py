"""Looks at all ranks before the first step, so that a machine that is not like the others, or computes wrongly, is
named at once and not by a loss that is a little off after a week.

Every rank finds out about itself; then all of them judge the same list, so that they agree without another word.
"""

import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
from torch import Tensor
from torch import distributed as dist

from parallel.dispatch import Hop
from parallel.equality import fingerprint
from parallel.launch import Place, gather_texts
from parallel.mesh import Mesh
from parallel.rows import Members
from parallel.tape import Flight
from parallel.transfer import Carrier, Traffic

MAX_CLOCK_SKEW_S = 30.0
_SIZE, _TRANSFERS = 256, 4


@dataclass(frozen=True)
class Facts:
    """What a rank knows about itself: whether products came out `exact` and twice the same (`repeats`), what the
    `bits` of others were; the mesh's groups in which a sum over ranks was wrong; what brought other rows than were sent
    (`wrong_carriers`); the versions of imported packages; free bytes where checkpoints go."""

    rank: int
    host: str
    device: str
    exact: bool
    repeats: bool
    bits: int
    wrong_groups: tuple[str, ...]
    wrong_carriers: tuple[str, ...]
    clock: float
    versions: Mapping[str, str]
    config: str
    free_bytes: int


@dataclass(frozen=True)
class Finding:
    """A rank that must not take part, and why."""

    rank: int
    host: str
    what: str


def collect_facts(
    place: Place, mesh: Mesh, hops: Sequence[Hop], *, dtype: torch.dtype, config: str, free_bytes: int
) -> list[Facts]:
    """The facts of all ranks, known to all, who bring rows to experts over `hops`; `config` stands for what all must
    have been given alike. A collective of all ranks."""
    first, second = probe(place.device, dtype), probe(place.device, dtype)
    wrong_groups, wrong_carriers = tuple(_wrong_groups(mesh, place.device)), tuple(_wrong_carriers(hops, place.device))
    dist.barrier()
    facts = Facts(
        rank=place.rank,
        host=socket.gethostname(),
        device=_device_kind(place.device),
        exact=is_exact(place.device, dtype),
        repeats=first == second,
        bits=first,
        wrong_groups=wrong_groups,
        wrong_carriers=wrong_carriers,
        clock=time.time(),
        versions=_versions(),
        config=config,
        free_bytes=free_bytes,
    )
    return [_read(json.loads(text)) for text in gather_texts(json.dumps(asdict(facts)))]


def judge_health(facts: Sequence[Facts]) -> list[Finding]:
    """The ranks that must not take part. Where ranks must agree and no majority does, all are named."""
    return [Finding(fact.rank, fact.host, what) for fact, what in _complaints(facts)]


def minority(facts: Sequence[Facts], value_of: Callable[[Facts], Hashable]) -> tuple[list[Facts], object]:
    """Those without the value that more than half have, and that value; all of them if there is none."""
    counts = Counter(value_of(fact) for fact in facts)
    if len(counts) < 2:
        return [], None
    value, count = counts.most_common(1)[0]
    if 2 * count <= len(facts):
        return list(facts), None
    return [fact for fact in facts if value_of(fact) != value], value


def _complaints(facts: Sequence[Facts]) -> Iterator[tuple[Facts, str]]:
    middle = sorted(fact.clock for fact in facts)[len(facts) // 2]
    for fact in facts:
        if fact.wrong_groups:
            yield fact, f"a sum over its {', '.join(fact.wrong_groups)} ranks came out wrong"
        for name in fact.wrong_carriers:
            yield fact, f"{name} bring it other rows than were sent"
        if not fact.exact:
            yield fact, f"products of whole numbers come out wrong on its {fact.device}"
        if not fact.repeats:
            yield fact, f"the same product gives other bits when repeated on its {fact.device}"
        if abs(fact.clock - middle) > MAX_CLOCK_SKEW_S:
            yield fact, f"its clock is {fact.clock - middle:+.0f} s off, more than {MAX_CLOCK_SKEW_S:g} s"
    for device in sorted({fact.device for fact in facts}):
        alike = [fact for fact in facts if fact.device == device]
        for fact in minority(alike, lambda fact: fact.bits)[0]:
            yield fact, f"the same product gives other bits on its {device} than on those of others"
    for package in sorted({package for fact in facts for package in fact.versions}):
        having = [fact for fact in facts if package in fact.versions]
        others, usual = minority(having, lambda fact, package=package: fact.versions[package])  # type: ignore[misc]
        for fact in others:
            than = f", where most have {usual}" if usual else ", and others another"
            yield fact, f"it has {package} {fact.versions[package]}{than}"


def probe(device: torch.device, dtype: torch.dtype) -> int:
    """A hash of a product of random matrices and of sums over it. The same kind of device gives the same bits."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(_SIZE, _SIZE, generator=generator).to(device, dtype) for _ in range(2))
    product = a @ b
    return int(fingerprint(torch.cat((product.float().flatten(), product.float().softmax(-1).sum(0)))))


def is_exact(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product of -1, 0 and 1 is what whole numbers give: every sum on the way fits into 8 bits."""
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randint(-1, 2, (_SIZE, _SIZE), generator=generator) for _ in range(2))
    expected = (a @ b).to(dtype)
    return torch.equal((a.to(device, dtype) @ b.to(device, dtype)).cpu(), expected)


def _wrong_groups(mesh: Mesh, device: torch.device) -> list[str]:
    """The groups in which the ranks, counted from 1, do not sum up to what they should."""
    groups = {item.name: getattr(mesh, item.name) for item in fields(mesh)}
    groups = {name: group for name, group in groups.items() if isinstance(group, dist.ProcessGroup)}
    sums: dict[str, Tensor] = {}
    for name, group in groups.items():
        if group.size() > 1:
            sums[name] = torch.full((), mesh.rank + 1, dtype=torch.int64, device=device)
            dist.all_reduce(sums[name], group=group)
    expected = {name: sum(dist.get_process_group_ranks(groups[name])) + groups[name].size() for name in sums}
    return [name for name, value in sums.items() if int(value) != expected[name]]


def _wrong_carriers(hops: Sequence[Hop], device: torch.device) -> list[str]:
    """What brings other rows than the ranks of a hop send one another."""
    wrong = [carrier.name for hop in hops for carrier in hop.carriers if not _brings_rows(carrier, hop.members, device)]
    return list(dict.fromkeys(wrong))


def _brings_rows(carrier: Carrier, members: Members, device: torch.device) -> bool:
    """Whether what arrives is what was sent: some times a row from each member to each."""
    number, place = members.number, members.place
    others = [member for member in range(number) if member != place]
    traffic, order = Traffic([[1] * number] * number, place), torch.tensor([place, *others], device=device)
    flights, expected = list[Flight](), list[Tensor]()
    for transfer in range(_TRANSFERS):
        values = torch.arange(_SIZE, device=device) + transfer * number * number
        flights.append(carrier.launch(traffic, [(place * number + order).unsqueeze(1) + values]))
        expected.append((order * number + place).unsqueeze(1) + values)
    arrived = [flight.wait()[0] for flight in flights]
    return all(map(torch.equal, arrived, expected))


def _device_kind(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "CPU")
    except OSError:
        name = "CPU"
    return f"{name} with {torch.get_num_threads()} threads"


def _versions() -> dict[str, str]:
    """Of Python and of all packages that are imported."""
    imported = {name: vars(module).get("__version__") for name, module in sys.modules.items() if "." not in name}
    found = {name: str(version) for name, version in imported.items() if isinstance(version, str)}
    return {**found, "python": ".".join(map(str, sys.version_info[:3]))}


def _read(value: dict[str, object]) -> Facts:
    lists = {name: tuple(each) for name, each in value.items() if isinstance(each, list)}
    return Facts(**{**value, **lists})  # type: ignore[arg-type]
