"""The soak: its slope is right, memory is flat over a short one, and one with a leak fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.slope import BLOCKS, slope

ROOT = Path(__file__).parents[2]


def random_walk(length: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length, generator=generator, dtype=torch.float64).cumsum(0)


class TestSlope:
    def test_is_least_squares_on_the_means_of_blocks(self):
        y = random_walk(10 * BLOCKS, 0)
        means = y.view(BLOCKS, 10).mean(1)
        t = torch.arange(BLOCKS, dtype=torch.float64) * 10
        expected = ((t - t.mean()) * means).sum() / (t - t.mean()).square().sum()
        assert slope(y.tolist())[0] == pytest.approx(expected.item())

    def test_a_line_has_its_slope_and_no_doubt(self):
        assert slope([7.0 + 3.0 * t for t in range(137)]) == pytest.approx((3.0, 3.0))
        assert slope([5.0] * 60) == (0.0, 0.0)

    def test_the_bound_covers_a_level_that_wanders(self):
        """Drift 0.1 under steps of 1: the ordinary bound for independent residuals holds in half of these cases."""
        drift = 0.1 * torch.arange(400, dtype=torch.float64)
        covered = [slope((drift + random_walk(400, seed)).tolist())[1] >= 0.1 for seed in range(200)]
        assert sum(covered) >= 184

    def test_a_leak_below_the_noise_is_found(self):
        """4 KiB per epoch, by an allocator that takes 1 MiB at a time."""
        taken = [-(-4096 * t // 2**20) * 2**20 for t in range(1400)]
        estimate, upper = slope(taken)
        assert estimate == pytest.approx(4096, rel=0.02)
        assert upper > 4096

    def test_too_short(self):
        with pytest.raises(ValueError, match="19 measured values are too few for a slope; at least 20"):
            slope([1.0] * 19)


def soak(tmp_path: Path, *options: str) -> tuple[int, dict]:
    """Exit code and JSON; in a process of its own, where nothing else allocates."""
    file = tmp_path / "soak.json"
    settings = ["device=cpu", "model.dynamics.substeps=1"]  # one of four: an epoch keeps as much, in half of the time
    command = [sys.executable, "benchmarks/soak.py", "--quick", "--json", str(file), *options, *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert file.exists(), done.stderr
    return done.returncode, json.loads(file.read_text())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
class TestSoak:
    def test_memory_is_flat(self, tmp_path):
        code, found = soak(tmp_path)
        assert (code, found["passed"], found["epochs"]) == (0, True, 60)
        assert found["live_tensors_constant"]
        assert found["live_nodes_constant"]
        assert found["live_nodes"] == [0]
        assert found["live_tensors"][0] > 100
        assert found["rss_slope_upper_95_bytes_per_epoch"] < 256 * 1024

    def test_a_leaky_metric_fails(self, tmp_path):
        """One loss with its graph is kept per epoch, as a metrics history did."""
        code, found = soak(tmp_path, "--leak", "--epochs", "35")
        assert (code, found["passed"]) == (1, False)
        assert not found["live_tensors_constant"]
        assert not found["live_nodes_constant"]
        assert found["rss_slope_bytes_per_epoch"] > 1e6
