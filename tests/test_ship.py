"""`tombola ship`: what is written is loaded again, in other processes too, and equals the masked model, or nothing is written."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tombola
from conftest import Run, tiny_family
from test_families import ALL, furthest, known, logits, mask_without, some_masks
from tombola import export
from tombola.adapter import Adapter, Adapters
from tombola.anatomy import read_anatomy
from tombola.cut import check_rows, outputs_of, shrink
from tombola.errors import FingerprintError, MaskError, SettingsError, TicketError, TombolaError
from tombola.export import foretell, ship
from tombola.gates import Gates, load
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.portable import portable
from tombola.source import fingerprint_folder
from tombola.ticket import Ticket, Weights

LABELS = ("negative", "positive")


def fine_tuned(base: Path, folder: Path, labels: tuple[str, ...] = LABELS, seed: int = 0) -> Path:
    """A classifier on a base whose body has moved, as training moves it."""
    model = load_weights(base, labels, head_seed=seed)
    torch.manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "encoder" in name or "classifier" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def ticket_on(base: Path, found_on: Path, mask: Mask, labels: tuple[str, ...] = LABELS) -> Ticket:
    model = load_weights(found_on, labels, head_seed=0)
    anatomy = read_anatomy(model)
    return Ticket(
        mask=mask, base=Weights(str(base), fingerprint_folder(base)),
        found_on=Weights("fine-tuned", fingerprint_folder(found_on), path=str(found_on)),
        anatomy=anatomy.summary(), kind="good", scope="heads+mlps", sparsity=anatomy.size(mask).sparsity,
        task="sst2", labels=labels, seeds={"head": 0},
        metrics=({"split": "validation", "metric": "accuracy", "value": 0.9, "n": 80},),
    )  # fmt: skip


def structured(base: Path) -> Mask:
    anatomy = read_anatomy(load_weights(base, LABELS, head_seed=0))
    neurons = torch.ones(2, 48, dtype=torch.bool)
    neurons[0, ::2], neurons[1, :8] = False, False
    return mask_without(anatomy, [(0, 1), (1, 0), (1, 1), (1, 2), (1, 3)]) & Mask(neurons=neurons)


@pytest.fixture
def found(tiny_folder: Path, tmp_path: Path) -> Ticket:
    """A ticket of heads and neurons, one attention emptied."""
    return ticket_on(tiny_folder, fine_tuned(tiny_folder, tmp_path / "found"), structured(tiny_folder))


def single_values(base: Path, share: float = 0.9) -> Mask:
    model = load_weights(base, LABELS, head_seed=0)
    generator = torch.Generator().manual_seed(0)
    names = [name for name, p in model.named_parameters() if "encoder" in name and p.ndim == 2]
    return Mask(values={name: torch.rand(model.get_parameter(name).shape, generator=generator) > share for name in names})


def expected_of(ticket: Ticket, weights: str = "found_on") -> Tensor:
    model = load(ticket, weights)
    return outputs_of(model, check_rows(model))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


RUN = """
import sys
sys.modules["tombola"] = None
import torch, transformers
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1]{more}).eval()
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
tokenizer("the film was good")
rows = torch.load(sys.argv[2], weights_only=True)
torch.save(model(**rows).logits.detach(), sys.argv[2] + ".out")
print(type(model).__name__)
"""


def without_tombola(folder: Path, rows: dict[str, Tensor], at: Path, more: str = "") -> tuple[str, Tensor]:
    torch.save(rows, at)
    code = RUN.format(more=more)
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(folder), str(at)], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-1500:]
    out: Tensor = torch.load(f"{at}.out", weights_only=True)
    return ran.stdout.split()[-1], out


# ------------------------------------------------------------------------------------------------------------ targets


def test_hf_is_a_shrunk_model_with_tokenizer_ticket_and_card(found: Ticket, tmp_path: Path) -> None:
    shipped = ship(found, tmp_path / "out")
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(back).__name__ == "ShrunkBertForSequenceClassification"
    wanted = expected_of(found)
    assert furthest(outputs_of(back, check_rows(back)), wanted) < 1e-5 * float(wanted.abs().max())
    assert back.config.id2label == {0: "negative", 1: "positive"}
    assert shipped.small.parameters == sum(p.numel() for p in back.parameters()) < shipped.dense.parameters
    assert shipped.small.bytes < shipped.dense.bytes and shipped.small.flops < shipped.dense.flops
    assert shipped.notes == () and shipped.parity.holds and "of the parameters" in shipped.in_words()
    pipe = transformers.pipeline("text-classification", model=str(tmp_path / "out"), device="cpu")
    assert pipe("the film was good")[0]["label"] in LABELS
    assert Ticket.from_pretrained(tmp_path / "out" / "ticket").mask == found.mask
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| validation | accuracy | 0.9000 | 0.815 to 0.948 | 80 |" in card and "import tombola" in card  # Wilson's, by hand
    assert "Licence of the base: not said" in card and shipped.in_words() in card
    said = (tmp_path / "out" / "ticket" / "ticket.json").read_text() + card
    assert str(tmp_path / "found") not in said
    assert leftovers(tmp_path) == []


def test_portable_and_remote_code_load_without_tombola(found: Ticket, tmp_path: Path) -> None:
    ship(found, tmp_path / "plain", "portable")
    ship(found, tmp_path / "code", "hf", code=True)
    wanted, rows = expected_of(found), check_rows(load(found, "found_on"))
    name, out = without_tombola(tmp_path / "plain", rows, tmp_path / "rows.pt")
    assert name == "BertForSequenceClassification" and furthest(out, wanted) < 1e-5 * float(wanted.abs().max())
    name, out = without_tombola(tmp_path / "code", rows, tmp_path / "rows.pt", ", trust_remote_code=True")
    assert name == "ShrunkBertForSequenceClassification" and furthest(out, wanted) < 1e-5 * float(wanted.abs().max())
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["intermediate_size"] == 40  # the fuller layer's


@pytest.mark.parametrize("kind", ALL)
def test_portable_models_of_every_family_are_plain_and_equal(kind: str) -> None:
    model, anatomy = tiny_family(kind), known(kind)[1]
    mask = some_masks(anatomy)["neurons"]
    if kind == "bloom":  # whose config does not say how wide an MLP is
        with pytest.raises(MaskError, match="nothing of this mask makes a plain bloom smaller"):
            portable(model, anatomy, mask)
        return
    small: Any = portable(model, anatomy, mask)[0]
    assert type(small) is type(model)
    fresh = type(model)(type(model.config).from_dict(small.config.to_dict()))
    fresh.load_state_dict(small.state_dict())
    with Gates(model, anatomy, mask):
        wanted = logits(model)
    assert furthest(logits(fresh.eval()), wanted) < 1e-5 * float(wanted.abs().max())
    most = max(int(row.sum()) for row in mask.neurons)  # type: ignore[union-attr]
    gone = sum((anatomy.mlps[0].d_ffn - most) * mlp.values_per_neuron for mlp in anatomy.mlps)
    assert sum(p.numel() for p in small.parameters()) == anatomy.total_parameters - gone


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen3", "gemma3", "phi3"])
def test_portable_decoders_lose_heads_and_layers(kind: str) -> None:
    model, anatomy = tiny_family(kind), known(kind)[1]
    heads = mask_without(anatomy, [(row, head) for row in range(2) for head in (2, 3)])  # one of two kv-heads
    small: Any = portable(model, anatomy, heads)[0]
    assert small.config.num_attention_heads == 2 and small.config.num_key_value_heads == 1
    shorter: Any = portable(model, anatomy, anatomy.whole_layers(torch.tensor([False, True])))[0]
    assert shorter.config.num_hidden_layers == 1 and len(shorter.model.layers) == 1


def test_onnx_takes_any_batch_and_length(found: Ticket, tmp_path: Path) -> None:
    import onnxruntime

    shipped = ship(found, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    model = load(found, "found_on")
    for rows, length in ((1, 5), (5, 17)):
        inputs = check_rows(model, rows, length)
        (out,) = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        wanted = outputs_of(model, inputs)
        assert furthest(torch.from_numpy(out), wanted) < 1e-5 * float(wanted.abs().max())
    files = ("model.onnx", "ticket/mask.safetensors")
    assert shipped.small.bytes == sum((tmp_path / "out" / name).stat().st_size for name in files)
    assert b"site-packages" not in (tmp_path / "out" / "model.onnx").read_bytes()  # nor any other path of this machine
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_onnx_of_every_family(kind: str, tmp_path: Path) -> None:
    model, anatomy = tiny_family(kind), known(kind)[1]
    neurons = torch.ones(len(anatomy.mlps), anatomy.mlps[0].d_ffn, dtype=torch.bool)
    neurons[0, ::2] = neurons[-1, 1] = False  # layers of other widths
    small = shrink(model, Mask(neurons=neurons), anatomy)
    export.write_onnx(small, tmp_path / "model.onnx")
    assert export.onnx_parity(small, tmp_path / "model.onnx").holds


def test_an_adapter_is_the_model_bit_for_bit_and_several_share_one_base(tiny_folder: Path, tmp_path: Path) -> None:
    masks = {"a": structured(tiny_folder), "b": single_values(tiny_folder), "c": single_values(tiny_folder, 0.5)}
    labels = {"a": LABELS, "b": ("x", "y", "z"), "c": LABELS}
    models = {}
    for i, (name, mask) in enumerate(masks.items()):
        folder = fine_tuned(tiny_folder, tmp_path / f"found-{name}", labels[name], seed=i)
        ticket = ticket_on(tiny_folder, folder, mask, labels[name])
        shipped = ship(ticket, tmp_path / name, "peft")
        models[name] = load(ticket, "found_on")
        assert shipped.small.bytes < shipped.dense.bytes or name == "a"
    assert export.weight_bytes(tmp_path / "b") < 0.6 * export.weight_bytes(tmp_path / "found-b")
    adapters = Adapters.from_pretrained({name: tmp_path / name for name in masks})
    base = {name: value.clone() for name, value in load_weights(tiny_folder, LABELS, head_seed=0).state_dict().items()}
    for name in ("b", "a", "c", "b", "b", "a"):
        adapters.set_adapter(name)
        wanted = models[name].state_dict()
        held = [key for key, value in adapters.model.state_dict().items() if not torch.equal(value, wanted[key])]
        assert held == [], name
        assert list(adapters.model.config.id2label.values()) == list(labels[name])
        rows = check_rows(models[name])
        assert torch.equal(outputs_of(adapters.model, rows), outputs_of(models[name], rows))
    with adapters.disable_adapter():
        now = adapters.model.state_dict()
        assert all(torch.equal(now[name], value) for name, value in base.items())
        assert adapters.active_adapter is None
    assert adapters.active_adapter == "a"
    with pytest.raises(TombolaError, match="no such adapter"):
        adapters.set_adapter("d")


def test_damaged_adapters_and_other_bases_are_refused(found: Ticket, tiny_folder: Path, tmp_path: Path) -> None:
    ship(found, tmp_path / "out", "peft")
    values = tmp_path / "out" / "values.safetensors"
    was = values.read_bytes()
    values.write_bytes(was[:-1] + bytes([was[-1] ^ 1]))
    with pytest.raises(TicketError, match="changed after it was written"):
        Adapter.from_pretrained(tmp_path / "out")
    values.write_bytes(was)
    said = json.loads((tmp_path / "out" / "adapter.json").read_text())
    (tmp_path / "out" / "adapter.json").write_text(json.dumps(said | {"format": 2}))
    with pytest.raises(TicketError, match="newer format"):
        Adapter.from_pretrained(tmp_path / "out")
    (tmp_path / "out" / "adapter.json").write_text(json.dumps(said | {"up_to": {"classifier.weight": 3}}))
    with pytest.raises(TicketError, match="does not follow the format"):
        Adapter.from_pretrained(tmp_path / "out")
    ship(found, tmp_path / "other", "peft")
    adapter = Adapter.from_pretrained(tmp_path / "other")
    for changed in (
        replace(adapter, whole={**adapter.whole, "nothing.weight": torch.zeros(2)}),
        replace(adapter, whole={**adapter.whole, "classifier.weight": torch.zeros(2, 3)}),
        replace(adapter, some={**adapter.some, "classifier.bias": (torch.tensor([7]), torch.ones(1))}),
    ):
        changed.save_pretrained(tmp_path / "other")
        with pytest.raises(TicketError, match="no place for"):
            Adapters.from_pretrained({"a": tmp_path / "other"})
    with pytest.raises(TicketError, match="not an adapter"):
        Adapter.from_pretrained(tiny_folder)
    with pytest.raises(TombolaError, match="no adapter to load"):
        Adapters.from_pretrained({})


def test_a_base_that_changed_since_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_folder, tmp_path / "base"))
    ticket = ticket_on(base, fine_tuned(base, tmp_path / "found"), structured(base))
    ship(ticket, tmp_path / "adapter", "peft")
    model = transformers.AutoModel.from_pretrained(base)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    model.save_pretrained(base)
    with pytest.raises(FingerprintError, match="does not belong to the weights"):
        ship(ticket, tmp_path / "again", "peft")
    with pytest.raises(FingerprintError):
        Adapters.from_pretrained({"a": tmp_path / "adapter"})
    ship(ticket, tmp_path / "hf")  # needs the weights it was found on, which are there
    fine_tuned(tiny_folder, tmp_path / "found", seed=9)
    with pytest.raises(FingerprintError):
        ship(ticket, tmp_path / "none")
    assert not (tmp_path / "again").exists() and not (tmp_path / "none").exists() and leftovers(tmp_path) == []


# ------------------------------------------------------------------------------------------------- single values, words


def test_of_single_values_it_is_said_what_they_do_not_gain(tiny_folder: Path, tmp_path: Path) -> None:
    ticket = ticket_on(tiny_folder, fine_tuned(tiny_folder, tmp_path / "found"), single_values(tiny_folder))
    said = foretell(ticket, "hf")
    assert said is not None and "zeros do not run faster" in said and "--to peft" in said
    kept, n = ticket.mask.counts_by_type()["values"]
    assert f"about {(n // 8 + 4 * kept) / 1e6:.1f} MB" in said
    shipped = ship(ticket, tmp_path / "out")
    assert shipped.small.parameters == shipped.dense.parameters and "the model is dense, with zeros" in shipped.notes[0]
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(back) is transformers.BertForSequenceClassification
    wanted = expected_of(ticket)
    assert furthest(outputs_of(back, check_rows(back)), wanted) < 1e-5 * float(wanted.abs().max())
    with pytest.raises(MaskError, match="single values have no width"):
        ship(ticket, tmp_path / "plain", "portable")
    with pytest.raises(MaskError, match="needs no loader"):
        ship(ticket, tmp_path / "code", code=True)
    assert (
        leftovers(tmp_path) == [] and foretell(ticket_on(tiny_folder, tmp_path / "found", structured(tiny_folder)), "hf") is None
    )


# ----------------------------------------------------------------------------------------------- nothing half-written


def test_what_differs_is_not_saved(found: Ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader that gives other weights than were saved."""
    real = transformers.AutoModelForSequenceClassification.from_pretrained

    def other(folder: Any, **kwargs: Any) -> Any:
        model = real(folder, **kwargs)
        if str(folder).rpartition("/")[2].startswith("."):
            with torch.no_grad():
                model.classifier.weight.add_(0.01)
        return model

    monkeypatch.setattr(transformers.AutoModelForSequenceClassification, "from_pretrained", other)
    for target in ("hf", "portable"):
        with pytest.raises(MaskError, match="does not compute what the masked model computes"):
            ship(found, tmp_path / "out", target)
        assert not (tmp_path / "out").exists() and leftovers(tmp_path) == []


@pytest.mark.parametrize("target", ["hf", "peft"])
def test_a_failure_in_the_middle_leaves_nothing(
    target: str, found: Ticket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "model_card", full)
    (tmp_path / "out").mkdir()  # empty: may be written into, and stays when that fails
    with pytest.raises(OSError, match="no space"):
        ship(found, tmp_path / "out", target)
    assert list((tmp_path / "out").iterdir()) == [] and leftovers(tmp_path) == []


def test_all_bad_settings_are_said_at_once_and_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError) as caught:
        ship("nothing", tmp_path / "full", "gguf", code=True)
    assert [problem.what for problem in caught.value.problems] == [
        "unknown target", "a loader is written beside shrunk models only", f"{tmp_path / 'full'} is not empty",
    ]  # fmt: skip
    monkeypatch.setitem(export.EXTRAS, "onnx", ("onnx", "a_package_that_is_not_there"))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="needs packages that are not installed") as caught:
        ship("nothing", tmp_path / "out", "onnx")
    assert caught.value.problems[0].next == "pip install 'tombola[onnx]'"
    with pytest.raises(TicketError):
        ship(tmp_path / "full", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_files_cannot_leave_the_folder_and_only_known_ones_are_copied(found: Ticket, tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "found" / "evil.py").write_text("raise SystemExit")
    (tmp_path / "secret.json").write_text("{}")
    (tmp_path / "found" / "vocab.json").symlink_to(tmp_path / "secret.json")
    ship(found, tmp_path / "out")
    names = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*")}
    assert "evil.py" not in names and not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))


# ---------------------------------------------------------------------------------------------------------------- hub


class FakeHub:
    """What would have been sent."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.sent: list[str] = []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        self.made.append((repo_id, private))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, allow_patterns: list[str]) -> None:
        self.sent += allow_patterns


def test_nothing_is_uploaded_without_the_users_word(
    found: Ticket, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = FakeHub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    ship(found, tmp_path / "out")
    (tmp_path / "out" / ".hidden").write_text("secret")
    (tmp_path / "out" / "link.txt").symlink_to(tmp_path / "out" / ".hidden")
    code, out, _ = run("push", tmp_path / "out", "me/mine")
    assert code == 0 and "nothing was sent" in out and "model.safetensors" in out and hub.made == []
    code, out, _ = run("push", tmp_path / "out", "me/mine", "--dry-run", tmp_path / "dry")
    written = sorted(str(path.relative_to(tmp_path / "dry")) for path in (tmp_path / "dry").rglob("*") if path.is_file())
    assert code == 0 and hub.made == [] and "README.md" in written and "ticket/ticket.json" in written
    assert not {".hidden", "link.txt"} & set(written)
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "dry")
    assert type(back).__name__ == "ShrunkBertForSequenceClassification"
    code, out, _ = run("push", tmp_path / "out", "me/mine", "--yes")
    assert code == 0 and "https://hub/me/mine" in out and hub.made == [("me/mine", True)] and sorted(hub.sent) == written
    for arguments in ([tmp_path / "found", "me/mine"], [tmp_path / "out", "a//b"], [tmp_path / "nothing", "me/mine"]):
        code, _, err = run("push", *arguments, "--yes")
        assert code == 2 and "expected" in err
    assert len(hub.made) == 1


# ------------------------------------------------------------------------------------------------------- command line


def test_the_verb_says_what_was_gained(found: Ticket, tmp_path: Path, run: Run) -> None:
    found.save_pretrained(tmp_path / "ticket")
    code, out, err = run("ship", tmp_path / "ticket", tmp_path / "out", "--store", tmp_path / "store")
    assert code == 0, err
    assert "parameters" in out and "of the dense model" in out and "the same answers" in out
    assert not (tmp_path / "store").exists()
    code, out, err = run("ship", tmp_path / "ticket", tmp_path / "json", "--to", "peft", "--json", "--store", tmp_path / "store")
    said = json.loads(out)
    assert code == 0 and said["target"] == "peft" and said["parity"]["apart"] == 0.0
    for arguments in (["--to", "nothing"], ["--groups", "guess"], ["--to", "peft", "--with-code"]):
        code, out, err = run("ship", tmp_path / "ticket", tmp_path / "bad", *arguments, "--store", tmp_path / "store")
        assert code == 2 and "expected" in err and not (tmp_path / "bad").exists()


def test_the_face_of_the_package_has_it() -> None:
    assert tombola.ship is ship and tombola.Adapters is Adapters
    assert copy.copy(export.TARGETS).keys() == {"hf", "portable", "onnx", "peft"}
