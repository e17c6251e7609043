"""Secrets taken out of what is written down: command lines, messages of other programs, addresses."""

import re
from collections.abc import Sequence

HIDDEN = "***"

_NAME = r"[\w.-]*(?:token|secret|passw(?:or)?d|credentials?|api[_-]?key|access[_-]?key|auth)(?![a-zA-Z])[\w-]*"
_OPTION = re.compile(rf"--?{_NAME}", re.IGNORECASE)
_PATTERNS = (
    # user:password@ or token@ in an address
    (re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*://)[^/\s@]+@"), rf"\1{HIDDEN}@"),
    # ?token=..., &X-Amz-Signature=..., and `name=value` or `name: value` elsewhere
    (
        re.compile(rf"((?:{_NAME}|sig|[\w-]*signature)['\"]?\s*[=:]\s*['\"]?)[^\s'\"&,;}}]+", re.IGNORECASE),
        rf"\1{HIDDEN}",
    ),
    (re.compile(r"(\bbearer\s+)\S+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # keys that tell by their first letters whose they are: model hub, git hosts, cloud, trackers
    # (a folder of a feature store begins with hf__, and names of packages with sk- or pypi-)
    (re.compile(r"\b(?:hf_|npm_|AKIA|ASIA)[A-Za-z0-9]{16,}"), HIDDEN),
    (re.compile(r"\b(?:gh[pousr]_|github_pat_|glpat-|sk-|pypi-)[A-Za-z0-9_-]{20,}"), HIDDEN),
)


def redacted(text: str) -> str:
    """The text without passwords in addresses, values of options named like secrets, and well-known forms of keys."""
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return text


def redacted_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line word by word, `redacted`; the word behind an option named like a secret is hidden whole."""
    hidden = {number + 1 for number, word in enumerate(arguments) if _OPTION.fullmatch(word)}
    return [
        HIDDEN if number in hidden and not word.startswith("--") else redacted(word)
        for number, word in enumerate(arguments)
    ]
