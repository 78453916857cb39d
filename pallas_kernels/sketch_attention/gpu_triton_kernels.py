"""The three Triton kernels of `gpu_triton`: encode the queries, attend, combine.

Bits and value codes are never converted to floats. A field masked out of its word, with the rest
of a half word zero, already is a float16: a code `n` in the low nibble of the lower byte reads
`n · 2⁻²⁴` and in the high nibble `n · 2⁻²⁰`, subnormals, and a bit a power of two. Tensor cores
multiply these exactly, so powers of two folded into the other operand or the result undo them. But
they add with as many bits below the largest product that the operands' exponents allow, and
subnormals have the exponent of 2⁻¹⁴: a subnormal of 2⁻²⁴ costs sums ten bits. Values can spare
these. Bits are put where they read 2⁻¹⁶ and more.

Floats that multiply them are normalised by powers of two, found as exponent fields: floats with the
sign and mantissa bits zero, as int32. `_over` gives the factor that normalises, `_times` its
inverse.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_BIT_UNIT = tl.constexpr(65536.0)  # A bit of plane 0 reads 2⁻¹⁶.
_BITS_ABOVE_UNIT = tl.constexpr(0x32953210)  # Nibble p: by what power of two a bit of plane p does.
_MANTISSA = tl.constexpr(23)
_EXPONENT_FIELD = tl.constexpr(0x7F800000)
_HALF_PEAK = tl.constexpr(14)  # Normalised float16s lie below 2¹⁵.
_SMALLEST = tl.constexpr(15 << 23)  # The least exponent field whose inverse is normalised too.
_LOWEST = tl.constexpr(-1e30)  # Below any logit; finite, so that differences are not NaN.


@triton.jit
def encode_queries(
    vectors,
    transform,
    scale,
    cos,
    sin,
    mean,
    coefficients,
    lines,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    ROPE: tl.constexpr,
    SIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Turns queries back to the start of each RoPE block and reads them by the transform.

    Program (i, KV head) encodes rows `i·ROWS …` of that KV head; a row is a query head of one
    block of one batch row, and there are BATCH·BLOCKS·GROUPS of them. The sketch's bits fill
    COLUMNS, a power of two; channels are read DEPTH of each half at a time.

    Reads `vectors` [batch, heads, DIM], `transform` [KV_HEADS, DIM, BITS] and `scale` [heads]; with
    ROPE also `cos` and `sin` [BLOCKS, DIM/2] of the angles by which a block's queries are turned,
    and `mean` [KV_HEADS, DIM], already divided by √DIM. Writes `coefficients` [cells, rows, BITS]
    float16, less by as much as `_bit` gives more for their plane, or where SIGNED [cells, rows,
    BITS/32] sign words; and `lines` [cells, rows, 3]: gain, offset and bias. A cell is a (batch, KV
    head).
    """
    WORDS: tl.constexpr = BITS // 32
    HALF_DIM: tl.constexpr = DIM // 2
    kv_head = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    real = row < BATCH * BLOCKS * GROUPS
    group, block = row % GROUPS, row // GROUPS % BLOCKS
    cell = row // (GROUPS * BLOCKS) * KV_HEADS + kv_head
    column = tl.arange(0, COLUMNS)
    if SIGNED:  # In the order of bits inside words.
        bit = column % 32
        field = (bit % 8) * (4 * WORDS) + (column // 32) * 4 + bit // 8
    else:
        field = column
    present = column < BITS

    vector = vectors + (cell * GROUPS + group)[:, None] * DIM
    matrix = transform + kv_head * (DIM * BITS) + field[None, :]
    gain = tl.load(scale + kv_head * GROUPS + group) * _LOG2_E
    read = tl.zeros([ROWS, COLUMNS], tl.float32)
    bias = tl.zeros([ROWS], tl.float32)
    for begin in range(0, HALF_DIM, DEPTH):
        i = begin + tl.arange(0, DEPTH)
        first = tl.load(vector + i[None, :], mask=real[:, None], other=0.0).to(tl.float32)
        second = tl.load(vector + (i + HALF_DIM)[None, :], mask=real[:, None], other=0.0)
        second = second.to(tl.float32)
        if ROPE:
            angle = block[:, None] * HALF_DIM + i[None, :]
            c = tl.load(cos + angle, mask=real[:, None], other=0.0)
            s = tl.load(sin + angle, mask=real[:, None], other=0.0)
            turned = first * c - second * s
            second = second * c + first * s
            first = turned
            centre = mean + kv_head * DIM + i
            bias += tl.sum(first * tl.load(centre)[None, :], 1)
            bias += tl.sum(second * tl.load(centre + HALF_DIM)[None, :], 1)
        rows = matrix + (i * BITS)[:, None]
        upper = tl.load(rows, mask=present[None, :], other=0.0).to(tl.float32)
        lower = tl.load(rows + HALF_DIM * BITS, mask=present[None, :], other=0.0).to(tl.float32)
        read = tl.dot(first, upper, read, input_precision=PRECISION)
        read = tl.dot(second, lower, read, input_precision=PRECISION)

    place = (cell * BLOCKS + block) * GROUPS + group
    if SIGNED:
        words = tl.reshape((read >= 0).to(tl.int32) << bit[None, :], [ROWS, COLUMNS // 32, 32])
        word = tl.arange(0, COLUMNS // 32)
        tl.store(
            coefficients + place[:, None] * WORDS + word[None, :],
            tl.sum(words, 2),
            mask=real[:, None] & (word < WORDS)[None, :],
        )
        offset = tl.zeros([ROWS], tl.float32)
    else:
        peak = tl.max(tl.abs(read), 1).to(tl.int32, bitcast=True) & _EXPONENT_FIELD
        peak = tl.maximum(peak, _SMALLEST)
        half = (read * _over(peak)[:, None]).to(tl.float16).to(tl.float32)
        undo = gain * _times(peak)
        gain = 2.0 * undo * _BIT_UNIT
        offset = undo * tl.sum(half, 1)
        plane = column // (4 * WORDS)
        above = (_BITS_ABOVE_UNIT >> (4 * plane)) & 15
        half *= ((127 - above) << _MANTISSA).to(tl.float32, bitcast=True)[None, :]
        tl.store(
            coefficients + place[:, None] * BITS + column[None, :],
            half.to(tl.float16),
            mask=real[:, None] & present[None, :],
        )
    tl.store(lines + place * 3, gain, mask=real)
    tl.store(lines + place * 3 + 1, offset, mask=real)
    tl.store(lines + place * 3 + 2, bias * _LOG2_E, mask=real)


@triton.jit
def attend(
    key_words,
    key_scales,
    value_words,
    value_affine,
    coefficients,
    lines,
    variance,
    layer,
    stop,
    outputs,
    statistics,
    BATCH: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    CAPACITY: tl.constexpr,
    DIM: tl.constexpr,
    BITS: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SCALED: tl.constexpr,
    SIGNED: tl.constexpr,
    CODE_PLANES: tl.constexpr,
    PERIOD: tl.constexpr,
    START: tl.constexpr,
    TILE: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEY_BYTES: tl.constexpr,
    VALUE_ROWS: tl.constexpr,
):
    """Attention of the query heads of one cell (batch, KV head) to one split of its tokens.

    The tiles that a row sees, of TILE tokens from START to `stop` [BATCH], are dealt to its splits
    in turn, so that what is read at the same time is near in memory; program (split, cell) takes
    one split's. Heads, the bytes of a sketch and the rows of value words fill COLUMNS, KEY_BYTES
    and VALUE_ROWS, powers of two.

    Reads the packed keys and values of one `layer`, the scalars of keys where SCALED; what
    `encode_queries` wrote, for each RoPE block where PERIOD is not 0; and `variance` [BATCH, heads]
    where CODE_PLANES is not 0. Writes `statistics` [cells, splits, GROUPS, 2], the softmax's
    reference (a logit times log₂e) and its sum, and `outputs` [cells, splits, GROUPS, DIM], not
    normalised, channels in the order of `_channel`.
    """
    WORDS: tl.constexpr = BITS // 32
    HAS_HIGH_BITS: tl.constexpr = VALUE_BITS == 3
    # How many sets of eight nibbles a word is spread to, and words that are.
    SETS: tl.constexpr = 1 if VALUE_BITS == 4 else 2
    SPREAD: tl.constexpr = DIM // (8 * SETS)
    VALUE_WORDS: tl.constexpr = SPREAD + SPREAD // 2 if HAS_HIGH_BITS else SPREAD

    split, splits, cell = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    stored = tl.load(layer).to(tl.int64) * (BATCH * KV_HEADS) + cell
    keys = key_words + stored * (WORDS * CAPACITY)
    key_bytes = keys.to(tl.pointer_type(tl.uint8))
    scales = key_scales + stored * CAPACITY
    values = value_words + stored * (VALUE_WORDS * CAPACITY)
    affines = value_affine + stored * CAPACITY

    end = tl.minimum(tl.load(stop + cell // KV_HEADS), CAPACITY)
    seen = tl.maximum(end - START, 0).to(tl.uint32)
    end_tile = tl.where(seen == 0, 0, tl.cdiv(end, TILE))

    group = tl.arange(0, COLUMNS)
    real = group < GROUPS
    byte = tl.arange(0, KEY_BYTES)
    row = tl.arange(0, VALUE_ROWS)
    spread_row = (row < SPREAD)[:, None]
    # Addresses are where a tile begins and offsets that all tiles share: less work than a sum each.
    # Byte b of word r holds, in bit p, field 4·WORDS·p + 4·r + b.
    step = tl.arange(0, TILE)
    key_offset = (byte // 4 * (4 * CAPACITY) + byte % 4)[None, :] + 4 * step[:, None]
    value_offset = row[:, None] * CAPACITY + step[None, :]
    if CODE_PLANES != 0:
        spread = tl.load(variance + cell * GROUPS + group, mask=real, other=0.0) * _LOG2_E
    BLOCKS: tl.constexpr = CAPACITY // PERIOD if PERIOD else 1
    place = cell * (BLOCKS * GROUPS) + group
    if PERIOD == 0:
        gain, offset, bias = _line(lines, place, real)
        if not SIGNED:
            query = _query_planes(coefficients, place, real, byte, WORDS)

    reference = tl.full([COLUMNS], _LOWEST, tl.float32)
    total = tl.zeros([8, COLUMNS], tl.float32)
    zeros = tl.zeros([8, COLUMNS], tl.float32)
    peak = tl.full([], _SMALLEST, tl.int32)
    sums = tl.tuple(())
    for _ in tl.static_range(8 * SETS):
        sums += (tl.zeros([VALUE_ROWS, COLUMNS], tl.float32),)

    for tile in range(START // TILE + split, end_tile, splits):
        begin = tl.cast(tile, tl.int64) * TILE
        token = tile * TILE + step
        visible = (token - START).to(tl.uint32, bitcast=True) < seen  # Less than 0 is far above.
        if PERIOD != 0:
            place = cell * (BLOCKS * GROUPS) + (tile * TILE // PERIOD) * GROUPS + group
            gain, offset, bias = _line(lines, place, real)
            if not SIGNED:
                query = _query_planes(coefficients, place, real, byte, WORDS)

        # Logits times log₂e.
        if SIGNED:
            differing = tl.zeros([TILE, COLUMNS], tl.int32)
            for w in tl.static_range(WORDS):
                word = tl.load(keys + w * CAPACITY + token)
                signs = tl.load(coefficients + place * WORDS + w, mask=real, other=0)
                differing += _popcount(word[:, None] ^ signs[None, :])
            logits = (BITS - 2 * differing).to(tl.float32) * gain[None, :]
        else:
            address = key_bytes + 4 * begin + key_offset
            if KEY_BYTES == 4 * WORDS:
                packed = tl.load(address)
            else:
                packed = tl.load(address, mask=(byte < 4 * WORDS)[None, :], other=0)
            matched = tl.zeros([TILE, COLUMNS], tl.float32)
            for p in tl.static_range(8):
                matched = tl.dot(_bit(packed, p), query[p], matched)
            logits = matched * gain[None, :] - offset[None, :]
        if SCALED:
            # Tokens 0…63 and 64…127 of a block of 128 lie in one row each.
            paired = (token // 128) * 64 + token % 64 + (token // 64 % 2) * (CAPACITY // 2)
            norm = tl.load(scales + paired).to(tl.int32) << 16
            norm = norm.to(tl.float32, bitcast=True)
            if CODE_PLANES == 1:
                logits -= (norm * BITS)[:, None] * spread[None, :]
            elif CODE_PLANES == 2:
                # (2a + a')² is 9 where the planes agree and 1 where not. They are four bits apart.
                differ = tl.zeros([TILE], tl.int32)
                for w in tl.static_range(WORDS):
                    word = tl.load(keys + w * CAPACITY + token)
                    differ += _popcount((word ^ (word >> 4)) & 0x0F0F0F0F)
                code_norm = (9 * (BITS // 2) - 8 * differ).to(tl.float32)
                logits -= (norm * code_norm)[:, None] * spread[None, :]
            logits *= norm[:, None]
        if PERIOD != 0:
            logits += bias[None, :]
        logits = tl.where(visible[:, None], logits, float("-inf"))

        highest = tl.maximum(reference, tl.max(logits, 0))
        weights = tl.exp2(logits - highest[None, :])
        shrink = tl.exp2(reference - highest)
        reference = highest

        affine = tl.where(visible, tl.load(affines + token), 0)
        new_peak = tl.maximum(peak, tl.max(affine & _EXPONENT_FIELD, 0))
        scale = (affine & -65536).to(tl.float32, bitcast=True) * _over(new_peak)
        zero = (affine << 16).to(tl.float32, bitcast=True)
        total = total * shrink[None, :] + _fold(weights)
        zeros = zeros * shrink[None, :] + _fold(weights * zero[:, None])
        weighted = (weights * scale[:, None]).to(tl.float16)
        change = tl.maximum((127 << _MANTISSA) + peak - new_peak, 0).to(tl.float32, bitcast=True)
        shrink *= change
        peak = new_peak

        address = values + begin + value_offset
        if VALUE_ROWS == SPREAD:
            words = tl.load(address)
        else:
            words = tl.load(address, mask=spread_row, other=0)
        high = words
        if HAS_HIGH_BITS:
            # Word r's high bits lie in word r % (SPREAD/2), r // (SPREAD/2) bits up.
            address = (row % (SPREAD // 2) + SPREAD)[:, None] * CAPACITY + token[None, :]
            high = tl.load(values + address, mask=spread_row, other=0)
            high = high >> (row // (SPREAD // 2))[:, None]
        updated = tl.tuple(())
        for s in tl.static_range(SETS):
            nibbles = _nibbles(words, high, VALUE_BITS, s)
            for j in tl.static_range(8):
                rescaled = sums[8 * s + j] * shrink[None, :]
                updated += (tl.dot(_nibble(nibbles, j), weighted, rescaled),)
        sums = updated

    place = (cell * splits + split) * GROUPS + group
    tl.store(statistics + place * 2, reference, mask=real)
    tl.store(statistics + place * 2 + 1, tl.sum(total, 0), mask=real)
    shift = tl.sum(zeros, 0)
    out = outputs + place[None, :] * DIM + row[:, None]
    for j in tl.static_range(8 * SETS):
        code_part = sums[j] * _times(peak) * _nibble_unit(j)
        tl.store(out + j * SPREAD, code_part + shift[None, :], mask=spread_row & real[None, :])


@triton.jit
def combine(
    outputs,
    statistics,
    output,
    lse,
    GROUPS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_BITS: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Merges the splits of one head by their log-sum-exps, for some of its channels.

    Program (head of a row, i) reads positions `i·CHANNELS …` of `outputs`, writes the channels that
    `attend` left there to `output` [heads, DIM], and for i = 0 `lse` [heads]; 0 and -inf where no
    split saw a token. Reads CHUNK of the SPLITS at once.
    """
    head = tl.program_id(0)
    cell, group = head // GROUPS, head % GROUPS
    position = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    reference = tl.full([], _LOWEST, tl.float32)
    total = tl.zeros([], tl.float32)
    merged = tl.zeros([CHANNELS], tl.float32)
    for begin in tl.static_range(0, SPLITS, CHUNK):
        split = begin + tl.arange(0, CHUNK)
        present = split < SPLITS
        place = (cell * SPLITS + split) * GROUPS + group
        values = tl.load(
            outputs + place[:, None] * DIM + position[None, :], mask=present[:, None], other=0.0
        )
        own = tl.load(statistics + place * 2, mask=present, other=_LOWEST)
        part = tl.load(statistics + place * 2 + 1, mask=present, other=0.0)
        highest = tl.maximum(reference, tl.max(own, 0))
        weight = tl.exp2(own - highest)
        shrink = tl.exp2(reference - highest)
        total = total * shrink + tl.sum(weight * part, 0)
        merged = merged * shrink + tl.sum(weight[:, None] * values, 0)
        reference = highest
    empty = total == 0.0
    channel = _channel(position, DIM, VALUE_BITS)
    tl.store(output + head * DIM + channel, merged / tl.where(empty, 1.0, total))
    if tl.program_id(1) == 0:
        logarithm = (reference + tl.log2(tl.where(empty, 1.0, total))) * _LN_2
        tl.store(lse + head, tl.where(empty, float("-inf"), logarithm))


@triton.jit
def _line(lines, place, real):
    gain = tl.load(lines + place * 3, mask=real, other=0.0)
    offset = tl.load(lines + place * 3 + 1, mask=real, other=0.0)
    bias = tl.load(lines + place * 3 + 2, mask=real, other=0.0)
    return gain, offset, bias


@triton.jit
def _query_planes(coefficients, place, real, byte, WORDS: tl.constexpr):
    """What each bit plane of the key bytes is multiplied by: eight of [bytes, heads] float16."""
    mask = (byte < 4 * WORDS)[:, None] & real[None, :]
    address = coefficients + place[None, :] * (32 * WORDS) + byte[:, None]
    planes = tl.tuple(())
    for p in tl.static_range(8):
        planes += (tl.load(address + p * (4 * WORDS), mask=mask, other=0.0),)
    return planes


@triton.jit
def _times(exponent):
    """`2^(exponent − 14)`: undoes `_over`."""
    return (exponent - (_HALF_PEAK << _MANTISSA)).to(tl.float32, bitcast=True)


@triton.jit
def _over(exponent):
    """`2^(14 − exponent)`, which brings floats of at most that exponent below 2¹⁵."""
    inverse = (254 << _MANTISSA) - exponent
    return (inverse + (_HALF_PEAK << _MANTISSA)).to(tl.float32, bitcast=True)


@triton.jit
def _fold(x):
    """Adds rows up to eight, which one warp needs no exchange for."""
    return tl.sum(tl.reshape(x, [x.shape[0] // 8, 8, x.shape[1]]), 0)


@triton.jit
def _nibbles(words, high, VALUE_BITS: tl.constexpr, s: tl.constexpr):
    """Set `s` of a word's codes, one in each nibble: those in fields 2·plane + s of a byte."""
    if VALUE_BITS == 4:
        return words
    low = (words >> (2 * s)) & 0x33333333
    if VALUE_BITS == 2:
        return low
    return low | (((high >> (2 * s)) & 0x11111111) << 2)


@triton.jit
def _channel(position, DIM: tl.constexpr, VALUE_BITS: tl.constexpr):
    """Which channel `attend` leaves at a position: behind all rows of earlier nibbles."""
    SETS: tl.constexpr = 1 if VALUE_BITS == 4 else 2
    ROWS: tl.constexpr = DIM // (8 * SETS)
    # Channel 4·ROWS·field + 4·row + byte, and field is 2·SETS to a byte.
    row, nibble, s = position % ROWS, position // ROWS % 8, position // (8 * ROWS)
    byte, field = nibble // 2, nibble % 2 * SETS + s
    return 4 * ROWS * field + 4 * row + byte


@triton.constexpr_function
def _nibble_assembly(j):
    byte, mask = j // 2, 0x000F000F << (4 * (j % 2))
    return f"prmt.b32 $0, $1, $2, {0x4400 + 0x1111 * byte}; and.b32 $0, $0, {mask};"


@triton.jit
def _nibble(words, j: tl.constexpr):
    """Nibble `j` of each word as a float16 subnormal; takes words in pairs."""
    return tl.inline_asm_elementwise(
        _nibble_assembly(j), "=r,r,r", args=[words], dtype=tl.float16, is_pure=True, pack=2
    )


@triton.constexpr_function
def _nibble_unit(j):
    return 2.0 ** (24 - 4 * (j % 2))


@triton.constexpr_function
def _bit_assembly(p):
    # Above bit 13 of a half word, a bit reads too much or is its sign.
    place, shift = (8 + p, "") if p < 6 else (4 + p, "shr.b32 $0, $0, 4; shr.b32 $1, $1, 4;")
    mask = 0x00010001 << place
    return (
        f"prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424; {shift} "
        f"and.b32 $0, $0, {mask}; and.b32 $1, $1, {mask};"
    )


@triton.jit
def _bit(packed, p: tl.constexpr):
    """Bit `p` of each byte as 2⁻¹⁶, or that times a power in `_BITS_ABOVE_UNIT`; bytes in fours."""
    return tl.inline_asm_elementwise(
        _bit_assembly(p), "=&r,=&r,r", args=[packed], dtype=tl.float16, is_pure=True, pack=4
    )


@triton.jit
def _popcount(words):
    return tl.inline_asm_elementwise(
        "popc.b32 $0, $1;", "=r,r", args=[words], dtype=tl.int32, is_pure=True, pack=1
    )
