"""Hydra finds this module by itself and thereby the ``pwm_*`` entries of TorchRL's config groups."""

from __future__ import annotations

import sys

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

TORCHRL_CONFIGS = "torchrl.trainers.algorithms.configs"


class PWMSearchPath(SearchPathPlugin):
    """Registers this package's entries in programs that have imported TorchRL's; all others are left alone.

    A script imports TorchRL's configurations before its ``@hydra.main`` runs, which is when Hydra asks. To import
    them here would cost every Hydra program of this environment the seconds that torch takes.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Nothing is added to the path: the entries are in the ConfigStore, which every program searches last."""
        if TORCHRL_CONFIGS in sys.modules:
            from pwm_torchrl.configs import register

            register()
