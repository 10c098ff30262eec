"""The built-in texts: registers to calibrate on, others of each to validate on, and four to test on."""

from casp.demo import assets_folder
from casp.errors import UserError

REGISTERS = ("speeches", "fiction", "dialogue", "technical", "code")
CALIBRATION = {register: f"calibration-{register}" for register in REGISTERS} | {"speeches": "calibration"}
VALIDATION = {register: f"validation-{register}" for register in REGISTERS} | {"speeches": "validation"}
TEST = ("test", "moby", "technical", "encyclopaedia")
SPLITS = (*CALIBRATION.values(), *VALIDATION.values(), *TEST)


def load(split: str) -> str:
    """One of SPLITS; what each holds stands in assets/README.md. UserError for another name."""
    if split not in SPLITS:
        raise UserError(f"the built-in text has no split '{split}': choose one of {', '.join(SPLITS)}")
    return (assets_folder() / "text" / f"{split}.txt").read_text(encoding="utf-8")
