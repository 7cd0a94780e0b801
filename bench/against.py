"""Measure the present ledger.py beside that of an earlier commit, each with its own database."""

import subprocess
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from harness import PROGRAM, Server, fill_page, fund, run_load, serving, tell
from report import Rounds, markdown, with_unit

HEADER = ("measured", "connections", "present", "commit", "present / commit", "CPU", "CPU ratio")
LOADS = {
    ("spread", 32): "transfers, spread",
    ("hot", 32): "transfers, hot",
    ("spread", 1): "transfers, spread",
    ("account", 32): "reading an account",
    ("statement", 32): "reading a statement",
}


def check_out(commit: str, folder: Path) -> Path:
    """Write the ledger.py of a commit into a folder of its own, and return where it is."""
    show = ["git", "show", f"{commit}:ledger.py"]
    shown = subprocess.run(show, cwd=PROGRAM.parent, check=False, stdout=subprocess.PIPE)
    if shown.returncode:
        # Git has said why.
        raise SystemExit(shown.returncode)
    program = folder / "commit" / "ledger.py"
    program.parent.mkdir()
    program.write_bytes(shown.stdout)
    return program


def compare(
    mode: str, connections: int, servers: list[Server], rounds: int, seconds: int
) -> Rounds:
    """Let both ledgers take turns under one kind of load."""
    tell(f"{mode} at {connections} connections")
    cases = {
        name: partial(run_load, server, mode, connections, seconds)
        for name, server in zip(("present", "commit"), servers, strict=True)
    }
    return Rounds(cases, rounds)


def table_against(commit: str, folder: Path, rounds: int, seconds: int) -> str:
    """Return a table of what the present ledger does better or worse than that of a commit."""
    rows: list[tuple[str, ...]] = [HEADER]
    with ExitStack() as stack:
        old = serving("ledger", folder, "commit", program=check_out(commit, folder))
        servers = [stack.enter_context(one) for one in (serving("ledger", folder, "present"), old)]
        for server in servers:
            fund(server)
            fill_page(server)
        for (mode, connections), what in LOADS.items():
            both = compare(mode, connections, servers, rounds, seconds)
            rows.append((what, str(connections), *figures(both)))
    return markdown(rows)


def figures(both: Rounds) -> tuple[str, ...]:
    """Return the cells of one comparison."""
    rates = [f"{both.median(name, 'rate_per_second'):,.0f} /s" for name in both.loads]
    cpu = [with_unit(both.median(name, "cpu_us"), ".0f") for name in both.loads]
    ratio = f"{both.ratio('present', 'commit'):.2f}"
    cpu_ratio = with_unit(both.ratio("present", "commit", "cpu_us"), ".2f")
    return (*rates, ratio, f"{' / '.join(cpu)} µs", cpu_ratio)
