"""Tune an exported MLLM on instructions: low-rank adapters on its LLM, its projector along, its vision tower frozen.

accelerate launch recipes/finetune.py --model runs/mllm/best --data llava:mix.json,images/ --out runs/tuned
accelerate launch recipes/finetune.py --model runs/mllm/best --data questions:easy-vqa/train --quantisation nf4

Killed or stopped, the same command goes on from its last checkpoint.
"""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jsonargparse
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from hyma_mllm import command, finetune, finetune_state, launch
from hyma_mllm.finetune import Collate, Example, FinetuneConfig
from hyma_mllm.run_directory import RunDirectory, check_run
from hyma_mllm.search.checkpoints import Checkpoints
from hyma_mllm.search.interrupt import StopRequest, stop_requests
from hyma_mllm.search.session import hold_inputs


def main() -> None:
    """From an exported MLLM to an adapter and a merged MLLM."""
    config, dry_run = parse()
    if finetune.is_finished(config.out):
        finetune_state.remove_checkpoints(config.out)  # a kill may have come just before
        print(f"{config.out} was finished before; set --out to a new directory for another.")
        return
    about = finetune.check(config)
    accelerator = Accelerator(
        mixed_precision="bf16" if config.dtype == "bf16" else "no", gradient_accumulation_steps=config.accumulate
    )
    finetune.check_engine(accelerator)
    writes, resolved = accelerator.is_main_process, config.resolved(accelerator.num_processes)
    launch.agreed(lambda: check_run(config.out, resolved, "--out") if writes else None)
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

    with closing(launch.agreed(lambda: RunDirectory(config.out, resolved, writes, "--out"))) as run:
        hold_inputs(run, finetune.inputs(config, about, source, len(rows)))
        processor = stitched.processor
        collate = finetune.Collate(processor.image_processor, processor.tokenizer.pad_token_id)
        with stop_requests() as stop:
            adapted = tune(config, accelerator, adapted, examples, collate, stop)

            # The adapter for peft, and a directory that loads as before.
            if writes:
                adapted.save_pretrained(config.out / "adapter")
                finetune.merge(config, source, len(rows)).save_pretrained(config.out / "merged")
                finetune_state.remove_checkpoints(config.out)
                print(f"Adapter: {config.out / 'adapter'}")
                print(f"Merged model: {config.out / 'merged'}")
        accelerator.end_training()


def tune(
    config: FinetuneConfig,
    accelerator: Accelerator,
    adapted: Any,
    examples: Sequence[Example],
    collate: Collate,
    stop: StopRequest,
) -> Any:
    """Adapters and projector learn the answers, from the last checkpoint on; everything else is frozen."""
    order = finetune_state.Order(len(examples), config.seed)
    loader: Any = DataLoader(examples, batch_size=config.batch, sampler=order, collate_fn=collate)  # type: ignore[arg-type]
    optimiser = finetune.build_optimiser(adapted, config)
    adapted, optimiser, loader = accelerator.prepare(adapted, optimiser, loader)

    identity = config.resolved(accelerator.num_processes)
    state = finetune_state.Tuned(adapted, optimiser, accelerator)
    checkpoints = Checkpoints(config.out / finetune_state.FOLDER, accelerator, identity, state, "--out")
    epoch = finetune.steps_per_epoch(loader, config)
    total = config.epochs * epoch
    progress = finetune_state.Progress(checkpoints, config.checkpoint_every, epoch, total, stop)
    start = progress.resume(config.out)
    steps = finetune.train(adapted, loader, order, optimiser, config, accelerator, start)
    writes = accelerator.is_main_process
    bar = tqdm(steps, total=total, initial=start, desc="finetune", unit="step", disable=not writes)
    with stop.watched(), bar:
        for entry in bar:
            bar.set_postfix(loss=f"{entry['loss']:.3f}")
            if writes:
                finetune_state.write_log(config.out, entry)
            progress.passed(entry["step"] + 1)
    return accelerator.unwrap_model(adapted)


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
