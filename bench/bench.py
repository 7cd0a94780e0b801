"""Measure the ledger against its ceiling and against the design that most people would write."""

import argparse
import http.client
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from math import nan
from pathlib import Path
from statistics import median
from types import FrameType

from against import table_against
from harness import (
    ACCOUNTS,
    PAGE_ENTRIES,
    Load,
    Server,
    background_load,
    call,
    connect,
    fill_page,
    fund,
    invent_accounts,
    open_wallets,
    resident_mebibytes,
    run_load,
    serving,
    tell,
    wal_megabytes,
)
from history import copy_database, fill_histories, grow
from postgres import find_programs, make_rowlock_tables, new_postgres, run_rowlock
from report import CEILING, Case, Report, Rounds

SPREAD = "transfers, spread"
HOT = "transfers, hot account"
ROUTE_CLASS = "the route class"
KEYED = "transfers, with an API key"
ORM = "transfers, one ORM session each"
READ_ACCOUNT = "reading an account"
READ_STATEMENT = f"reading a statement of {PAGE_ENTRIES} entries"
TOP_UPS = "top-ups"
BULK = "bulk, 4 connections"
BULK_TRANSFERS = 1_000  # As many as load.lua puts into a request.
BULK_SECONDS_MIN = 4
POSTGRES_SPREAD = "on PostgreSQL, spread"
POSTGRES_HOT = "on PostgreSQL, hot account"
ROWLOCK_SPREAD = "row locks in pgbench, spread"
ROWLOCK_HOT = "row locks in pgbench, hot account"
PAGE_SIZE_MAX = 200


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


QUICK = Plan(1, 3, 100_000, 200_000, 100_000, 1_000, 200)
FULL = Plan(4, 5, 100_000, 1_000_000, 1_000_000, 1_000, 500)


@dataclass(frozen=True)
class Bench:
    """Hold what every measurement needs."""

    plan: Plan
    folder: Path
    ceiling: Server
    route_class: Server
    report: Report

    def load(self, server: Server, mode: str, connections: int) -> Case:
        """Return a case: one kind of load on one server."""
        return partial(run_load, server, mode, connections, self.plan.seconds)

    def measure(self, what: str, connections: int, cases: dict[str, Case]) -> Rounds:
        """Run cases in turn with the ceiling, and report them."""
        what = f"{what}, {connections} connection{'s' if connections > 1 else ''}"
        tell(what)
        top = {CEILING: self.load(self.ceiling, "spread", connections)}
        rounds = Rounds(top | cases, self.plan.rounds)
        self.report.add(what, rounds)
        return rounds


def measure_rates(bench: Bench) -> None:
    """Compare the ledger to its ceiling, to the usual design, and to itself with API keys."""
    with ExitStack() as stack:
        ledger, keyed, orm = (
            stack.enter_context(serving(kind, bench.folder, kind))
            for kind in ("ledger", "keyed", "orm")
        )
        for server in (ledger, keyed, orm):
            fund(server)
        fill_page(ledger)
        measure_together(bench, ledger, keyed, orm)
        measure_alone(bench, ledger, orm)
        for connections in (8, 128):
            cases = transfer_cases(bench, ledger, orm, connections)
            bench.measure("transfers", connections, cases)
        measured = wal_megabytes(bench.folder / "ledger.db")
        bench.report.show("the -wal file after 128 connections, MB", measured)
        measure_reads_beside_writes(bench, ledger)
        measure_top_ups(bench, ledger)
        measure_bulk(bench, ledger)


def transfer_cases(bench: Bench, ledger: Server, orm: Server, connections: int) -> dict[str, Case]:
    """Return the transfers that are measured at each number of connections."""
    return {
        SPREAD: bench.load(ledger, "spread", connections),
        HOT: bench.load(ledger, "hot", connections),
        ORM: bench.load(orm, "spread", connections),
    }


def measure_together(bench: Bench, ledger: Server, keyed: Server, orm: Server) -> None:
    """Measure 32 callers, some of whom have a key."""
    floor = {ROUTE_CLASS: bench.load(bench.route_class, "spread", 32)}
    cases = (
        floor | transfer_cases(bench, ledger, orm, 32) | {KEYED: bench.load(keyed, "spread", 32)}
    )
    rounds, report = bench.measure("transfers", 32, cases), bench.report
    report.at_least("transfers, 32, of the ceiling", rounds.ratio(SPREAD, CEILING), 0.65, 0.8)
    report.at_least("hot account, 32, of spread", rounds.ratio(HOT, SPREAD), 1.0, 1.1)
    report.at_least("with an API key, 32, of open mode", rounds.ratio(KEYED, SPREAD), 0.95, 1.0)
    tail = rounds.ratio(SPREAD, CEILING, "p99_ms")
    report.at_most("p99 of transfers, 32, of the ceiling's", tail, 2.5, 1.5)
    report.at_least("transfers, 32, of an ORM session each", rounds.ratio(SPREAD, ORM), 6)


def measure_alone(bench: Bench, ledger: Server, orm: Server) -> None:
    """Measure one caller, who waits for each answer."""
    cases = transfer_cases(bench, ledger, orm, 1)
    cases[READ_ACCOUNT] = bench.load(ledger, "account", 1)
    cases[READ_STATEMENT] = bench.load(ledger, "statement", 1)
    rounds, report = bench.measure("transfers and reads", 1, cases), bench.report
    of_ceiling = {name: rounds.ratio(name, CEILING) for name in cases}
    report.at_least(f"{READ_ACCOUNT}, 1, of the ceiling", of_ceiling[READ_ACCOUNT], 1.0, 1.4)
    report.at_least(f"{READ_STATEMENT}, 1, of the ceiling", of_ceiling[READ_STATEMENT], 0.35, 0.5)
    report.at_least("transfers, 1, of the ceiling", of_ceiling[SPREAD], 0.25, 0.3)


def measure_reads_beside_writes(bench: Bench, ledger: Server) -> None:
    """Measure reads over one connection while others transfer."""
    tell("reads beside transfers")
    cases = {
        READ_ACCOUNT: bench.load(ledger, "account", 1),
        READ_STATEMENT: bench.load(ledger, "statement", 1),
    }
    rounds = measure_beside(bench, ledger, "spread", 32, cases)
    bench.report.add("reads, 1 connection, beside 32 of transfers", rounds)


def measure_beside(
    bench: Bench, ledger: Server, mode: str, connections: int, cases: dict[str, Case]
) -> Rounds:
    """Run cases while others load the ledger too, without their CPU: most of it was theirs."""
    cases = {name: without_cpu(case) for name, case in cases.items()}
    seconds = (bench.plan.rounds + 1) * len(cases) * bench.plan.seconds + 2
    with background_load(ledger, mode, connections, seconds):
        return Rounds(cases, bench.plan.rounds)


def without_cpu(case: Case) -> Case:
    """Return a case that does not tell its CPU time."""
    return lambda: replace(case(), cpu_us=nan)


def measure_top_ups(bench: Bench, ledger: Server) -> None:
    """Compare top-ups, which all go through one treasury, to transfers between many accounts."""
    open_wallets(ledger)
    cases = {SPREAD: bench.load(ledger, "spread", 32), TOP_UPS: bench.load(ledger, "topup", 32)}
    rounds = bench.measure("top-ups", 32, cases)
    bench.report.at_least(f"{TOP_UPS}, 32, of transfers", rounds.ratio(TOP_UPS, SPREAD), 1.0)


def measure_bulk(bench: Bench, ledger: Server) -> None:
    """Compare transfers by the thousand to single ones, and see what a single one waits then."""
    # A second has too few requests of a thousand, and of those who wait behind them.
    plan = replace(bench.plan, seconds=max(BULK_SECONDS_MIN, bench.plan.seconds))
    bench = replace(bench, plan=plan)
    cases = {SPREAD: bench.load(ledger, "spread", 32)}
    cases[BULK] = by_transfers(bench.load(ledger, "bulk", 4))
    rounds, report = bench.measure("bulk, and transfers", 32, cases), bench.report
    ratio = rounds.ratio(BULK, SPREAD)
    report.at_least("bulk, transfers a second, of single transfers at 32", ratio, 4)
    tell("transfers beside bulk")
    cases = {SPREAD: bench.load(ledger, "spread", 1)}
    rounds = measure_beside(bench, ledger, "bulk", 4, cases)
    report.add("transfers, 1 connection, beside 4 of bulk", rounds)
    report.at_most("p99 of a single transfer beside bulk, ms", rounds.median(SPREAD, "p99_ms"), 250)


def by_transfers(case: Case) -> Case:
    """Return a case of bulk requests that counts their transfers; its latencies are a request's."""

    def run() -> Load:
        load, n = case(), BULK_TRANSFERS
        rate, cpu_us = load.rate_per_second * n, load.cpu_us / n
        return replace(load, requests=load.requests * n, rate_per_second=rate, cpu_us=cpu_us)

    return run


def measure_postgres(bench: Bench) -> None:
    """Compare the ledger on PostgreSQL to that on SQLite, and to a row lock per transfer."""
    programs, report = find_programs(), bench.report
    if programs is None:
        tell("PostgreSQL is missing: its rows are left out (apt-get install postgresql)")
        return
    with new_postgres(programs, bench.folder / "postgres") as postgres, ExitStack() as stack:
        on_sqlite = stack.enter_context(serving("ledger", bench.folder, "beside"))
        on_postgres = stack.enter_context(serving("ledger", bench.folder, "server", postgres.url))
        for server in (on_sqlite, on_postgres):
            fund(server)
        make_rowlock_tables(postgres)
        cases: dict[str, Case] = {
            SPREAD: bench.load(on_sqlite, "spread", 32),
            POSTGRES_SPREAD: bench.load(on_postgres, "spread", 32),
            POSTGRES_HOT: bench.load(on_postgres, "hot", 32),
            ROWLOCK_SPREAD: partial(run_rowlock, postgres, 0, 32, bench.plan.seconds),
            ROWLOCK_HOT: partial(run_rowlock, postgres, 1, 32, bench.plan.seconds),
        }
        rounds = bench.measure("PostgreSQL", 32, cases)
    of_ceiling = rounds.ratio(POSTGRES_SPREAD, CEILING)
    report.at_least("PostgreSQL, spread, 32, of the ceiling", of_ceiling, 0.33, 0.45)
    report.show("PostgreSQL, spread, 32, of SQLite", rounds.ratio(POSTGRES_SPREAD, SPREAD))
    of_rowlock = rounds.ratio(POSTGRES_HOT, ROWLOCK_HOT)
    report.at_least("PostgreSQL, hot, 32, of row locks", of_rowlock, 2)


def measure_growth(bench: Bench) -> None:
    """Compare the ledger with a long history to a copy made when the history was short."""
    plan, folder, report = bench.plan, bench.folder, bench.report
    with serving("ledger", folder, "long") as long:
        fund(long)
        early_entries = grow(long, 2 * ACCOUNTS, plan.early_entries)
        early_mebibytes = resident_mebibytes(long.pid)
        copy_database(folder, "long", "short")
        late_entries = grow(long, early_entries, plan.late_entries)
        late_mebibytes = resident_mebibytes(long.pid)
        # The two are measured in turn, because minutes lie between the two lengths of history.
        early, late = (f"transfers after {n:,} entries" for n in (early_entries, late_entries))
        with serving("ledger", folder, "short") as short:
            cases = {early: bench.load(short, "spread", 32), late: bench.load(long, "spread", 32)}
            rounds = bench.measure("histories", 32, cases)
        # The file is used again from its start and never cut, so its size is the largest it had.
        report.at_most("the -wal file under steady load, MB", wal_megabytes(folder / "long.db"), 80)
    report.at_least("rate with the long history, of the short", rounds.ratio(late, early), 0.85)
    report.show(f"memory after {early_entries:,} entries, MiB", early_mebibytes)
    report.show(f"memory after {late_entries:,} entries, MiB", late_mebibytes)
    report.at_most("memory, late of early", late_mebibytes / early_mebibytes, 1.05, 1.02)


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


def measure_statements(bench: Bench) -> None:
    """Compare the last page of a big account to the first page of a small one."""
    plan, report = bench.plan, bench.report
    tell("statements: filling the database, and checking it")
    big_id, small_id = fill_histories(bench.folder, plan.big_entries, plan.small_entries)
    with serving("ledger", bench.folder, "pages") as server, closing(connect(server)) as link:
        tell("statements: walking to the last page")
        last = last_page(link, f"/accounts/{big_id}/statement?limit={PAGE_SIZE_MAX}")
        first = f"/accounts/{small_id}/statement?limit={PAGE_SIZE_MAX}"
        times = [
            (page_milliseconds(link, first), page_milliseconds(link, last))
            for _ in range(plan.page_requests)
        ]
    first_ms, last_ms = (median(of_page) for of_page in zip(*times, strict=True))
    report.show(f"first page of {plan.small_entries:,} entries, ms", first_ms)
    report.show(f"last page of {plan.big_entries:,} entries, ms", last_ms)
    report.at_most("the last page, of the first", last_ms / first_ms, 2)


def measure_all(plan: Plan, folder: Path) -> str:
    """Measure everything beside one ceiling, and return the tables."""
    with (
        serving("ceiling", folder, "ceiling") as ceiling,
        serving("route_class", folder, "route_class") as route_class,
    ):
        for server in (ceiling, route_class):
            invent_accounts(server)
        bench = Bench(plan, folder, ceiling, route_class, Report())
        measure_rates(bench)
        measure_postgres(bench)
        measure_growth(bench)
    measure_statements(bench)
    return bench.report.text()


def read_options() -> tuple[Plan, str | None]:
    """Return the plan that the command line asks for, and the commit to compare with."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short runs and small histories")
    parser.add_argument("--seconds", type=int, help="seconds of each run of the load generator")
    parser.add_argument("--against", metavar="COMMIT", help="measure beside that ledger.py alone")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    return replace(plan, seconds=options.seconds or plan.seconds), options.against


def leave(_signal: int, _frame: FrameType | None) -> None:
    """Turn a request to end into an exception, so that everything is cleaned up."""
    raise SystemExit(1)


def main() -> int:
    """Measure what was asked for, and print it."""
    plan, commit = read_options()
    if shutil.which("wrk") is None:
        tell("wrk is missing; get it with: apt-get install wrk (or: brew install wrk)")
        return 2
    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix="ledger-bench-") as name:
        folder = Path(name)
        # PostgreSQL runs as another user where this is root.
        folder.chmod(0o755)
        if commit:
            print(table_against(commit, folder, plan.rounds, plan.seconds))
        else:
            print(measure_all(plan, folder))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
