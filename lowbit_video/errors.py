"""The errors of the public API: all say what was given, what is supported and what to try."""


class UnsupportedError(ValueError):
    """No kernel variant serves the request; the message holds every variant's reason."""


class NonFiniteError(ValueError):
    """NaN or infinity among the inputs; the message names the tensor and counts the elements."""


class SlowerThanExactWarning(UserWarning):
    """The kernel asked for runs, but exact attention is measured to be faster at this length."""
