"""Why an engine does not start."""


class Refused(Exception):
    """The engine cannot start as it was asked to; the message is one sentence for the user."""
