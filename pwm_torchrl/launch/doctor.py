"""``launch/doctor.py``: whether this machine is fit for runs and a cluster profile fits SLURM; drafts a profile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pwm_torchrl.cluster.slurm import SlurmError, site, slurm_available
from pwm_torchrl.commands import typed, typed_here
from pwm_torchrl.config import Config
from pwm_torchrl.launch import console
from pwm_torchrl.launch.checks import (
    PROBLEM,
    Finding,
    check_disk,
    check_gpu,
    check_packages,
    check_rendering,
    check_wandb,
)
from pwm_torchrl.launch.compose import compose
from pwm_torchrl.launch.draft import draft_profile, profile_file, write_profile
from pwm_torchrl.launch.groups import user_configs_dir
from pwm_torchrl.launch.help import answered
from pwm_torchrl.launch.slurm_check import check_slurm
from pwm_torchrl.launch.words import DRAFT, FORCE, read_words
from pwm_torchrl.terminal import coloured

__all__ = ["main"]


@console.command
def main(argv: Sequence[str] | None = None) -> int:
    """Checks the machine for the runs that a command line describes, or drafts a cluster profile.

    Returns:
        The exit code: 0, 1 if there is a problem, 2 for bad input.
    """
    line = read_words("doctor", argv or ())
    if answered("doctor", line, _help):
        return console.OK
    force = FORCE in line.options
    if DRAFT in line.options:
        return _draft(line.options[DRAFT], line.settings, force=force)
    if force:
        raise console.ConfigurationError(f"{FORCE} writes over a draft; give {DRAFT} NAME too")
    found = _check(compose(line.settings))
    problems = sum(finding.level == PROBLEM for finding in found)
    if problems:
        console.error(f"{problems} problem{'s' * (problems > 1)}, see above")
    return console.FAILED if problems else console.OK


def _check(config: Config) -> list[Finding]:
    """Every check, said as soon as it is done."""
    slurm = slurm_available()
    elsewhere = config.cluster.kind == "slurm" or (config.cluster.kind == "auto" and slurm)
    checks = [
        check_packages,
        lambda: check_gpu(config, elsewhere=elsewhere),
        check_rendering,
        lambda: check_disk(Path(config.runs_dir).expanduser().absolute(), elsewhere=elsewhere),
        lambda: check_slurm(config.cluster, available=slurm),
        lambda: check_wandb(config),
    ]
    found = []
    for check in checks:
        for finding in check():
            console.say(f"{coloured(f'{finding.level:<8}')} {finding.subject:<10} {finding.text}")
            found.append(finding)
    return found


def _draft(name: str, words: Sequence[str], *, force: bool) -> int:
    file = profile_file(name)
    partition = compose(words).cluster.partition
    if not slurm_available():
        raise SlurmError(f"{DRAFT} {name} asks SLURM, and this machine belongs to no cluster; run it on a login node")
    text = draft_profile(name, site(), partition)
    write_profile(file, text, force=force)
    console.say(text)
    console.say(f"written: {file}\ncheck it: {typed_here('doctor')} cluster={name}")
    return console.OK


def _help() -> str:
    doctor = typed("doctor")
    return f"""\
Say whether this machine is fit for runs: GPU, rendering, disk, SLURM and the cluster profile, W&B; or draft a profile.

usage: {doctor} [GROUP=CHOICE ...] [GROUP.KEY=VALUE ...]
       {doctor} --draft NAME [cluster.partition=PARTITION] [--force]

A line per check: ok, warning (works, less well) or problem (does not), and what to do.
The draft is written to
  {user_configs_dir() / "cluster" / "NAME.yaml"}
and is used by cluster=NAME. One that is there is kept without --force.

Examples:
  {doctor:<54} # this machine
  {doctor + " cluster=l40s logger=wandb":<54} # does the profile fit SLURM, would W&B work
  {doctor + " runs_dir=/scratch/me/runs":<54} # is that a good place for runs
  {doctor} --draft my_cluster cluster.partition=gpu

Exit codes: 0 no problem, 1 a problem, 2 bad input."""
