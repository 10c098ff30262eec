"""The model card of a compressed checkpoint."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from casp.errors import UserError
from casp.reading.files import is_there, read_bytes

RESULTS_BEGIN, RESULTS_END = "<!-- casp:results -->", "<!-- /casp:results -->"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_INHERITED = ("license", "license_name", "license_link", "language")
_MOST_BYTES = 1 << 22
_LONGEST = 200  # characters of what is carried over


def inherited(folder: Path) -> dict[str, Any]:
    """What a derived model takes over of the card of the one in `folder`: licence and languages, if it names them."""
    file = Path(folder) / "README.md"
    if not is_there(file):
        return {}
    try:
        text = read_bytes(file, "the card", _MOST_BYTES).decode(errors="replace")
        block = re.match(r"---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", text, re.DOTALL)
        found = yaml.safe_load(block[1]) if block else None
    except (UserError, yaml.YAMLError, RecursionError, ValueError):
        return {}  # a card is text for people: one that is no YAML hides nothing that a stage needs
    return {key: found[key] for key in _INHERITED if isinstance(found, dict) and _plain(found.get(key))}


def _plain(value: Any) -> bool:
    words = value if isinstance(value, list) else [value]
    return 0 < len(words) < _LONGEST and all(isinstance(word, str) and 0 < len(word) < _LONGEST for word in words)


def front_matter(base_model: str, is_multimodal: bool, tags: list[str], carried: Mapping[str, Any]) -> str:
    """The YAML that a hub reads at the head of a card.

    base_model: named there only where it is an id of the hub; carried: see `inherited`.
    """
    data: dict[str, Any] = {**carried}
    if HUB_ID.fullmatch(base_model):
        data |= {"base_model": base_model, "base_model_relation": "quantized"}
    data["library_name"] = "transformers"
    data["pipeline_tag"] = "image-text-to-text" if is_multimodal else "text-generation"
    data["tags"] = tags
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n\n"


def model_card(
    report: dict[str, Any],
    compression: dict[str, Any],
    stored_bytes: int,
    is_multimodal: bool = False,
    carried: Mapping[str, Any] | None = None,
) -> str:
    """README.md of a checkpoint folder: what was done, its size, how to load it, room for measured results.

    report: the stage's report (with the stages before it under "stages"); compression: the checkpoint's
    quantization_config; stored_bytes: all safetensors together; carried: see `inherited`.
    """
    ranks = [entry["rank"] for entry in compression["modules"].values() if "rank" in entry]
    formats = [entry["format"] for entry in compression["modules"].values() if "format" in entry]
    auto = "AutoModelForImageTextToText" if is_multimodal else "AutoModelForCausalLM"
    lines = [
        f"# {report['base_model']}, compressed with CASP",
        "",
        f"{len(ranks)} low-rank layers, {len(formats)} quantized matrices; {stored_bytes / 1e6:.1f} MB of safetensors "
        "in all.",
        "",
        "## What was done",
        "",
    ]
    for stage in report["stages"]:
        settings = ", ".join(f"{key} = {value}" for key, value in stage["settings"].items())
        lines.append(f"- **{stage['stage']}**: {settings}")
    lines += [
        "",
        "## Loading",
        "",
        "Needs the Python package `casp`; where it is installed, everything that loads through transformers works.",
        "",
        "```python",
        f"from transformers import {auto}",
        "",
        f"model = {auto}.from_pretrained(FOLDER)",
        "```",
        "",
        "## Results",
        "",
        RESULTS_BEGIN,
        "Not measured yet: `bash eval/scripts/compare.sh FOLDER --output DIR --update-cards` fills in this table.",
        RESULTS_END,
        "",
    ]
    head = front_matter(report["base_model"], is_multimodal, ["casp", "compressed"], carried or {})
    return head + "\n".join(lines)
