"""One scalar per thread: the values that `ptx` instructions take and give.

Arithmetic is ordinary Python: `(lane >> 2) * 4 + 1` emits three instructions. Integers wrap
around; they shift, divide and compare as unsigned numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf


@dataclass(frozen=True)
class Bool:
    """A predicate."""

    value: ir.Value

    def __and__(self, other: "Bool") -> "Bool":
        return Bool(arith.andi(self.value, other.value))

    def __or__(self, other: "Bool") -> "Bool":
        return Bool(arith.ori(self.value, other.value))


@dataclass(frozen=True)
class I32:
    """32 bits: an integer, or packed narrower numbers."""

    value: ir.Value

    @classmethod
    def constant(cls, number: int) -> "I32":
        """The same number in every thread; taken modulo 2³²."""
        signed = (number + 2**31) % 2**32 - 2**31
        return cls(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), signed)))

    def __add__(self, other: "I32 | int") -> "I32":
        return I32(arith.addi(self.value, _integer(other).value))

    def __sub__(self, other: "I32 | int") -> "I32":
        return I32(arith.subi(self.value, _integer(other).value))

    def __mul__(self, other: "I32 | int") -> "I32":
        return I32(arith.muli(self.value, _integer(other).value))

    def __floordiv__(self, other: "I32 | int") -> "I32":
        return I32(arith.divui(self.value, _integer(other).value))

    def __mod__(self, other: "I32 | int") -> "I32":
        return I32(arith.remui(self.value, _integer(other).value))

    def __and__(self, other: "I32 | int") -> "I32":
        return I32(arith.andi(self.value, _integer(other).value))

    def __or__(self, other: "I32 | int") -> "I32":
        return I32(arith.ori(self.value, _integer(other).value))

    def __xor__(self, other: "I32 | int") -> "I32":
        return I32(arith.xori(self.value, _integer(other).value))

    def __invert__(self) -> "I32":
        return self ^ -1

    def __lshift__(self, other: "I32 | int") -> "I32":
        return I32(arith.shli(self.value, _integer(other).value))

    def __rshift__(self, other: "I32 | int") -> "I32":
        return I32(arith.shrui(self.value, _integer(other).value))

    def equals(self, other: "I32 | int") -> Bool:
        """Whether both are the same."""
        return _compare(arith.CmpIPredicate.eq, self, other)

    def less(self, other: "I32 | int") -> Bool:
        """Whether this is less, both taken as signed."""
        return _compare(arith.CmpIPredicate.slt, self, other)

    def minimum(self, other: "I32 | int") -> "I32":
        """The lesser, both taken as signed."""
        return I32(arith.minsi(self.value, _integer(other).value))

    def maximum(self, other: "I32 | int") -> "I32":
        """The greater, both taken as signed."""
        return I32(arith.maxsi(self.value, _integer(other).value))

    def as_float(self) -> "F32":
        """The float32 with these bits."""
        return F32(llvm.bitcast(ir.F32Type.get(), self.value))

    def to_float(self) -> "F32":
        """This number, taken as signed, as a float32."""
        return F32(arith.sitofp(ir.F32Type.get(), self.value))

    def wide(self) -> "I64":
        """This number, taken as unsigned, in 64 bits."""
        return I64(arith.extui(_i64(), self.value))


@dataclass(frozen=True)
class I64:
    """64 bits: a byte address, or a byte offset from one."""

    value: ir.Value

    @classmethod
    def constant(cls, number: int) -> "I64":
        """The same number in every thread."""
        return cls(arith.constant(_i64(), ir.IntegerAttr.get(_i64(), number)))

    def __add__(self, other: "I64 | I32 | int") -> "I64":
        return I64(arith.addi(self.value, _wide(other).value))

    def __mul__(self, other: "I64 | I32 | int") -> "I64":
        return I64(arith.muli(self.value, _wide(other).value))


@dataclass(frozen=True)
class F32:
    """A float32."""

    value: ir.Value

    @classmethod
    def constant(cls, number: float) -> "F32":
        """The same number in every thread."""
        return cls(arith.constant(ir.F32Type.get(), ir.FloatAttr.get_f32(number)))

    def __add__(self, other: "F32 | float") -> "F32":
        return F32(arith.addf(self.value, _float(other).value))

    def __sub__(self, other: "F32 | float") -> "F32":
        return F32(arith.subf(self.value, _float(other).value))

    def __mul__(self, other: "F32 | float") -> "F32":
        return F32(arith.mulf(self.value, _float(other).value))

    def __neg__(self) -> "F32":
        return F32(arith.negf(self.value))

    def equals(self, other: "F32 | float") -> Bool:
        """Whether both are the same number."""
        return Bool(arith.cmpf(arith.CmpFPredicate.OEQ, self.value, _float(other).value))

    def greater(self, other: "F32 | float") -> Bool:
        """Whether this is greater; False for NaN."""
        return Bool(arith.cmpf(arith.CmpFPredicate.OGT, self.value, _float(other).value))

    def at_least(self, other: "F32 | float") -> Bool:
        """Whether this is greater or the same; False for NaN."""
        return Bool(arith.cmpf(arith.CmpFPredicate.OGE, self.value, _float(other).value))

    def to_integer(self) -> I32:
        """This number without its fraction, as a signed integer."""
        return I32(arith.fptosi(_i32(), self.value))

    def as_bits(self) -> I32:
        """The bits of this number."""
        return I32(llvm.bitcast(_i32(), self.value))


Register: TypeAlias = I32 | F32
_Scalar = TypeVar("_Scalar", I32, I64, F32)


def select(condition: Bool, yes: _Scalar, no: _Scalar) -> _Scalar:
    """`yes` where the condition holds, else `no`."""
    return type(yes)(arith.select(condition.value, yes.value, no.value))


def loop(first: I32, stop: I32, step: int, carry: Sequence[Register], body: Callable) -> list[Any]:
    """`for index in range(first, stop, step): carry = body(index, carry)`, as signed numbers.

    Args:
        first: the first index.
        stop: one past the last index.
        step: a positive number.
        carry: what the body takes and returns, in the same order and of the same types.
        body: gets the index and the list of carried values.
    """
    operation = scf.ForOp(
        first.value, stop.value, I32.constant(step).value, [item.value for item in carry]
    )
    with ir.InsertionPoint(operation.body):
        inner = _like(operation.inner_iter_args, carry)
        result = body(I32(operation.induction_variable), inner)
        scf.yield_([item.value for item in result])
    return _like(operation.results, carry)


def branch(
    condition: Bool, values: Sequence[Register], then: Callable[[list[Any]], Sequence[Register]]
) -> list[Any]:
    """`then(values)` where the condition holds, else the values as they are.

    Threads of a warp may take different ways only if `then` does not let them exchange anything.
    """
    operation = scf.IfOp(condition.value, [item.value.type for item in values], has_else=True)
    with ir.InsertionPoint(operation.then_block):
        scf.yield_([item.value for item in then(list(values))])
    with ir.InsertionPoint(operation.else_block):
        scf.yield_([item.value for item in values])
    return _like(operation.results, values)


def when(condition: Bool, then: Callable[[], None]) -> None:
    """Calls `then`, for its effects on memory, where the condition holds."""
    operation = scf.IfOp(condition.value)
    with ir.InsertionPoint(operation.then_block):
        then()
        scf.yield_([])


def _like(values: Sequence[ir.Value], examples: Sequence[Register]) -> list[Any]:
    return [type(example)(value) for value, example in zip(values, examples, strict=True)]


def _compare(predicate: arith.CmpIPredicate, left: I32, right: I32 | int) -> Bool:
    return Bool(arith.cmpi(predicate, left.value, _integer(right).value))


def _integer(number: I32 | int) -> I32:
    return I32.constant(number) if isinstance(number, int) else number


def _float(number: F32 | float) -> F32:
    return number if isinstance(number, F32) else F32.constant(number)


def _wide(number: I64 | I32 | int) -> I64:
    if isinstance(number, int):
        return I64.constant(number)
    return number.wide() if isinstance(number, I32) else number


def _i32() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def _i64() -> ir.Type:
    return ir.IntegerType.get_signless(64)
