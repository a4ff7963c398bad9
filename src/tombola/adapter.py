"""A ticket and the values that differ from its base, as a small folder; and several of them on one base, switched per request.

    ticket/             the ticket: the mask, which base, what the model is asked
    values.safetensors  for each parameter that differs from the masked base: which values (one bit each) and what they are, or
                        all of it where that is smaller
    adapter.json        format and digest of the values

What is put back together is the shipped model bit for bit. The base is not in the folder: its fingerprint is checked.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tombola.anatomy import Anatomy, read_anatomy
from tombola.disk import hash_file
from tombola.errors import TicketError, TombolaError
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.ticket import Ticket, locate_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FORMAT = 1
JSON_NAME, VALUES_NAME, TICKET_NAME = "adapter.json", "values.safetensors", "ticket"


@dataclass(frozen=True, slots=True)
class Adapter:
    """A ticket, and what its model has where it differs from the base under the ticket's mask."""

    ticket: Ticket
    some: Mapping[str, tuple[Tensor, Tensor]]  # parameter name → positions in a row of all its values, and the values there
    whole: Mapping[str, Tensor]  # parameter name → all of it

    @staticmethod
    def between(base: nn.Module, anatomy: Anatomy, model: nn.Module, ticket: Ticket) -> "Adapter":
        """What `model`, which holds the ticket's mask, has otherwise than `base`. Both are on the CPU, of the same class."""
        kept = _kept(anatomy, ticket.mask)
        before = dict(base.named_parameters())
        some, whole = dict[str, tuple[Tensor, Tensor]](), dict[str, Tensor]()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                now, start = parameter.detach().flatten(), before[name].detach()
                if start.shape != parameter.shape:
                    whole[name] = parameter.detach().clone()
                    continue
                was = (start * kept[name] if name in kept else start).flatten()
                places = torch.nonzero(now != was).flatten()
                if len(places) == 0:
                    continue
                if len(places) * now.element_size() + len(now) // 8 < len(now) * now.element_size():
                    some[name] = (places, now[places].clone())
                else:
                    whole[name] = parameter.detach().clone()
        return Adapter(ticket, some, whole)

    def save_pretrained(self, folder: Path | str) -> Path:
        """Writes the folder (made when missing) and returns it."""
        folder = Path(folder)
        self.ticket.save_pretrained(folder / TICKET_NAME)
        tensors = {f"whole/{name}": value.contiguous() for name, value in self.whole.items()}
        sizes = {}
        for name, (places, values) in self.some.items():
            sizes[name] = n = int(places[-1]) + 1
            flags = np.zeros(n, dtype=bool)
            flags[places.numpy()] = True
            tensors[f"bits/{name}"] = torch.from_numpy(np.packbits(flags, bitorder="little"))
            tensors[f"values/{name}"] = values.contiguous()
        save_file(tensors, folder / VALUES_NAME, metadata={"format": f"tombola-adapter {FORMAT}"})
        said = {"format": FORMAT, "ticket": self.ticket.identity, "sha256": hash_file(folder / VALUES_NAME), "up_to": sizes}
        (folder / JSON_NAME).write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return folder

    @staticmethod
    def from_pretrained(folder: Path | str) -> "Adapter":
        """The adapter in a folder. Raises: TicketError when it is none, damaged, changed, or of a newer format."""
        folder = Path(folder)
        if not (folder / JSON_NAME).is_file():
            raise TicketError(f"{folder} is not an adapter", expected=f"{JSON_NAME}, {VALUES_NAME} and the folder {TICKET_NAME}")
        try:
            said = json.loads((folder / JSON_NAME).read_text("utf-8"))
            if said["format"] != FORMAT:
                raise TicketError(f"{folder} is of a newer format", got=said["format"], expected=FORMAT, next="upgrade tombola")
            ticket = Ticket.from_pretrained(folder / TICKET_NAME)
            if said["ticket"] != ticket.identity or said["sha256"] != hash_file(folder / VALUES_NAME):
                raise TicketError(f"{folder} was changed after it was written", next="fetch it again, or ship the ticket again")
            tensors = load_file(folder / VALUES_NAME)
            some = {}
            for name, n in said["up_to"].items():
                flags = np.unpackbits(tensors[f"bits/{name}"].numpy(), count=n, bitorder="little").view(bool)
                places, values = torch.from_numpy(np.flatnonzero(flags)), tensors[f"values/{name}"]
                if len(places) == 0 or places.shape != values.shape:
                    raise ValueError(f"{len(places)} places for {len(values)} values of {name}")
                some[name] = (places, values)
        except (OSError, KeyError, TypeError, ValueError, AttributeError, SafetensorError) as error:
            got = f"{type(error).__name__}: {error}"
            raise TicketError(
                f"{folder} does not follow the format of adapters", got=got, next="ship the ticket again"
            ) from error
        whole = {name.removeprefix("whole/"): value for name, value in tensors.items() if name.startswith("whole/")}
        return Adapter(ticket, some, whole)


class Adapters:
    """One base model and several adapters on it, one of them active; named as PEFT names these things.

    Between two requests `set_adapter` puts one ticket's values in place of another's, in place: only what either touches is
    written. Made by `from_pretrained`; `model` is an ordinary model at any time. Adapters of other bases are refused.
    """

    def __init__(self, model: "PreTrainedModel", base: str) -> None:
        self.model, self.base, self.active_adapter = model, base, None
        self._anatomy = read_anatomy(model)
        self._adapters: dict[str, Adapter] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}  # of each adapter, its mask as single values
        self._dense: dict[str, Tensor] = {}  # parameters that adapters touch, as the base has them
        self._named: dict[str, dict[int, str]] = {}

    active_adapter: str | None

    @staticmethod
    def from_pretrained(adapters: Mapping[str, Path | str]) -> "Adapters":
        """The base of these adapters, by name → folder, with the first of them active.

        Raises: TicketError for a folder that is none; FingerprintError when the base has changed since.
        """
        if not adapters:
            raise TombolaError("there is no adapter to load", expected="a name and a folder for each")
        first = Adapter.from_pretrained(next(iter(adapters.values())))
        place, fingerprint = locate_weights(first.ticket, "base")
        model = load_weights(place, first.ticket.objective, head_seed=first.ticket.seeds.get("head", 0))
        loaded = Adapters(model, fingerprint)
        for name, folder in adapters.items():
            loaded.load_adapter(folder, name)
        loaded.set_adapter(next(iter(adapters)))
        return loaded

    def load_adapter(self, folder: Path | str, adapter_name: str) -> None:
        """Reads an adapter; `set_adapter` makes it active. Raises: TicketError when it is of another base or another task."""
        adapter = Adapter.from_pretrained(folder)
        if adapter.ticket.base.fingerprint != self.base:
            raise TicketError(
                f"adapter {adapter_name} belongs to another base",
                got=f"{adapter.ticket.base.name}, fingerprint {adapter.ticket.base.fingerprint}",
                expected=f"fingerprint {self.base}",
                next="load it with Adapters.from_pretrained, which brings its own base",
            )
        kinds = {one.ticket.objective.kind == "words" for one in (adapter, *self._adapters.values())}
        if len(kinds) > 1:
            raise TicketError(f"adapter {adapter_name} asks in words and others by a head, or the other way round")
        names = dict(self.model.named_parameters())
        unknown = [name for name in (*adapter.some, *adapter.whole) if name not in names]
        unknown += [
            name for name, (places, _) in adapter.some.items() if name in names and int(places[-1]) >= names[name].numel()
        ]
        # a head may be of another number of classes, and of nothing else
        unknown += [name for name, value in adapter.whole.items() if name in names and value.shape[1:] != names[name].shape[1:]]
        if unknown:
            raise TicketError(f"adapter {adapter_name} has values that its base has no place for", got=unknown[:6])
        self._kept[adapter_name] = _kept(self._anatomy, adapter.ticket.mask)
        for name in (*adapter.some, *adapter.whole, *self._kept[adapter_name]):
            if name not in self._dense:
                self._dense[name] = names[name].detach().clone()
        self._adapters[adapter_name] = adapter
        self._named[adapter_name] = dict(enumerate(adapter.ticket.labels))

    def set_adapter(self, adapter_name: str) -> None:
        """From now on the model is this adapter's. Raises: TombolaError for a name that was not loaded."""
        if adapter_name not in self._adapters:
            raise TombolaError("there is no such adapter", got=adapter_name, expected=", ".join(self._adapters))
        self._restore()
        adapter, kept = self._adapters[adapter_name], self._kept[adapter_name]
        with torch.no_grad():
            for name, part in kept.items():
                if name not in adapter.whole:
                    self.model.get_parameter(name).mul_(part.to(self.model.device))
            for name, (places, values) in adapter.some.items():
                parameter = self.model.get_parameter(name)
                parameter.view(-1)[places.to(parameter.device)] = values.to(parameter)
            for name, value in adapter.whole.items():
                self._put(name, value)
        if self._named[adapter_name] and not adapter.ticket.objective.causal:
            self._name_outputs(self._named[adapter_name])
        self.active_adapter = adapter_name

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base as it is, for a while; its head is as it was drawn."""
        active = self.active_adapter
        self._restore()
        try:
            yield
        finally:
            if active is not None:
                self.set_adapter(active)

    def _restore(self) -> None:
        active, self.active_adapter = self.active_adapter, None
        if active is None:
            return
        adapter = self._adapters[active]
        for name in {*adapter.some, *adapter.whole, *self._kept[active]}:
            self._put(name, self._dense[name])

    def _put(self, name: str, value: Tensor) -> None:
        parameter = self.model.get_parameter(name)
        if parameter.shape == value.shape:
            with torch.no_grad():
                parameter.copy_(value)
            return
        path, _, last = name.rpartition(".")
        module: Any = self.model.get_submodule(path)  # a head of another number of classes
        setattr(module, last, nn.Parameter(value.to(parameter, copy=True), parameter.requires_grad))
        if last == "weight" and hasattr(module, "out_features"):
            module.out_features = len(value)

    def _name_outputs(self, names: Mapping[int, str]) -> None:
        config = self.model.config
        config.id2label, config.label2id = dict(names), {name: i for i, name in names.items()}
        if hasattr(self.model, "num_labels"):
            self.model.num_labels = len(names)


def _kept(anatomy: Anatomy, mask: Mask) -> dict[str, Tensor]:
    """All that a mask removes, in single values: parameter name → bool of its shape, True = kept."""
    kept = anatomy.as_values(mask.structured())
    for name, part in mask.values.items():
        kept[name] = kept[name] & part if name in kept else part
    return {name: part for name, part in kept.items() if not bool(part.all())}
