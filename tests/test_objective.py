"""What a model is asked: heads, words of a language model, running text; and GGUF files as models."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tombola.anatomy import read_anatomy
from tombola.criteria import CRITERIA, Given, mean_gradients
from tombola.errors import DataError, SearchError, TombolaError
from tombola.evaluate import METRICS, Predictions, agreement, predict, score, score_and_gradients
from tombola.gates import Gates, masked
from tombola.mask import Mask
from tombola.objective import LabelWords, Objective, Prompt, load_weights, word_ids
from tombola.scores import row_outputs, summed_loss
from tombola.search.floor import floor_score
from tombola.tasks import TASKS, asked_in_words, get_task, load_rows
from tombola.tasks.base import TOKEN_METRICS, Rows
from tombola.tasks.encode import Encoded, batches, collate, encode
from tombola.tasks.prompts import PROMPTS
from tombola.tasks.text import PASSAGE_WORDS, cut

WORDS = "the a film is was good bad very yes no Answer : review of and not movie plot actor".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def decoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with grouped kv-heads and a word-level tokenizer, in a folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("decoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=2, bos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(decoder_folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(decoder_folder)


PROMPT = Prompt("{0} Answer :", ("no", "yes"))
IN_WORDS = Objective(("negative", "positive"), PROMPT)
TEXTS = ("the film is good", "a very bad movie", "the plot of the film was not good", "good")
ROWS = Rows(tuple(f"r:{i}" for i in range(4)), tuple((t,) for t in TEXTS), (1, 0, 0, 1))
PASSAGES = Rows(ROWS.ids[:3], ROWS.texts[:3], (None,) * 3)


# ------------------------------------------------------------------------------------------------------------- prompts


def test_a_prompt_puts_texts_in_as_they_are() -> None:
    prompt = Prompt("{0} / {1} ? {0}!\nso:", (" a", " b"))
    assert prompt.body(("x{1}", "y{0}")) == "x{1} / y{0} ? x{1}"
    assert prompt.question == "!\nso:"


@pytest.mark.parametrize(("template", "words"), [("no place:", (" a", " b")), ("{0}:", (" a",)), ("{0}:", (" a", " a"))])
def test_a_prompt_that_cannot_serve_is_refused(template: str, words: tuple[str, ...]) -> None:
    with pytest.raises(TombolaError, match="this is no prompt"):
        Prompt(template, words)


def test_every_task_with_classes_has_a_prompt_of_as_many_words_and_texts() -> None:
    assert PROMPTS.keys() == {name for name, task in TASKS.items() if len(task.labels) > 1}
    for name, prompt in PROMPTS.items():
        assert len(prompt.words) == len(TASKS[name].labels)
        assert ("{1}" in prompt.template) == (len(TASKS[name].text) == 2)
    # yes means the same for tasks whose classes are in another order
    assert PROMPTS["wnli"].words[TASKS["wnli"].labels.index("entailment")] == " yes"
    assert PROMPTS["rte"].words[TASKS["rte"].labels.index("entailment")] == " yes"


def test_answer_words_is_an_option_of_every_task_with_classes() -> None:
    assert get_task("sst2:answer=words").objective.kind == "words"
    assert get_task("qnli:train=train_from_dev,answer=words").splits["train"] == "train_from_dev"
    assert get_task("nli-overlap:strength=0.8,answer=words").options["strength"] == 0.8
    assert get_task("sst2").objective == Objective(("negative", "positive"))
    for name in ("stsb", "wikitext2"):
        with pytest.raises(DataError, match=f"wrong options of task {name}"):
            get_task(f"{name}:answer=words")
        with pytest.raises(DataError, match="no classes to ask for"):
            asked_in_words(TASKS[name])
    with pytest.raises(DataError, match="not one word for each class"):
        asked_in_words(TASKS["mnli"], words=(" yes", " no"))


def test_an_objective_survives_its_description() -> None:
    for one in (Objective(("a", "b")), Objective(("x",)), IN_WORDS, Objective(tokens=True), Objective()):
        assert Objective.from_description(one.labels, one.describe()) == one
    assert [Objective(("a",)).kind, Objective(("a", "b")).kind, Objective().kind] == ["value", "classes", "classes"]


# ---------------------------------------------------------------------------------------------------------- label words


def test_the_question_is_never_cut(tokenizer: Any) -> None:
    short = encode(tokenizer, ROWS, 5, objective=IN_WORDS)
    asked = tokenizer("Answer :")["input_ids"]
    assert all(list(row["input_ids"][-2:]) == asked and len(row["input_ids"]) <= 5 for row in short.inputs)
    assert short.truncated == 3 and short.labels == ROWS.labels
    with pytest.raises(DataError, match="leaves no room"):
        encode(tokenizer, ROWS, 3, objective=IN_WORDS)


def test_logits_are_those_of_the_words_after_each_row_by_itself(decoder_folder: Path, tokenizer: Any) -> None:
    from transformers import LlamaForCausalLM

    model = load_weights(decoder_folder, IN_WORDS, head_seed=0)
    encoded = encode(tokenizer, ROWS, 32, objective=IN_WORDS)
    said = predict(model, encoded).logits
    plain = LlamaForCausalLM.from_pretrained(decoder_folder).eval()
    for i, text in enumerate(TEXTS):  # one row at a time: no padding, no hooks
        with torch.no_grad():
            last = plain(**tokenizer(f"{text} Answer :", return_tensors="pt")).logits[0, -1]
        assert torch.allclose(said[i], last[[tokenizer.vocab["no"], tokenizer.vocab["yes"]]], atol=1e-5)


def test_with_labels_it_has_the_loss_of_a_classifier_and_trains(decoder_folder: Path, tokenizer: Any) -> None:
    from tombola.train import RunSeeds, TrainSettings, fine_tune

    model = load_weights(decoder_folder, IN_WORDS, head_seed=0)
    encoded = encode(tokenizer, ROWS, 32, objective=IN_WORDS)
    inputs = collate(encoded, range(4))
    output = model(**inputs)
    assert output.logits.shape == (4, 2)
    expected = torch.nn.functional.cross_entropy(output.logits, inputs["labels"])
    assert torch.allclose(output.loss, expected)
    log = fine_tune(
        model, encoded, TrainSettings(epochs=8, learning_rate=1e-2, batch_size=4), RunSeeds(head=0, data=0, dropout=0, mask=0)
    )
    assert score(predict(model, encoded), "accuracy").value == 1.0 and log.losses[-1][1] < expected.item()


def test_a_copy_answers_in_words_by_itself_and_removing_gives_the_language_model_back(
    decoder_folder: Path, tokenizer: Any
) -> None:
    model = load_weights(decoder_folder, IN_WORDS, head_seed=0)
    inputs = collate(encode(tokenizer, ROWS, 32, objective=IN_WORDS), range(4))
    del inputs["labels"]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    before = model(**inputs).logits
    assert other(**inputs).logits.shape == (4, 2) and torch.equal(model(**inputs).logits, before)
    model.tombola_words.remove()
    assert model(**inputs).logits.shape == (4, inputs["input_ids"].shape[1], len(tokenizer))


def test_words_that_begin_alike_are_refused(tokenizer: Any) -> None:
    assert word_ids(tokenizer, ("yes", "no")) == (tokenizer.vocab["yes"], tokenizer.vocab["no"])
    with pytest.raises(TombolaError, match="cannot be told apart"):
        word_ids(tokenizer, ("yes indeed", "yes not"))


def test_a_model_that_sees_what_follows_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(TombolaError, match=r"sees the words it would be asked for|could not be loaded as a causal"):
        load_weights(tiny_folder, Objective(tokens=True), head_seed=0)


def test_gates_and_criteria_work_on_answers_in_words(decoder_folder: Path, tokenizer: Any) -> None:
    model = load_weights(decoder_folder, IN_WORDS, head_seed=0).double()
    encoded = encode(tokenizer, ROWS, 32, objective=IN_WORDS)
    anatomy = read_anatomy(model)
    with Gates(model, anatomy) as gates:
        predictions, gradients = score_and_gradients(gates, encoded)
        loss = lambda: float(summed_loss(predict(model, encoded).logits.double(), torch.tensor(encoded.labels)))  # noqa: E731
        heads = anatomy.full_mask().heads
        assert heads is not None
        cut_one = heads.clone()
        cut_one[1, 2] = False
        gates.set(Mask(heads=cut_one))
        assert abs(loss() - float(summed_loss(predictions.logits.double(), torch.tensor(encoded.labels)))) > 1e-9
    assert bool((gradients.heads.abs().sum(0) > 0).all()) and gradients.logits.shape == (4, 2)


# -------------------------------------------------------------------------------------------------------- running text


def test_a_row_of_text_says_its_mean_log_likelihood(decoder_folder: Path, tokenizer: Any) -> None:
    """Against token by token log-softmax of each row alone."""
    model = load_weights(decoder_folder, Objective(tokens=True), head_seed=0)
    encoded = encode(tokenizer, PASSAGES, 32, objective=Objective(tokens=True))
    said = predict(model, encoded)
    total, tokens = 0.0, 0
    for i, row in enumerate(encoded.inputs):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        each = [float(logits[t].log_softmax(-1)[row["input_ids"][t + 1]]) for t in range(len(row["input_ids"]) - 1)]
        assert said.values[i] == pytest.approx(sum(each) / len(each), abs=1e-5)
        total, tokens = total + sum(each), tokens + len(each)
    assert said.weights == tuple(length - 1 for length in encoded.lengths)
    result = score(said, "log_likelihood")
    assert result.value == pytest.approx(total / tokens, abs=1e-5) and result.n == 3
    assert score(said, "perplexity").value == pytest.approx(math.exp(-total / tokens), rel=1e-5)


def test_the_line_is_the_unigram_model_of_the_same_rows(tokenizer: Any) -> None:
    rows = Rows(("a", "b"), (("the good good bad",), ("a bad",)), (None, None))
    encoded = encode(tokenizer, rows, 32, objective=Objective(tokens=True))
    # predicted: good good bad | bad → p(good) = p(bad) = 1/2
    assert encoded.labels == pytest.approx((math.log(0.5), math.log(0.5)))
    said = Predictions(rows.ids, torch.tensor([[-1.0], [-2.0]]), encoded.labels, (3, 1))
    assert score(said, "log_likelihood").value == pytest.approx(-1.25)
    assert score(said, "log_likelihood").majority == pytest.approx(math.log(0.5))
    assert score(said, "perplexity").majority == pytest.approx(2.0)
    with pytest.raises(DataError, match="single token"):
        encode(tokenizer, Rows(("a",), (("good",),), (None,)), 32, objective=Objective(tokens=True))


def test_padding_and_batches_play_no_part(decoder_folder: Path, tokenizer: Any) -> None:
    model = load_weights(decoder_folder, Objective(tokens=True), head_seed=0)
    encoded = encode(tokenizer, PASSAGES, 32, objective=Objective(tokens=True))
    one, together = predict(model, encoded, tokens_per_batch=1), predict(model, encoded, tokens_per_batch=4096)
    assert one.logits.flatten().tolist() == pytest.approx(together.logits.flatten().tolist(), abs=1e-5)


def test_the_loss_of_text_is_that_of_the_library_and_its_gradient_that_of_differences(
    decoder_folder: Path, tokenizer: Any
) -> None:
    model = load_weights(decoder_folder, Objective(tokens=True), head_seed=0).double()
    encoded = encode(tokenizer, PASSAGES, 32, objective=Objective(tokens=True))
    for row in range(3):
        inputs = collate(encoded, [row])
        ours = summed_loss(model(input_ids=inputs["input_ids"]).logits, inputs["labels"])
        assert ours.item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    name = "model.layers.1.mlp.down_proj.weight"
    gradient = mean_gradients(Given(model=model, names=[name], batches=batches(encoded)))[name]
    parameter, loss = model.get_parameter(name), lambda: -sum(predict(model, encoded).logits.double().flatten().tolist()) / 3
    with torch.no_grad():
        parameter[3, 5] += 1e-2
        up = loss()
        parameter[3, 5] -= 2e-2
        down = loss()
    assert float(gradient[3, 5]) == pytest.approx((up - down) / 2e-2, rel=1e-2, abs=1e-5)


def test_metrics_of_text_and_of_answers_are_kept_apart() -> None:
    assert not set(TOKEN_METRICS) & METRICS.keys()
    text = Predictions(("a",), torch.tensor([[-1.0]]), (-2.0,), (3,))
    with pytest.raises(DataError, match="pearson is no metric of running text"):
        score(text, "pearson")
    with pytest.raises(DataError, match="perplexity is no metric of rows with answers"):
        score(Predictions(("a", "b"), torch.zeros(2, 2), (0, 1)), "perplexity")
    assert agreement(text, Predictions(("a",), torch.tensor([[-1.5]]), (-2.0,), (3,))).mean_difference == pytest.approx(0.5)
    full = score(text, "log_likelihood")
    with pytest.raises(SearchError, match="a share of a negative score"):
        floor_score(full, 0.9, "fraction_of_full")
    assert floor_score(full, 0.9, "fraction_above_baseline") == pytest.approx(-1.1)  # −2 + 0.9 · 1


def test_passages_are_of_one_article_and_lose_no_word() -> None:
    article = " ".join(f"w{i}" for i in range(2 * PASSAGE_WORDS + 5))
    lines = [" = One = \n", article, "", " = = Part = = \n", "last words", " = Two = \n", "short text here"]
    passages = cut(lines)
    assert " ".join(" ".join(passages).split()) == " ".join(" ".join(lines).split())
    assert passages[-1].startswith("= Two =") and all("Two" not in one for one in passages[:-1])
    assert [len(one.split()) for one in passages[:-1]] == [96, 96 + 3 + 5 + 5 + 2]  # the rest, shorter than 16 words, is joined
    assert cut(["", "  "]) == []


def test_a_corpus_is_read_from_a_folder(tmp_path: Path) -> None:
    import json

    (tmp_path / "wikitext2").mkdir()
    lines = [{"text": " = T = "}, {"text": "some words " * 60}, {"text": ""}]
    (tmp_path / "wikitext2" / "validation.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load_rows(TASKS["wikitext2"], "report", data_dir=tmp_path)
    assert rows.ids == ("validation:1", "validation:2") and rows.labels == (None, None)
    (tmp_path / "wikitext2" / "train.jsonl").write_text('{"text": 3}\n{"other": "x"}')
    with pytest.raises(DataError, match="text is no text: rows 1, 2"):
        load_rows(TASKS["wikitext2"], "train", data_dir=tmp_path)
    with pytest.raises(DataError, match="no file for split 'test'"):
        load_rows(get_task("wikitext2:report=test"), "report", data_dir=tmp_path)


def test_every_criterion_scores_a_language_model(decoder_folder: Path, tokenizer: Any) -> None:
    model = load_weights(decoder_folder, Objective(tokens=True), head_seed=0)
    encoded = encode(tokenizer, PASSAGES, 32, objective=Objective(tokens=True))
    names = ["model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.gate_proj.weight"]
    for criterion in CRITERIA.values():
        scores = criterion.scores(Given(model=model, names=names, batches=batches(encoded), seed=1))
        assert all(bool(scores[name].isfinite().all()) and float(scores[name].abs().sum()) > 0 for name in names)


def test_masked_text_scores_differ_from_the_dense(decoder_folder: Path, tokenizer: Any) -> None:
    model = load_weights(decoder_folder, Objective(tokens=True), head_seed=0)
    encoded = encode(tokenizer, PASSAGES, 32, objective=Objective(tokens=True))
    anatomy = read_anatomy(model)
    dense = predict(model, encoded)
    with masked(model, anatomy, Mask(mlps=torch.tensor([True, False]))):
        cut_off = predict(model, encoded)
    assert agreement(dense, cut_off).mean_difference and predict(model, encoded).logits.equal(dense.logits)


def test_row_outputs_leave_logits_of_rows_alone() -> None:
    logits = torch.randn(3, 2, dtype=torch.float64)
    assert torch.equal(row_outputs(logits, torch.zeros(3, dtype=torch.int64)), logits.float())


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_find_on_words_and_on_text_from_end_to_end(decoder_folder: Path, tmp_path: Path) -> None:
    import json

    from tombola.gates import load
    from tombola.study import jobs
    from tombola.tasks import files_task

    rows = [
        {"t": f"the film is {'good' if i % 2 else 'bad'} " + " and very" * (i % 5), "y": "up" if i % 2 else "down"}
        for i in range(80)
    ]
    for name, part in (("train", rows[:60]), ("dev", rows[60:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({**r, "t": f"{r['t']} {name} {i}"}) for i, r in enumerate(part))
        )
    task = files_task(train=tmp_path / "train.jsonl", validation=tmp_path / "dev.jsonl", text="t", label="y")
    asked = asked_in_words(task, "{0} Answer :", ("no", "yes"))
    settings = {"epochs": 6, "learning_rate": 1e-2, "batch_size": 10, "floor": 0.8}
    [ticket] = jobs.find(str(decoder_folder), asked, store=tmp_path / "store", **settings)  # type: ignore[arg-type]
    assert ticket.objective.kind == "words" and ticket.objective.prompt == asked.prompt
    model = load(ticket, "found_on")
    assert isinstance(model.tombola_words, LabelWords)
    assert [m["n"] for m in ticket.metrics if m["split"] == "validation"] == [20, 20]

    (tmp_path / "wikitext2").mkdir()
    lines = [{"text": " ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 97))} for i in range(1, 30)]
    for split in ("train", "validation"):
        (tmp_path / "wikitext2" / f"{split}.jsonl").write_text(
            "\n".join(map(json.dumps, lines[:20] if split == "train" else lines[20:]))
        )
    [ticket] = jobs.find(
        str(decoder_folder), "wikitext2", method="m-prune", store=tmp_path / "store", data=tmp_path, epochs=12,
        learning_rate=1e-2, batch_size=4, max_length=60, report_rows=4, floor=0.5,
    )  # fmt: skip
    assert ticket.objective == Objective(tokens=True) and ticket.settings["search"]["floor_rule"] == "fraction_above_baseline"
    assert {m["metric"] for m in ticket.metrics} == {"log_likelihood"}
    assert [m["n"] for m in ticket.metrics if m["split"] == "validation"] == [4] * 2
    assert load(ticket, "found_on")(input_ids=torch.tensor([[3, 4, 5]])).logits.shape[-1] == 22


def test_an_encoded_set_says_whether_it_is_text(tokenizer: Any) -> None:
    encoded: Encoded = encode(tokenizer, PASSAGES, 32, objective=Objective(tokens=True))
    labels = collate(encoded, range(3))["labels"]
    assert labels.shape[0] == 3 and int((labels == -100).sum()) == 3 * max(encoded.lengths) - sum(encoded.lengths)


def test_the_command_line_asks_own_rows_in_words_and_again_for_controls(decoder_folder: Path, tmp_path: Path) -> None:
    import json

    from typer.testing import CliRunner

    from tombola.cli import app

    rows = [
        {"t": f"the {'good' if i % 2 else 'bad'} film" + " and very" * (i % 5), "y": "up" if i % 2 else "down"} for i in range(80)
    ]
    for name, part in (("train", rows[:60]), ("dev", rows[60:])):
        (tmp_path / f"{name}.jsonl").write_text(
            "\n".join(json.dumps({**r, "t": f"{r['t']} {name} {i}"}) for i, r in enumerate(part))
        )
    files = ["--train", str(tmp_path / "train.jsonl"), "--validation", str(tmp_path / "dev.jsonl")]
    store = ["--store", str(tmp_path / "store"), "--json"]
    asked = ["--text", "t", "--label", "y", "--words", "no,yes", "--template", "{0} Answer :"]
    fast = ["--epochs", "5", "--learning-rate", "1e-2", "--batch-size", "10", "--out", str(tmp_path / "ticket")]
    found = CliRunner().invoke(app, ["find", str(decoder_folder), "files", *files, *asked, *fast, *store])
    assert found.exit_code == 0, found.output
    ticket = json.loads((tmp_path / "ticket" / "ticket.json").read_text())
    assert ticket["settings"]["objective"]["prompt"] == {"template": "{0} Answer :", "words": [" no", " yes"]}
    again = CliRunner().invoke(app, ["controls", str(tmp_path / "ticket"), "--kinds", "random", "--draws", "1", *files, *store])
    assert again.exit_code == 0, again.output
    wrong = CliRunner().invoke(app, ["find", str(decoder_folder), "files", *files, *asked[:4], "--words", "no", *store])
    assert isinstance(wrong.exception, TombolaError) and "no prompt" in str(wrong.exception)
