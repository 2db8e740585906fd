"""The model card: what a trained model is, from what, how well it does, and where it ends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from fulltune.tracking import format_bytes, format_duration, format_number, name_of

_TAGS = {
    "chat": ["text-generation", "conversational"],
    "preference": ["text-generation", "conversational", "dpo"],
    "text": ["text-generation"],
    "classification": ["text-classification"],
    "multi_label": ["text-classification", "multi-label"],
    "regression": ["text-classification", "regression"],
    "sequence_to_sequence": ["text2text-generation"],
}

_HUB_LICENCES = frozenset(
    {
        "apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
        "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0",
        "gemma", "llama2", "llama3", "llama3.1", "llama3.2", "llama3.3",
    }
)  # fmt: skip
"""Names that the Hub knows; any other licence is `other` there, with its name beside it."""

_LIMITS = {
    "chat": "it may state falsehoods fluently and has had no safety evaluation",
    "preference": "it may state falsehoods fluently and has had no safety evaluation",
    "text": "it continues text in the manner of its data, true or not, and follows no instructions",
    "classification": "it gives one of its labels to any text, also to text unlike its data",
    "multi_label": "it knows no other labels than those of its data",
    "regression": "it gives a number to any text, also to text unlike its data",
    "sequence_to_sequence": "it writes something for any text, also for text unlike its data, and "
    "may state what the text does not say",
}


def render_model_card(manifest: Mapping[str, Any]) -> str:
    """The `README.md` of a model folder, in the Hugging Face layout with YAML front matter.

    Args:
        manifest: of the run. Used where present: `name`, `base_model`, `base_model_hash`,
            `licence`, `task`, `data`, `settings`, `results`, `versions`, `machine`,
            `duration_seconds`, `num_parameters`, `num_trained_parameters`, `weight_change`,
            `base_model_on_hub`, `signatures`.
    """
    task = str(manifest.get("task") or "")
    parts = [
        _front_matter(manifest, task),
        f"# {_line(manifest.get('name') or 'Fine-tuned model')}",
    ]
    parts.append(_opening(manifest, task))
    rows: list[tuple[str, ...]]
    if manifest.get("results"):
        rows = [(_words(name), _value(value)) for name, value in manifest["results"].items()]
        parts += ["## Measured results", _table(("metric", "value"), rows)]
    if manifest.get("signatures"):
        rows = [(name, f"`{_line(value)}`") for name, value in manifest["signatures"].items()]
        parts.append(_table(("signature", "value"), rows))
    if manifest.get("data"):
        rows = [
            (
                f"`{_line(source.get('source', ''))}`",
                _value(source.get("rows")),
                f"`{_line(source['fingerprint'])}`" if source.get("fingerprint") else "",
            )
            for source in manifest["data"]
        ]
        parts += ["## Data", _table(("source", "rows", "sha256"), rows)]
    if manifest.get("settings"):
        rows = [(f"`{key}`", _setting(value)) for key, value in flatten(manifest["settings"])]
        parts += ["## Settings", _table(("setting", "value"), rows)]
    change = [group for group in manifest.get("weight_change") or () if "group" in group]
    if change:
        rows = [
            (_line(group["group"]), f"{float(group['relative_change']):.3%}") for group in change
        ]
        parts += [
            "## Change of the weights",
            "Norm of the change beside the norm of the weights before training.",
            _table(("group", "change"), rows),
        ]
    limits = _LIMITS.get(task, "it has been measured only as stated here")
    parts += [
        "## Limits",
        f"The model was measured on the held-out part of the data above and on nothing else; "
        f"{limits}.",
    ]
    provenance = _provenance(manifest)
    if provenance:
        parts += ["## Provenance", _table(("what", "value"), provenance)]
    return "\n\n".join(part for part in parts if part) + "\n"


def flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as `section.key` and value, in their order."""
    rows: list[tuple[str, Any]] = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += flatten(value, f"{name}.")
        else:
            rows.append((name, value))
    return rows


def _front_matter(manifest: Mapping[str, Any], task: str) -> str:
    fields: dict[str, Any] = {}
    if manifest.get("base_model_on_hub"):  # the Hub refuses what is not a name there
        fields["base_model"] = str(manifest["base_model_on_hub"])
    if manifest.get("licence"):
        licence = str(manifest["licence"])
        name = licence.lower().replace(" ", "-")
        fields["license"] = name if name in _HUB_LICENCES else "other"
        if fields["license"] == "other":
            fields["license_name"] = licence
    fields["library_name"] = "transformers"
    if task in _TAGS:
        fields["pipeline_tag"] = _TAGS[task][0]
    fields["tags"] = ["fulltune", "full-parameter-fine-tuning", *_TAGS.get(task, [])]
    return f"---\n{yaml.safe_dump(fields, allow_unicode=True, sort_keys=False)}---"


def _opening(manifest: Mapping[str, Any], task: str) -> str:
    base = f"`{_line(manifest['base_model'])}`" if manifest.get("base_model") else "a base model"
    for_task = f" for {task}" if task else ""
    sentence = f"{base} fine-tuned{for_task} with fulltune."
    total, trained = manifest.get("num_parameters"), manifest.get("num_trained_parameters")
    if total and trained:
        share = "all" if trained == total else f"{trained:,} ({trained / total:.1%})"
        sentence += f" Of its {total:,} parameters, {share} were trained."
    return sentence[0].upper() + sentence[1:]


def _provenance(manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for file, digest in (manifest.get("base_model_hash") or {}).items():
        rows.append((f"sha256 of `{_line(file)}`", f"`{_line(digest)}`"))
    if manifest.get("git_commit"):
        rows.append(("git commit", f"`{_line(manifest['git_commit'])}`"))
    if manifest.get("duration_seconds"):
        rows.append(("time of training", format_duration(float(manifest["duration_seconds"]))))
    for section in ("machine", "versions"):
        content = manifest.get(section) or {}
        if not isinstance(content, Mapping):
            content = {section: content}
        for key, value in content.items():
            is_memory = str(key).endswith("_bytes") and isinstance(value, (int, float))
            text = format_bytes(value) if is_memory else _line(value)
            rows.append((_words(str(key).removesuffix("_bytes")), text))
    return rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell for cell in line)} |" for line in lines)


def _words(key: str) -> str:
    return _line(name_of(key))


def _value(value: object) -> str:
    if isinstance(value, float):
        return format_number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _line(value)


def _setting(value: object) -> str:
    """A setting as its file has it."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{_line(value)}`" if str(value).strip() else '`""`'


def _line(value: object) -> str:
    """The value on one line, safe inside a cell of a table."""
    text = "" if value is None else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
