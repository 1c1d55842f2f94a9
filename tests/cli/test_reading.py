"""A key that a run does not read is refused where it is typed: what small runs read is recorded and compared."""

from __future__ import annotations

import pytest
from reading import LEAVES, RUNS, SMALL, read_elsewhere

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.modes import of_world_model
from pwm_torchrl.cli.words import OF_SLURM, RULES

#: Keys that a run in this process does not read and that are accepted beside it all the same, with the reason.
ACCEPTED = {
    "cluster.kind": "says where a run goes, which commands read",
    "cluster.name": "a label",
    "cluster.max_memory_restarts": "read where a job has ended",
    "pretraining": "read by submit for task=all, refused by other modes",
    "tasks": "likewise",
}


@pytest.fixture(scope="module")
def read() -> dict[str, set[str]]:
    """What each run reads."""
    return read_elsewhere()


@pytest.mark.parametrize("name", RUNS)
def test_what_is_not_read_is_refused(name, read):
    config = compose([*RUNS[name], *SMALL, "run_dir=x"])
    unread = [key for key in LEAVES if key not in read[name] and key not in ACCEPTED and key not in OF_SLURM]
    if (
        config.model.dynamics.kind == "flow"
    ):  # its options are read as one; test_meaning compares them with what it takes
        unread = [key for key in unread if not key.startswith("model.dynamics.")]
    if name == "extract":
        unread = [key for key in unread if not of_world_model(key)]  # refused before rules are asked
    assert "logger.project" in unread, "nothing is recorded"
    silent = [key for key in unread if not any(rule.covers(key) and not rule.allows(config) for rule in RULES)]
    assert not silent


def test_what_is_accepted_is_a_key():
    assert ACCEPTED.keys() <= set(LEAVES)
