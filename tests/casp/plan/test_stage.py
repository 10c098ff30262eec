"""From moments to a plan to a checkpoint, as a user runs it, on tiny models."""

import json
import shutil

import pytest
import torch
from casp_gptq.__main__ import main as gptq
from casp_quip_sharp.__main__ import main as quip_sharp
from casp_svd.__main__ import main as svd
from scipy.optimize import milp
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import casp
from casp import job
from casp.errors import UserError
from casp.job import main as compress
from casp.model.checkpoint import size
from casp.model.decoder import Decoder
from casp.moments.__main__ import main as collect
from casp.plan.__main__ import main as plan
from casp.plan.allocate import knapsack
from casp.plan.options import LinearOptions, Option


@pytest.fixture(scope="module")
def moments(tiny_llama, texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan") / "moments"
    collect(["--model", str(tiny_llama), "--output", str(folder), *data_flags(texts)])
    return folder


def data_flags(texts):
    return ["--dataset", str(texts), "--samples", "4", "--sequence-length", "64", "--batch-size", "2"]


def make_plan(model, moments, output, *more, backend="quip-sharp", bits="2.6"):
    flags = ["--model", str(model), "--moments", str(moments), "--backend", backend, "--bits", bits]
    plan([*flags, "--costs", str(output.parent / f"costs-{backend}"), "--output", str(output), *more])
    return json.loads(output.read_text())


@pytest.fixture(scope="module")
def planned(tiny_llama, moments, tmp_path_factory):
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    make_plan(tiny_llama, moments, file)
    return file


def quantize(stage, model, texts, moments, plan_file, output, *more):
    flags = ["--model", str(model), "--plan", str(plan_file), "--moments", str(moments), "--output", str(output)]
    stage([*flags, *data_flags(texts), *more])


def test_plan_keeps_to_its_budget_and_says_what_it_chose(tiny_llama, planned, capsys):
    found = json.loads(planned.read_text())
    weights = Decoder(tiny_llama).original_weights()
    assert 0.97 * 2.6 <= found["bits"] <= 2.6
    assert found["bytes"] == sum(entry["bytes"] for entry in found["linears"].values())
    assert found["bits"] == pytest.approx(8 * found["bytes"] / weights)
    assert any(entry["rank"] for entry in found["linears"].values())
    others = [entry for path, entry in found["linears"].items() if not path.endswith(("q_proj", "k_proj"))]
    assert all(entry["rank"] is None for entry in others)
    assert found["predicted"] > 0


def test_checkpoint_is_what_the_plan_says_to_the_byte(tiny_llama, texts, moments, planned, tmp_path):
    output = tmp_path / "model"
    quantize(quip_sharp, tiny_llama, texts, moments, planned, output, "--ft-epochs", "0")
    found = json.loads(planned.read_text())
    assert size(output).bytes == found["bytes"]
    modules = json.loads((output / "config.json").read_text())["quantization_config"]["modules"]
    for path, entry in found["linears"].items():
        if entry["rank"] is None:
            assert modules[path]["format"] == entry["formats"][0]
        else:
            assert modules[path] == {"rank": entry["rank"]}
            assert [modules[f"{path}.{factor}"]["format"] for factor in ("down", "up")] == entry["formats"]
    model = AutoModelForCausalLM.from_pretrained(output)
    original = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = torch.arange(4, 68)[None]
    with torch.no_grad():
        assert torch.isfinite(model(ids).logits).all()
        error = (model(ids).logits - original(ids).logits).square().mean() / original(ids).logits.square().mean()
    assert error < 1


@pytest.mark.parametrize("name", ["q_proj", "v_proj"])
def test_an_edited_plan_is_obeyed(tiny_llama, texts, moments, planned, tmp_path, name):
    """Also a rank of a matrix that the plan itself never makes low-rank; then it says what it does without."""
    edited = json.loads(planned.read_text())
    path = next(path for path in edited["linears"] if path.endswith(f"1.self_attn.{name}"))
    edited["linears"][path] |= {"rank": 9, "formats": [{"bits": 4}, {"bits": 2}]}
    file = tmp_path / "edited.json"
    file.write_text(json.dumps(edited))
    quantize(quip_sharp, tiny_llama, texts, moments, file, tmp_path / "model", "--ft-epochs", "0")
    modules = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]["modules"]
    assert modules[path] == {"rank": 9}
    assert modules[f"{path}.down"]["format"] == {"bits": 4}
    report = (tmp_path / "model" / "casp_report.json").read_text()
    assert ("low-rank by what enters it alone" in report) == (name == "v_proj")


def remove(plan):
    del plan["linears"][min(plan["linears"])]


def first(**changes):
    """Changes the entry of the first linear."""
    return lambda plan: plan["linears"][min(plan["linears"])].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entry: entry.update(backend="gptq"), "is a plan for backend 'gptq'"),
        (lambda entry: entry.update(model="other"), "for another model"),
        (lambda entry: entry.update(version=7), "plan version 7"),
        (remove, "lacks"),
        (lambda entry: entry["linears"].update(nowhere={"rank": None, "formats": [{"bits": 2}]}), "names nowhere"),
        (
            lambda entry: entry["linears"][min(entry["linears"])].update(rank=4, formats=[{"bits": 2}]),
            "takes two formats",
        ),
        (first(rank=0), "neither null nor a whole number"),
        (first(rank=10**6), "its full rank"),
        (first(rank=None, formats=[{"bits": 9}]), "is refused"),
        (first(rank=None, formats=[{}]), "is refused"),
        (first(rank=None, formats=[{"bits": True}]), "has no such 'bits'"),
        (first(rank=None, formats=[{"bits": 2, "thesis": 1}]), "has no such 'thesis'"),
        (first(rank=None, formats=[{"bits": 2.0}]), "has no such 'bits'"),
        (lambda entry: entry["linears"].update({min(entry["linears"]): 3}), "needs an entry 'rank'"),
        (lambda entry: entry.update(linears=[]), "holds no plan"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(tiny_llama, texts, moments, planned, tmp_path, change, words):
    entry = json.loads(planned.read_text())
    change(entry)
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(entry))
    with pytest.raises(casp.errors.UserError, match=words):
        quantize(quip_sharp, tiny_llama, texts, moments, file, tmp_path / "model")


def test_no_file_and_no_json_are_told(tiny_llama, texts, moments, tmp_path):
    with pytest.raises(casp.errors.UserError, match="does not exist"):
        quantize(quip_sharp, tiny_llama, texts, moments, tmp_path / "none.json", tmp_path / "model")
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(casp.errors.UserError, match="is not valid JSON"):
        quantize(quip_sharp, tiny_llama, texts, moments, tmp_path / "plan.json", tmp_path / "model")


def test_gptq_obeys_a_plan_too_and_whole_checkpoints_have_budgets(tiny_llama, texts, moments, tmp_path):
    file = tmp_path / "plan.json"
    found = make_plan(tiny_llama, moments, file, "--allocation", "paper", backend="gptq", bits="4.5")
    assert {entry["rank"] for path, entry in found["linears"].items() if path.endswith("q_proj")} != {None}
    quantize(gptq, tiny_llama, texts, moments, file, tmp_path / "model")
    assert size(tmp_path / "model").bytes == found["bytes"]
    stored = sum(file.stat().st_size for file in tiny_llama.glob("*.safetensors"))
    flags = ["--model", str(tiny_llama), "--moments", str(moments), "--backend", "gptq", "--whole-checkpoint"]
    flags += ["--costs", str(tmp_path / "costs-gptq"), "--output", str(tmp_path / "whole.json")]
    with pytest.raises(casp.errors.UserError, match="allow more"):
        plan([*flags, "--size", "1KB"])
    plan([*flags, "--size", f"{int(0.6 * stored)}B"])
    quantize(gptq, tiny_llama, texts, moments, tmp_path / "whole.json", tmp_path / "whole")
    assert sum(file.stat().st_size for file in (tmp_path / "whole").glob("*.safetensors")) < 0.63 * stored


def test_pricing_resumes_with_the_same_costs(tiny_llama, moments, planned, tmp_path):
    costs = next(planned.parent.glob("costs-*"))
    partial = tmp_path / "costs.partial"
    shutil.copytree(costs, partial / "result")
    for name in ("casp_run.json", "casp_run.log"):
        (partial / "result" / name).rename(partial / name)
    (partial / "result" / "block-00001.json").unlink()
    flags = ["--model", str(tiny_llama), "--moments", str(moments), "--backend", "quip-sharp", "--bits", "2.6"]
    plan([*flags, "--costs", str(tmp_path / "costs"), "--output", str(tmp_path / "plan.json")])
    assert (tmp_path / "plan.json").read_bytes() == planned.read_bytes()


@pytest.mark.parametrize(
    ("bits", "flags", "words"),
    [
        ("0.5", [], "the smallest plan takes"),
        ("0.9", ["--allocation", "uniform"], "the smallest plan takes"),
        ("2.6", ["--format", "codebook=x"], "codebook 'x'"),
    ],
)
def test_what_no_plan_can_be_is_told_before_anything_is_priced(
    tiny_llama, moments, tmp_path, monkeypatch, bits, flags, words
):
    monkeypatch.setattr("casp.plan.__main__.measure", lambda *_: pytest.fail("options are priced"))
    costs = ["--costs", str(tmp_path / "costs")]
    with pytest.raises(UserError, match=words):
        make_plan(tiny_llama, moments, tmp_path / "plan.json", *costs, *flags, bits=bits)
    assert not (tmp_path / "plan.json").exists()


def first_option(place, value):
    return lambda linears: linears[0]["options"][0].__setitem__(place, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda linears: linears.pop(),
        lambda linears: linears.append(linears[0]),
        lambda linears: linears[0].update(role="v", path=linears[0]["path"] + "x"),
        lambda linears: linears[0]["shape"].reverse(),
        lambda linears: linears[0].update(influence=None),
        lambda linears: linears[0].update(options=[]),
        lambda linears: linears[-1]["options"][0][1][0].update(bits=99),
        first_option(0, 10**12),
        first_option(1, []),
        first_option(2, 1),
        first_option(3, float("nan")),
    ],
)
def test_prices_that_were_edited_are_not_believed(tiny_llama, moments, planned, tmp_path, change):
    costs = shutil.copytree(next(planned.parent.glob("costs-*")), tmp_path / "costs")
    file = costs / "block-00001.json"
    linears = json.loads(file.read_text())
    linears.sort(key=lambda linear: linear["role"] != "k")  # not square
    change(linears)
    file.write_text(json.dumps(linears))
    flags = ["--model", str(tiny_llama), "--moments", str(moments), "--backend", "quip-sharp", "--bits", "2.6"]
    with pytest.raises(UserError, match=r"block-00001\.json is damaged"):
        plan([*flags, "--costs", str(costs), "--output", str(tmp_path / "plan.json")])


def test_compress_announces_and_does_the_whole_job(tiny_llava, tmp_path, capfd):
    from PIL import Image

    rows = []
    for number in range(4):
        Image.new("RGB", (32, 32), (60 * number, 90, 200)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "Which colour?", "answer": f"blue {number}"})
    data = tmp_path / "chats.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    output = tmp_path / "out"
    flags = ["--model", str(tiny_llava), "--backend", "quip-sharp", "--bits", "3.1", "--output", str(output)]
    flags += ["--dataset", str(data), "--samples", "4", "--batch-size", "2", "--moments", str(tmp_path / "moments")]
    flags += ["--costs", str(tmp_path / "costs")]
    compress([*flags, "--dry-run"])
    said = capfd.readouterr().out
    assert "3.100 bits a weight" in said
    assert said.index("1 moments") < said.index("2 plan") < said.index("3 quantize")
    assert not output.exists()
    compress(flags)
    assert size(output).bpw <= 3.1
    capfd.readouterr()
    compress(flags)
    said = capfd.readouterr().out
    assert said.count("done already") == 2
    assert "made anew from its prices" in said
    AutoModelForImageTextToText.from_pretrained(output)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--output", "{model}/out"], "lies inside"),
        (["--output", "{dir}/foreign"], "holds other files"),
        (["--output", "{dir}/planned"], "holds no figures"),
        (["--output", "/"], "root of the file system"),
        (["--output", "/proc/out"], "/proc/out-recipe.json cannot be written"),
        (["--output", "{dir}/foreign/notes.txt/out"], "cannot be written"),
        (["--output", "{dir}/out", "--moments", "{model}/moments"], "lies inside"),
        (["--output", "{dir}/out", "--moments", "{dir}/foreign"], "holds other files"),
        (["--output", "{dir}/out", "--costs", "{model}/costs"], "lies inside"),
        (["--output", "{dir}/out", "--costs", "{dir}/foreign"], "choose another --costs"),
        (["--output", "{dir}/out", "--costs", "{dir}/out"], "is an input of this run"),
        (["--output", "{dir}/out", "--moments", "{dir}/m", "--costs", "{dir}/m"], "is an input of this run"),
        (["--output", "{dir}/out", "--format", "thesis"], "is no pair"),
        (["--output", "{dir}/out", "--bits", "0.5"], "the smallest plan takes"),
        (["--output", "{dir}/out", "--format", "codebook=x"], "not understood by backend 'gptq'"),
        (["--output", "{dir}/out", "--format", "group_size=0"], "groups of 0 columns"),
        (["--output", "{dir}/out", "--token-weights", "thesis"], "'thesis' is not one"),
        (["--output", "{dir}/reported", "--evaluate"], "is no report of this script"),
        (["--output", "{dir}/out", "--", "--no-such-flag"], "--no-such-flag"),
        (["--output", "{dir}/out", "--", "--sweeps", "nan"], "--sweeps"),
        (["--output", "{dir}/out", "--", "--export", "gptq"], "do not go with a plan"),
        (["--output", "{dir}/out", "--", "--bits-budget", "3"], "do not go with a plan"),
        (["--output", "{dir}/out", "--", "--output", "{dir}/other"], "before the --"),
    ],
)
def test_compress_refuses_before_the_first_stage_what_the_last_one_would(
    tiny_llama, tmp_path, monkeypatch, capfd, flags, words
):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a stage was started"))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/notes.txt").write_text("mine")
    (tmp_path / "planned-plan.json").write_text('{"mine": 1}')
    (tmp_path / "reported-report").mkdir()
    (tmp_path / "reported-report/report.md").write_text("mine")
    given = [flag.replace("{model}", str(tiny_llama)).replace("{dir}", str(tmp_path)) for flag in flags]
    moments = [] if "--moments" in given else ["--moments", str(tmp_path / "moments")]
    with pytest.raises((UserError, SystemExit)) as refused:
        compress(["--model", str(tiny_llama), "--backend", "gptq", "--bits", "3.5", *moments, *given])
    assert words in f"{refused.value} {capfd.readouterr().err}"
    assert not (tmp_path / "out").exists()


def test_compress_looks_at_moments_that_are_there(tiny_llama, tiny_qwen2, texts, moments, tmp_path):
    flags = ["--backend", "gptq", "--bits", "3.5", "--moments", str(moments), "--output", str(tmp_path / "out")]
    flags = [*flags, *data_flags(texts), "--dry-run"]
    compress(["--model", str(tiny_llama), *flags])
    with pytest.raises(UserError, match="another model"):
        compress(["--model", str(tiny_qwen2), *flags])
    with pytest.raises(UserError, match="without token weights 'gradient-norm'"):
        compress(["--model", str(tiny_llama), *flags, "--token-weights", "gradient-norm"])


def test_what_stands_in_the_way_is_called_by_the_flag_that_chose_it(tiny_llama, texts, moments, tmp_path, capfd):
    """Moments of other settings, found by a stage that compress starts, and costs of others."""
    flags = ["--model", str(tiny_llama), "--backend", "gptq", "--bits", "3.5", "--moments", str(moments)]
    with pytest.raises(SystemExit):
        compress([*flags, *data_flags(texts), "--samples", "3", "--output", str(tmp_path / "out")])
    assert "that stage's --output is --moments here" in capfd.readouterr().err
    make_plan(tiny_llama, moments, tmp_path / "plan.json", backend="gptq", bits="3.5")
    with pytest.raises(UserError, match="choose another --costs"):
        make_plan(tiny_llama, moments, tmp_path / "plan.json", "--seed", "1", backend="gptq", bits="3.5")


def test_compress_collects_the_token_weights_that_it_asks_for(tiny_llama, tmp_path):
    flags = ["--model", str(tiny_llama), "--backend", "gptq", "--dry-run", "--output", str(tmp_path / "out")]
    flags += ["--moments", str(tmp_path / "moments"), "--token-weights", "none+gradient-norm"]
    command = job.todo(job.parser().parse_args(flags))[0].command
    wanted = command[command.index("--token-weights") + 1 :]
    assert wanted == ["none", "attention", "gradient", "gradient-norm"]


def test_compress_evaluates_if_asked(tiny_llama, texts, moments, planned, tmp_path, capfd):
    output = tmp_path / "out"
    flags = ["--model", str(tiny_llama), "--backend", "quip-sharp", "--plan", str(planned), "--moments", str(moments)]
    compress([*flags, *data_flags(texts), "--output", str(output), "--evaluate"])
    said = capfd.readouterr().out
    assert said.index("1 moments") < said.index("2 quantize") < said.index("3 evaluate")
    original, compressed = json.loads((tmp_path / "out-report" / "report.json").read_text())
    assert original["bpw"] > 15
    assert compressed["bpw"] == pytest.approx(size(output).bpw)
    assert compressed["perplexity_text"] != original["perplexity_text"]
    assert "perplexity" in (output / "README.md").read_text()


def test_an_edited_plan_is_not_written_over(tiny_llama, texts, moments, planned, tmp_path):
    """Not by the plan made anew, and compress tells it before the first stage."""
    file = tmp_path / "out-plan.json"
    make_plan(tiny_llama, moments, file, "--costs", str(planned.parent / "costs-quip-sharp"))
    make_plan(tiny_llama, moments, file, "--costs", str(planned.parent / "costs-quip-sharp"), bits="3")  # its own
    found = json.loads(file.read_text())
    entry = next(entry for entry in found["linears"].values() if entry["rank"] is None)
    entry["formats"][0]["bits"] = 4 if entry["formats"][0]["bits"] != 4 else 3
    file.write_text(json.dumps(found))
    with pytest.raises(UserError, match="was edited since it was made"):
        make_plan(tiny_llama, moments, file, "--costs", str(planned.parent / "costs-quip-sharp"))
    flags = ["--model", str(tiny_llama), "--backend", "quip-sharp", "--bits", "3", "--moments", str(moments)]
    with pytest.raises(UserError, match="was edited since it was made"):
        compress([*flags, *data_flags(texts), "--output", str(tmp_path / "out")])
    assert json.loads(file.read_text()) == found


def test_a_compressed_model_has_no_plan(tiny_llama, texts, moments, tmp_path):
    """Of a low-rank model that is told before anything is priced."""
    svd(["--model", str(tiny_llama), "--output", str(tmp_path / "low"), *data_flags(texts)])
    with pytest.raises(UserError, match="is compressed already"):
        make_plan(tmp_path / "low", moments, tmp_path / "plan.json")
    flags = ["--model", str(tmp_path / "low"), "--backend", "gptq", "--bits", "3", "--dry-run"]
    with pytest.raises(UserError, match="is compressed already"):
        compress([*flags, "--output", str(tmp_path / "out"), "--moments", str(tmp_path / "none")])


def test_a_backend_without_a_stage_is_told():
    with pytest.raises(UserError, match="offers a backend but no quantizing stage"):
        job.parser_of("casp.plan.table")


def test_a_plan_that_is_not_proven_best_says_so(monkeypatch, capsys):
    """What the solver found when its time was over."""

    def late(*args, **kwargs):
        found = milp(*args, **kwargs)
        found.status, found.message = 1, "Time limit reached."
        return found

    options = tuple(Option(None, ({"bits": bits},), bits * 8, 4.0**-bits) for bits in (2, 4))
    linears = [LinearOptions("here", 0, "v", 8, 8, 0.0, options)]
    monkeypatch.setattr("casp.plan.allocate.milp", late)
    assert knapsack(linears, 32)["here"] == options[1]
    assert "not proven to be the best: Time limit reached" in capsys.readouterr().err
