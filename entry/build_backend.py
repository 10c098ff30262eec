"""The build backend: setuptools' own, with the start-up file `start.py` added to every wheel.

A `.pth` file must lie beside the packages, which setuptools has no setting for; so the finished wheel, editable or not,
is written anew with that file and its line in RECORD (PEP 427).
"""

import base64
import hashlib
import os
import zipfile
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # the hooks of PEP 517 and 660, all but the two below

NAME = "casp.pth"
SOURCE = Path(__file__).with_name("start.py")


def _content() -> bytes:
    """The start-up file: a line that begins with `import` is run, and only lines are."""
    return f"import sys; exec({SOURCE.read_text(encoding='utf-8')!r}, {{}})\n".encode()


def _add(wheel: Path) -> None:
    """Write `wheel` anew with the start-up file in it."""
    content = _content()
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    unfinished = wheel.with_suffix(".tmp")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as target:
        for item in source.infolist():
            data = source.read(item)
            if item.filename.endswith(".dist-info/RECORD"):
                data = f"{NAME},sha256={digest},{len(content)}\n".encode() + data
            target.writestr(item, data)
        target.writestr(zipfile.ZipInfo(NAME, (1980, 1, 1, 0, 0, 0)), content)
    os.replace(unfinished, wheel)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 517: setuptools' wheel and the start-up file."""
    name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    _add(Path(wheel_directory) / name)
    return name


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    """PEP 660: setuptools' editable wheel and the start-up file."""
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    _add(Path(wheel_directory) / name)
    return name
