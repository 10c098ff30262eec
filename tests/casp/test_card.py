"""The card as a hub reads it, by huggingface_hub's own classes."""

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from casp.cli import base_model
from casp.run.card import front_matter, inherited

HUB = "models--llava-hf--llava-1.5-7b-hf/snapshots/0123abc"


@pytest.fixture
def compressed(tiny_llama: Path, texts: Path, tmp_path: Path) -> Path:
    """A model of the hub's cache, with a card, quantized and exported by GPTQ."""
    from casp_gptq.__main__ import main

    source = tmp_path / HUB
    shutil.copytree(tiny_llama, source)
    (source / "README.md").write_text(
        "---\nlicense: other\nlicense_name: llama2\nlicense_link: LICENSE.txt\nlanguage:\n- en\n- fr\n"
        "tags: [mine]\nextra_gated_prompt: sign\n---\n\n# A model\n"
    )
    flags = ["--dataset", str(texts), "--samples", "4", "--sequence-length", "64", "--bits", "4", "--group-size", "32"]
    main(["--model", str(source), *flags, "--export", "gptq", "--output", str(tmp_path / "made")])
    return tmp_path / "made"


def test_what_a_hub_reads(compressed: Path):
    plain = compressed.with_name("made-gptqmodel")
    for folder, kind in ((compressed, "compressed"), (plain, "gptq")):
        card = ModelCard.load(folder / "README.md")
        data = card.data
        assert (data.license, data.license_name, data.license_link) == ("other", "llama2", "LICENSE.txt")
        assert data.language == ["en", "fr"]
        assert (data.base_model, data.base_model_relation) == ("llava-hf/llava-1.5-7b-hf", "quantized")
        assert (data.pipeline_tag, data.library_name) == ("text-generation", "transformers")
        assert data.tags == ["casp", kind]
        assert not hasattr(data, "extra_gated_prompt")
        assert ModelCard(str(card)).data.to_dict() == data.to_dict()
    config = json.loads((plain / "config.json").read_text())["quantization_config"]
    assert json.loads((plain / "quantize_config.json").read_text()) == config
    assert config["meta"]["quantizer"][0].startswith("casp:")


@pytest.mark.parametrize(
    "text",
    ["", "# no head", "---\nlicense: [\n---\n", "---\n- mit\n---\n", "---\nlicense: 7\n---\n", "---\nlicense: mit\n"],
)
def test_cards_that_say_nothing(tmp_path: Path, text: str):
    (tmp_path / "README.md").write_text(text)
    assert inherited(tmp_path) == {}


def test_a_name_that_is_no_id_of_the_hub_is_left_out():
    assert "base_model" not in front_matter("my-folder", False, [], {})
    assert (
        ModelCard(front_matter("a/b", True, ["x"], {"license": "mit"}) + "text").data.pipeline_tag
        == "image-text-to-text"
    )


def test_the_id_of_a_folder_in_the_cache_of_the_hub(tmp_path: Path):
    (tmp_path / HUB).mkdir(parents=True)
    assert base_model(tmp_path / HUB, str(tmp_path / HUB)) == "llava-hf/llava-1.5-7b-hf"
