from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console
from transformers import AutoTokenizer

from fulltune.data.encoding import EncodedExample
from fulltune.data.preview import examine
from fulltune.data.preview_checks import check, require_sound
from fulltune.data.preview_facts import Finding, PreviewFacts, to_json
from fulltune.data.preview_page import render_html
from fulltune.data.preview_view import (
    SampleView,
    TokenView,
    render_terminal,
    rows_of,
    runs_of,
    view_tokens,
)
from fulltune.data.tasks import TaskKind
from fulltune.data.unknown_tokens import unknown_token_id
from fulltune.errors import DataError
from tests.conftest import encoded_example

END = 2


class Rows:
    """Encoded examples in memory, with the columns of an encoded data set."""

    def __init__(self, rows: Sequence[EncodedExample], kind: TaskKind = "chat") -> None:
        self.rows = rows
        self.kind: TaskKind = kind
        self.lengths = np.array([len(row["input_ids"]) for row in rows], dtype=np.int32)
        self.num_targets = np.array([sum(row["targets"]) for row in rows], dtype=np.int32)
        self.num_removed = np.array([row["num_removed"] for row in rows], dtype=np.int32)
        self.num_removed_targets = np.array(
            [row["num_removed_targets"] for row in rows], dtype=np.int32
        )
        self.input_hashes = np.array([row["input_hash"] for row in rows], dtype=np.int64)
        self.example_hashes = np.array([row["example_hash"] for row in rows], dtype=np.int64)
        self.label_names = sorted({label for row in rows for label in row["labels"]})
        self.label_codes = np.array(
            [self.label_names.index(label) for row in rows for label in row["labels"]],
            dtype=np.int64,
        )
        self.label_offsets = np.cumsum([0, *(len(row["labels"]) for row in rows)])

    def where(self, index: int) -> str:
        return self.rows[index]["where"]

    def __getitem__(self, index: int) -> EncodedExample:
        return self.rows[index]


def chat_row(
    number: int,
    prompt: str = "",
    answer: Sequence[int] = (7, END),
    *,
    num_removed: int = 0,
    num_removed_targets: int = 0,
) -> EncodedExample:
    prompt = prompt or f"question {number}"
    return EncodedExample(
        input_ids=[5, 6, *answer],
        targets=[0, 0, *(1 for _ in answer)],
        token_type_ids=[],
        labels=[],
        num_removed=num_removed,
        num_removed_targets=num_removed_targets,
        input_hash=hash(prompt),
        example_hash=hash((prompt, tuple(answer))),
        num_bytes=1,
        where=f"chat.jsonl:{number + 1}",
    )


def class_row(number: int, label: str, text: str = "") -> EncodedExample:
    text = text or f"text {number}"
    return encoded_example(
        [1, 5, 2],
        targets=[0, 0, 0],
        labels=[label] if label else [],
        input_hash=hash(text),
        example_hash=hash((text, label)),
        where=f"reviews.csv:{number + 2}",
    )


def facts_of(
    rows: Sequence[EncodedExample],
    *,
    kind: TaskKind = "chat",
    num_held_out: int = 0,
    end_token_ids: set[int] | None = None,
    unknown_token_id: int | None = None,
) -> PreviewFacts:
    cut = len(rows) - num_held_out
    splits: dict[str, npt.NDArray[np.integer]] = {"train": np.arange(cut)}
    if num_held_out:
        splits["validation"] = np.arange(cut, len(rows))
    return examine(
        Rows(rows, kind),
        splits,
        end_token_ids=end_token_ids or set(),
        unknown_token_id=unknown_token_id,
    )


def only(findings: Sequence[Finding], word: str) -> Finding:
    [finding] = [finding for finding in findings if word in finding.message]
    return finding


# -- counting --------------------------------------------------------------------------------------


def test_tokens_and_targets_are_counted_for_each_split() -> None:
    facts = facts_of([chat_row(0), chat_row(1, answer=(7, 8, 9, END)), chat_row(2)], num_held_out=1)

    train, validation = facts.splits
    assert (train.num_examples, train.num_tokens, train.num_targets) == (2, 10, 6)
    assert train.target_share == 0.6
    assert (validation.num_examples, validation.num_tokens) == (1, 4)
    assert train.longest[0].where == "chat.jsonl:2"
    assert train.lengths is not None
    assert (train.lengths.shortest, train.lengths.longest) == (4, 6)
    assert sum(bar.count for bar in train.lengths.histogram) == 2


def test_sound_data_has_no_findings() -> None:
    facts = facts_of([chat_row(number) for number in range(6)], num_held_out=2, end_token_ids={END})

    assert check(facts) == []
    assert require_sound(facts) == []


def test_a_histogram_of_any_lengths_has_a_bar_for_each_example() -> None:
    rows = [chat_row(number, answer=[7] * size) for number, size in enumerate([1, 30, 500, 3000])]

    lengths = facts_of(rows).splits[0].lengths

    assert lengths is not None
    assert sum(bar.count for bar in lengths.histogram) == 4
    assert 12 <= len(lengths.histogram) <= 25
    assert lengths.histogram[-1].low <= 3002 < lengths.histogram[-1].high


def test_a_million_examples_are_examined_in_seconds() -> None:
    generator = np.random.default_rng(0)
    rows = Rows([class_row(0, "a"), class_row(1, "b")], "classification")
    size = 1_000_000
    rows.lengths = generator.integers(1, 500, size).astype(np.int32)
    rows.num_targets = rows.num_removed = rows.num_removed_targets = np.zeros(size, dtype=np.int32)
    rows.input_hashes = generator.integers(-(2**62), 2**62, size)
    rows.example_hashes = generator.integers(-(2**62), 2**62, size)
    rows.label_codes = generator.integers(0, 2, size)
    rows.label_offsets = np.arange(size + 1)
    rows.where = lambda index: f"rows:{index}"  # type: ignore[method-assign]

    start = time.process_time()
    check(examine(rows, {"train": np.arange(900_000), "validation": np.arange(900_000, size)}))

    assert time.process_time() - start < 6


# -- judging ---------------------------------------------------------------------------------------


def test_a_split_without_any_target_is_an_error() -> None:
    with pytest.raises(DataError, match="`train` trains nothing: none of its 2 examples"):
        require_sound(facts_of([chat_row(0, answer=()), chat_row(1, answer=())]))


def test_truncation_that_leaves_no_target_is_an_error_that_names_it() -> None:
    row = chat_row(0, answer=(), num_removed=9, num_removed_targets=8)

    with pytest.raises(DataError) as caught:
        require_sound(facts_of([row]))

    assert "truncation removed every trained token of 1 example" in str(caught.value.hint)


def test_single_rows_without_target_are_a_warning_with_their_places() -> None:
    finding = only(check(facts_of([chat_row(0), chat_row(1, answer=()), chat_row(2)])), "to learn")

    assert finding.level == "warning"
    assert finding.message.startswith("`train`: 1 of 3 examples (33.3%)")
    assert finding.where == ("chat.jsonl:2",)


def test_truncation_is_never_silent() -> None:
    row = chat_row(1, num_removed=1200, num_removed_targets=800)

    finding = only(check(facts_of([chat_row(0), row])), "cut off")

    assert finding.level == "warning"
    assert "1,200 tokens were removed, 800 of them to be learned" in finding.message
    with pytest.raises(DataError, match=r"1 of 2 examples .* do not fit; .* remove 1,200 tokens"):
        require_sound(facts_of([chat_row(0), row]), may_truncate=False)
    assert finding.where == ("chat.jsonl:2",)


def test_duplicates_within_a_split_name_the_first_row() -> None:
    facts = facts_of([chat_row(0, "same"), chat_row(1), chat_row(2, "same"), chat_row(3, "same")])

    finding = only(check(facts), "repeat")

    assert "2 of 4 examples" in finding.message
    assert finding.where == (
        "chat.jsonl:3 repeats chat.jsonl:1",
        "chat.jsonl:4 repeats chat.jsonl:1",
    )


def test_few_duplicates_are_a_note() -> None:
    rows = [chat_row(0, "same"), chat_row(1, "same"), *(chat_row(n) for n in range(2, 50))]

    assert only(check(facts_of(rows)), "repeat").level == "note"


def test_leaks_between_splits_count_examples_and_inputs_apart() -> None:
    rows = [
        chat_row(0, "a"),
        chat_row(1, "b"),
        chat_row(2, "c"),
        chat_row(3, "a"),
        chat_row(4, "b", answer=(8, END)),
        chat_row(5, "d"),
    ]

    finding = only(check(facts_of(rows, num_held_out=3)), "shares")

    assert finding.level == "warning"
    assert "`validation` shares 2 examples with `train`" in finding.message
    assert "1 whole, 1 with the same input but another target" in finding.message
    assert finding.where == ("chat.jsonl:4", "chat.jsonl:5")


def test_few_contradicting_labels_are_a_warning_with_both_rows() -> None:
    rows = [class_row(number, "ab"[number % 2]) for number in range(98)]
    rows += [class_row(98, "a", "same"), class_row(99, "b", "same")]

    facts = facts_of(rows, kind="classification")
    finding = only(check(facts), "not its label")

    assert finding.level == "warning"
    assert "2 of 100 examples (2.0%)" in finding.message
    assert "more than 99.0%" in finding.message
    assert finding.where == ("reviews.csv:100 `a` but reviews.csv:101 `b`",)


@pytest.mark.parametrize(("split", "level"), [("train", "error"), ("test", "warning")])
def test_many_contradicting_labels_stop_training(split: str, level: str) -> None:
    rows = [class_row(number, "aab"[number % 3], "same") for number in range(9)]

    facts = examine(Rows(rows, "classification"), {split: np.arange(9)})

    assert only(check(facts), "not its label").level == level
    assert facts.splits[0].labels is not None
    assert facts.splits[0].labels.num_contradicting == 9
    assert facts.splits[0].labels.highest_accuracy == pytest.approx(6 / 9)


def test_repeated_rows_of_one_label_do_not_contradict() -> None:
    rows = [class_row(0, "a", "same"), class_row(1, "a", "same"), class_row(2, "b")]

    facts = facts_of(rows, kind="classification")

    assert facts.splits[0].labels is not None
    assert facts.splits[0].labels.num_contradicting == 0
    assert facts.splits[0].labels.highest_accuracy == 1


def test_a_label_that_training_lacks_is_an_error_with_its_first_row() -> None:
    rows = [class_row(0, "a"), class_row(1, "b"), class_row(2, "A"), class_row(3, "a")]

    findings = check(facts_of(rows, kind="classification", num_held_out=2))

    assert only(findings, "labels that").level == "error"
    assert only(findings, "labels that").message.endswith("`train` does not: `A`")
    assert only(findings, "labels that").where == (rows[2]["where"],)
    assert only(findings, "no example of").level == "note"


def test_a_single_training_label_is_an_error() -> None:
    facts = facts_of([class_row(0, "a"), class_row(1, "a")], kind="classification")

    assert only(check(facts), "one label only").level == "error"


def test_rows_without_a_label_are_counted_and_all_of_them_are_an_error() -> None:
    some = facts_of([class_row(0, "a"), class_row(1, "b"), class_row(2, "")], kind="classification")
    none = facts_of([class_row(0, ""), class_row(1, "")], kind="classification")

    assert some.splits[0].num_without_target == 1
    assert some.splits[0].labels is not None
    assert some.splits[0].labels.counts == {"a": 1, "b": 1}
    assert only(check(some), "no label").level == "warning"
    assert only(check(none), "trains nothing").level == "error"


def test_an_end_of_turn_that_is_never_trained_is_a_warning() -> None:
    rows = [chat_row(number, answer=(7, 8)) for number in range(4)]

    finding = only(check(facts_of(rows, end_token_ids={END})), "end of the turn")

    assert finding.level == "warning"
    assert "the model will not learn to stop" in finding.message


def test_the_last_target_decides_whether_the_end_is_trained() -> None:
    rows = [chat_row(0), chat_row(1, answer=(END, 7)), chat_row(2, answer=())]

    ends = facts_of(rows, end_token_ids={END}).splits[0].end_of_turn

    assert ends is not None
    assert (ends.num_ending, ends.num_sampled) == (1, 2)


def test_an_empty_split_is_an_error() -> None:
    facts = examine(Rows([chat_row(0)]), {"train": np.arange(1), "validation": np.arange(0)})

    assert [finding.message for finding in check(facts)] == ["`validation` has no example"]


def test_all_errors_are_raised_at_once() -> None:
    rows = [class_row(0, "a"), class_row(1, "a"), class_row(2, "b")]

    with pytest.raises(DataError) as caught:
        require_sound(facts_of(rows, kind="classification", num_held_out=1))

    assert "one label only" in str(caught.value)
    assert "labels that `train` does not: `b`" in str(caught.value)


def test_json_holds_facts_and_findings() -> None:
    facts = facts_of([chat_row(0), chat_row(1, answer=())], end_token_ids={END})

    document = json.loads(to_json(facts, check(facts)))

    assert PreviewFacts.model_validate(document["facts"]) == facts
    assert document["findings"][0]["level"] == "warning"


# -- tokens ----------------------------------------------------------------------------------------


def decode_bytes(ids: list[int]) -> str:
    """A tokenizer whose tokens are single bytes."""
    return bytes(ids).decode("utf-8", errors="replace")


def test_bytes_of_one_character_are_shown_as_that_character() -> None:
    ids = list("a你好🙂".encode())

    views = view_tokens(decode_bytes, ids, [0] * len(ids), len(ids))

    assert [view.text for view in views] == ["a", "你", "好", "🙂"]


def test_a_character_with_a_trained_byte_is_trained() -> None:
    ids = list("你好".encode())

    views = view_tokens(decode_bytes, ids, [0, 0, 0, 1, 1, 1], 6)

    assert [(view.text, view.state) for view in views] == [("你", "context"), ("好", "trained")]


def test_bytes_that_are_no_character_do_not_swallow_the_text_after_them() -> None:
    ids = [0xFF, *b"abc", 0xE4]

    views = view_tokens(decode_bytes, ids, [1] * 5, 5)

    assert "".join(view.text for view in views) == "\ufffdabc\ufffd"
    assert views[-2].text == "c"


def test_tokens_after_the_cut_are_truncated_whether_trained_or_not() -> None:
    views = view_tokens(decode_bytes, list(b"abcd"), [0, 1, 0, 1], 2)

    assert [view.state for view in views] == ["context", "trained", "truncated", "truncated"]


def test_spaces_that_a_tokenizer_decodes_only_inside_a_text_are_kept() -> None:
    words = ["▁Hello", "▁big", "▁world"]

    def decode(ids: list[int]) -> str:
        return "".join(words[token] for token in ids).replace("▁", " ").removeprefix(" ")

    views = view_tokens(decode, [0, 1, 2], [0, 0, 1], 3)

    assert [view.text for view in views] == ["Hello", " big", " world"]


def test_long_runs_are_shortened_and_their_ends_kept() -> None:
    tokens = [TokenView(str(number), "context") for number in range(100)]
    tokens += [TokenView("answer", "trained"), *(TokenView("[PAD]", "padding") for _ in range(9))]

    context, answer, padding = runs_of(tokens, limit=4)

    assert (context.pieces, context.num_omitted, context.tail) == (["0", "1"], 96, ["98", "99"])
    assert answer.pieces == ["answer"]
    assert (padding.pieces, padding.num_omitted) == (["[PAD]"], 8)


# -- rendering -------------------------------------------------------------------------------------

SAMPLES = [
    SampleView(
        "chat.jsonl:1",
        None,
        [
            TokenView("<|im_start|>", "context"),
            TokenView("法国的首都？\n", "context"),
            TokenView("巴黎", "trained"),
            TokenView("<|im_end|>", "trained"),
            TokenView(" lost", "truncated"),
        ],
    ),
    SampleView("<b>.csv:2", "</span>", [TokenView("<script>alert(1)</script>[red]", "context")]),
]


def terminal(*, colour: bool, samples: Sequence[SampleView] = SAMPLES) -> str:
    console = Console(
        file=io.StringIO(),
        width=100,
        force_terminal=colour,
        color_system="truecolor" if colour else None,
        no_color=not colour,
        legacy_windows=False,
    )
    facts = facts_of([chat_row(0), chat_row(1, answer=()), chat_row(2)], num_held_out=1)
    render_terminal(facts, check(facts), samples, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_without_colours_trained_tokens_stand_in_brackets() -> None:
    text = terminal(colour=False)

    assert "⟦巴黎<|im_end|>⟧~~ lost~~" in text
    assert "⟦trained⟧   read, not trained   ~~removed by truncation~~" in text
    assert "\x1b" not in text


def test_with_colours_trained_tokens_are_underlined() -> None:
    text = terminal(colour=True)

    assert "\x1b[4;32m巴黎<|im_end|>\x1b[0m" in text
    assert "\x1b[9;31m lost\x1b[0m" in text
    assert "⟦" not in text


def test_findings_and_counts_are_printed_with_places_and_hints() -> None:
    text = terminal(colour=False)

    assert "warning: `train`: 1 of 2 examples" in text
    assert "rows: chat.jsonl:2" in text
    assert "hint: check that these rows have an answer" in text
    assert "trained tokens" in text


def test_sound_data_is_said_to_be_sound() -> None:
    facts = facts_of([chat_row(0)])
    console = Console(file=io.StringIO(), width=80)
    render_terminal(facts, [], [], console)

    assert isinstance(console.file, io.StringIO)
    assert "nothing to object to" in console.file.getvalue()
    assert "Nothing to object to" in Page(render_html(facts, [], [])).text


def test_labels_are_shown_with_their_counts_and_never_read_as_markup() -> None:
    rows = [class_row(number, f"[red]<i>label {number % 30}") for number in range(60)]
    facts = facts_of(rows, kind="classification")
    console = Console(file=io.StringIO(), width=80)
    render_terminal(facts, [], [], console)

    assert isinstance(console.file, io.StringIO)
    for text in (console.file.getvalue(), Page(render_html(facts, [], [])).text):
        assert "[red]<i>label 0" in text
        assert "2 (3.3%)" in text
        assert "and 10 more labels" in text


def test_text_of_the_data_can_neither_style_nor_drive_the_terminal() -> None:
    evil = SampleView("x:1", None, [TokenView("\x1b[2J[bold]\x07\u202eabc\u200d", "trained")])

    text = terminal(colour=False, samples=[evil])

    assert "\\x1b[2J[bold]\\x07\\u202eabc\u200d" in text


class Page(HTMLParser):
    """Collects the tags and the text of a page, and checks that every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.stack: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def page() -> str:
    facts = facts_of([chat_row(0), chat_row(1, answer=()), chat_row(2)], num_held_out=1)
    return render_html(facts, check(facts), SAMPLES)


def test_the_page_escapes_the_data_and_needs_nothing_else() -> None:
    read = Page(page())

    assert "script" not in read.tags
    assert read.addresses == []
    assert "<script>alert(1)</script>[red]" in read.text
    assert "<b>.csv:2 → </span>" in read.text
    assert "b" not in read.tags


def test_the_page_says_what_the_terminal_says() -> None:
    read = Page(page())

    assert "warning: `train`: 1 of 2 examples" in read.text
    assert "hint: check that these rows have an answer" in read.text
    assert "法国的首都？⏎\n巴黎<|im_end|> lost" in read.text
    assert read.tags.count("svg") == 2


def test_the_page_marks_tokens_by_state_and_follows_the_colour_scheme() -> None:
    text = page()

    assert '<span class="trained"><i>巴黎</i><i>&lt;|im_end|&gt;</i></span>' in text
    assert "prefers-color-scheme: dark" in text
    assert 'name="viewport"' in text


# -- text that the tokenizer cannot write ----------------------------------------------------------


def test_unknown_tokens_are_counted_shown_and_warned_of() -> None:
    facts = facts_of([class_row(0, "a"), class_row(1, "b")], kind="classification",
                     unknown_token_id=5)  # fmt: skip
    unknown = facts.splits[0].unknown
    assert unknown is not None
    assert (unknown.num_unknown, unknown.num_tokens) == (2, 6)
    assert ("unknown tokens", ["2 (33.3%)"]) in rows_of(facts)
    finding = only(check(facts), "unknown token")
    assert finding.level == "warning"
    assert "33.3%" in finding.message
    assert finding.where == ("reviews.csv:2", "reviews.csv:3")
    assert PreviewFacts.model_validate_json(facts.model_dump_json()) == facts


def test_few_unknown_tokens_are_counted_without_a_warning() -> None:
    rows = [chat_row(0, answer=[*range(100, 140), END]), chat_row(1, answer=(3, END))]
    facts = facts_of(rows, unknown_token_id=3)
    assert ("unknown tokens", ["1 (2.1%)"]) in rows_of(facts)
    assert not [finding for finding in check(facts) if "unknown" in finding.message]


def test_an_end_of_text_that_is_called_unknown_is_not_counted(
    tiny_gpt2: Path, tiny_bert: Path
) -> None:
    gpt2, bert = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_gpt2, tiny_bert))
    gpt2.unk_token = gpt2.eos_token
    assert unknown_token_id(gpt2) is None
    assert unknown_token_id(bert) == bert.unk_token_id
    assert bert.unk_token_id in bert("这里没有这些字龘")["input_ids"]
