"""Every loss against every check of the contract, and the table that says so."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conformity_cases import CASES, LOSSES, Case
from conformity_table import NOT_MEANINGFUL, pairs, table
from loss_contract import CHECKS

import pwm_torchrl
from pwm_torchrl import objectives

PAGE = Path(pwm_torchrl.__file__).parents[1] / "docs" / "conformity.md"
PAIRS = pairs()
EXCEPTIONS = [(key[0], case) for key in NOT_MEANINGFUL for case in CASES if case.loss is key[1]]


MARKS = {
    "devices": [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    "compiles": [pytest.mark.slow],
}


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(name, case, id=f"{case}-{name}", marks=MARKS.get(name, [])) for name, case in PAIRS]
)
def test_conforms(name: str, case: Case) -> None:
    CHECKS[name](case)


@pytest.mark.parametrize(("name", "case"), EXCEPTIONS, ids=[f"{case}-{name}" for name, case in EXCEPTIONS])
def test_what_has_no_meaning_has_none(name: str, case: Case) -> None:
    NOT_MEANINGFUL[name, case.loss].shown(case)


def test_every_loss_meets_every_check_or_says_why_not() -> None:
    assert {f"PWM{name}Loss" for name in ("Model", "Actor", "Value")} == {loss.__name__ for loss in LOSSES}
    # SoftActorLoss takes networks of this package only; tests/objectives/test_soft_actor_loss.py has its checks.
    everywhere = {name for name in objectives.__all__ if name.endswith("Loss")}
    assert everywhere - {"SoftActorLoss"} == {loss.__name__ for loss in LOSSES}
    checked = {(name, case.loss) for name, case in PAIRS}
    assert not checked & set(NOT_MEANINGFUL)
    assert checked | set(NOT_MEANINGFUL) == {(name, loss) for name in CHECKS for loss in LOSSES}


def test_the_page_has_the_table() -> None:
    """Where it differs, this is what belongs there."""
    assert table() in PAGE.read_text(), table()
