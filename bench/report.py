"""Run cases in turn, and print what was measured."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isnan
from statistics import median

from harness import Load

CEILING = "the ceiling"
Case = Callable[[], Load]


class Rounds:
    """Hold the runs of several cases that took turns, because the machine drifts."""

    def __init__(self, cases: Mapping[str, Case], rounds: int) -> None:
        """Run every case once a round, and once before, which warms it up and is not counted."""
        turns = [[case() for case in cases.values()] for _ in range(rounds + 1)][1:]
        self.loads = dict(zip(cases, zip(*turns, strict=True), strict=True))

    def figures(self, name: str, figure: str) -> list[float]:
        """Return one figure of a case, for each round."""
        return [float(getattr(load, figure)) for load in self.loads[name]]

    def median(self, name: str, figure: str) -> float:
        """Return the median of one figure of a case."""
        return median(self.figures(name, figure))

    def ratio(self, name: str, base: str, figure: str = "rate_per_second") -> float:
        """Return the median of the ratios that two cases had in each round."""
        pairs = zip(self.figures(name, figure), self.figures(base, figure), strict=True)
        return median(value / other for value, other in pairs)


class Report:
    """Collect what is printed at the end: what was measured, and what was aimed at."""

    def __init__(self) -> None:
        """Start with the two headers alone."""
        self.measured = [("measured in turn", "rate", "of the ceiling", "CPU", "p50", "p99")]
        self.targets = [("target", "measured", "must", "aim", "met")]

    def add(self, what: str, rounds: Rounds) -> None:
        """Add a row for each case, below one that says what they have in common."""
        self.measured.append((f"**{what}**", "", "", "", "", ""))
        for name in rounds.loads:
            row = (
                f"{rounds.median(name, 'rate_per_second'):,.0f} /s",
                f"{rounds.ratio(name, CEILING):.2f}" if CEILING in rounds.loads else "",
                with_unit(rounds.median(name, "cpu_us"), ".0f", "µs"),
                with_unit(rounds.median(name, "p50_ms"), ".2f", "ms"),
                with_unit(rounds.median(name, "p99_ms"), ".2f", "ms"),
            )
            self.measured.append((name, *row))

    def at_least(self, name: str, value: float, must: float, aim: float | None = None) -> None:
        """Add a figure that should be high."""
        self._judge(name, value, f">= {must:.2f}", aim, value >= must)

    def at_most(self, name: str, value: float, must: float, aim: float | None = None) -> None:
        """Add a figure that should be low."""
        self._judge(name, value, f"<= {must:.2f}", aim, value <= must)

    def show(self, name: str, value: float) -> None:
        """Add a figure that nothing was aimed at for."""
        self.targets.append((name, with_unit(value, ".2f"), "", "", ""))

    def _judge(self, name: str, value: float, must: str, aim: float | None, met: bool) -> None:
        verdict = "" if isnan(value) else "yes" if met else "NO"
        aimed = "" if aim is None else f"{aim:.2f}"
        self.targets.append((name, with_unit(value, ".2f"), must, aimed, verdict))

    def text(self) -> str:
        """Return both tables as Markdown."""
        return f"{markdown(self.measured)}\n\n{markdown(self.targets)}"


def with_unit(value: float, form: str, unit: str = "") -> str:
    """Return a figure with its unit, and nothing where it could not be measured."""
    return "" if isnan(value) else f"{value:{form}} {unit}".rstrip()


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as an aligned table, the first one as its header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [rows[0], ["-" * width for width in widths], *rows[1:]]
    return "\n".join(markdown_line(line, widths) for line in lines)


def markdown_line(cells: Iterable[str], widths: list[int]) -> str:
    """Return one line of a table, with its cells padded to the widths."""
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    return f"| {' | '.join(padded)} |"
