"""The readers at the door against readers of others: what they take, those take; everything else is a UserError."""

import argparse
import json
import math
import os
import signal
import struct
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from casp.errors import UserError, told_as
from casp.model.attention import AttentionCall
from casp.model.inputs import require_finite
from casp.moments import SecondMoment, damped_cholesky
from casp.numbers import real, whole
from casp.reading.documents import MOST_DEPTH, parse_json
from casp.reading.files import read_bytes
from casp.reading.header import read_header

quick = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@quick
@given(values)
def test_json_is_what_json_says(value):
    text = json.dumps(value)
    if isinstance(value, dict):
        assert json.dumps(parse_json(text, "it", "correct it")) == text
    else:
        with pytest.raises(UserError, match="does not hold a JSON object"):
            parse_json(text, "it", "correct it")


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_json_or_refused(data):
    try:
        found = parse_json(data, "it", "correct it")
    except UserError:
        return
    assert isinstance(found, dict)


@pytest.mark.parametrize("depth", [MOST_DEPTH, MOST_DEPTH + 1, 100_000])
def test_depth_is_bounded(depth):
    text = '{"a":' + "[" * (depth - 1) + "]" * (depth - 1) + "}"
    if depth <= MOST_DEPTH:
        assert parse_json(text, "it", "correct it")
    else:
        with pytest.raises(UserError, match="nested"):
            parse_json(text, "it", "correct it")


def test_json_that_would_fill_the_memory_is_refused_unparsed():
    began = time.process_time()
    with pytest.raises(UserError, match="more than 5000000 values"):
        parse_json(b"[" + b"[]," * 12_000_000 + b"[]]", "it", "correct it")
    assert time.process_time() - began < 5


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> Path:
    """Three tensors of different types and shapes."""
    file = tmp_path_factory.mktemp("shard") / "good.safetensors"
    save_file({"a": torch.ones(3, 4), "b": torch.ones(5, dtype=torch.int16), "c": torch.ones(2, 2).half()}, file)
    return file


changed_members = st.sampled_from(["dtype", "shape", "data_offsets"])
plausible = st.one_of(
    values,
    st.lists(st.integers(0, 60), max_size=3),
    st.sampled_from(["F32", "F16", "BF16", "I16", "U8", "I64", "F8_E4M3", "BOOL"]),
)
changes_of_header = st.tuples(st.sampled_from("abc"), changed_members, plausible)


@quick
@given(
    st.lists(st.tuples(st.sampled_from("abc"), changed_members, plausible), min_size=1, max_size=3),
    st.binary(max_size=4),
)
def test_a_header_that_is_taken_safetensors_takes_too(shard, tmp_path, changes, tail):
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, key, value in changes:
        header[name][key] = value
    text = json.dumps(header).encode()
    file = tmp_path / "changed.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + tail)
    try:
        found = read_header(file)
    except UserError:
        return
    with safe_open(file, "pt") as stored:
        assert {name: list(entry.shape) for name, entry in found.items()} == {
            name: stored.get_slice(name).get_shape()
            for name in stored.keys()  # noqa: SIM118 - not a dict
        }
        assert all(entry.bytes == stored.get_tensor(name).nbytes for name, entry in found.items())


@quick
@given(st.integers(0, 300), st.integers(0, 255))
def test_any_byte_of_a_shard_may_change(shard, tmp_path, place, value):
    data = bytearray(shard.read_bytes())
    data[place % len(data)] = value
    file = tmp_path / "changed.safetensors"
    file.write_bytes(data)
    try:
        found = read_header(file)
    except UserError:
        return
    with safe_open(file, "pt") as stored:
        assert found.keys() == set(stored.keys())


def test_only_regular_files_of_the_expected_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "large").write_bytes(bytes(101))
    for path, message in [
        ("/dev/zero", "a pipe, a device or a socket"),
        (tmp_path / "fifo", "a pipe, a device or a socket"),
        (tmp_path, "is a folder"),
        (tmp_path / "loop", "cannot be reached"),
        (tmp_path / ("x" * 300), "cannot be reached"),
        (tmp_path / "large/x", "cannot be reached"),
        ("a\0b", "no name of a file"),
        (tmp_path / "none", "no such file"),
        (tmp_path / "large", "at most 100"),
    ]:
        with pytest.raises(UserError, match=message):
            read_bytes(Path(path), "it", 100)


@quick
@given(st.integers(-10, 10), st.integers(0, 20), st.one_of(st.integers().map(str), st.text(max_size=6)))
def test_whole_numbers_within_their_range(least, span, text):
    try:
        expected = least <= int(text) <= least + span
    except ValueError:
        expected = False
    try:
        assert whole(least, least + span)(text) == int(text)
        assert expected
    except (ValueError, argparse.ArgumentTypeError):
        assert not expected


@quick
@given(st.floats().map(str) | st.sampled_from(["nan", "inf", "-inf", "1e308", "1e999", "0"]))
def test_numbers_within_their_range(text):
    value = float(text)
    try:
        assert real(0, 64)(text) == value
        assert math.isfinite(value)
        assert 0 < value <= 64
    except argparse.ArgumentTypeError:
        assert not 0 < value <= 64


def test_what_a_library_raises_is_told_and_what_a_user_does_is_not():
    class Panic(BaseException):
        pass

    for error in (ValueError("a\nb"), RecursionError(), Panic("from Rust")):
        with pytest.raises(UserError, match="the file") as told, told_as("the file does not open", "give another"):
            raise error
        assert "\n" not in str(told.value)
    for error in (KeyboardInterrupt(), SystemExit(3), UserError("already told")):
        with pytest.raises(type(error)) as kept, told_as("the file does not open", "give another"):
            raise error
        assert kept.value is error


def test_nan_is_no_padding():
    x, weights = torch.randn(6, 4), torch.tensor([1.0, 0.0, 2.0, float("nan"), 1.0, 1.0])
    moment = SecondMoment(4)
    moment.add(x, weights)
    with pytest.raises(UserError, match=r"block 1, q: .*NaN"):
        moment.checked("block 1, q")
    clean = SecondMoment(4)
    clean.add(x.index_fill(0, torch.tensor([1]), float("nan")), weights.nan_to_num(nan=0.0))
    kept = x[[0, 2, 4, 5]].double()
    share = torch.tensor([1.0, 2.0, 1.0, 1.0]).double()
    torch.testing.assert_close(clean.checked("it"), (kept.T * share) @ kept / 5, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="no calibration token"):
        SecondMoment(4).checked("it")


def test_padding_attends_to_nothing_and_overflow_shows():
    query, key = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[True, False, False], [False, False, False], [True, True, True]])[None, None]
    found = AttentionCall(query, key, mask, 0.5).probabilities(0)[0]
    assert torch.equal(found[1], torch.zeros(3))
    torch.testing.assert_close(found[2], torch.softmax(0.5 * query[0, 0, 2] @ key[0, 0].T, -1))
    query[0, 0, 2] = float("inf")
    found = AttentionCall(query, key, mask, 0.5).probabilities(0)[0]
    assert not torch.isfinite(found[2]).all()
    assert torch.isfinite(found[:2]).all()


def test_hidden_states_are_checked_where_tokens_stand():
    hidden, tokens = torch.zeros(1, 3, 4), torch.tensor([[True, True, False]])
    hidden[0, 2] = float("nan")
    require_finite(hidden, tokens, "block 0")
    hidden[0, 1, 0] = float("inf")
    with pytest.raises(UserError, match="block 0 puts out NaN or infinity"):
        require_finite(hidden, tokens, "block 0")


def test_a_moment_of_one_token_keeps_a_factor_after_rotation():
    """The rounding of a rank-1 moment leaves entries of its diagonal below 0, which is no damage."""
    moment = torch.full((64, 64), -1e-9, dtype=torch.float64)
    moment[0, 0] = 1.0
    lower, damping = damped_cholesky(moment, 0.01, "it")
    assert torch.isfinite(lower).all()
    assert damping < math.inf
    with pytest.raises(UserError, match="negative diagonal"):
        damped_cholesky(torch.diag(torch.tensor([1.0, -0.5])), 0.01, "it")


def test_what_has_no_factor_is_rounded_without_feedback_and_says_so(caplog):
    matrix = torch.full((40, 40), -1e12, dtype=torch.float64)
    matrix.diagonal().fill_(1.0)
    lower, damping = damped_cholesky(matrix, 0.01, "layers.0.q_proj")
    assert damping == math.inf
    assert torch.equal(lower, torch.diag(torch.full((40,), 1.01**0.5, dtype=torch.float64)))
    assert "layers.0.q_proj: no Cholesky factor" in caplog.text
    assert "without feedback" in caplog.text


def test_search_is_safe_for_anything():
    from casp_quip_sharp.search_compiled import nearest_e8p_compiled

    vectors = torch.randn(64, 8)
    expected = nearest_e8p_compiled(vectors)
    spoilt = vectors.clone()
    spoilt[::4, 3], spoilt[1::4, 5], spoilt[2::4, 0] = float("nan"), float("inf"), 3e38
    found = nearest_e8p_compiled(spoilt)
    assert torch.equal(found[3::4], expected[3::4])


@pytest.mark.parametrize(
    ("module", "loaded"),
    [
        ("casp_gptq", " torch."),
        ("casp_eval.chat", " numpy._core"),  # NumPy takes a KeyboardInterrupt for a module that is broken
        ("casp_aqlm", " numpy.exceptions"),
        ("casp.job", " transformers."),
    ],
)
def test_ctrl_c_while_libraries_load(module, loaded):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    # A shell's background jobs ignore the signal, and children inherit that.
    listen = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    seen = []
    for line in child.stderr:
        seen.append(line)
        if loaded in line:  # the first of many modules
            child.send_signal(signal.SIGINT)
            break
    rest = child.stderr.read().splitlines()
    assert child.wait(60) == 130
    assert not any("Traceback" in line for line in rest)
    assert [line for line in rest if not line.startswith("import time:")] == ["interrupted."]
