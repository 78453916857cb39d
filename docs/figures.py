"""Draws the figures of the documentation from the library itself.

    python docs/figures.py

writes them into docs/figures, from where pages show them. Needs the extra `train`, for matplotlib.
"""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from jaxtyping import Array, Float, Key
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from h1bjax.bench.shapes import SHAPES
from h1bjax.cache import PRESETS, CacheSpec, ChannelQuantisedKeys
from h1bjax.cache.fitting.sample import KeySample

FOLDER = Path(__file__).parent / "figures"
HEAD_DIM = 128
EXACT = "exact"

PARTS = MappingProxyType(
    {
        "key bits": "#2a6f97",
        "key scalars": "#89c2d9",
        "value codes": "#e07b00",
        "value scales and zeros": "#f5c48b",
        "exact keys and values": "#9a9a9a",
    }
)
"""Colours of the parts of a token's bytes."""

SHOWN = ("exact", "kivi-4", "h1b-2plane", "h1b-paper", "kivi-2", "h1b", "h1b-256-v2", "h1b-v2",
         "h1b-64-p32-v2")  # fmt: skip


def parts(spec: CacheSpec, head_dim: int) -> dict[str, float]:
    """Bytes of one more token in one KV head, by what they hold; bf16 where it is exact."""
    found = dict.fromkeys(PARTS, 0.0)
    if spec.exact:
        return found | {"exact keys and values": float(spec.bytes_per_token(head_dim))}
    assert spec.keys is not None and spec.values is not None
    found["value scales and zeros"] = 4.0 * spec.values.groups(head_dim)
    found["value codes"] = 4.0 * spec.values.words(head_dim)
    if isinstance(spec.keys, ChannelQuantisedKeys):
        found["key bits"] = 4.0 * spec.keys.words(head_dim)
        found["key scalars"] = 4.0 * head_dim / spec.keys.group
    else:
        found["key bits"] = spec.keys.sketch_bits(head_dim) / 8
        found["key scalars"] = 2.0 * spec.keys.scaled
    return found


def draw_bytes() -> Figure:
    """Bytes of a token in one KV head, and what they are for."""
    figure = Figure(figsize=(8.5, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(reversed(SHOWN)):
        spec, left = PRESETS[name], 0.0
        for part, count in parts(spec, HEAD_DIM).items():
            axes.barh(row, count, left=left, color=PARTS[part], height=0.7)
            left += count
        total = spec.bytes_per_token(HEAD_DIM)
        ratio = PRESETS[EXACT].bytes_per_token(HEAD_DIM) / total
        smaller = "" if spec.exact else f", {ratio:.1f} × smaller"
        axes.text(left + 5, row, f"{total} bytes{smaller}", va="center", fontsize=9)
    axes.set_yticks(range(len(SHOWN)), reversed(SHOWN))
    axes.set_xlabel(f"bytes per token and KV head of {HEAD_DIM} channels, without the window")
    axes.set_xlim(0, 620)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in PARTS.values()]
    axes.legend(handles, list(PARTS), frameon=False, loc="lower right")
    _plain(axes)
    axes.grid(visible=False, axis="y")
    return figure


def draw_memory() -> Figure:
    """Bytes of one sequence's whole cache by its length, for Llama-3-8B."""
    figure = Figure(figsize=(8.5, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    config = SHAPES["llama-3-8b"]
    lengths = 2 ** np.arange(8, 18)
    for name, colour in (
        ("exact", "#9a9a9a"),
        ("kivi-4", "#e07b00"),
        ("h1b", "#2a8f3a"),
        ("h1b-v2", "#2a6f97"),
        ("sinks-window", "#d62728"),
    ):
        sizes = [PRESETS[name].nbytes(config, batch=1, max_length=int(n)) / 1e6 for n in lengths]
        axes.plot(lengths, sizes, color=colour, marker="o", markersize=3, clip_on=False)
        size = f"{sizes[-1] / 1000:.1f} GB" if sizes[-1] >= 1000 else f"{sizes[-1]:.0f} MB"
        axes.text(lengths[-1] * 1.1, sizes[-1], f"{name}, {size}", color=colour, va="center")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlim(lengths[0], lengths[-1])
    axes.set_xticks(lengths, [f"{n}" if n < 1024 else f"{n // 1024}k" for n in lengths])
    axes.set_yticks([10, 100, 1000, 10_000], ["10 MB", "100 MB", "1 GB", "10 GB"])
    axes.minorticks_off()
    axes.set_xlabel("tokens of the sequence (1k is 1024)", loc="left")
    axes.set_title("Cache of one sequence, Llama 3 8B", loc="left", fontsize=11)
    _plain(axes)
    return figure


def draw_window() -> Figure:
    """Which tokens a query reads exactly, and which from their codes."""
    figure = Figure(figsize=(8.5, 3.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    tokens, sinks, window = 40, 4, 12
    exact, coded = "#9a9a9a", "#2a6f97"
    for token in range(tokens):
        recent = token < sinks or token >= tokens - window
        axes.add_patch(Rectangle((token, 2), 0.85, 0.85, color=coded))
        if recent:
            axes.add_patch(Rectangle((token, 0.8), 0.85, 0.85, color=exact))
            axes.add_patch(
                Rectangle((token, 2), 0.85, 0.85, facecolor="white", alpha=0.7, edgecolor=coded)
            )
    axes.text(-0.6, 2.42, "codes", ha="right", va="center")
    axes.text(tokens - window / 2, 3.05, "stored, not yet read", ha="center", color=coded)
    axes.text(-0.6, 1.22, "exact", ha="right", va="center")
    middle = (sinks + tokens - window) / 2
    axes.annotate(
        "one softmax over the codes of these tokens",
        (middle, 2.95), (middle, 3.6), ha="center",
        arrowprops={"arrowstyle": "-[, widthB=14.5", "color": coded},
    )  # fmt: skip
    for place, text in ((sinks / 2, "first S"), (tokens - window / 2, "latest W")):
        axes.text(place, 0.35, text, ha="center", va="center")
    axes.text(
        middle, 1.22, "one softmax over the exact tokens,\nmerged by log-sum-exp",
        ha="center", va="center",
    )  # fmt: skip
    axes.annotate(
        "query", (tokens - 0.1, 2.42), (tokens + 2, 2.42), va="center",
        arrowprops={"arrowstyle": "->"},
    )  # fmt: skip
    axes.set_xlim(-5, tokens + 5)
    axes.set_ylim(0, 4.1)
    axes.set_axis_off()
    return figure


def draw_scores() -> Figure:
    """True logits of random keys beside those from their codes."""
    sample, keys, queries = _samples()
    true = queries @ keys[:, 0].T / HEAD_DIM**0.5
    figure = Figure(figsize=(9.5, 3.9), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, name in zip(panels, ("h1b-paper", "h1b-signs", "h1b"), strict=True):
        read = _coded_logits(PRESETS[name], sample, keys, queries)
        correlation = np.corrcoef(np.ravel(true), np.ravel(read))[0, 1]
        axes.scatter(np.ravel(true), np.ravel(read), s=2, color="#2a6f97", alpha=0.15, linewidths=0)
        axes.axline((0, 0), slope=1, color="#404040", linewidth=0.8)
        bits = PRESETS[name].bytes_per_token(HEAD_DIM) - sum(
            parts(PRESETS[name], HEAD_DIM)[part]
            for part in ("value codes", "value scales and zeros")
        )
        axes.set_title(f"{name}: {bits:.0f} bytes a key\ncorrelation {correlation:.3f}")
        axes.set_xlabel("true logit")
        _plain(axes)
        axes.set_xlim(-5.5, 5.5)
        axes.set_ylim(-5.5, 5.5)
        axes.set_aspect("equal")
    panels[0].set_ylabel("logit from the code")
    return figure


def _samples() -> tuple[
    KeySample, Float[Array, "keys 1 head_dim"], Float[Array, "queries head_dim"]
]:
    """What codecs are fitted to, and other keys and queries of the same distributions.

    Directions matter unequally, about as much as those of trained models' keys after RoPE: their
    variances have a participation ratio of 48 of 128.
    """
    fit_rng, key_rng, query_rng, basis_rng = jax.random.split(jax.random.key(0), 4)
    basis = jax.random.orthogonal(basis_rng, HEAD_DIM)
    spread = jnp.arange(1, HEAD_DIM + 1) ** -0.35
    spread = spread * (HEAD_DIM / jnp.sum(spread**2)) ** 0.5

    def keys(rng: Key[Array, ""], count: int) -> Float[Array, "keys head_dim"]:
        return (spread * jax.random.normal(rng, (count, HEAD_DIM))) @ basis

    queries = jax.random.normal(query_rng, (32, HEAD_DIM))
    sample = KeySample(keys(fit_rng, 4096)[None], jnp.eye(HEAD_DIM)[None])
    return sample, keys(key_rng, 512)[:, None], queries


def _coded_logits(
    spec: CacheSpec,
    sample: KeySample,
    keys: Float[Array, "keys 1 head_dim"],
    queries: Float[Array, "queries head_dim"],
) -> Float[Array, "queries keys"]:
    """Raw logits as a cache of this spec scores them, after its codec was fitted to the sample."""
    codec = spec.sketch
    assert codec is not None
    fitted = codec.fit(jax.random.key(1), sample, heads=1)
    encoded = codec.encode(fitted, keys)
    read = queries @ codec.query_transform(fitted)[0]
    if codec.signed_query:
        read = jnp.where(read >= 0, 1.0, -1.0)
    scale = 1.0 if encoded.scale is None else encoded.scale[:, 0].astype(jnp.float32)
    shared = queries @ fitted.mean[0] / HEAD_DIM**0.5
    return codec.logit_scale(HEAD_DIM) * scale * (read @ encoded.signs[:, 0].T) + shared[:, None]


def _plain(axes: Axes) -> None:
    axes.grid(color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


FIGURES: MappingProxyType[str, Callable[[], Figure]] = MappingProxyType(
    {
        "bytes": draw_bytes,
        "memory": draw_memory,
        "window": draw_window,
        "scores": draw_scores,
    }
)
"""The figures by their names."""


def main() -> None:
    """Draws all of them."""
    matplotlib.use("Agg")
    FOLDER.mkdir(exist_ok=True)
    for name, draw in FIGURES.items():
        draw().savefig(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
