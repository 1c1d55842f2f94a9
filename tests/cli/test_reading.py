"""A key that a run does not read is refused where it is typed: what small runs read is recorded and compared.

What is left out of that comparison has to be read by something else, which is asked here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from reading import LEAVES, RUNS, SMALL, read_elsewhere, recorded
from slurm_texts import SITE

from pwm_torchrl.cli import finalize, prepare
from pwm_torchrl.cli.command_line import SLURM_KEYS, USAGE_RULES, is_used
from pwm_torchrl.cli.compose import compose, compose_unchecked
from pwm_torchrl.cli.derived_settings import apply_mode, is_world_model_key
from pwm_torchrl.cli.run_requests import ComposedRun, lacks_world_model
from pwm_torchrl.cluster.resources import sbatch_parameters
from pwm_torchrl.cluster.restarts import save_smaller_plan
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules.dynamics.factory import options_of
from pwm_torchrl.report.estimate import hardware_of

#: Keys that some run in this process does not read and that are accepted beside it all the same, with what reads them.
ACCEPTED: dict[str, Callable[[Path], object]] = {
    "cluster.kind": lambda folder: prepare.place_of(compose([])),
    "cluster.name": lambda folder: hardware_of(compose(["cluster=cpu"]), None),
    "cluster.max_memory_restarts": lambda folder: save_smaller_plan(folder, compose([]), {"status": "memory"}),
}
#: Read by a pre-training, and by submit for task=all; what an online run says of it is in test_modes.py.
TASKS = "tasks"


@pytest.fixture(scope="module")
def read() -> dict[str, set[str]]:
    """What each run reads."""
    return read_elsewhere()


def is_refused(key: str, config: Config) -> bool:
    """Whether a key is refused where it is typed."""
    if any(rule.covers(key) and not rule.allows(config) for rule in USAGE_RULES):
        return True
    if not is_used(key, config.algorithm.name, config.mode):
        return True
    if config.mode != "extract" or not is_world_model_key(key):
        return False
    with pytest.raises(ConfigurationError, match=key):
        apply_mode(config, [key])
    return True


def options_of_flow(config: Config) -> set[str]:
    """Keys of the options that the configuration's flow takes, which are read as one."""
    dynamics = config.model.dynamics
    if dynamics.kind != "flow":
        return set()
    return {f"model.dynamics.{option}" for option in options_of("flow", dynamics.parameterization)}


@pytest.mark.parametrize("name", RUNS)
def test_what_is_not_read_is_refused(name, read):
    config = compose([*RUNS[name], *SMALL, "run_dir=x"])
    others = {*ACCEPTED, *SLURM_KEYS, *options_of_flow(config), *([TASKS] if config.mode == "online" else [])}
    unread = [key for key in LEAVES if key not in read[name] and key not in others]
    assert "logger.project" in unread, "nothing is recorded"
    assert not [key for key in unread if not is_refused(key, config)]


@pytest.mark.parametrize("key", ACCEPTED)
def test_what_no_run_reads_is_read_elsewhere(key, read, tmp_path):
    assert key in LEAVES
    assert not [name for name in RUNS if key in read[name]], "it is no exception"
    with recorded() as found:
        ACCEPTED[key](tmp_path)
    assert key in found


def test_what_is_for_slurm_is_read_where_a_job_is_queued(monkeypatch):
    monkeypatch.setattr(prepare, "site", lambda: SITE)
    config = compose(["cluster=l40s", "cluster.partition=gpu", "size=tiny", "model=mlp", "env=pendulum"])
    with recorded() as found:
        _, resources = prepare.plan_for_slurm([ComposedRun(config, [])])
        sbatch_parameters(config, resources, "x")
    assert {*SLURM_KEYS} - found == {"cluster.time"}, "which is turned into cluster.time_min when it is composed"


def test_tasks_are_read_by_a_pretraining_and_by_submit(read, monkeypatch):
    assert TASKS in read["pretrain"]
    facts = SimpleNamespace(task_names=("cup-catch", "walker-walk"))
    monkeypatch.setattr(finalize, "world_model_facts", lambda folder: facts)
    config = compose_unchecked(["experiment=extract", "world_model=x", "tasks=walker-walk"])
    assert finalize.tasks_to_extract(config) == ["walker-walk"]


def test_the_pretraining_is_read_where_it_begins():
    with recorded() as found:
        assert lacks_world_model(["experiment=extract", "task=all"])
    assert "pretraining" in found
