"""What a Llama of any shape gives each stage to compute and hold: terms that `scale.sh` fits seconds and bytes to.

Amounts are counted, not measured: weights, flops and entries of moments follow from the shape alone. README (Memory)
says in words what `held` counts.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

from casp.moments.second_moment import WIDEST_DOUBLE
from casp.strips import LARGEST

FLOAT = 4  # bytes of a number in the dtype that a CPU computes in
COPIES = 12  # float32 ones of a strip of rows, while it is rounded
WEIGHTINGS = 2  # weightings of the inputs that are collected forward by default, "none" and "attention"


@dataclass(frozen=True)
class Shape:
    """A Llama: widths, heads, blocks, and how many numbers stand outside the blocks."""

    hidden: int
    intermediate: int
    heads: int
    key_heads: int
    blocks: int
    rest: int

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of q, k, v, o, gate, up and down."""
        keys = self.hidden * self.key_heads // self.heads
        square, narrow = (self.hidden, self.hidden), (keys, self.hidden)
        wide = (self.intermediate, self.hidden)
        return [square, narrow, narrow, square, wide, wide, wide[::-1]]

    @property
    def inputs(self) -> list[int]:
        """Widths of what the linears take in: of q, k and v together, of o, of gate and up together, of down."""
        return [self.hidden] * 3 + [self.intermediate]

    @property
    def block(self) -> int:
        """Weights of one block's linears."""
        return sum(rows * columns for rows, columns in self.linears)


@dataclass(frozen=True)
class Data:
    """Calibration: samples of so many tokens, so many at once."""

    samples: int = 128
    length: int = 512
    batch: int = 8

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.samples * self.length

    @property
    def batches(self) -> int:
        """How often the model is run."""
        return -(-self.samples // self.batch)


@dataclass(frozen=True)
class Job:
    """One stage on one model: `stage` of `TERMS`, by so many ranks."""

    stage: str
    shape: Shape
    data: Data
    ranks: int = 1

    def record(self) -> dict[str, object]:
        """All of it, JSON-able."""
        return asdict(self)


def job_of(record: Mapping) -> Job:
    """The job that `Job.record` wrote."""
    return Job(record["stage"], Shape(**record["shape"]), Data(**record["data"]), record["ranks"])


def forward_widths(shape: Shape) -> list[int]:
    """Widths of the moments that the forward pass of the moments' stage collects in a block, by default."""
    return shape.inputs * WEIGHTINGS


def backward_widths(shape: Shape) -> list[int]:
    """The same of the backward pass: of each linear's input, by its gradient, and of the gradients of W_q and W_k."""
    return [columns for _, columns in shape.linears] + [rows for rows, _ in shape.linears[:2]]


def entries(widths: list[int]) -> float:
    """Numbers in the upper halves of moments of these widths."""
    return sum(width**2 for width in widths) / 2


def _collected(shape: Shape) -> float:
    return entries(forward_widths(shape) + backward_widths(shape))


def _passed(job: Job, passes: int) -> float:
    """Flops of running the blocks: two for a weight and a token in each pass."""
    return 2.0 * passes * job.data.tokens * job.shape.block * job.shape.blocks


def _cubes(shape: Shape) -> float:
    """What feedback multiplies, out x in^2 of every matrix, and a factor of each input's moment."""
    return sum(rows * columns**2 for rows, columns in shape.linears) + sum(width**3 for width in shape.inputs)


def _decomposed(shape: Shape) -> float:
    """Cubes of the whitened decompositions of W_q and W_k: both moments' factors, and the smaller side's vectors."""
    return sum(rows**3 + columns**3 + 10 * min(rows, columns) ** 3 for rows, columns in shape.linears[:2])


Amount = Callable[[Job], float]
_START: dict[str, Amount] = {"start": lambda job: job.ranks}
_MAPS: dict[str, Amount] = {
    "attention": lambda job: float(job.shape.blocks * job.shape.heads * job.data.tokens * job.data.length)
}
_ROUNDED: dict[str, Amount] = {
    **_START,
    "weights": lambda job: job.shape.blocks * job.shape.block,
    "cubes": lambda job: job.shape.blocks * _cubes(job.shape),
}
TERMS: dict[str, dict[str, Amount]] = {
    "moments": {
        **_START,
        "read": lambda job: job.ranks * (job.shape.blocks * job.shape.block + job.shape.rest),
        # Forward, once more on the way back, and twice as much for gradients; a moment takes a token's square of width.
        "products": lambda job: _passed(job, 4) + job.data.tokens * job.shape.blocks * 2 * _collected(job.shape),
        **_MAPS,
        "added": lambda job: job.data.batches * job.shape.blocks * _collected(job.shape),
        "sent": lambda job: job.data.batches * job.shape.blocks * _collected(job.shape) * (1 - 1 / job.ranks),
        "moments": lambda job: job.shape.blocks * _collected(job.shape),
    },
    "svd": {
        **_START,
        "read": lambda job: job.ranks * (job.shape.blocks * job.shape.block + job.shape.rest),
        "products": lambda job: _passed(job, 4),
        **_MAPS,
        "decomposed": lambda job: job.shape.blocks * _decomposed(job.shape),
    },
    "gptq": _ROUNDED,
    "quip-sharp": _ROUNDED,
    "plan": {**_ROUNDED, "decomposed": lambda job: job.shape.blocks * _decomposed(job.shape)},
}
"""Of each stage, the amounts that its processor seconds are sums of."""
CORE_FLOPS = 135e9
"""float32 products of one core of the machine that measured (AVX-512, `torch.mm` of 2048 x 2048, one thread)."""
LEAST = {"products": 1 / CORE_FLOPS, "cubes": 1 / CORE_FLOPS, "decomposed": 1 / CORE_FLOPS}
"""Seconds that a unit takes at the least: no product is faster than the core. Small runs alone would not tell it."""


def _kept(widths: list[int]) -> float:
    """Bytes of second moments of these widths while they are added up: half of each, float64 up to WIDEST_DOUBLE."""
    return sum(width**2 * (4 if width <= WIDEST_DOUBLE else 2) for width in widths)


def held(job: Job) -> float:
    """Bytes that README's formula says a rank of the stage holds beyond the libraries, computing in float32."""
    shape, data = job.shape, job.data
    block, rest = FLOAT * shape.block, FLOAT * shape.rest
    state = FLOAT * data.tokens * shape.hidden / job.ranks
    batch = FLOAT * data.batch * data.length * sum(rows for rows, _ in shape.linears)
    if job.stage == "moments":
        moments = max(_kept(forward_widths(shape)), _kept(backward_widths(shape)))
        return max(rest + block, block + moments + batch) + state
    if job.stage == "svd":
        return max(rest + block, block + 8 * FLOAT * shape.hidden**2 + batch) + state
    widest = max(shape.inputs)
    if job.stage == "plan":
        return block + 5 * FLOAT * widest**2  # the moment, and four times as much to work in
    # The moment and two more of its size, one of them float64 up to WIDEST_DOUBLE; copies of the rows being rounded.
    strip = min(LARGEST, max(rows * columns for rows, columns in shape.linears))
    return block + FLOAT * widest**2 * (3 if widest > WIDEST_DOUBLE else 4) + COPIES * FLOAT * strip
