"""Predictions against what real tensors take, and plans against the budgets that they were made for."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_cases import config

from pwm_torchrl.envs.info import EnvInfo
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.memory.budget import Budget, Candidate
from pwm_torchrl.memory.plan import Plan, make_plan
from pwm_torchrl.memory.predict import DEVICE, DISK, HOST, Choices, predict
from pwm_torchrl.memory.processes import read_process
from pwm_torchrl.memory.table import plan_table
from pwm_torchrl.memory.trace import FakeTensors
from pwm_torchrl.memory.updates import UPDATES, UpdateTracer
from pwm_torchrl.training.build import build_learners, build_networks

FACTS = EnvInfo("test", 3, 1, 30, 1, 2, False)
AUTO = {"memory.kind": "auto", "training.replay_storage": "auto", "algorithm.model_batch": 4096}
ROOT = Path(__file__).resolve().parents[2]


def budget(**bytes_: int) -> dict[str, Budget]:
    return {place: Budget((Candidate(count, "a test"),)) for place, count in bytes_.items()}


def plan(host: int, changes: dict | None = None, **device: int) -> Plan:
    return make_plan(config({**AUTO, **(changes or {})}), FACTS, budget(host=host, **device))


def need(changes: dict | None = None) -> int:
    """Host bytes of the fastest way."""
    return plan(2**45, changes).prediction.total(HOST)


class TestTrace:
    def test_counts_what_is_alive(self):
        fake = FakeTensors()
        with fake as counter:
            x = torch.zeros(1000)
            assert counter.live == 4000
            y = x.view(10, 100)[2:]  # a view owns nothing
            x.add_(1)
            assert counter.live == counter.peak == 4000
            z = x + 1
            del z
            assert (counter.live, counter.peak) == (4000, 8000)
            del x
            assert counter.live == 4000  # the view keeps it
            del y
            assert counter.live == 0
            assert counter.begin() == 0 == counter.peak
        with fake as counter:
            torch.zeros(10)
            assert counter.peak == 40

    def test_what_autograd_saves_lives_until_backward(self):
        with FakeTensors() as counter:
            w = torch.zeros(100, requires_grad=True)
            out = (w.exp() * 2).sin().sum()
            assert counter.live >= 3 * 400
            out.backward()
            del out
            assert counter.live == 800  # the parameter and its gradient

    def test_takes_no_memory_and_no_random_numbers(self):
        cfg = config({"size.units": [20_000, 20_000]})  # 1.6 GB of parameters in each network
        before = torch.get_rng_state()
        resident = read_process().rss
        kept = UpdateTracer(cfg, FACTS).persistent
        assert kept.parameters > 3e9
        assert torch.equal(torch.get_rng_state(), before)
        assert read_process().rss - resident < 1e9


class TestUpdates:
    def test_persistent_is_the_sum_over_the_real_networks(self):
        cfg = config()
        kept = UpdateTracer(cfg, FACTS).persistent
        networks = build_networks(cfg, FACTS)
        tensors = [t for _, network in networks.items() for t in network.state_dict().values()]
        assert kept.parameters == sum(t.untyped_storage().nbytes() for t in tensors)
        weights = sum(p.numel() * 4 for _, network in networks.items() for p in network.parameters())
        steps = sum(len(learner.parameters) for learner in build_learners(cfg, networks).values()) * 4
        assert kept.optimizer == 2 * weights + steps
        assert 3 * weights <= kept.undo <= 3 * weights + steps + 100

    @pytest.mark.parametrize("recompute", [False, True])
    @pytest.mark.parametrize("kind", ["mlp", "flow"])
    def test_a_line_in_the_horizon(self, kind, recompute):
        """Two short horizons stand for a long one."""
        changes = {"model.dynamics.kind": kind, "model.dynamics.checkpoint_substeps": recompute}
        for update in UPDATES:
            cfg = config({**changes, "algorithm.horizon": 12, "algorithm.model_batch": 256})
            tracer = UpdateTracer(cfg, FACTS)
            for size in (None, 64):
                whole = tracer._trace(update, tracer.batches[update], size or tracer.batches[update], 12)
                assert tracer.transient(update, size).peak == pytest.approx(whole.peak, rel=0.02, abs=2**20)

    def test_recomputing_and_splitting_need_less(self):
        cfg = config({"model.dynamics.substeps": 4, "algorithm.model_batch": 512})
        plain = UpdateTracer(cfg, FACTS)
        recomputing = copy.deepcopy(cfg)
        recomputing.model.dynamics.checkpoint_substeps = True
        recomputed = UpdateTracer(recomputing, FACTS)
        assert recomputed.transient("world-model").peak < 0.5 * plain.transient("world-model").peak
        peaks = [plain.transient("world-model", size).peak for size in (None, 128, 32, 8)]
        assert peaks == sorted(peaks, reverse=True)
        assert peaks[-1] < 0.2 * peaks[0]

    @pytest.mark.parametrize(
        "changes",
        [
            {"model.reward_head": "two_hot"},
            {"model.termination_head": True},
            {"algorithm.normalize_observations": True},
            {"model.loss.flow_matching_weight": 1.0},
            {"algorithm.compile": True},
        ],
        ids=lambda c: next(iter(c)),
    )
    def test_of_every_kind_of_model(self, changes):
        assert all(UpdateTracer(config(changes), FACTS).transient(update).peak > 0 for update in UPDATES)


class TestPlan:
    def test_the_fastest_way_where_there_is_room(self):
        found = plan(2**45)
        assert found.choices == Choices(None, None, None, False, "memory")
        assert found.larger is None
        assert found.cheaper is not None
        assert found.cheaper.bytes < found.prediction.total(HOST)

    @pytest.mark.parametrize("share", [0.98, 0.95])
    def test_splits_before_it_recomputes(self, share):
        found = plan(int(need() * share / 0.9))
        assert not found.shortages()
        assert found.choices.model_micro_batch is not None
        assert not found.choices.checkpoint_substeps
        assert found.larger is not None
        assert found.larger.bytes > found.prediction.total(HOST)

    def test_whatever_the_budget_it_fits_or_names_one_that_does(self):
        top = need()
        base = plan(2**45).prediction.base
        for step in range(8):
            host = base + (top - base) * step // 7
            try:
                found = plan(host)
            except ConfigurationError as error:
                least = float(str(error).split("memory.host_gb=")[1].split(")")[0])
                assert host < least * 1e9
                enough = plan(int(least * 1e9) + 2**22)  # the process may have grown by a little in between
                assert not enough.shortages()
            else:
                assert not found.shortages()

    def test_what_is_written_is_kept(self):
        written = {"memory.model_micro_batch": 7, "training.replay_storage": "disk"}
        found = plan(2**45, written)
        assert found.choices.model_micro_batch == 7
        assert found.choices.replay_storage == "disk"
        assert plan(2**45, {"model.dynamics.checkpoint_substeps": True}).choices.checkpoint_substeps

    def test_fixed_is_respected(self):
        found = plan(2**20, {"memory.kind": "fixed", "memory.model_micro_batch": 512})
        assert found.choices.model_micro_batch == 512
        assert not found.automatic
        assert found.shortages()[0].startswith("host memory:")

    def test_where_the_replay_goes(self):
        assert plan(2**45, device=2**45).choices.replay_storage == "device"
        large = {"training.replay_capacity": 10**9}
        assert plan(2**45, large, device=2**45).choices.replay_storage == "disk"
        assert plan(2**45, {**large, "memory.disk_above_gb": 1e3}).choices.replay_storage == "memory"
        assert plan(2**35, {**large, "memory.disk_above_gb": 1e3}).choices.replay_storage == "disk"
        found = plan(2**45, large)
        assert found.prediction.total(DISK) > 34e9

    def test_choices_of_an_attempt_before_are_kept_while_they_fit(self):
        cfg, given = config(AUTO), Choices(64, None, None, True, "disk")
        assert make_plan(cfg, FACTS, budget(host=2**45), given).choices == given
        top = need()
        changed = make_plan(cfg, FACTS, budget(host=int(top * 0.95 / 0.9)), Choices(None, None, None, False, "memory"))
        assert changed.choices.model_micro_batch is not None

    def test_applied_changes_only_the_choices(self):
        cfg = config(AUTO)
        before = copy.deepcopy(cfg)
        found = make_plan(cfg, FACTS, budget(host=int(need() * 0.95 / 0.9)))
        applied = found.applied(cfg)
        assert cfg == before
        assert applied.memory.model_micro_batch == found.choices.model_micro_batch
        assert applied.algorithm == before.algorithm

    def test_device_predictions_made_elsewhere_are_unverified(self):
        found = plan(2**45, device=2**45)
        assert found.prediction.compute == DEVICE
        assert "unverified" in plan_table(found)
        assert "unverified" not in plan_table(plan(2**45))

    def test_the_table_says_what_counts(self):
        found = plan(int(need() * 0.95 / 0.9))
        text = plan_table(found)
        assert "host memory, predicted" in text
        assert f"memory.model_micro_batch={found.choices.model_micro_batch}" in text
        assert "next larger plan:" in text
        assert "next cheaper plan:" in text
        assert "DOES NOT FIT" not in text
        assert "DOES NOT FIT" in plan_table(plan(2**20, {"memory.kind": "fixed"}))


def test_totals_count_what_is_needed_at_once():
    found = predict(config(), FACTS, Choices())
    shared = [i.bytes for i in found.items if i.place == HOST and i.shared]
    rest = sum(i.bytes for i in found.items if i.place == HOST and not i.shared)
    assert len(shared) >= 3
    assert found.total(HOST) == rest + max(shared)
    assert found.growth == found.total(HOST) - found.base
    json.dumps(found.as_dict())


@pytest.mark.slow
def test_predictions_are_near_what_runs_take(tmp_path):
    """The benchmark's quick rows: within 10 % or 64 MiB."""
    file = tmp_path / "rows.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_accuracy.py"), "--quick", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())["rows"]
    assert len(rows) == 3
    assert all(row["within"] for row in rows)
