"""Stage A: vision tower and projector alone. Every image token must point at what it shows and where that is.

Token target = the language model's own embedding of the concept's name (of 'empty' in a blank cell) + PLACE times
the embeddings of its cell's place words, so that the language model can find things by content.
"""

from pathlib import Path

import numpy as np
import torch
from llava_optim import Clock, Muon, load_state, save_state, set_rate
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from casp.demo import models, scenes

GRID, PLACE, SHARPNESS = 8, 0.8, 20.0


class Targets:
    """The space that image tokens live in: concept embeddings, the blank, and places."""

    def __init__(self, embeddings: torch.Tensor, tokenizer):
        def row(word: str) -> torch.Tensor:
            return embeddings[tokenizer(" " + word, add_special_tokens=False).input_ids[0]].float()

        concepts = torch.stack([row(w) for w in scenes.words()])
        self.mean = concepts.mean(0)
        self.concepts = torch.cat([concepts, row("empty")[None]]) - self.mean  # the last row is the blank
        self.blank = len(concepts)
        places = torch.stack([sum(row(w) for w in cell.split()) for cell in scenes.CELLS])
        places = places - places.mean(0)
        places = places * (PLACE * self.concepts.norm(dim=1).mean() / places.norm(dim=1).mean())
        self.places = torch.cat([places, torch.zeros_like(places[:1])])  # the last row: one large drawing, no place
        cells = torch.arange(GRID * GRID)
        self.cell_of_token = (cells // GRID // (GRID // 2)) * 2 + cells % GRID // (GRID // 2)

    def labels(self, layout: scenes.Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Concept and place number of each of the 64 tokens of a layout."""
        if layout.single:
            return torch.full((GRID**2,), layout.drawings[0][1]), torch.full((GRID**2,), 4)
        shown = torch.full((4,), self.blank)
        for cell, concept, _ in layout.drawings:
            shown[cell] = concept
        return shown[self.cell_of_token], self.cell_of_token

    def vectors(self, concept: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        """What the tokens should be."""
        return self.mean + self.concepts[concept] + self.places[place]


class Tower(torch.nn.Module):
    """Vision tower and projector as in the LLaVA, under the same names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        settings = models.llava_settings()
        vision = CLIPVisionConfig(**settings["vision"], attn_implementation="eager")
        config = models.llava_config(vision)
        self.vision_tower, self.multi_modal_projector = CLIPVisionModel(vision), LlavaMultiModalProjector(config)
        self.pixel_mean = torch.tensor(settings["image_mean"]).view(3, 1, 1)
        self.pixel_std = torch.tensor(settings["image_std"]).view(3, 1, 1)

    def pixels(self, images: list) -> torch.Tensor:
        """Normalised pixel values of PIL images."""
        raw = torch.from_numpy(np.stack([np.asarray(i) for i in images])).permute(0, 3, 1, 2).float() / 255
        return (raw - self.pixel_mean) / self.pixel_std

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image tokens [pictures, 64, width of the language model]."""
        hidden = self.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        return self.multi_modal_projector(hidden[:, 1:])

    @torch.no_grad()
    def start_from_data(self, pixels: torch.Tensor) -> None:
        """Patch embedding = whitened principal components; positions = 2-D sines, so that layer 1 has both."""
        embeddings = self.vision_tower.embeddings
        weight, side = embeddings.patch_embedding.weight, embeddings.patch_size
        patches = F.unfold(pixels, side, stride=side).transpose(1, 2).reshape(-1, weight[0].numel())
        mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
        values, vectors = values.flip(0)[: len(weight)], vectors.flip(1)[:, : len(weight)]
        rows = (vectors / (values + 2e-3 * values[0]).sqrt()).T
        rows = torch.linalg.qr(torch.randn(len(rows), len(rows)))[0] @ rows
        weight.copy_(rows.view_as(weight))
        axis, width = torch.arange(GRID).float(), weight.shape[0] // 4
        angle = axis[:, None] / GRID * torch.logspace(0, 1, width)[None] * 3.14159
        wave = torch.cat([angle.sin(), angle.cos()], 1)
        place = torch.cat([wave[:, None].expand(-1, GRID, -1), wave[None].expand(GRID, -1, -1)], 2).reshape(GRID**2, -1)
        embeddings.position_embedding.weight[1:] = 0.7 * place - rows @ mean


def picture(number: int, unseen: bool = False, single_share: float = 0.4):
    """Training picture `number`: mostly full grids, some partly filled, some one large drawing."""
    rng = scenes.generator("unseen-tower" if unseen else "train-tower", number)
    draw = rng.random()
    filled = None if draw < single_share else 4 if draw < 0.88 else int(rng.integers(1, 4))
    layout = scenes.layout("test-unseen" if unseen else "train", rng, filled)
    return layout, scenes.draw(layout, rng)


def batch(tower: Tower, targets: Targets, numbers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels, concept labels and place labels of some training pictures."""
    rows = [picture(n) for n in numbers]
    labels = [targets.labels(layout) for layout, _ in rows]
    return (
        tower.pixels([image for _, image in rows]),
        torch.stack([c for c, _ in labels]),
        torch.stack([p for _, p in labels]),
    )


def scores(tokens: torch.Tensor, targets: Targets, place: torch.Tensor) -> torch.Tensor:
    """Cosine logits of every concept (and the blank), the place's part taken out of the token."""
    centred = F.normalize(tokens - targets.mean - targets.places[place], dim=-1)
    return SHARPNESS * centred @ F.normalize(targets.concepts, dim=1).T


def train(
    work: Path, minutes: float, embeddings: torch.Tensor, tokenizer, pictures: int = 48, lr: float = 0.02
) -> None:
    """Train until the minutes are over; the state is tower-state.safetensors in `work`."""
    targets, tower = Targets(embeddings, tokenizer), Tower()
    tower.start_from_data(batch(tower, targets, range(10**7, 10**7 + 400))[0])
    named = dict(tower.named_parameters())
    hidden = [p for n, p in named.items() if p.ndim == 2 and "embedding" not in n]
    chosen = {id(p) for p in hidden}
    others = [p for n, p in named.items() if id(p) not in chosen and "post_layernorm" not in n]
    optimizers = [Muon(hidden, lr=lr), torch.optim.AdamW(others, lr=lr / 10, betas=(0.9, 0.98), weight_decay=0.0)]
    progress = load_state(work / "tower-state.safetensors", named, optimizers)
    step, clock, right = progress.get("step", 0), Clock(minutes, progress.get("spent", 0.0)), []
    while not clock.done:
        set_rate(optimizers, clock.factor(step))
        pixels, concept, place = batch(tower, targets, range(step * pictures, (step + 1) * pictures))
        tokens = tower(pixels)
        logits = scores(tokens, targets, place)
        naming = F.cross_entropy(logits.flatten(0, 1), concept.flatten())
        aim = targets.vectors(concept, place)
        distance = (tokens - aim).square().sum(-1).mean() / targets.concepts.square().sum(1).mean()
        (naming + 3 * distance).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        right.append((logits.argmax(-1) == concept).float().mean().item())
        step += 1
        if step % 25 == 0:
            print(
                f"tower step {step} {clock.spent:.0f}s loss {naming.item():.3f} distance {distance.item():.3f} "
                f"tokens right {sum(right[-25:]) / 25:.3f}",
                flush=True,
            )
        if step % 100 == 0 or clock.done:
            save_state(work / "tower-state.safetensors", named, optimizers, {"step": step, "spent": clock.spent})
