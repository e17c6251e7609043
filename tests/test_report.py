import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from hyma_mllm.errors import HymaError
from hyma_mllm.report import (
    cost_rows,
    format_bytes,
    format_flops,
    format_interval,
    format_seconds,
    heat_map,
    main_method,
    ranked_pairs,
    summary_table,
    write_report,
)
from hyma_mllm.report_log import read_log, smooth
from hyma_mllm.report_plots import cost_figure
from hyma_mllm.search.ledger import Cost, Ledger, save_ledgers
from hyma_mllm.search.ranking import Interval, Ranking, SearchResult

EVIL = "<script>alert(1)</script>"


def search(seeds=2, methods=("hyma", "grid", "random")):
    generator = np.random.default_rng(0)
    vision = [{"id": f"v{n}", "revision": "r", "width": 4} for n in range(2)]
    text = [{"id": name, "revision": "r", "width": 4} for name in ("t0", "t1", f"t2{EVIL}")]
    rankings = [
        Ranking(method, "linear", seed, {"retrieval": [10 * p + generator.random() for p in range(6)]})
        for method in methods
        for seed in range(seeds)
    ]
    data = {"note": f"no photographs {EVIL}", "attribution": [{"name": "Stamps", "licence": "CC0"}, "A sentence"]}
    data |= {"rows": {"stamps": 12}, "splits": {"train": 9, "test": 3}}
    result = SearchResult("vlm", vision, text, ["retrieval"], rankings, config={"steps": 4}, data=data)
    bills = {"hyma": 2e12, "grid": 3e13}
    ledgers = [
        Ledger(
            ranking.method,
            "linear",
            ranking.seed,
            {
                "embedding": Cost(seconds=61.0, peak_bytes=2**30),
                "training": Cost(512.0, 20, bills.get(ranking.method, 0.0), 5.0 + ranking.seed, 2**20),
                "evaluation": Cost(flops=7e9, seconds=1.0, peak_bytes=2**21),
            },
            batch=64,
        )
        for ranking in rankings
    ]
    return result, ledgers


@pytest.fixture
def run(tmp_path):
    result, ledgers = search()
    result.save(tmp_path / "ranking.json")
    save_ledgers(tmp_path / "ledger.json", ledgers)
    lines = [
        {"event": "step", "method": "hyma", "connector": "linear", "seed": 0, "step": s, "losses": {"0": 1 / s, "4": s}}
        for s in range(1, 5)
    ]
    scores = {"retrieval": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    lines += [lines[0] | {"event": "evaluation", "step": s, "scores": scores} for s in (2, 4)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"event": "st')
    (tmp_path / "examples").mkdir()
    Image.new("RGB", (400, 300), "red").save(tmp_path / "examples" / "a.png")
    hits = [{"image": "examples/a.png", "caption": EVIL, "rank": 1, "right": True}]
    hits += [{"image": "examples/lost.png", "caption": "lost", "rank": 2, "right": False}]
    example = {"kind": "best", "query": f"red {EVIL}", "image": "examples/a.png", "retrieved": hits}
    (tmp_path / "examples.json").write_text(json.dumps([example]))
    return tmp_path


def test_the_page_is_self_contained_and_escaped(run):
    page = write_report(run).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not re.search(r"https?:|@import|url\(", page)


def test_the_page_says_what_the_run_found(run):
    page = write_report(run).read_text()
    assert "no photographs" in page
    assert page.count("data:image/svg+xml") == 3  # heat map, cost against agreement, learning curves
    assert page.count("data:image/png") == 2
    assert "picture missing" in page
    assert "1 line(s) of log.jsonl could not be read: 7" in page
    assert "Stamps" in page and "A sentence" in page and "stamps 12" in page and "train 9" in page
    assert page.count("embedding, once for all") == 1 and "1 min 01 s" in page
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page)
    grid = cells.index("grid")
    assert cells[grid : grid + 11] == [
        *("grid", "linear", "2", "64", "512", "20", "30 T", "7 G", "5.5 s", "1.0 s", "2 MiB"),
    ]


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run).read_bytes()
    assert write_report(run).read_bytes() == first


def test_a_run_without_log_and_examples_says_so(run):
    (run / "log.jsonl").unlink()
    (run / "examples.json").unlink()
    page = write_report(run).read_text()
    assert "left no log" in page and "kept no example" in page


def test_one_seed_one_method_has_a_page_too(tmp_path):
    result, ledgers = search(seeds=1, methods=("grid",))
    result.save(tmp_path / "ranking.json")
    save_ledgers(tmp_path / "ledger.json", ledgers)
    assert "one seed, so no intervals" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("name", ["../secret.png", "secret.png"])
def test_a_picture_outside_the_examples_is_refused(run, name):
    Image.new("RGB", (4, 4)).save(run / "secret.png")
    content = (run / "examples.json").read_text().replace("examples/lost.png", name)
    (run / "examples.json").write_text(content)
    with pytest.raises(HymaError, match="lies outside"):
        write_report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("content", ["{", "[3]", '[{"kind": "best"}]'])
def test_broken_examples_are_refused(run, content):
    (run / "examples.json").write_text(content)
    with pytest.raises(HymaError, match=r"examples.json is not a list of retrievals"):
        write_report(run)


def test_a_missing_ledger_is_refused(run):
    (run / "ledger.json").unlink()
    with pytest.raises(HymaError, match=r"ledger.json cannot be read"):
        write_report(run)


def test_costs_are_means_over_seeds_with_the_highest_peak():
    rows = cost_rows(*search())
    assert [row.method for row in rows] == ["hyma", "random", "grid"]
    assert (rows[0].training_seconds, rows[0].peak_bytes, rows[0].samples_per_pair) == (5.5, 2**21, 512.0)


def test_a_ranking_stands_beside_the_oracles():
    result, _ = search(methods=("hyma", "grid"))
    for ranking in result.rankings:
        ranking.scores["retrieval"] = [1.0, 3.0, 2.0, 0.0, 0.0, 0.0]
    result.rankings[0].scores["retrieval"] = [5.0, 3.0, 2.0, 0.0, 0.0, 0.0]  # hyma, seed 0: mean of pair 0 is 3
    first, second = ranked_pairs(result, "hyma", "linear", "retrieval")[:2]
    assert (first.place, first.pair, first.score.mean, first.oracle_place) == (1, "v0 + t0", 3.0, 3)
    assert (second.pair, second.oracle_place, second.oracle_score.mean) == ("v0 + t1", 1, 3.0)


def test_the_main_method_is_hyma_where_it_ran():
    assert main_method(search()[0], "linear") == "hyma"
    assert main_method(search(methods=("grid", "constrained-grid", "random"))[0], "linear") == "constrained-grid"
    assert main_method(search(methods=("grid", "random"))[0], "linear") == "grid"


def test_the_summary_names_the_best_pair_and_the_bill():
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(summary_table(*search()))
    text = console.export_text()
    hyma = next(line for line in text.splitlines() if "hyma" in line)
    assert f"v1 + t2{EVIL}" in hyma and "1.00 ± 0.00" in hyma and "2 T" in hyma and "6.5 s" in hyma
    assert "once for all methods: 1 min 01 s" in text


def test_the_heat_map_is_a_picture(tmp_path):
    heat_map(search()[0], tmp_path / "heat.png")
    with Image.open(tmp_path / "heat.png") as image:
        assert image.format == "PNG" and image.width > 400
    with pytest.raises(HymaError, match="no task vqa"):
        heat_map(search()[0], tmp_path / "heat.png", task="vqa")


def test_a_figure_without_any_paid_method_can_be_drawn():
    assert cost_figure([], "grid").axes[0].get_xscale() == "log"


def test_the_log_keeps_the_last_line_of_a_step_and_skips_other_events(tmp_path):
    key = {"method": "hyma", "connector": "linear", "seed": 0}
    lines = [key | {"step": 1, "losses": {"3": 9.0}}, {"event": "resumed", "step": 1}, {"event": "step", "step": 1}]
    lines += [key | {"event": "step", "step": 1, "losses": {"3": 2.0, "5": None}}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = read_log(tmp_path / "log.jsonl")
    assert [curves.losses for curves in log.curves] == [{3: {1: 2.0}}]
    assert log.damaged == [3]


def test_smoothing_keeps_the_mean_and_leaves_out_what_is_not_finite():
    assert smooth({1: 1.0, 2: 3.0, 3: math.nan, 4: 5.0}, 2) == ([1.5, 4.0], [2.0, 5.0])
    assert smooth({1: math.inf}, 2) == ([], [])
    middles, means = smooth(dict.fromkeys(range(1000), 7.0), 60)
    assert len(middles) == 60 and set(means) == {7.0}


def test_numbers_are_readable():
    assert format_interval(Interval(0.961, 0.94, 0.982)) == "0.961 ± 0.021"
    assert format_interval(Interval(0.5, math.nan, math.nan), 1) == "0.5"
    assert format_interval(None) == format_interval(Interval(math.nan, math.nan, math.nan)) == "–"
    assert [format_flops(v) for v in (24.87e12, 2.5e15, 3e6, 12)] == ["24.9 T", "2.5 P", "3 M", "12"]
    assert [format_seconds(v) for v in (4.21, 185, 3725, 59.99)] == ["4.2 s", "3 min 05 s", "1 h 02 min", "60.0 s"]
    assert [format_bytes(v) for v in (3 * 2**20, 3 * 2**30)] == ["3 MiB", "3.00 GiB"]


def test_a_method_without_scores_has_an_order_and_no_score(tmp_path):
    """The bests are those of the order: of a similarity, and of a race whose winner's test score is not the highest."""
    result, ledgers = search()
    cka = [Ranking("cka", "linear", seed, {}, {}, [0.1, 0.2, 0.3, 0.4, 0.9, 0.5]) for seed in range(2)]
    race = [
        Ranking("halving", "linear", seed, {"retrieval": [9.0, 7, 1, 1, 1, 1]}, {}, [1e3, 2e3, 0, 1, 2, 3])
        for seed in range(2)
    ]
    result.rankings[:0] = [*cka, *race]
    ledgers[:0] = [Ledger("cka", "linear", seed, {"evaluation": Cost(flops=5e6, seconds=0.5)}) for seed in range(2)]
    result.save(tmp_path / "ranking.json")
    save_ledgers(tmp_path / "ledger.json", ledgers)
    console = Console(file=io.StringIO(), width=220)
    console.print(summary_table(result, ledgers))
    lines = {line.split("│")[2].strip(): line for line in console.file.getvalue().splitlines() if line.count("│") > 3}
    row = [cell.strip() for cell in lines["cka"].split("│")]
    assert row[3:5] == ["v1 + t1", "–"] and row[8:10] == ["0", "0"]
    row = [cell.strip() for cell in lines["halving"].split("│")]
    assert row[3:5] == ["v0 + t1", "7.0"]
    assert ranked_pairs(result, "halving", "linear", "retrieval")[0].pair == "v0 + t1"
    page = write_report(tmp_path).read_text()
    assert "<td>cka</td>" in page
    assert (
        main_method(SearchResult("vlm", result.vision, result.text, ["retrieval"], cka + race), "linear") == "halving"
    )
    assert main_method(SearchResult("vlm", result.vision, result.text, ["retrieval"], cka), "linear") is None
