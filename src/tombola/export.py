"""A ticket and its weights → files that others load: a shrunk model, a plain one, ONNX, or an adapter. See `docs/ship.md`.

Everything is written into a temporary folder beside its place, loaded from there again and compared with the masked model; one
rename publishes it. What does not compute the same, or cannot be written whole, leaves nothing.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tombola.adapter import Adapter, Adapters
from tombola.anatomy import Anatomy, Layout
from tombola.card import auto_class, model_card
from tombola.cut import Groups, Parity, check_rows, outputs_of, parity, prove_same, shrink
from tombola.errors import MaskError, SettingsError, TombolaError
from tombola.gates import load
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.portable import portable
from tombola.shrunk import MODEL_TYPE, carry_code
from tombola.source import resolve_model
from tombola.ticket import Ticket, locate_weights
from tombola.tuned import fold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ONNX_NAME = "model.onnx"
# What besides weights and config a model is used with: copied as it is. Names, not patterns that a folder could choose.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.txt", "vocab.json", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("preprocessor_config.json", "image_processor_config.json", "generation_config.json"),
)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model costs: values it has, bytes of its weights on disk, operations for one row of `LENGTH` tokens."""

    parameters: int
    bytes: int
    flops: int


@dataclass(frozen=True, slots=True)
class Shipped:
    """What was written, how equal it is to the masked model, and what was gained."""

    folder: Path
    target: str
    parity: Parity
    dense: Footprint
    small: Footprint
    notes: tuple[str, ...] = ()

    def in_words(self) -> str:
        """One sentence: what was gained."""
        rows = [("parameters", "parameters"), ("bytes on disk", "bytes"), ("operations", "flops")]
        shares = [f"{getattr(self.small, name) / getattr(self.dense, name):.2f} of the {said}" for said, name in rows]
        return f"{', '.join(shares)} of the dense model; {self.parity}"

    def as_json(self) -> dict[str, Any]:
        """The same as plain data."""
        return asdict(self) | {"folder": str(self.folder)}


@dataclass(frozen=True, slots=True)
class _Job:
    """One export: the masked model and all that is known of it."""

    ticket: Ticket
    model: "PreTrainedModel"  # under its mask
    anatomy: Anatomy
    mask: Mask
    place: Path  # of its weights
    expected: Tensor  # outputs on the rows of the check
    groups: Groups
    code: bool


LENGTH = 128  # tokens of the row that operations are counted for


def ship(
    ticket: Ticket | Path | str,
    out: Path | str,
    to: str = "hf",
    weights: str | Path = "found_on",
    *,
    groups: Groups = "refuse",
    code: bool = False,
    layout: Layout | None = None,
    factors: Mapping[str, Tensor] | None = None,
) -> Shipped:
    """Writes a ticket's model into the new folder `out`, smaller where it can be, and returns what was gained.

    to: "hf" (a shrunk model; loads after `import tombola`), "portable" (loads with transformers alone), "onnx" (batch and length
    are free), "peft" (ticket and changed values; loads on the base, `tombola.Adapters`).
    weights: those of `tombola.load`: "found_on", "base", or a folder, such as the retrained weights.
    groups: where groups of heads cannot be cut evenly, see `shrink`.
    code: hf only: write the loader beside the weights, for `trust_remote_code` without tombola.
    factors: of mask tuning (`tombola.tuned`), which are folded into the weights first: what is equal is then the tuned model.

    Raises: SettingsError with all bad settings; MaskError when the model cannot be cut or is not equal to the masked one; then,
    and on any other error, nothing is left in `out`.
    """
    out = Path(out)
    refuse(out, to, code)
    ticket = ticket if isinstance(ticket, Ticket) else Ticket.from_pretrained(ticket)
    place, _ = locate_weights(ticket, weights)
    model = load(ticket, weights, layout=layout)
    if factors is not None:
        fold(model, factors)
    gates = cast(Any, model).tombola_gates
    job = _Job(ticket, model, gates.anatomy, ticket.mask, place, outputs_of(model, check_rows(model)), groups, code)
    dense = Footprint(job.anatomy.total_parameters, weight_bytes(place), flops(model))
    with published(out) as folder:
        found, parameters, operations, notes = TARGETS[to](job, folder)
        shipped = Shipped(out, to, found, dense, Footprint(parameters, weight_bytes(folder), operations), tuple(notes))
        card = model_card(ticket, job.model, to, shipped.in_words(), shipped.notes)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return shipped


def refuse(out: Path, to: str, code: bool) -> None:
    """Raises: SettingsError with everything that is wrong about where and how to write, extras that are missing included."""
    problems = []
    if to not in TARGETS:
        problems.append(TombolaError("unknown target", got=to, expected=", ".join(TARGETS)))
    if code and to != "hf":
        problems.append(TombolaError("a loader is written beside shrunk models only", got=f"--to {to}", expected="--to hf"))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        problems.append(TombolaError(f"{out} is not empty", expected="a new or empty folder", next="name another folder"))
    missing = [name for name in EXTRAS.get(to, ()) if importlib.util.find_spec(name) is None]
    if missing:
        problems.append(
            TombolaError(
                f"--to {to} needs packages that are not installed", got=", ".join(missing), next=f"pip install 'tombola[{to}]'"
            )
        )
    if problems:
        raise SettingsError(problems)


def foretell(ticket: Ticket, to: str) -> str | None:
    """What is to be said before a ticket is shipped: of single values, that zeros alone make nothing faster."""
    if not ticket.mask.values:
        return None
    kept, n = ticket.mask.counts_by_type()["values"]
    small = n // 8 + 4 * kept
    how = f"about {small / 1e6:.1f} MB for these {n:,} parameters instead of {4 * n / 1e6:.1f} MB"
    if to == "peft":
        return f"Single values are removed: zeros do not run faster. On disk they take {how}, if all that is kept differs."
    return (
        "Single values are removed: zeros do not run faster, and a dense file holds them as zeros. Heads and neurons of which "
        f"they leave nothing are cut out. --to peft writes the changed values alone: {how}."
    )


# ------------------------------------------------------------------------------------------------------------ targets


_Written = tuple[Parity, int, int, list[str]]  # how equal, parameters, operations, notes


def _to_hf(job: _Job, folder: Path) -> _Written:
    small = shrink(job.model, job.mask, job.anatomy, groups=job.groups)
    prove_same(job.model, job.anatomy, job.mask, small)
    if job.code:
        if small.config.model_type != MODEL_TYPE:
            raise MaskError("nothing is cut, so that the model needs no loader", next="leave --with-code out")
        small.config.auto_map = carry_code()
    found = _save(job, small, folder)
    notes = (
        []
        if small.config.model_type == MODEL_TYPE
        else ["no head, MLP or neuron is removed whole: the model is dense, with zeros"]
    )
    return found, count(small), flops(small), notes


def _to_portable(job: _Job, folder: Path) -> _Written:
    small, _ = portable(job.model, job.anatomy, job.mask)
    found = _save(job, small, folder)
    least = shrink(job.model, job.mask, job.anatomy, groups="fill")
    notes = [f"one width for all layers: {count(small):,} parameters, where --to hf would have {count(least):,}"]
    return found, count(small), flops(small), notes


def _to_onnx(job: _Job, folder: Path) -> _Written:
    small = shrink(job.model, job.mask, job.anatomy, groups=job.groups)
    prove_same(job.model, job.anatomy, job.mask, small)
    parameters, operations = count(small), flops(small)
    notes = []
    if hasattr(small, "tombola_words"):
        notes.append("asked in words, the model is exported as the language model it is: logits of all words at all positions")
        small.tombola_words.remove()
    write_onnx(small, folder / ONNX_NAME)
    found = onnx_parity(small, folder / ONNX_NAME)
    if not found.holds:
        raise MaskError("the ONNX model does not compute what the masked model computes, and was not saved", got=str(found))
    small.config.save_pretrained(folder)
    _copy_tokenizer(job, folder)
    _placeless(job.ticket).save_pretrained(folder / "ticket")
    return found, parameters, operations, notes


def _to_peft(job: _Job, folder: Path) -> _Written:
    ticket = job.ticket
    place, _ = locate_weights(ticket, "base")
    base = load_weights(place, ticket.objective, head_seed=ticket.seeds.get("head", 0))
    adapter = Adapter.between(base, job.anatomy, job.model, _placeless(ticket))
    adapter.save_pretrained(folder)
    back = Adapters.from_pretrained({"default": folder}).model
    found = _compare(job, back)
    changed = sum(len(values) for _, values in adapter.some.values()) + sum(map(torch.numel, adapter.whole.values()))
    notes = [f"{changed:,} values differ from the base; it runs at the speed of the base"]
    return found, changed, flops(job.model), notes


TARGETS: Mapping[str, Callable[[_Job, Path], _Written]] = {
    "hf": _to_hf,
    "portable": _to_portable,
    "onnx": _to_onnx,
    "peft": _to_peft,
}
EXTRAS: Mapping[str, tuple[str, ...]] = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


def _save(job: _Job, small: "PreTrainedModel", folder: Path) -> Parity:
    """Saves a model with its tokenizer and ticket, and compares what is loaded again. Raises: MaskError when it differs."""
    words = cast(Any, small).__dict__.get("tombola_words")
    ids = None if words is None else words.ids
    if words is not None:  # hooks of a language model that is asked in words: in memory only
        words.remove()
    small.save_pretrained(folder)
    _copy_tokenizer(job, folder)
    _placeless(job.ticket).save_pretrained(folder / "ticket")
    auto = auto_class(small)
    back = auto.from_pretrained(folder)
    if words is not None:
        type(words)(back, ids)
    return _compare(job, back)


def _compare(job: _Job, back: nn.Module) -> Parity:
    found = parity(job.expected, outputs_of(back, check_rows(job.model)), next(job.model.parameters()).dtype)
    if not found.holds:
        raise MaskError(
            "what was written does not compute what the masked model computes; nothing was saved",
            got=str(found),
            expected="the same, up to rounding",
            next="this is a fault of tombola or of this release of transformers: worth an issue, with the name of the model",
        )
    return found


def _copy_tokenizer(job: _Job, folder: Path) -> None:
    """The files of the tokenizer, from the weights' folder or else from the base's; those that the model wrote stay."""
    places = [job.place]
    with suppress(TombolaError):  # where the base is not here, the weights' own folder has to do
        places.append(resolve_model(job.ticket.base.name, job.ticket.base.revision).folder)
    for place in places:
        files = [place / name for name in TOKENIZER_FILES if (place / name).is_file() and not (folder / name).exists()]
        for file in files:
            shutil.copyfile(file, folder / file.name)
        if any("token" in file.name or file.name.startswith("vocab") for file in files):
            return


def _placeless(ticket: Ticket) -> Ticket:
    """Without the places of weights on this machine: they say nothing anywhere else."""
    return replace(ticket, base=replace(ticket.base, path=None), found_on=replace(ticket.found_on, path=None))


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all went well, in one rename, and is removed otherwise."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        folder.chmod(0o755)
        if out.is_dir():
            out.rmdir()  # it is empty: refused before otherwise
        os.rename(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------- ONNX


class _Logits(nn.Module):
    """A model as a function of tensors in order, whose result is one tensor."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        given: dict[str, Any] = dict(zip(self.names, inputs, strict=True))
        if hasattr(self.model.config, "use_cache"):
            given["use_cache"] = False
        found: Tensor = self.model(**given)[0]
        return found


def write_onnx(model: nn.Module, file: Path) -> None:
    """Writes a model as ONNX, batch and length free (of images the batch). Raises: MaskError when torch cannot export it."""
    import logging
    import warnings

    inputs = check_rows(model)
    names, free = list(inputs), torch.export.Dim.DYNAMIC
    shapes = tuple({0: free} if name == "pixel_values" else {0: free, 1: free} for name in names)
    kernel = cast(Any, model).config._attn_implementation
    cast(Any, model).set_attn_implementation("eager")  # in plain operations
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about itself
            torch.onnx.export(
                _Logits(model, names).eval(), tuple(inputs.values()), str(file), input_names=names, output_names=["logits"],
                dynamo=True, dynamic_shapes=(shapes,), external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:  # what torch cannot trace may raise anything
        raise MaskError(
            f"this {type(model).__name__} could not be exported to ONNX",
            got=f"{type(error).__name__}: " + str(error).strip().partition("\n")[0][:200],
            next="ship it with --to hf or --to portable, and export that with another tool",
        ) from error
    finally:
        cast(Any, model).set_attn_implementation(kernel)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
    _strip(file)


def _strip(file: Path) -> None:
    """Takes out what torch writes for its developers: stack traces, with paths of this machine."""
    import onnx

    model = onnx.load(str(file))
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for function in model.functions:
        for part in (function, *function.node):
            part.ClearField("metadata_props")
            part.ClearField("doc_string")
    onnx.save(model, str(file))


def onnx_parity(model: nn.Module, file: Path) -> Parity:
    """How far the ONNX model is from `model`, at three sizes of batch and length, padded: the worst of them."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    worst: Parity | None = None
    for rows, length in ((4, 12), (1, 7), (6, 20)):
        inputs = check_rows(model, rows, length)
        (found,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        real, got = inputs.get("attention_mask"), torch.from_numpy(found).double()
        if real is not None and got.ndim == 3 and got.shape[1] == real.shape[1]:
            got = got * real[..., None]
        one = parity(outputs_of(model, inputs), got)
        worst = one if worst is None or one.apart > worst.apart or not one.holds else worst
    assert worst is not None
    return worst


# -------------------------------------------------------------------------------------------------------------- sizes


def count(model: nn.Module) -> int:
    """Values of all parameters, zeros included."""
    return sum(parameter.numel() for parameter in model.parameters())


def weight_bytes(folder: Path) -> int:
    """Bytes of the files of weights in a folder, and of the mask of a ticket inside it, which an adapter needs."""
    kinds = (".safetensors", ".bin", ".onnx", ".data")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in kinds and file.is_file())


def flops(model: nn.Module, length: int = LENGTH) -> int:
    """`operations_of` one row of `length` tokens, or as many as the model takes; of an image its own size."""
    return operations_of(model, check_rows(model, 1, min(length, _longest(model))))


def operations_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """Operations of a forward pass, two for each multiplication with its addition: of matrix products and attention alone.

    The head of zeros that stands in for an emptied attention is counted: it is computed.
    """
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        found: int = sdpa_flop_count(query, key, value)  # type: ignore[no-untyped-call]
        return found

    # torch does not count the kernel that it runs on a CPU
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        outputs_of(model, inputs)
    return int(counter.get_total_flops())


def _longest(model: nn.Module) -> int:
    config: Any = model.config
    found = getattr(config, "max_position_embeddings", None)
    return found - 4 if isinstance(found, int) and found > 8 else LENGTH  # RoBERTa's positions begin after its pad id
