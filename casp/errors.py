"""The one exception that stages raise for input they cannot work with."""


class UserError(Exception):
    """Bad input, told in one sentence that names the thing and the remedy; the command line exits with 2."""
