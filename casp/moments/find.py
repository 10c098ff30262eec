"""Which moments a stage uses: those that --moments names, those in runs/<model>/moments, or none.

Those of a low-rank model lie in runs/<model>/casp-moments.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from casp.cli.places import default_output
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.moments.store import REMEDY, Moments
from casp.moments.weights import EXPLAINED, by_gradient, weighting_parts
from casp.run.digest import content_hash
from casp.run.outputs import read_record

ON_THE_WAY = "attention"
"""Token weights where second moments are collected while quantizing."""
COLLECTED = "attention+gradient"
"""Token weights where moments were collected before. Both were chosen on validation, see
eval/results/token_weights_validation.json."""

NO_MOMENTS = Path("none")
_DATA = ("dataset", "samples", "sequence_length", "seed", "frames", "visual_tokens")


def stage_name(low_rank: bool) -> str:
    """What moments of a model, with or without low-rank layers, are filed under."""
    return "casp-moments" if low_rank else "moments"


def add_moments_argument(parser: argparse.ArgumentParser) -> None:
    """--moments, of every stage that needs second moments."""
    parser.add_argument(
        "--moments",
        "--hessians",
        type=Path,
        metavar="DIR",
        help=f"moments collected before with {REMEDY}; none: take from the calibration data what is needed, each block "
        "from what those compressed before put out (default: runs/<model>/moments, of a low-rank model casp-moments, "
        "if it was collected on this model and calibration data, else none)",
    )


def add_token_weights_argument(parser: argparse.ArgumentParser, on_the_way: str) -> None:
    """--token-weights, of every stage that quantizes; on_the_way: the default without moments."""
    parser.add_argument(
        "--token-weights",
        metavar="WEIGHTS",
        help="how much a token counts in the moments of the inputs: "
        + "; ".join(f"{name} = {words}" for name, words in EXPLAINED.items())
        + "; names joined by + = the sum of these moments, each scaled to a mean diagonal of 1. Those by gradient need "
        f"moments collected before (default: {COLLECTED} with such moments, else {on_the_way})",
    )


def find_moments(
    asked: Path | None,
    model: str,
    data: Mapping[str, Any],
    decoder: Decoder,
    low_rank: bool,
    weighting: str | None = None,
) -> Moments | None:
    """The moments of `decoder` that --moments `asked` for or that are filed under `model`; None where there are none.

    data: the record of the calibration data, its contents and the seed that filed moments must be of; low_rank:
    whether the decoder has low-rank layers; weighting: token weights that must have been collected.
    UserError where --moments names what does not fit; what is filed and does not fit is passed over, saying so.
    """
    if asked == NO_MOMENTS:
        return None
    if asked is not None:
        found = Moments(asked)
        found.check(content_hash(decoder.folder), decoder, weighting)
        return found
    folder = default_output(model, stage_name(low_rank))
    if read_record(folder) is None:
        return None
    try:
        found = Moments(folder)
        found.check(content_hash(decoder.folder), decoder, weighting)
    except UserError as error:
        print(f"not using {folder}: {error}")
        return None
    settings = found.fingerprint["settings"]
    other = [name for name in _DATA if settings.get(name) != data[name]]
    if other:
        flags = ", ".join(f"--{name.replace('_', '-')} {settings.get(name)}" for name in other)
        print(f"not using {folder}, collected with {flags}; --moments {folder} takes it as it is")
        return None
    if settings.get("files") != data.get("files"):
        print(f"not using {folder}, collected before {data['dataset']} changed; --moments {folder} takes it as it is")
        return None
    print(f"using {folder}, moments collected before (--moments none does without)")
    return found


def choose_weighting(given: str | None, moments: Moments | None, on_the_way: str = ON_THE_WAY) -> str:
    """What --token-weights asks for, or the best that there is; UserError for what only collected moments have.

    on_the_way: what is best without moments.
    """
    if given is None:
        if moments is None:
            return on_the_way
        order = (COLLECTED, ON_THE_WAY, *moments.weightings)
        return next(one for one in order if set(weighting_parts(one)) <= set(moments.weightings))
    if moments is None and (len(weighting_parts(given)) > 1 or by_gradient(given)):
        raise UserError(f"--token-weights {given} needs moments collected before; run {REMEDY}, or give --moments.")
    return given
