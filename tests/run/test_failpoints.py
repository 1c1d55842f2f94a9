"""Runs that are killed at every step of starting, saving, stopping and finishing come back to the bit."""

from __future__ import annotations

import ast
import json
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
from failpoint_cases import learned, run, small, start
from training_cases import rows_of

import pwm_torchrl
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run import claims
from pwm_torchrl.run.checkpoints import (
    SEAL_FILE,
    BrokenSeal,
    CheckpointFault,
    CheckpointStore,
    check_seal,
    load_checkpoint,
)
from pwm_torchrl.run.debugging import FAILPOINTS
from pwm_torchrl.run.loop import Loop
from pwm_torchrl.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("straight")
    assert run(folder) == "finished"
    return folder


def assert_same_result(run_dir, straight):
    assert rows_of(run_dir) == rows_of(straight)
    assert learned(run_dir) == learned(straight)
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["status"], summary["epochs_done"], summary["resume_exact"]) == ("finished", 5, True)
    assert not list((run_dir / "checkpoints").glob("*/.*")), "what a killed attempt left is swept away"


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("place", FAILPOINTS)
def test_killed_anywhere(place, times, straight, tmp_path):
    """The first attempt is asked to stop in its third epoch; whichever attempt passes the place is killed there."""
    kills, ends = 0, []
    while not ends or ends[-1] != "finished":
        armed = kills < times
        stop = not ends or (armed and place.startswith("stop."))
        ends.append(run(tmp_path, place if armed else None, stop))
        kills += ends[-1] == "killed"
        assert len(ends) < 8, ends
    assert kills == times, f"never passed: {ends}"
    if place == "finish.outcome":
        assert run(tmp_path) == "finished"
    assert_same_result(tmp_path, straight)


def test_every_place_is_in_the_code():
    found = set()
    for file in Path(pwm_torchrl.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "failpoint":
                found |= {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
    assert found == set(FAILPOINTS)


def test_twenty_random_kills(straight, tmp_path):
    """Whenever they come; each attempt gets a little further, or not at all."""
    draw = random.Random(0)
    for _ in range(20):
        process = start(tmp_path)
        process.join(draw.uniform(0.05, 1.5))
        if process.is_alive():
            process.kill()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
    assert run(tmp_path) == "finished"
    assert_same_result(tmp_path, straight)


def test_every_file_of_a_checkpoint_that_is_truncated_or_flipped_is_noticed(straight, tmp_path):
    newest = CheckpointStore(straight).latest()
    copy = tmp_path / "checkpoint"
    shutil.copytree(newest, copy)
    check_seal(copy)
    files = [file for file in sorted(copy.rglob("*")) if file.is_file()]
    assert 10 < len(files) < 40, "a file per component"
    for file in files:
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (content[: len(content) // 2], bytes(flipped), None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            with pytest.raises(BrokenSeal, match=re.escape(SEAL_FILE if file.name == SEAL_FILE else file.name)):
                check_seal(copy)
        file.write_bytes(content)
    check_seal(copy)


def test_a_superseded_attempt_stops_and_never_counts(tmp_path, monkeypatch):
    """Its process was thought dead: another attempt took over while it was in its third epoch."""
    update = Loop.update
    cfg = small()
    cfg.training.checkpoint_every = 1

    def overtaken(self):
        if self.epoch == 2 and not (tmp_path / claims.FOLDER / "000002.json").exists():
            newest = claims.newest_claim(tmp_path)
            names = CheckpointStore(tmp_path).names()
            successor = claims.Claim(2, newest.owner, names)
            (tmp_path / claims.FOLDER / "000002.json").write_text(json.dumps(successor.as_dict()))
        update(self)

    monkeypatch.setattr(Loop, "update", overtaken)
    with pytest.raises(RuntimeError, match=r"^Attempt 1 of .* was superseded by attempt 2"):
        train(cfg, tmp_path)
    counted = CheckpointStore(tmp_path).resume_candidates()
    assert [(each.attempt, each.epoch) for each in counted] == [(1, 1), (1, 2)]
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "running", "it is the successor's"
    # What it might have saved before it noticed does not count either.
    shutil.copytree(counted[-1].path, counted[-1].path.with_name("checkpoint-000009"))
    assert [each.epoch for each in CheckpointStore(tmp_path).resume_candidates()] == [1, 2]
    with pytest.raises(ConfigurationError, match="is in use by process"):
        train(cfg, tmp_path, resume=True)


def test_a_checkpoint_without_its_seal_is_none(straight, tmp_path):
    newest = CheckpointStore(straight).latest()
    copy = tmp_path / "checkpoint"
    shutil.copytree(newest, copy)
    (copy / SEAL_FILE).unlink()
    with pytest.raises(CheckpointFault, match=rf"it has no {SEAL_FILE}"):
        load_checkpoint(copy, {})
