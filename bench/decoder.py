"""What a ticket of single values adds to the memory of a real decoder: `demo-decoder`, a Llama of 135 M parameters.

Of a process: its peak (the kernel's high-water mark) less what it held before, with its libraries loaded; the rival is the same
model without a ticket, loaded and run once on eight tokens. Of tensors: the bytes of those that are kept.
"""

import json
import subprocess
import sys
import tempfile

from measure import Figure, Setup

_HEAD = """
import gc, json, sys, torch, transformers.models.llama.modeling_llama, tombola
from tombola.anatomy import read_anatomy
from tombola.gates import load
from tombola.mask import Mask
from tombola.objective import Objective, load_weights
from tombola.scope import scope_parameters
from tombola.source import resolve_model
from tombola.ticket import Ticket, Weights

def memory(name):
    lines = (line.split() for line in open("/proc/self/status"))
    return next(int(words[1]) * 1024 for words in lines if words and words[0] == name + ":")

def say(**what):
    print(json.dumps({"above": memory("VmHWM") - before} | what))

source, folder, text = resolve_model("demo-decoder"), sys.argv[1], Objective(tokens=True)
torch.nn.functional.scaled_dot_product_attention(*torch.randn(3, 1, 1, 8, 8))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
"""
_STEPS = {
    "write": """
model = load_weights(source.folder, text, head_seed=0)
anatomy, ids = read_anatomy(model), Weights(source.name, source.fingerprint)
weights = {name: parameter.detach().abs() for name, parameter in scope_parameters(model, anatomy, "body").items()}
mask = Mask(values={name: weight > weight.median() for name, weight in weights.items()})
n = sum(one.numel() for one in weights.values())
summary = anatomy.summary()
del model, weights
gc.collect()
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
ticket = Ticket(mask=mask, base=ids, found_on=ids, anatomy=summary, kind="good", scope="body", sparsity=0.5,
                task="wikitext2", settings={"objective": text.describe()})
ticket.save_pretrained(folder)
say(values=n)
""",
    "dense": """
model = load_weights(source.folder, text, head_seed=0)
with torch.no_grad():
    model(input_ids=torch.arange(8)[None])
say(weights=sum(p.numel() * p.element_size() for p in model.parameters()))
""",
    "load": """
model = load(folder, "base")
held = sum(mask.numel() for mask in model.tombola_gates.held.values.values())
weights = sum(p.numel() * p.element_size() for p in model.parameters())
say(tensors=weights + held)
""",
}


def ticket_memory(setup: Setup, task: str) -> list[Figure]:
    """Peaks of packing and saving a ticket, and of loading the model with it, as shares of the memory of the model."""
    with tempfile.TemporaryDirectory() as folder:
        said = {name: _run(code, folder) for name, code in _STEPS.items()}
    weights, dense = said["dense"]["weights"], said["dense"]["above"]
    model = f"{weights / 2**20:,.0f} MiB of weights; {dense / 2**20:,.0f} MiB at the peak of a process that loads and runs it"
    note = f"of the model's memory ({model}); a ticket of {said['write']['values']:,} values, a byte each while it is held"
    saved, loaded = said["write"]["above"], said["load"]["above"]
    return [
        Figure("ticket", "decoder", "pack, save", [saved / weights], note),
        Figure("ticket", "decoder", "load, tensors", [said["load"]["tensors"] / weights], note),
        Figure("ticket", "decoder", "load, process", [loaded / dense], note),
    ]


def _run(code: str, folder: str) -> dict[str, int]:
    ran = subprocess.run([sys.executable, "-c", _HEAD + code, folder], check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found
