"""One peer of `evaluate_speed.py` in a process of its own: `python evaluate_speed_peers.py JOB`.

    fulltune          what `fulltune predict` and `fulltune evaluate` label rows with
    fulltune-quick    `fulltune predict --quick`
    pipeline          transformers' `pipeline("text-classification")`, called on one row at a time
    pipeline-batched  the same, given all rows at once and told to batch them

All take the model in the dtype it is stored in, and give the probability of every label.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main(job: dict[str, Any]) -> None:
    """Do what ``job`` names and write what came of it to its result file."""
    if job["what"] == "rows":
        result = write_rows(job["data"], job["num_rows"], Path(job["rows"]))
    else:
        texts = json.loads(Path(job["rows"]).read_text(encoding="utf-8"))
        if job["what"].startswith("fulltune"):
            result = label_by_fulltune(job["model"], texts, job["what"] == "fulltune-quick")
        else:
            batch = job["batch"] if job["what"] == "pipeline-batched" else None
            result = label_by_pipeline(job["model"], texts, batch)
    Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")


def write_rows(sources: list[str], num_rows: int, path: Path) -> dict[str, float]:
    """Texts of the sources, each once, at equal distances through all of them."""
    from fulltune.data.records import read_records

    found = (record.fields["text"] for source in sources for record in read_records(source))
    distinct = list(dict.fromkeys(found))
    count = min(num_rows, len(distinct))
    texts = [distinct[number * len(distinct) // count] for number in range(count)]
    path.write_text(json.dumps(texts), encoding="utf-8")
    return {"num_rows": len(texts), "mean_characters": sum(map(len, texts)) / len(texts)}


def label_by_fulltune(model: str, texts: list[str], quick: bool) -> dict[str, Any]:
    """The path of `fulltune predict`."""
    import torch

    from fulltune.data.tasks import ClassificationExample
    from fulltune.inference import build_objective, load_for_inference
    from fulltune.inference.of_task import predict_examples

    loaded = load_for_inference(model, device=torch.device("cpu"), quick=quick)
    objective = build_objective(loaded)
    start = time.perf_counter()
    examples = [
        ClassificationExample(text, None, None, f"row {number}")
        for number, text in enumerate(texts, start=1)
    ]
    predictions = predict_examples(loaded, objective, examples)
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "labels": [each["label"] for each in predictions]}


def label_by_pipeline(model: str, texts: list[str], batch: int | None) -> dict[str, Any]:
    """The path of transformers; without ``batch`` a plain loop, as its users write it."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=model, device="cpu", top_k=None)
    start = time.perf_counter()
    found: Any = (
        [classify(text) for text in texts] if batch is None else classify(texts, batch_size=batch)
    )
    seconds = time.perf_counter() - start
    # One row gives its labels in a list of its own, the surest first.
    sorted_labels = (each[0] if isinstance(each[0], list) else each for each in found)
    return {"seconds": seconds, "labels": [each[0]["label"] for each in sorted_labels]}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
