"""Give a ledger a history: by transfers over HTTP, by copy, or straight into its file."""

import shutil
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from uuid import uuid4

from harness import PROGRAM, Server, open_accounts, run_load, serving, tell

FILL_SETTINGS = "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -200000"

FILL_EVENTS = """
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
    INSERT INTO event (id, kind, ts, caller, account_id, arguments)
    SELECT printf(:event_ids, i), 'TRANSFER', :ts, 'local', :source_id, '{}' FROM n
"""

FILL_ENTRIES = """
    WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < :count)
    INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance)
    SELECT a.id, a.last_seq + i, printf(:entry_ids, i), printf(:event_ids, i),
           :type, 1, a.balance + :sign * i
    FROM n CROSS JOIN account a WHERE a.id = :account_id
"""

FILL_BALANCE = """
    UPDATE account SET last_seq = last_seq + :count, balance = balance + :sign * :count
    WHERE id = :account_id
"""


def grow(server: Server, entries: int, goal: int) -> int:
    """Send transfers until the ledger has about the wanted number of entries."""
    seconds = 1
    while entries < goal:
        load = run_load(server, "spread", 32, seconds)
        entries += 2 * load.requests
        wanted_seconds = (goal - entries) / 2 / load.rate_per_second
        seconds = max(1, min(20, round(wanted_seconds)))
        tell(f"growing: {entries:,} of {goal:,} entries")
    return entries


def copy_database(folder: Path, old: str, new: str) -> None:
    """Copy the database and accounts of a running server."""
    with (
        closing(sqlite3.connect(folder / f"{old}.db")) as source,
        closing(sqlite3.connect(folder / f"{new}.db")) as copy,
    ):
        source.backup(copy)
    shutil.copy(folder / f"{old}.accounts", folder / f"{new}.accounts")


def new_ids(now: int) -> str:
    """Return a template over a number for ids of one moment, which rise as the ledger's do."""
    milliseconds = f"{now // 1_000:012x}"
    return f"{milliseconds[:8]}-{milliseconds[8:]}-7{str(uuid4())[15:24]}%012x"


def fill(database: sqlite3.Connection, source_id: str, dest_id: str, count: int) -> None:
    """Write a history of transfers of 1 as the ledger itself would have stored it."""
    now = time.time_ns() // 1_000
    values = {"count": count, "ts": now, "source_id": source_id, "event_ids": new_ids(now)}
    database.execute(FILL_EVENTS, values)
    for account_id, entry_type, sign in ((source_id, "DEBIT", -1), (dest_id, "CREDIT", 1)):
        values |= {"account_id": account_id, "type": entry_type, "sign": sign}
        values["entry_ids"] = new_ids(now)
        database.execute(FILL_ENTRIES, values)
        database.execute(FILL_BALANCE, values)


def fill_histories(folder: Path, big_entries: int, small_entries: int) -> tuple[str, str]:
    """Return an account with a big and one with a small number of entries in a new ledger."""
    with serving("ledger", folder, "pages") as server:
        source_id, big_id, small_id = open_accounts(server, 3)
    file = folder / "pages.db"
    with closing(sqlite3.connect(file)) as database:
        database.executescript(FILL_SETTINGS)
        # The deposit was the first entry.
        fill(database, source_id, big_id, big_entries - 1)
        fill(database, source_id, small_id, small_entries - 1)
        database.commit()
    # A file that the ledger itself would refuse measures nothing.
    check = [sys.executable, str(PROGRAM), "check", "--database-url", f"sqlite:///{file}"]
    subprocess.run(check, check=True, stdout=sys.stderr)
    return big_id, small_id
