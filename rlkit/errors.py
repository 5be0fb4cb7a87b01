"""Everything rlkit raises on purpose. `cli.py` prints these without a traceback and exits with their code."""


class RlkitError(Exception):
    """A failure whose message is one sentence: what (key or component), the value or cause found, what to do."""

    exit_code = 1


class ConfigError(RlkitError):
    """A setting is unknown, of the wrong type, out of range, or clashes with another."""

    exit_code = 2


class DataError(RlkitError):
    """A data set, a row, a reward's contract or a stored file is not what the run needs."""

    exit_code = 2


class ResourceError(RlkitError):
    """The machine or cluster lacks something: cores, memory, disk, a package."""

    exit_code = 3


class WorkerError(RlkitError):
    """A component died, hung past its deadline, or used up its failure budget."""

    exit_code = 4

    def __init__(self, message: str, *, worker: str = ""):
        """`worker`: whose failure it is, where the message says so; it is said once, by whoever hears of it first."""
        super().__init__(message)
        self.worker = worker


class SyncError(WorkerError):
    """An engine does not hold the learner's weights after a sync."""


class EngineLostError(SyncError):
    """An engine whose weights are half an old version and half a new one: whoever needs one must start another."""


class RewardError(WorkerError):
    """Too many rewards failed for the run to mean anything."""


class NumericalError(RlkitError):
    """The optimisation itself broke: non-finite loss or gradient, several steps in a row."""

    exit_code = 5


class Preempted(RlkitError):
    """The run was asked to stop, and saved what it needs to go on (EX_TEMPFAIL)."""

    exit_code = 75
