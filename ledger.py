# /// script
# requires-python = ">=3.11"
# dependencies = ["fastapi==0.165.0", "starlette==1.10.0", "pydantic==2.14.3", "sqlmodel==0.0.50",
#     "sqlalchemy==2.1.9", "uvicorn==0.54.0", "httpx==0.28.1", "httptools==0.9.0",
#     "psycopg[binary]==3.3.9", "pyjwt==2.15.1", "prometheus_client==0.26.0",
#     "fastapi_offline==1.7.7", 'uvloop==0.23.0; sys_platform != "win32"']
# ///
"""A complete double-entry ledger in one file: tables, rules, HTTP API and command line.

    python ledger.py             serve on http://127.0.0.1:8000, with the data in ./ledger.db
    python ledger.py check       verify the invariants over all stored rows
    python ledger.py --help      the others: backup, copy, export, upgrade, seal, seed, key ...
    uvicorn ledger:app           serve the same application, without this program's bounds on HTTP

Terms, with an example of each:

    asset            what is counted, and how many digits its minor unit has   USD, 2
    minor units      an amount as an integer of the asset's smallest unit      1050 is 10.50 USD
    account          a balance of one asset, of a customer or of the system    Alice's dollars
    leg              a requested entry: an account and a signed amount         (alice, -300)
    entry            one immutable, numbered line of one account               DEBIT 300, 750 left
    event            who asked for what, and when                              account opened
    transaction      an event with entries, whose credits equal its debits     a transfer
    operation        what can happen to money or to an account                 deposit, transfer
    contra account   the system account on the other side of an operation      cash
    idempotency key  the caller's name for one intent, which acts only once    pay-day
    command          an operation, its arguments and the caller who asks       POST /transfers
    batch            the commands that are committed to disk together          1 to some hundreds

Sign convention: every account is credit-normal. CREDIT raises a balance, DEBIT lowers it, and a
leg's amount is positive for CREDIT and negative for DEBIT. A deposit of 500 is DEBIT cash 500,
CREDIT alice 500: so cash, which is the money outside, goes negative, and all balances sum to zero.

Invariants. The code keeps them all. The database keeps 3, 4, 5, 7, 9 and the uniqueness in 6 too,
and 2 wherever an account is written. `check` verifies what stored rows can show.

    1. The entries of every transaction sum to zero per asset, and so does the whole ledger.
    2. A balance equals the sum of its entries; every entry carries the balance after it.
    3. The entries of an account are numbered 1, 2, 3 ... without a gap.
    4. A customer's balance, less what is held of it, is never below minus its credit limit.
    5. Entries and events are never changed or deleted.
    6. An idempotency key of a caller acts at most once; the same request gets the same answer.
    7. Frozen accounts move no money; closed accounts are empty and never come back.
    8. Nothing is acknowledged before it is committed to disk.
    9. A transaction is reversed once, a hold ends once, and an external id is used once.

The way of a change, from its caller to the disk and back:

    caller          POST /transfers   POST /transfers   POST /accounts/{id}/deposit  ...
                          |                 |                 |
    LedgerRoute     caller, key, strict JSON, schema -> Command (who, what, which accounts)
                          |                 |                 |
    Ledger.submit         +--------> commands that wait <-----+
                                            |     while more arrives, some turns of the event loop
    Ledger.commit                   BEGIN IMMEDIATE
                                    lock and load the accounts, look for the keys
                                      each command: known key -> replay its answer
                                                    new       -> Book.post: check all, then change
                                    insert what is new, update what has changed
                                    COMMIT                        (one sync to disk)
                          |                 |                 |
    caller            answer 1          answer 2          answer 3

Contents. Who stops after part one knows why a retry cannot pay twice.

    One    the ledger    Money, Times and ids, Refusals, Tables, Posting, Batches, Operations, Holds
    Two    HTTP          Callers, Requests, The API, The library,
                         Dialect: /bank, the banking kata, Dialect: /atm, the cash machine,
                         Dialect: /api/v1/wallets, application credits
    Three  storage       Database, Schema, Seals, Upgrades
    Four   running       Application, Receipts, Log, Command line, Page
"""

import sys

if __name__ == "__main__":

    def explain(kind: type[BaseException], error: BaseException, trace: "Any") -> None:
        """Say in one line what the imports below lack, and which command mends it."""
        install = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
        why = f"{error}. Mend it: uv run ledger.py, or {install} && .venv/bin/python ledger.py"
        if sys.hexversion < 0x30B0000:
            why = f"Python {sys.version.split()[0]} is older than 3.11. Mend it: uv run ledger.py"
        if issubclass(kind, ImportError):
            print(f"ledger: {why}", file=sys.stderr)
        else:
            sys.__excepthook__(kind, error, trace)

    sys.excepthook = explain

import argparse
import asyncio
import base64
import copy
import csv
import gc
import glob
import hashlib
import hmac
import inspect
import ipaddress
import json
import logging
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import threading
import time
import unicodedata
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Callable,
    Container,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from decimal import ROUND_HALF_UP, Context, Decimal
from functools import lru_cache, partial
from io import TextIOWrapper
from itertools import accumulate, chain, groupby, product
from operator import add, attrgetter, contains, itemgetter
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, NamedTuple, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx
import jwt
import prometheus_client as prometheus
import psycopg
import pydantic
import sqlalchemy as sa
import uvicorn
from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.routing import APIRoute
from fastapi_offline import FastAPIOffline
from pydantic import AfterValidator, BaseModel, BeforeValidator, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError, from_json, to_json
from sqlmodel import Field, SQLModel
from starlette.routing import Match, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if sys.platform != "win32":
    import fcntl

__version__ = "1.0.0"
log = logging.getLogger("ledger")
Row = dict[str, Any]
T = TypeVar("T")


# ===== Part one: the ledger
# What money, accounts and transactions are, how money moves, and how it is committed. Nothing here
# knows a URL or a dialect, and its SQL is what both engines take.


# ----- Money
# Money is an integer of minor units everywhere; decimal text exists at the edge of a dialect only.

AMOUNT_MAX, BALANCE_MAX = 10**15, 2**63 - 1
CUSTOMER_MAX = 2**53 - 1  # Which every client reads exactly that takes JSON's numbers for floats.


def decimal_text(amount: int, exponent: int) -> str:
    """Return minor units as decimal text: (-1050, 2) is "-10.50"."""
    return f"{Decimal(amount).scaleb(-exponent):f}"


def minor_units(decimal: str, exponent: int) -> int:
    """Return decimal text as minor units, or raise ValueError: ("10.5", 2) is 1050."""
    digits = re.fullmatch(r"([0-9]{1,16})(?:\.([0-9]+))?", decimal)
    if digits is None or len(digits[2] or "") > exponent:
        raise ValueError
    return int(digits[1] + (digits[2] or "").ljust(exponent, "0"))


# ----- Times and ids
# Both rise from commit to commit, and an id begins with its time.

UUID_PATTERN = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
is_uuid = re.compile(UUID_PATTERN).fullmatch


def utc_now() -> int:
    """Return the time as it is stored."""
    return time.time_ns() // 1_000


def time_of_id(given: str) -> int:
    """Return the time that an id begins with, or raise DatabaseUnavailable where it is none."""
    if not is_uuid(given):
        raise DatabaseUnavailable(f"The event {given!r} is damaged: run python ledger.py check")
    return int(given[:8] + given[9:13] + given[15:18], 16)


# ----- Refusals
# What the ledger refuses; what operations, storage or HTTP alone refuse stands there. What a batch
# refuses is an answer like any other, stored under its key.


class LedgerError(Exception):
    """A failure that a caller sees: a status, a code for programs and a sentence for people."""

    status: int
    code: str
    detail = ""
    kinds: ClassVar[dict[str, type["LedgerError"]]] = {}  # By their codes.
    about = "account_id"  # The member that tells the id of what it is about.

    def __init_subclass__(cls, *, status: int = 0, detail: str = "", about: str = "") -> None:
        """Take the code from the class's name: InsufficientFunds is insufficient_funds."""
        cls.detail, cls.about = detail or cls.detail, about or cls.about
        if status:
            cls.status = status
            cls.code = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
            cls.kinds[cls.code] = cls

    def __init__(self, detail: str = "", about: str = "", /, **members: Any) -> None:
        super().__init__(detail or self.detail)
        # The name@ASSET by which a dialect knows an account is no id.
        self.members = {self.about: about, **members} if about and "@" not in about else members

    def to_answer(self) -> "Answer":
        """Return the problem document (RFC 9457) that the caller gets."""
        problem = {
            "type": f"urn:ledger:error:{self.code}",
            "title": self.code.replace("_", " ").capitalize(),
            "status": self.status,
            "detail": str(self),
            "code": self.code,
        }
        return Answer(self.status, json.dumps(problem | self.members, ensure_ascii=False))


# fmt: off
class AccountNotFound(LedgerError, status=404): ...
class AccountExists(LedgerError, status=409): ...
class ExternalIdExists(LedgerError, status=409): ...
class InsufficientFunds(LedgerError, status=409): ...
class AccountFrozen(LedgerError, status=409): ...
class AccountClosed(LedgerError, status=409): ...
class BalanceLimit(LedgerError, status=409): ...
class IdempotencyKeyReused(LedgerError, status=409): ...
class Unbalanced(LedgerError, status=422): ...
class AccountRepeated(LedgerError, status=422): ...


# An error of the database is never stored as an answer: the key stays good.
class DatabaseBusy(LedgerError, status=503, detail="The database is in use: try again"): ...
class DatabaseConflict(DatabaseBusy): ...
class ReadTooLong(DatabaseBusy, detail="This takes too long now: ask for less"): ...
class ManyExpired(DatabaseBusy, detail="Many holds have expired at once: try again"): ...
class DatabaseUnavailable(LedgerError, status=503, detail="The database refuses: try again"): ...
class DatabaseLost(DatabaseUnavailable, detail="The database cannot be written to: try again"): ...
class LedgerUpgraded(DatabaseLost, detail="The ledger was upgraded: restart with its program"): ...
class DiskFailed(DatabaseUnavailable, detail="The disk fails: try again with the same key"): ...
class InternalError(LedgerError, status=500, detail="The server made a mistake, and logged it"): ...
class StorageFull(LedgerError, status=507, detail="The disk is full, and nothing was done"): ...
# fmt: on


# ----- Tables
# What is stored. The constraints repeat the rules, so that a bug in one is caught by the other.
# Ids are text; times are integer microseconds since 1970 in UTC.

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
TIME_MAX = 253_402_300_800_000_000 - 1  # The end of the year 9999.


@lru_cache(maxsize=10_000)
def utc_text(microseconds: int) -> str:
    """Return a stored time as RFC 3339: 0 is "1970-01-01T00:00:00.000000Z"."""
    # What the clock of a caller says may lie beyond what can be written.
    moment = EPOCH + timedelta(microseconds=min(microseconds, TIME_MAX))
    return moment.isoformat(timespec="microseconds").removesuffix("+00:00") + "Z"


TIME_SCHEMA = pydantic.WithJsonSchema({"type": "string", "format": "date-time"})
AS_TIME = pydantic.PlainSerializer(utc_text, return_type=str)
Timestamp = Annotated[int, BeforeValidator(lambda given: parse_time(given)), AS_TIME, TIME_SCHEMA]
SCHEMA_VERSION = 4
STRICT = {"sqlite_strict": True}
NO_ROWID = STRICT | {"sqlite_with_rowid": False}
# Capitals, which the kinds of transactions have, come before.
IS_TRANSACTION, NO_ENTRIES = "kind < 'a'", "kind >= 'a'"
HAS_EXTERNAL_ID = "external_id IS NOT NULL"
# A caller's metadata is stored as JSON, as notes: SQLModel's classes have another metadata.
AS_OBJECT = pydantic.PlainSerializer(lambda text: json.loads(text) if text else {}, dict[str, str])
AS_TEXT = BeforeValidator(lambda given: json.dumps(given) if isinstance(given, dict) else given)
StoredMetadata = Annotated[str | None, AS_TEXT, AS_OBJECT, pydantic.Field(alias="metadata")]
AS_COLUMN = Field(sa_type=sa.Text)  # SQLModel knows none for a Literal.
AccountStatus = Annotated[Literal["ACTIVE", "FROZEN", "CLOSED"], AS_COLUMN]
EntryType = Annotated[Literal["DEBIT", "CREDIT"], AS_COLUMN]
HoldStatus = Annotated[Literal["PENDING", "CAPTURED", "VOIDED", "EXPIRED"], AS_COLUMN]
CashbackStatus = Annotated[Literal["SCHEDULED", "CREDITED", "CANCELLED"], AS_COLUMN]


def partial_index(name: str, *columns: str, where: str, unique: bool = False) -> sa.Index:
    """Declare an index of the rows for which a condition holds; the others cost nothing."""
    given = sa.text(where)
    return sa.Index(name, *columns, unique=unique, sqlite_where=given, postgresql_where=given)


class Stored(SQLModel, registry=sa.orm.registry()):
    """What is stored or shown of it; a program's own tables know nothing of these."""

    __table_args__: Any = STRICT
    __tablename__ = sa.orm.declared_attr.directive(
        lambda cls: re.sub("(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
    )
    model_config = {"json_schema_serialization_defaults_required": True, "validate_by_name": True}
    # SQLModel's own is made for tables, and takes five times as long.
    __init__ = BaseModel.__init__

    @classmethod
    def of(cls, row: Row) -> Self:
        """Return a row as it is shown; to check it again would take ten times as long."""
        shown = object.__new__(cls)
        vars(shown).update(row)
        return shown


class AccountPublic(Stored):
    """An account in minor units; `held` is promised, and `name` is a dialect's own name for it."""

    id: str = Field(primary_key=True)
    name: str | None = None
    owner_name: str
    asset: str = Field(foreign_key="asset.code")
    status: AccountStatus = "ACTIVE"
    balance: int = 0
    held: int = 0
    credit_limit: int = 0
    external_id: str | None = None
    notes: StoredMetadata = None
    created_at: Timestamp

    @pydantic.computed_field  # type: ignore[prop-decorator]
    @property
    def available(self) -> int:
        return self.balance - self.held + self.credit_limit


class Account(AccountPublic):
    """An account as a batch works on it; `last_seq` is the number of its entries."""

    kind: str = "CUSTOMER"
    last_seq: int = 0


class AccountTable(Account, table=True):
    """Every account; only the system's may go below zero without a limit."""

    __tablename__ = "account"
    __table_args__ = (
        sa.UniqueConstraint("name", "asset"),
        sa.Index("account_owner", "owner_name", "id"),
        partial_index("account_external_id", "external_id", where=HAS_EXTERNAL_ID, unique=True),
        sa.CheckConstraint("kind IN ('CUSTOMER', 'SYSTEM')"),
        # For a list of three, SQLite makes an index at each change.
        sa.CheckConstraint("status = 'ACTIVE' OR status IN ('FROZEN', 'CLOSED')"),
        sa.CheckConstraint("held >= 0 AND (balance - held + credit_limit >= 0 OR kind = 'SYSTEM')"),
        sa.CheckConstraint(f"credit_limit BETWEEN 0 AND {AMOUNT_MAX}"),
        sa.CheckConstraint("balance = 0 OR status <> 'CLOSED'"),
        sa.CheckConstraint("last_seq > 0 OR (last_seq = 0 AND balance = 0)"),
        STRICT,
    )


class TransactionBase(Stored):
    """What callers see of a transaction besides its entries."""

    id: str = Field(primary_key=True)
    kind: str
    memo: str | None = None
    ts: Timestamp
    external_id: str | None = None
    notes: StoredMetadata = None
    reverses: str | None = Field(default=None, foreign_key="event.id")


class Event(TransactionBase, table=True):
    """Who asked for what, and when; one with entries is a transaction, and its kind in capitals."""

    # An account's transactions are found by its entries: to index them too costs each a page.
    __table_args__ = (
        partial_index("event_other", "account_id", "id", where=NO_ENTRIES),
        partial_index("event_external_id", "external_id", where=HAS_EXTERNAL_ID, unique=True),
        partial_index("event_reverses", "reverses", where="reverses IS NOT NULL", unique=True),
        partial_index("event_effective", "effective_at", where="effective_at IS NOT NULL"),
        partial_index("event_limit", "account_id", "id", where="credit_limit IS NOT NULL"),
        sa.CheckConstraint("(kind = 'REVERSAL') = (reverses IS NOT NULL)"),
        NO_ROWID,
    )

    effective_at: int | None = None
    caller: str
    account_id: str | None = None
    arguments: str
    credit_limit: int | None = None  # What the account's is from then on.
    key: str | None = None  # Under which it was asked for, and the hash of what that answered.
    answer: str | None = None


class EntryBase(Stored):
    """What callers see of an entry itself: its number in the account, and the balance after it."""

    id: str
    account_id: str = Field(primary_key=True, foreign_key="account.id")
    transaction_id: str = Field(foreign_key="event.id", index=True)
    amount: int
    type: EntryType
    balance: int
    seq: int = Field(primary_key=True)


class Entry(EntryBase, table=True):
    """One line of one account, known by the account and its number there."""

    __table_args__ = (
        sa.CheckConstraint("seq >= 1"),
        sa.CheckConstraint("type IN ('DEBIT', 'CREDIT')"),
        sa.CheckConstraint("amount >= 1"),
        STRICT,
    )


CHANGING_COLUMNS = {
    "account": ("status", "balance", "held", "last_seq"),
    "event": ("answer",),  # In its own commit alone.
    "hold": ("status", "captured_amount", "transaction_id"),
    "scheduled_cashback": ("status", "transaction_id"),
    "api_key": ("revoked_at",),
    "webhook": ("position", "failures", "due_at", "last_error"),
}
# Of accounts too, but not among those: with each SQLite would write the index of names anew.
NAMING_COLUMNS = ("owner_name", "notes", "credit_limit")
CHANGEABLE = {table: {*columns} for table, columns in CHANGING_COLUMNS.items()}
CHANGEABLE["account"] |= {*NAMING_COLUMNS}


# ----- Posting
# The only code that moves money. It knows accounts, legs and rows, and no URL. In its SQL `:name`
# stands for a value, and `= ANY(:names)` holds for each of a list; FOR UPDATE locks rows where the
# engine has such locks. What sends it is a Connection, of which part three has one for each engine.

EXPIRED_MAX = 500  # As many are released in one write.
CONTRA_NAMES = ("cash", "merchants", "cashback", "payments", "treasury")
PENDING = "status = 'PENDING'"
IS_OVER = f"{PENDING} AND expires_at <= :now"


class Leg(NamedTuple):
    """A requested entry: a positive amount is a CREDIT, a negative one a DEBIT."""

    account: Account
    amount: int


class Book:
    """The open batch: the accounts that it has loaded, and the rows that it will write."""

    def __init__(self, connection: "Connection") -> None:
        self.connection = connection
        self.now, self.last_time = utc_now(), 0  # The latter is of the last id, in 2^-12 ms.
        self.random: list[str] = []
        self.is_tidy = True  # Whether all holds that have expired were released.
        # What is recorded of the command whose turn it is; before the first it is the system's.
        self.asked: Row = {"caller": "system", "arguments": "{}", "effective_at": None, "key": None}
        self.events: list[Row] = []  # Of that command.
        self.accounts: dict[str, Account] = {}
        self.assets: dict[str, Any] = {}  # Those of one's own that were looked for.
        self.inserts: dict[str, list[Row]] = defaultdict(list)
        self.updates: dict[str, dict[int, Row]] = defaultdict(dict)
        self._written: Any = None  # What was gathered when that command first wrote.
        # How each of its changes is taken back: a refused command leaves nothing behind.
        self._undo: list[Callable[[], Any]] = []

    def post(self, kind: str, legs: Sequence[Leg], **event: Any) -> str:
        """Turn legs into entries, move the balances, and return the transaction's id.

        Amounts are minor units; `event` are further columns of the transaction, as its memo. Raises
        Unbalanced, AccountRepeated, AccountFrozen, AccountClosed, InsufficientFunds, BalanceLimit
        or ExternalIdExists.
        """
        require_balanced(legs)
        for leg in legs:
            require_active(leg.account)
        for leg in legs:
            require_funds(leg)
        self.require_new("event", event.get("external_id"))
        # Every check stands above this line; below it nothing may fail.
        customers = [account for account, _ in legs if account.kind == "CUSTOMER"]
        transaction_id = self.record(kind, customers[0], **event)
        for account, amount in legs:
            seq, balance = account.last_seq + 1, account.balance + amount
            self.change("account", vars(account), last_seq=seq, balance=balance)
            entry = {
                "account_id": account.id,
                "seq": seq,
                "id": self.new_id(),
                "transaction_id": transaction_id,
                "type": "CREDIT" if amount > 0 else "DEBIT",
                "amount": abs(amount),
                "balance": balance,
            }
            self.insert("entry", entry)
        return transaction_id

    def record(self, kind: str, account: Account | None, **event: Any) -> str:
        """Add an event of the command whose turn it is, and return its id."""
        row: Row = {"id": self.new_id(), "kind": kind, "memo": None, "ts": self.now, **self.asked}
        row |= {"account_id": account and account.id, "external_id": None, "notes": None}
        row |= {"reverses": None, "credit_limit": None, "answer": None, **event}
        self.insert("event", row)
        self.events.append(row)
        self.index_metadata(row)
        return str(row["id"])

    def index_metadata(self, row: Row) -> None:
        """Let an account or an event be found by each member of its metadata."""
        for name, value in json.loads(row["notes"]).items() if row["notes"] else ():
            self.insert("note", {"name": name, "value": value, "owner_id": row["id"]})

    def require_new(self, table: str, external_id: str | None) -> None:
        """Refuse an external id that another row of the table has."""
        if external_id is None:
            return
        # Without writing what was gathered, which takes long if it is done for each of many.
        gathered = [row for row in self.inserts[table] if row["external_id"] == external_id]
        query = f"SELECT id FROM {table} WHERE external_id = :external_id"  # noqa: S608
        for row in gathered or self.connection.rows(query, external_id=external_id):
            user = {f"{'transaction' if table == 'event' else table}_id": row["id"]}
            raise ExternalIdExists("This external_id is in use", **user)

    def account(self, reference: str) -> Account:
        """Return a customer's account by its id or its name@ASSET, or raise AccountNotFound."""
        if reference not in self.accounts:
            self.lock([reference])
        account = self.accounts.get(reference)
        if account is None or account.kind != "CUSTOMER":
            raise AccountNotFound(f"There is no account {reference}", reference)
        return account

    def system_account(self, name: str, asset: str) -> Account:
        """Return the contra account of an operation; its asset's others are locked with it."""
        if f"{name}@{asset}" not in self.accounts:
            self.lock([f"{other}@{asset}" for other in CONTRA_NAMES])
        return self.accounts[f"{name}@{asset}"]

    def open(self, owner_name: str, asset: str, name: str | None = None, **columns: Any) -> Account:
        """Add an empty account, or raise AccountExists or ExternalIdExists."""
        self.lock([f"{name}@{asset}"] if name else [])
        if name and (other := self.accounts.get(f"{name}@{asset}")):
            raise AccountExists(f"There is an account {name} already", other.id)
        self.require_new("account", columns.get("external_id"))
        columns |= {"id": self.new_id(), "name": name, "owner_name": owner_name, "asset": asset}
        account = Account(**columns, created_at=self.now)
        self.remember(account)
        self.insert("account", dict(vars(account)))
        self.index_metadata(vars(account))
        return account

    def lock(self, references: Iterable[str], *queries: tuple[str, Row]) -> list[list[Row]]:
        """Load accounts of any kind that the batch does not hold yet; answer further queries."""
        missing = [reference for reference in references if reference not in self.accounts]
        if not missing and not queries:
            return []
        rows, newest, *found = self.connection.all_rows(lock_accounts(missing), NEWEST, *queries)
        self.follow(newest)
        loaded = [row for row in rows if row["id"] not in self.accounts]
        for row in loaded:
            self.remember(Account.of(row))
        self.release_expired([row["id"] for row in loaded if row["held"]])
        return found

    def release_expired(self, ids: list[str]) -> None:
        """Make available what expired holds still hold of accounts that were just loaded."""
        if ids:
            query = f"SELECT * FROM hold WHERE account_id = ANY(:ids) AND {IS_OVER} LIMIT :limit"  # noqa: S608
            expired = self.connection.rows(query, ids=ids, now=self.now, limit=EXPIRED_MAX + 1)
            self.is_tidy = len(expired) <= EXPIRED_MAX
            for hold in expired[:EXPIRED_MAX]:
                self.release(hold, status="EXPIRED")
                asked = {"caller": "system", "arguments": json.dumps({"hold_id": hold["id"]})}
                account = self.accounts[hold["account_id"]]
                self.record("expire", account, effective_at=None, key=None, **asked)

    def release(self, hold: Row, **changes: Any) -> None:
        """End a hold, which makes what it held available."""
        account = self.accounts[hold["account_id"]]
        self.change("hold", hold, **changes)
        self.change("account", vars(account), held=account.held - hold["amount"])

    def follow(self, newest: list[Row]) -> None:
        """Let times and ids rise, whatever clocks and other servers do, or raise LedgerUpgraded."""
        if any(row["version"] != SCHEMA_VERSION for row in newest):
            raise LedgerUpgraded
        newest = [row for row in newest if row["id"]]
        # The clock anew, once: the accounts that a batch locks first may have been waited for.
        clock = self.now if self.last_time else utc_now()
        self.now = max([self.now, clock, *(row["ts"] for row in newest)])
        times = [time_of_id(row["id"]) for row in newest]
        self.last_time = max(self.last_time, (self.now << 12) // 1_000 - 1, *times)

    def new_id(self) -> str:
        """Return a version 7 UUID (RFC 9562): 60 bits of time, which rises, and 60 to be drawn."""
        self.last_time += 1
        if not self.random:  # Many at once: to ask the system takes long.
            self.random = re.findall(".{15}", secrets.token_hex(120))
        head, drawn = (self.last_time << 4).to_bytes(8).hex(), self.random.pop()
        return f"{head[:8]}-{head[8:12]}-7{head[12:15]}-8{drawn[:3]}-{drawn[3:]}"

    def remember(self, account: Account) -> None:
        """Let an account be found by its id, and by its name if it has one."""
        aliases = [f"{account.name}@{account.asset}"] if account.name else []
        for reference in (account.id, *aliases):
            self.accounts[reference] = account
            self._undo.append(partial(self.accounts.pop, reference))

    def insert(self, table: str, row: Row) -> None:
        rows = self.inserts[table]
        rows.append(row)
        self._undo.append(rows.pop)

    def change(self, table: str, row: Row, **values: Any) -> None:
        """Change a loaded row, which the batch will write, or raise where it never does."""
        if not CHANGEABLE[table].issuperset(values):
            raise LookupError(f"{table} is not changed in this way: {', '.join(values)}")
        self._undo.append(partial(row.update, row.copy()))
        row.update(values)
        changed = self.updates[table]
        if id(row) not in changed:
            changed[id(row)] = row
            self._undo.append(partial(changed.pop, id(row)))

    def ask(self, statement: str, **values: Any) -> list[Row]:
        """Ask the database in the middle of the batch, after it was told what has changed."""
        self.write()
        return self.connection.rows(statement, **values)

    def write(self) -> None:
        """Write what was gathered, after a savepoint, so that a refusal can still undo it."""
        if not self._written:
            self.connection.execute("SAVEPOINT gathered")
            self._written = self.inserts, self.updates
        self.connection.save(self.inserts, self.updates)
        self.inserts, self.updates = defaultdict(list), defaultdict(dict)

    def begin(self, command: "Command") -> None:
        """Note whose turn it is; what was done before it stays."""
        self.asked = {"caller": command.caller, "arguments": command.arguments}
        self.asked |= {"effective_at": command.effective_at, "key": command.key}
        self.events, self._undo = [], []

    def keep(self, answer: "Answer") -> None:
        """Let what the command has done stay; its events know what it was answered."""
        hashed = self.asked["key"] and answer.hash()
        for event in filter(itemgetter("key"), self.events):
            event["answer"] = hashed
            if self._written:  # The event too, maybe.
                self.updates["event"][id(event)] = event
        if self._written:
            self.connection.execute("RELEASE SAVEPOINT gathered")
            self._written = None

    def take_back(self) -> None:
        """Take back all that the command has done."""
        if self._written:
            self.connection.execute("ROLLBACK TO SAVEPOINT gathered")
            self.connection.execute("RELEASE SAVEPOINT gathered")
            (self.inserts, self.updates), self._written = self._written, None
        while self._undo:
            self._undo.pop()()


ACCOUNTS_OF = "of:"  # Before the id of a hold or of a transaction: the accounts that it is about.
ACCOUNTS_OF_OTHERS = """SELECT account_id FROM hold WHERE id = ANY(:others)
    UNION SELECT dest_account_id FROM hold WHERE id = ANY(:others)
    UNION SELECT account_id FROM entry WHERE transaction_id = ANY(:others)"""


def lock_accounts(references: Sequence[str]) -> tuple[str, Row]:
    """Return the query for accounts, in one order, customers first, so that no batches deadlock."""
    names = [reference.rpartition("@")[0] for reference in references if "@" in reference]
    others = [r.removeprefix(ACCOUNTS_OF) for r in references if r.startswith(ACCOUNTS_OF)]
    by_name = "OR name = ANY(:names) AND name || '@' || asset = ANY(:references)" if names else ""
    where = f"id = ANY(:references) {by_name}"
    if others:
        where = f"id IN (SELECT id FROM account WHERE {where} UNION {ACCOUNTS_OF_OTHERS})"  # noqa: S608
    query = f"SELECT * FROM account WHERE {where} ORDER BY kind, id FOR UPDATE"  # noqa: S608
    return query, {"references": list(references), "names": names, "others": others}


def require_balanced(legs: Sequence[Leg]) -> None:
    """Refuse legs that make or lose money of an asset, and an account that is in two of them."""
    amounts: defaultdict[str, list[int]] = defaultdict(list)
    for account, amount in legs:
        amounts[account.asset].append(amount)
    if len({account.id for account, _ in legs}) < len(legs):
        [(repeated, _)] = Counter(account.id for account, _ in legs).most_common(1)
        raise AccountRepeated("An account may stand in one entry alone", repeated)
    for asset, given in amounts.items():
        if sum(given) or 0 in given:
            debits = -sum(amount for amount in given if amount < 0)
            sums = {"asset": asset, "debits": debits, "credits": sum(given) + debits}
            raise Unbalanced(f"The debits of {asset} must equal its credits", **sums)
    if not legs:
        raise Unbalanced("There must be entries")


def require_active(account: Account) -> None:
    """Refuse an account that moves no money."""
    if account.status != "ACTIVE":
        refusal = AccountFrozen if account.status == "FROZEN" else AccountClosed
        raise refusal(f"Account {account.id} is {account.status.lower()}", account.id)


def require_funds(leg: Leg) -> None:
    """Refuse a leg that needs more than is available, or would take a balance out of bounds."""
    account, amount = leg
    if amount < 0 and account.kind == "CUSTOMER" and account.available + amount < 0:
        why = f"Of account {account.id}, {account.available} is available, and {-amount} is needed"
        sums = {"balance": account.balance, "available": account.available, "requested": -amount}
        raise InsufficientFunds(why, account.id, **sums, credit_limit=account.credit_limit)
    balance_max = CUSTOMER_MAX if account.kind == "CUSTOMER" else BALANCE_MAX
    # What an earlier version let grow beyond may come back.
    if abs(account.balance + amount) > max(balance_max, abs(account.balance)):
        why = f"A balance may not leave the range of {balance_max} minor units"
        raise BalanceLimit(why, account.id)


# ----- Batches
# Group commit. Whatever arrives while the last commit was on its way to the disk is written and
# committed together, and only then is anybody answered. Idempotency lives here.

ATTEMPTS_MAX, GATHERING_TURNS_MAX, TURNS_AFTER_LARGE, LARGE_ACCOUNTS = 4, 32, 4, 50
NEWEST_EVENT = "SELECT id, ts FROM event ORDER BY id DESC LIMIT 1"
NEWEST = f"SELECT version, id, ts FROM schema_version LEFT JOIN ({NEWEST_EVENT}) AS e ON 1=1", Row()  # noqa: S608
Loop = asyncio.AbstractEventLoop
Pending = asyncio.Future[Any]  # The answer, or the exception that there was instead.


class Answer(NamedTuple):
    """What the caller of a command gets, and gets again with the same key, byte for byte."""

    status: int
    body: str
    location: str | None = None
    replayed: bool = False

    def hash(self) -> str:
        """Return what an event knows of its answer."""
        return sha256(f"{self.status}\n{self.location or ''}\n{self.body}")


DONE = Answer(200, "")


class IdempotencyKey(Stored, table=True):
    """The answer that a key was given; `name` is `caller|operation|key`."""

    name: str = Field(primary_key=True)
    fingerprint: str
    status: int
    body: str
    location: str | None = None
    ts: int


class Command(NamedTuple):
    """What one caller wants done, once."""

    caller: str
    arguments: str  # As JSON: two requests that are parsed alike have the same.
    run: Callable[[Book], Answer | None]
    key: str | None = None  # The idempotency key as it is stored; without one, a retry acts again.
    accounts: Sequence[str] = ()  # Those that are named, so that a batch loads them all at once.
    effective_at: int | None = None  # The caller's own time, where its dialect has a clock.


def sha256(text: str) -> str:
    """Return the hash of a text, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def stored_key(caller: str, operation: str, key: str) -> str:
    """Return a key as it is stored; a caller's own `|` is escaped, so that no two collide."""
    return f"{caller.replace('%', '%25').replace('|', '%7C')}|{operation}|{key}"


def execute_command(command: Command, book: Book, known: dict[str, Row]) -> Answer:
    """Execute one command of a batch, or replay the answer that its key was given before."""
    fingerprint = sha256(command.arguments)
    if stored := known.get(command.key or ""):
        if stored["fingerprint"] == fingerprint:
            return Answer(stored["status"], stored["body"], stored["location"], replayed=True)
        return IdempotencyKeyReused("This key was used for something else").to_answer()
    book.begin(command)
    try:
        answer = command.run(book) or DONE
        book.keep(answer)
    except LedgerError as refusal:
        # No error of the database: inside a write that is the driver's still, and ends it.
        book.take_back()
        answer = refusal.to_answer()
    if command.key is not None:
        # In the same commit as what it did: both are on disk, or neither is.
        stored = {"name": command.key, "fingerprint": fingerprint, "ts": book.now}
        stored |= {"status": answer.status, "body": answer.body, "location": answer.location}
        book.insert("idempotency_key", stored)
        known[command.key] = stored
    return answer


class Ledger:
    """The one function that executes commands, and the way to it, from any event loop."""

    def __init__(self, database: "Database") -> None:
        self.database = database
        self._waiting: defaultdict[Loop, list[tuple[Command, Pending]]] = defaultdict(list)
        self._writing: dict[Loop, asyncio.Task[None]] = {}
        self._crediting: defaultdict[Loop, asyncio.Lock] = defaultdict(asyncio.Lock)

    def commit(self, commands: Sequence[Command]) -> list[Answer]:
        """Execute commands in one write, or raise: none was then, or else the key will tell."""
        references = {reference for command in commands for reference in command.accounts}
        keys = [command.key for command in commands if command.key is not None]
        with self.database.write() as connection:
            book = Book(connection)
            stored = "SELECT * FROM idempotency_key WHERE name = ANY(:keys)"
            # In one round trip: the accounts, the newest event, and the keys.
            [rows] = book.lock(references, (stored, {"keys": keys}))
            known = {row["name"]: row for row in rows}
            is_tidy = book.is_tidy
            answers = [execute_command(command, book, known) for command in commands if is_tidy]
            connection.save(book.inserts, book.updates)
        # The end of "with" has committed; only now is anybody answered.
        if not is_tidy:
            raise ManyExpired  # Some were released, and that stays: who tries again gets further.
        return answers

    def commit_or_split(self, commands: Sequence[Command], attempt: int = 1) -> list[Any]:
        """Commit a batch, or else each command alone, so that no mistake sinks its neighbours."""
        try:
            return self.commit(commands)
        except Exception as error:
            if isinstance(error, DatabaseConflict) and attempt < ATTEMPTS_MAX:
                # Nothing was committed, and a key that the other server has used is replayed.
                time.sleep(random.getrandbits(6) * attempt / 1_000)
                return self.commit_or_split(commands, attempt + 1)
            of_all = isinstance(error, DatabaseLost) or type(error) is DatabaseBusy
            if of_all or len(commands) == 1:
                return [error] * len(commands)
            log.warning("a batch of %d was refused, each is tried alone: %r", len(commands), error)
        return [outcome for command in commands for outcome in self.commit_or_split([command])]

    async def submit(self, command: Command) -> Answer:
        """Have a command executed in the next batch; return its answer after the commit."""
        loop, deadline = asyncio.get_running_loop(), time.monotonic() + BUSY_SECONDS_MAX
        while True:
            answer = loop.create_future()
            self._waiting[loop].append((command, answer))
            if loop not in self._writing:
                self._writing[loop] = loop.create_task(self._write_batches(loop))
            outcome = await (answer if self.database.inline else in_time(answer))
            if isinstance(outcome, Answer):
                return outcome
            if not isinstance(outcome, DatabaseBusy) or time.monotonic() > deadline:
                is_ours = isinstance(outcome, LedgerError)  # Else the log tells where.
                raise outcome.with_traceback(None) if is_ours else outcome
            await asyncio.sleep(BUSY_RETRY_SECONDS)

    async def _write_batches(self, loop: Loop) -> None:
        """Write what waits, and what has come meanwhile, until nothing waits."""
        is_large = False
        while self._waiting[loop]:
            for turn in range(GATHERING_TURNS_MAX):
                # While more arrives, it is worth a turn; what came during a long batch takes some.
                seen = len(self._waiting[loop])
                await asyncio.sleep(0)
                if len(self._waiting[loop]) == seen and turn >= TURNS_AFTER_LARGE * is_large:
                    break
            # Those that `in_time` has answered 503 meanwhile are not begun.
            waiting = [each for each in self._waiting.pop(loop) if not each[1].done()]
            # A large one is a batch of its own, after which small ones have their turn.
            small = [each for each in waiting if len(each[0].accounts) < LARGE_ACCOUNTS]
            large = [each for each in waiting if len(each[0].accounts) >= LARGE_ACCOUNTS]
            is_large = bool(large) and not (is_large and small)
            batch = large[:1] if is_large else small
            self._waiting[loop] = small + large[1:] if is_large else large
            commands = [command for command, _ in batch]
            outcomes = await self.database.run_write(self.commit_or_split, commands)
            for (_, answer), outcome in zip(batch, outcomes, strict=True):
                if not answer.done():  # Else it was told 503 meanwhile; what was done stays done.
                    answer.set_result(outcome)
        del self._writing[loop]

    async def credit_due(self, clock: str, until: int, caller: str = "system") -> None:
        """Credit what is due by a clock; one pass at a time serves all who wait for it."""
        due = {"clock": clock, "until": until, "limit": 1}
        run = partial(credit_cashbacks, clock=clock, until=until)
        look = partial(self.database.run_read, lambda books: books.rows(DUE_CASHBACKS, **due))
        while await look(urgent=True):
            async with self._crediting[asyncio.get_running_loop()]:
                # A pass that has ended meanwhile may have credited what we saw.
                if await look(urgent=True):
                    await self.submit(Command(caller, "{}", run))


# ----- Operations
# What can happen to money and to accounts, each as bookkeeping over `post`. An operation may post
# and ask as often as it needs; it knows no URL and no dialect.


# fmt: off
class SameAccount(LedgerError, status=400): ...
class AssetNotFound(LedgerError, status=404): ...
class AssetExists(LedgerError, status=409): ...
class TransactionNotFound(LedgerError, status=404, about="transaction_id"): ...
class HoldNotFound(LedgerError, status=404, about="hold_id"): ...
class AccountNotEmpty(LedgerError, status=409): ...
class CreditLimitInUse(LedgerError, status=409): ...
class InvalidStateTransition(LedgerError, status=409): ...
class AssetMismatch(LedgerError, status=409): ...
class AssetClosedLoop(LedgerError, status=409): ...
class AssetOpenLoop(LedgerError, status=409): ...
class CashbackPending(LedgerError, status=409): ...
class AlreadyReversed(LedgerError, status=409, about="transaction_id"): ...
class CashbackCredited(LedgerError, status=409, about="transaction_id"): ...
class NotReversible(LedgerError, status=409, about="transaction_id"): ...
class BulkFailed(LedgerError, status=409): ...
class HoldsPending(LedgerError, status=409): ...
class HoldCaptured(LedgerError, status=409, about="hold_id"): ...
class HoldVoided(LedgerError, status=409, about="hold_id"): ...
class HoldExpired(LedgerError, status=409, about="hold_id"): ...
class AmountExceedsHold(LedgerError, status=409, about="hold_id"): ...
# fmt: on


class AssetPublic(Stored):
    """What is counted. A closed-loop asset is issued, given and spent, and moves no other way."""

    code: str = Field(primary_key=True)
    name: str
    exponent: int
    closed_loop: Annotated[int, pydantic.PlainSerializer(bool, return_type=bool)]


class Asset(AssetPublic, table=True):
    """Every asset: those that each ledger has, and one's own, which events have added."""

    __table_args__ = (
        sa.CheckConstraint("exponent BETWEEN 0 AND 12"),
        sa.CheckConstraint("closed_loop BETWEEN 0 AND 1"),
        STRICT,
    )


ASSETS = {
    code: AssetPublic(code=code, name=name, exponent=exponent, closed_loop=closed_loop)
    for code, name, exponent, closed_loop in (
        ("USD", "US Dollar", 2, 0), ("EUR", "Euro", 2, 0), ("GBP", "Pound Sterling", 2, 0),
        ("JPY", "Yen", 0, 0), ("GOLD", "Gold Coins", 4, 1), ("DMND", "Diamonds", 4, 1),
        ("PTS", "Loyalty Points", 4, 1),
    )
}  # fmt: skip


def system_accounts(assets: Iterable[AssetPublic]) -> set[tuple[str, str]]:
    """Return the names and assets of the system accounts that assets need."""
    # Cash is the money outside. Payments go to "merchants"; to "payments" where the caller has a
    # clock. Cashbacks come out of our own pocket, and the treasury issues closed-loop assets.
    names = {0: ("cash", "merchants", "cashback"), 1: ("treasury",)}
    return {(name, asset.code) for asset in assets for name in names[asset.closed_loop]}


SYSTEM_ACCOUNTS = system_accounts(ASSETS.values()) | {("payments", "USD")}


def find_asset(book: Book, code: str) -> AssetPublic:
    """Return an asset, or raise AssetNotFound; it never changes, so it is looked for once."""
    if not (known := ASSETS.get(code) or book.assets.get(code)):
        for row in book.ask("SELECT * FROM asset WHERE code = :code", code=code):
            known = book.assets[code] = AssetPublic.of(row)
    if not known:
        raise AssetNotFound(f"There is no asset {code}: GET /assets lists all")
    return known


def add_asset(book: Book, **columns: Any) -> AssetPublic:
    """Add an asset of one's own, for ever, with its system accounts, or raise AssetExists."""
    asset, exists = AssetPublic.of(columns), AssetExists("There is an asset of this code already")
    if book.ask("SELECT code FROM asset WHERE code = :code", code=asset.code):
        raise exists
    book.insert("asset", columns)
    try:
        for name, code in sorted(system_accounts([asset])):
            book.open("system", code, name, kind="SYSTEM")
    except AccountExists:  # Another server has added it since that look.
        raise exists from None
    book.record("add_asset", None)
    return asset


def open_account(book: Book, *, owner_name: str, asset: str, **columns: Any) -> Account:
    """Open an empty account for a customer."""
    if find_asset(book, asset).closed_loop:
        if asset in ASSETS:
            raise AssetClosedLoop(f"The accounts of {asset} are opened as wallets")
        if columns.get("credit_limit"):
            raise AssetClosedLoop(f"{asset} is issued, and nobody owes it: leave credit_limit out")
    account = book.open(owner_name, asset, **columns)
    book.record("open_account", account, credit_limit=account.credit_limit or None)
    return account


def require_open_loop(book: Book, account: Account) -> None:
    """Refuse an asset that only its own operations move."""
    if find_asset(book, account.asset).closed_loop:
        why = f"{account.asset} is moved by top-up, bonus and spend alone"
        raise AssetClosedLoop(why, account.id)


def payer_and_payee(book: Book, source: str, dest: str) -> tuple[Account, Account]:
    """Return two accounts of one asset, between which money may move."""
    if source == dest:
        raise SameAccount("Cannot transfer to the same account", source)
    payer, payee = book.account(source), book.account(dest)
    require_open_loop(book, payer)
    if payer.asset != payee.asset:
        why = "The accounts hold different assets"
        raise AssetMismatch(why, payer.id, dest_account_id=payee.id)
    return payer, payee


def deposit(book: Book, reference: str, *, amount: int, **event: Any) -> Account:
    """Take money in: DEBIT cash, CREDIT the account."""
    account = book.account(reference)
    require_open_loop(book, account)
    cash = book.system_account("cash", account.asset)
    book.post("DEPOSIT", [Leg(cash, -amount), Leg(account, +amount)], **event)
    return account


def withdraw(book: Book, reference: str, *, amount: int, **event: Any) -> Account:
    """Pay money out: DEBIT the account, CREDIT cash."""
    account = book.account(reference)
    require_open_loop(book, account)
    cash = book.system_account("cash", account.asset)
    book.post("WITHDRAWAL", [Leg(account, -amount), Leg(cash, +amount)], **event)
    return account


def transfer(
    book: Book, source_account_id: str, dest_account_id: str, *, amount: int, **event: Any
) -> str:
    """Move money between two customers: DEBIT the source, CREDIT the destination."""
    payer, payee = payer_and_payee(book, source_account_id, dest_account_id)
    return book.post("TRANSFER", [Leg(payer, -amount), Leg(payee, +amount)], **event)


CASHBACK_PERCENT = 2
CASHBACK_DELAY = 24 * 60 * 60 * 1_000_000  # Microseconds from a payment to its cashback.
TO_CREDIT = "status = 'SCHEDULED' AND amount > 0"
TO_COME = "account_id = :id AND status <> 'CREDITED'"  # As its index has it.


class CashbackPublic(Stored):
    """What a payment brings back: SCHEDULED until it is due, then CREDITED."""

    amount: int
    due_at: Timestamp
    status: CashbackStatus = "SCHEDULED"


class ScheduledCashback(CashbackPublic, table=True):
    """A promise, by the server's clock or by the caller's; it is WAITING for a frozen account."""

    __table_args__ = (
        partial_index("cashback_due", "clock", "due_at", where=TO_CREDIT),
        partial_index("cashback_to_come", "account_id", where="status <> 'CREDITED'"),
        sa.CheckConstraint("clock IN ('SERVER', 'CALLER')"),
        sa.CheckConstraint("status IN ('SCHEDULED', 'WAITING', 'CREDITED', 'CANCELLED')"),
        sa.CheckConstraint("amount >= 0"),
        NO_ROWID,
    )

    payment_id: str = Field(primary_key=True, foreign_key="event.id")
    account_id: str = Field(foreign_key="account.id")
    clock: str
    number: int | None = Field(default=None, unique=True)  # Of the payments by a caller's clock.
    transaction_id: str | None = Field(default=None, foreign_key="event.id")  # Which credited it.


def pay(book: Book, account_id: str, *, amount: int, payee: str = "merchants", **event: Any) -> Row:
    """Pay, and promise a cashback: DEBIT the account, CREDIT the payee; return the promise."""
    account = book.account(account_id)
    require_open_loop(book, account)
    contra = book.system_account(payee, account.asset)
    payment_id = book.post("PAYMENT", [Leg(account, -amount), Leg(contra, +amount)], **event)
    effective_at, number = book.asked["effective_at"], None
    if effective_at is not None:
        # Without a gap: the payee's account is locked until the commit.
        [last] = book.ask("SELECT max(number) AS number FROM scheduled_cashback")
        number = (last["number"] or 0) + 1
    cashback = {
        "payment_id": payment_id,
        "account_id": account.id,
        "amount": amount * CASHBACK_PERCENT // 100,
        "due_at": (book.now if effective_at is None else effective_at) + CASHBACK_DELAY,
        "clock": "SERVER" if effective_at is None else "CALLER",
        "number": number,
        "status": "SCHEDULED",
        "transaction_id": None,
    }
    book.insert("scheduled_cashback", cashback)
    return cashback


DUE_CASHBACKS = f"""SELECT * FROM scheduled_cashback WHERE clock = :clock AND due_at <= :until
    AND {TO_CREDIT} ORDER BY due_at, payment_id LIMIT :limit"""  # noqa: S608


def credit_cashbacks(book: Book, *, clock: str, until: int) -> None:
    """Credit up to 500 that are due by a clock, in order: DEBIT cashback, CREDIT the account."""
    among: Row = {"clock": clock, "until": until, "limit": 500}
    # Their accounts first, as everywhere: what another server has credited then, is no more due.
    book.lock({row["account_id"] for row in book.ask(DUE_CASHBACKS, **among)})
    due = book.ask(f"{DUE_CASHBACKS} FOR UPDATE", **among)
    for row in [row for row in due if row["account_id"] in book.accounts]:
        account = book.account(row["account_id"])
        contra = book.system_account("cashback", account.asset)
        legs = [Leg(contra, -row["amount"]), Leg(account, +row["amount"])]
        details, effective_at = {"payment_id": row["payment_id"]}, None
        if clock == "CALLER":
            details["timestamp"], effective_at = until // 1_000, row["due_at"]
        event = {"effective_at": effective_at, "arguments": json.dumps(details)}
        try:
            credited = book.post("CASHBACK", legs, memo=row["payment_id"], **event)
            changes = {"status": "CREDITED", "transaction_id": credited}
        except LedgerError:
            changes = {"status": "WAITING"}  # Until the account is unfrozen.
        book.change("scheduled_cashback", row, **changes)


# From each state, where an account may go, and what that is called.
STATUS_STEPS = {
    "ACTIVE": {"FROZEN": "freeze", "CLOSED": "close"},
    "FROZEN": {"ACTIVE": "unfreeze", "CLOSED": "close"},
    "CLOSED": {},
}


def change_status(book: Book, reference: str, status: str) -> Account:
    """Freeze, unfreeze or close an account; it is closed only if nothing is left or to come."""
    account = book.account(reference)
    if status not in STATUS_STEPS[account.status]:
        why = f"No account goes from {account.status} to {status}"
        raise InvalidStateTransition(why, account.id)
    if status == "CLOSED":
        require_nothing_left(book, account)
    book.record(STATUS_STEPS[account.status][status], account)
    book.change("account", vars(account), status=status)
    if status == "ACTIVE":
        # Written at once, because the database takes entries of active accounts alone.
        book.write()
        again = f"SET status = 'SCHEDULED' WHERE {TO_COME} AND status = 'WAITING'"
        book.connection.execute(f"UPDATE scheduled_cashback {again}", id=account.id)
    return account


def require_nothing_left(book: Book, account: Account) -> None:
    """Refuse to close an account with holds, with money in it, or with money to come."""
    either = "account_id = :id OR dest_account_id = :id"
    holds = f"SELECT id FROM hold WHERE ({either}) AND {PENDING} AND expires_at > :now"  # noqa: S608
    for hold in book.ask(holds, id=account.id, now=book.now):
        why = f"Account {account.id} has a pending hold: capture or void it first"
        raise HoldsPending(why, account.id, hold_id=hold["id"])
    if account.balance:
        held = f"Account {account.id} holds {account.balance}: only an empty one can be closed"
        raise AccountNotEmpty(held, account.id, balance=account.balance)
    to_come = f"{TO_COME} AND status IN ('SCHEDULED', 'WAITING') AND amount > 0"
    promises = f"SELECT 1 AS one FROM scheduled_cashback WHERE {to_come} LIMIT 1"  # noqa: S608
    if book.ask(promises, id=account.id):
        why = f"Account {account.id} has cashback to come: close it later"
        raise CashbackPending(why, account.id)


def open_wallets(book: Book, *, owner_name: str, name: str) -> None:
    """Open a customer's wallets, an empty one of each closed-loop asset."""
    wallets = [book.open(owner_name, a.code, name) for a in ASSETS.values() if a.closed_loop]
    book.record("open_wallets", wallets[0])


def move_credits(book: Book, reference: str, *, amount: int, kind: str, **event: Any) -> str:
    """Issue credits: DEBIT treasury, CREDIT the wallet; of a SPEND, `amount` is negative."""
    wallet = book.account(reference)
    if not find_asset(book, wallet.asset).closed_loop:
        raise AssetOpenLoop(f"{wallet.asset} is not issued: it is deposited", wallet.id)
    treasury = book.system_account("treasury", wallet.asset)
    return book.post(kind, [Leg(treasury, -amount), Leg(wallet, +amount)], **event)


def journal(book: Book, entries: Iterable[tuple[str, int]], **event: Any) -> str:
    """Post entries between customers: each is an account and a signed amount."""
    legs = [Leg(book.account(reference), amount) for reference, amount in entries]
    for leg in legs:
        require_open_loop(book, leg.account)
    return book.post("JOURNAL", legs, **event)


REVERSED_BY = "(SELECT id FROM event AS later WHERE later.reverses = event.id) AS reversed_by"


def reverse(book: Book, transaction_id: str, **event: Any) -> str:
    """Take a transaction back as a whole: the same entries, turned round, and only once."""
    # Its accounts first, as everywhere: while they are locked, nobody else reverses it.
    book.lock([ACCOUNTS_OF + transaction_id])
    query = f"SELECT kind, {REVERSED_BY} FROM event WHERE id = :id AND {IS_TRANSACTION}"  # noqa: S608
    found = book.ask(query, id=transaction_id)
    if not found:
        raise TransactionNotFound(f"There is no transaction {transaction_id}", transaction_id)
    kind, reversed_by = found[0].values()
    if kind == "REVERSAL":
        raise NotReversible("A reversal cannot be reversed", transaction_id)
    if reversed_by:
        why = "This transaction was reversed before"
        raise AlreadyReversed(why, transaction_id, reversed_by=reversed_by)
    if kind == "PAYMENT":
        cancel_cashback(book, transaction_id)
    signs = {"DEBIT": +1, "CREDIT": -1}
    query = "SELECT * FROM entry WHERE transaction_id = :id ORDER BY id"
    entries = book.ask(query, id=transaction_id)
    legs = [Leg(book.accounts[e["account_id"]], signs[e["type"]] * e["amount"]) for e in entries]
    return book.post("REVERSAL", legs, reverses=transaction_id, **event)


def cancel_cashback(book: Book, payment_id: str) -> None:
    """Take a promise back, unless its money was credited and is still there."""
    query = "SELECT * FROM scheduled_cashback WHERE payment_id = :id FOR UPDATE"
    [cashback] = book.ask(query, id=payment_id)
    credited = cashback["transaction_id"]
    if credited and not book.ask("SELECT id FROM event WHERE reverses = :id", id=credited):
        why = f"Reverse the cashback first: transaction {credited}"
        raise CashbackCredited(why, payment_id, credited_by=credited)
    book.change("scheduled_cashback", cashback, status="CANCELLED")


class Note(Stored, table=True):
    """One member of somebody's metadata, by which an account or a transaction is found."""

    __table_args__ = (NO_ROWID,)

    name: str = Field(primary_key=True)
    value: str = Field(primary_key=True)
    owner_id: str = Field(primary_key=True, index=True)


def change_account(book: Book, reference: str, **changes: Any) -> Account:
    """Change what an account's owner is called, the notes about it, or its credit limit."""
    account, event = book.account(reference), Row()
    if (limit := changes.get("credit_limit")) is not None:
        require_open_loop(book, account)
        if account.status == "CLOSED":
            require_active(account)
        if account.balance - account.held + limit < 0:
            why = f"Account {account.id} uses more than a credit limit of {limit} allows"
            sums = {"balance": account.balance, "held": account.held}
            raise CreditLimitInUse(why, account.id, **sums, available=account.available)
        before = {"before": {"credit_limit": account.credit_limit}}
        told = json.dumps(json.loads(book.asked["arguments"]) | before)
        event = {"credit_limit": limit, "arguments": told}
    book.record("update_account", account, **event)
    book.change("account", vars(account), **changes)
    book.write()
    book.connection.update("account", NAMING_COLUMNS, [vars(account)])
    if "notes" in changes:
        book.connection.execute("DELETE FROM note WHERE owner_id = :id", id=account.id)
        book.index_metadata(vars(account))
    return account


def transfer_many(book: Book, transfers: Iterable[Row], *, atomic: bool) -> list[Row]:
    """Make one transfer after the other; if it is `atomic`, all of them or none."""
    results = []
    for index, each in enumerate(transfers):
        result: Row = {"index": index, "transfer_id": None, "error": None}
        try:
            # One that is refused has changed nothing: its only post checks all before.
            result["transfer_id"] = transfer(book, **each)
        except LedgerError as refusal:
            result["error"] = json.loads(refusal.to_answer().body)
            if atomic:
                why = f"Transfer {index} was refused, and none was made"
                raise BulkFailed(why, index=index, error=result["error"]) from None
        results.append(result)
    return results


# ----- Holds
# Money that is promised and not moved yet: it stays where it is, and is no longer available.

HOLD_ENDS = {"CAPTURED": HoldCaptured, "VOIDED": HoldVoided, "EXPIRED": HoldExpired}


class HoldPublic(Stored):
    """Money that is promised and not moved yet, until it is captured, voided or expired."""

    id: str = Field(primary_key=True)
    status: HoldStatus = "PENDING"
    account_id: str = Field(foreign_key="account.id")
    dest_account_id: str = Field(foreign_key="account.id")
    asset: str
    amount: int
    captured_amount: int = 0
    transaction_id: str | None = Field(default=None, foreign_key="event.id")
    memo: str | None = None
    external_id: str | None = None
    notes: StoredMetadata = None
    created_at: Timestamp
    expires_at: Timestamp


class Hold(HoldPublic, table=True):
    """Every hold; one that has expired is PENDING here for a moment, while nobody needs it."""

    __table_args__ = (
        sa.Index("hold_from", "account_id", "id"),
        sa.Index("hold_to", "dest_account_id", "id"),
        partial_index("hold_pending", "account_id", "expires_at", where=PENDING),
        partial_index("hold_due", "expires_at", where=PENDING),
        partial_index("hold_external_id", "external_id", where=HAS_EXTERNAL_ID, unique=True),
        sa.CheckConstraint("status IN ('PENDING', 'CAPTURED', 'VOIDED', 'EXPIRED')"),
        sa.CheckConstraint("amount >= 1 AND captured_amount BETWEEN 0 AND amount"),
        sa.CheckConstraint("(status = 'CAPTURED') = (captured_amount > 0)"),
        sa.CheckConstraint("(status = 'CAPTURED') = (transaction_id IS NOT NULL)"),
        NO_ROWID,
    )


def place_hold(
    book: Book, account_id: str, dest_account_id: str, *, expires_in: int, **columns: Any
) -> HoldPublic:
    """Promise money to an account, for some seconds: a hold writes no entries."""
    account, payee = payer_and_payee(book, account_id, dest_account_id)
    for one in (account, payee):
        require_active(one)
    require_funds(Leg(account, -columns["amount"]))
    book.require_new("hold", columns["external_id"])
    ends = {"account_id": account.id, "dest_account_id": payee.id, "asset": account.asset}
    times = {"created_at": book.now, "expires_at": book.now + expires_in * 1_000_000}
    hold = HoldPublic(**{"id": book.new_id(), **ends, **times, **columns})
    book.insert("hold", vars(hold))
    book.change("account", vars(account), held=account.held + hold.amount)
    book.record("hold", account)
    return hold


def capture(book: Book, hold_id: str, *, amount: int | None, **event: Any) -> Row:
    """Move what was promised, or a part of it; the rest is available again at once."""
    hold = pending_hold(book, hold_id)
    moved = amount or hold["amount"]
    if moved > hold["amount"]:
        raise AmountExceedsHold(f"The hold is of {hold['amount']}", hold_id, amount=hold["amount"])
    book.release(hold, status="CAPTURED", captured_amount=moved)
    source, dest = book.accounts[hold["account_id"]], book.accounts[hold["dest_account_id"]]
    legs = [Leg(source, -moved), Leg(dest, +moved)]
    transaction_id = book.post("CAPTURE", legs, memo=hold["memo"], **event)
    book.change("hold", hold, transaction_id=transaction_id)
    return hold


def void(book: Book, hold_id: str) -> Row:
    """Give up what was promised."""
    hold = pending_hold(book, hold_id)
    book.release(hold, status="VOIDED")
    book.record("void", book.accounts[hold["account_id"]])
    return hold


def pending_hold(book: Book, hold_id: str) -> Row:
    """Return a hold that can still be captured or voided."""
    # Its accounts first, as everywhere: while they are locked, nobody else changes it.
    book.lock([ACCOUNTS_OF + hold_id])
    found = book.ask("SELECT * FROM hold WHERE id = :id", id=hold_id)
    if not found:
        raise HoldNotFound(f"There is no hold {hold_id}", hold_id)
    [hold] = found
    is_over = hold["status"] == "PENDING" and hold["expires_at"] <= book.now
    status = "EXPIRED" if is_over else hold["status"]
    if status != "PENDING":
        raise HOLD_ENDS[status](f"This hold is {status}", hold_id)
    return hold


EXPIRED_HOLDS = f"SELECT account_id FROM hold WHERE {IS_OVER} ORDER BY expires_at LIMIT :limit"  # noqa: S608


def expire_holds(book: Book) -> None:
    """End up to 100 holds whose time is over: to load their accounts does it."""
    due = book.ask(EXPIRED_HOLDS, now=book.now, limit=100)
    book.lock({row["account_id"] for row in due})


# ===== Part two: HTTP
# Who is asking, what a request must look like, and which operation it asks for.


# ----- Callers
# In open mode, that is until there is a key, everybody on this machine is the caller `local`.

ROLES = ("auditor", "service", "admin")
ANYONE: tuple[str, ...] = ()
READERS, AUDITORS = ROLES, ("auditor", "admin")
SERVICES, ADMINS = ("service", "admin"), ("admin",)
KEY_PREFIX, KEY_PREFIX_LENGTH = "lk_", 11
KEYS_AGE_SECONDS_MAX, LOOKS_MAX = 0.5, 50
JWT_ALGORITHM = "HS256"
JWT = jwt.PyJWT({"require": ["sub", "role", "exp"], "enforce_minimum_key_length": True})
JWT_EXP_MAX = 253_402_300_800  # The end of the year 9999.
# Their messages repeat nothing that the token holds.
JWT_FAULTS = (
    jwt.ExpiredSignatureError, jwt.ImmatureSignatureError, jwt.InvalidSignatureError,
    jwt.MissingRequiredClaimError,
)  # fmt: skip
# How the names of the headers begin by which proxies and content networks tell of a caller.
PROXY_HEADERS = (
    b"forwarded", b"x-forwarded", b"x-real-ip", b"via", b"x-client-ip", b"client-ip", b"cf-",
    b"true-client-ip", b"x-envoy-", b"x-original-", b"x-cluster-client-ip", b"fastly-",
    b"x-proxyuser-ip", b"x-appengine-", b"x-azure-", b"x-arr-", b"x-amzn-", b"x-vercel-", b"fly-",
)  # fmt: skip
JWT_CLOCK_SECONDS_MAX = 10  # By so much may the clock of who made a token be ahead.


# fmt: off
class Unauthorized(LedgerError, status=401): ...
class Forbidden(LedgerError, status=403): ...
class MalformedJson(LedgerError, status=400): ...
class IdempotencyKeyMissing(LedgerError, status=400): ...
class IdempotencyKeyInvalid(LedgerError, status=400): ...
class InvalidCursor(LedgerError, status=400): ...
class MalformedRequest(LedgerError, status=400, detail="This is not HTTP/1.1"): ...
class NotFound(LedgerError, status=404): ...
class PaymentNotFound(LedgerError, status=404, about="transaction_id"): ...
class SealNotFound(LedgerError, status=404): ...
class MethodNotAllowed(LedgerError, status=405): ...
class BodyTooLarge(LedgerError, status=413): ...
class UriTooLong(LedgerError, status=414): ...
class UnsupportedMediaType(LedgerError, status=415): ...
class InvalidRequest(LedgerError, status=422, detail="The request does not fit: see errors"): ...
class HeadersTooLarge(LedgerError, status=431): ...
# fmt: on


class Caller(NamedTuple):
    """Who is asking: `local`, `admin`, `key:<name>` or `jwt:<sub>`."""

    name: str
    role: str


class Callers:
    """What tells callers apart: the operator's secrets, and the keys in the database."""

    def __init__(self, database: "Database", settings: "Settings") -> None:
        self._database = database
        self._admin_hash = settings.admin_key and sha256(settings.admin_key)
        self._jwt_secret = os.fsencode(settings.jwt_secret or "")
        self._looked_for: set[str] = set()
        with database.read() as connection:
            self._load(connection)

    @property
    def open_mode(self) -> bool:
        """Tell whether no key was ever made, and no secret is set."""
        return not (self._keys or self._admin_hash or self._jwt_secret)

    async def authenticate(self, scope: Scope, asked: "Asked") -> Caller:
        """Return who sends a request, or raise Forbidden or Unauthorized."""
        if time.monotonic() - self._loaded_at > KEYS_AGE_SECONDS_MAX:
            self._looked_for.clear()
            await self._database.run_read(self._load, urgent=True)
        if self.open_mode:
            require_local(scope, asked.headers)
            return Caller("local", "admin")
        credential = asked.credential()
        prefix = credential[:KEY_PREFIX_LENGTH]
        is_new = prefix not in self._keys and prefix not in self._looked_for
        if is_new and prefix.startswith(KEY_PREFIX) and len(self._looked_for) < LOOKS_MAX:
            # It may have been made a moment ago: it is looked for, once until keys are too old.
            self._looked_for.add(prefix)
            await self._database.run_read(self._load, urgent=True)
        row = self._keys.get(prefix)
        # For the line in the log: of a key that is refused too, but of no unknown text.
        asked.key_prefix = row["prefix"] if row else None
        given = sha256(credential)  # The 256 random bits of a key need no slow hash.
        if self._admin_hash and hmac.compare_digest(given, self._admin_hash):
            return Caller("admin", "admin")
        if row and not row["revoked_at"] and hmac.compare_digest(given, row["hash"]):
            return Caller(f"key:{row['name']}", row["role"])
        return self._of_token(credential)

    def _load(self, connection: "Connection") -> None:
        # Revoked ones too, which keep open mode closed.
        rows, self._loaded_at = connection.rows("SELECT * FROM api_key"), time.monotonic()
        self._keys = {row["prefix"]: row for row in rows}

    def _of_token(self, token: str) -> Caller:
        if not self._jwt_secret or token.count(".") != 2:
            raise Unauthorized("The credentials are not valid")
        algorithms, why = [JWT_ALGORITHM], "Sub, role or exp is wrong"
        try:
            claims = JWT.decode(token, self._jwt_secret, algorithms, leeway=JWT_CLOCK_SECONDS_MAX)
            sub, role, exp = (claims[name] for name in ("sub", "role", "exp"))
            is_time = isinstance(exp, int | float) and time.time() < exp < JWT_EXP_MAX
            if is_time and is_name(sub) and role in ROLES:
                return Caller(f"jwt:{sub}", role)
        except JWT_FAULTS as error:
            why = str(error)
        except (jwt.PyJWTError, ValueError, ArithmeticError, RecursionError):
            why = "It cannot be read"  # Into these the parser of a hostile token may run.
        raise Unauthorized(f"The token is not valid: {why}")


def is_name(given: object) -> bool:
    """Tell whether something can name a caller: 1 to 200 printable characters."""
    return isinstance(given, str) and 0 < len(given.strip()) <= 200 and given.isprintable()


def add_key(book: Book, **key: Any) -> None:
    """Store a key, or raise StartupError where its name was ever used."""
    if book.ask("SELECT name FROM api_key WHERE name = :name", name=key["name"]):
        raise StartupError(f"there is or was a key {key['name']!r}: choose another name")
    book.insert("api_key", {**key, "created_at": book.now, "revoked_at": None})
    book.record("add_key", None)


def revoke_key(book: Book, name: str) -> None:
    """End a key, or raise StartupError where none of that name is valid."""
    query = "SELECT * FROM api_key WHERE name = :name AND revoked_at IS NULL FOR UPDATE"
    found = book.ask(query, name=name)
    if not found:
        raise StartupError(f"there is no key {name!r} that is still valid")
    book.change("api_key", found[0], revoked_at=book.now)
    book.record("revoke_key", None)


def require_local(scope: Scope, headers: Mapping[bytes, bytes]) -> None:
    """Refuse whoever is not on this machine: another peer, a proxy, a page of another site."""
    peer, own_name = ((scope.get(end) or [""])[0] for end in ("client", "server"))
    told = (headers.get(name) for name in (b"host", b"origin", b"sec-fetch-site"))
    if refusal := open_mode_refusal(tuple(headers), peer, own_name, scope["scheme"], *told):
        raise Forbidden(f"In open mode {refusal}")


@lru_cache(maxsize=100)
def open_mode_refusal(
    names: Sequence[bytes], peer: str, own_name: str, scheme: str, *told: bytes | None
) -> str:
    """Return what is wrong with a caller, if anything is; most of them tell the same."""
    host, origin, site = told
    if any(name.startswith(PROXY_HEADERS) for name in names):
        return "no proxy may stand in front of the ledger"
    # A server's own name is an address; any other is that of an application called in-process.
    is_inside = not re.fullmatch("[0-9.]*|.*:.*", own_name)
    if not (is_local(peer) or (is_inside and peer == "testclient")):
        return "only callers on this machine are served"
    if not (is_local((host or b"").decode("latin-1")) or is_inside):
        return "the Host must be this machine's own name"
    own = scheme.encode() + b"://" + (host or b"")
    if site not in (None, b"same-origin", b"none") or origin not in (None, own):
        return "no page of another origin is served"
    return ""


def is_local(host: str) -> bool:
    """Tell whether a host, with or without a port, is this machine: no other site can have it."""
    name = re.sub(r"^(\[.*\]|[^:]*):[0-9]*$", r"\1", host.lower())
    with suppress(ValueError):
        address = ipaddress.ip_address(name.strip("[]"))
        return (getattr(address, "ipv4_mapped", None) or address).is_loopback
    return name == "localhost"


# ----- Requests
# One way from every request to its answer: who calls, what is asked for, what the books say.

BODY_BYTES_MAX, PAGE_BYTES_MAX = 65_536, 524_288
RECEIVING_BYTES_MAX = SENDING_BYTES_MAX = 33_554_432  # For all callers together.
PAGE_SIZE, PAGE_SIZE_MAX = 50, 200
NEWEST_FIRST, OLDEST_FIRST = f"{10**18 - 1}_g", "0_"  # Where the pages of a list start.
ERRORS_LISTED_MAX = 20
AHEAD_MAX = 366 * 86_400 * 1_000_000  # Microseconds.
ALICE, BOB, RENT = (f"01a1fefb-c2f0-7ab1-8d0e-391f6d6292{end}" for end in ("a4", "b5", "c6"))
# What the description shows of fields, by their names.
EXAMPLES = {
    **dict.fromkeys(("id", "transfer_id", "transaction_id", "payment_id"), RENT),
    "account_id": ALICE,
    "dest_account_id": BOB,
    "asset": "USD",
    "owner_name": "alice",
    "code": "BTC",
    "exponent": 8,
    "closed_loop": False,
}


class Room:
    """How many bytes callers may take together, of what they send or of what is sent to them."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_free = bytes_max

    def take(self, asked: "Asked", size: int) -> None:
        """Take some until the request has its answer, or raise DatabaseBusy."""
        if size > self.bytes_free:
            raise DatabaseBusy("The server holds as much for its callers as it may: try again")
        self.bytes_free -= size
        asked.taken[self] = asked.taken.get(self, 0) + size


class Asked:
    """What is noted of a request on its way to its answer, for the batch and for the log."""

    def __init__(self, given: Sequence[tuple[bytes, bytes]]) -> None:
        self.headers = dict(given)
        if len(self.headers) < len(given):
            # One that is repeated is wrong wherever it counts: no good value is a line break.
            counted = Counter(name for name, _ in given)
            self.headers |= {name: b"\n" for name, count in counted.items() if count > 1}
        # It is no secret, and this is quicker than asking the system.
        self.id = f"{random.getrandbits(128):032x}"
        request_id = self.headers.get(b"x-request-id")
        if request_id and re.fullmatch(rb"[\w.:-]{1,128}", request_id):
            self.id = request_id.decode()
        self.caller: str | None = None
        self.role = "admin"  # As a program has it that opens the ledger itself.
        self.key_prefix: str | None = None
        self.taken: dict[Room, int] = {}
        # What the arguments tell besides themselves: their types note it here.
        self.key: str | None = None
        self.accounts: list[str] = []
        self.effective_at: int | None = None

    def credential(self) -> str:
        """Return the one key or token that is brought, or raise Unauthorized."""
        credential = self.headers.get(b"x-api-key", b"")
        scheme, _, token = self.headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer":  # Another scheme is a proxy's, and says nothing here.
            credential = b"" if credential else token
        if not credential.strip():
            raise Unauthorized("Send one key or token: X-API-Key, or Authorization: Bearer")
        return credential.strip().decode("latin-1")

    async def body(self, receive: Receive, room: Room, bytes_max: int) -> bytes:
        """Return the body, or raise BodyTooLarge; what comes later takes room that all share."""
        if b"upgrade" in self.headers:
            # The HTTP parser drops such a body, and takes what follows for the next request.
            raise MalformedJson("This server stays with HTTP/1.1: send no Upgrade with a body")
        declared = self.headers.get(b"content-length", b"0").lstrip(b"0")
        size = int(declared or 0) if len(declared) < 10 else bytes_max + 1
        body, more = b"", True
        while more and size <= bytes_max:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise MalformedJson("The body did not arrive as a whole")
            part, more = message.get("body", b""), message.get("more_body", False)
            if more:
                room.take(self, len(part))
            body += part
            size = max(size, len(body))
        if size > bytes_max:
            raise BodyTooLarge(f"The body may have at most {bytes_max} bytes")
        return body


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
    except (ValueError, ArithmeticError, RecursionError) as error:
        why = getattr(error, "msg", "it is nested too deeply, or has a number that is none")
        raise MalformedJson(f"The body must be one JSON document: {why}") from None
    return document


def unique_members(members: list[tuple[str, Any]]) -> Row:
    """Return a JSON object's members, and refuse a name that stands twice."""
    unique = dict(members)
    if len(unique) != len(members):
        raise MalformedJson("A name stands twice in one object of the body")
    return unique


JSON_TYPE = re.compile(rb"(?is)\s*application/([\w!#$&.^-]+\+)?json\s*(;.*)?")
# NaN and the infinities, which Python would take, are none of JSON's numbers; nor of int's.
JSON = json.JSONDecoder(object_pairs_hook=unique_members, parse_constant=int, parse_float=Decimal)


def parse_key(given: str) -> str:
    """Return a key without its quotes, or raise IdempotencyKeyInvalid."""
    key = re.fullmatch(r'[ \t]*(?:"([!#-~]{1,255})"|((?!")[!-~]{1,255}))[ \t]*', given)
    if key is None:
        raise IdempotencyKeyInvalid("The Idempotency-Key must be 1 to 255 visible ASCII characters")
    return key[1] or key[2]


def names_account(*forms: str) -> AfterValidator:
    """Declare that an argument names accounts, so that a batch loads them all at once."""

    def note(name: str, info: pydantic.ValidationInfo[Asked]) -> str:
        info.context.accounts += [form.format(name) for form in forms]
        return name

    return AfterValidator(note)


def note_key(key: str | None, info: pydantic.ValidationInfo[Asked]) -> str | None:
    """Take the idempotency key of callers who cannot send a header."""
    if key is not None:
        if info.context.key not in (None, parse_key(key)):
            raise IdempotencyKeyInvalid("The key in the body differs from the one in the header")
        info.context.key = parse_key(key)
    return key


def note_time(milliseconds: int, info: pydantic.ValidationInfo[Asked]) -> int:
    info.context.effective_at = milliseconds * 1_000
    return milliseconds


def require_admin(given: T, info: pydantic.ValidationInfo[Asked]) -> T:
    """Refuse what only an admin may say."""
    if info.context.role not in ADMINS:
        raise Forbidden(f"The role {info.context.role} may not set this: it takes an admin")
    return given


def refuse_text(pattern: str, what: str, given: Any) -> Any:
    if isinstance(given, str) and re.search(pattern, given):
        raise PydanticCustomError("text", what)
    return given


def parse_decimal(given: Any, *, exponent: int, or_number: bool = False) -> int:
    """Return decimal text, or a JSON number where those count, as minor units, if it is exact."""
    try:
        if or_number and isinstance(given, int | Decimal) and not isinstance(given, bool):
            number = Decimal(given)
            # Without the bound, 1e999999 would be written out with a million digits.
            given = format(number, "f") if abs(number.adjusted()) < 20 else ""
        return minor_units(given, exponent)
    except (ValueError, TypeError):
        message = f"Amount should be plain decimal digits, with at most {exponent} places"
        raise PydanticCustomError("decimal", message) from None


def parse_time(given: Any) -> int:
    """Return a time (RFC 3339), a date's midnight in UTC, or what is stored, as it is stored."""
    if isinstance(given, int):
        return given
    # In a query, the plus of an offset means a blank.
    text = re.sub(" (?=[0-9:]{5}$)", "+", str(given).upper())
    text = re.sub(r"(?a)^(\d{4}-\d\d-\d\d)\Z", r"\1T00:00Z", text)
    with suppress(ValueError, OverflowError):  # A leap second is the second after it.
        before = re.sub(r"(?a)(T\d\d:\d\d):60", r"\1:59", text)
        moment = datetime.fromisoformat(before)
        if moment.tzinfo and "T" in text:
            moment = moment.astimezone(UTC) + timedelta(seconds=before != text)
            if before == text or moment.hour == moment.minute == 0:
                return (moment - EPOCH) // timedelta(microseconds=1)
    raise PydanticCustomError("time", "Input should be a time such as 2026-11-21T12:00:00Z")


def parse_effective(given: Any) -> int:
    """Return the time of effect that a caller tells as it is stored."""
    moment = parse_time(given if isinstance(given, str) else "")
    if not 0 <= moment <= utc_now() + AHEAD_MAX:
        raise PydanticCustomError("time", "A time of effect is from 1970 to a year ahead")
    return moment


# Bidirectional controls, too, which let a name look like another one.
CONTROLS = r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]"
NO_CONTROLS = partial(refuse_text, CONTROLS, "Text should hold no control characters")
# What takes up no place, or an empty one, whatever follows.
UNSEEN = (
    r"^[\s\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2060-\u206f\u2800\u3164"
    r"\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a"
    r"\U000e0000-\U000e0fff]*$"
)
NOT_BLANK = partial(refuse_text, UNSEEN, "Text should have something that can be seen")
# Before anything else: what a text may hold, and how long it may be, is of the form that is kept.
NFC = BeforeValidator(
    lambda given: unicodedata.normalize("NFC", given) if isinstance(given, str) else given
)
# Python takes more for an integer than anybody writes as one.
NOT_PLAIN = r"^(?!-?[0-9]{1,40}\Z)"
PLAIN_DIGITS = BeforeValidator(partial(refuse_text, NOT_PLAIN, "Input should be a valid integer"))
Amount = Annotated[int, pydantic.Field(strict=True, ge=1, le=AMOUNT_MAX, description="Minor units")]
CreditLimit = Annotated[
    int, pydantic.Field(strict=True, ge=0, le=AMOUNT_MAX), BeforeValidator(require_admin)
]
PrintableText = Annotated[str, AfterValidator(NO_CONTROLS)]
Printable = Annotated[PrintableText, pydantic.StringConstraints(max_length=200)]
ExternalId = Annotated[Printable, AfterValidator(NOT_BLANK)]
Name = Annotated[ExternalId, NFC, pydantic.Field(examples=["alice"])]
Uuid = Annotated[str, pydantic.StringConstraints(pattern=UUID_PATTERN)]
AccountId = Annotated[Uuid, names_account("{}"), pydantic.Field(examples=[ALICE])]
LockedId = Annotated[Uuid, names_account(ACCOUNTS_OF + "{}")]
OtherAccountId = Annotated[AccountId, pydantic.Field(examples=[BOB])]
PlainInt = Annotated[int, PLAIN_DIGITS]
SealNumber = Annotated[PlainInt, pydantic.Field(ge=0, le=2**53)]
Limit = Annotated[int, Query(ge=1, le=PAGE_SIZE_MAX, description="At most so many"), PLAIN_DIGITS]
Cursor = Annotated[str | None, Query(description="The next_cursor of the page before")]
Next = Annotated[str | None, Query(description="The `next` of the page before")]
TransactionKind = Literal[
    "DEPOSIT", "WITHDRAWAL", "TRANSFER", "PAYMENT", "CASHBACK", "TOP_UP", "BONUS", "SPEND",
    "JOURNAL", "CAPTURE", "REVERSAL",
]  # fmt: skip
Search = Annotated[
    Annotated[Printable, NFC] | None, Query(description="How a text begins, whatever the case")
]
NoteName = Annotated[PrintableText, pydantic.StringConstraints(min_length=1, max_length=40)]
NoteText = Annotated[PrintableText, pydantic.StringConstraints(max_length=500)]
# As it is stored, and in one order: two objects that differ in it alone mean the same.
Metadata = Annotated[
    dict[NoteName, NoteText],
    pydantic.Field(max_length=50),
    AfterValidator(partial(json.dumps, sort_keys=True)),
    AS_OBJECT,
]
Notes = Annotated[Metadata | None, pydantic.Field(alias="metadata")]
SplitBy = Annotated[
    PrintableText, pydantic.StringConstraints(pattern=r"^(owner_name|metadata\[.{1,40}\])$")
]
# The parameters `metadata[NAME]=VALUE`, which all must hold.
MetadataFilter = Annotated[tuple[tuple[NoteName, NoteText], ...], pydantic.Field(max_length=50)]
InTime = pydantic.Field(ge=-(10**17), le=10**18)  # What a program gives, in microseconds.
Moment = Annotated[int, InTime, BeforeValidator(parse_time), TIME_SCHEMA]
EffectiveTime = Annotated[int, BeforeValidator(parse_effective), AS_TIME, TIME_SCHEMA]


class RequestBody(BaseModel):
    """What a caller sends; a field that is not known is refused, so that no typo is lost."""

    model_config = pydantic.ConfigDict(extra="forbid")


class Misfit(BaseModel):
    """What does not fit in a request, and where (a pointer of RFC 6901)."""

    pointer: str
    detail: str


class Problem(BaseModel):
    """How every error looks (RFC 9457); some have more members that help."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[Misfit] = []


# What the API's description says of errors.
OF_WRITES = (
    MalformedJson, BodyTooLarge, InvalidRequest, IdempotencyKeyInvalid, IdempotencyKeyReused,
    StorageFull,
)  # fmt: skip
MOVING = (
    AccountNotFound, AccountFrozen, AccountClosed, InsufficientFunds, BalanceLimit, AssetClosedLoop,
)  # fmt: skip
OTHER_TAGS = dict.fromkeys(("audit", "events", "seals"), "audit and events")
OTHER_TAGS |= dict.fromkeys(("health", "balances", "totals", "metrics"), "operations")
SECURITY = {
    "X-API-Key": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
    "Bearer": {"type": "http", "scheme": "bearer", "description": "A key, or a JWT"},
}
KEY_HEADER = {
    "name": "Idempotency-Key",
    "in": "header",
    "description": "Your name for this one intent: the same request with it acts only once",
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}
METADATA_PARAMETER = {
    "name": "metadata",
    "in": "query",
    "style": "deepObject",
    "description": "metadata[NAME]=VALUE finds what has this member; of several, all must hold",
    "schema": {"type": "object", "additionalProperties": {"type": "string"}},
}
Overrides = Mapping[type[LedgerError], tuple[int, str]]
"""How a dialect words some errors: the status, and a template over the error's members."""


class Policy(NamedTuple):
    """Who may call a function over HTTP, and what a call needs; a `long` read has no bound."""

    roles: Sequence[str]
    needs_key: bool = False
    errors: Overrides | None = None
    long: bool = False
    body_bytes_max: int = BODY_BYTES_MAX


# By whom a book is written, which takes a key where it counts that it is done once, or is read.
ByService = Annotated[Book, Policy(SERVICES)]
OnceByService = Annotated[Book, Policy(SERVICES, needs_key=True)]
InBulk = Annotated[Book, Policy(SERVICES, needs_key=True, body_bytes_max=8 * BODY_BYTES_MAX)]
ByAdmin = Annotated[Book, Policy(ADMINS)]
OnceByAdmin = Annotated[Book, Policy(ADMINS, needs_key=True)]
ByReader = Annotated["Connection", Policy(READERS)]
LongByReader = Annotated["Connection", Policy(READERS, long=True)]
ByAuditor = Annotated["Connection", Policy(AUDITORS)]


def refuses(*kinds: type[LedgerError]) -> dict[int | str, Row]:
    """Return as a route's `responses` what it refuses besides what all routes of its kind do."""
    return {kind.code: {} for kind in kinds}


class LedgerRoute(APIRoute):
    """A route to an operation; BankRoute, AtmRoute and WalletRoute are those of the dialects.

    FastAPI matches and documents it, and calls what `get_route_handler` returns, which it offers
    for this purpose. FastAPI's own handler would not do: it parses a body before it knows the
    caller, takes `"5"` for 5 and NaN for a number, and has no place for a batch in which many
    requests are committed together. This is the only way from HTTP to an operation.

    The function's first parameter is an open book (a write), a connection (a read) or the database
    (several reads), with the policy of the route; the others are the caller's to give.
    """

    errors: ClassVar[Overrides] = {}
    exponent: ClassVar[int | None] = None  # The decimal places of a dialect's amounts.
    lenient: ClassVar[bool] = False  # Whether query parameters that are not known are ignored.

    @staticmethod
    def first_accounts(settings: "Settings", demo: bool) -> Iterable["partial[None]"]:
        """Return what opens the accounts that a dialect begins with."""
        return ()

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        signature = inspect.signature(endpoint)
        first, *others = signature.parameters.values()
        name = endpoint.__name__
        books: Any = first.annotation
        if not hasattr(books, "__metadata__"):
            raise TypeError(f"the first parameter of {name} must say who may call it")
        self.policy: Policy = books.__metadata__[0]
        self.function, self.writes = endpoint, books.__origin__ is Book
        self.reworded = {**self.errors, **(self.policy.errors or {})}
        fields: Any = {
            p.name: (p.annotation, ... if p.default is p.empty else p.default) for p in others
        }
        config = pydantic.ConfigDict(extra="ignore" if self.lenient else "forbid")
        self.arguments: type[BaseModel] = pydantic.create_model(name, __config__=config, **fields)
        shown_as = signature.return_annotation
        self.result: TypeAdapter[Any] = TypeAdapter(Any if shown_as is Response else shown_as)
        # What FastAPI documents: all but what is not the caller's to give, or has no name.
        documented: Any = partial(endpoint, None)
        shown = [p for p in others if p.annotation is not MetadataFilter]
        documented.__signature__ = signature.replace(parameters=shown)
        extra: Row = {"parameters": [METADATA_PARAMETER] if len(shown) < len(others) else []}
        extra["parameters"] += [KEY_HEADER | {"required": self.policy.needs_key}] * self.writes
        if self.policy.roles:
            extra["security"] = [{scheme: []} for scheme in SECURITY]
        kinds = self.refusals(path) | {LedgerError.kinds[code] for code in options["responses"]}
        self.documented = {self.reword(kind()) for kind in kinds}
        roles = ", ".join(self.policy.roles) or "anyone"
        options["summary"] = (endpoint.__doc__ or "").partition(".\n")[0].rstrip(".")
        options["name"] = options["operation_id"] = options["operation_id"] or name
        options["description"] = f"Roles: {roles}."
        options["responses"] = described_problems(self.documented)
        options["openapi_extra"] = extra
        # What it is about: the first part of its path, or what the dialect says.
        self.about = path.split("/")[1]
        options["tags"] = options["tags"] or [OTHER_TAGS.get(self.about, self.about)]
        # What keys belong to: the method and the template of the path.
        self.operation = f"{options['methods'][0]} {path}"
        super().__init__(path, documented, **options)
        self.above, *_ = compile_path(path.rpartition("/")[0])
        # Starlette's own ends with "$", which lets a line feed pass.
        self.path_regex = re.compile(self.path_regex.pattern.removesuffix("$") + r"\Z")

    def refusals(self, path: str) -> set[type[LedgerError]]:
        kinds: set[type[LedgerError]] = {DatabaseBusy, DatabaseUnavailable, InternalError}
        kinds |= {Unauthorized, Forbidden} if self.policy.roles else set()
        # What a parameter of the path names may not be there; whole paths name accounts.
        missing = re.findall("{([a-z]+)_id}", path) + ["account"] * (":path}" in path)
        kinds |= {LedgerError.kinds[f"{name}_not_found"] for name in missing}
        kinds |= set(OF_WRITES) if self.writes else set()
        fields = self.arguments.model_fields
        kinds |= {InvalidRequest} if fields or not self.lenient else set()
        if "body" in fields:
            body: Any = fields["body"].annotation
            kinds |= {UnsupportedMediaType}
            kinds |= set(MOVING) if {"amount", "entries"} & body.model_fields.keys() else set()
            kinds |= {ExternalIdExists} if "external_id" in body.model_fields else set()
        kinds |= {InvalidCursor} if {"cursor", "after"} & fields.keys() else set()
        kinds |= {IdempotencyKeyMissing} if self.policy.needs_key else set()
        return kinds

    def get_route_handler(self) -> Callable[[Request], Any]:
        if self.dependencies or hasattr(self, "app"):
            # It would not run them, and has a ledger in an application of create_app alone.
            raise TypeError(
                f"{self.path} takes no dependencies, and cannot be included in another router: "
                "mount what create_app returns"
            )

        async def handle(request: Request) -> Response:
            try:
                answer = await self.answer(request.scope, request.receive, request.app.state)
            except LedgerError:
                raise
            except Exception as error:
                asked = request.scope["ledger"]
                log.exception("the server made a mistake in request %s", asked.id)
                raise InternalError from error
            return answer if isinstance(answer, Response) else AnswerResponse(answer, request.scope)

        return handle

    async def answer(self, scope: Scope, receive: Receive, app: Any) -> Answer | Response:
        """Return the answer, or raise a LedgerError that says what is wrong."""
        asked: Asked = scope["ledger"]
        bytes_max, body = self.policy.body_bytes_max, b""
        if bytes_max > BODY_BYTES_MAX:  # So much is read only of callers who may send it.
            await self.admit(app.callers, scope, asked)
        if self.writes:
            # Before the caller is known: it may take its time, and a key may be revoked meanwhile.
            body = await asked.body(receive, app.receiving, bytes_max)
        caller = await self.admit(app.callers, scope, asked)
        if self.writes:
            self.take_key(asked, asked.headers.get(b"idempotency-key"))
        arguments = self.parse(scope, asked, self.document_of(asked, body))
        if asked.effective_at is not None and caller.role in SERVICES:
            await app.ledger.credit_due("CALLER", asked.effective_at, caller.name)
        if not self.writes:
            answer = await self.read(app.ledger.database, arguments)
            if isinstance(answer, Answer) and len(answer.body) > PART_BYTES:
                app.sending.take(asked, len(answer.body))
            return answer
        ledger: Ledger = app.ledger
        return await ledger.submit(self.command(caller.name, asked, arguments))

    def take_key(self, asked: Asked, given: bytes | None) -> None:
        """Take the idempotency key, or raise what is wrong with it."""
        if given is not None:
            asked.key = parse_key(given.decode("latin-1"))
        elif self.policy.needs_key:
            raise IdempotencyKeyMissing("An Idempotency-Key is required here")

    def command(self, caller: str, asked: Asked, arguments: BaseModel) -> Command:
        return Command(
            caller=caller,
            arguments=arguments.model_dump_json(by_alias=True, exclude_none=True),
            run=partial(self.call, arguments=arguments),
            key=asked.key and stored_key(caller, self.operation, asked.key),
            accounts=asked.accounts,
            effective_at=asked.effective_at,
        )

    async def read(self, database: "Database", arguments: BaseModel) -> Answer | Response:
        if inspect.iscoroutinefunction(self.function):
            result = await self.function(database, **vars(arguments))
            return result if isinstance(result, Response) else self.show(result)
        return await database.run_read(self.call, arguments, long=self.policy.long)

    async def admit(self, callers: Callers, scope: Scope, asked: Asked) -> Caller:
        """Return the caller, or raise Unauthorized or Forbidden."""
        roles = self.policy.roles
        if not roles:
            return Caller("", "")
        caller = await callers.authenticate(scope, asked)
        asked.caller, asked.role = caller
        if caller.role not in roles:
            raise Forbidden(f"The role {caller.role} may not do it: it takes {' or '.join(roles)}")
        return caller

    def document_of(self, asked: Asked, body: bytes) -> Any:
        """Return the parsed body; where none is expected, refuse what would be ignored."""
        if self.body_field:
            # No page of another site can declare a body to be JSON.
            if not JSON_TYPE.fullmatch(asked.headers.get(b"content-type", b"")):
                raise UnsupportedMediaType("The Content-Type must be application/json")
            return parse_json(body)
        if body and parse_json(body) != {}:
            raise InvalidRequest(errors=[{"pointer": "", "detail": "No body is expected here"}])
        return None

    def parse(self, scope: Scope, asked: Asked, document: Any) -> BaseModel:
        given: Row = {}
        if scope["query_string"]:
            notes = set()
            for name, value in parse_qsl(scope["query_string"].decode("latin-1"), True):
                if found := re.fullmatch(r"(?s)metadata\[(.*)\]", name):
                    notes.add((found[1], value))
                else:
                    given[name] = value
            given = {"metadata": sorted(notes)} | given if notes else given
        for name, text in scope["path_params"].items():
            # PostgreSQL cannot even ask for a NUL, and no name has one.
            given[name] = unicodedata.normalize("NFC", text.replace("\0", "\1"))
        given |= {"body": document} if self.body_field else {}
        return self.validate(given, asked)

    def validate(self, given: Row, asked: Asked) -> BaseModel:
        try:
            return self.arguments.model_validate(given, context=asked)
        except ValidationError as error:
            found = error.errors(include_url=False, include_input=False)[:ERRORS_LISTED_MAX]
        errors = []
        for each in found:
            # A pointer to what does not fit (RFC 6901), and never its value.
            path = each["loc"][1:] if each["loc"][0] == "body" else each["loc"]
            if path[-1:] == ("[key]",):  # A member's name, which is not repeated either.
                path, each["msg"] = path[:-2], f"A name in it: {each['msg']}"
            parts = [str(part).replace("~", "~0").replace("/", "~1") for part in path]
            errors.append({"pointer": "".join(f"/{part}" for part in parts), "detail": each["msg"]})
        raise InvalidRequest(errors=errors)

    def call(self, books: Any, arguments: BaseModel) -> Answer:
        """Call the function; its result is the answer, or an error in the dialect's words."""
        try:
            result = self.function(books, **vars(arguments))
        except LedgerError as error:
            raise self.reword(error) from None
        return self.show(result)

    def show(self, result: Any) -> Answer:
        body = self.result.dump_json(result, by_alias=True).decode()
        location = None
        if self.status_code == 201 and isinstance(result, Stored):
            location = f"/{self.about}/{getattr(result, 'id', None) or result.code}"
        return Answer(self.status_code or 200, body, location)

    def reword(self, error: LedgerError) -> LedgerError:
        """Return an error as the dialect words it, its amounts with decimal places."""
        if type(error) in self.reworded:
            if self.exponent is not None:
                for name, value in error.members.items():
                    if isinstance(value, int):  # The others are ids.
                        error.members[name] = decimal_text(value, self.exponent)
            error.status, detail = self.reworded[type(error)]
            error.args = (detail.format_map(defaultdict(int, error.members)),)
        return error


def described_problems(errors: Iterable[LedgerError]) -> dict[int | str, Row]:
    """Return what OpenAPI says of errors: by status, each with its code and an example."""
    responses: dict[int | str, Row] = {}
    for error in sorted(errors, key=attrgetter("status", "code")):
        problem = json.loads(error.to_answer().body)
        problem["detail"] = problem["detail"] or problem["title"]
        content: Row = {"schema": {"$ref": "#/components/schemas/Problem"}, "examples": {}}
        response = responses.setdefault(error.status, {"description": "", "content": {}})
        response["description"] += f"{', ' if response['description'] else ''}`{error.code}`"
        content = response["content"].setdefault("application/problem+json", content)
        content["examples"][error.code] = {"value": problem}
    return responses


class AnswerResponse(Response):
    """An answer on its way out: what Starlette would make of it takes longer."""

    def __init__(self, answer: Answer, scope: Scope) -> None:
        self.status_code, self.body = answer.status, answer.body.encode()
        self.background = None
        kind = b"application/json" if answer.status < 400 else b"application/problem+json"
        self.raw_headers = [(b"content-type", kind), (b"content-length", b"%d" % len(self.body))]
        if answer.location:
            location = scope.get("root_path", "") + answer.location
            self.raw_headers.append((b"location", location.encode()))
        if answer.replayed:
            self.raw_headers.append((b"idempotent-replayed", b"true"))
        if answer.status == 401:
            self.raw_headers.append((b"www-authenticate", b'Bearer realm="ledger"'))
        if answer.status == 503:
            self.raw_headers.append((b"retry-after", b"1"))


async def refuse(request: Request, error: Any) -> Response:
    """Answer with the problem document of a LedgerError."""
    return AnswerResponse(error.to_answer(), request.scope)


async def refuse_path(request: Request, error: Any) -> Response:
    """Answer a path or a method that is none; what a route of the user's raises stays FastAPI's."""
    routes: list[Any] = request.app.routes
    if isinstance(error, HTTPException):
        return await http_exception_handler(request, error)
    if error.status_code == 404:
        path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
        # The ledger's paths that differ from it in nothing but their last part.
        above, ours = path.rpartition("/")[0], [r for r in routes if isinstance(r, LedgerRoute)]
        beside = dict.fromkeys(r.path_format for r in ours if r.above.fullmatch(above))
        there = f": there is {', '.join(beside)}" if beside else ""
        return await refuse(request, NotFound(f"There is nothing at this address{there}"))
    response = await refuse(request, MethodNotAllowed(f"{request.method} is not possible here"))
    routes = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    allowed = {method for route in routes for method in getattr(route, "methods", None) or ()}
    response.headers["allow"] = ", ".join(sorted(allowed))
    return response


P = TypeVar("P", bound=Stored)
Part = tuple[int, str | None]  # Of a list: how many rows at most, and the cursor that leads there.


class Page(BaseModel, Generic[P]):
    """A part of a list, and the cursor of the next part."""

    items: list[P]
    next_cursor: str | None

    @classmethod
    def read(
        cls, books: "Connection", what: str, query: str, part: Part, start: str = "", **values: Any
    ) -> Self:
        """Return rows of a query beyond the place that a cursor leads to, its `:seq` and `:id`."""

        # A checksum over the place and over what is listed keeps mistakes out.
        def lead_to(place: str) -> str:
            return f"{place}.{sha256(json.dumps([what, values, place]))[:16]}"

        limit, cursor = part
        start = start or (NEWEST_FIRST if query.endswith("DESC") else OLDEST_FIRST)
        place = start if cursor is None else cursor.rpartition(".")[0]
        is_given = cursor in (None, lead_to(place))
        if not (is_given and re.fullmatch("[0-9]{1,18}_[0-9A-Za-z._-]*", place)):
            raise InvalidCursor("Invalid cursor")
        seq, _, row_id = place.partition("_")
        values_at = {"seq": int(seq), "id": row_id, "limit": limit + 1, "now": utc_now()}
        rows = books.rows(f"{query} LIMIT :limit", **values, **values_at)
        found, next_cursor = within_bounds(rows[:limit]), None
        if len(rows) > len(found):
            last_seq = min(row.get("seq", 0) for row in found)
            next_cursor = lead_to(f"{last_seq}_{found[-1]['id']}")
        listed_as: Any = cls.model_fields["items"].annotation
        items = [listed_as.__args__[0].of(row) for row in found]
        return cls.model_construct(items=items, next_cursor=next_cursor)


def within_bounds(rows: list[Row]) -> list[Row]:
    """Return as many of the rows as one answer may show, by their bytes, and one at least."""
    if not rows or "notes" not in rows[0]:
        return rows  # Their texts are short.
    texts = (len(row["notes"] or "") + len(row.get("arguments", "")) for row in rows)
    entries = (ENTRY_BYTES * (1 + row.get("entry_count", 0)) for row in rows)
    fitting = sum(size <= PAGE_BYTES_MAX for size in accumulate(map(add, texts, entries)))
    return rows[: max(1, fitting)]


# ----- The API
# The ledger in its own terms: integers of minor units, ids, times in UTC.

api = APIRouter(route_class=LedgerRoute)


class Health(BaseModel):
    status: Literal["ok"] = "ok"


@api.get("/health")
async def get_health(database: Annotated["Database", Policy(ANYONE)]) -> Health:
    """Tell whether the server and its database answer, and the last write was stored."""
    [found] = await database.run_read(lambda books: books.rows(books.is_writable))
    if not found["yes"]:
        raise DatabaseLost
    if database.fault:
        raise DatabaseUnavailable(f"The last write was not stored: {database.fault}")
    return Health()


class EventCreate(RequestBody):
    """What callers may add: a name of their own, which is unique, notes, and a memo."""

    external_id: ExternalId | None = None
    notes: Notes = None
    memo: Printable | None = None


class AmountCreate(EventCreate):
    amount: Amount


class Effective(RequestBody):
    """When something happened outside; that changes no order and no balance."""

    effective_at: EffectiveTime | None = None


class Movement(AmountCreate, Effective): ...


class TransferCreate(Movement):
    """A transfer between two accounts of one asset."""

    source_account_id: AccountId
    dest_account_id: OtherAccountId


class TransferPublic(Stored):
    """A transfer, which is a transaction, and both accounts after it."""

    transfer_id: str
    amount: int
    asset: str
    memo: str | None
    ts: Timestamp
    effective_at: Timestamp
    source: AccountPublic
    dest: AccountPublic


@api.post("/transfers", responses=refuses(SameAccount, AssetMismatch))
def create_transfer(book: OnceByService, body: TransferCreate) -> TransferPublic:
    """Move money between two customers' accounts, at once and as a whole."""
    transfer_id = transfer(book, **vars(body))
    source, dest = book.account(body.source_account_id), book.account(body.dest_account_id)
    shown: Row = {"transfer_id": transfer_id, "amount": body.amount, "asset": source.asset}
    shown |= {"memo": body.memo, "ts": book.now, "effective_at": book.now}
    if body.effective_at is not None:
        shown["effective_at"] = body.effective_at
    return TransferPublic.of({**shown, "source": source, "dest": dest})


@api.post("/accounts/{account_id}/deposit")
def create_deposit(book: OnceByService, account_id: AccountId, body: Movement) -> AccountPublic:
    """Take money in for an account."""
    return deposit(book, account_id, **vars(body))


@api.post("/accounts/{account_id}/withdraw")
def create_withdrawal(book: OnceByAdmin, account_id: AccountId, body: Movement) -> AccountPublic:
    """Pay money out of an account."""
    return withdraw(book, account_id, **vars(body))


@api.post("/accounts/{account_id}/top-up", responses=refuses(AssetOpenLoop))
def top_up_account(book: OnceByService, account_id: AccountId, body: Movement) -> AccountPublic:
    """Issue credits of a closed-loop asset that were bought."""
    move_credits(book, account_id, kind="TOP_UP", **vars(body))
    return book.account(account_id)


@api.post("/accounts/{account_id}/bonus", responses=refuses(AssetOpenLoop))
def give_bonus(book: OnceByService, account_id: AccountId, body: Movement) -> AccountPublic:
    """Issue credits of a closed-loop asset that are a present."""
    move_credits(book, account_id, kind="BONUS", **vars(body))
    return book.account(account_id)


@api.post("/accounts/{account_id}/spend", responses=refuses(AssetOpenLoop))
def spend_credits(book: OnceByService, account_id: AccountId, body: Movement) -> AccountPublic:
    """Take credits of a closed-loop asset back for a service."""
    move_credits(book, account_id, kind="SPEND", **vars(body) | {"amount": -body.amount})
    return book.account(account_id)


class AssetCreate(RequestBody):
    """A new asset, for ever: choose an exponent with which all of it fits in 2^53 minor units."""

    code: Annotated[str, pydantic.Field(pattern="^[A-Z][A-Z0-9._-]{0,15}$")]
    name: Annotated[Name, pydantic.Field(examples=["Bitcoin"])]
    exponent: Annotated[int, pydantic.Field(strict=True, ge=0, le=12)]
    closed_loop: Annotated[bool, pydantic.Field(strict=True)] = False


@api.post("/assets", status_code=201, responses=refuses(AssetExists))
def create_asset(book: ByAdmin, body: AssetCreate) -> AssetPublic:
    """Add an asset of your own, with its system accounts."""
    return add_asset(book, **vars(body) | {"closed_loop": int(body.closed_loop)})


@api.get("/assets")
def list_assets(
    books: ByReader, limit: Limit = PAGE_SIZE, cursor: Cursor = None
) -> Page[AssetPublic]:
    """List all assets, by their codes."""
    query = "SELECT asset.*, code AS id FROM asset WHERE code > :id ORDER BY code"
    return Page[AssetPublic].read(books, "assets", query, (limit, cursor))


@api.get("/assets/{code}", responses=refuses(AssetNotFound))
def get_asset(books: ByReader, code: str) -> AssetPublic:
    """Show an asset."""
    for row in books.rows("SELECT * FROM asset WHERE code = :code", code=code):
        return AssetPublic.of(row)
    raise AssetNotFound(f"There is no asset {code}")


class AccountCreate(RequestBody):
    """A new account, of an asset that there is."""

    external_id: ExternalId | None = None
    notes: Notes = None
    owner_name: Name
    asset: Annotated[Name, pydantic.Field(examples=["USD"])] = "USD"
    credit_limit: CreditLimit | None = None


@api.post("/accounts", status_code=201, responses=refuses(AssetNotFound, AssetClosedLoop))
def create_account(book: ByService, body: AccountCreate) -> AccountPublic:
    """Open an account for a customer; a credit limit is an admin's to give."""
    return open_account(book, **vars(body) | {"credit_limit": body.credit_limit or 0})


@api.get("/accounts")
def list_accounts(
    books: ByReader,
    limit: Limit = PAGE_SIZE,
    cursor: Cursor = None,
    owner_name: Annotated[Printable, NFC] | None = None,
    name: Annotated[PrintableText, pydantic.StringConstraints(max_length=220), NFC] | None = None,
    external_id: Printable | None = None,
    search: Search = None,
    metadata: MetadataFilter = (),
) -> Page[AccountPublic]:
    """List the customers' accounts, oldest first; `metadata[NAME]=VALUE` finds by notes."""
    columns = {"owner_name": owner_name, "name": name, "external_id": external_id}
    joins, where, row_id, values = filtered(metadata, "account", **columns)
    where += begins(books, search, values, "owner_name", "account.name", "external_id")
    query = f"{ACCOUNTS}{joins} WHERE kind = 'CUSTOMER'{where} AND {row_id} > :id ORDER BY {row_id}"
    return Page[AccountPublic].read(books, "accounts", query, (limit, cursor), **values)


@api.get("/accounts/{account_id}")
def get_account(books: ByReader, account_id: AccountId) -> AccountPublic:
    """Show an account."""
    return AccountPublic.of(find_account(books, account_id))


def find_account(books: "Connection", reference: str) -> Row:
    """Return an account of any kind by its id, or a dialect's by its name@ASSET."""
    name, _, asset = reference.rpartition("@")
    where = "name = :name AND asset = :asset" if name else "id = :asset"
    among = {"name": name, "asset": asset, "now": utc_now()}
    for row in books.rows(f"{ACCOUNTS} WHERE {where}", **among):
        return row
    raise AccountNotFound(f"There is no account {reference}", reference)


# The ledger's own time, by which writes go too: this machine's clock, or the newest event's.
NEWEST_TS = f"SELECT ts FROM ({NEWEST_EVENT}) AS newest"  # noqa: S608
NOW = f"(SELECT max(ts) FROM (SELECT :now AS ts UNION ALL {NEWEST_TS}) AS times)"  # noqa: S608
BEHIND = f'{NOW} - :now AS "newest event", {{0}} - :now AS "database server"'
IS_OVER_NOW = IS_OVER.replace(":now", NOW)
# Of two columns of one name, the later one counts: what expired holds still hold is available.
EXPIRED = f"SELECT SUM(amount) FROM hold WHERE account_id = account.id AND {IS_OVER_NOW}"  # noqa: S608
STILL_HELD = f"CAST(CASE held WHEN 0 THEN 0 ELSE held - COALESCE(({EXPIRED}), 0) END AS bigint)"
ACCOUNTS = f"SELECT account.*, {STILL_HELD} AS held FROM account"  # noqa: S608
HOLD_STATUS = f"CASE WHEN {IS_OVER_NOW} THEN 'EXPIRED' ELSE status END"
HOLDS = f"SELECT hold.*, {HOLD_STATUS} AS status FROM hold"  # noqa: S608


def read_clocks(books: "Connection") -> Row:
    """Return the ledger's own time, how far this clock is behind the others, and the version."""
    version = "(SELECT max(version) FROM schema_version) AS version"
    query = f"SELECT {NOW} AS now, {BEHIND.format(books.clock)}, {version}"
    return books.rows(query, now=utc_now())[0]


def filtered(metadata: MetadataFilter, table: str, **columns: Any) -> tuple[str, str, str, Row]:
    """Return the joins, conditions and values that find rows by notes and by columns.

    The third is the column of ids in whose order an index has them.
    """
    values = {column: value for column, value in columns.items() if value is not None}
    condition = "".join(f" AND {table}.{column} = :{column}" for column in values)
    joins = ""
    for number, (name, value) in enumerate(metadata):
        joins += f" JOIN note AS note{number} ON note{number}.owner_id = {table}.id"
        joins += f" AND note{number}.name = :name{number} AND note{number}.value = :value{number}"
        values |= {f"name{number}": name, f"value{number}": value}
    # Another column's index is the better one to begin with.
    row_id = "note0.owner_id" if metadata and not condition else f"{table}.id"
    return joins, condition, row_id, values


def begins(books: "Connection", search: str | None, values: Row, *columns: str) -> str:
    """Return what must hold where a column begins with a text, whatever the case; add its value."""
    if not search:
        return ""
    # By Python's own tables: what an engine knows of cases depends on how it was set up.
    on_server = books.engine == "postgresql"
    escape = re.escape if on_server else glob.escape
    cased = [("".join(sorted({char.lower(), char.upper()})), char) for char in search]
    pattern = "".join(f"[{both}]" if len(both) == 2 else escape(char) for both, char in cased)
    values["search"] = f"^{pattern}" if on_server else f"{pattern}*"
    operator = "~" if on_server else "GLOB"
    return f" AND ({' OR '.join(f'{column} {operator} :search' for column in columns)})"


class AccountChange(RequestBody):
    """What may be changed of an account; its metadata as a whole."""

    owner_name: Name | None = None
    notes: Notes = None
    credit_limit: CreditLimit | None = None


@api.patch(
    "/accounts/{account_id}", responses=refuses(AssetClosedLoop, AccountClosed, CreditLimitInUse)
)
def update_account(book: ByService, account_id: AccountId, body: AccountChange) -> AccountPublic:
    """Change an owner's name, the notes about an account, or, as an admin, its credit limit."""
    changes = {name: value for name, value in vars(body).items() if value is not None}
    return change_account(book, account_id, **changes)


@api.post("/accounts/{account_id}/freeze", responses=refuses(InvalidStateTransition))
def freeze_account(book: ByAdmin, account_id: AccountId) -> AccountPublic:
    """Let an account move no money, in or out, until it is unfrozen."""
    return change_status(book, account_id, "FROZEN")


@api.post("/accounts/{account_id}/unfreeze", responses=refuses(InvalidStateTransition))
def unfreeze_account(book: ByAdmin, account_id: AccountId) -> AccountPublic:
    """Let a frozen account move money again."""
    return change_status(book, account_id, "ACTIVE")


@api.post(
    "/accounts/{account_id}/close",
    responses=refuses(InvalidStateTransition, HoldsPending, AccountNotEmpty, CashbackPending),
)
def close_account(book: ByAdmin, account_id: AccountId) -> AccountPublic:
    """End an empty account for ever."""
    return change_status(book, account_id, "CLOSED")


class EntryPublic(EntryBase):
    """An entry: a positive amount, its type, and the balance after it; `ref` is the memo."""

    ts: Timestamp
    effective_at: Timestamp
    ref: str | None
    kind: str


ENTRY_BYTES = 400
ENTRY_COUNT = "(SELECT count(*) FROM entry WHERE transaction_id = event.id) AS entry_count"
# Entries, each with what its transaction says.
EFFECTIVE_AT = "COALESCE(effective_at, ts)"
ENTRIES = f"""SELECT entry.*, ts, {EFFECTIVE_AT} AS effective_at, memo AS ref, kind FROM entry
    JOIN event ON event.id = transaction_id"""  # noqa: S608
ENTRIES_OF_ACCOUNT = f"{ENTRIES} WHERE entry.account_id = :account"


@api.get("/accounts/{account_id}/statement")
def get_statement(
    books: ByReader,
    account_id: AccountId,
    limit: Limit = PAGE_SIZE,
    cursor: Cursor = None,
    start: Annotated[Moment | None, Query(alias="from")] = None,
    to: Moment | None = None,
) -> Page[EntryPublic]:
    """List an account's entries, newest first: from a time on, and before another."""
    account = find_account(books, account_id)
    after = last_before(books, account, start)["seq"] if start is not None else 0
    before = last_before(books, account, to)["seq"] + 1
    query = f"{ENTRIES_OF_ACCOUNT} AND seq < :seq AND seq > :after ORDER BY seq DESC"
    values = {"account": account_id, "from": start, "after": after, "to": to}
    return Page[EntryPublic].read(books, "entries", query, (limit, cursor), f"{before}_", **values)


def last_before(books: "Connection", account: Row, moment: int | None) -> Row:
    """Return an account's last entry before a time, by bisection: within it, times rise."""
    if moment is None:
        return account | {"seq": account["last_seq"]}
    query = f"{ENTRIES_OF_ACCOUNT} AND seq = :seq"

    def entry(seq: int) -> Row:
        return books.rows(query, account=account["id"], seq=seq)[0]

    numbers = range(1, account["last_seq"] + 1)
    seq = bisect_left(numbers, moment, key=lambda number: entry(number)["ts"])
    return entry(seq) if seq else {"seq": 0, "balance": 0}


class BalancePublic(BaseModel):
    """An account's balance at a time, after its entry number `seq`; what is held of it now."""

    account_id: str
    asset: str
    balance: int
    held: int | None = None
    available: int | None = None
    seq: int
    at: Timestamp


@api.get("/accounts/{account_id}/balance")
def get_balance(books: ByReader, account_id: AccountId, at: Moment | None = None) -> BalancePublic:
    """Show a balance as it was at a time, or as it is now, with what is held and available."""
    account = find_account(books, account_id)
    moment = read_clocks(books)["now"] if at is None else at
    if at is not None and at < account["created_at"]:
        raise AccountNotFound(f"There was no account {account_id} yet", account_id)
    last = last_before(books, account, None if at is None else at + 1)
    shown = {"account_id": account_id, "asset": account["asset"], "at": moment}
    if at is None:  # What was held before nobody knows who does not look at each hold since.
        shown |= AccountPublic(**account).model_dump(include={"held", "available"})
    return BalancePublic(**shown, balance=last["balance"], seq=last["seq"])


class AssetBalances(BaseModel):
    """What there is of an asset: the customers' money, and what the system owes for it."""

    asset: str
    customers: int
    system: dict[str, int]
    total: int


class TrialBalance(BaseModel):
    """The sums over all accounts; each total is 0."""

    items: list[AssetBalances]


@api.get("/balances")
def get_trial_balance(books: LongByReader) -> TrialBalance:
    """Show the trial balance."""
    name = "CASE kind WHEN 'SYSTEM' THEN name END"
    # No sum leaves 64 bits: what all customers have is at most what one system account owes.
    query = f"SELECT asset, {name} AS name, CAST(SUM(balance) AS bigint) AS balance FROM account"  # noqa: S608
    balances_of: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for row in books.rows(f"{query} GROUP BY asset, {name} ORDER BY asset, {name}"):
        balances_of[row["asset"]][row["name"] or ""] = row["balance"]
    items = []
    for asset, balances in balances_of.items():
        total, customers = sum(balances.values()), balances.pop("", 0)
        items.append(AssetBalances(asset=asset, customers=customers, system=balances, total=total))
    return TrialBalance(items=items)


class Total(BaseModel):
    """What customers' accounts of an asset have together, or those that `by` splits off."""

    asset: str
    by: str | None
    accounts: int
    balance: int
    held: int
    credit_limit: int
    available: int


class Totals(BaseModel):
    items: list[Total]


TOTALS_MAX = 1_000
# A sum may leave 64 bits where no amount does, so it is taken in two parts.
SUM = """CAST(SUM({0} / 1000000000) AS bigint) AS {1}_billions,
    CAST(SUM({0} % 1000000000) AS bigint) AS {1}"""
FUNDS = {"balance": "balance", "held": STILL_HELD, "credit_limit": "credit_limit"}
SUMS = ", ".join(SUM.format(value, name) for name, value in FUNDS.items())


@api.get("/totals")
def get_totals(
    books: LongByReader,
    owner_name: Annotated[Printable, NFC] | None = None,
    asset: Printable | None = None,
    status: AccountStatus | None = None,
    by: SplitBy | None = None,
    metadata: MetadataFilter = (),
) -> Totals:
    """Add up customers' accounts by their assets, and by `owner_name` or `metadata[NAME]`."""
    columns = {"owner_name": owner_name, "asset": asset, "status": status}
    joins, where, _, values = filtered(metadata, "account", **columns)
    part = {None: "CAST(NULL AS text)", "owner_name": "owner_name"}.get(by, "part.value")
    if by and by != "owner_name":
        joins += " LEFT JOIN note AS part ON part.owner_id = account.id AND part.name = :part"
        values["part"] = by.removeprefix("metadata[")[:-1]
    query = f"""SELECT asset, {part} AS part, count(*) AS accounts, {SUMS} FROM account{joins}
        WHERE kind = 'CUSTOMER'{where} GROUP BY asset, {part}
        ORDER BY asset, {part} IS NULL, {part} LIMIT {TOTALS_MAX + 1}"""  # noqa: S608
    rows = books.rows(query, **values, now=utc_now())
    if len(rows) > TOTALS_MAX:
        why = f"There are more than {TOTALS_MAX} parts: ask for less"
        raise InvalidRequest(errors=[{"pointer": "/by", "detail": why}])
    for row in rows:
        row |= {name: row[name] + 10**9 * row[f"{name}_billions"] for name in FUNDS}
        row["available"] = row["balance"] - row["held"] + row["credit_limit"]
    return Totals(items=[Total(by=row["part"], **row) for row in rows])


class TransactionPosted(TransactionBase):
    """A transaction as it was posted; a CAPTURE is of a hold. Its entries sum to zero."""

    effective_at: Timestamp
    hold_id: str | None
    entries: list[EntryPublic]


class TransactionPublic(TransactionPosted):
    """A transaction, and what reversed it later."""

    reversed_by: str | None


@api.get("/transactions/{transaction_id}")
def get_transaction(books: ByReader, transaction_id: Uuid) -> TransactionPublic:
    """Show a transaction with all of its entries."""
    return find_transaction(books.rows, transaction_id)


def find_transaction(rows: Callable[..., list[Row]], transaction_id: str) -> TransactionPublic:
    """Return a transaction, of the database or of the open batch."""
    query = f"SELECT event.*, {REVERSED_BY} FROM event WHERE id = :id AND {IS_TRANSACTION}"  # noqa: S608
    for event in with_entries(rows, rows(query, id=transaction_id)):
        return TransactionPublic(**event)
    raise TransactionNotFound(f"There is no transaction {transaction_id}", transaction_id)


def with_entries(rows: Callable[..., list[Row]], events: list[Row]) -> list[Row]:
    """Return transactions with their entries, and captures with their holds."""
    entries = defaultdict(list)
    query = f"{ENTRIES} WHERE transaction_id = ANY(:ids) ORDER BY entry.id"
    for row in rows(query, ids=[event["id"] for event in events]):
        entries[row["transaction_id"]].append(EntryPublic.of(row))
    for event in events:
        asked = parse_details(event["arguments"]) if event["kind"] == "CAPTURE" else {}
        event |= {"hold_id": asked.get("hold_id"), "entries": entries[event["id"]]}
        if event["effective_at"] is None:
            event["effective_at"] = event["ts"]
    return events


# From a time on, and before another. An id's own time is at or after its event's; two servers may
# give a later time to a lower id, but not by a tenth of a second.
FROM = " AND ts >= :from AND event.id >= :from_id"
TO = """ AND ts < :to AND event.id < (SELECT min(id) FROM (SELECT :id AS id UNION ALL
    SELECT * FROM (SELECT id FROM event WHERE id >= :to_id AND ts >= :to + 100000
    ORDER BY id LIMIT 1) AS later) AS ends)"""


def from_and_to(values: Row, prefix: str, start: int | None, to: int | None) -> str:
    """Return what holds for events from a time on and before another, which join the values."""
    condition = ""
    for name, moment, holds in (("from", start, FROM), ("to", to, TO)):
        if moment is not None:
            milliseconds = max(0, moment // 1_000)
            values[f"{prefix}{name}_id"] = f"{milliseconds >> 16:08x}-{milliseconds & 0xFFFF:04x}"
            values[f"{prefix}{name}"] = moment
            condition += holds.replace(f":{name}", f":{prefix}{name}")
    return condition


@api.get("/transactions")
def list_transactions(
    books: ByReader,
    limit: Limit = PAGE_SIZE,
    cursor: Cursor = None,
    account_id: AccountId | None = None,
    external_id: Printable | None = None,
    kind: TransactionKind | None = None,
    start: Annotated[Moment | None, Query(alias="from")] = None,
    to: Moment | None = None,
    effective_from: Moment | None = None,
    effective_to: Moment | None = None,
    search: Search = None,
    metadata: MetadataFilter = (),
) -> Page[TransactionPublic]:
    """List transactions, newest first; `metadata[NAME]=VALUE` finds by notes."""
    joins, where, row_id, values = filtered(metadata, "event", external_id=external_id, kind=kind)
    where += begins(books, search, values, "memo", "external_id")
    source, seq, order = "event", "0", row_id
    if account_id is not None:
        source, seq, order = "entry JOIN event ON event.id = transaction_id", "entry.seq", "seq"
        where, values["account"] = f"{where} AND entry.account_id = :account", account_id
    where += from_and_to(values, "", start, to)
    query = f"SELECT event.*, {seq} AS seq, {REVERSED_BY}, {ENTRY_COUNT} FROM {source}{joins} "  # noqa: S608
    query += f"WHERE {IS_TRANSACTION}{where} AND {row_id} < :id"
    if (effective_from, effective_to) == (None, None):
        query += f" ORDER BY {order} DESC"
    else:
        # In two parts, each with an index: what has no time of effect goes by its own.
        of_ts = from_and_to(values, "effective_", effective_from, effective_to)
        values |= {"first": effective_from or 0}
        values["last"] = BALANCE_MAX if effective_to is None else effective_to - 1
        query = f"""SELECT * FROM ({query} AND effective_at BETWEEN :first AND :last
            ORDER BY event.id || '' DESC LIMIT :limit) AS labelled UNION ALL SELECT * FROM ({query}
            AND effective_at IS NULL{of_ts} ORDER BY {order} DESC LIMIT :limit) AS others
            ORDER BY id DESC"""  # noqa: S608
    page = Page[TransactionPublic].read(books, "transactions", query, (limit, cursor), **values)
    with_entries(books.rows, [vars(transaction) for transaction in page.items])
    return page


class EntryCreate(RequestBody):
    """An entry of a transaction: a DEBIT takes from the account, a CREDIT adds to it."""

    account_id: AccountId
    type: EntryType
    amount: Amount


RENT_PAID = [
    {"account_id": ALICE, "type": "DEBIT", "amount": 300},
    {"account_id": BOB, "type": "CREDIT", "amount": 300},
]


class TransactionCreate(EventCreate, Effective):
    """Entries whose debits equal their credits, for each asset."""

    entries: list[EntryCreate] = pydantic.Field(min_length=2, max_length=100, examples=[RENT_PAID])


@api.post("/transactions", status_code=201, responses=refuses(Unbalanced, AccountRepeated))
def create_transaction(book: OnceByService, body: TransactionCreate) -> TransactionPublic:
    """Post entries between any number of accounts, at once and as a whole."""
    signs = {"DEBIT": -1, "CREDIT": +1}
    entries = [(entry.account_id, signs[entry.type] * entry.amount) for entry in body.entries]
    return find_transaction(book.ask, journal(book, **vars(body) | {"entries": entries}))


class ReversalCreate(EventCreate, Effective): ...


@api.post(
    "/transactions/{transaction_id}/reverse",
    status_code=201,
    responses=refuses(*MOVING, AlreadyReversed, NotReversible, CashbackCredited),
)
def reverse_transaction(
    book: OnceByAdmin, transaction_id: LockedId, body: ReversalCreate
) -> TransactionPublic:
    """Take a transaction back as a whole, once."""
    return find_transaction(book.ask, reverse(book, transaction_id, **vars(body)))


class BulkCreate(RequestBody):
    """Many transfers, one after the other; all of them or none, if it is `atomic`."""

    atomic: Annotated[bool, pydantic.Field(strict=True)] = True
    transfers: list[TransferCreate] = pydantic.Field(min_length=1, max_length=1_000)


class BulkResult(BaseModel):
    """What became of a transfer: its id, or the problem that it met."""

    index: int
    transfer_id: str | None
    error: dict[str, Any] | None


class BulkPublic(BaseModel):
    succeeded: int
    failed: int
    results: list[BulkResult]


@api.post("/transfers/bulk", responses=refuses(BulkFailed))
def create_transfers(book: InBulk, body: BulkCreate) -> BulkPublic:
    """Make many transfers in one commit."""
    transfers = [
        vars(each) | {"arguments": to_json(each, exclude_none=True).decode()}
        for each in body.transfers
    ]
    results = transfer_many(book, transfers, atomic=body.atomic)
    failed = sum(result["error"] is not None for result in results)
    shown: Row = {"succeeded": len(results) - failed, "failed": failed, "results": results}
    return BulkPublic(**shown)


class HoldCreate(AmountCreate):
    """Money to be promised to an account for some time, in seconds."""

    account_id: AccountId
    dest_account_id: OtherAccountId
    expires_in: Annotated[int, pydantic.Field(strict=True, ge=1, le=31_536_000)] = 604_800


@api.post("/holds", status_code=201, responses=refuses(SameAccount, AssetMismatch))
def create_hold(book: OnceByService, body: HoldCreate) -> HoldPublic:
    """Promise money to an account, until it is captured or voided, or expires."""
    return place_hold(book, **vars(body))


class CaptureCreate(Effective):
    """How much of a hold is moved; all of it, if nothing is said."""

    amount: Amount | None = None


@api.post("/holds/{hold_id}/capture", responses=refuses(*HOLD_ENDS.values(), AmountExceedsHold))
def capture_hold(book: OnceByService, hold_id: LockedId, body: CaptureCreate) -> HoldPublic:
    """Move what a hold promised, once."""
    return HoldPublic(**capture(book, hold_id, **vars(body)))


@api.post("/holds/{hold_id}/void", responses=refuses(*HOLD_ENDS.values()))
def void_hold(book: ByService, hold_id: LockedId) -> HoldPublic:
    """Give up what a hold promised."""
    return HoldPublic(**void(book, hold_id))


@api.get("/holds/{hold_id}")
def get_hold(books: ByReader, hold_id: Uuid) -> HoldPublic:
    """Show a hold."""
    for row in books.rows(f"{HOLDS} WHERE id = :id", id=hold_id, now=utc_now()):
        return HoldPublic.of(row)
    raise HoldNotFound(f"There is no hold {hold_id}", hold_id)


@api.get("/holds")
def list_holds(
    books: ByReader,
    limit: Limit = PAGE_SIZE,
    cursor: Cursor = None,
    account_id: AccountId | None = None,
    status: HoldStatus | None = None,
) -> Page[HoldPublic]:
    """List holds, newest first; those of an account on either side."""
    where = f"id < :id{f' AND {HOLD_STATUS} = :status' if status else ''}"
    query = f"{HOLDS} WHERE {where}"
    if account_id is not None:
        # In two parts, each in the order of an index; no hold has one account on both sides.
        part = f"SELECT * FROM ({query} AND %s = :account ORDER BY id DESC LIMIT :limit) AS %s"  # noqa: S608
        sides = (("account_id", "held"), ("dest_account_id", "promised"))
        query = " UNION ALL ".join(part % side for side in sides)
    among: Row = {"account": account_id, "status": status}
    query += " ORDER BY id DESC"
    return Page[HoldPublic].read(books, "holds", query, (limit, cursor), **among)


class PaymentCreate(AmountCreate):
    account_id: AccountId


class PaymentPublic(BaseModel):
    """A payment, which is a transaction, the account, and what comes back."""

    payment_id: str
    account: AccountPublic
    cashback: CashbackPublic


@api.post("/payments")
def create_payment(book: OnceByService, body: PaymentCreate) -> PaymentPublic:
    """Pay at once, and get 2 % back after 24 hours."""
    cashback = pay(book, **vars(body))
    return payment_public(cashback, book.account(body.account_id), at=book.now)


def payment_public(cashback: Row, account: AccountPublic, *, at: int) -> PaymentPublic:
    """Return a payment as callers see it; what waits for a frozen account is SCHEDULED to them."""
    status: CashbackStatus = "CREDITED" if is_received(cashback, at=at) else "SCHEDULED"
    status = "CANCELLED" if cashback["status"] == "CANCELLED" else status
    shown = CashbackPublic(amount=cashback["amount"], due_at=cashback["due_at"], status=status)
    return PaymentPublic(payment_id=cashback["payment_id"], account=account, cashback=shown)


def is_received(cashback: Row, *, at: int) -> bool:
    """Tell whether a cashback was credited; for one of 0 nothing is, and its time alone counts."""
    is_due = cashback["due_at"] <= at and cashback["status"] != "CANCELLED"
    return bool(is_due if cashback["amount"] == 0 else cashback["status"] == "CREDITED")


@api.get("/payments/{payment_id}")
def get_payment(books: ByReader, payment_id: Uuid) -> PaymentPublic:
    """Show a payment, the account as it is now, and where the cashback stands."""
    query = "SELECT * FROM scheduled_cashback WHERE payment_id = :id AND clock = 'SERVER'"
    for cashback in books.rows(query, id=payment_id):
        account = AccountPublic(**find_account(books, cashback["account_id"]))
        return payment_public(cashback, account, at=read_clocks(books)["now"])
    raise PaymentNotFound(f"There is no payment {payment_id}", payment_id)


# What the audit log calls the kinds of events that it does not call by their names.
ACTIONS = {"WITHDRAWAL": "withdraw", "PAYMENT": "pay", "REVERSAL": "reverse"}
ACTIONS["CASHBACK"] = "credit_cashback"
AUDIT_OF_ALL = "SELECT * FROM event WHERE id < :id ORDER BY id DESC"
# The events of an account are those of its entries, and those without any.
AUDIT_OF_ACCOUNT = f"""SELECT * FROM (
        SELECT event.*, seq FROM entry JOIN event ON event.id = transaction_id
        WHERE entry.account_id = :account_id AND seq < :seq AND transaction_id < :id
        ORDER BY seq DESC LIMIT :limit
    ) AS posted UNION ALL SELECT * FROM (
        SELECT event.*, :seq AS seq FROM event
        WHERE account_id = :account_id AND id < :id AND {NO_ENTRIES} ORDER BY id DESC LIMIT :limit
    ) AS other ORDER BY id DESC"""  # noqa: S608


def parse_details(arguments: str) -> Row:
    """Return an event's arguments, or say that they are no JSON, which nothing here has written."""
    with suppress(ValueError):
        if isinstance(details := json.loads(arguments), dict):
            details.pop("hash", None)  # A key's, which is nobody's business.
            if "url" in details:
                # A receiver's scheme and host; the rest of its URL may be a secret.
                url = str(details["url"])
                details["url"] = re.sub(r"(?s)^(\w+://)?([^/?#]*@)?([^/?#]*).*", r"\1\3", url)
            return details
    return {"damaged": arguments}


class AuditEventPublic(Stored):
    """Who did what and when; `details` are the arguments, as they were asked."""

    id: str
    ts: Timestamp
    caller: str
    action: str
    account_id: str | None
    transaction_id: str | None
    details: Row


@api.get("/audit")
def list_audit_events(
    books: ByAuditor,
    limit: Limit = PAGE_SIZE,
    cursor: Cursor = None,
    account_id: AccountId | None = None,
) -> Page[AuditEventPublic]:
    """List what was done, newest first; of one account, all that touched it."""
    query = AUDIT_OF_ACCOUNT if account_id else AUDIT_OF_ALL
    among: Row = {"account_id": account_id}
    page = Page[AuditEventPublic].read(books, "audit", query, (limit, cursor), **among)
    for row in map(vars, page.items):
        row["action"] = ACTIONS.get(row["kind"], row["kind"].lower())
        row["details"] = parse_details(row["arguments"])
        row["transaction_id"] = row["id"] if row["kind"].isupper() else None
    return page


class EventPublic(BaseModel):
    """What happened, and the transaction, account or hold as it was then: the same for ever."""

    id: str
    type: str
    ts: Timestamp
    caller: str
    data: TransactionPosted | AccountPublic | HoldPublic | Row


class Events(BaseModel):
    """What happened, and the event to go on after."""

    items: list[EventPublic]
    next: str | None
    seal: int | None  # The newest that covers the last of them.


@api.get("/events")
async def list_events(
    database: Annotated["Database", Policy(AUDITORS)], limit: Limit = PAGE_SIZE, after: Next = None
) -> Events:
    """List what happened, oldest first, for programs that follow along."""
    until = await newest_settled(database)
    rows = await database.run_read(find_events, after, until, limit)
    last = rows[-1]["id"] if rows else None
    query = "SELECT max(id) AS id FROM seal WHERE until >= :last"
    [seal] = await database.run_read(lambda books: books.rows(query, last=last))
    return Events.model_validate({"items": rows, "next": last or after, "seal": seal["id"]})


async def newest_settled(database: "Database") -> str:
    """Return the newest event after which none can come in between; none, if that takes long."""

    def look(books: "Connection") -> list[list[Row]]:
        return books.all_rows(NEWEST, (books.writes, {}))

    [newest], writes = await database.run_read(look)
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    # What is in flight may bring a lower id than the newest event's; what begins later may not.
    while writes and time.monotonic() < deadline:
        await asyncio.sleep(BUSY_RETRY_SECONDS)
        _, later = await database.run_read(look)
        writes = [write for write in writes if write in later]
    return "" if writes else newest["id"] or ""


EVENT_TYPES = {
    "open_account": "account.opened", "open_wallets": "account.opened", "freeze": "account.frozen",
    "update_account": "account.updated", "unfreeze": "account.unfrozen", "close": "account.closed",
    "hold": "hold.created", "void": "hold.voided", "add_key": "key.added",
    "revoke_key": "key.revoked", "add_webhook": "webhook.added",
    "remove_webhook": "webhook.removed", "add_asset": "asset.added", "expire": "hold.expired",
}  # fmt: skip


def find_events(books: "Connection", after: str | None, until: str, limit: int) -> list[Row]:
    """Return the events after one, each with what it is about, or raise InvalidCursor."""
    known = "SELECT id FROM event WHERE id = :id"
    # PostgreSQL cannot even ask for a NUL.
    if after is not None and not books.rows(known, id=after.replace("\0", "-")):
        raise InvalidCursor("Invalid cursor")
    query = f"""SELECT event.*, {ENTRY_COUNT}, CASE kind WHEN 'hold' THEN
        (SELECT max(id) FROM hold WHERE account_id = event.account_id AND id < event.id)
        ELSE account_id END AS about FROM event WHERE id > :after AND id <= :until
        ORDER BY id LIMIT :limit"""  # noqa: S608
    rows = within_bounds(books.rows(query, after=after or "", until=until, limit=limit))
    for row in rows:
        row["type"] = EVENT_TYPES.get(row["kind"], "transaction.posted")
        row["data"] = parse_details(row["arguments"])
        row["about"] = row["data"].get("hold_id", row["about"])
    with_entries(books.rows, [row for row in rows if row["kind"].isupper()])
    stored: dict[str, Row] = {}
    for table in ("account", "hold"):
        query = f"SELECT * FROM {table} WHERE id = ANY(:ids)"  # noqa: S608
        found = books.rows(query, ids=[row["about"] for row in rows if row["kind"] > "a"])
        stored |= {row["id"]: row for row in found}
    return [row | {"data": fact(row, stored.get(row["about"], {}))} for row in rows]


def fact(event: Row, stored: Row) -> Any:
    """Return what an event tells: a thing as it was made or ended, or what it was changed to."""
    kind, told = event["kind"], event["data"]
    if kind.isupper():
        return TransactionPosted(**event)
    asked = told.get("body", {})
    status = {"freeze": "FROZEN", "unfreeze": "ACTIVE", "close": "CLOSED"}.get(kind)
    if status or kind == "update_account":
        return {"id": event["account_id"]} | ({"status": status} if status else asked)
    if not stored:
        return asked or told
    if status := {"hold": "PENDING", "void": "VOIDED", "expire": "EXPIRED"}.get(kind):
        then = {"status": status, "transaction_id": None}
        return HoldPublic(**stored | then | {"captured_amount": 0})
    owner = asked.get("owner_name") or (stored["name"] or "").partition(":")[2]
    notes = json.dumps(asked["metadata"]) if "metadata" in asked else None
    then = {"owner_name": owner or stored["owner_name"], "notes": notes, "status": "ACTIVE"}
    empty = {"balance": 0, "held": 0, "credit_limit": event["credit_limit"] or 0}
    return AccountPublic(**stored | then | empty)


class SealPublic(Stored):
    """What vouches for all that happened until an event: see Seals in deploy/README.md."""

    id: int = Field(primary_key=True)
    ts: Timestamp
    until: str = Field(foreign_key="event.id")
    events: int
    hash: str


class Seal(SealPublic, table=True):
    """Each seal, numbered 1, 2, 3 ..."""


class Seals(Page[SealPublic]):
    """Some seals, newest first; or those after one, oldest first, and the one to go on after."""

    next: int | None = None


@api.get("/seals")
def list_seals(
    books: ByAuditor,
    limit: Limit = PAGE_SIZE,
    cursor: Cursor = None,
    after: SealNumber | None = None,
) -> Seals:
    """List seals, newest first; with `after`, those that follow it."""
    query = "SELECT *, id AS seq FROM seal WHERE id"
    if after is None:
        return Seals.read(books, "seals", f"{query} < :seq ORDER BY id DESC", (limit, cursor))
    if after and not books.rows("SELECT id FROM seal WHERE id = :id", id=after):
        raise InvalidCursor("Invalid cursor")
    page = Seals.read(books, "", f"{query} > :seq ORDER BY id", (limit, None), f"{after}_")
    page.next_cursor, page.next = None, page.items[-1].id if page.items else after
    return page


@api.get("/seals/{seal_id}", responses=refuses(SealNotFound))
def get_seal(books: ByAuditor, seal_id: SealNumber) -> SealPublic:
    """Show a seal."""
    for row in books.rows("SELECT * FROM seal WHERE id = :id", id=seal_id):
        return SealPublic.of(row)
    raise SealNotFound(f"There is no seal {seal_id}")


# ----- The library
# The canonical API without HTTP, for programs in Python. It stands here, and not in part one,
# because it calls the functions of the routes, and checks what they are given as they do.


def method(function: Callable[..., Any], result: type[T]) -> Callable[..., T]:
    """Make a function of the API a method of Books: ids come first, and all else by its name."""
    routes: list[Any] = api.routes
    route: LedgerRoute = next(route for route in routes if route.function is function)

    def call(books: "Books", *ids: str, key: str | None = None, **others: Any) -> Any:
        ledger, asked = books.ledger, Asked(())
        route.take_key(asked, None if key is None else key.encode())
        arguments = route.validate(as_requested(route, ids, others), asked)
        if route.writes:
            command = route.command(books.caller, asked, arguments)
            answer: Any = retry_while_busy(partial(ledger.commit, [command]))[0]
        elif inspect.iscoroutinefunction(function):
            answer = asyncio.run(route.read(ledger.database, arguments))
        else:
            with ledger.database.read() as connection:
                answer = route.call(connection, arguments)
        if answer.status < 400:
            return route.result.validate_json(answer.body)
        problem = json.loads(answer.body)
        told = [problem.pop(name) for name in ("code", "detail", "type", "title", "status")]
        raise LedgerError.kinds[told[0]](told[1], **problem)

    call.__doc__ = function.__doc__
    return call


def as_requested(route: LedgerRoute, ids: Sequence[str], others: Row) -> Row:
    """Return arguments as a request would bring them."""
    in_path, body = [*route.param_convertors], route.body_field
    schema: Any = route.arguments.model_fields["body"].annotation if body else BaseModel
    names = in_path + [name for name in schema.model_fields if name.endswith("account_id")]
    named = dict(zip(names, ids, strict=False)) | others
    if len(named) < len(ids) + len(others):
        raise TypeError(f"{route.name} takes the ids {', '.join(names)}, each once")
    text = json.dumps(named, default=datetime.isoformat)
    given = {name.removesuffix("_"): value for name, value in parse_json(text.encode()).items()}
    if body:
        outside = {name: given.pop(name) for name in in_path if name in given}
        return outside | {"body": given}
    return given | ({"metadata": [*given["metadata"].items()]} if "metadata" in given else {})


class Books:
    """A ledger for a program in Python, which threads may share, beside servers or without."""

    open_account = method(create_account, AccountPublic)
    add_asset = method(create_asset, AssetPublic)
    asset = method(get_asset, AssetPublic)
    assets = method(list_assets, Page[AssetPublic])
    account = method(get_account, AccountPublic)
    accounts = method(list_accounts, Page[AccountPublic])
    update_account = method(update_account, AccountPublic)
    freeze = method(freeze_account, AccountPublic)
    unfreeze = method(unfreeze_account, AccountPublic)
    close_account = method(close_account, AccountPublic)
    deposit = method(create_deposit, AccountPublic)
    withdraw = method(create_withdrawal, AccountPublic)
    top_up = method(top_up_account, AccountPublic)
    give_bonus = method(give_bonus, AccountPublic)
    spend = method(spend_credits, AccountPublic)
    statement = method(get_statement, Page[EntryPublic])
    balance = method(get_balance, BalancePublic)
    balances = method(get_trial_balance, TrialBalance)
    totals = method(get_totals, Totals)
    transfer = method(create_transfer, TransferPublic)
    transfer_many = method(create_transfers, BulkPublic)
    transaction = method(get_transaction, TransactionPublic)
    transactions = method(list_transactions, Page[TransactionPublic])
    post = method(create_transaction, TransactionPublic)
    reverse = method(reverse_transaction, TransactionPublic)
    place_hold = method(create_hold, HoldPublic)
    capture_hold = method(capture_hold, HoldPublic)
    void_hold = method(void_hold, HoldPublic)
    hold = method(get_hold, HoldPublic)
    holds = method(list_holds, Page[HoldPublic])
    pay = method(create_payment, PaymentPublic)
    payment = method(get_payment, PaymentPublic)
    audit = method(list_audit_events, Page[AuditEventPublic])
    events = method(list_events, Events)
    seals = method(list_seals, Seals)

    def __init__(self, ledger: Ledger, caller: str) -> None:
        self.ledger, self.caller = ledger, caller

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ledger.database.close()


def open_ledger(database_url: str, *, caller: str = "local") -> Books:
    """Open a ledger for this program, or begin a new one, or raise StartupError.

    What is due by the clock is credited, and holds end, now, by a server, or when it is opened.
    """
    if not is_name(caller):
        raise StartupError("the caller's name must be 1 to 200 printable characters")
    database = database_at(database_url)
    try:
        database.open(make=True)
        ledger = Ledger(database)
        due = (partial(credit_cashbacks, clock="SERVER", until=utc_now()), expire_holds)
        commands = [Command("system", "{}", run) for run in due]
        retry_while_busy(partial(ledger.commit, commands))
    except BaseException:
        database.close()
        raise
    return Books(ledger, caller)


# ----- Dialect: /bank, the banking kata
# Accounts under the caller's own names, by the caller's own clock in milliseconds.

BANK_ACCOUNT = "bank:{}@USD"
NOT_PAID = dict.fromkeys((AccountNotFound, InsufficientFunds), (400, "Payment failed"))
NOT_TRANSFERRED = dict.fromkeys((*NOT_PAID, SameAccount), (400, "Transfer failed"))
ToPay = Annotated[Book, Policy(SERVICES, errors=NOT_PAID)]
ToTransfer = Annotated[Book, Policy(SERVICES, errors=NOT_TRANSFERRED)]
BANK_OPERATIONS = {"open_account": "created", "DEPOSIT": "deposited", "WITHDRAWAL": "withdrawn"}
BANK_OPERATIONS |= {"PAYMENT": "payment{}", "REVERSAL": "reversed"}
# All other kinds move money between two customers.
BANK_TRANSFERS = {"DEBIT": "transferred out", "CREDIT": "transferred in"}

NOTED = AfterValidator(note_time)
BankTime = Annotated[int, pydantic.Field(strict=True, ge=0, le=2**53, examples=[1]), NOTED]
BankMoment = Annotated[int, pydantic.Field(ge=0, le=2**53), PLAIN_DIGITS, NOTED]
BankName = Annotated[Name, names_account(BANK_ACCOUNT)]


class BankRoute(LedgerRoute):
    lenient = True
    errors: ClassVar[Overrides] = {
        AccountExists: (409, "Account already exists"),
        AccountNotFound: (404, "Account not found"),
    }


bank = APIRouter(prefix="/bank", tags=["bank"], route_class=BankRoute)
bank.get("/health", operation_id="get_bank_health")(get_health)


class BankAccountCreate(RequestBody):
    timestamp: BankTime
    account_id: BankName


class BankAccountCreated(BaseModel):
    account_id: str
    created: bool = True


@bank.post("/accounts", status_code=201, responses=refuses(AccountExists))
def create_bank_account(book: ByService, body: BankAccountCreate) -> BankAccountCreated:
    """Open an account under a name of the caller's own, unique for ever."""
    open_account(book, owner_name=body.account_id, asset="USD", name=f"bank:{body.account_id}")
    return BankAccountCreated(account_id=body.account_id)


class BankAccounts(BaseModel):
    accounts: list[str]


@bank.get("/accounts")
def list_bank_accounts(books: LongByReader) -> BankAccounts:
    """List the names of all accounts."""
    return BankAccounts(accounts=list(named_balances(books, "bank")))


def named_balances(books: "Connection", prefix: str) -> dict[str, int]:
    """Return the balances of a dialect's accounts by its own names, sorted."""
    query = "SELECT name, balance FROM account WHERE name >= :first AND name < :end ORDER BY name"
    rows = books.rows(query, first=f"{prefix}:", end=f"{prefix};")
    return {row["name"].removeprefix(f"{prefix}:"): row["balance"] for row in rows}


class BankAccountBalance(BaseModel):
    account_id: str
    balance: int


@bank.get("/accounts/{name:path}/balance")
def get_bank_balance(
    books: ByReader, name: str, timestamp: BankMoment | None = None
) -> BankAccountBalance:
    """Show a balance, after what is due by then was credited."""
    account = find_account(books, BANK_ACCOUNT.format(name))
    return BankAccountBalance(account_id=name, balance=account["balance"])


class BankMovement(BankAccountCreate):
    amount: Amount


class BankBalance(BaseModel):
    balance: int


@bank.post("/deposits")
def create_bank_deposit(book: ByService, body: BankMovement) -> BankBalance:
    """Take money in for an account."""
    account = deposit(book, BANK_ACCOUNT.format(body.account_id), amount=body.amount)
    return BankBalance(balance=account.balance)


class BankTransfer(RequestBody):
    timestamp: BankTime
    source_account_id: BankName
    target_account_id: BankName
    amount: Amount


@bank.post("/transfers", responses=refuses(SameAccount))
def create_bank_transfer(book: ToTransfer, body: BankTransfer) -> BankBalance:
    """Move money, and show the balance of the source."""
    source = BANK_ACCOUNT.format(body.source_account_id)
    transfer(book, source, BANK_ACCOUNT.format(body.target_account_id), amount=body.amount)
    return BankBalance(balance=book.account(source).balance)


class BankPayment(BaseModel):
    """What a payment is called: payment1, payment2 and so on."""

    payment_id: str


@bank.post("/payments")
def create_bank_payment(book: ToPay, body: BankMovement) -> BankPayment:
    """Pay, and get 2 % back after 24 hours of the caller's clock."""
    reference = BANK_ACCOUNT.format(body.account_id)
    cashback = pay(book, reference, amount=body.amount, payee="payments")
    return BankPayment(payment_id=f"payment{cashback['number']}")


class BankPaymentStatus(BankPayment):
    """Where a payment stands: IN_PROGRESS or CASHBACK_RECEIVED."""

    status: str


@bank.get("/payments/{payment_id}")
def get_bank_payment(
    books: ByReader, payment_id: str, account_id: Name, timestamp: BankMoment
) -> BankPaymentStatus:
    """Show where a payment of an account stands."""
    number = re.fullmatch("payment([1-9][0-9]{0,17})", payment_id)
    query = """SELECT cashback.* FROM scheduled_cashback AS cashback JOIN account
        ON account.id = account_id WHERE number = :number AND name = :name"""
    asked = {"number": int(number[1]) if number else 0, "name": f"bank:{account_id}"}
    for cashback in books.rows(query, **asked):
        received = is_received(cashback, at=timestamp * 1_000)
        status = "CASHBACK_RECEIVED" if received else "IN_PROGRESS"
        return BankPaymentStatus(payment_id=payment_id, status=status)
    raise PaymentNotFound("There is no such payment of this account")


class BankTopSpenders(BaseModel):
    """Names with what they have spent, as "name(total)"."""

    top_spenders: list[str]


@bank.get("/top-spenders")
def get_bank_top_spenders(books: LongByReader, timestamp: BankMoment, n: Limit) -> BankTopSpenders:
    """List who has sent and paid the most, and then by name."""
    query = f"""SELECT name, {SUM.format("COALESCE(amount, 0)", "spent")}
        FROM account LEFT JOIN (entry JOIN event ON event.id = transaction_id)
        ON entry.account_id = account.id AND type = 'DEBIT'
        AND event.kind IN ('TRANSFER', 'PAYMENT', 'JOURNAL', 'CAPTURE')
        WHERE name >= 'bank:' AND name < 'bank;' GROUP BY account.id, name"""  # noqa: S608
    rows = books.rows(query)
    spent = [(10**9 * row["spent_billions"] + row["spent"], row["name"][5:]) for row in rows]
    ranked = sorted(spent, key=lambda one: (-one[0], one[1]))
    return BankTopSpenders(top_spenders=[f"{name}({total})" for total, name in ranked[:n]])


class BankOperation(BaseModel):
    """A line of an account's history; `transaction_id` rises in the order of arrival."""

    transaction_id: int
    timestamp: int
    operation: str
    amount: int
    payment_ref: str | None = None
    deposited: bool | None = None


class BankOperations(BaseModel):
    """An account's history, by timestamp, and then in the order of arrival."""

    account_id: str
    transactions: list[BankOperation]


@bank.get("/accounts/{name:path}/transactions")
def list_bank_transactions(books: ByReader, name: str, timestamp: BankMoment) -> BankOperations:
    """List everything that happened to an account, and the cashbacks that are to come."""
    account = find_account(books, BANK_ACCOUNT.format(name))
    if books.bound == "short" and account["last_seq"] > SHORT_ROWS_MAX:
        raise ReadTooLong
    query = f"""SELECT 2 * seq AS line, kind, type, entry.amount AS moved,
        COALESCE(effective_at, ts) / 1000 AS at, number, cashback.amount, due_at, status
        FROM entry JOIN event ON event.id = entry.transaction_id
        LEFT JOIN scheduled_cashback AS cashback ON payment_id = event.id
        WHERE entry.account_id = :id AND kind <> 'CASHBACK'
        UNION ALL SELECT 1, kind, '', 0, COALESCE(effective_at, ts) / 1000, NULL, NULL, NULL, NULL
        FROM event WHERE account_id = :id AND {NO_ENTRIES} AND kind = 'open_account'"""  # noqa: S608
    movements = books.rows(query, id=account["id"])
    lines = [line for row in movements for line in bank_operations(row, timestamp)]
    lines.sort(key=attrgetter("timestamp", "transaction_id"))
    return BankOperations(account_id=name, transactions=lines)


def bank_operations(row: Row, timestamp: int) -> Iterator[BankOperation]:
    """Return the lines of a movement: line 2n is the nth entry, and 2n + 1 its cashback."""
    number, at = row["line"], row["at"]
    name = BANK_OPERATIONS.get(row["kind"]) or BANK_TRANSFERS[row["type"]]
    name = name.format(row["number"] or "")
    yield BankOperation(transaction_id=number, timestamp=at, operation=name, amount=row["moved"])
    if row["due_at"] is not None:
        yield BankOperation(
            transaction_id=number + 1,
            timestamp=row["due_at"] // 1_000,
            operation="cashback",
            amount=row["amount"],
            payment_ref=name,
            deposited=is_received(row, at=timestamp * 1_000),
        )


# ----- Dialect: /atm, the cash machine
# Accounts under numbers; amounts are decimal text with two places.

ATM_ACCOUNT = "atm:{}@USD"
ATM_EXPONENT = ASSETS["USD"].exponent
ATM_DEMO = """{
    "1001": "1000.00", "1002": "250.50", "1003": "0.00",
    "1004": "500.00", "1005": "123.45", "1006": "9999.99"
}"""
Balance = Annotated[str, pydantic.StringConstraints(pattern="^[0-9]{1,13}([.][0-9]{1,20})?$")]
Number = Annotated[str, pydantic.StringConstraints(max_length=200, pattern="^[!-~]+$")]
PRELOAD = TypeAdapter(dict[Number, Balance])


def open_atm_account(book: Book, *, number: str, amount: int) -> None:
    open_account(book, owner_name=number, asset="USD", name=f"atm:{number}")
    if amount:
        deposit(book, ATM_ACCOUNT.format(number), amount=amount)


DollarsIn = Annotated[
    int,
    BeforeValidator(partial(parse_decimal, exponent=ATM_EXPONENT)),
    pydantic.Field(ge=1, le=AMOUNT_MAX, examples=["10.50"]),
    pydantic.WithJsonSchema({"type": "string"}),
]
Dollars = Annotated[int, pydantic.PlainSerializer(lambda cents: decimal_text(cents, 2), str)]
AtmNumber = Annotated[str, names_account(ATM_ACCOUNT)]


class AtmRoute(LedgerRoute):
    exponent, lenient = ATM_EXPONENT, True
    errors: ClassVar[Overrides] = {
        AccountNotFound: (404, "account not found"),
        InsufficientFunds: (400, "insufficient funds"),
    }

    @staticmethod
    def first_accounts(settings: "Settings", demo: bool) -> Iterator["partial[None]"]:
        """Return what opens the accounts of PRELOAD_ACCOUNTS, or of the demo."""
        given = settings.preload_accounts or (ATM_DEMO if demo else "{}")
        try:
            balances = PRELOAD.validate_python(parse_json(given.encode()))
        except (LedgerError, ValidationError, UnicodeError):
            raise StartupError('PRELOAD_ACCOUNTS must be JSON such as {"1001": "500.00"}') from None
        for number, balance in balances.items():
            cents = Decimal(balance).quantize(Decimal("0.01"), ROUND_HALF_UP, Context(prec=40))
            amount = minor_units(str(cents), ATM_EXPONENT)
            yield partial(open_atm_account, number=number, amount=amount)


atm = APIRouter(prefix="/atm", tags=["atm"], route_class=AtmRoute)


class AtmWelcome(BaseModel):
    message: str = "Mini ATM Server"
    docs: str = "/docs"
    sample_accounts: dict[str, Dollars]


@atm.get("/")
def get_atm_welcome(books: LongByReader) -> AtmWelcome:
    """Show all accounts with their balances."""
    return AtmWelcome(sample_accounts=named_balances(books, "atm"))


class AtmHealth(Health):
    accounts: list[str]


@atm.get("/health")
def get_atm_health(books: LongByReader) -> AtmHealth:
    """Tell whether the cash machine works, and for which accounts."""
    return AtmHealth(accounts=list(named_balances(books, "atm")))


class AtmBalance(BaseModel):
    account_number: str
    balance: Dollars


@atm.get("/accounts/{number:path}/balance")
def get_atm_balance(books: ByReader, number: AtmNumber) -> AtmBalance:
    """Show a balance."""
    account = find_account(books, ATM_ACCOUNT.format(number))
    return AtmBalance(account_number=number, balance=account["balance"])


class AtmMovement(RequestBody):
    amount: DollarsIn


@atm.post("/accounts/{number:path}/deposit")
def create_atm_deposit(book: ByService, number: AtmNumber, body: AtmMovement) -> AtmBalance:
    """Take cash in."""
    account = deposit(book, ATM_ACCOUNT.format(number), amount=body.amount)
    return AtmBalance(account_number=number, balance=account.balance)


@atm.post("/accounts/{number:path}/withdraw")
def create_atm_withdrawal(book: ByAdmin, number: AtmNumber, body: AtmMovement) -> AtmBalance:
    """Give cash out."""
    account = withdraw(book, ATM_ACCOUNT.format(number), amount=body.amount)
    return AtmBalance(account_number=number, balance=account.balance)


# ----- Dialect: /api/v1/wallets, application credits
# Wallets of three closed-loop assets, which the treasury issues; amounts have four places.

WALLET_ASSETS = {1: "GOLD", 2: "DMND", 3: "PTS"}
WALLETS = [f"wallets:{{}}@{asset}" for asset in WALLET_ASSETS.values()]
WALLET_EXPONENT = ASSETS["GOLD"].exponent


def open_funded_wallets(book: Book, *, user: str, amounts: Sequence[int]) -> None:
    """Open a user's wallets with a bonus in each."""
    open_wallets(book, owner_name=user, name=f"wallets:{user}")
    for form, amount in zip(WALLETS, amounts, strict=True):
        move_credits(book, form.format(user), amount=amount * 10**WALLET_EXPONENT, kind="BONUS")


def wallet(user: str, asset_type_id: int) -> str:
    """Return what the ledger calls a user's wallet, or raise AssetNotFound."""
    if asset_type_id not in WALLET_ASSETS:
        known = ", ".join(f"{number} {code}" for number, code in WALLET_ASSETS.items())
        raise AssetNotFound(f"There is no such asset; there are {known}")
    return f"wallets:{user}@{WALLET_ASSETS[asset_type_id]}"


CreditsIn = Annotated[
    int,
    BeforeValidator(partial(parse_decimal, exponent=WALLET_EXPONENT, or_number=True)),
    pydantic.Field(ge=1, le=AMOUNT_MAX, examples=["12.5"]),
    pydantic.WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "number"}]}),
]
Credits = Annotated[int, pydantic.PlainSerializer(lambda units: decimal_text(units, 4), str)]
KeyInBody = Annotated[str | None, AfterValidator(note_key), pydantic.Field(exclude=True)]
WalletOwner = Annotated[str, names_account(*WALLETS)]


class WalletRoute(LedgerRoute):
    exponent, lenient = WALLET_EXPONENT, True
    errors: ClassVar[Overrides] = {
        AccountNotFound: (404, "User account not found"),
        InsufficientFunds: (402, "Insufficient balance: have {balance}, need {requested}"),
    }

    @staticmethod
    def first_accounts(settings: "Settings", demo: bool) -> Iterator["partial[None]"]:
        funds = {"user_alice": (100, 50, 500), "user_bob": (80, 30, 200)}
        for user, amounts in funds.items() if demo else ():
            yield partial(open_funded_wallets, user=user, amounts=amounts)


wallets = APIRouter(prefix="/api/v1/wallets", tags=["wallets"], route_class=WalletRoute)


class WalletBalance(BaseModel):
    balance: Credits
    account_id: str
    asset_type_id: int


@wallets.get("/users/{user:path}/balance", responses=refuses(AssetNotFound))
def get_wallet_balance(books: ByReader, user: str, asset_type_id: PlainInt) -> WalletBalance:
    """Show what a user has of an asset."""
    held = find_account(books, wallet(user, asset_type_id))
    return WalletBalance(**held, account_id=held["id"], asset_type_id=asset_type_id)


class WalletUserCreate(RequestBody):
    external_user_id: Annotated[Name, names_account(*WALLETS)]


@wallets.post("/users", status_code=201, responses=refuses(AccountExists))
def create_wallet_user(book: ByService, body: WalletUserCreate) -> WalletUserCreate:
    """Open a user's three wallets, all empty."""
    user = body.external_user_id
    open_wallets(book, owner_name=user, name=f"wallets:{user}")
    return body


class WalletMovement(RequestBody):
    """An amount of an asset; the key may stand here or in the header."""

    amount: CreditsIn
    asset_type_id: Annotated[int, pydantic.Field(strict=True, examples=[1])]
    idempotency_key: KeyInBody = None


class WalletMoved(BaseModel):
    """A movement, which is a transaction, and what is in the wallet after it."""

    transaction_id: str
    new_balance: Credits


@wallets.post("/users/{user:path}/top-up", responses=refuses(AssetNotFound))
def create_top_up(book: ByService, user: WalletOwner, body: WalletMovement) -> WalletMoved:
    """Add credits that were bought."""
    reference = wallet(user, body.asset_type_id)
    transaction_id = move_credits(book, reference, amount=+body.amount, kind="TOP_UP")
    return WalletMoved(transaction_id=transaction_id, new_balance=book.account(reference).balance)


@wallets.post("/users/{user:path}/bonus", responses=refuses(AssetNotFound))
def create_bonus(book: ByService, user: WalletOwner, body: WalletMovement) -> WalletMoved:
    """Add credits that are a present."""
    reference = wallet(user, body.asset_type_id)
    transaction_id = move_credits(book, reference, amount=+body.amount, kind="BONUS")
    return WalletMoved(transaction_id=transaction_id, new_balance=book.account(reference).balance)


@wallets.post("/users/{user:path}/spend", responses=refuses(AssetNotFound))
def create_spend(book: ByService, user: WalletOwner, body: WalletMovement) -> WalletMoved:
    """Take credits for a service."""
    reference = wallet(user, body.asset_type_id)
    transaction_id = move_credits(book, reference, amount=-body.amount, kind="SPEND")
    return WalletMoved(transaction_id=transaction_id, new_balance=book.account(reference).balance)


# ===== Part three: storage
# How rows get to disk and back, alike on two engines. Nothing here knows what a row means.


# ----- Database
# Each read and each write begins and ends here, and nowhere else. SQLite is a library and called
# inline on the event loop; PostgreSQL is a server and called in threads.

READERS_MAX, LONG_READERS_MAX = 4, 2
SHORT_ROWS_MAX = 500
# A short read of SQLite, which is done on the event loop, is bounded by what it does, not by time.
STEP_INSTRUCTIONS, SHORT_STEPS_MAX = 1_000, 60
READ_SECONDS_MAX = {"short": 0.5, "long": 20.0}
LOOK_SECONDS = 0.02
BUSY_SECONDS_MAX, BUSY_RETRY_SECONDS = 5.0, 0.001
ANSWER_SECONDS_MAX, CLOSING_SECONDS_MAX = 10.0, 1.0
# What commits and requests are counted by.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
DRIVER_ERRORS = (sqlite3.Error, psycopg.Error)  # They leave here as errors of the ledger.


class StartupError(Exception):
    """The program cannot start or go on; the message is one line for the operator."""


SCHEMA_LOCK, WRITE_LOCK = 0x6C65646765720A, 0x6C65646765720B
DISK_FAULTS = (StorageFull, DiskFailed, DatabaseLost)
KNOWN_ERRORS: dict[int | str, type[LedgerError]] = {
    sqlite3.SQLITE_BUSY: DatabaseBusy,
    sqlite3.SQLITE_LOCKED: DatabaseBusy,
    sqlite3.SQLITE_INTERRUPT: ReadTooLong,
    sqlite3.SQLITE_FULL: StorageFull,
    sqlite3.SQLITE_IOERR: DiskFailed,
    sqlite3.SQLITE_CANTOPEN: DiskFailed,
    sqlite3.SQLITE_READONLY: DiskFailed,
    sqlite3.SQLITE_CONSTRAINT: InternalError,  # It can never succeed: a rule was not kept above.
    # By SQLSTATE; a unique violation is what a key brings that is used on two servers.
    "23505": DatabaseConflict,
    "40001": DatabaseConflict,  # A serialization failure.
    "40P01": DatabaseConflict,  # A deadlock.
    "55P03": DatabaseBusy,  # A lock timeout.
    "57014": ReadTooLong,  # A cancelled statement.
    "53300": DatabaseBusy,  # Too many connections.
    "53100": StorageFull,
    "58030": DiskFailed,
    "25006": DatabaseLost,  # A server that only reads, as one that became a standby.
}


class SqliteConnection:
    """A connection to SQLite; PostgresConnection, to a server, is derived from it."""

    engine = "sqlite"
    is_writable = "SELECT 1 AS yes FROM asset LIMIT 1"
    probe = "PRAGMA user_version = 0"  # Which writes, and changes nothing.
    tables = "SELECT name FROM sqlite_schema WHERE type = 'table'"
    schema = "SELECT name, type AS kind, sql FROM sqlite_schema WHERE name NOT LIKE 'sqlite_%'"
    triggers = "SELECT name, lower(tbl_name) AS place FROM sqlite_schema WHERE type = 'trigger'"
    drop_trigger = "DROP TRIGGER IF EXISTS {}"
    lock_schema = "SELECT 1"  # The write itself keeps all others away.
    size = "SELECT page_count * page_size AS bytes FROM pragma_page_count, pragma_page_size"
    clock = ":now"  # Which is given; a server has its own, for all who call it.
    mark = ""  # What lets others see that a write is under way, and those that they see so.
    writes = "SELECT 1 AS write WHERE 1 = 0"
    # Waits in a block only for the results that it looks at: each wait is a thread's switch.
    pipeline: Callable[..., Any] = nullcontext

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.bound = ""
        self.steps, self.deadline = 0, 0.0  # Of the read that is under way.
        self.saved: dict[int, Mapping[str, list[Row]]] = {}  # In the write that is open.

    def execute(self, statement: str, **values: Any) -> Any:
        """Run a statement, and return the driver's cursor."""
        return self.driver.execute(self.text(statement), self.adapt(values))

    @staticmethod
    def as_object(members: Mapping[str, str]) -> str:
        """Return what makes JSON of columns, without blanks, in the order of names."""
        pairs = [f"'{name}', {members[name]}" for name in sorted(members)]
        return f"json_object({', '.join(pairs)})"

    @staticmethod
    def as_list(each: str) -> str:
        """Return what makes a list of JSON."""
        return f"json_group_array({each})"

    @staticmethod
    @lru_cache
    def text(statement: str) -> str:
        """Return a statement as the driver reads it."""
        listed = re.sub(r"= ANY\((:\w+)\)", r"IN (SELECT value FROM json_each(\1))", statement)
        return listed.replace(" FOR UPDATE", "")

    @staticmethod
    def adapt(values: Row) -> Row:
        """Return values as the driver takes them; a list comes as JSON, whatever its length."""
        return {n: json.dumps(v) if isinstance(v, list) else v for n, v in values.items()}

    def insert(self, table: str, rows: list[Row]) -> None:
        """Insert rows that all have the same columns."""
        into, marks = f"{table} ({', '.join(rows[0])})", ", ".join("?" * len(rows[0]))
        values = map(itemgetter(*rows[0]), rows)
        self.driver.executemany(f"INSERT INTO {into} VALUES ({marks})", values)  # noqa: S608

    def update(self, table: str, columns: Sequence[str], rows: list[Row]) -> None:
        """Update some columns of the rows with these primary keys."""
        changes, key = ", ".join(f"{name} = ?" for name in columns), PRIMARY_KEYS[table]
        values = map(itemgetter(*columns, key), rows)
        self.driver.executemany(f"UPDATE {table} SET {changes} WHERE {key} = ?", values)  # noqa: S608

    def limit(self, bound: str) -> None:
        """Let each read end where it takes too long for a `short` or a `long` one."""
        self.bound = bound

        def is_over() -> bool:
            self.steps += 1
            is_short = bound == "short"
            return self.steps > SHORT_STEPS_MAX if is_short else time.monotonic() > self.deadline

        self.driver.set_progress_handler(is_over, STEP_INSTRUCTIONS)

    def interrupt(self) -> None:
        """End what another thread waits for on this connection."""
        self.driver.interrupt()

    def rows(self, statement: str, **values: Any) -> list[Row]:
        return self.all_rows((statement, values))[0]

    def all_rows(self, *queries: tuple[str, Row]) -> list[list[Row]]:
        """Return the rows of several queries, which are sent together."""
        cursors = [self.execute(statement, **values) for statement, values in queries]
        found = []
        for cursor in cursors:
            rows = cursor.fetchall()  # First, because a pipeline knows the columns only then.
            names = [column[0] for column in cursor.description]
            found.append([dict(zip(names, row, strict=True)) for row in rows])
        return found

    def save(self, inserts: Mapping[str, list[Row]], updates: Mapping[str, dict[int, Row]]) -> None:
        """Write what a batch has gathered, in the order that keys and triggers require."""
        self.saved[id(inserts)] = inserts  # It may come again, without what was refused.
        # Rows in the order of their keys, so that those of one page are written together.
        for table in TABLES:
            if rows := inserts.get(table):
                self.insert(table, sorted(rows, key=itemgetter(PRIMARY_KEYS[table])))
        for table, columns in CHANGING_COLUMNS.items():
            if changed := updates.get(table):
                rows = sorted(changed.values(), key=itemgetter(PRIMARY_KEYS[table]))
                self.update(table, columns, rows)


class PostgresConnection(SqliteConnection):
    """A connection to PostgreSQL, which is written to in statements of one parameter, of JSON."""

    engine = "postgresql"
    is_writable = """SELECT NOT pg_is_in_recovery()
    AND current_setting('default_transaction_read_only') = 'off' AS yes"""
    probe = "SELECT txid_current()"
    tables = "SELECT tablename AS name FROM pg_tables WHERE schemaname = current_schema()"
    schema = """WITH here AS (SELECT oid FROM pg_namespace WHERE nspname = current_schema())
    SELECT table_name::text AS name, 'column' AS kind,
    concat_ws(' ', column_name, data_type, is_nullable) AS sql FROM information_schema.columns
    WHERE table_schema = current_schema()
    UNION ALL
    SELECT conrelid::regclass::text, 'rule', concat_ws(' ', convalidated, pg_get_constraintdef(oid))
    FROM pg_constraint WHERE connamespace = (SELECT oid FROM here) AND contype <> 'n'
    UNION ALL
    SELECT indexname::text, 'index', replace(indexdef, current_schema() || '.', '') FROM pg_indexes
    WHERE schemaname = current_schema()
    UNION ALL
    SELECT tgname::text, 'trigger', concat_ws(' ', tgtype, (
        SELECT string_agg(attname, ' ' ORDER BY attname) FROM pg_attribute
        WHERE attrelid = tgrelid AND attnum = ANY(tgattr)), tgenabled, prosrc)
    FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid AND pronamespace = (SELECT oid FROM here)
    WHERE NOT tgisinternal"""
    triggers = """SELECT tgname::text AS name, relname::text AS place FROM pg_trigger
    JOIN pg_class ON pg_class.oid = tgrelid AND relnamespace = current_schema()::regnamespace"""
    drop_trigger = "DROP FUNCTION IF EXISTS {}() CASCADE"
    lock_schema = f"SELECT pg_advisory_xact_lock({SCHEMA_LOCK})"
    size = "SELECT pg_database_size(current_database()) AS bytes"
    clock = "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000000 AS bigint)"
    mark = f"SELECT pg_advisory_xact_lock_shared({WRITE_LOCK})"
    writes = f"""SELECT virtualtransaction AS write FROM pg_locks WHERE locktype = 'advisory'
    AND (CAST(classid AS bigint) << 32) + CAST(objid AS bigint) = {WRITE_LOCK} AND objsubid = 1
    AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""  # noqa: S608

    @staticmethod
    def as_object(members: Mapping[str, str]) -> str:
        columns = ", ".join(f"{members[name]} AS {name}" for name in sorted(members))
        return f"row_to_json((SELECT row FROM (SELECT {columns}) AS row))"  # noqa: S608

    @staticmethod
    def as_list(each: str) -> str:
        return f"COALESCE(array_to_json(array_agg({each})), '[]')"

    @staticmethod
    @lru_cache
    def text(statement: str) -> str:
        return re.sub(r"(?<!:):(\w+)", r"%(\1)s", statement.replace("%", "%%"))

    @staticmethod
    def adapt(values: Row) -> Row:
        return values

    def insert(self, table: str, rows: list[Row]) -> None:
        source = f"json_populate_recordset(NULL::{table}, :rows)"
        self.execute(f"INSERT INTO {table} SELECT * FROM {source}", rows=to_json(rows).decode())  # noqa: S608

    def update(self, table: str, columns: Sequence[str], rows: list[Row]) -> None:
        changes, key = ", ".join(f"{name} = new.{name}" for name in columns), PRIMARY_KEYS[table]
        source = f"json_populate_recordset(NULL::{table}, :rows) AS new"
        source = f"{source} WHERE {table}.{key} = new.{key}"
        self.execute(f"UPDATE {table} SET {changes} FROM {source}", rows=to_json(rows).decode())  # noqa: S608

    def limit(self, bound: str) -> None:
        self.bound = bound
        self.execute(f"SET statement_timeout = {int(1_000 * READ_SECONDS_MAX[bound])}")

    def pipeline(self) -> Any:
        return self.driver.pipeline()

    def interrupt(self) -> None:
        with suppress(OSError, psycopg.Error), socket.fromfd(self.driver.fileno(), -1, -1) as s:
            s.shutdown(socket.SHUT_RDWR)


Connection = SqliteConnection  # Either of them.


class Database:
    """Where a ledger is stored: connections that read, and one that writes."""

    inline = False  # Whether it is called on the event loop itself.
    is_open = False
    is_upgrading = False
    fault: LedgerError | None = None  # Of the last write, where the disk is to blame.
    news = ""  # What was done to it when it was opened.
    name: str  # What the operator knows it by, without any password.
    begin_read: str
    begin_write: str
    connect: Callable[..., SqliteConnection]  # Opens one that reads or, with `write=True`, writes.
    long_turn: Callable[..., Any] = nullcontext  # Waits for what a long read must wait for.
    log_warning: Callable[..., str] = str  # Tells of a log beside the ledger that grows.

    def __init__(self) -> None:
        self.make_threads()
        self._reading: defaultdict[str, list[SqliteConnection]] = defaultdict(list)
        self._writing: list[SqliteConnection] = []
        self._busy: set[SqliteConnection] = set()
        self._turn = threading.Lock()
        self.measure()

    def make_threads(self) -> None:
        """Make the places of threads, which begin when they are needed."""
        self.writer = ThreadPoolExecutor(1, "writer")
        self._readers = ThreadPoolExecutor(READERS_MAX, "reader")
        self._long_readers = ThreadPoolExecutor(LONG_READERS_MAX, "long-reader")
        self._key_reader = ThreadPoolExecutor(1, "key-reader")

    def measure(self) -> None:
        self.metrics = prometheus.CollectorRegistry()
        new: Any = {"registry": self.metrics}
        self.batches = prometheus.Summary("ledger_batch_commands", "Commands a batch", **new)
        commits = ("ledger_commit_seconds", "Seconds a commit")
        self.commits = prometheus.Histogram(*commits, buckets=SECONDS, **new)
        self.kinds = prometheus.Counter("ledger_transactions", "Posted, by kind", ["kind"], **new)
        gauge: Any = partial(prometheus.Gauge, **new)
        self.undelivered = gauge("ledger_undelivered_events", "Not received yet, up to 10,000")
        self.undelivered_age = gauge("ledger_undelivered_seconds", "Age of the oldest of them")
        self.behind = gauge("ledger_clock_behind_seconds", "This clock is behind another", ["of"])
        versions = {"version": __version__, "tables": str(SCHEMA_VERSION)}
        prometheus.Info("ledger", "The program and its tables", **new).info(versions)
        prometheus.ProcessCollector(**new)

    def require_present(self, *, to_write: bool) -> None:
        """Raise DatabaseLost where a write would go into nothing."""

    @contextmanager
    def kept(self, suffix: str) -> Iterator[str]:
        """Keep a copy of a file beside it, unless the block fails; give what is said of that."""
        yield ""

    def after_commit(self, rows_max: int = 0) -> None:
        """Do what is to be done now and then, or when so many rows were written."""

    @contextmanager
    def read(self, bound: str = "") -> Iterator[SqliteConnection]:
        """Open one consistent view of what is committed; `bound` is how long it may take."""
        turn = self.long_turn() if bound == "long" else nullcontext()
        with turn, self._lend(self._reading[bound], self.begin_read, bound) as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[SqliteConnection]:
        """Do one write: at its end all that the block did is committed, or nothing of it."""
        with self._turn:
            began = time.perf_counter()
            try:
                with self._lend(self._writing, self.begin_write) as connection:
                    connection.saved.clear()
                    if connection.mark:
                        connection.execute(connection.mark)
                    yield connection
            except DISK_FAULTS as error:
                self.fault = error
                raise
            self.fault = None
            try:
                self.commits.observe(time.perf_counter() - began)
                kinds = [e["kind"] for each in connection.saved.values() for e in each["event"]]
                for kind, count in Counter(filter(str.isupper, kinds)).items():
                    self.kinds.labels(kind).inc(count)
                self.after_commit()
            except Exception as error:
                log.warning("committed, but what follows failed: %s", error)

    async def run_read(
        self, function: Callable[..., T], *arguments: Any, long: bool = False, urgent: bool = False
    ) -> T:
        """Run a function of a connection, in a thread for a server or if it takes `long`.

        A read that turns out to be long is begun again as such. What is `urgent`, because every
        request needs it, waits for no other read.
        """

        def read(bound: str) -> T:
            with self.read(bound) as connection:
                return function(connection, *arguments)

        loop = asyncio.get_running_loop()
        if not long:
            with suppress(ReadTooLong):
                if self.inline:
                    return read("short")
                threads = self._key_reader if urgent else self._readers
                return await in_time(loop.run_in_executor(threads, read, "short"))
        reading = loop.run_in_executor(self._long_readers, read, "long")
        return await in_time(reading, REQUEST_SECONDS_MAX, DatabaseBusy)

    async def run_write(self, function: Callable[[Sequence[Any]], T], batch: Sequence[Any]) -> T:
        """Run a function that writes a batch: inline in a library, in a thread for a server."""
        self.batches.observe(len(batch))
        if self.inline:
            return function(batch)
        return await asyncio.get_running_loop().run_in_executor(self.writer, function, batch)

    def open(self, *, make: bool, older: bool = False) -> None:
        """Accept a ledger of this version, or an `older` one; with `make`, make what is missing."""
        try:
            # Looking first through a connection that only reads leaves a stranger's file alone.
            with self.read() as connection:
                version = stored_version(connection)
            if not version and (self.inline or not make):  # A new file is filled elsewhere.
                raise StartupError(f"{self.name} has no tables: restore it as a whole")
            if 0 < version < SCHEMA_VERSION and not older:
                if not (make and self.inline):
                    how = f"python ledger.py upgrade brings it to version {SCHEMA_VERSION}"
                    raise StartupError(f"{self.name} is a ledger of version {version}: {how}")
                if news := upgrade(self):
                    self.news = news
                    log.warning(news)
            if make:
                retry_while_busy(partial(complete_schema, self))
            self.is_open = True
        except (LedgerError, OSError, *DRIVER_ERRORS) as error:
            raise StartupError(f"cannot open {self.name}: {one_line(error)}") from error

    def close(self) -> None:
        """End the threads and close every connection; the next use opens new ones."""
        ended = threading.Event()
        threading.Thread(target=self._hang_up, args=(ended,), daemon=True).start()
        for threads in (self.writer, self._readers, self._long_readers, self._key_reader):
            threads.shutdown(cancel_futures=True)
        ended.set()
        self.disconnect()
        self.make_threads()
        self.is_open = False

    def _hang_up(self, ended: threading.Event) -> None:
        """End what threads still wait for, as a server that does not answer."""
        while not ended.wait(CLOSING_SECONDS_MAX):
            for connection in [*self._busy]:
                connection.interrupt()

    def disconnect(self) -> None:
        """Close the connections that are not in use; the next use opens new ones."""
        for connections in (*self._reading.values(), self._writing):
            while connections:
                connections.pop().driver.close()

    @contextmanager
    def _lend(self, idle: list[Connection], begin: str, bound: str = "") -> Iterator[Connection]:
        connection = None
        try:
            self.require_present(to_write=idle is self._writing)
            connection = idle.pop() if idle else self.connect(write=idle is self._writing)
            self._busy.add(connection)
            if bound:
                if connection.bound != bound:
                    connection.limit(bound)
                connection.steps = 0
                connection.deadline = time.monotonic() + READ_SECONDS_MAX[bound]
            with connection.pipeline():
                connection.execute(begin)
                yield connection
                connection.execute("COMMIT")
        except DRIVER_ERRORS as error:
            failure = translate_error(error)
            if isinstance(failure, DatabaseLost) and connection:
                # New connections may find a server that has taken over.
                connection.driver.close()
                self.disconnect()
            elif not isinstance(failure, DatabaseBusy):
                # The first line only: PostgreSQL's details have values of the row in them.
                log.error("the database refused: %s", str(error).partition("\n")[0])
            raise failure from error
        finally:
            if connection:
                self._take_back(connection, idle)

    def _take_back(self, connection: SqliteConnection, idle: list[SqliteConnection]) -> None:
        self._busy.remove(connection)
        try:
            connection.driver.rollback()
            idle.append(connection)
        except DRIVER_ERRORS:  # One that is lost cannot, and is not used again.
            connection.driver.close()


def translate_error(error: Any) -> LedgerError:
    """Return the ledger's error for one of a driver's."""
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        return KNOWN_ERRORS.get(code, DatabaseUnavailable)()
    is_rule = (error.sqlstate or "").startswith("23")
    known = KNOWN_ERRORS.get(error.sqlstate, InternalError if is_rule else DatabaseUnavailable)
    if error.sqlstate is None:
        is_lost = isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    else:
        is_fatal = error.diag.severity_nonlocalized in ("FATAL", "PANIC")
        is_lost = is_fatal or error.sqlstate.startswith(("08", "57"))
    # Of a lost connection nobody knows whether it committed: the key will tell.
    return DatabaseLost() if is_lost and not issubclass(known, DatabaseBusy) else known()


async def in_time(
    waiting: "asyncio.Future[T]", seconds: float = ANSWER_SECONDS_MAX, failure: Any = DatabaseLost
) -> T:
    """Return what is waited for, unless a database server says nothing at all for too long."""
    try:
        return await asyncio.wait_for(waiting, seconds)
    except TimeoutError:
        raise failure from None


def retry_while_busy(action: Callable[[], T]) -> T:
    """Repeat an action that finds the database busy, for some seconds, outside the event loop."""
    deadline = time.monotonic() + BUSY_SECONDS_MAX
    while True:
        try:
            return action()
        except DatabaseBusy:
            if time.monotonic() > deadline:
                raise
        time.sleep(BUSY_RETRY_SECONDS)


def database_at(url: str) -> Database:
    """Return the database that a URL names, or raise StartupError."""
    scheme = url.partition(":")[0]
    # The names of drivers are those of other programs: what they mean is the same.
    if re.fullmatch(r"(?i)postgres(ql)?(\+(psycopg2?|asyncpg))?", scheme):
        return PostgresDatabase(f"postgresql{url.removeprefix(scheme)}")
    return SqliteDatabase(url)


# The event loop may wait for the disk, but not for another program's lock, so the writer asks for
# that only once. No write needs temporary files. All page caches together stay under 16 MB.
WRITER_PRAGMAS = """PRAGMA busy_timeout = 0; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON;
    PRAGMA recursive_triggers = ON; PRAGMA cache_size = -12288; PRAGMA wal_autocheckpoint = 0;
    PRAGMA journal_size_limit = 67108864"""
READER_PRAGMAS = "PRAGMA busy_timeout = 1000; PRAGMA query_only = ON; PRAGMA cache_size = -1024"
# A table is made anew while others refer to it, which the check sees to, in files if it is large.
UPGRADE_PRAGMAS = """PRAGMA foreign_keys = OFF; PRAGMA legacy_alter_table = ON;
    PRAGMA temp_store = FILE"""
# A log that has grown beyond the limit above is cut as soon as it begins anew.
LOG_BYTES_MAX, LOG_SECONDS_MAX = 134_217_728, 2.0
HEADERS: dict[Any, int] = {}  # By a file's identity, where its header is read.
CHECKPOINT_ROWS = 6_000  # Some 25 MB of log in large batches, and 40 in batches of one.


class SqliteDatabase(Database):
    """One file, which one connection writes and a few others read."""

    inline = True
    begin_read, begin_write = "BEGIN", "BEGIN IMMEDIATE"

    def __init__(self, url: str) -> None:
        super().__init__()
        file = url.removeprefix("sqlite:///")
        if file == url or re.match(r":memory:|file:|.*[?\0]|$", file):
            raise StartupError("the database must be a plain file, such as sqlite:///ledger.db")
        self.path = Path(os.path.realpath(file))  # Behind a link, where SQLite keeps the log.
        self.name = str(self.path)
        self._uri = f"{self.path.as_uri()}?mode=rw"  # Which never makes a file.
        self._log, *_ = self._logs = [f"{self.path}-wal", f"{self.path}-journal"]
        self._watched = {str(Path(file).absolute()), self.name, self._log, f"{self.path}-shm"}
        self._opened: list[Any] = []
        self._rows_moved, self._looked_at = 0, 0.0
        self._alone = threading.Lock()
        self._checkpoint: Future[None] | None = None

    def measure(self) -> None:
        super().measure()
        size = ("ledger_log_bytes", "Size of the log beside the file")
        prometheus.Gauge(*size, registry=self.metrics).set_function(self._log_bytes)

    def connect(self, *, write: bool) -> SqliteConnection:
        driver = sqlite3.connect(self._uri, uri=True, isolation_level=None, check_same_thread=False)
        try:
            driver.executescript(WRITER_PRAGMAS if write else READER_PRAGMAS)
            # A new ledger is made without a log, so that it is one file when it gets its name.
            if write and driver.execute("PRAGMA page_count").fetchone()[0]:
                driver.executescript("PRAGMA journal_mode = WAL; PRAGMA temp_store = MEMORY")
            if self.is_upgrading:
                driver.executescript(UPGRADE_PRAGMAS)
        except sqlite3.Error:
            driver.close()
            raise
        return SqliteConnection(driver)

    def open(self, *, make: bool, older: bool = False) -> None:
        self._opened = []
        try:
            self.require_whole()
            self.path.parent.stat()
            for _ in range(100 if make else 0):  # Others may make it, or die meanwhile.
                if not self.path.exists():
                    with suppress(FileExistsError, FileNotFoundError), self.new() as new:
                        complete_schema(new)
        except OSError as error:
            raise StartupError(f"cannot open {self.path}: {error.strerror}") from None
        if not (make or os.path.exists(self._log) or os.access(self.path.parent, os.W_OK)):
            self._uri += "&immutable=1"  # SQLite can make no log; `require_present` sees others'.
        super().open(make=make, older=older)
        self._opened = self._identities()

    def require_whole(self) -> None:
        """Refuse what is left of a ledger, before SQLite opens it, which may destroy it."""
        # The log first, because another server may just give one to a ledger that was restored.
        logs = [log for log in self._logs if os.path.exists(log) and os.path.getsize(log)]
        size, links = 0, 0
        if self.path.is_dir():
            raise StartupError(f"cannot open {self.path}: Is a directory")
        with suppress(FileNotFoundError):
            size, links = self.path.stat().st_size, self.path.stat().st_nlink
        for rest in (*logs, *[self.path] * links) if not size else ():
            raise StartupError(f"{rest} is there without its ledger: restore that or remove this")
        if links > 1:
            raise StartupError(f"{self.path} is one of {links} links to a file: remove the others")
        if self._log in logs and not self._may_have_log():
            raise StartupError(f"{self._log} is not of this ledger, which has no log: remove it")

    def _may_have_log(self) -> bool:
        """Tell whether a file says that it has a log; a backup says that it has none."""
        identity = tuple(os.stat(self.path)[1:3])
        if identity not in HEADERS:
            # For ever, because to close it would end the locks of this process on this file.
            HEADERS[identity] = os.open(self.path, os.O_RDONLY)
        with open(HEADERS[identity], "rb", closefd=False) as file:
            file.seek(18)
            return file.read(2) == b"\2\2"

    @contextmanager
    def new(self) -> Iterator[Database]:
        """Lend an empty database, which becomes this one when it is whole."""
        self.require_whole()
        with new_file(self.path) as place, closing(SqliteDatabase(f"sqlite:///{place}")) as new:
            yield new

    def require_present(self, *, to_write: bool) -> None:
        """Raise DatabaseLost if other files have the names: the open ones end with us."""
        if not to_write and time.monotonic() < self._looked_at + LOOK_SECONDS:
            return  # It takes as long as a short read does.
        self._looked_at = time.monotonic()
        if self.is_open and self._opened and self._opened != self._identities():
            raise DatabaseLost("The database's files were moved or replaced: restart the server")

    def after_commit(self, rows_max: int = CHECKPOINT_ROWS) -> None:
        """Move committed pages into the file, in a thread, while the event loop goes on."""
        driver = self._writing[0].driver
        if self._checkpoint and self._checkpoint.done():
            self._checkpoint, self._rows_moved = None, driver.total_changes
            # The log begins anew only when what was committed meanwhile was moved, too.
            driver.execute("PRAGMA wal_checkpoint(PASSIVE)")
        elif not self._checkpoint and driver.total_changes - self._rows_moved > rows_max:
            mode = "TRUNCATE" if os.path.getsize(self._log) > LOG_BYTES_MAX else "PASSIVE"
            self._checkpoint = self.writer.submit(self.move_pages, mode)

    @contextmanager
    def long_turn(self) -> Iterator[None]:
        """Let a long read begin, where the log is large only alone, after a time without any.

        As long as somebody reads of it, the log cannot begin anew.
        """
        with self._alone if self._log_bytes() > LOG_BYTES_MAX else nullcontext():
            deadline = time.monotonic() + LOG_SECONDS_MAX
            while self._log_bytes() > LOG_BYTES_MAX and time.monotonic() < deadline:
                time.sleep(0.01)
            yield

    def log_warning(self) -> str:
        if self._log_bytes() <= 2 * LOG_BYTES_MAX:
            return ""
        why = "a program reads the ledger for long (see deploy/README.md, A log that grows)"
        return f"{self._log} has more than {2 * LOG_BYTES_MAX >> 20} MB: {why}"

    def _log_bytes(self) -> int:
        with suppress(OSError):
            return os.path.getsize(self._log)
        return 0

    def move_pages(self, mode: str) -> None:
        """Move pages without waiting for anybody: FULL moves all, TRUNCATE cuts the log then."""
        with closing(sqlite3.connect(self._uri, timeout=0, uri=True)) as driver:
            driver.execute("PRAGMA wal_checkpoint(PASSIVE)")
            if driver.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()[0]:
                raise DatabaseBusy

    @contextmanager
    def kept(self, suffix: str) -> Iterator[str]:
        for again in range(100):  # What is there already may be wanted.
            copied = Path(f"{self.path}{suffix}{f'.{again}' if again else ''}")
            if not os.path.lexists(copied):
                break
        self.copy_to(copied)
        try:
            yield f"; as it was before: {copied}"
        except BaseException:
            copied.unlink()
            raise

    def copy_to(self, file: Path) -> None:
        """Copy what is committed into a new file, while it is in use."""
        with closing(sqlite3.connect(self._uri, uri=True)) as db, new_file(file) as to:
            db.execute("VACUUM INTO ?", [str(to)])

    def _identities(self) -> list[Any]:
        try:
            return [os.stat(file)[1:3] for file in self._watched]
        except OSError:
            return [None]


@contextmanager
def new_file(file: Path) -> Iterator[Path]:
    """Lend a place for a new file, which gets its name when it is whole and on disk."""
    for left in file.parent.glob("*.ledger-unfinished/lock") if sys.platform != "win32" else ():
        with suppress(OSError), left.open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # Else somebody is at work.
            if os.path.samefile(left, lock.fileno()):
                shutil.rmtree(left.parent)
    folder = Path(f"{file}.ledger-unfinished")
    folder.mkdir(0o700, exist_ok=True)
    with open(folder / "lock", "ab") as lock:
        if sys.platform != "win32":
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.samefile(folder / "lock", lock.fileno()):
            raise FileExistsError(f"another program makes {file}")
        try:
            if os.path.lexists(file) or folder.is_symlink():
                raise FileExistsError(f"cannot make {file}: File exists")
            place = folder / file.name
            with open(place, "xb", opener=partial(os.open, mode=0o600)) as whole:
                yield place
                os.fsync(whole)
            place.replace(file)
            if sys.platform != "win32":
                os.fsync(names := os.open(file.parent, os.O_RDONLY))
                os.close(names)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# What a URL may say otherwise: a server that does not answer is given up within some seconds.
POSTGRES_DEFAULTS = """application_name=ledger.py connect_timeout=3 tcp_user_timeout=10000
    keepalives_idle=5 keepalives_interval=2 keepalives_count=3"""
# Tables are made in the first schema of the path, which must not be the catalog; and nothing is
# acknowledged that is not on disk, whatever the server's default is, now and later.
SESSION_SETTINGS = r"""SET lock_timeout = '5s'; SET idle_in_transaction_session_timeout = '60s';
    SELECT set_config('search_path', regexp_replace(current_setting('search_path'),
        '^(\s*"?pg_catalog"?\s*,)+', ''), false);
    SELECT set_config('synchronous_commit', CASE current_setting('synchronous_commit')
        WHEN 'remote_apply' THEN 'remote_apply' ELSE 'on' END, false)"""


class PostgresDatabase(Database):
    """One database of a PostgreSQL server, or of several of which one can be written to."""

    begin_read = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    begin_write = "BEGIN ISOLATION LEVEL READ COMMITTED"

    def __init__(self, url: str) -> None:
        super().__init__()
        try:
            given: Any = psycopg.conninfo.conninfo_to_dict(url)
        except psycopg.ProgrammingError as error:
            unknown = re.search('URI query parameter: ("[a-z_]+")', str(error))
            why = f": {unknown[1]} is unknown" if unknown else ""
            raise StartupError(
                f"the database must be like postgresql://user@host/name{why}; "
                "a schema is chosen by ?options=-csearch_path%3Dschema"
            ) from None
        self._conninfo = psycopg.conninfo.make_conninfo(POSTGRES_DEFAULTS, **given)
        self.name = f"{given.get('dbname', 'PostgreSQL')} at {given.get('host', 'localhost')}"
        if "@" in self.name:
            # It would be a part of the password, and be printed.
            raise StartupError("an @ in the database URL's password must be written as %40")

    def connect(self, *, write: bool) -> PostgresConnection:
        """Open a session, in which BEGIN and COMMIT are ours to send."""
        driver = psycopg.connect(self._conninfo, autocommit=True, client_encoding="utf8")
        if driver.info.parameter_status("server_encoding") != "UTF8":
            driver.close()
            raise StartupError(f"{self.name} must be made with the encoding UTF8")
        driver.execute(SESSION_SETTINGS)
        return PostgresConnection(driver)


# ----- Schema
# What keeps stored rows as they were written: tables, triggers, a version and the check.


class ApiKey(Stored, table=True):
    """A key that somebody may call with: its hash, and the prefix that is no secret."""

    __table_args__ = (sa.CheckConstraint("role IN ('auditor', 'service', 'admin')"), STRICT)

    name: str = Field(primary_key=True)
    prefix: str = Field(unique=True)
    hash: str
    role: str
    created_at: int
    revoked_at: int | None = None


class Webhook(Stored, table=True):
    """A receiver, the last event that it has had, and when it is its turn, which may be never."""

    id: str = Field(primary_key=True)
    url: str
    secret: str
    account_id: str | None = Field(default=None, foreign_key="account.id")
    position: str = Field(foreign_key="event.id")
    failures: int
    due_at: int | None
    last_error: str | None = None


class SchemaVersion(Stored, table=True):
    """The version of the tables, in one row, and how the database describes what was made."""

    version: int = Field(primary_key=True)
    description: str


PORTION_ROWS = 2_000
SYSTEM_STORED = "SELECT name, asset FROM account WHERE kind = 'SYSTEM'"
TABLES = {table.name: table for table in Stored.metadata.sorted_tables}
PRIMARY_KEYS = {name: table.primary_key.columns.keys()[0] for name, table in TABLES.items()}
INTEGER_64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
PLAIN_TEXT = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
for table in TABLES.values():
    for column in table.columns:
        # SQLModel's own choice is 32 bits on PostgreSQL, and no type of a strict SQLite table.
        column.type = INTEGER_64 if isinstance(column.type, sa.Integer) else PLAIN_TEXT

NO_CREDIT = """NEW.credit_limit > 0
            AND (SELECT closed_loop FROM asset WHERE code = NEW.asset) = 1"""
# Invariants 2, 3, 5 and 7 for both engines: of a table and a change, what is refused, and why. One
# trigger refuses several things, because to run it costs as much as what it asks.
REFUSED = {
    ("entry", "INSERT"): {
        "only an active account moves money": """
            (SELECT status FROM account WHERE id = NEW.account_id) <> 'ACTIVE'""",
        # IS NOT TRUE, because a missing predecessor makes the right-hand side NULL.
        "an entry must follow its predecessor in seq and balance": """
            (NEW.balance = CASE NEW.type WHEN 'CREDIT' THEN NEW.amount ELSE -NEW.amount END
            + CASE NEW.seq WHEN 1 THEN 0 ELSE (SELECT balance FROM entry
            WHERE account_id = NEW.account_id AND seq = NEW.seq - 1) END) IS NOT TRUE""",
    },
    ("account", "UPDATE"): {
        "an account must stand where its last entry leaves it": """
            (NEW.last_seq, NEW.balance) <> (OLD.last_seq, OLD.balance)
            AND ((NEW.last_seq, NEW.balance) = (SELECT seq, balance FROM entry
            WHERE account_id = NEW.id ORDER BY seq DESC LIMIT 1)) IS NOT TRUE""",
        "a closed account never comes back": "OLD.status = 'CLOSED' AND NEW.status <> 'CLOSED'",
        "only an active account moves money": """
            NEW.last_seq <> OLD.last_seq AND 'ACTIVE' NOT IN (OLD.status, NEW.status)""",
        "nobody owes what is issued": NO_CREDIT,
        "every client can read what a customer has": f"""
            NEW.balance NOT BETWEEN -{CUSTOMER_MAX} AND {CUSTOMER_MAX}
            AND abs(NEW.balance) > abs(OLD.balance) AND NEW.kind = 'CUSTOMER'""",
    },
    ("account", "INSERT"): {
        "an account opens empty": "(NEW.last_seq, NEW.balance) <> (0, 0)",
        "nobody owes what is issued": NO_CREDIT,
    },
    ("hold", "UPDATE"): {"a hold ends once": "OLD.status <> 'PENDING'"},
    ("scheduled_cashback", "UPDATE"): {
        "a cashback is credited once": """OLD.status = 'CANCELLED'
            OR (OLD.status = 'CREDITED' AND NEW.status <> 'CANCELLED')""",
    },
    ("event", "UPDATE"): {
        "what event holds is for ever": "OLD.answer <> NEW.answer OR OLD.key IS NULL"
    },
    ("api_key", "UPDATE"): {"a key is revoked once": "OLD.revoked_at IS NOT NULL"},
    ("webhook", "UPDATE"): {"a receiver ends once": "OLD.due_at IS NULL"},
}
# By name, when each trigger looks and what it refuses.
TRIGGERS = {
    f"{table}_at_{change.lower()}": (f"BEFORE {change} ON {table}", refused)
    for (table, change), refused in REFUSED.items()
}
for name in TABLES.keys() - {"note"}:
    fixed = [c.name for c in TABLES[name].columns if c.name not in CHANGEABLE.get(name, ())]
    never = {f"what {name} holds is for ever": "TRUE"}
    TRIGGERS[f"{name}_unchanged"] = (f"BEFORE UPDATE OF {', '.join(fixed)} ON {name}", never)
    TRIGGERS[f"{name}_kept"] = (f"BEFORE DELETE ON {name}", never)


def in_words(connection: SqliteConnection, made: Any) -> str:
    """Return the statement that makes something, in the engine's own words."""
    dialect = sa.make_url(f"{connection.engine}://").get_dialect()()
    return str(made.compile(dialect=dialect)).strip()


def create_tables(connection: SqliteConnection) -> None:
    """Make the tables and indexes that are not there."""
    for table in TABLES.values():
        made: list[Any] = [sa.schema.CreateTable(table, if_not_exists=True)]
        made += [sa.schema.CreateIndex(index, if_not_exists=True) for index in table.indexes]
        for each in made:
            connection.driver.execute(in_words(connection, each))


def create_triggers(connection: SqliteConnection, beside: set[str]) -> None:
    """Make the triggers, which refuse what they are told to; record what was made, of ours."""
    execute = connection.driver.execute
    for name, (moment, refused) in TRIGGERS.items():
        if connection.engine == "sqlite":
            cases = [f"WHEN {case} THEN RAISE(ABORT, '{why}')" for why, case in refused.items()]
            execute(f"CREATE TRIGGER {name} {moment} BEGIN SELECT CASE {' '.join(cases)} END; END")
            continue
        refusal = "IF %s THEN RAISE EXCEPTION '%s' USING ERRCODE = 'check_violation'; END IF;"
        refusals = [refusal % (case, why) for why, case in refused.items()]
        body = f"BEGIN {' '.join(refusals)} RETURN NEW; END"
        execute(f"CREATE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $${body}$$")
        execute(f"CREATE TRIGGER {name} {moment} FOR EACH ROW EXECUTE FUNCTION {name}()")
        if "BEFORE DELETE" in moment:
            whole = f"{moment.replace('DELETE', 'TRUNCATE')} EXECUTE FUNCTION {name}()"
            execute(f"CREATE TRIGGER {name}_whole {whole}")
    made = [row for row in connection.rows(connection.schema) if row["name"] not in beside]
    described = {"version": SCHEMA_VERSION, "description": json.dumps(made)}
    connection.insert("schema_version", [described])


FIRST_TABLES = TABLES.keys() - {"seal"}  # Of version 1, by whose absence an older ledger is known.


def stored_version(connection: SqliteConnection) -> int:
    """Return a ledger's version, 0 for an empty database, or raise StartupError."""
    found = {row["name"] for row in connection.rows(connection.tables)}
    if not found:
        return 0
    if not found.issuperset(("account", "entry", "schema_version")):
        raise StartupError("the database holds something other than a ledger")
    versions = [row["version"] for row in connection.rows("SELECT version FROM schema_version")]
    if not found.issuperset(FIRST_TABLES):
        lacking = ", ".join(sorted(FIRST_TABLES - found))
        why = f"it has no table {lacking}; only the ledger.py that made it reads it"
        raise StartupError(f"this is a ledger from before version 1: {why}")
    version = max(versions, default=0) * (len(versions) == 1)
    if version > SCHEMA_VERSION:
        known = f"this ledger.py, {__version__}, knows those until {SCHEMA_VERSION}"
        raise StartupError(f"this is a ledger of version {version}, and {known}: use a later one")
    if not version or (version == SCHEMA_VERSION and not found.issuperset(TABLES)):
        raise StartupError("this ledger has lost its version or a table: restore it from a backup")
    return version


def complete_schema(database: Database) -> None:
    """Make what is missing: all of a new ledger, or assets and system accounts that came later."""
    with database.write() as connection:
        connection.execute(connection.lock_schema)
        if not stored_version(connection):
            beside = {row["name"] for row in connection.rows(connection.schema)}
            create_tables(connection)
            create_triggers(connection, beside)
        open_known(connection)


def open_known(connection: SqliteConnection) -> None:
    """Add the known assets and system accounts that are missing."""
    known = {row["code"] for row in connection.rows("SELECT code FROM asset")}
    book = Book(connection)
    book.follow(connection.rows(NEWEST[0]))
    for code in ASSETS.keys() - known:
        book.insert("asset", dict(vars(ASSETS[code])))
    stored = {tuple(row.values()) for row in connection.rows(SYSTEM_STORED)}
    for name, code in sorted(SYSTEM_ACCOUNTS - stored):
        book.open("system", code, name, kind="SYSTEM")
    connection.save(book.inserts, book.updates)


# For each reference, the query that finds a row without the row that it refers to.
REFERENCES = [
    f"SELECT 'table {here.table}: a row refers to a missing row of {there.table}' AS wrong "  # noqa: S608
    f"FROM {here.table} WHERE {here} IS NOT NULL AND NOT EXISTS "
    f"(SELECT 1 FROM {there.table} AS referred WHERE referred.{there.name} = {here}) LIMIT 1"
    for here, there in [(k.parent, k.column) for t in TABLES.values() for k in t.foreign_keys]
]
# The credit limit of an entry's account at its time, and of an account now, as events have set it.
LIMIT_THEN = """COALESCE((SELECT credit_limit FROM event WHERE event.account_id = entry.account_id
    AND event.id < entry.transaction_id AND credit_limit IS NOT NULL
    ORDER BY event.id DESC LIMIT 1), 0)"""
LIMIT_NOW = LIMIT_THEN.replace("AND event.id < entry.transaction_id", "")
LIMIT_NOW = LIMIT_NOW.replace("entry.account_id", "account.id")
# Each rule with the rows that it is for, and the queries that find one that breaks it.
CHECKS = {
    "entries stand once, and leave no customer below a limit": (
        "entry",
        f"""SELECT 'account ' || account_id || ': entry ' || seq || ' leaves a customer at '
        || balance AS wrong FROM entry WHERE balance < 0 AND balance + {LIMIT_THEN} < 0
        AND (SELECT kind FROM account WHERE id = account_id) = 'CUSTOMER'""",  # noqa: S608
        """SELECT 'entry ' || id || ' stands twice' AS wrong FROM entry
        GROUP BY id HAVING count(*) > 1""",
    ),
    "accounts stand where their last entries leave them": (
        "account",
        """SELECT 'account ' || account.id || ': its row says ' || last_seq || ' entries and '
        || 'balance ' || account.balance || ', its entries say ' || COALESCE(seq, 0) || ' and '
        || COALESCE(entry.balance, 0) AS wrong FROM account LEFT JOIN entry ON account_id =
        account.id AND seq = (SELECT max(seq) FROM entry WHERE account_id = account.id)
        WHERE last_seq <> COALESCE(seq, 0) OR account.balance <> COALESCE(entry.balance, 0)""",
        f"""SELECT 'account ' || id || ' has a credit limit of ' || credit_limit || ', which no '
        || 'event has set' AS wrong FROM account WHERE credit_limit <> {LIMIT_NOW}""",  # noqa: S608
        f"""SELECT 'account ' || id || ' holds ' || held || ', its pending holds are '
        || pending AS wrong FROM (
            SELECT id, held, (SELECT COALESCE(SUM(amount), 0) FROM hold
            WHERE account_id = account.id AND {PENDING}) AS pending FROM account
        ) AS stood WHERE held <> pending""",  # noqa: S608
        """SELECT 'hold ' || id || ' has expired before its time' AS wrong FROM hold
        WHERE status = 'EXPIRED' AND expires_at > (SELECT max(ts) FROM event)""",
        """SELECT arguments || ' expired twice' AS wrong FROM event WHERE kind = 'expire'
        GROUP BY arguments HAVING count(*) > 1""",
        """SELECT 'hold ' || hold.id || ' was not captured as it says' AS wrong FROM hold
        LEFT JOIN event ON event.id = hold.transaction_id AND kind = 'CAPTURE'
        LEFT JOIN entry ON entry.transaction_id = event.id AND entry.account_id = hold.account_id
        WHERE status = 'CAPTURED' AND (entry.amount = captured_amount) IS NOT TRUE""",
    ),
    "reversals turn their transactions round, once": (
        "event WHERE kind = 'REVERSAL'",
        """SELECT 'reversal ' || later.id || ' does not turn ' || reverses || ' round' AS wrong
        FROM event AS later JOIN entry AS first ON first.transaction_id = reverses
        LEFT JOIN entry ON entry.transaction_id = later.id AND entry.account_id = first.account_id
        WHERE reverses IS NOT NULL
        AND (entry.amount = first.amount AND entry.type <> first.type) IS NOT TRUE""",
        *[
            f"SELECT '{column} ' || {column} || ' stands twice' AS wrong FROM {table} "  # noqa: S608
            f"WHERE {column} IS NOT NULL GROUP BY {column} HAVING count(*) > 1"
            for table, column in (
                ("event", "reverses"),
                ("event", "external_id"),
                ("account", "external_id"),
                ("hold", "external_id"),
            )
        ],
    ),
    "cashbacks are what was promised, and credited once": (
        "scheduled_cashback",
        """SELECT 'payment ' || id || ' has no cashback' AS wrong FROM event WHERE kind = 'PAYMENT'
        AND NOT EXISTS (SELECT 1 FROM scheduled_cashback WHERE payment_id = event.id)""",
        f"""SELECT 'payment ' || payment_id || ' promised ' || cashback.amount AS wrong
        FROM scheduled_cashback AS cashback LEFT JOIN event ON event.id = payment_id
        LEFT JOIN entry ON entry.transaction_id = payment_id AND type = 'DEBIT'
        WHERE (entry.account_id = cashback.account_id AND clock =
        CASE WHEN effective_at IS NULL THEN 'SERVER' ELSE 'CALLER' END AND
        cashback.amount = entry.amount * {CASHBACK_PERCENT} / 100) IS NOT TRUE""",  # noqa: S608
        f"""SELECT 'payment ' || payment_id || ' is due at another time' AS wrong
        FROM scheduled_cashback JOIN event ON event.id = payment_id
        WHERE due_at <> COALESCE(effective_at, ts) + {CASHBACK_DELAY}""",  # noqa: S608
        """SELECT 'payment ' || payment_id || ' is number ' || number AS wrong FROM (
            SELECT payment_id, number, row_number() OVER (ORDER BY payment_id) AS place
            FROM scheduled_cashback WHERE number IS NOT NULL OR clock = 'CALLER'
        ) AS numbered WHERE (number = place) IS NOT TRUE""",
        """SELECT 'payment ' || payment_id || ' is ' || status || ', its cashback is not' AS wrong
        FROM scheduled_cashback AS cashback LEFT JOIN event AS credit
        ON credit.id = cashback.transaction_id AND credit.kind = 'CASHBACK'
        LEFT JOIN entry ON entry.transaction_id = credit.id AND entry.account_id =
        cashback.account_id LEFT JOIN event AS later ON later.reverses = payment_id
        WHERE (status = 'CANCELLED') <> (later.id IS NOT NULL)
        OR (status <> 'CANCELLED' AND CASE status
        WHEN 'CREDITED' THEN COALESCE(entry.amount, -1) <> cashback.amount
        ELSE cashback.transaction_id IS NOT NULL END)""",
        """SELECT 'cashback ' || id || ' was not promised' AS wrong FROM event
        WHERE kind = 'CASHBACK' AND NOT EXISTS (SELECT 1 FROM scheduled_cashback
        WHERE payment_id = event.memo AND transaction_id = event.id)""",
    ),
    "ids are UUIDs, and what was refused says so": (
        "entry",
        "SELECT 'entry ' || id || ' has no UUID for its id' AS wrong FROM entry "
        "WHERE length(id) <> 36",  # Of so many, no more is looked at.
        *[
            f"SELECT '{table} ' || id || ' has no UUID for its id' AS wrong FROM {table} "  # noqa: S608
            "WHERE length(id) <> 36 OR trim(id, '0123456789abcdef-') <> ''"
            for table in ("account", "hold")
        ],
        """SELECT 'key ' || name || ' was refused otherwise' AS wrong FROM idempotency_key
        WHERE status >= 400 AND body NOT LIKE '%"status"_ ' || CAST(status AS text) || ',%'""",
    ),
}


def check(connection: SqliteConnection, seal: str = "") -> Iterator[tuple[str, int, list[str]]]:
    """Verify what stored rows can show: yield each rule, the rows it is for, and what is wrong."""
    show_progress("checking that pages, constraints and references are sound")
    damage = [row["wrong"] for query in REFERENCES for row in connection.rows(query)]
    if connection.engine == "sqlite":
        [found] = connection.rows("PRAGMA integrity_check(1)")
        damage += [text for text in found.values() if text != "ok"]
    yield "pages, constraints and references are sound", len(TABLES), damage
    for rule, (counted, *findings) in CHECKS.items():
        show_progress(f"checking that {rule}")
        wrong = [row["wrong"] for query in findings for row in connection.rows(f"{query} LIMIT 1")]
        [total] = connection.rows(f"SELECT count(*) AS n FROM {counted}")  # noqa: S608
        yield rule, total["n"], wrong
    yield from check_history(connection, seal)
    rows = connection.rows("SELECT code, name, exponent, closed_loop FROM asset")
    added = connection.rows("SELECT arguments FROM event WHERE kind = 'add_asset'")
    told = [parse_details(row["arguments"]).get("body", {}) for row in added]
    assets = {tuple(row.values()) for row in rows}
    known = {tuple(asset.values()) for asset in [*map(vars, ASSETS.values()), *told]}
    needed = SYSTEM_ACCOUNTS | system_accounts(AssetPublic.of(row) for row in rows)
    stored = {tuple(row.values()) for row in connection.rows(SYSTEM_STORED)}
    # As text, because a stranger may have no name.
    differing = sorted(map(str, (assets ^ known) | (stored ^ needed)))
    strange = [f"asset or system account {one}" for one in differing]
    yield "assets and system accounts are the known ones", len(assets | stored), strange
    made, *others = connection.rows("SELECT description FROM schema_version")
    then, now = json.loads(made["description"]), connection.rows(connection.schema)
    beside = others_of(connection)
    changed = [r for r in now + then if (r in now) != (r in then) and r["name"] not in beside]
    differing = sorted({f"{row['name']} is not as it was made" for row in changed})
    differing += ["there is a second row of schema_version" for _ in others]
    yield "tables and triggers are as they were made", len(then), differing


def others_of(connection: SqliteConnection) -> set[str]:
    """Return what others have put beside the ledger; a trigger on a table of ours is not beside."""
    triggers = connection.rows(connection.triggers)
    return beside_of(connection) - {row["name"] for row in triggers if row["place"] in TABLES}


def beside_of(connection: SqliteConnection) -> set[str]:
    """Return the names in the database that are none of what was made."""
    [made, *_] = connection.rows("SELECT description FROM schema_version")
    ours = {row["name"] for row in json.loads(made["description"])}
    return {row["name"] for row in connection.rows(connection.schema)} - ours


def show_progress(doing: str = "") -> None:
    """Say on a terminal what is being done, until something else is said."""
    if sys.stderr.isatty():
        print(f"\33[K{doing}", end="\r", file=sys.stderr)


def portions(books: Connection, table: str, brought: Row | None = None) -> Iterator[list[Row]]:
    """Return all rows of a table in the order of its key, some at a time.

    What later versions `brought` to the rows of an earlier one is SQL over these.
    """
    keys = [column.name for column in TABLES[table].primary_key]
    order, after = ", ".join(keys), ", ".join(f":{key}" for key in keys)
    values = {column.name: column.name for column in TABLES[table].columns} | (brought or {})
    shown = ", ".join(f"{value} AS {name}" for name, value in values.items())
    source = f"SELECT * FROM (SELECT {shown} FROM {table}) AS rows_of_today"  # noqa: S608
    query, position, count = source, Row(), 0
    while rows := books.rows(f"{query} ORDER BY {order} LIMIT {PORTION_ROWS}", **position):
        yield rows
        count += len(rows)
        show_progress(f"{table}: {count:,} rows")
        query = f"{source} WHERE ({order}) > ({after})"
        position = {key: rows[-1][key] for key in keys}
    show_progress()


# ----- Seals
# What happened as lines that never change, the hashes over them, and whether all rows say the same.

SEAL_EVENTS, SEAL_EVENTS_MAX, AFTER_ALL = 1_000, 5_000, "~"
NO_SEAL: Row = {"id": 0, "ts": 0, "until": "", "events": 0, "hash": "0" * 64}
NEWEST_SEAL = "SELECT * FROM seal ORDER BY id DESC LIMIT 1"
# What a line has; a member that a later version adds stands where it is something, and else not,
# so that no line of an older one ever changes.
LINE_MEMBERS = {
    "account_id", "answer", "arguments", "caller", "credit_limit", "effective_at", "external_id",
    "id", "key", "kind", "memo", "notes", "reverses", "ts",
}  # fmt: skip
# What is posted, in its order: a customer's account has no name here.
SHAPES = {
    "DEPOSIT": r"-cash \+", "WITHDRAWAL": r"- \+cash", "TRANSFER": r"- \+", "CAPTURE": r"- \+",
    "PAYMENT": r"- \+(merchants|payments)", "CASHBACK": r"-cashback \+", "TOP_UP": r"-treasury \+",
    "BONUS": r"-treasury \+", "SPEND": r"\+treasury -", "JOURNAL": "[-+]( [-+])+", "REVERSAL": ".+",
}  # fmt: skip
# What arguments call accounts by, in the order of the entries.
ACCOUNT_ARGUMENTS = (
    "source_account_id", "account_id", "number", "user", "dest_account_id", "target_account_id",
)  # fmt: skip
BECOMES = {"freeze": "FROZEN", "unfreeze": "ACTIVE", "close": "CLOSED"}
ID_AHEAD_MAX, ACCOUNTS_KEPT = 60_000_000, 20_000
# What stands before the entries of some transactions.
BEFORE_THESE = """SELECT here.account_id, here.transaction_id, before.seq, before.balance
    FROM entry AS here JOIN entry AS before ON before.account_id = here.account_id
    AND before.seq = here.seq - 1 AND before.transaction_id < here.transaction_id
    WHERE here.transaction_id = ANY(:ids)"""
MADE_HOLDS = """SELECT event.id AS event_id, hold.* FROM event JOIN hold ON hold.id =
    (SELECT max(id) FROM hold AS made WHERE account_id = event.account_id AND made.id < event.id)
    WHERE event.id = ANY(:ids)"""
OF_ACCOUNTS = f"SELECT * FROM event WHERE account_id = ANY(:ids) AND {NO_ENTRIES} ORDER BY id"  # noqa: S608
# Of many transfers none may have been possible. Keys from before events knew them are left out, and
# so are later ones of the same microsecond, which is one for long where a clock is behind.
DONE_KEYS = """FROM idempotency_key WHERE status < 400 AND ts > :since
    AND body NOT LIKE '{"succeeded"_0,%'"""
NOT_DONE = f"SELECT name {DONE_KEYS} EXCEPT SELECT key FROM event LIMIT 1"  # noqa: S608
HOLDS_BY_STATUS = "SELECT status, count(*) AS n FROM hold GROUP BY status"


def read_lines(connection: SqliteConnection, after: str, until: str, limit: int) -> list[Row]:
    """Return some events in their order: the id, the time and the line of each."""
    members = {name: name for name in {*TABLES["entry"].columns.keys()} if name != "transaction_id"}
    entries = "(SELECT * FROM entry WHERE transaction_id = event.id ORDER BY id) AS entry"
    listed = connection.as_list(connection.as_object(members))
    columns = {name: name for name in {*TABLES["event"].columns.keys()}}
    columns["entries"] = f"(SELECT {listed} FROM {entries})"  # noqa: S608
    query = f"""SELECT id, ts, CAST({connection.as_object(columns)} AS text) AS line FROM event
        WHERE id > :after AND id <= :until ORDER BY id LIMIT :limit"""  # noqa: S608
    rows = connection.rows(query, after=after, until=until, limit=limit)
    for row, name in product(rows, {*TABLES["event"].columns.keys()} - LINE_MEMBERS):
        # No text looks like this, because in JSON it has no quote of its own.
        row["line"] = row["line"].replace(f'"{name}":null,', "")
    return rows


def parse_lines(lines: list[Row]) -> list[Row]:
    """Return the events that lines tell of, with their entries."""
    text = ",".join([row["line"] for row in lines])
    events: list[Row] = from_json(f"[{text}]", cache_strings="keys")
    return events


def next_seal(before: Row, lines: list[Row]) -> Row:
    """Return the seal of some lines, which follows another one."""
    sealed = "\n".join([before["hash"], *(row["line"] for row in lines), ""])
    seal = {"id": before["id"] + 1, "ts": lines[-1]["ts"], "until": lines[-1]["id"]}
    seal["events"] = before["events"] + len(lines)
    return seal | {"hash": sha256(sealed)}


def new_seal(connection: SqliteConnection, until: str = AFTER_ALL) -> Row | None:
    """Return the seal of what is not sealed until an event, of the first of it where it is much."""
    [before] = connection.rows(NEWEST_SEAL) or [NO_SEAL]
    lines = read_lines(connection, before["until"], until, SEAL_EVENTS)
    return next_seal(before, lines) if lines else None


def seal_all(connection: SqliteConnection) -> None:
    """Seal everything, from the beginning on."""
    while seal := new_seal(connection):
        connection.insert("seal", [seal])


async def seal_events(ledger: Ledger) -> None:
    """Seal what is new and settled, unless another server does."""
    until = await newest_settled(ledger.database)

    def read() -> Row | None:
        with ledger.database.read() as connection:
            return new_seal(connection, until)

    def add(book: Book, seal: Row) -> None:
        [newest] = book.ask(NEWEST_SEAL) or [NO_SEAL]
        if newest["id"] + 1 == seal["id"]:
            book.insert("seal", seal)

    # In a thread on both engines, while callers are served.
    threads = ledger.database._readers
    while seal := await asyncio.get_running_loop().run_in_executor(threads, read):
        await ledger.submit(Command("system", "{}", partial(add, seal=seal)))


def check_history(connection: SqliteConnection, known: str) -> Iterator[tuple[str, int, list[str]]]:
    """Verify that the seals are those of the events, and that all rows are what these tell.

    `known` is the hash of a seal that was kept elsewhere, or nothing.
    """
    history, sealed, position = History(connection), Chain(connection, known), ""
    while lines := read_lines(connection, position, AFTER_ALL, PORTION_ROWS):
        position = lines[-1]["id"]
        sealed.take(lines)
        history.take(parse_lines(lines))
        show_progress(f"event: {history.events:,} rows")
    while sealed.seal:  # Of events that are gone.
        sealed.compare(sealed.seal)
    yield "seals are those of the events, in their order", sealed.before["id"], sealed.wrong
    if known:
        gone = f"no seal has this hash: what is after event {sealed.end} at least is not here"
        yield "what the given seal covers is here", 1, sealed.wrong or [gone] * (not sealed.found)
    for accounts in portions(connection, "account"):
        history.take_accounts(accounts)
    history.end()
    yield "rows are what the events tell", history.events, history.wrong


@dataclass(slots=True)
class Stood:
    """An account as it was left: what it is, what events may call it, and its last entry."""

    asset: str = ""
    side: str = "nobody"  # The name of the system's; a customer's has none here.
    names: Container[str] = ()
    seq: int = 0
    balance: int = 0

    def take(self, entry: Row, change: int) -> str:
        """Go on to the next entry, and say if another one should be there."""
        expected, found = (self.seq + 1, self.balance + change), (entry["seq"], entry["balance"])
        self.seq, self.balance = found
        if found == expected:
            return ""
        entries = [f"entry {seq} with balance {balance}" for seq, balance in (found, expected)]
        return f"{entries[0]} stands where {entries[1]} should be"


class Chain:
    """All seals in their order, each compared with the lines that it covers."""

    def __init__(self, connection: SqliteConnection, known: str) -> None:
        self.seals = chain.from_iterable(portions(connection, "seal"))
        self.seal, self.before, self.lines = next(self.seals, None), NO_SEAL, list[Row]()
        self.known, self.found, self.end = known, False, "(none)"
        self.wrong: list[str] = []

    def take(self, lines: list[Row]) -> None:
        """Compare the seals that end among some lines, which follow those taken before."""
        self.lines += lines
        while (seal := self.seal) and self.lines:
            if self.lines[-1]["id"] < seal["until"] and len(self.lines) <= SEAL_EVENTS_MAX:
                return
            self.compare(seal)
        self.lines = []

    def compare(self, seal: Row) -> None:
        """Compare the next seal with the lines that it covers."""
        count = bisect_right(self.lines, seal["until"], key=itemgetter("id"))
        covered, self.lines = self.lines[:count], self.lines[count:]
        if not (covered and next_seal(self.before, covered) == seal):
            first = covered[0]["id"] if covered else self.before["until"]
            self.wrong.append(f"seal {seal['id']} is not of what happened from event {first} on")
        elif not self.wrong:
            self.end, self.found = seal["until"], self.found or seal["hash"] == self.known
        self.before, self.seal = seal, next(self.seals, None)


class History:
    """What the events tell, some at a time, and which rows say otherwise."""

    def __init__(self, connection: SqliteConnection) -> None:
        self.connection, self.wrong = connection, list[str]()
        self.events, self.ts, self.counts = 0, 0, Counter[str]()
        self.since = TIME_MAX  # Before events knew their keys.
        self.keys_done, self.keys_named = 0, set[str]()
        self.keys: dict[str, Row] = {}
        self.accounts: dict[str, Stood] = {}

    def find(self, table: str, ids: Iterable[str | None]) -> dict[str, Row]:
        """Return the rows of a table that have these keys."""
        key, among = PRIMARY_KEYS[table], [*{*ids} - {None}]
        query = f"SELECT * FROM {table} WHERE {key} = ANY(:ids)"  # noqa: S608
        return {row[key]: row for row in self.connection.rows(query, ids=among)} if among else {}

    def judge(self, what: str, rules: Mapping[str, object]) -> None:
        """Note each rule that does not hold, called by what is wrong then."""
        self.wrong += [f"{what} {rule}" for rule, holds in rules.items() if not holds]

    def take(self, events: list[Row]) -> None:
        """Compare some events with their entries, answers and holds."""
        for event in events:
            event["told"] = parse_told(event["arguments"])
        self.find_accounts(events)
        holds, answers = self.find_holds(events), self.find_answers(events)
        self.take_metadata(events)
        for event in events:
            kind, is_transaction = event["kind"], event["kind"].isupper()
            rules = self.of_time_and_caller(event)
            if event["entries"] or is_transaction:
                rules |= of_entries(event, self.accounts)
            if event["key"] is not None:
                rules |= of_answer(event, answers.get(event["key"]))
            if kind in ("hold", "void", "expire", "CAPTURE"):
                rules |= of_hold(event, holds.get(event["told"].get("hold_id", event["id"]), {}))
            if not all(rules.values()):
                self.judge(f"{'transaction' if is_transaction else 'event'} {event['id']}", rules)
        # Those of one command, which have one key, follow each other.
        named = {event["key"] for event in events if event["ts"] > self.since} - {None}
        self.keys_done += len(named - self.keys_named)
        self.keys_named = named

    def find_accounts(self, events: list[Row]) -> None:
        """Have the accounts of some entries at hand, each as it was left before these."""
        if len(self.accounts) > ACCOUNTS_KEPT:
            self.accounts.clear()
        first: dict[str, str] = {}
        for event in events:
            for entry in event["entries"]:
                if entry["account_id"] not in self.accounts:
                    self.accounts[entry["account_id"]] = Stood()
                    first[entry["account_id"]] = event["id"]
        for account in self.find("account", first).values():
            stood = self.accounts[account["id"]]
            stood.asset, name = account["asset"], account["name"] or ""
            stood.side = name if account["kind"] == "SYSTEM" else ""
            known_as = unicodedata.normalize("NFC", name).partition(":")[2]
            stood.names = {account["id"], known_as}
        ids = [*{*first.values()}]
        for row in self.connection.rows(BEFORE_THESE, ids=ids) if ids else ():
            if first.get(row["account_id"]) == row["transaction_id"]:
                stood = self.accounts[row["account_id"]]
                stood.seq, stood.balance = row["seq"], row["balance"]

    def find_holds(self, events: list[Row]) -> dict[str, Row]:
        """Return the holds of some events, by their ids or by the events that made them."""
        holds = self.find("hold", (event["told"].get("hold_id") for event in events))
        made = [event["id"] for event in events if event["kind"] == "hold"]
        rows = self.connection.rows(MADE_HOLDS, ids=made) if made else []
        return holds | {row["event_id"]: row for row in rows}

    def find_answers(self, events: list[Row]) -> dict[str, Row]:
        """Return what the keys of some events have stored, with the hash of the answer."""
        answers = self.find("idempotency_key", (event["key"] for event in events))
        for stored in answers.values():
            stored["answer"] = Answer(stored["status"], stored["body"], stored["location"]).hash()
        return answers

    def of_time_and_caller(self, event: Row) -> Row:
        """Return whether times rise, and callers' keys were there."""
        told, ts, kind, self.events = event["told"], event["ts"], event["kind"], self.events + 1
        self.counts[kind] += 1
        if event["key"] is not None:
            self.since = min(self.since, self.ts)
        # Two servers of PostgreSQL may commit in another order than they have begun.
        rises = ts >= self.ts - (0 if self.connection.engine == "sqlite" else 100_000)
        self.ts = max(self.ts, ts)
        if kind == "add_key":
            self.keys[str(told.get("name"))] = {**told, "created_at": ts, "revoked_at": None}
        if kind == "revoke_key":
            self.keys.setdefault(str(told.get("name")), {})["revoked_at"] = ts
        key, drawn_at = event["caller"].removeprefix("key:"), id_drawn_at(event["id"])
        return {
            "has no UUID for its id": drawn_at,
            f"is a {kind}": kind in SHAPES or kind in EVENT_TYPES,
            "has a time that does not rise with the ids": rises
            and 0 <= drawn_at - ts < ID_AHEAD_MAX,
            "has arguments that are no JSON": "damaged" not in told,
            "is of a key that nobody added": key == event["caller"] or key in self.keys,
        }

    def take_accounts(self, accounts: list[Row]) -> None:
        """Compare some accounts with the events that opened and changed them."""
        told: dict[str, Row] = {account["id"]: {"status": "ACTIVE"} for account in accounts}
        for event in self.connection.rows(OF_ACCOUNTS, ids=[*told]):
            now, kind = told[event["account_id"]], event["kind"]
            if kind in ("open_account", "open_wallets", "update_account"):
                now |= {"created_at": event["ts"]} | now | parse_told(event["arguments"])
            now["status"] = BECOMES.get(kind, now["status"])
        self.take_metadata(accounts)
        for account in accounts:
            now, owner = told[account["id"]], (account["name"] or "").partition(":")[2]
            now["owner_name"] = now.get("owner_name", owner)
            is_system, texts = account["kind"] == "SYSTEM", ("owner_name", "external_id")
            rules = {
                "was never opened": "created_at" in now or owner,
                f"is {account['status']}, but became {now['status']}": account["status"]
                == now["status"],
                "is of another owner, or has other notes, than its events say": (
                    len(now) < 4 or is_told(account, now, "created_at", *texts)
                ),
            }
            self.judge(f"account {account['id']}", {} if is_system else rules)

    def take_metadata(self, rows: list[Row]) -> None:
        """Compare the metadata of some rows with its index."""
        told = {
            (name, value, row["id"])
            for row in rows
            if row.get("notes")
            for name, value in from_json(row["notes"]).items()
        }
        self.counts["notes"] += len(told)
        query, ids = "SELECT * FROM note WHERE owner_id = ANY(:ids)", {owner for *_, owner in told}
        notes = self.connection.rows(query, ids=[*ids]) if ids else []
        indexed = {(note["name"], note["value"], note["owner_id"]) for note in notes}
        self.judge("the metadata of", {f"{one[2]} is not indexed": 0 for one in told ^ indexed})

    def end(self) -> None:
        """Look for rows that no event tells of."""
        rows, counts = self.connection.rows, self.counts
        for key in rows("SELECT * FROM api_key"):
            added = {"hash": key["hash"]} | self.keys.pop(key["name"], {})
            self.judge(f"key {key['name']!r}", {"is not as its events say": added == key})
        self.judge("key", {f"{name!r} is not as its events say": 0 for name in self.keys})
        stored = {row["status"]: row["n"] for row in rows(HOLDS_BY_STATUS)}
        found = [sum(stored.values()), stored.get("CAPTURED", 0), stored.get("VOIDED", 0)]
        told = [counts[kind] for kind in ("hold", "CAPTURE", "void")]
        self.judge("of holds,", {"there are others than events tell of": found == told})
        [notes] = rows("SELECT count(*) AS n FROM note")
        self.judge("of metadata,", {"more is indexed than there is": notes["n"] == counts["notes"]})
        [keys] = rows(f"SELECT count(*) AS n {DONE_KEYS}", since=self.since)
        for key in rows(NOT_DONE, since=self.since) if keys["n"] != self.keys_done else ():
            self.judge(f"key {key['name']}", {"has an answer to what was not done": False})


def parse_told(text: str) -> Row:
    """Return the members of JSON, those of a body among them, in NFC as names are kept."""
    try:
        told = from_json(unicodedata.normalize("NFC", text))
        return {**told, **told["body"]} if "body" in told else told | {}
    except (ValueError, TypeError):
        return {"damaged": text}


def is_told(row: Row, told: Row, *names: str) -> bool:
    """Tell whether columns of a row are what was told, and nothing where nothing was."""
    notes = parse_told(row["notes"]) if row.get("notes") else {}
    if notes != told.get("metadata", {}):
        return False
    for name in names:
        found, given = row.get(name), told.get(name)
        if found != given and unicodedata.normalize("NFC", str(found)) != given:
            return False
    return True


def id_drawn_at(event_id: str) -> int:
    """Return the time at which an id was drawn, or soon before, and 0 for what is none."""
    try:
        return -(-time_of_id(event_id) * 1_000 // 4_096)
    except DatabaseUnavailable:
        return 0


@lru_cache(maxsize=1_000)
def is_shape(kind: str, posted: str) -> bool:
    """Tell whether a kind of transaction is posted so."""
    return bool(re.fullmatch(SHAPES.get(kind, ""), posted.strip()))


def of_entries(event: Row, accounts: Mapping[str, Stood]) -> dict[str, object]:
    """Return whether entries are what the kind says, and what was asked for."""
    kind, told, entries, posted = event["kind"], event["told"], event["entries"], ""
    sums: Row = {}
    amounts: set[int] = set()
    customers: list[Container[str]] = []
    rules: dict[str, object] = {}
    for entry in entries:
        account, amount = accounts[entry["account_id"]], entry["amount"]
        is_credit = entry["type"] == "CREDIT"
        change = amount if is_credit else -amount
        posted += f" +{account.side}" if is_credit else f" -{account.side}"
        sums[account.asset] = sums.get(account.asset, 0) + change
        amounts.add(amount)
        if not account.side:
            customers.append(account.names)
        if wrong := account.take(entry, change):
            rules[f"is not next in account {entry['account_id']}: {wrong}"] = False
    named = [told[name] for name in ACCOUNT_ARGUMENTS if name in told]
    rules |= {
        "has no entries": entries,
        "is not of this kind by its entries": is_shape(kind, posted),
        "is about another account": customers and event["account_id"] in customers[0],
        "moves another amount than was asked for": told.get("amount") is None
        or amounts == {told["amount"]},
        "moves it between others than was asked for": not named
        or (len(named) == len(customers) and all(map(contains, customers, named))),
    }
    if any(sums.values()):
        rules[f"sums to {' '.join(f'{total} {asset}' for asset, total in sums.items())}"] = False
    if kind == "JOURNAL" and told:
        listed = [{name: e[name] for name in ("account_id", "type", "amount")} for e in entries]
        rules["has other entries than were asked for"] = told.get("entries") == listed
    if kind not in ("CAPTURE", "CASHBACK") and ("amount" in told or "body" in told):
        rules["has another text than was given"] = is_told(event, told, "memo", "external_id")
        time_given = told.get("timestamp")
        rules["has another effective time than was given"] = (
            time_given is None or event["effective_at"] == time_given * 1_000
        )
    return rules


def of_answer(event: Row, stored: Row | None) -> dict[str, object]:
    """Return whether the answer that a key has is the one that was given."""
    if stored is None:
        return {"was done under a key that is gone": False}
    # What one of many events tells of is a part of what was asked, or more.
    is_part = "|POST /transfers/bulk|" in event["key"] or "|PATCH /" in event["key"]
    return {
        "was answered otherwise than its key says": stored["answer"] == event["answer"],
        "has another time than its key": stored["ts"] == event["ts"],
        "is not what its key was used for": is_part
        or stored["fingerprint"] == sha256(event["arguments"]),
    }


def of_hold(event: Row, hold: Row) -> dict[str, object]:
    """Return whether a hold is what an event has made of it."""
    kind, told = event["kind"], event["told"]
    if kind == "hold" and "expires_in" in told:
        expires_at = event["ts"] + told["expires_in"] * 1_000_000
        told = told | {"created_at": event["ts"], "expires_at": expires_at}
        names = ("account_id", "dest_account_id", "amount", "created_at", "expires_at")
        same = is_told(hold, told, *names, "memo", "external_id")
        return {"tells of another hold than there is": same}
    if status := {"void": "VOIDED", "expire": "EXPIRED"}.get(kind):
        return {f"tells of a hold that is not {status}": hold.get("status") == status}
    if kind == "CAPTURE" and told:
        ends = {hold.get("account_id"), hold.get("dest_account_id")}
        moved = {(entry["account_id"], entry["amount"]) for entry in event["entries"]}
        same = moved == {(end, hold.get("captured_amount")) for end in ends}
        same = same and hold.get("transaction_id") == event["id"]
        return {"tells of a hold that was not captured so": same}
    return {}


# ----- Upgrades
# How a ledger of an earlier version becomes one of today's, which is in nothing but its rows
# another one than a new ledger.

# The columns that each version brought, by table, as SQL over the rows before: a column's name in
# small letters, or a constant. Tables, indexes and rules that it brought need no word here: they
# are made as they are declared.
BROUGHT: dict[int, dict[str, dict[str, str]]] = {
    # The name of a key changed so that no program of version 1 can commit anything to version 2.
    2: {"idempotency_key": {"name": "id"}, "webhook": {"last_error": "NULL"}},
    3: {"account": {"credit_limit": "0"}, "event": {"credit_limit": "NULL"}},
    4: {"event": {"key": "NULL", "answer": "NULL"}},
}


IN_NFC = """UPDATE account SET owner_name = :owner_name, name = CASE WHEN EXISTS (
    SELECT 1 FROM account AS other WHERE other.name = :name AND other.asset = :asset)
    THEN name ELSE :name END WHERE id = :id"""


def keep_names_in_nfc(connection: SqliteConnection) -> None:
    """Bring names and owners into Unicode's NFC, but no name into that of another account."""
    for row in chain.from_iterable(portions(connection, "account")):
        texts = {name: row[name] for name in ("name", "owner_name") if row[name]}
        kept = {name: unicodedata.normalize("NFC", text) for name, text in texts.items()}
        if kept != texts:
            connection.execute(IN_NFC, **row | kept)


# What else a version does to the rows, after that.
STEPS: dict[int, Callable[[Any], None]] = {3: keep_names_in_nfc, 4: seal_all}


def brought_since(version: int) -> dict[str, dict[str, str]]:
    """Return the columns, by table, that a ledger of a version lacks."""
    since: defaultdict[str, dict[str, str]] = defaultdict(dict)
    for later in range(version + 1, SCHEMA_VERSION + 1):
        for table, columns in BROUGHT.get(later, {}).items():
            since[table] |= columns
    return since


def upgrade(database: Database) -> str:
    """Bring a ledger to this version in one write, a file after a copy, and say what was done."""
    database.is_upgrading = True
    try:
        return retry_while_busy(partial(upgrade_at_once, database))
    finally:
        database.is_upgrading = False
        database.disconnect()


def upgrade_at_once(database: Database) -> str:
    """Do all steps, or none where `check` finds anything wrong after them."""
    with database.write() as connection:
        connection.execute(connection.lock_schema)
        version = stored_version(connection)
        if version == SCHEMA_VERSION:
            return ""  # Another start was first.
        with database.kept(f".version-{version}") as kept:
            beside = beside_of(connection)
            [made] = connection.rows("SELECT description FROM schema_version")
            for name in sorted({row["name"] for row in json.loads(made["description"])}):
                if re.search("_(at_insert|at_update|unchanged|kept)$", name):
                    connection.execute(connection.drop_trigger.format(name))
            reshape(connection, brought_since(version))
            finish(connection, version, beside)
    return f"{database.name} was upgraded from version {version} to {SCHEMA_VERSION}{kept}"


def finish(connection: SqliteConnection, version: int, beside: set[str]) -> None:
    """Do what versions after one do to its rows, make triggers, and check the whole."""
    for later in range(version + 1, SCHEMA_VERSION + 1):
        STEPS.get(later, lambda _: None)(connection)
    connection.execute("DELETE FROM schema_version")
    create_triggers(connection, beside)
    open_known(connection)
    for _, _, wrong in check(connection):
        if wrong:
            raise StartupError(f"nothing was done: {wrong[0]}")


def reshape(connection: SqliteConnection, brought: Mapping[str, Mapping[str, str]]) -> None:
    """Give all tables the shape that they have today."""
    stored = {row["name"] for row in connection.rows(connection.tables)}
    change = make_anew if connection.engine == "sqlite" else alter
    for name in [name for name in TABLES if name in stored]:
        show_progress(f"upgrading {name}")
        change(connection, TABLES[name], brought[name])
    create_tables(connection)


def make_anew(connection: SqliteConnection, table: sa.Table, brought: Mapping[str, str]) -> None:
    """Give a table of SQLite the columns and rules that it has today."""
    execute, make = connection.driver.execute, in_words(connection, sa.schema.CreateTable(table))
    stored = connection.rows("SELECT sql FROM sqlite_schema WHERE name = :name", name=table.name)
    if stored != [{"sql": make}]:
        values = ", ".join(brought.get(column.name, column.name) for column in table.columns)
        query = "SELECT name, sql FROM sqlite_schema WHERE type = 'index' AND tbl_name = :name"
        beside = beside_of(connection)
        indexes = [r for r in connection.rows(query, name=table.name) if r["name"] in beside]
        execute(f"ALTER TABLE {table} RENAME TO ledger_earlier")
        execute(make)
        execute(f"INSERT INTO {table} SELECT {values} FROM ledger_earlier")  # noqa: S608
        execute("DROP TABLE ledger_earlier")
        for index in indexes:  # Of others.
            execute(index["sql"])


def alter(connection: SqliteConnection, table: sa.Table, brought: Mapping[str, str]) -> None:
    """Give a table of PostgreSQL the columns and rules that it has today."""
    changes = []
    for name, value in brought.items():
        if re.fullmatch("[a-z_]+", value):
            changes.append(f"RENAME COLUMN {value} TO {name}")
        else:
            column = in_words(connection, sa.schema.CreateColumn(table.columns[name]))
            changes += [f"ADD COLUMN {column} DEFAULT {value}", f"ALTER COLUMN {name} DROP DEFAULT"]
    rules = "SELECT conname AS name FROM pg_constraint WHERE contype = 'c' AND conrelid ="
    for rule in connection.rows(f"{rules} '{table}'::regclass"):
        changes.append(f"DROP CONSTRAINT {rule['name']}")
    for declared in table.constraints:
        if isinstance(declared, sa.CheckConstraint):
            changes.append(f"ADD CHECK ({declared.sqltext})")
    for change in changes:
        connection.driver.execute(f"ALTER TABLE {table} {change}")


# ===== Part four: running
# The application, the receipts that it posts, its log and the command line.


# ----- Application
# All dialects over one ledger.

BUSIEST = ("/transfers", "/accounts/{account_id}", "/accounts/{account_id}/statement")
DIALECTS = (api, wallets, bank, atm)
POLL_SECONDS, EXPIRIES_MAX = 1.0, 50
ALL_HEADERS = {
    b"x-content-type-options": b"nosniff",
    b"x-frame-options": b"DENY",
    b"cache-control": b"no-store",
}
HEAD_BYTES_MAX, PART_BYTES = 65_536, 65_536
REQUEST_SECONDS_MAX = 60
# More than most clients and proxies keep an idle connection: the side that closes it first should
# be theirs, because a request that meets a closing connection gets no answer.
KEEP_ALIVE_SECONDS = 75
FILES_KEPT = 64
pages = APIRouter(include_in_schema=False)


@dataclass(frozen=True)
class Settings:
    """What the environment says; a flag of the command line wins over it.

    `root_path` is the prefix under which a proxy in front serves the ledger.
    """

    database_url: str = "sqlite:///ledger.db"
    preload_accounts: str | None = None
    admin_key: str | None = field(default=None, repr=False)
    jwt_secret: str | None = field(default=None, repr=False)
    root_path: str = ""
    demo: bool = True

    @classmethod
    def read(cls, environment: Mapping[str, str], *, database_url: str | None = None) -> "Settings":
        """Return the settings, or raise StartupError; an empty value counts as none."""
        url = database_url or environment.get("LEDGER_DATABASE_URL")
        url = url or environment.get("DATABASE_URL") or cls.database_url
        names = ("PRELOAD_ACCOUNTS", "LEDGER_ADMIN_KEY", "LEDGER_JWT_SECRET")
        given: list[Any] = [environment.get(name) or None for name in names]
        settings = replace(cls(url, *given), demo=environment.get("LEDGER_DEMO") != "0")
        if not re.fullmatch("|[!-~]{16,}", settings.admin_key or ""):
            raise StartupError("LEDGER_ADMIN_KEY must be 16 visible ASCII characters or more")
        try:
            if settings.jwt_secret:
                JWT.encode({}, os.fsencode(settings.jwt_secret), JWT_ALGORITHM)
        except jwt.PyJWTError as error:
            raise StartupError(f"LEDGER_JWT_SECRET cannot be used: {error}") from None
        return settings


class Observed:
    """The ledger's one middleware: what it answers gets headers and a line, and is counted."""

    def __init__(self, app: ASGIApp, log: "Log", metrics: prometheus.CollectorRegistry) -> None:
        self.app, self.log = app, log
        about = ("ledger_http_seconds", "Requests", ["route", "status"])
        times = prometheus.Histogram(*about, buckets=SECONDS, registry=metrics)
        self.times = lru_cache(times.labels)  # To look for one takes longer than to count.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        root_path = scope.get("root_path", "")
        if root_path and scope["path"].startswith(f"{root_path}{root_path}/"):
            # Uvicorn has added what the proxy in front of it had left in place.
            scope["path"] = scope["path"].removeprefix(root_path)
        # The status stays 0 where the answer is given up, at the end of the server.
        began, status = time.perf_counter(), 0
        asked = scope["ledger"] = Asked(scope["headers"])

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                # The HTTP parser takes the body of an upgrade for the next request.
                close = {b"connection": b"close"} if b"upgrade" in asked.headers else {}
                headers = {**ALL_HEADERS, b"x-request-id": asked.id.encode()}
                headers |= {**dict(message["headers"]), **close}
                message["headers"] = [*headers.items()]
            while len(body := message.get("body", b"")) > PART_BYTES:
                # No faster than the caller reads it.
                await send({**message, "body": body[:PART_BYTES], "more_body": True})
                message["body"] = body[PART_BYTES:]
            await send(message)

        try:
            await self.app(scope, receive, send_on)
        except (asyncio.CancelledError, RuntimeError) as end:
            # Of the server, or of the connection: nobody waits for the answer.
            log.warning("the answer to request %s was given up: %r", asked.id, end)
        finally:
            for room, size in asked.taken.items():
                room.bytes_free += size
            seconds = time.perf_counter() - began
            # What has a route but not the method is at no route.
            route = None if status == 405 else getattr(scope.get("route"), "path_format", None)
            self.log.add(asked, scope["method"], route, status, seconds)
            counted = f"{scope['method']} {route}" if route else "unknown"
            self.times(counted, status).observe(seconds)


class HttpProtocol(HttpToolsProtocol):
    """HTTP/1.1 with bounds: on the size of a request's head, and on the time a request takes.

    Trailers count as no headers, and who ends his half of the connection still gets his answer.
    """

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.head_bytes, self.url = 0, b""
        self.wait_for(REQUEST_SECONDS_MAX)
        # Where there is no bound it is -1; Windows does not tell it.
        files_max = os.sysconf("SC_OPEN_MAX") if hasattr(os, "sysconf") else -1
        kept = min(FILES_KEPT, files_max // 4)
        if files_max > 0 and transport.get_extra_info("socket").fileno() > files_max - kept:
            # Some files are kept for the database; who waits for nothing, and longest, gives way.
            log.warning("%d connections: hardly more files can be opened", len(self.connections))
            idle = [c for c in self.connections if isinstance(c, HttpProtocol) and c.is_idle()]
            min(idle, key=attrgetter("deadline")).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # Uvicorn leaves its own where the connection was reset, and all that it leads to.
        self._unset_keepalive_if_required()

    def wait_for(self, seconds: float) -> None:
        """Wait for a request, the rest of one, or an answer that is made and read, for so long."""
        self.deadline = self.loop.time() + seconds

    def is_idle(self) -> bool:
        """Tell whether nothing is asked for, or only a part of it has come."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def data_received(self, data: bytes) -> None:
        # What has come since the last progress; the callbacks below set it back.
        self.head_bytes += len(data)
        super().data_received(data)
        if self.head_bytes > HEAD_BYTES_MAX and not self.transport.is_closing():
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.wait_for(REQUEST_SECONDS_MAX)

    def on_headers_complete(self) -> None:
        if self.head_bytes > HEAD_BYTES_MAX:
            # Much of it may be the body, in the same packet.
            self.head_bytes = len(self.url) + sum(len(n) + len(v) for n, v in self.headers)
            if self.head_bytes > HEAD_BYTES_MAX:
                raise ValueError
        self.head_bytes = 0
        super().on_headers_complete()
        self.headers = []  # For the trailers, which nobody reads.

    def on_body(self, body: bytes) -> None:
        self.head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.head_bytes = 0
        super().on_message_complete()
        # The answer is made, and read; then uvicorn's own timer closes an idle connection.
        self.wait_for(REQUEST_SECONDS_MAX + KEEP_ALIVE_SECONDS)

    def eof_received(self) -> bool:  # type: ignore[override]
        if not self.is_idle():
            self.cycle.keep_alive = False
        return not self.is_idle()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no request, or one with too large a head, and close the connection."""
        refusal: LedgerError = MalformedRequest()
        if self.head_bytes > HEAD_BYTES_MAX:
            kind = UriTooLong if len(self.url) > HEAD_BYTES_MAX // 2 else HeadersTooLarge
            why = f"The URL and the headers may have at most {HEAD_BYTES_MAX} bytes together"
            refusal = kind(why)
        answer = refusal.to_answer()
        head = f"content-type: application/problem+json\r\ncontent-length: {len(answer.body)}\r\n"
        # Not in the middle of an answer, nor in place of one that may be of a change.
        cycle = self.cycle
        is_free = cycle is None or cycle.response_complete
        if is_free or (cycle.more_body and not cycle.response_started):
            text = f"{head}connection: close\r\n\r\n{answer.body}"
            self.transport.write(STATUS_LINE[answer.status] + text.encode())
        self.transport.close()


async def leave_late(connections: Iterable[Any]) -> None:
    """Leave who took too long; to look at all now and then costs less than a timer for each."""
    now = asyncio.get_running_loop().time()
    for late in [c for c in connections if isinstance(c, HttpProtocol) and c.deadline < now]:
        late.transport.abort()


@pages.get("/openapi.json")
async def get_description(request: Request) -> Response:
    """Describe the API to programs."""
    return description(request.app, request.scope["root_path"])


@lru_cache(maxsize=16)
def description(app: FastAPI, root_path: str) -> Response:
    """Return the description of the API under a prefix, which takes long to write."""
    servers = {"servers": [{"url": root_path}]} if root_path else {}
    return Response(json.dumps(app.openapi() | servers), media_type="application/json")


@api.get("/metrics", include_in_schema=False)
async def get_metrics(database: Annotated[Database, Policy(AUDITORS)]) -> Response:
    """Show what Prometheus asks for; no label is of a caller's making."""
    shown = prometheus.generate_latest(database.metrics)
    return Response(shown, headers={"content-type": prometheus.CONTENT_TYPE_LATEST})


def create_app(
    settings: Settings, dialects: Sequence[APIRouter] = DIALECTS, *, for_others: bool = False
) -> FastAPI:
    """Open the ledger and return its application; `for_others` than this machine it needs keys."""
    try:
        _ = client_for("http://example.com"), client_for("https://example.com")
    except Exception as error:
        raise StartupError(f"the environment's proxy or certificates are wrong: {error}") from None
    database = database_at(settings.database_url)
    for router in dialects:  # What is wrong with them is said before a ledger is made or upgraded.
        list(router.route_class.first_accounts(settings, False))  # type: ignore[attr-defined]
    try:
        database.open(make=True)
        ledger, callers = Ledger(database), Callers(database, settings)
        if for_others and callers.open_mode:
            raise StartupError(
                "without API keys the ledger serves this machine alone: use --host 127.0.0.1, "
                "or make a key first: python ledger.py key add --name NAME --role admin"
            )
        with database.read() as connection:
            is_new = not connection.rows("SELECT id FROM event LIMIT 1")
        demo = is_new and callers.open_mode and settings.demo
        opened = open_first_accounts(ledger, settings, dialects, "system", demo)
        app = application(ledger, callers, dialects, settings.root_path)
        hint = " (a new ledger without demonstration money: --no-demo or LEDGER_DEMO=0)"
        app.state.opened = f"{', '.join(opened)}{hint if demo else ''}" if opened else ""
        if opened:
            log.warning("opened %d accounts%s", len(opened), hint if demo else "")
        return app
    except BaseException:
        database.close()
        raise


def application(
    ledger: Ledger, callers: Callers, dialects: Iterable[APIRouter], root_path: str
) -> FastAPI:
    """Return an application of FastAPI's with the routes of some dialects over one ledger."""
    log, metrics = Log(), ledger.database.metrics
    waiting = prometheus.Gauge("ledger_waiting_commands", "Commands that wait", registry=metrics)
    waiting.set_function(lambda: sum(map(len, [*ledger._waiting.values()])))
    app = FastAPIOffline(  # One of FastAPI's, whose docs need no network.
        redoc_url=None,
        static_url="/docs/files",
        favicon_url="data:,",
        openapi_tags=[{"name": name, "description": about} for name, about in TAGS.items()],
        title="ledger.py",
        version=__version__,
        description="A double-entry ledger: durable, idempotent, never overdrawn, always balanced.",
        lifespan=lifespan,
        root_path=root_path,
        redirect_slashes=False,
        exception_handlers={LedgerError: refuse, 404: refuse_path, 405: refuse_path},
        # It would look for three providers at each request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
    )
    app.add_middleware(Observed, log=log, metrics=metrics)
    app.state.ledger, app.state.callers, app.state.log = ledger, callers, log
    app.state.sending, app.state.receiving = Room(SENDING_BYTES_MAX), Room(RECEIVING_BYTES_MAX)
    app.state.alone = False  # Whether the process does nothing but serve it.
    routers = (*dialects, pages, app.router)
    own: list[Any] = [route for router in routers for route in router.routes]
    own.sort(key=lambda route: route.path not in BUSIEST)  # They are tried in their order.
    heads = [copy.copy(r) for r in own if isinstance(r, APIRoute) and r.methods == {"GET"}]
    for head in heads:  # It is GET whose body the server leaves out.
        head.methods, head.include_in_schema = {"HEAD"}, False
    app.router.routes[:] = [*own, *heads]
    app.openapi = lru_cache(partial(describe, app))  # type: ignore[method-assign]
    return app


TAGS = {
    "assets": "What is counted",
    "accounts": "Open them, put money in and take it out, and see what happened",
    "transfers": "Between two accounts, one or many at once",
    "transactions": "Of any number of entries, and their reversal",
    "holds": "Money that is promised, and moved later",
    "payments": "With cashback",
    "audit and events": "Who did what, and what to follow along",
    "operations": "For who runs the ledger",
    "bank": "A dialect: the banking kata, by the caller's own clock",
    "atm": "A dialect: the cash machine, in decimal dollars",
    "wallets": "A dialect: application credits",
}


def describe(app: FastAPI) -> Row:
    """Return the description of the API for programs, made once."""
    described = FastAPI.openapi(app)
    components = described.setdefault("components", {})
    problem = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas = components.setdefault("schemas", {})
    schemas |= problem.pop("$defs") | {"Problem": problem}
    components["securitySchemes"] = SECURITY
    for path in described["paths"].values():
        for operation in path.values():
            bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
            for content in [shown for body in bodies for shown in body.get("content", {}).values()]:
                if "examples" not in content:
                    content["example"] = example_of(content["schema"], schemas)
    return described


def example_of(schema: Row, schemas: Row) -> Any:
    """Return an example of what a schema describes: what is required, or has a default."""
    schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    default = [schema["default"]] if "default" in schema else []
    for given in (*schema.get("examples", ()), *default, *schema.get("enum", ())):
        return given
    for each in (*schema.get("anyOf", ()), *schema.get("allOf", ())):
        return example_of(each, schemas)
    if "properties" in schema:
        required, fields = schema.get("required", ()), schema["properties"].items()
        shown = [(name, each) for name, each in fields if name in required or "default" in each]
        known = {name: {"default": value} for name, value in EXAMPLES.items()}
        return {name: example_of(known.get(name, {}) | each, schemas) for name, each in shown}
    if schema.get("type") == "array":
        return [example_of(schema["items"], schemas)]
    kinds = {"date-time": "2026-11-21T12:00:00.000000Z", "integer": 300, "object": {}}
    kind = schema.get("format") or schema.get("type", "")
    return kinds.get(kind, "text" if kind == "string" else None)


def open_first_accounts(
    ledger: Ledger, settings: Settings, dialects: Iterable[Any], caller: str, demo: bool
) -> list[str]:
    """Open the accounts that dialects begin with, and name them; those that are there stay."""
    openings = [one for each in dialects for one in each.route_class.first_accounts(settings, demo)]
    commands = [Command(caller, json.dumps(each.keywords), each) for each in openings]
    answers = retry_while_busy(lambda: ledger.commit(commands)) if commands else []
    for answer in answers:
        if answer.status >= 400 and json.loads(answer.body)["code"] != AccountExists.code:
            raise StartupError(f"the first accounts cannot be opened: {answer.body}")
    opened = [each for each, answer in zip(openings, answers, strict=True) if answer.status < 400]
    return [next(iter(each.keywords.values())) for each in opened]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Work while the application serves, and close the ledger after the last answer."""
    ledger: Ledger = app.state.ledger
    if not ledger.database.is_open:  # It has served before, and was ended.
        ledger.database.open(make=True)
    if app.state.alone:
        # What was made until now lives as long as the process; a request leaves few cycles behind.
        # Without these two lines, the collector costs a fifth of the rate.
        gc.freeze()
        gc.set_threshold(20_000, 50, 50)
        silence_others()
    with app.state.log.written_to(sys.stderr):
        working = asyncio.create_task(work_for_ever(ledger))
        yield
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working
        ledger.database.close()


def probe_disk(book: Book) -> None:
    """Write what changes nothing, to see whether the disk is well again."""
    book.connection.execute(book.connection.probe)


def silence_others() -> None:
    """Let no other log than ours tell of requests."""
    for other in ("uvicorn.access", "httpx"):
        # Their lines would hold paths, and so names, and the tokens of receivers.
        logging.getLogger(other).disabled = True


WELL_AGAIN = "this machine's clock is right again", "the log beside the ledger is small again"


async def work_for_ever(ledger: Ledger) -> None:
    """Post receipts, credit and end what is due, and seal what is new, within a second or so."""
    database, told = ledger.database, ("", "")
    async with asyncio.TaskGroup() as tasks:
        while True:
            try:
                if database.fault:
                    await ledger.submit(Command("system", "{}", probe_disk))
                clocks = await database.run_read(read_clocks)
                if clocks["version"] != SCHEMA_VERSION:
                    database.fault = LedgerUpgraded()
                warnings = clock_warning(database, clocks), database.log_warning()
                for warning, last, well in zip(warnings, told, WELL_AGAIN, strict=True):
                    if warning != last:
                        log.warning(warning or well)
                told = warnings
                await start_deliveries(ledger, tasks)
                await ledger.credit_due("SERVER", clocks["now"])
                await expire_due(ledger, clocks["now"])
                await seal_events(ledger)
                with suppress(IndexError):  # Another thread writes, and does it then.
                    database.after_commit(rows_max=-1)
            except LedgerError as error:
                log.warning("receipts and cashbacks wait: %s", error)
            except Exception:
                log.exception("receipts or cashbacks met a mistake, and will be tried again")
            await asyncio.sleep(POLL_SECONDS)


async def expire_due(ledger: Ledger, now: int) -> None:
    """End the holds whose time is over, some at a time, so that no caller waits for many."""
    among = {"now": now, "limit": 1}
    for _ in range(EXPIRIES_MAX):
        if not await ledger.database.run_read(lambda books: books.rows(EXPIRED_HOLDS, **among)):
            break
        await ledger.submit(Command("system", "{}", expire_holds))


def clock_warning(database: Database, clocks: Row) -> str:
    """Return what to say of a clock that is wrong, if it is, and note it for the metrics."""
    wrong = []
    for other, seconds_max in (("newest event", 300), ("database server", 60)):
        seconds = round(clocks[other] / 1_000_000)
        database.behind.labels(other).set(seconds)
        if abs(seconds) > seconds_max:
            # Of one digit, so that what is said does not change with every second.
            about = round(abs(seconds), 1 - len(str(abs(seconds))))
            wrong.append(f"{about:,} s {'behind' if seconds > 0 else 'ahead of'} the {other}")
    meaning = "holds and cashbacks go by the clock that is ahead (see deploy/README.md, Clocks)"
    return f"this machine's clock is {' and '.join(wrong)}: {meaning}" if wrong else ""


def __getattr__(name: str) -> FastAPI:
    """Make `app` when it is first asked for, so that importing this module has no effect."""
    if name != "app":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        app: FastAPI = create_app(Settings.read(os.environ))
    except (StartupError, LedgerError) as refusal:
        raise SystemExit(f"ledger: {one_line(refusal)}") from None
    app.state.alone = True
    globals()["app"] = app
    return app


def __dir__() -> list[str]:
    """Name `app` too, so that `fastapi run ledger.py` finds it."""
    return [*globals(), "app"]


# ----- Receipts
# What happens is posted to receivers, as Standard Webhooks 1.0 says, by a follower like any other.
# Whose turn that is, and until when, stands in the receiver's row, by the clock that servers share.

RECEIPT_SECONDS_MAX, SAVE_SECONDS, TURN_SECONDS, PAUSE_SECONDS_MAX = 10, 2, 20, 3_600
PAUSE_SECONDS = {0: 0, 1: 5, 2: 30, 3: 300, 4: 1_800}  # By the number of failures until now.
NUMBERED = """SELECT webhook.*, {0}, (SELECT count(*) FROM webhook AS other
    WHERE other.id <= webhook.id) AS number FROM webhook WHERE due_at >= 0"""
TO_SERVE = NUMBERED.format("due_at - {0} AS waiting")
TO_SERVE += " AND position < (SELECT max(id) FROM event)"
BEHIND_BY = "(SELECT count(*) FROM (SELECT 1 FROM event WHERE id > position LIMIT 10000) AS later)"
TAKE_TURN = """UPDATE webhook SET position = :position, failures = :failures,
    last_error = :last_error, due_at = {0} + :microseconds
    WHERE id = :id AND due_at = :due_at RETURNING due_at"""
UNDELIVERED = """SELECT count(*) AS n, (SELECT ts FROM event WHERE id > (
        SELECT min(position) FROM webhook WHERE due_at >= 0) ORDER BY id LIMIT 1) AS oldest
    FROM (SELECT 1 FROM webhook JOIN event ON event.id > position
    WHERE due_at >= 0 LIMIT 10000) AS waiting"""
ACCOUNT_FIELDS = ("id", "account_id", "dest_account_id")
tls = lru_cache(httpx.create_ssl_context)


async def start_deliveries(ledger: Ledger, tasks: asyncio.TaskGroup) -> None:
    """Serve each receiver that has not had all, in a task of its own."""
    now = {"now": utc_now()}
    webhooks, [undelivered] = await ledger.database.run_read(
        lambda books: books.all_rows((TO_SERVE.format(books.clock), now), (UNDELIVERED, {}))
    )
    ledger.database.undelivered.set(undelivered["n"])
    age = utc_now() - undelivered["oldest"] if undelivered["oldest"] else 0
    ledger.database.undelivered_age.set(age / 1_000_000)
    for webhook in webhooks:
        longest = max(TURN_SECONDS, PAUSE_SECONDS.get(webhook["failures"], PAUSE_SECONDS_MAX))
        # What would wait for longer was told so by a clock that was set back since.
        if not 0 < webhook["waiting"] <= longest * 1_000_000:
            tasks.create_task(deliver(ledger, webhook))


async def deliver(ledger: Ledger, webhook: Row) -> None:
    """Post to a receiver what it has not had, in order, unless it is another server's turn."""
    try:
        while await take_turn(ledger, webhook, TURN_SECONDS) and await post_page(ledger, webhook):
            pass
    except Exception as error:  # Whatever a stranger's server does, the receipt is sent again.
        answer = getattr(error, "response", None)
        why = f"it answered {answer.status_code}" if answer else type(error).__name__
        webhook |= {"failures": webhook["failures"] + 1, "last_error": why}
        host = urlsplit(webhook["url"]).hostname
        log.warning("receiver %d at %s: a receipt waits: %s", webhook["number"], host, why)
    finally:
        with suppress(Exception):  # Else the turn ends by itself.
            pause = PAUSE_SECONDS.get(webhook["failures"], PAUSE_SECONDS_MAX)
            await take_turn(ledger, webhook, pause)


async def take_turn(ledger: Ledger, webhook: Row, seconds: int) -> bool:
    """Store how far a receiver is, and that it is our turn for so long, unless it is another's."""
    turn = {**webhook, "microseconds": seconds * 1_000_000, "now": utc_now()}

    def take(book: Book) -> Answer:
        query = TAKE_TURN.format(book.connection.clock)
        for row in book.connection.rows(query, **turn):
            webhook["due_at"] = row["due_at"]
            return DONE
        return Answer(409, "")

    return await ledger.submit(Command("system", "{}", take)) is DONE


async def post_page(ledger: Ledger, webhook: Row) -> bool:
    """Post some events, in order, or raise what comes in between; tell if there may be more."""
    page, began = await list_events(ledger.database, after=webhook["position"]), time.monotonic()
    async with client_for(webhook["url"]) as client:
        for event in page.items:
            shown = event.model_dump(mode="json", by_alias=True)
            parts = [shown["data"], *shown["data"].get("entries", ())]
            accounts = [part.get(name) for part in parts for name in ACCOUNT_FIELDS]
            if webhook["account_id"] in (None, *accounts):
                await post_receipt(ledger, client, webhook, shown)
            webhook |= {"position": event.id, "failures": 0, "last_error": None}
            if time.monotonic() > began + SAVE_SECONDS:
                return True
    return len(page.items) == PAGE_SIZE


def client_for(url: str) -> httpx.AsyncClient:
    """Return what posts to a URL: through the environment's proxy, if it is another machine's."""
    parts, proxies = urlsplit(url), getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or is_local(parts.netloc) or proxy_bypass(parts.netloc):
        proxy = None
    elif "://" not in proxy:
        proxy = f"http://{proxy}"
    options: Any = {"verify": tls(), "timeout": RECEIPT_SECONDS_MAX, "trust_env": False}
    return httpx.AsyncClient(proxy=proxy, **options)


async def post_receipt(ledger: Ledger, client: httpx.AsyncClient, webhook: Row, shown: Row) -> None:
    """Post an event to its receiver, whom 410 ends; raise if it is not taken."""
    body = json.dumps({"type": shown["type"], "timestamp": shown["ts"], "data": shown["data"]})
    headers = {"webhook-id": shown["id"], "webhook-timestamp": str(utc_now() // 1_000_000)}
    signature = sign(webhook["secret"], ".".join([*headers.values(), body]))
    headers |= {"webhook-signature": signature, "content-type": "application/json"}
    sending = client.stream("POST", webhook["url"], content=body, headers=headers)
    async with asyncio.timeout(RECEIPT_SECONDS_MAX), sending as answer:
        async for _ in answer.aiter_raw():
            pass  # To its end, so that the next receipt can take the same connection.
    if answer.status_code == 410:
        run = partial(remove_webhook, url=webhook["url"])
        await ledger.submit(Command("system", json.dumps({"url": webhook["url"]}), run))
    answer.raise_for_status()


def sign(secret: str, signed: str) -> str:
    """Return the signature of a receipt's `id.timestamp.body`."""
    key = base64.b64decode(secret.removeprefix("whsec_"))
    return f"v1,{base64.b64encode(hmac.digest(key, signed.encode(), 'sha256')).decode()}"


def add_webhook(book: Book, *, url: str, account_id: str | None, secret: str) -> None:
    """Let a receiver have what happens from now on, or raise StartupError."""
    if account_id and not book.ask("SELECT id FROM account WHERE id = :id", id=account_id):
        raise StartupError(f"there is no account {account_id}")
    added = book.record("add_webhook", None)
    row = {"id": added, "url": url, "secret": secret, "account_id": account_id}
    book.insert("webhook", {**row, "position": added, "failures": 0, "due_at": 0})


def remove_webhook(book: Book, *, url: str) -> None:
    """End the receivers at a URL, or raise StartupError where there are none."""
    ending = "UPDATE webhook SET due_at = NULL WHERE url = :url AND due_at >= 0 RETURNING id"
    if not book.connection.rows(ending, url=url):
        raise StartupError(f"there is no receiver at {url}")
    book.record("remove_webhook", None)


# ----- Log
# One JSON object a line, or text for people. There is never a key, a token, a name or an amount
# in it.

LOG_LINES_MAX, LINE_SECONDS_MAX = 20_000, 0.1


class Log(logging.Handler):
    """The lines of requests, and of whatever else the program says.

    A thread of its own writes them, so that no request waits for whoever reads them; where nobody
    does, the oldest are lost. Requests come here directly: the logging module takes longer over a
    line than the batch takes over a transfer.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: deque[Row] = deque(maxlen=LOG_LINES_MAX)
        self.taken = self.written = 0
        self.form = "json"

    def add(self, asked: Asked, method: str, route: str | None, status: int, took: float) -> None:
        """Take a request; the route's template stands for its path, because paths hold names."""
        is_own_page = method == "GET" and asked.headers.get(b"sec-fetch-site") == b"same-origin"
        if self.form == "off" or (self.form == "text" and is_own_page):
            return
        line = {
            "ts": time.time(),
            "method": method,
            "route": route,
            "status": status,
            "ms": round(took * 1_000, 3),
            "caller": asked.caller,
            "key": asked.key_prefix,
            "request_id": asked.id,
        }
        self.take(line)

    def take(self, line: Row) -> None:
        """Keep a line until it is written, unless too many others come before that."""
        self.lines.append(line)
        self.taken += 1

    def emit(self, record: logging.LogRecord) -> None:
        """Take what the program says besides."""
        # The formatter adds the traceback, if there is one; text that is no UTF-8 is escaped.
        message = self.format(record).encode(errors="backslashreplace").decode()
        self.take({"ts": record.created, "level": record.levelname, "message": message})

    @contextmanager
    def written_to(self, stream: Any) -> Iterator[None]:
        """Write to a stream until the block ends; other handlers of the log are left alone."""
        ending = threading.Event()
        writer = threading.Thread(target=self._write, args=(stream, ending), daemon=True)
        writer.start()
        if not logging.root.handlers:
            logging.root.addHandler(self)
        try:
            yield
        finally:
            logging.root.removeHandler(self)
            ending.set()
            writer.join(timeout=1)

    def _write(self, stream: Any, ending: threading.Event) -> None:
        ended = False
        while not ended:
            ended = ending.wait(LINE_SECONDS_MAX)
            taken = self.taken
            lines = [self.lines.popleft() for _ in range(len(self.lines))]
            lost = max(0, taken - self.written - len(lines))
            self.written += len(lines) + lost
            if lost:
                message = f"{lost} lines were lost, because nobody read them"
                lines.append({"ts": time.time(), "level": "WARNING", "message": message})
            for line in lines:
                line["ts"] = datetime.fromtimestamp(line["ts"], UTC)
            shown = [self.shown(line) for line in lines]
            with suppress(OSError, ValueError):  # It may be closed by now.
                stream.write("".join(f"{line}\n" for line in shown))
                stream.flush()

    def shown(self, line: Row) -> str:
        """Return a line as it is written."""
        if self.form == "json":
            return to_json(line, ensure_ascii=True).decode()
        at = line["ts"].astimezone().strftime("%H:%M:%S")
        if "message" in line:
            return f"{at}  {line['level'].lower()}: {line['message']}"
        where = line["route"] or "(no such address)"
        return f"{at}  {line['method']:6} {where}  {line['status']}  {line['ms']:.1f} ms"


# ----- Command line
# What the operator types.

RECEIVER_URL = r"(?ia)https?://(\w[\w.-]*|\[[0-9a-f:.]+\])(?::(\d{1,5}))?([/?][!-~]*)?"
KEY_MODE = "keys: every caller needs an API key or a token"
OPEN_MODE = "open: every caller on this machine may do everything"
VERSIONS = f"ledger.py {__version__}, tables of version {SCHEMA_VERSION}, "
VERSIONS += f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}"


@contextmanager
def opened(settings: Settings, *, make: bool = False, older: bool = False) -> Iterator[Database]:
    """Open a ledger for a command, which never makes one by mistake; an `older` one stays so."""
    database = database_at(settings.database_url)
    if not make and isinstance(database, SqliteDatabase) and not database.path.exists():
        raise StartupError(f"there is no ledger at {database.name}")
    with closing(database):
        database.open(make=make, older=older)
        if database.news:
            print(database.news, file=sys.stderr)
        yield database
        database.require_present(to_write=True)


def serve(settings: Settings, options: argparse.Namespace) -> None:
    """Serve until SIGTERM or Ctrl-C, and finish what was accepted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # As uvicorn, when it has finished, asks.
    listener = listen(options.host, options.port)
    if not re.fullmatch("(/[!-.0-~]+)*", options.root_path):
        raise StartupError(f"the root path must be like /money, not {options.root_path!r}")
    demo = settings.demo and not options.no_demo
    settings = replace(settings, root_path=options.root_path, demo=demo)
    app = create_app(settings, for_others=not is_local(options.host))
    app.state.alone = True
    app.state.log.form = options.log or ("text" if sys.stderr.isatty() else "json")
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    config = uvicorn.Config(
        app,
        log_config=None,
        workers=1,  # Whatever WEB_CONCURRENCY says.
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        http=HttpProtocol,
        timeout_graceful_shutdown=8,
        timeout_notify=1,
    )
    server = uvicorn.Server(config)
    config.callback_notify = partial(leave_late, server.server_state.connections)
    # Also where SIGTERM comes before uvicorn listens to it.
    with closing(app.state.ledger.database), suppress(KeyboardInterrupt):
        announce(app.state, address)
        server.run(sockets=[listener])


def announce(state: Any, address: str) -> None:
    """Print where the server is, what it serves, and who may call it."""
    database = state.ledger.database
    print(f"ledger.py {__version__} serves on {address}")
    told = {"docs": f"{address}/docs", "database": f"{database.name}{layer_warning(database)}"}
    told |= {"opened": state.opened, "upgrade": database.news}
    with database.read() as connection:
        told["clock"] = clock_warning(database, read_clocks(connection))
    told["mode"] = OPEN_MODE if state.callers.open_mode else KEY_MODE
    lines = [f"  {name:8}  {what}" for name, what in told.items() if what]
    print("\n".join(lines), flush=True)


def layer_warning(database: Database) -> str:
    """Return what to say of a ledger that is kept in its container's own files, if it is."""
    if isinstance(database, SqliteDatabase) and os.environ.get("LEDGER_CONTAINER"):
        folder = database.path.parent
        if folder.stat().st_dev == Path("/").stat().st_dev:
            return f" (GONE WITH THIS CONTAINER: mount a volume at {folder}, or set DATABASE_URL)"
    return ""


def listen(host: str, port: str | None) -> socket.socket:
    """Return a listening socket, or raise StartupError where the port is none or is taken."""
    port = (os.environ.get("PORT") or "8000") if port is None else port
    if not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65_535:
        raise StartupError(f"the port must be a number from 0 to 65535, not {port!r}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, int(port)), family=family, backlog=2_048)
    except TypeError:
        raise StartupError(f"there is no host {host!r}") from None
    except OSError as error:
        is_name = isinstance(error, socket.gaierror)
        taken = f"{os.strerror(error.errno or 0)}; choose another with --port"
        why = error.strerror if is_name else taken
        raise StartupError(f"cannot serve on {host}:{port}: {why}") from None


def seal_hash(given: str) -> str:
    """Return the hash of a seal; nothing is none, where a script has lost it."""
    if not re.fullmatch("[0-9a-fA-F]{64}", given):
        raise argparse.ArgumentTypeError("a seal's hash has 64 hexadecimal digits")
    return given.lower()


def run_check(database: Database, options: argparse.Namespace) -> int:
    """Print what each check counted and the first row that is wrong; return 1 if any is."""
    with database.read() as connection:
        results, beside = list(check(connection, options.seal or "")), sorted(others_of(connection))
        newest = connection.rows(NEWEST_SEAL)
    for rule, row_count, wrong in results:
        print(f"{'WRONG' if wrong else 'ok':5}  {row_count:>9,}  {rule}")
        print("".join(f"       {found}\n" for found in wrong[:1]), end="")
    if beside:
        print(f"others: {', '.join(beside)}")
    print("".join(map(seal_text, newest)), end="")
    count = sum(bool(wrong) for _, _, wrong in results)
    print(f"{count} of {len(results)} rules are broken" if count else "all ok")
    return int(count > 0)


def run_upgrade(database: Database, options: argparse.Namespace) -> None:
    """Bring a ledger of an earlier version to this one, or say what that would do."""
    if not options.dry_run:
        said = upgrade(database)
        database.open(make=False)
        print(said or f"{database.name} is a ledger of version {SCHEMA_VERSION} already")
        return
    with database.read() as connection:
        version, stored = stored_version(connection), connection.rows(connection.size)[0]
    print(f"{database.name} is of version {version}, and this program's is {SCHEMA_VERSION}")
    for later in range(version + 1, SCHEMA_VERSION + 1):
        brought = BROUGHT.get(later, {}).items()
        tables = [f"{name} ({', '.join(columns)})" for name, columns in brought]
        print(f"  version {later} brings {' and '.join(tables) or 'no columns'}")
    if version < SCHEMA_VERSION:
        print(f"  the whole is checked; it takes up to {3 * stored['bytes']:,} bytes more")


def seal_text(seal: Row) -> str:
    """Return a seal as a line, which is worth keeping elsewhere."""
    return f"seal {seal['id']}  {utc_text(seal['ts'])}  {seal['hash']}\n"


def run_seal(database: Database, options: argparse.Namespace) -> None:
    """Seal what is not sealed yet, and print the newest seal: keep it elsewhere."""
    asyncio.run(seal_events(Ledger(database)))
    with database.read() as connection:
        print("".join(map(seal_text, connection.rows(NEWEST_SEAL))), end="")


def run_seed(settings: Settings, options: argparse.Namespace) -> None:
    """Open the first accounts and wallets that are missing: the demo or PRELOAD_ACCOUNTS."""
    with opened(settings, make=True) as database:
        open_first_accounts(Ledger(database), settings, DIALECTS, caller="cli", demo=True)
    print(f"the first accounts and wallets are in {database.name}")


def run_backup(database: Database, options: argparse.Namespace) -> None:
    """Copy the ledger's file into a new one while it is in use."""
    if not isinstance(database, SqliteDatabase):
        raise StartupError(f"{database.name} is no file: back it up with pg_dump")
    database.copy_to(options.file)
    print(f"copied {database.name} to {options.file}")


def run_copy(settings: Settings, options: argparse.Namespace) -> None:
    """Copy a whole ledger into an empty database of either engine, and check it there."""
    target, given = database_at(options.to), replace(settings, database_url=options.source)
    place: Any = target.new() if isinstance(target, SqliteDatabase) else closing(target)
    counts = {table: 0 for table in TABLES if table != "schema_version"}
    with opened(given, older=True) as source, place as to, source.read() as old, to.write() as new:
        if stored_version(new):
            raise StartupError(f"{target.name} is not empty")
        beside = {row["name"] for row in new.rows(new.schema)}
        create_tables(new)
        brought = brought_since(stored_version(old))
        stored = {row["name"] for row in old.rows(old.tables)}
        for table in [table for table in counts if table in stored]:
            for rows in portions(old, table, brought[table]):
                new.insert(table, rows)
                counts[table] += len(rows)
        # The triggers not before, because they would refuse what frozen and closed accounts did.
        finish(new, stored_version(old), beside)
        if new.engine == "postgresql":
            # Without statistics it would read whole tables, until its own program comes round.
            new.execute("ANALYZE")
    print(f"copied {source.name} to {target.name}, and checked it there:")
    for name, row_count in counts.items():
        print(f"{row_count:>12,}  {name}")


def chosen_events(connection: Connection, options: argparse.Namespace) -> Iterator[list[Row]]:
    """Return events, some at a time: effective from a time on, before another, of an account."""
    query = f"""SELECT * FROM event WHERE id = ANY(:ids)
        AND {EFFECTIVE_AT} >= :start AND {EFFECTIVE_AT} < :to
        AND (account_id = :account OR :account = '' OR EXISTS (
            SELECT 1 FROM entry WHERE transaction_id = event.id AND account_id = :account))
        ORDER BY id"""  # noqa: S608
    among = {"start": options.start, "to": options.to, "account": options.account or ""}
    for events in portions(connection, "event"):
        yield connection.rows(query, ids=[event["id"] for event in events], **among)


def exported(connection: Connection, events: Iterable[list[Row]]) -> Iterator[Row]:
    """Return the entries of events, one transaction after the other."""
    query = f"""SELECT transaction_id, {EFFECTIVE_AT} AS ts, event.kind, memo, event.external_id,
        owner_name AS owner, account.name AS account_name, entry.account_id, asset, exponent, type,
        amount, entry.balance
        FROM event JOIN entry ON transaction_id = event.id
        JOIN account ON account.id = entry.account_id JOIN asset ON code = asset
        WHERE event.id = ANY(:ids) ORDER BY event.id, entry.id"""  # noqa: S608
    for portion in events:
        yield from connection.rows(query, ids=[event["id"] for event in portion])


CSV_TEXTS = ("memo", "external_id", "owner", "account_name")
CSV_COLUMNS = ("date", "time", "transaction_id", "kind", *CSV_TEXTS, "account_id", "asset")


def write_csv(connection: Connection, events: Iterable[list[Row]], out: TextIOWrapper) -> None:
    """Write a row an entry, its amounts as decimals, and no text that is like a formula."""
    columns = (*CSV_COLUMNS, "debit", "credit", "balance")
    table = csv.DictWriter(out, columns, extrasaction="ignore")
    table.writeheader()
    for entry in exported(connection, events):
        row, exponent = dict(entry), entry["exponent"]
        for name in CSV_TEXTS:
            row[name] = re.sub(r"^(?=[\s=+@\uff0b\uff0d\uff1d\uff20-])", "'", entry[name] or "")
        row["date"], row["time"] = utc_text(entry["ts"])[:19].split("T")
        row["balance"] = decimal_text(entry["balance"], exponent)
        row[entry["type"].lower()] = decimal_text(entry["amount"], exponent)
        table.writerow(row)


# Accounts of hledger by the names of ours; what is not here is owed, as all of the customers' is.
HLEDGER_NAMES = {"cash": "assets:cash", "cashback": "expenses:cashback"}
HLEDGER_NAMES["treasury"] = "equity:treasury"
HLEDGER_TYPES = {"assets": "C", "expenses": "X", "equity": "E", "liabilities": "L"}


def write_hledger(connection: Connection, events: Iterable[list[Row]], out: TextIOWrapper) -> None:
    """Write a journal, in which a DEBIT is positive, as accountants know it."""
    names, declared = hledger_names(connection), set()
    for event_id, entries in groupby(exported(connection, events), itemgetter("transaction_id")):
        head, postings = "", ""
        for entry in entries:
            name, asset, exponent = names[entry["account_id"]], entry["asset"], entry["exponent"]
            symbol = asset if asset.isalpha() else f'"{asset}"'
            kind = HLEDGER_TYPES[name.partition(":")[0]]
            commodity = f"commodity {symbol} 1000.{'0' * exponent}\n"
            for directive in (commodity, f"account {name}  ; type: {kind}\n"):
                if directive not in declared:
                    declared.add(directive)
                    out.write(directive)
            change = entry["amount"] if entry["type"] == "DEBIT" else -entry["amount"]
            postings += f"    {name}  {symbol} {decimal_text(change, exponent)}\n"
            head = f"{utc_text(entry['ts'])[:10]} ({event_id}) "
            head += plain(f"{entry['kind']} {entry['memo'] or ''}")
        out.write(f"\n{head}\n{postings}\n")


def hledger_names(connection: Connection) -> dict[str, str]:
    """Return hledger's names of accounts by their ids, which are in those that owners share."""
    names, owners = {}, {}
    for row in chain.from_iterable(portions(connection, "account")):
        name, owners[row["id"]] = row["name"], (plain(row["owner_name"]), row["asset"])
        if row["kind"] == "SYSTEM":
            names[row["id"]] = HLEDGER_NAMES.get(name, f"liabilities:{name}")
    shared = Counter(owners.values())
    for account_id, owner in owners.items():
        own = owner[0]
        # Nobody may be called as somebody else is with his id.
        if not own or shared[owner] > 1 or re.search(UUID_PATTERN[1:], own):
            own = f"{own} {account_id}".strip()
        names.setdefault(account_id, f"liabilities:customers:{own}")
    return names


def plain(text: str) -> str:
    """Return a caller's text without what hledger would take for more: marks, and two blanks."""
    return " ".join(re.sub(r"[^\w.,'/\x80-\U0010ffff-]", " ", text).split())


def write_jsonl(books: SqliteConnection, events: Iterable[list[Row]], out: TextIOWrapper) -> None:
    """Write the lines that seals are made of."""
    for chosen in filter(None, events):
        ids, first = {event["id"] for event in chosen}, chosen[0]["id"][:-1]
        lines = read_lines(books, first, chosen[-1]["id"], PORTION_ROWS)
        out.writelines(f"{row['line']}\n" for row in lines if row["id"] in ids)


def write_seals(connection: Connection, events: Iterable[list[Row]], out: TextIOWrapper) -> None:
    """Write all seals, each as a line of JSON."""
    for seals in portions(connection, "seal"):
        out.writelines(f"{json.dumps(seal)}\n" for seal in seals)


EXPORTS = {"csv": write_csv, "hledger": write_hledger, "jsonl": write_jsonl, "seals": write_seals}


def run_export(database: Database, options: argparse.Namespace) -> None:
    """Write transactions, for hledger or a spreadsheet, to a new file or to the output."""
    is_part = options.account or options.start or options.to < BALANCE_MAX
    if is_part and options.format == "seals":
        raise StartupError("seals are of all that happened: leave out --account, --from and --to")
    with database.read() as connection:
        if options.account:
            options.account = find_account(connection, options.account)["id"]
        place: Any = new_file(options.file) if options.file else nullcontext(os.dup(1))
        with place as file, open(file, "w", encoding="utf-8", newline="") as out:
            EXPORTS[options.format](connection, chosen_events(connection, options), out)


def run_asset_add(database: Database, options: argparse.Namespace) -> None:
    """Add an asset for ever: its code, its name and the digits of its minor unit."""
    columns = {name: getattr(options, name) for name in AssetCreate.model_fields}
    Books(Ledger(database), "cli").add_asset(**columns)
    print(f"{options.code} is in {database.name}, for ever")


def run_key_add(database: Database, options: argparse.Namespace) -> None:
    """Make an API key, and print it this once: what is stored is its hash."""
    if not is_name(options.name):
        raise StartupError("the name must be 1 to 200 printable characters")
    prefix = f"{KEY_PREFIX}{secrets.token_hex(4)}"
    key = f"{prefix}_{secrets.token_urlsafe(32)}"
    added = {"name": options.name, "role": options.role, "hash": sha256(key)}
    administer(database, add_key, **added, prefix=prefix)
    print(key, flush=True)
    print(f"key {options.name!r} is in {database.name}, and shown this once", file=sys.stderr)
    if isinstance(database, SqliteDatabase):
        with suppress(DatabaseBusy, *DRIVER_ERRORS):
            retry_while_busy(partial(database.move_pages, "FULL"))


def run_key_revoke(database: Database, options: argparse.Namespace) -> None:
    """End an API key: running servers refuse it within a second."""
    administer(database, revoke_key, name=options.name)
    print(f"revoked {options.name}")


def administer(database: Database, run: Callable[..., None], **arguments: Any) -> None:
    """Execute what the operator asks for, as any command."""
    command = Command("cli", json.dumps(arguments), partial(run, **arguments))
    retry_while_busy(lambda: Ledger(database).commit([command]))
    with suppress(LedgerError):  # It was done all the same.
        asyncio.run(seal_events(Ledger(database)))


def run_key_list(database: Database, options: argparse.Namespace) -> None:
    """Show the API keys, revoked ones too, by the prefixes that are no secret."""
    line = "{:11}  {:7}  {:27}  {:27}  {}"
    print(line.format("prefix", "role", "created", "revoked", "name"))
    with database.read() as connection:
        for key in connection.rows("SELECT * FROM api_key ORDER BY created_at"):
            times = [utc_text(key[at]) if key[at] else "-" for at in ("created_at", "revoked_at")]
            print(line.format(key["prefix"], key["role"], *times, key["name"]))


def run_webhook_add(database: Database, options: argparse.Namespace) -> None:
    """Post what happens from now on to a URL; print the secret that signs it, this once."""
    parts = re.fullmatch(RECEIVER_URL, options.url)
    if not parts or not 0 < int(parts[2] or 1) < 65_536:
        raise StartupError("the URL must be like https://example.com/receipts")
    secret = f"whsec_{base64.b64encode(secrets.token_bytes(32)).decode()}"
    add = partial(add_webhook, secret=secret)  # Which no event tells.
    administer(database, add, url=options.url, account_id=options.account)
    print(secret, flush=True)
    where = f"{parts[1]} leads, inside your own network too: see deploy/README.md, Receivers"
    print(f"receipts go from this machine to wherever {where}", file=sys.stderr)


def run_webhook_remove(database: Database, options: argparse.Namespace) -> None:
    """Post no more receipts to a URL."""
    administer(database, remove_webhook, url=options.url)
    print(f"removed {options.url}")


def run_webhook_list(database: Database, options: argparse.Namespace) -> None:
    """Show the receivers, how far behind each is, and why and until when it waits."""
    print(f"number  behind  failures  {'next try':27}  {'account':36}  url")
    with database.read() as connection:
        for row in connection.rows(NUMBERED.format(f"{BEHIND_BY} AS behind") + " ORDER BY id"):
            due = utc_text(row["due_at"]) if row["failures"] else "now"
            line = f"{row['number']:6}  {row['behind']:6}  {row['failures']:8}  {due:27}  "
            print(f"{line}{row['account_id'] or '-':36}  {row['url']}")
            if row["last_error"]:
                print(f"{'':24}  last error: {row['last_error']}")


def moment(given: str) -> int:
    """Return a time as it is stored; a mistake is told by this name."""
    return parse_time(given)


def utf8(name: str) -> str:
    """Return a name as it was typed, also where the locale is of other bytes."""
    return name.encode(errors="surrogateescape").decode(errors="surrogateescape")


FLAG = {"action": "store_true"}
TIME = {"type": moment, "metavar": "TIME"}
NAME = {"required": True, "type": utf8}
URL = {"required": True, "metavar": "URL"}
older = partial(opened, older=True)
# By its words what a command runs, what it is lent for that, and its options as argparse has them.
COMMANDS: dict[str, tuple[Callable[[Any, argparse.Namespace], int | None], Any, Row]] = {
    "serve": (serve, nullcontext, {
        "--host": {"default": "127.0.0.1"},
        "--port": {"help": "default: $PORT, or 8000"},
        "--root-path": {"default": "", "metavar": "PATH", "help": "a proxy's, such as /money"},
        "--log": {"choices": ("text", "json", "off"), "help": "default: by the terminal"},
        "--no-demo": {**FLAG, "help": "open no demonstration accounts, as LEDGER_DEMO=0 does"},
    }),
    "check": (run_check, opened, {
        "--seal": {"type": seal_hash, "metavar": "HASH", "help": "is what it covers still there?"},
    }),
    "seal": (run_seal, opened, {}),
    "seed": (run_seed, nullcontext, {}),
    "upgrade": (run_upgrade, older, {"--dry-run": {**FLAG, "help": "say what it would do"}}),
    "backup": (run_backup, older, {"file": {"type": Path}}),
    "copy": (run_copy, nullcontext, {"--from": {**URL, "dest": "source"}, "--to": URL}),
    "export": (run_export, opened, {
        "--format": {"required": True, "choices": EXPORTS},
        "--from": {**TIME, "default": 0, "dest": "start"},
        "--to": {**TIME, "default": BALANCE_MAX},
        "--account": {"metavar": "ID", "help": "only what touched this account"},
        "file": {"type": Path, "nargs": "?"},
    }),
    "asset add": (run_asset_add, opened, {
        "code": {},
        "--name": NAME,
        "--exponent": {"required": True, "type": int, "metavar": "DIGITS"},
        "--closed-loop": {**FLAG, "help": "it is issued, given and spent"},
    }),
    "key add": (run_key_add, partial(opened, make=True), {
        "--name": NAME, "--role": {"required": True, "choices": ROLES},
    }),
    "key list": (run_key_list, opened, {}),
    "key revoke": (run_key_revoke, opened, {"name": {"type": utf8}}),
    "webhook add": (run_webhook_add, opened, {
        "--url": URL,
        "--account": {"metavar": "ID", "help": "post only what is about this account"},
    }),
    "webhook list": (run_webhook_list, opened, {}),
    "webhook remove": (run_webhook_remove, opened, {"url": {}}),
}  # fmt: skip


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the command line's options; without a command, it serves."""
    parser = argparse.ArgumentParser(prog="ledger.py", description="A double-entry ledger.")
    parser.add_argument("--version", action="version", version=VERSIONS)
    groups = {"": parser.add_subparsers(title="commands")}
    default = "default: $LEDGER_DATABASE_URL, $DATABASE_URL or sqlite:///ledger.db"
    for words, (run, lend, options) in COMMANDS.items():
        group, _, name = words.rpartition(" ")
        if group not in groups:
            all_of_it = groups[""].add_parser(group, help=f"the {group}s of this ledger")
            groups[group] = all_of_it.add_subparsers(required=True)
        command = groups[group].add_parser(name, help=run.__doc__)
        command.add_argument("--database-url", metavar="URL", help=default)
        command.set_defaults(run=run, lend=lend)
        for option, how in options.items():
            command.add_argument(option, **how)
    named = arguments and (arguments[0][:1] != "-" or arguments[0] in ("-h", "--help", "--version"))
    return parser.parse_args(arguments if named else ["serve", *arguments])


def main(arguments: Sequence[str]) -> int:
    """Run one command and return the exit status."""
    log.handlers, status = [logging.NullHandler()], 1  # What is wrong is said once, below.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            # No file of the ledger may get its number; and who writes there himself is told.
            os.open(os.devnull, os.O_RDONLY)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace", write_through=False)
    try:
        options = parse_options(arguments)
        settings = Settings.read(os.environ, database_url=options.database_url)
        with options.lend(settings) as lent:
            status = options.run(lent, options) or 0
        sys.stdout.flush()
    except (StartupError, LedgerError, OSError, UnicodeError, *DRIVER_ERRORS) as refusal:
        show_progress()
        print(f"ledger: {one_line(refusal)}", file=sys.stderr)
        # Who had read enough of what a command printed last gets the status all the same.
        status = status if isinstance(refusal, BrokenPipeError) else 1
    return status


def one_line(error: BaseException) -> str:
    """Return what is behind an error, on one line."""
    shown = error if isinstance(error, StartupError) else error.__cause__ or error
    text = str(shown)
    if isinstance(shown, InvalidRequest):
        text = "; ".join(f"{e['pointer'][1:]}: {e['detail']}" for e in shown.members["errors"])
    if isinstance(shown, OSError) and shown.strerror:
        named = re.sub("[.]ledger-unfinished.*", "", str(shown.filename or ""))
        text = f"{named}: {shown.strerror}" if named else shown.strerror
    return " ".join(text.split())


# ----- Page
# What `/` shows to people: one document, which asks the routes above as any other caller does. Its
# policy allows its own script and style, and to ask this server, and nothing else.


@pages.get("/")
async def get_page() -> Response:
    """Show the ledger to people."""
    return PAGE_RESPONSE


PAGE = r"""<!doctype html><html lang="en">
<title>Ledger</title><meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root { color-scheme: light dark; --paper: light-dark(#fcfbf8, #17181a); --ink: light-dark(#1f1e1b,
  #e8e6e1); --pale: light-dark(#68655d, #a19d94); --faint: light-dark(#e4e0d6, #34353a) }
body { max-width: 52rem; margin: auto; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums }
header, nav, form { display: flex; flex-wrap: wrap; align-items: baseline; gap: .5rem 1rem }
header { justify-content: space-between } details form, main > form { padding: .5rem 0 }
[hidden], .chart:not(:hover, :focus-within) .at { display: none }
input, button { padding: .2rem .4rem; font: inherit } output { flex-basis: 100%; overflow: auto }
a { color: light-dark(#0b5c73, #86c5d8); text-underline-offset: .2em }
h1 { margin: 1.5rem 0 .5rem; font-size: 1.6rem; outline: 0; overflow-wrap: anywhere }
h2 { margin: 2rem 0 .5rem; font-size: 1.1rem } time { white-space: nowrap }
small, time, thead, text { color: var(--pale); font-size: .85rem }
section { margin: 0 -3px; padding: 0 3px; overflow-x: auto; overflow-wrap: anywhere }
.assets { display: grid; grid-template-columns: repeat(auto-fill, minmax(18rem, 1fr)); gap: 0 3rem }
table { width: 100%; border-collapse: collapse } tbody tr { border-top: 1px solid var(--faint) }
tr:has(th time) ~ tr:not(:has(th time)) { border: 0 } tbody th { min-width: 6rem; overflow-y: clip }
th, td { padding: .4rem 0; font-weight: inherit; text-align: left; vertical-align: top }
tr > * + * { padding-left: .75rem; overflow-wrap: normal; text-align: right }
td bdi { overflow-wrap: anywhere } text[x] { text-anchor: middle }
.chart { position: relative; margin: 1rem 0 1.5rem } .chart:focus-within { outline: 1px solid }
.chart input { position: absolute; inset: 0; width: 100%; height: 100%; padding: 0; opacity: 0 }
svg { display: block; width: 100%; height: 10rem; overflow: visible }
text { fill: currentcolor; stroke: var(--paper); stroke-width: 4; paint-order: stroke }
path { fill: none; stroke: currentcolor; stroke-width: 2; vector-effect: non-scaling-stroke }
.mark { stroke: var(--faint); stroke-width: 1 }
</style>
<header><nav aria-label="Lists"><a href="#/">Ledger</a> <a href="#/accounts">Accounts</a> <a
  href="#/transactions">Transactions</a> <a href="#/holds">Holds</a> <a href="docs">API</a></nav>
  <form role="search"><input type="search" name="text" size="16" maxlength="200" required
    placeholder="Name, memo or id" aria-label="Find what begins with"> <button>Find</button></form>
</header><main><h1 tabindex="-1"></h1><div id="acts"></div>
  <form hidden aria-label="Dates"><label>From <input type="date" name="from"></label>
    <label>To <input type="date" name="to"></label> <button>Show</button></form>
  <div id="view"></div></main>
<form hidden aria-label="Key"><label>Key <input type="password" name="key" autocomplete="off"
  pattern="[!-~]+" required></label> <button>Enter</button></form>
<footer hidden><button>Forget the key</button></footer><datalist id="seen"></datalist>
<script type="module">
const [search, dates, enter] = document.forms;
const [h1, acts, view, footer, seen] = document.querySelectorAll("h1, [id], footer");
const key = sessionStorage.getItem("key"), JSON_TYPE = { "Content-Type": "application/json" };
const EXPONENTS = {};  // Of the assets that there are, by code.
const known = new Map();  // The accounts that were seen, by id.
const ID = /([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/;
const MONEY = /^(amount|captured_amount|balance|held|available|credit_limit)$/;
// Numbers stay the text that was sent: an amount may be too large for a number of JavaScript's.
const exact = (name, value, { source }) => (typeof value === "number" ? source : value);
async function ask(path, { headers, ...options } = {}) {
  const own = key && { Authorization: `Bearer ${key}` };
  const response = await fetch(`.${path}`, { ...options, headers: { ...own, ...headers } });
  const found = JSON.parse(await response.text(), exact);
  for (const each of [found, ...(found.items ?? [])]) if (each.owner_name) known.set(each.id, each);
  return [response.status, found];
}
async function get(path, query = {}, ...expected) {
  const [status, found] = await ask(`${path}?${new URLSearchParams(query)}`);
  if (![200, ...expected].includes(status)) throw found;
  return found;
}
async function count(query = {}) {
  const { items, next_cursor: cursor } = await get("/assets", query);
  for (const { code, exponent } of items) EXPONENTS[code] = exponent;
  if (cursor) await count({ cursor });
}
const meet = (rows) => Promise.all([...new Set(rows.flatMap((row) => [row.account_id,
  row.dest_account_id]))].map((id) => !id || known.has(id) || get(`/accounts/${id}`)));
// Names and memos are hostile: all that is shown is made here, and what was read is text in it.
function el(name, attributes, ...children) {
  const space = ["svg", "path", "text"].includes(name) ? "2000/svg" : "1999/xhtml";
  const element = document.createElementNS(`http://www.w3.org/${space}`, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children.flat().filter(Boolean));
  return element;
}
const bdi = (value) => value && el("bdi", {}, value);
const small = (value) => value && el("small", { dir: "auto" }, value);
const link = (place, value) => value && el("a", { href: `#/${place}` }, bdi(value));
const posted = (id, name = id) => id && link(`transaction/${id}`, name);
const words = (code) => code[0].toUpperCase() + code.slice(1).toLowerCase().replace(/[._]/g, " ");
// A customer's account has no name, or one that begins with its dialect and a colon.
const isSystem = ({ name }) => name && !name.includes(":");
const called = (account) => (isSystem(account) ? words(account.name) : account.owner_name);
const person = (id) => link(`account/${id}`, called(known.get(id)));
const section = (title, ...children) => el("section", {}, el("h2", {}, title), ...children);
const local = (ts) => new Date(ts).toLocaleString("sv");  // As ISO 8601, in the reader's zone.
const time = (ts) => el("time", { datetime: ts, title: ts }, local(ts));
const decimal = (amount, asset, how) => new Intl.NumberFormat("en", { ...how, minimumFractionDigits:
  EXPONENTS[asset] }).format(`${amount}e-${EXPONENTS[asset]}`).replace("-", "\u2212");
const priced = (amount, asset) => [small(asset), "\u00a0", decimal(amount, asset)];
const signed = ({ type, amount }) => (type === "DEBIT" ? `-${amount}` : amount);
const sums = (entry, asset) =>
  [decimal(signed(entry), asset, { signDisplay: "always" }), decimal(entry.balance, asset)];
// A row is a list of what its first cell shows, and then what each of the others does.
function table(title, columns, rows, ...below) {
  const spaced = (parts) => parts.flat().filter(Boolean).flatMap((part) => [part, " "]);
  const shown = el("table", { "aria-label": title },
    el("thead", {}, el("tr", {}, columns.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows.map(([first, ...others]) => el("tr", {},
      el("th", { scope: "row", colspan: columns.length - others.length }, spaced(first)),
      ...others.map((cell) => el("td", {}, cell))))));
  return rows.length && section(title, shown, el("p", {}, spaced(below)));
}
// What a list shows, to take along: amounts as decimals, and no text that is like a formula.
function csv(title, rows) {
  const cell = ([name, value], asset) => (MONEY.test(name)
    ? decimal(value, asset, { useGrouping: false }).replace("\u2212", "-")
    : (value ?? "").replace(/^(?=[\s=+@\uff0b\uff0d\uff1d\uff20-])/, "'"));
  const shown = rows.map(({ metadata, ...row }) => row), lines = [Object.keys(shown[0] ?? {}),
    ...shown.map((row) => Object.entries(row).map((pair) => cell(pair, row.asset)))];
  const text = lines.map((line) => line.map((each) => `"${each.replaceAll('"', '""')}"`));
  const href = `data:text/csv;charset=utf-8,${encodeURIComponent(text.join("\r\n"))}`;
  return el("a", { href, download: `${title}.csv` }, "CSV");
}
function facts({ metadata, entries, ...found }) {
  const show = (name, value) => (/_at$|^ts$/.test(name) ? time(value) : /^revers/.test(name)
    ? posted(value) : MONEY.test(name) ? decimal(value, found.asset) : bdi(value));
  return table("Facts", ["Name", "Value"], [
    ...Object.entries(found).filter(([, value]) => value).map(
      ([name, value]) => [[words(name)], show(name, value)]),
    ...Object.entries(metadata).map(([name, value]) => [[bdi(`metadata: ${name}`)], bdi(value)])]);
}
// Days are the reader's own, and the last one is meant as a whole.
const days = ({ from, to, ...query }) => ({ ...query,
  ...(from && { from: new Date(`${from}T00:00`).toJSON() }),
  ...(to && { to: new Date(`${to}T24:00`).toJSON() }) });
async function list(title, columns, [path, query, place = path], show, record = (item) => item) {
  const { items, detail, next_cursor: cursor } = await get(`/${path}`, days(query), 503);
  if (!items?.length) return section(title, detail ?? "There are none.");
  await meet(items.flatMap((item) => item.entries ?? item));
  const more = cursor && link(`${place}?${new URLSearchParams({ ...query, cursor })}`, "More");
  const taken = csv(title.toLowerCase(), items.flatMap(record));
  return table(title, columns, items.flatMap(show), more, taken);
}
const accounts = (query) => list("Accounts", ["Owner", "Balance"], ["accounts", query],
  ({ id, name, external_id, status, balance, asset }) => [[[person(id), small(name),
    small(external_id), small(words(status))], priced(balance, asset)]]);
const holds = (query) => list("Holds", ["Hold", "Amount"], ["holds", query], (hold) => [[
  [words(hold.status), person(hold.account_id), "\u2192", person(hold.dest_account_id),
    bdi(hold.memo), time(hold.expires_at)], priced(hold.amount, hold.asset)]]);
const entryRow = (entry, account) => [[person(account.id), !isSystem(account) &&
  small(account.name), small(account.asset)], ...sums(entry, account.asset)];
const entryRows = (entries) => entries.map((entry) => entryRow(entry, known.get(entry.account_id)));
// The memo of a cashback is the id of its payment.
const noted = (kind, memo) => (kind === "CASHBACK" ? posted(memo, "of a payment") : bdi(memo));
const moves = ({ id, kind, memo, ts, entries }) =>
  [[[posted(id, words(kind)), noted(kind, memo), time(ts)]], ...entryRows(entries)];
// The accounts on the other side of an entry; and what a CSV has of one.
const others = ({ entries }, { type }) =>
  entries.filter((each) => each.type !== type).map((each) => each.account_id);
const record = (transaction, entry, account = known.get(entry.account_id)) => ({ ...entry,
  external_id: transaction.external_id, amount: signed(entry), asset: account.asset,
  owner: called(account),
  other: others(transaction, entry).map((id) => called(known.get(id))).join("; ") });
const transactions = (query) => list("Transactions", ["What", "Amount", "Balance"],
  ["transactions", query], moves, (each) => each.entries.map((entry) => record(each, entry)));
async function balances() {
  const { items } = await get("/balances"), totals = await get("/totals");
  const counts = new Map(totals.items.map((total) => [total.asset, total.accounts]));
  const used = items.filter(({ asset }) => counts.has(asset)).sort(
    (one, other) => counts.get(other.asset) - counts.get(one.asset));
  return el("div", { class: "assets" }, used.map(({ asset, customers, system, total }) =>
    table(asset, ["Where", "Balance"], [[["Accounts"], counts.get(asset)],
      ...Object.entries({ customers, ...system, total })
        .filter(([place, sum]) => sum !== "0" || !(place in system))
        .map(([place, sum]) => [[words(place)], decimal(sum, asset)])])));
}
// What happened last, newest first; who may not read events sees transactions alone.
async function latest() {
  const before = (await get("/audit", { limit: 11 }, 403)).items?.[10];
  const { items } = await get("/events", before ? { after: before.id } : {}, 403, 404);
  const events = items?.reverse() ?? (await get("/transactions", { limit: 10 })).items.map(
    (data) => ({ data }));
  await meet(events.flatMap(({ type, data }) =>
    data.entries ?? (/^account/.test(type) ? { account_id: data.id } : [])));
  const rows = ({ ts, type, data }) => (data.entries ? moves(data) : [[[words(type),
    bdi(data.memo), known.has(data.id) && person(data.id), time(ts)]]]);
  return table("Latest", ["What", "Amount", "Balance"], events.flatMap(rows));
}
// The round places between two: multiples of the smallest step of which there are but a few.
function marks(low, high, steps) {
  const step = steps.find((each) => high - low < 4 * each);
  const first = Math.ceil(low / step), count = Math.floor(high / step) - first + 1;
  return Array.from({ length: count }, (_, place) => (first + place) * step);
}
const SUMS = Array.from({ length: 57 }, (_, n) => [1, 2, 5][n % 3] * 10 ** Math.floor(n / 3));
const DAY = 86_400_000, TIMES = [1e3, 5e3, 2e4, 6e4, 3e5, 12e5, 36e5, 108e5, 432e5,
  ...[1, 2, 7, 14, 28, 91, 365, 3650].map((days) => days * DAY)];
// The balance as a line through entries, newest first; its range is its own.
function chart(entries, asset) {
  const offset = new Date(entries[0].ts).getTimezoneOffset() * 60_000;
  const steps = entries.map(({ ts, balance }) => [new Date(ts) - offset, balance]).reverse();
  const heights = steps.map(([, sum]) => Number(sum)), start = steps[0][0], end = steps.at(-1)[0];
  const low = Math.min(...heights), high = Math.max(...heights);
  const x = (moment) => 120 + Math.round((860 * (moment - start)) / (end - start || 1));
  const y = (sum) => (high === low ? 500 : Math.round((1000 * (high - sum)) / (high - low)));
  const iso = (moment) => new Date(moment).toISOString().replace("T", " ").slice(0, 19);
  const told = small(" "), pointed = el("path", { class: "at" });
  const lines = [...marks(low, high, SUMS).map((sum) => [`M0 ${y(sum)}H1000`,
    el("text", { y: `${y(sum) / 10}%`, dy: -4 }, decimal(BigInt(sum), asset))]),
  ...marks(start, end, TIMES).filter((moment) => x(moment) < 890).map((moment) => [
    `M${x(moment)} 0V1000`, el("text", { x: `${x(moment) / 10}%`, y: "100%", dy: 18 },
      iso(moment).slice(...(end - start < 2 * DAY ? [11] : [0, 10])))])];
  const at = el("input", { type: "range", id: "at", max: steps.length - 1, "aria-label": "Entry" });
  at.oninput = () => {
    const [moment, sum] = steps[at.value];
    told.textContent = `${iso(moment)}: ${decimal(sum, asset)} ${asset}`;
    at.setAttribute("aria-valuetext", told.textContent);
    pointed.setAttribute("d", `M${x(moment)} 0V1000`);
  };
  at.onclick = at.onpointermove = ({ offsetX }) => at.oninput(at.value = steps.findLastIndex(
    ([moment]) => x(moment) <= (1000 * offsetX) / at.clientWidth));
  at.oninput(at.value = at.max);
  const d = steps.map(([moment, sum]) => `H${x(moment)}V${y(sum)}`).join("");
  return section(`Balance ${decimal(entries[0].balance, asset)} ${asset}`,
    el("div", { class: "chart" }, el("svg", { "aria-hidden": true },
      el("svg", { viewBox: "0 0 1000 1000", preserveAspectRatio: "none" },
        lines.map(([mark]) => el("path", { d: mark, class: "mark" })), pointed,
        el("path", { d: `M120 ${y(heights[0])}${d}H1000` })), lines.map(([, text]) => text)), at),
    told);
}
async function account(id, query) {
  const found = await get(`/accounts/${id}`), lines = [];
  const own = ({ entries }) => entries.find((entry) => entry.account_id === id);
  const row = (each) => {
    const entry = own(each), from = others(each, entry);
    lines.push(entry);
    return [[[posted(each.id, words(each.kind)), entry.type === "CREDIT" ? "from" : "to",
      from.slice(0, 3).map(person), from.length > 3 && `and ${from.length - 3} more`,
      noted(each.kind, each.memo), time(each.ts)], ...sums(entry, found.asset)]];
  };
  const [statement, held] = await Promise.all([list("Statement", ["Entry", "Amount", "Balance"],
    ["transactions", { ...query, account_id: id }, `account/${id}`], row,
    (each) => record(each, own(each))), holds({ account_id: id })]);
  const paid = lines.filter(({ kind }) => kind === "PAYMENT").map((entry) => entry.transaction_id);
  const payments = await Promise.all(paid.map((each) => get(`/payments/${each}`, {}, 404)));
  const due = payments.filter(({ cashback }) => cashback).map(({ payment_id, cashback }) => [
    [posted(payment_id, "Payment"), words(cashback.status), time(cashback.due_at)],
    decimal(cashback.amount, found.asset)]);
  return [called(found), lines.length && chart(lines, found.asset), statement,
    table("Cashbacks", ["Of", "Amount"], due), held, facts(found)];
}
async function transaction(id) {
  const found = await get(`/transactions/${id}`), columns = ["Account", "Amount", "Balance"];
  await meet(found.entries);
  return [words(found.kind), table("Entries", columns, entryRows(found.entries)), facts(found)];
}
async function find(_, { text }) {
  if (ID.test(text)) for (const [name, show] of Object.entries({ account, transaction }))
    if ((await get(`/${name}s/${text}`, {}, 404)).id) return show(text, {});
  const found = await Promise.all([accounts({ search: text }), transactions({ search: text })]);
  const lists = found.filter((each) => each.querySelector("table"));
  return [`${lists.length ? "What" : "Nothing"} begins with \u201c${text}\u201d`, ...lists];
}
const all = (title, show) => async (_, query) => [title, await show(query)];
const VIEWS = { __proto__: null, account, transaction, find, holds: all("Holds", holds),
  accounts: all("Accounts", accounts), transactions: all("Transactions", transactions),
  "": () => Promise.all(["Overview", balances(), accounts({ limit: 20 }), latest()]) };
const on = (form, act) => form.addEventListener("submit", (event) => {
  event.preventDefault();
  act(Object.fromEntries([...new FormData(form)].filter(([, value]) => value)));
});
// An intent keeps its key until it is answered: a double click and a lost answer act once.
async function send(path, given) {
  const body = JSON.stringify(given), intent = path + body;
  const name = (sessionStorage[intent] ??= crypto.getRandomValues(new Uint32Array(4)).join("-"));
  const headers = { ...JSON_TYPE, "Idempotency-Key": name };
  const [status, answer] = await ask(path, { method: "POST", headers, body });
  if (status < 500) sessionStorage.removeItem(intent);
  if (status >= 300) throw answer;
  const told = [`curl '${new URL(`.${path}`, location)}'`, key && '-H "X-API-Key: $KEY"',
    ...Object.entries(headers).map((pair) => `-H '${pair.join(": ")}'`),
    `-d '${body.replaceAll("'", "'\\''")}'`];
  return [answer, told.filter(Boolean).join(" \\\n  ")];
}
async function payee(text, own) {
  if (ID.test(text)) return text;
  const { items } = await get("/accounts", { owner_name: text });
  const found = items.filter(({ id, asset }) => asset === own.asset && id !== own.id);
  if (found.length === 1) return found[0].id;
  throw { detail: `${found.length || "No"} accounts of ${text} have ${own.asset}: use an id` };
}
// A refusal, with names and decimals where the ledger has ids and minor units.
const reason = ({ detail = "No answer came: send it again, and it is done once", available,
  errors = [] }, asset) => [detail, ...errors.map((each) => `${each.pointer} ${each.detail}`)]
  .join(". ").split(ID).map((part, place) => (place % 2 ? known.get(part)?.owner_name ?? part
    : available ? part.replace(/\d+/g, (amount) => decimal(amount, asset)) : part)).join("");
function form(title, path, fields, asset, complete = (given) => given) {
  const output = el("output", {}), inputs = Object.entries(fields).map(([name, [label, how]]) =>
    el("label", {}, `${label} `, el("input", { name, maxlength: 200, ...how })));
  const each = el("form", {}, inputs, el("button", {}, title), output);
  on(each, async (given) => {
    if (each.ariaBusy) return;
    each.ariaBusy = true;
    try {
      const [now, curl] = await send(path, await complete(given));
      each.reset();
      output.replaceChildren("Done: ", now.owner_name ? link(`account/${now.id}`,
        `${now.owner_name} has ${decimal(now.balance, now.asset)} ${now.asset}`)
        : posted(now.transfer_id ?? now.id, "the transaction"), el("pre", {}, curl));
      draw();
    } catch (refusal) { output.replaceChildren(reason(refusal, asset)); }
    each.ariaBusy = null;
  });
  return el("details", {}, el("summary", {}, title), each);
}
// Whether the caller may work, and reverse: what is asked for here is refused either way.
const may = Promise.all(["/accounts", "/transactions/none/reverse"].map(async (path) => [400, 422]
  .includes((await ask(path, { method: "POST", headers: JSON_TYPE, body: "{}" }))[0])));
async function forms(name, id) {
  const [work, reverse] = await may, required = "", { asset, ...own } = known.get(id) ?? {};
  if (name === "" && work) return [form("Open an account", "/accounts", {
    owner_name: ["Owner", { required }], asset: ["Asset", { required, value: "USD", size: 6 }] })];
  if (name === "transaction" && reverse)
    return [form("Reverse", `/transactions/${id}/reverse`, { memo: ["Why", { required }] })];
  if (name !== "account" || !work || !asset || isSystem(own)) return [];
  const places = EXPONENTS[asset], memo = ["Memo"], amount = ["Amount", { required, size: 10,
    pattern: `\\d+(\\.\\d{0,${places}})?`, title: `digits, at most ${places} after a point` }];
  const complete = async ({ amount: text, dest_account_id: to, ...given }) => {
    const [whole, part = ""] = text.split(".");
    const both = to && { source_account_id: id, dest_account_id: await payee(to, { id, asset }) };
    return { ...both, amount: Number(whole + part.padEnd(places, "0")), ...given };
  };
  return [form("Deposit", `/accounts/${id}/deposit`, { amount, memo }, asset, complete),
    form("Transfer", "/transfers", { dest_account_id: ["To", { required, list: "seen" }], amount,
      memo }, asset, complete)];
}
const nowhere = () => ["There is nothing at this address"];
function refused({ status, detail = "The ledger does not answer. This page tries again." }) {
  if (status === "422") return nowhere();
  enter.hidden = status !== "401";
  return [enter.hidden || key ? detail : "This ledger asks for a key or token"];
}
// Draw the view that the address names, again and again, while somebody may see it.
let timer, drawn, acting, place;
async function draw() {
  if (document.hidden) return;
  const { hash } = location, began = Date.now(), [path, asked] = hash.slice(2).split("?");
  const [name, id] = path.split("/"), query = Object.fromEntries(new URLSearchParams(asked));
  const show = () => (VIEWS[name] ?? nowhere)(id, query);
  const [title, ...parts] = await count().then(show).catch(refused);
  if (hash !== location.hash) return;
  const next = el("div", {}, ...parts), focused = document.activeElement;
  if (!next.isEqualNode(drawn)) {
    drawn = next.cloneNode(true);  // What is shown changes where somebody points.
    view.replaceChildren(...next.childNodes);
    const same = (each) => each.id === focused.id && each.href === focused.href;
    if (!focused.isConnected) [...view.querySelectorAll("a, input")].find(same)?.focus();
    seen.replaceChildren(...[...known.values()].filter((account) => !isSystem(account)).map(
      ({ owner_name }) => el("option", {}, owner_name)));
  }
  if (h1.textContent !== title) h1.replaceChildren(bdi(title));
  document.title = `${title} | Ledger`;
  if (place !== hash) {
    dates.hidden = !["account", "transactions"].includes(name);
    for (const end of [dates.from, dates.to]) end.value = query[end.name] ?? "";
    if (name === "find") search.text.value = query.text;
    if (place !== undefined) h1.focus();
    place = hash;
  }
  if (acting !== (acting = parts.length && hash))
    acts.replaceChildren(...acting ? await forms(name, id).catch(() => []) : []);
  clearTimeout(timer);  // The page takes at most a tenth of the server's time.
  timer = setTimeout(draw, Math.max(2000, 10 * (Date.now() - began)));
}
const go = (path, query) => { location.hash = `${path}?${new URLSearchParams(query)}`; };
on(search, (given) => go("#/find", given));
on(dates, (given) => go(location.hash.split("?")[0], given));
on(enter, (given) => { sessionStorage.setItem("key", given.key); location.reload(); });
footer.hidden = !key;
footer.firstChild.onclick = () => { sessionStorage.clear(); location.reload(); };
for (const change of ["hashchange", "visibilitychange"]) addEventListener(change, draw);
draw();
</script>
"""


# The page's one script and its one style are allowed by their hashes.
OWN = [
    f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for tag, text in re.findall(r"<(script|style).*?>(.*?)</\1>", PAGE, re.DOTALL)
]
PAGE_POLICY = (
    f"default-src 'none'; {'; '.join(OWN)}; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
PAGE_RESPONSE = Response(PAGE, 200, {"content-security-policy": PAGE_POLICY}, "text/html")


if __name__ == "__main__":
    # A command that reads a whole ledger keeps little of it, and need not look for cycles often.
    gc.freeze()
    gc.set_threshold(20_000, 50, 50)
    try:
        sys.exit(main(sys.argv[1:]))
    finally:
        # What could not be written is not tried again, which would end with another status.
        with suppress(OSError):
            sys.stdout.close()
