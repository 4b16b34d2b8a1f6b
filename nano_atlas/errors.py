"""Errors that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can mend; the message says what was wrong, where (file and line), and what to do."""
