"""Stock models of the suite with changes. Imports dm_control; loaded by the custom tasks only."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from dm_control.suite import common

__all__ = ["element", "physics_of", "stock_model", "widen_floor"]


def stock_model(domain: str) -> ElementTree.Element:
    """The suite's model of a domain, to be changed."""
    return ElementTree.fromstring(common.read_model(f"{domain}.xml"))


def element(model: ElementTree.Element, tag: str, name: str) -> ElementTree.Element:
    """The element of a model with a tag and a name.

    Raises:
        LookupError: if the model has none: it is not the one that the changes were written for.
    """
    found = model.find(f".//{tag}[@name='{name}']")
    if found is None:
        raise LookupError(f"dm_control's model has no {tag} called {name!r}: install dm_control==1.0.28")
    return found


def widen_floor(model: ElementTree.Element, name: str, length: str) -> None:
    """Change the first of a floor plane's half sizes, for those who run the other way."""
    floor = element(model, "geom", name)
    floor.set("size", " ".join([length, *floor.attrib["size"].split()[1:]]))


def physics_of(kind: Any, model: ElementTree.Element) -> Any:
    """An instance of a domain's ``Physics`` class from a changed model."""
    return kind.from_xml_string(ElementTree.tostring(model, encoding="unicode"), common.ASSETS)
