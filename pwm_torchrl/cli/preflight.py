"""What a run needs, looked up or opened before anything of it is written: the one place that every command asks.

A run that could never have begun would otherwise leave a directory that ``status`` and ``report`` list for ever.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Sequence

from pwm_torchrl.cli import console
from pwm_torchrl.cli.prepare import LOCAL, SLURM
from pwm_torchrl.cli.requests import Request
from pwm_torchrl.config import Config
from pwm_torchrl.devices import environment_device, pick_device
from pwm_torchrl.envs import EnvInfo
from pwm_torchrl.envs.facts import opened_facts, report_env, require_maker
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault, MissingLibraryError, is_ours
from pwm_torchrl.run.directory import check_run_dir
from pwm_torchrl.run.load import check_warm_start
from pwm_torchrl.run.loggers import require_logging
from pwm_torchrl.run.stored_episodes import (
    check_horizon,
    require_slices,
    require_world_model,
    run_facts,
    scratch_directory,
)
from pwm_torchrl.terminal import coloured

__all__ = ["check_env", "preflight"]


def preflight(configs: Sequence[Config], place: str, *, again: bool = False) -> list[EnvInfo | None]:
    """Check everything that the runs of one command need, of all of them before the first directory is made.

    Checked are the libraries that the settings need, the devices, where runs are written, stored episodes and world
    models, the key of W&B, and the environment, which is made once, read and closed. A run that trains in this process
    or on this machine is checked against this machine. A job of SLURM is checked on the login node, which shares its
    libraries and files but not its GPU: ``cuda`` is checked against the cluster profile, and an environment with a GPU
    of its own, ``env.device=cuda``, is not made; its maker and its library are looked up. It is not made either for a
    job on this machine, whose GPU this process would then hold part of. A profile with lines of ``cluster.setup`` may
    bring libraries that are not found here, so none is missed for it.

    Args:
        configs (sequence of Config): composed runs.
        place (str): where they will train, see :func:`~pwm_torchrl.cli.prepare.place_of`.

    Keyword Args:
        again (bool): whether the runs have their directories and go on. Under SLURM their environments are not made
            then: a job that comes back imports its own copy of their code. Defaults to ``False``.

    Returns:
        list of EnvInfo: facts of what each run learns from; ``None`` where an environment was not made.

    Raises:
        ConfigurationError: for the first thing that is missing, with the key that needs it.
    """
    for config in configs:
        with _may_be_set_up(config, place):
            _check_libraries(config, place)
        _check_devices(config, place)
        if not again:
            check_run_dir(config)
    opened: dict[str, EnvInfo] = {}
    facts: list[EnvInfo | None] = []
    for config in configs:
        found = _check_data(config, place)
        made = None
        if _acts(config) and not (again and place == SLURM):
            with _may_be_set_up(config, place):
                made = _open_environment(config, place, opened)
        facts.append(made if config.mode == "online" else found)
    return facts


def _acts(config: Config) -> bool:
    """Whether there are environments."""
    return config.mode == "online" or (config.mode == "extract" and config.training.eval_episodes > 0)


@contextlib.contextmanager
def _may_be_set_up(config: Config, place: str) -> Iterator[None]:
    """Inside, what is not installed here is no fault of a job whose profile prepares its node."""
    try:
        yield
    except MissingLibraryError:
        if place != SLURM or not config.cluster.setup:
            raise


def _check_libraries(config: Config, place: str) -> None:
    require_logging(config.logger)
    if config.training.video and _acts(config) and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise MissingLibraryError(
            "training.video=true needs imageio-ffmpeg, which is not installed: pip install 'pwm-torchrl[video]', or "
            "set training.video=false"
        )


def _check_devices(config: Config, place: str) -> None:
    if place != SLURM:
        pick_device(config.device)
        environment_device(config)
        return
    for key, device in (("device", config.device), ("env.device", config.env.get("device"))):
        if str(device).startswith("cuda") and config.cluster.gpu is None:
            raise ConfigurationError(
                f"{key}={device} needs a GPU, and cluster={config.cluster.name} has none; set cluster.gpu, or choose "
                "another cluster."
            )


def _check_data(config: Config, place: str) -> EnvInfo | None:
    """What a run begins with, stored episodes and the world model; facts of a run that learns from them."""
    if config.init_from is not None:
        check_warm_start(config)
    if config.mode == "online":
        return None
    facts = run_facts(config)
    require_slices(config)
    if place != SLURM:  # there it waits for its world model, and the node has its own disk
        require_world_model(config)
        if config.data.stage == "scratch":
            scratch_directory(config)
    return facts


def _open_environment(config: Config, place: str, opened: dict[str, EnvInfo]) -> EnvInfo | None:
    """Facts of a run's environment, made once for all runs that share it; ``None`` if it is not made here."""
    if str(config.env.get("device") or "").startswith("cuda") and place in (LOCAL, SLURM):
        require_maker(config.env)
        return None
    sizes = {"training.eval_episodes": max(1, config.training.eval_episodes)}
    if config.mode == "online":
        sizes = {"env.num_envs": int(config.env["num_envs"]), **sizes}
    key = json.dumps([config.env, sizes], sort_keys=True, default=str)
    if key not in opened:
        try:
            with _graphics_as_before():
                opened[key] = opened_facts(config.env, sizes, device=environment_device(config))
        except EnvironmentFault as fault:
            raise ConfigurationError(f"env._target_={config.env['_target_']} cannot be used: {fault}") from fault
    if config.mode == "online":
        check_horizon(config, opened[key])
    return opened[key]


@contextlib.contextmanager
def _graphics_as_before() -> Iterator[None]:
    """Keeps the choice of an OpenGL backend for this machine from the jobs that inherit its variables."""
    before = os.environ.get("MUJOCO_GL")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("MUJOCO_GL", None)


def check_env(request: Request) -> int:
    """``launch/check_env.py``: makes the environment of a run and prints what training would see of it.

    Returns:
        The exit code: 0, or 1 if no run can use it.
    """
    (run,) = request.runs
    try:
        console.say(report_env(run.config.env, run.config.env["num_envs"]))
        console.say(f"{coloured('ok')}: a run can use this environment")
    except Exception as failure:
        if not is_ours(failure) or isinstance(failure, ConfigurationError):
            raise
        console.error(str(failure))
        return console.FAILED
    return console.OK
