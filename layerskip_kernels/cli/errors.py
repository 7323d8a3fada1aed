"""What the user did wrong, as one sentence on standard error and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import click

INTERRUPTED = 130  # exit code that shells report for a process ended by Ctrl-C

_OPTIONS = {"max_new_tokens": "max_steps", "stop_strings": "stop_words", "eos_token_id": "stop_token_ids"}


class CliError(click.ClickException):
    exit_code = 2

    def show(self, file=None) -> None:
        click.echo(f"layerskip: {self.format_message()}", file=file, err=file is None)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Turns what the library raises about its input into a CliError; `layerskip --debug` keeps the traceback."""
    try:
        yield
    except (BrokenPipeError, click.exceptions.Exit):
        # not the input's fault: the reader of standard output left, as `head` does; or the command ends itself
        raise
    except (ValueError, TypeError, ArithmeticError, OSError, RuntimeError) as error:
        if click.get_current_context().find_root().params.get("debug"):
            raise
        message = str(error) or type(error).__name__
        for argument, option in _OPTIONS.items():
            message = message.replace(argument, option)
        raise CliError(message) from error
