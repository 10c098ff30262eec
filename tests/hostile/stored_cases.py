"""Tables of hostile weights: headers that lie, numbers that overflow, packed tensors of another format."""

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from case import BAD_VALUES, OTHER_JSON, Case, Damage, edited, nothing, put, single_shard
from safetensors.torch import load_file, save_file


def header_of(shard: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header: bytes | dict[str, Any], data: bytes, length: int | None = None) -> bytes:
    """A safetensors file of this header (length: what it claims to take) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def reheaded(change: Callable[[dict[str, Any], bytes], bytes]) -> Damage:
    """Puts what `change` makes of header and data in the place of the weights."""

    def damage(folder: Path) -> None:
        shard = single_shard(folder)
        shard.write_bytes(change(*header_of(shard)))

    return damage


FIRST = "model.layers.1.mlp.up_proj.weight"


def entry(key: str, value: Any, name: str = FIRST) -> Callable[[dict[str, Any], bytes], bytes]:
    """Sets `key` in the header's entry of tensor `name`."""

    def change(header: dict[str, Any], data: bytes) -> bytes:
        header[name][key] = value
        return with_header(header, data)

    return change


def retyped(folder: Path, dtype: torch.dtype, name: str = FIRST) -> None:
    """Stores tensor `name` as `dtype`."""
    shard = single_shard(folder)
    tensors = load_file(shard)
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, shard, {"format": "pt"})


def header_cases() -> Iterator[Case]:
    """Headers of safetensors files that lie about types, shapes, places and lengths."""
    texts = {label: data for label, data in OTHER_JSON.items() if label != "object"}
    changes: dict[str, Callable[[dict[str, Any], bytes], bytes]] = {
        f"header: {label}": lambda header, data, text=text: with_header(text, data) for label, text in texts.items()
    }
    for length in (0, 1, 10**6, 2**31, 2**63, 2**64 - 1):
        changes[f"header length {length}"] = lambda header, data, n=length: with_header(header, data, n)
    for label, value in BAD_VALUES.items():
        for key in ("dtype", "shape", "data_offsets"):
            changes[f"{key}={label}"] = entry(key, value)
        changes[f"entry={label}"] = lambda header, data, v=value: with_header(header | {FIRST: v}, data)
        changes[f"shape of {label}"] = entry("shape", [96, value])
        changes[f"offsets of {label}"] = entry("data_offsets", [0, value])
    for dtype in ("F8_E4M3", "F8_E5M2", "I64", "BOOL", "C64", "F4", "F6_E2M3", "I4", "f32", "F32 ", "", "X" * 1000):
        changes[f"dtype {dtype[:10]!r}"] = entry("dtype", dtype)
    for shape in ([96], [64, 96], [96, 64, 1], [], [2**62, 2**62], [2**32, 2**32], [0, 64], [-96, -64], [[96], 64]):
        changes[f"shape {shape}"] = entry("shape", shape)
    for offsets in ([0], [0, 1, 2], [10, 0], [-8, 24568], [10**15, 10**15 + 24576], [1, 24577], ["0", "24576"]):
        changes[f"offsets {offsets}"] = entry("data_offsets", offsets)
    changes["no data"] = lambda header, data: with_header(header, b"")
    changes["half of the data"] = lambda header, data: with_header(header, data[: len(data) // 2])
    changes["data behind the end"] = lambda header, data: with_header(header, data + bytes(100))
    changes["only a length"] = lambda header, data: struct.pack("<Q", 100)
    changes["three bytes"] = lambda header, data: b"abc"
    changes["a tensor twice in one place"] = lambda header, data: with_header(
        header | {"lm_head.weight": header[FIRST]}, data
    )
    changes["a tensor missing"] = lambda header, data: with_header(
        {k: v for k, v in header.items() if k != FIRST}, data
    )
    changes["metadata is a list"] = lambda header, data: with_header(header | {"__metadata__": []}, data)
    changes["metadata of numbers"] = lambda header, data: with_header(header | {"__metadata__": {"a": 1}}, data)
    for number, (name, change) in enumerate(changes.items()):
        yield Case("header", name, ("gptq", "perplexity")[number % 2], "llama", reheaded(change))
    for dtype in (torch.float8_e4m3fn, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.int8):
        for command in ("gptq", "perplexity", "svd"):
            yield Case("header", f"stored as {dtype}", command, "llama", lambda f, d=dtype: retyped(f, d))


def stored(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """Changes the tensors of a checkpoint in place, shard by shard."""

    def damage(folder: Path) -> None:
        for shard in sorted(folder.glob("*.safetensors")):
            tensors = load_file(shard)
            before = {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tensors.items()}
            change(tensors)
            if before != {name: (tensor.data_ptr(), tensor.dtype) for name, tensor in tensors.items()}:
                save_file(tensors, shard, {"format": "pt"})

    return damage


def replace(ending: str, make: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[dict], None]:
    """Puts `make` of every tensor whose name ends so in its place; None removes it."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(ending)]:
            new = make(tensors.pop(name))
            if new is not None:
                tensors[name] = new.clone()

    return change


def number_cases() -> Iterator[Case]:
    """Weights that are finite but overflow on the way, and those that are not finite."""
    huge = {value: replace("up_proj.weight", lambda t, v=value: torch.full_like(t, v)) for value in (3e38, 1e30, 1e20)}
    for command in ("svd", "gptq", "quip", "tuned", "moments", "perplexity"):
        for value, change in huge.items():
            yield Case("numbers", f"up filled with {value:g}", command, "llama", stored(change), refuse=False)
        for ending in ("layers.1.self_attn.q_proj.weight", "layers.1.mlp.down_proj.weight", "embed_tokens.weight"):
            for value in (1e19, 1e38):
                grow = replace(ending, lambda t, v=value: t * v)
                yield Case("numbers", f"{ending} times {value:g}", command, "llama", stored(grow), refuse=False)
            for value in (float("nan"), float("inf")):
                spoil = replace(ending, lambda t, v=value: t.index_fill(0, torch.tensor([1]), v))
                yield Case("numbers", f"{ending} has {value}", command, "llama", stored(spoil))
            lose = replace(ending, lambda t: None)
            yield Case("numbers", f"{ending} is missing", command, "llama", stored(lose))
            crop = replace(ending, lambda t: t[:-1])
            yield Case("numbers", f"{ending} is cropped", command, "llama", stored(crop))
        zero = replace("up_proj.weight", torch.zeros_like)
        yield Case("numbers", "up is zero", command, "llama", stored(zero), refuse=False)
        half = replace("q_proj.weight", lambda t: (t * 1e30).bfloat16())
        yield Case("numbers", "attention overflows", command, "llama", stored(half), refuse=False)


def compression(change: Callable[[dict[str, Any]], Any]) -> Damage:
    """Changes the quantization_config."""

    def whole(config: dict[str, Any]) -> dict[str, Any]:
        changed = change(config["quantization_config"])
        return config if changed is None else config | {"quantization_config": changed}

    return edited("config.json", whole)


PACKED = {
    "gptq": ("qweight", "qzeros", "scales"),
    "quip": ("codes", "out_signs", "in_signs", "scale"),
    "aqlm": ("codes", "codebooks", "scales"),
}


def compressed_cases() -> Iterator[Case]:
    """Compressed checkpoints whose tensors or description are not those of their format."""
    number = 0
    for base, names in PACKED.items():
        for name in names:
            makes: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
                "missing": lambda t: None,
                "float64": lambda t: t.double(),
                "int64": lambda t: t.long(),
                "int8": lambda t: t.to(torch.int8),
                "bool": lambda t: t.bool(),
                "one more row": lambda t: torch.cat([t.reshape(-1, *t.shape[1:]), t.reshape(-1, *t.shape[1:])[:1]]),
                "flattened": lambda t: t.reshape(-1, 1),
            }
            if name in ("scales", "scale", "codebooks"):
                makes["NaN"] = lambda t: torch.full_like(t, float("nan"))
                makes["infinite"] = lambda t: torch.full_like(t, float("inf"))
            for label, make in makes.items():
                change = stored(replace("q_proj." + name, make))
                yield Case("compressed", f"{base} {name}: {label}", ("perplexity", "load")[number % 2], base, change)
                number += 1
        for key in ("quant_method", "version", "backend", "original_weights", "modules"):
            for label in ("null", "text", "list", "object", "negative", "fraction", "nan", "beyond int64"):
                change = compression(put(key, BAD_VALUES[label]))
                certain = key != "version"
                # An unknown method never comes to our quantizer: from_pretrained alone is transformers' affair then.
                command = ("perplexity", "compare" if key == "quant_method" else "load", "compare")[number % 3]
                yield Case("compressed", f"{base} {key}={label}", command, base, change, refuse=certain)
                number += 1
        for label in BAD_VALUES:

            def swap(found: dict, value: Any = BAD_VALUES[label]) -> None:
                found["modules"]["model.layers.0.self_attn.q_proj"] = value

            yield Case(
                "compressed", f"{base} module={label}", ("perplexity", "load")[number % 2], base, compression(swap)
            )
            number += 1

            def bits(found: dict, value: Any = BAD_VALUES[label]) -> None:
                found["modules"]["model.layers.0.self_attn.q_proj"]["format"]["bits"] = value

            yield Case(
                "compressed", f"{base} bits={label}", ("load", "perplexity")[number % 2], base, compression(bits)
            )

            def rank(found: dict, value: Any = BAD_VALUES[label]) -> None:
                found["modules"]["model.layers.0.self_attn.q_proj"] = {"rank": value}

            yield Case(
                "compressed", f"{base} rank={label}", ("load", "perplexity")[number % 2], base, compression(rank)
            )

        def elsewhere(found: dict) -> None:
            found["modules"]["model.layers.9.self_attn.q_proj"] = {"rank": 3}

        yield Case("compressed", f"{base} module of no block", "load", base, compression(elsewhere))
        yield Case(
            "compressed",
            f"{base} module is the head",
            "load",
            base,
            compression(lambda c: c["modules"].update(lm_head={"rank": 10**12})),
        )
        for command in ("gptq", "svd"):
            yield Case("compressed", f"{base} quantized again", command, base, nothing)
