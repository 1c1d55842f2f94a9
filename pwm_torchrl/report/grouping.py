"""Groups of runs that differ in the seed only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pwm_torchrl.report.collect import RunReport, natural
from pwm_torchrl.run.directory import differing_keys

__all__ = ["Group", "group_runs"]

_NAMED = 3  # settings named in a label, at most


@dataclass
class Group:
    """Runs of one model, size and environment, and otherwise equal settings: they differ in the seed.

    Attributes:
        settings: what distinguishes them from other runs of the same model, size and environment, such as
            ``"algorithm.horizon=8"``; empty if there are no others.
    """

    model: str | None
    size: str | None
    env: str | None
    settings: str
    runs: list[RunReport]

    @property
    def label(self) -> str:
        """Everything but the environment, for a legend."""
        return " ".join(filter(None, [str(self.model), str(self.size), self.settings]))


def group_runs(runs: Sequence[RunReport]) -> list[Group]:
    """Groups in reading order: by environment, size, model and settings.

    Runs of the same model, size and environment that differ in a key that changes what is learned
    (:func:`~pwm_torchrl.run.directory.differing_keys`) are not averaged: they make groups of their own.
    """
    named: dict[tuple[Any, ...], list[RunReport]] = {}
    for run in runs:
        named.setdefault((run.model, run.size, run.env), []).append(run)
    groups = []
    for (model, size, env), members in named.items():
        for settings, equal in _by_settings(members):
            groups.append(Group(model, size, env, settings, sorted(equal, key=lambda run: natural(run.seed))))
    return sorted(groups, key=lambda g: [natural(text) for text in (g.env, g.size, g.model, g.settings)])


def _by_settings(runs: Sequence[RunReport]) -> list[tuple[str, list[RunReport]]]:
    """Runs of equal settings, with a label of the settings in which they differ from others."""
    readable = [run for run in runs if run.config is not None]
    changed: list[dict[str, Any]] = []
    for run in readable:
        assert readable[0].config is not None
        assert run.config is not None
        differing = differing_keys(readable[0].config, run.config)
        changed.append({key: pair for key, pair in differing.items() if key != "seed"})
    keys = {key: pair[0] for pairs in changed for key, pair in pairs.items()}  # with the first run's values
    found: dict[str, list[RunReport]] = {}
    for run, pairs in zip(readable, changed):
        words = [f"{key}={pairs[key][1] if key in pairs else first}" for key, first in sorted(keys.items())]
        found.setdefault("\n".join(words), []).append(run)
    labels = [_shortened(text.splitlines()) for text in found]
    # Groups whose short labels are equal get a number.
    labels = [f"{t} ({labels[: i + 1].count(t)})" if labels.count(t) > 1 else t for i, t in enumerate(labels)]
    result = list(zip(labels, found.values()))
    unreadable = [run for run in runs if run.config is None]
    return [*result, ("settings unknown", unreadable)] if unreadable else result


def _shortened(words: Sequence[str]) -> str:
    more = [f"{len(words) - _NAMED} more"] if len(words) > _NAMED else []
    return ", ".join([*words[:_NAMED], *more])
