"""Text to text: what the model reads, what it learns, and that the loss is transformers' own."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from fulltune.data.tasks import Message, SourceTargetExample
from fulltune.errors import ConfigError, DataError
from fulltune.inference import render_prompt
from fulltune.models.loading import load_model_config, load_tokenizer
from fulltune.objectives.of_task import ObjectiveSettings, make_task_objective
from fulltune.objectives.prompted_lm import PromptedLM
from fulltune.objectives.sequence_to_sequence import SequenceToSequence, split_pair

PAIRS = [
    SourceTargetExample("The red house", "Das rote Haus", "pairs.jsonl:1"),
    SourceTargetExample("A dog sleeps by the river.", "河边的狗在睡觉。", "pairs.jsonl:2"),
    SourceTargetExample("one", "1", "pairs.jsonl:3"),
]


def make_objective(path: Path, **values: Any) -> Any:
    settings = ObjectiveSettings(
        load_tokenizer(path), load_model_config(path), values.pop("max_length", 200), **values
    )
    return make_task_objective("sequence_to_sequence", settings)


def without_template(path: Path, folder: Path) -> Path:
    tokenizer = load_tokenizer(path)
    tokenizer.chat_template = None
    for file in path.iterdir():
        if not file.name.startswith(("token", "chat_template")):
            (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    return folder


def test_the_loss_of_a_t5_is_the_one_that_transformers_computes(tiny_t5: Path) -> None:
    objective = make_objective(tiny_t5, prefix="translate: ")
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5).eval()
    examples = [objective.encode(pair)[0] for pair in PAIRS]
    batch = objective.collate(examples)
    pairs = [split_pair(example) for example in examples]
    width = max(len(target) for _, target in pairs)
    labels_BT = torch.tensor([[*target, *[-100] * (width - len(target))] for _, target in pairs])
    loss_sum = objective.loss_sum(model, batch)
    assert loss_sum.dtype == torch.float32
    own = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels_BT
    ).loss
    assert objective.num_targets(batch) == int((labels_BT != -100).sum())
    # Both are float32 sums of some thirty terms in another order.
    torch.testing.assert_close(loss_sum / objective.num_targets(batch), own, rtol=1e-5, atol=0)
    mine, theirs = (
        torch.autograd.grad(loss, model.parameters())
        for loss in (loss_sum / objective.num_targets(batch), own)
    )
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["tiny_t5", "tiny_gpt2"])
def test_what_a_pair_costs_does_not_depend_on_the_pairs_beside_it(
    request: pytest.FixtureRequest, family: str
) -> None:
    path = request.getfixturevalue(family)
    objective = make_objective(path)
    auto: Any = AutoModelForSeq2SeqLM if family == "tiny_t5" else AutoModelForCausalLM
    model = auto.from_pretrained(path, attn_implementation="eager").eval()
    objective = objective if family == "tiny_t5" else replace(objective, packing=False)
    examples = [objective.encode(pair)[0] for pair in PAIRS]
    together = objective.score(model, objective.collate(examples))
    alone = [objective.score(model, objective.collate([example])) for example in examples]
    assert together.num_targets == sum(scores.num_targets for scores in alone)
    assert together.loss_sum == pytest.approx(sum(scores.loss_sum for scores in alone), rel=1e-5)


def test_a_t5_reads_its_prefix_and_the_source_as_its_tokenizer_encodes_them(tiny_t5: Path) -> None:
    objective = make_objective(tiny_t5, prefix="translate: ")
    (encoded,) = objective.encode(PAIRS[1])
    source, target = split_pair(encoded)
    assert source == objective.tokenizer("translate: " + PAIRS[1].source)["input_ids"]
    assert target == objective.tokenizer(PAIRS[1].target)["input_ids"]
    assert encoded["reference"] == PAIRS[1].target
    assert objective.prompt_ids(replace(PAIRS[1], target=None)) == source


def test_a_decoder_is_prompted_by_its_chat_template(tiny_llama: Path) -> None:
    objective = make_objective(tiny_llama, prompt="Translate: {source}!")
    (encoded,) = objective.encode(PAIRS[1])
    prompt, target = split_pair(encoded)
    asked = [Message("user", f"Translate: {PAIRS[1].source}!")]
    assert prompt == render_prompt(objective.tokenizer, asked)
    assert prompt == objective.prompt_ids(replace(PAIRS[1], target=None))
    assert objective.tokenizer.decode(target) == f"{PAIRS[1].target}<|im_end|>"


def test_a_decoder_without_a_chat_template_gets_a_plain_prompt(
    tiny_gpt2: Path, tmp_path: Path
) -> None:
    objective = make_objective(without_template(tiny_gpt2, tmp_path))
    assert objective.prompt == "{source}\n"
    (encoded,) = objective.encode(PAIRS[0])
    prompt, target = split_pair(encoded)
    assert objective.tokenizer.decode(prompt) == "The red house\n"
    assert objective.tokenizer.decode(target) == "Das rote Haus<|im_end|>"
    assert prompt == objective.prompt_ids(PAIRS[0])
    # Where prompt and target meet, the tokens are those that generation sees.
    spaced = replace(objective, prompt="{source}\n\n")
    assert split_pair(spaced.encode(PAIRS[0])[0])[0] == spaced.prompt_ids(PAIRS[0])


@pytest.mark.parametrize("family", ["tiny_t5", "tiny_llama"])
def test_a_source_of_one_token_has_tokens_whatever_stands_before_it(
    request: pytest.FixtureRequest, family: str
) -> None:
    setting = {"prefix": "The"} if family == "tiny_t5" else {"prompt": "The{source}"}
    objective = make_objective(request.getfixturevalue(family), **setting)
    for source in (" dog", "狗", "s"):
        assert objective.encode(SourceTargetExample(source, "one", "pairs.jsonl:1"))


def test_truncation_cuts_the_source_and_never_what_stands_around_it(
    tiny_t5: Path, tiny_llama: Path
) -> None:
    long = SourceTargetExample("river " * 40, "house " * 40, "pairs.jsonl:7")
    two_sided = make_objective(
        tiny_t5, max_length=12, max_target_length=6, too_long="truncate", prefix="sum: "
    )
    (encoded,) = two_sided.encode(long)
    source, target = split_pair(encoded)
    end = two_sided.tokenizer.eos_token_id
    assert (len(source), len(target), source[-1]) == (12, 6, end)
    assert target[-1] != end, "a target that was cut would be learned to end there"
    assert two_sided.tokenizer.decode(source).startswith("sum: river")
    whole = replace(two_sided, max_length=10**6, max_target_length=10**6).encode(long)[0]
    assert encoded["num_removed"] == len(whole["input_ids"]) - len(encoded["input_ids"])
    assert encoded["num_removed_targets"] == sum(whole["targets"]) - 6

    prompted = make_objective(
        tiny_llama, max_length=40, max_target_length=6, too_long="truncate", prompt="{source} Sum:"
    )
    prompt, target = split_pair(prompted.encode(long)[0])
    assert len(prompt) <= 40
    assert len(target) == 6
    text = prompted.tokenizer.decode(prompt)
    assert text.startswith("<|im_start|>user\nriver river")
    assert text.endswith("Sum:<|im_end|>\n<|im_start|>assistant\n")
    # Source and target share a context of 256.
    shared = replace(prompted, max_length=256, max_target_length=256)
    assert len(shared.encode(long)[0]["input_ids"]) <= 256


@pytest.mark.parametrize("family", ["tiny_t5", "tiny_llama"])
def test_a_pair_that_does_not_fit_is_an_error_or_left_out(
    request: pytest.FixtureRequest, family: str
) -> None:
    path = request.getfixturevalue(family)
    long = SourceTargetExample("river " * 40, "one", "pairs.jsonl:7")
    with pytest.raises(DataError, match=r"pairs\.jsonl:7: .* tokens, and at most 30 fit"):
        make_objective(path, max_length=30).encode(long)
    far = SourceTargetExample("one", "river " * 40, "pairs.jsonl:8")
    with pytest.raises(DataError, match=r"pairs\.jsonl:8: the target has .* at most 9 fit"):
        make_objective(path, max_target_length=9).encode(far)
    dropping = make_objective(path, max_length=30, max_target_length=9, too_long="drop")
    assert dropping.encode(long) == dropping.encode(far) == []
    with pytest.raises(DataError, match=r"pairs\.jsonl:7"):
        make_objective(path, max_length=30).prompt_ids(long)


@pytest.mark.parametrize(("family", "token"), [("tiny_t5", "</s>"), ("tiny_llama", "<|im_end|>")])
def test_the_text_of_a_special_token_is_refused_or_is_text(
    request: pytest.FixtureRequest, family: str, token: str
) -> None:
    path = request.getfixturevalue(family)
    odd = SourceTargetExample(f"The end is {token} here", f"{token}!", "pairs.jsonl:9")
    with pytest.raises(DataError, match=r"pairs\.jsonl:9: `source` holds"):
        make_objective(path, special_tokens="error").encode(odd)
    with pytest.raises(DataError, match=r"pairs\.jsonl:9: `target` holds"):
        make_objective(path, special_tokens="error").encode(replace(odd, source="fine"))
    objective = make_objective(path, special_tokens="text")
    plain = objective.encode(replace(odd, source="The end", target="!"))[0]["input_ids"]
    (encoded,) = objective.encode(odd)
    index = objective.tokenizer.convert_tokens_to_ids(token)
    assert encoded["input_ids"].count(index) == plain.count(index)
    assert token in objective.tokenizer.decode(encoded["input_ids"])


def test_a_setting_of_the_other_family_is_refused_with_what_to_write(
    tiny_t5: Path, tiny_llama: Path
) -> None:
    with pytest.raises(ConfigError, match=r"`task\.prompt` has no effect on an encoder-decoder"):
        make_objective(tiny_t5, prompt="{source}?")
    with pytest.raises(ConfigError, match=r"`task\.prefix` has no effect on a decoder") as refusal:
        make_objective(tiny_llama, prefix="translate: ")
    assert refusal.value.hint == "write `task.prompt: 'translate: {source}'`"


@pytest.mark.parametrize("family", ["tiny_t5", "tiny_llama"])
def test_an_objective_can_be_sent_to_a_worker(request: pytest.FixtureRequest, family: str) -> None:
    objective = make_objective(request.getfixturevalue(family))
    assert isinstance(objective, SequenceToSequence | PromptedLM)
    again = pickle.loads(pickle.dumps(objective))
    assert again.encode(PAIRS[0]) == objective.encode(PAIRS[0])
    assert again.fingerprint == objective.fingerprint
    assert replace(objective, max_target_length=7).fingerprint != objective.fingerprint
