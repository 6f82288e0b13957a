"""Where the tiles of rows lie that are ordered by expert, when every expert begins a new tile."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def tile_table(counts: Tensor, num_tiles: int, size: int) -> Tensor:
    """What `find_tile` finds of the first `num_tiles` tiles of `size` rows, [num_tiles, 3] int32: expert, first row,
    end of the expert's rows. Kernels with several programs a tile look it up."""
    table = torch.empty(num_tiles, 3, dtype=torch.int32, device=counts.device)
    block = triton.next_power_of_2(len(counts))
    _table_kernel[(num_tiles,)](counts, table, EXPERTS=len(counts), EXPERTS_BLOCK=block, TILE=size, num_warps=1)
    return table


@triton.jit
def _table_kernel(
    counts: tl.tensor, table: tl.tensor, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, TILE: tl.constexpr
) -> None:  # fmt: skip
    tile = tl.program_id(0)
    expert, begin, end, _ = find_tile(counts, tile, EXPERTS, EXPERTS_BLOCK, TILE)
    tl.store(table + 3 * tile, expert)
    tl.store(table + 3 * tile + 1, begin)
    tl.store(table + 3 * tile + 2, end)


@triton.jit
def find_tile(
    counts: tl.tensor, tile: tl.tensor, EXPERTS: tl.constexpr, EXPERTS_BLOCK: tl.constexpr, TILE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of a tile of `TILE` rows, among those of experts with `counts` [E] rows: its expert (E if there is no such tile),
    its first row, the end of that expert's rows, and the row that would be the expert's first if all tiles were full.
    """
    number = tl.arange(0, EXPERTS_BLOCK)
    rows = tl.load(counts + number, mask=number < EXPERTS, other=0).to(tl.int32)
    tiles = tl.cdiv(rows, TILE)
    ends = tl.cumsum(tiles)
    expert = tl.sum(((ends <= tile) & (number < EXPERTS)).to(tl.int32))
    before = number < expert
    first_row, first_tile = tl.sum(tl.where(before, rows, 0)), tl.sum(tl.where(before, tiles, 0))
    own_rows = tl.sum(tl.where(number == expert, rows, 0))
    return expert, first_row + (tile - first_tile) * TILE, first_row + own_rows, first_tile * TILE
