"""What can go wrong because of what a user gave: one short message each, naming argument, expectation and value.

The command lines print the message on one line and exit with code 2.
"""


def reason(error: BaseException) -> str:
    """Another's exception on one line: its type and what it says."""
    return " ".join(f"{type(error).__name__}: {error}".split())


class UserError(ValueError):
    """The base of all of them."""


class ConfigError(UserError):
    """An option, a preset or a configuration key that does not exist or does not fit."""


class DataError(UserError):
    """A data set that cannot be read or does not fit the configuration."""


class CheckpointError(UserError):
    """A file of weights or of training state that is truncated, foreign or of another architecture."""


class DivergedError(UserError):
    """A loss or a weight is no longer finite: the configuration does not train."""


class LevelError(UserError):
    """Noise levels out of order or out of range, where they are Python numbers."""
