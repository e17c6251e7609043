"""The json files of question sets, read with checks that name the file, the row and the field."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from hyma_mllm.errors import HymaError, near_names
from hyma_mllm.foreign import parse_json, reason

Value = TypeVar("Value")

ANNOTATORS = 10


def read_json(file: Path) -> Any:
    """The whole of a json file.

    Raises:
        HymaError: it does not exist, is no json, or a name stands twice in one object, where json keeps the last alone.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        held = dict(pairs)
        if len(held) < len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise HymaError(f"The name {twice:.200} stands twice in one object of {file}; make the ids unique.")
        return held

    try:
        return parse_json(_text(file), once)
    except json.JSONDecodeError as error:
        raise HymaError(
            f"{file} is no json: {error.msg} in line {error.lineno}, column {error.colno}; mend or fetch it again."
        ) from error
    except ValueError as error:
        raise HymaError(f"{file} is no json that can be used: {reason(error)}; mend or fetch it again.") from error


def read_json_lines(file: Path) -> Iterator[Any]:
    """The values of a file with one json value a line; empty lines are passed over.

    Raises:
        HymaError: it does not exist, or a line is no json.
    """
    for number, line in enumerate(_text(file).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield parse_json(line)
        except ValueError as error:
            said = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else reason(error)
            raise HymaError(f"Line {number} of {file} is no json: {said}; mend or remove the line.") from error


@dataclass(frozen=True)
class Entry:
    """One question of a file, whose fields are read with checks.

    Attributes:
        file: where it stands.
        place: how a message names it, e.g. `row 3` or `question 01`.
        cells: its fields.
    """

    file: Path
    place: str
    cells: Mapping[str, Any]

    def text(self, name: str) -> str:
        """A field that must be a text or a number, and not empty."""
        value = self.required(name)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or not str(value).strip():
            raise self.wrong(name, "give a text")
        return str(value).strip()

    def list(self, name: str) -> list[Any]:
        """A field that must be a list with something in it."""
        value = self.required(name)
        if not isinstance(value, list) or not value:
            raise self.wrong(name, "give a list that is not empty")
        return value

    def required(self, name: str) -> Any:
        """A field that must be there."""
        if name not in self.cells:
            near = near_names(name, self.cells) if self.cells else "it is empty"
            raise HymaError(f"In {self.file} {self.place} has no field {name}; {near}; mend the file.")
        return self.cells[name]

    def wrong(self, name: str, mend: str) -> HymaError:
        """The error for a field with a value that does not fit."""
        return HymaError(f"In {self.file} {self.place} has the {name} {self.cells[name]!r:.80}; {mend}.")


def entries(file: Path, values: Iterable[Any], name: Callable[[int], str] = "row {}".format) -> Iterator[Entry]:
    """An `Entry` for each value, every one of which must be a mapping.

    Raises:
        HymaError: one is not.
    """
    for number, value in enumerate(values):
        if not isinstance(value, Mapping):
            raise HymaError(f"In {file} {name(number)} is {value!r:.80}; it must be a json object with named fields.")
        yield Entry(file, name(number), value)


def listed_under(file: Path, key: str) -> list[Any]:
    """The list that stands under `key` in a json file.

    Raises:
        HymaError: there is none, or it is empty.
    """
    held = read_json(file)
    if not isinstance(held, Mapping) or not isinstance(held.get(key), list) or not held[key]:
        raise HymaError(f"{file} holds no list under `{key}`; give the file of this form that its publisher offers.")
    found: list[Any] = held[key]
    return found


@dataclass
class Unique:
    """Refuses an id that stands twice in a file.

    Attributes:
        file: for the message.
        seen: id -> where it stood first.
    """

    file: Path
    seen: dict[str, str] = field(default_factory=dict)

    def check(self, identity: str, place: str) -> str:
        """The id itself.

        Raises:
            HymaError: it stood before.
        """
        if identity in self.seen:
            raise HymaError(
                f"The id {identity} stands twice in {self.file}, in {self.seen[identity]} and {place} (counted from "
                "0); make the ids unique."
            )
        self.seen[identity] = place
        return identity


@dataclass
class PictureFolder:
    """Finds the pictures that questions name.

    Attributes:
        folder: where they lie.
        found: name -> file, of those looked for already.
    """

    folder: Path
    found: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise HymaError(f"The picture folder {self.folder} does not exist; mend the last part of the spec.")

    def find(self, entry: Entry, *names: str) -> Path:
        """The first of `names` (relative to the folder, the plainest last) that exists.

        Raises:
            HymaError: none does.
        """
        key = names[-1]
        if key not in self.found:
            there = next((path for path in (self.folder / name for name in names) if _is_file(path)), None)
            if there is None:
                raise HymaError(
                    f"{entry.place[:1].upper()}{entry.place[1:]} of {entry.file} asks about {key}, which is not in "
                    f"{self.folder}; add the picture, or take the question out."
                )
            self.found[key] = there
        return self.found[key]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for any file
        return False


def repeated(answer: str) -> tuple[str, ...]:
    """A single right answer in ten-annotator form."""
    return (answer,) * ANNOTATORS


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise HymaError(f"The question file {file} does not exist; mend the spec.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise HymaError(f"{file} cannot be read as UTF-8 text: {error}; mend or fetch it again.") from error
