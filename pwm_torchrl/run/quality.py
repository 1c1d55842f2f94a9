"""Diagnoses runs that do not learn: measures the networks at each evaluation, and warns of problems."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from pwm_torchrl.algorithm.base import Algorithm, MetricRow
from pwm_torchrl.algorithm.quality import (
    effective_rank,
    latent_variance,
    rollout_errors,
    termination_shares,
    within_tasks,
)
from pwm_torchrl.config import Config
from pwm_torchrl.devices import to_device
from pwm_torchrl.objectives import SoftActorLoss
from pwm_torchrl.objectives.model_loss import Slices
from pwm_torchrl.run.directory import write_event
from pwm_torchrl.terminal import warn

__all__ = ["Quality"]

#: Maximum number of slices per measurement.
SLICES = 256
#: Networks with fewer updates cause no warning, because they have not had time to learn.
MIN_UPDATES = 100
#: Latents count as collapsed below this fraction of the largest variance that SimNorm's groups can have.
MIN_LATENT_VARIANCE = 1e-3
#: The model counts as not predicting rewards from this error on, as a fraction of their variance; predicting the mean
#: has an error of 1.
MAX_REWARD_ERROR = 0.9
#: The policy counts as saturated from this fraction of saturated deterministic actions on.
MAX_SATURATED_FRACTION = 0.95
#: Values that are too high count as wrong from this error on, relative to the size of the returns. Values of 0, which
#: critics start with, have an error of 1.
MAX_OVERESTIMATION = 2.0
#: The same for values that are too low. This limit is higher because values lag behind a policy that learns fast: the
#: error is 2.3 in a good run of Pendulum-v1.
MAX_UNDERESTIMATION = 10.0
#: Predicted terminations count as wrong if their fraction and the real one differ by this factor ...
MAX_TERMINATION_RATIO = 4.0
#: ... and the larger of the two is at least this.
MIN_TERMINATION_FRACTION = 0.1


class Quality:
    """Measures the networks at evaluations. Warns of each problem once per run, if two measurements in a row show it.

    After a crash, a run repeats the epochs since its last checkpoint, and may repeat their warnings.

    Args:
        cfg (Config): the run's configuration.
        algorithm (Algorithm): has the networks.
        run_dir (Path): the run's directory.

    Attributes:
        shown (list of str): problems that the last measurement showed.
        told (list of str): problems that were reported.
    """

    def __init__(self, cfg: Config, algorithm: Algorithm, run_dir: Path) -> None:
        self.cfg, self.algorithm, self.run_dir = cfg, algorithm, run_dir
        self.shown: list[str] = []
        self.told: list[str] = []

    # Measurements -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def measure_model(self, batch: TensorDictBase, row: MetricRow) -> None:
        """Measure the model on a collected batch before it is trained on it; no-op if the model was not trained yet.

        With several tasks, latents are compared within each task. Errors of rollouts along the batch are divided by
        variances over all stored data, because a policy that has learned to stand still collects rewards that hardly
        vary. Uses a forked random generator, so that measuring does not change training.

        Args:
            batch (TensorDictBase): ``[N, T]``, just collected and stored; empty if nothing is collected.
            row (MetricRow): receives ``model/latent_variance``, ``model/latent_rank``; ``model/terminations_predicted``
                and ``model/terminations_real`` if episodes may terminate; ``model/latent_nmse`` and
                ``model/reward_nmse``, means over steps, if a batch was collected.
        """
        algorithm = self.algorithm
        if not algorithm.started or "model" not in algorithm.optimizers:
            return
        model, device = algorithm.networks.model, algorithm.samples.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(0)
            stored = algorithm.losses.model.read(algorithm.sample_slices(SLICES))
        latent = model.encode(stored.observation, stored.task)
        if not latent.isfinite().all():  # the epoch's losses are not finite either, and reported
            return
        if stored.task is not None:
            latent = within_tasks(latent, stored.task)
        found = {"latent_variance": latent_variance(latent), "latent_rank": effective_rank(latent)}
        if model.termination is not None or (stored.terminated & stored.valid).any():
            soft = isinstance(algorithm.losses.actor, SoftActorLoss)
            predicted, real = termination_shares(model, stored, soft)
            found |= {"terminations_predicted": predicted, "terminations_real": real}
        fresh = self._slices(batch)
        if fresh is not None:
            errors = rollout_errors(
                model, fresh.observation, fresh.action, fresh.next_observation, fresh.reward, fresh.task, fresh.valid
            )
            variances = found["latent_variance"], stored.reward[stored.valid].var(unbiased=False)
            for name, error, variance in zip(("latent", "reward"), errors, variances, strict=True):
                if variance > 0:
                    found[f"{name}_nmse"] = error.nanmean() / variance
        row.set(found, prefix="model/")

    def _slices(self, batch: TensorDictBase) -> Slices | None:
        """Consecutive slices of a batch ``[N, T]``, rewards scaled."""
        algorithm = self.algorithm
        if batch.is_empty():
            return None
        length = min(self.cfg.algorithm.slice_length, batch.shape[1])
        slices = torch.cat(list(batch.split(length, 1))[: batch.shape[1] // length])[:SLICES]
        slices = to_device(slices.select(*algorithm.losses.model.in_keys), algorithm.samples.device)
        return algorithm.losses.model.read(algorithm.scaled(slices))

    # Warnings ---------------------------------------------------------------------------------------------------------

    def judge(self, epoch: int, numbers: Mapping[str, float]) -> None:
        """Warn of problems that an evaluation's metrics show, if those of the previous evaluation showed them too."""
        causes = dict(self._causes(numbers)) if self._updates() >= MIN_UPDATES else {}
        for cause, sentence in causes.items():
            if cause in self.shown and cause not in self.told:
                self.told.append(cause)
                write_event(self.run_dir, "quality", epoch=epoch, cause=cause, warning=sentence)
                warn(f"{sentence} (docs/howto/it_does_not_learn.md)")
        self.shown = list(causes)

    def _updates(self) -> int:
        """Updates of the model, or of the actor where no model is trained, in all attempts."""
        optimizers = self.algorithm.optimizers
        states = list(optimizers["model" if "model" in optimizers else "actor"].optimizer.state.values())
        return int(states[0]["step"]) if states else 0

    def _causes(self, numbers: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """The name of each problem, with a sentence that describes it."""
        actor = self.algorithm.networks.actor
        soft = actor is not None and actor.temperature is not None
        yield from self._predictions(numbers, soft)
        yield from self._terminations(numbers)
        yield from self._policy(numbers, soft)

    def _predictions(self, numbers: Mapping[str, float], soft: bool) -> Iterator[tuple[str, str]]:
        a, group = self.cfg.algorithm, self.cfg.size.simnorm_dim
        pretrained = self.cfg.mode == "extract"  # the model's units and heads were fixed in pre-training
        variance = numbers.get("model/latent_variance")
        possible = (group - 1) / group**2  # variance of one-hot groups with equally frequent entries
        if variance is not None and variance <= MIN_LATENT_VARIANCE * possible:
            weights = self.algorithm.losses.model.weights
            yield (
                "latents",
                f"the latents have collapsed: their variance is {variance:.2g} of at most {possible:.2g}; "
                f"raise model.loss.reward_coef ({weights.reward:g}) or lower model.loss.dynamics_coef "
                f"({weights.dynamics:g})"
                + ("" if a.scale_rewards or pretrained else ", or set algorithm.scale_rewards=true"),
            )
        error = numbers.get("model/reward_nmse")
        if error is not None and error >= MAX_REWARD_ERROR:
            updates = "updates_per_step" if soft else "model_updates"
            yield (
                "rewards",
                f"the model does not predict rewards: its error is {error:.2f} of their variance; raise "
                f"algorithm.{updates} ({getattr(a, updates):g}) or model.loss.reward_coef"
                + ("" if a.normalize_observations or pretrained else ", or set algorithm.normalize_observations=true"),
            )

    def _terminations(self, numbers: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        predicted, real = (numbers.get(f"model/terminations_{which}") for which in ("predicted", "real"))
        if predicted is None or real is None or max(predicted, real) < MIN_TERMINATION_FRACTION:
            return
        counted = f"it ends {predicted:.0%} of the replayed slices, of which {real:.0%} end"
        coef = f"raise model.loss.termination_coef ({self.cfg.model.loss.termination_coef:g})"
        if real > MAX_TERMINATION_RATIO * predicted:
            if self.algorithm.networks.model.termination is None and self.cfg.mode != "extract":
                coef = "set model.termination_head=true"
            elif not isinstance(self.algorithm.losses.actor, SoftActorLoss):
                coef += ", or choose algorithm=pwm, which uses probabilities instead of a threshold"
            yield "endless", f"the model misses the ends of episodes: {counted}; {coef}"
        elif predicted > MAX_TERMINATION_RATIO * real:
            yield (
                "too_early",
                f"the model ends episodes too early: {counted}; {coef}, or set model.termination_head=false where "
                "episodes are only truncated",
            )

    def _policy(self, numbers: Mapping[str, float], soft: bool) -> Iterator[tuple[str, str]]:
        a = self.cfg.algorithm
        saturated = numbers.get("policy/mean_saturated")
        if saturated is not None and saturated >= MAX_SATURATED_FRACTION:
            key = "target_entropy" if soft else "entropy_weight"
            yield (
                "actions",
                f"the policy is saturated: {saturated:.0%} of its actions are at a limit in evaluations, where it can "
                f"hardly learn; raise algorithm.{key} ({getattr(a, key):g})",
            )
        error = numbers.get("eval/value_error")
        if error is None:
            return
        value, followed = numbers["eval/value"], numbers["eval/value_return"]
        if error >= (MAX_OVERESTIMATION if value > followed else MAX_UNDERESTIMATION):
            yield (
                "values",
                f"the critics' values are far from the real returns: they predict {value:.3g} on average, the return "
                f"was {followed:.3g}, an error of {error:.1f} times the returns; lower algorithm.critic_lr "
                f"({a.critic_lr:g})" + (f" or algorithm.target_rate ({a.target_rate:g})" if soft else ""),
            )

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """``shown`` and ``told``."""
        return {"shown": list(self.shown), "told": list(self.told)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore ``shown`` and ``told``, which are missing in checkpoints of earlier versions."""
        self.shown, self.told = list(state_dict.get("shown", [])), list(state_dict.get("told", []))
