"""One attempt at a time in a run directory, and who may take over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from pwm_torchrl.errors import ConfigurationError, Superseded
from pwm_torchrl.run import claims
from pwm_torchrl.run import claims as owners
from pwm_torchrl.run.claims import (
    ALIVE,
    ENDED,
    UNKNOWN,
    Identity,
    claimed,
    newest_claim,
    outcome_file,
    owner_state,
    read_outcome,
)

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from pwm_torchrl.run.claims import claimed
with claimed(Path(sys.argv[1]), ["checkpoints/a"]):
    print("held", flush=True)
    sys.stdin.readline()
"""


def holder(run_dir: Path, code: str = HOLD) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run_dir)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def write_claim(run_dir: Path, attempt: int, owner: Identity) -> None:
    (run_dir / claims.FOLDER).mkdir(exist_ok=True)
    content = claims.Claim(attempt, owner).as_dict()
    (run_dir / claims.FOLDER / f"{attempt:06d}.json").write_text(json.dumps(content))


class TestTwoProcesses:
    def test_the_second_is_refused_until_the_first_is_killed(self, tmp_path):
        """Not an orderly end: nobody says that the attempt is over, and the process table tells."""
        first = holder(tmp_path)
        try:
            message = f"is in use by process {first.pid} on .*; wait for it, stop it"
            with pytest.raises(ConfigurationError, match=message), claimed(tmp_path):
                raise AssertionError("entered")
        finally:
            first.kill()
            first.communicate()
        assert read_outcome(tmp_path, 1) is None
        with claimed(tmp_path, ["checkpoints/b"]) as claim:
            assert (claim.attempt, claim.adopted) == (2, ["checkpoints/b"])
            assert newest_claim(tmp_path).owner == Identity.here()

    def test_after_an_orderly_end_nobody_is_asked(self, tmp_path, monkeypatch):
        with claimed(tmp_path) as claim:
            claim.outcome = {"status": "stopped", "reason": "SIGUSR2"}
        monkeypatch.setattr(claims, "owner_state", lambda owner: pytest.fail("asked"))
        assert read_outcome(tmp_path, 1) == {"status": "stopped", "reason": "SIGUSR2"}
        with claimed(tmp_path) as claim:
            assert claim.attempt == 2

    def test_of_many_at_once_one_wins(self, tmp_path):
        """They all see the same dead owner; the claim's file is created exclusively."""
        owner = replace(Identity.here(), pid=2**22 + 1, started=1)
        write_claim(tmp_path, 7, owner)
        entered, refused = [], []
        start = threading.Barrier(8)
        leave = threading.Event()

        def contend() -> None:
            start.wait()
            try:
                with claimed(tmp_path) as claim:
                    entered.append(claim.attempt)
                    leave.wait(20)
            except ConfigurationError:
                refused.append(1)
            if len(refused) == 7:
                leave.set()

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert entered == [8]
        assert len(refused) == 7

    def test_a_superseded_attempt_notices(self, tmp_path):
        with claimed(tmp_path) as claim:
            claim.check()
            write_claim(tmp_path, 2, Identity.here())
            with pytest.raises(Superseded, match=r"^Attempt 1 of .* was superseded by attempt 2; it stops"):
                claim.check()

    def test_a_torn_claim_is_refused_with_its_name(self, tmp_path):
        (tmp_path / claims.FOLDER).mkdir()
        (tmp_path / claims.FOLDER / "000003.json").write_text('{"attempt": 3, "jo')
        with pytest.raises(ConfigurationError, match=r"000003\.json is not a claim of this version"), claimed(tmp_path):
            raise AssertionError("entered")

    def test_without_links_a_claim_is_exclusive_too(self, tmp_path, monkeypatch):
        def no_links(source, target):
            raise PermissionError

        monkeypatch.setattr(os, "link", no_links)
        assert claims._create(tmp_path / "a.json", "1")
        assert not claims._create(tmp_path / "a.json", "2")
        assert (tmp_path / "a.json").read_text() == "1"
        assert [file.name for file in tmp_path.iterdir()] == ["a.json"]

    def test_what_cannot_be_told_is_refused_with_the_owner(self, tmp_path):
        write_claim(tmp_path, 1, Identity("12_3", 0, "node7", "other-boot", 99, "pid:[1]", 5))
        message = r"claimed by SLURM job 12_3, process 99 on node7, and this machine cannot tell"
        with pytest.raises(ConfigurationError, match=message), claimed(tmp_path, patience_s=0):
            raise AssertionError("entered")

    def test_a_full_disk_at_the_end_is_not_the_error_that_is_told(self, tmp_path, monkeypatch):
        def full(*arguments):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(claims, "write_durably", full)
        with pytest.raises(KeyError, match="a bug"), claimed(tmp_path):
            raise KeyError("a bug")
        assert not outcome_file(tmp_path, 1).exists()


class TestOwners:
    here = Identity.here({"SLURM_JOB_ID": "5", "SLURM_RESTART_COUNT": "2"})

    def test_identity(self):
        assert (self.here.job_id, self.here.restart_count, self.here.pid) == ("5", 2, os.getpid())
        task = Identity.here({"SLURM_JOB_ID": "9", "SLURM_ARRAY_JOB_ID": "8", "SLURM_ARRAY_TASK_ID": "3"})
        assert task.job_id == "8_3"
        assert Identity.here({}).job_id is None

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({}, ALIVE),
            ({"started": 1}, ENDED),  # the id belongs to a later process
            ({"pid": 2**22 + 1}, ENDED),
            ({"job_id": None, "boot_id": "before"}, ENDED),  # the machine was started again
            ({"job_id": None, "host": "elsewhere"}, UNKNOWN),
            ({"job_id": None, "pid_namespace": "pid:[1]"}, UNKNOWN),  # another container's process table
            ({"host": "elsewhere", "restart_count": 1}, ENDED),  # this job, before SLURM requeued it
        ],
        ids=str,
    )
    def test_of_this_machine_and_job(self, changes, expected, monkeypatch):
        monkeypatch.setattr(owners, "slurm_state", lambda job: pytest.fail("asked"))
        assert owner_state(replace(self.here, **changes), self.here) == expected

    def test_of_another_job_slurm_is_asked(self, monkeypatch):
        monkeypatch.setattr(owners, "slurm_state", lambda job: f"answer about {job}")
        other = replace(self.here, job_id="4", host="elsewhere")
        assert owner_state(other, self.here) == "answer about 4"
        # In an allocation of the same job without a restart, another node: SLURM knows that the job runs.
        assert owner_state(replace(self.here, host="elsewhere"), self.here) == "answer about 5"

    @pytest.mark.parametrize(
        ("code", "out", "err", "expected"),
        [
            (0, "RUNNING\n", "", ALIVE),
            (0, "COMPLETING\n", "", ALIVE),
            (0, "PENDING\n", "", ENDED),
            (0, "COMPLETED\n", "", ENDED),
            (0, "", "", ENDED),
            (1, "", "slurm_load_jobs error: Invalid job id specified\n", ENDED),
            (1, "", "slurm_load_jobs error: Unable to contact slurm controller\n", UNKNOWN),
        ],
    )
    def test_what_slurm_answers(self, code, out, err, expected, monkeypatch):
        monkeypatch.setattr(owners.shutil, "which", lambda name: "/usr/bin/squeue")
        answer = subprocess.CompletedProcess([], code, out, err)
        monkeypatch.setattr(owners.subprocess, "run", lambda *args, **kwargs: answer)
        assert owners.slurm_state("7") == expected

    def test_no_slurm_and_no_answer(self, monkeypatch):
        monkeypatch.setattr(owners.shutil, "which", lambda name: None)
        assert owners.slurm_state("7") == UNKNOWN
        monkeypatch.setattr(owners.shutil, "which", lambda name: "/usr/bin/squeue")

        def slow(command, **kwargs):
            raise subprocess.TimeoutExpired(command, 1)

        monkeypatch.setattr(owners.subprocess, "run", slow)
        assert owners.slurm_state("7") == UNKNOWN

    def test_a_zombie_has_ended(self):
        child = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        try:
            assert owner_state(replace(self.here, pid=child.pid, started=None), self.here) == ENDED
        finally:
            child.wait()
