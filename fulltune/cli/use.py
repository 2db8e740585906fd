"""Verbs that use what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from fulltune.cli.app import FLAG, USE, Device, Json, Model, app
from fulltune.cli.evaluation import print_evaluation
from fulltune.cli.printing import parse_columns, print_answers, print_json

NumBeams: TypeAlias = Annotated[
    int, typer.Option(min=1, metavar="N", help="Beam search over this many answers at once.")
]
LengthPenalty: TypeAlias = Annotated[
    float,
    typer.Option(metavar="X", help="Beam search: above 1 favours longer answers, below shorter."),
]
NoRepeatNgramSize: TypeAlias = Annotated[
    int,
    typer.Option(min=0, metavar="N", help="No N tokens come twice in an answer; 0 lets them."),
]
PrefixText: TypeAlias = Annotated[
    str, typer.Option(metavar="TEXT", help="How every answer begins.")
]


@app.command(rich_help_panel=USE)
def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="Labelled rows; without it, the validation split of the run."
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="OURS=YOURS", help="Our field and your column, `text=question`."
        ),
    ] = None,
    too_long: Annotated[
        Literal["error", "truncate", "drop"] | None,
        typer.Option(
            help="What happens to an example of the data longer than the model was trained for; "
            "an error by default."
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Chat, sequence to sequence: prompts answered and shown; by default as many as in "
            "training.",
        ),
    ] = None,
    generate: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Sequence to sequence: most sources answered to score the answers; by default "
            "all, 0 for none.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Longest answer in tokens; by default twice the longest target.",
        ),
    ] = None,
    num_beams: NumBeams = 1,
    length_penalty: LengthPenalty = 1.0,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    prefix_text: PrefixText = "",
    tokenize: Annotated[
        Literal["auto", "13a", "intl", "zh", "char", "none"],
        typer.Option(help="Words of BLEU: a tokenizer of sacreBLEU."),
    ] = "auto",
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Another run or model of the same task, such as the one that training began with: "
            "both are measured on the same examples and compared one by one.",
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Measure a model on held-out data: every metric with its 95% interval, and where it errs.

    Of a run, the result is kept in its folder, and its report shows it.
    """
    from fulltune.recipes import evaluate as recipe
    from fulltune.recipes.kept_evaluations import keep_evaluation
    from fulltune.tracking import show_answer

    report = recipe.run(
        model, data=data, columns=parse_columns(columns), too_long=too_long,
        num_samples=samples, generate=generate, tokenize=tokenize, against=against,
        device=device,
        search=_given(
            max_new_tokens=max_new_tokens, num_beams=num_beams, length_penalty=length_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size, prefix_text=prefix_text,
        ),
    )  # fmt: skip
    kept = keep_evaluation(report)
    if as_json:
        print_json(report.as_json())
    else:
        print_evaluation(report)
        for sample in (sample.as_json() for sample in report.samples):
            answers = {"answer": show_answer(sample), "reference": sample["reference"]}
            print_answers(sample["prompt"], answers)
    if kept is not None:
        typer.echo(kept, err=True)


@app.command(rich_help_panel=USE)
def predict(
    model: Model,
    source: Annotated[
        str, typer.Argument(help="Rows in any format that training reads.", metavar="INPUT")
    ],
    output: Annotated[
        Path | None, typer.Option(metavar="FILE", help="JSON Lines to write; without it, stdout.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar=FLAG,
            help="Go on after the lines already written, with the model and settings that wrote "
            "them: `FILE.origin.json` beside the output holds these.",
        ),
    ] = False,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--column", metavar="OURS=YOURS", help="Our field and your column, `text=question`."
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 takes the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option(
            min=0.0,
            max=1.0,
            metavar="X",
            help="Sample from the likeliest tokens of this probability.",
        ),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the samples.")] = 0,
    num_beams: NumBeams = 1,
    length_penalty: LengthPenalty = 1.0,
    no_repeat_ngram_size: NoRepeatNgramSize = 0,
    prefix_text: PrefixText = "",
    too_long: Annotated[
        Literal["error", "truncate"],
        typer.Option(
            help="Classification, sequence to sequence: what happens to a text longer than the "
            "model was trained for."
        ),
    ] = "error",
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            metavar=FLAG,
            help="Classification: multiply in bf16, and exactly where a label could change by it: "
            "the same labels, several times as fast on many processors; probabilities differ in "
            "their third digit.",
        ),
    ] = False,
    device: Device = "auto",
) -> None:
    """Answer or label every row of a file; streaming, and resumable."""
    from fulltune.config import build_config
    from fulltune.inference import GenerationSettings
    from fulltune.recipes import predict as recipe

    settings = build_config(
        GenerationSettings,
        {
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "seed": seed,
            "num_beams": num_beams,
            "length_penalty": length_penalty,
            "no_repeat_ngram_size": no_repeat_ngram_size,
            "prefix_text": prefix_text,
        },
    )
    result = recipe.run(
        model, source, output=output, resume=resume, settings=settings,
        columns=parse_columns(columns), too_long=too_long, quick=quick, device=device,
    )  # fmt: skip
    if result.output is not None:
        kept = f" ({result.num_kept:,} were there)" if result.num_kept else ""
        typer.echo(f"{result.num_predicted:,} predictions in {result.output}{kept}", err=True)


@app.command(rich_help_panel=USE)
def chat(
    model: Model,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System prompt.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, metavar="N", help="Longest answer in tokens.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option(min=0.0, metavar="X", help="0 takes the likeliest token.")
    ] = 0.0,
    device: Device = "auto",
) -> None:
    """Talk with a model in the terminal."""
    from fulltune.config import build_config
    from fulltune.inference import GenerationSettings
    from fulltune.recipes import chat as recipe

    settings = build_config(
        GenerationSettings, {"max_new_tokens": max_new_tokens, "temperature": temperature}
    )
    recipe.run(model, settings=settings, system=system, device=device)


@app.command(rich_help_panel=USE)
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="One run folder, or several to compare.", metavar="RUN")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The page to write; without it, `report.html` in the first run."
        ),
    ] = None,
) -> None:
    """Write one page of curves, settings, data and samples; several runs side by side."""
    from fulltune.report.report import write_report

    name = "report.html" if len(runs) == 1 else "comparison.html"
    typer.echo(write_report(runs, output or runs[0] / name))


def _given(**values: Any) -> dict[str, Any]:
    """The options that are not at their defaults, which would be refused where they do nothing."""
    defaults = {
        "max_new_tokens": None, "num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0,
        "prefix_text": "",
    }  # fmt: skip
    return {name: value for name, value in values.items() if value != defaults[name]}
