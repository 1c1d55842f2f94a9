"""What the curves of runs are drawn over; needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def progress_axis(runs: Iterable[Mapping[str, Sequence[float]]]) -> tuple[str, str]:
    """Column and name of what the curves of some runs are drawn over: epochs if one of them takes no environment steps.

    Args:
        runs (iterable of mappings): columns of each run's ``metrics.csv``.
    """
    if all(any(steps > 0 for steps in metrics.get("env_steps", [])) for metrics in runs):
        return "env_steps", "environment steps"
    return "epoch", "epochs"
