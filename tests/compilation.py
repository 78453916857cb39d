"""How tests compile."""

QUICKLY = {"xla_backend_optimization_level": 0}
"""Options of `jax.jit`: most tests spend their time on compilation, which this halves."""
