"""The decoder view: what it finds, what it refuses, and what it never holds."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CLIPConfig, GPT2Config, GPT2LMHeadModel

from casp.cli import model_folder, pick_device, stage_input
from casp.errors import UserError
from casp.model.decoder import Decoder
from casp.model.shards import INDEX
from casp.run.digest import content_hash

CPU = torch.device("cpu")


@pytest.fixture
def copy(tiny_llama, tmp_path) -> Path:
    """A copy of the tiny Llama to damage."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "copy"))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_qwen3", "tiny_llava"])
def test_roles_and_shapes(name, request):
    decoder = Decoder(request.getfixturevalue(name))
    assert list(decoder.linears(0)) == ["q", "k", "v", "o", "gate", "up", "down"]
    assert len(decoder.blocks) == 3
    assert (decoder.heads, decoder.key_value_heads, decoder.hidden_size) == (4, 2, 64)
    assert decoder.head_dim == (24 if name == "tiny_qwen3" else 16)
    assert decoder.is_multimodal == (name == "tiny_llava")
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_loading_a_block_reads_that_block_alone(tiny_llama):
    decoder = Decoder(tiny_llama)
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    decoder.load_block(1, CPU, torch.float32)
    for name, tensor in decoder.model.state_dict().items():
        assert tensor.is_meta != name.startswith("model.layers.1.")
        if not tensor.is_meta:
            assert torch.equal(tensor, whole[name])
    decoder.unload_block(1)
    assert all(parameter.is_meta for parameter in decoder.model.parameters())


def test_names_of_an_older_release_are_understood(tiny_llava, tmp_path):
    """Checkpoints such as llava-1.5 name the decoder language_model.model.layers.N on disk."""
    folder = Path(shutil.copytree(tiny_llava, tmp_path / "legacy"))
    stored = {}
    for shard in folder.glob("*.safetensors"):
        stored |= load_file(shard)
        shard.unlink()
    renamed = {}
    for name, tensor in stored.items():
        name = name.removeprefix("model.")
        if name.startswith("language_model.") and not name.startswith(
            ("language_model.model.", "language_model.lm_head")
        ):
            name = "language_model.model." + name.removeprefix("language_model.")
        renamed["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor.clone()
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    (folder / INDEX).unlink()
    old, new = Decoder(folder), Decoder(tiny_llava)
    for decoder in (old, new):
        decoder.load_block(2, CPU, torch.float32)
        decoder.load_rest(CPU, torch.float32)
    for name, tensor in new.model.state_dict().items():
        assert tensor.is_meta == old.model.state_dict()[name].is_meta
        assert tensor.is_meta or torch.equal(tensor, old.model.state_dict()[name]), name


def test_tied_head_is_the_embedding(tiny_qwen2):
    decoder = Decoder(tiny_qwen2)
    decoder.load_rest(CPU, torch.float32)
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight


def test_the_hash_sees_config_and_weights(copy, tiny_llama):
    assert content_hash(copy) == content_hash(tiny_llama)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert content_hash(copy) != content_hash(tiny_llama)


def damage_truncate(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])


def damage_header(folder: Path) -> None:
    shard = sorted(folder.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    shard.write_bytes(data[:8] + b"?" * 40 + data[48:])


def damage_empty(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")


def damage_remove(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[0].unlink()


def damage_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def damage_pickled(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickle")


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "no-such-model"}')


def damage_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def damage_no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def damage_foreign(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}})
    )


def damage_vision_only(folder: Path) -> None:
    CLIPConfig().save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "truncated"),
        (damage_header, "damaged header"),
        (damage_empty, "truncated or not a safetensors file"),
        (damage_remove, "missing"),
        (damage_index, "index.* is not valid JSON"),
        (damage_pickled, "convert the checkpoint to safetensors"),
        (damage_config, "no-such-model"),
        (damage_json, r"config\.json"),
        (damage_no_config, r"no config\.json"),
        (damage_foreign, r"already quantized \(gptq\)"),
        (damage_vision_only, "'clip' is neither"),
    ],
)
def test_damage_is_named_with_a_remedy(copy, damage, message):
    damage(copy)
    with pytest.raises(UserError, match=message) as caught:
        Decoder(copy)
    assert "\n" not in str(caught.value)


def test_nan_and_missing_and_misshapen_tensors_are_named(copy):
    shard = next(s for s in sorted(copy.glob("*.safetensors")) if "model.layers.1.mlp.up_proj.weight" in load_file(s))
    tensors = load_file(shard)
    good = tensors["model.layers.1.mlp.up_proj.weight"].clone()
    for bad, message in [
        (good.index_fill(0, torch.tensor([3]), float("nan")), r"layers\.1\.mlp\.up_proj\.weight .*NaN"),
        (good[:-1].clone(), r"layers\.1\.mlp\.up_proj\.weight .*shape"),
        (None, r"lacks model\.layers\.1\.mlp\.up_proj\.weight"),
    ]:
        changed = {name: t.clone() for name, t in tensors.items()} | {"model.layers.1.mlp.up_proj.weight": bad}
        save_file({name: t for name, t in changed.items() if t is not None}, shard, {"format": "pt"})
        with pytest.raises(UserError, match=message):
            Decoder(copy).load_block(1, CPU, torch.float32)


def test_blocks_without_linears_are_refused(tmp_path):
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="'gpt2' has no decoder that CASP knows"):
        Decoder(tmp_path / "gpt2")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "demo-lama", "a/b/c"])
def test_a_misspelt_model_is_named(name):
    with pytest.raises(UserError, match="does not exist"):
        model_folder(name)


def test_an_unreachable_hub_is_told_from_a_misspelt_folder():
    with pytest.raises(UserError, match="could not be fetched from the hub"):
        model_folder("nobody/nothing-of-this-name")


def test_a_following_stage_says_which_earlier_output_it_uses(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert stage_input(str(tiny_llama), "svd", from_original=False) == tiny_llama
    earlier = tmp_path / "runs" / tiny_llama.name / "svd"
    shutil.copytree(tiny_llama, earlier)
    assert stage_input(str(tiny_llama), "svd", from_original=False).resolve() == earlier
    assert f"runs/{tiny_llama.name}/svd" in capsys.readouterr().out
    assert stage_input(str(tiny_llama), "svd", from_original=True) == tiny_llama


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "mps"])
def test_devices_that_are_not_there(name):
    with pytest.raises(UserError, match=f"--device {name}"):
        pick_device(name)


def test_an_output_of_another_model_is_no_start(tiny_llama, tiny_qwen2, tmp_path, monkeypatch):
    """Of the same name, or of weights that have changed since."""
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / tiny_llama.name / "svd"
    shutil.copytree(tiny_llama, earlier)
    for made_from, refused in ((tiny_llama, False), (tiny_qwen2, True)):
        fingerprint = {"model": content_hash(made_from), "settings": {}}
        record = {"version": 1, "kind": "checkpoint", "base_model": tiny_llama.name, "fingerprint": fingerprint}
        (earlier / "casp_run.json").write_text(json.dumps(record))
        if refused:
            with pytest.raises(UserError, match="was made from another model than"):
                stage_input(str(tiny_llama), "svd", from_original=False)
        else:
            assert stage_input(str(tiny_llama), "svd", from_original=False).resolve() == earlier
    assert stage_input(str(tiny_llama), "svd", from_original=True) == tiny_llama
