"""The parts of a run, put together from its configuration."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint
from torchrl.envs import EnvBase

from pwm_torchrl.data import TrajectoryReplay, steps_since_checkpoint
from pwm_torchrl.envs import EnvInfo, env_info, make_env
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, OutOfMemory, StorageFault
from pwm_torchrl.modules import RewardScale, policy_module
from pwm_torchrl.training.artifacts import write_curves, write_run_readme, write_video
from pwm_torchrl.training.build import build_learners, build_losses, build_networks
from pwm_torchrl.training.checkpoint import CheckpointFault, load_checkpoint
from pwm_torchrl.training.checkpoint_store import CheckpointStore
from pwm_torchrl.training.claims import RunClaim
from pwm_torchrl.training.collector import EpisodeReturns, ResumableCollector
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.distributed import Ranks
from pwm_torchrl.training.evaluation import acting_on, film, play, random_action
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.failpoints import failpoint
from pwm_torchrl.training.faults import save_after_environment_fault, save_after_out_of_memory
from pwm_torchrl.training.interrupt import stop_on_interrupt
from pwm_torchrl.training.load import facts_of
from pwm_torchrl.training.loggers import close_logger, make_logger
from pwm_torchrl.training.memory_plan import RunPlan
from pwm_torchrl.training.observer import Observer
from pwm_torchrl.training.progress import say, warn
from pwm_torchrl.training.seeding import RunRNGState, evaluation_env_seed, seed_everything, training_env_seed
from pwm_torchrl.training.state_files import AllocatedStateAdapter
from pwm_torchrl.training.stepper import POLICY_STARTS, PWMStepper
from pwm_torchrl.training.stop import StopInEpoch, StopRequest
from pwm_torchrl.training.summary import RunSummary
from pwm_torchrl.training.threads import set_threads
from pwm_torchrl.training.trainer import PWMTrainer

#: Model updates of the first training epoch where an episode's length is unknown.
UNKNOWN_EPISODE_UPDATES = 1000


class Run:
    """The assembled parts of a run.

    Args:
        cfg (Config): the whole run.
        run_dir (Path): its directory.
        summary (RunSummary): its result so far.
        claim (RunClaim): of its directory.
        resume (bool): whether it continues an earlier attempt. Defaults to ``False``.
        stop (StopRequest, optional): asks it to stop at its next step. Defaults to ``None``: nobody does.
        ranks (Ranks, optional): processes that share its updates. Defaults to ``None``, this one alone.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        summary: RunSummary,
        claim: RunClaim,
        resume: bool = False,
        stop: StopRequest | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.cfg, self.run_dir, self.summary, self.claim, self.ranks = cfg, run_dir, summary, claim, ranks
        self.stop = stop or StopRequest()
        set_threads(cfg.training.threads)
        self.device = pick_device(cfg.device)
        self.env_device = pick_device(cfg.env.get("device") or "cpu")  # a simulator may have a GPU of its own
        seed_everything(cfg.seed)
        self.env = make_env(
            cfg.env,
            num_envs=int(cfg.env.get("num_envs", 1)),
            seed=training_env_seed(cfg.seed),
            device=self.env_device,
        )
        self.info = env_info(self.env)
        check_against_env(cfg, self.info)
        self.memory_plan = RunPlan(cfg, self.info, self.device, run_dir, resume)
        self.cfg = cfg = self.memory_plan.plan.applied(cfg)
        self.eval_env = self._evaluation_env(max(1, cfg.training.eval_episodes))
        self.networks = build_networks(cfg, self.info, self.device)
        self.policy = policy_module(
            self.networks.world_model, self.networks.actor, action_spec=self.env.action_spec_unbatched
        )
        self.act = acting_on(self.policy, self.device, self.env_device)
        self.assemble()

    def _evaluation_env(self, count: int, render: bool = False) -> EnvBase:
        seed = evaluation_env_seed(self.cfg.seed)
        return make_env(self.cfg.env, num_envs=count, seed=seed, device=self.env_device, render=render)

    def assemble(self) -> None:
        """Put collector, replay, stepper, observer, checkpoint and trainer together."""
        cfg, a, t = self.cfg, self.cfg.algorithm, self.cfg.training
        steps = a.collect_steps or a.horizon
        collector = ResumableCollector(self.env, self.policy, steps, a.random_steps, self.device, self.env_device)
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
        stepper.stop = self.stop
        returns = EpisodeReturns(self.info.num_envs)
        self.store = CheckpointStore(self.run_dir, max(1, t.keep_checkpoints), self.claim)
        self.observer = Observer(self, stepper)
        self.trainer = PWMTrainer(
            collector=collector,
            stepper=stepper,
            epochs=t.epochs,
            action_repeat=self.info.action_repeat,
            finish_epoch=self.observer.finish_epoch,
            checkpoint=Checkpoint().register_adapter(object, AllocatedStateAdapter()),
            store=self.store,
            facts=facts_of(self.info.observation_dim, self.info.action_dim, self.info.terminates),
            checkpoint_every=t.checkpoint_every,
            checkpoint_minutes=t.checkpoint_minutes,
        )
        self.trainer.register_op("batch_process", self.observer.receive)
        self.observer.trainer = self.trainer
        self.observer.returns = returns
        self.components: dict[str, Any] = {
            **dict(self.networks.items()),
            **{f"optimizer_{name}": learner.optimizer for name, learner in learners.items()},
            "return_statistics": losses.actor.return_statistics,
            "stepper": stepper,
            "replay": self.replay,
            "collector": collector,
            "episode_returns": returns,
            "trainer": self.trainer,
            "summary": self.summary,
            "rng": RunRNGState(),
        }
        if self.reward_scale is not None:
            self.components["reward_scale"] = self.reward_scale
        for name, component in self.components.items():
            self.trainer.checkpoint.register(name, component)

    def restore(self) -> bool:
        """Load the newest readable checkpoint; False if there is none at all.

        Raises:
            CheckpointFault: if there are checkpoints and none can be read.
            StorageFault: likewise, because the replay on disk that they refer to is not there.
        """
        paths = self.store.paths()
        fault: CheckpointFault | StorageFault | None = None
        while paths:
            path = paths.pop()
            failpoint("resume.restoring")
            try:
                load_checkpoint(path, self.components)
            except (CheckpointFault, StorageFault) as error:
                fault = error
                if paths:
                    warnings.warn(f"{error} Trying the one before.", stacklevel=2)
                continue
            self.store.abandon_after(path)
            if not self.trainer.collector.resumed_exactly:
                self.begin_new_episodes()
            return True
        if fault is not None:
            raise fault
        return False

    def begin_new_episodes(self) -> None:
        """What was collected so far does not continue: the environments could not be put back where they were."""
        self.replay.end_episodes()
        self.observer.returns.running.zero_()
        if self.reward_scale is not None:
            self.reward_scale.returns.zero_()

    def execute(self, resume: bool) -> str:
        """Train to the end or to a stop; returns the status."""
        restored = resume and self.restore()
        failpoint("resume.restored" if restored else "start.built")
        write_event(self.run_dir, "resume" if restored else "start", epoch=self.trainer.epoch)
        if not restored:
            self.summary.begin_again()
        self.observer.open(restored)
        write_run_readme(self.run_dir, self.cfg)
        if self.summary.random_return is None:
            try:
                returns = self.play(random_action(self.eval_env), self.stop.check)
            except StopInEpoch:
                return "stopped"
            self.summary.random_return = float(returns.mean())
        self.summary.write()
        logger = make_logger(self.cfg.logger, self.run_dir, asdict(self.cfg), first_step=self.trainer.env_steps)
        self.observer.logger = self.trainer.logger = logger
        try:
            if self.trainer.epoch < self.cfg.training.epochs or self.trainer.inside_epoch:
                with stop_on_interrupt(self.trainer), self.observer.memory.watching():
                    self.trainer.train()
            else:
                self.trainer.shutdown()
        except StopInEpoch:
            failpoint("stop.asked")
            self.trainer.save_inside()
            failpoint("stop.saved")
        except EnvironmentFault:
            save_after_environment_fault(self.trainer)
            raise
        except OutOfMemory:
            save_after_out_of_memory(self.trainer, self.run_dir)
            raise
        finally:
            self.observer.close()
            close_logger(logger)
        if self.observer.alarm is not None:
            raise OutOfMemory(
                f"Stopped with a checkpoint after epoch {self.trainer.epoch}: {self.observer.alarm.message}."
            )
        over = self.trainer.epoch >= self.cfg.training.epochs and not self.trainer.inside_epoch
        return "finished" if over else "stopped"

    def micro_batch_halved(self, update: str, refused: int, size: int, message: str) -> None:
        """An update ran out of memory and is repeated in smaller parts."""
        write_event(self.run_dir, "micro_batch", update=update, refused=refused, size=size, error=message)
        say(f"out of memory: the {update} update is repeated with micro-batches of {size} instead of {refused}")

    def memory_unwatched(self, reason: str) -> None:
        """Watching memory failed."""
        write_event(self.run_dir, "unwatched", error=reason)
        warn(reason)

    def draw(self) -> None:
        """Curves, and a video of the final policy; a machine that cannot draw gets a sentence, not a failed run."""
        try:
            write_curves(self.run_dir)
        except ConfigurationError as error:
            say(f"no curves: {error}")
        if self.cfg.training.video and self.summary.status == "finished":
            self.write_video()

    def close(self) -> None:
        """Close the environments."""
        # The collector has closed its environments already, and a batch of a user's own does not take that twice.
        for env in (self.env, self.eval_env):
            if not env.is_closed:
                env.close()

    def play(self, act: Any, between: Callable[[], None] | None = None) -> torch.Tensor:
        """Returns of one episode in each evaluation environment, float64 ``[N]``; ``between`` its steps."""
        return play(self.eval_env, act, evaluation_env_seed(self.cfg.seed), between).returns

    def write_video(self) -> None:
        """Film one deterministic episode."""
        try:
            env = self._evaluation_env(1, render=True)
            fps = 30.0 / max(1, self.info.action_repeat)
            write_video(self.run_dir, film(env, self.act, evaluation_env_seed(self.cfg.seed)), fps)
            env.close()
        except Exception as error:  # noqa: BLE001 - whatever a renderer or an encoder raises, the run has finished
            say(f"no video: {' '.join(str(error).split()) or type(error).__name__}")


def pick_device(name: str) -> torch.device:
    """``auto`` is CUDA where there is one.

    Raises:
        ConfigurationError: for an unknown device or one that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"device={name!r} is unknown; choose auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(
            f"device={name!r} is not there: PyTorch sees {torch.cuda.device_count()} CUDA devices."
        )
    return device


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
