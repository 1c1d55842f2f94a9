"""Validates a world model on held-out episodes, task by task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pwm_torchrl.algorithm.base import Algorithm, MetricRow
from pwm_torchrl.algorithm.build import world_model_spec
from pwm_torchrl.config import Config
from pwm_torchrl.envs.tasks import task_set
from pwm_torchrl.modules import (
    WorldModel,
    WorldModelFacts,
    announce_world_model,
    save_world_model,
    world_model_facts,
)
from pwm_torchrl.objectives import PWMModelLoss
from pwm_torchrl.run.quality import rollout_errors
from pwm_torchrl.run.sources import StoredSource
from pwm_torchrl.run.stored_episodes import StoredSamples, open_store, pretraining_facts, pretraining_tasks
from pwm_torchrl.run.summary import RunSummary

#: Folder in a run directory for the world model with the best validation loss, which other runs read.
WORLD_MODEL = "world_model"


class Validation:
    """Measures a model on a fixed set of held-out slices, with the same number for every task.

    Args:
        samples (StoredSamples): held-out episodes.
        loss (PWMModelLoss): the training loss.
        count (int): slices per task; fewer where a task has fewer.
    """

    def __init__(self, samples: StoredSamples, loss: PWMModelLoss, count: int) -> None:
        self.samples, self.loss = samples, loss
        self.rows = {}
        generator = torch.Generator().manual_seed(0)
        for name in samples.tasks:
            index = samples.of_task(name)
            if index is not None:
                self.rows[name] = index.sample(min(count, index.num_starts), generator)

    @torch.no_grad()
    def run(self, model: WorldModel, limit: int, between: Callable[[], None]) -> dict[str, float]:
        """Metrics of ``model``, in batches of at most ``limit`` slices; ``between`` is called before each.

        Returns:
            dict: ``validation/loss``, the training loss; ``validation/latent_mse`` and ``validation/reward_nmse``,
            squared errors of rollouts without feedback (for rewards, divided by their variance), means over horizon and
            tasks; and both errors for every task, with ``/TASK`` appended. Empty if there is nothing to validate on.
        """
        losses, latents, rewards = [], [], []
        metrics: dict[str, float] = {}
        for name, rows in self.rows.items():
            parts = []
            for begin in range(0, len(rows), limit):
                between()
                parts.append(self._measure(model, rows[begin : begin + limit]))
            weight = torch.tensor([len(part[3]) for part in parts], dtype=torch.float64)
            weight = weight / weight.sum()
            loss, latent, squared = (
                float((torch.tensor([part[i] for part in parts], dtype=torch.float64) * weight).sum()) for i in range(3)
            )
            nmse = squared / max(torch.cat([part[3] for part in parts]).var().item(), 1e-8)
            losses.append(loss)
            latents.append(latent)
            rewards.append(nmse)
            metrics |= {f"validation/latent_mse/{name}": latent, f"validation/reward_nmse/{name}": nmse}
        if not losses:
            return {}
        means = zip(("loss", "latent_mse", "reward_nmse"), (losses, latents, rewards), strict=True)
        return {**{f"validation/{key}": sum(values) / len(values) for key, values in means}, **metrics}

    def _measure(self, model: WorldModel, rows: np.ndarray) -> tuple[float, float, float, Tensor]:
        """Loss, latent error and squared reward error of some slices, and their rewards ``[B, H]``."""
        data = self.samples.slices(rows)
        loss = torch.stack(list(self.loss(data).values())).sum()
        slices = self.loss.read(data)
        # Steps after an episode's end have no transition to predict.
        inside = slices.valid.all(0).squeeze(-1)
        kept = slices.reward[:, inside]
        latent, squared = rollout_errors(
            model,
            slices.observation[inside],
            slices.action[:, inside],
            slices.next_observation[:, inside],
            kept,
            None if slices.task is None else slices.task[inside],
        )
        return loss.item(), latent.mean().item(), squared.mean().item(), kept.squeeze(-1).transpose(0, 1).cpu()


class HeldOutValidation:
    """Validates the world model of a pre-training, and saves the best one for other runs to read.

    Args:
        cfg (Config): the run's configuration.
        run_dir (Path): the run's directory.
        source (StoredSource): its episodes, some of them held out.
        summary (RunSummary): receives losses.
        between (callable): called between two batches; an exception that it raises ends the validation.
        check_owner (callable): called before a file is written; raises if another attempt owns the run.
    """

    measuring = "validating"

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        source: StoredSource,
        summary: RunSummary,
        between: Callable[[], None],
        check_owner: Callable[[], None],
    ) -> None:
        self.cfg, self.run_dir, self.source, self.summary = cfg, run_dir, source, summary
        self.between, self.check_owner = between, check_owner
        self.info = source.info
        self.best: float | None = None
        self.components: dict[str, Any] = {}

    def start(self, algorithm: Algorithm, policy: object, device: torch.device) -> None:
        """Set the algorithm whose model is validated; ``policy`` is not used."""
        self.algorithm, self.device = algorithm, device
        loss = algorithm.losses.model
        self.validation = Validation(self.source.held_out, loss, self.cfg.data.validation_slices)

    def prelude(self) -> None:
        """Nothing to do."""

    def begin_epoch(self, epoch: int, row: MetricRow) -> None:
        """Nothing to do."""

    def measure(self, epoch: int, row: MetricRow) -> float | None:
        """Loss on held-out slices, and open-loop errors for every task; returns minus the loss."""
        # The loss may draw random numbers (flow terms); a forked generator keeps them from changing training.
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            limit = self.algorithm.updates.limit("model", self.cfg.algorithm.model_batch)
            metrics = self.validation.run(self.algorithm.networks.model, limit, self.between)
        if not metrics:
            return None
        row.set(metrics)
        loss = metrics["validation/loss"]
        before = self.summary.best_validation_loss
        self.summary.validated(loss)
        if before is None or loss < before:
            self.save_world_model(epoch)
        return -loss

    def profile(self, row: MetricRow) -> None:
        """Nothing to do: there is no actor."""

    def save_world_model(self, epoch: int) -> WorldModelFacts:
        """Save the current world model for other runs to read."""
        self.check_owner()
        tasks = task_set(self.source.tasks)
        return save_world_model(
            self.run_dir / WORLD_MODEL,
            self.algorithm.networks.model,
            world_model_spec(self.cfg, self.source.info),
            task_names=tasks.names,
            observation_dims=tasks.observation_dims,
            labels={
                **labels_of(self.cfg),
                "epoch": epoch,
                "validation_loss": self.summary.validation_loss,
            },
        )

    def finish(self) -> None:
        """Save the world model if no validation has saved one."""
        folder = self.run_dir / WORLD_MODEL
        if not folder.is_dir() or not world_model_facts(folder).trained:
            self.save_world_model(self.summary.epochs_done)

    def close(self) -> None:
        """Nothing to do: nothing was opened."""


def write_model_description(cfg: Config, folder: Path) -> None:
    """Write the description of a pre-training's world model before it begins, so that extractions can be planned.

    Args:
        cfg (Config): the pre-training.
        folder (Path): its run directory, or a substitute for it.

    Raises:
        ConfigurationError: if its episodes are missing, or a task has none.
    """
    store = open_store(cfg)
    tasks = pretraining_tasks(cfg, store)
    spec = world_model_spec(cfg, pretraining_facts(cfg, store))
    facts = WorldModelFacts(spec, tasks.names, tasks.observation_dims, labels=labels_of(cfg))
    announce_world_model(folder / WORLD_MODEL, facts)


def labels_of(cfg: Config) -> dict[str, Any]:
    """The settings of a world model's architecture, for people to read beside its weights."""
    return {"model": asdict(cfg.model), "size": asdict(cfg.size)}
