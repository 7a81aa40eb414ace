"""Errors for users. Each says what was expected, what was found, where it is set and what to do."""

LONGEST = 600
"""Most characters of a message about what a user typed."""


def shorten(text: str, most: int = 120) -> str:
    """`text` on one line, cut in the middle to at most `most` characters."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    head = (most - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


def quoted(value: object, most: int = 80) -> str:
    """A short representation of a value that a user typed."""
    try:
        return f"`{shorten(value, most)}`" if isinstance(value, str) else shorten(repr(value), most)
    except RecursionError:
        return "a deeply nested value"


class AcpoError(Exception):
    """Base of every error that a user can cause or must act on; the command line prints its text alone."""

    exit_code = 1


class UsageError(AcpoError):
    """Something the user asked for cannot be: nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or override is wrong. The message has at most `LONGEST` characters."""

    def __init__(self, message: str) -> None:
        """Shorten the message."""
        super().__init__(message if len(message) <= LONGEST else shorten(message, LONGEST))


class ModelError(UsageError):
    """A model folder or hub id cannot be read or does not fit."""


class DataError(UsageError):
    """A data file is missing, unreadable or lacks a column."""


class VrgError(UsageError):
    """A VRG error table, trajectory or solver cannot be read, is wrong, or does not fit the scheduler."""


class RewardConfigError(UsageError):
    """A reward cannot be built or does not fit its role."""


class PlacementError(UsageError):
    """The cluster cannot place what the configuration asks for."""


class SoftwareError(UsageError):
    """A machine of the cluster runs other code or libraries than the driver."""


class ResumeError(UsageError):
    """A run cannot be continued from the given place."""


class RewardError(AcpoError):
    """A reward could not be had within its deadline, or is not finite."""


class RunTakenError(AcpoError):
    """Another process drives the run now."""


class WeightSyncError(AcpoError):
    """A worker does not hold the weights that were published."""


class NonFiniteError(AcpoError):
    """A loss or gradient is not finite; no weight has left the learner."""


class DeviceMemoryError(AcpoError):
    """A rollout, a learner or a decoder ran out of memory; what was saved before is whole."""


class WorkerError(AcpoError):
    """A worker process died or did not answer in time."""


class WorkerLostError(WorkerError):
    """Processes or machines are gone that the run cannot do without; it can go on from its newest checkpoint."""


class StorageError(AcpoError):
    """The disk is full, or gone; what was saved before is whole."""


class CheckpointError(AcpoError):
    """A checkpoint is incomplete or damaged."""
