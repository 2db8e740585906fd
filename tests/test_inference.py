from __future__ import annotations

import copy
import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertForSequenceClassification, LlamaForCausalLM, PreTrainedModel

from fulltune.data.tasks import ChatExample, ClassificationExample, Message
from fulltune.errors import DataError, ModelError
from fulltune.inference import (
    Answer,
    GenerationSettings,
    Loaded,
    answering,
    build_objective,
    classify,
    generate,
    generate_text,
    load_for_inference,
    render_prompt,
    render_text_prompt,
    stop_ids,
)
from fulltune.inference.next_token import RowSampler

CPU = torch.device("cpu")
CONVERSATIONS = [
    [Message("user", "What colour is house 3 in Oslo?")],
    [Message("system", "Answer in one short sentence."), Message("user", "Hi")],
    [
        Message("user", "法国的首都是哪里？"),
        Message("assistant", "巴黎。"),
        Message("user", "Are you sure? " * 6),
    ],
    [Message("user", "What colour is house 3 in Oslo?" * 3)],
]


@pytest.fixture(scope="module")
def llama(tiny_llama: Path) -> Loaded:
    return load_for_inference(str(tiny_llama), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def gpt2(tiny_gpt2: Path) -> Loaded:
    return load_for_inference(str(tiny_gpt2), device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def classifier_dir(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("classifier") / "model"
    shutil.copytree(tiny_bert, directory)
    torch.manual_seed(4)
    model = BertForSequenceClassification.from_pretrained(
        tiny_bert, id2label={0: "number", 1: "person", 2: "place"}, label2id={}, num_labels=3
    )
    with torch.no_grad():
        model.classifier.weight.normal_(0, 2)
    model.save_pretrained(directory)
    return directory


def greedy_by_hand(loaded: Loaded, messages: list[Message], num_tokens: int) -> list[int]:
    tokens = render_prompt(loaded.tokenizer, messages)
    stops, start = stop_ids(loaded.model, loaded.tokenizer), len(tokens)
    with torch.no_grad():
        for _ in range(num_tokens):
            token = int(loaded.model(torch.tensor([tokens])).logits[0, -1].argmax())
            if token in stops:
                break
            tokens = [*tokens, token]
    return tokens[start:]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_answers_are_the_likeliest_tokens_one_by_one(
    family: str, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(family)
    answers = generate(
        loaded.model,
        loaded.tokenizer,
        CONVERSATIONS,
        settings=GenerationSettings(max_new_tokens=12),
    )
    for messages, answer in zip(CONVERSATIONS, answers, strict=True):
        expected = greedy_by_hand(loaded, messages, 12)
        text = loaded.tokenizer.decode(expected, skip_special_tokens=True)
        # The last character may have been cut in the middle of its bytes.
        assert answer.text == (text if answer.stopped else text.rstrip("\ufffd"))
        assert answer.num_tokens == len(expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_answer_does_not_depend_on_the_rows_beside_it(
    family: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    loaded: Loaded = request.getfixturevalue(family)
    limits = {"top_p": 0.9, "top_k": 40} if temperature else {}
    how = GenerationSettings.model_validate(
        {"max_new_tokens": 16, "temperature": temperature, **limits}
    )
    alone = [
        generate(loaded.model, loaded.tokenizer, [messages], settings=how)[0]
        for messages in CONVERSATIONS
    ]
    together = generate(loaded.model, loaded.tokenizer, CONVERSATIONS, settings=how)
    in_pairs = generate(
        loaded.model, loaded.tokenizer, CONVERSATIONS[::-1], settings=how, batch_tokens=200
    )
    assert alone == together == in_pairs[::-1]


def test_another_seed_samples_another_answer(llama: Loaded) -> None:
    answers = {
        generate(
            llama.model,
            llama.tokenizer,
            CONVERSATIONS[:1],
            settings=GenerationSettings(max_new_tokens=8, temperature=1.0, seed=seed),
        )[0].text
        for seed in range(4)
    }
    assert len(answers) > 1


def test_samples_have_the_frequencies_of_the_model() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.2, 0.15, 0.05]]).log()
    count = 4000
    sampler = RowSampler([[0]], seed=0, temperature=1.0, top_p=1.0, top_k=0)
    drawn = torch.stack(
        [sampler(torch.empty(0), logits).argmax(-1) for _ in range(count)]
    ).flatten()
    frequencies = torch.bincount(drawn, minlength=5) / count
    # Four standard deviations of a share of one half.
    assert torch.allclose(frequencies, logits.exp()[0], atol=4 * 0.5 / count**0.5)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=12, unique=True),
    st.integers(1, 12),
    st.floats(0.01, 1.0),
)
def test_a_sample_is_among_the_top_k_and_within_top_p(
    values: list[float], top_k: int, top_p: float
) -> None:
    logits = torch.tensor([values], dtype=torch.float32)
    sampler = RowSampler([[0]], seed=0, temperature=1.0, top_p=top_p, top_k=top_k)
    token = int(sampler(torch.empty(0), logits).argmax())
    kept = sorted(values, reverse=True)[:top_k]
    assert values[token] >= kept[-1]
    shares = torch.tensor(kept, dtype=torch.float32).softmax(0)
    rank = kept.index(values[token])
    assert rank == 0 or float(shares[:rank].sum()) < top_p + 1e-5


def test_the_prompt_is_the_context_that_training_saw(llama: Loaded) -> None:
    objective = build_objective(llama)
    for messages in CONVERSATIONS:
        example = ChatExample((*messages, Message("assistant", "\nIt is blue.")), "here")
        [encoded] = objective.encode(example)
        last = len(encoded["targets"]) - 1
        while encoded["targets"][last - 1] or not encoded["targets"][last]:
            last -= 1  # the first token of the last trained stretch
        assert render_prompt(llama.tokenizer, messages) == encoded["input_ids"][:last]


def test_the_prompt_of_a_text_is_the_beginning_of_its_document(llama: Loaded) -> None:
    text = "The capital of the country"
    assert render_text_prompt(llama.tokenizer, text) == llama.tokenizer(text)["input_ids"]
    with pytest.raises(DataError, match="the prompt is empty"):
        render_text_prompt(llama.tokenizer, "")


def teach_to_say(loaded: Loaded, token: str) -> PreTrainedModel:
    """A copy whose every next token is ``token``."""
    model = copy.deepcopy(loaded.model)
    index = loaded.tokenizer.convert_tokens_to_ids(token)
    with torch.no_grad():
        model.model.norm.weight.fill_(0)
        head = torch.nn.Linear(model.lm_head.in_features, model.lm_head.out_features)
        head.weight.fill_(0)
        head.bias.fill_(0)
        head.bias[index] = 1
        model.lm_head = head
    return model


def test_an_answer_stops_at_the_templates_end_of_turn_even_if_eos_is_another_token(
    llama: Loaded,
) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.eos_token = "<|endoftext|>"
    model = teach_to_say(llama, "<|im_end|>")
    model.generation_config.eos_token_id = None
    assert generate(model, tokenizer, CONVERSATIONS[:1]) == [Answer("", 0, stopped=True)]


def test_an_answer_that_never_ends_is_cut_and_says_so(llama: Loaded) -> None:
    model = teach_to_say(llama, "Oslo") if "Oslo" in llama.tokenizer.get_vocab() else llama.model
    [answer] = generate(
        model, llama.tokenizer, CONVERSATIONS[:1], settings=GenerationSettings(max_new_tokens=5)
    )
    assert answer.num_tokens == 5
    assert not answer.stopped


def test_an_answer_ends_with_the_context_whatever_is_beside_it(gpt2: Loaded) -> None:
    # GPT-2 has no position behind its context: a row that went on would fail.
    nearly_full = [Message("user", "a " * 225)]
    room = 256 - len(render_prompt(gpt2.tokenizer, nearly_full))
    assert 0 < room < 30
    how = GenerationSettings(max_new_tokens=40)
    together = generate(gpt2.model, gpt2.tokenizer, [nearly_full, *CONVERSATIONS], settings=how)
    alone = generate(gpt2.model, gpt2.tokenizer, [nearly_full], settings=how)
    assert together[0] == alone[0]
    assert together[0].num_tokens <= room


def test_a_prompt_longer_than_the_context_names_its_line(llama: Loaded) -> None:
    conversations = [CONVERSATIONS[0], [Message("user", "word " * 300)]]
    with pytest.raises(DataError, match=r"^chat.jsonl:2: the prompt has \d+ tokens.*is 256"):
        generate(
            llama.model, llama.tokenizer, conversations, where=["chat.jsonl:1", "chat.jsonl:2"]
        )


def test_a_conversation_that_needs_no_answer_is_an_error(llama: Loaded) -> None:
    with pytest.raises(DataError, match="nothing to answer"):
        render_prompt(llama.tokenizer, [Message("user", "a"), Message("assistant", "b")])
    with pytest.raises(DataError, match="nothing to answer"):
        render_prompt(llama.tokenizer, [])


def test_a_stream_gives_the_same_text_in_whole_characters(llama: Loaded) -> None:
    pieces: dict[int, list[str]] = {index: [] for index in range(len(CONVERSATIONS))}
    answers = generate(
        llama.model,
        llama.tokenizer,
        CONVERSATIONS,
        settings=GenerationSettings(max_new_tokens=20, temperature=1.5),
        stream=lambda index, piece: pieces[index].append(piece),
    )
    assert ["".join(pieces[index]) for index in range(len(CONVERSATIONS))] == [
        answer.text for answer in answers
    ]
    assert max(map(len, pieces.values())) > 3


def test_text_is_continued(llama: Loaded) -> None:
    answers = generate_text(
        llama.model,
        llama.tokenizer,
        ["The capital", "She sells sea shells"],
        settings=GenerationSettings(max_new_tokens=6),
    )
    assert len(answers) == 2


def test_answering_leaves_modes_and_random_states_as_they_were(tiny_gpt2: Path) -> None:
    loaded = load_for_inference(str(tiny_gpt2), device=CPU, dtype=torch.float32)
    model = loaded.model
    model.train()
    model.transformer.h[0].eval()  # a frozen layer may be kept in evaluation mode
    modes = [module.training for module in model.modules()]
    random.seed(0)
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate()
    generate(
        model,
        loaded.tokenizer,
        CONVERSATIONS,
        settings=GenerationSettings(max_new_tokens=3, temperature=1),
    )
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    with pytest.raises(KeyboardInterrupt), answering(model):
        raise KeyboardInterrupt
    assert [module.training for module in model.modules()] == modes


def test_generation_makes_no_noise(llama: Loaded, caplog: pytest.LogCaptureFixture) -> None:
    model = copy.deepcopy(llama.model)
    model.generation_config.update(temperature=0.6, top_p=0.9, max_length=20, do_sample=True)
    transformers_logger = logging.getLogger("transformers")
    transformers_logger.setLevel(logging.WARNING)
    transformers_logger.propagate = True
    try:
        with caplog.at_level(logging.WARNING):
            generate(
                model, llama.tokenizer, CONVERSATIONS, settings=GenerationSettings(max_new_tokens=4)
            )
    finally:
        transformers_logger.setLevel(logging.ERROR)
        transformers_logger.propagate = False
    assert caplog.text == ""


def examples_of(texts: list[str]) -> list[ClassificationExample]:
    return [
        ClassificationExample(text, None, None, f"rows.jsonl:{number}")
        for number, text in enumerate(texts, start=1)
    ]


TEXTS = [
    "Where is the red house of Paris?",
    "Who painted the door?",
    "How many blue birds live in Rome near the river by the sea " * 3,
    "house",
]


def test_labels_do_not_depend_on_the_batch_and_are_transformers_own(classifier_dir: Path) -> None:
    loaded = load_for_inference(str(classifier_dir), device=CPU, dtype=torch.float32)
    objective = build_objective(loaded)
    together = list(classify(loaded.model, objective, examples_of(TEXTS)))
    one_by_one = list(classify(loaded.model, objective, examples_of(TEXTS), batch_tokens=1))
    windows = list(classify(loaded.model, objective, iter(examples_of(TEXTS)), window=3))
    model = BertForSequenceClassification.from_pretrained(classifier_dir)
    model.eval()
    for place, text in enumerate(TEXTS):
        inputs = loaded.tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            expected = model(**inputs).logits[0].softmax(-1)
        assert together[place].label == ("number", "person", "place")[int(expected.argmax())]
        for predictions in (together, one_by_one, windows):
            # float32 products of other shapes: a few units in the last place.
            assert list(predictions[place].probabilities.values()) == pytest.approx(
                expected.tolist(), abs=2e-6
            )
            assert sum(predictions[place].probabilities.values()) == pytest.approx(1)


def test_a_text_longer_than_the_context_names_its_line_or_is_truncated(
    classifier_dir: Path,
) -> None:
    loaded = load_for_inference(str(classifier_dir), device=CPU)
    texts = ["short", "house " * 200]
    with pytest.raises(DataError, match=r"rows.jsonl:2: .*128"):
        list(classify(loaded.model, build_objective(loaded), examples_of(texts)))
    truncating = build_objective(loaded, too_long="truncate")
    assert len(list(classify(loaded.model, truncating, examples_of(texts)))) == 2


def test_the_kind_is_read_from_the_folder_or_inferred_and_stated(
    tiny_llama: Path, tiny_bert: Path, classifier_dir: Path, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    with caplog.at_level(logging.INFO, logger="fulltune"):
        assert load_for_inference(str(tiny_llama), device=CPU).kind == "chat"
    assert "taken as a chat model, since its tokenizer has a chat template" in caplog.text
    classifier = load_for_inference(str(classifier_dir), device=CPU)
    assert (classifier.kind, classifier.labels) == ("classification", ("number", "person", "place"))
    written = tmp_path / "run" / "model"
    shutil.copytree(tiny_llama, written)
    info = {"kind": "text", "max_length": 64, "base_model": "x", "fulltune_version": "0"}
    (written / "fulltune.json").write_text(json.dumps(info), encoding="utf-8")
    assert load_for_inference(str(written), device=CPU).kind == "text"
    assert load_for_inference(str(written.parent), device=CPU).path == written
    with pytest.raises(ModelError, match="without a trained head"):
        load_for_inference(str(tiny_bert), device=CPU)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_stored_dtype_is_kept_unless_another_is_asked_for(
    dtype: torch.dtype, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "model")
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=dtype).save_pretrained(tmp_path / "model")
    kept = load_for_inference(str(tmp_path / "model"), device=CPU)
    assert kept.model.dtype == dtype
    asked = load_for_inference(str(tmp_path / "model"), device=CPU, dtype=torch.float32)
    assert asked.model.dtype == torch.float32
