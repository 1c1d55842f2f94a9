"""A run that collects in an environment, and learns a world model and a policy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torchrl.data import Bounded
from torchrl.envs import EnvBase

from pwm_torchrl.data import TrajectoryReplay, steps_since_checkpoint
from pwm_torchrl.envs import EnvInfo, env_info, make_env
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import RewardScale, policy_module
from pwm_torchrl.terminal import say
from pwm_torchrl.training.artifacts import write_video
from pwm_torchrl.training.base_run import BaseRun
from pwm_torchrl.training.build import Networks, build_learners, build_losses, build_networks
from pwm_torchrl.training.collector import EpisodeReturns, ResumableCollector
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.devices import pick_device
from pwm_torchrl.training.evaluation import acting_on, film, frames_per_second, play, random_action
from pwm_torchrl.training.policy_observer import OnlineObserver
from pwm_torchrl.training.seeding import evaluation_env_seed, training_env_seed
from pwm_torchrl.training.stepper import POLICY_STARTS, PWMStepper

#: Model updates of the first training epoch where an episode's length is unknown.
UNKNOWN_EPISODE_UPDATES = 1000


class PolicyRun(BaseRun):
    """A run that has a policy, evaluated in environments."""

    networks: Networks
    eval_env: EnvBase | None = None

    def open_evaluation(self) -> None:
        """The environments in which the policy is evaluated."""
        self.env_device = pick_device(self.cfg.env.get("device") or "cpu")  # a simulator may have a GPU of its own
        self.eval_env = self._evaluation_env(max(1, self.cfg.training.eval_episodes))

    def _evaluation_env(self, count: int, render: bool = False) -> EnvBase:
        seed = evaluation_env_seed(self.cfg.seed)
        return make_env(self.cfg.env, num_envs=count, seed=seed, device=self.env_device, render=render)

    def build(self) -> None:
        """Networks, and the policy that acts with them."""
        self.networks = build_networks(self.cfg, self.info, self.device)
        spec = Bounded(-1.0, 1.0, (self.info.action_dim,), device=self.device)
        self.policy = policy_module(self.networks.world_model, self.networks.actor, action_spec=spec)
        self.act = acting_on(self.policy, self.device, self.env_device)

    def prelude(self) -> None:
        """The return of random actions, once in the life of a run."""
        if self.eval_env is not None and self.summary.random_return is None:
            with self.progress.phase("evaluating random actions"):
                returns = self.play(random_action(self.eval_env), self.stop.check)
            self.summary.random_return = float(returns.mean())

    def draw(self) -> None:
        """Curves, and a video of the final policy."""
        super().draw()
        if self.cfg.training.video and self.eval_env is not None and self.summary.status == "finished":
            self.write_video()

    def play(self, act: Any, between: Callable[[], None] | None = None) -> torch.Tensor:
        """Returns of one episode in each evaluation environment, float64 ``[N]``; ``between`` its steps."""
        assert self.eval_env is not None
        return play(self.eval_env, act, evaluation_env_seed(self.cfg.seed), between).returns

    def write_video(self) -> None:
        """Film one deterministic episode."""
        try:
            with self.progress.phase("opening the environment to film", forks=True):
                env = self._evaluation_env(1, render=True)
            with self.progress.phase("filming an episode"):
                frames = film(env, self.act, evaluation_env_seed(self.cfg.seed))
                write_video(self.run_dir / "video.mp4", frames, frames_per_second(self.info))
            env.close()
        except Exception as error:  # noqa: BLE001 - whatever a renderer or an encoder raises, the run has finished
            reason = " ".join(str(error).split()) or type(error).__name__
            say(f"no video: {reason} (training.video=false films nothing)")


class Run(PolicyRun):
    """A run that collects in an environment."""

    opening = "opening the environments"

    def open(self) -> EnvInfo:
        """Make the environments."""
        cfg = self.cfg
        self.env_device = pick_device(cfg.env.get("device") or "cpu")
        self.env = make_env(
            cfg.env,
            num_envs=int(cfg.env.get("num_envs", 1)),
            seed=training_env_seed(cfg.seed),
            device=self.env_device,
        )
        info = env_info(self.env)
        check_against_env(cfg, info)
        return info

    def build(self) -> None:
        self.open_evaluation()
        super().build()

    def assemble(self) -> None:
        """Put collector, replay, stepper, observer, checkpoint and trainer together."""
        cfg, a, t = self.cfg, self.cfg.algorithm, self.cfg.training
        steps = a.collect_steps or a.horizon
        collector = ResumableCollector(self.env, self.policy, steps, a.random_steps, self.device, self.env_device)
        collector.progress = self.progress
        self.replay = TrajectoryReplay(
            t.replay_capacity,
            self.info.num_envs,
            a.horizon,
            t.replay_storage,
            self.run_dir / "replay",
            self.device,
            observation_dim=self.info.observation_dim,
            action_dim=self.info.action_dim,
            since_checkpoint_steps=steps_since_checkpoint(t.epochs, steps, t.checkpoint_every, t.keep_checkpoints),
        )
        self.reward_scale = RewardScale(self.info.num_envs, a.gamma).to(self.device) if a.normalize_rewards else None
        losses = build_losses(cfg, self.networks)
        learners = build_learners(cfg, self.networks)
        first = a.first_model_updates
        if first is None:
            first = self.info.episode_length or UNKNOWN_EPISODE_UPDATES
        stepper = PWMStepper(
            cfg,
            self.networks,
            losses,
            learners,
            self.replay,
            self.reward_scale,
            first,
            self.micro_batch_halved,
            self.ranks,
            self.info,
        )
        returns = self.returns = EpisodeReturns(self.info.num_envs)
        observer = OnlineObserver(self, stepper, returns)
        more: dict[str, Any] = {"replay": self.replay, "collector": collector, "episode_returns": returns}
        if self.reward_scale is not None:
            more["reward_scale"] = self.reward_scale
        self.put_together(collector, stepper, observer, learners, losses.return_statistics, more)

    def restored(self) -> None:
        """Where the environments could not be put back, new episodes begin."""
        if not self.trainer.collector.resumed_exactly:
            self.begin_new_episodes()

    def begin_new_episodes(self) -> None:
        """What was collected so far does not continue: the environments could not be put back where they were."""
        self.replay.end_episodes()
        self.returns.running.zero_()
        if self.reward_scale is not None:
            self.reward_scale.returns.zero_()

    def close(self) -> None:
        """Close the environments."""
        # The collector has closed its environments already, and a batch of a user's own does not take that twice.
        for env in (self.env, self.eval_env):
            if env is not None and not env.is_closed:
                env.close()


def check_against_env(cfg: Config, info: EnvInfo) -> None:
    """Settings that only the environment can refute.

    Raises:
        ConfigurationError: if the horizon is longer than an episode, or the start states are unknown.
    """
    horizon = cfg.algorithm.horizon
    if info.episode_length is not None and horizon > info.episode_length:
        raise ConfigurationError(
            f"algorithm.horizon={horizon} is longer than an episode of {info.name} ({info.episode_length} agent steps)."
        )
    if cfg.algorithm.policy_starts not in POLICY_STARTS:
        raise ConfigurationError(
            f"algorithm.policy_starts={cfg.algorithm.policy_starts!r} is not one of {', '.join(POLICY_STARTS)}."
        )
