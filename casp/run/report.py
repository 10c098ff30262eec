"""The report that the stages leave in a checkpoint, `casp_report.json`: what each did, and what is known of each block.

{"stage": ..., "base_model": ..., "settings": {...}, "stages": [{"stage": ..., "settings": {...}}, ...],
 "blocks": [{"index": 0, "block_influence": ..., "linears": {"q": {...}, ...}, ...}, ...], ...}
"""

from pathlib import Path
from typing import Any

from casp.errors import UserError
from casp.reading.documents import read_json
from casp.reading.files import is_there

REPORT_FILE = "casp_report.json"
_REMEDY = "make the checkpoint again, or put the file back"


def read_report(folder: Path) -> dict[str, Any] | None:
    """The report in checkpoint `folder`, of the form above; None where there is none, UserError for anything else."""
    path = folder / REPORT_FILE
    if not is_there(path):
        return None
    found = read_json(path, "the stages' report", remedy=_REMEDY)
    wrong = _flaw(found)
    if wrong:
        raise UserError(f"{path} is no report of a stage ({wrong}); {_REMEDY}.")
    return found


def _flaw(report: dict[str, Any]) -> str | None:
    """What in `report` is not as the stages write it."""
    if not isinstance(report.get("base_model"), str):
        return "base_model is no text"
    stages, blocks = report.get("stages"), report.get("blocks")
    if not isinstance(stages, list) or not all(
        isinstance(stage, dict) and isinstance(stage.get("stage"), str) and isinstance(stage.get("settings"), dict)
        for stage in stages
    ):
        return "stages is no list of stages and settings"
    for settings in (stage["settings"] for stage in stages):
        if not _number_or_none(settings.get("keep_ratio")) or not isinstance(settings.get("fine_tuning", {}), dict):
            return "a stage's keep_ratio is no number, or its fine_tuning no object"
    if not _is_curve(report.get("end_to_end", [])):
        return "end_to_end is no curve of losses"
    if not isinstance(blocks, list) or not all(isinstance(block, dict) for block in blocks):
        return "blocks is no list of objects"
    for number, block in enumerate(blocks):
        linears, density = block.get("linears", {}), block.get("attention_density") or {}
        if not isinstance(linears, dict) or not all(isinstance(linear, dict) for linear in linears.values()):
            return f"the linears of block {number} are no objects"
        if not isinstance(density, dict) or not all(_number_or_none(share) for share in density.values()):
            return f"the attention density of block {number} is no number"
        if not _number_or_none(block.get("block_influence")):
            return f"the influence of block {number} is no number"
        tunings = block.get("tuning", [])
        if not isinstance(tunings, list) or not all(
            isinstance(one, dict) and one.get("curve") and _is_curve(one["curve"]) for one in tunings
        ):
            return f"the fine-tuning of block {number} has no curves"
    return None


def _is_curve(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and _number_or_none(entry.get("training")) and _is_number(entry.get("validation"))
        for entry in value
    )


def _is_number(value: Any) -> bool:
    return value is not None and _number_or_none(value)


def _number_or_none(value: Any) -> bool:
    # Of any size that an influence, a share or a loss can have; NaN is in no range.
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6)


def merge_reports(source: Path, report: dict[str, Any]) -> dict[str, Any]:
    """`report` with what an earlier stage's report in folder `source` says of each block filled in."""
    earlier = read_report(source)
    if earlier is None:
        return {"stages": [_stage_entry(report)], **report}
    if len(earlier["blocks"]) != len(report["blocks"]):
        raise UserError(
            f"{source / REPORT_FILE} is about {len(earlier['blocks'])} blocks, the checkpoint has "
            f"{len(report['blocks'])}; {_REMEDY}."
        )
    blocks = []
    for old, new in zip(earlier["blocks"], report["blocks"], strict=True):
        linears = dict(old.get("linears", {}))
        for role, values in new.get("linears", {}).items():
            linears[role] = {**linears.get(role, {}), **values}
        blocks.append({**old, **new, "linears": linears})
    return {"stages": [*earlier["stages"], _stage_entry(report)], **report, "blocks": blocks}


def _stage_entry(report: dict[str, Any]) -> dict[str, Any]:
    return {"stage": report["stage"], "settings": report["settings"]}
