"""The card of what is shipped: base and its licence, task, scores with rows and interval, what was gained, how to load it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from tombola.cut import check_rows
from tombola.errors import TombolaError
from tombola.source import resolve_model
from tombola.stats import over_rows
from tombola.ticket import Ticket

LOADED_BY = {
    "hf": 'import tombola  # teaches transformers to load it\nmodel = transformers.{auto}.from_pretrained("THIS FOLDER")',
    "portable": 'model = transformers.{auto}.from_pretrained("THIS FOLDER")  # transformers alone',
    "onnx": 'session = onnxruntime.InferenceSession("THIS FOLDER/model.onnx")  # {inputs} → logits',
    "peft": 'adapters = tombola.Adapters.from_pretrained({{"name": "THIS FOLDER"}})  # more of them: one base\n'
    'adapters.set_adapter("name"); model = adapters.model',
}


def model_card(ticket: Ticket, model: nn.Module, to: str, gained: str, notes: Sequence[str] = ()) -> str:
    """The card as Markdown. model: of the class that is loaded; to: the target; gained: what a user has of it, in words."""
    base = ticket.base.name + (f" at {ticket.base.revision}" if ticket.base.revision else "")
    kept = ", ".join(f"{k:,} of {n:,} {name}" for name, (k, n) in ticket.mask.counts_by_type().items())
    rows = [
        f"| {m.get('what', '')} | {m['split']} | {m['metric']} | {m['value']:.4f} | {_interval(m)} | {m['n']} |"
        for m in ticket.metrics
    ]
    head = ["", "| model | split | metric | value | 95 % interval over rows | rows |", "| --- | --- | --- | --- | --- | --- |"]
    table = [*head, *rows] if rows else []
    how = LOADED_BY[to].format(auto=auto_class(model).__name__, inputs=", ".join(check_rows(model)))
    licence = _licence(ticket)
    on_hub = (
        "/" in ticket.base.name and not Path(ticket.base.name).exists()
    )  # a folder of this machine says nothing anywhere else
    return "\n".join(
        [
            "---",
            "library_name: tombola",
            "tags: [lottery-ticket, pruning]",
            *([f"base_model: {ticket.base.name}"] if on_hub else []),
            *([f"license: {licence}"] if licence else []),
            "---",
            f"# {base}, without what a ticket removes" + (f", for {ticket.task}" if ticket.task else ""),
            "",
            f"A {ticket.kind} ticket keeps {kept}: sparsity {ticket.sparsity:.4f} of the maskable values ({ticket.scope}).",
            f"Gained, as `{to}`: {gained}.",
            *notes,
            f"Licence of the base: {licence or 'not said where the base lies; look it up before you share this'}.",
            "",
            "Full: the model that the ticket was found on, without a mask; pruned: under its mask, nothing trained after. The",
            "mask was chosen on selection rows. What is shipped with other weights has other scores.",
            *table,
            "",
            "```python",
            how,
            "```",
            "",
        ]
    )


def _interval(metric: Mapping[str, Any]) -> str:
    """As measured with the score; of an accuracy else Wilson's; of others none is known from value and n alone."""
    low, high = metric.get("low"), metric.get("high")
    if low is None and metric["metric"] == "accuracy" and metric["n"]:
        found = over_rows(round(metric["value"] * metric["n"]), metric["n"])
        low, high = found.low, found.high
    return "not known" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def _licence(ticket: Ticket) -> str | None:
    """What the model card of the base says, where it lies on this machine; None when it says nothing."""
    import yaml  # type: ignore[import-untyped]

    try:
        card = resolve_model(ticket.base.name, ticket.base.revision).folder / "README.md"
        head = card.read_text(encoding="utf-8").removeprefix("---").partition("\n---")[0]
        said = yaml.safe_load(head)
    except (TombolaError, OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    found = said.get("license") if isinstance(said, dict) else None
    return found if isinstance(found, str) and found.replace("-", "").replace(".", "").isalnum() else None


def auto_class(model: nn.Module) -> Any:
    """The Auto class that knows this model: by the last part of its class name."""
    import transformers

    kinds = ("ForSequenceClassification", "ForCausalLM", "ForImageClassification", "ForTokenClassification", "ForMaskedLM")
    name = type(model).__name__
    found = next((kind for kind in kinds if name.endswith(kind)), "ForCausalLM" if name.endswith("LMHeadModel") else "")
    return getattr(transformers, f"AutoModel{found}")
