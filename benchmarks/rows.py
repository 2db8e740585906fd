"""The rows every peer trains on: real records, encoded once, with a plain tokenizer and no trainer.

Run by `cpu_finetune.py` in a process of its own: `python rows.py JOB.json`. It writes

    train.jsonl, held_out.jsonl     {"input_ids": [...], "labels": [...], "record": {...}} a line
    facts.json                      counts, and the parameters that do matrix products

A label is the token itself where it is trained, else -100, unshifted as transformers wants it. In
chat rows the assistant's words and the end of its turn are trained; in text rows every token is.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

IGNORED = -100
MEAN_DOCUMENT_WORDS = 120  # about 187 tokens of Shakespeare
Record = dict[str, Any]


def main(job: dict[str, Any]) -> None:
    """Encode the data of ``job`` and count what is in it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    out = Path(job["folder"])
    if job["kind"] == "chat":
        records, encode = chat_records(Path(job["data"])), encode_chat
    else:
        records, encode = text_records(Path(job["data"])), encode_text
    rows, num_too_long = encode_all(records, tokenizer, encode, job["max_length"])
    # The split is fixed: seeds change the order of training, never what is held out.
    random.Random(0).shuffle(rows)
    held_out, train = rows[: job["num_held_out"]], rows[job["num_held_out"] :]
    if len(train) < job["num_rows"]:
        sys.exit(
            f"`{job['data']}` gives {len(train)} rows to train on, but {job['num_rows']} are "
            "needed; lower --steps, --batch or --held-out"
        )
    for name, split in (("train", train), ("held_out", held_out)):
        with (out / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in split)
    facts = {
        "num_train_rows": len(train),
        "num_held_out_rows": len(held_out),
        "num_rows_left_out_as_too_long": num_too_long,
        "mean_tokens": sum(len(row["input_ids"]) for row in rows) / len(rows),
        "longest_tokens": max(len(row["input_ids"]) for row in rows),
        "share_trained": sum(count_targets(row["labels"]) for row in rows)
        / sum(len(row["input_ids"]) for row in rows),
        **matmul_parameters(job["model"]),
    }
    (out / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def encode_all(
    records: Iterable[Record],
    tokenizer: Any,
    encode: Callable[[Record, Any], tuple[list[int], list[int]]],
    max_length: int,
) -> tuple[list[dict[str, Any]], int]:
    """Encoded rows without repeats, and how many were left out because they are too long."""
    rows, seen, num_too_long = [], set(), 0
    for record in records:
        input_ids, labels = encode(record, tokenizer)
        if len(input_ids) > max_length:
            num_too_long += 1
        elif count_targets(labels) and tuple(input_ids) not in seen:
            seen.add(tuple(input_ids))
            rows.append({"input_ids": input_ids, "labels": labels, "record": record})
    return rows, num_too_long


def count_targets(labels: list[int]) -> int:
    """Positions that are predicted; the first token of a row never is."""
    return sum(label != IGNORED for label in labels[1:])


def chat_records(path: Path) -> Iterator[Record]:
    """Alpaca or `messages` records of a JSON or JSONL file, as `messages`."""
    text = path.read_text(encoding="utf-8")
    parsed = json.loads(text) if text.lstrip()[:1] == "[" else map(json.loads, text.splitlines())
    for record in parsed:
        if "messages" in record:
            yield {"messages": record["messages"]}
            continue
        question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": record["output"]},
            ]
        }


def encode_chat(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a conversation; the assistant's words and the end of its turn are trained."""
    messages = record["messages"]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(
                messages[:index], tokenize=False, add_generation_prompt=True
            )
            turn = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
            # What the template writes after the end of turn belongs to no one.
            spans.append((len(prompt), len(turn.rstrip("\n"))))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(first <= start and end <= last for first, last in spans) else IGNORED
        for token, (start, end) in zip(
            encoded["input_ids"], encoded["offset_mapping"], strict=True
        )
    ]
    return encoded["input_ids"], labels


def text_records(path: Path) -> Iterator[Record]:
    """A plain text cut into documents of ragged, log-normal length."""
    words = path.read_text(encoding="utf-8").split(" ")
    lengths = random.Random(0)
    start = 0
    while start < len(words):
        # exp(mu + sigma^2 / 2) is the mean of a log-normal.
        length = max(8, round(MEAN_DOCUMENT_WORDS * lengths.lognormvariate(-0.245, 0.7)))
        yield {"text": " ".join(words[start : start + length])}
        start += length


def encode_text(record: Record, tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a document and its end token; all are trained."""
    input_ids = tokenizer(record["text"], add_special_tokens=False)["input_ids"]
    input_ids = [*input_ids, tokenizer.eos_token_id]
    return input_ids, list(input_ids)


def matmul_parameters(model: str) -> dict[str, int]:
    """Parameters of the body, used for every token, and of the head, used for every target."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    embedding = network.get_input_embeddings().weight
    head = network.get_output_embeddings().weight
    total = sum(parameter.numel() for parameter in network.parameters())
    lookups = embedding.numel() + (0 if head is embedding else head.numel())
    return {
        "num_parameters": total,
        "num_body_parameters": total - lookups,
        "num_head_parameters": head.numel(),
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
