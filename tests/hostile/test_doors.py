"""Hostile inputs of every class at the doors of all command lines, in this process; the rest is the campaign's."""

import importlib.util
import io
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent


def _campaign():
    spec = importlib.util.spec_from_file_location("hostile_campaign", HERE / "campaign.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


campaign = _campaign()
cases = campaign.cases
REFUSED = [case for case in cases.table() if case.refuse]
EVERY = 5


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> Path:
    """The good inputs that cases damage copies of."""

    def run(command, arguments):
        with pytest.raises(SystemExit) as ended:
            campaign.processes.run_command(command, arguments)
        assert ended.value.code == 0

    folder = tmp_path_factory.mktemp("hostile") / "bases"
    campaign.make_bases(folder, run)
    return folder


@pytest.fixture
def in_time():
    """An alarm: what hangs fails."""

    def ring(number, frame):
        raise TimeoutError(f"still running after {campaign.processes.WAITING} s")

    before, began = signal.signal(signal.SIGALRM, ring), time.process_time()
    signal.alarm(campaign.processes.WAITING)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    assert time.process_time() - began < campaign.processes.SECONDS


def peak_memory() -> int:
    """Bytes that this process held at most since `peak_from_now_on`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(line.split()[1])


def peak_from_now_on() -> int:
    """Forget the peak that earlier cases left; returns what is held now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory()


@pytest.mark.parametrize("case", REFUSED[::EVERY], ids=lambda case: f"{case.group}-{case.command}-{case.name[:60]}")
def test_refused_in_one_sentence(case, bases, tmp_path, in_time, capsys, monkeypatch):
    model = Path(shutil.copytree(bases / case.base, tmp_path / "model"))
    case.damage(model)
    before = campaign.holdings(tmp_path)
    monkeypatch.setenv("CASP_HOSTILE_MARK", str(tmp_path / "executed"))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    monkeypatch.chdir(tmp_path)
    at_rest = peak_from_now_on()
    with pytest.raises(SystemExit) as ended:
        campaign.processes.run_command(
            case.command, campaign.filled(campaign.arguments_of(case), model, tmp_path, bases)
        )
    grown = peak_memory() - at_rest
    said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()
    assert ended.value.code == 2, said
    assert said[-1].startswith("error: ")
    assert sum(line.startswith("error: ") for line in said) == 1
    assert not any("Traceback" in line for line in said)
    assert grown < campaign.MOST_BYTES
    assert not (tmp_path / "executed").exists()
    assert not campaign.damaged(before, campaign.holdings(tmp_path))


def test_there_are_at_least_300():
    assert len(REFUSED[::EVERY]) >= 300


@pytest.mark.slow
def test_campaign(tmp_path):
    """Every case of the tables and a thousand random ones, each in a process of its own."""
    runner = campaign.Campaign(tmp_path)
    wanted = [*cases.table(), *cases.random_cases(1000, seed=1)]
    bad = [result for result in map(runner.run, wanted) if result.outcome not in ("clean", "accepted")]
    assert not bad, "\n".join(f"{r.outcome} {r.case.group} [{r.case.command}] {r.case.name}: {r.said}" for r in bad)
