"""A ticket: a mask, the identity of the weights it belongs to, and where it comes from.

On disk a ticket is a folder of three files, specified in `docs/ticket-format.md`: `ticket.json`, `mask.safetensors` (one
bit per entry; of a chain of nested masks the level at which each value goes) and a model card. Reading checks the format
version, the sizes, the digests; it never runs code and never unpickles. What weights are called here: the **base** is the
pre-trained model, **found_on** the weights the mask was found on.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tombola.anatomy import Layout
from tombola.errors import FingerprintError, MaskError, TicketError
from tombola.levels import Levels, pack_within, unpack_within
from tombola.mask import Mask
from tombola.objective import Objective
from tombola.source import fingerprint_folder, resolve_model
from tombola.stats import Overlap

FORMAT_VERSION = 2
PLAIN = 1  # the version of what has no levels: a reader of the first versions reads it
JSON_NAME, MASK_NAME, CARD_NAME = "ticket.json", "mask.safetensors", "README.md"


@dataclass(frozen=True, slots=True)
class Weights:
    """Which weights: a name, the commit it was pinned to, and a fingerprint of every value.

    `path` says in which folder they were when the ticket was written; in a file it may be relative to the ticket's own
    folder, in memory it is absolute. It is a hint and no part of the identity; what lies there is checked.
    """

    name: str
    fingerprint: str
    revision: str | None = None
    path: str | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A mask with its identities and provenance. Everything but the mask is plain JSON."""

    mask: Mask
    base: Weights
    found_on: Weights
    anatomy: Mapping[str, Any]  # Anatomy.summary() of the model it was found on
    kind: str  # "good" | "random" | "bad" | "strict-bad"
    scope: str  # which parts are maskable, e.g. "heads+mlps"
    sparsity: float  # removed share of the maskable values, in [0, 1]; exact
    task: str | None = None
    labels: tuple[str, ...] = ()  # class names of the task's head, in the order of its outputs
    preset: str = "corrected"
    settings: Mapping[str, Any] = field(default_factory=dict)  # every resolved setting of the search
    seeds: Mapping[str, int] = field(default_factory=dict)  # head, data, dropout, mask
    metrics: tuple[Mapping[str, Any], ...] = ()  # each with split, metric, value, n
    details: Mapping[str, Any] = field(default_factory=dict)  # of this kind: path of the search, overlap with good, …
    parents: tuple[str, ...] = ()  # identities of the tickets it was made from
    cell: str | None = None  # the cell of a store that made it
    versions: Mapping[str, str] = field(default_factory=dict)
    levels: Levels | None = None  # the whole chain this mask is a level of, where it is carried along
    level: int | None = None  # which of them it is

    def __post_init__(self) -> None:
        """Raises: TicketError when the mask is not that of its level."""
        if (self.levels is None) != (self.level is None):
            raise TicketError("a ticket has levels and its own level, or neither", got=f"level {self.level}")
        if self.levels is not None and self.level is not None and self.levels.mask(self.level) != self.mask:
            raise TicketError("the mask of a ticket is not that of its level", got=f"level {self.level}")

    def at_level(self, level: int) -> "Ticket":
        """The ticket of another level of its chain; metrics and details, which are of this one's mask, are left out.

        Raises: TicketError for a ticket without levels; MaskError for a level the chain does not have.
        """
        if self.levels is None:
            raise TicketError("this ticket carries no chain of levels", got=f"one mask of sparsity {self.sparsity:.4f}")
        mask = self.levels.mask(level)
        sparsity = 0.0 if level == 0 else self.levels.sparsities[level - 1]
        return replace(self, mask=mask, level=level, sparsity=sparsity, metrics=(), details={})

    @property
    def identity(self) -> str:
        """SHA-256 (32 hex characters) of what makes this ticket this one: all it says but `metrics`, which are facts about
        it and may be added to, and where weights happened to lie. Parents and cells name tickets by it."""
        return _digest({name: value for name, value in self._json().items() if name != "metrics"})

    @property
    def objective(self) -> Objective:
        """What a model with this ticket is asked."""
        return Objective.from_description(self.labels, self.settings.get("objective", {}))

    @property
    def layout(self) -> tuple[Layout, ...] | None:
        """Where the parts of its model are, when that was said by hand; None when they are found by structure.

        Raises: AnatomyError when what the ticket says is no layout.
        """
        said = self.settings.get("layout")
        return None if said is None else Layout.from_plain(said, "the layout of the ticket")

    def overlap(self, other: "Ticket") -> dict[str, Overlap]:
        """Agreement with another ticket of the same architecture, per part."""
        return self.mask.overlap(other.mask)

    def save_pretrained(self, folder: Path | str, *, within: "tuple[Ticket, str] | None" = None) -> Path:
        """Writes the three files into `folder` (made when missing) and returns it. The same ticket gives the same bytes.

        within: a ticket whose mask holds this one's, and the path to its folder from this one: then only what is removed of it is
        written, and this folder cannot be read without that one. For the cells of a store alone.
        Raises: MaskError when this mask does not lie within that one.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        body, content_of_mask = self._json(), self._mask_bytes()
        if within is not None:
            parent, path = within
            content_of_mask = save(pack_within(parent.mask, self.mask), metadata={"format": f"tombola-mask {FORMAT_VERSION}"})
            said = {"path": path, "mask": parent.mask.digest()}
            body["mask"] |= {"within": said, "sha256": hashlib.sha256(content_of_mask).hexdigest()}
            body["format_version"] = FORMAT_VERSION
        body["digest"] = _digest(body)
        for name, content in (
            (MASK_NAME, content_of_mask),
            (CARD_NAME, _card(self).encode()),
            (JSON_NAME, (json.dumps(body, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()),
        ):
            temporary = folder / f".{name}.tmp"  # each file appears whole; ticket.json, which makes it a ticket, last
            temporary.write_bytes(content)
            temporary.replace(folder / name)
        return folder

    @staticmethod
    def from_pretrained(name: Path | str, revision: str | None = None) -> "Ticket":
        """The ticket in a local folder or a Hub repository.

        Raises: TicketError when it is not a ticket, truncated, tampered with, or of a newer format.
        """
        folder = Path(name)
        if not folder.is_dir():
            folder = _ticket_from_hub(str(name), revision)
        return _read(folder)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Uploads the three files to the Hub repository `repo_id` and returns its address. Private unless told otherwise.

        Without the places of weights on this machine: they say nothing anywhere else.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi()
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        placeless = replace(self, base=replace(self.base, path=None), found_on=replace(self.found_on, path=None))
        with tempfile.TemporaryDirectory() as folder:
            api.upload_folder(repo_id=repo_id, folder_path=str(placeless.save_pretrained(folder)))
        return str(url)

    def _mask_bytes(self) -> bytes:
        # One entry of metadata at most: safetensors writes several in random order, and the same ticket must give the same bytes.
        parts = self.mask.pack() if self.levels is None else self.levels.pack()
        packed: bytes = save(parts, metadata={"format": f"tombola-mask {self._version}"})
        return packed

    @property
    def _version(self) -> int:
        return PLAIN if self.levels is None else FORMAT_VERSION

    def _json(self) -> dict[str, Any]:
        body = {name: getattr(self, name) for name in self.__slots__ if name not in _IN_MASK}
        body |= {"base": asdict(self.base), "found_on": asdict(self.found_on)}
        body["format_version"] = self._version
        body["mask"] = {
            "file": MASK_NAME,
            "sha256": hashlib.sha256(self._mask_bytes()).hexdigest(),
            "shapes": {name: list(part.shape) for name, part in self.mask.parts().items()},
            "kept": {name: kept for name, (kept, _) in self.mask.counts().items()},
        } | ({} if self.levels is None else {"levels": self.levels.n, "level": self.level})
        try:
            plain: dict[str, Any] = json.loads(json.dumps(body, default=_plain, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise TicketError(
                "a ticket holds plain JSON only", got=error, expected="numbers that are finite, text, lists"
            ) from error
        return plain


_IN_MASK = ("mask", "levels", "level")  # fields that ticket.json has in its object `mask`


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"an object of type {type(value).__name__}")


def _digest(body: Mapping[str, Any]) -> str:
    said = {name: value for name, value in body.items() if name != "digest"}
    for role in ("base", "found_on"):
        said[role] = {name: value for name, value in said[role].items() if name != "path"}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]


_DAMAGED = "make the ticket again, or fetch it again from where it came"

# What ticket.json holds beside its version, by JSON type; docs/ticket-format.md says what each field means.
_FIELDS: Mapping[type | tuple[type, ...], tuple[str, ...]] = {
    str: ("digest", "kind", "scope", "preset"),
    (str, type(None)): ("task", "cell"),
    (int, float): ("sparsity",),
    list: ("labels", "metrics", "parents"),
    dict: ("base", "found_on", "mask", "anatomy", "settings", "seeds", "details", "versions"),
}


def _read(folder: Path) -> Ticket:
    file = folder / JSON_NAME
    if not file.is_file():
        found = sorted(p.name for p in folder.iterdir())[:8]
        raise TicketError(f"{folder} is not a ticket", got=found or "an empty folder", expected=JSON_NAME)
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
        version = body["format_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise TicketError(f"{file} is damaged", got=f"{type(error).__name__}: {error}", expected="JSON", next=_DAMAGED) from error
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise TicketError(
            f"{file} is of a newer format than this tombola reads",
            got=version,
            expected=f"at most {FORMAT_VERSION}",
            next="upgrade tombola",
        )
    wrong = [name for kind, names in _FIELDS.items() for name in names if not isinstance(body.get(name, ...), kind)]
    if wrong:
        raise TicketError(
            f"{file} lacks fields, or has them in another type",
            got={name: body.get(name) for name in wrong},
            expected="see docs/ticket-format.md",
            next=_DAMAGED,
        )
    try:
        if _digest(body) != body["digest"]:
            raise TicketError(
                f"{file} was changed after it was written", got=_digest(body), expected=body["digest"], next=_DAMAGED
            )
        mask, levels = _read_mask(folder, body["mask"])
        named = {name: body[name] for name in Ticket.__slots__ if name not in (*_IN_MASK, "base", "found_on")}
        named |= {name: tuple(body[name]) for name in ("labels", "metrics", "parents")}
        found_on = Weights(**body["found_on"])
        if found_on.path is not None:
            found_on = replace(found_on, path=str((folder / found_on.path).resolve()))
        named |= {"levels": levels, "level": None if levels is None else body["mask"]["level"]}
        return Ticket(mask=mask, base=Weights(**body["base"]), found_on=found_on, **named)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, MaskError, SafetensorError) as error:
        raise TicketError(
            f"{file} does not follow the format",
            got=f"{type(error).__name__}: {error}",
            expected="see docs/ticket-format.md",
            next=_DAMAGED,
        ) from error


def _read_mask(folder: Path, said: Mapping[str, Any]) -> tuple[Mask, Levels | None]:
    file = folder / MASK_NAME
    if not file.is_file():
        raise TicketError(f"{file} is missing", expected="the packed mask beside ticket.json", next=_DAMAGED)
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != said["sha256"]:
        raise TicketError(
            f"{file} is truncated or was changed", got=f"sha256 {found[:12]}… ({file.stat().st_size} bytes)",
            expected=f"sha256 {said['sha256'][:12]}…", next=_DAMAGED,
        )  # fmt: skip
    with safe_open(file, framework="pt") as packed:  # mapped, not read: the mask is the only copy of it in memory
        shapes, levels = {name: tuple(shape) for name, shape in said["shapes"].items()}, None
        parts = {name: packed.get_tensor(name) for name in packed.keys()}  # noqa: SIM118
        if "levels" in said:
            levels = Levels.unpack(parts, shapes, said["levels"])
            mask = levels.mask(said["level"])
        elif "within" in said:
            mask = unpack_within(_mask_around(folder, said["within"]), parts)
        else:
            mask = Mask.unpack(parts, shapes)
    kept = {name: count for name, (count, _) in mask.counts().items()}
    if kept != said["kept"]:
        raise TicketError(f"{file} does not keep what ticket.json says", got=kept, expected=said["kept"], next=_DAMAGED)
    return mask, levels


def _mask_around(folder: Path, said: Mapping[str, Any]) -> Mask:
    """The mask that one in `folder` is written within."""
    place = (folder / said["path"]).resolve()
    if not (place / JSON_NAME).is_file():
        raise TicketError(
            f"the ticket in {folder} is written within another that is not here", got=str(place), expected="the level before it",
            next="read it in the store that made it; `save_pretrained` writes a ticket that stands alone",
        )  # fmt: skip
    known = None if _recent is None else _recent.get((str(place), said["mask"]))
    if known is not None:
        return known
    mask = _read(place).mask
    if mask.digest() != said["mask"]:
        raise TicketError(f"the mask in {place} is not the one that {folder} was written within", next=_DAMAGED)
    if _recent is not None:
        _recent[str(place), said["mask"]] = mask
        for old in list(_recent)[:-RECENT]:
            del _recent[old]
    return mask


RECENT = 2  # masks of levels that are kept while many are read
_recent: dict[tuple[str, str], Mask] | None = None


@contextmanager
def reading_chains() -> Iterator[None]:
    """Within it the last masks that others are written within are kept: the levels of a chain, read from the first on, are
    each unpacked twice and not once for every level after it. For reading many tickets of a store, and not while models train.
    """
    global _recent
    before, _recent = _recent, {} if _recent is None else _recent
    try:
        yield
    finally:
        _recent = before


def _ticket_from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[JSON_NAME, MASK_NAME, CARD_NAME]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TicketError(
            f"no ticket {name!r}", got=f"neither a folder here nor a Hub repository that can be reached ({type(error).__name__})",
            expected="a folder with ticket.json, or a Hub name", next="`tombola store ls` lists the tickets of a store",
        ) from error  # fmt: skip


def _card(ticket: Ticket) -> str:
    """The model card: what it is, what it keeps, what it scored (each number with split and n), how to load it."""
    kept = ", ".join(f"{kept:,} of {n:,} {name}" for name, (kept, n) in ticket.mask.counts_by_type().items())
    base = ticket.base.name + (f" at {ticket.base.revision}" if ticket.base.revision else "")
    rows = [f"| {m['split']} | {m['metric']} | {m['value']:.4f} | {m['n']} |" for m in ticket.metrics]
    table = ["", "| split | metric | value | rows |", "| --- | --- | --- | --- |", *rows] if rows else []
    return "\n".join(
        [
            "---",
            "library_name: tombola",
            "tags: [lottery-ticket, pruning]",
            "---",
            f"# A {ticket.kind} ticket of {base}" + (f" for {ticket.task}" if ticket.task else ""),
            "",
            f"Keeps {kept}: sparsity {ticket.sparsity:.4f} of the maskable values ({ticket.scope}), preset `{ticket.preset}`.",
            "It is a mask, not a model: it needs the weights it was made for and refuses others.",
            *table,
            "",
            "```python",
            "import tombola",
            'model = tombola.load(tombola.Ticket.from_pretrained("THIS FOLDER"), weights="base")',
            "```",
            "",
        ]
    )


# ----------------------------------------------------------------------------------------------------- finding weights


def locate_weights(ticket: Ticket, weights: str | Path) -> tuple[Path, str]:
    """(folder, fingerprint) of the weights a ticket is to be used with: "base", "found_on", or a folder of one's own.

    Raises: FingerprintError when what lies there is not what the ticket was made for (own folders are taken as given);
    TicketError when the weights are nowhere to be found.
    """
    if weights == "base":
        source = resolve_model(ticket.base.name, ticket.base.revision)
        _check_fingerprint(ticket.base, source.fingerprint, source.folder)
        return source.folder, source.fingerprint
    if weights == "found_on":
        folder = None if ticket.found_on.path is None else Path(ticket.found_on.path)
        if folder is None or not (folder / "config.json").is_file():
            raise TicketError(
                "the weights this ticket was found on are not here",
                got=str(folder) if folder else "no place recorded",
                expected=f"{ticket.found_on.name}, fingerprint {ticket.found_on.fingerprint}",
                next='pass weights=FOLDER, use weights="base", or run `tombola find` with the same settings again',
            )
        fingerprint = fingerprint_folder(folder)
        _check_fingerprint(ticket.found_on, fingerprint, folder)
        return folder, fingerprint
    source = resolve_model(str(weights))
    return source.folder, source.fingerprint


def _check_fingerprint(said: Weights, found: str, folder: Path) -> None:
    if found != said.fingerprint:
        raise FingerprintError(
            f"the ticket does not belong to the weights of {said.name} in {folder}",
            got=f"fingerprint {found}",
            expected=f"fingerprint {said.fingerprint}" + (f" (revision {said.revision})" if said.revision else ""),
            next="load the revision it was made for, or pass your own weights by path if you mean it",
        )
