"""Tiny random towers and LLMs in local directories, joined as the search joins them."""

from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    Gemma2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from hyma_mllm.connectors import ConnectorSpec, module
from hyma_mllm.data.prompts import Prompter
from hyma_mllm.stitched.config import DataCredit
from hyma_mllm.stitched.mllm import StitchedMLLM
from hyma_mllm.stitched.mllm_config import MLLMConfig
from hyma_mllm.zoo.llm import LanguageModel, load_llm
from hyma_mllm.zoo.vision_tokens import VisionTower, load_tower

WIDTH, SIDE, PATCH = 32, 32, 8
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIALS = ["<pad>", "<s>", "<|im_start|>", "<|im_end|>"]


def write_tokenizer(directory: Path, template: str | None = CHATML, add_bos: bool = False) -> int:
    """A byte-level tokenizer without merges; returns its size."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="<|im_end|>", add_bos_token=add_bos
    )
    fast.chat_template = template
    fast.save_pretrained(directory)
    return len(fast)


def write_llm(directory: Path, family: str = "llama") -> Path:
    """A causal LM with two layers: `llama` (tied head), `qwen2` (head of its own, spare rows), `gemma2` (softcap)."""
    base = family in ("gemma2", "bos")
    template = "{{ bos_token }}" + CHATML if family == "bos" else None if family == "gemma2" else CHATML
    size = write_tokenizer(directory, template, add_bos=base)
    torch.manual_seed(5)
    shape = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": 257, "eos_token_id": 259}
    shape |= {"pad_token_id": 256, "max_position_embeddings": 512}
    if family == "qwen2":
        config = Qwen2Config(vocab_size=size + 20, tie_word_embeddings=False, **shape)
    elif family == "gemma2":
        config = Gemma2Config(
            vocab_size=size, head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=5.0, **shape
        )
    else:
        config = LlamaConfig(vocab_size=size, tie_word_embeddings=True, **shape)
    model = AutoModelForCausalLM.from_config(config)
    # What some instruct models bring along; a greedy answer must not feel it.
    model.generation_config.update(do_sample=True, repetition_penalty=3.0, temperature=0.7)
    model.save_pretrained(directory)
    return directory


def write_tower(directory: Path, kind: str) -> str:
    """A tower of about 50,000 weights, and the name under which it opens."""
    torch.manual_seed(6)
    if kind.startswith("test_"):
        directory.mkdir(parents=True, exist_ok=True)
        model = timm.create_model(kind)
        for name, value in model.state_dict().items():
            # Fresh networks of timm are dead: norms in front of a sum start at zero.
            if name.endswith(("running_mean", "running_var")) or value.ndim == 1:
                value.uniform_(0.5, 1.5)
        save_file(model.state_dict(), directory / "weights.safetensors")
        return f"timm:{kind}@{directory / 'weights.safetensors'}"
    shape = {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": SIDE,
        "patch_size": PATCH,
    }
    wide = shape | {"intermediate_size": 48, "initializer_range": 0.3}
    if kind == "clip":
        model = CLIPVisionModel(CLIPVisionConfig(**wide, initializer_factor=5.0))
    elif kind == "siglip":
        model = SiglipVisionModel(SiglipVisionConfig(**wide))
    elif kind == "vit":
        model = ViTModel(ViTConfig(**wide), add_pooling_layer=False)
    elif kind == "registers":
        model = Dinov2WithRegistersModel(
            Dinov2WithRegistersConfig(**shape, initializer_range=0.3, num_register_tokens=3)
        )
    else:
        model = Dinov2Model(Dinov2Config(**shape, initializer_range=0.3))
    model.save_pretrained(directory)
    square = {"height": SIDE, "width": SIDE}
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=square).save_pretrained(directory)
    return f"hf:{directory}"


def stitch(
    tower: VisionTower, llm: LanguageModel, spec: ConnectorSpec, dtype: torch.dtype | None = None
) -> tuple[StitchedMLLM, Prompter, torch.nn.Sequential]:
    """A stitched model with a random projector, the prompts it was "trained" with, and that projector."""
    torch.manual_seed(7)
    projector = module(spec, (tower.card.width, llm.width)).requires_grad_(False)
    with torch.no_grad():
        projector[-1].weight.mul_(3)
    prompter = Prompter(llm.tokenizer, llm.card.id, 256, tower.card.tokens or 0)
    config = MLLMConfig(
        tower.card,
        llm.card,
        spec,
        scores={"easy-vqa": 71.25},
        blind={"easy-vqa": 41.0},
        data=(DataCredit("questions", "MIT", "abc", "asked by someone"),),
    )
    return StitchedMLLM.from_parts(tower, llm, prompter, projector.state_dict(), config, dtype), prompter, projector


def stitch_kinds(folder: Path, tower: str, llm: str, spec: ConnectorSpec, suffix: str = "") -> StitchedMLLM:
    """A stitched model of fresh parts in `folder`."""
    opened = load_tower(write_tower(folder / "tower", tower) + suffix)
    return stitch(opened, load_llm(f"hf:{write_llm(folder / 'llm', llm)}", dtype=torch.float32), spec)[0]


def picture(seed: int = 0, size: tuple[int, int] = (50, 40)) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@torch.no_grad()
def reference_logits(
    tower: VisionTower,
    llm: LanguageModel,
    prompter: Prompter,
    projector: torch.nn.Module,
    image: Image.Image,
    words: str,
) -> Tensor:
    """Logits [after, vocabulary] of the search's own forward pass: prefix, image tokens, question."""
    tokens = projector(tower.tokens(tower.preprocess(image)[None]))
    after = torch.tensor(prompter.prompt(words))
    embeddings = torch.cat([tokens, llm.embed(after[None])], dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    hidden = llm.hidden(embeddings, mask, llm.prefix(torch.tensor(prompter.before)))
    return llm.logits(hidden)[0, -len(after) :]


@torch.no_grad()
def reference_answer(
    tower: VisionTower,
    llm: LanguageModel,
    prompter: Prompter,
    projector: torch.nn.Module,
    image: Image.Image,
    words: str,
) -> str:
    """The search's own greedy answer."""
    tokens = projector(tower.tokens(tower.preprocess(image)[None]))
    embeddings = torch.cat([tokens, llm.embed(torch.tensor([prompter.prompt(words)]))], dim=1)
    mask = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    ids = llm.generate(embeddings, mask, 12, llm.prefix(torch.tensor(prompter.before)))
    return prompter.decode(ids[0])
