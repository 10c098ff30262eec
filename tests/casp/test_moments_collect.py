"""The moments' stage against backpropagation through the whole model in float64, damages, resume, the reader."""

import hashlib
import json
import math

import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import casp.moments.collect
from casp.errors import UserError
from casp.model.batch import predicting
from casp.model.decoder import Decoder
from casp.model.head import head_logits
from casp.moments.__main__ import main, wanted_weightings
from casp.moments.backward import NO_LABEL, SUREST, head_gradient, next_tokens, temperatures
from casp.moments.collect import collect
from casp.moments.find import COLLECTED, ON_THE_WAY, choose_weighting
from casp.moments.forward import InputStatistics
from casp.moments.store import Moments, gradients_file, inputs_file
from casp.moments.weights import EXPLAINED
from casp.run.files import write_shard
from casp.run.folder import WorkFolder

CPU = torch.device("cpu")
ALL = list(EXPLAINED)
MODELS = ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_llava", "low_rank"]


def batches_of(decoder: Decoder) -> list[dict[str, torch.Tensor]]:
    """Two batches, the first padded on both sides; with pictures for a multimodal model."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for rows in (3, 2):
        ids = torch.randint(4, 100, (rows, 26), generator=generator)
        mask = torch.ones_like(ids)
        if rows == 3:
            mask[0, :3], mask[1, -2:] = 0, 0
        batch = {"input_ids": ids, "attention_mask": mask}
        if decoder.is_multimodal:
            ids[:, 4:20] = decoder.config.image_token_id
            batch["pixel_values"] = torch.randn(rows, 3, 32, 32, generator=generator)
        found.append(batch)
    return found


def collected(folder, output, weightings=ALL, gradients=True, batches=None):
    decoder = Decoder(folder)
    settings = {"token_weights": list(weightings), "gradients": gradients}
    work = WorkFolder(output, decoder, "moments", "tiny", settings, "calibration")
    data = batches_of(decoder) if batches is None else batches
    return Moments(collect(decoder, work, data, CPU, torch.float32, list(weightings), gradients))


def weighted(x, w):
    return torch.einsum("ti,t,tj->ij", x, w, x) / w.sum()


def assert_close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-4 * expected.abs().max().item())


def whole_model(folder, batches, image_token):
    """Path -> inputs and output gradients of every linear, (tokens, width) float64 a sequence, by plain autograd."""
    factory = AutoModelForCausalLM if image_token is None else AutoModelForImageTextToText
    model = factory.from_pretrained(folder, dtype=torch.float64)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_()
    seen, total, losses = {}, 0.0, 0
    for batch in batches:
        kept: dict[str, tuple] = {}
        hooks = [
            module.register_forward_hook(lambda _, args, out, name=name, kept=kept: kept.update({name: (args[0], out)}))
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        ]
        given = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
        logits = model(**given).logits
        loss = torch.zeros((), dtype=torch.float64)
        for row, (ids, mask) in enumerate(
            zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        ):
            for t in range(len(ids) - 1):
                if mask[t] and mask[t + 1] and image_token not in (ids[t], ids[t + 1]):
                    loss = loss + F.cross_entropy(logits[row, t], torch.tensor(ids[t + 1]))
                    losses += 1
        named = {name: pair for name, pair in kept.items() if pair[1].requires_grad}
        gradients = torch.autograd.grad(loss, [out for _, out in named.values()], allow_unused=True)
        for (name, (x, _)), gradient in zip(named.items(), gradients, strict=True):
            for row, mask in enumerate(batch["attention_mask"].bool()):
                if x.dim() == 3 and gradient is not None:
                    seen.setdefault(name, []).append((x[row, mask].detach(), gradient[row, mask]))
        total += loss.item()
        for hook in hooks:
            hook.remove()
    return seen, total / losses, losses


@pytest.mark.parametrize("name", MODELS)
def test_equal_to_backpropagation_through_the_whole_model(name, request, tmp_path):
    folder = request.getfixturevalue(name)
    decoder = Decoder(folder)
    batches = batches_of(decoder)
    moments = collected(folder, tmp_path / "out")
    seen, loss, losses = whole_model(folder, batches, getattr(decoder.config, "image_token_id", None))
    for index, block in enumerate(decoder.blocks):
        found = moments.read(index)
        assert found.loss == pytest.approx(loss, rel=1e-4)
        roles = decoder.linears(index, factors=True)
        wide = {path for role, path in roles.items() if role in ("q", "k")}
        assert set(found) == set(roles.values())
        assert wide or name == "low_rank"
        assert sorted(path for group in found.groups for path in group) == sorted(found)
        for path, linear in found.items():
            pairs = seen[f"{block}.{path}"]
            x, g = (torch.cat(part) for part in zip(*pairs, strict=True))
            assert linear.tokens == len(x)
            assert linear.losses == losses
            energies, shares = [], []
            for _, one in pairs:
                size = one.square().sum(-1)
                kept = torch.minimum(size, 40 * size.sqrt().mean() ** 2)
                energies.append(kept.mean().item())
                shares.append(one * (kept / size.clamp_min(1e-300) / max(energies[-1], 1e-300)).sqrt()[:, None])
            most = 4 * torch.tensor([e for e in energies if e]).median().item() if any(energies) else 0.0
            counts = [len(one) for _, one in pairs]
            energy = sum(min(e, most) * n for e, n in zip(energies, counts, strict=True)) / sum(counts)
            assert linear.energy == pytest.approx(energy, rel=2e-3)
            g = torch.cat([share for share, e in zip(shares, energies, strict=True) if e])
            assert_close(linear.hessian("none"), x.T @ x / len(x))
            if path in wide:
                assert_close(linear.gradient_moment, energy * g.T @ g / len(g))
            else:
                assert linear.gradient_moment is None
            for weighting, power, most in (("gradient", 2, 20), ("gradient-norm", 1, 10)):
                sizes = [one.norm(dim=-1) ** power for _, one in pairs]
                w = torch.cat([(size / size.mean()).clamp_max(most) for size in sizes])
                assert_close(linear.hessian(weighting), weighted(x, w))
            a, b = linear.hessian("attention"), linear.hessian("gradient")
            both = linear.hessian("attention+gradient")
            for asked, plain in (("attention+gradient", both), ("attention", a), ("gradient", b)):
                sized = linear.hessian(asked, sized_as="gradient")
                assert_close(sized, (plain * (b.trace() / plain.trace())).double())
            torch.testing.assert_close(both, a / a.diagonal().mean() + b / b.diagonal().mean())


def test_image_tokens_and_padding_have_no_loss():
    ids = torch.tensor([[9, 3, 3, 5, 6, 7, 0]])
    tokens = torch.tensor([[1, 1, 1, 1, 1, 1, 0]])
    labels = next_tokens(ids, predicting(tokens.bool() & (ids != 3)))
    assert labels.tolist() == [[NO_LABEL, NO_LABEL, NO_LABEL, 6, 7, NO_LABEL, NO_LABEL]]


def test_no_position_is_surer_than_the_surest():
    """Against the closed form for two tokens: at temperature t the label has `sigmoid(margin / t)`."""
    margins = torch.tensor([-3.0, 0.0, 1.0, 2.0, 2.19, 2.2, 5.0, 20.0])
    logits = torch.stack([margins, torch.zeros_like(margins)], 1)
    found = temperatures(logits, torch.zeros(len(margins), dtype=torch.long))
    torch.testing.assert_close(found, (margins / math.log(SUREST / (1 - SUREST))).clamp_min(1), rtol=1e-3, atol=1e-3)
    assert (found[:5] == 1).all()  # whoever is not too sure is taken as it is


def test_a_sure_model_has_a_gradient(tiny_llama):
    """At the logits it is the softened distribution less the label, and the loss told is that of the model itself."""
    decoder = Decoder(tiny_llama)
    decoder.load_rest(torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(0)
    decoder.model.get_output_embeddings().weight.data *= 60
    leaf = torch.randn(2, 5, decoder.text_config.hidden_size, generator=generator).requires_grad_()
    logits = head_logits(decoder, leaf)
    labels = logits.argmax(-1)
    labels[0, 3:] = NO_LABEL
    gradient, loss = head_gradient(decoder, leaf.detach(), labels)
    kept = labels != NO_LABEL
    assert 0 < (logits.softmax(-1).amax(-1)[kept] > SUREST).sum() < kept.sum()
    assert loss == pytest.approx(F.cross_entropy(logits[kept], labels[kept], reduction="sum").item(), rel=1e-4)
    heat = temperatures(logits[kept].detach(), labels[kept])[:, None]
    at_logits = torch.zeros_like(logits)
    at_logits[kept] = (logits[kept] / heat).softmax(-1) - F.one_hot(labels[kept], logits.shape[-1])
    (expected,) = torch.autograd.grad(logits, leaf, at_logits.detach())
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-5)


def test_predicted_damage_is_that_of_a_small_perturbation(tiny_llama, tmp_path, monkeypatch):
    """`1/2 tokens / losses tr(G D H D^T)` against KL(original || perturbed) by finite differences.

    Labels drawn from the model make the empirical Fisher information an unbiased sample of the true one, whose
    quadratic form the divergence is. One loss a sequence: no products of two tokens' errors, which the moments leave
    out; a gate behind a norm: inputs of one length, so that x and g are as good as independent.
    """
    monkeypatch.setattr("casp.moments.collect.LOW_RANK_ROLES", {"gate"})
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(4, 128, (1500, 1), generator=generator)
    before = model(first).logits[:, 0].log_softmax(-1)
    ids = torch.cat([first, torch.multinomial(before.exp(), 1, generator=generator)], dim=1)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(500)]
    linear = collected(tiny_llama, tmp_path / "out", ["none", "gradient"], batches=batches).read(2)["mlp.gate_proj"]
    g, h, h_g = linear.gradient_moment.double(), linear.hessian("none").double(), linear.hessian("gradient").double()
    weight = model.model.layers[2].mlp.gate_proj.weight
    per_loss = linear.tokens / linear.losses
    for seed in range(3):
        d = 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        weight += d
        after = model(first).logits[:, 0].log_softmax(-1)
        weight -= d
        damage = (before.exp() * (before - after)).sum(-1).mean().item()
        both = per_loss / 2 * torch.trace(g @ d @ h @ d.T).item()
        rows_alike = per_loss / 2 / len(d) * linear.energy * torch.trace(d @ h_g @ d.T).item()
        assert both == pytest.approx(damage, rel=0.15)
        assert rows_alike == pytest.approx(damage, rel=0.25)


@pytest.fixture(scope="module")
def flags(texts):
    sizes = ["--samples", "6", "--sequence-length", "24", "--batch-size", "2"]
    return [*sizes, "--dataset", str(texts), "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(tiny_llama, flags, tmp_path_factory):
    """The moments of a run that nothing interrupted."""
    output = tmp_path_factory.mktemp("moments") / "whole"
    main(["--model", str(tiny_llama), *flags, "--output", str(output)])
    return output


# Three batches, three blocks: 3 states, then 3 and the moments for each block (4 to 15); 3 gradients of the head
# (16 to 18), then 3 and the moments for each block, the first without gradients at its inputs (19 to 27).
@pytest.mark.parametrize("killed_at", [2, 7, 9, 17, 20, 22, 25, 27])
def test_killed_in_either_pass_it_ends_with_the_same_bytes(tiny_llama, flags, whole, tmp_path, monkeypatch, killed_at):
    """Killed at the n-th file that is written: states, moments or gradients, forward or backward."""
    flags = ["--model", str(tiny_llama), *flags]
    calls = 0

    def dying(real):
        def write(*args):
            nonlocal calls
            calls += 1
            if calls == killed_at:
                raise KeyboardInterrupt
            real(*args)

        return write

    for name in ("write_shard", "write_inputs", "write_gradients"):
        monkeypatch.setattr(casp.moments.collect, name, dying(getattr(casp.moments.collect, name)))
    with pytest.raises(KeyboardInterrupt):
        main([*flags, "--output", str(tmp_path / "out")])
    monkeypatch.undo()
    main([*flags, "--output", str(tmp_path / "out")])
    resumed = tmp_path / "out"
    names = sorted(file.name for file in whole.iterdir())
    assert names == sorted(file.name for file in resumed.iterdir())  # no state is left behind
    assert {inputs_file(0), gradients_file(2)} < set(names)
    for file in whole.glob("*.safetensors"):
        assert file.read_bytes() == (resumed / file.name).read_bytes()


def test_the_order_of_batches_in_memory_is_one(tiny_llama, flags, tmp_path, monkeypatch):
    """At no time are the hidden states of more than one batch in memory."""
    real, held = casp.moments.collect.InputStatistics.run, []
    seen = []

    def capture(*args):
        held[:] = captured = casp.model.capture.capture_inputs(*args)
        return captured

    def run(self, visit):
        seen.append(sum(batch.hidden.numel() for batch in held) + sum(one.hidden.numel() for one in visit.inputs))
        real(self, visit)

    monkeypatch.setattr(casp.moments.collect, "capture_inputs", capture)
    monkeypatch.setattr(casp.moments.collect.InputStatistics, "run", run)
    main(["--model", str(tiny_llama), *flags, "--output", str(tmp_path / "out")])
    assert set(seen) == {2 * 24 * 64}


def test_half_precision(tiny_llama, tmp_path, monkeypatch):
    """States and gradients pass between blocks in the compute dtype; the sums lose little by it."""
    monkeypatch.setattr("casp.moments.collect.LOW_RANK_ROLES", {"v"})
    decoder = Decoder(tiny_llama)
    settings = {"token_weights": ["none", "gradient"], "gradients": True}
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        work = WorkFolder(tmp_path / str(dtype), decoder, "moments", "tiny", settings, "calibration")
        folder = collect(decoder, work, batches_of(decoder), CPU, dtype, ["none", "gradient"], True)
        found.append(Moments(folder).read(0)["self_attn.v_proj"])
    for name in ("none", "gradient"):
        exact, half = (one.hessian(name) for one in found)
        assert (half - exact).norm() < 0.05 * exact.norm()
    assert (found[1].gradient_moment - found[0].gradient_moment).norm() < 0.05 * found[0].gradient_moment.norm()


def test_forward_only(tiny_llama, flags, tmp_path):
    only = ["--no-gradients", "--token-weights", "none"]
    main(["--model", str(tiny_llama), *flags, "--output", str(tmp_path / "out"), *only])
    moments = Moments(tmp_path / "out")
    assert not list((tmp_path / "out").glob("gradients-*"))
    block = moments.read(0)
    assert block.influence > 0
    assert block.density["image"] is None
    linear = block["self_attn.q_proj"]
    assert linear.hessian("none").shape == (64, 64)
    assert (linear.energy, linear.losses, block.loss) == (None, None, None)
    for asked in ("gradient", "attention"):
        with pytest.raises(UserError, match=f"without token weights '{asked}'"):
            linear.hessian(asked)
    with pytest.raises(UserError, match="without gradients"):
        _ = linear.gradient_moment
    assert choose_weighting(None, moments) == "none"


def test_what_token_weights_are_wanted():
    assert wanted_weightings(["attention+gradient", "none"], True) == ["none", "attention", "gradient"]
    with pytest.raises(UserError, match="--no-gradients"):
        wanted_weightings(["attention+gradient-norm"], False)
    assert choose_weighting(None, None) == ON_THE_WAY
    for asked in (COLLECTED, "gradient"):
        with pytest.raises(UserError, match="hessian_offline"):
            choose_weighting(asked, None)


def test_data_without_a_loss_is_refused(tiny_llama, tmp_path):
    ids = torch.arange(4, 8)[:, None]
    with pytest.raises(UserError, match="no position with a loss"):
        collected(tiny_llama, tmp_path / "out", batches=[{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])


def test_refusals(tiny_llama, tiny_qwen2, tmp_path):
    with pytest.raises(UserError, match=r"not a finished folder.*hessian_offline"):
        Moments(tmp_path / "nowhere")
    moments = collected(tiny_llama, tmp_path / "out", ["none"])
    decoder, model = Decoder(tiny_llama), moments.fingerprint["model"]
    moments.check(model, decoder)
    with pytest.raises(UserError, match="another model"):
        moments.check("0" * 64, Decoder(tiny_qwen2))
    with pytest.raises(UserError, match=r"without token weights 'attention' \(it has none\)"):
        moments.check(model, decoder, "none+attention")
    for name in (inputs_file(1), gradients_file(1)):
        file = moments.folder / name
        good = file.read_bytes()
        file.write_bytes(good[:200])
        with pytest.raises(UserError, match=r"damaged|truncated"):
            moments.read(1)
        file.unlink()
        with pytest.raises(UserError, match=r"lacks (inputs|gradients)-00001"):
            moments.check(model, decoder)
        file.write_bytes(good)
    settings = json.loads((moments.folder / "casp_run.json").read_text())
    settings["fingerprint"]["settings"].pop("token_weights")
    (moments.folder / "casp_run.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="does not say which moments"):
        Moments(moments.folder)


def zeroed(file, **changes):
    """Zeros for every moment in `file`, with a record that says so and has `changes` besides."""
    with safe_open(file, "pt") as stored:
        header = json.loads(stored.metadata()["block"])["header"] | changes
        tensors = {name: torch.zeros_like(stored.get_tensor(name)) for name in stored.keys()}  # noqa: SIM118
    header["sha256"] = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
    sha256 = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
    write_shard(file, tensors, {"block": json.dumps({"header": header, "sha256": sha256})})


def test_zeros_are_no_moments_of_what_a_loss_depends_on(tiny_llama, tmp_path):
    """Even where the record fits them; without a gradient (an expert that no token reached) they are right."""
    moments = collected(tiny_llama, tmp_path / "out", ["none", "gradient"])
    path, folder = "self_attn.q_proj", moments.folder
    reads = {
        inputs_file(1): [lambda: moments.read(1)[path].hessian("none")],
        gradients_file(1): [
            lambda: moments.read(1)[path].hessian("gradient"),
            lambda: moments.read(1)[path].hessian("none+gradient"),
            lambda: moments.read(1)[path].gradient_moment,
        ],
    }
    for name, readers in reads.items():
        good = (folder / name).read_bytes()
        zeroed(folder / name)
        for read in readers:
            with pytest.raises(UserError, match=rf"{name}: the moment \S+ is zero or not finite"):
                read()
        (folder / name).write_bytes(good)
    zeroed(folder / gradients_file(1), energy=dict.fromkeys(moments.read(1), 0.0))
    assert not moments.read(1)[path].hessian("gradient").any()
    assert not moments.read(1)[path].gradient_moment.any()


def test_a_forward_pass_without_weightings_tells_its_sizes():
    """What a rank tells the first one where all weights of tokens are by gradient."""
    one, other = (InputStatistics(["q", "k"], [], 0) for _ in range(2))
    one._begin([["q", "k"]], {"q": 8})
    header, _ = one.told()
    other.hear(header, iter(()))
    assert (other.groups, other.sizes) == ([["q", "k"]], {"q": 8})
