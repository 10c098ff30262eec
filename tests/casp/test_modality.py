"""Which tokens are text, pictures and video, and what counts them."""

import pytest
import torch
import transformers as T

import casp.model.attention
from casp.model.attention import AttentionCall
from casp.model.batch import predicting
from casp.model.inputs import BatchInputs
from casp.model.modality import token_ids, visual_tokens
from casp.moments.density import AttentionDensity
from casp.moments.weights import attention_received


@pytest.mark.parametrize(
    ("config", "image", "video"),
    [
        (T.LlamaConfig(), set(), set()),
        (T.LlavaConfig(), {32000}, set()),
        (T.LlavaNextVideoConfig(), {32001}, {32000}),
        (T.LlavaOnevisionConfig(), {151646}, {151647}),
        (T.Qwen2_5_VLConfig(), {151655}, {151656}),
        (T.Qwen3VLConfig(), {151655}, {151656}),
        (T.PaliGemmaConfig(), {256000}, set()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_ids_that_the_families_document(config, image, video):
    assert token_ids(config) == {"image": image, "video": video}


def batch_of_kinds() -> BatchInputs:
    """One sequence: text, two image tokens, three video tokens, text, padding."""
    ids = torch.tensor([[9, 3, 3, 4, 4, 4, 9, 8, 0]])
    config = T.LlavaNextVideoConfig(image_token_index=3, video_token_index=4)
    found = visual_tokens(ids, config)
    return BatchInputs(torch.zeros(1, 9, 4), [], ids != 0, found["image"], found["video"])


def test_a_batch_knows_its_modalities():
    batch = batch_of_kinds()
    assert batch.images.sum() == 2
    assert batch.videos.sum() == 3
    assert batch.text.nonzero()[:, 1].tolist() == [0, 6, 7]
    assert batch.predicting.nonzero()[:, 1].tolist() == [6]


def test_a_chat_has_losses_where_the_assistant_speaks():
    text = torch.tensor([[1, 0, 1, 1, 1, 1, 1, 1, 0]]).bool()
    said = torch.tensor([[0, 0, 0, 0, 1, 1, 0, 1, 1]]).bool()
    assert predicting(text, said).nonzero()[:, 1].tolist() == [3, 4, 6]
    assert predicting(text).nonzero()[:, 1].tolist() == [2, 3, 4, 5, 6]
    assert not predicting(text, torch.zeros_like(said)).any()


def test_density_tells_video_from_text():
    batch = batch_of_kinds()
    density = AttentionDensity()
    density.add(AttentionCall(torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), None, 1.0), batch)
    assert set(density.value()) == {"image", "video", "text"}
    density = AttentionDensity()
    batch.videos.zero_()
    density.add(AttentionCall(torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), None, 1.0), batch)
    assert set(density.value()) == {"image", "text"}


def test_what_a_module_sees_of_a_batch():
    batch = batch_of_kinds()
    x = torch.randn(1, 9, 4)
    assert batch.seen_by(x, None) is batch
    flat = batch.seen_by(x.flatten(0, 1), None)
    assert torch.equal(flat.tokens, batch.tokens.flatten())
    value, there = flat.by_sequence(x.flatten(0, 1), 1, 9)
    assert torch.equal(there, batch.tokens)
    torch.testing.assert_close(value, x)
    pictures_own = batch.seen_by(torch.randn(1, 5, 4), None)
    assert pictures_own.tokens.all()
    assert torch.equal(pictures_own.of_rows(torch.rand(1, 9)), torch.ones(1, 5))


@pytest.mark.parametrize("mask", ["none", "bool", "additive"])
@pytest.mark.parametrize("sinks", [False, True])
def test_a_few_queries_at_a_time_are_the_whole_map(mask, sinks, monkeypatch):
    """Against attention written out over the whole map in float64."""
    query, key = torch.randn(2, 4, 11, 8), torch.randn(2, 2, 11, 8)
    tokens = torch.ones(2, 11, dtype=torch.bool)
    tokens[1, 7:] = False
    seen = torch.ones(11, 11, dtype=torch.bool).tril() & (tokens[:, None, :] if mask != "none" else True)
    sink = torch.randn(4) if sinks else None
    logits = query.double() @ key.double().repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    whole = seen.expand(2, 11, 11)[:, None]
    logits = logits.masked_fill(~whole, float("-inf"))
    if sinks:
        logits = torch.cat([logits, sink.double().view(1, 4, 1, 1).expand(2, 4, 11, 1)], -1)
    expected = logits.softmax(-1)[..., :11]
    given = {
        "none": None,
        "bool": whole,
        "additive": torch.zeros(2, 1, 11, 11).masked_fill(~whole, float("-inf")),
    }[mask]
    call = AttentionCall(query, key, given, 0.3, sinks=sink)
    for head in range(4):
        torch.testing.assert_close(call.probabilities(head).double(), expected[:, head], atol=1e-5, rtol=1e-4)
        rows = torch.tensor([2, 5])
        torch.testing.assert_close(
            call.probabilities(head, rows).double(), expected[:, head, rows], atol=1e-5, rtol=1e-4
        )
    at_once = attention_received(call, tokens)
    monkeypatch.setattr(casp.model.attention, "ROWS", 3)
    torch.testing.assert_close(attention_received(call, tokens), at_once)
    queries = tokens[:, None, :, None]
    uniform = (whole / whole.sum(-1, keepdim=True).clamp_min(1) * queries).sum(2).mean(1)
    received = (expected * queries).sum(2).mean(1)
    torch.testing.assert_close(
        at_once.double(), (received / uniform.clamp_min(1 / 11)).clamp_max(4), atol=1e-5, rtol=1e-4
    )
