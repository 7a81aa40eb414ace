"""User-facing errors. Each message states what was found, what was expected, where it is set and the remedy."""

import re

LONGEST = 600
"""Maximum length of a message about user input, in characters."""


def shorten(text: str, most: int = 120) -> str:
    """Return `text` on one line; the middle is cut out if it is longer than `most` characters."""
    text = " ".join(text.split())
    if len(text) <= most:
        return text
    head = (most - 5) * 2 // 3
    return f"{text[:head]} ... {text[len(text) - (most - 5 - head) :]}"


def quoted(value: object, most: int = 80) -> str:
    """Return a short representation of a user-supplied value, at most `most` characters."""
    try:
        return f"`{shorten(value, most)}`" if isinstance(value, str) else shorten(repr(value), most)
    except RecursionError:
        return "a deeply nested value"


def hide_passwords(text: str) -> str:
    """Return the text with the account of every address (`//user:password@host`) replaced by `***`."""
    return re.sub(r"//[^/@\s]+@", "//***@", text)


class AcpoError(Exception):
    """Base class of errors that a user can cause or resolve; the command line prints only the message."""

    exit_code = 1


class UsageError(AcpoError):
    """The request is invalid; nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or override is wrong. The message has at most `LONGEST` characters."""

    def __init__(self, message: str) -> None:
        """Shorten the message, and remove passwords of addresses."""
        message = hide_passwords(message)
        super().__init__(message if len(message) <= LONGEST else shorten(message, LONGEST))


class ModelError(UsageError):
    """A model folder or hub id cannot be read or is incompatible."""


class DataError(UsageError):
    """A data file is missing, unreadable or lacks a column."""


class VrgError(UsageError):
    """A VRG error table, trajectory or solver is unreadable, invalid, or incompatible with the scheduler."""


class RewardConfigError(UsageError):
    """A reward cannot be built or cannot be used in its role."""


class PlacementError(UsageError):
    """The cluster lacks the resources that the configuration requires."""


class SoftwareError(UsageError):
    """A machine of the cluster runs a different version of the code or of a library than the driver."""


class ResumeError(UsageError):
    """A run cannot be resumed from the given checkpoint."""


class RewardError(AcpoError):
    """A reward was not returned within its deadline, or is not finite."""


class RunTakenError(AcpoError):
    """Another process holds the run lock."""


class WeightSyncError(AcpoError):
    """A worker does not hold the published weights."""


class NonFiniteError(AcpoError):
    """A loss or gradient is not finite; the affected weights were not published."""


class DeviceMemoryError(AcpoError):
    """A rollout, a learner or a decoder ran out of memory; earlier checkpoints are intact."""


class WorkerError(AcpoError):
    """A worker process died or did not respond within its deadline."""


class WorkerLostError(WorkerError):
    """Processes or machines that the run requires were lost; the run can resume from its newest saved state."""


class LearnerLostError(WorkerLostError):
    """Learner ranks were lost; the other workers may still run."""


class StorageError(AcpoError):
    """The disk is full or unavailable; earlier checkpoints are intact."""


class CheckpointError(AcpoError):
    """A checkpoint is incomplete or damaged."""
