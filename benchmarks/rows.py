"""The rows every peer trains on: real records, encoded once, with a plain tokenizer and no trainer.

Run by `cpu_finetune.py` in a process of its own: `python rows.py JOB.json`. It writes

    train.jsonl, held_out.jsonl     {"input_ids": [...], "labels": [...]} a line
    records.jsonl                   the records of train.jsonl, for the peer that encodes by itself
    facts.json                      paths, counts, the rows of each step for each seed, and the
                                    parameters that do matrix products

A label is the token itself where it is trained, else -100, unshifted as transformers wants it. In
chat rows the assistant's words and the end of its turn are trained; in text rows every token is.
"""

from __future__ import annotations

import itertools
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

    model, data = resolve(job["model"]), resolve(job["data"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    if job["kind"] == "chat":
        records, encode = chat_records(data), encode_chat
    else:
        records, encode = text_records(data), encode_text
    rows, num_too_long = encode_all(records, tokenizer, encode, job["max_length"])
    # The rows are always the same ones: a seed changes the order of training, nothing else.
    random.Random(0).shuffle(rows)
    num_rows = job["steps"] * job["batch"]
    if len(rows) < job["num_held_out"] + num_rows:
        sys.exit(
            f"`{data}` gives {len(rows)} rows, but {num_rows} to train on and "
            f"{job['num_held_out']} held out are needed; lower --steps, --batch or --held-out"
        )
    held_out, train = rows[: job["num_held_out"]], rows[job["num_held_out"] :][:num_rows]
    folder = Path(job["folder"])
    columns = ("input_ids", "labels")
    write_lines(folder / "held_out.jsonl", [{key: row[key] for key in columns} for row in held_out])
    write_lines(folder / "train.jsonl", [{key: row[key] for key in columns} for row in train])
    write_lines(folder / "records.jsonl", [row["record"] for row in train])
    lengths = [len(row["input_ids"]) for row in train]
    num_targets = [count_targets(row["labels"]) for row in train]
    facts = {
        "model_folder": str(model),
        "num_train_rows": len(train),
        "num_held_out_rows": len(held_out),
        "num_held_out_targets": sum(count_targets(row["labels"]) for row in held_out),
        "num_rows_left_out_as_too_long": num_too_long,
        "num_tokens": sum(lengths),
        "num_targets": sum(num_targets),
        "mean_tokens": sum(lengths) / len(lengths),
        "longest_tokens": max(lengths),
        "share_trained": sum(num_targets) / sum(lengths),
        "steps_of_seed": {
            seed: steps_of_seed(lengths, seed, job["batch"], job["steps"]) for seed in job["seeds"]
        },
        **matmul_parameters(str(model)),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def resolve(name: str) -> Path:
    """The local path of a file, a folder, or `asset:NAME`."""
    if name.startswith("asset:"):
        from fulltune.assets import fetch

        return fetch(name)
    if not Path(name).exists():
        sys.exit(f"there is no `{name}`; give a path or asset:NAME")
    return Path(name).resolve()


def plain_text(path: Path) -> str:
    """The text of a file, or the texts of a JSONL file with empty lines between them."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return text
    return "\n\n\n".join(json.loads(line)["text"] for line in text.splitlines()) + "\n"


def write_lines(path: Path, values: list[Record]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(value) + "\n" for value in values), encoding="utf-8")


def steps_of_seed(lengths: list[int], seed: int, batch: int, num_steps: int) -> list[list[int]]:
    """The rows of every step: fulltune's own order, which all the others are then given too."""
    import numpy as np

    from fulltune.config import Quantity
    from fulltune.data.loader import Loader

    loader = Loader(
        np.array(lengths),
        np.arange(len(lengths)),
        batch=Quantity(batch, "examples"),
        micro_batch_tokens=sum(lengths),
        seed=seed,
        packing=True,
    )
    plans = itertools.islice(loader, num_steps)
    return [sorted(int(i) for micro in plan.micro_batches for i in micro) for plan in plans]


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
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return encoded["input_ids"], labels


def text_records(path: Path) -> Iterator[Record]:
    """A plain text cut into documents of ragged, log-normal length."""
    words = plain_text(path).split(" ")
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
