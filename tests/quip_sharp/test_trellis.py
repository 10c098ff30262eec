"""The trellis: its tables, the search of closed walks against brute force, the stored bits."""

import json
from dataclasses import asdict

import pytest
import torch
from casp_quip_sharp.codebook import codebook_of
from casp_quip_sharp.trellis import train
from casp_quip_sharp.trellis.codebook import Trellis
from casp_quip_sharp.trellis.columns import (
    descend_columns,
    descend_columns_reference,
    round_columns,
    round_columns_reference,
)
from casp_quip_sharp.trellis.layout import STRIP, from_storage, stored_bytes, to_storage
from casp_quip_sharp.trellis.tables import table
from casp_quip_sharp.trellis.train import EFFORTS, MADE, Effort, find_masks, finish, make
from casp_quip_sharp.trellis.walks import _search, nearest_walks, walk_states
from hypothesis import given, settings
from hypothesis import strategies as st

from casp.errors import UserError
from casp.kernels import operators

needs_kernels = pytest.mark.skipif(operators() is None, reason="needs quiptools")
BOUNDS = {(8, 1): 0.278, (8, 2): 0.0748, (8, 3): 0.0199, (8, 4): 0.0056, (10, 2): 0.0719, (12, 2): 0.0712}


def cyclic_windows(symbols, bits, states):
    """States of a closed walk straight from the definition: windows of its cyclic stream of bits, in Python."""
    stream = [symbol >> i & 1 for symbol in symbols for i in range(bits)]
    return [sum(stream[(bits * t + i) % len(stream)] << i for i in range(states)) for t in range(len(symbols))]


def best_of_all(x, values, bits, states):
    """Least squared distance from x (T,) of any closed walk, over all 2^(T bits) streams."""
    length = len(x)
    codes = torch.arange(1 << (length * bits))
    symbols = torch.stack([codes >> (bits * t) & ((1 << bits) - 1) for t in range(length)])
    points = values[walk_states(symbols.to(torch.uint8), bits, states)]
    return (points - x[:, None]).double().square().sum(0).min().item()


def distance(x, symbols, values, bits, states):
    return (values[walk_states(symbols, bits, states)] - x).double().square().sum(0)


@given(
    bits=st.integers(1, 6), states=st.sampled_from([6, 8, 10, 12]), length=st.integers(1, 24), seed=st.integers(0, 9999)
)
@settings(max_examples=40, deadline=None)
def test_states_are_windows_of_the_cyclic_stream(bits, states, length, seed):
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(1 << bits, (length, 1), generator=generator, dtype=torch.uint8)
    assert walk_states(symbols, bits, states)[:, 0].tolist() == cyclic_windows(symbols[:, 0].tolist(), bits, states)


@given(rows=st.integers(1, 600), columns=st.integers(1, 9), bits=st.integers(1, 6), seed=st.integers(0, 9999))
@settings(max_examples=30, deadline=None)
def test_storage_is_exactly_the_bits(rows, columns, bits, seed):
    symbols = torch.randint(1 << bits, (rows, columns), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    stored = to_storage(symbols, bits)
    assert stored.dtype == torch.uint8
    assert len(stored) == stored_bytes(rows, columns, bits) == -(-rows * columns * bits // 8)
    assert torch.equal(from_storage(stored, rows, columns, bits), symbols)


@given(bits=st.integers(1, 3), length=st.integers(1, 12), seed=st.integers(0, 9999))
@settings(max_examples=60, deadline=None)
def test_short_walks_are_the_nearest_of_all(bits, length, seed):
    """Fewer than two states' bits, down to fewer than one state's: every beginning is tried."""
    states = 6
    length = min(length, (2 * states - 1) // bits)
    generator = torch.Generator().manual_seed(seed)
    values, x = (torch.randn(n, generator=generator) for n in (1 << states, length))
    least = best_of_all(x, values, bits, states)
    for search in (round_columns, round_columns_reference):
        symbols, points = search(x[:, None], x[:, None], torch.zeros(1, 1), values, bits)
        assert distance(x[:, None], symbols, values, bits, states).item() == pytest.approx(least, rel=1e-5, abs=1e-6)
        assert torch.equal(points, values[walk_states(symbols, bits, states)])


@pytest.mark.parametrize("bits", [1, 2])
def test_two_searches_are_within_half_a_percent_of_the_optimum(bits):
    """The optimum is the best over all that the ends could share: each of them is an exact search of its own."""
    states, length = 6, 64 // bits
    overlaps = 1 << (states - bits)
    generator = torch.Generator().manual_seed(bits)
    values, x = torch.randn(1 << states, generator=generator), torch.randn(length, 40, generator=generator)
    found = distance(x, nearest_walks(x, values, bits), values, bits, states).sum().item()
    every = torch.arange(overlaps).repeat(40)
    begin = torch.full((len(every), overlaps), 1e9).scatter_(1, every[:, None], 0.0)
    _, costs = _search(x.repeat_interleave(overlaps, 1), values, bits, begin, every)
    optimum = costs.view(40, overlaps).amin(1).double().sum().item()
    assert optimum * (1 - 1e-5) <= found <= 1.005 * optimum


@needs_kernels
@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
@pytest.mark.parametrize(("states", "bits"), [(8, 1), (8, 2), (8, 3), (8, 4), (8, 5), (8, 6), (10, 3), (12, 2)])
def test_compiled_search_does_what_the_plain_one_does(isa, states, bits):
    if isa not in operators().instruction_sets():
        pytest.skip(f"this CPU has no {isa}")
    generator = torch.Generator().manual_seed(0)
    rows, width = 300, 4 if states == 8 else 2  # a whole strip and one of 44 rows
    values = torch.randn(1 << states, generator=generator)
    target = torch.randn(rows, width, generator=generator)
    wanted = target + 0.1 * torch.randn(rows, width, generator=generator)
    factor = torch.randn(width, width, generator=generator) * 0.2
    hessian = factor @ factor.T + torch.eye(width)
    plain = round_columns_reference(wanted, target, factor, values, bits)
    compiled = operators().trellis_round(wanted, target, factor, values, bits, STRIP, isa)
    gradient = (target - plain[1]) @ hessian
    swept = descend_columns_reference(gradient, hessian, *plain, values, bits)
    swept_compiled = operators().trellis_descend(gradient, hessian, *plain, values, bits, STRIP, isa)
    assert (swept[1] != 0).any()
    for (symbols, points), (others, other_points) in ((plain, compiled), (swept, swept_compiled)):
        # Where two walks are as near as each other, either may be taken, and the columns go on from there.
        last = symbols[:, -1] == others[:, -1]
        assert last.float().mean() > 0.99
        assert (points - other_points).square().mean() < 0.01 * points.square().mean() + 1e-6
        assert points.square().mean().item() == pytest.approx(other_points.square().mean().item(), rel=5e-3)


@needs_kernels
def test_same_bytes_on_any_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    weight, factor = torch.randn(900, 96, generator=generator), torch.randn(96, 96, generator=generator) * 0.1
    values, threads = Trellis(2).values(torch.device("cpu")), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            rounded = round_columns(weight, weight, factor, values, 2)
            gradient = (weight - rounded[1]) * 1.5
            found.append((*rounded, *descend_columns(gradient, torch.eye(96) + 0.01, *rounded, values, 2)))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize(("states", "bits"), BOUNDS)
def test_distortion_of_gaussian_numbers(states, bits):
    codebook = Trellis(bits, states)
    x = torch.randn(256 if states == 8 else 64, STRIP, generator=torch.Generator().manual_seed(99)).T.contiguous()
    scale = codebook.gaussian_scale
    _, points = round_columns(
        x / scale, x / scale, torch.zeros(x.shape[1], x.shape[1]), codebook.values(x.device), bits
    )
    error = (points * scale - x).square().mean().item() / x.square().mean().item()
    assert error < BOUNDS[states, bits]
    assert error == pytest.approx(table(states, bits).nmse, rel=0.03)


@pytest.mark.parametrize(("states", "bits"), [(8, bits) for bits in range(1, 7)])
def test_tables_are_small_whole_and_antisymmetric(states, bits):
    found = table(states, bits)
    half = len(found.entries) // 2
    assert len(found.entries) == 2 ** len(found.masks) <= 256
    assert found.entries[half:] == tuple(-entry for entry in found.entries[:half])
    assert max(map(abs, found.entries)) <= 127
    assert {bin(state & mask).count("1") % 2 for mask in found.masks for state in range(256)} == {0, 1}


def unfolded(found):
    """The masks that a table was trained with, before half of its entries became the negatives of the others."""
    return (*(mask ^ found.masks[-1] for mask in found.masks[:-1]), found.masks[-1])


@needs_kernels
@pytest.mark.parametrize(
    ("states", "bits"), [pytest.param(*made, marks=[pytest.mark.slow] * (made[0] > 8)) for made in MADE]
)
def test_tables_are_what_training_makes_of_their_masks(states, bits):
    found = table(states, bits)
    assert make(states, bits, 0, EFFORTS[states], unfolded(found)) == found


@needs_kernels
@pytest.mark.slow
@pytest.mark.parametrize(("states", "bits"), MADE)
def test_the_training_script_reproduces_the_table(states, bits):
    assert make(states, bits, 0, EFFORTS[states]) == table(states, bits)


@needs_kernels
@pytest.mark.parametrize("bits", range(1, 7))
def test_avx2_and_avx512_find_the_same_walks(bits):
    known = {"avx2", "avx512"} & set(operators().instruction_sets())
    x, z = torch.randn(STRIP, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(16, 16)
    values = Trellis(bits).values(x.device)
    found = [operators().trellis_round(x, x, z, values, bits, STRIP, isa)[0] for isa in sorted(known)]
    assert all(torch.equal(found[0], other) for other in found[1:])


@needs_kernels
def test_training_lowers_the_distortion_and_repeats_itself():
    effort = Effort(compared=4, drawn=12, changed=12, kept=2, trained=24, rounds=6)
    masks = find_masks(8, 2, effort, torch.Generator().manual_seed(3))
    assert masks == find_masks(8, 2, effort, torch.Generator().manual_seed(3))
    trained, again = (finish(8, 2, masks, effort, torch.Generator().manual_seed(4)) for _ in range(2))
    assert trained == again
    assert json.dumps(asdict(trained)) == json.dumps(asdict(again))
    assert trained.nmse < 0.0914  # E8P12


@pytest.mark.parametrize("rows", [1, 3, 44, 256, 300])
@pytest.mark.parametrize("states", [8, 12])
def test_layer_of_few_rows(correlated, rows, states):
    format = {"codebook": "trellis", "bits": 2, "states": states}
    codebook = codebook_of(format)
    symbols = torch.randint(4, (rows, 5), dtype=torch.uint8)
    stored = codebook.stored([symbols])
    points = codebook.points(stored, rows, 5)
    values = codebook.values(points.device)
    for first in range(0, rows, STRIP):
        for column in range(5):
            walk = symbols[first : first + STRIP, column].tolist()
            expected = values[torch.tensor(cyclic_windows(walk, 2, states))]
            assert torch.equal(points[first : first + STRIP, column], expected)


@pytest.fixture
def no_search(monkeypatch):
    """Tables at once: those that the package holds."""
    monkeypatch.setattr(train, "make", lambda states, bits, seed, effort: table(states, bits))


@needs_kernels
def test_tables_replace_nothing_but_tables(no_search, tmp_path):
    """Said before the search, which takes hours: what lies there is a user's, or cannot be replaced."""
    mine = tmp_path / "mine.json"
    mine.write_text('[{"mine": 1}]')
    (tmp_path / "circle").symlink_to("circle")
    for place in (mine, tmp_path, mine / "tables.json", tmp_path / "circle", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match=r"choose another --output|give a file|correct the path"):
            train.main(["--output", str(place)])
    assert mine.read_text() == '[{"mine": 1}]'
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "mine.json"]


@needs_kernels
def test_tables_are_made_anew(no_search, tmp_path):
    file = tmp_path / "new" / "tables.json"
    for _ in range(2):  # its own tables may be written again
        train.main(["--output", str(file)])
        assert [(one["states"], one["bits"]) for one in json.loads(file.read_text())] == MADE
        file.write_text(file.read_text().replace('"states"', ' "states"'))


@needs_kernels
@pytest.mark.parametrize("flags", [["--only", "²,1"], ["--only", "8"], ["--only", "9,9"], ["--seed", str(2**70)]])
def test_what_names_no_table_or_seed(flags):
    with pytest.raises(UserError):
        train.main(flags)
