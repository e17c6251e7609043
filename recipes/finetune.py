"""Tune an exported MLLM on instructions: low-rank adapters on its LLM, its projector along, its vision tower frozen.

accelerate launch recipes/finetune.py --model runs/mllm/best --data llava:mix.json,images/ --out runs/tuned
accelerate launch recipes/finetune.py --model runs/mllm/best --data questions:easy-vqa/train --quantisation nf4
"""

from pathlib import Path
from typing import Any

import jsonargparse
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from hyma_mllm import command, finetune, launch
from hyma_mllm.finetune import FinetuneConfig


def main() -> None:
    """From an exported MLLM to an adapter and a merged MLLM."""
    config, dry_run = parse()
    if finetune.is_finished(config.out):
        print(f"{config.out} was finished before; set --out to a new directory for another.")
        return
    about = finetune.check(config)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.dtype == "bf16" else "no", gradient_accumulation_steps=config.accumulate
    )
    set_seed(config.seed)
    command.hide_loading_bars()

    # The data, and the model as it was exported, whose own chat template the data goes through.
    source, rows, refused = finetune.read_rows(config)
    stitched = finetune.load(config, accelerator.device)
    examples = finetune.encode_rows(config, stitched, rows)
    adapted = finetune.with_adapters(stitched, config)
    trainable = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    cut = sum(example.encoded.cut > 0 for example in examples)
    accelerator.print(
        f"{about.model_id}: {trainable / 1e6:.2f} M trainable weights; {source.name}: {len(rows)} rows, "
        f"{refused} refused, {cut} cut; {config.epochs} epochs"
    )
    if dry_run:
        return

    # Adapters and projector learn the answers; everything else is frozen.
    tokenizer = stitched.processor.tokenizer
    collate = finetune.Collate(stitched.processor.image_processor, tokenizer.pad_token_id)
    loader: Any = DataLoader(examples, batch_size=config.batch, shuffle=True, collate_fn=collate)  # type: ignore[arg-type]
    optimiser = finetune.build_optimiser(adapted, config)
    adapted, optimiser, loader = accelerator.prepare(adapted, optimiser, loader)
    total = config.epochs * -(-len(loader) // config.accumulate)
    steps = finetune.train(adapted, loader, optimiser, config, accelerator)
    with tqdm(steps, total=total, desc="finetune", unit="step", disable=not accelerator.is_main_process) as bar:
        for entry in bar:
            bar.set_postfix(loss=f"{entry['loss']:.3f}")
            if accelerator.is_main_process:
                finetune.write_log(config.out / "log.jsonl", entry)

    # The adapter for peft, and a directory that loads as before.
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        accelerator.unwrap_model(adapted).save_pretrained(config.out / "adapter")
        finetune.merge(config, source, len(rows)).save_pretrained(config.out / "merged")
        print(f"Adapter: {config.out / 'adapter'}")
        print(f"Merged model: {config.out / 'merged'}")
    accelerator.end_training()


def parse() -> tuple[FinetuneConfig, bool]:
    """Read the command line: (configuration, dry run?)."""
    parser = jsonargparse.ArgumentParser(
        description=__doc__, default_config_files=[str(Path(__file__).with_suffix(".yaml"))]
    )
    parser.add_argument("--config", action="config", help="YAML file; later options win over it")
    parser.add_argument("--dry-run", action="store_true", help="check everything, say what would be trained, and stop")
    parser.add_class_arguments(FinetuneConfig)
    with launch.readable_options():
        found = parser.instantiate_classes(parser.parse_args())
    names = FinetuneConfig.__dataclass_fields__
    return FinetuneConfig(**{name: found[name] for name in names}), bool(found["dry_run"])


if __name__ == "__main__":
    command.run(main)
