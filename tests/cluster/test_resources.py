"""What a run asks SLURM for."""

from __future__ import annotations

import pytest

from pwm_torchrl.cluster.resources import DEFAULT_CPUS, resources_for
from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError


def config(threads: int | None, cpus: int | None) -> Config:
    """With everything given that would otherwise be planned."""
    cfg = Config()
    cfg.training.threads, cfg.cluster.cpus = threads, cpus
    cfg.cluster.mem_gib, cfg.cluster.time_min = 1.5, 30
    return cfg


@pytest.mark.parametrize(
    ("threads", "cpus", "asked"), [(None, None, DEFAULT_CPUS), (6, None, 6), (None, 4, 4), (2, 4, 4), (4, 4, 4)]
)
def test_as_many_cpus_as_threads(threads, cpus, asked):
    resources = resources_for(config(threads, cpus), plan=None)
    assert (resources.cpus, resources.mem_mb, resources.time_min) == (asked, 1536, 30)


def test_more_threads_than_cpus_are_refused():
    with pytest.raises(ConfigurationError, match=r"training\.threads=8 .* cluster\.cpus=4"):
        resources_for(config(8, 4), plan=None)


def test_more_memory_than_a_node_has_is_refused():
    cfg = config(None, None)
    cfg.cluster.host_gib = 1
    with pytest.raises(ConfigurationError, match=r"cluster\.mem_gib=1\.5 .* cluster\.host_gib=1"):
        resources_for(cfg, plan=None)
