"""A run that trains a world model alone, on stored episodes of many tasks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.modules import WorldModelFacts, announce_world_model, save_world_model, world_model_facts
from pwm_torchrl.training.base_run import BaseRun
from pwm_torchrl.training.build import (
    ModelLosses,
    build_learners,
    build_model_loss,
    build_model_networks,
    world_model_spec,
)
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.model_stepper import ModelStepper
from pwm_torchrl.training.observer import Observer
from pwm_torchrl.training.offline import open_store, pretraining_facts, pretraining_tasks, training_split
from pwm_torchrl.training.stored import StoredEpochs, StoredSamples
from pwm_torchrl.training.validation import Validation

#: Where a run leaves its world model, best by validation, for other runs to read.
WORLD_MODEL = "world_model"


def announce(cfg: Config, folder: Path) -> None:
    """Describe the world model of a pre-training that has not begun; policies can be planned with it.

    Args:
        cfg (Config): the pre-training.
        folder (Path): its run directory, or any that stands for it.

    Raises:
        ConfigurationError: if its episodes are not there, or lack a task.
    """
    store = open_store(cfg)
    tasks = pretraining_tasks(cfg, store)
    spec = world_model_spec(cfg, pretraining_facts(cfg, store))
    facts = WorldModelFacts(spec, tasks.names, tasks.observation_dims, labels=labels_of(cfg))
    announce_world_model(folder / WORLD_MODEL, facts)


def labels_of(cfg: Config) -> dict[str, Any]:
    """What people want to know of a world model's architecture."""
    return {"model": asdict(cfg.model), "size": asdict(cfg.size)}


class PretrainRun(BaseRun):
    """Pre-training."""

    opening = "opening the stored episodes"

    def open(self) -> EnvInfo:
        """Open the store, a copy of it on the node's disk if the configuration says so."""
        self.episodes = open_store(self.cfg, staged=True)
        self.tasks = pretraining_tasks(self.cfg, self.episodes)
        return pretraining_facts(self.cfg, self.episodes)

    def build(self) -> None:
        """The world model."""
        self.networks = build_model_networks(self.cfg, self.info, self.device)

    def assemble(self) -> None:
        """Put samples, stepper, observer, checkpoint and trainer together."""
        cfg = self.cfg
        training, held_out = training_split(cfg, self.episodes)
        widths = (self.info.observation_dim, self.info.action_dim)
        samples, validation = (
            StoredSamples(
                self.episodes,
                self.tasks.names,
                cfg.algorithm.horizon,
                *widths,
                episodes=episodes,
                balanced=cfg.data.balanced,
                device=self.device,
            )
            for episodes in (training, held_out)
        )
        losses = ModelLosses(build_model_loss(cfg, self.networks.world_model))
        learners = build_learners(cfg, self.networks)
        updates = cfg.algorithm.model_updates
        stepper = ModelStepper(
            cfg,
            self.networks,
            losses,
            learners,
            samples,
            None,
            updates,
            self.micro_batch_halved,
            self.ranks,
            self.info,
        )
        observer = PretrainObserver(self, stepper, Validation(validation, losses.model, cfg.data.validation_slices))
        self.put_together(StoredEpochs(), stepper, observer, learners, None, {})

    def save_world_model(self) -> WorldModelFacts:
        """Write the present world model for others to read."""
        cfg = self.cfg
        self.claim.check()
        return save_world_model(
            self.run_dir / WORLD_MODEL,
            self.networks.world_model,
            world_model_spec(cfg, self.info),
            task_names=self.tasks.names,
            observation_dims=self.tasks.observation_dims,
            labels={
                **labels_of(cfg),
                "epoch": self.trainer.epoch,
                "validation_loss": self.summary.validation_loss,
            },
        )

    def draw(self) -> None:
        """Curves, and the world model if no validation has chosen one."""
        folder = self.run_dir / WORLD_MODEL
        if not folder.is_dir() or not world_model_facts(folder).trained:
            self.save_world_model()
        super().draw()


class PretrainObserver(Observer):
    """Validates, and keeps the world model that is best by it.

    Args:
        run (PretrainRun): the run's parts.
        stepper (ModelStepper): its updates.
        validation (Validation): on episodes that training never sees.
    """

    run: PretrainRun
    evaluating = "validating"

    def __init__(self, run: PretrainRun, stepper: ModelStepper, validation: Validation) -> None:
        super().__init__(run, stepper)
        self.validation = validation

    def evaluate(self, row: MetricRow) -> None:
        """Loss on held-out slices, and open-loop errors for every task."""
        device = self.run.device
        # Validating changes nothing: its flow terms draw random numbers of their own.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            limit = self.stepper.micro_batches.size("world-model", self.run.cfg.algorithm.model_batch)
            metrics = self.validation.run(self.run.networks.world_model, limit, self.trainer.stop.check)
        if not metrics:
            return
        row.set(metrics)
        loss = metrics["validation/loss"]
        self.run.summary.validated(loss)
        self.trainer.evaluated = -loss
        if -loss > self.trainer.best_evaluated:
            self.run.save_world_model()
