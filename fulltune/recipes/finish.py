"""The end of a run: the best weights, the model folder, and where everything came from."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from fulltune import __version__
from fulltune.assets import PREFIX, find_asset
from fulltune.data.preview_facts import to_json
from fulltune.data.tasks import TASKS
from fulltune.errors import CheckpointError, RunFolderError
from fulltune.inference import stop_ids
from fulltune.models.adapters import merge_lora
from fulltune.models.kernels import install_fast_kernels
from fulltune.models.loading import save_model
from fulltune.models.scope import lora_rank
from fulltune.objectives.of_task import info_of
from fulltune.recipes.measuring import measure, sample
from fulltune.report.report import render_model_card, write_report
from fulltune.runtime import (
    describe_machine,
    git_commit,
    peak_memory_bytes,
    return_freed_memory,
    versions,
)
from fulltune.train.checkpoint import (
    find_damage,
    open_checkpoint,
    prune_checkpoints,
)
from fulltune.train.loop import Ending
from fulltune.train.run_folder import (
    CHECKPOINTS,
    MODEL,
    MODEL_LAST,
    flush_folder,
    replace_folder,
    write_atomically,
    write_errors,
    write_manifest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fulltune.recipes.trainer import Trainer

WRITTEN = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""The setting `save_as` as a dtype."""


def finish(trainer: Trainer, ending: Ending) -> None:
    """Take the best weights, measure and write the model, and say where everything came from."""
    step = trainer.progress.step
    prune_checkpoints(trainer.folder / CHECKPOINTS, keep=trainer.config.keep_checkpoints, step=step)
    # Nothing steps any more: its state makes room for the model that is written.
    trainer.optimizer.free_state()
    return_freed_memory()  # the model is loaded once more, through pages of its file
    best_step = trainer.best.best_step
    if best_step is not None and best_step not in (0, step):
        best = trainer.folder / CHECKPOINTS / f"best-{best_step:08d}"
        last, _, _ = _exact_model(trainer)
        _write_model(trainer, last, trainer.folder / MODEL_LAST)
        del last
        _take(trainer, best)
        trainer.display.notice(
            f"the weights of step {best_step} are kept, the best by "
            f"`{trainer.best.metric}`; those of step {step} are in `{MODEL_LAST}`"
        )
    elif best_step == 0:
        trainer.display.notice(
            f"no evaluation was better by `{trainer.best.metric}` than the one before training; "
            f"`model` holds the weights of step {step}"
        )
    model, change, tokens_still = _exact_model(trainer)
    _say_what_moved(trainer, change, tokens_still)
    _measure_as_written(trainer, model)
    sample(trainer, step, model)
    manifest = _manifest(trainer, ending, change)
    _write_model(trainer, model, trainer.folder / MODEL, card=render_model_card(manifest))
    with write_errors(trainer.folder):
        _write_facts(trainer, manifest)


def _exact_model(trainer: Trainer) -> tuple[PreTrainedModel, list[dict[str, Any]], str]:
    """The base model with the float32 masters in it, how far each layer moved, and what did not.

    The model in training holds the masters' rounding; what rounding removed belongs to the result.
    """
    model = trainer.load_base()
    install_fast_kernels(model)
    parameters = dict(model.named_parameters())
    change = _weight_change(trainer, parameters)
    tokens_still = _tokens_still(trainer, model)
    with torch.no_grad():
        for name, master in trainer.masters.items():
            parameters[name].copy_(master)
    generation = getattr(model, "generation_config", None)
    if TASKS[trainer.config.task.kind].answers and generation is not None:
        # What ends an answer here ends it wherever the folder is loaded.
        generation.eos_token_id = stop_ids(model, trainer.base.tokenizer)
    if lora_rank(trainer.config.scope) is not None:
        merge_lora(model)
    for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32
        parameter.data = parameter.data.to(WRITTEN[trainer.config.save_as])
    return model, change, tokens_still


def _measure_as_written(trainer: Trainer, model: PreTrainedModel) -> None:
    """The results of the run are those of the weights that are written, in their dtype."""
    dtype = WRITTEN[trainer.config.save_as]
    if dtype == trainer.precision.dtype or not trainer.last_metrics:
        return  # the last evaluation, or that of the best step, was of the same weights
    trainer.display.stage("evaluating the model as it is written")
    trainer.last_metrics, trainer.last_details = measure(trainer, model)
    trainer.tracker.write(
        "result", step=trainer.progress.step, dtype=trainer.config.save_as, **trainer.last_metrics
    )


def _write_facts(trainer: Trainer, manifest: dict[str, Any]) -> None:
    write_atomically(
        trainer.folder / "data.json", to_json(trainer.prepared.facts, trainer.prepared.findings)
    )
    if "per_label" in trainer.last_details:
        (trainer.folder / "predictions").mkdir(exist_ok=True)
        evaluation = {
            "labels": list(getattr(trainer.objective, "labels", ())),
            "confusion": trainer.last_details.get("confusion_matrix"),
            "per_class": trainer.last_details["per_label"],
        }
        write_atomically(
            trainer.folder / "predictions" / "evaluation.json",
            json.dumps(evaluation, ensure_ascii=False),
        )
    trainer.tracker.write(
        "end", step=trainer.progress.step, ending=manifest["ending"], seconds=trainer.seconds(),
        **trainer.last_metrics,
    )  # fmt: skip
    # The report reads the manifest; only the last write says that all of it is there.
    write_manifest(trainer.folder, {**manifest, "finished": False})
    try:
        write_report([trainer.folder], trainer.folder / "report.html")
    except RunFolderError as error:
        error.hint = "free some space, then go on with `--resume`: only the report is missing"
        raise
    write_manifest(trainer.folder, manifest)


def _take(trainer: Trainer, best: Path) -> None:
    problem = find_damage(best)
    if problem is not None:
        raise CheckpointError(
            f"the best weights, `{best}`, cannot be used: {problem}",
            hint=f"restore that folder and go on with `--resume`; the last weights are in "
            f"`{trainer.folder / MODEL_LAST}`",
        )
    checkpoint = open_checkpoint(best)
    trainer.masters.load(checkpoint.tensors("weights"))
    trainer.last_metrics = checkpoint.state["metrics"]
    trainer.last_details = checkpoint.state["details"]


def _write_model(
    trainer: Trainer, model: PreTrainedModel, folder: Path, card: str | None = None
) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    info = {
        "kind": TASKS[trainer.config.task.kind].becomes or trainer.config.task.kind,
        "max_length": trainer.objective.max_length,
        "columns": dict(trainer.config.task.columns),
        **info_of(trainer.objective),
        "base_model": trainer.config.model,
        "fulltune_version": __version__,
        "run": str(trainer.folder),
    }
    with write_errors(folder), ExitStack() as leftovers:
        # Gone by then, unless the disk was full: its room is wanted back.
        leftovers.callback(shutil.rmtree, temporary, ignore_errors=True)
        save_model(model, trainer.base.tokenizer, temporary, info=info)
        if card is not None:
            (temporary / "README.md").write_text(card, encoding="utf-8")
        flush_folder(temporary)
        replace_folder(temporary, folder)


def _weight_change(trainer: Trainer, base: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """How far each layer moved from the base model."""
    groups: dict[str, list[float]] = {}
    layers = trainer.layers
    for name, master in trainer.masters.items():
        layer = layers[name]
        group = groups.setdefault(layer if isinstance(layer, str) else f"layer {layer}", [0.0] * 4)
        before = base[name].detach()
        moved = master.detach() - before
        group[0] += float(moved.double().square().sum())
        group[1] += float(before.double().square().sum())
        group[2] += master.numel()
        group[3] += int((moved != 0).sum())
    return [
        {
            "group": name,
            "relative_change": (moved / max(before, 1e-30)) ** 0.5,
            "num_parameters": int(count),
            "share_moved": changed / count,
        }
        for name, (moved, before, count, changed) in groups.items()
    ]


def _tokens_still(trainer: Trainer, base: PreTrainedModel) -> str:
    """The rows of the embedding that no step changed, in words; empty where each one moved."""
    embedding = cast(Tensor, base.get_input_embeddings().weight)
    names = (name for name, parameter in base.named_parameters() if parameter is embedding)
    master = dict(trainer.masters.items()).get(next(names, ""))
    if master is None:
        return ""
    num_still = int((master.detach() == embedding.detach()).all(dim=1).sum())
    if not num_still:
        return ""
    return (
        f"; {num_still:,} of {len(master):,} rows of the embedding did not, "
        "those of tokens that are not in the data"
    )


def _say_what_moved(trainer: Trainer, change: list[dict[str, Any]], tokens_still: str) -> None:
    total = sum(group["num_parameters"] for group in change)
    moved = sum(group["share_moved"] * group["num_parameters"] for group in change)
    still = [group["group"] for group in change if group["relative_change"] == 0]
    trainer.display.notice(
        f"{moved / total:.1%} of {total:,} trained weights moved"
        + (f"; nothing moved in {', '.join(still)}" if still else ", every layer among them")
        + tokens_still
    )
    for group in change:
        trainer.tracker.write("weight_change", step=trainer.progress.step, **group)


def _manifest(trainer: Trainer, ending: Ending, change: list[dict[str, Any]]) -> dict[str, Any]:

    return {
        "finished": True,
        "ending": ending,
        "name": trainer.folder.name,
        "base_model": trainer.config.model,
        "base_model_on_hub": name_on_hub(trainer.config.model),
        "base_model_hash": source_fingerprint_of_model(trainer.base.source or trainer.base.path),
        "task": trainer.config.task.kind,
        "data": trainer.prepared.sources,
        "settings": trainer.config.model_dump(mode="json"),
        "results": trainer.last_metrics,
        "signatures": trainer.last_details.get("signatures", {}),
        "best_step": trainer.best.best_step,
        "licence": licence_of(trainer.config.model),
        "steps": trainer.progress.step,
        "versions": versions(),
        "machine": describe_machine(trainer.runtime.device),
        "git_commit": git_commit(Path.cwd()),
        "duration_seconds": trainer.seconds(),
        "num_parameters": trainer.num_parameters,
        "num_trained_parameters": trainer.num_trained,
        "new_tokens": trainer.new_tokens,
        "memory": {
            "predicted_bytes": trainer.plan.predicted_bytes,
            "peak_bytes": peak_memory_bytes(trainer.runtime.device),
        },
        "weight_change": change,
    }


def licence_of(model: str) -> str | None:
    """The licence of the base model, where it is known."""
    return find_asset(model).licence if model.startswith(PREFIX) else None


def name_on_hub(model: str) -> str | None:
    """`OWNER/NAME` of the base model on the Hub; None for a folder or a file of one's own."""
    name = find_asset(model).source.split()[0] if model.startswith(PREFIX) else model
    is_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, flags=re.ASCII) is not None
    return name if is_name and not Path(name).exists() else None


def source_fingerprint_of_model(path: Path) -> dict[str, str]:
    """SHA-256 of the weight files of a model folder."""
    hashes = {}
    for file in sorted(path.glob("*.safetensors")):
        with file.open("rb") as stream:
            hashes[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return hashes
