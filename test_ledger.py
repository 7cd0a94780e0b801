"""The specification of ledger.py: run it with `pytest`.

It opens with a day at the bank, after which a reader may stop. Then come the sections of
ledger.py, about in its order, and between them what only a real server can show: load over
many connections, and `kill -9`. LEDGER_TEST_CYCLES=25 makes the two tests that kill it as long
as 25 deaths; without it there are 3, and what is refused before any database is asked is tried
on SQLite alone. Everything else runs on a PostgreSQL server too: on that of
LEDGER_TEST_DATABASE_URL, or on one of its own where the programs are installed.
"""

import asyncio
import base64
import hmac
import io
import json
import logging
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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    redirect_stdout,
    suppress,
)
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx
import jwt
import psycopg
import pytest
from fastapi import FastAPI
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import create_engine, inspect
from starlette.routing import Route

import ledger

PROGRAM = Path(ledger.__file__)
LONG = "LEDGER_TEST_CYCLES" in os.environ
CYCLES = int(os.environ.get("LEDGER_TEST_CYCLES", "3"))
NOTHING: Mapping[str, int] = {}
NO_SECRETS: Mapping[str, str] = {}
NOBODY = "00000000-0000-7000-8000-000000000000"


# --------------------------------------------------------------------- Words of the tests


class Bank:
    """A ledger under test, spoken to over HTTP; people are known by their names."""

    def __init__(self, send: Callable[..., httpx.Response], database: str) -> None:
        self.send = send
        self.database = database
        self.ids: dict[str, str] = {}

    def given(
        self, others: Mapping[str, int] = NOTHING, /, *, asset: str = "USD", **balances: int
    ) -> "Bank":
        """Open an account for each name, with a balance."""
        for name, balance in {**others, **balances}.items():
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

    def by(self, credential: str | bytes, header: str = "X-API-Key") -> "Bank":
        """Return the same ledger as a caller with a credential sees it."""

        def send(*request: Any, headers: Any = (), **options: Any) -> httpx.Response:
            return self.send(*request, headers={**dict(headers), header: credential}, **options)

        other = Bank(send, self.database)
        other.ids = self.ids
        return other

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

    def turn(self, name: str, step: str) -> httpx.Response:
        """Freeze, unfreeze or close an account."""
        return self.send("POST", f"/accounts/{self.ids[name]}/{step}")

    def statement(self, name: str, **parameters: Any) -> list[dict[str, Any]]:
        """Return one page of entries, newest first."""
        page = self.get(f"/accounts/{self.ids[name]}/statement", **parameters).json()
        return list(page["items"])

    def balances(self) -> dict[str, int]:
        """Return what everybody has who opened an account under no name of a dialect."""
        items = self.get("/accounts", limit=200).json()["items"]
        return {a["owner_name"]: a["balance"] for a in items if a["name"] is None}

    def rows(self, query: str) -> list[Any]:
        """Return stored rows, as another program sees them."""
        with closing(connect(self.database)) as connection:
            return list(connection.execute(query).fetchall())

    def tamper(self, *statements: str) -> None:
        """Change stored rows behind the ledger's back."""
        TAMPERED.add(self.database)
        with closing(connect(self.database)) as connection, connection:
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

    def __init__(self, app: FastAPI, runner: asyncio.Runner, database: str, **wire: Any) -> None:
        self.app = app
        self.ledger: ledger.Ledger = app.ledger
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
        with self.ledger.database.read() as connection:
            return [found for result in ledger.check(connection) for found in result.wrong]


# ------------------------------------------------------------------------- The two engines

ENGINES = ("sqlite", "postgresql")
on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
# What is refused before any database is asked: on the second engine in long runs only.
at_the_edge = pytest.mark.parametrize("engine", ENGINES if LONG else ENGINES[:1], indirect=True)
on_postgresql = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
REFUSED = (sqlite3.IntegrityError, psycopg.IntegrityError)


def connect(database: str) -> Any:
    """Connect to a database as another program does."""
    if database.startswith("sqlite"):
        return sqlite3.connect(file_of(database))
    return psycopg.connect(database)


def dropping(bank: "Bank", trigger: str, table: str) -> str:
    """Return the statement that drops a trigger."""
    of_table = f' ON "{table}"' if bank.database.startswith("postgresql") else ""
    return f"DROP TRIGGER {trigger}{of_table}"


def tables(database: str) -> set[str]:
    """Return the tables of a database; a file that is not there is not made."""
    if database.startswith("sqlite") and not file_of(database).exists():
        return set()
    url = database.replace("postgresql:", "postgresql+psycopg:")
    engine = create_engine(url)
    found = set(inspect(engine).get_table_names())
    engine.dispose()
    return found


def file_of(database: str) -> Path:
    """Return the file that holds a ledger on SQLite."""
    return Path(database.removeprefix("sqlite:///"))


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The engine that a test runs on: first the one, then the other."""
    return str(request.param)


@pytest.fixture
def database(engine: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new database: an SQLite file that is not there, or one of PostgreSQL."""
    if engine == "sqlite":
        yield f"sqlite:///{tmp_path}/ledger.db"
        return
    url = request.getfixturevalue("scratch")()
    yield url
    if url not in TAMPERED:
        empty(url)


TAMPERED: set[str] = set()


def empty(database: str) -> None:
    """Leave nothing but the tables: making a new database for each test takes too long."""
    with closing(psycopg.connect(database)) as connection, connection:
        connection.execute("SET session_replication_role = replica")
        connection.execute("SET lock_timeout = '5s'")
        names = [f'"{name}"' for name in tables(database) - {"schema_version"}]
        if names:
            connection.execute(f"TRUNCATE {', '.join(names)}")


@pytest.fixture(scope="session")
def scratch(postgresql: str) -> Iterator[Callable[[], str]]:
    """A function that gives an empty database: the last one, unless its schema was changed."""
    with ExitStack() as stack:
        given: list[str] = []

        def give() -> str:
            if not given or given[-1] in TAMPERED:
                given.append(stack.enter_context(new_database(postgresql)))
            return given[-1]

        yield give


@contextmanager
def new_database(server: str) -> Iterator[str]:
    """Make a database on a PostgreSQL server, and drop it in the end."""
    name = f"ledger_test_{uuid.uuid4().hex}"
    with closing(psycopg.connect(server, autocommit=True)) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'UTF8'")
        yield beside(server, name)
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def beside(server: str, name: str) -> str:
    """Return the URL of another database on the same server."""
    return urlsplit(server)._replace(path=f"/{name}").geturl()


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a PostgreSQL server: LEDGER_TEST_DATABASE_URL, or one for this run alone."""
    given = os.environ.get("LEDGER_TEST_DATABASE_URL")
    if given:
        yield given
        return
    with own_server() as server:
        yield server.url


class OwnServer:
    """A PostgreSQL server of this run alone, on a free port, which syncs nothing to disk."""

    def __init__(self, programs: Path, folder: str) -> None:
        self.programs, self.folder = programs, folder
        # It refuses to run as root.
        self.user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
        if self.user:
            shutil.chown(folder, **self.user)
        self.run("initdb", "-U", "ledger", "-A", "trust", "-E", "UTF8", "--no-sync")
        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            self.port = probe.getsockname()[1]
        self.url = f"postgresql://ledger@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *options: str) -> None:
        """Run one of its programs on its data."""
        command = [str(self.programs / program), "-D", f"{self.folder}/data", *options]
        subprocess.run(command, check=True, capture_output=True, cwd=self.folder, **self.user)

    def start(self) -> None:
        """Serve from now on."""
        options = {"port": self.port, "listen_addresses": "127.0.0.1", "max_connections": 200}
        options |= {"unix_socket_directories": self.folder, "fsync": "off"}
        options |= {"full_page_writes": "off", "wal_level": "minimal", "max_wal_senders": 0}
        given = " ".join(f"-c {name}={value}" for name, value in options.items())
        self.run("pg_ctl", "-o", given, "-l", f"{self.folder}/log", "-w", "start")

    def stop(self) -> None:
        """End at once, as if it had crashed."""
        self.run("pg_ctl", "-m", "immediate", "-w", "stop")


@contextmanager
def own_server() -> Iterator[OwnServer]:
    """Run a PostgreSQL server, or skip the test where its programs are not installed."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (programs and str(programs[-1]))
    if not found:
        pytest.skip("no PostgreSQL: install its server, or set LEDGER_TEST_DATABASE_URL")
    with tempfile.TemporaryDirectory() as folder:
        server = OwnServer(Path(found).parent, folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def opened(
    database: str,
    dialects: Sequence[ledger.Dialect] = (ledger.api,),
    secrets: Mapping[str, str] = NO_SECRETS,
    **wire: Any,
) -> Iterator[BankInside]:
    """Run the application on a database file in this process; without dialects it is empty."""
    app = ledger.create_app(ledger.Settings(database, **secrets), dialects)
    clock = ledger.utc_now
    with asyncio.Runner() as runner:
        bank = BankInside(app, runner, database, **wire)
        yield bank
        runner.run(bank.client.aclose())
    ledger.utc_now = clock
    app.ledger.database.close()


@pytest.fixture
def bank(database: str) -> Iterator[BankInside]:
    """A new and empty ledger."""
    with opened(database) as bank:
        yield bank


def key_command(database: str, *arguments: str) -> str:
    """Run `python ledger.py key ...` in this process, and return what it prints."""
    with redirect_stdout(io.StringIO()) as said:
        status = ledger.main(["key", *arguments, "--database-url", database])
    assert status == 0
    return said.getvalue().strip()


def new_api_key(database: str, name: str, role: str) -> str:
    """Make an API key, as the operator does."""
    return key_command(database, "add", "--name", name, "--role", role)


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
    environment = {"LEDGER_DATABASE_URL": "sqlite:///a.db"}
    read = ledger.Settings.read(environment, database_url="sqlite:///flag.db")
    assert read == ledger.Settings("sqlite:///flag.db")


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "8000.0", "\u0661", " 80", ""])
def test_a_port_is_a_number(port: str) -> None:
    with pytest.raises(ledger.StartupError, match="the port must be a number from 0 to 65535"):
        ledger.port_number(port)


@pytest.mark.parametrize(
    "url",
    ["", "ledger.db", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=1",
     "sqlite://host/x.db", "sqlite://u:p@/x.db", "sqlite+aiosqlite:///x.db", "sqlite+nope:///x.db",
     "postgresql://h/db?nope=1", "oracle://[::1", "sqlite:///\0.db"],
)  # fmt: skip
def test_a_url_that_is_no_file_stops_the_start(url: str) -> None:
    with pytest.raises(ledger.StartupError, match="the database"):
        ledger.database_at(url)


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
    database: str,
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
    assert ran.stderr == "ledger: the database must be a plain file, such as sqlite:///ledger.db\n"


# ---------------------------------------------------------------------------- Money, Errors


@pytest.mark.parametrize("asset", ["USD", "EUR", "GBP", "JPY"])
def test_an_account_is_opened_in_its_asset(bank: BankInside, asset: str) -> None:
    opened = bank.post("/accounts", owner_name="Alice", asset=asset)
    assert (opened.status_code, opened.json()["asset"]) == (201, asset)


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
        ('UPDATE event SET memo = NULL', "for ever"),
        ('DELETE FROM event', "for ever"),
        ("UPDATE event SET caller = 'x'", "for ever"),
        ("DELETE FROM event", "for ever"),
        ("UPDATE idempotency_key SET body = 'x'", "for ever"),
        ("DELETE FROM account", "for ever"),
        ("UPDATE account SET kind = 'SYSTEM'", "for ever"),
        ("UPDATE account SET balance = balance + 1", "last entry"),
        ("UPDATE account SET last_seq = 9", "last entry"),
        ("UPDATE account SET balance = 0, last_seq = 0", "last entry"),
        ("UPDATE api_key SET role = 'service' WHERE name = 'new'", "for ever"),
        ("UPDATE api_key SET revoked_at = NULL WHERE name = 'old'", "revoked once"),
        ("DELETE FROM api_key", "for ever"),
        ("UPDATE asset SET exponent = 3", "for ever"),
        ("DELETE FROM asset", "for ever"),
        ("UPDATE account SET status = 'ASLEEP'", "CHECK"),
        ("UPDATE account SET status = 'CLOSED'", "CHECK"),
        ("INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) SELECT account_id, seq + 2, id, transaction_id, type, amount, balance "
         "FROM entry", "must follow"),
        ("INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) SELECT account_id, seq + 1, id, transaction_id, type, amount, balance "
         "FROM entry", "must follow"),
        ("INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) SELECT account_id, seq + 1, id, transaction_id, type, 0, balance "
         "FROM entry", "CHECK"),
        ("INSERT INTO account VALUES ('x', NULL, '', 'USD', 'ACTIVE', 5, 0, 'CUSTOMER', 0)",
         "opens empty"),
    ],
)  # fmt: skip
def test_the_database_itself_refuses(bank: BankInside, statement: str, message: str) -> None:
    bank.given(alice=100)
    for name in ("old", "new"):
        new_api_key(bank.database, name, "admin")
    key_command(bank.database, "revoke", "old")
    with pytest.raises(REFUSED, match=f"(?i){message}"):
        bank.tamper(statement)
    assert bank.wrong() == []


@on_sqlite
def test_sqlite_refuses_what_only_it_would_do(bank: BankInside) -> None:
    bank.given(alice=100)
    replaced = "REPLACE INTO entry SELECT * FROM entry WHERE seq = 1"
    with pytest.raises(sqlite3.IntegrityError, match="for ever"):
        bank.tamper("PRAGMA recursive_triggers = ON", replaced)
    half = "INSERT INTO account VALUES ('x', NULL, '', 'USD', 'ACTIVE', 0.5, 0, 'SYSTEM', 0)"
    with pytest.raises(sqlite3.IntegrityError, match="REAL"):
        bank.tamper(half)


@on_postgresql
@pytest.mark.parametrize("table", ["entry", "event", "account", "api_key"])
def test_postgresql_refuses_to_empty_a_table(bank: BankInside, table: str) -> None:
    with pytest.raises(psycopg.IntegrityError, match="(?i)for ever"):
        bank.tamper(f"TRUNCATE {table} CASCADE")


def test_the_database_keeps_customers_above_zero(bank: BankInside) -> None:
    bank.given(alice=100)
    with pytest.raises(REFUSED, match=r"CHECK|check"):
        bank.tamper(
            "INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) SELECT account_id, 2, 'x', transaction_id, 'DEBIT', 101, -1 "
            f"FROM entry WHERE account_id = '{bank.ids['alice']}'",
            f"UPDATE account SET balance = -1, last_seq = 2 WHERE id = '{bank.ids['alice']}'",
        )


def test_the_database_keeps_closed_accounts_closed(bank: BankInside) -> None:
    bank.given(alice=0)
    bank.tamper("UPDATE account SET status = 'CLOSED' WHERE kind = 'CUSTOMER'")
    with pytest.raises(REFUSED, match="never comes back"):
        bank.tamper("UPDATE account SET status = 'ACTIVE' WHERE kind = 'CUSTOMER'")


def test_the_database_keeps_frozen_accounts_still(bank: BankInside) -> None:
    bank.given(alice=100)
    bank.tamper("UPDATE account SET status = 'FROZEN' WHERE kind = 'CUSTOMER'")
    with pytest.raises(REFUSED, match="only an active account moves money"):
        bank.tamper(
            "INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) SELECT account_id, 2, 'x', transaction_id, type, 1, 101 "
            f"FROM entry WHERE account_id = '{bank.ids['alice']}'"
        )


def test_ids_rise_even_when_the_clock_goes_back() -> None:
    new_id = ledger.IdSource().new
    ids = [new_id(now) for now in (10**15, 10**15, 10**15 + 1, 5, 10**15 + 10**6)]
    assert ids == sorted(set(ids))
    assert all(
        uuid.UUID(one).version == 7 and uuid.UUID(one).variant == uuid.RFC_4122 for one in ids
    )
    assert int(ids[0].replace("-", "")[:12], 16) == 10**12
    other = ledger.IdSource()
    other.follow(ids)
    assert other.new(5) > ids[-1]


def test_times_are_rfc_3339_in_utc() -> None:
    assert ledger.utc_text(0) == "1970-01-01T00:00:00.000000Z"
    assert ledger.utc_text(1_795_219_200_000_001) == "2026-11-21T00:00:00.000001Z"


# ------------------------------------------------------------------------------- Database


@on_sqlite
def test_a_write_is_synced_to_disk_and_takes_the_lock_at_its_start(bank: BankInside) -> None:
    database = bank.ledger.database
    with database.write() as connection:
        pragma = {
            name: connection.driver.execute(f"PRAGMA {name}").fetchone()[0]
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
    with pytest.raises(ledger.DatabaseUnavailable), bank.ledger.database.read() as connection:
        connection.execute("INSERT INTO asset VALUES ('X', 'X', 0, 0)")


@on_sqlite
def test_all_page_caches_together_stay_under_16_megabytes(bank: BankInside) -> None:
    readers = ledger.LONG_READERS_MAX + 1
    kibibytes = {}
    for write in (True, False):
        with closing(bank.ledger.database.connect(write=write).driver) as driver:
            [kibibytes[write]] = driver.execute("PRAGMA cache_size").fetchone()
    total = -1024 * (kibibytes[True] + readers * kibibytes[False])
    assert 0 < total <= 16 * 2**20


def test_what_was_written_is_there_after_a_restart(database: str) -> None:
    with opened(database) as bank:
        first = bank.given(alice=100).deposit("alice", 5, key="k")
        accounts = bank.rows("SELECT * FROM account")
    with opened(database) as bank:
        again = bank.post(first.request.url.path, key="k", amount=5)
        assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
        assert bank.rows("SELECT * FROM account") == accounts


def refused_start(database: str) -> str:
    """Return why a ledger cannot be opened."""
    with pytest.raises(ledger.StartupError) as refusal:
        ledger.create_app(ledger.Settings(database))
    return str(refusal.value)


def test_a_strangers_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.db"
    with closing(sqlite3.connect(stranger)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = stranger.read_bytes()
    assert (
        refused_start(f"sqlite:///{stranger}") == "the database holds something other than a ledger"
    )
    assert stranger.read_bytes() == before


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letter.db"
    letter.write_text("Dear Alice, " * 100)
    assert "file is not a database" in refused_start(f"sqlite:///{letter}")
    assert letter.read_text() == "Dear Alice, " * 100


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    assert "unable to open" in refused_start(f"sqlite:///{tmp_path}")
    assert "unable to open" in refused_start(f"sqlite:///{tmp_path}/nowhere/ledger.db")


def test_an_unknown_schema_version_is_refused(bank: BankInside) -> None:
    bank.tamper("UPDATE schema_version SET version = 99")
    assert refused_start(bank.database) == "schema version 99 is not 1, the known one"


@on_sqlite
def test_a_replaced_file_is_noticed_before_anything_is_lost(bank: BankInside) -> None:
    bank.given(alice=100)
    file = file_of(bank.database)
    file.rename(file.with_suffix(".gone"))
    sqlite3.connect(file).close()
    assert code(bank.deposit("alice", 1)) == (503, "database_unavailable")
    assert code(bank.get("/accounts")) == (503, "database_unavailable")
    assert code(bank.get("/health")) == (503, "database_unavailable")


@contextmanager
def held(database: str) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of a file, as another process would."""
    with closing(sqlite3.connect(file_of(database), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


@on_sqlite
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


@on_sqlite
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


@on_sqlite
def test_a_full_disk_refuses_and_loses_nothing(bank: BankInside) -> None:
    bank.given(alice=100)
    [connection] = bank.ledger.database._writing
    [full] = connection.driver.execute("PRAGMA page_count").fetchone()
    connection.driver.execute(f"PRAGMA max_page_count = {full}")
    answers = [bank.deposit("alice", 1, key=f"k{n}") for n in range(60)]
    assert code(answers[-1]) == (507, "storage_full")
    connection.driver.execute("PRAGMA max_page_count = 1000000")
    for n, answer in enumerate(answers):
        again = bank.deposit("alice", 1, key=f"k{n}")
        assert again.status_code == 200
        assert answer.status_code == 507 or again.content == answer.content
    assert bank.balances() == {"alice": 160}


def test_serving_resumes_by_itself_when_the_database_is_back() -> None:
    with own_server() as postgresql, serving(postgresql.url) as server:
        bank = server.bank.given(alice=100)
        postgresql.stop()
        for answer in (bank.deposit("alice", 1, key="k"), bank.get("/accounts")):
            assert code(answer) == (503, "database_unavailable")
            assert answer.headers["Retry-After"] == "1"
        assert code(bank.get("/health")) == (503, "database_unavailable")
        postgresql.start()
        wait_until(lambda: bank.get("/health").status_code == 200)
        assert bank.deposit("alice", 1, key="k").json()["balance"] == 101


@on_postgresql
@pytest.mark.parametrize("lost", [psycopg.OperationalError, psycopg.errors.AdminShutdown])
def test_nothing_is_done_again_after_a_connection_was_lost_in_commit(
    bank: BankInside, monkeypatch: pytest.MonkeyPatch, lost: type[psycopg.Error]
) -> None:
    bank.given(carol=0)
    [writer] = bank.ledger.database._writing

    @contextmanager
    def commit_and_lose() -> Iterator[None]:
        with writer.driver.pipeline():
            yield
        raise lost("the server closed the connection")

    monkeypatch.setattr(writer, "pipeline", commit_and_lose)
    opening = (
        ("/accounts", "k", {"owner_name": "alice"}),
        ("/accounts", None, {"owner_name": "bob"}),
    )
    answers = bank.together(*opening)
    assert [code(answer) for answer in answers] == [(503, "database_unavailable")] * 2
    monkeypatch.undo()
    # Both had been done: the key tells, and what has none was not tried a second time.
    again = bank.post("/accounts", key="k", owner_name="alice")
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert bank.rows("SELECT owner_name FROM account WHERE kind = 'CUSTOMER' ORDER BY 1") == [
        ("alice",),
        ("bob",),
        ("carol",),
    ]


@pytest.mark.parametrize("host", ["p@ss@127.0.0.1/x", "p/w@127.0.0.1/x"])
def test_a_password_that_is_not_escaped_is_not_printed(host: str) -> None:
    with pytest.raises(ledger.StartupError) as refusal:
        ledger.database_at(f"postgresql://user:{host}")
    assert "127.0.0.1" not in str(refusal.value)
    assert "must be" in str(refusal.value)


@on_postgresql
def test_a_database_of_another_encoding_is_refused(database: str) -> None:
    name = f"ledger_test_{uuid.uuid4().hex}"
    with closing(psycopg.connect(database, autocommit=True)) as connection:
        connection.execute(
            f"CREATE DATABASE {name} TEMPLATE template0 ENCODING 'SQL_ASCII' LOCALE 'C'"
        )
        assert "must be made with the encoding UTF8" in refused_start(beside(database, name))
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def test_the_server_that_can_be_written_to_is_found_among_several() -> None:
    with own_server() as first, own_server() as second:
        first.stop()
        hosts = f"127.0.0.1:{first.port},127.0.0.1:{second.port}"
        url = f"postgresql://ledger@{hosts}/postgres?target_session_attrs=read-write"
        with opened(url) as bank:
            bank.given(alice=5)
            with closing(psycopg.connect(second.url, autocommit=True)) as admin:
                admin.execute("ALTER SYSTEM SET default_transaction_read_only = on")
                admin.execute("SELECT pg_reload_conf()")
                wait_until(lambda: code(bank.deposit("alice", 1))[0] == 503)
                wait_until(lambda: code(bank.get("/health"))[0] == 503)
                admin.execute("SET default_transaction_read_only = off")
                admin.execute("ALTER SYSTEM RESET default_transaction_read_only")
                admin.execute("SELECT pg_reload_conf()")
            wait_until(lambda: bank.deposit("alice", 1, key="k").status_code == 200)
        first.start()


# ------------------------------------------------------------------------------- The rule


def book_of(**balances: int) -> tuple[ledger.Book, dict[str, ledger.Account]]:
    """Return an open batch with accounts of USD, unless the name says otherwise."""
    accounts = {
        name: ledger.Account(
            id=name,
            name=None,
            owner_name=name,
            asset="EUR" if name == "euros" else "USD",
            kind="SYSTEM" if name == "cash" else "CUSTOMER",
            status=name.upper() if name in ("frozen", "closed") else "ACTIVE",
            balance=balance,
            last_seq=1,
            created_at=0,
        )
        for name, balance in balances.items()
    }
    book = ledger.Book(None, 0, ledger.IdSource().new)  # type: ignore[arg-type]
    book.command = ledger.Command("test", "{}", lambda book: None)
    book.load(map(vars, accounts.values()))
    return book, {name: book.accounts[name] for name in accounts}


MOST = ledger.BALANCE_MAX


@pytest.mark.parametrize(
    ("legs", "error"),
    [
        ({"alice": -5, "bob": 4}, ledger.Unbalanced),
        ({"alice": 0, "bob": 0}, ledger.Unbalanced),
        ({"alice": 0}, ledger.Unbalanced),
        ({}, ledger.Unbalanced),
        ({"alice": -5, "euros": 5}, ledger.AssetMismatch),
        ({"alice": -5, "frozen": 5}, ledger.AccountFrozen),
        ({"frozen": -5, "alice": 5}, ledger.AccountFrozen),
        ({"alice": -5, "closed": 5}, ledger.AccountClosed),
        ({"alice": -101, "bob": 101}, ledger.InsufficientFunds),
        ({"alice": -5, "full": 5}, ledger.BalanceLimit),
        ({"cash": -5, "alice": 5}, ledger.BalanceLimit),
        ({"alice": -999, "frozen": 999}, ledger.AccountFrozen),
    ],
)
def test_a_refused_post_changes_nothing(legs: dict[str, int], error: type[Exception]) -> None:
    before = {
        "alice": 100,
        "bob": 0,
        "frozen": 100,
        "closed": 0,
        "euros": 9,
        "full": MOST,
        "cash": -MOST,
    }
    book, accounts = book_of(**before)
    with pytest.raises(error):
        book.post(
            "TEST", [ledger.Leg(accounts[name], amount) for name, amount in legs.items()], None
        )
    assert {name: account.balance for name, account in accounts.items()} == before
    assert not any(book.inserts.values())
    assert not any(book.updates.values())


def test_a_post_of_many_legs_numbers_its_entries(bank: BankInside) -> None:
    book, accounts = book_of(alice=100, bob=0, carol=7)
    legs = {"alice": -100, "bob": 60, "carol": 40}
    book.post(
        "TEST", [ledger.Leg(accounts[name], amount) for name, amount in legs.items()], "split"
    )
    assert {name: account.balance for name, account in accounts.items()} == {
        "alice": 0,
        "bob": 60,
        "carol": 47,
    }
    entries = [(e["account_id"], e["seq"], e["type"], e["amount"], e["balance"])
               for e in book.inserts["entry"]]  # fmt: skip
    assert entries == [
        ("alice", 2, "DEBIT", 100, 0),
        ("bob", 2, "CREDIT", 60, 60),
        ("carol", 2, "CREDIT", 40, 47),
    ]


def test_a_balance_cannot_leave_64_bits(bank: BankInside) -> None:
    bank.given(alice=0, bob=0)
    most = ledger.AMOUNT_MAX
    answers = Counter(answer.status for answer in fill(bank, bank.ids["alice"], 9_224))
    assert answers == {200: 9_223, 409: 1}
    assert code(bank.deposit("alice", most)) == (409, "balance_limit")
    # Cash is the other side of every deposit, so it is full as well.
    assert code(bank.deposit("bob", most)) == (409, "balance_limit")
    assert bank.balances() == {"alice": 9_223 * most, "bob": 0}
    assert bank.wrong() == []


# ------------------------------------------------------------------------------ The batch


def test_what_arrives_together_is_one_commit(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    deposit = f"/accounts/{bank.ids['alice']}/deposit"
    answers = bank.together(*[(deposit, new_key(), {"amount": 1}) for _ in range(20)])
    assert [answer.json()["balance"] for answer in answers] == list(range(101, 121))
    assert bank.rows('SELECT COUNT(DISTINCT ts) FROM event WHERE kind = \'DEPOSIT\'') == [(2,)]


def test_a_refused_command_does_not_disturb_its_neighbours(bank: BankInside) -> None:
    bank.given(alice=10)
    path = f"/accounts/{bank.ids['alice']}"
    answers = bank.together(
        (f"{path}/deposit", "a", {"amount": 5}),
        (f"{path}/withdraw", "b", {"amount": 16}),
        (f"{path}/withdraw", "c", {"amount": 15}),
        (f"/accounts/{NOBODY}/deposit", "d", {"amount": 1}),
    )
    assert [answer.status_code for answer in answers] == [200, 409, 200, 404]
    assert bank.balances() == {"alice": 0}
    assert bank.wrong() == []


def poison(database: str) -> list[str]:
    """Return what makes a trigger that refuses a memo."""
    if database.startswith("sqlite"):
        refusal = "BEGIN SELECT RAISE(ABORT, 'this is poison'); END"
        when = "BEFORE INSERT ON event WHEN NEW.memo = 'poison'"
        return [f"CREATE TRIGGER poison {when} {refusal}"]
    body = "IF NEW.memo = 'poison' THEN RAISE 'this is poison'; END IF; RETURN NEW;"
    call = "BEFORE INSERT ON event FOR EACH ROW EXECUTE FUNCTION poison()"
    return [
        f"CREATE FUNCTION poison() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN {body} END'".replace(
            "'poison'", "''poison''"
        ).replace("'this is poison'", "''this is poison''"),
        f"CREATE TRIGGER poison {call}",
    ]


def test_a_command_that_the_database_refuses_sinks_alone(bank: BankInside) -> None:
    bank.given(alice=0)
    bank.tamper(*poison(bank.database))
    path = f"/accounts/{bank.ids['alice']}/deposit"
    memos = ["fine", "poison", "fine", "fine"]
    requests = [(path, f"k{n}", {"amount": 1, "memo": memo}) for n, memo in enumerate(memos)]
    answers = bank.together(*requests)
    assert [answer.status_code for answer in answers] == [200, 503, 200, 200]
    assert code(answers[1]) == (503, "database_unavailable")
    # The error of the database was not stored as an answer: the key is still good.
    bank.tamper(dropping(bank, "poison", "event"))
    again = bank.together(*requests)
    assert [answer.status_code for answer in again] == [200] * 4
    assert bank.balances() == {"alice": 4}


def test_a_repeated_key_moves_money_once(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    answers = [bank.transfer("alice", "bob", 10, key="once") for _ in range(3)]
    assert len({answer.content for answer in answers}) == 1
    assert ["Idempotent-Replayed" in answer.headers for answer in answers] == [False, True, True]
    assert bank.balances() == {"alice": 90, "bob": 10}


def test_a_key_that_is_repeated_within_one_batch_acts_once(
    bank: BankInside, caplog: pytest.LogCaptureFixture
) -> None:
    bank.given(alice=0)
    request = (f"/accounts/{bank.ids['alice']}/deposit", "once", {"amount": 10})
    answers = bank.together(*[request] * 40)
    assert len({answer.content for answer in answers}) == 1
    assert Counter("Idempotent-Replayed" in answer.headers for answer in answers) == {
        False: 1,
        True: 39,
    }
    assert bank.balances() == {"alice": 10}
    # The batch saw it itself; it did not fall apart on the database's constraint.
    assert not caplog.records


def test_a_refusal_is_an_answer_and_is_repeated(bank: BankInside) -> None:
    bank.given(alice=5)
    refused = bank.withdraw("alice", 10, key="k")
    bank.deposit("alice", 100)
    again = bank.withdraw("alice", 10, key="k")
    assert code(again) == (409, "insufficient_funds")
    assert again.content == refused.content
    assert again.headers["Idempotent-Replayed"] == "true"


def test_an_opening_is_repeated_with_its_location(bank: BankInside) -> None:
    first = bank.post("/accounts", key="k", owner_name="Alice")
    again = bank.post("/accounts", key="k", owner_name="Alice")
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Location"] == first.headers["Location"]
    assert list(bank.balances()) == ["Alice"]


def test_a_request_that_never_reached_the_books_leaves_its_key_free(bank: BankInside) -> None:
    bank.given(alice=0)
    assert bank.deposit("alice", -1, key="k").status_code == 422
    assert bank.deposit("alice", 1, key="k", memmo="typo").status_code == 422
    assert bank.deposit("alice", 1, key="k").json()["balance"] == 1


def test_arguments_are_compared_after_parsing(bank: BankInside) -> None:
    bank.given(alice=0)
    path = f"/accounts/{bank.ids['alice']}/deposit"
    headers = {"Idempotency-Key": "k", "Content-Type": "application/json"}
    bodies = ['{"amount":1,"memo":"x"}', '{ "memo" : "\\u0078",\n"amount": 1 }']
    first, again = [bank.send("POST", path, content=body, headers=headers) for body in bodies]
    assert again.content == first.content
    headers["Idempotency-Key"] = '"k"'
    assert bank.send("POST", path, content=bodies[0], headers=headers).content == first.content
    assert bank.deposit("alice", 1, key="j").json()["balance"] == 2
    assert bank.deposit("alice", 1, key="j", memo=None).json()["balance"] == 2


@pytest.mark.parametrize(
    "other", [{"amount": 2}, {"amount": 1, "memo": "x"}, {"amount": 1, "memo": ""}]
)
def test_a_key_with_other_arguments_is_refused(bank: BankInside, other: dict[str, Any]) -> None:
    bank.given(alice=0, bob=0)
    first = bank.deposit("alice", 1, key="k")
    path = f"/accounts/{bank.ids['alice']}/deposit"
    assert code(bank.post(path, key="k", **other)) == (409, "idempotency_key_reused")
    assert code(bank.deposit("bob", 1, key="k")) == (409, "idempotency_key_reused")
    assert bank.deposit("alice", 1, key="k").content == first.content
    assert bank.balances() == {"alice": 1, "bob": 0}


def test_a_key_belongs_to_its_operation(bank: BankInside) -> None:
    bank.given(alice=10)
    assert bank.deposit("alice", 5, key="k").json()["balance"] == 15
    assert bank.withdraw("alice", 5, key="k").json()["balance"] == 10


def test_stored_keys_of_different_callers_cannot_collide() -> None:
    def stored(caller: str, key: str) -> str:
        return ledger.stored_key(caller, "POST /x", key)

    assert stored("jwt:a", "b|POST /x|c") != stored("jwt:a|POST /x|b", "c")
    assert stored("jwt:a|", "b") != stored("jwt:a%7C", "b")


def test_every_change_leaves_one_event(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    bank.transfer("alice", "bob", 10, key="k", memo="rent")
    bank.transfer("alice", "bob", 10, key="k", memo="rent")
    bank.withdraw("bob", 999)
    alice, bob = bank.ids["alice"], bank.ids["bob"]
    events = bank.rows("SELECT caller, kind, account_id FROM event ORDER BY id")
    assert events == [
        ("local", "open_account", alice),
        ("local", "DEPOSIT", alice),
        ("local", "open_account", bob),
        ("local", "TRANSFER", alice),
    ]
    last = bank.rows("SELECT id, arguments FROM event ORDER BY id")[-1]
    assert last[0] == bank.statement("bob")[0]["transaction_id"]
    assert json.loads(last[1])["body"]["memo"] == "rent"


def test_event_loops_in_several_threads_share_one_ledger(bank: BankInside) -> None:
    bank.given(alice=0)
    path = f"/accounts/{bank.ids['alice']}/deposit"

    def deposit_ten_times() -> None:
        async def deposits() -> None:
            wire = httpx.ASGITransport(bank.app)
            async with httpx.AsyncClient(transport=wire, base_url="http://localhost") as client:
                headers = [{"Idempotency-Key": new_key()} for _ in range(10)]
                sent = [client.post(path, json={"amount": 1}, headers=each) for each in headers]
                assert {answer.status_code for answer in await asyncio.gather(*sent)} == {200}

        asyncio.run(deposits())

    at_once([deposit_ten_times] * 8)
    assert bank.balances() == {"alice": 80}


def at_once(actions: Sequence[Callable[[], Any]]) -> list[Any]:
    """Run each action in a thread of its own, all from the same moment, and return what they do."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], Any]) -> Any:
        barrier.wait()
        return action()

    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(run, actions))


# ------------------------------------------------------------------------------ The words


@pytest.mark.parametrize(
    ("word", "kind", "legs"),
    [
        ("deposit", "DEPOSIT", [("system", "DEBIT"), ("alice", "CREDIT")]),
        ("withdraw", "WITHDRAWAL", [("alice", "DEBIT"), ("system", "CREDIT")]),
        ("transfer", "TRANSFER", [("alice", "DEBIT"), ("bob", "CREDIT")]),
    ],
)
def test_every_word_is_a_balanced_transaction(
    bank: BankInside, word: str, kind: str, legs: list[tuple[str, str]]
) -> None:
    bank.given(alice=100, bob=0)
    if word == "transfer":
        bank.transfer("alice", "bob", 7, memo="why")
    else:
        getattr(bank, word)("alice", 7, memo="why")
    transaction_id = bank.statement("alice")[0]["transaction_id"]
    shown = bank.get(f"/transactions/{transaction_id}").json()
    owners = [
        bank.get(f"/accounts/{e['account_id']}").json()["owner_name"] for e in shown["entries"]
    ]
    types = [entry["type"] for entry in shown["entries"]]
    assert (shown["kind"], shown["memo"], list(zip(owners, types, strict=True))) == (
        kind,
        "why",
        legs,
    )
    assert {entry["amount"] for entry in shown["entries"]} == {7}


def test_money_of_one_asset_cannot_become_another(bank: BankInside) -> None:
    bank.given(alice=100).given(asset="EUR", claire=100)
    assert code(bank.transfer("alice", "claire", 1)) == (409, "asset_mismatch")
    assert bank.balances() == {"alice": 100, "claire": 100}


def test_cash_is_kept_for_each_asset(bank: BankInside) -> None:
    bank.given(alice=100).given(asset="EUR", claire=30).given(asset="JPY", kenji=7)
    cash = bank.rows("SELECT asset, balance FROM account WHERE name = 'cash' ORDER BY asset")
    assert cash == [("EUR", -30), ("GBP", 0), ("JPY", -7), ("USD", -100)]


def test_a_closed_loop_asset_is_not_moved_by_these_words(bank: BankInside) -> None:
    bank.given(gina=0, greg=0)
    bank.tamper(
        dropping(bank, "account_unchanged", "account"),
        "UPDATE account SET asset = 'GOLD' WHERE owner_name LIKE 'g%'",
    )
    for answer in (
        bank.deposit("gina", 1),
        bank.withdraw("gina", 1),
        bank.transfer("gina", "greg", 1),
    ):
        assert code(answer) == (409, "asset_closed_loop")


@pytest.mark.parametrize("status", ["FROZEN", "CLOSED"])
def test_an_account_that_is_not_active_moves_no_money(bank: BankInside, status: str) -> None:
    bank.given(alice=100, bob=0)
    bank.tamper(f"UPDATE account SET status = '{status}' WHERE owner_name = 'bob'")
    refusal = (409, f"account_{status.lower()}")
    assert code(bank.deposit("bob", 1)) == refusal
    assert code(bank.withdraw("bob", 1)) == refusal
    assert code(bank.transfer("alice", "bob", 1)) == refusal
    assert code(bank.transfer("bob", "alice", 1)) == refusal
    assert bank.balances() == {"alice": 100, "bob": 0}


STATES = {"ACTIVE": (), "FROZEN": ("freeze",), "CLOSED": ("close",)}
STEPS = {"freeze": "FROZEN", "unfreeze": "ACTIVE", "close": "CLOSED"}
ALLOWED = {("ACTIVE", "freeze"), ("ACTIVE", "close"), ("FROZEN", "unfreeze"), ("FROZEN", "close")}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("state", STATES)
def test_an_account_goes_from_state_to_state(bank: BankInside, state: str, step: str) -> None:
    bank.given(alice=0)
    for way in STATES[state]:
        assert bank.turn("alice", way).json()["status"] == state
    turned = bank.turn("alice", step)
    if (state, step) in ALLOWED:
        assert (turned.status_code, turned.json()["status"]) == (200, STEPS[step])
    else:
        assert code(turned) == (409, "invalid_state_transition")
        assert turned.json()["detail"] == f"No account goes from {state} to {STEPS[step]}"
    assert bank.wrong() == []


def test_a_cashback_of_nothing_keeps_no_account_open(bank: BankInside) -> None:
    bank.given(alice=10)
    bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=10)
    assert bank.turn("alice", "close").json()["status"] == "CLOSED"
    pass_time(bank, DAY)
    assert bank.wrong() == []


def test_a_cashback_and_a_close_in_one_batch_respect_each_other(bank: BankInside) -> None:
    bank.given(alice=100)
    bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=100)
    now = ledger.utc_now() + DAY
    ref = bank.ids["alice"]

    def run(operation: Any, *arguments: Any, **options: Any) -> ledger.Command:
        def act(book: ledger.Book) -> None:
            operation(book, *arguments, **options)

        return ledger.Command("test", "{}", act)

    commands = [
        run(ledger.credit_cashbacks, clock="SERVER", until=now),
        run(ledger.withdraw, ref, amount=2),
        run(ledger.change_status, ref, "CLOSED"),
    ]
    assert [answer.status for answer in bank.ledger.commit(commands)] == [200, 200, 200]
    assert bank.get(f"/accounts/{ref}").json()["status"] == "CLOSED"
    assert bank.wrong() == []


def test_only_an_empty_account_can_be_closed(bank: BankInside) -> None:
    bank.given(alice=100)
    refused = bank.turn("alice", "close")
    assert code(refused) == (409, "account_not_empty")
    assert refused.json()["balance"] == 100
    bank.turn("alice", "freeze")
    assert code(bank.turn("alice", "close")) == (409, "account_not_empty")
    bank.turn("alice", "unfreeze")
    bank.withdraw("alice", 100)
    assert bank.turn("alice", "close").json()["status"] == "CLOSED"
    assert code(bank.deposit("alice", 1)) == (409, "account_closed")


def test_an_account_with_cashback_to_come_cannot_be_closed(bank: BankInside) -> None:
    bank.given(alice=200, bob=0)
    for key in ("k1", "k2"):
        bank.post("/payments", key=key, account_id=bank.ids["alice"], amount=100)
    assert code(bank.turn("alice", "close")) == (409, "cashback_pending")
    assert bank.turn("bob", "close").json()["status"] == "CLOSED"
    pass_time(bank, DAY)
    assert bank.withdraw("alice", 4).status_code == 200
    assert bank.turn("alice", "close").json()["status"] == "CLOSED"


def test_a_payment_and_a_close_in_one_batch_respect_each_other(bank: BankInside) -> None:
    bank.given(alice=100)
    close = f"/accounts/{bank.ids['alice']}/close"
    payment = {"account_id": bank.ids["alice"], "amount": 100}
    paid, refused = bank.together(("/payments", "k", payment), (close, None, {}))
    assert paid.status_code == 200
    assert code(refused) == (409, "cashback_pending")


def test_of_two_parallel_changes_of_state_one_wins(bank: BankInside) -> None:
    bank.given(alice=0)
    freeze = f"/accounts/{bank.ids['alice']}/freeze"
    answers = bank.together((freeze, None, {}), (freeze, None, {}))
    assert [answer.status_code for answer in answers] == [200, 409]
    assert code(answers[1]) == (409, "invalid_state_transition")


def test_a_batch_may_thaw_an_account_and_move_its_money(bank: BankInside) -> None:
    bank.given(alice=5)
    bank.turn("alice", "freeze")
    path = f"/accounts/{bank.ids['alice']}"
    answers = bank.together(
        (f"{path}/deposit", "k1", {"amount": 1}),
        (f"{path}/unfreeze", None, {}),
        (f"{path}/deposit", "k2", {"amount": 2}),
        (f"{path}/freeze", None, {}),
        (f"{path}/withdraw", "k3", {"amount": 3}),
    )
    assert [answer.status_code for answer in answers] == [409, 200, 200, 200, 409]
    moments = bank.rows("SELECT ts FROM event ORDER BY id DESC LIMIT 3")
    assert len(set(moments)) == 1
    assert bank.get(path).json()["status"] == "FROZEN"
    assert bank.balances() == {"alice": 7}
    assert bank.wrong() == []


def test_a_change_of_state_takes_no_body_and_a_key(bank: BankInside) -> None:
    bank.given(alice=0)
    path = f"/accounts/{bank.ids['alice']}/freeze"
    assert code(bank.post(path, reason="fraud")) == (422, "invalid_request")
    assert code(bank.send("POST", path, content=b"now!")) == (400, "malformed_json")
    first, again = (bank.post(path, key="k") for _ in range(2))
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
    assert first.json()["status"] == "FROZEN"


def test_a_transfer_to_itself_is_refused_before_anything_is_looked_up(bank: BankInside) -> None:
    bank.ids = {"nobody": NOBODY}
    refused = bank.transfer("nobody", "nobody", 1)
    assert code(refused) == (400, "same_account")
    assert refused.json()["detail"] == "Cannot transfer to the same account"


def test_nobody_can_name_a_system_account(bank: BankInside) -> None:
    bank.given(alice=100)
    [(cash,)] = bank.rows("SELECT id FROM account WHERE name = 'cash' AND asset = 'USD'")
    bank.ids["cash"] = cash
    for answer in (
        bank.deposit("cash", 1),
        bank.withdraw("cash", 1),
        bank.transfer("alice", "cash", 1),
        bank.transfer("cash", "alice", 1),
        bank.turn("cash", "freeze"),
        bank.turn("cash", "close"),
    ):
        assert code(answer) == (404, "account_not_found")
    assert bank.get(f"/accounts/{cash}").json()["balance"] == -100
    assert bank.statement("cash")[0]["type"] == "DEBIT"
    assert bank.get("/accounts", name="cash").json()["items"] == []
    assert list(bank.balances()) == ["alice"]


# -------------------------------------------------------------------------------- Reading


def pages(bank: Bank, path: str, **parameters: Any) -> Iterator[list[dict[str, Any]]]:
    """Walk through a list, page by page."""
    cursor: dict[str, str] = {}
    while True:
        page = bank.get(path, **parameters, **cursor).json()
        yield page["items"]
        if page["next_cursor"] is None:
            return
        cursor = {"cursor": page["next_cursor"]}


def test_a_statement_is_stable_while_entries_arrive(bank: BankInside) -> None:
    bank.given(alice=0)
    for amount in range(1, 24):
        bank.deposit("alice", amount)
    seen = []
    for page in pages(bank, f"/accounts/{bank.ids['alice']}/statement", limit=5):
        seen += [entry["amount"] for entry in page]
        bank.deposit("alice", 1000)
    assert seen == list(range(23, 0, -1))


def test_every_account_is_listed_once_oldest_first(bank: BankInside) -> None:
    names = [f"owner {number}" for number in range(12)]
    bank.given(dict.fromkeys(names[:9], 0))
    seen = []
    for page in pages(bank, "/accounts", limit=4):
        seen += [account["owner_name"] for account in page]
        bank.given(dict.fromkeys(names[len(bank.ids) :][:1], 0))
    assert seen == names[:11]


def test_accounts_are_found_by_their_owner(bank: BankInside) -> None:
    bank.given(alice=1, bob=2).given(alice=3)
    found = bank.get("/accounts", owner_name="alice").json()["items"]
    assert [account["balance"] for account in found] == [1, 3]
    assert bank.get("/accounts", owner_name="nobody").json() == {"items": [], "next_cursor": None}
    assert bank.get("/accounts", name="atm:1001").json()["items"] == []


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_cursor_is_given_only_where_there_is_more(bank: BankInside, count: int) -> None:
    bank.given(alice=0)
    for _ in range(count):
        bank.deposit("alice", 1)
    path = f"/accounts/{bank.ids['alice']}/statement"
    expected = {0: [0], 1: [1], 2: [2], 3: [2, 1]}[count]
    assert [len(page) for page in pages(bank, path, limit=2)] == expected


def forged(place: str, *scope: str) -> str:
    """Make a cursor as somebody could who has read the source."""
    return ledger.Listing(*scope)._cursor(place)


def test_a_cursor_is_good_for_its_own_list_alone(bank: BankInside) -> None:
    bank.given(alice=0, bob=0)
    for name in ("alice", "bob", "alice", "bob"):
        bank.deposit(name, 1)
    path = f"/accounts/{bank.ids['alice']}/statement"
    good = bank.get(path, limit=1).json()["next_cursor"]
    assert re.fullmatch("[A-Za-z0-9._~-]+", good)
    assert len(bank.get(path, limit=50, cursor=good).json()["items"]) == 1
    everybody = bank.get("/accounts", limit=1).json()["next_cursor"]
    refused = bank.get("/accounts", owner_name="alice", cursor=everybody)
    assert code(refused) == (400, "invalid_cursor")
    alice = bank.ids["alice"]
    for where, cursor in [
        (path, ""),
        (path, "x"),
        (path, good + "0"),
        (path, "9" + good),
        (path, good.upper() + "="),
        (path, "\u0661" + good),
        (f"/accounts/{bank.ids['bob']}/statement", good),
        ("/accounts", good),
        (path, forged("-1", "statement", alice)),
        (path, forged("9" * 400, "statement", alice)),
        (path, forged("x", "statement", alice)),
        (path, forged("1.5", "statement", alice)),
    ]:
        refused = bank.get(where, cursor=cursor)
        assert code(refused) == (400, "invalid_cursor"), cursor
        assert refused.json()["detail"] == "Invalid cursor"


def test_a_cursor_survives_a_restart(database: str) -> None:
    with opened(database) as bank:
        bank.given(alice=1).deposit("alice", 2)
        path = f"/accounts/{bank.ids['alice']}/statement"
        cursor = bank.get(path, limit=1).json()["next_cursor"]
    with opened(database) as bank:
        assert [entry["amount"] for entry in bank.get(path, cursor=cursor).json()["items"]] == [1]


@at_the_edge
@pytest.mark.parametrize("limit", ["0", "-1", "201", "1" + "0" * 30, "x", "", "1.5", "true"])
@pytest.mark.parametrize("path", ["/accounts", f"/accounts/{NOBODY}/statement"])
def test_an_absurd_limit_is_refused(bank: BankInside, path: str, limit: str) -> None:
    refused = bank.get(path, limit=limit)
    assert code(refused) == (422, "invalid_request")
    assert refused.json()["errors"][0]["pointer"] == "/limit"


def test_what_does_not_exist_is_not_found(bank: BankInside) -> None:
    assert code(bank.get(f"/accounts/{NOBODY}")) == (404, "account_not_found")
    assert code(bank.get(f"/accounts/{NOBODY}/statement")) == (404, "account_not_found")
    assert code(bank.get(f"/transactions/{NOBODY}")) == (404, "transaction_not_found")


ALICES = "(SELECT id FROM account WHERE owner_name = 'alice')"


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE entry SET amount = 99 WHERE type = 'CREDIT'", "sums to"),
        ("UPDATE entry SET amount = amount + 1", "entry 1 with balance"),
        (
            f"UPDATE entry SET balance = 5 WHERE account_id = {ALICES}",
            "with balance 5 stands where",
        ),
        (f"UPDATE entry SET seq = 7 WHERE account_id = {ALICES}", "entry 7 with balance"),
        ("DELETE FROM entry", "its row says 1 entries"),
        ("DELETE FROM entry WHERE type = 'DEBIT'", "sums to"),
        ("DELETE FROM event", "missing row of event"),
        ("UPDATE account SET balance = 5 WHERE owner_name = 'alice'", "its row says 1 entries and"),
        (
            "UPDATE account SET last_seq = 2 WHERE owner_name = 'alice'",
            "its row says 2 entries and",
        ),
        ("UPDATE account SET status = 'CLOSED' WHERE owner_name = 'alice'", "CHECK"),
        ("UPDATE account SET kind = 'CUSTOMER'", "CHECK"),
        ("UPDATE account SET balance = -1", "CHECK"),
        ("DROP TRIGGER entry_kept", "entry_kept is not as it was made"),
        (
            "INSERT INTO event VALUES ('t', 'TRANSFER', NULL, 0, NULL, 'x', NULL, '{}')",
            "transaction t has no entries",
        ),
        ("UPDATE account SET kind = 'SYSTEM' WHERE owner_name = 'alice'", "is no system account"),
        ("DROP INDEX account_owner", "account_owner is not as it was made"),
    ],
)
def test_the_check_finds_what_was_tampered_with(
    bank: BankInside, statement: str, finding: str
) -> None:
    bank.given(alice=100)
    if bank.database.startswith("sqlite"):
        tamper_freely(bank, statement)
    elif finding == "CHECK":
        # PostgreSQL keeps these rules whoever asks.
        with pytest.raises(psycopg.IntegrityError):
            tamper_freely(bank, statement)
        return
    else:
        tamper_freely(bank, statement.replace("entry_kept", "entry_kept ON entry"))
    assert any(finding in found for found in bank.wrong())


def tamper_freely(bank: Bank, *statements: str) -> None:
    """Change stored rows with triggers and constraints off, as far as that is possible."""
    if bank.database.startswith("postgresql"):
        bank.tamper("SET session_replication_role = replica", *statements)
        return
    made = bank.rows("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
    others = [(name, sql) for name, sql in made if name not in "".join(statements)]
    off = ["PRAGMA foreign_keys = OFF", "PRAGMA ignore_check_constraints = ON"]
    off += [f"DROP TRIGGER {name}" for name, _ in others]
    bank.tamper(*off, *statements, *[sql for _, sql in others])


@pytest.mark.parametrize(
    ("engine", "statements"),
    [
        ("sqlite", ["DROP TRIGGER entry_kept",
                    "CREATE TRIGGER entry_kept BEFORE DELETE ON entry BEGIN SELECT 1; END"]),
        ("postgresql", ["ALTER TABLE entry DISABLE TRIGGER entry_kept"]),
        ("postgresql", ["CREATE OR REPLACE FUNCTION entry_kept() RETURNS trigger LANGUAGE plpgsql "
                        "AS $$BEGIN RETURN OLD; END$$"]),
        ("postgresql", ["DROP TRIGGER entry_kept ON entry", "CREATE TRIGGER entry_kept BEFORE "
                        "INSERT ON entry FOR EACH ROW EXECUTE FUNCTION entry_kept()"]),
    ],
    indirect=["engine"],
)  # fmt: skip
def test_the_check_finds_a_trigger_that_does_nothing(
    bank: BankInside, statements: Sequence[str]
) -> None:
    bank.tamper(*statements)
    assert "entry_kept is not as it was made" in bank.wrong()


@on_postgresql
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("ALTER TABLE account DROP CONSTRAINT account_check", "account"),
        ("ALTER TABLE entry DROP CONSTRAINT entry_transaction_id_fkey", "entry"),
        ("ALTER TABLE account ALTER COLUMN balance DROP NOT NULL", "account"),
        ("ALTER TABLE entry ALTER COLUMN amount TYPE integer", "entry"),
    ],
)
def test_the_check_finds_a_constraint_that_is_gone(
    bank: BankInside, statement: str, name: str
) -> None:
    bank.tamper(statement)
    assert bank.wrong() == [f"{name} is not as it was made"]


def test_the_check_adds_up_what_would_not_fit_into_64_bits(bank: BankInside) -> None:
    bank.given(alice=0, bob=0)
    most = ledger.BALANCE_MAX
    for owner in ("alice", "bob"):
        tamper_freely(
            bank,
            f"UPDATE account SET balance = {most}, last_seq = 1 WHERE owner_name = '{owner}'",
            f"INSERT INTO event VALUES ('{owner}', 'TEST', NULL, 0, NULL, 'x', NULL, '')",
            "INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) "
            "SELECT id, 1, 'x', owner_name, 'CREDIT', balance, balance "
            f"FROM account WHERE owner_name = '{owner}'",
        )
    assert any(f"sums to {most} USD" in found for found in bank.wrong())


def test_the_audit_log_is_read_newest_first(bank: BankInside) -> None:
    bank.given(alice=100)
    bank.transfer("alice", "alice", 1)
    bank.deposit("alice", 5, key="k", memo="wages")
    bank.deposit("alice", 5, key="k", memo="wages")
    bank.withdraw("alice", 1_000)
    events = bank.get("/audit").json()["items"]
    assert [(event["caller"], event["action"]) for event in events] == [
        ("local", "deposit"),
        ("local", "deposit"),
        ("local", "open_account"),
    ]
    newest = bank.statement("alice")[0]
    assert events[0]["transaction_id"] == newest["transaction_id"]
    assert (events[0]["account_id"], events[0]["ts"]) == (bank.ids["alice"], newest["ts"])
    assert events[0]["details"]["body"] == {"amount": 5, "memo": "wages"}
    assert set(events[2]) == {
        "id", "ts", "caller", "action", "account_id", "transaction_id", "details"
    }  # fmt: skip


@pytest.mark.parametrize("limit", [1, 2, 3, 200])
def test_the_audit_log_of_an_account_has_all_that_touched_it(bank: BankInside, limit: int) -> None:
    bank.given(alice=100, bob=0, carol=50)
    bank.transfer("alice", "bob", 60)
    bank.turn("bob", "freeze")
    bank.transfer("alice", "carol", 10)
    bank.turn("bob", "unfreeze")
    bank.transfer("bob", "carol", 1)
    bank.post("/payments", key="k", account_id=bank.ids["bob"], amount=50)
    pass_time(bank, DAY)
    alone = [
        [
            event["action"]
            for page in pages(bank, "/audit", limit=limit, account_id=bank.ids[name])
            for event in page
        ]
        for name in ("alice", "bob")
    ]
    assert alone == [
        ["transfer", "transfer", "deposit", "open_account"],
        ["credit_cashback", "pay", "transfer", "unfreeze", "freeze", "transfer", "open_account"],
    ]
    everything = [event for page in pages(bank, "/audit", limit=limit) for event in page]
    assert len(everything) == len(bank.rows("SELECT id FROM event")) == 12


def test_the_audit_log_is_stable_while_events_arrive(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    listed: list[str] = []
    for page in pages(bank, "/audit", limit=1, account_id=bank.ids["alice"]):
        listed += [event["id"] for event in page]
        bank.deposit("alice", 1)
        bank.turn("alice", "freeze")
        bank.turn("alice", "unfreeze")
    assert len(listed) == len(set(listed)) == 2


# -------------------------------------------------------------------------------- Callers


@pytest.mark.parametrize(
    "peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1", "testclient"]
)
def test_open_mode_serves_this_machine(database: str, peer: str) -> None:
    with opened(database, client=(peer, 1)) as bank:
        assert bank.get("/accounts").status_code == 200


@at_the_edge
@pytest.mark.parametrize("peer", ["10.0.0.1", "::2", "192.168.1.1", "", "localhost.evil.example"])
def test_open_mode_refuses_other_machines(database: str, peer: str) -> None:
    with opened(database, client=(peer, 1)) as bank:
        assert code(bank.get("/accounts")) == (403, "forbidden")
        assert code(bank.post("/accounts", nonsense=1)) == (403, "forbidden")
        assert bank.get("/health").json() == {"status": "ok"}


@at_the_edge
@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:8000", 200),
        ("127.0.0.1:8000", 200),
        ("[::1]:8000", 200),
        ("testserver", 200),
        ("evil.example", 403),
        ("localhost.evil.example:8000", 403),
        ("127.0.0.1.evil.example", 403),
        ("10.0.0.1:8000", 403),
        ("", 403),
        ("]]localhost[[", 403),
        ("[localhost]", 403),
        (b"\xe9", 403),
    ],
)
def test_open_mode_refuses_a_foreign_host(bank: BankInside, host: Any, status: int) -> None:
    answer = bank.send("GET", "/accounts", headers={"Host": host})
    assert answer.status_code == status


def test_open_mode_refuses_two_hosts(bank: BankInside) -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert code(bank.send("GET", "/accounts", headers=headers)) == (403, "forbidden")


@at_the_edge
@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "x-forwarded", "Via"])
def test_open_mode_refuses_a_proxy(bank: BankInside, header: str) -> None:
    assert code(bank.send("GET", "/accounts", headers={header: "x"})) == (403, "forbidden")


@at_the_edge
@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost.evil.example"])
def test_open_mode_refuses_a_page_of_another_site(bank: BankInside, origin: str) -> None:
    bank.given(alice=0)
    path = f"/accounts/{bank.ids['alice']}/freeze"
    assert code(bank.send("POST", path, headers={"Origin": origin})) == (403, "forbidden")
    elsewhere = {"Sec-Fetch-Site": "cross-site"}
    assert code(bank.send("GET", "/accounts", headers=elsewhere)) == (403, "forbidden")
    own = {"Origin": "http://127.0.0.1:8000"}
    assert bank.send("POST", path, headers=own).status_code == 200


SECRET = "an HS256 secret of at least 32 bytes"  # noqa: S105
ADMIN_KEY = "the-operators-own-key"
LATER = 4_000_000_000


def token(**claims: Any) -> str:
    """Return a token that is good, but for what is claimed."""
    good = {"sub": "app", "role": "admin", "exp": LATER}
    return jwt.encode({**good, **claims}, SECRET, "HS256")


def signed_by_hand(payload: str, header: str = '{"alg": "HS256"}', secret: str = SECRET) -> str:
    """Return a token whose parts no library would write."""
    parts = [base64.urlsafe_b64encode(part.encode()).rstrip(b"=") for part in (header, payload)]
    signature = hmac.digest(secret.encode(), b".".join(parts), "sha256")
    parts.append(base64.urlsafe_b64encode(signature).rstrip(b"="))
    return b".".join(parts).decode()


@pytest.fixture
def closed(database: str) -> Iterator[BankInside]:
    """A ledger with an admin key and a secret for tokens."""
    secrets = {"admin_key": ADMIN_KEY, "jwt_secret": SECRET}
    with opened(database, ledger.DIALECTS, secrets, client=("10.0.0.1", 1)) as bank:
        yield bank


def callers(bank: Bank) -> list[str]:
    """Return who did what, in its order."""
    return [caller for (caller,) in bank.rows("SELECT caller FROM event ORDER BY id")]


def test_a_key_is_shown_once_and_stored_as_a_hash(closed: BankInside) -> None:
    key = new_api_key(closed.database, "till 1", "service")
    assert re.fullmatch("lk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key)
    closed.by(key).given(alice=0)
    assert callers(closed) == ["cli", "key:till 1"]
    listed = key_command(closed.database, "list").splitlines()
    assert listed[1].split()[:2] == [key[:11], "service"]
    assert listed[1].endswith("till 1")
    stored = [*closed.rows("SELECT * FROM api_key"), *closed.rows("SELECT * FROM event")]
    assert key[11:] not in f"{stored}{listed}"


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("X-API-Key", "{}"),
        ("x-api-key", " {} "),
        ("Authorization", "Bearer {}"),
        ("authorization", "bearer  {}"),
    ],
)
def test_a_key_may_come_in_either_header(closed: BankInside, header: str, form: str) -> None:
    for credential in (ADMIN_KEY, new_api_key(closed.database, "a", "auditor")):
        assert closed.by(form.format(credential), header).get("/accounts").status_code == 200
    answer = closed.by(f"Bearer {token()}", "Authorization").get("/accounts")
    assert answer.status_code == 200


@at_the_edge
@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("X-API-Key", "")],
        [("X-API-Key", "lk_")],
        [("X-API-Key", ADMIN_KEY + "x")],
        [("X-API-Key", ADMIN_KEY[:-1])],
        [("X-API-Key", b"\xff\x00\xe9")],
        [("X-API-Key", "k" * 60_000)],
        [("X-API-Key", ADMIN_KEY), ("X-API-Key", ADMIN_KEY)],
        [("X-API-Key", ADMIN_KEY), ("Authorization", "Bearer x")],
        [("Authorization", ADMIN_KEY)],
        [("Authorization", "Bearer")],
        [("Authorization", f"Basic {ADMIN_KEY}")],
        [("Authorization", b"Bearer \xe9.\xe9.\xe9")],
        [("Authorization", "Bearer a.b.c")],
    ],
    ids=str,
)
def test_bad_credentials_are_refused(closed: BankInside, headers: Any) -> None:
    refused = closed.send("GET", "/accounts", headers=headers)
    assert code(refused) == (401, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="ledger"'


def test_almost_a_key_is_no_key(closed: BankInside) -> None:
    key, other = (new_api_key(closed.database, name, "admin") for name in ("a", "b"))
    for wrong in (key[:-1], key + "x", key[:11], key[:11] + other[11:], key.upper()):
        assert code(closed.by(wrong).get("/accounts")) == (401, "unauthorized")
    assert closed.by(key).get("/accounts").status_code == 200


@at_the_edge
@pytest.mark.parametrize(
    "hostile",
    [
        jwt.encode({"sub": "a", "role": "admin", "exp": LATER}, None, "none"),
        jwt.encode({"sub": "a", "role": "admin", "exp": LATER}, SECRET * 2, "HS512"),
        jwt.encode({"sub": "a", "role": "admin", "exp": LATER}, SECRET[::-1], "HS256"),
        jwt.encode({"sub": "a", "role": "admin"}, SECRET, "HS256"),
        jwt.encode({"sub": "a", "exp": LATER}, SECRET, "HS256"),
        jwt.encode({"role": "admin", "exp": LATER}, SECRET, "HS256"),
        token(exp=1),
        token(exp="4000000000"),
        token(exp=None),
        token(exp=True),
        token(exp=10**400),
        token(nbf=LATER),
        token(iat=LATER),
        token(aud="another system"),
        token(role="root"),
        token(role=["admin"]),
        token(role=None),
        token(sub=""),
        token(sub=" "),
        token(sub=7),
        token(sub="a\nb"),
        token(sub="\0"),
        token(sub="a" * 201),
        signed_by_hand('{"sub": "a", "role": "admin", "exp": 1e400}'),
        signed_by_hand('{"sub": "a", "role": "admin", "exp": NaN}'),
        signed_by_hand('{"sub": "a", "role": "admin", "exp": ' + "9" * 5_000 + "}"),
        signed_by_hand('{"sub": "\\ud800", "role": "admin", "exp": 4000000000}'),
        signed_by_hand('{"x": ' + "[" * 20_000 + "]" * 20_000 + "}"),
        signed_by_hand("[]"),
        signed_by_hand("null"),
        signed_by_hand("{"),
        signed_by_hand("{}", header='{"alg": ["HS256"]}'),
        signed_by_hand("{}", header="[" * 20_000),
        signed_by_hand("{}", header='{"alg": "none"}'),
        signed_by_hand("{}", header='{"alg": "RS256"}'),
        signed_by_hand("{}", header='{"alg": "HS256", "crit": ["x"]}'),
        token()[:-1],
        token() + ".x",
        "." * 60_000,
    ],
    ids=lambda hostile: hostile[:60],
)  # fmt: skip
def test_a_hostile_token_is_refused(closed: BankInside, hostile: str) -> None:
    assert code(closed.by(f"Bearer {hostile}", "Authorization").get("/accounts"))[0] == 401


def test_a_token_says_who_calls_and_as_what(closed: BankInside) -> None:
    clerk = closed.by(token(sub="clerk", role="service", exp=LATER + 0.5))
    clerk.given(alice=1)
    assert callers(closed) == ["jwt:clerk", "jwt:clerk"]
    assert code(clerk.withdraw("alice", 1)) == (403, "forbidden")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LEDGER_JWT_SECRET": "x" * 31}, "LEDGER_JWT_SECRET must have 32 bytes or more"),
        ({"LEDGER_JWT_SECRET": "ssh-rsa " + "x" * 32}, "LEDGER_JWT_SECRET cannot be used"),
        ({"LEDGER_ADMIN_KEY": "with a blank"}, "LEDGER_ADMIN_KEY must be visible ASCII"),
        ({"LEDGER_ADMIN_KEY": "schl\u00fcssel"}, "LEDGER_ADMIN_KEY must be visible ASCII"),
    ],
)
def test_a_secret_that_is_none_stops_the_start(environment: dict[str, str], reason: str) -> None:
    with pytest.raises(ledger.StartupError, match=reason):
        ledger.Settings.read(environment)


def test_settings_do_not_show_their_secrets() -> None:
    environment = {"LEDGER_JWT_SECRET": "\u00e9" * 16, "LEDGER_ADMIN_KEY": ADMIN_KEY}
    shown = ledger.Settings.read(environment)
    assert shown.jwt_secret == "\u00e9" * 16
    assert ADMIN_KEY not in repr(shown)
    assert "\u00e9" not in repr(shown)


@pytest.mark.parametrize("arguments", [("add", "--name", "a", "--role", "admin"), ("revoke", "a")])
def test_the_name_of_a_key_is_used_once(
    bank: BankInside, arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    new_api_key(bank.database, "a", "admin")
    key_command(bank.database, "revoke", "a")
    url = bank.database
    capsys.readouterr()
    assert ledger.main(["key", *arguments, "--database-url", url]) == 1
    assert capsys.readouterr().err.startswith("ledger: there is ")
    assert callers(bank) == ["cli", "cli"]


def test_a_key_can_be_made_before_the_first_start(database: str) -> None:
    key = new_api_key(database, "first", "admin")
    with opened(database, ledger.DIALECTS) as bank:
        assert code(bank.get("/accounts")) == (401, "unauthorized")
        assert bank.by(key).get("/atm/").json()["sample_accounts"] == {}


@on_sqlite
def test_a_new_key_is_told_where_it_is(tmp_path: Path, database: str) -> None:
    made = run("key", "add", "--name", "a", "--role", "admin", "--database-url",
               database)  # fmt: skip
    assert re.fullmatch("lk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}\n", made.stdout)
    assert made.stderr == f"key 'a' is in {tmp_path}/ledger.db, and shown this once\n"


def test_a_request_is_no_older_than_its_key(database: str) -> None:
    with serving(database) as server:
        key = new_api_key(database, "a", "admin")
        body = b'{"owner_name": "late"}'
        head = (
            f"POST /accounts HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        url = httpx.URL(server.said[0].split()[-1])
        with socket.create_connection((url.host, url.port or 0)) as slow:
            slow.sendall(head.encode() + body[:5])
            key_command(database, "revoke", "a")
            wait_until(lambda: server.bank.by(key).get("/accounts").status_code == 401)
            time.sleep(ledger.KEYS_AGE_SECONDS_MAX)
            slow.sendall(body[5:])
            assert slow.recv(99).startswith(b"HTTP/1.1 401")


def test_open_mode_ends_for_ever_with_the_first_key(bank: BankInside) -> None:
    new_api_key(bank.database, "a", "admin")
    key_command(bank.database, "revoke", "a")
    wait_until(lambda: bank.get("/accounts").status_code == 401, seconds=1)
    with opened(bank.database) as again:
        assert code(again.get("/accounts")) == (401, "unauthorized")


def test_a_running_server_takes_and_refuses_keys_within_a_second(database: str) -> None:
    with serving(database) as server:
        bank = server.bank
        assert bank.get("/accounts").status_code == 200
        key = new_api_key(bank.database, "a", "admin")
        wait_until(lambda: bank.get("/accounts").status_code == 401, seconds=1)
        wait_until(lambda: bank.by(key).get("/accounts").status_code == 200, seconds=1)
        key_command(bank.database, "revoke", "a")
        wait_until(lambda: bank.by(key).get("/accounts").status_code == 401, seconds=1)


@on_sqlite
def test_other_machines_are_served_with_keys_alone(tmp_path: Path, database: str) -> None:
    settings = ledger.Settings(database)
    for made in (False, True):
        with pytest.raises(ledger.StartupError, match="serves this machine alone"):
            ledger.require_keys(settings)
        assert bool(tables(database)) == made
        ledger.database_at(settings.database_url).open(make=True)
    elsewhere = ledger.Settings(f"sqlite:///{tmp_path}/new.db", admin_key=ADMIN_KEY)
    ledger.require_keys(elsewhere)
    ledger.require_keys(replace(settings, admin_key=ADMIN_KEY))
    ledger.require_keys(replace(settings, jwt_secret=SECRET))
    new_api_key(database, "a", "auditor")
    ledger.require_keys(settings)


def test_a_key_for_idempotency_belongs_to_its_caller(closed: BankInside) -> None:
    admin = closed.by(ADMIN_KEY).given(alice=0)
    first = admin.deposit("alice", 5, key="k")
    for name in ("a", "b"):
        other = closed.by(new_api_key(closed.database, name, "service"))
        other.ids = admin.ids
        answer = other.deposit("alice", 7, key="k")
        assert answer.status_code == 200
        assert "Idempotent-Replayed" not in answer.headers
    assert admin.deposit("alice", 5, key="k").content == first.content
    assert admin.balances() == {"alice": 5 + 7 + 7}


# Which roles may call each route; everything else is open to everybody.
READ, WORK, RULE, AUDIT = "auditor service admin", "service admin", "admin", "auditor admin"
ACCOUNT = f"/accounts/{NOBODY}"
MATRIX = {
    ("POST", "/accounts"): WORK,
    ("GET", "/accounts"): READ,
    ("GET", "/accounts/{account_id}"): READ,
    ("POST", "/accounts/{account_id}/deposit"): WORK,
    ("POST", "/accounts/{account_id}/withdraw"): RULE,
    ("POST", "/transfers"): WORK,
    ("GET", "/accounts/{account_id}/statement"): READ,
    ("GET", "/transactions/{transaction_id}"): READ,
    ("POST", "/payments"): WORK,
    ("GET", "/payments/{payment_id}"): READ,
    ("POST", "/accounts/{account_id}/freeze"): RULE,
    ("POST", "/accounts/{account_id}/unfreeze"): RULE,
    ("POST", "/accounts/{account_id}/close"): RULE,
    ("GET", "/audit"): AUDIT,
    ("POST", "/bank/accounts"): WORK,
    ("GET", "/bank/accounts"): READ,
    ("GET", "/bank/accounts/{name}/balance"): READ,
    ("POST", "/bank/deposits"): WORK,
    ("POST", "/bank/transfers"): WORK,
    ("POST", "/bank/payments"): WORK,
    ("GET", "/bank/payments/{payment_id}"): READ,
    ("GET", "/bank/top-spenders"): READ,
    ("GET", "/bank/accounts/{name}/transactions"): READ,
    ("GET", "/atm/"): READ,
    ("GET", "/atm/health"): READ,
    ("GET", "/atm/accounts/{number}/balance"): READ,
    ("POST", "/atm/accounts/{number}/deposit"): WORK,
    ("POST", "/atm/accounts/{number}/withdraw"): RULE,
    ("GET", "/api/v1/wallets/users/{user}/balance"): READ,
    ("POST", "/api/v1/wallets/users"): WORK,
    ("POST", "/api/v1/wallets/users/{user}/top-up"): WORK,
    ("POST", "/api/v1/wallets/users/{user}/bonus"): WORK,
    ("POST", "/api/v1/wallets/users/{user}/spend"): WORK,
}
OPEN = {("GET", "/health"), ("GET", "/bank/health"), ("GET", "/docs"), ("GET", "/openapi.json")}


def test_every_route_is_for_its_roles_and_for_nobody_else(closed: BankInside) -> None:
    routes = {
        (method, route.path_format)
        for route in closed.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == set(MATRIX) | OPEN
    for (method, template), allowed in MATRIX.items():
        path = re.sub("{[a-z_]+}", NOBODY, template)
        # Nothing else about these requests is right, and a caller without the right never hears.
        nonsense = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
        assert code(closed.send(method, path, **nonsense)) == (401, "unauthorized")
        for role in ledger.ROLES:
            by = closed.by(token(role=role))
            answer = by.send(method, path, **nonsense)
            expected = role in allowed.split()
            assert (answer.status_code not in (401, 403)) == expected, (role, method, template)
    for method, path in OPEN:
        assert closed.send(method, path).status_code == 200


# ---------------------------------------------------------------------------------- Faces


def good_body(bank: Bank) -> dict[str, Any]:
    """Return a transfer that would succeed."""
    ids = bank.ids
    return {"source_account_id": ids["alice"], "dest_account_id": ids["bob"], "amount": 1}


def changed(bank: Bank) -> bool:
    """Tell whether anything but the scene of `given(alice=100, bob=0)` is stored."""
    tables = ("account", "entry", "event", "idempotency_key")
    counts = [bank.rows(f"SELECT COUNT(*) FROM {table}")[0][0] for table in tables]
    return counts != [len(ledger.SYSTEM_ACCOUNTS) + 2, 2, 3, 1] or bank.balances() != {
        "alice": 100,
        "bob": 0,
    }


AMOUNT = '{"source_account_id": "%s", "dest_account_id": "%s", "amount": %s}'


@at_the_edge
@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        ("0", "invalid_request"),
        ("-1", "invalid_request"),
        ("-0", "invalid_request"),
        ("1.0", "invalid_request"),
        ("5e-1", "invalid_request"),
        ("1e3", "invalid_request"),
        ("1e400", "invalid_request"),
        ('"1"', "invalid_request"),
        ("true", "invalid_request"),
        ("null", "invalid_request"),
        ("[1]", "invalid_request"),
        ('1.5, "memo": "\\u0041"', "invalid_request"),
        ("{}", "invalid_request"),
        (str(10**15 + 1), "invalid_request"),
        (str(2**63), "invalid_request"),
        ("9" * 400, "invalid_request"),
        ("9" * 5000, "malformed_json"),
        ("NaN", "malformed_json"),
        ("Infinity", "malformed_json"),
        ("-Infinity", "malformed_json"),
        ("01", "malformed_json"),
        ("+1", "malformed_json"),
        ("1_000", "malformed_json"),
        ("0x1", "malformed_json"),
        ("", "malformed_json"),
    ],
)
def test_an_amount_is_a_positive_integer_and_nothing_else(
    bank: BankInside, amount: str, expected: str
) -> None:
    bank.given(alice=100, bob=0)
    body = AMOUNT % (bank.ids["alice"], bank.ids["bob"], amount)
    refused = send_raw(bank, body.encode())
    assert code(refused)[1] == expected
    if expected == "invalid_request":
        assert [error["pointer"] for error in refused.json()["errors"]] == ["/amount"]
    assert len(amount) < 10 or amount not in refused.text
    assert not changed(bank)


def send_raw(bank: Bank, body: Any, **headers: Any) -> httpx.Response:
    """Send a body to /transfers as it stands."""
    sent = {"Content-Type": "application/json", "Idempotency-Key": "k", **headers}
    return bank.send("POST", "/transfers", content=body, headers=sent)


@at_the_edge
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b"nonsense",
        b"{'a': 1}",
        b'{"a": 1}{"a": 2}',
        b'{"a": 1,}',
        b'{"amount": 1, "amount": 2}',
        b'{"a": {"b": 1, "b": 2}}',
        b'{"memo": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"memo": "\xff"}',
        b'{"memo": "\xed\xa0\x80"}',
        b'{"memo": "tab\there"}',
        b'\xef\xbb\xbf{"amount": 1}',
        '{"amount": 1}'.encode("utf-16"),
        '{"amount": 1}'.encode("utf-32"),
        b"[" * 60_000,
        b'{"a":' * 10_000,
        b"[" * 30_000 + b"]" * 30_000,
        b"\x00",
    ],
    ids=repr,
)
def test_a_body_that_is_no_json_is_refused(bank: BankInside, body: bytes) -> None:
    bank.given(alice=100, bob=0)
    assert code(send_raw(bank, body)) == (400, "malformed_json")
    assert not changed(bank)


@at_the_edge
@pytest.mark.parametrize("body", ["null", "[]", "[1]", '"x"', "5", "{}", "true"])
def test_a_body_that_is_no_object_does_not_fit(bank: BankInside, body: str) -> None:
    assert code(send_raw(bank, body.encode())) == (422, "invalid_request")


@at_the_edge
@pytest.mark.parametrize(
    ("field", "value", "pointer"),
    [
        ("memmo", "a typo", "/memmo"),
        ("a/b~c", 1, "/a~1b~0c"),
        ("memo", "x" * 201, "/memo"),
        ("memo", "nul \x00", "/memo"),
        ("memo", "bell \x07", "/memo"),
        ("memo", "line\n", "/memo"),
        ("memo", "c1 \x85", "/memo"),
        ("memo", 5, "/memo"),
        ("memo", {}, "/memo"),
        ("source_account_id", "", "/source_account_id"),
        ("source_account_id", 5, "/source_account_id"),
        ("source_account_id", NOBODY + "0", "/source_account_id"),
        ("source_account_id", NOBODY + "\n", "/source_account_id"),
        ("source_account_id", NOBODY.replace("-", ""), "/source_account_id"),
        ("source_account_id", "{" + NOBODY + "}", "/source_account_id"),
        ("source_account_id", NOBODY.replace("7", "A"), "/source_account_id"),
        ("source_account_id", NOBODY.replace("7", "g"), "/source_account_id"),
        ("source_account_id", NOBODY.replace("7", "\u0667"), "/source_account_id"),
    ],
)
def test_a_field_that_does_not_fit_is_pointed_at(
    bank: BankInside, field: str, value: Any, pointer: str
) -> None:
    bank.given(alice=100, bob=0)
    refused = bank.post("/transfers", key="k", **{**good_body(bank), field: value})
    assert code(refused) == (422, "invalid_request")
    assert [error["pointer"] for error in refused.json()["errors"]] == [pointer]
    assert not changed(bank)


@at_the_edge
@pytest.mark.parametrize("name", ["", " ", "\u2003", "x" * 201, "a\tb", None, 7])
def test_an_owner_has_a_name(bank: BankInside, name: Any) -> None:
    assert code(bank.post("/accounts", owner_name=name)) == (422, "invalid_request")


@pytest.mark.parametrize(
    "name", ["x" * 200, "Zoë", "李小龍", "\U0001f680" * 200, " padded ", "O'Neil; --"]
)
def test_any_printable_name_is_kept_as_it_is(bank: BankInside, name: str) -> None:
    opened = bank.post("/accounts", owner_name=name)
    assert (opened.status_code, opened.json()["owner_name"]) == (201, name)
    assert bank.get("/accounts", owner_name=name).json()["items"] == [opened.json()]


@at_the_edge
@pytest.mark.parametrize(
    "path", [NOBODY.upper().replace("7", "A"), "1", "x%00", NOBODY + "%0A", "%ff"]
)
def test_a_path_that_is_nearly_an_id_is_refused(bank: BankInside, path: str) -> None:
    for url in (f"/accounts/{path}", f"/accounts/{path}/statement", f"/transactions/{path}"):
        assert code(bank.get(url)) == (422, "invalid_request")
    refused = bank.post(f"/accounts/{path}/deposit", key="k", amount=1)
    assert code(refused) == (422, "invalid_request")


@at_the_edge
@pytest.mark.parametrize(
    "declared",
    ["", "text/plain", "application/xml", "application/jsonp", "json",
     "application/json,text/plain",
     "multipart/form-data; boundary=x", b"\xff", "application/x-www-form-urlencoded"],
)  # fmt: skip
def test_a_body_that_is_not_declared_as_json_is_refused(bank: BankInside, declared: Any) -> None:
    bank.given(alice=100, bob=0)
    body = json.dumps(good_body(bank))
    refused = send_raw(bank, body, **{"Content-Type": declared})
    assert code(refused) == (415, "unsupported_media_type")
    assert not changed(bank)


@pytest.mark.parametrize(
    "declared",
    ["application/json", "APPLICATION/JSON; charset=utf-8", "application/json;",
     "application/x+json",
     "application/json; charset=klingon", 'application/json; a="', "application/json; \x00"],
)  # fmt: skip
def test_a_body_that_is_declared_as_json_is_read(bank: BankInside, declared: str) -> None:
    bank.given(alice=100, bob=0)
    answer = send_raw(bank, json.dumps(good_body(bank)), **{"Content-Type": declared})
    assert answer.status_code == 200


def test_a_body_has_at_most_64_kibibytes(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    body = json.dumps(good_body(bank)).encode()

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000

    assert code(send_raw(bank, body.ljust(65_537))) == (413, "body_too_large")
    assert code(send_raw(bank, chunks())) == (413, "body_too_large")
    assert not changed(bank)
    assert send_raw(bank, body.ljust(65_536)).status_code == 200


def test_a_key_is_required_where_money_moves(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    for path in ("/transfers", f"/accounts/{bank.ids['alice']}/deposit"):
        assert code(bank.post(path, amount=1)) == (400, "idempotency_key_missing")
    assert code(bank.post("/transfers", nonsense=1)) == (400, "idempotency_key_missing")
    assert not changed(bank)


@at_the_edge
@pytest.mark.parametrize(
    "key",
    ["", " ", "a b", '"', '""', '"a', 'a b"', "x" * 256, '"' + "x" * 256 + '"', "tab\there",
     b"caf\xe9", "\x7f", '" "'],
)  # fmt: skip
def test_an_odd_key_is_refused(bank: BankInside, key: Any) -> None:
    bank.given(alice=100, bob=0)
    refused = send_raw(bank, json.dumps(good_body(bank)), **{"Idempotency-Key": key})
    assert code(refused) == (400, "idempotency_key_invalid")
    assert code(bank.send("POST", "/accounts", json={"owner_name": "x"}, headers={
        "Idempotency-Key": key})) == (400, "idempotency_key_invalid")  # fmt: skip
    assert not changed(bank)


def test_a_repeated_key_header_is_refused(bank: BankInside) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    refused = bank.send("POST", "/accounts", json={"owner_name": "x"}, headers=headers)
    assert code(refused) == (400, "idempotency_key_invalid")


@pytest.mark.parametrize(
    "key", ["x", "x" * 255, '"' + "x" * 255 + '"', "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
)
def test_a_visible_key_is_taken(bank: BankInside, key: str) -> None:
    opened = bank.post("/accounts", key=key, owner_name="Alice")
    assert bank.post("/accounts", key=key, owner_name="Alice").content == opened.content


def test_checks_come_in_their_order(bank: BankInside) -> None:
    bank.given(alice=0)
    nobody = f"/accounts/{NOBODY}/withdraw"
    someone = f"/accounts/{bank.ids['alice']}/withdraw"
    foreign = {"Host": "evil.example"}
    assert code(bank.send("POST", nobody, json={}, headers=foreign))[1] == "forbidden"
    assert code(bank.post(nobody, amount=-1))[1] == "idempotency_key_missing"
    assert code(bank.post(nobody, key="k", amount=-1))[1] == "invalid_request"
    assert code(bank.post(nobody, key="k", amount=1))[1] == "account_not_found"
    bank.tamper("UPDATE account SET status = 'FROZEN' WHERE owner_name = 'alice'")
    assert code(bank.post(someone, key="k1", amount=1))[1] == "account_frozen"
    bank.tamper("UPDATE account SET status = 'ACTIVE' WHERE owner_name = 'alice'")
    assert code(bank.post(someone, key="k2", amount=1))[1] == "insufficient_funds"


# ---------------------------------------------------------------------- The canonical API


@at_the_edge
@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/account",
        "/accounts/",
        "//accounts",
        "/transfers/x",
        "/x%2f",
        "/accounts%0A",
        "/health%0A",
    ],
)
def test_an_unknown_path_is_not_found(bank: BankInside, path: str) -> None:
    assert code(bank.send("GET", f"http://localhost{path}")) == (404, "not_found")


def test_a_wrong_method_is_told_the_right_one(bank: BankInside) -> None:
    refused = bank.send("DELETE", "/transfers")
    assert code(refused) == (405, "method_not_allowed")
    assert refused.headers["Allow"] == "POST"
    assert bank.send("DELETE", "/accounts").headers["Allow"] == "GET, POST"


def test_the_shapes_are_those_of_the_contract(bank: BankInside) -> None:
    bank.given(alice=100, bob=0)
    sent = bank.transfer("alice", "bob", 1).json()
    account = {"id", "name", "owner_name", "asset", "status", "balance", "created_at"}
    entry = {"id", "ts", "account_id", "transaction_id", "amount", "type", "balance", "ref", "kind"}
    shown = bank.get(f"/transactions/{sent['transfer_id']}").json()
    assert set(sent) == {"transfer_id", "amount", "asset", "memo", "ts", "source", "dest"}
    assert set(sent["source"]) == set(bank.deposit("bob", 1).json()) == account
    assert set(shown) == {"id", "kind", "memo", "ts", "entries"}
    assert set(shown["entries"][0]) == set(bank.statement("bob")[0]) == entry
    assert shown["ts"] == sent["ts"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", sent["ts"])


def test_the_api_describes_itself(bank: BankInside) -> None:
    paths = bank.get("/openapi.json").json()["paths"]
    operations = {f"{method.upper()} {path}" for path, item in paths.items() for method in item}
    assert operations == {
        "POST /accounts",
        "GET /accounts",
        "GET /accounts/{account_id}",
        "POST /accounts/{account_id}/deposit",
        "POST /accounts/{account_id}/withdraw",
        "POST /transfers",
        "GET /accounts/{account_id}/statement",
        "GET /transactions/{transaction_id}",
        "POST /payments",
        "GET /payments/{payment_id}",
        "POST /accounts/{account_id}/freeze",
        "POST /accounts/{account_id}/unfreeze",
        "POST /accounts/{account_id}/close",
        "GET /audit",
        "GET /health",
    }
    transfer = paths["/transfers"]["post"]
    assert transfer["parameters"][0]["name"] == "Idempotency-Key"
    assert transfer["parameters"][0]["required"] is True
    assert "422" not in transfer["responses"]
    assert "application/problem+json" in transfer["responses"]["4XX"]["content"]
    assert transfer["security"] == [{"X-API-Key": []}, {"Bearer": []}]
    assert "Roles: service, admin." in transfer["description"]
    assert "security" not in paths["/health"]["get"]
    assert bank.get("/docs").status_code == 200


# ------------------------------------------------------------------ Any story whatsoever


class AnyStory(RuleBasedStateMachine):
    """Whatever happens, in whatever order: the ledger agrees with a plain dictionary."""

    def __init__(self, new_ledger: Callable[[], AbstractContextManager[str]]) -> None:
        super().__init__()
        self.scene = ExitStack()
        self.bank = self.scene.enter_context(opened(self.scene.enter_context(new_ledger())))
        self.model: dict[str, int] = {}
        self.frozen: set[str] = set()
        self.sent: list[tuple[Callable[[], httpx.Response], bytes]] = []

    people = st.integers(min_value=0, max_value=3)
    amounts = st.integers(min_value=1, max_value=30)

    def person(self, number: int) -> str:
        """Return one of those who have an account."""
        return sorted(self.model)[number % len(self.model)]

    def tell(self, allowed: bool, act: Callable[..., httpx.Response], *details: Any) -> None:
        """Send something under a new key, and keep it so that it can be repeated."""
        key = new_key()
        answer = act(*details, key=key)
        assert answer.status_code == (200 if allowed else 409)
        self.sent.append((lambda: act(*details, key=key), answer.content))

    @precondition(lambda self: len(self.model) < 4)
    @rule()
    def open(self) -> None:
        name = f"person {len(self.model)}"
        self.bank.given({name: 0})
        self.model[name] = 0

    @precondition(lambda self: self.model)
    @rule(number=people, amount=amounts)
    def deposit(self, number: int, amount: int) -> None:
        name = self.person(number)
        allowed = name not in self.frozen
        self.tell(allowed, self.bank.deposit, name, amount)
        self.model[name] += amount if allowed else 0

    @precondition(lambda self: self.model)
    @rule(number=people, amount=amounts)
    def withdraw(self, number: int, amount: int) -> None:
        name = self.person(number)
        allowed = amount <= self.model[name] and name not in self.frozen
        self.tell(allowed, self.bank.withdraw, name, amount)
        self.model[name] -= amount if allowed else 0

    @precondition(lambda self: self.model)
    @rule(number=people, step=st.sampled_from(["freeze", "unfreeze"]))
    def turn(self, number: int, step: str) -> None:
        name = self.person(number)
        allowed = (step == "freeze") == (name not in self.frozen)
        assert self.bank.turn(name, step).status_code == (200 if allowed else 409)
        self.frozen ^= {name} if allowed else set()

    @precondition(lambda self: len(self.model) > 1)
    @rule(numbers=st.tuples(people, people), amount=amounts)
    def transfer(self, numbers: tuple[int, int], amount: int) -> None:
        source, dest = (self.person(number) for number in numbers)
        if source == dest:
            assert code(self.bank.transfer(source, dest, amount)) == (400, "same_account")
            return
        allowed = amount <= self.model[source] and not self.frozen & {source, dest}
        self.tell(allowed, self.bank.transfer, source, dest, amount)
        self.model[source] -= amount if allowed else 0
        self.model[dest] += amount if allowed else 0

    @precondition(lambda self: self.sent)
    @rule(number=st.integers(min_value=0, max_value=99))
    def repeat(self, number: int) -> None:
        act, content = self.sent[number % len(self.sent)]
        again = act()
        assert (again.content, again.headers["Idempotent-Replayed"]) == (content, "true")

    @invariant()
    def the_books_agree(self) -> None:
        assert self.bank.balances() == self.model
        assert self.bank.rows("SELECT SUM(balance) FROM account") == [(0,)]
        assert self.bank.wrong() == []

    def teardown(self) -> None:
        self.scene.close()


@contextmanager
def new_file() -> Iterator[str]:
    """Give a file that is not there yet, and remove it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/ledger.db"


def test_any_story_whatsoever_agrees_with_a_dictionary(
    engine: str, request: pytest.FixtureRequest
) -> None:
    new_ledger: Callable[[], AbstractContextManager[str]] = new_file
    examples = 20
    if engine == "postgresql":
        new_ledger = partial(new_database, request.getfixturevalue("postgresql"))
        examples = 8
    stories = settings(max_examples=examples, stateful_step_count=20, deadline=None, database=None)
    run_state_machine_as_test(partial(AnyStory, new_ledger), settings=stories)  # type: ignore[arg-type]


# --------------------------------------------------------------------- A real server process


class Server(NamedTuple):
    """A server process, and a bank that speaks to it."""

    process: subprocess.Popen[str]
    bank: Bank
    said: list[str]
    log: Path


@contextmanager
def serving(database: str, *options: str, **environment: str) -> Iterator[Server]:
    """Run `python ledger.py` on a free port until the scene ends."""
    command = [sys.executable, str(PROGRAM), "--port", "0", "--database-url", database, *options]
    with (
        tempfile.NamedTemporaryFile("r", suffix=".log") as log,
        subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=os.open(log.name, os.O_WRONLY | os.O_APPEND),
            text=True,
        ) as process,
    ):
        assert process.stdout
        try:
            said = [process.stdout.readline().rstrip() for _ in range(4)]
            limits = httpx.Limits(max_connections=None)
            with httpx.Client(base_url=said[0].split()[-1], timeout=30, limits=limits) as client:
                yield Server(process, Bank(client.request, database), said, Path(log.name))
        finally:
            process.terminate()
            process.wait()
            told = log.read()
        assert "Traceback" not in told, told


@contextmanager
def module_database(
    engine: str, request: pytest.FixtureRequest, folders: pytest.TempPathFactory
) -> Iterator[str]:
    """Give the URL of a database for many tests."""
    if engine == "sqlite":
        yield f"sqlite:///{folders.mktemp('server')}/ledger.db"
        return
    with new_database(request.getfixturevalue("postgresql")) as url:
        yield url


@pytest.fixture(scope="module", params=ENGINES)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """One server for all tests that do not end it."""
    with (
        module_database(request.param, request, tmp_path_factory) as database,
        serving(database) as server,
    ):
        yield server


@pytest.fixture(scope="module", params=product(ENGINES, (1, 2)), ids=str)
def servers(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bank]:
    """One ledger behind one server process, or behind two in turn."""
    engine, count = request.param
    with (
        module_database(engine, request, tmp_path_factory) as database,
        ExitStack() as stack,
    ):
        serve = [stack.enter_context(serving(database)) for _ in range(count)]
        in_turn = cycle([server.bank.send for server in serve])
        yield Bank(lambda *request, **options: next(in_turn)(*request, **options), database)


def test_the_server_says_where_it_is(server: Server) -> None:
    address = str(server.bank.send("GET", "/health").url).removesuffix("/health")
    assert server.said == [
        f"ledger.py serves on {address}",
        f"  docs      {address}/docs",
        f"  database  {ledger.database_at(server.bank.database).name}",
        "  mode      open: every caller on this machine may do everything",
    ]


def test_200_parallel_deposits_of_1_leave_200(servers: Bank) -> None:
    bank = servers.given(ada=0)
    answers = at_once([lambda: bank.deposit("ada", 1)] * 200)
    assert Counter(answer.status_code for answer in answers) == {200: 200}
    assert bank.balances()["ada"] == 200


def test_40_parallel_withdrawals_of_10_from_50_succeed_5_times(servers: Bank) -> None:
    bank = servers.given(bea=50)
    answers = at_once([lambda: bank.withdraw("bea", 10)] * 40)
    assert Counter(answer.status_code for answer in answers) == {200: 5, 409: 35}
    assert bank.balances()["bea"] == 0


def test_40_parallel_requests_with_one_key_act_once(servers: Bank) -> None:
    bank = servers.given(cleo=0)
    answers = at_once([lambda: bank.deposit("cleo", 7, key="one-key")] * 40)
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert bank.balances()["cleo"] == 7


def test_a_ring_of_transfers_keeps_its_total_at_every_moment(servers: Bank) -> None:
    names = [f"ring {number}" for number in range(8)]
    bank = servers.given(dict.fromkeys(names, 100))
    finished = threading.Event()

    def go_round(number: int) -> None:
        for step in range(20):
            source, dest = names[(number + step) % 8], names[(number + step + 1) % 8]
            answer = bank.transfer(source, dest, random.randint(1, 60))
            assert answer.status_code in (200, 409)

    def watch() -> int:
        looks = 0
        while not finished.is_set():
            balances = bank.balances()
            assert sum(balances[name] for name in names) == 800
            assert min(balances[name] for name in names) >= 0
            looks += 1
        return looks

    with ThreadPoolExecutor(2) as watchers:
        watching = [watchers.submit(watch) for _ in range(2)]
        try:
            at_once([partial(go_round, number) for number in range(32)])
        finally:
            finished.set()
    assert all(watcher.result() > 0 for watcher in watching)
    assert sum(bank.balances()[name] for name in names) == 800


def test_an_answer_goes_out_only_after_the_commit(servers: Bank) -> None:
    bank = servers.given(dora=0)

    def deposit_and_look(key: str) -> None:
        assert bank.deposit("dora", 1, key=key).status_code == 200
        assert bank.rows(f"SELECT status FROM idempotency_key WHERE id LIKE '%|{key}'") == [(200,)]

    at_once([partial(deposit_and_look, f"seen-{number}") for number in range(20)])


def talk(bank: Bank, request: bytes) -> bytes:
    """Send raw bytes, and return what comes back until the server closes or is silent."""
    url = httpx.URL(str(bank.get("/health").url))
    answer = b""
    with socket.create_connection((url.host, url.port), timeout=2) as wire:
        wire.sendall(request)
        with suppress(TimeoutError, ConnectionResetError):
            while chunk := wire.recv(65_536):
                answer += chunk
                if b"\r\n\r\n" in answer and answer.endswith((b"}", b".")):
                    break
    return answer


HEAD = b"Host: localhost\r\nIdempotency-Key: k\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"POST /transfers HTTP/1.1\r\n" + HEAD + b"Content-Length: 10000000\r\n\r\n"
         + b" " * 70_000, b"413"),
        (b"POST /transfers HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
         + (b"4000\r\n" + b" " * 0x4000 + b"\r\n") * 5, b"413"),
        (b"POST /transfers HTTP/1.1\r\n" + HEAD + b"Content-Length: x\r\n\r\n", b"400"),
        (b"POST /transfers HTTP/1.1\r\n" + HEAD + b"Content-Length: 99999999999\r\n\r\n", b"413"),
        (b"POST /transfers HTTP/1.1\r\n" + HEAD + b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
         b"Content-Length: 31\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET /accounts HTTP/1.1\r\n" + HEAD + b"Connection: Upgrade\r\nUpgrade: x\r\n"
         b"Content-Length: 31\r\n\r\nGET /health HTTP/1.1\r\nHost: x\r\n\r\n", b"200"),
        (b"POST /accounts HTTP/1.1\r\n" + HEAD + b"Content-Length: " + b"0" * 5_000
         + b"2\r\n\r\n{}", b"422"),
        (b"GET /accounts/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
        (b"GET /accounts HTTP/1.1\r\n\r\n", b"403"),
        (b"GET /accounts?owner_name=%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"422"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 60_000 + b"\r\n\r\n", b"200"),
        (b"BREW /accounts HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
)  # fmt: skip
def test_odd_bytes_get_a_clear_answer(server: Server, request_bytes: bytes, status: bytes) -> None:
    answer = talk(server.bank, request_bytes)
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_caller_who_goes_away_leaves_the_server_well(server: Server) -> None:
    bank = server.bank.given(eve=0)
    url = httpx.URL(str(bank.get("/health").url))
    path = f"/accounts/{bank.ids['eve']}/deposit".encode()
    whole = b'POST %s HTTP/1.1\r\n%sContent-Length: 12\r\n\r\n{"amount":1}' % (path, HEAD)
    for request in (whole, whole[:-4]):
        with socket.create_connection((url.host, url.port)) as wire:
            wire.sendall(request)
    assert bank.deposit("eve", 1, key="k").status_code == 200
    assert bank.balances()["eve"] == 1


def test_sigterm_finishes_what_was_accepted(database: str) -> None:
    answers: list[int] = []
    with serving(database) as server:
        bank = server.bank.given(alice=0)

        def deposit_until_the_end() -> None:
            with suppress(httpx.TransportError):
                while True:
                    answers.append(bank.deposit("alice", 1).status_code)

        with ThreadPoolExecutor(8) as callers:
            depositing = [callers.submit(deposit_until_the_end) for _ in range(8)]
            time.sleep(0.3)
            server.process.terminate()
            server.process.wait(10)
    assert not [future.result() for future in depositing if future.exception()]
    assert set(answers) == {200}
    with opened(database) as bank:
        [kept] = bank.balances().values()
        # A request may have been written whose answer met a closed connection; none may be lost.
        assert len(answers) <= kept <= len(answers) + 8
        assert bank.wrong() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no Ctrl-C for a child process alone")
def test_ctrl_c_ends_the_server_quietly(database: str) -> None:
    with serving(database) as server:
        server.bank.get("/health")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0


def test_nothing_is_lost_and_nothing_happens_twice_however_often_it_dies(database: str) -> None:
    names = [f"person {number}" for number in range(6)]
    model = Counter(dict.fromkeys(names, 1_000))
    doubt: list[tuple[str, str, int, str]] = []
    with serving(database) as server:
        ids = server.bank.given(model).ids
    for _ in range(CYCLES):
        with serving(database) as server:
            server.bank.ids = ids
            # First of all, what was in doubt when the last process died is asked once more.
            for moved in doubt:
                settle(server.bank, model, moved)
            assert server.bank.balances() == model
            doubt = load_until_killed(server, model)
    with serving(database) as server:
        server.bank.ids = ids
        for moved in doubt:
            settle(server.bank, model, moved)
        assert server.bank.balances() == model
    assert ledger.main(["check", "--database-url", database]) == 0


def settle(bank: Bank, model: Counter[str], moved: tuple[str, str, int, str]) -> None:
    """Send a transfer, and enter into the model what the answer says."""
    source, dest, amount, key = moved
    if bank.transfer(source, dest, amount, key=key).status_code == 200:
        model[source] -= amount
        model[dest] += amount


def load_until_killed(server: Server, model: Counter[str]) -> list[tuple[str, str, int, str]]:
    """Transfer over 8 connections until `kill -9`, and return what got no answer."""
    doubt = []

    def work() -> None:
        while True:
            source, dest = random.sample(sorted(model), 2)
            moved = (source, dest, random.randint(1, 400), new_key())
            try:
                settle(server.bank, model, moved)
            except httpx.TransportError:
                doubt.append(moved)
                return

    with ThreadPoolExecutor(8) as callers:
        working = [callers.submit(work) for _ in range(8)]
        time.sleep(random.uniform(0.1, 0.5))
        server.process.kill()
    assert not [future.result() for future in working if future.exception()]
    return doubt


# ------------------------------------------------------------- Payments and their cashback

DAY = ledger.CASHBACK_DELAY


def pass_time(bank: BankInside, microseconds: int) -> None:
    """Move the clock, and let the ledger credit what is due by then."""
    now = ledger.utc_now() + microseconds
    ledger.utc_now = lambda: now
    bank.runner.run(bank.ledger.credit_due("SERVER", now))


def test_a_payment_brings_back_2_percent_after_24_hours(bank: BankInside) -> None:
    bank.given(alice=1_000)
    pass_time(bank, 0)
    paid = bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=199, memo="shoes")
    payment = paid.json()
    assert payment["account"]["balance"] == 801
    assert payment["cashback"]["amount"] == 3
    assert payment["cashback"]["status"] == "SCHEDULED"
    assert payment["cashback"]["due_at"] == ledger.utc_text(ledger.utc_now() + DAY)
    path = f"/payments/{payment['payment_id']}"
    assert bank.get(path).json() == payment
    pass_time(bank, DAY - 1)
    assert bank.balances() == {"alice": 801}
    pass_time(bank, 1)
    pass_time(bank, DAY)
    assert bank.balances() == {"alice": 804}
    assert bank.get(path).json()["cashback"]["status"] == "CREDITED"
    assert bank.get(path).json()["account"]["balance"] == 804
    last, first = bank.statement("alice")[:2]
    assert (last["kind"], last["type"], last["amount"]) == ("CASHBACK", "CREDIT", 3)
    assert (last["ref"], first["transaction_id"]) == (payment["payment_id"], payment["payment_id"])
    assert bank.rows("SELECT caller FROM event WHERE kind = 'CASHBACK'") == [
        ("system",)
    ]
    assert bank.wrong() == []


def test_a_payment_too_small_for_a_cashback_posts_none(bank: BankInside) -> None:
    bank.given(alice=100)
    payment = bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=49).json()
    assert payment["cashback"]["amount"] == 0
    pass_time(bank, DAY)
    path = f"/payments/{payment['payment_id']}"
    assert bank.get(path).json()["cashback"]["status"] == "CREDITED"
    assert bank.balances() == {"alice": 51}
    assert len(bank.statement("alice")) == 2


def test_a_cashback_is_credited_once_by_however_many(bank: BankInside) -> None:
    bank.given(alice=1_000)
    for _ in range(5):
        bank.post("/payments", key=new_key(), account_id=bank.ids["alice"], amount=100)
    later = ledger.utc_now() + DAY

    async def race() -> None:
        await asyncio.gather(*(bank.ledger.credit_due("SERVER", later) for _ in range(10)))

    bank.runner.run(race())
    assert bank.balances() == {"alice": 1_000 - 5 * 100 + 5 * 2}
    # Another server saw the same cashbacks due, and comes too late.
    late = partial(ledger.credit_cashbacks, clock="SERVER", until=later)
    bank.ledger.commit([ledger.Command("test", "{}", late)])
    assert bank.balances() == {"alice": 1_000 - 5 * 100 + 5 * 2}
    assert bank.wrong() == []


def test_a_cashback_waits_while_the_account_is_frozen(bank: BankInside) -> None:
    bank.given(alice=100)
    bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=100)
    bank.turn("alice", "freeze")
    pass_time(bank, DAY)
    assert bank.balances() == {"alice": 0}
    bank.turn("alice", "unfreeze")
    pass_time(bank, 0)
    assert bank.balances() == {"alice": 2}


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE scheduled_cashback SET amount = 99", "for ever"),
        ("UPDATE scheduled_cashback SET due_at = 0, status = 'CREDITED'", "for ever"),
        ("DELETE FROM scheduled_cashback", "for ever"),
    ],
)
def test_the_database_keeps_a_cashback_as_it_was(
    bank: BankInside, statement: str, message: str
) -> None:
    bank.given(alice=100)
    bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=100)
    with pytest.raises(REFUSED, match=message):
        bank.tamper(statement)
    bank.tamper("UPDATE scheduled_cashback SET status = 'CREDITED'")
    with pytest.raises(REFUSED, match="credited once"):
        bank.tamper("UPDATE scheduled_cashback SET status = 'SCHEDULED'")


def test_a_payment_needs_money_and_an_account(bank: BankInside) -> None:
    bank.given(alice=10)
    alice = bank.ids["alice"]
    assert code(bank.post("/payments", account_id=alice, amount=5)) == (
        400,
        "idempotency_key_missing",
    )
    refused = bank.post("/payments", key="k", account_id=alice, amount=11)
    assert code(refused) == (409, "insufficient_funds")
    nobody = bank.post("/payments", key="j", account_id=NOBODY, amount=5)
    assert code(nobody) == (404, "account_not_found")
    assert code(bank.get(f"/payments/{NOBODY}")) == (404, "payment_not_found")
    assert bank.rows("SELECT * FROM scheduled_cashback") == []


def test_the_server_credits_what_fell_due_while_it_was_down(database: str) -> None:
    with opened(database) as bank:
        yesterday = ledger.utc_now() - DAY
        ledger.utc_now = lambda: yesterday
        bank.given(alice=100).post("/payments", key="k", account_id=bank.ids["alice"], amount=100)
    with serving(database) as server:
        wait_until(lambda: server.bank.balances() == {"alice": 2})


def test_two_servers_credit_each_cashback_once(database: str) -> None:
    with opened(database) as bank:
        yesterday = ledger.utc_now() - DAY
        ledger.utc_now = lambda: yesterday
        people = {f"person {number}": 300 for number in range(20)}
        for name in bank.given(people).ids:
            for key in ("k1", "k2", "k3"):
                body = {"account_id": bank.ids[name], "amount": 100}
                assert (
                    bank.post("/payments", key=f"{key}-{bank.ids[name]}", **body).status_code == 200
                )
    with serving(database) as one, serving(database) as other:
        for server in (one, other):
            wait_until(lambda s=server: set(s.bank.balances().values()) == {6})  # type: ignore[misc]
        credited = one.bank.rows("SELECT COUNT(*) FROM event WHERE kind = 'CASHBACK'")
        assert credited == [(60,)]


def test_a_key_is_used_at_one_moment_on_two_servers(database: str) -> None:
    with serving(database) as one, serving(database) as other:
        for number in range(20):
            # No account is named, so that nothing but the key itself keeps them apart.
            send = [
                partial(s.bank.post, "/accounts", key=f"k{number}", owner_name=f"person {number}")
                for s in (one, other)
            ]
            first, second = at_once(send)
            assert (first.status_code, first.content) == (201, second.content)
        assert len(one.bank.balances()) == 20


def wait_until(true: Callable[[], bool], seconds: float = 5) -> None:
    """Look again and again until something is true, or fail."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ------------------------------------------------------------------------ /bank, the kata

MS_PER_DAY = 86_400_000


@pytest.fixture
def every_dialect(database: str) -> Iterator[BankInside]:
    """A new ledger with all dialects and their demo accounts."""
    with opened(database, ledger.DIALECTS) as bank:
        yield bank


def told(bank: Bank, timestamp: int, path: str, **body: Any) -> Any:
    """Send a request of the kata, and return its answer or what it is refused with."""
    answer = bank.post(f"/bank{path}", timestamp=timestamp, **body)
    document = answer.json()
    return document if answer.is_success else (*code(answer)[:1], document["detail"])


def kata(bank: Bank, *names: str, balance: int = 0) -> None:
    """Open accounts of the kata at the time 1."""
    for name in names:
        assert told(bank, 1, "/accounts", account_id=name) == {"account_id": name, "created": True}
        if balance:
            told(bank, 1, "/deposits", account_id=name, amount=balance)


def kata_balance(bank: Bank, name: str, **parameters: int) -> int:
    """Return a balance of the kata."""
    return int(bank.get(f"/bank/accounts/{name}/balance", **parameters).json()["balance"])


def test_the_kata_as_it_is_told(every_dialect: BankInside) -> None:
    bank = every_dialect
    kata(bank, "bob", "alice")
    assert told(bank, 2, "/accounts", account_id="alice") == (409, "Account already exists")
    assert bank.get("/bank/accounts").json() == {"accounts": ["alice", "bob"]}
    assert told(bank, 2, "/deposits", account_id="alice", amount=2_000) == {"balance": 2_000}
    assert told(bank, 3, "/deposits", account_id="zoe", amount=1) == (404, "Account not found")
    ends = {"source_account_id": "alice", "target_account_id": "bob"}
    assert told(bank, 4, "/transfers", **ends, amount=500) == {"balance": 1_500}
    for target, amount in (("bob", 5_000), ("alice", 1), ("zoe", 1)):
        refused = {"source_account_id": "alice", "target_account_id": target, "amount": amount}
        assert told(bank, 4, "/transfers", **refused) == (400, "Transfer failed")
    assert told(bank, 5, "/payments", account_id="alice", amount=199) == {"payment_id": "payment1"}
    assert told(bank, 5, "/payments", account_id="alice", amount=9_999) == (400, "Payment failed")
    assert told(bank, 5, "/payments", account_id="zoe", amount=1) == (400, "Payment failed")
    assert told(bank, 6, "/payments", account_id="bob", amount=49) == {"payment_id": "payment2"}
    assert kata_balance(bank, "alice") == 1_301
    path = "/bank/payments/payment1"
    due = 5 + MS_PER_DAY
    for timestamp, status in ((due - 1, "IN_PROGRESS"), (due, "CASHBACK_RECEIVED")):
        answer = bank.get(path, account_id="alice", timestamp=timestamp).json()
        assert answer == {"payment_id": "payment1", "status": status}
    assert kata_balance(bank, "alice") == 1_304
    assert code(bank.get(path, account_id="bob", timestamp=6)) == (404, "payment_not_found")
    for odd in ("payment3", "payment0", "payment01", "payment" + "9" * 30, "x"):
        refused_read = bank.get(f"/bank/payments/{odd}", account_id="alice", timestamp=6)
        assert code(refused_read) == (404, "payment_not_found")
    spenders = bank.get("/bank/top-spenders", timestamp=6, n=5).json()
    assert spenders == {"top_spenders": ["alice(699)", "bob(49)"]}
    assert bank.get("/bank/health").json() == {"status": "ok"}
    assert bank.wrong() == []


def test_the_kata_lists_a_history(every_dialect: BankInside) -> None:
    bank = every_dialect
    kata(bank, "alice", "bob")
    told(bank, 50, "/deposits", account_id="alice", amount=1_000)
    told(bank, 20, "/payments", account_id="alice", amount=100)
    told(bank, 50, "/payments", account_id="alice", amount=10)
    ends = {"source_account_id": "alice", "target_account_id": "bob"}
    told(bank, 60, "/transfers", **ends, amount=5)
    path = "/bank/accounts/alice/transactions"

    def history(timestamp: int) -> list[tuple[Any, ...]]:
        lines = bank.get(path, timestamp=timestamp).json()["transactions"]
        return [tuple(line.values())[1:] for line in lines]

    expected = [
        (1, "created", 0, None, None),
        (20, "payment1", 100, None, None),
        (50, "deposited", 1_000, None, None),
        (50, "payment2", 10, None, None),
        (60, "transferred out", 5, None, None),
        (20 + MS_PER_DAY, "cashback", 2, "payment1", False),
        (50 + MS_PER_DAY, "cashback", 0, "payment2", False),
    ]
    assert history(0) == expected
    ids = [line["transaction_id"] for line in bank.get(path, timestamp=0).json()["transactions"]]
    assert len(set(ids)) == len(ids)
    assert [line[:4] for line in history(2**53)] == [line[:4] for line in expected]
    # Of a cashback of 0 nothing is credited: it counts as received by the time of who asks.
    assert [line[4] for line in history(2**53)][-2:] == [True, True]
    assert [line[4] for line in history(0)][-2:] == [True, False]
    others = bank.get("/bank/accounts/bob/transactions", timestamp=0).json()["transactions"]
    assert [line["operation"] for line in others] == ["created", "transferred in"]
    missing = bank.get("/bank/accounts/zoe/transactions", timestamp=0)
    assert (code(missing)[0], missing.json()["detail"]) == (404, "Account not found")


def test_the_kata_takes_the_last_millisecond_there_is(every_dialect: BankInside) -> None:
    bank = every_dialect
    kata(bank, "alice", balance=100)
    told(bank, 2**53, "/payments", account_id="alice", amount=100)
    lines = bank.get("/bank/accounts/alice/transactions", timestamp=2**53).json()["transactions"]
    assert [line["timestamp"] for line in lines] == [1, 1, 2**53, 2**53 + MS_PER_DAY]


@pytest.mark.parametrize("name", ["a/b", "/", "a|b", "bank:a", "%2F", "李", "x/balance", "a b"])
def test_any_name_can_be_read_again(every_dialect: BankInside, name: str) -> None:
    bank, quoted = every_dialect, quote(name, safe="")
    kata(bank, name, balance=7)
    shown = bank.get(f"/bank/accounts/{quoted}/balance").json()
    assert shown == {"account_id": name, "balance": 7}
    bank.post(USERS, external_user_id=name)
    assert bank.get(f"{USERS}/{quoted}/balance", asset_type_id=1).json()["balance"] == "0.0000"


@at_the_edge
@pytest.mark.parametrize("number", ["1.0", " 1", "1_0", "+1", "x", "", "1e1"])
def test_a_number_in_a_query_is_written_in_digits(every_dialect: BankInside, number: str) -> None:
    kata(every_dialect, "alice")
    for path, parameters in (
        ("/bank/accounts/alice/balance", {"timestamp": number}),
        ("/bank/top-spenders", {"timestamp": 1, "n": number}),
        (f"{USERS}/user_bob/balance", {"asset_type_id": number}),
        ("/accounts", {"limit": number}),
    ):
        assert code(every_dialect.get(path, **parameters)) == (422, "invalid_request")


def fill(bank: BankInside, reference: str, times: int) -> list[ledger.Answer]:
    """Deposit the largest amount that many times, in one batch."""

    def deposit(book: ledger.Book) -> ledger.Answer:
        account = ledger.deposit(book, reference, amount=ledger.AMOUNT_MAX)
        return ledger.Answer(200, str(account.balance))

    return bank.ledger.commit([ledger.Command("test", "{}", deposit)] * times)


def test_a_refused_opening_leaves_nothing(every_dialect: BankInside, tmp_path: Path) -> None:
    bank = every_dialect
    kata(bank, "rich")
    fill(bank, "bank:rich@USD", 9_223)
    settings = ledger.Settings(bank.database, '{"555": "9999999999999.00"}')
    with pytest.raises(ledger.StartupError, match="balance_limit"):
        ledger.create_app(settings)
    assert bank.rows("SELECT * FROM account WHERE name = 'atm:555'") == []
    assert bank.rows("SELECT * FROM event WHERE kind = 'open_account' AND caller = 'system' "
                     "AND arguments LIKE '%555%'") == []  # fmt: skip


def test_an_opening_is_recorded_under_its_first_account(every_dialect: BankInside) -> None:
    every_dialect.post(USERS, external_user_id="carol")
    event = "(SELECT account_id FROM event ORDER BY id DESC LIMIT 1)"
    assert every_dialect.rows(f"SELECT asset FROM account WHERE id = {event}") == [("GOLD",)]


def test_cashback_of_the_kata_comes_before_the_operation_that_reaches_it(
    every_dialect: BankInside,
) -> None:
    bank = every_dialect
    kata(bank, "alice", "bob", balance=100)
    told(bank, 10, "/payments", account_id="alice", amount=100)
    told(bank, 5, "/payments", account_id="bob", amount=100)
    due = 10 + MS_PER_DAY
    # Alice has nothing but what just came back to her; the refused transfer changes nothing.
    refused = {"source_account_id": "alice", "target_account_id": "bob", "amount": 3}
    assert told(bank, due, "/transfers", **refused) == (400, "Transfer failed")
    assert (kata_balance(bank, "alice"), kata_balance(bank, "bob")) == (2, 2)
    order = bank.rows(
        "SELECT owner_name FROM event AS t JOIN entry ON transaction_id = t.id "
        "JOIN account ON account.id = entry.account_id WHERE t.kind = 'CASHBACK' "
        "AND account.kind = 'CUSTOMER' ORDER BY t.id"
    )
    assert order == [("bob",), ("alice",)]
    # An earlier time is accepted, and takes nothing back.
    assert kata_balance(bank, "alice", timestamp=1) == 2


@pytest.mark.parametrize("amount", [1, 49, 50, 99, 10**15 - 1, 10**15])
def test_cashback_is_exact_at_every_size(every_dialect: BankInside, amount: int) -> None:
    kata(every_dialect, "alice", balance=amount)
    told(every_dialect, 1, "/payments", account_id="alice", amount=amount)
    back = (amount * 2) // 100
    assert kata_balance(every_dialect, "alice", timestamp=1 + MS_PER_DAY) == back


def test_the_clock_of_the_kata_is_its_own(every_dialect: BankInside) -> None:
    bank = every_dialect
    kata(bank, "alice", balance=100)
    # By the server's clock this payment was made in 1970; by the caller's it was just made.
    told(bank, 1, "/payments", account_id="alice", amount=100)
    pass_time(bank, 10 * DAY)
    assert kata_balance(bank, "alice", timestamp=MS_PER_DAY) == 0
    [account] = bank.get("/accounts", name="bank:alice").json()["items"]
    entries = bank.get(f"/accounts/{account['id']}/statement").json()["items"]
    assert [entry["kind"] for entry in entries] == ["PAYMENT", "DEPOSIT"]
    [(payment_id,)] = bank.rows("SELECT payment_id FROM scheduled_cashback")
    assert code(bank.get(f"/payments/{payment_id}")) == (404, "payment_not_found")
    assert bank.get(f"/transactions/{payment_id}").json()["kind"] == "PAYMENT"


@at_the_edge
@pytest.mark.parametrize("timestamp", [-1, 2**53 + 1, 1.5, "1", True, None])
def test_a_time_is_a_number_of_milliseconds(every_dialect: BankInside, timestamp: Any) -> None:
    refused = every_dialect.post("/bank/accounts", timestamp=timestamp, account_id="a")
    assert code(refused) == (422, "invalid_request")


def test_payments_of_the_kata_are_numbered_without_gaps(servers: Bank) -> None:
    bank = servers
    kata(bank, *(f"payer {n}" for n in range(8)), balance=100)
    answers = at_once(
        [partial(told, bank, 2, "/payments", account_id=f"payer {n % 8}", amount=9)
         for n in range(104)]
    )  # fmt: skip
    numbers = [int(a["payment_id"].removeprefix("payment")) for a in answers if isinstance(a, dict)]
    assert sorted(numbers) == list(range(1, 89))
    assert answers.count((400, "Payment failed")) == 16


def test_of_two_parallel_openings_of_one_name_one_succeeds(servers: Bank) -> None:
    for name in ("twin a", "twin b", "twin c"):
        open_it = partial(servers.post, "/bank/accounts", timestamp=1, account_id=name)
        assert sorted(answer.status_code for answer in at_once([open_it] * 2)) == [201, 409]
        create = partial(servers.post, "/api/v1/wallets/users", external_user_id=name)
        assert sorted(answer.status_code for answer in at_once([create] * 2)) == [201, 409]


def test_cashbacks_come_once_however_often_the_server_dies(database: str) -> None:
    with serving(database) as server:
        kata(server.bank, "payer", balance=10**9)
        for timestamp in range(400):
            told(server.bank, timestamp, "/payments", account_id="payer", amount=100 + timestamp)
        [paid] = server.bank.rows("SELECT balance FROM account WHERE name = 'payments'")
    for death in range(CYCLES):
        with serving(database) as server:
            until = MS_PER_DAY + 400 * (death + 1) // CYCLES

            def look(server: Server = server, until: int = until) -> None:
                with suppress(httpx.TransportError):
                    for timestamp in range(until - 400 // CYCLES, until):
                        kata_balance(server.bank, "payer", timestamp=timestamp)

            with ThreadPoolExecutor(4) as lookers:
                looking = [lookers.submit(look) for _ in range(4)]
                time.sleep(random.uniform(0.02, 0.3))
                server.process.kill()
            assert not [future.result() for future in looking if future.exception()]
    with serving(database) as server:
        balance = kata_balance(server.bank, "payer", timestamp=MS_PER_DAY + 400)
        assert balance == 10**9 - paid[0] + sum((100 + t) * 2 // 100 for t in range(400))
    assert ledger.main(["check", "--database-url", database]) == 0


# ------------------------------------------------------------------ /atm, the cash machine


def test_the_cash_machine_as_it_is_used(every_dialect: BankInside) -> None:
    bank = every_dialect
    welcome = bank.get("/atm/").json()
    assert welcome == {
        "message": "Mini ATM Server",
        "docs": "/docs",
        "sample_accounts": ledger.ATM_DEMO,
    }
    assert bank.get("/atm/health").json() == {"status": "ok", "accounts": sorted(ledger.ATM_DEMO)}
    path = "/atm/accounts/1002"
    assert bank.get(f"{path}/balance").json() == {"account_number": "1002", "balance": "250.50"}
    assert bank.post(f"{path}/deposit", amount="0.5").json()["balance"] == "251.00"
    assert bank.post(f"{path}/withdraw", amount="251").json()["balance"] == "0.00"
    refused = bank.post(f"{path}/withdraw", amount="0.01")
    assert (code(refused)[0], refused.json()["detail"]) == (400, "insufficient funds")
    for answer in (
        bank.get("/atm/accounts/9/balance"),
        bank.post("/atm/accounts/9/deposit", amount="1"),
        bank.post("/atm/accounts/9/withdraw", amount="1"),
    ):
        assert (code(answer)[0], answer.json()["detail"]) == (404, "account not found")
    assert code(bank.get("/atm")) == (404, "not_found")
    assert bank.wrong() == []


@at_the_edge
@pytest.mark.parametrize(
    "amount",
    ["0", "0.00", "-1", "+1", "1.", ".5", "1.005", "NaN", "Infinity", "1e2", "1_000", " 5", "5 ",
     "1,50", "\u0661", "", "0x1", "9" * 17, "9" * 4_000, "1\n", 10, 10.5, True, None, ["1"]],
)  # fmt: skip
def test_the_cash_machine_takes_plain_decimals_alone(every_dialect: BankInside, amount: Any) -> None:
    refused = every_dialect.post("/atm/accounts/1001/deposit", amount=amount)
    assert code(refused) == (422, "invalid_request")
    assert every_dialect.get("/atm/").json()["sample_accounts"] == ledger.ATM_DEMO


def test_a_key_of_the_cash_machine_means_an_amount_and_not_its_digits(
    every_dialect: BankInside,
) -> None:
    path = "/atm/accounts/1003/deposit"
    answers = [every_dialect.post(path, key="k", amount=amount) for amount in ("1.5", "1.50")]
    assert [answer.json()["balance"] for answer in answers] == ["1.50", "1.50"]


@pytest.mark.parametrize(
    ("preload", "balances"),
    [
        (None, ledger.ATM_DEMO),
        ("{}", {}),
        (
            '{"1001": "500.00", "7": "0.005", "8": "1.0049"}',
            {"1001": "500.00", "7": "0.01", "8": "1.00"},
        ),
    ],
)
def test_the_preloaded_accounts_are_made_once(
    database: str, preload: str | None, balances: dict[str, str]
) -> None:
    settings = ledger.Settings(database, preload)
    for _ in range(3):
        # A restart never adds money, and never takes any.
        app = ledger.create_app(settings)
        with app.ledger.database.read() as connection:
            assert ledger.get_atm_welcome(connection).model_dump()["sample_accounts"] == balances
            assert not [result for result in ledger.check(connection) if result.wrong]
        app.ledger.database.close()


def test_a_missing_account_is_made_and_an_old_one_kept(database: str) -> None:
    for preload, expected in (
        ('{"1": "5"}', {"1": "5.00"}),
        ('{"1": "7", "2": "3"}', {"1": "5.00", "2": "3.00"}),
        (None, {"1": "5.00", "2": "3.00"}),
    ):
        app = ledger.create_app(ledger.Settings(database, preload))
        with app.ledger.database.read() as connection:
            assert ledger.get_atm_welcome(connection).model_dump()["sample_accounts"] == expected
        app.ledger.database.close()


@pytest.mark.parametrize(
    "preload",
    ["", "x", "[]", "null", '{"1": 5}', '{"1": "-5"}', '{"1": "NaN"}', '{"1": "1e3"}', '{"": "1"}',
     '{"1": "1", "1": "2"}', '{"1": " 5"}', '{"1": ""}', '{"1": "' + "9" * 30 + '"}'],
)  # fmt: skip
def test_a_wrong_preload_stops_the_start(database: str, preload: str) -> None:
    with pytest.raises(ledger.StartupError, match="PRELOAD_ACCOUNTS must be a JSON object"):
        ledger.create_app(ledger.Settings(database, preload))


# ------------------------------------------------------------------------ Wallets of credits

USERS = "/api/v1/wallets/users"


def wallet(bank: Bank, user: str, asset_type_id: int) -> str:
    """Return what a user has of an asset."""
    path = f"{USERS}/{user}/balance"
    return str(bank.get(path, asset_type_id=asset_type_id).json()["balance"])


def test_the_wallets_as_they_are_used(every_dialect: BankInside) -> None:
    bank = every_dialect
    assert [wallet(bank, "user_alice", n) for n in (1, 2, 3)] == ["100.0000", "50.0000", "500.0000"]
    assert [wallet(bank, "user_bob", n) for n in (1, 2, 3)] == ["80.0000", "30.0000", "200.0000"]
    created = bank.post(USERS, external_user_id="carol")
    assert (created.status_code, created.json()) == (201, {"external_user_id": "carol"})
    assert code(bank.post(USERS, external_user_id="carol")) == (409, "account_exists")
    moved = bank.post(f"{USERS}/carol/top-up", amount="10.5", asset_type_id=1).json()
    assert moved["new_balance"] == "10.5000"
    shown = bank.get(f"/transactions/{moved['transaction_id']}").json()
    assert (shown["kind"], [e["amount"] for e in shown["entries"]]) == ("TOP_UP", [105_000] * 2)
    assert (
        bank.post(f"{USERS}/carol/bonus", amount=1, asset_type_id=1).json()["new_balance"]
        == "11.5000"
    )
    spent = bank.post(f"{USERS}/carol/spend", amount=0.0001, asset_type_id=1).json()
    assert spent["new_balance"] == "11.4999"
    refused = bank.post(f"{USERS}/carol/spend", amount="20", asset_type_id=1)
    assert code(refused) == (402, "insufficient_funds")
    assert refused.json()["detail"] == "Insufficient balance: have 11.4999, need 20.0000"
    for word in ("top-up", "bonus", "spend"):
        nobody = bank.post(f"{USERS}/nobody/{word}", amount=1, asset_type_id=1)
        assert (code(nobody)[0], nobody.json()["detail"]) == (404, "User account not found")
        strange = bank.post(f"{USERS}/carol/{word}", amount=1, asset_type_id=9)
        assert code(strange) == (404, "asset_not_found")
    assert code(bank.get(f"{USERS}/carol/balance", asset_type_id=0)) == (404, "asset_not_found")
    assert code(bank.get(f"{USERS}/nobody/balance", asset_type_id=1)) == (404, "account_not_found")
    assert bank.wrong() == []


@pytest.mark.parametrize(
    ("number", "balance"),
    [("1", "1.0000"), ("1.5", "1.5000"), ('"0.0001"', "0.0001"), ("0.1", "0.1000"),
     ("1e2", "100.0000"),
     ("1.0000", "1.0000"), ("12345678901.2345", "12345678901.2345"), ("1E-4", "0.0001")],
)  # fmt: skip
def test_credits_are_exact(every_dialect: BankInside, number: str, balance: str) -> None:
    every_dialect.post(USERS, external_user_id="carol")
    body = f'{{"amount": {number}, "asset_type_id": 3}}'
    headers = {"Content-Type": "application/json"}
    answer = every_dialect.send("POST", f"{USERS}/carol/top-up", content=body, headers=headers)
    assert answer.json()["new_balance"] == balance


@at_the_edge
@pytest.mark.parametrize(
    "number",
    ["0", "-1", "0.00001", "1.00001", '"1e2"', '" 1"', '"NaN"', "true", "null", "[]", '"1.00000"',
     "1e400", "1e-400", "1e999999", '""', "100000000000.0001", "9" * 400],
)  # fmt: skip
def test_inexact_credits_are_refused(every_dialect: BankInside, number: str) -> None:
    body = f'{{"amount": {number}, "asset_type_id": 3}}'
    headers = {"Content-Type": "application/json"}
    path = f"{USERS}/user_bob/top-up"
    refused = every_dialect.send("POST", path, content=body, headers=headers)
    assert code(refused) == (422, "invalid_request")
    assert wallet(every_dialect, "user_bob", 3) == "200.0000"


def test_the_key_of_a_wallet_may_stand_in_the_body_or_in_the_header(every_dialect: BankInside) -> None:
    bank, path = every_dialect, f"{USERS}/user_bob/top-up"
    first = bank.post(path, amount=1, asset_type_id=1, idempotency_key="k")
    again = bank.post(path, key="k", amount="1.0", asset_type_id=1)
    both = bank.post(path, key="k", amount=1, asset_type_id=1, idempotency_key="k")
    assert first.content == again.content == both.content
    assert again.headers["Idempotent-Replayed"] == "true"
    escaped = '{"amount": 1.0, "asset_type_id": 1, "idempotency_key": "\\u006b"}'
    headers = {"Content-Type": "application/json"}
    assert bank.send("POST", path, content=escaped, headers=headers).content == first.content
    differs = bank.post(path, key="k", amount=1, asset_type_id=1, idempotency_key="j")
    assert code(differs) == (400, "idempotency_key_invalid")
    odd = bank.post(path, amount=1, asset_type_id=1, idempotency_key="two words")
    assert code(odd) == (400, "idempotency_key_invalid")
    for other in ({"amount": 2}, {"asset_type_id": 2}):
        reused = bank.post(path, key="k", **{"amount": 1, "asset_type_id": 1, **other})
        assert code(reused) == (409, "idempotency_key_reused")
    reused = bank.post(f"{USERS}/user_alice/top-up", key="k", amount=1, asset_type_id=1)
    assert code(reused) == (409, "idempotency_key_reused")
    assert wallet(bank, "user_bob", 1) == "81.0000"


def test_60_parallel_spends_of_10_from_80_succeed_8_times(servers: Bank) -> None:
    bank = servers
    bank.post(USERS, external_user_id="hal")
    bank.post(f"{USERS}/hal/top-up", amount=80, asset_type_id=1)
    spend = partial(bank.post, f"{USERS}/hal/spend", amount=10, asset_type_id=1)
    answers = Counter(answer.status_code for answer in at_once([spend] * 60))
    assert answers == {200: 8, 402: 52}
    assert wallet(bank, "hal", 1) == "0.0000"


def test_other_words_do_not_move_credits(every_dialect: BankInside) -> None:
    bank = every_dialect
    items = bank.get("/accounts", name="wallets:user_bob").json()["items"]
    assert {(item["asset"], item["balance"]) for item in items} == {
        ("GOLD", 800_000),
        ("DMND", 300_000),
        ("PTS", 2_000_000),
    }
    bank.ids = {"gold": items[0]["id"], "gems": items[1]["id"]}
    pay = bank.post("/payments", key="k", account_id=bank.ids["gold"], amount=1)
    for answer in (
        bank.deposit("gold", 1),
        bank.withdraw("gold", 1),
        bank.transfer("gold", "gems", 1),
        pay,
    ):
        assert code(answer) == (409, "asset_closed_loop")


# ----------------------------------------------------------------------- The faces together


def test_one_story_through_every_dialect_leaves_identical_books(every_dialect: BankInside) -> None:
    bank = every_dialect
    bank.given(alice=0)
    kata(bank, "alice")
    told(bank, 2, "/deposits", account_id="alice", amount=1_050)
    bank.deposit("alice", 1_050)
    bank.post("/atm/accounts/1003/deposit", amount="10.50")
    [kata_id] = [a["id"] for a in bank.get("/accounts", name="bank:alice").json()["items"]]
    [atm_id] = [a["id"] for a in bank.get("/accounts", name="atm:1003").json()["items"]]
    ids = [bank.ids["alice"], kata_id, atm_id]

    def book(account_id: str) -> list[tuple[Any, ...]]:
        items = bank.get(f"/accounts/{account_id}/statement").json()["items"]
        return [(i["kind"], i["type"], i["amount"], i["balance"], i["ref"]) for i in items]

    assert (
        book(ids[0]) == book(ids[1]) == book(ids[2]) == [("DEPOSIT", "CREDIT", 1_050, 1_050, None)]
    )
    # An account of one dialect can be spoken of in the canonical words, and back.
    bank.ids = {"kata": kata_id, "atm": atm_id}
    assert bank.transfer("kata", "atm", 50).status_code == 200
    assert bank.get("/atm/accounts/1003/balance").json()["balance"] == "11.00"
    history = bank.get("/bank/accounts/alice/transactions", timestamp=1).json()["transactions"]
    assert [line["operation"] for line in history] == ["created", "deposited", "transferred out"]
    assert history[-1]["timestamp"] > 1_700_000_000_000
    assert bank.wrong() == []


def test_every_word_of_every_dialect_is_a_balanced_transaction(every_dialect: BankInside) -> None:
    bank = every_dialect
    bank.given(alice=1_000, bob=0).withdraw("alice", 1)
    bank.transfer("alice", "bob", 1)
    bank.withdraw("bob", 1)
    bank.post("/payments", key="k", account_id=bank.ids["alice"], amount=100)
    pass_time(bank, DAY)
    kata(bank, "alice", balance=1_000)
    told(bank, 1, "/payments", account_id="alice", amount=100)
    bank.post(USERS, external_user_id="carol")
    for word in ("top-up", "bonus", "spend"):
        bank.post(f"{USERS}/carol/{word}", amount=1, asset_type_id=1)
    for step in ("freeze", "unfreeze", "close"):
        bank.turn("bob", step)
    done = {kind for (kind,) in bank.rows("SELECT DISTINCT kind FROM event")}
    moving = {"DEPOSIT", "WITHDRAWAL", "TRANSFER", "PAYMENT", "CASHBACK"}
    moving |= {"TOP_UP", "BONUS", "SPEND"}
    assert done == moving | {"open_account", "open_wallets", "freeze", "unfreeze", "close"}
    sums = bank.rows(
        "SELECT SUM(CASE type WHEN 'CREDIT' THEN amount ELSE -amount END) FROM entry "
        "JOIN account ON account.id = account_id GROUP BY transaction_id, asset"
    )
    assert len(sums) > 12
    assert set(sums) == {(0,)}


@pytest.mark.parametrize("missing", [dialect.name for dialect in ledger.DIALECTS])
def test_any_dialect_can_be_left_out(database: str, missing: str) -> None:
    dialects = [dialect for dialect in ledger.DIALECTS if dialect.name != missing]
    ways = {"ledger": "/accounts", "bank": "/bank/accounts", "atm": "/atm/"}
    ways["wallets"] = f"{USERS}/user_bob/balance?asset_type_id=1"
    with opened(database, dialects) as bank:
        for name, path in ways.items():
            expected = 404 if name == missing else 200
            assert bank.send("GET", path).status_code == expected


def test_a_frozen_account_refuses_in_the_canonical_form_through_every_dialect(
    every_dialect: BankInside,
) -> None:
    bank = every_dialect
    kata(bank, "alice", balance=5)
    bank.tamper("UPDATE account SET status = 'FROZEN' WHERE kind = 'CUSTOMER'")
    for answer in (
        bank.post("/bank/deposits", timestamp=1, account_id="alice", amount=1),
        bank.post("/bank/payments", timestamp=1, account_id="alice", amount=1),
        bank.post("/atm/accounts/1001/withdraw", amount="1"),
        bank.post(f"{USERS}/user_bob/spend", amount=1, asset_type_id=1),
    ):
        assert code(answer) == (409, "account_frozen")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/bank/accounts/a%00b/balance", 404),
        ("GET", "/bank/accounts/%00/transactions?timestamp=1", 404),
        ("GET", "/atm/accounts/%00/balance", 404),
        ("POST", "/atm/accounts/%00/deposit", 404),
        ("GET", f"{USERS}/%00/balance?asset_type_id=1", 404),
        ("GET", "/accounts?name=%00", 422),
        ("GET", "/bank/accounts/%ff%ed%a0%80/balance", 404),
    ],
)
def test_a_name_that_cannot_be_is_not_found(
    every_dialect: BankInside, method: str, path: str, status: int
) -> None:
    body = {"json": {"amount": "1"}} if method == "POST" else {}
    assert code(every_dialect.send(method, path, **body))[0] == status


def test_names_are_sorted_by_their_characters(every_dialect: BankInside) -> None:
    kata(every_dialect, "\u00c4hre", "alpha", "Zeta", "a-b", "ab")
    names = every_dialect.get("/bank/accounts").json()["accounts"]
    assert names == ["Zeta", "a-b", "ab", "alpha", "\u00c4hre"]


def test_seed_makes_the_demo_accounts_once(
    bank: BankInside, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=1)
    url = bank.database
    for _ in range(2):
        assert ledger.main(["seed", "--database-url", url]) == 0
    assert "the first accounts and wallets are in" in capsys.readouterr().out
    with opened(bank.database, ledger.DIALECTS) as every_dialect:
        assert every_dialect.get("/atm/").json()["sample_accounts"] == ledger.ATM_DEMO
        assert wallet(every_dialect, "user_alice", 1) == "100.0000"
    callers = bank.rows("SELECT DISTINCT caller FROM event ORDER BY caller")
    assert callers == [("cli",), ("local",)]


# ---------------------------------------------------------------------------- Application


def test_every_answer_is_for_its_caller_alone(bank: BankInside) -> None:
    bank.given(alice=1)
    paths = ("/accounts", "/health", "/docs", "/openapi.json", "/nowhere", "/accounts/x")
    for answer in (*(bank.get(path) for path in paths), bank.withdraw("alice", 9)):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])


@at_the_edge
@pytest.mark.parametrize(
    ("given", "sane"),
    [
        ("5f3a:web-1.x_y", True),
        ("a" * 128, True),
        ("a" * 129, False),
        ("", False),
        ("a b", False),
        ('"', False),
        (b"\xe9", False),
        ("a\tb", False),
    ],
)
def test_a_request_keeps_its_sane_id(bank: BankInside, given: Any, sane: bool) -> None:
    answer = bank.send("GET", "/health", headers={"X-Request-ID": given})
    assert (answer.headers["X-Request-ID"] == given) == sane
    assert bank.app.log.lines[-1]["request_id"] == answer.headers["X-Request-ID"]


def test_each_request_has_one_line_in_the_log(closed: BankInside) -> None:
    key = new_api_key(closed.database, "till", "service")
    closed.by(key).given(alice=5)
    closed.get("/accounts/alice")
    key_command(closed.database, "revoke", "till")
    wait_until(lambda: closed.by(key).get("/audit").status_code == 401, seconds=1)
    closed.get("/nowhere")
    lines = closed.app.log.lines
    assert set(lines[0]) == {
        "ts", "method", "route", "status", "ms", "caller", "key", "request_id"
    }  # fmt: skip
    shown = [
        (line["method"], line["route"], line["status"], line["caller"], line["key"])
        for line in lines
        if line["status"] != 403
    ]
    assert shown == [
        ("POST", "/accounts", 201, "key:till", key[:11]),
        ("POST", "/accounts/{account_id}/deposit", 200, "key:till", key[:11]),
        ("GET", "/accounts/{account_id}", 401, None, None),
        ("GET", "/audit", 401, None, key[:11]),
        ("GET", None, 404, None, None),
    ]


def test_a_mistake_of_the_server_is_logged_and_told_in_one_line(
    bank: BankInside, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger, "find_account", lambda *arguments: 1 / 0)
    refused = bank.get(f"/accounts/{NOBODY}")
    assert code(refused) == (500, "internal_error")
    assert refused.headers["X-Content-Type-Options"] == "nosniff"
    assert f"the server made a mistake in request {refused.headers['X-Request-ID']}" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert bank.app.log.lines[-1]["status"] == 500


def test_the_log_is_written_as_lines_of_json(database: str) -> None:
    with serving(database) as server:
        server.bank.given(alice=5)
        id_ = server.bank.get("/accounts").headers["X-Request-ID"]
        wait_until(lambda: id_ in server.log.read_text())
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert [line["route"] for line in lines] == [
        "/accounts",
        "/accounts/{account_id}/deposit",
        "/accounts",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", lines[0]["ts"])


def test_the_log_takes_what_the_program_says_until_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    said, log = io.StringIO(), ledger.Log()
    with suppress(ZeroDivisionError), log.written_to(said):
        logging.getLogger("ledger").warning("half of a pair: %s", "\ud800")
        assert 1 / 0
    assert logging.root.handlers == []
    line = json.loads(said.getvalue())
    assert (line["level"], line["message"]) == ("WARNING", "half of a pair: \\ud800")


def test_a_log_that_nobody_reads_stops_nobody() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writing, b"x" * 4_096)
    os.set_blocking(writing, True)
    log = ledger.Log()
    with open(writing, "w") as stuck, log.written_to(stuck):
        for number in range(ledger.LOG_LINES_MAX * 2):
            log.lines.append({"ts": 0.0, "number": number})
        assert len(log.lines) <= ledger.LOG_LINES_MAX
        os.close(reading)


def test_no_secret_is_ever_told(database: str) -> None:
    name = "Alice-the-marked-name"
    secrets = {"LEDGER_ADMIN_KEY": ADMIN_KEY, "LEDGER_JWT_SECRET": SECRET}
    with serving(database, **secrets) as server:
        key, app = new_api_key(database, "marked", "admin"), token(sub="app")
        told = ""
        for credential in (key, ADMIN_KEY, app, SECRET, key + "x", ADMIN_KEY[:-1], app[:-1]):
            for header, form in (("X-API-Key", "{}"), ("Authorization", "Bearer {}")):
                told += every_request(server.bank.by(form.format(credential), header), name)
        told += f"{server.bank.rows('SELECT * FROM event')}" + "".join(server.said)
        told += key_command(database, "list") + str(ledger.Settings.read(secrets))
        id_ = server.bank.get("/health").headers["X-Request-ID"]
        wait_until(lambda: id_ in server.log.read_text())
        log = server.log.read_text()
    assert log.count("\n") > 400
    for secret in (key[12:], ADMIN_KEY, SECRET, app.split(".")[2], ledger.key_hash(key.encode())):
        assert secret not in told + log
    for private in (name, "91827364550"):
        assert private in told
        assert private not in log


def every_request(bank: Bank, name: str) -> str:
    """Send something to each route, and return all that is answered."""
    told = ""
    body = {"owner_name": name, "account_id": name, "external_user_id": name, "amount": 91827364550}
    opened = bank.post("/accounts", owner_name=name)
    bank.ids[name] = opened.json().get("id", NOBODY)
    told += bank.deposit(name, 91827364550).text
    for method, template in MATRIX:
        path = re.sub("{[a-z_]+}", bank.ids[name], template)
        for content in (body, {"amount": 91827364550, "owner_name": name}, [name], {}):
            headers = {"Idempotency-Key": new_key(), "X-Request-ID": "x y"}
            sent = {} if method == "GET" else {"json": content}
            answer = bank.send(method, path, headers=headers, params={"cursor": name}, **sent)
            told += f"{answer.headers}{answer.text}"
    return told + opened.text


# --------------------------------------------------------------------------- Command line


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_port_that_is_taken_ends_the_start_in_one_line(database: str) -> None:
    url = database
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ran = run("serve", "--port", port, "--database-url", url)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == (
        f"ledger: cannot serve on 127.0.0.1:{port}: Address already in use; "
        "choose another with --port\n"
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "line"),
    [
        (["--host", "0.0.0.0"], {}, "serves this machine alone"),  # noqa: S104
        ([], {"PORT": "x"}, "the port must be a number from 0 to 65535, not 'x'"),
        (["--port", "x"], {}, "the port must be a number from 0 to 65535, not 'x'"),
        ([], {"LEDGER_DATABASE_URL": "x://"}, "the database must be a plain file"),
        (["check", "--database-url", "sqlite:////nowhere/x.db"], {}, "there is no ledger at"),
    ],
)
def test_a_refused_start_says_why_in_one_line(
    arguments: list[str], environment: dict[str, str], line: str
) -> None:
    ran = run(*arguments, **environment)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(f"ledger: .*{line}.*\n", ran.stderr)


def test_the_check_counts_what_it_saw(bank: BankInside, capsys: pytest.CaptureFixture[str]) -> None:
    bank.given(alice=100, bob=5)
    url = bank.database
    with bank.ledger.database.read() as connection:
        schema = len(ledger.expected_schema(connection))
    assert ledger.main(["check", "--database-url", url]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "8"],
        ["ok", "2"],
        ["ok", "4"],
        ["ok", "18"],
        ["ok", "16"],
        ["ok", f"{schema}"],
    ]
    bank.tamper(dropping(bank, "entry_kept", "entry"), "DELETE FROM entry WHERE balance = 100")
    assert ledger.main(["check", "--database-url", url]) == 1
    said = capsys.readouterr().out
    assert f"account {bank.ids['alice']}: its row says 1 entries and balance 100" in said


@on_sqlite
def test_a_backup_is_consistent_while_money_moves(database: str, tmp_path: Path) -> None:
    with serving(database) as server:
        back_up_under_load(server.bank.given(fay=1_000, gus=0), tmp_path / "copy.db")
    with opened(f"sqlite:///{tmp_path}/copy.db") as restored:
        balances = restored.balances()
        assert balances["fay"] + balances["gus"] == 1_000
        assert restored.wrong() == []


def back_up_under_load(bank: Bank, copy: Path) -> None:
    """Copy a ledger while four callers move its money."""
    finished = threading.Event()

    def move() -> None:
        while not finished.is_set():
            assert bank.transfer("fay", "gus", 1).status_code in (200, 409)

    with ThreadPoolExecutor(4) as movers:
        moving = [movers.submit(move) for _ in range(4)]
        try:
            assert ledger.main(["backup", str(copy), "--database-url", bank.database]) == 0
        finally:
            finished.set()
    assert not [future.result() for future in moving if future.exception()]


@on_sqlite
def test_a_backup_never_overwrites(bank: BankInside, capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(bank.given(alice=1).database)
    before = file.read_bytes()
    assert ledger.main(["backup", str(file), "--database-url", bank.database]) == 1
    assert "File exists" in capsys.readouterr().err
    assert file.read_bytes() == before


def test_a_copy_is_the_same_ledger(
    bank: BankInside, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bank.given(alice=500, bob=50, carol=0)
    sent = bank.transfer("alice", "bob", 100, key="rent")
    bank.post("/payments", key="p", account_id=bank.ids["alice"], amount=100)
    bank.turn("bob", "freeze")
    bank.turn("carol", "close")
    new_api_key(bank.database, "till", "admin")
    for url in (f"sqlite:///{tmp_path}/copy.db", *another_postgresql(request)):
        assert ledger.main(["copy", "--from", bank.database, "--to", url]) == 0
        with closing(connect(url)) as other, closing(connect(bank.database)) as mine:
            for table in ledger.TABLES:
                query = f'SELECT * FROM "{table}"'
                rows = [sorted(c.execute(query).fetchall(), key=str) for c in (mine, other)]
                assert rows[0] == rows[1]
        assert ledger.main(["check", "--database-url", url]) == 0
        with opened(url) as copied:
            again = copied.by(new_api_key(url, "next", "admin"))
            again.ids = bank.ids
            assert again.withdraw("alice", 1).json()["balance"] == 299
            assert code(again.deposit("bob", 1)) == (409, "account_frozen")
            assert code(again.deposit("carol", 1)) == (409, "account_closed")
    assert sent.status_code == 200


def another_postgresql(request: pytest.FixtureRequest) -> list[str]:
    """Return a second database, where there is a PostgreSQL server."""
    scene = new_database(request.getfixturevalue("postgresql"))
    url = scene.__enter__()
    request.addfinalizer(partial(scene.__exit__, None, None, None))
    return [url]


def test_a_copy_goes_nowhere_but_into_an_empty_database(
    bank: BankInside, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=5)
    full = f"sqlite:///{tmp_path}/full.db"
    with opened(full) as other:
        other.given(bob=7)
    assert ledger.main(["copy", "--from", bank.database, "--to", full]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert ledger.main(["copy", "--from", full, "--to", bank.database]) == 1
    assert bank.balances() == {"alice": 5}


def test_a_copy_of_a_broken_ledger_is_refused_as_a_whole(
    bank: BankInside, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=5)
    tamper_freely(bank, "UPDATE account SET balance = 6 WHERE owner_name = 'alice'")
    url = f"sqlite:///{tmp_path}/copy.db"
    assert ledger.main(["copy", "--from", bank.database, "--to", url]) == 1
    assert "nothing was copied: account" in capsys.readouterr().err
    assert list(tmp_path.glob("copy.db*")) == []


@on_postgresql
def test_a_backup_of_postgresql_is_a_work_of_its_own(
    bank: BankInside, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.db"
    assert ledger.main(["backup", str(copy), "--database-url", bank.database]) == 1
    assert "back it up with pg_dump" in capsys.readouterr().err
    assert not copy.exists()


# --------------------------------------------------------------------------------- README

BASH = shutil.which("bash") or ""
README = PROGRAM.with_name("README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not BASH, reason="the walk is for a shell with curl")
def test_the_walk_in_the_readme_runs_as_it_stands(database: str) -> None:
    walk = "\n".join(re.findall(r"```bash\n# walk\n(.*?)```", README, re.DOTALL))
    with serving(database) as server:
        address = server.said[0].split()[-1]
        ran = subprocess.run(
            [BASH, "-euo", "pipefail", "-c", walk.replace("http://127.0.0.1:8000", address)],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert server.bank.balances() == {"Alice": 750, "Bob": 300}
    for shown in ("Idempotent-Replayed: true", "insufficient_funds", '"ref":"rent"'):
        assert shown.lower() in ran.stdout.lower()


def test_every_test_that_the_readme_names_is_here() -> None:
    named = set(re.findall(r"`(test_\w+|Test\w+)`", README)) - {"test_ledger"}
    assert len(named) > 10
    assert named <= set(globals())
