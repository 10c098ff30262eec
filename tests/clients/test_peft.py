"""LoRA by PEFT on every kind of layer (slow: needs PEFT, which no requirement of ours names)."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from casp.errors import UserError

pytestmark = pytest.mark.slow
peft = pytest.importorskip("peft")

IDS = torch.arange(4, 36).reshape(2, 16)
TARGETS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(params=["gptq", "low_rank", "gptq_low_rank", "e8p", "trellis", "aqlm"])
def compressed(request: pytest.FixtureRequest, tiny_llama: Path, texts: Path, tmp_path: Path) -> Path:
    if request.param in ("gptq", "low_rank", "gptq_low_rank"):
        return request.getfixturevalue(request.param)
    flags = ["--model", str(tiny_llama), "--dataset", str(texts), "--samples", "4", "--sequence-length", "64"]
    flags += ["--ft-epochs", "0", "--output", str(tmp_path / "made")]
    if request.param == "aqlm":
        from casp_aqlm.__main__ import main

        main([*flags, "--scheme", "2x4g8"])
    else:
        from casp_quip_sharp.__main__ import main

        main([*flags, "--bits", "2", "--codebook", request.param])
    return tmp_path / "made"


def load(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder)


def train(model: nn.Module, folder: Path) -> None:
    """Three steps of the Trainer on one batch."""
    data = [{"input_ids": row, "labels": row} for row in IDS]
    off = {"report_to": [], "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), max_steps=3, use_cpu=True, learning_rate=1e-2, **off)
    Trainer(model, arguments, train_dataset=data).train()
    model.eval()


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_lora(compressed: Path, targets: str | list[str], tmp_path: Path):
    model = load(compressed)
    before = model(IDS).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    torch.testing.assert_close(adapted(IDS).logits, before, rtol=0, atol=0)  # an adapter begins as nothing
    beside = {
        name.partition(".lora_")[0].rpartition(".")[2] for name, _ in adapted.named_parameters() if "lora_" in name
    }
    assert beside == (TARGETS if targets == "all-linear" else set(targets))
    with torch.no_grad():
        loss = adapted(IDS, labels=IDS).loss
    train(adapted, tmp_path / "trainer")
    after = adapted(IDS, labels=IDS)
    assert after.loss < loss
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(compressed), tmp_path / "adapter").eval()
    torch.testing.assert_close(again(IDS).logits, after.logits, rtol=0, atol=0)
    dense = (
        peft.PeftModel.from_pretrained(load(compressed).dequantize(), tmp_path / "adapter").merge_and_unload().eval()
    )
    assert type(dense.model.layers[0].self_attn.q_proj) is nn.Linear
    # The compressed layers round x to 14 bits where they multiply from the codes; the dense ones do not.
    torch.testing.assert_close(dense(IDS).logits, after.logits, rtol=1e-2, atol=1e-2)
    with pytest.raises(UserError, match="dequantize"):
        again.merge_and_unload()


@pytest.mark.parametrize(
    "config",
    [
        peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
        peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"),
    ],
    ids=["prompt", "head"],
)
def test_what_stands_beside_packed_layers_trains(gptq: Path, config: peft.PeftConfig, tmp_path: Path):
    adapted = peft.get_peft_model(load(gptq), config)
    with torch.no_grad():
        before = adapted(IDS, labels=IDS).loss
    train(adapted, tmp_path / "trainer")
    assert adapted(IDS, labels=IDS).loss < before
