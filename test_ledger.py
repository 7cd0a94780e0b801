"""The specification of ledger.py, section by section in its order: `pytest` runs it.

It opens with a day at the bank, after which a reader may stop. What the tests are made of, their
words, processes and databases, stands at the end.
"""

import asyncio
import hmac
import io
import itertools
import json
import logging
import multiprocessing.forkserver
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
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

import httpx
import jwt
import psycopg
import pytest
from hypothesis import settings, stateful
from hypothesis import strategies as st

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
# LEDGER_TEST_CYCLES=25 kills servers 25 times instead of 3, and tries on both engines what is
# refused before any database is asked.
ENGINES = ("sqlite", "postgresql")
CYCLES = int(os.environ.get("LEDGER_TEST_CYCLES", "3"))
on_sqlite = pytest.mark.parametrize("engine", ["sqlite"], indirect=True)
on_postgresql = pytest.mark.parametrize("engine", ["postgresql"], indirect=True)
at_the_edge = pytest.mark.parametrize("engine", ENGINES[: 1 + (CYCLES > 3)], indirect=True)
NOBODY = "00000000-0000-7000-8000-000000000000"
ATM_DEMO = json.loads(ledger.ATM_DEMO)


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


def test_every_error_has_a_code_of_its_own() -> None:
    errors = ledger.LedgerError.__subclasses__()
    assert len({error.code for error in errors}) == len(errors)
    assert all(400 <= error.status < 600 for error in errors)


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
        entries_like(seq="seq + 1", amount="0"),
        "INSERT INTO api_key VALUES ('x', 'x', 'x', 'root', 0, NULL)",
    ],
)
def test_a_table_refuses_what_breaks_its_rules(bank: "Bank", statement: str) -> None:
    bank.given(alice=100)
    with pytest.raises(REFUSED, match=r"(?i)CHECK"):
        bank.tamper(statement)
    assert bank.wrong() == []


def test_the_database_keeps_customers_above_zero(bank: "Bank") -> None:
    bank.given(alice=100)
    below = entries_like(seq="2", type="'DEBIT'", amount="101", balance="-1")
    with pytest.raises(REFUSED, match=r"(?i)CHECK"):
        bank.tamper(
            f"{below} WHERE account_id = '{bank.ids['alice']}'",
            f"UPDATE account SET balance = -1, last_seq = 2 WHERE id = '{bank.ids['alice']}'",
        )


@on_sqlite
def test_sqlite_takes_no_fraction_for_an_amount(bank: "Bank") -> None:
    half = "INSERT INTO account VALUES ('x', NULL, '', 'USD', 'ACTIVE', 0.5, 0, 'SYSTEM', 0)"
    with pytest.raises(sqlite3.IntegrityError, match="REAL"):
        bank.tamper(half)


# ----- Posting
# A post is checked as a whole before it changes anything; an operation that posts twice is undone
# as a whole.


def book_of(**balances: int) -> tuple[ledger.Book, dict[str, ledger.Account]]:
    """Return an open batch, and its accounts: some names say what is special about them."""
    book = ledger.Book(None)  # type: ignore[arg-type]
    book.command = ledger.Command("test", "{}", lambda book: None)
    accounts = [
        ledger.Account(
            id=name,
            owner_name=name,
            asset="EUR" if name == "euros" else "USD",
            kind="SYSTEM" if name == "cash" else "CUSTOMER",
            status=name.upper() if name in ("frozen", "closed") else "ACTIVE",
            balance=balance,
            last_seq=1,
            created_at=0,
        )
        for name, balance in balances.items()
    ]
    for account in accounts:
        book.hold(account)
    return book, {name: book.accounts[name] for name in balances}


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
    before = {"alice": 100, "bob": 0, "frozen": 100, "closed": 0, "euros": 9}
    before |= {"full": ledger.BALANCE_MAX, "cash": -ledger.BALANCE_MAX}
    book, accounts = book_of(**before)
    with pytest.raises(error):
        book.post("TEST", [ledger.Leg(accounts[name], amount) for name, amount in legs.items()])
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


def test_a_balance_cannot_leave_64_bits(bank: "BankInside") -> None:
    bank.given(alice=0, bob=0)
    bank.execute(ledger.deposit, bank.ids["alice"], amount=ledger.BALANCE_MAX)
    assert refusal(bank.deposit("alice", 1)) == (409, "balance_limit")
    # Cash is the other side of every deposit, so it is full as well.
    assert refusal(bank.deposit("bob", 1)) == (409, "balance_limit")
    assert bank.balances() == {"alice": ledger.BALANCE_MAX, "bob": 0}
    assert bank.wrong() == []


def dialect_that_overdraws(*, asks: bool) -> ledger.Dialect:
    """Return a dialect of one operation, which deposits 5 and then withdraws far too much."""
    twice = ledger.Dialect("twice", "/twice")

    @twice.post("/{account_id}", roles=ledger.ADMINS)
    def overdraw(book: ledger.Book, account_id: ledger.AccountId) -> ledger.AccountPublic:
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
        assert [answer.status_code for answer in answers] == [200, 409, 200]
        assert bank.balances() == {"alice": 102}
        assert len(bank.statement("alice")) == 3
        assert bank.wrong() == []


# ----- Operations
# Money comes in, moves, is paid and goes out; accounts open, freeze and close. At the end of the
# section stands the test of them all together, in any order.


def test_an_account_is_opened_in_its_asset(bank: "Bank") -> None:
    for asset in ("USD", "EUR", "GBP", "JPY"):
        opened = bank.post("/accounts", owner_name="Alice", asset=asset)
        assert (opened.status_code, opened.json()["asset"]) == (201, asset)


def test_a_closed_loop_asset_is_not_for_everybody(bank: "Bank") -> None:
    for asset in ("GOLD", "DMND", "PTS"):
        refused = bank.post("/accounts", owner_name="Alice", asset=asset)
        assert refusal(refused) == (409, "asset_closed_loop")


def test_an_unknown_asset_is_not_found(bank: "Bank") -> None:
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


def test_of_two_changes_of_state_at_one_moment_one_wins(bank: "BankInside") -> None:
    path = f"/accounts/{bank.given(alice=0).ids['alice']}/freeze"
    answers = bank.together((path, {}), (path, {}))
    assert [answer.status_code for answer in answers] == [200, 409]
    assert refusal(answers[1]) == (409, "invalid_state_transition")


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
    assert [answer.status_code for answer in answers] == [409, 200, 200, 200, 409]
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
    commit = bank.ledger.commit

    def count_and_commit(batch: Sequence[ledger.Command]) -> list[ledger.Answer]:
        passes.append(len(batch))
        return commit(batch)

    monkeypatch.setattr(bank.ledger, "commit", count_and_commit)
    later = ledger.utc_now() + DAY

    async def tell_the_time() -> None:
        await asyncio.gather(*(bank.ledger.credit_due("CALLER", later) for _ in range(50)))
        await asyncio.gather(*(bank.ledger.credit_due("SERVER", later) for _ in range(50)))

    bank.runner.run(tell_the_time())
    # One, and others at most for those who had looked just before it was committed.
    assert 1 <= len(passes) < 10


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


class AnyStory(stateful.RuleBasedStateMachine):
    """Whatever happens, in whatever order: the ledger agrees with a few dictionaries.

    Another operation is another rule. What it sends under a key goes through `expect`, which
    keeps it so that `replay` can send it again.
    """

    def __init__(self, new_database: "NewDatabase") -> None:
        super().__init__()
        self.scene = ExitStack()
        self.bank = self.scene.enter_context(opened(self.scene.enter_context(new_database())))
        self.balances: dict[str, int] = {}
        self.status: dict[str, str] = {}
        self.promised: Counter[str] = Counter()
        self.sent: list[tuple[Callable[[], httpx.Response], bytes]] = []

    people = st.integers(min_value=0, max_value=3)
    amounts = st.integers(min_value=1, max_value=150)

    def person(self, number: int) -> str:
        """Return one of those who have an account."""
        return sorted(self.balances)[number % len(self.balances)]

    def expect(self, allowed: bool, send: Callable[..., httpx.Response], *details: Any) -> bool:
        """Send something under a new key, which is allowed or refused; return which."""
        replay = partial(send, *details, key=new_key())
        answer = replay()
        assert answer.status_code == (200 if allowed else 409)
        self.sent.append((replay, answer.content))
        return allowed

    @stateful.precondition(lambda self: len(self.balances) < 4)
    @stateful.rule()
    def open(self) -> None:
        name = f"person {len(self.balances)}"
        self.bank.given({name: 0})
        self.balances[name], self.status[name] = 0, "ACTIVE"

    @stateful.precondition(lambda self: self.balances)
    @stateful.rule(number=people, amount=amounts)
    def deposit(self, number: int, amount: int) -> None:
        name = self.person(number)
        if self.expect(self.status[name] == "ACTIVE", self.bank.deposit, name, amount):
            self.balances[name] += amount

    @stateful.precondition(lambda self: self.balances)
    @stateful.rule(number=people, amount=amounts)
    def withdraw(self, number: int, amount: int) -> None:
        name = self.person(number)
        allowed = self.status[name] == "ACTIVE" and amount <= self.balances[name]
        if self.expect(allowed, self.bank.withdraw, name, amount):
            self.balances[name] -= amount

    @stateful.precondition(lambda self: self.balances)
    @stateful.rule(number=people, amount=amounts)
    def pay(self, number: int, amount: int) -> None:
        name = self.person(number)
        allowed = self.status[name] == "ACTIVE" and amount <= self.balances[name]
        if self.expect(allowed, self.bank.pay, name, amount):
            self.balances[name] -= amount
            self.promised[name] += amount * 2 // 100

    @stateful.precondition(lambda self: len(self.balances) > 1)
    @stateful.rule(numbers=st.tuples(people, people), amount=amounts)
    def transfer(self, numbers: tuple[int, int], amount: int) -> None:
        source, dest = (self.person(number) for number in numbers)
        if source == dest:
            refused = self.bank.transfer(source, dest, amount)
            assert refusal(refused) == (400, "same_account")
            return
        active = self.status[source] == self.status[dest] == "ACTIVE"
        allowed = active and amount <= self.balances[source]
        if self.expect(allowed, self.bank.transfer, source, dest, amount):
            self.balances[source] -= amount
            self.balances[dest] += amount

    @stateful.precondition(lambda self: self.balances)
    @stateful.rule(number=people, step=st.sampled_from(["freeze", "unfreeze", "close"]))
    def step(self, number: int, step: str) -> None:
        name = self.person(number)
        held = self.balances[name] + self.promised[name]
        status, origins = {
            "freeze": ("FROZEN", {"ACTIVE"}),
            "unfreeze": ("ACTIVE", {"FROZEN"}),
            "close": ("CLOSED", {"ACTIVE", "FROZEN"} if held == 0 else set()),
        }[step]
        if self.expect(self.status[name] in origins, self.bank.step, name, step):
            self.status[name] = status

    @stateful.rule()
    def pass_a_day(self) -> None:
        self.bank.pass_time(DAY)
        for name, status in self.status.items():
            if status == "ACTIVE":
                self.balances[name] += self.promised.pop(name, 0)

    @stateful.precondition(lambda self: self.sent)
    @stateful.rule(number=st.integers(min_value=0, max_value=99))
    def replay(self, number: int) -> None:
        send, content = self.sent[number % len(self.sent)]
        again = send()
        assert (again.content, again.headers["Idempotent-Replayed"]) == (content, "true")

    @stateful.invariant()
    def the_books_agree(self) -> None:
        assert self.bank.balances() == self.balances
        assert self.bank.rows("SELECT SUM(balance) FROM account") == [(0,)]
        assert self.bank.wrong(rows_only=True) == []

    def teardown(self) -> None:
        self.scene.close()


def test_any_story_agrees_with_a_dictionary(engine: str, new_database: "NewDatabase") -> None:
    stories = settings(
        max_examples=20 if engine == "sqlite" else 6,
        stateful_step_count=20,
        deadline=None,
        database=None,
    )
    stateful.run_state_machine_as_test(partial(AnyStory, new_database), settings=stories)  # type: ignore[arg-type]


# ----- Batches
# What arrives together is committed together, a key acts once, and nobody is answered before the
# commit. The last tests of the section load real servers, and kill them.


def test_what_arrives_together_is_one_commit(bank: "BankInside") -> None:
    deposit = (f"/accounts/{bank.given(alice=100).ids['alice']}/deposit", {"amount": 1})
    answers = bank.together(*[deposit] * 20)
    assert [answer.json()["balance"] for answer in answers] == list(range(101, 121))
    assert bank.rows("SELECT COUNT(DISTINCT ts) FROM event WHERE kind = 'DEPOSIT'") == [(2,)]


def test_a_refused_command_does_not_disturb_its_neighbours(bank: "BankInside") -> None:
    path = f"/accounts/{bank.given(alice=10).ids['alice']}"
    answers = bank.together(
        (f"{path}/deposit", {"amount": 5}),
        (f"{path}/withdraw", {"amount": 16}),
        (f"{path}/withdraw", {"amount": 15}),
        (f"/accounts/{NOBODY}/deposit", {"amount": 1}),
    )
    assert [answer.status_code for answer in answers] == [200, 409, 200, 404]
    assert bank.balances() == {"alice": 0}
    assert bank.wrong() == []


def test_a_command_that_the_database_refuses_sinks_alone(database: str) -> None:
    faulty, faults = ledger.Dialect("faulty", "/faulty"), ["a row that breaks a constraint"]

    @faulty.post("/{account_id}", roles=ledger.ADMINS)
    def post_badly(book: ledger.Book, account_id: ledger.AccountId) -> ledger.AccountPublic:
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
        assert [answer.status_code for answer in answers] == [200, 503, 200, 200]
        assert refusal(answers[1]) == (503, "database_unavailable")
        # The error of the database was not stored as an answer: the key is still good.
        faults.clear()
        assert [answer.json()["balance"] for answer in bank.together(bad, good)] == [4, 5]


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


def test_ids_rise_even_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []
    for now in (10**15, 10**15, 10**15 + 1, 5, 10**15 + 10**6):
        monkeypatch.setattr(ledger, "utc_now", lambda now=now: now)
        book = ledger.Book(None)  # type: ignore[arg-type]
        book.follow([{"id": ids[-1], "ts": 10**15}] if ids else [])
        ids += [book.new_id(), book.new_id()]
        assert book.now == max(now, 10**15)
    assert ids == sorted(set(ids))
    parsed = [uuid.UUID(one) for one in ids]
    assert {(one.version, one.variant) for one in parsed} == {(7, uuid.RFC_4122)}
    assert int(ids[0].replace("-", "")[:12], 16) == 10**12


def test_nobody_can_guess_an_id(bank: "BankInside") -> None:
    bank.given(alice=100, bob=0).transfer("alice", "bob", 1)
    ids = [one for (one,) in bank.rows("SELECT id FROM event UNION SELECT id FROM entry")]
    assert len({one[20:] for one in ids}) == len(ids) == 8


def test_200_parallel_deposits_of_1_leave_200(servers: "Bank") -> None:
    servers.given(ada=0)
    answers = at_once([lambda: servers.deposit("ada", 1)] * 200)
    assert Counter(answer.status_code for answer in answers) == {200: 200}
    assert servers.balances()["ada"] == 200


def test_40_parallel_withdrawals_of_10_from_50_succeed_5_times(servers: "Bank") -> None:
    servers.given(bea=50)
    answers = at_once([lambda: servers.withdraw("bea", 10)] * 40)
    assert Counter(answer.status_code for answer in answers) == {200: 5, 409: 35}
    assert servers.balances()["bea"] == 0


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


def test_a_ring_of_transfers_keeps_its_total_at_every_moment(servers: "Bank") -> None:
    names = [f"ring {number}" for number in range(8)]
    servers.given(dict.fromkeys(names, 100))
    totals, lowest = [], []

    def look() -> None:
        balances = servers.balances()
        totals.append(sum(balances[name] for name in names))
        lowest.append(min(balances[name] for name in names))

    def go_round(number: int) -> None:
        for step in range(number, number + 10):
            source, dest = names[step % 8], names[(step + 1) % 8]
            answer = servers.transfer(source, dest, random.randint(1, 60))
            assert answer.status_code in (200, 409)

    with meanwhile(look, look):
        at_once([partial(go_round, number) for number in range(32)])
    look()
    assert len(totals) > 1
    assert set(totals) == {800}
    assert min(lowest) >= 0


def test_an_answer_goes_out_only_after_the_commit(servers: "Bank") -> None:
    servers.given(dora=0)

    def deposit_and_look() -> None:
        key = new_key()
        assert servers.deposit("dora", 1, key=key).status_code == 200
        stored = servers.rows(f"SELECT status FROM idempotency_key WHERE id LIKE '%|{key}'")
        assert stored == [(200,)]

    at_once([deposit_and_look] * 20)


def test_nothing_is_lost_and_nothing_happens_twice_however_often_it_dies(database: str) -> None:
    people = {f"person {number}": 1_000 for number in range(6)}
    moves: dict[Move, dict[str, int] | None] = {}
    with serving(database) as server:
        ids = server.bank.given(people).ids
    for death in range(CYCLES + 1):
        with serving(database) as server:
            server.bank.ids = ids
            # First of all, what was in doubt when the last process died is asked once more.
            for move in [move for move, changes in moves.items() if changes is None]:
                moves[move] = made(server.bank, move)
            model = Counter(people)
            for changes in moves.values():
                model.update(changes)
            assert server.bank.balances() == model
            if death < CYCLES:
                load_until_killed(server, partial(move_at_random, server.bank, moves), 200)
    assert ledger.main(["check", "--database-url", database]) == 0


class Move(NamedTuple):
    """A transfer, under a key."""

    source: str
    dest: str
    amount: int
    key: str


def move_at_random(bank: "Bank", moves: dict[Move, dict[str, int] | None]) -> None:
    """Transfer something, and note how it changed balances; None as long as nobody knows."""
    source, dest = random.sample(sorted(bank.ids), 2)
    move = Move(source, dest, random.randint(1, 400), new_key())
    moves[move] = None
    moves[move] = made(bank, move)


def made(bank: "Bank", move: Move) -> dict[str, int]:
    """Ask for a transfer, and return how it changed balances."""
    answer = bank.transfer(move.source, move.dest, move.amount, key=move.key)
    is_done = answer.status_code == 200
    return {move.source: -move.amount, move.dest: move.amount} if is_done else {}


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


# ===== Part two: storage


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


@pytest.mark.parametrize("host", ["p@ss@127.0.0.1/x", "p/w@127.0.0.1/x"])
def test_a_password_that_is_not_escaped_is_not_printed(host: str) -> None:
    with pytest.raises(ledger.StartupError) as refused:
        ledger.database_at(f"postgresql://user:{host}")
    assert "127.0.0.1" not in str(refused.value)
    assert "must be" in str(refused.value)


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
    file, log = tmp_path / "ledger.db", tmp_path / "ledger.db-wal"
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    assert "has no tables, but is not empty" in refused_start(f"sqlite:///{file}")
    for rest in (b"", None):
        file.unlink() if rest is None else file.write_bytes(rest)
        log.write_bytes(b"what was committed last")
        assert "is there without its ledger" in refused_start(f"sqlite:///{file}")
        assert log.read_bytes() == b"what was committed last"


def test_a_start_that_dies_leaves_no_half_of_a_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = f"sqlite:///{tmp_path}/ledger.db"
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "create_triggers", die)
        with pytest.raises(RuntimeError):
            ledger.create_app(ledger.Settings(database))
    assert file_of(database).stat().st_size == 0
    with opened(database) as bank:
        assert bank.wrong() == []


def die(_: Any) -> None:
    """End a start in its middle."""
    raise RuntimeError


@on_sqlite
@pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
def test_a_ledger_is_readable_by_its_owner_alone(bank: "BankInside", tmp_path: Path) -> None:
    copy = tmp_path / "copy.db"
    assert ledger.main(["backup", str(copy), "--database-url", bank.database]) == 0
    other = f"sqlite:///{tmp_path}/other.db"
    assert ledger.main(["copy", "--from", bank.database, "--to", other]) == 0
    files = [copy, file_of(other), *file_of(bank.database).parent.glob("ledger.db*")]
    assert len(files) == 5
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
    with closing(app.ledger.database):
        assert not app.callers.open_mode


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


@on_postgresql
def test_a_write_is_synced_to_disk_whatever_the_servers_default_is(database: str) -> None:
    asynchronous = with_parameters(database, options="-c synchronous_commit=off")
    with opened(asynchronous) as bank, bank.ledger.database.write() as connection:
        [row] = connection.rows("SELECT current_setting('synchronous_commit') AS it")
        assert row["it"] == "on"


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
def test_a_full_disk_refuses_and_loses_nothing(bank: "BankInside") -> None:
    bank.given(alice=100)
    with bank.ledger.database.write() as writer:
        [pages] = writer.driver.execute("PRAGMA page_count").fetchone()
        writer.driver.execute(f"PRAGMA max_page_count = {pages}")
    answers = [bank.deposit("alice", 1, key=f"k{n}") for n in range(60)]
    assert refusal(answers[-1]) == (507, "storage_full")
    writer.driver.execute("PRAGMA max_page_count = 1000000")
    for number, answer in enumerate(answers):
        again = bank.deposit("alice", 1, key=f"k{number}")
        assert again.status_code == 200
        assert answer.status_code == 507 or again.content == answer.content
    assert bank.balances() == {"alice": 160}


def test_serving_resumes_by_itself_when_the_database_is_back() -> None:
    with own_postgresql() as (url, control), serving(url) as server:
        bank = server.bank.given(alice=100)
        control("stop")
        for answer in (bank.deposit("alice", 1, key="k"), bank.get("/accounts")):
            assert refusal(answer) == (503, "database_unavailable")
            assert answer.headers["Retry-After"] == "1"
        assert refusal(bank.get("/health")) == (503, "database_unavailable")
        control("start")
        wait_until(lambda: bank.get("/health").status_code == 200)
        assert bank.deposit("alice", 1, key="k").json()["balance"] == 101


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot stop a process")
def test_a_database_that_hangs_does_not_keep_the_server_from_ending() -> None:
    with own_postgresql() as (url, _), serving(url) as server:
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
                server.process.join(12)
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
        with opened(several) as bank:
            bank.given(alice=5)
            # The primary becomes a standby: what is connected can only read, and nobody else can
            # connect to write.
            admin.execute(f"ALTER DATABASE {name} {read_only}")
            for begin in (bank.ledger.database.read, bank.ledger.database.write):
                with begin() as connection:
                    connection.execute(read_only)
            assert refusal(bank.get("/health"))[0] == 503
            for _ in range(2):
                assert refusal(bank.deposit("alice", 1, key="k"))[0] == 503
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
    [("UPDATE schema_version SET version = 99", "99"), ("DELETE FROM schema_version", "(none)")],
)
def test_an_unknown_schema_version_is_refused(bank: "Bank", statement: str, version: str) -> None:
    bank.tamper_freely(statement)
    assert refused_start(bank.database) == f"schema version {version} is not 1, the known one"


def test_servers_may_make_one_new_ledger_at_one_moment(new_database: "NewDatabase") -> None:
    with new_database(blank=True) as database:
        for app in at_once([partial(ledger.create_app, ledger.Settings(database))] * 4):
            app.ledger.database.close()
        with opened(database) as bank:
            accounts = bank.rows("SELECT COUNT(*) FROM account WHERE kind = 'SYSTEM'")
            assert accounts == [(len(ledger.SYSTEM_ACCOUNTS),)]
            assert bank.wrong() == []


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
        (
            "INSERT INTO account VALUES ('x', NULL, '', 'USD', 'ACTIVE', 5, 0, 'CUSTOMER', 0)",
            "opens empty",
        ),
        ("UPDATE scheduled_cashback SET amount = 99", "for ever"),
        ("UPDATE scheduled_cashback SET due_at = 0, status = 'CREDITED'", "for ever"),
        ("DELETE FROM scheduled_cashback", "for ever"),
    ],
)
def test_the_database_itself_refuses(bank: "Bank", statement: str, message: str) -> None:
    bank.given(alice=100).pay("alice", 50)
    for name in ("old", "new"):
        new_api_key(bank.database, name, "admin")
    key_command(bank.database, "revoke", "old")
    with pytest.raises(REFUSED, match=f"(?i){message}"):
        bank.tamper(statement)
    assert bank.wrong() == []


def test_the_database_keeps_closed_accounts_closed(bank: "Bank") -> None:
    bank.given(alice=0).step("alice", "close")
    with pytest.raises(REFUSED, match="never comes back"):
        bank.tamper("UPDATE account SET status = 'ACTIVE' WHERE kind = 'CUSTOMER'")


def test_the_database_keeps_frozen_accounts_still(bank: "Bank") -> None:
    bank.given(alice=100).step("alice", "freeze")
    another = entries_like(seq="2", amount="1", balance="101")
    with pytest.raises(REFUSED, match="only an active account moves money"):
        bank.tamper(f"{another} WHERE account_id = '{bank.ids['alice']}'")


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


@on_postgresql
@pytest.mark.parametrize("table", ["entry", "event", "account", "api_key"])
def test_postgresql_refuses_to_empty_a_table(bank: "Bank", table: str) -> None:
    with pytest.raises(psycopg.IntegrityError, match=r"(?i)for ever"):
        bank.tamper(f"TRUNCATE {table} CASCADE")


ALICES = "(SELECT id FROM account WHERE owner_name = 'alice')"


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("UPDATE entry SET amount = 99 WHERE type = 'CREDIT'", "sums to"),
        ("UPDATE entry SET amount = amount + 1", "entry 1 with balance"),
        (f"UPDATE entry SET balance = 5 WHERE account_id = {ALICES}", "balance 5 stands where"),
        (f"UPDATE entry SET seq = 7 WHERE account_id = {ALICES}", "entry 7 with balance"),
        ("DELETE FROM entry", "its row says 1 entries"),
        ("DELETE FROM entry WHERE type = 'DEBIT'", "sums to"),
        ("DELETE FROM event", "missing row of event"),
        ("UPDATE account SET balance = 5 WHERE owner_name = 'alice'", "its row says 1 entries and"),
        ("UPDATE account SET last_seq = 2 WHERE owner_name = 'alice'", "its row says 2 entries"),
        ("UPDATE account SET status = 'CLOSED' WHERE owner_name = 'alice'", "CHECK"),
        ("UPDATE account SET kind = 'CUSTOMER'", "CHECK"),
        ("UPDATE account SET balance = -1", "CHECK"),
        ("DROP TRIGGER entry_kept ON entry", "entry_kept is not as it was made"),
        (
            "INSERT INTO event VALUES ('t', 'TRANSFER', NULL, 0, NULL, 'x', NULL, '{}')",
            "transaction t has no entries",
        ),
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
    if (engine, finding) == ("postgresql", "CHECK"):
        # PostgreSQL keeps these rules whoever asks.
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
        ("INSERT INTO schema_version SELECT 2, description FROM schema_version", "a second row"),
        ("UPDATE event SET kind = 'GIFT' WHERE kind = 'DEPOSIT'", "is a GIFT"),
        ("UPDATE event SET id = 'ZZ' WHERE kind = 'open_account'", "event ZZ has no UUID"),
        ("UPDATE event SET arguments = '{' WHERE kind = 'DEPOSIT'", "arguments are no JSON"),
        (f"UPDATE account SET status = 'FROZEN' WHERE id = {ALICES}", "FROZEN, but became ACTIVE"),
    ],
)
def test_the_check_finds_what_no_constraint_can(bank: "Bank", statement: str, finding: str) -> None:
    bank.given(alice=100).pay("alice", 50)
    new_api_key(bank.database, "till", "admin")
    bank.tamper_freely(statement)
    assert any(finding in found for found in bank.wrong())


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
            f"INSERT INTO event VALUES ('{owner}', 'TEST', NULL, 0, NULL, 'x', NULL, '')",
            "INSERT INTO entry (account_id, seq, id, transaction_id, type, amount, balance) "
            f"SELECT id, 1, 'x', owner_name, 'CREDIT', balance, balance {account}",
        )
    assert any(f"sums to {2**63 - 1} USD" in found for found in bank.wrong())


# ===== Part three: HTTP


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
        get = partial(client.send, "GET", "/accounts")
        assert get(headers={"Host": "testserver"}).status_code == 200
        assert refusal(get(headers={"Host": "localhost"})) == (403, "forbidden")


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
        token()[:-1],
        token() + ".x",
        "." * 60_000,
    ],
    ids=short,
)
def test_a_hostile_token_is_refused(secured: "Bank", hostile: str) -> None:
    refused = secured.by(f"Bearer {hostile}", "Authorization").get("/accounts")
    assert refusal(refused) == (401, "unauthorized")


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


def test_an_unknown_key_is_looked_for_once_a_second(
    secured: "BankInside", monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    load = secured.app.callers._load
    monkeypatch.setattr(secured.app.callers, "_load", lambda found: looks.append(load(found)))
    monkeypatch.setattr(ledger, "KEYS_AGE_SECONDS_MAX", 60)
    for _ in range(20):
        assert secured.by("lk_12345678_x").get("/accounts").status_code == 401
    assert len(looks) <= 2
    # Of some that are made up, as of one.
    for number in range(2 * ledger.LOOKS_MAX):
        assert secured.by(f"lk_{number:08}_x").get("/accounts").status_code == 401
    assert len(looks) <= 2 * (ledger.LOOKS_MAX + 1)


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


# Which roles may call each route. What stands in neither table fails the suite.
READ, WORK, RULE, AUDIT = "auditor service admin", "service admin", "admin", "auditor admin"
OPEN = {("GET", "/health"), ("GET", "/bank/health"), ("GET", "/docs"), ("GET", "/openapi.json")}
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


def test_every_route_is_for_its_roles_and_for_nobody_else(secured: "BankInside") -> None:
    routes: Any = secured.app.routes
    assert {(route.method, route.path_format) for route in routes} == set(MATRIX) | OPEN
    for (method, template), allowed in MATRIX.items():
        path = re.sub("{[a-z_]+}", NOBODY, template)
        # Nothing else about these requests is right, and a caller without the right never hears.
        nonsense = {"content": b"{}", "headers": {"Content-Type": "text/plain"}}
        assert refusal(secured.send(method, path, **nonsense)) == (401, "unauthorized")
        for role in ledger.ROLES:
            answer = secured.by(token(role=role)).send(method, path, **nonsense)
            is_allowed = role in allowed.split()
            assert (answer.status_code not in (401, 403)) == is_allowed, (role, method, template)
    for method, path in OPEN:
        assert secured.send(method, path).status_code == 200


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


def forged(place: str, *scope: str) -> str:
    """Return a cursor as somebody can make it who has read the source."""
    return ledger.make_cursor(place, scope)


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
    alice = untouched.ids["alice"]
    good = forged("1", "statement", alice)
    strange = ["", "x", good + "0", "9" + good, good.upper() + "=", "\u0661" + good]
    strange += [forged(place, "statement", alice) for place in ("-1", "9" * 400, "x", "1.5")]
    for cursor in strange:
        refused = untouched.get(f"/accounts/{alice}/statement", cursor=cursor)
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
@pytest.mark.parametrize("limit", ["0", "-1", "201", "1" + "0" * 30, "x", "", "1.5", "true"])
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
        (b"GET /accounts/\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
        (b"GET /accounts HTTP/1.1\r\n\r\n", b"403"),
        (b"GET /accounts?owner_name=%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"422"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 60_000 + b"\r\n\r\n", b"200"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 66_000 + b"\r\n\r\n", b"431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 500_000, b"431"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 50_000, b"431"),
        (b"GET /health?" + b"x" * 66_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"414"),
        (b"GET /" + b"x" * 500_000, b"414"),
        (b"BREW /accounts HTTP/1.1\r\nHost: localhost\r\n\r\n", b"4"),
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
    for request in (read, write):
        with socket.create_connection(server.bank.address(), timeout=30) as wire:
            wire.sendall(request)
            wire.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(partial(wire.recv, 65_536), b""))
        assert answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 422"))
        assert answer.endswith(b"}")


def run_impatient(*given: Any) -> None:
    """Serve callers who have a second for a request."""
    ledger.REQUEST_SECONDS_MAX = 1
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
            wire.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 1_000)
            time.sleep(3)
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


# ----- The API
# What the canonical routes show, list and describe.


def test_the_shapes_are_those_of_the_contract(bank: "Bank") -> None:
    sent = bank.given(alice=100, bob=0).transfer("alice", "bob", 1).json()
    account = {"id", "name", "owner_name", "asset", "status", "balance", "created_at"}
    entry = {"id", "ts", "account_id", "transaction_id", "amount", "type", "balance", "ref", "kind"}
    shown = bank.get(f"/transactions/{sent['transfer_id']}").json()
    assert set(sent) == {"transfer_id", "amount", "asset", "memo", "ts", "source", "dest"}
    assert set(sent["source"]) == set(bank.deposit("bob", 1).json()) == account
    assert set(shown) == {"id", "kind", "memo", "ts", "entries"}
    assert set(shown["entries"][0]) == set(bank.statement("bob")[0]) == entry
    assert shown["ts"] == sent["ts"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", sent["ts"])


@at_the_edge
def test_what_does_not_exist_is_not_found(untouched: "Bank") -> None:
    for path, code in (
        (f"/accounts/{NOBODY}", "account_not_found"),
        (f"/accounts/{NOBODY}/statement", "account_not_found"),
        (f"/transactions/{NOBODY}", "transaction_not_found"),
        (f"/payments/{NOBODY}", "payment_not_found"),
    ):
        assert refusal(untouched.get(path)) == (404, code)


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
        "details": {"account_id": bank.ids["alice"], "body": {"amount": 5, "memo": "wages"}},
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


def test_the_audit_log_is_stable_while_events_arrive(bank: "Bank") -> None:
    bank.given(alice=100, bob=0)
    listed: list[str] = []
    for page in bank.pages("/audit", limit=1, account_id=bank.ids["alice"]):
        listed += [event["id"] for event in page]
        bank.deposit("alice", 1)
        bank.step("alice", "freeze")
        bank.step("alice", "unfreeze")
    assert len(listed) == len(set(listed)) == 2


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


def test_the_kata_shows_a_cashback_of_nothing_as_received_once_it_is_due(demo: "Bank") -> None:
    kata_accounts(demo, "alice", balance=1_000)
    kata(demo, 20, "/payments", account_id="alice", amount=100)
    kata(demo, 50, "/payments", account_id="alice", amount=10)

    def deposited(timestamp: int) -> list[bool]:
        return [line["deposited"] for line in kata_history(demo, "alice", timestamp)[-2:]]

    assert deposited(0) == [False, False]
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
    short, lanes = show(), []
    run_read = demo.ledger.database.run_read

    def watched(*given: Any, long: bool = False) -> Any:
        lanes.append(long)
        return run_read(*given, long=long)

    monkeypatch.setattr(demo.ledger.database, "run_read", watched)
    monkeypatch.setattr(ledger, "SHORT_ROWS_MAX", 0)
    monkeypatch.setattr(ledger, "PART_BYTES", 100)
    monkeypatch.setattr(ledger, "REQUEST_SECONDS_MAX", 1)
    # More often than there are turns: each is given back.
    assert {show().content for _ in range(3 * ledger.LONG_READERS_MAX)} == {short.content}
    assert lanes.count(True) == 3 * ledger.LONG_READERS_MAX


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
            assert sorted(answer.status_code for answer in at_once([opening] * 2)) == [201, 409]


def test_cashbacks_come_once_however_often_the_server_dies(database: str) -> None:
    payments, due = 120, MS_PER_DAY
    with serving(database) as server:
        kata_accounts(server.bank, "payer", balance=10**9)
        for timestamp in range(payments):
            amount = 100 + timestamp
            kata(server.bank, timestamp, "/payments", account_id="payer", amount=amount)
        unpaid = kata_balance(server.bank, "payer")
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
    ["", "x", "[]", "null", '{"1": 5}', '{"1": "-5"}', '{"1": "NaN"}', '{"1": "1e3"}', '{"": "1"}',
     '{"1": "1", "1": "2"}', '{"1": " 5"}', '{"1": ""}', '{"1": "' + "9" * 30 + '"}'],
)  # fmt: skip
def test_a_wrong_preload_stops_the_start(database: str, preload: str) -> None:
    with pytest.raises(ledger.StartupError, match="PRELOAD_ACCOUNTS must be JSON"):
        ledger.create_app(ledger.Settings(database, preload))


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
    assert Counter(answer.status_code for answer in answers) == {200: 8, 402: 52}
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
    untouched: "Bank", method: str, path: str, status: int
) -> None:
    body = {"json": {"amount": "1"}} if method == "POST" else {}
    assert refusal(untouched.send(method, path, **body))[0] == status


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


@pytest.mark.parametrize("missing", [dialect.name for dialect in ledger.DIALECTS])
def test_any_dialect_can_be_left_out(database: str, missing: str) -> None:
    dialects = [dialect for dialect in ledger.DIALECTS if dialect.name != missing]
    paths = {"ledger": "/accounts", "bank": "/bank/accounts", "atm": "/atm/"}
    paths["wallets"] = f"{USERS}/user_bob/balance?asset_type_id=1"
    with opened(database, dialects) as bank:
        statuses = {name: bank.send("GET", path).status_code for name, path in paths.items()}
    assert statuses == dict.fromkeys(paths, 200) | {missing: 404}


# ===== Part four: running


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


def test_importing_the_module_has_no_effect() -> None:
    script = "import ledger, os, threading; print(os.listdir(), threading.active_count())"
    ran = run_python("-c", script, PYTHONPATH=str(PROGRAM.parent), PORT="bad")
    assert (ran.stdout, ran.stderr) == ("[] 1\n", "")


def test_uvicorn_finds_the_application_and_a_bad_setting_ends_it_in_one_line() -> None:
    uvicorn = ("-m", "uvicorn", "--app-dir", str(PROGRAM.parent), "ledger:app")
    ran = run_python(*uvicorn, LEDGER_DATABASE_URL="mysql://x")
    assert ran.returncode != 0
    assert ran.stderr == "ledger: the database must be a plain file, such as sqlite:///ledger.db\n"


def test_a_refused_opening_leaves_nothing(bank: "BankInside") -> None:
    bank.given(rich=0).execute(ledger.deposit, bank.ids["rich"], amount=ledger.BALANCE_MAX)
    before = bank.contents()
    with pytest.raises(ledger.StartupError, match="balance_limit"):
        ledger.create_app(ledger.Settings(bank.database, '{"555": "1.00"}'))
    assert bank.contents() == before


@at_the_edge
@pytest.mark.parametrize(
    "path",
    ["/", "/account", "/accounts/", "//accounts", "/transfers/x", "/x%2f", "/accounts%0A",
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
    described = {(method.upper(), path) for path, item in paths.items() for method in item}
    assert described == set(MATRIX) | {("GET", "/health"), ("GET", "/bank/health")}
    transfer = paths["/transfers"]["post"]
    assert transfer["parameters"][0]["name"] == "Idempotency-Key"
    assert transfer["parameters"][0]["required"] is True
    assert "422" not in transfer["responses"]
    assert "application/problem+json" in transfer["responses"]["4XX"]["content"]
    assert transfer["security"] == [{"X-API-Key": []}, {"Bearer": []}]
    assert "Roles: service, admin." in transfer["description"]
    assert "security" not in paths["/health"]["get"]
    assert "text/html" in demo.get("/docs").headers["Content-Type"]


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
    assert untouched.app.log.lines[-1]["request_id"] == answer.headers["X-Request-ID"]


def test_a_mistake_of_the_server_is_logged_and_answered_in_one_line(
    bank: "BankInside", monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ledger, "find_account", lambda *arguments: 1 / 0)
    refused = bank.get(f"/accounts/{NOBODY}")
    assert refusal(refused) == (500, "internal_error")
    assert refused.headers["X-Content-Type-Options"] == "nosniff"
    assert f"the server made a mistake in request {refused.headers['X-Request-ID']}" in caplog.text
    assert "ZeroDivisionError" in caplog.text
    assert bank.app.log.lines[-1]["status"] == 500


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


# ----- Log
# One line of JSON for each request, and nothing in it that is anybody's secret.


def test_each_request_has_one_line_in_the_log(secured: "BankInside") -> None:
    key = new_api_key(secured.database, "till", "service")
    secured.by(key).given(alice=5)
    secured.get("/accounts/alice")
    key_command(secured.database, "revoke", "till")
    wait_until(lambda: secured.by(key).get("/audit").status_code == 401)
    secured.get("/nowhere")
    lines = [dict(line) for line in secured.app.log.lines if line["status"] != 403]
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
    for number in range(25):
        log.take({"ts": 0.0, "number": number})
    with log.written_to(written):
        pass
    lines = [json.loads(line) for line in written.getvalue().splitlines()]
    assert [line.get("number") for line in lines] == [*range(15, 25), None]
    assert lines[-1]["message"] == "15 lines were lost, because nobody read them"


PRIVATE_NAME, PRIVATE_AMOUNT = "Alice-the-marked-name", 91827364550


def test_no_secret_is_ever_told(database: str) -> None:
    secrets = {"LEDGER_ADMIN_KEY": ADMIN_KEY, "LEDGER_JWT_SECRET": SECRET}
    with serving(database, **secrets) as server:
        key, app = new_api_key(database, "marked", "admin"), token(sub="app")
        told = ""
        for credential in (key, ADMIN_KEY, SECRET, key + "x", ADMIN_KEY[:-1], app[:-1]):
            told += every_request(server.bank.by(credential))
        told += every_request(server.bank.by(f"Bearer {app}", "Authorization"))
        told += f"{server.bank.rows('SELECT * FROM event')}{server.said}"
        told += key_command(database, "list") + str(ledger.Settings.read(secrets))
        last = server.bank.get("/health").headers["X-Request-ID"]
        wait_until(lambda: last in server.log.read_text())
        log = server.log.read_text()
    assert log.count("\n") > 400
    for secret in (key[12:], ADMIN_KEY, SECRET, app.split(".")[2], ledger.key_hash(key.encode())):
        assert secret not in told + log
    for private in (PRIVATE_NAME, str(PRIVATE_AMOUNT)):
        assert private in told
        assert private not in log


def every_request(bank: "Bank") -> str:
    """Send something to each route, good and bad, and return all that is answered."""
    opened = bank.post("/accounts", owner_name=PRIVATE_NAME)
    bank.ids[PRIVATE_NAME] = opened.json().get("id", NOBODY)
    answers = [opened, bank.deposit(PRIVATE_NAME, PRIVATE_AMOUNT)]
    names = ("owner_name", "account_id", "external_user_id")
    body = dict.fromkeys(names, PRIVATE_NAME) | {"amount": PRIVATE_AMOUNT, "timestamp": 1}
    headers = {"X-Request-ID": "x y"}
    for method, template in MATRIX:
        path = re.sub("{[a-z_]+}", bank.ids[PRIVATE_NAME], template)
        for content in (body, {"amount": PRIVATE_AMOUNT}, [PRIVATE_NAME]):
            sent: Any = {} if method == "GET" else {"json": content}
            headers["Idempotency-Key"] = new_key()
            sent |= {"headers": headers, "params": {"cursor": PRIVATE_NAME}}
            answers.append(bank.send(method, path, **sent))
    return "".join(f"{answer.headers}{answer.text}" for answer in answers)


# ----- Command line
# What the operator types, and what it says; some of it is run as it is typed.


def test_the_server_says_where_it_is(server: "Server") -> None:
    address = "http://{}:{}".format(*server.bank.address())
    assert server.said == [
        f"ledger.py serves on {address}",
        f"  docs      {address}/docs",
        f"  database  {ledger.database_at(server.bank.database).name}",
        "  mode      open: every caller on this machine may do everything",
    ]


def test_sigterm_finishes_what_was_accepted(database: str) -> None:
    answers: list[int] = []
    with serving(database, start=as_command) as server:
        server.bank.given(alice=0)

        def deposit() -> None:
            with suppress(httpx.TransportError):
                answers.append(server.bank.deposit("alice", 1).status_code)

        with meanwhile(*[deposit] * 8):
            wait_until(lambda: len(answers) > 40)
            server.process.terminate()
            server.process.wait(60)
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
        ledger.port_number(port)


@pytest.mark.parametrize(
    ("arguments", "environment", "why"),
    [
        (["--host", "0.0.0.0", "--port", "0"], {}, "serves this machine alone"),  # noqa: S104
        ([], {"PORT": "x"}, "the port must be a number from 0 to 65535, not 'x'"),
        (["--port", "x"], {}, "the port must be a number from 0 to 65535, not 'x'"),
        (["--port", "0"], {"LEDGER_DATABASE_URL": "x://"}, "the database must be a plain file"),
        (["check", "--database-url", "sqlite:////nowhere/x.db"], {}, "there is no ledger at"),
    ],
)
def test_a_refused_start_says_why_in_one_line(
    arguments: list[str], environment: dict[str, str], why: str, tmp_path: Path
) -> None:
    ran = run_program(*arguments, folder=tmp_path, **environment)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert re.fullmatch(f"ledger: .*{why}.*\n", ran.stderr)


@on_sqlite
def test_other_machines_are_served_with_keys_alone(database: str) -> None:
    def serve_others(**settings: Any) -> None:
        app = ledger.create_app(ledger.Settings(database, **settings), for_others=True)
        app.ledger.database.close()

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


def test_a_key_can_be_made_before_the_first_start(database: str) -> None:
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
    assert counts[:-1] == [len(ledger.TABLES), 2, 4, 18, 0, 4, 4, 7 + 16]
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
    bank: "Bank", target: str, request: pytest.FixtureRequest
) -> None:
    bank.given(alice=500, bob=50, carol=0).transfer("alice", "bob", 100, key="rent")
    bank.pay("alice", 100)
    bank.step("bob", "freeze")
    bank.step("carol", "close")
    new_api_key(bank.database, "till", "admin")
    with databases_of(target, request)(blank=True) as url:
        assert ledger.main(["copy", "--from", bank.database, "--to", url]) == 0
        assert ledger.main(["check", "--database-url", url]) == 0
        with opened(url) as copied:
            assert copied.contents() == bank.contents()
            copied.ids = bank.ids
            admin = copied.by(new_api_key(url, "next", "admin"))
            assert admin.withdraw("alice", 1).json()["balance"] == 299
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
        assert "is not empty" in capsys.readouterr().err
    assert bank.balances() == {"alice": 5}


def test_a_copy_of_a_broken_ledger_is_refused_as_a_whole(
    bank: "Bank", tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank.given(alice=5)
    bank.tamper_freely("UPDATE account SET balance = 6 WHERE owner_name = 'alice'")
    url = f"sqlite:///{tmp_path}/copy.db"
    assert ledger.main(["copy", "--from", bank.database, "--to", url]) == 1
    assert "nothing was copied: account" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ----- The README
# Its walk runs as it stands, and what it names is here.

PROGRAM = Path(ledger.__file__)
README = PROGRAM.with_name("README.md").read_text(encoding="utf-8")
BASH = shutil.which("bash") or ""


@pytest.mark.skipif(not BASH, reason="the walk is for a shell with curl")
def test_the_walk_in_the_readme_runs_as_it_stands() -> None:
    walk = "\n".join(re.findall(r"```bash\n# walk\n(.*?)```", README, re.DOTALL))
    # An empty folder is all that the server needs.
    with serving("", start=as_command) as server:
        address = server.said[0].split()[-1]
        ran = subprocess.run(
            [BASH, "-euo", "pipefail", "-c", walk.replace("http://127.0.0.1:8000", address)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert (ran.returncode, ran.stderr) == (0, "")
        assert server.bank.balances() == {"Alice": 750, "Bob": 300}
        checked = run_program("check", folder=server.log.parent)
        assert (checked.returncode, checked.stdout.count("ok")) == (0, 9)
    for shown in ("Idempotent-Replayed: true", "insufficient_funds", '"ref":"rent"'):
        assert shown.lower() in ran.stdout.lower()


def test_every_test_that_the_readme_names_is_here() -> None:
    named = set(re.findall(r"`(test_\w+|Test\w+)`", README)) - {"test_ledger"}
    assert len(named) > 10
    assert named <= set(globals())


# ===== What the tests are made of


# ----- The words
# In them a test speaks to a ledger, of this process or of another, over HTTP.


class Bank:
    """A ledger, in which people are known by their names."""

    def __init__(self, send: Callable[..., httpx.Response], database: str) -> None:
        self.send = send
        self.database = database
        self.ids: dict[str, str] = {}

    def given(
        self, others: Mapping[str, int] | None = None, /, *, asset: str = "USD", **balances: int
    ) -> Self:
        """Open an account for each name, with a balance."""
        for name, balance in {**(others or {}), **balances}.items():
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
            ALTERED.add(self.database)
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

    def __init__(self, app: ledger.App, runner: asyncio.Runner, database: str, peer: str) -> None:
        self.app = app
        self.ledger = app.ledger
        self.runner = runner
        wire = httpx.ASGITransport(app, client=(peer, 1))
        self.client = httpx.AsyncClient(transport=wire, base_url="http://localhost")
        super().__init__(lambda *a, **o: runner.run(self.client.request(*a, **o)), database)

    def wrong(self, *, rows_only: bool = False) -> list[str]:
        """Return what the integrity check finds."""
        return findings(self.ledger.database, rows_only=rows_only)

    def together(self, *requests: Any) -> list[httpx.Response]:
        """Send (path, body) or (path, body, key) at one moment, so that they share a batch."""

        async def gather() -> list[httpx.Response]:
            sent = []
            for path, body, *given in requests:
                [key] = given or [new_key()]
                headers = {} if key is None else {"Idempotency-Key": key}
                sent.append(self.client.post(path, json=body, headers=headers))
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
REFUSED = (sqlite3.IntegrityError, psycopg.IntegrityError)


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


def command_of(operation: Callable[..., Any], *arguments: Any, **options: Any) -> ledger.Command:
    """Return the command that calls an operation."""

    def run(book: ledger.Book) -> None:
        operation(book, *arguments, **options)

    return ledger.Command("test", "{}", run)


def findings(database: ledger.Database, *, rows_only: bool = False) -> list[str]:
    """Return what the integrity check finds, in the schema too unless it is told not to."""
    with database.read() as connection:
        # The check of the schema takes longest, and comes last.
        results = itertools.islice(ledger.check(connection), 5 if rows_only else None)
        return [found for _, _, wrong in results for found in wrong]


def key_command(database: str, *arguments: str) -> str:
    """Run `python ledger.py key ...` in this process, and return what it prints."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", printed)
        assert ledger.main(["key", *arguments, "--database-url", database]) == 0
    return printed.getvalue().strip()


def new_api_key(database: str, name: str, role: str) -> str:
    """Make an API key, as the operator does."""
    return key_command(database, "add", "--name", name, "--role", role)


def wait_until(is_true: Callable[[], bool]) -> None:
    """Look again and again until something is true; fail only if it never comes to be."""
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ----- Many at once
# Threads, each with HTTP clients of its own: one that many threads share has failed under load.

T = TypeVar("T")
THREAD = threading.local()
tls = cache(httpx.create_ssl_context)


def own_client(address: str) -> httpx.Client:
    """Return this thread's client of a server."""
    clients: dict[str, httpx.Client] = vars(THREAD)
    if address not in clients:
        clients[address] = httpx.Client(base_url=address, timeout=60, verify=tls(), trust_env=False)
    return clients[address]


def hang_up() -> None:
    """Close this thread's clients."""
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
def inside(app: ledger.App, database: str, peer: str = "127.0.0.1") -> Iterator[BankInside]:
    """Speak to an application in this process, from some address."""
    with asyncio.Runner() as runner:
        bank = BankInside(app, runner, database, peer)
        yield bank
        runner.run(bank.client.aclose())


@contextmanager
def opened(
    database: str,
    dialects: Sequence[ledger.Dialect] = (ledger.api,),
    peer: str = "127.0.0.1",
    **settings: Any,
) -> Iterator[BankInside]:
    """Run the application in this process; with no dialect but the first it begins empty."""
    app = ledger.create_app(ledger.Settings(database, **settings), dialects)
    with closing(app.ledger.database), inside(app, database, peer) as bank:
        yield bank


@pytest.fixture(autouse=True)
def own_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the clock that a test moves, and a developer's settings, out of the other tests."""
    monkeypatch.setattr(ledger, "utc_now", ledger.utc_now)
    names = ("LEDGER_DATABASE_URL", "LEDGER_ADMIN_KEY", "LEDGER_JWT_SECRET")
    for name in (*names, "DATABASE_URL", "PRELOAD_ACCOUNTS", "PORT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def bank(database: str) -> Iterator[BankInside]:
    """A new and empty ledger."""
    with opened(database) as bank:
        yield bank


@pytest.fixture
def demo(database: str) -> Iterator[BankInside]:
    """A new ledger with all dialects and their demo accounts."""
    with opened(database, ledger.DIALECTS) as bank:
        yield bank


@pytest.fixture
def secured(database: str) -> Iterator[BankInside]:
    """A new ledger with an admin key and a secret for tokens, called from elsewhere."""
    secrets = {"admin_key": ADMIN_KEY, "jwt_secret": SECRET}
    with opened(database, ledger.DIALECTS, "10.0.0.1", **secrets) as bank:
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
    environment: Mapping[str, str], said: Path, log: Path, target: Any = None
) -> Iterator[Any]:
    """Run the same as a fork."""
    process = forks().Process(target=target or run_main, args=([], environment, said, log))
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
    os.environ.update(environment)
    os.chdir(log.parent)
    for file, descriptor in ((said, 1), (log, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
    sys.exit(ledger.main(arguments))


@contextmanager
def serving(database: str, start: Any = as_fork, **environment: str) -> Iterator[Server]:
    """Serve a database on a free port until the block ends."""
    environment = {"LEDGER_DATABASE_URL": database, "PORT": "0", **environment}
    with tempfile.TemporaryDirectory() as folder:
        said, log = Path(folder, "said"), Path(folder, "log")
        said.touch()
        log.touch()
        with start(environment, said, log) as process:
            wait_until(lambda: said.read_text().count("\n") == 4 or "ledger:" in log.read_text())
            lines = said.read_text().splitlines()
            assert lines, log.read_text()
            address = lines[0].split()[-1]
            try:
                bank = Bank(lambda *a, **o: own_client(address).request(*a, **o), database)
                yield Server(process, bank, lines, log)
            finally:
                hang_up()
        assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="session")
def server(new_database: "NewDatabase") -> Iterator[Server]:
    """One server for all tests that do not end it."""
    with new_database() as database, serving(database) as server:
        yield server


@pytest.fixture(scope="session", params=[1, 2])
def servers(new_database: "NewDatabase", request: pytest.FixtureRequest) -> Iterator[Bank]:
    """One ledger behind one server process, or behind two in turn."""
    with new_database() as database, ExitStack() as stack:
        serve = [stack.enter_context(serving(database)) for _ in range(request.param)]
        in_turn = itertools.cycle([server.bank.send for server in serve])
        yield Bank(lambda *a, **o: next(in_turn)(*a, **o), database)


def run_program(
    *arguments: str, folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `python ledger.py` with arguments in a folder to its end, as a fork."""
    said, log = folder / "said", folder / "log"
    process = forks().Process(target=run_main, args=(arguments, environment, said, log))
    process.start()
    process.join()
    status = process.exitcode
    process.close()
    return subprocess.CompletedProcess(arguments, status, said.read_text(), log.read_text())


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python to the end of what it is given, in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=folder,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=120,
        )


# ----- The two engines
# PostgreSQL is the server that LEDGER_TEST_DATABASE_URL names, or one of this run alone where the
# programs are installed; otherwise its tests are skipped.

NewDatabase = Callable[..., Any]
"""What lends an empty database for a block: `blank` is one without even tables."""
ALTERED: set[str] = set()
"""The databases whose tables a test has changed."""


@pytest.fixture(scope="session", params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    """The engine that a test runs on: first all on the one, then all on the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def new_database(engine: str, request: pytest.FixtureRequest) -> NewDatabase:
    """What lends empty databases of the engine."""
    return databases_of(engine, request)


@pytest.fixture
def database(new_database: NewDatabase) -> Iterator[str]:
    """The URL of an empty database."""
    with new_database() as url:
        yield url


def databases_of(engine: str, request: pytest.FixtureRequest) -> NewDatabase:
    """Return what lends empty databases of an engine."""
    if engine == "sqlite":
        return new_file
    lend: NewDatabase = request.getfixturevalue("lend_postgresql")
    return lend


@contextmanager
def new_file(*, blank: bool = True) -> Iterator[str]:
    """Lend a file that is not there yet, and remove it in the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield f"sqlite:///{folder}/ledger.db"


@pytest.fixture(scope="session")
def lend_postgresql(postgresql: str) -> Iterator[NewDatabase]:
    """What lends databases that were emptied: making one for each test takes too long."""
    idle: list[str] = []
    with ExitStack() as made:

        @contextmanager
        def lend(*, blank: bool = False) -> Iterator[str]:
            url = idle.pop() if idle else made.enter_context(new_postgresql(postgresql))
            empty(url, blank=blank)
            yield url
            idle.append(url)

        yield lend


def empty(database: str, *, blank: bool) -> None:
    """Leave nothing but the tables of a database, or not even them."""
    with closing(psycopg.connect(database, autocommit=True)) as connection:
        if blank or database in ALTERED:
            connection.execute("DROP SCHEMA public CASCADE")
            connection.execute("CREATE SCHEMA public")
            ALTERED.discard(database)
            return
        connection.execute("SET session_replication_role = replica")
        for table in ledger.TABLES.keys() - {"schema_version"}:
            with suppress(psycopg.errors.UndefinedTable):
                connection.execute(f"DELETE FROM {table}")


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
