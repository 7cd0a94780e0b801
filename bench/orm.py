"""Serve the ledger that most people would write: one ORM session and one commit per request."""

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

from ceiling import AccountOut, Amount, TransferIn, TransferOut
from fastapi import Depends, FastAPI, Header, HTTPException
from pydantic import BaseModel, ConfigDict
from sqlalchemy import CheckConstraint, Connection, create_engine, event
from sqlmodel import Field, Relationship, Session, SQLModel, select


def now() -> datetime:
    """Return the current time in UTC."""
    return datetime.now(UTC)


class Account(SQLModel, table=True):
    """Hold one balance, which only a cash account may overdraw."""

    __table_args__ = (CheckConstraint("is_cash OR balance >= 0"),)

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    name: str
    owner_name: str
    asset: str = Field(index=True)
    status: str = "ACTIVE"
    balance: int = 0
    is_cash: bool = False
    created_at: datetime = Field(default_factory=now)


class Transaction(SQLModel, table=True):
    """Group the two entries of one movement of money."""

    id: UUID = Field(default_factory=uuid4, primary_key=True)
    kind: str
    asset: str
    amount: int
    memo: str | None = None
    ts: datetime = Field(default_factory=now)
    entries: list["Entry"] = Relationship(back_populates="transaction")


class Entry(SQLModel, table=True):
    """Record what one transaction did to one account."""

    id: int | None = Field(default=None, primary_key=True)
    account_id: UUID = Field(foreign_key="account.id", index=True)
    transaction_id: UUID = Field(foreign_key="transaction.id", index=True)
    type: str
    amount: int
    balance: int
    transaction: Transaction = Relationship(back_populates="entries")


class Idempotency(SQLModel, table=True):
    """Remember the answer that was given to a key."""

    key: str = Field(primary_key=True)
    request: str
    answer: str


class AccountIn(BaseModel):
    """Describe the body that opens an account."""

    model_config = ConfigDict(extra="forbid")

    owner_name: str
    asset: str


class DepositIn(BaseModel):
    """Describe the body of a deposit."""

    model_config = ConfigDict(extra="forbid")

    amount: Amount


engine = create_engine(os.environ["DATABASE_URL"], connect_args={"timeout": 30})


@event.listens_for(engine, "connect")
def prepare_connection(connection: Any, _record: object) -> None:
    """Make commits durable and leave BEGIN to the event below."""
    connection.isolation_level = None
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA foreign_keys = ON")


@event.listens_for(engine, "begin")
def begin_immediate(connection: Connection) -> None:
    """Take the write lock first, so that no balance is read before it is ours to change."""
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def get_session() -> Iterator[Session]:
    """Yield one session for one request."""
    with Session(engine) as session:
        yield session


SessionDep = Annotated[Session, Depends(get_session)]
KeyHeader = Annotated[str, Header(alias="Idempotency-Key", max_length=255)]

SQLModel.metadata.create_all(engine)
app = FastAPI()


def find_account(session: Session, account_id: UUID) -> Account:
    """Return the account or refuse the request."""
    account = session.get(Account, account_id)
    if account is None:
        raise HTTPException(404, "account not found")
    return account


def find_cash(session: Session, asset: str) -> Account:
    """Return the cash account of the asset, opened when it is first needed."""
    query = select(Account).where(Account.is_cash, Account.asset == asset)
    cash = session.exec(query).first()
    if cash is None:
        cash = Account(name=f"cash {asset}", owner_name="ledger", asset=asset, is_cash=True)
        session.add(cash)
        session.flush()
    return cash


def find_answer(session: Session, key: str, request: str) -> str | None:
    """Return the answer already given to the key, if any."""
    known = session.get(Idempotency, key)
    if known is None:
        return None
    if known.request != request:
        raise HTTPException(422, "key was used for another request")
    return known.answer


def check_movement(source: Account, dest: Account, amount: int) -> None:
    """Refuse a movement that the accounts do not allow."""
    if source.id == dest.id:
        raise HTTPException(422, "source and destination are the same")
    if source.asset != dest.asset:
        raise HTTPException(422, "assets differ")
    if not source.is_cash and source.balance < amount:
        raise HTTPException(409, "insufficient funds")


def post_entry(transaction: Transaction, account: Account, entry_type: str) -> None:
    """Change one balance and record the entry that explains it."""
    signed = transaction.amount if entry_type == "credit" else -transaction.amount
    account.balance += signed
    transaction.entries.append(
        Entry(
            account_id=account.id,
            transaction_id=transaction.id,
            type=entry_type,
            amount=transaction.amount,
            balance=account.balance,
        )
    )


def move(session: Session, source: Account, dest: Account, transaction: Transaction) -> None:
    """Post a transaction from the source to the destination."""
    check_movement(source, dest, transaction.amount)
    post_entry(transaction, source, "debit")
    post_entry(transaction, dest, "credit")
    session.add(transaction)


def account_out(account: Account) -> AccountOut:
    """Return the account as clients see it."""
    return AccountOut.model_validate(account, from_attributes=True)


@app.post("/accounts", status_code=201)
def open_account(body: AccountIn, session: SessionDep) -> AccountOut:
    """Open an account."""
    name = f"{body.owner_name} {body.asset}"
    account = Account(name=name, owner_name=body.owner_name, asset=body.asset)
    session.add(account)
    session.commit()
    return account_out(account)


@app.post("/accounts/{account_id}/deposit")
def deposit(account_id: UUID, body: DepositIn, session: SessionDep, key: KeyHeader) -> AccountOut:
    """Move money from cash to the account."""
    request = f"deposit {account_id} {body.model_dump_json()}"
    if known := find_answer(session, key, request):
        return AccountOut.model_validate_json(known)
    account = find_account(session, account_id)
    transaction = Transaction(kind="deposit", asset=account.asset, amount=body.amount)
    move(session, find_cash(session, account.asset), account, transaction)
    answer = account_out(account)
    session.add(Idempotency(key=key, request=request, answer=answer.model_dump_json()))
    session.commit()
    return answer


@app.post("/transfers")
def transfer(body: TransferIn, session: SessionDep, key: KeyHeader) -> TransferOut:
    """Move money between two accounts."""
    request = f"transfer {body.model_dump_json()}"
    if known := find_answer(session, key, request):
        return TransferOut.model_validate_json(known)
    source = find_account(session, body.source_account_id)
    dest = find_account(session, body.dest_account_id)
    transaction = Transaction(
        kind="transfer", asset=source.asset, amount=body.amount, memo=body.memo
    )
    move(session, source, dest, transaction)
    answer = TransferOut(
        transfer_id=transaction.id,
        amount=transaction.amount,
        asset=transaction.asset,
        memo=transaction.memo,
        ts=transaction.ts,
        source=account_out(source),
        dest=account_out(dest),
    )
    session.add(Idempotency(key=key, request=request, answer=answer.model_dump_json()))
    session.commit()
    return answer
