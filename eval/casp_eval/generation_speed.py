"""How fast a whole model writes: a Llama of the 1B shape, dense and with quantized linears, in the same rounds."""

import statistics
import time
from collections.abc import Mapping

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from casp_eval.random_layers import random_layer

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 12,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
QUANTIZED = (("trellis", 2), ("trellis", 4), ("e8p", 2), ("gptq", 4))
PROMPT, ROUNDS = 8, 3  # tokens, times that each contender writes
Linears = Mapping[str, nn.Module]


def random_llama(shape: Mapping[str, int], device: torch.device) -> LlamaForCausalLM:
    """A Llama in bfloat16 with random weights."""
    config = LlamaConfig(**shape, dtype=torch.bfloat16)
    with device:
        return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def linears_of(model: LlamaForCausalLM) -> dict[str, nn.Module]:
    """Name -> linear of the decoder's blocks; the head stays as it is."""
    return {name: module for name, module in model.model.named_modules() if isinstance(module, nn.Linear)}


def put(model: LlamaForCausalLM, linears: Linears) -> None:
    """Make these the decoder's linears."""
    for name, module in linears.items():
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, module)


def seconds_per_token(model: LlamaForCausalLM, tokens: int, device: torch.device) -> float:
    """The time of one token after the prompt, prefill left out: of 1 + tokens less that of 1."""
    prompt = torch.arange(PROMPT, device=device)[None]
    mask = torch.ones_like(prompt)

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        model.generate(prompt, attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return (seconds(1 + tokens) - seconds(1)) / tokens


def measure_generation(
    tokens: int, device: torch.device, shape: Mapping[str, int] = SHAPE, rounds: int = ROUNDS
) -> list[dict[str, object]]:
    """Rows of speed.json: the dense model, then each of QUANTIZED; medians of rounds after one that warms up."""
    model = random_llama(shape, device)
    dense = linears_of(model)
    models: dict[tuple[str, int], Linears] = {("dense", 16): dense}
    for family, bits in QUANTIZED:
        models[family, bits] = {
            name: random_layer(family, bits, one.out_features, one.in_features, device) for name, one in dense.items()
        }
    times: dict[tuple[str, int], list[float]] = {name: [] for name in models}
    with torch.inference_mode():
        for _ in range(rounds + 1):
            for name, linears in models.items():
                put(model, linears)
                times[name].append(seconds_per_token(model, tokens, device))
    rows = []
    for (family, bits), values in times.items():
        seconds = statistics.median(values[1:])
        speedup = statistics.median(times["dense", 16][1:]) / seconds
        print(f"{family:>10} {bits:>3} bits {1 / seconds:>8.2f} tokens/s {speedup:>6.2f}x", flush=True)
        rows.append(
            {
                "codebook": family,
                "bits": bits,
                "tokens": tokens,
                "device": device.type,
                "seconds_per_token": seconds,
                "speedup_vs_dense": speedup,
                "least_seconds_per_token": min(values[1:]),
            }
        )
    return rows
