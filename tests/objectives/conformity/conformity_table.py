"""Which checks have no meaning for which loss, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from conformity_cases import CASES, LOSSES, Case
from loss_contract import CHECKS, assert_equal, called, own_networks
from torchrl.objectives import SoftUpdate
from torchrl.objectives.common import LossModule

from pwm_torchrl.objectives import PWMActorLoss, PWMModelLoss, PWMValueLoss


class Reason(NamedTuple):
    """Why a check has no meaning for a loss, and what shows it."""

    text: str
    shown: Callable[[Case], None]


def trains_one_network_by_itself(case: Case) -> None:
    assert list(own_networks(case.make())) == ["world_model"]
    assert case.reads(case.make()) == []


def maps_over_nothing(case: Case) -> None:
    expected = called(case.make(), case.data())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "vmap", None)
        assert_equal(called(case.make(), case.data()), expected)


def has_no_targets(case: Case) -> None:
    with pytest.raises(RuntimeError, match="Did not find any target parameters"):
        SoftUpdate(case.make(), tau=0.1)


def has_no_estimator(case: Case) -> None:
    with pytest.raises(NotImplementedError):
        case.make().make_value_estimator()


def reads_no_mask(case: Case) -> None:
    data = case.data()
    masked = data.clone().set(("collector", "mask"), torch.zeros(*data.shape, 1, dtype=torch.bool))
    assert_equal(called(case.make(), masked), called(case.make(), data))


NOT_MEANINGFUL: dict[tuple[str, type[LossModule]], Reason] = {
    ("separate_losses", PWMModelLoss): Reason(
        "its terms train one world model and no other network has a part in them", trains_one_network_by_itself
    ),
    ("deactivate_vmap", PWMModelLoss): Reason("it evaluates one world model, no ensemble", maps_over_nothing),
    ("deactivate_vmap", PWMActorLoss): Reason(
        "it evaluates one policy; what an ensemble of values is reduced to is the value network's business",
        maps_over_nothing,
    ),
    ("loss_mask", PWMActorLoss): Reason(
        "a rollout starts from every state that is given, none of which is a position in a trajectory", reads_no_mask
    ),
    ("target_parameters", PWMValueLoss): Reason(
        "it regresses on targets that come with the data; the values in them are delayed where they are computed, in "
        "`PWMActorLoss(delay_value=True)`",
        has_no_targets,
    ),
    ("value_estimators", PWMModelLoss): Reason("it knows no values", has_no_estimator),
}


def pairs() -> list[tuple[str, Case]]:
    """Every check with every case that it has meaning for; what is compiled is one case of each loss."""
    return [
        (name, case)
        for case in CASES
        for name in CHECKS
        if (name, case.loss) not in NOT_MEANINGFUL and (name != "compiles" or case.compiled)
    ]


def title(name: str) -> str:
    return str(CHECKS[name].__doc__).split("\n")[0]


def table() -> str:
    """Loss by check as Markdown, as ``docs/conformity.md`` has it."""
    covered = {(name, case.loss) for name, case in pairs()}
    reasons = list(NOT_MEANINGFUL)
    lines = [
        "| check | " + " | ".join(f"`{loss.__name__}`" for loss in LOSSES) + " |",
        "|---|" + "---|" * len(LOSSES),
    ]
    for name in CHECKS:
        passes = "checked where there is a GPU" if name == "devices" else "passes"
        cells = [
            passes if (name, loss) in covered else f"not meaningful [{reasons.index((name, loss)) + 1}]"
            for loss in LOSSES
        ]
        lines.append(f"| **{name}**: {title(name)} | " + " | ".join(cells) + " |")
    lines.append("")
    lines += [
        f"{number}. `{loss.__name__}`, {name}: {reason.text}."
        for number, ((name, loss), reason) in enumerate(NOT_MEANINGFUL.items(), 1)
    ]
    return "\n".join(lines)
