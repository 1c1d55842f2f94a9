"""dflex, the differentiable simulator of the PWM paper, as a TorchRL environment; users install it themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data import Bounded, Categorical, Composite, Unbounded
from torchrl.envs import EnvBase

from pwm_torchrl.envs.info import EnvInfo
from pwm_torchrl.errors import ConfigurationError, EnvironmentFault

__all__ = ["INSTALL", "DFlexEnv", "RandomStream"]

INSTALL = "pip install 'git+https://github.com/imgeorgiev/DiffRL.git#subdirectory=dflex'"


class DFlexEnv(EnvBase):
    """A batched dflex simulation as a TorchRL environment of batch size ``[N]``.

    dflex resets finished rows inside ``step``; here the step returns the true last observation, and the reset that
    follows hands out the observation that the simulator already drew. Rewards are dflex's: of the state before the
    transition.

    Args:
        simulator: an object with dflex's interface: ``num_envs``, ``num_obs``, ``num_actions``, ``episode_length``,
            ``reset(env_ids, grads, force_reset)`` and ``step(actions)``.

    Keyword Args:
        name (str): label for messages.
        seed (int): seed of the whole batch. Defaults to ``0``.
        device (torch.device or str): the simulator's. Defaults to ``"cpu"``.
        terminates (bool): whether episodes can end before their time limit. Defaults to ``True``.
    """

    state_support = "none: dflex has no complete copy of its state, so a resumed run begins with new episodes"

    def __init__(
        self,
        simulator: Any,
        *,
        name: str,
        seed: int = 0,
        device: torch.device | str = "cpu",
        terminates: bool = True,
    ) -> None:
        n, observation_dim, action_dim = simulator.num_envs, simulator.num_obs, simulator.num_actions
        super().__init__(device=torch.device(device), batch_size=torch.Size([n]))
        self.simulator = simulator
        self.observation_spec = Composite(
            observation=Unbounded((n, observation_dim), dtype=torch.float32, device=self.device), shape=[n]
        )
        self.action_spec = Bounded(-1.0, 1.0, (n, action_dim), dtype=torch.float32, device=self.device)
        self.reward_spec = Unbounded((n, 1), dtype=torch.float32, device=self.device)
        flag = Categorical(2, dtype=torch.bool, shape=(n, 1), device=self.device)
        self.done_spec = Composite(done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=[n])
        self.pwm_info = EnvInfo(
            name=name,
            observation_dim=observation_dim,
            action_dim=action_dim,
            episode_length=int(simulator.episode_length),
            action_repeat=1,
            num_envs=n,
            terminates=terminates,
            seed=seed,
            action_low=(-1.0,) * action_dim,
            action_high=(1.0,) * action_dim,
        )
        self._random = RandomStream(self.device)
        self._set_seed(seed)
        # Rows that the simulator has reset inside its last step, and the observation of every row's present state.
        self._already_reset = torch.zeros(n, dtype=torch.bool, device=self.device)
        self._present = torch.zeros(n, observation_dim, device=self.device)

    def _set_seed(self, seed: int | None) -> None:
        if seed is not None:
            self._seed = seed
            self._random.seed(seed)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action").detach().clone()
        with self._guarded("step"), torch.no_grad(), self._random.active():
            after, reward, done, extras = self.simulator.step(action)
        try:
            last, terminated, truncated = (extras[k] for k in ("obs_before_reset", "termination", "truncation"))
        except KeyError as error:
            raise ConfigurationError(
                f"{self.pwm_info.name}: this dflex's step gives no extras[{error.args[0]!r}], which tells true last "
                f"observations and terminations apart; install the paper's version: {INSTALL}"
            ) from error
        # dflex reuses its buffers and its tensors may own graphs: everything that leaves here is a detached copy.
        last, reward = last.detach().clone().float(), reward.detach().clone().float().view(-1, 1)
        terminated = terminated.detach().clone().bool().view(-1, 1)
        truncated = truncated.detach().clone().bool().view(-1, 1)
        done = done.detach().clone().bool().view(-1, 1) | terminated | truncated
        self._present = after.detach().clone().float()
        self._already_reset = done.view(-1).clone()
        self._check_finite(last, "observation")
        self._check_finite(reward, "reward")
        return TensorDict(
            {
                "observation": last,
                "reward": reward,
                "done": done,
                "terminated": terminated,
                "truncated": truncated,
            },
            batch_size=self.batch_size,
            device=self.device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **kwargs: Any) -> TensorDictBase:
        mask = None if tensordict is None else tensordict.get("_reset", None)
        if mask is None:
            self._present = self._simulator_reset(None)
            self._already_reset = torch.zeros_like(self._already_reset)
        else:
            rows = mask.view(-1)
            pending = rows & ~self._already_reset
            if pending.any():
                fresh = self._simulator_reset(pending.nonzero().squeeze(-1))
                self._present = torch.where(pending.unsqueeze(-1), fresh, self._present)
            self._already_reset = self._already_reset & ~rows
        self._check_finite(self._present, "observation after reset")
        return TensorDict({"observation": self._present.clone()}, batch_size=self.batch_size, device=self.device)

    def _simulator_reset(self, rows: torch.Tensor | None) -> torch.Tensor:
        with self._guarded("reset"), torch.no_grad(), self._random.active():
            # Some versions take force_reset=True as "all rows", whatever env_ids says.
            observation = self.simulator.reset(env_ids=rows, force_reset=rows is None)
        return observation.detach().clone().float()

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            text = " ".join(str(error).split())[:300]
            raise EnvironmentFault(
                self.pwm_info.name, f"{what} raised {type(error).__name__}: {text}", seed=self._seed
            ) from error

    def _check_finite(self, values: torch.Tensor, what: str) -> None:
        bad = ~torch.isfinite(values).all(-1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise EnvironmentFault(self.pwm_info.name, f"{what} is not finite", seed=self._seed, index=row)

    def render_frame(self) -> np.ndarray:
        """Dflex writes USD scenes, not pictures: always raises ConfigurationError."""
        raise ConfigurationError(f"{self.pwm_info.name} cannot be filmed: dflex draws no pictures")


class RandomStream:
    """The global random state as the simulator sees it, kept apart from everyone else's.

    dflex draws from torch's and numpy's global generators; sharing them would let an evaluation change the training
    run, and vice versa.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._state = self._get()

    def seed(self, seed: int) -> None:
        """Start the stream anew."""
        outside = self._get()
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        self._state = self._get()
        self._set(outside)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Let what runs inside draw from this stream."""
        outside = self._get()
        self._set(self._state)
        try:
            yield
        finally:
            self._state = self._get()
            self._set(outside)

    def _get(self) -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state(self._cuda) if self._cuda else None
        return torch.get_rng_state(), np.random.get_state(), cuda

    def _set(self, state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        np.random.set_state(state[1])
        if self._cuda:
            torch.cuda.set_rng_state(state[2], self._cuda)
