"""What ends a command with exit status 2: a mistake that the user can mend."""


class UserError(ValueError):
    """A mistake in configuration, data or arguments; the message names the key, the value, the rule and the remedy."""


class SharedError(UserError):
    """A mistake that every process knows of, whichever met it; the first tells the user."""
