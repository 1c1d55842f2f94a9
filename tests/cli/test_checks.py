"""What the doctor finds, and what it advises."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch

from pwm_torchrl.cli import doctor as checks
from pwm_torchrl.cli.doctor import OK, PROBLEM, WARNING
from pwm_torchrl.config import Config, LoggerConfig


def only(findings):
    (finding,) = findings
    assert "\n" not in finding.text
    return finding.level, finding.text


class TestGpu:
    @pytest.fixture(autouse=True)
    def _none(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    @pytest.fixture
    def no_driver(self, monkeypatch):
        monkeypatch.setattr(checks, "_listed_gpus", list)

    def test_none_is_fine(self, no_driver):
        assert only(checks.check_gpu(Config(), elsewhere=False)) == (OK, "none on this machine; runs use the CPU")
        level, text = only(checks.check_gpu(Config(device="cuda"), elsewhere=True))
        assert level == OK
        assert "of the nodes" in text

    def test_unless_one_is_asked_for(self, no_driver):
        level, text = only(checks.check_gpu(Config(device="cuda:1"), elsewhere=False))
        assert level == PROBLEM
        assert "device=cuda:1" in text

    @pytest.mark.parametrize(("cuda", "advice"), [(None, "install a CUDA build"), ("12.8", "update the driver")])
    def test_one_that_pytorch_cannot_use(self, monkeypatch, cuda, advice):
        monkeypatch.setattr(checks, "_listed_gpus", lambda: ["NVIDIA L40S"])
        monkeypatch.setattr(torch.version, "cuda", cuda)
        level, text = only(checks.check_gpu(Config(), elsewhere=False))
        assert level == PROBLEM
        assert "NVIDIA L40S was found" in text
        assert advice in text

    def test_each_one_is_tried(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        facts = types.SimpleNamespace(name="NVIDIA H100", total_memory=80e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: facts)
        ones = torch.ones

        def tried(*size, device):
            if device == "cuda:1":
                raise RuntimeError("CUDA error: out of memory\nmore")
            return ones(*size)

        monkeypatch.setattr(torch, "ones", tried)
        good, bad = checks.check_gpu(Config(), elsewhere=False)
        assert good.level == OK
        assert good.text.startswith("cuda:0 NVIDIA H100, 75 GiB")
        assert bad.level == PROBLEM
        assert "CUDA error: out of memory); free the GPU" in bad.text

    def test_the_driver_is_asked(self, monkeypatch, tmp_path):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L40S (UUID: GPU-1)'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert checks._listed_gpus() == ["NVIDIA L40S"]
        tool.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
        assert checks._listed_gpus() == []


class TestRendering:
    @pytest.fixture(autouse=True)
    def _with_mujoco(self, monkeypatch):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.setattr(checks, "find_spec", lambda name: object())

    @pytest.mark.parametrize(
        ("chosen", "works", "level", "part"),
        [
            (None, {"egl", "osmesa"}, OK, "MUJOCO_GL=egl"),
            (None, {"osmesa"}, WARNING, "export MUJOCO_GL=osmesa"),
            (None, set(), WARNING, "egl: broken; osmesa: broken"),
            ("osmesa", {"egl", "osmesa"}, OK, "MUJOCO_GL=osmesa"),
            ("glfw", {"egl"}, PROBLEM, "MUJOCO_GL=glfw does not work (glfw: broken); unset it"),
        ],
    )
    def test_by_what_works(self, monkeypatch, chosen, works, level, part):
        if chosen:
            monkeypatch.setenv("MUJOCO_GL", chosen)
        monkeypatch.setattr(checks, "_rendering_fault", lambda name: None if name in works else "broken")
        found, text = only(checks.check_rendering())
        assert found == level
        assert part in text

    def test_without_mujoco(self, monkeypatch):
        monkeypatch.setattr(checks, "find_spec", lambda name: None)
        assert only(checks.check_rendering())[0] == OK

    def test_in_a_process_of_its_own(self, monkeypatch):
        monkeypatch.setattr(checks, "_RENDER", "import os; raise SystemExit(os.environ['MUJOCO_GL'] != 'egl')")
        assert checks._rendering_fault("egl") is None
        monkeypatch.setattr(checks, "_RENDER", "raise ImportError('no EGL')")
        assert checks._rendering_fault("egl") == "ImportError: no EGL"
        monkeypatch.setattr(checks, "_RENDER", "import os; os.abort()")
        assert checks._rendering_fault("egl") == "exit code -6"
        monkeypatch.setattr(checks, "_RENDER_TIMEOUT_S", 0.2)
        monkeypatch.setattr(checks, "_RENDER", "import time; time.sleep(60)")
        assert checks._rendering_fault("egl") == "no image within 0.2 s"

    def test_a_backend_that_does_not_exist(self):
        pytest.importorskip("mujoco")
        assert "nonsense" in checks._rendering_fault("nonsense")


class TestDisk:
    @pytest.mark.parametrize(
        ("kind", "free_gib", "elsewhere", "level", "part"),
        [
            ("ext4", 100, False, OK, "100.0 GiB free"),
            ("nfs4", 100, True, OK, "(nfs4)"),
            ("lustre", 100, True, OK, "(lustre)"),
            ("ext4", 100, True, WARNING, "a folder that the nodes share"),
            ("tmpfs", 100, False, PROBLEM, "is RAM"),
            ("ext4", 5, False, WARNING, "launch/plan.py shows how much"),
            ("ext4", 0.5, False, PROBLEM, "0.5 GiB free; free space"),
            (None, 100, True, OK, "(unknown)"),
        ],
    )
    def test_by_kind_and_room(self, monkeypatch, tmp_path, kind, free_gib, elsewhere, level, part):
        monkeypatch.setattr(checks, "filesystem_type", lambda folder: kind)
        monkeypatch.setattr(checks, "free_bytes", lambda folder: int(free_gib * 2**30))
        found, text = only(checks.check_disk(tmp_path / "runs", elsewhere=elsewhere))
        assert found == level
        assert part in text
        assert f"runs_dir={tmp_path / 'runs'}" in text
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can write")
    def test_nobody_may_write_there(self):
        level, text = only(checks.check_disk(Path("/proc/runs"), elsewhere=False))
        assert level == PROBLEM
        assert "cannot be written" in text


class TestWandb:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        monkeypatch.setattr(checks, "find_spec", lambda name: object())

    @pytest.mark.parametrize(
        ("kind", "mode", "reason", "level", "part"),
        [
            ("csv", "auto", None, OK, "server reachable"),
            ("csv", "auto", "there is no key", OK, "not needed; it would log offline because there is no key"),
            ("wandb", "auto", "there is no key", WARNING, "will log offline because there is no key"),
            ("wandb", "online", "there is no key", PROBLEM, "logger.mode=online, but there is no key"),
            ("wandb", "offline", "WANDB_MODE says so", OK, "logger.mode"),
            ("wandb", "disabled", "there is no key", OK, "not needed"),
        ],
    )
    def test_by_what_is_asked(self, monkeypatch, kind, mode, reason, level, part):
        monkeypatch.setattr(checks, "offline_reason", lambda: reason)
        found, text = only(checks.check_wandb(Config(logger=LoggerConfig(kind=kind, mode=mode))))
        assert found == level
        assert part in text

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(checks, "find_spec", lambda name: None)
        assert only(checks.check_wandb(Config()))[0] == OK
        level, text = only(checks.check_wandb(Config(logger=LoggerConfig(kind="wandb"))))
        assert level == PROBLEM
        assert "pip install" in text


def test_versions():
    level, text = only(checks.check_packages())
    assert level == OK
    assert f"torch {torch.__version__}" in text
