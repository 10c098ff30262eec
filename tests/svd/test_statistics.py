"""The moments of the attention stage against Jacobians computed one by one, and the density in closed form."""

import math

import pytest
import torch
from casp_svd.statistics import attention_moments, input_moments

from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.moments.density import MASS, influence_and_density
from casp.walk import walk

CPU = torch.device("cpu")
MODELS = ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_llava"]
ATTENTION = "self_attn"
PATHS = [f"{ATTENTION}.{leaf}_proj" for leaf in "qko"]


def batch_of(decoder: Decoder, seed: int = 0, filler: int = 0) -> dict[str, torch.Tensor]:
    """Two sequences, one padded on the left and one on the right; `filler` stands in the padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 100, (2, 22), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    ids[mask == 0] = filler
    batch = {"input_ids": ids, "attention_mask": mask}
    if decoder.is_multimodal:
        ids[:, 4:20] = decoder.config.image_token_id
        batch["pixel_values"] = torch.randn(2, 3, 32, 32, generator=generator)
    return batch


def first_visit(decoder: Decoder, batches: list[dict[str, torch.Tensor]]):
    return next(walk(decoder, capture_inputs(decoder, batches, CPU, torch.float32), CPU, torch.float32))


def exact_moments(visit, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Output moment and weighted hessian of one projection from the full Jacobian, token by token."""
    batch = visit.inputs[0]
    projection, seen = visit.block.get_submodule(path), {}
    hook = projection.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    visit.replay({PATHS[2]: lambda x, _: None})
    hook.remove()
    x, start = seen["x"], seen["out"]

    def attention_output(value: torch.Tensor) -> torch.Tensor:
        result = {}
        hooks = [
            projection.register_forward_hook(lambda module, args, out: value),
            visit.block.get_submodule(PATHS[2]).register_forward_hook(lambda module, args, out: result.update(y=out)),
        ]
        visit.block(batch.hidden, **batch.kwargs[visit.index])
        for hook in hooks:
            hook.remove()
        return result["y"][batch.tokens]  # what padding puts out does not count

    jacobian = torch.autograd.functional.jacobian(attention_output, start)  # (kept, hidden, batch, tokens, out)
    jacobian = jacobian[:, :, batch.tokens].double()
    per_token = torch.einsum("aitc,aitd->tcd", jacobian, jacobian)
    weights = per_token.diagonal(dim1=1, dim2=2).sum(-1)
    kept = x[batch.tokens].double()
    hessian = torch.einsum("t,ti,tj->ij", weights, kept, kept) / weights.sum()
    return per_token.mean(0), hessian


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("name", MODELS[1:])
def test_probes_sample_the_jacobian(name, request):
    """Through rotary embedding, query/key norms, biases, grouped heads, masks and padding alike."""
    decoder = Decoder(request.getfixturevalue(name))
    visit = first_visit(decoder, [batch_of(decoder)])
    exact = [exact_moments(visit, path) for path in PATHS[:2]]
    visit.inputs = visit.inputs * 150
    sampled = attention_moments(visit, *PATHS, torch.Generator().manual_seed(0))
    for (output_moment, hessian), moments in zip(exact, sampled, strict=True):
        assert relative(moments.output_moment, output_moment) < 0.2
        assert relative(moments.hessian, hessian) < 0.15
        assert moments.output_moment.trace().item() == pytest.approx(output_moment.trace().item(), rel=0.05)


@pytest.mark.parametrize("name", MODELS)
def test_padding_does_not_enter(name, request):
    decoder = Decoder(request.getfixturevalue(name))
    found = []
    for filler in (0, 77):
        visit = first_visit(decoder, [batch_of(decoder, filler=filler)])
        moments = attention_moments(visit, *PATHS, torch.Generator().manual_seed(0))
        found.append([*moments, input_moments(visit, PATHS[0])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one.hessian, other.hessian)
        if one.output_moment is not None:
            torch.testing.assert_close(one.output_moment, other.output_moment)


def test_the_block_is_left_as_it_was(tiny_llama):
    decoder = Decoder(tiny_llama)
    visit = first_visit(decoder, [batch_of(decoder)])
    attention_moments(visit, *PATHS, torch.Generator().manual_seed(0))
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in visit.block.modules())
    assert all(p.grad is None and not p.requires_grad for p in visit.block.parameters())
    with torch.no_grad():
        visit.advance()
    assert not visit.inputs[0].hidden.requires_grad


def test_input_moment_is_the_mean_over_real_tokens(tiny_llama):
    decoder = Decoder(tiny_llama)
    visit = first_visit(decoder, [batch_of(decoder)])
    batch = visit.inputs[0]
    x = visit.block.input_layernorm(batch.hidden)[batch.tokens].double()
    torch.testing.assert_close(input_moments(visit, PATHS[0]).hessian, x.T @ x / 39, rtol=1e-5, atol=1e-6)


def test_density_of_uniform_attention(tiny_llava):
    """Without logits a query over n keys uses ceil(0.95 n) of them."""
    decoder = Decoder(tiny_llava)
    batch = {key: value[:1] for key, value in batch_of(decoder).items()}
    batch["attention_mask"][:] = 1
    visit = first_visit(decoder, [batch])
    torch.nn.init.zeros_(visit.block.self_attn.q_proj.weight)
    found = influence_and_density(visit, 1)[1]
    is_image = [4 <= key < 20 for key in range(22)]
    visible = {kind: sum(is_image[k] == (kind == "image") for q in range(22) for k in range(q + 1)) for kind in found}
    used = sum(math.ceil(MASS * n) for n in range(1, 23))
    total = found["image"] * visible["image"] + found["text"] * visible["text"]
    assert total == pytest.approx(used, abs=0.5)


def test_density_of_sharp_attention(tiny_llama):
    """With huge logits every query takes one key; a text model has no image keys."""
    decoder = Decoder(tiny_llama)
    batch = {"input_ids": torch.arange(4, 24)[None]}
    visit = first_visit(decoder, [batch])
    visit.block.self_attn.q_proj.weight.mul_(1e4)
    assert influence_and_density(visit, 1)[1] == {"image": None, "text": pytest.approx(20 / 210)}


def test_density_is_that_of_the_first_batches_and_influence_that_of_all(tiny_llama):
    decoder = Decoder(tiny_llama)
    ids = torch.randint(4, 60, (2, 1, 20), generator=torch.Generator().manual_seed(3))
    one, two = ({"input_ids": row} for row in ids)
    of_one, of_two = (influence_and_density(first_visit(decoder, [batch]), 1) for batch in (one, two))
    first, both = (influence_and_density(first_visit(decoder, [one, two]), count) for count in (1, 2))
    assert first[1] == of_one[1] != of_two[1]
    assert both[1]["text"] == pytest.approx((of_one[1]["text"] + of_two[1]["text"]) / 2)
    assert first[0] == both[0] == pytest.approx((of_one[0] + of_two[0]) / 2, rel=1e-4)


def test_density_leaves_padding_out(tiny_llama):
    decoder = Decoder(tiny_llama)
    found = [influence_and_density(first_visit(decoder, [batch_of(decoder, filler=f)]), 1)[1]["text"] for f in (0, 77)]
    assert found[0] == found[1]
    assert 0 < found[0] <= 1
