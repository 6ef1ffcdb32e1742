"""What a quirk says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Quirk:
    """One third-party quirk that was found and met.

    Attributes:
        name: short name, the name of the function that meets it.
        what: what was found and what was done.
        until: the version that makes the quirk unnecessary.
    """

    name: str
    what: str
    until: str
