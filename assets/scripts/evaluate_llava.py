"""Exact match of demo-llava or demo-video per kind of question, as it is or with its decoder rounded to a few bits.

    python assets/scripts/evaluate_llava.py --split test --count 600
    python assets/scripts/evaluate_llava.py --split validation --count 240 --bits 4
    python assets/scripts/evaluate_llava.py --split clips-test --count 240

An answer counts when greedy decoding gives exactly its tokens and then stops. Rounding is to nearest, in groups of 64
input weights, each with its own minimum and step (asymmetric), on every linear layer of the decoder's blocks.
"""

import argparse
import json
import time

import torch
from casp_eval.questions import wilson
from transformers import AutoModelForImageTextToText, AutoProcessor

from casp.data.chats import Chat, messages
from casp.data.sources import EVALUATION_CHATS, evaluation_chats
from casp.demo import models


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = 64) -> torch.Tensor:
    """A weight matrix on a grid of 2^bits levels per group of inputs."""
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-9)
    return (((grouped - low) / step).round() * step + low).reshape(weight.shape).to(weight.dtype)


@torch.no_grad()
def matches(model, processor, questions: list[Chat], batch: int = 24) -> list[bool]:
    """Whether the model's most likely tokens are the answer and then the end, for each question."""
    tokenizer, rows = processor.tokenizer, []
    media = "pixel_values_videos" if questions[0].videos() else "pixel_values"
    settled = {"processor_kwargs": {"videos_kwargs": {"do_sample_frames": False}}} if questions[0].videos() else {}
    for q in questions:
        answer = [*tokenizer(" " + q.answer(), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        turns = messages(q.asked(), strings=False)
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        ids = processor.apply_chat_template(turns, **options, **settled)
        rows.append((ids["input_ids"][0].tolist(), answer, ids[media]))
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    good = [False] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        full = [rows[i][0] + rows[i][1][:-1] for i in chosen]
        length = max(len(f) for f in full)
        ids = torch.tensor([f + [tokenizer.pad_token_id] * (length - len(f)) for f in full])
        mask = torch.tensor([[1] * len(f) + [0] * (length - len(f)) for f in full])
        tail = length - min(len(rows[i][0]) for i in chosen) + 1
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            logits_to_keep=tail,
            **{media: torch.cat([rows[i][2] for i in chosen])},
        ).logits
        for k, i in enumerate(chosen):
            first = len(rows[i][0]) - 1 - (length - tail)
            said = logits[k, first : first + len(rows[i][1])].argmax(-1).tolist()
            good[i] = said == rows[i][1]
    return good


def main() -> None:
    """Print one line of JSON: the share of right answers of each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint folder (default: the built-in model of the split)")
    parser.add_argument("--split", default="validation", choices=EVALUATION_CHATS)
    parser.add_argument("--count", type=int, default=240, help="questions (default 240)")
    parser.add_argument("--bits", type=int, help="round the decoder's linear layers to this many bits (default: no)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = args.model or models.build("demo-video" if args.split.startswith("clips-") else "demo-llava")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if args.bits:
        for module in model.model.language_model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = round_to_nearest(module.weight.data, args.bits)
    questions, began = evaluation_chats(args.split, args.count, seed=0), time.time()
    good = matches(model, processor, questions)
    report: dict = {"split": args.split, "bits": args.bits or 16, "seconds": round(time.time() - began)}
    for kind in (*dict.fromkeys(q.kind for q in questions), "all"):
        hits = [g for g, q in zip(good, questions, strict=True) if kind in (q.kind, "all")]
        low, high = wilson(sum(hits), len(hits))
        report[kind] = {
            "right": round(sum(hits) / len(hits), 3),
            "of": len(hits),
            "from": round(low, 3),
            "to": round(high, 3),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
