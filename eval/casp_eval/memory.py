"""Peak memory of stages on random models: one ten times the size of the other, and samples of rising length.

The quantizing stage promises to hold one block and the calibration state, not the model; the stages that look at
attention promise no term of tokens^2 but masks. This measures both from outside, as the operating system accounts for
the finished process. Every figure is written as soon as it is known: an interrupted measurement goes on where it
stopped, and an output that is there already, of the same flags, keeps its figures.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from casp.cli import Parser, run_main
from casp.demo.models import build
from casp.model.attention import ROWS
from casp.model.decoder import Decoder
from casp.numbers import count
from casp.reading.config import open_config
from casp.reading.documents import read_json
from casp.reading.pretrained import open_tokenizer
from casp.run.files import write_json
from casp.run.outputs import check_file, require_writable

TEN_TIMES = {
    "hidden_size": 1536,
    "intermediate_size": 4096,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "num_hidden_layers": 50,
}
STAGE = [
    "casp_gptq",
    "--bits",
    "4",
    "--group-size",
    "128",
    "--sweeps",
    "0",
    "--no-true-sequential",
    "--clip-search",
    "0",
]
PLAN = ["--backend", "quip-sharp", "--bits", "2.1"]

LENGTHS = (500, 1500, 5000)
"""Tokens of the longer samples."""
AT_ONCE = 2
"""Longer samples in a batch."""
LOOKING_AT_ATTENTION = {
    "svd": ["casp_svd", "--whitening", "attention"],
    "moments": ["casp.moments", "--token-weights", "none", "attention", "--no-gradients"],
}
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = Parser(prog="memory.sh", description=__doc__.splitlines()[0])
    flags.add_argument("--output", type=Path, required=True, help="JSON file to write")
    flags.add_argument("--samples", type=count, default=4, help="calibration samples (default: %(default)s)")
    flags.add_argument("--sequence-length", type=count, default=256, help="tokens per sample (default: %(default)s)")
    return flags


def random_model(config: PretrainedConfig, tokenizer_from: Path, folder: Path) -> None:
    """A randomly initialised bfloat16 checkpoint of `config` in `folder`."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer = open_tokenizer(tokenizer_from)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def peak_bytes(arguments: list[str]) -> int:
    """Peak resident bytes of `python ARGUMENTS`, run to its end."""
    child = subprocess.Popen([sys.executable, *arguments], stdout=sys.stderr)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(child.returncode)  # the stage has said why
    return usage.ru_maxrss * 1024


def formula_bytes(folder: Path, samples: int, sequence_length: int) -> int:
    """What README's formula says beyond the interpreter and the libraries, for computing in float32."""
    decoder = Decoder(folder)
    counts = {name: parameter.numel() for name, parameter in decoder.model.named_parameters()}
    inside = decoder.blocks_path + "."
    rest = 4 * sum(count for name, count in counts.items() if not name.startswith(inside))
    block = 4 * sum(count for name, count in counts.items() if name.startswith(decoder.blocks[0] + "."))
    widest = max(decoder.block(0).get_submodule(path).in_features for path in decoder.linears(0).values())
    state = 4 * samples * sequence_length * decoder.hidden_size
    return max(rest, block + (8 + 4 * 8) * widest**2) + state


def measure(config: PretrainedConfig, tokenizer_from: Path, samples: int, sequence_length: int) -> dict[str, int]:
    """Sizes and peaks of one model: quantized, its moments collected, its plan made, each in a process of its own."""
    scratch = Path(tempfile.mkdtemp(prefix="casp-memory-"))
    try:
        # A process of its own: what is forked from this one later starts with this one's peak as its own.
        folder = scratch / "model"
        maker = get_context("spawn").Process(target=random_model, args=(config, tokenizer_from, folder))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(maker.exitcode)
        model = ["--model", str(folder)]
        data = ["--dataset", "demo-text", "--samples", str(samples), "--sequence-length", str(sequence_length)]
        peak = peak_bytes(["-m", *STAGE, *model, *data, "--output", str(scratch / "out")])
        moments, plan = str(scratch / "moments"), str(scratch / "plan.json")
        of_moments = peak_bytes(["-m", "casp.moments", *model, *data, "--output", moments])
        costs = str(scratch / "costs")
        of_plan = peak_bytes(
            ["-m", "casp.plan", *model, *PLAN, "--moments", moments, "--costs", costs, "--output", plan]
        )
        return {
            "checkpoint_bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors")),
            "formula_bytes": formula_bytes(folder, samples, sequence_length),
            "peak_bytes": peak,
            "moments_peak_bytes": of_moments,
            "plan_peak_bytes": of_plan,
        }
    finally:
        shutil.rmtree(scratch)


def long_formula_bytes(decoder: Decoder, samples: int, tokens: int) -> int:
    """What README's formula says beyond the libraries where samples are long: AT_ONCE padded ones a batch, float32.

    Activations count twice: the C library keeps about as much of what was freed as is in use.
    """
    counts = {name: parameter.numel() for name, parameter in decoder.model.named_parameters()}
    inside = decoder.blocks_path + "."
    rest = 4 * sum(count for name, count in counts.items() if not name.startswith(inside))
    block = 4 * sum(count for name, count in counts.items() if name.startswith(decoder.blocks[0] + "."))
    linears = [decoder.block(0).get_submodule(path) for path in decoder.linears(0).values()]
    moments = 4 * sum(linear.in_features**2 for linear in linears)
    activations = 2 * 4 * AT_ONCE * tokens * sum(linear.out_features for linear in linears)
    attention = 3 * 4 * AT_ONCE * ROWS * tokens
    state = samples * (4 * tokens * decoder.hidden_size + tokens**2)
    return max(rest + block + activations, block + moments + activations + attention) + state


def write_chats(file: Path, samples: int, tokens: int) -> None:
    """Chats of up to `tokens` tokens and down to a fifth less, no two alike, so that batches are padded: masks."""
    lengths = (tokens - number * tokens // (5 * samples) for number in range(samples))
    rows = ({"question": " the" * (length - 12), "answer": "yes"} for length in lengths)
    file.write_text("\n".join(map(json.dumps, rows)))


def measure_lengths(
    config: PretrainedConfig, tokenizer_from: Path, samples: int, known: dict[str, dict[str, int]]
) -> Iterator[tuple[str, str, dict[str, int]]]:
    """(what, tokens a sample, peak and formula bytes) for two blocks of `config`'s shape, `known` ones left out."""
    with tempfile.TemporaryDirectory(prefix="casp-memory-") as scratch:
        folder = Path(scratch) / "model"
        config.num_hidden_layers = 2
        maker = get_context("spawn").Process(target=random_model, args=(config, tokenizer_from, folder))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise SystemExit(maker.exitcode)
        for stage, words in LOOKING_AT_ATTENTION.items():
            for tokens in LENGTHS:
                if str(tokens) in known.get(stage, {}):
                    continue
                data, output = Path(scratch) / f"{tokens}.jsonl", Path(scratch) / f"{stage}-{tokens}"
                write_chats(data, samples, tokens)
                flags = ["--model", folder, "--output", output, "--dataset", data, "--samples", samples]
                peak = peak_bytes(["-m", *words, *map(str, [*flags, "--batch-size", AT_ONCE])])
                formula = long_formula_bytes(Decoder(folder), samples, tokens)
                yield stage, str(tokens), {"peak_bytes": peak, "formula_bytes": formula}


def main() -> None:
    """Measure both models, the longer samples and the libraries alone."""
    args = parser().parse_args()
    check_file(args.output, [{"libraries_bytes", "command"}])
    require_writable(args.output)
    command = f"bash eval/scripts/memory.sh --samples {args.samples} --sequence-length {args.sequence_length}"
    result: dict[str, Any] = read_json(args.output, "the file of figures") if args.output.exists() else {}
    if result.get("command") != command:
        result = {"command": command, "libraries_bytes": peak_bytes(["-c", "import casp_gptq.__main__"])}
    small = build("demo-llama")
    configs = {"demo-llama's shape": open_config(small), "ten times": open_config(small)}
    configs["ten times"].update(TEN_TIMES)
    for name, config in configs.items():
        if name not in result:
            config.head_dim = config.hidden_size // config.num_attention_heads
            result[name] = measure(config, small, args.samples, args.sequence_length)
            write_json(args.output, result)
        print(name, result[name])
    small_one, large_one = (result[name] for name in configs)
    result["checkpoint_ratio"] = large_one["checkpoint_bytes"] / small_one["checkpoint_bytes"]
    result["peak_ratio"] = large_one["peak_bytes"] / small_one["peak_bytes"]
    lengths = result.setdefault("tokens a sample", {})
    for stage, tokens, figures in measure_lengths(open_config(small), small, args.samples, lengths):
        lengths.setdefault(stage, {})[tokens] = figures
        write_json(args.output, result)
        print(f"{stage}, {tokens} tokens a sample: {figures}")


if __name__ == "__main__":
    run_main(main)
