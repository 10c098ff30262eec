"""Stages B and C: a low-rank update of the language model, learned on many short questions to each picture.

Until the tower is good, the image tokens are made up: the tower's targets plus noise, now and then a wrong concept.
A shared picture is paid for once: its tokens come first in a row, the questions after it do not see one another.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import llava_tower
import numpy as np
import torch
from llava_optim import Clock, load_state, save_state, set_rate
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from casp.demo import assets_folder, scenes

RANK, FIRST_BLOCK = 16, 6  # the first blocks stay as they are, which saves a fifth of the backward pass
GRID_KINDS = ("position", "position", "position", "where", "where", "where", "where", "yes", "no", "count")
SINGLE_KINDS = ("name", "category", "yes or no")


class LowRankUpdate(torch.nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices."""

    def __init__(self, linear: torch.nn.Linear, rank: int, generator: torch.Generator):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        a = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
        self.lora_a = torch.nn.Parameter(a)
        self.lora_b = torch.nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The updated layer's output."""
        return self.linear(x) + (x @ self.lora_a.T.to(x.dtype)) @ self.lora_b.T.to(x.dtype)


def add_updates(
    text: torch.nn.Module, rank: int = RANK, first_block: int = FIRST_BLOCK
) -> dict[str, torch.nn.Parameter]:
    """Wrap every linear of the decoder's later blocks; the trained factors under the names they have in the LLaVA.

    text: a model with the blocks in `model.layers`, in float32 or, which a CPU with AMX is fast at, in bfloat16;
    the factors are float32 in any case.
    """
    text.requires_grad_(False)
    generator, factors = torch.Generator().manual_seed(0), {}
    for number, block in list(enumerate(text.model.layers))[first_block:]:
        for owner in (block.self_attn, block.mlp):
            for role, linear in list(owner.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    wrapped = LowRankUpdate(linear, rank, generator)
                    setattr(owner, role, wrapped)
                    part = "self_attn" if owner is block.self_attn else "mlp"
                    base = f"model.language_model.layers.{number}.{part}.{role}"
                    factors[f"{base}.lora_a"], factors[f"{base}.lora_b"] = wrapped.lora_a, wrapped.lora_b
    return factors


@dataclass
class Row:
    """One sequence: per token its id or image vector, picture, question (0 = picture), position; and what to learn."""

    ids: list[int] = field(default_factory=list)
    vectors: dict[int, torch.Tensor] = field(default_factory=dict)
    picture: list[int] = field(default_factory=list)
    question: list[int] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    learn: list[tuple[int, int, str, int]] = field(default_factory=list)  # place, next token, kind, question number

    def add(self, ids: list[int], picture: int, question: int, positions: list[int]) -> None:
        """Append tokens."""
        self.ids += ids
        self.picture += [picture] * len(ids)
        self.question += [question] * len(ids)
        self.position += positions


class Rows:
    """Makes rows of pictures and questions."""

    def __init__(self, targets: llava_tower.Targets, tokenizer, bos: int = 1, eos: int = 2):
        self.targets, self.tokenizer, self.bos, self.eos = targets, tokenizer, bos, eos

    def made_up(self, layout: scenes.Layout, rng: np.random.Generator) -> torch.Tensor:
        """Image tokens as a fair tower would make them: targets with noise, some pointing elsewhere."""
        concept, place = self.targets.labels(layout)
        source = torch.Generator().manual_seed(int(rng.integers(2**31)))
        shape, total = concept.shape, len(self.targets.concepts)
        stray = torch.rand(shape, generator=source) < 0.25 * rng.random()
        other = torch.randint(total, shape, generator=source)
        aim = self.targets.vectors(torch.where(stray, other, concept), place)
        width = aim.shape[1]
        size = self.targets.concepts.norm(dim=1).mean() / width**0.5
        noise = torch.randn(aim.shape, generator=source) * 0.5 * rng.random()
        shared = torch.randn(5, width, generator=source)[place] * 0.5 * rng.random()
        return aim * (0.75 + 0.35 * rng.random()) + (noise + shared) * size

    def add_picture(
        self, row: Row, number: int, layout: scenes.Layout, tokens: torch.Tensor, keep: int, rng: np.random.Generator
    ) -> None:
        """Append a picture (`keep` of its tokens) and questions about it to a row."""
        kept = np.sort(rng.choice(len(tokens), keep, replace=False))
        row.add([self.bos], number, 0, [0])
        for k in kept:
            row.vectors[len(row.ids)] = tokens[k]
            row.add([0], number, 0, [int(k) + 1])
        start = len(tokens) + 1
        for q, kind in enumerate(SINGLE_KINDS if layout.single else GRID_KINDS, start=1):
            real = "yes/no" if kind in ("yes", "no", "yes or no") else kind
            yes = kind == "yes" or (kind == "yes or no" and rng.random() < 0.5)
            text, answer = scenes.ask(real, layout, rng, yes=yes)
            prompt = self.tokenizer(f"\n{text}", add_special_tokens=False).input_ids
            reply = self.tokenizer(f" {answer}", add_special_tokens=False).input_ids
            stop = [self.eos] if rng.random() < 0.15 else []
            inputs = prompt + (reply if stop else reply[:-1])
            for i, token in enumerate(reply + stop):
                row.learn.append((len(row.ids) + len(prompt) - 1 + i, token, real, number * 100 + q))
            row.add(inputs, number, q, list(range(start, start + len(inputs))))


def collate(rows: list[Row], embed: torch.Tensor):
    """Inputs of the language model for a list of rows: embeddings, mask and positions, padded at the end."""
    length = max(len(r.ids) for r in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([getattr(r, name) + [fill] * (length - len(r.ids)) for r in rows])

    inputs = embed[padded("ids", 0)]
    for i, row in enumerate(rows):
        inputs[i, list(row.vectors)] = torch.stack(list(row.vectors.values())).to(embed.dtype)
    picture, question = padded("picture", -1), padded("question", -1)
    same = picture[:, :, None] == picture[:, None]
    sees = (question[:, None] == 0) | (question[:, :, None] == question[:, None])
    allowed = same & sees & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape, dtype=embed.dtype).masked_fill(~allowed, torch.finfo(embed.dtype).min)[:, None]
    return inputs, mask, padded("position", 0)


def adam_of(factors: dict[str, torch.Tensor], lr: float) -> torch.optim.Optimizer:
    """What the factors of low-rank updates are trained with, those that begin at zero at twice the rate."""
    groups = [
        {"params": [p for n, p in factors.items() if n.endswith(end)], "lr": lr * times}
        for end, times in (("lora_a", 1.0), ("lora_b", 2.0))
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)


def learn(
    text, rows: list[Row], embed: torch.Tensor, optimizer: torch.optim.Optimizer, seen: dict[str, list[bool]]
) -> float:
    """One step on the answers of some rows: its loss; `seen` gets, by kind, whether the model knew each answer."""
    inputs, mask, position = collate(rows, embed)
    hidden = text.model(inputs_embeds=inputs, attention_mask=mask, position_ids=position, use_cache=False)[0]
    flat = [(i, *entry) for i, row in enumerate(rows) for entry in row.learn]
    logits = F.linear(hidden[[f[0] for f in flat], [f[1] for f in flat]], embed)
    aim = torch.tensor([f[2] for f in flat])
    loss = F.cross_entropy(logits.float(), aim)
    hits: dict[tuple, list] = {}
    for f, good in zip(flat, (logits.argmax(1) == aim).tolist(), strict=True):
        hits.setdefault((f[3], f[0], f[4]), []).append(good)
    for (kind, *_), goods in hits.items():
        seen.setdefault(kind, []).append(all(goods))
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


class Eyes:
    """The tower while it is being trained: reads its latest state now and then."""

    def __init__(self, work: Path, ready: float = 1700):
        self.path, self.ready, self.tower = work / "tower-state.safetensors", ready, None

    def refresh(self) -> None:
        """Load the newest tower once it has trained for `ready` seconds."""
        state = self.path.with_suffix(".json")
        if state.is_file() and json.loads(state.read_text())["spent"] > self.ready:
            self.tower = self.tower or llava_tower.Tower()
            load_state(self.path, dict(self.tower.named_parameters()), [])

    @torch.no_grad()
    def tokens(self, images: list) -> torch.Tensor:
        """Image tokens of pictures."""
        return self.tower(self.tower.pixels(images))


def train(work: Path, minutes: float, text, tokenizer, lr: float = 1.5e-3, rows_each: int = 4, keep: int = 12) -> None:
    """Train the low-rank update until the minutes are over."""
    embed = text.model.embed_tokens.weight.detach()
    maker = Rows(llava_tower.Targets(embed, tokenizer), tokenizer)
    factors = add_updates(text)
    optimizer = adam_of(factors, lr)
    path = work / "language-state.safetensors"
    progress = load_state(path, factors, [optimizer])
    eyes = Eyes(work)
    eyes.refresh()
    step, clock = progress.get("step", 0), Clock(minutes, progress.get("spent", 0.0), flat=0.5)
    seen: dict[str, list[bool]] = {}
    while not clock.done:
        if step % 50 == 0:
            eyes.refresh()
        set_rate([optimizer], clock.factor(step))
        rows, late = [], clock.spent > 0.7 * clock.seconds
        for i in range(rows_each):
            rng, row = scenes.generator("train-language", step * rows_each + i), Row()
            shapes = [None, None, None] if i % 4 == 3 else [[4, 4, 3, 3, 2, 2, 1, 1, 1][int(rng.integers(9))]]
            layouts = [scenes.layout("train", rng, filled) for filled in shapes]
            real = eyes.tower is not None and (late or rng.random() < 0.8)
            tokens = (
                eyes.tokens([scenes.draw(one, rng) for one in layouts])
                if real
                else [maker.made_up(one, rng) for one in layouts]
            )
            for number, (one, vectors) in enumerate(zip(layouts, tokens, strict=True)):
                whole = real and rng.random() < 0.25
                maker.add_picture(row, number, one, vectors, len(vectors) if whole else keep, rng)
            rows.append(row)
        loss = learn(text, rows, embed, optimizer, seen)
        step += 1
        if step % 20 == 0:
            told = " ".join(f"{k} {np.mean(seen[k]):.2f}" for k in scenes.KINDS if k in seen)
            print(
                f"language step {step} {clock.spent:.0f}s loss {loss:.3f} {told} "
                f"{'tower' if eyes.tower else 'made up'}",
                flush=True,
            )
            seen = {}
        if step % 40 == 0 or clock.done:
            save_state(path, factors, [optimizer], {"step": step, "spent": clock.spent})


def export(work: Path) -> None:
    """Write what was learned to assets/demo-llava, in bfloat16."""
    folder = assets_folder() / "demo-llava"
    tower = {f"model.{n[2:]}": t for n, t in load_file(work / "tower-state.safetensors").items() if n.startswith("p:")}
    update = {n[2:]: t for n, t in load_file(work / "language-state.safetensors").items() if n.startswith("p:")}
    for name, tensors in (("tower", tower), ("language", update)):
        path = folder / f"{name}.safetensors"
        save_file({n: t.to(torch.bfloat16).contiguous() for n, t in tensors.items()}, path)
        print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 1e6:.1f} MB")
