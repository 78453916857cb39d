"""How commands print what they found: JSON on stdout, summaries of the cache on stderr."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h1bjax.cache import KVCache
    from h1bjax.model import Model


def cache_report(model: Model, cache: KVCache) -> dict[str, Any]:
    """What a cache costs, and what a bf16 cache of the same batch and capacity would."""
    from h1bjax.cache import CacheSpec

    exact = CacheSpec.preset("exact")
    return {
        "preset": cache.spec.name,
        "nbytes": cache.nbytes,
        "bf16_nbytes": exact.nbytes(model.config, batch=cache.batch, max_length=cache.capacity),
    }


def print_json(value: Any) -> None:
    """One line of JSON on stdout."""
    print(json.dumps(value, allow_nan=False))


def print_summary(model: Model, cache: KVCache, tokens: int, speed: float | None) -> None:
    """What a generation cost and how fast it was, on stderr. `speed` is in tokens/s."""
    decoded = f"{tokens} new tokens" if speed is None else f"{speed:.1f} tokens/s"
    print_cache(cache_report(model, cache), decoded)


def print_cache(report: dict[str, Any], *more: str) -> None:
    """One line about a cache on stderr, of what `cache_report` returns."""
    size, bf16 = report["nbytes"], report["bf16_nbytes"]
    parts = [
        f"{human_bytes(size)}, in bf16 {human_bytes(bf16)} ({bf16 / size:.2f} times as much)",
        *more,
    ]
    print(f"cache {report['preset']}: {'; '.join(parts)}", file=sys.stderr)


def human_bytes(count: int) -> str:
    """A number of bytes in decimal units."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"
