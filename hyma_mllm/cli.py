"""`hyma`: the habits. Tables of models and corpora, a run's report, a pair's export, its answers, imported features."""

import sys
from pathlib import Path

import jsonargparse
from rich import box
from rich.markup import escape
from rich.table import Table

from hyma_mllm import command
from hyma_mllm.answer import answer
from hyma_mllm.data.corpora import CORPORA, default_corpora
from hyma_mllm.zoo.text import TEXT_CARDS, text_on_disk
from hyma_mllm.zoo.vision import DEFAULT_IMAGE_IDS, IMAGE_CARDS, image_card, image_on_disk


def zoo() -> None:
    """Print every packaged model: id, kind, width, tokens, resolution, parameters, licence, source, on disk or not."""
    from hyma_mllm.zoo.llm import DEFAULT_LLM_IDS, LLM_CARDS, llm_on_disk
    from hyma_mllm.zoo.vision_tokens import DEFAULT_TOWER_IDS, tower_card, tower_on_disk

    console = command.console()
    sizes = Table(title="Packaged models (*: in a default run)", box=box.SIMPLE_HEAD, pad_edge=False)
    origins = Table(title="Where they come from", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("id", "kind", "width", "tokens", "resolution", "parameters", "on disk"):
        sizes.add_column(heading, no_wrap=True, justify="left" if heading in ("id", "kind", "on disk") else "right")
    for heading in ("id", "licence", "from"):
        origins.add_column(heading, no_wrap=heading == "id")
    variants = [image_card(name) for name in DEFAULT_IMAGE_IDS if name not in IMAGE_CARDS]
    cards = [(card, image_on_disk(card)) for card in [*IMAGE_CARDS.values(), *variants]]
    cards += [(card, text_on_disk(card)) for card in TEXT_CARDS.values()]
    cards += [(card, tower_on_disk(card)) for card in map(tower_card, DEFAULT_TOWER_IDS)]
    cards += [(card, llm_on_disk(card)) for card in LLM_CARDS.values()]
    defaults = {*DEFAULT_IMAGE_IDS, *DEFAULT_TOWER_IDS, *DEFAULT_LLM_IDS}
    for card, present in cards:
        chosen = card.id in defaults or (card.kind == "text" and not card.opt_in)
        sizes.add_row(
            f"{card.id}{' *' if chosen else ''}",
            "tower" if card.id in DEFAULT_TOWER_IDS else card.kind,
            str(card.width),
            str(card.tokens or ""),
            f"{card.resolution} px" if card.resolution else "",
            f"{card.parameters / 1e6:.1f} M",
            "yes" if present else "no",
        )
        origins.add_row(card.id, card.licence, card.source)
    console.print(sizes, origins)
    console.print(
        "Others are named timm:NAME, hf:ID or directory, st:ID or directory, gguf:FILE (an LLM); ID@8+11 joins blocks "
        "8 and 11 of an image encoder, ID:128px gives it smaller pictures, ID#2 lists a model a second time.",
        highlight=False,
    )


def corpus() -> None:
    """Print every built-in corpus: pairs, licence, whom to name, packages, on disk or not."""
    table = Table(title="Built-in corpora", box=box.SIMPLE_HEAD, pad_edge=False)
    table.caption = "*: in the default run on this system. All are illustrations and cut-outs, not natural photographs."
    for heading in ("id", "pairs", "licence", "attribution", "from", "here"):
        table.add_column(heading, no_wrap=heading in ("id", "pairs", "licence", "here"))
    chosen = default_corpora()
    for name, entry in CORPORA.items():
        table.add_row(
            f"{name}{' *' if name in chosen else ''}",
            str(entry.pairs),
            entry.licence,
            entry.attribution,
            "\n".join(entry.packages),
            "yes" if entry.on_disk() else "no",
        )
    command.console().print(table)


def report_run(run: Path) -> None:
    """Write report.html of a run again and print its summary.

    Args:
        run: the run directory.
    """
    from hyma_mllm import report
    from hyma_mllm.report_answers import answer_table, pair_table
    from hyma_mllm.search.ledger import load_ledgers
    from hyma_mllm.search.ranking import SearchResult

    page = report.write_report(run)
    result = SearchResult.load(run / "ranking.json")
    command.console().print(report.summary_table(result, load_ledgers(run / "ledger.json")))
    if result.case == "mllm":
        for connector in result.connectors:
            command.console().print(pair_table(result, report.main_method(result, connector) or "", connector))
        command.console().print(answer_table(run))
    print(f"Report: {page}")


def export_pair(
    run: Path,
    pair: str | None = None,
    connector: str | None = None,
    method: str = "hyma",
    to: Path | None = None,
) -> None:
    """Write one pair of a run as a stitched model.

    Args:
        run: the run directory, of recipes/vlm.py or recipes/mllm.py.
        pair: `image encoder,text encoder` or `tower,LLM`; the best on validation if left out.
        connector: family of connectors; the pair's best if left out.
        method: whose connectors, `hyma`, `grid` or another whose connectors the run keeps.
        to: directory to write; `exports/<pair>` in the run directory if left out.
    """
    from hyma_mllm import export, mllm_export
    from hyma_mllm.search.ranking import SearchResult

    command.hide_loading_bars()
    if SearchResult.load(run / "ranking.json").case == "mllm":
        mllm = mllm_export.stitch(run, pair, connector, method)
        sides = mllm.config.vision.id, mllm.config.llm.id
        save = mllm.save_pretrained
    else:
        vlm = export.stitch(run, pair, connector, method)
        sides = vlm.config.vision_id, vlm.config.text_id
        save = vlm.save_pretrained
    target = to or run / "exports" / "+".join(sides).replace("/", "_").replace(":", "_")
    save(target)
    print(f"{' + '.join(sides)} -> {target}")


def import_features(directory: Path, target: Path) -> None:
    """Import files of features (.pt, .npy, .safetensors), for `recipes/vlm.py --data.stores TARGET`.

    Args:
        directory: holds files of the authors' release, e.g. vit_s16.pt and minilm.pt, or folders `images` and `texts`
            of files that are named after their models; each file one tensor [rows, width], row k for picture k.
        target: directory to write.
    """
    from hyma_mllm.data.store_directory import import_directory

    table = Table(title=f"Imported to {escape(str(target))}", box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("id", "kind", "rows", "width", "stored as", "MB", "store"):
        table.add_column(heading, no_wrap=True, justify="right" if heading in ("rows", "width", "MB") else "left")
    for store in import_directory(directory, target):
        manifest = store.manifest
        size = sum((store.path / shard.file).stat().st_size for shard in manifest.shards)
        table.add_row(
            escape(manifest.model),
            manifest.kind,
            str(manifest.rows),
            str(manifest.width),
            manifest.dtype,
            f"{size / 1e6:.1f}",
            escape(str(store.path.relative_to(target))),
        )
    command.console().print(table)
    print(f"Search them: accelerate launch recipes/vlm.py --data.stores {target}")


# Commands import their rooms when called: those take seconds, and `hyma --help` needs none of them.


def by_place(arguments: list[str]) -> list[str]:
    """`answer DIR PICTURE QUESTION` with the question as an option: jsonargparse takes by place only what is required.

    Args:
        arguments: what was typed behind `hyma`.
    """
    if arguments[:1] != ["answer"]:
        return arguments
    named = {number for number, word in enumerate(arguments) if word.startswith("--") and "=" not in word}
    plain = [n for n, word in enumerate(arguments) if not word.startswith("--") and n - 1 not in named]
    question = plain[3] if len(plain) > 3 else None  # behind `answer`, the directory and the picture
    return [f"--question={word}" if n == question else word for n, word in enumerate(arguments)]


def main() -> None:
    """Entry point of the `hyma` command."""
    commands = {
        "zoo": zoo,
        "corpus": corpus,
        "import": import_features,
        "report": report_run,
        "export": export_pair,
        "answer": answer,
    }
    command.run(lambda: jsonargparse.auto_cli(commands, args=by_place(sys.argv[1:]), as_positional=True))


if __name__ == "__main__":
    main()
