"""Which networks a run trains, and in which updates."""

from __future__ import annotations

from pwm_torchrl.config import Config

#: Updates by the network that they train.
UPDATE_OF = {"world_model": "world-model", "actor": "policy", "critics": "critic"}


def trained_networks(cfg: Config) -> tuple[str, ...]:
    """Names of the networks that a run trains."""
    if cfg.mode == "pretrain":
        return ("world_model",)
    if cfg.mode == "extract" and not cfg.finetune:
        return ("actor", "critics")
    return ("world_model", "actor", "critics")


def updates_of(cfg: Config) -> tuple[str, ...]:
    """Names of the updates that a run makes."""
    return tuple(UPDATE_OF[name] for name in trained_networks(cfg))
