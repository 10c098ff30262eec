"""scale.sh: amounts against real modules, fits against known prices, predictions against what they are made of."""

import json
from dataclasses import replace

import pytest
import torch
from casp_eval.efficiency import speedups
from casp_eval.scale import MODELS, SMALL, Points, missing, shape_named
from casp_eval.scale_fit import fit_bytes, fit_seconds, peak_bytes, seconds_by_term
from casp_eval.scale_machines import Machine, cpu_host, gpus, predicted_seconds
from casp_eval.scale_terms import LEAST, TERMS, Data, Job, Shape, backward_widths, entries, held
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from casp.moments.second_moment import SecondMoment

ROUNDING = ("gptq", "quip-sharp", "plan")


def varied(stage):
    """Jobs that differ in every amount of the stage."""
    shapes = [Shape(h, i, 8, k, b, 1000 * h) for h, i, k, b in [(64, 96, 8, 2), (128, 500, 2, 3), (256, 600, 4, 5)]]
    shapes += [replace(shape, blocks=shape.blocks + 4) for shape in shapes]
    datas = [Data(8, 64, 2), Data(40, 32, 8), Data(12, 512, 4)]
    sizes = (1,) if stage in (*ROUNDING, "svd") else (1, 3)
    return [Job(stage, shape, data, size) for shape in shapes for data in datas for size in sizes]


def test_shapes_count_what_a_model_has(tmp_path):
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=112,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=50,
        tie_word_embeddings=False,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shape, layers = shape_named(str(tmp_path)), model.model.layers
    linears = [m for m in layers[0].modules() if isinstance(m, nn.Linear)]
    assert sorted(shape.linears) == sorted((m.out_features, m.in_features) for m in linears)
    assert shape.block * shape.blocks == sum(m.weight.numel() for m in layers.modules() if isinstance(m, nn.Linear))
    assert shape.rest == model.lm_head.weight.numel() + model.model.embed_tokens.weight.numel()
    assert MODELS["7B"].block * MODELS["7B"].blocks == pytest.approx(6.476e9, rel=1e-3)


def test_what_is_held_is_what_the_moments_of_a_block_take():
    shape = Shape(2048, 4096, 8, 8, 1, 0)
    alive = [SecondMoment(width).products for width in set(backward_widths(shape))]
    bytes_of = {panels[0].shape[1]: sum(p.numel() * p.itemsize for p in panels) for panels in alive}
    taken = sum(bytes_of[width] for width in backward_widths(shape))
    told = held(Job("moments", shape, Data(1, 1, 1))) - 4 * shape.block
    assert told == pytest.approx(taken, rel=0.25)  # panels are wider than the half they hold
    assert entries([4]) == 8


@pytest.mark.parametrize("stage", TERMS)
def test_a_fit_finds_the_prices_that_seconds_were_made_with(stage):
    jobs = varied(stage)
    prices = {
        name: LEAST.get(name, 0.0) + 10.0 / max(amount(job) for job in jobs) for name, amount in TERMS[stage].items()
    }
    prices["start"] = 3.0
    seconds = [sum(prices[name] * amount(job) for name, amount in TERMS[stage].items()) for job in jobs]
    fit = fit_seconds(jobs, seconds)
    assert fit.most < 1e-6
    assert fit.unseen < 1e-3
    other = Job(stage, Shape(512, 1408, 8, 8, 7, 512000), Data(64, 256, 4))
    expected = sum(prices[name] * amount(other) for name, amount in TERMS[stage].items())
    assert sum(seconds_by_term(fit, other).values()) == pytest.approx(
        expected, rel=0.1
    )  # amounts of few shapes lie close to each other


def test_a_fit_of_bytes_finds_the_factor_on_the_formula():
    jobs = varied("gptq")
    fit = fit_bytes(jobs, [1e9 + 1.25 * held(job) for job in jobs])
    assert peak_bytes(fit, Job("gptq", MODELS["7B"], Data())) == pytest.approx(1e9 + 1.25 * held(jobs[0]), rel=20)
    assert fit.prices["formula"] == pytest.approx(1.25, rel=1e-3)


@pytest.mark.parametrize("stage", TERMS)
def test_more_machines_take_no_longer_and_one_core_takes_what_was_measured(stage):
    jobs = varied(stage)
    fit = fit_seconds(jobs, [1.0 + job.shape.blocks * job.data.tokens for job in jobs])
    job = Job(stage, MODELS["7B"], Data())
    assert predicted_seconds(fit, job, Machine("it", 1, 1.0, 1.0)) == pytest.approx(
        sum(seconds_by_term(fit, job).values())
    )
    took = [predicted_seconds(fit, job, machine) for machine in (cpu_host(32), cpu_host(64))]
    assert took == sorted(took, reverse=True)
    took = [predicted_seconds(fit, job, gpus(count)) for count in (1, 4, 8)]
    if stage in ROUNDING:
        assert took == sorted(took, reverse=True)
    assert min(took) >= fit.prices["start"]


def test_points_that_are_known_are_not_measured_again(tmp_path):
    points = Points(tmp_path / "points.json")
    (shape, data, jobs) = next(missing(SMALL, list(TERMS), points))
    assert [job.stage for job in jobs] == list(TERMS)
    points.add(jobs[0], 2.0, 1.5, 10)
    again = Points(tmp_path / "points.json")
    assert next(missing(SMALL, list(TERMS), again)) == (shape, data, jobs[1:])


def test_tables_of_known_points(run_module, tmp_path):
    words = ["--output", tmp_path, "--cases", "--gpus", "1", "8"]
    refused = run_module("casp_eval.scale", *words)
    assert refused.returncode == 2
    assert refused.stderr == "error: moments has been measured 0 times, and two are needed; leave --cases out.\n"
    points = Points(tmp_path / "points.json")
    for stage in TERMS:
        for job in varied(stage):
            points.add(job, 5.0 + job.shape.blocks, 5.0 + job.shape.blocks, int(1e9 + held(job)))
    done = run_module("casp_eval.scale", *words)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "scale.md").read_text() in done.stdout
    assert "| 70B |" in done.stdout
    assert "8 GPUs" in done.stdout
    assert json.loads((tmp_path / "fit.json").read_text()).keys() == TERMS.keys()
    (tmp_path / "points.json").write_text('[{"job": 3}]')
    refused = run_module("casp_eval.scale", *words)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1


def test_speedups_leave_starting_out():
    rows = [
        {"stage": "moments", "ranks": r, "threads": t, "seconds": s, "start": 10.0}
        for r, t, s in [(1, 1, 30.0), (2, 1, 20.0), (1, 2, 22.0)]
    ]
    assert speedups(rows) == {"moments": {"one rank of one thread": 2.0, "one rank of two threads": 1.2}}
