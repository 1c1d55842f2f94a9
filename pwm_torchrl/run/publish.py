"""Publishing a run's networks: as a folder, as W&B artifacts, and on the Hugging Face hub with a model card."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pwm_torchrl.config import Config
from pwm_torchrl.errors import ConfigurationError
from pwm_torchrl.run.artifacts import write_atomically
from pwm_torchrl.run.directory import CONFIG_FILE, load_config, read_summary
from pwm_torchrl.run.export import EXPORT_FILE, foreign_names, hub_message, require_hub, write_export
from pwm_torchrl.run.load import load_checkpointed
from pwm_torchrl.run.loggers import RunLoggers

__all__ = ["export_run", "log_artifacts", "model_card", "push_run"]

#: Files of a run that are uploaded to the hub with its networks.
_SHOWN = ("curves.png", "video.mp4", "metrics.csv")
_MEGABYTE = 1e6
#: Folder in a run directory for the networks that W&B uploads, at once or in a later `wandb sync`.
NETWORKS = Path("wandb") / "networks"


def export_run(run: Path, folder: Path, which: str | int = "best") -> list[Path]:
    """Exports the trained networks of a run as a folder, which :func:`~pwm_torchrl.load_policy` can read.

    Args:
        run (Path): run directory with a checkpoint.
        folder (Path): the folder to create.
        which (str or int): checkpoint: ``"best"``, ``"last"`` or the number of an epoch. Defaults to ``"best"``.

    Returns:
        list of Path: the files.

    Raises:
        ConfigurationError: if ``run`` is not a run directory, has no such checkpoint, or is a pre-training.
        MissingLibraryError: if safetensors is not installed.
    """
    cfg, networks, facts, epoch = load_checkpointed(run, which)
    return write_export(folder, cfg, networks, facts, epoch, read_summary(run))


def log_artifacts(loggers: RunLoggers, run: Path, summary: Mapping[str, Any]) -> None:
    """Logs the best policy and the world model of a finished run to W&B, each as a version of an artifact.

    Args:
        loggers (RunLoggers): loggers that include a W&B logger.
        run (Path): run directory.
        summary (mapping): content of its ``summary.json``, shown beside the artifacts.
    """
    assert loggers.wandb is not None
    name = loggers.wandb.experiment.id
    shown = ("env", "model", "size", "seed", "peak_return", "final_return", "best_validation_loss", "git_commit")
    metadata = {key: summary[key] for key in shown if summary.get(key) is not None}
    trained = run / "world_model"
    if trained.is_dir():
        files = sorted(file for file in trained.iterdir() if file.is_file())
        loggers.log_artifact(f"world-model-{name}", "world-model", files, metadata)
        return
    folder = run / NETWORKS
    files = [file for file in export_run(run, folder) if file.parent == folder]
    metadata["epoch"] = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))["epoch"]
    loggers.log_artifact(f"policy-{name}", "policy", files, metadata)
    of_model = [file for file in files if file.name in (CONFIG_FILE, EXPORT_FILE, "model.safetensors")]
    if any(file.suffix == ".safetensors" for file in of_model):
        loggers.log_artifact(f"world-model-{name}", "world-model", of_model, metadata)


def push_run(
    run: Path, repository: str, which: str | int = "best", *, private: bool = False, message: str | None = None
) -> str:
    """Uploads a run's networks, configuration, metrics, curves, video and a model card to the Hugging Face hub.

    Args:
        run (Path): run directory with a checkpoint.
        repository (str): ``ORG/NAME``; created if it does not exist.
        which (str or int): checkpoint, as for :func:`export_run`. Defaults to ``"best"``.

    Keyword Args:
        private (bool): whether a repository that is created is private. Defaults to ``False``.
        message (str, optional): message of the commit. Defaults to the run's name.

    Returns:
        str: address of the commit.

    Raises:
        ConfigurationError: if ``run`` cannot be exported, or the hub refuses the upload.
        MissingLibraryError: if huggingface_hub or safetensors is not installed.
    """
    hub = require_hub()
    with tempfile.TemporaryDirectory(prefix="pwm_torchrl-push-") as name:
        folder = Path(name)
        export_run(run, folder, which)
        for shown in _SHOWN:
            if (run / shown).is_file():
                shutil.copy(run / shown, folder / shown)
        write_atomically(folder / "README.md", model_card(run, folder, repository))
        try:
            api = hub.HfApi()
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repository, folder_path=folder, commit_message=message or f"Run {run.resolve().name}"
            )
        except (hub.errors.HfHubHTTPError, hub.errors.HFValidationError, hub.errors.LocalTokenNotFoundError) as error:
            raise ConfigurationError(
                f"cannot upload to {repository}: {hub_message(error)}; check that HF_TOKEN or `hf auth login` has a "
                "token with write access"
            ) from error
    return str(done.commit_url)


def model_card(run: Path, folder: Path, repository: str) -> str:
    """The README of an exported run: its description, results, settings and usage.

    Args:
        run (Path): the run's directory.
        folder (Path): the folder to which it was exported.
        repository (str): ``ORG/NAME``, for the code that loads it.
    """
    cfg, summary = load_config(run), read_summary(run)
    exported = json.loads((folder / EXPORT_FILE).read_text(encoding="utf-8"))
    env = summary.get("env") or cfg.env.get("name")
    results = _results(summary)
    front = [
        "---",
        "library_name: pwm_torchrl",
        "pipeline_tag: reinforcement-learning",
        "tags: [reinforcement-learning, world-model, torchrl, pwm]",
        *_model_index(repository, str(env), summary),
        "---",
    ]
    body = [
        f"# {env}: {cfg.model.name}, {cfg.size.name}",
        "",
        f"A policy for **{env}**, trained by back-propagation through a learned world model (PWM, "
        "[arXiv 2407.02466](https://arxiv.org/abs/2407.02466)) with pwm_torchrl.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in {**results, **_facts(cfg, summary, exported, folder)}.items()),
        "",
        *(["![Curves](curves.png)", ""] if (folder / "curves.png").is_file() else []),
        *(["An episode: [video.mp4](video.mp4).", ""] if (folder / "video.mp4").is_file() else []),
        "## Use",
        "",
        "```python",
        "from pwm_torchrl import load_policy, load_world_model",
        "",
        f'policy = load_policy("hf://{repository}"{_trust(cfg)})  # TensorDictModule: observation -> action',
        f'world_model = load_world_model("hf://{repository}"{_trust(cfg)})  # torchrl.modules.WorldModel',
        "```",
        "",
        "Actions are in the environment's own units; the policy acts without noise.",
        "",
        "## Files",
        "",
        "| file | content |",
        "|---|---|",
        "| `model.safetensors`, `actor.safetensors`, `critic.safetensors` | weights |",
        "| `config.yaml` | the run's whole configuration |",
        "| `pwm_torchrl.json` | epoch and dimensions |",
        "| `summary.json`, `metrics.csv` | results, and a row of metrics per epoch |",
        "",
    ]
    return "\n".join([*front, "", *body])


def _results(summary: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    if isinstance(summary.get("final_return"), (int, float)):
        spread = summary.get("final_return_std")
        found["final return"] = f"{summary['final_return']:.1f}" + (f" ± {spread:.1f} over episodes" if spread else "")
    for key in ("peak_return", "random_return"):
        if isinstance(summary.get(key), (int, float)):
            found[key.replace("_", " ")] = f"{summary[key]:.1f}"
    return found


def _facts(cfg: Config, summary: Mapping[str, Any], exported: Mapping[str, Any], folder: Path) -> dict[str, str]:
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    commit, versions = summary.get("git_commit"), summary.get("versions") or {}
    return {
        "status of the run": str(summary.get("status", "unknown")),
        "checkpoint": f"epoch {exported['epoch']} of {cfg.training.epochs}",
        "environment steps of the run": f"{summary.get('env_steps') or 0:,}",
        "seed": str(cfg.seed),
        "latent dynamics": cfg.model.dynamics.kind,
        "weights": f"{weights / _MEGABYTE:.1f} MB",
        "wall-clock time": f"{(summary.get('wall_clock_s') or 0) / 3600:.2f} h",
        **({} if commit is None else {"commit": f"`{commit}`"}),
        **({} if not versions else {"versions": ", ".join(f"{name} {number}" for name, number in versions.items())}),
    }


def _model_index(repository: str, env: str, summary: Mapping[str, Any]) -> list[str]:
    """Results in the hub's ``model-index`` format."""
    value = summary.get("final_return")
    if not isinstance(value, (int, float)):
        return []
    return [
        "model-index:",
        f"- name: {json.dumps(repository.rpartition('/')[2])}",
        "  results:",
        "  - task: {type: reinforcement-learning, name: Reinforcement Learning}",
        f"    dataset: {{name: {json.dumps(env)}, type: {json.dumps(env)}}}",
        f"    metrics: [{{type: mean_reward, name: mean return, value: {value:.2f}}}]",
    ]


def _trust(cfg: Config) -> str:
    """The additional argument for loading a configuration that names code of other packages, else empty."""
    return ", trust_remote_code=True" if any(True for _ in foreign_names(cfg)) else ""
