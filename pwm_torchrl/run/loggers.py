"""Loggers beside ``metrics.csv``: TorchRL's TensorBoard and Weights & Biases loggers, made from the configuration.

Logging never ends a run. W&B in particular falls back from online to offline, and from offline to nothing, and says so
in one sentence each time; while a run is under way W&B's own process does the uploading, so that no step waits for it.
"""

from __future__ import annotations

import importlib.util
import logging
import netrc
import os
import secrets
import socket
import threading
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from torchrl.record.loggers.common import Logger
from torchrl.record.loggers.tensorboard import TensorboardLogger
from torchrl.record.loggers.wandb import WandbLogger

from pwm_torchrl.config import LoggerConfig
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError

__all__ = ["RunWandbLogger", "close_logger", "has_wandb_key", "make_logger", "offline_reason", "require_logging"]

KINDS = ("csv", "tensorboard", "wandb")
MODES = ("auto", "online", "offline", "disabled")
WANDB_ID_FILE = "wandb_id.txt"
SYNC = "wandb/offline-run-*"  # what `wandb sync` uploads

CONNECT_TIMEOUT = 3.0  # seconds for finding out whether W&B can be reached
INIT_TIMEOUT = 30.0  # seconds for opening a run there
FINISH_TIMEOUT = 60.0  # seconds for the last upload

_log = logging.getLogger(__name__)


def make_logger(cfg: LoggerConfig, run_dir: Path, run_config: dict[str, Any], *, first_step: int = 0) -> Logger | None:
    """Makes the logger that ``cfg`` asks for.

    Args:
        cfg (LoggerConfig): ``kind`` and the settings of W&B.
        run_dir (Path): the run's directory; everything local goes below it.
        run_config (dict): the run's configuration as plain values, shown beside its metrics.

    Keyword Args:
        first_step (int): the step that will be logged first; a resumed run gives the one after its checkpoint, so that
            TensorBoard hides what an interrupted process logged beyond it. Defaults to ``0``.

    Returns:
        The logger, or ``None`` where ``metrics.csv`` is all: ``kind=csv``, W&B disabled or impossible to start.

    Raises:
        ConfigurationError: if ``logger.kind`` or ``logger.mode`` is unknown.
        MissingLibraryError: if the logger's library is not installed.
    """
    _require_library(cfg)
    if not _logs(cfg):
        return None
    if cfg.kind == "tensorboard":
        return _tensorboard_logger(Path(run_dir), run_config, first_step)
    return _wandb_logger(cfg, Path(run_dir), run_config)


def require_logging(cfg: LoggerConfig) -> None:
    """Look up what the logger needs, before a run begins: its library, and W&B's key where it has to be online.

    A compute node cannot ask for a key. Whether the server can be reached from there is not known before.

    Raises:
        ConfigurationError: if ``logger.kind`` or ``logger.mode`` is unknown, or no key is found.
        MissingLibraryError: if the logger's library is not installed.
    """
    _require_library(cfg)
    if cfg.kind == "wandb" and cfg.mode == "online" and not has_wandb_key():
        raise ConfigurationError(
            "logger.mode=online needs a W&B key, and there is none (WANDB_API_KEY or `wandb login`); set one, or use "
            "logger.mode=auto"
        )


def _require_library(cfg: LoggerConfig) -> None:
    if cfg.kind not in KINDS:
        raise ConfigurationError(f"logger.kind={cfg.kind!r} is unknown; choose {', '.join(KINDS)}")
    if cfg.kind == "wandb" and cfg.mode not in MODES:
        raise ConfigurationError(f"logger.mode={cfg.mode!r} is unknown; choose {', '.join(MODES)}")
    if _logs(cfg) and importlib.util.find_spec(cfg.kind) is None:
        raise MissingLibraryError(
            f"logger={cfg.kind} needs the {cfg.kind} library: pip install 'pwm-torchrl[{cfg.kind}]'"
        )


def _logs(cfg: LoggerConfig) -> bool:
    """Whether there is anything beside ``metrics.csv``."""
    return cfg.kind != "csv" and not (cfg.kind == "wandb" and cfg.mode == "disabled")


def close_logger(logger: Logger | None, timeout: float = FINISH_TIMEOUT) -> None:
    """Flushes and closes a logger without waiting longer than ``timeout`` seconds and without raising."""
    if logger is None:
        return

    def close() -> None:
        try:
            logger.shutdown()
        except Exception as error:  # noqa: BLE001 - a logger's last words must not fail a finished run
            _log.warning("closing %s failed: %s", type(logger).__name__, _first_line(error))

    thread = threading.Thread(target=close, name="close-logger", daemon=True)
    thread.start()
    thread.join(timeout)
    if thread.is_alive():
        _log.warning("%s did not finish within %.0f s; its local files are complete", type(logger).__name__, timeout)


class RunWandbLogger(WandbLogger):
    """TorchRL's W&B logger that stops logging, with one sentence, instead of ending a run."""

    _broken = False

    def _log_payload(self, payload: dict[str, Any], **kwargs: Any) -> None:
        if self._broken:
            return
        try:
            super()._log_payload(payload, **kwargs)
        except Exception as error:  # noqa: BLE001 - whatever W&B raises, the run goes on
            self._broken = True
            _log.warning("W&B stopped logging (%s); metrics.csv goes on", _first_line(error))


def _tensorboard_logger(run_dir: Path, run_config: dict[str, Any], first_step: int) -> Logger:
    logger = TensorboardLogger(exp_name="tensorboard", log_dir=str(run_dir))
    if first_step > 0:
        from torch.utils.tensorboard import SummaryWriter

        logger.experiment.close()
        logger.experiment = SummaryWriter(log_dir=logger.log_dir, purge_step=first_step)
    lines = "\n".join(f"    {key}: {value}" for key, value in _flat(run_config).items())
    logger.experiment.add_text("config", lines, global_step=first_step)
    return logger


def _wandb_logger(cfg: LoggerConfig, run_dir: Path, run_config: dict[str, Any]) -> Logger | None:
    online = cfg.mode == "online"
    if cfg.mode == "auto":
        reason = offline_reason()
        online = reason is None
        if reason is not None:
            _log.warning("W&B logs offline because %s; upload later with: wandb sync %s", reason, run_dir / SYNC)
    if online:
        try:
            return _start_wandb(cfg, run_dir, run_config, "online")
        except Exception as error:  # noqa: BLE001 - W&B raises many kinds; the fallback is announced
            _log.warning(
                "W&B could not start online (%s), so it logs offline; upload later with: wandb sync %s",
                _first_line(error),
                run_dir / SYNC,
            )
            # W&B's service still holds the run's id after a failed start; a new service does not.
            _teardown()
    try:
        return _start_wandb(cfg, run_dir, run_config, "offline")
    except Exception as error:  # noqa: BLE001 - see above
        _log.warning("W&B could not start (%s); metrics go to metrics.csv only", _first_line(error))
        return None


def _start_wandb(cfg: LoggerConfig, run_dir: Path, run_config: dict[str, Any], mode: str) -> RunWandbLogger:
    import wandb

    wanted: dict[str, Any] = {
        "init_timeout": INIT_TIMEOUT,
        "finish_timeout": FINISH_TIMEOUT,
        "login_timeout": INIT_TIMEOUT,
        "console": "off",  # the job's own log.txt holds the output
        "silent": True,
        "disable_git": True,
    }
    # An older W&B lacks some of them; the run does without.
    known = {name: value for name, value in wanted.items() if name in wandb.Settings.model_fields}
    # `mode` instead of TorchRL's `offline=True`, which sets WANDB_MODE for this process and all that it starts.
    logger = RunWandbLogger(
        exp_name=run_dir.name,
        save_dir=run_dir,
        id=_stable_id(run_dir),
        project=cfg.project,
        entity=cfg.entity,
        group=cfg.group,
        mode=mode,
        config=run_config,
        settings=wandb.Settings(**known),
        log_env_packages=False,
    )
    logger.offline = mode == "offline"
    return logger


def _teardown() -> None:
    import wandb

    try:
        wandb.teardown()
    except Exception as error:  # noqa: BLE001 - the offline start that follows tells whether it mattered
        _log.debug("wandb.teardown failed: %s", _first_line(error))


def offline_reason() -> str | None:
    """Why W&B cannot be online: the end of a sentence, or ``None`` if it can."""
    import wandb

    base_url = os.environ.get("WANDB_BASE_URL") or wandb.Settings().base_url
    parts = urlsplit(base_url)
    host = parts.hostname or ""
    if os.environ.get("WANDB_MODE") in {"offline", "dryrun"}:
        return "WANDB_MODE says so"
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
    """The run's W&B id, kept in its directory so that a resumed run continues the same curve."""
    file = run_dir / WANDB_ID_FILE
    if file.is_file():
        stored = file.read_text(encoding="utf-8").strip()
        if stored:
            return stored
    new = secrets.token_hex(4)  # not from the seeded generators: two runs of one seed are two runs
    file.write_text(new + "\n", encoding="utf-8")
    return new


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            leaves.update(_flat(value, f"{prefix}{key}."))
        else:
            leaves[prefix + str(key)] = value
    return leaves


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
