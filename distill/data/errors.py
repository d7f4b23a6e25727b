"""What is wrong with somebody's data."""


class DataError(ValueError):
    """Prompts or pictures that cannot be used; the message names the file, what was found there and the way out."""
