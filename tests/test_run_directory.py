import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from hyma_mllm import launch
from hyma_mllm.errors import HymaError
from hyma_mllm.run_directory import RunDirectory


def test_another_configuration_is_refused_and_named(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "run", {"search": {"steps": 3}}).close()
    RunDirectory(tmp_path / "run", {"search": {"steps": 3}}).close()
    with pytest.raises(HymaError, match=r"search\.steps was 3 and is 4"):
        RunDirectory(tmp_path / "run", {"search": {"steps": 4}})


def test_a_live_run_keeps_others_out(tmp_path: Path) -> None:
    path = tmp_path / "run"
    held = RunDirectory(path, {})
    code = (
        "from pathlib import Path; from hyma_mllm.run_directory import RunDirectory; from hyma_mllm import command; "
        f"command.run(lambda: RunDirectory(Path({str(path)!r}), {{}}))"
    )
    second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert second.returncode == 2
    assert "in use by a live run" in second.stderr
    held.close()
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_where_the_main_process_is_refused_the_others_end_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for it, and say at length that a connection broke."""
    heard: list[bool] = []

    def tell(told: list[bool]) -> None:
        heard.extend(told)
        told[0] = True

    monkeypatch.setattr(launch, "broadcast_object_list", tell)
    work = Mock()
    config = SimpleNamespace(run=tmp_path / "run", resolved=dict, tracker=None)
    (tmp_path / "run").write_text("a file")
    with pytest.raises(HymaError, match="which is a file"):
        launch.in_run_directory(config, SimpleNamespace(is_main_process=True), (), work, work)
    with pytest.raises(SystemExit) as end:
        launch.in_run_directory(config, SimpleNamespace(is_main_process=False), (), work, work)
    assert (end.value.code, heard, work.called) == (2, [True, False], False)


def test_a_strangers_directory_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(HymaError, match="holds files but no run"):
        RunDirectory(tmp_path, {})
    with pytest.raises(HymaError, match="is a file"):
        RunDirectory(tmp_path / "thesis.txt", {})
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_log_lines_and_broken_json(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run", {})
    run.log("step", step=1)
    run.log("step", step=2)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"event": "step", "step": 1}, {"event": "step", "step": 2}]
    (run.path / "x.json").write_text("{")
    with pytest.raises(HymaError, match=r"x\.json is not readable JSON"):
        run.read_json("x.json")
    assert run.read_json("missing.json") is None
