"""Recipes: settings in a file, in a checkpoint, and from Python, which all say what flags say."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given as drawn
from hypothesis import strategies as st

import casp
from casp import job
from casp.api import Calibration, collect_moments, make_plan, quantize
from casp.cli import Parser, calibration_of
from casp.errors import UserError
from casp.model.modality import Visual
from casp.run import recipe


def small_parser() -> argparse.ArgumentParser:
    flags = Parser(prog="small")
    flags.add_argument("--model", default="m")
    flags.add_argument("--bits", type=float)
    flags.add_argument("--low-rank", action=argparse.BooleanOptionalAction, default=True)
    flags.add_argument("--evaluate", action="store_true")
    flags.add_argument("--format", nargs="*", default=[])
    flags.add_argument("--weights", nargs="+", default=["none"])
    flags.add_argument("quantizing", nargs="*")
    return flags


WORDS = st.text(st.characters(codec="ascii", exclude_characters="\0"), min_size=1).filter(lambda word: word != "--")


@drawn(
    st.fixed_dictionaries(
        {"model": WORDS},
        optional={
            "bits": st.floats(0, 16),
            "low_rank": st.booleans(),
            "evaluate": st.booleans(),
            "format": st.lists(WORDS.filter(lambda word: not word.startswith("-")), min_size=1),
            "weights": st.lists(WORDS.filter(lambda word: not word.startswith("-")), min_size=1),
            "quantizing": st.lists(WORDS, min_size=1),
        },
    )
)
def test_settings_and_flags_say_the_same(settings: dict):
    parser = small_parser()
    args = parser.parse_args(recipe.flags(settings, parser))
    assert {name: getattr(args, name) for name in settings} == settings
    again = parser.parse_args(recipe.flags(args.given, parser))
    assert vars(again) == vars(args)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"bitz": 2}, "'bitz'"),
        ({"bits": True}, "bits is true"),
        ({"evaluate": "yes"}, "evaluate cannot be yes"),
        ({"bits": {"a": 1}}, "bits cannot be"),
        ({"bits": 1 << 20_000}, "bits cannot be a number of 20001 bits"),
        ({"format": [["x"]]}, "format cannot be a list"),
        ({"quantizing": [{}]}, "quantizing cannot be a dict"),
        ({"help": True}, "'help'"),
    ],
)
def test_settings_that_are_none(settings: dict, named: str):
    with pytest.raises(UserError, match=named):
        recipe.flags(settings, small_parser())


BOMB = "bits:\n- &a0 [x, x]\n" + "".join(f"- &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("r.yaml", "[1, 2", "no YAML"),
        ("r.yaml", "- 1", "no mapping"),
        ("r.yaml", "!!python/object/apply:os.system ['true']", "no YAML"),
        ("r.json", '{"recipe": 9, "steps": []}', "no recipe that this casp knows"),
        ("r.json", '{"recipe": 1, "steps": [{"command": "svd"}]}', "no step of `casp compress`"),
        ("r.json", '{"command": "svd"}', "is for `casp svd`"),
        ("r.json", "[" * 100_000, "recipe"),
        ("r.yaml", "format: " + "[" * 32_000, "no YAML of plain settings"),
        ("r.yaml", "format: &a [*a]", "no YAML of plain settings"),
        # ten times as much text a line
        ("r.yaml", BOMB, "no YAML of plain settings"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, text: str, named: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        recipe.read_recipe(tmp_path / name, "compress")


def test_flags_overrule_the_recipe(tmp_path: Path):
    file = tmp_path / "r.yaml"
    file.write_text("model: demo-llama\nbackend: gptq\nsamples: 7\nlow-rank: false\nquantizing: [--sweeps, 1]\n")
    words = recipe.with_recipe(["--recipe", str(file), "--samples", "9"], job.parser(), "compress")
    args = job.parser().parse_args(words)
    assert (args.model, args.backend, args.samples, args.low_rank) == ("demo-llama", "gptq", 9, False)
    assert args.quantizing == ["--sweeps", "1"]
    assert recipe.with_recipe(["--samples", "9"], job.parser(), "compress") == ["--samples", "9"]


def test_a_flag_overrules_the_setting_that_it_excludes(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("model: demo-llama\nbackend: gptq\nbits: 2.5\n")
    for given in (["--size", "30MB"], ["--size=30MB"]):
        words = recipe.with_recipe(["--recipe", str(tmp_path / "r.yaml"), *given], job.parser(), "compress")
        found = job.parser().parse_args(words)
        assert found.bits is None
        assert found.size is not None


def test_calibration_has_the_defaults_of_the_flags():
    args = job.parser().parse_args(["--backend", "gptq"])
    assert calibration_of(args) == Calibration()
    assert all(getattr(args, name) == value for name, value in Calibration().record().items())
    words = recipe.flags(Calibration("c4", 3, 5, 7, Visual(frames=2, tokens=9)).record(), job.parser())
    assert calibration_of(job.parser().parse_args([*words, "--backend", "gptq"])).visual == Visual(2, 9)


def test_a_recipe_is_no_setting_of_itself():
    with pytest.raises(UserError, match="no setting 'recipe'"):
        casp.compress("demo-llama", output="out", backend="gptq", recipe="file.yaml")


def test_the_whole_job_from_python_and_again_from_its_recipe(tiny_llama: Path, texts: Path, tmp_path: Path):
    heard = []
    calibration = Calibration(str(texts), samples=4, sequence_length=32, batch_size=2)
    first = casp.compress(
        tiny_llama,
        output=tmp_path / "first",
        bits=4.5,
        backend="gptq",
        calibration=calibration,
        format=["group_size=32"],
        moments=tmp_path / "moments",
        costs=tmp_path / "costs",
        progress=heard.append,
    )
    assert first == tmp_path / "first"
    stages = list(dict.fromkeys(one.stage for one in heard))
    assert [one.done for one in heard if one.stage == stages[-1]] == [0, 1, 2, 3]
    carried = json.loads((first / recipe.RECIPE_FILE).read_text())
    assert [step["command"] for step in carried["steps"]] == ["compress"]
    assert carried["steps"][0]["bits"] == 4.5
    file = tmp_path / "again.yaml"
    file.write_text(yaml.safe_dump(carried))
    job.run(
        job.parser().parse_args(
            recipe.with_recipe(["--recipe", str(file), "--output", str(tmp_path / "second")], job.parser(), "compress")
        )
    )
    for shard in first.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "second" / shard.name).read_bytes()


def test_the_stages_one_by_one(tiny_llama: Path, texts: Path, tmp_path: Path):
    calibration = Calibration(str(texts), samples=4, sequence_length=32, batch_size=2)
    moments = collect_moments(tiny_llama, output=tmp_path / "moments", calibration=calibration)
    plan = make_plan(
        tiny_llama, output=tmp_path / "p.json", moments=moments, bits=5, backend="gptq", costs=tmp_path / "c"
    )
    made = quantize(
        tiny_llama, output=tmp_path / "made", backend="gptq", plan=plan, moments=moments, calibration=calibration
    )
    (step,) = json.loads((made / recipe.RECIPE_FILE).read_text())["steps"]
    assert (step["command"], step["backend"], step["plan"]) == ("quantize", "gptq", str(plan))
    with pytest.raises(UserError, match="no backend called"):
        quantize(tiny_llama, output=tmp_path / "x", backend="gptk")


def test_a_damaged_recipe_is_told_before_any_work(tiny_llama: Path, tmp_path: Path):
    from casp_gptq.__main__ import main as gptq
    from casp_svd.__main__ import main as svd

    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"recipe": 9}')
    with pytest.raises(UserError, match="no recipe that this casp knows"):
        gptq(["--model", str(tiny_llama), "--carry", str(damaged), "--output", str(tmp_path / "out")])
    source = tmp_path / "source"
    shutil.copytree(tiny_llama, source)
    shutil.copy(damaged, source / recipe.RECIPE_FILE)
    for stage in (gptq, svd):
        with pytest.raises(UserError, match="no recipe that this casp knows"):
            stage(["--model", str(source), "--output", str(tmp_path / "out")])
    assert {path.name for path in tmp_path.iterdir()} == {"damaged.json", "source"}


def test_a_chain_of_stages_is_told_whole(tiny_llama: Path, texts: Path, tmp_path: Path):
    from casp_gptq.__main__ import main as gptq
    from casp_svd.__main__ import main as svd

    data = ["--dataset", str(texts), "--samples", "4", "--sequence-length", "32"]
    svd(["--model", str(tiny_llama), *data, "--output", str(tmp_path / "svd")])
    gptq(["--model", str(tmp_path / "svd"), *data, "--bits", "4", "--output", str(tmp_path / "gptq")])
    steps = json.loads((tmp_path / "gptq" / recipe.RECIPE_FILE).read_text())["steps"]
    assert [step["command"] for step in steps] == ["svd", "quantize"]
