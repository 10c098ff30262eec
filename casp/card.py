"""The model card of a compressed checkpoint."""

from typing import Any

RESULTS_BEGIN, RESULTS_END = "<!-- casp:results -->", "<!-- /casp:results -->"


def model_card(report: dict[str, Any], compression: dict[str, Any], stored_bytes: int) -> str:
    """README.md of a checkpoint folder: what was done, its size, how to load it, room for measured results.

    report: the stage's report (with the stages before it under "stages"); compression: the checkpoint's
    quantization_config; stored_bytes: all safetensors together.
    """
    ranks = [entry["rank"] for entry in compression["modules"].values() if "rank" in entry]
    formats = [entry["format"] for entry in compression["modules"].values() if "format" in entry]
    lines = [
        "---",
        f"base_model: {report['base_model']}",
        "library_name: transformers",
        "tags: [casp, compressed]",
        "---",
        "",
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
        "```python",
        "import casp  # registers the format with transformers",
        "from transformers import AutoModelForCausalLM, AutoModelForImageTextToText",
        "",
        "model = AutoModelForImageTextToText.from_pretrained(FOLDER)  # AutoModelForCausalLM for a text model",
        "```",
        "",
        "## Results",
        "",
        RESULTS_BEGIN,
        "Not measured yet: `bash eval/scripts/compare.sh FOLDER --output DIR --update-cards` fills in this table.",
        RESULTS_END,
        "",
    ]
    return "\n".join(lines)
