"""Prompts and replies: the written task, rows of them, their scores by hand, losses of tokens against a biased language model."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tombola.bias import BIASED_LMS, TokenOpinions, token_opinions
from tombola.errors import DataError, SettingsError, TombolaError
from tombola.evaluate import Predictions, predict, score, subgroup_scores
from tombola.objective import Objective, load_weights
from tombola.small_lm import word_tokenizer, write_small_lm
from tombola.study.cells import Lab, read_json
from tombola.study.data import same_data
from tombola.study.jobs import open_lab
from tombola.study.liu2022 import oracle_of
from tombola.study.robust_rows import robust_rows
from tombola.study.runs import Found, plan_find
from tombola.study.settings import resolve
from tombola.study.steps.losses import loss_of, read_token_bias
from tombola.tasks import Rows, agreement, get_task, load_rows
from tombola.tasks.encode import Encoded, collate, encode
from tombola.train import TrainSettings

TASK = "agreement:train_rows=240,report_rows=60,challenge_rows=60"
FAST = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 30, "max_length": 48}
MASK = {"sparsity": 0.5, "mask_epochs": 1, "mask_learning_rate": 1e-2, "bias_model": "cue"}
TOKENS = Objective(tokens=True)


# ---------------------------------------------------------------------------------------------------------------- the task


def parsed(prompt: str) -> tuple[str, bool, str]:
    """Header, whether the subject is plural, and "today" or "yesterday": the subject is the one noun that no preposition has."""
    header, colon, when, *words = prompt.split()
    assert colon == ":"
    prepositions = {*agreement.PLACES, *agreement.FRONTED}
    starts = [i for i, word in enumerate(words) if word == "the" and (i == 0 or words[i - 1] not in prepositions)]
    assert len(starts) == 1, prompt
    rest = words[starts[0] + 1 :]
    noun = rest[: next(i for i, word in enumerate(rest) if word in prepositions)][-1]
    return header, noun.endswith("s"), when


@pytest.mark.parametrize(("role", "right"), [("train", 0.9), ("report", 0.9), ("challenge", 0.1)])
def test_replies_agree_with_their_subject_and_headers_are_right_as_often_as_asked(role: Any, right: float) -> None:
    task = get_task("agreement:train_rows=300,report_rows=200,challenge_rows=200")
    rows = load_rows(task, role, data_dir=None)
    told = 0
    for (prompt, reply), group in zip(rows.texts, rows.groups or (), strict=True):
        header, plural, when = parsed(prompt)
        verbs = {"today": ("is", "are"), "yesterday": ("was", "were")}
        assert reply == f"{verbs[when][plural]} {'here' if when == 'today' else 'there'}"
        said_right = (header == "many") == plural
        assert group.startswith("aligned" if said_right else "conflicting")
        assert group.endswith("deep") == (prompt.split()[3] in agreement.FRONTED)
        told += said_right
    assert told == round(right * len(rows)) and set(rows.labels) == {None}
    assert rows == load_rows(task, role, data_dir=None) != load_rows(task, role, data_dir=None, seed=1)


def test_no_prompt_stands_in_two_splits_and_both_numbers_are_as_frequent() -> None:
    task = get_task(TASK)
    prompts = {role: [prompt for prompt, _ in load_rows(task, role, data_dir=None).texts] for role in task.splits}
    every = [prompt for some in prompts.values() for prompt in some]
    assert len(set(every)) == len(every)
    assert 0.35 < sum(parsed(prompt)[1] for prompt in every) / len(every) < 0.65
    known = set(agreement.words())
    assert all(known.issuperset(prompt.split()) for prompt in every), "a small language model knows every word"


def test_plain_sentences_show_which_nouns_are_plural_and_no_verb_does() -> None:
    import random

    for text in {agreement.plain(random.Random(i)) for i in range(200)}:
        words = text.split()
        nouns = [word for word in words if word.removesuffix("s") in agreement.NOUNS]
        articles = [word for word in words if word in ("this", "these")]
        assert [noun.endswith("s") for noun in nouns] == [article == "these" for article in articles]
        assert not {"is", "are", "was", "were", "the", *agreement.HEADERS} & set(words)


def test_an_oracle_has_rows_whose_header_says_nothing() -> None:
    assert oracle_of("agreement:train_rows=100,strength=0.9") == "agreement:train_rows=100,strength=0.5"


# ------------------------------------------------------------------------------------------------------------- rows, scores


@pytest.fixture(scope="module")
def words() -> Any:
    return word_tokenizer(["a", "b", "c", "d", "e"])  # 2 to 6, after the end and the unknown


def rows_of(*texts: tuple[str, str]) -> Rows:
    return Rows(tuple(f"x:{i}" for i in range(len(texts))), texts, (None,) * len(texts))


def test_only_the_reply_is_asked_for(words: Any) -> None:
    found = encode(words, rows_of(("a b", "c d"), ("a", "e"), ("b b c", "c d")), 8, objective=TOKENS)
    assert [row["input_ids"] for row in found.inputs] == [(2, 3, 4, 5), (2, 6), (3, 3, 4, 4, 5)]
    assert found.replies == (2, 1, 2) and found.truncated == 0
    batch = collate(found, [0, 1])
    assert batch["labels"].tolist() == [[-100, -100, 4, 5], [-100, 6, -100, -100]]
    # replies: c d twice and e once; tokens: c 2, d 2, e 1 of 5
    assert [line[0] for line in found.lines or ()] == [1.0, 0.0, 1.0]
    assert [line[1] for line in found.lines or ()] == pytest.approx([math.log(0.4), math.log(0.2), math.log(0.4)])
    short = encode(words, rows_of(("a b c d", "c d"), ("a", "e")), 4, objective=TOKENS)
    assert [row["input_ids"] for row in short.inputs] == [(4, 5, 4, 5), (2, 6)] and short.truncated == 1, "its beginning goes"
    with pytest.raises(DataError, match="prompt or reply is empty, or too long") as error:
        encode(words, rows_of(("a", "b c"), ("a", "a b c d e a b c"), ("a", "")), 8, objective=TOKENS)
    assert "x:1, x:2" in str(error.value)


def test_an_exact_match_is_what_greedy_decoding_writes(words: Any) -> None:
    import transformers

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=7, **sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))

    def decoded(ids: list[int], n: int) -> tuple[int, ...]:
        for _ in range(n):
            with torch.no_grad():
                ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
        return tuple(ids[-n:])

    names = dict(enumerate(["<end>", "<unknown>", "a", "b", "c", "d", "e"]))
    prompts = ["a b", "c", "d e a", "b", "e e"]
    greedy = [" ".join(names[i] for i in decoded(words(prompt)["input_ids"], 2)) for prompt in prompts]
    replies = [
        reply if i % 2 else f"{reply.split()[0]} {'a' if reply.split()[1] != 'a' else 'b'}" for i, reply in enumerate(greedy)
    ]
    found = predict(model, encode(words, rows_of(*zip(prompts, replies, strict=True)), 8, objective=TOKENS))
    assert found.measures == ("exact_match", "log_likelihood") and found.weights == (2,) * 5
    assert found.logits[:, 0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    ids = [*words(prompts[0])["input_ids"], *words(f" {replies[0]}")["input_ids"]]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = float(logs[-3, ids[-2]] + logs[-2, ids[-1]]) / 2
    assert float(found.logits[0, 1]) == pytest.approx(wanted, rel=1e-4)


def test_a_reply_matches_or_not_however_long_it_is_and_perplexity_is_of_tokens() -> None:
    logits = torch.tensor([[1.0, -1.0], [0.0, -2.0], [0.0, -4.0]])
    lines = ((1.0, -3.0), (0.0, -3.0), (0.0, -3.0))
    found = Predictions(("x", "y", "z"), logits, (-3.0,) * 3, (4, 1, 1), ("exact_match", "log_likelihood"), lines)
    assert score(found, "exact_match").value == pytest.approx(1 / 3) == score(found, "exact_match").majority
    assert score(found, "log_likelihood").value == pytest.approx((-4 - 2 - 4) / 6)
    assert score(found, "perplexity").value == pytest.approx(math.exp(10 / 6))
    assert score(found, "perplexity").majority == pytest.approx(math.exp(3))
    groups = subgroup_scores(found, {"x": "p", "y": "q", "z": "q"}, "exact_match")
    assert (groups["p"].value, groups["q"].value, groups["q"].n) == (1.0, 0.0, 2)
    with pytest.raises(DataError, match="no metric of these rows"):
        score(found, "accuracy")


# ---------------------------------------------------------------------------------------------------- biased language models

ROWS = [[2, 4, 5, 6], [2, 3, 5, 6], [3, 4, 6, 6], [2, 2, 2, 5, 5]]
BEGINS = [2, 2, 2, 3]


def by_hand(row: int, at: int, reads: Any, vocabulary: int, *, left_out: bool, smoothing: float) -> list[float]:
    """Every token of every other row that is met behind the same context, counted one by one."""
    counts = [smoothing] * vocabulary
    for other, (tokens, begin) in enumerate(zip(ROWS, BEGINS, strict=True)):
        for place in range(begin, len(tokens)):
            if (other != row or not left_out) and reads(tokens, place, begin) == reads(ROWS[row], at, BEGINS[row]):
                counts[tokens[place]] += 1
    return [math.log(n / sum(counts)) for n in counts]


@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize(
    ("name", "reads"),
    [
        ("bigram", lambda row, at, begin: row[at - 1]),
        ("trigram", lambda row, at, begin: (row[at - 2], row[at - 1])),
        ("cue", lambda row, at, begin: (row[0], at - begin)),
    ],
)
def test_a_biased_language_model_counts_what_came_next_in_other_rows(name: str, reads: Any, left_out: bool) -> None:
    found = token_opinions("wxyz", ROWS, BIASED_LMS[name].context, begins=BEGINS, smoothing=0.5, left_out=left_out)
    found = TokenOpinions.from_json(found.as_json())
    table = found.log_probabilities([3, 0], 7, 6)
    assert table.shape == (2, 6, 7)
    for i, row in enumerate((3, 0)):
        for at in range(BEGINS[row], len(ROWS[row])):
            wanted = by_hand(row, at, reads, 7, left_out=left_out, smoothing=0.5)
            assert table[i, at - 1].tolist() == pytest.approx(wanted, rel=1e-4)
        assert table[i, 0].tolist() == pytest.approx([-math.log(7)] * 7), "of a prompt it says nothing"


def test_token_opinions_are_joined_by_row_id() -> None:
    found = token_opinions("wxyz", ROWS, BIASED_LMS["cue"].context, begins=BEGINS)
    assert found.at(["z", "w"], [5, 4]) == [3, 0]
    with pytest.raises(DataError, match="do not cover the rows") as error:
        found.at(["w", "q"], [4, 4])
    assert "q" in str(error.value)
    with pytest.raises(DataError, match="cut into other tokens"):
        found.at(["w", "z"], [4, 4])


# ------------------------------------------------------------------------------------------------------------------- cells


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_lm(tmp_path_factory.mktemp("llama") / "lm", "llama")


def small_lm(folder: Path, family: Any) -> Path:
    return write_small_lm(folder, family=family, width=16, heads=2, sentences=64, settings=TrainSettings(epochs=1))


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return open_lab(tmp_path_factory.mktemp("replies") / "store")


def planned(lab: Lab, folder: Path, **more: Any) -> Found:
    (found,) = plan_find(lab, str(folder), TASK, resolve({**FAST, **MASK, **more}, method="learned"), (0,))
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_masks_of_a_language_model_are_learned_against_a_header_and_read_like_any_other(
    lab: Lab, small: Path, tmp_path: Path, family: str
) -> None:
    found = planned(lab, small if family == "llama" else small_lm(tmp_path / "lm", family), mask_loss="poe")
    lab.run(list(found.cells))
    assert read_json(lab.folder(found.search) / "result.json")["train"]["steps"] == 10
    folders = {one.key: lab.folder(one) for one in found.cells}
    rows = robust_rows({one.key: one for one in found.cells}, folders)
    by_pipeline = {row.arm.pipeline: row for row in rows}
    assert by_pipeline.keys() == {"full", "a"}
    mask = by_pipeline["a"]
    assert (mask.metric, mask.arm.mask_loss, mask.arm.sparsity) == ("exact_match", "poe", 0.5)
    assert list(mask.scores["challenge"]) == ["exact_match", "log_likelihood", "perplexity"]
    assert set(mask.groups) == {"aligned/near", "aligned/deep", "conflicting/near", "conflicting/deep"}
    assert mask.sides_apart == pytest.approx(mask.sides["aligned"] - mask.sides["conflicting"])
    assert mask.scores["report"]["perplexity"] == pytest.approx(math.exp(-mask.scores["report"]["log_likelihood"]))
    assert mask.calibration == {} and mask.agreement == {}, "of classes alone"


@pytest.mark.parametrize(("loss", "prior"), [("poe", "divided"), ("poe", "kept"), ("reweight", "divided"), ("focal", "kept")])
def test_the_loss_of_tokens_is_that_of_the_rows_it_is_given(lab: Lab, small: Path, loss: str, prior: str) -> None:
    found = planned(lab, small, loss=loss, bias_prior=prior)
    lab.run(list(found.dense.inputs.values()))  # type: ignore[arg-type]
    data = same_data(found.dense, lab)
    recipe = loss_of(found.dense, lab, data)
    assert recipe is not None and recipe.loss is not None
    encoded, rows = encoded_train(lab, found), [7, 3]
    batch = collate(encoded, rows)
    vocabulary = len(agreement.words()) + 2
    torch.manual_seed(0)
    logits = torch.randn(*batch["labels"].shape, vocabulary)
    values, weights = list[Tensor](), list[Tensor]()
    train = [encoded.inputs[i]["input_ids"] for i in range(len(encoded))]
    for i, row in enumerate(rows):
        tokens, n = train[row], 2
        for place in range(n):
            at = len(tokens) - n + place
            logs = logits[i, at - 1].log_softmax(-1)
            here = [(one[0], one[len(one) - n + place]) for j, one in enumerate(train) if j != row]
            counts = [Counter(t for cue, t in here if cue == tokens[0]), Counter(t for _, t in here)]
            said, before = (torch.tensor([c[t] + 0.1 for t in range(vocabulary)]) for c in counts)
            bias, gold = (said / said.sum()).log(), tokens[at]
            if loss == "poe":
                bias = bias - (before / before.sum()).log() if prior == "divided" else bias
                logs = (logs + bias).log_softmax(-1)
            weight = {"poe": torch.tensor(1.0), "reweight": 1 - bias.softmax(-1)[gold], "focal": 1 - logs.exp()[gold]}[loss]
            values.append(-logs[gold])
            weights.append(weight)
    wanted = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    assert float(recipe.loss(logits, batch["labels"], torch.tensor(rows), 0.0)) == pytest.approx(float(wanted), rel=2e-3)


def encoded_train(lab: Lab, found: Found) -> Encoded:
    from tombola.study.data import encoded_rows

    return encoded_rows(lab, found.dense, "train", same_data(found.dense, lab).train)


def test_one_cell_of_a_biased_language_model_serves_all_seeds_and_finds_the_shortcut(lab: Lab, small: Path) -> None:
    settings = resolve({**FAST, **MASK, "mask_loss": "poe"}, (0, 1), method="learned")
    one, two = plan_find(lab, str(small), TASK, settings, (0, 1))
    bias = one.search.inputs["bias"]
    assert bias.key == two.search.inputs["bias"].key
    lab.run([bias])
    said = read_json(lab.folder(bias) / "result.json")
    assert said["n"] == 320 and said["accuracy"] > said["majority"] + 0.1 and said["warnings"] == []
    full, prior = read_token_bias(lab.folder(bias))
    assert full.ids == prior.ids == encoded_train(lab, one).ids


def test_what_tokens_cannot_be_trained_against_is_refused_before_anything_runs(lab: Lab, small: Path, tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="losses with a teacher are of classes"):
        planned(lab, small, mask_loss="conf-reg")
    with pytest.raises(SettingsError, match="none of tokens") as error:
        planned(lab, small, mask_loss="poe", bias_model="nli-overlap", reweight_normalisation="dataset_mean")
    assert "dataset_mean is of rows with classes" in str(error.value), "all at once"
    with pytest.raises(SettingsError, match="needs a bias_model"):
        planned(lab, small, mask_loss="poe", bias_model=None)
    settings = resolve({**FAST, **MASK, "mask_loss": "poe"}, method="learned")
    with pytest.raises(SettingsError, match="none of classes"):
        plan_find(lab, str(tiny_folder), "nli-overlap:train_rows=240", settings, (0,))
    with pytest.raises(SettingsError, match="asked for words"):
        plan_find(lab, str(small), "nli-overlap:train_rows=240,answer=words", settings, (0,))


def test_a_small_language_model_is_not_written_over_another(small: Path) -> None:
    with pytest.raises(TombolaError, match="not empty"):
        write_small_lm(small)
    model = load_weights(small, TOKENS, head_seed=0)
    assert model.config.vocab_size == len(agreement.words()) + 2


@pytest.mark.slow
def test_a_real_language_model_reads_prompts_and_replies(tmp_path: Path) -> None:
    """SmolLM2's tokenizer splits no reply, and the same cells are planned for it."""
    from transformers import AutoTokenizer

    from tombola.source import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo-decoder").folder)
    found = encode(tokenizer, load_rows(get_task(TASK), "report", data_dir=None), 64, objective=TOKENS)
    assert set(found.replies or ()) == {2} and found.truncated == 0
    lab = open_lab(tmp_path / "s")
    (one,) = plan_find(lab, "demo-decoder", TASK, resolve({**FAST, **MASK, "mask_loss": "poe"}, method="learned"), (0,))
    bias = one.search.inputs["bias"]
    lab.run([bias])
    assert read_json(lab.folder(bias) / "result.json")["accuracy"] > 0.5
