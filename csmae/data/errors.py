"""Errors of archives; each text says which file, what was found and what to do."""

from csmae.config import ConfigError


class ArchiveError(ConfigError):
    """An archive cannot be used."""


class DamagedValueError(ArchiveError):
    """A stored value is damaged."""


class BandTypeError(DamagedValueError):
    """A stored value has bands of another type; if most values do, the whole archive is of another kind."""
