"""What ends a command with exit status 2: a mistake that the user can mend."""


class UserError(ValueError):
    """A mistake in configuration, data or arguments; the message names the key, the value, the rule and the remedy."""
