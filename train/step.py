"""One optimizer step as a pure function of the state and a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float32, Int, Int32

from h1bjax.config import LlamaConfig
from train.objective import Losses, losses
from train.student import CODEC, LORA, Scope, student, teacher

LOWEST_RATE = 0.1
"""The learning rate ends at this fraction of its peak."""

CLIPPED_NORM = 1.0
BETA1, BETA2 = 0.9, 0.95

_EXACT = jax.lax.Precision.HIGHEST

SMALLEST_SIZE = 1e-2
"""Arrays of the codec count as at least this large, so that what begins at zero moves too."""


@dataclass(frozen=True)
class Recipe:
    """How parameters are updated. Hashable, so it can be a static argument of `jax.jit`.

    Attributes:
        steps: of the whole job.
        learning_rate: its peak, for weights.
        codec_rate: the same for arrays of the key codec, as a fraction of their size.
        warmup: steps in which the learning rate rises to its peak.
        weight_decay: of matrices; norm weights and biases do not decay.
        next_token: how much the loss on the next token counts.
        distillation: how much the divergence from the teacher counts.
        microbatches: parts of a batch whose gradients are computed one after the other.
        dtype: of the arithmetic, "bfloat16" or "float32"; parameters and gradients are float32.
        remat: whether the backward pass computes again what is cheap, to need less memory.
        scope: what trains, for which cache.
    """

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    codec_rate: float = 3e-3
    next_token: float = 1.0
    distillation: float = 0.0
    microbatches: int = 1
    dtype: str = "bfloat16"
    remat: bool = True
    scope: Scope = field(default_factory=Scope)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes.

    Attributes:
        step: steps taken, int32.
        parameters: what trains, float32, see `train.student`.
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
        losses: before the update.
        gradient_norm: Euclidean norm of the whole gradient before clipping.
    """

    losses: Losses
    gradient_norm: Float32[Array, ""]


def learning_rate(recipe: Recipe, step: Int[Array, ""] | int) -> Float32[Array, ""]:
    """The learning rate of a step, counted from 0: a linear rise, then half a cosine.

    The first step already moves, and the last has a tenth of the peak.
    """
    return recipe.learning_rate * _fraction(recipe, step)


def codec_rate(recipe: Recipe, step: Int[Array, ""] | int) -> Float32[Array, ""]:
    """The same for arrays of the key codec, as a fraction of their size."""
    return recipe.codec_rate * _fraction(recipe, step)


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) for weights, and Adam for the codec, relative to its arrays' size.

    Each of the two clips the norm of its gradient to 1 first.
    """
    weights = optax.chain(
        optax.clip_by_global_norm(CLIPPED_NORM),
        optax.adamw(
            partial(learning_rate, recipe),
            b1=BETA1,
            b2=BETA2,
            weight_decay=recipe.weight_decay,
            mask=_decays,
        ),
    )
    codec = optax.chain(
        optax.clip_by_global_norm(CLIPPED_NORM),
        optax.scale_by_adam(b1=BETA1, b2=BETA2),
        optax.scale_by_param_block_rms(SMALLEST_SIZE),
        optax.scale_by_learning_rate(partial(codec_rate, recipe)),
    )
    return optax.multi_transform({"weights": weights, "codec": codec}, _kinds)


def initial_state(trained: Mapping[str, Array], recipe: Recipe) -> TrainState:
    """The state before the first step.

    Args:
        trained: what trains, see `train.student`, in any floating dtype. Arrays in float32 are
            not copied, so the first step consumes them.
        recipe: of the job.
    """
    masters = {name: jnp.asarray(array, jnp.float32) for name, array in trained.items()}
    return TrainState(jnp.int32(0), masters, make_optimizer(recipe).init(masters))


@partial(jax.jit, static_argnames=("config", "recipe"), donate_argnames="state")
def train_step(
    state: TrainState,
    fixed: Mapping[str, Array],
    windows: Int32[Array, "batch context_and_one"],
    config: LlamaConfig,
    recipe: Recipe,
) -> tuple[TrainState, Metrics]:
    """One update from a batch; the state is consumed.

    Args:
        state: as `initial_state` or an earlier step gave it.
        fixed: what does not train, see `train.student`.
        windows: the batch, a multiple of `recipe.microbatches` in size.
        config: the model's.
        recipe: the same in every step.
    """
    scope = recipe.scope

    def objective(trained: dict[str, Array], part: Array) -> tuple[Float32[Array, ""], Losses]:
        found = losses(
            student(config, scope, trained, fixed, recipe.dtype),
            part,
            teacher=teacher(config, fixed) if recipe.distillation else None,
            compressed=scope.compressed,
            remat=recipe.remat,
        )
        return recipe.next_token * found.next_token + recipe.distillation * found.divergence, found

    def accumulate(total: tuple, part: Array) -> tuple[tuple, None]:
        (_, found), gradient = jax.value_and_grad(objective, has_aux=True)(state.parameters, part)
        return jax.tree.map(jnp.add, total, (found, gradient)), None

    zero = jnp.float32(0)
    nothing = (Losses(zero, zero), jax.tree.map(jnp.zeros_like, state.parameters))
    parts = rearrange(windows, "(m b) t -> m b t", m=recipe.microbatches)
    total, _ = jax.lax.scan(accumulate, nothing, parts)
    mean, gradient = jax.tree.map(lambda array: array / recipe.microbatches, total)

    optimizer = make_optimizer(recipe)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    if scope.has_rotations:
        name = f"{CODEC}projection"
        parameters[name] = nearly_orthogonal(parameters[name])
    metrics = Metrics(mean, optax.tree.norm(gradient))
    return TrainState(state.step + 1, parameters, optimizer_state), metrics


def nearly_orthogonal(
    matrices: Float32[Array, "*stack components head_dim"],
) -> Float32[Array, "*stack components head_dim"]:
    """Matrices that a small step has taken off orthogonality, brought back to it.

    One step of Newton's iteration for the polar factor (Björck and Bowie, SIAM J. Numer. Anal.
    1971), which squares the error. It works for orthonormal rows as for orthonormal columns.
    """
    gram = jnp.einsum("...cd,...ce->...de", matrices, matrices, precision=_EXACT)
    return 1.5 * matrices - 0.5 * jnp.einsum("...cd,...de->...ce", matrices, gram, precision=_EXACT)


def _fraction(recipe: Recipe, step: Int[Array, ""] | int) -> Float32[Array, ""]:
    """The learning rate of a step as a fraction of its peak."""
    done = jnp.asarray(step, jnp.float32) + 1
    rise = done / max(recipe.warmup, 1)
    progress = (done - recipe.warmup) / max(recipe.steps - recipe.warmup, 1)
    cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    return jnp.where(done < recipe.warmup, rise, LOWEST_RATE + (1 - LOWEST_RATE) * cosine)


def _decays(parameters: Mapping[str, Array]) -> dict[str, bool]:
    return {
        name: not name.endswith(("norm", "bias")) and not name.startswith(LORA)
        for name in parameters
    }


def _kinds(parameters: Mapping[str, Array]) -> dict[str, str]:
    return {name: "codec" if name.startswith(CODEC) else "weights" for name in parameters}
