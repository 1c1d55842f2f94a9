"""Submitting runs: the resources they need, a time limit, arrays through submitit.

A job that reaches its limit saves and comes back, so that a guess that is too short costs a restart and one that is too
long costs queue priority; nothing else depends on it.

Two things of submitit's stay out of the way: its signal handler, which saves inside the handler, ignores SIGTERM and
counts time-outs (the submitted function puts its own in place), and its batch script, which ends with the step. Here
the script outlives the step, asks why it ended and decides; a SIGTERM, by which SLURM announces the end, is passed on
first.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit.slurm.slurm import SlurmExecutor

from pwm_torchrl.cluster.deaths import note_submission, read_job, write_job
from pwm_torchrl.cluster.fits import Demand, misfit
from pwm_torchrl.cluster.slurm import Site, live_job, scontrol, site
from pwm_torchrl.commands import named
from pwm_torchrl.config import UPDATES, ClusterConfig, Config, trained_networks
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.training.offline import pretraining_run

if TYPE_CHECKING:
    from pwm_torchrl.memory.plan import Plan

# How long a run may take ----------------------------------------------------------------------------------------------


#: Floating-point operations per second that small matrix products reach: a guess, per CPU core and per GPU.
CPU_FLOPS, GPU_FLOPS = 5e9, 8e12
#: Seconds that an update takes beside its arithmetic: launching kernels, per network evaluation of the rollout.
OVERHEAD_S = 4e-4
#: Agent steps per second of an environment on a core, with TorchRL's overhead: a slow simulator's.
STEPS_PER_S = 500.0
#: A guess is multiplied by this, and start-up is added.
SAFETY, START_UP_MIN, LEAST_MIN = 3.0, 15, 30


def estimated_minutes(cfg: Config, plan: Plan, cpus: int) -> int:
    """A time limit for the whole run, in minutes."""
    a, t = cfg.algorithm, cfg.training
    parameters = sum(item.bytes for item in plan.prediction.items if item.what == "parameters") / 4
    dynamics = cfg.model.dynamics
    evaluations = 1
    if dynamics.kind == "flow":
        evaluations = dynamics.substeps if dynamics.solver == "euler" else 2 * dynamics.substeps - 1
    if plan.choices.checkpoint_substeps:
        evaluations += evaluations
    made = {name: UPDATES[name].per_epoch(a) for name in trained_networks(cfg)}
    unrolled = {name: made[name] for name in made if name != "critic"}
    # Forward and backward: six operations per parameter and row.
    rows = sum(count * UPDATES[name].batch(a) for name, count in unrolled.items())
    flops = 6 * parameters * rows * a.horizon * evaluations
    on_gpu = plan.prediction.compute == "device"
    arithmetic = flops / (GPU_FLOPS if on_gpu else CPU_FLOPS * cpus)
    calls = sum(unrolled.values()) * a.horizon * (evaluations + 2) * 3
    critics = made.get("critic", 0) * 6
    envs = int(cfg.env.get("num_envs", 1)) if cfg.mode == "online" else 0
    collection = envs * (a.collect_steps or a.horizon) / STEPS_PER_S
    epoch_s = arithmetic + (calls + critics) * OVERHEAD_S + collection
    evaluation_s = int(cfg.env.get("episode_length") or 1000) * t.eval_episodes / STEPS_PER_S
    if cfg.mode == "pretrain":
        evaluation_s = 0.2 * epoch_s  # held-out slices, without gradients
    evaluated = t.epochs / t.eval_every if t.eval_every else 1
    minutes = SAFETY * (t.epochs * epoch_s + evaluated * evaluation_s) / 60 + START_UP_MIN
    return max(LEAST_MIN, math.ceil(minutes / 15) * 15)


# The resources that a run asks SLURM for ------------------------------------------------------------------------------


MIB = 2**20
#: Smaller requests are not worth their risk.
LEAST_MB = 1024
DEFAULT_CPUS = 2


@dataclass(frozen=True)
class Resources:
    """Resources of a job; the rest of its profile is in the configuration.

    Attributes:
        mem_mb (int): host memory per node, MiB.
        cpus (int): per task.
        gpus (int): per node; a task each.
        nodes (int): of the job.
        time_min (int): limit of one job, minutes; a longer run comes back until it is done.
    """

    mem_mb: int
    cpus: int
    gpus: int
    nodes: int
    time_min: int

    @property
    def tasks_per_node(self) -> int:
        """A process for each GPU, one without."""
        return max(1, self.gpus)

    def as_dict(self) -> dict[str, int]:
        """Plain values for ``job.json``."""
        return asdict(self)

    def covering(self, other: Resources) -> Resources:
        """The least that is enough for both, for jobs of one array."""
        return Resources(*(max(a, b) for a, b in zip(asdict(self).values(), asdict(other).values(), strict=True)))


def resources_for(cfg: Config, plan: Plan) -> Resources:
    """What the run needs, as far as its profile does not say it.

    Raises:
        ConfigurationError: if the profile cannot give what its own keys ask for.
    """
    profile = cfg.cluster
    ceiling = None if profile.host_gb is None else int(profile.host_gb * 1e9 / MIB)
    if profile.mem_gb is not None:
        mem_mb = int(profile.mem_gb * 1024)
        if ceiling is not None and mem_mb > ceiling:
            raise ConfigurationError(
                f"cluster.mem_gb={profile.mem_gb:g} GiB is more than a node of cluster={profile.name} has, "
                f"cluster.host_gb={profile.host_gb:g} GB; ask for at most {ceiling / 1024:.1f}"
            )
    else:
        # The run stops itself at a share of the limit and leaves a margin below that: both have to be asked for.
        needed = plan.prediction.total("host") / plan.share("host")
        mem_mb = max(LEAST_MB, math.ceil(needed / MIB / 256) * 256)
        if ceiling is not None:
            mem_mb = min(mem_mb, ceiling)
    gpus = 0 if cfg.device == "cpu" else profile.gpus
    cpus = profile.cpus or DEFAULT_CPUS
    minutes = profile.time_min
    if minutes is None:
        minutes = estimated_minutes(cfg, plan, cpus)
        if profile.max_time_min is not None:
            minutes = min(minutes, profile.max_time_min)
    elif profile.max_time_min is not None and minutes > profile.max_time_min:
        raise ConfigurationError(
            f"cluster.time_min={minutes} is longer than cluster={profile.name} allows, "
            f"cluster.max_time_min={profile.max_time_min}; a longer run comes back by itself"
        )
    return Resources(mem_mb, cpus, gpus, profile.nodes, minutes)


def sbatch_parameters(cfg: Config, resources: Resources, name: str, after: str | None = None) -> dict[str, Any]:
    """Parameters of submitit's executor for a job; it begins when job ``after`` has succeeded."""
    profile = cfg.cluster
    extra: dict[str, Any] = {"requeue": True}
    if after is not None:
        # Without the second, jobs would wait for ever for one that failed.
        extra |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    parameters: dict[str, Any] = {
        "job_name": name,
        "time": resources.time_min,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks_per_node,
        "cpus_per_task": resources.cpus,
        # Not submitit's mem_gb, which rounds to whole GB.
        "mem": f"{resources.mem_mb}M",
        "signal_delay_s": profile.signal_delay_s,
        "stderr_to_stdout": True,
        "use_srun": False,
        "setup": list(profile.setup),
        "additional_parameters": extra,
        "wckey": None,
    }
    if profile.gres is not None:
        parameters["gres"] = profile.gres
    elif resources.gpus:
        parameters["gres"] = f"gpu:{resources.gpus}"
    if profile.array_parallelism is not None:
        parameters["array_parallelism"] = profile.array_parallelism
    for key in ("partition", "account", "qos", "constraint", "comment"):
        value = getattr(profile, key)
        if value is not None:
            parameters[key] = value
    return parameters


# What the nodes of a partition have, and whether they could run a job -------------------------------------------------


def node_memory_mb(partition: str | None, site: Site) -> int:
    """Memory in MiB that every node of the partitions has, of SLURM's default partition for ``None``.

    Raises:
        ConfigurationError: if there are no such nodes.
    """
    known = [each.name for each in site.partitions]
    for name in partition.split(",") if partition else []:
        if name not in known:
            raise ConfigurationError(f"cluster.partition={name} does not exist; choose one of {', '.join(known)}")
    names = partition.split(",") if partition else [each.name for each in site.partitions if each.default]
    found = [node.memory_mb for node in site.nodes if set(names) & set(node.partitions)]
    if not found:
        asked = f"cluster.partition={partition}" if partition else "a default partition"
        raise ConfigurationError(f"SLURM has no nodes in {asked}; set cluster.partition, or cluster.host_gb")
    return min(found)


def require_fit(cluster: ClusterConfig, resources: Resources, site: Site) -> None:
    """Refuse what SLURM would accept and never run.

    Raises:
        ConfigurationError: with the key to change.
    """
    reason = misfit(Demand.of(cluster, resources), site)
    if reason is not None:
        raise ConfigurationError(reason)


# submitit's SLURM executor with this project's batch script -----------------------------------------------------------


_SUPERVISE, _START = (Path(__file__).with_name(name) for name in ("supervise.py", "start.py"))

#: ``wait`` returns early when a trap has run, so the loop asks whether the step still exists. Requeueing sends SIGTERM
#: to the script that asks for it, which then still has to write what it decided. Since SLURM 22.05 srun does not take
#: the number of CPUs from the job.
_SCRIPT = """\
export PYTHONPATH={path}${{PYTHONPATH:+:$PYTHONPATH}}
export OMP_NUM_THREADS=${{SLURM_CPUS_PER_TASK:-{cpus}}}
task=${{SLURM_ARRAY_TASK_ID:-0}}
run=$(sed -n "$((task + 1))p" {runs})
life=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}-${{SLURM_RESTART_COUNT:-0}}
term=0
step=
trap 'term=1; [ -z "$step" ] || kill -TERM "$step" 2> /dev/null' TERM
srun --unbuffered --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" \\
    {python} -u {supervise} "$run/attempts/evidence-$life" {python} -u {start} submitit.core._submit {folder} &
step=$!
wait "$step"
code=$?
while kill -0 "$step" 2> /dev/null; do
    wait "$step"
    code=$?
done
trap '' TERM
exec {python} -u {start} pwm_torchrl.cluster.restarts "$run" --code "$code" --term "$term"
"""


class RunExecutor(SlurmExecutor):
    """Submits runs, one or an array of them.

    Args:
        folder (Path): of submitit's files and the jobs' output.
        code (sequence of Path): folders to put first on the jobs' ``PYTHONPATH``.
        cpus (int): per task, for SLURM configurations that do not tell a job.
    """

    def __init__(self, folder: Path, code: Sequence[Path], cpus: int) -> None:
        super().__init__(folder)
        self.code = code
        self.cpus = cpus
        self.runs = Path(folder) / f"runs_{uuid.uuid4().hex[:8]}.txt"

    def write_runs(self, runs: Sequence[Path]) -> None:
        """Which task of the array is which run: one directory a line."""
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
    """The copy of one of the package's files that a job uses."""
    relative = file.relative_to(file.parents[2])
    return next((copy / relative for copy in code if (copy / relative).is_file()), file)


# Runs to SLURM --------------------------------------------------------------------------------------------------------


FOLDER = "submitit"
ARRAYS = ".jobs"
#: What a job leaves in the environment of the jobs that it submits, and that makes them fail.
_INHERITED = re.compile(r"^(SLURM|SBATCH|SRUN)_")
_KEPT = ("SLURM_CONF", "SLURM_CONF_SERVER")


@dataclass(frozen=True)
class Submitted:
    """A run and its job."""

    run_dir: Path
    job_id: str
    after: str | None = None  # the job that has to succeed first


def submit_runs(
    runs: Sequence[Path], configs: Sequence[Config], resources: Resources, code: Sequence[Path], runs_dir: Path
) -> list[Submitted]:
    """Queue runs whose directories are written.

    Args:
        runs (sequence of Path): their directories, absolute.
        configs (sequence of Config): one each, of one cluster profile.
        resources (Resources): of each job.
        code (sequence of Path): copies of the code, see :func:`~pwm_torchrl.cluster.snapshot.snapshot`.
        runs_dir (Path): where the files of an array go.

    Raises:
        ConfigurationError: if submitit is not installed or SLURM refuses; nothing of that array is queued then.
    """
    done: list[Submitted] = []
    limit = site().config.max_array_size if len(runs) > 1 else 1
    for first in range(0, len(runs), limit):
        part = slice(first, first + limit)
        done += _submit(runs[part], configs[first], resources, code, runs_dir)
    return done


def resubmit(run_dir: Path, cfg: Config, mem_mb: int) -> str:
    """Queue a run again with another amount of memory, otherwise as before; returns the job's id.

    Raises:
        ConfigurationError: if SLURM refuses.
    """
    job = read_job(run_dir)
    before = Resources(**{name: job[name] for name in Resources.__dataclass_fields__})
    resources = Resources(**{**before.as_dict(), "mem_mb": mem_mb})
    code = [Path(each) for each in job.get("code", [])]
    (submitted,) = _submit([run_dir], cfg, resources, code, run_dir.parent)
    return submitted.job_id


def _submit(
    runs: Sequence[Path], cfg: Config, resources: Resources, code: Sequence[Path], runs_dir: Path
) -> list[Submitted]:
    try:
        from submitit.core.utils import FailedSubmissionError

        from pwm_torchrl.cluster.submission import RunExecutor
    except ImportError as error:
        raise ConfigurationError(
            f"submitit is not installed; pip install 'pwm-torchrl[launch]', or use {named('train')}"
        ) from error
    from pwm_torchrl.cluster.job import run_slurm_job

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
                jobs = [executor.submit(run_slurm_job, str(runs[0]))]
            else:
                jobs = executor.map_array(run_slurm_job, [str(run) for run in runs])
        except FailedSubmissionError as error:
            raise ConfigurationError(_refusal(str(error), cfg)) from error
    facts = {"cluster": cfg.cluster.name, "code": [str(each) for each in code], **resources.as_dict()}
    for run, job in zip(runs, jobs, strict=True):
        note_submission(run, job.job_id, **facts)
    if source is not None and after is not None:
        write_job(source, awaited_by=[*read_job(source).get("awaited_by", []), *(job.job_id for job in jobs)])
    return [Submitted(run, job.job_id, after) for run, job in zip(runs, jobs, strict=True)]


def leave_open(cfg: Config) -> None:
    """Unpin a world model that a job still trains: the policies wait for the one that it ends with."""
    source = None if cfg.world_model is None else pretraining_run(cfg.world_model)
    if source is not None and live_job(source) is not None:
        cfg.world_model_sha256 = None


def pretraining_of(cfg: Config) -> Path | None:
    """The run whose world model the policies of this configuration wait for; ``None`` if they have theirs."""
    if cfg.world_model is None or cfg.world_model_sha256 is not None:
        return None
    return pretraining_run(cfg.world_model)


def move_dependents(run_dir: Path, job_id: str) -> list[str]:
    """Let the jobs that wait for a run wait for another job of it; returns what SLURM complained about."""
    waiting = [str(each) for each in read_job(run_dir).get("awaited_by", [])]
    return [
        refused
        for each in waiting
        if (refused := scontrol("update", f"JobId={each}", f"Dependency=afterok:{job_id}")) is not None
    ]


def _refusal(answer: str, cfg: Config) -> str:
    """Sbatch's own words, with where they can be answered."""
    lines = [line.strip() for line in answer.splitlines() if "error:" in line]
    said = "; ".join(line.partition("error:")[2].strip() for line in lines) or " ".join(answer.split())[:300]
    return (
        f"SLURM refused the job: {said}. Check cluster.partition={cfg.cluster.partition}, cluster.account="
        f"{cfg.cluster.account}, cluster.qos={cfg.cluster.qos} and the request that --dry-run shows."
    )


@contextmanager
def outside_of_a_job() -> Iterator[None]:
    """Inside, the environment has none of the variables that describe the job this process may be in."""
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
