"""Our plain export in the hands of the real gptqmodel, through stock transformers and without casp."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from casp_gptq.__main__ import main
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LOAD = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map={"": "cpu"})
found = {n: m.dequantize_weight().T.contiguous() for n, m in model.named_modules() if hasattr(m, "dequantize_weight")}
with torch.no_grad():
    found["logits"] = model(torch.arange(4, 36)[None]).logits
assert "casp" not in sys.modules
save_file(found, output)
"""

pytestmark = pytest.mark.skipif(
    not (importlib.util.find_spec("gptqmodel") and importlib.util.find_spec("optimum")),
    reason="needs the extra: pip install -r requirements-gptqmodel.txt",
)


GRIDS = [(2, "--no-symmetric"), (3, "--no-symmetric"), (4, "--symmetric"), (8, "--no-symmetric")]


@pytest.mark.parametrize(("bits", "flag"), GRIDS)
def test_stock_transformers_and_gptqmodel_see_our_weights(tiny_llama, tmp_path, bits, flag):
    text = tmp_path / "texts.txt"
    text.write_text("The quick brown fox jumps over the lazy dog, and sphinx of black quartz, judge my vow. " * 30)
    output, theirs = tmp_path / "out", tmp_path / "theirs.safetensors"
    flags = ["--model", tiny_llama, "--bits", bits, flag, "--group-size", 32, "--samples", 4, "--sequence-length", 32]
    main([*map(str, flags), "--dataset", str(text), "--output", str(output), "--export", "gptq"])
    quiet = {"GPTQMODEL_CPU_WORKERS": "2", "TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than computing here
    command = [sys.executable, "-c", LOAD, f"{output}-gptqmodel", str(theirs)]
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]

    model = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float16)
    found = load_file(theirs)
    with torch.no_grad():
        logits = model(torch.arange(4, 36)[None]).logits
    torch.testing.assert_close(found.pop("logits"), logits, rtol=2e-2, atol=2e-2)
    for name, weight in found.items():  # gptqmodel may pick a kernel that offers its weight in no other form
        assert torch.equal(model.get_submodule(name).dequantize().half(), weight.half())
    assert found or bits == 4
