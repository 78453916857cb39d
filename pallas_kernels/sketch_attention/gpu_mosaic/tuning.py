"""How work is divided over a GPU: measured choices, as data."""

from dataclasses import replace
from typing import Any

import jax

from pallas_kernels.sketch_attention.gpu_mosaic.plan import TILE, Plan

PROCESSORS = 132
"""Multiprocessors of an H100, assumed where no GPU can be asked."""
WARPS_PER_PROCESSOR = 16
"""Warps that a multiprocessor holds at the kernel's use of registers."""
WARPGROUPS = 2
STAGES = 2
TILES_PER_WARP = 4
"""Below so many tiles a warp's start and end cost more than another split gains."""
MOST_SPLITS = 128
SHARED_BYTES = 227 * 1024
"""Shared memory that a block may have."""


def divide(**call: Any) -> Plan:
    """The plan of a call: its facts, and how many splits and warps to use."""
    plan = Plan(**call, stages=STAGES, splits=1, warpgroups=WARPGROUPS)
    while plan.shared.size > SHARED_BYTES and plan.warpgroups > 1:
        plan = replace(plan, warpgroups=plan.warpgroups // 2)
    while plan.shared.size > SHARED_BYTES and plan.stages > 2:
        plan = replace(plan, stages=plan.stages - 1)
    return replace(plan, splits=_splits(plan, processors()))


def processors() -> int:
    """Multiprocessors of the default device."""
    return getattr(jax.devices()[0], "core_count", PROCESSORS)


def _splits(plan: Plan, processors: int) -> int:
    """The number of splits that leaves the fewest processors idle, the smallest of equals."""
    rows = plan.batch * plan.kv_heads
    slots = processors * max(1, WARPS_PER_PROCESSOR // plan.warps)
    tiles = plan.tokens // TILE
    most = max(1, min(MOST_SPLITS, tiles // (TILES_PER_WARP * plan.warps)))

    def waste(splits: int) -> float:
        blocks = rows * splits
        waves = -(-blocks // slots)
        return waves * slots / blocks

    return min(range(1, most + 1), key=lambda splits: (round(waste(splits), 2), splits))

