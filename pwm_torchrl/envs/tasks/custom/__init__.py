"""The eleven tasks that TD-MPC2 added to the DeepMind Control suite, one module per domain.

The table and :mod:`maker` need no simulator; the other modules import dm_control and are loaded by the maker.
"""

from __future__ import annotations

__all__ = ["CUSTOM_TASKS", "MODULES"]

#: Tasks by domain; each is a function of the domain's module.
CUSTOM_TASKS: dict[str, tuple[str, ...]] = {
    "walker": ("walk_backwards", "run_backwards"),
    "cheetah": ("run_backwards", "run_front", "run_back", "jump"),
    "hopper": ("hop_backwards",),
    "reacher": ("three_easy", "three_hard"),
    "ball_in_cup": ("spin",),
    "pendulum": ("spin",),
}

#: The module of a domain.
MODULES = {domain: f"{__name__}.{domain}" for domain in CUSTOM_TASKS}
