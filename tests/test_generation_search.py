"""Beam search, forced beginnings and repeats, on decoders and on encoder-decoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fulltune.config import build_config
from fulltune.data.tasks import Message
from fulltune.errors import ConfigError, DataError
from fulltune.inference import (
    GenerationSettings,
    Loaded,
    generate,
    generate_from_ids,
    generate_text,
    load_for_inference,
)

TEXTS = ["The red house", "A dog sleeps by the river.", "one", "你好，世界"]


@pytest.fixture(scope="module", params=["tiny_t5", "tiny_llama"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    torch.manual_seed(0)
    found = load_for_inference(
        str(request.getfixturevalue(request.param)), device=torch.device("cpu")
    )
    # Weights of their first size give nearly even distributions, all of whose beams are ties.
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.mul_(2.0)
    return found


def prompts_of(loaded: Loaded) -> list[list[int]]:
    return [loaded.tokenizer(text)["input_ids"] for text in TEXTS]


def answers(loaded: Loaded, **values: Any) -> list[str]:
    settings = build_config(GenerationSettings, {"max_new_tokens": 8, **values})
    return [
        answer.text
        for answer in generate_from_ids(
            loaded.model, loaded.tokenizer, prompts_of(loaded), settings=settings
        )
    ]


@pytest.mark.parametrize(
    ("values", "own"),
    [
        ({}, {}),
        ({"num_beams": 3}, {"num_beams": 3}),
        (
            {"num_beams": 3, "length_penalty": -2.0},
            {"num_beams": 3, "length_penalty": -2.0},
        ),
    ],
)
def test_answers_are_those_that_transformers_finds_for_each_prompt_alone(
    loaded: Loaded, values: dict[str, Any], own: dict[str, Any]
) -> None:
    tokenizer, model = loaded.tokenizer, loaded.model.eval()
    alone = []
    for prompt in prompts_of(loaded):
        output = model.generate(  # type: ignore[operator]
            torch.tensor([prompt]), max_new_tokens=8, do_sample=False,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, **own,
        )[0]  # fmt: skip
        start = 1 if model.config.is_encoder_decoder else len(prompt)
        text = tokenizer.decode(output[start:], skip_special_tokens=True)
        alone.append(text.rstrip("\ufffd"))
    assert [text.rstrip("\ufffd") for text in answers(loaded, **values)] == alone


def test_every_answer_begins_as_it_must(loaded: Loaded) -> None:
    free, forced = answers(loaded), answers(loaded, prefix_text="Das Haus")
    assert all(text.startswith("Das Haus") for text in forced)
    assert forced != free
    assert forced == answers(loaded, prefix_text="Das Haus")
    assert answers(loaded, prefix_text="你好", num_beams=2)[0].startswith("你好")


def test_no_ngram_comes_twice_in_an_answer_and_those_of_the_prompt_may(loaded: Loaded) -> None:
    settings = GenerationSettings(max_new_tokens=24, no_repeat_ngram_size=1)
    found = generate_from_ids(loaded.model, loaded.tokenizer, prompts_of(loaded), settings=settings)
    tokenizer = loaded.tokenizer
    repeating = generate_from_ids(
        loaded.model, tokenizer, prompts_of(loaded), settings=GenerationSettings(max_new_tokens=24)
    )
    assert any(answer.text != other.text for answer, other in zip(found, repeating, strict=True))
    # A forced beginning is part of the answer, and a prompt is not.
    prompt = tokenizer("house river", add_special_tokens=False)["input_ids"]
    start = "house"
    allowed = generate_from_ids(
        loaded.model, tokenizer, [prompt],
        settings=GenerationSettings(max_new_tokens=1, prefix_text=start, no_repeat_ngram_size=1),
    )  # fmt: skip
    assert allowed[0].text.startswith(start)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_beams": 2, "temperature": 0.7}, "contradict each other"),
        ({"length_penalty": 2.0}, "`length_penalty` has no effect with `num_beams: 1`"),
        ({"num_beams": 0}, "num_beams"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_config(GenerationSettings, values)


def test_beams_cannot_be_streamed(tiny_llama: Path) -> None:
    loaded = load_for_inference(str(tiny_llama), device=torch.device("cpu"))
    with pytest.raises(ConfigError, match="cannot be shown word by word"):
        generate(
            loaded.model, loaded.tokenizer, [[Message("user", "Hello")]],
            settings=GenerationSettings(num_beams=2), stream=lambda row, piece: None,
        )  # fmt: skip


def test_a_beginning_takes_its_room_of_the_context(tiny_llama: Path) -> None:
    loaded = load_for_inference(str(tiny_llama), device=torch.device("cpu"))
    settings = GenerationSettings(prefix_text="river " * 300)
    with pytest.raises(DataError, match="no answer fits"):
        generate_text(loaded.model, loaded.tokenizer, ["house " * 20], settings=settings)
