"""A run on a CUDA device; skipped, with its reason, where there is none."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.run.collector import evaluation_env_seed
from pwm_torchrl.run.debugging import TRACE
from pwm_torchrl.run.metrics import read_metrics
from pwm_torchrl.training import evaluate_run, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device"),
]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_trains_on_cuda_and_loads_on_the_cpu(compiled: bool, tmp_path: Path) -> None:
    words = ["device=cuda", "training.epochs=2", "algorithm.first_model_updates=2", "algorithm.random_steps=0"]
    words += ["algorithm.normalize_rewards=true", "algorithm.normalize_observations=true", "training.video=false"]
    cfg = compose([*words, f"algorithm.compile={compiled}", f"run_dir={tmp_path}"])
    summary = train(cfg, tmp_path)
    assert summary["status"] == "finished"
    assert summary["peak_device_bytes"] > 0
    assert all(math.isfinite(value) for value in read_metrics(tmp_path / "metrics.csv")["loss/model"])
    seed = evaluation_env_seed(cfg.seed)
    again = evaluate_run(tmp_path, seed=seed, which="latest")
    assert again["return_mean"] == pytest.approx(summary["final_return"], rel=1e-3)


def test_a_profile_has_the_kernels_of_the_updates(tmp_path: Path) -> None:
    words = ["device=cuda", "training.epochs=2", "algorithm.first_model_updates=2", "algorithm.random_steps=0"]
    train(compose([*words, "training.video=false", "training.profile=3", f"run_dir={tmp_path}"]), tmp_path)
    with gzip.open(tmp_path / TRACE, "rt", encoding="utf-8") as file:
        events = json.load(file)["traceEvents"]
    assert any(event.get("cat") == "kernel" for event in events)
    assert {"model update", "critic update", "actor update"} <= {event["name"] for event in events}
