"""How a command ends: its exit statuses, and the mistakes that a user can mend, which end it with `USER_MISTAKE`."""

DONE = 0
USER_MISTAKE = 2
GAP_TOO_LARGE = 3
REHEARSAL_FAILED = 3
STOPPED_EARLY = 75
UNHEALTHY_HOSTS = 77
STOPPED_BY_GUARD = 78
INTERRUPTED = 130


class UserError(ValueError):
    """A mistake in configuration, data or arguments; the message names the key, the value, the rule and the remedy."""

    exit_status = USER_MISTAKE


class SharedError(UserError):
    """A mistake that every process knows of, whichever met it; the first tells the user."""


class GuardError(SharedError):
    """The training cannot go on without somebody who looks at it; every process knows why."""

    exit_status = STOPPED_BY_GUARD


class UnhealthyHostsError(SharedError):
    """Some hosts must not take part; every process knows which."""

    exit_status = UNHEALTHY_HOSTS
