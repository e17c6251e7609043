"""Rank all pairs of vision towers and LLMs with one hypernetwork, and hand over the best pair as an MLLM.

accelerate launch recipes/mllm.py                                 # the built-in default: no hub, no data needed
accelerate launch recipes/mllm.py --dry-run                       # check everything and print the bill
accelerate launch recipes/mllm.py --run runs/mine --data.train '{"llava:mix.json,images/": 0}' ...
"""

import shutil
from functools import partial
from pathlib import Path

from accelerate import Accelerator

from hyma_mllm import answered, command, launch, mllm, mllm_export, report
from hyma_mllm.data.question_sets import read_questions
from hyma_mllm.data.token_library import TokenLibrary
from hyma_mllm.export import best_unit
from hyma_mllm.mllm_placement import placed
from hyma_mllm.objectives.causal_lm import CausalObjective
from hyma_mllm.report_answers import answer_table, pair_table
from hyma_mllm.run_directory import RunDirectory
from hyma_mllm.search.interrupt import stop_requests
from hyma_mllm.search.ledger import Cost, load_ledgers, save_ledgers
from hyma_mllm.search.methods import Search
from hyma_mllm.search.mllm_prepare import prepare_mllm
from hyma_mllm.search.mllm_score import prior_scores, score_answers
from hyma_mllm.search.ranking import SearchResult
from hyma_mllm.search.session import check_batch, hold_inputs, print_sizes, run_all

FINISHED = ("ranking.json", "ledger.json", "best/hyma.json", answered.ANSWERS, "ranking.png")
"""Files of a finished run."""


def main() -> None:
    """The method, from two shelves of models to the best pair."""
    config, dry_run = launch.parse(mllm.MLLMConfig, Path(__file__).with_suffix(".yaml"), mllm.SHORTCUTS)
    accelerator = launch.start(config)
    mllm.print_bill(config, mllm.check(config), accelerator, accelerator.print)
    if dry_run:
        return
    command.hide_loading_bars()
    launch.in_run_directory(config, accelerator, FINISHED, search, show)


def search(config: mllm.MLLMConfig, accelerator: Accelerator, run: RunDirectory) -> None:
    """Fill the run directory."""
    towers, llms = config.tower_cards(), config.llm_cards()
    with stop_requests() as stop:
        # Questions about pictures, split so that no concept of the tests was ever trained on.
        with accelerator.main_process_first():
            questions = read_questions(config.data, run.path / "bad_rows.jsonl")
        about = questions.about
        taken = {"questions taken": about["questions taken"]}
        hold_inputs(run, about["fingerprints"] | taken | {card.id: card.revision for card in [*towers, *llms]})
        check_batch(config.search.batch, len(questions.train))

        # Frozen towers turn pictures into tokens, once; frozen LLMs stay in memory.
        placement = placed(config, accelerator)
        library = TokenLibrary(config.tokens, accelerator)
        limits = config.llm.max_length, config.answer_batch, config.llm.longest_answer
        load = partial(config.llm.load, device=accelerator.device)
        task = prepare_mllm(towers, llms, load, placement, questions, library, score_answers, *limits)
        bill = library.bill
        embedding = Cost(samples_per_pair=bill.items / len(towers), flops=bill.flops, seconds=bill.seconds)
        if accelerator.is_main_process:
            mllm_export.save_folding(run.path, task, [config.search.spec(name) for name in config.search.connectors])

        # One hypernetwork learns the projectors of all pairs; the rivals learn theirs one by one.
        objective = partial(CausalObjective, config.objective)
        search = Search(
            config.search, config.hypernetwork, objective, task, *task.means(), accelerator, run, stop, placement
        )
        print_sizes(search, accelerator.print)
        rankings, ledgers = run_all(search, embedding)
        if not accelerator.is_main_process:
            return

        # The ranking, its price, the best pair as a model, its answers, and a picture of it all.
        result = SearchResult(
            case="mllm",
            vision=[{"id": card.id, "revision": card.revision, "width": card.width} for card in towers],
            text=[{"id": card.id, "revision": card.revision, "width": card.width} for card in llms],
            tasks=list(rankings[0].scores),
            rankings=rankings,
            config=config.resolved(),
            data=about | {"prior": prior_scores(questions.train, questions.tests)},
        )
        result.save(run.path / "ranking.json")
        save_ledgers(run.path / "ledger.json", ledgers)
        method = config.search.handed_over()
        models = [reader.model for reader in task.readers.values()]
        mllm_export.stitch(run.path, method=method, models=models).save_pretrained(run.path / "best")
        answered.write_answers(run, task, result, config.search, *best_unit(result, method))
        shutil.rmtree(run.path / "checkpoints", ignore_errors=True)
        report.heat_map(result, run.path / "ranking.png")  # the last of `FINISHED`: nothing is left to do behind it


def show(run: Path) -> None:
    """Write the report and print its summary."""
    page = report.write_report(run)
    result = SearchResult.load(run / "ranking.json")
    command.console().print(report.summary_table(result, load_ledgers(run / "ledger.json")))
    for connector in result.connectors:
        command.console().print(pair_table(result, report.main_method(result, connector) or "", connector))
    command.console().print(answer_table(run))
    print(f"Best pair: {run / 'best'}")
    print(f'Ask it: hyma answer {run / "best"} picture.jpg "What is this?"')
    print(f"Report: {page}")


if __name__ == "__main__":
    command.run(main, mllm.WHEN_FULL)
