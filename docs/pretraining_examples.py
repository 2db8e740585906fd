"""Print the worked examples of docs/pretraining.md, each by the code that trains.

The tokenizer and the models are made here, so nothing is downloaded, and every draw has a seed.
`tests/test_pretraining_page.py` compares what is printed with the page.

Shape suffixes: N predicted tokens, V vocabulary, L tokens of a window, P targets of a window.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fulltune.data.encoding import EncodedExample
from fulltune.data.sentence_pairs import SentencePairsConfig
from fulltune.data.tasks import TextExample
from fulltune.models.attention_equation import equation_of, trace_attention
from fulltune.objectives.causal_lm import CausalLM
from fulltune.objectives.causal_stream import CausalStream
from fulltune.objectives.documents import encode_document
from fulltune.objectives.fill_in_the_middle import fill_in_the_middle, fim_ids
from fulltune.objectives.masked_lm import MaskedLM, MaskingConfig
from fulltune.objectives.permutation_lm import PermutationLM
from fulltune.objectives.permutation_noise import PermutationConfig
from fulltune.objectives.sentence_order import SentenceOrder
from fulltune.objectives.span_corruption import SpanConfig, SpanCorruption
from fulltune.objectives.spans import UL2_DENOISERS, corrupt
from fulltune.optim.scaled_adamw import ScaledAdamW

SENTENCE = "the cat sat on the windowsill ."
TEXTS = (
    "the cat sat on the windowsill . she saw a bird . it sang .",
    "rain fell . the river rose . we stayed in .",
)
WORDS = "the cat sat on window ##sill . she saw a bird it sang rain fell river rose we stayed in"
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "</s>")
MARKS = (
    *("<fim_prefix>", "<fim_middle>", "<fim_suffix>", "[NLU]", "[NLG]", "[S2S]"),
    *(f"<extra_id_{index}>" for index in range(8)),
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A few pieces of words, and the special tokens of every objective."""
    tokens = [*SPECIAL, *MARKS, *WORDS.split()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token", "eos_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        extra_special_tokens=list(MARKS),
        **dict(zip(names, SPECIAL, strict=True)),
    )


TOKENIZER = make_tokenizer()


class Documents:
    """Encoded documents in a list, as an encoded data set offers them."""

    fingerprint = "examples"

    def __init__(self, examples: Sequence[EncodedExample]) -> None:
        self.examples = examples
        self.lengths = np.array([len(example["input_ids"]) for example in examples])

    def __len__(self) -> int:
        """How many documents."""
        return len(self.examples)

    def __getitem__(self, index: int) -> EncodedExample:
        """A whole document."""
        return self.examples[index]

    def piece(self, index: int, start: int, stop: int) -> EncodedExample:
        """Some tokens of a document."""
        piece = self.examples[index].copy()
        piece["input_ids"] = piece["input_ids"][start:stop]
        piece["targets"] = piece["targets"][start:stop]
        if "boundaries" in piece:
            piece["boundaries"] = piece["boundaries"][start:stop]
        return piece

    def where(self, index: int) -> str:
        """File and line of a document."""
        return self.examples[index]["where"]


def document(text: str) -> EncodedExample:
    """A text as tokens without special ones."""
    return encode_document(TOKENIZER, TextExample(text, "text.txt:1"))[0]


def tokens_of(ids: Sequence[int] | torch.Tensor) -> list[str]:
    """The tokens by name."""
    return list(TOKENIZER.convert_ids_to_tokens([int(token) for token in ids]))


def line(ids: Sequence[int] | torch.Tensor) -> str:
    """The tokens in one line."""
    return " ".join(tokens_of(ids))


def print_columns(*rows: Sequence[str]) -> None:
    """Rows of words, each word under the one it belongs to."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print(" ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())


def small_gpt2() -> Any:
    """One layer with two heads, its weights drawn large so that attention is not even."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(TOKENIZER), n_positions=32, n_embd=16, n_layer=1, n_head=2,
        initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model: Any = GPT2LMHeadModel(config)
    model.set_attn_implementation("eager")  # the one that returns its weights
    return model.eval()


def print_causal_lm() -> None:
    """Each token from those before it."""
    objective = CausalLM(TOKENIZER, max_length=32, packing=False)
    batch = objective.collate(objective.encode(TextExample(SENTENCE, "text.txt:1")))
    ids, positions = batch["input_ids"][0], batch["prediction_positions"]
    targets = dict(zip(positions.tolist(), tokens_of(batch["target_ids"]), strict=True))
    print_columns(
        ["input ", *tokens_of(ids)],
        ["target", *(targets.get(place, "-") for place in range(len(ids)))],
    )
    model = small_gpt2()
    with torch.no_grad():
        loss_sum = float(objective.loss_sum(model, batch))
        probabilities_NV = torch.softmax(model(batch["input_ids"]).logits[0, positions], dim=-1)
    ours = -sum(
        math.log(probabilities_NV[place, target])
        for place, target in enumerate(batch["target_ids"].tolist())
    )
    print(f"N = {objective.num_targets(batch)} targets")
    print(f"the code's loss {loss_sum:.2f}, the formula's {ours:.2f}")


def print_causal_stream() -> None:
    """Documents joined end to end and cut into windows."""
    objective = CausalStream(CausalLM(TOKENIZER, max_length=9))
    documents = Documents([document(text) for text in TEXTS])
    windows = objective.arrange(documents, np.arange(len(documents)), seed=0)
    for index in range(len(windows)):
        print(f"window {index}: {line(windows[index]['input_ids'])}")


def print_fill_in_the_middle() -> None:
    """The middle of a document moved to its end, in both orders."""
    ids = document(SENTENCE)["input_ids"]
    prefix_id, middle_id, suffix_id = fim_ids(TOKENIZER)
    print(f"document: {line(ids)}")
    for seed in (0, 2):
        written = fill_in_the_middle(
            ids, np.random.default_rng(seed), rate=1.0,
            prefix_id=prefix_id, middle_id=middle_id, suffix_id=suffix_id,
        )  # fmt: skip
        print(f"written:  {line(written)}")


def print_masked_lm() -> None:
    """Chosen tokens, one by one and by whole words."""
    for whole_words in (False, True):
        masking = MaskingConfig(rate=0.4, whole_words=whole_words)
        objective = MaskedLM(TOKENIZER, max_length=32, masking=masking, packing=False)
        documents = Documents(objective.encode(TextExample(SENTENCE, "text.txt:1")))
        window = objective.arrange(documents, [0], seed=0)[0]
        for number, seed in enumerate((9, 12), start=1):
            batch = objective.collate([{**window, "noise_seed": seed}])
            ids = batch["input_ids"][0]
            positions = batch["target_positions"].tolist()
            targets = dict(zip(positions, tokens_of(batch["target_ids"]), strict=True))
            print(f"{'whole words' if whole_words else 'single tokens'}, draw {number}")
            print_columns(
                ["  input ", *tokens_of(ids)],
                ["  target", *(targets.get(place, "-") for place in range(len(ids)))],
            )


def print_sentence_order() -> None:
    """Pairs of segments, and what follows what."""
    for kind in ("next", "order"):
        pairs = SentencePairsConfig(kind=kind, short_share=0.0)
        objective = SentenceOrder(TOKENIZER, max_length=24, pairs=pairs, packing=False)
        encoded = [
            objective.encode(TextExample(text, f"text.txt:{number}"))[0]
            for number, text in enumerate(TEXTS, start=1)
        ]
        arranged = objective.arrange(Documents(encoded), range(len(encoded)), seed=5)
        for index in range(len(arranged)):
            example = arranged[index]
            print(f"{kind:5} label {example['labels'][0]}: {line(example['input_ids'])}")


def print_permutation_lm() -> None:
    """Some tokens in a drawn order, and who sees whom."""
    config = PermutationConfig(predict_share=0.4, mask_alpha=2)
    objective = PermutationLM(TOKENIZER, max_length=10, config=config)
    documents = Documents([document(SENTENCE)])
    window = objective.arrange(documents, [0], seed=0)[0]
    batch = objective.collate([{**window, "noise_seed": 12}])
    tokens, hidden_LL = tokens_of(batch["input_ids"][0]), batch["perm_mask"][0]
    targets_P = batch["target_mapping"][0].argmax(-1).tolist()
    print(f"input:   {' '.join(tokens)}")
    print(f"targets: {', '.join(f'{place} {tokens[place]}' for place in targets_P)}")
    print("who (row) sees whom (column): x seen, . hidden, * target")
    print(f"{'':14}{' '.join(f'{place:2}' for place in range(len(tokens)))}")
    for place, token in enumerate(tokens):
        marks = " ".join(" ." if hidden else " x" for hidden in hidden_LL[place].tolist())
        print(f"{place:2} {token:9}{'*' if place in targets_P else ' '} {marks}")


def print_span_corruption() -> None:
    """Spans of noise behind sentinels."""
    spans = SpanConfig(noise_density=0.3, mean_length=2.0)
    objective = SpanCorruption(TOKENIZER, max_length=24, spans=spans)
    example: EncodedExample = {**document(TEXTS[0]), "noise_seed": 0}
    inputs, targets = objective.corrupt(example)
    print(f"document: {line(example['input_ids'])}")
    print(f"inputs:   {line(inputs)}")
    print(f"targets:  {line(targets)}")


def print_ul2() -> None:
    """One document with each of the seven kinds of noise."""
    objective = SpanCorruption(TOKENIZER, max_length=24, spans=SpanConfig(mixture="ul2"))
    ids = document(TEXTS[0])["input_ids"]
    for denoiser in UL2_DENOISERS:
        kept, noise = denoiser.draw(len(ids), np.random.default_rng(0))
        sentinels = () if denoiser.mean_span_length is None else objective.sentinels
        inputs, targets = corrupt(ids, kept, noise, sentinels, TOKENIZER.eos_token_id)
        inputs.insert(0, objective.mode_ids[denoiser.mode])
        mean = denoiser.mean_span_length
        spans = "one span at the end" if mean is None else f"spans of {mean:g} tokens on average"
        print(f"share {denoiser.noise_density}, {spans}")
        print(f"  inputs:  {line(inputs)}")
        print(f"  targets: {line(targets)}")


def print_adamw_scaled() -> None:
    """One step of weights of three sizes."""
    print("root mean square   change of each entry")
    for size in (2.0, 0.05, 0.0):
        weight = torch.nn.Parameter(torch.full((4,), size))
        weight.grad = torch.full((4,), 7.0)
        ScaledAdamW([{"params": [weight], "lr": 0.01, "weight_decay": 0.0}]).step()
        print(f"{size:<18} {weight[0].item() - size:.6f}")


def print_attention() -> None:
    """The weights of a small GPT-2, checked."""
    body = small_gpt2().base_model
    ids = document(SENTENCE)["input_ids"]
    (layer,) = trace_attention(body, {"input_ids": torch.tensor([ids])}, [0])
    print(f"equation: {equation_of(body.config).formula}")
    tokens = tokens_of(ids)
    print(f"head 0:   {' '.join(f'{token:>6}' for token in tokens)}")
    for token, row in zip(tokens, layer.weights_NQK[0].tolist(), strict=True):
        print(f"{token:>9} {' '.join(f'{weight:6.2f}' for weight in row)}")
    within = layer.weights_difference <= layer.weights_tolerance
    print(f"weights within {layer.weights_tolerance:.0e}: {'yes' if within else 'no'}")
    print(f"layer {layer.layer}: {'verified' if layer.passed else 'NOT MET'}")


EXAMPLES = (
    ("causal language modelling", print_causal_lm),
    ("stream", print_causal_stream),
    ("fill-in-the-middle", print_fill_in_the_middle),
    ("masked language modelling", print_masked_lm),
    ("pairs of segments", print_sentence_order),
    ("permutation language modelling", print_permutation_lm),
    ("span corruption", print_span_corruption),
    ("mixture of denoisers", print_ul2),
    ("scaled AdamW", print_adamw_scaled),
    ("attention", print_attention),
)


def main() -> None:
    """Print every example under its name, with an empty line between."""
    with torch.random.fork_rng():
        for index, (name, print_example) in enumerate(EXAMPLES):
            print(f"{'' if index == 0 else chr(10)}# {name}")
            print_example()


if __name__ == "__main__":
    main()
