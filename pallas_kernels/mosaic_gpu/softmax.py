"""The running softmax of a warp."""

from dataclasses import dataclass, replace
from typing import Any

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.registers import F32, I32, select

LOG2_E = 1.4426950408889634
"""Turns natural logits into those of powers of two."""
LOG_2 = 0.6931471805599453
"""Turns logarithms to base 2 into natural ones."""
EXCESS = 5.0
"""How far, in units of log 2, a logit may exceed the reference before it is raised."""
LARGEST_SCALE = 1024.0
"""How large a scale of values may become before they are normalised anew."""
# 2^5 · 2^10 is below the largest float16.
_NEVER_SCALED = 2.0**110


@dataclass(frozen=True)
class Softmax:
    """What a warp has seen so far; lists are indexed by operand and column of the lane.

    Weights are `2^(logit - reference)`. The reference follows the greatest logit only when that
    exceeds it by much, which spares nearly all rescaling.
    Weights times scales are summed as float16, so scales are normalised by a power of two.

    Attributes:
        reference: logit with weight 1, in units of log 2; the same in all rows of lanes.
        floor: -inf until a token has been seen, then 0; likewise.
        total: sum of weights of the lane's tokens.
        zeros: likewise of weights times zeros.
        normaliser: factor of the scales of values; the same in all lanes. None without scales.
        sums: for each operand and two planes of values: weights times scales times codes.
    """

    reference: list[list[F32]]
    floor: list[list[F32]]
    total: list[list[F32]]
    zeros: list[list[F32]]
    normaliser: F32 | None
    sums: list[list[list[F32]]]

    @classmethod
    def empty(cls, operands: int, tiles: int, *, scaled: bool = True) -> "Softmax":
        """Nothing seen.

        Args:
            operands: of every tile.
            tiles: pairs of planes of values.
            scaled: whether values have scales and zeros.
        """

        def columns(number: float) -> list[list[F32]]:
            return [[F32.constant(number)] * 2 for _ in range(operands)]

        return cls(
            reference=columns(0.0),
            floor=columns(float("-inf")),
            total=columns(0.0),
            zeros=columns(0.0),
            normaliser=F32.constant(_NEVER_SCALED) if scaled else None,
            sums=[[[F32.constant(0.0)] * 4 for _ in range(tiles)] for _ in range(operands)],
        )

    def registers(self) -> list[F32]:
        """All values in a list."""
        flat = [
            x
            for columns in (self.reference, self.floor, self.total, self.zeros)
            for pair in columns
            for x in pair
        ]
        if self.normaliser is not None:
            flat.append(self.normaliser)
        return flat + [x for operand in self.sums for tile in operand for x in tile]

    def with_registers(self, registers: list[Any]) -> "Softmax":
        """The state whose `registers` these are."""
        values = iter(registers)

        def columns() -> list[list[F32]]:
            return [[next(values), next(values)] for _ in self.reference]

        reference, floor, total, zeros = (columns() for _ in range(4))
        normaliser = None if self.normaliser is None else next(values)
        sums = [[[next(values) for _ in range(4)] for _ in tiles] for tiles in self.sums]
        return replace(
            self,
            reference=reference,
            floor=floor,
            total=total,
            zeros=zeros,
            normaliser=normaliser,
            sums=sums,
        )

    def needs_raise(self, logits: list[list[list[F32]]], affine: list[I32]) -> I32:
        """1 if any token of the tile is too large for the reference or the normaliser, else 0.

        Args:
            logits: of the lane's tokens relative to the reference, by operand, token and column.
            affine: of the lane's tokens, if values have scales; the high half of a word is
                nearly its scale.
        """
        every = [x for operand in logits for token in operand for x in token]
        if self.normaliser is not None:
            largest = self.normaliser * (EXCESS / LARGEST_SCALE)
            every.append(largest * _greatest([word.as_float() for word in affine]))
        return ptx.any_greater(_greatest(every), EXCESS)

    def raised(
        self, logits: list[list[list[F32]]], affine: list[I32]
    ) -> tuple["Softmax", list[list[list[F32]]]]:
        """The state with references above all logits of a tile, and its logits relative to them."""
        reference, floor, total, zeros, factors, moved = [], [], [], [], [], []
        for number, tokens in enumerate(logits):
            steps = []
            for e in range(2):
                top = _over_rows(_greatest([token[e] for token in tokens]))
                low = self.floor[number][e]
                step = ptx.maximum(top, low)
                unseen = step.equals(float("-inf"))
                step = select(unseen, F32.constant(0.0), step)
                fresh = low.equals(float("-inf"))
                factor = select(fresh, F32.constant(1.0), ptx.exp2(-step))
                steps.append((step, factor, select(unseen, low, F32.constant(0.0))))
            factors.append([factor for _, factor, _ in steps])
            reference.append(
                [x + step for x, (step, _, _) in zip(self.reference[number], steps, strict=True)]
            )
            floor.append([low for _, _, low in steps])
            total.append([x * f for x, f in zip(self.total[number], factors[-1], strict=True)])
            zeros.append([x * f for x, f in zip(self.zeros[number], factors[-1], strict=True)])
            moved.append([[token[e] - steps[e][0] for e in range(2)] for token in tokens])
        normaliser, shrink = self._normalised(affine)
        sums = [
            [
                [
                    x * (factor if shrink is None else factor * shrink)
                    for x, factor in zip(tile, factors[number] * 2, strict=True)
                ]
                for tile in tiles
            ]
            for number, tiles in enumerate(self.sums)
        ]
        state = Softmax(reference, floor, total, zeros, normaliser, sums)
        return state, moved

    def _normalised(self, affine: list[I32]) -> tuple[F32 | None, F32 | None]:
        """The normaliser that suits a tile too, and its ratio to the present one."""
        if self.normaliser is None:
            return None, None
        scale = _over_rows(_greatest([(word & -65536).as_float() for word in affine]))
        # Brings the largest scale between half of the limit and the limit.
        exponent = (scale.as_bits() >> 23).maximum(20)
        wanted = ((I32.constant(127 + 9 + 127) - exponent) << 23).as_float()
        too_large = (scale * self.normaliser).greater(LARGEST_SCALE)
        normaliser = select(too_large, wanted, self.normaliser)
        return normaliser, normaliser * ptx.reciprocal(self.normaliser)


def _greatest(values: list[F32]) -> F32:
    while len(values) > 1:
        values = [
            ptx.maximum(values[index], values[index + 1])
            if index + 1 < len(values)
            else values[index]
            for index in range(0, len(values), 2)
        ]
    return values[0]


def _over_rows(x: F32) -> F32:
    """The greatest over the eight lanes of a column."""
    for mask in (4, 8, 16):
        x = ptx.maximum(x, ptx.shuffle_xor(x, mask))
    return x
