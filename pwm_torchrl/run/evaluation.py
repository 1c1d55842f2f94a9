"""Evaluation in the real environment: returns of deterministic episodes, and open-loop errors of the model on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pwm_torchrl.algorithm.base import Algorithm, MetricRow, updates_of
from pwm_torchrl.config import Config
from pwm_torchrl.devices import environment_device
from pwm_torchrl.envs import EnvInfo, env_info, make_env, render_frame
from pwm_torchrl.envs.tasks import task_info
from pwm_torchrl.envs.workers import OpenEnv
from pwm_torchrl.modules import WorldModel
from pwm_torchrl.run.artifacts import write_video
from pwm_torchrl.run.collector import evaluation_env_seed, preserved_generators
from pwm_torchrl.run.directory import write_event
from pwm_torchrl.run.quality import rollout_errors, saturated_share, value_quality
from pwm_torchrl.run.summary import RunSummary
from pwm_torchrl.terminal import Progress, say, warn

#: Maximum agent steps of an evaluation episode in an environment without a known episode length.
MAX_AGENT_STEPS = 10_000
#: Fine-tuning has collapsed the latents if their variance falls below this fraction of its first value.
COLLAPSED = 0.1


@dataclass
class Episodes:
    """One episode per environment, time-major; rows after an episode's end are not ``valid``."""

    observation: Tensor  # [T, N, O]
    action: Tensor  # [T, N, A]
    next_observation: Tensor  # [T, N, O]
    reward: Tensor  # [T, N, 1]
    valid: Tensor  # bool [T, N, 1]
    success: Tensor | None = None  # bool [N], whether the task was solved at the end; None: not reported
    terminated: Tensor | None = None  # bool [T, N, 1]; None: never

    @property
    def ends(self) -> Tensor:
        """Terminations, bool ``[T, N, 1]``."""
        return torch.zeros_like(self.valid) if self.terminated is None else self.terminated

    @property
    def returns(self) -> Tensor:
        """Undiscounted sums of the environment's rewards, float64 ``[N]``."""
        return (self.reward.double() * self.valid).sum(0).squeeze(-1)


@preserved_generators()
@torch.no_grad()
def play(
    env: EnvBase,
    act: Callable[[TensorDictBase], TensorDictBase],
    seed: int,
    between: Callable[[], None] | None = None,
) -> Episodes:
    """One episode in each environment of ``env``, after seeding them.

    Args:
        env (EnvBase): environments of batch size ``[N]``.
        act (callable): sets ``action`` in a TensorDict, such as a policy module.
        seed (int): of the first environment; the same seed starts the same episodes.
        between (callable, optional): called before every step; an exception that it raises ends the evaluation.
            Defaults to ``None``.
    """
    env.set_seed(seed)
    limit = env_info(env).episode_length or MAX_AGENT_STEPS
    state = env.reset()
    running = torch.ones(*env.batch_size, 1, dtype=torch.bool)
    solved: Tensor | None = None
    columns: dict[str, list[Tensor]] = {
        key: [] for key in ("observation", "action", "next_observation", "reward", "valid", "terminated")
    }
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(limit):
            if between is not None:
                between()
            state, following = env.step_and_maybe_reset(act(state))
            step = state["next"]
            for key, value in (
                ("observation", state["observation"]),
                ("action", state["action"]),
                ("next_observation", step["observation"]),
                ("reward", step["reward"]),
                ("valid", running),
                ("terminated", step["terminated"]),
            ):
                columns[key].append(value.cpu().clone())
            if "success" in step.keys():
                now = step["success"].cpu()
                solved = now.clone() if solved is None else torch.where(running, now, solved)
            running = running & ~step["done"].cpu()
            if not running.any():
                break
            state = following
    success = None if solved is None else solved.squeeze(-1)
    return Episodes(**{key: torch.stack(values) for key, values in columns.items()}, success=success)


def acting_on(
    policy: Callable[[TensorDictBase], TensorDictBase], device: torch.device, env_device: torch.device
) -> Callable[[TensorDictBase], TensorDictBase]:
    """A policy on ``device`` for environments on ``env_device``."""
    if device == env_device:
        return policy

    def act(state: TensorDictBase) -> TensorDictBase:
        return state.set("action", policy(state.select("observation").to(device))["action"].to(env_device))

    return act


def random_action(env: EnvBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """Uniform actions from a separate generator, so that evaluating them does not change training."""
    generator = torch.Generator().manual_seed(0)
    shape = env.action_spec.shape

    def act(state: TensorDictBase) -> TensorDictBase:
        action = torch.rand(shape, generator=generator) * 2 - 1
        return state.set("action", action.to(state.device or "cpu"))

    return act


@torch.no_grad()
def open_loop_errors(
    model: WorldModel, episodes: Episodes, horizon: int, reward_scale: Tensor | None = None
) -> dict[str, float]:
    """Errors of the model rolled out for ``horizon`` steps from every ``horizon``-th observation, without feedback.

    Args:
        model (WorldModel): the model.
        episodes (Episodes): held-out data.
        horizon (int): ``H``.
        reward_scale (Tensor, optional): factor that the model's rewards were trained with.

    Returns:
        dict: ``latent_mse`` and ``reward_nmse`` (squared error over the variance of the real rewards; missing if there
        is only one reward), means over the horizon, and the same at its last step (``_last``). Empty if no episode is
        as long as the horizon.
    """
    device = next(model.parameters()).device
    total = episodes.valid.shape[0]
    starts = [s for s in range(0, total - horizon + 1, horizon) if episodes.valid[s + horizon - 1].any()]
    if not starts:
        return {}

    def windows(x: Tensor) -> Tensor:
        rows = [x[s : s + horizon, episodes.valid[s + horizon - 1].squeeze(-1)] for s in starts]
        return torch.cat(rows, 1).to(device)

    reward = windows(episodes.reward)
    if reward_scale is not None:
        reward = reward * reward_scale
    latent, squared = rollout_errors(
        model,
        windows(episodes.observation)[0],
        windows(episodes.action),
        windows(episodes.next_observation),
        reward,
    )
    errors = {"latent_mse": latent.mean().item(), "latent_mse_last": latent[-1].item()}
    if reward.numel() > 1:
        nmse = squared / reward.var().clamp_min(1e-8)
        errors |= {"reward_nmse": nmse.mean().item(), "reward_nmse_last": nmse[-1].item()}
    return errors


def frames_per_second(info: EnvInfo) -> float:
    """Frame rate of a video with one frame per agent step, so that it shows 30 environment steps per second."""
    return 30.0 / max(1, info.action_repeat)


def film(env: EnvBase, act: Callable[[TensorDictBase], TensorDictBase], seed: int) -> Iterator[np.ndarray]:
    """Frames of one deterministic episode in a rendering environment of batch size [1]."""
    env.set_seed(seed)
    state = env.reset()
    limit = env_info(env).episode_length or MAX_AGENT_STEPS
    for _ in range(limit):
        yield render_frame(env)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            state, following = env.step_and_maybe_reset(act(state))
        if state["next", "done"].any():
            return
        state = following


class Evaluation(Protocol):
    """Measures a run's networks; the modes have different implementations."""

    @property
    def measuring(self) -> str:
        """Name of :meth:`measure` in the progress display."""

    def prelude(self) -> None:
        """Called before the first epoch of every attempt."""

    def begin_epoch(self, epoch: int, row: MetricRow) -> None:
        """Measure the networks before an epoch's updates."""

    def measure(self, epoch: int, row: MetricRow) -> float | None:
        """Write metrics to ``row`` and the summary; returns the score of the checkpoint, higher is better."""

    def profile(self, row: MetricRow) -> None:
        """Write gradient norms to ``row``."""

    def finish(self) -> None:
        """Write the final files of a run that has finished."""

    def close(self) -> None:
        """Close everything that this object opened."""


class PolicyEvaluation:
    """Plays deterministic episodes in separate environments, and measures the model's open-loop errors on them.

    Args:
        cfg (Config): the run's configuration.
        run_dir (Path): the run's directory.
        info (EnvInfo): facts of the training environment.
        summary (RunSummary): receives the returns.
        between (callable): called between two steps of an episode; an exception that it raises ends the evaluation.
        progress (Progress): shows phases that take long.
    """

    measuring = "evaluating"

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        info: EnvInfo,
        summary: RunSummary,
        between: Callable[[], None],
        progress: Progress,
    ) -> None:
        self.cfg, self.run_dir, self.info, self.summary, self.between = cfg, run_dir, info, summary, between
        self.progress = progress
        self.seed = evaluation_env_seed(cfg.seed)
        self.env_device = environment_device(cfg)
        self.task = None if cfg.task is None else task_info(str(cfg.task))
        self.latents = LatentVariance()
        self.components: dict[str, Any] = {"latent_variance": self.latents} if cfg.finetune else {}
        self.env: EnvBase | None = None
        self.opened: OpenEnv | None = None
        if cfg.mode == "online" or cfg.training.eval_episodes > 0:
            self.env, self.opened = self._open(max(1, cfg.training.eval_episodes))
            made = env_info(self.env)  # the task registry does not contain action ranges
            self.info = replace(info, action_low=made.action_low, action_high=made.action_high)

    def _open(self, count: int, render: bool = False) -> tuple[EnvBase, OpenEnv]:
        with OpenEnv.opening(self.info.name, self.seed) as opened:
            env = opened.hold(
                make_env(self.cfg.env, num_envs=count, seed=self.seed, device=self.env_device, render=render)
            )
        return env, opened

    def start(
        self, algorithm: Algorithm, policy: Callable[[TensorDictBase], TensorDictBase], device: torch.device
    ) -> None:
        """Set the policy to evaluate, and the algorithm whose model and losses are measured."""
        self.algorithm, self.device = algorithm, device
        self.act = acting_on(policy, device, self.env_device)

    def prelude(self) -> None:
        """Measure the return of random actions, once per run."""
        if self.env is not None and self.summary.random_return is None:
            with self.progress.phase("evaluating random actions"):
                self.summary.random_return = float(self.play(random_action(self.env)).returns.mean())

    def play(self, act: Callable[[TensorDictBase], TensorDictBase], number: int = 0) -> Episodes:
        """Play one episode in each environment, with the seeds of evaluation ``number``."""
        assert self.env is not None
        assert self.opened is not None
        seed = evaluation_env_seed(self.cfg.seed, number, self.env.batch_size.numel())
        with self.opened.naming_dead_workers():
            return play(self.env, act, seed, self.between)

    def begin_epoch(self, epoch: int, row: MetricRow) -> None:
        """In fine-tuning, measure the latents' variance over stored observations, and warn if it has collapsed."""
        if not self.cfg.finetune:
            return
        variance = latent_variance(self.algorithm)
        row.set({"finetune/latent_variance": variance})
        if self.latents.enter(variance):
            first = self.latents.first
            write_event(self.run_dir, "latent_collapse", epoch=epoch, first=first, now=variance)
            warn(
                f"fine-tuning has collapsed the latents: their variance fell from {first:.3g} to {variance:.3g}; lower "
                "algorithm.model_lr, or extract with finetune=false"
            )

    def measure(self, epoch: int, row: MetricRow) -> float | None:
        """Measure returns, success, the task's score and the model's errors; returns the mean return."""
        if self.env is None:
            return None
        # New initial states every time: with the same ones, the best of many evaluations would be biased upwards.
        episodes = self.play(self.act, epoch)
        returns = episodes.returns
        mean, std = returns.mean().item(), returns.std(unbiased=False).item()
        row.set(
            {
                "eval/return_mean": mean,
                "eval/return_std": std,
                "eval/return_min": returns.min(),
                "eval/return_max": returns.max(),
            }
        )
        if episodes.success is not None:
            row.set({"eval/success": episodes.success.float().mean()})
        scale = None
        if self.algorithm.reward_scale is not None:
            scale = self.algorithm.reward_scale(torch.ones(1, device=self.device))
        self._measure_policy(episodes, scale, row)
        if self.algorithm.networks.model is not None:
            errors = open_loop_errors(self.algorithm.networks.model, episodes, self.cfg.algorithm.slice_length, scale)
            row.set({f"eval/{key}": value for key, value in errors.items()})
        numbers = row.numbers()
        if self.task is not None:
            key = "eval/success" if self.task.score == "success" else "eval/return_mean"
            if key in numbers:
                row.set({"eval/score": self.task.normalized(numbers[key])})
        self.summary.evaluated(mean, std)
        return mean

    def _measure_policy(self, episodes: Episodes, scale: Tensor | None, row: MetricRow) -> None:
        """Measure the share of saturated actions, and the critics' values against the returns that followed."""
        row.set({"policy/mean_saturated": saturated_share(episodes.action, episodes.valid)})
        found = value_quality(
            self.algorithm.networks,
            episodes.observation.to(self.device),
            episodes.action.to(self.device),
            episodes.next_observation.to(self.device),
            episodes.reward.to(self.device) * (1 if scale is None else scale),
            episodes.valid.to(self.device),
            episodes.ends.to(self.device),
            self.cfg.algorithm.gamma,
        )
        values = {"value": found.predicted, "value_return": found.realised, "value_error": found.error}
        row.set({f"eval/{key}": value for key, value in values.items()})

    def profile(self, row: MetricRow) -> None:
        """Gradient norm per horizon step; uses a forked random generator, so that logging does not change training."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            # No more rollouts than an update back-propagates at once, because memory was planned for those.
            count = self.algorithm.updates.size("actor", updates_of(self.cfg)["actor"].batch)
            row.set(gradient_profile(self.algorithm, self.algorithm.sample_starts(count)))

    def finish(self) -> None:
        """Write a video of one deterministic episode if configured; an error is reported and does not fail the run."""
        if not self.cfg.training.video or self.env is None:
            return
        opened: OpenEnv | None = None
        try:
            with self.progress.phase("opening the environment to film", forks=True):
                env, opened = self._open(1, render=True)
            with self.progress.phase("filming an episode"):
                frames = film(env, self.act, self.seed)
                write_video(self.run_dir / "video.mp4", frames, frames_per_second(self.info))
        except Exception as error:  # noqa: BLE001 - no exception of a renderer or an encoder may fail a finished run
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"no video: {reason} (training.video=false turns it off)")
        finally:
            if opened is not None:
                opened.close()

    def close(self) -> None:
        """Close the environments."""
        if self.opened is not None:
            self.opened.close()


def gradient_profile(algorithm: Algorithm, observation: Tensor) -> dict[str, float]:
    """Norm of the actor objective's gradient with respect to the action of every horizon step, batch mean.

    Args:
        algorithm (Algorithm): has the actor loss and the encoder.
        observation (Tensor): ``[B, O]``, start of the imagined rollouts.
    """
    gradient = algorithm.losses.actor.action_gradients(algorithm.encode(observation)["latent"])
    return {f"grad_profile/{t:02d}": g.norm(dim=-1).sum().item() for t, g in enumerate(gradient)}


class LatentVariance:
    """Detects collapsing latents in fine-tuning.

    A model that predicts its own latents can reduce its loss by making them less informative.

    Attributes:
        first (float, optional): the variance before training.
        told (bool): whether the collapse was reported.
    """

    def __init__(self) -> None:
        self.first: float | None = None
        self.told = False

    def enter(self, variance: float) -> bool:
        """Record a variance; returns True the first time that the latents have collapsed."""
        if self.first is None:
            self.first = variance
        collapsed = variance < COLLAPSED * self.first
        news, self.told = collapsed and not self.told, self.told or collapsed
        return news

    def state_dict(self) -> dict[str, float | bool | None]:
        """Its attributes."""
        return dict(vars(self))

    def load_state_dict(self, state_dict: dict[str, float | bool | None]) -> None:
        """Restore its attributes."""
        vars(self).update(state_dict)


@torch.no_grad()
def latent_variance(algorithm: Algorithm, count: int = 512) -> float:
    """Variance of the model's latents over ``count`` stored observations, mean over features.

    Uses a forked random generator, so that measuring does not change training.
    """
    device = algorithm.samples.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        observation = algorithm.samples.sample_observations(count)
    return algorithm.networks.model.encode(observation).var(0).mean().item()
