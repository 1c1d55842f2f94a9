"""Fixtures for the tests of distributed runs."""

from __future__ import annotations

from training_cases import no_curves

__all__ = ["no_curves"]
