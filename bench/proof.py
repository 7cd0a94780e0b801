"""What the programs of proof share: a program broken on purpose, its module, and its disk."""

import argparse
import importlib
import importlib.util
import shutil
import struct
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

from harness import BENCH, PROGRAM

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
                self.later = threading.Timer(0.03, connection.driver.commit)
                if idle is self._writing and random.random() < 0.5:
                    self.later.start()
                else:
                    connection.execute("COMMIT")
        except""",
        "                connection.execute(begin)\n": """\
                if connection.driver.in_transaction:
                    self.later.cancel()
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


def program(folder: Path, broken: str | None) -> Path:
    """Return the ledger's file, or a copy that is broken on purpose."""
    if broken is None:
        return PROGRAM
    text = PROGRAM.read_text()
    for old, new in BREAKS[broken].items():
        if text.count(old) != 1:
            raise RuntimeError(f"the ledger has changed, and is not broken by {old!r}")
        text = text.replace(old, new)
    copy = folder / "ledger.py"
    copy.write_text(text)
    return copy


def module_of(file: Path) -> Any:
    """Import the ledger, or a copy of it."""
    if file == PROGRAM:
        sys.path.append(str(PROGRAM.parent))
        return importlib.import_module("ledger")
    spec = importlib.util.spec_from_file_location("ledger", file)
    if spec is None or spec.loader is None:
        raise RuntimeError(f"{file} is no module")
    sys.modules["ledger"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(ledger: Any, url: str, query: str) -> list[dict[str, Any]]:
    """Return the rows of a query of a ledger's tables."""
    with closing(ledger.database_at(url)) as database, database.read() as connection:
        found: list[dict[str, Any]] = connection.rows(query)
    return found


def findings(ledger: Any, url: str) -> list[str]:
    """Open a ledger as a server does, and return what its integrity check finds."""
    with closing(ledger.database_at(url)) as database:
        database.open(make=True)
        with database.read() as connection:
            return [text for _, _, wrong in ledger.check(connection) for text in wrong]


def watched(folder: Path, inside: Path) -> dict[str, str]:
    """Return the environment of a process whose disk is watched, and fails when it is told to."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise SystemExit("a C compiler is missing; get it with: apt-get install gcc libc6-dev")
    library, log, faults = folder / "disk.so", folder / "disk.log", folder / "faults"
    built = ["-shared", "-fPIC", "-O2", "-o", str(library), str(BENCH / "disk.c"), "-ldl"]
    subprocess.run([compiler, *built, "-lpthread"], check=True)
    log.touch()
    set_faults(faults)
    names = {"DISK_FOLDER": inside, "DISK_LOG": log, "DISK_FAULTS": faults, "LD_PRELOAD": library}
    return {name: str(file) for name, file in names.items()}


def set_faults(
    file: Path, *, calls: int = 0, error: int = 0, count: int = 0, milliseconds: int = 0
) -> None:
    """Let the next calls fail, or take longer; a count of -1 is for ever."""
    with file.open("r+b" if file.exists() else "wb") as out:
        out.write(struct.pack("4i", calls, error, count, milliseconds))
