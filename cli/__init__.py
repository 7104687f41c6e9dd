"""The command line: one file per command, nothing heavy imported before a command runs.

Exit codes: 0 done, 2 the user's mistake, 1 ours, 130 interrupted. With ``--json`` exactly one JSON object goes to
stdout, whatever happens; everything for people goes to stderr.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import typer

from zowrap.cli import bench, env, eval, export, inspect, replay, rules, tune
from zowrap.cli.aliases import AliasCommand
from zowrap.cli.console import Interrupted, fail, json_asked, result, say, stdout_for_result
from zowrap.errors import ZOError, first_line

app = typer.Typer(
    name="zowrap",
    help="Fine-tune torch models with forward passes alone (zeroth-order optimisation).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("tune", cls=AliasCommand)(tune.tune)
app.command("train", cls=AliasCommand, hidden=True)(tune.tune)
app.command("eval", cls=AliasCommand)(eval.evaluate)
app.command("export", cls=AliasCommand)(export.export)
app.command("replay", cls=AliasCommand)(replay.replay)
app.command("inspect", cls=AliasCommand)(inspect.inspect_model)
app.command("rules", cls=AliasCommand)(rules.rules)
app.command("env", cls=AliasCommand)(env.env)

benches = typer.Typer(help="Measure what things cost on this machine.", no_args_is_help=True)
benches.command("step", cls=AliasCommand)(bench.step)
app.add_typer(benches, name="bench")


@app.callback()
def _root() -> None:
    """Fine-tune torch models with forward passes alone (zeroth-order optimisation)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    as_json = json_asked(args)
    previous = _terminate_like_interrupt()
    try:
        with stdout_for_result(as_json):
            try:
                code = typer.main.get_command(app).main(args=args, prog_name="zowrap", standalone_mode=False)
            except Interrupted as stopped:
                say(str(stopped))
                result({**stopped.record, "error": str(stopped)}, as_json)
                return 130
            code = code if isinstance(code, int) else 0
            if code == 130:
                fail("interrupted", as_json)
            return code
    except ZOError as error:
        return fail(str(error), as_json, 2)
    except KeyboardInterrupt:
        return fail("interrupted", as_json, 130)
    except typer.Abort:
        return fail("aborted", as_json, 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # a usage error, of click or of the copy of it inside typer
            return fail(_usage(error), as_json, 2)
        return _bug(error, as_json)
    finally:
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)


def _terminate_like_interrupt() -> Any:
    """SIGTERM stops a command as Ctrl-C does. Returns the handler to put back, or None outside the main thread."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:
        return None


def _usage(error: Any) -> str:
    """A usage error as one sentence, with the option meant where there is a near one."""
    possible = getattr(error, "possibilities", None)
    name = getattr(error, "option_name", None)
    if name and possible:
        return f"no such option: {name}; did you mean {' or '.join(sorted(possible))}?"
    text = str(error.format_message()).replace("\n", " ")
    if text or error.ctx is None:
        return text
    commands = error.ctx.command.list_commands(error.ctx)  # a group without a command, whose help is printed by now
    return f"{error.ctx.command_path} needs a command: {', '.join(commands)}"


def _bug(error: Exception, as_json: bool) -> int:
    """Our failure, or the machine's: one sentence, the traceback on request."""
    if os.environ.get("ZOWRAP_DEBUG"):
        traceback.print_exc()
    first = first_line(error, "no message")
    return fail(f"{type(error).__name__}: {first} (ZOWRAP_DEBUG=1 shows the traceback)", as_json, 1)
