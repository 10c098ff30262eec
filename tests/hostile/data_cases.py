"""Tables of hostile data: texts, rows and pictures, and moments that are damaged or of another kind."""

import json
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from case import BAD_VALUES, DEEP, OTHER_JSON, Case, Damage, edited, nothing, put, written
from safetensors.torch import load_file, save_file


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
    for place in ("nowhere", "/dev/zero", "..", "x" * 300, "a\0b", "hostile.jsonl", "fifo", "0.png/x"):
        shown = {"question": "What?", "answer": "a cat", "video": place}
        rows[f"video {place[:20]!r}"] = json.dumps(shown).encode()
    for label in BAD_VALUES:
        rows[f"video={label}"] = json.dumps({"question": "?", "answer": "a", "video": BAD_VALUES[label]}).encode()
        rows[f"images={label}"] = json.dumps({"question": "?", "answer": "a", "images": BAD_VALUES[label]}).encode()
    rows["many pictures"] = json.dumps({"question": "?", "answer": "a", "images": ["0.png"] * 10_000}).encode()
    for label, row in rows.items():
        for command in ("pictures", "questions"):

            def damage(folder: Path, row: bytes = row) -> None:
                (folder / "hostile.jsonl").write_bytes(b"\n".join([row] * 4))
                (folder / "0.png").write_bytes(png(40, 40))
                os.mkfifo(folder / "fifo")

            flags = ("--dataset", "{model}/hostile.jsonl")
            fine = (
                "question=text",
                "answer=text",
                "question blank",
                "no image",
                "content of a message=text",
                "images=list",
            )
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
    for command in ("pictures", "questions"):
        shown = {"question": "What?", "answer": "a cat", "images": ["0.png"] * 100}

        def damage(folder: Path, row: dict = shown) -> None:
            (folder / "0.png").write_bytes(png(7_000, 7_000))
            (folder / "hostile.jsonl").write_text("\n".join([json.dumps(row)] * 4))

        yield Case("data", "100 large pictures", command, "llava", damage, ("--dataset", "{model}/hostile.jsonl"))
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
            refuse = width * height != 1
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
