"""The stages as their users call them, small, each writing `ROOT/out`; and what becomes of a run that died."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM

import casp  # noqa: F401 - registers the attention
from casp.errors import UserError
from casp.run.folder import RANKS_FILE

SMALL = ["--samples", "4", "--sequence-length", "16", "--batch-size", "2", "--device", "cpu"]
TUNED = ["--block-lr", "1e-2", "--e2e-lr", "1e-1"]

Stage = Callable[[Path, Path, Path], None]
"""model, text, root -> the stage's output in `root`."""


def tiny_inputs(folder: Path, blocks: int = 2) -> tuple[Path, Path]:
    """A model of two blocks, a first and a last, or more, and a text to calibrate on."""
    spec = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "conftest.py")
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    config = LlamaConfig(**tiny.decoder_settings(num_hidden_layers=blocks))
    text = folder / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and sphinx of black quartz, judge my vow. " * 20)
    return tiny.text_checkpoint(LlamaForCausalLM, config, folder / "model", 1), text


def _flags(model: Path, text: Path, root: Path, *more: str) -> list[str]:
    return ["--model", str(model), "--dataset", str(text), "--output", str(root / "out"), *SMALL, *more]


def svd(model: Path, text: Path, root: Path) -> None:
    from casp_svd.__main__ import main

    main(_flags(model, text, root))


def moments(model: Path, text: Path, root: Path) -> None:
    from casp.moments.__main__ import main

    main(_flags(model, text, root, "--from-original"))


def gptq(model: Path, text: Path, root: Path, *more: str) -> None:
    from casp_gptq.__main__ import main

    main(_flags(model, text, root, "--group-size", "32", "--from-original", "--sweeps", "1", *more))


def gptq_export(model: Path, text: Path, root: Path) -> None:
    gptq(model, text, root, "--bits", "4", "--export", "gptq")


def _quip(model: Path, text: Path, root: Path, *more: str) -> None:
    from casp_quip_sharp.__main__ import main

    main(_flags(model, text, root, "--from-original", "--sweeps", "0", *TUNED, *more))


def quip_block(model: Path, text: Path, root: Path) -> None:
    _quip(model, text, root, "--block-epochs", "1", "--e2e-epochs", "0")


def quip_end_to_end(model: Path, text: Path, root: Path) -> None:
    _quip(model, text, root, "--block-epochs", "0", "--e2e-epochs", "2")


def aqlm(model: Path, text: Path, root: Path) -> None:
    from casp_aqlm.__main__ import main

    few = ["--scheme", "1x4g4", "--max-rounds", "1", "--ft-epochs", "0"]
    main(_flags(model, text, root, "--from-original", *few))


def plan(model: Path, text: Path, root: Path) -> None:
    """The plan's file beside the priced options that it comes from; moments are collected once, beside the model."""
    from casp.plan.__main__ import main

    collected = model.parent / "collected"
    if not (collected / "out").exists():
        moments(model, text, collected)
    flags = ["--model", str(model), "--moments", str(collected / "out"), "--device", "cpu"]
    budget = ["--backend", "gptq", "--format", "group_size=32", "--bits", "4"]
    main([*flags, *budget, "--costs", str(root / "costs"), "--output", str(root / "out" / "plan.json")])


def compress(model: Path, text: Path, root: Path) -> None:
    """All stages of the whole job, in this process one after the other instead of each in its own."""
    from casp import job

    budget = ["--backend", "gptq", "--format", "group_size=32", "--bits", "4"]
    places = ["--moments", str(root / "moments"), "--costs", str(root / "costs")]
    flags = _flags(model, text, root, *budget, *places, "--", "--clip-search", "0", "--sweeps", "0")
    job.run(job.parser().parse_args(flags))


STAGES: dict[str, Stage] = {
    "SVD": svd,
    "moments": moments,
    "GPTQ": gptq,
    "GPTQ with export": gptq_export,
    "QuIP#, tuned in the blocks": quip_block,
    "QuIP#, tuned end to end": quip_end_to_end,
    "AQLM": aqlm,
    "plan": plan,
    "compress": compress,
}


def run_quietly(name: str, model: Path, text: Path, root: Path) -> None:
    """Run a stage in a process that is started for it alone and may be killed."""
    os.setsid()
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        STAGES[name](model, text, root)


def contents(root: Path) -> dict[str, bytes | None]:
    """All files and folders below `root` but accounts of ranks; logs without their bytes, for they tell the time."""
    return {
        str(path.relative_to(root)): None if path.is_dir() or path.suffix == ".log" else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.name != RANKS_FILE
    }


def rerun(stage: Stage, model: Path, text: Path, root: Path, state: Path, expected: dict[str, bytes | None]) -> str:
    """What the same command makes of `state`: "same bytes", "other bytes", "refused: ..." or "lost: ..."."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(state, root, symlinks=True)
    try:
        stage(model, text, root)
    except UserError as error:
        return f"refused: {error}"
    except Exception as error:
        return f"lost: {type(error).__name__}: {error}"
    found = contents(root)
    if found == expected:
        return "same bytes"
    differ = sorted(name for name in found.keys() | expected.keys() if found.get(name, 0) != expected.get(name, 0))
    return f"other bytes: {', '.join(differ)}"
