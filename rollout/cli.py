"""The command `rollout`: which commands there are. Each parses, calls and prints; what it calls decides.

Commands that change something say what they would do until --execute is given. What a command needs is loaded
when it runs, so that `--help` answers at once.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer
from typer.exceptions import TyperException

from rollout import commands_evidence, commands_owners, commands_report, commands_setup, commands_steps, commands_stores
from rollout.logs import log_to
from rollout.output import UNEXPECTED, fail

EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected, 2 usage, 3 refused by a gate or a rule, 4 inconclusive,"
    " 5 a precondition is missing."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Move document search from FAISS to pgvector, a step at a time, with a way back."
    " Start with `rollout status`; rehearse on a copy first with `rollout rehearse --legacy DIR`."
    " Commands that change something only say what they would do until --execute is given.",
    epilog=EXIT_CODES,
)
quarantine = typer.Typer(no_args_is_help=True, help="Chunks whose owner is not known: list, assign, discard.")
instances = typer.Typer(no_args_is_help=True, help="The backend processes that take part: list, forget.")

for name, command in (
    ("status", commands_steps.status),
    ("check", commands_steps.check),
    ("advance", commands_steps.advance),
    ("rollback", commands_steps.rollback),
    ("import-sql", commands_setup.import_sql),
    ("assign-owners", commands_owners.assign_owners),
    ("backfill", commands_stores.backfill),
    ("settle", commands_stores.settle),
    ("verify", commands_stores.verify),
    ("diffs", commands_stores.diffs),
    ("explain", commands_evidence.explain),
    ("hold", commands_evidence.hold),
    ("resume", commands_evidence.resume),
    ("recover", commands_evidence.recover),
    ("save-faiss", commands_stores.save_faiss),
    ("report", commands_report.report),
    ("dashboard", commands_report.dashboard),
    ("rehearse", commands_setup.rehearse),
):
    app.command(name)(command)
quarantine.command("list")(commands_owners.quarantine_list)
quarantine.command("assign")(commands_owners.quarantine_assign)
quarantine.command("discard")(commands_owners.quarantine_discard)
instances.command("list")(commands_steps.instances_list)
instances.command("forget")(commands_steps.instances_forget)
app.add_typer(quarantine, name="quarantine")
app.add_typer(instances, name="instances")


def main() -> None:
    log_to(sys.stderr)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except TyperException as error:
        # Empty where the help was all there is to say.
        if message := error.format_message().strip():
            fail("rollout", error.exit_code, f"{message.rstrip('.')}; see `rollout --help`", "--json" in sys.argv)
        code = error.exit_code
    except typer.Abort:
        code = UNEXPECTED
    sys.exit(code or 0)
