"""submitit's SLURM executor with this project's batch script.

Two things of submitit's stay out of the way: its signal handler, which saves inside the handler, ignores SIGTERM and
counts time-outs (the submitted function puts its own in place), and its batch script, which ends with the step. Here
the script outlives the step, asks why it ended and decides; a SIGTERM, by which SLURM announces the end, is passed on
first.
"""

from __future__ import annotations

import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from submitit.slurm.slurm import SlurmExecutor

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
exec {python} -u {start} pwm_torchrl.cluster.after "$run" --code "$code" --term "$term"
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
