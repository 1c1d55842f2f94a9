"""What every run has: its parts put together, training to the end or to a stop, checkpoints and pictures."""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn
from torchrl.checkpoint import Checkpoint

from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, OutOfMemory, StorageFault
from pwm_torchrl.terminal import Progress, say, warn
from pwm_torchrl.training.artifacts import write_curves
from pwm_torchrl.training.build import Learner, ModelNetworks
from pwm_torchrl.training.checkpoint import CheckpointFault, load_checkpoint
from pwm_torchrl.training.checkpoint_store import CheckpointStore
from pwm_torchrl.training.claims import RunClaim
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.devices import pick_device
from pwm_torchrl.training.distributed import Ranks
from pwm_torchrl.training.events import write_event
from pwm_torchrl.training.failpoints import failpoint
from pwm_torchrl.training.faults import save_after_environment_fault, save_after_out_of_memory
from pwm_torchrl.training.interrupt import stop_on_interrupt
from pwm_torchrl.training.load import facts_of
from pwm_torchrl.training.loggers import close_logger, make_logger
from pwm_torchrl.training.memory_plan import RunPlan
from pwm_torchrl.training.model_stepper import ModelStepper
from pwm_torchrl.training.observer import Observer
from pwm_torchrl.training.run_readme import write_run_readme
from pwm_torchrl.training.seeding import RunRNGState, seed_everything
from pwm_torchrl.training.state_files import AllocatedStateAdapter
from pwm_torchrl.training.stop import StopInEpoch, StopRequest
from pwm_torchrl.training.summary import RunSummary
from pwm_torchrl.training.threads import set_threads
from pwm_torchrl.training.trainer import PWMTrainer


class BaseRun:
    """The assembled parts of a run; subclasses say what it learns from.

    Args:
        cfg (Config): the whole run.
        run_dir (Path): its directory.
        summary (RunSummary): its result so far.
        claim (RunClaim): of its directory.
        resume (bool): whether it continues an earlier attempt. Defaults to ``False``.
        stop (StopRequest, optional): asks it to stop at its next step. Defaults to ``None``: nobody does.
        ranks (Ranks, optional): processes that share its updates. Defaults to ``None``, this one alone.
        progress (Progress, optional): is told what the run does. Defaults to ``None``: nothing is shown.
    """

    opening: str  # what :meth:`open` does, in words
    networks: ModelNetworks
    observer: Observer
    trainer: PWMTrainer

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        summary: RunSummary,
        claim: RunClaim,
        resume: bool = False,
        stop: StopRequest | None = None,
        ranks: Ranks | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.cfg, self.run_dir, self.summary, self.claim, self.ranks = cfg, run_dir, summary, claim, ranks
        self.stop = stop or StopRequest()
        self.progress = progress or Progress()
        set_threads(cfg.training.threads)
        self.device = pick_device(cfg.device)
        seed_everything(cfg.seed)
        with self.progress.phase(self.opening, forks=True):
            self.info: EnvInfo = self.open()
        with self.progress.phase("planning memory"):
            self.memory_plan = RunPlan(cfg, self.info, self.device, run_dir, resume)
        self.cfg = self.memory_plan.plan.applied(cfg)
        with self.progress.phase("building the networks", forks=True):
            self.build()
        self.assemble()

    def open(self) -> EnvInfo:
        """Environments or stored episodes, before memory is planned; returns their facts."""
        raise NotImplementedError

    def build(self) -> None:
        """The networks."""
        raise NotImplementedError

    def assemble(self) -> None:
        """Put source, stepper, observer, checkpoint and trainer together, with :meth:`put_together`."""
        raise NotImplementedError

    def prelude(self) -> None:
        """What comes before the first epoch, and again when a run is resumed.

        Raises:
            StopInEpoch: if a stop was asked for meanwhile.
        """

    def put_together(
        self,
        source: Any,
        stepper: ModelStepper,
        observer: Observer,
        learners: dict[str, Learner],
        statistics: nn.Module | None,
        more: dict[str, Any],
    ) -> None:
        """The trainer around ``source``, and the components of its checkpoints, ``more`` among them."""
        t = self.cfg.training
        stepper.stop, stepper.progress = self.stop, self.progress
        self.store = CheckpointStore(self.run_dir, max(1, t.keep_checkpoints), self.claim)
        self.observer = observer
        self.trainer = PWMTrainer(
            collector=source,
            stepper=stepper,
            epochs=t.epochs,
            action_repeat=self.info.action_repeat,
            finish_epoch=observer.finish_epoch,
            checkpoint=Checkpoint().register_adapter(object, AllocatedStateAdapter()),
            store=self.store,
            facts=facts_of(self.info),
            checkpoint_every=t.checkpoint_every,
            checkpoint_minutes=t.checkpoint_minutes,
        )
        self.trainer.register_op("batch_process", observer.receive)
        observer.trainer = self.trainer
        self.trainer.progress = self.progress
        self.components: dict[str, Any] = {
            # What is not trained is not saved: it is where it was read from.
            **{name: network for name, network in self.networks.items() if name in learners},
            **{f"optimizer_{name}": learner.optimizer for name, learner in learners.items()},
            **({} if statistics is None else {"return_statistics": statistics}),
            "stepper": stepper,
            **more,
            "trainer": self.trainer,
            "summary": self.summary,
            "rng": RunRNGState(),
        }
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
            self.restored()
            return True
        if fault is not None:
            raise fault
        return False

    def restored(self) -> None:
        """A checkpoint is loaded."""

    def execute(self, resume: bool) -> str:
        """Train to the end or to a stop; returns the status."""
        with self.progress.phase("reading the checkpoint"):
            restored = resume and self.restore()
        failpoint("resume.restored" if restored else "start.built")
        write_event(self.run_dir, "resume" if restored else "start", epoch=self.trainer.epoch)
        if not restored:
            self.summary.begin_again()
        self.observer.open(restored)
        write_run_readme(self.run_dir, self.cfg)
        try:
            self.prelude()
        except StopInEpoch:
            return "stopped"
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
        """Curves; a machine that cannot draw gets a sentence, not a failed run."""
        try:
            with self.progress.phase("drawing the curves"):
                write_curves(self.run_dir)
        except ConfigurationError as error:
            say(f"no curves: {error}")

    def close(self) -> None:
        """Let go of what was opened."""
