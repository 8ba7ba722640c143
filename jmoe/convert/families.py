"""The Hugging Face families: which one is which `config.Model`, and how it names its tensors.

A family is chosen by what a model is, never by what it is called.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jmoe import config
from jmoe.convert.mapping import Table


class NotRepresented(ValueError):
    """What of a model a family cannot say, in a few words."""


@dataclass(frozen=True)
class Family:
    """A model class of transformers."""

    model_type: str
    """`model_type` of its config.json"""
    architecture: str
    """the class, in `architectures` of its config.json"""
    table: Table
    """its names of the parameters"""
    to_json: Callable[[config.Model], dict[str, Any]]
    """the entries of config.json that say what the model is; raises NotRepresented"""
    from_json: Callable[[dict[str, Any]], config.Model]
    """the reverse; raises InputError for what jmoe lacks"""


FAMILIES: tuple[Family, ...] = ()
