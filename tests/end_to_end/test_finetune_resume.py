"""recipes/finetune.py stopped in the middle: the same command goes on, and ends as if nothing had happened."""

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import finetune_run as runs
import pytest
import torch
import yaml

from hyma_mllm import finetune, finetune_state
from hyma_mllm.run_directory import RunDirectory

# Eight rows one by one, three to a step: an epoch is of 3 + 3 + 2.
STEPS = 6
TRAINING = ("--batch", 1, "--accumulate", 3, "--epochs", 2, "--dropout", 0.3, "--dtype", "fp32")
TRAINING += ("--lr", 0.01, "--projector_lr", 0.01, "--checkpoint_every", 2)


class CrashError(Exception):
    pass


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    exported = runs.export_model(tmp_path_factory.mktemp("model"))
    data = runs.write_data(tmp_path_factory.mktemp("data"))
    return lambda out, *more: runs.options(exported, data, out, *TRAINING, *more)


@pytest.fixture(scope="module")
def whole(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert runs.call(*command(out)) == 0
    assert len((out / "log.jsonl").read_text().splitlines()) == STEPS
    return out


@contextmanager
def at_step(step: int, act: Callable[[Path], None]) -> Iterator[None]:
    """Do something in place of writing the log line of a step, which is the first sign of it on disk."""
    plain = finetune_state.write_log

    def write(run: Path, entry: dict[str, Any]) -> None:
        act(run) if entry["step"] == step else plain(run, entry)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune_state, "write_log", write)
        yield


def crash(run: Path) -> None:
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 0, "lo')
    raise CrashError


@pytest.fixture(scope="module")
def torn(command: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that crashed before its first checkpoint, in both epochs, and then at its last step."""
    out = tmp_path_factory.mktemp("torn") / "out"
    for step, kept in ((1, []), (3, [2, 3]), (5, [3, 4])):
        with at_step(step, crash), pytest.raises(CrashError):
            runs.call(*command(out))
        assert sorted(out.glob("checkpoints/*")) == [out / f"checkpoints/step-{number:08d}" for number in kept]
    return out


@pytest.fixture
def out(torn: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(torn, tmp_path / "out")
    return tmp_path / "out"


def test_a_crashed_run_goes_on_bit_for_bit(command, whole, out, capsys):
    assert runs.call(*command(out)) == 0
    assert f"Going on from step 4 of {STEPS}." in capsys.readouterr().out
    runs.assert_same(out, whole)


def test_a_signal_saves_the_step_at_which_it_came(command, whole, tmp_path, capsys):
    out, first = tmp_path / "out", (whole / "log.jsonl").read_bytes().splitlines(keepends=True)[0]

    def stop(run: Path) -> None:
        (run / "log.jsonl").write_bytes(first)
        signal.raise_signal(signal.SIGTERM)

    # How often to checkpoint decides nothing and may change in between.
    with at_step(0, stop):
        assert runs.call(*command(out, "--checkpoint_every", 0)) == 128 + signal.SIGTERM
    assert f"Stopped by SIGTERM at step 1 of {STEPS}; the state is saved, run the same" in capsys.readouterr().err
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
    assert runs.call(*command(out)) == 0
    runs.assert_same(out, whole)


def test_another_configuration_other_data_and_a_live_run_are_refused(command, out, monkeypatch, capsys):
    before = runs.names(out)
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "read_rows", lambda config: pytest.fail("before anything is read"))
        assert runs.call(*command(out, "--lr", 0.02)) == 2
        assert "(lr was 0.01 and is 0.02); give the old values back, or set --out to" in capsys.readouterr().err
        live = RunDirectory(out, yaml.safe_load((out / "config.yaml").read_text()))
        assert runs.call(*command(out)) == 2
        assert f"{out} is in use by a live run; wait for it, stop it, or set --out" in capsys.readouterr().err
        live.close()
    monkeypatch.setattr(finetune, "inputs", lambda *_: {"mix": "other"})
    assert runs.call(*command(out)) == 2
    assert "mix has changed since the run" in capsys.readouterr().err
    assert runs.names(out) == before


def test_a_damaged_checkpoint_is_named(command, out, capsys):
    newest = out / "checkpoints" / "step-00000004"
    content = (newest / "tuned.pt").read_bytes()
    weights = torch.load(newest / "tuned.pt", weights_only=True)["weights"]
    place = content.index(max(weights.values(), key=torch.numel).numpy().tobytes())
    flipped = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    for damaged in (b"", content[: len(content) // 2], flipped):
        (newest / "tuned.pt").write_bytes(damaged)
        assert runs.call(*command(out)) == 2
        assert f"error: The checkpoint {newest} is damaged; remove that directory" in capsys.readouterr().err


def test_a_kill_behind_the_export_leaves_nothing_to_do(command, whole, capsys):
    (whole / "checkpoints" / "step-00000006").mkdir(parents=True)
    assert runs.call(*command(whole)) == 0
    assert "finished before" in capsys.readouterr().out
    assert not (whole / "checkpoints").exists()
