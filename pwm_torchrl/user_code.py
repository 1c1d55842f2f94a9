"""Finding what a user wrote by its dotted path: environments, dynamics, tasks. Imports errors alone."""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType
from typing import Any

from pwm_torchrl.errors import ConfigurationError, MissingLibraryError, nearest, said

__all__ = ["load_module", "locate", "make_cwd_importable"]


def make_cwd_importable() -> None:
    """Lets ``env._target_=my_pkg.make_env`` find a package in the current folder, as ``python
    -m`` would.
    """
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())


def load_module(key: str, value: str, name: str) -> ModuleType:
    """Import a module that a setting names; the working directory counts as importable.

    Args:
        key (str): the setting, for messages.
        value (str): its value, likewise.
        name (str): of the module.

    Raises:
        ConfigurationError: if there is no such module, or it cannot be imported.
        MissingLibraryError: if it needs a library that is not installed.
    """
    make_cwd_importable()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise ConfigurationError(f"{key}={value!r}: there is no module {error.name!r}") from error
        raise MissingLibraryError(f"{key}={value!r} needs {error.name}, which is not installed") from error
    except Exception as error:  # whatever a user's module does when it is imported
        raise ConfigurationError(f"{key}={value!r}: importing {name} raised {said(error)}") from error


def locate(key: str, path: str) -> Any:
    """What lies at a dotted path; the working directory counts as importable.

    Args:
        key (str): the setting that names it, for messages.
        path (str): such as ``"my_package.make_env"``.

    Raises:
        ConfigurationError: if there is no such module, it cannot be imported, or it has nothing of that name.
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
