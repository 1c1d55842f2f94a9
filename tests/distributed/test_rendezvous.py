"""Rank and rendezvous, from the launcher's environment."""

from __future__ import annotations

import os

import pytest
import torch

from pwm_torchrl.devices import available_cpus, set_threads
from pwm_torchrl.distributed.rendezvous import Rendezvous, find_rendezvous, is_replica
from pwm_torchrl.errors import ConfigurationError

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node7", "MASTER_PORT": "29500"}
SUBMITIT = {
    "SUBMITIT_EXECUTOR": "local",
    "SUBMITIT_LOCAL_JOB_ID": "17",
    "SUBMITIT_LOCAL_NTASKS": "2",
    "SUBMITIT_LOCAL_GLOBALID": "1",
    "SUBMITIT_LOCAL_LOCALID": "1",
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Remove the variables of a launcher that may have started these tests."""
    for name in list(os.environ):
        if name in (*TORCHRUN, "LOCAL_WORLD_SIZE") or name.startswith("SUBMITIT_"):
            monkeypatch.delenv(name)
    return monkeypatch


def launched_with(patch: pytest.MonkeyPatch, values: dict[str, str]) -> None:
    for name, value in values.items():
        patch.setenv(name, value)


class TestFindRendezvous:
    def test_alone(self, environment):
        assert find_rendezvous() is None
        assert not is_replica()

    def test_torchrun(self, environment):
        launched_with(environment, TORCHRUN)
        assert find_rendezvous() == Rendezvous(rank=1, size=4, local_rank=0, address="node7", port=29500)
        assert is_replica()

    def test_torchrun_of_one(self, environment):
        launched_with(environment, {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1"})
        assert find_rendezvous() is None

    def test_submitit(self, environment):
        launched_with(environment, SUBMITIT)
        found = find_rendezvous()
        assert (found.rank, found.size, found.local_rank) == (1, 2, 1)
        assert found.address == "127.0.0.1", "the name of a single node need not resolve"
        launched_with(environment, {"SUBMITIT_LOCAL_GLOBALID": "0", "SUBMITIT_LOCAL_LOCALID": "0"})
        leader = find_rendezvous()
        assert (leader.rank, leader.port) == (0, found.port), "all ranks use the same port"
        assert not is_replica()
        environment.setenv("SUBMITIT_LOCAL_NTASKS", "1")
        assert find_rendezvous() is None

    def test_a_variable_left_from_a_job(self, environment):
        environment.setenv("SUBMITIT_EXECUTOR", "debug")
        assert find_rendezvous() is None

    def test_torchrun_within_a_job(self, environment):
        launched_with(environment, {**SUBMITIT, **TORCHRUN})
        assert find_rendezvous().size == 4

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"MASTER_ADDR": ""}, r"WORLD_SIZE=4.*MASTER_ADDR"),
            ({"RANK": "one"}, r"RANK.*'one'"),
            ({"RANK": "4"}, r"RANK=4.*3"),
        ],
    )
    def test_invalid_variables(self, environment, changes, message):
        launched_with(environment, {**TORCHRUN, **changes})
        with pytest.raises(ConfigurationError, match=message):
            find_rendezvous()

    def test_export(self, environment):
        launched_with(environment, dict.fromkeys(TORCHRUN, ""))
        Rendezvous(1, 4, 0, "node7", 29500).export()
        assert {name: os.environ[name] for name in TORCHRUN if name != "LOCAL_RANK"} == {
            name: value for name, value in TORCHRUN.items() if name != "LOCAL_RANK"
        }


def test_ranks_of_torchrun_share_the_cpus(environment):
    before = torch.get_num_threads()
    try:
        assert set_threads(None) == available_cpus()
        environment.setenv("LOCAL_WORLD_SIZE", str(2 * available_cpus()))
        assert set_threads(None) == 1
        assert set_threads(3) == 3
    finally:
        torch.set_num_threads(before)
