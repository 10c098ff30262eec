"""The Hessian folder against moments taken with plain hooks; token weights; resume; refusals."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from casp.attention import AttentionCall
from casp.errors import UserError
from casp.folder import WorkFolder
from casp.hessians import Hessians, attention_received, block_file, collect, packed, unpacked
from casp.models import Decoder
from casp.walk import BatchInputs

CPU = torch.device("cpu")
IDS = torch.randint(4, 128, (3, 20), generator=torch.Generator().manual_seed(0))
PADDED = {"input_ids": IDS, "attention_mask": (torch.arange(20) < torch.tensor([[20], [13], [7]])).long()}


def work(model, output, **settings):
    return WorkFolder(output, Decoder.open(model), "hessians", "tiny", settings, "calibration")


def collected(model, output, weighting=None, batches=(PADDED,)):
    folder = work(model, output)
    return (
        folder.output if folder.done else collect(folder.decoder, folder, list(batches), CPU, torch.float32, weighting)
    )


def sizes(decoder, index):
    return {path: decoder.block(index).get_submodule(path).in_features for path in decoder.linears(index).values()}


def test_equal_to_what_hooks_see_in_the_model_run_whole(tiny_llama, tmp_path):
    hessians = Hessians(collected(tiny_llama, tmp_path / "out"))
    decoder = Decoder.open(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    real = PADDED["attention_mask"].bool()
    seen = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0][real].double()}))
    model(**PADDED)
    for index, block in enumerate(decoder.blocks):
        groups = hessians.read(index, sizes(decoder, index))
        assert sorted(len(group) for group, _ in groups) == [1, 1, 2, 3]
        for group, hessian in groups:
            for path in group:
                x = seen[f"{block}.{path}"]
                expected = (x.T @ x / len(x)).float()
                assert torch.allclose(hessian, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_a_triangle_is_a_symmetric_matrix():
    matrix = torch.randn(7, 7)
    matrix = matrix + matrix.T
    assert packed(matrix).numel() == 28
    assert torch.equal(unpacked(packed(matrix), 7), matrix)


def test_interrupted_it_resumes_to_the_same_bytes(tiny_llama, tmp_path):
    whole = collected(tiny_llama, tmp_path / "whole")
    begun = work(tiny_llama, tmp_path / "out")
    shutil.copy(whole / block_file(0), begun.folder)
    begun._lock.close()
    resumed = collected(tiny_llama, tmp_path / "out")
    names = sorted(file.name for file in whole.glob("*.safetensors"))
    assert names == [block_file(i) for i in range(3)]
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    assert not (resumed / "lock").exists()


def batch_of(tokens):
    return BatchInputs(torch.zeros(*tokens.shape, 1), [], tokens, torch.zeros_like(tokens))


def test_uniform_attention_weighs_all_tokens_alike():
    call = AttentionCall(torch.zeros(2, 4, 9, 8), torch.randn(2, 2, 9, 8), None, 1.0)
    weights = attention_received(call, batch_of(torch.ones(2, 9, dtype=torch.bool)))
    assert torch.allclose(weights, torch.ones(2, 9))


def test_a_token_that_nobody_looks_at_weighs_nothing_and_one_that_all_look_at_is_bounded():
    key = torch.zeros(1, 1, 12, 4)
    key[0, 0, 3, 0], key[0, 0, 5, 0] = -60.0, 60.0
    query = torch.zeros(1, 2, 12, 4)
    query[..., 0] = 1.0
    weights = attention_received(AttentionCall(query, key, None, 1.0), batch_of(torch.ones(1, 12, dtype=torch.bool)))
    # Query 3 itself still spreads over keys 0 to 2, and no query from 5 on looks elsewhere than at key 5.
    assert weights[0, 3] < 1e-6
    assert weights[0, 5] == 4.0
    assert (weights[0, 6:] < 1e-6).all()


def test_weighted_hessians_leave_padding_out(tiny_llama, tmp_path):
    first = Hessians(collected(tiny_llama, tmp_path / "a", attention_received))
    other = {**PADDED, "input_ids": torch.where(PADDED["attention_mask"].bool(), IDS, 9)}
    second = Hessians(collected(tiny_llama, tmp_path / "b", attention_received, [other]))
    plain = Hessians(collected(tiny_llama, tmp_path / "c"))
    decoder = Decoder.open(tiny_llama)
    for (_, a), (_, b), (_, c) in zip(*(h.read(1, sizes(decoder, 1)) for h in (first, second, plain)), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(a, c, rtol=1e-2)


def test_refusals(tiny_llama, tiny_qwen2, tmp_path):
    folder = collected(tiny_llama, tmp_path / "out")
    decoder = Decoder.open(tiny_llama)
    with pytest.raises(UserError, match=r"not a finished folder.*hfize"):
        Hessians(tmp_path / "nowhere")
    hessians = Hessians(folder)
    hessians.check(hessians.fingerprint["model"], decoder)
    with pytest.raises(UserError, match="another model"):
        hessians.check("0" * 64, Decoder.open(tiny_qwen2))
    file = folder / block_file(1)
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="is truncated"):
        hessians.read(1, sizes(decoder, 1))
    file.unlink()
    with pytest.raises(UserError, match="lacks block 1"):
        hessians.check(hessians.fingerprint["model"], decoder)
