"""A complete double-entry ledger in one file: tables, rules, HTTP API and command line.

    python ledger.py            serve on http://127.0.0.1:8000, on the file ./ledger.db
    python ledger.py check      verify every invariant against the stored rows
    python ledger.py backup F   copy the ledger into the new file F while the server runs
    uvicorn ledger:app          serve the same application

Glossary, with an example of each:

    asset            what is counted, with its number of decimal places     USD, 2
    minor units      an amount as an integer of the smallest unit           1050 is 10.50 USD
    account          one balance of one asset, owned by a customer          Alice's dollars
    system account   the outside world's side; it alone may go negative     cash, in USD
    leg              a requested entry: an account and a signed amount      (alice, -500)
    entry            one immutable, numbered line of one account            DEBIT 500, leaves 550
    transaction      one event: entries whose credits equal their debits    a transfer
    post             the one operation that turns legs into entries         Book.post
    word             a rule of bookkeeping that ends in a post              deposit, transfer
    command          a word, its arguments and the caller who asked         POST /transfers
    batch            the commands that are written and committed together   1 to some hundreds
    answer           what a command's caller gets: status and body          200 {"balance": 550}
    statement        an account's entries, newest first
    cursor           an opaque place in a list, from which it goes on
    idempotency key  the caller's name for one intent, which acts once      5f3a-retry-me

Sign convention: CREDIT raises a balance and DEBIT lowers it, for every account. A leg's
amount is signed (+ is CREDIT, - is DEBIT); a stored entry has a positive amount and a type.
So a deposit of 500 is DEBIT cash 500, CREDIT alice 500, and all balances sum to zero.

Invariants. The code keeps them all; the database keeps 2, 3, 4, 5, 7 and the uniqueness in
6 once more, by constraints and triggers; `check` verifies what stored rows can show.

    1. The entries of every transaction sum to zero, and so does the whole ledger.
    2. A balance equals the sum of its entries; every entry carries the balance after it.
    3. The entries of an account are numbered 1, 2, 3 ... without a gap.
    4. No customer's account is ever below zero.
    5. Entries, transactions and audit events are never changed or deleted.
    6. An idempotency key of a caller acts at most once, and is always answered the same.
    7. Frozen accounts move no money; closed accounts are empty and never come back.
    8. Nothing is acknowledged before it is committed to disk.

Sections: Settings, Money, Errors, Tables, Database, The rule, The batch, The words,
Reading, Callers, Faces, The canonical API, Application, Command line.
"""

import argparse
import asyncio
import gc
import hashlib
import inspect
import ipaddress
import json
import logging
import os
import re
import secrets
import socket
import sqlite3
import sys
import threading
import time
from collections import defaultdict
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    TypeVar,
    get_args,
)

import sqlmodel
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, to_json
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Connection,
    Engine,
    Index,
    Integer,
    Row,
    Table,
    Text,
    UniqueConstraint,
    and_,
    bindparam,
    create_engine,
    event,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.sql import ClauseElement, Select
from sqlmodel import SQLModel
from starlette.exceptions import HTTPException as FrameworkError
from starlette.requests import ClientDisconnect

log = logging.getLogger("ledger")

R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Position = TypeVar("Position", int, str)


# ---------------------------------------------------------------------------- Settings
# What the operator may choose. Read once, when the application is created.


class StartRefused(Exception):
    """The program cannot start or go on; the message is one line for the operator."""


@dataclass(frozen=True)
class Settings:
    """What the environment says; a command line flag wins over it."""

    database_url: str = "sqlite:///ledger.db"

    @classmethod
    def read(cls, environment: Mapping[str, str], *, database_url: str | None = None) -> "Settings":
        """Return the settings; an empty value counts as none."""
        url = database_url or environment.get("LEDGER_DATABASE_URL")
        return cls(url or environment.get("DATABASE_URL") or cls.database_url)


def port_number(digits: str) -> int:
    """Return a TCP port, or raise StartRefused."""
    if not re.fullmatch("[0-9]{1,5}", digits) or int(digits) > 65_535:
        raise StartRefused(f"the port must be a number from 0 to 65535, not {digits!r}")
    return int(digits)


# ------------------------------------------------------------------------------- Money
# Money is an integer of minor units everywhere. These are the assets and the bounds.

AMOUNT_MAX = 10**15
BALANCE_MAX = 2**63 - 1


class AssetRule(NamedTuple):
    """An asset; a closed-loop one is moved by its own words only, never by the others."""

    code: str
    name: str
    exponent: int
    closed_loop: bool


ASSETS = {
    asset.code: asset
    for asset in (
        AssetRule("USD", "US Dollar", 2, closed_loop=False),
        AssetRule("EUR", "Euro", 2, closed_loop=False),
        AssetRule("GBP", "Pound Sterling", 2, closed_loop=False),
        AssetRule("JPY", "Yen", 0, closed_loop=False),
        AssetRule("GOLD", "Gold Coins", 4, closed_loop=True),
        AssetRule("DMND", "Diamonds", 4, closed_loop=True),
        AssetRule("PTS", "Loyalty Points", 4, closed_loop=True),
    )
}


# ------------------------------------------------------------------------------ Errors
# Every failure that a caller can see is one of these; one handler renders them all.


class Answer(NamedTuple):
    """What a command's caller gets, stored under the idempotency key byte for byte."""

    status: int
    body: str
    location: str | None = None
    replayed: bool = False


class LedgerError(Exception):
    """A refusal with a `status`, a `code` for programs and a sentence for people (RFC 9457)."""

    status: int
    code: str

    def __init_subclass__(cls, *, status: int) -> None:
        """Take the status as declared, and the code from the class's name."""
        cls.status = status
        cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.members = members

    def answer(self) -> Answer:
        """Return the problem as it is sent, and stored under a key."""
        problem = {
            "type": f"urn:ledger:error:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "detail": str(self),
            "code": self.code,
        }
        return Answer(self.status, json.dumps(problem | self.members, ensure_ascii=False))


# fmt: off
class MalformedJson(LedgerError, status=400): ...
class IdempotencyKeyMissing(LedgerError, status=400): ...
class IdempotencyKeyInvalid(LedgerError, status=400): ...
class SameAccount(LedgerError, status=400): ...
class InvalidCursor(LedgerError, status=400): ...
class Forbidden(LedgerError, status=403): ...
class NotFound(LedgerError, status=404): ...
class AccountNotFound(LedgerError, status=404): ...
class TransactionNotFound(LedgerError, status=404): ...
class AssetNotFound(LedgerError, status=404): ...
class MethodNotAllowed(LedgerError, status=405): ...
class InsufficientFunds(LedgerError, status=409): ...
class AccountFrozen(LedgerError, status=409): ...
class AccountClosed(LedgerError, status=409): ...
class AssetMismatch(LedgerError, status=409): ...
class AssetClosedLoop(LedgerError, status=409): ...
class BalanceLimit(LedgerError, status=409): ...
class IdempotencyKeyReused(LedgerError, status=409): ...
class BodyTooLarge(LedgerError, status=413): ...
class UnsupportedMediaType(LedgerError, status=415): ...
class InvalidRequest(LedgerError, status=422): ...
class InternalError(LedgerError, status=500): ...
class DatabaseBusy(LedgerError, status=503): ...
class DatabaseUnavailable(LedgerError, status=503): ...
class StorageFull(LedgerError, status=507): ...
# fmt: on


# ------------------------------------------------------------------------------ Tables
# What is stored. The constraints repeat the rules, so that a bug in one is caught by the
# other. Ids are text; times are integer microseconds since 1970 in UTC.

Integer64 = BigInteger().with_variant(Integer(), "sqlite")
STRICT = {"sqlite_strict": True}
CLUSTERED = STRICT | {"sqlite_with_rowid": False}


def text_column(**options: Any) -> Any:
    """Declare a text column that every engine takes as it is."""
    return sqlmodel.Field(sa_type=Text, **options)


def integer_column(**options: Any) -> Any:
    """Declare a 64-bit integer column."""
    return sqlmodel.Field(sa_type=Integer64, **options)


class Asset(SQLModel, table=True):
    """What is counted; the rows are those of ASSETS."""

    __tablename__ = "asset"
    __table_args__ = (STRICT,)

    code: str = text_column(primary_key=True)
    name: str = text_column()
    exponent: int = integer_column()
    closed_loop: int = integer_column()


class Account(SQLModel, table=True):
    """One balance of one asset; `name` is a dialect's own name for it."""

    __tablename__ = "account"
    __table_args__ = (
        UniqueConstraint("name", "asset"),
        Index("account_owner", "owner_name", "id"),
        CheckConstraint("kind IN ('CUSTOMER', 'SYSTEM')"),
        CheckConstraint("status IN ('ACTIVE', 'FROZEN', 'CLOSED')"),
        CheckConstraint("balance >= 0 OR kind = 'SYSTEM'"),
        CheckConstraint("balance = 0 OR status <> 'CLOSED'"),
        CheckConstraint("last_seq > 0 OR (last_seq = 0 AND balance = 0)"),
        STRICT,
    )

    id: str = text_column(primary_key=True)
    name: str | None = text_column(default=None)
    owner_name: str = text_column()
    asset: str = text_column(foreign_key="asset.code")
    kind: str = text_column(default="CUSTOMER")
    status: str = text_column(default="ACTIVE")
    balance: int = integer_column(default=0)
    last_seq: int = integer_column(default=0)
    created_at: int = integer_column()


class Transaction(SQLModel, table=True):
    """One event; its entries sum to zero."""

    __tablename__ = "transaction"
    __table_args__ = (CLUSTERED,)

    id: str = text_column(primary_key=True)
    kind: str = text_column()
    memo: str | None = text_column(default=None)
    ts: int = integer_column()


class Entry(SQLModel, table=True):
    """One line of one account, stored in the order of its statement."""

    __tablename__ = "entry"
    __table_args__ = (
        CheckConstraint("seq >= 1"),
        CheckConstraint("type IN ('DEBIT', 'CREDIT')"),
        CheckConstraint("amount >= 1"),
        CLUSTERED,
    )

    account_id: str = text_column(primary_key=True, foreign_key="account.id")
    seq: int = integer_column(primary_key=True)
    id: str = text_column()
    transaction_id: str = text_column(foreign_key="transaction.id", index=True)
    type: str = text_column()
    amount: int = integer_column()
    balance: int = integer_column()


class IdempotencyKey(SQLModel, table=True):
    """The answer that a key was given; `id` is `caller|operation|key`."""

    __tablename__ = "idempotency_key"
    __table_args__ = (STRICT,)

    id: str = text_column(primary_key=True)
    fingerprint: str = text_column()
    status: int = integer_column()
    body: str = text_column()
    location: str | None = text_column(default=None)
    ts: int = integer_column()


class AuditEvent(SQLModel, table=True):
    """Who did what, written in the same commit as the change itself."""

    __tablename__ = "audit_event"
    __table_args__ = (CLUSTERED,)

    id: str = text_column(primary_key=True)
    ts: int = integer_column()
    caller: str = text_column()
    action: str = text_column()
    account_id: str | None = text_column(default=None)
    transaction_id: str | None = text_column(default=None)
    details: str = text_column()


class SchemaVersion(SQLModel, table=True):
    """The version of the tables, in one row."""

    __tablename__ = "schema_version"
    __table_args__ = (STRICT,)

    version: int = integer_column(primary_key=True)


SCHEMA_VERSION = 1
TABLES = SQLModel.metadata.tables
ASSET, ACCOUNT, TRANSACTION = TABLES["asset"], TABLES["account"], TABLES["transaction"]
ENTRY, KEY, AUDIT = TABLES["entry"], TABLES["idempotency_key"], TABLES["audit_event"]

# Invariants 2, 3, 5 and 7 in the database's own words: (name, event, condition, message).
TRIGGERS = [
    (
        "entry_follows",
        "BEFORE INSERT ON entry",
        # IS NOT, because a missing predecessor makes the right-hand side NULL.
        """NEW.balance IS NOT CASE NEW.type WHEN 'CREDIT' THEN NEW.amount ELSE -NEW.amount END
           + CASE NEW.seq WHEN 1 THEN 0 ELSE (SELECT balance FROM entry
             WHERE account_id = NEW.account_id AND seq = NEW.seq - 1) END""",
        "an entry must follow its predecessor in seq and balance",
    ),
    (
        "account_follows",
        "BEFORE UPDATE OF balance, last_seq ON account",
        """(NEW.last_seq, NEW.balance) <> (OLD.last_seq, OLD.balance)
           AND (NEW.last_seq, NEW.balance) IS NOT
           (SELECT seq, balance FROM entry WHERE account_id = NEW.id ORDER BY seq DESC LIMIT 1)""",
        "an account must stand where its last entry leaves it",
    ),
    (
        "account_empty",
        "BEFORE INSERT ON account",
        "(NEW.last_seq, NEW.balance) <> (0, 0)",
        "an account opens empty",
    ),
    (
        "account_state",
        "BEFORE UPDATE ON account",
        """OLD.status = 'CLOSED' AND NEW.status <> 'CLOSED' OR NEW.last_seq <> OLD.last_seq
           AND 'ACTIVE' NOT IN (OLD.status, NEW.status)""",
        "a closed account never comes back, and only an active one moves money",
    ),
    ("account_identity", "BEFORE UPDATE OF id, asset, kind ON account", "1", "it is for ever"),
    ("account_kept", "BEFORE DELETE ON account", "1", "accounts are never deleted"),
] + [
    (f"{table}_{name}", f'BEFORE {change} ON "{table}"', "1", f"a row of {table} is for ever")
    for table in ("asset", "entry", "transaction", "audit_event", "idempotency_key")
    for name, change in (("kept", "DELETE"), ("unchanged", "UPDATE"))
]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@lru_cache(maxsize=10_000)
def utc_text(microseconds: int) -> str:
    """Return a stored time as RFC 3339: 0 is "1970-01-01T00:00:00.000000Z"."""
    moment = EPOCH + timedelta(microseconds=microseconds)
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


def utc_now() -> int:
    """Return the time as it is stored: microseconds since 1970 in UTC."""
    return time.time_ns() // 1_000


def id_source(after: str | None = None) -> Callable[[int], str]:
    """Return a function from a time to a new version 7 UUID (RFC 9562), rising at every call.

    The first 60 bits, milliseconds and a fraction, never repeat within a source, and come
    behind those of `after`; the other 62 are random, and drawn once for a source.
    """
    last = int(after[:8] + after[9:13] + after[15:18], 16) if after else 0
    tail = f"{2 << 62 | secrets.randbits(62):016x}"

    def new_id(now: int) -> str:
        nonlocal last
        last = max(last + 1, (now << 12) // 1_000)
        head = f"{last:015x}"
        return f"{head[:8]}-{head[8:12]}-7{head[12:]}-{tail[:4]}-{tail[4:]}"

    return new_id


# ---------------------------------------------------------------------------- Database
# How the database is opened, and how a read and a write begin and end. Nothing else may
# begin, commit or roll back.


class Database:
    """One SQLite file: a single connection that writes, and a few that only read."""

    def __init__(self, url: str) -> None:
        self.path = sqlite_path(url)
        self.writer = sqlite_engine(url, "BEGIN IMMEDIATE", pool_size=1, pragmas=WRITER_PRAGMAS)
        self.reader = sqlite_engine(url, "BEGIN", pool_size=4, pragmas=READER_PRAGMAS)
        self.identity: tuple[int, int] | None = None

    def open(self, *, make: bool) -> None:
        """Accept a ledger of this version; where there is none yet, make one if `make` is set."""
        try:
            # Looking first through a connection that only reads leaves a stranger's file alone.
            with self.begin(self.reader) as connection:
                if not holds_ledger(connection) and not make:
                    raise StartRefused(f"there is no ledger at {self.path}")
            if make:
                patiently(self._complete)
        except LedgerError as error:
            raise StartRefused(f"cannot open {self.path}: {error.__cause__ or error}") from error
        self.identity = file_identity(self.path)

    @contextmanager
    def begin(self, engine: Engine) -> Iterator[Connection]:
        """Do one read or one write; raise the ledger's own errors for the database's."""
        if self.identity and file_identity(self.path) != self.identity:
            # The open connection would go on writing into the file that is gone.
            raise DatabaseUnavailable("The database file was moved or replaced: restart the server")
        try:
            with engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            refusal = named_error(error.orig)
            if not isinstance(refusal, DatabaseBusy):
                log.error("the database refused: %s", error.orig)
            raise refusal from error.orig

    def close(self) -> None:
        """Close every connection; the next use opens new ones."""
        self.writer.dispose()
        self.reader.dispose()

    def _complete(self) -> None:
        with self.begin(self.writer) as connection:
            if not holds_ledger(connection):
                create_schema(connection)
            add_missing_rows(connection)


BUSY_SECONDS_MAX = 5.0
BUSY_RETRY_SECONDS = 0.001

# The event loop may not wait inside SQLite, so the writer asks for the lock only once.
WRITER_PRAGMAS = (
    "busy_timeout = 0",
    "journal_mode = WAL",
    "synchronous = FULL",
    "foreign_keys = ON",
    "recursive_triggers = ON",
    "cache_size = -12288",
    "wal_autocheckpoint = 8000",
)
READER_PRAGMAS = ("busy_timeout = 1000", "query_only = ON", "cache_size = -1024")


def sqlite_engine(url: str, begin: str, *, pool_size: int, pragmas: Sequence[str]) -> Engine:
    """Return an engine whose transactions begin with the statement `begin`."""
    engine = create_engine(
        url,
        paramstyle="named",
        pool_size=pool_size,
        max_overflow=0,
        connect_args={"check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None
        for pragma in pragmas:
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def sqlite_path(url: str) -> Path:
    """Return the file that a database URL names, or raise StartRefused."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise StartRefused("the database URL must look like sqlite:///ledger.db") from None
    name = parsed.database or ""
    if parsed != URL.create("sqlite", database=name) or re.match(":memory:|file:|.*\0|$", name):
        raise StartRefused("the database must be a plain file, such as sqlite:///ledger.db")
    return Path(name).absolute()


def file_identity(path: Path) -> tuple[int, int]:
    """Return what tells a file from another one that takes its name."""
    try:
        status = path.stat()
    except OSError:
        return (0, 0)
    return (status.st_dev, status.st_ino)


def named_error(error: BaseException | None) -> LedgerError:
    """Return the ledger's error for one of SQLite's."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return DatabaseBusy("The database is in use: try again")
    if code == sqlite3.SQLITE_FULL:
        return StorageFull("The disk is full, and nothing was done")
    return DatabaseUnavailable("The database does not do this now: try again")


def patiently(action: Callable[[], R]) -> R:
    """Repeat an action that finds the database busy, for some seconds, outside the event loop."""
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    while True:
        try:
            return action()
        except DatabaseBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(BUSY_RETRY_SECONDS)


def holds_ledger(connection: Connection) -> bool:
    """Tell a ledger of this version from a new file, and raise StartRefused for all else."""
    tables = set(connection.exec_driver_sql("SELECT name FROM sqlite_schema").scalars())
    if tables and not tables.issuperset(TABLES):
        raise StartRefused("the database holds something other than a ledger")
    if tables:
        version = connection.execute(select(TABLES["schema_version"])).scalar()
        if version != SCHEMA_VERSION:
            raise StartRefused(f"schema version {version} is not {SCHEMA_VERSION}, the known one")
    return bool(tables)


def create_schema(connection: Connection) -> None:
    """Make the tables and the triggers of a new ledger."""
    SQLModel.metadata.create_all(connection)
    for name, moment, condition, message in TRIGGERS:
        connection.exec_driver_sql(
            f"CREATE TRIGGER {name} {moment} WHEN {condition} "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
        )
    connection.execute(insert(TABLES["schema_version"]).values(version=SCHEMA_VERSION))


def add_missing_rows(connection: Connection) -> None:
    """Add the assets and the system accounts that the ledger does not have yet."""
    known = set(connection.execute(select(ASSET.c.code)).scalars())
    for asset in ASSETS.values():
        if asset.code not in known:
            connection.execute(insert(ASSET).values(asset._asdict()))
    now, new_id = utc_now(), id_source()
    for name, code in SYSTEM_ACCOUNTS - held_system_accounts(connection):
        account = LoadedAccount(new_id(now), "system", code, now, name=name, kind="SYSTEM")
        connection.execute(insert(ACCOUNT).values(asdict(account)))


def held_system_accounts(connection: Connection) -> set[tuple[str, str]]:
    """Return the name and the asset of each system account that there is."""
    columns = select(ACCOUNT.c.name, ACCOUNT.c.asset)
    rows = connection.execute(columns.where(ACCOUNT.c.kind == "SYSTEM"))
    return {(row.name, row.asset) for row in rows}


# ---------------------------------------------------------------------------- The rule
# The one place where money moves. It knows accounts, legs and rows; no caller, no URL.


@dataclass(slots=True)
class LoadedAccount:
    """An account as the open batch holds it, named as in the table."""

    id: str
    owner_name: str
    asset: str
    created_at: int
    name: str | None = None
    kind: str = "CUSTOMER"
    status: str = "ACTIVE"
    balance: int = 0
    last_seq: int = 0


class Leg(NamedTuple):
    """A requested entry: a positive amount is a CREDIT, a negative one a DEBIT."""

    account: LoadedAccount
    amount: int


class Unbalanced(Exception):
    """The legs of a word do not sum to zero: a defect of the program, never of a request."""


class Book:
    """The open batch: the accounts that it has loaded, and the rows that it will write."""

    def __init__(self, accounts: Sequence[LoadedAccount], now: int, new_id: Callable[[int], str]):
        self.now = now
        self.rows: defaultdict[Table, list[dict[str, Any]]] = defaultdict(list)
        self.changed: dict[str, LoadedAccount] = {}
        self.last_opened_id: str | None = None
        self.last_transaction_id: str | None = None
        self._new_id = new_id
        self._customers = {a.id: a for a in accounts if a.kind == "CUSTOMER"}
        self._system = {(a.name, a.asset): a for a in accounts if a.kind == "SYSTEM"}

    def account(self, account_id: str) -> LoadedAccount:
        """Return a customer's account; a system account cannot be named by a request."""
        try:
            return self._customers[account_id]
        except KeyError:
            raise AccountNotFound(f"There is no account {account_id}") from None

    def system_account(self, name: str, asset: str) -> LoadedAccount:
        """Return the outside world's side of an event in an asset."""
        return self._system[name, asset]

    def open(self, owner_name: str, asset: str) -> LoadedAccount:
        """Add an empty account of one asset."""
        account = LoadedAccount(self.new_id(), owner_name, asset, self.now)
        self.last_opened_id = account.id
        self._customers[account.id] = account
        self.rows[ACCOUNT].append(asdict(account))
        return account

    def post(self, kind: str, legs: Sequence[Leg], memo: str | None) -> str:
        """Turn legs into entries, move the balances, and return the transaction's id.

        Amounts are minor units. Raises AssetMismatch, AccountFrozen, AccountClosed,
        InsufficientFunds or BalanceLimit before anything has changed.
        """
        require_balanced(legs)
        for leg in legs:
            require_active(leg.account)
        for leg in legs:
            require_funds(leg)
        # Every check stands above this line; below it nothing may fail.
        transaction_id = self.last_transaction_id = self.new_id()
        self.rows[TRANSACTION].append(
            {"id": transaction_id, "kind": kind, "memo": memo, "ts": self.now}
        )
        for account, amount in legs:
            account.balance += amount
            account.last_seq += 1
            self.changed[account.id] = account
            self.rows[ENTRY].append(
                {
                    "account_id": account.id,
                    "seq": account.last_seq,
                    "id": self.new_id(),
                    "transaction_id": transaction_id,
                    "type": "CREDIT" if amount > 0 else "DEBIT",
                    "amount": abs(amount),
                    "balance": account.balance,
                }
            )
        return transaction_id

    def new_id(self) -> str:
        """Return an id that sorts behind all earlier ones."""
        return self._new_id(self.now)


SYSTEM_ACCOUNTS = {("cash", code) for code, asset in ASSETS.items() if not asset.closed_loop}
ACCOUNT_COLUMNS = [field.name for field in fields(LoadedAccount)]


def require_balanced(legs: Sequence[Leg]) -> None:
    """Refuse legs of several assets, and a word whose legs are not a transaction."""
    if len({account.asset for account, _ in legs}) > 1:
        raise AssetMismatch("The accounts hold different assets")
    distinct = len({account.id for account, _ in legs}) == len(legs) >= 2
    if (
        not distinct
        or sum(amount for _, amount in legs) != 0
        or 0 in (amount for _, amount in legs)
    ):
        raise Unbalanced(legs)


def require_open_loop(asset: str) -> None:
    """Refuse an asset that only its own words may move."""
    if ASSETS[asset].closed_loop:
        raise AssetClosedLoop(f"{asset} is moved by top-up, bonus and spend alone")


def require_active(account: LoadedAccount) -> None:
    """Refuse an account that moves no money."""
    if account.status == "FROZEN":
        raise AccountFrozen(f"Account {account.id} is frozen")
    if account.status == "CLOSED":
        raise AccountClosed(f"Account {account.id} is closed")


def require_funds(leg: Leg) -> None:
    """Refuse a leg that would take a customer below zero, or any balance out of 64 bits."""
    account, amount = leg
    balance = account.balance + amount
    if balance < 0 and account.kind == "CUSTOMER":
        raise InsufficientFunds(
            f"Account {account.id} holds {account.balance}, and {-amount} is needed",
            balance=account.balance,
            requested=-amount,
        )
    if abs(balance) > BALANCE_MAX:
        raise BalanceLimit(f"A balance may not leave the range of {BALANCE_MAX} minor units")


# --------------------------------------------------------------------------- The batch
# Group commit. Whatever arrives while the last commit was on its way to the disk is
# written and committed together; only then is anybody answered. Idempotency lives here.


@dataclass(frozen=True, slots=True)
class Command:
    """What one caller wants done, once."""

    caller: str
    operation: str
    """The method and the route's template, as in "POST /transfers"."""
    key: str | None
    arguments: str
    """The parsed arguments as JSON: two requests that mean the same have the same."""
    account_ids: Sequence[str]
    word: "Word"
    run: Callable[[Book], Answer]

    @property
    def stored_key(self) -> str | None:
        """Return the key as it is stored; a caller's own `|` is escaped, so none can collide."""
        if self.key is None:
            return None
        caller = self.caller.replace("%", "%25").replace("|", "%7C")
        return f"{caller}|{self.operation}|{self.key}"

    @property
    def fingerprint(self) -> str:
        """Return what tells other arguments from the same."""
        return hashlib.sha256(self.arguments.encode()).hexdigest()


Outcome = Answer | Exception


class Pending(NamedTuple):
    """A command that waits for its batch, and the caller who waits for its answer."""

    command: Command
    answer: "asyncio.Future[Answer]"
    deadline: float


class Ledger:
    """The commands that wait, and the one function that commits them."""

    def __init__(self, database: Database, clock: Callable[[], int] = utc_now) -> None:
        self.database = database
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[asyncio.AbstractEventLoop, list[Pending]] = {}
        self._statements = Statements(database.writer)
        with self.read() as connection:
            # The clock may have gone back since the last start, and new ids must still be last.
            self._new_id = id_source(connection.execute(select(func.max(AUDIT.c.id))).scalar())

    async def submit(self, command: Command) -> Answer:
        """Have a command done in the next batch; return its answer after the commit."""
        loop = asyncio.get_running_loop()
        pending = Pending(command, loop.create_future(), loop.time() + BUSY_SECONDS_MAX)
        waiting = self._pending.setdefault(loop, [])
        waiting.append(pending)
        if len(waiting) == 1:
            # One turn later, so that all that this turn of the loop reads joins the batch.
            loop.call_soon(loop.call_soon, self._flush, loop)
        return await pending.answer

    def settle(self, commands: Sequence[Command]) -> list[Outcome]:
        """Commit a batch; if the database refuses it, commit each command of it alone."""
        try:
            return list(self.commit(commands))
        except Exception as error:
            if len(commands) == 1 or isinstance(error, DatabaseBusy):
                return [error] * len(commands)
            log.warning("a batch of %d was refused, each is tried alone: %r", len(commands), error)
            return [outcome for command in commands for outcome in self.settle([command])]

    def commit(self, commands: Sequence[Command]) -> Sequence[Answer]:
        """Do all commands in one write and return their answers; raise, with nothing done."""
        with self._lock, self.database.begin(self.database.writer) as connection:
            accounts = self._statements.load_accounts(connection, commands)
            known = self._statements.load_answers(connection, commands)
            book = Book(accounts, self._clock(), self._new_id)
            answers = [perform(command, book, known) for command in commands]
            self._statements.save(connection, book)
        return answers

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open one consistent view of what is committed."""
        with self.database.begin(self.database.reader) as connection:
            yield connection

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        batch = self._pending.pop(loop)
        outcomes = self.settle([pending.command for pending in batch])
        busy = []
        for pending, outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, DatabaseBusy) and loop.time() < pending.deadline:
                busy.append(pending)
            elif pending.answer.done():
                pass  # The caller has gone; what was done stays done.
            elif isinstance(outcome, Exception):
                pending.answer.set_exception(outcome.with_traceback(None))
            else:
                pending.answer.set_result(outcome)
        if busy:
            self._pending[loop] = busy
            loop.call_later(BUSY_RETRY_SECONDS, self._flush, loop)


Known = dict[str, tuple[str, Answer]]
"""Stored keys, each with the fingerprint of the arguments and the answer that was given."""


def perform(command: Command, book: Book, known: Known) -> Answer:
    """Do one command of a batch, or repeat the answer that its key was given before."""
    key, fingerprint = command.stored_key, command.fingerprint
    if key in known:
        return repeat(fingerprint, *known[key])
    book.last_opened_id = book.last_transaction_id = None
    try:
        answer = command.run(book)
        record(command, book)
    except LedgerError as error:
        answer = error.answer()
    if key is not None:
        known[key] = (fingerprint, answer)
        row = {"id": key, "fingerprint": fingerprint, "ts": book.now}
        stored = {"status": answer.status, "body": answer.body, "location": answer.location}
        book.rows[KEY].append(row | stored)
    return answer


def repeat(fingerprint: str, known_fingerprint: str, answer: Answer) -> Answer:
    """Return a stored answer once more, or refuse a key that was used for something else."""
    if fingerprint == known_fingerprint:
        return answer._replace(replayed=True)
    return IdempotencyKeyReused("This key was used with other arguments: use a new one").answer()


def record(command: Command, book: Book) -> None:
    """Add the audit event of a command that succeeded."""
    book.rows[AUDIT].append(
        {
            "id": book.new_id(),
            "ts": book.now,
            "caller": command.caller,
            "action": command.word.name,
            "account_id": next(iter(command.account_ids), book.last_opened_id),
            "transaction_id": book.last_transaction_id,
            "details": command.arguments,
        }
    )


class Statements:
    """A batch's statements as text, made once: making them costs more than running them."""

    def __init__(self, engine: Engine) -> None:
        def compiled(statement: ClauseElement) -> str:
            return str(statement.compile(dialect=engine.dialect))

        balance: dict[str, Any] = {
            name: bindparam(name) for name in ("status", "balance", "last_seq")
        }
        this_one = ACCOUNT.c.id == bindparam("account_id")
        self._load_accounts = compiled(accounts_of_a_batch())
        self._load_answers = compiled(select(KEY).where(KEY.c.id.in_(json_list("keys"))))
        self._insert = {table: compiled(insert(table)) for table in BATCH_TABLES}
        self._update_account = compiled(update(ACCOUNT).where(this_one).values(balance))

    def load_accounts(
        self, connection: Connection, commands: Sequence[Command]
    ) -> list[LoadedAccount]:
        """Lock and load what the commands name, in ascending order of id."""
        ids = {account_id for command in commands for account_id in command.account_ids}
        names = {command.word.system_account for command in commands} - {None}
        parameters = {"ids": json.dumps(list(ids)), "system_names": json.dumps(list(names))}
        rows = connection.exec_driver_sql(self._load_accounts, parameters)
        return [LoadedAccount(*row) for row in rows]

    def load_answers(self, connection: Connection, commands: Sequence[Command]) -> Known:
        """Return what the keys of the commands were answered before."""
        keys = [command.stored_key for command in commands if command.key is not None]
        rows = connection.exec_driver_sql(self._load_answers, {"keys": json.dumps(keys)})
        return {
            row.id: (row.fingerprint, Answer(row.status, row.body, row.location)) for row in rows
        }

    def save(self, connection: Connection, book: Book) -> None:
        """Write what the book has gathered, in the order that the triggers and keys require."""
        for table in BATCH_TABLES:
            if rows := book.rows[table]:
                connection.exec_driver_sql(self._insert[table], rows)
        if book.changed:
            columns = ("status", "balance", "last_seq")
            rows = [
                {"account_id": account.id} | {name: getattr(account, name) for name in columns}
                for account in book.changed.values()
            ]
            connection.exec_driver_sql(self._update_account, rows)


BATCH_TABLES = (ACCOUNT, TRANSACTION, ENTRY, KEY, AUDIT)


def json_list(name: str) -> Select[Any]:
    """Return the values of a list that is bound as JSON, so that its length leaves the text be."""
    return select(func.json_each(bindparam(name)).table_valued("value").c.value)


def accounts_of_a_batch() -> Select[Any]:
    """Select the named accounts, and the system accounts of their assets by name."""
    other = ACCOUNT.alias("other")
    assets = select(other.c.asset).where(other.c.id.in_(json_list("ids")))
    system = and_(ACCOUNT.c.name.in_(json_list("system_names")), ACCOUNT.c.asset.in_(assets))
    columns = (ACCOUNT.c[name] for name in ACCOUNT_COLUMNS)
    named = ACCOUNT.c.id.in_(json_list("ids"))
    return select(*columns).where(or_(named, system)).order_by(ACCOUNT.c.id).with_for_update()


# --------------------------------------------------------------------------- The words
# What can happen to money, each as bookkeeping over one post. A word knows no URL, no
# dialect and no caller.


class Word(NamedTuple):
    """What a word is called in the audit log, and the system account on its other side."""

    name: str
    system_account: str | None


WORDS: dict[Callable[..., Any], Word] = {}


def word(*, system_account: str | None = None) -> Callable[[F], F]:
    """Make a function of a book a word, and declare the system account that it uses."""

    def declare(function: F) -> F:
        WORDS[function] = Word(function.__name__, system_account)
        return function

    return declare


@word()
def open_account(book: Book, *, owner_name: str, asset: str) -> LoadedAccount:
    """Open an empty account for a customer."""
    if asset not in ASSETS:
        raise AssetNotFound(f"There is no such asset; there are {', '.join(ASSETS)}")
    require_open_loop(asset)
    return book.open(owner_name, asset)


@word(system_account="cash")
def deposit(book: Book, account_id: str, *, amount: int, memo: str | None) -> LoadedAccount:
    """Take money in: DEBIT cash, CREDIT the account."""
    account = book.account(account_id)
    require_open_loop(account.asset)
    cash = book.system_account("cash", account.asset)
    book.post("DEPOSIT", [Leg(cash, -amount), Leg(account, +amount)], memo)
    return account


@word(system_account="cash")
def withdraw(book: Book, account_id: str, *, amount: int, memo: str | None) -> LoadedAccount:
    """Pay money out: DEBIT the account, CREDIT cash."""
    account = book.account(account_id)
    require_open_loop(account.asset)
    cash = book.system_account("cash", account.asset)
    book.post("WITHDRAWAL", [Leg(account, -amount), Leg(cash, +amount)], memo)
    return account


class Transfer(NamedTuple):
    """A posted transfer, and both accounts after it."""

    transfer_id: str
    amount: int
    asset: str
    memo: str | None
    ts: int
    source: LoadedAccount
    dest: LoadedAccount


@word()
def transfer(
    book: Book, *, source_id: str, dest_id: str, amount: int, memo: str | None
) -> Transfer:
    """Move money between two customers: DEBIT the source, CREDIT the destination."""
    if source_id == dest_id:
        raise SameAccount("Cannot transfer to the same account")
    source, dest = book.account(source_id), book.account(dest_id)
    require_open_loop(source.asset)
    transaction_id = book.post("TRANSFER", [Leg(source, -amount), Leg(dest, +amount)], memo)
    return Transfer(transaction_id, amount, source.asset, memo, book.now, source, dest)


# ----------------------------------------------------------------------------- Reading
# What is asked of committed rows, and the check of every invariant. Nothing here writes.

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 200


def read_account(connection: Connection, account_id: str) -> Row[Any]:
    """Return an account of any kind."""
    row = connection.execute(select(ACCOUNT).where(ACCOUNT.c.id == account_id)).first()
    if row is None:
        raise AccountNotFound(f"There is no account {account_id}")
    return row


def read_transaction(connection: Connection, transaction_id: str) -> Row[Any]:
    """Return a transaction without its entries."""
    found = TRANSACTION.c.id == transaction_id
    row = connection.execute(select(TRANSACTION).where(found)).first()
    if row is None:
        raise TransactionNotFound(f"There is no transaction {transaction_id}")
    return row


def read_entries(connection: Connection, transaction_id: str) -> Sequence[Row[Any]]:
    """Return a transaction's entries in the order of its legs."""
    found = ENTRY.c.transaction_id == transaction_id
    return connection.execute(ENTRIES.where(found).order_by(ENTRY.c.id)).all()


def read_statement(
    connection: Connection, account_id: str, *, before_seq: int, limit: int
) -> Sequence[Row[Any]]:
    """Return an account's entries before a place in it, newest first."""
    earlier = and_(ENTRY.c.account_id == account_id, ENTRY.c.seq < before_seq)
    return connection.execute(
        ENTRIES.where(earlier).order_by(ENTRY.c.seq.desc()).limit(limit)
    ).all()


def read_customer_accounts(
    connection: Connection, *, after_id: str, limit: int, wanted: Mapping[str, str | None]
) -> Sequence[Row[Any]]:
    """Return customers' accounts behind an id, oldest first, where every wanted column fits."""
    fits = [ACCOUNT.c[name] == value for name, value in wanted.items() if value is not None]
    listed = and_(ACCOUNT.c.kind == "CUSTOMER", ACCOUNT.c.id > after_id, *fits)
    return connection.execute(
        select(ACCOUNT).where(listed).order_by(ACCOUNT.c.id).limit(limit)
    ).all()


ENTRIES = select(
    ENTRY, TRANSACTION.c.ts, TRANSACTION.c.memo.label("ref"), TRANSACTION.c.kind
).join_from(ENTRY, TRANSACTION)


class Finding(NamedTuple):
    """What one check looked at, and the first row that is wrong, if there is one."""

    invariant: str
    row_count: int
    wrong: str | None


def check(connection: Connection) -> Iterator[Finding]:
    """Verify every invariant that stored rows can show, each over all rows."""
    yield check_storage(connection)
    yield check_transactions(connection)
    yield check_accounts(connection)
    yield check_audit(connection)
    yield check_schema(connection)


def check_storage(connection: Connection) -> Finding:
    """Verify the file, the constraints and the references, in the engine's own way."""
    damage = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
    wrong = None if damage == "ok" else str(damage)
    lost = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
    if lost is not None:
        wrong = f"table {lost[0]}: a row refers to a missing row of {lost[2]}"
    return Finding("pages, constraints and references are sound", len(TABLES), wrong)


def check_transactions(connection: Connection) -> Finding:
    """Verify that every transaction has entries, and that they sum to zero per asset."""
    rows = connection.execute(
        select(TRANSACTION.c.id, ENTRY.c.type, ENTRY.c.amount, ACCOUNT.c.asset)
        .outerjoin_from(TRANSACTION, ENTRY)
        .outerjoin(ACCOUNT)
        .order_by(TRANSACTION.c.id)
        .execution_options(yield_per=1_000)
    )
    count, wrong = 0, None
    for transaction_id, lines in groupby(rows, key=lambda row: row.id):
        count += 1
        totals: defaultdict[str, int] = defaultdict(int)
        for line in lines:
            if line.amount is not None:
                totals[line.asset] += signed(line.type, line.amount)
        if wrong is None and (any(totals.values()) or not totals):
            wrong = f"transaction {transaction_id} sums to {dict(totals) or 'nothing'}"
    return Finding("every transaction sums to zero", count, wrong)


def check_accounts(connection: Connection) -> Finding:
    """Verify every account's entries, their numbers and balances, and what they leave it with."""
    rows = connection.execute(
        select(ACCOUNT, ENTRY.c.seq, ENTRY.c.type, ENTRY.c.amount, ENTRY.c.balance.label("after"))
        .outerjoin_from(ACCOUNT, ENTRY)
        .order_by(ACCOUNT.c.id, ENTRY.c.seq)
        .execution_options(yield_per=1_000)
    )
    count, wrong = 0, None
    for account_id, lines in groupby(rows, key=lambda row: row.id):
        count += 1
        found = wrong_in_account(lines)
        if found and not wrong:
            wrong = f"account {account_id}: {found}"
    return Finding("entries are numbered 1, 2, 3 ... and add up to balances", count, wrong)


def wrong_in_account(lines: Iterable[Row[Any]]) -> str | None:
    """Return what is wrong with an account, given in one row for each of its entries."""
    seq, balance = 0, 0
    for row in lines:
        if row.seq is not None:
            seq, balance = seq + 1, balance + signed(row.type, row.amount)
            if (row.seq, row.after) != (seq, balance):
                expected = f"entry {seq} with balance {balance} should be"
                return f"entry {row.seq} with balance {row.after} stands where {expected}"
        if balance < 0 and row.kind == "CUSTOMER":
            return f"entry {seq} leaves a customer below zero, at {balance}"
    if (row.last_seq, row.balance) != (seq, balance):
        stored = f"its row says {row.last_seq} entries and balance {row.balance}"
        return f"{stored}, its entries say {seq} and {balance}"
    if balance and row.status == "CLOSED":
        return f"it is closed and holds {balance}"
    return None


def check_schema(connection: Connection) -> Finding:
    """Verify tables, constraints and triggers: they are what keeps written rows as they are."""
    query = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"
    found = {tuple(row) for row in connection.exec_driver_sql(query)}
    with create_engine("sqlite://").begin() as fresh:
        create_schema(fresh)
        expected = {tuple(row) for row in fresh.exec_driver_sql(query)}
    differing = sorted(name for name, _ in found ^ expected)
    wrong = f"{differing[0]} is not as it was made" if differing else None
    return Finding("tables, constraints and triggers are as they were made", len(expected), wrong)


def check_audit(connection: Connection) -> Finding:
    """Verify that every transaction has its audit event, and every system account its place."""
    recorded = select(AUDIT.c.transaction_id).where(AUDIT.c.transaction_id.is_not(None))
    lost = select(TRANSACTION.c.id).where(TRANSACTION.c.id.not_in(recorded)).limit(1)
    unrecorded = connection.execute(lost).scalar()
    strange = held_system_accounts(connection) - SYSTEM_ACCOUNTS
    wrong = f"transaction {unrecorded} has no audit event" if unrecorded else None
    wrong = f"{strange.pop()} is no system account" if strange else wrong
    count = connection.execute(select(func.count()).select_from(AUDIT)).scalar_one()
    return Finding("every transaction is in the audit log", count, wrong)


def signed(entry_type: str, amount: int) -> int:
    """Return what an entry adds to its account's balance."""
    return amount if entry_type == "CREDIT" else -amount


# ----------------------------------------------------------------------------- Callers
# Who is asking. In open mode everybody on this machine is the caller `local`.


def caller_of(request: Request) -> str:
    """Return the caller's name, or raise Forbidden for whoever is not on this machine."""
    forwarded = (b"forwarded", b"x-forwarded-")
    if any(name.startswith(forwarded) for name, _ in request.headers.raw):
        raise Forbidden("In open mode no proxy may stand in front of the ledger")
    if not is_loopback(request.client.host if request.client else ""):
        raise Forbidden("In open mode only callers on this machine are served")
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or not is_local_host(hosts[0]):
        raise Forbidden("In open mode the Host must be this machine's own name")
    return "local"


@lru_cache(maxsize=1_000)
def is_loopback(peer: str) -> bool:
    """Tell whether a peer is on this machine; a test client's peer cannot come over a network."""
    if peer == "testclient":
        return True
    try:
        address = ipaddress.ip_address(peer)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


@lru_cache(maxsize=1_000)
def is_local_host(host: str) -> bool:
    """Tell whether a Host header names this machine, as a page of another site cannot make it."""
    parts = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]*)?", host.lower())
    name = parts and (parts[1] or parts[2])
    return name in ("localhost", "testserver") or is_loopback(name or "")


# ------------------------------------------------------------------------------- Faces
# What all faces share: how a request is let in, how a typed function becomes a route, and
# how answers, errors and pages look. No face knows another.

BODY_BYTES_MAX = 65_536
BODY_SECONDS_MAX = 5.0
KeyRule = Literal["required", "optional", "none"]


class LedgerRequest(Request):
    """A request that was let in: its caller is known, its key and its body are well-formed."""

    caller: str
    key: str | None
    content: bytes
    document: Any

    async def body(self) -> bytes:
        """Return the body that was read."""
        return self.content

    async def json(self) -> Any:
        """Return the document that was parsed strictly."""
        return self.document


class LedgerRoute(APIRoute):
    """A route that asks who is calling, then for the key, the body and the schema."""

    def __init__(self, *args: Any, key_rule: KeyRule, **options: Any) -> None:
        self.key_rule = key_rule
        super().__init__(*args, **options)
        # Python's $ also matches before a last newline, so "/accounts%0A" would be served.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind the checks that come before it."""
        handle = super().get_route_handler()

        async def let_in(request: Request) -> Response:
            admitted = LedgerRequest(request.scope, request.receive)
            admitted.caller = caller_of(request)
            admitted.key = read_key(request, self.key_rule)
            if self.body_field:
                require_json(request)
                admitted.content = await read_body(request)
                admitted.document = parse_json(admitted.content)
            return await handle(admitted)

        return let_in


def read_key(request: Request, rule: KeyRule) -> str | None:
    """Return the Idempotency-Key, bare or without its quotes, or raise what is wrong with it."""
    if rule == "none":
        return None
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        if rule == "required":
            raise IdempotencyKeyMissing("The header Idempotency-Key is required here")
        return None
    quoted = re.fullmatch(r'[ \t]*(?:"([!#-~]{1,255})"|((?!")[!-~]{1,255}))[ \t]*', keys[0])
    if quoted is None or len(keys) > 1:
        raise IdempotencyKeyInvalid(
            "The Idempotency-Key must be given once, as 1 to 255 visible ASCII characters"
        )
    return quoted[1] or quoted[2]


def require_json(request: Request) -> None:
    """Refuse a body that is not declared to be JSON; a page of another site cannot declare it."""
    declared = request.headers.get("content-type", "").partition(";")[0].strip(" \t")
    if not re.fullmatch(r"application/([\w!#$&.^-]+\+)?json", declared, re.ASCII | re.IGNORECASE):
        raise UnsupportedMediaType("The Content-Type must be application/json")


async def read_body(request: Request) -> bytes:
    """Return the body, or raise BodyTooLarge without reading on."""
    if "upgrade" in request.headers:
        # The HTTP parser drops such a body, and takes what follows for the next request.
        raise MalformedJson("This server stays with HTTP/1.1: send no Upgrade with a body")
    declared, body = request.headers.get("content-length", ""), bytearray()
    if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
        raise BodyTooLarge(f"The body may have at most {BODY_BYTES_MAX} bytes")
    try:
        async with asyncio.timeout(BODY_SECONDS_MAX):
            async for chunk in request.stream():
                body += chunk
                if len(body) > BODY_BYTES_MAX:
                    raise BodyTooLarge(f"The body may have at most {BODY_BYTES_MAX} bytes")
    except (ClientDisconnect, TimeoutError):
        raise MalformedJson("The body did not arrive as a whole") from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Return the document of an RFC 8259 body in UTF-8, without anything ambiguous in it."""
    try:
        text = body.decode()
        document = JSON.decode(text)
        if "\\u" in text:
            json.dumps(document, ensure_ascii=False).encode()
    except UnicodeError:
        raise MalformedJson("The body must be UTF-8, without lone surrogates") from None
    except RecursionError:
        raise MalformedJson("The body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"The body must be one JSON document: {error.msg}") from None
    except ValueError:
        raise MalformedJson("A number in the body has too many digits") from None
    return document


def unique_members(members: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's members, and refuse a name that stands twice."""
    unique = dict(members)
    if len(unique) != len(members):
        raise MalformedJson("A name stands twice in one object of the body")
    return unique


def refuse_constant(name: str) -> None:
    """Refuse NaN and the infinities, which Python would take."""
    raise MalformedJson(f"{name} is not JSON")


JSON = json.JSONDecoder(object_pairs_hook=unique_members, parse_constant=refuse_constant)


class NamesAccount:
    """Marks a typed argument whose value is the id of an account that a command loads."""


def require_printable(text: str) -> str:
    """Refuse control characters."""
    if re.search(r"[\x00-\x1f\x7f-\x9f]", text):
        raise PydanticCustomError("control_character", "Text should hold no control characters")
    return text


def require_not_blank(text: str) -> str:
    """Refuse text of nothing but white space."""
    if not text.strip():
        raise PydanticCustomError("blank", "Text should not be blank")
    return text


UUID_PATTERN = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"

Amount = Annotated[int, Field(strict=True, ge=1, le=AMOUNT_MAX, description="Minor units")]
Printable = Annotated[str, StringConstraints(max_length=200), AfterValidator(require_printable)]
Name = Annotated[Printable, AfterValidator(require_not_blank)]
Uuid = Annotated[str, StringConstraints(pattern=UUID_PATTERN)]
AccountId = Annotated[Uuid, NamesAccount]
Timestamp = Annotated[
    int,
    PlainSerializer(utc_text, return_type=str),
    WithJsonSchema({"type": "string", "format": "date-time"}),
]


class RequestBody(BaseModel):
    """What a caller sends; a field that is not known is refused, so that no typo is lost."""

    model_config = ConfigDict(extra="forbid")


class Public(BaseModel):
    """What a caller gets, made from a row or a loaded account."""

    model_config = ConfigDict(from_attributes=True)


class Page(BaseModel, Generic[T]):
    """A part of a list, and the cursor of the next part."""

    items: list[T]
    next_cursor: str | None


Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX)]
Cursor = Annotated[str | None, Query(description="The next_cursor of the page before")]


class Listing:
    """One list with its filters: it makes its cursors, and accepts no other list's.

    A cursor is a place in the list and a checksum over list, filters and place. There is no
    secret in it: it keeps mistakes out, and what it points to is checked like any input.
    """

    def __init__(self, *name_and_filters: str | None) -> None:
        self._scope = name_and_filters

    def position(self, cursor: str | None, start: Position) -> Position:
        """Return the place that a cursor points to, or `start` where there is none."""
        if cursor is None:
            return start
        place = cursor.rpartition(".")[0]
        number = isinstance(start, int)
        if cursor != self._cursor(place) or (number and not re.fullmatch("[0-9]{1,18}", place)):
            raise InvalidCursor("Invalid cursor")
        return type(start)(place)

    def page(self, rows: Sequence[Row[Any]], *, limit: int, place: str) -> dict[str, Any]:
        """Return `limit` rows, and a cursor to where the others begin, by the column `place`."""
        items = rows[:limit]
        more = len(rows) > limit
        return {
            "items": items,
            "next_cursor": self._cursor(str(getattr(items[-1], place))) if more else None,
        }

    def _cursor(self, place: str) -> str:
        scope = json.dumps([*self._scope, place])
        return f"{place}.{hashlib.sha256(scope.encode()).hexdigest()[:16]}"


class Face:
    """A set of routes that speak one dialect, each made from one typed function."""

    def __init__(self, name: str, prefix: str) -> None:
        self.name = name
        self.prefix = prefix
        self.routes: list[LedgerRoute] = []

    def command(
        self, path: str, does: Callable[..., Any], *, key: KeyRule = "optional", **options: Any
    ) -> Callable[[F], F]:
        """Make a function of the book a POST route, whose calls go through the batch.

        `location`, a template over the result such as "/accounts/{0.id}", adds that header.
        """
        status, location = options.get("status_code", 200), options.pop("location", "")
        operation = f"POST {self.prefix}{path}"

        def declare(function: F) -> F:
            named = named_accounts(function)

            async def endpoint(request: LedgerRequest, **arguments: Any) -> Response:
                def run(book: Book) -> Answer:
                    result = function(book, **arguments)
                    return Answer(status, result.model_dump_json(), location.format(result) or None)

                command = Command(
                    caller=request.caller,
                    operation=operation,
                    key=request.key,
                    arguments=to_json(arguments).decode(),
                    account_ids=named(arguments),
                    word=WORDS[does],
                    run=run,
                )
                return respond(await request.app.state.ledger.submit(command))

            self._add("POST", path, function, endpoint, key_rule=key, **options)
            return function

        return declare

    def read(self, path: str) -> Callable[[F], F]:
        """Make a function of a reading connection a GET route."""

        def declare(function: F) -> F:
            async def endpoint(request: LedgerRequest, **arguments: Any) -> Response:
                with request.app.state.ledger.read() as connection:
                    content = function(connection, **arguments).model_dump_json()
                return Response(content, media_type="application/json")

            self._add("GET", path, function, endpoint, key_rule="none")
            return function

        return declare

    def _add(
        self, method: str, path: str, function: Callable[..., Any], endpoint: Any, **options: Any
    ) -> None:
        signature = inspect.signature(function)
        request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
        typed = [p.replace(kind=request.kind) for p in list(signature.parameters.values())[1:]]
        endpoint.__signature__ = inspect.Signature([request, *typed])
        endpoint.__name__, endpoint.__doc__ = function.__name__, function.__doc__
        header = KEY_HEADER | {"required": options["key_rule"] == "required"}
        self.routes.append(
            LedgerRoute(
                self.prefix + path,
                endpoint,
                methods=[method],
                response_model=signature.return_annotation,
                tags=[self.name],
                responses=PROBLEMS,
                openapi_extra={"parameters": [header]} if options["key_rule"] != "none" else None,
                **options,
            )
        )


KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}


class Problem(BaseModel):
    """How every error looks (RFC 9457); some have more members that help."""

    type: str
    title: str
    status: int
    detail: str
    code: str


PROBLEM = {"application/problem+json": {"schema": Problem.model_json_schema()}}
PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"description": "A problem", "content": PROBLEM} for status in ("4XX", "5XX")
}


def named_accounts(function: Callable[..., Any]) -> Callable[[dict[str, Any]], list[str]]:
    """Return a function from a route's arguments to the ids of the accounts that they name."""
    direct, within = [], []
    for name, parameter in inspect.signature(function).parameters.items():
        if NamesAccount in get_args(parameter.annotation):
            direct.append(name)
        for member, field in getattr(parameter.annotation, "model_fields", {}).items():
            if NamesAccount in field.metadata:
                within.append((name, member))

    def named(arguments: dict[str, Any]) -> list[str]:
        inner = [getattr(arguments[name], member) for name, member in within]
        return [arguments[name] for name in direct] + inner

    return named


def respond(answer: Answer) -> Response:
    """Return an answer as a response; a refusal is a problem document."""
    media_type = "application/json" if answer.status < 400 else "application/problem+json"
    response = Response(answer.body, answer.status, media_type=media_type)
    if answer.location:
        response.headers["Location"] = answer.location
    if answer.replayed:
        response.headers["Idempotent-Replayed"] = "true"
    return response


async def refuse(request: Request, error: Exception) -> Response:
    """Answer with any error, in the one form that errors have."""
    refusal = refusal_of(request, error)
    response = respond(refusal.answer())
    if "upgrade" in request.headers:
        response.headers["Connection"] = "close"
    if refusal.status == 405:
        response.headers["Allow"] = ", ".join(sorted(allowed_methods(request)))
    if refusal.status == 503:
        response.headers["Retry-After"] = "1"
    return response


def allowed_methods(request: Request) -> set[str]:
    """Return what can be done at a request's path."""
    path, routes = request.scope["path"], request.app.routes
    return {m for route in routes if route.path_regex.match(path) for m in route.methods}


def refusal_of(request: Request, error: Exception) -> LedgerError:
    """Return the ledger's error for whatever was raised, its own or the framework's."""
    match error:
        case LedgerError():
            return error
        case RequestValidationError():
            return InvalidRequest("The request does not fit: see errors", errors=misfits(error))
        case FrameworkError(status_code=404):
            return NotFound("There is nothing at this address")
        case FrameworkError(status_code=405):
            return MethodNotAllowed(f"{request.method} is not possible here")
        case FrameworkError():
            return UnsupportedMediaType("The Content-Type must be application/json")
    return InternalError("The server made a mistake, and logged it")


def misfits(error: RequestValidationError) -> list[dict[str, str]]:
    """Return a pointer to each thing that does not fit its schema, and never its value."""
    return [
        {"pointer": json_pointer(found["loc"][1:]), "detail": found["msg"]}
        for found in error.errors()[:MISFITS_LISTED_MAX]
    ]


MISFITS_LISTED_MAX = 20


def json_pointer(location: Sequence[str | int]) -> str:
    """Return a place in a document as RFC 6901 writes it: ("a/b", 0) is "/a~1b/0"."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


# ------------------------------------------------------------------- The canonical API
# The ledger in its own words: integers of minor units, ids, times in UTC.

canonical = Face("ledger", prefix="")


class AccountPublic(Public):
    """An account and its balance in minor units; `name` is a dialect's own name for it."""

    id: str
    name: str | None
    owner_name: str
    asset: str
    status: str
    balance: int
    created_at: Timestamp


class TransferCreate(RequestBody):
    """A transfer between two accounts of one asset."""

    source_account_id: AccountId
    dest_account_id: AccountId
    amount: Amount
    memo: Printable | None = None


class TransferPublic(Public):
    """A transfer, which is a transaction, and both accounts after it."""

    transfer_id: str
    amount: int
    asset: str
    memo: str | None
    ts: Timestamp
    source: AccountPublic
    dest: AccountPublic


@canonical.command("/transfers", transfer, key="required")
def post_transfer(book: Book, body: TransferCreate) -> TransferPublic:
    """Move money between two customers' accounts, at once and as a whole."""
    source_id, dest_id = body.source_account_id, body.dest_account_id
    done = transfer(book, source_id=source_id, dest_id=dest_id, amount=body.amount, memo=body.memo)
    return TransferPublic.model_validate(done)


class CashCreate(RequestBody):
    """An amount that comes in or goes out."""

    amount: Amount
    memo: Printable | None = None


@canonical.command("/accounts/{account_id}/deposit", deposit, key="required")
def post_deposit(book: Book, account_id: AccountId, body: CashCreate) -> AccountPublic:
    """Take money in for an account."""
    account = deposit(book, account_id, amount=body.amount, memo=body.memo)
    return AccountPublic.model_validate(account)


@canonical.command("/accounts/{account_id}/withdraw", withdraw, key="required")
def post_withdrawal(book: Book, account_id: AccountId, body: CashCreate) -> AccountPublic:
    """Pay money out of an account."""
    account = withdraw(book, account_id, amount=body.amount, memo=body.memo)
    return AccountPublic.model_validate(account)


class AccountCreate(RequestBody):
    """A new account; see the README for the assets that there are."""

    owner_name: Name
    asset: Name = "USD"


@canonical.command("/accounts", open_account, status_code=201, location="/accounts/{0.id}")
def post_account(book: Book, body: AccountCreate) -> AccountPublic:
    """Open an account for a customer."""
    account = open_account(book, owner_name=body.owner_name, asset=body.asset)
    return AccountPublic.model_validate(account)


@canonical.read("/accounts")
def get_accounts(
    connection: Connection,
    limit: Limit = PAGE_SIZE_DEFAULT,
    cursor: Cursor = None,
    owner_name: Printable | None = None,
    name: Printable | None = None,
) -> Page[AccountPublic]:
    """List the customers' accounts, oldest first."""
    listing = Listing("accounts", owner_name, name)
    after = listing.position(cursor, "")
    wanted = {"owner_name": owner_name, "name": name}
    rows = read_customer_accounts(connection, after_id=after, limit=limit + 1, wanted=wanted)
    return Page[AccountPublic].model_validate(listing.page(rows, limit=limit, place="id"))


@canonical.read("/accounts/{account_id}")
def get_account(connection: Connection, account_id: AccountId) -> AccountPublic:
    """Show an account."""
    return AccountPublic.model_validate(read_account(connection, account_id))


class EntryPublic(Public):
    """An entry: a positive amount, its type, and the balance after it; `ref` is the memo."""

    id: str
    ts: Timestamp
    account_id: str
    transaction_id: str
    amount: int
    type: str
    balance: int
    ref: str | None
    kind: str


@canonical.read("/accounts/{account_id}/statement")
def get_statement(
    connection: Connection,
    account_id: AccountId,
    limit: Limit = PAGE_SIZE_DEFAULT,
    cursor: Cursor = None,
) -> Page[EntryPublic]:
    """List an account's entries, newest first."""
    listing = Listing("statement", account_id)
    before = listing.position(cursor, BALANCE_MAX)
    read_account(connection, account_id)
    rows = read_statement(connection, account_id, before_seq=before, limit=limit + 1)
    return Page[EntryPublic].model_validate(listing.page(rows, limit=limit, place="seq"))


class TransactionPublic(Public):
    """A transaction and its entries, which sum to zero."""

    id: str
    kind: str
    memo: str | None
    ts: Timestamp
    entries: list[EntryPublic]


@canonical.read("/transactions/{transaction_id}")
def get_transaction(connection: Connection, transaction_id: Uuid) -> TransactionPublic:
    """Show a transaction with all of its entries."""
    row = read_transaction(connection, transaction_id)
    entries = read_entries(connection, transaction_id)
    return TransactionPublic.model_validate({**row._mapping, "entries": entries})


# ------------------------------------------------------------------------- Application
# The routes of all faces over one ledger.

FACES = (canonical,)


def create_app(settings: Settings) -> FastAPI:
    """Open the ledger and return its application; raise StartRefused if it cannot be opened."""
    database = Database(settings.database_url)
    database.open(make=True)
    app = FastAPI(
        title="ledger.py",
        description="A double-entry ledger: durable, idempotent, never negative, always balanced.",
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys(
            (LedgerError, RequestValidationError, FrameworkError, Exception), refuse
        ),
    )
    app.state.ledger = Ledger(database)
    for face in FACES:
        app.router.routes.extend(face.routes)
    app.add_api_route("/health", get_health, tags=["ledger"], responses=PROBLEMS)
    return app


class Health(BaseModel):
    """That the database answers."""

    status: Literal["ok"] = "ok"


async def get_health(request: Request) -> Health:
    """Tell whether the server and its database answer."""
    with request.app.state.ledger.read() as connection:
        connection.execute(select(ASSET.c.code).limit(1))
    return Health()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Prepare the process for serving, and close the ledger after the last answer."""
    # What was made until now lives as long as the process; a request leaves few cycles behind.
    # Without these two lines, the collector costs a fifth of the rate.
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    yield
    app.state.ledger.database.close()


def __getattr__(name: str) -> FastAPI:
    """Make `app` when it is first asked for, so that importing this module has no effect."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        app = globals()["app"] = create_app(Settings.read(os.environ))
    except StartRefused as refusal:
        raise SystemExit(f"ledger: {refusal}") from None
    return app


# ------------------------------------------------------------------------ Command line
# What the operator types.


def serve(settings: Settings, options: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C, and finish what was accepted."""
    if not is_loopback("127.0.0.1" if options.host == "localhost" else options.host):
        raise StartRefused(
            "without keys the ledger serves this machine alone: use --host 127.0.0.1"
        )
    port = port_number(os.environ.get("PORT") or "8000") if options.port is None else options.port
    listener = listen(options.host, port)
    app = create_app(settings)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"ledger.py serves on {address}")
    print(f"  docs      {address}/docs")
    print(f"  database  {app.state.ledger.database.path}")
    print("  mode      open: every caller on this machine may do everything", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # Longer than most clients keep an idle connection: the side that closes it first should
        # be the client, because a request that meets a closing connection gets no answer.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=8,
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
    return 0


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, or raise StartRefused where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2_048)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise StartRefused(
            f"cannot serve on {host}:{port}: {reason}; choose another with --port"
        ) from None


def run_check(settings: Settings, options: argparse.Namespace) -> int:
    """Print what each check counted and the first row that is wrong; return 1 if any is."""
    database = existing(settings)
    with database.begin(database.reader) as connection:
        findings = list(check(connection))
    database.close()
    for finding in findings:
        print(
            f"{'WRONG' if finding.wrong else 'ok':5}  {finding.row_count:>9,}  {finding.invariant}"
        )
        if finding.wrong:
            print(f"       {finding.wrong}")
    return int(any(finding.wrong for finding in findings))


def run_backup(settings: Settings, options: argparse.Namespace) -> int:
    """Copy the ledger into a new file while it is in use."""
    database = existing(settings)
    target: Path = options.file
    try:
        target.open("x").close()
    except OSError as error:
        raise StartRefused(f"cannot make {target}: {error.strerror}") from None
    try:
        copy_into(database, target)
    except BaseException:
        target.unlink()
        raise
    database.close()
    print(f"copied {database.path} to {target}")
    return 0


def copy_into(database: Database, target: Path) -> None:
    """Copy all committed pages in one step: in smaller ones a busy writer never lets it end."""
    with closing(sqlite3.connect(target)) as copy, database.begin(database.reader) as connection:
        source: Any = connection.connection.driver_connection
        source.backup(copy, pages=-1)
        # So that the copy is one file, even where it can only be read.
        copy.execute("PRAGMA journal_mode = DELETE")


def existing(settings: Settings) -> Database:
    """Open a ledger that is there; a command never makes one by mistake."""
    database = Database(settings.database_url)
    if not database.path.exists():
        raise StartRefused(f"there is no ledger at {database.path}")
    database.open(make=False)
    return database


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options; without a command, it serves."""
    parser = argparse.ArgumentParser(prog="ledger.py", description="A double-entry ledger.")
    commands = parser.add_subparsers(title="commands")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--database-url", metavar="URL", help="default: sqlite:///ledger.db")

    def command(name: str, run: Callable[..., int]) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[shared], help=run.__doc__)
        made.set_defaults(run=run)
        return made

    serving = command("serve", serve)
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=port_number, help="default: $PORT, or 8000")
    command("check", run_check)
    command("backup", run_backup).add_argument("file", type=Path, metavar="FILE")
    named = arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help"))
    return parser.parse_args(arguments if named else ["serve", *arguments])


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    try:
        options = parse(arguments)
        settings = Settings.read(os.environ, database_url=options.database_url)
        status: int = options.run(settings, options)
    except (StartRefused, LedgerError, sqlite3.Error) as refusal:
        print(f"ledger: {refusal.__cause__ or refusal}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
