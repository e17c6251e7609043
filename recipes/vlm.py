"""Rank all pairs of image encoders and text encoders with one hypernetwork, and hand over the best pair.

accelerate launch recipes/vlm.py                                  # the built-in default: no hub, no data needed
accelerate launch recipes/vlm.py --dry-run                        # check everything and print the bill
accelerate launch recipes/vlm.py --run runs/mine --data.sources '[photos/]' --search.steps 500
accelerate launch recipes/vlm.py --run runs/cc3m --data.stores features/   # features made elsewhere: `hyma import`
"""

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hyma_mllm import command, export, launch, report, vlm
from hyma_mllm.data.collection import attribution, collect, open_sources
from hyma_mllm.data.library import Library
from hyma_mllm.examples import write_examples
from hyma_mllm.objectives.contrastive import ContrastiveObjective
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.free import labels_of
from hyma_mllm.search.imported import describe_imported, hand_over_imported, prepare_imported
from hyma_mllm.search.interrupt import stop_requests
from hyma_mllm.search.ledger import Cost, load_ledgers, save_ledgers
from hyma_mllm.search.methods import Search
from hyma_mllm.search.prepare import Prepared, prepare, split_rows
from hyma_mllm.search.ranking import SearchResult
from hyma_mllm.search.session import FINISHED, check_batch, hold_inputs, print_sizes, run_all

NOTE = (
    "Scores are retrieval and zero-shot accuracy on held-out concepts. The built-in corpora are illustrations and "
    "cut-outs; no natural photographs with captions are to be had as a package."
)

Inputs = tuple[Prepared, dict[str, Any], Cost]
"""The task with its features, what ranking.json says of the data, and what the features cost."""


def main() -> None:
    """The method, from two shelves of models to the best pair."""
    config, dry_run = launch.parse(vlm.VLMConfig, Path(__file__).with_suffix(".yaml"))
    accelerator = launch.start(config)
    vlm.print_bill(config, vlm.check(config), accelerator, accelerator.print)
    if dry_run:
        return
    command.hide_loading_bars()
    launch.in_run_directory(config, accelerator, FINISHED, search, show)


def from_pictures(config: vlm.VLMConfig, accelerator: Accelerator, run: RunDirectory) -> Inputs:
    """Frozen models turn pictures and captions into features, once."""
    images, texts = config.image_cards(), config.text_cards()
    with accelerator.main_process_first():
        sources = open_sources(config.data)
        parts = collect(sources, config.data, run.path / "bad_rows.jsonl")
    fingerprints = {part.source.name: part.fingerprint for part in parts}
    hold_inputs(run, fingerprints | {card.id: card.revision for card in [*images, *texts]})
    split = split_rows(parts, config.data.validation, config.data.test, config.data.split_seed)
    check_batch(config.search.batch, len(split.train))
    library = Library(config.embedding, accelerator)
    prepared = prepare(images, texts, parts, split, library, config.standardise)
    rows = {part.source.name: len(part.rows) for part in parts}
    about = {"note": NOTE, "attribution": attribution(sources), "fingerprints": fingerprints, "rows": rows}
    bill = library.bill
    return prepared, about, Cost(samples_per_pair=len(prepared.rows), flops=bill.flops, seconds=bill.seconds)


def from_stores(stores: Path, config: vlm.VLMConfig, accelerator: Accelerator, run: RunDirectory) -> Inputs:
    """Features are there already (`hyma import`), and cost nothing here."""
    images, texts = config.image_cards(), config.text_cards()
    hold_inputs(run, {card.id: card.revision for card in [*images, *texts]})
    prepared = prepare_imported(stores, images, texts, config.data, config.standardise, accelerator.device)
    check_batch(config.search.batch, len(prepared.split.train))
    return prepared, describe_imported(stores, prepared), Cost()


def search(config: vlm.VLMConfig, accelerator: Accelerator, run: RunDirectory) -> None:
    """Fill the run directory."""
    images, texts, stores = config.image_cards(), config.text_cards(), config.data.stores
    with stop_requests() as stop:
        given = from_stores(stores, config, accelerator, run) if stores else from_pictures(config, accelerator, run)
        prepared, about, embedding = given
        split = prepared.split
        if accelerator.is_main_process:
            export.save_standardisers(run.path, prepared.image_standardisers, prepared.text_standardisers)

        # One hypernetwork learns the connectors of all pairs; the rivals learn theirs one by one.
        means = prepared.vision_means, prepared.text_means
        objective = partial(ContrastiveObjective, config.objective)
        prepared.task.tiled = config.objective.tile > 0
        search = Search(config.search, config.hypernetwork, objective, prepared.task, *means, accelerator, run, stop)
        search.labels = labels_of(prepared.rows)
        print_sizes(search, accelerator.print)
        rankings, ledgers = run_all(search, embedding)
        if not accelerator.is_main_process:
            return

        # The ranking, its price, the best pair as a model, and a picture of it all.
        result = SearchResult(
            case="vlm",
            vision=[{"id": card.id, "revision": card.revision, "width": card.width} for card in images],
            text=[{"id": card.id, "revision": card.revision, "width": card.width} for card in texts],
            tasks=list(next(ranking.scores for ranking in rankings if ranking.scores)),
            rankings=rankings,
            config=config.resolved(),
            data=about
            | {
                "splits": {"train": len(split.train), "validation": len(split.validation), "test": len(split.test)},
            },
        )
        result.save(run.path / "ranking.json")
        save_ledgers(run.path / "ledger.json", ledgers)
        hand_over(run.path, prepared, result, config.search.handed_over())


def hand_over(run: Path, prepared: Prepared, result: SearchResult, method: str) -> None:
    """Write the best pair as a model, what it finds, and the heat map; the checkpoints have served."""
    if prepared.rows:
        model = export.stitch(run, method=method)
        model.save_pretrained(run / "best")
        write_examples(run, prepared, model)
    else:
        hand_over_imported(run, lambda: export.stitch(run, method=method).save_pretrained(run / "best"))
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    report.heat_map(result, run / "ranking.png")  # the last file of `FINISHED`: nothing may be left to do behind it


def show(run: Path) -> None:
    """Write the report and print its summary."""
    page = report.write_report(run)
    result = SearchResult.load(run / "ranking.json")
    command.console().print(report.summary_table(result, load_ledgers(run / "ledger.json")))
    if (run / "best").exists():
        print(f"Best pair: {run / 'best'}")
    print(f"Report: {page}")


if __name__ == "__main__":
    command.run(main)
