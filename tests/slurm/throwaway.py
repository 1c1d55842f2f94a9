"""A throw-away Slurm cluster on this machine: real daemons, everything they write in one temporary folder.

The daemons run in the foreground as children of the tests and die with them. What a crash leaves nevertheless, such as
the steps of jobs, carries the owner's process in its environment, and is stopped by the next cluster that starts.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

from leftovers import (
    OWNER,
    PREFIX,
    command_line,
    die_with_the_tests,
    identity,
    kill,
    marked,
    parent,
    remove_cgroups,
    stop_orphans,
)
from slurm_files import Shape, write_files

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
PACKAGES = "apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
SEARCH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
ENDED = {"COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
UP = {"idle", "mixed", "allocated", "completing"}
_NUMBERS = itertools.count()
_SETTLED_S = 3.0  # an ended job that is requeued leaves its state sooner than this


def reason_to_skip() -> str | None:
    """Why no cluster can run here; ``None`` if one can."""
    if not sys.platform.startswith("linux"):
        return "a throw-away Slurm cluster needs Linux"
    missing = [name for name in PROGRAMS if shutil.which(name, path=SEARCH) is None]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing); on Debian: {PACKAGES}"
    if os.geteuid() != 0:
        return "a throw-away Slurm cluster needs root"
    return None


class Cluster:
    """A running cluster; see :func:`running_cluster`.

    Attributes:
        folder: where its files are.
        shape: what it pretends to have.
        nodes: names of its nodes.
        env: environment with which Slurm's commands, and submitit, talk to this cluster.
    """

    def __init__(self, folder: Path, shape: Shape):
        self.folder, self.shape = folder, shape
        # Names are also those of cgroups, which all clusters of this machine share.
        name = f"t{os.getpid()}c{next(_NUMBERS)}"
        self.nodes = [f"{name}n{number}" for number in range(shape.nodes)]
        outside = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM", "SBATCH_"))}
        self.env = {
            **outside,
            "SLURM_CONF": str(folder / "etc" / "slurm.conf"),
            "PATH": f"{folder / 'bin'}{os.pathsep}{SEARCH}",
            OWNER: identity(os.getpid()),
        }
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Starts the daemons and waits for the nodes."""
        write_files(self.folder, self.shape, self.nodes)
        sacct = self.folder / "bin" / "sacct"
        sacct.write_text(f'#!/bin/sh\nexec {sys.executable} -S {Path(__file__).with_name("fake_sacct.py")} "$@"\n')
        sacct.chmod(0o755)
        run, etc = self.folder / "run", self.folder / "etc"
        self._spawn(
            "munged", "--foreground", f"--socket={run / 'munge.socket'}", f"--key-file={etc / 'munge.key'}",
            f"--pid-file={run / 'munged.pid'}", f"--seed-file={run / 'munged.seed'}",
            f"--log-file={self.folder / 'log' / 'munged.log'}",
        )  # fmt: skip
        self.until(lambda: (run / "munge.socket").exists(), 10, "munged made no socket")
        self._spawn("slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        self.until(lambda: set(self.node_states().values()) <= UP, 20, "the nodes did not come up")

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd."""
        self._spawn("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str, *, announce: bool = True) -> None:
        """The node dies: its slurmd, and every process of its jobs, at once and without a word.

        Args:
            node: its name.
            announce: tell the controller, which would find out by itself within some :attr:`Shape.node_timeout_s`.
        """
        slurmd = self._daemons.pop(node)
        slurmd.kill()
        slurmd.wait()
        tasks = marked(f"SLURMD_NODENAME={node}")
        managers = {pid for pid in map(parent, tasks) if command_line(pid).startswith("slurmstepd")}
        kill([*managers, *tasks])  # in this order: managers would report how their tasks ended
        if announce:
            self.run(["scontrol", "update", f"nodename={node}", "state=down", "reason=killed"])

    def node_states(self) -> dict[str, str]:
        """State of every node in lower case, ``unknown`` while the controller does not answer."""
        answer = self.run(["sinfo", "-h", "-N", "-p", "main", "-o", "%n %T"], check=False, timeout=20)
        if answer.returncode:
            return dict.fromkeys(self.nodes, "unknown")
        return dict(line.split() for line in answer.stdout.splitlines())

    def stop(self) -> None:
        """Stops jobs and daemons, in the time that orderly ends take, and removes the nodes' cgroups."""
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError, TimeoutError):
                self.cancel_all(timeout=8)
        for name in reversed(list(self._daemons)):
            _end(self._daemons.pop(name))
        kill(marked(f"SLURM_CONF={self.env['SLURM_CONF']}"))
        remove_cgroups(self.nodes)

    def run(
        self, command: Sequence[str | Path], *, check: bool = True, timeout: float = 60, **options: object
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on this cluster, such as ``["squeue", "--me"]``.

        Raises:
            AssertionError: if it fails and ``check`` is true, with what it wrote.
        """
        options = {"env": self.env, **options}
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=timeout, **options
        )
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def sbatch(self, script: str, *options: str, cwd: Path) -> str:
        """Submits the text of a bash script; it runs in ``cwd`` and writes ``JOB.out`` or ``JOB_TASK.out`` there.

        Returns:
            The job's number.
        """
        file = cwd / f"script_{time.monotonic_ns()}.sh"
        file.write_text(f"#!/bin/bash\n{script}\n")
        name = "%A_%a" if any(each.startswith("--array") for each in options) else "%j"
        return self.run(["sbatch", "--parsable", f"--output={cwd}/{name}.out", *options, file], cwd=cwd).stdout.strip()

    def job(self, job_id: str) -> dict[str, str]:
        """The controller's record of a job or array task: ``JobState``, ``Reason``, ``Restarts``, ..."""
        line = self.run(["scontrol", "--oneliner", "show", "job", job_id]).stdout.splitlines()[0]
        return {key: value for key, _, value in reversed([word.partition("=") for word in line.split()])}

    def wait_state(self, job_id: str, states: Collection[str], timeout: float = 60) -> dict[str, str]:
        """Waits until a job is in one of ``states``.

        Returns:
            Its record then, as :meth:`job` has it.

        Raises:
            AssertionError: if it ended otherwise or did not get there in ``timeout`` seconds.
        """
        start, ended_at = time.monotonic(), None
        while True:
            record = self.job(job_id)
            now = time.monotonic()
            if record["JobState"] in states:
                return record
            ended_at = (ended_at or now) if record["JobState"] in ENDED else None
            if now - start > timeout or (ended_at is not None and now - ended_at > _SETTLED_S):
                raise AssertionError(f"job {job_id} is not {' or '.join(sorted(states))} but {record}")
            time.sleep(0.1)

    def cancel_all(self, timeout: float = 20) -> None:
        """Cancels every job and waits until none is left; nodes that a test took down come back."""
        queued = self.run(["squeue", "-h", "-o", "%A"]).stdout.split()
        if queued:
            self.run(["scancel", "--quiet", *sorted(set(queued))], check=False)
            self.until(lambda: not self.run(["squeue", "-h"]).stdout.strip(), timeout, "jobs did not end")
        for node in self.nodes:
            if node not in self._daemons:
                self.start_node(node)
        if not set(self.node_states().values()) <= UP:
            nodes = ",".join(self.nodes)
            self.run(["scontrol", "update", f"nodename={nodes}", "state=resume"], check=False)
            self.until(lambda: set(self.node_states().values()) <= UP, timeout, "nodes did not come back")

    def logs(self, lines: int = 40) -> str:
        """The ends of the daemons' logs, and the queue."""
        parts = []
        for file in sorted((self.folder / "log").glob("*.log")):
            tail = file.read_text(errors="replace").splitlines()[-lines:]
            parts.append("\n".join([f"== {file.name}", *tail]))
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                parts.append("== squeue\n" + self.run(["squeue", "-o", "%i %T %r %N"], check=False, timeout=10).stdout)
        return "\n".join(parts)

    def _spawn(self, program: str, *arguments: str, name: str = "") -> None:
        path = shutil.which(program, path=SEARCH)
        assert path is not None, program
        output = (self.folder / "log" / f"{name or program}.start.log").open("ab")
        with output:
            self._daemons[name or program] = subprocess.Popen(
                [path, *arguments],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=die_with_the_tests,
            )

    def until(self, done: Callable[[], object], timeout: float, failure: str) -> None:
        """Waits until ``done()`` is true.

        Raises:
            TimeoutError: if that takes longer than ``timeout`` seconds, or a daemon ends.
        """
        deadline = time.monotonic() + timeout
        while not done():
            dead = [f"{name} ({each.returncode})" for name, each in self._daemons.items() if each.poll() is not None]
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} ended" if dead else f"{failure} in {timeout:g} s"
                raise TimeoutError(f"{why}\n{self.logs()}")
            time.sleep(0.05)


@contextlib.contextmanager
def running_cluster(shape: Shape | None = None) -> Iterator[Cluster]:
    """A cluster for the duration of a block."""
    stop_orphans()
    # munged wants a socket whose path is short and that everybody may reach, which pytest's folders are not.
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{identity(os.getpid())}_", dir="/tmp"))
    folder.chmod(0o755)
    cluster = Cluster(folder, shape or Shape())
    try:
        try:
            cluster.start()
        except TimeoutError:  # somebody else may have taken one of the ports: once more, with others
            cluster.stop()
            shutil.rmtree(folder / "state")
            cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(5)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait(5)
