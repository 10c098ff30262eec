"""The walk against the model run whole by transformers."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from casp.errors import UserError
from casp.model.attention import observe_attention
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.walk import walk

CPU = torch.device("cpu")
MODELS = ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_llava"]


def padded_batches(decoder: Decoder, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Two batches of different length, one sequence of each padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for tokens in (28, 21):
        ids = torch.randint(4, 100, (2, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if decoder.is_multimodal:
            ids[:, 4:20] = decoder.config.image_token_id
            batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
        batches.append(batch)
    return batches


def whole_model(folder, decoder: Decoder):
    factory = AutoModelForImageTextToText if decoder.is_multimodal else AutoModelForCausalLM
    return factory.from_pretrained(folder).eval()


@pytest.mark.parametrize("name", MODELS)
def test_walk_equals_the_whole_model(name, request):
    folder = request.getfixturevalue(name)
    decoder = Decoder(folder)
    batches = padded_batches(decoder)
    inputs = capture_inputs(decoder, batches, CPU, torch.float32)
    entered = []
    for _visit in walk(decoder, inputs, CPU, torch.float32):
        entered.append([batch.hidden.clone() for batch in inputs])
    model = whole_model(folder, decoder)
    for number, batch in enumerate(batches):
        with torch.no_grad():
            states = model(**batch, output_hidden_states=True).hidden_states
        kept = batch["attention_mask"].bool()
        for block in range(3):
            torch.testing.assert_close(entered[block][number][kept], states[block][kept])
    assert all(p.is_meta for p in decoder.model.parameters()), "the walk leaves weights in memory"


@pytest.mark.parametrize("name", MODELS)
def test_modules_that_share_an_input_form_a_group(name, request):
    decoder = Decoder(request.getfixturevalue(name))
    inputs = capture_inputs(decoder, padded_batches(decoder), CPU, torch.float32)
    visit = next(walk(decoder, inputs, CPU, torch.float32))
    roles = {path: role for role, path in visit.linears.items()}
    groups = [[roles[path] for path in group] for group in visit.input_groups(list(roles))]
    assert groups == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]


def test_replay_shows_inputs_outputs_and_attention(tiny_llava):
    decoder = Decoder(tiny_llava)
    batches = padded_batches(decoder)
    inputs = capture_inputs(decoder, batches, CPU, torch.float32)
    visit = next(walk(decoder, inputs, CPU, torch.float32))
    seen, calls, pairs = [], [], []
    visit.replay(
        {"mlp.down_proj": lambda x, batch: seen.append((x.shape, int(batch.images.sum())))},
        attention=lambda call, batch: calls.append(call),
        output=lambda entered, left, batch: pairs.append((entered, left)),
    )
    assert seen == [((2, 28, 96), 32), ((2, 21, 96), 32)]
    assert len(calls) == len(pairs) == 2
    call = calls[0]
    assert call.query.shape == (2, 4, 28, 16)
    assert call.key.shape == (2, 2, 28, 16)
    kept = batches[0]["attention_mask"].bool()
    for head in range(4):
        rows = call.probabilities(head)
        assert torch.all(rows.triu(1) == 0)
        assert torch.all(rows[0, :, :3] == 0), "padding is attended to"
        torch.testing.assert_close(rows.sum(-1)[kept], torch.ones(int(kept.sum())))


def test_attention_operands_reproduce_the_logits_of_eager_attention(tiny_qwen3):
    decoder = Decoder(tiny_qwen3)
    batch = {"input_ids": torch.arange(4, 24)[None]}
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen3, attn_implementation="eager").eval()
    with torch.no_grad():
        expected = model(**batch, output_attentions=True).attentions[0]
    inputs = capture_inputs(decoder, [batch], CPU, torch.float32)
    visit = next(walk(decoder, inputs, CPU, torch.float32))
    calls = []
    visit.replay(attention=lambda call, batch: calls.append(call))
    for head in range(4):
        torch.testing.assert_close(calls[0].probabilities(head), expected[:, head], atol=1e-5, rtol=1e-4)


def test_observer_leaves_nothing_behind(tiny_llama):
    decoder = Decoder(tiny_llama)
    block = decoder.block(0)
    with pytest.raises(ZeroDivisionError), observe_attention(block, print):
        raise ZeroDivisionError
    assert not any("attention_observer" in module.__dict__ for module in block.modules())


def test_block_influence_is_zero_for_a_block_that_does_nothing(tiny_llama):
    decoder = Decoder(tiny_llama)
    inputs = capture_inputs(decoder, padded_batches(decoder), CPU, torch.float32)
    visit = next(walk(decoder, inputs, CPU, torch.float32))
    assert 0 < visit.block_influence() < 2
    visit.block.self_attn.o_proj.weight.zero_()
    visit.block.mlp.down_proj.weight.zero_()
    assert visit.block_influence() == pytest.approx(0, abs=1e-6)


def acting_between_blocks(decoder: Decoder, monkeypatch, act):
    """Make the model change the hidden states that enter block 1."""
    forward = decoder.model.model.forward

    def changing(*args, **kwargs):
        # The block's own attribute, where the walk puts what stands in for it, is asked last.
        inner = decoder.block(1).forward
        decoder.block(1).forward = lambda hidden_states, **more: inner(act(hidden_states), **more)
        try:
            return forward(*args, **kwargs)
        finally:
            decoder.block(1).forward = inner

    monkeypatch.setattr(decoder.model.model, "forward", changing)


def test_what_a_model_adds_between_blocks_is_replayed(tiny_llama, monkeypatch):
    decoder, shift = Decoder(tiny_llama), torch.linspace(-1, 1, 64)
    batches = padded_batches(decoder)
    plain = capture_inputs(decoder, batches, CPU, torch.float32)
    next(walk(decoder, plain, CPU, torch.float32)).advance()
    acting_between_blocks(decoder, monkeypatch, lambda hidden: hidden + shift)
    shifted = capture_inputs(decoder, batches, CPU, torch.float32)
    next(walk(decoder, shifted, CPU, torch.float32)).advance()
    for one, other in zip(plain, shifted, strict=True):
        torch.testing.assert_close(other.hidden, one.hidden + shift)


def test_a_model_that_does_more_than_add_between_blocks_is_refused(tiny_llama, monkeypatch):
    decoder = Decoder(tiny_llama)
    acting_between_blocks(decoder, monkeypatch, lambda hidden: hidden * 2)
    with pytest.raises(UserError, match="between block 0 and block 1"):
        capture_inputs(decoder, padded_batches(decoder), CPU, torch.float32)


@pytest.mark.parametrize(("most", "asked"), [(1 << 25, "eager"), (1, "sdpa")])
@pytest.mark.parametrize("name", MODELS)
def test_long_samples_are_compared_without_whole_attention_maps(name, most, asked, request, monkeypatch):
    """The model's own forward, against which blocks are compared, holds maps only where they are small; both see."""
    decoder = Decoder(request.getfixturevalue(name))
    asked_for, ask = [], decoder.model.set_attn_implementation
    monkeypatch.setattr(decoder.model, "set_attn_implementation", lambda kind: (asked_for.append(kind), ask(kind)))
    monkeypatch.setattr("casp.model.capture.MOST_MAP", most)
    capture_inputs(decoder, padded_batches(decoder), CPU, torch.float32)
    assert asked in asked_for
    monkeypatch.setattr("casp.model.capture.TOLERANCES", {torch.float32: -1.0})
    with pytest.raises(UserError, match="relative difference"):  # both are really compared
        capture_inputs(decoder, padded_batches(decoder), CPU, torch.float32)
