"""A document's class does not depend on the rows beside it, and plain transformers agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, T5Config, XLNetConfig

from fulltune.config import build_config
from fulltune.data.tasks import ClassificationExample
from fulltune.data.tokenizers import TokenizerConfig, TokenizerFamily, train_tokenizer
from fulltune.inference import build_objective, classify, load_for_inference
from fulltune.models.families import family_of
from fulltune.models.presets import make_model
from fulltune.objectives.classification import Classification
from fulltune.objectives.document_reader import document_logits
from fulltune.recipes import finetune

TEXTS = (
    "Where is the house?", "Who painted the green door in Rome, and who paid for it?",
    "How many birds live near the river Thames?", "世界 is how big?",
)  # fmt: skip
FAMILIES: tuple[TokenizerFamily, ...] = ("xlnet", "t5")


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def make_pretrained(family: TokenizerFamily) -> Path:
    """A new model with the head of its pre-training, over a tokenizer of its family."""
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(family=family, algorithm="characters"))
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    if family == "xlnet":
        config: Any = XLNetConfig(
            vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=4, d_inner=48, **ends
        )
        return make_model(config, tokenizer, head="permutation_lm", seed=0)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", decoder_start_token_id=tokenizer.pad_token_id, **ends,
    )  # fmt: skip
    return make_model(config, tokenizer, head="sequence_to_sequence", seed=0)


def make_classifier(family: TokenizerFamily) -> tuple[Any, Classification]:
    from fulltune.models.loading import load_model, load_tokenizer

    path = make_pretrained(family)
    labels = ("place", "person", "number")
    model = load_model(path, head="classification", labels=labels, dtype=torch.float32)
    values = family_of(model.config)
    objective = Classification(
        load_tokenizer(path), 64, values.pooling, packing=values.can_pack,
        own_forward=values.pools_real_tokens, labels=labels,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # a start's small ones tell nothing
    return model.eval(), objective


@pytest.mark.parametrize("family", FAMILIES)
def test_a_documents_scores_are_those_it_has_alone_in_the_models_own_forward(
    family: TokenizerFamily,
) -> None:
    model, objective = make_classifier(family)
    examples = [
        objective.encode(ClassificationExample(text, None, "place", "a:1"))[0] for text in TEXTS
    ]
    assert len({len(example["input_ids"]) for example in examples}) > 1
    with torch.no_grad():
        together_DC = document_logits(model, objective.collate(examples))
        alone_DC = torch.cat(
            [
                model(
                    input_ids=torch.tensor([example["input_ids"]]),
                    **(
                        {"token_type_ids": torch.tensor([example["token_type_ids"]])}
                        if example["token_type_ids"]
                        else {}
                    ),
                ).logits
                for example in examples
            ]
        )
    assert not torch.allclose(together_DC[0], together_DC[1], atol=1e-2)
    torch.testing.assert_close(together_DC, alone_DC, atol=1e-5, rtol=1e-5)  # order of sums


def test_texts_with_their_own_end_tokens_are_classified() -> None:
    model, objective = make_classifier("t5")
    examples = [
        objective.encode(ClassificationExample(text, None, "place", "a:1"))[0]
        for text in ("a </s> b", "Where is the house?")
    ]
    with torch.no_grad():
        assert document_logits(model, objective.collate(examples)).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pretrained_model_becomes_a_classifier_that_transformers_reads_alike(
    family: TokenizerFamily, classification_file: Path, tmp_path: Path
) -> None:
    config = build_config(
        finetune.Config,
        {
            "model": str(make_pretrained(family)),
            "task": {
                "kind": "classification", "train": str(classification_file),
                "validation": "24 examples", "max_length": 64,
            },
            "duration": "60 steps",
            "batch": "16 examples",
            "precision": "fp32",
            "optimizer": {"lr": 5e-3},
            "num_workers": 0,
            "run_dir": str(tmp_path / "run"),
        },
    )  # fmt: skip
    result = finetune.run(config)
    assert result.metrics["accuracy"] > 0.8  # of three kinds that one word tells apart
    folder = tmp_path / "run" / "model"
    loaded = load_for_inference(str(folder), device=torch.device("cpu"))
    examples = [ClassificationExample(text, None, None, "a:1") for text in TEXTS]
    objective = build_objective(loaded)
    assert isinstance(objective, Classification)
    ours = [answer.label for answer in classify(loaded.model, objective, examples)]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        logits_DC = model(**tokenizer(list(TEXTS), padding=True, return_tensors="pt")).logits
    assert ours == [model.config.id2label[index] for index in logits_DC.argmax(-1).tolist()]
