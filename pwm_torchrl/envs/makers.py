"""Makers of gymnasium, DeepMind Control and Brax environments; each imports its library when it is called."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torchrl.envs import EnvBase

from pwm_torchrl.envs.rendering import import_mujoco_library
from pwm_torchrl.envs.standard import check_maker_arguments, standardize
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, nearest, require_installed
from pwm_torchrl.user_code import load_module

if TYPE_CHECKING:
    import torch

__all__ = [
    "batch_dm_control",
    "check_dm_control_task",
    "make_brax_env",
    "make_dm_control_env",
    "make_gymnasium_env",
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
