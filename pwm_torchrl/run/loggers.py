"""Loggers beside ``metrics.csv``: TorchRL's TensorBoard and Weights & Biases loggers, built from the configuration.

A logging error never ends a run. W&B falls back from online to offline and then to no logging, with a warning each
time. W&B uploads in its own process, so that training does not wait for it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import netrc
import os
import re
import secrets
import socket
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from torchrl.record.loggers.common import Logger
from torchrl.record.loggers.tensorboard import TensorboardLogger
from torchrl.record.loggers.wandb import WandbLogger

from pwm_torchrl.config import Config, LoggerConfig
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.files import write_durably
from pwm_torchrl.run.directory import flattened, settings_of
from pwm_torchrl.terminal import warn

__all__ = [
    "RunLoggers",
    "RunTensorboardLogger",
    "RunWandbLogger",
    "group_name",
    "has_wandb_key",
    "make_loggers",
    "offline_reason",
    "require_logging",
    "wandb_mode",
]

PROJECT = "pwm_torchrl"
WANDB_ID_FILE = "wandb_id.txt"
SYNC = "wandb/offline-run-*"  # what `wandb sync` uploads

CONNECT_TIMEOUT = 3.0  # seconds for checking whether W&B can be reached
INIT_TIMEOUT = 30.0  # seconds for starting a W&B run
FINISH_TIMEOUT = 60.0  # seconds for the last upload
GIF_FRAMES = 120  # frames of an episode in TensorBoard, evenly spaced

_log = logging.getLogger(__name__)


class RunTensorboardLogger(TensorboardLogger):
    """TorchRL's TensorBoard logger, which can also log video files, without moviepy."""

    def log_video_file(self, name: str, file: Path, step: int) -> None:
        """Logs a video as an animated GIF, which TensorBoard shows under Images.

        Args:
            name (str): tag.
            file (Path): an mp4 file.
            step (int): step of the run.

        Raises:
            MissingLibraryError: if imageio-ffmpeg is not installed.
        """
        from tensorboard.compat.proto.summary_pb2 import Summary

        picture, height, width = _gif(file)
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=picture)
        self.experiment._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)
        self.experiment.flush()


class RunWandbLogger(WandbLogger):
    """TorchRL's W&B logger, with video files, artifacts and an exit code.

    Attributes:
        exit_code (int): 0 if the run succeeded; W&B shows runs with any other code as failed.
    """

    exit_code = 0
    _service_shutdown: bool

    def log_video_file(self, name: str, file: Path, step: int) -> None:
        """Uploads an mp4 file as a video of the run."""
        import wandb

        self._log_payload({name: wandb.Video(str(file), format="mp4")}, step=step)

    def log_artifact(self, name: str, kind: str, files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        """Uploads files as a version of an artifact.

        Args:
            name (str): name of the artifact, unique within the W&B project.
            kind (str): W&B's artifact type, such as ``"model"``.
            files (sequence of Path): files for the artifact's top level; must not move until they are uploaded.
            metadata (mapping): plain values shown with the artifact.
        """
        import wandb

        artifact = wandb.Artifact(name, type=kind, metadata=dict(metadata))
        for file in files:
            # Upload from this path, possibly in a later `wandb sync`, instead of from a copy in the home directory.
            artifact.add_file(str(file), name=file.name, policy="immutable", skip_cache=True)
        self.experiment.log_artifact(artifact)

    def shutdown(self, timeout: float | None = None) -> None:
        if not self._service_shutdown:
            self.experiment.finish(exit_code=self.exit_code)
            self._service_shutdown = True


class RunLoggers:
    """The loggers of a run. An exception in a logger becomes a warning, and that logger is not called again.

    Args:
        loggers (sequence of Logger): may be empty.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.loggers = list(loggers)

    def __len__(self) -> int:
        return len(self.loggers)

    @property
    def wandb(self) -> RunWandbLogger | None:
        """The W&B logger, if there is one."""
        return next((each for each in self.loggers if isinstance(each, RunWandbLogger)), None)

    @property
    def wandb_url(self) -> str | None:
        """The run's page at W&B; ``None`` unless it logs online."""
        logger = self.wandb
        return None if logger is None or logger.offline else logger.experiment.url

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at a step."""
        self._call(lambda logger: logger.log_metrics(dict(metrics), step=step))

    def log_video_file(self, name: str, file: Path, step: int) -> None:
        """Logs an mp4 file in the loggers that can show one."""
        self._call(lambda logger: logger.log_video_file(name, file, step), RunTensorboardLogger, RunWandbLogger)

    def log_artifact(self, name: str, kind: str, files: Sequence[Path], metadata: Mapping[str, Any]) -> None:
        """Logs files at W&B, as :meth:`RunWandbLogger.log_artifact`."""
        self._call(lambda logger: logger.log_artifact(name, kind, files, metadata), RunWandbLogger)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Sets values in the run's W&B summary, by which W&B can sort runs."""
        self._call(lambda logger: logger.experiment.summary.update(dict(values)), RunWandbLogger)

    def close(self, failed: bool = False, timeout: float = FINISH_TIMEOUT) -> None:
        """Flushes and closes every logger; waits no longer than ``timeout`` seconds for each and raises nothing.

        Args:
            failed (bool): whether the run failed. Defaults to ``False``.
            timeout (float): seconds. Defaults to a minute.
        """
        for logger in self.loggers:
            if isinstance(logger, RunWandbLogger):
                logger.exit_code = int(failed)
            _close(logger, timeout)
        self.loggers = []

    def _call(self, act: Callable[[Any], object], *kinds: type[Logger]) -> None:
        for logger in list(self.loggers):
            if kinds and not isinstance(logger, kinds):
                continue
            try:
                act(logger)
            except Exception as error:  # noqa: BLE001 - no exception of a logger may end the run
                self.loggers.remove(logger)
                _log.warning("%s stopped logging (%s); metrics.csv is still written", _name(logger), _first_line(error))


def make_loggers(cfg: Config, run_dir: Path, facts: Mapping[str, Any], *, first_step: int = 0) -> RunLoggers:
    """Builds the loggers that ``cfg.logger`` selects.

    Args:
        cfg (Config): the whole configuration, which is logged with the metrics.
        run_dir (Path): the run's directory; local files are written below it.
        facts (mapping): logged with the configuration, such as the git commit.

    Keyword Args:
        first_step (int): the first step that will be logged. A resumed run passes the step after its checkpoint, so
            that TensorBoard hides what an interrupted process logged after it. Defaults to ``0``.

    Returns:
        RunLoggers: empty if there is only ``metrics.csv``: with ``logger=csv``, or if W&B is disabled or cannot start.

    Raises:
        ConfigurationError: if ``logger.kind`` or ``logger.mode`` is unknown.
        MissingLibraryError: if a logger's library is not installed.
    """
    _require_libraries(cfg.logger)
    shown = {**asdict(cfg), **facts}
    made: list[Logger | None] = []
    for kind in active_kinds(cfg.logger):
        if kind == "tensorboard":
            made.append(_tensorboard_logger(Path(run_dir), shown, first_step))
        else:
            made.append(_wandb_logger(cfg, Path(run_dir), shown))
    return RunLoggers([logger for logger in made if logger is not None])


def require_logging(cfg: LoggerConfig) -> None:
    """Checks, before a run begins, that its loggers have their libraries, and W&B its key if it must log online.

    A job on a compute node cannot prompt for a key. Whether the node can reach the server is not checked.

    Raises:
        ConfigurationError: if ``logger.kind`` or ``logger.mode`` is unknown, or no key is found.
        MissingLibraryError: if a logger's library is not installed.
    """
    _require_libraries(cfg)
    if "wandb" in active_kinds(cfg) and wandb_mode(cfg) == "online" and not has_wandb_key():
        key = "logger.mode" if cfg.mode == "online" else "WANDB_MODE"
        raise ConfigurationError(
            f"{key}=online needs a W&B key, and there is none (WANDB_API_KEY or `wandb login`); set one, or use "
            "logger.mode=auto"
        )


def active_kinds(cfg: LoggerConfig) -> list[str]:
    """Kinds of the loggers beside ``metrics.csv``, without duplicates."""
    kinds = dict.fromkeys([cfg.kind, *cfg.also])
    return [kind for kind in kinds if kind != "csv" and not (kind == "wandb" and wandb_mode(cfg) == "disabled")]


def wandb_mode(cfg: LoggerConfig) -> str:
    """``auto``, ``online``, ``offline`` or ``disabled``, from the configuration or else from W&B's variables."""
    if cfg.mode != "auto":
        return cfg.mode
    if os.environ.get("WANDB_DISABLED", "").lower() in ("true", "1", "yes", "on"):
        return "disabled"
    said = os.environ.get("WANDB_MODE", "").lower()
    return {"dryrun": "offline", "run": "online"}.get(
        said, said if said in ("online", "offline", "disabled") else "auto"
    )


def group_name(cfg: Config) -> str:
    """The W&B group of a run; runs that differ only in the seed, such as those of ``seed=0,1,2``, share one.

    Returns:
        str: environment, model and size, then eight hexadecimal digits of a hash of the settings that change what a
        run learns.
    """
    settings = {key: value for key, value in settings_of(cfg).items() if key != "seed"}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()
    env = cfg.env.get("name") or cfg.env.get("_target_", "env")
    return f"{env}_{cfg.model.name}_{cfg.size.name}_{digest[:8]}"


def _require_libraries(cfg: LoggerConfig) -> None:
    cfg.check()
    for kind in active_kinds(cfg):
        if importlib.util.find_spec(kind) is None:
            raise MissingLibraryError(f"logger={kind} needs the {kind} library: pip install 'pwm-torchrl[{kind}]'")


def _close(logger: Logger, timeout: float) -> None:
    def close() -> None:
        try:
            logger.shutdown()
        except Exception as error:  # noqa: BLE001 - an error in closing a logger must not fail a finished run
            _log.warning("closing %s failed: %s", _name(logger), _first_line(error))

    thread = threading.Thread(target=close, name="close-logger", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        _log.warning("%s did not finish within %.0f s; its local files are complete", _name(logger), timeout)


def _name(logger: Logger) -> str:
    names = {RunWandbLogger: "W&B", RunTensorboardLogger: "TensorBoard"}
    return names.get(type(logger), type(logger).__name__)


# TensorBoard ----------------------------------------------------------------------------------------------------------


def _tensorboard_logger(run_dir: Path, shown: dict[str, Any], first_step: int) -> Logger:
    logger = RunTensorboardLogger(exp_name="tensorboard", log_dir=str(run_dir))
    if first_step > 0:
        from torch.utils.tensorboard import SummaryWriter

        logger.experiment.close()
        logger.experiment = SummaryWriter(log_dir=logger.log_dir, purge_step=first_step)
    lines = "\n".join(f"    {key}: {value}" for key, value in flattened(shown).items())
    logger.experiment.add_text("config", lines, global_step=first_step)
    return logger


def _gif(file: Path) -> tuple[bytes, int, int]:
    """A video as an animated GIF of at most :data:`GIF_FRAMES` frames, its height and its width."""
    try:
        from imageio_ffmpeg import count_frames_and_secs, get_ffmpeg_exe
    except ImportError as error:
        raise MissingLibraryError(
            "a video in TensorBoard needs imageio-ffmpeg: pip install 'pwm-torchrl[video]'"
        ) from error
    frames, seconds = count_frames_and_secs(str(file))
    rate = min(frames, GIF_FRAMES) / seconds
    filters = f"fps={rate:.6f},split[a][b];[a]palettegen[p];[b][p]paletteuse"
    command = [get_ffmpeg_exe(), "-v", "error", "-i", str(file), "-vf", filters, "-f", "gif", "-"]
    content = subprocess.run(command, capture_output=True, check=True, timeout=FINISH_TIMEOUT).stdout
    width, height = (int.from_bytes(content[at : at + 2], "little") for at in (6, 8))
    return content, height, width


# Weights & Biases -----------------------------------------------------------------------------------------------------


def _wandb_logger(cfg: Config, run_dir: Path, shown: dict[str, Any]) -> Logger | None:
    mode = wandb_mode(cfg.logger)
    online = mode == "online"
    if mode == "auto":
        reason = offline_reason()
        online = reason is None
        if reason is not None:
            _log.warning("W&B logs offline because %s; upload later with: wandb sync %s", reason, run_dir / SYNC)
    if online:
        try:
            return _start_wandb(cfg, run_dir, shown, "online")
        except Exception as error:  # noqa: BLE001 - W&B raises many kinds; the fallback is announced
            _log.warning(
                "W&B could not start online (%s), so it logs offline; upload later with: wandb sync %s",
                _first_line(error),
                run_dir / SYNC,
            )
            # W&B's service still holds the run's id after a failed start; a new service does not.
            _teardown()
    try:
        return _start_wandb(cfg, run_dir, shown, "offline")
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("W&B could not start (%s); metrics go to metrics.csv only", _first_line(error))
        return None


def _start_wandb(cfg: Config, run_dir: Path, shown: dict[str, Any], mode: str) -> RunWandbLogger:
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "login_timeout": INIT_TIMEOUT,
        "console": "off",  # the job's own log.txt holds the output
        "silent": True,
        "disable_git": True,  # the commit is among the facts: a job runs a copy of the code, without .git
    }
    # Older versions of W&B lack some of these settings and run without them.
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    # `mode` instead of TorchRL's `offline=True`, which sets WANDB_MODE for this process and its children.
    logger = RunWandbLogger(
        exp_name=os.environ.get("WANDB_NAME") or run_dir.name,
        save_dir=run_dir,
        id=_stable_id(run_dir),
        # W&B reads other settings that are null here from its own variables (WANDB_ENTITY, WANDB_TAGS, WANDB_NOTES).
        project=cfg.logger.project or os.environ.get("WANDB_PROJECT") or PROJECT,
        entity=cfg.logger.entity,
        group=cfg.logger.group or os.environ.get("WANDB_RUN_GROUP") or group_name(cfg),
        job_type=cfg.logger.job_type or os.environ.get("WANDB_JOB_TYPE") or cfg.mode,
        **{key: value for key in ("tags", "notes") if (value := getattr(cfg.logger, key))},
        mode=mode,
        config=shown,
        settings=wandb.Settings(**known),
        log_env_packages=False,
    )
    logger.offline = mode == "offline"
    return logger


def _teardown() -> None:
    import wandb

    try:
        wandb.teardown()
    except Exception as error:  # noqa: BLE001 - if it matters, the offline start that follows fails too
        _log.debug("wandb.teardown failed: %s", _first_line(error))


def offline_reason() -> str | None:
    """Why W&B cannot log online, as a clause for a message; ``None`` if it can."""
    import wandb

    base_url = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if not has_wandb_key():
        return "there is no key (WANDB_API_KEY or `wandb login`)"
    proxy = None if proxy_bypass(host) else getproxies().get(parts.scheme)
    door = urlsplit(proxy) if proxy else parts
    try:
        port = door.port or (80 if door.scheme == "http" else 443)
        socket.create_connection((door.hostname or "", port), timeout=CONNECT_TIMEOUT).close()
    except OSError:
        return f"{host} cannot be reached"
    return None


def has_wandb_key() -> bool:
    """Whether W&B would find a key, in ``WANDB_API_KEY`` or where ``wandb login`` puts it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import wandb

    base_url = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    return _netrc_has(urlsplit(base_url).hostname or "")


def _netrc_has(host: str) -> bool:
    candidates = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for name in filter(None, candidates):
        try:
            if netrc.netrc(os.path.expanduser(name)).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _stable_id(run_dir: Path) -> str:
    """The run's W&B id, saved in its directory so that a resumed run continues the same curve.

    In a W&B sweep, the agent sets the id.
    """
    file = run_dir / WANDB_ID_FILE
    if file.is_file():
        stored = file.read_text(encoding="utf-8", errors="replace").strip()
        if re.fullmatch(r"[\w.-]+", stored):
            return stored
        warn(f"{file} is damaged: the run continues as a new W&B run")
    given = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    new = given or secrets.token_hex(4)  # not from the seeded generators: runs with the same seed need different ids
    write_durably(file, new + "\n")
    return new


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
