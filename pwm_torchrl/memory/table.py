"""A plan as a table that a person understands."""

from __future__ import annotations

import textwrap

from pwm_torchrl.memory.neighbours import Alternative
from pwm_torchrl.memory.plan import Plan
from pwm_torchrl.memory.predict import CACHE, DEVICE, DISK, FIELDS, HOST
from pwm_torchrl.memory.units import format_bytes

TITLES = {HOST: "host memory", DEVICE: "GPU memory", CACHE: "page cache", DISK: "disk"}
WIDTH = 120
_NAME, _AMOUNT = 22, 11


def plan_table(plan: Plan, width: int = WIDTH) -> str:
    """What the run needs, where, how much, why; then the budgets, the choices and the neighbouring plans.

    Args:
        plan (Plan): the plan.
        width (int): columns that a line has at most. Defaults to :data:`WIDTH`.
    """
    lines: list[str] = []
    for place in (DEVICE, HOST, CACHE, DISK):
        if any(item.place == place for item in plan.prediction.items):
            lines += [*_place(plan, place, width), ""]
    return "\n".join([*lines, *_choices(plan, width), "", *_neighbours(plan, width)])


def _place(plan: Plan, place: str, width: int) -> list[str]:
    """What is needed in one place, and whether it is there."""
    prediction = plan.prediction
    unverified = place == DEVICE and not prediction.verified
    lines = [f"{TITLES[place]}, predicted" + (", unverified: not measured on such a device" if unverified else "")]
    items = [item for item in prediction.items if item.place == place]
    for item in items:
        if not item.shared:
            lines += _row(item.what, format_bytes(item.bytes), item.why, width)
    shared = sorted((item for item in items if item.shared), key=lambda item: -item.bytes)
    for item in shared[:1]:
        lines += _row(item.what, format_bytes(item.bytes), item.why, width)
    if shared[1:]:
        lines.append("  at other times, and less:")
    for item in shared[1:]:
        lines += _row(item.what, f"({format_bytes(item.bytes)})", item.why, width)
    return lines + _row("together", format_bytes(prediction.total(place)), _verdict(plan, place), width)


def _row(what: str, amount: str, why: str, width: int) -> list[str]:
    head = f"  {what:<{_NAME}}{amount:>{_AMOUNT}}  "
    rest = " " * len(head)
    wrapped = textwrap.wrap(why, width, initial_indent=head, subsequent_indent=rest, break_on_hyphens=False)
    return wrapped or [head.rstrip()]


def _verdict(plan: Plan, place: str) -> str:
    budget = plan.budgets.get(place)
    if budget is None:
        return ""
    fits = "DOES NOT FIT into" if plan.lacks(place) else "fits into"
    guard = f", of which runs stop at {plan.stop_at:.0%}" if place == HOST else ""
    return (
        f"{fits} {format_bytes(plan.usable(place))}: {format_bytes(budget.bytes)} ({budget.source}){guard}, less a "
        f"margin of {plan.margin:.0%}"
    )


def _choices(plan: Plan, width: int) -> list[str]:
    """The choices as words of the command line."""
    choices = plan.choices
    lines = ["choices" if plan.automatic else "choices, as written (memory=fixed)"]
    for field in FIELDS.values():
        size = getattr(choices, field)
        word = f"  memory.{field}={'null' if size is None else size}"
        lines.append(f"{word:<{_NAME + _AMOUNT + 6}}{'# the whole batch at once' if size is None else ''}".rstrip())
    lines.append(f"  model.dynamics.checkpoint_substeps={str(choices.checkpoint_substeps).lower()}")
    lines.append(f"  training.replay_storage={choices.replay_storage}")
    if plan.prediction.returns_freed_memory:
        text = "freed memory goes back to the kernel at once: updates are slower and hold what they use"
        lines += textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")
    return lines


def _neighbours(plan: Plan, width: int) -> list[str]:
    if not plan.automatic:
        return ["next plans: none was looked for; memory=auto chooses what is open"]

    def lines(name: str, other: Alternative | None, end: str) -> list[str]:
        text = f"none, {end}"
        if other is not None:
            text = f"{format_bytes(other.bytes)} of {TITLES[plan.prediction.compute]} with {other.change}"
        return textwrap.wrap(f"next {name} plan: {text}", width, subsequent_indent="  ", break_on_hyphens=False)

    return [
        *lines("larger", plan.larger, "nothing that is open would make this one faster"),
        *lines("cheaper", plan.cheaper, "nothing that is open would make this one smaller"),
    ]
