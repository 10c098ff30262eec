"""The attention that can be watched, beside attention written out in float64."""

import pytest
import torch
from torch import Tensor, nn

import casp.model.attention as attention


def written_out(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Masked attention of equally many heads, (batch, queries, heads, head_dim), in float64."""
    query, key, value = query.double(), key.double(), value.double()
    logits = (query @ key.transpose(-1, -2)) * query.shape[-1] ** -0.5
    return (logits.masked_fill(~mask, float("-inf")).softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("most", [0, 1 << 40], ids=["few queries at a time", "all together"])
@pytest.mark.parametrize("tokens", [attention.ROWS - 3, 2 * attention.ROWS + 5])
def test_masked_attention_and_its_gradients(monkeypatch: pytest.MonkeyPatch, most: int, tokens: int) -> None:
    monkeypatch.setattr(attention, "MOST_MASK", most)
    fused, together = attention.sdpa_attention_forward, []

    def noted(module: nn.Module, query: Tensor, *rest: object, **named: object) -> object:
        together.append(query.shape[2])
        return fused(module, query, *rest, **named)

    monkeypatch.setattr(attention, "sdpa_attention_forward", noted)
    draw = torch.Generator().manual_seed(0)
    operands = [torch.randn(2, 3, tokens, 8, generator=draw) for _ in range(3)]
    lengths = torch.tensor([tokens, tokens // 2])
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    mask = causal & (torch.arange(tokens) < lengths[:, None])[:, None, None]
    probe = torch.randn(2, tokens, 3, 8, generator=draw)

    leaves = [one.clone().requires_grad_() for one in operands]
    found, _ = attention._attention(nn.Module().eval(), *leaves, mask)
    gradients = torch.autograd.grad((found * probe).sum(), leaves)
    exact = [one.double().requires_grad_() for one in operands]
    wanted = written_out(*exact, mask)
    true_gradients = torch.autograd.grad((wanted * probe).sum(), exact)

    assert max(together) == (min(tokens, attention.ROWS) if most == 0 else tokens)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for one, true in zip(gradients, true_gradients, strict=True):
        torch.testing.assert_close(one.double(), true.double(), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(attention._attention(nn.Module().eval(), *operands, mask)[0], found.detach())
