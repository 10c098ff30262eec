"""docs/families.md from what the tests found: python tests/families/table.py FOUND.jsonl > docs/families.md

FOUND.jsonl is written by `CASP_FAMILIES=FOUND.jsonl bash tests/run.sh --slow tests/families`.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from zoo import FAMILIES

STAGES = ("svd", "moments", "gptq", "quip-sharp")
HEAD = """# Families of models

Each row is a tiny random checkpoint of a family, driven through every stage by
[tests/families/test_families.py](../tests/families/test_families.py): low-rank W_q and W_k; moments with gradients;
GPTQ from these moments; QuIP# with one epoch of both fine-tunings on the outcome of the SVD stage. After each stage
that writes a checkpoint, `from_pretrained` gives the logits of the compressed decoder and generates the same tokens
with and without a cache, on the inputs named. "share": how much of the weights in the decoder's blocks is in linears,
which are compressed; below 90% a stage refuses unless `--allow-partial` is given.

A second test opens every family but those refused and compares its logits with those of transformers' own model.
Stages "not run" were not part of the run that wrote this page.

Made by `CASP_FAMILIES=FOUND.jsonl bash tests/run.sh --slow tests/families` and `python tests/families/table.py
FOUND.jsonl`.
"""
FOOT = """
Before a run computes anything it compares, on its first batch, the first block of every kind with what the model
itself does there; a difference is an error that names the block. So a family that is not in this table either works or
says so.

- *Experts* (3-D tensors in transformers, however the checkpoint stores them) become linears of their own, and so do
  the rows of fused `qkv_proj` and `query_key_value`; a fused `gate_up_proj` is compressed as one matrix. An expert
  that fewer calibration tokens reach than it has columns is topped up by what all experts of its layer saw; a warning
  says how many.
- *Blocks without attention* (linear attention, Mamba) keep full rank in the SVD stage and are quantized like others.
- *Models with an attention of their own* (Falcon, BLOOM), and hybrid ones that transformers does not offer other
  attentions for (Qwen3.5), cannot be watched: their tokens count alike, and no density is measured.
- *Cross-attention* (Mllama) needs a picture in every calibration sample: of the default data it takes the chats
  alone, text of your own is refused.
- InternVL and SmolVLM give frames of a video to the language model as pictures; they count as such.
"""


def cell(found: dict[str, str], stage: str) -> str:
    """What stands in the table for one stage."""
    return "no" if "refused" in found else found.get(stage, "not run")


def main(file: Path) -> None:
    """Print the page."""
    rows = {}
    for line in file.read_text().splitlines():
        found = json.loads(line)
        rows[found["family"]] = found
    print(HEAD)
    print("| family | inputs | share | " + " | ".join(STAGES) + " |")
    print("|---|---|---:|" + "---|" * len(STAGES))
    for name in sorted(FAMILIES):
        found = rows.get(name, {"family": name, "inputs": FAMILIES[name].inputs})
        share = f"{found['share']:.1%}" if "share" in found else ""
        print(f"| {name} | {found['inputs']} | {share} | " + " | ".join(cell(found, stage) for stage in STAGES) + " |")
    for name, found in sorted(rows.items()):
        if "refused" in found:
            print(f"\n`{name}` is refused: {found['refused']}")
    print(FOOT, end="")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
