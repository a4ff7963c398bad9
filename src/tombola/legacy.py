"""Masks of code that is dead: read as data, checked against the model, never run and never guessed at.

Prasanna et al. 2020 left float32 arrays [layer, head] and [layer] in .npy files, Chen et al. 2020 state dicts of torch's own
pruning in .pt files. Here they become a `Mask`, or are refused: what is neither 0 nor 1, of another shape, or under a name that
the model does not have, is an error that says so, for all arrays at once.

Order of reading: `import_mask`, `import_ticket`, the layouts (whose names are whose), one array, the files.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tombola.anatomy import Anatomy, read_anatomy
from tombola.errors import MaskError, TombolaError
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.source import fingerprint_folder, resolve_model
from tombola.ticket import Ticket, Weights

Names = Mapping[str, str]  # their name of an array -> the parameter it masks
SHOWN = 8  # problems that are printed; the rest is counted


def import_mask(
    anatomy: Anatomy,
    *,
    heads: Path | None = None,
    mlps: Path | None = None,
    neurons: Path | None = None,
    values: Path | None = None,
    layout: str | Path = "names",
    ones: str = "kept",
) -> Mask:
    """The mask that other code wrote, for a model of this anatomy. Parts for which no file is given are not masked.

    heads   a file with one array [layer, head] of 0 and 1; mlps: one array [layer]; neurons: one array [layer, d_ffn]
    values  a file with an array for each masked parameter, of the parameter's own shape, under names that `layout` explains:
            "names" (the parameter's), "torch-prune" (a state dict of torch.nn.utils.prune: the entries `…_mask`, all others are
            passed over), or the path of a JSON file {their name: parameter, or null for an array to leave out}
    ones    what a 1 means in these files: "kept" or "removed"

    Files: .npy, .npz, .pt, .pth, .bin, .safetensors. Numbers of any type and 0 or 1 exactly; nothing is rounded. A matrix that is
    stored transposed (as GPT-2's Conv1D does) is refused where it is not square; where it is, nobody can tell.

    Raises: MaskError with every problem of every file at once.
    """
    problems: list[MaskError] = []
    parts: dict[str, Tensor] = {}
    if ones not in ("kept", "removed"):
        problems.append(MaskError("what a 1 means is not known", got=repr(ones), expected="kept or removed"))
    if heads is mlps is neurons is values is None:
        problems.append(MaskError("there is no mask to import", expected="a file for heads, mlps, neurons or values"))
    for name, file in (("heads", heads), ("mlps", mlps), ("neurons", neurons)):
        if file is not None:
            with _collected(problems):
                shape = tuple(anatomy.full_mask(name).parts()[name].shape)
                parts[name] = _checked(_only(file), f"{name} of {file.name}", shape)
    found: dict[str, Tensor] = {}
    if values is not None:
        with _collected(problems):
            stored = _read(values)
            for theirs, ours in _names(layout, stored, values, problems).items():
                with _collected(problems):
                    found[ours] = _checked(stored[theirs], f"{theirs} of {values.name}", _shape(anatomy, theirs, ours, values))
    if problems:
        raise _all(problems)
    mask = Mask(**parts, values=found)
    return mask if ones == "kept" else ~mask


def import_ticket(
    model: str,
    *,
    heads: Path | None = None,
    mlps: Path | None = None,
    neurons: Path | None = None,
    values: Path | None = None,
    layout: str | Path = "names",
    ones: str = "kept",
    found_on: Path | None = None,
    task: str | None = None,
    labels: tuple[str, ...] = (),
    seed: int = 0,
) -> Ticket:
    """A ticket of MODEL ("demo", a folder, a Hub name) with the mask that other code wrote; see `import_mask` for the files.

    found_on   the folder of the weights the mask was found on; without it, the base counts as such
    seed       the run seed of what is trained with it
    What the files do not say (how the model was trained, by which search) the ticket does not claim.

    Raises: MaskError with every problem of the files; TombolaError as `resolve_model`.
    """
    if not 0 <= seed < 2**32:
        raise TombolaError("the seed is not valid", got=seed, expected="a whole number from 0 to 2^32 − 1")
    source = resolve_model(model)
    anatomy = read_anatomy(load_weights(source.folder, labels, head_seed=seed))
    mask = import_mask(anatomy, heads=heads, mlps=mlps, neurons=neurons, values=values, layout=layout, ones=ones)
    kept_heads, kept_mlps = anatomy.survival(mask)
    base = Weights(source.name, source.fingerprint, source.revision)
    on = base if found_on is None else Weights(found_on.name, fingerprint_folder(found_on), path=str(found_on.resolve()))
    files = {"heads": heads, "mlps": mlps, "neurons": neurons, "values": values}
    units = [name for name, part in (("heads+mlps", heads or mlps), ("neurons", neurons)) if part is not None]
    return Ticket(
        mask=mask,
        base=base,
        found_on=on,
        anatomy=anatomy.summary(),
        kind="good",
        scope="+".join(units) if not mask.values else "+".join(mask.values) if len(mask.values) < SHOWN else "imported values",
        sparsity=anatomy.size(mask).sparsity,
        task=task,
        labels=labels,
        settings={
            "imported": {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items() if file is not None}
            | {"layout": Path(layout).name, "ones": ones}
        },
        seeds=dict.fromkeys(("run", "head", "data", "dropout", "mask"), seed),
        details={"survival": {"heads": kept_heads.tolist(), "mlps": kept_mlps.tolist()}},
        versions={"tombola": version("tombola")},
    )


# ---------------------------------------------------------------------------------------------------------------- layouts


def _by_name(stored: Mapping[str, object], file: Path) -> Names:
    if not stored or "" in stored:
        raise MaskError(
            f"{file.name} holds no arrays by name",
            got="one array without a name" if stored else "nothing",
            expected="an array for each masked parameter, under its name",
            next="a mask of heads or of MLPs has an option of its own",
        )
    return {name: name for name in stored}


def _by_torch_prune(stored: Mapping[str, object], file: Path) -> Names:
    names = {name: name.removesuffix("_mask") for name in stored if name.endswith("_mask")}
    if not names:
        raise MaskError(
            f"{file.name} holds no masks of torch.nn.utils.prune",
            got=f"{len(stored)} entries, such as {_few(list(stored))}",
            expected="entries <parameter>_mask, such as encoder.layer.0.output.dense.weight_mask",
            next="a dict of plain arrays by parameter name has the layout names",
        )
    return names


LAYOUTS: dict[str, Callable[[Mapping[str, object], Path], Names]] = {"names": _by_name, "torch-prune": _by_torch_prune}


def _names(layout: str | Path, stored: Mapping[str, object], file: Path, problems: list[MaskError]) -> Names:
    """Which array masks which parameter; what a JSON mapping and the file do not have in common goes to `problems`."""
    if str(layout) in LAYOUTS:
        return LAYOUTS[str(layout)](stored, file)
    mapping = _mapping(Path(layout))
    if absent := [name for name in mapping if name not in stored]:
        problems.append(MaskError(f"{Path(layout).name} names arrays that {file.name} does not hold", got=_few(absent)))
    if unnamed := [name for name in stored if name not in mapping]:
        problems.append(
            MaskError(
                f"{file.name} holds arrays that {Path(layout).name} does not name",
                got=_few(unnamed),
                expected="every array named",
                next="map those that are no masks to null",
            )
        )
    ours = [name for name in mapping.values() if name is not None]
    if twice := sorted({name for name in ours if ours.count(name) > 1}):
        problems.append(MaskError(f"{Path(layout).name} gives a parameter two masks", got=_few(twice)))
    return {theirs: name for theirs, name in mapping.items() if name is not None and theirs in stored}


def _mapping(file: Path) -> dict[str, str | None]:
    if not file.is_file():
        raise MaskError(
            f"unknown layout {str(file)!r}",
            expected=f"{', '.join(LAYOUTS)}, or the path of a JSON file {{their name: parameter}}",
        )
    try:
        mapping = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise MaskError(f"{file.name} is not JSON", got=str(error)) from error
    if not isinstance(mapping, dict) or not all(isinstance(name, str | None) for name in mapping.values()):
        raise MaskError(f"{file.name} is not a mapping of names", expected='{"their name": "parameter" or null, …}')
    return mapping


# -------------------------------------------------------------------------------------------------------------- one array


def _checked(stored: object, where: str, shape: tuple[int, ...]) -> Tensor:
    """The array as a boolean tensor, True where it is 1."""
    array = _array(stored, where)
    if array.shape != shape:
        turned = array.shape == shape[::-1]
        raise MaskError(
            f"{where} has the wrong shape",
            got=array.shape,
            expected=shape,
            next="it is the transpose: if the array is stored [in, out], as Conv1D does, transpose it first" if turned else None,
        )
    is_one = np.asarray(array == 1)
    strange = ~is_one & np.asarray(array != 0)  # NaN is neither
    if strange.any():
        few = sorted({repr(value) for value in np.atleast_1d(array)[np.atleast_1d(strange)][:1000].tolist()})
        raise MaskError(
            f"{where} is not a mask of 0 and 1",
            got=f"{int(strange.sum())} of {array.size} numbers are neither: {_few(few)}",
            expected="0 and 1 only; scores or soft gates need a threshold, which is your choice to make",
        )
    return torch.from_numpy(is_one.copy())


def _array(stored: object, where: str) -> np.ndarray:
    if isinstance(stored, Tensor) and stored.layout is torch.strided and not stored.is_quantized:
        if stored.is_floating_point() and torch.finfo(stored.dtype).bits < 32:  # numpy has no bfloat16; exact in this direction
            stored = stored.float()
        stored = stored.numpy(force=True)
    if not isinstance(stored, np.ndarray) or stored.dtype.kind not in "biuf":
        kind = stored.dtype if isinstance(stored, np.ndarray | Tensor) else type(stored).__name__
        raise MaskError(
            f"{where} is not an array of numbers",
            got=kind,
            expected="a dense array of bool, integer or float",
            next="a nested state dict must be saved alone" if isinstance(stored, Mapping) else None,
        )
    return stored


def _shape(anatomy: Anatomy, theirs: str, ours: str, file: Path) -> tuple[int, ...]:
    """The shape of our parameter. Raises: MaskError when there is none of that name, with the nearest there are."""
    if ours in anatomy.shapes:
        return anatomy.shapes[ours]
    # Only a prefix apart is nearer than any spelling; but it is for the user to say so.
    near = [name for name in anatomy.shapes if name.endswith(f".{ours}") or ours.endswith(f".{name}")]
    near = near or difflib.get_close_matches(ours, anatomy.shapes, n=2)
    raise MaskError(
        f"{file.name} masks a parameter that this {anatomy.model_type} does not have",
        got=ours,
        expected=f"one of its {len(anatomy.shapes)} names" + (f"; near are {_few(near)}" if near else ""),
        next=f"say what it is in a JSON file, and give its path as layout: {json.dumps({theirs: near[0] if near else '…'})}",
    )


# -------------------------------------------------------------------------------------------------------------- the files


def _read_numpy(file: Path) -> dict[str, object]:
    with file.open("rb") as stream:
        loaded = np.load(stream, allow_pickle=False)
        return {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded.items())


def _read_torch(file: Path) -> dict[str, object]:
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    return {str(name): part for name, part in loaded.items()} if isinstance(loaded, Mapping) else {"": loaded}


def _read_safetensors(file: Path) -> dict[str, object]:
    return dict(load_file(file))


READERS: dict[str, Callable[[Path], dict[str, object]]] = {
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".pt": _read_torch,
    ".pth": _read_torch,
    ".bin": _read_torch,
    ".safetensors": _read_safetensors,
}


def _read(file: Path) -> dict[str, object]:
    """The named entries of a file; one that is nameless has the name "". Raises: MaskError when it cannot be read as data."""
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise MaskError(f"{file.name} is of no kind that can be read", got=file.suffix, expected=", ".join(READERS))
    try:
        return reader(file)
    except Exception as error:  # a damaged file may make its reader raise anything; readers refuse what would run code
        raise MaskError(
            f"{file.name} cannot be read as data",
            got=f"{type(error).__name__}: " + str(error).partition("\n")[0][:160],
            expected="a whole file of plain arrays, without pickled objects",
            next="save it again with numpy.savez or safetensors, from code that you trust" if file.is_file() else None,
        ) from error


def _only(file: Path) -> Any:
    stored = _read(file)
    if len(stored) != 1:
        raise MaskError(f"{file.name} must hold one array", got=f"{len(stored)}: {_few(list(stored))}", expected="one")
    return next(iter(stored.values()))


@contextmanager
def _collected(problems: list[MaskError]) -> Iterator[None]:
    try:
        yield
    except MaskError as problem:
        problems.append(problem)


def _all(problems: list[MaskError]) -> MaskError:
    if len(problems) == 1:
        return problems[0]
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return MaskError("\n".join([f"{len(problems)} problems with the masks to import:", *map(str, problems[:SHOWN]), *more]))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
