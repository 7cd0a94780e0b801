"""Let a server's disk fail and be slow in many ways, under load, and compare the books.

Whatever happens, what was answered is there: in the books of the server, which serves again as soon
as the disk is well, and on the disk if the power is cut, where all that was written before a sync
that failed is lost for ever, as Linux may lose it. What was refused is sent again with its key.
"""

import errno
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from crash import FIRST_ACCOUNTS, Story, differences, load, move_cash, open_all, stored_balances
from powercut import Disk, read_log
from proof import (
    load_ledger,
    look,
    read_options,
    ready,
    run_watched,
    send_again,
    set_faults,
    watch,
)

SYNC, WRITE, SHORT = 1, 2, -1
ALWAYS, FOR_A_WHILE = -1, -2  # Until nobody calls any more, or half of the time is over.
# What fails, with which error, and how often, and how many milliseconds it takes.
CASES = {
    "a sync fails": (SYNC, errno.EIO, 1, 0),
    "syncs fail for a while": (SYNC, errno.EIO, FOR_A_WHILE, 0),
    "syncs fail": (SYNC, errno.EIO, ALWAYS, 0),
    "a write fails": (WRITE, errno.EIO, 1, 0),
    "writes fail for a while": (WRITE, errno.EIO, FOR_A_WHILE, 0),
    "writes fail": (WRITE, errno.EIO, ALWAYS, 0),
    "the disk is full for a while": (WRITE, errno.ENOSPC, FOR_A_WHILE, 0),
    "the disk is full": (WRITE, errno.ENOSPC, ALWAYS, 0),
    "a write is short": (WRITE, SHORT, 1, 0),
    "writes are short": (WRITE, SHORT, ALWAYS, 0),
    "syncs take 20 ms": (SYNC, 0, ALWAYS, 20),
    "syncs take 1 s": (SYNC, 0, 3, 1_000),
    "a sync takes 30 s": (SYNC, 0, 1, 30_000),
}
MEANINGS = {0: "without an answer", 200: "done", 400: "refused", 503: "503", 507: "507"}


class Watched:
    """A server, its disk as it is recorded, and what a power cut would leave of that."""

    def __init__(self, ledger: Any, folder: Path, dice: random.Random) -> None:
        self.ledger, self.folder, self.dice = ledger, folder, dice
        self.inside, self.disk, self.done = watch(folder), Disk(), 0
        self.url = f"sqlite:///{self.inside}/ledger.db"
        self.running, _ = ready(ledger, folder, self.url)

    def losses(self, story: Story) -> list[str]:
        """Return what would be wrong, or lost of what was answered, after a kill or a power cut."""
        image, wrong = self.folder / "image", []
        for what in ("kill", "power cut"):
            os.kill(self.running.process.pid, signal.SIGSTOP)
            records, self.done = read_log(self.folder / "log", self.done)
            for record in records:
                self.disk.do(record)
            self.disk.cut(str(self.inside), image, self.dice)
            for name in ("ledger.db", "ledger.db-wal") if what == "kill" else ():
                shutil.copy(self.inside / name, image)
            os.kill(self.running.process.pid, signal.SIGCONT)
            found, known, _ = look(self.ledger, f"sqlite:///{image}/ledger.db", make=True)
            shutil.rmtree(image)
            wrong += found
            for request in story.requests:
                answer = known.get(request.key)
                if request.status and request.method != "GET" and answer != request.answer.decode():
                    wrong.append(f"{request.path} was answered, and lost by a {what}")
                if not request.status and answer and b"nothing was done" in request.refusal:
                    wrong.append(f"{request.path}: nothing was done, but it was, after a {what}")
        return wrong


def play(case: str, story: Story, watched: Watched, options: Any) -> list[str]:
    """Let the disk fail in one way; print what callers saw, and return what was wrong."""
    calls, error, count, ms = CASES[case]
    story.requests = []
    set_faults(watched.folder, calls, error, max(count, ALWAYS), min(ms, options.slowest))
    with load([watched.running], story):
        time.sleep(options.each / 2)
        if count == FOR_A_WHILE:
            set_faults(watched.folder)
        time.sleep(options.each / 2)
    wrong = watched.losses(story)
    tries = [each for request in story.requests for each in request.tries]
    set_faults(watched.folder)
    began = time.monotonic()
    story.requests.insert(0, next(move_cash(story)))
    send_again(watched.running.server, story.requests[:1])
    resumed = time.monotonic() - began
    send_again(watched.running.server, story.requests)
    wrong += differences(watched.ledger, watched.url, watched.running.server, story)
    wrong += watched.losses(story)
    statuses = Counter(status - status % 100 if status < 500 else status for status, _ in tries)
    seen = ", ".join(f"{n:,} {MEANINGS.get(each, each)}" for each, n in sorted(statuses.items()))
    slowest = max(seconds for _, seconds in tries)
    print(f"{case:29} {seen}; slowest {slowest:.2f} s, well after {resumed:.2f} s")
    print(*wrong[:5], sep="\n", end="\n" if wrong else "", flush=True)
    return wrong


def run(folder: Path, options: Any) -> int:
    """Play all cases, and print the figures."""
    os.environ["PRELOAD_ACCOUNTS"] = FIRST_ACCOUNTS
    end, ledger = time.monotonic() + options.seconds, load_ledger(folder, options.broken)
    dice, counts = random.Random(options.seed), Counter[str]()  # noqa: S311
    story, watched = Story(dice), Watched(ledger, folder / "disk", dice)
    try:
        open_all(watched.running.server, story)
        story.balances = stored_balances(ledger, watched.url)
        for case in dice.sample([*CASES], min(options.cases, len(CASES))):
            if time.monotonic() < end and not counts["wrong"]:
                counts.update(cases=1, wrong=len(play(case, story, watched, options)))
                again = sum(len(request.tries) > 1 for request in story.requests)
                counts.update(requests=len(story.requests), again=again)
    finally:
        watched.running.stop()
    print(
        f"disk: {counts['cases']} of {len(CASES)} cases, {counts['requests']:,} requests, "
        f"{counts['again']:,} sent again; {counts['wrong']} wrong"
    )
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(run_watched(run, read_options(__doc__, cases=99, each=2.0, slowest=30_000)))
