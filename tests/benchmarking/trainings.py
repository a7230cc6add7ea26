"""What the processes of the tests run: no training at all, but turns as in one."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarking.made_up import FACTS


@dataclass(frozen=True)
class Turns:
    """Notes every turn in a file, and goes wrong in a step if it is told so."""

    name: str
    file: Path
    fails_in: int = -1
    how: str = ""

    def __call__(self, baton):
        baton.imports_done()
        baton.ready(lambda: FACTS)
        for step in range(100):
            baton.wait(8, 30 + step)
            if step == self.fails_in:
                getattr(self, self.how)()
            with self.file.open("a") as file:
                file.write(f"{self.name} begins\n{self.name} ends\n")

    def raises(self):
        raise ZeroDivisionError("the training has a mistake")

    def needs_too_much(self):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    def is_killed(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def exits(self):
        os._exit(3)

    def ends_with_status_2(self):
        raise SystemExit(2)


def ends_at_once(baton):
    baton.ready(lambda: FACTS)
