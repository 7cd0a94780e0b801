"""Run PostgreSQL servers of our own, and measure the design with a row lock per transfer there."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from harness import BENCH, Load, free_port

ROWLOCK_TABLES = """
    CREATE TABLE rowlock_account (id bigint PRIMARY KEY, balance bigint, last_seq bigint);
    CREATE TABLE rowlock_transfer (id bigserial PRIMARY KEY,
        source_id bigint REFERENCES rowlock_account, dest_id bigint REFERENCES rowlock_account,
        amount bigint CHECK (amount > 0), ts timestamptz DEFAULT now());
    CREATE TABLE rowlock_entry (account_id bigint REFERENCES rowlock_account, seq bigint,
        transfer_id bigint REFERENCES rowlock_transfer, type text, amount bigint, balance bigint,
        PRIMARY KEY (account_id, seq));
    INSERT INTO rowlock_account SELECT n, 1000000000, 0 FROM generate_series(1, 1001) n;
"""


class Postgres:
    """One server, with its data in a folder of its own, and durable as PostgreSQL is by default."""

    def __init__(self, programs: Path, folder: Path) -> None:
        """Choose a port; the server is not started yet."""
        self.programs, self.folder, self.port = programs, folder, free_port()
        # PostgreSQL refuses to run as root.
        self.user: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
        folder.mkdir()
        if self.user:
            shutil.chown(folder, **self.user)
        self.data = folder / "data"

    @property
    def url(self) -> str:
        """Return the address of its database."""
        return f"postgresql://ledger@127.0.0.1:{self.port}/postgres"

    def run(self, program: str, *options: str) -> str:
        """Run one of PostgreSQL's programs to its end."""
        command = [str(self.programs / program), *options]
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            check=False,
            **self.user,
        )
        if done.returncode:
            raise RuntimeError(f"{program} failed:\n{done.stdout}")
        return str(done.stdout)

    def create(self) -> None:
        """Make an empty cluster."""
        self.run("initdb", "-D", str(self.data), "-U", "ledger", "-A", "trust", "-E", "UTF8")

    def copy(self, primary: "Postgres") -> None:
        """Become a standby of another server."""
        source = ["-h", "127.0.0.1", "-p", str(primary.port), "-U", "ledger"]
        self.run("pg_basebackup", *source, "-D", str(self.data), "-R", "-X", "stream")

    def start(self, **settings: object) -> None:
        """Serve from now on."""
        settings |= {"port": self.port, "listen_addresses": "127.0.0.1", "max_connections": 200}
        settings |= {"unix_socket_directories": self.folder}
        given = " ".join(f"-c {name}={value}" for name, value in settings.items())
        log = ["-l", str(self.folder / "log")]
        # Its output is a file, or the caller would wait for the server's own end.
        self.run("pg_ctl", "-D", str(self.data), "-o", given, *log, "-w", "start")

    def promote(self) -> None:
        """Turn a standby into a primary."""
        self.run("pg_ctl", "-D", str(self.data), "-w", "promote")

    @property
    def pid(self) -> int:
        """Return the process that all others of the server come from."""
        return int((self.data / "postmaster.pid").read_text().split()[0])

    def stop(self) -> None:
        """End at once, if it still runs."""
        if (self.data / "postmaster.pid").exists():
            with_force = ["-D", str(self.data), "-m", "immediate", "-w", "stop"]
            try:
                self.run("pg_ctl", *with_force)
            except RuntimeError:
                return


def find_programs() -> Path | None:
    """Return where PostgreSQL's server programs are, or nothing."""
    if found := shutil.which("initdb"):
        return Path(found).resolve().parent
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return installed[-1].parent if installed else None


@contextmanager
def new_postgres(programs: Path, folder: Path) -> Iterator[Postgres]:
    """Run a new server until the block ends."""
    server = Postgres(programs, folder)
    server.create()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def make_rowlock_tables(server: Postgres) -> None:
    """Make what pgbench works on."""
    with psycopg.connect(server.url) as connection:
        connection.execute(ROWLOCK_TABLES)


def run_rowlock(server: Postgres, hot: int, connections: int, seconds: int) -> Load:
    """Measure the design with a row lock per transfer, without any HTTP."""
    script = server.folder / "rowlock.sql"
    if not script.exists():
        script.write_text((BENCH / "rowlock.sql").read_text())
        script.chmod(0o644)
    load = ["-c", str(connections), "-j", "1", "-T", str(seconds), "-M", "prepared", "-n"]
    place = ["-h", "127.0.0.1", "-p", str(server.port), "-U", "ledger", "postgres"]
    said = server.run("pgbench", *load, "-D", f"hot={hot}", "-f", str(script), *place)
    rate = re.search(r"tps = ([\d.]+)", said)
    latency = re.search(r"latency average = ([\d.]+)", said)
    count = re.search(r"actually processed: (\d+)", said)
    if not (rate and latency and count):
        raise RuntimeError(f"pgbench failed:\n{said}")
    average = float(latency[1])
    return Load(int(count[1]), float(rate[1]), average, average)


def wait_for_standby(primary: Postgres) -> None:
    """Return once a standby confirms what the primary commits."""
    deadline = time.monotonic() + 30
    with psycopg.connect(primary.url, autocommit=True) as connection:
        while time.monotonic() < deadline:
            state = connection.execute("SELECT sync_state FROM pg_stat_replication").fetchone()
            if state == ("sync",):
                return
            time.sleep(0.1)
    raise RuntimeError("no synchronous standby came")
