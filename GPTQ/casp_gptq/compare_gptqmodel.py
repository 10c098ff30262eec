"""Our GPTQ against gptqmodel's, on the same weights and Hessians, and a whole run of each on the same text.

Needs the extra `gptqmodel`. Both work on the CPU with the same number of threads.
"""

import argparse
import importlib.util
import json
import math
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from casp.backend import load_backend
from casp.budget import uniform_plan
from casp.cli import Parser, add_common_arguments, calibration_of, model_folder, run_main
from casp.data import fingerprint
from casp.errors import UserError
from casp.model.capture import capture_inputs
from casp.model.decoder import Decoder
from casp.moments.forward import block_moments
from casp.numbers import count
from casp.quantize import quantize_blocks
from casp.rounding import Method, weighted_error
from casp.run.files import write_json
from casp.run.outputs import check_file, make_output
from casp.run.writer import RunFolder
from casp.walk import walk
from casp_gptq.gptq import gptq_quantize

CPU = torch.device("cpu")
# Settings that both have: groups found on the original weights, columns by falling size of their inputs.
THEIRS = {
    "gptqmodel": {"desc_act": True, "static_groups": True, "act_group_aware": False},
    "gptqmodel, clip search": {"desc_act": True, "static_groups": True, "act_group_aware": False, "mse": 2.0},
    "gptqmodel, its default order": {"desc_act": False, "act_group_aware": True},
}
OURS = {"ours": {}, "ours, without refinement": {"sweeps": 0}}


def cut_model(folder: Path, blocks: int, output: Path) -> Path:
    """Save the first `blocks` blocks of the causal language model in `folder` as a model of its own."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:blocks]
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(folder).save_pretrained(output)
    return output


def problems(folder: Path, batches: list[dict[str, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Path -> weight and Hessian of every linear, the model unquantized."""
    decoder = Decoder(folder)
    found = {}
    for visit in walk(decoder, capture_inputs(decoder, batches, CPU, torch.float32), CPU, torch.float32):
        groups = visit.input_groups(list(visit.linears.values()))
        for group, hessian in zip(groups, block_moments(visit, groups), strict=True):
            for path in group:
                weight = visit.block.get_submodule(path).weight.detach().clone()
                found[f"{decoder.blocks[visit.index]}.{path}"] = weight, hessian
    return found


def their_config(name: str, bits: int, group_size: int, damping: float) -> Any:
    """The gptqmodel settings of contender `name` of `THEIRS`."""
    from gptqmodel.quantization import QuantizeConfig

    return QuantizeConfig(
        bits=bits, group_size=group_size, sym=False, damp_percent=damping, offload_to_disk=False, **THEIRS[name]
    )


def their_matrix(weight: Tensor, hessian: Tensor, config: Any) -> tuple[Tensor, float]:
    """The weight as gptqmodel quantizes it, and the seconds its quantizer took.

    It takes inputs, not a Hessian: rows of the Cholesky factor are inputs with just this second moment.
    """
    from gptqmodel.quantization import GPTQ

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    quantizer = GPTQ(linear, config)
    quantizer.quantizer.configure(perchannel=True)
    ridge = 1e-9 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
    quantizer.add_batch(torch.linalg.cholesky(hessian + ridge).T[None].float(), None)
    began = time.perf_counter()
    result = quantizer.quantize()[0]
    return result.float(), time.perf_counter() - began


def compare_matrices(
    folder: Path, batches: list[dict[str, Tensor]], bits: int, group_size: int, damping: float
) -> dict[str, Any]:
    """Relative error tr(D H D^T) / tr(W H W^T) and seconds of every contender on every matrix, and summaries."""
    rows = []
    for path, (weight, hessian) in problems(folder, batches).items():
        row: dict[str, Any] = {"matrix": path, "shape": list(weight.shape), "error": {}, "seconds": {}}
        for name, settings in OURS.items():
            began = time.perf_counter()
            result = gptq_quantize(weight, hessian, bits, group_size, damping=damping, **settings).dequantize()
            row["seconds"][name] = time.perf_counter() - began
            row["error"][name] = weighted_error(weight, result, hessian)
        for name in THEIRS:
            config = their_config(name, bits, group_size, damping)
            result, row["seconds"][name] = their_matrix(weight, hessian, config)
            row["error"][name] = weighted_error(weight, result, hessian)
        rows.append(row)
        print(path, {name: f"{error:.5f}" for name, error in row["error"].items()}, flush=True)
    summary = {
        name: {
            "geometric_mean_error": math.exp(sum(math.log(row["error"][name]) for row in rows) / len(rows)),
            "seconds": sum(row["seconds"][name] for row in rows),
            "matrices_where_ours_is_no_worse": sum(row["error"]["ours"] <= row["error"][name] for row in rows),
        }
        for name in rows[0]["error"]
    }
    return {"matrices": rows, "summary": summary}


def time_runs(folder: Path, batches: list[dict[str, Tensor]], bits: int, group_size: int, damping: float) -> dict:
    """Seconds from a model on disk to a quantized checkpoint on disk, for both, in the same process."""
    from gptqmodel import GPTQModel

    with tempfile.TemporaryDirectory() as scratch:
        began = time.perf_counter()
        backend, decoder = load_backend("gptq"), Decoder(folder)
        format = {"bits": bits, "group_size": group_size}
        run = RunFolder(
            Path(scratch) / "ours", decoder, "gptq", "compared", {"backend": "gptq", **format}, fingerprint(batches)
        )
        plan = uniform_plan(decoder, format)
        quantize_blocks(decoder, run, batches, Method(backend, plan, {"damping": damping}), CPU, torch.float32)
        run.finish()
        ours = time.perf_counter() - began

        samples = [ids for batch in batches for ids in batch["input_ids"].tolist()]
        for attempt in ("warm", "timed"):  # on its first run gptqmodel compiles its packing code, for minutes
            began = time.perf_counter()
            model = GPTQModel.load(str(folder), their_config("gptqmodel", bits, group_size, damping))
            model.quantize(samples, batch_size=len(batches[0]["input_ids"]))
            model.save(str(Path(scratch) / attempt))
            theirs = time.perf_counter() - began
    return {"ours": ours, "gptqmodel": theirs}


def main(argv: list[str] | None = None) -> None:
    """Measure and write JSON."""
    flags = Parser(prog="python -m casp_gptq.compare_gptqmodel", description=__doc__)
    add_common_arguments(flags, default_model="demo-llama")
    flags.set_defaults(samples=16, sequence_length=512, output=Path("eval/results/gptqmodel.json"))
    flags.add_argument("--blocks", type=count, default=2, help="first blocks used, a count (default: %(default)s)")
    flags.add_argument("--bits", type=int, default=2, help="bits a code: 2, 3, 4 or 8 (default: %(default)s)")
    flags.add_argument("--group-size", type=int, default=64, help="columns that share a scale (default: %(default)s)")
    flags.add_argument("--damping", type=float, default=0.01, help="share of the mean diagonal (default: %(default)s)")
    flags.add_argument(
        "--whole-run",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also time both tools from model to checkpoint; gptqmodel compiles its packing code first, which takes "
        "minutes (default: on)",
    )
    args = flags.parse_args(argv)
    source = model_folder(args.model)
    check_file(args.output, [{"matrix_by_matrix", "settings", "versions"}], [source])
    if importlib.util.find_spec("gptqmodel") is None:
        raise UserError("gptqmodel is not installed; install the extra: pip install -r requirements-gptqmodel.txt.")
    make_output(args.output.parent)
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    with tempfile.TemporaryDirectory() as scratch:
        folder = cut_model(source, args.blocks, Path(scratch) / "model")
        batches = calibration_of(args).batches(folder, args.seed)
        common = (folder, batches, args.bits, args.group_size, args.damping)
        result = {"matrix_by_matrix": compare_matrices(*common)}
        if args.whole_run:
            result["whole_run_seconds"] = time_runs(*common)
    import gptqmodel

    keys = ("model", "blocks", "bits", "group_size", "damping", "samples", "sequence_length", "dataset", "seed")
    result["settings"] = {key: getattr(args, key) for key in keys}
    result["machine"] = {"processor": platform.machine(), "threads": torch.get_num_threads()}
    result["versions"] = {"torch": torch.__version__, "gptqmodel": gptqmodel.__version__}
    write_json(args.output, result)
    print(json.dumps({**result, "matrix_by_matrix": result["matrix_by_matrix"]["summary"]}, indent=2))
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run_main(main)
