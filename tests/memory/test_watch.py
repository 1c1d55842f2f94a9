"""The sampling thread and its metrics."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from machine_cases import meminfo, process, reading, v2_group, write

from pwm_torchrl.memory.readings import GIB, MIB, Reading, read_memory
from pwm_torchrl.memory.watch import MemoryGuard, MemoryWatch

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


# Alarms of the guard --------------------------------------------------------------------------------------------------


class TestCgroup:
    def test_page_cache_does_not_count(self):
        """As measured: a 600 MB file read in a group of 400 MB shows a usage of 398 MB."""
        full = reading(main=20 * MIB, cache=378 * MIB, limit=400 * MIB)
        assert full.cgroups[0].usage == 398 * MIB
        assert MemoryGuard().check(full) is None

    @pytest.mark.parametrize(("main", "raised"), [(339, False), (340, True), (350, True)])
    def test_anonymous_memory_counts(self, main, raised):
        guard = MemoryGuard()
        assert guard.check(reading(main=20 * MIB, limit=400 * MIB)) is None
        assert (guard.check(reading(main=main * MIB, cache=50 * MIB, limit=400 * MIB)) is not None) == raised

    def test_message_of_a_leak(self):
        guard = MemoryGuard()
        guard.check(reading(main=20 * MIB, limit=400 * MIB))
        alarm = guard.check(reading(main=345 * MIB, shmem=MIB, cache=40 * MIB, limit=400 * MIB))
        assert all(
            part in alarm.message
            for part in ("346 MiB, 86 %", "cgroup /job (memory.max), 400 MiB", "main process", "20 MiB to 345 MiB")
        )
        assert (alarm.used, alarm.limit) == (346 * MIB, 400 * MIB)
        assert alarm.fraction == pytest.approx(0.865)
        assert alarm.growth[0].bytes == 325 * MIB

    @pytest.mark.parametrize(
        ("now", "grown"),
        [
            (
                {"workers": (100 * MIB, 230 * MIB)},
                "anonymous memory of 2 worker processes grew from 0 B to 330 MiB",
            ),
            ({"shmem": 330 * MIB}, "shared memory grew from 0 B to 330 MiB"),
            ({"others": 330 * MIB}, "anonymous memory of processes outside the run grew from 0 B to 330 MiB"),
            (
                {"workers": (200 * MIB,), "shmem": 130 * MIB},
                "anonymous memory of 1 worker process grew from 0 B to 200 MiB "
                "and shared memory grew from 0 B to 130 MiB",
            ),
            (
                {"workers": (300 * MIB,), "shmem": 30 * MIB},
                "anonymous memory of 1 worker process grew from 0 B to 300 MiB",
            ),
        ],
    )
    def test_message_names_what_grew(self, now, grown):
        guard = MemoryGuard()
        guard.check(reading(main=20 * MIB, limit=400 * MIB))
        alarm = guard.check(reading(main=20 * MIB, limit=400 * MIB, **now))
        assert alarm.message.partition("400 MiB: ")[2] == grown

    def test_a_baseline_after_warm_up(self):
        guard = MemoryGuard()
        guard.check(reading(main=20 * MIB, limit=400 * MIB))
        guard.set_baseline(reading(main=300 * MIB, limit=400 * MIB))
        alarm = guard.check(reading(main=345 * MIB, limit=400 * MIB))
        assert "grew from 300 MiB to 345 MiB" in alarm.message

    def test_full_from_the_start(self):
        alarm = MemoryGuard().check(reading(main=345 * MIB, limit=400 * MIB))
        assert "nothing grew" in alarm.message
        assert alarm.message.endswith("anonymous memory of the main process, 345 MiB")

    def test_an_outer_group_is_checked_too(self):
        """Other processes fill the outer group; the inner one is far from its limit."""
        inside = reading(main=100 * MIB, limit=400 * MIB)
        outer = replace(inside.cgroups[0], name="/", limit=GIB, anon=900 * MIB, limit_file="memory.high")
        alarm = MemoryGuard().check(replace(inside, cgroups=(inside.cgroups[0], outer)))
        assert alarm.place == "the limit of cgroup / (memory.high)"
        assert alarm.used == 900 * MIB

    def test_the_closest_of_several_limits_is_reported(self):
        found = reading(main=360 * MIB, limit=400 * MIB)
        outer = replace(found.cgroups[0], name="/", limit=370 * MIB)
        assert MemoryGuard().check(replace(found, cgroups=(*found.cgroups, outer))).limit == 370 * MIB

    def test_without_detailed_usage_the_run_itself_counts(self):
        def found(main: int) -> Reading:
            whole = reading(main=main * MIB, limit=400 * MIB)
            return replace(
                whole, cgroups=(replace(whole.cgroups[0], anon=None, shmem=None, file=None, usage=390 * MIB),)
            )

        assert MemoryGuard().check(found(300)) is None
        assert MemoryGuard().check(found(350)).used == 350 * MIB


class TestDirtyPages:
    def test_count_after_a_delay(self):
        guard = MemoryGuard(dirty_seconds=30)
        calm = reading(main=100 * MIB, limit=400 * MIB)
        assert guard.check(calm) is None
        burst = reading(main=100 * MIB, dirty=250 * MIB, limit=400 * MIB)
        assert [guard.check(replace(burst, time=time)) is None for time in (1.0, 30.9)] == [True, True]
        alarm = guard.check(replace(burst, time=31.0))
        assert alarm.used == 350 * MIB
        assert alarm.message.endswith("dirty pages grew from 0 B to 250 MiB")

    def test_a_written_burst_resets_the_delay(self):
        guard = MemoryGuard(dirty_seconds=30)
        burst = reading(main=100 * MIB, dirty=250 * MIB, limit=400 * MIB)
        assert guard.check(burst) is None
        assert guard.check(replace(reading(main=100 * MIB, limit=400 * MIB), time=29.0)) is None
        assert guard.check(replace(burst, time=31.0)) is None
        assert guard.check(replace(burst, time=61.0)) is not None

    def test_without_delay(self):
        burst = reading(main=100 * MIB, dirty=250 * MIB, limit=400 * MIB)
        assert MemoryGuard(dirty_seconds=0).check(burst).used == 350 * MIB

    def test_held_memory_is_not_delayed(self):
        assert MemoryGuard().check(reading(main=345 * MIB, dirty=10 * MIB, limit=400 * MIB)).used == 355 * MIB


class TestBudget:
    def test_the_run_itself_counts(self):
        guard = MemoryGuard(budget_bytes=400 * MIB)
        assert guard.check(reading(main=100 * MIB, workers=(100 * MIB,), others=GIB, dirty=GIB, cache=GIB)) is None
        alarm = guard.check(reading(main=100 * MIB, workers=(230 * MIB,), shmem=20 * MIB))
        assert (alarm.used, alarm.limit, alarm.place) == (350 * MIB, 400 * MIB, "the budget")
        assert alarm.message.endswith("anonymous memory of 1 worker process grew from 100 MiB to 230 MiB")


class TestMachine:
    @pytest.mark.parametrize(("available", "raised"), [(2 * GIB, False), (1 * GIB, True)])
    def test_without_a_cgroup_limit_the_machine_is_checked(self, available, raised):
        found = reading(main=9 * GIB, available=available)
        assert (MemoryGuard().check(found) is not None) == raised

    def test_with_a_cgroup_limit_the_machine_is_not_checked(self):
        assert MemoryGuard().check(reading(main=9 * GIB, available=GIB, limit=32 * GIB)) is None

    def test_message_names_other_processes(self):
        guard = MemoryGuard()
        assert guard.check(reading(main=9 * GIB, available=50 * GIB)) is None
        alarm = guard.check(reading(main=9 * GIB, available=GIB))
        assert all(part in alarm.message for part in ("9 GiB, 90 %", "10 GiB", "everything else", "5 GiB to 54 GiB"))


def test_no_alarm_without_readings():
    assert MemoryGuard(budget_bytes=1).check(Reading(0.0)) is None


@pytest.mark.parametrize("fraction", [0, -0.1, 1.1])
def test_invalid_fraction(fraction):
    with pytest.raises(ValueError, match=f"limit_fraction={fraction}"):
        MemoryGuard(fraction)


def test_invalid_budget():
    with pytest.raises(ValueError, match="budget_bytes=0"):
        MemoryGuard(budget_bytes=0)
