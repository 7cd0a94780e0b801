"""Kill the primary of two PostgreSQL servers under load, promote the other, and count the money."""

import argparse
import contextlib
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import psycopg
from harness import PROGRAM, Server, call, connect, serving, tell
from postgres import Postgres, find_programs, wait_for_standby

ACCOUNTS = 100
FUNDS = 1_000_000
CALLERS = 16
PATIENCE_SECONDS = 60


@dataclass
class Story:
    """What the callers know: who should have what, and how it went."""

    balances: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    sent_again: int = 0
    replayed: int = 0
    unanswered_at: list[float] = field(default_factory=list)
    answered_at: list[float] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


def send(server: Server, body: dict[str, object], key: str) -> tuple[int, bool]:
    """Send a transfer once; return its status, 0 for none, and whether it was a replay."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": key}
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=15)
    with contextlib.closing(link):
        try:
            link.request("POST", "/transfers", json.dumps(body), headers)
            answer = link.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return 0, False
    return answer.status, "Idempotent-Replayed" in answer.headers


def transfer(server: Server, ids: list[str], story: Story) -> None:
    """Move money between two accounts, again and again under one key until it is answered."""
    source, dest = random.sample(ids, 2)
    amount, key = random.randint(1, 100), str(uuid4())  # noqa: S311
    body: dict[str, object] = {"source_account_id": source, "dest_account_id": dest}
    body["amount"] = amount
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        status, replayed = send(server, body, key)
        with story.lock:
            if status == 200:
                story.answered += 1
                story.replayed += replayed
                story.answered_at.append(time.monotonic())
                story.balances[source] -= amount
                story.balances[dest] += amount
                return
            story.sent_again += 1
            story.unanswered_at.append(time.monotonic())
        if status not in (0, 503):
            raise RuntimeError(f"a transfer was answered with {status}")
        time.sleep(0.05)
    raise RuntimeError("a transfer was not answered in time")


def fail_over(primary: Postgres, standby: Postgres, story: Story, after: int) -> float:
    """Kill the primary once enough transfers were answered, and return when that was."""
    while story.answered < after:
        time.sleep(0.01)
    died_at = time.monotonic()
    os.kill(primary.pid, signal.SIGKILL)
    tell(f"the primary was killed after {story.answered:,} answers")
    standby.promote()
    tell(f"the standby was promoted after {time.monotonic() - died_at:.1f} s")
    return died_at


def open_accounts(server: Server, story: Story) -> list[str]:
    """Open accounts with money in them."""
    ids = []
    with contextlib.closing(connect(server)) as link:
        for number in range(ACCOUNTS):
            account = call(link, "POST", "/accounts", {"owner_name": f"owner {number}"})
            call(link, "POST", f"/accounts/{account['id']}/deposit", {"amount": FUNDS})
            ids.append(account["id"])
            story.balances[account["id"]] = FUNDS
    return ids


def verdict(standby: Postgres, story: Story, transfers: int) -> list[str]:
    """Return what is wrong in the books of the server that survived."""
    with psycopg.connect(standby.url) as connection:
        rows = connection.execute("SELECT id, balance FROM account WHERE owner_name LIKE 'owner %'")
        differing = [row for row in rows if row[1] != story.balances.get(row[0], 0)]
        query = "SELECT count(*) FROM event WHERE kind = 'TRANSFER'"
        counted = connection.execute(query).fetchone()
    check = [sys.executable, str(PROGRAM), "check", "--database-url", standby.url]
    checked = subprocess.run(check, capture_output=True, text=True, check=False)
    print(checked.stdout)
    wrong = [f"{len(differing)} balances differ"] if differing else []
    if counted != (transfers,):
        wrong.append(f"{counted} transfers are stored, not {transfers}")
    if checked.returncode:
        wrong.append("the integrity check failed")
    return wrong


def run(programs: Path, folder: Path, transfers: int) -> int:
    """Play the scene, and print its figures."""
    primary = Postgres(programs, folder / "primary")
    standby = Postgres(programs, folder / "standby")
    story = Story()
    try:
        primary.create()
        primary.start(synchronous_standby_names="*", synchronous_commit="on")
        standby.copy(primary)
        standby.start()
        wait_for_standby(primary)
        hosts = f"127.0.0.1:{primary.port},127.0.0.1:{standby.port}"
        url = f"postgresql://ledger@{hosts}/postgres?target_session_attrs=read-write"
        with serving("ledger", folder, "ledger", url) as server:
            ids = open_accounts(server, story)
            with ThreadPoolExecutor(CALLERS + 1) as callers:
                failing = callers.submit(fail_over, primary, standby, story, transfers * 2 // 3)
                sent = [callers.submit(transfer, server, ids, story) for _ in range(transfers)]
                for one in sent:
                    one.result()
                died_at = failing.result()
        wrong = verdict(standby, story, transfers)
    finally:
        for postgres in (primary, standby):
            postgres.stop()
    resumed = min(moment for moment in story.answered_at if moment > max(story.unanswered_at))
    print(f"transfers acknowledged          {story.answered:,} of {transfers:,}")
    print(f"sent again after no answer      {story.sent_again:,}")
    print(f"of these, already done (replay) {story.replayed:,}")
    print(f"from the kill to the next answer {resumed - died_at:.1f} s")
    print(f"wrong                           {'; '.join(wrong) or 'nothing'}")
    return int(bool(wrong))


def main() -> int:
    """Read the options and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--transfers", type=int, default=9_000)
    options = parser.parse_args()
    programs = find_programs()
    if programs is None:
        tell("PostgreSQL is missing; get it with: apt-get install postgresql")
        return 2
    with tempfile.TemporaryDirectory(prefix="ledger-failover-") as name:
        # The servers run as another user where this is root.
        Path(name).chmod(0o755)
        return run(programs, Path(name), options.transfers)


if __name__ == "__main__":
    sys.exit(main())
