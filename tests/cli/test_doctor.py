"""``launch/doctor.py``: options, lines and exit codes, and the profile that it drafts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import types
from datetime import date
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("hydra")

import torch
from slurm_texts import SITE

from pwm_torchrl.cli import doctor
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.doctor import OK, PROBLEM, WARNING, Finding, draft_profile, profile_file, write_profile
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cluster.resources import JobRequest, why_impossible
from pwm_torchrl.cluster.slurm import Node, Partition
from pwm_torchrl.config import Config, LoggerConfig
from pwm_torchrl.errors import ConfigurationError

main = partial(run_command, "doctor")

SCRIPT = Path(__file__).parents[2] / "launch" / "doctor.py"
CHECKS = ("check_packages", "check_gpu", "check_rendering", "check_disk", "check_slurm", "check_wandb")


@pytest.fixture
def healthy(monkeypatch):
    """Every check finds everything in order; returns what each was told."""
    told = {}

    def fine(name):
        def check(*args, **options):
            told[name] = options
            return [Finding(OK, name, "fine")]

        return check

    monkeypatch.setattr(doctor, "slurm_available", lambda: False)
    for name in CHECKS:
        monkeypatch.setattr(doctor, name, fine(name))
    return told


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "slurm_available", lambda: True)
    monkeypatch.setattr(doctor, "site", lambda: SITE)
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path))
    return tmp_path / "cluster"


def test_all_is_well(healthy, capsys):
    assert main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(CHECKS)
    assert all(line.startswith("ok       check_") and line.endswith("fine") for line in lines)
    assert healthy["check_disk"] == healthy["check_gpu"] == {"elsewhere": False}


def test_jobs_of_slurm_run_elsewhere(healthy, capsys):
    assert main(["cluster=l40s"]) == 0
    assert healthy["check_disk"] == {"elsewhere": True}
    assert healthy["check_slurm"] == {"available": False}


def test_a_warning_is_no_failure(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_disk", lambda *args, **options: [Finding(WARNING, "disk", "hm")])
    assert main([]) == 0
    assert "warning  disk       hm" in capsys.readouterr().out


def test_a_problem_is(healthy, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "check_disk", lambda *args, **options: [Finding(PROBLEM, "disk", "full")])
    assert main([]) == 1
    shown = capsys.readouterr()
    assert "problem  disk       full" in shown.out
    assert shown.out.splitlines()[-1].startswith("ok")  # the rest is looked at all the same
    assert shown.err == "error: 1 problem, see above\n"


def test_a_draft_is_written_once(slurm, capsys):
    assert main(["--draft", "mine", "cluster.partition=gpu"]) == 0
    shown = capsys.readouterr().out
    text = (slurm / "mine.yaml").read_text()
    assert text in shown
    assert f"written: {slurm / 'mine.yaml'}" in shown
    assert "partition: gpu\n" in text
    assert main(["--draft", "mine"]) == 2
    assert "use --force" in capsys.readouterr().err
    assert (slurm / "mine.yaml").read_text() == text
    assert main(["--draft", "mine", "--force"]) == 0
    assert "partition: main\n" in (slurm / "mine.yaml").read_text()


def test_no_draft_without_slurm(slurm, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "slurm_available", lambda: False)
    assert main(["--draft", "mine"]) == 2
    assert "needs SLURM" in capsys.readouterr().err
    assert not slurm.exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--draft"], "--draft needs a name"),
        (["--force"], "give --draft NAME too"),
        (["--draft", "l40s"], "such as my_l40s"),
        (["--draft", "mine", "cluster.partition=nope"], "cluster.partition=nope does not exist"),
        (["cluster=l40"], "nearest: l40s"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_a_sentence(slurm, words, sentence, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert sentence in error
    assert not slurm.exists()


def test_help():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "usage: python launch/doctor.py" in done.stdout


# A profile drafted from what SLURM says -------------------------------------------------------------------------------


@pytest.fixture
def composed(tmp_path, monkeypatch):
    """Writes a profile named ``mine`` and composes it."""
    monkeypatch.setenv("PWM_TORCHRL_CONFIG_DIR", str(tmp_path / "own"))

    def write_and_compose(text: str, *words: str):
        write_profile(profile_file("mine"), text, force=True)
        return compose(["cluster=mine", *words]).cluster

    return write_and_compose


def test_a_partition_with_gpus(composed):
    text = draft_profile("mine", SITE, "gpu", date(2026, 11, 25))
    assert text.startswith(
        "# Partition gpu of cluster throwaway, drafted by `launch/doctor.py --draft mine` on 2026-11-25"
    )
    assert "Other partitions: main, old" in text
    assert max(map(len, text.splitlines())) <= 120
    cluster = composed(text)
    # Most nodes have L40S; a job may have 400,000 MiB on each, and an L40S's share is 16 of 64 CPUs.
    assert (cluster.kind, cluster.name, cluster.partition) == ("slurm", "mine", "gpu")
    assert (cluster.gpu, cluster.gpus, cluster.gres) == ("l40s", 1, "gpu:l40s:1")
    assert (cluster.host_gib, cluster.cpus, cluster.max_time_min) == (390.6, 16, None)
    assert why_impossible(JobRequest.of(cluster), SITE) is None


def test_the_default_partition_without_gpus(composed):
    cluster = composed(draft_profile("mine", SITE, None))
    assert (cluster.partition, cluster.gpu, cluster.gpus, cluster.gres) == ("main", None, 0, None)
    assert (cluster.host_gib, cluster.cpus, cluster.max_time_min) == (5.8, None, 1440)
    assert why_impossible(JobRequest.of(cluster), SITE) is None


def test_gpus_without_a_name_are_asked_for(composed):
    text = draft_profile("mine", SITE, "old")
    with pytest.raises(ConfigurationError, match=r"set cluster\.gpu, such as cluster\.gpu=l40s"):
        composed(text)
    assert composed(text, "cluster.gpu=a100-80gb").gpus == 1


def test_a_name_that_is_no_known_type(composed):
    nodes = (Node("x", cpus=8, memory_mb=1000, gpus={"fancy": 2}, partitions=("main",)),)
    text = draft_profile("mine", dataclasses.replace(SITE, nodes=nodes), None)
    assert "SLURM calls it fancy" in text
    assert composed(text, "cluster.gpu=l40s").cpus == 4


@pytest.mark.parametrize(
    ("site", "partition", "sentence"),
    [
        (SITE, "gpus", "cluster.partition=gpus does not exist; choose one of main, gpu, old"),
        (dataclasses.replace(SITE, nodes=()), "gpu", "partition gpu has no nodes"),
        (
            dataclasses.replace(SITE, partitions=(Partition("a"), Partition("b"))),
            None,
            r"no default partition; set cluster\.partition to one of a, b",
        ),
    ],
)
def test_what_cannot_be_drafted(site, partition, sentence):
    with pytest.raises(ConfigurationError, match=sentence):
        draft_profile("mine", site, partition)


def test_a_profile_is_never_written_over_unasked(tmp_path):
    file = tmp_path / "cluster" / "mine.yaml"
    write_profile(file, "a", force=False)
    with pytest.raises(ConfigurationError, match="exists; use --force"):
        write_profile(file, "b", force=False)
    assert file.read_text() == "a"
    write_profile(file, "b", force=True)
    assert file.read_text() == "b"
    with pytest.raises(ConfigurationError, match="cannot be written: Not a directory"):
        write_profile(file / "under" / "a_file.yaml", "c", force=False)


@pytest.mark.parametrize("name", ["", "a/b", "../x", ".hidden", "a b"])
def test_names_that_cannot_be(name):
    with pytest.raises(ConfigurationError, match="is not a name"):
        profile_file(name)


def test_packaged_names_are_taken():
    with pytest.raises(ConfigurationError, match="such as my_l40s"):
        profile_file("l40s")


# Checks of the machine: GPU, rendering, disk, W&B ---------------------------------------------------------------------


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
        monkeypatch.setattr(doctor, "_listed_gpus", list)

    def test_none_is_fine(self, no_driver):
        assert only(doctor.check_gpu(Config(), elsewhere=False)) == (OK, "none on this machine; runs use the CPU")
        level, text = only(doctor.check_gpu(Config(device="cuda"), elsewhere=True))
        assert level == OK
        assert "of the nodes" in text

    def test_unless_one_is_asked_for(self, no_driver):
        level, text = only(doctor.check_gpu(Config(device="cuda:1"), elsewhere=False))
        assert level == PROBLEM
        assert "device=cuda:1" in text

    @pytest.mark.parametrize(("cuda", "advice"), [(None, "install a CUDA build"), ("12.8", "update the driver")])
    def test_one_that_pytorch_cannot_use(self, monkeypatch, cuda, advice):
        monkeypatch.setattr(doctor, "_listed_gpus", lambda: ["NVIDIA L40S"])
        monkeypatch.setattr(torch.version, "cuda", cuda)
        level, text = only(doctor.check_gpu(Config(), elsewhere=False))
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
        good, bad = doctor.check_gpu(Config(), elsewhere=False)
        assert good.level == OK
        assert good.text.startswith("cuda:0 NVIDIA H100, 75 GiB")
        assert bad.level == PROBLEM
        assert "CUDA error: out of memory); free the GPU" in bad.text

    def test_the_driver_is_asked(self, monkeypatch, tmp_path):
        tool = tmp_path / "nvidia-smi"
        tool.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA L40S (UUID: GPU-1)'\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        assert doctor._listed_gpus() == ["NVIDIA L40S"]
        tool.write_text("#!/bin/sh\necho 'no driver' >&2; exit 9\n")
        assert doctor._listed_gpus() == []


class TestRendering:
    @pytest.fixture(autouse=True)
    def _with_mujoco(self, monkeypatch):
        monkeypatch.delenv("MUJOCO_GL", raising=False)
        monkeypatch.setattr(doctor, "find_spec", lambda name: object())

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
        monkeypatch.setattr(doctor, "_rendering_fault", lambda name: None if name in works else "broken")
        found, text = only(doctor.check_rendering())
        assert found == level
        assert part in text

    def test_without_mujoco(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_spec", lambda name: None)
        assert only(doctor.check_rendering())[0] == OK

    def test_in_a_process_of_its_own(self, monkeypatch):
        monkeypatch.setattr(doctor, "_RENDER", "import os; raise SystemExit(os.environ['MUJOCO_GL'] != 'egl')")
        assert doctor._rendering_fault("egl") is None
        monkeypatch.setattr(doctor, "_RENDER", "raise ImportError('no EGL')")
        assert doctor._rendering_fault("egl") == "ImportError: no EGL"
        monkeypatch.setattr(doctor, "_RENDER", "import os; os.abort()")
        assert doctor._rendering_fault("egl") == "exit code -6"
        monkeypatch.setattr(doctor, "_RENDER_TIMEOUT_S", 0.2)
        monkeypatch.setattr(doctor, "_RENDER", "import time; time.sleep(60)")
        assert doctor._rendering_fault("egl") == "no image within 0.2 s"

    def test_a_backend_that_does_not_exist(self):
        pytest.importorskip("mujoco")
        assert "nonsense" in doctor._rendering_fault("nonsense")


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
        monkeypatch.setattr(doctor, "filesystem_type", lambda folder: kind)
        monkeypatch.setattr(doctor, "free_bytes", lambda folder: int(free_gib * 2**30))
        found, text = only(doctor.check_disk(tmp_path / "runs", elsewhere=elsewhere))
        assert found == level
        assert part in text
        assert f"runs_dir={tmp_path / 'runs'}" in text
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc, where nobody can write")
    def test_nobody_may_write_there(self):
        level, text = only(doctor.check_disk(Path("/proc/runs"), elsewhere=False))
        assert level == PROBLEM
        assert "cannot be written" in text


class TestWandb:
    @pytest.fixture(autouse=True)
    def _installed(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_spec", lambda name: object())

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
        monkeypatch.setattr(doctor, "offline_reason", lambda: reason)
        found, text = only(doctor.check_wandb(Config(logger=LoggerConfig(kind=kind, mode=mode))))
        assert found == level
        assert part in text

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(doctor, "find_spec", lambda name: None)
        assert only(doctor.check_wandb(Config()))[0] == OK
        level, text = only(doctor.check_wandb(Config(logger=LoggerConfig(kind="wandb"))))
        assert level == PROBLEM
        assert "pip install" in text


def test_versions():
    level, text = only(doctor.check_packages())
    assert level == OK
    assert f"torch {torch.__version__}" in text
