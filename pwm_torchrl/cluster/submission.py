"""Submitting runs to SLURM, as arrays, with submitit's executor and this project's own batch script.

Two parts of submitit are replaced. Its signal handler saves inside the handler, ignores SIGTERM and counts time-outs;
the submitted function installs its own. Its batch script ends with the step; ours continues after the step, finds out
why it ended and decides whether to requeue. It forwards SIGTERM, with which SLURM announces the end, to the step.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

from pwm_torchrl.cluster.job import run_job
from pwm_torchrl.cluster.resources import Resources, sbatch_parameters
from pwm_torchrl.cluster.restarts import JOB_FILE, read_job, record_submission, requested_memory_mb, write_job
from pwm_torchrl.cluster.slurm import live_job, scontrol, site
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.directory import pretraining_run

# submitit's SLURM executor with this project's batch script -----------------------------------------------------------


_SUPERVISE, _START = (Path(__file__).with_name(name) for name in ("supervise.py", "start.py"))

#: ``wait`` returns early when a trap has run, so the loop checks whether the step still exists. A requeue sends SIGTERM
#: to the script that requests it, which must ignore it to record its decision. Since SLURM 22.05, srun does not inherit
#: the number of CPUs from the job.
_SCRIPT = """\
export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-{cpus}}}
task=${{SLURM_ARRAY_TASK_ID:-0}}
run=$(sed -n "$((task + 1))p" {runs})
execution=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}-${{SLURM_RESTART_COUNT:-0}}
term=0
step=
if [ -n "${{SLURM_ARRAY_TASK_ID:-}}" ]; then  # its own name, the array has that of the first run
    scontrol update JobId="${{SLURM_ARRAY_JOB_ID}}_$task" JobName="$(basename "$run")" > /dev/null 2>&1
fi
trap 'term=1; [ -z "$step" ] || kill -TERM "$step" 2> /dev/null' TERM
srun --unbuffered --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" \\
    {python} -u {supervise} "$run/attempts/evidence-$execution" {python} -u {start} submitit.core._submit {folder} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    code=$?
done
trap '' TERM
exec {python} -u {start} pwm_torchrl.cluster.end_of_job "$run" --code "$code" --term "$term"
"""


class RunExecutor(SlurmExecutor):
    """Submits runs, one or an array of them.

    Args:
        folder (Path): folder for submitit's files and the jobs' output.
        code (sequence of Path): folders to put first on the jobs' ``PYTHONPATH``.
        cpus (int): CPUs per task, for SLURM configurations that do not set this in a job.
    """

    def __init__(self, folder: Path, code: Sequence[Path], cpus: int) -> None:
        super().__init__(folder)
        self.code = code
        self.cpus = cpus
        self.runs = Path(folder) / f"runs_{uuid.uuid4().hex[:8]}.txt"

    def write_runs(self, runs: Sequence[Path]) -> None:
        """Write the run directories of the array's tasks, one per line."""
        self.runs.parent.mkdir(parents=True, exist_ok=True)
        self.runs.write_text("".join(f"{run}\n" for run in runs), encoding="utf-8")

    @property
    def _submitit_command_str(self) -> str:
        return _SCRIPT.format(
            path=shlex.quote(":".join(map(str, self.code))) if self.code else "",
            cpus=self.cpus,
            runs=shlex.quote(str(self.runs)),
            python=shlex.quote(sys.executable),
            supervise=shlex.quote(str(_in_copy(_SUPERVISE, self.code))),
            start=shlex.quote(str(_in_copy(_START, self.code))),
            folder=shlex.quote(str(self.folder)),
        )


def _in_copy(file: Path, code: Sequence[Path]) -> Path:
    """The copy of a file of this package that a job uses; the file itself if it was not copied."""
    relative = file.relative_to(file.parents[2])
    return next((copy / relative for copy in code if (copy / relative).is_file()), file)


# Submitting runs ------------------------------------------------------------------------------------------------------


FOLDER = "submitit"
ARRAYS = ".jobs"
#: Variables that a job submitted from inside a job would inherit, and that would make it fail.
_INHERITED = re.compile(r"^(SLURM|SBATCH|SRUN)_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")


@dataclass(frozen=True)
class Submitted:
    """A run and its job."""

    run_dir: Path
    job_id: str
    after: str | None = None  # id of the job that must succeed first


def submit_runs(
    runs: Sequence[Path], configs: Sequence[Config], resources: Resources, code: Sequence[Path], runs_dir: Path
) -> list[Submitted]:
    """Submit runs whose directories exist.

    Args:
        runs (sequence of Path): their directories, absolute.
        configs (sequence of Config): one per run, all with the same cluster profile.
        resources (Resources): resources of each job.
        code (sequence of Path): copies of the code, see :func:`~pwm_torchrl.cluster.snapshot.snapshot`.
        runs_dir (Path): folder for the files of an array.

    Raises:
        ConfigurationError: if SLURM rejects an array; none of its jobs is queued then.
    """
    done: list[Submitted] = []
    limit = site().config.max_array_size if len(runs) > 1 else 1
    for first in range(0, len(runs), limit):
        part = slice(first, first + limit)
        done += _submit(runs[part], configs[first], resources, code, runs_dir)
    return done


def last_request(run_dir: Path, job: Mapping[str, Any]) -> Resources:
    """The resources that the last job of a run requested.

    Args:
        run_dir (Path): the run.
        job (Mapping): its record from :func:`~pwm_torchrl.cluster.restarts.read_job`.

    Raises:
        ConfigurationError: if the record is damaged.
    """
    mem_mb = requested_memory_mb(run_dir, job)
    others = [name for name in Resources.__dataclass_fields__ if name != "mem_mb"]
    wrong = [name for name in others if type(job.get(name)) is not int]
    if not job.get("job_ids"):
        wrong.append("job_ids")
    if wrong:
        raise ConfigurationError(
            f"{run_dir / JOB_FILE} is damaged: it has no valid {', '.join(wrong)}; delete it and submit the run again"
        )
    return Resources(mem_mb=mem_mb, **{name: job[name] for name in others})


def resubmit(run_dir: Path, cfg: Config, resources: Resources, job: Mapping[str, Any]) -> str:
    """Submit a run again, with the code of its last job; returns the new job's id.

    Args:
        run_dir (Path): the run.
        cfg (Config): its configuration.
        resources (Resources): resources to request.
        job (Mapping): record of its last job, from :func:`~pwm_torchrl.cluster.restarts.read_job`.

    Raises:
        ConfigurationError: if SLURM rejects the job.
    """
    code = [Path(each) for each in job.get("code", [])]
    (submitted,) = _submit([run_dir], cfg, resources, code, run_dir.parent)
    return submitted.job_id


def _submit(
    runs: Sequence[Path], cfg: Config, resources: Resources, code: Sequence[Path], runs_dir: Path
) -> list[Submitted]:
    if len(runs) == 1:
        folder, name = runs[0] / FOLDER, runs[0].name
    else:
        folder, name = _new_folder(runs_dir / ARRAYS), f"{runs[0].name}+{len(runs) - 1}"
    executor = RunExecutor(folder, code, resources.cpus)
    executor.write_runs(runs)
    source = pretraining_of(cfg)
    job = None if source is None else live_job(source)
    after = None if job is None else job.job_id
    executor.update_parameters(**sbatch_parameters(cfg, resources, name, after))
    with outside_of_a_job():
        try:
            if len(runs) == 1:
                jobs = [executor.submit(run_job, str(runs[0]))]
            else:
                jobs = executor.map_array(run_job, [str(run) for run in runs])
        except FailedSubmissionError as error:
            raise ConfigurationError(_refusal(str(error), cfg)) from error
    facts = {"cluster": cfg.cluster.name, "code": [str(each) for each in code], **resources.as_dict()}
    for run, job in zip(runs, jobs, strict=True):
        record_submission(run, job.job_id, **facts)
    if source is not None and after is not None:
        write_job(source, awaited_by=[*read_job(source).get("awaited_by", []), *(job.job_id for job in jobs)])
    return [Submitted(run, job.job_id, after) for run, job in zip(runs, jobs, strict=True)]


def unpin_world_model(cfg: Config) -> None:
    """Remove the hash of a world model that a job still trains, so that extractions wait for the final one."""
    source = None if cfg.world_model is None else pretraining_run(cfg.world_model)
    if source is not None and live_job(source) is not None:
        cfg.world_model_sha256 = None


def pretraining_of(cfg: Config) -> Path | None:
    """The pre-training run that this configuration waits for; ``None`` if its world model is known or not needed."""
    if cfg.world_model is None or cfg.world_model_sha256 is not None:
        return None
    return pretraining_run(cfg.world_model)


def move_dependents(run_dir: Path, job_id: str) -> list[str]:
    """Make the jobs that wait for a run depend on its new job; returns SLURM's error messages."""
    waiting = [str(each) for each in read_job(run_dir).get("awaited_by", [])]
    return [
        refused
        for each in waiting
        if (refused := scontrol("update", f"JobId={each}", f"Dependency=afterok:{job_id}")) is not None
    ]


def _refusal(answer: str, cfg: Config) -> str:
    """The error message of sbatch, with the configuration keys to check."""
    lines = [line.strip() for line in answer.splitlines() if "error:" in line]
    said = "; ".join(line.partition("error:")[2].strip() for line in lines) or " ".join(answer.split())[:300]
    return (
        f"SLURM refused the job: {said}. Check cluster.partition={cfg.cluster.partition}, cluster.account="
        f"{cfg.cluster.account}, cluster.qos={cfg.cluster.qos} and the request that --dry-run shows."
    )


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Remove the variables that describe the surrounding job from the environment for the duration of the block."""
    hidden = {name: os.environ.pop(name) for name in list(os.environ) if _INHERITED.match(name) and name not in _KEPT}
    try:
        yield
    finally:
        os.environ.update(hidden)


def _new_folder(parent: Path) -> Path:
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        folder = parent / (stamp if number == 1 else f"{stamp}_{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            number += 1
