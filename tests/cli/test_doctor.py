"""``launch/doctor.py``: options, lines and exit codes, and the profile that it drafts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from datetime import date
from functools import partial
from pathlib import Path

import pytest

pytest.importorskip("hydra")

from slurm_texts import SITE

from pwm_torchrl.cli import doctor
from pwm_torchrl.cli.compose import compose
from pwm_torchrl.cli.doctor import OK, PROBLEM, WARNING, Finding, draft_profile, profile_file, write_profile
from pwm_torchrl.cli.entry import run_command
from pwm_torchrl.cluster.resources import JobRequest, why_impossible
from pwm_torchrl.cluster.slurm import Node, Partition
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
