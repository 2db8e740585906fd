"""Pre-training as the examples of transformers do it, one process per run.

Run by `cpu_pretrain.py`: `python pretrain_peers.py JOB.json`. `fulltune` itself is not here: it is
run as its users run it, by its command line.

    clm    run_clm.py: documents joined and cut into blocks, `default_data_collator`
    mlm    run_mlm.py --line_by_line: a document a row, `DataCollatorForLanguageModeling`, padded to
           the longest row of the batch

Both with `from_config` and `Trainer`, in bf16 autocast over float32 weights.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from peers import run_trainer, trainer_arguments
from pretrain_rows import MASK_RATE, join_blocks


def main(job: dict[str, Any]) -> None:
    """Train as ``job`` says, save the model, and write the steps to the result file."""
    from datasets import Dataset
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoTokenizer,
        DataCollatorForLanguageModeling,
        Trainer,
        TrainingArguments,
        default_data_collator,
        set_seed,
    )

    set_seed(job["seed"])
    tokenizer = AutoTokenizer.from_pretrained(job["config"])
    config = AutoConfig.from_pretrained(job["config"])
    lines = Path(job["rows"]).read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line)["input_ids"] for line in lines]
    random.Random(job["seed"]).shuffle(rows)
    if job["objective"] == "clm":
        model = AutoModelForCausalLM.from_config(config)
        features = [{"input_ids": row, "labels": row} for row in join_blocks(rows, job["length"])]
        collate = default_data_collator
    else:
        model = AutoModelForMaskedLM.from_config(config)
        features = [{"input_ids": row} for row in rows]
        collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=MASK_RATE)
    for feature in features:
        feature["attention_mask"] = [1] * len(feature["input_ids"])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**trainer_arguments(job, job["steps"], job["batch"])),
        train_dataset=Dataset.from_list(features),
        data_collator=collate,
        processing_class=tokenizer,
    )
    steps = run_trainer(trainer, job)
    Path(job["result"]).write_text(json.dumps({"steps": steps}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
