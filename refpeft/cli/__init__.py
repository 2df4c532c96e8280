"""The command line. One file per group of commands; what is heavy (onnx, torch, …) is imported when it is needed."""

import errno
import importlib
from concurrent.futures import BrokenExecutor
from importlib.util import find_spec
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from refpeft.cli.errors import sentence

COMMANDS = {  # in the order of `refpeft --help`
    "check": ("check", "replay"),
    "targets": ("targets",),
    "mutants": ("mutants",),
    "report": ("report",),
    "engines": ("engines",),
    "history": ("history",),
    "methods": ("methods",),
    "count": ("count",),
    "train": ("train",),
    "extend": ("extend",),
    "merge": ("merge",),
    "export": ("export",),
    "generate": ("generate",),
    "prompts": ("read-prompt",),
    "audit": ("audit",),
    "vectors": ("vectors",),
}


class Group(TyperGroup):
    """All commands. An error that the user can mend is one sentence on stderr and exit code 2, never a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            stop("interrupted", 130)
        except (ValueError, OSError, ImportError, MemoryError, BrokenExecutor) as error:
            if ctx.params.get("debug") or getattr(error, "errno", None) == errno.EPIPE:
                raise
            stop(sentence(error))


app = typer.Typer(
    cls=Group,
    rich_markup_mode="rich",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def stop(message: str, code: int = 2) -> NoReturn:
    typer.secho(f"refpeft: {message}", err=True, fg=typer.colors.RED if code == 2 else None)
    raise typer.Exit(code)


def version(wanted: bool) -> None:
    if wanted:
        import refpeft

        typer.echo(f"refpeft {refpeft.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """The golden specification of parameter-efficient fine-tuning: check an implementation, export a tuned model,
    read the formulae.

    Exit codes: 0 as expected, 1 not as expected, 2 could not run.
    """


def register() -> None:
    for module, names in COMMANDS.items():
        if find_spec(f"refpeft.cli.{module}") is None:
            continue
        commands = importlib.import_module(f"refpeft.cli.{module}")
        for name in names:
            app.command(name)(getattr(commands, name.replace("-", "_")))


register()


def main() -> None:
    app(prog_name="refpeft")
