"""Measure the ledger against its ceiling and against the design that most people would write."""

import argparse
import http.client
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import FrameType

from harness import (
    ACCOUNTS,
    Load,
    Server,
    background_transfers,
    call,
    connect,
    fund,
    open_wallets,
    resident_mebibytes,
    run_load,
    serving,
    tell,
)
from history import copy_database, fill_histories, grow
from postgres import find_programs, make_rowlock_tables, new_postgres, run_rowlock

CONNECTIONS = (1, 8, 32, 128)
PAGE = 200


@dataclass(frozen=True)
class Plan:
    """Say how much to measure."""

    seconds: int
    rounds: int
    early_entries: int
    late_entries: int
    big_entries: int
    small_entries: int
    page_requests: int


QUICK = Plan(1, 3, 10_000, 30_000, 100_000, 1_000, 200)
FULL = Plan(4, 5, 100_000, 1_000_000, 1_000_000, 1_000, 500)


class Table:
    """Collect the rows that are printed together at the end."""

    HEADER = ("measurement", "conns", "value", "of (a)", "p50 ms", "p99 ms", "target", "met")

    def __init__(self) -> None:
        """Start with the header alone."""
        self.rows = [self.HEADER]

    def add_load(self, name: str, conns: int, load: Load, ceiling: Load | None = None) -> None:
        """Add a rate with its latencies."""
        ratio = f"{load.rate_per_second / ceiling.rate_per_second:.2f}" if ceiling else ""
        latencies = (f"{load.p50_ms:.2f}", f"{load.p99_ms:.2f}")
        rate = f"{load.rate_per_second:,.0f} /s"
        self.rows.append((name, str(conns), rate, ratio, *latencies, "", ""))

    def add_value(self, name: str, value: str) -> None:
        """Add a measurement that has no target."""
        self.rows.append((name, "", value, "", "", "", "", ""))

    def add_target(self, name: str, value: float, target: str, met: bool) -> None:
        """Add a measurement beside its target."""
        verdict = "yes" if met else "NO"
        self.rows.append((name, "", f"{value:.2f}", "", "", "", target, verdict))

    def text(self) -> str:
        """Return the table as aligned Markdown."""
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        lines = [self.rows[0], ["-" * width for width in widths], *self.rows[1:]]
        return "\n".join(markdown_line(line, widths) for line in lines)


def markdown_line(cells: Iterable[str], widths: list[int]) -> str:
    """Return one line of the table, with its cells padded to the widths."""
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"


def median_load(loads: list[Load]) -> Load:
    """Return the median of each figure over several runs."""
    return Load(
        sum(load.requests for load in loads),
        median(load.rate_per_second for load in loads),
        median(load.p50_ms for load in loads),
        median(load.p99_ms for load in loads),
    )


def interleave(
    cases: list[tuple[Server, str]], connections: int, rounds: int, seconds: int
) -> list[Load]:
    """Measure all cases in turn, several times, because the machine drifts."""
    runs = [
        [run_load(server, mode, connections, seconds) for server, mode in cases]
        for _ in range(rounds)
    ]
    return [median_load(list(of_case)) for of_case in zip(*runs, strict=True)]


def measure_rates(plan: Plan, table: Table, folder: Path) -> None:
    """Compare the three designs at each number of connections."""
    with ExitStack() as stack:
        kinds = ("ceiling", "ledger", "orm")
        ceiling, ledger, orm = (stack.enter_context(serving(k, folder, k)) for k in kinds)
        for server in (ledger, orm):
            fund(server)
        shutil.copy(ledger.accounts_file, ceiling.accounts_file)
        cases = [(ceiling, "spread"), (ledger, "spread"), (ledger, "hot"), (orm, "spread")]
        # The first run warms everything up and is not counted.
        interleave(cases, 8, 1, 1)
        for connections in CONNECTIONS:
            tell(f"rates at {connections} connections")
            rounds = plan.rounds if connections == 32 else 1
            loads = interleave(cases, connections, rounds, plan.seconds)
            add_rates(table, connections, loads)
            if connections == 32:
                add_rate_targets(table, [load.rate_per_second for load in loads])
        measure_reads(plan, table, ledger)
        measure_top_ups(plan, table, ledger)


def add_rates(table: Table, connections: int, loads: list[Load]) -> None:
    """Add what was measured at one number of connections."""
    names = ("(a) ceiling", "(c) ledger, spread", "(c) ledger, hot account", "(b) ORM design")
    for name, load in zip(names, loads, strict=True):
        table.add_load(name, connections, load, loads[0])


def add_rate_targets(table: Table, rates_per_second: list[float]) -> None:
    """Add the targets that compare the three designs."""
    ceiling, spread, hot, orm = rates_per_second
    of_ceiling, of_orm, of_spread = spread / ceiling, spread / orm, hot / spread
    table.add_target("(c) spread / (a)", of_ceiling, ">= 0.40 (aim 0.50)", of_ceiling >= 0.4)
    table.add_target("(c) spread / (b)", of_orm, ">= 6", of_orm >= 6)
    table.add_target("(c) hot / (c) spread", of_spread, ">= 0.90", of_spread >= 0.9)


def measure_reads(plan: Plan, table: Table, ledger: Server) -> None:
    """Measure reads over one connection, with and without a load of transfers."""
    for mode in ("account", "statement"):
        tell(f"reads: {mode}")
        table.add_load(f"GET {mode}, idle", 1, run_load(ledger, mode, 1, plan.seconds))
        with background_transfers(ledger, plan.seconds + 1):
            load = run_load(ledger, mode, 1, plan.seconds)
        table.add_load(f"GET {mode}, beside 32 connections of transfers", 1, load)


def measure_top_ups(plan: Plan, table: Table, ledger: Server) -> None:
    """Compare top-ups, which all go through one treasury, to transfers between many accounts."""
    tell("top-ups")
    open_wallets(ledger)
    cases = [(ledger, "spread"), (ledger, "topup")]
    transfers, top_ups = interleave(cases, 32, plan.rounds, plan.seconds)
    table.add_load("(c) transfers, in turn with top-ups", 32, transfers)
    table.add_load("(c) top-ups through one treasury", 32, top_ups)
    ratio = top_ups.rate_per_second / transfers.rate_per_second
    table.add_target("top-ups / transfers", ratio, ">= 1.00", ratio >= 1)


def measure_keys(plan: Plan, table: Table, folder: Path) -> None:
    """Compare transfers of callers with an API key to those in open mode."""
    tell("API keys")
    with ExitStack() as stack:
        kinds = ("ceiling", "ledger", "keyed")
        servers = [stack.enter_context(serving(k, folder, f"keys-{k}")) for k in kinds]
        ceiling, ledger, keyed = servers
        for server in (ledger, keyed):
            fund(server)
        shutil.copy(ledger.accounts_file, ceiling.accounts_file)
        cases = [(server, "spread") for server in servers]
        interleave(cases, 8, 1, 1)
        top, local, by_key = interleave(cases, 32, plan.rounds, plan.seconds)
    table.add_load("(c) in open mode, in turn with keys", 32, local, top)
    table.add_load("(c) with an API key", 32, by_key, top)
    of_open = by_key.rate_per_second / local.rate_per_second
    of_ceiling = by_key.rate_per_second / top.rate_per_second
    table.add_target("API key / open mode", of_open, ">= 0.95", of_open >= 0.95)
    table.add_target("API key / (a)", of_ceiling, ">= 0.38", of_ceiling >= 0.38)


def measure_postgres(plan: Plan, table: Table, folder: Path) -> None:
    """Compare the ledger on PostgreSQL to that on SQLite, and to a row lock per transfer."""
    programs = find_programs()
    if programs is None:
        tell("PostgreSQL is missing: its rows are left out (apt-get install postgresql)")
        return
    tell("PostgreSQL")
    with new_postgres(programs, folder / "postgres") as postgres, ExitStack() as stack:
        on_sqlite = stack.enter_context(serving("ledger", folder, "beside"))
        on_postgres = stack.enter_context(serving("ledger", folder, "server", postgres.url))
        for server in (on_sqlite, on_postgres):
            fund(server)
        make_rowlock_tables(postgres)
        measured = [
            (
                run_load(on_sqlite, "spread", 32, plan.seconds),
                run_load(on_postgres, "spread", 32, plan.seconds),
                run_load(on_postgres, "hot", 32, plan.seconds),
                run_rowlock(postgres, 0, 32, plan.seconds),
                run_rowlock(postgres, 1, 32, plan.seconds),
            )
            # The first round warms everything up and is not counted.
            for _ in range(plan.rounds + 1)
        ][1:]
    add_postgres(table, [median_load(list(loads)) for loads in zip(*measured, strict=True)])


def add_postgres(table: Table, loads: list[Load]) -> None:
    """Add what was measured on PostgreSQL."""
    names = (
        "(c) on SQLite, in turn with PostgreSQL",
        "(c) on PostgreSQL, spread",
        "(c) on PostgreSQL, hot account",
        "row locks in pgbench, spread (no HTTP)",
        "row locks in pgbench, hot account (no HTTP)",
    )
    for name, load in zip(names, loads, strict=True):
        table.add_load(name, 32, load)
    sqlite, spread, hot, _, rowlock_hot = (load.rate_per_second for load in loads)
    table.add_target("PostgreSQL / SQLite", spread / sqlite, ">= 0.60", spread >= 0.6 * sqlite)
    of_rowlock = hot / rowlock_hot
    table.add_target("hot account / row locks", of_rowlock, ">= 2", of_rowlock >= 2)


def measure_growth(plan: Plan, table: Table, folder: Path) -> None:
    """Compare the ledger with a long history to a copy made when the history was short."""
    with serving("ledger", folder, "long") as long:
        fund(long)
        early_entries = grow(long, 2 * ACCOUNTS, plan.early_entries)
        early_mebibytes = resident_mebibytes(long.pid)
        copy_database(folder, "long", "short")
        late_entries = grow(long, early_entries, plan.late_entries)
        # The two are measured in turn, because minutes lie between the two lengths of history.
        with (
            serving("ledger", folder, "short") as short,
            serving("ceiling", folder, "ceiling") as top,
        ):
            cases = [(server, "spread") for server in (top, short, long)]
            ceiling, early, late = interleave(cases, 32, plan.rounds, min(2, plan.seconds))
        late_mebibytes = resident_mebibytes(long.pid)
    table.add_load(f"(c) from {early_entries:,} entries on", 32, early, ceiling)
    table.add_load(f"(c) from {late_entries:,} entries on", 32, late, ceiling)
    ratio = late.rate_per_second / early.rate_per_second
    table.add_target("rate with the long / the short history", ratio, ">= 0.85", ratio >= 0.85)
    table.add_value(f"RSS after {early_entries:,} entries", f"{early_mebibytes:.1f} MiB")
    table.add_value(f"RSS after {late_entries:,} entries", f"{late_mebibytes:.1f} MiB")
    growth = late_mebibytes / early_mebibytes
    table.add_target("RSS, end / early", growth, "<= 1.10", growth <= 1.1)


def last_page(link: http.client.HTTPConnection, first: str) -> str:
    """Walk from the first page and return the path of the last one."""
    path = first
    while cursor := call(link, "GET", path)["next_cursor"]:
        path = f"{first}&cursor={cursor}"
    return path


def page_milliseconds(link: http.client.HTTPConnection, path: str) -> float:
    """Return how long one request takes."""
    start = time.perf_counter()
    call(link, "GET", path)
    return (time.perf_counter() - start) * 1e3


def measure_statements(plan: Plan, table: Table, folder: Path) -> None:
    """Compare the last page of a big account to the first page of a small one."""
    tell("statements: filling the database")
    big_id, small_id = fill_histories(folder, plan.big_entries, plan.small_entries)
    with (
        serving("ledger", folder, "pages") as server,
        closing(connect(server)) as link,
    ):
        tell("statements: walking to the last page")
        last = last_page(link, f"/accounts/{big_id}/statement?limit={PAGE}")
        first = f"/accounts/{small_id}/statement?limit={PAGE}"
        times = [
            (page_milliseconds(link, first), page_milliseconds(link, last))
            for _ in range(plan.page_requests)
        ]
    first_ms, last_ms = (median(of_page) for of_page in zip(*times, strict=True))
    table.add_value(f"first page of {plan.small_entries:,} entries", f"{first_ms:.2f} ms")
    table.add_value(f"last page of {plan.big_entries:,} entries", f"{last_ms:.2f} ms")
    table.add_target("last page / first page", last_ms / first_ms, "<= 2", last_ms <= 2 * first_ms)


def read_plan() -> Plan:
    """Return the plan that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs and small histories")
    parser.add_argument("--seconds", type=int, help="seconds of each run of the load generator")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    return replace(plan, seconds=options.seconds) if options.seconds else plan


def leave(_signal: int, _frame: FrameType | None) -> None:
    """Turn a request to end into an exception, so that everything is cleaned up."""
    raise SystemExit(1)


def main() -> int:
    """Measure everything and print the table."""
    plan = read_plan()
    if shutil.which("wrk") is None:
        tell("wrk is missing; get it with: apt-get install wrk (or: brew install wrk)")
        return 2
    signal.signal(signal.SIGTERM, leave)
    table = Table()
    with tempfile.TemporaryDirectory(prefix="ledger-bench-") as name:
        # PostgreSQL runs as another user where this is root.
        Path(name).chmod(0o755)
        for measure in (
            measure_rates,
            measure_keys,
            measure_postgres,
            measure_growth,
            measure_statements,
        ):
            measure(plan, table, Path(name))
    print(table.text())
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
