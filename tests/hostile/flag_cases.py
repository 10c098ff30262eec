"""Tables of hostile command lines: numbers that no flag can mean, and paths to what is no file or folder."""

import os
from collections.abc import Iterator
from pathlib import Path

from case import NUMBERS, OFTEN_FINE, Case, Damage, nothing

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
