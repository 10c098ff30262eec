"""The built-in models and data: two small real models, pictures to ask about and texts to read."""

from __future__ import annotations

from pathlib import Path

from casp.errors import UserError

NAMES = ("demo-llama", "demo-llava")


def assets_folder() -> Path:
    """The folder `assets/` of the repository that this package was installed from."""
    folder = Path(__file__).resolve().parents[2] / "assets"
    if not (folder / "tiles" / "index.json").is_file():
        raise UserError(
            f"the built-in data is missing: {folder} has no tiles/index.json; "
            "clone the whole repository and install it with `pip install -e .`"
        )
    return folder
