"""Makers of gymnasium, DeepMind Control, Brax and Meta-World environments, and of the task registry's.

Each imports its library when it is called.
"""

from __future__ import annotations

import importlib
import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torchrl.envs import EnvBase

from pwm_torchrl.envs.factory import as_stated, make_env, probe_env
from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.envs.standard import EnvInfo, check_maker_arguments, env_info, standardize
from pwm_torchrl.envs.tasks.registry import TaskInfo, task_info
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, nearest, require_installed
from pwm_torchrl.user_code import load_module

if TYPE_CHECKING:
    import torch

__all__ = [
    "CUSTOM_TASKS",
    "batch_dm_control",
    "check_dm_control_task",
    "make_brax_env",
    "make_custom_dm_control_env",
    "make_dm_control_env",
    "make_gymnasium_env",
    "make_metaworld_env",
    "make_task_env",
    "probe_task_env",
    "require_brax",
]


def make_gymnasium_env(
    id: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 1,
    episode_length: int | None = None,
    render: bool = False,
    observation_keys: Sequence[str] | None = None,
    **gym_kwargs: Any,
) -> EnvBase:
    """N gymnasium environments as one TorchRL environment of batch size ``[N]``.

    Args:
        id (str): id that ``gymnasium.make`` knows, for example ``"HalfCheetah-v5"``, ``"lab/Crane"`` (its newest
            version), or ``"my_envs:Crane-v0"``, for which the module ``my_envs`` is imported.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``1``.
        episode_length (int, optional): agent steps per episode; ``None`` keeps the environment's own limit. Defaults
            to ``None``.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.
        observation_keys (sequence of str, optional): entries of a ``Dict`` observation to use, in order. Defaults to
            ``None``, all of them.
        **gym_kwargs: passed to ``gymnasium.make``.

    Returns:
        EnvBase: ``observation`` float32 ``[N, O]``, ``action`` float32 ``[N, A]`` in [-1, 1], and under ``next``
        ``reward`` float32 ``[N, 1]`` and bool ``[N, 1]`` ``done``, ``terminated``, ``truncated``.

    Raises:
        ConfigurationError: for an unknown id, discrete actions, image observations, an unbounded action box.
        MissingLibraryError: if gymnasium, or a library that this environment needs, is not installed.
        EnvironmentFault: later, if a sub-environment raises or returns values that are not finite.

    Examples:
        >>> from pwm_torchrl.envs import make_gymnasium_env
        >>> env = make_gymnasium_env("Pendulum-v1", num_envs=2)
        >>> env.rollout(3)["next", "reward"].shape
        torch.Size([2, 3, 1])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    try:
        import gymnasium
    except ModuleNotFoundError as error:
        raise MissingLibraryError(
            f"env.id={id} needs gymnasium, which is not installed: pip install 'pwm-torchrl[gym]'"
        ) from error
    from pwm_torchrl.envs.batch import batch_sub_envs
    from pwm_torchrl.envs.gym import GymnasiumSubEnv

    build = _builder(gymnasium, id, episode_length, render, gym_kwargs)
    keys = None if observation_keys is None else tuple(observation_keys)
    sub_envs = [GymnasiumSubEnv(id, build(), action_repeat, episode_length, i, keys) for i in range(num_envs)]
    first = sub_envs[0]
    return batch_sub_envs(
        sub_envs,
        seed=seed,
        device=device,
        episode_length=episode_length or first.own_episode_length(),
        terminates=first.terminates(),
        state_support=first.state_support(),
        can_save=first.can_save(),
    )


def _builder(
    gymnasium: Any, id: str, episode_length: int | None, render: bool, gym_kwargs: dict[str, Any]
) -> Callable[[], Any]:
    """A function that makes one environment and converts gymnasium's errors to ours."""
    entry = _registered(gymnasium, id)
    if "mujoco" in str(entry.entry_point).lower():
        import_mujoco_library("mujoco", "mujoco", f"env.id={id}")
    kwargs = dict(gym_kwargs)
    kwargs.setdefault("disable_env_checker", True)  # its checks cost more than a step of a small environment
    if render:
        kwargs["render_mode"] = "rgb_array"
    if episode_length is not None:
        limit = kwargs.get("max_episode_steps")
        if limit is not None:
            raise ConfigurationError(
                f"env.max_episode_steps={limit} and env.episode_length={episode_length} both limit an episode; give one"
            )
        kwargs["max_episode_steps"] = -1  # the limit in agent steps replaces the registered one

    def build() -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # the user may choose an older version of an id
                return gymnasium.make(entry.id, **kwargs)
        except gymnasium.error.DependencyNotInstalled as error:
            text = _first_line(error)
            advice = (
                ""
                if "pip install" in text and "mujoco" not in text.lower()
                else (f": pip install 'pwm-torchrl[{'mujoco' if 'mujoco' in text.lower() else 'gym'}]'")
            )
            raise MissingLibraryError(f"env.id={id} needs a library that is not installed ({text}){advice}") from error
        except ModuleNotFoundError as error:
            raise MissingLibraryError(f"env.id={id} needs {error.name}, which is not installed") from error
        except (TypeError, gymnasium.error.Error) as error:
            raise ConfigurationError(
                f"gymnasium cannot make env.id={id!r} with {gym_kwargs}: {_first_line(error)}"
            ) from error

    return build


def _registered(gymnasium: Any, id: str) -> Any:
    """The registry's entry for ``id`` as ``gymnasium.make`` finds it, importing the module of a ``module:id``."""
    module, _, name = str(id).rpartition(":")
    if module:
        load_module("env.id", id, module)
    try:
        if re.search(r"-v\d+$", name) is None and name not in gymnasium.registry:
            namespace, _, bare = name.rpartition("/")
            newest = gymnasium.envs.registration.find_highest_version(namespace or None, bare)
            name = name if newest is None else f"{name}-v{newest}"
        return gymnasium.spec(name)
    except gymnasium.error.Error as error:
        near = nearest(name, gymnasium.registry)
        hint = f"did you mean {near}?" if near else "see gymnasium.pprint_registry()"
        raise ConfigurationError(f"env.id={id!r} is not a gymnasium environment: {hint}") from error


def _first_line(error: BaseException) -> str:
    text = str(np.asarray(error.args)[0]) if error.args else str(error)
    return text.strip().splitlines()[0][:200] if text.strip() else type(error).__name__


def make_dm_control_env(
    domain: str,
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 2,
    episode_length: int | None = None,
    render: bool = False,
    observation_keys: Sequence[str] | None = None,
    task_kwargs: Mapping[str, Any] | None = None,
    environment_kwargs: Mapping[str, Any] | None = None,
) -> EnvBase:
    """N environments of one dm_control task as one TorchRL environment of batch size ``[N]``.

    Args:
        domain (str): domain of the suite, for example ``"cartpole"``.
        task (str): task of the domain, for example ``"swingup"``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``2``.
        episode_length (int, optional): agent steps per episode; ``None`` keeps the task's own limit (for most tasks
            1000 environment steps). Defaults to ``None``.
        render (bool): ignored, because rendering needs no preparation here. Defaults to ``False``.
        observation_keys (sequence of str, optional): entries of the observation to use, in order. Defaults to
            ``None``, all of them.
        task_kwargs (Mapping, optional): further arguments of the task, as for ``suite.load``. Defaults to ``None``.
        environment_kwargs (Mapping, optional): arguments of its environment, likewise. Defaults to ``None``.

    Returns:
        EnvBase: ``observation`` float32 ``[N, O]``, the entries of the task's observation concatenated in its order,
        ``action`` float32 ``[N, A]`` in [-1, 1], and under ``next`` ``reward`` float32 ``[N, 1]`` and bool ``[N, 1]``
        ``done``, ``terminated``, ``truncated``.

    Raises:
        ConfigurationError: for an unknown domain or task.
        MissingLibraryError: if dm_control is not installed.
        EnvironmentFault: later, if a sub-environment raises or returns values that are not finite.

    Examples:
        >>> from pwm_torchrl.envs import make_dm_control_env
        >>> env = make_dm_control_env("cartpole", "swingup", num_envs=2)
        >>> env.rollout(3)["observation"].shape
        torch.Size([2, 3, 5])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    suite = import_mujoco_library("dm_control.suite", "dm-control", f"env.domain={domain}")
    check_dm_control_task(domain, task, suite.TASKS_BY_DOMAIN, "dm_control's suite")

    def load(**ours: Any) -> Any:
        asked = dict(task_kwargs or {})
        if "time_limit" in asked and "time_limit" in ours:
            raise ConfigurationError(
                f"env.task_kwargs.time_limit={asked['time_limit']} and env.episode_length={episode_length} both limit "
                "an episode; give one"
            )
        if "random" in asked:
            raise ConfigurationError("env.task_kwargs.random has no effect: the environments' seeds follow from seed")
        try:
            return suite.load(domain, task, task_kwargs={**asked, **ours}, environment_kwargs=environment_kwargs)
        except TypeError as error:
            raise ConfigurationError(
                f"dm_control cannot load {domain}-{task} with env.task_kwargs={asked} and env.environment_kwargs="
                f"{dict(environment_kwargs or {})}: {_first_line(error)}"
            ) from error

    return batch_dm_control(
        f"{domain}-{task}", load, num_envs, seed, device, action_repeat, episode_length, observation_keys
    )


def batch_dm_control(
    name: str,
    load: Callable[..., Any],
    num_envs: int,
    seed: int,
    device: torch.device | str,
    action_repeat: int,
    episode_length: int | None,
    observation_keys: Sequence[str] | None = None,
) -> EnvBase:
    """Batch N dm_control environments from any source; result as :func:`make_dm_control_env`.

    Args:
        name (str): label for messages.
        load (callable): makes a ``dm_control.rl.control.Environment``; called with ``random``, a seed, and
            ``time_limit``, if a limit in agent steps replaces the task's own in simulated seconds.
        num_envs (int): ``N``.
        seed (int): seed of sub-environment 0.
        device (torch.device or str): device of the tensors.
        action_repeat (int): environment steps per agent step.
        episode_length (int, optional): agent steps per episode.
        observation_keys (sequence of str, optional): entries of the observation to use. Defaults to ``None``, all.
    """
    try:
        from pwm_torchrl.envs.batch import batch_sub_envs
        from pwm_torchrl.envs.dm_control import DMControlSubEnv
    except ModuleNotFoundError as error:
        raise MissingLibraryError(f"{error.name} is not installed: pip install 'pwm-torchrl[dm-control]'") from error

    # A few tasks randomise their model when they are loaded, so they already need the seed here.
    limit: dict[str, Any] = {} if episode_length is None else {"time_limit": float("inf")}
    sub_envs = [
        DMControlSubEnv(name, load(**limit, random=seed + i), action_repeat, episode_length, i, keys=observation_keys)
        for i in range(num_envs)
    ]
    first = sub_envs[0]
    return batch_sub_envs(
        sub_envs,
        seed=seed,
        device=device,
        episode_length=episode_length or first.own_episode_length(),
        terminates=first.terminates(),
        state_support="exact: MuJoCo physics with warm start, clock, task variables, random generator",
        can_save=True,
    )


def check_dm_control_task(domain: str, task: str, tasks_of: Mapping[str, Collection[str]], where: str) -> None:
    """Raise ConfigurationError unless ``tasks_of`` has the domain and the task."""
    if domain not in tasks_of:
        near = nearest(str(domain), tasks_of)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(sorted(tasks_of))}"
        raise ConfigurationError(f"env.domain={domain!r} is not in {where}: {hint}")
    if task not in tasks_of[domain]:
        raise ConfigurationError(
            f"env.task={task!r} is not a task of {domain}: choose {' or '.join(sorted(tasks_of[domain]))}"
        )


def require_brax(id: object) -> None:
    """Raise MissingLibraryError for ``env.id`` unless Brax and JAX are installed."""
    how = "pip install 'pwm-torchrl[brax]', and for a GPU JAX's build for it, jax[cuda12]"
    require_installed(("jax", "brax"), f"env.id={id}", how)


def make_brax_env(
    id: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 1,
    episode_length: int | None = 1000,
    terminates: bool = True,
    **brax_kwargs: Any,
) -> EnvBase:
    """N Brax environments, simulated together on ``device``, as one TorchRL environment of batch size ``[N]``.

    JAX and PyTorch exchange tensors without copying (:class:`torchrl.envs.BraxWrapper`).

    Args:
        id (str): Brax's name of the environment, for example ``"ant"``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): device of the simulation; JAX needs a build for it. Defaults to ``"cpu"``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``1``.
        episode_length (int, optional): agent steps per episode; ``None``: no limit. Defaults to ``1000``.
        terminates (bool): whether episodes can end before that. Brax does not report it; most tasks do. Defaults to
            ``True``.
        **brax_kwargs: arguments of Brax's environment, such as ``backend="positional"``.

    Returns:
        EnvBase: ``observation`` float32 ``[N, O]``, ``action`` float32 ``[N, A]`` in [-1, 1], and under ``next``
        ``reward`` float32 ``[N, 1]`` and bool ``[N, 1]`` ``done``, ``terminated``, ``truncated``.

    Raises:
        ConfigurationError: for an unknown id, or arguments that Brax does not accept.
        MissingLibraryError: if Brax or JAX is not installed.
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    require_brax(id)
    # By default, JAX allocates three quarters of a GPU's memory when it starts; it reads this variable only then.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Brax and its imports recommend better maintained packages
        from brax import envs as brax_envs
        from torchrl.envs import BraxWrapper

        known = BraxWrapper.available_envs
        if id not in known:
            near = nearest(id, known)
            hint = f"did you mean {near}?" if near else f"choose one of {', '.join(sorted(known))}"
            raise ConfigurationError(f"env.id={id!r} is not an environment of Brax: {hint}")
        try:
            made = brax_envs.get_environment(id, **brax_kwargs)
        except (TypeError, ValueError, KeyError, AssertionError) as error:
            raise ConfigurationError(
                f"Brax cannot make env.id={id!r} with {brax_kwargs}: {_first_line(error)}"
            ) from error
        if action_repeat > 1:
            # TorchRL's wrapper ignores its frame_skip, so Brax's repeats actions; its own limit is never reached.
            made = brax_envs.training.EpisodeWrapper(made, episode_length=2**30, action_repeat=action_repeat)
        # By default TorchRL clears JAX's caches, against a leak of differentiated steps, which recompiles all steps.
        env = BraxWrapper(made, batch_size=[num_envs], device=device, cache_clear_frequency=False)
    env.set_seed(seed)
    return standardize(
        env,
        name=f"brax_{id}",
        seed=seed,
        episode_length=episode_length,
        terminates=terminates,
        observation_keys=["observation"],
    )


# Tasks of the registry, Meta-World, and custom tasks of dm_control ----------------------------------------------------


#: Tasks by domain; each is a function ``DOMAIN_TASK`` of :mod:`pwm_torchrl.envs.tasks.custom`.
CUSTOM_TASKS: dict[str, tuple[str, ...]] = {
    "walker": ("walk_backwards", "run_backwards"),
    "cheetah": ("run_backwards", "run_front", "run_back", "jump"),
    "hopper": ("hop_backwards",),
    "reacher": ("three_easy", "three_hard"),
    "ball_in_cup": ("spin",),
    "pendulum": ("spin",),
}


def make_task_env(
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of a registered task: of MT30, MT80, or added by :func:`~pwm_torchrl.envs.tasks.register_task`.

    Args:
        task (str): its name, for example ``"walker-walk"`` or ``"mw-reach"``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
        episode_length (int, optional): agent steps per episode. Defaults to ``None``: the registry's.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: see :func:`~pwm_torchrl.envs.standardize`.

    Raises:
        ConfigurationError: if the task is not registered, or its environment has other dimensions than the registry.
        MissingLibraryError: if its simulator is not installed.

    Examples:
        >>> from pwm_torchrl.envs import make_task_env
        >>> make_task_env("pendulum-swingup", num_envs=2).rollout(3)["observation"].shape
        torch.Size([2, 3, 3])
    """
    info = task_info(task)
    cfg = _task_config(info, episode_length)
    env = make_env(cfg, num_envs=num_envs, seed=seed, device=device, render=render)
    try:
        _check_dimensions(env_info(env), info)
    except ConfigurationError:
        env.close()
        raise
    return env


def probe_task_env(
    env_cfg: Mapping[str, Any], sizes: Mapping[str, int], *, device: torch.device | str = "cpu"
) -> EnvInfo:
    """:func:`~pwm_torchrl.envs.factory.probe_env` of a configuration whose maker is :func:`make_task_env`."""
    info = task_info(str(env_cfg["task"]))
    made = probe_env(_task_config(info, env_cfg.get("episode_length")), sizes, device=device)
    _check_dimensions(made, info)
    return as_stated(replace(made, name=str(env_cfg.get("name") or info.name)), env_cfg)


def _task_config(info: TaskInfo, episode_length: int | None) -> dict[str, Any]:
    """The configuration for :func:`~pwm_torchrl.envs.make_env` to call the task's own maker."""
    return {
        **info.arguments,
        "_target_": info.maker,
        "name": info.name,
        "episode_length": episode_length or info.episode_length,
        "action_repeat": info.action_repeat,
        "terminates": info.terminates,
    }


def _check_dimensions(made: EnvInfo, info: TaskInfo) -> None:
    for what in ("observation_dim", "action_dim"):
        found, known = getattr(made, what), getattr(info, what)
        if found != known:
            raise ConfigurationError(
                f"task {info.name!r} has {what}={known} in the task registry, and its environment has {found}"
            )


def make_custom_dm_control_env(
    domain: str,
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 2,
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of one of the custom tasks that MT30 adds to dm_control's domains.

    Args:
        domain (str): domain of the suite, for example ``"walker"``.
        task (str): custom task of the domain, for example ``"walk_backwards"``.
        num_envs (int): this and all others as for :func:`~pwm_torchrl.envs.make_dm_control_env`. Defaults to ``1``.
        seed (int): Defaults to ``0``.
        device (torch.device or str): Defaults to ``"cpu"``.
        action_repeat (int): Defaults to ``2``.
        episode_length (int, optional): Defaults to ``None``: 1000 environment steps.
        render (bool): Defaults to ``False``.

    Returns:
        EnvBase: as :func:`~pwm_torchrl.envs.make_dm_control_env`.

    Raises:
        ConfigurationError: for an unknown domain or task.
        MissingLibraryError: if dm_control is not installed.

    Examples:
        >>> from pwm_torchrl.envs.tasks import make_custom_dm_control_env
        >>> make_custom_dm_control_env("cheetah", "jump").rollout(3)["observation"].shape
        torch.Size([1, 3, 17])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    check_dm_control_task(domain, task, CUSTOM_TASKS, "the custom tasks")
    import_mujoco_library("dm_control.suite", "dm-control", f"env.domain={domain}")
    load = getattr(importlib.import_module("pwm_torchrl.envs.tasks.custom"), f"{domain}_{task}")
    return batch_dm_control(f"{domain}-{task}", load, num_envs, seed, device, action_repeat, episode_length)


#: Agent steps per episode of Meta-World, whose own limit is 500 environment steps.
_METAWORLD_STEPS = 100
_METAWORLD_VERSION = "-v3"


def make_metaworld_env(
    task: str,
    num_envs: int = 1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    action_repeat: int = 2,
    episode_length: int | None = None,
    render: bool = False,
) -> EnvBase:
    """N environments of one Meta-World task as one TorchRL environment of batch size ``[N]``.

    The goal is part of the observation, objects and goal are randomised in every episode, and one zero action is taken
    after each reset. Observations are passed on unchanged, even outside the bounds that Meta-World declares.

    Args:
        task (str): for example ``"reach"``, Meta-World's ``reach-v3``.
        num_envs (int): ``N``. Defaults to ``1``.
        seed (int): seed of sub-environment 0; sub-environment i gets ``seed + i``. Defaults to ``0``.
        device (torch.device or str): device of the tensors. Defaults to ``"cpu"``.
        action_repeat (int): environment steps per agent step, rewards summed. Defaults to ``2``.
        episode_length (int, optional): agent steps per episode. Defaults to ``None``: 100.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Returns:
        EnvBase: ``observation`` float32 ``[N, 39]``, ``action`` float32 ``[N, 4]`` in [-1, 1], and under ``next``
        ``reward`` float32 ``[N, 1]``, bool ``[N, 1]`` ``done``, ``terminated``, ``truncated`` and ``success``, whether
        the task is solved at this step.

    Raises:
        ConfigurationError: for an unknown task.
        MissingLibraryError: if Meta-World is not installed.
        EnvironmentFault: later, if a sub-environment raises or returns values that are not finite.

    Examples:
        >>> from pwm_torchrl.envs.tasks import make_metaworld_env
        >>> make_metaworld_env("reach", num_envs=2).rollout(3)["next", "success"].shape  # doctest: +SKIP
        torch.Size([2, 3, 1])
    """
    check_maker_arguments(num_envs, action_repeat, episode_length)
    classes = import_mujoco_library("metaworld", "metaworld", f"env.task={task}").ALL_V3_ENVIRONMENTS
    if f"{task}{_METAWORLD_VERSION}" not in classes:
        known = [name.removesuffix(_METAWORLD_VERSION) for name in classes]
        near = nearest(str(task), known)
        hint = f"did you mean {near}?" if near else f"choose one of {', '.join(known)}"
        raise ConfigurationError(f"env.task={task!r} is not a task of Meta-World: {hint}")
    from pwm_torchrl.envs.batch import batch_sub_envs
    from pwm_torchrl.envs.gym import MetaWorldSubEnv

    length = episode_length or _METAWORLD_STEPS
    make = classes[f"{task}{_METAWORLD_VERSION}"]
    return batch_sub_envs(
        [MetaWorldSubEnv(f"mw-{task}", make, action_repeat, length, i, render) for i in range(num_envs)],
        seed=seed,
        device=device,
        episode_length=length,
        terminates=False,
        state_support="exact: MuJoCo physics with warm start, clock, task variables, goal, random generator",
        can_save=True,
    )
