"""The training loop: TorchRL's Trainer, one batch of which is an epoch."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import Checkpoint
from torchrl.record.loggers.common import Logger
from torchrl.trainers.trainers import Trainer

from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.data.files import storage_faults
from pwm_torchrl.terminal import Progress
from pwm_torchrl.training.checkpoint import SCHEMA_VERSION, kept_replay_steps
from pwm_torchrl.training.checkpoint_store import METRIC, CheckpointStore
from pwm_torchrl.training.collector import ResumableCollector
from pwm_torchrl.training.failpoints import failpoint
from pwm_torchrl.training.graph_check import GraphCheck
from pwm_torchrl.training.metrics import MetricRow
from pwm_torchrl.training.model_stepper import ModelStepper
from pwm_torchrl.training.stored import StoredEpochs

#: Metric of a checkpoint whose policy was not evaluated: it is never the best.
NOT_EVALUATED = -1e30


class PWMTrainer(Trainer):
    """TorchRL's Trainer with PWM's stepper; its hook points, logger and checkpoints work as everywhere.

    Four things differ, each because the base class stands in the way: schedules count epochs instead of frames;
    nothing that hooks log is kept (the base class appends every value to a list for the whole run, and with it whatever
    a value refers to); checkpoints hold exactly the registered components, since the base class would save the
    networks again inside each loss; and a run may stop inside an epoch, between two updates or in its evaluation, and
    go on from there.

    Args:
        collector (ResumableCollector or StoredEpochs): its batches are the epochs.
        stepper (ModelStepper): updates of an epoch.
        epochs (int): epochs of the whole run.
        action_repeat (int): environment steps per agent step.
        finish_epoch (callable): called after each epoch's updates with the epoch and its metrics; evaluates and logs.
        checkpoint (Checkpoint): the run's components.
        store (CheckpointStore): where checkpoints go.
        facts (dict): saved in every checkpoint's metadata, for :func:`~pwm_torchrl.load_policy`.
        checkpoint_every (int): epochs between checkpoints; 0 saves at the end only.
        checkpoint_minutes (float): minutes after which the end of an epoch saves one in any case; 0 never does.
        logger (Logger, optional): for hooks that use it. Defaults to ``None``.
    """

    def __init__(
        self,
        *,
        collector: ResumableCollector | StoredEpochs,
        stepper: ModelStepper,
        epochs: int,
        action_repeat: int,
        finish_epoch: Callable[[int, MetricRow], None],
        checkpoint: Checkpoint,
        store: CheckpointStore,
        facts: dict[str, Any],
        checkpoint_every: int,
        checkpoint_minutes: float = 0.0,
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
            auto_log_optim_steps=False,
        )
        self.epochs = epochs
        self.facts = facts
        self.epoch = 0
        self.store = store
        self.checkpoint_every = checkpoint_every
        self.checkpoint_minutes = checkpoint_minutes
        self.saved_at = time.monotonic()
        self.batch: TensorDictBase | None = None  # of an epoch whose updates are not done
        self.finishing: MetricRow | None = None  # of an epoch that is neither evaluated nor logged
        self.finish_epoch = finish_epoch
        self.row = MetricRow()
        self.evaluated: float | None = None  # mean evaluation return of the present epoch
        self.best_evaluated = NOT_EVALUATED
        self.saved_epoch: int | None = None  # of the newest checkpoint
        self.replay = stepper.replay if isinstance(stepper.replay, TrajectoryReplay) else None
        self.stop = stepper.stop
        self.progress = Progress()
        self.graph_check = GraphCheck() if stepper.cfg.training.check_graphs else None
        self.register_op("post_optim_complete_log", self._take_metrics)

    @property
    def env_steps(self) -> int:
        """Environment steps so far, agent steps times the action repeat; 0 where nothing is collected."""
        return self.collected_frames if isinstance(self.collector, ResumableCollector) else 0

    @property
    def agent_steps(self) -> int:
        """Decisions of the policy so far, all environments together."""
        return self.env_steps // self.frame_skip

    @property
    def steps_per_epoch(self) -> int:
        """Agent steps of an epoch, 0 where nothing is collected."""
        collects = isinstance(self.collector, ResumableCollector)
        return self.collector.requested_frames_per_batch if collects else 0

    @property
    def log_step(self) -> int:
        """What loggers count: environment steps, or epochs where there are none."""
        return self.env_steps if isinstance(self.collector, ResumableCollector) else self.epoch

    def train(self) -> None:
        """Train to the end or to a stop.

        Raises:
            StopInEpoch: where a stop that was asked for found the run; :meth:`save_inside` keeps that place.
        """
        if (self.batch is None and self.finishing is None) or not self._finish_epoch_begun():
            super().train()
        else:
            self._shutdown_hook()
            self.collector.shutdown()

    def _finish_epoch_begun(self) -> bool:
        """The rest of an epoch that was stopped inside; whether the run is over then."""
        if self.graph_check is not None:
            self.graph_check.start()
        if self.batch is not None:
            batch = self.batch
            self.optim_steps(batch)
            self._post_steps_hook()
            self._post_steps_log_hook(batch)
        else:
            self._close_epoch()
        over = self._stop_training or self.collected_frames >= self.total_frames
        self.save_trainer(force_save=over)
        return over

    def optim_steps(self, batch: TensorDictBase) -> None:
        """The epoch's updates."""
        failpoint("epoch.collected")
        self.batch = batch
        super().optim_steps(batch)
        self.batch = None
        failpoint("epoch.updated")

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
        self.finishing, self.row = self.row, MetricRow()
        self._close_epoch()

    def _close_epoch(self) -> None:
        """Evaluate and log, from the beginning if a stop came between: neither has left anything."""
        assert self.finishing is not None
        self.evaluated = None
        self.finish_epoch(self.epoch, self.finishing)
        self.finishing = None
        if self.stop.reason is not None:
            self.stop.reached.set()
            self.request_stop(self.stop.reason)
        failpoint("epoch.logged")
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
            "replay_steps": 0 if self.replay is None else self.replay.steps,
            METRIC: NOT_EVALUATED if self.evaluated is None else self.evaluated,
        }

    def save_trainer(self, force_save: bool = False) -> None:
        """Save a checkpoint if the epoch is due, if its evaluation is the best so far, or now.

        Raises:
            StorageFault: if the disk does not take it; those before it stay.
        """
        due = self.checkpoint_every > 0 and self.epoch % self.checkpoint_every == 0
        if self.checkpoint_minutes > 0:
            due |= time.monotonic() - self.saved_at >= 60 * self.checkpoint_minutes
        best = self.evaluated is not None and self.evaluated > self.best_evaluated
        if best and self.evaluated is not None:
            self.best_evaluated = self.evaluated
        if force_save or due or best:
            self._save(inside=False)

    @property
    def inside_epoch(self) -> bool:
        """Whether an epoch has begun whose end is not logged, at a place that can be saved."""
        return self.batch is not None or self.finishing is not None

    def save_inside(self) -> None:
        """Save where the run is inside an epoch.

        Raises:
            StorageFault: if the disk does not take it; those before it stay.
        """
        self.evaluated = None
        self._save(inside=True)

    def _save(self, *, inside: bool) -> None:
        with self.progress.phase("saving"), storage_faults(self.store.directory, "save a checkpoint in"):
            self.store.save(self.checkpoint, self.logged_epoch, self._checkpoint_manifest_metadata(), inside=inside)
        self.saved_epoch = None if inside else self.epoch
        self.saved_at = time.monotonic()
        if self.replay is not None:
            self.replay.release(kept_replay_steps(self.store))

    @property
    def logged_epoch(self) -> int:
        """The last epoch whose row is written."""
        return self.epoch if self.finishing is None else self.epoch - 1

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the data of an epoch in progress; everything else is a checkpoint component of its own."""
        batch = self.batch
        return {
            "epoch": self.epoch,
            "collected_frames": self.collected_frames,
            "best_evaluated": self.best_evaluated,
            "batch": None if batch is None else {"shape": list(batch.shape), "leaves": _leaves(batch)},
            "row": self.row.state_dict(),
            "finishing": None if self.finishing is None else self.finishing.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.epoch = int(state_dict["epoch"])
        self.collected_frames = int(state_dict["collected_frames"])
        self.best_evaluated = float(state_dict["best_evaluated"])
        batch, finishing = state_dict["batch"], state_dict["finishing"]
        self.batch = None if batch is None else _from_leaves(batch["leaves"], batch["shape"])
        self.row = MetricRow.restored(state_dict["row"])
        self.finishing = None if finishing is None else MetricRow.restored(finishing)
        self.saved_epoch = None if self.inside_epoch else self.epoch
        # The base class counts frames to the end; those of an epoch that memory cut short were collected beside it.
        per_epoch = self.collector.requested_frames_per_batch * self.frame_skip
        left = self.epochs - self.epoch - (self.batch is not None)
        self.total_frames = self.collected_frames + left * per_epoch


def _leaves(batch: TensorDictBase) -> dict[str, torch.Tensor]:
    leaves = batch.items(include_nested=True, leaves_only=True)
    return {"|".join((key,) if isinstance(key, str) else key): value for key, value in leaves}


def _from_leaves(leaves: dict[str, torch.Tensor], shape: list[int]) -> TensorDict:
    return TensorDict({tuple(name.split("|")): value for name, value in leaves.items()}, batch_size=shape)
