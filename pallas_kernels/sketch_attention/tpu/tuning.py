"""How work is divided, as data; docs/tpu_cost.md has the figures behind it."""

from typing import Any

from pallas_kernels.sketch_attention.tpu.plan import LANES, SUBLANES, Method, Plan

STEP_TOKENS = 32768
"""Tokens times heads of a grid step: enough to keep all units busy, not too many for short rows."""
TURNED_STEP_TOKENS = 8192
"""The same where the RoPE period is finite, which takes more room."""
BLOCKS = (1024, 8192)
"""The shortest and longest block of tokens."""
SIGNED: Method = "popcount"
"""How signed queries are scored: 3 % faster than by "mxu" on v5e, 6 % slower on v6e."""
QUERY_PLANES = 2
"""Signed bytes of a query's coefficient: the second costs next to nothing."""


def divide(*, signed: bool, tokens: int, kv_heads: int, period: int | None, **call: Any) -> Plan:
    """The plan of a call: its facts, and how much a grid step reads."""
    # Rows of scalars can be divided only where each part fills whole registers.
    heads = SUBLANES if kv_heads % SUBLANES == 0 else kv_heads
    shortest, longest = BLOCKS
    step_tokens = STEP_TOKENS if period is None else TURNED_STEP_TOKENS
    block = min(max(step_tokens // heads, shortest), longest) // (2 * LANES) * (2 * LANES)
    return Plan(
        tokens=tokens,
        kv_heads=kv_heads,
        period=period,
        method=SIGNED if signed else "mxu",
        query_planes=1 if signed else QUERY_PLANES,
        step_heads=heads,
        block=min(block, tokens),
        **call,
    )
