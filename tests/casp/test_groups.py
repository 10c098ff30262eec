"""Matrices that share an input, quantized together: what comes out, and what is worked out only once."""

import pytest
import torch
from casp_gptq import moment as gptq_moment
from casp_quip_sharp import ldlq

from casp.backend import Matrix, load_backend, quantized
from casp.moments import damped_cholesky
from casp.rounding import told_error
from casp.seed import matrix_generator

FORMATS = {
    "gptq": [{"bits": bits, "group_size": 32} for bits in (2, 3, 4)],
    "quip-sharp": [{"bits": bits, "codebook": "trellis", "states": 8} for bits in (2, 3, 4)],
    "quip-sharp e8p": [{"bits": bits, "vectors": "tuned"} for bits in (2, 3, 4)],
}


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def moment(generator):
    x = torch.randn(400, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    return x.T @ x / 400


@pytest.fixture
def group(generator):
    """Makes matrices q, k, v of 64, 24, 24 rows in the formats given, the same at each call."""
    weights = {name: torch.randn(rows, 96, generator=generator) for name, rows in (("q", 64), ("k", 24), ("v", 24))}

    def make(formats):
        return [
            Matrix(weight, format, matrix_generator(0, name), name)
            for (name, weight), format in zip(weights.items(), formats, strict=True)
        ]

    return make


@pytest.mark.parametrize("name", FORMATS)
def test_a_group_is_quantized_as_well_as_its_members(name, moment, group, weighted_error):
    backend = load_backend(name.split()[0])
    together = list(quantized(backend, group(FORMATS[name]), moment, {}))
    for place, (one, tensors) in enumerate(zip(group(FORMATS[name]), together, strict=True)):
        alone = backend.quantize(one.weight, moment, one.format, one.generator, name=one.name)
        errors = []
        for found in (tensors, alone):
            module = backend.linear(*one.weight.shape, False, one.format)
            module.load_state_dict(found)
            errors.append(weighted_error(one.weight, module.dequantize(), moment))
        assert errors[0] == pytest.approx(errors[1], rel=0.25)
        if place == 0 or name == "gptq":
            assert all(torch.equal(tensors[key], alone[key]) for key in alone)


def test_one_matrix_in_several_formats_is_what_it_is_alone(moment, group):
    """Signs come from the generator of the matrix, so a plan's prices do not depend on what is priced together."""
    backend, formats = load_backend("quip-sharp"), FORMATS["quip-sharp"]
    weight = group(formats)[0].weight
    matrices = [Matrix(weight, format, matrix_generator(0, "q"), "q") for format in formats]
    for format, tensors in zip(formats, quantized(backend, matrices, moment, {}), strict=True):
        alone = backend.quantize(weight, moment, format, matrix_generator(0, "q"), name="q")
        assert all(torch.equal(tensors[key], alone[key]) for key in alone)


@pytest.mark.parametrize(("name", "module"), [("gptq", gptq_moment), ("quip-sharp", ldlq)])
def test_a_moment_is_factored_once(monkeypatch, name, module, moment, group):
    calls = []

    def counted(*args):
        calls.append(args[-1])
        return damped_cholesky(*args)

    monkeypatch.setattr(module, "damped_cholesky", counted)
    assert len(list(quantized(load_backend(name), group(FORMATS[name]), moment, {}))) == 3
    assert calls == ["q"]


def test_tensors_of_a_quip_sharp_group_share_the_signs_of_their_input(moment, group):
    found = list(quantized(load_backend("quip-sharp"), group(FORMATS["quip-sharp"]), moment, {}))
    assert all(torch.equal(one["in_signs"], found[0]["in_signs"]) for one in found)
    assert not torch.equal(found[1]["out_signs"], found[2]["out_signs"])


def test_a_backend_without_groups_gets_one_matrix_after_the_other(moment, group):
    class Plain:
        def quantize(self, weight, hessian, format, generator, *, name, **settings):
            assert hessian is moment
            return {"seen": weight.sum() + settings["more"]}

    matrices = group([{}, {}, {}])
    found = [tensors["seen"] for tensors in quantized(Plain(), matrices, moment, {"more": 1})]
    assert found == [one.weight.sum() + 1 for one in matrices]


def test_an_error_is_told_of_all_rows_or_of_evenly_spread_ones():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(40, 12, generator=draw), torch.randn(5000, 12, generator=draw)
    other, hessian = weight + 0.1 * torch.randn(5000, 12, generator=draw), x.T @ x / 40

    def share(rows):
        outputs = (x @ (weight - other)[rows].T).square().sum() / (x @ weight[rows].T).square().sum()
        return outputs.item()

    few = told_error(weight[:2048], other[:2048], hessian)
    assert few == {"relative_error": pytest.approx(share(slice(0, 2048)), rel=1e-4)}
    many = told_error(weight, other, hessian)
    assert many == {"relative_error": pytest.approx(share(slice(None, None, 3)), rel=1e-4), "error_rows": 1667}
    assert many["relative_error"] == pytest.approx(share(slice(None)), rel=0.05)
