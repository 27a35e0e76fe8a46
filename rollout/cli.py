"""The command `rollout`: which commands there are. Each parses, calls and prints; what it calls decides.

Commands that change something say what they would do until --execute is given. What a command needs is loaded
when it runs, so that `--help` and the completion of a shell answer at once.
"""

from __future__ import annotations

import sys
from io import TextIOWrapper

import typer
from typer.exceptions import TyperException

from rollout import (
    commands_evidence,
    commands_owners,
    commands_removal,
    commands_report,
    commands_setup,
    commands_steps,
    commands_stores,
)
from rollout.logs import log_to
from rollout.output import UNEXPECTED, fail

EXIT_CODES = (
    "Exit codes: 0 done, 1 unexpected, 2 usage, 3 refused by a gate or a rule, 4 inconclusive,"
    " 5 a precondition is missing."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Move document search from FAISS to pgvector, a step at a time, with a way back."
    " Start with `rollout status`; rehearse on a copy first with `rollout rehearse --legacy DIR`."
    " Commands that change something only say what they would do until --execute is given."
    " RUNBOOK.md goes through every stage and every alarm with these commands.",
    epilog=EXIT_CODES,
)
quarantine = typer.Typer(no_args_is_help=True, help="Chunks whose owner is not known: list, assign, discard.")
instances = typer.Typer(no_args_is_help=True, help="The backend processes that take part: list, forget.")

LOOK, STEP = "Look: where are we?", "Step: one stage on or back, or keep still"
STORES, BEFORE = "Stores: bring over, settle, compare, save", "Before: adopt the old installation"
END = "The end: keep what FAISS held, and take it out"

# In the order in which they are met, so that the help can be read like a way.
COMMANDS = (
    (LOOK, "status", commands_steps.status, "rollout status"),
    (LOOK, "check", commands_steps.check, "rollout check --to live --percent 10"),
    (LOOK, "diffs", commands_stores.diffs, "rollout diffs --cause missing_in_pgvector --limit 5"),
    (LOOK, "explain", commands_evidence.explain, "rollout explain 4711"),
    (LOOK, "report", commands_report.report, "rollout report rollout.html --span 24h"),
    (LOOK, "dashboard", commands_report.dashboard, "rollout dashboard --host 0.0.0.0 --token-file token"),
    (BEFORE, "rehearse", commands_setup.rehearse, "rollout rehearse --legacy /srv/victus"),
    (BEFORE, "import-sql", commands_setup.import_sql, "rollout import-sql sqlite:///victus.db --execute"),
    (BEFORE, "assign-owners", commands_owners.assign_owners, "rollout assign-owners --from-sqlite sqlite:///victus.db"),
    (STEP, "advance", commands_steps.advance, "rollout advance --reason 'two quiet days' --execute"),
    (STEP, "rollback", commands_steps.rollback, "rollout rollback --reason 'pgvector is slow' --execute"),
    (STEP, "hold", commands_evidence.hold, "rollout hold --reason 'the network is being mended' --execute"),
    (STEP, "resume", commands_evidence.resume, "rollout resume --reason 'the network is mended' --execute"),
    (STORES, "backfill", commands_stores.backfill, "rollout backfill --execute"),
    (STORES, "settle", commands_stores.settle, "rollout settle --store faiss --retry-aside --execute"),
    (STORES, "verify", commands_stores.verify, "rollout verify --repair --execute"),
    (STORES, "save-faiss", commands_stores.save_faiss, "rollout save-faiss --execute"),
    (STORES, "recover", commands_evidence.recover, "rollout recover --execute"),
    (END, "archive", commands_removal.archive, "rollout archive faiss.tar --restore restored --execute"),
    (END, "remove-faiss", commands_removal.remove_faiss, "rollout remove-faiss --tree . --check"),
)
OF_QUARANTINE = (
    ("list", commands_owners.quarantine_list, "rollout quarantine list --csv decisions.csv"),
    ("assign", commands_owners.quarantine_assign, "rollout quarantine assign --csv decisions.csv --execute"),
    ("discard", commands_owners.quarantine_discard, "rollout quarantine discard GROUP --reason 'a test' --execute"),
)
OF_INSTANCES = (
    ("list", commands_steps.instances_list, "rollout instances list"),
    ("forget", commands_steps.instances_forget, "rollout instances forget d41a1a16 --execute"),
)

for panel, name, command, example in COMMANDS:
    app.command(name, rich_help_panel=panel, epilog=f"Example: {example}")(command)
for group, members in ((quarantine, OF_QUARANTINE), (instances, OF_INSTANCES)):
    for verb, act, example in members:
        group.command(verb, epilog=f"Example: {example}")(act)
app.add_typer(quarantine, name="quarantine", rich_help_panel=BEFORE)
app.add_typer(instances, name="instances", rich_help_panel=STEP)


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
