"""`torchrun --nproc-per-node N peer_copies_ranks.py`: what `parallel.peer_copies` brings is what was sent. Where there
are fewer GPUs ranks share them."""

import os
import random
import sys
from itertools import product

import torch
from torch import Tensor
from torch import distributed as dist

from model.experts import RoutedRows
from model.packing import decode_rows, encode_rows
from parallel.clock import Clock
from parallel.dispatch import Dispatcher, Hop
from parallel.peer_copies import PeerCopies
from parallel.tape import Flight, Tape, run_in_turns, run_to_end
from parallel.transfer import Traffic

WIDTH, NUM_EXPERTS, TOKENS, CHOICES = 160, 12, 700, 3
FLIGHTS, TRANSFERS = 3, 60
SLEEP_CYCLES = 2_000_000
"""By which a rank's GPU is late: some others would take rows before they are there, if they did not wait."""


def main() -> None:
    place, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", place % torch.cuda.device_count())
    torch.cuda.set_device(device)
    dist.init_process_group("gloo")
    group, _ = dist.new_subgroups_by_enumeration([list(range(size))])
    if "fault" in sys.argv:
        PeerCopies._wait = lambda *_: None
    carrier = PeerCopies(group, device)
    bring_rows(carrier, place, size, device)
    carrier.close()
    travel(group, place, size, device)
    print(f"rank {place}: all as sent", flush=True)
    dist.barrier()
    dist.destroy_process_group()


def bring_rows(carrier: PeerCopies, place: int, size: int, device: torch.device) -> None:
    """Several transfers at once, of random sizes that grow, on ranks that are late by turns."""
    chance, flights = random.Random(0), list[tuple[Flight, Traffic, int]]()
    for number in range(TRANSFERS):
        most = chance.choice((0, 1, 40, 40 * number))
        traffic = Traffic([[chance.randint(0, most) for _ in range(size)] for _ in range(size)], place)
        if chance.randrange(size) == place and device.type == "cuda":
            torch.cuda._sleep(SLEEP_CYCLES)
        order = [place, *(member for member in range(size) if member != place)]
        sent = [rows(number, place, member, traffic.rows[place][member], device) for member in order]
        flights.append((carrier.launch(traffic, tuple(map(torch.cat, zip(*sent, strict=True)))), traffic, number))
        if len(flights) == FLIGHTS:
            check(*flights.pop(0), place, device)
    for flight in flights:
        check(*flight, place, device)


def rows(number: int, start: int, end: int, count: int, device: torch.device) -> tuple[Tensor, ...]:
    """What the rows of a transfer between two ranks are: of several dtypes and widths, other than in any other."""
    seed = 1 + (number * 31 + start) * 31 + end
    tall = torch.arange(count, device=device).unsqueeze(1) * 7 + seed
    wide = tall + torch.arange(WIDTH, device=device)
    return (wide % 251).bfloat16(), tall.float() / 3, tall.expand(-1, CHOICES), (wide % 256).byte()[:, :101]


def check(flight: Flight, traffic: Traffic, number: int, place: int, device: torch.device) -> None:
    order = [place, *(member for member in range(len(traffic.rows)) if member != place)]
    expected = [rows(number, member, place, traffic.rows[member][place], device) for member in order]
    for arrived, parts in zip(flight.wait(), zip(*expected, strict=True), strict=True):
        assert torch.equal(arrived, torch.cat(parts)), f"transfer {number} brought other rows"


def travel(group: dist.ProcessGroup, place: int, size: int, device: torch.device) -> None:
    """To experts on all ranks of a node, in one round and in several."""
    hops = [Hop(group, NUM_EXPERTS // size, PeerCopies(group, device), PeerCopies(group, device))]
    for fp8, skewed, max_rows in product((False, True), (False, True), (0, 600)):
        travel_over(hops, group, place, size, device, fp8=fp8, skewed=skewed, max_rows=max_rows)
    Dispatcher(hops, group=group, clock=Clock(device)).close()


def travel_over(
    hops: list[Hop],
    group: dist.ProcessGroup,
    place: int,
    size: int,
    device: torch.device,
    *,
    fp8: bool = False,
    skewed: bool = False,
    max_rows: int = 0,
) -> None:
    """Passes in turns to experts that multiply by their number + 1, so that what should come back is known."""
    dispatcher = Dispatcher(hops, group=group, clock=Clock(device), fp8=fp8, max_rows=max_rows)
    passes = [Pass(dispatcher, 10 * place + number, place, size, skewed, device) for number in range(3)]
    run_to_end(passes[0].forward())
    run_in_turns(passes[0].backward(), passes[1].forward())
    run_in_turns(passes[1].backward(), passes[2].forward())
    run_to_end(passes[2].backward())
    for each in passes:
        each.check(fp8)


class Pass:
    """One micro-batch there and back, and its gradients."""

    def __init__(self, dispatcher: Dispatcher, seed: int, place: int, size: int, skewed: bool, device: torch.device):
        generator = torch.Generator().manual_seed(seed)
        self.dispatcher, self.first, self.tape = dispatcher, place * (NUM_EXPERTS // size), Tape()
        x = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16().float()
        self.x = x.to(device).requires_grad_()
        self.weights = torch.rand(TOKENS, CHOICES, generator=generator).to(device).requires_grad_()
        scores = torch.rand(TOKENS, NUM_EXPERTS, generator=generator)
        if skewed:
            scores[:, -CHOICES:] += 1
        self.chosen = scores.argsort(-1, descending=True)[:, :CHOICES].to(device)

    def experts(self, routed: RoutedRows) -> Tensor:
        factors = torch.where(routed.experts >= 0, routed.weights * (routed.experts + self.first + 1), 0.0)
        return routed.rows * factors.sum(1, keepdim=True)

    def forward(self):
        routed = RoutedRows(self.x, self.chosen, self.weights)
        announced = self.dispatcher.announce(self.chosen)
        out = yield from self.dispatcher.run(self.tape, routed, announced, self.experts, self.experts, lambda *_: None)
        (self.out,) = self.tape.cut(out)
        self.out.grad = torch.ones_like(self.out)

    def backward(self):
        yield from self.tape.backward()

    def check(self, fp8: bool) -> None:
        x = self.x.detach()
        seen = decode_rows(encode_rows(x), WIDTH) if fp8 else x
        factors = (self.weights * (self.chosen + 1)).sum(1, keepdim=True).detach()
        torch.testing.assert_close(self.out.detach(), seen * factors)
        torch.testing.assert_close(self.x.grad, factors.expand_as(x))
        # Sums over a row, of which some nearly cancel.
        torch.testing.assert_close(
            self.weights.grad, seen.sum(1, keepdim=True) * (self.chosen + 1), atol=1e-4, rtol=1e-4
        )


if __name__ == "__main__":
    main()
