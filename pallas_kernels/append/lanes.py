"""The small vocabulary in which the append kernel is written, emitted as Mosaic GPU code.

Every `Lane` is a number that each thread of a block has its own of, as in CUDA. A kernel that is
a function of `Lanes` and of references can also run on anything else with these operations, such
as NumPy arrays with one element per thread.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, scf


class Lane:
    """An int32, float32 or truth value of each thread; numbers of Python mix with the first two.

    Division, remainder and shift to the right take integers that are not negative.
    """

    def __init__(self, value: ir.Value):
        self.value = value

    def __add__(self, other: "Lane | int | float") -> "Lane":
        return self._apply(arith.addi, arith.addf, other)

    def __sub__(self, other: "Lane | int | float") -> "Lane":
        return self._apply(arith.subi, arith.subf, other)

    def __mul__(self, other: "Lane | int | float") -> "Lane":
        return self._apply(arith.muli, arith.mulf, other)

    def __truediv__(self, other: "Lane | float") -> "Lane":
        return self._apply(None, arith.divf, other)

    def __floordiv__(self, other: "Lane | int") -> "Lane":
        return self._apply(arith.divui, None, other)

    def __mod__(self, other: "Lane | int") -> "Lane":
        return self._apply(arith.remui, None, other)

    def __and__(self, other: "Lane | int") -> "Lane":
        return self._apply(arith.andi, None, other)

    def __or__(self, other: "Lane | int") -> "Lane":
        return self._apply(arith.ori, None, other)

    def __lshift__(self, other: "Lane | int") -> "Lane":
        return self._apply(arith.shli, None, other)

    def __rshift__(self, other: "Lane | int") -> "Lane":
        return self._apply(arith.shrui, None, other)

    def __lt__(self, other: "Lane | int | float") -> "Lane":
        return self._compare("slt", "OLT", other)

    def __ge__(self, other: "Lane | int | float") -> "Lane":
        return self._compare("sge", "OGE", other)

    def __gt__(self, other: "Lane | int | float") -> "Lane":
        return self._compare("sgt", "OGT", other)

    def _apply(self, of_ints, of_floats, other: "Lane | int | float") -> "Lane":
        operation = of_floats if self._is_float else of_ints
        return Lane(operation(self.value, self._like(other)))

    def _compare(self, of_ints: str, of_floats: str, other: "Lane | int | float") -> "Lane":
        if self._is_float:
            predicate = getattr(arith.CmpFPredicate, of_floats)
            return Lane(arith.cmpf(predicate, self.value, self._like(other)))
        predicate = getattr(arith.CmpIPredicate, of_ints)
        return Lane(arith.cmpi(predicate, self.value, self._like(other)))

    @property
    def _is_float(self) -> bool:
        return self.value.type == ir.F32Type.get()

    def _like(self, other: "Lane | int | float") -> ir.Value:
        if isinstance(other, Lane):
            return other.value
        number = float(other) if self._is_float else int(other)
        return arith.constant(self.value.type, number)


class Lanes:
    """The operations of one block of threads.

    Attributes:
        thread: the index of each thread in its block.
        lane: its index in its warp of 32.
        warp: the index of its warp.
    """

    def __init__(self) -> None:
        self._i32 = ir.IntegerType.get_signless(32)
        self._i64 = ir.IntegerType.get_signless(64)
        self._f32 = ir.F32Type.get()
        self.thread = Lane(utils.thread_idx())
        self.lane = self.thread & 31
        self.warp = self.thread >> 5

    def shape(self, ref: ir.Value) -> tuple[int, ...]:
        """The shape of an array."""
        return tuple(ir.MemRefType(ref.type).shape)

    def load(self, ref: ir.Value, *indices: Lane | int) -> Lane:
        """An element of an array, as int32 or float32."""
        value = memref.load(ref, self._indices(indices))
        if value.type == ir.BF16Type.get():
            bits = arith.bitcast(ir.IntegerType.get_signless(16), value)
            return self.from_bf16(Lane(arith.extui(self._i32, bits)))
        if value.type == ir.F16Type.get():
            return Lane(arith.extf(self._f32, value))
        return Lane(value)

    def store(self, ref: ir.Value, value: Lane, *indices: Lane | int) -> None:
        """Writes an element; an array of 16-bit integers takes the low bits of an int32."""
        stored = value.value
        if ir.MemRefType(ref.type).element_type == ir.IntegerType.get_signless(16):
            stored = arith.trunci(ir.IntegerType.get_signless(16), stored)
        memref.store(stored, ref, self._indices(indices))

    def address(self, ref: ir.Value, *indices: Lane | int) -> Lane:
        """Where an element of a float32 array in global memory lies."""
        offset: Lane = Lane(arith.constant(self._i64, 0))
        for index, size in zip(indices, self.shape(ref), strict=True):
            wide = (
                arith.constant(self._i64, index)
                if isinstance(index, int)
                else arith.extsi(self._i64, index.value)
            )
            offset = offset * size + Lane(wide)
        base = llvm.ptrtoint(self._i64, utils.memref_ptr(ref))
        return Lane(base) + offset * 4

    def fetch(self, address: Lane, offset: int) -> Lane:
        """The element `offset` after an address, of an array that nobody writes meanwhile."""
        return self._asm(f"ld.global.nc.f32 $0, [$1+{4 * offset}];", "=f,l", address)

    def prefetch(self, address: Lane, offset: int) -> None:
        """Brings the cache line of an element closer, before it is fetched."""
        llvm.inline_asm(
            ir.Type.parse("!llvm.void"),
            [address.value],
            f"prefetch.global.L2 [$0+{4 * offset}];",
            "l",
            has_side_effects=True,
        )

    def barrier(self) -> None:
        """Waits for all threads of the block, and makes their writes visible to all."""
        gpu.barrier()

    def shuffle(self, x: Lane, distance: int) -> Lane:
        """The value of the thread whose lane differs in one bit, `distance`."""
        return Lane(utils.shfl_bfly(x.value, distance))

    @contextmanager
    def when(self, condition: Lane) -> Iterator[None]:
        """Only threads where the condition holds run the body; shuffles need whole warps."""
        with ir.InsertionPoint(scf.IfOp(condition.value).then_block):
            yield
            scf.yield_([])

    def select(self, condition: Lane, yes: Lane | int | float, no: Lane | int | float) -> Lane:
        """One of two numbers; plain numbers of Python stand for int32 where both are ints."""
        kind = next((x for x in (yes, no) if isinstance(x, Lane)), self.integer(0))
        return Lane(arith.select(condition.value, kind._like(yes), kind._like(no)))

    def equal(self, a: Lane, b: Lane | int) -> Lane:
        """Whether two int32 are equal."""
        return a._compare("eq", "OEQ", b)

    def integer(self, number: int) -> Lane:
        """The same int32 in every thread."""
        return Lane(arith.constant(self._i32, number))

    def real(self, number: float) -> Lane:
        """The same float32 in every thread."""
        return Lane(arith.constant(self._f32, float(number)))

    def fma(self, a: Lane, b: Lane, c: Lane) -> Lane:
        """`a·b + c`, rounded once."""
        return self._asm("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", a, b, c)

    def minimum(self, a: Lane, b: Lane | float) -> Lane:
        """The smaller of two float32."""
        return self._asm("min.f32 $0, $1, $2;", "=f,f,f", a, Lane(a._like(b)))

    def maximum(self, a: Lane, b: Lane | float) -> Lane:
        """The larger of two float32."""
        return self._asm("max.f32 $0, $1, $2;", "=f,f,f", a, Lane(a._like(b)))

    def absolute(self, x: Lane) -> Lane:
        """The magnitude of a float32."""
        return self._asm("abs.f32 $0, $1;", "=f,f", x)

    def root(self, x: Lane) -> Lane:
        """The square root of a float32."""
        return self._asm("sqrt.rn.f32 $0, $1;", "=f,f", x)

    def floor(self, x: Lane) -> Lane:
        """The next lower whole number, as float32."""
        return self._asm("cvt.rmi.f32.f32 $0, $1;", "=f,f", x)

    def round(self, x: Lane) -> Lane:
        """The nearest whole number, the even one of two, as float32."""
        return self._asm("cvt.rni.f32.f32 $0, $1;", "=f,f", x)

    def to_integer(self, x: Lane) -> Lane:
        """A whole float32 as int32."""
        return Lane(arith.fptosi(self._i32, x.value))

    def to_real(self, x: Lane) -> Lane:
        """An int32 as float32."""
        return Lane(arith.sitofp(self._f32, x.value))

    def to_bf16(self, x: Lane) -> Lane:
        """The bit pattern of the nearest bf16, in the low half of an int32."""
        return self._asm(
            "{ .reg .b16 h; cvt.rn.bf16.f32 h, $1; cvt.u32.u16 $0, h; }", "=r,f", x, self._i32
        )

    def from_bf16(self, bits: Lane) -> Lane:
        """The float32 of a bf16's bit pattern."""
        return Lane(arith.bitcast(self._f32, (bits << 16).value))

    def _asm(self, code: str, constraints: str, *operands: Lane | ir.Type) -> Lane:
        result = next((x for x in operands if isinstance(x, ir.Type)), self._f32)
        values = [x.value for x in operands if isinstance(x, Lane)]
        return Lane(llvm.inline_asm(result, values, code, constraints, has_side_effects=False))

    def _indices(self, indices: Sequence[Lane | int]) -> list[ir.Value]:
        index = ir.IndexType.get()
        return [
            arith.constant(index, i) if isinstance(i, int) else arith.index_cast(index, i.value)
            for i in indices
        ]
