"""Evaluation in the real environment: returns of deterministic episodes, and open-loop errors of the model on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type

from pwm_torchrl.envs import EnvInfo, env_info, render_frame
from pwm_torchrl.modules import WorldModel
from pwm_torchrl.training.seeding import preserved_generators

#: Stops an evaluation whose episodes neither end nor have a known length.
MAX_AGENT_STEPS = 10_000


@dataclass
class Episodes:
    """One episode per environment, time-major; rows after an episode's end are not ``valid``."""

    observation: Tensor  # [T, N, O]
    action: Tensor  # [T, N, A]
    next_observation: Tensor  # [T, N, O]
    reward: Tensor  # [T, N, 1]
    valid: Tensor  # bool [T, N, 1]
    success: Tensor | None = None  # bool [N], whether the task was solved at the end, where an environment says so

    @property
    def returns(self) -> Tensor:
        """Undiscounted sums of the environment's rewards, float64 ``[N]``."""
        return (self.reward.double() * self.valid).sum(0).squeeze(-1)


@preserved_generators()
@torch.no_grad()
def play(
    env: EnvBase,
    act: Callable[[TensorDictBase], TensorDictBase],
    seed: int,
    between: Callable[[], None] | None = None,
) -> Episodes:
    """One episode in each environment of ``env``, after seeding them.

    Args:
        env (EnvBase): environments of batch size ``[N]``.
        act (callable): sets ``action`` in a TensorDict, such as a policy module.
        seed (int): of the first environment; the same seed starts the same episodes.
        between (callable, optional): called before every step; what it raises ends the evaluation. Defaults to
            ``None``.
    """
    env.set_seed(seed)
    limit = env_info(env).episode_length or MAX_AGENT_STEPS
    state = env.reset()
    running = torch.ones(*env.batch_size, 1, dtype=torch.bool)
    solved: Tensor | None = None
    columns: dict[str, list[Tensor]] = {
        key: [] for key in ("observation", "action", "next_observation", "reward", "valid")
    }
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        for _ in range(limit):
            if between is not None:
                between()
            state, following = env.step_and_maybe_reset(act(state))
            step = state["next"]
            for key, value in (
                ("observation", state["observation"]),
                ("action", state["action"]),
                ("next_observation", step["observation"]),
                ("reward", step["reward"]),
                ("valid", running),
            ):
                columns[key].append(value.cpu().clone())
            if "success" in step.keys():
                now = step["success"].cpu()
                solved = now.clone() if solved is None else torch.where(running, now, solved)
            running = running & ~step["done"].cpu()
            if not running.any():
                break
            state = following
    success = None if solved is None else solved.squeeze(-1)
    return Episodes(**{key: torch.stack(values) for key, values in columns.items()}, success=success)


def acting_on(
    policy: Callable[[TensorDictBase], TensorDictBase], device: torch.device, env_device: torch.device
) -> Callable[[TensorDictBase], TensorDictBase]:
    """A policy on ``device`` for environments on ``env_device``."""
    if device == env_device:
        return policy

    def act(state: TensorDictBase) -> TensorDictBase:
        return state.set("action", policy(state.select("observation").to(device))["action"].to(env_device))

    return act


def random_action(env: EnvBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """Uniform actions from a generator of their own, so that evaluating them leaves training's alone."""
    generator = torch.Generator().manual_seed(0)
    shape = env.action_spec.shape

    def act(state: TensorDictBase) -> TensorDictBase:
        action = torch.rand(shape, generator=generator) * 2 - 1
        return state.set("action", action.to(state.device or "cpu"))

    return act


@torch.no_grad()
def open_loop_errors(
    model: WorldModel, episodes: Episodes, horizon: int, reward_scale: Tensor | None = None
) -> dict[str, float]:
    """Errors of the model rolled out for ``horizon`` steps from every ``horizon``-th observation, without feedback.

    Args:
        model (WorldModel): the model.
        episodes (Episodes): held-out data.
        horizon (int): ``H``.
        reward_scale (Tensor, optional): factor that the model's rewards were trained with.

    Returns:
        dict: ``latent_mse`` and ``reward_nmse`` (squared error over the variance of the real rewards), means over the
        horizon, and the same at its last step (``_last``). Empty if no episode is as long as the horizon.
    """
    device = next(model.parameters()).device
    total = episodes.valid.shape[0]
    starts = [s for s in range(0, total - horizon + 1, horizon) if episodes.valid[s + horizon - 1].any()]
    if not starts:
        return {}

    def windows(x: Tensor) -> Tensor:
        rows = [x[s : s + horizon, episodes.valid[s + horizon - 1].squeeze(-1)] for s in starts]
        return torch.cat(rows, 1).to(device)

    reward = windows(episodes.reward)
    if reward_scale is not None:
        reward = reward * reward_scale
    latent, squared = rollout_errors(
        model,
        windows(episodes.observation)[0],
        windows(episodes.action),
        windows(episodes.next_observation),
        reward,
    )
    nmse = squared / reward.var().clamp_min(1e-8)
    return {
        "latent_mse": latent.mean().item(),
        "latent_mse_last": latent[-1].item(),
        "reward_nmse": nmse.mean().item(),
        "reward_nmse_last": nmse[-1].item(),
    }


@torch.no_grad()
def rollout_errors(
    model: WorldModel,
    observation: Tensor,
    action: Tensor,
    next_observation: Tensor,
    reward: Tensor,
    task: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Open-loop errors of the model at every step of a rollout, means over the batch.

    Args:
        model (WorldModel): the model.
        observation (Tensor): first observations ``[B, O]``.
        action (Tensor): ``[H, B, A]``.
        next_observation (Tensor): ``[H, B, O]``.
        reward (Tensor): ``[H, B, 1]``, as the model was trained on it.
        task (Tensor, optional): index ``[B]``, for multi-task models.

    Returns:
        tuple: squared error of the latent and of the raw reward, each ``[H]``.
    """
    tasks = () if task is None else (task,)
    target = model.encode(next_observation, *tasks)
    z = model.encode(observation, *tasks)
    latent_error, reward_error = [], []
    raw = getattr(model.reward, "codec", None)
    for t in range(len(action)):
        z, logits, _ = model.predict(z, action[t], *tasks)
        predicted = logits if raw is None else raw.decode(logits)
        latent_error.append((z - target[t]).square().mean())
        reward_error.append((predicted - reward[t]).square().mean())
    return torch.stack(latent_error), torch.stack(reward_error)


def frames_per_second(info: EnvInfo) -> float:
    """Speed of a video with one picture per agent step: 30 environment steps per second."""
    return 30.0 / max(1, info.action_repeat)


def film(env: EnvBase, act: Callable[[TensorDictBase], TensorDictBase], seed: int) -> Iterator[np.ndarray]:
    """Pictures of one deterministic episode in a rendering environment of batch size [1]."""
    env.set_seed(seed)
    state = env.reset()
    limit = env_info(env).episode_length or MAX_AGENT_STEPS
    for _ in range(limit):
        yield render_frame(env)
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            state, following = env.step_and_maybe_reset(act(state))
        if state["next", "done"].any():
            return
        state = following
