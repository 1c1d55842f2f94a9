"""The words by which deaths and their answers are named in ``events.jsonl``, reports and code."""

from __future__ import annotations

TIMEOUT = "timeout"  # the time limit came near or was reached
PREEMPTION = "preemption"  # another job was more important
REQUEUED = "requeue"  # scontrol requeue, or another end that SLURM asked for
NODE_FAILURE = "node_failure"  # SLURM restarted the job and nobody had said that it ended
MEMORY = "memory"  # the kernel killed a process, or the run's own guard stopped it
KILLED = "killed"  # a process was killed and memory was not the reason
START_UP = "start_up"  # it ended before training began

REQUEUE = "requeue"  # scontrol requeue, from within
RESUBMIT = "resubmit"  # the same, with another request
WAIT = "wait"  # SLURM brings the job back by itself
END = "end"
