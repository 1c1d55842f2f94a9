"""PWM world models for TorchRL: latent dynamics, first-order policy learning, and the tools to run them.

Importing this package is light: submodules load on first use, and no environment library, Hydra or logger is imported.
"""

from __future__ import annotations

__version__ = "0.1.0"
