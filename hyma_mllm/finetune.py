"""Stage 2: low-rank adapters on the LLM of an exported MLLM, its projector trained along, on instruction data.

LoRA (arXiv 2106.09685, section 4.1) or, over a 4-bit LLM, QLoRA (arXiv 2305.14314, section 3); rates for adapter and
projector as in LLaVA-1.5's LoRA recipe (arXiv 2310.03744). The vision tower stays frozen and in eval mode.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator, skip_first_batches
from torch import Tensor, nn
from tqdm import tqdm

from hyma_mllm.data.manifest import hash_file
from hyma_mllm.data.pictures import open_picture
from hyma_mllm.data.prompts import IGNORE, Encoded, Prompter, Turn, collate
from hyma_mllm.data.questions import open_questions
from hyma_mllm.data.questions_audit import audit_questions
from hyma_mllm.data.rows import Row, Source
from hyma_mllm.errors import HymaError
from hyma_mllm.finetune_state import Order, seed_step
from hyma_mllm.search.engine import SHARDING
from hyma_mllm.search.optimiser import OptimiserConfig
from hyma_mllm.stitched.config import DataCredit
from hyma_mllm.stitched.mllm import StitchedMLLM, check_files
from hyma_mllm.stitched.mllm_config import FILE_NAME, MLLMConfig
from hyma_mllm.zoo.llm_quantise import close_repacking, quantisation_config

PROJECTOR = "multi_modal_projector"
_NOT_QUANTISED = ["model.vision_tower", f"model.{PROJECTOR}", "lm_head"]


@dataclass
class FinetuneConfig:
    """Tune the LLM of an exported MLLM with low-rank adapters, and its projector.

    Attributes:
        model: directory of the exported MLLM.
        data: questions with answers, as recipes/mllm.py names them, e.g. `llava:mix.json,images/`.
        out: run directory; gets `adapter/`, `merged/` and `log.jsonl`.
        limit: train on so many rows, the first ones; 0 takes all.
        max_bad_fraction: share of unreadable rows above which the training stops.
        max_length: tokens of a conversation at most, picture included.
        epochs: passes over the data.
        batch: rows of one step in each process.
        accumulate: batches summed up before a step of the optimiser.
        lr: peak learning rate of the adapters.
        projector_lr: peak learning rate of the projector.
        warmup: share of the steps over which the rates rise from 0; they fall by a cosine behind it.
        clip: largest norm of the gradient.
        rank: of the adapters.
        alpha: adapters are scaled by alpha / rank.
        dropout: share of an adapter's inputs that is dropped while training.
        quantisation: `nf4` keeps the LLM in 4 bits while training (QLoRA); the merged model is not quantised.
        dtype: of the frozen weights; adapters and projector are trained in fp32 always.
        checkpointing: recompute activations in the backward pass: less memory, about a third slower.
        checkpoint_every: optimiser steps between checkpoints, from which the same command goes on; one more is kept at
            the end of every epoch, and 0 leaves it at those.
        seed: of order, adapters and dropout.
    """

    model: Path = Path("runs/mllm/best")
    data: str = "questions:easy-vqa/train"
    out: Path = Path("runs/finetune")
    limit: int = 0
    max_bad_fraction: float = 0.01
    max_length: int = 512
    epochs: int = 1
    batch: int = 8
    accumulate: int = 1
    lr: float = 2e-4
    projector_lr: float = 2e-5
    warmup: float = 0.03
    clip: float = 1.0
    rank: int = 16
    alpha: int = 32
    dropout: float = 0.05
    quantisation: Literal["none", "nf4"] = "none"
    dtype: Literal["fp32", "bf16"] = "bf16"
    checkpointing: bool = False
    checkpoint_every: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_length", "epochs", "batch", "accumulate", "lr", "projector_lr", "clip", "rank", "alpha"):
            if getattr(self, name) <= 0:
                raise HymaError(f"{name} is {getattr(self, name)}; it must be above 0.")
        for name in ("limit", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise HymaError(f"{name} is {getattr(self, name)}; it must be 0 or above.")
        for name in ("warmup", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise HymaError(f"{name} is {getattr(self, name)}; it is a share, at least 0 and below 1.")

    def resolved(self, processes: int) -> dict[str, Any]:
        """Plain values: everything that decides the result, each of the processes taking rows of its own."""
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(self).items()}
        for free in ("out", "checkpointing", "checkpoint_every"):
            plain.pop(free)
        return plain | {"processes": processes}


@dataclass(frozen=True)
class Example:
    """One conversation about one picture.

    Attributes:
        row: where it comes from; its picture is opened when its turn comes.
        encoded: ids and labels behind the picture.
    """

    row: Row
    encoded: Encoded


def check(config: FinetuneConfig) -> MLLMConfig:
    """Everything that can be wrong with the directories, before a weight is read.

    Raises:
        HymaError: no exported MLLM there, or a built-in set without its part.
    """
    if config.data.startswith("questions:") and "/" not in config.data:
        raise HymaError(f"{config.data} holds its test questions too; write {config.data}/train.")
    found = MLLMConfig.read(config.model)
    check_files(config.model)
    return found


def check_engine(accelerator: Accelerator) -> None:
    """Refuse launchers that shard: adapters are kept and saved as whole copies.

    Raises:
        HymaError: DeepSpeed or FSDP was started.
    """
    if accelerator.distributed_type in SHARDING:
        raise HymaError(
            f"The launcher started {accelerator.distributed_type.value}, which this recipe does not train by; launch "
            "with accelerate_configs/multi_gpu.yaml."
        )


def load(config: FinetuneConfig, device: torch.device) -> StitchedMLLM:
    """The exported MLLM in the dtype of training, its LLM in 4 bits where that is asked for."""
    dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
    if config.quantisation == "none":
        return StitchedMLLM.from_pretrained(config.model, device, dtype)
    packing = quantisation_config(config.quantisation, dtype)
    packing.llm_int8_skip_modules = _NOT_QUANTISED
    options = {"quantization_config": packing, "device_map": {"": str(device)}}
    stitched = StitchedMLLM.from_pretrained(config.model, device, dtype, **options)
    stitched.model = close_repacking(stitched.model)
    return stitched


def with_adapters(stitched: StitchedMLLM, config: FinetuneConfig) -> Any:
    """The model with adapters on every linear layer of the LLM, its projector trainable, all of that in fp32.

    Returns:
        A `peft.PeftModel`.
    """
    from peft import LoraConfig, get_peft_model  # slow to import, and --help needs it not

    model = stitched.model
    if config.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layers = [
        name
        for name, module in model.named_modules()
        if ".language_model." in f".{name}." and isinstance(module, nn.Linear)
    ]
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=layers,
        modules_to_save=[PROJECTOR],
    )
    adapted = get_peft_model(model, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def read_rows(config: FinetuneConfig) -> tuple[Source, list[Row], int]:
    """The data, read and checked before a weight is: its source, the good rows, and how many were refused.

    Raises:
        HymaError: no such source, or too many rows without a readable picture, a question or an answer.
    """
    source = open_questions(config.data)
    checked = audit_questions(source, config.max_bad_fraction)
    return source, checked.rows[: config.limit] if config.limit else checked.rows, len(checked.bad)


def encode_rows(config: FinetuneConfig, stitched: StitchedMLLM, rows: Sequence[Row]) -> list[Example]:
    """Every row through the chat template of the exported directory, checked.

    Raises:
        HymaError: a row whose labels do not align, by its key.
    """
    tokenizer, settings = stitched.processor.tokenizer, stitched.model.config
    prompter = Prompter(tokenizer, stitched.config.llm.id, config.max_length, settings.image_seq_length)
    start = (*prompter.before, *[settings.image_token_id] * settings.image_seq_length)
    examples = []
    for row in tqdm(rows, desc="prompts", unit="row"):
        encoded = prompter.encode(row.key, _turns(row))
        whole = Encoded(start + encoded.after, (IGNORE,) * len(start) + encoded.labels, encoded.cut)
        examples.append(Example(row, whole))
    return examples


def _turns(row: Row) -> list[Turn]:
    """A conversation's own turns, or the question with its commonest answer."""
    if row.turns:
        return [Turn(question, answer) for question, answer in row.turns]
    commonest = max(dict.fromkeys(row.answers), key=row.answers.count)
    return [Turn(row.question or "", commonest)]


class Collate:
    """Examples as the model's inputs, right padded; an object, so that it can be sent to worker processes."""

    def __init__(self, image_processor: Any, pad: int) -> None:
        self.image_processor, self.pad = image_processor, pad

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask`, `labels` [batch, length] int64, `pixel_values` [batch, 3, side, side]."""
        text = collate([example.encoded for example in examples], self.pad)
        pictures = [open_picture(example.row.image) for example in examples]
        pixels: Tensor = self.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        mask = text.mask.long()
        return {"input_ids": text.after, "attention_mask": mask, "labels": text.labels, "pixel_values": pixels}


def build_optimiser(model: nn.Module, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW with a rate for the adapters and one for the projector."""
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [parameter for name, parameter in trainable if PROJECTOR not in name], "lr": config.lr},
        {"params": [parameter for name, parameter in trainable if PROJECTOR in name], "lr": config.projector_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def steps_per_epoch(loader: Any, config: FinetuneConfig) -> int:
    """Optimiser steps of one epoch; the last may be of fewer batches."""
    return math.ceil(len(loader) / config.accumulate)


def train(
    model: Any,
    loader: Any,
    order: Order,
    optimiser: Any,
    config: FinetuneConfig,
    accelerator: Accelerator,
    start: int = 0,
) -> Iterator[dict[str, Any]]:
    """Train all epochs, or what is left of them.

    Args:
        model: what `with_adapters` gives, prepared by the accelerator.
        loader: batches of `Collate`, prepared.
        order: of the rows that the loader takes.
        optimiser: prepared.
        config: of the training.
        accelerator: that prepared them.
        start: optimiser steps that are done; model and optimiser are as they were behind them.

    Yields:
        `step`, `loss` (mean of its batches on the main process) and `lr` of every step of the optimiser.

    Raises:
        HymaError: the loss is not a number, or a batch does not fit into the device's memory.
    """
    epoch_steps = steps_per_epoch(loader, config)
    schedule = OptimiserConfig(lr=1.0, warmup=config.warmup)
    peaks = config.lr, config.projector_lr
    model.train()
    # Its batch norms must not learn, and transformers calls nothing that keeps it in eval mode.
    accelerator.unwrap_model(model).base_model.model.model.vision_tower.eval()
    step, losses = start, list[float]()
    for epoch in range(start // epoch_steps, config.epochs):
        order.epoch = epoch
        done = step % epoch_steps * config.accumulate
        for batch in skip_first_batches(loader, done) if done else loader:
            share = schedule.rate(step, config.epochs * epoch_steps)
            for group, peak in zip(optimiser.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            if not losses:
                seed_step(config.seed, step, accelerator.process_index)
            with accelerator.accumulate(model):
                losses.append(_forward_and_back(model, batch, accelerator))
                if not math.isfinite(losses[-1]):
                    raise HymaError(f"The loss is {losses[-1]} at step {step}; lower --lr and --projector_lr.")
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), config.clip)
                optimiser.step()
                optimiser.zero_grad()
            if accelerator.sync_gradients:
                yield {"step": step, "loss": sum(losses) / len(losses), "lr": peaks[0] * share}
                step, losses = step + 1, []


def _forward_and_back(model: Any, batch: dict[str, Tensor], accelerator: Accelerator) -> float:
    """The loss of a batch, its gradient added to those that are there."""
    try:
        loss = model(**batch).loss
        accelerator.backward(loss)
    except torch.OutOfMemoryError as error:
        raise HymaError(
            f"A batch of {len(batch['input_ids'])} conversations of {batch['input_ids'].shape[1]} tokens does not fit "
            "into the device's memory; lower --batch or --max_length, or set --checkpointing true or --quantisation."
        ) from error
    return float(loss.item())


def inputs(config: FinetuneConfig, about: MLLMConfig, source: Source, rows: int) -> dict[str, str]:
    """What is read -> a fingerprint of it: the data and which of its rows, and the exported model by its card."""
    card = hash_file(config.model / FILE_NAME)
    return {source.name: f"{source.fingerprint[:16]}-{rows}", about.model_id: card[:16]}


def merge(config: FinetuneConfig, source: Source, rows: int) -> StitchedMLLM:
    """The exported MLLM with the trained adapters folded into its weights, which are those of the file, not 4-bit ones.

    Its scores are dropped: they were measured before.

    Args:
        config: of the training; `out/adapter` has been written.
        source: what it was trained on.
        rows: how many rows of it.
    """
    from peft import PeftModel

    stitched = StitchedMLLM.from_pretrained(config.model)
    merged = PeftModel.from_pretrained(stitched.model, str(config.out / "adapter")).merge_and_unload()
    method = "QLoRA" if config.quantisation == "nf4" else "LoRA"
    told = f"{method} of rank {config.rank} on the LLM and the projector, {rows} rows, {config.epochs} epochs"
    credit = DataCredit(source.name, source.licence, source.fingerprint)
    after = replace(stitched.config, tuned=told, scores={}, blind={}, data=(*stitched.config.data, credit))
    return StitchedMLLM(merged, stitched.processor, after)


def is_finished(out: Path) -> bool:
    """Whether this directory holds a merged model already."""
    return (out / "merged" / FILE_NAME).is_file()
