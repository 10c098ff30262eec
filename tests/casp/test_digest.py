"""The hash of a checkpoint: every byte that is read counts, and no file is read twice."""

import os
import shutil
import time

import pytest

import casp.run.digest
from casp.run.digest import content_hash, file_digest, read_files


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CASP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(casp.run.digest, "_SETTLED", 0)
    return tmp_path / "cache"


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


def test_any_byte_of_any_file_counts_even_where_size_and_time_are_put_back(model):
    seen = {content_hash(model)}
    files = read_files(model)
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= {file.name for file in files}
    assert set(model.glob("*.safetensors")) <= set(files)
    for file in files:
        size, times = file.stat().st_size, (file.stat().st_atime_ns, file.stat().st_mtime_ns)
        for place in {size // 3, size - 1} if file.suffix == ".safetensors" else ():
            with file.open("rb+") as opened:
                opened.seek(place)
                byte = opened.read(1)[0] ^ 1
                opened.seek(place)
                opened.write(bytes([byte]))
            os.utime(file, ns=times)
            assert content_hash(model) not in seen
            seen.add(content_hash(model))
        if file.suffix == ".json" and "index" not in file.name:
            file.write_text(file.read_text() + "\n")
            assert content_hash(model) not in seen
            seen.add(content_hash(model))
    (model / "README.md").write_text("not read")
    (model / "casp_run.json").write_text("{}")
    assert content_hash(model) in seen


def test_a_copy_has_the_same_hash(model, tiny_llama):
    assert content_hash(model) == content_hash(tiny_llama)


def test_the_second_pass_reads_nothing(model, monkeypatch):
    time.sleep(0.01)
    first = content_hash(model)
    monkeypatch.setattr(casp.run.digest, "_read", None)
    assert content_hash(model) == first


def test_a_file_that_was_just_changed_is_not_trusted(model, cache, monkeypatch):
    monkeypatch.setattr(casp.run.digest, "_SETTLED", 3_600_000_000_000)
    content_hash(model)
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}", '{"state": 1}', "\0"])
def test_a_damaged_cache_is_read_again(model, cache, damage):
    file = model / "config.json"
    digest = file_digest(file)
    for kept in (cache / "digests").iterdir():
        kept.write_text(damage)
    assert file_digest(file) == digest


def test_without_a_cache_it_only_takes_longer(model, cache):
    cache.write_text("a file where the folder should be")
    assert content_hash(model) == content_hash(model)
