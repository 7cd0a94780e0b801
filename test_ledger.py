"""The specification of ledger.py, section by section in its order: `pytest` runs it.

It opens with a day at the bank, after which a reader may stop. The words that the tests speak, as
`given`, `refusal` and `outcome`, begin in the section "The words", after the last test; what they
are made of, processes and databases, follows there.

A test that names `bank`, `demo` or `secured` has a new ledger to itself. The fixtures `server`,
`servers` and `shared` are one ledger for the whole session: each test there needs names, keys and
external ids of its own, and asks only about those.
"""

import asyncio
import base64
import csv
import hashlib
import hmac
import io
import itertools
import json
import logging
import multiprocessing.forkserver
import os
import random
import re
import runpy
import secrets
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import uuid
import venv
import warnings
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import cache, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any, NamedTuple, Self, TypeVar
from urllib.parse import quote, unquote, urlsplit

import httpx
import jwt
import psycopg
import pytest
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.testclient import TestClient
from hypothesis import settings, stateful
from hypothesis import strategies as st
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client.parser import text_string_to_metric_families
from selenium import webdriver
from selenium.common.exceptions import JavascriptException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from starlette.routing import Match

import ledger


def test_a_day_at_the_bank(bank: "Bank") -> None:
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
    reused = bank.post(pay_day, key="pay-day", amount=9999)
    assert refusal(reused) == (409, "idempotency_key_reused")

    # Bob opens an account, and Alice sends him three dollars.
    bob = bank.post("/accounts", owner_name="Bob").json()
    ends = {"source_account_id": alice["id"], "dest_account_id": bob["id"]}
    sent = bank.post("/transfers", key="rent", **ends, amount=300, memo="rent").json()
    assert (sent["source"]["balance"], sent["dest"]["balance"]) == (750, 300)
    # She cannot send what she does not have, and is told what she has.
    refused = bank.post("/transfers", key="yacht", **ends, amount=100_000)
    assert refusal(refused) == (409, "insufficient_funds")
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
    entries = bank.get(f"/transactions/{sent['transfer_id']}").json()["entries"]
    assert [(entry["account_id"], entry["type"], entry["amount"]) for entry in entries] == [
        (alice["id"], "DEBIT", 300),
        (bob["id"], "CREDIT", 300),
    ]

    # At night the auditor adds everything up: the outside world owes exactly what is here.
    assert bank.rows("SELECT SUM(balance) FROM account") == [(0,)]
    assert bank.wrong() == []


# A test that names a ledger, a server or a database runs on both engines, unless it is marked.
# LEDGER_TEST_CYCLES=25 kills servers 25 times instead of 3, tries on both engines what does not
# depend on them, as what is refused before any database is asked, and more cases of some.
ENGINES = ("sqlite", "postgresql")
CYCLES = int(os.environ.get("LEDGER_TEST_CYCLES", "3"))
on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
at_the_edge = pytest.mark.parametrize("engine", ENGINES[: 1 + (CYCLES > 3)], indirect=True)
NOBODY = "00000000-0000-7000-8000-000000000000"
ATM_DEMO = json.loads(ledger.ATM_DEMO)
WALLETS = ("user_alice", "user_bob")
WITHOUT_DEMO = " (a new ledger without demonstration money: --no-demo or LEDGER_DEMO=0)"


def short(value: Any) -> str:
    """Return what a value is called in the name of its test."""
    return ascii(value)[:50]


# ===== Part one: the ledger


# ----- Money
# An amount is an integer of minor units, and has exactly one form as decimal text.


@pytest.mark.parametrize(
    ("amount", "exponent", "text"),
    [
        (1_050, 2, "10.50"),
        (5, 2, "0.05"),
        (0, 4, "0.0000"),
        (1, 4, "0.0001"),
        (10**15, 4, f"{10**11}.0000"),
    ],
)
def test_minor_units_and_decimal_text_are_two_forms_of_one_amount(
    amount: int, exponent: int, text: str
) -> None:
    assert ledger.decimal_text(amount, exponent) == text
    assert ledger.minor_units(text, exponent) == amount


def test_a_negative_amount_has_its_sign_in_front() -> None:
    assert ledger.decimal_text(-5, 2) == "-0.05"


def test_an_asset_without_smaller_units_has_no_point() -> None:
    assert (ledger.decimal_text(1050, 0), ledger.minor_units("1050", 0)) == ("1050", 1050)
    for fraction in ("1.0", "1."):
        with pytest.raises(ValueError, match=r"^$"):
            ledger.minor_units(fraction, 0)


def test_decimal_text_may_leave_places_out() -> None:
    assert [ledger.minor_units(text, 2) for text in ("10", "10.5", "10.50")] == [1000, 1050, 1050]


@pytest.mark.parametrize(
    "text",
    ["", "-1", "+1", ".5", "1.", "1.005", "1e2", " 1", "1\n", "1_0", "1,5", "\u0661", "9" * 17],
)
def test_text_that_is_no_plain_decimal_is_no_amount(text: str) -> None:
    with pytest.raises(ValueError, match=r"^$"):
        ledger.minor_units(text, 2)


# ----- Times and ids
# Both rise from commit to commit, and nobody can guess an id.


def test_ids_rise_even_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []
    for now in (10**15, 10**15, 10**15 + 1, 5, 10**15 + 10**6):
        monkeypatch.setattr(ledger, "utc_now", lambda now=now: now)
        book = ledger.Book(None)  # type: ignore[arg-type]
        newest = {"id": ids[-1] if ids else None, "ts": 10**15}
        book.follow([newest | {"version": ledger.SCHEMA_VERSION}])
        ids += [book.new_id(), book.new_id()]
        assert book.now == max(now, 10**15)
    assert ids == sorted(set(ids))
    parsed = [uuid.UUID(one) for one in ids]
    assert {(one.version, one.variant) for one in parsed} == {(7, uuid.RFC_4122)}
    assert int(ids[0].replace("-", "")[:12], 16) == 10**12


def test_nobody_can_guess_an_id(bank: "BankInside", monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[str] = []
    draw = secrets.token_hex

    def draw_and_note(size: int) -> str:
        drawn.append(draw(size))
        return drawn[-1]

    monkeypatch.setattr(secrets, "token_hex", draw_and_note)
    bank.given(alice=100, bob=0).transfer("alice", "bob", 1)
    bank.hold("alice", "bob", 1)
    tables = ("event", "entry", "hold", "account WHERE kind = 'CUSTOMER'")
    ids = [one for table in tables for (one,) in bank.rows(f"SELECT id FROM {table}")]
    # After its time and its form, each has random digits of the system's, which no other one has.
    digits = {one[20:].replace("-", "") for one in ids}
    assert len(digits) == len(ids) == 5 + 4 + 1 + 2
    assert digits <= {text[n : n + 15] for text in drawn for n in range(0, len(text), 15)}


# ----- Refusals
# Every refusal has one form, a code for programs and a sentence for people.


def test_a_refusal_is_a_problem_with_members_that_help() -> None:
    answer = ledger.InsufficientFunds("There is too little", balance=7, requested=10).to_answer()
    assert answer.status == 409
    assert json.loads(answer.body) == {
        "type": "urn:ledger:error:insufficient_funds",
        "title": "Insufficient funds",
        "status": 409,
        "detail": "There is too little",
        "code": "insufficient_funds",
        "balance": 7,
        "requested": 10,
    }


def descendants(parent: type[ledger.LedgerError]) -> list[type[ledger.LedgerError]]:
    """Return the classes that derive from one, and those that derive from them."""
    children = parent.__subclasses__()
    return children + [each for child in children for each in descendants(child)]


def test_every_error_has_a_code_of_its_own() -> None:
    errors = descendants(ledger.LedgerError)
    assert {ledger.DatabaseLost, ledger.DatabaseConflict} < set(errors)
    own = [error for error in errors if "status" in vars(error)]
    assert len({error.code for error in own}) == len(own)
    assert all(400 <= error.status < 600 for error in own)
    # The others are told apart by the program alone: callers see what they derive from.
    assert {(error.status, error.code) for error in errors} == {
        (error.status, error.code) for error in own
    }


# ----- Tables
# What no row can say, whoever writes it. The statements come from outside, past the code.


def test_times_are_rfc_3339_in_utc() -> None:
    assert ledger.utc_text(0) == "1970-01-01T00:00:00.000000Z"
    assert ledger.utc_text(1_795_219_200_000_001) == "2026-11-21T00:00:00.000001Z"


def entries_like(**changes: str) -> str:
    """Return the statement that copies all entries, but for some columns."""
    names = ("account_id", "seq", "id", "transaction_id", "type", "amount", "balance")
    columns = dict(zip(names, names, strict=True)) | changes
    selected = ", ".join(columns.values())
    return f"INSERT INTO entry ({', '.join(columns)}) SELECT {selected} FROM entry"


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE account SET status = 'ASLEEP'",
        "UPDATE account SET status = 'CLOSED' WHERE kind = 'CUSTOMER'",
        "UPDATE account SET credit_limit = -1",
        "INSERT INTO asset (code, name, exponent, closed_loop) VALUES ('X', 'X', 13, 0)",
        "INSERT INTO asset (code, name, exponent, closed_loop) VALUES ('X', 'X', 2, 2)",
        "UPDATE account SET credit_limit = 1000000000000001 WHERE asset = 'USD'",
        "UPDATE account SET credit_limit = 10, held = 111 WHERE kind = 'CUSTOMER'",
        entries_like(seq="seq + 1", amount="0"),
        entries_like(seq="seq + 1", type="'GIFT'", balance="balance - amount"),
        "INSERT INTO api_key VALUES ('x', 'x', 'x', 'root', 0, NULL)",
    ],
)
def test_a_table_refuses_what_breaks_its_rules(bank: "Bank", statement: str) -> None:
    bank.given(alice=100)
    with pytest.raises(REFUSED, match=r"(?i)CHECK"):
        bank.tamper(statement)
    assert bank.wrong() == []


@pytest.mark.parametrize(
    ("table", "trigger", "statement"),
    [
        ("entry", "entry_at_insert", entries_like(seq="0")),
        ("account", "account_at_update", "UPDATE account SET balance = 100, last_seq = 0"),
        ("account", "account_at_update", "UPDATE account SET balance = 0, last_seq = -1"),
    ],
)
def test_a_table_refuses_numbers_below_1_without_its_trigger(
    bank: "Bank", table: str, trigger: str, statement: str
) -> None:
    bank.given(alice=100)
    with pytest.raises(REFUSED, match=r"(?i)CHECK"):
        bank.tamper(f"DROP TRIGGER {trigger} ON {table}", statement)


def test_the_database_keeps_customers_above_zero(bank: "Bank") -> None:
    bank.given(alice=100)
    below = entries_like(seq="2", type="'DEBIT'", amount="101", balance="-1")
    with pytest.raises(REFUSED, match=r"(?i)CHECK"):
        bank.tamper(
            f"{below} WHERE account_id = '{bank.ids['alice']}'",
            f"UPDATE account SET balance = -1, last_seq = 2 WHERE id = '{bank.ids['alice']}'",
        )


def new_account(kind: str, *, balance: str) -> str:
    """Return the statement that opens an account past the code."""
    columns = "id, owner_name, asset, status, balance, held, credit_limit, created_at, kind"
    values = f"'x', '', 'USD', 'ACTIVE', {balance}, 0, 0, 0, '{kind}'"
    columns, values = f"{columns}, last_seq", f"{values}, 0"
    return f"INSERT INTO account ({columns}) VALUES ({values})"


@on_sqlite
def test_sqlite_takes_no_fraction_for_an_amount(bank: "Bank") -> None:
    with pytest.raises(sqlite3.IntegrityError, match="REAL"):
        bank.tamper(new_account("SYSTEM", balance="0.5"))


# ----- Posting
# A post is checked as a whole before it changes anything; an operation that posts twice is undone
# as a whole.


def book_of(**balances: int) -> tuple[ledger.Book, dict[str, ledger.Account]]:
    """Return an open batch, and its accounts: some names say what is special about them."""
    book = ledger.Book(None)  # type: ignore[arg-type]
    accounts = [
        ledger.Account(
            id=name,
            owner_name=name,
            asset="EUR" if name == "euros" else "USD",
            kind="SYSTEM" if name == "cash" else "CUSTOMER",
            status={"frozen": "FROZEN", "closed": "CLOSED"}.get(name, "ACTIVE"),  # type: ignore[arg-type]
            balance=balance,
            last_seq=1,
            created_at=0,
        )
        for name, balance in balances.items()
    ]
    for account in accounts:
        book.remember(account)
    return book, {name: book.accounts[name] for name in balances}


@pytest.mark.parametrize(
    ("legs", "error"),
    [
        ({"alice": -5, "bob": 4}, ledger.Unbalanced),
        ({"alice": 0, "bob": 0}, ledger.Unbalanced),
        ({"alice": 0}, ledger.Unbalanced),
        ({}, ledger.Unbalanced),
        ({"alice": -5, "euros": 5}, ledger.Unbalanced),
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
    before = {"alice": 100, "bob": 0, "frozen": 100, "closed": 0, "euros": 9}
    before |= {"full": ledger.BALANCE_MAX, "cash": -ledger.BALANCE_MAX}
    book, accounts = book_of(**before)
    with pytest.raises(error):
        book.post("TEST", [ledger.Leg(accounts[name], amount) for name, amount in legs.items()])
    assert {name: account.balance for name, account in accounts.items()} == before
    assert not any(book.inserts.values())
    assert not any(book.updates.values())


def test_all_that_a_command_has_done_is_taken_back() -> None:
    before = {"alice": 100, "bob": 0}
    book, accounts = book_of(**before)
    book.post("TEST", [ledger.Leg(accounts["alice"], -5), ledger.Leg(accounts["bob"], 5)])
    book.take_back()
    assert {name: account.balance for name, account in accounts.items()} == before
    assert not any(book.inserts.values())
    assert not any(book.updates.values())


def test_a_post_of_many_legs_numbers_its_entries() -> None:
    book, accounts = book_of(alice=100, bob=0, carol=7)
    legs = {"alice": -100, "bob": 60, "carol": 40}
    book.post("TEST", [ledger.Leg(accounts[name], amount) for name, amount in legs.items()])
    columns = ("account_id", "seq", "type", "amount", "balance")
    assert [tuple(entry[name] for name in columns) for entry in book.inserts["entry"]] == [
        ("alice", 2, "DEBIT", 100, 0),
        ("bob", 2, "CREDIT", 60, 60),
        ("carol", 2, "CREDIT", 40, 47),
    ]
    balances = {name: account.balance for name, account in accounts.items()}
    assert balances == {"alice": 0, "bob": 60, "carol": 47}


def test_a_customers_balance_can_be_read_by_every_client(bank: "BankInside") -> None:
    bank.given(alice=0, bob=0)
    bank.execute(ledger.deposit, bank.ids["alice"], amount=2**53 - 1)
    assert refusal(bank.deposit("alice", 1)) == (409, "balance_limit")
    assert bank.transfer("alice", "bob", 1).status_code == 200
    assert refusal(bank.deposit("bob", 10**15 + 1)) == (422, "invalid_request")
    # Cash is the other side, and has room for many of them.
    bank.execute(ledger.deposit, bank.ids["bob"], amount=2**53 - 2)
    assert bank.balances() == {"alice": 2**53 - 2, "bob": 2**53 - 1}
    assert bank.wrong() == []


def open_with(book: ledger.Book, *, amount: int) -> None:
    """Open an account with any amount."""
    account = ledger.open_account(book, owner_name="rich", asset="USD")
    ledger.deposit(book, account.id, amount=amount)


def fill_cash(bank: "BankInside") -> list[Any]:
    """Let cash go as far below zero as it may; return the last answers."""
    # With 1,024 of the largest balances it stands at -2^63 + 1,024.
    amounts = [2**53 - 1] * 1_024 + [2**53 - 1, 1_024, 1_023]
    answers = bank.ledger.commit([command_of(open_with, amount=amount) for amount in amounts])
    assert {answer.status for answer in answers[:1_024]} == {200}
    return answers[1_024:]


def test_the_balance_of_cash_cannot_leave_64_bits(bank: "BankInside") -> None:
    answers = fill_cash(bank)
    assert [answer.status for answer in answers] == [409, 409, 200]
    assert json.loads(answers[1].body)["code"] == "balance_limit"
    assert bank.rows("SELECT min(balance) FROM account") == [(-(2**63) + 1,)]
    assert bank.wrong() == []


def dialect_that_overdraws(*, asks: bool) -> APIRouter:
    """Return a dialect of one operation, which deposits 5 and then withdraws far too much."""
    twice = APIRouter(prefix="/twice", route_class=ledger.LedgerRoute)

    @twice.post("/{account_id}", responses=ledger.refuses(*ledger.MOVING))
    def overdraw(book: ledger.ByAdmin, account_id: ledger.AccountId) -> ledger.AccountPublic:
        """Post twice; with `asks`, the database is asked in between."""
        account = ledger.deposit(book, account_id, amount=5)
        if asks:
            [row] = book.ask("SELECT balance FROM account WHERE id = :id", id=account_id)
            assert row["balance"] == account.balance
        return ledger.withdraw(book, account_id, amount=1_000)

    return twice


@pytest.mark.parametrize("asks", [False, True])
def test_an_operation_that_is_refused_at_its_second_post_leaves_nothing(
    database: str, asks: bool
) -> None:
    with opened(database, (ledger.api, dialect_that_overdraws(asks=asks))) as bank:
        overdraw = f"/twice/{bank.given(alice=100).ids['alice']}"
        before = bank.contents()
        refused = bank.post(overdraw, key="k")
        assert refusal(refused) == (409, "insufficient_funds")
        assert refused.json()["balance"] == 105  # The first post had been done by then.
        after = bank.contents()
        assert [name for name in after if after[name] != before[name]] == ["idempotency_key"]
        again = bank.post(overdraw, key="k")
        assert (again.content, again.headers["Idempotent-Replayed"]) == (refused.content, "true")
        assert bank.wrong() == []


@pytest.mark.parametrize("asks", [False, True])
def test_an_operation_that_is_refused_at_its_second_post_takes_nothing_from_its_neighbours(
    database: str, asks: bool
) -> None:
    with opened(database, (ledger.api, dialect_that_overdraws(asks=asks))) as bank:
        alice = bank.given(alice=100).ids["alice"]
        deposit = (f"/accounts/{alice}/deposit", {"amount": 1})
        answers = bank.together(deposit, (f"/twice/{alice}", {}), deposit)
        assert [outcome(answer) for answer in answers] == [200, "insufficient_funds", 200]
        assert bank.balances() == {"alice": 102}
        assert len(bank.statement("alice")) == 3
        assert bank.wrong() == []


# ----- Batches
# What arrives together is committed together, a key acts once, and nobody is answered before the
# commit. The last tests of the section load real servers, and kill them.


def test_what_arrives_together_is_one_commit(bank: "BankInside") -> None:
    deposit = command_of(ledger.deposit, bank.given(alice=100).ids["alice"], amount=1)

    async def arrive() -> list[ledger.Answer]:
        return await asyncio.gather(*map(bank.ledger.submit, [deposit] * 20))

    assert {answer.status for answer in bank.runner.run(arrive())} == {200}
    assert bank.balances() == {"alice": 120}
    assert bank.rows("SELECT COUNT(DISTINCT ts) FROM event WHERE kind = 'DEPOSIT'") == [(2,)]


def test_a_refused_command_does_not_disturb_its_neighbours(bank: "BankInside") -> None:
    path = f"/accounts/{bank.given(alice=10).ids['alice']}"
    answers = bank.together(
        (f"{path}/deposit", {"amount": 5}),
        (f"{path}/withdraw", {"amount": 16}),
        (f"{path}/withdraw", {"amount": 15}),
        (f"/accounts/{NOBODY}/deposit", {"amount": 1}),
    )
    assert [outcome(answer) for answer in answers] == [
        200, "insufficient_funds", 200, "account_not_found",
    ]  # fmt: skip
    assert bank.balances() == {"alice": 0}
    assert bank.wrong() == []


def test_a_command_that_the_database_refuses_sinks_alone(database: str) -> None:
    faulty = APIRouter(prefix="/faulty", route_class=ledger.LedgerRoute)
    faults = ["a row that breaks a constraint"]

    @faulty.post("/{account_id}")
    def post_badly(book: ledger.ByAdmin, account_id: ledger.AccountId) -> ledger.AccountPublic:
        """Deposit, and write what no table takes, as long as there are faults."""
        for fault in faults:
            columns = ("name", "prefix", "hash", "role", "created_at", "revoked_at")
            book.insert("api_key", dict.fromkeys(columns) | {"name": fault})
        return ledger.deposit(book, account_id, amount=1)

    with opened(database, (ledger.api, faulty)) as bank:
        alice = bank.given(alice=0).ids["alice"]
        good = (f"/accounts/{alice}/deposit", {"amount": 1})
        bad: Any = (f"/faulty/{alice}", {}, "k")
        answers = bank.together(good, bad, good, good)
        assert [answer.status_code for answer in answers] == [200, 500, 200, 200]
        # To try it again would be of no use.
        assert refusal(answers[1]) == (500, "internal_error")
        # The error of the database was not stored as an answer: the key is still good.
        faults.clear()
        assert [answer.json()["balance"] for answer in bank.together(bad, good)] == [4, 5]


def test_a_change_that_would_not_be_written_is_refused(bank: "BankInside") -> None:
    def rename(book: ledger.Book) -> None:
        book.change("account", vars(book.account(bank.ids["alice"])), asset="EUR")

    bank.given(alice=5)
    [outcome] = bank.ledger.commit_or_split([ledger.Command("test", "{}", rename)])
    assert isinstance(outcome, LookupError)
    assert bank.wrong() == []


def test_a_batch_may_be_large(bank: "BankInside") -> None:
    command = command_of(ledger.deposit, bank.given(alice=0).ids["alice"], amount=1)
    answers = bank.ledger.commit([command._replace(key=f"k{n}") for n in range(2_000)])
    assert {answer.status for answer in answers} == {200}
    assert bank.balances() == {"alice": 2_000}


def test_a_repeated_key_moves_money_once(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    answers = [bank.transfer("alice", "bob", 10, key="once") for _ in range(3)]
    assert len({answer.content for answer in answers}) == 1
    assert ["Idempotent-Replayed" in answer.headers for answer in answers] == [False, True, True]
    assert bank.balances() == {"alice": 90, "bob": 10}


def test_a_key_that_is_repeated_within_one_batch_acts_once(
    bank: "BankInside", caplog: pytest.LogCaptureFixture
) -> None:
    deposit = f"/accounts/{bank.given(alice=0).ids['alice']}/deposit"
    answers = bank.together(*[(deposit, {"amount": 10}, "once")] * 40)
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" in answer.headers for answer in answers) == 39
    assert bank.balances() == {"alice": 10}
    # The batch saw it itself; it did not fall apart on the database's constraint.
    assert not caplog.records


def test_a_refusal_is_an_answer_and_is_replayed(bank: "Bank") -> None:
    refused = bank.given(alice=5).withdraw("alice", 10, key="k")
    bank.deposit("alice", 100)
    again = bank.withdraw("alice", 10, key="k")
    assert refusal(again) == (409, "insufficient_funds")
    assert again.content == refused.content
    assert again.headers["Idempotent-Replayed"] == "true"


def test_an_opening_is_replayed_with_its_location(bank: "Bank") -> None:
    first, again = (bank.post("/accounts", key="k", owner_name="Alice") for _ in range(2))
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Location"] == first.headers["Location"]
    assert bank.balances() == {"Alice": 0}


def test_a_request_that_never_reached_the_books_leaves_its_key_free(bank: "Bank") -> None:
    bank.given(alice=0)
    assert bank.deposit("alice", -1, key="k").status_code == 422
    assert bank.deposit("alice", 1, key="k", memmo="typo").status_code == 422
    assert bank.deposit("alice", 1, key="k").json()["balance"] == 1


def test_arguments_are_compared_after_parsing(bank: "Bank") -> None:
    path = f"/accounts/{bank.given(alice=0).ids['alice']}/deposit"
    bodies = ['{"amount":1,"memo":"x"}', '{ "memo" : "\\u0078",\n"amount": 1 }']
    answers = [bank.send_raw(path, body, key) for body in bodies for key in ("k", '"k"')]
    assert {answer.content for answer in answers} == {answers[0].content}
    assert bank.deposit("alice", 1, key="j").json()["balance"] == 2
    assert bank.deposit("alice", 1, key="j", memo=None).json()["balance"] == 2


@pytest.mark.parametrize(
    "other", [{"amount": 2}, {"amount": 1, "memo": "x"}, {"amount": 1, "memo": ""}]
)
def test_a_key_with_other_arguments_is_refused(bank: "Bank", other: dict[str, Any]) -> None:
    first = bank.given(alice=0, bob=0).deposit("alice", 1, key="k")
    refused = bank.post(first.request.url.path, key="k", **other)
    assert refusal(refused) == (409, "idempotency_key_reused")
    assert refusal(bank.deposit("bob", 1, key="k")) == (409, "idempotency_key_reused")
    assert bank.deposit("alice", 1, key="k").content == first.content
    assert bank.balances() == {"alice": 1, "bob": 0}


def test_a_key_belongs_to_its_operation(bank: "Bank") -> None:
    bank.given(alice=10)
    assert bank.deposit("alice", 5, key="k").json()["balance"] == 15
    assert bank.withdraw("alice", 5, key="k").json()["balance"] == 10


def test_stored_keys_of_different_callers_cannot_collide() -> None:
    def stored(caller: str, key: str) -> str:
        return ledger.stored_key(caller, "POST /x", key)

    assert stored("jwt:a", "b|POST /x|c") != stored("jwt:a|POST /x|b", "c")
    assert stored("jwt:a|", "b") != stored("jwt:a%7C", "b")


def test_every_change_leaves_one_event(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    bank.transfer("alice", "bob", 10, key="k", memo="rent")
    bank.transfer("alice", "bob", 10, key="k", memo="rent")
    bank.withdraw("bob", 999)
    events = bank.rows("SELECT kind, account_id, id, arguments FROM event ORDER BY id")
    assert [event[:2] for event in events] == [
        ("open_account", bank.ids["alice"]),
        ("DEPOSIT", bank.ids["alice"]),
        ("open_account", bank.ids["bob"]),
        ("TRANSFER", bank.ids["alice"]),
    ]
    assert events[-1][2] == bank.statement("bob")[0]["transaction_id"]
    assert json.loads(events[-1][3])["body"]["memo"] == "rent"
    assert bank.callers() == ["local"] * 4


def test_event_loops_in_several_threads_share_one_ledger(bank: "BankInside") -> None:
    deposit = (f"/accounts/{bank.given(alice=0).ids['alice']}/deposit", {"amount": 1})

    def deposit_ten_times() -> None:
        with inside(bank.app, bank.database) as other:
            answers = other.together(*[deposit] * 10)
            assert {answer.status_code for answer in answers} == {200}

    at_once([deposit_ten_times] * 8)
    assert bank.balances() == {"alice": 80}


def test_200_parallel_deposits_of_1_leave_200(servers: "Bank") -> None:
    servers.given(ada=0)
    answers = at_once([lambda: servers.deposit("ada", 1)] * 200)
    assert Counter(answer.status_code for answer in answers) == {200: 200}
    assert servers.balances()["ada"] == 200


def test_40_parallel_withdrawals_of_10_from_50_succeed_5_times(servers: "Bank") -> None:
    servers.given(bea=50)
    answers = at_once([lambda: servers.withdraw("bea", 10)] * 40)
    assert Counter(map(outcome, answers)) == {200: 5, "insufficient_funds": 35}
    assert servers.balances()["bea"] == 0


def test_40_parallel_withdrawals_of_10_from_50_with_a_limit_of_100_succeed_15_times(
    servers: "Bank",
) -> None:
    servers.given(ben=50)
    assert change(servers, "ben", credit_limit=100).status_code == 200
    answers = at_once([lambda: servers.withdraw("ben", 10)] * 40)
    assert Counter(map(outcome, answers)) == {200: 15, "insufficient_funds": 25}
    assert servers.funds("ben") == (-100, 0, 0)


def test_a_limit_that_is_lowered_while_transfers_run_is_never_exceeded(servers: "Bank") -> None:
    servers.given(lena=0, luca=1_000)
    limits = itertools.cycle((100, 60, 0))
    seen = []

    def set_limit() -> None:
        answer = change(servers, "lena", credit_limit=next(limits))
        assert outcome(answer) in (200, "credit_limit_in_use")
        seen.append(servers.get(f"/accounts/{servers.ids['lena']}").json())

    def lend(source: str, dest: str) -> None:
        answer = servers.transfer(source, dest, random.randint(1, 70))
        assert outcome(answer) in (200, "insufficient_funds")

    pay, repay = partial(lend, "lena", "luca"), partial(lend, "luca", "lena")
    with meanwhile(set_limit, pay, pay, repay):
        wait_until(lambda: len({each["balance"] for each in seen[:]}) > 20)
    assert all(each["balance"] >= -each["credit_limit"] for each in seen)
    assert min(each["balance"] for each in seen) < 0
    # It finds each entry that stood below the limit of its time.
    assert servers.wrong() == []


def test_40_parallel_requests_with_one_key_act_once(servers: "Bank") -> None:
    servers.given(cleo=0)
    answers = at_once([partial(servers.deposit, "cleo", 7, key=new_key())] * 40)
    assert len({answer.content for answer in answers}) == 1
    assert sum("Idempotent-Replayed" not in answer.headers for answer in answers) == 1
    assert servers.balances()["cleo"] == 7


def test_two_openings_with_one_key_at_one_moment_act_once(servers: "Bank") -> None:
    for number in range(20):
        # No account is named, so that nothing but the key itself keeps them apart.
        twin = {"owner_name": f"twin {number}"}
        first, second = at_once([partial(servers.post, "/accounts", key=new_key(), **twin)] * 2)
        assert (first.status_code, first.content) == (201, second.content)
        assert len(servers.get("/accounts", **twin).json()["items"]) == 1


def test_40_parallel_holds_of_10_from_50_succeed_5_times(servers: "Bank") -> None:
    servers.given(eva=50, fay=0)
    answers = at_once([lambda: servers.hold("eva", "fay", 10)] * 40)
    assert Counter(map(outcome, answers)) == {201: 5, "insufficient_funds": 35}
    assert servers.funds("eva") == (50, 50, 0)


def test_of_40_parallel_captures_one_wins(servers: "Bank") -> None:
    servers.given(gil=50, hal=0)
    hold = servers.promised("gil", "hal", 40)
    answers = at_once([lambda: servers.capture(hold, amount=30)] * 40)
    codes = Counter(answer.json().get("code", "done") for answer in answers)
    assert codes == {"done": 1, "hold_captured": 39}
    assert (servers.funds("gil"), servers.funds("hal")) == ((20, 0, 20), (30, 0, 30))


def test_of_40_parallel_captures_and_voids_one_wins(servers: "Bank") -> None:
    servers.given(ian=50, joe=0)
    hold = servers.promised("ian", "joe", 40)
    answers = at_once([partial(end, hold) for end in (servers.capture, servers.void) * 20])
    [won] = [answer.json() for answer in answers if answer.status_code == 200]
    lost = Counter(answer.json().get("code") for answer in answers if answer.status_code != 200)
    assert lost == {f"hold_{won['status'].lower()}": 39}
    moved = won["captured_amount"]
    assert moved == {"CAPTURED": 40, "VOIDED": 0}[won["status"]]
    assert servers.funds("ian") == (50 - moved, 0, 50 - moved)
    assert servers.wrong() == []


def test_captures_and_reversals_in_both_directions_all_get_through(servers: "Bank") -> None:
    servers.given(ola=100, pia=100)
    ends = [("ola", "pia"), ("pia", "ola")] * 10
    act: list[Callable[[], httpx.Response]] = []
    for source, dest in ends:
        transfer = servers.transfer(source, dest, 2).json()["transfer_id"]
        act += [partial(servers.capture, servers.promised(source, dest, 2))]
        act += [partial(servers.reverse, transfer)]
    answers = at_once(act)
    assert Counter(answer.status_code for answer in answers) == {200: 20, 201: 20}
    assert servers.funds("ola") == servers.funds("pia") == (100, 0, 100)
    assert servers.wrong() == []


def test_captures_and_voids_meet_the_moment_of_expiry(servers: "Bank") -> None:
    servers.given(kim=0, leo=0)
    ways, lasting = [(servers.capture, "CAPTURED"), (servers.void, "VOIDED")], itertools.count(1)
    ended: Counter[str] = Counter()

    def end(number: int, hold: dict[str, Any]) -> str:
        # The first come in time and the last too late; those in between meet the moment itself.
        at = ledger.parse_time(hold["expires_at"]) / 1_000_000 + (number - 10) / 50
        time.sleep(max(0, at - time.time()))
        way, status = ways[number % 2]
        answered = outcome(way(hold["id"]))
        shown = str(servers.get(f"/holds/{hold['id']}").json()["status"])
        assert (answered, shown) in ((200, status), ("hold_expired", "EXPIRED"))
        return shown

    def some_came_in_time_and_some_did_not() -> bool:
        # On a busy machine all may be too late: then the next ones last longer.
        servers.deposit("kim", 200)
        for_so_long = {"expires_in": next(lasting)}
        holds = [servers.hold("kim", "leo", 10, **for_so_long).json() for _ in range(20)]
        now = at_once([partial(end, number, hold) for number, hold in enumerate(holds)])
        ended.update(now)
        return set(now) == {"CAPTURED", "VOIDED", "EXPIRED"}

    wait_until(some_came_in_time_and_some_did_not)
    left = 10 * (ended["VOIDED"] + ended["EXPIRED"])
    assert servers.funds("kim") == (left, 0, left)
    assert servers.withdraw("kim", left).status_code == 200
    assert servers.wrong() == []


def test_holds_and_a_close_at_one_moment_respect_each_other(servers: "Bank") -> None:
    servers.given(quy=50, ron=0)
    hold, close = partial(servers.hold, "quy", "ron", 1), partial(servers.step, "ron", "close")
    answers = at_once([hold, close] * 10)
    codes = Counter(answer.json().get("code", "done") for answer in answers)
    held = servers.funds("quy")[1]
    # Either the first close came before all holds, or none came through.
    closed = {"done": 1, "account_closed": 10, "invalid_state_transition": 9}
    assert codes == (closed if held == 0 else {"done": 10, "holds_pending": 10})
    assert held in (0, 10)
    assert servers.wrong() == []


def test_of_40_parallel_reversals_one_wins(servers: "Bank") -> None:
    servers.given(mia=50, ned=100)
    transfer = servers.transfer("mia", "ned", 20).json()["transfer_id"]
    answers = at_once([lambda: servers.reverse(transfer)] * 40)
    assert Counter(answer.status_code for answer in answers) == {201: 1, 409: 39}
    [won] = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    lost = [answer.json() for answer in answers if answer.status_code == 409]
    assert {(each["code"], each["reversed_by"]) for each in lost} == {("already_reversed", won)}
    assert (servers.funds("mia"), servers.funds("ned")) == ((50, 0, 50), (100, 0, 100))
    assert servers.wrong() == []


def test_a_ring_of_transfers_keeps_its_total_at_every_moment(servers: "Bank") -> None:
    names = [f"ring {number}" for number in range(8)]
    servers.given(dict.fromkeys(names, 100))
    seen: list[tuple[int, ...]] = []

    def look() -> None:
        balances = servers.balances()
        seen.append(tuple(balances[name] for name in names))

    def pass_on(number: int) -> None:
        source, dest = names[number % 8], names[(number + 1) % 8]
        answer = servers.transfer(source, dest, random.randint(1, 60))
        assert outcome(answer) in (200, "insufficient_funds")

    with meanwhile(look, look, *[partial(pass_on, number) for number in range(32)]):
        # Until it was seen at many moments, each of which was another one.
        wait_until(lambda: len(set(seen)) > 20)
    look()
    assert {sum(balances) for balances in seen} == {800}
    assert min(map(min, seen)) >= 0


def test_an_answer_goes_out_only_after_the_commit(servers: "Bank") -> None:
    servers.given(dora=0)

    def deposit_and_look() -> None:
        key = new_key()
        assert servers.deposit("dora", 1, key=key).status_code == 200
        stored = servers.rows(f"SELECT status FROM idempotency_key WHERE name LIKE '%|{key}'")
        assert stored == [(200,)]

    at_once([deposit_and_look] * 20)


def test_nothing_is_lost_and_nothing_happens_twice_however_often_it_dies(database: str) -> None:
    options = ("--cycles", str(CYCLES), "--database-url", database)
    assert re.search(r"\b0 wrong\b", prove("crash.py", *options))
    assert ledger.main(["check", "--database-url", database]) == 0


watching = pytest.mark.skipif(
    not (sys.platform == "linux" and shutil.which("gcc")), reason="a disk is watched on Linux, by C"
)


@watching
def test_a_power_cut_loses_nothing_that_was_answered() -> None:
    assert "; 0 lost something" in prove("powercut.py", "--cuts", "12", "--load", "0.05")


@watching
def test_a_failing_disk_loses_nothing_that_was_answered() -> None:
    options = ["--cases", "4", "--each", "0.1", "--slowest", "50"]
    said = prove("disk.py", *options, "--seed", str(random.randrange(1_000)))
    assert re.search(r"\b4 of 13 cases, .*; 0 wrong$", said)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no forks")
def test_a_change_of_the_program_is_seen() -> None:
    options = ["--only", ": digits is None -> (digits is not None)", "--at-once", "1"]
    options += ["--tests", "test_minor_units_and_decimal_text_are_two_forms_of_one_amount"]
    assert prove("mutants.py", *options).endswith(": 1 seen, 0 not seen")


@watching
@pytest.mark.skipif(CYCLES <= 3, reason="it takes some tries, and so some time")
@pytest.mark.parametrize(
    ("program", "options", "broken"),
    [
        ("crash.py", "--cycles 100 --servers 1", "key-apart"),
        ("crash.py", "--cycles 100 --servers 1", "early-answer"),
        ("powercut.py", "--cuts 100", "key-apart"),
        ("powercut.py", "--cuts 40", "early-answer"),
        ("powercut.py", "--cuts 40", "synchronous-normal"),
        ("disk.py", "--each 1 --slowest 1000", "early-answer"),
    ],
)
def test_the_programs_of_proof_see_what_is_broken(program: str, options: str, broken: str) -> None:
    prove(program, *options.split(), "--broken", broken, status=1)


def load_until_killed(server: "Server", act: Callable[[], Any], most: int) -> None:
    """Act over 8 connections, until `kill -9` after some of it was answered."""
    answered: list[None] = []
    enough = random.randint(1, most)

    def act_on() -> None:
        with suppress(httpx.TransportError):
            while True:
                act()
                answered.append(None)

    def kill() -> None:
        try:
            wait_until(lambda: len(answered) >= enough)
        finally:
            server.process.kill()

    at_once([kill, *[act_on] * 8])


# ----- Operations
# Money comes in, moves, is paid, goes out and is taken back; accounts open, freeze and close.


def test_an_account_is_opened_in_its_asset(bank: "Bank") -> None:
    for asset in ("USD", "EUR", "GBP", "JPY"):
        opened = bank.post("/accounts", owner_name="Alice", asset=asset)
        assert (opened.status_code, opened.json()["asset"]) == (201, asset)


def test_a_closed_loop_asset_is_not_for_everybody(bank: "Bank") -> None:
    for asset in ("GOLD", "DMND", "PTS"):
        refused = bank.post("/accounts", owner_name="Alice", asset=asset)
        assert refusal(refused) == (409, "asset_closed_loop")


def add_asset(bank: "Bank", code: str, **columns: Any) -> httpx.Response:
    """Add an asset of one's own."""
    return bank.post("/assets", **{"code": code, "name": code.title(), "exponent": 8, **columns})


def test_an_asset_of_ones_own_is_used_as_any_other(servers: "Bank") -> None:
    added = add_asset(servers, "BTC", name="Bitcoin")
    shown = {"code": "BTC", "name": "Bitcoin", "exponent": 8, "closed_loop": False}
    assert (added.status_code, added.json()) == (201, shown)
    assert servers.get(added.headers["Location"]).json() == shown
    # At once, for every operation of its kind, on each server.
    servers.given(asset="BTC", nils=100, nora=0)
    assert servers.withdraw("nils", 10).json()["asset"] == "BTC"
    assert servers.transfer("nils", "nora", 20).status_code == 200
    hold = servers.promised("nils", "nora", 20)
    assert servers.capture(hold).status_code == 200
    assert servers.journal({"nora": -5, "nils": 5}).status_code == 201
    assert servers.pay("nora", 5).json()["cashback"]["amount"] == 0
    assert servers.reverse(servers.last("nora")).status_code == 201
    assert change(servers, "nora", credit_limit=7).json()["available"] == 42
    assert refusal(servers.post(top_up_of(servers, "nora"), amount=1, key=new_key())) == (
        409,
        "asset_open_loop",
    )
    [total] = [each for each in servers.get("/balances").json()["items"] if each["asset"] == "BTC"]
    system = {"cash": -90, "cashback": 0, "merchants": 0}
    assert total == {"asset": "BTC", "customers": 90, "system": system, "total": 0}
    assert refusal(add_asset(servers, "BTC")) == (409, "asset_exists")
    assert refusal(add_asset(servers, "JPY")) == (409, "asset_exists")
    assert servers.wrong() == []


def top_up_of(bank: "Bank", name: str) -> str:
    """Return where an account is topped up."""
    return f"/accounts/{bank.ids[name]}/top-up"


def test_a_closed_loop_asset_of_ones_own_is_issued_given_and_spent(bank: "Bank") -> None:
    assert add_asset(bank, "MILES", exponent=0, closed_loop=True).json()["closed_loop"] is True
    for name in ("alice", "bob"):
        opened = bank.post("/accounts", owner_name=name, asset="MILES")
        assert opened.status_code == 201
        bank.ids[name] = opened.json()["id"]

    def move(how: str, amount: int) -> Any:
        path = f"/accounts/{bank.ids['alice']}/{how}"
        return bank.post(path, key=new_key(), amount=amount, memo=how)

    assert [move(how, 50).json()["balance"] for how in ("top-up", "bonus", "spend")] == [
        50,
        100,
        50,
    ]
    assert [(line["kind"], line["ref"]) for line in bank.statement("alice")] == [
        ("SPEND", "spend"),
        ("BONUS", "bonus"),
        ("TOP_UP", "top-up"),
    ]
    owing = bank.post("/accounts", owner_name="eve", asset="MILES", credit_limit=5)
    assert refusal(owing) == (409, "asset_closed_loop")
    refused = move("spend", 51)
    assert (*refusal(refused), refused.json()["requested"]) == (409, "insufficient_funds", 51)
    for answer in (
        bank.deposit("alice", 1),
        bank.withdraw("alice", 1),
        bank.pay("alice", 1),
        bank.transfer("alice", "bob", 1),
        bank.journal({"alice": -1, "bob": 1}),
        bank.hold("alice", "bob", 1),
        change(bank, "alice", credit_limit=1),
    ):
        assert refusal(answer) == (409, "asset_closed_loop")
    assert bank.rows("SELECT balance FROM account WHERE asset = 'MILES' AND name = 'treasury'") == [
        (-50,)
    ]
    assert bank.reverse(bank.last("alice")).status_code == 201
    assert bank.wrong() == []


def test_an_asset_and_its_first_account_may_share_a_batch(bank: "BankInside") -> None:
    asset = {"code": "X", "name": "X", "exponent": 0}
    account = ("/accounts", {"owner_name": "alice", "asset": "X"})
    answers = bank.together(account, ("/assets", asset), ("/assets", asset), account)
    assert [outcome(answer) for answer in answers] == ["asset_not_found", 201, "asset_exists", 201]
    assert answers[3].json()["asset"] == "X"
    assert bank.wrong() == []


def test_of_20_who_add_an_asset_at_one_moment_one_does(servers: "Bank") -> None:
    for code in ("ONCE", "ONCE.2", "ONCE.3"):
        answers = at_once([partial(add_asset, servers, code)] * 20)
        assert Counter(map(outcome, answers)) == {201: 1, "asset_exists": 19}
        query = f"SELECT name FROM account WHERE asset = '{code}' ORDER BY name"
        assert servers.rows(query) == [("cash",), ("cashback",), ("merchants",)]


def test_an_unknown_asset_is_not_found(bank: "Bank") -> None:
    assert refusal(bank.get("/assets/usd")) == (404, "asset_not_found")
    refused = bank.post("/accounts", owner_name="Alice", asset="usd")
    assert refusal(refused) == (404, "asset_not_found")


@pytest.mark.parametrize(
    ("operation", "names", "kind", "legs"),
    [
        ("deposit", ["alice"], "DEPOSIT", [("system", "DEBIT"), ("alice", "CREDIT")]),
        ("withdraw", ["alice"], "WITHDRAWAL", [("alice", "DEBIT"), ("system", "CREDIT")]),
        ("transfer", ["alice", "bob"], "TRANSFER", [("alice", "DEBIT"), ("bob", "CREDIT")]),
        ("pay", ["alice"], "PAYMENT", [("alice", "DEBIT"), ("system", "CREDIT")]),
    ],
)
def test_an_operation_is_a_balanced_transaction(
    bank: "Bank", operation: str, names: list[str], kind: str, legs: list[tuple[str, str]]
) -> None:
    bank.given(alice=100, bob=0)
    getattr(bank, operation)(*names, 7, memo="why")
    shown = bank.get(f"/transactions/{bank.statement('alice')[0]['transaction_id']}").json()
    entries = [
        (bank.get(f"/accounts/{entry['account_id']}").json()["owner_name"], entry["type"])
        for entry in shown["entries"]
    ]
    assert (shown["kind"], shown["memo"], entries) == (kind, "why", legs)
    assert {entry["amount"] for entry in shown["entries"]} == {7}


def test_money_of_one_asset_cannot_become_another(bank: "Bank") -> None:
    bank.given(alice=100).given(asset="EUR", claire=100)
    assert refusal(bank.transfer("alice", "claire", 1)) == (409, "asset_mismatch")
    assert bank.balances() == {"alice": 100, "claire": 100}


def test_cash_is_kept_for_each_asset(bank: "Bank") -> None:
    bank.given(alice=100).given(asset="EUR", claire=30).given(asset="JPY", kenji=7)
    cash = bank.rows("SELECT asset, balance FROM account WHERE name = 'cash' ORDER BY asset")
    assert cash == [("EUR", -30), ("GBP", 0), ("JPY", -7), ("USD", -100)]


def test_a_transfer_to_itself_is_refused_before_anything_is_looked_up(bank: "Bank") -> None:
    bank.ids = {"nobody": NOBODY}
    refused = bank.transfer("nobody", "nobody", 1)
    assert refusal(refused) == (400, "same_account")
    assert refused.json()["detail"] == "Cannot transfer to the same account"


def test_nobody_can_name_a_system_account(bank: "Bank") -> None:
    bank.given(alice=100)
    [(cash,)] = bank.rows("SELECT id FROM account WHERE name = 'cash' AND asset = 'USD'")
    bank.ids["cash"] = cash
    for answer in (
        bank.deposit("cash", 1),
        bank.withdraw("cash", 1),
        bank.pay("cash", 1),
        bank.transfer("alice", "cash", 1),
        bank.transfer("cash", "alice", 1),
        bank.step("cash", "freeze"),
        bank.step("cash", "close"),
    ):
        assert refusal(answer) == (404, "account_not_found")
    # It can be read, but it stands in no list.
    assert bank.get(f"/accounts/{cash}").json()["balance"] == -100
    assert bank.statement("cash")[0]["type"] == "DEBIT"
    assert bank.get("/accounts", name="cash").json()["items"] == []
    assert bank.balances() == {"alice": 100}


@pytest.mark.parametrize("status", ["FROZEN", "CLOSED"])
def test_an_account_that_is_not_active_moves_no_money(bank: "Bank", status: str) -> None:
    bank.given(alice=100, bob=0)
    bank.step("bob", {"FROZEN": "freeze", "CLOSED": "close"}[status])
    for answer in (
        bank.deposit("bob", 1),
        bank.withdraw("bob", 1),
        bank.pay("bob", 1),
        bank.transfer("alice", "bob", 1),
        bank.transfer("bob", "alice", 1),
    ):
        assert refusal(answer) == (409, f"account_{status.lower()}")
    assert bank.balances() == {"alice": 100, "bob": 0}


@pytest.mark.parametrize(
    ("steps", "last", "status"),
    [
        ([], "freeze", "FROZEN"),
        ([], "unfreeze", "No account goes from ACTIVE to ACTIVE"),
        ([], "close", "CLOSED"),
        (["freeze"], "freeze", "No account goes from FROZEN to FROZEN"),
        (["freeze"], "unfreeze", "ACTIVE"),
        (["freeze"], "close", "CLOSED"),
        (["close"], "freeze", "No account goes from CLOSED to FROZEN"),
        (["close"], "unfreeze", "No account goes from CLOSED to ACTIVE"),
        (["close"], "close", "No account goes from CLOSED to CLOSED"),
    ],
)
def test_an_account_goes_from_state_to_state(
    bank: "Bank", steps: list[str], last: str, status: str
) -> None:
    bank.given(alice=0)
    for step in steps:
        assert bank.step("alice", step).status_code == 200
    answer = bank.step("alice", last)
    if status.isupper():
        assert answer.json()["status"] == status
    else:
        assert refusal(answer) == (409, "invalid_state_transition")
        assert answer.json()["detail"] == status
    assert bank.wrong() == []


def test_only_an_empty_account_can_be_closed(bank: "Bank") -> None:
    bank.given(alice=100)
    refused = bank.step("alice", "close")
    assert refusal(refused) == (409, "account_not_empty")
    assert refused.json()["balance"] == 100
    bank.step("alice", "freeze")
    assert refusal(bank.step("alice", "close")) == (409, "account_not_empty")
    bank.step("alice", "unfreeze")
    bank.withdraw("alice", 100)
    assert bank.step("alice", "close").json()["status"] == "CLOSED"


def test_an_account_owes_up_to_its_limit_and_nothing_more(bank: "Bank") -> None:
    opened = bank.post("/accounts", owner_name="alice", credit_limit=100).json()
    bank.given(bob=0).ids["alice"] = opened["id"]
    assert (opened["credit_limit"], opened["available"]) == (100, 100)
    hold = bank.promised("alice", "bob", 20)
    assert bank.transfer("alice", "bob", 30).json()["source"]["available"] == 50
    for refused in (
        bank.withdraw("alice", 51),
        bank.pay("alice", 51),
        bank.transfer("alice", "bob", 51),
        bank.journal({"alice": -51, "bob": 51}),
        bank.hold("alice", "bob", 51),
    ):
        assert refusal(refused) == (409, "insufficient_funds")
        told = {name: refused.json()[name] for name in ("balance", "available", "credit_limit")}
        assert told == {"balance": -30, "available": 50, "credit_limit": 100}
    assert bank.withdraw("alice", 50).json()["balance"] == -80
    assert bank.capture(hold).status_code == 200
    assert bank.funds("alice") == (-100, 0, 0)
    # Who owes pays back in parts, and is not gone before.
    bank.deposit("alice", 1)
    refused = bank.step("alice", "close")
    assert (*refusal(refused), refused.json()["balance"]) == (409, "account_not_empty", -99)
    assert bank.wrong() == []


def test_a_limit_below_what_is_in_use_is_refused(bank: "Bank") -> None:
    bank.given(alice=10, bob=0)
    assert change(bank, "alice", credit_limit=100).json()["available"] == 110
    bank.promised("alice", "bob", 20)
    bank.withdraw("alice", 50)
    refused = change(bank, "alice", credit_limit=59)
    assert refusal(refused) == (409, "credit_limit_in_use")
    told = {name: refused.json()[name] for name in ("balance", "held", "available")}
    assert told == {"balance": -40, "held": 20, "available": 40}
    assert change(bank, "alice", credit_limit=60).json()["available"] == 0
    assert bank.deposit("alice", 60).json()["available"] == 60
    assert change(bank, "alice", credit_limit=0).json()["available"] == 0
    assert bank.wrong() == []


def test_what_is_issued_is_not_owed(demo: "Bank") -> None:
    wallet = demo.get("/accounts", name="wallets:user_alice").json()["items"][0]
    demo.ids["wallet"] = wallet["id"]
    for limit in (0, 1):
        refused = change(demo, "wallet", credit_limit=limit)
        assert refusal(refused) == (409, "asset_closed_loop")


def test_a_limit_is_an_event_with_both_values(bank: "Bank") -> None:
    bank.given(alice=0)
    for limit in (100, 40):
        change(bank, "alice", credit_limit=limit, owner_name="alice")
    lowered, raised, _ = bank.get("/audit").json()["items"]
    assert (raised["action"], raised["account_id"]) == ("update_account", bank.ids["alice"])
    for event, before, after in ((raised, 0, 100), (lowered, 100, 40)):
        assert event["details"]["before"] == {"credit_limit": before}
        assert event["details"]["body"]["credit_limit"] == after
    *_, opened, _, told = bank.get("/events").json()["items"]
    assert opened["data"]["credit_limit"] == 0
    asked = {"id": bank.ids["alice"], "owner_name": "alice", "credit_limit": 40}
    assert (told["type"], told["data"]) == ("account.updated", asked)


def test_a_limit_and_what_needs_it_may_share_a_batch(bank: "BankInside") -> None:
    path = f"/accounts/{bank.given(alice=0).ids['alice']}"
    credit = partial(ledger.change_account, reference=bank.ids["alice"])
    take = partial(ledger.withdraw, reference=bank.ids["alice"])
    give = partial(ledger.deposit, reference=bank.ids["alice"])
    steps = [(take, 10), (credit, 20), (take, 15), (credit, 14), (give, 15), (credit, 0), (take, 1)]
    commands = [
        command_of(step, **{"credit_limit" if step is credit else "amount": value})
        for step, value in steps
    ]
    answers = bank.ledger.commit(commands)
    assert [answer.status for answer in answers] == [409, 200, 200, 409, 200, 200, 409]
    assert bank.get(path).json()["balance"] == 0
    assert bank.wrong() == []


def test_of_two_changes_of_state_at_one_moment_one_wins(bank: "BankInside") -> None:
    path = f"/accounts/{bank.given(alice=0).ids['alice']}/freeze"
    answers = bank.together((path, {}), (path, {}))
    assert [outcome(answer) for answer in answers] == [200, "invalid_state_transition"]


def test_a_batch_may_unfreeze_an_account_and_move_its_money(bank: "BankInside") -> None:
    bank.given(alice=5).step("alice", "freeze")
    path = f"/accounts/{bank.ids['alice']}"
    answers = bank.together(
        (f"{path}/deposit", {"amount": 1}),
        (f"{path}/unfreeze", {}),
        (f"{path}/deposit", {"amount": 2}),
        (f"{path}/freeze", {}),
        (f"{path}/withdraw", {"amount": 3}),
    )
    frozen = "account_frozen"
    assert [outcome(answer) for answer in answers] == [frozen, 200, 200, 200, frozen]
    assert len(set(bank.rows("SELECT ts FROM event ORDER BY id DESC LIMIT 3"))) == 1
    assert bank.get(path).json()["status"] == "FROZEN"
    assert bank.balances() == {"alice": 7}
    assert bank.wrong() == []


def test_a_payment_brings_back_2_percent_after_24_hours(bank: "BankInside") -> None:
    bank.given(alice=1_000).pass_time(0)
    payment = bank.pay("alice", 199, memo="shoes").json()
    assert payment["account"]["balance"] == 801
    due_at = ledger.utc_text(ledger.utc_now() + DAY)
    assert payment["cashback"] == {"amount": 3, "due_at": due_at, "status": "SCHEDULED"}
    path = f"/payments/{payment['payment_id']}"
    assert bank.get(path).json() == payment
    bank.pass_time(DAY - 1)
    assert bank.balances() == {"alice": 801}
    bank.pass_time(1)
    bank.pass_time(DAY)
    assert bank.balances() == {"alice": 804}
    later = bank.get(path).json()
    assert (later["cashback"]["status"], later["account"]["balance"]) == ("CREDITED", 804)


def test_a_cashback_is_an_entry_that_names_its_payment(bank: "BankInside") -> None:
    payment = bank.given(alice=100).pay("alice", 100).json()["payment_id"]
    bank.pass_time(DAY)
    cashback, paid = bank.statement("alice")[:2]
    assert (cashback["kind"], cashback["type"], cashback["amount"]) == ("CASHBACK", "CREDIT", 2)
    assert cashback["ref"] == paid["transaction_id"] == payment
    assert bank.rows("SELECT caller FROM event WHERE kind = 'CASHBACK'") == [("system",)]
    assert bank.wrong() == []


def test_a_payment_too_small_for_a_cashback_posts_none(bank: "BankInside") -> None:
    payment = bank.given(alice=100).pay("alice", 49).json()
    assert payment["cashback"]["amount"] == 0
    bank.pass_time(DAY)
    shown = bank.get(f"/payments/{payment['payment_id']}").json()
    assert shown["cashback"]["status"] == "CREDITED"
    assert bank.balances() == {"alice": 51}
    assert len(bank.statement("alice")) == 2


def test_a_payment_needs_money_and_an_account(bank: "Bank") -> None:
    bank.given(alice=10).ids["nobody"] = NOBODY
    assert refusal(bank.pay("alice", 11)) == (409, "insufficient_funds")
    assert refusal(bank.pay("nobody", 5)) == (404, "account_not_found")
    assert bank.rows("SELECT * FROM scheduled_cashback") == []


def test_a_cashback_is_credited_once_by_however_many(bank: "BankInside") -> None:
    bank.given(alice=1_000)
    for _ in range(5):
        bank.pay("alice", 100)
    later = ledger.utc_now() + DAY

    async def race() -> None:
        await asyncio.gather(*(bank.ledger.credit_due("SERVER", later) for _ in range(10)))

    bank.runner.run(race())
    assert bank.balances() == {"alice": 1_000 - 5 * 100 + 5 * 2}
    # Another server saw the same cashbacks due, and comes too late.
    bank.execute(ledger.credit_cashbacks, clock="SERVER", until=later)
    assert bank.balances() == {"alice": 1_000 - 5 * 100 + 5 * 2}
    assert bank.wrong() == []


def test_one_pass_serves_all_who_wait_for_cashbacks(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.given(alice=1_000)
    for _ in range(5):
        bank.pay("alice", 100)
    passes: list[int] = []
    commit: Callable[..., list[ledger.Answer]] = bank.ledger.commit

    def count_and_commit(batch: Sequence[ledger.Command]) -> list[ledger.Answer]:
        passes.append(len(batch))
        return commit(batch)

    monkeypatch.setattr(bank.ledger, "commit", count_and_commit)
    later = ledger.utc_now() + DAY

    async def tell_the_time() -> None:
        await asyncio.gather(*(bank.ledger.credit_due("CALLER", later) for _ in range(50)))
        await asyncio.gather(*(bank.ledger.credit_due("SERVER", later) for _ in range(50)))

    bank.runner.run(tell_the_time())
    assert passes == [1]


def test_a_cashback_waits_while_the_account_is_frozen(bank: "BankInside") -> None:
    bank.given(alice=100).pay("alice", 100)
    bank.step("alice", "freeze")
    bank.pass_time(DAY)
    assert bank.balances() == {"alice": 0}
    bank.step("alice", "unfreeze")
    bank.pass_time(0)
    assert bank.balances() == {"alice": 2}


def test_an_account_with_cashback_to_come_cannot_be_closed(bank: "BankInside") -> None:
    bank.given(alice=200, bob=0)
    for _ in range(2):
        bank.pay("alice", 100)
    assert refusal(bank.step("alice", "close")) == (409, "cashback_pending")
    assert bank.step("bob", "close").json()["status"] == "CLOSED"
    bank.pass_time(DAY)
    assert bank.withdraw("alice", 4).status_code == 200
    assert bank.step("alice", "close").json()["status"] == "CLOSED"


def test_a_cashback_of_nothing_keeps_no_account_open(bank: "BankInside") -> None:
    bank.given(alice=10).pay("alice", 10)
    assert bank.step("alice", "close").json()["status"] == "CLOSED"
    bank.pass_time(DAY)
    assert bank.wrong() == []


def test_a_payment_and_a_close_in_one_batch_respect_each_other(bank: "BankInside") -> None:
    alice = bank.given(alice=100).ids["alice"]
    payment = ("/payments", {"account_id": alice, "amount": 100})
    paid, refused = bank.together(payment, (f"/accounts/{alice}/close", {}))
    assert paid.status_code == 200
    assert refusal(refused) == (409, "cashback_pending")


def test_a_cashback_and_a_close_in_one_batch_respect_each_other(bank: "BankInside") -> None:
    alice = bank.given(alice=100).ids["alice"]
    bank.pay("alice", 100)
    tomorrow = ledger.utc_now() + DAY
    commands = [
        command_of(ledger.credit_cashbacks, clock="SERVER", until=tomorrow),
        command_of(ledger.withdraw, alice, amount=2),
        command_of(ledger.change_status, alice, "CLOSED"),
    ]
    assert [answer.status for answer in bank.ledger.commit(commands)] == [200, 200, 200]
    assert bank.get(f"/accounts/{alice}").json()["status"] == "CLOSED"
    assert bank.wrong() == []


def pay_and_wait(bank: "BankInside") -> None:
    """Let Alice get a cashback of 7."""
    bank.pay("alice", 350)
    bank.pass_time(DAY)


# What can be reversed, each of 7 with Alice on one side.
MOVES: dict[str, Callable[["BankInside"], Any]] = {
    "DEPOSIT": lambda bank: bank.deposit("alice", 7),
    "WITHDRAWAL": lambda bank: bank.withdraw("alice", 7),
    "TRANSFER": lambda bank: bank.transfer("alice", "bob", 7),
    "PAYMENT": lambda bank: bank.pay("alice", 7),
    "JOURNAL": lambda bank: bank.journal({"alice": -7, "bob": 3, "carol": 4}),
    "CAPTURE": lambda bank: bank.capture(bank.promised("alice", "bob", 7)),
    "CASHBACK": pay_and_wait,
}


@pytest.mark.parametrize("kind", MOVES)
def test_a_reversal_turns_every_entry_round(bank: "BankInside", kind: str) -> None:
    MOVES[kind](bank.given(alice=1_000, bob=0, carol=0))
    first = bank.get(f"/transactions/{bank.last('alice')}").json()
    answer = bank.reverse(first["id"], memo="sorry", external_id="r1", metadata={"why": "typo"})
    shown = answer.json()
    assert (answer.status_code, first["kind"]) == (201, kind)
    assert answer.headers["Location"] == f"/transactions/{shown['id']}"
    assert bank.get(answer.headers["Location"]).json() == shown
    assert (shown["kind"], shown["reverses"], shown["reversed_by"]) == (
        "REVERSAL", first["id"], None
    )  # fmt: skip
    assert (shown["memo"], shown["external_id"]) == ("sorry", "r1")
    assert shown["metadata"] == {"why": "typo"}
    other = {"DEBIT": "CREDIT", "CREDIT": "DEBIT"}
    turned = [(e["account_id"], other[e["type"]], e["amount"]) for e in first["entries"]]
    assert [(e["account_id"], e["type"], e["amount"]) for e in shown["entries"]] == turned
    again = bank.get(f"/transactions/{first['id']}").json()
    assert again == first | {"reversed_by": shown["id"]}
    assert bank.wrong() == []


def test_a_transaction_is_reversed_once_and_a_reversal_never(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    transfer = bank.transfer("alice", "bob", 10).json()["transfer_id"]
    reversal = bank.reverse(transfer).json()["id"]
    refused = bank.reverse(transfer)
    assert refusal(refused) == (409, "already_reversed")
    assert refused.json()["reversed_by"] == reversal
    assert refusal(bank.reverse(reversal)) == (409, "not_reversible")
    assert bank.balances() == {"alice": 100, "bob": 0}


def test_what_is_no_transaction_cannot_be_reversed(bank: "Bank") -> None:
    bank.given(alice=0)
    [(opening,)] = bank.rows("SELECT id FROM event WHERE kind = 'open_account'")
    for event in (opening, NOBODY):
        assert refusal(bank.reverse(event)) == (404, "transaction_not_found")


def test_what_was_spent_or_promised_cannot_be_taken_back(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    transfer = bank.transfer("alice", "bob", 60).json()["transfer_id"]
    bank.withdraw("bob", 10)
    hold = bank.promised("bob", "alice", 20)
    refused = bank.reverse(transfer)
    assert refusal(refused) == (409, "insufficient_funds")
    members = [refused.json()[name] for name in ("balance", "available", "requested")]
    assert members == [50, 30, 60]
    bank.void(hold)
    bank.deposit("bob", 10)
    for name in ("alice", "bob"):
        bank.step(name, "freeze")
        assert refusal(bank.reverse(transfer)) == (409, "account_frozen")
        bank.step(name, "unfreeze")
    assert bank.reverse(transfer).status_code == 201
    assert bank.balances() == {"alice": 100, "bob": 0}
    assert bank.wrong() == []


def test_a_reversal_takes_what_an_expired_hold_held(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    transfer = bank.transfer("alice", "bob", 60).json()["transfer_id"]
    bank.promised("bob", "alice", 60, expires_in=60)
    bank.pass_time(60_000_000)
    assert bank.reverse(transfer).status_code == 201
    assert bank.funds("bob") == (0, 0, 0)
    assert bank.wrong() == []


def test_a_reversed_capture_leaves_its_hold_captured(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    hold = bank.capture(bank.promised("alice", "bob", 60)).json()
    assert bank.reverse(hold["transaction_id"]).status_code == 201
    assert bank.get(f"/holds/{hold['id']}").json() == hold
    assert bank.funds("alice") == (100, 0, 100)
    assert refusal(bank.capture(hold["id"])) == (409, "hold_captured")


def test_a_reversed_payment_brings_no_cashback(bank: "BankInside") -> None:
    payment = bank.given(alice=100).pay("alice", 100).json()
    path = f"/payments/{payment['payment_id']}"
    assert bank.reverse(payment["payment_id"]).status_code == 201
    assert bank.get(path).json()["cashback"] == payment["cashback"] | {"status": "CANCELLED"}
    bank.pass_time(2 * DAY)
    assert bank.get(path).json()["cashback"]["status"] == "CANCELLED"
    assert bank.balances() == {"alice": 100}
    bank.withdraw("alice", 100)
    assert bank.step("alice", "close").status_code == 200
    assert bank.wrong() == []


def test_a_credited_cashback_is_reversed_before_its_payment(bank: "BankInside") -> None:
    payment = bank.given(alice=100).pay("alice", 100).json()["payment_id"]
    bank.pass_time(DAY)
    refused = bank.reverse(payment)
    assert refusal(refused) == (409, "cashback_credited")
    cashback = bank.last("alice")
    assert cashback in refused.json()["detail"]
    assert bank.reverse(cashback).status_code == 201
    path = f"/payments/{payment}"
    assert bank.get(path).json()["cashback"]["status"] == "CREDITED"
    assert bank.reverse(payment).status_code == 201
    assert bank.get(path).json()["cashback"]["status"] == "CANCELLED"
    bank.pass_time(DAY)
    assert bank.balances() == {"alice": 100}
    assert bank.wrong() == []


def test_a_payment_without_cashback_is_reversed_at_any_time(bank: "BankInside") -> None:
    payment = bank.given(alice=100).pay("alice", 49).json()["payment_id"]
    bank.pass_time(DAY)
    assert bank.reverse(payment).status_code == 201
    shown = bank.get(f"/payments/{payment}").json()
    assert (shown["cashback"]["status"], shown["account"]["balance"]) == ("CANCELLED", 100)
    assert bank.wrong() == []


def test_a_reversal_and_a_cashback_in_one_batch_respect_each_other(bank: "BankInside") -> None:
    payment = bank.given(alice=100).pay("alice", 100).json()["payment_id"]
    tomorrow = ledger.utc_now() + DAY
    commands = [
        command_of(ledger.reverse, payment),
        command_of(ledger.reverse, payment),
        command_of(ledger.credit_cashbacks, clock="SERVER", until=tomorrow),
    ]
    answers = bank.ledger.commit(commands)
    assert [answer.status for answer in answers] == [200, 409, 200]
    assert json.loads(answers[1].body)["code"] == "already_reversed"
    assert bank.balances() == {"alice": 100}
    assert bank.wrong() == []


# ----- Holds
# Money is promised, and then captured, voided or expired. At the end of the section stands the test
# of all operations together, in any order.


def test_a_hold_promises_money_and_a_capture_moves_it(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    placed = bank.hold("alice", "bob", 60, memo="hotel")
    hold, path = placed.json(), placed.headers["Location"]
    assert (placed.status_code, path) == (201, f"/holds/{hold['id']}")
    assert (hold["status"], hold["captured_amount"], hold["transaction_id"]) == ("PENDING", 0, None)
    assert bank.get(path).json() == hold
    assert (bank.funds("alice"), bank.funds("bob")) == ((100, 60, 40), (0, 0, 0))
    # A hold writes no entries.
    assert len(bank.statement("alice")) == 1
    captured = bank.capture(hold["id"]).json()
    done = {"status": "CAPTURED", "captured_amount": 60, "transaction_id": bank.last("bob")}
    assert captured == bank.get(path).json() == hold | done
    assert (bank.funds("alice"), bank.funds("bob")) == ((40, 0, 40), (60, 0, 60))
    assert bank.wrong() == []


def test_a_capture_is_a_transaction_that_inherits_the_memo(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    named = {"memo": "hotel", "external_id": "h1", "metadata": {"room": "7"}}
    bank.capture(bank.promised("alice", "bob", 60, **named))
    shown = bank.get(f"/transactions/{bank.last('bob')}").json()
    assert (shown["kind"], shown["memo"]) == ("CAPTURE", "hotel")
    assert (shown["external_id"], shown["metadata"]) == (None, {})
    assert [(e["account_id"], e["type"], e["amount"]) for e in shown["entries"]] == [
        (bank.ids["alice"], "DEBIT", 60),
        (bank.ids["bob"], "CREDIT", 60),
    ]


def test_of_a_hold_a_part_is_captured_and_the_rest_is_released(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    hold = bank.promised("alice", "bob", 60)
    refused = bank.capture(hold, amount=61)
    assert refusal(refused) == (409, "amount_exceeds_hold")
    assert bank.funds("alice") == (100, 60, 40)
    captured = bank.capture(hold, amount=45).json()
    assert (captured["amount"], captured["captured_amount"]) == (60, 45)
    assert (bank.funds("alice"), bank.funds("bob")) == ((55, 0, 55), (45, 0, 45))
    assert refusal(bank.capture(hold, amount=15)) == (409, "hold_captured")


def test_a_hold_can_be_voided_instead(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    hold, other = bank.promised("alice", "bob", 60), bank.promised("alice", "bob", 40)
    assert bank.void(hold).json()["status"] == "VOIDED"
    assert bank.funds("alice") == (100, 40, 60)
    for refused in (bank.capture(hold), bank.void(hold)):
        assert refusal(refused) == (409, "hold_voided")
    bank.capture(other)
    assert refusal(bank.void(other)) == (409, "hold_captured")
    assert bank.balances() == {"alice": 60, "bob": 40}
    assert bank.wrong() == []


def test_a_hold_ends_by_itself_after_seven_days(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0).pass_time(0)
    hold = bank.hold("alice", "bob", 60).json()
    assert hold["created_at"] == ledger.utc_text(ledger.utc_now())
    assert hold["expires_at"] == ledger.utc_text(ledger.utc_now() + 7 * DAY)
    bank.pass_time(7 * DAY - 1)
    assert bank.get(f"/holds/{hold['id']}").json() == hold
    assert bank.funds("alice") == (100, 60, 40)
    bank.pass_time(1)
    assert bank.get(f"/holds/{hold['id']}").json() == hold | {"status": "EXPIRED"}
    assert bank.funds("alice") == (100, 0, 100)
    for refused in (bank.capture(hold["id"]), bank.void(hold["id"])):
        assert refusal(refused) == (409, "hold_expired")
    assert bank.wrong() == []


def test_what_an_expired_hold_held_can_be_spent_at_once(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0).pass_time(0)
    holds = [bank.promised("alice", "bob", amount, expires_in=1) for amount in (30, 70)]
    assert refusal(bank.withdraw("alice", 1)) == (409, "insufficient_funds")
    bank.pass_time(1_000_000)
    assert bank.withdraw("alice", 100).json()["held"] == 0
    for hold in holds:
        assert bank.get(f"/holds/{hold}").json()["status"] == "EXPIRED"
        assert refusal(bank.capture(hold)) == (409, "hold_expired")
    assert bank.funds("alice") == (0, 0, 0)
    assert bank.wrong() == []


def test_what_a_write_has_taken_for_expired_is_shown_so_by_a_clock_that_is_set_back(
    bank: "BankInside",
) -> None:
    bank.given(alice=100, bob=0).pass_time(0)
    hold = bank.promised("alice", "bob", 60, expires_in=3_600)
    payment = bank.pay("alice", 10).json()["payment_id"]
    for hours in (2, 30):
        # A deposit by a clock that is ahead, and that is set back after it.
        bank.pass_time(hours * HOUR)
        bank.deposit("bob", 1)
        bank.pass_time(-hours * HOUR)
        assert bank.get(f"/holds/{hold}").json()["status"] == "EXPIRED"
        assert [each["status"] for each in bank.get("/holds").json()["items"]] == ["EXPIRED"]
        assert bank.get("/holds", status="PENDING").json()["items"] == []
        listed = bank.get("/accounts", owner_name="alice").json()["items"]
        assert [funds_of(listed[0]), bank.funds("alice")] == [(90, 0, 90)] * 2
        shown = bank.get(f"/payments/{payment}").json()
        assert shown["cashback"]["status"] == ("SCHEDULED" if hours < 24 else "CREDITED")
        now = bank.get(f"/accounts/{bank.ids['bob']}/balance").json()["at"]
        assert now == bank.statement("bob")[0]["ts"]
    assert refusal(bank.capture(hold)) == (409, "hold_expired")
    # A promise counts from the same moment as it is shown at.
    assert bank.pay("alice", 10).json()["cashback"]["status"] == "SCHEDULED"
    assert bank.wrong() == []


def test_how_a_hold_ended_stays_so_after_its_time(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    captured, voided = (bank.promised("alice", "bob", 10, expires_in=60) for _ in range(2))
    bank.capture(captured)
    bank.void(voided)
    bank.pass_time(DAY)
    assert refusal(bank.capture(captured)) == (409, "hold_captured")
    assert refusal(bank.capture(voided)) == (409, "hold_voided")
    shown = [bank.get(f"/holds/{hold}").json()["status"] for hold in (captured, voided)]
    assert shown == ["CAPTURED", "VOIDED"]


def test_what_is_held_cannot_be_spent(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    hold = bank.promised("alice", "bob", 60)
    for refused in (
        bank.withdraw("alice", 41),
        bank.pay("alice", 41),
        bank.transfer("alice", "bob", 41),
        bank.journal({"alice": -41, "bob": 41}),
        bank.hold("alice", "bob", 41),
    ):
        assert refusal(refused) == (409, "insufficient_funds")
        problem = refused.json()
        told = {name: problem[name] for name in ("balance", "available", "requested")}
        assert told == {"balance": 100, "available": 40, "requested": 41}
    assert bank.transfer("alice", "bob", 40).json()["source"]["available"] == 0
    assert bank.capture(hold).status_code == 200
    assert bank.balances() == {"alice": 0, "bob": 100}


def test_a_hold_is_between_two_accounts_of_one_asset(bank: "Bank") -> None:
    bank.given(alice=100).given(asset="EUR", claire=0).ids["nobody"] = NOBODY
    assert refusal(bank.hold("alice", "claire", 1)) == (409, "asset_mismatch")
    assert refusal(bank.hold("alice", "nobody", 1)) == (404, "account_not_found")
    assert refusal(bank.hold("nobody", "alice", 1)) == (404, "account_not_found")
    # Before anything is looked up, as for a transfer.
    assert refusal(bank.hold("nobody", "nobody", 1)) == (400, "same_account")
    assert bank.rows("SELECT id FROM hold") == []


@pytest.mark.parametrize("step", ["freeze", "close"])
def test_an_account_that_is_not_active_takes_no_new_hold(bank: "Bank", step: str) -> None:
    bank.given(alice=100, bob=0).step("bob", step)
    code = {"freeze": "account_frozen", "close": "account_closed"}[step]
    assert refusal(bank.hold("alice", "bob", 1)) == (409, code)
    assert refusal(bank.hold("bob", "alice", 1)) == (409, code)
    assert bank.funds("alice") == (100, 0, 100)


@pytest.mark.parametrize("name", ["alice", "bob"])
def test_a_frozen_account_lets_holds_end_but_not_be_captured(bank: "BankInside", name: str) -> None:
    bank.given(alice=100, bob=0)
    first, second = (bank.promised("alice", "bob", 10, expires_in=60) for _ in range(2))
    bank.step(name, "freeze")
    assert refusal(bank.capture(first)) == (409, "account_frozen")
    assert bank.funds("alice") == (100, 20, 80)
    assert bank.void(first).status_code == 200
    assert bank.funds("alice") == (100, 10, 90)
    bank.pass_time(60_000_000)
    assert refusal(bank.capture(second)) == (409, "hold_expired")
    assert bank.funds("alice") == (100, 0, 100)
    assert bank.step(name, "unfreeze").json()["held"] == 0
    assert bank.wrong() == []


def test_an_account_with_a_pending_hold_on_either_side_is_not_closed(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0, carol=0)
    hold = bank.promised("alice", "bob", 10)
    bank.promised("alice", "carol", 10, expires_in=60)
    # Before its money is looked at.
    for name in ("alice", "bob", "carol"):
        assert refusal(bank.step(name, "close")) == (409, "holds_pending")
    bank.void(hold)
    assert bank.step("bob", "close").json()["status"] == "CLOSED"
    bank.pass_time(60_000_000)
    assert bank.step("carol", "close").json()["status"] == "CLOSED"
    assert refusal(bank.step("alice", "close")) == (409, "account_not_empty")
    assert bank.wrong() == []


def test_a_hold_a_capture_and_a_close_in_one_batch_respect_each_other(bank: "BankInside") -> None:
    alice, bob = bank.given(alice=100, bob=0).ids.values()
    body = {"account_id": alice, "dest_account_id": bob, "amount": 60}
    answers = bank.together(
        ("/holds", body), (f"/accounts/{bob}/close", {}), ("/holds", body), ("/holds", body, "k")
    )
    short_of = "insufficient_funds"
    assert [outcome(each) for each in answers] == [201, "holds_pending", short_of, short_of]
    path = f"/holds/{answers[0].json()['id']}"
    answers = bank.together((f"{path}/void", {}), ("/holds", body), (f"{path}/capture", {}))
    assert [outcome(each) for each in answers] == [200, 201, "hold_voided"]
    assert bank.funds("alice") == (100, 60, 40)
    assert bank.wrong() == []


def test_a_hold_that_expires_within_a_batch_is_not_captured(bank: "BankInside") -> None:
    hold = bank.given(alice=100, bob=0).promised("alice", "bob", 60)

    def capture_late(book: ledger.Book) -> None:
        book.account(bank.ids["alice"])
        book.now += 8 * DAY  # As after a look at what a server with a fast clock has written.
        with pytest.raises(ledger.HoldExpired):
            ledger.capture(book, hold, amount=None)

    bank.execute(capture_late)
    assert bank.balances() == {"alice": 100, "bob": 0}


def test_a_refused_capture_leaves_the_hold_as_it_was(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    hold = bank.promised("alice", "bob", 60)
    bank.execute(ledger.deposit, bank.ids["bob"], amount=ledger.CUSTOMER_MAX - 100)
    bank.transfer("alice", "bob", 1)
    bank.transfer("bob", "alice", 1)
    before = bank.funds("alice"), bank.get(f"/holds/{hold}").json()
    bank.step("bob", "freeze")
    refused = bank.capture(hold, key="k")
    bank.step("bob", "unfreeze")
    assert bank.capture(hold, key="k").content == refused.content
    assert (bank.funds("alice"), bank.get(f"/holds/{hold}").json()) == before
    assert bank.capture(hold, key="j").status_code == 200
    assert bank.wrong() == []


class Promise(NamedTuple):
    """A hold: from whom, for whom, how much, for how many days, and how it has ended."""

    source: str
    dest: str
    amount: int
    days: int
    end: str = ""


class AnyStory(stateful.RuleBasedStateMachine):
    """Whatever happens, in whatever order: the ledger agrees with a few dictionaries.

    Another operation is another rule, which knows the code of each refusal. What it sends under a
    key goes through `expect`, which keeps it so that `replay` can send it again.
    """

    def __init__(self, new_database: "NewDatabase") -> None:
        super().__init__()
        self.scene = ExitStack()
        database = self.scene.enter_context(new_database())
        self.bank = self.scene.enter_context(opened(database, connected=CONNECTED.get(database)))
        self.balances: dict[str, int] = {}
        self.status: dict[str, str] = {}
        self.assets: dict[str, str] = {}
        self.limits: Counter[str] = Counter()
        self.ended = 0  # How many holds by their time.
        self.promised: Counter[str] = Counter()
        self.holds: dict[str, Promise] = {}
        self.moves: dict[str, dict[str, int]] = {}
        self.sent: list[tuple[Callable[[], httpx.Response], bytes]] = []

    people = st.integers(min_value=0, max_value=4)
    amounts = st.integers(min_value=1, max_value=150)
    things = st.integers(min_value=0, max_value=99)

    def person(self, number: int) -> str:
        """Return one of those who have an account."""
        return sorted(self.balances)[number % len(self.balances)]

    def pending(self) -> list[Promise]:
        """Return the holds that have not ended."""
        return [hold for hold in self.holds.values() if not hold.end]

    def held(self, name: str) -> int:
        """Return what somebody has promised, and has still."""
        return sum(hold.amount for hold in self.pending() if hold.source == name)

    def available(self, name: str) -> int:
        """Return what somebody may spend."""
        return self.balances[name] - self.held(name) + self.limits[name]

    def loop(self, *names: str) -> str:
        """Return the code that refuses to move what is issued, given and spent."""
        return "asset_closed_loop" * any(self.assets[name] == "GEM" for name in names)

    def obstacle(self, changes: Mapping[str, int], *, issued: bool = False) -> str:
        """Return the code that refuses to change balances so, or nothing where they may be."""
        if not issued and (code := self.loop(*changes)):
            return code
        for name in changes:
            if self.status[name] != "ACTIVE":
                return f"account_{self.status[name].lower()}"
        is_short = any(self.available(n) < -by for n, by in changes.items() if by < 0)
        return "insufficient_funds" if is_short else ""

    def change(self, changes: Mapping[str, int]) -> None:
        """Change balances."""
        for name, by in changes.items():
            self.balances[name] += by

    def expect(
        self, code: str, send: Callable[..., httpx.Response], *details: Any, **options: Any
    ) -> Any:
        """Send something under a new key; return the answer, or None if a code refuses it."""
        replay = partial(send, *details, **options, key=new_key())
        answer = replay()
        assert outcome(answer) in ([code] if code else [200, 201])
        self.sent.append((replay, answer.content))
        return None if code else answer.json()

    def two(self, numbers: tuple[int, int]) -> tuple[str, str]:
        """Return two different ones of them."""
        first = self.person(numbers[0])
        return first, sorted(self.balances.keys() - {first})[numbers[1] % (len(self.balances) - 1)]

    @stateful.initialize()
    def begin(self) -> None:
        add_asset(self.bank, "BTC")
        add_asset(self.bank, "GEM", closed_loop=True)
        for balance in (300, 200):
            self.open(balance, "USD")

    @stateful.precondition(lambda self: len(self.balances) < 5)
    @stateful.rule(balance=st.sampled_from([0, 100]), asset=st.sampled_from(["USD", "BTC", "GEM"]))
    def open(self, balance: int, asset: str) -> None:
        name = f"person {len(self.balances)}"
        self.bank.given({name: balance if asset != "GEM" else 0}, asset=asset)
        self.assets[name], self.status[name], self.balances[name] = asset, "ACTIVE", 0
        if asset == "GEM":
            self.issue(len(self.balances) - 1, balance or 1, "top-up")
        else:
            self.balances[name] = balance

    @stateful.rule(number=people, amount=amounts, how=st.sampled_from(["top-up", "bonus", "spend"]))
    def issue(self, number: int, amount: int, how: str) -> None:
        name, by = self.person(number), -amount if how == "spend" else amount
        code = "" if self.assets[name] == "GEM" else "asset_open_loop"
        send = partial(self.bank.post, f"/accounts/{self.bank.ids[name]}/{how}")
        if self.expect(code or self.obstacle({name: by}, issued=True), send, amount=amount):
            self.balances[name] += by

    @stateful.rule(number=people, amount=amounts)
    def deposit(self, number: int, amount: int) -> None:
        name = self.person(number)
        if self.expect(self.obstacle({name: amount}), self.bank.deposit, name, amount):
            self.balances[name] += amount

    @stateful.rule(number=people, limit=st.sampled_from([0, 50, 200]))
    def limit(self, number: int, limit: int) -> None:
        name = self.person(number)
        is_used = self.available(name) - self.limits[name] + limit < 0
        code = self.loop(name) or ("credit_limit_in_use" if is_used else "")
        if self.expect(code, partial(change, self.bank), name, credit_limit=limit):
            self.limits[name] = limit

    @stateful.rule(number=people, amount=amounts)
    def withdraw(self, number: int, amount: int) -> None:
        name = self.person(number)
        if self.expect(self.obstacle({name: -amount}), self.bank.withdraw, name, amount):
            self.balances[name] -= amount

    @stateful.rule(number=people, amount=amounts)
    def pay(self, number: int, amount: int) -> None:
        name = self.person(number)
        if self.expect(self.obstacle({name: -amount}), self.bank.pay, name, amount):
            self.balances[name] -= amount
            self.promised[name] += amount * 2 // 100

    def between(self, source: str, dest: str) -> str:
        """Return the code that refuses to move anything from one to another."""
        is_same = self.assets[source] == self.assets[dest]
        return self.loop(source) or "asset_mismatch" * (not is_same)

    def transferred(self, source: str, dest: str, amount: int) -> str:
        """Move money from one to another, or return the code that refuses it."""
        changes = {source: -amount, dest: amount}
        code = "same_account" if source == dest else self.between(source, dest)
        code = code or self.obstacle(changes)
        if not code:
            self.change(changes)
        return code

    @stateful.rule(numbers=st.tuples(people, people), amount=amounts)
    def transfer(self, numbers: tuple[int, int], amount: int) -> None:
        source, dest = (self.person(number) for number in numbers)
        code = self.transferred(source, dest, amount)
        if done := self.expect(code, self.bank.transfer, source, dest, amount):
            self.moves[done["transfer_id"]] = {source: -amount, dest: amount}

    @stateful.rule(
        some=st.lists(st.tuples(people, people, amounts), min_size=1, max_size=4),
        atomic=st.booleans(),
    )
    def transfer_many(self, some: list[tuple[int, int, int]], atomic: bool) -> None:
        transfers = [(self.person(a), self.person(b), amount) for a, b, amount in some]
        before = self.balances.copy()
        codes = [self.transferred(*each) for each in transfers]
        code = "bulk_failed" if atomic and any(codes) else ""
        items = [item(self.bank, *each) for each in transfers]
        if done := self.expect(code, partial(bulk, self.bank), *items, atomic=atomic):
            assert [(e["error"] or {"code": ""})["code"] for e in done["results"]] == codes
        else:
            self.balances = before

    @stateful.rule(numbers=st.tuples(people, people, people), amount=amounts)
    def journal(self, numbers: tuple[int, int, int], amount: int) -> None:
        *payers, payee = dict.fromkeys(self.person(number) for number in numbers)
        changes = dict.fromkeys(payers, -amount) | {payee: amount * len(payers)}
        is_mixed = len({self.assets[name] for name in changes}) > 1
        code = self.loop(*changes) or "unbalanced" * is_mixed or self.obstacle(changes)
        if payers and (done := self.expect(code, self.bank.journal, changes)):
            self.change(changes)
            self.moves[done["id"]] = changes

    @stateful.precondition(lambda self: self.moves)
    @stateful.rule(number=things)
    def reverse(self, number: int) -> None:
        moved = list(self.moves)[number % len(self.moves)]
        changes = {name: -by for name, by in self.moves[moved].items()}
        # What was reversed stays here, without changes.
        code = self.obstacle(changes) if changes else "already_reversed"
        if self.expect(code, self.bank.reverse, moved):
            self.change(changes)
            self.moves[moved] = {}

    @stateful.rule(numbers=st.tuples(people, people), amount=amounts, days=st.integers(1, 3))
    def hold(self, numbers: tuple[int, int], amount: int, days: int) -> None:
        source, dest = self.two(numbers)
        code, lasting = self.between(source, dest), {"expires_in": 86_400 * days}
        code = code or self.obstacle({source: -amount, dest: 0})
        if done := self.expect(code, self.bank.hold, source, dest, amount, **lasting):
            self.holds[done["id"]] = Promise(source, dest, amount, days)

    @stateful.precondition(lambda self: self.holds)
    @stateful.rule(number=things, thirds=st.integers(min_value=1, max_value=4))
    def capture(self, number: int, thirds: int) -> None:
        hold = list(self.holds)[number % len(self.holds)]
        source, dest, held, _, end = self.holds[hold]
        amount = max(1, held * thirds // 3)
        too_much = "amount_exceeds_hold" if amount > held else ""
        # What is moved was held, so that there is enough of it.
        code = end or too_much or self.obstacle({source: 0, dest: amount})
        if self.expect(code, self.bank.capture, hold, amount=amount):
            self.end(hold, "hold_captured")
            self.change({source: -amount, dest: amount})

    @stateful.precondition(lambda self: self.holds)
    @stateful.rule(number=things)
    def void(self, number: int) -> None:
        hold = list(self.holds)[number % len(self.holds)]
        if self.expect(self.holds[hold].end, self.bank.void, hold):
            self.end(hold, "hold_voided")

    def end(self, hold: str, code: str) -> None:
        """Let a hold stay here with the code that refuses it, so that it is tried again."""
        self.holds[hold] = self.holds[hold]._replace(end=code)

    @stateful.rule(number=people, step=st.sampled_from(["freeze", "unfreeze", "close"]))
    def step(self, number: int, step: str) -> None:
        name = self.person(number)
        status, origins = {
            "freeze": ("FROZEN", {"ACTIVE"}),
            "unfreeze": ("ACTIVE", {"FROZEN"}),
            "close": ("CLOSED", {"ACTIVE", "FROZEN"}),
        }[step]
        refused = {
            "invalid_state_transition": self.status[name] not in origins,
            "holds_pending": step == "close" and any(name in hold[:2] for hold in self.pending()),
            "account_not_empty": step == "close" and self.balances[name] != 0,
            "cashback_pending": step == "close" and self.promised[name] > 0,
        }
        code = next((code for code, is_so in refused.items() if is_so), "")
        if self.expect(code, self.bank.step, name, step):
            self.status[name] = status

    @stateful.rule(tell=st.booleans())
    def pass_a_day(self, tell: bool) -> None:
        self.bank.pass_time(DAY)
        self.ended += sum(h.days == 1 and not h.end for h in self.holds.values())
        if tell:
            self.bank.execute(ledger.expire_holds)
            told = self.bank.rows("SELECT count(*) FROM event WHERE kind = 'expire'")
            assert told == [(self.ended,)]
        for hold, promise in self.holds.items():
            self.holds[hold] = promise._replace(days=promise.days - 1)
            if promise.days == 1 and not promise.end:
                self.end(hold, "hold_expired")
        for name, status in self.status.items():
            if status == "ACTIVE":
                self.balances[name] += self.promised.pop(name, 0)

    @stateful.precondition(lambda self: self.sent)
    @stateful.rule(number=things)
    def replay(self, number: int) -> None:
        send, content = self.sent[number % len(self.sent)]
        again = send()
        assert (again.content, again.headers["Idempotent-Replayed"]) == (content, "true")

    @stateful.invariant()
    def the_books_agree(self) -> None:
        funds = {
            name: (balance, self.held(name), self.available(name))
            for name, balance in self.balances.items()
        }
        shown = self.bank.get("/accounts").json()["items"]
        assert {each["owner_name"]: funds_of(each) for each in shown} == funds
        assert {each["owner_name"]: each["status"] for each in shown} == self.status
        if funds:
            name = self.person(len(self.sent))
            assert self.bank.funds(name) == funds[name]
        with self.bank.ledger.database.read() as connection:
            assert connection.rows("SELECT SUM(balance) AS total FROM account") == [{"total": 0}]
        assert self.bank.wrong() == []

    def teardown(self) -> None:
        self.scene.close()


def test_any_story_agrees_with_a_dictionary(engine: str, new_database: "NewDatabase") -> None:
    stories = settings(
        max_examples=(30 if engine == "sqlite" else 6) // (1 if CYCLES > 3 else 2),
        stateful_step_count=25,
        deadline=None,
        database=None,
    )
    stateful.run_state_machine_as_test(partial(AnyStory, new_database), settings=stories)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ["void", "capture", "deposit"])
def test_what_has_expired_is_tidied_in_portions_that_stay(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    bank.given(alice=100, bob=0)
    holds = [bank.promised("alice", "bob", 1, expires_in=1) for _ in range(10)]
    monkeypatch.setattr(ledger, "EXPIRED_MAX", 3)
    bank.pass_time(2_000_000)
    commits = counted_calls(monkeypatch, bank.ledger, "commit")
    if how == "deposit":
        assert bank.deposit("alice", 1).json()["available"] == 101
    else:
        step = bank.void if how == "void" else bank.capture
        assert refusal(step(holds[-1])) == (409, "hold_expired")
    # Each but the last has released three, and that stays though the step was refused.
    assert len(commits) == 4
    assert bank.rows("SELECT status, count(*) FROM hold GROUP BY status") == [("EXPIRED", 10)]
    assert bank.rows("SELECT held FROM account WHERE owner_name = 'alice'") == [(0,)]
    assert bank.wrong() == []


def while_locked(
    database: str, statement: str, actions: Sequence[Callable[[], Any]], *, seconds: float = 0
) -> list[Any]:
    """Let actions begin while another session has a lock, and return what they come to."""
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    with closing(connect(database)) as other, ThreadPoolExecutor(len(actions)) as threads:
        other.execute(statement)
        begun = [threads.submit(action) for action in actions]
        with closing(connect(database)) as looking:
            looking.autocommit = True
            wait_until(lambda: looking.execute(waiting).fetchone()[0] >= len(actions))
        time.sleep(seconds)
        other.rollback()
        return [action.result() for action in begun]


@on_postgresql
def test_a_hold_that_expires_while_its_accounts_are_waited_for_is_not_captured(
    database: str,
) -> None:
    with opened(database) as bank:
        hold = bank.given(alice=100, bob=0).promised("alice", "bob", 60, expires_in=1)
        lock, capture = "SELECT * FROM account FOR UPDATE", partial(bank.capture, hold)
        [refused] = while_locked(database, lock, [capture], seconds=1.1)
        assert refusal(refused) == (409, "hold_expired")
        assert (bank.balances(), bank.wrong()) == ({"alice": 100, "bob": 0}, [])


@on_postgresql
def test_of_two_servers_that_reverse_one_transaction_the_later_hears_that_it_was(
    database: str,
) -> None:
    with opened(database) as one, opened(database) as other:
        one.given(alice=100, bob=0).transfer("alice", "bob", 60)
        other.ids, sent = one.ids, one.last("bob")
        answers = while_locked(
            database,
            "SELECT * FROM account FOR UPDATE",
            [partial(bank.reverse, sent) for bank in (one, other)],
        )
        # Bob has exactly what the first one took: it is no want of funds.
        [refused] = [answer for answer in answers if answer.status_code != 201]
        assert refusal(refused) == (409, "already_reversed")
        assert one.balances() == {"alice": 100, "bob": 0}


@on_postgresql
def test_two_servers_that_need_contra_accounts_in_any_order_do_not_meet(database: str) -> None:
    with opened(database) as one, opened(database) as other:
        one.given(alice=100, bob=100)
        met, begun = threading.Barrier(2), []

        def commit(bank: "BankInside", name: str, *operations: Any) -> list[Any]:
            def run(book: ledger.Book) -> None:
                begun.append(name)
                for operation in operations:
                    operation(book, one.ids[name], amount=10)
                    with suppress(threading.BrokenBarrierError):
                        met.wait(0.2)  # In vain, where the other one waits for our locks.

            return bank.ledger.commit_or_split([ledger.Command("test", "{}", run)])

        at_once(
            [
                partial(commit, one, "alice", ledger.deposit, ledger.pay),
                partial(commit, other, "bob", ledger.pay, ledger.deposit),
            ]
        )
        assert sorted(begun) == ["alice", "bob"]  # Neither had to begin again.
        assert (one.balances(), one.wrong()) == ({"alice": 100, "bob": 100}, [])


@on_postgresql
def test_of_two_servers_that_credit_one_cashback_one_does(database: str) -> None:
    with opened(database) as one, opened(database) as other:
        one.given(alice=100).pay("alice", 100)
        due = partial(ledger.credit_cashbacks, clock="SERVER", until=ledger.utc_now() + DAY)
        credit = ledger.Command("system", "{}", due)
        answers = while_locked(
            database,
            "SELECT * FROM account FOR UPDATE",
            [partial(bank.ledger.commit_or_split, [credit]) for bank in (one, other)],
        )
        assert [answer.status for [answer] in answers] == [200, 200]
        assert (one.balances(), one.wrong()) == ({"alice": 2}, [])


@on_postgresql
def test_of_two_who_revoke_one_key_the_later_hears_that_it_is_gone(database: str) -> None:
    with opened(database) as one, opened(database) as other:
        new_api_key(database, "a", "admin")
        run = partial(ledger.revoke_key, name="a")
        revoke = ledger.Command("cli", '{"name": "a"}', run)
        outcomes = while_locked(
            database,
            "SELECT * FROM api_key FOR UPDATE",
            [partial(bank.ledger.commit_or_split, [revoke]) for bank in (one, other)],
        )
        kinds = sorted(type(outcome).__name__ for [outcome] in outcomes)
        assert kinds == ["Answer", "StartupError"]


# ===== Part two: HTTP


# ----- Callers
# In open mode whoever is on this machine may do everything; with keys, everybody may do what the
# key's or the token's role allows.


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
def test_open_mode_serves_this_machine(untouched: "BankInside", peer: str) -> None:
    with inside(untouched.app, untouched.database, peer=peer) as bank:
        assert bank.get("/accounts").status_code == 200


@at_the_edge
@pytest.mark.parametrize("peer", ["10.0.0.1", "::2", "192.168.1.1", "", "localhost.evil.example"])
def test_open_mode_refuses_other_machines(untouched: "BankInside", peer: str) -> None:
    with inside(untouched.app, untouched.database, peer=peer) as bank:
        assert refusal(bank.get("/accounts")) == (403, "forbidden")
        assert refusal(bank.post("/accounts", nonsense=1)) == (403, "forbidden")
        assert bank.get("/health").json() == {"status": "ok"}


@at_the_edge
@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]:8000"])
def test_open_mode_knows_the_names_of_this_machine(untouched: "Bank", host: str) -> None:
    assert untouched.send("GET", "/accounts", headers={"Host": host}).status_code == 200


@at_the_edge
@pytest.mark.parametrize(
    ("header", "values"),
    [
        ("Host", ["evil.example", "localhost.evil.example:8000", "127.0.0.1.evil.example"]),
        ("Host", ["10.0.0.1:8000", "", "testserver", "[localhost]", b"\xe9"]),
        ("Forwarded", ["x"]),
        ("X-Forwarded-For", ["x"]),
        *[
            (name, ["x"])
            for name in (
                "CF-Connecting-IP",
                "True-Client-IP",
                "X-Client-IP",
                "X-Envoy-External-Address",
                "X-Cluster-Client-IP",
                "Fastly-Client-IP",
                "Client-IP",
                "X-Original-Forwarded-For",
                "X-Azure-ClientIP",
            )
        ],
        ("x-forwarded", ["x"]),
        ("Via", ["x"]),
        ("Origin", ["http://evil.example", "null", "http://localhost.evil.example"]),
        ("Origin", ["http://localhost:5000", "https://localhost", "localhost", ""]),
        ("Sec-Fetch-Site", ["cross-site"]),
    ],
)
def test_open_mode_refuses_foreign_hosts_proxies_and_pages_of_other_sites(
    untouched: "Bank", header: str, values: list[Any]
) -> None:
    freeze = f"/accounts/{untouched.ids['alice']}/freeze"
    for value in values:
        for method, path in (("GET", "/accounts"), ("POST", freeze)):
            refused = untouched.send(method, path, headers={header: value})
            assert refusal(refused) == (403, "forbidden"), value


@at_the_edge
def test_open_mode_refuses_two_hosts(untouched: "Bank") -> None:
    headers = [("Host", "localhost"), ("Host", "evil.example")]
    assert refusal(untouched.send("GET", "/accounts", headers=headers)) == (403, "forbidden")


def test_open_mode_serves_its_own_page(bank: "Bank") -> None:
    freeze = f"/accounts/{bank.given(alice=0).ids['alice']}/freeze"
    own = {"Host": "127.0.0.1:8000", "Origin": "http://127.0.0.1:8000"}
    assert bank.send("POST", freeze, headers=own).status_code == 200


def test_open_mode_serves_the_test_client_of_this_process(bank: "BankInside") -> None:
    with inside(bank.app, bank.database, peer="testclient") as client:
        for host in ("testserver", "localhost", "test"):
            assert client.send("GET", f"http://{host}/accounts").status_code == 200


SECRET = "an HS256 secret of at least 32 bytes"  # noqa: S105
ADMIN_KEY = "the-operators-own-key"
LATER = 4_000_000_000


def token(**claims: Any) -> str:
    """Return a token that is good, but for what is claimed."""
    return jwt.encode({"sub": "app", "role": "admin", "exp": LATER, **claims}, SECRET, "HS256")


def signed_by_hand(payload: str, header: str = '{"alg": "HS256"}') -> str:
    """Return a token whose parts no library would write."""
    parts = [jwt.utils.base64url_encode(part.encode()) for part in (header, payload)]
    signature = hmac.digest(SECRET.encode(), b".".join(parts), "sha256")
    return b".".join([*parts, jwt.utils.base64url_encode(signature)]).decode()


def test_a_key_is_shown_once_and_stored_as_a_hash(secured: "Bank") -> None:
    key = new_api_key(secured.database, "till 1", "service")
    assert re.fullmatch("lk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}", key)
    secured.by(key).given(alice=0)
    assert secured.callers() == ["cli", "key:till 1"]
    _, listed = key_command(secured.database, "list").splitlines()
    assert listed.split()[:2] == [key[:11], "service"]
    assert listed.endswith("till 1")
    assert key[11:] not in f"{secured.contents()}{listed}"


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("X-API-Key", "{}"),
        ("x-api-key", " {} "),
        ("Authorization", "Bearer {}"),
        ("authorization", "bearer  {}"),
    ],
)
def test_a_key_may_come_in_either_header(secured: "Bank", header: str, form: str) -> None:
    for credential in (ADMIN_KEY, new_api_key(secured.database, "a", "auditor"), token()):
        caller = secured.by(form.format(credential), header)
        assert caller.get("/accounts").status_code == 200


@at_the_edge
@pytest.mark.parametrize(
    "headers",
    [
        *([("X-API-Key", key)] for key in ("", "lk_", ADMIN_KEY + "x", ADMIN_KEY[:-1])),
        *([("X-API-Key", key)] for key in (b"\xff\x00\xe9", "k" * 60_000)),
        *([("Authorization", key)] for key in (ADMIN_KEY, "Bearer", f"Basic {ADMIN_KEY}")),
        *([("Authorization", key)] for key in ("Bearer a.b.c", b"Bearer \xe9.\xe9.\xe9")),
        [("X-API-Key", ADMIN_KEY), ("X-API-Key", ADMIN_KEY)],
        [("X-API-Key", ADMIN_KEY), ("Authorization", "Bearer x")],
        [],
    ],
    ids=short,
)
def test_bad_credentials_are_refused(secured: "Bank", headers: Any) -> None:
    refused = secured.send("GET", "/accounts", headers=headers)
    assert refusal(refused) == (401, "unauthorized")
    assert refused.headers["WWW-Authenticate"] == 'Bearer realm="ledger"'


def test_almost_a_key_is_no_key(secured: "Bank") -> None:
    key, other = (new_api_key(secured.database, name, "admin") for name in ("a", "b"))
    for wrong in (key[:-1], key + "x", key[:11], key[:11] + other[11:], key.upper()):
        assert refusal(secured.by(wrong).get("/accounts")) == (401, "unauthorized")
    assert secured.by(key).get("/accounts").status_code == 200


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
        signed_by_hand("{}", header='{"alg": "HS256", "crit": ["\\ud800"], "\\ud800": 1}'),
        token()[:-1],
        token() + ".x",
        "." * 60_000,
    ],
    ids=short,
)
def test_a_hostile_token_is_refused(secured: "Bank", hostile: str) -> None:
    refused = secured.by(f"Bearer {hostile}", "Authorization").get("/accounts")
    assert refusal(refused) == (401, "unauthorized")


def test_a_key_counts_beside_the_credentials_of_a_proxy(secured: "Bank") -> None:
    headers = {"X-API-Key": ADMIN_KEY, "Authorization": "Basic bWU6cHJveHk="}
    assert secured.send("GET", "/accounts", headers=headers).status_code == 200
    alone = secured.send("GET", "/accounts", headers={"Authorization": "Basic bWU6cHJveHk="})
    assert refusal(alone) == (401, "unauthorized")


@pytest.mark.parametrize(
    ("claims", "why"),
    [({"exp": 1}, "Signature has expired"), ({"nbf": LATER}, "The token is not yet valid (nbf)"),
     ({"iat": LATER}, "The token is not yet valid (iat)"),
     ({"role": "king"}, "Sub, role or exp is wrong"),
     ({"exp": None}, 'Token is missing the "exp" claim'),
     ({"sub": " "}, "Sub, role or exp is wrong")],
)  # fmt: skip
def test_who_brings_a_bad_token_is_told_why(secured: "Bank", claims: Any, why: str) -> None:
    given = {name: value for name, value in claims.items() if value is not None}
    payload = {"sub": "app", "role": "admin", "exp": LATER, **claims}
    made = jwt.encode({n: v for n, v in payload.items() if v is not None}, SECRET, "HS256")
    refused = secured.by(made).get("/accounts")
    assert (refused.status_code, refused.json()["detail"]) == (
        401,
        f"The token is not valid: {why}",
    )
    assert all(
        str(value) not in refused.json()["detail"] for value in given.values() if value != " "
    )
    forged = secured.by(f"{made[:-8]}AAAAAAAA").get("/accounts").json()["detail"]
    assert forged in ("The token is not valid: Signature verification failed",)


def test_the_clock_of_who_makes_tokens_may_be_a_little_ahead(secured: "Bank") -> None:
    now = int(time.time())
    assert secured.by(token(iat=now + 5)).get("/accounts").status_code == 200
    assert secured.by(token(iat=now + 60)).get("/accounts").status_code == 401
    # Its end is its end.
    assert secured.by(token(exp=now - 1)).get("/accounts").status_code == 401


def test_a_token_says_who_calls_and_as_what(secured: "Bank") -> None:
    clerk = secured.by(token(sub="clerk", role="service", exp=LATER + 0.5)).given(alice=1)
    assert secured.callers() == ["jwt:clerk", "jwt:clerk"]
    assert refusal(clerk.withdraw("alice", 1)) == (403, "forbidden")


def test_an_idempotency_key_belongs_to_its_caller(secured: "Bank") -> None:
    admin = secured.by(ADMIN_KEY).given(alice=0)
    first = admin.deposit("alice", 5, key="k")
    for name in ("a", "b"):
        other = secured.by(new_api_key(secured.database, name, "service"))
        answer = other.deposit("alice", 7, key="k")
        assert answer.status_code == 200
        assert "Idempotent-Replayed" not in answer.headers
    assert admin.deposit("alice", 5, key="k").content == first.content
    assert admin.balances() == {"alice": 5 + 7 + 7}


def test_open_mode_ends_for_ever_with_the_first_key(bank: "Bank") -> None:
    new_api_key(bank.database, "a", "admin")
    key_command(bank.database, "revoke", "a")
    wait_until(lambda: bank.get("/accounts").status_code == 401)
    with opened(bank.database) as again:
        assert refusal(again.get("/accounts")) == (401, "unauthorized")


def test_a_running_server_takes_and_refuses_keys_within_a_second(database: str) -> None:
    # A busy machine may take longer over the requests here, but the server looks in time.
    assert ledger.KEYS_AGE_SECONDS_MAX < 1
    with serving(database) as server:
        assert server.bank.get("/accounts").status_code == 200
        holder = server.bank.by(new_api_key(database, "a", "admin"))
        wait_until(lambda: server.bank.get("/accounts").status_code == 401)
        assert holder.get("/accounts").status_code == 200
        key_command(database, "revoke", "a")
        wait_until(lambda: holder.get("/accounts").status_code == 401)


def test_an_unknown_key_is_looked_for_once_until_all_are_loaded_anew(
    secured: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    load = secured.app.state.callers._load
    monkeypatch.setattr(secured.app.state.callers, "_load", lambda found: looks.append(load(found)))
    monkeypatch.setattr(ledger, "KEYS_AGE_SECONDS_MAX", 60)
    for _ in range(20):
        assert secured.by("lk_12345678_x").get("/accounts").status_code == 401
    assert len(looks) == 1
    # Of some that are made up, as of one.
    for number in range(2 * ledger.LOOKS_MAX):
        assert secured.by(f"lk_{number:08}_x").get("/accounts").status_code == 401
    assert len(looks) == ledger.LOOKS_MAX


@pytest.mark.parametrize("kept_for", [0, 60])
@on_postgresql
def test_a_new_key_waits_for_no_other_read(
    secured: "BankInside", monkeypatch: pytest.MonkeyPatch, kept_for: int
) -> None:
    monkeypatch.setattr(ledger, "KEYS_AGE_SECONDS_MAX", kept_for)
    alice = secured.by(ADMIN_KEY).given(alice=0).ids["alice"]
    key, ended = new_api_key(secured.database, "till", "service"), threading.Event()
    for _ in range(ledger.READERS_MAX):
        secured.ledger.database._readers.submit(ended.wait)
    deposited = secured.by(key).post(f"/accounts/{alice}/deposit", key=new_key(), amount=1)
    ended.set()
    assert deposited.json()["balance"] == 1


def test_a_request_is_no_older_than_its_key(database: str) -> None:
    with serving(database) as server:
        key, body = new_api_key(database, "a", "admin"), b'{"owner_name": "late"}'
        head = (
            f"POST /accounts HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection(server.bank.address()) as slow:
            slow.sendall(head.encode() + body[:5])
            wait_until(lambda: server.bank.by(key).get("/accounts").status_code == 200)
            key_command(database, "revoke", "a")
            wait_until(lambda: server.bank.by(key).get("/accounts").status_code == 401)
            time.sleep(ledger.KEYS_AGE_SECONDS_MAX)
            slow.sendall(body[5:])
            assert slow.recv(99).startswith(b"HTTP/1.1 401")


@on_postgresql
def test_who_calls_is_known_though_all_readers_are_busy(secured: "BankInside") -> None:
    ended = threading.Event()

    async def deposit_beside_long_lists() -> httpx.Response:
        database, callers = secured.ledger.database, secured.app.state.callers
        wait = partial(database.run_read, lambda _: ended.wait(60))
        reading = [asyncio.create_task(wait()) for _ in range(2 * ledger.READERS_MAX)]
        await asyncio.sleep(0)
        callers._loaded_at = 0.0
        path, headers = f"/accounts/{secured.ids['alice']}/deposit", {"X-API-Key": ADMIN_KEY}
        headers["Idempotency-Key"] = new_key()
        answer = await secured.ask("POST", path, json={"amount": 1}, headers=headers)
        ended.set()
        await asyncio.gather(*reading)
        return answer

    secured.by(ADMIN_KEY).given(alice=0)
    assert secured.runner.run(deposit_beside_long_lists()).status_code == 200


# Which roles may call each route, and whether it takes no request without an idempotency key. What
# stands in neither table fails the suite.
READ, WORK, RULE, AUDIT = "auditor service admin", "service admin", "admin", "auditor admin"
KEY, NO_KEY = True, False
DESCRIBED = {("GET", "/health"), ("GET", "/bank/health")}
OPEN = DESCRIBED | {("GET", "/"), ("GET", "/docs"), ("GET", "/openapi.json")}
OPEN |= {("GET", "/docs/oauth2-redirect")}
MATRIX = {
    ("POST", "/accounts"): (WORK, NO_KEY),
    ("GET", "/accounts"): (READ, NO_KEY),
    ("GET", "/accounts/{account_id}"): (READ, NO_KEY),
    ("POST", "/accounts/{account_id}/deposit"): (WORK, KEY),
    ("POST", "/accounts/{account_id}/withdraw"): (RULE, KEY),
    ("POST", "/accounts/{account_id}/top-up"): (WORK, KEY),
    ("POST", "/accounts/{account_id}/bonus"): (WORK, KEY),
    ("POST", "/accounts/{account_id}/spend"): (WORK, KEY),
    ("POST", "/assets"): (RULE, NO_KEY),
    ("GET", "/assets"): (READ, NO_KEY),
    ("GET", "/assets/{code}"): (READ, NO_KEY),
    ("PATCH", "/accounts/{account_id}"): (WORK, NO_KEY),
    ("POST", "/transfers"): (WORK, KEY),
    ("POST", "/transfers/bulk"): (WORK, KEY),
    ("GET", "/accounts/{account_id}/statement"): (READ, NO_KEY),
    ("GET", "/accounts/{account_id}/balance"): (READ, NO_KEY),
    ("GET", "/balances"): (READ, NO_KEY),
    ("GET", "/totals"): (READ, NO_KEY),
    ("POST", "/transactions"): (WORK, KEY),
    ("GET", "/transactions"): (READ, NO_KEY),
    ("GET", "/transactions/{transaction_id}"): (READ, NO_KEY),
    ("POST", "/transactions/{transaction_id}/reverse"): (RULE, KEY),
    ("POST", "/holds"): (WORK, KEY),
    ("GET", "/holds"): (READ, NO_KEY),
    ("GET", "/holds/{hold_id}"): (READ, NO_KEY),
    ("POST", "/holds/{hold_id}/capture"): (WORK, KEY),
    ("POST", "/holds/{hold_id}/void"): (WORK, NO_KEY),
    ("POST", "/payments"): (WORK, KEY),
    ("GET", "/payments/{payment_id}"): (READ, NO_KEY),
    ("POST", "/accounts/{account_id}/freeze"): (RULE, NO_KEY),
    ("POST", "/accounts/{account_id}/unfreeze"): (RULE, NO_KEY),
    ("POST", "/accounts/{account_id}/close"): (RULE, NO_KEY),
    ("GET", "/audit"): (AUDIT, NO_KEY),
    ("GET", "/seals"): (AUDIT, NO_KEY),
    ("GET", "/seals/{seal_id}"): (AUDIT, NO_KEY),
    ("GET", "/events"): (AUDIT, NO_KEY),
    ("GET", "/metrics"): (AUDIT, NO_KEY),
    ("POST", "/bank/accounts"): (WORK, NO_KEY),
    ("GET", "/bank/accounts"): (READ, NO_KEY),
    ("GET", "/bank/accounts/{name}/balance"): (READ, NO_KEY),
    ("POST", "/bank/deposits"): (WORK, NO_KEY),
    ("POST", "/bank/transfers"): (WORK, NO_KEY),
    ("POST", "/bank/payments"): (WORK, NO_KEY),
    ("GET", "/bank/payments/{payment_id}"): (READ, NO_KEY),
    ("GET", "/bank/top-spenders"): (READ, NO_KEY),
    ("GET", "/bank/accounts/{name}/transactions"): (READ, NO_KEY),
    ("GET", "/atm/"): (READ, NO_KEY),
    ("GET", "/atm/health"): (READ, NO_KEY),
    ("GET", "/atm/accounts/{number}/balance"): (READ, NO_KEY),
    ("POST", "/atm/accounts/{number}/deposit"): (WORK, NO_KEY),
    ("POST", "/atm/accounts/{number}/withdraw"): (RULE, NO_KEY),
    ("GET", "/api/v1/wallets/users/{user}/balance"): (READ, NO_KEY),
    ("POST", "/api/v1/wallets/users"): (WORK, NO_KEY),
    ("POST", "/api/v1/wallets/users/{user}/top-up"): (WORK, NO_KEY),
    ("POST", "/api/v1/wallets/users/{user}/bonus"): (WORK, NO_KEY),
    ("POST", "/api/v1/wallets/users/{user}/spend"): (WORK, NO_KEY),
}


def test_every_route_is_for_its_roles_and_for_nobody_else(secured: "BankInside") -> None:
    routes: Any = [route for route in secured.app.routes if hasattr(route, "methods")]
    found = {(method, route.path_format) for route in routes for method in route.methods}
    assert {each for each in found if each[0] != "HEAD"} == set(MATRIX) | OPEN
    for (method, template), (allowed, _) in MATRIX.items():
        path = re.sub("{[a-z_]+}", NOBODY, template)
        # Nothing else about these requests is right, and a caller without the right never hears.
        nonsense = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
        assert refusal(secured.send(method, path, **nonsense)) == (401, "unauthorized")
        for role in ledger.ROLES:
            answer = secured.by(token(role=role)).send(method, path, **nonsense)
            is_allowed = role in allowed.split()
            assert (answer.status_code not in (401, 403)) == is_allowed, (role, method, template)
    for method, path in OPEN | {("GET", "/docs/files/swagger-ui.css")}:
        assert secured.send(method, path).status_code == 200


def test_every_route_takes_a_key_and_some_take_nothing_without_one(secured: "BankInside") -> None:
    admin = secured.by(ADMIN_KEY)
    paths = admin.get("/openapi.json").json()["paths"]
    for (method, template), (_, is_required) in MATRIX.items():
        send = partial(admin.send, method, re.sub("{[a-z_]+}", NOBODY, template), content=b"{")
        missing = [{}, {"Idempotency-Key": "k"}, {"Idempotency-Key": " "}]
        bare, keyed, blank = (outcome(send(headers=headers)) for headers in missing)
        assert (bare == "idempotency_key_missing") == is_required, (method, template)
        # The request is wrong besides, which is found after its key.
        assert keyed not in ("idempotency_key_missing", "idempotency_key_invalid")
        assert (blank == "idempotency_key_invalid") == (method != "GET"), (method, template)
        if template != "/metrics":
            told = paths[template][method.lower()].get("parameters", [])
            required = [one["required"] for one in told if one["name"] == "Idempotency-Key"]
            assert required == ([] if method == "GET" else [is_required]), (method, template)


def test_a_credit_limit_is_an_admins_to_give(secured: "BankInside") -> None:
    admin, service = secured.by(ADMIN_KEY), secured.by(token(role="service"))
    admin.given(alice=0)
    for limit in (0, 5):
        for answer in (
            service.post("/accounts", owner_name="bob", credit_limit=limit),
            change(service, "alice", owner_name="A", credit_limit=limit),
        ):
            assert refusal(answer) == (403, "forbidden")
    assert change(service, "alice", owner_name="A").json()["owner_name"] == "A"
    assert change(admin, "alice", credit_limit=5).json()["available"] == 5
    opened = admin.post("/accounts", owner_name="bob", credit_limit=5)
    assert opened.json()["credit_limit"] == 5
    admin.step("alice", "close")
    assert refusal(change(admin, "alice", credit_limit=9)) == (409, "account_closed")


# ----- Requests
# What is refused before the books are asked: most of it is sent to one ledger, which must be the
# same after each test.


@at_the_edge
@pytest.mark.parametrize(
    "amount",
    ["0", "-1", "-0", "1.0", "5e-1", "1e3", "1e400", '"1"', "true", "null", "[1]", "{}",
     '1.5, "memo": "\\u0041"', str(10**15 + 1), str(2**63), "9" * 400],
    ids=short,
)  # fmt: skip
def test_an_amount_is_a_positive_integer_and_nothing_else(untouched: "Bank", amount: str) -> None:
    refused = untouched.send_raw("/transfers", transfer_of(untouched, amount))
    assert refusal(refused) == (422, "invalid_request")
    assert [error["pointer"] for error in refused.json()["errors"]] == ["/amount"]
    # The refusal does not repeat what was sent.
    assert len(amount) < 10 or amount not in refused.text


@at_the_edge
@pytest.mark.parametrize(
    "amount",
    ["", "01", "+1", "1_000", "0x1", "NaN", "Infinity", "-Infinity", "9" * 5000],
    ids=short,
)
def test_an_amount_that_is_no_number_of_json_is_refused(untouched: "Bank", amount: str) -> None:
    refused = untouched.send_raw("/transfers", transfer_of(untouched, amount))
    assert refusal(refused) == (400, "malformed_json")


def transfer_of(bank: "Bank", amount: str) -> str:
    """Return the body of a transfer from Alice to Bob, with an amount as it stands."""
    return json.dumps(bank.transfer_body(amount=0)).replace('"amount": 0', f'"amount": {amount}')


@at_the_edge
@pytest.mark.parametrize(
    "body",
    [b"", b" ", b"{", b"nonsense", b"{'a': 1}", b'{"a": 1}{"a": 2}', b'{"a": 1,}', b"\x00",
     b'{"amount": 1, "amount": 2}', b'{"a": {"b": 1, "b": 2}}', b'{"memo": "tab\there"}',
     b'{"memo": "\\ud800"}', b'{"\\udfff": 1}', b'{"memo": "\xff"}', b'{"memo": "\xed\xa0\x80"}',
     b'\xef\xbb\xbf{"amount": 1}', '{"amount": 1}'.encode("utf-16"),
     '{"amount": 1}'.encode("utf-32"), b"[" * 60_000, b'{"a":' * 10_000,
     b"[" * 30_000 + b"]" * 30_000],
    ids=short,
)  # fmt: skip
def test_a_body_that_is_no_json_is_refused(untouched: "Bank", body: bytes) -> None:
    assert refusal(untouched.send_raw("/transfers", body)) == (400, "malformed_json")


@at_the_edge
@pytest.mark.parametrize("body", ["null", "[]", "[1]", '"x"', "5", "{}", "true"])
def test_a_body_that_is_no_object_does_not_fit(untouched: "Bank", body: str) -> None:
    assert refusal(untouched.send_raw("/transfers", body)) == (422, "invalid_request")


@at_the_edge
@pytest.mark.parametrize(
    ("field", "pointer", "values"),
    [
        ("memmo", "/memmo", ["a typo"]),
        ("a/b~c", "/a~1b~0c", [1]),
        ("memo", "/memo", ["x" * 201, "nul \x00", "bell \x07", "line\n", "c1 \x85", 5, {}]),
        ("source_account_id", "/source_account_id", ["", 5, NOBODY + "0", NOBODY + "\n"]),
        ("dest_account_id", "/dest_account_id", [NOBODY.replace("-", ""), f"{{{NOBODY}}}"]),
        ("dest_account_id", "/dest_account_id", [NOBODY.replace("7", x) for x in "Ag\u0667"]),
    ],
)
def test_a_field_that_does_not_fit_is_pointed_at(
    untouched: "Bank", field: str, pointer: str, values: list[Any]
) -> None:
    for value in values:
        body = untouched.transfer_body() | {field: value}
        refused = untouched.post("/transfers", key="k", **body)
        assert refusal(refused) == (422, "invalid_request"), value
        assert [error["pointer"] for error in refused.json()["errors"]] == [pointer], value


@at_the_edge
@pytest.mark.parametrize("name", ["", " ", "\u2003", "x" * 201, "a\tb", None, 7])
def test_an_owner_has_a_name(untouched: "Bank", name: Any) -> None:
    assert refusal(untouched.post("/accounts", owner_name=name)) == (422, "invalid_request")


@pytest.mark.parametrize(
    "name", ["x" * 200, "Zoë", "李小龍", "\U0001f680" * 200, " padded ", "O'Neil; --"]
)
def test_any_printable_name_is_kept_as_it_is(bank: "Bank", name: str) -> None:
    opened = bank.post("/accounts", owner_name=name)
    assert (opened.status_code, opened.json()["owner_name"]) == (201, name)
    assert bank.get("/accounts", owner_name=name).json()["items"] == [opened.json()]


@at_the_edge
@pytest.mark.parametrize(
    "path", [NOBODY.upper().replace("7", "A"), "1", "x%00", NOBODY + "%0A", "%ff"]
)
def test_a_path_that_is_nearly_an_id_is_refused(untouched: "Bank", path: str) -> None:
    for url in (f"/accounts/{path}", f"/accounts/{path}/statement", f"/transactions/{path}"):
        assert refusal(untouched.get(url)) == (422, "invalid_request")
    refused = untouched.post(f"/accounts/{path}/deposit", key="k", amount=1)
    assert refusal(refused) == (422, "invalid_request")


@at_the_edge
@pytest.mark.parametrize(
    "declared",
    ["", "text/plain", "application/xml", "application/jsonp", "json",
     "application/json,text/plain", "multipart/form-data; boundary=x", b"\xff",
     "application/x-www-form-urlencoded"],
)  # fmt: skip
def test_a_body_that_is_not_declared_as_json_is_refused(untouched: "Bank", declared: Any) -> None:
    body = json.dumps(untouched.transfer_body())
    refused = untouched.send_raw("/transfers", body, declared=declared)
    assert refusal(refused) == (415, "unsupported_media_type")


@pytest.mark.parametrize(
    "declared",
    ["application/json", "APPLICATION/JSON; charset=utf-8", "application/json;",
     "application/x+json", "application/json; charset=klingon", 'application/json; a="',
     "application/json; \x00"],
)  # fmt: skip
def test_a_body_that_is_declared_as_json_is_read(bank: "Bank", declared: str) -> None:
    body = json.dumps(bank.given(alice=100, bob=0).transfer_body())
    assert bank.send_raw("/transfers", body, declared=declared).status_code == 200


@at_the_edge
def test_a_body_has_at_most_64_kibibytes(untouched: "Bank") -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(100):
            yield b" " * 1_000

    body = json.dumps(untouched.transfer_body(amount=0)).encode()
    for too_long in (body.ljust(65_537), chunks()):
        refused = untouched.send_raw("/transfers", too_long)
        assert refusal(refused) == (413, "body_too_large")
    assert untouched.send_raw("/transfers", body.ljust(65_536)).status_code == 422


def test_a_change_of_state_takes_no_body_but_a_key(bank: "Bank") -> None:
    path = f"/accounts/{bank.given(alice=0).ids['alice']}/freeze"
    assert refusal(bank.post(path, reason="fraud")) == (422, "invalid_request")
    assert refusal(bank.send("POST", path, content=b"now!")) == (400, "malformed_json")
    first = bank.send("POST", path, headers={"Idempotency-Key": "k"})
    assert first.json()["status"] == "FROZEN"
    again = bank.post(path, key="k")
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")


@at_the_edge
def test_a_key_is_required_where_money_moves(untouched: "Bank") -> None:
    account = f"/accounts/{untouched.ids['alice']}"
    for path in ("/transfers", "/payments", f"{account}/deposit", f"{account}/withdraw"):
        for body in ('{"amount": 1}', '{"nonsense": 1}'):
            refused = untouched.send_raw(path, body, None)
            assert refusal(refused) == (400, "idempotency_key_missing")


@at_the_edge
@pytest.mark.parametrize(
    "key",
    ["", " ", "a b", '"', '""', '"a', 'a b"', "x" * 256, '"' + "x" * 256 + '"', "tab\there",
     b"caf\xe9", "\x7f", '" "'],
)  # fmt: skip
def test_an_odd_key_is_refused(untouched: "Bank", key: Any) -> None:
    bodies = {"/transfers": untouched.transfer_body(), "/accounts": {"owner_name": "Zoe"}}
    for path, body in bodies.items():
        refused = untouched.send_raw(path, json.dumps(body), key)
        assert refusal(refused) == (400, "idempotency_key_invalid")


@at_the_edge
def test_a_repeated_key_header_is_refused(untouched: "Bank") -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    refused = untouched.send("POST", "/accounts", json={"owner_name": "x"}, headers=headers)
    assert refusal(refused) == (400, "idempotency_key_invalid")


@pytest.mark.parametrize(
    "key", ["x", "x" * 255, '"' + "x" * 255 + '"', "!#$%&'()*+,-./:;<=>?@[]^_`{|}~"]
)
def test_a_visible_key_is_taken(bank: "Bank", key: str) -> None:
    first, again = (bank.post("/accounts", key=key, owner_name="Alice") for _ in range(2))
    assert (first.status_code, again.content) == (201, first.content)


def test_checks_come_in_their_order(bank: "Bank") -> None:
    bank.given(alice=0).ids["nobody"] = NOBODY
    foreign = {"Host": "evil.example"}
    path = f"/accounts/{NOBODY}/withdraw"
    assert refusal(bank.send("POST", path, json={}, headers=foreign))[1] == "forbidden"
    assert refusal(bank.post(path, amount=-1))[1] == "idempotency_key_missing"
    assert refusal(bank.withdraw("nobody", -1))[1] == "invalid_request"
    assert refusal(bank.withdraw("nobody", 1))[1] == "account_not_found"
    bank.step("alice", "freeze")
    assert refusal(bank.withdraw("alice", 1))[1] == "account_frozen"
    bank.step("alice", "unfreeze")
    assert refusal(bank.withdraw("alice", 1))[1] == "insufficient_funds"


@pytest.mark.parametrize(("count", "pages"), [(0, [0]), (1, [1]), (2, [2]), (3, [2, 1])])
def test_a_cursor_is_given_only_where_there_is_more(
    bank: "Bank", count: int, pages: list[int]
) -> None:
    bank.given(alice=0)
    for _ in range(count):
        bank.deposit("alice", 1)
    path = f"/accounts/{bank.ids['alice']}/statement"
    assert [len(page) for page in bank.pages(path, limit=2)] == pages


def forged(place: str) -> str:
    """Return a cursor of the audit log as somebody can make it who has read the source."""
    listed = json.dumps(["audit", {"account_id": None}, place])
    return f"{place}.{hashlib.sha256(listed.encode()).hexdigest()[:16]}"


def test_a_cursor_is_good_for_its_own_list_alone(bank: "Bank") -> None:
    for name in bank.given(alice=0, bob=0).ids:
        bank.deposit(name, 1)
        bank.deposit(name, 1)
    path = f"/accounts/{bank.ids['alice']}/statement"
    good = bank.get(path, limit=1).json()["next_cursor"]
    assert re.fullmatch("[A-Za-z0-9._~-]+", good)
    assert len(bank.get(path, limit=50, cursor=good).json()["items"]) == 1
    everybodys = bank.get("/accounts", limit=1).json()["next_cursor"]
    for where, parameters in (
        ("/accounts", {"cursor": good}),
        (f"/accounts/{bank.ids['bob']}/statement", {"cursor": good}),
        ("/accounts", {"cursor": everybodys, "owner_name": "alice"}),
    ):
        assert refusal(bank.get(where, **parameters)) == (400, "invalid_cursor")


@at_the_edge
def test_a_cursor_that_was_never_given_is_refused(untouched: "Bank") -> None:
    good = forged("0_g")
    assert untouched.get("/audit", cursor=good).status_code == 200
    strange = ["", "x", good + "0", "9" + good, good.upper() + "=", "\u0661" + good]
    strange += map(forged, ("-1_g", "9" * 400 + "_g", "x_g", "1.5_g", "1", "_", "1_\u0661", "1_+"))
    for cursor in strange:
        refused = untouched.get("/audit", cursor=cursor)
        assert refusal(refused) == (400, "invalid_cursor"), cursor
        assert refused.json()["detail"] == "Invalid cursor"


def test_a_cursor_survives_a_restart(database: str) -> None:
    with opened(database) as bank:
        bank.given(alice=1).deposit("alice", 2)
        path = f"/accounts/{bank.ids['alice']}/statement"
        cursor = bank.get(path, limit=1).json()["next_cursor"]
    with opened(database) as bank:
        assert [entry["amount"] for entry in bank.get(path, cursor=cursor).json()["items"]] == [1]


@at_the_edge
@pytest.mark.parametrize("limit", ["0", "-1", "201", "1" + "0" * 30, "x", "", "1.5", "true", "5\n"])
@pytest.mark.parametrize("path", ["/accounts", f"/accounts/{NOBODY}/statement"])
def test_an_absurd_limit_is_refused(untouched: "Bank", path: str, limit: str) -> None:
    refused = untouched.get(path, limit=limit)
    assert refusal(refused) == (422, "invalid_request")
    assert refused.json()["errors"][0]["pointer"] == "/limit"


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
        (b"GET /accounts/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /accounts HTTP/1.1\r\n\r\n", b"403"),
        (b"GET /accounts?owner_name=%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"422"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 60_000 + b"\r\n\r\n", b"200"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 66_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 500_000, b"431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 50_000, b"431"),
        (b"GET /health?" + b"x" * 66_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"GET /" + b"x" * 500_000, b"414"),
        (b"BREW /accounts HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"nonsense\r\n\r\n", b"400"),
    ],
    ids=short,
)  # fmt: skip
def test_odd_bytes_get_a_clear_answer(
    server: "Server", request_bytes: bytes, status: bytes
) -> None:
    answer = b""
    with socket.create_connection(server.bank.address(), timeout=30) as wire:
        wire.sendall(request_bytes)
        with suppress(ConnectionResetError):
            while chunk := wire.recv(65_536):
                answer += chunk
                is_kept_open = b"connection: close" not in answer.lower()
                if is_kept_open and b"\r\n\r\n" in answer and answer.endswith((b"}", b".")):
                    break
    assert answer.startswith(b"HTTP/1.1 " + status)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_trailers_are_no_headers(database: str) -> None:
    with serving(database, LEDGER_ADMIN_KEY=ADMIN_KEY) as server:
        head = b"POST /accounts HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        body = b'Transfer-Encoding: chunked\r\n\r\n19\r\n{"owner_name": "mallory"}\r\n0\r\n'
        with socket.create_connection(server.bank.address(), timeout=30) as wire:
            wire.sendall(head + body + b"X-API-Key: " + ADMIN_KEY.encode() + b"\r\n\r\n")
            assert wire.recv(65_536).startswith(b"HTTP/1.1 401")


def test_who_ends_his_half_of_the_connection_gets_his_answer(server: "Server") -> None:
    read = b"GET /accounts HTTP/1.1\r\nHost: localhost\r\n\r\n"
    write = b"POST /accounts HTTP/1.1\r\n" + HEAD + b"Content-Length: 2\r\n\r\n{}"
    for request, status in ((read, b"200"), (write, b"422")):
        with socket.create_connection(server.bank.address(), timeout=30) as wire:
            wire.sendall(request)
            wire.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(partial(wire.recv, 65_536), b""))
        assert answer.startswith(b"HTTP/1.1 " + status)
        assert answer.endswith(b"}")


def run_impatient(*given: Any) -> None:
    """Serve callers who have a second for a request."""
    ledger.REQUEST_SECONDS_MAX = ledger.KEEP_ALIVE_SECONDS = 1
    run_main(*given)


@on_sqlite
def test_who_sends_nothing_or_half_a_request_is_left(database: str) -> None:
    with serving(database, start=partial(as_fork, target=run_impatient)) as server:
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        early = b"POST /transfers HTTP/1.1\r\n" + HEAD + b"Content-Length: 70000\r\n\r\n"
        parts = (b"", whole[:20], whole, whole + whole[:20], early, early[:-1] + b"\nx")
        with ExitStack() as stack:
            call = partial(socket.create_connection, server.bank.address(), timeout=30)
            wires = [stack.enter_context(call()) for _ in parts]
            for wire, sent in zip(wires, parts, strict=True):
                wire.sendall(sent)
            for wire in wires:
                with suppress(ConnectionResetError):
                    while wire.recv(65_536):
                        pass
        assert server.bank.get("/health").status_code == 200


@on_sqlite
def test_who_does_not_read_is_left(database: str) -> None:
    with serving(database, start=partial(as_fork, target=run_impatient)) as server:
        with socket.create_connection(server.bank.address(), timeout=30) as wire:
            request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"
            wire.sendall(request * 1_000)

            def is_left() -> bool:
                with suppress(ConnectionResetError, BrokenPipeError):
                    wire.sendall(request)
                    return False
                return True

            wait_until(is_left)
            answers = b""
            with suppress(ConnectionResetError):
                answers = b"".join(iter(partial(wire.recv, 65_536), b""))
        assert answers.count(b"HTTP/1.1 200") < 1_000
        assert server.bank.get("/health").status_code == 200


def run_with_few_files(*given: Any) -> None:
    """Serve with hardly more files than a server needs."""
    import resource

    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    run_main(*given)


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_server_without_file_descriptors_says_so_and_goes_on(database: str) -> None:
    start = partial(as_fork, target=run_with_few_files)
    with serving(database, start=start) as server, ExitStack() as stack:
        for _ in range(100):
            stack.enter_context(socket.create_connection(server.bank.address(), timeout=30))
        wait_until(lambda: "hardly more files can be opened" in server.log.read_text())
        # Who is idle gives way to who has something to ask.
        assert server.bank.given(alice=5).funds("alice") == (5, 0, 5)
        stack.close()
        wait_until(lambda: is_answered(server.bank))


def is_answered(bank: "Bank") -> bool:
    """Tell whether a server takes connections."""
    with suppress(httpx.TransportError):
        return bank.get("/health").status_code == 200
    return False


def test_a_caller_who_goes_away_leaves_the_server_well(server: "Server") -> None:
    bank = server.bank.given(eve=0)
    path = f"/accounts/{bank.ids['eve']}/deposit".encode()
    whole = b'POST %s HTTP/1.1\r\n%sContent-Length: 12\r\n\r\n{"amount":1}' % (path, HEAD)
    for request in (whole, whole[:-4]):
        with socket.create_connection(bank.address()) as wire:
            wire.sendall(request)
    assert bank.deposit("eve", 1, key="k").status_code == 200
    assert bank.balances()["eve"] == 1


def test_an_answer_to_a_wrong_path_says_what_there_is(shared: "Bank") -> None:
    shown = {
        f"/accounts/{shared.ids['alice']}/balances": "/accounts/{account_id}/balance",
        "/transfers/": "there is /transfers/bulk",
        "/acounts": "there is /transfers, ",
        "/accounts/a/b/c": "There is nothing at this address",
    }
    for path, there in shown.items():
        answer = shared.get(path)
        assert refusal(answer) == (404, "not_found")
        assert there in answer.json()["detail"]
    assert answer.json()["detail"] == "There is nothing at this address"


# ----- The API
# What the canonical routes show, list and describe.


def test_the_shapes_are_those_of_the_contract(bank: "Bank") -> None:
    sent = bank.given(alice=100, bob=0).transfer("alice", "bob", 1).json()
    account = {"id", "name", "owner_name", "asset", "status", "balance", "held", "available"}
    account |= {"credit_limit", "external_id", "metadata", "created_at"}
    entry = {"id", "ts", "account_id", "transaction_id", "amount", "type", "balance", "ref", "kind"}
    entry |= {"seq", "effective_at"}
    shown = bank.get(f"/transactions/{sent['transfer_id']}").json()
    moved = {"transfer_id", "amount", "asset", "memo", "ts", "effective_at", "source", "dest"}
    assert set(sent) == moved
    assert set(sent["source"]) == set(bank.deposit("bob", 1).json()) == account
    names = {"external_id", "metadata", "reverses", "reversed_by", "hold_id", "effective_at"}
    assert set(shown) == {"id", "kind", "memo", "ts", "entries"} | names
    assert set(shown["entries"][0]) == set(bank.statement("bob")[0]) == entry
    assert shown["ts"] == sent["ts"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", sent["ts"])


def test_a_refusal_names_the_account_that_it_is_about(demo: "Bank") -> None:
    demo.given(alice=10, bob=0, frozen=5, closed=0, paid=50).given(asset="EUR", eva=0)
    demo.step("frozen", "freeze")
    demo.step("closed", "close")
    demo.pay("paid", 50)
    hold = demo.promised("alice", "bob", 1)
    wallet, *_ = demo.get("/accounts", name="wallets:user_bob").json()["items"]
    alice, bob, frozen = (demo.ids[name] for name in ("alice", "bob", "frozen"))
    demo.ids |= {"wallet": wallet["id"], "nobody": NOBODY}
    many = {f"one of many {number}": 0 for number in range(90)}
    demo.given(many)
    entries = entries_of(demo, dict.fromkeys(many, 1) | {"alice": -95, "closed": 5})
    again = [*entries_of(demo, {"alice": -2, "bob": 1}), *entries_of(demo, {"bob": 1})]
    for refused, code, members in (
        (demo.post("/transactions", key="k", entries=entries), "account_closed", "closed"),
        (journal(demo, dict.fromkeys(many, 1) | {"alice": -90}), "insufficient_funds", "alice"),
        (journal(demo, dict.fromkeys(many, 1) | {"nobody": -90}), "account_not_found", "nobody"),
        (journal(demo, dict.fromkeys(many, 1) | {"wallet": -90}), "asset_closed_loop", "wallet"),
        (demo.post("/transactions", key="r", entries=again), "account_repeated", "bob"),
        (demo.withdraw("frozen", 1), "account_frozen", "frozen"),
        (demo.hold("alice", "frozen", 1), "account_frozen", "frozen"),
        (demo.deposit("wallet", 1), "asset_closed_loop", "wallet"),
        (demo.transfer("alice", "alice", 1), "same_account", "alice"),
        (demo.step("frozen", "freeze"), "invalid_state_transition", "frozen"),
        (demo.step("frozen", "close"), "account_not_empty", "frozen"),
        (demo.step("paid", "close"), "cashback_pending", "paid"),
        (demo.get(f"/accounts/{NOBODY}/statement"), "account_not_found", "nobody"),
        (
            demo.get(f"/accounts/{bob}/balance", at="1999-01-01T00:00:00Z"),
            "account_not_found",
            "bob",
        ),
    ):
        told = refused.json()
        assert (refusal(refused)[1], told["account_id"]) == (code, demo.ids[members])
    told = demo.step("bob", "close").json()
    assert (told["code"], told["account_id"], told["hold_id"]) == ("holds_pending", bob, hold)
    told = demo.transfer("alice", "eva", 1).json()
    ends = (told["account_id"], told["dest_account_id"])
    assert (told["code"], *ends) == ("asset_mismatch", alice, demo.ids["eva"])
    results = bulk(demo, item(demo, "frozen", "bob", 1), atomic=False).json()["results"]
    assert results[0]["error"]["account_id"] == frozen


def test_a_refusal_names_the_hold_or_transaction_that_it_is_about(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    captured, voided, late, held = (bank.promised("alice", "bob", 5, expires_in=60) for _ in "abcd")
    capture = bank.capture(captured).json()["transaction_id"]
    bank.void(voided)
    for refused, code, hold in (
        (bank.capture(held, amount=6), "amount_exceeds_hold", held),
        (bank.capture(NOBODY), "hold_not_found", NOBODY),
        (bank.get(f"/holds/{NOBODY}"), "hold_not_found", NOBODY),
        (bank.void(captured), "hold_captured", captured),
        (bank.capture(voided), "hold_voided", voided),
    ):
        assert (refusal(refused)[1], refused.json()["hold_id"]) == (code, hold)
    bank.pass_time(60_000_000)
    told = bank.capture(late).json()
    assert (told["code"], told["hold_id"]) == ("hold_expired", late)
    payment = bank.pay("alice", 50).json()["payment_id"]
    bank.pass_time(DAY)
    reversal = bank.reverse(capture).json()["id"]
    for refused, code, transaction in (
        (bank.reverse(payment), "cashback_credited", payment),
        (bank.reverse(capture), "already_reversed", capture),
        (bank.reverse(reversal), "not_reversible", reversal),
        (bank.reverse(NOBODY), "transaction_not_found", NOBODY),
        (bank.get(f"/transactions/{NOBODY}"), "transaction_not_found", NOBODY),
        (bank.get(f"/payments/{NOBODY}"), "payment_not_found", NOBODY),
    ):
        assert (refusal(refused)[1], refused.json()["transaction_id"]) == (code, transaction)
    assert bank.reverse(payment).json()["credited_by"] in bank.reverse(payment).json()["detail"]


def test_a_refused_external_id_names_what_has_it(bank: "BankInside") -> None:
    body = {"owner_name": "alice", "external_id": "x"}
    first, second = bank.together(("/accounts", body), ("/accounts", body))
    assert second.json()["account_id"] == bank.post("/accounts", **body).json()["account_id"]
    assert second.json()["account_id"] == first.json()["id"]
    bank.given(alice=100, bob=0)
    hold = bank.promised("alice", "bob", 1, external_id="x")
    assert bank.hold("alice", "bob", 1, external_id="x").json()["hold_id"] == hold
    moved = bank.transfer("alice", "bob", 1, external_id="x").json()["transfer_id"]
    assert bank.deposit("bob", 1, external_id="x").json()["transaction_id"] == moved


@at_the_edge
def test_what_does_not_exist_is_not_found(untouched: "Bank") -> None:
    for path, code in (
        (f"/accounts/{NOBODY}", "account_not_found"),
        (f"/accounts/{NOBODY}/statement", "account_not_found"),
        (f"/transactions/{NOBODY}", "transaction_not_found"),
        (f"/payments/{NOBODY}", "payment_not_found"),
        (f"/holds/{NOBODY}", "hold_not_found"),
    ):
        assert refusal(untouched.get(path)) == (404, code)


def test_assets_are_listed_by_their_codes(bank: "Bank") -> None:
    for code in ("Z.Z", "A_1-B"):
        add_asset(bank, code)
    codes = [asset["code"] for page in bank.pages("/assets", limit=2) for asset in page]
    assert codes == sorted([*ledger.ASSETS, "Z.Z", "A_1-B"])
    [gold] = [a for a in bank.get("/assets").json()["items"] if a["code"] == "GOLD"]
    assert gold == {"code": "GOLD", "name": "Gold Coins", "exponent": 4, "closed_loop": True}
    told = bank.get("/events").json()["items"][0]
    added = {"code": "Z.Z", "name": "Z.Z", "exponent": 8, "closed_loop": False}
    assert (told["type"], told["data"]) == ("asset.added", added)


@pytest.mark.parametrize(
    ("columns", "pointer"),
    [
        *[({"code": code}, "/code") for code in ("", "btc", "1A", "A" * 17, "A B", "A@", "A\n", 5)],
        *[({"exponent": exponent}, "/exponent") for exponent in (-1, 13, 2.0, "2", None)],
        *[({"name": name}, "/name") for name in ("", " ", "a" * 201, "a\0")],
        ({"closed_loop": 1}, "/closed_loop"),
        ({"symbol": "B"}, "/symbol"),
    ],
    ids=short,
)
def test_an_asset_that_does_not_fit_is_pointed_at(
    untouched: "Bank", columns: dict[str, Any], pointer: str
) -> None:
    asset = {"code": "BTC", "name": "Bitcoin", "exponent": 8, **columns}
    assert pointers(untouched.post("/assets", **asset)) == [pointer]


def test_a_hold_has_the_shape_of_the_contract(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    plain, named = bank.hold("alice", "bob", 1).json(), {"external_id": "h1", "memo": "hotel"}
    assert set(plain) == {
        "id", "status", "account_id", "dest_account_id", "asset", "amount", "captured_amount",
        "transaction_id", "memo", "external_id", "metadata", "created_at", "expires_at",
    }  # fmt: skip
    assert (plain["memo"], plain["external_id"], plain["metadata"]) == (None, None, {})
    hold = bank.hold("alice", "bob", 1, **named, metadata={"room": "7"}).json()
    assert hold["metadata"] == {"room": "7"}
    assert {name: hold[name] for name in named} == named
    assert refusal(bank.hold("alice", "bob", 1, **named)) == (409, "external_id_exists")


@at_the_edge
@pytest.mark.parametrize("seconds", [0, -1, 31_536_001, 1.5, "60", True, None])
def test_a_hold_lasts_a_second_to_a_year(untouched: "Bank", seconds: Any) -> None:
    refused = untouched.hold("alice", "bob", 1, expires_in=seconds)
    assert refusal(refused) == (422, "invalid_request")
    assert refused.json()["errors"][0]["pointer"] == "/expires_in"


def test_a_hold_that_does_not_exist_is_neither_captured_nor_voided(bank: "Bank") -> None:
    assert refusal(bank.capture(NOBODY)) == (404, "hold_not_found")
    assert refusal(bank.void(NOBODY)) == (404, "hold_not_found")


def test_a_capture_is_replayed_and_a_void_needs_no_key(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    hold = bank.promised("alice", "bob", 10)
    first, again = (bank.capture(hold, key="k") for _ in range(2))
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
    other = bank.promised("alice", "bob", 10)
    assert refusal(bank.capture(other, key=None)) == (400, "idempotency_key_missing")
    assert refusal(bank.void(other, amount=1)) == (422, "invalid_request")
    assert bank.send("POST", f"/holds/{other}/void").json()["status"] == "VOIDED"
    assert bank.balances() == {"alice": 90, "bob": 10}


def test_holds_are_listed_newest_first_by_account_and_status(bank: "BankInside") -> None:
    bank.given(alice=100, bob=100, carol=0)
    ends = [("alice", "bob"), ("bob", "carol"), ("alice", "carol"), ("bob", "alice")]
    holds = [bank.promised(*ends[n % 4], 1, expires_in=60 if n < 4 else 600) for n in range(12)]
    bank.capture(holds[4])
    bank.void(holds[5])
    bank.pass_time(60_000_000)

    def listed(**filters: str) -> list[int]:
        pages = list(bank.pages("/holds", limit=2, **filters))
        assert all(len(page) == 2 for page in pages[:-1])
        return [holds.index(hold["id"]) for page in pages for hold in page]

    assert listed() == list(range(11, -1, -1))
    assert listed(account_id=bank.ids["carol"]) == [10, 9, 6, 5, 2, 1]
    assert listed(status="EXPIRED") == [3, 2, 1, 0]
    assert listed(status="PENDING") == [11, 10, 9, 8, 7, 6]
    assert listed(status="PENDING", account_id=bank.ids["carol"]) == [10, 9, 6]
    assert (listed(status="CAPTURED"), listed(status="VOIDED")) == ([4], [5])
    assert listed(account_id=NOBODY) == []
    assert refusal(bank.get("/holds", status="GONE")) == (422, "invalid_request")


def test_an_account_shows_what_is_available_wherever_it_is_shown(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    bank.promised("alice", "bob", 60, expires_in=60)
    [shown] = bank.get("/accounts", owner_name="alice").json()["items"]
    assert (shown["balance"], shown["held"], shown["available"]) == (100, 60, 40)
    assert bank.deposit("alice", 1).json()["available"] == 41
    bank.pass_time(60_000_000)
    [shown] = bank.get("/accounts", owner_name="alice").json()["items"]
    assert (shown["held"], shown["available"]) == (0, 101)
    assert bank.deposit("alice", 1).json()["available"] == 102


def test_every_account_is_listed_once_oldest_first(bank: "Bank") -> None:
    names = [f"owner {number}" for number in range(12)]
    bank.given(dict.fromkeys(names[:9], 0))
    seen = []
    for page in bank.pages("/accounts", limit=4):
        seen += [account["owner_name"] for account in page]
        bank.given(dict.fromkeys(names[len(bank.ids) :][:1], 0))
    assert seen == names[:11]


def test_accounts_are_found_by_their_owner(bank: "Bank") -> None:
    bank.given(alice=1, bob=2).given(alice=3)
    found = bank.get("/accounts", owner_name="alice").json()["items"]
    assert [account["balance"] for account in found] == [1, 3]
    assert bank.get("/accounts", owner_name="nobody").json() == {"items": [], "next_cursor": None}
    assert bank.get("/accounts", name="atm:1001").json()["items"] == []


def test_a_statement_is_stable_while_entries_arrive(bank: "Bank") -> None:
    bank.given(alice=0)
    for amount in range(1, 24):
        bank.deposit("alice", amount)
    seen = []
    for page in bank.pages(f"/accounts/{bank.ids['alice']}/statement", limit=5):
        seen += [entry["amount"] for entry in page]
        bank.deposit("alice", 1000)
    assert seen == list(range(23, 0, -1))


def test_entries_tell_their_number_wherever_they_are_shown(bank: "Bank") -> None:
    bank.given(alice=3, bob=0)
    moved = bank.transfer("alice", "bob", 1).json()["transfer_id"]
    assert [entry["seq"] for entry in bank.statement("alice")] == [2, 1]
    [listed, _] = bank.get("/transactions").json()["items"]
    shown = bank.get(f"/transactions/{moved}").json()
    for transaction in (listed, shown, bank.get("/events").json()["items"][-1]["data"]):
        assert [entry["seq"] for entry in transaction["entries"]] == [2, 1]


def test_the_audit_log_is_read_newest_first(bank: "Bank") -> None:
    bank.given(alice=100).transfer("alice", "alice", 1)
    bank.deposit("alice", 5, key="k", memo="wages")
    bank.deposit("alice", 5, key="k", memo="wages")
    bank.withdraw("alice", 1_000)
    events = bank.get("/audit").json()["items"]
    actions = [(event["caller"], event["action"]) for event in events]
    assert actions == [("local", "deposit"), ("local", "deposit"), ("local", "open_account")]
    newest = bank.statement("alice")[0]
    assert events[0].pop("id") == newest["transaction_id"]
    assert events[0] == {
        "ts": newest["ts"],
        "caller": "local",
        "action": "deposit",
        "account_id": bank.ids["alice"],
        "transaction_id": newest["transaction_id"],
        "details": {
            "account_id": bank.ids["alice"],
            "body": {"amount": 5, "memo": "wages"},
        },
    }


@pytest.mark.parametrize("limit", [1, 2, 3, 200])
def test_the_audit_log_of_an_account_has_all_that_touched_it(
    bank: "BankInside", limit: int
) -> None:
    bank.given(alice=100, bob=0, carol=50).transfer("alice", "bob", 60)
    bank.step("bob", "freeze")
    bank.transfer("alice", "carol", 10)
    bank.step("bob", "unfreeze")
    bank.transfer("bob", "carol", 1)
    bank.pay("bob", 50)
    bank.pass_time(DAY)

    def actions(**filters: str) -> list[str]:
        pages = bank.pages("/audit", limit=limit, **filters)
        return [event["action"] for page in pages for event in page]

    of_bob = ["credit_cashback", "pay", "transfer", "unfreeze", "freeze", "transfer"]
    assert actions(account_id=bank.ids["bob"]) == [*of_bob, "open_account"]
    of_alice = ["transfer", "transfer", "deposit", "open_account"]
    assert actions(account_id=bank.ids["alice"]) == of_alice
    assert len(actions()) == len(bank.rows("SELECT id FROM event")) == 12


def test_the_audit_log_tells_of_holds_and_reversals(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    bank.void(bank.promised("alice", "bob", 1))
    bank.capture(bank.promised("alice", "bob", 1))
    bank.reverse(bank.last("bob"))

    def actions(name: str) -> list[str]:
        items = bank.get("/audit", account_id=bank.ids[name]).json()["items"]
        return [event["action"] for event in items]

    of_alice = ["reverse", "capture", "hold", "void", "hold", "deposit", "open_account"]
    assert actions("alice") == of_alice
    assert actions("bob") == ["reverse", "capture", "open_account"]


def test_the_audit_log_is_stable_while_events_arrive(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    listed: list[str] = []
    for page in bank.pages("/audit", limit=1, account_id=bank.ids["alice"]):
        listed += [event["id"] for event in page]
        bank.deposit("alice", 1)
        bank.step("alice", "freeze")
        bank.step("alice", "unfreeze")
    assert len(listed) == len(set(listed)) == 2


def test_each_event_has_a_type_and_tells_what_happened(demo: "Bank") -> None:
    last = demo.get("/events", limit=200).json()["next"]
    opened = demo.post("/accounts", owner_name="bob", metadata={"a": "1"}).json()
    demo.given(alice=100).ids["bob"] = bob = opened["id"]
    held = demo.hold("alice", "bob", 1).json()
    voided = demo.void(held["id"]).json()
    demo.send("PATCH", f"/accounts/{bob}", json={"owner_name": "Bob", "metadata": {}})
    demo.send("PATCH", f"/accounts/{bob}", json={"metadata": {"b": "2"}})
    for step in ("freeze", "unfreeze", "close"):
        demo.step("bob", step)
    events = demo.get("/events", after=last).json()["items"]
    alice = demo.get(f"/accounts/{demo.ids['alice']}").json()
    posted = demo.get(f"/transactions/{demo.last('alice')}").json()
    assert posted.pop("reversed_by") is None
    assert [(event["type"], event["data"]) for event in events] == [
        ("account.opened", opened),
        ("account.opened", alice | {"balance": 0, "available": 0}),
        ("transaction.posted", posted),
        ("hold.created", held),
        ("hold.voided", voided),
        ("account.updated", {"id": bob, "owner_name": "Bob", "metadata": {}}),
        ("account.updated", {"id": bob, "metadata": {"b": "2"}}),
        ("account.frozen", {"id": bob, "status": "FROZEN"}),
        ("account.unfrozen", {"id": bob, "status": "ACTIVE"}),
        ("account.closed", {"id": bob, "status": "CLOSED"}),
    ]
    assert events[-1].keys() == {"id", "type", "ts", "caller", "data"}


def test_an_event_tells_the_same_for_ever(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    captured, voided, _ = (bank.promised("alice", "bob", n, expires_in=60) for n in (1, 2, 3))
    told = bank.get("/events").json()["items"]
    for change in (
        lambda: bank.capture(captured, amount=1),
        lambda: bank.void(voided),
        lambda: bank.pass_time(60_000_000),
        lambda: bank.reverse(bank.last("bob")),
        lambda: bank.send("PATCH", f"/accounts/{bank.ids['alice']}", json={"owner_name": "A"}),
        lambda: bank.send("PATCH", f"/accounts/{bank.ids['bob']}", json={"metadata": {"a": "b"}}),
        lambda: bank.withdraw("alice", 90),
        lambda: bank.step("alice", "freeze"),
        lambda: bank.step("bob", "close"),
    ):
        change()
        events = bank.get("/events").json()["items"]
        assert events[: len(told)] == told
        told = events
    # The third hold expired, which the reversal told, since it needed its money.
    assert len(told) == 15


def test_accounts_of_every_dialect_are_told_as_they_were_opened(demo: "Bank") -> None:
    kata_accounts(demo, "a1", balance=5)
    demo.post(USERS, external_user_id="dave")
    for account in demo.get("/accounts", limit=200).json()["items"]:
        demo.send(
            "PATCH", f"/accounts/{account['id']}", json={"owner_name": "X", "metadata": {"a": "b"}}
        )
    told = [event["data"] for event in demo.get("/events", limit=200).json()["items"]]
    opened = [data for data in told if data.get("created_at") and data.get("name")]
    owners = {account["name"]: account["owner_name"] for account in opened}
    assert owners["bank:a1"] == "a1"
    assert owners["atm:1001"] == "1001"
    assert (owners["wallets:user_alice"], owners["wallets:dave"]) == ("user_alice", "dave")
    for account in opened:
        assert (funds_of(account), account["status"]) == ((0, 0, 0), "ACTIVE")
        assert account["metadata"] == {}


def ended_by_time(bank: "Bank") -> list[tuple[str, str, str]]:
    """Return the holds that expired, with who said so in the audit log."""
    events = bank.get("/events", limit=200).json()["items"]
    told = [event for event in events if event["type"] == "hold.expired"]
    logged = {one["id"]: one for one in bank.get("/audit", limit=200).json()["items"]}
    return [
        (each["data"]["id"], each["data"]["status"], logged[each["id"]]["action"]) for each in told
    ]


def test_a_hold_that_expires_is_told_once_at_the_first_write_that_needs_it(
    bank: "BankInside",
) -> None:
    bank.given(alice=100, bob=0)
    first, second = (bank.promised("alice", "bob", 10, expires_in=n) for n in (1, 3))
    bank.pass_time(2_000_000)
    # A read that comes earlier tells nothing, and shows that it has expired.
    assert bank.get(f"/holds/{first}").json()["status"] == "EXPIRED"
    assert ended_by_time(bank) == []
    assert bank.transfer("alice", "bob", 90).status_code == 200
    assert ended_by_time(bank) == [(first, "EXPIRED", "expire")]
    [event] = [e for e in bank.get("/events").json()["items"] if e["type"] == "hold.expired"]
    assert (event["caller"], event["data"]["captured_amount"]) == ("system", 0)
    bank.pass_time(2_000_000)
    for _ in range(2):
        bank.runner.run(ledger.expire_due(bank.ledger, ledger.utc_now()))
    assert [hold for hold, *_ in ended_by_time(bank)] == [first, second]
    # Neither is a frozen account in the way, nor is a hold told that ended otherwise.
    third, voided = (bank.promised("alice", "bob", 5, expires_in=1) for _ in range(2))
    bank.void(voided)
    bank.step("alice", "freeze")
    bank.pass_time(2_000_000)
    bank.runner.run(ledger.expire_due(bank.ledger, ledger.utc_now()))
    assert [hold for hold, *_ in ended_by_time(bank)] == [first, second, third]
    assert bank.wrong() == []


def test_a_refused_command_tells_of_no_expiry(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    hold = bank.promised("alice", "bob", 10, expires_in=1)
    bank.pass_time(2_000_000)
    # Its accounts are loaded within the batch, so that the release is taken back with the rest.
    bank.ledger.commit(
        [command_of(ledger.transfer, bank.ids["alice"], bank.ids["bob"], amount=999)]
    )
    assert bank.rows("SELECT status FROM hold") == [("PENDING",)]
    assert ended_by_time(bank) == []
    bank.deposit("alice", 1)
    assert ended_by_time(bank) == [(hold, "EXPIRED", "expire")]


def test_a_thousand_holds_that_expire_at_once_let_callers_go_on(bank: "BankInside") -> None:
    bank.given(alice=2_000, bob=0, carol=0)

    def promise(book: ledger.Book) -> None:
        place = partial(ledger.place_hold, book, bank.ids["alice"], bank.ids["bob"])
        for _ in range(1_000):
            place(amount=1, expires_in=1, external_id=None)

    bank.execute(promise)
    bank.pass_time(2_000_000)

    async def deposit_meanwhile() -> list[httpx.Response]:
        path, key = f"/accounts/{bank.ids['carol']}/deposit", {"Idempotency-Key": new_key()}
        expiring = ledger.expire_due(bank.ledger, ledger.utc_now())
        sent = bank.ask("POST", path, json={"amount": 1}, headers=key)
        return [answer for answer in await asyncio.gather(expiring, sent) if answer]

    [answer] = bank.runner.run(deposit_meanwhile())
    assert answer.json()["balance"] == 1
    assert bank.rows("SELECT status, count(*) FROM hold GROUP BY status") == [("EXPIRED", 1_000)]
    assert bank.rows("SELECT count(*) FROM event WHERE kind = 'expire'") == [(1_000,)]
    assert bank.wrong() == []


def test_a_server_tells_of_an_expiry_by_itself_and_two_do_once(servers: "Bank") -> None:
    servers.given(exa=100, exb=0)
    hold = servers.promised("exa", "exb", 10, expires_in=1)
    query = f"""SELECT caller, ts - expires_at FROM event JOIN hold ON hold.id = '{hold}'
        WHERE event.kind = 'expire' AND event.account_id = '{servers.ids["exa"]}'"""
    wait_until(lambda: servers.rows(query) != [])
    [(caller, late)] = servers.rows(query)
    assert (caller, late >= 0) == ("system", True)
    assert servers.get(f"/holds/{hold}").json()["status"] == "EXPIRED"
    assert servers.rows(f"SELECT held FROM account WHERE id = '{servers.ids['exa']}'") == [(0,)]


def test_holds_of_one_batch_are_told_each_in_its_event(bank: "BankInside") -> None:
    bank.given(alice=100, bob=100)
    bank.promised("alice", "bob", 9)
    ends = [("alice", "bob"), ("bob", "alice"), ("alice", "bob"), ("alice", "bob")]
    bodies = [
        {"account_id": bank.ids[source], "dest_account_id": bank.ids[dest], "amount": amount}
        for amount, (source, dest) in enumerate(ends, start=1)
    ]
    # The second of these is refused, and leaves nothing behind.
    bodies.insert(1, bodies[0] | {"amount": 1_000})
    answers = bank.together(*[("/holds", body) for body in bodies])
    assert [answer.status_code for answer in answers] == [201, 409, 201, 201, 201]
    events = [event["data"] for event in bank.get("/events").json()["items"][-4:]]
    assert events == [answer.json() for answer in answers if answer.is_success]


def test_a_capture_tells_its_hold_wherever_it_is_shown(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    first, last = (bank.promised("alice", "bob", 5) for _ in range(2))
    bank.capture(first)
    bank.capture(last, amount=2)
    captured = bank.last("bob")
    reversal = bank.reverse(captured).json()
    holds = {captured: last, reversal["id"]: None}
    assert {id: bank.get(f"/transactions/{id}").json()["hold_id"] for id in holds} == holds
    for filters in ({}, {"account_id": bank.ids["bob"]}):
        listed = bank.get("/transactions", **filters).json()["items"]
        assert [each["hold_id"] for each in listed[:3]] == [None, last, first]
    events = [event["data"] for event in bank.get("/events").json()["items"][-3:]]
    assert [each["hold_id"] for each in events] == [first, last, None]
    assert reversal["hold_id"] is None


def test_followers_are_told_of_keys_and_receivers_without_their_secrets(bank: "Bank") -> None:
    new_api_key(bank.database, "a", "auditor")
    admin = bank.by(new_api_key(bank.database, "b", "admin"))
    key_command(bank.database, "revoke", "a")
    for command in (["add", "--url"], ["remove"]):
        printed(bank.database, "webhook", *command, "http://localhost:80/token?token#token")
    wait_until(lambda: admin.get("/events").status_code == 200)
    events = admin.get("/events").json()["items"]
    told = [(event["type"], event["caller"], event["data"]) for event in events[2:]]
    assert [event["type"] for event in events[:2]] == ["key.added"] * 2
    assert events[0]["data"].keys() == {"name", "role", "prefix"}
    assert told == [
        ("key.revoked", "cli", {"name": "a"}),
        ("webhook.added", "cli", {"url": "http://localhost:80", "account_id": None}),
        ("webhook.removed", "cli", {"url": "http://localhost:80"}),
    ]
    audited = [event["details"] for event in admin.get("/audit", limit=2).json()["items"]]
    assert audited[::-1] == [data for _, _, data in told[1:]]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("https://hooks.example/services/T0/B1", "https://hooks.example"),
        ("HTTP://[::1]:9000?key=1", "HTTP://[::1]:9000"),
        ("https://user:pass@hooks.example:8443/#1", "https://hooks.example:8443"),
        ("https://hooks.example", "https://hooks.example"),
        ("no address\n at all", "no address\n at all"),
        (None, "None"),
    ],
)
def test_of_a_receiver_its_scheme_and_host_are_told(url: Any, told: str) -> None:
    assert ledger.parse_details(json.dumps({"url": url, "a": 1})) == {"url": told, "a": 1}


def test_a_follower_goes_on_after_what_it_has_seen(bank: "Bank") -> None:
    assert bank.get("/events").json() == {"items": [], "next": None, "seal": None}
    bank.given(alice=1, bob=2)
    ids = [row[0] for row in bank.rows("SELECT id FROM event ORDER BY id")]
    page = bank.get("/events", limit=3).json()
    assert ([event["id"] for event in page["items"]], page["next"]) == (ids[:3], ids[2])
    page = bank.get("/events", after=ids[2]).json()
    assert ([event["id"] for event in page["items"]], page["next"]) == (ids[3:], ids[3])
    assert bank.get("/events", after=ids[3]).json() == {
        "items": [],
        "next": ids[3],
        "seal": None,
    }


@pytest.mark.parametrize("after", ["", "x", NOBODY, "\0", "%s", "\ud7ff", "0" * 5_000], ids=short)
def test_a_follower_goes_on_after_an_event_and_nothing_else(
    untouched: "BankInside", after: str
) -> None:
    for given in (after, untouched.ids["alice"]):
        assert refusal(untouched.get("/events", after=given)) == (400, "invalid_cursor")


def test_a_follower_sees_all_once_and_in_order_while_32_callers_write(servers: "Bank") -> None:
    names = [f"written {number}" for number in range(4)]
    servers.given(dict.fromkeys(names, 1_000))
    start = [row[0] for row in servers.rows("SELECT id FROM event ORDER BY id")][-1]
    seen: list[str] = []
    pages: list[None] = []

    def follow() -> None:
        page = servers.get("/events", after=seen[-1] if seen else start, limit=200).json()
        seen.extend(event["id"] for event in page["items"])
        pages.extend([None] if page["items"] else [])

    def write(number: int) -> None:
        name, other = names[number % 4], names[(number + 1) % 4]
        assert servers.transfer(name, other, 1).status_code == 200
        assert servers.void(servers.promised(name, other, 1)).status_code == 200

    with meanwhile(follow, *[partial(write, number) for number in range(32)]):
        # They go on until something was new to the follower many times.
        wait_until(lambda: len(pages) >= 10 and len(seen) >= 300)
    while seen[-1:] != [row[0] for row in servers.rows("SELECT max(id) FROM event")]:
        follow()
    made = servers.rows(f"SELECT id FROM event WHERE id > '{start}' ORDER BY id")
    assert seen == [row[0] for row in made]


@on_postgresql
def test_no_event_is_shown_while_one_with_a_lower_id_may_come(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BUSY_SECONDS_MAX", 60)
    taken, go_on = threading.Event(), threading.Event()

    def take_an_id_and_wait(book: ledger.Book) -> None:
        ledger.open_account(book, owner_name="early", asset="USD")
        taken.set()
        assert go_on.wait(60)

    def events(bank: "Bank") -> list[str]:
        page = bank.get("/events").json()
        return [event["data"]["owner_name"] for event in page["items"]]

    with opened(database) as one, opened(database) as other, ThreadPoolExecutor(2) as threads:
        early = ledger.Command("early", "{}", take_an_id_and_wait)
        writing = threads.submit(one.ledger.commit, [early])
        assert taken.wait(60)
        # It has taken an id and holds no row; this one takes a higher id, and is committed first.
        other.given(late=0)
        looking = threads.submit(events, other)
        time.sleep(0.1)
        go_on.set()
        assert looking.result() == ["early", "late"]
        assert writing.result()[0].status == 200


@on_postgresql
def test_a_follower_does_not_wait_for_ever(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(database) as bank, opened(database) as other:
        [first, last] = bank.given(alice=7).get("/events").json()["items"]
        look = partial(bank.get, "/events", after=first["id"])
        with other.ledger.database.write() as connection, monkeypatch.context() as patch:
            ledger.Book(connection).account(bank.ids["alice"])
            patch.setattr(ledger, "BUSY_SECONDS_MAX", 0.05)
            assert look().json() == {"items": [], "next": first["id"], "seal": None}
        # That write has ended, and what it had locked is free.
        assert look().json() == {"items": [last], "next": last["id"], "seal": None}


@on_postgresql
@pytest.mark.parametrize("locked", ["FOR SHARE", "FOR UPDATE"])
def test_a_follower_does_not_wait_for_what_others_do(bank: "BankInside", locked: str) -> None:
    events = bank.given(alice=7).get("/events").json()["items"]
    with closing(connect(bank.database)) as other:
        other.execute(f"SELECT * FROM account {locked}")
        other.execute("CREATE TEMPORARY TABLE mine (id integer)")
        assert [event["type"] for event in events] == ["account.opened", "transaction.posted"]
        assert bank.get("/events").json()["items"] == events


def entries_of(bank: "Bank", amounts: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the entries of a transaction, where what is taken away is negative."""
    types = {True: "CREDIT", False: "DEBIT"}
    return [
        {"account_id": bank.ids[name], "type": types[amount > 0], "amount": abs(amount)}
        for name, amount in amounts.items()
    ]


def journal(bank: "Bank", amounts: Mapping[str, int], **options: Any) -> httpx.Response:
    """Post a transaction, under a new key unless one is given."""
    entries = entries_of(bank, amounts)
    return bank.post("/transactions", **{"key": new_key(), "entries": entries, **options})


def pointers(refused: httpx.Response) -> list[str]:
    """Return where a request does not fit."""
    assert refusal(refused) == (422, "invalid_request")
    return [error["pointer"] for error in refused.json()["errors"]]


def test_a_transaction_has_any_number_of_entries(bank: "Bank") -> None:
    bank.given(alice=100, bob=50, carol=0)
    named = {"memo": "rent", "external_id": "r-1", "metadata": {"order": "7"}}
    posted = journal(bank, {"alice": -70, "bob": -10, "carol": 80}, **named)
    assert (posted.status_code, posted.json()["kind"]) == (201, "JOURNAL")
    shown = bank.get(posted.headers["Location"]).json()
    assert shown == posted.json()
    assert {name: shown[name] for name in named} == named
    assert (shown["reverses"], shown["reversed_by"]) == (None, None)
    entries = [(entry["type"], entry["amount"], entry["balance"]) for entry in shown["entries"]]
    assert entries == [("DEBIT", 70, 30), ("DEBIT", 10, 40), ("CREDIT", 80, 80)]
    assert bank.balances() == {"alice": 30, "bob": 40, "carol": 80}
    assert bank.wrong() == []


def test_a_transaction_exchanges_assets_through_somebody_who_holds_both(bank: "Bank") -> None:
    bank.given(alice=100, broker=0).given(asset="EUR", alice_eur=0, broker_eur=90)
    traded = {"alice": -100, "broker": +100, "broker_eur": -90, "alice_eur": +90}
    assert journal(bank, traded).status_code == 201
    assert bank.balances() == {"alice": 0, "broker": 100, "alice_eur": 90, "broker_eur": 0}
    assert bank.wrong() == []


def test_a_transaction_has_up_to_100_entries(bank: "Bank") -> None:
    many = {f"owner {number}": 0 for number in range(100)}
    bank.given(alice=1000).given(many)
    full = journal(bank, {"alice": -99, **dict.fromkeys(list(many)[:99], 1)})
    assert (full.status_code, len(full.json()["entries"])) == (201, 100)
    assert pointers(journal(bank, {"alice": -100, **dict.fromkeys(many, 1)})) == ["/entries"]
    amounts: list[dict[str, int]] = [{}, {"alice": 1}]
    for few in amounts:
        assert pointers(journal(bank, few)) == ["/entries"]


@pytest.mark.parametrize(
    ("amounts", "asset", "debits", "credits"),
    [
        ({"alice": -2, "bob": 1}, "USD", 2, 1),
        ({"alice": 1, "bob": 1}, "USD", 0, 2),
        ({"alice": -1, "bob": -2}, "USD", 3, 0),
        ({"alice": -1, "eva": 1}, "USD", 1, 0),
        ({"eva": 1, "alice": -1}, "EUR", 0, 1),
        ({"alice": -1, "bob": 1, "eva": 4}, "EUR", 0, 4),
    ],
)
def test_an_unbalanced_transaction_is_told_its_first_wrong_asset(
    bank: "Bank", amounts: dict[str, int], asset: str, debits: int, credits: int
) -> None:
    bank.given(alice=10, bob=10).given(asset="EUR", eva=10)
    refused, again = (journal(bank, amounts, key="k") for _ in range(2))
    assert refusal(refused) == (422, "unbalanced")
    told = {name: refused.json()[name] for name in ("asset", "debits", "credits")}
    assert told == {"asset": asset, "debits": debits, "credits": credits}
    # It depends on what the books know, so it is kept under the key as every answer is.
    assert (again.content, again.headers["Idempotent-Replayed"]) == (refused.content, "true")
    assert bank.balances() == {"alice": 10, "bob": 10, "eva": 10}


def test_an_account_stands_once_in_a_transaction(bank: "Bank") -> None:
    bank.given(alice=10, bob=0)
    for twice in (
        entries_of(bank, {"alice": -2, "bob": 1}) + entries_of(bank, {"bob": 1}),
        entries_of(bank, {"alice": -1}) + entries_of(bank, {"alice": 1}),
        entries_of(bank, {"alice": -1}) * 2,
    ):
        refused = bank.post("/transactions", key=new_key(), entries=twice)
        assert refusal(refused) == (422, "account_repeated")
    assert bank.balances() == {"alice": 10, "bob": 0}


def test_a_transaction_is_refused_as_a_whole(demo: "Bank") -> None:
    bank = demo.given(alice=10, bob=0, carol=0)
    gold = "SELECT id FROM account WHERE asset = 'GOLD' AND kind = 'CUSTOMER'"
    cash = "SELECT id FROM account WHERE asset = 'USD' AND name = 'cash'"
    (bank.ids["wallet"],) = bank.rows(gold)[0]
    (bank.ids["cash"],) = bank.rows(cash)[0]
    bank.ids["nobody"] = NOBODY
    bank.step("carol", "freeze")
    before = bank.contents()["entry"]
    for amounts, refused in (
        ({"alice": -1, "nobody": 1}, (404, "account_not_found")),
        ({"alice": 1, "cash": -1}, (404, "account_not_found")),
        ({"alice": -1, "wallet": 1}, (409, "asset_closed_loop")),
        ({"alice": -1, "carol": 1}, (409, "account_frozen")),
        ({"bob": 11, "alice": -11}, (409, "insufficient_funds")),
    ):
        assert refusal(journal(bank, amounts)) == refused
    assert bank.contents()["entry"] == before


def test_a_transaction_is_replayed_byte_by_byte(bank: "Bank") -> None:
    bank.given(alice=10, bob=0)
    first, again = (journal(bank, {"alice": -4, "bob": 4}, key="k") for _ in range(2))
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["Location"] == first.headers["Location"]
    assert again.headers["Idempotent-Replayed"] == "true"
    assert refusal(journal(bank, {"alice": -5, "bob": 5}, key="k")) == (
        409,
        "idempotency_key_reused",
    )
    assert bank.balances() == {"alice": 6, "bob": 4}


@at_the_edge
@pytest.mark.parametrize(
    ("entry", "pointer"),
    [
        ({"amount": 0}, "/entries/1/amount"),
        ({"amount": "1"}, "/entries/1/amount"),
        ({"amount": 1.0}, "/entries/1/amount"),
        ({"type": "credit"}, "/entries/1/type"),
        ({"type": None}, "/entries/1/type"),
        ({"account_id": "x"}, "/entries/1/account_id"),
        ({"balance": 1}, "/entries/1/balance"),
    ],
)
def test_an_entry_that_does_not_fit_is_pointed_at(
    untouched: "Bank", entry: dict[str, Any], pointer: str
) -> None:
    good, other = entries_of(untouched, {"alice": -1, "bob": 1})
    entries = [good, other | entry]
    assert pointers(untouched.post("/transactions", key="k", entries=entries)) == [pointer]


@at_the_edge
def test_entries_are_a_list_of_objects(untouched: "Bank") -> None:
    strange: list[Any] = [None, {}, "x", [], [1, 2], [None, None], [[], []], {"0": {}}]
    for entries in strange:
        refused = untouched.post("/transactions", key="k", entries=entries)
        assert refusal(refused) == (422, "invalid_request")
    assert pointers(untouched.post("/transactions", key="k")) == ["/entries"]
    assert refusal(untouched.post("/transactions"))[1] == "idempotency_key_missing"


@pytest.mark.parametrize("of_one", [False, True])
def test_transactions_are_listed_newest_first_and_none_twice(bank: "Bank", of_one: bool) -> None:
    bank.given(alice=50, bob=0, carol=50)
    for _ in range(5):
        bank.transfer("alice", "bob", 1)
        bank.deposit("carol", 1)
        journal(bank, {"alice": -1, "carol": -1, "bob": 2})
    query = "SELECT id FROM event WHERE kind < 'a'"
    if of_one:
        query = f"SELECT transaction_id FROM entry WHERE account_id = '{bank.ids['bob']}'"
    expected = sorted((one for (one,) in bank.rows(query)), reverse=True)
    seen = []
    filters = {"account_id": bank.ids["bob"]} if of_one else {}
    for page in bank.pages("/transactions", limit=3, **filters):
        seen += page
        # What comes meanwhile is newer than all that is still to come.
        bank.transfer("alice", "bob", 1)
    assert [each["id"] for each in seen] == expected
    assert seen[-1] == bank.get(f"/transactions/{expected[-1]}").json()


def test_transactions_are_found_by_what_holds_for_all_of_it(bank: "Bank") -> None:
    bank.given(alice=50, bob=0, carol=50)
    red, blue = ({"order": "7", "colour": colour} for colour in ("red", "blue"))
    bank.transfer("alice", "bob", 1, metadata=red, external_id="a")
    bank.transfer("carol", "bob", 2, metadata=red, external_id="b")
    bank.transfer("carol", "bob", 3, metadata=blue)
    bank.deposit("alice", 4, metadata={"order": "77"})

    def amounts(**filters: str) -> list[int]:
        found = bank.get("/transactions", **filters).json()["items"]
        return [each["entries"][0]["amount"] for each in found]

    order, colour, alice = {"metadata[order]": "7"}, {"metadata[colour]": "red"}, bank.ids["alice"]
    assert amounts(**order) == [3, 2, 1]
    assert amounts(**order, **colour) == [2, 1]
    assert amounts(**order, **colour, account_id=alice) == [1]
    assert amounts(**order, external_id="b") == amounts(external_id="b") == [2]
    assert amounts(external_id="b", account_id=alice) == []
    assert amounts(account_id=NOBODY) == amounts(external_id="c") == []
    assert amounts(**{"metadata[order]": "8"}) == amounts(**{"metadata[Order]": "7"}) == []


def test_transactions_are_found_by_their_kind(bank: "Bank") -> None:
    bank.given(alice=50, bob=0).transfer("alice", "bob", 1)
    bank.capture(bank.promised("alice", "bob", 2))
    bank.reverse(bank.last("bob"))

    def kinds(**filters: str) -> list[str]:
        return [each["kind"] for each in bank.get("/transactions", **filters).json()["items"]]

    assert kinds() == ["REVERSAL", "CAPTURE", "TRANSFER", "DEPOSIT"]
    for kind in kinds():
        assert kinds(kind=kind) == kinds(kind=kind, account_id=bank.ids["alice"]) == [kind]
    assert kinds(kind="DEPOSIT", account_id=bank.ids["bob"]) == kinds(kind="SPEND") == []
    for unknown in ("deposit", "open_account", ""):
        assert pointers(bank.get("/transactions", kind=unknown)) == ["/kind"]


@pytest.mark.parametrize("of_one", [False, True])
def test_transactions_are_found_from_a_time_on_and_before_another(
    bank: "BankInside", of_one: bool
) -> None:
    bank.given(alice=10_000, bob=0, carol=1)
    for _ in range(3):
        bank.pass_time(1_000)
        # So many ids at one moment lie in the moments after it.
        bulk(bank, *[item(bank, "alice", "bob", 1)] * 60)
        bank.pass_time(3)
        bank.deposit("alice", 1)
    of = {"account_id": bank.ids["alice"]} if of_one else {}
    every = [each for page in bank.pages("/transactions", limit=200, **of) for each in page]
    times = sorted({ledger.parse_time(each["ts"]) for each in every})
    assert len(times) >= 7
    edges = [0, *[at + by for at in times for by in (-1, 0, 1)], times[-1] + DAY]
    for start, end in [*itertools.pairwise(edges), *zip(edges, edges[5:], strict=False)]:
        between = {"from": ledger.utc_text(start), "to": ledger.utc_text(end)}
        found = list(bank.pages("/transactions", limit=50, **of, **between))
        expected = [each for each in every if between["from"] <= each["ts"] < between["to"]]
        assert list(itertools.chain(*found)) == expected
    early = "0001-01-01T00:00:00Z"
    assert bank.get("/transactions", to=early).json()["items"] == []
    assert len(bank.get("/transactions", **{"from": early}, limit=200).json()["items"]) > 180
    assert bank.get("/transactions", **{"from": ledger.utc_text(edges[-1])}).json()["items"] == []


@on_sqlite
def test_to_find_transactions_of_a_time_takes_as_long_in_a_large_ledger(bank: "BankInside") -> None:
    bank.given(alice=10_000, bob=0)
    found, steps = [], []
    for number in range(6):
        bank.pass_time(1_000_000)
        bulk(bank, *[item(bank, "alice", "bob", 1)] * (2 if number == 2 else 500))
        if number == 2:
            start = ledger.parse_time(bank.statement("bob")[0]["ts"])
        elif number > 2:
            with bank.ledger.database.read() as connection:
                counted: list[None] = []
                connection.driver.set_progress_handler(partial(counted.append, None), 1)
                page = ledger.list_transactions(connection, start=start, to=start + 1)
                connection.driver.set_progress_handler(None, 1)
            found.append([each.ts for each in page.items])
            steps.append(len(counted))
    assert found == [[start, start]] * 3
    assert steps[0] == pytest.approx(steps[-1], rel=0.1)


def test_a_cursor_of_transactions_is_bound_to_its_filters(bank: "Bank") -> None:
    bank.given(alice=0, bob=0)
    filters = {"account_id": bank.ids["alice"], "metadata[order]": "7"}
    for _ in range(3):
        bank.deposit("alice", 1, metadata={"order": "7"})
    cursor = bank.get("/transactions", limit=1, **filters).json()["next_cursor"]
    assert len(bank.get("/transactions", cursor=cursor, **filters).json()["items"]) == 2
    changed: list[dict[str, str]] = [
        {},
        {"account_id": bank.ids["alice"]},
        filters | {"account_id": bank.ids["bob"]},
        filters | {"metadata[order]": "8"},
        filters | {"metadata[colour]": "red"},
        filters | {"external_id": "x"},
    ]
    for others in changed:
        refused = bank.get("/transactions", cursor=cursor, **others)
        assert refusal(refused) == (400, "invalid_cursor")
    for path in ("/accounts", "/audit", f"/accounts/{bank.ids['alice']}/statement"):
        assert refusal(bank.get(path, cursor=cursor)) == (400, "invalid_cursor")


def test_accounts_are_listed_by_pages_of_what_was_filtered(bank: "Bank") -> None:
    for number in range(7):
        even = {"even": str(number % 2 == 0)}
        bank.post("/accounts", owner_name=f"owner {number}", metadata=even)
    even = {"metadata[even]": "True"}
    pages = list(bank.pages("/accounts", limit=2, **even))
    names = [[account["owner_name"] for account in page] for page in pages]
    assert names == [["owner 0", "owner 2"], ["owner 4", "owner 6"]]
    cursor = bank.get("/accounts", limit=2, **even).json()["next_cursor"]
    for others in ({}, {"metadata[even]": "False"}, {**even, "external_id": "x"}):
        assert refusal(bank.get("/accounts", cursor=cursor, **others)) == (400, "invalid_cursor")


def test_an_external_id_is_unique_among_its_kind(bank: "Bank") -> None:
    name = {"external_id": "x"}
    opened = bank.post("/accounts", owner_name="zoe", **name)
    assert opened.json()["external_id"] == "x"
    assert refusal(bank.post("/accounts", owner_name="y", **name)) == (409, "external_id_exists")
    bank.given(alice=100, bob=100)
    assert bank.transfer("alice", "bob", 1, **name).status_code == 200
    hold = {"account_id": bank.ids["alice"], "dest_account_id": bank.ids["bob"], "amount": 1}
    held = bank.post("/holds", key=new_key(), **hold, **name)
    assert (held.status_code, held.json()["external_id"]) == (201, "x")
    for refused in (
        bank.transfer("alice", "bob", 1, **name),
        bank.deposit("alice", 1, **name),
        bank.withdraw("alice", 1, **name),
        bank.pay("alice", 1, **name),
        journal(bank, {"alice": -1, "bob": 1}, **name),
        bank.post("/holds", key=new_key(), **hold, **name),
    ):
        assert refusal(refused) == (409, "external_id_exists")
    assert bank.balances() == {"zoe": 0, "alice": 99, "bob": 101}
    assert bank.get("/accounts", **name).json()["items"] == [opened.json()]
    assert bank.wrong() == []


def test_an_external_id_of_what_was_refused_is_free(bank: "Bank") -> None:
    bank.given(alice=1, bob=0)
    refused = bank.transfer("alice", "bob", 2, external_id="x")
    assert refusal(refused) == (409, "insufficient_funds")
    moved = bank.transfer("alice", "bob", 1, external_id="x").json()
    found = bank.get("/transactions", external_id="x").json()["items"]
    assert [each["id"] for each in found] == [moved["transfer_id"]]


def test_an_external_id_is_used_once_in_one_batch(bank: "BankInside") -> None:
    path = f"/accounts/{bank.given(alice=0).ids['alice']}/deposit"
    answers = bank.together(*[(path, {"amount": 1, "external_id": "x"})] * 10)
    assert Counter(map(outcome, answers)) == {200: 1, "external_id_exists": 9}
    opened = bank.together(*[("/accounts", {"owner_name": "y", "external_id": "y"})] * 10)
    assert Counter(map(outcome, opened)) == {201: 1, "external_id_exists": 9}
    assert bank.balances() == {"alice": 1, "y": 0}


def test_an_external_id_is_used_once_among_many(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    twice = [item(bank, "alice", "bob", amount, external_id="x") for amount in (1, 2)]
    first, second = bulk(bank, *twice, atomic=False).json()["results"]
    assert (first["error"], second["error"]["code"]) == (None, "external_id_exists")
    assert bank.balances() == {"alice": 99, "bob": 1}


def test_of_20_parallel_uses_of_an_external_id_one_succeeds(servers: "Bank") -> None:
    servers.given({"ext a": 100, "ext b": 0})
    ends = {"account_id": servers.ids["ext a"], "dest_account_id": servers.ids["ext b"]}
    hold = {**ends, "amount": 1, "external_id": "20 at once"}
    named: dict[str, Any] = {"external_id": "20 at once"}
    uses: list[Callable[[], httpx.Response]] = [
        lambda: servers.deposit("ext b", 1, **named),
        lambda: servers.post("/accounts", key=new_key(), owner_name="ext c", **named),
        lambda: servers.post("/holds", key=new_key(), **hold),
    ]
    for use in uses:
        answers = at_once([use] * 20)
        refused = [refusal(answer) for answer in answers if answer.status_code > 299]
        assert refused == [(409, "external_id_exists")] * 19
    assert servers.balances()["ext b"] == 1
    assert len(servers.get("/accounts", **named).json()["items"]) == 1


def test_of_parallel_uses_of_an_external_id_by_any_operation_one_succeeds(
    servers: "Bank",
) -> None:
    servers.given({"any a": 100, "any b": 100})
    named = {"external_id": "any at once"}
    uses: list[Callable[[], httpx.Response]] = [
        lambda: servers.deposit("any a", 1, **named),
        lambda: servers.withdraw("any b", 1, **named),
        lambda: servers.pay("any a", 1, **named),
        lambda: servers.transfer("any a", "any b", 1, **named),
        lambda: journal(servers, {"any a": -1, "any b": 1}, **named),
    ]
    outcomes = Counter(map(outcome, at_once(uses * 4)))
    assert outcomes[200] + outcomes[201] == 1
    assert outcomes["external_id_exists"] == 4 * len(uses) - 1
    assert len(servers.get("/transactions", **named).json()["items"]) == 1


@at_the_edge
@pytest.mark.parametrize("name", ["", " ", "x" * 201, "a\nb", "\x00", "\u202e", 7, {}, []])
def test_an_external_id_is_printable_text(untouched: "Bank", name: Any) -> None:
    entries = entries_of(untouched, {"alice": -1, "bob": 1})
    for path, body in (
        ("/accounts", {"owner_name": "x"}),
        ("/transfers", untouched.transfer_body()),
        ("/transactions", {"entries": entries}),
    ):
        refused = untouched.post(path, key="k", **body, external_id=name)
        assert pointers(refused) == ["/external_id"]


@pytest.mark.parametrize("name", ["x" * 200, "\U0001f680" * 200, "a'b--", "metadata[a]=1&b", "%"])
def test_any_printable_external_id_is_found(bank: "Bank", name: str) -> None:
    opened = bank.post("/accounts", owner_name="alice", external_id=name)
    assert bank.get("/accounts", external_id=name).json()["items"] == [opened.json()]


NOTES_REFUSED: dict[str, list[Any]] = {
    "/metadata": [
        {str(number): "" for number in range(51)},
        "x",
        7,
        [],
        [["a", "b"]],
        {"": "x"},
        {"n" * 41: "x"},
        {"a\n": "x"},
    ],
    "/metadata/a": [{"a": "x" * 501}, {"a": "\n"}, {"a": "\x00"}, {"a": 7}, {"a": None}, {"a": {}}],
}


@at_the_edge
@pytest.mark.parametrize("pointer", NOTES_REFUSED, ids=short)
def test_metadata_has_limits(untouched: "Bank", pointer: str) -> None:
    for notes in NOTES_REFUSED[pointer]:
        opening = untouched.post("/accounts", owner_name="x", metadata=notes)
        assert pointers(opening) == [pointer]
        moving = untouched.post("/transfers", key="k", **untouched.transfer_body(), metadata=notes)
        assert pointers(moving) == [pointer]
        path = f"/accounts/{untouched.ids['alice']}"
        assert pointers(untouched.send("PATCH", path, json={"metadata": notes})) == [pointer]


def test_metadata_at_its_limits_is_kept_and_found(bank: "Bank") -> None:
    rocket = "\U0001f680"
    notes = {f"{number:02}": "x" * 500 for number in range(48)}
    notes |= {rocket * 40: rocket * 500, "'\"]=&%": ""}
    opened = bank.post("/accounts", owner_name="alice", metadata=notes).json()
    assert opened["metadata"] == notes
    for name, value in list(notes.items())[-2:]:
        found = bank.get("/accounts", **{f"metadata[{name}]": value}).json()["items"]
        assert found == [opened]


def test_without_metadata_there_is_an_empty_object(bank: "Bank") -> None:
    ways: list[dict[str, Any]] = [{}, {"metadata": {}}, {"metadata": None}]
    for given in ways:
        opened = bank.post("/accounts", owner_name="alice", **given).json()
        assert (opened["metadata"], opened["external_id"]) == ({}, None)
    assert bank.rows("SELECT * FROM note") == []


def test_accounts_are_found_by_exactly_their_metadata(bank: "Bank") -> None:
    for name, notes in (("a", {"order": "7"}), ("b", {"order": "70"}), ("c", {"order": "7 "})):
        bank.post("/accounts", owner_name=name, metadata=notes)

    def owners(**filters: str) -> list[str]:
        return [found["owner_name"] for found in bank.get("/accounts", **filters).json()["items"]]

    assert owners(**{"metadata[order]": "7"}) == ["a"]
    assert owners(**{"metadata[order]": "7", "owner_name": "b"}) == []
    assert owners(**{"metadata[order]": "7", "metadata[x]": ""}) == []
    assert owners(**{"metadata[order]": "%"}) == []


def test_accounts_and_transactions_are_found_by_how_a_text_begins(bank: "Bank") -> None:
    names = ["Alice", "ALIENA", "\u00c4lva", "\u00f8rebro", "10%0", "[a]*", "^x.y", "a\\d"]
    for number, name in enumerate(names):
        bank.given({name: 0}).deposit(name, 1, memo=name, external_id=f"Order-{number}")
    bank.post("/accounts", owner_name="x", external_id="ALi-1")

    def found(search: str, **others: str) -> list[str]:
        accounts = bank.get("/accounts", search=search, **others).json()["items"]
        deposits = bank.get("/transactions", search=search, **others).json()["items"]
        memos = [deposit["memo"] for deposit in deposits[::-1]]
        owners = [account["owner_name"] for account in accounts]
        assert owners[: len(memos)] == memos
        return owners

    assert found("") == [*names, "x"]
    assert found("aLi") == ["Alice", "ALIENA", "x"]
    for name in names:
        assert found(name) == found(name[:4].swapcase()) == [name]
    for nothing in ("lice", "%", "_", "?", "*", ".", "[", "\\", "alice\u00a0", "a.", "10_%"):
        assert found(nothing) == [name for name in names if name.startswith(nothing)]
    page = bank.get("/accounts", search="al", limit=1).json()
    assert page["items"][0]["owner_name"] == "Alice"
    after = bank.get("/accounts", search="al", limit=1, cursor=page["next_cursor"]).json()
    assert after["items"][0]["owner_name"] == "ALIENA"
    refused = bank.get("/accounts", search="b", cursor=page["next_cursor"])
    assert refusal(refused) == (400, "invalid_cursor")
    [order] = bank.get("/transactions", search="ORDER-3").json()["items"]
    assert order["external_id"] == "Order-3"


def change(bank: "Bank", name: str, *, key: str | None = None, **body: Any) -> httpx.Response:
    """Change an account."""
    headers = {} if key is None else {"Idempotency-Key": key}
    return bank.send("PATCH", f"/accounts/{bank.ids[name]}", json=body, headers=headers)


def test_a_change_replaces_metadata_as_a_whole(bank: "Bank") -> None:
    bank.given(alice=5)
    change(bank, "alice", metadata={"order": "7", "colour": "red"})
    changed = change(bank, "alice", metadata={"colour": "blue"})
    assert (changed.status_code, changed.json()["metadata"]) == (200, {"colour": "blue"})
    assert bank.get(f"/accounts/{bank.ids['alice']}").json() == changed.json()
    for name, value, found in (("order", "7", 0), ("colour", "red", 0), ("colour", "blue", 1)):
        items = bank.get("/accounts", **{f"metadata[{name}]": value}).json()["items"]
        assert len(items) == found
    assert change(bank, "alice", metadata={}).json()["metadata"] == {}
    assert bank.rows("SELECT * FROM note") == []
    assert bank.wrong() == []


def test_a_change_names_the_owner_and_leaves_the_rest(bank: "Bank") -> None:
    bank.given(alice=5)
    before = change(bank, "alice", metadata={"order": "7"}).json()
    renamed = change(bank, "alice", owner_name="Alice B.").json()
    assert renamed == before | {"owner_name": "Alice B."}
    assert bank.get("/accounts", owner_name="Alice B.").json()["items"] == [renamed]
    assert bank.get("/accounts", owner_name="alice").json()["items"] == []
    event = bank.get("/audit").json()["items"][0]
    assert (event["action"], event["account_id"]) == ("update_account", bank.ids["alice"])
    assert event["details"]["body"]["owner_name"] == "Alice B."


def test_a_change_of_nothing_changes_nothing(bank: "Bank") -> None:
    before = bank.given(alice=5).get(f"/accounts/{bank.ids['alice']}").json()
    for body in ({}, {"owner_name": None}, {"metadata": None}):
        changed = change(bank, "alice", **body)
        assert (changed.status_code, changed.json()) == (200, before)


def test_a_change_is_refused_where_it_does_not_fit(bank: "Bank") -> None:
    bank.given(alice=0).ids["nobody"] = NOBODY
    assert refusal(change(bank, "nobody", owner_name="x")) == (404, "account_not_found")
    for body, pointer in (
        ({"owner_name": " "}, "/owner_name"),
        ({"status": "CLOSED"}, "/status"),
        ({"balance": 5}, "/balance"),
        ({"external_id": "x"}, "/external_id"),
        ({"credit_limit": -1}, "/credit_limit"),
        ({"credit_limit": 10**15 + 1}, "/credit_limit"),
        ({"credit_limit": "5"}, "/credit_limit"),
    ):
        assert pointers(change(bank, "alice", **body)) == [pointer]
    (cash,) = bank.rows("SELECT id FROM account WHERE name = 'cash' AND asset = 'USD'")[0]
    bank.ids["cash"] = cash
    assert refusal(change(bank, "cash", owner_name="x")) == (404, "account_not_found")


def test_a_change_is_replayed_under_its_key(bank: "Bank") -> None:
    bank.given(alice=0)
    first = change(bank, "alice", key="k", owner_name="A")
    change(bank, "alice", owner_name="B")
    again = change(bank, "alice", key="k", owner_name="A")
    assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
    assert bank.get(f"/accounts/{bank.ids['alice']}").json()["owner_name"] == "B"


def test_an_account_that_moves_no_money_can_be_changed(bank: "Bank") -> None:
    for step in ("freeze", "close"):
        bank.given(alice=0).step("alice", step)
        changed = change(bank, "alice", owner_name=step, metadata={"why": step})
        assert (changed.status_code, changed.json()["owner_name"]) == (200, step)


def test_changes_at_one_moment_leave_the_metadata_of_one_of_them(servers: "Bank") -> None:
    servers.given(patched=0)
    notes = [{f"name {number}": str(number)} for number in range(20)]
    answers = at_once([partial(change, servers, "patched", metadata=note) for note in notes])
    assert {answer.status_code for answer in answers} == {200}
    account = servers.get(f"/accounts/{servers.ids['patched']}").json()
    assert account["metadata"] in notes
    query = f"SELECT name, value FROM note WHERE owner_id = '{servers.ids['patched']}'"
    assert servers.rows(query) == list(account["metadata"].items())


def moments(bank: "BankInside", *amounts: int) -> list[int]:
    """Open Alice's account, deposit amounts a minute apart, and return all the times."""
    minute = 60_000_000
    bank.pass_time(0)
    account = bank.given(alice=0).get(f"/accounts/{bank.ids['alice']}").json()
    opened = ledger.parse_time(account["created_at"])
    for amount in amounts:
        bank.pass_time(minute)
        bank.deposit("alice", amount)
    return [opened + minute * number for number in range(len(amounts) + 1)]


def test_a_balance_is_told_as_it_was_at_any_time(bank: "BankInside") -> None:
    opened, *times = moments(bank, 1, 2, 3, 4, 5)
    path = f"/accounts/{bank.ids['alice']}/balance"

    def at(moment: int) -> tuple[int, int]:
        shown = bank.get(path, at=ledger.utc_text(moment)).json()
        assert shown["at"] == ledger.utc_text(moment)
        return shown["seq"], shown["balance"]

    assert refusal(bank.get(path, at=ledger.utc_text(opened - 1))) == (404, "account_not_found")
    assert at(opened) == (0, 0)
    sums = list(itertools.accumulate(range(6)))
    for seq, moment in enumerate(times, 1):
        assert at(moment - 1) == (seq - 1, sums[seq - 1])
        assert at(moment) == at(moment + 1) == (seq, sums[seq])
    # Now is now, also by a clock that was set back.
    bank.pass_time(-DAY)
    assert bank.get(path).json()["balance"] == 15
    bank.pass_time(DAY)
    now = bank.get(path).json()
    latest = {"balance": 15, "seq": 5, "at": ledger.utc_text(times[-1])}
    latest |= {"held": 0, "available": 15}
    assert now == {"account_id": bank.ids["alice"], "asset": "USD", **latest}
    assert refusal(bank.get(f"/accounts/{NOBODY}/balance")) == (404, "account_not_found")


def test_a_balance_tells_what_is_held_and_available_now(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    path, before = f"/accounts/{bank.ids['alice']}/balance", bank.statement("alice")[0]["ts"]
    bank.promised("alice", "bob", 60, expires_in=60)
    assert funds_of(bank.get(path).json()) == (100, 60, 40)
    # What was held at another time is told by nothing that is stored in one place.
    assert funds_of(bank.get(path, at=before).json()) == (100, None, None)
    bank.pass_time(60_000_000)
    assert funds_of(bank.get(path).json()) == (100, 0, 100)


def test_a_balance_counts_all_entries_of_one_moment(bank: "BankInside") -> None:
    bank.pass_time(0)
    bank.given(alice=0)
    for amount in (1, 2, 3):
        bank.deposit("alice", amount)
    path, at = f"/accounts/{bank.ids['alice']}", bank.statement("alice")[0]["ts"]
    assert bank.get(f"{path}/balance", at=at).json()["balance"] == 6
    assert len(bank.get(f"{path}/statement", **{"from": at}).json()["items"]) == 3
    assert bank.get(f"{path}/statement", to=at).json()["items"] == []


@pytest.mark.parametrize(
    "form",
    ["{}T12:00:00Z", "{}t12:00:00z", "{}T14:00:00%2B02:00", "{}T14:00:00+02:00",
     "{}T06:30:00-05:30", "{}T12:00:00.000000Z", "{}T12:00:00-00:00", "{}T12:00:00.0Z"],
)  # fmt: skip
def test_a_time_may_have_any_offset(bank: "BankInside", form: str) -> None:
    bank.given(alice=7)
    day = ledger.utc_text(ledger.utc_now() + DAY)[:10]
    path = f"/accounts/{bank.ids['alice']}/balance?at={form.format(day)}"
    shown = bank.send("GET", path).json()
    assert (shown["at"], shown["balance"]) == (f"{day}T12:00:00.000000Z", 7)


@at_the_edge
@pytest.mark.parametrize(
    "time",
    ["", "now", "0", "1763726400", "20261121", "2026-11-21T12:00:00", "2026-11-21 12:00:00Z",
     "2026-02-30", "2026-W47-6", "2026-11-21Z", "2026-11-21\n", "2026-12-31T23:59:61Z",
     "2026-12-31T23:59:60+01:00", "9999-12-31T23:59:60Z",
     "2026-13-21T12:00:00Z", "2026-02-30T12:00:00Z", "2026-11-21T25:00:00Z",
     "2026-11-21T12:00:60Z", "2026-11-21T12:00:00+25:00", "0000-01-01T00:00:00Z", "\x00",
     "2026-11-21T12:00:00Z\n", "10000-01-01T00:00:00Z", "\u0662026-11-21T12:00:00Z",
     "9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00"],
    ids=short,
)  # fmt: skip
def test_a_time_that_is_none_is_refused(untouched: "Bank", time: str) -> None:
    account = f"/accounts/{untouched.ids['alice']}"
    for path, name in (("balance", "at"), ("statement", "from"), ("statement", "to")):
        refused = untouched.get(f"{account}/{path}", **{name: time})
        assert pointers(refused) == [f"/{name}"]


@at_the_edge
def test_the_first_and_the_last_times_are_times(untouched: "Bank") -> None:
    account = f"/accounts/{untouched.ids['alice']}"
    last = untouched.get(f"{account}/balance", at="9999-12-31T23:59:59.999999Z")
    assert (last.status_code, last.json()["balance"]) == (200, 100)
    first = untouched.get(f"{account}/balance", at="0001-01-01T00:00:00Z")
    assert refusal(first) == (404, "account_not_found")


@pytest.mark.parametrize(
    ("given", "moment"),
    [
        ("2026-11-21", "2026-11-21T00:00:00.000000Z"),
        ("2016-12-31T23:59:60Z", "2017-01-01T00:00:00.000000Z"),
        ("2016-12-31T23:59:60.25Z", "2017-01-01T00:00:00.250000Z"),
        ("2016-12-31t15:59:60-08:00", "2017-01-01T00:00:00.000000Z"),
        ("2017-01-01 05:29:60+05:30", None),
    ],
)
def test_a_date_is_its_midnight_and_a_leap_second_the_second_after_it(
    given: str, moment: str | None
) -> None:
    if moment:
        assert ledger.utc_text(ledger.parse_time(given)) == moment
    else:
        with pytest.raises(ValueError, match="should be a time"):
            ledger.parse_time(given)


@pytest.mark.parametrize("form", ["2026-01-15T12:00:00+02:00", "2026-01-15t10:00:00Z"])
def test_what_moves_money_tells_when_it_happened_outside(
    bank: "Bank", tmp_path: Path, form: str
) -> None:
    bank.given(alice=100, bob=0)
    at = "2026-01-15T10:00:00.000000Z"
    sent = bank.transfer("alice", "bob", 1, effective_at=form).json()
    assert (sent["effective_at"], sent["ts"] > at) == (at, True)
    listed = [item(bank, "alice", "bob", 1) | {"effective_at": form}, item(bank, "alice", "bob", 1)]
    many = bulk(bank, *listed).json()["results"]
    posted = bank.journal({"alice": -1, "bob": 1}, effective_at=form).json()
    taken = bank.reverse(posted["id"], effective_at=form).json()
    hold = bank.promised("alice", "bob", 1)
    captured = bank.capture(hold, effective_at=form).json()["transaction_id"]
    for moved in (bank.deposit, bank.withdraw):
        assert moved("alice", 1, effective_at=form).status_code == 200
    told = [sent["transfer_id"], many[0]["transfer_id"], posted["id"], taken["id"], captured]
    told += [line["transaction_id"] for line in bank.statement("alice")[:2]]
    for transaction in told:
        shown = bank.get(f"/transactions/{transaction}").json()
        assert {shown["effective_at"], *[e["effective_at"] for e in shown["entries"]]} == {at}
    other = bank.get(f"/transactions/{many[1]['transfer_id']}").json()
    assert {other["effective_at"], other["entries"][0]["effective_at"]} == {other["ts"]}
    # It is a label: the order is that of the commits.
    lines = bank.statement("alice")
    assert [line["seq"] for line in lines] == list(range(len(lines), 0, -1))
    assert {lines[0]["effective_at"], lines[-1]["effective_at"]} == {at, lines[-1]["ts"]}
    assert bank.get("/events", limit=200).json()["items"][-1]["data"]["effective_at"] == at
    [details] = [e["details"] for e in bank.get("/audit", limit=1).json()["items"]]
    assert details["body"]["effective_at"] == at
    table = exported_rows(bank, tmp_path)
    dates = {line["date"] for line in table if line["transaction_id"] in told}
    assert dates == {"2026-01-15"}
    assert bank.wrong() == []


def test_a_time_of_effect_is_from_1970_to_a_year_ahead(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    now = ledger.utc_now()
    for form in ("1970-01-01", ledger.utc_text(now + 365 * DAY)):
        assert bank.deposit("alice", 1, effective_at=form).status_code == 200
    far, before = ledger.utc_text(now + 367 * DAY), "1969-12-31T23:59:59Z"
    wrongs: tuple[Any, ...] = (before, far, now, 0, True, "yesterday", "", [], {})
    for wrong in wrongs:
        assert pointers(bank.deposit("alice", 1, effective_at=wrong)) == ["/effective_at"]
    for refused in (
        bank.pay("alice", 1, effective_at="2026-01-15"),
        bank.hold("alice", "bob", 1, effective_at="2026-01-15"),
    ):
        assert pointers(refused) == ["/effective_at"]


def test_a_key_knows_a_time_of_effect_in_any_form(bank: "Bank") -> None:
    bank.given(alice=100)
    first, again, other = (
        bank.deposit("alice", 1, key="k", effective_at=form)
        for form in ("2026-01-15", "2026-01-15T02:00:00+02:00", "2026-01-16")
    )
    assert (again.content, outcome(other)) == (first.content, "idempotency_key_reused")


def test_transactions_are_found_by_their_time_of_effect(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    bank.pass_time(DAY)
    since = ledger.utc_text(ledger.utc_now())
    days = (None, "2026-01-15", "2026-01-16", "2026-01-15T23:59:59.999999Z", None)
    sent = [bank.transfer("alice", "bob", 1, effective_at=day).json() for day in days]
    ids = {each["transfer_id"]: number for number, each in enumerate(sent)}

    def found(**filters: str) -> list[int]:
        pages = bank.pages("/transactions", limit=2, **filters)
        listed = [t["id"] for page in pages for t in page]
        assert listed == sorted(listed, reverse=True)
        return [ids[each] for each in listed if each in ids]

    for more in ({}, {"account_id": bank.ids["alice"]}, {"kind": "TRANSFER"}):
        january = {"effective_from": "2026-01-15", "effective_to": "2026-01-16", **more}
        assert found(**january) == [3, 1]
        assert found(effective_to="2026-01-16", **more) == [3, 1]
        assert found(effective_from="2026-01-15", **more) == [4, 3, 2, 1, 0]
        assert found(effective_from=since, **more) == [4, 0]
        assert found(effective_from="2026-01-16", effective_to=since, **more) == [2]
        assert found(effective_to="1970-01-01", **more) == []
        # The other times are those of the commits.
        assert found(effective_to="2026-01-16", **{"from": since}, **more) == [3, 1]


@on_sqlite
def test_to_find_by_a_time_of_effect_takes_an_index(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = counted_calls(monkeypatch, ledger.SqliteConnection, "all_rows")
    bank.get("/transactions", effective_from="2026-01-15", effective_to="2026-01-16")
    [(query, values)] = [each for _, *all_of in asked for each in all_of if "labelled" in each[0]]
    with bank.ledger.database.read() as connection:
        plan = str(connection.execute(f"EXPLAIN QUERY PLAN {query}", **values).fetchall())
    assert "USING INDEX event_effective" in plan
    assert "SCAN event" not in plan


def test_the_clock_of_a_caller_is_a_time_of_effect(demo: "Bank") -> None:
    kata_accounts(demo, "a1", balance=5)
    for timestamp in (86_400_000, 2**53):
        send = partial(demo.post, "/bank/deposits", timestamp=timestamp)
        assert send(account_id="a1", amount=1).status_code == 200
    [account] = demo.get("/accounts", name="bank:a1").json()["items"]
    far, day, *_ = demo.get(f"/accounts/{account['id']}/statement").json()["items"]
    assert day["effective_at"] == "1970-01-02T00:00:00.000000Z"
    # What cannot be written is told as the last time that can.
    assert far["effective_at"] == "9999-12-31T23:59:59.999999Z"
    found = demo.get("/transactions", effective_to="1970-01-03", effective_from="1970-01-02")
    assert day["transaction_id"] in [each["id"] for each in found.json()["items"]]


def test_a_statement_is_from_a_time_on_and_before_another(bank: "BankInside") -> None:
    opened, *times = moments(bank, 1, 2, 3, 4, 5)

    def amounts(**bounds: int) -> list[int]:
        told = {name: ledger.utc_text(moment) for name, moment in bounds.items()}
        pages = bank.pages(f"/accounts/{bank.ids['alice']}/statement", limit=2, **told)
        return [entry["amount"] for page in pages for entry in page]

    assert amounts(**{"from": times[1]}) == [5, 4, 3, 2]
    assert amounts(**{"from": times[1] + 1}) == [5, 4, 3]
    assert amounts(to=times[3]) == [3, 2, 1]
    assert amounts(to=times[3] + 1) == [4, 3, 2, 1]
    assert amounts(**{"from": times[0], "to": times[3]}) == [3, 2, 1]
    assert amounts(**{"from": times[3], "to": times[3]}) == []
    assert amounts(**{"from": times[3], "to": times[0]}) == []
    assert amounts(**{"from": opened, "to": times[-1] + 1}) == [5, 4, 3, 2, 1]
    assert amounts(to=opened) == amounts(**{"from": times[-1] + 1}) == []


def test_a_cursor_of_a_statement_is_bound_to_its_times(bank: "BankInside") -> None:
    times = [ledger.utc_text(moment) for moment in moments(bank, 1, 2, 3, 4)]
    path = f"/accounts/{bank.ids['alice']}/statement"
    cursor = bank.get(path, limit=1, to=times[4]).json()["next_cursor"]
    for others in ({}, {"to": times[3]}, {"to": times[4], "from": times[1]}):
        assert refusal(bank.get(path, cursor=cursor, **others)) == (400, "invalid_cursor")


def test_the_trial_balance_is_0_for_each_asset(demo: "Bank") -> None:
    empty = {item["asset"]: item for item in demo.get("/balances").json()["items"]}
    assert set(empty) == set(ledger.ASSETS)
    demo.given(alice=100, bob=10).given(asset="JPY", yuki=7)
    demo.pay("alice", 50)
    demo.withdraw("bob", 4)
    found = {item["asset"]: item for item in demo.get("/balances").json()["items"]}
    assert {item["total"] for item in found.values()} == {0}
    assert found["USD"]["customers"] == empty["USD"]["customers"] + 56
    assert found["USD"]["system"]["merchants"] == 50
    yen = {"cash": -7, "cashback": 0, "merchants": 0}
    assert found["JPY"] == {"asset": "JPY", "customers": 7, "system": yen, "total": 0}


def totals(bank: "Bank", **asked: str) -> list[tuple[Any, ...]]:
    """Return each total as (asset, by, accounts, balance, held, credit limit)."""
    items = bank.get("/totals", **asked).json()["items"]
    names = ("asset", "by", "accounts", "balance", "held", "credit_limit")
    assert all(set(each) == {*names, "available"} for each in items)
    assert all(
        each["available"] == each["balance"] - each["held"] + each["credit_limit"] for each in items
    )
    return [tuple(each[name] for name in names) for each in items]


def test_accounts_are_added_up_by_asset_and_by_what_splits_them(bank: "BankInside") -> None:
    bank.given(ann=100, bob=50, cy=0).given(asset="EUR", dan=7)
    bank.ids["ann2"] = bank.post("/accounts", owner_name="ann", credit_limit=30).json()["id"]
    bank.withdraw("ann2", 20)
    bank.promised("ann", "bob", 40)
    bank.promised("ann", "cy", 5, expires_in=1)
    for name, team in (("ann", "red"), ("ann2", "red"), ("bob", "blue"), ("dan", "red")):
        change(bank, name, metadata={"team": team, "all": "x"})
    bank.step("cy", "freeze")
    bank.pass_time(2_000_000)
    assert totals(bank) == [("EUR", None, 1, 7, 0, 0), ("USD", None, 4, 130, 40, 30)]
    assert totals(bank, by="owner_name") == [
        ("EUR", "dan", 1, 7, 0, 0),
        ("USD", "ann", 2, 80, 40, 30),
        ("USD", "bob", 1, 50, 0, 0),
        ("USD", "cy", 1, 0, 0, 0),
    ]
    assert totals(bank, by="metadata[team]", asset="USD") == [
        ("USD", "blue", 1, 50, 0, 0),
        ("USD", "red", 2, 80, 40, 30),
        ("USD", None, 1, 0, 0, 0),
    ]
    red = {"metadata[team]": "red", "metadata[all]": "x"}
    assert totals(bank, **red) == [("EUR", None, 1, 7, 0, 0), ("USD", None, 2, 80, 40, 30)]
    assert totals(bank, owner_name="ann", by="metadata[all]") == [("USD", "x", 2, 80, 40, 30)]
    assert totals(bank, status="FROZEN") == [("USD", None, 1, 0, 0, 0)]
    assert totals(bank, owner_name="nobody") == []
    for wrong in ({"by": "team"}, {"by": "metadata[]"}, {"status": "OPEN"}, {"limit": "5"}):
        assert pointers(bank.get("/totals", **wrong)) == [f"/{next(iter(wrong))}"]


def test_a_total_may_leave_64_bits_and_has_at_most_1000_rows(bank: "Bank") -> None:
    columns = "id, owner_name, asset, status, balance, held, credit_limit, created_at, kind"
    rich = f"'x' || i, 'o' || owner, 'USD', 'ACTIVE', 0, 0, {10**15}, 0, 'CUSTOMER', 0"
    numbers = """WITH RECURSIVE numbers (i, owner) AS (SELECT 1, 1 UNION ALL
        SELECT i + 1, i % 1000 FROM numbers WHERE i < 9300)"""
    into = f"INSERT INTO account ({columns}, last_seq)"
    bank.tamper(f"{numbers} {into} SELECT {rich} FROM numbers")
    assert totals(bank) == [("USD", None, 9_300, 0, 0, 9_300 * 10**15)]
    assert len(totals(bank, by="owner_name")) == 1_000
    bank.given(alice=0)
    assert pointers(bank.get("/totals", by="owner_name")) == ["/by"]


def item(bank: "Bank", source: str, dest: str, amount: int, **others: Any) -> dict[str, Any]:
    """Return one transfer of many."""
    ends = {"source_account_id": bank.ids[source], "dest_account_id": bank.ids[dest]}
    return {**ends, "amount": amount, **others}


def bulk(bank: "Bank", *items: dict[str, Any], **options: Any) -> httpx.Response:
    """Send many transfers at once, under a new key unless one is given."""
    return bank.post("/transfers/bulk", **{"key": new_key(), "transfers": items, **options})


def test_many_transfers_see_the_effects_of_those_before(bank: "Bank") -> None:
    bank.given(alice=10, bob=0, carol=0)
    hops = [item(bank, "alice", "bob", 10), item(bank, "bob", "carol", 10)]
    done = bulk(bank, *hops, item(bank, "carol", "alice", 3)).json()
    assert (done["succeeded"], done["failed"]) == (3, 0)
    assert [(each["index"], each["error"]) for each in done["results"]] == [
        (0, None), (1, None), (2, None),
    ]  # fmt: skip
    last = bank.get(f"/transactions/{done['results'][2]['transfer_id']}").json()
    assert [entry["balance"] for entry in last["entries"]] == [7, 3]
    assert bank.balances() == {"alice": 3, "bob": 0, "carol": 7}
    assert bank.wrong() == []


def test_many_transfers_are_all_made_or_none(bank: "Bank") -> None:
    bank.given(alice=10, bob=0, carol=0)
    before = bank.contents() | {"idempotency_key": []}
    named = item(bank, "alice", "bob", 4, external_id="x", metadata={"order": "7"})
    refused = bulk(bank, named, item(bank, "bob", "carol", 5), item(bank, "alice", "alice", 1))
    assert refusal(refused) == (409, "bulk_failed")
    assert refused.json()["index"] == 1
    single = bank.transfer("bob", "carol", 5)
    error = refused.json()["error"]
    assert (error["code"], error["requested"]) == ("insufficient_funds", 5)
    assert set(error) == set(single.json())
    # The single one has found nothing, either: nothing has moved.
    assert bank.contents() | {"idempotency_key": []} == before
    assert bank.transfer("alice", "bob", 4, external_id="x").status_code == 200


def test_many_transfers_that_are_not_atomic_fail_alone(bank: "Bank") -> None:
    bank.given(alice=10, bob=0, carol=0).given(asset="EUR", eva=0)
    bank.ids["nobody"] = NOBODY
    done = bulk(
        bank,
        item(bank, "alice", "bob", 11),
        item(bank, "alice", "bob", 6, external_id="x"),
        item(bank, "alice", "alice", 1),
        item(bank, "bob", "carol", 2, external_id="x"),
        item(bank, "alice", "eva", 1),
        item(bank, "bob", "nobody", 1),
        item(bank, "bob", "carol", 6, external_id="y"),
        atomic=False,
    )
    assert (done.status_code, done.json()["succeeded"], done.json()["failed"]) == (200, 2, 5)
    results = done.json()["results"]
    assert [each["index"] for each in results] == list(range(7))
    assert [each["error"] and each["error"]["code"] for each in results] == [
        "insufficient_funds", None, "same_account", "external_id_exists", "asset_mismatch",
        "account_not_found", None,
    ]  # fmt: skip
    assert [each["transfer_id"] is None for each in results] == [
        each["error"] is not None for each in results
    ]
    assert bank.balances() == {"alice": 4, "bob": 0, "carol": 6, "eva": 0}
    assert bank.wrong() == []


def test_an_error_of_many_is_that_of_the_single_transfer(bank: "Bank") -> None:
    bank.given(alice=10, bob=0, carol=0).step("carol", "freeze")
    for ends in (("alice", "bob", 11), ("alice", "carol", 1), ("alice", "alice", 1)):
        single = bank.transfer(*ends).json()
        [one] = bulk(bank, item(bank, *ends), atomic=False).json()["results"]
        assert one["error"] == single
        assert bulk(bank, item(bank, *ends)).json()["error"] == single


@pytest.mark.parametrize("amount", [1, 100])
@pytest.mark.parametrize("atomic", [True, False])
def test_many_transfers_are_replayed_byte_by_byte(bank: "Bank", amount: int, atomic: bool) -> None:
    bank.given(alice=10, bob=0)
    first, again = (
        bulk(bank, *[item(bank, "alice", "bob", amount)] * 2, key="k", atomic=atomic)
        for _ in range(2)
    )
    assert (again.status_code, again.content) == (first.status_code, first.content)
    assert again.headers["Idempotent-Replayed"] == "true"
    assert bank.balances()["bob"] == (2 if amount == 1 else 0)


@at_the_edge
def test_many_transfers_are_at_least_one_and_at_most_1000(untouched: "Bank") -> None:
    one = untouched.transfer_body()
    strange: list[Any] = [[], [one] * 1_001, None, {}, "x"]
    for many in strange:
        refused = untouched.post("/transfers/bulk", key="k", transfers=many)
        assert pointers(refused) == ["/transfers"]
    for atomic in (None, 1, "true"):
        refused = untouched.post("/transfers/bulk", key="k", transfers=[one], atomic=atomic)
        assert pointers(refused) == ["/atomic"]
    refused = untouched.post("/transfers/bulk", transfers=[one])
    assert refusal(refused) == (400, "idempotency_key_missing")


@at_the_edge
def test_one_that_does_not_fit_is_pointed_at_among_many(untouched: "Bank") -> None:
    one = untouched.transfer_body()
    for wrong, pointer in (
        ({"amount": 0}, "/amount"),
        ({"source_account_id": "x"}, "/source_account_id"),
        ({"memo": "a\n"}, "/memo"),
        ({"metadata": {"a": 1}}, "/metadata/a"),
        ({"typo": 1}, "/typo"),
    ):
        for atomic in (True, False):
            many = [one, one | wrong, one]
            refused = untouched.post("/transfers/bulk", key="k", transfers=many, atomic=atomic)
            assert pointers(refused) == [f"/transfers/1{pointer}"]
    odd = untouched.post("/transfers/bulk", key="k", transfers=[one, None, 5])
    assert pointers(odd) == ["/transfers/1", "/transfers/2"]


@at_the_edge
def test_many_transfers_have_at_most_512_kibibytes(untouched: "Bank") -> None:
    body = json.dumps({"transfers": []}).encode()
    refused = untouched.send_raw("/transfers/bulk", body.ljust(524_289))
    assert refusal(refused) == (413, "body_too_large")
    assert pointers(untouched.send_raw("/transfers/bulk", body.ljust(524_288))) == ["/transfers"]
    for path in ("/transfers", "/transactions", "/accounts"):
        refused = untouched.send_raw(path, body.ljust(65_537))
        assert refusal(refused) == (413, "body_too_large")


def test_1000_transfers_are_made_at_once(bank: "Bank") -> None:
    bank.given(alice=1_000, bob=0)
    many = [item(bank, "alice", "bob", 1, external_id=f"x{n}") for n in range(1_000)]
    done = bulk(bank, *many).json()
    assert (done["succeeded"], len(done["results"])) == (1_000, 1_000)
    assert bank.balances() == {"alice": 0, "bob": 1_000}
    refused = bulk(bank, *[item(bank, "bob", "alice", 1)] * 999, many[0])
    assert refusal(refused) == (409, "bulk_failed")
    assert (refused.json()["index"], refused.json()["error"]["code"]) == (999, "external_id_exists")
    assert bank.balances() == {"alice": 0, "bob": 1_000}
    assert bank.wrong() == []


def test_1000_transfers_out_of_an_account_with_a_hold_are_made_at_once(bank: "Bank") -> None:
    bank.given(alice=1_000, bob=0)
    hold = {"account_id": bank.ids["alice"], "dest_account_id": bank.ids["bob"], "amount": 1}
    bank.post("/holds", key=new_key(), **hold)
    many = [item(bank, "alice", "bob", 1)] * 1_000
    done = bulk(bank, *many, atomic=False).json()
    assert (done["succeeded"], done["failed"]) == (999, 1)
    assert done["results"][-1]["error"]["code"] == "insufficient_funds"
    assert bank.balances() == {"alice": 1, "bob": 999}
    assert bank.wrong() == []


def test_200_transactions_at_one_moment_are_one_batch(bank: "BankInside") -> None:
    bank.given(alice=150, bob=0)
    one = {"entries": entries_of(bank, {"alice": -1, "bob": 1})}
    answers = bank.together(*[("/transactions", one)] * 200)
    assert Counter(map(outcome, answers)) == {201: 150, "insufficient_funds": 50}
    assert bank.balances() == {"alice": 0, "bob": 150}
    assert bank.wrong() == []


def test_a_small_command_waits_for_one_large_one_at_most(bank: "BankInside") -> None:
    small = command_of(ledger.open_account, owner_name="x", asset="USD")
    large = small._replace(accounts=[NOBODY] * ledger.LARGE_ACCOUNTS)
    answered = []

    async def submit(name: str, command: ledger.Command) -> None:
        await bank.ledger.submit(command)
        answered.append(name)

    async def submit_all() -> None:
        largest = (submit(name, large) for name in ("first", "second", "third"))
        await asyncio.gather(*largest, submit("small", small))

    bank.runner.run(submit_all())
    assert answered == ["first", "small", "second", "third"]


def test_each_of_many_transfers_that_moved_has_its_own_event(bank: "Bank") -> None:
    bank.given(bob=0, alice=10)
    paid = {"memo": "rent", "external_id": "x", "metadata": {"order": "7"}}
    moved = [item(bank, "alice", "bob", 4, **paid), item(bank, "bob", "alice", 1)]
    done = bulk(bank, moved[0], item(bank, "alice", "bob", 7), moved[1], atomic=False).json()
    later, first = bank.get("/audit").json()["items"][:2]
    assert [event["action"] for event in bank.get("/audit").json()["items"]][:3] == [
        "transfer", "transfer", "deposit",
    ]  # fmt: skip
    ids = [each["transfer_id"] for each in done["results"]]
    assert [first["transaction_id"], None, later["transaction_id"]] == ids
    assert first["details"] == moved[0]
    assert later["details"] == moved[1]
    found = bank.get("/transactions", **{"metadata[order]": "7"}).json()["items"]
    assert [(each["id"], each["memo"], each["external_id"]) for each in found] == [
        (ids[0], "rent", "x")
    ]


def test_many_transfers_of_several_callers_keep_the_total(servers: "Bank") -> None:
    names = [f"bulk {number}" for number in range(6)]
    servers.given(dict.fromkeys(names, 100))

    def send(number: int) -> httpx.Response:
        pairs = [random.sample(names, 2) for _ in range(40)]
        items = [item(servers, a, b, random.randint(1, 60)) for a, b in pairs]
        return bulk(servers, *items, atomic=number % 2 == 0)

    answers = [answer.json() for answer in at_once([partial(send, n) for n in range(16)])]
    # Of those that are not atomic each is an answer; whatever else fails, fails for want of funds.
    assert sum("results" in answer for answer in answers) >= 8
    failures = [answer.get("results") or [answer] for answer in answers]
    codes = {each["error"]["code"] for some in failures for each in some if each["error"]}
    assert codes == {"insufficient_funds"}
    balances = servers.balances()
    assert sum(balances[name] for name in names) == 600
    assert min(balances[name] for name in names) >= 0
    assert servers.wrong() == []


def test_of_many_transfers_at_one_moment_with_one_key_one_acts(servers: "Bank") -> None:
    servers.given({"once a": 100, "once b": 0})
    items = [item(servers, "once a", "once b", 1)] * 10
    answers = at_once([partial(bulk, servers, *items, key=new_key())] * 10)
    assert len({answer.content for answer in answers}) == 1
    assert servers.balances()["once b"] == 10


@at_the_edge
@pytest.mark.parametrize("path", ["/accounts", "/transactions"])
def test_odd_filters_get_a_clear_answer(untouched: "Bank", path: str) -> None:
    many = {f"metadata[{number}]": "x" for number in range(1_100)}
    odd: list[dict[str, str]] = [
        many, {"metadata[a]": "\x00"}, {"metadata[\x00]": "a"}, {"metadata[]": ""},
        {"metadata[a\nb]": "1"}, {"metadata[a]": "x" * 501}, {"metadata[" + "n" * 41 + "]": "x"},
    ]  # fmt: skip
    for filters in odd:
        assert refusal(untouched.get(path, **filters)) == (422, "invalid_request"), str(filters)
    for name in ("metadata", "metadata[", "metadata[a", "metadata]", "metadatax[a]"):
        assert refusal(untouched.get(path, **{name: "x"})) == (422, "invalid_request")
    for text in ("'", "%", "\\", "]", "\u202e"[:0], "\U0001f680", "%ff"):
        assert untouched.get(path, **{f"metadata[{text}x]": text}).json()["items"] == []
    raw = "?metadata[%ff]=%fe&metadata[a]]=[&external_id=%ff&&&metadata[b]"
    assert untouched.send("GET", path + raw).status_code == 200


def test_the_order_of_metadata_means_nothing(bank: "Bank") -> None:
    one, other = {"a": "1", "b": "2"}, {"b": "2", "a": "1"}
    first = bank.given(alice=0).deposit("alice", 1, key="k", metadata=one)
    again = bank.deposit("alice", 1, key="k", metadata=other)
    assert (again.status_code, again.content) == (200, first.content)


def test_a_filter_that_stands_twice_must_hold_twice(bank: "Bank") -> None:
    bank.post("/accounts", owner_name="alice", metadata={"order": "7"})
    for order, found in (("7", 1), ("8", 0)):
        path = f"/accounts?metadata[order]={order}&metadata[order]=7"
        assert len(bank.send("GET", path).json()["items"]) == found


# ----- The library


def opened_for_two(books: ledger.Books) -> dict[str, str]:
    """Return the ids of Alice, who has 100, and Bob, by their names."""
    ids = {name: books.open_account(owner_name=name, asset="USD").id for name in ("alice", "bob")}
    books.deposit(ids["alice"], amount=100, key=new_key())
    return ids


@pytest.fixture
def books(database: str) -> Iterator[ledger.Books]:
    """A ledger as a program in Python has it."""
    with ledger.open_ledger(database) as books:
        yield books


def test_a_program_keeps_books_without_a_server(books: ledger.Books) -> None:
    alice = books.open_account(owner_name="alice", asset="USD", metadata={"order": "7"})
    bob = books.open_account(owner_name="bob", asset="USD", external_id="b")
    books.deposit(alice.id, amount=1050, key="pay-day")
    moved = books.transfer(alice.id, bob.id, amount=300, key="rent", memo="may")
    assert (moved.source.balance, moved.dest.balance) == (750, 300)
    assert books.transaction(moved.transfer_id).memo == "may"
    assert [entry.amount for entry in books.statement(alice.id, limit=1).items] == [300]
    assert [a.id for a in books.accounts(metadata={"order": "7"}).items] == [alice.id]
    assert books.accounts(external_id="b").items == [books.account(bob.id)]
    since = datetime.fromtimestamp(moved.ts / 1e6, UTC) - timedelta(hours=1)
    assert len(books.statement(alice.id, from_=since).items) == 2
    assert books.statement(alice.id, to=since.isoformat()).items == []
    hold = books.place_hold(bob.id, alice.id, amount=100, key=new_key())
    assert books.capture_hold(hold.id, amount=40, key=new_key()).captured_amount == 40
    assert books.pay(alice.id, amount=50, key=new_key()).cashback.amount == 1
    entries = [{"account_id": alice.id, "type": "DEBIT", "amount": 1}]
    entries.append({"account_id": bob.id, "type": "CREDIT", "amount": 1})
    posted = books.post(entries=entries, key=new_key())
    assert books.reverse(posted.id, key=new_key()).reverses == posted.id
    assert {item.total for item in books.balances().items} == {0}
    assert books.add_asset(code="MILES", name="Miles", exponent=0, closed_loop=True).closed_loop
    miles = books.open_account(owner_name="alice", asset="MILES")
    books.top_up(miles.id, amount=5, key=new_key())
    books.give_bonus(miles.id, amount=2, key=new_key())
    assert books.spend(miles.id, amount=1, key=new_key()).balance == 6
    assert books.asset("MILES") in books.assets().items
    assert books.update_account(alice.id, credit_limit=5).credit_limit == 5
    assert books.events(limit=1).items[0].type == "account.opened"
    assert {event.caller for event in books.audit().items} == {"local"}


def test_a_refusal_is_raised_as_what_it_is(books: ledger.Books) -> None:
    ids = opened_for_two(books)
    ends = (ids["alice"], ids["bob"])
    for _ in range(2):  # The second time it is what the key was answered.
        with pytest.raises(ledger.InsufficientFunds) as refused:
            books.transfer(*ends, amount=500, key="k")
        assert refused.value.members["available"] == 100
    with pytest.raises(ledger.IdempotencyKeyReused):
        books.transfer(*ends, amount=5, key="k")
    with pytest.raises(ledger.AccountNotFound):
        books.account(NOBODY)
    assert books.account(ids["alice"]).balance == 100


@pytest.mark.parametrize(
    "wrong",
    [{"amount": -5}, {"amount": 5.0}, {"amount": "5"}, {"amount": True}, {"amount": 1, "memmo": ""},
     {}, {"amount": float("nan")}, {"amount": 1, "memo": "\ud800"}],
)  # fmt: skip
def test_arguments_are_checked_as_over_http(books: ledger.Books, wrong: dict[str, Any]) -> None:
    ids = opened_for_two(books)
    with pytest.raises((ledger.InvalidRequest, ledger.MalformedJson)):
        books.transfer(ids["alice"], ids["bob"], key="k", **wrong)
    with pytest.raises(ledger.IdempotencyKeyMissing):
        books.transfer(ids["alice"], ids["bob"], amount=5)
    with pytest.raises(TypeError, match="takes the ids"):
        books.transfer(ids["alice"], ids["bob"], ids["bob"], amount=5, key="k")
    with pytest.raises(TypeError, match="takes the ids"):
        books.account(ids["alice"], account_id=ids["bob"])
    assert books.account(ids["alice"]).balance == 100


def test_a_retry_returns_the_same_result(books: ledger.Books) -> None:
    ids = opened_for_two(books)
    first, again = (books.transfer(*ids.values(), amount=5, key="k") for _ in range(2))
    assert (first, books.account(ids["alice"]).balance) == (again, 95)


def test_threads_and_a_server_share_the_books(books: ledger.Books, database: str) -> None:
    ids = opened_for_two(books)
    with serving(database) as server, ThreadPoolExecutor(8) as threads:
        server.bank.ids = ids
        transfer = partial(books.transfer, ids["alice"], ids["bob"], amount=1)
        moved = [threads.submit(transfer, key=f"k{number}") for number in range(20)]
        answers = [server.bank.transfer("alice", "bob", 1) for _ in range(20)]
        assert {answer.status_code for answer in answers} == {200}
        assert len({one.result().transfer_id for one in moved}) == 20
        assert server.bank.funds("alice") == (60, 0, 60)


def test_an_event_loop_goes_on_while_the_books_are_kept(books: ledger.Books) -> None:
    async def move_two_at_once(ends: Sequence[str]) -> list[ledger.TransferPublic]:
        move = partial(books.transfer, *ends, amount=1)
        keys = [f"k{number}" for number in range(2)]
        return await asyncio.gather(*(asyncio.to_thread(move, key=key) for key in keys))

    ids = opened_for_two(books)
    moved = asyncio.run(move_two_at_once([*ids.values()]))
    assert sorted(each.source.balance for each in moved) == [98, 99]


USER_OF_THE_LIBRARY = """
from ledger import AccountPublic, open_ledger
def balance_of(owner: str) -> int:
    with open_ledger("sqlite:///books.db") as books:
        account: AccountPublic = books.open_account(owner_name=owner)
        return books.account(account.id).balance + books.deposit(account.id, amount=1, key="k").held
reveal_type(open_ledger("x").statement("").items[0].amount)
"""


# Of other packages, what schemas derive from is read alone: to read all takes five times as long.
FOR_THE_LIBRARY = """[mypy]
strict = True
follow_imports = skip
[mypy-ledger,pydantic,pydantic.main,sqlmodel,sqlmodel.main]
follow_imports = silent
"""


def test_results_are_typed(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER_OF_THE_LIBRARY)
    (tmp_path / "mypy.ini").write_text(FOR_THE_LIBRARY)
    options = ("--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", os.devnull)
    user = str(tmp_path / "user.py")
    ran = run_python("-m", "mypy", *options, user, MYPYPATH=str(PROGRAM.parent))
    assert 'Revealed type is "int"' in ran.stdout
    assert "Success" in ran.stdout


NOTED = ({"metadata[of]": "x"}, {"metadata[no]": "1"})
LISTS: dict[str, tuple[dict[str, str], ...]] = {
    "/accounts": ({"owner_name": "alice"}, {"name": "none"}, {"external_id": "a"}, *NOTED),
    "/transactions": ({"account_id": "alice"}, {"external_id": "t"}, *NOTED),
    "/holds": ({"account_id": "alice"}, {"account_id": "bob"}, {"status": "PENDING"}),
    "/audit": ({"account_id": "alice"},),
    "/events": (),
}


def every_list(bank: "Bank") -> Iterator[tuple[str, dict[str, str]]]:
    """Yield each list with each of its filters, alone and together."""
    for path, filters in LISTS.items():
        for count in range(len(filters) + 1):
            for chosen in itertools.combinations(filters, count):
                merged = {name: value for each in chosen for name, value in each.items()}
                if "account_id" in merged:
                    merged["account_id"] = bank.ids[merged["account_id"]]
                yield path, {**merged, "limit": "3"}


def with_lists(bank: "BankInside") -> "BankInside":
    """Fill every list with some rows."""
    bank.given(alice=100, bob=0)
    for number in range(5):
        noted: Any = {"metadata": {"of": "x", "no": str(number)}}
        bank.post("/accounts", owner_name="alice", external_id=f"a{number}"[: 1 + number], **noted)
        bank.transfer("alice", "bob", 1, external_id=f"t{number}"[: 1 + number], **noted)
        bank.promised("alice", "bob", 1)
        bank.void(bank.promised("bob", "alice", 1))
    return bank


def read_anew(bank: "BankInside", bound: str) -> None:
    """Close connections that read, which know their bounds already."""
    for connection in bank.ledger.database._reading.pop(bound, []):
        connection.driver.close()


def test_a_list_that_takes_long_leaves_the_event_loop_and_tells_the_same(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    with_lists(bank)
    asked = list(every_list(bank))
    assert len(asked) > 50
    shown = [bank.get(path, **filters).json() for path, filters in asked]
    assert all("items" in page for page in shown)
    turns = counted_calls(monkeypatch, bank.ledger.database, "long_turn")
    monkeypatch.setattr(ledger, "SHORT_STEPS_MAX", 0)
    monkeypatch.setattr(ledger, "STEP_INSTRUCTIONS", 1)
    monkeypatch.setitem(ledger.READ_SECONDS_MAX, "short", 0.001)
    read_anew(bank, "short")
    assert [bank.get(path, **filters).json() for path, filters in asked] == shown
    # On PostgreSQL it is time that counts, and some are quick.
    assert len(turns) > len(asked) or not bank.ledger.database.inline


@on_sqlite
def test_every_list_reads_few_rows_on_the_event_loop(bank: "BankInside") -> None:
    with_lists(bank)
    for path, filters in every_list(bank):
        bank.get(path, **filters)
        [connection] = bank.ledger.database._reading["short"]
        assert connection.steps <= 3, (path, filters)


@on_sqlite
def test_a_read_that_takes_too_long_is_ended(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.given(alice=1)
    monkeypatch.setattr(ledger, "STEP_INSTRUCTIONS", 1)
    monkeypatch.setitem(ledger.READ_SECONDS_MAX, "long", 0)
    read_anew(bank, "long")
    refused = bank.get("/balances")
    assert refusal(refused) == (503, "database_busy")
    assert refused.headers["Retry-After"] == "1"
    assert bank.deposit("alice", 1).status_code == 200


@on_sqlite
def test_long_reads_let_a_large_log_begin_anew(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    database: Any = bank.given(alice=1).ledger.database
    monkeypatch.setattr(ledger, "LOG_BYTES_MAX", 0)
    monkeypatch.setattr(ledger, "LOG_SECONDS_MAX", 0.05)
    began: list[str] = []

    def read_too() -> None:
        with database.long_turn():
            began.append("other")

    with ThreadPoolExecutor(1) as thread:
        with database.long_turn():
            other = thread.submit(read_too)
            time.sleep(0.2)
            began.append("first")
        other.result()
    # The second one waits until nobody reads.
    assert began == ["first", "other"]


@on_sqlite
def test_who_is_unfrozen_or_closed_finds_his_cashbacks_by_an_index(bank: "BankInside") -> None:
    for status in ("WAITING", "SCHEDULED"):
        query = f"SELECT 1 FROM scheduled_cashback WHERE {ledger.TO_COME} AND status = '{status}'"
        [plan] = bank.rows(f"EXPLAIN QUERY PLAN {query.replace(':id', '1')}")
        assert "USING INDEX cashback_to_come" in plan[-1]


# ----- Dialect: /bank, the banking kata
# Accounts under the caller's own names, by the caller's own clock.

MS_PER_DAY = 86_400_000


def kata(bank: "Bank", timestamp: int, path: str, **body: Any) -> Any:
    """Send a request of the kata, and return its answer, or the status and detail of a refusal."""
    answer = bank.post(f"/bank{path}", timestamp=timestamp, **body)
    return answer.json() if answer.is_success else (refusal(answer)[0], answer.json()["detail"])


def kata_accounts(bank: "Bank", *names: str, balance: int = 0) -> None:
    """Open accounts of the kata at the time 1."""
    for name in names:
        made = kata(bank, 1, "/accounts", account_id=name)
        assert made == {"account_id": name, "created": True}
        if balance:
            kata(bank, 1, "/deposits", account_id=name, amount=balance)


def kata_transfer(bank: "Bank", timestamp: int, source: str, target: str, amount: int) -> Any:
    """Transfer in the kata."""
    ends = {"source_account_id": source, "target_account_id": target}
    return kata(bank, timestamp, "/transfers", **ends, amount=amount)


def kata_balance(bank: "Bank", name: str, **parameters: int) -> int:
    """Return a balance of the kata."""
    return int(bank.get(f"/bank/accounts/{name}/balance", **parameters).json()["balance"])


def test_the_kata_adds_up_what_is_large(demo: "Bank") -> None:
    kata_accounts(demo, "alice", "bob", balance=9_000_000_007)
    assert kata_transfer(demo, 4, "alice", "bob", 9_000_000_007) == {"balance": 0}
    spenders = demo.get("/bank/top-spenders", timestamp=6, n=5).json()
    assert spenders == {"top_spenders": ["alice(9000000007)", "bob(0)"]}


def kata_history(bank: "Bank", name: str, timestamp: int) -> list[dict[str, Any]]:
    """Return all that happened to an account of the kata."""
    answer = bank.get(f"/bank/accounts/{name}/transactions", timestamp=timestamp)
    return list(answer.json()["transactions"])


def test_the_kata_moves_money(demo: "Bank") -> None:
    kata_accounts(demo, "bob", "alice")
    assert kata(demo, 2, "/accounts", account_id="alice") == (409, "Account already exists")
    assert demo.get("/bank/accounts").json() == {"accounts": ["alice", "bob"]}
    assert kata(demo, 2, "/deposits", account_id="alice", amount=2_000) == {"balance": 2_000}
    assert kata(demo, 3, "/deposits", account_id="zoe", amount=1) == (404, "Account not found")
    assert kata_transfer(demo, 4, "alice", "bob", 500) == {"balance": 1_500}
    for target, amount in (("bob", 5_000), ("alice", 1), ("zoe", 1)):
        assert kata_transfer(demo, 4, "alice", target, amount) == (400, "Transfer failed")
    spenders = demo.get("/bank/top-spenders", timestamp=6, n=5).json()
    assert spenders == {"top_spenders": ["alice(500)", "bob(0)"]}
    assert demo.get("/bank/health").json() == {"status": "ok"}
    assert demo.wrong() == []


def test_the_kata_pays(demo: "Bank") -> None:
    kata_accounts(demo, "alice", "bob", balance=1_000)
    assert kata(demo, 5, "/payments", account_id="alice", amount=199) == {"payment_id": "payment1"}
    assert kata(demo, 5, "/payments", account_id="alice", amount=9_999) == (400, "Payment failed")
    assert kata(demo, 5, "/payments", account_id="zoe", amount=1) == (400, "Payment failed")
    assert kata(demo, 6, "/payments", account_id="bob", amount=49) == {"payment_id": "payment2"}
    assert kata_balance(demo, "alice") == 801
    due = 5 + MS_PER_DAY
    for timestamp, status in ((due - 1, "IN_PROGRESS"), (due, "CASHBACK_RECEIVED")):
        query = {"account_id": "alice", "timestamp": timestamp}
        answer = demo.get("/bank/payments/payment1", **query).json()
        assert answer == {"payment_id": "payment1", "status": status}
    assert kata_balance(demo, "alice") == 804
    assert demo.wrong() == []


def test_a_payment_of_the_kata_is_found_by_its_own_account_alone(demo: "Bank") -> None:
    kata_accounts(demo, "alice", "bob", balance=100)
    kata(demo, 2, "/payments", account_id="alice", amount=9)
    odd = ("payment2", "payment0", "payment01", "payment" + "9" * 30, "x")
    for name, payment in [("bob", "payment1"), *(("alice", one) for one in odd)]:
        refused = demo.get(f"/bank/payments/{payment}", account_id=name, timestamp=6)
        assert refusal(refused) == (404, "payment_not_found")


def test_the_kata_lists_a_history(demo: "Bank") -> None:
    kata_accounts(demo, "alice", "bob")
    kata(demo, 50, "/deposits", account_id="alice", amount=1_000)
    kata(demo, 20, "/payments", account_id="alice", amount=100)
    kata(demo, 50, "/payments", account_id="alice", amount=10)
    kata_transfer(demo, 60, "alice", "bob", 5)
    lines = kata_history(demo, "alice", 0)
    assert [tuple(line.values())[1:] for line in lines] == [
        (1, "created", 0, None, None),
        (20, "payment1", 100, None, None),
        (50, "deposited", 1_000, None, None),
        (50, "payment2", 10, None, None),
        (60, "transferred out", 5, None, None),
        (20 + MS_PER_DAY, "cashback", 2, "payment1", False),
        (50 + MS_PER_DAY, "cashback", 0, "payment2", False),
    ]
    assert len({line["transaction_id"] for line in lines}) == len(lines)
    others = [line["operation"] for line in kata_history(demo, "bob", 0)]
    assert others == ["created", "transferred in"]
    missing = demo.get("/bank/accounts/zoe/transactions", timestamp=0)
    assert (refusal(missing)[0], missing.json()["detail"]) == (404, "Account not found")


@pytest.mark.parametrize("amount", [100, 10])
def test_the_kata_shows_what_was_reversed_and_numbers_payments_on(
    demo: "Bank", amount: int
) -> None:
    kata_accounts(demo, "alice", balance=1_000)
    assert kata(demo, 5, "/payments", account_id="alice", amount=amount)["payment_id"] == "payment1"
    [(paid,)] = demo.rows("SELECT id FROM event WHERE kind = 'PAYMENT'")
    assert demo.reverse(paid).status_code == 201
    assert kata(demo, 6, "/payments", account_id="alice", amount=50) == {"payment_id": "payment2"}
    due = 6 + MS_PER_DAY
    lines = {line["operation"]: line for line in kata_history(demo, "alice", due + 1)}
    assert lines["reversed"]["amount"] == amount
    cashbacks = [
        (line["payment_ref"], line["deposited"])
        for line in kata_history(demo, "alice", due + 1)
        if line["operation"] == "cashback"
    ]
    assert cashbacks == [("payment1", False), ("payment2", True)]
    query = {"account_id": "alice", "timestamp": due + 1}
    found = [demo.get(f"/bank/payments/payment{n}", **query).json()["status"] for n in (1, 2)]
    assert found == ["IN_PROGRESS", "CASHBACK_RECEIVED"]
    assert kata_balance(demo, "alice") == 1_000 - 50 + 1
    # What was spent stays spent.
    spenders = demo.get("/bank/top-spenders", timestamp=due, n=5).json()
    assert spenders == {"top_spenders": [f"alice({amount + 50})"]}
    assert demo.wrong() == []


def test_the_kata_lists_a_capture_as_a_transfer(demo: "Bank") -> None:
    kata_accounts(demo, "alice", "bob", balance=100)
    names = ("alice", "bob")
    [alice, bob] = [demo.get("/accounts", name=f"bank:{n}").json()["items"][0]["id"] for n in names]
    demo.ids |= {"alice": alice, "bob": bob}
    demo.capture(demo.promised("alice", "bob", 30))
    demo.journal({"bob": -5, "alice": 5})
    now = ledger.utc_now() // 1_000
    shown = [[line["operation"] for line in kata_history(demo, name, now)][2:] for name in names]
    assert shown == [["transferred out", "transferred in"], ["transferred in", "transferred out"]]
    spenders = demo.get("/bank/top-spenders", timestamp=now, n=2).json()
    assert spenders == {"top_spenders": ["alice(30)", "bob(5)"]}


def test_the_kata_shows_a_cashback_of_nothing_as_received_once_it_is_due(demo: "Bank") -> None:
    kata_accounts(demo, "alice", balance=1_000)
    kata(demo, 20, "/payments", account_id="alice", amount=100)
    kata(demo, 50, "/payments", account_id="alice", amount=10)

    def deposited(timestamp: int) -> list[bool]:
        return [line["deposited"] for line in kata_history(demo, "alice", timestamp)[-2:]]

    assert deposited(0) == [False, False]
    assert deposited(MS_PER_DAY + 49) == [True, False]
    assert deposited(MS_PER_DAY + 50) == [True, True]
    assert deposited(2**53) == [True, True]
    # What was credited stays so; of a cashback of 0 nothing was, so the time of who asks counts.
    assert deposited(0) == [True, False]


def test_the_kata_takes_the_last_millisecond_there_is(demo: "Bank") -> None:
    kata_accounts(demo, "alice", balance=100)
    kata(demo, 2**53, "/payments", account_id="alice", amount=100)
    times = [line["timestamp"] for line in kata_history(demo, "alice", 2**53)]
    assert times == [1, 1, 2**53, 2**53 + MS_PER_DAY]


def test_cashback_of_the_kata_comes_before_the_operation_that_reaches_it(demo: "Bank") -> None:
    kata_accounts(demo, "alice", "bob", balance=100)
    kata(demo, 10, "/payments", account_id="alice", amount=100)
    kata(demo, 5, "/payments", account_id="bob", amount=100)
    # Alice has nothing but what just came back to her; it stays, although she is refused.
    refused = kata_transfer(demo, 10 + MS_PER_DAY, "alice", "bob", 3)
    assert refused == (400, "Transfer failed")
    assert (kata_balance(demo, "alice"), kata_balance(demo, "bob")) == (2, 2)
    order = demo.rows(
        "SELECT owner_name FROM event JOIN entry ON transaction_id = event.id "
        "JOIN account ON account.id = entry.account_id WHERE event.kind = 'CASHBACK' "
        "AND account.kind = 'CUSTOMER' ORDER BY event.id"
    )
    assert order == [("bob",), ("alice",)]
    # An earlier time is accepted, and takes nothing back.
    assert kata_balance(demo, "alice", timestamp=1) == 2


def test_a_caller_who_may_only_read_moves_no_money_by_telling_a_time(database: str) -> None:
    with opened(database, ledger.DIALECTS, admin_key=ADMIN_KEY) as bank:
        clerk = bank.by(ADMIN_KEY)
        kata_accounts(clerk, "alice", balance=100)
        kata(clerk, 2, "/payments", account_id="alice", amount=100)
        reader = bank.by(new_api_key(database, "reader", "auditor"))
        later = {"timestamp": 2 + MS_PER_DAY}
        assert kata_balance(reader, "alice", **later) == 0
        shown = reader.get("/bank/payments/payment1", account_id="alice", **later)
        assert shown.json()["status"] == "IN_PROGRESS"
        assert kata_balance(clerk, "alice", **later) == 2
        told = [
            event
            for event in clerk.get("/audit").json()["items"]
            if event["action"] == "credit_cashback"
        ]
        assert [(event["caller"], event["details"]["timestamp"]) for event in told] == [
            ("admin", later["timestamp"])
        ]


def test_a_long_history_is_read_like_a_short_one(
    demo: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    kata_accounts(demo, "alice", balance=100)
    show = partial(demo.get, "/bank/accounts/alice/transactions", timestamp=1)
    short, turns = show(), counted_calls(monkeypatch, demo.ledger.database, "long_turn")
    monkeypatch.setattr(ledger, "SHORT_ROWS_MAX", 0)
    monkeypatch.setattr(ledger, "PART_BYTES", 100)
    monkeypatch.setattr(ledger, "REQUEST_SECONDS_MAX", 10)
    # More often than there are turns: each is given back.
    assert {show().content for _ in range(3 * ledger.LONG_READERS_MAX)} == {short.content}
    assert len(turns) == 3 * ledger.LONG_READERS_MAX


@pytest.mark.parametrize("amount", [1, 49, 50, 99, 10**15 - 1, 10**15])
def test_cashback_is_exact_at_every_size(demo: "Bank", amount: int) -> None:
    kata_accounts(demo, "alice", balance=amount)
    kata(demo, 1, "/payments", account_id="alice", amount=amount)
    assert kata_balance(demo, "alice", timestamp=1 + MS_PER_DAY) == amount * 2 // 100


def test_the_clock_of_the_kata_is_its_own(demo: "BankInside") -> None:
    kata_accounts(demo, "alice", balance=100)
    # By the server's clock this payment was made in 1970; by the caller's it was just made.
    kata(demo, 1, "/payments", account_id="alice", amount=100)
    demo.pass_time(10 * DAY)
    assert kata_balance(demo, "alice", timestamp=MS_PER_DAY) == 0
    [account] = demo.get("/accounts", name="bank:alice").json()["items"]
    entries = demo.get(f"/accounts/{account['id']}/statement").json()["items"]
    assert [entry["kind"] for entry in entries] == ["PAYMENT", "DEPOSIT"]
    payment_id = entries[0]["transaction_id"]
    assert refusal(demo.get(f"/payments/{payment_id}")) == (404, "payment_not_found")
    assert demo.get(f"/transactions/{payment_id}").json()["kind"] == "PAYMENT"


@at_the_edge
@pytest.mark.parametrize("timestamp", [-1, 2**53 + 1, 1.5, "1", True, None])
def test_a_time_is_a_number_of_milliseconds(untouched: "Bank", timestamp: Any) -> None:
    refused = untouched.post("/bank/accounts", timestamp=timestamp, account_id="a")
    assert refusal(refused) == (422, "invalid_request")


def test_payments_of_the_kata_are_numbered_without_gaps(servers: "Bank") -> None:
    names = [f"payer {number}" for number in range(8)]
    kata_accounts(servers, *names, balance=100)
    pay = [partial(kata, servers, 2, "/payments", account_id=name, amount=9) for name in names]
    answers = at_once(pay * 13)
    numbers = [int(a["payment_id"].removeprefix("payment")) for a in answers if isinstance(a, dict)]
    assert sorted(numbers) == list(range(1, 89))
    assert answers.count((400, "Payment failed")) == 16


def test_of_two_parallel_openings_of_one_name_one_succeeds(servers: "Bank") -> None:
    for name in ("twin a", "twin b", "twin c"):
        in_bank = partial(servers.post, "/bank/accounts", timestamp=1, account_id=name)
        in_wallets = partial(servers.post, USERS, external_user_id=name)
        for opening in (in_bank, in_wallets):
            assert set(map(outcome, at_once([opening] * 2))) == {201, "account_exists"}


def test_cashbacks_come_once_however_often_the_server_dies(database: str) -> None:
    payments, due = 120, MS_PER_DAY
    with opened(database, ledger.DIALECTS) as bank:
        kata_accounts(bank, "payer", balance=10**9)
        for timestamp in range(payments):
            amount = 100 + timestamp
            kata(bank, timestamp, "/payments", account_id="payer", amount=amount)
        unpaid = kata_balance(bank, "payer")
    times = itertools.count(due)
    for _ in range(CYCLES):
        with serving(database) as server:
            load_until_killed(server, partial(look_later, server.bank, times), payments // CYCLES)
    with serving(database) as server:
        balance = kata_balance(server.bank, "payer", timestamp=due + payments)
        assert balance == unpaid + sum((100 + n) * 2 // 100 for n in range(payments))
    assert ledger.main(["check", "--database-url", database]) == 0


def look_later(bank: "Bank", times: Iterator[int]) -> None:
    """Look at the payer's balance at the next time, which credits what is due by then."""
    kata_balance(bank, "payer", timestamp=next(times))


# ----- Dialect: /atm, the cash machine
# Amounts are decimal text of two places, and the first accounts come from a setting.


def test_the_cash_machine_shows_its_accounts(demo: "Bank") -> None:
    welcome = {"message": "Mini ATM Server", "docs": "/docs", "sample_accounts": ATM_DEMO}
    assert demo.get("/atm/").json() == welcome
    assert demo.get("/atm/health").json() == {"status": "ok", "accounts": sorted(ATM_DEMO)}
    shown = demo.get("/atm/accounts/1002/balance").json()
    assert shown == {"account_number": "1002", "balance": "250.50"}
    assert refusal(demo.get("/atm")) == (404, "not_found")


def test_the_cash_machine_takes_cash_in_and_gives_it_out(demo: "Bank") -> None:
    path = "/atm/accounts/1002"
    assert demo.post(f"{path}/deposit", amount="0.5").json()["balance"] == "251.00"
    assert demo.post(f"{path}/withdraw", amount="251").json()["balance"] == "0.00"
    refused = demo.post(f"{path}/withdraw", amount="0.01")
    assert (refusal(refused)[0], refused.json()["detail"]) == (400, "insufficient funds")
    for answer in (
        demo.get("/atm/accounts/9/balance"),
        demo.post("/atm/accounts/9/deposit", amount="1"),
        demo.post("/atm/accounts/9/withdraw", amount="1"),
    ):
        assert (refusal(answer)[0], answer.json()["detail"]) == (404, "account not found")
    assert demo.wrong() == []


@at_the_edge
@pytest.mark.parametrize(
    "amount",
    ["0", "0.00", "-1", "+1", "1.", ".5", "1.005", "NaN", "Infinity", "1e2", "1_000", " 5", "5 ",
     "1,50", "\u0661", "", "0x1", "9" * 17, "9" * 4_000, "1\n", 10, 10.5, True, None, ["1"]],
    ids=short,
)  # fmt: skip
def test_the_cash_machine_takes_plain_decimals_alone(untouched: "Bank", amount: Any) -> None:
    refused = untouched.post("/atm/accounts/1001/deposit", amount=amount)
    assert refusal(refused) == (422, "invalid_request")


def test_amounts_of_the_cash_machine_have_the_bound_of_all(demo: "Bank") -> None:
    path = "/atm/accounts/1003/deposit"
    assert demo.post(path, amount="10000000000000.00").json()["balance"] == "10000000000000.00"
    assert pointers(demo.post(path, amount="10000000000000.01")) == ["/amount"]


def test_a_key_of_the_cash_machine_means_an_amount_and_not_its_digits(demo: "Bank") -> None:
    path = "/atm/accounts/1003/deposit"
    answers = [demo.post(path, key="k", amount=amount) for amount in ("1.5", "1.50")]
    assert [answer.json()["balance"] for answer in answers] == ["1.50", "1.50"]


@pytest.mark.parametrize(
    ("preload", "balances"),
    [
        (None, ATM_DEMO),
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
    for _ in range(3):
        # A restart never adds money, and never takes any.
        with opened(database, ledger.DIALECTS, preload_accounts=preload) as bank:
            assert bank.get("/atm/").json()["sample_accounts"] == balances
            assert bank.wrong() == []


def test_a_missing_account_is_made_and_an_old_one_kept(database: str) -> None:
    for preload, balances in (
        ('{"1": "5"}', {"1": "5.00"}),
        ('{"1": "7", "2": "3"}', {"1": "5.00", "2": "3.00"}),
        (None, {"1": "5.00", "2": "3.00"}),
    ):
        with opened(database, ledger.DIALECTS, preload_accounts=preload) as bank:
            assert bank.get("/atm/").json()["sample_accounts"] == balances


@at_the_edge
@pytest.mark.parametrize(
    "preload",
    ["x", "[]", "null", '{"1": 5}', '{"1": "-5"}', '{"1": "NaN"}', '{"1": "1e3"}', '{"": "1"}',
     '{"1": "1", "1": "2"}', '{"1": " 5"}', '{"1": ""}', '{"1": "' + "9" * 30 + '"}'],
)  # fmt: skip
def test_a_wrong_preload_stops_the_start(database: str, preload: str) -> None:
    with pytest.raises(ledger.StartupError, match="PRELOAD_ACCOUNTS must be JSON"):
        ledger.create_app(ledger.Settings(database, preload))


@on_sqlite
def test_a_wrong_preload_makes_no_ledger(new_database: "NewDatabase") -> None:
    with new_database(blank=True) as database:
        with pytest.raises(ledger.StartupError, match="PRELOAD_ACCOUNTS must be JSON"):
            ledger.create_app(ledger.Settings(database, "x"))
        assert not file_of(database).exists()


# ----- Dialect: /api/v1/wallets, application credits
# Decimals of four places, of assets that only these routes move.

USERS = "/api/v1/wallets/users"


def wallet(bank: "Bank", user: str, asset_type_id: int) -> str:
    """Return what a user has of an asset."""
    answer = bank.get(f"{USERS}/{user}/balance", asset_type_id=asset_type_id)
    return str(answer.json()["balance"])


def move_credits(bank: "Bank", user: str, operation: str, amount: Any, **body: Any) -> Any:
    """Top up, give a bonus or spend, of GOLD unless another asset is named."""
    return bank.post(
        f"{USERS}/{user}/{operation}", **{"amount": amount, "asset_type_id": 1, **body}
    )


def test_the_wallets_of_a_user_are_opened_empty_and_once(demo: "Bank") -> None:
    assert [wallet(demo, "user_alice", n) for n in (1, 2, 3)] == ["100.0000", "50.0000", "500.0000"]
    assert [wallet(demo, "user_bob", n) for n in (1, 2, 3)] == ["80.0000", "30.0000", "200.0000"]
    created = demo.post(USERS, external_user_id="carol")
    assert (created.status_code, created.json()) == (201, {"external_user_id": "carol"})
    assert [wallet(demo, "carol", n) for n in (1, 2, 3)] == ["0.0000"] * 3
    assert refusal(demo.post(USERS, external_user_id="carol")) == (409, "account_exists")
    # The event is recorded under the first account that it opens.
    event = "(SELECT account_id FROM event ORDER BY id DESC LIMIT 1)"
    assert demo.rows(f"SELECT asset FROM account WHERE id = {event}") == [("GOLD",)]


@pytest.mark.parametrize("operation", ["top-up", "bonus", "spend"])
def test_what_happened_to_credits_can_be_reversed(demo: "Bank", operation: str) -> None:
    move_credits(demo, "user_alice", operation, 5)
    [(moved,)] = demo.rows("SELECT max(id) FROM event WHERE kind < 'a'")
    assert demo.reverse(moved).status_code == 201
    assert wallet(demo, "user_alice", 1) == "100.0000"
    assert demo.wrong() == []


def test_credits_can_be_neither_held_nor_posted_freely(demo: "Bank") -> None:
    wallets = "SELECT id FROM account WHERE kind = 'CUSTOMER' AND asset = 'GOLD' LIMIT 2"
    demo.ids = {name: row[0] for name, row in zip("ab", demo.rows(wallets), strict=True)}
    for refused in (demo.hold("a", "b", 1), demo.journal({"a": -1, "b": 1})):
        assert refusal(refused) == (409, "asset_closed_loop")


def test_credits_are_bought_given_and_spent(demo: "Bank") -> None:
    demo.post(USERS, external_user_id="carol")
    moved = move_credits(demo, "carol", "top-up", "10.5").json()
    assert moved["new_balance"] == "10.5000"
    shown = demo.get(f"/transactions/{moved['transaction_id']}").json()
    assert (shown["kind"], [e["amount"] for e in shown["entries"]]) == ("TOP_UP", [105_000] * 2)
    assert move_credits(demo, "carol", "bonus", 1).json()["new_balance"] == "11.5000"
    assert move_credits(demo, "carol", "spend", 0.0001).json()["new_balance"] == "11.4999"
    refused = move_credits(demo, "carol", "spend", "20")
    assert refusal(refused) == (402, "insufficient_funds")
    assert refused.json()["detail"] == "Insufficient balance: have 11.4999, need 20.0000"
    assert demo.wrong() == []


@at_the_edge
def test_unknown_users_and_assets_are_not_found(untouched: "Bank") -> None:
    for operation in ("top-up", "bonus", "spend"):
        nobody = move_credits(untouched, "nobody", operation, 1)
        assert (refusal(nobody)[0], nobody.json()["detail"]) == (404, "User account not found")
        strange = move_credits(untouched, "user_bob", operation, 1, asset_type_id=9)
        assert refusal(strange) == (404, "asset_not_found")
    for user, asset, code in (("user_bob", 0, "asset_not_found"), ("x", 1, "account_not_found")):
        refused = untouched.get(f"{USERS}/{user}/balance", asset_type_id=asset)
        assert refusal(refused) == (404, code)


@pytest.mark.parametrize(
    ("number", "balance"),
    [("1", "1.0000"), ("1.5", "1.5000"), ('"0.0001"', "0.0001"), ("0.1", "0.1000"),
     ("1e2", "100.0000"), ("1.0000", "1.0000"), ("12345678901.2345", "12345678901.2345"),
     ("1E-4", "0.0001")],
)  # fmt: skip
def test_credits_are_exact(demo: "Bank", number: str, balance: str) -> None:
    demo.post(USERS, external_user_id="carol")
    body = f'{{"amount": {number}, "asset_type_id": 3}}'
    assert demo.send_raw(f"{USERS}/carol/top-up", body).json()["new_balance"] == balance


@at_the_edge
@pytest.mark.parametrize(
    "number",
    ["0", "-1", "0.00001", "1.00001", '"1e2"', '" 1"', '"NaN"', "true", "null", "[]", '"1.00000"',
     "1e400", "1e-400", "1e999999", '""', "100000000000.0001", "9" * 400],
    ids=short,
)  # fmt: skip
def test_inexact_credits_are_refused(untouched: "Bank", number: str) -> None:
    body = f'{{"amount": {number}, "asset_type_id": 3}}'
    refused = untouched.send_raw(f"{USERS}/user_bob/top-up", body)
    assert refusal(refused) == (422, "invalid_request")


def test_the_key_of_a_wallet_may_stand_in_the_body_or_in_the_header(demo: "Bank") -> None:
    top_up = partial(move_credits, demo, "user_bob", "top-up")
    first = top_up(1, idempotency_key="k")
    assert first.json()["new_balance"] == "81.0000"
    escaped = '{"amount": 1.0, "asset_type_id": 1, "idempotency_key": "\\u006b"}'
    for again in (
        top_up("1.0", key="k"),
        top_up(1, key="k", idempotency_key="k"),
        demo.send_raw(first.request.url.path, escaped, None),
    ):
        assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
    for refused in (top_up(1, key="k", idempotency_key="j"), top_up(1, idempotency_key="a b")):
        assert refusal(refused) == (400, "idempotency_key_invalid")
    for reused in (
        top_up(2, key="k"),
        top_up(1, key="k", asset_type_id=2),
        move_credits(demo, "user_alice", "top-up", 1, key="k"),
    ):
        assert refusal(reused) == (409, "idempotency_key_reused")


def test_60_parallel_spends_of_10_from_80_succeed_8_times(servers: "Bank") -> None:
    servers.post(USERS, external_user_id="hal")
    move_credits(servers, "hal", "top-up", 80)
    answers = at_once([partial(move_credits, servers, "hal", "spend", 10)] * 60)
    assert Counter(map(outcome, answers)) == {200: 8, "insufficient_funds": 52}
    assert wallet(servers, "hal", 1) == "0.0000"


def test_no_other_operation_moves_credits(demo: "Bank") -> None:
    for user in ("user_alice", "user_bob"):
        items = demo.get("/accounts", name=f"wallets:{user}").json()["items"]
        assert [item["asset"] for item in items] == ["GOLD", "DMND", "PTS"]
        demo.ids[user] = items[0]["id"]
    for answer in (
        demo.deposit("user_bob", 1),
        demo.withdraw("user_bob", 1),
        demo.pay("user_bob", 1),
        demo.transfer("user_bob", "user_alice", 1),
    ):
        assert refusal(answer) == (409, "asset_closed_loop")
    # The canonical routes that issue, give and spend are for these three, too.
    topped_up = demo.post(top_up_of(demo, "user_bob"), amount=5, key=new_key())
    assert topped_up.json()["balance"] == 80_0005


# ----- The dialects together
# Whoever moves money, in whatever terms, the books are the same.


def test_one_story_through_every_dialect_leaves_identical_books(demo: "Bank") -> None:
    demo.given(alice=0).deposit("alice", 1_050)
    kata_accounts(demo, "alice", balance=1_050)
    demo.post("/atm/accounts/1003/deposit", amount="10.50")
    for name in ("bank:alice", "atm:1003"):
        [account] = demo.get("/accounts", name=name).json()["items"]
        demo.ids[name] = account["id"]
    columns = ("kind", "type", "amount", "balance", "ref")
    for name in ("alice", "bank:alice", "atm:1003"):
        lines = [tuple(line[column] for column in columns) for line in demo.statement(name)]
        assert lines == [("DEPOSIT", "CREDIT", 1_050, 1_050, None)]
    # An account of one dialect can be spoken of in the canonical terms, and back.
    assert demo.transfer("bank:alice", "atm:1003", 50).status_code == 200
    assert demo.get("/atm/accounts/1003/balance").json()["balance"] == "11.00"
    history = kata_history(demo, "alice", 1)
    operations = [line["operation"] for line in history]
    assert operations == ["created", "deposited", "transferred out"]
    assert history[-1]["timestamp"] > 1_700_000_000_000
    assert demo.wrong() == []


def test_every_operation_of_every_dialect_is_a_balanced_transaction(demo: "BankInside") -> None:
    demo.given(alice=1_000, bob=0).withdraw("alice", 1)
    demo.transfer("alice", "bob", 1)
    demo.withdraw("bob", 1)
    demo.pay("alice", 100)
    demo.pass_time(DAY)
    kata_accounts(demo, "alice", balance=1_000)
    kata(demo, 1, "/payments", account_id="alice", amount=100)
    demo.post(USERS, external_user_id="carol")
    for operation in ("top-up", "bonus", "spend"):
        move_credits(demo, "carol", operation, 1)
    for step in ("freeze", "unfreeze", "close"):
        demo.step("bob", step)
    moving = {"DEPOSIT", "WITHDRAWAL", "TRANSFER", "PAYMENT", "CASHBACK"}
    moving |= {"TOP_UP", "BONUS", "SPEND"}
    others = {"open_account", "open_wallets", "freeze", "unfreeze", "close"}
    assert {kind for (kind,) in demo.rows("SELECT kind FROM event")} == moving | others
    sums = demo.rows(
        "SELECT SUM(CASE type WHEN 'CREDIT' THEN amount ELSE -amount END) FROM entry "
        "JOIN account ON account.id = account_id GROUP BY transaction_id, asset"
    )
    assert len(sums) > 12
    assert set(sums) == {(0,)}


def test_a_frozen_account_refuses_in_the_canonical_form_through_every_dialect(
    demo: "Bank",
) -> None:
    kata_accounts(demo, "alice", balance=5)
    demo.tamper("UPDATE account SET status = 'FROZEN' WHERE kind = 'CUSTOMER'")
    for answer in (
        demo.post("/bank/deposits", timestamp=1, account_id="alice", amount=1),
        demo.post("/bank/payments", timestamp=1, account_id="alice", amount=1),
        demo.post("/atm/accounts/1001/withdraw", amount="1"),
        move_credits(demo, "user_bob", "spend", 1),
    ):
        assert refusal(answer) == (409, "account_frozen")


@pytest.mark.parametrize("name", ["a/b", "/", "a|b", "bank:a", "%2F", "李", "x/balance", "a b"])
def test_any_name_can_be_read_again(demo: "Bank", name: str) -> None:
    kata_accounts(demo, name, balance=7)
    shown = demo.get(f"/bank/accounts/{quote(name, safe='')}/balance").json()
    assert shown == {"account_id": name, "balance": 7}
    demo.post(USERS, external_user_id=name)
    assert wallet(demo, quote(name, safe=""), 1) == "0.0000"


@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/bank/accounts/a%00b/balance", "account_not_found"),
        ("GET", "/bank/accounts/%00/transactions?timestamp=1", "account_not_found"),
        ("GET", "/atm/accounts/%00/balance", "account_not_found"),
        ("POST", "/atm/accounts/%00/deposit", "account_not_found"),
        ("GET", f"{USERS}/%00/balance?asset_type_id=1", "account_not_found"),
        ("GET", "/accounts?name=%00", "invalid_request"),
        ("GET", "/bank/accounts/%ff%ed%a0%80/balance", "account_not_found"),
    ],
)
def test_a_name_that_cannot_be_is_not_found(
    untouched: "Bank", method: str, path: str, code: str
) -> None:
    body = {"json": {"amount": "1"}} if method == "POST" else {}
    assert refusal(untouched.send(method, path, **body))[1] == code


@at_the_edge
@pytest.mark.parametrize(
    "text",
    ["\u200b", "\u00ad \u2060", "\u3164", "\u2800", "\ufe0f", "\ufeff", "\U000e0041", "\u00a0"],
    ids=ascii,
)  # fmt: skip
def test_text_of_which_nothing_can_be_seen_is_refused(untouched: "Bank", text: str) -> None:
    alice = untouched.ids["alice"]
    for answer in (
        untouched.post("/accounts", owner_name=text),
        untouched.post("/accounts", owner_name="a", external_id=text),
        change(untouched, "alice", owner_name=text),
        untouched.post("/assets", code="X", name=text, exponent=0),
        untouched.post(f"/accounts/{alice}/deposit", key=new_key(), amount=1, external_id=text),
        untouched.post("/bank/accounts", timestamp=1, account_id=text),
        untouched.post(USERS, external_user_id=text),
    ):
        assert refusal(answer) == (422, "invalid_request")


COMPOSED, DECOMPOSED = "Zo\u00eb", "Zoe\u0308"


def test_a_name_may_be_as_long_as_it_is_kept(demo: "Bank") -> None:
    # It has three characters as it is kept, for each that is sent.
    for count, status in ((67, 422), (66, 201)):
        name = "\U0001d160" * count
        opened = demo.post("/bank/accounts", timestamp=1, account_id=name)
        assert opened.status_code == status
    kept_as = opened.json()["account_id"]
    assert len(kept_as) == 198
    deposit = demo.post("/bank/deposits", timestamp=2, account_id=kept_as, amount=5)
    assert deposit.json() == {"balance": 5}
    assert len(demo.get("/accounts", owner_name=kept_as).json()["items"]) == 1


def test_names_that_look_alike_are_the_same(demo: "Bank") -> None:
    opened = demo.post("/accounts", owner_name=DECOMPOSED, external_id=DECOMPOSED).json()
    assert (opened["owner_name"], opened["external_id"]) == (COMPOSED, DECOMPOSED)
    for name in (COMPOSED, DECOMPOSED):
        assert demo.get("/accounts", owner_name=name).json()["items"] == [opened]
        assert opened in demo.get("/accounts", search=name).json()["items"]
    demo.ids["zoe"] = opened["id"]
    changed = change(demo, "zoe", owner_name=f"{DECOMPOSED} B.")
    assert changed.json()["owner_name"] == f"{COMPOSED} B."
    # The dialects know their accounts by names, which are unique.
    for name, status in ((DECOMPOSED, 201), (COMPOSED, 409)):
        opened = demo.post("/bank/accounts", timestamp=1, account_id=name)
        assert opened.status_code == status
    demo.post("/bank/deposits", timestamp=2, account_id=COMPOSED, amount=5)
    demo.post(USERS, external_user_id=DECOMPOSED)
    for name in (COMPOSED, DECOMPOSED):
        shown = demo.get(f"/bank/accounts/{quote(name)}/balance", timestamp=10)
        assert shown.json()["account_id"] == COMPOSED
        paid = demo.post("/bank/payments", timestamp=11, account_id=name, amount=1).json()
        stands = demo.get(f"/bank/payments/{paid['payment_id']}", account_id=name, timestamp=12)
        assert stands.json()["status"] == "IN_PROGRESS"
        demo.post(f"{USERS}/{quote(name)}/top-up", amount="1", asset_type_id=1)
    wallet = demo.get(f"{USERS}/{quote(DECOMPOSED)}/balance", asset_type_id=1)
    assert wallet.json()["balance"] == "2.0000"


@at_the_edge
@pytest.mark.parametrize("hidden", ["\u202e", "\u202a", "\u2066", "\u2069", "\u0085", "\x7f"])
def test_what_hides_or_turns_text_is_refused(untouched: "Bank", hidden: str) -> None:
    text = f"a{hidden}b"
    alice = untouched.ids["alice"]
    for answer in (
        untouched.post("/accounts", owner_name=text),
        untouched.post(f"/accounts/{alice}/deposit", key=new_key(), amount=1, memo=text),
        untouched.post("/bank/accounts", timestamp=1, account_id=text),
        untouched.post(USERS, external_user_id=text),
    ):
        assert refusal(answer) == (422, "invalid_request")


@at_the_edge
def test_amounts_of_the_kata_have_the_bound_of_all(untouched: "Bank") -> None:
    for path in ("/bank/deposits", "/bank/payments"):
        given: Any = {"timestamp": 1, "account_id": "alice", "amount": 10**15 + 1}
        assert refusal(untouched.post(path, **given)) == (422, "invalid_request")


def test_names_are_sorted_by_their_characters(demo: "Bank") -> None:
    kata_accounts(demo, "\u00c4hre", "alpha", "Zeta", "a-b", "ab")
    names = demo.get("/bank/accounts").json()["accounts"]
    assert names == ["Zeta", "a-b", "ab", "alpha", "\u00c4hre"]


@at_the_edge
@pytest.mark.parametrize("number", ["1.0", " 1", "1_0", "+1", "x", "", "1e1"])
def test_a_number_in_a_query_is_written_in_digits(untouched: "Bank", number: str) -> None:
    for path, parameters in (
        ("/bank/accounts/alice/balance", {"timestamp": number}),
        ("/bank/top-spenders", {"timestamp": 1, "n": number}),
        (f"{USERS}/user_bob/balance", {"asset_type_id": number}),
        ("/accounts", {"limit": number}),
    ):
        assert refusal(untouched.get(path, **parameters)) == (422, "invalid_request")


@pytest.mark.parametrize("missing", [dialect.prefix for dialect in ledger.DIALECTS])
def test_any_dialect_can_be_left_out(database: str, missing: str) -> None:
    dialects = [dialect for dialect in ledger.DIALECTS if dialect.prefix != missing]
    paths = {"": "/accounts", "/bank": "/bank/accounts", "/atm": "/atm/"}
    paths["/api/v1/wallets"] = f"{USERS}/user_bob/balance?asset_type_id=1"
    with opened(database, dialects) as bank:
        statuses = {name: bank.send("GET", path).status_code for name, path in paths.items()}
    assert statuses == dict.fromkeys(paths, 200) | {missing: 404}


# ===== Part three: storage


# ----- Database
# What a read and a write need of an engine, and what callers see when the engine is busy, full,
# gone or not what it should be.


@pytest.mark.parametrize(
    "url",
    ["", "ledger.db", "mysql://x/y", "sqlite://", "sqlite:///:memory:", "sqlite:///file:x?uri=1",
     "sqlite://host/x.db", "sqlite://u:p@/x.db", "sqlite+aiosqlite:///x.db", "sqlite+nope:///x.db",
     "postgresql://h/db?nope=1", "oracle://[::1", "sqlite:///\0.db"],
)  # fmt: skip
def test_a_url_that_names_no_database_stops_the_start(url: str) -> None:
    with pytest.raises(ledger.StartupError, match="the database"):
        ledger.database_at(url)


@pytest.mark.parametrize("mark", ["@", "/", "@@", ":@", "?@", "%"])
def test_a_password_that_is_not_escaped_is_not_printed(mark: str) -> None:
    with pytest.raises(ledger.StartupError, match="must be") as refused:
        ledger.database_at(f"postgresql://user:open{mark}sesame@127.0.0.1/x")
    for part in ("open", "sesame", "127.0.0.1"):
        assert part not in str(refused.value)


def refused_start(database: str) -> str:
    """Return why a ledger cannot be opened."""
    with pytest.raises(ledger.StartupError) as refused:
        ledger.create_app(ledger.Settings(database))
    return str(refused.value)


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    letter = tmp_path / "letter.db"
    letter.write_text("Dear Alice, " * 100)
    assert "file is not a database" in refused_start(f"sqlite:///{letter}")
    assert letter.read_text() == "Dear Alice, " * 100


def test_a_place_where_no_file_can_be_is_refused(tmp_path: Path) -> None:
    assert refused_start(f"sqlite:///{tmp_path}") == f"cannot open {tmp_path}: Is a directory"
    assert "No such file" in refused_start(f"sqlite:///{tmp_path}/nowhere/ledger.db")


def test_a_file_that_was_a_ledger_never_becomes_a_new_one(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert "has no tables: restore it" in refused_start(f"sqlite:///{file}")
    for rest, name in itertools.product((b"", None), ("ledger.db-wal", "ledger.db-journal")):
        log = tmp_path / name
        file.unlink(missing_ok=True) if rest is None else file.write_bytes(rest)
        log.write_bytes(b"what was committed last")
        assert f"{log} is there without its ledger" in refused_start(f"sqlite:///{file}")
        # Nor do commands destroy it that only read.
        assert ledger.main(["check", "--database-url", f"sqlite:///{file}"]) == 1
        assert log.read_bytes() == b"what was committed last"
        log.unlink()


def test_an_empty_file_is_no_invitation_to_begin_a_ledger(tmp_path: Path) -> None:
    file, other = tmp_path / "ledger.db", tmp_path / "other.db"
    file.touch()
    url = f"sqlite:///{file}"
    assert refused_start(url).startswith(f"{file} is there without its ledger")
    make_ledger(f"sqlite:///{other}")
    for command in (
        ["check", "--database-url", url],
        ["key", "add", "--name", "x", "--role", "admin", "--database-url", url],
        ["copy", "--from", f"sqlite:///{other}", "--to", url],
    ):
        assert ledger.main(command) == 1
    assert sorted(tmp_path.iterdir()) == [file, other]
    assert file.read_bytes() == b""


@pytest.fixture
def restored(tmp_path: Path) -> Path:
    """A backup in the place of a ledger, whose log is still there."""
    file, backup = tmp_path / "ledger.db", tmp_path / "backup.db"
    with opened(f"sqlite:///{file}") as bank:
        bank.given(alice=100)
        assert ledger.main(["backup", str(backup), "--database-url", bank.database]) == 0
        bank.deposit("alice", 1)
        log = Path(f"{file}-wal").read_bytes()
    backup.replace(file)
    Path(f"{file}-wal").write_bytes(log)
    return file


@pytest.mark.parametrize(
    "command", ["check", "backup copy.db", "export --format csv", "seed", "key list"]
)
def test_a_backup_beside_the_log_of_another_ledger_is_left_alone(
    restored: Path,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(restored.parent)
    log = Path(f"{restored}-wal")
    before = restored.read_bytes(), log.read_bytes()
    why = f"{log} is not of this ledger, which has no log: remove it"
    assert refused_start(f"sqlite:///{restored}") == why
    assert ledger.main(command.split()) == 1
    assert why in capsys.readouterr().err
    assert (restored.read_bytes(), log.read_bytes()) == before
    log.unlink()
    with opened(f"sqlite:///{restored}") as bank:
        assert (bank.balances(), bank.wrong()) == ({"alice": 100}, [])


@pytest.fixture(params=["file", "folder"])
def linked(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """A name of a ledger that leads to another one by a link, and that other one."""
    real, link = tmp_path / "data" / "real.db", tmp_path / "ledger.db"
    real.parent.mkdir()
    if request.param == "folder":
        (tmp_path / "here").symlink_to(real.parent)
        return tmp_path / "here" / "real.db", real
    link.symlink_to(real)
    return link, real


@pytest.mark.parametrize("fate", ["replaced", "deleted with its log", "linked anew"])
def test_a_ledger_behind_a_link_is_watched_where_it_is(
    linked: tuple[Path, Path], fate: str
) -> None:
    link, real = linked
    with opened(f"sqlite:///{link}") as bank:
        bank.given(alice=100)
        if fate == "replaced":
            real.with_name("copy.db").write_bytes(new_ledger())
            real.with_name("copy.db").replace(real)
        elif fate == "deleted with its log":
            for file in real.parent.glob("real.db*"):
                file.unlink()
        else:
            moved = link if link.is_symlink() else link.parent
            moved.unlink()
            moved.symlink_to(link.parent.parent)
        for answer in (bank.deposit("alice", 1), bank.get("/health")):
            assert refusal(answer) == (503, "database_unavailable")


def test_no_new_ledger_is_begun_over_a_log_behind_a_link(linked: tuple[Path, Path]) -> None:
    link, real = linked
    real.with_name("real.db-wal").write_bytes(b"what was committed last")
    assert "real.db-wal is there without its ledger" in refused_start(f"sqlite:///{link}")
    assert not real.exists()


def test_a_ledger_has_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, link = tmp_path / "ledger.db", tmp_path / "link.db"
    with opened(f"sqlite:///{file}") as bank:
        link.hardlink_to(file)
        # Each name would have a log of its own, of which the others know nothing.
        assert "link.db is one of 2 links to a file" in refused_start(f"sqlite:///{link}")
        for name in (file, link):
            assert ledger.main(["check", "--database-url", f"sqlite:///{name}"]) == 1
            assert "is one of 2 links to a file" in capsys.readouterr().err
        assert sorted(tmp_path.glob("link.db*")) == [link]
        # Who was there first goes on.
        assert bank.given(alice=100).balances() == {"alice": 100}
    link.unlink()
    assert ledger.main(["check", "--database-url", f"sqlite:///{file}"]) == 0


def test_a_start_that_dies_leaves_no_half_of_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = f"sqlite:///{tmp_path}/ledger.db"
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "create_triggers", die)
        with pytest.raises(RuntimeError):
            ledger.create_app(ledger.Settings(database))
    assert list(tmp_path.iterdir()) == []
    with opened(database) as bank:
        assert bank.wrong() == []


def die(*_: Any) -> None:
    """End a start in its middle."""
    raise RuntimeError


def make_for_ever(file: Path) -> None:
    """Begin to make a file, and come to no end."""
    with ledger.new_file(file) as place:
        place.write_text("half of it")
        time.sleep(600)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
def test_a_start_waits_for_another_one_and_goes_on_if_that_dies(tmp_path: Path) -> None:
    file = tmp_path / "ledger.db"
    other = forks().Process(target=make_for_ever, args=(file,))
    other.start()
    wait_until(lambda: [path.name for path in tmp_path.glob("*/*.db")] == ["ledger.db"])
    with ThreadPoolExecutor() as threads:
        starts = [threads.submit(make_ledger, f"sqlite:///{file}") for _ in range(3)]
        time.sleep(0.1)
        assert not any(start.done() for start in starts)
        other.kill()
        for start in starts:
            start.result(60)
    other.join()
    other.close()
    assert list(tmp_path.iterdir()) == [file]
    with opened(f"sqlite:///{file}") as bank:
        assert bank.wrong() == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_ledger_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    copy, other = tmp_path / "copy.db", f"sqlite:///{tmp_path}/other.db"
    with new_file(blank=True) as database, opened(database):
        assert ledger.main(["backup", str(copy), "--database-url", database]) == 0
        assert ledger.main(["copy", "--from", database, "--to", other]) == 0
        export = ["export", "--format", "csv", str(tmp_path / "books.csv")]
        assert ledger.main([*export, "--database-url", database]) == 0
        files = [*tmp_path.iterdir(), *file_of(database).parent.glob("ledger.db*")]
        assert len(files) == 6
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


@on_sqlite
@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_a_file_that_is_deleted_under_a_server_is_noticed(bank: "BankInside", suffix: str) -> None:
    bank.given(alice=100)
    Path(f"{file_of(bank.database)}{suffix}").unlink()
    assert refusal(bank.deposit("alice", 1)) == (503, "database_unavailable")


@on_sqlite
def test_a_key_is_in_the_ledgers_own_file_at_once(bank: "BankInside", tmp_path: Path) -> None:
    # The server keeps its log open; whoever loses that must not find the ledger in open mode.
    new_api_key(bank.database, "a", "auditor")
    shutil.copy(file_of(bank.database), tmp_path / "alone.db")
    app = ledger.create_app(ledger.Settings(f"sqlite:///{tmp_path}/alone.db"))
    with closing(app.state.ledger.database):
        assert not app.state.callers.open_mode


@on_postgresql
def test_a_search_path_may_begin_with_the_catalog(database: str) -> None:
    with opened(f"{database}&options=-csearch_path%3Dpg_catalog,public") as bank:
        bank.given(alice=1)
        assert bank.wrong() == []


def test_a_database_of_another_encoding_is_refused(postgresql: str) -> None:
    with new_postgresql(postgresql, "ENCODING 'SQL_ASCII' LOCALE 'C'") as other:
        assert "must be made with the encoding UTF8" in refused_start(other)


@on_sqlite
def test_a_commit_stands_whatever_fails_after_it(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise sqlite3.OperationalError("disk I/O error")

    bank.given(alice=100, bob=100)
    monkeypatch.setattr(bank.ledger.database, "after_commit", fail)
    answers = bank.together(*[("/accounts", {"owner_name": n}, None) for n in ("carol", "dan")])
    assert [answer.status_code for answer in answers] == [201, 201]
    assert bank.balances() == {"alice": 100, "bob": 100, "carol": 0, "dan": 0}
    assert "committed, but what follows failed: disk I/O error" in caplog.text


@on_sqlite
def test_a_write_is_synced_to_disk_and_takes_the_lock_at_its_start(bank: "BankInside") -> None:
    with bank.ledger.database.write() as connection:
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers")
        found = [connection.driver.execute(f"PRAGMA {name}").fetchone()[0] for name in pragmas]
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            bank.tamper("PRAGMA busy_timeout = 0", "BEGIN IMMEDIATE")
    full = 2
    assert found == ["wal", full, 1, 1]


@on_sqlite
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="only Linux tells the open files")
def test_a_write_needs_no_temporary_files(bank: "BankInside") -> None:
    def fill(book: ledger.Book) -> None:
        for number in range(200):
            ledger.open_account(book, owner_name=f"{number}", asset="USD", notes='{"a": "b"}')
        book.write()
        # SQLite keeps what undoes a statement, until the commit.
        book.connection.execute("UPDATE account SET owner_name = owner_name || 'x'")
        files.extend(map(os.path.realpath, Path("/proc/self/fd").iterdir()))

    files: list[str] = []
    bank.execute(fill)
    folder = file_of(bank.database).parent
    assert {f"{folder}/ledger.db", f"{folder}/ledger.db-wal"} <= set(files)
    assert [file for file in files if "etilqs" in file] == []


@on_sqlite
def test_a_log_that_a_long_reader_has_let_grow_is_cut(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    log = Path(f"{file_of(bank.database)}-wal")
    database = bank.ledger.database

    def is_cut() -> bool:
        database.after_commit(-1)
        return log.stat().st_size == 0

    bank.given(alice=100)
    monkeypatch.setattr(ledger, "LOG_BYTES_MAX", log.stat().st_size // 2)
    with database.read() as reader:
        before = reader.rows("SELECT balance FROM account WHERE owner_name = 'alice'")
        for _ in range(20):
            bank.deposit("alice", 1)
        for _ in range(10):
            assert not is_cut()
            time.sleep(0.02)
        assert reader.rows("SELECT balance FROM account WHERE owner_name = 'alice'") == before
    # Nobody writes any more, and nobody reads.
    wait_until(is_cut)
    assert bank.deposit("alice", 1).json()["balance"] == 121
    assert bank.wrong() == []


@on_sqlite
def test_all_pages_are_moved_unless_somebody_reads(bank: "BankInside") -> None:
    database: Any = bank.given(alice=1).ledger.database
    database.move_pages("FULL")
    with closing(connect(bank.database)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM account").fetchone()
        bank.deposit("alice", 1)
        with pytest.raises(ledger.DatabaseBusy):
            database.move_pages("FULL")


def work_until_two_are_told(bank: "BankInside", caplog: pytest.LogCaptureFixture) -> None:
    """Do what a server does by itself, until the log has two messages."""

    async def work() -> None:
        working = asyncio.create_task(ledger.work_for_ever(bank.ledger))
        while len(caplog.messages) < 2:
            await asyncio.sleep(0.01)
        working.cancel()

    bank.runner.run(asyncio.wait_for(work(), 60))


@on_sqlite
def test_a_server_looks_after_its_log_while_nothing_comes(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = Path(f"{file_of(bank.database)}-wal")
    bank.given(alice=100)
    monkeypatch.setattr(ledger, "LOG_BYTES_MAX", log.stat().st_size // 3)
    monkeypatch.setattr(ledger, "POLL_SECONDS", 0.01)
    work_until_two_are_told(bank, caplog)
    assert log.stat().st_size == 0
    grown, small = caplog.messages
    assert f"{log} has more than 0 MB: a program reads the ledger for long" in grown
    assert small == "the log beside the ledger is small again"


def is_synced(bank: "BankInside") -> str:
    """Return how a session of the ledger that writes waits for the disk."""
    with bank.ledger.database.write() as connection:
        return str(connection.rows("SELECT current_setting('synchronous_commit') AS it")[0]["it"])


@on_postgresql
@pytest.mark.parametrize("default", ["off", "local", "remote_write", "on", "remote_apply"])
def test_a_write_is_synced_to_disk_whatever_the_servers_default_is(
    database: str, default: str
) -> None:
    given = with_parameters(database, options=f"-c synchronous_commit={default}")
    with opened(given) as bank:
        assert is_synced(bank) == ("remote_apply" if default == "remote_apply" else "on")


def test_a_write_is_synced_to_disk_when_the_servers_default_changes_under_it(
    stoppable: tuple[str, Callable[[str], None]],
) -> None:
    url, _ = stoppable
    with new_postgresql(url) as database, opened(database) as bank:
        before = is_synced(bank)
        with closing(psycopg.connect(url, autocommit=True)) as admin:
            shown = "SELECT setting FROM pg_settings WHERE name = 'synchronous_commit'"
            admin.execute("ALTER SYSTEM SET synchronous_commit = off")
            admin.execute("SELECT pg_reload_conf()")
            wait_until(lambda: admin.execute(shown).fetchone() == ("off",))
            after = is_synced(bank)
            admin.execute("ALTER SYSTEM RESET synchronous_commit")
            admin.execute("SELECT pg_reload_conf()")
        assert (before, after) == ("on", "on")


@pytest.mark.parametrize(
    "scheme",
    ["postgres", "postgresql", "POSTGRESQL", "postgresql+psycopg", "postgresql+psycopg2",
     "postgresql+asyncpg"],
)  # fmt: skip
def test_every_name_of_postgresql_means_it(scheme: str) -> None:
    with closing(ledger.database_at(f"{scheme}://me@localhost/books")) as database:
        assert database.name == "books at localhost"


def test_a_parameter_that_is_unknown_is_named_and_what_stands_for_it() -> None:
    with pytest.raises(ledger.StartupError, match=r'"schema" is unknown.*search_path'):
        ledger.database_at("postgresql://me@localhost/books?schema=mine")


def test_a_read_cannot_write(bank: "BankInside") -> None:
    with pytest.raises(ledger.DatabaseUnavailable), bank.ledger.database.read() as connection:
        connection.execute("INSERT INTO asset VALUES ('X', 'X', 0, 0)")


@on_sqlite
def test_all_page_caches_together_stay_under_16_megabytes(bank: "BankInside") -> None:
    readers, kibibytes = ledger.LONG_READERS_MAX + 1, {}
    for write in (True, False):
        with closing(bank.ledger.database.connect(write=write).driver) as driver:
            [kibibytes[write]] = driver.execute("PRAGMA cache_size").fetchone()
    assert 0 < -1024 * (kibibytes[True] + readers * kibibytes[False]) <= 16 * 2**20


def test_what_was_written_is_there_after_a_restart(database: str) -> None:
    with opened(database) as bank:
        first = bank.given(alice=100).deposit("alice", 5, key="k")
        before = bank.contents()
    with opened(database) as bank:
        again = bank.post(first.request.url.path, key="k", amount=5)
        assert (again.content, again.headers["Idempotent-Replayed"]) == (first.content, "true")
        assert bank.contents() == before


@on_sqlite
def test_a_replaced_file_is_noticed_before_anything_is_lost(bank: "Bank") -> None:
    file = file_of(bank.given(alice=100).database)
    file.rename(file.with_suffix(".gone"))
    sqlite3.connect(file).close()
    for answer in (bank.deposit("alice", 1), bank.get("/accounts"), bank.get("/health")):
        assert refusal(answer) == (503, "database_unavailable")


@contextmanager
def held(database: str) -> Iterator[sqlite3.Connection]:
    """Hold the write lock of a file, as another process would."""
    with closing(sqlite3.connect(file_of(database), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield other


@on_sqlite
def test_a_write_waits_for_another_process_while_reads_go_on(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BUSY_SECONDS_MAX", 60)
    path = f"/accounts/{bank.given(alice=100).ids['alice']}"

    async def scene(other: sqlite3.Connection) -> tuple[httpx.Response, httpx.Response]:
        headers = {"Idempotency-Key": "k"}
        sent = bank.ask("POST", f"{path}/deposit", json={"amount": 1}, headers=headers)
        waiting = asyncio.ensure_future(sent)
        await asyncio.sleep(0.05)
        read = await bank.ask("GET", path)
        assert not waiting.done()
        other.execute("COMMIT")
        return read, await waiting

    with held(bank.database) as other:
        read, written = bank.runner.run(scene(other))
    assert (read.json()["balance"], written.json()["balance"]) == (100, 101)


@on_sqlite
def test_a_write_that_waits_too_long_is_refused_and_not_done(
    bank: "Bank", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BUSY_SECONDS_MAX", 0.05)
    bank.given(alice=100)
    with held(bank.database):
        refused = bank.deposit("alice", 1, key="k")
    assert refusal(refused) == (503, "database_busy")
    assert refused.headers["Retry-After"] == "1"
    assert bank.deposit("alice", 1, key="k").json()["balance"] == 101


@on_sqlite
def test_a_program_that_waits_too_long_for_another_is_refused_as_well(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "BUSY_SECONDS_MAX", 0.05)
    with ledger.open_ledger(database) as books:
        with held(database), pytest.raises(ledger.DatabaseBusy):
            books.open_account(owner_name="Alice")
        assert books.open_account(owner_name="Alice").owner_name == "Alice"


def test_a_database_that_says_nothing_for_too_long_is_lost() -> None:
    async def wait() -> None:
        await ledger.in_time(asyncio.get_running_loop().create_future(), 0.01)

    with pytest.raises(ledger.DatabaseLost):
        asyncio.run(wait())


def test_a_short_read_waits_for_no_long_one(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "REQUEST_SECONDS_MAX", 1)
    alice, ended = bank.given(alice=1).ids["alice"], threading.Event()
    for _ in range(ledger.LONG_READERS_MAX):
        bank.ledger.database._long_readers.submit(ended.wait)
    found = bank.get(f"/accounts/{alice}")
    ended.set()
    assert found.json()["balance"] == 1


def test_what_still_reads_is_ended_when_its_database_is_closed(
    database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "CLOSING_SECONDS_MAX", 0.05)
    monkeypatch.setitem(ledger.READ_SECONDS_MAX, "long", 60.0)
    endless = """WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers)
        SELECT COUNT(*) FROM numbers"""
    with closing(ledger.database_at(database)) as opened:

        def read() -> None:
            with opened.read("long") as connection:
                connection.rows(endless)

        reading = opened._long_readers.submit(read)
        wait_until(lambda: bool(opened._busy))
        began = time.monotonic()
        opened.close()
        assert isinstance(reading.exception(), ledger.LedgerError)
        assert time.monotonic() - began < 30
    # What has ended it is no more.
    wait_until(lambda: not any("_hang_up" in each.name for each in threading.enumerate()))


@on_sqlite
def test_a_full_disk_refuses_and_loses_nothing(bank: "BankInside") -> None:
    bank.given(alice=100)
    with bank.ledger.database.write() as writer:
        [pages] = writer.driver.execute("PRAGMA page_count").fetchone()
        writer.driver.execute(f"PRAGMA max_page_count = {pages}")
    answers = [bank.deposit("alice", 1, key=f"k{n}") for n in range(60)]
    assert refusal(answers[-1]) == (507, "storage_full")
    assert refusal(bank.get("/health")) == (503, "database_unavailable")
    writer.driver.execute("PRAGMA max_page_count = 1000000")
    for number, answer in enumerate(answers):
        again = bank.deposit("alice", 1, key=f"k{number}")
        assert again.status_code == 200
        assert answer.status_code == 507 or again.content == answer.content
    assert bank.balances() == {"alice": 160}


def test_serving_resumes_by_itself_when_the_database_is_back(
    stoppable: tuple[str, Callable[[str], None]],
) -> None:
    url, control = stoppable
    with serving(url) as server:
        bank = server.bank.given(alice=100)
        control("stop")
        for answer in (bank.deposit("alice", 1, key="k"), bank.get("/accounts")):
            assert refusal(answer) == (503, "database_unavailable")
            assert answer.headers["Retry-After"] == "1"
        assert refusal(bank.get("/health")) == (503, "database_unavailable")
        control("start")
        wait_until(lambda: bank.get("/health").status_code == 200)
        assert bank.deposit("alice", 1, key="k").json()["balance"] == 101


def run_hastily(*given: Any) -> None:
    """Serve, and at the end give a second, instead of 8, to what is under way."""
    configure = uvicorn.Config

    def configure_hastily(app: Any, *, timeout_graceful_shutdown: int, **options: Any) -> Any:
        assert timeout_graceful_shutdown == 8
        return configure(app, timeout_graceful_shutdown=1, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Config", configure_hastily)
        run_main(*given)


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot stop a process")
def test_a_database_that_hangs_does_not_keep_the_server_from_ending(
    stoppable: tuple[str, Callable[[str], None]],
) -> None:
    url, _ = stoppable
    with serving(url, start=partial(as_fork, target=run_hastily)) as server:
        server.bank.given(alice=100)

        def deposit() -> None:
            with suppress(httpx.TransportError):
                server.bank.deposit("alice", 1)

        ours = "SELECT pid FROM pg_stat_activity WHERE application_name = 'ledger.py'"
        found = server.bank.rows(ours)
        try:
            for (pid,) in found:
                os.kill(pid, signal.SIGSTOP)
            with meanwhile(deposit):
                server.process.terminate()
                server.process.join(60)
                assert server.process.exitcode is not None
        finally:
            for (pid,) in found:
                os.kill(pid, signal.SIGCONT)


def test_killed_back_ends_are_a_line_each_in_the_log(postgresql: str) -> None:
    with new_postgresql(postgresql) as url, serving(url) as server:
        server.bank.given(alice=0)
        for _ in range(3):
            server.bank.rows(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND datname = current_database()"
            )
            wait_until(lambda: server.bank.deposit("alice", 1, key="k").status_code == 200)
        assert server.bank.balances() == {"alice": 1}
        lines = server.log.read_text().splitlines()
        assert max(map(len, lines)) < 500


@on_postgresql
@pytest.mark.parametrize("lost", [psycopg.OperationalError, psycopg.errors.AdminShutdown])
def test_nothing_is_done_again_after_a_connection_was_lost_in_commit(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, lost: type[psycopg.Error]
) -> None:
    bank.given(carol=0)
    with bank.ledger.database.write() as writer:
        pass  # The next write takes the same connection.

    @contextmanager
    def commit_and_lose() -> Iterator[None]:
        with writer.driver.pipeline():
            yield
        raise lost("the server closed the connection")

    with monkeypatch.context() as patched:
        patched.setattr(writer, "pipeline", commit_and_lose)
        alice, bob = {"owner_name": "alice"}, {"owner_name": "bob"}
        answers = bank.together(("/accounts", alice, "k"), ("/accounts", bob, None))
    assert [refusal(answer) for answer in answers] == [(503, "database_unavailable")] * 2
    # Both had been done: the key tells, and what has none was not tried a second time.
    again = bank.post("/accounts", key="k", **alice)
    assert (again.status_code, again.headers["Idempotent-Replayed"]) == (201, "true")
    assert bank.rows("SELECT COUNT(*) FROM account WHERE kind = 'CUSTOMER'") == [(3,)]
    assert bank.balances() == {"alice": 0, "bob": 0, "carol": 0}


def test_the_server_that_can_be_written_to_is_found_among_several(postgresql: str) -> None:
    read_only = "SET default_transaction_read_only = on"
    with new_postgresql(postgresql) as url, closing(psycopg.connect(url, autocommit=True)) as admin:
        name, host = admin.info.dbname, f"/nowhere,{admin.info.host}"
        several = with_parameters(url, host=host, target_session_attrs="read-write")
        with opened(several) as bank, opened(url) as anywhere:
            bank.given(alice=5)
            # The primary becomes a standby: what is connected can only read, and nobody else can
            # connect to write.
            admin.execute(f"ALTER DATABASE {name} {read_only}")
            for begin in (bank.ledger.database.read, bank.ledger.database.write):
                with begin() as connection:
                    connection.execute(read_only)
            anywhere.ledger.database.disconnect()
            for each in (bank, anywhere):
                assert refusal(each.get("/health")) == (503, "database_unavailable")
            for _ in range(2):
                refused = bank.deposit("alice", 1, key="k")
                assert refusal(refused) == (503, "database_unavailable")
            admin.execute("SET default_transaction_read_only = off")
            admin.execute(f"ALTER DATABASE {name} RESET default_transaction_read_only")
            assert bank.deposit("alice", 1, key="k").json()["balance"] == 6


# ----- Schema
# Triggers keep stored rows as they were written, and the check finds what got past them.


def test_a_strangers_file_is_refused_and_left_alone(tmp_path: Path) -> None:
    stranger = tmp_path / "stranger.db"
    with closing(sqlite3.connect(stranger)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = stranger.read_bytes()
    why = "the database holds something other than a ledger"
    assert refused_start(f"sqlite:///{stranger}") == why
    assert stranger.read_bytes() == before


@pytest.mark.parametrize(
    ("statement", "version"),
    [
        ("UPDATE schema_version SET version = 99", "version 99"),
        ("DELETE FROM schema_version", "restore it from a backup"),
    ],
)
def test_an_unknown_schema_version_is_refused(bank: "Bank", statement: str, version: str) -> None:
    bank.tamper_freely(statement)
    assert version in refused_start(bank.database)


def test_servers_may_make_one_new_ledger_at_one_moment(new_database: "NewDatabase") -> None:
    with new_database(blank=True) as database:
        for app in at_once([partial(ledger.create_app, ledger.Settings(database))] * 4):
            app.state.ledger.database.close()
        with opened(database) as bank:
            accounts = bank.rows("SELECT COUNT(*) FROM account WHERE kind = 'SYSTEM'")
            assert accounts == [(len(ledger.SYSTEM_ACCOUNTS),)]
            assert bank.wrong() == []


def test_what_a_later_version_adds_comes_after_the_newest_event(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.pass_time(2 * HOUR)
    bank.given(alice=5)
    bank.pass_time(-2 * HOUR)
    later = ledger.AssetPublic(code="NEW", name="New", exponent=2, closed_loop=0)
    monkeypatch.setitem(ledger.ASSETS, "NEW", later)
    monkeypatch.setattr(ledger, "SYSTEM_ACCOUNTS", ledger.SYSTEM_ACCOUNTS | {("cash", "NEW")})
    make_ledger(bank.database)
    RENEWALS.pop(bank.database, None)
    [[added]] = bank.rows("SELECT id FROM account WHERE asset = 'NEW'")
    assert added > max(event for (event,) in bank.rows("SELECT id FROM event"))


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE entry SET amount = 1", "for ever"),
        ("DELETE FROM entry", "for ever"),
        ("UPDATE event SET memo = NULL", "for ever"),
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
        (entries_like(seq="seq + 2"), "must follow"),
        (entries_like(seq="seq + 1"), "must follow"),
        (new_account("CUSTOMER", balance="5"), "opens empty"),
        ("UPDATE scheduled_cashback SET amount = 99", "for ever"),
        ("UPDATE scheduled_cashback SET due_at = 0, status = 'CREDITED'", "for ever"),
        ("DELETE FROM scheduled_cashback", "for ever"),
    ],
)
def test_the_database_itself_refuses(eventful: "Bank", statement: str, message: str) -> None:
    with pytest.raises(REFUSED, match=f"(?i){message}"):
        eventful.tamper(statement)
    assert eventful.wrong() == []


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE webhook SET url = 'http://b'", "for ever"),
        ("UPDATE webhook SET due_at = 0 WHERE url = 'http://a'", "ends once"),
        ("UPDATE webhook SET position = 'x' WHERE due_at >= 0", "FOREIGN KEY"),
        ("DELETE FROM webhook", "for ever"),
    ],
)
def test_the_database_keeps_receivers(bank: "Bank", statement: str, message: str) -> None:
    for name in ("a", "b"):
        subscribe(bank, f"http://{name}")
    printed(bank.database, "webhook", "remove", "http://a")
    with pytest.raises(REFUSED, match=f"(?i){message}"):
        bank.tamper(*["PRAGMA foreign_keys = ON"] * ("sqlite" in bank.database), statement)
    assert bank.wrong() == []


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE hold SET amount = 1", "for ever"),
        ("UPDATE hold SET expires_at = expires_at + 1", "for ever"),
        ("DELETE FROM hold", "for ever"),
        ("UPDATE hold SET status = 'VOIDED', transaction_id = NULL, captured_amount = 0 "
         "WHERE status = 'CAPTURED'", "ends once"),
        ("UPDATE hold SET status = 'PENDING' WHERE status = 'VOIDED'", "ends once"),
        ("UPDATE hold SET captured_amount = 1 WHERE status = 'CAPTURED'", "ends once"),
        ("UPDATE hold SET status = 'CAPTURED' WHERE status = 'PENDING'", "CHECK"),
        ("UPDATE hold SET captured_amount = 11 WHERE status = 'PENDING'", "CHECK"),
        ("UPDATE account SET held = -1 WHERE owner_name = 'alice'", "CHECK"),
        ("UPDATE account SET held = balance + 1 WHERE owner_name = 'alice'", "CHECK"),
        ("INSERT INTO event (id, kind, ts, caller, arguments, reverses) "
         "SELECT 'x', kind, ts, caller, arguments, reverses FROM event WHERE kind = 'REVERSAL'",
         "UNIQUE"),
        ("INSERT INTO event (id, kind, ts, caller, arguments) "
         "SELECT 'x', kind, ts, caller, arguments FROM event WHERE kind = 'REVERSAL'", "CHECK"),
        ("UPDATE event SET reverses = NULL", "for ever"),
    ],
)  # fmt: skip
def test_the_database_keeps_holds_and_reversals(
    eventful: "Bank", statement: str, message: str
) -> None:
    with pytest.raises(REFUSED, match=f"(?i){message}"):
        eventful.tamper(statement)
    assert eventful.wrong() == []


def new_promise(payment: str, *, amount: str = "1", clock: str = "SERVER") -> str:
    """Return the statement that promises a cashback past the code."""
    columns = "payment_id, account_id, due_at, status, amount, clock, number"
    values = f"id, account_id, 0, 'SCHEDULED', {amount}, '{clock}', 1"
    return f"INSERT INTO scheduled_cashback ({columns}) SELECT {values} FROM event WHERE {payment}"


CAPTURED = """UPDATE hold SET status = 'CAPTURED', captured_amount = {},
    transaction_id = {} WHERE status = 'PENDING'"""
NEW_HOLDS = "id, status, account_id, dest_account_id, asset, amount, captured_amount, created_at"
NEW_HOLDS = f"INSERT INTO hold ({NEW_HOLDS}, expires_at, external_id) SELECT "


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        (new_account("PARTNER", balance="0"), "CHECK"),
        ("UPDATE scheduled_cashback SET status = 'LOST'", "CHECK"),
        (new_promise("kind = 'DEPOSIT'", amount="-1"), "CHECK"),
        (new_promise("kind = 'DEPOSIT'", clock="MOON"), "CHECK"),
        (new_promise("kind IN ('DEPOSIT', 'CAPTURE')"), "UNIQUE"),
        ("UPDATE hold SET status = 'LOST' WHERE status = 'PENDING'", "CHECK"),
        (CAPTURED.format("11", "(SELECT min(id) FROM event)"), "CHECK"),
        (CAPTURED.format("0", "(SELECT min(id) FROM event)"), "CHECK"),
        (CAPTURED.format("1", "NULL"), "CHECK"),
        (NEW_HOLDS + "'x', 'PENDING', account_id, account_id, 'USD', 0, 0, 0, 0, NULL FROM hold "
         "WHERE status = 'PENDING'", "CHECK"),
        (NEW_HOLDS + "'x' || id, 'PENDING', account_id, account_id, 'USD', 1, 0, 0, 0, 'x' "
         "FROM hold", "UNIQUE"),
        ("INSERT INTO account (id, name, owner_name, asset, status, balance, held, credit_limit, "
         "created_at, kind, last_seq) SELECT 'x' || id, name, '', asset, status, 0, 0, 0, 0, kind, "
         "0 FROM account WHERE name = 'cash'", "UNIQUE"),
        ("INSERT INTO account (id, external_id, owner_name, asset, status, balance, held, "
         "credit_limit, created_at, kind, last_seq) SELECT 'x' || id, 'x', '', asset, status, 0, "
         "0, 0, 0, kind, 0 FROM account", "UNIQUE"),
        ("INSERT INTO event (id, kind, ts, caller, arguments, external_id) "
         "SELECT 'x' || id, kind, 0, '', '', 'x' FROM event WHERE kind <> 'REVERSAL'", "UNIQUE"),
        ("INSERT INTO api_key SELECT name || 'x', prefix, hash, role, 0, NULL FROM api_key",
         "UNIQUE"),
    ],
    ids=short,
)  # fmt: skip
def test_the_database_keeps_what_may_stand_in_a_column(
    eventful: "Bank", statement: str, message: str
) -> None:
    with pytest.raises(REFUSED, match=f"(?i){message}"):
        eventful.tamper(statement)
    assert eventful.wrong() == []


# What may change of a row. Whatever else a table holds is for ever, but for metadata's index.
CHANGING = {
    "account": {"status", "balance", "held", "last_seq", "owner_name", "notes", "credit_limit"},
    "event": {"answer"},
    "hold": {"status", "captured_amount", "transaction_id"},
    "scheduled_cashback": {"status", "transaction_id"},
    "api_key": {"revoked_at"},
    "webhook": {"position", "failures", "due_at", "last_error"},
}


@pytest.mark.parametrize("table", sorted(ledger.TABLES.keys() - {"note"}))
def test_no_row_ever_goes_or_changes_but_in_what_may_change(
    eventful: "Bank", engine: str, table: str
) -> None:
    fixed = {*ledger.TABLES[table].columns.keys()} - CHANGING.get(table, set())
    statements = [f"UPDATE {table} SET {name} = {name}" for name in fixed]
    statements += [f"DELETE FROM {table}"]
    statements += [f"TRUNCATE {table} CASCADE"] * (engine == "postgresql")
    for statement in statements:
        with pytest.raises(REFUSED, match=f"what {table} holds is for ever"):
            eventful.tamper(statement)


def test_the_database_keeps_what_a_customer_has_readable(bank: "Bank") -> None:
    bank.given(alice=100)
    more = 2**53 - 100
    statements = [
        entries_like(seq="2", amount=str(more), balance=str(2**53)),
        f"UPDATE account SET balance = {2**53}, last_seq = 2 WHERE owner_name = 'alice'",
    ]
    with pytest.raises(REFUSED, match="every client can read"):
        bank.tamper(f"{statements[0]} WHERE account_id = {ALICES}", statements[1])
    # What an earlier version has let grow beyond may go on, and come back.
    bank.tamper_freely(f"UPDATE account SET balance = {2**53 + 5} WHERE owner_name = 'alice'")
    bank.tamper_freely(f"UPDATE entry SET balance = {2**53 + 5} WHERE account_id = {ALICES}")
    assert refusal(bank.deposit("alice", 1)) == (409, "balance_limit")
    assert bank.withdraw("alice", 1).json()["balance"] == 2**53 + 4


def test_the_database_lets_nobody_owe_what_is_issued(bank: "Bank") -> None:
    wallet = new_account("CUSTOMER", balance="0").replace("'USD'", "'GOLD'")
    for statement in (
        "UPDATE account SET credit_limit = 1 WHERE asset = 'GOLD'",
        wallet.replace("0, 0, 0, 'CUSTOMER'", "0, 1, 0, 'CUSTOMER'"),
    ):
        with pytest.raises(REFUSED, match="nobody owes what is issued"):
            bank.tamper(statement)


def test_the_database_keeps_closed_accounts_closed(bank: "Bank") -> None:
    bank.given(alice=0).step("alice", "close")
    with pytest.raises(REFUSED, match="never comes back"):
        bank.tamper("UPDATE account SET status = 'ACTIVE' WHERE kind = 'CUSTOMER'")


def test_the_database_keeps_frozen_accounts_still(bank: "Bank") -> None:
    bank.given(alice=100).step("alice", "freeze")
    another = entries_like(seq="2", amount="1", balance="101")
    refused = pytest.raises(REFUSED, match="only an active account moves money")
    with refused:
        bank.tamper(f"{another} WHERE account_id = '{bank.ids['alice']}'")
    # Nor does it help to write the entry before it is frozen, and the account after that.
    bank.step("alice", "unfreeze")
    with refused:
        bank.tamper(
            f"{another} WHERE account_id = '{bank.ids['alice']}'",
            f"UPDATE account SET status = 'FROZEN' WHERE id = '{bank.ids['alice']}'",
            f"UPDATE account SET balance = 101, last_seq = 2 WHERE id = '{bank.ids['alice']}'",
        )
    assert bank.wrong() == []


def test_the_database_credits_a_cashback_once(bank: "Bank") -> None:
    bank.given(alice=100).pay("alice", 100)
    bank.tamper("UPDATE scheduled_cashback SET status = 'CREDITED'")
    with pytest.raises(REFUSED, match="credited once"):
        bank.tamper("UPDATE scheduled_cashback SET status = 'SCHEDULED'")


@on_sqlite
def test_sqlite_replaces_no_entry(bank: "Bank") -> None:
    bank.given(alice=100)
    replaced = "REPLACE INTO entry SELECT * FROM entry WHERE seq = 1"
    with pytest.raises(sqlite3.IntegrityError, match="for ever"):
        bank.tamper("PRAGMA recursive_triggers = ON", replaced)


def new_event(event_id: str, kind: str) -> str:
    """Return the statement that writes an event past the code."""
    values = f"'{event_id}', '{kind}', 0, 'x', '{{}}'"
    return f"INSERT INTO event (id, kind, ts, caller, arguments) VALUES ({values})"


ALICES = "(SELECT id FROM account WHERE owner_name = 'alice')"


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE entry SET amount = 99 WHERE type = 'CREDIT'", "sums to"),
        ("UPDATE entry SET amount = amount + 1", "entry 1 with balance"),
        (f"UPDATE entry SET balance = 5 WHERE account_id = {ALICES}", "balance 5 stands where"),
        (f"UPDATE entry SET seq = 7 WHERE account_id = {ALICES}", "entry 7 with balance"),
        (f"UPDATE entry SET balance = -1 WHERE account_id = {ALICES}", "leaves a customer at -1"),
        ("DELETE FROM entry", "its row says 1 entries"),
        ("DELETE FROM entry WHERE type = 'DEBIT'", "sums to"),
        ("DELETE FROM event", "missing row of event"),
        ("UPDATE account SET balance = 5 WHERE owner_name = 'alice'", "its row says 1 entries and"),
        ("UPDATE account SET last_seq = 2 WHERE owner_name = 'alice'", "its row says 2 entries"),
        ("UPDATE account SET status = 'CLOSED' WHERE owner_name = 'alice'", "CHECK"),
        ("UPDATE account SET kind = 'CUSTOMER'", "CHECK"),
        ("UPDATE account SET balance = -1", "CHECK"),
        ("DROP TRIGGER entry_kept ON entry", "entry_kept is not as it was made"),
        (new_event("t", "TRANSFER"), "transaction t has no entries"),
        (
            "UPDATE account SET kind = 'SYSTEM' WHERE owner_name = 'alice'",
            "asset or system account",
        ),
        ("DROP INDEX account_owner", "account_owner is not as it was made"),
    ],
)
def test_the_check_finds_what_was_tampered_with(
    bank: "Bank", engine: str, statement: str, finding: str
) -> None:
    bank.given(alice=100)
    require_found(bank, engine, statement, finding)


def require_found(bank: "Bank", engine: str, statement: str, finding: str) -> None:
    """Tamper with a ledger, and have the check find it, or PostgreSQL refuse it."""
    if (engine, finding) == ("postgresql", "CHECK"):
        # It keeps these rules whoever asks.
        with pytest.raises(psycopg.IntegrityError):
            bank.tamper_freely(statement)
    else:
        bank.tamper_freely(statement)
        assert any(finding in found for found in bank.wrong())


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE scheduled_cashback SET amount = 9", "promised 9"),
        ("UPDATE scheduled_cashback SET status = 'CREDITED'", "is CREDITED, its cashback is not"),
        ("DELETE FROM scheduled_cashback", "has no cashback"),
        ("UPDATE event SET kind = 'CASHBACK' WHERE kind = 'PAYMENT'", "was not promised"),
        ("DELETE FROM api_key", "key 'till' is not as its events say"),
        ("UPDATE api_key SET revoked_at = 5", "key 'till' is not as its events say"),
        (
            "UPDATE asset SET exponent = 3 WHERE code = 'JPY'",
            "asset or system account ('JPY', 'Yen'",
        ),
        ("DELETE FROM account WHERE name = 'treasury'", "system account ('treasury', 'PTS')"),
        (
            "UPDATE account SET kind = CASE kind WHEN 'SYSTEM' THEN 'CUSTOMER' ELSE 'SYSTEM' END "
            "WHERE balance >= 0",
            "system account (None, 'USD')",
        ),
        ("UPDATE entry SET id = (SELECT min(id) FROM entry)", "stands twice"),
        ("INSERT INTO schema_version SELECT 0, description FROM schema_version", "a second row"),
        ("UPDATE event SET kind = 'GIFT' WHERE kind = 'DEPOSIT'", "is a GIFT"),
        ("UPDATE asset SET exponent = 2 WHERE code = 'BTC'", "asset or system account ('BTC', "),
        ("UPDATE event SET kind = 'freeze' WHERE kind = 'add_asset'", "account ('BTC', "),
        (
            "INSERT INTO asset (code, name, exponent, closed_loop) VALUES ('NEW', 'New', 2, 0)",
            "asset or system account ('NEW', ",
        ),
        ("DELETE FROM account WHERE asset = 'BTC' AND name = 'cash'", "account ('cash', 'BTC')"),
        ("UPDATE event SET id = 'ZZ' WHERE kind = 'open_account'", "event ZZ has no UUID"),
        (f"UPDATE account SET id = 'ZZ' WHERE id = {ALICES}", "account ZZ has no UUID"),
        ("UPDATE entry SET id = 'ZZ' WHERE type = 'CREDIT'", "entry ZZ has no UUID"),
        ("UPDATE event SET arguments = '{' WHERE kind = 'DEPOSIT'", "arguments that are no JSON"),
        (f"UPDATE account SET status = 'FROZEN' WHERE id = {ALICES}", "FROZEN, but became ACTIVE"),
        (f"UPDATE account SET credit_limit = 5 WHERE id = {ALICES}", "a credit limit of 5"),
    ],
)
def test_the_check_finds_what_no_constraint_can(bank: "Bank", statement: str, finding: str) -> None:
    add_asset(bank.given(alice=100), "BTC")
    bank.pay("alice", 50)
    new_api_key(bank.database, "till", "admin")
    bank.tamper_freely(statement)
    assert any(finding in found for found in bank.wrong())


def test_the_check_finds_an_entry_below_the_limit_of_its_time(bank: "Bank") -> None:
    bank.given(alice=0)
    for limit, balance in ((10, -10), (0, 0), (30, -30)):
        bank.deposit("alice", 10) if limit == 0 else None
        change(bank, "alice", credit_limit=limit)
        bank.withdraw("alice", -balance) if balance else None
    assert bank.wrong() == []
    # It was allowed later, and not then.
    bank.tamper_freely("UPDATE event SET credit_limit = 9 WHERE credit_limit = 10")
    assert any("entry 1 leaves a customer at -10" in found for found in bank.wrong())


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        (f"UPDATE account SET held = 5 WHERE id = {ALICES}", "holds 5, its pending holds are 10"),
        ("UPDATE hold SET amount = 30 WHERE status = 'PENDING'", "its pending holds are 30"),
        ("DELETE FROM hold WHERE status = 'PENDING'", "its pending holds are 0"),
        ("UPDATE hold SET captured_amount = 1 WHERE status = 'CAPTURED'", "was not captured as"),
        ("UPDATE hold SET status = 'VOIDED' WHERE status = 'PENDING'", "its pending holds are 0"),
        ("UPDATE hold SET id = 'ZZ' WHERE status = 'PENDING'", "hold ZZ has no UUID"),
        ("UPDATE event SET kind = 'expire' WHERE kind = 'hold'", "that is not EXPIRED"),
        ("UPDATE event SET kind = 'expire', arguments = '{}' WHERE kind = 'hold'", "expired twice"),
        ("UPDATE event SET reverses = (SELECT id FROM event WHERE kind = 'DEPOSIT') "
         "WHERE kind = 'REVERSAL'", "round"),
        ("UPDATE event SET reverses = NULL WHERE kind = 'REVERSAL'", "CHECK"),
    ],
)  # fmt: skip
def test_the_check_finds_wrong_holds_and_reversals(
    bank: "Bank", engine: str, statement: str, finding: str
) -> None:
    bank.given(alice=100, bob=0).promised("alice", "bob", 10)
    bank.capture(bank.promised("alice", "bob", 20))
    bank.reverse(bank.last("alice"))
    require_found(bank, engine, statement, finding)


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [
        ("event", "reverses", "(SELECT id FROM event WHERE kind = 'DEPOSIT')"),
        ("event", "external_id", "'x'"),
        ("account", "external_id", "'x'"),
        ("hold", "external_id", "'x'"),
    ],
)
def test_the_check_finds_what_stands_twice(
    bank: "Bank", table: str, column: str, value: str
) -> None:
    bank.given(alice=100, bob=0)
    for _ in range(2):
        bank.promised("alice", "bob", 1)
        bank.reverse(bank.transfer("alice", "bob", 1).json()["transfer_id"])
    where = " WHERE kind = 'REVERSAL'" if column == "reverses" else ""
    bank.tamper_freely(
        f"DROP INDEX {table}_{column}", f"UPDATE {table} SET {column} = {value}{where}"
    )
    found = [each for each in bank.wrong() if re.fullmatch(f"{column} .+ stands twice", each)]
    assert len(found) == 1


@pytest.mark.parametrize(
    "reference",
    ["event.reverses", "account.asset", "entry.account_id", "entry.transaction_id",
     "hold.account_id", "hold.dest_account_id", "hold.transaction_id",
     "scheduled_cashback.payment_id", "scheduled_cashback.account_id",
     "scheduled_cashback.transaction_id", "webhook.account_id", "webhook.position"],
)  # fmt: skip
def test_the_check_finds_a_reference_to_nothing(bank: "BankInside", reference: str) -> None:
    bank.given(alice=100, bob=0).pay("alice", 50)
    bank.pass_time(DAY)
    bank.capture(bank.promised("alice", "bob", 10))
    bank.reverse(bank.last("bob"))
    subscribe(bank, "http://localhost", "--account", bank.ids["bob"])
    table, column = reference.split(".")
    # One of them, because two of one number may not stand in one account.
    one = f"(SELECT min({column}) FROM {table})"
    bank.tamper_freely(f"UPDATE {table} SET {column} = '{NOBODY}' WHERE {column} = {one}")
    missing = f"table {table}: a row refers to a missing row of "
    assert any(found.startswith(missing) for found in bank.wrong())


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
def test_the_check_finds_a_trigger_that_does_nothing(bank: "Bank", statements: list[str]) -> None:
    bank.tamper(*statements)
    assert "entry_kept is not as it was made" in bank.wrong()


@on_postgresql
@pytest.mark.parametrize(
    ("statement", "name"),
    [
        ("ALTER TABLE account DROP CONSTRAINT account_check", "account"),
        ("ALTER TABLE entry DROP CONSTRAINT entry_transaction_id_fkey", "entry"),
        ("ALTER TABLE account ALTER COLUMN balance DROP NOT NULL", "account"),
        ("ALTER TABLE event ADD COLUMN more text", "event"),
    ],
)
def test_the_check_finds_a_constraint_that_is_gone(bank: "Bank", statement: str, name: str) -> None:
    bank.tamper(statement)
    assert bank.wrong() == [f"{name} is not as it was made"]


def test_the_check_adds_up_what_would_not_fit_into_64_bits(bank: "Bank") -> None:
    bank.given(alice=0, bob=0)
    for owner in ("alice", "bob"):
        account = f"FROM account WHERE owner_name = '{owner}'"
        bank.tamper_freely(
            f"UPDATE account SET balance = {2**63 - 1}, last_seq = 1 WHERE owner_name = '{owner}'",
            new_event(owner, "TEST"),
            "INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) "
            f"SELECT id, 1, 'x', owner_name, 'CREDIT', balance, balance {account}",
        )
    assert any(f"sums to {2**63 - 1} USD" in found for found in bank.wrong())


# ----- Seals
# Whoever can write to the database can make books that add up; each of these edits is found.


@pytest.fixture(scope="session")
def evident(new_database: "NewDatabase") -> Iterator["Bank"]:
    """One ledger in which everything has happened, all of it sealed."""
    with new_database() as database, opened(database, ledger.DIALECTS) as bank:
        now = ledger.utc_now
        bank.given(alice=900, bob=0)
        bank.send("PATCH", f"/accounts/{bank.ids['bob']}", json={"metadata": {"tier": "gold"}})
        bank.transfer("alice", "bob", 5, memo="rent", external_id="t-1", metadata={"order": "7"})
        bank.withdraw("bob", 1)
        bank.withdraw("bob", 10**6)
        bank.journal({"alice": -3, "bob": +3})
        bank.post("/transfers/bulk", key=new_key(), transfers=[bank.transfer_body(2)] * 2)
        captured, voided, _ = (bank.promised("alice", "bob", 10, memo="table") for _ in range(3))
        bank.capture(captured, amount=7)
        bank.void(voided)
        bank.reverse(bank.pay("alice", 50).json()["payment_id"])
        bank.pay("alice", 100)
        bank.pass_time(DAY)
        bank.pay("alice", 150)
        kata_accounts(bank, "kim", "lee", balance=70)
        kata(bank, 5, "/payments", account_id="kim", amount=50)
        bank.post(USERS, external_user_id="carol")
        for operation in ("top-up", "bonus", "spend"):
            move_credits(bank, "carol", operation, 1)
        for step in ("freeze", "unfreeze"):
            bank.step("bob", step)
        credential = new_api_key(database, "till", "admin")
        new_api_key(database, "old", "auditor")
        key_command(database, "revoke", "old")
        time.sleep(ledger.KEYS_AGE_SECONDS_MAX)
        assert bank.by(credential).deposit("alice", 1).is_success
        printed(database, "seal")
        ledger.utc_now = now
        assert bank.wrong() == []
        yield bank


@contextmanager
def edited(database: str, *statements: str) -> Iterator[ledger.SqliteConnection]:
    """Lend a ledger after an edit that nothing has refused, and take it back."""
    with closing(connect(database)) as driver:
        if database.startswith("postgresql"):
            connection: Any = ledger.PostgresConnection(driver)
            driver.execute("SET session_replication_role = replica")
        else:
            driver.isolation_level = None
            connection = ledger.SqliteConnection(driver)
            driver.executescript("PRAGMA foreign_keys = 0; PRAGMA ignore_check_constraints = 1")
            driver.execute("BEGIN")
            found = driver.execute("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
            triggers = found.fetchall()
            for name, _ in triggers:
                driver.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            driver.execute(statement)
        if database.startswith("sqlite"):
            for _, made in triggers:
                driver.execute(made)
        try:
            yield connection
        finally:
            driver.rollback()


FIRST = "(SELECT min(id) FROM event WHERE kind = '{}')"
LAST_EVENT = "(SELECT max(id) FROM event)"


def of_first(kind: str, table: str, changes: str) -> str:
    """Return the statement that changes the first event of a kind, or its entries, or its key."""
    where = {
        "event": "id = {}",
        "entry": "transaction_id = {}",
        "idempotency_key": "name = (SELECT key FROM event WHERE id = {})",
    }[table]
    return f"UPDATE {table} SET {changes} WHERE {where.format(FIRST.format(kind))}"


def replaced(column: str, old: str, new: str) -> str:
    """Return the change of a text in a column."""
    return f"{column} = replace({column}, '{old}', '{new}')"


ALICE_NOW = "(SELECT id FROM account WHERE owner_name = 'alice')"
# What is edited, and what the check says of rows that differ; nothing where seals alone can tell.
EDITS = [
    (of_first("TRANSFER", "event", "kind = 'CAPTURE'"), "not captured so"),
    (of_first("TRANSFER", "event", "kind = 'DEPOSIT'"), "is not of this kind"),
    (of_first("TRANSFER", "event", "kind = 'JOURNAL'"), "other entries"),
    (of_first("TOP_UP", "event", "kind = 'BONUS'"), ""),
    (of_first("TRANSFER", "event", "memo = 'gift'"), "another text"),
    (of_first("TRANSFER", "event", "memo = NULL"), "another text"),
    (of_first("TRANSFER", "event", "external_id = NULL"), "another text"),
    (of_first("TRANSFER", "event", """notes = '{"order": "8"}'"""), "another text"),
    (of_first("TRANSFER", "event", "ts = ts + 90000000"), "time"),
    (of_first("TRANSFER", "event", "ts = ts - 1"), "time"),
    (of_first("open_account", "event", "ts = ts - 3600000000"), "time"),
    (of_first("TRANSFER", "event", "caller = 'admin'"), ""),
    (of_first("TRANSFER", "event", "caller = 'key:nobody'"), "key that nobody added"),
    (of_first("TRANSFER", "event", f"account_id = {FIRST.format('DEPOSIT')}"), "another account"),
    (of_first("TRANSFER", "event", replaced("arguments", ":5", ":6")), "another amount"),
    (of_first("TRANSFER", "event", replaced("arguments", "rent", "gift")), "another text"),
    (of_first("TRANSFER", "event", replaced("arguments", "source_", "to_")), "between others"),
    (of_first("TRANSFER", "event", "arguments = '{}'"), "not what its key was used for"),
    (of_first("TOP_UP", "event", replaced("arguments", "carol", "dave")), "between others"),
    (of_first("TOP_UP", "event", replaced("arguments", "10000", "20000")), "another amount"),
    (of_first("JOURNAL", "event", replaced("arguments", "DEBIT", "CREDIT")), "other entries"),
    (of_first("PAYMENT", "event", "effective_at = 5"), "promised"),
    ("UPDATE event SET effective_at = 6000 WHERE effective_at = 5000", "effective time"),
    (of_first("TRANSFER", "event", "key = NULL"), "what was not done"),
    (of_first("TRANSFER", "event", "key = 'a|b|c'"), "a key that is gone"),
    (of_first("TRANSFER", "event", "answer = NULL"), "answered otherwise"),
    (of_first("TRANSFER", "event", f"answer = '{'0' * 64}'"), "answered otherwise"),
    (of_first("TRANSFER", "event", f"id = '{NOBODY}'"), "missing row of event"),
    (of_first("freeze", "event", "kind = 'unfreeze'"), ""),
    (of_first("unfreeze", "event", "kind = 'freeze'"), "became FROZEN"),
    (f"DELETE FROM event WHERE id = {FIRST.format('unfreeze')}", "became FROZEN"),
    (f"DELETE FROM event WHERE id = {FIRST.format('freeze')}", ""),
    (f"INSERT INTO event (id, kind, ts, caller, arguments) SELECT '{NOBODY}', kind, ts, caller, "
     f"arguments FROM event WHERE id = {FIRST.format('unfreeze')}", "time"),
    (of_first("TRANSFER", "entry", "amount = amount + 1, balance = balance + CASE type WHEN "
              "'CREDIT' THEN 1 ELSE -1 END"), "another amount"),
    (of_first("TRANSFER", "entry", "type = CASE type WHEN 'CREDIT' THEN 'DEBIT' ELSE 'CREDIT' END"),
     "is not of this kind"),
    (of_first("TRANSFER", "entry", "id = 'f' || substr(id, 2)"), ""),
    (of_first("TRANSFER", "entry", "seq = seq + 100"), "should be"),
    (of_first("TRANSFER", "entry", f"transaction_id = {FIRST.format('JOURNAL')}"), "no entries"),
    (f"DELETE FROM entry WHERE transaction_id = {FIRST.format('TRANSFER')}", "no entries"),
    ("UPDATE account SET balance = balance + 7, last_seq = last_seq WHERE owner_name = 'alice'",
     "its row says"),
    ("UPDATE account SET owner_name = 'mallory' WHERE owner_name = 'alice'", "another owner"),
    ("UPDATE account SET owner_name = 'mallory' WHERE name = 'bank:kim'", "another owner"),
    ("UPDATE account SET notes = NULL WHERE owner_name = 'bob'", "other notes"),
    ("UPDATE account SET external_id = 'x' WHERE owner_name = 'bob'", "another owner"),
    ("UPDATE account SET created_at = created_at - 1 WHERE owner_name = 'bob'", "another owner"),
    ("DELETE FROM note", "not indexed"),
    (f"INSERT INTO note (name, value, owner_id) VALUES ('a', 'b', '{NOBODY}')", "more is indexed"),
    (of_first("TRANSFER", "idempotency_key", "status = 409"), "answered otherwise"),
    (of_first("TRANSFER", "idempotency_key", replaced("body", "balance", "balanse")),
     "answered otherwise"),
    (of_first("TRANSFER", "idempotency_key", "location = '/x'"), "answered otherwise"),
    (of_first("TRANSFER", "idempotency_key", "ts = ts + 1"), "another time than its key"),
    (of_first("TRANSFER", "idempotency_key", "fingerprint = 'x'"), "not what its key was used for"),
    ("DELETE FROM idempotency_key WHERE name LIKE '%POST /transfers|%'", "a key that is gone"),
    ("UPDATE idempotency_key SET status = 200 WHERE status = 409", "what was not done"),
    ("UPDATE idempotency_key SET status = 404 WHERE status = 409", "refused otherwise"),
    ("INSERT INTO idempotency_key SELECT name || 'x', fingerprint, status, body, location, ts "
     "FROM idempotency_key WHERE name LIKE '%/transfers|%'", "what was not done"),
    ("UPDATE hold SET amount = 9, captured_amount = 9 WHERE status = 'CAPTURED'", "another hold"),
    ("UPDATE hold SET expires_at = expires_at + 1 WHERE status = 'PENDING'", "another hold"),
    (f"UPDATE hold SET dest_account_id = {FIRST.format('hold')} WHERE status = 'VOIDED'",
     "another hold"),
    ("UPDATE hold SET memo = NULL WHERE status = 'VOIDED'", "another hold"),
    ("UPDATE hold SET status = 'EXPIRED' WHERE status = 'VOIDED'", "not VOIDED"),
    ("UPDATE hold SET status = 'EXPIRED' WHERE status = 'PENDING'", "hold"),
    ("UPDATE hold SET status = 'VOIDED' WHERE status = 'PENDING'", "hold"),
    ("INSERT INTO hold SELECT * FROM (SELECT * FROM hold WHERE status = 'VOIDED') AS one WHERE "
     "false", None),
    ("UPDATE scheduled_cashback SET due_at = due_at + 1 WHERE status = 'SCHEDULED'", "due at"),
    ("UPDATE scheduled_cashback SET status = 'CANCELLED' WHERE status = 'SCHEDULED'", "cashback"),
    ("UPDATE scheduled_cashback SET status = 'SCHEDULED' WHERE status = 'CANCELLED'", "cashback"),
    ("UPDATE scheduled_cashback SET number = 7 WHERE number = 1", "is number 7"),
    ("UPDATE scheduled_cashback SET clock = 'SERVER' WHERE number = 1", "promised"),
    ("UPDATE api_key SET role = 'service' WHERE name = 'till'", "as its events say"),
    ("UPDATE api_key SET hash = 'x' WHERE name = 'till'", "as its events say"),
    ("UPDATE api_key SET prefix = 'x' WHERE name = 'till'", "as its events say"),
    ("UPDATE api_key SET revoked_at = NULL WHERE name = 'old'", "as its events say"),
    ("DELETE FROM api_key; DELETE FROM event WHERE kind IN ('add_key', 'revoke_key')",
     "key that nobody added"),
    ("UPDATE seal SET ts = ts + 1", ""),
    ("UPDATE seal SET hash = 'x'", ""),
    ("UPDATE seal SET events = events + 1", ""),
    (f"UPDATE seal SET until = {FIRST.format('TRANSFER')}", ""),
    ("UPDATE seal SET id = id + 100", ""),
    (f"DELETE FROM event WHERE id = {LAST_EVENT}; DELETE FROM entry WHERE transaction_id NOT IN "
     "(SELECT id FROM event)", "seal: a row refers to a missing row of event"),
]  # fmt: skip
EDITS = [edit for edit in EDITS if edit[1] is not None]


@pytest.mark.parametrize(("statements", "finding"), EDITS, ids=short)
def test_the_check_believes_no_row_that_another_contradicts(
    evident: "Bank", tmp_path: Path, statements: str, finding: str
) -> None:
    with edited(evident.database, *statements.split("; ")) as connection:
        results = {rule: wrong for rule, _, wrong in ledger.check(connection)}
        lines = ledger.read_lines(connection, "", "~", 10**6)
        seals = connection.rows("SELECT * FROM seal ORDER BY id")
    by_seals = results.pop("seals are those of the events, in their order")
    found = [each for wrong in results.values() for each in wrong]
    assert not finding or any(finding in each for each in found), (found, by_seals)
    # Whoever changes what happened must meet the seals, and the program of ten lines.
    sealed = r"(UPDATE|DELETE FROM|INSERT INTO) (event|entry|seal)\b"
    is_sealed = any(re.match(sealed, statement) for statement in statements.split("; "))
    assert bool(by_seals) == is_sealed
    events = "".join(f"{row['line']}\n" for row in lines)
    assert verified(tmp_path, events, seals) == (not is_sealed)


def verified(folder: Path, events: str, seals: list[Any]) -> bool:
    """Run the program of ten lines in deploy/README.md, in this process; tell if all is well."""
    program = re.findall(r"```python\n(import hashlib.*?)```", DEPLOYMENT, re.DOTALL)[0]
    assert len([line for line in program.splitlines() if line]) <= 10
    folder.joinpath("events").write_text(events)
    folder.joinpath("seals").write_text("".join(f"{json.dumps(seal)}\n" for seal in seals))
    with pytest.MonkeyPatch.context() as patch, ExitStack() as files:
        patch.setattr(sys, "argv", ["", str(folder / "events"), str(folder / "seals")])
        patch.setattr(sys, "stdout", io.StringIO())
        opening = {"open": lambda *given: files.enter_context(open(*given))}
        try:
            exec(program, opening)  # noqa: S102
        except SystemExit as end:
            return not end.code
    return True


def seal_now(bank: "BankInside") -> None:
    """Seal what is new, as a running server does."""
    bank.runner.run(ledger.seal_events(bank.ledger))


def test_the_check_needs_no_account_at_hand(
    evident: "Bank", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "ACCOUNTS_KEPT", 0)
    monkeypatch.setattr(ledger, "PORTION_ROWS", 2)
    assert evident.wrong() == []


def test_an_id_tells_when_it_was_drawn() -> None:
    ids = ("00000000-0001-7000-8000-000000000000", "00000000-0001-7001-8000-000000000000", "nobody")
    assert list(map(ledger.id_drawn_at, ids)) == [1_000, 1_001, 0]


def seal_rows(bank: "Bank") -> list[Any]:
    """Return the id of each seal, and how many events all until it cover."""
    return bank.rows("SELECT id, events FROM seal ORDER BY id")


def test_a_seal_covers_what_came_since_the_one_before(bank: "BankInside") -> None:
    seal_now(bank)
    assert seal_rows(bank) == []
    bank.given(alice=100)
    seal_now(bank)
    seal_now(bank)
    assert seal_rows(bank) == [(1, 2)]
    bank.deposit("alice", 1)
    unsealed = bank.get("/events").json()
    assert (unsealed["seal"], bank.get("/events", limit=2).json()["seal"]) == (None, 1)
    seal_now(bank)
    assert seal_rows(bank) == [(1, 2), (2, 3)]
    assert bank.get("/events").json()["seal"] == 2
    assert bank.get("/events", after=unsealed["next"]).json()["seal"] is None


def test_seals_are_listed_newest_first_and_followed_oldest_first(bank: "BankInside") -> None:
    for number in range(1, 6):
        bank.given({f"person {number}": 0})
        seal_now(bank)
    assert [seal["id"] for page in bank.pages("/seals", limit=2) for seal in page] == [
        5,
        4,
        3,
        2,
        1,
    ]
    found: list[Any] = []
    after: Any = 0
    while items := bank.get("/seals", after=after, limit=2).json()["items"]:
        found += items
        after = bank.get("/seals", after=after, limit=2).json()["next"]
    assert [seal["id"] for seal in found] == [1, 2, 3, 4, 5]
    assert bank.get("/seals", after=5).json() == {"items": [], "next_cursor": None, "next": 5}
    assert bank.get("/seals/3").json() == found[2]
    third = bank.get("/events").json()["items"][2]
    assert found[2] == {**found[2], "ts": third["ts"], "until": third["id"], "events": 3}
    assert refusal(bank.get("/seals/6")) == (404, "seal_not_found")
    assert refusal(bank.get("/seals", after=6)) == (400, "invalid_cursor")
    for none in ("x", "-1", str(2**63)):
        assert refusal(bank.get(f"/seals/{none}")) == (422, "invalid_request")


NASTY = "".join(map(chr, range(1, 128))) + '\u00e9\u2028\ufeff\U0001f600 "memo":null, \\\\u0041'


def test_a_line_is_json_in_the_order_of_names_on_both_engines(bank: "BankInside") -> None:
    bank.given(alice=100)
    quoted = NASTY.replace("'", "''")
    bank.tamper_freely(f"UPDATE event SET memo = '{quoted}'")
    with bank.ledger.database.read() as connection:
        lines = ledger.read_lines(connection, "", "~", 10)
        rows = connection.rows("SELECT * FROM event ORDER BY id")
        entries = connection.rows("SELECT * FROM entry ORDER BY id")
    opened, deposited = ({name: row[name] for name in ledger.LINE_MEMBERS} for row in rows)
    shown = [{name: e[name] for name in e if name != "transaction_id"} for e in entries]
    expected = [opened | {"entries": []}, deposited | {"entries": shown}]
    in_order = partial(json.dumps, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    assert [line["line"] for line in lines] == [in_order(one) for one in expected]
    assert opened["memo"] == NASTY


def test_what_a_later_version_adds_changes_no_line(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.given(alice=100)
    bank.deposit("alice", 1, memo="later")
    monkeypatch.setattr(ledger, "LINE_MEMBERS", ledger.LINE_MEMBERS - {"memo"})
    with bank.ledger.database.read() as connection:
        lines = [line["line"] for line in ledger.read_lines(connection, "", "~", 10)]
    assert ['"memo"' in line for line in lines] == [False, False, True]


def test_the_example_can_be_computed_by_hand(tmp_path: Path) -> None:
    about_seals = DEPLOYMENT.partition("## Seals")[2]
    [(line, told)] = re.findall(r"```json\n(.*?)\n```.*?sha256sum  # (\w+)", about_seals, re.DOTALL)
    assert ledger.sha256(f"{'0' * 64}\n{line}\n") == told
    event = json.loads(line)
    seal = {"id": 1, "ts": event["ts"], "until": event["id"], "events": 1, "hash": told}
    assert verified(tmp_path, f"{line}\n", [seal])
    assert not verified(tmp_path, f"{line} \n", [seal])


def test_what_was_sealed_is_found_by_a_hash_that_was_kept(bank: "BankInside") -> None:
    bank.given(alice=100)
    kept = printed(bank.database, "seal").split()[-1]
    bank.deposit("alice", 1)
    newest = printed(bank.database, "seal").splitlines()[-1]
    assert re.fullmatch(r"seal 2  [0-9T:.-]+Z  [0-9a-f]{64}", newest)
    assert newest in printed(bank.database, "check", "--seal", kept)
    assert newest in printed(bank.database, "check", "--seal", kept.upper())
    with pytest.raises(SystemExit, match="2"):  # As where a script has lost it.
        ledger.main(["check", "--seal", "", "--database-url", bank.database])
    assert printed(bank.database, "check", "--seal", newest.split()[-1])
    # Its end is cut off, as whoever can write to the database can do it.
    last = "(SELECT max(id) FROM event)"
    bank.tamper_freely(
        "DELETE FROM seal WHERE id = 2",
        f"DELETE FROM idempotency_key WHERE name = (SELECT key FROM event WHERE id = {last})",
        f"DELETE FROM entry WHERE transaction_id = {last}",
        f"DELETE FROM event WHERE id = {last}",
        "UPDATE account SET balance = CASE kind WHEN 'SYSTEM' THEN -100 ELSE 100 END, last_seq = 1 "
        "WHERE last_seq = 2",
    )
    assert bank.wrong() == []
    with bank.ledger.database.read() as connection:
        for given, is_here in ((kept, True), (newest.split()[-1], False)):
            wrong = [found for _, _, wrong in ledger.check(connection, given) for found in wrong]
            assert (wrong == []) == is_here


def test_two_servers_seal_everything_once(database: str) -> None:
    with serving(database) as one, serving(database) as other:
        for server in (one, other):
            server.bank.given({f"person {server.process.pid}": 100})
        [[count]] = one.bank.rows("SELECT count(*) FROM event WHERE kind <> 'hold'")
        wait_until(lambda: sum(seal_rows(one.bank)[-1:], ())[1:] == (count,))
        one.process.kill()
        other.bank.deposit(next(iter(other.bank.ids)), 1)
        wait_until(lambda: seal_rows(other.bank)[-1][1] == count + 1)
        assert other.bank.wrong() == []


def test_the_exported_lines_are_those_that_were_sealed(evident: "Bank", tmp_path: Path) -> None:
    events, seals = tmp_path / "lines", tmp_path / "hashes"
    printed(evident.database, "export", "--format", "jsonl", str(events))
    printed(evident.database, "export", "--format", "seals", str(seals))
    sealed = [json.loads(seal) for seal in seals.read_text().splitlines()]
    assert verified(tmp_path, events.read_text(), sealed)
    assert sealed[-1]["events"] == len(events.read_text().splitlines())


# ----- Upgrades
# A real ledger of each version is kept as text, with rows of every kind, and with what it told.
# LEDGER_TEST_KEEP=1 keeps the one of this version anew, after its tables have changed.

KEPT = Path(__file__).parent / ".ledgers"
EARLIER = range(1, ledger.SCHEMA_VERSION)


def by_admin(bank: "BankInside") -> "BankInside":
    """Let all that is asked be asked by the operator, whose keys stay known."""
    send = bank.send

    def send_as_admin(*request: Any, headers: Any = (), **options: Any) -> httpx.Response:
        return send(*request, headers={**dict(headers), "X-API-Key": ADMIN_KEY}, **options)

    bank.send = send_as_admin
    return bank


def tell_everything(bank: "BankInside") -> list[Any]:
    """Let everything happen that can; return what was asked under keys, and the answers."""
    bank.given(alice=10_000, bob=0, carol=500, dora=0)
    asked: list[Any] = []

    def ask(path: str, **body: Any) -> Any:
        answer = bank.post(path, key=f"key-{len(asked)}", **body)
        asked.append([path, f"key-{len(asked)}", body, answer.status_code, answer.text])
        return answer.json()

    alice, bob, carol, _ = bank.ids.values()
    ends = {"source_account_id": alice, "dest_account_id": bob}
    promise = {"account_id": alice, "dest_account_id": bob}
    ask("/accounts", owner_name="Eve", external_id="eve-1", metadata={"team": "red", "é": "ü"})
    for code, is_closed in (("BTC", False), ("MILES", True)):
        ask("/assets", code=code, name=code.title(), exponent=8, closed_loop=is_closed)
        own = ask("/accounts", owner_name="Own", asset=code)
        ask(f"/accounts/{own['id']}/{'top-up' if is_closed else 'deposit'}", amount=5)
    owing = ask("/accounts", owner_name="Otto", credit_limit=50)
    ask(f"/accounts/{owing['id']}/withdraw", amount=40)
    ask("/transfers", **ends, amount=300, memo="rent", external_id="t-1", metadata={"order": "7"})
    ask("/transfers", **ends, amount=10**12)
    ask("/transfers", **ends, amount=1, effective_at="2026-01-15T12:00:00+01:00")
    ask(f"/accounts/{alice}/withdraw", amount=5)
    many = [{**ends, "amount": 1}, {**ends, "amount": 10**9}]
    ask("/transfers/bulk", atomic=False, transfers=many)
    entries = [
        {"account_id": who, "type": kind, "amount": amount}
        for who, kind, amount in ((alice, "DEBIT", 7), (bob, "CREDIT", 3), (carol, "CREDIT", 4))
    ]
    posted = ask("/transactions", entries=entries, metadata={"order": "8"})
    ask(f"/transactions/{posted['id']}/reverse", memo="no")
    for payer in (alice, carol):
        ask("/payments", account_id=payer, amount=100)
    cancelled = ask("/payments", account_id=alice, amount=200)
    ask(f"/transactions/{cancelled['payment_id']}/reverse")
    bank.step("carol", "freeze")
    bank.pass_time(DAY + HOUR)
    ask("/payments", account_id=alice, amount=150)
    captured, voided, _ = (ask("/holds", **promise, amount=n)["id"] for n in (5, 6, 7))
    ask("/holds", **promise, amount=8, expires_in=60, external_id="h-1")
    ask(f"/holds/{captured}/capture", amount=4)
    ask(f"/holds/{voided}/void")
    bank.pass_time(HOUR)
    ask(f"/accounts/{alice}/deposit", amount=1)
    for step in ("freeze", "unfreeze", "close"):
        bank.step("dora", step)
    bank.send("PATCH", f"/accounts/{bob}", json={"owner_name": "Bobby", "metadata": {"a": "b"}})
    for path, body in (
        ("/bank/accounts", {"timestamp": 1, "account_id": "a"}),
        ("/bank/deposits", {"timestamp": 2, "account_id": "a", "amount": 100}),
        ("/bank/payments", {"timestamp": 3, "account_id": "a", "amount": 50}),
        ("/bank/payments", {"timestamp": 90_000_000, "account_id": "a", "amount": 50}),
        ("/atm/accounts/1001/deposit", {"amount": "1.50"}),
        ("/api/v1/wallets/users", {"external_user_id": "u"}),
        ("/api/v1/wallets/users/u/top-up", {"amount": "2.5", "asset_type_id": 1}),
        ("/api/v1/wallets/users/u/bonus", {"amount": "1", "asset_type_id": 3}),
        ("/api/v1/wallets/users/u/spend", {"amount": "0.5", "asset_type_id": 1}),
    ):
        ask(path, **body)
    for name in "ab":
        subscribe(bank, f"http://127.0.0.1:1/{name}")
        new_api_key(bank.database, name, "service")
    printed(bank.database, "webhook", "remove", "http://127.0.0.1:1/a")
    key_command(bank.database, "revoke", "a")
    return asked


def told_of(bank: "BankInside") -> dict[str, Any]:
    """Return what is told of a ledger: lists, and what follows them, and each account."""
    paths = [
        "/accounts?limit=3", "/balances", "/transactions?limit=100", "/transactions?limit=2",
        "/holds?limit=2", "/events?limit=200", "/audit?limit=50", "/accounts?metadata[team]=red",
        "/bank/accounts", "/bank/accounts/a/transactions?timestamp=180000000", "/atm/",
        "/api/v1/wallets/users/u/balance?asset_type_id=1",
    ]  # fmt: skip
    for (account,) in bank.rows("SELECT id FROM account ORDER BY id"):
        paths += [f"/accounts/{account}", f"/accounts/{account}/statement?limit=5"]
    told = {path: bank.get(path).json() for path in paths}
    for path in paths:
        if cursor := told[path].get("next_cursor"):
            told[f"{path}&cursor={cursor}"] = bank.get(f"{path}&cursor={cursor}").json()
    return told


@pytest.fixture(scope="session")
def keep_ledger(lend_postgresql: "NewDatabase") -> None:
    """Keep a ledger of this version, on both engines, with what it told."""
    if not os.environ.get("LEDGER_TEST_KEEP"):
        return
    now = ledger.utc_now()
    settings: Any = {"admin_key": ADMIN_KEY, "preload_accounts": '{"1001": "5"}'}
    with new_file() as database, lend_postgresql(blank=True) as copied:
        with opened(database, ledger.DIALECTS, **settings) as bank:
            asked = tell_everything(by_admin(bank))
            told: dict[str, Any] = {"now": ledger.utc_now(), "asked": asked, "told": told_of(bank)}
        ledger.utc_now = lambda: now
        printed(database, "copy", "--from", database, "--to", copied)
        with closing(connect(database)) as connection:
            told["sqlite"] = list(connection.iterdump())
        programs = Path("/usr/lib/postgresql").glob("*/bin/pg_dump")
        dump = [str(sorted(programs)[-1]), "--inserts", "--no-owner", "--no-privileges", copied]
        text = subprocess.run(dump, check=True, capture_output=True, text=True).stdout
        # Without what is no SQL, and what the next server may not know.
        unwanted = re.compile(r"--|\\|$|CREATE SCHEMA|SET ")
        told["postgresql"] = [each for each in text.splitlines() if not unwanted.match(each)]
    KEPT.mkdir(exist_ok=True)
    file = KEPT / f"version-{ledger.SCHEMA_VERSION}.json"
    file.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def kept(version: int, new_database: "NewDatabase") -> Iterator[tuple[str, dict[str, Any]]]:
    """Lend the ledger that is kept of a version, and what it told."""
    told = json.loads((KEPT / f"version-{version}.json").read_text())
    told["told"].pop("exported", None)
    with new_database(blank=True) as database:
        with closing(connect(database)) as connection:
            if database.startswith("sqlite"):
                connection.executescript("\n".join(told["sqlite"]))
            else:
                connection.execute("\n".join(told["postgresql"]))
                connection.commit()
        ledger.utc_now = lambda: told["now"]
        yield database, told


def is_in(told: Any, now: Any) -> bool:
    """Tell whether what was told before is told now, where later versions may tell more."""
    if isinstance(told, dict) and isinstance(now, dict):
        return all(name in now and is_in(value, now[name]) for name, value in told.items())
    if isinstance(told, list) and isinstance(now, list):
        return len(told) == len(now) and all(map(is_in, told, now))
    return bool(told == now)


@pytest.mark.parametrize("version", [*EARLIER, ledger.SCHEMA_VERSION])
def test_a_ledger_of_any_version_tells_what_it_told(
    new_database: "NewDatabase", keep_ledger: None, version: int, tmp_path: Path
) -> None:
    with kept(version, new_database) as (database, told):
        if version < ledger.SCHEMA_VERSION:
            said = printed(database, "upgrade")
            assert f"was upgraded from version {version} to {ledger.SCHEMA_VERSION}" in said
        with opened(database, ledger.DIALECTS, admin_key=ADMIN_KEY) as bank:
            assert bank.wrong() == []
            now = told_of(by_admin(bank))
            assert [path for path in told["told"] if not is_in(told["told"][path], now[path])] == []
            for path, key, body, status, text in told["asked"]:
                again = bank.post(path, key=key, **body)
                assert (again.status_code, again.text) == (status, text)
                assert again.headers["Idempotent-Replayed"] == "true"
            rows = [row["transaction_id"] for row in exported_rows(bank, tmp_path)]
            entries = bank.rows("SELECT transaction_id FROM entry ORDER BY transaction_id")
            assert rows == [transaction for (transaction,) in entries]
            # It goes on in the microsecond of its last event, as where a clock is behind.
            ledger.utc_now = lambda: 0
            bank.given(late=5)
            assert bank.wrong() == []


def test_an_upgrade_brings_names_into_one_form(new_database: "NewDatabase") -> None:
    with kept(2, new_database) as (database, _):
        bank, rename = Bank(lambda: httpx.Response(500), database), "UPDATE account SET name = "
        bank.tamper_freely(
            f"{rename}'bank:{DECOMPOSED}', owner_name = '{DECOMPOSED}' WHERE name = 'bank:a'",
            f"{rename}'wallets:{COMPOSED}' WHERE name = 'wallets:u' AND asset = 'GOLD'",
            f"{rename}'wallets:{DECOMPOSED}' WHERE name = 'wallets:u' AND asset = 'DMND'",
            # What the first of these would be called, this one is: both stay as they are.
            f"{rename}'bank:{COMPOSED}' WHERE name = 'atm:1001'",
            # What happened to them says nothing of what they were called before.
            "UPDATE event SET arguments = '{}' WHERE account_id IN "
            "(SELECT id FROM account WHERE name IS NOT NULL)",
        )
        printed(database, "upgrade")
        names = bank.rows("SELECT name, owner_name FROM account WHERE name LIKE '%Zo%' ORDER BY 1")
        kept_names = [(f"bank:{DECOMPOSED}", COMPOSED), (f"bank:{COMPOSED}", "1001")]
        assert sorted(names) == sorted([*kept_names, *[(f"wallets:{COMPOSED}", "u")] * 2])
        assert bank.wrong() == []


def shape_of(database: str) -> list[Any]:
    """Return all of a ledger but its rows."""
    opened_at = ledger.database_at(database)
    with closing(opened_at), opened_at.read() as connection:
        [made] = connection.rows("SELECT * FROM schema_version")
        recorded = [("recorded", one) for one in json.loads(made["description"])]
        return [made["version"], *recorded, *connection.rows(connection.schema)]


@pytest.mark.parametrize("version", EARLIER)
def test_an_upgraded_ledger_is_as_a_new_one_but_for_its_rows(
    new_database: "NewDatabase", version: int
) -> None:
    with kept(version, new_database) as (database, _), new_database() as new:
        printed(database, "upgrade")
        upgraded, made = shape_of(database), shape_of(new)
        assert [one for one in upgraded if one not in made] == []
        assert [one for one in made if one not in upgraded] == []


@pytest.mark.parametrize("version", EARLIER)
@on_sqlite
def test_a_file_is_upgraded_when_it_is_served_and_kept_as_it_was(
    new_database: "NewDatabase", version: int
) -> None:
    with kept(version, new_database) as (database, _):
        file = file_of(database)
        before = contents_of(database)
        with serving(database) as server:
            said = f"{file} was upgraded from version {version} to {ledger.SCHEMA_VERSION}; "
            copied = f"{file}.version-{version}"
            assert f"  upgrade   {said}as it was before: {copied}" in server.said
        assert contents_of(f"sqlite:///{copied}") == before
        # Who goes back puts it in its place, and may go on from there again.
        Path(copied).replace(file)
        with ledger.open_ledger(database) as books:
            assert len(books.accounts().items) > 5


@on_sqlite
def test_a_command_that_makes_what_is_missing_upgrades_and_says_so(
    new_database: "NewDatabase", capsys: pytest.CaptureFixture[str]
) -> None:
    with kept(EARLIER[-1], new_database) as (database, _):
        with ledger.opened(ledger.Settings(database), make=True):
            pass
        said = f"{file_of(database)} was upgraded from version {EARLIER[-1]} to "
        assert capsys.readouterr().err.startswith(said)


def test_a_ledger_of_today_is_not_upgraded_again(database: str) -> None:
    with closing(ledger.database_at(database)) as present:
        assert ledger.upgrade(present) == ""


def contents_of(database: str) -> list[str]:
    """Return a file's tables and rows."""
    with closing(connect(database)) as connection:
        return list(connection.iterdump())


@pytest.mark.parametrize("version", EARLIER)
def test_other_commands_leave_an_earlier_ledger_as_it_is(
    new_database: "NewDatabase", engine: str, version: int
) -> None:
    with kept(version, new_database) as (database, _):
        name = ledger.database_at(database).name
        how = f"python ledger.py upgrade brings it to version {ledger.SCHEMA_VERSION}"
        refused = f"ledger: {name} is a ledger of version {version}: {how}\n"
        commands = [["check"], ["export", "--format", "csv"], ["key", "list"]]
        for command in commands:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "stderr", said := io.StringIO())
                assert ledger.main([*command, "--database-url", database]) == 1
            assert said.getvalue() == refused
        if engine == "postgresql":
            assert f"ledger: {refused_start(database)}\n" == refused
        shown = printed(database, "upgrade", "--dry-run")
        assert f"{name} is of version {version}" in shown
        assert "idempotency_key (name)" in shown or version > 1


@pytest.mark.parametrize("version", EARLIER)
def test_an_earlier_ledger_is_copied_into_one_of_today(
    new_database: "NewDatabase", version: int
) -> None:
    with kept(version, new_database) as (database, told), new_database(blank=True) as copied:
        printed(database, "copy", "--from", database, "--to", copied)
        with opened(copied, ledger.DIALECTS, admin_key=ADMIN_KEY) as bank:
            now = told_of(by_admin(bank))
            assert bank.wrong() == []
        assert [path for path in told["told"] if not is_in(told["told"][path], now[path])] == []


@pytest.mark.parametrize("version", EARLIER)
def test_an_upgrade_that_dies_has_done_nothing(
    new_database: "NewDatabase", tmp_path: Path, version: int
) -> None:
    with kept(version, new_database) as (database, _):
        status, died, before = None, 0, rows_of(database)
        for place in itertools.count(3, step=6 if CYCLES > 3 else 40):
            given = {"LEDGER_DATABASE_URL": database, "DIES_AT": str(place)}
            ran = run_program("upgrade", folder=tmp_path, target=die_between_statements, **given)
            status = ran.returncode
            if status == 0 or version_of(database) == ledger.SCHEMA_VERSION:
                break  # It died after its commit, if it did.
            died += 1
            died_so = (-signal.SIGKILL, version)
            assert (status, version_of(database)) == died_so, ran.stderr
            assert rows_of(database) == before
        assert died >= 4
        assert version_of(database) == ledger.SCHEMA_VERSION
        assert printed(database, "check")


def rows_of(database: str) -> list[Any]:
    """Return all rows of an earlier ledger's tables, and what these are called."""
    opened_at = ledger.database_at(database)
    with closing(opened_at), opened_at.read() as connection:
        names = sorted(row["name"] for row in connection.rows(connection.tables))
        rows = [connection.rows(f"SELECT * FROM {name}") for name in names]
        return [names, *(sorted(map(str, each)) for each in rows)]


def version_of(database: str) -> int:
    """Return the version that a ledger says it is of."""
    with closing(connect(database)) as connection:
        [[version]] = connection.execute("SELECT version FROM schema_version").fetchall()
        return int(version)


def die_between_statements(
    arguments: Sequence[str], environment: Mapping[str, str], said: Path, log: Path
) -> None:
    """Run a command that dies before one of its statements."""
    left = itertools.count(int(environment["DIES_AT"]), step=-1)

    class Dying:
        """A driver that counts what is executed."""

        def __init__(self, driver: Any) -> None:
            self.driver = driver

        def __getattr__(self, name: str) -> Any:
            if name in ("execute", "executemany") and next(left) == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return getattr(self.driver, name)

    for kind in (ledger.SqliteDatabase, ledger.PostgresDatabase):

        def connect(self: Any, *, write: bool, connect: Any = kind.connect) -> Any:
            connection = connect(self, write=write)
            connection.driver = Dying(connection.driver)
            return connection

        kind.connect = connect  # type: ignore[method-assign]
    run_main(arguments, environment, said, log)


def test_no_program_of_version_1_commits_to_a_later_one(bank: "Bank") -> None:
    with pytest.raises((sqlite3.Error, psycopg.Error), match="id"):
        bank.rows("SELECT * FROM idempotency_key WHERE id IN ('x')")


@pytest.mark.parametrize("version", EARLIER)
@on_sqlite
def test_what_stands_beside_outlives_an_upgrade_and_stays_the_others(
    new_database: "NewDatabase", version: int
) -> None:
    with kept(version, new_database) as (database, _):
        with closing(connect(database)) as connection:
            connection.execute("CREATE INDEX mine ON account (created_at)")
            connection.execute("CREATE INDEX theirs ON idempotency_key (ts)")
            connection.execute("CREATE VIEW rich AS SELECT id FROM account WHERE balance > 100")
        precious = Path(f"{file_of(database)}.version-{version}")
        precious.write_text("precious")
        said = printed(database, "upgrade")
        assert precious.read_text() == "precious"
        assert said.endswith(f"{precious}.1")
        assert "others: mine, rich, theirs\n" in printed(database, "check")
        with closing(connect(database)) as connection:
            connection.execute("DROP INDEX mine")
            connection.execute("CREATE TABLE others (id TEXT)")
            connection.execute("CREATE TRIGGER of_others DELETE ON others BEGIN SELECT 1; END")
        assert "others: of_others, others, rich, theirs\n" in printed(database, "check")


@on_sqlite
def test_an_upgrade_that_fails_leaves_no_copy(new_database: "NewDatabase") -> None:
    with kept(1, new_database) as (database, _):
        with closing(connect(database)) as connection, connection:
            for (name,) in connection.execute(
                "SELECT name FROM sqlite_schema WHERE type = 'trigger'"
            ).fetchall():
                connection.execute(f"DROP TRIGGER {name}")
            connection.execute("UPDATE entry SET balance = balance + 1 WHERE seq = 1")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", said := io.StringIO())
            assert ledger.main(["upgrade", "--database-url", database]) == 1
        assert said.getvalue().startswith("ledger: nothing was done: ")
        assert version_of(database) == 1
        assert [*file_of(database).parent.glob("*.version-*")] == []


@on_sqlite
def test_to_open_a_ledger_twice_in_one_process_gives_up_none_of_its_locks(database: str) -> None:
    with ledger.open_ledger(database) as books:
        books.open_account(owner_name="Alice")
        with ledger.open_ledger(database):
            log = Path(f"{file_of(database)}-wal")
            before = log.stat().st_ino
            # Another program that closes the ledger would take itself for the last one.
            run_python("-c", f"import sqlite3; c = sqlite3.connect({str(file_of(database))!r}); "
                       "c.execute('SELECT 1 FROM account').fetchall(); c.close()")  # fmt: skip
            assert log.stat().st_ino == before
            books.open_account(owner_name="Bob")


@on_sqlite
def test_what_others_put_beside_the_ledger_is_named_and_no_fault(bank: "Bank") -> None:
    beside = ["CREATE TABLE _litestream_seq (id INTEGER)", "CREATE INDEX mine ON account (asset)"]
    bank.tamper(*beside, "CREATE VIEW rich AS SELECT * FROM account WHERE balance > 100")
    assert bank.wrong() == []
    said = printed(bank.database, "check").splitlines()
    assert said[-2:] == ["others: _litestream_seq, mine, rich", "all ok"]
    make_ledger(bank.database)
    bank.tamper("CREATE TRIGGER theirs AFTER INSERT ON entry BEGIN SELECT 1; END")
    assert bank.wrong() == ["theirs is not as it was made"]


@on_postgresql
def test_extensions_and_views_are_no_fault(bank: "Bank") -> None:
    bank.tamper(
        "CREATE VIEW rich AS SELECT * FROM account", "CREATE TABLE more (x int CHECK (x > 0))"
    )
    assert bank.wrong() == []
    assert "others: more, rich\nall ok" in printed(bank.database, "check")


def test_a_server_notices_that_its_ledger_was_upgraded(new_database: "NewDatabase") -> None:
    with new_database() as database, serving(database) as server:
        server.bank.given(alice=100)
        server.bank.tamper_freely("UPDATE schema_version SET version = 99")
        wait_until(lambda: "The ledger was upgraded" in server.log.read_text())
        assert server.bank.get("/health").status_code == 503
        refused = server.bank.deposit("alice", 1)
        assert refusal(refused) == (503, "database_unavailable")
        assert refused.json()["detail"] == "The ledger was upgraded: restart with its program"
        assert server.bank.balances()["alice"] == 100


@pytest.mark.parametrize("lacking", ["note", "hold", "webhook"])
def test_a_ledger_from_before_version_1_is_called_so(bank: "Bank", lacking: str) -> None:
    bank.tamper(f"DROP TABLE {lacking}{' CASCADE' * ('postgresql' in bank.database)}")
    why = f"it has no table {lacking}; only the ledger.py that made it reads it"
    assert refused_start(bank.database) == f"this is a ledger from before version 1: {why}"


# ===== Part four: running


def test_a_refusal_of_a_dialect_tells_ids_as_ids_and_amounts_as_its_amounts(demo: "Bank") -> None:
    kata_accounts(demo, "a1", "b1")
    names = ("wallets:user_bob", "atm:1003", "bank:a1")
    ids = [demo.get("/accounts", name=name).json()["items"][0]["id"] for name in names]
    spent = move_credits(demo, "user_bob", "spend", "1000").json()
    taken = demo.post("/atm/accounts/1003/withdraw", amount="1.50").json()
    ends = {"source_account_id": "a1", "target_account_id": "b1"}
    moved = demo.post("/bank/transfers", timestamp=1, amount=150, **ends).json()
    assert [told["account_id"] for told in (spent, taken, moved)] == ids
    assert [told["requested"] for told in (spent, taken, moved)] == ["1000.0000", "1.50", 150]
    # A name that nobody has is no id.
    ends["source_account_id"] = "b1"
    for missing in (
        move_credits(demo, "nobody", "spend", 1),
        demo.get("/atm/accounts/9/balance"),
        demo.post("/atm/accounts/9/deposit", amount="1"),
        demo.post("/bank/deposits", timestamp=1, account_id="nobody", amount=1),
        demo.post("/bank/transfers", timestamp=1, amount=1, **ends),
    ):
        assert refusal(missing)[1] in ("account_not_found", "same_account")
        assert "account_id" not in missing.json()
    exists = demo.post("/bank/accounts", timestamp=1, account_id="a1").json()
    assert (exists["code"], exists["account_id"]) == ("account_exists", ids[2])


# ----- Application
# Settings, first accounts, routing, headers, and what happens by itself while it runs.


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


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"LEDGER_JWT_SECRET": "x" * 31}, "below the minimum recommended length of 32 bytes"),
        ({"LEDGER_JWT_SECRET": "ssh-rsa " + "x" * 32}, "LEDGER_JWT_SECRET cannot be used"),
        ({"LEDGER_ADMIN_KEY": "with a blank"}, "LEDGER_ADMIN_KEY must be 16 visible ASCII"),
        ({"LEDGER_ADMIN_KEY": "x" * 15}, "LEDGER_ADMIN_KEY must be 16 visible ASCII"),
        ({"LEDGER_ADMIN_KEY": "schl\u00fcssel"}, "LEDGER_ADMIN_KEY must be 16 visible ASCII"),
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


def test_the_program_names_its_packages_as_the_requirements_do() -> None:
    header = re.match("# /// script\n((?:#.*\n){1,13})# ///\n", PROGRAM.read_text())
    assert header
    named = tomllib.loads(re.sub("(?m)^# ?", "", header[1]))
    runtime = PROGRAM.with_name("requirements.txt").read_text().partition("# Tests")[0]
    lines = [line.partition("#")[0].strip() for line in runtime.splitlines()]
    assert named["dependencies"] == [line for line in lines if line]
    assert named["requires-python"] == ">=3.11"
    # What is installed to serve is the same, and all that it stands on.
    pinned = PROGRAM.with_name("deploy").joinpath("requirements.txt").read_text()
    for line in named["dependencies"]:
        package = re.sub(r"\[.*\]", "", line.partition(";")[0]).replace("_", "-")
        assert re.search(rf"(?m)^{re.escape(package)}( |$)", pinned), package


def test_uvicorn_finds_the_application_and_a_bad_setting_ends_it_in_one_line(
    tmp_path: Path,
) -> None:
    target, command = COMMANDS["uvicorn"]
    bad = {"LEDGER_DATABASE_URL": "mysql://x"}
    ran = run_program(*command, folder=tmp_path, target=target, **bad)
    assert ran.returncode != 0
    assert ran.stderr == "ledger: the database must be a plain file, such as sqlite:///ledger.db\n"


def test_a_refused_opening_leaves_nothing(bank: "BankInside") -> None:
    fill_cash(bank)
    before = bank.contents()
    with pytest.raises(ledger.StartupError, match="balance_limit"):
        ledger.create_app(ledger.Settings(bank.database, '{"555": "1.00"}'))
    assert bank.contents() == before


@at_the_edge
@pytest.mark.parametrize(
    "path",
    ["/account", "/accounts/", "//accounts", "/transfers/x", "/x%2f", "/accounts%0A",
     "/health%0A"],
)  # fmt: skip
def test_an_unknown_path_is_not_found(untouched: "Bank", path: str) -> None:
    assert refusal(untouched.send("GET", f"http://localhost{path}")) == (404, "not_found")


@at_the_edge
def test_a_wrong_method_is_told_the_right_one(untouched: "Bank") -> None:
    refused = untouched.send("DELETE", "/transfers")
    assert refusal(refused) == (405, "method_not_allowed")
    assert refused.headers["Allow"] == "POST"
    assert untouched.send("DELETE", "/accounts").headers["Allow"] == "GET, HEAD, POST"


def test_head_is_get_without_the_body(server: "Server") -> None:
    shown, told = (server.bank.send(method, "/accounts") for method in ("GET", "HEAD"))
    assert (told.status_code, told.content) == (200, b"")
    assert told.headers["Content-Length"] == str(len(shown.content))
    assert server.bank.send("HEAD", "/transfers").status_code == 405


def test_the_api_describes_itself(demo: "Bank") -> None:
    paths = demo.get("/openapi.json").json()["paths"]
    assert demo.get("/openapi.json").json()["paths"] == paths, "it is made once"
    given = {
        path: item["get"].get("parameters", []) for path, item in paths.items() if "get" in item
    }
    by_metadata = {path for path in given if "metadata" in [each["name"] for each in given[path]]}
    assert by_metadata == {"/accounts", "/totals", "/transactions"}
    described = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert described == set(MATRIX) - {("GET", "/metrics")} | DESCRIBED
    transfer = paths["/transfers"]["post"]
    assert transfer["parameters"][0]["name"] == "Idempotency-Key"
    assert transfer["parameters"][0]["required"] is True
    refused = transfer["responses"]["409"]["content"]["application/problem+json"]
    assert refused["schema"] == {"$ref": "#/components/schemas/Problem"}
    assert refused["examples"]["insufficient_funds"]["value"]["status"] == 409
    assert transfer["operationId"] == "create_transfer"
    shown = transfer["responses"]["200"]["content"]["application/json"]["example"]
    assert (shown["source"]["status"], shown["source"]["external_id"]) == ("ACTIVE", "text")
    missing = paths["/accounts/{account_id}"]["get"]["responses"]["404"]["content"]
    assert [*missing["application/problem+json"]["examples"]] == ["account_not_found"]
    [limit] = [p for p in paths["/accounts"]["get"]["parameters"] if p["name"] == "limit"]
    assert (limit["schema"]["minimum"], limit["schema"]["maximum"]) == (1, 200)
    assert transfer["security"] == [{"X-API-Key": []}, {"Bearer": []}]
    assert "Roles: service, admin." in transfer["description"]
    assert "security" not in paths["/health"]["get"]
    assert "text/html" in demo.get("/docs").headers["Content-Type"]


@at_the_edge
def test_the_docs_need_no_network(untouched: "Bank") -> None:
    page = untouched.get("/docs").text
    assert "//" not in page
    named = re.findall("(?:src|href)=\"(/[^\"]+)|url: '([^']+)", page)
    answers = [untouched.get("".join(path)) for path in named]
    assert [answer.status_code for answer in answers] == [200] * 3
    kinds = [answer.headers["Content-Type"].partition(";")[0] for answer in answers]
    assert [kind.partition("/")[2] for kind in kinds] == ["css", "javascript", "json"]
    assert "SwaggerUIBundle" in answers[1].text


def measured(bank: "Bank", name: str) -> dict[tuple[str, ...], float]:
    """Return what Prometheus is told under a name, by its labels."""
    families = text_string_to_metric_families(bank.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {tuple(s.labels.values()): s.value for s in samples if s.name == name}


def test_requests_are_counted_by_route_and_status_alone(secured: "BankInside") -> None:
    key = new_api_key(secured.database, "prometheus", "auditor")
    admin = secured.by(ADMIN_KEY).given({PRIVATE_NAME: 5})
    for path in (
        "/accounts/x",
        f"/accounts/{secured.ids[PRIVATE_NAME]}",
        f"/{PRIVATE_NAME}",
        "/no",
    ):
        admin.get(path)
    for method in ("HEAD", "BREW", PRIVATE_NAME):
        admin.send(method, "/accounts")
    prometheus = secured.by(f"Bearer {key}", "Authorization")
    assert measured(prometheus, "ledger_http_seconds_count") == {
        ("POST /accounts", "201"): 1,
        ("POST /accounts/{account_id}/deposit", "200"): 1,
        ("GET /accounts/{account_id}", "422"): 1,
        ("GET /accounts/{account_id}", "200"): 1,
        ("HEAD /accounts", "200"): 1,
        ("unknown", "404"): 2,
        ("unknown", "405"): 2,
    }
    assert sum(measured(prometheus, "ledger_http_seconds_sum").values()) > 0


def test_transactions_are_counted_by_kind_once_they_are_committed(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0)
    bank.promised("alice", "bob", 5)
    path, body = "/transfers", bank.transfer_body()
    unknown = f"/transactions/{NOBODY}/reverse"
    # The second looks into the database in the middle of the batch, and is refused.
    bank.together((path, body, "k"), (unknown, {}), (path, body), (path, body, "k"))
    # The first of these is made, and taken back.
    refused = bulk(bank, *[item(bank, "alice", "bob", 60)] * 2)
    assert refusal(refused) == (409, "bulk_failed")
    bank.reverse(bank.last("bob"))
    kinds = dict(bank.rows("SELECT kind, COUNT(*) FROM event WHERE kind < 'a' GROUP BY kind"))
    assert kinds == {"DEPOSIT": 1, "TRANSFER": 2, "REVERSAL": 1}
    counted = measured(bank, "ledger_transactions_total")
    assert counted == {(kind,): count for kind, count in kinds.items()}


def test_batches_are_measured_and_what_waits_for_one(bank: "BankInside") -> None:
    names = ("batch_commands_count", "batch_commands_sum", "commit_seconds_count")
    before = [measured(bank, f"ledger_{name}")[()] for name in names]

    async def look_while_some_wait() -> str:
        command = command_of(ledger.open_account, owner_name="x", asset="USD")
        executing = asyncio.gather(*(bank.ledger.submit(command) for _ in range(3)))
        await asyncio.sleep(0)
        shown = await ledger.get_metrics(bank.ledger.database)
        await executing
        return bytes(shown.body).decode()

    assert "\nledger_waiting_commands 3.0\n" in bank.runner.run(look_while_some_wait())
    after = [measured(bank, f"ledger_{name}")[()] for name in names]
    assert [new - old for old, new in zip(before, after, strict=True)] == [1, 3, 1]
    assert measured(bank, "ledger_waiting_commands") == {(): 0}


@on_sqlite
def test_a_mistake_in_what_is_due_is_logged_and_does_not_end_the_work(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ledger, "seal_events", None)
    work_until_two_are_told(bank, caplog)
    assert caplog.messages[0] == "receipts or cashbacks met a mistake, and will be tried again"
    assert "TypeError" in caplog.text


def test_the_metrics_tell_the_program_its_process_and_its_log(bank: "BankInside") -> None:
    bank.given(alice=5)
    info = measured(bank, "ledger_info")
    assert info == {(str(ledger.SCHEMA_VERSION), ledger.__version__): 1}
    for name in ("process_cpu_seconds_total", "process_resident_memory_bytes", "process_open_fds"):
        assert measured(bank, name)[()] > 0 or sys.platform != "linux"
    for name in ("commit", "http"):
        bounds = {
            bound for labels in measured(bank, f"ledger_{name}_seconds_bucket") for bound in labels
        }
        assert {"0.0005", "0.001", "10.0"} < bounds
    if bank.database.startswith("sqlite"):
        size = Path(f"{file_of(bank.database)}-wal").stat().st_size
        assert measured(bank, "ledger_log_bytes") == {(): size}


def test_the_metrics_tell_how_old_the_oldest_receipt_is_that_waits(bank: "BankInside") -> None:
    subscribe(bank, "http://127.0.0.1:1")
    bank.given(alice=5)
    bank.pass_time(HOUR)
    deliver(bank)
    assert 3_600 <= measured(bank, "ledger_undelivered_seconds")[()] < 3_700
    listed = printed(bank.database, "webhook", "list").splitlines()
    assert listed[-1].split() == ["last", "error:", "ConnectError"]


def test_each_application_measures_for_itself(bank: "BankInside") -> None:
    bank.given(alice=5)
    with opened(bank.database) as other:
        assert measured(other, "ledger_transactions_total") == {}
        assert measured(other, "ledger_http_seconds_count") == {("GET /metrics", "200"): 1}


def test_a_damaged_event_is_shown_as_such_or_named(bank: "Bank") -> None:
    bank.given(alice=100)
    bank.tamper_freely("UPDATE event SET arguments = '{' WHERE kind = 'DEPOSIT'")
    details = [event["details"] for event in bank.get("/audit").json()["items"]]
    assert details[0] == {"damaged": "{"}
    assert details[1]["body"] == {"owner_name": "alice", "asset": "USD"}
    bank.tamper_freely("UPDATE event SET id = 'zz' WHERE kind = 'open_account'")
    refused = bank.deposit("alice", 1)
    assert refusal(refused) == (503, "database_unavailable")
    assert refused.json()["detail"] == "The event 'zz' is damaged: run python ledger.py check"


def test_every_answer_is_for_its_caller_alone(bank: "Bank") -> None:
    bank.given(alice=1)
    paths = ("/accounts", "/health", "/docs", "/openapi.json", "/nowhere", "/accounts/x")
    for answer in (*(bank.get(path) for path in paths), bank.withdraw("alice", 9)):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] == "no-store"
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])


@at_the_edge
@pytest.mark.parametrize(
    ("given", "is_sane"),
    [("5f3a:web-1.x_y", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False),
     ('"', False), (b"\xe9", False), ("a\tb", False)],
)  # fmt: skip
def test_a_request_keeps_its_sane_id(untouched: "BankInside", given: Any, is_sane: bool) -> None:
    answer = untouched.send("GET", "/health", headers={"X-Request-ID": given})
    assert (answer.headers["X-Request-ID"] == given) == is_sane
    assert untouched.app.state.log.lines[-1]["request_id"] == answer.headers["X-Request-ID"]


def test_a_mistake_of_the_server_is_logged_and_answered_in_one_line(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger, "find_account", lambda *arguments: 1 / 0)
    refused = bank.get(f"/accounts/{NOBODY}")
    assert refusal(refused) == (500, "internal_error")
    assert refused.headers["X-Content-Type-Options"] == "nosniff"
    assert f"the server made a mistake in request {refused.headers['X-Request-ID']}" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert bank.app.state.log.lines[-1]["status"] == 500
    # In a write too, where the batch lies between, the log tells in which function it was.
    monkeypatch.setattr(ledger, "deposit", lambda *arguments, **others: 1 / 0)
    bank.ids["x"] = NOBODY
    assert refusal(bank.deposit("x", 1)) == (500, "internal_error")
    assert "in create_deposit" in caplog.text


def test_nothing_of_ours_is_framed(untouched: "Bank") -> None:
    for path in ("/", "/docs", "/openapi.json", "/accounts", "/no"):
        assert untouched.get(path).headers["X-Frame-Options"] == "DENY"


@on_sqlite
def test_a_large_body_is_read_only_of_who_may_send_it(database: str) -> None:
    with serving(database, LEDGER_ADMIN_KEY=ADMIN_KEY) as server:
        head = f"POST /transfers/bulk HTTP/1.1\r\n{HEAD.decode()}"
        for length in ("Content-Length: 300000", "Transfer-Encoding: chunked"):
            with socket.create_connection(server.bank.address(), timeout=30) as wire:
                wire.sendall(f"{head}{length}\r\n\r\n".encode())
                if "chunked" in length:
                    wire.sendall(b"11170\r\n" + b" " * 70_000)
                assert wire.recv(99).startswith(b"HTTP/1.1 401")


def test_unfinished_bodies_take_room_that_all_share(database: str) -> None:
    with opened(database) as bank:
        bank.given(alice=0)
        bank.app.state.receiving = ledger.Room(1_000)

        async def send_in_parts(size: int) -> httpx.Response:
            async def parts() -> AsyncIterator[bytes]:
                yield b'{"amount": 1, "memo": "'
                yield b"m" * 150 + b" " * 0
                yield b'"}' + b" " * size

            path = f"/accounts/{bank.ids['alice']}/deposit"
            headers = {"Idempotency-Key": new_key(), "Content-Type": "application/json"}
            return await bank.ask("POST", path, content=parts(), headers=headers)

        assert bank.runner.run(send_in_parts(0)).status_code == 200
        refused = bank.runner.run(send_in_parts(2_000))
        assert refusal(refused) == (503, "database_busy")
        assert bank.app.state.receiving.bytes_free == 1_000
        # What comes at once waits for nobody.
        assert bank.deposit("alice", 1, memo="m" * 200).status_code == 200


def test_answers_that_are_sent_take_room_that_all_share(
    demo: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "PART_BYTES", 100)
    demo.app.state.sending = room = ledger.Room(1_000)
    demo.given({f"person {number}": 0 for number in range(9)})
    refused = demo.get("/accounts", limit=9)
    assert refusal(refused) == (503, "database_busy")
    assert refused.headers["Retry-After"] == "1"
    assert demo.get("/accounts", limit=1).status_code == 200
    assert room.bytes_free == 1_000
    # A change that was made is told, however much that is.
    made = bulk(demo, *[item(demo, "person 1", "person 2", 1)] * 9, atomic=False)
    assert (made.status_code, len(made.json()["results"])) == (200, 9)


def test_a_cursor_outlives_a_rewording_of_its_query(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    bank.given(alice=0, bob=0)
    first = bank.get("/accounts", limit=1).json()
    monkeypatch.setattr(ledger, "ACCOUNTS", f"{ledger.ACCOUNTS} ")
    later = bank.get("/accounts", limit=1, cursor=first["next_cursor"]).json()
    assert [a["owner_name"] for a in first["items"] + later["items"]] == ["alice", "bob"]


@pytest.mark.parametrize("path", ["/transactions", "/accounts", "/audit"])
def test_a_page_is_bounded_in_bytes(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    bank.given(alice=100, bob=0)
    metadata = {f"name {number}": "x" * 500 for number in range(4)}
    for _ in range(8):
        bank.post("/accounts", owner_name="carol", metadata=metadata)
        bank.transfer("alice", "bob", 1, metadata=metadata)
    [whole] = bank.pages(path, limit=200)
    monkeypatch.setattr(ledger, "PAGE_BYTES_MAX", 6_000)
    pages = list(bank.pages(path, limit=200))
    assert [row for page in pages for row in page] == whole
    assert len(pages) > 3
    assert all(page for page in pages)


@on_sqlite
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="it reads /proc")
@pytest.mark.parametrize("how", ["reset", "unread"])
def test_connections_take_little_memory(database: str, how: str) -> None:
    with serving(database) as server, ExitStack() as stack:
        for _ in range(20):
            server.bank.get("/docs/files/swagger-ui-bundle.js")
        before = resident(server)
        for _ in range(400):
            wire = stack.enter_context(socket.create_connection(server.bank.address()))
            if how == "unread":
                wire.sendall(
                    b"GET /docs/files/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
                )
            else:
                padding = b"".join(b"x-%d: %s\r\n" % (n, b"y" * 5_000) for n in range(11))
                wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n%s\r\n" % padding)
                assert wire.recv(15) == b"HTTP/1.1 200 OK"
                wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                wire.close()
        assert server.bank.get("/health").status_code == 200
        # Of 60 kB or 1.5 MB each: some 24 and 600 MB, if they were kept.
        assert resident(server) - before < (12 if how == "reset" else 100) * 2**20


def resident(server: "Server") -> int:
    """Return how much memory a server takes."""
    pages = Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@on_sqlite
def test_an_idle_connection_is_kept_for_longer_than_a_request_may_take(database: str) -> None:
    assert ledger.KEEP_ALIVE_SECONDS > 60  # As nginx keeps its own.
    start = partial(as_fork, target=run_patient)
    with serving(database, start=start) as server, ExitStack() as stack:
        call = socket.create_connection(server.bank.address(), timeout=30)
        wire = stack.enter_context(call)
        for pause in (0, 3):
            time.sleep(pause)
            wire.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            answer = b""
            while not answer.endswith(b'{"status":"ok"}'):
                answer += (part := wire.recv(65_536))
                assert part


def run_patient(*given: Any) -> None:
    """Serve callers who have some seconds for a request, and many for the next one."""
    ledger.REQUEST_SECONDS_MAX, ledger.KEEP_ALIVE_SECONDS = 2, 60
    run_main(*given)


# The application as one of FastAPI's: what its users add to it, and where they put it.


def add_five(number: int, five: Annotated[int, Depends(lambda: 5)]) -> int:
    """Be a route of somebody's own."""
    return number + five


def test_an_application_takes_routes_and_middleware_of_its_users(database: str) -> None:
    app = ledger.create_app(ledger.Settings(database))
    router = APIRouter()
    router.get("/add")(add_five)
    app.get("/add")(add_five)
    app.include_router(router, prefix="/mine", dependencies=[Depends(lambda: 1)])

    @app.middleware("http")
    async def mark(request: Request, go_on: Callable[..., Any]) -> Any:
        response = await go_on(request)
        response.headers["X-Mine"] = "yes"
        return response

    with TestClient(app) as client:
        for path in ("/add", "/mine/add"):
            answer = client.get(path, params={"number": 2})
            assert (answer.json(), answer.headers["X-Mine"]) == (7, "yes")
            assert {"x-request-id", "x-content-type-options"} <= answer.headers.keys()
            # What is wrong with them is said as FastAPI says it.
            assert "detail" in client.get(path, params={"number": "x"}).json()
            assert path in client.get("/openapi.json").json()["paths"]
        assert client.get("/accounts").headers["X-Mine"] == "yes"
        assert client.get("/no").json()["code"] == "not_found"


def test_a_route_of_the_users_refuses_as_fastapi_does(database: str) -> None:
    app = ledger.create_app(ledger.Settings(database))

    @app.get("/tea")
    def make_tea() -> None:
        raise HTTPException(404, "no tea")

    with TestClient(app) as client:
        assert client.get("/tea").json() == {"detail": "no tea"}
        assert client.get("/tea").headers["content-type"] == "application/json"


def test_pages_of_other_origins_may_ask_where_cors_allows_it_and_there_are_keys(
    database: str,
) -> None:
    other = {"Origin": "http://other.localhost"}
    allowed: Any = {"allow_origins": list(other.values()), "allow_headers": ["*"]}
    for admin_key, status in ((ADMIN_KEY, 200), (None, 403)):
        app = ledger.create_app(ledger.Settings(database, admin_key=admin_key))
        app.add_middleware(CORSMiddleware, **allowed)
        with TestClient(app, headers={**other, "X-API-Key": ADMIN_KEY}) as client:
            asked = {"Access-Control-Request-Method": "GET"}
            assert client.options("/accounts", headers=asked).status_code == 200
            answer = client.get("/accounts")
            assert answer.status_code == status
            assert answer.headers["Access-Control-Allow-Origin"] == other["Origin"]


def test_opentelemetry_sees_requests_by_their_routes(database: str) -> None:
    spans = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    app = ledger.create_app(ledger.Settings(database))
    FastAPIInstrumentor.instrument_app(app, tracer_provider=provider)
    with TestClient(app) as client:
        client.get(f"/accounts/{NOBODY}")
    seen = [dict(span.attributes or {}) for span in spans.get_finished_spans()]
    assert [s["http.route"] for s in seen if "http.route" in s] == ["/accounts/{account_id}"]


def test_a_ledger_is_mounted_in_another_application(database: str) -> None:
    books = ledger.create_app(ledger.Settings(database))
    main = FastAPI(lifespan=lambda _: ledger.lifespan(books))
    main.mount("/ledger", books)
    for _ in range(2):
        with TestClient(main) as client:
            opened = client.post("/ledger/accounts", json={"owner_name": "alice"})
            assert opened.headers["Location"] == f"/ledger/accounts/{opened.json()['id']}"
            assert client.get(opened.headers["Location"]).json() == opened.json()
            assert client.get("/ledger/openapi.json").json()["servers"] == [{"url": "/ledger"}]
            assert "'/ledger/openapi.json'" in client.get("/ledger/docs").text
            assert client.get("/ledger/").headers["Content-Type"].startswith("text/html")
            assert client.get("/ledger/no").json()["code"] == "not_found"
        assert not books.state.ledger.database.is_open


@at_the_edge
@pytest.mark.parametrize("command", ["uvicorn", "ledger"])
def test_a_proxy_may_strip_the_prefix_or_not(database: str, command: str) -> None:
    with served_by(database, command, "--root-path", "/money") as (bank, _):
        for prefix in ("/money", ""):
            opened = bank.send("POST", f"{prefix}/accounts", json={"owner_name": "alice"})
            assert opened.headers["Location"] == f"/money/accounts/{opened.json()['id']}"
            described = bank.get(f"{prefix}/openapi.json").json()
            assert described["servers"] == [{"url": "/money"}]
            assert "'/money/openapi.json'" in bank.get(f"{prefix}/docs").text
            # The page asks for what is beside it.
            assert "fetch(`.${path}" in bank.get(f"{prefix}/").text


# On a busy machine a process may take longer to begin than uvicorn waits for one.
TWO_WORKERS = "--workers 2 --timeout-worker-healthcheck 60"


@at_the_edge
@pytest.mark.parametrize("command", ["uvicorn", f"uvicorn {TWO_WORKERS}", "fastapi"])
def test_other_programs_serve_the_application(database: str, command: str) -> None:
    with served_by(database, *command.split()) as (bank, log):
        bank.given(alice=5, bob=0)
        answers = [bank.transfer("alice", "bob", 1) for _ in range(6)]
        assert [answer.status_code for answer in answers] == [200] * 5 + [409]
        # A line of somebody else's would hold paths, and so names.
        assert bank.ids["alice"] not in log.read_text()


@pytest.mark.parametrize("run", ["client", "httpx"])
def test_an_application_can_be_called_without_its_lifespan(database: str, run: str) -> None:
    app = ledger.create_app(ledger.Settings(database, preload_accounts="{}"))
    with closing(app.state.ledger.database):
        answer: Any
        if run == "client":
            answer = TestClient(app).post("/accounts", json={"owner_name": "alice"})
        else:
            answer = asyncio.run(ask_inside(app, "POST", "/accounts", json={"owner_name": "alice"}))
        assert answer.status_code == 201


async def ask_inside(app: FastAPI, *request: Any, **options: Any) -> httpx.Response:
    """Ask an application as tests of its users do, under a name that is nobody's."""
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        return await client.request(*request, **options)


def test_a_program_is_told_what_it_does_not_say_well(books: ledger.Books, database: str) -> None:
    for furthest, beyond in ((10**18, 1), (-(10**17), -1)):
        assert books.transactions(from_=furthest, to=furthest).items == []
        with pytest.raises(ledger.InvalidRequest):
            books.transactions(from_=furthest + beyond)
    for caller in ("", None, "a\0b", 5):
        with pytest.raises(ledger.StartupError, match="the caller's name must be"):
            ledger.open_ledger(database, caller=caller)  # type: ignore[arg-type]


def test_what_is_no_ledger_is_refused_to_a_program(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"a letter, and no ledger" * 100)
    with pytest.raises(ledger.StartupError, match="cannot open"):
        ledger.open_ledger(f"sqlite:///{tmp_path}/x.db")


def test_two_ledgers_live_in_one_process(new_database: "NewDatabase") -> None:
    with new_database() as first, new_database() as second, ExitStack() as stack:
        apps = [ledger.create_app(ledger.Settings(url)) for url in (first, second)]
        clients = [stack.enter_context(TestClient(app)) for app in apps]
        for number, client in enumerate(clients):
            client.post("/accounts", json={"owner_name": f"owner {number}"})
        for number, client in enumerate(clients):
            found = client.get("/accounts", params={"owner_name": f"owner {number}"}).json()
            assert len(found["items"]) == 1
            other = {"owner_name": f"owner {1 - number}"}
            assert client.get("/accounts", params=other).json()["items"] == []


HOST = """
import os, threading
from sqlmodel import Field, Session, SQLModel, create_engine, select
class Before(SQLModel, table=True):
    __tablename__ = "account"
    id: int | None = Field(default=None, primary_key=True)
    name: str = Field(max_length=7)
import ledger
print(os.listdir(), threading.active_count())
class After(SQLModel, table=True):
    __tablename__ = "event"
    id: int | None = Field(default=None, primary_key=True)
engine = create_engine("sqlite://")
SQLModel.metadata.create_all(engine)
with Session(engine) as session:
    session.add(Before(name="mine"))
    session.commit()
    print(session.exec(select(Before)).one().name, Before.__table__.c.name.type)
engine.dispose()
with ledger.open_ledger("sqlite:///books.db") as books:
    print(books.open_account(owner_name="alice").owner_name, len(SQLModel.metadata.tables))
"""


def test_an_import_has_no_effect_and_leaves_a_program_its_own_tables() -> None:
    ran = run_python("-W", "error", "-c", HOST, PYTHONPATH=str(PROGRAM.parent), PORT="bad")
    assert (ran.stdout, ran.stderr) == ("[] 1\nmine VARCHAR(7)\nalice 2\n", "")


def test_dependencies_that_would_not_run_are_refused() -> None:
    router = APIRouter(route_class=ledger.LedgerRoute)
    with pytest.raises(TypeError, match="takes no dependencies"):
        router.get("/health", dependencies=[Depends(lambda: 1)])(ledger.get_health)


def test_the_ledgers_routes_are_mounted_and_not_included() -> None:
    app = FastAPI()
    app.include_router(ledger.api, dependencies=[Depends(lambda: 1)])
    with pytest.raises(TypeError, match="cannot be included"):
        TestClient(app).get("/health")


def test_a_route_says_who_may_call_it() -> None:
    router = APIRouter(route_class=ledger.LedgerRoute)

    def forget(connection: ledger.SqliteConnection) -> ledger.Health:
        return ledger.Health()

    with pytest.raises(TypeError, match="forget"):
        router.get("/forgotten")(forget)


def pay_yesterday(database: str, people: int, payments: int) -> None:
    """Make a ledger in which everybody paid 100 some times, a day ago, and has nothing left."""
    with opened(database) as bank:
        yesterday = ledger.utc_now() - DAY
        ledger.utc_now = lambda: yesterday
        bank.given({f"person {number}": 100 * payments for number in range(people)})
        for name in list(bank.ids) * payments:
            assert bank.pay(name, 100).status_code == 200


def test_the_server_credits_what_fell_due_while_it_was_down(database: str) -> None:
    pay_yesterday(database, people=1, payments=1)
    with serving(database) as server:
        wait_until(lambda: server.bank.balances() == {"person 0": 2})


def test_two_servers_credit_each_cashback_once(database: str) -> None:
    pay_yesterday(database, people=20, payments=3)
    with serving(database) as one, serving(database) as other:
        for server in (one, other):
            wait_until(lambda bank=server.bank: set(bank.balances().values()) == {6})  # type: ignore[misc]
        assert one.bank.rows("SELECT COUNT(*) FROM event WHERE kind = 'CASHBACK'") == [(60,)]
        assert one.bank.wrong() == []


def test_what_is_due_by_the_ledgers_own_time_is_credited(database: str) -> None:
    with opened(database) as bank:
        bank.given(alice=100, bob=0).pay("alice", 100)
        bank.pass_time(0)
        now = ledger.utc_now()
        ledger.utc_now = lambda: now + 2 * DAY
        bank.deposit("bob", 1)
        ledger.utc_now = lambda: now
    with serving(database) as server:
        wait_until(lambda: server.bank.balances() == {"alice": 2, "bob": 1})


def test_a_clock_behind_the_newest_event_is_told_at_the_start_in_the_log_and_as_a_metric(
    database: str,
) -> None:
    with opened(database) as bank:
        bank.pass_time(2 * HOUR)
        bank.given(alice=5)
    said = "this machine's clock is 7,000 s behind the newest event"
    with serving(database) as server:
        assert server.said[3].startswith(f"  clock     {said}: holds and cashbacks")
        wait_until(lambda: said in server.log.read_text())
        metrics = measured(server.bank, "ledger_clock_behind_seconds")
        assert 7_000 < metrics["newest event",] <= 7_200
        assert abs(metrics["database server",]) < 60
        wait_until(lambda: server.log.read_text().count("/metrics") == 1)
        assert server.log.read_text().count(said) == 1


def run_behind(*given: Any) -> None:
    """Serve by a clock that is two minutes behind."""
    ledger.utc_now = lambda: time.time_ns() // 1_000 - 120_000_000
    run_main(*given)


def test_a_clock_that_is_away_from_the_servers_is_told(database: str) -> None:
    with serving(database, start=partial(as_fork, target=run_behind)) as server:
        told = "clock is 100 s behind the database server"
        # A file has no clock of its own.
        is_told = database.startswith("postgresql")
        assert sum(told in line for line in server.said) == is_told
        wait_until(lambda: (told in server.log.read_text()) >= is_told)


@on_sqlite
def test_a_wrong_clock_is_logged_when_it_changes_and_when_it_is_right_again(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger, "POLL_SECONDS", 0.01)
    bank.given(alice=5).pass_time(0)
    now = ledger.utc_now()

    async def look_at_clocks() -> None:
        working = asyncio.create_task(ledger.work_for_ever(bank.ledger))
        for minutes, lines in ((4, 0), (10, 1), (10, 1), (600, 2), (0, 3)):
            monkeypatch.setattr(ledger, "utc_now", partial(int, now - minutes * 60_000_000))
            await asyncio.sleep(0.2)
            while len(caplog.messages) < lines:
                await asyncio.sleep(0.02)
        working.cancel()
        with suppress(asyncio.CancelledError):
            await working

    bank.runner.run(look_at_clocks())
    starts = [message.partition(":")[0] for message in caplog.messages]
    is_behind = "this machine's clock is {} s behind the newest event"
    assert starts == [is_behind.format(n) for n in ("600", "40,000")] + [
        "this machine's clock is right again"
    ]


# ----- Receipts
# A receiver in a process of its own has what happens posted to it, over real connections.


def test_a_receipt_is_signed_as_the_published_example() -> None:
    signed = 'msg_p5jXN8AQM9LWM0D4loKWxJek.1614265330.{"test": 2432232314}'
    signature = ledger.sign("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", signed)
    assert signature == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_a_receiver_has_what_happens_from_then_on_in_order(
    bank: "BankInside", receiver: "Receiver"
) -> None:
    bank.given(alice=100)
    secret = subscribe(bank, receiver.answering(200))
    bank.given(bob=0).transfer("alice", "bob", 5)
    bank.step("bob", "freeze")
    deliver(bank)
    receipts = receiver.receipts()
    events = bank.get("/events").json()["items"][-3:]
    for receipt, event in zip(receipts, events, strict=True):
        about = {"type": event["type"], "timestamp": event["ts"], "data": event["data"]}
        assert json.loads(receipt.body) == about
        assert receipt.headers["webhook-id"] == event["id"]
        sent_at = receipt.headers["webhook-timestamp"]
        assert abs(int(sent_at) - time.time()) < 60
        signature = ledger.sign(secret, f"{event['id']}.{sent_at}.{receipt.body}")
        assert receipt.headers["webhook-signature"] == signature
        assert receipt.headers["content-type"] == "application/json"
    assert len({receipt.connection for receipt in receipts}) == 1
    deliver(bank)
    assert len(receiver.receipts()) == 3


@pytest.mark.parametrize("status", [500, 307, 404, 0, -1])
def test_what_a_receiver_does_not_take_is_posted_again(
    bank: "BankInside", receiver: "Receiver", status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if status == 0:
        monkeypatch.setattr(ledger, "RECEIPT_SECONDS_MAX", 0.5)
    subscribe(bank, receiver.answering(status) if status >= 0 else "http://127.0.0.1:1")
    bank.given(alice=7)
    for number, pause in enumerate([5, 30, 300, 1_800, 3_600, 3_600], start=1):
        began = time.time()
        deliver(bank)
        [[failures, due_at]] = bank.rows("SELECT failures, due_at FROM webhook")
        assert failures == number
        assert began + pause <= due_at / 1_000_000 <= time.time() + pause
        # Nothing is posted before its time.
        deliver(bank)
        wait_no_longer(bank)
    tried = receiver.types()
    # Whom a busy machine gives up too soon has had less.
    assert tried == ["account.opened"] * {0: len(tried), -1: 0}.get(status, 6)
    monkeypatch.setattr(ledger, "RECEIPT_SECONDS_MAX", 10)
    receiver.answering(200)
    if status >= 0:
        deliver(bank)
        assert receiver.types()[-2:] == ["account.opened", "transaction.posted"]
        assert bank.rows("SELECT failures FROM webhook") == [(0,)]


def test_a_receipt_is_the_same_bytes_at_each_try(bank: "BankInside", receiver: "Receiver") -> None:
    subscribe(bank, receiver.answering(500))
    deliver(bank.given(alice=100, bob=0))
    held = bank.promised("alice", "bob", 5)
    receiver.answering(200)
    wait_no_longer(bank)
    deliver(bank)
    bank.capture(held)
    bank.reverse(bank.last("bob"))
    bank.send("PATCH", f"/accounts/{bank.ids['alice']}", json={"owner_name": "A"})
    # All goes out again, as from a server that has died before it noted what was taken.
    bank.tamper("UPDATE webhook SET due_at = 0, position = id")
    deliver(bank)
    receipts = receiver.receipts()
    bodies = {(receipt.headers["webhook-id"], receipt.body) for receipt in receipts}
    assert (len(receiver.ids()), len(bodies), len(receipts)) == (7, 7, 12)


def test_no_receiver_is_told_the_address_of_another(
    bank: "BankInside", receiver: "Receiver", caplog: pytest.LogCaptureFixture
) -> None:
    subscribe(bank, receiver.answering(200))
    subscribe(bank, receiver.answering(500, at="?token=1"))
    printed(bank.database, "webhook", "remove", receiver.answering(500, at="?token=1"))
    subscribe(bank, receiver.answering(410, at="?token=2"))
    bank.given(alice=7)
    ledger.silence_others()
    with bank.app.state.log.written_to(io.StringIO()), caplog.at_level(logging.INFO):
        deliver(bank)
        deliver(bank)
    told = [json.loads(receipt.body) for receipt in receiver.receipts()]
    assert [each["type"] for each in told].count("webhook.removed") == 2
    assert {each["data"].get("url") for each in told} == {None, receiver.address}
    shown = bank.get("/events").text + bank.get("/audit").text + str(told) + caplog.text
    assert "token" not in shown


def test_a_receiver_that_is_gone_is_told_nothing_more(
    bank: "BankInside", receiver: "Receiver"
) -> None:
    subscribe(bank, receiver.answering(410))
    bank.given(alice=7)
    deliver(bank)
    wait_no_longer(bank)
    deliver(bank)
    assert len(receiver.receipts()) == 1
    [event] = bank.get("/events").json()["items"][-1:]
    assert (event["type"], event["caller"]) == ("webhook.removed", "system")
    assert bank.wrong() == []


def test_a_failure_holds_up_its_own_receiver_alone(
    bank: "BankInside", receiver: "Receiver", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "RECEIPT_SECONDS_MAX", 60)
    subscribe(bank, receiver.answering(0, at="silent"))
    subscribe(bank, receiver.answering(200))
    bank.given(alice=7, bob=7)

    async def deliver_to_both() -> None:
        async with asyncio.TaskGroup() as tasks:
            await ledger.start_deliveries(bank.ledger, tasks)
            async with asyncio.timeout(ledger.RECEIPT_SECONDS_MAX):
                while len(receiver.receipts()) < 4:
                    await asyncio.sleep(0.02)
            # The other one still has its first, and has not answered.
            assert len(receiver.receipts("silent")) == 1
            receiver.answering(200, at="silent")

    bank.runner.run(deliver_to_both())
    # Neither was given up, so that the one was served while the other was waited for.
    assert bank.rows("SELECT failures FROM webhook") == [(0,), (0,)]
    had, silent = (
        [each.headers["webhook-id"] for each in receiver.receipts(at)] for at in ("", "silent")
    )
    assert (silent[-4:], len(silent)) == (had, len(set(silent)))


def test_a_receiver_can_be_for_one_account(bank: "BankInside", receiver: "Receiver") -> None:
    bank.given(alice=100, bob=0, carol=100)
    subscribe(bank, receiver.answering(200), "--account", bank.ids["bob"])
    hostile = {"memo": f'"account_id": "{bank.ids["bob"]}"', "metadata": {"id": bank.ids["bob"]}}
    bank.transfer("alice", "carol", 1, **hostile)
    bank.void(bank.promised("alice", "carol", 1))
    for _ in range(ledger.PAGE_SIZE):
        bank.deposit("carol", 1)
    bank.transfer("alice", "bob", 2)
    bank.void(bank.promised("alice", "bob", 1))
    bank.step("bob", "freeze")
    deliver(bank)
    about = ["transaction.posted", "hold.created", "hold.voided", "account.frozen"]
    assert receiver.types() == about


def test_a_receiver_that_was_down_is_posted_all_that_it_missed(
    bank: "BankInside", receiver: "Receiver"
) -> None:
    subscribe(bank, receiver.answering(500))
    bank.given({f"person {number}": 0 for number in range(2 * ledger.PAGE_SIZE + 1)})
    deliver(bank)
    assert measured(bank, "ledger_undelivered_events") == {(): 2 * ledger.PAGE_SIZE + 1}
    receiver.answering(200)
    wait_no_longer(bank)
    deliver(bank)
    deliver(bank)
    assert measured(bank, "ledger_undelivered_events") == {(): 0}
    names = [json.loads(receipt.body)["data"].get("owner_name") for receipt in receiver.receipts()]
    assert names == ["person 0", *bank.ids]


def test_of_two_who_find_a_receiver_at_one_moment_one_serves_it(
    bank: "BankInside", receiver: "Receiver"
) -> None:
    subscribe(bank, receiver.answering(200))
    bank.given(alice=7)
    with bank.ledger.database.read() as connection:
        found = [connection.rows("SELECT * FROM webhook")[0] for _ in range(2)]

    async def serve() -> None:
        await asyncio.gather(*(ledger.deliver(bank.ledger, webhook) for webhook in found))

    bank.runner.run(serve())
    assert receiver.types() == ["account.opened", "transaction.posted"]


def run_hasty(*given: Any) -> None:
    """Serve, and hold a turn with a receiver for a short time only."""
    ledger.POLL_SECONDS, ledger.SAVE_SECONDS, ledger.TURN_SECONDS = 0.1, 0, 4
    run_main(*given)


def serving_hastily(database: str) -> Any:
    """Serve so until the block ends."""
    return serving(database, start=partial(as_fork, target=run_hasty))


def leave_one_unanswered(server: "Server", receiver: "Receiver") -> None:
    """Let a receiver have six receipts, and not answer the seventh."""
    subscribe(server.bank, receiver.answering(200))
    server.bank.given({f"person {number}": 0 for number in range(6)})
    wait_until(lambda: len(receiver.receipts()) == 6)
    receiver.answering(0)
    server.bank.given({"person 6": 0})
    wait_until(lambda: len(receiver.receipts()) == 7)


@pytest.mark.parametrize("hours", [0.5, 1, 366 * 24, -366 * 24])
@pytest.mark.parametrize(("status", "failures"), [(200, 0), (500, 2)])
def test_a_clock_that_is_moved_stops_no_receipts(
    bank: "BankInside", receiver: "Receiver", hours: float, status: int, failures: int
) -> None:
    subscribe(bank, receiver.answering(status))
    bank.given(alice=7)
    deliver(bank)
    # The row says later what it said before, as by a clock that was set back since.
    bank.tamper(f"UPDATE webhook SET due_at = due_at + {int(hours * HOUR)} WHERE due_at > 0")
    bank.deposit("alice", 1)
    deliver(bank)
    assert bank.rows("SELECT failures FROM webhook") == [(failures,)]
    assert len(receiver.receipts()) == (2 if failures else 3)


@on_sqlite
def test_a_clock_that_is_set_back_stops_no_receipts_of_a_file(
    bank: "BankInside", receiver: "Receiver"
) -> None:
    subscribe(bank, receiver.answering(200))
    bank.given(alice=7)
    deliver(bank)
    bank.pass_time(-HOUR)
    bank.deposit("alice", 1)
    deliver(bank)
    assert len(receiver.receipts()) == 3


def test_a_turn_that_a_clock_has_left_far_ahead_is_over_after_a_restart(
    database: str, receiver: "Receiver"
) -> None:
    with opened(database) as bank:
        subscribe(bank, receiver.answering(200))
        ahead = f"SET due_at = {ledger.utc_now() + HOUR}"
        bank.tamper(f"UPDATE webhook {ahead}")
    with serving(database) as server:
        server.bank.given(alice=7)
        wait_until(lambda: receiver.types() == ["account.opened", "transaction.posted"])


NO_PROXY_THERE = "http://127.0.0.1:1"


@pytest.mark.parametrize(
    "environment",
    [
        {"NO_PROXY": "127.0.0.1,fd00::/8"},
        {"HTTP_PROXY": NO_PROXY_THERE, "NO_PROXY": "::/0,*.example"},
        {"ALL_PROXY": NO_PROXY_THERE},
        {"all_proxy": "127.0.0.1:1"},
        {"http_proxy": NO_PROXY_THERE, "no_proxy": ""},
    ],
    ids=str,
)
@on_sqlite
def test_a_receiver_on_this_machine_is_reached_without_a_proxy(
    database: str,
    receiver: "Receiver",
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with opened(database) as bank:
        subscribe(bank, receiver.answering(200))
        bank.given(alice=7)
        deliver(bank)
    assert receiver.types() == ["account.opened", "transaction.posted"]


@pytest.mark.parametrize("scheme", ["", "http://"])
def test_a_receiver_elsewhere_is_reached_through_the_proxy(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked.append(await reader.readline())
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        writer.close()

    async def post(url: str) -> None:
        proxy = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = proxy.sockets[0].getsockname()[1]
        monkeypatch.setenv("ALL_PROXY", f"{scheme}127.0.0.1:{port}")
        async with proxy, ledger.client_for(url) as client:
            await client.post(url)

    asyncio.run(post("http://receiver.invalid/x"))
    assert asked == [b"POST http://receiver.invalid/x HTTP/1.1\r\n"]


def test_receipts_outlive_the_server(database: str, receiver: "Receiver") -> None:
    with serving_hastily(database) as server:
        leave_one_unanswered(server, receiver)
        server.bank.given({f"person {number}": 0 for number in range(7, 20)})
        server.process.kill()
    assert len(receiver.ids()) == 7
    receiver.answering(200)
    with serving_hastily(database) as server:
        server.bank.given(last=1)
        wait_until(lambda: receiver.types()[-1:] == ["transaction.posted"])
        assert receiver.ids() == since_then(server.bank)


def since_then(bank: "Bank") -> list[str]:
    """Return the events since a receiver was added."""
    later = "SELECT id FROM event WHERE id > (SELECT id FROM webhook) ORDER BY id"
    return [event for (event,) in bank.rows(later)]


def test_of_two_servers_one_posts_receipts_and_the_other_takes_over(
    database: str, receiver: "Receiver"
) -> None:
    with serving_hastily(database) as one:
        subscribe(one.bank, receiver.answering(200, after=0.02))
        one.bank.given(alice=0)
        wait_until(lambda: len(receiver.receipts()) > 0)
        with serving_hastily(database) as other:
            for number in range(40):
                other.bank.ids |= one.bank.ids
                (one, other)[number % 2].bank.deposit("alice", 1)
            wait_until(lambda: len(receiver.receipts()) >= 20)
            # Until now, each was posted once.
            noted = receiver.receipts()
            assert len(receiver.ids()) == len(noted)
            assert all(then.at > first.at + 0.02 for first, then in itertools.pairwise(noted))
            one.process.kill()
            wait_until(lambda: receiver.ids() == since_then(other.bank))


def run_forbearing(*given: Any) -> None:
    """Serve, and wait for a receiver for longer than the end of a server may take."""
    ledger.RECEIPT_SECONDS_MAX, ledger.TURN_SECONDS = 60, 120
    run_main(*given)


def test_a_server_that_ends_leaves_its_turn(database: str, receiver: "Receiver") -> None:
    with serving(database, start=partial(as_fork, target=run_forbearing)) as server:
        leave_one_unanswered(server, receiver)
    # Nobody has to wait until it is over.
    [(due_at,)] = server.bank.rows("SELECT due_at FROM webhook")
    assert due_at <= ledger.utc_now()
    receiver.answering(200)
    with serving(database) as server:
        server.bank.given(last=0)
        wait_until(lambda: len(receiver.ids()) == 8)
        # But for the one that was under way, none is posted twice.
        assert len(receiver.receipts()) == 9


# ----- Log
# One line of JSON for each request, and nothing in it that is anybody's secret.


def test_each_request_has_one_line_in_the_log(secured: "BankInside") -> None:
    key = new_api_key(secured.database, "till", "service")
    secured.by(key).given(alice=5)
    secured.get("/accounts/alice")
    key_command(secured.database, "revoke", "till")
    wait_until(lambda: secured.by(key).get("/audit").status_code == 401)
    secured.get("/nowhere")
    lines = [dict(line) for line in secured.app.state.log.lines if line["status"] != 403]
    for line in lines:
        assert isinstance(line.pop("ts"), float)
        assert isinstance(line.pop("ms"), float)
        assert re.fullmatch("[0-9a-f]{32}", line.pop("request_id"))
    columns = ("method", "route", "status", "caller", "key")
    assert lines == [
        dict(zip(columns, values, strict=True))
        for values in (
            ("POST", "/accounts", 201, "key:till", key[:11]),
            ("POST", "/accounts/{account_id}/deposit", 200, "key:till", key[:11]),
            ("GET", "/accounts/{account_id}", 401, None, None),
            ("GET", "/audit", 401, None, key[:11]),
            ("GET", None, 404, None, None),
        )
    ]


def test_the_log_is_written_as_lines_of_json(database: str) -> None:
    with serving(database) as server:
        server.bank.given(alice=5)
        last = server.bank.get("/accounts").headers["X-Request-ID"]
        wait_until(lambda: last in server.log.read_text())
        lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    routes = ["/accounts", "/accounts/{account_id}/deposit", "/accounts"]
    assert [line["route"] for line in lines] == routes
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", lines[0]["ts"])


def test_on_a_terminal_the_log_is_text_without_the_page_itself() -> None:
    written, log = io.StringIO(), ledger.Log()
    log.form = "text"
    pages = ledger.Asked([(b"sec-fetch-site", b"same-origin")])
    with log.written_to(written):
        log.add(pages, "GET", "/accounts", 200, 0.0015)
        log.add(pages, "POST", "/transfers", 200, 0.0015)
        log.add(ledger.Asked(()), "GET", None, 404, 0.02)
        log.take({"ts": 0.0, "level": "WARNING", "message": "receipts wait"})
    lines = [line.partition("  ")[2] for line in written.getvalue().splitlines()]
    assert lines == [
        "POST   /transfers  200  1.5 ms",
        "GET    (no such address)  404  20.0 ms",
        "warning: receipts wait",
    ]
    log.form = "off"
    log.add(ledger.Asked(()), "GET", "/accounts", 200, 0.0015)
    assert not log.lines


@on_sqlite
def test_the_log_takes_the_form_that_is_asked_for(database: str) -> None:
    start = partial(as_fork, arguments=("serve", "--log", "text"))
    with serving(database, start=start) as server:
        server.bank.get("/accounts")
        wait_until(lambda: "GET    /accounts  200" in server.log.read_text())


def test_the_log_takes_what_the_program_says_until_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])
    written, log = io.StringIO(), ledger.Log()
    with suppress(ZeroDivisionError), log.written_to(written):
        logging.getLogger("ledger").warning("half of a pair: %s", "\ud800")
        assert 1 / 0
    assert logging.root.handlers == []
    line = json.loads(written.getvalue())
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
            log.take({"ts": 0.0, "number": number})
        assert len(log.lines) <= ledger.LOG_LINES_MAX
        os.close(reading)


def test_the_log_says_how_many_lines_it_has_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LOG_LINES_MAX", 10)
    written, log = io.StringIO(), ledger.Log()
    for _ in range(2):
        for number in range(25):
            log.take({"ts": 0.0, "number": number})
        with log.written_to(written):
            pass
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line.get("number") for line in lines] == [*range(15, 25), None] * 2
    assert [line["message"] for line in (lines[10], lines[-1])] == [
        "15 lines were lost, because nobody read them"
    ] * 2


PRIVATE_NAME, PRIVATE_AMOUNT = "Alice-the-marked-name", 91827364550


def test_no_secret_is_ever_told(database: str) -> None:
    secrets = {"LEDGER_ADMIN_KEY": ADMIN_KEY, "LEDGER_JWT_SECRET": SECRET}
    with serving(database, **secrets) as server:
        key, app = new_api_key(database, "marked", "admin"), token(sub="app")
        receiver = printed(database, "webhook", "add", "--url", "http://127.0.0.1:1")
        credentials = (key, ADMIN_KEY, SECRET, key + "x", ADMIN_KEY[:-1], app[:-1])
        callers = [server.bank.by(credential) for credential in credentials]
        callers.append(server.bank.by(f"Bearer {app}", "Authorization"))
        told = "".join(at_once([partial(every_request, caller) for caller in callers]))
        stored = f"{server.bank.rows('SELECT * FROM event')}"
        told += str(server.said)
        told += printed(database, "webhook", "list")
        told += key_command(database, "list") + str(ledger.Settings.read(secrets))
        last = server.bank.get("/health").headers["X-Request-ID"]
        wait_until(lambda: last in server.log.read_text())
        wait_until(lambda: "a receipt waits: ConnectError" in server.log.read_text())
        log = server.log.read_text()
    assert log.count("\n") > 400
    hashed = ledger.sha256(key)
    for secret in (key[12:], ADMIN_KEY, SECRET, app.split(".")[2], receiver[6:]):
        assert secret not in told + log + stored
    # What was added is an event's to tell, to nobody but the check.
    assert hashed not in told + log
    assert hashed in stored
    for private in (PRIVATE_NAME, str(PRIVATE_AMOUNT)):
        assert private in told
        assert private not in log


def every_request(bank: "Bank") -> str:
    """Send something to each route, good and bad, and return all that is answered."""
    opened = bank.post("/accounts", owner_name=PRIVATE_NAME)
    bank.ids = {PRIVATE_NAME: opened.json().get("id", NOBODY)}
    answers = [opened, bank.deposit(PRIVATE_NAME, PRIVATE_AMOUNT)]
    names = ("owner_name", "account_id", "external_user_id")
    body = dict.fromkeys(names, PRIVATE_NAME) | {"amount": PRIVATE_AMOUNT, "timestamp": 1}
    headers = {"X-Request-ID": "x y"}
    for method, template in MATRIX:
        path = re.sub("{[a-z_]+}", bank.ids[PRIVATE_NAME], template)
        contents = ({"json": body}, {"json": {"amount": PRIVATE_AMOUNT}}, {"json": [PRIVATE_NAME]})
        for content in contents if method != "GET" else ({},):
            headers["Idempotency-Key"] = new_key()
            sent: Any = {"headers": headers, "params": {"cursor": PRIVATE_NAME}, **content}
            answers.append(bank.send(method, path, **sent))
    return "".join(f"{answer.headers}{answer.text}" for answer in answers)


# ----- Command line
# What the operator types, and what it says; some of it is run as it is typed.


def test_the_server_says_where_it_is(server: "Server") -> None:
    address = "http://{}:{}".format(*server.bank.address())
    assert server.said == [
        f"ledger.py {ledger.__version__} serves on {address}",
        f"  docs      {address}/docs",
        f"  database  {ledger.database_at(server.bank.database).name}",
        f"  opened    {', '.join([*WALLETS, *ATM_DEMO])}{WITHOUT_DEMO}",
        "  mode      open: every caller on this machine may do everything",
    ]


def test_a_container_says_so_where_it_keeps_the_ledger_in_its_own_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, mounted = (ledger.database_at(f"sqlite:///{at}x.db") for at in ("/", "/dev/"))
    elsewhere = ledger.database_at("postgresql://ledger@db/ledger")
    assert ledger.layer_warning(inside) == "", "this is no container"
    monkeypatch.setenv("LEDGER_CONTAINER", "1")
    assert "GONE WITH THIS CONTAINER: mount a volume at /, or" in ledger.layer_warning(inside)
    assert (ledger.layer_warning(mounted), ledger.layer_warning(elsewhere)) == ("", "")


def run_ended_early(*given: Any) -> None:
    """Serve, and get SIGTERM when all is said, before uvicorn listens to it."""
    pytest.MonkeyPatch().setattr(uvicorn.Server, "run", lambda *_, **__: os.kill(os.getpid(), 15))
    run_main(*given)


@on_sqlite
def test_sigterm_before_the_first_request_closes_the_file(database: str) -> None:
    with serving(database, start=partial(as_fork, target=run_ended_early)) as server:
        server.process.join()
        assert server.process.exitcode == 0
    assert not Path(f"{file_of(database)}-wal").exists()


def test_sigterm_finishes_what_was_accepted(database: str) -> None:
    answers: list[int] = []
    with serving(database) as server:
        server.bank.given(alice=0)

        def deposit() -> None:
            with suppress(httpx.TransportError):
                answers.append(server.bank.deposit("alice", 1).status_code)

        with meanwhile(*[deposit] * 8):
            wait_until(lambda: len(answers) > 40)
            server.process.terminate()
            server.process.join(60)
            assert server.process.exitcode == 0
    assert set(answers) == {200}
    with opened(database) as bank:
        [kept] = bank.balances().values()
        # A request may have been written whose answer met a closed connection; none may be lost.
        assert len(answers) <= kept <= len(answers) + 8
        assert bank.wrong() == []


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows has no Ctrl-C for a child process alone")
def test_ctrl_c_ends_the_server_quietly(database: str) -> None:
    with serving(database, start=as_command) as server:
        server.bank.get("/health")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(60) == 0
        assert "Traceback" not in server.log.read_text()


def test_a_port_that_is_taken_ends_the_start_in_one_line(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        ran = run_program("serve", "--port", port, folder=tmp_path)
    assert (ran.returncode, ran.stdout) == (1, "")
    # Nor was a ledger made.
    assert list(tmp_path.glob("*.db")) == []
    assert ran.stderr == (
        f"ledger: cannot serve on 127.0.0.1:{port}: Address already in use; "
        "choose another with --port\n"
    )


@pytest.mark.parametrize("port", ["abc", "-1", "65536", "8000.0", "\u0661", " 80", ""])
def test_a_port_is_a_number(port: str) -> None:
    with pytest.raises(ledger.StartupError, match="the port must be a number from 0 to 65535"):
        ledger.listen("127.0.0.1", port)


@pytest.mark.parametrize(
    ("arguments", "environment", "why"),
    [
        (["--host", "0.0.0.0", "--port", "0"], {}, "serves this machine alone"),  # noqa: S104
        ([], {"PORT": "x"}, "the port must be a number from 0 to 65535, not 'x'"),
        (["--port", "x"], {}, "the port must be a number from 0 to 65535, not 'x'"),
        (["--port", "0"], {"LEDGER_DATABASE_URL": "x://"}, "the database must be a plain file"),
        (["--port", "0", "--host", "\udcff"], {}, "there is no host"),
        (["--port", "0", "--root-path", "x"], {}, "the root path must be like /money, not 'x'"),
        (["key", "add", "--name", "\n", "--role", "admin"], {}, "the name must be 1 to 200 "),
        (["check", "--database-url", "sqlite:////nowhere/x.db"], {}, "there is no ledger at"),
        (["--port", "0"], {"HTTP_PROXY": "ftp://127.0.0.1:1"}, "proxy or certificates .* scheme"),
        (["--port", "0"], {"all_proxy": "socks5://127.0.0.1:1"}, "proxy or certificates .* SOCKS"),
        (["--port", "0"], {"SSL_CERT_FILE": "/nowhere"}, "proxy or certificates .* No such file"),
        (["--port", "0"], {"SSLKEYLOGFILE": "/nowhere/x"}, "proxy or certificates .*/nowhere/x"),
        (["check"], {"DATABASE_URL": "postgres://x@localhost:1/a"}, "cannot open a at localhost: "),
        (["check"], {"DATABASE_URL": "postgres://x@/a?host=\udcff"}, "surrogates not allowed"),
    ],
)
def test_a_refused_start_says_why_in_one_line(
    arguments: list[str], environment: dict[str, str], why: str, tmp_path: Path
) -> None:
    ran = run_program(*arguments, folder=tmp_path, **environment)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(f"ledger: .*{why}.*\n", ran.stderr)


@pytest.mark.parametrize(
    ("command", "lacks"),
    [
        ("backup", "file"),
        ("copy", "--from, --to"),
        ("export", "--format"),
        ("asset add GOLD", "--name, --exponent"),
        ("key add", "--name, --role"),
        ("key revoke", "name"),
        ("webhook add", "--url"),
        ("webhook remove", "url"),
        ("webhook", "{add,list,remove}"),
    ],
)
def test_a_command_says_what_it_lacks(
    command: str, lacks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        ledger.main(command.split())
    assert f"the following arguments are required: {lacks}\n" in capsys.readouterr().err


@pytest.mark.parametrize("others", ["", "many", "4"])
@on_sqlite
def test_a_setting_that_is_meant_for_others_changes_nothing(database: str, others: str) -> None:
    with serving(database, WEB_CONCURRENCY=others, FORWARDED_ALLOW_IPS=others or "*") as server:
        assert server.bank.given(alice=1).balances() == {"alice": 1}


CUT_OFF = "ledger: Broken pipe\n"
NO_ROOM = "ledger: No space left on device\n"
CLOSED = "ledger: Bad file descriptor\n"


@pytest.mark.skipif(not shutil.which("bash"), reason="the streams are closed by a shell")
@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ("export --format csv >&-", 1, CLOSED),
        ("check >&-", 0, ""),
        ("check <&- >&- 2>&-", 0, ""),
        ("check | (exec <&-)", 0, CUT_OFF),
        ("-u check | (exec <&-)", 0, CUT_OFF),
        ("-u check | head -1", 0, ""),
        ("check >/dev/full", 1, NO_ROOM),
        ("check 2>&-", 0, ""),
        ("export --format csv <&- 2>&-", 0, ""),
        ("key revoke nobody 2>&-", 1, ""),
    ][:: 1 if CYCLES > 3 else 3],
)
@on_sqlite
def test_a_stream_that_is_closed_changes_no_status(
    database: str, command: str, status: int, said: str
) -> None:
    [(option, words, others)] = re.findall("^(-u )?([a-z -]+?)( ?[0-9]?[|<>].*)$", command)
    here = f"{sys.executable} {option} {PROGRAM} {words} --database-url {database} {others}"
    script = f"{here}; exit ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    ran = subprocess.run([BASH, "-c", script], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (status, said)


@on_sqlite
def test_the_check_tells_a_broken_ledger_by_its_status_alone(bank: "Bank") -> None:
    bank.given(alice=100)
    bank.tamper_freely("UPDATE account SET balance = 6 WHERE owner_name = 'alice'")
    command = [sys.executable, str(PROGRAM), "check", "--database-url", bank.database]
    closed = subprocess.run([BASH, "-c", f"{' '.join(command)} >&- 2>&-"])
    assert closed.returncode == 1


ONE_AFTER_THE_OTHER = """
import ledger, sys
for command in sys.argv[2:]:
    print("status", ledger.main([*command.split(), "--database-url", sys.argv[1]]), flush=True)
"""


@on_sqlite
def test_names_are_shown_and_taken_in_any_locale(bank: "Bank") -> None:
    for name in ("Zo\xeb", "\u91d1"):
        new_api_key(bank.database, name, "admin")
    bank.tamper_freely("UPDATE event SET arguments = '\xe9' WHERE id = (SELECT max(id) FROM event)")
    bank.tamper_freely("UPDATE event SET kind = '\xe9' WHERE id = (SELECT min(id) FROM event)")
    commands = ["key list", "key revoke Zo\xeb", "key add --role auditor --name Jos\xe9"]
    commands += ["key revoke \udcff", "key add --role admin --name \udcff", "check"]
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONPATH": str(PROGRAM.parent)}
    ran = run_python("-c", ONE_AFTER_THE_OTHER, bank.database, *commands, **locale)
    assert re.findall(r"status (\d)", ran.stdout) == ["0", "0", "0", "1", "1", "1"]
    listed, revoked, _, *nothing, checked, _ = re.split(r"status \d\n", ran.stdout)
    assert (listed.count("\n"), revoked, nothing) == (3, "revoked Zo\\xeb\n", ["", ""])
    assert "is a \\xe9" in checked
    assert "key 'Jos\\xe9' is in" in ran.stderr
    assert ran.stderr.count("\n") == 3  # The other two lines are about what is no name.
    names = bank.rows("SELECT name FROM api_key ORDER BY name")
    assert names == [("Jos\xe9",), ("Zo\xeb",), ("\u91d1",)]


@on_sqlite
def test_a_server_starts_in_any_locale_and_logs_json(new_database: "NewDatabase") -> None:
    with new_database() as database, tempfile.TemporaryDirectory() as folder:
        file = shutil.copy(file_of(database), Path(folder, "Zo\xeb.db"))
        key = new_api_key(f"sqlite:///{file}", "Zo\xeb", "admin")
        ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0"}
        with serving(f"sqlite:///{file}", as_command, **ascii_only) as server:
            assert server.bank.by(key).given(alice=1).balances() == {"alice": 1}
            wait_until(lambda: server.log.read_text().count("\n") == 3)
            lines = [json.loads(line) for line in server.log.read_text().splitlines()]
    assert {line["caller"] for line in lines} == {"key:Zo\xeb"}


@on_sqlite
def test_other_machines_are_served_with_keys_alone(database: str) -> None:
    def serve_others(**settings: Any) -> None:
        app = ledger.create_app(ledger.Settings(database, **settings), for_others=True)
        app.state.ledger.database.close()

    with pytest.raises(ledger.StartupError, match="serves this machine alone"):
        serve_others()
    serve_others(admin_key=ADMIN_KEY)
    serve_others(jwt_secret=SECRET)
    new_api_key(database, "a", "auditor")
    serve_others()


def test_a_new_key_is_printed_alone_and_told_where_it_is(tmp_path: Path) -> None:
    ran = run_program("key", "add", "--name", "a", "--role", "admin", folder=tmp_path)
    assert re.fullmatch("lk_[0-9a-f]{8}_[A-Za-z0-9_-]{43}\n", ran.stdout)
    assert ran.stderr == f"key 'a' is in {tmp_path}/ledger.db, and shown this once\n"


def test_a_key_can_be_made_before_the_first_start(new_database: "NewDatabase") -> None:
    with new_database(blank=True) as database:
        key = new_api_key(database, "first", "admin")
        with opened(database, ledger.DIALECTS) as bank:
            assert refusal(bank.get("/accounts")) == (401, "unauthorized")
            assert bank.by(key).get("/atm/").json()["sample_accounts"] == {}


@pytest.mark.parametrize("arguments", [("add", "--name", "a", "--role", "admin"), ("revoke", "a")])
def test_the_name_of_a_key_is_used_once(
    bank: "Bank", arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    new_api_key(bank.database, "a", "admin")
    key_command(bank.database, "revoke", "a")
    capsys.readouterr()
    assert ledger.main(["key", *arguments, "--database-url", bank.database]) == 1
    assert capsys.readouterr().err.startswith("ledger: there is ")
    assert bank.callers() == ["cli", "cli"]


def test_a_receiver_is_added_listed_and_removed(bank: "Bank") -> None:
    bank.given(alice=0)
    one, other = "https://example.com/a?b=c", "HTTP://[::1]:8080?x"
    secret = subscribe(bank, one, "--account", bank.ids["alice"])
    assert re.fullmatch("whsec_[A-Za-z0-9+/]{43}=", secret)
    assert subscribe(bank, other) != secret
    listed = [line.split() for line in printed(bank.database, "webhook", "list").splitlines()]
    assert listed[1:] == [
        ["1", "1", "0", "now", bank.ids["alice"], one],
        ["2", "0", "0", "now", "-", other],
    ]
    assert printed(bank.database, "webhook", "remove", one) == f"removed {one}"
    assert one not in printed(bank.database, "webhook", "list")
    subscribe(bank, one)
    # As a compose service may be called, and the last port there is.
    subscribe(bank, "http://my_receiver:65535/")
    assert bank.wrong() == []


@pytest.mark.parametrize("host", ["169.254.169.254", "[fd00:ec2::254]", "metadata.internal"])
def test_who_adds_a_receiver_is_told_where_receipts_go(
    bank: "Bank", host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # Nothing is posted there: it is only looked at what is said.
    command = ["webhook", "add", "--url", f"http://{host}:80/x", "--database-url", bank.database]
    assert ledger.main(command) == 0
    said = capsys.readouterr()
    assert re.fullmatch("whsec_[A-Za-z0-9+/]{43}=\n", said.out)
    assert said.err == (
        f"receipts go from this machine to wherever {host} leads, inside your own network too: "
        "see deploy/README.md, Receivers\n"
    )


@pytest.mark.parametrize(
    "arguments",
    [
        *[("add", "--url", url) for url in ("ftp://a", "example.com", "http://", "https:///x", "")],
        *[("add", "--url", f"http://a{wrong}") for wrong in (" ", ":x", "/\n", "/\ud800", "@b")],
        *[("add", "--url", f"http://127.0.0.1:{port}/") for port in ("99999", "65536", "0", "")],
        ("add", "--url", "http://.."),
        ("add", "--url", "http://a", "--account", "\ud800"),
        ("remove", "http://\ud800"),
        ("add", "--url", "http://a", "--account", NOBODY),
        ("remove", "http://nowhere"),
    ],
    ids=short,
)
def test_a_receiver_that_cannot_be_is_refused_in_one_line(
    bank: "Bank", arguments: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ledger.main(["webhook", *arguments, "--database-url", bank.database]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    assert bank.rows("SELECT * FROM webhook") == []


def test_demonstration_money_is_said_and_can_be_declined(tmp_path: Path) -> None:
    def opened_by_a_start(file: str, **variables: str) -> str:
        settings = ledger.Settings.read(variables, database_url=f"sqlite:///{tmp_path}/{file}")
        app = ledger.create_app(settings)
        app.state.ledger.database.close()
        return str(app.state.opened)

    assert opened_by_a_start("new") == ", ".join([*WALLETS, *ATM_DEMO]) + WITHOUT_DEMO
    assert opened_by_a_start("new") == "", "a restart opens nothing more"
    assert opened_by_a_start("empty", LEDGER_DEMO="0") == ""
    # What somebody lists is no demonstration.
    start, file = partial(as_fork, arguments=("serve", "--no-demo")), tmp_path / "own.db"
    with serving(f"sqlite:///{file}", start, PRELOAD_ACCOUNTS='{"77": "5.00"}') as server:
        assert server.bank.get("/atm/").json()["sample_accounts"] == {"77": "5.00"}
        assert "  opened    77" in server.said


def test_an_asset_is_added_by_the_command_line(
    bank: "Bank", capsys: pytest.CaptureFixture[str]
) -> None:
    adding = ("asset", "add", "MILES", "--name", "Air Miles", "--exponent", "0", "--closed-loop")
    assert "MILES is in" in printed(bank.database, *adding)
    shown = {"code": "MILES", "name": "Air Miles", "exponent": 0, "closed_loop": True}
    assert bank.get("/assets/MILES").json() == shown
    assert bank.callers() == ["cli"]
    for arguments, why in (
        (adding, "ledger: There is an asset of this code already"),
        (
            ("asset", "add", "miles", "--name", "x", "--exponent", "0"),
            "ledger: code: String should",
        ),
        (("asset", "add", "X", "--name", " ", "--exponent", "0"), "ledger: name: Text should"),
        (
            ("asset", "add", "X", "--name", "x", "--exponent", "13"),
            "ledger: exponent: Input should",
        ),
    ):
        assert ledger.main([*arguments, "--database-url", bank.database]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(why)
    assert bank.wrong() == []


def test_seed_makes_the_demo_accounts_once(
    bank: "Bank", capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=1)
    for _ in range(2):
        assert ledger.main(["seed", "--database-url", bank.database]) == 0
    assert "the first accounts and wallets are in" in capsys.readouterr().out
    with opened(bank.database, ledger.DIALECTS) as seeded:
        assert seeded.get("/atm/").json()["sample_accounts"] == ATM_DEMO
        assert wallet(seeded, "user_alice", 1) == "100.0000"
    assert set(bank.callers()) == {"cli", "local"}


def test_the_check_counts_what_it_saw(bank: "Bank", capsys: pytest.CaptureFixture[str]) -> None:
    bank.given(alice=100, bob=5)
    assert ledger.main(["check", "--database-url", bank.database]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    counts = [int(count) for verdict, count in lines if verdict == "ok"]
    assert counts[:-1] == [len(ledger.TABLES), 4, 18, 0, 0, 4, 0, 4, 7 + 16]
    assert counts[-1] > 20
    bank.tamper("DROP TRIGGER entry_kept ON entry", "DELETE FROM entry WHERE balance = 100")
    assert ledger.main(["check", "--database-url", bank.database]) == 1
    wrong = f"account {bank.ids['alice']}: its row says 1 entries and balance 100"
    assert wrong in capsys.readouterr().out


@on_sqlite
def test_a_backup_is_consistent_while_money_moves(database: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    with serving(database) as server:
        server.bank.given(fay=1_000, gus=0)
        with meanwhile(*[partial(server.bank.transfer, "fay", "gus", 1)] * 4):
            wait_until(lambda: server.bank.balances()["gus"] > 10)
            assert ledger.main(["backup", str(copy), "--database-url", database]) == 0
    with opened(f"sqlite:///{copy}") as restored:
        balances = restored.balances()
        assert balances["fay"] + balances["gus"] == 1_000
        assert balances["gus"] > 10
        assert restored.wrong() == []


@on_sqlite
def test_a_backup_never_overwrites(bank: "Bank", capsys: pytest.CaptureFixture[str]) -> None:
    file = file_of(bank.given(alice=1).database)
    before = file.read_bytes()
    assert ledger.main(["backup", str(file), "--database-url", bank.database]) == 1
    assert "File exists" in capsys.readouterr().err
    assert file.read_bytes() == before


WRITING = ("backup {file}", "copy --from {database} --to sqlite:///{file}",
           "export --format csv {file}")  # fmt: skip


def written(form: str, database: str, file: Path) -> list[str]:
    """Return a command that writes a file."""
    command = form.format(file=file, database=database).split()
    return command if "copy" in command else [*command, "--database-url", database]


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folder")
@pytest.mark.parametrize("form", [*WRITING, "key add --name a --role admin"])
def test_what_a_command_says_is_done_is_on_disk(
    bank: "Bank", form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, synced = tmp_path / "new", []

    def sync(given: Any) -> None:
        descriptor = given if isinstance(given, int) else given.fileno()
        synced.append((os.fstat(descriptor), file.exists()))
        real(given)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", sync)
    database = bank.database if "{file}" in form else f"sqlite:///{file}"
    assert ledger.main(written(form, database, file)) == 0
    # First all that is in it, under another name; then its name.
    [(first, named_first), (second, named_second)] = synced
    assert (first.st_ino, named_first) == (file.stat().st_ino, False)
    assert (second.st_ino, named_second) == (tmp_path.stat().st_ino, True)


def run_on_a_full_disk(*given: Any) -> None:
    """Run a command that can write no more than 100,000 bytes to a file."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    run_main(*given)


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
@pytest.mark.parametrize("form", WRITING)
def test_a_command_leaves_nothing_half_on_a_full_disk(
    bank: "Bank", form: str, tmp_path: Path
) -> None:
    bank.given(alice=1_000, bob=0)
    one = {**bank.transfer_body(), "memo": "x" * 190}
    assert bank.post("/transfers/bulk", key="k", transfers=[one] * 300).status_code == 200
    file = tmp_path / "new"
    command = written(form, bank.database, file)
    with tempfile.TemporaryDirectory() as folder:
        ran = run_program(*command, folder=Path(folder), target=run_on_a_full_disk)
        assert (ran.returncode, ran.stdout) == (1, "")
        assert ran.stderr.startswith("ledger: ")
        assert ran.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert ledger.main(command) == 0
    assert file.stat().st_size > 100_000


def run_and_die(_: Any, __: Any, said: Path, ___: Path) -> None:
    """Die in the middle of a command that makes a file."""
    with ledger.new_file(said.with_name("dead")) as place:
        place.write_text("half of it")
        os.kill(os.getpid(), signal.SIGKILL)


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows has no such locks")
@pytest.mark.parametrize("form", WRITING)
def test_what_a_dead_command_has_left_is_removed_by_the_next_one(
    bank: "Bank", form: str, tmp_path: Path
) -> None:
    # Of who is still at work nothing is removed, nor what only has such a name.
    (tmp_path / "mine.ledger-unfinished").mkdir()
    (tmp_path / "mine.ledger-unfinished" / "letter").touch()
    for name in ("said", "log"):
        (tmp_path / name).touch()
    with ledger.new_file(tmp_path / "alive") as place:
        place.write_text("some of it")
        assert run_program(folder=tmp_path, target=run_and_die).returncode == -signal.SIGKILL
        assert len([*tmp_path.glob("dead*/*")]) == 2
        assert ledger.main(written(form, bank.database, tmp_path / "new")) == 0
        assert [*tmp_path.glob("dead*")] == []
    assert (tmp_path / "alive").read_text() == "some of it"
    names = ("alive", "log", "mine.ledger-unfinished", "new", "said")
    assert sorted(tmp_path.iterdir()) == [tmp_path / name for name in names]


def run_as_nobody(*given: Any) -> None:
    """Run a command as a user who may write nowhere but to its output."""
    arguments, environment, said, log = given
    for file in (said, log):
        file.chmod(0o666)
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65_534)
        os.setuid(65_534)
    run_main(arguments, environment, said, log)


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
@pytest.mark.parametrize("command", ["check", "export --format csv", "key list", "backup new.db"])
def test_a_closed_ledger_is_read_where_nothing_can_be_written(
    database: str, command: str, tmp_path: Path
) -> None:
    with opened(database) as bank:
        bank.given(alice=100)
    folder = file_of(database).parent
    file_of(database).chmod(0o644)
    for name in ("said", "log"):
        (folder / name).touch()
    folder.chmod(0o555)
    before = sorted(folder.iterdir())
    arguments = (*command.split(), "--database-url", database)
    ran = run_program(*arguments, folder=folder, target=run_as_nobody)
    folder.chmod(0o755)
    said = {"check": "ok", "export": "DEPOSIT", "key": "prefix", "backup": ""}[command.split()[0]]
    # There it cannot write its copy either, and says so.
    assert ran.returncode == int(command.startswith("backup")), ran.stderr
    assert said in ran.stdout
    assert "readonly" not in ran.stderr
    assert sorted(folder.iterdir()) == before


@on_postgresql
def test_postgresql_is_backed_up_with_its_own_program(
    bank: "Bank", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy.db"
    assert ledger.main(["backup", str(copy), "--database-url", bank.database]) == 1
    assert "back it up with pg_dump" in capsys.readouterr().err
    assert not copy.exists()


@pytest.mark.parametrize("target", ENGINES)
def test_a_copy_is_the_same_ledger(
    bank: "Bank",
    target: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bank.given(alice=500, bob=50, carol=0).transfer("alice", "bob", 100, key="rent")
    bank.pay("alice", 100)
    bank.reverse(bank.transfer("alice", "bob", 7).json()["transfer_id"])
    bank.capture(bank.promised("alice", "bob", 9), amount=5)
    bank.promised("alice", "bob", 95)
    bank.step("bob", "freeze")
    bank.step("carol", "close")
    new_api_key(bank.database, "till", "admin")
    subscribe(bank, "http://localhost", "--account", bank.ids["alice"])
    with databases_of(target, request)(blank=True) as url:
        assert ledger.main(["copy", "--from", bank.database, "--to", url]) == 0
        shown = re.findall(r"([0-9,]+)  (\w+)$", capsys.readouterr().out, re.MULTILINE)
        counted = {table: bank.rows(f"SELECT COUNT(*) FROM {table}")[0][0] for _, table in shown}
        assert {table: int(count) for count, table in shown} == counted
        assert len(counted) == len(ledger.TABLES) - 1
        assert ledger.main(["check", "--database-url", url]) == 0
        with opened(url) as copied:
            assert copied.contents() == bank.contents()
            copied.ids = bank.ids
            admin = copied.by(new_api_key(url, "next", "admin"))
            assert admin.withdraw("alice", 1).json()["balance"] == 294
            assert admin.funds("alice") == (294, 95, 199)
            assert refusal(admin.deposit("bob", 1)) == (409, "account_frozen")
            assert refusal(admin.deposit("carol", 1)) == (409, "account_closed")


def test_a_copy_goes_nowhere_but_into_an_empty_database(
    bank: "Bank", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=5)
    full = f"sqlite:///{tmp_path}/full.db"
    with opened(full) as other:
        other.given(bob=7)
    for source, target in ((bank.database, full), (full, bank.database)):
        assert ledger.main(["copy", "--from", source, "--to", target]) == 1
        assert re.search("is not empty|File exists", capsys.readouterr().err)
    assert bank.balances() == {"alice": 5}


def test_a_copy_of_a_broken_ledger_is_refused_as_a_whole(
    bank: "Bank", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=5)
    bank.tamper_freely("UPDATE account SET balance = 6 WHERE owner_name = 'alice'")
    url = f"sqlite:///{tmp_path}/copy.db"
    assert ledger.main(["copy", "--from", bank.database, "--to", url]) == 1
    assert "nothing was done: account" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


HLEDGER = shutil.which("hledger") or ""
HOSTILE_MEMOS = (
    "; x", "rent; for: two  months", "a | b", "(x)", "[2020-99-99]", "* x", "! x", '"q"', "'q",
    "x\u2028  customer:y  USD 5", "\u00a0\u00a0x\u2003\u2003y", "\u3000x", "=1+1", "+1", "-1 USD",
    "@SUM(1)", " =1", "\uff1d1", "date:2020-99-99", "x ; date:2020-99-99", "{2}", "::", ";;", "%",
    "2020-01-01 x", "x  USD 5", "= USD 9", "include x", "end comment", "#x", "a, b", "\u0928\u092e",
)  # fmt: skip


def exported(bank: "Bank", folder: Path, form: str, *options: str) -> Path:
    """Export a ledger into a new file of a folder."""
    file = folder / f"{form}-{new_key()}"
    command = ["export", "--format", form, str(file), *options, "--database-url", bank.database]
    assert ledger.main(command) == 0
    return file


def exported_rows(bank: "Bank", folder: Path, *options: str) -> list[dict[str, str]]:
    """Return the rows of an export as Python reads them."""
    with exported(bank, folder, "csv", *options).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hledger(file: Path, *report: str) -> list[dict[str, str]]:
    """Return the lines of one of hledger's reports, which it is strict about."""
    command = [HLEDGER, "-f", str(file), "--strict", *report, "-O", "csv"]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.stderr == ""
    return list(csv.DictReader(io.StringIO(ran.stdout)))


def decimals(amount: int, asset: str) -> str:
    """Return an amount as a program of another maker writes it."""
    exponent = ledger.ASSETS[asset].exponent
    return format(Decimal(amount).scaleb(-exponent), "f")


@pytest.mark.skipif(not HLEDGER, reason="hledger is not installed (Debian: apt install hledger)")
def test_hledger_computes_the_same_balances(demo: "Bank", tmp_path: Path) -> None:
    demo.given(ann=900, ben=0).given(yen=900, sen=0, asset="JPY")
    # Two accounts of one owner are two, and both have money.
    demo.given(dict.fromkeys(HOSTILE_MEMOS[:2], 3)).given(dict.fromkeys(HOSTILE_MEMOS, 0))
    for number, hostile in enumerate(HOSTILE_MEMOS, 1):
        demo.transfer("ann", hostile, number, memo=hostile)
    # Somebody is called as somebody else is with his id.
    ben, fake = demo.ids["ben"], f"twin {demo.ids['ben']}"
    demo.send("PATCH", f"/accounts/{ben}", json={"owner_name": "twin"})
    demo.given(twin=1).given({fake: 2})
    demo.journal({"ann": -5, "ben": 5, "yen": -7, "sen": 7})
    demo.reverse(demo.last("ben"))
    demo.pay("ann", 50)
    file = exported(demo, tmp_path, "hledger")
    stored = demo.rows("SELECT kind, asset, balance FROM account WHERE balance <> 0")
    customers = [
        f"{asset} {decimals(-sum_, asset)}" for kind, asset, sum_ in stored if kind[0] == "C"
    ]
    lines = hledger(file, "balance", "-N", "liabilities:customers")
    shown = [amount for line in lines for amount in line["balance"].split(", ")]
    assert sorted(shown) == sorted(customers)
    [cash] = [line["balance"] for line in hledger(file, "balance", "-N", "assets:cash")]
    query = "SELECT asset, -balance FROM account WHERE name = 'cash' AND balance <> 0"
    assert cash.split(", ") == [f"{a} {decimals(b, a)}" for a, b in sorted(demo.rows(query))]
    assert len(hledger(file, "balance", "-N", "-E", "twin")) == 3
    # What a caller wrote is nothing but a part of a name or of a description.
    lines = hledger(file, "print")
    entries = demo.rows(
        "SELECT transaction_id, CASE type WHEN 'DEBIT' THEN amount ELSE -amount END, exponent"
        " FROM entry JOIN account ON account.id = account_id JOIN asset ON code = asset"
    )
    moved = [(line["code"], Decimal(line["amount"])) for line in lines]
    assert sorted(moved) == sorted((id, Decimal(by).scaleb(-digits)) for id, by, digits in entries)
    for column in ("status", "date2", "comment", "posting-status", "posting-comment"):
        assert {line[column] for line in lines} == {""}


@pytest.mark.skipif(not HLEDGER, reason="hledger is not installed (Debian: apt install hledger)")
def test_hledger_shows_what_an_accountant_expects(bank: "BankInside", tmp_path: Path) -> None:
    bank.given(alice=1000, bob=0).transfer("alice", "bob", 300)
    bank.pay("alice", 500)
    bank.pass_time(DAY)
    bank.given(yuki=70, asset="JPY")
    bank.send("PATCH", f"/accounts/{bank.ids['yuki']}", json={"owner_name": "bob"})
    bank.post("/assets", code="K-9", name="Bones", exponent=8).raise_for_status()
    bank.given(rex=5, asset="K-9")
    file = exported(bank, tmp_path, "hledger")

    def report(name: str) -> list[list[str]]:
        return [list(line.values()) for line in hledger(file, name)]

    assert report("balancesheet")[1:] == [
        ["Assets", ""],
        ["assets:cash", 'JPY 70, "K-9" 0.00000005, USD 10.00'],
        ["total", 'JPY 70, "K-9" 0.00000005, USD 10.00'],
        ["Liabilities", ""],
        ["liabilities:merchants", "USD 5.00"],
        ["liabilities:customers:alice", "USD 2.10"],
        ["liabilities:customers:bob", "JPY 70, USD 3.00"],
        ["liabilities:customers:rex", '"K-9" 0.00000005'],
        ["total", 'JPY 70, "K-9" 0.00000005, USD 10.10'],
        ["Net:", "USD -0.10"],
    ]  # fmt: skip
    assert report("incomestatement")[4:] == [
        ["expenses:cashback", "USD 0.10"], ["total", "USD 0.10"], ["Net:", "USD -0.10"],
    ]  # fmt: skip


def test_a_spreadsheet_gets_each_entry_with_decimals_and_no_formula(
    bank: "Bank", tmp_path: Path
) -> None:
    bank.given(alice=100, bob=0).given({"=1+1": 700}, asset="JPY")
    for number, memo in enumerate(HOSTILE_MEMOS):
        bank.transfer("alice", "bob", 1, memo=memo, external_id=f"={number}")
    rows = exported_rows(bank, tmp_path)
    assert rows[1] == {
        "date": rows[1]["date"], "time": rows[1]["time"], "kind": "DEPOSIT", "memo": "",
        "transaction_id": bank.statement("alice")[-1]["transaction_id"],
        "external_id": "", "owner": "alice",
        "account_name": "", "account_id": bank.ids["alice"], "asset": "USD", "debit": "",
        "credit": "1.00", "balance": "1.00",
    }  # fmt: skip
    for row in rows:
        for name in ("memo", "external_id", "owner", "account_name"):
            assert not row[name].strip().startswith(("=", "+", "-", "@", "\uff1d"))


def test_an_export_can_be_of_one_account_and_of_some_time(
    bank: "BankInside", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=100, bob=0, carol=7)
    bank.pass_time(DAY)
    bank.transfer("alice", "bob", 30).raise_for_status()
    bank.pass_time(1)
    bank.transfer("alice", "carol", 5).raise_for_status()
    first, *_, last = bank.statement("alice")[::-1]
    day = first["ts"][:10]

    def changes(*options: str) -> list[str]:
        rows = exported_rows(bank, tmp_path, *options)
        return [f"{row['owner']} {row['debit'] or '+' + row['credit']}" for row in rows]

    # Transactions as a whole, so that it is still true that debits equal credits.
    assert changes("--account", bank.ids["bob"]) == ["alice 0.30", "bob +0.30"]
    assert changes("--account", "cash@USD", "--to", last["ts"])[3:] == ["carol +0.07"]
    assert changes("--from", last["ts"]) == ["alice 0.05", "carol +0.05"]
    assert changes("--to", day) == [] == changes("--to", "2026-01-01T00:00:00+01:00")
    assert len(changes("--from", day)) == 8
    # What happened outside before is of then.
    bank.deposit("bob", 9, effective_at="1999-12-31").raise_for_status()
    assert changes("--to", "2000-01-01") == ["system 0.09", "bob +0.09"]
    assert exported_rows(bank, tmp_path, "--to", "2000-01-01")[0]["date"] == "1999-12-31"
    command = ["export", "--database-url", bank.database]
    for option in ("--account", "--from", "--to"):
        assert ledger.main([*command, "--format", "seals", option, "2026-01-01"]) == 1
        assert "seals are of all that happened" in capsys.readouterr().err
    command += ["--format", "csv"]
    assert ledger.main([*command, "--account", NOBODY]) == 1
    assert capsys.readouterr().err == f"ledger: There is no account {NOBODY}\n"
    with pytest.raises(SystemExit):
        ledger.main([*command, "--from", "yesterday"])
    assert "argument --from: invalid moment value: 'yesterday'" in capsys.readouterr().err


def test_an_export_shows_one_moment(bank: "BankInside", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "PORTION_ROWS", 2)
    bank.given(alice=100, bob=0, carol=3)
    with bank.ledger.database.read() as connection:
        entries = ledger.exported(connection, ledger.portions(connection, "event"))
        seen = [next(entries)]
        bank.transfer("alice", "bob", 1)
        seen += entries
    assert [entry["kind"] for entry in seen] == ["DEPOSIT"] * 4


def test_an_export_never_overwrites(
    bank: "Bank", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = exported(bank, tmp_path, "csv")
    before = file.read_bytes()
    command = ["export", "--format", "csv", str(file), "--database-url", bank.database]
    assert ledger.main(command) == 1
    assert capsys.readouterr().err == f"ledger: cannot make {file}: File exists\n"
    assert file.read_bytes() == before


def test_an_export_goes_to_the_output(bank: "Bank", tmp_path: Path) -> None:
    bank.given(alice=5)
    command = ("export", "--format", "csv", "--database-url", bank.database)
    ran = run_program(*command, folder=tmp_path)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == exported(bank, tmp_path, "csv").read_text()


def test_an_output_that_nobody_reads_ends_an_export_in_one_line(
    bank: "Bank", capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    output = os.dup(1)
    os.dup2(writing, 1)
    try:
        assert ledger.main(["export", "--format", "csv", "--database-url", bank.database]) == 1
    finally:
        os.dup2(output, 1)
        os.close(output)
        os.close(writing)
    assert capsys.readouterr().err == "ledger: Broken pipe\n"


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such terminals")
def test_long_commands_say_how_far_they_are_on_a_terminal_alone(
    bank: "Bank", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=5)
    reading, writing = os.openpty()
    here = ["--database-url", bank.database]
    for command in (
        ["check", *here],
        ["export", "--format", "csv", f"{tmp_path}/books.csv", *here],
        ["copy", "--from", bank.database, "--to", f"sqlite:///{tmp_path}/copy.db"],
    ):
        with open(writing, "w", closefd=False) as terminal, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            assert ledger.main(command) == 0
            terminal.write("END")
        said = ""
        while not said.endswith("END"):  # A terminal gives what was written in pieces.
            said += os.read(reading, 10_000).decode()
        assert "event: 2 rows" in said
        # At the end nothing of it is left.
        assert said.endswith("\33[K\rEND")
    os.close(writing)
    os.close(reading)
    exported(bank, tmp_path, "csv")
    assert capsys.readouterr().err == ""


def test_a_package_that_is_missing_is_said_with_the_command_that_brings_it() -> None:
    ran = run_python("-S", str(PROGRAM))
    assert (ran.returncode, ran.stdout, len(ran.stderr.splitlines())) == (1, "", 1)
    assert re.match("ledger: No module named '[a-z]+'. Mend it: uv run ledger.py, or ", ran.stderr)
    assert ran.stderr.rpartition("or ")[2].strip() in README


def test_a_python_that_is_too_old_is_said() -> None:
    versions = Path.home().glob(".pyenv/versions/3.[0-9]*/bin/python3.[0-9]*")
    olds = [str(each) for each in versions if re.search("python3[.](9|10)$", str(each))]
    if not olds:
        pytest.skip("no older Python is here")
    ran = subprocess.run([olds[0], PROGRAM], capture_output=True, text=True)
    said = r"ledger: Python 3\.(9|10)\.[0-9]+ is older than 3\.11. Mend it: uv run ledger\.py\n"
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(said, ran.stderr)


# ----- Page
# What `/` shows in Chromium; what the routes behind it answer is tested above.

IMAGE = "<img src=x onerror='window.ran = 1'>"
HOSTILE = [IMAGE, "</script><script>window.ran = 1</script>", "javascript:window.ran=1", "system"]
WIDE = ["W" * 200, "\u05e9\u05dc\u05d5\u05dd 1,050.00 " * 10, "\U0001f600" * 200, "o\u0301" * 100]


@at_the_edge
def test_the_page_may_run_its_own_script_and_ask_its_own_server_alone(untouched: "Bank") -> None:
    page = untouched.get("/")
    own = {}
    for tag, text in re.findall(r"<(script|style).*?>(.*?)</\1>", page.text, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        own[f"{tag}-src"] = f"'sha256-{digest}'"
    nothing = ("default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types")
    policy = page.headers["Content-Security-Policy"].split("; ")
    assert dict(rule.split(" ", 1) for rule in policy) == {
        **dict.fromkeys(nothing, "'none'"),
        "connect-src": "'self'",
        "require-trusted-types-for": "'script'",
        **own,
    }
    assert len(own) == 2
    # The one address in it is that of the names of elements.
    assert re.findall(r"[a-z]+://[\w.]+", page.text) == ["http://www.w3.org"]


@on_sqlite
def test_the_page_shows_where_the_money_is(screen: "Screen") -> None:
    screen.bank.given(zoe=0, alice=1050, bob=0).transfer("alice", "bob", 300, memo="rent")
    screen.bank.given(yuki=500, asset="JPY")
    screen.open()
    assert screen.table("USD") == [
        ["Accounts", "3"],
        ["Customers", "10.50"],
        ["Cash", "\u221210.50"],
        ["Total", "0.00"],
    ]
    assert screen.table("JPY") == [
        ["Accounts", "1"], ["Customers", "500"], ["Cash", "\u2212500"], ["Total", "0"],
    ]  # fmt: skip
    shown = [["alice Active", "USD 7.50"], ["bob Active", "USD 3.00"], ["yuki Active", "JPY 500"]]
    assert screen.table("Accounts")[-3:] == shown
    happened = [row[0].partition(" 20")[0] for row in screen.table("Latest")]
    assert happened[:3] == ["Deposit", "Cash JPY", "yuki JPY"]
    rent = happened.index("Transfer rent")
    assert happened[rent + 1 : rent + 3] == ["alice USD", "bob USD"]
    # What nobody has stays away, and what most have comes first.
    titles = [title.text for title in screen.driver.find_elements(By.TAG_NAME, "h2")]
    assert titles[0] == "USD"
    assert "EUR" not in titles
    screen.bank.step("bob", "freeze")
    screen.bank.send("PATCH", f"/accounts/{screen.bank.ids['yuki']}", json={"owner_name": "Yuki"})
    happened = [row[0].partition(" 20")[0] for row in screen.open().table("Latest")]
    assert happened[:2] == ["Account updated Yuki", "Account frozen bob"]
    add_asset(screen.bank, "BTC")
    screen.bank.given(ben=5, asset="BTC")
    assert screen.open().table("BTC")[1] == ["Customers", "0.00000005"]
    assert "Asset added" in [row[0].partition(" 20")[0] for row in screen.table("Latest")]


@on_sqlite
def test_the_page_finds_how_things_begin_and_lists_them_by_pages(screen: "Screen") -> None:
    people = {f"person {number}": 0 for number in range(21)}
    screen.bank.given(people).post("/accounts", owner_name="Alice", external_id="a-1")
    screen.bank.deposit("person 7", 100, memo="rent")
    screen.bank.step("person 20", "freeze")
    screen.open().follow("More")
    screen.is_about("Accounts")
    shown = [row[0] for row in screen.table("Accounts")]
    assert shown[-2:] == ["person 20 Frozen", "Alice a-1 Active"]
    for text in ("A-1", "aLi"):
        screen.find(text)
        screen.is_about(f"What begins with \u201c{text}\u201d")
        assert screen.table("Accounts") == [["Alice a-1 Active", "USD 0.00"]]
    screen.find("RE")
    screen.is_about("What begins with \u201cRE\u201d")
    assert len(screen.table("Transactions")) == 3
    assert screen.driver.execute_script("return document.forms[0].text.value") == "RE"
    screen.find(screen.bank.ids["person 3"])
    screen.is_about("person 3")
    screen.find(screen.bank.last("person 7"))
    screen.is_about("Deposit")
    screen.find("lice")
    screen.is_about("Nothing begins with \u201clice\u201d")
    for place in ("nowhere", "account/nobody", "transactions?from=yesterday"):
        assert screen.open(place).heading() == "There is nothing at this address"
    assert screen.open("holds").text().endswith("There are none.")


@on_sqlite
def test_a_statement_names_the_other_side(screen: "Screen") -> None:
    screen.bank.given(alice=1000, bob=0, carol=0).transfer("alice", "bob", 300, memo="rent")
    screen.bank.pay("alice", 100)
    screen.bank.hold("alice", "bob", 200, memo="bike")
    screen.bank.journal({"alice": -3, "bob": 1, "carol": 2})
    screen.open(f"account/{screen.bank.ids['alice']}")
    assert screen.heading() == "alice"
    statement = screen.table("Statement")
    assert [row[0].partition(" 20")[0] for row in statement] == [
        "Journal to bob carol", "Payment to Merchants", "Transfer to bob rent", "Deposit from Cash",
    ]  # fmt: skip
    assert [row[1:] for row in statement] == [
        ["\u22120.03", "5.97"], ["\u22121.00", "6.00"], ["\u22123.00", "7.00"],
        ["+10.00", "10.00"],
    ]  # fmt: skip
    [[cashback, amount]] = screen.table("Cashbacks")
    assert (cashback.partition(" 20")[0], amount) == ("Payment Scheduled", "0.02")
    [[hold, amount]] = screen.table("Holds")
    assert (hold.partition(" 20")[0], amount) == ("Pending alice \u2192 bob bike", "USD 2.00")
    facts = dict(screen.table("Facts"))
    assert (facts["Balance"], facts["Held"], facts["Available"]) == ("5.97", "2.00", "3.97")


@on_sqlite
def test_what_a_list_shows_can_be_of_some_days_and_taken_along(screen: "Screen") -> None:
    screen.bank.given(alice=1000, bob=0).transfer("alice", "bob", 300, memo="\uff1d1")
    screen.bank.hold("alice", "bob", 200)
    alice, today = screen.bank.ids["alice"], datetime.now().astimezone()
    tomorrow = f"{today + timedelta(days=1):%Y-%m-%d}"
    screen.open(f"account/{alice}?from={tomorrow}")
    assert "There are none." in screen.text()
    screen.between("", f"{today:%Y-%m-%d}")
    wait_until(lambda: len(screen.table("Statement")) == 2)
    [rent, deposit] = screen.taken("statement")
    assert (rent["ref"], rent["owner"], rent["other"]) == ("'\uff1d1", "alice", "bob")
    assert (rent["asset"], rent["amount"], rent["balance"]) == ("USD", "-3.00", "7.00")
    assert (deposit["other"], deposit["amount"]) == ("Cash", "10.00")
    entries = screen.open(f"transactions?from={today:%Y-%m-%d}").taken("transactions")
    assert sum(Decimal(entry["amount"]) for entry in entries) == 0
    assert [entry["owner"] for entry in entries[:4]] == ["alice", "bob", "Cash", "alice"]
    assert "There are none." in screen.open(f"transactions?from={tomorrow}").text()
    balances = [row["available"] for row in screen.open("accounts").taken("accounts")]
    assert balances[-2:] == ["5.00", "3.00"]
    assert [hold["amount"] for hold in screen.open("holds").taken("holds")] == ["2.00"]


@on_sqlite
def test_the_line_of_a_balance_has_its_own_range_and_tells_its_points(screen: "Screen") -> None:
    screen.bank.given(alice=10**9, bob=0)
    for amount in (300, 100):
        screen.bank.transfer("alice", "bob", amount)
    screen.open(f"account/{screen.bank.ids['alice']}")
    *_, line = screen.driver.find_elements(By.TAG_NAME, "path")
    # Its thousand units are four dollars of ten million, counted from above.
    assert re.findall("V([0-9]+)", str(line.get_attribute("d"))) == ["0", "750", "1000"]
    marks = [text.text for text in screen.driver.find_elements(By.TAG_NAME, "text")]
    assert marks[:3] == ["9,999,996.00", "9,999,998.00", "10,000,000.00"]
    point = screen.driver.find_element(By.ID, "at")
    told = [str(point.get_attribute("aria-valuetext")).partition(": ")[2]]
    for key in (Keys.LEFT, Keys.LEFT):
        point.send_keys(key)
        told.append(str(point.get_attribute("aria-valuetext")).partition(": ")[2])
    assert told == ["9,999,996.00 USD", "9,999,997.00 USD", "10,000,000.00 USD"]
    screen.driver.execute_script(
        "const clientX = arguments[0].getBoundingClientRect().right - 1;"
        "arguments[0].dispatchEvent(new PointerEvent('pointermove', { clientX }))",
        point,
    )
    assert "9,999,996.00 USD" in screen.text()


@on_sqlite
def test_the_page_shows_the_last_digit_of_amounts_beyond_2_to_the_53(screen: "Screen") -> None:
    screen.bank.given(alice=2**53 - 1 - 9 * 10**15, bob=2)
    for _ in range(9):
        screen.bank.deposit("alice", 10**15)
    screen.open()
    assert screen.table("USD")[1:3] == [
        ["Customers", "90,071,992,547,409.93"], ["Cash", "\u221290,071,992,547,409.93"],
    ]  # fmt: skip


@on_sqlite
def test_the_page_shows_a_transaction_with_its_entries(screen: "Screen") -> None:
    screen.bank.given(alice=1050, bob=0).transfer("alice", "bob", 300, memo="rent")
    screen.bank.reverse(screen.bank.last("bob"))
    screen.open(f"account/{screen.bank.ids['alice']}").follow("Transfer")
    screen.is_about("Transfer")
    assert screen.driver.switch_to.active_element.tag_name == "h1"
    assert screen.table("Entries") == [
        ["alice USD", "\u22123.00", "7.50"], ["bob USD", "+3.00", "3.00"],
    ]  # fmt: skip
    facts = dict(screen.table("Facts"))
    assert facts["Memo"] == "rent"
    # What was looked at is a place that the browser can go back to.
    screen.follow(facts["Reversed by"])
    screen.is_about("Reversal")
    screen.driver.back()
    screen.is_about("Transfer")


@on_sqlite
def test_a_change_appears_on_the_page_by_itself(screen: "Screen") -> None:
    screen.bank.given(alice=100)
    screen.open(f"account/{screen.bank.ids['alice']}")
    screen.driver.execute_script("document.querySelector('tbody th a').focus()")
    link = screen.driver.switch_to.active_element.get_attribute("href")
    screen.bank.deposit("alice", 50, memo="wages")
    wait_until(lambda: len(screen.table("Statement")) == 2)
    assert screen.table("Statement")[0][1:] == ["+0.50", "1.50"]
    assert dict(screen.table("Facts"))["Balance"] == "1.50"
    # The reader is where he was.
    assert screen.driver.switch_to.active_element.get_attribute("href") == link


@on_sqlite
def test_hostile_names_and_memos_are_shown_and_run_nothing(screen: "Screen") -> None:
    notes = {"account_id": IMAGE, "ts": IMAGE, "__proto__": IMAGE, IMAGE: IMAGE}
    for name in HOSTILE:
        opened = screen.bank.post("/accounts", owner_name=name, external_id=name, metadata=notes)
        screen.bank.ids[name] = opened.json()["id"]
        screen.bank.deposit(name, 100, memo=name, metadata=notes)
    screen.bank.hold(HOSTILE[0], HOSTILE[1], 5, memo=IMAGE)
    places = ["", f"accounts?owner_name={quote(IMAGE)}", f"account/{screen.bank.ids[IMAGE]}"]
    for place in (*places, f"transaction/{screen.bank.last(IMAGE)}"):
        assert IMAGE in screen.open(place).text()
        assert not screen.driver.find_elements(By.CSS_SELECTOR, "main :is(img, script)")
        assert screen.driver.execute_script("return window.ran") is None
    assert {row[0] for row in screen.open().table("Accounts")} >= {
        f"{name} {name} Active" for name in HOSTILE
    }
    with pytest.raises(JavascriptException, match="TrustedHTML"):
        screen.driver.execute_script("document.body.innerHTML = arguments[0]", IMAGE)


@on_sqlite
def test_the_page_fits_into_400_pixels_and_is_dark_where_all_else_is(screen: "Screen") -> None:
    for name in WIDE:
        screen.bank.given({name: 10**15})
        screen.bank.deposit(name, 10**15, memo=name)
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    screen.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    last = screen.bank.last(WIDE[0])
    for place in ("", f"account/{screen.bank.ids[WIDE[0]]}", f"transaction/{last}"):
        screen.open(place)
        widths = "const { scrollWidth, clientWidth } = document.documentElement;"
        widths += "return [innerWidth, scrollWidth - clientWidth]"
        assert screen.driver.execute_script(widths) == [400, 0]
    paper = "return getComputedStyle(document.body).backgroundColor"
    light = screen.driver.execute_script(paper)
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    screen.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    assert screen.driver.execute_script(paper) == "rgb(23, 24, 26)" != light


@on_sqlite
def test_the_page_asks_for_a_key_and_says_when_one_is_refused(
    database: str, browser: webdriver.Chrome
) -> None:
    with serving(database, LEDGER_ADMIN_KEY=ADMIN_KEY) as server, Screen(browser, server) as screen:
        assert screen.open().heading() == "This ledger asks for a key or token"
        screen.enter("wrong")
        screen.is_about("The credentials are not valid")
        screen.enter(ADMIN_KEY)
        screen.is_about("Overview")
        assert "There are none." in screen.text()
        screen.fill("Open an account", "O'Neil; $(exit 1)")
        wait_until(lambda: len(screen.table("Accounts")) == 1)
        # A shell that sends the same gets the same answer, because the key is the same.
        curl = screen.driver.find_element(By.TAG_NAME, "pre").text
        subprocess.run([BASH, "-c", curl], env=os.environ | {"KEY": ADMIN_KEY}, check=True)
        shown = [["O'Neil; $(exit 1) Active", "USD 0.00"]]
        assert screen.open().table("Accounts") == shown
        screen.press("Forget the key")
        screen.is_about("This ledger asks for a key or token")


@on_sqlite
def test_a_page_has_the_forms_that_its_key_may_send(
    database: str, browser: webdriver.Chrome
) -> None:
    work = ["Deposit", "Transfer"]
    forms = {"auditor": ([], []), "service": (work, []), "admin": (work, ["Reverse"])}
    keys = {role: new_api_key(database, role, role) for role in forms}
    with serving(database) as server, Screen(browser, server) as screen:
        screen.bank = server.bank.by(keys["admin"]).given(alice=100)
        account, deposit = screen.bank.ids["alice"], screen.bank.last("alice")
        for role, (for_accounts, for_transactions) in forms.items():
            screen.open().enter(keys[role])
            # Who may not read events sees transactions alone.
            wait_until(lambda: len(screen.table("Latest")) >= 3)
            screen.open(f"transaction/{deposit}").offers(*for_transactions)
            screen.open(f"account/{account}").offers(*for_accounts)
            if role != "admin":
                screen.press("Forget the key")
        key_command(database, "revoke", "admin")
        wait_until(lambda: screen.bank.get("/accounts").status_code == 401)
        # It looks again at once when somebody comes back to it.
        screen.driver.execute_script("dispatchEvent(new Event('visibilitychange'))")
        screen.is_about("The credentials are not valid")
        assert (screen.forms(), "alice" in screen.text()) == ([], False)


@on_sqlite
def test_a_story_is_told_on_the_page_alone(screen: "Screen") -> None:
    screen.open()
    for name in ("Alice", "Bob"):
        screen.fill("Open an account", name)
        screen.says(f"Done: {name} has 0.00 USD")
    screen.follow("Alice")
    screen.offers("Deposit", "Transfer")
    screen.fill("Deposit", "10.5", "wages")
    screen.says("Done: Alice has 10.50 USD")
    for to, amount, told in (
        ("Bob", "1000", "Of account Alice, 10.50 is available, and 1,000.00 is needed"),
        ("Carol", "1", "No accounts of Carol have USD: use an id"),
        ("Bob", "3", "Done: the transaction"),
    ):
        screen.fill("Transfer", to, amount, "rent")
        screen.says(told)
    wait_until(lambda: len(screen.table("Statement")) == 2)
    screen.follow("the transaction")
    screen.offers("Reverse")
    screen.fill("Reverse", "wrong house")
    wait_until(lambda: "Reversed by" in dict(screen.table("Facts")))
    for name, balance in (("Alice", "10.50"), ("Bob", "0.00")):
        screen.follow(name)
        screen.says("Available")
        last = screen.table("Statement")[0]
        assert ("wrong house" in last[0], last[2]) == (True, balance)
        screen.driver.back()
        screen.is_about("Transfer")


@on_sqlite
def test_a_story_is_told_by_keyboard_alone(screen: "Screen") -> None:
    screen.bank.given(Alice=0, Bob=0)
    screen.open()
    screen.tab_to("Alice")
    screen.type(Keys.ENTER)
    screen.offers("Deposit", "Transfer")
    for form, *texts in (("Deposit", "5"), ("Transfer", "Bob", "2")):
        screen.tab_to(form)
        screen.type(Keys.ENTER, *(Keys.TAB + text for text in texts), Keys.ENTER)
        screen.says("Done: ")
    screen.tab_to("the transaction")
    screen.type(Keys.ENTER)
    screen.offers("Reverse")
    screen.tab_to("Reverse")
    screen.type(Keys.ENTER, Keys.TAB, "wrong", Keys.ENTER)
    wait_until(lambda: "Reversed by" in dict(screen.table("Facts")))


@on_sqlite
def test_a_double_click_and_a_lost_answer_move_money_once(screen: "Screen") -> None:
    screen.bank.given(alice=0)
    screen.open(f"account/{screen.bank.ids['alice']}")
    screen.offers("Deposit", "Transfer")
    clicks = "arguments[0].click(); arguments[0].click()"
    screen.fill("Deposit", "1", click=clicks)
    screen.says("Done: alice has 1.00 USD")
    lose = """const sent = fetch; window.fetch = async (...asked) => {
        if (asked[1].method === "POST") { window.fetch = sent; await sent(...asked); throw 0; }
        return sent(...asked);
    };"""
    screen.driver.execute_script(lose)
    screen.fill("Deposit", "2")
    screen.says("No answer came: send it again, and it is done once")
    # The reader may even have come anew.
    screen.open(f"account/{screen.bank.ids['alice']}")
    screen.offers("Deposit", "Transfer")
    screen.fill("Deposit", "2", click=clicks)
    screen.says("Done: alice has 3.00 USD")
    assert screen.bank.balances() == {"alice": 300}
    # What is meant anew is done anew.
    screen.fill("Deposit", "2")
    wait_until(lambda: screen.bank.balances() == {"alice": 500})


@on_sqlite
def test_a_page_that_nobody_sees_asks_for_nothing(screen: "Screen") -> None:
    screen.bank.given(alice=100)
    screen.open()
    hide = """Object.defineProperty(document, 'hidden', { configurable: true, get: () => %s });
        document.dispatchEvent(new Event('visibilitychange', { bubbles: true }));"""
    screen.driver.execute_script(hide % "true")
    screen.bank.deposit("alice", 1)
    asked = "return performance.getEntriesByType('resource').length"
    before = screen.driver.execute_script(asked)
    time.sleep(2.2)  # It looks again every two seconds.
    screen.driver.execute_script("location.hash = '#/accounts'")
    assert screen.driver.execute_script(asked) == before
    screen.driver.execute_script(hide % "false")
    wait_until(lambda: screen.table("Accounts")[-1] == ["alice Active", "USD 1.01"])


# ----- The README
# Its walk runs as it stands, and what it names is here.

PROGRAM = Path(ledger.__file__)
README = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
DEPLOYMENT = PROGRAM.with_name("deploy").joinpath("README.md").read_text(encoding="utf-8")
BASH = shutil.which("bash") or ""
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
SET_UP = README.partition("## A walk")[0].count("```bash\n")
# As somebody pastes into them, with whatever they do to comments and marks then.
SHELLS = {
    "bash": ("--norc", "--noprofile", "-i"),
    "zsh": ("-f", "-i"),
    "fish": ("--no-config", "-i"),
}
# It writes down what it was called with.
NOTER = '#!/bin/sh\necho "$(basename "$0") $*" >>"$NOTED"\n'


def paste(shell: str, text: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Paste text into a shell in a folder, whose own programs come first."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    path, noted = f"{folder}{os.pathsep}{os.environ['PATH']}", str(folder / "noted")
    ran = subprocess.run(
        [shell, *SHELLS[shell]],
        input=text,
        cwd=folder,
        env={**os.environ, "PATH": path, "NOTED": noted, "HOME": str(folder)},
        capture_output=True,
        text=True,
        timeout=600,
        start_new_session=True,  # The terminal of who runs the tests is none of its business.
    )
    assert "not found" not in ran.stderr, ran.stderr
    return ran


def put_noters(folder: Path, *names: str) -> None:
    """Put programs into a folder that do nothing but note that they were called."""
    for name in names:
        (folder / name).write_text(NOTER)
        (folder / name).chmod(0o755)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_commands_to_set_up_are_the_same_in_every_shell(shell: str, tmp_path: Path) -> None:
    venv.create(tmp_path / ".venv", symlinks=True)
    put_noters(tmp_path, "uv", "python3")
    put_noters(tmp_path / ".venv/bin", "pip", "pytest")
    program = "import os, sys; print(sys.prefix, file=open(os.environ['NOTED'], 'a'))"
    (tmp_path / "ledger.py").write_text(program)
    text = "".join(BLOCKS[:SET_UP])
    if shell == "fish":
        text = text.replace("/activate", "/activate.fish")
    paste(shell, f"{text}\npython ledger.py\n", tmp_path)
    installed = ["python3 -m venv .venv", "pip install -r requirements.txt"]
    assert (tmp_path / "noted").read_text().splitlines() == [
        "uv run ledger.py",
        *installed,
        str(tmp_path / ".venv"),
        *installed,
        "pytest ",
        str(tmp_path / ".venv"),
    ]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_the_walk_in_the_readme_runs_as_it_stands(shell: str, tmp_path: Path) -> None:
    # An empty folder is all that the server needs.
    with serving("") as server:
        folder, address = server.log.parent, server.said[0].split()[-1]
        # Python takes a second each time, so most of its commands are tried below.
        (tmp_path / "python").write_text(f"""{NOTER}
            case "$*" in *add*) cd {folder} && exec {sys.executable} {PROGRAM.parent}/"$@"; esac""")
        (tmp_path / "python").chmod(0o755)
        walk = "".join(BLOCKS[SET_UP:]).replace("http://127.0.0.1:8000", address)
        ran = paste(shell, f"set -eu\nset -o pipefail\n{walk}", tmp_path)
        assert ran.returncode == 0, ran.stderr
        listed = json.loads(ran.stdout.splitlines()[-1])["items"][-2:]  # The key opens it.
        assert [(each["owner_name"], each["balance"]) for each in listed] == [
            ("Alice", 750),
            ("Bob", 300),
        ]
        *commands, adding = [
            line.split()[2:] for line in (tmp_path / "noted").read_text().splitlines()
        ]
        assert (commands[0], adding[:2]) == (["check"], ["key", "add"])
        for command in commands if shell == "bash" else ():
            assert run_program(*command, folder=folder).returncode == 0, command
    for shown in ("Idempotent-Replayed: true", "insufficient_funds", '"ref":"rent"'):
        assert shown.lower() in ran.stdout.lower()


def test_the_receiver_in_the_readme_tells_ours_from_others(bank: "BankInside") -> None:
    [program] = re.findall(r"```python\n(# receiver\n.*?)```", README, re.DOTALL)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    secrets = [subscribe(bank, f"http://127.0.0.1:{port}/{number}") for number in range(2)]
    bank.given(alice=0)
    with subprocess.Popen(
        [sys.executable, "-c", program.replace("9000", str(port))],
        env={**os.environ, "SECRET": secrets[0]},
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            wait_until(lambda: is_open(port))
            deliver(bank)
        finally:
            process.kill()
    # It does not take what another secret has signed.
    taken = bank.rows("SELECT secret, failures FROM webhook ORDER BY id")
    assert taken == [(secrets[0], 0), (secrets[1], 1)]


def is_open(port: int) -> bool:
    """Tell whether somebody listens on a port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def readme_block(name: str) -> str:
    """Return the one block of the README that begins with a name."""
    [block] = re.findall(rf"```python\n# {name}\n(.*?)```", README, re.DOTALL)
    return str(block)


def test_the_library_of_the_readme(tmp_path: Path) -> None:
    (tmp_path / "program").write_text(readme_block("library"))
    ran = run_program("program", folder=tmp_path, target=run_script)
    assert (ran.stdout, ran.stderr) == ("750 DEBIT\n", "")


def test_the_application_of_the_readme(tmp_path: Path) -> None:
    visit = """
from fastapi.testclient import TestClient
with TestClient(main) as client:
    print(client.get("/ledger/health").json())
print(books.state.ledger.database.is_open)
"""
    (tmp_path / "program").write_text(readme_block("mounted") + visit)
    ran = run_program("program", folder=tmp_path, target=run_script)
    assert ran.stdout == "{'status': 'ok'}\nFalse\n", ran.stderr


DEPLOY = PROGRAM.with_name("deploy")
in_a_shell = pytest.mark.skipif(os.name == "nt", reason="it is for a Unix system")


@in_a_shell
def test_a_backup_is_checked_and_old_ones_are_removed(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "systemd/ledger-backup", tmp_path)
    # In the place of the one beside it, because Python takes a second each time.
    commands = 'backup) echo "$LEDGER" >"$2" ;; check) grep sound "${3#sqlite:///}" ;;'
    (tmp_path / "ledger").write_text(f"#!/bin/sh\ncase $1 in {commands} esac\n")
    (tmp_path / "ledger").chmod(0o755)

    def back_up(state: str) -> tuple[int, list[str]]:
        variables = {"LEDGER": state, "LEDGER_BACKUPS": str(tmp_path), "LEDGER_BACKUPS_KEPT": "2"}
        ran = subprocess.run([tmp_path / "ledger-backup"], env={**os.environ, **variables})
        return ran.returncode, sorted(file.name for file in tmp_path.glob("*.db"))

    for day in range(1, 4):
        (tmp_path / f"ledger-2025010{day}T000000Z.db").touch()
    status, kept = back_up("sound")
    assert (status, len(kept), kept[0]) == (0, 2, "ledger-20250103T000000Z.db")
    # One that is wrong is put aside, and costs no other one its place.
    (tmp_path / kept[1]).rename(tmp_path / "ledger-20250104T000000Z.db")
    (tmp_path / "ledger-20250105T000000Z.db").touch()
    others = [f"ledger-2025010{day}T000000Z.db" for day in (3, 4, 5)]
    assert back_up("damaged") == (1, [*others, "wrong.db"])


@in_a_shell
def test_secrets_are_made_once_for_their_owner_alone(tmp_path: Path) -> None:
    shutil.copy(DEPLOY / "make-secrets", tmp_path)
    made = set()
    for _ in range(2):
        subprocess.run([tmp_path / "make-secrets"], capture_output=True, check=True)
        made.add((tmp_path / ".env").read_text())
    [secrets_made] = made
    form = "POSTGRES_PASSWORD=[0-9a-f]{48}\nLEDGER_ADMIN_KEY=[0-9a-f]{48}\n"
    assert re.fullmatch(form, secrets_made)
    assert (tmp_path / ".env").stat().st_mode & 0o777 == 0o600


def test_every_test_that_the_readme_names_is_here() -> None:
    named = set(re.findall(r"`(test_\w+|Test\w+)`", README)) - {"test_ledger"}
    assert len(named) > 10
    assert named <= set(globals())


def test_the_tests_follow_the_order_of_the_program() -> None:
    def sections(file: Path) -> list[str]:
        return re.findall("^# -{5} (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)

    here, there = sections(Path(__file__)), sections(PROGRAM)
    assert [section for section in here if section in there] == there
    # What the first lines name is a section here, and no test comes after it.
    [named] = re.findall('the section "(.+?)"', __doc__ or "")
    after = Path(__file__).read_text(encoding="utf-8").partition(f"\n# ----- {named}\n")[2]
    assert after
    assert "\ndef test_" not in after


# ===== What the tests are made of


# ----- The words
# In them a test speaks to a ledger, of this process or of another, over HTTP.


class Bank:
    """A ledger, in which people are known by their names."""

    def __init__(self, send: Callable[..., httpx.Response], database: str) -> None:
        self.send = send
        self.database = database
        self.ids: dict[str, str] = {}
        self.is_shared = False

    def given(
        self, others: Mapping[str, int] | None = None, /, *, asset: str = "USD", **balances: int
    ) -> Self:
        """Open an account for each name, with a balance."""
        for name, balance in {**(others or {}), **balances}.items():
            assert not (self.is_shared and name in self.ids), f"{name} is another test's"
            opened = self.post("/accounts", owner_name=name, asset=asset)
            self.ids[name] = opened.json()["id"]
            if balance:
                assert self.deposit(name, balance).status_code == 200
        return self

    def by(self, credential: str, header: str = "X-API-Key") -> "Bank":
        """Return the same ledger, as a caller with a credential sees it."""

        def send(*request: Any, headers: Any = (), **options: Any) -> httpx.Response:
            return self.send(*request, headers={**dict(headers), header: credential}, **options)

        other = Bank(send, self.database)
        other.ids = self.ids
        return other

    def get(self, path: str, **parameters: Any) -> httpx.Response:
        """Read something."""
        return self.send("GET", path, params=parameters)

    def post(self, path: str, *, key: str | None = None, **body: Any) -> httpx.Response:
        """Send a body, under a key if there is one."""
        headers = {} if key is None else {"Idempotency-Key": key}
        return self.send("POST", path, json=body, headers=headers)

    def send_raw(
        self, path: str, body: Any, key: Any = "k", *, declared: Any = "application/json"
    ) -> httpx.Response:
        """Send a body as it stands, declared to be of some type."""
        headers = {"Content-Type": declared} | ({} if key is None else {"Idempotency-Key": key})
        return self.send("POST", path, content=body, headers=headers)

    def deposit(self, name: str, amount: int, **options: Any) -> httpx.Response:
        """Take money in, like all that follows under a new key unless one is given."""
        path = f"/accounts/{self.ids[name]}/deposit"
        return self.post(path, **{"amount": amount, "key": new_key(), **options})

    def withdraw(self, name: str, amount: int, **options: Any) -> httpx.Response:
        """Pay money out."""
        path = f"/accounts/{self.ids[name]}/withdraw"
        return self.post(path, **{"amount": amount, "key": new_key(), **options})

    def transfer(self, source: str, dest: str, amount: int, **options: Any) -> httpx.Response:
        """Move money."""
        body = {"source_account_id": self.ids[source], "dest_account_id": self.ids[dest]}
        return self.post("/transfers", **{**body, "amount": amount, "key": new_key(), **options})

    def transfer_body(self, amount: int = 1) -> dict[str, Any]:
        """Return the body of a transfer from Alice to Bob."""
        ends = {"source_account_id": self.ids["alice"], "dest_account_id": self.ids["bob"]}
        return {**ends, "amount": amount}

    def pay(self, name: str, amount: int, **options: Any) -> httpx.Response:
        """Pay a merchant."""
        body = {"account_id": self.ids[name], "amount": amount}
        return self.post("/payments", **{**body, "key": new_key(), **options})

    def hold(self, name: str, dest: str, amount: int, **options: Any) -> httpx.Response:
        """Promise money."""
        body = {"account_id": self.ids[name], "dest_account_id": self.ids[dest], "amount": amount}
        return self.post("/holds", **{**body, "key": new_key(), **options})

    def promised(self, name: str, dest: str, amount: int, **options: Any) -> str:
        """Return the id of a new hold."""
        return str(self.hold(name, dest, amount, **options).json()["id"])

    def capture(self, hold: str, **options: Any) -> httpx.Response:
        """Move what was promised."""
        return self.post(f"/holds/{hold}/capture", **{"key": new_key(), **options})

    def void(self, hold: str, **options: Any) -> httpx.Response:
        """Give up what was promised."""
        return self.post(f"/holds/{hold}/void", **{"key": new_key(), **options})

    def reverse(self, transaction: str, **options: Any) -> httpx.Response:
        """Take a transaction back."""
        return self.post(f"/transactions/{transaction}/reverse", **{"key": new_key(), **options})

    def journal(self, entries: Mapping[str, int], **options: Any) -> httpx.Response:
        """Post an entry for each name, with a sign as a leg has it."""
        listed = [
            {
                "account_id": self.ids[name],
                "type": "CREDIT" if amount > 0 else "DEBIT",
                "amount": abs(amount),
            }
            for name, amount in entries.items()
        ]
        return self.post("/transactions", **{"entries": listed, "key": new_key(), **options})

    def last(self, name: str) -> str:
        """Return the last transaction of an account."""
        return str(self.statement(name)[0]["transaction_id"])

    def funds(self, name: str) -> tuple[int, int, int]:
        """Return what an account has, what is held of it, and what is available."""
        return funds_of(self.get(f"/accounts/{self.ids[name]}").json())

    def step(self, name: str, step: str, **options: Any) -> httpx.Response:
        """Freeze, unfreeze or close an account."""
        return self.post(f"/accounts/{self.ids[name]}/{step}", **{"key": new_key(), **options})

    def balances(self) -> dict[str, int]:
        """Return what everybody has who opened an account under no name of a dialect."""
        items = self.get("/accounts", limit=200).json()["items"]
        return {a["owner_name"]: a["balance"] for a in items if a["name"] is None}

    def statement(self, name: str) -> list[dict[str, Any]]:
        """Return an account's last entries, newest first."""
        return list(self.get(f"/accounts/{self.ids[name]}/statement").json()["items"])

    def pages(self, path: str, **parameters: Any) -> Iterator[list[dict[str, Any]]]:
        """Walk through a list, page by page."""
        page = self.get(path, **parameters).json()
        yield page["items"]
        while cursor := page["next_cursor"]:
            page = self.get(path, **parameters, cursor=cursor).json()
            yield page["items"]

    def address(self) -> tuple[str, int]:
        """Return where a server listens."""
        url = self.get("/health").url
        return url.host, url.port or 80

    def rows(self, query: str) -> list[Any]:
        """Return stored rows, as another program sees them."""
        with closing(connect(self.database)) as connection:
            return list(connection.execute(query).fetchall())

    def contents(self) -> dict[str, list[Any]]:
        """Return all rows of all tables."""
        with closing(connect(self.database)) as connection:
            found = {
                table: connection.execute(f"SELECT * FROM {table}").fetchall()
                for table in ledger.TABLES
                if table != "schema_version"  # It describes itself in the engine's own words.
            }
        return {table: sorted(rows, key=str) for table, rows in found.items()}

    def callers(self) -> list[str]:
        """Return who did what, in its order."""
        return [caller for (caller,) in self.rows("SELECT caller FROM event ORDER BY id")]

    def wrong(self) -> list[str]:
        """Return what the integrity check finds."""
        with closing(ledger.database_at(self.database)) as database:
            return findings(database)

    def tamper(self, *statements: str) -> None:
        """Change stored rows, or the tables themselves, behind the ledger's back."""
        if re.search("DROP|CREATE|ALTER|schema_version", "".join(statements)):
            RENEWALS.pop(self.database, None)
        with closing(connect(self.database)) as connection, connection:
            for statement in statements:
                if self.database.startswith("sqlite"):
                    # There a trigger's name is enough.
                    statement = re.sub(r"^(DROP TRIGGER \w+) ON \w+$", r"\1", statement)
                connection.execute(statement)

    def tamper_freely(self, *statements: str) -> None:
        """Change stored rows with triggers and constraints off, as far as that is possible."""
        if self.database.startswith("postgresql"):
            self.tamper("SET session_replication_role = replica", *statements)
            return
        made = self.rows("SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'")
        others = [(name, sql) for name, sql in made if name not in "".join(statements)]
        off = ["PRAGMA foreign_keys = OFF", "PRAGMA ignore_check_constraints = ON"]
        off += [f"DROP TRIGGER {name}" for name, _ in others]
        self.tamper(*off, *statements, *[sql for _, sql in others])


class BankInside(Bank):
    """A ledger in this process, so that a test can look behind its HTTP."""

    def __init__(self, app: FastAPI, runner: asyncio.Runner, database: str, peer: str) -> None:
        self.app = app
        self.ledger: ledger.Ledger = app.state.ledger
        self.runner = runner
        self.wire = httpx.ASGITransport(app, client=(peer, 1))
        run = runner.get_loop().run_until_complete
        super().__init__(lambda *a, **o: run(self.ask(*a, **o)), database)

    async def ask(self, method: str, path: str, **given: Any) -> httpx.Response:
        """Return the answer to a request, in less time than a client of httpx takes for it.

        If it is a refusal, the API's description must tell of it.
        """
        request = httpx.Request(method, httpx.URL("http://127.0.0.1").join(path), **given)
        response = await self.wire.handle_async_request(request)
        response.request = request
        await response.aread()
        if response.status_code >= 400 and response.status_code not in (404, 405):
            assert self.is_documented(method, request.url.path, response), response.text
        return response

    def is_documented(self, method: str, path: str, response: httpx.Response) -> bool:
        """Tell whether the route that has answered says that it may answer so."""
        scope = {"type": "http", "method": method.replace("HEAD", "GET"), "path": path}
        routes: Any = self.app.routes
        [route, *_] = [r for r in routes if r.matches(dict(scope))[0] is Match.FULL]
        told = {(error.status, error.code) for error in route.documented}
        return (response.status_code, response.json()["code"]) in told

    def wrong(self) -> list[str]:
        """Return what the integrity check finds."""
        return findings(self.ledger.database)

    def together(self, *requests: Any) -> list[httpx.Response]:
        """Send (path, body) or (path, body, key) at one moment, so that they share a batch."""

        async def gather() -> list[httpx.Response]:
            sent = []
            for path, body, *given in requests:
                [key] = given or [new_key()]
                headers = {} if key is None else {"Idempotency-Key": key}
                sent.append(self.ask("POST", path, json=body, headers=headers))
            return await asyncio.gather(*sent)

        return self.runner.run(gather())

    def execute(self, operation: Callable[..., Any], *arguments: Any, **options: Any) -> None:
        """Execute an operation with arguments that no route would let pass."""
        [answer] = self.ledger.commit([command_of(operation, *arguments, **options)])
        assert answer.status == 200

    def pass_time(self, microseconds: int) -> None:
        """Move the clock, and let the ledger credit what is due by then."""
        now = ledger.utc_now() + microseconds
        ledger.utc_now = lambda: now
        self.runner.run(self.ledger.credit_due("SERVER", now))


DAY = ledger.CASHBACK_DELAY
HOUR = DAY // 24
REFUSED = (sqlite3.IntegrityError, psycopg.IntegrityError)


def funds_of(account: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Return what an account that is shown has, what is held of it, and what is available."""
    return account["balance"], account["held"], account["available"]


def new_key() -> str:
    """Return a key that nobody has used."""
    return str(uuid.uuid4())


def refusal(answer: httpx.Response) -> tuple[int, str]:
    """Return the status and the code of a refusal, after a look at its form."""
    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert problem["type"] == f"urn:ledger:error:{problem['code']}"
    assert problem["status"] == answer.status_code
    assert problem["title"]
    assert problem["detail"]
    return answer.status_code, problem["code"]


def outcome(answer: httpx.Response) -> int | str:
    """Return the status of what was done, or the code of a refusal."""
    return answer.status_code if answer.is_success else refusal(answer)[1]


def command_of(operation: Callable[..., Any], *arguments: Any, **options: Any) -> ledger.Command:
    """Return the command that calls an operation."""

    def run(book: ledger.Book) -> None:
        operation(book, *arguments, **options)

    return ledger.Command("test", "{}", run)


def findings(database: ledger.Database) -> list[str]:
    """Return what the integrity check finds."""
    with database.read() as connection:
        return [found for _, _, wrong in ledger.check(connection) for found in wrong]


def counted_calls(patch: pytest.MonkeyPatch, owner: object, name: str) -> list[Any]:
    """Return a list that grows with each call of a method from now on."""
    calls: list[Any] = []
    method = getattr(owner, name)

    def call(*given: Any) -> Any:
        calls.append(given)
        return method(*given)

    patch.setattr(owner, name, call)
    return calls


def printed(database: str, *arguments: str) -> str:
    """Run a command in this process, and return what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        assert ledger.main([*arguments, "--database-url", database]) == 0
    return printed.getvalue().strip()


def key_command(database: str, *arguments: str) -> str:
    """Run `python ledger.py key ...` in this process, and return what it prints."""
    return printed(database, "key", *arguments)


def new_api_key(database: str, name: str, role: str) -> str:
    """Make an API key, as the operator does."""
    return key_command(database, "add", "--name", name, "--role", role)


def subscribe(bank: "Bank", url: str, *options: str) -> str:
    """Add a receiver, as the operator does, and return its secret."""
    return printed(bank.database, "webhook", "add", "--url", url, *options)


def deliver(bank: "BankInside") -> None:
    """Post all receipts that can be posted now."""

    async def once() -> None:
        async with asyncio.TaskGroup() as tasks:
            await ledger.start_deliveries(bank.ledger, tasks)

    bank.runner.run(once())


def wait_no_longer(bank: "Bank") -> None:
    """Let an hour pass for the receivers: their clock is the database's, which nobody can move."""
    bank.tamper("UPDATE webhook SET due_at = due_at - 3600000000 WHERE due_at > 0")


def wait_until(is_true: Callable[[], bool]) -> None:
    """Look again and again until something is true; fail only if it never comes to be."""
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ----- Many at once
# Threads, each with connections of its own: what many threads share has failed under load.

T = TypeVar("T")
THREAD = threading.local()
tls = cache(httpx.create_ssl_context)


def ask(address: httpx.URL, method: str, path: str, **given: Any) -> httpx.Response:
    """Return a server's answer to a request that goes over this thread's own connections."""
    wires: dict[str, httpx.HTTPTransport] = vars(THREAD)
    if str(address) not in wires:
        wires[str(address)] = httpx.HTTPTransport(verify=tls(), trust_env=False)
    waiting = {"timeout": httpx.Timeout(60).as_dict()}
    request = httpx.Request(method, address.join(path), extensions=waiting, **given)
    response = wires[str(address)].handle_request(request)
    response.request = request
    response.read()
    return response


def hang_up() -> None:
    """Close this thread's connections."""
    while vars(THREAD):
        vars(THREAD).popitem()[1].close()


def at_once(actions: Sequence[Callable[[], T]]) -> list[T]:
    """Run each action in a thread of its own, all from the same moment, and return what they do."""
    barrier = threading.Barrier(len(actions))

    def run(action: Callable[[], T]) -> T:
        barrier.wait()
        try:
            return action()
        finally:
            hang_up()

    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(run, actions))


@contextmanager
def meanwhile(*actions: Callable[[], Any]) -> Iterator[None]:
    """Repeat each action in a thread of its own until the block ends; raise what it raises."""
    ended = threading.Event()

    def repeat(action: Callable[[], Any]) -> None:
        try:
            action()
            while not ended.is_set():
                action()
        finally:
            hang_up()

    with ThreadPoolExecutor(len(actions)) as threads:
        repeating = [threads.submit(repeat, action) for action in actions]
        try:
            yield
        finally:
            ended.set()
    for each in repeating:
        each.result()


# ----- Ledgers in this process


@contextmanager
def inside(app: FastAPI, database: str, peer: str = "127.0.0.1") -> Iterator[BankInside]:
    """Speak to an application in this process, from some address."""
    with asyncio.Runner() as runner:
        bank = BankInside(app, runner, database, peer)
        yield bank


@contextmanager
def opened(
    database: str,
    dialects: Sequence[APIRouter] = (ledger.api,),
    peer: str = "127.0.0.1",
    connected: ledger.Database | None = None,
    **settings: Any,
) -> Iterator[BankInside]:
    """Run the application in this process; with no dialect but the first it begins empty.

    Connections that are there already are used, and left open.
    """
    with ExitStack() as scene:
        with pytest.MonkeyPatch.context() as patch:
            if connected:
                connected.measure()
                patch.setattr(ledger, "database_at", lambda _: connected)
            app = ledger.create_app(ledger.Settings(database, **settings), dialects)
        if not connected:
            scene.callback(app.state.ledger.database.close)
        yield scene.enter_context(inside(app, database, peer))


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the clock that a test moves, and a developer's settings, out of the other tests."""
    monkeypatch.setattr(ledger, "utc_now", ledger.utc_now)
    names = ("LEDGER_DATABASE_URL", "LEDGER_ADMIN_KEY", "LEDGER_JWT_SECRET")
    proxies = [name for name in os.environ if name.lower().endswith("_proxy")]
    for name in (*names, *proxies, "DATABASE_URL", "PRELOAD_ACCOUNTS", "PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bank(database: str) -> Iterator[BankInside]:
    """A new and empty ledger."""
    with opened(database, connected=CONNECTED.get(database)) as bank:
        yield bank


@pytest.fixture
def demo(database: str) -> Iterator[BankInside]:
    """A new ledger with all dialects and their demo accounts."""
    with opened(database, ledger.DIALECTS, connected=CONNECTED.get(database)) as bank:
        yield bank


@pytest.fixture
def secured(database: str) -> Iterator[BankInside]:
    """A new ledger with an admin key and a secret for tokens, called from elsewhere."""
    secrets = {"admin_key": ADMIN_KEY, "jwt_secret": SECRET}
    connected = CONNECTED.get(database)
    with opened(database, ledger.DIALECTS, "10.0.0.1", connected, **secrets) as bank:
        yield bank


@pytest.fixture(scope="session")
def shared(new_database: "NewDatabase") -> Iterator[BankInside]:
    """One ledger with all dialects, in which Alice has 100 and Bob nothing."""
    with new_database() as database, opened(database, ledger.DIALECTS) as bank:
        yield bank.given(alice=100, bob=0)


@pytest.fixture
def untouched(shared: BankInside) -> Iterator[BankInside]:
    """The shared ledger, for what changes nothing: each row is the same after the test."""
    before = shared.contents()
    yield shared
    assert shared.contents() == before


@pytest.fixture(scope="session")
def eventful(new_database: "NewDatabase") -> Iterator[BankInside]:
    """One ledger with rows in each table and in each state, for statements that are refused."""
    with new_database() as database, opened(database) as bank:
        bank.given(alice=100, bob=0).pay("alice", 50)
        captured, voided, _ = (bank.promised("alice", "bob", 10) for _ in range(3))
        bank.capture(captured)
        bank.void(voided)
        bank.reverse(bank.last("alice"))
        for name in ("old", "new"):
            new_api_key(database, name, "admin")
        key_command(database, "revoke", "old")
        subscribe(bank, "http://localhost")
        printed(bank.database, "seal")
        yield bank


# ----- Processes
# `python ledger.py` itself, or a fork of a process that has imported it already: that runs the
# same `main`, and is ready twenty times as soon.


class Server(NamedTuple):
    """A server process, a bank that speaks to it, what it said at its start, and its log."""

    process: Any
    bank: Bank
    said: list[str]
    log: Path


@contextmanager
def as_command(environment: Mapping[str, str], said: Path, log: Path) -> Iterator[Any]:
    """Run `python ledger.py` in the folder of its log."""
    with said.open("w") as out, log.open("w") as errors:
        command, variables = [sys.executable, str(PROGRAM)], {**os.environ, **environment}
        with subprocess.Popen(
            command, cwd=log.parent, env=variables, stdout=out, stderr=errors
        ) as process:
            try:
                yield process
            finally:
                process.terminate()


@contextmanager
def as_fork(
    environment: Mapping[str, str],
    said: Path,
    log: Path,
    target: Any = None,
    arguments: Sequence[str] = (),
) -> Iterator[Any]:
    """Run the same, or what has these arguments, as a fork."""
    given = (arguments, environment, said, log)
    process = forks().Process(target=target or run_main, args=given)
    process.start()
    try:
        yield process
    finally:
        if process.is_alive():
            process.terminate()
        process.join()
        process.close()


@cache
def forks() -> Any:
    """Return what makes processes that have imported this file before they begin."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(PROGRAM.parent))
        multiprocessing.forkserver.ensure_running()
    return context


def run_main(
    arguments: Sequence[str], environment: Mapping[str, str], said: Path, log: Path
) -> None:
    """Do in a new process what `python ledger.py` does in the folder of its log."""
    settle(environment, said, log)
    sys.exit(ledger.main(arguments))


def run_module(
    arguments: Sequence[str], environment: Mapping[str, str], said: Path, log: Path
) -> None:
    """Do what `python -m` does."""
    settle(environment, said, log)
    sys.argv, sys.stdin = [*arguments], os.fdopen(0)  # Where it is looked for.
    runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)


def run_script(
    arguments: Sequence[str], environment: Mapping[str, str], said: Path, log: Path
) -> None:
    """Do what `python -W error` does with a file."""
    settle(environment, said, log)
    warnings.simplefilter("error")
    runpy.run_path(arguments[0], run_name="__main__")


def settle(environment: Mapping[str, str], said: Path, log: Path) -> None:
    """Give a new process its environment, its folder, and where its words go."""
    os.environ.update(environment)
    os.chdir(log.parent)
    for file, descriptor in ((said, 1), (log, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)


@contextmanager
def serving(database: str, start: Any = as_fork, **environment: str) -> Iterator[Server]:
    """Serve a database on a free port until the block ends."""
    environment = {"LEDGER_DATABASE_URL": database, "PORT": "0", **environment}
    with tempfile.TemporaryDirectory() as folder:
        said, log = Path(folder, "said"), Path(folder, "log")
        said.touch()
        log.touch()
        with start(environment, said, log) as process:
            wait_until(lambda: "  mode" in said.read_text() or "ledger:" in log.read_text())
            lines = said.read_text().splitlines()
            assert lines, log.read_text()
            address = lines[0].split()[-1]
            try:
                bank = Bank(partial(ask, httpx.URL(address)), database)
                yield Server(process, bank, lines, log)
            finally:
                hang_up()
        assert "Traceback" not in log.read_text(), log.read_text()


COMMANDS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "uvicorn": (
        run_module,
        ("uvicorn", "--app-dir", str(PROGRAM.parent), "ledger:app", "--port", "0"),
    ),
    "fastapi": (
        run_module,
        ("fastapi", "run", str(PROGRAM), "--host", "127.0.0.1", "--port", "0"),
    ),
    "ledger": (run_main, ("serve", "--port", "0")),
}


@contextmanager
def served_by(database: str, by: str, *options: str) -> Iterator[tuple[Bank, Path]]:
    """Serve by a command that tells its address; give a bank that speaks to it, and its log."""
    (target, command), found = COMMANDS[by], list[str]()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        log.touch()
        given = {"LEDGER_DATABASE_URL": database, "PYTHONUNBUFFERED": "1"}
        with as_fork(given, log, log, target, [*command, *options]) as process:

            def is_there() -> bool:
                found[:] = re.findall("(?:running|serves) on (http://[0-9.:]+)", log.read_text())
                ready = "startup complete" in log.read_text() or "mode  " in log.read_text()
                return not process.is_alive() or (bool(found) and ready)

            wait_until(is_there)
            assert found, log.read_text()
            try:
                yield Bank(partial(ask, httpx.URL(found[0])), database), log
            finally:
                hang_up()
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="session")
def server(new_database: "NewDatabase") -> Iterator[Server]:
    """One server for all tests that do not end it: each has names of its own."""
    with new_database() as database, serving(database) as server:
        server.bank.is_shared = True
        yield server


@pytest.fixture(scope="session", params=[1, 2])
def servers(new_database: "NewDatabase", request: pytest.FixtureRequest) -> Iterator[Bank]:
    """One ledger behind one server process, or behind two in turn, for all tests as well."""
    with new_database() as database, ExitStack() as stack:
        serve = [stack.enter_context(serving(database)) for _ in range(request.param)]
        in_turn = itertools.cycle([server.bank.send for server in serve])
        bank = Bank(lambda *a, **o: next(in_turn)(*a, **o), database)
        bank.is_shared = True
        yield bank


class Receipt(NamedTuple):
    """A receipt as it came: when, over which connection, its headers and its body."""

    at: float
    connection: str
    headers: dict[str, str]
    body: str


class Receiver(NamedTuple):
    """A process that notes what is posted to it, and answers as a file in its folder says."""

    folder: Path
    address: str
    name: str

    def answering(self, status: int, *, after: float = 0, at: str = "") -> str:
        """Answer so from now on, or with 0 not until another status is said; return the URL."""
        file = Path(self.folder, self.name + at)
        # At once and as a whole, because it is read meanwhile.
        file.with_suffix(".new").write_text(f"{status} {after}")
        file.with_suffix(".new").replace(file)
        return f"{self.address}/{self.name}{at}"

    def receipts(self, at: str = "") -> list[Receipt]:
        """Return what has come, in its order."""
        noted = Path(self.folder, f"{self.name}{at}.noted")
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [Receipt(*json.loads(line)) for line in lines]

    def types(self) -> list[str]:
        """Return the types of what has come."""
        return [json.loads(receipt.body)["type"] for receipt in self.receipts()]

    def ids(self) -> list[str]:
        """Return the ids of what has come, each where it came first."""
        return list(dict.fromkeys(each.headers["webhook-id"] for each in self.receipts()))


def receive(folder: str) -> None:
    """Be the process of a receiver."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            headers = {name.lower(): value for name, value in self.headers.items()}
            line = json.dumps(Receipt(time.time(), str(self.client_address), headers, body))
            # What it answers was said before it notes: a test that sees a note may say the next.
            answers = Path(folder, self.path[1:])
            said = answers.read_text().split()
            with Path(folder, f"{self.path[1:]}.noted").open("a") as noted:
                noted.write(f"{line}\n")
            while said[0] == "0":
                time.sleep(0.02)
                said = answers.read_text().split()
            time.sleep(float(said[1]))
            self.send_response(int(said[0]))
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "2")
            with suppress(ConnectionError):  # Who has waited for long may be gone.
                self.end_headers()
                self.wfile.write(b"ok")

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Path(folder, "port").write_text(f"{server.server_port}\n")
    server.serve_forever()


@pytest.fixture(scope="session")
def receiving() -> Iterator[Receiver]:
    """The process of all receivers."""
    with tempfile.TemporaryDirectory() as folder:
        process, port = forks().Process(target=receive, args=(folder,)), Path(folder, "port")
        process.start()
        wait_until(lambda: port.exists() and port.read_text().endswith("\n"))
        yield Receiver(Path(folder), f"http://127.0.0.1:{port.read_text().strip()}", "")
        process.kill()
        process.join()
        process.close()


@pytest.fixture
def receiver(receiving: Receiver) -> Receiver:
    """A receiver that nothing was posted to yet."""
    return receiving._replace(name=new_key())


def run_program(
    *arguments: str, folder: Path, target: Any = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ledger.py` with arguments in a folder to its end, as a fork."""
    said, log = folder / "said", folder / "log"
    process = forks().Process(target=target or run_main, args=(arguments, environment, said, log))
    process.start()
    process.join()
    status = process.exitcode
    process.close()
    return subprocess.CompletedProcess(arguments, status, said.read_text(), log.read_text())


def prove(program: str, *options: str, status: int = 0) -> str:
    """Run a program of `bench/` as a fork; return its last line, which has the figures."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        place = Path(folder)
        ran = run_program(program, *options, folder=place, target=run_proof, TMPDIR=folder)
    assert ran.returncode == status, ran.stdout + ran.stderr
    return ran.stdout.splitlines()[-1]


def run_proof(
    arguments: Sequence[str], environment: Mapping[str, str], said: Path, log: Path
) -> None:
    """Do in a new process what `python bench/PROGRAM` does in an empty folder."""
    settle(environment, said, log)
    program = PROGRAM.with_name("bench") / arguments[0]
    sys.argv, sys.path[:0] = [str(program), *arguments[1:]], [str(program.parent)]
    runpy.run_path(str(program), run_name="__main__")


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python to the end of what it is given, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=600,
        )


# ----- The browser
# One for all tests that look at the page, which are skipped where there is none.


class Screen:
    """The page of a server, as somebody sees and uses it."""

    def __init__(self, driver: webdriver.Chrome, server: Server) -> None:
        self.driver, self.bank = driver, server.bank
        self.address = server.said[0].split()[-1]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # It asks its server no more, and has the size that it had.
        self.driver.get("about:blank")
        self.driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def open(self, place: str = "") -> Self:
        """Visit a place anew, which another query makes it, and wait until something is there."""
        self.driver.get(f"{self.address}/?{new_key()}#/{place}")
        wait_until(lambda: bool(self.heading()))
        return self

    def heading(self) -> str | None:
        """Return what the page says it is about."""
        heading = "return document.querySelector('h1')?.innerText"
        return self.driver.execute_script(heading)  # type: ignore[no-any-return]

    def is_about(self, heading: str) -> None:
        """Wait until the page says that it is about something, which it does when all is drawn."""
        wait_until(lambda: self.heading() == heading)

    def text(self) -> str:
        """Return all that is shown."""
        return self.driver.execute_script("return document.body.innerText")  # type: ignore[no-any-return]

    def table(self, title: str) -> list[list[str]]:
        """Return the cells of the rows under a heading, or none."""
        return self.driver.execute_script(TABLE, title)  # type: ignore[no-any-return]

    def follow(self, text: str) -> None:
        """Follow a link, at once: a list may be drawn anew at any moment."""
        found = "[...document.links].find((each) => each.innerText === arguments[0])"
        self.driver.execute_script(f"{found}.click()", text)

    def find(self, text: str) -> None:
        """Search, by keyboard."""
        field = self.driver.find_element(By.NAME, "text")
        field.clear()
        field.send_keys(f"{text}\n")

    def press(self, text: str) -> None:
        """Press a button."""
        self.driver.find_element(By.XPATH, f"//button[.='{text}']").click()

    def between(self, first: str, last: str) -> None:
        """Choose days."""
        for name, day in (("from", first), ("to", last)):
            field = self.driver.find_element(By.NAME, name)
            self.driver.execute_script("arguments[0].value = arguments[1]", field, day)
        self.press("Show")

    def says(self, text: str) -> None:
        """Wait until something is shown."""
        wait_until(lambda: text in self.text())

    def offers(self, *forms: str) -> None:
        """Wait until it is known who asks, and these things can be done, and no others."""
        asked = "return performance.getEntriesByType('resource').map((each) => each.name).join()"
        wait_until(lambda: "none/reverse" in self.driver.execute_script(asked))
        wait_until(lambda: self.forms() == list(forms))

    def forms(self) -> list[str]:
        """Return what can be done here."""
        titles = "return [...document.querySelectorAll('summary')].map((each) => each.innerText)"
        return self.driver.execute_script(titles)  # type: ignore[no-any-return]

    def fill(self, title: str, *texts: str, click: str = "arguments[0].click()") -> None:
        """Fill in a form, in the order of its fields, and send it."""
        form = self.driver.find_element(By.XPATH, f"//details[summary='{title}']")
        self.driver.execute_script("arguments[0].open = true", form)
        for field, text in zip(form.find_elements(By.TAG_NAME, "input"), texts, strict=False):
            field.clear()
            field.send_keys(text)
        self.driver.execute_script(click, form.find_element(By.TAG_NAME, "button"))

    def taken(self, title: str) -> list[dict[str, str]]:
        """Return the rows of the CSV that a list offers."""
        found = self.driver.find_element(By.CSS_SELECTOR, f"[download='{title}.csv']")
        text = unquote(str(found.get_attribute("href")).partition(",")[2])
        return list(csv.DictReader(io.StringIO(text, newline="")))

    def type(self, *keys: str) -> None:
        """Type where the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def tab_to(self, text: str) -> None:
        """Go on by keyboard to what has a text."""
        for _ in range(60):
            self.type(Keys.TAB)
            if self.driver.switch_to.active_element.text == text:
                return
        raise AssertionError(f"no Tab leads to {text}")

    def enter(self, key: str) -> None:
        """Give a key, by keyboard."""
        self.driver.find_element(By.NAME, "key").send_keys(f"{key}\n")


TABLE = """
    const sections = [...document.querySelectorAll("section")];
    const found = sections.find((each) => each.querySelector("h2").innerText === arguments[0]);
    const rows = [...(found?.querySelectorAll("tbody tr") ?? [])];
    const text = (cell) => cell.innerText.replace(/\\s+/g, " ").trim();
    return rows.map((row) => [...row.cells].map(text));
"""


@pytest.fixture(scope="session")
def browser() -> Iterator[webdriver.Chrome]:
    """Chromium without a window, which ends with the tests."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no Chromium: install it and its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    # As root it does not run in its sandbox; and a container's shared memory may be small.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    # What it leaves behind, it leaves there.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        service = webdriver.ChromeService(driver, env={**os.environ, "TMPDIR": folder})
        with webdriver.Chrome(options, service) as browser:
            yield browser


@pytest.fixture
def screen(database: str, browser: webdriver.Chrome) -> Iterator[Screen]:
    """The page of a new ledger in open mode."""
    with serving(database, PRELOAD_ACCOUNTS="{}") as server, Screen(browser, server) as screen:
        yield screen


# ----- The two engines
# PostgreSQL is the server that LEDGER_TEST_DATABASE_URL names, or one of this run alone where the
# programs are installed; otherwise its tests are skipped.

SHARED_MEMORY = Path("/dev", "shm")
ROOM = shutil.disk_usage(SHARED_MEMORY).free if os.access(SHARED_MEMORY, os.W_OK) else 0
MEMORY = SHARED_MEMORY if ROOM > 2**30 else None
"""A folder for files that are synced as any other, but wait for no disk."""
NewDatabase = Callable[..., Any]
"""What lends a new ledger for a block, or a `blank` database, without even tables."""
RENEWALS: dict[str, str] = {}
"""For databases that have still the tables of a new ledger, what gives them its rows again."""
CONNECTED: dict[str, ledger.Database] = {}
"""The connections to such databases, which one test after another uses.

As those of a server that runs for long: a new connection learns every statement and trigger anew.
"""


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The engine that a test runs on: first all on the one, then all on the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_database(engine: str, request: pytest.FixtureRequest) -> NewDatabase:
    """What lends new ledgers of the engine."""
    return databases_of(engine, request)


@pytest.fixture
def database(new_database: NewDatabase) -> Iterator[str]:
    """The URL of a new ledger."""
    with new_database() as url:
        yield url


def databases_of(engine: str, request: pytest.FixtureRequest) -> NewDatabase:
    """Return what lends new ledgers of an engine."""
    if engine == "sqlite":
        return new_file
    lend: NewDatabase = request.getfixturevalue("lend_postgresql")
    return lend


@contextmanager
def new_file(*, blank: bool = False) -> Iterator[str]:
    """Lend a file that holds a new ledger, or is not there yet; remove it in the end."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        file = Path(folder, "ledger.db")
        if not blank:
            file.write_bytes(new_ledger())
        yield f"sqlite:///{file}"


@cache
def new_ledger() -> bytes:
    """Return the file of a new ledger: to copy it is quicker than to make another."""
    with new_file(blank=True) as database:
        make_ledger(database)
        return file_of(database).read_bytes()


def make_ledger(database: str) -> None:
    """Make the tables of a ledger, and the rows that each begins with."""
    ledger.create_app(ledger.Settings(database), ()).state.ledger.database.close()


@pytest.fixture(scope="session")
def lend_postgresql(postgresql: str) -> Iterator[NewDatabase]:
    """What lends databases that are made new again: making one for each test takes too long."""
    idle: list[tuple[str, Any]] = []
    with ExitStack() as made:

        @contextmanager
        def lend(*, blank: bool = False) -> Iterator[str]:
            if not idle:
                url = made.enter_context(new_postgresql(postgresql))
                connection = psycopg.connect(url, autocommit=True)
                idle.append((url, made.enter_context(closing(connection))))
            url, connection = idle.pop()
            renew(url, connection, blank=blank)
            yield url
            idle.append((url, connection))

        yield lend
        while CONNECTED:
            CONNECTED.popitem()[1].close()


def renew(database: str, connection: Any, *, blank: bool) -> None:
    """Make a database a new ledger again, or leave not even a table in it."""
    if database in RENEWALS and not blank:
        connection.execute(RENEWALS[database])
        return
    RENEWALS.pop(database, None)
    if database in CONNECTED:
        CONNECTED.pop(database).close()
    connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    if not blank:
        make_ledger(database)
        RENEWALS[database] = renewal(connection)
        CONNECTED[database] = ledger.database_at(database)


def renewal(connection: Any) -> str:
    """Return the statements that leave the rows that are there now, and no others."""
    statements = ["SET session_replication_role = replica"]  # No trigger keeps a row.
    for table in ledger.TABLES.keys() - {"schema_version"}:
        rows = connection.execute(f"SELECT json_agg({table})::text FROM {table}").fetchone()[0]
        statements.append(f"DELETE FROM {table}")
        source = f"json_populate_recordset(NULL::{table}, $rows${rows or '[]'}$rows$)"
        statements.append(f"INSERT INTO {table} SELECT * FROM {source}")
    return "; ".join(statements)


@contextmanager
def new_postgresql(server: str, options: str = "ENCODING 'UTF8'") -> Iterator[str]:
    """Make a database on a PostgreSQL server, and drop it in the end."""
    name = f"ledger_test_{uuid.uuid4().hex}"
    with closing(psycopg.connect(server, autocommit=True)) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE template0 {options}")
        try:
            yield urlsplit(server)._replace(path=f"/{name}").geturl()
        finally:
            connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def with_parameters(url: str, **parameters: str) -> str:
    """Return a PostgreSQL URL with further parameters, which win over those it has."""
    added = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
    return f"{url}{'&' if '?' in url else '?'}{added}"


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """The URL of a PostgreSQL server."""
    if given := os.environ.get("LEDGER_TEST_DATABASE_URL"):
        yield given
        return
    with own_postgresql() as (url, _):
        yield url


@pytest.fixture(scope="session")
def stoppable() -> Iterator[tuple[str, Callable[[str], None]]]:
    """A PostgreSQL server that tests may stop, and what starts and stops it."""
    with own_postgresql() as server:
        yield server


@contextmanager
def own_postgresql() -> Iterator[tuple[str, Callable[[str], None]]]:
    """Run a PostgreSQL server that syncs nothing; give its URL, and what starts and stops it.

    It listens on a socket in its own folder, and on no port.
    """
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (installed and installed[-1])
    if not found:
        pytest.skip("no PostgreSQL: install its server, or set LEDGER_TEST_DATABASE_URL")
    settings = {"listen_addresses": "''", "max_connections": 200, "fsync": "off"}
    settings |= {"full_page_writes": "off", "wal_level": "minimal", "max_wal_senders": 0}
    with tempfile.TemporaryDirectory() as folder:
        # It refuses to run as root.
        user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
        if user:
            shutil.chown(folder, **user)

        def run(program: str, *options: str) -> None:
            command = [str(Path(found).with_name(program)), "-D", f"{folder}/data", *options]
            subprocess.run(command, check=True, capture_output=True, cwd=folder, **user)

        def control(action: str) -> None:
            given = " ".join(f"-c {name}={value}" for name, value in settings.items())
            given += f" -c unix_socket_directories={folder}"
            run("pg_ctl", "-m", "immediate", "-o", given, "-l", f"{folder}/log", "-w", action)

        run("initdb", "-U", "ledger", "-A", "trust", "-E", "UTF8", "--no-sync")
        control("start")
        try:
            yield f"postgresql://ledger@/postgres?host={quote(folder, safe='')}", control
        finally:
            control("stop")


def connect(database: str) -> Any:
    """Connect to a database as another program does."""
    if database.startswith("sqlite"):
        return sqlite3.connect(file_of(database))
    return psycopg.connect(database)


def file_of(database: str) -> Path:
    """Return the file that holds a ledger on SQLite."""
    return Path(database.removeprefix("sqlite:///"))
