"""How good a world model is on episodes that it was not trained on, task by task."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pwm_torchrl.modules import WorldModel
from pwm_torchrl.objectives import PWMModelLoss
from pwm_torchrl.training.evaluation import rollout_errors
from pwm_torchrl.training.stored import StoredSamples


class Validation:
    """The same slices each time: of every task, the same number.

    Args:
        samples (StoredSamples): held-out episodes.
        loss (PWMModelLoss): what is trained.
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
            squared errors of rollouts without feedback (that of rewards over their variance), means over horizon and
            tasks; and the two of every task, with its name behind. Empty if there is nothing to validate on.
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
