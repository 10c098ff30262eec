"""Train what the demo LLaVA adds to SmolLM2: tower and projector (stage A), a low-rank update (stages B and C).

    python assets/scripts/train_llava.py tower    --work runs/train --minutes 40
    python assets/scripts/train_llava.py language --work runs/train --minutes 60
    python assets/scripts/train_llava.py export   --work runs/train

The stages may run at the same time: `language` learns on made-up image tokens until the tower is there. Each can be
stopped and started again; learning rates follow the clock, so the budget is in minutes of this machine.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from casp.demo import models


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("tower", "language", "export"))
    parser.add_argument("--work", type=Path, required=True, help="folder for states; a stage resumes from it")
    parser.add_argument("--minutes", type=float, default=40, help="budget of the stage, minutes (default 40)")
    parser.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the stage's own)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = models.build("demo-llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rate = {"lr": args.lr} if args.lr else {}
    if args.stage == "tower":
        import llava_tower

        llava_tower.train(args.work, args.minutes, text.model.embed_tokens.weight.detach(), tokenizer, **rate)
    elif args.stage == "language":
        import llava_language

        llava_language.train(args.work, args.minutes, text, tokenizer, **rate)
    else:
        import llava_language

        llava_language.export(args.work)


if __name__ == "__main__":
    main()
