"""Imports users' code by dotted path: environments, dynamics, tasks. Of this package, it imports only ``errors``."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, nearest, said

__all__ = ["load_module", "locate", "make_cwd_importable"]


def make_cwd_importable() -> None:
    """Add the working directory to ``sys.path``, so that ``env._target_=my_pkg.make_env`` finds a package in it."""
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def load_module(key: str, value: str, name: str) -> ModuleType:
    """Import the module that a setting names. Modules in the working directory are found too.

    Args:
        key (str): the setting, for messages.
        value (str): its value, for messages.
        name (str): the module's name.

    Raises:
        ConfigurationError: if the module does not exist or cannot be imported.
        MissingLibraryError: if it needs a library that is not installed.
    """
    make_cwd_importable()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigurationError(f"{key}={value!r}: there is no module {error.name!r}") from error
        raise MissingLibraryError(f"{key}={value!r} needs {error.name}, which is not installed") from error
    except Exception as error:  # a user's module may raise anything
        raise ConfigurationError(f"{key}={value!r}: importing {name} raised {said(error)}") from error


def locate(key: str, path: str) -> Any:
    """The object at a dotted path. Modules in the working directory are found too.

    Args:
        key (str): the setting that holds the path, for messages.
        path (str): the path, such as ``"my_package.make_env"``.

    Raises:
        ConfigurationError: if the module does not exist, cannot be imported, or has no such attribute.
        MissingLibraryError: if the module needs a library that is not installed.
    """
    module_name, _, attribute = path.rpartition(".")
    if not module_name:
        raise ConfigurationError(f"{key}={path!r} is not a dotted path like my_package.make_env")
    module = load_module(key, path, module_name)
    if not hasattr(module, attribute):
        near = nearest(attribute, dir(module))
        raise ConfigurationError(
            f"{key}={path!r}: {module_name} has no {attribute!r}" + (f", did you mean {near}?" if near else "")
        )
    return getattr(module, attribute)
