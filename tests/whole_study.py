"""Made-up results of a whole study, as `collect` hands them on: what Prasanna et al. 2020 ask, on any tasks and seeds."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from tombola.attention.known import CLASSES
from tombola.stats import mantel, overlap
from tombola.study import survival
from tombola.study.beside_rows import AttentionRow, CrossedMask, LandscapeRow, Magnitude, MapSample, SubgroupRow
from tombola.study.overlap import ErrorsRow, TransferRow, ValuesRow
from tombola.study.prasanna2020 import CUTS
from tombola.study.results import Agreement, ImportanceStep, PathStep, Results, ScoreRow, TicketRow
from tombola.study.variants import Variant

GLUE = {  # task: (metric, rows, majority, dense score)
    "cola": ("matthews", 1043, 0.0, 0.56),
    "sst2": ("accuracy", 872, 0.509, 0.926),
    "mrpc": ("accuracy", 408, 0.684, 0.839),
    "qqp": ("accuracy", 40430, 0.632, 0.909),
    "stsb": ("pearson", 1500, 0.0, 0.887),
    "mnli": ("accuracy", 9815, 0.354, 0.845),
    "qnli": ("accuracy", 5463, 0.505, 0.915),
    "rte": ("accuracy", 277, 0.527, 0.632),
    "wnli": ("accuracy", 71, 0.563, 0.338),
}
LOST = {"good": 0.08, "random": 0.3, "bad": 0.42, "strict-bad": 0.45, "inverted": 0.5, "inverted-revived": 0.45}
SEARCHES: dict[str, dict[str, Any]] = {
    "s-prune": {"method": "s-prune", "procedure": "joint"},
    "s-prune-heads": {"method": "s-prune", "procedure": "heads"},
    "s-prune-mlps": {"method": "s-prune", "procedure": "mlps"},
    "m-prune": {"method": "m-prune", "criterion": "magnitude"},
}
VALUES = 85_008_384
MATRICES = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense", "intermediate.dense",
            "output.dense")  # fmt: skip


class Maker:
    """Draws everything from one seed, so that the same call makes the same study."""

    def __init__(self, tasks: Sequence[str], seeds: Sequence[int], layers: int, heads: int) -> None:
        self.draw = random.Random(7)
        self.tasks, self.seeds, self.layers, self.heads = tasks, seeds, layers, heads
        self.scores: list[ScoreRow] = []
        self.tickets: list[TicketRow] = []
        self.lesions: list[ScoreRow] = []
        self.variants: dict[str, Variant] = {}
        self.beside: dict[str, list[Any]] = {
            name: [] for name in ("attention", "map_samples", "magnitudes", "landscape", "subgroups", "crossed")
        }
        self.cells = 0

    def variant(self, task: str, **settings: Any) -> str:
        """The name of rows with these settings."""
        every = {"selection_split": "dev", "epochs": 3, "preset": "corrected", "mask": "as found"} | settings
        differing = {name: str(every[name]) for name in sorted({*every} - {"preset"})}
        name = f"{task} ({', '.join(f'{key}={value}' for key, value in differing.items())})"
        self.variants[name] = Variant(task, every, differing)
        return name

    def cell(self) -> str:
        self.cells += 1
        return f"{self.cells * 2654435761 % 16**8:08x}" * 4

    def score(
        self, task: str, name: str, seed: int, kind: str, stage: str, draw: int = 0, lost: float | None = None, **more: Any
    ) -> None:
        """On report and on selection rows."""
        metric, n, majority, dense = GLUE[task]
        lost = LOST.get(kind, 0.0) if lost is None else lost
        lost *= 0.5 if stage == "retrained" else 1.0
        value = dense - lost * max(0.1, dense - majority) * 1.6 + self.draw.gauss(0, 0.004 if kind in ("full", "good") else 0.02)
        cell = self.cell()
        agreement = None
        if kind != "full" and metric != "pearson":
            yes = self.draw.randint(n // 3, n)
            agreement = Agreement(n // 9, n, n // 10, n // 90, {"no": n // 2, "yes": n - n // 2}, {"no": n - yes, "yes": yes})
        for split, role, rows in (("validation", "report", n), ("train-held-out", "selection", 500)):
            if metric == "accuracy":
                value = round(value * rows) / rows
            self.scores.append(
                ScoreRow(
                    cell=cell,
                    model="bert-base-uncased",
                    task=name,
                    seed=seed,
                    kind=kind,
                    stage=stage,
                    draw=draw,
                    split=split,
                    role=role,
                    metric=metric,
                    value=value,
                    n=rows,
                    majority=majority,
                    agreement=agreement if role == "report" else None,
                    **{"search": str(self.variants[name].settings.get("method", "")), "family": "as found", "preset": "corrected"}
                    | more,
                )
            )

    def masks(self, seed: int, kept_heads: int, kept_mlps: int) -> tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]:
        """Heads that like the middle layers, so that seeds and tasks agree somewhat."""
        units = [(layer, head) for layer in range(self.layers) for head in range(self.heads)]
        liked = {unit: self.draw.random() + 0.5 * ((unit[0] * 7 + unit[1] * 5) % 3 == 0) for unit in units}
        kept = set(sorted(units, key=lambda unit: liked[unit], reverse=True)[:kept_heads])
        mlps = sorted(range(self.layers), key=lambda layer: self.draw.random() + 0.4 * (2 < layer < 9), reverse=True)[:kept_mlps]
        return (
            tuple(tuple(float((layer, head) in kept) for head in range(self.heads)) for layer in range(self.layers)),
            tuple(float(layer in mlps) for layer in range(self.layers)),
        )

    def ticket(self, task: str, name: str, search: str, seed: int, kind: str, draw: int = 0, **more: Any) -> TicketRow:
        n, by_value = self.layers * self.heads, search == "m-prune" or more.pop("by_value", False)
        kept_heads = n if search == "s-prune-mlps" else self.draw.randint(n // 3, n - 2)
        kept_mlps = self.layers if search == "s-prune-heads" else self.draw.randint(self.layers // 2, self.layers - 1)
        heads, mlps = self.masks(seed, kept_heads, kept_mlps)
        values = None
        if by_value:
            kept = self.draw.randint(VALUES // 3, VALUES // 2)
            heads = tuple(tuple(round(self.draw.uniform(0.4, 0.6), 4) for _ in row) for row in heads)
            mlps, values = tuple(round(self.draw.uniform(0.4, 0.6), 4) for _ in mlps), (kept, VALUES)
        share = kept / VALUES if values else (kept_heads + 24 * kept_mlps) / (n + 24 * self.layers)
        row = TicketRow(
            cell=self.cell(),
            model="bert-base-uncased",
            task=name,
            seed=seed,
            kind=kind,
            draw=draw,
            heads=heads,
            mlps=mlps,
            body_share=share,
            total_share=0.22 + 0.78 * share,
            values=values,
            scope="prasanna2020" if values else "heads+mlps",
            shared_with_good={"values": kept // 2} if values else {},
            search=search,
            family=str(self.variants[name].settings["mask"]),
            preset="corrected",
            **more,
        )
        self.tickets.append(row)
        return row

    def good(self, task: str, name: str, search: str, seed: int) -> None:
        """A good ticket with its path and importances."""
        dense, n = GLUE[task][3], self.layers * self.heads
        kinds = {"joint": (14, 1)} | {"heads": (7, 0), "mlps": (0, 1)}
        path, steps, left = [PathStep(0, "full", {"heads": n, "mlps": self.layers}, dense, True)], [], [n, self.layers]
        if search == "m-prune":
            path = [PathStep(0, "full", {"values": VALUES}, dense, True)]
            for i in range(1, 15):
                path.append(PathStep(i, "m-prune", {"values": int(VALUES * 0.95**i)}, dense * (1 - 0.0006 * i**2), i < 14))
        else:
            for phase, (h, m) in kinds.items():
                for i in range(5):
                    left = [max(1, left[0] - h), max(1, left[1] - m)] if i < 4 else left
                    score = dense * (1 - 0.006 * len(path)) if i < 4 else dense * 0.85
                    path.append(PathStep(len(path), phase, {"heads": left[0], "mlps": left[1]}, score, i < 4))
            for one in (one for one in path if one.passed):
                drawn = sorted(self.draw.expovariate(4.0) for _ in range(one.kept["heads"]))
                blocks = sorted(self.draw.expovariate(9.0) for _ in range(one.kept["mlps"]))
                steps.append(ImportanceStep(one.step, tuple(drawn), tuple(blocks), drawn[len(drawn) // 10], blocks[0] * 1.01))
        importance = tuple(tuple(self.draw.expovariate(1) for _ in range(self.heads)) for _ in range(self.layers))
        more: dict[str, Any] = {"path": tuple(path), "floor_score": 0.9 * dense, "full_score": dense, "selection_rows": 500}
        if search != "m-prune":
            more |= {"steps": tuple(steps), "head_importance": importance, "mlp_importance": tuple(row[0] for row in importance)}
        self.ticket(task, name, search, seed, "good", **more)

    def task(self, task: str) -> None:
        """Every experiment on one task."""
        for seed in self.seeds:
            for search, settings in SEARCHES.items():
                name = self.variant(task, **settings)
                self.score(task, name, seed, "full", "full")
                self.good(task, name, search, seed)
                kinds = ["good", *(["random", "bad"] if search in ("s-prune", "m-prune") else [])]
                kinds += ["inverted", "inverted-revived"] if search == "s-prune" else []
                for kind in kinds:
                    if kind != "good":
                        self.ticket(task, name, search, seed, kind)
                    for stage in ("pruned", "retrained"):
                        self.score(task, name, seed, kind, stage)
                if search == "s-prune":
                    for kind, lost in (
                        ("dense-random-init", 0.9),
                        ("frozen", 0.6),
                        ("random-init", 0.9),
                        ("random-init-frozen", 0.95),
                    ):
                        self.score(task, name, seed, kind, "retrained", lost=lost)
            joint = SEARCHES["s-prune"]
            for family, by_value in (("joined", False), ("super", False), ("size-matched", True)):
                name = self.variant(task, **joint, mask=family)
                for kind in ("good", "random", "bad") if family != "joined" else ("good",):
                    self.ticket(task, name, "s-prune", seed, kind, by_value=by_value)
                    for stage in ("pruned", "retrained"):
                        self.score(task, name, seed, kind, stage)
                self.score(task, name, seed, "full", "full")
            for epochs in (4, 5, 6):
                self.score(task, self.variant(task, **joint, epochs=epochs), seed, "bad", "retrained")
            name = self.variant(task, **joint, selection_split="train")
            self.good(task, name, "s-prune", seed)
            self.score(task, name, seed, "good", "pruned")
            for criterion in ("magnitude", "random"):
                for sparsity in (0.2, 0.5, 0.7):
                    name = self.variant(task, method="one-shot", criterion=criterion, sparsity=sparsity)
                    self.score(task, name, seed, "good", "pruned", lost=sparsity**2 * (1 if criterion == "magnitude" else 2.5))
                    self.score(task, name, seed, "full", "full")
            self.cuts(task, seed)
            self.looks(task, seed)
        self.samples(task)

    def cuts(self, task: str, seed: int) -> None:
        name = self.variant(task, **SEARCHES["s-prune"])
        metric, n, majority, dense = GLUE[task]
        places = {
            "all": [""],
            "each": [f", layer {i}" for i in range(self.layers)],
            "pairs": [f", layers {i}-{i + 1}" for i in range(self.layers - 1)],
        }
        for cuts in CUTS.values():
            for cut in cuts:
                cell = self.cell()
                for place in places[cut.where]:
                    value = dense - self.draw.random() * (0.4 if not place else 0.08)
                    self.lesions.append(
                        ScoreRow(
                            cell=cell,
                            model="bert-base-uncased",
                            task=name,
                            seed=seed,
                            kind="lesion",
                            stage="pruned",
                            draw=0,
                            split="validation",
                            role="report",
                            metric=metric,
                            value=value,
                            n=n,
                            majority=majority,
                            lesion=f"{cut}{place}",
                        )
                    )

    def looks(self, task: str, seed: int) -> None:
        """Attention, landscape, groups, and the crossed design."""
        name = self.variant(task, **SEARCHES["s-prune"])
        said = {
            "f1": 0.81,
            "split": "validation",
            "norm_map_weight": "out_projection",
            "map_inputs": "full_real_tokens",
            "map_preprocess": "same",
            "pattern_split": "stratified_kfold",
        }
        for weights in ("fine_tuned", *(["pretrained"] if seed == self.seeds[0] else [])):
            for kind in ("raw", "weighted"):
                cell = self.cell()
                for layer in range(self.layers):
                    for head in range(self.heads):
                        drawn = [self.draw.randint(0, 6) for _ in CLASSES]
                        counts, n = dict(zip(CLASSES, drawn, strict=True)), sum(drawn)
                        self.beside["attention"].append(
                            AttentionRow(
                                cell=cell,
                                model="bert-base-uncased",
                                task=name,
                                seed=seed if weights == "fine_tuned" else None,
                                weights=weights,
                                kind=kind,
                                layer=layer,
                                run=0,
                                head=head,
                                n=n,
                                unclassified=0,
                                counts=counts,
                                shares={c: k / n for c, k in counts.items()} if n else {},
                                means={"entropy": self.draw.random(), "distance": 3.0, "mass_cls": 0.2, "mass_sep": 0.3},
                                **said,
                            )
                        )
        for weights, of in (("fine_tuned", seed), *((("pretrained", None),) if seed == self.seeds[0] else ())):
            cell = self.cell()
            for layer in range(self.layers):
                for head in (None, *range(self.heads)):
                    self.beside["magnitudes"].append(
                        Magnitude(
                            cell=cell,
                            model="bert-base-uncased",
                            task=name,
                            seed=of,
                            weights=weights,
                            part="mlps" if head is None else "heads",
                            layer=layer,
                            head=head,
                            mean_abs=0.03 + self.draw.random() / 100,
                        )
                    )
        for kind in ("full", "good", "random", "bad"):
            line = kind != "full"
            at = (0.0, 0.25, 0.5, 0.75, 1.0) if line else ()
            losses = tuple(0.4 + self.draw.random() * 0.1 + 0.3 * x * (1 - x) for x in at)
            for role, split in (("train", "train"), ("report", "validation")):
                self.beside["landscape"].append(
                    LandscapeRow(
                        cell=self.cell(),
                        model="bert-base-uncased",
                        task=name,
                        seed=seed,
                        kind=kind,
                        draw=0,
                        role=role,
                        split=split,
                        n=500,
                        loss=0.4,
                        at=at,
                        losses=losses,
                        over_line=0.05 if line else None,
                        over_ends=0.02 if line else None,
                        barrier_at=0.5 if line else None,
                        sharpness=self.draw.random(),
                        rises=(0.1, 0.2),
                        radius=0.05,
                        search="s-prune" if line else "",
                    )
                )
            if task == "mnli":
                for group in ("lexical overlap", "subsequence", "constituent"):
                    self.beside["subgroups"].append(
                        SubgroupRow(
                            cell=self.cell(),
                            model="bert-base-uncased",
                            task=name,
                            seed=seed,
                            kind=kind,
                            stage="retrained" if line else "full",
                            draw=0,
                            split="hans",
                            role="challenge",
                            group=group,
                            metric="accuracy",
                            value=0.5 + self.draw.random() / 5,
                            n=10000,
                            majority=0.5,
                        )
                    )
        if seed == self.seeds[0]:
            for a in (0, 1):
                for b in (0, 1):
                    for c in (0, 1):
                        heads, mlps = self.masks(seed, self.layers * self.heads // 2, self.layers // 2)
                        self.beside["crossed"].append(
                            CrossedMask(
                                cell=self.cell(),
                                model="bert-base-uncased",
                                task=name,
                                search="s-prune",
                                head_seed=a,
                                data_seed=b,
                                dropout_seed=c,
                                heads=heads,
                                mlps=mlps,
                            )
                        )

    def samples(self, task: str) -> None:
        name = self.variant(task, **SEARCHES["s-prune"])
        for kind in ("raw", "weighted"):
            for weights in ("fine_tuned", "pretrained"):
                for label in CLASSES:
                    pixels = tuple(tuple(255 if i == j else self.draw.randint(0, 60) for j in range(32)) for i in range(32))
                    self.beside["map_samples"].append(
                        MapSample(
                            cell=self.cell(),
                            model="bert-base-uncased",
                            task=name,
                            seed=None,
                            weights=weights,
                            kind=kind,
                            name=f"{kind}-{label}",
                            layer=3,
                            run=0,
                            head=4,
                            tokens=32,
                            probability=0.9,
                            row="dev-1",
                            label=label,
                            pixels=pixels,
                        )
                    )


def shared(results: Results, layers: int) -> dict[str, tuple[Any, ...]]:
    """What a store is asked for beside rows: single values in common, errors, and tickets tested on other tasks."""
    draw = random.Random(8)
    values: list[ValuesRow] = []
    errors: list[ErrorsRow] = []
    transfers: list[TransferRow] = []
    found = [(case, of) for case, of in survival.cases(results.tickets).items() if case.family == "as found"]
    for case, of in found:
        seeds = tuple(sorted(of))
        pairs = len(seeds) * (len(seeds) - 1) // 2
        if case.search == "m-prune" and pairs:
            for other in dict.fromkeys(one.task for one, _ in found):
                names = (
                    ["all"]
                    if other != case.task
                    else ["all", *(f"layer.{i}.{kind}.weight" for kind in MATRICES for i in range(layers))]
                )
                for name in names:
                    kappa = round(draw.uniform(-0.2, 0.9), 3) if other == case.task else None
                    said = (case.model, case.search, case.task, other, name, 1000, pairs, 0.5, 0.4)
                    values.append(ValuesRow(*said, 300.0, 250.0, 260.0, 1.2, 300 / 260, kappa, case))
        elif case.search == "s-prune" and len(seeds) > 2:
            alike = {(a, b): (draw.random(), draw.random()) for a in seeds for b in seeds if a < b}
            tables = [[[1.0 if a == b else alike[min(a, b), max(a, b)][at] for b in seeds] for a in seeds] for at in (0, 1)]
            errors.append(ErrorsRow(case, "heads", "report", seeds, alike, mantel(*tables, draws=99)))
            source = next(of for one, of in found if one.search == "s-prune")
            for seed in seeds:
                both = {part: overlap(*(survival.mask_of(one[seed], part) for one in (source, of))) for part in survival.PARTS}
                first = source[seed].task.partition(" ")[0]
                if first != case.task:
                    said = (case.model, case.search, first, case.task, seed, "pruned", both, "accuracy")
                    transfers.append(TransferRow(*said, 0.7 + seed / 100, 0.75, 0.8))
    return {"shared_values": tuple(values), "shared_errors": tuple(errors), "transfers": tuple(transfers)}


def whole_study(
    tasks: Sequence[str] = tuple(GLUE), seeds: Sequence[int] = (0, 1, 2, 3, 4), layers: int = 12, heads: int = 12
) -> Results:
    """Every experiment on these tasks and seeds, on a model of this size."""
    maker = Maker(tasks, seeds, layers, heads)
    for task in tasks:
        maker.task(task)
    beside = {name: tuple(rows) for name, rows in maker.beside.items()}
    results = Results(
        tuple(maker.scores),
        tuple(maker.tickets),
        {"preset": "corrected", "floor": 0.9},
        {"tombola": "0.1.0", "cost": "31.2 device-hours"},
        (),
        tuple(maker.lesions),
        variants=maker.variants,
        command="tombola study run prasanna2020",
        **beside,
    )
    return replace(results, **shared(results, layers))


def only(results: Results, seeds: Sequence[int]) -> Results:
    """The same study with these seeds alone."""
    kept: dict[str, Any] = {
        name: tuple(row for row in getattr(results, name) if row.seed in seeds) for name in ("scores", "tickets", "lesions")
    }
    return replace(results, **kept)


def cells_of(results: Results) -> Iterator[str]:
    """Keys of all cells."""
    yield from (row.cell for row in (*results.scores, *results.tickets))
