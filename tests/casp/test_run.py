"""Run folders: resume, refusal, and the same bytes in the end."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import stat
from pathlib import Path

import pytest
import torch

import casp.run.files
from casp.backend import load_backend
from casp.budget import uniform_plan
from casp.cli import base_model
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.quantize import quantize_blocks
from casp.rounding import Method
from casp.run.files import write_shard
from casp.run.folder import LOG_FILE, WORK_PREFIX
from casp.run.report import REPORT_FILE, merge_reports, read_report
from casp.run.writer import RunFolder

CPU = torch.device("cpu")
BATCHES = [{"input_ids": torch.arange(4, 36).reshape(2, 16)}]


def toy_run(folder: Path, output: Path, **changes) -> RunFolder:
    settings = {"backend": "toy", "bits": 4} | changes
    return RunFolder(output, Decoder(folder), "toy", "tiny", settings, "calibration")


def toy_stage(folder: Path, output: Path, **changes) -> None:
    """What a stage's main does after reading its flags."""
    run = toy_run(folder, output, **changes)
    if run.done:
        return
    plan = uniform_plan(run.decoder, {"bits": run.settings["bits"]})
    quantize_blocks(run.decoder, run, BATCHES, Method(load_backend("toy"), plan, {}), CPU, torch.float32)
    run.finish()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir()) if file.name != LOG_FILE}


def test_output_is_complete_or_absent(tiny_llama, tmp_path, toy_site):
    output = tmp_path / "out"
    toy_stage(tiny_llama, output)
    assert not output.with_name("out.partial").exists()
    names = set(contents(output))
    assert {"config.json", "model.safetensors.index.json", "README.md", "casp_report.json", "tokenizer.json"} <= names
    assert not [name for name in names if ".casp-tmp" in name or name.startswith("block-") or name == "lock"]
    before = contents(output)
    toy_stage(tiny_llama, output)
    assert contents(output) == before


def test_files_can_be_read_as_the_umask_says_and_the_card_counts_what_is_there(tiny_llama, tmp_path, toy_site):
    output = tmp_path / "out"
    run = toy_run(tiny_llama, output)
    write_shard(run.folder / f"{WORK_PREFIX}learned.safetensors", {"x": torch.zeros(100_000)})
    run.release()
    old = os.umask(0o027)
    try:
        toy_stage(tiny_llama, output)
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in output.iterdir()} == {0o640}
    stored = sum(file.stat().st_size for file in output.glob("*.safetensors"))
    assert f"; {stored / 1e6:.1f} MB of safetensors" in (output / "README.md").read_text()


def test_weights_that_change_while_they_are_read_are_not_kept(tiny_llama, tmp_path, toy_site):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    run = toy_run(model, tmp_path / "out")
    shard = sorted(model.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    plan = uniform_plan(run.decoder, {"bits": 4})
    shard.write_bytes(data)
    with pytest.raises(UserError, match="was changed while the run read it"):
        quantize_blocks(run.decoder, run, BATCHES, Method(load_backend("toy"), plan, {}), CPU, torch.float32)
    assert not list(run.result.iterdir())


def test_the_card_names_the_model_that_everything_derives_from(tiny_llama, tmp_path):
    assert base_model(tiny_llama, str(tiny_llama)) == "tiny-llama"
    assert base_model(tiny_llama, "llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    (tmp_path / "casp_report.json").write_text('{"base_model": "llava-hf/llava-1.5-7b-hf", "stages": [], "blocks": []}')
    assert base_model(tmp_path, str(tmp_path)) == "llava-hf/llava-1.5-7b-hf"


def test_other_settings_are_refused_with_what_differs(tiny_llama, tiny_qwen2, tmp_path, toy_site):
    output = tmp_path / "out"
    toy_stage(tiny_llama, output)
    with pytest.raises(UserError, match="bits 4 -> 3"):
        toy_run(tiny_llama, output, bits=3)
    with pytest.raises(UserError, match="differs in: model"):
        toy_run(tiny_qwen2, output)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("do not touch")
    with pytest.raises(UserError, match="holds other files"):
        toy_run(tiny_llama, tmp_path / "other")


def test_a_begun_run_with_other_settings_is_refused(tiny_llama, tmp_path, toy_site):
    output = tmp_path / "out"
    run = toy_run(tiny_llama, output)
    with pytest.raises(UserError, match="another process"):
        toy_run(tiny_llama, output)
    run.release()
    with pytest.raises(UserError, match="bits 4 -> 2"):
        toy_run(tiny_llama, output, bits=2)


def test_changed_weights_are_noticed(tiny_llama, tmp_path, toy_site):
    copy = tmp_path / "model"
    shutil.copytree(tiny_llama, copy)
    output = tmp_path / "out"
    toy_stage(copy, output)
    shard = sorted(copy.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match="differs in: model"):
        toy_run(copy, output)


def _dies(folder: Path, output: Path, site: str, kind: str, call: int) -> None:
    """In a child: run the stage and die of SIGKILL at the `call`-th call of one of the file operations."""
    import sys

    sys.path.insert(0, site)
    torch.set_num_threads(1)
    count = 0
    real = getattr(os, kind) if hasattr(os, kind) else getattr(casp.run.files, kind)

    def deadly(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            if kind == "save_file":
                Path(args[1]).write_bytes(b"half of a shard")
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    setattr(os if hasattr(os, kind) else casp.run.files, kind, deadly)
    toy_stage(folder, output)


KILLS = [
    *(("replace", call) for call in (1, 2, 3, 4, 6, 8, 9, 10, 14)),
    *(("fsync", call) for call in (1, 3, 4, 6, 8, 12, 16, 20, 26)),
    *(("save_file", call) for call in (1, 2, 3, 4)),
]


def test_killed_anywhere_the_rerun_ends_with_the_same_bytes(tiny_llama, tmp_path, toy_site):
    """SIGKILL at 22 places, inside writes among them, one after the other on one run folder and each alone."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["casp.quantize", "transformers.models.llama.modeling_llama"])
    toy_stage(tiny_llama, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    killed = 0
    for kind, call in KILLS:
        output = tmp_path / f"{kind}-{call}"
        child = context.Process(target=_dies, args=(tiny_llama, output, str(toy_site), kind, call))
        child.start()
        child.join()
        if child.exitcode == -signal.SIGKILL:
            killed += 1
            finished = output.exists()
            assert not finished or contents(output) == expected
        toy_stage(tiny_llama, output)
        assert contents(output) == expected, (kind, call)
    assert killed >= 20


def test_killed_again_and_again_the_run_still_ends_with_the_same_bytes(tiny_llama, tmp_path, toy_site):
    context = multiprocessing.get_context("forkserver")
    toy_stage(tiny_llama, tmp_path / "whole")
    output = tmp_path / "out"
    for _ in range(4):
        child = context.Process(target=_dies, args=(tiny_llama, output, str(toy_site), "replace", 4))
        child.start()
        child.join()
    toy_stage(tiny_llama, output)
    assert contents(output) == contents(tmp_path / "whole")


@pytest.mark.parametrize("call", [1, 3, 4])
def test_a_full_disk_leaves_no_half_written_file(tiny_llama, tmp_path, toy_site, monkeypatch, call):
    output = tmp_path / "out"
    real, count = casp.run.files.save_file, 0

    def full(tensors, path, metadata):
        nonlocal count
        count += 1
        if count == call:
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path, metadata)

    monkeypatch.setattr(casp.run.files, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        toy_stage(tiny_llama, output)
    assert not output.exists()
    assert not list(output.with_name("out.partial").rglob("*.casp-tmp*"))
    monkeypatch.undo()
    toy_stage(tiny_llama, output)
    toy_stage(tiny_llama, tmp_path / "whole")
    assert contents(output) == contents(tmp_path / "whole")


def test_report_keeps_what_an_earlier_stage_said(tmp_path):
    earlier = {
        "stage": "svd",
        "base_model": "tiny-llama",
        "stages": [{"stage": "svd", "settings": {"keep_ratio": 0.25}}],
        "blocks": [{"index": 0, "block_influence": 0.4, "linears": {"q": {"rank": 7}}}],
    }
    (tmp_path / "casp_report.json").write_text(json.dumps(earlier))
    new = {"stage": "gptq", "settings": {"bits": 2}, "blocks": [{"index": 0, "linears": {"q.up": {"bits": 2.3}}}]}
    merged = merge_reports(tmp_path, new)
    assert merged["blocks"] == [
        {"index": 0, "block_influence": 0.4, "linears": {"q": {"rank": 7}, "q.up": {"bits": 2.3}}}
    ]
    assert [entry["stage"] for entry in merged["stages"]] == ["svd", "gptq"]


@pytest.mark.parametrize("file", ["work-block-00000.json", "result/model-00001-of-00004.safetensors"])
@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"[" * 100_000, b"\xff" * 100, None])
def test_damaged_work_is_told_with_its_remedy(tiny_llama, tmp_path, toy_site, monkeypatch, file, data):
    output = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "finish", lambda run: run.release())
        toy_stage(tiny_llama, output)
    path = tmp_path / "out.partial" / file
    path.write_bytes(path.read_bytes()[:-7] if data is None else data)
    with pytest.raises(UserError, match=r"move .*out\.partial away and run the same command again"):
        toy_stage(tiny_llama, output)
    assert not output.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"base_model": 3},
        {"stages": [{"stage": "svd"}]},
        {"stages": [{"stage": "svd", "settings": {"keep_ratio": "x"}}]},
        {"blocks": {}},
        {"blocks": [{"block_influence": float("nan")}]},
        {"blocks": [{"linears": {"q": 3}}]},
        {"blocks": [{"attention_density": {"text": "x"}}]},
        {"blocks": [{"tuning": [{"curve": [{"validation": None}]}]}]},
        {"end_to_end": [{}]},
    ],
)
def test_a_report_has_the_form_that_stages_write(tmp_path, wrong):
    good = {"base_model": "m", "stages": [], "blocks": [{}]}
    (tmp_path / REPORT_FILE).write_text(json.dumps(good))
    assert read_report(tmp_path) == good
    (tmp_path / REPORT_FILE).write_text(json.dumps(good | wrong))
    with pytest.raises(UserError, match="is no report of a stage"):
        read_report(tmp_path)
    assert read_report(tmp_path / "elsewhere") is None


def test_a_report_about_other_blocks_is_refused(tmp_path):
    (tmp_path / REPORT_FILE).write_text(json.dumps({"base_model": "m", "stages": [], "blocks": [{}]}))
    with pytest.raises(UserError, match="is about 1 blocks, the checkpoint has 2"):
        merge_reports(tmp_path, {"stage": "gptq", "settings": {}, "blocks": [{}, {}]})
