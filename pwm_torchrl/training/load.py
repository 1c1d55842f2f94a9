"""Trained modules from a run directory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import Bounded
from torchrl.envs import EnvBase
from torchrl.modules import WorldModel as TorchRLWorldModel

from pwm_torchrl.envs import env_info, make_env
from pwm_torchrl.envs.tasks import task_info
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.modules import TaskWorldModel, WorldModel, encoder_module, policy_module, read_world_model
from pwm_torchrl.training.artifacts import write_video
from pwm_torchrl.training.build import EnvFacts, Networks, build_networks
from pwm_torchrl.training.checkpoint import CheckpointFault, checkpoint_metadata, load_checkpoint
from pwm_torchrl.training.checkpoint_store import CheckpointStore
from pwm_torchrl.training.config import Config
from pwm_torchrl.training.config_file import load_config
from pwm_torchrl.training.evaluation import film, frames_per_second, play
from pwm_torchrl.training.seeding import fresh_env_seed
from pwm_torchrl.training.updates import trained_networks


@dataclass(frozen=True)
class Facts:
    """What of its environment a network's shape depends on; saved in every checkpoint."""

    observation_dim: int
    action_dim: int
    terminates: bool
    action_dims: tuple[int, ...] = ()  # of every task of a multi-task world model


def load_networks(
    run: str | Path, which: str | int = "best", device: str | torch.device = "cpu"
) -> tuple[Config, Networks]:
    """Configuration and trained networks of a run, in evaluation mode and without gradient.

    Args:
        run (str or Path): run directory, finished or not.
        which (str or int): checkpoint: ``"best"`` by evaluation return, ``"last"`` (or ``"latest"``), or the number of
            an epoch that has one. Defaults to ``"best"``.
        device (str or torch.device): where to put them. Defaults to ``"cpu"``.

    Raises:
        ConfigurationError: if ``run`` is no run directory or has no such checkpoint.
        CheckpointFault: if the checkpoint cannot be read.
    """
    return _load(run, which, device)[:2]


def _load(run: str | Path, which: str | int, device: str | torch.device = "cpu") -> tuple[Config, Networks, int]:
    """As :func:`load_networks`, and the checkpoint's epoch."""
    run = Path(run)
    cfg = load_config(run)
    path = CheckpointStore(run).pick(which)
    metadata = checkpoint_metadata(path)
    if "facts" not in metadata:
        raise CheckpointFault(f"The checkpoint {path} does not say what environment it is for.")
    if cfg.mode == "pretrain":
        raise ConfigurationError(f"{run} pre-trained a world model and has no policy; extract one: mode=extract.")
    facts = metadata["facts"]
    networks = build_networks(cfg, Facts(**{**facts, "action_dims": tuple(facts.get("action_dims", ()))}))
    if cfg.mode == "extract":
        load_pretrained(cfg, networks.world_model)
    trained = trained_networks(cfg)
    load_checkpoint(path, {name: network for name, network in networks.items() if name in trained})
    for _, network in networks.items():
        network.requires_grad_(False).eval().to(device)
    return cfg, networks, int(metadata["epoch"])


def load_pretrained(cfg: Config, world_model: WorldModel) -> None:
    """Put the weights of ``cfg.world_model`` into the view of one of its tasks.

    Raises:
        ConfigurationError: if they are not there, damaged, or not those that the run began with.
    """
    assert isinstance(world_model, TaskWorldModel)
    pretrained, _ = read_world_model(str(cfg.world_model), cfg.world_model_sha256)
    world_model.load_multi_task(pretrained)


def load_policy(run: str | Path, which: str = "best", device: str | torch.device = "cpu") -> TensorDictSequential:
    """The trained policy as a TorchRL module: ``observation`` -> ``latent`` -> ``action`` in [−1, 1].

    It samples by default and is deterministic under ``set_exploration_type(ExplorationType.DETERMINISTIC)``.
    Arguments and errors as :func:`load_networks`.

    Examples:
        >>> policy = load_policy("runs/my_run")  # doctest: +SKIP
        >>> env.rollout(200, policy)["next", "reward"].sum()  # doctest: +SKIP
    """
    _, networks = load_networks(run, which, device)
    spec = Bounded(-1.0, 1.0, (networks.actor.action_dim,), device=device)
    return policy_module(networks.world_model, networks.actor, action_spec=spec)


class _Part(nn.Module):
    """One method of a world model as a module."""

    def __init__(self, world_model: WorldModel) -> None:
        super().__init__()
        self.world_model = world_model


class _Dynamics(_Part):
    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.world_model.dynamics(latent, action)


class _Reward(_Part):
    def forward(self, latent: Tensor, action: Tensor) -> Tensor:
        return self.world_model.reward.decode(self.world_model.reward(latent, action))


class _Termination(_Part):
    def forward(self, next_latent: Tensor) -> Tensor:
        head = self.world_model.termination
        assert head is not None
        return head.terminated(head(next_latent))


def load_world_model(run: str | Path, which: str = "best", device: str | torch.device = "cpu") -> TorchRLWorldModel:
    """The trained world model as a :class:`torchrl.modules.WorldModel`.

    Keys: ``observation`` -> ``latent``; ``latent``, ``action`` -> ``("next", "latent")``, ``("next", "reward")`` and,
    with a termination head, ``("next", "done")``. Arguments and errors as :func:`load_networks`.
    """
    model = load_networks(run, which, device)[1].world_model
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


def evaluate_run(
    run_dir: str | Path, episodes: int = 10, seed: int | None = None, which: str | int = "best"
) -> dict[str, Any]:
    """Deterministic return of a run's policy in environments of its own.

    Args:
        run_dir (str or Path): run directory.
        episodes (int): number of episodes, played side by side. Defaults to ``10``.
        seed (int, optional): of the first environment. Defaults to one of the run's that neither its training nor its
            choice of the best checkpoint used.
        which (str or int): checkpoint: ``"best"``, ``"last"`` or the number of an epoch. Defaults to ``"best"``.

    Returns:
        dict: ``return_mean``, ``return_std``, ``episodes``, ``returns``, ``seed`` and the checkpoint's ``epoch``; where
        the environment tells it, ``success_rate``; of a policy for one of the registry's tasks, ``score`` on the task's
        scale from 0 to 1.
    """
    cfg, networks, epoch = _load(run_dir, which)
    seed = fresh_env_seed(cfg.seed) if seed is None else seed
    env = make_env(cfg.env, num_envs=episodes, seed=seed, device="cpu")
    try:
        played = play(env, _acting(networks, env), seed)
    finally:
        env.close()
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


def film_run(run_dir: str | Path, file: str | Path, seed: int | None = None, which: str | int = "best") -> Path:
    """Write a video (mp4) of one deterministic episode, the first of those that :func:`evaluate_run` plays.

    Args:
        run_dir (str or Path): run directory.
        file (str or Path): where to write.
        seed (int, optional): as for :func:`evaluate_run`. Defaults to ``None``.
        which (str or int): as for :func:`evaluate_run`. Defaults to ``"best"``.

    Raises:
        ConfigurationError: if the environment cannot be drawn here.
        MissingLibraryError: if a library that draws or encodes is missing.
    """
    cfg, networks, _ = _load(run_dir, which)
    seed = fresh_env_seed(cfg.seed) if seed is None else seed
    env = make_env(cfg.env, num_envs=1, seed=seed, device="cpu", render=True)
    try:
        return write_video(file, film(env, _acting(networks, env), seed), frames_per_second(env_info(env)))
    finally:
        env.close()


def _acting(networks: Networks, env: EnvBase) -> TensorDictSequential:
    """The policy for environments that this package made, whose actions lie in [-1, 1]."""
    spec = Bounded(-1.0, 1.0, (env_info(env).action_dim,))
    return policy_module(networks.world_model, networks.actor, action_spec=spec)


def facts_of(facts: EnvFacts) -> dict[str, Any]:
    """Facts as checkpoint metadata."""
    return asdict(Facts(facts.observation_dim, facts.action_dim, facts.terminates, tuple(facts.action_dims)))
