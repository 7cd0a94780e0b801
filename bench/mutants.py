"""Change a little in the ledger, one place at a time, and tell whether the suite sees it.

The places are taken at random, by a seed, from all that is not text: comparisons, conditions,
arithmetic, numbers, and statements that are left out. The tests of the same section run first, and
then all. A test that fails must pass again on the ledger as it is, or it says nothing.
"""

import ast
import copy
import importlib
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from harness import PROGRAM
from proof import load_ledger, read_options

OTHER: dict[Any, Any] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.And: ast.Or, ast.Or: ast.And, ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
}  # fmt: skip
# What a failure shows is read by nobody, and to prepare for it takes longer than most tests.
QUIETLY = ["-q", "-x", "--tb=no", "--assert=plain"]


class Mutant(NamedTuple):
    """A part of the program, and what is written instead of it."""

    node: Any
    text: str

    def __str__(self) -> str:
        return f"line {self.node.lineno}: {ast.unparse(self.node)[:60]} -> {self.text[:60]}"

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


def mutants(node: ast.AST) -> Iterator[Mutant]:
    """Return all small changes of a part of the program; what is text has none."""
    if isinstance(node, ast.JoinedStr):
        return
    if isinstance(node, ast.If | ast.IfExp | ast.While):
        yield Mutant(node.test, f"(not ({ast.unparse(node.test)}))")
    for other in others(node):
        text = ast.unparse(other)
        yield Mutant(node, f"({text})" if isinstance(node, ast.expr) else text)
    for child in ast.iter_child_nodes(node):
        yield from mutants(child)


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


class Suite:
    """A copy of the project, whose ledger is changed and tested."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder, self.seconds, self.program = folder / "copy", seconds, PROGRAM.read_text()
        left = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", ".hypothesis", "*.db*")
        shutil.copytree(PROGRAM.parent, self.folder, ignore=left)
        text = PROGRAM.with_name("test_ledger.py").read_text()
        self.sections, self.left_out = defaultdict[str, list[str]](list), list[str]()
        for node in ast.parse(text).body:
            if (name := getattr(node, "name", "")).startswith("test_"):
                self.sections[section_of(text, node.lineno)].append(f"test_ledger.py::{name}")

    def run(self, program: bytes, *options: str) -> str:
        """Test a program; return the first test that fails, "" for none, or that time is over."""
        (self.folder / "ledger.py").write_bytes(program)
        given = (self.folder, said := self.folder.with_name("said"), [*QUIETLY, *options])
        process = multiprocessing.get_context("fork").Process(target=run_pytest, args=given)
        process.start()
        process.join(self.seconds)
        is_over = process.exitcode is None
        with suppress(ProcessLookupError):  # With the servers that it has left.
            os.killpg(process.pid or 0, signal.SIGKILL)
        process.join()
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", said.read_text(), re.MULTILINE)
        if is_over or not process.exitcode:
            return "no end" if is_over else ""
        return found[1] if found else "no start"

    def seen_by(self, mutant: Mutant, *, nearby: bool) -> str:
        """Return the test that sees a change, or nothing."""
        section = section_of(self.program, mutant.node.lineno)
        runs = [["-n", "0", *self.sections[section]], ["-n", "3"]]
        for options in runs[: 1 if nearby else 2]:
            while failed := self.run(mutant.within(self.program), *options, *self.left_out):
                again = ["-n", "0", failed if "::" in failed else "--collect-only"]
                if failed == "no end" or not self.run(self.program.encode(), *again):
                    return failed
                self.left_out.append(f"--deselect={failed}")  # It fails on the ledger as it is.
        return ""


def run_pytest(folder: Path, said: Path, options: list[str]) -> None:
    """Run tests in a process of its own, which loads the ledger anew."""
    os.setsid()
    os.chdir(folder)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    for name in ("ledger", "test_ledger"):
        sys.modules.pop(name, None)
    sys.path.insert(0, str(folder))
    os._exit(pytest.main(options))


def run(folder: Path, options: Any) -> int:
    """Try the mutants, and print the figures."""
    load_ledger(folder, None)
    importlib.import_module("test_ledger")  # And with it all that the tests need, once.
    suite, end, tried, seen = Suite(folder, options.each), time.monotonic() + options.seconds, 0, 0
    found = [
        mutant
        for mutant in mutants(ast.parse(suite.program))
        if options.only in str(mutant)
        and options.section in ("", section_of(suite.program, mutant.node.lineno))
    ]
    dice = random.Random(options.seed)  # noqa: S311
    for mutant in dice.sample(found, min(options.mutants, len(found))):
        if time.monotonic() < end:
            by = suite.seen_by(mutant, nearby=options.nearby)
            tried, seen = tried + 1, seen + bool(by)
            print(f"{'seen' if by else 'NOT SEEN':8}  {mutant}  {by}", flush=True)
    among = f"{tried} of {len(found):,} by the seed {options.seed}"
    print(f"mutants: {among}: {seen} seen, {tried - seen} not seen")
    return int(100 * seen < options.least * tried)


if __name__ == "__main__":
    bounds = {"mutants": 100, "least": 95, "each": 900.0}
    given = read_options(__doc__, section="", only="", nearby=False, **bounds)
    with tempfile.TemporaryDirectory(prefix="ledger-mutants-") as place:
        sys.exit(run(Path(place), given))
