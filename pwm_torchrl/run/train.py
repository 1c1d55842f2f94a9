"""Runs a configuration from start to end: claims the directory, builds the run, trains, records the end and closes."""

from __future__ import annotations

import logging
import os
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import Checkpoint
from torchrl.data import Bounded

from pwm_torchrl.algorithm.base import Parts, build_parts, find_algorithm
from pwm_torchrl.algorithm.build import facts_of
from pwm_torchrl.algorithm.updates import LocalExecutor, Updates
from pwm_torchrl.config import Config
from pwm_torchrl.devices import float32_by_default, hardware_name, pick_device, set_precision, set_threads
from pwm_torchrl.distributed.ranks import Ranks, connected_ranks
from pwm_torchrl.distributed.updates import SharedExecutor, check_device, serve, start_replicas
from pwm_torchrl.errors import ConfigurationError, StorageFault
from pwm_torchrl.files import Reserve
from pwm_torchrl.memory.watch import RunMemory
from pwm_torchrl.modules import policy_module
from pwm_torchrl.progress import progress_here
from pwm_torchrl.run.artifacts import write_run_readme
from pwm_torchrl.run.checkpoints import CheckpointFault, CheckpointStore, StateFileAdapter, load_checkpoint
from pwm_torchrl.run.claims import RunClaim, claimed
from pwm_torchrl.run.collector import RunRNGState, seed_everything
from pwm_torchrl.run.debugging import UpdateProfile, failpoint
from pwm_torchrl.run.directory import save_config, write_event
from pwm_torchrl.run.drawing import write_curves
from pwm_torchrl.run.evaluation import PolicyEvaluation
from pwm_torchrl.run.load import load_pretrained, warm_start
from pwm_torchrl.run.loggers import make_loggers
from pwm_torchrl.run.loop import Loop, Recording
from pwm_torchrl.run.memory_plan import RunPlan, decided_compile
from pwm_torchrl.run.metrics import CsvMetrics
from pwm_torchrl.run.publish import log_artifacts
from pwm_torchrl.run.sources import StoredSource, open_source
from pwm_torchrl.run.stop import StopInEpoch, StopRequest, stop_on_interrupt
from pwm_torchrl.run.summary import Closing, RunSummary, named, record_end
from pwm_torchrl.run.validation import HeldOutValidation
from pwm_torchrl.terminal import Progress, say, warn

__all__ = ["Run", "train"]


@float32_by_default()
def train(cfg: Config, run_dir: Path | str, resume: bool = False, stop: StopRequest | None = None) -> dict[str, Any]:
    """Train a configuration to its last epoch, or until a stop is requested.

    SIGINT, SIGTERM and a stop request end the run at its next step, with a checkpoint and the status ``stopped``.
    Environments, worker processes and loggers are closed in any case. If a launcher started several processes, each of
    them calls this function: rank 0 trains as described here, the others compute shares of its updates.

    Args:
        cfg (Config): the whole run.
        run_dir (Path): directory for all output; must exist.
        resume (bool): continue from the newest readable checkpoint, or start again if there is none.
            Defaults to ``False``.
        stop (StopRequest, optional): asks the run to stop at its next step. Defaults to ``None``.

    Returns:
        dict: the content of ``summary.json``; on ranks other than 0, ``rank`` and ``status``.

    Raises:
        ConfigurationError: if the configuration cannot work.
        EnvironmentFault: if an environment fails, after a checkpoint.
        DivergenceError: if a loss is not finite; the last checkpoint stays the newest.
        OutOfMemory: if an update does not fit into memory even with micro-batches of 1, or memory is about to run out,
            after a checkpoint; if memory runs out elsewhere, the last checkpoint stays the newest. Status ``memory``.
        RankFault: if another rank fails or is gone; the last checkpoint stays the newest.
        StorageFault: if the disk is full, over its quota or broken; the last checkpoint stays the newest. Status
            ``storage``.
        Superseded: if another attempt has taken over the run; this one writes nothing more.
    """
    run_dir, stop = Path(run_dir), stop or StopRequest()
    quiet_torchrl()
    try:
        with connected_ranks() as ranks:
            if ranks is not None and not ranks.is_rank_zero:
                stop.reached.set()  # rank 0 handles signals; this process has no deadline for reaching a step
                return {"rank": ranks.rank, "status": serve(ranks)}
            with (
                stop_on_interrupt(stop),
                claimed(run_dir, CheckpointStore(run_dir).names()) as claim,
                progress_here(cfg.training.progress) as progress,
            ):
                failpoint("start.claimed")
                result = _train(cfg, run_dir, claim, progress, resume, stop, ranks)
            if ranks is not None:
                ranks.status = result["status"]
            return result
    except OSError as error:  # from claiming; _train() names all others
        fault = named(error, run_dir)
        if fault is error:
            raise
        raise fault from error


def _train(
    cfg: Config,
    run_dir: Path,
    claim: RunClaim,
    progress: Progress,
    resume: bool,
    stop: StopRequest,
    ranks: Ranks | None,
) -> dict[str, Any]:
    """Train in a claimed directory, and record how the run ended."""
    summary: RunSummary | None = None
    reserve = Reserve(run_dir)
    try:
        with Closing() as closing:
            reserve.take()
            save_config(cfg, run_dir)
            summary = RunSummary.start(cfg, run_dir, resume)
            cfg.check()
            if ranks is not None:
                check_device(cfg.device, ranks)
            run = Run(cfg, run_dir, summary, claim, closing, progress, resume=resume, stop=stop, ranks=ranks)
            with run.memory_plan.compared(lambda: not claim.gone):
                status = run.execute(resume)
            claim.check()
            failpoint("finish.summary")
            result = summary.finish(status)
            made = run.algorithm.updates.made
            claim.outcome = {"status": status, "epoch": summary.epochs_done, "reason": stop.reason, "updates": made}
            write_event(run_dir, status, epoch=summary.epochs_done)
            run.draw(status)
    except BaseException as error:
        fault = named(error, run_dir)
        if claim.gone and isinstance(fault, (OSError, StorageFault)):
            fault = claim.deleted()
        reserve.free()
        record_end(run_dir, claim, summary, fault)
        if fault is error:
            raise
        raise fault from error
    finally:
        reserve.free()
    failpoint("finish.outcome")
    return result


class Run:
    """Builds the parts of a run and connects them.

    Args:
        cfg (Config): the whole run.
        run_dir (Path): its directory.
        summary (RunSummary): its result so far.
        claim (RunClaim): claim of its directory.
        closing (Closing): closes everything that is opened here.
        progress (Progress, optional): shows what the run does. Defaults to ``None``: nothing is shown.

    Keyword Args:
        resume (bool): whether it continues an earlier attempt. Defaults to ``False``.
        stop (StopRequest, optional): asks it to stop at its next step. Defaults to ``None``.
        ranks (Ranks, optional): processes that share its updates. Defaults to ``None``, this one alone.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        summary: RunSummary,
        claim: RunClaim,
        closing: Closing,
        progress: Progress | None = None,
        *,
        resume: bool = False,
        stop: StopRequest | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self.run_dir, self.summary, self.claim, self.closing, self.ranks = run_dir, summary, claim, closing, ranks
        self.progress = progress = progress or Progress()
        self.stop = stop or StopRequest()
        set_threads(cfg.training.threads)
        set_precision(cfg.training.precision)
        self.device = pick_device(cfg.device)
        summary.fixed["hardware"] = hardware_name(self.device, torch.get_num_threads())
        seed_everything(cfg.seed)
        if ranks is not None and find_algorithm(cfg.algorithm.name).simulates:
            raise ConfigurationError(
                f"algorithm={cfg.algorithm.name} steps its environment in one process, but this run has {ranks.size}; "
                "request one GPU (cluster.gpus=1, cluster.nodes=1)"
            )
        opening = "opening the environments" if cfg.mode == "online" else "opening the stored episodes"
        with progress.phase(opening, forks=True):
            self.source = open_source(cfg, run_dir)
        closing.later("environments", self.source.close)
        with progress.phase("planning memory"):
            self.memory_plan = RunPlan(cfg, self.source.info, self.device, run_dir, resume)
        self.cfg = decided_compile(self.memory_plan.plan.applied(cfg), self.device, run_dir, resume)
        with progress.phase("building the networks", forks=True):
            self.evaluation = self._evaluation()
            closing.later("evaluation environments", self.evaluation.close)
            self._assemble()

    def _evaluation(self) -> PolicyEvaluation | HeldOutValidation:
        cfg, between = self.cfg, self.stop.check
        if isinstance(self.source, StoredSource) and cfg.mode == "pretrain":
            return HeldOutValidation(cfg, self.run_dir, self.source, self.summary, between, self.claim.check)
        return PolicyEvaluation(cfg, self.run_dir, self.source.info, self.summary, between, self.progress)

    def _assemble(self) -> None:
        """Build networks, updates, algorithm, checkpoints and loop, and connect them to source and evaluation."""
        cfg, source, t = self.cfg, self.source, self.cfg.training
        parts = build_parts(cfg, source.info, self.device)
        self.networks = networks = parts.networks
        if cfg.mode == "extract":
            load_pretrained(cfg, networks.model)
        policy = None
        if networks.actor is not None:
            spec = Bounded(-1.0, 1.0, (source.info.action_dim,), device=self.device)
            policy = policy_module(networks.model, networks.actor, action_spec=spec)
        source.start(cfg, self.run_dir, networks, policy, self.device, self.progress)
        self.algorithm = find_algorithm(cfg.algorithm.name)(
            cfg.algorithm,
            networks,
            parts.losses,
            parts.optimizers,
            source.samples,
            Updates(self._executor(parts), cfg.memory, self._micro_batch_halved),
            reward_scale=source.reward_scale,
            first_model_updates=source.first_model_updates,
            stored=isinstance(source, StoredSource),
            between=self.stop.check,
            phase=self.progress.phase,
        )
        if t.profile:
            updates = self.algorithm.updates
            profiled = UpdateProfile(updates, t.profile, self.run_dir, lambda: self.algorithm.started, self.device)
            self.closing.later("the profile", profiled.close)
        self.evaluation.start(self.algorithm, policy, self.device)
        checkpoint = Checkpoint().register_adapter(object, StateFileAdapter())
        record = Recording(
            claim=self.claim,
            store=CheckpointStore(self.run_dir, max(1, t.keep_checkpoints), self.claim),
            checkpoint=checkpoint,
            facts=facts_of(self.evaluation.info),
            summary=self.summary,
            csv=CsvMetrics(self.run_dir / "metrics.csv"),
            memory=RunMemory(cfg.memory, self._memory_unwatched),
            progress=self.progress,
        )
        self.loop = Loop(cfg, source, self.algorithm, self.evaluation, record, self.stop)
        statistics = parts.losses.return_statistics
        self.components: dict[str, Any] = {
            # Networks that are not trained are not saved: they can be read from their source again.
            **{name: network for name, network in networks.items() if name in parts.optimizers},
            **{f"optimizer_{name}": each.optimizer for name, each in parts.optimizers.items()},
            **({} if statistics is None else {"return_statistics": statistics}),
            "algorithm": self.algorithm,
            **source.components,
            **self.evaluation.components,
            "loop": self.loop,
            "summary": self.summary,
            "rng": RunRNGState(),
        }
        for name, component in self.components.items():
            checkpoint.register(name, component)

    def _executor(self, parts: Parts) -> LocalExecutor | SharedExecutor:
        if self.ranks is None:
            return LocalExecutor(parts.losses, parts.optimizers)
        start = partial(start_replicas, self.cfg, self.source.info)
        return SharedExecutor(parts.networks, parts.losses, parts.optimizers, self.ranks, before_first_update=start)

    def restore(self) -> bool:
        """Load the newest readable checkpoint; returns False if there are no checkpoints.

        Raises:
            CheckpointFault: if there are checkpoints, but none can be read.
            StorageFault: likewise, if the replay on disk that a checkpoint refers to is missing.
        """
        store = self.loop.record.store
        paths = store.paths()
        fault: CheckpointFault | StorageFault | None = None
        while paths:
            path = paths.pop()
            failpoint("resume.restoring")
            try:
                load_checkpoint(path, self.components)
            except (CheckpointFault, StorageFault) as error:
                fault = error
                if paths:
                    warnings.warn(f"{error} Trying the previous checkpoint.", stacklevel=2)
                continue
            store.abandon_after(path)
            self.source.restored()
            return True
        if fault is not None:
            raise fault
        return False

    def execute(self, resume: bool) -> str:
        """Train to the end or to a stop; returns the status."""
        loop, record = self.loop, self.loop.record
        with self.progress.phase("reading the checkpoint"):
            restored = resume and self.restore()
        failpoint("resume.restored" if restored else "start.built")
        write_event(self.run_dir, "resume" if restored else "start", epoch=loop.epoch)
        if not restored:
            self.summary.begin_again()
            if self.cfg.init_from is not None:
                warm_start(self.cfg, self.networks)
        record.csv.truncate(loop.logged_epoch if restored else 0)
        self.closing.later("metrics.csv", record.csv.close)
        self.summary.resume_exact &= self.source.resumed_exactly
        write_run_readme(self.run_dir, self.cfg, self.networks.model is not None)
        try:
            self.evaluation.prelude()
        except StopInEpoch:
            return "stopped"
        self.summary.write()
        facts = {key: self.summary.fixed[key] for key in ("git_commit", "versions", "hardware")}
        record.loggers = make_loggers(self.cfg, self.run_dir, facts, first_step=loop.env_steps)
        self.closing.later("loggers", self._close_loggers)
        if record.loggers.wandb_url is not None:
            self.summary.wandb_url = record.loggers.wandb_url
            self.summary.write()
            say(f"W&B: {self.summary.wandb_url}")
        try:
            with record.memory.watching():
                loop.run()
        finally:
            self.summary.own_bytes = record.memory.peak_own
        return "finished" if loop.over else "stopped"

    def draw(self, status: str) -> None:
        """Write the curves and, for a finished run, its video or world model; then log the results."""
        try:
            with self.progress.phase("drawing the curves"):
                write_curves(self.run_dir)
        except ConfigurationError as error:  # missing curves must not fail the run
            say(f"no curves: {error}")
        if status == "finished":
            self.evaluation.finish()
        self._publish(status)

    def _publish(self, status: str) -> None:
        """Log the end result and, for a finished run, its video and networks."""
        loggers, summary = self.loop.record.loggers, self.summary.as_dict()
        if not len(loggers):
            return
        told = ("status", "peak_return", "final_return", "validation_loss", "best_validation_loss")
        loggers.summarize({key: summary[key] for key in told if summary.get(key) is not None})
        if status != "finished":
            return
        video = self.run_dir / "video.mp4"
        if video.is_file():
            loggers.log_video_file("video", video, self.loop.log_step)
        if self.cfg.logger.artifacts and loggers.wandb is not None:
            with self.progress.phase("uploading the networks to W&B"):
                log_artifacts(loggers, self.run_dir, summary)

    def _close_loggers(self) -> None:
        failed = self.summary.status not in ("finished", "stopped")
        self.loop.record.loggers.close(failed)

    def _micro_batch_halved(self, update: str, refused: int, size: int, message: str) -> None:
        write_event(self.run_dir, "micro_batch", update=update, refused=refused, size=size, error=message)
        say(f"out of memory: the {update} update is repeated with micro-batches of {size} instead of {refused}")

    def _memory_unwatched(self, reason: str) -> None:
        write_event(self.run_dir, "unwatched", error=reason)
        warn(reason)


def quiet_torchrl() -> None:
    """Keep TorchRL's informational messages out of the progress display, unless RL_LOGGING_LEVEL asks for a level."""
    if "RL_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("torchrl").setLevel(logging.WARNING)
