"""Every way in which a job ends, what is done about it, and the plan after one that was too small."""

from __future__ import annotations

import json

import pytest

from pwm_torchrl.cluster.restarts import (
    AttemptEnd,
    Decision,
    JobRecord,
    Restart,
    apply_plan,
    classify,
    decide_restart,
    next_plan,
    read_job,
    requested_memory_mb,
    restarts_of,
)
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.stop import NO_STEP_IN_TIME

FINE = {"returncode": 0, "oom_kills": 0, "signals": {}, "preempted": False}
USR2 = {**FINE, "signals": {"SIGUSR2": 1.0}}
TERM = {**FINE, "signals": {"SIGTERM": 1.0}}
KILLED = {**FINE, "returncode": -9}
STOPPED = {"status": "stopped", "reason": "SIGUSR2"}
ENDED = {"status": "stopped", "reason": "SIGTERM"}


@pytest.mark.parametrize(
    ("outcome", "evidence", "record", "term", "reason"),
    [
        ({"status": "finished"}, [FINE], JobRecord(), False, "finished"),
        ({"status": "finished"}, [{**FINE, "oom_kills": 1}], JobRecord(), False, "finished"),
        (STOPPED, [USR2], JobRecord("RUNNING"), False, "timeout"),
        (STOPPED, [{**USR2, "preempted": True}], JobRecord("RUNNING"), False, "preemption"),
        (None, [{**USR2, "returncode": NO_STEP_IN_TIME}], JobRecord("RUNNING"), False, "timeout"),
        (None, [{**USR2, "returncode": NO_STEP_IN_TIME, "preempted": True}], JobRecord(), False, "preemption"),
        (ENDED, [TERM], JobRecord("COMPLETING", "TimeLimit"), True, "timeout"),
        (None, [], JobRecord("COMPLETING", "TimeLimit"), True, "timeout"),
        (ENDED, [TERM], JobRecord("COMPLETING", "None", requeued=True), True, "requeue"),
        (None, [], JobRecord("COMPLETING", "None", requeued=True), True, "requeue"),
        (ENDED, [TERM], JobRecord("CANCELLED"), True, "stopped"),
        # scancel, as SLURM shows it at first: nobody asked for the job to come back.
        (ENDED, [TERM], JobRecord("COMPLETING", "None"), True, "stopped"),
        (None, [], JobRecord("COMPLETING", "None"), True, "stopped"),
        (ENDED, [TERM], JobRecord("RUNNING", "None"), False, "stopped"),
        # SLURM does not answer: better once too often than never.
        (ENDED, [TERM], JobRecord(), True, "requeue"),
        ({"status": "stopped", "reason": None}, [FINE], JobRecord("RUNNING"), False, "stopped"),
        ({"status": "memory"}, [{**FINE, "returncode": 1}], JobRecord(), False, "memory"),
        (None, [{**KILLED, "oom_kills": 1}], JobRecord(), False, "memory"),
        # A worker was killed, the run saw a broken environment; or it saw nothing at all.
        ({"status": "failed"}, [{**FINE, "returncode": 1, "oom_kills": 1}], None, False, "memory"),
        # Of several tasks one was killed, the others lost it.
        ({"status": "failed"}, [{**FINE, "returncode": 1}, {**KILLED, "oom_kills": 2}], None, False, "memory"),
        ({"status": "failed"}, [{**FINE, "returncode": 1}, KILLED], None, False, "killed"),
        # The supervisor died too: SLURM's record of the step is all there is.
        (None, [], JobRecord(derived_oom=True), False, "memory"),
        (None, [], JobRecord(), False, "killed"),
        (None, [KILLED], JobRecord(), False, "killed"),
        (None, [{**FINE, "returncode": 1}], JobRecord(), False, "start_up"),
        ({"status": "failed", "error": "KeyError: 'a bug'"}, [{**FINE, "returncode": 1}], JobRecord(), False, "failed"),
        ({"status": "storage"}, [{**FINE, "returncode": 1}], JobRecord(), False, "storage"),
        ({"status": "superseded"}, [{**FINE, "returncode": 1}], JobRecord(), False, "superseded"),
    ],
)  # fmt: skip
def test_classified(outcome, evidence, record, term, reason):
    end = classify(outcome, evidence, term_received=term, record=record)
    assert end.reason == reason
    assert end.slurm_requeues == bool(record and record.requeued)


def restarts(*reasons: str, progressed: bool = True) -> list[Restart]:
    return [Restart(reason, progressed) for reason in reasons]


@pytest.mark.parametrize(
    ("end", "progressed", "before", "expected"),
    [
        (AttemptEnd("finished"), True, [], ("end", "finished")),
        (AttemptEnd("failed", "KeyError"), True, [], ("end", "failed")),
        (AttemptEnd("storage"), True, [], ("end", "storage")),
        (AttemptEnd("start_up"), False, [], ("end", "start_up")),
        (AttemptEnd("timeout"), True, restarts(*["timeout"] * 50), ("requeue", "")),
        (AttemptEnd("preemption", slurm_requeues=True), True, [], ("wait", "")),
        (AttemptEnd("killed"), False, [], ("requeue", "")),
        (AttemptEnd("killed"), False, restarts("timeout"), ("requeue", "")),
        (AttemptEnd("killed"), False, restarts("timeout", progressed=False), ("end", "stalled")),
        (AttemptEnd("timeout"), False, restarts("killed", progressed=False), ("end", "stalled")),
        (AttemptEnd("timeout"), True, restarts("killed", progressed=False), ("requeue", "")),
        # More memory is another try, not the same one again.
        (AttemptEnd("memory"), False, restarts("memory", "memory", progressed=False), ("resubmit", "")),
        (AttemptEnd("memory"), False, restarts("memory", "memory", "memory"), ("end", "memory")),
        (AttemptEnd("memory"), True, restarts("memory", "timeout", "memory", "memory"), ("end", "memory")),
    ],
)
def test_answered(end, progressed, before, expected):
    decision = decide_restart(end, progressed, before, max_memory_restarts=3)
    assert isinstance(decision, Decision)
    assert (decision.action, decision.status) == expected


def test_an_end_says_why():
    decision = decide_restart(
        AttemptEnd("killed", "a process of the job was killed"), False, restarts("killed", progressed=False), 3
    )
    assert decision.why == (
        "2 attempts in a row ended without progress, the last one because a process of the job was killed"
    )


class TestDamagedFiles:
    """They are read by what a job's end decides, which must not itself end in a traceback."""

    @pytest.mark.parametrize("asked", [None, "2000", 0, True, [2000], {}])
    def test_an_amount_of_memory_that_is_none(self, asked, tmp_path):
        (tmp_path / "job.json").write_text(json.dumps({"mem_mb": asked}))
        with pytest.raises(ConfigurationError, match=r"job\.json is damaged: mem_mb="):
            requested_memory_mb(tmp_path, read_job(tmp_path))
        (tmp_path / "job.json").write_text(json.dumps({"mem_mb": 2000}))
        assert requested_memory_mb(tmp_path, read_job(tmp_path)) == 2000

    @pytest.mark.parametrize("ids", [None, "7", {"7": 1}, [7], [["7"]]])
    def test_lists_that_are_none(self, ids, tmp_path):
        (tmp_path / "job.json").write_text(json.dumps({"job_ids": ids, "awaited_by": ["8"], "cluster": "l40s"}))
        assert read_job(tmp_path) == {"awaited_by": ["8"], "cluster": "l40s"}

    def test_a_restart_without_its_reason(self, tmp_path):
        (tmp_path / "events.jsonl").write_text('{"event": "restart"}\n{"event": "restart", "reason": "memory"}\n')
        assert restarts_of(tmp_path) == [Restart("unknown", False), Restart("memory", False)]


# The plan after one that was too small --------------------------------------------------------------------------------


CHOICES = {
    "model_micro_batch": None,
    "actor_micro_batch": 64,
    "critic_micro_batch": None,
    "checkpoint_substeps": False,
    "replay_storage": "memory",
}

BATCHES = {"model": 256, "actor": 128, "critic": 512}


def config(host_gib=None, **changes) -> Config:
    cfg = Config()
    cfg.cluster.host_gib = host_gib
    for key, value in changes.items():
        setattr(cfg.memory, key, value)
    return cfg


def saved(run_dir) -> dict:
    return json.loads((run_dir / "memory_plan.json").read_text())


def write(run_dir, compute="host", **changes):
    plan = {"choices": {**CHOICES, **changes}, "batches": BATCHES, "prediction": {"compute": compute}}
    (run_dir / "memory_plan.json").write_text(json.dumps(plan))


class TestMoreMemory:
    def test_comes_first(self, tmp_path):
        write(tmp_path)
        plan = next_plan(tmp_path, config(host_gib=64), 8000)
        assert (plan.mem_mb, plan.choices) == (12000, {})
        apply_plan(tmp_path, plan)
        assert saved(tmp_path)["choices"] == CHOICES

    def test_ends_at_the_ceiling(self, tmp_path):
        """64 GiB are 65536 MiB."""
        assert next_plan(tmp_path, config(host_gib=64), 50000).mem_mb == 65536


class TestAtTheCeiling:
    def test_smaller_parts_on_the_host(self, tmp_path):
        write(tmp_path)
        plan = next_plan(tmp_path, config(), 8000)
        assert plan.mem_mb == 8000
        assert plan.choices == {
            **CHOICES, "model_micro_batch": 128, "actor_micro_batch": 32, "critic_micro_batch": 256
        }  # fmt: skip
        assert plan.change == "smaller micro-batches: model 128, actor 32, critic 256"
        apply_plan(tmp_path, plan)
        assert saved(tmp_path)["choices"] == plan.choices
        assert saved(tmp_path)["prediction"] == {"compute": "host"}

    def test_what_the_configuration_sets_stays(self, tmp_path):
        write(tmp_path)
        plan = next_plan(tmp_path, config(model_micro_batch=200, critic_micro_batch=100), 8000)
        assert plan.choices == {**CHOICES, "actor_micro_batch": 32}

    @pytest.mark.parametrize("compute", ["device", "host"])
    def test_then_the_replay_leaves_memory(self, compute, tmp_path):
        ones = dict.fromkeys(("model_micro_batch", "actor_micro_batch", "critic_micro_batch"), 1)
        write(tmp_path, compute, **(ones if compute == "host" else {}))
        plan = next_plan(tmp_path, config(), 8000)
        assert plan.choices["replay_storage"] == "disk"

    def test_then_nothing_is_left(self, tmp_path):
        write(tmp_path, "device", replay_storage="disk")
        assert next_plan(tmp_path, config(), 8000) is None

    def test_a_fixed_plan_is_respected(self, tmp_path):
        write(tmp_path)
        assert next_plan(tmp_path, config(kind="fixed"), 8000) is None

    def test_without_a_plan_there_is_nothing_to_change(self, tmp_path):
        assert next_plan(tmp_path, config(), 8000) is None

    @pytest.mark.parametrize(
        "damage",
        [
            lambda plan: {},
            lambda plan: {key: value for key, value in plan.items() if key != "batches"},
            lambda plan: {**plan, "batches": {"model": "256"}},
            lambda plan: {**plan, "batches": {"policy": 256}},
            lambda plan: {**plan, "choices": {**plan["choices"], "actor_micro_batch": -64}},
            lambda plan: {**plan, "choices": {**plan["choices"], "colour": "red"}},
            lambda plan: {**plan, "choices": {}},
            lambda plan: {**plan, "prediction": {}},
        ],
    )
    def test_with_a_damaged_plan_neither_and_that_is_said(self, damage, tmp_path, capsys):
        write(tmp_path)
        (tmp_path / "memory_plan.json").write_text(json.dumps(damage(saved(tmp_path))))
        assert next_plan(tmp_path, config(), 8000) is None
        assert str(tmp_path / "memory_plan.json") in capsys.readouterr().err

    def test_only_updates_that_the_run_has_are_split(self, tmp_path):
        """One that has a differentiable environment trains no model."""
        write(tmp_path)
        (tmp_path / "memory_plan.json").write_text(json.dumps({**saved(tmp_path), "batches": {"actor": 128}}))
        plan = next_plan(tmp_path, config(), 8000)
        assert plan.choices == {**CHOICES, "actor_micro_batch": 32}
        assert plan.change == "smaller micro-batches: actor 32"
