"""Runs of several ranks: equal to those of one process, and ending together. See ranked_runs.py."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranked_runs import CASES
from run_files import csv_rows, events, summary_of
from training_cases import rows_of

ROOT = Path(__file__).parents[2]
EQUAL = [name for name, case in CASES.items() if case.alone]
#: Part of the error after another rank has ended.
GONE = "cannot reach the others"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and connects through the interface lo"),
]


class Ran:
    """Results of all cases."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends = json.loads((folder / "ends.json").read_text())

    def of(self, name: str) -> Path:
        return self.folder / f"{name}_{CASES[name].size}"

    def codes(self, name: str) -> list[int | str]:
        return self.ends[self.of(name).name]

    def returned(self, name: str, rank: int) -> list[dict[str, Any]]:
        return json.loads((self.folder / f"{self.of(name).name}_rank{rank}.json").read_text())

    def printed(self, name: str, rank: int) -> str:
        return (self.folder / f"{self.of(name).name}_rank{rank}.txt").read_text()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Runs all cases in one process that forks their ranks, because imports take the longest."""
    folder = tmp_path_factory.mktemp("ranks")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("SUBMITIT")},
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "distributed"))),
    }
    command = [sys.executable, "-W", "ignore", "-m", "ranked_runs", str(folder)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, text = process.communicate(timeout=500)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and its forked children
        process.wait()
    assert process.returncode == 0, text
    return Ran(folder)


def assert_same_training(ran: Ran, ours: Path, alone: Path) -> None:
    """Weights, optimizers and logs up to rounding of float64."""
    shared, whole = (torch.load(folder / "weights.pt", weights_only=True) for folder in (ours, alone))
    assert shared.keys() == whole.keys()
    for key, value in whole.items():
        torch.testing.assert_close(shared[key], value, rtol=0, atol=1e-10, msg=key)
    rows, expected = rows_of(ours), rows_of(alone)
    assert len(rows) == len(expected) == 3
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for key, text in other.items():
            # The gradient profile uses as many rollouts as one process back-propagates at once.
            if text and not key.startswith("grad_profile/"):
                assert float(row[key]) == pytest.approx(float(text), rel=1e-10, abs=1e-10), key


class TestTheSameTraining:
    @pytest.mark.parametrize("name", EQUAL)
    def test_as_one_process_with_the_whole_batch(self, ran, name):
        case = CASES[name]
        assert ran.codes(name) == [0] * case.size
        assert ran.ends[f"{name}_1"] == [0]
        assert_same_training(ran, ran.of(name), ran.folder / f"{name}_1")
        assert "".join(ran.printed(name, rank) for rank in range(1, case.size)) == "", "only rank 0 prints"

    def test_the_networks_did_learn(self, ran):
        """Every update of every epoch has a gradient; otherwise the equality would prove little."""
        rows = csv_rows(ran.of("flow_v2"))
        for key in ("grad_norm/model", "grad_norm/actor", "grad_norm/critic"):
            assert all(float(row[key]) > 1e-6 for row in rows)
        assert float(rows[0]["loss/model_flow_matching"]) > 0

    def test_resumed_with_three_ranks(self, ran):
        assert [e["event"] for e in events(ran.of("mlp_micro"))] == ["start", "stopped", "resume", "finished"]
        for rank in (1, 2):
            ends = [{"rank": rank, "status": status} for status in ("stopped", "finished")]
            assert ran.returned("mlp_micro", rank) == ends

    def test_out_of_memory_on_one_rank_halves_the_micro_batch_on_all(self, ran):
        """On rank 1 in a backward pass and after a step; on rank 0 before and after it sends the command."""
        assert ran.codes("refused") == [0, 0]
        told = events(ran.of("refused"), "micro_batch")
        assert [(e["update"], e["refused"], e["size"], e["error"]) for e in told] == [
            ("model", 5, 3, "rank 1: CUDA out of memory."),
            ("critic", 2, 1, "CUDA out of memory."),
            ("actor", 4, 2, "rank 1: CUDA out of memory."),
            ("actor", 2, 1, "CUDA out of memory."),
        ]
        assert_same_training(ran, ran.of("refused"), ran.folder / "flow_v2_1")


class TestTheEnd:
    """If one rank fails, all end in bounded time; none of them had to be killed."""

    @pytest.mark.parametrize(("name", "codes"), [("replica_killed", [1, -9]), ("leader_killed", [-9, 1])])
    def test_a_rank_is_killed(self, ran, name, codes):
        assert ran.codes(name) == codes
        survivor = codes.index(1)
        assert "RankFault" in ran.printed(name, survivor)
        assert f"Rank {survivor} of 2 {GONE}" in ran.printed(name, survivor)
        if survivor == 0:
            (event,) = events(ran.of(name), "failed")
            assert GONE in event["error"]
            assert summary_of(ran.of(name))["status"] == "failed"

    def test_a_bug_on_one_rank(self, ran):
        """The others report its error."""
        assert ran.codes("bug") == [1, 1]
        assert "ZeroDivisionError: nothing is 1 / 0" in ran.printed("bug", 1)
        (event,) = events(ran.of("bug"), "failed")
        assert all(
            part in event["error"] for part in ("RankFault", "Rank 1 of 2", "ZeroDivisionError: nothing is 1 / 0")
        )

    def test_out_of_memory_while_building_the_networks(self, ran):
        """A smaller micro-batch would not help, so none is tried."""
        assert ran.codes("no_room") == [1, 1]
        assert [e["event"] for e in events(ran.of("no_room"))] == ["start", "failed"]
        error = events(ran.of("no_room"), "failed")[0]["error"]
        assert "rank 1: CUDA out of memory." in error

    def test_weights_that_differ(self, ran):
        assert ran.codes("drift") == [1, 1]
        (event,) = events(ran.of("drift"), "failed")
        assert "Rank 1 of 2" in event["error"]
        assert event["error"].endswith("in model.")

    def test_only_rank_0_handles_signals(self, ran):
        """The other ranks get the same signals and ignore them."""
        assert ran.codes("interrupted") == [0, 0]
        assert summary_of(ran.of("interrupted"))["status"] == "stopped"
        assert [e["event"] for e in events(ran.of("interrupted"))] == ["start", "stopped"]

    def test_rank_0_refuses_the_configuration(self, ran):
        """Then the other ranks end without an error."""
        assert ran.codes("start_up") == [1, 0]
        assert ran.returned("start_up", 1) == [{"rank": 1, "status": "failed"}]
        assert "device='cuda:1'" in ran.printed("start_up", 0)


def test_the_command(ran):
    """The command as torchrun starts it: one run, one directory, output from rank 0 only."""
    assert ran.codes("command") == [0, 0]
    assert "finished" in ran.printed("command", 0)
    assert ran.printed("command", 1) == ""
    assert summary_of(ran.of("command"))["epochs_done"] == 1
