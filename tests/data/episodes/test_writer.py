from __future__ import annotations

import multiprocessing
import os

import pytest
from episode_cases import digest_of, make_store, random_rows

from pwm_torchrl.data.episodes import EpisodeStore, writer
from pwm_torchrl.data.episodes.writer import stage_store
from pwm_torchrl.errors import ConfigurationError, StorageFault


@pytest.fixture
def store(tmp_path):
    return make_store(tmp_path / "store", random_rows([5, 6], [0, 1], terminated=[True, False]))


def test_a_copy_is_made_once(tmp_path, store, monkeypatch):
    said = []
    first = stage_store(store.path, tmp_path / "scratch", say=said.append)
    assert digest_of(first) == digest_of(store.path)
    assert EpisodeStore.open(first).manifest == store.manifest
    written = (first / "reward.f32").stat().st_mtime_ns
    assert stage_store(store.path, tmp_path / "scratch", say=said.append) == first
    assert (first / "reward.f32").stat().st_mtime_ns == written
    assert [line.split()[0] for line in said] == ["copying", str(first)]
    monkeypatch.chdir(tmp_path)
    assert stage_store("store", tmp_path / "scratch") == first


@pytest.mark.parametrize("damage", ["gone", "short", "no manifest", "part", "table"])
def test_a_damaged_copy_is_made_again(tmp_path, store, damage):
    copy = stage_store(store.path, tmp_path / "scratch")
    if damage == "gone":
        copy.rename(tmp_path / "elsewhere")
    elif damage == "short":
        (copy / "action.f32").write_bytes(b"")
    elif damage == "table":
        (copy / "episodes.npy").unlink()
    elif damage == "no manifest":
        (copy / "manifest.json").unlink()
    else:
        copy.rename(copy.with_name(f".{copy.name}.part"))
    assert stage_store(store.path, tmp_path / "scratch") == copy
    assert digest_of(copy) == digest_of(store.path)
    assert not list((tmp_path / "scratch").glob("*.part"))


def test_stores_with_the_same_name(tmp_path, store):
    other = make_store(tmp_path / "other" / "store", random_rows([3], [2]))
    copies = {stage_store(path, tmp_path / "scratch") for path in (store.path, other.path)}
    assert len(copies) == 2
    for file in store.path.iterdir():
        file.unlink()
    replaced = make_store(store.path, random_rows([4], [0], seed=1))
    copy = stage_store(replaced.path, tmp_path / "scratch")
    assert copy in copies
    assert digest_of(copy) == digest_of(replaced.path)


def test_space_is_checked_first(tmp_path, store, monkeypatch):
    monkeypatch.setattr(writer, "free_bytes", lambda path: 10)
    with pytest.raises(ConfigurationError, match=r"10 bytes are free.*data\.stage=none"):
        stage_store(store.path, tmp_path / "scratch")
    assert not [path for path in (tmp_path / "scratch").iterdir() if path.is_dir()]


def test_the_copy_is_verified(tmp_path, store, monkeypatch):
    monkeypatch.setattr(writer, "_drop_cache", lambda descriptor: os.ftruncate(descriptor, 4))
    with pytest.raises(StorageFault, match="read back"):
        stage_store(store.path, tmp_path / "scratch")
    monkeypatch.undo()
    assert digest_of(stage_store(store.path, tmp_path / "scratch")) == digest_of(store.path)


def test_a_folder_that_is_not_a_store(tmp_path):
    with pytest.raises(ConfigurationError, match="is not an episode store"):
        stage_store(tmp_path, tmp_path / "scratch")


def stage_in_process(path, scratch, queue):
    lines = []
    copy = stage_store(path, scratch, say=lines.append)
    queue.put((str(copy), lines[0].split()[0]))


def test_processes_of_a_node_copy_once(tmp_path, store):
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (store.path, tmp_path / "scratch", queue)
    workers = [context.Process(target=stage_in_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert len({copy for copy, _ in found}) == 1
    assert [word for _, word in found].count("copying") == 1
