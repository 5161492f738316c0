"""What an operator has ordered of a running service, which holds until it is ordered otherwise.

Workers that start later are told too, and so is the program that takes the service over, by a reload or an upgrade.
"""

from __future__ import annotations

from typing import Any

from harken import events
from harken.errors import ConfigError
from harken.settings import Settings

__all__ = ["STANDING", "Orders", "heeded", "with_order"]

# By verb, with the verb's arguments.
Orders = dict[str, dict[str, Any]]

STANDING = frozenset({"suspend", "resume", "configure"})
"""The verbs that are such orders."""


def with_order(orders: Orders, verb: str, arguments: dict[str, Any]) -> Orders:
    """Return the orders with one more: settings add up, and of those that undo one another the newest holds."""
    if verb == "configure":
        return {**orders, verb: orders.get(verb, {}) | arguments}
    return {each: known for each, known in orders.items() if each == "configure"} | {verb: arguments}


def heeded(orders: Orders, settings: Settings) -> Orders:
    """Follow the orders that another program was given, as far as this one knows what they speak of.

    Args:
        orders: of which those that change settings are obeyed.
        settings: the service's.

    Returns:
        The orders that hold here.
    """
    changes = {}
    for name, value in orders.get("configure", {}).items():
        try:
            settings.configure({name: value})
            changes[name] = value
        except ConfigError as error:  # another version of this program
            events.emit("reload_failed", what="a live setting", reason=str(error))
    rest = {verb: arguments for verb, arguments in orders.items() if verb != "configure"}
    return rest | ({"configure": changes} if changes else {})
