"""Value codes as operands of tensor cores, without a conversion.

A field of a word, masked where it lies in the low ten bits of a half word, is a subnormal float16:
`code · 2^(position - 24)`. Codes of two tokens, put into the two halves of one word, are so an
operand as they are, and the power of two is taken out of the sum at the end.
"""

from dataclasses import dataclass

from pallas_kernels.mosaic_gpu import ptx
from pallas_kernels.mosaic_gpu.registers import I32, select
from pallas_kernels.packing import words_per_column
from pallas_kernels.sketch_attention.gpu_mosaic.plan import TILE

_SPREAD = 0x00010001


@dataclass(frozen=True)
class Plane:
    """One field of the words of eight rows, or of parts of the words of fewer rows.

    Attributes:
        chunk: which rows.
        upper: whether it lies in the upper half of the words, where all of them are used.
        byte: which byte of the half word.
        field: which field of the byte.
        position: its lowest bit in the operand.
    """

    chunk: int
    upper: int
    byte: int
    field: int
    position: int

    @property
    def scale(self) -> float:
        """What the operand must be multiplied by to be the code."""
        return 2.0 ** (24 - self.position)


@dataclass(frozen=True)
class ValueLayout:
    """Which lanes read which words of a value, and which channels they find there.

    Words are taken in chunks of 8, 4 or 2 rows. In a chunk of 8, each of the eight rows of lanes
    has a word of its own; in a smaller one, lanes share a word and take different parts of it.

    Attributes:
        width: bits of a field; of the lower plane of 3-bit codes.
        rows: words of these fields.
        high_rows: words of the upper plane of 3-bit codes, else 0.
    """

    width: int
    rows: int
    high_rows: int

    @classmethod
    def of(cls, head_dim: int, bits: int) -> "ValueLayout":
        """The layout of values with so many channels of so many bits."""
        width = 2 if bits == 3 else bits
        rows = words_per_column(head_dim, width)
        return cls(width, rows, words_per_column(head_dim, bits) - rows)

    def supported(self, head_dim: int) -> bool:
        """Whether lanes can share words evenly: no padding, and at least two rows in a chunk."""
        full = self.rows * 32 == head_dim * self.width
        paired = not self.high_rows or self.rows == 2 * self.high_rows
        return full and paired and self.rows % 2 == 0 and len(self.planes) % 2 == 0

    @property
    def chunks(self) -> list[tuple[int, int]]:
        """First row and number of rows of each chunk."""
        chunks, first = [], 0
        while first < self.rows:
            size = next(size for size in (8, 4, 2, 1) if size <= self.rows - first)
            chunks.append((first, size))
            first += size
        return chunks

    @property
    def planes(self) -> list[Plane]:
        """All planes; each gives eight channels, and consecutive ones share an operand."""
        return [
            Plane(chunk, upper, byte, field, self.width * field)
            for chunk, (_, size) in enumerate(self.chunks)
            for upper in range(2 if size == 8 else 1)
            for byte in range(2 if size >= 4 else 1)
            for field in range(8 // self.width)
        ]

    def channel(self, plane: Plane, row: I32) -> I32:
        """The channel that a lane at this row finds in a plane."""
        first, size = self.chunks[plane.chunk]
        byte = row // size * (size // 2) + (2 * plane.upper + plane.byte)
        return (row & (size - 1)) * 4 + byte + 4 * (first + self.rows * plane.field)


@dataclass(frozen=True)
class ValueReader:
    """Reads the codes of eight tokens of a tile, the part of a lane at row r and column c.

    Attributes:
        layout: of the words.
        offsets: of the low words of each chunk in a tile, for tokens 4c…4c + 3.
        high_offsets: likewise of the high words of 3-bit codes.
        selectors: which bytes of two words make an operand, for each chunk; None for both halves.
        high_shifts: which bit of the high words belongs to the field, for each chunk.
    """

    layout: ValueLayout
    offsets: list[I32]
    high_offsets: list[I32]
    selectors: list[I32 | None]
    high_shifts: list[I32]

    @classmethod
    def of(cls, layout: ValueLayout, first_row: int, row: I32, column: I32) -> "ValueReader":
        """The reader of a lane, given the row of a tile at which its values begin."""
        offsets, high_offsets, high_shifts = [], [], []
        selectors: list[I32 | None] = []
        for first, size in layout.chunks:
            word = (row & (size - 1)) + first
            part = row // size
            offsets.append(value_offset(word, column, first_row))
            if layout.high_rows:
                high = word % layout.high_rows + layout.rows
                high_offsets.append(value_offset(high, column, first_row))
                high_shifts.append(word // layout.high_rows)
            if size == 8:
                selectors.append(None)
            elif size == 4:
                selectors.append(select(part.equals(0), I32.constant(0x5410), I32.constant(0x7632)))
            else:
                selectors.append(part * 0x1111 + 0x4400)
        return cls(layout, offsets, high_offsets, selectors, high_shifts)

    def load(self, tile: I32) -> list[I32]:
        """The words that this lane needs of the tile at an address: of each chunk, then high ones.

        Of each come tokens 4c…4c + 3 and 16 + 4c…16 + 4c + 3.
        """
        words = []
        for offset in [*self.offsets, *self.high_offsets]:
            words += ptx.load(tile + offset, count=4)
            words += ptx.load(tile + (offset ^ (2 * TILE)), count=4)
        return words

    def operands(self, words: list[I32], half: int) -> list[list[I32]]:
        """Operands of 16 channels × 16 tokens, for two of every four tokens of the tile.

        Args:
            words: what `load` gave.
            half: 0 for tokens 0 and 1 of every four, 1 for tokens 2 and 3.
        """
        chunks = len(self.offsets)
        packed: dict[tuple[int, int, int], list[tuple[I32, I32 | None]]] = {}

        def bytes_of(chunk: int, upper: int, byte: int) -> list[tuple[I32, I32 | None]]:
            key = (chunk, upper, byte)
            if key not in packed:
                packed[key] = [
                    self._pair(words, chunk, chunks, upper, byte, 2 * half + token)
                    for token in range(2)
                ]
            return packed[key]

        registers = []
        for plane in self.layout.planes:
            pairs = bytes_of(plane.chunk, plane.upper, plane.byte)
            registers.append([self._field(low, high, plane) for low, high in pairs])
        return [
            [upper[0], lower[0], upper[1], lower[1]]
            for upper, lower in zip(registers[::2], registers[1::2], strict=True)
        ]

    def _pair(
        self, words: list[I32], chunk: int, chunks: int, upper: int, byte: int, token: int
    ) -> tuple[I32, I32 | None]:
        """A byte of two tokens' words in the low bytes of two halves; also of their high words."""

        def pack(words: list[I32], shift: I32 | None) -> I32:
            first, second = words[token], words[4 + token]
            if shift is not None:
                first, second = first >> shift, second >> shift
            chosen = self.selectors[chunk]
            both = ptx.permute(first, second, chosen or (0x7632 if upper else 0x5410))
            return both >> 8 if byte else both

        low = pack(words[8 * chunk : 8 * chunk + 8], None)
        if not self.high_offsets:
            return low, None
        start = 8 * (chunks + chunk)
        # The high bit of a code belongs above its two low bits.
        return low, pack(words[start : start + 8], self.high_shifts[chunk]) << 2

    def _field(self, low: I32, high: I32 | None, plane: Plane) -> I32:
        mask = ((1 << self.layout.width) - 1) << plane.position
        field = low & (mask * _SPREAD)
        if high is None:
            return field
        return field | (high & ((4 << plane.position) * _SPREAD))


def value_offset(word: I32, part: I32, first_row: int) -> I32:
    """Byte offset in a tile of 16 bytes of a row of values.

    The halves of odd rows are exchanged, so that lanes of two rows read from different banks.
    """
    return (word + first_row) * (4 * TILE) + (part ^ ((word & 1) << 2)) * 16
