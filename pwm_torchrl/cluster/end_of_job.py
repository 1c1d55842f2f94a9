"""The last command of a job's batch script: finds out why the step ended, and requeues the job or ends the run.

python -m pwm_torchrl.cluster.end_of_job RUN_DIR --code N --term 0|1

It has only seconds until SLURM kills the job, so it does not import torch.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pwm_torchrl.cluster.restarts import (
    END,
    MEMORY,
    RESUBMIT,
    WAIT,
    AttemptEnd,
    Decision,
    JobExecution,
    JobRecord,
    NextPlan,
    apply_plan,
    decide,
    next_plan,
    read_job,
    record_decision,
    requested_memory_mb,
    write_job,
)
from pwm_torchrl.cluster.slurm import SlurmError, job_records, scontrol
from pwm_torchrl.cluster.submission import last_request, move_dependents, resubmit
from pwm_torchrl.commands import typed
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import load_config

#: Seconds by which SLURM's record of an out-of-memory kill may lag behind the return of srun.
PATIENCE_S = 6.0
#: Exit codes of the job by the run's status, as on the command line.
_CODES = {"finished": 0, "stopped": 0, "superseded": 0, "storage": 74, "memory": 75}


def main(argv: Sequence[str] | None = None) -> int:
    """Decide and act; returns the batch script's exit code."""
    parser = argparse.ArgumentParser(prog="python -m pwm_torchrl.cluster.end_of_job")
    parser.add_argument("run", type=Path)
    parser.add_argument("--code", type=int, required=True, help="exit code of srun")
    parser.add_argument("--term", type=int, choices=(0, 1), required=True, help="whether SIGTERM was received")
    args = parser.parse_args(argv)
    run, execution = args.run, JobExecution.here()
    record = read_record(execution)
    if args.code != 0 and not execution.evidence(run) and not record.requeued:
        record = _wait_for_the_step(execution)
    end, decision = decide(run, execution, term_received=bool(args.term), record=record)
    say(f"{run.name}: {end.reason}" + (f" ({end.detail})" if end.detail else ""))
    plan: NextPlan | None = None
    if decision.action == RESUBMIT:
        decision, plan = _next_memory_plan(run, end)
        say(decision.why)
    record_decision(run, execution, end, decision, decision.why)
    return _act(run, execution, decision, plan)


def _act(run: Path, execution: JobExecution, decision: Decision, plan: NextPlan | None) -> int:
    if decision.action == END:
        say(f"ends here: {decision.status}" + (f", {decision.why}" if decision.why else ""))
        return _CODES.get(decision.status, 1)
    if decision.action == WAIT:
        say("SLURM requeues the job")
        return 0
    say("requeued")
    requeued = scontrol("requeue", execution.job_id)
    if requeued is not None:
        say(f"scontrol requeue failed: {requeued}; {typed('resume')} resumes the run")
        return 1
    return 0 if plan is None else _ask_for_memory(run, execution, plan)


def _ask_for_memory(run: Path, execution: JobExecution, plan: NextPlan) -> int:
    """Change the memory request of this job, which has been requeued; if the site forbids that, submit a new job."""
    refused = scontrol("update", f"JobId={execution.job_id}", f"MinMemoryNode={plan.mem_mb}")
    if refused is None:
        write_job(run, mem_mb=plan.mem_mb)
        return 0
    say(f"SLURM refused to change the job's memory request ({refused}); a new job continues the run")
    job = read_job(run)
    job_id = resubmit(run, load_config(run), replace(last_request(run, job), mem_mb=plan.mem_mb), job)
    say(f"job {job_id}")
    for complaint in move_dependents(run, job_id):  # before scancel, which would also cancel the dependent jobs
        say(f"a job that waits for this one could not be updated: {complaint}; {typed('resume')} resumes its run")
    subprocess.run(["scancel", execution.job_id], check=False)
    return _CODES[MEMORY]


def _next_memory_plan(run: Path, end: AttemptEnd) -> tuple[Decision, NextPlan | None]:
    """The next memory plan, saved for the next attempt, with the decision RESUBMIT; without a plan, END."""
    cfg = load_config(run)
    try:
        plan = next_plan(run, cfg, requested_memory_mb(run, read_job(run)))
    except ConfigurationError as damaged:
        return Decision(END, "memory", f"{end.detail}; {damaged}"), None
    if plan is None:
        why = f"{end.detail}, and no plan has more memory or needs less (cluster.host_gib, memory.*)"
        return Decision(END, "memory", why), None
    apply_plan(run, plan)
    return Decision(RESUBMIT, why=f"{end.detail}; {plan.change}"), plan


def read_record(execution: JobExecution) -> JobRecord:
    """SLURM's current record of this job; empty if SLURM does not answer."""
    try:
        found = job_records(execution.job_id)
    except SlurmError as error:
        say(str(error))
        return JobRecord()
    return record_of(found[0], execution.restart_count) if found else JobRecord()


def record_of(facts: Mapping[str, str], restart_count: int) -> JobRecord:
    """The fields of ``scontrol show job`` that matter here."""
    restarts = facts.get("Restarts", "0")
    return JobRecord(
        state=facts.get("JobState", ""),
        reason=facts.get("Reason", ""),
        requeued=restarts.isdigit() and int(restarts) > restart_count,
        derived_oom=facts.get("DerivedExitCode", "").endswith(":125"),
    )


def _wait_for_the_step(execution: JobExecution) -> JobRecord:
    """Poll SLURM's record until it shows how the step ended, for at most :data:`PATIENCE_S` seconds."""
    end = time.monotonic() + PATIENCE_S
    while True:
        record = read_record(execution)
        if record.derived_oom or record.requeued or time.monotonic() > end:
            return record
        time.sleep(0.5)


def say(text: str) -> None:
    """Write a line to the job's output."""
    sys.stdout.write(f"[pwm_torchrl] {text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
