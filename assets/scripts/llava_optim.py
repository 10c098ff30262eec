"""What the demo LLaVA is trained with: Muon, learning rates by the clock, states as safetensors and JSON."""

import json
import os
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

POLAR = ((4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046))


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with equal singular values, roughly: a Newton-Schulz iteration with changing coefficients."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / (wide.norm() * 1.01 + 1e-12)
    for a, b, c in POLAR:
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix updates are orthogonalised; for hidden matrices only."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = orthogonal(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1, p.shape[0] / p.shape[1]) ** 0.5)


class Clock:
    """Learning-rate factor by the time spent: short warm-up, constant, then linear to zero at the end of the budget."""

    def __init__(self, minutes: float, spent: float = 0.0, flat: float = 0.35):
        self.seconds, self.flat, self.start = minutes * 60, flat, time.time() - spent

    @property
    def spent(self) -> float:
        """Seconds of the budget used up."""
        return time.time() - self.start

    @property
    def done(self) -> bool:
        """The budget is used up."""
        return self.spent >= self.seconds

    def factor(self, step: int, warmup: int = 20) -> float:
        """What to multiply the peak learning rates with."""
        x = self.spent / self.seconds
        return min(1.0, (step + 1) / warmup) * max(0.0, min(1.0, (1 - x) / (1 - self.flat)))


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Scale every group's learning rate from its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak", group["lr"]) * factor


def save_state(
    path: Path, parameters: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer], progress: dict
) -> None:
    """Parameters and optimiser state to one safetensors file, progress to a JSON beside it; atomic."""
    names = {id(p): n for n, p in parameters.items()}
    tensors = {f"p:{n}": p.detach().contiguous() for n, p in parameters.items()}
    for optimizer in optimizers:
        for p, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"s:{key}:{names[id(p)]}"] = torch.as_tensor(value).detach().contiguous()
    save_file(tensors, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    path.with_suffix(".json").write_text(json.dumps(progress) + "\n")


def load_state(path: Path, parameters: dict[str, torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> dict:
    """Put a saved state back and return the progress, {} when there is none; without optimisers only parameters."""
    if not path.is_file():
        return {}
    owner = {id(p): o for o in optimizers for g in o.param_groups for p in g["params"]}
    with torch.no_grad():
        for key, value in load_file(path).items():
            if key.startswith("p:"):
                parameters[key[2:]].copy_(value)
            elif owner:
                _, field, name = key.split(":", 2)
                owner[id(parameters[name])].state[parameters[name]][field] = value.clone()
    return json.loads(path.with_suffix(".json").read_text())
