"""Alarms of the memory guard."""

from __future__ import annotations

from dataclasses import replace

import pytest
from machine_cases import reading

from pwm_torchrl.memory.readings import GIB, MIB, Reading
from pwm_torchrl.memory.watch import MemoryGuard


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
