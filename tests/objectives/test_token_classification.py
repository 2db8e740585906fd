"""The tags of a document do not depend on the rows beside it, and only valid ones are given."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    RobertaConfig,
    T5Config,
    XLNetConfig,
)

from fulltune.data.tasks import TaggingExample
from fulltune.data.tokenizers import TokenizerConfig, TokenizerFamily, train_tokenizer
from fulltune.data.words import spaces_before
from fulltune.errors import DataError, ModelError
from fulltune.models.attention import IMPLEMENTATION
from fulltune.models.families import family_of
from fulltune.models.loading import load_model, load_model_config, load_tokenizer
from fulltune.objectives.of_task import ObjectiveSettings, make_task_objective
from fulltune.objectives.tag_decoding import decode_tags
from fulltune.objectives.token_classification import TokenClassification

LABELS = ("O", "B-LOC", "I-LOC", "B-PER", "I-PER")
SENTENCES = (
    (["The", "river", "house", "in", "Rome"], ["O", "B-LOC", "I-LOC", "O", "B-LOC"]),
    (list("法国的首都是巴黎"), ["B-LOC", "I-LOC", "O", "O", "O", "O", "B-LOC", "I-LOC"]),
    (["Who", "?"], ["B-PER", "O"]),
)
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "max_position_embeddings": 128}
ENCODERS: dict[str, Any] = {
    "albert": lambda **ids: AlbertConfig(**SMALL, **HEADS, embedding_size=16, **ids),
    "deberta-v2": lambda **ids: DebertaV2Config(**SMALL, **HEADS, **ids),
    "distilbert": lambda **ids: DistilBertConfig(
        dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=128, **ids
    ),
    "electra": lambda **ids: ElectraConfig(**SMALL, **HEADS, embedding_size=16, **ids),
    "modernbert": lambda **ids: ModernBertConfig(
        **SMALL, **HEADS, global_attn_every_n_layers=2, local_attention=8, **ids
    ),
    "roberta": lambda **ids: RobertaConfig(**SMALL, **HEADS, **ids),
}


def example_of(words: list[str], tags: list[str] | None, where: str = "a:1") -> TaggingExample:
    tagged = tuple(tags) if tags is not None else None
    return TaggingExample(tuple(words), tuple(spaces_before(words)), tagged, where)


EXAMPLES = [example_of(words, tags) for words, tags in SENTENCES]


def make_body(name: str, folder: Path, tiny_bert: Path) -> Path:
    """A new body without a head, with a tokenizer of its kind."""
    if name in ("xlnet", "t5"):
        family: TokenizerFamily = "xlnet" if name == "xlnet" else "t5"
        texts = ["".join(words) for words, _ in SENTENCES]
        tokenizer: Any = train_tokenizer(
            texts, TokenizerConfig(family=family, algorithm="characters")
        )
        ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
        config: Any = (
            XLNetConfig(
                vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=4, d_inner=48, **ids
            )
            if name == "xlnet"
            else T5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                decoder_start_token_id=tokenizer.pad_token_id, **ids,
            )
        )  # fmt: skip
    else:
        tokenizer = load_tokenizer(tiny_bert)
        config = ENCODERS[name](
            vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id,
            **({"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3}
               if name == "modernbert" else {}),
        )  # fmt: skip
    torch.manual_seed(4)
    AutoModel.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def open_tagger(path: Path) -> tuple[Any, TokenClassification]:
    config = load_model_config(path)
    packs = family_of(config).can_pack
    model = load_model(
        path, head="token_classification", labels=LABELS, dtype=torch.float32,
        attention=IMPLEMENTATION if packs else "sdpa",
    )  # fmt: skip
    settings = ObjectiveSettings(load_tokenizer(path), model.config, 64, labels=LABELS)
    objective = make_task_objective("token_classification", settings)
    assert isinstance(objective, TokenClassification)
    assert objective.packing == packs
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # a start's small ones tell nothing
    return model.eval(), objective


@pytest.mark.parametrize("name", [*ENCODERS, "bert", "gpt2", "llama", "xlnet", "t5"])
def test_the_scores_of_words_are_those_they_have_alone_in_the_models_own_forward(
    name: str, tmp_path: Path, tiny_bert: Path, tiny_gpt2: Path, tiny_llama: Path
) -> None:
    ready = {"bert": tiny_bert, "gpt2": tiny_gpt2, "llama": tiny_llama}
    model, objective = open_tagger(ready.get(name) or make_body(name, tmp_path, tiny_bert))
    examples = [objective.encode(example)[0] for example in EXAMPLES]
    with torch.no_grad():
        together_NC = objective.logits(model, objective.collate(examples))
        alone = []
        for example in examples:
            inputs = {"input_ids": torch.tensor([example["input_ids"]])}
            if example["token_type_ids"]:
                inputs["token_type_ids"] = torch.tensor([example["token_type_ids"]])
            places = torch.tensor(example["targets"]).bool()
            alone.append(model(**inputs).logits[0, places])
    assert together_NC.shape == (15, len(LABELS))
    assert together_NC.std(dim=0).min() > 1e-3
    torch.testing.assert_close(together_NC, torch.cat(alone), atol=1e-4, rtol=1e-4)


def test_a_model_of_a_kind_without_such_a_head_is_refused(tmp_path: Path) -> None:
    from transformers import OlmoConfig

    from tests.conftest import _byte_level_tokenizer  # the tokenizer does not matter

    tokenizer = _byte_level_tokenizer()
    config = OlmoConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, pad_token_id=0,
    )  # fmt: skip
    AutoModel.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no model of type `olmo` with a head for token"):
        load_model(tmp_path, head="token_classification", labels=LABELS, dtype=torch.float32)


def test_the_loss_is_that_of_the_first_piece_of_each_word_alone(tiny_bert: Path) -> None:
    model, objective = open_tagger(tiny_bert)
    (encoded,) = objective.encode(example_of(["Riverside", "is", "red"], ["B-LOC", "O", "I-PER"]))
    is_, red = len(encoded["input_ids"]) - 3, len(encoded["input_ids"]) - 2
    assert is_ > 2
    assert [place for place, target in enumerate(encoded["targets"]) if target] == [1, is_, red]
    assert encoded["labels"] == ["B-LOC", "O", "I-PER"]
    batch = objective.collate([encoded])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded["input_ids"]])).logits[0].log_softmax(-1)
        loss = objective.loss_sum(model, batch)
    by_hand = -(logits[1, 1] + logits[is_, 0] + logits[red, 4])
    torch.testing.assert_close(loss, by_hand, atol=1e-5, rtol=1e-5)
    assert loss.dtype == torch.float32
    assert objective.num_targets(batch) == 3


def test_outputs_hold_valid_tags_and_their_probabilities(tiny_bert: Path) -> None:
    model, objective = open_tagger(tiny_bert)
    encoded = [objective.encode(example)[0] for example in EXAMPLES]
    scores = objective.score(model, objective.collate(encoded))
    assert [output.right for output in scores.outputs] == [tags for _, tags in SENTENCES]
    assert sum(output.loss_sum for output in scores.outputs) == pytest.approx(scores.loss_sum)
    for output, (words, _) in zip(scores.outputs, SENTENCES, strict=True):
        assert len(output.predicted) == len(output.probabilities) == len(words)
        assert all(0 < probability <= 1 for probability in output.probabilities)
    unlabelled = [objective.encode(example_of(words, None))[0] for words, _ in SENTENCES]
    again = objective.score(model, objective.collate(unlabelled))
    assert [o.predicted for o in again.outputs] == [o.predicted for o in scores.outputs]
    assert not any(output.right for output in again.outputs)


def test_too_long_sentences_are_an_error_cut_or_dropped(tiny_bert: Path) -> None:
    _, objective = open_tagger(tiny_bert)

    def encode(too_long: Any) -> Any:
        short = TokenClassification(objective.tokenizer, LABELS, 4, too_long)
        return short.encode(example_of(["the", "river", "is", "red"], ["B-LOC", "I-LOC", "O", "O"]))

    with pytest.raises(DataError, match="a:1"):
        encode("error")
    assert encode("drop") == []
    (cut,) = encode("truncate")
    assert cut["labels"] == ["B-LOC", "I-LOC"]
    assert (cut["num_removed"], cut["num_removed_targets"]) == (2, 2)


def test_a_tag_that_the_model_lacks_is_named(tiny_bert: Path) -> None:
    _, objective = open_tagger(tiny_bert)
    (encoded,) = objective.encode(example_of(["Rome"], ["B-ORG"], "b.jsonl:9"))
    with pytest.raises(DataError, match=r"b.jsonl:9: tag 'B-ORG' is not one of the model's tags"):
        objective.collate([encoded])


def test_classes_that_are_no_tags_are_refused(tiny_bert: Path) -> None:
    settings = ObjectiveSettings(
        load_tokenizer(tiny_bert), load_model_config(tiny_bert), 64, labels=("place", "person")
    )
    with pytest.raises(ModelError, match="tags of IOB2, but `person` is none"):
        make_task_objective("token_classification", settings)


def test_decoding_finds_the_best_of_all_valid_sequences() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = (1, 2, 3, 4, 4)
    scores = [torch.randn(length, 5, generator=generator).log_softmax(-1) for length in lengths]

    def valid(tags: tuple[int, ...]) -> bool:
        names = ["O", *(LABELS[tag] for tag in tags)]
        return all(
            not name.startswith("I-") or before in (f"B-{name[2:]}", name)
            for before, name in itertools.pairwise(names)
        )

    changed = 0
    for scores_TC, found in zip(scores, decode_tags(scores, LABELS), strict=True):
        sequences = filter(valid, itertools.product(range(5), repeat=len(scores_TC)))
        best = max(sequences, key=lambda tags: float(scores_TC[range(len(tags)), tags].sum()))
        assert found == list(best)
        changed += found != scores_TC.argmax(-1).tolist()
    assert changed  # taking each word's likeliest tag would have been wrong
    assert decode_tags([], LABELS) == []
    assert decode_tags([torch.empty(0, 5)], LABELS) == [[]]
    assert decode_tags(scores[1:2], ("O", "B-A", "B-B", "B-C", "B-D")) == [
        scores[1].argmax(-1).tolist()
    ]
