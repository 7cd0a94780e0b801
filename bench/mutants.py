"""Change a little in the ledger, one place at a time, and tell whether the suite sees it.

The places are taken at random, by a seed, from all that is not text: comparisons, conditions,
arithmetic, numbers, and statements that are left out. At first all tests run once on a ledger whose
statements note which test runs them, in whatever process. Then a change is tried with the tests
that run its statement, the fastest first. A test that fails must pass again on the ledger as it is,
or it says nothing.
"""

import ast
import copy
import hashlib
import importlib
import itertools
import json
import mmap
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import ChainMap, Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import PROGRAM, tell
from proof import load_ledger, read_options

OTHER: dict[Any, Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip
# What a failure shows is read by nobody, and to prepare for it takes longer than most tests.
QUIETLY = ["-q", "-n", "0", "--tb=no", "--assert=plain"]
# A row of bytes for each test, one for each line; the first row begins with the present test.
NOTING = """
import mmap, os
_ROWS = memoryview(mmap.mmap(os.open({place!r}, os.O_RDWR), 0))
_PRESENT = _ROWS[:4].cast("I")
def _ran(line): _ROWS[_PRESENT[0] * {width} + line] = 1
"""
ROWS, WIDTH = 5_000, 10_000
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
TESTS = PROGRAM.with_name("test_ledger.py")
NO_START, OUT_OF_TIME = "no start", "out of time"


class Mutant(NamedTuple):
    """A part of the program, what is written instead of it, and the line of its statement."""

    node: Any
    text: str
    line: int
    """0 if it runs when the program is loaded."""

    def __str__(self) -> str:
        where = f"line {self.node.lineno}:{self.node.col_offset}"
        return f"{where}: {ast.unparse(self.node)[:60]} -> {self.text[:60]}"

    def within(self, program: str) -> bytes:
        """Return the program with the change; its places are counted in bytes."""
        lines = program.encode().splitlines(keepends=True)
        first, last = self.node.lineno - 1, self.node.end_lineno - 1
        before, after = (
            lines[first][: self.node.col_offset],
            lines[last][self.node.end_col_offset :],
        )
        lines[first : last + 1] = [before + self.text.encode() + after]
        return b"".join(lines)


def mutants(program: str) -> Iterator[Mutant]:
    """Return all small changes of a program; what is text has none."""
    for node, line in parts(ast.parse(program)):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            yield Mutant(node.test, f"(not ({ast.unparse(node.test)}))", line)
        for other in others(node):
            text = ast.unparse(other)
            yield Mutant(node, f"({text})" if isinstance(node, ast.expr) else text, line)


def parts(node: ast.AST, line: int = 0, *, is_called: bool = False) -> Iterator[tuple[Any, int]]:
    """Return all parts of a program but text, each with the line of its statement in a function."""
    yield node, line
    inside = is_called or isinstance(node, FUNCTIONS)
    for child in ast.iter_child_nodes(node):
        begins = child.lineno if inside and isinstance(child, ast.stmt) else line
        if not isinstance(child, ast.JoinedStr):
            yield from parts(child, begins, is_called=inside)


def noting(program: str, place: Path) -> str:
    """Return the program with a note of its line before each statement of a function."""
    tree, blocks = ast.parse(program), dict[int, list[Any]]()
    functions = [node for node in ast.walk(tree) if isinstance(node, FUNCTIONS)]
    for node in itertools.chain.from_iterable(map(ast.walk, functions)):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            blocks |= {id(block): block} if isinstance(block, list) else {}
    for block in blocks.values():
        block[:] = [each for one in block for each in (ast.parse(f"_ran({one.lineno})"), one)]
    tree.body[1:1] = ast.parse(NOTING.format(place=str(place), width=WIDTH)).body
    return ast.unparse(tree)


def others(node: Any) -> Iterator[ast.AST]:
    """Return what may stand instead of an expression or a statement."""
    match node:
        case ast.Compare(ops=[operator, *rest]):
            yield ast.Compare(node.left, [OTHER[type(operator)](), *rest], node.comparators)
        case ast.BoolOp(op=operator) | ast.BinOp(op=operator) if type(operator) in OTHER:
            changed = copy.copy(node)
            changed.op = OTHER[type(operator)]()
            yield changed
        case ast.Constant(value=int(value)):
            yield ast.Constant(not value if isinstance(value, bool) else value + 1)
        case ast.UnaryOp(op=ast.Not()):
            yield node.operand
        case ast.Return(value=ast.expr()):
            yield ast.Return(ast.Constant(None))
        case ast.Raise() | ast.AugAssign() | ast.Expr(value=ast.Call() | ast.Await() | ast.Yield()):
            yield ast.Pass()


def section_of(text: str, line: int) -> str:
    """Return the section of a file that a line stands in."""
    titles = re.findall(r"^# ----- (.+)$", "\n".join(text.splitlines()[:line]), re.MULTILINE)
    return titles[-1] if titles else ""


class Run:
    """A run of some tests, in their order, or of a share of all, as pytest tells of it."""

    def __init__(self, place: Path, names: Sequence[str] = (), share: slice = slice(None)) -> None:
        self.place, self.names, self.share = place, names, share
        self.seconds: dict[str, float] = {}
        self.rows: Any = mmap.mmap(-1, WIDTH)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep what is asked for."""
        places = {name: place for place, name in enumerate(self.names)}
        if places:
            items[:] = [item for item in items if item.nodeid in places]
            items.sort(key=lambda item: places[item.nodeid])
        items[:] = items[self.share]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Any:
        """Say which test runs, and note how long."""
        (self.place / "present").write_text(item.nodeid)
        began, self.rows[:4] = time.monotonic(), (len(self.seconds) + 1).to_bytes(4, sys.byteorder)
        result = yield
        self.seconds[item.nodeid] = time.monotonic() - began
        return result

    def told(self) -> dict[str, tuple[float, list[int]]]:
        """Return how long each test took, and the lines that it has run; "" is what came before."""
        told = {}
        for row, (name, seconds) in enumerate([("", 0.0), *self.seconds.items()]):
            ran = self.rows[row * WIDTH : (row + 1) * WIDTH]
            told[name] = seconds, [line for line, byte in enumerate(ran) if byte]
        return told


class Told(NamedTuple):
    """How long a test took, and the lines that it ran."""

    seconds: float
    lines: set[int]


class Suite:
    """The tests of copies of the project, in which the ledger is changed: one for each process."""

    def __init__(self, folder: Path, options: Any) -> None:
        self.folder, self.options, self.program = folder, options, PROGRAM.read_text()
        self.end = time.monotonic() + options.seconds

    def place(self) -> Path:
        """Return the folder of this process, with its copy."""
        place = self.folder / str(os.getpid())
        if not place.exists():
            left = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", ".hypothesis", "*.db*")
            shutil.copytree(PROGRAM.parent, place / "copy", ignore=left)
        return place

    def run(self, program: str | bytes, run: Run, *options: str, learning: bool = False) -> str:
        """Test a program; return "" or the first test that fails or hangs, or why there is none."""
        seconds = self.options.seconds if learning else self.options.each
        patience = seconds if learning else 60.0
        changed, present = run.place / "copy" / "ledger.py", run.place / "present"
        later = changed.stat().st_mtime + 1  # What Python keeps of it is told apart by its second.
        changed.write_bytes(program if isinstance(program, bytes) else program.encode())
        os.utime(changed, (later, later))
        present.write_text(NO_START)
        fork, given = multiprocessing.get_context("fork"), (run, [*QUIETLY, *options])
        process = fork.Process(target=run_pytest, args=given)
        process.start()
        end = time.monotonic() + seconds
        while process.is_alive() and time.time() < present.stat().st_mtime + patience:
            process.join(1)
            if time.monotonic() > end:
                present.write_text(OUT_OF_TIME)
                break
        is_fine = process.exitcode in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
        with suppress(ProcessLookupError):  # With the servers that it has left.
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        return "" if is_fine else present.read_text()

    def seen_by(self, mutant: Mutant, names: Sequence[str]) -> str:
        """Return the test that sees a change, or nothing."""
        place = self.place()
        while names and time.monotonic() < self.end:
            failed = self.run(mutant.within(self.program), Run(place, names), "-x")
            if failed in ("", NO_START, OUT_OF_TIME):
                return failed
            if not self.run(self.program, Run(place, [failed])):
                return failed
            names = [name for name in names if name != failed]  # It fails on the ledger as it is.
        return OUT_OF_TIME if names else ""

    def learn(self, share: slice) -> dict[str, tuple[float, list[int]]]:
        """Run some of the tests; return how long each took, and the lines that it ran."""
        run = Run(self.place(), share=share)
        with (run.place / "rows").open("w+b") as file:
            file.truncate(ROWS * WIDTH)
            run.rows = mmap.mmap(file.fileno(), 0)
        program, only = noting(self.program, run.place / "rows"), ("-k", self.options.tests)
        self.run(program, run, *only, learning=True)
        told: dict[str, tuple[float, list[int]]] = json.loads((run.place / "told").read_text())
        return told


def run_pytest(run: Run, options: list[str]) -> None:
    """Run tests in a process of its own, which loads the ledger anew."""
    os.setsid()
    os.chdir(run.place / "copy")
    output = os.open(run.place / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for name in ("ledger", "test_ledger"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(run.place / "copy"))
    sys.dont_write_bytecode = False
    status = pytest.main(options, [run])
    (run.place / "told").write_text(json.dumps(run.told()))
    os._exit(status)


def kept_at(suite: Suite) -> Path:
    """Return the folder of what is known of this program and these tests."""
    given = hashlib.sha256((suite.program + TESTS.read_text()).encode()).hexdigest()[:16]
    above = suite.folder if suite.options.tests else Path(tempfile.gettempdir())
    (kept := above / f"ledger-mutants-{given}").mkdir(exist_ok=True)
    return kept


def learn(suite: Suite, pool: ProcessPoolExecutor) -> dict[str, Told]:
    """Run all tests once, unless it was done before."""
    count, kept = suite.options.at_once, kept_at(suite) / "told.json"
    if not kept.exists():
        tell("which tests run which lines? All run once.")
        shares = pool.map(suite.learn, [slice(first, None, count) for first in range(count)])
        kept.write_text(json.dumps(dict(ChainMap(*shares))))
    told = json.loads(kept.read_text())
    return {name: Told(seconds, {*lines}) for name, (seconds, lines) in told.items()}


def may_see(mutant: Mutant, told: Mapping[str, Told], near: set[str]) -> list[str]:
    """Return the tests that may see a change, the likeliest for their time first.

    Those are in its section, the first of many cases, and run what few others run just below it.
    """
    is_for_all = mutant.line in {0, *told[""].lines}  # It runs when the program is loaded.
    below = range(mutant.line or 1, mutant.line + 6)
    ran = {name: told[name].lines.intersection(below) for name in told if name}
    common, cases = Counter(line for lines in ran.values() for line in lines), Counter[str]()
    ranks: dict[str, tuple[bool, bool, float]] = {}
    for name in sorted(ran, key=lambda name: told[name].seconds):
        cases[test := name.split("[")[0]] += 1
        may, is_near = is_for_all or mutant.line in ran[name], test in near
        rarest = min([common[line] for line in ran[name]], default=len(ran)) / len(ran)
        seconds = told[name].seconds * cases[test] * rarest * (1 if is_near else 5)
        if may or is_near:
            ranks[name] = not may, "[postgresql" in name, seconds
    return sorted(ranks, key=ranks.__getitem__)


def run(folder: Path, options: Any) -> int:
    """Try the mutants that no earlier run has seen, and print the figures."""
    load_ledger(folder, None)
    importlib.import_module("test_ledger")  # And with it all that the tests need, once.
    suite, tests = Suite(folder, options), TESTS.read_text()
    found = [mutant for mutant in mutants(suite.program) if options.only in str(mutant)]
    dice = random.Random(options.seed)  # noqa: S311
    chosen = dice.sample(found, min(options.mutants, len(found)))
    kept = kept_at(suite) / "seen.json"
    seen: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    near = defaultdict[str, set[str]](set)
    for node in ast.parse(tests).body:
        near[section_of(tests, node.lineno)].add(f"{TESTS.name}::{getattr(node, 'name', '')}")
    with ProcessPoolExecutor(options.at_once, multiprocessing.get_context("fork")) as pool:
        told, trying = learn(suite, pool), {}
        for mutant in [mutant for mutant in chosen if str(mutant) not in seen]:
            section = section_of(suite.program, mutant.node.lineno)
            names = may_see(mutant, told, near[section])
            trying[pool.submit(suite.seen_by, mutant, names)] = str(mutant)
        for answer in as_completed(trying):
            is_seen = (by := answer.result()) not in ("", OUT_OF_TIME)
            print(f"{'seen' if is_seen else 'NOT SEEN':8}  {trying[answer]}  {by}", flush=True)
            seen |= {trying[answer]: by} if is_seen else {}
            kept.write_text(json.dumps(seen))
    count = sum(str(mutant) in seen for mutant in chosen)
    among = f"{len(chosen)} of {len(found):,} by the seed {options.seed}"
    print(f"mutants: {among}: {count} seen, {len(chosen) - count} not seen")
    return int(100 * count < options.least * len(chosen))


if __name__ == "__main__":
    bounds = {"mutants": 100, "least": 95, "each": 900.0, "at_once": 2}
    given = read_options(__doc__, only="", tests="", **bounds)
    with tempfile.TemporaryDirectory(prefix="ledger-mutants-") as place:
        sys.exit(run(Path(place), given))
