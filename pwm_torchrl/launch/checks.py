"""Checks of a machine before anything runs on it: each gives lines that say what was found and what to do."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pwm_torchrl.commands import named
from pwm_torchrl.config import Config
from pwm_torchrl.data.files import MEMORY_FILESYSTEMS, existing, filesystem_type, free_bytes, write_durably

__all__ = [
    "OK",
    "PROBLEM",
    "WARNING",
    "Finding",
    "check_disk",
    "check_gpu",
    "check_packages",
    "check_rendering",
    "check_wandb",
]

OK, WARNING, PROBLEM = "ok", "warning", "problem"

#: Free space below which a run will hardly finish, and below which a replay on disk or videos may not fit.
NO_ROOM_GB, LITTLE_ROOM_GB = 1.0, 10.0
#: File systems that belong to one machine.
_OF_ONE_MACHINE = ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "f2fs", "apfs")
_RENDER_TIMEOUT_S = 120
_RENDER = """
import mujoco
model = mujoco.MjModel.from_xml_string('<mujoco><worldbody><light pos="0 0 3"/><geom size="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 32, 32)
renderer.update_scene(data)
assert renderer.render().any(), "the picture is black"
renderer.close()
"""


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        level: ``ok``, ``warning`` (it works, less well) or ``problem`` (it does not).
        subject: what was looked at, a word or two.
        text: what was found, and what to do.
    """

    level: str
    subject: str
    text: str


def check_packages() -> list[Finding]:
    """Versions, for whoever is asked for help."""
    names = ("pwm-torchrl", "torch", "torchrl", "tensordict", "submitit")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed" if name != "pwm-torchrl" else "pwm-torchrl from a checkout")
    return [Finding(OK, "versions", f"Python {platform.python_version()}, {', '.join(found)}")]


def check_gpu(config: Config, *, elsewhere: bool) -> list[Finding]:
    """Whether PyTorch can use the GPUs of this machine, where it has any.

    Args:
        config (Config): its ``device`` may need one.
        elsewhere (bool): whether jobs run on other machines, so that this one may do without.
    """
    import torch

    if torch.cuda.is_available():
        return [_try_gpu(number) for number in range(torch.cuda.device_count())]
    here = _listed_gpus()
    if here:
        why = (
            f"this PyTorch, {torch.__version__}, is built without CUDA; install a CUDA build"
            if torch.version.cuda is None
            else f"PyTorch's CUDA {torch.version.cuda} does not start on this driver; update the driver"
        )
        return [Finding(PROBLEM, "GPU", f"{here[0]} is here, but {why}")]
    if config.device.startswith("cuda") and not elsewhere:
        return [Finding(PROBLEM, "GPU", f"device={config.device} needs one and there is none; set device=cpu or auto")]
    jobs = "jobs get theirs on the nodes" if elsewhere else "runs use the CPU"
    return [Finding(OK, "GPU", f"none on this machine; {jobs}")]


def _try_gpu(number: int) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(number)
    name = f"cuda:{number} {properties.name}, {properties.total_memory / 1e9:.0f} GB, CUDA {torch.version.cuda}"
    try:
        torch.ones(8, device=f"cuda:{number}").sum().item()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        return Finding(PROBLEM, "GPU", f"{name} does not calculate ({reason}); free it, or set another device=cuda:N")
    return Finding(OK, "GPU", name)


def _listed_gpus() -> list[str]:
    """GPUs that the driver lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    try:
        answer = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except subprocess.TimeoutExpired:
        return []
    lines = answer.stdout.splitlines() if answer.returncode == 0 else []
    return [line.partition(": ")[2].partition(" (UUID")[0] for line in lines if line.startswith("GPU ")]


def check_rendering() -> list[Finding]:
    """Whether MuJoCo draws without a display, in a process of its own: a broken driver may end it."""
    if find_spec("mujoco") is None:
        return [
            Finding(OK, "rendering", "MuJoCo is not installed; pip install 'pwm-torchrl[mujoco]' where it is needed")
        ]
    chosen = os.environ.get("MUJOCO_GL")
    failures = {}
    for backend in [chosen] if chosen else ["egl", "osmesa"]:
        reason = _rendering_fault(backend)
        if reason is None and (chosen or backend == "egl"):
            return [Finding(OK, "rendering", f"MuJoCo draws without a display, MUJOCO_GL={backend}")]
        if reason is None:
            text = "MuJoCo draws with OSMesa, not with EGL; export MUJOCO_GL=osmesa before starting, or install libegl1"
            return [Finding(WARNING, "rendering", text)]
        failures[backend] = reason
    said = "; ".join(f"{backend}: {reason}" for backend, reason in failures.items())
    advice = "install libegl1, or libosmesa6 with MUJOCO_GL=osmesa, or set training.video=false"
    if chosen:  # dm_control fails to load then, not only to draw
        return [Finding(PROBLEM, "rendering", f"MUJOCO_GL={chosen} does not work ({said}); unset it, or {advice}")]
    return [Finding(WARNING, "rendering", f"MuJoCo cannot draw here ({said}); {advice}")]


def _rendering_fault(backend: str) -> str | None:
    """Why MuJoCo does not draw with a backend; ``None`` if it does."""
    environment = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", _RENDER]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_RENDER_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"no picture in {_RENDER_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    # What a destructor complains about afterwards is not the reason.
    lines = [line for line in done.stderr.splitlines() if ("Error" in line or "error" in line) and line[:1].strip()]
    return lines[0][:160] if lines else f"it ended with {done.returncode}"


def check_disk(folder: Path, *, elsewhere: bool) -> list[Finding]:
    """The file system of the runs: whether it can be written to, lasts, is seen by other machines, and has room.

    Args:
        folder (Path): where runs are created; it need not exist yet.
        elsewhere (bool): whether jobs run on other machines, which must see it.
    """
    place = existing(folder)
    kind = filesystem_type(folder) or "unknown"
    where = f"runs_dir={folder} ({kind})"
    try:
        with tempfile.TemporaryDirectory(dir=place, prefix=".doctor_") as probe:
            write_durably(Path(probe) / "file", "x")
        free = free_bytes(folder)
    except OSError as error:
        text = f"{where} cannot be written: {error.strerror or error}; set runs_dir to another folder"
        return [Finding(PROBLEM, "disk", text)]
    findings = []
    if kind in MEMORY_FILESYSTEMS:
        findings.append(Finding(PROBLEM, "disk", f"{where} is RAM and ends with the machine; set runs_dir to a disk"))
    elif elsewhere and kind in _OF_ONE_MACHINE:
        text = f"{where} is usually a disk of this machine alone; set runs_dir to a folder that the nodes see too"
        findings.append(Finding(WARNING, "disk", text))
    room = f"{free / 1e9:.1f} GB free"
    if free < NO_ROOM_GB * 1e9:
        findings.append(Finding(PROBLEM, "disk", f"{where}: {room}; free space or set runs_dir to another disk"))
    elif free < LITTLE_ROOM_GB * 1e9:
        text = f"{where}: {room}; a replay on disk may need more, {named('plan')} tells how much"
        findings.append(Finding(WARNING, "disk", text))
    elif not findings:
        findings.append(Finding(OK, "disk", f"{where}: {room}, quotas apart"))
    return findings


def check_wandb(config: Config) -> list[Finding]:
    """Whether Weights & Biases could log online."""
    asked = config.logger.kind == "wandb" and config.logger.mode != "disabled"
    if find_spec("wandb") is None:
        if asked:
            return [Finding(PROBLEM, "W&B", "logger=wandb needs it: pip install 'pwm-torchrl[wandb]'")]
        return [Finding(OK, "W&B", "not installed, and not asked for")]
    from pwm_torchrl.training.loggers import offline_reason

    reason = offline_reason()
    if reason is None:
        return [Finding(OK, "W&B", "there is a key, and the server can be reached")]
    if not asked:
        return [Finding(OK, "W&B", f"not asked for; it would log offline, because {reason}")]
    if config.logger.mode == "online":
        return [Finding(PROBLEM, "W&B", f"logger.mode=online, but {reason}; log in, or set logger.mode=auto")]
    if config.logger.mode == "offline":
        return [Finding(OK, "W&B", "logs offline, as asked for; `wandb sync` uploads it")]
    return [Finding(WARNING, "W&B", f"it will log offline, because {reason}; `wandb sync` uploads it later")]
