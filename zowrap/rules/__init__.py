"""Update rules, one file each, and the table of them.

``base``          the protocol of a rule
``estimators``    at which points a step evaluates the loss, and what projected gradients follow
``registry``      the table; ``get`` a rule by name, ``register`` one of your own
``entry``         one line of the table
``validation``    what a constructor must be like to be registered
``entry_points``  rules of installed packages
``plugins``       rules in files and modules of one's own
"""

from __future__ import annotations

from zowrap.rules.base import Choice, Probe, Rule, Scalars, Slot
from zowrap.rules.conmezo import conmezo
from zowrap.rules.entry import Entry
from zowrap.rules.fzoo import fzoo
from zowrap.rules.hizoo import hizoo
from zowrap.rules.lozo import lozo, lozo_m
from zowrap.rules.meazo import meazo
from zowrap.rules.radazo import radazo
from zowrap.rules.registry import ALIASES, REGISTRY, find, find_recorded, get, mezo, register
from zowrap.rules.sparse_mezo import sparse_mezo
from zowrap.rules.zo_adam import zo_adam
from zowrap.rules.zo_adamm import zo_adamm
from zowrap.rules.zo_rmsprop import zo_rmsprop
from zowrap.rules.zo_sgd import zo_sgd

__all__ = [
    "ALIASES",
    "REGISTRY",
    "Choice",
    "Entry",
    "Probe",
    "Rule",
    "Scalars",
    "Slot",
    "conmezo",
    "find",
    "find_recorded",
    "fzoo",
    "get",
    "hizoo",
    "lozo",
    "lozo_m",
    "meazo",
    "mezo",
    "radazo",
    "register",
    "sparse_mezo",
    "zo_adam",
    "zo_adamm",
    "zo_rmsprop",
    "zo_sgd",
]
