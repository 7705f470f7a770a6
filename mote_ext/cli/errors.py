"""CommandError: what a person did wrong at the command line. Only mote_ext.cli's main turns it into an exit."""


class CommandError(Exception):
    """Its text is all that is shown: what was given, what was expected, and what to do."""
