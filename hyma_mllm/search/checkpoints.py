"""Checkpoints of one training: written whole or not at all, and resumed exactly."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator

from hyma_mllm.data.manifest import hash_file
from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, parse_json, reason
from hyma_mllm.paths import write_text

KEPT = 2


class State(Protocol):
    """What a checkpoint keeps.

    Attributes:
        kind: names the layout; empty for one whole copy.
    """

    kind: str

    def save(self, directory: Path) -> None:
        """Write it, every process its part."""

    def load(self, directory: Path) -> None:
        """Read it back, in every process."""


@dataclass
class Checkpoints:
    """The checkpoints of one training, in a directory of their own.

    Attributes:
        directory: holds one `step-<n>` directory per checkpoint.
        accelerator: of all processes.
        identity: what the training is; a checkpoint of another identity is refused.
        engine: saves and loads model, optimiser and random number states.
        option: of the command line that names the run directory.
    """

    directory: Path
    accelerator: Accelerator
    identity: dict[str, Any]
    engine: State
    option: str = "--run"

    def save(self, step: int, progress: dict[str, Any]) -> None:
        """Write the checkpoint of this step, then drop all but the newest `KEPT`."""
        final = self.directory / f"step-{step:08d}"
        partial = self.directory / f".step-{step:08d}.tmp"
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.engine.save(partial)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            told = {"identity": self.identity, "engine": self.engine.kind, "step": step, "files": _hashes(partial)}
            write_text(partial / "progress.json", json.dumps(told | progress))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in self._all()[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def resume(self) -> dict[str, Any] | None:
        """Load the newest checkpoint into the prepared objects; its progress, or None where there is none.

        Raises:
            HymaError: the checkpoint belongs to another configuration, or is damaged.
        """
        found = self._all()
        if not found:
            return None
        newest = found[-1]
        damaged = f"The checkpoint {newest} is damaged; remove that directory and run the same command again"
        try:
            progress: dict[str, Any] = parse_json((newest / "progress.json").read_bytes())
            theirs: dict[str, Any] = dict(progress["identity"])
        except (LookupError, TypeError, ValueError) as error:
            raise HymaError(f"{damaged} ({reason(error)}).") from error
        # Through JSON, because that is where the other one has been.
        mine = json.loads(json.dumps(self.identity))
        if theirs != mine:
            changed = [key for key in {**mine, **theirs} if theirs.get(key) != mine.get(key)]
            raise HymaError(
                f"The checkpoint {newest} is of another configuration ({', '.join(changed)} differ); "
                f"give the old values back, or set {self.option} to a new directory."
            )
        if (written := progress.get("engine", "")) != self.engine.kind:
            raise HymaError(
                f"The checkpoint {newest} was written by {written or 'whole copies'}, and this is "
                f"{self.engine.kind or 'whole copies'}; launch as before, or set {self.option} to a new directory."
            )
        try:
            # A flipped bit, or what a machine that lost power did not write, may still load.
            if _hashes(newest) != progress["files"]:
                raise ValueError("a file is not as it was written")
            self.engine.load(newest)
        except (KeyError, *UNREADABLE) as error:
            raise HymaError(f"{damaged} ({reason(error)}).") from error
        return progress

    def restore(self) -> None:
        """Load model and optimiser of the newest checkpoint, and nothing of its progress.

        Raises:
            HymaError: there is none.
        """
        found = self._all()
        if not found:
            raise HymaError(
                f"The training is to be rolled back, and {self.directory} holds no checkpoint; set "
                "search.checkpoint_every above 0, or lower search.optimiser.lr."
            )
        self.engine.load(found[-1])

    def _all(self) -> list[Path]:
        return sorted(path for path in self.directory.glob("step-*") if (path / "progress.json").exists())


def _hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint but `progress.json`, which tells them."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "progress.json")
    return {str(path.relative_to(directory)): hash_file(path) for path in files}
