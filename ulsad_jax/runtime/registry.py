"""Finds the objects that a config names: built-in ones or the user's own.

A module declares its objects in an upper-case variable, such as
`METHODS = {"padim": Padim}`; no other list exists. A config names a built-in object
by its key, and any other object as "module:attribute".
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ulsad_jax.runtime.errors import UserError, suggest


@functools.cache
def collect(package: str, attribute: str) -> Mapping[str, Any]:
    """Returns the objects that the modules of a package declare, by name.

    Args:
        package: full name of a package. Its modules and sub-packages are imported, but
            not the modules inside the sub-packages.
        attribute: name of the modules' variable that maps names to objects, such as
            "METHODS"; a module may lack it.
    """
    found: dict[str, Any] = {}
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        imported = importlib.import_module(f"{package}.{module.name}")
        found |= getattr(imported, attribute, {})
    return MappingProxyType(found)


def find(reference: str, known: Mapping[str, Any], *, field: str) -> Any:
    """Returns the object that a config's field names.

    Args:
        reference: a key of `known`, or "module:attribute".
        known: built-in objects by name.
        field: path of the field, such as "config.method", for messages.

    Raises:
        UserError: there is no such object; the message lists the known names.
    """
    if reference in known:
        return known[reference]
    module, _, attribute = str(reference).partition(":")
    if not (module and attribute):
        raise UserError(
            f"Expected {field} to be one of {', '.join(known)}, or your own as "
            f"module:attribute, found {reference!r}. Set it with --{field}=..."
            f"{suggest(str(reference), known)}"
        )
    advice = (
        f"Run from the folder that holds {module.split('.')[0]}, or put it on "
        "PYTHONPATH."
    )
    try:
        imported = importlib.import_module(module)
        names = set(dir(imported)) - {attribute}
        advice = f"Correct the name, or the file.{suggest(attribute, names)}"
        return getattr(imported, attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"Expected {field} = {reference!r} to be importable, found: {error}. "
            f"{advice}"
        ) from error
