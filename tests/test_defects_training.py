"""Defects that were measured on public implementations and live in the training loop; the others: test_defects.py."""

from __future__ import annotations

import pytest
import torch
from training_cases import PENDULUM, config, live_graphs, rows_of, run_with

from pwm_torchrl.algorithm.base import MetricRow
from pwm_torchrl.run.collector import evaluation_env_seed
from pwm_torchrl.run.debugging import live_tensors
from pwm_torchrl.run.directory import save_config
from pwm_torchrl.training import evaluate_run


class TestHostMemoryLeak:
    """A logged loss kept its autograd graph; the metrics history held one graph per epoch. See test_debugging.py."""

    @pytest.mark.parametrize("kind", ["mlp", "flow"])
    def test_nothing_piles_up_over_the_epochs_of_a_run(self, kind, tmp_path, monkeypatch):
        counts, graphs = [], []
        others = live_graphs()  # those of other tests' fixtures in this process

        def count(run):
            counts.append(len(live_tensors()))
            graphs.append(live_graphs())

        changes = {"model.dynamics.kind": kind, "training.epochs": 7, "training.eval_every": 1}
        run_with(monkeypatch, config({**changes, "training.gradient_profile_every": 1}), tmp_path, after_epoch=count)
        assert graphs == [others] * 7
        # The optimizers' moments appear in the first epoch.
        assert len(set(counts[2:])) == 1

    def test_a_metric_with_a_graph_is_refused(self):
        loss = torch.ones(1, requires_grad=True).sum()
        for record in (MetricRow().set, MetricRow().mean):
            with pytest.raises(ValueError, match="'loss/model' requires grad"):
                record({"loss/model": loss})


class TestEvaluationThatSummedImaginedRewards:
    def test_a_model_that_dreams_of_rewards_does_not_score(self, tmp_path, monkeypatch):
        """Returns are the environment's own, whatever reward head and dynamics say."""
        cfg = config()
        save_config(cfg, tmp_path)
        rows = []

        def evaluate(run):
            rows.append(MetricRow())
            run.evaluation.measure(run.loop.epoch, rows[-1])

        def dream(run):
            if not run.loop.over:
                return
            evaluate(run)
            with torch.no_grad():
                for part in (run.networks.model.reward, run.networks.model.dynamics):
                    for p in part.parameters():
                        p.fill_(1.0)
            evaluate(run)

        run_with(monkeypatch, cfg, tmp_path, after_epoch=dream)
        honest, dreaming = (row.numbers() for row in rows)
        assert dreaming["eval/return_mean"] == honest["eval/return_mean"] < 0
        assert dreaming["eval/reward_nmse"] > honest["eval/reward_nmse"]

    def test_training_and_evaluation_agree(self, tmp_path, monkeypatch):
        cfg = config()
        save_config(cfg, tmp_path)
        summary, _ = run_with(monkeypatch, cfg, tmp_path)
        seed = evaluation_env_seed(cfg.seed, cfg.training.epochs, cfg.training.eval_episodes)
        again = evaluate_run(tmp_path, episodes=cfg.training.eval_episodes, seed=seed, which="latest")
        assert again["return_mean"] == pytest.approx(summary["final_return"])


def test_one_tensordict_per_environment_and_step(tmp_path, monkeypatch):
    """Replay is filled by one write per epoch, whatever the number of environments."""
    writes = []

    def watch(run):
        if not writes:
            writes.append(None)
            extend = run.source.samples.buffer.extend
            run.source.samples.buffer.extend = lambda batch: writes.append(batch.shape) or extend(batch)

    changes = {"training.epochs": 4, "training.eval_every": 0}
    run_with(monkeypatch, config(changes, {**PENDULUM, "num_envs": 5}), tmp_path, after_epoch=watch)
    assert writes[1:] == [(5, 4)] * 3


def test_parameters_in_no_optimizer(tmp_path, monkeypatch):
    """Every parameter of every network moves in a run, the policy's standard deviation too."""
    first = {}

    def remember(run):
        if not first:
            first.update(
                {
                    f"{name}.{key}": p.detach().clone()
                    for name, net in run.networks.items()
                    for key, p in net.named_parameters()
                }
            )

    changes = {
        "model.termination_head": True,
        "model.reward_head": "two_hot",
        "model.dynamics.condition_on_start": True,
    }
    _, run = run_with(monkeypatch, config(changes), tmp_path, after_epoch=remember)
    for name, network in run.networks.items():
        for key, p in network.named_parameters():
            assert p.grad is None, key
            assert not torch.equal(p, first[f"{name}.{key}"]), f"{name}.{key}"
    assert float(rows_of(tmp_path)[-1]["policy/std"]) != float(rows_of(tmp_path)[0]["policy/std"])
