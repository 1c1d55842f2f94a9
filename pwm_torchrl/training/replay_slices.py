"""What PWM's updates draw from a TorchRL replay buffer."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, SliceSampler

from pwm_torchrl.errors import ConfigurationError


class ReplaySlices:
    """Slices and start states from a TorchRL replay buffer, as :class:`~pwm_torchrl.data.TrajectoryReplay` gives them.

    Args:
        buffer (ReplayBuffer): its sampler is a :class:`~torchrl.data.SliceSampler` of ``slice_len=horizon``.
        horizon (int): steps per slice.
        device (torch.device): of what is drawn.

    Raises:
        ConfigurationError: for a sampler whose slices have other lengths.
    """

    def __init__(self, buffer: ReplayBuffer, horizon: int, device: torch.device) -> None:
        sampler = buffer.sampler
        if not isinstance(sampler, SliceSampler) or sampler.slice_len != horizon:
            found = f"slice_len={sampler.slice_len}" if isinstance(sampler, SliceSampler) else type(sampler).__name__
            raise ConfigurationError(
                f"replay_buffer.sampler: {found} does not give slices of algorithm.horizon={horizon} steps; "
                f"choose sampler=pwm_slices with slice_len={horizon}."
            )
        if not (sampler.strict_length or sampler.pad_output):
            raise ConfigurationError(
                "replay_buffer.sampler.strict_length=False gives slices of several lengths; set pad_output=True too."
            )
        self.buffer, self.horizon, self.device = buffer, horizon, device

    @property
    def collected(self) -> int:
        """Steps that can be drawn from."""
        return len(self.buffer)

    @property
    def can_sample(self) -> bool:
        """Whether anything was collected; the sampler itself says if no trajectory is long enough."""
        return self.collected > 0

    def extend(self, batch: TensorDictBase) -> TensorDictBase:
        """Store a collector's batch ``[T]`` or ``[N, T]``, in a storage of one dimension one environment at a time.

        Raises:
            ConfigurationError: if the sampler could not tell those environments apart.
        """
        mask = batch.get(("collector", "mask"), None)
        data = batch if mask is None else batch[mask]
        if self.buffer.storage.ndim == 1:
            if data.ndim > 1 and data.shape[0] > 1 and self.buffer.sampler.traj_key is None:
                raise ConfigurationError(
                    f"replay_buffer.sampler.traj_key=None cannot tell {data.shape[0]} environments apart in a storage "
                    "of one dimension; set traj_key=[collector, traj_ids]."
                )
            data = data.reshape(-1)
        self.buffer.extend(data)
        return batch

    def sample_slices(self, count: int) -> TensorDictBase:
        """Slices ``[count, horizon]``."""
        return self.buffer.sample(count * self.horizon).reshape(count, self.horizon).to(self.device)

    def sample_observations(self, count: int) -> Tensor:
        """Observations ``[count, O]`` of any step of as many slices."""
        slices = self.sample_slices(count)
        mask = slices.get(("collector", "mask"), None)
        weights = torch.ones(slices.shape) if mask is None else mask.reshape(slices.shape).float().cpu()
        step = torch.multinomial(weights, 1).squeeze(1).to(self.device)
        return slices.get("observation")[torch.arange(count, device=self.device), step]
