"""The PTX instructions that kernels use, on `registers`.

In fragments of matrix operands, lane `4·r + c` of a warp stands at "row" r in 0…7 and "column" c
in 0…3; PTX ISA 9.7.14 (warp-level matrix instructions) draws them. Two float16 in one register
are written low half first.
"""

from collections.abc import Sequence
from inspect import signature
from struct import pack
from typing import Literal, TypeVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.mosaic_gpu.registers import F32, I32, I64, Bool, Register, when

Space = Literal["global", "shared"]

_Value = TypeVar("_Value", I32, F32)
_LETTERS: dict[type, str] = {I32: "r", F32: "f", I64: "l"}
# What threads of a warp do together must not move into a branch that only some of them take.
# Bindings that cannot say so keep such instructions in place as side effects.
_CAN_CONVERGE = "convergent" in signature(llvm.inline_asm).parameters


def load(address: I64 | I32, offset: int = 0, *, count: int = 1, once: bool = False) -> list[I32]:
    """1, 2 or 4 consecutive words; the address is aligned to all of them.

    Args:
        address: in bytes; 64 bits for global memory, 32 for shared.
        offset: added to it, in bytes.
        count: words.
        once: whether global memory is read once and never written, so that caching it in L1
            would only displace other data.
    """
    if isinstance(address, I64):
        kind = "ld.global.nc.L1::no_allocate" if once else "ld.global"
    else:
        kind = "ld.shared"
    into = ", ".join(f"${index}" for index in range(count))
    into = f"{{{into}}}" if count > 1 else into
    vector = f".v{count}" if count > 1 else ""
    text = f"{kind}{vector}.b32 {into}, [${count}{offset:+d}];"
    # What is never written may be read at any time; other reads stay in order with writes.
    return _assemble(text, [address], [I32] * count, memory=not once)


def store(address: I64 | I32, *values: Register, offset: int = 0, only: Bool | None = None) -> None:
    """Writes 1, 2 or 4 consecutive words; the address is aligned to all of them.

    Args:
        address: in bytes; 64 bits for global memory, 32 for shared.
        values: what to write.
        offset: added to the address, in bytes.
        only: the threads that write; None for all.
    """
    if only is not None:
        when(only, lambda: store(address, *values, offset=offset))
        return
    space = "global" if isinstance(address, I64) else "shared"
    count = len(values)
    listed = ", ".join(f"${1 + index}" for index in range(count))
    listed = f"{{{listed}}}" if count > 1 else listed
    vector = f".v{count}" if count > 1 else ""
    _assemble(
        f"st.{space}{vector}.b32 [$0{offset:+d}], {listed};", [address, *values], [], memory=True
    )


def load_half(address: I64, offset: int = 0) -> I32:
    """16 bits of global memory, in the low half; the address is aligned to them."""
    return _assemble(f"ld.global.u16 $0, [$1{offset:+d}];", [address], [I32], memory=True)[0]


def store_half(address: I64, value: I32, *, offset: int = 0) -> None:
    """Writes the low half of a word to global memory, as `load_half` reads it."""
    _assemble(f"st.global.u16 [$0{offset:+d}], $1;", [address, value], [], memory=True)


def prefetch(address: I64, offset: int = 0) -> None:
    """Begins to bring 128 bytes of global memory, aligned to as many, into the L2 cache."""
    _assemble(f"prefetch.global.L2 [$0{offset:+d}];", [address], [], memory=True)


def copy_async(target: I32, source: I64, offset: int = 0, *, only: Bool | None = None) -> None:
    """Begins to copy 16 bytes from global to shared memory; both are aligned to 16.

    Args:
        target: address in shared memory.
        source: address in global memory.
        offset: added to the source, in bytes.
        only: the threads that copy; None for all.
    """
    if only is not None:
        when(only, lambda: copy_async(target, source, offset))
        return
    text = f"cp.async.cg.shared.global.L2::128B [$0], [$1{offset:+d}], 16;"
    _assemble(text, [target, source], [], memory=True)


def commit_copies() -> None:
    """Ends a group of the thread's copies; it may be empty."""
    _assemble("cp.async.commit_group;", [], [], memory=True)


def wait_for_copies(pending: int) -> None:
    """Waits until at most so many of the thread's latest groups of copies are under way."""
    _assemble(f"cp.async.wait_group {pending};", [], [], memory=True)


def barrier() -> None:
    """Waits for all threads of the block; what they wrote to shared memory is then visible."""
    _assemble("bar.sync 0;", [], [], memory=True, together=True)


def warp_barrier() -> None:
    """Waits for all threads of the warp, as `barrier` does for the block."""
    _assemble("bar.warp.sync 0xffffffff;", [], [], memory=True, together=True)


def fma(a: F32, b: F32, c: F32) -> F32:
    """`a·b + c`, rounded once."""
    return _float("fma.rn.f32 $0, $1, $2, $3;", a, b, c)


def maximum(a: F32, b: F32) -> F32:
    """The greater; the other where one is NaN."""
    return _float("max.f32 $0, $1, $2;", a, b)


def minimum(a: F32, b: F32) -> F32:
    """The lesser; the other where one is NaN."""
    return _float("min.f32 $0, $1, $2;", a, b)


def exp2(x: F32) -> F32:
    """`2ˣ` to two units in the last place; 0 where that would be subnormal."""
    return _float("ex2.approx.ftz.f32 $0, $1;", x)


def log2(x: F32) -> F32:
    """`log₂ x`, with an absolute error of 2⁻²² near 1 and to one unit in the last place else."""
    return _float("lg2.approx.f32 $0, $1;", x)


def reciprocal(x: F32) -> F32:
    """`1/x`, rounded to nearest."""
    return _float("rcp.rn.f32 $0, $1;", x)


def divide(a: F32, b: F32) -> F32:
    """`a/b`, rounded to nearest."""
    return _float("div.rn.f32 $0, $1, $2;", a, b)


def square_root(x: F32) -> F32:
    """`√x`, rounded to nearest."""
    return _float("sqrt.rn.f32 $0, $1;", x)


def absolute(x: F32) -> F32:
    """`|x|`."""
    return _float("abs.f32 $0, $1;", x)


def floor(x: F32) -> F32:
    """The next lower whole number."""
    return _float("cvt.rmi.f32.f32 $0, $1;", x)


def nearest(x: F32) -> F32:
    """The nearest whole number, the even one of two."""
    return _float("cvt.rni.f32.f32 $0, $1;", x)


def sine(x: F32) -> F32:
    """`sin x` for x in [-π, π], with an absolute error of 2⁻²⁰."""
    return _float("sin.approx.f32 $0, $1;", x)


def cosine(x: F32) -> F32:
    """`cos x` for x in [-π, π], with an absolute error of 2⁻²⁰."""
    return _float("cos.approx.f32 $0, $1;", x)


def turns_per_step(radians: F32, steps: int) -> I32:
    """The fraction of a turn that `steps` times so many radians make, in units of 2⁻³² turns.

    Multiplied by a count and wrapped around, it gives phases without loss far from the origin.
    """
    turns = _double(steps / 6.283185307179586)
    return _integer(
        f"{{ .reg .f64 x, y; cvt.f64.f32 x, $1; mul.rn.f64 x, x, {turns}; "
        f"cvt.rmi.f64.f64 y, x; sub.rn.f64 x, x, y; mul.rn.f64 x, x, {_double(2.0**32)}; "
        ".reg .u64 n; cvt.rni.u64.f64 n, x; cvt.u32.u64 $0, n; }",
        radians,
    )


def population_count(word: I32) -> I32:
    """How many bits are set."""
    return _integer("popc.b32 $0, $1;", word)


def permute(low: I32, high: I32, selector: I32 | int) -> I32:
    """Four of eight bytes: nibble i of the selector names byte i, 0…3 in `low`, 4…7 in `high`."""
    if isinstance(selector, int):
        return _integer(f"prmt.b32 $0, $1, $2, {selector:#06x};", low, high)
    return _integer("prmt.b32 $0, $1, $2, $3;", low, high, selector)


def pack_halves(low: F32, high: F32) -> I32:
    """Two numbers rounded to float16."""
    return _integer("cvt.rn.f16x2.f32 $0, $2, $1;", low, high)


def scale_halves(halves: I32, factors: I32) -> I32:
    """Products of two pairs of float16."""
    return _integer("mul.rn.f16x2 $0, $1, $2;", halves, factors)


def pack_bfloats(low: F32, high: F32) -> I32:
    """Two numbers rounded to bfloat16."""
    return _integer("cvt.rn.bf16x2.f32 $0, $2, $1;", low, high)


def to_bfloat16(x: F32) -> I32:
    """The bits of the nearest bfloat16, in the low half."""
    return _integer("{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }", x)


def from_float16(bits: I32) -> F32:
    """The float16 whose bits are the low half."""
    text = "{ .reg .b16 h; cvt.u16.u32 h, $1; cvt.f32.f16 $0, h; }"
    return _assemble(text, [bits], [F32])[0]


def shuffle_xor(value: _Value, mask: int) -> _Value:
    """The value of the lane whose number differs in these bits."""
    return _assemble(
        f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xffffffff;", [value], [type(value)], together=True
    )[0]


def shuffle(value: _Value, lane: I32) -> _Value:
    """The value of another lane of the warp."""
    return _assemble(
        "shfl.sync.idx.b32 $0, $1, $2, 31, 0xffffffff;",
        [value, lane],
        [type(value)],
        together=True,
    )[0]


def any_greater(x: F32, limit: float) -> I32:
    """1 if any lane of the warp has more than the limit, else 0."""
    text = (
        "{ .reg .pred p, q; setp.gt.f32 p, $1, $2; vote.sync.any.pred q, p, 0xffffffff; "
        "selp.u32 $0, 1, 0, q; }"
    )
    return _assemble(text, [x, F32.constant(limit)], [I32], together=True)[0]


def ballot(bit: I32) -> I32:
    """Bit i is 1 where lane i of the warp has anything but 0."""
    text = "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return _assemble(text, [bit], [I32], together=True)[0]


def transpose_halves(fragment: I32) -> I32:
    """Transposes an 8 × 8 matrix of 16-bit numbers, of which a lane holds (r, 2c) and (r, 2c+1)."""
    return _assemble(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;", [fragment], [I32], together=True
    )[0]


def multiply_halves(a: Sequence[I32], b: Sequence[I32], c: Sequence[F32]) -> list[F32]:
    """`a·b + c` of a 16 × 16 and a 16 × 8 matrix of float16, with a float32 result.

    Args:
        a: rows r and r + 8 at columns 2c and 2c + 1, then at columns 2c + 8 and 2c + 9.
        b: rows 2c and 2c + 1, then 2c + 8 and 2c + 9, of column r.
        c: row r at columns 2c and 2c + 1, then row r + 8.
    """
    return _assemble(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {$0, $1, $2, $3}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        [*a, *b, *c],
        [F32] * 4,
        together=True,
    )


def multiply_bfloats(a: Sequence[I32], b: Sequence[I32], c: Sequence[F32]) -> list[F32]:
    """`multiply_halves` of matrices of bfloat16."""
    return _assemble(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {$0, $1, $2, $3}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        [*a, *b, *c],
        [F32] * 4,
        together=True,
    )


def load_matrices(address: I32, offset: int = 0, *, transposed: bool = False) -> list[I32]:
    """Four 8 × 8 matrices of 16-bit numbers from shared memory.

    Args:
        address: of eight numbers, aligned to 16 bytes; lane 8·i + j says where row j of matrix i
            lies.
        offset: added to all addresses, in bytes.
        transposed: whether columns of a matrix in memory become rows.

    Returns:
        For each matrix, row r at columns 2c and 2c + 1.
    """
    kind = ".trans" if transposed else ""
    return _assemble(
        f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4{offset:+d}];",
        [address],
        [I32] * 4,
        memory=True,
        together=True,
    )


def multiply_singles(a: Sequence[F32], b: Sequence[F32], c: Sequence[F32]) -> list[F32]:
    """`a·b + c` of a 16 × 8 and an 8 × 8 matrix, of which only 11 significant bits count.

    Args:
        a: rows r and r + 8 at column c, then at column c + 4.
        b: rows c and c + 4 of column r.
        c: row r at columns 2c and 2c + 1, then row r + 8.
    """
    return _assemble(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {$0, $1, $2, $3}, "
        "{$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        [*(x.as_bits() for x in (*a, *b)), *c],
        [F32] * 4,
        together=True,
    )


def multiply_bits(a: Sequence[I32], b: I32, c: Sequence[I32]) -> list[I32]:
    """`popcount(a & b) + c` of 16 rows and 8 columns of 128 bits.

    Args:
        a: word c of rows r and r + 8.
        b: word c of column r.
        c: row r at columns 2c and 2c + 1, then row r + 8.
    """
    return _assemble(
        "mma.sync.aligned.m16n8k128.row.col.s32.b1.b1.s32.and.popc {$0, $1, $2, $3}, "
        "{$4, $5}, {$6}, {$7, $8, $9, $10};",
        [*a, b, *c],
        [I32] * 4,
        together=True,
    )


def _integer(text: str, *operands: Register) -> I32:
    return _assemble(text, operands, [I32])[0]


def _float(text: str, *operands: Register) -> F32:
    return _assemble(text, operands, [F32])[0]


def _double(number: float) -> str:
    return "0d" + pack(">d", number).hex().upper()


def _assemble(
    text: str,
    operands: Sequence[Register | I64],
    results: Sequence[type],
    *,
    memory: bool = False,
    together: bool = False,
) -> list:
    """One inline assembly call.

    Args:
        text: PTX with `$0`, `$1`, … for the results and then the operands.
        operands: what it reads.
        results: the classes of what it gives.
        memory: whether it must stay in order with other accesses to memory.
        together: whether all threads of a warp run it together.
    """
    types = [_type(kind) for kind in results]
    if not types:
        returned = None
    elif len(types) == 1:
        returned = types[0]
    else:
        returned = ir.Type.parse(f"!llvm.struct<({', '.join(map(str, types))})>")
    constraints = [f"={_LETTERS[kind]}" for kind in results]
    constraints += [_LETTERS[type(operand)] for operand in operands]
    if memory:
        constraints.append("~{memory}")
    options = {"convergent": True} if together and _CAN_CONVERGE else {}
    given = llvm.inline_asm(
        returned,
        [operand.value for operand in operands],
        text,
        ",".join(constraints),
        has_side_effects=memory or (together and not _CAN_CONVERGE),
        **options,
    )
    if not types:
        return []
    if len(types) == 1:
        return [results[0](given)]
    return [
        kind(llvm.extractvalue(item, given, ir.DenseI64ArrayAttr.get([index])))
        for index, (kind, item) in enumerate(zip(results, types, strict=True))
    ]


def _type(kind: type) -> ir.Type:
    if kind is F32:
        return ir.F32Type.get()
    return ir.IntegerType.get_signless(64 if kind is I64 else 32)
