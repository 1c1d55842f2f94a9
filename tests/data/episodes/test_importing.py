"""Imports that are interrupted, repeated or concurrent, and imports with bad sources."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from episode_cases import NAMES, chunk, digest_of, tasks, write_chunks

import pwm_torchrl
from pwm_torchrl.data.episodes import EpisodeStore, import_chunks, writer
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.errors import ConfigurationError, StorageFault

ROOT = Path(pwm_torchrl.__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    write_chunks(tmp_path / "source")
    return tmp_path / "source"


def test_every_episode_is_imported_once_and_unchanged(tmp_path):
    chunks = write_chunks(tmp_path / "source", count=11)
    store = import_chunks(tmp_path / "source", tmp_path / "store", tasks())
    assert store.num_episodes == 44
    assert store.num_transitions == 44 * 5
    for number, content in enumerate(chunks):  # chunk_10 comes after chunk_9
        for e in range(4):
            episode = 4 * number + e
            rows = np.arange(6) + store.first_row[episode]
            assert torch.equal(store.observations(rows), content["obs"][e])
            one = store.slices(rows[:1], 5)[0]
            assert torch.equal(one["action"], content["action"][e, 1:])
            assert torch.equal(one["next", "reward"].squeeze(-1), content["reward"][e, 1:])
            assert store.task[episode] == content["task"][e, 0]
    records = store.manifest["sources"]
    assert [record["name"] for record in records] == [f"chunk_{n}.pt" for n in range(11)]
    assert {record["episodes"] for record in records} == {4}
    assert records[0]["bytes"] == (tmp_path / "source" / "chunk_0.pt").stat().st_size
    assert len(records[0]["sha256"]) == 64
    np.testing.assert_allclose(store.returns()[:4], chunks[0]["reward"][:, 1:].double().sum(1))
    assert sum(task["episodes"] for task in store.manifest["tasks"]) == 44
    assert store.manifest["tasks"][0]["return_quantiles"].keys() == {"0.0", "0.25", "0.5", "0.75", "1.0"}


def test_chunks_of_different_lengths(tmp_path):
    write_chunks(tmp_path / "source", 1)
    torch.save(chunk(2, 9, [0, 1], seed=5), tmp_path / "source" / "chunk_1.pt")
    store = import_chunks(tmp_path / "source", tmp_path / "store", tasks())
    assert store.length.tolist() == [5] * 4 + [8] * 2
    assert store.manifest["tasks"][1]["lengths"] == [5, 8]


def test_tasks_without_data_are_reported(tmp_path):
    (tmp_path / "source").mkdir()
    torch.save(chunk(2, 6, [0, 0]), tmp_path / "source" / "chunk_0.pt")
    store = import_chunks(tmp_path / "source", tmp_path / "store", tasks())
    assert store.manifest["tasks_without_data"] == list(NAMES[1:])


class Killed(BaseException):
    """Simulates a kill of the process."""


def kill_at(monkeypatch, moment):
    """Raise at the n-th call that changes a file; counts the calls."""
    calls = []

    def killing(function):
        def wrapped(*args, **kwargs):
            calls.append(function)
            if len(calls) == moment:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    for module, name in ((writer, "write_all"), (os, "fsync"), (os, "ftruncate"), (Path, "replace"), (Path, "unlink")):
        monkeypatch.setattr(module, name, killing(getattr(module, name)))
    return calls


@pytest.fixture
def every_chunk_is_large(monkeypatch):
    """Commit each chunk separately."""
    monkeypatch.setattr("pwm_torchrl.data.episodes.importing._COMMIT_BYTES", 1)


def test_a_kill_at_any_moment_loses_and_duplicates_nothing(tmp_path, source, every_chunk_is_large, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # hundreds of real ones are slow
    expected = import_chunks(source, tmp_path / "whole", tasks())
    moment, survived = 0, False
    while not survived:
        moment += 1
        store = tmp_path / f"killed_{moment}"
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, moment)
            try:
                import_chunks(source, store, tasks())
                survived = True
            except Killed:
                manifest = store / "manifest.json"
                if not manifest.exists() or json.loads(manifest.read_text())["state"] != "finished":
                    with pytest.raises(ConfigurationError, match=r"not finished|not an episode store"):
                        EpisodeStore.open(store)
        found = import_chunks(source, store, tasks())
        assert digest_of(store).items() >= digest_of(expected.path).items()
        assert found.manifest == expected.manifest
    assert moment > 30


def test_a_finished_chunk_is_not_read_again(tmp_path, source, every_chunk_is_large, monkeypatch):
    content = (source / "chunk_1.pt").read_bytes()
    (source / "chunk_1.pt").write_bytes(content[:-100])
    with pytest.raises(ConfigurationError, match=r"chunk_1\.pt"):
        import_chunks(source, tmp_path / "store", tasks())
    (source / "chunk_1.pt").write_bytes(content)
    read = []
    monkeypatch.setattr(
        "pwm_torchrl.data.episodes.sources.hash_file",
        lambda path, *rest: read.append(path.name) or str(len(read)),
    )
    monkeypatch.setattr("pwm_torchrl.data.episodes.sources._Record.matches", lambda record: True)
    store = import_chunks(source, tmp_path / "store", tasks())
    assert read == ["chunk_1.pt"]
    assert [record["name"] for record in store.manifest["sources"]] == ["chunk_0.pt", "chunk_2.pt", "chunk_1.pt"]
    assert store.num_episodes == 12


KILLED = """
import os, signal, sys
from pwm_torchrl.data.episodes import import_chunks, writer
from pwm_torchrl.envs.tasks import task_set
import pwm_torchrl.data.episodes.importing as importing
importing._COMMIT_BYTES = 1
write, calls = writer.write_all, []
def dying(*args):
    calls.append(1)
    if len(calls) == 5:  # in the middle of the second chunk
        os.kill(os.getpid(), signal.SIGKILL)
    write(*args)
writer.write_all = dying
import_chunks(sys.argv[1], sys.argv[2], task_set(sys.argv[3]))
"""


def test_after_a_real_kill_the_lock_is_free_and_the_first_chunk_is_kept(tmp_path, source):
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "store"), ",".join(NAMES)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    manifest = json.loads((tmp_path / "store" / "manifest.json").read_text())
    assert [record["name"] for record in manifest["sources"]] == ["chunk_0.pt"]
    assert import_chunks(source, tmp_path / "store", tasks()).num_episodes == 12


def test_one_importer_at_a_time(tmp_path, source):
    with (
        writer.StoreWriter(tmp_path / "store", tasks()),
        pytest.raises(ConfigurationError, match=rf"process {os.getpid()} on "),
    ):
        import_chunks(source, tmp_path / "store", tasks())
    import_chunks(source, tmp_path / "store", tasks())


def test_a_finished_store_is_not_changed(tmp_path, source):
    before = import_chunks(source, tmp_path / "store", tasks()).manifest
    assert import_chunks(source, tmp_path / "store", tasks()).manifest == before
    torch.save(chunk(1, 6, [0]), source / "chunk_9.pt")
    with pytest.raises(ConfigurationError, match=r"finished .*chunk_9\.pt"):
        import_chunks(source, tmp_path / "store", tasks())


def test_the_same_content_is_refused_under_another_name(tmp_path, source):
    (source / "copy.pt").write_bytes((source / "chunk_1.pt").read_bytes())
    with pytest.raises(ConfigurationError, match=r"copy\.pt: .*chunk_1\.pt"):
        import_chunks(source, tmp_path / "store", tasks())
    store = import_chunks(source, tmp_path / "store", tasks(), keep_good=True)
    assert store.num_episodes == 12


def test_bad_chunks_are_listed_and_the_others_kept_on_request(tmp_path, source):
    (source / "chunk_1.pt").write_bytes(b"nothing")
    content = chunk(3, 6, [0, 1, 2], seed=8)
    content["action"][2, 3, 0] = 1.5
    torch.save(content, source / "chunk_3.pt")
    with pytest.raises(ConfigurationError, match=r"2 of 4 sources .*2 valid ones") as caught:
        import_chunks(source, tmp_path / "store", tasks())
    assert "chunk_1.pt: " in str(caught.value)
    assert "chunk_3.pt: episode 2: action of size 1.5 at index 3" in str(caught.value)
    with pytest.raises(ConfigurationError, match="is not finished"):
        EpisodeStore.open(tmp_path / "store")
    store = import_chunks(source, tmp_path / "store", tasks(), keep_good=True)
    assert store.num_episodes == 8
    left_out = {r["name"]: r["problem"] for r in store.manifest["sources"] if r["state"] == "left out"}
    assert left_out.keys() == {"chunk_1.pt", "chunk_3.pt"}
    rows = store.num_transitions + store.num_episodes
    assert (store.path / "reward.f32").stat().st_size == 4 * rows


def test_all_sources_bad(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "a.pt").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="none is valid"):
        import_chunks(tmp_path / "source", tmp_path / "store", tasks(), keep_good=True)


def test_a_chunk_changed_during_an_import(tmp_path, source):
    (source / "chunk_1.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="the 2 valid ones"):
        import_chunks(source, tmp_path / "store", tasks())
    torch.save(chunk(9, 6, [0] * 9), source / "chunk_0.pt")
    with pytest.raises(ConfigurationError, match=r"chunk_0\.pt has [\d,]+ bytes"):
        import_chunks(source, tmp_path / "store", tasks())


def test_other_tasks_and_other_folders_are_refused(tmp_path, source):
    (source / "chunk_1.pt").write_bytes(b"nothing")
    with pytest.raises(ConfigurationError, match="the 2 valid ones"):
        import_chunks(source, tmp_path / "store", tasks())
    with pytest.raises(ConfigurationError, match="other tasks"):
        import_chunks(source, tmp_path / "store", task_set(NAMES[::-1]))
    with pytest.raises(ConfigurationError, match=r"contains chunk_0\.pt"):
        import_chunks(source, source, tasks())
    with pytest.raises(ConfigurationError, match="there is no folder"):
        import_chunks(tmp_path / "nowhere", tmp_path / "other", tasks())
    with pytest.raises(ConfigurationError, match=r"\(\*\.pt\)"):
        import_chunks(tmp_path / "store", tmp_path / "other", tasks())


def test_too_little_space_is_an_error_before_writing(tmp_path, source, monkeypatch):
    monkeypatch.setattr("pwm_torchrl.data.episodes.writer.free_bytes", lambda path: 100)
    with pytest.raises(ConfigurationError, match="100 bytes"):
        import_chunks(source, tmp_path / "store", tasks())


def test_a_disk_that_fills_up(tmp_path, source, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_all", full)
        with pytest.raises(StorageFault, match="run the same import again"):
            import_chunks(source, tmp_path / "store", tasks())
    assert import_chunks(source, tmp_path / "store", tasks()).num_episodes == 12


def test_progress_is_printed_on_stderr(tmp_path, source, capsys, monkeypatch):
    monkeypatch.setattr("pwm_torchrl.data.episodes.writer.LINE_EVERY_S", 0.0)
    (source / "chunk_1.pt").write_bytes(b"nothing")
    import_chunks(source, tmp_path / "store", tasks(), keep_good=True, progress=True)
    found = capsys.readouterr()
    assert not found.out
    assert "chunk_1.pt: " in found.err
    assert "100% of 0.0 GiB  chunk_2.pt" in found.err
