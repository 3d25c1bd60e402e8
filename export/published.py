"""The published Llamas as data: what their config.json says, where they are, how large they are, under which licence.

It stands in `export/`, which knows what a config.json is. `targets/` may not look here, and needs not: the commands
hand its planner the numbers of a model (`targets.context.Load`), whether from a checkpoint or from this list.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_DATA = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Published:
    """One published size. hub: its id there; parameters: trained values; licence: the hub's id for it, such as
    "llama3.1"; config: the content of its config.json, as `config.check_config` takes it.
    """

    hub: str
    parameters: int
    licence: str
    config: Mapping[str, Any]


@cache
def published() -> Mapping[str, Published]:
    """Every published size by its name (`llama-3.1-405b`), oldest family first."""
    data = tomllib.loads(_DATA.read_text(encoding="utf-8"))

    def one(model: Mapping[str, Any]) -> Published:
        family = data["families"][model["family"]]
        config = {**data["common"], **family["config"], **model["config"]}
        return Published(model["hub"], model["parameters"], family["licence"], MappingProxyType(config))

    return MappingProxyType({name: one(model) for name, model in data["models"].items()})


def published_configs() -> Mapping[str, dict[str, Any]]:
    """The content of every published size's config.json by its name, to be changed at will."""
    return {name: copy.deepcopy(dict(model.config)) for name, model in published().items()}
