"""The table of a plan."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import FACTS, PLENTY, automatic, budgets, plan

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.memory.budget import Budget, Candidate
from pwm_torchrl.memory.plan import WIDTH, Alternative, Plan, make_plan, plan_table
from pwm_torchrl.memory.predict import CACHE, DEVICE, DISK, HOST, Choices, Item, Prediction
from pwm_torchrl.memory.readings import GIB, MIB

ITEMS = (
    Item("parameters", 3 * MIB, HOST, "world model, actor, critics"),
    Item("actor update", 90 * MIB, HOST, "128 rollouts at once", shared=True),
    Item("model update", 100 * MIB, HOST, "1024 slices in micro-batches of 64", shared=True),
    Item("replay", 2 * GIB, DISK, "1,000,000 transitions"),
    Item("replay", 2 * GIB, CACHE, "reclaimable pages"),
)

TABLE = """\
host memory, predicted
  parameters                  3 MiB  world model, actor, critics
  model update              100 MiB  1024 slices in micro-batches of 64
  other phases, never at the same time:
  actor update             (90 MiB)  128 rollouts at once
  total                     103 MiB  fits into 783 MiB: 1 GiB (memory.host_gib), a run stops at 85% of it, minus a
                                     margin of 10%

page cache, predicted
  replay                      2 GiB  reclaimable pages
  total                       2 GiB

disk, predicted
  replay                      2 GiB  1,000,000 transitions
  total                       2 GiB

choices
  memory.model_micro_batch=64
  memory.actor_micro_batch=null        # the whole batch at once
  memory.critic_micro_batch=null       # the whole batch at once
  model.dynamics.checkpoint_substeps=true
  training.replay_storage=disk

next larger plan: 600 MiB of host memory with the model update in micro-batches of 128
next cheaper plan: none, no open setting would make this one smaller"""


def small(**changes) -> Plan:
    budget = Budget((Candidate(GIB, "memory.host_gib"), Candidate(2 * GIB, "free RAM")))
    made = Plan(
        Choices(64, None, None, True, "disk"),
        Prediction(ITEMS, HOST, True, 0),
        {HOST: budget},
        margin=0.1,
        stop_at=0.85,
        automatic=True,
        batches={"model": 256, "actor": 128, "critic": 256},
        larger=Alternative("the model update in micro-batches of 128", 600 * MIB),
    )
    return replace(made, **changes)


def test_whole_table():
    assert plan_table(small()) == TABLE


def test_choices_are_valid_overrides():
    """With memory=fixed, they give the same plan."""
    found = plan(changes={"training.replay_capacity": 3 * 10**8, "memory.model_micro_batch": 64})
    section = plan_table(found).split("choices\n")[1].split("\n\n")[0]
    words = [line.split("#")[0].strip() for line in section.splitlines()]
    again = compose(["memory=fixed", *words])
    assert again.memory.model_micro_batch == found.choices.model_micro_batch == 64
    assert again.memory.critic_micro_batch is None
    assert again.model.dynamics.checkpoint_substeps is found.choices.checkpoint_substeps is False
    assert again.training.replay_storage == found.choices.replay_storage == "disk"


def test_a_plan_that_does_not_fit():
    tight = {HOST: Budget((Candidate(MIB, "memory.host_gib"),))}
    assert "DOES NOT FIT into 783 KiB" in plan_table(small(budgets=tight))
    assert "DOES NOT FIT" not in plan_table(small())


def test_a_fixed_plan_has_no_alternatives():
    text = plan_table(small(automatic=False, larger=None))
    assert "memory=fixed" in text
    assert "next larger" not in text


def test_returning_freed_memory_is_mentioned():
    large = replace(ITEMS[2], bytes=GIB)
    assert "freed memory" in plan_table(small(prediction=Prediction((large,), HOST, True, 0)))
    assert "freed memory" not in plan_table(small(prediction=Prediction(ITEMS[:2], HOST, True, 0)))


def test_gpu_predictions_are_marked_unverified():
    text = plan_table(plan(PLENTY, PLENTY))
    assert text.startswith("GPU memory, predicted, unverified")
    assert "host memory, predicted\n" in text
    assert "unverified" not in plan_table(plan())
    assert text.count("stops at 85%") == 1  # the guard checks host memory


@pytest.mark.parametrize("host", [PLENTY, None])
@pytest.mark.parametrize("device", [PLENTY, None])
def test_lines_are_short(host, device):
    """Even with a cgroup name that is longer than a line."""
    group = "/sys/fs/cgroup/system.slice/slurmstepd.scope/" + 10 * "job_of_somebody/"
    bounds = budgets(host or 4 * GIB, device)
    bounds[HOST] = Budget((Candidate(bounds[HOST].bytes, f"limit of cgroup {group} (memory.max)"),))
    text = plan_table(make_plan(automatic(), FACTS, bounds))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert all(line == line.rstrip() for line in text.splitlines())
    assert group in text.replace("\n", "").replace(" ", "")
    assert (DEVICE in bounds) == ("GPU memory" in text)
