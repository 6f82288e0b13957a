"""The one exception that data code raises for a mistake of the user's."""


class DataError(ValueError):
    """A dataset, tokenizer or source that cannot be used; the message names it, the rule and the remedy."""
