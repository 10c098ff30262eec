"""What PyTorch traces and differentiates: every operator by `opcheck`, gradients, compiled decode steps."""

import io

import pytest
import torch
from casp_aqlm.linear import AQLMLinear
from casp_aqlm.scheme import Scheme
from casp_gptq.linear import GPTQLinear
from casp_gptq.packing import packed_rows
from casp_quip_sharp.hadamard import factors, transform_plan
from casp_quip_sharp.kernels import e8p_coding
from casp_quip_sharp.linear import QuipSharpLinear
from casp_quip_sharp.trellis.codebook import Trellis
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from casp import kernels
from casp.kernels import operators
from casp.linear import LowRankLinear, QuantizedLinear

pytestmark = pytest.mark.skipif(operators() is None, reason=f"quiptools is not built: {kernels.BUILD}")
CPU = torch.device("cpu")
KINDS = ["e8p", "trellis", "gptq", "aqlm"]


def random_layer(kind, out_features, in_features, vectors="signs", bias=True, bits=2):
    """A layer of random codes whose weights are about 1 / sqrt(in_features)."""
    if kind == "gptq":
        layer = GPTQLinear(out_features, in_features, bias, {"bits": bits, "group_size": 32})
    elif kind == "aqlm":
        layer = AQLMLinear(out_features, in_features, bias, Scheme.parse("2x8g8", "float16").format)
    else:
        form = {"bits": bits, "codebook": kind, "vectors": vectors}
        layer = QuipSharpLinear(out_features, in_features, bias, form)
    for name, buffer in layer.named_buffers():
        if buffer.is_floating_point():
            size = in_features**-0.5
            buffer.copy_(
                torch.full(buffer.shape, size) if name in ("scale", "scales") else torch.rand(buffer.shape) * size
            )
        else:
            buffer.view(torch.uint8).random_(0, 256)
    if bias:
        layer.bias.data.normal_()
    return layer


def e8p_layer_inputs(x, scale, bits=3):
    codes = torch.randint(-(2**15), 2**15, (24, 5), dtype=torch.int16)
    residual = torch.randint(0, 256, (24, 5), dtype=torch.uint8)
    into, back = transform_plan(40), transform_plan(24)
    sides = (
        torch.randint(0, 256, (5,), dtype=torch.uint8) if scale is not None else torch.randn(40).bfloat16(),
        factors(into, False, CPU),
        into.power,
        torch.randint(0, 256, (3,), dtype=torch.uint8) if scale is not None else torch.randn(24).bfloat16(),
        factors(back, True, CPU),
        back.power,
        scale,
        torch.randn(24),
    )
    return x, codes, residual, *e8p_coding(bits, CPU), *sides


def inputs_of(name, count=3, needs_gradient=True):
    """Inputs of an operator, small."""
    x = torch.randn(count, 40, requires_grad=needs_gradient)
    layer = e8p_layer_inputs(x, torch.tensor(0.5))
    e8p = layer[1:6]
    rate, table, masks = Trellis(3).coding(CPU)
    stream = torch.randint(0, 256, (24 * 40 * 3 // 8,), dtype=torch.uint8)
    words = torch.randint(-(2**31), 2**31, (packed_rows(40, 3), 24), dtype=torch.int32)
    zeros = torch.randint(-(2**31), 2**31, (2, packed_rows(24, 3)), dtype=torch.int32)
    packed = words, zeros, torch.rand(2, 24).half()
    additive = torch.randint(0, 256, (24, 10), dtype=torch.uint8), torch.randn(2, 256, 8).half(), torch.rand(24).half()
    plan = transform_plan(40)
    values = table[:2].float().repeat(128)
    return {
        "unpack_signs": (torch.randint(0, 256, (2,), dtype=torch.uint8), 13),
        "transform": (x, factors(plan, False, CPU), plan.power),
        "decode": e8p,
        "product": (x, *e8p, torch.float32),
        "layer": layer,
        "trellis_decode": (stream, 24, 40, rate, table, masks),
        "trellis_product": (x, stream, 24, rate, table, masks, torch.float32),
        "trellis_layer": (x, stream, rate, table, masks, *layer[6:]),
        "trellis_round": (torch.randn(24, 8), torch.randn(24, 8), torch.zeros(8, 8), values, 2, 256),
        "trellis_descend": (
            torch.randn(24, 8),
            torch.eye(8),
            torch.randint(0, 4, (24, 8), dtype=torch.uint8),
            torch.randn(24, 8),
            values,
            2,
            256,
        ),
        "gptq_decode": (*packed, 40, 3, 32),
        "gptq_layer": (x, *packed, 3, 32, torch.randn(24)),
        "aqlm_decode": (*additive, 40, 8),
        "aqlm_layer": (x, *additive, 8, torch.randn(24)),
        "aqlm_nearest_pairs": (torch.randn(5, 8), torch.randn(2, 16, 8)),
    }[name]


NAMES = [
    "unpack_signs",
    "transform",
    "decode",
    "product",
    "layer",
    "trellis_decode",
    "trellis_product",
    "trellis_layer",
]
NAMES += ["trellis_round", "trellis_descend", "gptq_decode", "gptq_layer", "aqlm_decode", "aqlm_layer"]
NAMES += ["aqlm_nearest_pairs"]


@pytest.mark.parametrize("name", NAMES)
def test_operators_pass_pytorchs_own_check(name):
    for count in (3, 20):
        torch.library.opcheck(getattr(operators(), name).default, inputs_of(name, count))


def test_every_operator_is_checked():
    from quiptools.graphs import SHAPES

    defined = {
        str(one).split("::")[1] for one in torch._C._dispatch_get_all_op_names() if one.startswith("quiptools::")
    }
    assert defined - {"instruction_sets", "threaded"} == set(SHAPES) == set(NAMES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vectors", ["signs", "tuned"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_x_are_the_dense_layers_without_the_plain_version(kind, vectors, dtype, monkeypatch):
    layer = random_layer(kind, 48, 72, vectors)
    dense = layer.weight.double()
    monkeypatch.setattr(type(layer), "dequantize", None)
    if kind in ("e8p", "trellis"):
        monkeypatch.setattr(type(layer), "_plain", None)
    for shape in ((1,), (2, 5), (40,)):
        x = torch.randn(*shape, 72, dtype=dtype, requires_grad=True)
        gradient = torch.randn(*shape, 48, dtype=dtype)
        layer(x).backward(gradient)
        wanted = gradient.double() @ dense
        assert (x.grad.dtype, x.grad.shape) == (dtype, x.shape)
        tolerance = 1e-5 if dtype == torch.float32 else 0.02
        assert (x.grad - wanted).abs().max() <= tolerance * wanted.abs().max(), shape


def test_other_gradients_are_refused():
    x, codes, *rest = e8p_layer_inputs(torch.randn(1, 40), None)
    rest[-1] = rest[-1].requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable in x alone"):
        operators().layer(x, codes, *rest)


def tiny_llama(kind):
    """A Llama of two blocks whose linears are of this kind."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 40}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)
    model = LlamaForCausalLM(config).eval()
    for name, one in list(model.model.named_modules()):
        if not isinstance(one, torch.nn.Linear):
            continue
        out_features, in_features = one.out_features, one.in_features
        if kind.startswith("low-rank") and name.endswith(("q_proj", "k_proj")):
            found = LowRankLinear(in_features, out_features, 8, False)
            if kind == "low-rank":
                found.down, found.up = (
                    random_layer("trellis", 8, in_features, bias=False),
                    random_layer("trellis", out_features, 8, bias=False),
                )
            else:
                for factor in (found.down, found.up):
                    factor.weight.data.normal_(0, factor.in_features**-0.5)
        else:
            packed = "trellis" if kind.startswith("low-rank") else kind
            found = random_layer(packed, out_features, in_features, bias=False)
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, found)
    return model


@pytest.mark.parametrize("kind", [*KINDS, "low-rank", "low-rank, dense factors"])
def test_a_compiled_decode_step_equals_eager(kind):
    model = tiny_llama(kind)
    prompt = torch.tensor([[3, 1, 4, 1, 5]])

    def steps(forward):
        cache = StaticCache(config=model.config, max_cache_len=16)
        with torch.no_grad():
            model(prompt, past_key_values=cache, cache_position=torch.arange(5))
            found = []
            for place in (5, 6):
                token, where = torch.tensor([[place]]), torch.tensor([place])
                found.append(forward(token, past_key_values=cache, cache_position=where).logits)
        return torch.cat(found)

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # A graph computes norms in another order: at a rounding border an activation may fall to the other side.
    assert torch.allclose(steps(compiled), steps(model), atol=5e-4)


@pytest.mark.parametrize("kind", [*KINDS, "low-rank", "low-rank, dense factors"])
def test_an_exported_model_equals_eager(kind):
    """For prompts of any length, with one operator a layer, and after a way through a file."""
    model, file = tiny_llama(kind), io.BytesIO()
    lengths = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=32)}, "use_cache": None}
    with torch.no_grad():
        asked = {"input_ids": torch.randint(3, 40, (1, 6)), "use_cache": False}
        exported = torch.export.export(model, (), asked, dynamic_shapes=lengths)
        named = [str(node.target) for node in exported.graph.nodes]
        torch.export.save(exported, file)
        file.seek(0)
        again = torch.export.load(file).module()
        asked["input_ids"] = torch.randint(3, 40, (1, 9))
        torch.testing.assert_close(again(**asked).logits, model(**asked).logits, rtol=0, atol=1e-5)
    layers = [one for one in model.modules() if isinstance(one, QuantizedLinear)]
    assert sum(name.startswith("quiptools.") and "layer" in name for name in named) == len(layers)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_compiled_to_machine_code_equals_eager(kind):
    layer = random_layer(kind, 48, 72)
    x = torch.randn(1, 72)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(layer, fullgraph=True)(x), layer(x), atol=1e-6)
