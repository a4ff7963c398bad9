"""Hidden tokens and answers within a text: against transformers' own models and tokenizers, official rules, and hand cases."""

import copy
import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from conftest import WORDS, Run, sentiment_rows
from tombola.anatomy import read_anatomy
from tombola.criteria import Given as Wanted
from tombola.criteria import mean_gradients
from tombola.errors import DataError, TombolaError
from tombola.evaluate import Predictions, agreement, predict, score
from tombola.gates import Gates, hold, prove_acts
from tombola.mask import Mask
from tombola.objective import Objective, load_weights
from tombola.scores import summed_loss
from tombola.study.cells import Lab, read_json, read_rows
from tombola.study.chains import plan_chains
from tombola.study.jobs import open_lab
from tombola.study.runs import plan_find, plan_retrain
from tombola.study.settings import resolve
from tombola.study.steps.shared import ticket_of
from tombola.tasks import corpus_task, get_task, load_rows, spec_of
from tombola.tasks.base import Rows
from tombola.tasks.encode import batches, collate, encode
from tombola.tasks.mlm import Masking, blocks, lines_of
from tombola.tasks.squad import Spans, answer_f1, exact_match, normalised, scored, windows
from tombola.train import RunSeeds, TrainSettings, fine_tune

MASKED, SPAN = Objective((), form="masked"), Objective((), form="span")
SEEDS = RunSeeds(head=0, data=1, dropout=0, mask=0)


def corpus(n: int, seed: int = 3, split: str = "t") -> Rows:
    texts = [row["sentence"] for row in sentiment_rows(n, seed)]
    return Rows(tuple(f"{split}:{i}" for i in range(n)), tuple((text,) for text in texts), (None,) * n)


def questions(n: int, seed: int = 3) -> Rows:
    """The word of sentiment of a sentence is asked for."""
    texts, answers = [], []
    for row in sentiment_rows(n, seed):
        word = next(word for word in row["sentence"].split() if word in WORDS[14:22])
        texts.append(("the film", row["sentence"]))
        answers.append(((row["sentence"].index(word), word),))
    return Rows(tuple(f"q:{i}" for i in range(n)), tuple(texts), (None,) * n, answers=tuple(answers))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


# ------------------------------------------------------------------------------------------------------------ hidden tokens


def test_blocks_are_the_corpus_end_to_end_and_the_last_partial_one_is_dropped(tokenizer: Any) -> None:
    rows = corpus(40)
    found = blocks(tokenizer, rows, 16)
    tokens = [t for text in rows.texts for t in tokenizer(text[0], add_special_tokens=False)["input_ids"]]
    assert [t for block in found for t in block[1:-1]] == tokens[: len(tokens) // 14 * 14]
    assert {len(block) for block in found} == {16} and {(b[0], b[-1]) for b in found} == {(2, 3)}
    for n, length in ((1, 64), (40, 3)):
        with pytest.raises(DataError, match="too short for a single block"):
            blocks(tokenizer, corpus(n), length)


def test_a_tokenizer_without_a_mask_token_is_refused(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.mask_token = None
    with pytest.raises(DataError, match="no masked language model"):
        blocks(bare, corpus(9), 16)


def test_fifteen_percent_are_hidden_eighty_ten_ten() -> None:
    masking, ids = Masking(mask=4, vocabulary=1000, seed=0), (2, *range(500, 600), 3)
    kinds, places = {"mask": 0, "other": 0, "same": 0}, np.zeros(102)
    for epoch in range(400):
        one = masking.drawn(7, ids, seed=5, epoch=epoch)
        assert len(one.at) == 15 and tuple(sorted(set(one.at))) == one.at and one.at[0] > 0 and one.at[-1] < 101
        assert one.targets == tuple(ids[i] for i in one.at)
        assert all(a == b for i, (a, b) in enumerate(zip(one.inputs, ids, strict=True)) if i not in one.at)
        for i in one.at:
            kinds["mask" if one.inputs[i] == 4 else "same" if one.inputs[i] == ids[i] else "other"] += 1
            places[i] += 1
    n = 400 * 15
    for kind, share in (("mask", 0.8), ("other", 0.1), ("same", 0.1)):
        assert abs(kinds[kind] / n - share) < 4 * np.sqrt(share * (1 - share) / n)
    assert places[1:-1].std() / places[1:-1].mean() < 0.2, "every place as likely"


def test_training_masks_are_drawn_anew_and_evaluation_masks_never(tokenizer: Any) -> None:
    encoded = encode(tokenizer, corpus(60), 16, objective=MASKED)
    same = [collate(encoded, [0, 1])["at"].tolist() for _ in range(2)]
    assert same[0] == same[1]
    drawn = [collate(encoded, [0, 1], drawn=key)["at"].tolist() for key in ((0, 0), (0, 1), (1, 0), (0, 0))]
    assert drawn[0] == drawn[3] and len({str(one) for one in drawn}) == 3
    alone = encode(tokenizer, corpus(60).take(range(20)), 16, objective=MASKED)  # the same first blocks of a shorter corpus
    assert collate(alone, [1])["at"].tolist() == collate(encoded, [1])["at"].tolist()
    other = encode(tokenizer, corpus(60), 16, objective=MASKED, mlm={"eval_seed": 1, "weigh": "masked_tokens"})
    assert collate(other, [0, 1])["at"].tolist() != same[0]


def test_the_loss_and_its_gradient_are_those_of_transformers(tiny_folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForMaskedLM

    encoded = encode(tokenizer, corpus(60), 16, objective=MASKED)
    model = load_weights(tiny_folder, MASKED, head_seed=3)
    plain = AutoModelForMaskedLM.from_pretrained(tiny_folder)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pooler" not in k})
    batch = collate(encoded, [0, 3, 5])
    at, targets = batch["at"][:, :-1], batch["labels"][:, 1:]
    whole = torch.full_like(batch["input_ids"], -100).scatter(1, at, targets)
    theirs = plain.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=whole)
    ours = model(**batch)
    assert ours.logits.shape == (3, 3, len(tokenizer)), "of hidden tokens alone, and one that is not read"
    assert float(ours.loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-6)
    ours.loss.backward()
    theirs.loss.backward()
    grads = dict(plain.named_parameters())
    for name, p in model.named_parameters():
        if "pooler" not in name:
            assert torch.allclose(p.grad, grads[name].grad, atol=1e-7), name
    assert float(summed_loss(ours.logits, batch["labels"]).detach()) / 3 == pytest.approx(float(theirs.loss.detach()), rel=1e-6)
    bare = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.allclose(bare, theirs.logits, atol=1e-6), "without places it answers as ever"
    model.tombola_asked.remove()
    assert model(input_ids=batch["input_ids"]).logits.shape == theirs.logits.shape


def test_accuracy_and_likelihood_weigh_hidden_tokens_alike(tiny_folder: Path, tokenizer: Any) -> None:
    encoded = encode(tokenizer, corpus(60), 16, objective=MASKED)
    model = load_weights(tiny_folder, MASKED, head_seed=3)
    found = predict(model, encoded)
    right, total, log = 0, 0, 0.0
    for i in range(len(encoded)):
        batch = collate(encoded, [i])
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"]).logits[0]
        for place, target in zip(batch["at"][0, :-1].tolist(), batch["labels"][0, 1:].tolist(), strict=True):
            right += int(logits[place].argmax()) == target
            log -= float(cross_entropy(logits[place], torch.tensor(target)))
            total += 1
    accuracy, likelihood = score(found, "masked_accuracy"), score(found, "log_likelihood")
    assert accuracy.value == pytest.approx(right / total) and likelihood.value == pytest.approx(log / total, rel=1e-5)
    hidden = [encoded.masking.fixed(id, row["input_ids"]) for id, row in zip(encoded.ids, encoded.inputs, strict=True)]
    targets = [t for one in hidden for t in one.targets]
    counts = {t: targets.count(t) for t in targets}
    assert accuracy.majority == pytest.approx(max(counts.values()) / total)
    assert likelihood.majority == pytest.approx(sum(np.log(counts[t] / total) for t in targets) / total)
    with pytest.raises(DataError, match="no metric of these rows"):
        score(found, "accuracy")
    assert agreement(found, found).mean_difference == 0.0


def test_padded_tokens_weigh_blocks_alike() -> None:
    found = Predictions(
        ("a", "b"),
        torch.tensor([[1.0, -1.0], [0.0, -2.0]]),
        (None, None),
        (1, 3),
        ("masked_accuracy", "log_likelihood"),
        ((0.0, -3.0),) * 2,
    )
    assert score(found, "masked_accuracy").value == 0.25
    assert lines_of([Masking(4, 9, 0).fixed("x", (2, 5, 5, 5, 3))])[0] == (1.0, 0.0)


def test_a_masked_model_learns_and_its_pooler_is_that_of_the_base(tiny_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    encoded = encode(tokenizer, corpus(300), 16, objective=MASKED)
    model = load_weights(tiny_folder, MASKED, head_seed=3)
    base = load_weights(tiny_folder, ("a", "b"), head_seed=0)
    assert model.tombola_idle == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
    before = score(predict(model, encoded), "log_likelihood").value
    log = fine_tune(model, encoded, TrainSettings(learning_rate=5e-3, steps=60, batch_size=16), SEEDS)
    after = score(predict(model, encoded), "log_likelihood")
    assert after.value > before and after.value > after.majority - 0.2 and log.steps == 60
    assert torch.equal(model.bert.pooler.dense.weight, base.bert.pooler.dense.weight), "no gradient reaches it"
    model.save_pretrained(tmp_path)
    again = load_weights(tmp_path, MASKED, head_seed=9)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_mask_with_the_pooler_is_held_on_a_model_that_does_not_read_it(tiny_folder: Path) -> None:
    model = load_weights(tiny_folder, MASKED, head_seed=0)
    anatomy = read_anatomy(model)
    rng = torch.Generator().manual_seed(0)
    names = ["bert.pooler.dense.weight", "bert.encoder.layer.0.output.dense.weight"]
    mask = Mask(values={name: torch.rand(model.get_parameter(name).shape, generator=rng) < 0.5 for name in names})
    prove_acts(model, anatomy, mask)
    hold(model, anatomy, mask)
    assert not model.get_parameter(names[0])[~mask.values[names[0]]].any()


def test_what_works_on_classes_works_on_hidden_tokens(tiny_folder: Path, tokenizer: Any) -> None:
    """Gradients of gates and of weights, against the model's own loss with parts scaled and weights moved by hand."""
    from tombola.evaluate import score_and_gradients

    encoded = encode(tokenizer, corpus(30), 16, objective=MASKED)
    model = load_weights(tiny_folder, MASKED, head_seed=3)
    gradients = mean_gradients(Wanted(model=model, names=["bert.encoder.layer.1.output.dense.weight"], batches=batches(encoded)))
    twin = copy.deepcopy(model).double()

    def loss() -> float:
        with torch.no_grad():
            return float(np.mean([float(twin(**collate(encoded, [i])).loss) for i in range(len(encoded))]))

    weight = twin.get_parameter("bert.encoder.layer.1.output.dense.weight")
    for row, column in ((0, 0), (5, 7), (31, 40)):
        ends = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[row, column] += step
            ends.append(loss())
            with torch.no_grad():
                weight[row, column] -= step
        slope = (ends[0] - ends[1]) / 2e-5
        assert float(gradients["bert.encoder.layer.1.output.dense.weight"][row, column]) == pytest.approx(slope, abs=1e-7)
    with Gates(model, read_anatomy(model)) as gates:
        found, by_gate = score_and_gradients(gates, encoded)
    assert by_gate.heads.abs().max() > 0 and found.logits.shape == (len(encoded), 1)


def test_a_corpus_of_ones_own_is_known_by_what_is_in_it(tmp_path: Path, run: Run, tiny_folder: Path) -> None:
    for name, seed in (("a.txt", 1), ("b.txt", 2), ("c.txt", 1)):
        (tmp_path / name).write_text("\n".join(row["sentence"] for row in sentiment_rows(200, seed)))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": row["sentence"]}) + "\n" for row in sentiment_rows(200, 1)))
    one = corpus_task(train=tmp_path / "a.txt", validation=tmp_path / "b.txt")
    assert spec_of(one) == spec_of(corpus_task(train=tmp_path / "c.txt", validation=tmp_path / "b.txt"))
    assert spec_of(one) != spec_of(corpus_task(train=tmp_path / "b.txt", validation=tmp_path / "a.txt"))
    assert spec_of(one) == spec_of(corpus_task(train=tmp_path / "a.jsonl", validation=tmp_path / "b.txt"))
    with pytest.raises(DataError, match="serves twice"):
        corpus_task(train=tmp_path / "a.txt", validation=tmp_path / "a.txt")
    with pytest.raises(DataError, match="no such files"):
        corpus_task(train=tmp_path / "z.txt", validation=tmp_path / "a.txt")
    (tmp_path / "e.txt").write_text("\n\n")
    with pytest.raises(DataError, match="no words"):
        corpus_task(train=tmp_path / "e.txt", validation=tmp_path / "a.txt")
    told = ["find", tiny_folder, "mlm", "--train", tmp_path / "a.txt", "--validation", tmp_path / "b.txt", "--method", "imp"]
    told += ["--store", tmp_path / "s", "--set", "max_length=16", "--set", "steps=3", "--set", "imp_last_level=0.2", "--json"]
    code, out, err = run(*told)
    assert code == 0, err
    assert {m["metric"] for t in json.loads(out)["tickets"] for m in t.get("scores", t.get("metrics", []))} <= {
        "masked_accuracy",
        "log_likelihood",
    }


# ----------------------------------------------------------------------------------------------------- answers within a text


@pytest.mark.parametrize(
    ("text", "bare"),
    [("The Cat.", "cat"), ("an  apple, a day", "apple day"), ("U.S.A.", "usa"), ("Theatre", "theatre"), ("—", "—"), ("the", "")],
)
def test_answers_are_normalised_as_the_official_script_does(text: str, bare: str) -> None:
    assert normalised(text) == bare


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "exact"),
    [
        ("the Denver Broncos", "Denver Broncos", 1.0, 1.0),
        ("Denver", "Denver Broncos", 2 / 3, 0.0),
        ("gold gold", "gold", 2 / 3, 0.0),  # a word counts as often as it stands in both
        ("in 1858 in Lourdes", "1858", 0.4, 0.0),
        ("", "the", 1.0, 1.0),  # both are nothing once normalised
        ("", "1858", 0.0, 0.0),
        ("no", "yes", 0.0, 0.0),
    ],
)
def test_f1_and_exact_match_of_hand_cases(answer: str, gold: str, f1: float, exact: float) -> None:
    assert answer_f1(answer, gold) == pytest.approx(f1) and exact_match(answer, gold) == exact
    assert scored(answer, ["nothing like it", gold])[0] == pytest.approx(f1), "the best of several gold answers"


def test_windows_are_those_of_the_tokenizer_itself(tokenizer: Any) -> None:
    """transformers counts the overlap, and we from one beginning to the next, as the official script does."""
    rng = random.Random(0)
    contexts = [" ".join(rng.choice(WORDS) for _ in range(n)) for n in (3, 11, 12, 13, 25, 60)]
    rows = Rows(
        tuple(f"q:{i}" for i in range(6)), tuple(("a film", c) for c in contexts), (None,) * 6,
        answers=tuple(((0, c.split()[0]),) for c in contexts),
    )  # fmt: skip
    room, stride = 16 - 5, 4
    ours = windows(tokenizer, rows, 16, stride)
    theirs = tokenizer(
        ["a film"] * 6, contexts, truncation="only_second", max_length=16, stride=room - stride,
        return_overflowing_tokens=True, return_offsets_mapping=True,
    )  # fmt: skip
    assert [list(w.inputs["input_ids"]) for w in ours.windows] == theirs["input_ids"]
    assert [list(w.inputs["token_type_ids"]) for w in ours.windows] == theirs["token_type_ids"]
    assert [w.question for w in ours.windows] == theirs["overflow_to_sample_mapping"]
    for w, spans in zip(ours.windows, theirs["offset_mapping"], strict=True):
        for mine, span, kind in zip(w.spans, spans, w.inputs["token_type_ids"], strict=True):
            assert mine is None or (kind == 1 and mine == tuple(span))
    for number in range(6):  # each token of a context is answered for exactly once, by the window with most around it
        mine = [w for w in ours.windows if w.question == number]
        places = [span for w in mine for span, yes in zip(w.spans, w.answers_for, strict=True) if yes]
        assert len(places) == len(set(places)) == len(contexts[number].split())


@pytest.mark.parametrize("stride", [0, 12, 99])
def test_a_stride_that_leaves_gaps_is_refused(tokenizer: Any, stride: int) -> None:
    with pytest.raises(DataError, match="leave gaps"):
        windows(tokenizer, questions(2), 16, stride)


def test_the_best_span_is_that_of_trying_all(tokenizer: Any) -> None:
    found = windows(tokenizer, questions(12), 10, 3)
    rng = np.random.default_rng(0)
    logits = [rng.normal(size=(2, len(w.spans))).astype(np.float32) for w in found.windows]
    answers = found.answers(logits)
    for number, answer in enumerate(answers):
        best = (-np.inf, "")
        for w, (begins, ends) in zip(found.windows, logits, strict=True):
            if w.question != number:
                continue
            for a, first in enumerate(w.spans):
                for b, last in enumerate(w.spans):
                    if first and last and a <= b and w.answers_for[a] and begins[a] + ends[b] > best[0]:
                        best = (begins[a] + ends[b], found.contexts[number][first[0] : last[1]])
        assert answer == best[1]


def test_training_labels_point_at_the_first_answer_or_at_nothing(tokenizer: Any) -> None:
    rows = questions(30)
    found = windows(tokenizer, rows, 10, 3)
    whole = 0
    for w in found.windows:
        a, b = w.label
        if (a, b) != (0, 0):
            begin, end = w.spans[a], w.spans[b]
            assert begin is not None and end is not None
            assert found.contexts[w.question][begin[0] : end[1]] == found.golds[w.question][0]
            whole += 1
        else:
            start = rows.answers[w.question][0][0]
            assert not any(span and span[0] <= start < span[1] for span in w.spans)
    assert whole >= 30


def test_the_loss_of_spans_is_that_of_transformers_and_padding_plays_no_part(tiny_folder: Path, tokenizer: Any) -> None:
    from transformers import AutoModelForQuestionAnswering

    encoded = encode(tokenizer, questions(40), 14, objective=SPAN, stride=4)
    model = load_weights(tiny_folder, SPAN, head_seed=2)
    plain = AutoModelForQuestionAnswering.from_pretrained(tiny_folder)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "pooler" not in k})
    plain.eval()
    lengths = encoded.lengths
    same = [i for i, n in enumerate(lengths) if n == max(lengths)][:4]
    batch = collate(encoded, same)
    theirs = plain(
        **{n: v for n, v in batch.items() if n != "labels"},
        start_positions=batch["labels"][:, 1],
        end_positions=batch["labels"][:, 2],
    )
    assert float(model(**batch).loss.detach()) == pytest.approx(float(theirs.loss.detach()), rel=1e-6)
    short = min(range(len(encoded)), key=lengths.__getitem__)

    def loss(rows: list[int]) -> float:
        ready = collate(encoded, rows)
        return float(summed_loss(model(**ready).logits[:1], ready["labels"][:1]).detach())

    assert loss([short]) == pytest.approx(loss([short, same[0]]), rel=1e-5)


def test_a_model_learns_to_answer(tiny_folder: Path, tokenizer: Any) -> None:
    train, dev = (encode(tokenizer, questions(n, seed), 16, objective=SPAN, stride=6) for n, seed in ((200, 1), (40, 2)))
    model = load_weights(tiny_folder, SPAN, head_seed=0)
    fine_tune(model, train, TrainSettings(learning_rate=5e-3, epochs=2, batch_size=16), SEEDS)
    found = predict(model, dev)
    assert len(found.ids) == 40 and found.ids[0] == "q:0"
    f1, exact = score(found, "answer_f1"), score(found, "exact_match")
    assert f1.value > 0.9 > f1.majority and exact.value > 0.8 and f1.n == 40


def squad_file(folder: Path, split: str, n: int, seed: int, **changes: Any) -> Path:
    (folder / "squad").mkdir(parents=True, exist_ok=True)
    rows, file = questions(n, seed), folder / "squad" / f"{split}.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as out:
        for i, ((question, context), answers) in enumerate(zip(rows.texts, rows.answers, strict=True)):
            said = {"text": [t for _, t in answers], "answer_start": [s for s, _ in answers]}
            out.write(
                json.dumps(
                    {"id": f"{seed}-{i}", "title": "x", "context": context, "question": question, "answers": said} | changes
                )
                + "\n"
            )
    return file


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"answers": {"text": ["zebra"], "answer_start": [3]}}, "does not stand in its context where it is said to"),
        ({"answers": {"text": ["the"], "answer_start": [999]}}, "does not stand in its context"),
        ({"answers": {"text": [], "answer_start": []}}, "answers are none"),
        ({"answers": "the"}, "answers have no text"),
        ({"id": "same"}, "id repeats that of an earlier row"),
        ({"context": None}, "context is no text"),
        ({"question": " "}, "question is empty"),
    ],
)
def test_bad_rows_of_squad_are_all_said(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    squad_file(tmp_path, "validation", 4, 1, **changes)
    with pytest.raises(DataError, match="bad data") as caught:
        load_rows(get_task("squad"), "report", data_dir=tmp_path)
    assert said in str(caught.value)


def test_squad_rows_are_read_and_their_answers_are_part_of_their_fingerprint(tmp_path: Path) -> None:
    squad_file(tmp_path, "validation", 5, 1)
    rows = load_rows(get_task("squad"), "report", data_dir=tmp_path)
    assert rows.ids[0] == "validation:1-0" and rows.answers == questions(5, 1).answers and rows.labels == (None,) * 5
    assert rows.take([2]).answers == (rows.answers[2],)


# ------------------------------------------------------------------------------------------------------------------ as cells


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    folder = tmp_path_factory.mktemp("asked")
    squad_file(folder / "data", "train", 120, 1)
    squad_file(folder / "data", "validation", 30, 2)
    (folder / "data" / "wikitext2").mkdir()
    for split, seed in (("train", 1), ("validation", 2)):
        rows = [{"text": " ".join(row["sentence"] for row in sentiment_rows(300, seed)[i : i + 10])} for i in range(0, 300, 10)]
        (folder / "data" / "wikitext2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return open_lab(folder / "store", folder / "data")


def chain(lab: Lab, model: Path, task: str, preset: str = "corrected", **changes: Any) -> Any:
    said = {"max_length": 16, "stride": 6, "batch_size": 16, "learning_rate": 3e-3, "imp_last_level": 0.2, "padding": "bucketed"}
    said |= {"steps": 6} if task.startswith("mlm") else {"epochs": 1}
    settings = resolve(said | changes, (0,), method="imp", preset=preset)
    return plan_chains(lab, str(model), task, settings, (0,))[0]


def test_chains_on_hidden_tokens_and_on_answers_have_the_same_maskable_values_as_on_classes(lab: Lab, tiny_folder: Path) -> None:
    found = {}
    for task in ("mlm-wikitext2", "squad"):
        one = chain(lab, tiny_folder, task)
        lab.run(one.cells)
        found[task] = ticket_of(lab, one.levels[-1])
        kept, n = found[task].mask.counts_by_type()["values"]
        assert n - kept == round(0.2 * n) and n == 2 * (4 * 32 * 32 + 2 * 32 * 48) + 32 * 32, (
            "the matrices of the body and the pooler"
        )
        rows = read_rows(lab.folder(one.last) / "scores.jsonl")
        wanted = {"mlm-wikitext2": {"masked_accuracy", "log_likelihood"}, "squad": {"answer_f1", "exact_match"}}[task]
        assert {row["metric"] for row in rows} == wanted
        again = predictions = read_rows(lab.folder(one.last) / "predictions.jsonl")
        assert set(again[0]) >= {"measures", "lines", "logits"} and predictions
    assert found["squad"].mask.values.keys() == found["mlm-wikitext2"].mask.values.keys()
    across = plan_retrain(chain(lab, tiny_folder, "mlm-wikitext2").levels[-1], chain(lab, tiny_folder, "squad").dense)
    lab.run([across])
    assert (lab.folder(across) / "scores.jsonl").is_file(), "a ticket of one task trained on another"


def test_the_length_of_a_round_is_counted_in_windows(lab: Lab, tiny_folder: Path) -> None:
    one = chain(lab, tiny_folder, "squad", imp_last_level=0.1, max_length=12, stride=3)
    lab.run([one.dense])
    said = read_json(lab.folder(one.dense) / "train.json")
    assert one.plan[0].steps == said["steps"] > -(-said["rows"] // 16), "more windows than questions"


def test_faults_of_the_released_mlm_script_act_on_mlm_alone(lab: Lab, tiny_folder: Path) -> None:
    mlm, squad = (chain(lab, tiny_folder, task, preset="released", imp_last_level=0.2) for task in ("mlm-wikitext2", "squad"))
    assert [one.start for one in mlm.plan] == ["snapshot", "carried", "carried"]
    assert [one.start for one in squad.plan] == ["snapshot"] * 3
    assert mlm.dense.settings["data"]["mlm"] == {"eval_seed": 1, "weigh": "padded_tokens"}
    lab.run([mlm.levels[0]])
    assert not (lab.folder(mlm.levels[0]) / "train.json").exists(), "its first level is cut before any step"
    with pytest.raises(TombolaError):
        mlm.at(0.2)


def test_a_head_is_trained_alone(lab: Lab, tiny_folder: Path, tmp_path: Path, run: Run) -> None:
    from safetensors.torch import load_file

    told = ["head", tiny_folder, "mlm-wikitext2", "--out", tmp_path / "with", "--data", lab.data_dir, "--json"]
    told += ["--store", tmp_path / "s"]
    told += [x for y in ("max_length=16", "steps=40", "batch_size=16", "learning_rate=0.01") for x in ("--set", y)]
    code, out, err = run(*told)
    assert code == 0, err
    said = json.loads(out)
    assert said["steps"] == 40 and all(name.startswith("cls.") for name in said["trained"])
    before = load_file(tiny_folder / "model.safetensors")
    after = load_file(tmp_path / "with" / "model.safetensors")
    assert all(torch.equal(after[f"bert.{name}"], value) for name, value in before.items()), "the body is as it was, bit for bit"
    a, b = (load_weights(folder, MASKED, head_seed=0) for folder in (tiny_folder, tmp_path / "with"))
    assert not torch.equal(a.get_parameter(said["trained"][0]), b.get_parameter(said["trained"][0]))
    assert run(*told)[0] == 2, "a folder that is filled is left alone"


def test_settings_of_windows_and_blocks_name_no_cell_of_classes(
    lab: Lab, tiny_folder: Path, data_folder: Path, tmp_path: Path
) -> None:
    other = open_lab(tmp_path / "s", data_folder)
    (found,) = plan_find(other, str(tiny_folder), "sst2", resolve({"train_rows": 50}, (0,)), (0,))
    assert not {"stride", "mlm"} & set(found.dense.settings["data"])


def test_spans_hold_what_they_say() -> None:
    empty = Spans((), (), (), ())
    assert empty.answers([]) == ()
