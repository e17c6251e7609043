"""Claims: one holder a shard, takeover of what the dead and the silent hold, and never the file of the new owner."""

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hyma_mllm.data import claims as module
from hyma_mllm.data.claims import Claims, Owner, claim_name, claimed_shards


def dead_owner() -> Owner:
    """A process of this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    started = psutil.Process(process.pid).create_time()
    process.wait(30)
    return replace(Owner.myself(), pid=process.pid, started=started)


def put_claim(folder: Path, shard: int, owner: Owner) -> None:
    (folder / claim_name(shard)).write_text(json.dumps(asdict(owner)))


def test_one_holder_a_shard(tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        assert first.take(3) and not second.take(3) and not first.take(3)
        assert second.take(4)
        assert claimed_shards(tmp_path) == {3, 4}
        assert first.holds(3) and not first.holds(4)
        assert not first.abandoned(3) and not first.abandoned(4) and not first.abandoned(5)
        first.release(3)
        assert second.take(3)
    assert claimed_shards(tmp_path) == set()


def test_an_error_gives_everything_back(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Claims(tmp_path) as claims:
        claims.take(0)
        raise KeyboardInterrupt
    assert claimed_shards(tmp_path) == set()


def test_rows_reach_others_with_the_next_beat(tmp_path: Path) -> None:
    with Claims(tmp_path) as first, Claims(tmp_path) as second:
        first.take(0)
        first.note(0, 17)
        mine, theirs = first.claimed()[0], second.claimed()[0]
        assert mine is not None and theirs is not None and (mine.rows, theirs.rows) == (17, 0)
        first.beat()
        assert second.claimed()[0] == first.claimed()[0] == replace(mine, beat=1)


def test_the_dead_of_this_machine_are_known_at_once(tmp_path: Path) -> None:
    with Claims(tmp_path) as claims:
        put_claim(tmp_path, 0, dead_owner())
        assert claims.abandoned(0)
        # The number of a process may be used again, by one that started at another time.
        put_claim(tmp_path, 1, replace(Owner.myself(), started=time.time() - 86400))
        assert claims.abandoned(1)
        put_claim(tmp_path, 2, Owner.myself())
        assert not claims.abandoned(2)
        assert not claims.take(0)
        claims.clear(0)
        assert claims.take(0)


def test_a_killed_child_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    owner = replace(Owner.myself(), pid=child.pid, started=psutil.Process(child.pid).create_time())
    assert not owner.is_dead()
    child.kill()
    deadline = time.monotonic() + 30
    while not owner.is_dead() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert owner.is_dead() and psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE
    child.wait(30)


@pytest.mark.parametrize("content", ["", "[]", "{", json.dumps({"owner": 1}), None])
def test_others_are_watched_for_as_long_as_patience_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    """Of another machine, or a claim that cannot be read: nothing is known but whether it changes."""
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    elsewhere = replace(dead_owner(), machine="elsewhere")
    file = tmp_path / claim_name(0)
    file.write_text(json.dumps(asdict(elsewhere)) if content is None else content)
    claims = Claims(tmp_path, patience=10)
    assert not claims.abandoned(0)
    now += 9
    assert not claims.abandoned(0)
    file.write_text(json.dumps(asdict(replace(elsewhere, beat=1))))
    now += 9
    assert not claims.abandoned(0)
    now += 9
    assert not claims.abandoned(0)
    now += 1
    assert claims.abandoned(0)


def test_the_old_owner_leaves_the_new_ones_file_alone(tmp_path: Path) -> None:
    with Claims(tmp_path) as slept, Claims(tmp_path) as awake:
        slept.take(0)
        awake.clear(0)
        assert awake.take(0)
        before = (tmp_path / claim_name(0)).read_bytes()
        slept.note(0, 5)
        slept.beat()
        slept.release(0)
        assert (tmp_path / claim_name(0)).read_bytes() == before
        assert not slept.take(0)


def test_a_thread_renews_what_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.01)
    with Claims(tmp_path) as claims, Claims(tmp_path) as watcher:
        claims.take(0)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            owner = watcher.claimed()[0]
            if owner is not None and owner.beat > 2:
                break
            time.sleep(0.01)
        assert owner is not None and owner.beat > 2 and owner.token == claims.owner.token


def test_a_claim_fits_its_bytes_whatever_the_host_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "node", lambda: "h" * 1000)
    module.this_machine.cache_clear()
    try:
        with Claims(tmp_path) as claims:
            claims.take(0)
            assert (tmp_path / claim_name(0)).stat().st_size == module.CLAIM_BYTES
            assert claims.claimed()[0] == claims.owner
    finally:
        module.this_machine.cache_clear()


def test_other_files_of_a_store_are_no_claims(tmp_path: Path) -> None:
    for name in (".shard-00001.safetensors.ab.tmp", "shard-00002.json", ".shard-x.claim", ".lock"):
        (tmp_path / name).write_text("")
    (tmp_path / claim_name(123456)).write_text("")
    assert claimed_shards(tmp_path) == {123456}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with Claims(tmp_path) as claims, pytest.raises(PermissionError):
        claims.take(0)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from(["take", "release"])), max_size=30)
)
def test_no_shard_is_ever_held_twice(steps: list[tuple[int, int, str]], tmp_path: Path) -> None:
    holders: dict[int, int] = {}
    with Claims(tmp_path) as one, Claims(tmp_path) as two, Claims(tmp_path) as three:
        for who, shard, what in steps:
            claims = (one, two, three)[who]
            if what == "take":
                assert claims.take(shard) == (shard not in holders)
                holders.setdefault(shard, who)
            elif holders.get(shard) == who:
                claims.release(shard)
                del holders[shard]
            assert claimed_shards(tmp_path) == set(holders)
