from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from fulltune.config import build_config
from fulltune.data.preview_facts import (
    Bar,
    Finding,
    LabelFacts,
    LengthFacts,
    OverlapFacts,
    PreviewFacts,
    SplitFacts,
    to_json,
)
from fulltune.errors import DataError, RunFolderError
from fulltune.recipes import finetune
from fulltune.recipes.finish import name_on_hub
from fulltune.report import render_model_card, write_report
from fulltune.report.charts import (
    Mark,
    Series,
    bar_chart,
    heat_map,
    line_chart,
    nice_ticks,
    smooth,
    thin,
    tick_text,
)
from fulltune.report.markdown import render_markdown
from fulltune.report.run_record import read_run
from fulltune.tracking import MetricsLog, format_bytes, format_number

EVIL = "<script>alert('x')</script>&\"'"


def write_run(
    folder: Path,
    *,
    kind: str = "chat",
    num_steps: int = 300,
    lr: float = 2e-5,
    seed: int = 0,
    finished: bool = True,
    whole: bool = True,
) -> Path:
    """A run folder as a run writes it; ``whole`` adds everything that is not settings or events."""
    noise = random.Random(seed)
    folder.mkdir(parents=True)
    config = {
        "model": "SmolLM2-135M-Instruct",
        "task": {"kind": kind, "train": "data/train.jsonl", "validation": "5%", "labels": None},
        "duration": f"{num_steps} steps",
        "batch": "32768 tokens",
        "optimizer": {"lr": lr, "weight_decay": 0.01, "warmup": "3%", "schedule": "cosine"},
        "evaluate": {"every": "50 steps", "metric": None},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write(
            "start",
            step=0,
            model="SmolLM2-135M-Instruct",
            num_parameters=134_515_008,
            num_trained_parameters=134_515_008,
            precision="bf16",
            matmul_rate=9.1e10,
            num_steps=num_steps,
            device="cpu",
        )
        last = num_steps if finished else num_steps * 2 // 3
        for step in range(last + 1):
            course = 1.1 + 1.6 * math.exp(-step / 70 * lr / 2e-5)
            if step % 50 == 0:
                held_out = course + 0.1 + max(0.0, (step - 200) * 0.0008)
                metrics = {"loss": held_out, "perplexity": math.exp(held_out)}
                if kind == "classification":
                    accuracy = 0.93 - 0.6 * math.exp(-step / 60)
                    metrics = {
                        "loss": held_out,
                        "accuracy": accuracy,
                        "macro_f1": accuracy - 0.03,
                        "matthews": accuracy - 0.1,
                    }
                best = step <= 200
                log.write("evaluation", step=step, split="validation", best=best, **metrics)
            if step in (0, last):
                answer = "我可以幫你。" if step else f"Certainly! {EVIL}\nAs an AI model, I cannot"
                prompt = [{"role": "user", "content": "你好,請介紹一下你自己。"}]
                log.write("sample", step=step, prompt=prompt, answer=answer)
            if step == 0:
                continue
            spike = step == num_steps // 2
            log.write(
                "step",
                step=step,
                loss=course * 8 if spike else course + noise.gauss(0, 0.07),
                lr=lr * min(1.0, step / 9) * 0.5 * (1 + math.cos(math.pi * step / num_steps)),
                grad_norm=25.0 if spike else 0.6 + noise.random() * 0.4,
                num_targets=21_000,
                num_tokens=32_700,
                tokens_per_second=3120 + noise.gauss(0, 120),
                matmul_share=0.34 + noise.gauss(0, 0.01),
                memory_bytes=1.9e9 + min(step, 40) * 5e6,
                updates_rounded_away=0.2 + 0.3 * step / num_steps,
                epoch=step / 100,
                seconds=10.5,
            )
            if spike:
                log.write("spike", step=step, rows=[3, 812], message=f"loss 8 times usual {EVIL}")
            if step == 100:
                log.write("checkpoint", step=step)
                log.write("resume", step=step)
        log.write("end" if finished else "interrupted", step=last)
    if whole:
        write_rest(folder, kind)
    return folder


def write_rest(folder: Path, kind: str) -> None:
    counts = {"positive": 9120, "negative": 8001, "中性": 1300, EVIL: 20}
    facts = PreviewFacts(
        supervision="labels" if kind == "classification" else "tokens",
        splits=(
            make_split("train", 18_441, counts if kind == "classification" else None),
            make_split("validation", 969, None),
        ),
        overlaps=(
            OverlapFacts(
                split="validation", other="train", num_examples=12, num_inputs=0, rows=("a:1",)
            ),
        ),
    )
    findings = [
        Finding(level="warning", message=f"`validation` shares 12 {EVIL}", hint="h", where=("a:1",))
    ]
    (folder / "data.json").write_text(to_json(facts, findings), encoding="utf-8")
    if kind == "classification":
        labels = list(counts)
        confusion = [[410, 20, 5, 0], [31, 380, 9, 1], [12, 15, 60, 0], [1, 0, 0, 1]]
        scores = {"precision": 0.91, "recall": 0.94, "f1": 0.925, "support": 435}
        (folder / "predictions").mkdir()
        (folder / "predictions" / "evaluation.json").write_text(
            json.dumps(
                {
                    "labels": labels,
                    "confusion": confusion,
                    "per_class": {label: scores for label in labels},
                }
            )
        )
    manifest = make_manifest(kind)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "model").mkdir()
    (folder / "model" / "README.md").write_text(render_model_card(manifest))


def make_split(name: str, num_examples: int, counts: dict[str, int] | None) -> SplitFacts:
    return SplitFacts(
        name=name,
        num_examples=num_examples,
        num_tokens=4_120_333,
        num_targets=2_595_810,
        target_share=0.63,
        num_without_target=0,
        without_target=(),
        num_emptied=0,
        num_truncated=0,
        num_removed_tokens=0,
        num_removed_targets=0,
        truncated=(),
        num_duplicates=17,
        duplicates=("a:2 repeats a:1",),
        lengths=LengthFacts(
            shortest=1, mean=3.0, median=3, p90=9, p99=9, longest=9,
            histogram=(Bar(low=0, high=5, count=700), Bar(low=5, high=10, count=40)),
        ),
        longest=(),
        labels=LabelFacts(
            counts=counts, num_contradicting=0, contradicting=(), highest_accuracy=1.0
        )
        if counts
        else None,
        end_of_turn=None,
    )  # fmt: skip


def make_manifest(kind: str = "chat") -> dict[str, Any]:
    layers = [
        {
            "group": f"layer {index}",
            "relative_change": 0.0004 + 0.00011 * index,
            "num_parameters": 1,
        }
        for index in range(12)
    ]
    return {
        "name": f"smollm2 {EVIL} | chat",
        "base_model": "SmolLM2-135M-Instruct",
        "base_model_hash": {"model.safetensors": "5af571cb" * 8},
        "licence": "apache-2.0",
        "task": kind,
        "data": [{"source": "data/train.jsonl", "fingerprint": "9f" * 32, "rows": 18_421}],
        "settings": {"optimizer": {"lr": 2e-5, "betas": [0.9, 0.95]}, "batch": "32768 tokens"},
        "results": {"loss": 1.2154, "perplexity": 3.372},
        "versions": {"fulltune": "0.1.0", "torch": "2.11.0", "transformers": "5.17.0"},
        "machine": {"cpu": "AMD EPYC 9R14", "cores": 2, "memory_bytes": 8_589_934_592},
        "git_commit": "f3d92b8c",
        "duration_seconds": 3150.0,
        "num_parameters": 134_515_008,
        "num_trained_parameters": 134_515_008,
        "weight_change": [
            {"group": "embedding", "relative_change": 0.0001, "num_parameters": 1},
            *layers,
        ],
    }


class Page(HTMLParser):
    """What a browser would take from a page: its text, its tags, what it would load."""

    VOID = frozenset({"meta", "link", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text = ""
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("script", "style"):
            self.text += data


def report(tmp_path: Path, *runs: Path) -> tuple[str, Page]:
    html = write_report(runs, tmp_path / "report.html").read_text(encoding="utf-8")
    return html, Page(html)


@pytest.mark.parametrize("kind", ["chat", "classification"])
def test_a_report_is_one_file_that_loads_nothing_and_escapes_everything(
    tmp_path: Path, kind: str
) -> None:
    html, page = report(tmp_path, write_run(tmp_path / "run", kind=kind))
    assert page.addresses == ["data:,"]
    assert "url(" not in html
    assert "@import" not in html
    assert page.tags.count("script") == 1
    assert EVIL in page.text
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        xml.etree.ElementTree.fromstring(svg)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "run"]


def test_a_chat_report_says_what_was_trained_how_well_and_on_what(tmp_path: Path) -> None:
    _, page = report(tmp_path, write_run(tmp_path / "smollm2"))
    for promised in (
        "SmolLM2-135M-Instruct · chat",
        "finished",
        "2.800 before training",
        "kept weights, step\xa0200",
        "All 134,515,008 parameters trained on data/train.jsonl (18,441 train, 969 validation",
        "52:30",
        "AMD EPYC 9R14",
        "2 cores · 8.0 GiB",
        "Learning rate",
        "Updates that bf16 alone would round away",
        "loss spike",
        "rows: 3, 812",
        "resumed",
        "你好,請介紹一下你自己。",
        "before training",
        "after step 300",
        "我可以幫你。",
        "`validation` shares 12",
        "4,120,333",
        "63.0%",
        "also in train",
        "examples by length",
        "layer 11",
        "optimizer.weight_decay",
        "sha256 9f9f",
        "f3d92b8c",
        "Measured results",
    ):
        assert promised in page.text, promised


def test_a_classification_report_shows_labels_and_confusion(tmp_path: Path) -> None:
    html, page = report(tmp_path, write_run(tmp_path / "run", kind="classification"))
    assert "validation accuracy" in page.text
    assert "macro F1" in page.text
    assert "90.9%" in page.text
    assert "true positive, predicted negative: 20 (4.6%)" in page.text
    assert "9,120" in page.text
    assert 'class="heat-map"' in html


def test_an_unfinished_run_with_nothing_but_its_log_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with MetricsLog(folder / "metrics.jsonl") as log:
        log.write("start", step=0, num_steps=10)
        log.write("step", step=1, loss=math.nan, lr=1e-5, seconds=2.0)
    _, page = report(tmp_path, folder)
    assert "unfinished" in page.text
    assert "NaN" in page.text
    assert "of 10 steps" in page.text


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", finished=False, whole=False)
    assert read_run(run).status == "interrupted"
    assert "interrupted" in report(tmp_path, run)[1].text


def test_several_runs_are_laid_over_one_another_with_what_differs(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a" / "run", lr=2e-5),
        write_run(tmp_path / "b" / "run", lr=5e-5, finished=False, whole=False),
    ]
    html, page = report(tmp_path, *runs)
    assert "2 runs compared" in page.text
    assert str(runs[0]) in page.text
    assert "optimizer.lr" in page.text
    assert "5e-05" in page.text
    assert "optimizer.weight_decay" not in page.text
    assert "weights kept, of step" in page.text
    assert page.addresses == ["data:,"]
    assert html.count("<svg") >= 5


@pytest.mark.parametrize(
    ("best", "kept"), [([0, 4], 4), ([0], 8), ([], 8)], ids=["later", "base model", "never"]
)
def test_the_kept_weights_are_the_best_or_the_last_where_the_base_model_was_best(
    tmp_path: Path, best: list[int], kept: int
) -> None:
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as log:
        for step in (0, 4, 8):
            log.write(
                "evaluation", step=step, split="validation", loss=1.0 + step, best=step in best
            )
    assert read_run(tmp_path / "run").kept_step == kept
    assert ("No evaluation was better" in report(tmp_path, tmp_path / "run")[1].text) == (
        best == [0]
    )


def test_the_headline_is_the_model_as_it_was_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with MetricsLog(run / "metrics.jsonl") as log:
        log.write("result", step=300, dtype="fp32", loss=0.8559, perplexity=2.3535)
    text = " ".join(report(tmp_path, run)[1].text.split())
    assert "validation loss 0.8559" in text.replace("validation loss0", "validation loss 0")
    assert "model as written, fp32" in text
    assert "which is what fulltune evaluate gives" in text


def test_an_interruption_stays_visible_where_the_run_went_on_from_its_step(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "run" / "metrics.jsonl") as log:
        log.write("start", step=0, num_steps=4, num_parameters=1000)
        for step in range(1, 5):
            log.write("step", step=step, loss=1.0, lr=1e-5, seconds=1.0)
            if step == 2:
                log.write("interrupted", step=2, signal="SIGINT")
                log.write(
                    "resume", step=2, num_steps=4, num_parameters=1000, matmul_rate=4.84e11,
                    predicted_memory_bytes=2**30,
                )  # fmt: skip
    page = report(tmp_path, tmp_path / "run")[1]
    assert "interrupted, resumed" in page.text
    assert "484 GFLOP/s" in page.text
    assert "1.0 GiB" in page.text
    happened = page.text[page.text.index("What happened") :]
    assert "1,000" not in happened
    assert "1000" not in happened


@pytest.mark.parametrize(
    ("kind", "model", "data"),
    [
        ("chat", "tiny_llama", "chat_file"),
        ("classification", "tiny_bert", "classification_file"),
        ("text", "tiny_gpt2", "text_file"),
    ],
)
def test_the_report_of_a_real_run_shows_everything_the_run_wrote(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    model: str,
    data: str,
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    source = request.getfixturevalue(data)
    run_dir = tmp_path / "run"
    finetune.run(
        build_config(
            finetune.Config,
            {
                "model": str(request.getfixturevalue(model)),
                "task": {"kind": kind, "train": str(source), "validation": "4 examples"},
                "duration": "4 steps",
                "batch": "4 examples",
                "precision": "fp32",
                "optimizer": {"lr": 1e-3},
                "evaluate": {"every": "2 steps", "num_samples": 1 if kind == "chat" else 0},
                "num_workers": 0,
                "run_dir": str(run_dir),
            },
        )
    )
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    text = Page(html).text
    manifest = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))
    record = read_run(run_dir)
    assert record.status == "finished"
    assert record.data is not None
    train, validation = record.data.facts.splits
    for promised in (
        f"All {manifest['num_parameters']:,} parameters trained",
        f"({train.num_examples:,} train, {validation.num_examples:,} validation examples)",
        f"{train.num_tokens:,}",
        f"({train.target_share:.1%})",
        "duplicates",
        "also in train",
        "train: examples by length in tokens",
        f"data {source}",
        *(f"sha256 {entry['fingerprint']}" for entry in manifest["data"]),
        *(f"sha256 {digest}" for digest in manifest["base_model_hash"].values()),
        *manifest["versions"].values(),
        *(group["group"] for group in manifest["weight_change"]),
        *(finding.message for finding in record.data.findings),
        manifest["machine"]["cpu"],
        format_bytes(manifest["memory"]["peak_bytes"]),
        f"{format_bytes(manifest['memory']['predicted_bytes'])} predicted before the first step",
        "last step",
        "Model card",
    ):
        assert promised in text, promised
    for value in manifest["results"].values():
        assert format_number(value) in text or f"{value:.1%}" in text
    assert f"kept weights, step\xa0{manifest['best_step']}" in text
    assert "None" not in text
    if kind == "chat":
        assert "before training" in text
        assert "after step 4" in text
        assert "the answer in the data" in text
    if kind == "classification":
        assert "on the diagonal" in html
        assert "train: examples by label" in text
        assert text.count("precision") >= 1


@pytest.mark.parametrize(
    ("name", "content", "error", "message"),
    [
        (None, "", RunFolderError, "is not a folder"),
        ("notes.txt", "", RunFolderError, "is not a run folder"),
        ("config.yaml", "model: tiny", DataError, "does not exist"),
        ("metrics.jsonl", "", DataError, "holds no event"),
    ],
)
def test_what_is_not_a_run_is_named_with_what_to_do(
    tmp_path: Path, name: str | None, content: str, error: type[DataError], message: str
) -> None:
    folder = tmp_path / "folder"
    if name:
        folder.mkdir()
        (folder / name).write_text(content)
    with pytest.raises(error, match=message) as caught:
        write_report([folder], tmp_path / "report.html")
    assert str(folder) in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", "{", "cannot be read"),
        ("manifest.json", '{"not_finite": 3}', "`not_finite` is not a list of names"),
        (
            "metrics.jsonl",
            '{"event": "step", "not_finite": 3}\n',
            r"metrics\.jsonl:1 is not an event",
        ),
        ("data.json", "[]", "holds a list"),
        ("data.json", '{"facts": {}, "findings": []}', "is not what a run writes"),
        ("config.yaml", "a: [", "cannot be read"),
        ("samples.jsonl", '{"step": 1}\n', r"samples\.jsonl:1: not a sample"),
        ("samples.jsonl", "nothing\n", r"samples\.jsonl:1: not JSON"),
    ],
)
def test_a_file_that_was_changed_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    run = write_run(tmp_path / "run", num_steps=3, whole=False)
    (run / name).write_text(content)
    with pytest.raises(DataError, match=message):
        write_report([run], tmp_path / "report.html")


def test_a_page_that_cannot_be_written_is_an_error_with_its_place(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", num_steps=3, whole=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written"):
        write_report([run], tmp_path / "file" / "report.html")
    with pytest.raises(RunFolderError, match="no run was given"):
        write_report([], tmp_path / "report.html")


def test_the_model_card_has_front_matter_and_measured_facts() -> None:
    manifest = make_manifest() | {"base_model_on_hub": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    manifest["settings"]["retention"] = None
    card = render_model_card(manifest | {"licence": "Apache-2.0"})
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fulltune", "full-parameter-fine-tuning", "text-generation", "conversational"],
    }
    assert "Of its 134,515,008 parameters, all were trained." in body
    assert "| loss | 1.215 |" in body
    assert "| `data/train.jsonl` | 18,421 | `9f9f" in body
    assert "| `optimizer.lr` | `2e-05` |" in body
    assert "| `retention` | `null` |" in body
    assert "no safety evaluation" in body
    assert "<script>" not in body
    assert "8.0 GiB" in body


def test_a_model_card_tells_the_hub_no_name_that_it_does_not_know() -> None:
    card = render_model_card(make_manifest() | {"licence": "research use"})
    front = yaml.safe_load(card.split("---\n", 2)[1])
    assert "base_model" not in front
    assert (front["license"], front["license_name"]) == ("other", "research use")
    assert name_on_hub("asset:smollm2-135m-instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert name_on_hub("bert-org/bert") == "bert-org/bert"
    assert name_on_hub("/models/bert") is None
    assert name_on_hub("tests/report") is None


def test_a_model_card_of_an_empty_manifest_claims_nothing() -> None:
    card = render_model_card({})
    assert "license" not in card
    assert "measured only as stated here" in card


def test_markdown_is_escaped_and_its_tables_are_tables() -> None:
    html = str(
        render_markdown("# A <b>\n\n| x | y |\n| --- | --- |\n| a\\|b | `c` |\n\n- one\n- **two**")
    )
    assert "<h3>A &lt;b&gt;</h3>" in html
    assert "<td>a|b</td><td><code>c</code></td>" in html
    assert "<li><b>two</b></li>" in html


def test_ticks_are_round_and_span_the_values() -> None:
    assert nice_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(1.13, 2.71)[0] <= 1.13
    assert nice_ticks(5, 5)[0] < 5 < nice_ticks(5, 5)[-1]
    assert [tick_text(tick, 5e-6) for tick in (0, 5e-6, 1.5e-5)] == ["0", "5e-6", "1.5e-5"]
    assert tick_text(1250, 250) == "1,250"
    assert tick_text(0.25, 0.25) == "0.25"


def test_thinning_keeps_every_spike_and_every_value_that_is_not_finite() -> None:
    points = [(float(x), 1.0) for x in range(10_000)]
    points[4321] = (4321.0, 99.0)
    points[77] = (77.0, math.nan)
    kept = thin(points, 600)
    assert len(kept) <= 650
    assert (4321.0, 99.0) in kept
    assert any(math.isnan(y) for _, y in kept)
    assert kept[-1] == points[-1]


def test_smoothing_is_a_median_around_each_value_and_skips_what_is_not_finite() -> None:
    values = [4.0, 1.0, math.nan, 3.0, 90.0, 2.0, 5.0]
    course = smooth(list(enumerate(values)), 3)
    assert course == [(0, 2.5), (1, 3.0), (3, 3.0), (4, 3.0), (5, 5.0), (6, 3.5)]


def test_a_spike_does_not_flatten_the_curve_but_is_marked_with_its_value() -> None:
    points = [(float(x), 2.0 - x / 100) for x in range(100)]
    points[50] = (50.0, 5000.0)
    points[60] = (60.0, math.nan)
    svg = line_chart(
        [Series("loss", points)], title="Loss", y_label="nats", marks=[Mark(50, "spike", "spike")]
    )
    assert "loss: 5,000 at step 50" in svg
    assert "loss: NaN at step 60" in svg
    assert "4,000" not in svg
    assert 'role="img"' in svg
    assert 'aria-label="Loss: loss from 2.000 to 1.010 nats"' in svg


def test_charts_of_nothing_are_empty_text() -> None:
    assert line_chart([Series("loss", [(1, math.nan)])], title="Loss", y_label="") == ""
    assert bar_chart([], title="none") == ""
    assert heat_map([], [], title="none") == ""
