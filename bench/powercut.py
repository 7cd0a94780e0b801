"""Record what a server writes, syncs and answers; cut the power at many places, and look.

Files are built as a power cut may leave them: all that was synced, and of what came later nothing,
all, a beginning with a torn write, or any of it, by writes or by sectors; names in a folder up to
any of those that were not synced. Then the ledger is opened and checked, and must know every answer
that was sent before. A backup is whole if it is there, and it is there once it was told.
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
from proof import fork, load_ledger, look, read_options, ready, run_watched, watch

SECTOR = 512
HEAD = struct.Struct("4q")


class Record(NamedTuple):
    """By its first letter: what was Created, Written, Truncated, Synced, Lost as a sync failed,
    Renamed, Unlinked, Answered, or Marked by us."""

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
        content, left = bytearray(self.synced), dice.choice(["nothing", "all", "beginning", "any"])
        parts = self.pending
        if dice.random() < 0.5:
            parts = [part for record in parts for part in sectors(record)]
        count = {"nothing": 0, "beginning": dice.randrange(len(parts) + 1)}.get(left, len(parts))
        for part in parts[:count]:
            if left != "any" or dice.random() < 0.5:
                apply(content, part)
        for torn in parts[count : count + 1] if left == "beginning" else []:
            apply(content, torn._replace(data=torn.data[: dice.randrange(len(torn.data) + 1)]))
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
    """What callers were told until now; `commands` has what was when each began and was done."""

    streams: defaultdict[str, bytes] = field(default_factory=lambda: defaultdict(bytes))
    answers: set[str] = field(default_factory=set)
    commands: dict[str, set[str]] = field(default_factory=dict)
    before: tuple[int, Set[str]] = (0, frozenset())  # What `look_before` an upgrade has seen.

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


def load(server: Server, ids: list[str], seconds: float) -> None:
    """Transfer over several connections; one of them sends so much that the log begins anew."""
    end = time.monotonic() + seconds

    def act(many: int) -> None:
        one = {"source_account_id": ids[many % 7], "dest_account_id": ids[7], "amount": 1}
        body = {"transfers": [one] * many} if many > 9 else one
        path = "/transfers/bulk" if many > 9 else "/transfers"
        with closing(connect(server)) as link:
            while time.monotonic() < end:
                call(link, "POST", path, body, server.api_key)

    with ThreadPoolExecutor() as pool:
        list(pool.map(act, [1, 2, 3, 300]))


def record(ledger: Any, folder: Path, seconds: float) -> list[Record]:
    """Run a server from its first start to its second end, with commands beside it."""
    inside, log = folder / "inside", folder / "log"
    url, ids = f"sqlite:///{inside}/ledger.db", []
    first, _ = ready(ledger, folder, url)
    server = replace(first.server, api_key=os.environ["LEDGER_ADMIN_KEY"])
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
    first.stop()
    second, _ = ready(ledger, folder, url)
    load(replace(second.server, api_key=server.api_key), ids, seconds)
    second.stop()
    return read_log(log)[0]


def losses(ledger: Any, folder: Path, told: Told) -> list[str]:
    """Open what a power cut has left, and return what is wrong or lost."""
    kept = [look_before(file) for file in folder.glob("ledger.db*version-1")]
    wrong = ["the copy before an upgrade is not whole" for one in kept if one != told.before]
    if told.before[1] and not kept and look_before(folder / "ledger.db")[0] != told.before[0]:
        wrong.append("it was upgraded without a copy")
    try:
        found, answers, callers = look(ledger, f"sqlite:///{folder}/ledger.db", make=True)
        lost = told.answers - {*answers.values()}
        wrong += [*found, *(f"lost: {answer[:80]}" for answer in lost)]
        if "done key" in told.commands and "late" not in callers:
            wrong.append("lost: a key that was added")
        for name in ("backup", "copy"):
            if (file := folder / f"{name}.db").exists():
                found, answers, _ = look(ledger, f"sqlite:///{file}", make=False)
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
        return version, {body for [body] in connection.execute("SELECT body FROM idempotency_key")}


def places(records: list[Record], count: int, dice: random.Random) -> list[int]:
    """Choose where the power is cut: right after answers, right after syncs, and anywhere."""
    chosen: set[int] = set()
    for kinds in ("AM", "S", "CWTRU"):
        among = [n for n, record in enumerate(records, 1) if record.kind in kinds]
        chosen |= set(dice.sample(among, min(count // 3, len(among))))
    return sorted(chosen)


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
        print(*(f"place {place}: {line}\n" for line in wrong[:3]), sep="", end="")
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
