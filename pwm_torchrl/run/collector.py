"""Data collection with a state that can be resumed exactly, and the seeds of a run."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Collector
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType

from pwm_torchrl.envs import load_env_state, save_env_state
from pwm_torchrl.terminal import Progress

_STRIDE = 10_000


def seed_everything(seed: int) -> None:
    """Seed the process-wide generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def training_env_seed(seed: int) -> int:
    """Seed of the first training environment; below 2^32, which is what simulators accept."""
    return (seed % (2**32 // _STRIDE)) * _STRIDE


def evaluation_env_seed(seed: int, number: int = 0, num_envs: int = 1) -> int:
    """Seed of the first environment of an evaluation during training.

    Args:
        seed (int): of the run.
        number (int): of the evaluation: the epoch after which it is made. Defaults to ``0``, that of random actions.
        num_envs (int): environments of an evaluation; those of the next have other seeds, until all of the run's are
            used up. Defaults to ``1``.
    """
    return training_env_seed(seed) + _STRIDE // 2 + number * num_envs % (_STRIDE // 4 // num_envs * num_envs or 1)


def fresh_env_seed(seed: int) -> int:
    """Seed of the first environment of an evaluation after training, which training never used."""
    return training_env_seed(seed) + _STRIDE * 3 // 4


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Restore the process-wide generators after the block, because environments may reseed them."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])


class RunRNGState(GlobalRNGState):
    """TorchRL's process-wide generator state, which can be loaded on a machine with another number of GPUs.

    The GPUs' generators are restored only if their number is the same; the others are always restored.
    """

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        saved = dict(state_dict)
        cuda = saved.get("torch_cuda")
        if cuda is not None and len(cuda) != torch.cuda.device_count():
            warnings.warn(
                f"The checkpoint has the random state of {len(cuda)} CUDA devices, but there are "
                f"{torch.cuda.device_count()}: their generators are reseeded, so the run is not resumed exactly.",
                stacklevel=2,
            )
            del saved["torch_cuda"]
        super().load_state_dict(saved)


class ResumableCollector(Collector):
    """TorchRL's collector with a state that includes the environments' states, if they can save them.

    TorchRL's collector starts new episodes after a restart, so a resumed run differs from an uninterrupted one. Here,
    the state contains those of the environments and the next policy input. If an environment cannot save its state, the
    episodes restart and :attr:`resumed_exactly` is False.

    Args:
        env (EnvBase): environments of batch size ``[N]``.
        policy (TensorDictModuleBase): acts on their observations.
        steps (int): agent steps per environment and batch.
        random_steps (int): number of first agent steps, summed over environments, with uniform actions; rounded up to
            whole batches. Defaults to ``0``.
        device (str or torch.device): device of the policy; batches are on the CPU. Defaults to ``"cpu"``.
        env_device (str or torch.device): device of the environments. Defaults to ``"cpu"``.
    """

    def __init__(
        self,
        env: EnvBase,
        policy: TensorDictModuleBase,
        steps: int,
        random_steps: int = 0,
        device: str | torch.device = "cpu",
        env_device: str | torch.device = "cpu",
    ) -> None:
        self.resumed_exactly = True
        self.progress = Progress()
        self._env_state_valid = True
        frames = steps * env.batch_size[0]
        super().__init__(
            env,
            policy,
            frames_per_batch=frames,
            total_frames=-1,
            init_random_frames=-(-random_steps // frames) * frames or None,
            exploration_type=ExplorationType.RANDOM,
            trust_policy=True,
            policy_device=device,
            env_device=env_device,
            storing_device="cpu",
            use_buffers=False,
            auto_register_policy_transforms=False,  # the policy is not recurrent
        )

    def rollout(self) -> TensorDictBase:
        """Collect one batch."""
        first = max(self.init_random_frames, self.requested_frames_per_batch)
        if self._frames >= first:
            with self.progress.phase("collecting"):
                return super().rollout()
        with self.progress.phase("collecting the first steps", first, self._frames, pieces=True):
            return super().rollout()

    def state_dict(self) -> dict[str, Any]:
        """Frame count, the environments' state (``None`` if it cannot be saved), and the next policy input."""
        state = save_env_state(self.env) if self._env_state_valid else None
        carrier = None
        if state is not None:
            leaves = self._carrier.exclude("next").items(True, True)
            carrier = {"|".join((key,) if isinstance(key, str) else key): value for key, value in leaves}
        return {"frames": self._frames, "iter": self._iter, "env": state, "carrier": carrier}

    def forget_env_state(self) -> None:
        """Do not save the environments' state any more, because one of them failed in the middle of a batch."""
        self._env_state_valid = False

    def load_state_dict(self, state_dict: dict[str, Any], **kwargs: Any) -> None:
        """Continue from :meth:`state_dict`."""
        self._frames = state_dict["frames"]
        self._iter = state_dict["iter"]
        self.resumed_exactly = state_dict["env"] is not None
        if state_dict["env"] is None:
            return
        load_env_state(self.env, state_dict["env"])
        for name, value in state_dict["carrier"].items():
            self._carrier.set(tuple(name.split("|")), value.to(self._carrier.device or "cpu"))


class EpisodeReturns:
    """Returns of training episodes, summed over the batches that they span.

    Args:
        num_envs (int): parallel environments.
    """

    def __init__(self, num_envs: int) -> None:
        self.running = torch.zeros(num_envs, dtype=torch.float64)

    def update(self, batch: TensorDictBase) -> Tensor:
        """Add a batch ``[N, T]`` and return the returns of the episodes that ended in it, float64 ``[E]``."""
        finished = []
        rewards = batch["next", "reward"].squeeze(-1).double().cpu()
        for reward, done in zip(rewards.unbind(1), batch["next", "done"].squeeze(-1).cpu().unbind(1), strict=True):
            self.running += reward
            finished.append(self.running[done])
            self.running = self.running.masked_fill(done, 0.0)
        return torch.cat(finished)

    def state_dict(self) -> dict[str, Tensor]:
        return {"running": self.running}

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        self.running = state_dict["running"].clone()
