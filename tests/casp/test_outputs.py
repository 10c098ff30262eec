"""Where results may go: a table of places that are refused, and nothing there is touched."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.run.files import temporary, write_json, write_shard
from casp.run.folder import LOG_FILE, WorkFolder, check_places
from casp.run.outputs import RUN_FILE, check_file, check_report, read_record, refuse_inputs

BATCHES = [{"input_ids": torch.arange(4, 36).reshape(2, 16)}]


def work(model, output):
    return WorkFolder(output, Decoder(model), "hessians", "tiny", {}, "calibration")


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def finished(model, output):
    folder = work(model, output)
    (folder.result / "block-00000.safetensors").write_bytes(b"x")
    return folder.close(["block-00000.safetensors"])


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


PLACES = {
    "the model": "model",
    "inside the model": "model/out",
    "deep inside the model": "model/a/b/out",
    "inside by dots": "elsewhere/../model/out",
    "inside by a link": "link/out",
    "a link to the model": "link",
    "a file": "model/config.json",
    "a dangling link": "dangling",
    "a folder of others": "elsewhere",
    "a folder with another record": "recorded",
    "beside work of others": "taken",
    "beside a work folder with strays": "strays",
    "beside a work folder that is a file": "blocked",
    "beside a work folder that is a link": "linked",
    "where the model is the work folder": "named",
    "a name that is too long": "x" * 300,
    "below a file": "thesis.txt/out",
    "the root": "/",
    "inside a built-in model": "cache/demo-llama-0123/out",
    "a built-in model": "cache/demo-llava-0123",
    "among the digests": "cache/digests/out",
}


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_is_not_ours_is_refused_and_left_as_it_is(place, model, tmp_path, monkeypatch):
    monkeypatch.setenv("CASP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/thesis.txt").write_text("do not touch")
    (tmp_path / "thesis.txt").write_text("do not touch")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "recorded").mkdir()
    (tmp_path / "recorded" / RUN_FILE).write_text('{"fingerprint": "of something else"}')
    (tmp_path / "taken.partial").mkdir()
    (tmp_path / "taken.partial/thesis.txt").write_text("do not touch")
    work(model, tmp_path / "strays").release()
    (tmp_path / "strays.partial/thesis.txt").write_text("do not touch")
    (tmp_path / "blocked.partial").write_text("do not touch")
    (tmp_path / "linked.partial").symlink_to(tmp_path / "elsewhere")
    source = model
    if place == "where the model is the work folder":
        source = model.rename(tmp_path / "named.partial")
    before = tree(tmp_path)
    with pytest.raises(UserError) as refusal:
        work(source, tmp_path / PLACES[place])
    assert len(str(refusal.value).splitlines()) == 1
    assert "remove" not in str(refusal.value)
    assert tree(tmp_path) == before


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A model, and a link to it from beside."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "model/a").mkdir(parents=True)
    (folder / "a").symlink_to("model")
    return folder


@settings(deadline=None)
@given(parts=st.lists(st.sampled_from(["..", ".", "a", "model", "new"]), max_size=6))
def test_inside_is_what_the_file_system_says(root, parts):
    path = root.joinpath(*parts)
    inside = os.path.commonpath([os.path.realpath(path), root / "model"]) == str(root / "model")
    if inside:
        with pytest.raises(UserError):
            refuse_inputs(path, [root / "model"])
    else:
        refuse_inputs(path, [root / "model"])


def test_a_result_that_appears_meanwhile_is_not_replaced_and_the_run_is_kept(tiny_llama, tmp_path):
    folder = work(tiny_llama, tmp_path / "out")
    (folder.result / "block-00000.safetensors").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="move away what stands there"):
        folder.close(["block-00000.safetensors"])
    folder.release()
    assert tree(tmp_path / "out") == {"thesis.txt": b"do not touch"}
    (tmp_path / "out/thesis.txt").unlink()
    assert (finished(tiny_llama, tmp_path / "out") / "block-00000.safetensors").read_bytes() == b"x"
    assert not (tmp_path / "out.partial").exists()


def test_what_others_put_into_the_result_is_named_and_stays(tiny_llama, tmp_path):
    folder = work(tiny_llama, tmp_path / "out")
    (folder.result / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match=r"thesis\.txt was not written by this run"):
        folder.close([])
    assert (folder.result / "thesis.txt").exists()


def test_leftovers_of_a_finished_run_go_but_not_what_others_put_there(tiny_llama, tmp_path):
    folder = work(tiny_llama, tmp_path / "out")
    (folder.result / "block-00000.safetensors").write_bytes(b"x")
    (folder.folder / "thesis.txt").write_text("do not touch")
    folder.close(["block-00000.safetensors"])
    assert tree(tmp_path / "out.partial") == {"thesis.txt": b"do not touch"}
    assert work(tiny_llama, tmp_path / "out").done


def test_a_lock_on_a_file_that_was_removed_since_is_not_held(tmp_path):
    from casp.run.files import lock

    first = lock(tmp_path / "lock")
    assert lock(tmp_path / "lock") is None
    (tmp_path / "lock").unlink()
    second = lock(tmp_path / "lock")
    assert second is not None
    first.close()
    assert lock(tmp_path / "lock") is None


def test_a_record_is_ours_only_as_we_write_it(tiny_llama, tmp_path):
    record = json.loads((finished(tiny_llama, tmp_path / "out") / RUN_FILE).read_text())
    assert read_record(tmp_path / "out") == record
    others = [None, 3, [], [record], {}, record | {"version": 2}, record | {"kind": "thesis"}, record | {"kind": []}]
    others += [record | {"fingerprint": wrong} for wrong in (None, [], "", {}, {"settings": 1})]
    for other in others:
        (tmp_path / RUN_FILE).write_text(json.dumps(other))
        assert read_record(tmp_path) is None
    for text in ("", "{", "\0", "[" * 100_000):
        (tmp_path / RUN_FILE).write_text(text)
        assert read_record(tmp_path) is None


SHAPES = [{"model", "perplexity"}, {"model", "results"}]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"model": 1}', '[{"model": 1, "results": 2}]', "\udcff"])
def test_a_file_of_others_is_no_place_for_figures(tmp_path, text):
    file = tmp_path / "figures.json"
    check_file(file, SHAPES)
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match="choose another --output"):
        check_file(file, SHAPES)
    file.write_text('{"model": "m", "results": {}}')
    check_file(file, SHAPES)
    with pytest.raises(UserError, match="an input"):
        check_file(file, SHAPES, [file])
    with pytest.raises(UserError, match="choose another"):
        check_file(tmp_path, SHAPES)


def test_a_report_goes_neither_into_a_model_nor_over_other_files(tmp_path, tiny_llama):
    names = ("report.json", "report.md")
    check_report(tmp_path / "new", names, [], "report.json", {"model"})
    check_report(tmp_path, names, [], "report.json", {"model"})
    with pytest.raises(UserError, match="an input"):
        check_report(tiny_llama, names, [tiny_llama], "report.json", {"model"})
    with pytest.raises(UserError, match="of a model"):
        check_report(tiny_llama, names, [], "report.json", {"model"})
    (tmp_path / "report.md").write_text("# Thesis")
    with pytest.raises(UserError, match=r"report\.md exists"):
        check_report(tmp_path, names, [], "report.json", {"model"})
    (tmp_path / "report.json").write_text('[{"model": "m"}]')
    check_report(tmp_path, names, [], "report.json", {"model"})
    with pytest.raises(UserError, match="root of the file system"):
        check_report(tmp_path.parents[-1], names, [], "report.json", {"model"})
    with pytest.raises(UserError, match="cannot be read"):
        check_report(tmp_path / ("x" * 300), names, [], "report.json", {"model"})


def test_the_hessians_are_an_input_too(tiny_llama, tmp_path):
    folder = finished(tiny_llama, tmp_path / "hessians")
    with pytest.raises(UserError, match="lies inside"):
        check_places(folder / "out", [tiny_llama, folder])


def test_a_file_that_looks_unfinished_is_the_users(tmp_path):
    (tmp_path / "figures.json.tmp").write_text("do not touch")
    (tmp_path / "figures.json").write_text("{}")
    write_json(tmp_path / "figures.json", {"a": 1})
    write_shard(tmp_path / "x.safetensors", {"a": torch.ones(2)})
    (tmp_path / "x.safetensors.tmp").mkdir()
    write_shard(tmp_path / "x.safetensors", {"a": torch.zeros(2)})
    assert {path.name for path in tmp_path.iterdir()} == {
        "figures.json",
        "figures.json.tmp",
        "x.safetensors",
        "x.safetensors.tmp",
    }
    assert (tmp_path / "figures.json.tmp").read_text() == "do not touch"


def test_what_a_write_that_was_cut_off_has_left_is_in_nobodys_way(tiny_llama, tmp_path):
    left = temporary(tmp_path / "out.partial/work-block-00000.json")
    work(tiny_llama, tmp_path / "out").release()
    left.write_text("{")
    shard = temporary(tmp_path / "out.partial/result/block-00000.safetensors")
    shard.mkdir()
    (shard / "block-00000.safetensors").write_bytes(b"half")
    folder = finished(tiny_llama, tmp_path / "out")
    assert {path.name for path in folder.iterdir()} == {"block-00000.safetensors", RUN_FILE, LOG_FILE}
    assert not (tmp_path / "out.partial").exists()


def test_an_empty_folder_where_the_run_works_holds_nothing_to_lose(tiny_llama, tmp_path):
    (tmp_path / "out.partial").mkdir()
    assert finished(tiny_llama, tmp_path / "out").is_dir()
    assert not (tmp_path / "out.partial").exists()
