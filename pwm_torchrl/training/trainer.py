"""The training loop: TorchRL's Trainer, one batch of which is an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tensordict import TensorDictBase
from torchrl.checkpoint import Checkpoint, CheckpointRotation
from torchrl.record.loggers.common import Logger
from torchrl.trainers.trainers import Trainer

from pwm_torchrl.data.files import storage_faults
from pwm_torchrl.training.checkpoint import METRIC, SCHEMA_VERSION, kept_replay_steps
from pwm_torchrl.training.collector import ResumableCollector
from pwm_torchrl.training.graph_check import GraphCheck
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.stepper import PWMStepper

#: Metric of a checkpoint whose policy was not evaluated: it is never the best.
NOT_EVALUATED = -1e30


class PWMTrainer(Trainer):
    """TorchRL's Trainer with PWM's stepper; its hook points, logger and checkpoints work as everywhere.

    Three things differ, each because the base class stands in the way: schedules count epochs instead of frames;
    nothing that hooks log is kept (the base class appends every value to a list for the whole run, and with it whatever
    a value refers to); and checkpoints hold exactly the registered components, since the base class would save the
    networks again inside each loss.

    Args:
        collector (ResumableCollector): its batches are the epochs.
        stepper (PWMStepper): updates of an epoch.
        epochs (int): epochs of the whole run.
        action_repeat (int): environment steps per agent step.
        finish_epoch (callable): called after each epoch's updates with the epoch and its metrics; evaluates and logs.
        checkpoint (Checkpoint): the run's components.
        rotation (CheckpointRotation): where checkpoints go.
        facts (dict): saved in every checkpoint's metadata, for :func:`~pwm_torchrl.load_policy`.
        checkpoint_every (int): epochs between checkpoints; 0 saves at the end only.
        logger (Logger, optional): for hooks that use it. Defaults to ``None``.
    """

    def __init__(
        self,
        *,
        collector: ResumableCollector,
        stepper: PWMStepper,
        epochs: int,
        action_repeat: int,
        finish_epoch: Callable[[int, MetricRow], None],
        checkpoint: Checkpoint,
        rotation: CheckpointRotation,
        facts: dict[str, Any],
        checkpoint_every: int,
        logger: Logger | None = None,
    ) -> None:
        super().__init__(
            collector=collector,
            total_frames=epochs * collector.requested_frames_per_batch * action_repeat,
            frame_skip=action_repeat,
            optim_steps_per_batch=1,
            loss_module=stepper.losses.model,
            optimization_stepper=stepper,
            logger=logger,
            progress_bar=False,
            checkpoint=checkpoint,
            checkpoint_rotation=rotation,
            auto_log_optim_steps=False,
        )
        self.epochs = epochs
        self.facts = facts
        self.epoch = 0
        self.checkpoint_every = checkpoint_every
        self.finish_epoch = finish_epoch
        self.row = MetricRow()
        self.evaluated: float | None = None  # mean evaluation return of the present epoch
        self.best_evaluated = NOT_EVALUATED
        self.saved_epoch: int | None = None  # of the newest checkpoint
        self.replay = stepper.replay
        self.graph_check = GraphCheck() if stepper.cfg.training.check_graphs else None
        self.register_op("post_optim_complete_log", self._take_metrics)

    @property
    def env_steps(self) -> int:
        """Environment steps so far; agent steps times the action repeat."""
        return self.collected_frames

    @property
    def agent_steps(self) -> int:
        """Decisions of the policy so far, all environments together."""
        return self.collected_frames // self.frame_skip

    def _setup_hook(self) -> None:
        """The run begins."""
        super()._setup_hook()
        if self.graph_check is not None:
            self.graph_check.start()

    def _take_metrics(self, optim_steps: int, losses: TensorDictBase) -> None:
        self.row.set(losses)

    def _post_steps_hook(self) -> None:
        """The updates are done, so the epoch counts; hooks see its number."""
        self.epoch += 1
        super()._post_steps_hook()

    def _post_steps_log_hook(self, batch: TensorDictBase) -> None:
        """The last hook of an epoch: what the registered ones return belongs to its row."""
        super()._post_steps_log_hook(batch)
        self.evaluated = None
        row, self.row = self.row, MetricRow()
        self.finish_epoch(self.epoch, row)
        if self.graph_check is not None:
            self.graph_check.compare(f"epoch {self.epoch}")

    def _log(self, log_pbar: bool = False, **kwargs: Any) -> None:
        """Values that hooks return enter the epoch's row; nothing else refers to them."""
        self.row.set({key: value for key, value in kwargs.items() if value is not None})

    def _sync_checkpoint_components(self, checkpoint: Checkpoint | None = None) -> Checkpoint:
        return self.checkpoint if checkpoint is None else checkpoint

    def _checkpoint_manifest_metadata(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "epoch": self.epoch,
            "facts": self.facts,
            "replay_steps": self.replay.steps,
            METRIC: NOT_EVALUATED if self.evaluated is None else self.evaluated,
        }

    def save_trainer(self, force_save: bool = False) -> None:
        """Save a checkpoint if the epoch is due, if its evaluation is the best so far, or now.

        Raises:
            StorageFault: if the disk does not take it; those before it stay.
        """
        due = self.checkpoint_every > 0 and self.epoch % self.checkpoint_every == 0
        best = self.evaluated is not None and self.evaluated > self.best_evaluated
        if best and self.evaluated is not None:
            self.best_evaluated = self.evaluated
        if force_save or due or best:
            with storage_faults(self.checkpoint_rotation.directory, "save a checkpoint in"):
                self.checkpoint_rotation.save(
                    self.checkpoint, step=self.epoch, metadata=self._checkpoint_manifest_metadata()
                )
            self.saved_epoch = self.epoch
            self.replay.release(kept_replay_steps(self.checkpoint_rotation))

    def state_dict(self) -> dict[str, Any]:
        """Counters only; everything else is a checkpoint component of its own."""
        return {
            "epoch": self.epoch,
            "collected_frames": self.collected_frames,
            "best_evaluated": self.best_evaluated,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = int(state_dict["epoch"])
        self.collected_frames = int(state_dict["collected_frames"])
        self.best_evaluated = float(state_dict["best_evaluated"])
        self.saved_epoch = self.epoch
        # The base class counts frames to the end; those of an epoch that memory cut short were collected beside it.
        per_epoch = self.collector.requested_frames_per_batch * self.frame_skip
        self.total_frames = self.collected_frames + (self.epochs - self.epoch) * per_epoch
