"""A run that learns a policy for one task in a pre-trained world model."""

from __future__ import annotations

from dataclasses import replace

import torch
from tensordict import TensorDictBase
from torch import Tensor

from pwm_torchrl.envs import EnvInfo, env_info
from pwm_torchrl.envs.tasks import task_info
from pwm_torchrl.terminal import warn
from pwm_torchrl.training.assembly import PolicyRun
from pwm_torchrl.training.build import build_learners, build_losses
from pwm_torchrl.training.devices import pick_device
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.load import load_pretrained
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.model_stepper import ModelStepper
from pwm_torchrl.training.offline import extraction_facts, open_store, pin_world_model
from pwm_torchrl.training.policy_observer import PolicyObserver
from pwm_torchrl.training.stepper import PWMStepper
from pwm_torchrl.training.stored import StoredEpochs, StoredSamples

#: Share of the latent's variance at the beginning below which fine-tuning has collapsed it.
COLLAPSED = 0.1


class ExtractRun(PolicyRun):
    """Policy extraction."""

    opening = "opening the stored episodes"

    def open(self) -> EnvInfo:
        """Open the store; world model, store and registry have to agree on the task."""
        pin_world_model(self.cfg, self.run_dir)
        info = extraction_facts(self.cfg)
        self.episodes = open_store(self.cfg, staged=True)
        return info

    def build(self) -> None:
        """Networks with the pre-trained weights, and the task's environments if the policy is evaluated."""
        self.env_device = pick_device(self.cfg.env.get("device") or "cpu")
        if self.cfg.training.eval_episodes > 0:
            self.open_evaluation()
            made = env_info(self.eval_env)  # the registry does not know the range of actions
            self.info = replace(self.info, action_low=made.action_low, action_high=made.action_high)
        super().build()
        load_pretrained(self.cfg, self.networks.world_model)

    def assemble(self) -> None:
        """Put samples, stepper, observer, checkpoint and trainer together."""
        cfg = self.cfg
        samples = StoredSamples(
            self.episodes,
            [str(cfg.task)],
            cfg.algorithm.horizon,
            self.info.observation_dim,
            self.info.action_dim,
            labelled=False,
            device=self.device,
        )
        losses = build_losses(cfg, self.networks)
        learners = build_learners(cfg, self.networks)
        stepper = PWMStepper(
            cfg,
            self.networks,
            losses,
            learners,
            samples,
            None,
            cfg.algorithm.model_updates,
            self.micro_batch_halved,
            self.ranks,
            self.info,
        )
        observer = ExtractObserver(self, stepper)
        more = {"latent_variance": observer.latents} if cfg.finetune else {}
        self.put_together(StoredEpochs(), stepper, observer, learners, losses.return_statistics, more)

    def close(self) -> None:
        """Close the environments."""
        if self.eval_env is not None and not self.eval_env.is_closed:
            self.eval_env.close()


class LatentVariance:
    """Watches fine-tuning: a model that predicts itself may do so ever better with latents that say ever less.

    Attributes:
        first (float, optional): the variance before training.
        told (bool): whether the alarm was given.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.told = False

    def enter(self, variance: float) -> bool:
        """Take a variance; whether the latents have collapsed, told only once."""
        if self.first is None:
            self.first = variance
        collapsed = variance < COLLAPSED * self.first
        news, self.told = collapsed and not self.told, self.told or collapsed
        return news

    def state_dict(self) -> dict[str, float | bool | None]:
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, float | bool | None]) -> None:
        vars(self).update(state_dict)


class ExtractObserver(PolicyObserver):
    """Evaluates on the task's scale, and watches the latents of a world model that is fine-tuned.

    Args:
        run (ExtractRun): the run's parts.
        stepper (PWMStepper): its updates.
    """

    run: ExtractRun

    def __init__(self, run: ExtractRun, stepper: PWMStepper) -> None:
        super().__init__(run, stepper)
        self.latents = LatentVariance()
        self.task = task_info(str(run.cfg.task))

    def receive(self, batch: TensorDictBase) -> TensorDictBase:
        """An epoch begins."""
        if self.run.cfg.finetune:
            self.watch_latents()
        return super().receive(batch)

    def watch_latents(self) -> None:
        """Variance of the latents over stored observations, mean over features; an alarm when it collapses."""
        variance = latent_variance(self.stepper)
        self.trainer.row.set({"finetune/latent_variance": variance})
        if self.latents.enter(variance):
            first = self.latents.first
            message = (
                f"fine-tuning has collapsed the latents: their variance fell from {first:.3g} to {variance:.3g}; lower "
                "algorithm.model_lr, or extract with finetune=false"
            )
            write_event(self.run.run_dir, "latent_collapse", epoch=self.trainer.epoch, first=first, now=variance)
            warn(message)

    def evaluate(self, row: MetricRow) -> None:
        """Returns in the real environment, and the score that is compared between tasks."""
        super().evaluate(row)
        numbers = row.numbers()
        key = "eval/success" if self.task.score == "success" else "eval/return_mean"
        if key in numbers:
            row.set({"eval/score": self.task.normalized(numbers[key])})


@torch.no_grad()
def latent_variance(stepper: ModelStepper, count: int = 512) -> float:
    """Variance over stored observations of the world model's latents, mean over features; draws nobody's numbers."""
    device = stepper.replay.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        observation: Tensor = stepper.replay.sample_observations(count)
    return stepper.networks.world_model.encode(observation).var(0).mean().item()
