"""Setup of ranks other than 0, and checksums; whole runs are in test_distributed.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from training_cases import Bench, config

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.config import Config
from pwm_torchrl.distributed.updates import SharedExecutor, check_device, checksum, dataclass_from_dict, device_of_rank
from pwm_torchrl.errors import ConfigurationError, RankFault


def test_configuration_through_json():
    cfg = config({"size.units": [16, 8], "memory.model_micro_batch": 3, "model.loss.rho": 0.7})
    assert dataclass_from_dict(Config, json.loads(json.dumps(asdict(cfg)))) == cfg


@pytest.mark.parametrize(
    ("gpus", "local_rank", "device"), [(4, 3, "cuda:3"), (2, 0, "cuda:0"), (1, 0, "cuda:0"), (1, 3, "cuda:0")]
)
def test_each_rank_has_its_gpu(gpus, local_rank, device, monkeypatch):
    """A SLURM task with one GPU uses it, whatever its local rank."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert device_of_rank("cuda", local_rank) == torch.device(device)
    assert device_of_rank("cpu", local_rank) == torch.device("cpu")


@pytest.mark.parametrize(("gpus", "local_rank"), [(2, 2), (0, 0)])
def test_more_ranks_than_gpus(gpus, local_rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigurationError, match=rf"Rank {local_rank} .* {gpus}\."):
        device_of_rank("cuda", local_rank)


def test_a_numbered_device_is_refused():
    for device in ("auto", "cpu", "cuda"):
        check_device(device, SimpleNamespace(size=2))
    with pytest.raises(ConfigurationError, match="device='cuda:0'"):
        check_device("cuda:0", SimpleNamespace(size=2))


def test_checksums_change_with_the_last_bit():
    bench = Bench(config())
    bench.step()
    shared = SharedExecutor(bench.networks, bench.losses, bench.optimizers, SimpleNamespace())
    before = shared.checksums()
    assert before == shared.checksums()
    state = bench.optimizers["actor"].optimizer.state
    moment = next(iter(state.values()))["exp_avg"].view(-1)
    moment[0] = torch.nextafter(moment[0], torch.tensor(1.0))
    changed = {name for name, value in shared.checksums().items() if value != before[name]}
    assert changed == {"actor"}
    nan = torch.tensor([float("nan"), 1.0])
    assert checksum([nan]) == checksum([nan.flip(0)]) != checksum([nan + 1]), "NaNs are compared, too"


def test_a_lost_rank_is_not_out_of_memory():
    """Even if the library's error mentions memory: another process died, so the update cannot be retried."""
    cause = RuntimeError("NCCL: out of memory")
    fault = RankFault("Rank 0 of 2 cannot reach the others.")
    fault.__cause__ = cause
    assert is_out_of_memory(cause)
    assert not is_out_of_memory(fault)
