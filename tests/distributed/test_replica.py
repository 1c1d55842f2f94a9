"""What a rank beside rank 0 makes of what it is told; whole runs: test_distributed.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from training_cases import Bench, config

from pwm_torchrl.algorithm.updates import is_out_of_memory
from pwm_torchrl.config import Config
from pwm_torchrl.distributed.ranks import Ranks
from pwm_torchrl.distributed.updates import SharedExecutor, bits
from pwm_torchrl.errors import ConfigurationError, RankFault
from pwm_torchrl.run.replica import check_device, made_of, own_device


def test_configuration_through_json():
    cfg = config({"size.units": [16, 8], "memory.model_micro_batch": 3, "model.loss.rho": 0.7})
    assert made_of(Config, json.loads(json.dumps(asdict(cfg)))) == cfg


@pytest.mark.parametrize(
    ("gpus", "local_rank", "device"), [(4, 3, "cuda:3"), (2, 0, "cuda:0"), (1, 0, "cuda:0"), (1, 3, "cuda:0")]
)
def test_each_rank_has_its_gpu(gpus, local_rank, device, monkeypatch):
    """A task that SLURM gave one GPU sees no other, whatever its number."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert own_device("cuda", local_rank) == torch.device(device)
    assert own_device("cpu", local_rank) == torch.device("cpu")


@pytest.mark.parametrize(("gpus", "local_rank"), [(2, 2), (0, 0)])
def test_more_ranks_than_gpus(gpus, local_rank, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigurationError, match=f"Rank {local_rank} of this node needs a GPU .* PyTorch sees {gpus}"):
        own_device("cuda", local_rank)


def test_a_numbered_device_is_refused():
    for device in ("auto", "cpu", "cuda"):
        check_device(device, SimpleNamespace(size=2))
    with pytest.raises(ConfigurationError, match="device='cuda:0' is one GPU for 2 ranks"):
        check_device("cuda:0", SimpleNamespace(size=2))


@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 2, 7, 8, 1024])
def test_shares_are_all_rows_once(count, size):
    ranks = SimpleNamespace(rank=0, size=size)
    shares = [Ranks.share(ranks, count, rank) for rank in range(size)]
    assert [row for share in shares for row in range(count)[share]] == list(range(count))
    lengths = [share.stop - share.start for share in shares]
    assert max(lengths) - min(lengths) <= 1
    assert lengths[0] == max(lengths) == Ranks.largest_share(ranks, count)


def test_the_last_bit_counts():
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
    assert bits([nan]) == bits([nan.flip(0)]) != bits([nan + 1]), "also of what equals nothing"


def test_a_lost_rank_is_no_lack_of_memory():
    """Whatever the library says: there is nobody left to repeat the update with."""
    cause = RuntimeError("NCCL: out of memory")
    fault = RankFault("Rank 0 of 2 cannot reach the others.")
    fault.__cause__ = cause
    assert is_out_of_memory(cause)
    assert not is_out_of_memory(fault)
