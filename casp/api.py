"""Compressing from Python: the whole job, or its stages. What the scripts do, in this process.

Every function takes further settings by the names of its script's flags (`token_weights="none"`), returns the path
that it has written, resumes as the script does, and raises `casp.errors.UserError` where the script ends with status 2.
"""

import importlib
from pathlib import Path
from typing import Any

from casp.cli.options import Calibration
from casp.run.progress import Listener, told_to

USUAL = Calibration()


def _run(module: str, settings: dict[str, Any], progress: Listener | None) -> None:
    from casp.run.recipe import flags

    stage = importlib.import_module(module)
    with told_to(progress):
        stage.main(flags(settings, stage.parser()))


def compress(
    model: str | Path,
    *,
    output: str | Path,
    bits: float | None = None,
    size: str | None = None,
    backend: str = "quip-sharp",
    calibration: Calibration = USUAL,
    ft_epochs: int = 0,
    progress: Listener | None = None,
    **settings: Any,
) -> Path:
    """Compress `model` (hub id, folder or built-in name) into the folder `output`: moments, plan, quantizing.

    bits: an original weight, all overheads counted, or size: as "1.5GB" (default: 2.1 bits); backend: name of an
    installed quantizer; ft_epochs: of fine-tuning; progress: called with a `casp.run.progress.Progress` whenever a
    stage has finished a block. Further settings: the flags of `compress.sh`, as `allocation="uniform"`,
    `low_rank=False`.
    """
    from casp import job
    from casp.run.recipe import flags

    wanted = {
        "model": model,
        "output": output,
        "bits": bits,
        "size": size,
        "backend": backend,
        "ft_epochs": ft_epochs,
        **calibration.record(),
        **settings,
    }
    with told_to(progress):
        return job.run(job.parser().parse_args(flags(wanted, job.parser())))


def collect_moments(
    model: str | Path,
    *,
    output: str | Path,
    calibration: Calibration = USUAL,
    progress: Listener | None = None,
    **settings: Any,
) -> Path:
    """Second moments of inputs and energies of gradients of every linear of `model`, into the folder `output`."""
    wanted = {"model": model, "output": output, **calibration.record(), **settings}
    _run("casp.moments.__main__", wanted, progress)
    return Path(output)


def make_plan(
    model: str | Path,
    *,
    output: str | Path,
    moments: str | Path,
    bits: float | None = None,
    size: str | None = None,
    backend: str = "quip-sharp",
    progress: Listener | None = None,
    **settings: Any,
) -> Path:
    """Rank and format of every linear of `model` for a budget of bytes, into the file `output`."""
    wanted = {"model": model, "output": output, "moments": moments, "bits": bits, "size": size, "backend": backend}
    _run("casp.plan.__main__", {**wanted, **settings}, progress)
    return Path(output)


def quantize(
    model: str | Path,
    *,
    output: str | Path,
    backend: str = "quip-sharp",
    plan: str | Path | None = None,
    moments: str | Path | None = None,
    calibration: Calibration = USUAL,
    progress: Listener | None = None,
    **settings: Any,
) -> Path:
    """`model` quantized by `backend`, as a plan says or in the format that its own settings give, as `bits=2`."""
    from casp.backend import load_backend
    from casp.job import package_of

    load_backend(backend)  # a misspelt one is told in one sentence
    wanted = {"model": model, "output": output, "plan": plan, "moments": moments, **calibration.record(), **settings}
    _run(f"{package_of(backend)}.__main__", wanted, progress)
    return Path(output)
