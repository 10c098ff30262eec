"""Tables of hostile configs: keys, JSON of other forms, and code that a folder brings along."""

from collections.abc import Iterator
from pathlib import Path

import torch
from case import BAD_VALUES, OTHER_JSON, Case, edited, put, single_shard, written
from safetensors.torch import load_file

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
