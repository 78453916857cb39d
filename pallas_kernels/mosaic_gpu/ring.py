"""A warp's tiles on their way through a ring in shared memory, several ahead of their use."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.registers import I32, Register, loop, select, when


@dataclass(frozen=True)
class Ring:
    """The ring of one warp, which shares it with no other.

    Attributes:
        address: of the ring in shared memory.
        stages: tiles that it holds, at least 2.
        tile_bytes: of each.
        count: tiles that the warp reads.
        copy: begins to copy the tile of an index to an address; every lane calls it.
    """

    address: I32
    stages: int
    tile_bytes: int
    count: I32
    copy: Callable[[I32, I32], None]

    def start(self) -> None:
        """Begins to copy the first tiles."""
        for stage in range(self.stages - 1):
            self._copy(I32.constant(stage), self.address + stage * self.tile_bytes)

    def run(
        self,
        carry: Sequence[Register],
        consume: Callable[[I32, I32, list[Any]], Sequence[Register]],
    ) -> list[Any]:
        """`carry = consume(index, address, carry)` for every tile in turn, after `start`."""
        size = self.stages * self.tile_bytes

        def step(index: I32, carry: list[Any]) -> list[Any]:
            place, *rest = carry
            ptx.wait_for_copies(self.stages - 2)
            # Every lane has now read the tile before, whose place the next copy takes.
            ptx.warp_barrier()
            before = place + (size - self.tile_bytes)
            free = select(before.less(size), before, before - size)
            self._copy(index + (self.stages - 1), self.address + free)
            result = consume(index, self.address + place, rest)
            after = place + self.tile_bytes
            return [select(after.less(size), after, I32.constant(0)), *result]

        _, *result = loop(I32.constant(0), self.count, 1, [I32.constant(0), *carry], step)
        ptx.wait_for_copies(0)
        return result

    def _copy(self, index: I32, target: I32) -> None:
        when(index.less(self.count), lambda: self.copy(index, target))
        ptx.commit_copies()
