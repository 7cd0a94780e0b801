"""Start the servers, speak to them and drive the load generator."""

import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from math import nan
from pathlib import Path
from typing import Any
from uuid import uuid4

BENCH = Path(__file__).resolve().parent
PROGRAM = BENCH.with_name("ledger.py")
ACCOUNTS = 1_000
FUNDS = 10**9
PAGE_ENTRIES = 50


@dataclass(frozen=True)
class Load:
    """Hold what one run of the load generator saw."""

    requests: int
    rate_per_second: float
    p50_ms: float
    p99_ms: float
    cpu_us: float = nan
    """Microseconds of the server's CPU for each request."""


@dataclass(frozen=True)
class Server:
    """Name a running server and the accounts that it serves."""

    port: int
    pid: int
    accounts_file: Path
    api_key: str = ""


def tell(message: str) -> None:
    """Report progress without touching the table on standard output."""
    print(message, file=sys.stderr, flush=True)


def free_port() -> int:
    """Return a port that nothing uses now."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command_for(kind: str, port: int, url: str, program: Path) -> list[str]:
    """Return the command that starts one kind of server."""
    if kind in ("ledger", "keyed"):
        return [sys.executable, str(program), "serve", "--port", str(port), "--database-url", url]
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    where = "ceiling:route_class" if kind == "route_class" else f"{kind}:app"
    app = [where, "--app-dir", str(BENCH), "--port", str(port)]
    return [sys.executable, "-m", "uvicorn", *app, *options]


def wait_until_open(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return once the server accepts connections."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and process.poll() is None:
        with closing(socket.socket()) as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")


def make_key(url: str) -> str:
    """Make an API key, which ends open mode."""
    command = [sys.executable, str(PROGRAM), "key", "add", "--name", "bench", "--role", "admin"]
    made = subprocess.run([*command, "--database-url", url], check=True, capture_output=True)
    return made.stdout.decode().strip()


@contextmanager
def serving(
    kind: str,
    folder: Path,
    database: str,
    url: str = "",
    program: Path = PROGRAM,
    **environment: str,
) -> Iterator[Server]:
    """Run a server as a process until the block ends; a keyed ledger is not in open mode."""
    url = url or f"sqlite:///{folder / database}.db"
    api_key = make_key(url) if kind == "keyed" else ""
    process, server = start(kind, folder, database, url, program, **environment)
    try:
        yield replace(server, api_key=api_key)
    finally:
        stop(process)


def start(
    kind: str, folder: Path, database: str, url: str, program: Path, **environment: str
) -> tuple[subprocess.Popen[bytes], Server]:
    """Start a server, and return its process once it accepts connections."""
    port, log = free_port(), folder / f"{database}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            command_for(kind, port, url, program),
            cwd=folder,
            env={**os.environ, "DATABASE_URL": url, **environment},
            stdout=output,
            stderr=output,
        )
    try:
        wait_until_open(port, process, log)
    except RuntimeError:
        stop(process)
        raise
    return process, Server(port, process.pid, folder / f"{database}.accounts")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, by force if it does not listen."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def call(
    link: http.client.HTTPConnection,
    method: str,
    path: str,
    body: object = None,
    api_key: str = "",
) -> Any:
    """Return the JSON answer to one request and refuse every failure."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": str(uuid4())}
    if api_key:
        headers["X-API-Key"] = api_key
    link.request(method, path, json.dumps(body) if body else None, headers)
    response = link.getresponse()
    answer = response.read()
    if response.status not in (200, 201):
        raise RuntimeError(f"{method} {path} answered {response.status}: {answer.decode()}")
    return json.loads(answer)


def connect(server: Server) -> http.client.HTTPConnection:
    """Return a connection that stays open between requests."""
    return http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)


def open_accounts(server: Server, count: int) -> list[str]:
    """Open accounts and fund them over one connection."""
    ids = []
    with closing(connect(server)) as link:
        for number in range(count):
            owner = {"owner_name": f"o{number}", "asset": "USD"}
            account = call(link, "POST", "/accounts", owner, server.api_key)
            path = f"/accounts/{account['id']}/deposit"
            call(link, "POST", path, {"amount": FUNDS}, server.api_key)
            ids.append(account["id"])
    return ids


def fund(server: Server) -> None:
    """Open and fund the accounts of a fresh server over several connections."""
    workers = 8
    with ThreadPoolExecutor(workers) as pool:
        shares = pool.map(open_accounts, [server] * workers, [ACCOUNTS // workers] * workers)
        ids = [account_id for share in shares for account_id in share]
    server.accounts_file.write_text("\n".join(ids) + "\n")


def invent_accounts(server: Server) -> None:
    """Name accounts for a server that looks none of them up."""
    server.accounts_file.write_text("".join(f"{uuid4()}\n" for _ in range(ACCOUNTS)))


def fill_page(server: Server) -> None:
    """Give the first account more entries than its statement shows on a page."""
    account_id = server.accounts_file.read_text().split()[0]
    with closing(connect(server)) as link:
        for _ in range(PAGE_ENTRIES + 10):
            call(link, "POST", f"/accounts/{account_id}/deposit", {"amount": 1})
        page = call(link, "GET", f"/accounts/{account_id}/statement?limit={PAGE_ENTRIES}")
    if len(page["items"]) != PAGE_ENTRIES:
        raise RuntimeError(f"a statement has {len(page['items'])} entries on its page")


def open_wallets(server: Server) -> None:
    """Open wallets for users who are named like the accounts."""
    with closing(connect(server)) as link:
        for user in server.accounts_file.read_text().split():
            call(link, "POST", "/api/v1/wallets/users", {"external_user_id": user})


def wrk_command(server: Server, mode: str, connections: int, seconds: int) -> list[str]:
    """Return the command of one run of the load generator."""
    wrk = shutil.which("wrk") or "wrk"
    options = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "30s"]
    url = f"http://127.0.0.1:{server.port}"
    script = str(BENCH / "load.lua")
    api_key = [server.api_key] if server.api_key else []
    return [wrk, *options, "-s", script, url, "--", str(server.accounts_file), mode, *api_key]


def parse_load(returncode: int, output: str) -> Load:
    """Read the last line of the load generator and refuse a run with failures."""
    found = re.search(r"RESULT requests=(\d+) duration_us=(\d+) p50_us=(\d+) p99_us=(\d+)", output)
    if returncode or found is None:
        raise RuntimeError(f"the load generator failed:\n{output}")
    requests, duration_us, p50_us, p99_us = map(int, found.groups())
    if not requests:
        raise RuntimeError("the load generator got no answer in its time")
    return Load(requests, requests / duration_us * 1e6, p50_us / 1e3, p99_us / 1e3)


def run_load(server: Server, mode: str, connections: int, seconds: int) -> Load:
    """Run the load generator to its end."""
    command = wrk_command(server, mode, connections, seconds)
    cpu_before = cpu_seconds(server.pid)
    run = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    spent = cpu_seconds(server.pid) - cpu_before
    load = parse_load(run.returncode, run.stdout)
    return replace(load, cpu_us=spent / load.requests * 1e6)


@contextmanager
def background_load(server: Server, mode: str, connections: int, seconds: int) -> Iterator[None]:
    """Keep connections busy with one kind of load while the block runs."""
    command = wrk_command(server, mode, connections, seconds)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        time.sleep(0.5)
        yield
        output, _ = process.communicate()
        parse_load(process.returncode, output.decode())
    finally:
        stop(process)


def process_file(pid: int, name: str) -> str:
    """Return what Linux tells of a process, and nothing on other systems."""
    file = Path(f"/proc/{pid}/{name}")
    return file.read_text() if file.exists() else ""


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process has used, its own and the system's for it."""
    # The second field is the program's name, which may hold blanks.
    fields = process_file(pid, "stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else nan


def resident_mebibytes(pid: int) -> float:
    """Return the resident memory of a process."""
    found = re.search(r"VmRSS:\s+(\d+) kB", process_file(pid, "status"))
    return int(found.group(1)) / 1024 if found else nan


def wal_megabytes(database: Path) -> float:
    """Return the size of what SQLite writes ahead of a database."""
    return database.with_name(f"{database.name}-wal").stat().st_size / 1e6
