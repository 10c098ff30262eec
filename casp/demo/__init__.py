"""The built-in models and data: three small real models, pictures and clips to ask about and texts to read."""

import importlib.util
import os
from pathlib import Path

from casp.errors import UserError

NAMES = ("demo-llama", "demo-llava", "demo-video")
DIGESTS = "digests"  # of files that were read, in the cache


def cache_folder(cache: str | Path | None = None) -> Path:
    """The folder for assembled checkpoints and digests: the argument, CASP_CACHE, or ~/.cache/casp."""
    return Path(cache or os.environ.get("CASP_CACHE") or Path.home() / ".cache" / "casp").expanduser()


def kept_in_cache(name: str) -> bool:
    """Whether an entry of the cache with this name is CASP's own."""
    return name == DIGESTS or name.startswith(tuple(f"{model}-" for model in NAMES))


def assets_folder() -> Path:
    """The folder `assets/` of the repository, or of a wheel the package `casp_assets`, which is the same."""
    folder = Path(__file__).resolve().parents[2] / "assets"
    if not _holds_data(folder):
        spec = importlib.util.find_spec("casp_assets")
        for location in (spec.submodule_search_locations or ()) if spec else ():
            folder = Path(location)
    if not _holds_data(folder):
        raise UserError(f"the built-in data is missing: {folder} has no tiles/index.json; install CASP again.")
    return folder


def _holds_data(folder: Path) -> bool:
    return (folder / "tiles" / "index.json").is_file()
