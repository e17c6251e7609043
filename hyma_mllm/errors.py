"""The one error that a user can cause, and the near names offered for a misspelt one."""

import difflib
from collections.abc import Iterable

LISTED = 100
"""Known names that a message lists at most."""


class HymaError(Exception):
    """A user's mistake: one sentence that names the file, the row, the value and the mend.

    Every command line turns it into that sentence on stderr and exit code 2.
    """


def near_names(name: str, known: Iterable[str]) -> str:
    """A clause for an error message: the known names closest to `name`, or all of them if none is close."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    # The names may be those of a user's file, which may hold any number of any length.
    listed = ", ".join(one if len(one) <= 200 else f"{one[:197]}..." for one in known[:LISTED])
    return f"known are {listed}" + (f" and {len(known) - LISTED} others" if len(known) > LISTED else "")
