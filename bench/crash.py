"""Kill servers under a load of every kind of operation, again and again, and compare the books.

After each kill the servers start again, and whatever had no answer is sent once more with its key.
Then every answer of the cycle must come again under its key, byte for byte; every balance must be
what the answers add up to; and in the end the integrity check must find nothing.
"""

import json
import os
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from harness import Server, call, connect
from postgres import find_programs, new_postgres
from proof import Request, Running, load_ledger, look, read_options, ready, send_again

CALLERS = 6
DAY = 86_400_000
FIRST_ACCOUNTS = json.dumps({f"100{number}": "1000.00" for number in range(4)})


Errand = Generator[Request, Any, None]
"""Requests of which each one needs the answer to the last one."""


@dataclass
class Story:
    """What the callers know."""

    dice: random.Random
    people: list[str] = field(default_factory=list)
    balances: Counter[str] = field(default_factory=Counter)
    requests: list[Request] = field(default_factory=list)

    def pick(self) -> tuple[str, str, int]:
        """Return two people, and an amount that most can pay for some time."""
        one, two = self.dice.sample(self.people, 2)
        return one, two, self.dice.randint(1, 400)


def move_cash(story: Story) -> Errand:
    """Bring money, take it out."""
    one, _, amount = story.pick()
    yield Request(f"/accounts/{one}/deposit", {"amount": amount}, {one: amount})
    yield Request(f"/accounts/{one}/withdraw", {"amount": 2 * amount}, {one: -2 * amount})


def transfer(story: Story) -> Errand:
    """Transfer, and take some of it back."""
    one, two, amount = story.pick()
    ends = {"source_account_id": one, "dest_account_id": two}
    done = yield Request("/transfers", {**ends, "amount": amount}, {one: -amount, two: amount})
    if amount % 3 == 0:
        path = f"/transactions/{done['transfer_id']}/reverse"
        yield Request(path, {}, {one: amount, two: -amount})


def transfer_many(story: Story) -> Errand:
    """Transfer many times in one request, all or none."""
    one, two, amount = story.pick()
    ends = {"source_account_id": one, "dest_account_id": two, "metadata": {"run": "5"}}
    transfers = [{**ends, "amount": amount + number} for number in range(5)]
    total = 5 * amount + 10
    yield Request("/transfers/bulk", {"transfers": transfers}, {one: -total, two: total})


def journal(story: Story) -> Errand:
    """Post three entries at once."""
    (one, two, three), amount = story.dice.sample(story.people, 3), story.pick()[2]
    effect = {one: -2 * amount, two: amount, three: amount}
    entries = [
        {"account_id": name, "type": "CREDIT" if change > 0 else "DEBIT", "amount": abs(change)}
        for name, change in effect.items()
    ]
    yield Request("/transactions", {"entries": entries}, effect)


def hold(story: Story) -> Errand:
    """Hold money, and capture it or give it up."""
    one, two, amount = story.pick()
    ends = {"account_id": one, "dest_account_id": two}
    held = yield Request("/holds", {**ends, "amount": amount})
    if amount % 2:
        yield Request(f"/holds/{held['id']}/capture", {}, {one: -amount, two: amount})
    else:
        yield Request(f"/holds/{held['id']}/void", {})


def pay(story: Story) -> Errand:
    """Pay a merchant, and get it back."""
    one, _, amount = story.pick()
    body = {"account_id": one, "amount": amount}
    done = yield Request("/payments", body, {one: -amount})
    if amount % 2:
        yield Request(f"/transactions/{done['payment_id']}/reverse", {}, {one: amount})


def live(story: Story) -> Errand:
    """Open an account, change it and close it."""
    opened = yield Request("/accounts", {"owner_name": "Somebody", "metadata": {"a": "1"}})
    path = f"/accounts/{opened['id']}"
    yield Request(path, {"owner_name": "Somebody else"}, method="PATCH")
    for step in story.dice.choice([("freeze", "unfreeze"), ("freeze", "close"), ("close",)]):
        yield Request(f"{path}/{step}", {})


def bank(story: Story) -> Errand:
    """Do what the banking kata does; what it pays brings 2 % back when somebody looks later."""
    one, two = story.dice.sample(["b0", "b1", "b2"], 2)
    amount, mine = story.pick()[2], f"bank:{one}@USD"
    body = {"timestamp": 1, "account_id": one, "amount": amount}
    yield Request("/bank/deposits", body, {mine: amount})
    yield Request("/bank/payments", body, {mine: amount * 2 // 100 - amount})
    ends = {"timestamp": 1, "source_account_id": one, "target_account_id": two}
    effect = {mine: -amount, f"bank:{two}@USD": amount}
    yield Request("/bank/transfers", {**ends, "amount": amount}, effect)
    if amount % 5 == 0:
        yield look_later(one)


def look_later(name: str) -> Request:
    """Ask for a balance after a day, which credits what is due."""
    return Request(f"/bank/accounts/{name}/balance?timestamp={DAY + 1}", {}, method="GET")


def cash_machine(story: Story) -> Errand:
    """Use the cash machine."""
    number, amount = f"100{story.dice.randrange(4)}", story.pick()[2]
    body, mine = {"amount": f"{amount / 100:.2f}"}, f"atm:{number}@USD"
    yield Request(f"/atm/accounts/{number}/deposit", body, {mine: amount})
    yield Request(f"/atm/accounts/{number}/withdraw", body, {mine: -amount})


def wallets(story: Story) -> Errand:
    """Buy, get and spend credits."""
    user, amount = f"w{story.dice.randrange(2)}", story.pick()[2]
    for step, sign in {"top-up": 1, "bonus": 1, "spend": -1}.items():
        body = {"amount": f"{amount / 10_000:.4f}", "asset_type_id": 1}
        path = f"/api/v1/wallets/users/{user}/{step}"
        yield Request(path, body, {f"wallets:{user}@GOLD": sign * amount})


ERRANDS: list[Callable[[Story], Errand]] = [move_cash, transfer, transfer_many, journal, hold]
ERRANDS += [pay, live, bank, cash_machine, wallets]


def open_all(server: Server, story: Story) -> None:
    """Open the accounts of all, with money in them."""
    with closing(connect(server)) as link:
        for number in range(6):
            opened = call(link, "POST", "/accounts", {"owner_name": f"person {number}"})
            story.people.append(opened["id"])
            call(link, "POST", f"/accounts/{opened['id']}/deposit", {"amount": 100_000})
        for name in ("b0", "b1", "b2"):
            call(link, "POST", "/bank/accounts", {"timestamp": 1, "account_id": name})
        for name in ("w0", "w1"):
            call(link, "POST", "/api/v1/wallets/users", {"external_user_id": name})


def run_errands(server: Server, story: Story, is_over: threading.Event) -> None:
    """Run one errand after the other, until the time is over."""
    with closing(connect(server)) as link:
        while not is_over.is_set():
            errand, found = story.dice.choice(ERRANDS)(story), None
            while True:
                try:
                    request = errand.send(found)
                except StopIteration:
                    break
                story.requests.append(request)
                if not request.ask(link) or request.status >= 400:
                    break
                found = json.loads(request.answer)


def stored_balances(ledger: Any, url: str) -> Counter[str]:
    """Return the balances of all customers, under an id or a dialect's name."""
    query = """SELECT COALESCE(name || '@' || asset, id) AS id, balance FROM account
        WHERE kind = 'CUSTOMER'"""
    with closing(ledger.database_at(url)) as database, database.read() as connection:
        return Counter({row["id"]: row["balance"] for row in connection.rows(query)})


def differences(ledger: Any, url: str, server: Server, story: Story) -> list[str]:
    """Compare every answer with the books, and return what is wrong."""
    wrong = []
    with closing(connect(server)) as link:
        for name in ("b0", "b1", "b2"):
            look_later(name).ask(link)
        for request in story.requests:
            story.balances.update(request.effect if request.status < 300 else {})
            if request.status >= 500:
                wrong.append(f"{request.path} was answered {request.status}")
            first = (request.status, request.answer, True)
            if request.method != "GET" and (again := request.send(link)) != first:
                wrong.append(f"{request.path} was answered {first}, and then {again}")
    for name, balance in stored_balances(ledger, url).items():
        if balance != story.balances[name]:
            wrong.append(f"{name} has {balance}, and should have {story.balances[name]}")
    return wrong


@contextmanager
def load(servers: list[Running], story: Story) -> Iterator[None]:
    """Have callers run errands on all servers, until the block ends."""
    is_over = threading.Event()
    given = [(running.server, story, is_over) for running in servers * CALLERS][:CALLERS]
    callers = [threading.Thread(target=run_errands, args=arguments) for arguments in given]
    for caller in callers:
        caller.start()
    try:
        yield
    finally:
        is_over.set()
        for caller in callers:
            caller.join()


def run(folder: Path, url: str, options: Any) -> int:
    """Play the cycles, and print their figures."""
    os.environ["PRELOAD_ACCOUNTS"] = FIRST_ACCOUNTS
    ledger = load_ledger(folder, options.broken)
    story, end = Story(random.Random(options.seed)), time.monotonic() + options.seconds  # noqa: S311
    wrong, counts, times = list[str](), Counter[str](), list[float]()
    begin = partial(ready, ledger, folder, url)
    servers = [begin()[0] for _ in range(options.servers)]
    try:
        open_all(servers[0].server, story)
        story.balances = stored_balances(ledger, url)
        while counts["cycles"] < options.cycles and not wrong and time.monotonic() < end:
            story.requests = []
            killed = story.dice.sample(range(len(servers)), story.dice.randint(1, len(servers)))
            with load(servers, story):
                time.sleep(story.dice.uniform(0.02, 0.5))
                for number in killed:
                    servers[number].process.kill()
            for number in killed:
                servers[number].process.join()
                servers[number], seconds = begin()
                times.append(seconds)
            send_again(servers[-1].server, story.requests)
            wrong = differences(ledger, url, servers[0].server, story)
            again = sum(len(request.tries) > 1 for request in story.requests)
            counts.update(cycles=1, requests=len(story.requests), again=again)
    finally:
        for running in servers:
            running.stop()
    wrong += look(ledger, url, make=True)[0]
    print(*wrong[:10], sep="\n", end="\n" if wrong else "")
    print(
        f"crash: {counts['cycles']} cycles on {url.partition(':')[0]}, {options.servers} servers: "
        f"{counts['requests']:,} requests, {counts['again']:,} sent again; {len(wrong)} wrong; "
        f"ready after {median(times):.2f} s, at most {max(times):.2f} s"
    )
    return int(bool(wrong))


def main() -> int:
    options = read_options(__doc__, cycles=25, servers=2, postgresql=False, database_url="")
    with tempfile.TemporaryDirectory(prefix="ledger-crash-") as name, ExitStack() as stack:
        folder, url = Path(name), options.database_url or f"sqlite:///{name}/ledger.db"
        if options.postgresql:
            if not (programs := find_programs()):
                raise SystemExit("PostgreSQL is missing: apt-get install postgresql")
            folder.chmod(0o755)  # It runs as another user where this is root.
            url = stack.enter_context(new_postgres(programs, folder / "postgresql")).url
        return run(folder, url, options)


if __name__ == "__main__":
    sys.exit(main())
