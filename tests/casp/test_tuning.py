"""Fine-tuning: the loss against closed forms, what moves and what does not, resume, the best kept."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from casp.backend import load_backend
from casp.budget import uniform_plan
from casp.finetune.end_to_end import distill, divergence, final_norms, head_logits
from casp.finetune.in_block import Lessons, Masters, Training, relative_error, split, stalled, train, tunable_tensors
from casp.finetune.teacher import Teacher
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.quantize import quantize_blocks
from casp.rounding import Method
from casp.run.folder import WORK_PREFIX
from casp.run.writer import RunFolder

CPU = torch.device("cpu")
BATCHES = [
    {"input_ids": torch.randint(4, 128, (2, 24), generator=torch.Generator().manual_seed(seed))} for seed in range(8)
]


class Quadratic:
    """Batch i wants `leaf` to be at `goals[i]`: the mean of the goals is best."""

    def __init__(self, *goals):
        self.goals = torch.tensor(goals)
        self.masters = Masters({"x": torch.nn.Parameter(torch.tensor([3.0, -2.0]))})

    def loss(self, number):
        return (self.masters.leaves["x"] - self.goals[number]).square().sum()

    def train(self, epochs, rate=0.03, **kwargs):
        return train(
            self.masters,
            self.loss,
            Lessons([1] * len(self.goals)),
            Training(epochs, rate),
            torch.Generator().manual_seed(0),
            **kwargs,
        )


def test_split_leaves_validation_batches_out():
    for count in (2, 7, 8, 9, 40):
        learn, check = split(count)
        assert set(learn) | set(check) == set(range(count))
        assert not set(learn) & set(check)
    assert split(1) == ([0], [0])


def test_training_finds_the_minimum():
    problem = Quadratic(*[1.0] * 8)
    curve = problem.train(100, rate=0.01)
    assert torch.allclose(problem.masters.leaves["x"], torch.tensor([1.0, 1.0]), atol=0.05)
    assert curve[0] == {"training": None, "validation": pytest.approx(13.0)}
    assert min(entry["validation"] for entry in curve) < 5e-3


def test_the_best_is_kept_and_training_stops_without_progress():
    problem = Quadratic(*[-50.0] * 7, 3.0)  # what is learned makes validation (the last) worse
    curve = problem.train(50)
    assert problem.masters.leaves["x"].tolist() == [3.0, -2.0]
    assert len(curve) == 3
    assert stalled(curve)


def test_training_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    goals = torch.linspace(-1, 2, 16).tolist()
    whole, interrupted = Quadratic(*goals), Quadratic(*goals)
    expected = whole.train(6)
    real, calls = interrupted.loss, 0

    def dies(number):
        nonlocal calls
        calls += 1
        if calls == 60:
            raise KeyboardInterrupt
        return real(number)

    interrupted.loss = dies
    with pytest.raises(KeyboardInterrupt):
        interrupted.train(6, state=tmp_path / "state.safetensors")
    resumed = Quadratic(*goals)
    assert resumed.train(6, state=tmp_path / "state.safetensors") == expected
    assert torch.equal(resumed.masters.leaves["x"], whole.masters.leaves["x"])


def test_relative_error_counts_real_tokens_alike_whatever_their_size():
    target = torch.randn(2, 3, 8) * torch.tensor([1.0, 100.0, 0.01])[:, None]
    tokens = torch.tensor([[True, True, False], [True, False, True]])
    output = torch.where(tokens[..., None], target * 1.1, 1e9)
    assert relative_error(output, target, tokens).item() == pytest.approx(0.01, rel=1e-4)


def last_hidden(folder, batches):
    decoder = Decoder(folder)
    return decoder, Teacher(decoder, batches, CPU, torch.float32).advance_to(len(decoder.blocks) - 1)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def test_the_head_on_the_last_hidden_states_is_the_model(request, name):
    folder = request.getfixturevalue(name)
    decoder, hidden = last_hidden(folder, BATCHES[:1])
    decoder.load_rest(CPU, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(**BATCHES[0]).logits[1]
        assert torch.allclose(head_logits(decoder, hidden[0][1]), expected, atol=1e-4)
    assert len(final_norms(decoder)) == 1


def test_the_head_of_a_llava(tiny_llava):
    ids = torch.cat([torch.full((1, 16), 3), BATCHES[0]["input_ids"][:1]], 1)  # token 3 stands for an image patch
    llava_batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 32, 32)}
    decoder, hidden = last_hidden(tiny_llava, [llava_batch])
    decoder.load_rest(CPU, torch.float32)
    model = AutoModelForImageTextToText.from_pretrained(tiny_llava, dtype=torch.float32)
    with torch.no_grad():
        expected = model(**llava_batch).logits[0]
        assert torch.allclose(head_logits(decoder, hidden[0][0]), expected, atol=1e-4)


def test_divergence_is_that_of_the_distributions(tiny_llama):
    decoder, hidden = last_hidden(tiny_llama, BATCHES[:1])
    decoder.load_rest(CPU, torch.float32)
    target = hidden[0].flatten(0, 1)
    moved = target + 0.3 * torch.randn_like(target)
    with torch.no_grad():
        p, q = (head_logits(decoder, h).double().softmax(-1) for h in (target, moved))
        expected = (p * (p / q).log()).sum(-1).mean().item()
        assert divergence(decoder, moved, target, {}).item() == pytest.approx(expected, rel=1e-4)
        assert divergence(decoder, target, target, {}).item() == pytest.approx(0, abs=1e-6)


def toy_run(folder, output, block_training=None):
    run = RunFolder(output, Decoder(folder), "toy", "tiny", {"backend": "toy", "bits": 3}, "calibration")
    backend = load_backend("toy")
    method = Method(backend, uniform_plan(run.decoder, {"bits": 3}), {}, block_training=block_training)
    teacher = Teacher(Decoder(folder), BATCHES, CPU, torch.float32)
    quantize_blocks(run.decoder, run, BATCHES, method, CPU, torch.float32, teacher=teacher)
    return run, backend, teacher


def error(run, folder):
    """Relative error of the quantized model's last hidden states, on tokens that no training saw."""
    fresh = [{"input_ids": torch.randint(4, 128, (8, 24), generator=torch.Generator().manual_seed(99))}]
    _, expected = last_hidden(folder, fresh)
    run.finish()
    _, found = last_hidden(run.output, fresh)
    return relative_error(found[0], expected[0], torch.ones(8, 24, dtype=torch.bool)).item()


def test_tuned_blocks_are_nearer_to_the_original(tiny_llama, tmp_path, toy_site):
    plain = toy_run(tiny_llama, tmp_path / "plain")[0]
    tuned = toy_run(tiny_llama, tmp_path / "tuned", Training(6, 3e-3))[0]
    assert error(tuned, tiny_llama) < 0.8 * error(plain, tiny_llama)
    source, decoder = Decoder(tiny_llama), Decoder(tmp_path / "tuned")
    norm = decoder.blocks[1] + ".input_layernorm.weight"
    (_, old), (_, new) = (next(iter(d.shards.load([norm]))) for d in (source, decoder))
    assert not torch.equal(old, new)


def test_what_may_move(tiny_llama, tmp_path, toy_site):
    run, backend, _ = toy_run(tiny_llama, tmp_path / "out")
    block = run.decoder.block(0)
    names = set(tunable_tensors(block, backend))
    assert names == {f"{path}.scales" for path in run.decoder.linears(0).values()} | {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }


@pytest.mark.parametrize("checkpointing", [True, False])
def test_end_to_end(tiny_llama, tmp_path, toy_site, checkpointing):
    run, backend, teacher = toy_run(tiny_llama, tmp_path / "out")
    decoder = run.decoder
    scales = {name: tensor for shard in run.result.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    generator = torch.Generator().manual_seed(0)
    wrong = {
        name: s * (0.4 + 1.2 * torch.rand(s.shape, generator=generator, dtype=s.dtype))
        for name, s in sorted(scales.items())
        if name.endswith(".scales")
    }
    run.replace(wrong)
    targets = teacher.advance_to(2)
    inputs = capture_inputs(decoder, BATCHES, CPU, torch.float32, check=False)
    run.load_finished(CPU, torch.float32)
    decoder.load_rest(CPU, torch.float32)
    training = Training(4, 1e-2)
    state = run.folder / f"{WORK_PREFIX}state.safetensors"
    learned, curve = distill(decoder, backend, inputs, targets, training, generator, CPU, state, checkpointing)
    best = min(entry["validation"] for entry in curve)
    assert best < 0.9 * curve[0]["validation"]  # what the wrong scales cost is learned away

    # The curve is the divergence of the two models run whole by transformers.
    run.replace(learned)
    norm = {name: tensor for name, tensor in learned.items() if not name.startswith(decoder.blocks_path)}
    assert set(norm) == {"model.norm.weight"}
    run.finish(norm)
    student, original = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (run.output, tiny_llama)
    )
    with torch.no_grad():
        q, p = (F.log_softmax(model(**BATCHES[7]).logits.double(), -1) for model in (student, original))
    assert F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean().item() == pytest.approx(best, rel=0.02)


def test_buffers_of_one_byte_are_seen_as_they_will_be_stored():
    """Of a leaf between whole numbers the loss sees the stored one; the gradient is that of the leaf."""
    masters = Masters(
        {"codebooks": torch.tensor([3, -7], dtype=torch.int8), "scales": torch.ones(2, dtype=torch.float16)}
    )
    with torch.no_grad():
        masters.leaves["codebooks"] += torch.tensor([0.4, 0.7])
        masters.leaves["scales"] += 1e-5
    used = masters.in_use()
    assert used["codebooks"].tolist() == [3.0, -6.0]
    assert used["scales"].tolist() == masters.leaves["scales"].tolist()
    (used["codebooks"] * torch.tensor([2.0, 5.0])).sum().backward()
    assert masters.leaves["codebooks"].grad.tolist() == [2.0, 5.0]
    masters.write()
    assert masters.tensors["codebooks"].tolist() == [3, -6]
