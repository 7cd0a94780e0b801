"""The specification of ledger.py: run it with `pytest`.

It opens with a day at the bank, after which a reader may stop. Then there is one section for
each section of ledger.py, in its order, and at the end what only a real server can show: load
over many connections, and `kill -9`. LEDGER_TEST_CYCLES=25 makes the last one as long as 25
deaths; without it there are 3.
"""

import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

import ledger

PROGRAM = Path(ledger.__file__)
CYCLES = int(os.environ.get("LEDGER_TEST_CYCLES", "3"))
NOBODY = "00000000-0000-7000-8000-000000000000"


# --------------------------------------------------------------------- Words of the tests


class Bank:
    """A ledger under test, spoken to over HTTP; people are known by their names."""

    def __init__(self, send: Callable[..., httpx.Response], database: Path) -> None:
        self.send = send
        self.database = database
        self.ids: dict[str, str] = {}

    def given(self, asset: str = "USD", **balances: int) -> "Bank":
        """Open an account for each name, with a balance."""
        for name, balance in balances.items():
            account = self.post("/accounts", owner_name=name, asset=asset).json()
            self.ids[name] = account["id"]
            if balance:
                assert self.deposit(name, balance).status_code == 200
        return self

    def post(self, path: str, *, key: str | None = None, **body: Any) -> httpx.Response:
        """Send a body, under a key if there is one."""
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.send("POST", path, json=body, headers=headers)

    def get(self, path: str, **parameters: Any) -> httpx.Response:
        """Read something."""
        return self.send("GET", path, params=parameters)

    def deposit(self, name: str, amount: int, **options: Any) -> httpx.Response:
        """Take money in, under a new key unless one is given."""
        path = f"/accounts/{self.ids[name]}/deposit"
        return self.post(path, amount=amount, **{"key": new_key(), **options})

    def withdraw(self, name: str, amount: int, **options: Any) -> httpx.Response:
        """Pay money out, under a new key unless one is given."""
        path = f"/accounts/{self.ids[name]}/withdraw"
        return self.post(path, amount=amount, **{"key": new_key(), **options})

    def transfer(self, source: str, dest: str, amount: int, **options: Any) -> httpx.Response:
        """Move money, under a new key unless one is given."""
        ends = {"source_account_id": self.ids[source], "dest_account_id": self.ids[dest]}
        return self.post("/transfers", **ends, amount=amount, **{"key": new_key(), **options})

    def statement(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return one page of entries, newest first."""
        page = self.get(f"/accounts/{self.ids[name]}/statement", **parameters).json()
        return list(page["items"])

    def balances(self) -> dict[str, int]:
        """Return what everybody has."""
        items = self.get("/accounts", limit=200).json()["items"]
        return {account["owner_name"]: account["balance"] for account in items}

    def rows(self, query: str) -> list[Any]:
        """Return stored rows, as another program sees them."""
        with closing(sqlite3.connect(self.database)) as connection:
            return connection.execute(query).fetchall()

    def tamper(self, *statements: str) -> None:
        """Change stored rows behind the ledger's back."""
        with closing(sqlite3.connect(self.database)) as connection, connection:
            for statement in statements:
                connection.execute(statement)


def new_key() -> str:
    """Return a key that nobody has used."""
    return str(uuid.uuid4())


def code(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the code of a refusal, after a look at its form."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:ledger:error:{problem['code']}"
    assert problem["status"] == answer.status_code
    assert problem["title"]
    assert problem["detail"]
    return answer.status_code, problem["code"]


class BankInside(Bank):
    """A ledger in this process, so that a test can look behind its HTTP."""

    def __init__(self, app: FastAPI, runner: asyncio.Runner, database: Path, **wire: Any) -> None:
        self.app = app
        self.ledger: ledger.Ledger = app.state.ledger
        self.runner = runner
        self.client = httpx.AsyncClient(
            transport=httpx.ASGITransport(app, **wire), base_url="http://localhost"
        )
        super().__init__(
            lambda *a, **options: runner.run(self.client.request(*a, **options)), database
        )

    def together(self, *requests: tuple[str, str | None, dict[str, Any]]) -> list[httpx.Response]:
        """Send (path, key, body) at one moment, so that they share a batch."""

        async def gather() -> list[httpx.Response]:
            sent = [
                self.client.post(path, json=body, headers={"Idempotency-Key": key} if key else {})
                for path, key, body in requests
            ]
            return await asyncio.gather(*sent)

        return self.runner.run(gather())

    def wrong(self) -> list[str]:
        """Return what the integrity check finds."""
        with self.ledger.read() as connection:
            return [finding.wrong for finding in ledger.check(connection) if finding.wrong]


@contextmanager
def opened(database: Path, **wire: Any) -> Iterator[BankInside]:
    """Run the application on a database file in this process."""
    app = ledger.create_app(ledger.Settings(f"sqlite:///{database}"))
    with asyncio.Runner() as runner:
        bank = BankInside(app, runner, database, **wire)
        yield bank
        runner.run(bank.client.aclose())
    app.state.ledger.database.close()


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[BankInside]:
    """A new and empty ledger."""
    with opened(tmp_path / "ledger.db") as bank:
        yield bank


# ------------------------------------------------------------------------ A day at the bank


def test_a_day_at_the_bank(bank: BankInside) -> None:
    # Alice opens an account. It holds dollars, counted in cents, and is empty.
    opened = bank.post("/accounts", owner_name="Alice")
    alice = opened.json()
    assert (opened.status_code, alice["balance"], alice["asset"]) == (201, 0, "USD")

    # The answer says where her account can be found from now on.
    assert bank.get(opened.headers["Location"]).json() == alice

    # She brings ten dollars and fifty cents, and names this intent "pay-day".
    pay_day = f"/accounts/{alice['id']}/deposit"
    first = bank.post(pay_day, key="pay-day", amount=1050, memo="wages")
    assert first.json()["balance"] == 1050

    # Her phone has lost the answer and asks again: the same answer, and no second wages.
    again = bank.post(pay_day, key="pay-day", amount=1050, memo="wages")
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")

    # The same name for another intent is refused, because one of the two must be a mistake.
    assert code(bank.post(pay_day, key="pay-day", amount=9999)) == (409, "idempotency_key_reused")

    # Bob opens an account, and Alice sends him three dollars.
    bob = bank.post("/accounts", owner_name="Bob").json()
    ends = {"source_account_id": alice["id"], "dest_account_id": bob["id"]}
    sent = bank.post("/transfers", key="rent", **ends, amount=300, memo="rent").json()
    assert (sent["source"]["balance"], sent["dest"]["balance"]) == (750, 300)

    # She cannot send what she does not have, and is told what she has.
    refused = bank.post("/transfers", key="yacht", **ends, amount=100_000)
    assert code(refused) == (409, "insufficient_funds")
    assert (refused.json()["balance"], refused.json()["requested"]) == (750, 100_000)

    # Bob takes a dollar out in cash.
    bank.post(f"/accounts/{bob['id']}/withdraw", key="coffee", amount=100)
    assert bank.balances() == {"Alice": 750, "Bob": 200}

    # Alice's statement shows what happened, newest first, with the balance after each entry.
    lines = bank.get(f"/accounts/{alice['id']}/statement").json()["items"]
    assert [(line["type"], line["amount"], line["balance"], line["ref"]) for line in lines] == [
        ("DEBIT", 300, 750, "rent"),
        ("CREDIT", 1050, 1050, "wages"),
    ]

    # The transfer is one transaction: what Alice lost is what Bob got.
    both = bank.get(f"/transactions/{sent['transfer_id']}").json()["entries"]
    assert [(entry["account_id"], entry["type"], entry["amount"]) for entry in both] == [
        (alice["id"], "DEBIT", 300),
        (bob["id"], "CREDIT", 300),
    ]

    # At night the auditor adds everything up: the outside world owes exactly what is here.
    assert bank.rows("SELECT SUM(balance) FROM account") == [(0,)]
    assert bank.wrong() == []


# --------------------------------------------------------------------------------- Settings


@pytest.mark.parametrize(
    ("environment", "url"),
    [
        ({}, "sqlite:///ledger.db"),
        ({"DATABASE_URL": "sqlite:///b.db"}, "sqlite:///b.db"),
        (
            {"DATABASE_URL": "sqlite:///b.db", "LEDGER_DATABASE_URL": "sqlite:///a.db"},
            "sqlite:///a.db",
        ),
    ],
)
def test_the_environment_names_the_database(environment: dict[str, str], url: str) -> None:
    assert ledger.Settings.read(environment).database_url == url


def test_a_flag_wins_over_the_environment() -> None:
    environment = {"LEDGER_DATABASE_URL": "sqlite:///a.db", "PORT": "9000"}
    read = ledger.Settings.read(environment, database_url="sqlite:///flag.db")
    assert read == ledger.Settings("sqlite:///flag.db", port=9000)


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "8000.0", "\u0661", " 80"])
def test_a_bad_port_stops_the_start(port: str) -> None:
    with pytest.raises(ledger.StartRefused, match="PORT must be"):
        ledger.Settings.read({"PORT": port})


@pytest.mark.parametrize("url", ["", "ledger.db", "mysql://x/y", "sqlite://", "sqlite:///:memory:"])
def test_a_url_that_is_no_file_stops_the_start(url: str) -> None:
    with pytest.raises(ledger.StartRefused, match="the database"):
        ledger.Database(url)


def test_importing_the_module_has_no_effect(tmp_path: Path) -> None:
    script = "import ledger, os, threading; print(os.listdir(), threading.active_count())"
    environment = {**os.environ, "PYTHONPATH": str(PROGRAM.parent), "PORT": "bad"}
    ran = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (ran.stdout, ran.stderr) == ("[] 1\n", "")


def test_uvicorn_finds_the_application_and_a_bad_setting_ends_it_in_one_line(
    tmp_path: Path,
) -> None:
    environment = {**os.environ, "LEDGER_DATABASE_URL": "mysql://x"}
    ran = subprocess.run(
        [sys.executable, "-m", "uvicorn", "--app-dir", str(PROGRAM.parent), "ledger:app"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert ran.returncode != 0
    assert ran.stderr == "ledger: the database URL must begin with sqlite:///\n"


# ---------------------------------------------------------------------------- Money, Errors


@pytest.mark.parametrize(
    ("asset", "answer"), [("USD", 201), ("EUR", 201), ("GBP", 201), ("JPY", 201)]
)
def test_an_account_holds_one_asset(bank: BankInside, asset: str, answer: int) -> None:
    opened = bank.post("/accounts", owner_name="Alice", asset=asset)
    assert (opened.status_code, opened.json()["asset"]) == (answer, asset)


@pytest.mark.parametrize("asset", ["GOLD", "DMND", "PTS"])
def test_a_closed_loop_asset_is_not_for_everybody(bank: BankInside, asset: str) -> None:
    assert code(bank.post("/accounts", owner_name="A", asset=asset)) == (409, "asset_closed_loop")


def test_an_unknown_asset_is_not_found(bank: BankInside) -> None:
    assert code(bank.post("/accounts", owner_name="A", asset="usd")) == (404, "asset_not_found")


def test_every_error_has_a_code_of_its_own() -> None:
    errors = ledger.LedgerError.__subclasses__()
    assert ledger.InsufficientFunds.code == "insufficient_funds"
    assert len({error.code for error in errors}) == len(errors)
    assert all(400 <= error.status < 600 for error in errors)


# --------------------------------------------------------------------------------- Tables


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE entry SET amount = 1", "for ever"),
        ("DELETE FROM entry", "for ever"),
        ("REPLACE INTO entry SELECT * FROM entry WHERE seq = 1", "must follow|for ever"),
        ("UPDATE 'transaction' SET memo = 'x'", "for ever"),
        ("DELETE FROM 'transaction'", "for ever"),
        ("UPDATE audit_event SET caller = 'x'", "for ever"),
        ("DELETE FROM audit_event", "for ever"),
        ("UPDATE idempotency_key SET body = 'x'", "for ever"),
        ("DELETE FROM account", "never deleted"),
        ("UPDATE account SET kind = 'SYSTEM'", "for ever"),
        ("UPDATE account SET balance = balance + 1", "last entry"),
        ("UPDATE account SET last_seq = 9", "last entry"),
        ("UPDATE account SET status = 'ASLEEP'", "CHECK"),
        ("UPDATE account SET status = 'CLOSED'", "CHECK"),
        ("INSERT INTO entry SELECT account_id, seq + 2, id, transaction_id, type, amount, balance "
         "FROM entry", "must follow"),
        ("INSERT INTO entry SELECT account_id, seq + 1, id, transaction_id, type, amount, balance "
         "FROM entry", "must follow"),
        ("INSERT INTO entry SELECT account_id, seq + 1, id, transaction_id, type, 0, balance "
         "FROM entry", "CHECK"),
        ("INSERT INTO account SELECT 'x', NULL, 'x', 'USD', 'CUSTOMER', 'ACTIVE', 5, 0, 0", "CHECK"),
        ("INSERT INTO account SELECT 'x', NULL, 'x', 'USD', 'CUSTOMER', 'ACTIVE', 0.5, 0, 0", "REAL"),
    ],
)  # fmt: skip
def test_the_database_itself_refuses(bank: BankInside, statement: str, message: str) -> None:
    bank.given(alice=100)
    with pytest.raises(sqlite3.IntegrityError, match=message):
        bank.tamper("PRAGMA recursive_triggers = ON", statement)
    assert bank.wrong() == []


def test_the_database_keeps_customers_above_zero(bank: BankInside) -> None:
    bank.given(alice=100)
    with pytest.raises(sqlite3.IntegrityError, match="CHECK"):
        bank.tamper(
            "INSERT INTO entry SELECT account_id, 2, 'x', transaction_id, 'DEBIT', 101, -1 "
            f"FROM entry WHERE account_id = '{bank.ids['alice']}'",
            f"UPDATE account SET balance = -1, last_seq = 2 WHERE id = '{bank.ids['alice']}'",
        )


def test_the_database_keeps_closed_accounts_closed(bank: BankInside) -> None:
    bank.given(alice=0)
    bank.tamper("UPDATE account SET status = 'CLOSED' WHERE kind = 'CUSTOMER'")
    with pytest.raises(sqlite3.IntegrityError, match="never comes back"):
        bank.tamper("UPDATE account SET status = 'ACTIVE' WHERE kind = 'CUSTOMER'")


def test_ids_rise_even_when_the_clock_goes_back() -> None:
    new_id = ledger.id_source()
    ids = [new_id(now) for now in (10**15, 10**15, 10**15 + 1, 5, 10**15 + 10**6)]
    assert ids == sorted(set(ids))
    assert all(
        uuid.UUID(one).version == 7 and uuid.UUID(one).variant == uuid.RFC_4122 for one in ids
    )
    assert int(ids[0].replace("-", "")[:12], 16) == 10**12


def test_times_are_rfc_3339_in_utc() -> None:
    assert ledger.utc_text(0) == "1970-01-01T00:00:00.000000Z"
    assert ledger.utc_text(1_795_219_200_000_001) == "2026-11-21T00:00:00.000001Z"


# ------------------------------------------------------------------------------- Database


def test_a_write_is_synced_to_disk_and_takes_the_lock_at_its_start(bank: BankInside) -> None:
    database = bank.ledger.database
    with database.begin(database.writer) as connection:
        pragma = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers")
        }
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            bank.tamper("PRAGMA busy_timeout = 0", "BEGIN IMMEDIATE")
    full = 2
    assert pragma == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "recursive_triggers": 1,
    }


def test_a_read_cannot_write(bank: BankInside) -> None:
    with pytest.raises(ledger.DatabaseUnavailable), bank.ledger.read() as connection:
        connection.exec_driver_sql("INSERT INTO asset VALUES ('X', 'X', 0, 0)")


def test_all_page_caches_together_stay_under_16_megabytes(bank: BankInside) -> None:
    database, total = bank.ledger.database, 0
    for engine in (database.writer, database.reader):
        with engine.connect() as connection:
            kibibytes = -connection.exec_driver_sql("PRAGMA cache_size").scalar_one()
            total += kibibytes * 1024 * engine.pool.size()
    assert 0 < total <= 16 * 2**20


def test_what_was_written_is_there_after_a_restart(tmp_path: Path) -> None:
    with opened(tmp_path / "ledger.db") as bank:
        first = bank.given(alice=100).deposit("alice", 5, key="k")
        accounts = bank.rows("SELECT * FROM account")
    with opened(tmp_path / "ledger.db") as bank:
        again = bank.post(first.request.url.path, key="k", amount=5)
        assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
        assert bank.rows("SELECT * FROM account") == accounts


def refused_start(database: Path) -> str:
    """Return why a ledger cannot be opened."""
    with pytest.raises(ledger.StartRefused) as refusal:
        ledger.create_app(ledger.Settings(f"sqlite:///{database}"))
    return str(refusal.value)


def test_a_strangers_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.db"
    with closing(sqlite3.connect(stranger)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = stranger.read_bytes()
    assert refused_start(stranger) == "the database holds something else than a ledger"
    assert stranger.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letter.db"
    letter.write_text("Dear Alice, " * 100)
    assert "file is not a database" in refused_start(letter)
    assert letter.read_text() == "Dear Alice, " * 100


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    assert "unable to open" in refused_start(tmp_path)
    assert "unable to open" in refused_start(tmp_path / "nowhere" / "ledger.db")


def test_an_unknown_schema_version_is_refused(bank: BankInside) -> None:
    bank.tamper("UPDATE schema_version SET version = 99")
    assert refused_start(bank.database) == "schema version 99 is not 1, the one known here"


def test_a_replaced_file_is_noticed_before_anything_is_lost(bank: BankInside) -> None:
    bank.given(alice=100)
    bank.database.rename(bank.database.with_suffix(".gone"))
    sqlite3.connect(bank.database).close()
    assert code(bank.deposit("alice", 1)) == (503, "database_unavailable")
    assert code(bank.get("/accounts")) == (503, "database_unavailable")
    assert code(bank.get("/health")) == (503, "database_unavailable")


@contextmanager
def held(database: Path) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of a file, as another process would."""
    with closing(sqlite3.connect(database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


def test_a_write_waits_for_another_process_while_reads_go_on(bank: BankInside) -> None:
    bank.given(alice=100)
    path = f"/accounts/{bank.ids['alice']}"

    async def scene(other: sqlite3.Connection) -> tuple[httpx.Response, httpx.Response]:
        headers = {"Idempotency-Key": "k"}
        sent = bank.client.post(f"{path}/deposit", json={"amount": 1}, headers=headers)
        waiting = asyncio.ensure_future(sent)
        await asyncio.sleep(0.05)
        read = await bank.client.get(path)
        assert not waiting.done()
        other.execute("COMMIT")
        return read, await waiting

    with held(bank.database) as other:
        read, written = bank.runner.run(scene(other))
    assert (read.json()["balance"], written.json()["balance"]) == (100, 101)


def test_a_write_that_waits_too_long_is_refused_and_not_done(
    bank: BankInside, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BUSY_SECONDS_MAX", 0.05)
    bank.given(alice=100)
    with held(bank.database):
        refused = bank.deposit("alice", 1, key="k")
    assert code(refused) == (503, "database_busy")
    assert refused.headers["Retry-After"] == "1"
    assert bank.deposit("alice", 1, key="k").json()["balance"] == 101


def test_a_full_disk_refuses_and_loses_nothing(bank: BankInside) -> None:
    bank.given(alice=100)
    with bank.ledger.database.writer.connect() as connection:
        full = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {full}")
    answers = [bank.deposit("alice", 1, key=f"k{n}") for n in range(60)]
    assert code(answers[-1]) == (507, "storage_full")
    with bank.ledger.database.writer.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    for n, answer in enumerate(answers):
        again = bank.deposit("alice", 1, key=f"k{n}")
        assert again.status_code == 200
        assert answer.status_code == 507 or again.content == answer.content
    assert bank.balances() == {"alice": 160}
