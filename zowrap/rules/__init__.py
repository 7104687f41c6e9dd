"""Define the update rules, one per file, and the registry of them.

``base``          defines the protocol of a rule
``estimators``    lists the points of a step and turns their losses into projected gradients
``registry``      looks rules up by name (``get``) and adds yours (``register``)
``entry``         defines one line of the registry
``validation``    checks a constructor before it is registered
``entry_points``  loads the rules of installed packages
``plugins``       loads rules from your own files and modules
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
