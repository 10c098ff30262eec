"""Tables of hostile input for the commands that measure a method: predicted damage, divergence, ranks and density,
calibration sets.

`case.py` says what a case is; places that are written stand in `output_cases.py`.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from case import (
    BAD_VALUES,
    INDEX,
    NUMBERS,
    OFTEN_FINE,
    OTHER_JSON,
    Case,
    Damage,
    edited,
    nothing,
    put,
    single_shard,
    written,
)
from safetensors.torch import load_file, save_file

OF_A_MODEL = ("divergence", "original", "predicted", "mix")  # which read the copy as a model
CONFIG_KEYS = ("num_hidden_layers", "hidden_size", "vocab_size", "model_type", "rope_parameters")
FILES = ("config.json", INDEX, "tokenizer.json", "tokenizer_config.json")
PLACES = ("/dev/zero", "/", "", "x" * 300, "{model}/nowhere", "a\0b", "{text}", "{base}", "{model}")
CANDIDATES = (
    "",
    "@",
    "@2",
    "demo-text",
    "demo-text@0",
    "demo-text@-1",
    "demo-text@1e3",
    "demo-text@²",
    "demo-text@" + "9" * 5000,
    "thesis@2",
    "demo-images@2@x",
    "/dev/zero@2",
    "/nowhere.txt@2",
    "{model}/fifo.txt@2",
    "{model}@2",
    "a\0b@2",
    "x" * 300 + ".txt@2",
    "{text}:nan@2",
    "{text}:1,thesis:1@2",
    "--output@2",
)
"""Calibration sets with numbers of samples that are none."""


def figure_cases() -> Iterator[Case]:
    """All of them."""
    yield from model_cases()
    yield from flag_cases()
    yield from price_cases()


def figure(name: str, command: str, base: str, change: Damage, *flags: str, refuse: bool = True) -> Case:
    """A case of this table."""
    return Case("figures", name, command, base, change, flags, refuse)


def model_cases() -> Iterator[Case]:
    """Models that are damaged, of another kind, or not those that prices, moments and originals are of."""
    number = 0
    for key in CONFIG_KEYS:
        for label, value in BAD_VALUES.items():
            command = OF_A_MODEL[number % len(OF_A_MODEL)]
            number += 1
            change = edited("config.json", put(key, value))
            # Other positions are another model for a divergence, which has nothing to compare them with.
            fine = key == "rope_parameters" and command != "predicted"
            if fine and command == "mix":
                continue  # it would be calibrated in full
            yield figure(f"{key}={label}", command, "llama", change, refuse=not fine)
    for file in FILES:
        for label, data in OTHER_JSON.items():
            command = OF_A_MODEL[number % 3]
            number += 1
            fine = label == "object" and file == "tokenizer_config.json"
            change = written(file, data)
            yield figure(f"{file}: {label}", command, "llama", change, refuse=not fine or command == "predicted")
    for base in ("gptq", "quip", "aqlm", "svd"):
        yield figure(f"of a {base} checkpoint", "predicted", base, nothing)
        yield figure(f"a {base} checkpoint as the original", "original", base, nothing, refuse=False)
    for command in OF_A_MODEL:
        yield figure("moments for a model", command, "hessians", nothing)
        yield figure("a plan for a model", command, "plan", nothing)
        yield figure("weights as a pickle", command, "llama", pickled)
        yield figure("a shard cut", command, "llama", lambda f: cut(max(f.glob("*.safetensors"))))
    for command in ("divergence", "original"):
        for value in (float("nan"), float("inf"), 3e38):
            change = filled("up_proj.weight", value)
            # What overflows in a model may also give finite logits, and the limit of one that is flat.
            yield figure(f"up filled with {value}", command, "llama", change, refuse=value != 3e38)
        # The tiny models have the same tokens, which is what is asked.
        yield figure("of pictures and of text", command, "llava", nothing, refuse=False)
        yield figure("tokens swapped", command, "llama", swapped_tokens)
    for label, data in OTHER_JSON.items():
        yield figure(f"plan: {label}", "ranks", "plan", written("plan.json", data))
    for key in ("version", "model", "backend", "linears"):
        for label, value in BAD_VALUES.items():
            yield figure(f"plan's {key}={label}", "ranks", "plan", edited("plan.json", put(key, value)))


def flag_cases() -> Iterator[Case]:
    """Numbers, names and places that no flag can mean."""
    whole = {
        "predicted": ("--draws", "--samples", "--sequence-length", "--seed"),
        "divergence": ("--samples", "--sequence-length", "--batch-size", "--seed", "--frames", "--visual-tokens"),
        "mix": ("--windows", "--questions"),
    }
    for command, flags in whole.items():
        for flag in flags:
            for value in NUMBERS:
                fine = value in OFTEN_FINE or (value.isdecimal() and flag in ("--seed", "--visual-tokens"))
                if command == "mix" and value == "1_0":
                    continue  # Python's way to write 10
                bad = (f"{flag}={value}",)
                yield figure(f"{command} {flag}={value}", command, "llama", nothing, *bad, refuse=not fine)
    for command in ("predicted", "divergence", "ranks", "mix"):
        base = "plan" if command == "ranks" else "llama"
        for device in ("cuda:99", "", "meta", "cpu:7"):
            if command != "ranks":
                yield figure(f"{command} --device {device!r}", command, base, nothing, "--device", device)
        # The good models would be calibrated in full.
        for place in PLACES[: -2 if command == "mix" else None]:
            yield figure(f"{command} --model {place[:20]!r}", command, base, nothing, "--model", place, refuse=False)
    for backend in ("", "thesis", "../x", "x" * 300, "aqlm"):
        for command in ("predicted", "ranks"):
            base = "plan" if command == "ranks" else "llama"
            yield figure(f"{command} --backend {backend[:9]!r}", command, base, nothing, "--backend", backend)
    for words in ("thesis", "", "none+", "+".join(["none"] * 5000), "gradient-norm"):
        yield figure(f"--token-weights {words[:20]!r}", "predicted", "llama", nothing, "--token-weights", words)
    for place in PLACES:
        for flag in ("--moments", "--costs"):
            yield figure(f"predicted {flag} {place[:20]!r}", "predicted", "llama", nothing, flag, place)
        for flag in ("--moments", "--plan"):
            yield figure(f"ranks {flag} {place[:20]!r}", "ranks", "plan", nothing, flag, place)
        if place not in ("{base}", "{model}"):
            yield figure(f"--original {place[:20]!r}", "divergence", "llama", nothing, "--original", place)
        for command in ("predicted", "divergence"):
            yield figure(f"{command} --dataset {place[:20]!r}", command, "llama", nothing, "--dataset", place + ".txt")
        if place not in ("", "{base}", "{text}"):  # the present folder, and others that are no inputs
            yield figure(f"mix --work {place[:20]!r}", "mix", "llama", nothing, "--work", place)
    for candidate in CANDIDATES:
        yield figure(f"mix of {candidate[:30]!r}", "mix", "llama", nothing, candidate)
    yield figure("mix of pictures for a text model", "mix", "llama", nothing, "{questions}@2")


def price_cases() -> Iterator[Case]:
    """Prices that were edited, cut or exchanged, for what measures them and for the plan that is made of them."""

    def priced(change: Callable[[dict], Any]) -> Damage:
        return edited("block-00001.json", lambda found: (change(found[0]) and None) or found)

    def option(place: int, value: Any) -> Damage:
        return priced(lambda linear: linear["options"][0].__setitem__(place, value))

    changes: dict[str, Damage] = {}
    for label, data in OTHER_JSON.items():
        changes[f"prices: {label}"] = written("block-00001.json", data)
        changes[f"record: {label}"] = written("casp_run.json", data)
    for label, value in BAD_VALUES.items():
        for key in ("path", "role", "shape", "influence", "options"):
            if key != "influence" or label not in ("zero", "negative", "fraction", "1e308", "10**12", "beyond int64"):
                changes[f"{key}={label}"] = priced(lambda one, key=key, value=value: one.update({key: value}))
        for place, name in enumerate(("rank", "formats", "bytes", "cost")):
            if (name, label) not in FINE_OPTIONS:
                changes[f"{name} of an option={label}"] = option(place, value)
        changes[f"a format={label}"] = priced(lambda one, value=value: one["options"][0].__setitem__(1, [value]))
        changes[f"bits={label}"] = priced(lambda one, value=value: one["options"][0][1][0].update(bits=value))
    changes["an option short"] = priced(lambda linear: linear["options"][0].pop())
    changes["no options"] = priced(lambda linear: linear["options"].clear())
    changes["a linear twice"] = edited("block-00001.json", lambda found: [*found, found[0]])
    changes["a linear missing"] = edited("block-00001.json", lambda found: found[1:])
    changes["of another block"] = lambda f: (f / "block-00001.json").write_bytes((f / "block-00000.json").read_bytes())
    changes["a block is missing"] = lambda folder: (folder / "block-00001.json").unlink()
    for number, (label, change) in enumerate(changes.items()):
        commands = ("prices", "plan of prices")
        commands = commands if label.startswith("record: ") else commands[number % 2 :][:1]
        for command in commands:
            yield figure(f"{command}, {label}", command, "costs", change)


FINE_OPTIONS = {
    ("rank", "null"),
    *(("cost", label) for label in ("negative", "zero", "fraction", "1e308", "10**12", "beyond int64")),
}


def pickled(folder: Path) -> None:
    """The weights as torch.save writes them, and no others."""
    file = single_shard(folder)
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()


def filled(ending: str, value: float) -> Damage:
    """Puts `value` into all of the weights whose name ends so."""

    def damage(folder: Path) -> None:
        file = single_shard(folder)
        tensors = load_file(file)
        for name in [name for name in tensors if name.endswith(ending)]:
            tensors[name].fill_(value)
        save_file(tensors, file, {"format": "pt"})

    return damage


def swapped_tokens(folder: Path) -> None:
    """Two tokens of the vocabulary stand for each other."""

    def swap(tokenizer: dict) -> dict:
        vocabulary = tokenizer["model"]["vocab"]
        first, last = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[last] = vocabulary[last], vocabulary[first]
        return tokenizer

    edited("tokenizer.json", swap)(folder)


def cut(file: Path) -> None:
    """Leaves half of `file`."""
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
