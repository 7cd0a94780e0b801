"""Record what a server writes, syncs and answers; cut the power at many places, and look.

For each place, files are built as a power cut there may leave them: all that was synced, and of
what came after the last sync nothing, all, a beginning, any writes, any sectors, or a torn one;
names in a folder that was not synced are there up to any of them. Then the ledger is opened and
checked, and must know every answer that was sent before. A backup that has its name must be whole.
"""

import json
import os
import random
import re
import secrets
import shutil
import sqlite3
import struct
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from harness import BENCH, Server, call, connect
from proof import fork, load_ledger, read_options, ready, run_watched, watch

SECTOR = 512
HEAD = struct.Struct("4q")
# What a power cut leaves of what was written since the last sync.
LEFT = ("nothing", "all", "beginning", "torn", "writes", "sectors")


class Record(NamedTuple):
    """What was done to a file: Created, Written, Truncated, Synced, Renamed, Unlinked; a sync that
    was Lost, an Answer that was sent, or a Mark of what was told to be done."""

    kind: str
    name: str
    at: int
    data: bytes


def read_log(log: Path, place: int = 0) -> tuple[list[Record], int]:
    """Return what was recorded from some place on, in its order, and where it ends."""
    records, whole = [], memoryview(log.read_bytes())
    while place < len(whole):
        kind, at, name_size, size = HEAD.unpack_from(whole, place)
        start = place + HEAD.size + name_size
        name = bytes(whole[place + HEAD.size : start]).decode()
        records.append(Record(chr(kind), name, at, bytes(whole[start : start + size])))
        place = start + size
    return records, place


def mark(log: Path, what: str, name: str) -> None:
    """Note that something was told to be done."""
    with log.open("ab") as out:
        out.write(HEAD.pack(ord("M"), 0, len(what), len(name)) + what.encode() + name.encode())


@dataclass
class File:
    """What is on the disk of a file, and what was done to it since the last sync."""

    synced: bytearray = field(default_factory=bytearray)
    pending: list[Record] = field(default_factory=list)

    def settle(self, *, is_lost: bool) -> None:
        """Have all on the disk, or lose it."""
        for record in self.pending if not is_lost else ():
            apply(self.synced, record)
        self.pending = []

    def after_cut(self, dice: random.Random) -> bytes:
        """Return what a power cut may leave."""
        left, content = dice.choice(LEFT), bytearray(self.synced)
        records = {"nothing": [], "writes": [r for r in self.pending if dice.random() < 0.5]}.get(
            left, self.pending
        )
        if left in ("beginning", "torn"):
            records = records[: dice.randrange(len(records) + 1)]
        if left == "sectors":
            records = [part for r in records for part in sectors(r) if dice.random() < 0.5]
        for record in records[:-1] if left == "torn" else records:
            apply(content, record)
        if left == "torn" and records:
            [*_, last] = records
            apply(content, last._replace(data=last.data[: dice.randrange(len(last.data) + 1)]))
        return bytes(content)


def sectors(record: Record) -> Iterator[Record]:
    """Divide a write where one sector of the disk ends and the next one begins."""
    if record.kind == "T":
        yield record
    end = record.at + len(record.data)
    for start in range(record.at - record.at % SECTOR, end if record.kind == "W" else 0, SECTOR):
        first, last = max(start, record.at), min(start + SECTOR, end)
        yield record._replace(at=first, data=record.data[first - record.at : last - record.at])


def apply(content: bytearray, record: Record) -> None:
    """Do to a file what was done to it."""
    if record.kind == "T":
        del content[record.at :]
    content.extend(bytes(max(0, record.at - len(content))))
    content[record.at : record.at + len(record.data)] = record.data


Names = dict[str, File | None]


@dataclass
class Disk:
    """The files of a folder: as the program sees them, and as they are on the disk."""

    seen: Names = field(default_factory=dict)
    synced: Names = field(default_factory=dict)
    pending: defaultdict[str, list[Names]] = field(default_factory=lambda: defaultdict(list))

    def do(self, record: Record) -> None:
        """Do what was recorded."""
        file, name = self.seen.get(record.name), record.name
        new = record.data.decode() if record.kind == "R" else name
        if record.kind in "CUR":
            names: Names = {} if record.kind == "C" else {name: None}
            self.seen |= (names := names | ({} if record.kind == "U" else {new: file or File()}))
            self.pending[new.rpartition("/")[0]].append(names)
        elif file and record.kind in "WT":
            file.pending.append(record)
        elif file and record.kind in "SL":
            file.settle(is_lost=record.kind == "L")
        elif record.kind == "S":
            for names in self.pending.pop(name, []):
                self.synced |= names

    def cut(self, folder: str, target: Path, dice: random.Random) -> None:
        """Write the files of a folder as a power cut may leave them."""
        names = dict(self.synced)
        for changes in self.pending.values():
            for change in changes[: dice.randrange(len(changes) + 1)]:
                names |= change
        target.mkdir()
        for name, file in names.items():
            if file:
                place = target / name.removeprefix(f"{folder}/")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(file.after_cut(dice))


@dataclass
class Told:
    """What callers were told until now."""

    streams: defaultdict[str, bytes] = field(default_factory=lambda: defaultdict(bytes))
    answers: set[str] = field(default_factory=set)
    before: tuple[int, Set[str]] = field(default=(0, frozenset()))
    """The version of a ledger that is upgraded, and the answers that it knew."""
    commands: dict[str, set[str]] = field(default_factory=dict)
    """What was answered when a command began, as "begun backup", and when it was done."""

    def hear(self, record: Record) -> None:
        """Note an answer as soon as all of it was sent, and what a command has said."""
        if record.kind == "M":
            self.commands[f"{record.name} {record.data.decode()}"] = set(self.answers)
        elif record.kind == "A":
            stream = self.streams[record.name] + record.data
            found = re.match(rb"HTTP/1.1 2.*?content-length: (\d+).*?\r\n\r\n", stream, re.S)
            if found and len(stream) >= found.end() + int(found[1]):
                if b'id"' in stream:  # It is about something that was done.
                    self.answers.add(stream[found.end() :].decode())
                stream = b""
            self.streams[record.name] = stream


def transfer(server: Server, ids: list[str], seed: int, many: int, seconds: float) -> None:
    """Transfer between accounts, one at a time or many, as one caller."""
    dice, end = random.Random(seed), time.monotonic() + seconds  # noqa: S311
    with closing(connect(server)) as link:
        while time.monotonic() < end:
            transfers: list[dict[str, Any]] = []
            for _ in range(many):
                source, dest = dice.sample(ids, 2)
                ends = {"source_account_id": source, "dest_account_id": dest}
                transfers.append({**ends, "amount": dice.randint(1, 9)})
            body = {"transfers": transfers} if many > 1 else transfers[0]
            path = "/transfers/bulk" if many > 1 else "/transfers"
            call(link, "POST", path, body, server.api_key)


def load(server: Server, ids: list[str], seconds: float) -> None:
    """Transfer over several connections; one of them sends so much that the log begins anew."""
    with ThreadPoolExecutor() as pool:
        for done in [
            pool.submit(transfer, server, ids, seed, many, seconds)
            for seed, many in enumerate([1, 1, 1, 300])
        ]:
            done.result()


def record(ledger: Any, folder: Path, seconds: float) -> list[Record]:
    """Run a server from its first start to its second end, with commands beside it."""
    inside, log = folder / "inside", folder / "log"
    url, ids = f"sqlite:///{inside}/ledger.db", []
    (process, server), _ = ready(ledger, folder, url)
    server = replace(server, api_key=os.environ["LEDGER_ADMIN_KEY"])
    with closing(connect(server)) as link:
        for number in range(8):
            owner = {"owner_name": f"owner {number}"}
            ids.append(call(link, "POST", "/accounts", owner, server.api_key)["id"])
            path = f"/accounts/{ids[-1]}/deposit"
            call(link, "POST", path, {"amount": 1_000_000}, server.api_key)
    for name, arguments in {
        "backup": ["backup", f"{inside}/backup.db", "--database-url", url],
        "copy": ["copy", "--from", url, "--to", f"sqlite:///{inside}/copy.db"],
        "key": ["key", "add", "--name", "late", "--role", "admin", "--database-url", url],
    }.items():
        load(server, ids, seconds)
        mark(log, "begun", name)
        command = fork(ledger, folder / name, *arguments)
        load(server, ids, seconds)
        command.join()
        mark(log, "done", name)
    process.terminate()
    process.join()
    (process, later), _ = ready(ledger, folder, url)
    load(replace(later, api_key=server.api_key), ids, seconds)
    process.terminate()
    process.join()
    return read_log(log)[0]


def look(ledger: Any, file: Path, *, make: bool) -> tuple[list[str], dict[str, str], set[str]]:
    """Open a ledger; return what its check finds, the answer to each key, and who may call."""
    with closing(ledger.database_at(f"sqlite:///{file}")) as database:
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


def losses(ledger: Any, folder: Path, told: Told) -> list[str]:
    """Open what a power cut has left, and return what is wrong or lost."""
    kept = [look_before(file) for file in folder.glob("ledger.db*version-1")]
    wrong = ["the copy before an upgrade is not whole" for one in kept if one != told.before]
    if told.before[1] and not kept and look_before(folder / "ledger.db")[0] != told.before[0]:
        wrong.append("it was upgraded without a copy")
    try:
        found, answers, callers = look(ledger, folder / "ledger.db", make=True)
        lost = told.answers - {*answers.values()}
        wrong += [*found, *(f"lost: {answer[:80]}" for answer in lost)]
        if "done key" in told.commands and "late" not in callers:
            wrong.append("lost: a key that was added")
        for name in ("backup", "copy"):
            if (file := folder / f"{name}.db").exists():
                found, answers, _ = look(ledger, file, make=False)
                missing = told.commands[f"begun {name}"] - {*answers.values()}
                wrong += [f"{name}: {text}" for text in (*found, *missing)]
            elif f"done {name}" in told.commands:
                wrong.append(f"lost: the {name}")
    except (ledger.StartupError, ledger.LedgerError) as error:
        wrong.append(f"it does not open: {error}")
    return wrong


def look_before(file: Path) -> tuple[int, Set[str]]:
    """Return the version of a ledger that nothing has upgraded, and the answers that it knows."""
    with closing(sqlite3.connect(file)) as connection:
        [version] = connection.execute("SELECT max(version) FROM schema_version").fetchone()
        return version, {body for (body,) in connection.execute("SELECT body FROM idempotency_key")}


def places(records: list[Record], count: int, dice: random.Random) -> list[int]:
    """Choose where the power is cut: right after answers, right after syncs, and anywhere."""
    chosen: set[int] = set()
    for kinds in ("AM", "S", "CWTRU"):
        among = [n for n, record in enumerate(records, 1) if record.kind in kinds]
        chosen |= set(dice.sample(among, min(count // 3, len(among))))
    others = [n for n in range(1, len(records) + 1) if n not in chosen]
    return sorted(chosen | set(dice.sample(others, max(0, count - len(chosen)))))


def play(ledger: Any, folder: Path, options: Any, cuts: int, old: str = "") -> Counter[str]:
    """Record what happens to a new ledger, or to an old one; cut the power at many places."""
    dice, disk, told, done = random.Random(options.seed), Disk(), Told(), 0  # noqa: S311
    inside, counts = watch(folder), Counter[str]()
    if old:
        with closing(sqlite3.connect(file := inside / "ledger.db")) as connection:
            connection.executescript(old)
        told.before = look_before(file)
        told.answers |= told.before[1]
        disk.seen[str(file)] = disk.synced[str(file)] = File(bytearray(file.read_bytes()))
    records = record(ledger, folder, options.load)
    counts.update(record.kind for record in records)
    del os.environ["DISK_FOLDER"]
    for place in places(records, cuts, dice):
        if time.monotonic() > options.end:
            break
        for each in records[done:place]:
            disk.do(each)
            told.hear(each)
        done, target = place, folder / "image"
        disk.cut(str(inside), target, dice)
        wrong = losses(ledger, target, told)
        shutil.rmtree(target)
        for line in wrong[:3] if counts["losing"] < 3 else []:
            print(f"place {place}: {line}")
        counts.update(cuts=1, losing=bool(wrong))
    return counts


def run(folder: Path, options: Any) -> int:
    """Play with a new ledger and with one that is upgraded, and print the figures."""
    options.end = time.monotonic() + options.seconds
    os.environ["LEDGER_ADMIN_KEY"] = secrets.token_hex(20)
    ledger = load_ledger(folder, options.broken)
    old = json.loads((BENCH.parent / ".ledgers" / "version-1.json").read_text())["sqlite"]
    counts = play(ledger, folder / "new", options, options.cuts - options.cuts // 3)
    counts += play(ledger, folder / "old", options, options.cuts // 3, "\n".join(old))
    print(
        f"powercut: {counts['cuts']} cuts among {counts['W']:,} writes, {counts['S']:,} syncs and "
        f"{counts['A']:,} answers; {counts['losing']} lost something"
    )
    return int(counts["losing"] > 0)


if __name__ == "__main__":
    sys.exit(run_watched(run, read_options(__doc__, cuts=100, load=0.3)))
