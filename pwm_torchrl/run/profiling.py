"""A profile of a run's updates: where their time goes, as a trace that browsers show (``training.profile``)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from pwm_torchrl.algorithm.updates import Updates
from pwm_torchrl.terminal import say, warn

__all__ = ["TRACE", "WARM_UP", "UpdateProfile"]

#: The trace in the run directory.
TRACE = "trace.json.gz"
#: Updates of each network that this process has made before the profile begins. The first ones compile, allocate and
#: choose kernels, which later ones do not.
WARM_UP = 2


class UpdateProfile:
    """Profiles a number of consecutive updates in steady state, then takes itself away.

    It begins in an epoch whose updates are not the run's first, when every network that is trained has been updated
    ``WARM_UP`` times by this process, and it lasts for ``count`` updates of any of them. What happens between two
    updates (collection, evaluation, checkpoints) is in the trace too. Each update has a range of its name in it:
    ``model update``, ``actor update``, ``critic update``. The trace is in Chrome's format. An attempt that resumes the
    run profiles anew and replaces the trace.

    Args:
        updates (Updates): is profiled.
        count (int): updates to record, at least 1.
        run_dir (Path): where ``trace.json.gz`` goes.
        started (callable): tells whether the first updates of the run have been made.
        device (torch.device): of the updates; a GPU's kernels are recorded beside the operators.
    """

    def __init__(
        self, updates: Updates, count: int, run_dir: Path, started: Callable[[], bool], device: torch.device
    ) -> None:
        self._updates, self._count, self._started = updates, count, started
        self._path = run_dir / TRACE
        self._made: Counter[str] = Counter()
        self._recorded = 0
        self._written = False
        self._profile: profile | None = None
        self._activities = [ProfilerActivity.CPU]
        if device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        else:
            # Torch's profiler prints two lines of its own when it starts and stops. They are above errors in its scale,
            # so this hides its errors too: those of a GPU's counters, which must be seen, and on a CPU there are none.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        updates.around = self._around

    @contextmanager
    def _around(self, update: str) -> Iterator[None]:
        if self._profile is None and self._warm():
            self._begin()
        with record_function(f"{update} update"):
            yield
        self._made[update] += 1
        if self._profile is None:
            return
        self._recorded = self._profile.step_num  # the first step is the profiler's own warm-up
        self._profile.step()
        if self._recorded == self._count:
            self.close()

    def _warm(self) -> bool:
        trained = self._updates.executor.undo
        return self._started() and all(self._made[name] >= WARM_UP for name in trained)

    def _begin(self) -> None:
        self._profile = profile(
            activities=self._activities,
            schedule=schedule(wait=0, warmup=1, active=self._count, repeat=1),
            on_trace_ready=self._write,
        )
        self._profile.start()

    def close(self) -> None:
        """Profile no more; a run that ends before all updates are recorded writes those that are, and says so."""
        if self._updates.around is None:
            return
        self._updates.around = None
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
        if not self._written:
            say(f"no {TRACE}: the run ended before its updates were in steady state (training.profile={self._count})")

    def _write(self, recorded: profile) -> None:
        if not self._recorded:  # stopped in the profiler's warm-up
            return
        self._written = True
        unfinished = self._path.with_name(f".unfinished_{TRACE}")  # the ending makes the profiler compress it
        try:
            recorded.export_chrome_trace(str(unfinished))
            os.replace(unfinished, self._path)
        except OSError as error:  # a full disk costs the trace, and the run decides about itself
            unfinished.unlink(missing_ok=True)
            warn(f"no {TRACE}: {error}")
            return
        wanted = "" if self._recorded == self._count else f" of {self._count}"
        say(f"profile of {self._recorded}{wanted} updates: {self._path} (open it in https://ui.perfetto.dev)")
