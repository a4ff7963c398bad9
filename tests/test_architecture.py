"""The plan of the house holds: who imports whom, cheap import, quick help, no pickles, no loose ends in the tables."""

import ast
import subprocess
import sys
from pathlib import Path

import tombola

SOURCE = Path(tombola.__file__).parent

# Rooms from the top of the house to the ground. A room may import rooms below it and its own, never one above.
LEVELS = (
    ("cli", "terminal", "report", "doctor"),
    ("study",),
    ("search", "attention"),
    ("landscape",),
    ("small_lm",),
    ("train", "order", "callback", "checkpoint", "evaluate"),
    ("tasks", "bias", "losses", "joint"),
    ("timing",),
    ("hub",),
    ("export",),
    ("portable", "adapter", "pruned4", "card"),
    ("cut", "tuned"),
    ("prune", "criteria", "scores", "gates"),
    ("held", "lesion", "legacy"),
    ("ticket",),
    ("source",),
    ("scope", "objective", "gguf"),
    ("anatomy", "levels"),
    ("mask",),
    ("stats", "store"),
    ("locks",),
    ("disk", "canonical"),
    ("autoload",),
    ("shrunk",),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def imports(file: Path) -> set[str]:
    """Rooms of tombola that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module] + ([f"tombola.{a.name}" for a in node.names] if node.module == "tombola" else [])
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("tombola.")}
    return found - {"__version__", "_version"}


def room_of(file: Path) -> str:
    parts = file.relative_to(SOURCE).parts
    return parts[0].removesuffix(".py")


def test_imports_go_one_way_only() -> None:
    upward = []
    for file in SOURCE.rglob("*.py"):
        room = room_of(file)
        if room in ("__init__", "__main__", "_version"):
            continue
        upward += [f"{file.relative_to(SOURCE)} imports {other}" for other in imports(file) if LEVEL[other] < LEVEL[room]]
        # report draws what study hands it, and the command line calls it: side by side, but never the other way
        upward += [f"{file.name} imports cli" for other in imports(file) if other == "cli" and room != "cli"]
    assert upward == []


def test_every_room_has_its_level() -> None:
    rooms = {room_of(file) for file in SOURCE.rglob("*.py")} - {"__init__", "__main__", "_version"}
    assert rooms == LEVEL.keys()


def test_only_study_and_the_command_line_know_the_store() -> None:
    knowing = {room_of(file) for file in SOURCE.rglob("*.py") if "store" in imports(file)}
    assert knowing <= {"study", "cli"}


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after running `code`."""
    ran = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return set(ran.stdout.split())


def test_importing_tombola_loads_neither_torch_nor_transformers() -> None:
    assert not loaded_by("import tombola") & {"torch", "transformers", "numpy", "pydantic", "scipy"}


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = """
import sys
from tombola.cli import app
sys.stdout = sys.stderr
for verb in (["find"], ["study", "run"]):
    try: app([*verb, "--help"])
    except SystemExit: pass
sys.stdout = sys.__stdout__"""
    assert not loaded_by(code) & {"torch", "transformers", "numpy", "scipy"}


def test_every_public_name_exists_and_is_listed_once() -> None:
    assert sorted(tombola.__all__) == sorted({*tombola._ROOMS, "__version__"})
    for name in tombola.__all__:
        assert getattr(tombola, name) is not None


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    try:
        tombola.nothing_of_the_kind  # noqa: B018
    except AttributeError as error:
        assert "nothing_of_the_kind" in str(error)
    else:
        raise AssertionError("no AttributeError")


def test_nothing_in_the_package_can_unpickle_or_run_code_from_a_folder() -> None:
    forbidden = ("import pickle", "pickle.load", "weights_only=False", "trust_remote_code=True", "eval(", "exec(")
    found = [
        (f.name, word)
        for f in SOURCE.rglob("*.py")
        for word in forbidden
        if word in f.read_text(encoding="utf-8").replace(".eval(", "")
    ]
    assert found == []
