"""The sampling thread and its metrics."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machine_cases import meminfo, process, reading, v2_group, write

from pwm_torchrl.memory.readings import GIB, MIB, Reading, read_memory
from pwm_torchrl.memory.watch import MemoryWatch

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
ROOT = Path(__file__).parents[2]


def watching_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "memory-watch"]


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for up to a minute."""
    pause = threading.Event()
    for _ in range(3000):
        if condition():
            return
        pause.wait(0.02)
    pytest.fail("did not happen")


def in_turn(readings: list[Reading]) -> Callable[[], Reading]:
    """Returns the readings one after the other, then the last one repeatedly."""
    return lambda: readings.pop(0) if len(readings) > 1 else readings[0]


def failing_watch() -> MemoryWatch:
    """A watch whose second reading fails with StopIteration."""
    readings = iter([reading()])
    return MemoryWatch(0.01, read=lambda: next(readings))


class TestMetrics:
    def test_names_and_numbers(self):
        found = reading(
            main=100 * MIB, workers=(10 * MIB, 20 * MIB), shmem=5 * MIB, limit=GIB, dirty=MIB, cache=7 * MIB
        )
        assert found.metrics() == {
            "memory/rss": 135 * MIB,
            "memory/anon": 130 * MIB,
            "memory/shmem": 5 * MIB,
            "memory/file": 0,
            "memory/own": 135 * MIB,
            "memory/processes": 3,
            "memory/main_peak_rss": 100 * MIB,
            "memory/available": 60 * GIB,
            "memory/cgroup_usage": 143 * MIB,
            "memory/cgroup_limit": GIB,
            "memory/cgroup_unreclaimable": 136 * MIB,
            "memory/cgroup_unwritten": MIB,
        }

    def test_unknown_values_are_absent(self):
        assert Reading(0.0).metrics() == {}
        assert "memory/cgroup_limit" not in reading().metrics()

    def test_a_limit_as_large_as_the_machine_is_ignored(self):
        assert reading(limit=64 * GIB, total=64 * GIB).limits == ()
        assert len(reading(limit=63 * GIB, total=64 * GIB).limits) == 1

    def test_from_files(self, tmp_path):
        files = process(7, 1, anon=100) | meminfo(10**6, 10**5)
        files |= {"proc/self/cgroup": "0::/a/b\n", "proc/self/mountinfo": "4 3 0:3 / /groups rw - cgroup2 none rw\n"}
        files |= v2_group("groups/a", most="4096", usage=3, anon=2) | v2_group(
            "groups/a/b", most="8192", usage=1, anon=1
        )
        metrics = read_memory(7, root=write(tmp_path, files)).metrics()
        assert metrics["memory/anon"] == 100 * 1024
        assert metrics["memory/available"] == 10**5 * 1024
        assert [metrics[f"memory/cgroup_{name}"] for name in ("limit", "usage", "unreclaimable")] == [4096, 3, 2]

    def test_gpu(self, monkeypatch):
        """Sums over devices, from PyTorch's own names."""
        stats = {
            "allocated_bytes.all.current": 1,
            "reserved_bytes.all.current": 2,
            "allocated_bytes.all.peak": 3,
            "reserved_bytes.all.peak": 4,
            "num_alloc_retries": 5,
            "num_ooms": 6,
        }
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
        metrics = read_memory().metrics()
        names = ("allocated", "reserved", "peak_allocated", "peak_reserved", "alloc_retries", "ooms")
        assert [metrics[f"memory/gpu_{name}"] for name in names] == [2, 4, 6, 8, 10, 12]

    def test_cuda_is_not_initialized(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: pytest.fail("asked a GPU"))
        assert read_memory().gpu is None

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_a_real_gpu(self):
        torch.zeros(1, device="cuda")
        before = read_memory().gpu
        block = torch.zeros(2**26, dtype=torch.uint8, device="cuda")
        after = read_memory().gpu
        assert after.allocated - before.allocated == block.numel()
        assert after.reserved >= after.allocated

    @linux
    def test_torch_is_not_imported_for_it(self):
        code = """
import sys
import pwm_torchrl.memory.budget
from pwm_torchrl.memory.watch import MemoryGuard
from pwm_torchrl.memory.watch import MemoryWatch
with MemoryWatch() as watch:
    print(MemoryGuard(1.0).check(watch.newest), watch.metrics()["memory/rss"] > 0)
print({"torch", "numpy"} & set(sys.modules))
"""
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert out.stdout == "None True\nset()\n"


class TestThread:
    def test_starting_and_stopping_twice(self):
        watch = MemoryWatch(0.01, read=reading)
        watch.stop()
        for _ in range(2):
            watch.start()
            watch.start()
            assert len(watching_threads()) == 1
            assert watching_threads()[0].daemon
            watch.stop()
            watch.stop()
            assert not watching_threads()
        with watch as entered:
            assert entered is watch
            assert watch.running
        assert not watch.running
        assert not watching_threads()

    def test_newest_and_peaks(self):
        readings = [reading(main=main * MIB) for main in (1, 3, 2)]
        watch = MemoryWatch(0.01, read=in_turn(readings))
        with watch:
            wait_until(lambda: watch.newest.processes.anon == 2 * MIB)
            assert watch.metrics()["memory/own"] == 2 * MIB
            assert watch.metrics()["memory/peak_own"] == 3 * MIB
        assert watch.peaks["memory/rss"] == 3 * MIB
        readings.append(reading(main=5 * MIB))
        readings.pop(0)
        assert watch.newest.processes.anon == 5 * MIB  # a new reading, because the thread is stopped

    def test_a_failure_of_the_thread_is_raised(self):
        outcomes = [reading(), None, reading()]
        watch = MemoryWatch(0.01, read=lambda: outcomes.pop(0) or int("no number"))
        watch.start()
        wait_until(lambda: not watch.running)
        for ask in (watch.metrics, watch.sample, watch.start, lambda: watch.newest, watch.stop):
            with pytest.raises(RuntimeError, match="no number") as caught:
                ask()
            assert isinstance(caught.value.__cause__, ValueError)
        watch.stop()  # the failure is raised once, then the watch can be used again
        assert watch.sample() is not None

    def test_a_failure_does_not_replace_the_error_of_the_block(self):
        watch = failing_watch()

        def block() -> None:
            with watch:
                wait_until(lambda: not watch.running)
                raise KeyError("first")

        with pytest.raises(KeyError, match="first"):
            block()
        assert not watching_threads()

    def test_a_failure_is_raised_at_the_end_of_the_block(self):
        watch = failing_watch()
        with pytest.raises(RuntimeError, match="StopIteration"), watch:
            wait_until(lambda: not watch.running)

    def test_no_thread_starts_if_the_first_reading_fails(self):
        with pytest.raises(ValueError, match="no number"):
            MemoryWatch(read=lambda: int("no number")).start()
        assert not watching_threads()

    @pytest.mark.parametrize("interval", [0, -1.0])
    def test_an_interval_is_positive(self, interval):
        with pytest.raises(ValueError, match=f"interval={interval}"):
            MemoryWatch(interval)

    @linux
    def test_memory_of_a_worker(self):
        code = "import sys\nfor line in sys.stdin: block = b'x' * 2**26; print(len(block), flush=True)"
        with MemoryWatch(0.01) as watch:
            before = watch.newest.processes
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            with subprocess.Popen([sys.executable, "-c", code], text=True, **pipes) as child:

                def anon() -> int:
                    return sum(part.anon for part in watch.newest.processes.workers if part.pid == child.pid)

                wait_until(lambda: anon() > 0)
                assert anon() < 32 * MIB
                child.stdin.write("take\n")
                child.stdin.flush()
                wait_until(lambda: anon() > 64 * MIB)
                assert watch.newest.processes.anon > before.anon + 56 * MIB
                child.communicate()
            wait_until(lambda: not any(part.pid == child.pid for part in watch.newest.processes.workers))
            assert watch.metrics()["memory/peak_own"] > before.own + 56 * MIB
