"""Where the tiles of rows lie that are ordered by expert, when every expert begins a new tile."""

import triton
import triton.language as tl


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
