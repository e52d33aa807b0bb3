"""What a user did wrong, told so that the user can mend it."""


class RefusedError(ValueError):
    """Bad input. The message names the value, the limit and the remedy; it is shown as it stands, without a traceback.

    The command line exits with status 2, the wire answers INVALID_ARGUMENT.
    """


class TooLongError(RefusedError):
    """A text of more tokens than there may be, alone or with its answer. How many it has may not be known."""


class AdaptersLostError(Exception):
    """An adapter did not come onto the devices, and those that were there are gone: their memory was donated."""


class PieceError(ValueError):
    """Pieces of prompts that no program takes. Nothing was started, and no state was donated."""
