"""Runs without their picture."""

from __future__ import annotations

from training_cases import no_curves

__all__ = ["no_curves"]
