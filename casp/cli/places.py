"""Where the models that a command names are found, and where its output goes."""

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from casp.demo import NAMES
from casp.errors import UserError
from casp.reading.files import is_there, require_folder
from casp.run.digest import content_hash
from casp.run.outputs import read_record
from casp.run.report import read_report

RUNS = Path("runs")
DOWNLOADED = ["README.md", "*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def model_name(model: str) -> str:
    """The last part of a hub id or folder: what outputs are filed under."""
    path = Path(model)
    return (
        os.path.basename(os.path.realpath(path)) if model and is_there(path) else model.rstrip("/").rpartition("/")[2]
    )


def default_output(model: str, stage: str) -> Path:
    """runs/<model>/<stage>, below the current folder."""
    return RUNS / model_name(model) / stage


def model_folder(model: str) -> Path:
    """The local folder of `model`: a built-in name is assembled, a folder taken as it is, a hub id downloaded."""
    if model in NAMES:
        from casp.demo.models import build

        return build(model)
    path = Path(model)
    if model and is_there(path):
        require_folder(path, "--model")
        return path
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise UserError(
            f"--model {model[:200]} does not exist; give a folder, a hub id (owner/name) or {' or '.join(NAMES)}."
        )
    try:
        return Path(snapshot_download(model, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise UserError(
            f"--model {model} is no folder here and could not be fetched from the hub ({type(error).__name__}); check "
            "the spelling and the network, or give a local folder."
        ) from error


def stage_input(model: str, earlier_stage: str, from_original: bool) -> Path:
    """What a stage starts from: the output of `earlier_stage` for the same model if there is one, and says so."""
    earlier = default_output(model, earlier_stage)
    if not from_original and (earlier / "config.json").is_file():
        if not _made_from(earlier, model):
            raise UserError(
                f"{earlier} was made from another model than {model}, or that changed since; start from {model} with "
                "--from-original, or move that folder away."
            )
        print(f"starting from {earlier}, the output of stage {earlier_stage} (--from-original starts from {model})")
        return earlier
    return model_folder(model)


def _made_from(earlier: Path, model: str) -> bool:
    """Whether the stage's output `earlier` says nothing against being of `model`; a hub id is compared by name."""
    record = read_record(earlier)
    if record is None:
        return True
    if model in NAMES or is_there(Path(model)):
        return record["fingerprint"].get("model") == content_hash(model_folder(model))
    return record.get("base_model") == model


def base_model(folder: Path, model: str) -> str:
    """What the checkpoint in `folder`, that was asked for as `model`, derives from, for its card: the hub id.

    An earlier stage has recorded it; else it is `model`, for a folder of the hub's cache the id that its path holds,
    for another that folder's name.
    """
    earlier = read_report(folder)
    if earlier is not None:
        return earlier["base_model"]
    if not Path(model).is_dir():
        return model
    cached = re.search(r"(?:^|/)models--([^/]+?)--([^/]+)/snapshots/", f"{Path(model).absolute().as_posix()}/")
    return f"{cached[1]}/{cached[2]}" if cached else model_name(model)
