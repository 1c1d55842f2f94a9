"""How a checkpoint's tensors reach the disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torchrl.checkpoint import StateDictCheckpointAdapter
from torchrl.checkpoint._checkpoint import _encode_state_dict_value

from pwm_torchrl.data.files import allocate, storage_faults


class AllocatedStateAdapter(StateDictCheckpointAdapter):
    """TorchRL's adapter for state dicts, with room for every tensor's file before the file is mapped.

    TorchRL copies tensors into mappings of sparse files. On a full disk that copy is answered with SIGBUS, which kills
    the process; taking the room first fails with an error.
    """

    def save(self, component: Any, path: Path, *, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Write ``component.state_dict(*args, **kwargs)`` into the folder ``path``.

        Raises:
            StorageFault: if there is no room.
        """
        state = component.state_dict(*args, **kwargs)
        tensors: dict[str, torch.Tensor] = {}
        _encode_state_dict_value(state, tensors)
        folder = path / self.state_directory
        folder.mkdir(parents=True, exist_ok=True)
        for name, tensor in tensors.items():
            if not tensor.nbytes:  # gets no file
                continue
            file = folder / f"{name}.memmap"
            with storage_faults(file, "make room for the checkpoint's file", tensor.nbytes):
                allocate(file, tensor.nbytes)
        return super().save(_Taken(state), path, args=(), kwargs={})


class _Taken:
    """A state dict that was taken already: a second one would copy a replay once more."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state
