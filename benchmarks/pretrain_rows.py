"""The text every peer of `cpu_pretrain.py` starts from: paragraphs as documents, and how many.

Run in a process of its own: `python pretrain_rows.py JOB.json`. The first of its two jobs comes
before there is a tokenizer, the second after:

    split     documents.jsonl, held_out_documents.jsonl     {"text": ...} a line
    encode    train_documents.jsonl   the documents of all steps, for the peer that encodes itself
              train.jsonl             {"input_ids": [...]} a document, special tokens included
              held_out.jsonl          {"input_ids": [...], "labels": [...]} for the judge
              config/                 the model's config and the tokenizer
              facts.json              counts

Documents are chosen so that all steps together hold exactly the tokens of one pass over them. For
masked tokens the judge's masks are drawn here once, so every model is asked the same.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

from rows import IGNORED, count_targets, plain_text, resolve, write_lines

MASK_RATE = 0.15


def main(job: dict[str, Any]) -> None:
    """Do the job that ``what`` names."""
    {"split": split, "encode": encode}[job["what"]](job)


def split(job: dict[str, Any]) -> None:
    """Distinct paragraphs in an order drawn once, some of them held out."""
    text = plain_text(resolve(job["data"]))
    paragraphs = list(dict.fromkeys(part.strip() for part in re.split(r"\n\s*\n", text)))
    documents = [{"text": paragraph} for paragraph in paragraphs if paragraph]
    random.Random(0).shuffle(documents)
    documents = documents[: job["num_held_out"] + job["num_documents"]]
    folder = Path(job["folder"])
    write_lines(folder / "held_out_documents.jsonl", documents[: job["num_held_out"]])
    write_lines(folder / "documents.jsonl", documents[job["num_held_out"] :])


def encode(job: dict[str, Any]) -> None:
    """Choose the documents of the run, and write what the peers and the judge read."""
    from fulltune.models.loading import load_tokenizer
    from fulltune.models.presets import make_config

    folder = Path(job["folder"])
    tokenizer = load_tokenizer(folder / "tokenizer")
    make_config(job["model"], tokenizer, {}).save_pretrained(folder / "config")
    tokenizer.save_pretrained(folder / "config")

    causal = job["objective"] == "clm"
    before = [] if causal else [tokenizer.cls_token_id]
    after = [tokenizer.eos_token_id if causal else tokenizer.sep_token_id]

    def read(name: str) -> list[dict[str, Any]]:
        lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        documents = [json.loads(line) for line in lines]
        for document in documents:
            ids = tokenizer(document["text"], add_special_tokens=False)["input_ids"]
            document["input_ids"] = [*before, *ids, *after]
        # A longer one would be cut in windows by one peer and cut off by the other.
        return [row for row in documents if causal or len(row["input_ids"]) <= job["length"]]

    documents, held_out = read("documents"), read("held_out_documents")
    num_rows = job["steps"] * job["batch"]
    if causal:
        chosen = choose_exactly(documents, num_rows * job["length"])
        judged = [
            {"input_ids": block, "labels": block}
            for block in join_blocks([row["input_ids"] for row in held_out], job["length"])
        ]
        lengths = [job["length"]] * num_rows
    else:
        chosen = documents[:num_rows]
        if len(chosen) < num_rows:
            stop(job, f"{len(chosen)} documents where {num_rows} are needed")
        draw = random.Random(0)
        ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
        special = set(tokenizer.all_special_ids)
        masks = (
            mask(row["input_ids"], tokenizer.mask_token_id, ordinary, special, draw)
            for row in held_out
        )
        judged = [row for row in masks if count_targets(row["labels"])]
        lengths = [len(row["input_ids"]) for row in chosen]
    if not judged:
        stop(job, "too little text to hold any out")
    write_lines(folder / "train_documents.jsonl", [{"text": row["text"]} for row in chosen])
    write_lines(folder / "train.jsonl", [{"input_ids": row["input_ids"]} for row in chosen])
    write_lines(folder / "held_out.jsonl", judged)
    facts = {
        "vocabulary": len(tokenizer),
        "num_documents": len(chosen),
        "num_tokens": sum(lengths),
        "mean_tokens": sum(lengths) / num_rows,
        "longest_tokens": max(lengths),
        "num_held_out_targets": sum(count_targets(row["labels"]) for row in judged),
    }
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def stop(job: dict[str, Any], why: str) -> None:
    """End with what can be changed."""
    sys.exit(f"`{job['data']}`: {why}; lower --steps or the batch, or raise --documents")


def choose_exactly(documents: list[dict[str, Any]], num_tokens: int) -> list[dict[str, Any]]:
    """The first documents, and last one that makes their tokens ``num_tokens`` exactly."""
    left, chosen = num_tokens, []
    sizes = [len(document["input_ids"]) for document in documents]
    for place, document in enumerate(documents):
        if sizes[place] > left:
            continue  # too long for what is left; a shorter one may fit
        chosen.append(document)
        left -= sizes[place]
        if not left:
            return chosen
        if left in sizes[place + 1 :]:
            return [*chosen, documents[sizes.index(left, place + 1)]]
    sys.exit(f"no choice of the documents has {num_tokens} tokens; raise --documents")


def join_blocks(documents: list[list[int]], length: int) -> list[list[int]]:
    """Documents end to end, cut into blocks; what is left at the end is dropped, as in run_clm."""
    stream = [token for document in documents for token in document]
    return [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]


def mask(
    input_ids: list[int],
    mask_id: int,
    ordinary: list[int],
    special: set[int],
    draw: random.Random,
) -> dict[str, list[int]]:
    """A row with BERT's masks: of the chosen tokens 80% hidden, 10% replaced, 10% kept.

    Special tokens are never chosen, [UNK] in the text among them, as in training.
    """
    masked, labels = list(input_ids), [IGNORED] * len(input_ids)
    for place in range(1, len(input_ids) - 1):  # not the special tokens at both ends
        if draw.random() < MASK_RATE and input_ids[place] not in special:
            labels[place] = input_ids[place]
            kind = draw.random()
            if kind < 0.8:
                masked[place] = mask_id
            elif kind < 0.9:
                masked[place] = draw.choice(ordinary)
    return {"input_ids": masked, "labels": labels}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
