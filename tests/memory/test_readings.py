"""Memory of a process and of its workers."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machine_cases import meminfo, process, rollup, write

from pwm_torchrl.memory import readings as processes
from pwm_torchrl.memory.readings import (
    GIB,
    MIB,
    MachineMemory,
    descendants,
    format_bytes,
    parse_bytes,
    read_machine,
    read_process,
    read_tree,
)

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
ROOT = Path(__file__).parents[2]
KIB = 1024


def run_script(code: str, *arguments: object) -> str:
    """Output of a script in a fresh interpreter."""
    out = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return out.stdout


@contextlib.contextmanager
def worker(code: str, *arguments: object) -> Iterator[int]:
    """Process id of a child that is ready; it ends with the block."""
    code += "\nimport sys; print('ready', flush=True); sys.stdin.readline()"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        yield child.pid
        child.communicate("\n")


class TestFakeTree:
    """The arithmetic, on files with known numbers."""

    def test_one_process(self, tmp_path):
        write(tmp_path, process(7, 1, anon=100, shmem=20, file=3))
        found = read_process(7, root=tmp_path)
        assert (found.rss, found.anon, found.shmem, found.file) == (123 * KIB, 100 * KIB, 20 * KIB, 3 * KIB)
        assert (found.peak, found.virtual, found.own) == (200 * KIB, 400 * KIB, 120 * KIB)
        assert not found.proportional

    def test_descendants_with_unusual_names(self, tmp_path):
        for pid, parent, name in [
            (7, 1, "a"),
            (8, 7, "b) S 1 ("),
            (9, 8, "c d"),
            (10, 1, "e"),
            (11, 10, "f"),
            (3, 9, ")"),
        ]:
            write(tmp_path, process(pid, parent, anon=1, name=name))
        write(tmp_path, {"proc/self/stat": "1 (x) S 7 7", "proc/uptime": "1 2"})
        assert descendants(7, root=tmp_path) == [3, 8, 9]
        assert descendants(10, root=tmp_path) == [11]
        assert descendants(11, root=tmp_path) == []

    def test_shares_are_summed_over_several_processes(self, tmp_path):
        """50 KiB of shared memory mapped by both count 50 and not 100."""
        for pid, parent in [(7, 1), (8, 7)]:
            write(tmp_path, process(pid, parent, anon=100, shmem=50, file=10) | rollup(pid, anon=90, shmem=25, file=5))
        tree = read_tree(7, root=tmp_path)
        assert (tree.anon, tree.shmem, tree.file, tree.rss) == (180 * KIB, 50 * KIB, 10 * KIB, 240 * KIB)
        assert tree.own == 230 * KIB
        assert all(part.proportional for part in tree.processes)

    def test_without_shares_the_plain_numbers_count(self, tmp_path):
        files = process(7, 1, anon=100) | rollup(7, anon=90, shmem=0, file=0) | process(8, 7, anon=40)
        tree = read_tree(7, root=write(tmp_path, files | {"proc/8/smaps_rollup": "Rss: 1 kB\nPss: 1 kB\n"}))
        assert [(part.pid, part.anon, part.proportional) for part in tree.processes] == [
            (7, 90 * KIB, True),
            (8, 40 * KIB, False),
        ]

    def test_a_zombie_is_ignored(self, tmp_path):
        files = process(7, 1, anon=100) | process(8, 7, anon=1)
        files["proc/8/status"] = "Name:\tpython\nState:\tZ (zombie)\nThreads:\t1\n"
        assert read_tree(7, root=write(tmp_path, files)).workers == ()

    def test_machine(self, tmp_path):
        assert read_machine(write(tmp_path, meminfo(1000, 600))) == MachineMemory(1000 * KIB, 600 * KIB)

    def test_without_proc(self, tmp_path):
        assert read_process(root=tmp_path) is None
        assert read_tree(root=tmp_path) is None
        assert read_machine(tmp_path) is None
        assert descendants(root=tmp_path) == []


@linux
class TestThisMachine:
    def test_parts_sum_to_rss(self):
        found = read_process()
        assert found.pid == os.getpid()
        assert found.rss == found.anon + found.shmem + found.file
        assert found.anon > 0
        assert found.peak >= found.rss
        assert found.virtual > found.rss

    def test_anonymous_memory_is_counted(self):
        before = read_process(proportional=True)
        block = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)
        for offset in range(0, 64 * MIB, mmap.PAGESIZE):
            block[offset] = 1
        grown = read_process(proportional=True).anon - before.anon
        assert 64 * MIB <= grown < 72 * MIB

    def test_shared_memory_is_counted_as_such_and_page_cache_is_not(self, tmp_path):
        # In a separate process, because the heap of this one may keep memory freed by earlier tests.
        readings = """
import json, mmap, sys
from multiprocessing.shared_memory import SharedMemory
from pwm_torchrl.memory.readings import read_tree

size, block = 64 << 20, bytes(1 << 20)
def grown(before):
    now = read_tree()
    return {name: getattr(now, name) - getattr(before, name) for name in ("file", "shmem", "own")}

with open(sys.argv[1], "wb") as file:
    for _ in range(64):
        file.write(block)
before, found = read_tree(), []
with open(sys.argv[1], "rb") as opened, mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as mapped:
    assert sum(mapped[offset] for offset in range(0, size, mmap.PAGESIZE)) == 0
    found.append(grown(before))
before = read_tree()
shared = SharedMemory(create=True, size=size)
try:
    for offset in range(0, size, len(block)):
        shared.buf[offset:offset + len(block)] = block
    found.append(grown(before))
finally:
    shared.close()
    shared.unlink()
print(json.dumps(found))
"""
        mapped, shared = json.loads(run_script(readings, tmp_path / "mapped"))
        assert 60 * MIB < mapped["file"] < 72 * MIB
        assert mapped["shmem"] == 0
        assert mapped["own"] < 8 * MIB
        assert 60 * MIB < shared["shmem"] < 72 * MIB
        assert 60 * MIB < shared["own"] < 80 * MIB

    def test_shared_memory_of_several_workers_counts_once(self):
        touch = """
import mmap, os, sys
file = os.open("/dev/shm/" + sys.argv[1], os.O_RDWR)
block = mmap.mmap(file, 0)
sum(block[offset] for offset in range(0, len(block), mmap.PAGESIZE))
"""
        shared = SharedMemory(create=True, size=64 * MIB)
        try:
            shared.buf[:] = bytes(64 * MIB)
            with worker(touch, shared.name) as first, worker(touch, shared.name) as second:
                tree = read_tree()
                if not all(part.proportional for part in tree.processes):
                    pytest.skip("this kernel does not split shares")
                mapped = [read_process(pid).shmem for pid in (os.getpid(), first, second)]
                assert sum(mapped) > 180 * MIB
                assert 60 * MIB < tree.shmem < 72 * MIB
        finally:
            shared.close()
            shared.unlink()

    def test_memory_of_forked_workers_counts_once(self):
        """In a separate process, because this one has threads and should not fork."""
        out = run_script("""
import os
from pwm_torchrl.memory.readings import read_process, read_tree
block = b"x" * 2**26
end, go = os.pipe()
child = os.fork()
if child == 0:
    os.close(go)
    os.read(end, 1)
    os._exit(0)
tree = read_tree()
print(all(part.proportional for part in tree.processes), tree.anon, read_process().anon + read_process(child).anon)
os.close(go)
os.waitpid(child, 0)
""")
        proportional, share, plain = out.split()
        if proportional == "False":
            pytest.skip("this kernel does not split shares")
        assert int(plain) > 128 * MIB
        assert 64 * MIB < int(share) < 96 * MIB

    def test_a_worker_of_a_worker_is_found_and_one_that_ended_is_not(self, monkeypatch):
        middle = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1)'], stdout=2, check=True)"
        ended = subprocess.Popen([sys.executable, "-c", middle], stderr=subprocess.DEVNULL)
        assert ended.wait() == 0
        grandchild = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'input()'], stdin=0)"
        with worker(grandchild) as child:
            alive = descendants()
            assert child in alive
            assert descendants(child)
            assert set(descendants(child)) < set(alive)
            assert ended.pid not in alive
            # A worker may also end after it was found.
            monkeypatch.setattr(processes, "descendants", lambda pid, root: [ended.pid, child])
            assert [part.pid for part in read_tree().workers] == [child]

    def test_a_main_process_that_ended(self):
        with subprocess.Popen([sys.executable, "-c", ""]) as ended:
            ended.wait()
        assert read_tree(ended.pid) is None


# Amounts of memory as text --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (400 * MIB, "400 MiB"),
        (1.5 * GIB, "1.5 GiB"),
        (12.34 * GIB, "12.3 GiB"),
        (GIB - 1, "1 GiB"),  # not 1024 MiB
        (2**60, "1024 PiB"),
        (-3 * MIB, "-3 MiB"),
        (-0.1, "0 B"),
    ],
)
def test_format(count, text):
    assert format_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (12, 12),
        ("1024", 1024),
        ("1 B", 1),
        ("64G", 64 * GIB),  # SLURM's --mem=64G
        ("64 Gi", 64 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("48 GB", 48 * 10**9),
        ("2tb", 2 * 10**12),
        (" 512 k ", 512 * 1024),
    ],
)
def test_parse(text, count):
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "64 X", "-1", "1 2", "1e9", "inf", -1, True, 1.5, None])
def test_refuses_invalid_amounts(text):
    with pytest.raises(ValueError, match="not an amount of memory"):
        parse_bytes(text)


@given(st.integers(0, 2**59))
def test_round_trip_to_three_digits(count):
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.0051)
