"""What a model fuses, taken apart: the parts are what they are called, and together they do what the whole did."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import transformers as T

sys.path.insert(0, str(Path(__file__).parent))
from zoo import FAMILIES

import casp.model.attention
from casp.errors import UserError
from casp.model.capture import capture_inputs
from casp.model.checkpoint import CaspConfig, CaspQuantizer
from casp.model.decoder import Decoder
from casp.model.split import Experts, SplitLinear, apply_splits, expert_of, side_by_side
from casp.moments.pool import top_up
from casp.moments.second_moment import SecondMoment
from casp.walk import walk

CPU = torch.device("cpu")
FUSED_PROJECTIONS = ["phi3", "gpt_neox", "falcon", "falcon-40b", "bloom"]


@pytest.mark.parametrize("name", FUSED_PROJECTIONS)
def test_the_parts_of_a_fused_projection_are_queries_keys_and_values(name, tmp_path):
    """Without queries no key matters, values do: so the rows called q are the queries, and k the keys."""
    family = FAMILIES[name]
    family.save(tmp_path)
    decoder = Decoder(tmp_path)
    visit = next(walk(decoder, capture_inputs(decoder, [family.batch()], CPU, torch.float32), CPU, torch.float32))
    (fused,) = (module for module in visit.block.modules() if isinstance(module, SplitLinear))

    def put_out() -> torch.Tensor:
        seen = []
        visit.replay(output=lambda entered, left, batch: seen.append(left))
        return seen[0]

    for tensor in fused.q.parameters():
        tensor.zero_()
    before = put_out()
    fused.k.weight.normal_()
    torch.testing.assert_close(put_out(), before)
    fused.v.weight.normal_()
    assert not torch.allclose(put_out(), before, atol=1e-3)


class Plain(torch.nn.Module):
    """Fused experts by transformers' interface, in one of its layouts."""

    def __init__(self, transposed: bool, bias: bool) -> None:
        super().__init__()
        self.has_gate, self.has_bias, self.is_transposed, self.has_post_expert_norm = True, bias, transposed, False
        shapes = ((4, 12, 6), (4, 6, 6))
        first, second = (torch.randn(s[0], *(s[:0:-1] if transposed else s[1:])) for s in shapes)
        self.gate_up_proj, self.down_proj = torch.nn.Parameter(first), torch.nn.Parameter(second)
        if bias:
            self.gate_up_proj_bias = torch.nn.Parameter(torch.randn(4, 12))
            self.down_proj_bias = torch.nn.Parameter(torch.randn(4, 6))

    def _apply_gate(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.tanh(gate) * up


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_experts_equal_a_loop_over_tokens(transposed, bias):
    fused, x = Plain(transposed, bias), torch.randn(9, 6)
    chosen, weights = torch.stack([torch.randperm(4)[:2] for _ in range(9)]), torch.rand(9, 2)
    expected = torch.zeros(9, 6)
    for token in range(9):
        for place in range(2):
            number = chosen[token, place]
            first, second = fused.gate_up_proj[number], fused.down_proj[number]
            inner = fused._apply_gate(
                x[token] @ (first if transposed else first.T) + (fused.gate_up_proj_bias[number] if bias else 0)
            )
            out = inner @ (second if transposed else second.T) + (fused.down_proj_bias[number] if bias else 0)
            expected[token] += weights[token, place] * out
    stored = dict(fused.named_parameters())
    model = torch.nn.Module()
    model.experts = fused
    wholes = apply_splits(model, {"experts": {"experts": 4}})
    parts = {
        name: take(stored[whole.removeprefix("experts.")])
        for whole, one in wholes.items()
        for name, take in one.parts.items()
    }
    model.load_state_dict(parts, assign=True)
    torch.testing.assert_close(model.experts(x, chosen, weights), expected)
    assert isinstance(model.experts, Experts)
    assert expert_of(model, "experts.each.2.down") is model.experts.each[2]


def test_experts_of_another_number_are_refused():
    model = torch.nn.Module()
    model.experts = Plain(False, False)
    with pytest.raises(UserError, match="not made of 5 experts"):
        apply_splits(model, {"experts": {"experts": 5}})


def test_the_same_place_of_all_experts_is_seen_at_the_same_time():
    groups = [["q", "k"], ["e.each.0.up"], ["e.each.0.down"], ["e.each.1.up"], ["e.each.1.down"]]
    assert side_by_side(groups) == [
        [["q", "k"]],
        [["e.each.0.up"], ["e.each.1.up"]],
        [["e.each.0.down"], ["e.each.1.down"]],
    ]


def test_an_expert_that_saw_little_borrows_the_mean_of_all(caplog):
    rich, poor, none = SecondMoment(3), SecondMoment(3), SecondMoment(3)
    x, y = torch.randn(20, 3), torch.randn(1, 3)
    rich.add(x)
    poor.add(y)
    top_up({"e.each.0.up": rich, "e.each.1.up": poor, "e.each.2.up": none}, "block 7")
    pool = torch.cat([x, y]).double()
    pool = pool.T @ pool / 21
    torch.testing.assert_close(rich.value(), (x.T @ x / 20).double(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(poor.value(), (y.T @ y + 2 * pool) / 3, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(none.value(), pool, atol=1e-6, rtol=1e-5)
    assert "block 7, e.each.*.up: 2 of 3 experts" in caplog.text


def test_moments_of_experts_are_those_of_the_tokens_that_go_there(tmp_path):
    """The routed tokens' second moment, padding left out, against a count by hand from the router's choice."""
    family = FAMILIES["mixtral"]
    family.save(tmp_path)
    decoder, batch = Decoder(tmp_path), family.batch()
    batch["attention_mask"][1, 12:] = 0
    visit = next(walk(decoder, capture_inputs(decoder, [batch], CPU, torch.float32), CPU, torch.float32))
    seen: dict[str, torch.Tensor] = {}
    layer = visit.block.mlp.experts
    layer.register_forward_pre_hook(lambda module, args: seen.update(x=args[0], chosen=args[1]))
    got = {}
    paths = [f"mlp.experts.each.{number}.gate_up" for number in range(4)]
    visit.replay({path: lambda x, here, path=path: got.update({path: x[here.tokens]}) for path in paths}, first=1)
    real = batch["attention_mask"].flatten().bool()
    for number, path in enumerate(paths):
        expected = seen["x"][(seen["chosen"] == number).any(-1) & real]
        torch.testing.assert_close(got[path], expected)


def test_a_block_that_does_another_thing_alone_is_refused(tmp_path, monkeypatch):
    """Attention without its sinks, which is what a walk that does not know them would run."""
    FAMILIES["gpt_oss"].save(tmp_path)
    attention = casp.model.attention._attention
    without = lambda *args, s_aux=None, **kwargs: attention(*args, **kwargs)  # noqa: E731
    T.AttentionInterface.register(casp.model.attention.NAME, without)
    try:
        with pytest.raises(UserError, match="does not do the same alone as in its model"):
            capture_inputs(Decoder(tmp_path), [FAMILIES["gpt_oss"].batch()], CPU, torch.float32)
    finally:
        casp.model.attention.register()


def test_text_alone_never_reaches_cross_attention(tmp_path):
    FAMILIES["mllama"].save(tmp_path)
    batch = FAMILIES["llama"].batch()
    with pytest.raises(UserError, match="never reaches block 1, which reads pictures"):
        capture_inputs(Decoder(tmp_path), [batch], CPU, torch.float32)


@pytest.mark.parametrize("name", ["phi3", "gpt_neox", "qwen3_moe", "gpt_oss", "qwen3_vl_moe"])
def test_a_dense_model_in_parts_is_saved_whole(name, tmp_path):
    """Its files are those of the original, bit for bit, and it stays in parts."""
    FAMILIES[name].save(tmp_path / "model")
    kind = T.AutoModelForImageTextToText if "vl" in name else T.AutoModelForCausalLM
    original, decoder = kind.from_pretrained(tmp_path / "model"), Decoder(tmp_path / "model")
    model = copy.deepcopy(original)
    wholes = {f"{path}.{leaf}" for path in decoder.splits for leaf, _ in model.get_submodule(path).named_parameters()}
    fused = apply_splits(model, decoder.splits)
    assert set(fused) == wholes
    own = original.state_dict()
    parts = {part: take(own[whole]) for whole, one in fused.items() for part, take in one.parts.items()}
    model.load_state_dict(parts, strict=False, assign=True)
    dense = CaspQuantizer(CaspConfig({}, 1, splits=decoder.splits))._dequantize(model)
    copy.deepcopy(dense).save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    dense.save_pretrained(tmp_path / "given", state_dict=dense.state_dict())
    assert set(parts) <= set(dense.state_dict())
    for folder in ("dense", "given"):
        again, told = kind.from_pretrained(tmp_path / folder, output_loading_info=True)
        assert not any(told.values()), told
        for key, tensor in again.state_dict().items():
            assert torch.equal(tensor, own[key]), key


@pytest.mark.parametrize(("name", "warned"), [("falcon", True), ("llama", False)])
def test_tokens_that_cannot_count_by_their_attention_are_told(name, warned, tmp_path, caplog):
    family = FAMILIES[name]
    family.save(tmp_path)
    capture_inputs(Decoder(tmp_path), [family.batch()], CPU, torch.float32, check=False)
    assert ("all tokens count alike" in caplog.text) == warned
