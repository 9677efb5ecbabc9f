"""The command line as a whole: it collects the verbs, and prints a user's mistake as one line.

Every verb calls one library function and prints its result. Data goes to stdout, everything else to stderr. A verb
imports what it needs inside its function, so that `--help` stays quick. The exit code is 0 if all went well, 1 if the
input or the machine is at fault (one line says how), and 2 if the command line is wrong.
"""

from __future__ import annotations

import os
import sys
from typing import Annotated, NoReturn

import typer

import dovetail
from dovetail import threads
from dovetail.cli import catalog, generate, health, models, network, plan, reproduce, serve, train, weights
from dovetail.cli.options import with_user_paths
from dovetail.printing import open_streams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="The DeepSeek-V3 system in one package: plan, train, generate, convert and count.",
)
for verbs in (train, health, generate, serve, weights, models, catalog, plan, reproduce):
    app.add_typer(verbs.app)
app.add_typer(network.app, name="network")
app.add_typer(serve.bench, name="bench")
for group in app.registered_groups:
    for command in group.typer_instance.registered_commands if group.typer_instance else ():
        command.callback = command.callback and with_user_paths(command.callback)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        print("dovetail", dovetail.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Take the options that belong to no verb."""


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1, never a traceback.

    A RuntimeError that dovetail defines (a run that diverged, a disk that is full) is printed as one line too. A
    RuntimeError of torch or an AssertionError is a bug and keeps its traceback. A reader that has gone, as after
    `| head -1`, is no mistake, and nothing is said of it.
    """
    open_streams()
    try:
        try:
            threads.prepare()
            app()
        finally:
            sys.stdout.flush()  # here, where an error is still caught
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is left to be flushed at exit
        sys.exit(1)
    except (ValueError, OSError) as error:
        fail(error, 1)
    except RuntimeError as error:
        if not type(error).__module__.startswith("dovetail."):
            raise
        fail(error, 130 if type(error).__name__ == "Interrupted" else 1)


def fail(error: Exception, code: int) -> NoReturn:
    text = str(error)
    if isinstance(error, OSError) and error.filename and error.strerror:  # without its number
        text = f"{error.filename}: {error.strerror[:1].lower()}{error.strerror[1:]}"
    print("dovetail:", " ".join(text.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
