"""How long a process takes that only imports tombola, or shows its help."""

import subprocess
import sys
import time
from statistics import median

from measure import Figure, Setup

COMMANDS = {
    "python": "pass",
    "import tombola": "import tombola",
    "tombola --help": "import sys; sys.argv = ['tombola', '--help']; from tombola.cli import main; main()",
}


def start_up(setup: Setup, task: str) -> list[Figure]:
    """Whole processes, in turns. Asserts that neither torch nor transformers is imported."""
    seconds: dict[str, list[float]] = {command: [] for command in COMMANDS}
    for _ in range(setup.rounds):
        for command, code in COMMANDS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
            seconds[command].append(time.perf_counter() - start)
    bare, figures = seconds.pop("python"), []
    for command, some in seconds.items():
        modules = _imported(COMMANDS[command])
        heavy = {"torch", "transformers"} & modules
        assert not heavy, f"{command} imports {heavy}"
        note = f"seconds, × bare python; {median(some):.2f} s, {len(modules)} modules, neither torch nor transformers"
        figures.append(Figure("import", task, command, [x / y for x, y in zip(some, bare, strict=True)], note))
    return figures


def _imported(code: str) -> set[str]:
    """Every module that a process imports, by the interpreter's own report on stderr ("import time: … | … | name")."""
    report = subprocess.run([sys.executable, "-X", "importtime", "-c", code], check=True, capture_output=True, text=True).stderr
    return {line.rsplit("|", 1)[1].strip() for line in report.splitlines()[1:] if line.startswith("import time:")}
