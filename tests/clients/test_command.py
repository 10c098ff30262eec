"""The command `casp`: every script by one name."""

import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from casp_entry import command

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs `casp WORDS...` in this process: exit status, stdout, stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["casp", *words])
        monkeypatch.setenv("COLUMNS", "200")
        try:
            status = command.main()
        except SystemExit as ended:
            status = ended.code or 0
        return status, *capsys.readouterr()

    return call


def test_help_lists_all_commands(run):
    status, out, _ = run("--help")
    assert status == 0
    assert all(name in out for name in ("svd", "moments", "plan", "quantize", "compress", "compare", "chat", "gptq"))
    assert run()[0] == 2
    assert run("--version")[1].startswith("casp 0.")


@pytest.mark.parametrize("name", sorted(entry_points(group=command.COMMANDS).names))
def test_every_command_explains_itself(run, name: str):
    status, out, err = run(name, "--help")
    assert (status, err) == (0, "")
    assert "--model" in out or "CHECKPOINT" in out


@pytest.mark.parametrize("words", [("--backend", "gptq", "--help"), ("--help", "--backend=quip-sharp")])
def test_quantize_is_the_stage_of_its_backend(run, words: tuple[str, ...]):
    status, out, _ = run("quantize", *words)
    assert status == 0
    assert ("--group-size" if "gptq" in words else "--codebook") in out


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("quantise",), "no command 'quantise'"),
        (("quantize", "--bits", "2"), "needs --backend, one of "),
        (("quantize", "--backend"), "needs --backend"),
        (("quantize", "--backend", "gptk"), "needs --backend"),
        (("svd", "--model", "/nowhere/lama"), "/nowhere/lama does not exist"),
        (("compress", "--recipe", "/nowhere/recipe.yaml"), "/nowhere/recipe.yaml"),
    ],
)
def test_mistakes_end_in_one_sentence(run, words: tuple[str, ...], named: str):
    status, _, err = run(*words)
    assert status == 2
    assert named in err
    assert len(err.splitlines()) == 1
