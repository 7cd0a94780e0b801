"""Serve the fastest answer that the framework can give to a transfer, without any database.

`app` has a route as most people write it, `route_class` one that answers from FastAPI's extension
point, a bare `get_route_handler`, as the ledger's routes do: the framework's real floor.
"""

from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Annotated, Any
from uuid import UUID, uuid4

from fastapi import FastAPI, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

Amount = Annotated[int, Field(strict=True, ge=1, le=10**15)]


class TransferIn(BaseModel):
    """Describe the body of a transfer."""

    model_config = ConfigDict(extra="forbid")

    source_account_id: UUID
    dest_account_id: UUID
    amount: Amount
    memo: str | None = Field(default=None, max_length=200)


class AccountOut(BaseModel):
    """Describe an account in an answer."""

    id: UUID
    name: str | None
    owner_name: str
    asset: str
    status: str
    balance: int
    created_at: datetime


class TransferOut(BaseModel):
    """Describe the answer to a transfer."""

    transfer_id: UUID
    amount: int
    asset: str
    memo: str | None
    ts: datetime
    source: AccountOut
    dest: AccountOut


def constant_account() -> AccountOut:
    """Return an account that looks like a real one."""
    return AccountOut(
        id=uuid4(),
        name=None,
        owner_name="Ada Lovelace",
        asset="USD",
        status="ACTIVE",
        balance=1_000_000_000,
        created_at=datetime.now(UTC),
    )


ANSWER = TransferOut(
    transfer_id=uuid4(),
    amount=1,
    asset="USD",
    memo=None,
    ts=datetime.now(UTC),
    source=constant_account(),
    dest=constant_account(),
)

app = FastAPI()


@app.post("/transfers")
async def transfer(body: TransferIn) -> TransferOut:
    """Validate the body and answer with constant data."""
    return ANSWER


class BareRoute(APIRoute):
    """Validate the body and answer with constant data, without the rest of FastAPI's handler."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        async def handle(request: Request) -> Response:
            TransferIn.model_validate_json(await request.body())
            return Response(ANSWER.model_dump_json(), media_type="application/json")

        return handle


route_class = FastAPI()
route_class.router.route_class = BareRoute
route_class.post("/transfers")(transfer)
