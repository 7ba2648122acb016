"""The one exception that a user's mistake raises."""


class InputError(ValueError):
    """Something given from outside cannot be used; the message says why and what to do.

    The message is one line in three parts: the rule, what came, what to do. The command line prints
    it as it stands and exits with status 2; every other exception is a defect of ours and keeps its
    traceback.
    """
