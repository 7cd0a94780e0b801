"""Change a little in the ledger, one place at a time, and tell whether the suite sees it.

The places are taken at random, by a seed, from all that is not text: comparisons, conditions,
arithmetic, numbers, and statements that are left out. The tests of the same section run first, and
then all. A test that fails must pass again on the ledger as it is, or it says nothing.
"""

import ast
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from bisect import bisect
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import PROGRAM
from proof import load_ledger, read_options

OTHER_OPERATOR: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in", ast.And: "or",
    ast.Or: "and", ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Mod: "*",
}  # fmt: skip


# Some modules are there already, which pytest would like to have loaded itself.
QUIETLY = ["-q", "-x", "--tb=no", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


class Mutant(NamedTuple):
    """What stands in the program between two places, and what is written instead."""

    start: int
    end: int
    text: str


class Source:
    """A program's text, whose places are counted in bytes as Python's parser does."""

    def __init__(self, text: str) -> None:
        """Note where each line begins."""
        self.text = text.encode()
        self.lines = [0, *(found.end() for found in re.finditer(b"\n", self.text))]

    def start(self, node: ast.expr | ast.stmt) -> int:
        """Return where something begins."""
        return self.lines[node.lineno - 1] + node.col_offset

    def end(self, node: ast.expr | ast.stmt) -> int:
        """Return where something ends."""
        return self.lines[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)

    def cut(self, node: ast.expr) -> str:
        """Return the text of something."""
        return self.text[self.start(node) : self.end(node)].decode()

    def mutants(self, node: ast.AST) -> Iterator[Mutant]:
        """Return all small changes of a part of the program; what is text has none."""
        if isinstance(node, ast.JoinedStr):
            return
        if isinstance(node, ast.Compare):
            yield from self.between([node.left, *node.comparators], node.ops)
        elif isinstance(node, ast.BoolOp):
            yield from self.between(node.values, [node.op] * len(node.values))
        elif isinstance(node, ast.BinOp):
            yield from self.between([node.left, node.right], [node.op])
        elif isinstance(node, ast.expr | ast.stmt):
            yield from self.instead(node)
        for child in ast.iter_child_nodes(node):
            yield from self.mutants(child)

    def between(self, operands: list[ast.expr], operators: Sequence[ast.AST]) -> Iterator[Mutant]:
        """Return the other operators between operands."""
        for (left, right), operator in zip(pairwise(operands), operators, strict=False):
            start, end = self.end(left), self.start(right)
            # Brackets and comments may stand there, too.
            between = self.text[start:end].decode()
            if re.fullmatch(r"[^()\n#]+", between) and type(operator) in OTHER_OPERATOR:
                yield Mutant(start, end, f" {OTHER_OPERATOR[type(operator)]} ")

    def instead(self, node: ast.expr | ast.stmt) -> Iterator[Mutant]:
        """Return what may stand instead of an expression or a statement."""
        text = ""
        if isinstance(node, ast.Constant) and isinstance(node.value, bool | int):
            text = repr(not node.value if isinstance(node.value, bool) else node.value + 1)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            text = self.cut(node.operand)
        elif isinstance(node, ast.If | ast.IfExp | ast.While):
            yield Mutant(
                self.start(node.test), self.end(node.test), f"(not ({self.cut(node.test)}))"
            )
        elif isinstance(node, ast.Raise | ast.AugAssign) or (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Call | ast.Await | ast.Yield)
        ):
            text = "pass"
        elif isinstance(node, ast.Return) and node.value:
            text = "return None"
        if text:
            yield Mutant(self.start(node), self.end(node), text)

    def changed(self, mutant: Mutant) -> bytes:
        """Return the program with a change."""
        return self.text[: mutant.start] + mutant.text.encode() + self.text[mutant.end :]

    def shown(self, mutant: Mutant) -> str:
        """Return a change as its line, what stood there, and what stands there."""
        old = " ".join(self.text[mutant.start : mutant.end].decode().split())
        return f"line {bisect(self.lines, mutant.start)}: {old[:60]} -> {mutant.text[:60]}"


def sections(text: str) -> list[tuple[int, str]]:
    """Return where each section of a program begins, as a line, and its title."""
    found = re.finditer(r"^# ----- (.+)$", text, re.MULTILINE)
    return [(text.count("\n", 0, each.start()) + 1, each[1]) for each in found]


def section_of(text: str, line: int) -> str:
    """Return the section that a line stands in."""
    return next((title for start, title in reversed(sections(text)) if start <= line), "")


def tests_of(text: str, section: str) -> list[str]:
    """Return the tests in a section of the suite."""
    tests = [
        node.name
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and section_of(text, node.lineno) == section
    ]
    return [f"test_ledger.py::{name}" for name in tests]


class Suite:
    """A copy of the project, whose ledger is changed and tested."""

    def __init__(self, folder: Path, seconds: float) -> None:
        """Copy what the tests look at."""
        self.folder, self.seconds = folder / "copy", seconds
        left = shutil.ignore_patterns(".git", ".*_cache", "__pycache__", ".hypothesis", "*.db*")
        shutil.copytree(PROGRAM.parent, self.folder, ignore=left)

    def run(self, program: bytes, *options: str) -> str:
        """Test a program; return the first test that fails, "" for none, or that time is over."""
        (self.folder / "ledger.py").write_bytes(program)
        said = self.folder.with_name("said")
        given = (self.folder, said, [*QUIETLY, *options])
        process = multiprocessing.get_context("fork").Process(target=run_pytest, args=given)
        process.start()
        process.join(self.seconds)
        is_over = process.exitcode is None
        if process.pid:
            try:
                os.killpg(process.pid, signal.SIGKILL)  # With the servers that it has left.
            except ProcessLookupError:
                is_over = False
        process.join()
        if is_over:
            return "no end"
        found = re.search(r"^(?:FAILED|ERROR) (\S+)", said.read_text(), re.MULTILINE)
        return found[1] if found else "" if process.exitcode == 0 else "no start"


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


def seen_by(suite: Suite, source: Source, mutant: Mutant, runs: list[list[str]]) -> str:
    """Return the test that sees a change in one of some runs of the suite, or nothing."""
    for options in runs:
        failed = suite.run(source.changed(mutant), *options)
        # On a busy machine a test may fail for no reason.
        again = [failed] if "::" in failed else ["--collect-only"]
        if failed == "no end" or (failed and not suite.run(source.text, "-n", "0", *again)):
            return failed
    return ""


def main() -> int:
    """Read the options and run."""
    options = read_options(
        __doc__, mutants=100, section="", only="", nearby=False, least=95, each=900.0
    )
    end, text = time.monotonic() + options.seconds, PROGRAM.read_text()
    source, suite_text = Source(text), PROGRAM.with_name("test_ledger.py").read_text()
    all_mutants = [
        mutant
        for mutant in source.mutants(ast.parse(text))
        if options.section in ("", section_of(text, bisect(source.lines, mutant.start)))
        and options.only in source.shown(mutant)
    ]
    count = min(options.mutants, len(all_mutants))
    chosen = random.Random(options.seed).sample(all_mutants, count)  # noqa: S311
    tried, seen = 0, 0
    with tempfile.TemporaryDirectory(prefix="ledger-mutants-") as name:
        load_ledger(Path(name), None)  # And with it all that the tests need, once.
        suite = Suite(Path(name), options.each)
        for mutant in chosen:
            if time.monotonic() > end:
                break
            section = section_of(text, bisect(source.lines, mutant.start))
            runs = [["-n", "0", *tests_of(suite_text, section)], ["-n", "3"]]
            by = seen_by(suite, source, mutant, runs[: 1 if options.nearby else 2])
            tried, seen = tried + 1, seen + bool(by)
            print(f"{'seen' if by else 'NOT SEEN':8}  {source.shown(mutant)}  {by}", flush=True)
    print(
        f"mutants: {tried} of {len(all_mutants):,} by the seed {options.seed}: "
        f"{seen} seen, {tried - seen} not seen"
    )
    return int(100 * seen < options.least * tried)


if __name__ == "__main__":
    sys.exit(main())
