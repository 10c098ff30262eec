"""What a case of hostile input is, the commands that read it, and the damage that tables share.

A case damages a copy of a small good input and names the command line that reads it. `refuse` says that the
command must end with one sentence and status 2; otherwise it may also work, as long as it neither shows a traceback
nor hangs, executes what it was given, changes its input, nor writes numbers that are not finite.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]


SIZES = ("--samples", "4", "--sequence-length", "32", "--batch-size", "2", "--device", "cpu", "--output", "{dir}/out")


PRICED = ("--moments", "{moments}", "--backend", "gptq", "--bits", "3.5")


OBEYED = ("--model", "{base}", "--moments", "{moments}", "--plan", "{model}/plan.json")


MEASURED = ("--dataset", "{text}", "--draws", "2")


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
    "predicted": (*SIZES, *PRICED[:4], *MEASURED, "--model", "{model}", "--costs", "{costs}"),
    "prices": (*SIZES, *PRICED[:4], *MEASURED, "--model", "{base}", "--costs", "{model}"),
    "plan of prices": (*PRICED, "--model", "{base}", "--device", "cpu", "--costs", "{model}", "--output", "{dir}/out"),
    "divergence": (*SIZES, "--model", "{model}", "--original", "{base}", "--dataset", "{text}"),
    "original": (*SIZES, "--model", "{base}", "--original", "{model}", "--dataset", "{text}"),
    "ranks": (*OBEYED, "--backend", "gptq", "--output", "{dir}/out"),
    "mix": ("{text}@2", "--model", "{model}", "--work", "{dir}/work", "--output", "{dir}/out.json", "--device", "cpu"),
    "versus": ("--output", "{dir}/out", "--work", "{dir}/work", "--models", "{model}", "--device", "cpu"),
}
"""Command -> its flags; of a flag given twice the last counts. {model} is the copy that was damaged."""


INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """One hostile input. base: what is copied (llama, llava, gptq, quip, aqlm, svd, hessians, plan, costs, or
    data for a folder of texts and pictures); flags come after those of the command."""

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


NUMBERS = ("nan", "inf", "-inf", "1e308", "-1", "-0.5", "0", str(2**70), "1e30", "x", "", "1_0", "９９９９９９９９９９")


OFTEN_FINE = {"0", "-1", "1e30", "1_0", "1e308"}


def single_shard(folder: Path) -> Path:
    """The weights of `folder` in one file."""
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"
