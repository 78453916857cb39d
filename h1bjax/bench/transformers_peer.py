"""The peer: the same decode steps in transformers, with a static cache and torch.compile."""

import inspect
import time
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from h1bjax.bench.case import Case, Measured, versions

_WARM_STEPS = 3


def measure(case: Case) -> Measured:
    """Decodes greedily with random weights from a static cache full of random keys and values.

    `case.preset` is only a name here. The compiled function is one step, as transformers'
    `generate` compiles it; a run is `case.steps` of them.

    Raises:
        ValueError: a largest batch is asked for, or the runs are longer than the context.
        RuntimeError: the device's memory does not suffice (`torch.OutOfMemoryError`).
    """
    if case.batch is None:
        raise ValueError("a largest batch is found for caches of this library alone")
    filled = case.context - case.steps * case.repetitions - _WARM_STEPS
    if filled <= 0:
        raise ValueError(
            f"{case.repetitions} runs of {case.steps} steps follow each other in a context of "
            f"{case.context} tokens, and do not fit"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _random_model(case, device)
    with torch.inference_mode():
        cache = _filled_cache(case, model, device, filled)
        return _timed(case, model, cache, device, filled)


def _timed(case: Case, model: Any, cache: Any, device: torch.device, filled: int) -> Measured:
    assert case.batch is not None
    takes_position = "cache_position" in inspect.signature(model.forward).parameters

    def step(tokens: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        where = {"cache_position": position} if takes_position else {}
        out = model(tokens, past_key_values=cache, use_cache=True, **where)
        return out.logits[:, -1].argmax(dim=-1, keepdim=True)

    compiled = torch.compile(step, mode="reduce-overhead")
    tokens = torch.zeros((case.batch, 1), dtype=torch.long, device=device)
    position = torch.tensor([filled], device=device)

    def run(steps: int) -> float:
        nonlocal tokens
        begin = time.perf_counter()
        for _ in range(steps):
            # A CUDA graph writes its result where the last one is: keep that elsewhere.
            tokens = compiled(tokens, position).clone()
            position.add_(1)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    compile_seconds = run(_WARM_STEPS)
    seconds = [run(case.steps) / case.steps for _ in range(case.repetitions)]
    on_gpu = device.type == "cuda"
    return Measured.from_runs(
        seconds,
        name=case.preset,
        device=torch.cuda.get_device_name() if on_gpu else device.type,
        versions=versions("torch", "transformers", "triton"),
        batch=tokens.shape[0],
        tokens=tokens.shape[0],
        cache_nbytes=sum(
            part.nbytes for layer in cache.layers for part in (layer.keys, layer.values)
        ),
        weights_nbytes=sum(parameter.nbytes for parameter in model.parameters()),
        peak_nbytes=torch.cuda.max_memory_allocated() if on_gpu else None,
        device_nbytes=torch.cuda.mem_get_info()[1] if on_gpu else None,
        compile_seconds=compile_seconds,
        notes=(f"attention {model.config._attn_implementation}",),
    )


def _random_model(case: Case, device: torch.device) -> Any:
    written = case.config.to_hf()
    config = AutoConfig.for_model(written.pop("model_type"), **written)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, case.dtype))
    return model.eval()


def _filled_cache(case: Case, model: Any, device: torch.device, filled: int) -> Any:
    config = case.config
    cache: Any = StaticCache(config=model.config, max_cache_len=case.context)
    shape: Any = (case.batch, config.num_kv_heads, filled, config.head_dim)
    where = {"cache_position": torch.arange(filled, device=device)}
    for layer in range(config.num_layers):
        keys, values = (torch.randn(shape, dtype=model.dtype, device=device) for _ in "kv")
        cache.update(keys, values, layer, where)
    return cache
