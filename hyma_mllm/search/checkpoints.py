"""Checkpoints of one training: written whole or not at all, and resumed exactly."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from hyma_mllm.errors import HymaError
from hyma_mllm.paths import write_text
from hyma_mllm.search.engine import Engine

KEPT = 2


@dataclass
class Checkpoints:
    """The checkpoints of one training, in a directory of their own.

    Attributes:
        directory: holds one `step-<n>` directory per checkpoint.
        accelerator: of all processes.
        identity: what the training is; a checkpoint of another identity is refused.
        engine: saves and loads model, optimiser and random number states.
    """

    directory: Path
    accelerator: Accelerator
    identity: dict[str, Any]
    engine: Engine

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
            write_text(
                partial / "progress.json",
                json.dumps({"identity": self.identity, "engine": self.engine.kind, "step": step, **progress}),
            )
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
            progress: dict[str, Any] = json.loads((newest / "progress.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise HymaError(f"{damaged} ({error}).") from error
        # Through JSON, because that is where the other one has been.
        mine = json.loads(json.dumps(self.identity))
        if progress["identity"] != mine:
            changed = [key for key in mine if progress["identity"].get(key) != mine[key]]
            raise HymaError(
                f"The checkpoint {newest} is of another configuration ({', '.join(changed)} differ); "
                "give the old values back, or set --run to a new directory."
            )
        if (written := progress.get("engine", "")) != self.engine.kind:
            raise HymaError(
                f"The checkpoint {newest} was written by {written or 'whole copies'}, and this is "
                f"{self.engine.kind or 'whole copies'}; launch as before, or set --run to a new directory."
            )
        try:
            self.engine.load(newest)
        except (OSError, RuntimeError, SafetensorError, UnpicklingError) as error:
            raise HymaError(f"{damaged} ({str(error).splitlines()[0]}).") from error
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
