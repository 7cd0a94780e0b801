"""A complete double-entry ledger in one file: tables, rules, HTTP API and command line.

    python ledger.py            serve on http://127.0.0.1:8000, on the file ./ledger.db
    python ledger.py check      verify the invariants against all stored rows
    python ledger.py backup F   copy the ledger into the new file F while the server runs
    python ledger.py copy --from URL --to URL     move a ledger between SQLite and PostgreSQL
    python ledger.py seed       open the demo accounts and wallets that are missing
    python ledger.py key add --name N --role R    make an API key (and: key list, key revoke N)
    uvicorn ledger:app          serve the same application

On SQLite by default; LEDGER_DATABASE_URL=postgresql://... serves from PostgreSQL instead.

Glossary, with an example of each:

    asset            what is counted, with its number of decimal places     USD, 2
    minor units      an amount as an integer of the smallest unit           1050 is 10.50 USD
    account          one balance of one asset, owned by a customer          Alice's dollars
    system account   the outside world's side; it alone may go negative     cash, in USD
    closed loop      assets that are issued, given and spent, and no more   GOLD, 4
    leg              a requested entry: an account and a signed amount      (alice, -500)
    entry            one immutable, numbered line of one account            DEBIT 500, leaves 550
    transaction      one event: entries whose credits equal their debits    a transfer
    post             the one operation that turns legs into entries         Book.post
    word             a rule of bookkeeping over at most one post            deposit, transfer
    command          a word, its arguments and the caller who asked         POST /transfers
    batch            the commands that are written and committed together   1 to some hundreds
    answer           what a command's caller gets: status and body          200 {"balance": 550}
    cashback         2 % of a payment, credited when it falls due           199 brings back 3
    statement        an account's entries, newest first
    cursor           an opaque place in a list, from which it goes on
    idempotency key  the caller's name for one intent, which acts once      5f3a-retry-me
    face             routes that speak to one kind of caller in its words   /atm, "10.50"

Sign convention: CREDIT raises a balance and DEBIT lowers it, for every account. A leg's
amount is signed (+ is CREDIT, - is DEBIT); a stored entry has a positive amount and a type.
So a deposit of 500 is DEBIT cash 500, CREDIT alice 500, and all balances sum to zero.

Invariants. The code keeps them all; the database keeps 3, 4, 5, 7 and the uniqueness in 6
once more, and 2 wherever an account's row is written; `check` verifies what rows can show.

    1. The entries of every transaction sum to zero, and so does the whole ledger.
    2. A balance equals the sum of its entries; every entry carries the balance after it.
    3. The entries of an account are numbered 1, 2, 3 ... without a gap.
    4. No customer's account is ever below zero.
    5. Entries, transactions and audit events are never changed or deleted.
    6. An idempotency key of a caller acts at most once, and is always answered the same.
    7. Frozen accounts move no money; closed accounts are empty and never come back.
    8. Nothing is acknowledged before it is committed to disk.

Sections: Settings, Money, Errors, Tables, Database, The rule, The batch, The words, Reading,
Callers, Faces, The canonical API, /bank, /atm, /api/v1/wallets, The log, Application, Command
line.
"""

import argparse
import asyncio
import gc
import hashlib
import hmac
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
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import ThreadPoolExecutor
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import cached_property, lru_cache, partial
from heapq import merge
from itertools import groupby, islice
from operator import attrgetter, itemgetter
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Generic,
    Literal,
    NamedTuple,
    NewType,
    TextIO,
    TypeVar,
    get_args,
)

import jwt
import psycopg
import sqlalchemy as sa
import sqlmodel
import uvicorn
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError, to_json
from sqlalchemy import (
    ARRAY,
    BigInteger,
    CheckConstraint,
    Connection,
    Engine,
    ForeignKey,
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
from sqlalchemy.engine import URL, Dialect, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.sql import ClauseElement, ColumnElement, Select
from sqlmodel import SQLModel
from starlette.exceptions import HTTPException as FrameworkError
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

log = logging.getLogger("ledger")

R = TypeVar("R")
T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
Position = TypeVar("Position", int, str)


# ---------------------------------------------------------------------------- Settings
# What the operator may choose, read once at the start.


class StartRefused(Exception):
    """The program cannot start or go on; the message is one line for the operator."""


@dataclass(frozen=True)
class Settings:
    """What the environment says; a command line flag wins over it."""

    database_url: str = "sqlite:///ledger.db"
    preload_accounts: str | None = None
    admin_key: str | None = field(default=None, repr=False)
    jwt_secret: str | None = field(default=None, repr=False)

    @classmethod
    def read(cls, environment: Mapping[str, str], *, database_url: str | None = None) -> "Settings":
        """Return the settings; an empty value counts as none."""
        url = database_url or environment.get("LEDGER_DATABASE_URL")
        url = url or environment.get("DATABASE_URL") or cls.database_url
        names = ("PRELOAD_ACCOUNTS", "LEDGER_ADMIN_KEY", "LEDGER_JWT_SECRET")
        settings = cls(url, *(environment.get(name) or None for name in names))
        if not re.fullmatch("[!-~]*", settings.admin_key or ""):
            raise StartRefused("LEDGER_ADMIN_KEY must be visible ASCII characters, without blanks")
        require_secret(settings.jwt_secret)
        return settings


JWT_SECRET_BYTES_MIN = 32


def require_secret(secret: str | None) -> None:
    """Refuse a secret for tokens that is too short, or of a kind that would verify none."""
    if secret and len(os.fsencode(secret)) < JWT_SECRET_BYTES_MIN:
        raise StartRefused(f"LEDGER_JWT_SECRET must have {JWT_SECRET_BYTES_MIN} bytes or more")
    try:
        jwt.encode({}, os.fsencode(secret or "-" * JWT_SECRET_BYTES_MIN), TOKEN_ALGORITHM)
    except jwt.PyJWTError as error:
        raise StartRefused(f"LEDGER_JWT_SECRET cannot be used: {error}") from None


TOKEN_ALGORITHM = "HS256"  # noqa: S105, a name and no secret


def port_number(digits: str) -> int:
    """Return a TCP port, or raise StartRefused."""
    if not re.fullmatch("[0-9]{1,5}", digits) or int(digits) > 65_535:
        raise StartRefused(f"the port must be a number from 0 to 65535, not {digits!r}")
    return int(digits)


# ------------------------------------------------------------------------------- Money
# Money is an integer of minor units everywhere; decimal text is known here, and at the edge
# of a face.

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


def decimal_text(minor_units: int, exponent: int) -> str:
    """Return an amount of an asset that has decimal places: (-1050, 2) is "-10.50"."""
    whole, fraction = divmod(abs(minor_units), 10**exponent)
    return f"{'-' if minor_units < 0 else ''}{whole}.{fraction:0{exponent}}"


def minor_units(decimal: str, exponent: int) -> int:
    """Return an amount as an integer: ("10.5", 2) is 1050; raise ValueError for anything odd.

    Good are 1 to 16 digits, and behind a point at most as many more as the asset has places.
    """
    digits = re.fullmatch(rf"([0-9]{{1,16}})(?:\.([0-9]{{1,{exponent}}}))?", decimal)
    if digits is None:
        raise ValueError
    return int(digits[1] + (digits[2] or "").ljust(exponent, "0"))


def rounded_minor_units(decimal: str, exponent: int) -> int:
    """Return an amount whose further places are rounded half up: ("0.005", 2) is 1."""
    places = Decimal(1).scaleb(-exponent)
    return minor_units(str(Decimal(decimal).quantize(places, ROUND_HALF_UP, PRECISE)), exponent)


PRECISE = Context(prec=40)


# ------------------------------------------------------------------------------ Errors
# Every failure that a caller can see is one of these; one handler renders them all.


class Answer(NamedTuple):
    """What a command's caller gets, stored under the idempotency key byte for byte."""

    status: int
    body: str
    location: str | None = None
    replayed: bool = False


class Wording(NamedTuple):
    """How a dialect words an error: its status, and a template over the error's members."""

    status: int
    detail: str


class LedgerError(Exception):
    """A refusal with a `status`, a `code` for programs and a sentence for people (RFC 9457)."""

    status: int
    code: str

    def __init_subclass__(cls, *, status: int, code: str = "") -> None:
        """Take the status as declared, and the code too, or else from the class's name."""
        cls.status = status
        cls.code = code or re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()

    def __init__(self, detail: str, **members: Any) -> None:
        super().__init__(detail)
        self.members = members

    def worded(self, wording: Wording, exponent: int | None) -> "LedgerError":
        """Return the error as a dialect words it, its amounts with that many decimal places."""
        if exponent is not None:
            for name, value in self.members.items():
                if isinstance(value, int):
                    self.members[name] = decimal_text(value, exponent)
        self.status, self.args = wording.status, (wording.detail.format(**self.members),)
        return self

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
class Unauthorized(LedgerError, status=401): ...
class Forbidden(LedgerError, status=403): ...
class NotFound(LedgerError, status=404): ...
class AccountNotFound(LedgerError, status=404): ...
class TransactionNotFound(LedgerError, status=404): ...
class PaymentNotFound(LedgerError, status=404): ...
class AssetNotFound(LedgerError, status=404): ...
class MethodNotAllowed(LedgerError, status=405): ...
class AccountExists(LedgerError, status=409): ...
class InsufficientFunds(LedgerError, status=409): ...
class AccountFrozen(LedgerError, status=409): ...
class AccountClosed(LedgerError, status=409): ...
class AccountNotEmpty(LedgerError, status=409): ...
class InvalidStateTransition(LedgerError, status=409): ...
class AssetMismatch(LedgerError, status=409): ...
class AssetClosedLoop(LedgerError, status=409): ...
class BalanceLimit(LedgerError, status=409): ...
class CashbackPending(LedgerError, status=409): ...
class CashbackCredited(LedgerError, status=409): ...  # Only the ledger itself asks for it.
class IdempotencyKeyReused(LedgerError, status=409): ...
class BodyTooLarge(LedgerError, status=413): ...
class UnsupportedMediaType(LedgerError, status=415): ...
class InvalidRequest(LedgerError, status=422): ...
class InternalError(LedgerError, status=500): ...
class DatabaseBusy(LedgerError, status=503): ...
class DatabaseConflict(DatabaseBusy, status=503, code="database_busy"): ...  # It is tried again.
class DatabaseUnavailable(LedgerError, status=503): ...
class DatabaseRefused(DatabaseUnavailable, status=503, code="database_unavailable"): ...
class StorageFull(LedgerError, status=507): ...
# fmt: on


# ------------------------------------------------------------------------------ Tables
# What is stored. The constraints repeat the rules, so that a bug in one is caught by the
# other. Ids are text; times are integer microseconds since 1970 in UTC.

Integer64 = BigInteger().with_variant(Integer(), "sqlite")
PlainText = Text().with_variant(Text(collation="C"), "postgresql")
STRICT = {"sqlite_strict": True}
CLUSTERED = STRICT | {"sqlite_with_rowid": False}


def text_column(**options: Any) -> Any:
    """Declare a text column that every engine takes as it is."""
    return sqlmodel.Field(sa_type=PlainText, **options)


def partial_index(name: str, *columns: str, where: str) -> Index:
    """Declare an index of the rows that a condition holds for."""
    return Index(name, *columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))


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
    """One balance of one asset; `name` is a dialect's own name for it.

    `told_at`, here and in Transaction, is the caller's own time, where a dialect has one.
    """

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
    told_at: int | None = integer_column(default=None)


class Transaction(SQLModel, table=True):
    """One event; its entries sum to zero."""

    __tablename__ = "transaction"
    __table_args__ = (CLUSTERED,)

    id: str = text_column(primary_key=True)
    kind: str = text_column()
    memo: str | None = text_column(default=None)
    ts: int = integer_column()
    told_at: int | None = integer_column(default=None)


class Entry(SQLModel, table=True):
    """One line of one account, known by the account and its number there."""

    __tablename__ = "entry"
    __table_args__ = (
        CheckConstraint("seq >= 1"),
        CheckConstraint("type IN ('DEBIT', 'CREDIT')"),
        CheckConstraint("amount >= 1"),
        STRICT,
    )

    account_id: str = text_column(primary_key=True, foreign_key="account.id")
    seq: int = integer_column(primary_key=True)
    id: str = text_column()
    transaction_id: str = text_column(foreign_key="transaction.id", index=True)
    type: str = text_column()
    amount: int = integer_column()
    balance: int = integer_column()


class ScheduledCashback(SQLModel, table=True):
    """What a payment brings back when it falls due, by the server's clock or by the caller's."""

    __tablename__ = "scheduled_cashback"
    __table_args__ = (
        partial_index("cashback_due", "clock", "due_at", where="credited_at IS NULL"),
        partial_index("cashback_to_come", "account_id", where="credited_at IS NULL"),
        CheckConstraint("clock IN ('SERVER', 'CALLER')"),
        CheckConstraint("amount >= 0"),
        CLUSTERED,
    )

    payment_id: str = text_column(primary_key=True, foreign_key="transaction.id")
    account_id: str = text_column(foreign_key="account.id")
    amount: int = integer_column()
    clock: str = text_column()
    due_at: int = integer_column()
    credited_at: int | None = integer_column(default=None)


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
    """Who did what, written in the same commit as the change itself.

    An account's events are found through its entries. An index on the account of every event
    would cost each transfer a page; the two indexes here grow at their end, or rarely.
    """

    __tablename__ = "audit_event"
    __table_args__ = (
        Index("audit_transaction", "transaction_id"),
        partial_index("audit_account", "account_id", "id", where="transaction_id IS NULL"),
        CLUSTERED,
    )

    id: str = text_column(primary_key=True)
    ts: int = integer_column()
    caller: str = text_column()
    action: str = text_column()
    account_id: str | None = text_column(default=None)
    transaction_id: str | None = text_column(default=None)
    details: str = text_column()


class ApiKey(SQLModel, table=True):
    """A key that somebody may call with: its hash, and the prefix that is no secret."""

    __tablename__ = "api_key"
    __table_args__ = (
        CheckConstraint("role IN ('auditor', 'service', 'admin')"),
        STRICT,
    )

    name: str = text_column(primary_key=True)
    prefix: str = text_column(unique=True)
    hash: str = text_column()
    role: str = text_column()
    created_at: int = integer_column()
    revoked_at: int | None = integer_column(default=None)


class SchemaVersion(SQLModel, table=True):
    """The version of the tables, in one row."""

    __tablename__ = "schema_version"
    __table_args__ = (STRICT,)

    version: int = integer_column(primary_key=True)


SCHEMA_VERSION = 2
TABLES = SQLModel.metadata.tables
ASSET, ACCOUNT, TRANSACTION = TABLES["asset"], TABLES["account"], TABLES["transaction"]
ENTRY, CASHBACK = TABLES["entry"], TABLES["scheduled_cashback"]
KEY, AUDIT, API_KEY = TABLES["idempotency_key"], TABLES["audit_event"], TABLES["api_key"]


class Trigger(NamedTuple):
    """A rule that the database keeps: it refuses a change while the condition holds."""

    name: str
    moment: str
    condition: str
    message: str


# Invariants 2, 3, 5 and 7 in words that both engines know.
TRIGGERS = [
    Trigger(
        "entry_follows",
        "BEFORE INSERT ON entry",
        # IS NOT TRUE, because a missing predecessor makes the right-hand side NULL.
        """(NEW.balance = CASE NEW.type WHEN 'CREDIT' THEN NEW.amount ELSE -NEW.amount END
           + CASE NEW.seq WHEN 1 THEN 0 ELSE (SELECT balance FROM entry
             WHERE account_id = NEW.account_id AND seq = NEW.seq - 1) END) IS NOT TRUE""",
        "an entry must follow its predecessor in seq and balance",
    ),
    Trigger(
        "entry_active",
        "BEFORE INSERT ON entry",
        "(SELECT status FROM account WHERE id = NEW.account_id) <> 'ACTIVE'",
        "only an active account moves money",
    ),
    Trigger(
        "account_follows",
        "BEFORE UPDATE OF balance, last_seq ON account",
        """(NEW.last_seq, NEW.balance) <> (OLD.last_seq, OLD.balance)
           AND ((NEW.last_seq, NEW.balance) = (SELECT seq, balance FROM entry
             WHERE account_id = NEW.id ORDER BY seq DESC LIMIT 1)) IS NOT TRUE""",
        "an account must stand where its last entry leaves it",
    ),
    Trigger(
        "account_empty",
        "BEFORE INSERT ON account",
        "(NEW.last_seq, NEW.balance) <> (0, 0)",
        "an account opens empty",
    ),
    Trigger(
        "account_state",
        "BEFORE UPDATE ON account",
        """OLD.status = 'CLOSED' AND NEW.status <> 'CLOSED' OR NEW.last_seq <> OLD.last_seq
           AND 'ACTIVE' NOT IN (OLD.status, NEW.status)""",
        "a closed account never comes back, and only an active one moves money",
    ),
    Trigger(
        "account_identity",
        "BEFORE UPDATE OF id, asset, kind ON account",
        "TRUE",
        "these are for ever",
    ),
    Trigger("account_kept", "BEFORE DELETE ON account", "TRUE", "accounts are never deleted"),
    Trigger(
        "cashback_once",
        "BEFORE UPDATE ON scheduled_cashback",
        """OLD.credited_at IS NOT NULL OR (NEW.payment_id, NEW.account_id, NEW.amount, NEW.clock,
           NEW.due_at) <> (OLD.payment_id, OLD.account_id, OLD.amount, OLD.clock, OLD.due_at)""",
        "a cashback is credited once, as it was scheduled",
    ),
    Trigger(
        "cashback_kept", "BEFORE DELETE ON scheduled_cashback", "TRUE", "a promise is for ever"
    ),
    Trigger(
        "api_key_revoked",
        "BEFORE UPDATE ON api_key",
        """OLD.revoked_at IS NOT NULL OR (NEW.name, NEW.prefix, NEW.hash, NEW.role, NEW.created_at)
           <> (OLD.name, OLD.prefix, OLD.hash, OLD.role, OLD.created_at)""",
        "a key is revoked once, and else stays as it was made",
    ),
    Trigger("api_key_kept", "BEFORE DELETE ON api_key", "TRUE", "the name of a key is for ever"),
] + [
    Trigger(
        f"{table}_{name}", f'BEFORE {change} ON "{table}"', "TRUE", f"a row of {table} is for ever"
    )
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
    lock = threading.Lock()
    last = int(after[:8] + after[9:13] + after[15:18], 16) if after else 0
    tail = f"{2 << 62 | secrets.randbits(62):016x}"

    def new_id(now: int) -> str:
        nonlocal last
        with lock:
            last = max(last + 1, (now << 12) // 1_000)
            head = f"{last:015x}"
        return f"{head[:8]}-{head[8:12]}-7{head[12:]}-{tail[:4]}-{tail[4:]}"

    return new_id


# ---------------------------------------------------------------------------- Database
# How the database is opened, and how a read and a write begin and end. Nothing else may
# begin, commit or roll back.

IsAmong = Callable[[ColumnElement[Any], str], ColumnElement[bool]]


class Database:
    """A ledger's database, with an engine that writes and one that only reads."""

    name: str
    """What the operator knows it by, without any password."""
    writer: Engine
    reader: Engine
    writers_max: int
    """How many batches may be written at a time; 0 if that is done on the event loop itself."""

    def exists(self) -> bool:
        """Tell whether looking into it would not make it."""
        return True

    def open(self, *, make: bool, oldest: int = SCHEMA_VERSION) -> None:
        """Accept a ledger of this version, or from the oldest one on.

        With `make`, make one where there is none yet, and bring up an older one.
        """
        if not make and not self.exists():
            raise StartRefused(f"there is no ledger at {self.name}")
        try:
            # Looking first through a connection that only reads leaves a stranger's file alone.
            with self.begin(self.reader) as connection:
                version = stored_version(connection)
            if make:
                patiently(self._complete)
            elif version < oldest:
                missing = f"has schema version {version}: start the server once" if version else ""
                raise StartRefused(f"{self.name} {missing or 'is empty'}")
        except LedgerError as error:
            self.close()
            raise StartRefused(f"cannot open {self.name}: {one_line(error)}") from error
        except StartRefused:
            self.close()
            raise

    @contextmanager
    def begin(self, engine: Engine) -> Iterator[Connection]:
        """Do one read or one write; raise the ledger's own errors for the database's."""
        try:
            with engine.begin() as connection:
                yield connection
        except PoolTimeoutError as error:
            raise DatabaseBusy("Too much is under way: try again") from error
        except (DBAPIError, psycopg.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            refusal = self.named_error(cause)
            if not isinstance(refusal, DatabaseBusy):
                # The first line only: PostgreSQL's details have values of the row in them.
                log.error("the database refused: %s", str(cause).partition("\n")[0])
            raise refusal from cause

    def named_error(self, error: BaseException | None) -> LedgerError:
        """Return the ledger's error for one of the engine's."""
        raise NotImplementedError

    def is_among(self, column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
        """Return the condition that a column is in a list that is bound as one parameter."""
        raise NotImplementedError

    def listed(self, values: Iterable[Any]) -> Any:
        """Return a list as `is_among` takes it."""
        raise NotImplementedError

    def select_all(
        self, connection: Connection, queries: Sequence[tuple[str, Any]]
    ) -> list[Sequence[Any]]:
        """Return the rows of each query, given as text and parameters, one after the other."""
        return [connection.exec_driver_sql(*query).all() for query in queries]

    def insert_all(self, connection: Connection, table: Table, rows: Sequence[Any]) -> None:
        """Insert rows, in their order."""
        raise NotImplementedError

    def update_all(
        self, connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Any]
    ) -> None:
        """Update some columns of the rows that have these ids."""
        raise NotImplementedError

    def committing(self, connection: Connection) -> AbstractContextManager[Any]:
        """Do the statements of a block, which are the last of a write."""
        return nullcontext()

    def lock_schema(self, connection: Connection) -> None:
        """Let nobody else make or change the schema until the write has ended."""

    def require_health(self) -> None:
        """Raise the ledger's own error unless the database answers."""
        with self.begin(self.reader) as connection:
            connection.execute(select(ASSET.c.code).limit(1))

    def close(self) -> None:
        """Close every connection; the next use opens new ones."""
        self.writer.dispose()
        self.reader.dispose()

    def _complete(self) -> None:
        with self.begin(self.writer) as connection:
            self.lock_schema(connection)
            version = stored_version(connection)
            if version:
                upgrade(connection, version)
            else:
                create_schema(connection)
            add_missing_rows(connection)


def database_at(url: str) -> Database:
    """Return the database that a URL names, or raise StartRefused."""
    scheme = url.partition(":")[0]
    if scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        return PostgresDatabase(f"postgresql{url.removeprefix(scheme)}")
    return SqliteDatabase(url)


class SqliteDatabase(Database):
    """One file: a single connection that writes, and a few that only read."""

    # SQLite is a library, and a call of it is shorter than the way to another thread.
    writers_max = 0

    def __init__(self, url: str) -> None:
        self.path = sqlite_path(url)
        self.name = str(self.path)
        self.writer = sqlite_engine(url, "BEGIN IMMEDIATE", pool_size=1, pragmas=WRITER_PRAGMAS)
        self.reader = sqlite_engine(url, "BEGIN", pool_size=READERS_MAX, pragmas=READER_PRAGMAS)
        self._identity: tuple[int, int] | None = None

    def exists(self) -> bool:
        """Tell whether there is a file."""
        return self.path.exists()

    def open(self, *, make: bool, oldest: int = SCHEMA_VERSION) -> None:
        """Open as any database, and remember which file it was."""
        super().open(make=make, oldest=oldest)
        self._identity = file_identity(self.path)

    @contextmanager
    def begin(self, engine: Engine) -> Iterator[Connection]:
        """Do one read or one write, unless the file is gone."""
        if self._identity and file_identity(self.path) != self._identity:
            # The open connection would go on writing into the file that is gone.
            raise DatabaseUnavailable("The database file was moved or replaced: restart the server")
        with super().begin(engine) as connection:
            yield connection

    def named_error(self, error: BaseException | None) -> LedgerError:
        """Return the ledger's error for one of SQLite's."""
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return DatabaseBusy("The database is in use: try again")
        if code == sqlite3.SQLITE_FULL:
            return StorageFull("The disk is full, and nothing was done")
        return DatabaseRefused("The database does not do this now: try again")

    def is_among(self, column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
        """Take the list as JSON, so that its length leaves the text of the statement be."""
        values = func.json_each(bindparam(name)).table_valued("value")
        return column.in_(select(values.c.value))

    def listed(self, values: Iterable[Any]) -> Any:
        """Return a list as JSON."""
        return json.dumps(list(values))

    def insert_all(self, connection: Connection, table: Table, rows: Sequence[Any]) -> None:
        """Insert row by row, which costs a function call each."""
        connection.exec_driver_sql(insert_text(table, self.writer.dialect), rows)

    def update_all(
        self, connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Any]
    ) -> None:
        """Update row by row."""
        changes = ", ".join(f"{name} = :{name}" for name in columns)
        statement = f"UPDATE {table} SET {changes} WHERE id = :id"  # noqa: S608
        connection.exec_driver_sql(statement, rows)


class PostgresDatabase(Database):
    """One database of a PostgreSQL server, or of several of which one can be written to."""

    writers_max = 3

    def __init__(self, url: str) -> None:
        try:
            given = conninfo_to_dict(url)
        except psycopg.ProgrammingError:
            example = "postgresql://user@host/name"
            raise StartRefused(f"the database URL must look like {example}") from None
        missing = {name: v for name, v in CONNECTION_DEFAULTS.items() if name not in given}
        self._conninfo = make_conninfo(url, **missing, client_encoding="utf8")
        self.name = f"{given.get('dbname', 'PostgreSQL')} at {given.get('host', 'localhost')}"
        if "@" in self.name:
            # It would be a part of the password, and be printed.
            raise StartRefused("an @ in the database URL's password must be written as %40")
        self.writer = self._engine(self.writers_max, isolation_level="READ COMMITTED")
        self.reader = self._engine(
            READERS_MAX * 2, isolation_level="REPEATABLE READ", postgresql_readonly=True
        )

    def named_error(self, error: BaseException | None) -> LedgerError:
        """Return the ledger's error for one of PostgreSQL's, by its SQLSTATE."""
        state = getattr(error, "sqlstate", None) or ""
        if is_lost(error, state):
            # It may have committed before it was lost: the key will tell.
            return DatabaseUnavailable("The database cannot be reached: try again")
        if state in CONFLICTS:
            return DatabaseConflict("The database is in use: try again")
        if state in BUSY_STATES:
            return DatabaseBusy("The database is in use: try again")
        if state == DISK_FULL:
            return StorageFull("The disk is full, and nothing was done")
        if state == READ_ONLY:
            # The server became a standby, and a new connection may find its successor.
            self.close()
            return DatabaseUnavailable("The database cannot be written to now: try again")
        return DatabaseRefused("The database does not do this now: try again")

    def is_among(self, column: ColumnElement[Any], name: str) -> ColumnElement[bool]:
        """Take the list as an array."""
        return column == sa.any_(bindparam(name, type_=ARRAY(Text)))

    def listed(self, values: Iterable[Any]) -> Any:
        """Return a list as the driver takes it."""
        return list(values)

    def insert_all(self, connection: Connection, table: Table, rows: Sequence[Any]) -> None:
        """Insert all rows in one statement, as one parameter of JSON."""
        columns = ", ".join(rows[0])
        source = f'json_populate_recordset(NULL::"{table}", %(rows)s)'
        statement = f'INSERT INTO "{table}" ({columns}) SELECT {columns} FROM {source}'  # noqa: S608
        driver_of(connection).execute(statement, {"rows": to_json(rows).decode()})

    def update_all(
        self, connection: Connection, table: Table, columns: Sequence[str], rows: Sequence[Any]
    ) -> None:
        """Update all rows in one statement."""
        changes = ", ".join(f"{name} = new.{name}" for name in columns)
        source = f"json_populate_recordset(NULL::{table}, %(rows)s) AS new"
        statement = f"UPDATE {table} SET {changes} FROM {source} WHERE {table}.id = new.id"  # noqa: S608
        driver_of(connection).execute(statement, {"rows": to_json(rows).decode()})

    def select_all(
        self, connection: Connection, queries: Sequence[tuple[str, Any]]
    ) -> list[Sequence[Any]]:
        """Send all queries at once: each wait for an answer is a wait for the interpreter too."""
        driver = driver_of(connection)
        with driver.pipeline():
            cursors = [driver.execute(*query) for query in queries]
        return [cursor.fetchall() for cursor in cursors]

    @contextmanager
    def committing(self, connection: Connection) -> Iterator[None]:
        """Send the statements of a block and the COMMIT behind them at once."""
        driver = driver_of(connection)
        with driver.pipeline():
            yield
            driver.commit()

    def lock_schema(self, connection: Connection) -> None:
        """Let one server at a time make or change the schema."""
        connection.execute(select(func.pg_advisory_xact_lock(SCHEMA_LOCK)))

    def require_health(self) -> None:
        """Raise DatabaseUnavailable for a standby too, which only reads."""
        with self.begin(self.reader) as connection:
            read_only = func.current_setting("default_transaction_read_only") == "on"
            if connection.execute(select(or_(func.pg_is_in_recovery(), read_only))).scalar():
                raise DatabaseUnavailable("The database can be read, but not be written to")

    def _engine(self, pool_size: int, **options: Any) -> Engine:
        engine = create_engine(
            "postgresql+psycopg://",
            creator=self._connect,
            hide_parameters=True,
            pool_size=pool_size,
            max_overflow=0,
            pool_timeout=BUSY_SECONDS_MAX,
        )
        return engine.execution_options(**options)

    def _connect(self) -> psycopg.Connection:
        connection = psycopg.connect(self._conninfo, autocommit=True)
        if connection.info.parameter_status("server_encoding") != "UTF8":
            connection.close()
            raise StartRefused(f"{self.name} must be made with the encoding UTF8")
        for statement in SESSION_SETTINGS:
            connection.execute(statement)
        connection.autocommit = False
        return connection


# What a URL may say otherwise: a server that does not answer is given up within some seconds.
CONNECTION_DEFAULTS = {
    "application_name": "ledger.py",
    "connect_timeout": "3",
    "keepalives_idle": "5",
    "keepalives_interval": "2",
    "keepalives_count": "3",
    "tcp_user_timeout": "10000",
}
SESSION_SETTINGS = (
    "SET lock_timeout = '5s'",
    "SET idle_in_transaction_session_timeout = '60s'",
    # Nothing is acknowledged that is not on disk, whatever the server's own default is.
    "SELECT set_config('synchronous_commit', 'on', false) "
    "WHERE current_setting('synchronous_commit') = 'off'",
)
# Unique violations, which a key used on two servers brings; serialization failures; deadlocks.
CONFLICTS = ("23505", "40001", "40P01")
# Lock timeouts, cancelled statements, too many connections.
BUSY_STATES = ("55P03", "57014", "53300")
DISK_FULL = "53100"
READ_ONLY = "25006"
SCHEMA_LOCK = 0x6C65646765720A


def is_lost(error: BaseException | None, state: str) -> bool:
    """Tell whether an error of PostgreSQL ended the connection, so that nobody knows the rest."""
    if not isinstance(error, psycopg.Error):
        return False
    if not state:
        # The driver's own: without a server's answer.
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    fatal = error.diag.severity_nonlocalized in ("FATAL", "PANIC")
    return (fatal or state.startswith(("08", "57"))) and state not in BUSY_STATES


def driver_of(connection: Connection) -> psycopg.Connection[Any]:
    """Return psycopg's own connection, which sends without waiting for an answer."""
    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)  # noqa: S101
    return driver


def one_line(error: BaseException) -> str:
    """Return what is behind an error, on one line."""
    return " ".join(str(error.__cause__ or error).split())


READERS_MAX = 4
BUSY_SECONDS_MAX = 5.0
BUSY_RETRY_SECONDS = 0.001

# The event loop may wait for the disk, but not for another program's lock, so the writer asks
# for it only once. All page caches together stay under 16 MB, and 32 MB of committed pages
# gather in the log before they are moved into the file.
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
        hide_parameters=True,
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


@lru_cache
def insert_text(table: Table, dialect: Dialect) -> str:
    """Return the statement that inserts a row; making it costs more than running it."""
    return str(insert(table).compile(dialect=dialect))


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


def stored_version(connection: Connection) -> int:
    """Return a ledger's schema version, or 0 for a new file; raise StartRefused for all else."""
    tables = set(sa.inspect(connection).get_table_names())
    if not tables:
        return 0
    if not tables.issuperset(TABLES.keys() - NEWER_TABLES):
        raise StartRefused("the database holds something other than a ledger")
    version = connection.execute(select(TABLES["schema_version"])).scalar()
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise StartRefused(f"schema version {version} is not {SCHEMA_VERSION}, the known one")
    return int(version)


def create_schema(connection: Connection) -> None:
    """Make the tables and the triggers of a new ledger."""
    SQLModel.metadata.create_all(connection)
    create_triggers(connection, TRIGGERS)
    connection.execute(insert(TABLES["schema_version"]).values(version=SCHEMA_VERSION))


def create_triggers(connection: Connection, triggers: Iterable[Trigger]) -> None:
    """Make triggers, which refuse what they are told to."""
    for trigger in triggers:
        for statement in trigger_statements(connection.dialect.name, trigger):
            connection.exec_driver_sql(statement)


def trigger_statements(dialect: str, trigger: Trigger) -> Sequence[str]:
    """Return what makes a trigger; on PostgreSQL, TRUNCATE is a kind of DELETE."""
    name, moment, condition, message = trigger
    if dialect == "sqlite":
        return [
            f"CREATE TRIGGER {name} {moment} WHEN {condition} "
            f"BEGIN SELECT RAISE(ABORT, '{message}'); END"
        ]
    call = f"EXECUTE FUNCTION {name}()"
    made = [
        f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${trigger_body(trigger)}$$",
        f"CREATE TRIGGER {name} {moment} FOR EACH ROW {call}",
    ]
    if "BEFORE DELETE" in moment:
        whole = moment.replace("DELETE", "TRUNCATE")
        made.append(f"CREATE TRIGGER {name}_whole {whole} FOR EACH STATEMENT {call}")
    return made


def trigger_body(trigger: Trigger) -> str:
    """Return a trigger's function as PostgreSQL stores it."""
    return (
        f"BEGIN IF {trigger.condition} THEN RAISE EXCEPTION '{trigger.message}' "
        "USING ERRCODE = 'check_violation'; END IF; RETURN NEW; END"
    )


def upgrade(connection: Connection, version: int) -> None:
    """Bring an older ledger up to this version, step by step."""
    for number in range(version, SCHEMA_VERSION):
        UPGRADES[number](connection)
        connection.execute(update(TABLES["schema_version"]).values(version=number + 1))
        log.warning("the ledger was brought up to schema version %d", number + 1)


def add_keys(connection: Connection) -> None:
    """Add the keys of callers, and what finds an account's audit events and cashbacks to come.

    The triggers are made anew, because their conditions are in words of both engines now.
    """
    API_KEY.create(connection)
    for index in AUDIT.indexes | CASHBACK.indexes:
        index.create(connection, checkfirst=True)
    for trigger in TRIGGERS:
        connection.exec_driver_sql(f"DROP TRIGGER IF EXISTS {trigger.name}")
    create_triggers(connection, TRIGGERS)


# The step that leads on from each version. A step may use the tables of today as long as they
# are those of its own version; the change after that gives it a text of its own.
UPGRADES = {1: add_keys}
# What the first version did not have.
NEWER_TABLES = {"api_key"}


def add_missing_rows(connection: Connection) -> None:
    """Add the assets and the system accounts that the ledger does not have yet."""
    known = set(connection.execute(select(ASSET.c.code)).scalars())
    for asset in ASSETS.values():
        if asset.code not in known:
            connection.execute(
                insert(ASSET).values({**asset._asdict(), "closed_loop": int(asset.closed_loop)})
            )
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
    told_at: int | None = None


class Named(NamedTuple):
    """A dialect's own name for an account, and the asset: ("wallets:user_bob", "GOLD")."""

    name: str
    asset: str


Ref = str | Named
"""What a request calls an account: its id, or its name in a dialect."""


class Leg(NamedTuple):
    """A requested entry: a positive amount is a CREDIT, a negative one a DEBIT."""

    account: LoadedAccount
    amount: int


class Unbalanced(Exception):
    """The legs of a word do not sum to zero: a defect of the program, never of a request."""


NONE_TO_COME: Mapping[str, int] = {}


class Book:
    """The open batch: the accounts that it has loaded, and the rows that it will write."""

    def __init__(
        self,
        accounts: Sequence[LoadedAccount],
        now: int,
        new_id: Callable[[int], str],
        cashbacks: Sequence[Row[Any]] = (),
        cashbacks_to_come: Mapping[str, int] = NONE_TO_COME,
    ) -> None:
        self.now = now
        self.told_at: int | None = None
        self.rows: defaultdict[Table, list[dict[str, Any]]] = defaultdict(list)
        self.changed: dict[str, LoadedAccount] = {}
        self.unfrozen: list[str] = []
        self.credited: list[str] = []
        self.cashbacks_to_come = Counter(cashbacks_to_come)
        """How many cashbacks are not credited yet, for the accounts that may be closed."""
        self.first_opened_id: str | None = None
        self.last_transaction_id: str | None = None
        self._new_id = new_id
        self._cashbacks = {row.payment_id: row for row in cashbacks if row.credited_at is None}
        self._customers: dict[Ref, LoadedAccount] = {}
        self._system: dict[Named, LoadedAccount] = {}
        for account in accounts:
            self._add(account)

    def account(self, ref: Ref) -> LoadedAccount:
        """Return a customer's account; a system account cannot be named by a request."""
        try:
            return self._customers[ref]
        except KeyError:
            name = ref.name if isinstance(ref, Named) else ref
            raise AccountNotFound(f"There is no account {name}") from None

    def system_account(self, name: str, asset: str) -> LoadedAccount:
        """Return the outside world's side of an event in an asset."""
        return self._system[Named(name, asset)]

    def new_account(self, owner_name: str, asset: str, name: str | None = None) -> LoadedAccount:
        """Return an account that is not in the book yet, or raise AccountExists."""
        if name and Named(name, asset) in self._customers:
            raise AccountExists(f"There is an account {name} already")
        account = LoadedAccount(self.new_id(), owner_name, asset, self.now, name)
        account.told_at = self.told_at
        return account

    def add(self, account: LoadedAccount) -> LoadedAccount:
        """Put a new account into the book, as the last step of a word; this cannot fail."""
        self.first_opened_id = self.first_opened_id or account.id
        self._add(account)
        self.rows[ACCOUNT].append(asdict(account) | {"balance": 0, "last_seq": 0})
        return account

    def schedule_cashback(self, payment_id: str, account: LoadedAccount, amount: int) -> "Cashback":
        """Promise an amount for a day after the payment, by the clock that the payment went by."""
        clock, paid_at = ("SERVER", self.now) if self.told_at is None else ("CALLER", self.told_at)
        cashback = Cashback(payment_id, account.id, amount, clock, paid_at + CASHBACK_DELAY)
        self.rows[CASHBACK].append(cashback._asdict())
        self.cashbacks_to_come[account.id] += amount > 0
        return cashback

    def cashback(self, payment_id: str) -> Row[Any]:
        """Return a cashback that is still to be credited."""
        if payment_id not in self._cashbacks:
            raise CashbackCredited(f"The cashback of {payment_id} was credited before")
        return self._cashbacks[payment_id]

    def mark_credited(self, payment_id: str) -> None:
        """Let a cashback never be credited again."""
        credited = self._cashbacks.pop(payment_id)
        self.cashbacks_to_come[credited.account_id] -= credited.amount > 0
        self.credited.append(payment_id)

    def change_status(self, account: LoadedAccount, status: str) -> LoadedAccount:
        """Take an account to another state.

        Raises InvalidStateTransition, AccountNotEmpty or CashbackPending.
        """
        if status not in STATUS_STEPS[account.status]:
            raise InvalidStateTransition(f"No account goes from {account.status} to {status}")
        if status == "CLOSED":
            require_nothing_left(account, self.cashbacks_to_come[account.id])
        # Every check stands above this line; below it nothing may fail.
        account.status = status
        self.changed[account.id] = account
        if status == "ACTIVE":
            self.unfrozen.append(account.id)
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
            {
                "id": transaction_id,
                "kind": kind,
                "memo": memo,
                "ts": self.now,
                "told_at": self.told_at,
            }
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

    def _add(self, account: LoadedAccount) -> None:
        if account.kind == "SYSTEM":
            self._system[Named(str(account.name), account.asset)] = account
            return
        self._customers[account.id] = account
        if account.name is not None:
            self._customers[Named(account.name, account.asset)] = account


class Cashback(NamedTuple):
    """What a payment will bring back."""

    payment_id: str
    account_id: str
    amount: int
    clock: str
    due_at: int
    credited_at: int | None = None

    @property
    def status(self) -> str:
        """Return where it stands."""
        return "SCHEDULED" if self.credited_at is None else "CREDITED"


# From each state, where an account may go.
STATUS_STEPS = {
    "ACTIVE": {"FROZEN", "CLOSED"},
    "FROZEN": {"ACTIVE", "CLOSED"},
    "CLOSED": set[str](),
}
CASHBACK_PERCENT = 2
CASHBACK_DELAY = 24 * 60 * 60 * 1_000_000
"""Microseconds from a payment to its cashback."""

# Cash is the money outside. Payments go to merchants, those of a dialect that counts them to
# "payments". Cashbacks come out of our own pocket, and the treasury issues closed-loop assets.
SYSTEM_ACCOUNTS = {
    (name, code)
    for code, asset in ASSETS.items()
    for name in (("treasury",) if asset.closed_loop else ("cash", "merchants", "cashback"))
} | {("payments", "USD")}
ACCOUNT_COLUMNS = [field.name for field in fields(LoadedAccount)]
CHANGING_COLUMNS = ("status", "balance", "last_seq")


def require_balanced(legs: Sequence[Leg]) -> None:
    """Refuse legs that turn one asset into another, and a word that makes money."""
    totals: defaultdict[str, int] = defaultdict(int)
    for account, amount in legs:
        totals[account.asset] += amount
    if any(totals.values()) and len(totals) > 1:
        raise AssetMismatch("The accounts hold different assets")
    distinct = len({account.id for account, _ in legs}) == len(legs) >= 2
    if any(totals.values()) or not distinct or 0 in (amount for _, amount in legs):
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


def require_nothing_left(account: LoadedAccount, cashbacks_to_come: int) -> None:
    """Refuse to close an account that holds money, or that money is promised to."""
    if account.balance:
        raise AccountNotEmpty(
            f"Account {account.id} holds {account.balance}: only an empty one can be closed",
            balance=account.balance,
        )
    if cashbacks_to_come:
        raise CashbackPending(f"Account {account.id} has cashback to come: close it later")


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


@dataclass(frozen=True)
class Command:
    """What one caller wants done, once."""

    caller: str
    operation: str
    """The method and the route's template, as in "POST /transfers"."""
    key: str | None
    arguments: str
    """The parsed arguments as JSON: two requests that mean the same have the same."""
    accounts: Sequence[Ref]
    word: "Word"
    run: Callable[..., Answer]
    told_at: int | None = None
    """The caller's own time, where its dialect has one."""
    payment_id: str | None = None
    """The payment whose cashback is to be credited."""

    @cached_property
    def stored_key(self) -> str | None:
        """Return the key as it is stored; a caller's own `|` is escaped, so none can collide."""
        if self.key is None:
            return None
        caller = self.caller.replace("%", "%25").replace("|", "%7C")
        return f"{caller}|{self.operation}|{self.key}"

    @cached_property
    def claims(self) -> set[object]:
        """Return what two batches under way may not share, or one would wait for the other."""
        return set[object](self.accounts) | {self.word.system_account, self.stored_key} - {None}

    @property
    def fingerprint(self) -> str:
        """Return what tells other arguments from the same."""
        return hashlib.sha256(self.arguments.encode()).hexdigest()


Outcome = Answer | Exception


class Pending(NamedTuple):
    """A command that waits for its batch, and the caller who waits for its answer."""

    command: Command
    answer: "asyncio.Future[Answer]"
    arrived_at: float


class Ledger:
    """The commands that wait, and the one function that commits them."""

    def __init__(self, database: Database, clock: Callable[[], int] = utc_now) -> None:
        self.database = database
        self.clock = clock
        self._pending: dict[asyncio.AbstractEventLoop, list[Pending]] = {}
        self._called: set[asyncio.AbstractEventLoop] = set()
        self._under_way: defaultdict[asyncio.AbstractEventLoop, list[int]] = defaultdict(list)
        self._claimed: defaultdict[asyncio.AbstractEventLoop, set[object]] = defaultdict(set)
        # One fewer than there are connections to read with, so that the loop never waits.
        self._readers = ThreadPoolExecutor(READERS_MAX - 1, "reader")
        self._lookers = ThreadPoolExecutor(READERS_MAX, "looker")
        self._writers = ThreadPoolExecutor(database.writers_max or 1, "writer")
        # On the event loop itself, commits of several loops come one at a time.
        self._turns = threading.Semaphore(database.writers_max or 1)
        self._statements = Statements(database)
        with self.read() as connection:
            # The clock may have gone back since the last start, and new ids must still be last.
            self._new_id = id_source(connection.execute(select(func.max(AUDIT.c.id))).scalar())

    async def submit(self, command: Command) -> Answer:
        """Have a command done in the next batch; return its answer after the commit."""
        loop = asyncio.get_running_loop()
        pending = Pending(command, loop.create_future(), loop.time())
        self._pending.setdefault(loop, []).append(pending)
        if loop not in self._called:
            self._called.add(loop)
            # One turn later, so that all that this turn of the loop reads joins the batch.
            loop.call_soon(loop.call_soon, self._flush, loop)
        if not self.database.writers_max:
            return await pending.answer
        # A server may say nothing at all, and a timer for each caller is the cheapest watch.
        watch = loop.call_later(ANSWER_SECONDS_MAX, give_up, pending.answer)
        try:
            return await pending.answer
        finally:
            watch.cancel()

    def settle(self, commands: Sequence[Command]) -> list[Outcome]:
        """Commit a batch; if it meets another one or is refused, commit it again, then in parts.

        A batch is a function of its commands alone, so it may be done again, but only while it
        is known that nothing was committed.
        """
        for attempt in range(COMMITS_MAX):
            try:
                return list(self.commit(commands))
            except DatabaseConflict as error:
                log.info("a batch of %d met another, attempt %d", len(commands), attempt + 1)
                failure: Exception = error
            except Exception as error:
                failure = error
                break
        sound = isinstance(failure, DatabaseConflict | DatabaseRefused | StorageFull)
        if len(commands) == 1 or (isinstance(failure, LedgerError) and not sound):
            return [failure] * len(commands)
        log.warning("a batch of %d was refused, each is tried alone: %r", len(commands), failure)
        return [outcome for command in commands for outcome in self.settle([command])]

    def commit(self, commands: Sequence[Command]) -> Sequence[Answer]:
        """Do all commands in one write and return their answers, or raise with nothing done."""
        with self._turns, self.database.begin(self.database.writer) as connection:
            accounts, known = self._statements.load(connection, commands)
            cashbacks = self._statements.load_cashbacks(connection, commands)
            to_come = self._statements.count_cashbacks(connection, commands)
            book = Book(accounts, self.clock(), self._new_id, cashbacks, to_come)
            answers = [perform(command, book, known) for command in commands]
            with self.database.committing(connection):
                self._statements.save(connection, book)
        return answers

    def administer(
        self, action: str, details: Mapping[str, str], change: Callable[[Connection, int], None]
    ) -> None:
        """Do in one write what moves no money, with an audit event by the caller `cli`."""
        with self._turns, self.database.begin(self.database.writer) as connection:
            now = self.clock()
            change(connection, now)
            event = {"id": self._new_id(now), "ts": now, "caller": "cli", "action": action}
            connection.execute(insert(AUDIT).values(event | {"details": json.dumps(details)}))

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Open one consistent view of what is committed."""
        with self.database.begin(self.database.reader) as connection:
            yield connection

    async def look(self, function: Callable[..., R], *arguments: Any) -> R:
        """Run what reads a little: inline from a library, in a thread from a server."""
        if not self.database.writers_max:
            return function(*arguments)
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_SECONDS_MAX):
                return await loop.run_in_executor(self._lookers, function, *arguments)
        except TimeoutError:
            raise DatabaseUnavailable(NO_ANSWER) from None

    async def in_thread(self, function: Callable[..., R], *arguments: Any) -> R:
        """Run what reads without a bound outside the event loop, a few at a time."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._readers, function, *arguments)

    def close(self) -> None:
        """End the threads and close the database, after the last answer."""
        for threads in (self._writers, self._lookers, self._readers):
            threads.shutdown()
        self.database.close()

    def due_cashbacks(self, clock: str, until: int, after: tuple[int, str]) -> Sequence[Row[Any]]:
        """Return the next cashbacks to be credited to active accounts, oldest first."""
        with self.read() as connection:
            return self._statements.load_due(connection, clock, until, after)

    def _flush(self, loop: asyncio.AbstractEventLoop) -> None:
        """Write all that waits: inline into a library, in a thread to a server."""
        self._called.discard(loop)
        if not self.database.writers_max:
            batch = self._pending.pop(loop, [])
            self._answer(loop, batch, self.settle([pending.command for pending in batch]))
        elif self._may_write(loop) and (batch := self._take(loop)):
            commands = [pending.command for pending in batch]
            claims = set[object]().union(*(command.claims for command in commands))
            self._under_way[loop].append(len(batch))
            self._claimed[loop] |= claims
            writing = loop.run_in_executor(self._writers, self.settle, commands)
            writing.add_done_callback(partial(self._written, loop, batch, claims))
        elif self._pending.get(loop) and len(self._under_way[loop]) < self.database.writers_max:
            loop.call_later(SMALL_BATCH_SECONDS, self._flush, loop)

    def _may_write(self, loop: asyncio.AbstractEventLoop) -> bool:
        """Tell whether a batch may begin: large ones cost less, so a small one waits a little."""
        sizes, waiting = self._under_way[loop], self._pending.get(loop, ())
        if not waiting or len(sizes) >= self.database.writers_max:
            return False
        waited = loop.time() - waiting[0].arrived_at
        return len(waiting) >= max(sizes, default=0) or waited > SMALL_BATCH_SECONDS

    def _take(self, loop: asyncio.AbstractEventLoop) -> list[Pending]:
        """Return all that waits, but for what must wait for a batch under way.

        Whatever claims the same as a command that waits on must wait as well, so that each
        account is served in turn.
        """
        taken, waiting, claimed = [], [], set(self._claimed[loop])
        for pending in self._pending.pop(loop, ()):
            claims = pending.command.claims
            if pending.answer.done():
                continue  # Its caller was told that nothing is known of it, and tries again.
            if claimed.isdisjoint(claims):
                taken.append(pending)
            else:
                waiting.append(pending)
                claimed |= claims
        if waiting:
            self._pending[loop] = waiting
        return taken

    def _written(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: Sequence[Pending],
        claims: set[object],
        writing: "asyncio.Future[list[Outcome]]",
    ) -> None:
        self._under_way[loop].remove(len(batch))
        self._claimed[loop] -= claims
        self._answer(loop, batch, writing.result())
        self._flush(loop)

    def _answer(
        self,
        loop: asyncio.AbstractEventLoop,
        batch: Sequence[Pending],
        outcomes: Sequence[Outcome],
    ) -> None:
        busy = []
        for pending, outcome in zip(batch, outcomes, strict=True):
            waited = loop.time() - pending.arrived_at
            if isinstance(outcome, DatabaseBusy) and waited < BUSY_SECONDS_MAX:
                busy.append(pending)
            elif pending.answer.done():
                pass  # The caller has gone; what was done stays done.
            elif isinstance(outcome, Exception):
                pending.answer.set_exception(outcome.with_traceback(None))
            else:
                pending.answer.set_result(outcome)
        if busy:
            waiting = self._pending.setdefault(loop, [])
            waiting[:0] = busy
            loop.call_later(BUSY_RETRY_SECONDS, self._flush, loop)


COMMITS_MAX = 4
SMALL_BATCH_SECONDS = 0.01
ANSWER_SECONDS_MAX = 10.0
NO_ANSWER = "The database does not answer: try again"


def give_up(answer: "asyncio.Future[Answer]") -> None:
    """Let a caller wait no longer; what is under way may still be done, as the key will tell."""
    if not answer.done():
        answer.set_exception(DatabaseUnavailable(NO_ANSWER))


Known = dict[str, tuple[str, Answer]]
"""Stored keys, each with the fingerprint of the arguments and the answer that was given."""


def perform(command: Command, book: Book, known: Known) -> Answer:
    """Do one command of a batch, or repeat the answer that its key was given before."""
    key, fingerprint = command.stored_key, command.fingerprint
    if key in known:
        return repeat(fingerprint, *known[key])
    book.first_opened_id = book.last_transaction_id = None
    book.told_at = command.told_at
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
            "account_id": book.first_opened_id or book.account(command.accounts[0]).id,
            "transaction_id": book.last_transaction_id,
            "details": command.arguments,
        }
    )


async def credit_due(ledger: Ledger, clock: Literal["SERVER", "CALLER"], until: int) -> None:
    """Credit every cashback that is due by a clock, oldest first, each as a command of its own."""
    after: tuple[int, str] = (-1, "")
    while due := await ledger.look(ledger.due_cashbacks, clock, until, after):
        await asyncio.gather(*(ledger.submit(cashback_command(row)) for row in due))
        # Onwards from here, because what could not be credited is still due.
        after = (due[-1].due_at, due[-1].payment_id)


def cashback_command(due: Row[Any]) -> Command:
    """Return the command that credits a cashback, at its due time if the caller's clock rules."""
    told_at = due.due_at if due.clock == "CALLER" else None
    command = internal(credit_cashback, [due.account_id], payment_id=due.payment_id)
    return replace(command, told_at=told_at, payment_id=due.payment_id)


def internal(does: Callable[..., Any], accounts: Sequence[Ref], **arguments: Any) -> Command:
    """Return a command of `system`, which no request asked for: a word and its arguments."""

    def run(book: Book) -> Answer:
        does(book, **arguments)
        return Answer(200, "")

    word = WORDS[does]
    return Command("system", word.name, None, json.dumps(arguments), accounts, word, run)


CASHBACK_BATCH_MAX = 500


class Statements:
    """A batch's statements as text, made once: making them costs more than running them."""

    def __init__(self, database: Database) -> None:
        def compiled(statement: ClauseElement) -> str:
            return str(statement.compile(dialect=database.writer.dialect))

        self._database = database
        self._listed, among = database.listed, database.is_among
        self._load_accounts = compiled(accounts_of_a_batch(among))
        answer = (KEY.c.id, KEY.c.fingerprint, KEY.c.status, KEY.c.body, KEY.c.location)
        self._load_answers = compiled(select(*answer).where(among(KEY.c.id, "keys")))
        promised = among(CASHBACK.c.payment_id, "payment_ids")
        self._load_cashbacks = compiled(select(CASHBACK).where(promised).with_for_update())
        to_come = and_(
            CASHBACK.c.credited_at.is_(None),
            CASHBACK.c.amount > sa.literal_column("0"),
            among(CASHBACK.c.account_id, "ids"),
        )
        counted = select(CASHBACK.c.account_id, func.count().label("to_come")).where(to_come)
        self._count_cashbacks = compiled(counted.group_by(CASHBACK.c.account_id))
        credited = update(CASHBACK).where(among(CASHBACK.c.payment_id, "ids"))
        self._credit_cashbacks = compiled(credited.values(credited_at=bindparam("now")))
        self._load_due = compiled(due_cashbacks())

    def load(
        self, connection: Connection, commands: Sequence[Command]
    ) -> tuple[list[LoadedAccount], Known]:
        """Lock and load the accounts that the commands name, and what their keys were answered.

        The accounts come first, in ascending order of id: what is read behind the locks is what
        their last writers left.
        """
        refs = {ref for command in commands for ref in command.accounts}
        named = [ref for ref in refs if isinstance(ref, Named)]
        parameters = {
            "ids": self._listed([ref for ref in refs if isinstance(ref, str)]),
            "names": self._listed([ref.name for ref in named]),
            "assets": self._listed({ref.asset for ref in named}),
            "system_names": self._listed({c.word.system_account for c in commands} - {None}),
        }
        keys = self._listed([c.stored_key for c in commands if c.key is not None])
        queries = [(self._load_accounts, parameters), (self._load_answers, {"keys": keys})]
        accounts, answers = self._database.select_all(connection, queries)
        known = {key: (fingerprint, Answer(*answer)) for key, fingerprint, *answer in answers}
        return [LoadedAccount(*row) for row in accounts], known

    def load_cashbacks(
        self, connection: Connection, commands: Sequence[Command]
    ) -> Sequence[Row[Any]]:
        """Lock and load the cashbacks that the commands credit."""
        payment_ids = [c.payment_id for c in commands if c.payment_id is not None]
        if not payment_ids:
            return ()
        parameters = {"payment_ids": self._listed(payment_ids)}
        return connection.exec_driver_sql(self._load_cashbacks, parameters).all()

    def count_cashbacks(
        self, connection: Connection, commands: Sequence[Command]
    ) -> Mapping[str, int]:
        """Return how many cashbacks are to come to each account that the commands close."""
        ids = [ref for c in commands if c.word.counts_cashbacks for ref in c.accounts]
        if not ids:
            return NONE_TO_COME
        rows = connection.exec_driver_sql(self._count_cashbacks, {"ids": self._listed(ids)})
        return {row.account_id: row.to_come for row in rows}

    def load_due(
        self, connection: Connection, clock: str, until: int, after: tuple[int, str]
    ) -> Sequence[Row[Any]]:
        """Return some cashbacks that are due, from a place in their order on."""
        parameters = {"clock": clock, "until": until, "due_at": after[0], "payment_id": after[1]}
        return connection.exec_driver_sql(self._load_due, parameters).all()

    def save(self, connection: Connection, book: Book) -> None:
        """Write what the book has gathered, in the order that the triggers and keys require."""
        if book.unfrozen:
            # The triggers take entries of active accounts alone.
            unfrozen = [{"id": account_id, "status": "ACTIVE"} for account_id in book.unfrozen]
            self._database.update_all(connection, ACCOUNT, ["status"], unfrozen)
        for table in BATCH_TABLES:
            if rows := book.rows[table]:
                self._database.insert_all(connection, table, rows)
        if book.changed:
            changes = [
                {name: getattr(account, name) for name in ("id", *CHANGING_COLUMNS)}
                for account in book.changed.values()
            ]
            self._database.update_all(connection, ACCOUNT, CHANGING_COLUMNS, changes)
        if book.credited:
            credited = {"ids": self._listed(book.credited), "now": book.now}
            connection.exec_driver_sql(self._credit_cashbacks, credited)


BATCH_TABLES = (ACCOUNT, TRANSACTION, ENTRY, CASHBACK, KEY, AUDIT)


def due_cashbacks() -> Select[Any]:
    """Select what is due by a clock to active accounts, in its order, from a place on."""
    due = and_(CASHBACK.c.clock == bindparam("clock"), CASHBACK.c.due_at <= bindparam("until"))
    # As literals, because the text of the statement is run with its own parameters alone; for
    # the same reason the offset is there, which SQLite's LIMIT would else bring as a parameter.
    waiting = and_(
        CASHBACK.c.credited_at.is_(None), ACCOUNT.c.status == sa.literal_column("'ACTIVE'")
    )
    order = (CASHBACK.c.due_at, CASHBACK.c.payment_id)
    behind = sa.tuple_(*order) > sa.tuple_(bindparam("due_at"), bindparam("payment_id"))
    due_now = select(CASHBACK).join_from(CASHBACK, ACCOUNT).where(due, waiting, behind)
    most: Any = sa.literal_column(str(CASHBACK_BATCH_MAX))
    return due_now.order_by(*order).limit(most).offset(sa.literal_column("0"))


def accounts_of_a_batch(among: IsAmong) -> Select[Any]:
    """Select what is named by id or by name, and the system accounts of the same assets."""
    name, asset = ACCOUNT.c.name, ACCOUNT.c.asset
    by_id = among(ACCOUNT.c.id, "ids")
    by_name = and_(among(name, "names"), among(asset, "assets"))
    other = ACCOUNT.alias("other")
    same_asset = asset.in_(select(other.c.asset).where(among(other.c.id, "ids")))
    system = and_(among(name, "system_names"), or_(same_asset, among(asset, "assets")))
    columns = (ACCOUNT.c[column] for column in ACCOUNT_COLUMNS)
    anyone = or_(by_id, by_name, system)
    return select(*columns).where(anyone).order_by(ACCOUNT.c.id).with_for_update()


# --------------------------------------------------------------------------- The words
# What can happen to money, each as bookkeeping over at most one post. A word knows no URL, no
# dialect and no caller; the type of its book is the least role that may ask for it, and the
# type checker lets no route with a lesser book call it.

ServiceBook = NewType("ServiceBook", Book)
"""The books in the hands of a service, or of an admin."""
AdminBook = NewType("AdminBook", ServiceBook)
"""The books in the hands of an admin."""


class Word(NamedTuple):
    """What a word is called in the audit log, and what a batch must load for it.

    That is the system account on its other side, and how many cashbacks are to come.
    """

    name: str
    system_account: str | None = None
    counts_cashbacks: bool = False


WORDS: dict[Callable[..., Any], Word] = {}


def word(*, system_account: str | None = None, counts_cashbacks: bool = False) -> Callable[[F], F]:
    """Make a function of a book a word, and declare what must be loaded for it."""

    def declare(function: F) -> F:
        WORDS[function] = Word(function.__name__, system_account, counts_cashbacks)
        return function

    return declare


@word()
def open_account(
    book: ServiceBook, *, owner_name: str, asset: str = "USD", name: str | None = None
) -> LoadedAccount:
    """Open an empty account for a customer."""
    if asset not in ASSETS:
        raise AssetNotFound(f"There is no such asset; there are {', '.join(ASSETS)}")
    require_open_loop(asset)
    return book.add(book.new_account(owner_name, asset, name))


@word(system_account="cash")
def open_funded_account(book: Book, *, owner_name: str, name: str, balance: int) -> LoadedAccount:
    """Open an account in US dollars that holds money from the start."""
    account = book.new_account(owner_name, "USD", name)
    if balance:
        legs = [Leg(book.system_account("cash", "USD"), -balance), Leg(account, +balance)]
        book.post("DEPOSIT", legs, memo=None)
    return book.add(account)


@word(system_account="cash")
def deposit(book: ServiceBook, ref: Ref, *, amount: int, memo: str | None = None) -> LoadedAccount:
    """Take money in: DEBIT cash, CREDIT the account."""
    account = book.account(ref)
    require_open_loop(account.asset)
    cash = book.system_account("cash", account.asset)
    book.post("DEPOSIT", [Leg(cash, -amount), Leg(account, +amount)], memo)
    return account


@word(system_account="cash")
def withdraw(book: AdminBook, ref: Ref, *, amount: int, memo: str | None = None) -> LoadedAccount:
    """Pay money out: DEBIT the account, CREDIT cash."""
    account = book.account(ref)
    require_open_loop(account.asset)
    cash = book.system_account("cash", account.asset)
    book.post("WITHDRAWAL", [Leg(account, -amount), Leg(cash, +amount)], memo)
    return account


@word()
def freeze(book: AdminBook, ref: Ref) -> LoadedAccount:
    """Let an account move no money until it is unfrozen."""
    return book.change_status(book.account(ref), "FROZEN")


@word()
def unfreeze(book: AdminBook, ref: Ref) -> LoadedAccount:
    """Let a frozen account move money again."""
    return book.change_status(book.account(ref), "ACTIVE")


@word(counts_cashbacks=True)
def close(book: AdminBook, ref: Ref) -> LoadedAccount:
    """End an account for ever; it must be empty, with nothing to come."""
    return book.change_status(book.account(ref), "CLOSED")


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
    book: ServiceBook, *, source_ref: Ref, dest_ref: Ref, amount: int, memo: str | None = None
) -> Transfer:
    """Move money between two customers: DEBIT the source, CREDIT the destination."""
    if source_ref == dest_ref:
        raise SameAccount("Cannot transfer to the same account")
    source, dest = book.account(source_ref), book.account(dest_ref)
    require_open_loop(source.asset)
    transaction_id = book.post("TRANSFER", [Leg(source, -amount), Leg(dest, +amount)], memo)
    return Transfer(transaction_id, amount, source.asset, memo, book.now, source, dest)


class Payment(NamedTuple):
    """A posted payment, the account after it, what will come back, and its number at the payee."""

    payment_id: str
    account: LoadedAccount
    cashback: Cashback
    ordinal: int


@word(system_account="merchants")
def pay(book: ServiceBook, ref: Ref, *, amount: int, memo: str | None = None) -> Payment:
    """Pay a merchant, and promise a cashback: DEBIT the account, CREDIT merchants."""
    return pay_to("merchants", book, ref, amount=amount, memo=memo)


@word(system_account="payments")
def pay_counted(book: ServiceBook, ref: Ref, *, amount: int) -> Payment:
    """Pay as `pay` does, through the system account whose entries number such payments."""
    return pay_to("payments", book, ref, amount=amount, memo=None)


def pay_to(payee: str, book: Book, ref: Ref, *, amount: int, memo: str | None) -> Payment:
    """Post a payment to a system account; its number is that of the entry there."""
    account = book.account(ref)
    require_open_loop(account.asset)
    outside = book.system_account(payee, account.asset)
    payment_id = book.post("PAYMENT", [Leg(account, -amount), Leg(outside, +amount)], memo)
    amount_back = amount * CASHBACK_PERCENT // 100
    cashback = book.schedule_cashback(payment_id, account, amount_back)
    return Payment(payment_id, account, cashback, outside.last_seq)


@word(system_account="cashback")
def credit_cashback(book: Book, payment_id: str) -> None:
    """Credit a cashback that fell due: DEBIT cashback, CREDIT the account; for 0 post nothing."""
    promised = book.cashback(payment_id)
    account = book.account(promised.account_id)
    if promised.amount:
        ours = book.system_account("cashback", account.asset)
        legs = [Leg(ours, -promised.amount), Leg(account, +promised.amount)]
        book.post("CASHBACK", legs, memo=payment_id)
    book.mark_credited(payment_id)


CLOSED_LOOP = [asset.code for asset in ASSETS.values() if asset.closed_loop]


@word()
def open_wallets(book: ServiceBook, *, owner_name: str, name: str) -> list[LoadedAccount]:
    """Open a customer's wallets, an empty one of each closed-loop asset."""
    opened = [book.new_account(owner_name, asset, name) for asset in CLOSED_LOOP]
    return [book.add(wallet) for wallet in opened]


@word(system_account="treasury")
def open_funded_wallets(
    book: Book, *, owner_name: str, name: str, bonuses: Mapping[str, int]
) -> list[LoadedAccount]:
    """Open a customer's wallets with a bonus in each, in one transaction of several assets."""
    opened = [book.new_account(owner_name, asset, name) for asset in CLOSED_LOOP]
    legs = []
    for wallet in opened:
        amount, treasury = bonuses[wallet.asset], book.system_account("treasury", wallet.asset)
        legs += [Leg(treasury, -amount), Leg(wallet, +amount)]
    book.post("BONUS", legs, memo=None)
    return [book.add(wallet) for wallet in opened]


class Moved(NamedTuple):
    """A posted movement of closed-loop credits, and what the wallet holds after it."""

    transaction_id: str
    new_balance: int


@word(system_account="treasury")
def top_up(book: ServiceBook, ref: Ref, *, amount: int) -> Moved:
    """Issue credits that were bought: DEBIT treasury, CREDIT the wallet."""
    return move_credits("TOP_UP", book, ref, amount)


@word(system_account="treasury")
def bonus(book: ServiceBook, ref: Ref, *, amount: int) -> Moved:
    """Issue credits that are a present: DEBIT treasury, CREDIT the wallet."""
    return move_credits("BONUS", book, ref, amount)


@word(system_account="treasury")
def spend(book: ServiceBook, ref: Ref, *, amount: int) -> Moved:
    """Take credits back for a service: DEBIT the wallet, CREDIT treasury."""
    return move_credits("SPEND", book, ref, -amount)


def move_credits(kind: str, book: Book, ref: Ref, amount: int) -> Moved:
    """Post a signed amount of credits between a wallet and the treasury of its asset."""
    wallet = book.account(ref)
    treasury = book.system_account("treasury", wallet.asset)
    legs = [Leg(treasury, -amount), Leg(wallet, +amount)]
    return Moved(book.post(kind, legs, memo=None), wallet.balance)


# ----------------------------------------------------------------------------- Reading
# What is asked of committed rows, and the check of the invariants. Nothing here writes to the
# ledger.

PAGE_SIZE_DEFAULT = 50
PAGE_SIZE_MAX = 200


def read_account(connection: Connection, account_id: str) -> Row[Any]:
    """Return an account of any kind."""
    row = connection.execute(select(ACCOUNT).where(ACCOUNT.c.id == account_id)).first()
    if row is None:
        raise AccountNotFound(f"There is no account {account_id}")
    return row


def read_named_account(connection: Connection, named: Named) -> Row[Any]:
    """Return a customer's account by a dialect's name for it."""
    found = and_(ACCOUNT.c.name == named.name, ACCOUNT.c.asset == named.asset)
    row = connection.execute(select(ACCOUNT).where(found)).first()
    if row is None:
        raise AccountNotFound(f"There is no account {named.name}")
    return row


def read_accounts_of_dialect(connection: Connection, prefix: str) -> Sequence[Row[Any]]:
    """Return all accounts whose names begin with a dialect's prefix, in the order of names."""
    return connection.execute(
        select(ACCOUNT).where(belongs_to(prefix)).order_by(ACCOUNT.c.name)
    ).all()


def belongs_to(prefix: str) -> ColumnElement[bool]:
    """Return the condition that an account has a name of a dialect."""
    behind = prefix[:-1] + chr(ord(prefix[-1]) + 1)
    return and_(ACCOUNT.c.name >= prefix, ACCOUNT.c.name < behind)


def read_outflows(connection: Connection, prefix: str) -> list[tuple[str, int]]:
    """Return each account of a dialect with all that it has sent and paid, the most first."""
    outgoing = and_(
        ENTRY.c.account_id == ACCOUNT.c.id,
        ENTRY.c.type == "DEBIT",
        TRANSACTION.c.kind.in_(("TRANSFER", "PAYMENT")),
    )
    # The sum may leave 64 bits where no amount does, so it is taken in two parts.
    billions, rest = func.sum(ENTRY.c.amount // 10**9), func.sum(ENTRY.c.amount % 10**9)
    rows = connection.execute(
        select(ACCOUNT.c.name, billions.label("billions"), rest.label("rest"))
        .select_from(ACCOUNT.outerjoin(ENTRY.join(TRANSACTION), outgoing))
        .where(belongs_to(prefix))
        .group_by(ACCOUNT.c.id)
    )
    totals = [(row.name, (row.billions or 0) * 10**9 + (row.rest or 0)) for row in rows]
    return sorted(totals, key=lambda spent: (-spent[1], spent[0]))


def read_cashback(connection: Connection, payment_id: str, clock: str) -> Cashback:
    """Return what a payment brings back."""
    found = and_(CASHBACK.c.payment_id == payment_id, CASHBACK.c.clock == clock)
    row = connection.execute(select(CASHBACK).where(found)).first()
    if row is None:
        raise PaymentNotFound(f"There is no payment {payment_id}")
    return Cashback(**row._mapping)


def read_counted_payment(connection: Connection, ordinal: int) -> str:
    """Return the transaction of a payment that is known by its number."""
    numbered = and_(ENTRY.c.account_id == PAYMENT_COUNTER, ENTRY.c.seq == ordinal)
    payment_id = connection.execute(select(ENTRY.c.transaction_id).where(numbered)).scalar()
    if payment_id is None:
        raise PaymentNotFound(f"There is no payment {ordinal}")
    return str(payment_id)


def read_movements(connection: Connection, account_id: str) -> Sequence[Row[Any]]:
    """Return an account's entries in their order, each with the number and cashback it has."""
    there = ENTRY.alias("there")
    number = and_(there.c.transaction_id == TRANSACTION.c.id, there.c.account_id == PAYMENT_COUNTER)
    back = (CASHBACK.c.amount.label("back"), CASHBACK.c.due_at, CASHBACK.c.credited_at)
    return connection.execute(
        select(ENTRY, TRANSACTION.c.kind, TRANSACTION.c.ts, TRANSACTION.c.told_at)
        .add_columns(there.c.seq.label("ordinal"), *back)
        .join_from(ENTRY, TRANSACTION)
        .outerjoin(there, number)
        .outerjoin(CASHBACK, CASHBACK.c.payment_id == TRANSACTION.c.id)
        .where(ENTRY.c.account_id == account_id)
        .order_by(ENTRY.c.seq)
    ).all()


# The system account whose entries number the payments of a dialect.
PAYMENT_COUNTER = (
    select(ACCOUNT.c.id)
    .where(ACCOUNT.c.name == "payments", ACCOUNT.c.kind == "SYSTEM")
    .scalar_subquery()
)


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


AuditConnection = NewType("AuditConnection", Connection)
"""A view of what is committed in the hands of an auditor, or of an admin."""


class AuditPlace(NamedTuple):
    """How far a list of audit events was read: those of an account's entries, and the others."""

    before_seq: int
    before_id: str

    @classmethod
    def parse(cls, place: str) -> "AuditPlace":
        """Return the place that a cursor holds, or raise InvalidCursor."""
        seq, _, event_id = place.partition("_")
        if not re.fullmatch("[0-9]{1,18}", seq):
            raise InvalidCursor("Invalid cursor")
        return cls(int(seq), event_id)

    def behind(self, rows: Sequence[Row[Any]]) -> str:
        """Return the place behind some more events, as a cursor holds it."""
        seqs = [row.seq for row in rows if row.seq is not None]
        return f"{min([self.before_seq, *seqs])}_{min([self.before_id, *(row.id for row in rows)])}"


def audit_start(connection: AuditConnection, account_id: str | None) -> str:
    """Return the place before all events that there are now, as a cursor holds it."""
    last_seq = select(ACCOUNT.c.last_seq).where(ACCOUNT.c.id == account_id)
    # Ids are hexadecimal, so "g" is behind them all.
    return f"{(connection.execute(last_seq).scalar() or 0) + 1}_g"


def read_audit(
    connection: AuditConnection, account_id: str | None, *, before: AuditPlace, limit: int
) -> Sequence[Row[Any]]:
    """Return audit events before a place, newest first, each with a seq in its account or none.

    The events of an account are those of its entries, and those without any entry.
    """
    events = select(AUDIT, sa.null().label("seq")).order_by(AUDIT.c.id.desc()).limit(limit)
    earlier = events.where(AUDIT.c.id < before.before_id)
    if account_id is None:
        return connection.execute(earlier).all()
    unmoved = and_(AUDIT.c.account_id == account_id, AUDIT.c.transaction_id.is_(None))
    moved = (
        select(AUDIT, ENTRY.c.seq)
        .join(ENTRY, ENTRY.c.transaction_id == AUDIT.c.transaction_id)
        .where(ENTRY.c.account_id == account_id, ENTRY.c.seq < before.before_seq)
        .order_by(ENTRY.c.seq.desc())
        .limit(limit)
    )
    both = [connection.execute(query).all() for query in (moved, earlier.where(unmoved))]
    # Merged and not sorted: each list must stay in the order that its place is found by.
    return list(islice(merge(*both, key=attrgetter("id"), reverse=True), limit))


class Finding(NamedTuple):
    """What one check looked at, and the first row that is wrong, if there is one."""

    invariant: str
    row_count: int
    wrong: str | None


def check(connection: Connection) -> Iterator[Finding]:
    """Verify the invariants that stored rows can show, each over all rows."""
    yield check_storage(connection)
    yield check_transactions(connection)
    yield check_accounts(connection)
    yield check_audit(connection)
    yield check_system_accounts(connection)
    yield check_schema(connection)


def check_storage(connection: Connection) -> Finding:
    """Verify the file and its constraints in SQLite's own way, and all references."""
    wrong = None
    for table in TABLES.values():
        for reference in table.foreign_keys:
            wrong = wrong or lost_reference(connection, reference)
    if connection.dialect.name == "sqlite":
        damage = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
        wrong = wrong if damage == "ok" else str(damage)
    return Finding("pages, constraints and references are sound", len(TABLES), wrong)


def lost_reference(connection: Connection, reference: ForeignKey) -> str | None:
    """Return where a row refers to one that is missing."""
    here, there = reference.parent, reference.column
    known = sa.exists().where(there == here)
    lost = select(here).where(here.is_not(None), ~known).limit(1)
    if connection.execute(lost).first() is None:
        return None
    return f"table {here.table}: a row refers to a missing row of {there.table}"


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
    found, expected = stored_schema(connection), expected_schema(connection.dialect.name)
    differing = sorted(name for name, _ in found ^ expected)
    wrong = f"{differing[0]} is not as it was made" if differing else None
    return Finding("tables, constraints and triggers are as they were made", len(expected), wrong)


Schema = set[tuple[str, str]]
"""The name and the description of whatever a schema is made of."""


def stored_schema(connection: Connection) -> Schema:
    """Return what the database says about its own schema."""
    if connection.dialect.name == "sqlite":
        query = "SELECT name, sql FROM sqlite_schema WHERE sql IS NOT NULL"
        return {tuple(row) for row in connection.exec_driver_sql(query)}
    rows = connection.exec_driver_sql(POSTGRES_SCHEMA).all()
    return {(name, text.replace('"', "")) for name, text in rows}


def expected_schema(dialect: str) -> Schema:
    """Return what a database should say that this program made."""
    if dialect == "sqlite":
        fresh = create_engine("sqlite://")
        with fresh.begin() as connection:
            create_schema(connection)
            return stored_schema(connection)
    schema = {(table.name, described(table)) for table in TABLES.values()}
    schema |= {(str(index.name), "") for table in TABLES.values() for index in table.indexes}
    for trigger in TRIGGERS:
        for statement in trigger_statements(dialect, trigger)[1:]:
            text = statement.replace('"', "") + " O " + trigger_body(trigger).replace('"', "")
            schema.add((statement.split()[2], text))
    return schema


def described(table: Table) -> str:
    """Return a table's columns and kinds of constraints as POSTGRES_SCHEMA words them."""
    columns = [
        f"{c.name} {'text' if c.type is PlainText else 'bigint'} {'f' if c.nullable else 't'}"
        for c in sorted(table.columns, key=attrgetter("name"))
    ]
    kinds = [KINDS[type(constraint)] for constraint in table.constraints]
    return f"{', '.join(columns)} {''.join(sorted(kinds))}"


KINDS: dict[type, str] = {
    sa.CheckConstraint: "c",
    sa.ForeignKeyConstraint: "f",
    sa.PrimaryKeyConstraint: "p",
    sa.UniqueConstraint: "u",
}
POSTGRES_SCHEMA = """
    WITH here AS (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    SELECT relname::text, (
        SELECT string_agg(concat_ws(' ', attname, format_type(atttypid, atttypmod), attnotnull),
            ', ' ORDER BY attname COLLATE "C")
        FROM pg_attribute WHERE attrelid = pg_class.oid AND attnum > 0 AND NOT attisdropped
    ) || ' ' || (
        SELECT string_agg(contype::text, '' ORDER BY contype)
        FROM pg_constraint WHERE conrelid = pg_class.oid AND convalidated AND contype <> 'n'
    )
    FROM pg_class WHERE relkind = 'r' AND relnamespace = (SELECT oid FROM here)
    UNION ALL
    SELECT indexrelid::regclass::text, '' FROM pg_index
    JOIN pg_class ON pg_class.oid = indrelid AND relnamespace = (SELECT oid FROM here)
    WHERE indisvalid AND NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
    UNION ALL
    SELECT tgname::text, concat_ws(' ', replace(pg_get_triggerdef(pg_trigger.oid),
        quote_ident(current_schema()) || '.', ''), tgenabled, prosrc)
    FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
    JOIN pg_class ON pg_class.oid = tgrelid AND relnamespace = (SELECT oid FROM here)
    WHERE NOT tgisinternal
"""


def check_audit(connection: Connection) -> Finding:
    """Verify that every transaction has its audit event."""
    recorded = select(AUDIT.c.transaction_id).where(AUDIT.c.transaction_id.is_not(None))
    lost = select(TRANSACTION.c.id).where(TRANSACTION.c.id.not_in(recorded)).limit(1)
    unrecorded = connection.execute(lost).scalar()
    wrong = f"transaction {unrecorded} has no audit event" if unrecorded else None
    count = connection.execute(select(func.count()).select_from(AUDIT)).scalar_one()
    return Finding("every transaction is in the audit log", count, wrong)


def check_system_accounts(connection: Connection) -> Finding:
    """Verify that none but the known accounts stand outside the rules of customers."""
    held = held_system_accounts(connection)
    strange = sorted(held - SYSTEM_ACCOUNTS)
    wrong = f"{strange[0]} is no system account" if strange else None
    return Finding("system accounts are the known ones", len(held), wrong)


def signed(entry_type: str, amount: int) -> int:
    """Return what an entry adds to its account's balance."""
    return amount if entry_type == "CREDIT" else -amount


# ----------------------------------------------------------------------------- Callers
# Who is asking, and what they may do. In open mode, that is until there is a key, everybody on
# this machine is the caller `local`.

Role = Literal["auditor", "service", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

# The type of a route's first parameter says who may call it.
ROLES_BY_TYPE: dict[object, tuple[Role, ...]] = {
    Connection: ("auditor", "service", "admin"),
    AuditConnection: ("auditor", "admin"),
    ServiceBook: ("service", "admin"),
    AdminBook: ("admin",),
}


def roles_of(function: Callable[..., Any]) -> tuple[Role, ...]:
    """Return the roles that may call a route; one that says nothing cannot be made."""
    first = next(iter(inspect.signature(function).parameters.values()))
    return ROLES_BY_TYPE[first.annotation]


class Caller(NamedTuple):
    """Who is asking: `local`, `admin`, `key:<name>` or `jwt:<sub>`."""

    name: str
    role: Role


LOCAL, ADMIN = Caller("local", "admin"), Caller("admin", "admin")


class Callers:
    """What tells callers apart: the operator's secrets, and the keys in the database."""

    def __init__(self, ledger: "Ledger", settings: Settings) -> None:
        self._ledger = ledger
        self._admin_hash = settings.admin_key and key_hash(settings.admin_key.encode())
        self._jwt_secret = os.fsencode(settings.jwt_secret or "")
        self.load()

    def load(self) -> None:
        """Read all keys, revoked ones too, by their prefix."""
        now = time.monotonic()
        self._keys = {row.prefix: row for row in self._read(select(API_KEY))}
        self._loaded_at = now

    def load_one(self, prefix: str) -> None:
        """Read a key that may have been made a moment ago."""
        for row in self._read(select(API_KEY).where(API_KEY.c.prefix == prefix)):
            self._keys[prefix] = row

    @property
    def open_mode(self) -> bool:
        """Tell whether no key was ever made, and no secret is set."""
        return not (self._keys or self._admin_hash or self._jwt_secret)

    async def caller_of(self, request: Request) -> Caller:
        """Return who sends a request, or raise Forbidden or Unauthorized."""
        if time.monotonic() - self._loaded_at > KEYS_AGE_SECONDS_MAX:
            await self._ledger.look(self.load)
        if self.open_mode:
            require_local(request)
            return LOCAL
        credential = credential_of(request)
        prefix = credential[:KEY_PREFIX_LENGTH].decode("latin-1")
        if prefix.startswith(KEY_PREFIX) and prefix not in self._keys:
            await self._ledger.look(self.load_one, prefix)
        row = self._keys.get(prefix)
        # For the line in the log: of a key that is refused too, but of no unknown text.
        request.scope["key_prefix"] = row and row.prefix
        caller = self._of_key(credential, row) or self._of_token(credential)
        if caller is None:
            raise Unauthorized("The credentials are not valid")
        return caller

    def _of_key(self, credential: bytes, row: Row[Any] | None) -> Caller | None:
        given = key_hash(credential)
        if self._admin_hash and hmac.compare_digest(given, self._admin_hash):
            return ADMIN
        if row is None or row.revoked_at is not None:
            return None
        return Caller(f"key:{row.name}", row.role) if hmac.compare_digest(given, row.hash) else None

    def _of_token(self, credential: bytes) -> Caller | None:
        if not self._jwt_secret:
            return None
        try:
            claims = jwt.decode(credential, self._jwt_secret, [TOKEN_ALGORITHM], TOKEN_OPTIONS)
        except (jwt.PyJWTError, ValueError, ArithmeticError, RecursionError):
            # The last three are what the parser of a hostile token may run into.
            return None
        sub, role, exp = claims["sub"], claims["role"], claims["exp"]
        # By its exact type, because to Python True is a number too.
        is_time = type(exp) in (int, float) and exp < TOKEN_EXP_MAX
        return Caller(f"jwt:{sub}", role) if is_time and role in ROLES and is_name(sub) else None

    def _read(self, query: Select[Any]) -> Sequence[Row[Any]]:
        with self._ledger.read() as connection:
            return connection.execute(query).all()


KEYS_AGE_SECONDS_MAX = 0.5
TOKEN_OPTIONS: Any = {"require": ["sub", "role", "exp"]}
TOKEN_EXP_MAX = 253_402_300_800
"""The end of the year 9999."""


def credential_of(request: Request) -> bytes:
    """Return the one key or token that a request brings, or raise Unauthorized."""
    given = [header for header in request.headers.raw if header[0] in CREDENTIAL_HEADERS]
    name, credential = given[0] if len(given) == 1 else (b"", b"")
    if name == b"authorization":
        scheme, _, credential = credential.partition(b" ")
        credential = credential if scheme.lower() == b"bearer" else b""
    if not credential.strip():
        raise Unauthorized("Send one key or token: X-API-Key, or Authorization: Bearer")
    return credential.strip()


CREDENTIAL_HEADERS = {b"x-api-key", b"authorization"}


def is_name(given: object) -> bool:
    """Tell whether something can name a caller: 1 to 200 printable characters."""
    return isinstance(given, str) and 0 < len(given.strip()) <= 200 and given.isprintable()


KEY_PREFIX, KEY_PREFIX_LENGTH = "lk_", 11


def new_api_key() -> tuple[str, str]:
    """Return a new key and its prefix, the part that is no secret: "lk_1f0a9c3e"."""
    prefix = f"{KEY_PREFIX}{secrets.token_hex(4)}"
    return f"{prefix}_{secrets.token_urlsafe(32)}", prefix


def key_hash(key: bytes) -> str:
    """Return what is stored of a key; its 256 random bits need no slow hash."""
    return hashlib.sha256(key).hexdigest()


def insert_key(connection: Connection, now: int, row: Mapping[str, str]) -> None:
    """Store a key, or raise StartRefused where its name was ever used."""
    if connection.execute(select(API_KEY).where(API_KEY.c.name == row["name"])).first():
        raise StartRefused(f"there is or was a key {row['name']!r}: choose another name")
    connection.execute(insert(API_KEY).values({**row, "created_at": now}))


def revoke_key(connection: Connection, now: int, name: str) -> None:
    """End a key, or raise StartRefused where none of that name is valid."""
    valid = and_(API_KEY.c.name == name, API_KEY.c.revoked_at.is_(None))
    if not connection.execute(update(API_KEY).where(valid).values(revoked_at=now)).rowcount:
        raise StartRefused(f"there is no key {name!r} that is still valid")


def require_local(request: Request) -> None:
    """Refuse whoever is not on this machine: another peer, a proxy, a page of another site."""
    forwarded = (b"forwarded", b"x-forwarded", b"x-real-ip", b"via")
    if any(name.startswith(forwarded) for name, _ in request.headers.raw):
        raise Forbidden("In open mode no proxy may stand in front of the ledger")
    peer = request.client.host if request.client else ""
    # A test client's peer cannot come over a network.
    if not is_loopback(peer) and peer != "testclient":
        raise Forbidden("In open mode only callers on this machine are served")
    hosts = request.headers.getlist("host")
    if len(hosts) != 1 or not is_local_host(hosts[0]):
        raise Forbidden("In open mode the Host must be this machine's own name")
    origins = request.headers.getlist("origin")
    foreign = request.headers.get("sec-fetch-site") == "cross-site"
    if foreign or not all(is_local_host(origin.partition("://")[2]) for origin in origins):
        raise Forbidden("In open mode no page of another site is served")


@lru_cache(maxsize=1_000)
def is_loopback(address: str) -> bool:
    """Tell whether an address is this machine's own."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    return (getattr(parsed, "ipv4_mapped", None) or parsed).is_loopback


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


class ExactRoute(APIRoute):
    """A route that is nowhere but at its path."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, responses=PROBLEMS, **options)
        # Python's $ also matches before a last newline, so "/accounts%0A" would be served.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")


class LedgerRoute(ExactRoute):
    """A route that asks who is calling, then for the role, the key, the body and the schema."""

    def __init__(
        self, *args: Any, roles: Sequence[Role], key_rule: KeyRule, **options: Any
    ) -> None:
        self.roles = roles
        self.key_rule = key_rule
        super().__init__(*args, **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return FastAPI's handler behind the checks that come before it."""
        handle = super().get_route_handler()

        async def let_in(request: Request) -> Response:
            admitted = LedgerRequest(request.scope, request.receive)
            began = time.monotonic()
            admitted.caller = await admit(request, self.roles)
            admitted.key = read_key(request, self.key_rule)
            if self.body_field:
                require_json(request)
                admitted.content = await read_body(request)
                admitted.document = parse_json(admitted.content)
            elif "GET" not in (self.methods or ()):
                require_no_body(await read_body(request))
            if time.monotonic() - began > KEYS_AGE_SECONDS_MAX:
                # The body took its time, and the key may have been revoked since.
                await admit(request, self.roles)
            return await handle(admitted)

        return let_in


async def admit(request: Request, roles: Sequence[Role]) -> str:
    """Return the caller's name, or raise Unauthorized or Forbidden."""
    caller = await request.app.state.callers.caller_of(request)
    # For the line in the log.
    request.scope["caller"] = caller.name
    if caller.role not in roles:
        raise Forbidden(f"The role {caller.role} may not do this: it takes {' or '.join(roles)}")
    return str(caller.name)


def require_no_body(body: bytes) -> None:
    """Refuse what would be ignored; an empty object says nothing either."""
    if body and parse_json(body) != {}:
        nothing = {"pointer": "", "detail": "No body is expected here"}
        raise InvalidRequest("The request does not fit: see errors", errors=[nothing])


def read_key(request: Request, rule: KeyRule) -> str | None:
    """Return the Idempotency-Key, bare or without its quotes, or raise what is wrong with it."""
    if rule == "none":
        return None
    keys = request.headers.getlist("idempotency-key")
    if not keys:
        if rule == "required":
            raise IdempotencyKeyMissing("The header Idempotency-Key is required here")
        return None
    if len(keys) > 1:
        raise IdempotencyKeyInvalid("The Idempotency-Key must be given once")
    return parse_key(keys[0])


def parse_key(given: str) -> str:
    """Return a key without its quotes, or raise IdempotencyKeyInvalid."""
    key = re.fullmatch(r'[ \t]*(?:"([!#-~]{1,255})"|((?!")[!-~]{1,255}))[ \t]*', given)
    if key is None:
        raise IdempotencyKeyInvalid("The Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key[1] or key[2]


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
    declared, body = request.headers.get("content-length", "").lstrip("0"), bytearray()
    if len(declared) > len(str(BODY_BYTES_MAX)) or int(declared or "0") > BODY_BYTES_MAX:
        raise BodyTooLarge(f"The body may have at most {BODY_BYTES_MAX} bytes")
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > BODY_BYTES_MAX:
                raise BodyTooLarge(f"The body may have at most {BODY_BYTES_MAX} bytes")
    except ClientDisconnect:
        raise MalformedJson("The body did not arrive as a whole") from None
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """Return the document of an RFC 8259 body in UTF-8, without anything ambiguous in it."""
    try:
        text = body.decode()
        document = JSON.decode(text)
        if "\\u" in text:
            # An escape can write half of a surrogate pair, which is no character at all.
            json.dumps(document, ensure_ascii=False, default=str).encode()
    except UnicodeError:
        raise MalformedJson("The body must be UTF-8, without lone surrogates") from None
    except RecursionError:
        raise MalformedJson("The body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise MalformedJson(f"The body must be one JSON document: {error.msg}") from None
    except (ValueError, ArithmeticError):
        raise MalformedJson("A number in the body is too large") from None
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


JSON = json.JSONDecoder(
    object_pairs_hook=unique_members, parse_constant=refuse_constant, parse_float=Decimal
)


@dataclass(frozen=True)
class NamesAccount:
    """Marks an argument that names an account: by its id, or by a dialect's name for it."""

    prefix: str = ""
    asset: str = ""

    def ref(self, value: str) -> Ref:
        """Return what the ledger calls the account."""
        return self.named(value) if self.prefix else value

    def named(self, value: str) -> Named:
        """Return the name and the asset of a dialect's account."""
        # PostgreSQL cannot even ask for NUL; no name holds it, nor any other control character.
        return Named(self.prefix + value.replace("\0", "\1"), self.asset)

    def own_name(self, account: LoadedAccount | Row[Any]) -> str:
        """Return what the dialect calls an account."""
        return str(account.name).removeprefix(self.prefix)


class CarriesKey:
    """Marks an argument that is the idempotency key, for callers who cannot send a header.

    It is no part of what is asked, so its field must be excluded from the arguments.
    """


class TellsTime:
    """Marks an argument that is the caller's own time, in milliseconds."""


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


def require_plain_digits(given: Any) -> Any:
    """Refuse in a query what Python takes for an integer, but nobody writes as one."""
    if isinstance(given, str) and not re.fullmatch("-?[0-9]{1,40}", given):
        raise PydanticCustomError("integer", "Input should be a valid integer")
    return given


UUID_PATTERN = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"

Amount = Annotated[int, Field(strict=True, ge=1, le=AMOUNT_MAX, description="Minor units")]
PrintableText = Annotated[str, AfterValidator(require_printable)]
Printable = Annotated[PrintableText, StringConstraints(max_length=200)]
Name = Annotated[Printable, AfterValidator(require_not_blank)]
Uuid = Annotated[str, StringConstraints(pattern=UUID_PATTERN)]
AccountId = Annotated[Uuid, NamesAccount()]
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


PlainInt = Annotated[int, BeforeValidator(require_plain_digits)]
Limit = Annotated[PlainInt, Query(ge=1, le=PAGE_SIZE_MAX)]
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
        form = "[0-9]{1,18}" if isinstance(start, int) else "[0-9a-g_-]{1,60}"
        if cursor != self._cursor(place) or not re.fullmatch(form, place):
            raise InvalidCursor("Invalid cursor")
        return type(start)(place)

    def page(
        self, rows: Sequence[Row[Any]], *, limit: int, place: Callable[[Sequence[Row[Any]]], Any]
    ) -> dict[str, Any]:
        """Return `limit` rows, and a cursor to the place behind them if there are more."""
        items, more = rows[:limit], len(rows) > limit
        return {"items": items, "next_cursor": self._cursor(str(place(items))) if more else None}

    def _cursor(self, place: str) -> str:
        scope = json.dumps([*self._scope, place])
        return f"{place}.{hashlib.sha256(scope.encode()).hexdigest()[:16]}"


def last(column: str) -> Callable[[Sequence[Row[Any]]], Any]:
    """Return a function from rows to a column of the last one."""
    return lambda rows: getattr(rows[-1], column)


Wordings = Mapping[type[LedgerError], Wording]
NO_WORDING: Wordings = {}
Seeds = Callable[[Settings, bool], Sequence[Command]]


class Face:
    """A set of routes that speak one dialect, each made from one typed function.

    `wording` says how the dialect words some errors, and `exponent` with how many decimal
    places it shows amounts there. A route that is told the caller's time first credits what is
    due by it. `seeds` makes the commands that give a new ledger its first accounts.
    """

    def __init__(
        self,
        name: str,
        prefix: str,
        *,
        wording: Wordings = NO_WORDING,
        exponent: int | None = None,
        seeds: Seeds = lambda settings, demo: (),
    ) -> None:
        self.name = name
        self.prefix = prefix
        self.seeds = seeds
        self.routes: list[APIRoute] = []
        self._wording = wording
        self._exponent = exponent

    def command(
        self,
        path: str,
        does: Callable[..., Any],
        *,
        key: KeyRule = "optional",
        names: Callable[[dict[str, Any]], Sequence[Ref]] | None = None,
        wording: Wordings = NO_WORDING,
        location: str = "",
        status: int = 200,
    ) -> Callable[[F], F]:
        """Make a function of the book a POST route, whose calls go through the batch.

        `location` is a template over the result, such as "/accounts/{0.id}". `names` finds the
        accounts where marked arguments are not enough.
        """
        operation = f"POST {self.prefix}{path}"

        def declare(function: F) -> F:
            find_accounts = names or named_accounts(function)
            find_time = only_mark(function, TellsTime, from_milliseconds)
            find_key = only_mark(function, CarriesKey, parse_key)

            async def endpoint(request: LedgerRequest, **arguments: Any) -> Response:
                command = Command(
                    caller=request.caller,
                    operation=operation,
                    key=one_key(request.key, find_key(arguments)),
                    arguments=to_json(arguments).decode(),
                    accounts=find_accounts(arguments),
                    word=WORDS[does],
                    run=partial(answer, arguments=arguments),
                    told_at=find_time(arguments),
                )
                ledger: Ledger = request.app.state.ledger
                await credit_before(ledger, command.told_at)
                return respond(await ledger.submit(command))

            def answer(book: Book, arguments: dict[str, Any]) -> Answer:
                try:
                    result = function(book, **arguments)
                except LedgerError as error:
                    raise self._worded(error, wording) from None
                return Answer(status, result.model_dump_json(), location.format(result) or None)

            options = {"key_rule": key, "status_code": status}
            self._add("POST", path, function, endpoint, **options)
            return function

        return declare

    def read(self, path: str, *, unbounded: bool = False) -> Callable[[F], F]:
        """Make a function of a reading connection a GET route; an unbounded one gets a thread."""

        def declare(function: F) -> F:
            find_time = only_mark(function, TellsTime, from_milliseconds)

            async def endpoint(request: LedgerRequest, **arguments: Any) -> Response:
                ledger: Ledger = request.app.state.ledger
                await credit_before(ledger, find_time(arguments))
                run = ledger.in_thread if unbounded else ledger.look
                content = await run(answer, ledger, arguments)
                return Response(content, media_type="application/json")

            def answer(ledger: Ledger, arguments: dict[str, Any]) -> str:
                try:
                    with ledger.read() as connection:
                        return str(function(connection, **arguments).model_dump_json())
                except LedgerError as error:
                    raise self._worded(error, NO_WORDING) from None

            self._add("GET", path, function, endpoint, key_rule="none")
            return function

        return declare

    def _worded(self, error: LedgerError, of_route: Wordings) -> LedgerError:
        wording = of_route.get(type(error)) or self._wording.get(type(error))
        return error.worded(wording, self._exponent) if wording else error

    def _add(
        self, method: str, path: str, function: Callable[..., Any], endpoint: Any, **options: Any
    ) -> None:
        signature = inspect.signature(function)
        request = inspect.Parameter("request", inspect.Parameter.KEYWORD_ONLY, annotation=Request)
        typed = [p.replace(kind=request.kind) for p in list(signature.parameters.values())[1:]]
        endpoint.__signature__ = inspect.Signature([request, *typed])
        endpoint.__name__, endpoint.__doc__ = function.__name__, function.__doc__
        roles, takes_key = roles_of(function), options["key_rule"] != "none"
        header = KEY_HEADER | {"required": options["key_rule"] == "required"}
        self.routes.append(
            LedgerRoute(
                self.prefix + path,
                endpoint,
                methods=[method],
                response_model=signature.return_annotation,
                tags=[self.name],
                roles=roles,
                openapi_extra=CREDENTIALS | ({"parameters": [header]} if takes_key else {}),
                description=f"{function.__doc__}\n\nRoles: {', '.join(roles)}.",
                **options,
            )
        )


CREDENTIALS: dict[str, Any] = {"security": [{"X-API-Key": []}, {"Bearer": []}]}
SECURITY_SCHEMES = {
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "A key, or a JWT"},
}
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


async def credit_before(ledger: Ledger, told_at: int | None) -> None:
    """Credit what is due by the caller's clock, if the request tells a time."""
    if told_at is not None:
        await credit_due(ledger, "CALLER", told_at)


def only_mark(
    function: Callable[..., Any], mark: type[T], convert: Callable[[Any], R]
) -> Callable[[dict[str, Any]], R | None]:
    """Return a function from a route's arguments to the one that has a mark, if it was given."""
    places = marked(function, mark)

    def find(arguments: dict[str, Any]) -> R | None:
        for _, place in places:
            if (given := place(arguments)) is not None:
                return convert(given)
        return None

    return find


def from_milliseconds(milliseconds: int) -> int:
    """Return a time of a caller's clock as it is stored."""
    return milliseconds * 1_000


def one_key(in_header: str | None, in_body: str | None) -> str | None:
    """Return the key, wherever it stands, or raise IdempotencyKeyInvalid where there are two."""
    if in_header and in_body and in_header != in_body:
        raise IdempotencyKeyInvalid("The key in the body differs from the one in the header")
    return in_header or in_body


def named_accounts(function: Callable[..., Any]) -> Callable[[dict[str, Any]], list[Ref]]:
    """Return a function from a route's arguments to the accounts that they name."""
    places = marked(function, NamesAccount)
    return lambda arguments: [mark.ref(find(arguments)) for mark, find in places]


def marked(function: Callable[..., Any], mark: type[T]) -> list[tuple[T, Callable[..., Any]]]:
    """Return each mark of a kind on a route's arguments, and how to find the value there."""
    found: list[tuple[T, Callable[..., Any]]] = []
    for name, parameter in inspect.signature(function).parameters.items():
        marks = [m for m in get_args(parameter.annotation) if isinstance(m, mark)]
        found += [(m, itemgetter(name)) for m in marks]
        for member, declared in getattr(parameter.annotation, "model_fields", {}).items():
            marks = [m for m in declared.metadata if isinstance(m, mark)]
            found += [(m, partial(member_of, name, member)) for m in marks]
    return found


def member_of(name: str, member: str, arguments: dict[str, Any]) -> Any:
    """Return a member of one of the arguments."""
    return getattr(arguments[name], member)


class Health(BaseModel):
    """That the database answers."""

    status: Literal["ok"] = "ok"


async def get_health(request: Request) -> Health:
    """Tell whether the server and its database answer."""
    ledger: Ledger = request.app.state.ledger
    await ledger.look(ledger.database.require_health)
    return Health()


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
    if refusal.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="ledger"'
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
            # All else that the framework raises is about a Content-Type that it cannot parse.
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
canonical.routes.append(ExactRoute("/health", get_health, tags=["ledger"]))


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
def post_transfer(book: ServiceBook, body: TransferCreate) -> TransferPublic:
    """Move money between two customers' accounts, at once and as a whole."""
    refs = {"source_ref": body.source_account_id, "dest_ref": body.dest_account_id}
    done = transfer(book, **refs, amount=body.amount, memo=body.memo)
    return TransferPublic.model_validate(done)


class CashCreate(RequestBody):
    """An amount that comes in or goes out."""

    amount: Amount
    memo: Printable | None = None


@canonical.command("/accounts/{account_id}/deposit", deposit, key="required")
def post_deposit(book: ServiceBook, account_id: AccountId, body: CashCreate) -> AccountPublic:
    """Take money in for an account."""
    account = deposit(book, account_id, amount=body.amount, memo=body.memo)
    return AccountPublic.model_validate(account)


@canonical.command("/accounts/{account_id}/withdraw", withdraw, key="required")
def post_withdrawal(book: AdminBook, account_id: AccountId, body: CashCreate) -> AccountPublic:
    """Pay money out of an account."""
    account = withdraw(book, account_id, amount=body.amount, memo=body.memo)
    return AccountPublic.model_validate(account)


class AccountCreate(RequestBody):
    """A new account; see the README for the assets that there are."""

    owner_name: Name
    asset: Name = "USD"


@canonical.command("/accounts", open_account, status=201, location="/accounts/{0.id}")
def post_account(book: ServiceBook, body: AccountCreate) -> AccountPublic:
    """Open an account for a customer."""
    account = open_account(book, owner_name=body.owner_name, asset=body.asset)
    return AccountPublic.model_validate(account)


@canonical.read("/accounts")
def get_accounts(
    connection: Connection,
    limit: Limit = PAGE_SIZE_DEFAULT,
    cursor: Cursor = None,
    owner_name: Printable | None = None,
    name: Annotated[PrintableText, StringConstraints(max_length=220)] | None = None,
) -> Page[AccountPublic]:
    """List the customers' accounts, oldest first."""
    listing = Listing("accounts", owner_name, name)
    after = listing.position(cursor, "")
    wanted = {"owner_name": owner_name, "name": name}
    rows = read_customer_accounts(connection, after_id=after, limit=limit + 1, wanted=wanted)
    return Page[AccountPublic].model_validate(listing.page(rows, limit=limit, place=last("id")))


@canonical.read("/accounts/{account_id}")
def get_account(connection: Connection, account_id: AccountId) -> AccountPublic:
    """Show an account."""
    return AccountPublic.model_validate(read_account(connection, account_id))


@canonical.command("/accounts/{account_id}/freeze", freeze)
def post_freeze(book: AdminBook, account_id: AccountId) -> AccountPublic:
    """Let an account move no money, in or out, until it is unfrozen."""
    return AccountPublic.model_validate(freeze(book, account_id))


@canonical.command("/accounts/{account_id}/unfreeze", unfreeze)
def post_unfreeze(book: AdminBook, account_id: AccountId) -> AccountPublic:
    """Let a frozen account move money again."""
    return AccountPublic.model_validate(unfreeze(book, account_id))


@canonical.command("/accounts/{account_id}/close", close)
def post_close(book: AdminBook, account_id: AccountId) -> AccountPublic:
    """End an empty account for ever."""
    return AccountPublic.model_validate(close(book, account_id))


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
    return Page[EntryPublic].model_validate(listing.page(rows, limit=limit, place=last("seq")))


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


class CashbackPublic(Public):
    """What a payment brings back: SCHEDULED until it is due, then CREDITED."""

    amount: int
    due_at: Timestamp
    status: str


class PaymentCreate(RequestBody):
    """A payment to a merchant."""

    account_id: AccountId
    amount: Amount
    memo: Printable | None = None


class PaymentPublic(Public):
    """A payment, which is a transaction, the account, and what comes back."""

    payment_id: str
    account: AccountPublic
    cashback: CashbackPublic


@canonical.command("/payments", pay, key="required")
def post_payment(book: ServiceBook, body: PaymentCreate) -> PaymentPublic:
    """Pay at once, and get 2 % back after 24 hours."""
    paid = pay(book, body.account_id, amount=body.amount, memo=body.memo)
    return PaymentPublic.model_validate(paid)


@canonical.read("/payments/{payment_id}")
def get_payment(connection: Connection, payment_id: Uuid) -> PaymentPublic:
    """Show a payment, the account as it is now, and where the cashback stands."""
    cashback = read_cashback(connection, payment_id, "SERVER")
    account = read_account(connection, cashback.account_id)
    shown = {"payment_id": payment_id, "account": account, "cashback": cashback}
    return PaymentPublic.model_validate(shown)


class AuditEventPublic(Public):
    """Who did what and when; `details` are the arguments, as they were asked."""

    id: str
    ts: Timestamp
    caller: str
    action: str
    account_id: str | None
    transaction_id: str | None
    details: Annotated[dict[str, Any], BeforeValidator(json.loads)]


@canonical.read("/audit")
def get_audit(
    connection: AuditConnection,
    limit: Limit = PAGE_SIZE_DEFAULT,
    cursor: Cursor = None,
    account_id: AccountId | None = None,
) -> Page[AuditEventPublic]:
    """List what was done, newest first; of one account, all that touched it."""
    listing = Listing("audit", account_id)
    start = audit_start(connection, account_id)
    before = AuditPlace.parse(listing.position(cursor, start))
    rows = read_audit(connection, account_id, before=before, limit=limit + 1)
    page = listing.page(rows, limit=limit, place=before.behind)
    return Page[AuditEventPublic].model_validate(page)


# ------------------------------------------------------------------- /bank, the banking kata
# Accounts under the caller's own names, by the caller's own clock in milliseconds.

BANK_NAMES = NamesAccount("bank:", "USD")

bank = Face(
    "bank",
    prefix="/bank",
    wording={
        AccountExists: Wording(409, "Account already exists"),
        AccountNotFound: Wording(404, "Account not found"),
    },
)
bank.routes.append(ExactRoute("/bank/health", get_health, tags=["bank"]))

Milliseconds = Annotated[int, Field(strict=True, ge=0, le=2**53), TellsTime()]
QueryMilliseconds = Annotated[PlainInt, Query(ge=0, le=2**53), TellsTime()]
MaybeMilliseconds = Annotated[PlainInt | None, Query(ge=0, le=2**53), TellsTime()]
BankName = Annotated[Name, BANK_NAMES]
BankAmount = Annotated[int, Field(strict=True, ge=1, le=BALANCE_MAX)]


class BankAccountCreate(RequestBody):
    """A new account under a name of the caller's own."""

    timestamp: Milliseconds
    account_id: BankName


class BankAccountCreated(Public):
    """That an account was made."""

    account_id: str
    created: bool = True


@bank.command("/accounts", open_account, status=201)
def post_bank_account(book: ServiceBook, body: BankAccountCreate) -> BankAccountCreated:
    """Open an account under a name of the caller's own, unique for ever."""
    named = BANK_NAMES.named(body.account_id)
    open_account(book, owner_name=body.account_id, asset=named.asset, name=named.name)
    return BankAccountCreated(account_id=body.account_id)


class BankAccounts(Public):
    """All names, sorted."""

    accounts: list[str]


@bank.read("/accounts", unbounded=True)
def get_bank_accounts(connection: Connection) -> BankAccounts:
    """List the names of all accounts."""
    rows = read_accounts_of_dialect(connection, BANK_NAMES.prefix)
    return BankAccounts(accounts=[BANK_NAMES.own_name(row) for row in rows])


class BankAccountBalance(Public):
    """An account's balance in minor units."""

    account_id: str
    balance: int


@bank.read("/accounts/{name:path}/balance")
def get_bank_balance(
    connection: Connection, name: str, timestamp: MaybeMilliseconds = None
) -> BankAccountBalance:
    """Show a balance, after what is due by then was credited."""
    account = read_named_account(connection, BANK_NAMES.named(name))
    return BankAccountBalance(account_id=name, balance=account.balance)


class BankMovement(RequestBody):
    """An amount for an account, at the caller's time."""

    timestamp: Milliseconds
    account_id: BankName
    amount: BankAmount


class BankBalance(Public):
    """A balance in minor units."""

    balance: int


@bank.command("/deposits", deposit)
def post_bank_deposit(book: ServiceBook, body: BankMovement) -> BankBalance:
    """Take money in for an account."""
    return BankBalance.model_validate(
        deposit(book, BANK_NAMES.named(body.account_id), amount=body.amount)
    )


class BankTransfer(RequestBody):
    """A transfer between two names, at the caller's time."""

    timestamp: Milliseconds
    source_account_id: BankName
    target_account_id: BankName
    amount: BankAmount


TRANSFER_FAILED = dict.fromkeys(
    (AccountNotFound, SameAccount, InsufficientFunds), Wording(400, "Transfer failed")
)
PAYMENT_FAILED = dict.fromkeys((AccountNotFound, InsufficientFunds), Wording(400, "Payment failed"))


@bank.command("/transfers", transfer, wording=TRANSFER_FAILED)
def post_bank_transfer(book: ServiceBook, body: BankTransfer) -> BankBalance:
    """Move money, and show the balance of the source."""
    source = BANK_NAMES.named(body.source_account_id)
    target = BANK_NAMES.named(body.target_account_id)
    done = transfer(book, source_ref=source, dest_ref=target, amount=body.amount)
    return BankBalance.model_validate(done.source)


class BankPayment(Public):
    """What a payment is called: payment1, payment2 and so on."""

    payment_id: str


@bank.command("/payments", pay_counted, wording=PAYMENT_FAILED)
def post_bank_payment(book: ServiceBook, body: BankMovement) -> BankPayment:
    """Pay, and get 2 % back after 24 hours of the caller's clock."""
    paid = pay_counted(book, BANK_NAMES.named(body.account_id), amount=body.amount)
    return BankPayment(payment_id=f"payment{paid.ordinal}")


class BankPaymentStatus(Public):
    """Where a payment stands: IN_PROGRESS or CASHBACK_RECEIVED."""

    payment_id: str
    status: str


@bank.read("/payments/{payment_id}")
def get_bank_payment(
    connection: Connection, payment_id: str, account_id: Printable, timestamp: QueryMilliseconds
) -> BankPaymentStatus:
    """Show where a payment of an account stands."""
    cashback = read_cashback(connection, counted_payment(connection, payment_id), "CALLER")
    if BANK_NAMES.own_name(read_account(connection, cashback.account_id)) != account_id:
        raise PaymentNotFound("There is no such payment of this account")
    status = "IN_PROGRESS" if cashback.credited_at is None else "CASHBACK_RECEIVED"
    return BankPaymentStatus(payment_id=payment_id, status=status)


def counted_payment(connection: Connection, payment_id: str) -> str:
    """Return the transaction that is called "paymentN"."""
    ordinal = re.fullmatch("payment([1-9][0-9]{0,17})", payment_id)
    if ordinal is None:
        raise PaymentNotFound("There is no such payment")
    return read_counted_payment(connection, int(ordinal[1]))


class BankTopSpenders(Public):
    """Names with what they have spent, as "name(total)"."""

    top_spenders: list[str]


@bank.read("/top-spenders", unbounded=True)
def get_bank_top_spenders(
    connection: Connection,
    timestamp: QueryMilliseconds,
    n: Annotated[PlainInt, Query(ge=1, le=200)],
) -> BankTopSpenders:
    """List who has sent and paid the most, and then by name."""
    ranked = read_outflows(connection, BANK_NAMES.prefix)[:n]
    names = [f"{name.removeprefix(BANK_NAMES.prefix)}({total})" for name, total in ranked]
    return BankTopSpenders(top_spenders=names)


class BankOperation(Public):
    """A line of an account's history; `transaction_id` rises in the order of arrival."""

    transaction_id: int
    timestamp: int
    operation: str
    amount: int
    payment_ref: str | None = None
    deposited: bool | None = None


class BankOperations(Public):
    """An account's history, by timestamp, and then in the order of arrival."""

    account_id: str
    transactions: list[BankOperation]


@bank.read("/accounts/{name:path}/transactions", unbounded=True)
def get_bank_transactions(
    connection: Connection, name: str, timestamp: QueryMilliseconds
) -> BankOperations:
    """List everything that happened to an account, and the cashbacks that are to come."""
    account = read_named_account(connection, BANK_NAMES.named(name))
    lines = bank_operations(account, read_movements(connection, account.id))
    lines.sort(key=lambda line: (line.timestamp, line.transaction_id))
    return BankOperations(account_id=name, transactions=lines)


def bank_operations(account: Row[Any], movements: Sequence[Row[Any]]) -> list[BankOperation]:
    """Return the lines of a history: 1 is its beginning, 2n its nth entry, 2n + 1 its cashback."""
    opened_at = milliseconds(account.told_at, account.created_at)
    lines = [BankOperation(transaction_id=1, timestamp=opened_at, operation="created", amount=0)]
    for row in movements:
        if row.kind == "CASHBACK":
            continue  # It has its line since the moment of the payment.
        line = {"transaction_id": 2 * row.seq, "timestamp": milliseconds(row.told_at, row.ts)}
        operation = bank_operation(row)
        lines.append(BankOperation(operation=operation, amount=row.amount, **line))
        if row.back is not None:
            lines.append(
                BankOperation(
                    transaction_id=2 * row.seq + 1,
                    timestamp=row.due_at // 1_000,
                    operation="cashback",
                    amount=row.back,
                    payment_ref=operation,
                    deposited=row.credited_at is not None,
                )
            )
    return lines


def milliseconds(told_at: int | None, server_time: int) -> int:
    """Return the caller's time, or else the server's, as this dialect counts."""
    return (server_time if told_at is None else told_at) // 1_000


def bank_operation(row: Row[Any]) -> str:
    """Return what this dialect calls an entry."""
    if row.kind == "PAYMENT":
        return f"payment{row.ordinal or ''}"
    names = {
        ("DEPOSIT", "CREDIT"): "deposited",
        ("WITHDRAWAL", "DEBIT"): "withdrawn",
        ("TRANSFER", "DEBIT"): "transferred out",
        ("TRANSFER", "CREDIT"): "transferred in",
    }
    return names[row.kind, row.type]


# ------------------------------------------------------------------- /atm, the cash machine
# Accounts under numbers; amounts are decimal text with two places.

ATM_NUMBERS = NamesAccount("atm:", "USD")
ATM_EXPONENT = ASSETS["USD"].exponent
ATM_DEMO = {
    "1001": "1000.00",
    "1002": "250.50",
    "1003": "0.00",
    "1004": "500.00",
    "1005": "123.45",
    "1006": "9999.99",
}


def atm_seeds(settings: Settings, demo: bool) -> list[Command]:
    """Return the commands that open the accounts that PRELOAD_ACCOUNTS or the demo names."""
    balances = dict(ATM_DEMO) if demo else {}
    if settings.preload_accounts is not None:
        balances = parse_preload(settings.preload_accounts)
    return [atm_seed(number, amount) for number, amount in balances.items()]


def atm_seed(number: str, amount: str) -> Command:
    """Return the command that opens an account with a balance, unless there is one."""
    named, balance = ATM_NUMBERS.named(number), rounded_minor_units(amount, ATM_EXPONENT)
    opening = {"owner_name": number, "name": named.name, "balance": balance}
    return internal(open_funded_account, [named], **opening)


def parse_preload(document: str) -> dict[str, str]:
    """Return the balances in PRELOAD_ACCOUNTS by account number, or raise StartRefused."""
    try:
        return PRELOAD.validate_python(parse_json(document.encode()))
    except (LedgerError, ValidationError, UnicodeError):
        example = '{"1001": "500.00"}'
        raise StartRefused(f"PRELOAD_ACCOUNTS must be a JSON object such as {example}") from None


Balance = Annotated[str, StringConstraints(pattern="^[0-9]{1,13}([.][0-9]{1,20})?$")]
Number = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern="^[!-~]+$")]
PRELOAD = TypeAdapter(dict[Number, Balance])

atm = Face(
    "atm",
    prefix="/atm",
    wording={
        AccountNotFound: Wording(404, "account not found"),
        InsufficientFunds: Wording(400, "insufficient funds"),
    },
    exponent=ATM_EXPONENT,
    seeds=atm_seeds,
)


def parse_dollars(given: Any) -> int:
    """Return plain decimal text as minor units."""
    try:
        return minor_units(given, ATM_EXPONENT)
    except (ValueError, TypeError):
        message = "Amount should be a string of plain decimal digits, with at most two places"
        raise PydanticCustomError("decimal", message) from None


DollarsIn = Annotated[
    int, BeforeValidator(parse_dollars), Field(ge=1), WithJsonSchema({"type": "string"})
]
Dollars = Annotated[int, PlainSerializer(partial(decimal_text, exponent=ATM_EXPONENT), str)]
AtmNumber = Annotated[str, ATM_NUMBERS]


class AtmWelcome(Public):
    """Where to begin."""

    message: str = "Mini ATM Server"
    docs: str = "/docs"
    sample_accounts: dict[str, Dollars]


@atm.read("/", unbounded=True)
def get_atm_welcome(connection: Connection) -> AtmWelcome:
    """Show all accounts with their balances."""
    rows = read_accounts_of_dialect(connection, ATM_NUMBERS.prefix)
    return AtmWelcome(sample_accounts={ATM_NUMBERS.own_name(row): row.balance for row in rows})


class AtmHealth(Public):
    """That the database answers, and which accounts there are."""

    status: str = "ok"
    accounts: list[str]


@atm.read("/health", unbounded=True)
def get_atm_health(connection: Connection) -> AtmHealth:
    """Tell whether the cash machine works, and for which accounts."""
    rows = read_accounts_of_dialect(connection, ATM_NUMBERS.prefix)
    return AtmHealth(accounts=[ATM_NUMBERS.own_name(row) for row in rows])


class AtmMovement(RequestBody):
    """An amount of cash."""

    amount: DollarsIn


class AtmBalance(Public):
    """An account's balance."""

    account_number: str
    balance: Dollars


@atm.read("/accounts/{number:path}/balance")
def get_atm_balance(connection: Connection, number: AtmNumber) -> AtmBalance:
    """Show a balance."""
    account = read_named_account(connection, ATM_NUMBERS.named(number))
    return AtmBalance(account_number=number, balance=account.balance)


@atm.command("/accounts/{number:path}/deposit", deposit)
def post_atm_deposit(book: ServiceBook, number: AtmNumber, body: AtmMovement) -> AtmBalance:
    """Take cash in."""
    account = deposit(book, ATM_NUMBERS.named(number), amount=body.amount)
    return AtmBalance(account_number=number, balance=account.balance)


@atm.command("/accounts/{number:path}/withdraw", withdraw)
def post_atm_withdrawal(book: AdminBook, number: AtmNumber, body: AtmMovement) -> AtmBalance:
    """Give cash out."""
    account = withdraw(book, ATM_NUMBERS.named(number), amount=body.amount)
    return AtmBalance(account_number=number, balance=account.balance)


# --------------------------------------------------- /api/v1/wallets, application credits
# Wallets of three closed-loop assets, which the treasury issues; amounts have four places.

WALLET_ASSETS = {1: "GOLD", 2: "DMND", 3: "PTS"}
WALLET_NAMES = {
    asset_type_id: NamesAccount("wallets:", code) for asset_type_id, code in WALLET_ASSETS.items()
}
WALLET_EXPONENT = ASSETS["GOLD"].exponent
WALLET_DEMO = {"user_alice": ("100", "50", "500"), "user_bob": ("80", "30", "200")}


def wallet_names(asset_type_id: int) -> NamesAccount:
    """Return how the ledger names the wallets of an asset."""
    if asset_type_id not in WALLET_ASSETS:
        known = ", ".join(f"{number} {code}" for number, code in WALLET_ASSETS.items())
        raise AssetNotFound(f"There is no such asset; there are {known}")
    return WALLET_NAMES[asset_type_id]


def all_wallets(user: str) -> list[Named]:
    """Return what the ledger calls all of a user's wallets."""
    return [wallet_names(asset_type_id).named(user) for asset_type_id in WALLET_ASSETS]


def wallet_seeds(settings: Settings, demo: bool) -> list[Command]:
    """Return the commands that open the demo wallets."""
    return [wallet_seed(user, amounts) for user, amounts in WALLET_DEMO.items() if demo]


def wallet_seed(user: str, amounts: Sequence[str]) -> Command:
    """Return the command that opens a user's wallets with bonuses, unless there are any."""
    units = [minor_units(amount, WALLET_EXPONENT) for amount in amounts]
    named, bonuses = all_wallets(user), dict(zip(WALLET_ASSETS.values(), units, strict=True))
    opening = {"owner_name": user, "name": named[0].name, "bonuses": bonuses}
    return internal(open_funded_wallets, named, **opening)


wallets = Face(
    "wallets",
    prefix="/api/v1/wallets",
    wording={
        AccountNotFound: Wording(404, "User account not found"),
        InsufficientFunds: Wording(402, "Insufficient balance: have {balance}, need {requested}"),
    },
    exponent=WALLET_EXPONENT,
    seeds=wallet_seeds,
)


def parse_credits(given: Any) -> int:
    """Return a JSON string or number as minor units; whatever is not exact is refused."""
    try:
        if isinstance(given, int | Decimal) and not isinstance(given, bool):
            # Without the bound, 1e999999 would be written out with a million digits.
            number = Decimal(given)
            given = format(number, "f") if abs(number.adjusted()) < 20 else ""
        return minor_units(given, WALLET_EXPONENT)
    except (ValueError, TypeError):
        message = "Amount should be a decimal number with at most four places"
        raise PydanticCustomError("decimal", message) from None


CreditsIn = Annotated[
    int,
    BeforeValidator(parse_credits),
    Field(ge=1, le=AMOUNT_MAX),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]}),
]
Credits = Annotated[int, PlainSerializer(partial(decimal_text, exponent=WALLET_EXPONENT), str)]


class WalletBalance(Public):
    """What is in a wallet."""

    balance: Credits
    account_id: str
    asset_type_id: int


@wallets.read("/users/{user:path}/balance")
def get_wallet_balance(connection: Connection, user: str, asset_type_id: PlainInt) -> WalletBalance:
    """Show what a user has of an asset."""
    wallet = read_named_account(connection, wallet_names(asset_type_id).named(user))
    shown = {"balance": wallet.balance, "account_id": wallet.id, "asset_type_id": asset_type_id}
    return WalletBalance.model_validate(shown)


class WalletUserCreate(RequestBody):
    """A user, as the application knows them."""

    external_user_id: Name


class WalletUser(Public):
    """A user who has wallets."""

    external_user_id: str


def wallets_to_open(arguments: dict[str, Any]) -> Sequence[Ref]:
    """Return the wallets that a new user will have."""
    return all_wallets(arguments["body"].external_user_id)


@wallets.command("/users", open_wallets, names=wallets_to_open, status=201)
def post_wallet_user(book: ServiceBook, body: WalletUserCreate) -> WalletUser:
    """Open a user's three wallets, all empty."""
    user = body.external_user_id
    open_wallets(book, owner_name=user, name=all_wallets(user)[0].name)
    return WalletUser(external_user_id=user)


class WalletMovement(RequestBody):
    """An amount of an asset; the key may stand here or in the header."""

    amount: CreditsIn
    asset_type_id: Annotated[int, Field(strict=True)]
    idempotency_key: Annotated[str | None, CarriesKey(), Field(exclude=True)] = None


class WalletMoved(Public):
    """A movement, which is a transaction, and what is in the wallet after it."""

    transaction_id: str
    new_balance: Credits


def wallet_moved(arguments: dict[str, Any]) -> Sequence[Ref]:
    """Return the wallet that a movement names, if there is such an asset."""
    asset_type_id = arguments["body"].asset_type_id
    known = asset_type_id in WALLET_ASSETS
    return [wallet_names(asset_type_id).named(arguments["user"])] if known else []


@wallets.command("/users/{user:path}/top-up", top_up, names=wallet_moved)
def post_top_up(book: ServiceBook, user: str, body: WalletMovement) -> WalletMoved:
    """Add credits that were bought."""
    wallet = wallet_names(body.asset_type_id).named(user)
    return WalletMoved.model_validate(top_up(book, wallet, amount=body.amount))


@wallets.command("/users/{user:path}/bonus", bonus, names=wallet_moved)
def post_bonus(book: ServiceBook, user: str, body: WalletMovement) -> WalletMoved:
    """Add credits that are a present."""
    wallet = wallet_names(body.asset_type_id).named(user)
    return WalletMoved.model_validate(bonus(book, wallet, amount=body.amount))


@wallets.command("/users/{user:path}/spend", spend, names=wallet_moved)
def post_spend(book: ServiceBook, user: str, body: WalletMovement) -> WalletMoved:
    """Take credits for a service."""
    wallet = wallet_names(body.asset_type_id).named(user)
    return WalletMoved.model_validate(spend(book, wallet, amount=body.amount))


# ----------------------------------------------------------------------------- The log
# One JSON object a line for each request, and for what else there is to say. Never a key, a
# token, a name or an amount.


def request_id_of(given: bytes) -> str:
    """Return the X-Request-ID that the caller chose, if it is a sane one, or a new one."""
    sane = re.fullmatch(rb"[\w.:-]{1,128}", given)
    return given.decode() if sane else secrets.token_hex(16)


def request_line(scope: Scope, status: int, seconds: float, request_id: str) -> dict[str, Any]:
    """Return what is logged of a request; the route's template, because paths hold names."""
    return {
        "ts": time.time(),
        "method": scope["method"],
        "route": getattr(scope.get("route"), "path_format", None),
        "status": status,
        "ms": round(seconds * 1_000, 3),
        "caller": scope.get("caller"),
        "key": scope.get("key_prefix"),
        "request_id": request_id,
    }


class Log(logging.Handler):
    """One JSON object a line, for each request and for whatever else there is to say.

    A thread of its own writes them, so that no request waits for whoever reads them; where
    nobody does, the oldest are lost. Requests come here directly, because the logging module
    takes longer over a line than the batch takes over a transfer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[dict[str, Any]] = deque(maxlen=LOG_LINES_MAX)

    def emit(self, record: logging.LogRecord) -> None:
        """Take what the program says besides."""
        # The formatter adds the traceback, if there is one; text that is no UTF-8 is escaped.
        message = self.format(record).encode(errors="backslashreplace").decode()
        said = {"ts": record.created, "level": record.levelname, "message": message}
        self.lines.append(said)

    @contextmanager
    def written_to(self, stream: TextIO) -> Iterator[None]:
        """Write to a stream until the block ends; other handlers of the log are left alone."""
        ending = threading.Event()
        writer = threading.Thread(
            target=self._write, args=(stream, ending), name="log", daemon=True
        )
        writer.start()
        if not logging.root.handlers:
            logging.root.addHandler(self)
        # Its lines would hold paths, and so names.
        logging.getLogger("uvicorn.access").disabled = True
        try:
            yield
        finally:
            logging.root.removeHandler(self)
            ending.set()
            writer.join(timeout=1)

    def _write(self, stream: TextIO, ending: threading.Event) -> None:
        ended = False
        while not ended:
            ended = ending.wait(LOG_SECONDS_MAX)
            lines = [self.lines.popleft() for _ in range(len(self.lines))]
            with suppress(OSError):
                stream.write(b"".join(json_line(line) for line in lines).decode())
                stream.flush()


def json_line(line: Mapping[str, Any]) -> bytes:
    """Return a line of the log, its time as RFC 3339."""
    return to_json({**line, "ts": datetime.fromtimestamp(line["ts"], UTC)}) + b"\n"


LOG_LINES_MAX = 20_000
LOG_SECONDS_MAX = 0.1


# ------------------------------------------------------------------------- Application
# The routes of all faces over one ledger.

# In the order in which a request tries their routes: those for the heaviest traffic come first.
FACES = (canonical, wallets, bank, atm)


class LedgerApp(FastAPI):
    """The routes of all faces; whatever is answered has a line in the log and the same headers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        # The status stays 0 where the answer is given up, at the end of the server.
        began, status, given = time.perf_counter(), 0, dict(scope["headers"])
        request_id = request_id_of(given.get(b"x-request-id", b""))
        headers = [*SECURITY_HEADERS, (b"x-request-id", request_id.encode())]
        if b"upgrade" in given:
            # The HTTP parser takes the body of such a request for the next one.
            headers.append((b"connection", b"close"))

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] += headers
            await send(message)

        try:
            await super().__call__(scope, receive, send_with_headers)
        except Exception:
            # It was answered already, and concerns only us.
            log.exception("the server made a mistake in request %s", request_id)
        finally:
            seconds = time.perf_counter() - began
            self.state.log.lines.append(request_line(scope, status, seconds, request_id))

    def openapi(self) -> dict[str, Any]:
        """Describe the API, and how to show who is calling."""
        document = super().openapi()
        document["components"]["securitySchemes"] = SECURITY_SCHEMES
        return document


SECURITY_HEADERS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))


def create_app(settings: Settings, faces: Sequence[Face] = FACES) -> FastAPI:
    """Open the ledger and return its application; raise StartRefused if it cannot be opened."""
    database = database_at(settings.database_url)
    database.open(make=True)
    app = LedgerApp(
        title="ledger.py",
        description="A double-entry ledger: durable, idempotent, never negative, always balanced.",
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers=dict.fromkeys(
            (LedgerError, RequestValidationError, FrameworkError, Exception), refuse
        ),
    )
    app.state.log = Log()
    ledger = app.state.ledger = Ledger(database)
    callers = app.state.callers = Callers(ledger, settings)
    with ledger.read() as connection:
        is_new = connection.execute(select(AUDIT.c.id).limit(1)).first() is None
    try:
        seed(ledger, settings, faces, caller="system", demo=is_new and callers.open_mode)
    except BaseException:
        ledger.close()
        raise
    # In front of the documentation's routes, because every request tries them in their order.
    app.router.routes[:0] = [route for face in faces for route in face.routes]
    return app


def seed(
    ledger: Ledger, settings: Settings, faces: Sequence[Face], *, caller: str, demo: bool
) -> None:
    """Open the accounts that the faces begin with; those that are there stay as they are."""
    commands = [replace(c, caller=caller) for face in faces for c in face.seeds(settings, demo)]
    for answer in patiently(lambda: ledger.commit(commands)) if commands else ():
        if answer.status >= 400 and json.loads(answer.body)["code"] != AccountExists.code:
            raise StartRefused(f"the first accounts cannot be opened: {answer.body}")


async def credit_for_ever(ledger: Ledger) -> None:
    """Credit what falls due by the server's clock, within a second or so."""
    while True:
        try:
            await credit_due(ledger, "SERVER", ledger.clock())
        except LedgerError as error:
            log.warning("cashbacks wait: %s", error)
        except Exception:
            log.exception("cashbacks could not be credited, and will be tried again")
        await asyncio.sleep(CASHBACK_POLL_SECONDS)


CASHBACK_POLL_SECONDS = 1.0


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Prepare the process for serving, and close the ledger after the last answer."""
    # What was made until now lives as long as the process; a request leaves few cycles behind.
    # Without these two lines, the collector costs a fifth of the rate.
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    with app.state.log.written_to(sys.stderr):
        crediting = asyncio.create_task(credit_for_ever(app.state.ledger))
        yield
        crediting.cancel()
        with suppress(asyncio.CancelledError):
            await crediting
        app.state.ledger.close()


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
        require_keys(settings)
    port = port_number(os.environ.get("PORT") or "8000") if options.port is None else options.port
    listener = listen(options.host, port)
    app = create_app(settings)
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    print(f"ledger.py serves on {address}")
    print(f"  docs      {address}/docs")
    print(f"  database  {app.state.ledger.database.name}")
    print(f"  mode      {OPEN_MODE if app.state.callers.open_mode else KEY_MODE}", flush=True)
    config = uvicorn.Config(
        app,
        log_level="warning",
        log_config=None,
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


OPEN_MODE = "open: every caller on this machine may do everything"
KEY_MODE = "keys: every caller needs an API key or a token"


def require_keys(settings: Settings) -> None:
    """Refuse to serve other machines in open mode."""
    database = database_at(settings.database_url)
    if database.exists():
        database.open(make=True)
        ledger = Ledger(database)
        open_mode = Callers(ledger, settings).open_mode
        ledger.close()
    else:
        open_mode = not (settings.admin_key or settings.jwt_secret)
    if open_mode:
        raise StartRefused(
            "without API keys the ledger serves this machine alone: use --host 127.0.0.1, or make "
            "a key first: python ledger.py key add --name NAME --role admin"
        )


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
    with (
        closing(existing(settings)) as database,
        database.begin(database.reader) as connection,
    ):
        findings = list(check(connection))
    for finding in findings:
        print(
            f"{'WRONG' if finding.wrong else 'ok':5}  {finding.row_count:>9,}  {finding.invariant}"
        )
        if finding.wrong:
            print(f"       {finding.wrong}")
    return int(any(finding.wrong for finding in findings))


def run_backup(settings: Settings, options: argparse.Namespace) -> int:
    """Copy the ledger's file into a new one while it is in use, of whatever version it is."""
    database = database_at(settings.database_url)
    if not isinstance(database, SqliteDatabase):
        raise StartRefused(f"{database.name} is no file: back it up with pg_dump")
    database.open(make=False, oldest=1)
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
    print(f"copied {database.name} to {target}")
    return 0


def copy_into(database: Database, target: Path) -> None:
    """Copy all committed pages in one step: in smaller ones a busy writer never lets it end."""
    with closing(sqlite3.connect(target)) as copy, database.begin(database.reader) as connection:
        source: Any = connection.connection.driver_connection
        source.backup(copy, pages=-1)
        # So that the copy is one file, even where it can only be read.
        copy.execute("PRAGMA journal_mode = DELETE")


def run_ledger_copy(settings: Settings, options: argparse.Namespace) -> int:
    """Copy a whole ledger into an empty database of either engine, and check it there."""
    with (
        closing(database_at(options.source)) as source,
        closing(database_at(options.target)) as target,
    ):
        source.open(make=False)
        is_new = isinstance(target, SqliteDatabase) and not target.exists()
        try:
            counts = copy_all(source, target)
        except BaseException:
            if isinstance(target, SqliteDatabase) and is_new:
                target.close()
                target.path.unlink(missing_ok=True)
            raise
    print(f"copied {source.name} to {target.name}, and checked it there:")
    for name, count in counts.items():
        print(f"{count:>12,}  {name}")
    return 0


def copy_all(source: Database, target: Database) -> dict[str, int]:
    """Copy all tables in one write, and return how many rows each has."""
    with source.begin(source.reader) as old, target.begin(target.writer) as new:
        target.lock_schema(new)
        if stored_version(new):
            raise StartRefused(f"{target.name} is not empty")
        SQLModel.metadata.create_all(new)
        counts = {table.name: copy_rows(old, new, table, target) for table in copied_tables()}
        # Not before, because they would refuse what frozen and closed accounts once did.
        create_triggers(new, TRIGGERS)
        wrong = [finding.wrong for finding in check(new) if finding.wrong]
        if wrong:
            raise StartRefused(f"nothing was copied: {wrong[0]}")
    return counts


def copied_tables() -> list[Table]:
    """Return all tables, those that others refer to first."""
    return list(SQLModel.metadata.sorted_tables)


def copy_rows(old: Connection, new: Connection, table: Table, target: Database) -> int:
    """Copy a table in portions, and show how far it is to whoever watches."""
    rows = old.execute(select(table).execution_options(yield_per=COPIED_ROWS_MAX))
    count = 0
    for portion in rows.mappings().partitions():
        target.insert_all(new, table, [dict(row) for row in portion])
        count += len(portion)
        if sys.stderr.isatty():
            print(f"\r{count:>12,}  {table.name:24}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r", end="", file=sys.stderr)
    return count


COPIED_ROWS_MAX = 2_000


def run_seed(settings: Settings, options: argparse.Namespace) -> int:
    """Open the first accounts and wallets that are missing: the demo or PRELOAD_ACCOUNTS."""
    database = database_at(settings.database_url)
    database.open(make=True)
    ledger = Ledger(database)
    seed(ledger, settings, FACES, caller="cli", demo=True)
    ledger.close()
    print(f"the first accounts and wallets are in {database.name}")
    return 0


def run_key_add(settings: Settings, options: argparse.Namespace) -> int:
    """Make an API key, and print it this once: what is stored is its hash."""
    if not is_name(options.name):
        raise StartRefused("the name must be 1 to 200 printable characters")
    database = database_at(settings.database_url)
    database.open(make=True)
    key, prefix = new_api_key()
    details = {"name": options.name, "role": options.role, "prefix": prefix}
    row = details | {"hash": key_hash(key.encode())}
    run_change(database, "add_key", details, partial(insert_key, row=row))
    print(key)
    print(f"key {options.name!r} is in {database.name}, and shown this once", file=sys.stderr)
    return 0


def run_key_revoke(settings: Settings, options: argparse.Namespace) -> int:
    """End an API key: running servers refuse it within a second."""
    database, name = existing(settings), options.name
    run_change(database, "revoke_key", {"name": name}, partial(revoke_key, name=name))
    print(f"revoked {name}")
    return 0


def run_key_list(settings: Settings, options: argparse.Namespace) -> int:
    """Show the API keys, revoked ones too, by the prefixes that are no secret."""
    with (
        closing(existing(settings)) as database,
        database.begin(database.reader) as connection,
    ):
        rows = connection.execute(select(API_KEY).order_by(API_KEY.c.created_at)).all()
    line = "{:11}  {:7}  {:27}  {:27}  {}"
    print(line.format("prefix", "role", "created", "revoked", "name"))
    for row in rows:
        revoked = utc_text(row.revoked_at) if row.revoked_at else "-"
        print(line.format(row.prefix, row.role, utc_text(row.created_at), revoked, row.name))
    return 0


def run_change(
    database: Database,
    action: str,
    details: Mapping[str, str],
    change: Callable[[Connection, int], None],
) -> None:
    """Do what the operator asks for, with its audit event in the same commit."""
    ledger = Ledger(database)
    try:
        patiently(lambda: ledger.administer(action, details, change))
    finally:
        ledger.close()


def existing(settings: Settings) -> Database:
    """Open a ledger that is there; a command never makes one by mistake."""
    database = database_at(settings.database_url)
    database.open(make=False)
    return database


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options; without a command, it serves."""
    parser = argparse.ArgumentParser(prog="ledger.py", description="A double-entry ledger.")
    commands = parser.add_subparsers(title="commands")
    serving = command(commands, "serve", serve)
    serving.add_argument("--host", default="127.0.0.1")
    serving.add_argument("--port", type=port_number, help="default: $PORT, or 8000")
    command(commands, "check", run_check)
    command(commands, "seed", run_seed)
    command(commands, "backup", run_backup).add_argument("file", type=Path, metavar="FILE")
    copying = command(commands, "copy", run_ledger_copy)
    copying.add_argument("--from", dest="source", required=True, metavar="URL")
    copying.add_argument("--to", dest="target", required=True, metavar="URL")
    key_help = "make, show and end the API keys of callers"
    keys = commands.add_parser("key", help=key_help).add_subparsers(required=True)
    adding = command(keys, "add", run_key_add)
    adding.add_argument("--name", required=True)
    adding.add_argument("--role", required=True, choices=ROLES)
    command(keys, "list", run_key_list)
    command(keys, "revoke", run_key_revoke).add_argument("name", metavar="NAME")
    named = arguments and (not arguments[0].startswith("-") or arguments[0] in ("-h", "--help"))
    return parser.parse_args(arguments if named else ["serve", *arguments])


def command(commands: Any, name: str, run: Callable[..., int]) -> argparse.ArgumentParser:
    """Add a command, and the option that all of them have."""
    made: argparse.ArgumentParser = commands.add_parser(name, help=run.__doc__)
    made.add_argument(
        "--database-url",
        metavar="URL",
        help="default: $LEDGER_DATABASE_URL, $DATABASE_URL or sqlite:///ledger.db",
    )
    made.set_defaults(run=run)
    return made


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    try:
        options = parse(arguments)
        settings = Settings.read(os.environ, database_url=options.database_url)
        status: int = options.run(settings, options)
    except (StartRefused, LedgerError, sqlite3.Error) as refusal:
        print(f"ledger: {one_line(refusal)}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
