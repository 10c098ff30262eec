"""Tables of hostile input, by class: what a careless download, an editor or an attacker may put before CASP.

A case damages a copy of a small good input and names the command line that reads it. `refuse` says that the
command must end with one sentence and status 2; otherwise it may also work, as long as it neither shows a traceback
nor hangs, executes what it was given, changes its input, nor writes numbers that are not finite.
"""

import json
import os
import random
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent))  # the tests are no package
import output_cases
import plan_cases

Damage = Callable[[Path], None]

SIZES = ("--samples", "4", "--sequence-length", "32", "--batch-size", "2", "--device", "cpu", "--output", "{dir}/out")
PRICED = ("--moments", "{moments}", "--backend", "gptq", "--bits", "3.5")
OBEYED = ("--model", "{base}", "--moments", "{moments}", "--plan", "{model}/plan.json")
COMMANDS: dict[str, tuple[str, ...]] = {
    "svd": (*SIZES, "--model", "{model}", "--dataset", "{text}"),
    "aqlm": (*SIZES, "--model", "{model}", "--dataset", "{text}", "--ft-epochs", "0", "--max-rounds", "1"),
    "plan": (*PRICED, "--model", "{model}", "--device", "cpu", "--output", "{dir}/out"),
    "priced": (*PRICED, "--model", "{base}", "--moments", "{model}", "--device", "cpu", "--output", "{dir}/out"),
    "compress": (*SIZES, *PRICED, "--model", "{model}", "--dataset", "{text}", "--dry-run"),
    "obey": (*SIZES, *OBEYED, "--clip-search", "0", "--sweeps", "0"),
    "obey quip": (*SIZES, *OBEYED, "--ft-epochs", "0", "--sweeps", "0"),
    "gptq": (*SIZES, "--model", "{model}", "--dataset", "{text}", "--clip-search", "0", "--sweeps", "0"),
    "quip": (*SIZES, "--model", "{model}", "--dataset", "{text}", "--ft-epochs", "0", "--sweeps", "0"),
    "tuned": (*SIZES, "--model", "{model}", "--dataset", "{text}", "--ft-epochs", "1", "--sweeps", "0"),
    "given": (*SIZES, "--model", "{base}", "--hessians", "{model}", "--ft-epochs", "0", "--sweeps", "0"),
    "moments": (*SIZES, "--model", "{model}", "--dataset", "{text}"),
    "pictures": (*SIZES, "--model", "{model}", "--dataset", "{questions}", "--clip-search", "0", "--sweeps", "0"),
    "perplexity": ("--model", "{model}", "--dataset", "{text}", "--windows", "2", "--sequence-length", "32"),
    "questions": ("--model", "{model}", "--dataset", "{questions}", "--max-new-tokens", "2"),
    "chat": ("--model", "{model}", "--max-new-tokens", "2"),
    "compare": ("{model}", "--text", "{text}", "--windows", "2", "--sequence-length", "32", "--output", "{dir}/out"),
    "speed": ("--output", "{dir}/out", "--repeats", "1", "--shapes", "512x512", "--batches", "1", "--bits", "2"),
    "versus": ("--output", "{dir}/out", "--work", "{dir}/work", "--models", "{model}", "--device", "cpu"),
}
"""Command -> its flags; of a flag given twice the last counts. {model} is the copy that was damaged."""


@dataclass(frozen=True)
class Case:
    """One hostile input. base: what is copied (llama, llava, gptq, quip, aqlm, svd, hessians, plan, or data for a
    folder of texts and pictures); flags come after those of the command."""

    group: str
    name: str
    command: str
    base: str
    damage: Damage
    flags: tuple[str, ...] = ()
    refuse: bool = True
    stdin: bytes = b"hello\n"


def nothing(folder: Path) -> None:
    """Leaves the input as it is: the flags are what is hostile."""


def edited(file: str, change: Callable[[Any], Any]) -> Damage:
    """Puts what `change` makes of the JSON in `file` in its place."""

    def damage(folder: Path) -> None:
        path = folder / file
        value = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(change(value)))

    return damage


def put(key: str, value: Any) -> Callable[[Any], Any]:
    """Sets `key`, with dots between levels, of a JSON object."""

    def change(config: Any) -> Any:
        *levels, last = key.split(".")
        inner = config
        for level in levels:
            inner = inner.setdefault(level, {})
        inner[last] = value
        return config

    return change


def written(file: str, data: bytes) -> Damage:
    """Puts `data` in the place of `file`."""
    return lambda folder: (folder / file).write_bytes(data) and None


BAD_VALUES: dict[str, Any] = {
    "null": None,
    "text": "x",
    "list": [],
    "object": {},
    "negative": -1,
    "zero": 0,
    "fraction": 1.5,
    "infinite": float("inf"),
    "nan": float("nan"),
    "1e308": 1e308,
    "10**12": 10**12,
    "beyond int64": 2**70,
    "true": True,
}
SHAPE_KEYS = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
"""Keys for which each of BAD_VALUES contradicts the weights."""
OTHER_KEYS = (
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "rope_parameters.rope_theta",
    "rope_parameters.rope_type",
    "hidden_act",
    "dtype",
    "model_type",
    "architectures",
    "tie_word_embeddings",
    "attention_bias",
    "attention_dropout",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "pretraining_tp",
    "transformers_version",
    "quantization_config",
    "rope_scaling",
    "layer_types",
    "sliding_window",
    "is_decoder",
    "problem_type",
    "id2label",
    "torch_dtype",
    "use_cache",
)
VISION_KEYS = ("hidden_size", "image_size", "patch_size", "num_hidden_layers", "num_attention_heads", "num_channels")
CONFIG_COMMANDS = ("gptq", "perplexity", "svd", "moments")


def config_cases() -> Iterator[Case]:
    """Keys of config.json of a wrong type or an absurd size, and values a decoder could not be run with."""
    number = 0
    for key in (*SHAPE_KEYS, *OTHER_KEYS):
        for label, value in BAD_VALUES.items():
            command = CONFIG_COMMANDS[number % len(CONFIG_COMMANDS)]
            number += 1
            change = edited("config.json", put(key, value))
            yield Case("config", f"{key}={label}", command, "llama", change, refuse=key in SHAPE_KEYS)
    for key in (*SHAPE_KEYS, "max_position_embeddings", "rms_norm_eps", "head_dim", "hidden_act", "model_type"):
        for label, value in BAD_VALUES.items():
            command = ("pictures", "questions")[number % 2]
            number += 1
            change = edited("config.json", put(f"text_config.{key}", value))
            yield Case("config", f"text_config.{key}={label}", command, "llava", change, refuse=key in SHAPE_KEYS)
    for key in VISION_KEYS:
        for label, value in BAD_VALUES.items():
            command = ("pictures", "questions")[number % 2]
            number += 1
            change = edited("config.json", put(f"vision_config.{key}", value))
            yield Case("config", f"vision_config.{key}={label}", command, "llava", change, refuse=True)
    for key in ("text_config", "vision_config", "image_token_index", "vision_feature_layer", "image_seq_length"):
        for label, value in BAD_VALUES.items():
            change = edited("config.json", put(key, value))
            yield Case("config", f"{key}={label}", ("pictures", "questions")[number % 2], "llava", change, refuse=False)
            number += 1
    for blocks in (1, 2, 4, 5, 10_000, 10**6):
        for command in CONFIG_COMMANDS:
            yield Case(
                "config",
                f"{blocks} blocks of 3",
                command,
                "llama",
                edited("config.json", put("num_hidden_layers", blocks)),
            )


DEEP = b"[" * 200_000 + b"]" * 200_000
NESTED = b'{"a":' * 5_000 + b"1" + b"}" * 5_000
OTHER_JSON: dict[str, bytes] = {
    "empty": b"",
    "brace": b"{",
    "null": b"null",
    "number": b"3",
    "text": b'"x"',
    "list": b"[]",
    "object": b"{}",
    "list of lists": b"[[],[]]",
    "deep lists": DEEP,
    "deep objects": NESTED,
    "long number": b'{"a": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "zeros": bytes(1000),
    "wide": b"[" + b"[]," * 12_000_000 + b"[]]",
}
JSON_FILES = (
    "config.json",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "processor_config.json",
    "preprocessor_config.json",
)


def json_cases() -> Iterator[Case]:
    """Files of a checkpoint that hold other JSON than they should, or none."""
    certain = ("config.json", "model.safetensors.index.json", "tokenizer.json")
    number = 0
    for file in JSON_FILES:
        base = "llava" if "processor" in file else "llama"
        commands = ("pictures", "questions") if base == "llava" else ("gptq", "perplexity")
        for label, data in OTHER_JSON.items():
            yield Case(
                "json", f"{file}: {label}", commands[number % 2], base, written(file, data), refuse=file in certain
            )
            number += 1
    for file, keys in {
        "tokenizer.json": (
            "model",
            "model.vocab",
            "model.merges",
            "model.type",
            "added_tokens",
            "pre_tokenizer",
            "decoder",
        ),
        "tokenizer_config.json": ("tokenizer_class", "model_max_length", "bos_token", "pad_token", "chat_template"),
        "model.safetensors.index.json": ("weight_map", "weight_map.lm_head.weight", "metadata"),
        "processor_config.json": ("image_processor", "patch_size", "processor_class", "image_token", "chat_template"),
        "generation_config.json": ("eos_token_id", "max_length", "num_beams"),
    }.items():
        base = "llava" if "processor" in file else "llama"
        commands = ("questions", "pictures") if base == "llava" else ("chat", "gptq")
        for key in keys:
            for label in ("null", "text", "list", "object", "negative", "1e308", "beyond int64"):
                change = edited(file, put(key, BAD_VALUES[label]))
                yield Case("json", f"{file} {key}={label}", commands[number % 2], base, change, refuse=False)
                number += 1
    for target in (
        "../../data/text.txt",
        "/etc/passwd",
        "/dev/zero",
        "..",
        "",
        "nowhere.safetensors",
        "a\0b",
        "x" * 300,
    ):

        def change(index: dict, target: str = target) -> dict:
            index["weight_map"] = dict.fromkeys(index["weight_map"], target)
            return index

        for command in ("gptq", "perplexity"):
            yield Case("json", f"index names {target[:30]!r}", command, "llama", edited(JSON_FILES[1], change))


def single_shard(folder: Path) -> Path:
    """The weights of `folder` in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / JSON_FILES[1]).unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


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


CODE = b"""import pathlib, os
pathlib.Path(os.environ["CASP_HOSTILE_MARK"]).write_text("executed")
from transformers import LlamaConfig as Config, LlamaForCausalLM as Model, PreTrainedTokenizerFast as Tokenizer
from transformers import LlavaProcessor as Processor
"""


def code_cases() -> Iterator[Case]:
    """Folders that bring code of their own, for someone who answers yes to everything."""
    maps = {
        "config.json": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
        "tokenizer_config.json": {"AutoTokenizer": ["own.Tokenizer", "own.Tokenizer"]},
        "processor_config.json": {"AutoProcessor": "own.Processor"},
        "preprocessor_config.json": {"AutoProcessor": "own.Processor", "AutoImageProcessor": "own.Processor"},
    }
    for file, map in maps.items():
        base = "llava" if "processor" in file else "llama"
        commands = ("pictures", "questions", "chat") if base == "llava" else ("gptq", "perplexity", "chat", "svd")
        for foreign in (False, True):

            def damage(folder: Path, file: str = file, map: dict = map, foreign: bool = foreign) -> None:
                (folder / "own.py").write_bytes(CODE)
                edited(file, put("auto_map", map))(folder)
                if foreign:
                    kind = {"config.json": "model_type", "tokenizer_config.json": "tokenizer_class"}
                    edited(file, put(kind.get(file, "processor_class"), "own"))(folder)

            for command in commands:
                name = f"{file} brings code for {'an unknown' if foreign else 'a known'} class"
                yield Case("code", name, command, base, damage, stdin=b"y\n" * 20)

    def pickled(folder: Path) -> None:
        state = load_file(single_shard(folder))
        (folder / "model.safetensors").unlink()
        torch.save(state, folder / "pytorch_model.bin")

    for command in ("gptq", "perplexity", "chat"):
        yield Case("code", "weights as a pickle", command, "llama", pickled)

    def adapter(folder: Path) -> None:
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/nowhere", "peft_type": "LORA"}')

    yield Case("code", "an adapter", "perplexity", "llama", adapter)


NUMBERS = ("nan", "inf", "-inf", "1e308", "-1", "-0.5", "0", str(2**70), "1e30", "x", "", "1_0", "９９９９９９９９９９")
WHOLE_FLAGS = {
    "gptq": (
        "--samples",
        "--sequence-length",
        "--batch-size",
        "--seed",
        "--bits",
        "--group-size",
        "--clip-search",
        "--sweeps",
    ),
    "quip": ("--bits", "--sweeps", "--ft-epochs", "--block-epochs", "--e2e-epochs", "--seed"),
    "perplexity": ("--windows", "--sequence-length", "--batch-size"),
    "questions": ("--questions", "--max-new-tokens", "--batch-size", "--seed"),
    "speed": ("--batches", "--repeats", "--bits"),
}
REAL_FLAGS = {
    "gptq": ("--damping", "--bits-budget"),
    "quip": ("--damping", "--block-lr", "--e2e-lr"),
    "tuned": ("--block-lr", "--e2e-lr"),
    "svd": ("--damping", "--keep-ratio"),
}
OFTEN_FINE = {"0", "-1", "1e30", "1_0", "1e308"}


def flag_cases() -> Iterator[Case]:
    """Numbers that no flag can mean."""
    for table in (WHOLE_FLAGS, REAL_FLAGS):
        for command, flags in table.items():
            base = "llava" if command == "questions" else "llama"
            for flag in flags:
                for value in NUMBERS:
                    fine = value in OFTEN_FINE or (value.isdecimal() and flag in ("--windows", "--questions", "--seed"))
                    yield Case(
                        "flags", f"{command} {flag}={value}", command, base, nothing, (f"{flag}={value}",), not fine
                    )
    for shape in ("16x16", "1x1", "1x100000000", "1000000x1000000", "0x5", "5", "x", "99999999999999999999x1"):
        yield Case("flags", f"speed --shapes {shape}", "speed", "llama", nothing, ("--shapes", shape))
    yield Case("flags", "gptq --group-size 1", "gptq", "llama", nothing, ("--group-size", "1"))
    for device in ("cuda:99", "cuda:-1", "", "meta", "cpu:7", "x" * 300, "cuda:99999999999"):
        yield Case("flags", f"--device {device[:20]!r}", "gptq", "llama", nothing, ("--device", device))


def path_cases() -> Iterator[Case]:
    """Models, texts and pictures that are no ordinary files and folders."""
    paths = {
        "long name": "x" * 300,
        "long path": "/" + "x/" * 3000,
        "a file": "{text}",
        "below a file": "{text}/x",
        "null byte": "a\0b",
        "empty": "",
        "zero": "/dev/zero",
        "directory": "/",
        "newline": "a\nb",
        "tilde": "~nobody/x",
        "loop": "{model}/loop",
        "fifo": "{model}/fifo",
    }

    def special(folder: Path) -> None:
        os.mkfifo(folder / "fifo")
        (folder / "loop").symlink_to("loop")

    for label, path in paths.items():
        for command in ("gptq", "perplexity", "chat"):
            yield Case("paths", f"{command} --model: {label}", command, "llama", special, ("--model", path))
        for command in ("gptq", "perplexity"):
            for ending in ("", ".txt", ".jsonl"):
                data = "{text}" if label == "a file" and not ending else path + ending
                if label == "a file" and not ending:
                    continue
                yield Case(
                    "paths", f"{command} --dataset: {label}{ending}", command, "llama", special, ("--dataset", data)
                )
        yield Case("paths", f"chat --image: {label}", "chat", "llava", special, ("--image", path))
        yield Case("paths", f"--hessians: {label}", "quip", "llama", special, ("--hessians", path))
        yield Case("paths", f"--target-bytes-of: {label}", "gptq", "llama", special, ("--target-bytes-of", path))

    def node(file: str) -> Damage:
        def damage(folder: Path) -> None:
            (folder / file).unlink(missing_ok=True)
            os.mkfifo(folder / file)

        return damage

    def link(file: str, to: str) -> Damage:
        def damage(folder: Path) -> None:
            (folder / file).unlink(missing_ok=True)
            (folder / file).symlink_to(to)

        return damage

    for file in (
        "config.json",
        "model.safetensors.index.json",
        "model-00001-of-00005.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ):
        for command in ("gptq", "perplexity"):
            refuse = file not in ("chat_template.jinja", "generation_config.json")
            yield Case("paths", f"{file} is a fifo", command, "llama", node(file), refuse=refuse)
            yield Case("paths", f"{file} is /dev/zero", command, "llama", link(file, "/dev/zero"), refuse=refuse)
            yield Case("paths", f"{file} links to itself", command, "llama", link(file, file), refuse=refuse)

            def folder_there(folder: Path, file: str = file) -> None:
                (folder / file).unlink(missing_ok=True)
                (folder / file).mkdir()

            yield Case("paths", f"{file} is a folder", command, "llama", folder_there, refuse=refuse)


def png(width: int, height: int) -> bytes:
    """A PNG file that claims these dimensions, its pixels all zero as far as a megabyte of them goes."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    row = bytes(1 + (width + 7) // 8)
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(row) for _ in range(height)) if width * height < 2**29 else b""
    pixels += packer.flush()
    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


SHARES = (
    "{text}:nan",
    "{text}:inf",
    "{text}:1e308",
    "{text}:0",
    "{text}:-1",
    "{text}:1,,{text}:1",
    "{text}:1,nowhere.txt:1",
    "{text}:1,thesis:1",
    "{text}:1," + ",".join(["thesis:1"] * 5000),
    "{text}:" + "9" * 5000,
    "{text}:0." + "0" * 5000,
    "{text}:1/0",
    ":1",
    "{text}:",
    "demo-images:1,{text}:1",
)
"""Mixtures of data that are none, or not for a text model."""


def data_cases() -> Iterator[Case]:
    """Calibration and evaluation data: texts, rows and pictures."""
    texts = {
        "empty": b"",
        "blank": b" \n\t " * 5000,
        "zeros": bytes(20_000),
        "not UTF-8": b"\xff\xfe" * 5000,
        "UTF-16": ("hello " * 3000).encode("utf-16"),
        "short": b"hello",
        "one letter": b"a" * 5000,
        "surrogates": "\udfff".encode("utf-8", "surrogatepass") * 5000,
        "emoji": "\N{GRINNING FACE}".encode() * 5000,
        "special tokens": b"</s><pad><s>" * 3000,
    }
    for label, data in texts.items():
        for command in ("gptq", "perplexity", "moments", "tuned"):
            refuse = label not in ("zeros", "one letter", "emoji", "special tokens")
            flags = ("--dataset", "{model}/hostile.txt")
            yield Case("data", f"text: {label}", command, "llama", written("hostile.txt", data), flags, refuse)
    for shares in SHARES:
        for command in ("gptq", "moments"):
            yield Case("data", f"{command} of {shares[:40]}", command, "llama", nothing, ("--dataset", shares))
    good = {"image": "0.png", "question": "What?", "answer": "a cat"}
    rows: dict[str, bytes] = {label: data for label, data in OTHER_JSON.items() if label != "wide"}
    for key in good:
        for label in BAD_VALUES:
            rows[f"{key}={label}"] = json.dumps(good | {key: BAD_VALUES[label]}).encode()
        rows[f"no {key}"] = json.dumps({k: v for k, v in good.items() if k != key}).encode()
        rows[f"{key} blank"] = json.dumps(good | {key: "  "}).encode()
    for label, value in BAD_VALUES.items():
        rows[f"messages={label}"] = json.dumps({"messages": value}).encode()
        for key in ("role", "content"):
            said = [{"role": "user", "content": "What?"} | {key: value}, {"role": "assistant", "content": "a cat"}]
            rows[f"{key} of a message={label}"] = json.dumps({"messages": said}).encode()
        parts = [{"type": "text", "text": "What?"}, {"type": value, "image": "0.png"}]
        said = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a cat"}]
        rows[f"kind of a part={label}"] = json.dumps({"messages": said}).encode()
    for image in (
        "nowhere.png",
        "/dev/zero",
        "/etc/passwd",
        "..",
        "0.png/x",
        "x" * 300,
        "a\0b",
        "hostile.jsonl",
        "fifo",
    ):
        rows[f"image {image[:20]!r}"] = json.dumps(good | {"image": image}).encode()
    for label, row in rows.items():
        for command in ("pictures", "questions"):

            def damage(folder: Path, row: bytes = row) -> None:
                (folder / "hostile.jsonl").write_bytes(b"\n".join([row] * 4))
                (folder / "0.png").write_bytes(png(40, 40))
                os.mkfifo(folder / "fifo")

            flags = ("--dataset", "{model}/hostile.jsonl")
            fine = ("question=text", "answer=text", "question blank", "no image", "content of a message=text")
            refuse = label not in fine
            if label.startswith("answer="):  # a whole number is an answer
                refuse = label not in (
                    "answer=text",
                    "answer=zero",
                    "answer=negative",
                    "answer=10**12",
                    "answer=beyond int64",
                )
            yield Case("data", f"row: {label}", command, "llava", damage, flags, refuse)
    for width, height in (
        (0, 0),
        (12_000, 12_000),
        (20_000, 20_000),
        (10**9, 10**9),
        (1, 50_000),
        (50_000, 1),
        (2**31, 1),
        (1, 1),
    ):
        for command in ("pictures", "questions", "chat"):

            def damage(folder: Path, width: int = width, height: int = height) -> None:
                (folder / "0.png").write_bytes(png(width, height))
                (folder / "hostile.jsonl").write_text("\n".join([json.dumps(good)] * 4))

            flags = ("--image", "{model}/0.png") if command == "chat" else ("--dataset", "{model}/hostile.jsonl")
            refuse = width * height not in (1, 50_000)
            yield Case("data", f"picture {width}x{height}", command, "llava", damage, flags, refuse)
    for label, data in {"cut": png(40, 40)[:45], "text": b"hello", "empty": b"", "gif": b"GIF89a" + bytes(20)}.items():
        yield Case("data", f"picture: {label}", "chat", "llava", written("0.png", data), ("--image", "{model}/0.png"))


def hessian_cases() -> Iterator[Case]:
    """Folders of moments that are damaged, incomplete or of another kind."""

    def rewritten(change: Callable[[dict, dict], Any], kind: str = "inputs") -> Damage:
        def damage(folder: Path) -> None:
            from safetensors import safe_open

            for file in sorted(folder.glob(f"{kind}-*.safetensors")):
                with safe_open(file, "pt") as f:
                    metadata = dict(f.metadata())
                tensors = load_file(file)
                change(tensors, metadata)
                save_file(tensors, file, metadata)

        return damage

    def all_tensors(make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict, dict], None]:
        return lambda tensors, metadata: tensors.update({name: make(t).clone() for name, t in tensors.items()})

    def groups(change: Callable[[list], Any]) -> Callable[[dict, dict], None]:
        def apply(tensors: dict, metadata: dict) -> None:
            record = json.loads(metadata["block"])
            header = record["header"] | {"groups": change(record["header"]["groups"])}
            metadata["block"] = json.dumps(record | {"header": header})

        return apply

    def swapped(tensors: dict, metadata: dict) -> None:
        names = [name for name in tensors if tensors[name].numel() == 64 * 65 // 2]
        tensors[names[0]], tensors[names[1]] = tensors[names[1]].clone(), tensors[names[0]].clone()

    changes = {
        "zeros": all_tensors(torch.zeros_like),
        "NaN": all_tensors(lambda t: t * float("nan")),
        "infinite": all_tensors(lambda t: t * float("inf")),
        "negative": all_tensors(torch.neg),
        "cropped": all_tensors(lambda t: t[:-1]),
        "float64": all_tensors(torch.Tensor.double),
        "int64": all_tensors(torch.Tensor.long),
        "no groups": lambda tensors, metadata: metadata.pop("block"),
        "groups are no JSON": lambda tensors, metadata: metadata.update(block="{"),
        "groups are deep": lambda tensors, metadata: metadata.update(block=DEEP.decode()),
        "groups reversed": groups(lambda found: [list(reversed(group)) for group in found]),
        "groups lack one": groups(lambda found: found[1:]),
        "groups empty": groups(lambda found: []),
        "groups of nothing": groups(lambda found: [[]]),
        "groups swapped": groups(
            lambda found: [[g[0], *h[1:]] for g, h in zip(found, found[1:] + found[:1], strict=True)]
        ),
        "one group": groups(lambda found: [[path for group in found for path in group]]),
        "groups twice": groups(lambda found: found + found),
        "groups of numbers": groups(lambda found: [[1, 2]]),
        "groups are null": groups(lambda found: None),
        "moments swapped": swapped,
    }
    for label, change in changes.items():
        yield Case("hessians", label, "given", "hessians", rewritten(change))
    for label, data in OTHER_JSON.items():
        yield Case("hessians", f"record: {label}", "given", "hessians", written("casp_run.json", data))
    yield Case(
        "hessians", "a block is missing", "given", "hessians", lambda f: (f / "inputs-00001.safetensors").unlink()
    )
    yield Case(
        "hessians", "a block is cut", "given", "hessians", lambda f: os.truncate(f / "inputs-00001.safetensors", 5000)
    )
    for label in ("zeros", "NaN", "infinite", "negative", "cropped", "float64", "no groups", "groups are deep"):
        yield Case("hessians", f"gradients: {label}", "priced", "hessians", rewritten(changes[label], "gradients"))
    for label, value in BAD_VALUES.items():
        for key in ("token_weights", "gradients"):
            change = edited("casp_run.json", put(f"fingerprint.settings.{key}", value))
            fine = key == "gradients" and label == "true"
            yield Case("hessians", f"{key}={label}", "priced", "hessians", change, refuse=not fine)
    for name in ("gradients-00001.safetensors", "inputs-00002.safetensors"):
        yield Case("hessians", f"{name} is missing", "priced", "hessians", lambda f, name=name: (f / name).unlink())
        cut = lambda f, name=name: os.truncate(f / name, 5000)  # noqa: E731
        yield Case("hessians", f"{name} is cut", "priced", "hessians", cut)
    yield Case("hessians", "a finished checkpoint", "given", "gptq", nothing)
    yield Case(
        "hessians", "of another model", "given", "hessians", edited("casp_run.json", put("fingerprint.model", "0"))
    )


def other_cases() -> Iterator[Case]:
    """Plans, reports, budgets; outputs and switches: in the modules beside this one."""
    plans = (plan_cases.plan_cases, plan_cases.report_cases, plan_cases.budget_cases)
    for factory in (*plans, output_cases.output_cases, output_cases.switch_cases):
        yield from factory(Case, sys.modules[__name__])


FACTORIES = (
    config_cases,
    json_cases,
    header_cases,
    number_cases,
    compressed_cases,
    code_cases,
    flag_cases,
    path_cases,
    data_cases,
    hessian_cases,
    other_cases,
)


def table() -> list[Case]:
    """Every case of the tables."""
    return [case for factory in FACTORIES for case in factory()]


def random_cases(count: int, seed: int) -> Iterator[Case]:
    """`count` cases more, drawn: a byte, a stretch or a JSON value of a random file changed."""
    rng = random.Random(seed)
    bases = ("llama", "llava", "gptq", "quip", "aqlm", "svd", "hessians", "plan")
    for number in range(count):
        base = rng.choice(bases)
        commands = {
            "llama": ("gptq", "perplexity", "moments", "svd"),
            "llava": ("pictures", "questions"),
            "hessians": ("given",),
            "plan": ("obey",),
        }
        command = rng.choice(commands.get(base, ("perplexity", "compare", "load")))
        key = rng.randrange(2**31)
        yield Case("random", f"{base} {number}", command, base, lambda f, key=key: scramble(f, key), refuse=False)


def scramble(folder: Path, seed: int) -> None:
    """One random change to one file of `folder`."""
    rng = random.Random(seed)
    file = rng.choice([path for path in sorted(folder.iterdir()) if path.suffix not in (".md", ".log")])
    data = bytearray(file.read_bytes())
    kind = rng.choice(("bytes", "cut", "grow", "json", "json"))
    if kind == "json" and file.suffix == ".json":
        value = json.loads(data)
        place, key = value, None
        for _ in range(rng.randrange(1, 5)):
            inner = place[key] if key is not None else place
            keys = (
                list(inner) if isinstance(inner, dict) else list(range(len(inner))) if isinstance(inner, list) else []
            )
            if not keys:
                break
            place, key = inner, rng.choice(keys)
        if key is not None:
            place[key] = rng.choice(list(BAD_VALUES.values()))
        file.write_text(json.dumps(value))
        return
    # Headers and small files are where a changed byte means something; data is most of a large one.
    reach = min(len(data), 2000)
    if kind == "cut":
        del data[rng.randrange(reach) :]
    elif kind == "grow":
        data[rng.randrange(reach) : 0] = rng.randbytes(rng.randrange(1, 100))
    else:
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(reach)] = rng.randrange(256)
    file.write_bytes(data)
