"""The records of options are a run's fingerprint: every flag that decides bytes changes it, and nothing else does."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from casp.cli import Compute, union
from casp.moments.__main__ import main as collect
from casp.run.folder import WorkFolder

COMMON = {
    "model": None,  # its content hash is part of every fingerprint
    "output": None,
    "device": None,  # there is one kind on most machines; its name is tested below
    "dtype": ["bfloat16"],
    "seed": ["7"],
    "samples": ["5"],
    "sequence_length": ["40"],
    "batch_size": ["3"],
    "dataset": ["other.txt"],
    "frames": ["3"],
    "visual_tokens": ["64"],
    "allow_partial": None,  # lets a run begin; the share that it compresses is part of the fingerprint
}
MOMENTS_AND_PLAN = {"moments": None, "plan": None}  # part of the fingerprint by their contents, see the tests of plans
QUANTIZING = {
    **COMMON,
    **MOMENTS_AND_PLAN,
    "bits_budget": ["12"],
    "target_bytes_of": None,  # a budget like the one above, read from a checkpoint
    "from_original": None,  # which model is read
    "true_sequential": [],
    "carry": None,  # a recipe in the finished checkpoint, which decides no weights
    "token_weights": ["none"],
}
TUNING = {
    "ft_epochs": ["1"],
    "block_epochs": ["5"],
    "e2e_epochs": ["5"],
    "block_lr": ["0.5"],
    "e2e_lr": ["0.5"],
    "gradient_checkpointing": [],
}
#: stage: (module, flags that every run gets, flag -> the words that change it, None where it changes no fingerprint).
#: A flag of the stage that is not named here fails the test: whoever adds one says what it does to a run.
STAGES = {
    "svd": (
        "casp_svd",
        [],
        {**COMMON, "moments": None, "whitening": ["input"], "keep_ratio": ["0.5"], "damping": ["1"]},
    ),
    "gptq": (
        "casp_gptq",
        ["--bits", "4"],
        {
            **QUANTIZING,
            "token_weights": ["attention"],
            "bits": ["3"],
            "group_size": ["16"],
            "symmetric": ["--symmetric"],
            "act_order": [],
            "damping": ["0.5"],
            "clip_search": ["3"],
            "sweeps": ["5"],
            "export": None,  # written besides, from the finished output
        },
    ),
    "quip-sharp": (
        "casp_quip_sharp",
        [],
        {
            **QUANTIZING,
            **TUNING,
            "bits": ["3"],
            "codebook": ["e8p"],
            "trellis_states": ["10"],
            "damping": ["0.5"],
            "scale_search": [],
            "sweeps": ["5"],
        },
    ),
    "aqlm": (
        "casp_aqlm",
        ["--scheme", "1x4g4"],
        {
            **QUANTIZING,
            **TUNING,
            "scheme": ["2x4g4"],
            "entries": ["float8"],
            "damping": ["0.5"],
            "tolerance": ["0.5"],
            "max_rounds": ["5"],
            "export": None,
        },
    ),
    "moments": (
        "casp.moments",
        ["--token-weights", "none"],
        {**COMMON, "token_weights": ["attention"], "gradients": ["--no-gradients"], "from_original": None},
    ),
}


class Entered(Exception):
    """A run would begin, with this fingerprint."""


@pytest.fixture
def fingerprint_of(monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, texts: Path, tmp_path: Path) -> Callable:
    """What a stage's flags make the fingerprint of a run; the run itself does not begin."""
    (tmp_path / "other.txt").write_text(texts.read_text()[::-1])
    monkeypatch.chdir(tmp_path)

    def stop(self: WorkFolder) -> bool:
        raise Entered(self.fingerprint)

    monkeypatch.setattr(WorkFolder, "_enter", stop)

    def run(module: str, *flags: str, data: bool = True) -> dict[str, Any]:
        words = ["--dataset", str(texts), "--samples", "4", "--sequence-length", "32", "--batch-size", "2"]
        main = importlib.import_module(f"{module}.__main__").main
        with pytest.raises(Entered) as entered:
            main(["--model", str(tiny_llama), "--output", str(tmp_path / "out"), *(words if data else []), *flags])
        return entered.value.args[0]

    return run


def flags_of(module: str) -> dict[str, Any]:
    """The stage's flags by the name under which it reads them."""
    stage = importlib.import_module(f"{module}.__main__")
    parser = stage.parser()
    return {action.dest: action for action in parser._actions if action.dest != "help"}


@pytest.mark.parametrize("stage", STAGES)
def test_every_flag_that_changes_bytes_changes_the_fingerprint(fingerprint_of: Callable, stage: str):
    module, always, changes = STAGES[stage]
    if stage != "moments":
        always = [*always, "--moments", "none"]
    flags = flags_of(module)
    assert set(flags) == set(changes)
    usual = fingerprint_of(module, *always)
    assert usual == fingerprint_of(module, *always)
    for name, words in changes.items():
        if words is None:
            continue
        flag = flags[name].option_strings[0]
        off = f"--no-{flag.removeprefix('--')}"
        changed = words if words[:1] and words[0].startswith("--") else [off] if not words else [flag, *words]
        assert fingerprint_of(module, *always, *changed) != usual, changed


def test_every_flag_that_changes_prices_changes_their_fingerprint(
    tiny_llama: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
):
    moments = tmp_path_factory.mktemp("options") / "moments"
    data = ["--dataset", str(texts), "--samples", "4", "--sequence-length", "32"]
    collect(["--model", str(tiny_llama), "--output", str(moments), *data])
    fingerprint_of = request.getfixturevalue("fingerprint_of")
    always = ["--moments", str(moments), "--backend", "gptq", "--costs", "costs"]

    def prices(*flags: str) -> dict[str, Any]:
        budget = [] if {"--bits", "--size"} & {*flags} else ["--bits", "6"]  # small groups need as much
        return fingerprint_of("casp.plan", *always, *budget, *flags, data=False)

    changes = [
        ["--backend", "quip-sharp"],
        ["--format", "group_size=16"],
        ["--token-weights", "attention"],
        ["--dtype", "bfloat16"],
        ["--seed", "7"],
    ]
    budgets = [["--bits", "7"], ["--size", "1MB"], ["--no-low-rank"], ["--allocation", "paper"]]
    assert all(prices(*flags) != prices() for flags in changes)
    assert all(prices(*flags) == prices() for flags in budgets)  # one pricing serves every budget
    assert prices("--backend", "quip-sharp", "--tuned") != prices("--backend", "quip-sharp")


@pytest.mark.parametrize("stage", ["gptq", "moments", "svd"])
def test_where_the_output_goes_does_not_change_the_fingerprint(fingerprint_of: Callable, tmp_path: Path, stage: str):
    module, always, _ = STAGES[stage]
    assert fingerprint_of(module, *always) == fingerprint_of(module, *always, "--output", str(tmp_path / "elsewhere"))


def test_a_kind_of_device_and_a_decided_dtype_stand_in_the_record():
    asked = Compute(torch.device("cuda", 1), None, 3)
    assert asked.of(torch.float16).record() == {"device": "cuda", "dtype": "float16", "seed": 3}
    assert Compute(torch.device("cpu"), None).of(torch.float16).dtype == torch.float32
    assert Compute(torch.device("cpu"), torch.bfloat16).of(torch.float16).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="decided"):
        asked.record()


def test_records_that_contradict_each_other_make_no_fingerprint():
    assert union({"seed": 1}, {"seed": 1, "bits": 2}) == {"seed": 1, "bits": 2}
    with pytest.raises(ValueError, match="called seed"):
        union({"seed": 1}, {"seed": 2})
