"""The questions of a run: sources opened, audited, cut to balanced subsets, and parted into training and tests."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from hyma_mllm.data.prompts import SHORT_ANSWER
from hyma_mllm.data.questions import QuestionSource, SplitShares, open_questions
from hyma_mllm.data.questions_audit import audit_questions
from hyma_mllm.data.questions_balance import balanced
from hyma_mllm.data.rows import Row
from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text

logger = logging.getLogger(__name__)

DEFAULT_TRAIN = {"questions:easy-vqa": 1600, "questions:corpora": 1600, "questions:captions": 400}
DEFAULT_TESTS = {"questions:easy-vqa": 200, "questions:corpora": 200}


@dataclass
class QuestionConfig:
    """Which questions, and how they are split.

    Attributes:
        train: source -> questions at most, balanced over types and answers; 0 takes all. Sources: `questions:easy-vqa`,
            `questions:corpora`, `questions:captions`, `llava:FILE.json,IMAGES`, `vqa:QUESTIONS,ANNOTATIONS,IMAGES`,
            `textvqa:`, `gqa:`, `pope:`, `scienceqa:`; empty takes the built-in ones.
        tests: likewise, of which the held-out part is asked; the first set ranks the pairs.
        validation_limit: questions in all that the search watches while it trains, from the sources of `train`.
        suffix: what every question of one turn ends in, in training and in tests.
        max_bad_fraction: share of refused rows above which the run stops.
        validation: share of the pictures or concepts that are watched, where no split is published.
        test: share that is held out, where no split is published.
        split_seed: of the split and of the subsets.
    """

    train: dict[str, int] = field(default_factory=dict)
    tests: dict[str, int] = field(default_factory=dict)
    validation_limit: int = 120
    suffix: str = SHORT_ANSWER
    max_bad_fraction: float = 0.01
    validation: float = 0.1
    test: float = 0.15
    split_seed: int = 0

    def __post_init__(self) -> None:
        for name, limit in [*self.train.items(), *self.tests.items(), ("validation_limit", self.validation_limit)]:
            if limit < 0:
                raise HymaError(f"The limit of {name} is {limit}; give a number of questions, or 0 for all.")
        if self.validation <= 0 or self.test <= 0 or self.validation + self.test >= 1:
            raise HymaError(
                f"data.validation is {self.validation} and data.test is {self.test}; both must be above 0 and leave "
                "a part for training."
            )
        name, count = Counter(map(set_name, self.tests)).most_common(1)[0] if self.tests else ("", 0)
        if count > 1:
            raise HymaError(
                f"data.tests lists {count} sources that are both called {name}; rename a file or leave one out."
            )

    def train_limits(self) -> dict[str, int]:
        """Source -> limit, the built-in ones when none is listed."""
        return self.train or DEFAULT_TRAIN

    def test_limits(self) -> dict[str, int]:
        """Source -> limit, the built-in ones when none is listed."""
        return self.tests or DEFAULT_TESTS

    def shares(self) -> SplitShares:
        """The split of sources that have none of their own."""
        return SplitShares(self.split_seed, self.validation, self.test)


@dataclass
class QuestionSets:
    """The questions of a run.

    Attributes:
        train, validation: rows of each.
        tests: test set -> rows; the first one ranks.
        suffix: what every question of one turn ends in.
        about: what ranking.json says of them: fingerprints, rows, splits, attribution.
    """

    train: list[Row]
    validation: list[Row]
    tests: dict[str, list[Row]]
    suffix: str
    about: dict[str, Any] = field(default_factory=dict)

    def all_rows(self) -> list[Row]:
        """Training, validation, then every test set."""
        return [*self.train, *self.validation, *(row for rows in self.tests.values() for row in rows)]


def set_name(spec: str) -> str:
    """`questions:easy-vqa/test` -> `easy-vqa`; of files the form and the file's name."""
    form, _, place = spec.partition(":")
    return place.split("/")[0] if form == "questions" else f"{form} {Path(place.split(',')[0]).stem}"


def read_questions(config: QuestionConfig, bad_rows: Path) -> QuestionSets:
    """Open, audit, split and cut every source; refused rows are counted, logged and listed in `bad_rows` (JSON lines).

    The list holds `source`, `key` and `reason` a line; it is written as well when the rows are refused as a whole.

    Raises:
        HymaError: a source that cannot be had, too many bad rows, or a part without any question.
    """
    specs = dict.fromkeys([*config.train_limits(), *config.test_limits()])
    sources = {spec: open_questions(spec, config.shares()) for spec in specs}
    refused: list[dict[str, str]] = []
    good: dict[str, set[str]] = {}
    for spec, source in sources.items():
        # Every row is looked at before the source is refused, so that the list names all that is to be mended.
        checked = audit_questions(source, max_bad_fraction=1.0)
        refused += [{"source": source.name, "key": bad.key, "reason": bad.reason} for bad in checked.bad]
        write_text(bad_rows, "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in refused))
        mend = f"mend those listed in {bad_rows} or raise data.max_bad_fraction"
        checked.refuse_if_bad(source.name, config.max_bad_fraction, mend)
        good[spec] = {row.key for row in checked.rows}
        logger.info("%s: %d questions, %d refused", source.name, len(checked.rows), len(checked.bad))

    def part(spec: str, name: str, limit: int) -> list[Row]:
        rows = [row for row in sources[spec].parts[name] if row.key in good[spec]]  # type: ignore[index]
        return balanced(rows, limit, config.split_seed)

    train = [row for spec, limit in config.train_limits().items() for row in _some(part(spec, "train", limit), spec)]
    watched = [spec for spec in config.train_limits() if spec in config.test_limits()] or list(config.train_limits())
    share = -(-config.validation_limit // len(watched)) if config.validation_limit else 0
    validation = [row for spec in watched for row in part(spec, "validation", share)]
    tests: dict[str, list[Row]] = {}
    for spec, limit in config.test_limits().items():
        tests[set_name(spec)] = _some(part(spec, "test", limit), spec)
    _warn_of_seen(train, tests)
    found = QuestionSets(train, validation, tests, config.suffix)
    found.about = _about(list(sources.values()), found)
    return found


def _some(rows: list[Row], spec: str) -> list[Row]:
    if not rows:
        raise HymaError(f"{spec} has no question in the part that is asked for; name another source, or other shares.")
    return rows


def _warn_of_seen(train: Sequence[Row], tests: dict[str, list[Row]]) -> None:
    """Each source keeps its own parts apart, but two sources may ask about the same pictures."""
    seen = {row.image for row in train}
    for name, rows in tests.items():
        count = sum(row.image in seen for row in rows)
        if count:
            logger.warning(
                "%d of the %d questions of %s are about pictures that are trained on", count, len(rows), name
            )


def _about(sources: Sequence[QuestionSource], sets: QuestionSets) -> dict[str, Any]:
    chosen = sha256("\0".join(row.key for row in sets.all_rows()).encode()).hexdigest()
    return {
        "fingerprints": {source.name: source.fingerprint for source in sources},
        "questions taken": chosen,
        "attribution": [{"name": source.name, "licence": source.licence, "origin": ""} for source in sources],
        "splits": {"train": len(sets.train), "validation": len(sets.validation)}
        | {name: len(rows) for name, rows in sets.tests.items()},
    }


def asked(row: Row, suffix: str) -> str:
    """The words of a question as an LLM reads them; conversations and caption requests keep their own."""
    return (row.question or "") + ("" if row.turns else suffix)
