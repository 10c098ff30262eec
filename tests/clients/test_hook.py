"""Registered by being installed; refused where it is not."""

import json
import shutil
import subprocess
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from casp_entry import hook
from safetensors import safe_open
from transformers import AutoModelForCausalLM

OPEN = """
import json, sys
import torch
from accelerate import init_empty_weights, load_checkpoint_and_dispatch
from transformers import AutoConfig, AutoModelForCausalLM
ids, found = torch.arange(4, 20)[None], {"casp before": "casp" in sys.modules}
for name, folder in zip(("made", "saved again", "dense"), sys.argv[1:]):
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        found[name] = [type(model.model.layers[0].self_attn.q_proj).__name__, model(ids).logits.double().sum().item()]
    except Exception as error:
        found[name] = str(error)
try:
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(sys.argv[1]))
    model = load_checkpoint_and_dispatch(model, sys.argv[1], device_map={"": "cpu"})
    found["accelerate"] = model(ids).logits.double().sum().item()
except Exception as error:
    found["accelerate"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved_again(gptq: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "again"
    AutoModelForCausalLM.from_pretrained(gptq).save_pretrained(folder)
    return folder


def test_checkpoints_open_without_an_import_of_casp(gptq: Path, saved_again: Path, tiny_llama: Path, told):
    found = told(OPEN, gptq, saved_again, tiny_llama)
    assert not found["casp before"]
    ids = torch.arange(4, 20)[None]
    expected = AutoModelForCausalLM.from_pretrained(gptq)(ids).logits.double().sum().item()
    assert found["made"] == found["saved again"] == ["GPTQLinear", pytest.approx(expected, rel=1e-6)]
    assert found["accelerate"] == pytest.approx(expected, rel=1e-6)
    assert found["dense"][0] == "Linear"


def test_no_word_of_torchvision(gptq: Path):
    code = "import sys; from transformers import pipeline; pipeline('text-generation', sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(gptq)], capture_output=True, text=True, check=True)
    assert "torchvision" not in done.stdout + done.stderr


def test_without_casp_transformers_refuses(gptq: Path, saved_again: Path, tiny_llama: Path, told, without_casp: str):
    found = told(OPEN, gptq, saved_again, tiny_llama, python=without_casp)
    assert "install the Python package casp" in found["made"]
    assert isinstance(found["saved again"], str)  # an error, though it does not say which package is missing
    assert isinstance(found["accelerate"], str)
    assert found["dense"][0] == "Linear"


def test_the_hook_can_be_turned_off(gptq: Path, saved_again: Path, tiny_llama: Path, told):
    found = told(OPEN, gptq, saved_again, tiny_llama, CASP_NO_HOOK="1")
    assert "install the Python package casp" in found["made"]


def test_the_hook_imports_nothing():
    listing = "import sys; print(*sorted(sys.modules)); print([type(one).__name__ for one in sys.meta_path])"
    done = {
        switch: subprocess.run(
            [sys.executable, "-c", listing], env={"CASP_NO_HOOK": switch}, capture_output=True, text=True, check=True
        ).stdout.splitlines()
        for switch in ("", "1")
    }
    assert done[""][0] == done["1"][0]
    assert (done[""][1].count("CaspFinder"), done["1"][1].count("CaspFinder")) == (1, 0)


def test_start_and_hook_wait_for_the_same_modules():
    (finder,) = (one for one in sys.meta_path if type(one).__name__ == "CaspFinder")
    assert set(type(finder).find_spec.__globals__["CASP_WAITS_FOR"]) == set(hook.MODULES)


def test_the_file_is_removed_with_the_package():
    files = {str(file) for file in distribution("casp").files}
    assert "casp.pth" in files


def test_what_is_registered_stays():
    class Module:
        AUTO_QUANTIZATION_CONFIG_MAPPING = {"casp": "the real one"}  # noqa: RUF012

    hook.MODULES["transformers.quantizers.auto"](Module)
    assert Module.AUTO_QUANTIZATION_CONFIG_MAPPING == {"casp": "the real one"}
    for learn in hook.MODULES.values():
        learn(type(sys)("a version of the library that lacks all this"))


def test_the_sign_is_no_weight(saved_again: Path, gptq: Path):
    from casp.model.checkpoint import size

    empty = []
    for file in saved_again.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            empty += [name for name in opened.keys() if 0 in opened.get_slice(name).get_shape()]  # noqa: SIM118
    assert empty == ["model.layers.0.self_attn.q_proj.weight"]
    assert size(saved_again) == size(gptq)


def test_an_export_is_for_others(gptq: Path, tmp_path: Path):
    from casp_gptq.export import export_gptq

    copy = tmp_path / "gptq"
    shutil.copytree(gptq, copy)
    exported = export_gptq(copy, tmp_path / "plain", symmetric=False)
    assert "transformers_weights" in json.loads((copy / "config.json").read_text())
    assert "transformers_weights" not in json.loads((exported / "config.json").read_text())
