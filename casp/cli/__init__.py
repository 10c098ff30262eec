"""The door of every command: flags become frozen options here, and nothing behind it sees a command line.

`door` tells errors, `places` finds models and names outputs, `flags` are those that all stages share, `options` what
they become; `quantizing` and `stage` are what the backends' stages have in common.
"""

from casp.cli.door import Parser, run_main, tell
from casp.cli.flags import (
    add_calibration_arguments,
    add_common_arguments,
    add_device_arguments,
    add_frames_argument,
    calibration_of,
    compute_named,
    compute_of,
    pick_device,
)
from casp.cli.options import Budget, Calibration, Compute, Search, union
from casp.cli.places import base_model, default_output, model_folder, model_name, stage_input

__all__ = [
    "Budget",
    "Calibration",
    "Compute",
    "Parser",
    "Search",
    "add_calibration_arguments",
    "add_common_arguments",
    "add_device_arguments",
    "add_frames_argument",
    "base_model",
    "calibration_of",
    "compute_named",
    "compute_of",
    "default_output",
    "model_folder",
    "model_name",
    "pick_device",
    "run_main",
    "stage_input",
    "tell",
    "union",
]
