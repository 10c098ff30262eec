"""Fixtures of the core's tests."""

import importlib.util
import sys
from pathlib import Path

import pytest

TOY = Path(__file__).with_name("toy_package.py")


@pytest.fixture(scope="package")
def toy_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site folder with the toy third-party backend, on sys.path for these tests."""
    spec = importlib.util.spec_from_file_location("toy_package", TOY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = module.install(tmp_path_factory.mktemp("site"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
