"""The doctor: what it finds is true, and what is broken is said with exit code 2."""

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import pytest

from tombola import doctor
from tombola.cli import main


def run(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["tombola", *words])
    try:
        main()
    except SystemExit as left:
        return int(left.code or 0)
    return 0


def test_everything_is_good_here_and_versions_are_true(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "doctor", "--json") == 0
    found = {one["what"]: one for one in json.loads(capsys.readouterr().out)}
    assert all(one["good"] for one in found.values())
    assert found["transformers"]["said"] == version("transformers")
    assert "4 heads" in found["self-test: anatomy"]["said"]


@pytest.mark.parametrize("broken", ["ablate", "hold"])
def test_a_model_that_gates_or_holding_do_not_reach_fails_the_self_test(
    broken: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Nothing:
        def __init__(self, *_: Any) -> None: ...
        def __enter__(self) -> "Nothing":
            return self

        def __exit__(self, *_: Any) -> None: ...

    monkeypatch.setattr(f"tombola.gates.{broken}", Nothing)
    assert run(monkeypatch, "doctor") == 2
    told = capsys.readouterr()
    assert "BAD" in told.out and "not good" in told.err and "Traceback" not in told.err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[[str], str] = doctor.importlib.metadata.version

    def without_scipy(name: str) -> str:
        if name == "scipy":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(doctor.importlib.metadata, "version", without_scipy)
    assert [one.what for one in doctor._packages() if not one.good] == ["scipy"]
