"""Errors a user can act on. Each message names the field, file or rank and says what to do."""


class OuroError(Exception):
    """Base of all expected errors: the command prints the message without a traceback."""

    exit_code = 1


class RecipeError(OuroError):
    """A recipe that cannot run. Lists every problem found, one a line."""

    exit_code = 2


class DataError(OuroError):
    """Training data that is missing, cut short or does not fit the recipe."""

    exit_code = 3


class CheckpointError(OuroError):
    """A checkpoint that is missing, incomplete, corrupt or of another model."""

    exit_code = 4


class TrainingError(OuroError):
    """Training cannot go on: numbers that are not finite, a dead or stalled rank."""

    exit_code = 5
    reported = False
    """Already said where people see it."""


class RankGone(TrainingError):
    """Ranks that are no longer there; `last_seen` says where each was."""

    def __init__(self, message: str, last_seen: dict[int, str]) -> None:
        super().__init__(message)
        self.last_seen = last_seen


class AnotherRankFailed(TrainingError):
    """Not this rank's fault: the one that failed, or the one that noticed, says why."""

    def __init__(self) -> None:
        super().__init__("another rank failed")


class MetricsError(OuroError):
    """A run folder whose metrics are missing or cannot be read."""

    exit_code = 6


class DashboardError(OuroError):
    """A dashboard that cannot be written or that the server does not take."""

    exit_code = 6


class ClusterError(OuroError):
    """Jobs that cannot be submitted as they are. Lists every problem found, one a line."""

    exit_code = 8


class DoctorError(OuroError):
    """A machine that lacks something it was asked to have."""

    exit_code = 1


class RequestError(OuroError):
    """A request for text that cannot be served as it is: a prompt too long, a setting out of range."""

    exit_code = 2

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field
        """The request's field at fault, for the server's error object."""


class InferenceError(OuroError):
    """Generation cannot go on: a tensor-parallel rank died, a port is taken."""

    exit_code = 7


STOPPED_EXIT_CODE = 75
"""A run that saved and left because it was told to (TERM, USR1): submit it again to go on (EX_TEMPFAIL)."""
