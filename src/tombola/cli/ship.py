"""What a ticket becomes for others: ship."""

from pathlib import Path
from typing import Annotated

import typer

from tombola.cli.options import STORE, DataOption, JsonOption, StoreOption, TicketArgument, make_lab
from tombola.terminal import megabytes, print_json, print_table, say


def ship(
    ticket: TicketArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write: new, or empty.")],
    *,
    to: Annotated[str, typer.Option(help="hf, portable, onnx or peft; docs/ship.md says what each is good for.")] = "hf",
    weights: Annotated[str, typer.Option(help="found_on, base, or a folder, such as the retrained weights.")] = "found_on",
    groups: Annotated[
        str, typer.Option(help="refuse or fill: what to do where heads that share keys and values cannot be cut evenly.")
    ] = "refuse",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="hf: also write the loader, for trust_remote_code without tombola.")
    ] = False,
    store: StoreOption = STORE,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a ticket's model as files for others, smaller where it can be, proved equal to the masked model, or not at all."""
    from tombola.errors import SettingsError, TombolaError
    from tombola.export import foretell, refuse
    from tombola.export import ship as write
    from tombola.study.jobs import read_ticket

    if groups not in ("refuse", "fill"):
        raise SettingsError([TombolaError("unknown way with groups", got=groups, expected="refuse or fill")])
    refuse(out, to, with_code)
    taken = read_ticket(make_lab(store, data), ticket)
    if (said := foretell(taken, to)) is not None:
        say(said)
    shipped = write(taken, out, to, weights, groups=groups, code=with_code)  # type: ignore[arg-type]
    if as_json:
        print_json(shipped.as_json())
        return
    rows = [
        (name, f"{one.parameters:,}", megabytes(one.bytes), f"{one.flops:,}")
        for name, one in (("dense", shipped.dense), (to, shipped.small))
    ]
    print_table(f"{out}", ("", "parameters", "weights on disk", "operations, a row"), rows)
    print(shipped.in_words())
    for note in shipped.notes:
        print(note)
