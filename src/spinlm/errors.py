"""The one error a person is meant to read."""


class UserError(Exception):
    """Something in the input, the machine or the run directory that its user can put right.

    The message says what is wrong, where (file, row, key) and what to do. The command line prints it
    alone, without a traceback, and exits with code 2.
    """
