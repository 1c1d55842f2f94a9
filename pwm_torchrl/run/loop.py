"""The training loop of every run: each epoch collects data, updates the networks and finishes.

It is used instead of TorchRL's Trainer because a run must be able to stop between any two updates and to resume there
bit for bit. Its position is saved in checkpoints: the epoch, its phase, the collected batch and the metrics so far. The
modes share this loop and differ in their data source and evaluation (:mod:`~pwm_torchrl.run.sources`,
:mod:`~pwm_torchrl.run.evaluation`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.checkpoint import Checkpoint

from pwm_torchrl.algorithm.base import Algorithm, MetricRow
from pwm_torchrl.config import Config
from pwm_torchrl.data import TrajectoryReplay
from pwm_torchrl.errors import DivergenceError, EnvironmentFault, OutOfMemory, status_of
from pwm_torchrl.files import storage_faults
from pwm_torchrl.memory.watch import RunMemory
from pwm_torchrl.run.checkpoints import METRIC, SCHEMA_VERSION, CheckpointStore, kept_replay_steps
from pwm_torchrl.run.claims import RunClaim
from pwm_torchrl.run.debugging import GraphCheck, failpoint
from pwm_torchrl.run.directory import write_event
from pwm_torchrl.run.evaluation import Evaluation
from pwm_torchrl.run.loggers import RunLoggers
from pwm_torchrl.run.metrics import CsvMetrics
from pwm_torchrl.run.quality import Quality
from pwm_torchrl.run.sources import Source
from pwm_torchrl.run.stop import StopInEpoch, StopRequest
from pwm_torchrl.run.summary import RunSummary, named
from pwm_torchrl.terminal import Progress, warn

#: The phases of an epoch.
COLLECT, UPDATE, FINISH = "collect", "update", "finish"
#: Metric of a checkpoint whose policy was not evaluated, so that it is never the best.
NOT_EVALUATED = -1e30


@dataclass
class Recording:
    """The outputs of a run: checkpoints, metrics, summary, loggers and the terminal.

    Attributes:
        claim (RunClaim): claim of the run's directory; checked before anything is written.
        store (CheckpointStore): checkpoints.
        checkpoint (Checkpoint): the components that are saved.
        facts (dict): saved in every checkpoint's metadata, for :func:`~pwm_torchrl.load_policy`.
        summary (RunSummary): ``summary.json``.
        csv (CsvMetrics): ``metrics.csv``.
        memory (RunMemory): watches the memory of the run's processes.
        loggers (RunLoggers): TensorBoard and W&B, if configured.
        progress (Progress): the terminal.
    """

    claim: RunClaim
    store: CheckpointStore
    checkpoint: Checkpoint
    facts: dict[str, Any]
    summary: RunSummary
    csv: CsvMetrics
    memory: RunMemory
    progress: Progress
    loggers: RunLoggers = field(default_factory=RunLoggers)


class Loop:
    """Trains until the last epoch or a stop.

    Args:
        cfg (Config): the whole run.
        source (Source): collects the data.
        algorithm (Algorithm): updates the networks.
        evaluation (Evaluation): measures them.
        record (Recording): where the run writes.
        stop (StopRequest): asks the run to stop at its next step.

    Attributes:
        epoch (int): number of epochs whose updates are done.
        phase (str): ``collect``, ``update`` or ``finish``, of the epoch in progress.
    """

    def __init__(
        self,
        cfg: Config,
        source: Source,
        algorithm: Algorithm,
        evaluation: Evaluation,
        record: Recording,
        stop: StopRequest,
    ) -> None:
        self.cfg, self.source, self.algorithm, self.evaluation = cfg, source, algorithm, evaluation
        self.record, self.stop = record, stop
        self.quality = Quality(cfg, algorithm, record.store.run_dir)
        self.epochs = cfg.training.epochs
        self.epoch = 0
        self.phase = COLLECT
        self.batch: TensorDictBase | None = None  # collected in an epoch whose updates are not done
        self.row = MetricRow()  # metrics of an epoch that is not logged yet
        self.measured: float | None = None  # result of this epoch's evaluation
        self.best = NOT_EVALUATED
        self.saved_at = time.monotonic()
        self.epoch_started = time.monotonic()
        self.alarm: str | None = None  # set if memory is short: the run then stops after this epoch
        self.graph_check = GraphCheck() if cfg.training.check_graphs else None

    # The loop ---------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the last epoch or until a stop is requested, and save a checkpoint.

        Raises:
            OutOfMemory: if an update does not fit into memory, or memory is about to run out; after a checkpoint.
            EnvironmentFault: if an environment fails; after a checkpoint.
            DivergenceError: if a loss is not finite.
        """
        self.epoch_started = time.monotonic()
        summary, info = self.record.summary, self.source.info
        all_steps = self.env_steps + (self.epochs - self.epoch) * self.source.agent_steps_per_epoch * info.action_repeat
        values = {"return": summary.final_return, "best": summary.peak_return, "validation": summary.validation_loss}
        self.record.progress.begin(self.epochs, self.logged_epoch, self.env_steps, all_steps, drop_none(values))
        if self.graph_check is not None:
            self.graph_check.start()
        try:
            while not self.over:
                if self.phase == COLLECT:
                    self.collect()
                if self.phase == UPDATE:
                    self.update()
                self.finish()
                stopping = self.stop.reason is not None or self.alarm is not None
                self.save_if_due(stopping)
                if stopping:  # read before the save; a request during the save stops the next epoch
                    self.stop.reached.set()
                    break
        except StopInEpoch:
            failpoint("stop.asked")
            self.save(inside=True)
            failpoint("stop.saved")
        except (EnvironmentFault, OutOfMemory) as fault:
            self.save_after(fault)
            raise
        if self.alarm is not None:
            raise OutOfMemory(f"Stopped with a checkpoint after epoch {self.epoch}: {self.alarm}.")

    @property
    def over(self) -> bool:
        """Whether the last epoch is logged."""
        return self.phase == COLLECT and self.epoch >= self.epochs

    def collect(self) -> None:
        """Get the epoch's data."""
        self.evaluation.begin_epoch(self.epoch, self.row)
        batch = self.source.collect(self.row)
        self.record.claim.check()  # before writing to files that a newer attempt may own
        self.source.store(batch)
        if self.evaluates(self.epoch + 1):
            self.quality.measure_model(batch, self.row)
        self.batch = batch
        self.phase = UPDATE
        failpoint("epoch.collected")

    def update(self) -> None:
        """Make the epoch's updates."""
        assert self.batch is not None
        updated = self.algorithm.epoch(self.batch, self.epoch / max(1, self.epochs - 1))
        self.row.set(updated.numbers())
        self.batch = None
        self.epoch += 1
        self.phase = FINISH
        failpoint("epoch.updated")

    def finish(self) -> None:
        """Evaluate if it is due, then log; if a stop interrupts the evaluation, the whole phase is repeated."""
        self.measured = None
        # A copy, so that an interrupted evaluation leaves no metrics in the row.
        row = MetricRow.restored(self.row.state_dict())
        t = self.cfg.training
        due = self.evaluates(self.epoch)
        # A diverged policy is not evaluated: its actions could make the environment fail, which would hide the cause.
        healthy = not_finite(row.numbers()) is None
        if healthy and due:
            with self.record.progress.phase(self.evaluation.measuring):
                self.measured = self.evaluation.measure(self.epoch, row)
        profiled = t.gradient_profile_every and self.epoch % t.gradient_profile_every == 0
        if healthy and profiled and self.algorithm.started:
            self.evaluation.profile(row)
        now = time.monotonic()
        row.set({"time/epoch_s": now - self.epoch_started})
        self.epoch_started = now
        row.set(self.record.memory.metrics())
        self.record.summary.own_bytes = self.record.memory.peak_own
        self.log(row.numbers())
        if healthy and due:  # after logging, so that a repeated measurement does not count twice
            self.quality.judge(self.epoch, row.numbers())
        if due:
            self.record.summary.write()
        self.row = MetricRow()
        self.phase = COLLECT
        alarm = self.record.memory.check(warm=self.algorithm.started)
        if alarm is not None and self.epoch < self.epochs and self.stop.reason is None:
            self.alarm = alarm.message
        failpoint("epoch.logged")
        if self.graph_check is not None:
            self.graph_check.compare(f"epoch {self.epoch}")

    def evaluates(self, epoch: int) -> bool:
        """Whether the networks are evaluated after ``epoch`` epochs."""
        every = self.cfg.training.eval_every
        return (every > 0 and epoch % every == 0) or epoch >= self.epochs

    # Logging ----------------------------------------------------------------------------------------------------------

    def log(self, numbers: dict[str, float]) -> None:
        """Write the epoch's metrics to all outputs.

        Raises:
            DivergenceError: if a loss or gradient norm is not finite.
        """
        record, summary = self.record, self.record.summary
        record.claim.check_there()
        summary.epochs_done = self.epoch
        summary.agent_steps, summary.env_steps = self.agent_steps, self.env_steps
        numbers = {
            "epoch": self.epoch,
            "agent_steps": self.agent_steps,
            "env_steps": self.env_steps,
            "wall_clock_s": round(summary.wall_clock_s, 3),
            **numbers,
        }
        record.csv.write(numbers)
        record.loggers.log_metrics(numbers, step=self.log_step)
        trained = numbers.get("train/return")
        shown = {
            # The return of evaluations, without noise, if there is one; before that, the return of training episodes.
            "return": summary.final_return if summary.final_return is not None else trained,
            "best": summary.peak_return,
            "validation": summary.validation_loss,
            "training return": trained if summary.final_return is not None else None,
            **{f"{name} loss": numbers.get(f"loss/{name}") for name in ("model", "actor", "critic")},
        }
        record.progress.epoch(self.epoch, self.env_steps, drop_none(shown), typical=self.algorithm.started)
        bad = not_finite(numbers)
        if bad is not None:
            raise DivergenceError(
                f"{bad} became {numbers[bad]} in epoch {self.epoch}; the newest checkpoint is from an earlier epoch. "
                "Lower the learning rates (algorithm.*_lr) or normalise rewards (algorithm.normalize_rewards=true)."
            )

    @property
    def agent_steps(self) -> int:
        """Policy decisions so far, summed over environments."""
        return self.source.agent_steps

    @property
    def env_steps(self) -> int:
        """Environment steps so far: agent steps times the action repeat."""
        return self.source.agent_steps * self.source.info.action_repeat

    @property
    def log_step(self) -> int:
        """Step of the loggers: environment steps, or epochs if there is no environment."""
        return self.env_steps if self.source.agent_steps_per_epoch else self.epoch

    # Checkpoints ------------------------------------------------------------------------------------------------------

    def save_if_due(self, stopping: bool) -> None:
        """Save a checkpoint if one is due, the epoch is the last or the best so far, or the run is ``stopping``.

        Raises:
            StorageFault: if it cannot be written; earlier checkpoints are kept.
        """
        t = self.cfg.training
        due = self.over or stopping
        due |= t.checkpoint_every > 0 and self.epoch % t.checkpoint_every == 0
        due |= t.checkpoint_minutes > 0 and time.monotonic() - self.saved_at >= 60 * t.checkpoint_minutes
        if self.measured is not None and self.measured > self.best:
            self.best = self.measured
            due = True
        if due:
            self.save(inside=False)

    def save(self, *, inside: bool) -> None:
        """Save a checkpoint.

        Args:
            inside (bool): whether the run stops inside an epoch; ignored if it is between two epochs.

        Raises:
            StorageFault: if it cannot be written; earlier checkpoints are kept.
        """
        store, samples = self.record.store, self.algorithm.samples
        if inside and self.phase == COLLECT:
            inside = False
        replay = samples if isinstance(samples, TrajectoryReplay) else None
        metadata = {
            "schema_version": SCHEMA_VERSION,
            "epoch": self.epoch,
            "facts": self.record.facts,
            "replay_steps": 0 if replay is None else replay.steps,
            METRIC: NOT_EVALUATED if inside or self.measured is None else self.measured,
        }
        with self.record.progress.phase("saving"), storage_faults(store.directory, "save a checkpoint in"):
            store.save(self.record.checkpoint, self.logged_epoch, metadata, inside=inside)
        self.saved_at = time.monotonic()
        if replay is not None:
            replay.release(kept_replay_steps(store))

    def save_after(self, fault: Exception) -> None:
        """Save a checkpoint, if possible, after an environment failed or memory ran out.

        An update that ran out of memory was undone, and an interrupted evaluation is repeated, so the run can resume
        from there. After a fault in collection, the last complete epoch is saved, without the environments' states.
        """
        if self.phase != COLLECT:
            try:
                self.save(inside=True)
            except Exception as error:
                unsaved = named(error, self.record.store.run_dir)
                if isinstance(fault, EnvironmentFault) or status_of(unsaved) == "failed":
                    raise
                # The fault is reported in any case; without memory or a disk, nothing else can be done.
                write_event(self.record.store.run_dir, "unsaved", epoch=self.epoch, error=str(unsaved))
                warn(f"no checkpoint after epoch {self.epoch}, earlier ones are kept: {unsaved}")
        elif isinstance(fault, EnvironmentFault) and self.epoch > 0:
            self.source.environment_failed()
            self.save(inside=False)

    @property
    def logged_epoch(self) -> int:
        """The last epoch whose metrics are written."""
        return self.epoch - (self.phase == FINISH)

    def state_dict(self) -> dict[str, Any]:
        """The position in the run; all other state belongs to other checkpoint components."""
        batch = self.batch
        return {
            "epoch": self.epoch,
            "phase": self.phase,
            "agent_steps": self.source.agent_steps,
            "best": self.best,
            "batch": None if batch is None else {"shape": list(batch.shape), "leaves": _leaves(batch)},
            "row": self.row.state_dict(),
            "quality": self.quality.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position saved by :meth:`state_dict`."""
        self.epoch, self.phase = int(state_dict["epoch"]), str(state_dict["phase"])
        self.best = float(state_dict["best"])
        if self.source.agent_steps_per_epoch:
            self.source.agent_steps = int(state_dict["agent_steps"])
        batch = state_dict["batch"]
        self.batch = None if batch is None else _from_leaves(batch["leaves"], batch["shape"])
        self.row = MetricRow.restored(state_dict["row"])
        self.quality.load_state_dict(state_dict.get("quality", {}))


def drop_none(values: Mapping[str, float | None]) -> dict[str, float]:
    """The values that are not ``None``."""
    return {name: value for name, value in values.items() if value is not None}


def not_finite(numbers: dict[str, float]) -> str | None:
    """The first loss or gradient norm that is NaN or infinite."""
    watched = (name for name in numbers if name.startswith(("loss/", "grad_norm/")))
    return next((name for name in watched if not math.isfinite(numbers[name])), None)


def _leaves(batch: TensorDictBase) -> dict[str, torch.Tensor]:
    leaves = batch.items(include_nested=True, leaves_only=True)
    return {"|".join((key,) if isinstance(key, str) else key): value for key, value in leaves}


def _from_leaves(leaves: dict[str, torch.Tensor], shape: list[int]) -> TensorDict:
    return TensorDict({tuple(name.split("|")): value for name, value in leaves.items()}, batch_size=shape)
