"""One optimizer step as a pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float32, Int, Int32

from h1bjax.config import LlamaConfig
from h1bjax.decoder import Decoder
from train.objective import next_token_nats

LOWEST_RATE = 0.1
"""The learning rate ends at this fraction of its peak."""

CLIPPED_NORM = 1.0
BETA1, BETA2 = 0.9, 0.95


@dataclass(frozen=True)
class Recipe:
    """How parameters are updated. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        steps: of the whole job.
        learning_rate: its peak.
        warmup: steps in which the learning rate rises to its peak.
        weight_decay: of matrices; norm weights and biases do not decay.
        microbatches: parts of a batch whose gradients are computed one after the other.
        dtype: of the arithmetic, "bfloat16" or "float32"; parameters and gradients are float32.
        remat: whether the backward pass computes again what is cheap, to need less memory.
    """

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    microbatches: int = 1
    dtype: str = "bfloat16"
    remat: bool = True


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: steps taken, int32.
        parameters: float32, by the names of `decoder_parameters`.
        optimizer: the state of `make_optimizer`.
    """

    step: Int32[Array, ""]
    parameters: dict[str, Float32[Array, "..."]]
    optimizer: optax.OptState


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Metrics:
    """What is worth knowing of a step.

    Attributes:
        loss: mean nats per token before the update.
        gradient_norm: Euclidean norm of the whole gradient before clipping.
    """

    loss: Float32[Array, ""]
    gradient_norm: Float32[Array, ""]


def learning_rate(recipe: Recipe, step: Int[Array, ""] | int) -> Float32[Array, ""]:
    """The learning rate of a step, counted from 0: a linear rise, then half a cosine.

    The first step already moves, and the last has a tenth of the peak.
    """
    done = jnp.asarray(step, jnp.float32) + 1
    rise = done / max(recipe.warmup, 1)
    progress = (done - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    fraction = jnp.where(done < recipe.warmup, rise, LOWEST_RATE + (1 - LOWEST_RATE) * cosine)
    return recipe.learning_rate * fraction


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping the norm of the gradient to 1."""
    return optax.chain(
        optax.clip_by_global_norm(CLIPPED_NORM),
        optax.adamw(
            partial(learning_rate, recipe),
            b1=BETA1,
            b2=BETA2,
            weight_decay=recipe.weight_decay,
            mask=_decays,
        ),
    )


def initial_state(parameters: Mapping[str, Array], recipe: Recipe) -> TrainState:
    """The state before the first step.

    Args:
        parameters: what `decoder_parameters` lists, in any floating dtype. Those in float32 are
            not copied, so the first step consumes them.
        recipe: of the job.
    """
    masters = {name: jnp.asarray(array, jnp.float32) for name, array in parameters.items()}
    return TrainState(jnp.int32(0), masters, make_optimizer(recipe).init(masters))


def compute_decoder(config: LlamaConfig, parameters: Mapping[str, Array], dtype: str) -> Decoder:
    """The decoder of master parameters, its layers' matrices and biases cast to `dtype`.

    The others stay as they are: their gradients are sums over many tokens, which 16 bits would
    round away.
    """

    def cast(name: str, array: Array) -> Array:
        wide = name in ("embedding", "unembedding") or name.endswith("norm")
        return array if wide else array.astype(dtype)

    return Decoder(config, {name: cast(name, array) for name, array in parameters.items()})


@partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames="state")
def train_step(
    state: TrainState,
    windows: Int32[Array, "batch context_and_one"],
    config: LlamaConfig,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One update from a batch; the state is consumed.

    Args:
        state: as `initial_state` or an earlier step gave it.
        windows: the batch, a multiple of `recipe.microbatches` in size.
        config: the model's.
        recipe: the same in every step.
    """

    def loss(parameters: dict[str, Array], part: Array) -> Float32[Array, ""]:
        decoder = compute_decoder(config, parameters, recipe.dtype)
        return next_token_nats(decoder, part, remat=recipe.remat)

    def accumulate(total: tuple, part: Array) -> tuple[tuple, None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(state.parameters, part)), None

    nothing = (jnp.float32(0), jax.tree.map(jnp.zeros_like, state.parameters))
    parts = rearrange(windows, "(m b) t -> m b t", m=recipe.microbatches)
    total, _ = jax.lax.scan(accumulate, nothing, parts)
    mean, gradient = jax.tree.map(lambda array: array / recipe.microbatches, total)

    optimizer = make_optimizer(recipe)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    metrics = Metrics(mean, optax.tree.norm(gradient))
    return TrainState(state.step + 1, parameters, optimizer_state), metrics


def _decays(parameters: Mapping[str, Array]) -> dict[str, bool]:
    return {name: not name.endswith(("norm", "bias")) for name in parameters}
