"""How work is divided over a GPU: measured choices, as data."""

from dataclasses import replace
from typing import Any

from pallas_kernels.mosaic_gpu.launch import SHARED_BYTES
from pallas_kernels.mosaic_gpu.splitting import choose_splits, processors
from pallas_kernels.sketch_attention.gpu_mosaic.plan import TILE, Plan

WARPS_PER_PROCESSOR = 16
"""Warps that a multiprocessor holds at the kernel's use of registers."""
WARPGROUPS = 2
"""Of most kernels, which use up to 128 registers: two blocks share a multiprocessor."""
TIGHT_WARPGROUPS = 4
"""Of kernels that would use more: the compiler limits blocks of 512 threads to 128 registers."""
STAGES = 2
OVERHEAD = 2.0
"""Cost of a block's start and end, in tiles of a warp."""


def divide(**call: Any) -> Plan:
    """The plan of a call: its facts, and how many splits and warps to use."""
    plan = Plan(**call, stages=STAGES, splits=1, warpgroups=WARPGROUPS)
    if _tight(plan):
        plan = replace(plan, warpgroups=TIGHT_WARPGROUPS)
    while plan.shared.size > SHARED_BYTES and plan.warpgroups > 1:
        plan = replace(plan, warpgroups=plan.warpgroups // 2)
    splits = choose_splits(
        plan.batch * plan.kv_heads,
        slots=processors() * max(1, WARPS_PER_PROCESSOR // plan.warps),
        tiles=plan.tokens / (TILE * plan.warps),
        overhead=OVERHEAD * plan.tiles_per_group,
    )
    return replace(plan, splits=splits)


def _tight(plan: Plan) -> bool:
    """Whether a kernel would use somewhat more than 128 registers, but can do with as many."""
    demanding = plan.key_reads > 1 or plan.period is not None
    return demanding and plan.operands == 1 and plan.head_dim <= 128
