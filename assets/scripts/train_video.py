"""Train what the demo video model adds to demo-llava: a low-rank update of the language model, on clips.

    python assets/scripts/train_video.py train  --work runs/train-video --minutes 45
    python assets/scripts/train_video.py export --work runs/train-video

Tower and projector stay demo-llava's: pooled by LLaVA-NeXT-Video, 16 tokens a frame still point at what they show. What
is learned is time: which frame a token is of, and what that says. Each clip is paid for once: its tokens come first
in a row, the questions after it do not see one another. `train` can be stopped and started again; learning rates
follow the clock, so the budget is in minutes of this machine.
"""

import argparse
from pathlib import Path

import llava_language
import numpy as np
import torch
from llava_language import Row
from llava_optim import Clock, load_state, save_state, set_rate
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoTokenizer, LlavaForConditionalGeneration

from casp.demo import assets_folder, clips, models, scenes

RANK = 8
CELLS = np.array([[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]])  # the tokens of each, of 4 x 4
STATE = "video-state.safetensors"


class Language(torch.nn.Module):
    """The language model of a LLaVA as `llava_language.add_updates` and `learn` take it."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        super().__init__()
        self.model = llava.model.language_model


class Eyes:
    """demo-llava's tower and projector over frames, pooled as LLaVA-NeXT-Video does."""

    def __init__(self, llava: LlavaForConditionalGeneration):
        settings = models.llava_settings()
        self.tower, self.projector = llava.model.vision_tower, llava.model.multi_modal_projector
        self.mean = torch.tensor(settings["image_mean"]).view(3, 1, 1)
        self.std = torch.tensor(settings["image_std"]).view(3, 1, 1)

    @torch.no_grad()
    def tokens(self, frames: list) -> torch.Tensor:
        """Tokens [frames, 16, width of the language model] of PIL images."""
        raw = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2).float() / 255
        pixels = ((raw - self.mean) / self.std).to(self.projector.linear_1.weight.dtype)
        hidden = self.tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
        side = int(hidden.shape[1] ** 0.5)
        pooled = F.avg_pool2d(hidden.transpose(1, 2).unflatten(2, (side, side)), 2)
        return self.projector(pooled.flatten(2).transpose(1, 2))


def questions(rng: np.random.Generator) -> tuple[clips.Clip, list[tuple[str, str, str]]]:
    """A clip of the split 'train' and (kind, question, answer) of all that can be asked about it."""
    draw = rng.random()
    if draw < 0.15:  # what is easily learned
        clip = clips.replaced("train", rng, int(rng.integers(2, 4)))
        kinds = [("order", "start"), ("order", "end"), ("after", "end"), ("after", "end")]
    elif draw < 0.6:
        clip = clips.moved("train", rng, int(rng.integers(1, 4)))
        kinds = [("direction", "end"), ("where", "start"), ("where", "end"), ("where", "start"), ("where", "end")]
    else:
        first, last = rng.choice(np.arange(1, 5), size=2, replace=False)
        if rng.random() < 0.75:
            last = min(4, first + 1) if last > first else max(1, first - 1)
        clip = clips.changed("train", rng, int(first), int(last))
        kinds = [("count", "start"), ("count", "end")]
        kinds += [("change", "end")] if abs(int(first) - int(last)) == 1 else []
    asked = {}
    for kind, end in kinds:
        text, answer = clips.ask(kind, clip, rng, end)
        asked[text] = (kind, text, answer)
    return clip, list(asked.values())


def row_of(tokens: torch.Tensor, asked: list, kept: int, tokenizer, rng: np.random.Generator) -> Row:
    """A clip's tokens [frames, 16, width], `kept` of each cell, and the questions about it, as one sequence."""
    row, (frames, each, _) = Row(), tokens.shape
    row.add([tokenizer.bos_token_id], 0, 0, [0])
    for frame in range(frames):
        for place in np.sort(rng.permuted(CELLS, axis=1)[:, :kept], axis=None):
            row.vectors[len(row.ids)] = tokens[frame, place]
            row.add([0], 0, 0, [frame * each + int(place) + 1])
    start = frames * each + 1
    for number, (kind, text, answer) in enumerate(asked, start=1):
        prompt = tokenizer(f"\n{text}", add_special_tokens=False).input_ids
        reply = tokenizer(f" {answer}", add_special_tokens=False).input_ids
        stop = [tokenizer.eos_token_id] if rng.random() < 0.15 else []
        inputs = prompt + (reply if stop else reply[:-1])
        for i, token in enumerate(reply + stop):
            row.learn.append((len(row.ids) + len(prompt) - 1 + i, token, kind, number))
        row.add(inputs, 0, number, list(range(start, start + len(inputs))))
    return row


def train(work: Path, minutes: float, lr: float, rows_each: int, first_block: int) -> None:
    """Train the low-rank update until the minutes are over."""
    folder = models.build("demo-llava")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    llava = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")
    text, eyes = Language(llava.requires_grad_(False)), Eyes(llava)
    embed = text.model.embed_tokens.weight
    factors = llava_language.add_updates(text, RANK, first_block)
    optimizer = llava_language.adam_of(factors, lr)
    progress = load_state(work / STATE, factors, [optimizer])
    step, clock = progress.get("step", 0), Clock(minutes, progress.get("spent", 0.0), flat=0.5)
    seen: dict[str, list[bool]] = {}
    while not clock.done:
        set_rate([optimizer], clock.factor(step))
        rng = scenes.generator("clips-train-language", step)
        pairs = [questions(rng) for _ in range(rows_each)]
        frames = [frame for clip, _ in pairs for frame in clips.draw(clip, rng)]
        tokens = eyes.tokens(frames).unflatten(0, (rows_each, clips.FRAMES))
        kept = CELLS.shape[1] if step % 4 == 3 else 1  # the four tokens of a cell say much the same
        rows = [row_of(one, asked, kept, tokenizer, rng) for one, (_, asked) in zip(tokens, pairs, strict=True)]
        loss = llava_language.learn(text, rows, embed, optimizer, seen)
        step += 1
        if step % 25 == 0:
            told = " ".join(f"{k} {np.mean(seen[k]):.2f}" for k in clips.KINDS if k in seen)
            print(f"video step {step} {clock.spent:.0f}s loss {loss:.3f} {told}", flush=True)
            seen = {}
        if step % 100 == 0 or clock.done:
            save_state(work / STATE, factors, [optimizer], {"step": step, "spent": clock.spent})


def export(work: Path) -> None:
    """Write what was learned to assets/demo-video, in bfloat16."""
    path = assets_folder() / "demo-video" / "language.safetensors"
    path.parent.mkdir(exist_ok=True)
    update = {n[2:]: t for n, t in load_file(work / STATE).items() if n.startswith("p:")}
    save_file({n: t.to(torch.bfloat16).contiguous() for n, t in update.items()}, path)
    print(f"{path.name}: {len(update)} tensors, {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder for the state; `train` resumes from it")
    parser.add_argument("--minutes", type=float, default=45, help="budget, minutes (default 45)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--lr", type=float, default=1.5e-3, help="peak learning rate (default 1.5e-3)")
    parser.add_argument("--rows", type=int, default=8, help="clips a step (default 8)")
    parser.add_argument("--first-block", type=int, default=0, help="the first block that is updated (default 0)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "train":
        train(args.work, args.minutes, args.lr, args.rows, args.first_block)
    else:
        export(args.work)


if __name__ == "__main__":
    main()
