"""What the programs of proof share: a ledger, broken on purpose or not, requests, and its disk."""

import argparse
import http.client
import importlib
import json
import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from harness import BENCH, PROGRAM, Server, call, connect, free_port, tell

PATIENCE_SECONDS = 60.0

# What must be found: each is some text of the program, and what to write instead.
BREAKS = {
    "key-apart": {
        "            connection.save(book.inserts, book.updates)\n        # The end": """\
            keys = {"idempotency_key": book.inserts.pop("idempotency_key", []), "event": []}
            connection.save(book.inserts, book.updates)
            connection.execute("COMMIT")
            connection.execute(self.database.begin_write)
            connection.save(keys, {})
        # The end"""
    },
    # Some commits come later, or with the next one.
    "early-answer": {
        '                connection.execute("COMMIT")\n        except': """\
                loop = asyncio._get_running_loop()
                if loop and idle is self._writing and random.random() < 0.5:
                    loop.call_later(0.03, connection.driver.commit)
                else:
                    connection.execute("COMMIT")
        except""",
        "                connection.execute(begin)\n": """\
                if connection.driver.in_transaction:
                    connection.driver.commit()
                connection.execute(begin)
""",
        "                    connection.driver.rollback()\n                    idle": """\
                    if sys.exc_info()[0]:
                        connection.driver.rollback()
                    idle""",
    },
    "synchronous-normal": {"PRAGMA synchronous = FULL": "PRAGMA synchronous = NORMAL"},
}


def read_options(description: str | None, **options: Any) -> argparse.Namespace:
    """Read a program's own options, and those that all have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, default=3600.0, help="end after so long")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--broken", choices=BREAKS, help="break the ledger on purpose")
    for name, default in options.items():
        is_flag = default is False
        given: Any = {"action": "store_true"} if is_flag else {"type": type(default)}
        parser.add_argument(f"--{name.replace('_', '-')}", default=default, **given)
    return parser.parse_args()


def load_ledger(folder: Path, broken: str | None) -> Any:
    """Import the ledger, or a copy that is broken on purpose."""
    if broken is None:
        sys.path.append(str(PROGRAM.parent))
        return importlib.import_module("ledger")
    text = PROGRAM.read_text()
    for old, new in BREAKS[broken].items():
        if text.count(old) != 1:
            raise RuntimeError(f"the ledger has changed, and is not broken by {old!r}")
        text = text.replace(old, new)
    (folder / "broken").mkdir()
    (folder / "broken" / "ledger.py").write_text(text)
    sys.path.insert(0, str(folder / "broken"))
    sys.modules.pop("ledger", None)
    return importlib.import_module("ledger")


def look(ledger: Any, url: str, *, make: bool) -> tuple[list[str], dict[str, str], set[str]]:
    """Open a ledger; return what its check finds, the answer to each key, and who may call."""
    with closing(ledger.database_at(url)) as database:
        database.open(make=make)
        with database.read() as connection:
            wrong = [text for _, _, found in ledger.check(connection) for text in found]
            stored = connection.rows("SELECT * FROM idempotency_key")
            callers = {row["name"] for row in connection.rows("SELECT name FROM api_key")}
            # The answers to those of a caller's own time name none.
            query = "SELECT id FROM event WHERE kind = 'TRANSFER' AND effective_at IS NULL"
            made = connection.rows(query)
    answers = {row["name"].rpartition("|")[2]: row["body"] for row in stored}
    told = set(re.findall("[0-9a-f-]{36}", "".join(answers.values())))
    wrong += [f"transfer {row['id']} has no key" for row in made if row["id"] not in told]
    return wrong, answers, callers


class Running(NamedTuple):
    """A server, and the process that it is."""

    process: Any
    server: Server

    def stop(self) -> None:
        """End it, by force if it does not listen."""
        self.process.terminate()
        self.process.join(20)
        self.process.kill()
        self.process.join()


def fork(ledger: Any, said: Path, *arguments: object) -> Any:
    """Begin what `python ledger.py ARGUMENTS` does, in a process that has the program already."""
    given = (ledger, said, [str(argument) for argument in arguments])
    process = multiprocessing.get_context("fork").Process(target=run_command, args=given)
    process.start()
    return process


def run_command(ledger: Any, said: Path, arguments: list[str]) -> None:
    """Run a command of the ledger."""
    with said.open("w") as sys.stdout, said.with_suffix(".log").open("a") as sys.stderr:
        sys.exit(ledger.main(arguments))


def ready(ledger: Any, folder: Path, url: str) -> tuple[Running, float]:
    """Start a server, and return it with the time until its first answer."""
    began, port = time.monotonic(), free_port()
    process = fork(ledger, folder / "said", "serve", "--port", port, "--database-url", url)
    server = Server(port, process.pid, folder / "accounts")
    while time.monotonic() < began + PATIENCE_SECONDS and process.is_alive():
        with suppress(OSError), closing(connect(server)) as link:
            call(link, "GET", "/health")
            return Running(process, server), time.monotonic() - began
        time.sleep(0.01)
    raise RuntimeError("a server did not start")


@dataclass
class Request:
    """What is asked once, however often it is sent, and what it changes if it is done."""

    path: str
    body: dict[str, Any]
    effect: dict[str, int] = field(default_factory=dict)
    method: str = "POST"
    key: str = field(default_factory=lambda: str(uuid4()))
    status: int = 0
    answer: bytes = b""
    refusal: bytes = b""
    tries: list[tuple[int, float]] = field(default_factory=list)
    """Each with its status, 0 for none, and how many seconds it took."""

    def send(self, link: http.client.HTTPConnection) -> tuple[int, bytes, bool]:
        """Send it; return the status, 0 for none, the answer, and whether it was a replay."""
        headers = {"Content-Type": "application/json", "Idempotency-Key": self.key}
        try:
            link.request(self.method, self.path, json.dumps(self.body), headers)
            response = link.getresponse()
            return response.status, response.read(), "Idempotent-Replayed" in response.headers
        except (OSError, http.client.HTTPException):
            link.close()
            return 0, b"", False

    def ask(self, link: http.client.HTTPConnection) -> bool:
        """Send it, and keep its answer if it is one: that the server cannot now is none."""
        began = time.monotonic()
        status, answer, _ = self.send(link)
        self.tries.append((status, time.monotonic() - began))
        if status not in (0, 503, 507):
            self.status, self.answer = status, answer
        else:
            self.refusal = answer
        return self.status != 0


def send_again(server: Server, requests: list[Request]) -> None:
    """Send what has no answer until it has one."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    with closing(connect(server)) as link:
        for request in requests:
            while not request.status and not request.ask(link):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{request.path} was not answered in time")
                time.sleep(0.02)


def run_watched(run: Callable[[Path, argparse.Namespace], int], options: argparse.Namespace) -> int:
    """Run this program in a process whose forks can be watched, and their disk be let fail."""
    if place := os.environ.pop("DISK_PLACE", ""):
        return run(Path(place), options)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        tell("a C compiler is missing; get it with: apt-get install gcc libc6-dev")
        return 2
    with tempfile.TemporaryDirectory(prefix="ledger-disk-") as name:
        place, library = os.path.realpath(name), f"{name}/disk.so"
        built = ["-shared", "-fPIC", "-O2", "-o", library, str(BENCH / "disk.c"), "-ldl"]
        subprocess.run([compiler, *built, "-lpthread"], check=True)
        environment = {**os.environ, "DISK_PLACE": place, "LD_PRELOAD": library}
        return subprocess.run([sys.executable, *sys.argv], check=False, env=environment).returncode


def watch(folder: Path) -> Path:
    """Have every process that begins from now on watched in a folder of this one."""
    inside = folder / "inside"
    inside.mkdir(parents=True)
    set_faults(folder)
    (folder / "log").touch()
    names = {"DISK_FOLDER": inside, "DISK_LOG": folder / "log", "DISK_FAULTS": folder / "faults"}
    os.environ.update({name: str(file) for name, file in names.items()})
    return inside


def set_faults(folder: Path, calls: int = 0, error: int = 0, count: int = 0, ms: int = 0) -> None:
    """Let the next calls fail, or take some milliseconds longer; a count of -1 is for ever."""
    with (folder / "faults").open("r+b" if (folder / "faults").exists() else "wb") as out:
        out.write(struct.pack("4i", calls, error, count, ms))
