"""An answer's tokens are found in each window, and its scores are those of transformers' own model.

Shape suffixes: D windows, L longest window, T tokens.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModelForQuestionAnswering,
    BertConfig,
    CanineTokenizer,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from fulltune.data.encoding import EncodedExample
from fulltune.data.tasks import AnswerPlace, QuestionExample
from fulltune.errors import ConfigError, DataError, ModelError
from fulltune.inference import combine_windows, windows_by_question
from fulltune.models.attention import IMPLEMENTATION
from fulltune.models.families import family_of
from fulltune.models.loading import load_model, load_tokenizer
from fulltune.objectives.answer_spans import Span, WindowOutput, best_spans, read_reference
from fulltune.objectives.of_task import ObjectiveSettings, make_task_objective
from fulltune.objectives.question_answering import QuestionAnswering

CONTEXT = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. 法国的首都是巴黎。"


def question(
    *answers: str | tuple[str, int], context: str = CONTEXT, text: str = "where is the dog"
) -> QuestionExample:
    places = [(each, None) if isinstance(each, str) else each for each in answers]
    return QuestionExample(
        text, context, tuple(AnswerPlace(*place) for place in places), "q.jsonl:1", "a"
    )


def make(path: Path, **settings: Any) -> QuestionAnswering:
    marker: Literal["first", "last"] = settings.pop("marker", "first")
    return QuestionAnswering(
        load_tokenizer(path), settings.pop("max_length", 128), marker, **settings
    )


def trained_text(objective: QuestionAnswering, window: EncodedExample) -> str | None:
    """What the targets of a window are in its context; None where they are the marker."""
    reference = read_reference(window["reference"])
    places = [place for place, target in enumerate(window["targets"]) if target]
    if not reference["first"] <= places[0] < reference["first"] + len(reference["begins"]):
        assert places == [0 if objective.marker == "first" else len(window["input_ids"]) - 1]
        return None
    assert places == list(range(places[0], places[-1] + 1))
    begin = reference["begins"][places[0] - reference["first"]]
    return reference["text"][begin : reference["ends"][places[-1] - reference["first"]]]


# -- spans -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["quick brown fox", "lazy dog", "sleeps", "巴黎", "法国的首都"])
@pytest.mark.parametrize("family", ["tiny_bert", "tiny_gpt2"])
def test_the_targets_are_the_tokens_of_the_answer(
    answer: str, family: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    objective = make(path, marker="first" if family == "tiny_bert" else "last")
    (window,) = objective.encode(question(answer))
    # A piece of the tokenizer may be more than the answer: bytes of a character, or a merged pair.
    found = trained_text(objective, window)
    assert found is not None
    assert answer in found
    assert len(found) <= len(answer) + 2


def test_a_place_decides_between_equal_words(tiny_bert: Path) -> None:
    objective = make(tiny_bert)
    texts = {
        start: objective.encode(question(("the", start)))[0]["targets"].index(1)
        for start in (31, 49)
    }
    assert CONTEXT[31:34] == CONTEXT[49:52] == "the"
    assert texts[31] < texts[49]


def test_an_answer_that_occurs_twice_needs_a_place_unless_the_first_is_asked_for(
    tiny_bert: Path,
) -> None:
    twice = question("dog")
    with pytest.raises(DataError, match=r"q.jsonl:1: the answer `dog` stands .* at 40 and at 53"):
        make(tiny_bert).encode(twice)
    (first,) = make(tiny_bert, repeated_answer="first").encode(twice)
    (same,) = make(tiny_bert).encode(question(("dog", 40)))
    assert first["targets"] == same["targets"]


def test_a_question_without_an_answer_trains_the_marker_where_that_is_allowed(
    tiny_bert: Path, tiny_gpt2: Path
) -> None:
    with pytest.raises(DataError, match=r"q.jsonl:1: the question has no answer") as caught:
        make(tiny_bert).encode(question())
    assert "task.no_answer=true" in str(caught.value.hint)
    (window,) = make(tiny_bert, no_answer=True).encode(question())
    assert window["targets"] == [1] + [0] * (len(window["input_ids"]) - 1)
    (window,) = make(tiny_gpt2, no_answer=True, marker="last").encode(question())
    assert window["targets"] == [0] * (len(window["input_ids"]) - 1) + [1]
    # A decoder's last token has seen the context; its tokenizer puts none behind it, so we do.
    assert window["input_ids"][-1] == load_tokenizer(tiny_gpt2).eos_token_id


def test_only_predicting_has_no_target(tiny_bert: Path) -> None:
    objective = make(tiny_bert)
    (window,) = objective.encode(QuestionExample("who", CONTEXT, None, "q.jsonl:1"))
    assert not any(window["targets"])
    assert read_reference(window["reference"])["answers"] is None


def test_a_decoders_question_is_parted_from_the_context_by_a_line_break(tiny_gpt2: Path) -> None:
    objective = make(tiny_gpt2, marker="last")
    (window,) = objective.encode(question("lazy dog"))
    text = objective.tokenizer.decode(window["input_ids"][:-1], clean_up_tokenization_spaces=False)
    assert text == f"where is the dog\n{CONTEXT}"


# -- windows ---------------------------------------------------------------------------------------


def test_every_window_holds_the_question_and_neighbours_share_the_stride(tiny_bert: Path) -> None:
    objective = make(tiny_bert, max_length=20, stride=4)
    (whole,) = make(tiny_bert).encode(question("lazy dog"))
    windows = objective.encode(question("lazy dog"))
    assert len(windows) > 2
    first = read_reference(whole["reference"])["first"]
    context = whole["input_ids"][first:-1]
    room = 20 - first - 1
    seen: list[int] = []
    for window in windows:
        assert window["input_ids"][:first] == whole["input_ids"][:first]
        assert len(window["input_ids"]) <= 20
        part = window["input_ids"][first:-1]
        assert part == context[len(seen) - 4 if seen else 0 :][:room]
        seen += part[4 if seen else 0 :]
    assert seen == context
    # All windows of a question, and of other questions on its context, are on one side of a split.
    others = objective.encode(question("sleeps", text="who"))
    assert len({window["input_hash"] for window in [*windows, *others]}) == 1
    assert len({window["example_hash"] for window in windows}) == len(windows)


def test_an_answer_counts_only_in_windows_that_hold_all_of_it(tiny_bert: Path) -> None:
    """Wherever the answer lies: at a window's border it is whole in one, or in the overlap."""
    context = "how many birds live near the river by the sea shore the city is a country"
    words = context.split(" ")
    objective = make(tiny_bert, max_length=18, stride=4)
    for start in range(len(words) - 2):
        answer = " ".join(words[start : start + 3])
        place = len(" ".join(words[:start])) + (start > 0)
        windows = objective.encode(question((answer, place), context=context))
        found = [trained_text(objective, window) for window in windows]
        assert set(found) <= {answer, None}
        # Three tokens fit in an overlap of four, so that no border cuts all of its occurrences.
        assert answer in found
        for window, text in zip(windows, found, strict=True):
            assert (text == answer) == (answer in read_reference(window["reference"])["text"])


def test_characters_of_a_late_window_are_those_of_the_whole_context(tiny_bert: Path) -> None:
    objective = make(tiny_bert, max_length=20, stride=4)
    windows = objective.encode(question("巴黎"))
    reference = read_reference(windows[-1]["reference"])
    assert reference["begin"] > 0
    end = reference["begin"] + len(reference["text"])
    assert CONTEXT[reference["begin"] : end] == reference["text"]


def test_a_question_that_leaves_no_room_is_an_error_cut_or_dropped(tiny_bert: Path) -> None:
    long = question("lazy dog", text="who painted the door in house number " * 4)
    with pytest.raises(
        DataError, match=r"q.jsonl:1: the question has 28 tokens, which leaves"
    ) as e:
        make(tiny_bert, max_length=32).encode(long)
    assert "task.too_long" in str(e.value.hint)
    assert make(tiny_bert, max_length=32, too_long="drop").encode(long) == []
    windows = make(tiny_bert, max_length=32, too_long="truncate").encode(long)
    # Two strides of the context are kept: 32 - 3 - 16 tokens of the question.
    assert {window["num_removed"] for window in windows} == {28 - 13}
    assert all(len(window["input_ids"]) <= 32 for window in windows)
    # With a short context all of it fits, and nothing is too long.
    assert (
        len(
            make(tiny_bert, max_length=48).encode(
                question("dog", context="dog", text=long.question)
            )
        )
        == 1
    )
    with pytest.raises(ConfigError, match="leaves no room for a question"):
        make(tiny_bert, max_length=16, stride=8, too_long="truncate").encode(long)


def test_a_tokenizer_without_offsets_is_refused() -> None:
    objective = QuestionAnswering(CanineTokenizer(), 128, "first")
    with pytest.raises(ModelError, match=r"\(CanineTokenizer\) does not say which characters"):
        objective.encode(question("lazy dog"))


# -- scores ----------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.5,  # or all scores are alike
}
MODELS: dict[str, Any] = {
    "bert": lambda size: BertConfig(vocab_size=size, **SMALL),
    "albert": lambda size: AlbertConfig(vocab_size=size, embedding_size=16, **SMALL),
    "electra": lambda size: ElectraConfig(vocab_size=size, embedding_size=16, **SMALL),
    "roberta": lambda size: RobertaConfig(
        vocab_size=size, type_vocab_size=2, pad_token_id=0, **SMALL
    ),
    "distilbert": lambda size: DistilBertConfig(
        vocab_size=size, dim=32, n_layers=2, n_heads=4, hidden_dim=48, initializer_range=0.5
    ),
    "deberta-v2": lambda size: DebertaV2Config(
        vocab_size=size, relative_attention=True, pos_att_type="p2c|c2p", **SMALL
    ),
    "modernbert": lambda size: ModernBertConfig(
        vocab_size=size, pad_token_id=0, cls_token_id=2, sep_token_id=3, bos_token_id=None,
        eos_token_id=None, **SMALL,
    ),
    "xlnet": lambda size: XLNetConfig(
        vocab_size=size, d_model=32, n_layer=2, n_head=4, d_inner=48, initializer_range=0.5
    ),
    "gpt2": lambda size: GPT2Config(
        vocab_size=size, n_embd=32, n_layer=2, n_head=4, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None,
    ),
    "llama": lambda size: LlamaConfig(
        vocab_size=size, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, **SMALL
    ),
    "mistral": lambda size: MistralConfig(
        vocab_size=size, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, **SMALL
    ),
    "t5": lambda size: T5Config(
        vocab_size=size, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        decoder_start_token_id=0, pad_token_id=0, initializer_factor=2.0,
    ),
}  # fmt: skip
WITHOUT_SEGMENTS = ("distilbert", "modernbert", "gpt2", "llama", "mistral", "t5")
EXAMPLES = [
    question("lazy dog"),
    question(("sells sea shells", 4), context="She sells sea shells by the sea shore.", text="who"),
    question(
        "巴黎", text="how many apples are there in the basket, and where is the house of Rome"
    ),
]


def make_model(name: str, path: Path) -> tuple[Any, QuestionAnswering]:
    tokenizer = load_tokenizer(path)
    if name in WITHOUT_SEGMENTS:
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    config = MODELS[name](len(tokenizer))
    family = family_of(config)
    torch.manual_seed(4)
    model: Any = AutoModelForQuestionAnswering.from_config(
        config, attn_implementation=IMPLEMENTATION if family.can_pack else None
    )
    objective = make_task_objective(
        "question_answering",
        ObjectiveSettings(tokenizer, config, 40, of_kind={"stride": 4, "no_answer": True}),
    )
    assert isinstance(objective, QuestionAnswering)
    assert objective.packing == family.can_pack
    return model.eval(), objective


@pytest.mark.parametrize("name", MODELS)
def test_a_windows_span_is_that_of_transformers_own_forward_alone(
    name: str, tiny_bert: Path
) -> None:
    model, objective = make_model(name, tiny_bert)
    windows = [window for example in EXAMPLES for window in objective.encode(example)]
    assert len(windows) > len(EXAMPLES)
    batch = objective.collate(windows)
    with torch.no_grad():
        together_DL2 = objective.log_probabilities(model, batch)
    scored = objective.score(model, batch)
    loss_sum = 0.0
    for row, window in enumerate(windows):
        inputs = {"input_ids": torch.tensor([window["input_ids"]])}
        if window["token_type_ids"]:
            inputs["token_type_ids"] = torch.tensor([window["token_type_ids"]])
        with torch.no_grad():
            own = model(**inputs)
        logits_T2 = torch.stack([own.start_logits[0], own.end_logits[0]], dim=-1)
        reference = read_reference(window["reference"])
        first, num_tokens = reference["first"], len(reference["begins"])
        allowed = [*range(first, first + num_tokens), 0 if objective.marker == "first" else -1]
        expected_T2 = torch.full_like(logits_T2, -torch.inf)
        expected_T2[allowed] = logits_T2[allowed].log_softmax(0)
        torch.testing.assert_close(
            together_DL2[row, : len(expected_T2)], expected_T2, atol=1e-4, rtol=1e-4
        )  # the order of sums
        targets = [place for place, target in enumerate(window["targets"]) if target]
        loss = -(expected_T2[targets[0], 0] + expected_T2[targets[-1], 1]) / 2
        loss_sum += float(loss)
        assert scored.outputs[row].loss == pytest.approx(float(loss), rel=1e-4)
        # The same span as by transformers' scores over the context.
        starts, ends = (logits_T2[first : first + num_tokens, side] for side in (0, 1))
        too_long = torch.ones(num_tokens, num_tokens).triu(objective.longest_answer) > 0
        backward = torch.ones(num_tokens, num_tokens).tril(-1) > 0
        sums = (starts[:, None] + ends[None]).masked_fill(too_long | backward, -torch.inf)
        begin, end = divmod(int(sums.argmax()), num_tokens)
        best = scored.outputs[row].spans[0]
        assert best.begin == reference["begin"] + reference["begins"][begin]
        assert best.end == reference["begin"] + reference["ends"][end]
    assert scored.num_targets == objective.num_targets(batch) == len(windows)
    assert scored.loss_sum == pytest.approx(loss_sum, rel=1e-4)
    loss = objective.loss_sum(model, batch)
    assert loss.dtype == torch.float32
    assert float(loss.detach()) == pytest.approx(loss_sum, rel=1e-4)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def test_scores_by_hand() -> None:
    """Four tokens: the question's, two of the context, and the marker behind them."""
    scores_DL2 = torch.tensor([[[-torch.inf] * 2, [1.0, 0.5], [0.25, 3.0], [-torch.inf] * 2]])
    assert best_spans(scores_DL2, longest=30) == [[(1, 2, 4.0), (2, 2, 3.25), (1, 1, 1.5)]]
    assert best_spans(scores_DL2, longest=1) == [[(2, 2, 3.25), (1, 1, 1.5)]]
    assert best_spans(scores_DL2, longest=30, count=1) == [[(1, 2, 4.0)]]


def test_the_best_spans_are_those_of_all_pairs() -> None:
    generator = torch.Generator().manual_seed(5)
    scores_DL2 = torch.randn(3, 17, 2, generator=generator)
    for row, found in enumerate(best_spans(scores_DL2, longest=4)):
        pairs = sorted(
            (
                (float(scores_DL2[row, first, 0] + scores_DL2[row, last, 1]), first, last)
                for first in range(17)
                for last in range(first, min(first + 4, 17))
            ),
            reverse=True,
        )
        assert [(first, last) for first, last, _ in found] == [pair[1:] for pair in pairs[:20]]


def window_output(spans: list[Span], no_answer: float, question: str = "q") -> WindowOutput:
    return WindowOutput(question, ["x"], spans, no_answer, 0.5)


def test_windows_of_a_question_are_put_together() -> None:
    shared = Span(5, 9, "fox", math.log(0.2))
    outputs = [
        window_output([shared, Span(0, 4, "the", math.log(0.1))], math.log(0.7)),
        window_output([Span(3, 4, "a", math.log(0.9))], math.log(0.05), "other"),
        window_output([shared._replace(score=math.log(0.6))], math.log(0.3)),
    ]
    assert [len(windows) for windows in windows_by_question(outputs)] == [2, 1]
    found = combine_windows(windows_by_question(outputs)[0], may_be_none=False)
    assert [(span.text, round(math.exp(span.score), 6)) for span in found.spans] == [
        ("fox", 0.6), ("the", 0.1),
    ]  # fmt: skip
    assert found.text == "fox"
    # The window that is the least sure that it does not answer decides: 0.3 against 0.6.
    assert found.no_answer_probability == pytest.approx(1 / 3)
    prediction = found.as_json()
    assert (prediction["answer"], prediction["start"], prediction["end"]) == ("fox", 5, 9)
    assert prediction["score"] == pytest.approx(6 / 7)
    assert [entry["answer"] for entry in prediction["n_best"]] == ["fox", "the"]


@pytest.mark.parametrize(("no_answer", "text"), [(0.5, "fox"), (0.7, "")])
def test_no_answer_is_given_where_it_is_likelier_than_the_best_span(
    no_answer: float, text: str
) -> None:
    outputs = [window_output([Span(5, 8, "fox", math.log(0.6))], math.log(no_answer))]
    found = combine_windows(outputs, may_be_none=True)
    assert found.text == found.as_json()["answer"] == text
    assert sum(entry["score"] for entry in found.as_json()["n_best"]) == pytest.approx(1)
    # A model that never saw such a question answers all the same.
    assert combine_windows(outputs, may_be_none=False).text == "fox"


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["tiny_bert", "tiny_gpt2", "tiny_llama"])
def test_a_body_gets_the_same_new_head_for_the_same_seed_and_keeps_its_weights(
    family: str, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(family)
    model, again, other = (
        load_model(path, head="question_answering", dtype=torch.float32, seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(model.qa_outputs.weight, again.qa_outputs.weight)
    assert not torch.equal(model.qa_outputs.weight, other.qa_outputs.weight)
    heads = {"tiny_bert": None, "tiny_gpt2": "causal_lm", "tiny_llama": "causal_lm"}
    if heads[family] is not None:
        pretrained = load_model(path, head="causal_lm", dtype=torch.float32)
        own = dict(model.base_model.named_parameters())
        assert own
        for name, parameter in pretrained.base_model.named_parameters():
            assert torch.equal(parameter, own[name]), name


def test_a_model_type_without_such_a_head_is_refused_before_the_data_is_read(
    tiny_bert: Path,
) -> None:
    from transformers import GemmaConfig

    settings = ObjectiveSettings(load_tokenizer(tiny_bert), GemmaConfig(vocab_size=99), 64)
    with pytest.raises(ModelError, match="no model of type `gemma` with a head for question"):
        make_task_objective("question_answering", settings)


def test_label_smoothing_is_refused(tiny_bert: Path) -> None:
    settings = ObjectiveSettings(load_tokenizer(tiny_bert), BertConfig(), 64, label_smoothing=0.1)
    with pytest.raises(ConfigError, match="`label_smoothing` has no effect"):
        make_task_objective("question_answering", settings)
