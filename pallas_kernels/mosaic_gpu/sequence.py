"""Which tiles a warp reads."""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu.registers import I32, Bool, select


@dataclass(frozen=True)
class Sequence:
    """The tiles of one warp.

    Groups of tiles are dealt in turn to all warps of all splits of a row. What runs at the same
    time is then near in memory, and no warp has more than one group more than another, however
    long the row is.

    Attributes:
        first: number of the warp's first tile.
        count: how many it has.
        start: first token that is visible.
        stop: one past the last token that is visible.
        group: consecutive tiles that one warp reads.
        turn: tiles from a group of the warp to its next.
    """

    first: I32
    count: I32
    start: int
    stop: I32
    group: int
    turn: int

    @classmethod
    def of(
        cls, start: int, stop: I32, tile: int, *, worker: I32, workers: int, group: int
    ) -> "Sequence":
        """The tiles of one of many warps.

        Args:
            start: first token that is visible.
            stop: one past the last.
            tile: tokens of a tile.
            worker: number of the warp among all that read the row.
            workers: how many they are.
            group: consecutive tiles that one warp reads.
        """
        begin = start // (tile * group) * group
        # A row in which nothing is visible has no tiles.
        end = select(I32.constant(start).less(stop), stop, I32.constant(begin * tile))
        tiles = (end + (tile - 1)) // tile - begin
        mine, turn = worker * group, workers * group
        rest = tiles % turn - mine
        count = tiles // turn * group + rest.maximum(0).minimum(group)
        return cls(mine + begin, count, start, stop, group, turn)

    def at(self, index: I32) -> I32:
        """Number of the warp's tile of this index."""
        if self.group == 1:
            return self.first + index * self.turn
        return self.first + index // self.group * self.turn + index % self.group

    def visible(self, token: I32) -> Bool:
        """Whether a token of a tile is visible."""
        return I32.constant(self.start - 1).less(token) & token.less(self.stop)
