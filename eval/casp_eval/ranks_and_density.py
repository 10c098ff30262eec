"""Whether the ranks that a plan chose follow attention density: `python -m casp_eval.ranks_and_density ...`.

Over the blocks, Spearman's rank correlation of the density of their attention, on image and on text keys, and of block
influence, the paper's measure, with the rank of W_q and of W_k; full rank counts as the smaller side of the matrix.
"""

from pathlib import Path
from typing import Any

from casp.backend import backend_names, load_backend
from casp.cli import Parser, model_folder, run_main
from casp.model.decoder import Decoder
from casp.moments.store import Moments
from casp.plan.file import read_plan, shapes
from casp.run.digest import content_hash
from casp_eval.correlation import spearman
from casp_eval.options import add_model_argument, add_output_argument, check_output, write_figure


def correlations(measures: dict[str, list[float | None]], ranks: dict[str, list[int]]) -> dict[str, dict[str, Any]]:
    """Measure -> role -> {"spearman", "p"}, both lists one value a block; a measure that has a None is left out."""
    return {
        name: {role: spearman(values, chosen) for role, chosen in ranks.items()}
        for name, values in measures.items()
        if None not in values
    }


def main(arguments: list[str] | None = None) -> None:
    parser = Parser(prog="python -m casp_eval.ranks_and_density", description=__doc__.splitlines()[0])
    add_model_argument(parser)
    parser.add_argument("--plan", type=Path, required=True, metavar="FILE", help="a plan for the model")
    parser.add_argument("--backend", required=True, help=f"the quantizer that it is for: {', '.join(backend_names())}")
    parser.add_argument("--moments", type=Path, required=True, metavar="DIR", help="the moments that it was made from")
    add_output_argument(parser)
    options = parser.parse_args(arguments)
    check_output(options.output, options.model, options.plan, options.moments)
    decoder, moments = Decoder(model_folder(options.model)), Moments(options.moments)
    moments.check(content_hash(decoder.folder), decoder, "none")
    plan = read_plan(options.plan, decoder, content_hash(decoder.folder), load_backend(options.backend))
    sizes = shapes(decoder)
    ranks: dict[str, list[int]] = {"q": [], "k": []}
    blocks = [moments.read(index) for index in range(len(decoder.blocks))]
    for index, prefix in enumerate(decoder.blocks):
        paths = decoder.linears(index)
        for role, chosen in ranks.items():
            path = f"{prefix}.{paths[role]}"
            chosen.append(plan.linears[path].rank or min(sizes[path]))
    measures = {f"density of {kind} keys": [block.density[kind] for block in blocks] for kind in ("image", "text")}
    measures["block influence"] = [block.influence for block in blocks]
    write_figure({"model": options.model, "results": correlations(measures, ranks), "ranks": ranks}, options.output)


if __name__ == "__main__":
    run_main(main)
