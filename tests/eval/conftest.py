"""Fixtures of the evaluation's tests: its scripts, questions on disk, and small compressed checkpoints."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from casp.cli import run_main
from casp.linear import LowRankLinear
from casp.model.decoder import Decoder
from casp.run.writer import RunFolder

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def run_script() -> Callable[..., subprocess.CompletedProcess]:
    """Runs a script of eval/scripts as a user would, from another folder."""

    def run(name: str, *args: object, stdin: str = "") -> subprocess.CompletedProcess:
        command = ["bash", str(ROOT / "eval/scripts" / name), *map(str, args)]
        return subprocess.run(command, input=stdin, cwd="/", env=os.environ, capture_output=True, text=True)

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .jsonl of six questions about three small pictures beside it."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    rows = []
    for index, (question, answer, kind) in enumerate(
        [
            ("What is this?", "a cat", "name"),
            ("What is it?", "Dog.", "name"),
            ("Is it big?", "yes", "yes/no"),
            ("Is it small?", "no", "yes/no"),
            ("How many are there in this rather long question?", "3", "count"),
            ("How many?", "12", "count"),
        ]
    ):
        name = f"{index % 3}.png"
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"image": name, "question": question, "answer": answer, "kind": kind})
    path = folder / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture) -> Callable[..., str]:
    """Runs a script's main in this process; it must end with status 2 and one line on stderr, which is returned."""

    def run(main: Callable[[list[str]], None], *args: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_main(lambda: main([str(word) for word in args]))
        out, err = capsys.readouterr()
        err = err.rpartition("\r")[2]  # a progress bar was cleared before the error
        assert ended.value.code == 2
        assert err.startswith("error: ")
        assert len(err.strip().splitlines()) == 1
        assert out == ""
        return err

    return run


@pytest.fixture(scope="session")
def low_rank_llava(tiny_llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llava` with q and k cut to rank 6 to 8, through a run folder, with what a stage reports."""
    decoder = Decoder(tiny_llava)
    output = tmp_path_factory.mktemp("stages") / "tiny-svd"
    run = RunFolder(output, decoder, "svd", str(tiny_llava), {"keep_ratio": 0.25}, "")
    batches = [{"input_ids": torch.arange(4, 20)[None]}]
    for visit in run.walk(batches, torch.device("cpu"), torch.float32):
        rank = 6 + visit.index
        for role in ("q", "k"):
            old = visit.block.get_submodule(visit.linears[role])
            u, s, v = torch.linalg.svd(old.weight, full_matrices=False)
            new = LowRankLinear(old.in_features, old.out_features, rank, False)
            new.up.weight.data, new.down.weight.data = u[:, :rank] * s[:rank], v[:rank]
            setattr(visit.block.self_attn, f"{role}_proj", new)
        run.save(
            visit,
            {
                "block_influence": 0.1 * (1 + visit.index),
                "attention_density": {"image": 0.1, "text": 0.2 + 0.1 * visit.index},
                "linears": {"q": {"rank": rank}, "k": {"rank": rank}},
            },
        )
    return run.finish()
