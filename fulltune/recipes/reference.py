"""What the model gave each pair of answers when training began, computed once and kept."""

from __future__ import annotations

import hashlib
import io
import json
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fulltune.data.encoded_files import write_whole
from fulltune.data.joined import JoinedDataset
from fulltune.inference import answering, cut_into_batches, in_chunks
from fulltune.objectives.base import to_device
from fulltune.objectives.preference import Preference
from fulltune.runtime import cache_dir
from fulltune.train.ranks import on_all_ranks, on_main_rank

if TYPE_CHECKING:
    from fulltune.recipes.trainer import Trainer

BATCH_TOKENS = 8192
"""Fixed: a cut that depended on the free memory would change the last bits of a resumed run."""
WINDOW = 512


def add_reference(trainer: Trainer) -> None:
    """Give every pair its log-probabilities under the model that training begins with.

    They are kept in the cache under the hash of all that they depend on; a resumed run finds them
    there, or computes the same again. Does nothing for any other objective.
    """
    objective, dataset = trainer.objective, trainer.prepared.dataset
    if not isinstance(objective, Preference):
        return
    assert isinstance(dataset, JoinedDataset)
    path = cache_dir() / "reference" / f"{_key(trainer, objective, dataset)}.npy"

    def made() -> npt.NDArray[np.float32]:
        if path.is_file():
            stored: npt.NDArray[np.float32] = np.load(path, allow_pickle=False)
            return stored
        values = _compute(trainer, objective, dataset)
        buffer = io.BytesIO()
        np.save(buffer, values)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, buffer.getvalue())
        return values

    trainer.display.stage("computing what the model gives both answers of each pair")
    found = on_main_rank(trainer.runtime, made)
    dataset.references = on_all_ranks(trainer.runtime, lambda: made() if found is None else found)


def _key(trainer: Trainer, objective: Preference, dataset: JoinedDataset) -> str:
    from fulltune.recipes.finish import source_fingerprint_of_model

    parts = {
        "model": source_fingerprint_of_model(trainer.base.path),
        "new_tokens": sorted(trainer.base.new_tokens.items()),
        "data": dataset.fingerprint,
        "objective": objective.fingerprint,
        "dtype": str(trainer.precision.dtype),
        "new_layers": [trainer.config.reinitialize_layers, trainer.config.seed]
        if trainer.config.reinitialize_layers
        else None,
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _compute(
    trainer: Trainer, objective: Preference, dataset: JoinedDataset
) -> npt.NDArray[np.float32]:
    values = np.zeros((len(dataset), 2), dtype=np.float32)
    with answering(trainer.model):
        for indices in in_chunks(range(len(dataset)), WINDOW):
            examples = [dataset[index] for index in indices]
            for places in cut_into_batches(examples, objective, BATCH_TOKENS):
                batch = objective.collate([examples[place] for place in places])
                found = objective.log_probabilities(
                    trainer.model, to_device(batch, trainer.runtime.device)
                )
                values[[indices[place] for place in places]] = found.cpu().numpy()
            trainer.display.progress("pairs", indices[-1] + 1, len(dataset))
    return values
