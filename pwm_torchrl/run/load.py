"""Loads trained networks, policies, world models and the environment from a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.envs import EnvBase, ExplorationType
from torchrl.modules import ProbabilisticActor, TanhNormal
from torchrl.modules import WorldModel as TorchRLWorldModel

from pwm_torchrl.algorithm.base import find_algorithm, updates_of
from pwm_torchrl.algorithm.build import Facts, Networks
from pwm_torchrl.config import Config
from pwm_torchrl.devices import float32_by_default
from pwm_torchrl.envs import env_info, make_env
from pwm_torchrl.envs.factory import opened_env
from pwm_torchrl.envs.standard import PolicySpecs, in_own_units, policy_specs
from pwm_torchrl.envs.tasks import task_info
from pwm_torchrl.errors import ConfigurationError, MissingLibraryError
from pwm_torchrl.modules import Actor, TaskWorldModel, WorldModel, encoder_module, read_world_model
from pwm_torchrl.run.artifacts import write_video
from pwm_torchrl.run.checkpoints import CheckpointFault, CheckpointStore, checkpoint_metadata, load_checkpoint
from pwm_torchrl.run.collector import fresh_env_seed
from pwm_torchrl.run.directory import load_config
from pwm_torchrl.run.evaluation import film, frames_per_second, play
from pwm_torchrl.run.export import fetched, is_export, read_export
from pwm_torchrl.run.stored_episodes import follow_world_model


def load_networks(
    run: str | Path,
    which: str | int = "best",
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Config, Networks]:
    """Configuration and trained networks of a run, in evaluation mode and without gradients.

    Args:
        run (str or Path): run directory, finished or not; a folder of
            :func:`~pwm_torchrl.run.publish.export_run`, which has one set of networks and ignores ``which``; or
            ``hf://ORG/NAME``, such a folder on the Hugging Face hub.
        which (str or int): checkpoint: ``"best"`` by evaluation return, ``"last"`` (or ``"latest"``), or the number of
            an epoch that has one. Defaults to ``"best"``.
        device (str or torch.device): device of the networks. Defaults to ``"cpu"``.

    Keyword Args:
        revision (str, optional): branch, tag or commit on the hub. Defaults to ``None``: the newest.
        trust_remote_code (bool): whether a configuration from the hub may name code of other packages that are
            installed here, such as its author's own environment. Defaults to ``False``.

    Raises:
        ConfigurationError: if ``run`` is not a run directory or has no such checkpoint, or a configuration from the hub
            names code of other packages.
        CheckpointFault: if the checkpoint cannot be read.
        MissingLibraryError: if ``run`` is on the hub and huggingface_hub is not installed.
    """
    return load_checkpointed(fetched(run, revision, trust_remote_code), which, device)[:2]


@float32_by_default()
def load_checkpointed(
    run: str | Path, which: str | int, device: str | torch.device = "cpu"
) -> tuple[Config, Networks, Facts, int]:
    """Like :func:`load_networks` for a local folder, with the facts and the epoch of its checkpoint."""
    run = Path(run)
    if is_export(run):
        cfg, networks, facts, epoch = read_export(run)
        for _, network in networks.items():
            network.requires_grad_(False).eval().to(device)
        return cfg, networks, facts, epoch
    cfg = load_config(run)
    path = CheckpointStore(run).pick(which)
    metadata = checkpoint_metadata(path)
    if "facts" not in metadata:
        raise CheckpointFault(f"The checkpoint {path} does not name its environment.")
    if cfg.mode == "pretrain":
        raise ConfigurationError(
            f"{run} pre-trained a world model and has no policy; extract one with experiment=extract "
            f"world_model={run}, or read only the model: pwm_torchrl.modules.read_world_model({str(run)!r})"
        )
    facts = Facts.restored(metadata["facts"])
    if cfg.mode == "extract":
        follow_world_model(cfg, run)
    networks = find_algorithm(cfg.algorithm.name).build_networks(cfg, facts)
    if cfg.mode == "extract":
        load_pretrained(cfg, networks.model)
    trained = updates_of(cfg)
    load_checkpoint(path, {name: network for name, network in networks.items() if name in trained})
    for _, network in networks.items():
        network.requires_grad_(False).eval().to(device)
    return cfg, networks, facts, int(metadata["epoch"])


def load_pretrained(cfg: Config, world_model: WorldModel) -> None:
    """Load the weights of ``cfg.world_model`` into a single-task view of that model.

    Raises:
        ConfigurationError: if the weights are missing or damaged, or not those that the run began with.
    """
    assert isinstance(world_model, TaskWorldModel)
    pretrained, _ = read_world_model(str(cfg.world_model), cfg.world_model_sha256)
    world_model.load_multi_task(pretrained)


def check_warm_start(cfg: Config) -> tuple[Config, Path]:
    """The run that ``cfg.init_from`` names, and its best checkpoint.

    Raises:
        ConfigurationError: if it is not a run, has no checkpoint, or one of the two runs does not train one of
            ``cfg.init_from_parts``.
        CheckpointFault: if the checkpoint cannot be read.
    """
    source = Path(str(cfg.init_from))
    try:
        theirs, path = load_config(source), CheckpointStore(source).pick("best")
    except ConfigurationError as error:
        raise ConfigurationError(f"init_from={source}: {error}") from error
    for which, config in (("this run", cfg), (str(source), theirs)):
        lacking = [part for part in cfg.init_from_parts if part not in updates_of(config)]
        if lacking:
            raise ConfigurationError(
                f"init_from_parts={cfg.init_from_parts}: {which} (mode={config.mode}) does not train "
                f"{', '.join(lacking)}; leave that out"
            )
    checkpoint_metadata(path)
    return theirs, path


def warm_start(cfg: Config, networks: Networks) -> None:
    """Load the weights of the run ``cfg.init_from`` into newly built networks.

    Raises:
        ConfigurationError: as :func:`check_warm_start`, and if the dimensions of a part differ.
        CheckpointFault: if the checkpoint cannot be read.
    """
    theirs, path = check_warm_start(cfg)
    metadata = checkpoint_metadata(path)
    if "facts" not in metadata:
        raise CheckpointFault(f"The checkpoint {path} does not name its environment.")
    if theirs.mode == "extract":
        follow_world_model(theirs, Path(str(cfg.init_from)))
    built = find_algorithm(theirs.algorithm.name).build_networks(theirs, Facts.restored(metadata["facts"]))
    source = dict(built.items())
    load_checkpoint(path, {part: source[part] for part in cfg.init_from_parts})
    target = dict(networks.items())
    for part in cfg.init_from_parts:
        wanted, found = target[part].state_dict(), source[part].state_dict()
        differing = [n for n in {**wanted, **found} if _shape(wanted.get(n)) != _shape(found.get(n))]
        if differing:
            shown = ", ".join(f"{n} {_shape(wanted.get(n))} here, {_shape(found.get(n))} there" for n in differing[:3])
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise ConfigurationError(
                f"init_from={cfg.init_from}: its {part} has other dimensions ({shown}{more}); choose the same model "
                f"and size and an environment with the same dimensions, or leave {part} out of init_from_parts"
            )
        target[part].load_state_dict(found)


def _shape(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


@float32_by_default()
def load_policy(
    run: str | Path,
    which: str | int = "best",
    device: str | torch.device | None = None,
    *,
    env: EnvBase | None = None,
    deterministic: bool = True,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TensorDictSequential:
    """The trained policy as a TorchRL module, ``observation`` -> ``action``, with actions in the environment's units.

    The units are those of the environment itself: torques from -2 to 2 for ``Pendulum-v1``, as in a plain
    :class:`~torchrl.envs.GymEnv` and in :func:`load_env`. Training scales them to [-1, 1]; an environment that
    :func:`~pwm_torchrl.envs.make_env` made expects that range, so give it as ``env``.

    The policy is **deterministic** for every exploration type of TorchRL, unless ``deterministic=False``.

    Args:
        run (str or Path): run directory, finished or not, or anything else that :func:`load_networks` accepts:
            ``"hf://ORG/NAME"`` loads from the Hugging Face hub.
        which (str or int): checkpoint: ``"best"`` by evaluation return, ``"last"``, or the number of an epoch. Defaults
            to ``"best"``.
        device (str or torch.device, optional): device of the policy. Defaults to ``None``: the device of ``env``, or
            the CPU.

    Keyword Args:
        env (EnvBase, optional): environment to act in. The policy then uses its keys and scales actions to its range.
            Defaults to ``None``: the keys of :class:`~torchrl.envs.GymEnv` and the action range of the environment
            that the run was trained in.
        deterministic (bool): act without noise. With ``False`` the policy is a
            :class:`~torchrl.modules.ProbabilisticActor` that samples, and follows
            :class:`~torchrl.envs.set_exploration_type`. Defaults to ``True``.
        revision (str, optional): branch, tag or commit on the hub. Defaults to ``None``: the newest.
        trust_remote_code (bool): as for :func:`load_networks`. Defaults to ``False``.

    Returns:
        TensorDictSequential: for TensorDicts of any batch size; called with a tensor, it returns the action.

    Raises:
        ConfigurationError: if ``run`` is not a run directory or has no checkpoint, or its policy cannot act in ``env``.
        CheckpointFault: if the checkpoint cannot be read.
        MissingLibraryError: if the checkpoint is too old to contain the action range, and the run's environment cannot
            be created to read it; with ``env``, none is created.

    Examples:
        >>> from pwm_torchrl import load_policy
        >>> from torchrl.envs import GymEnv
        >>> policy = load_policy("runs/my_run")  # doctest: +SKIP
        >>> GymEnv("Pendulum-v1").rollout(200, policy)["next", "reward"].sum()  # doctest: +SKIP
        >>> policy = load_policy("hf://my-org/pendulum-pwm", revision="v1")  # doctest: +SKIP
    """
    run = fetched(run, revision, trust_remote_code)
    if device is None:
        device = "cpu" if env is None or env.device is None else env.device
    cfg, networks, facts, _ = load_checkpointed(run, which, device)
    specs = PolicySpecs.standard(*_own_range(run, cfg, facts)) if env is None else _specs(env, cfg, facts)
    return _policy(networks, specs, deterministic).to(device)


@float32_by_default()
def load_env(
    run: str | Path,
    num_envs: int = 1,
    seed: int | None = None,
    device: str | torch.device = "cpu",
    render: bool = False,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> EnvBase:
    """The environment that a run was trained in, with actions in its own units, as :func:`load_policy` returns them.

    Args:
        run (str or Path): run directory, or anything else that :func:`load_networks` accepts.
        num_envs (int): number of environments ``N``. Defaults to ``1``.
        seed (int, optional): seed of the first environment; environment i has ``seed + i``. Defaults to ``None``: the
            seed of ``launch/evaluate.py``, which training never uses.
        device (str or torch.device): device of the tensors. Defaults to ``"cpu"``.
        render (bool): prepare for :func:`~pwm_torchrl.envs.render_frame`. Defaults to ``False``.

    Keyword Args:
        revision (str, optional): branch, tag or commit on the hub. Defaults to ``None``: the newest.
        trust_remote_code (bool): as for :func:`load_networks`. Defaults to ``False``.

    Returns:
        EnvBase: with batch size ``[N]``; ``observation`` is one float32 vector ``[N, O]``.

    Raises:
        ConfigurationError: if ``run`` is not a run directory, or is a pre-training, which has no environment.
        MissingLibraryError: if the environment's library is not installed.

    Examples:
        >>> from pwm_torchrl import load_env, load_policy
        >>> env = load_env("runs/my_run", num_envs=10)  # doctest: +SKIP
        >>> env.rollout(200, load_policy("runs/my_run"))["next", "reward"].sum(1).mean()  # doctest: +SKIP
    """
    cfg = load_config(fetched(run, revision, trust_remote_code))
    if cfg.mode == "pretrain":
        raise ConfigurationError(f"{run} pre-trained a world model on stored episodes and has no environment.")
    seed = fresh_env_seed(cfg.seed) if seed is None else seed
    return in_own_units(make_env(cfg.env, num_envs=num_envs, seed=seed, device=device, render=render))


def _specs(env: EnvBase, cfg: Config, facts: Facts) -> PolicySpecs:
    return policy_specs(env, facts.observation_dim, facts.action_dim, cfg.env.get("observation_keys"))


def _own_range(run: str | Path, cfg: Config, facts: Facts) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Smallest and largest action of the run's environment, which is created if the checkpoint does not have them."""
    if facts.action_low:
        return facts.action_low, facts.action_high
    try:
        with opened_env(cfg.env, num_envs=1, seed=0) as env:
            _specs(env, cfg, facts)  # raises if the environment has changed, since its range would be wrong
            info = env_info(env)
    except MissingLibraryError as error:
        raise MissingLibraryError(
            f"The checkpoint of {run} has no action range, so its environment must be created, or given as "
            f"load_policy(run, env=...): {error}"
        ) from error
    return info.action_low, info.action_high


class _Observe(nn.Module):
    """Concatenates an environment's entries into the policy's observation, one float32 vector."""

    def __init__(self, feature_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.feature_dims = feature_dims

    def forward(self, *entries: Tensor) -> Tensor:
        vectors = [
            entry.flatten(-dims) if dims else entry.unsqueeze(-1)
            for entry, dims in zip(entries, self.feature_dims, strict=True)
        ]
        return torch.cat([vector.to(torch.float32) for vector in vectors], -1)


class _Act(nn.Module):
    """The actor's deterministic action, scaled to a range."""

    def __init__(self, actor: Actor, specs: PolicySpecs) -> None:
        super().__init__()
        self.actor = actor
        self.register_buffer("middle", (specs.high + specs.low) / 2)
        self.register_buffer("half_range", (specs.high - specs.low) / 2)

    def forward(self, latent: Tensor) -> Tensor:
        return self.middle + self.half_range * self.actor.act(latent)


class _Cast(nn.Module):
    """Casts an action to the environment's dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, action: Tensor) -> Tensor:
        return action.to(self.dtype)


def _policy(networks: Networks, specs: PolicySpecs, deterministic: bool) -> TensorDictSequential:
    """Builds a policy for an environment from networks; it writes only the action into the TensorDict."""
    key, observed = specs.action_key, ("_pwm", "observation")
    modules: list[TensorDictModuleBase] = [
        TensorDictModule(_Observe(specs.feature_dims), list(specs.observation_keys), [observed]),
        encoder_module(networks.model, observation=observed, latent=("_pwm", "latent")),
    ]
    if deterministic:
        modules.append(TensorDictModule(_Act(networks.actor, specs), [("_pwm", "latent")], [key]))
    else:
        modules.append(
            ProbabilisticActor(
                TensorDictModule(networks.actor, [("_pwm", "latent")], [("_pwm", "loc"), ("_pwm", "scale")]),
                in_keys={"loc": ("_pwm", "loc"), "scale": ("_pwm", "scale")},
                out_keys=[key],
                distribution_class=TanhNormal,
                distribution_kwargs={"low": specs.low, "high": specs.high},
                default_interaction_type=ExplorationType.RANDOM,
            )
        )
    modules.append(TensorDictModule(_Cast(specs.action_dtype), [key], [key]))
    return TensorDictSequential(*modules, selected_out_keys=[key])


class _Part(nn.Module):
    """Base of the modules that each wrap one part of a world model."""

    def __init__(self, world_model: WorldModel) -> None:
        super().__init__()
        self.world_model = world_model


class _Dynamics(_Part):
    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.world_model.dynamics.imagine(latent, action)


class _Reward(_Part):
    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.world_model.reward.decode(self.world_model.reward(latent, action))


class _Termination(_Part):
    def forward(self, next_latent: Tensor) -> Tensor:
        head = self.world_model.termination
        assert head is not None
        return head.terminated(head(next_latent))


@float32_by_default()
def load_world_model(
    run: str | Path,
    which: str | int = "best",
    device: str | torch.device = "cpu",
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> TorchRLWorldModel:
    """The trained world model as a :class:`torchrl.modules.WorldModel`.

    Keys: ``observation`` -> ``latent``; ``latent``, ``action`` -> ``("next", "latent")``, ``("next", "reward")`` and,
    with a termination head, ``("next", "done")``. Arguments and errors as :func:`load_networks`.
    """
    cfg, networks = load_networks(run, which, device, revision=revision, trust_remote_code=trust_remote_code)
    model = networks.model
    if model is None:
        raise ConfigurationError(f"{run} was trained by algorithm={cfg.algorithm.name}, which has no world model.")
    step = ["latent", "action"]
    done: TensorDictModuleBase | None = None
    if model.termination is not None:
        done = TensorDictModule(_Termination(model), in_keys=[("next", "latent")], out_keys=[("next", "done")])
    return TorchRLWorldModel(
        encoder_module(model),
        TensorDictModule(_Dynamics(model), in_keys=step, out_keys=[("next", "latent")]),
        TensorDictModule(_Reward(model), in_keys=step, out_keys=[("next", "reward")]),
        done_head=done,
    )


@float32_by_default()
def evaluate_run(
    run_dir: str | Path, episodes: int = 10, seed: int | None = None, which: str | int = "best"
) -> dict[str, Any]:
    """Evaluate a run's policy with deterministic actions in new environments.

    Args:
        run_dir (str or Path): run directory.
        episodes (int): number of episodes, played in parallel. Defaults to ``10``.
        seed (int, optional): seed of the first environment. Defaults to one derived from the run's seed that was used
            neither for training nor to select the best checkpoint.
        which (str or int): checkpoint: ``"best"``, ``"last"`` or the number of an epoch. Defaults to ``"best"``.

    Returns:
        dict: ``return_mean``, ``return_std``, ``episodes``, ``returns``, ``seed`` and the checkpoint's ``epoch``;
        ``success_rate`` if the environment reports success; ``score``, from 0 to 1 on the task's scale, if the run was
        trained on a task of the registry.
    """
    cfg, networks, facts, epoch = load_checkpointed(run_dir, which)
    seed = fresh_env_seed(cfg.seed) if seed is None else seed
    with opened_env(cfg.env, num_envs=episodes, seed=seed) as env:
        policy = _policy(networks, _specs(env, cfg, facts), deterministic=True)
        played = play(env, policy, seed)
    returns = played.returns
    result: dict[str, Any] = {
        "return_mean": returns.mean().item(),
        "return_std": returns.std(unbiased=False).item(),
        "episodes": len(returns),
        "returns": returns.tolist(),
        "seed": seed,
        "epoch": epoch,
    }
    if played.success is not None:
        result["success_rate"] = played.success.float().mean().item()
    if cfg.task is not None:
        task = task_info(str(cfg.task))
        result["score"] = task.normalized(result["success_rate" if task.score == "success" else "return_mean"])
    return result


@float32_by_default()
def film_run(run_dir: str | Path, file: str | Path, seed: int | None = None, which: str | int = "best") -> Path:
    """Write a video (mp4) of one deterministic episode, the first of those that :func:`evaluate_run` plays.

    Args:
        run_dir (str or Path): run directory.
        file (str or Path): the video file to write.
        seed (int, optional): as for :func:`evaluate_run`. Defaults to ``None``.
        which (str or int): as for :func:`evaluate_run`. Defaults to ``"best"``.

    Raises:
        ConfigurationError: if the environment cannot be rendered on this machine.
        MissingLibraryError: if a library for rendering or encoding is missing.
    """
    cfg, networks, facts, _ = load_checkpointed(run_dir, which)
    seed = fresh_env_seed(cfg.seed) if seed is None else seed
    with opened_env(cfg.env, num_envs=1, seed=seed, render=True) as env:
        policy = _policy(networks, _specs(env, cfg, facts), deterministic=True)
        return write_video(file, film(env, policy, seed), frames_per_second(env_info(env)))
