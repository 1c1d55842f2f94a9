"""What tests of refused settings check of each of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pytest

from pwm_torchrl.cli.compose import compose
from pwm_torchrl.errors import ConfigurationError


def assert_refused(words: Sequence[str], parts: Iterable[str]) -> None:
    """Settings do not compose, and one line contains all ``parts``, such as the key, the value and what to do."""
    with pytest.raises(ConfigurationError) as caught:
        compose(words)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for part in parts:
        assert part in message
