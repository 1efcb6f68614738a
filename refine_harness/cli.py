"""The `refine` command: reads arguments, says what is wrong with them, and hands over to `run.py`.

Nothing slow is imported before a command runs, so `refine --help` answers at once. What a command does is elsewhere.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from refine_harness import __version__
from refine_harness.errors import ConfigError, RunError, for_people, suggest

if TYPE_CHECKING:
    from refine_harness.config import Evaluation, Strict

T = TypeVar("T")


class Stage(StrEnum):
    """The stages of `config.STAGES`, which is not imported before it is needed."""

    MID = "mid"
    POST = "post"
    TEST_TIME = "test-time"


class Explained(StrEnum):
    """What `refine explain` knows: the stages, and how checkpoints are scored."""

    MID = "mid"
    POST = "post"
    TEST_TIME = "test-time"
    EVAL = "eval"


class Backend(StrEnum):
    """lm-eval backends of ours."""

    REFINE = "refine"
    REFINE_TTT = "refine-ttt"


app = typer.Typer(
    name="refine",
    help="Train fast-weight language models with ReFINE, score them with lm-eval, and publish what was measured.\n\n"
    "The whole line on a small model, in minutes:  refine run configs/quickstart.yaml",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
pages = typer.Typer(
    help="Turn score records into a page that opens in any browser.", no_args_is_help=True, rich_markup_mode="markdown"
)
app.add_typer(pages, name="leaderboard")
gpu = typer.Typer(help="What runs on a GPU, and how it is tuned.", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(gpu, name="kernels")

Model = Annotated[
    str, typer.Option("--model", help="Model folder, hub id, or the embedded refine-tiny.", metavar="MODEL")
]
Out = Annotated[Path, typer.Option("--out", help="Folder to write to; the same run goes on where it was.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(
        help="A YAML file of settings (yours, or a shipped one such as configs/midtrain/deltanet_1b.yaml), and single "
        "settings that win over it. `refine explain` lists them.",
        metavar="SETTINGS",
        show_default=False,
    ),
]
Tasks = Annotated[
    str | None,
    typer.Option(
        "--tasks", help="Groups (niah,longqa,longbench), single tasks of theirs, or any lm-eval task.", metavar="T,..."
    ),
]
Lengths = Annotated[
    str | None, typer.Option("--lengths", help="Context lengths in tokens, for generated tasks.", metavar="N,...")
]
Limit = Annotated[int | None, typer.Option("--limit", help="Examples per task and length; all without it.")]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        help="Folder with *evaluation* data for longqa and longbench; without it they come from the hub. Training "
        "data is the setting data.path.",
        metavar="DIR",
    ),
]
Name = Annotated[str | None, typer.Option("--name", help="What tables call the result.", metavar="LABEL")]


def command(
    parent: typer.Typer, name: str, *, resumes: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose user errors become one sentence and exit code 2.

    `resumes`: whether an interrupted command goes on where it was when it is given again.
    """

    def register(body: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(body)
        def guarded(*args: Any, **kwargs: Any) -> None:
            try:
                body(*args, **kwargs)
            except Exception as error:
                if (sentence := for_people(error)) is None:
                    raise
                _complain("error", sentence, "bold red")
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                again = "The same command goes on where it was." if resumes else "Nothing was finished."
                _complain("interrupted", again, "bold yellow")
                raise typer.Exit(130) from None

        return parent.command(name)(guarded)

    return register


def _complain(kind: str, sentence: str, style: str) -> None:
    from rich.console import Console
    from rich.text import Text

    # Text, not a string: what users typed may look like markup.
    Console(stderr=True, highlight=False).print(Text.assemble((f"{kind}: ", style), sentence), soft_wrap=True)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"refine-harness {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


@command(app, "train", resumes=True)
def train(
    stage: Annotated[Stage, typer.Option("--stage", help="mid, post or test-time.", show_choices=False)],
    model: Model,
    out: Out,
    settings: Settings = None,
    tasks: Tasks = None,
    lengths: Lengths = None,
    limit: Limit = None,
    data: Data = None,
    name: Name = None,
) -> None:
    """Train a checkpoint from another, and score it if tasks are named.

    Defaults are the paper's; `algorithm.lambda_rl=0` is the next-token baseline. `--stage test-time` adapts on the
    prompts of the tasks, so it needs `--tasks`.

    Examples:

    - `refine train --stage mid --model refine-tiny --out runs/mid data.path=books/ data.window=1024 --tasks niah`

    - `refine train --stage post --model runs/mid/final --out runs/post configs/posttrain/deltanet_1b.yaml
      data.path=qa/ optim.lr=3e-6`

    - `refine train --stage test-time --model runs/post/final --out runs/ttt --tasks longqa --data eval-data/`
    """
    from refine_harness.config import STAGES, load

    config_path, overrides = split_settings(settings)
    config = load(STAGES[stage.value], config_path, overrides)
    evaluation = None
    if tasks is not None:
        evaluation = _evaluation(None, (), tasks=tasks, lengths=lengths, limit=limit, data=data)
    else:
        for option, value in (("--lengths", lengths), ("--limit", limit), ("--data", data)):
            if value is not None:
                raise ConfigError(
                    f"{option} is about scoring and no tasks are named. Add --tasks, such as --tasks niah."
                )
        if stage is Stage.TEST_TIME:
            raise ConfigError(
                "test-time training adapts on the prompts of tasks and none are named. Add --tasks, such as niah."
            )

    from refine_harness import run

    run.train(stage.value, model, out, config, evaluation, name, sys.argv)


@command(app, "eval", resumes=True)
def evaluate(
    model: Model,
    out: Out,
    settings: Settings = None,
    tasks: Tasks = None,
    lengths: Lengths = None,
    limit: Limit = None,
    data: Data = None,
    backend: Annotated[
        Backend, typer.Option("--backend", help="refine-ttt adapts on each prompt before it answers.")
    ] = Backend.REFINE,
    config: Annotated[
        Path | None,
        typer.Option("--config", help="Test-time settings, for refine-ttt.", metavar="TESTTIME.yaml"),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", help="Longest prompt plus answer in tokens; longer prompts are counted."),
    ] = None,
    truncation: Annotated[
        str | None,
        typer.Option("--truncation", help="What a longer prompt loses: middle (the default), left, error or none."),
    ] = None,
    batch_size: Annotated[
        str | None,
        typer.Option("--batch-size", help="Prompts answered at once; auto: by length, at most 64 where text is made."),
    ] = None,
    device: Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="auto, float32, float64 or bfloat16.")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Seeds generated examples.")] = None,
    samples: Annotated[
        int | None, typer.Option("--samples", help="Examples generated per task and length, before --limit.")
    ] = None,
    name: Name = None,
) -> None:
    """Score a checkpoint and write a record.

    Options win over the settings file. Without either, all three groups are scored at 4096 tokens.

    Examples:

    - `refine eval --model refine-tiny --tasks niah --lengths 1024,2048 --limit 20 --out runs/tiny`

    - `refine eval --model fla-hub/delta_net-1.3B-100B configs/eval/niah.yaml --out runs/base`

    - `refine eval --model runs/post/final --backend refine-ttt --config configs/testtime/deltanet_1b.yaml --tasks
      longqa --data eval-data/ --out runs/ttt`
    """
    from refine_harness.config import TestTimeConfig, load

    evaluation = _evaluation(
        *split_settings(settings),
        tasks=tasks,
        lengths=lengths,
        limit=limit,
        data=data,
        max_length=max_length,
        truncation=truncation,
        batch_size=batch_size if batch_size is None or not batch_size.isdigit() else int(batch_size),
        device=device,
        dtype=dtype,
        seed=seed,
        samples=samples,
    )
    test_time = None
    if backend is Backend.REFINE_TTT:
        test_time = load(TestTimeConfig, None if config is None else find_config(str(config)))
    elif config is not None:
        raise ConfigError(
            "--config holds test-time settings, which backend refine does not use. Add --backend refine-ttt."
        )

    from refine_harness import run

    run.evaluate(model, out, evaluation, backend.value, test_time, name, sys.argv)


@command(app, "compare")
def compare_runs(
    first: Annotated[
        str,
        typer.Argument(help="Folder that eval or train wrote, or a record; several seeds as A1,A2,A3.", metavar="A"),
    ],
    second: Annotated[str, typer.Argument(help="Likewise; differences are B minus A.", metavar="B")],
    holm: Annotated[
        bool, typer.Option("--holm", help="Also show p-values corrected for the number of scores compared.")
    ] = False,
    resamples: Annotated[
        int, typer.Option("--resamples", min=100, max=1_000_000, help="Of the bootstrap and of drawn tests.")
    ] = 10_000,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seeds the resampling.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with every number in full.")] = False,
) -> None:
    """Compare two runs on the same examples: difference, interval and p-value for each task and group.

    With several seeds a side, intervals and p-values take in how much seeds differ; a winner needs three a side.

    Examples:

    - `refine compare runs/base runs/mid`

    - `refine compare runs/ntp-0,runs/ntp-1,runs/ntp-2 runs/refine-0,runs/refine-1,runs/refine-2 --holm`
    """
    from refine_harness.evaluation.compare import compare, comparison_table, open_run

    paths = [comma_list(name, text, str) for name, text in (("A", first), ("B", second))]
    sides = [[open_run(path) for path in side] for side in paths]
    comparison = compare(*sides, seed=seed, resamples=resamples)
    if as_json:
        _print_json(comparison.as_json())
    else:
        from rich.console import Console

        Console(highlight=False).print(comparison_table(comparison, holm=holm))


@command(app, "rescore")
def rescore_run(
    run: Annotated[str, typer.Argument(help="Folder that eval or train wrote, or a record.", metavar="RUN")],
    data: Annotated[
        str | None, typer.Option("--data", help="Folder with copies of the data of stock tasks.", metavar="DIR")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: every score, as saved and as it is now.")
    ] = False,
) -> None:
    """Compute every score of a run again from its saved answers, without the model.

    Exit code 1 if a score is another now, because a scorer changed.

    Example: `refine rescore runs/mid`
    """
    from refine_harness.evaluation.compare import open_run
    from refine_harness.evaluation.rescore import rescore, rescore_table, summary

    opened = open_run(run)
    results = rescore(opened, data)
    different = [result for result in results if not result.same]
    if as_json:
        _print_json([result.as_json() for result in results])
    else:
        print(summary(opened, results))
        if different:
            from rich.console import Console

            Console(highlight=False).print(rescore_table(results))
    if different:
        raise typer.Exit(1)


@command(app, "run", resumes=True)
def experiment(
    path: Annotated[str, typer.Argument(help="An experiment: several runs, scored alike.", metavar="EXPERIMENT.yaml")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder to write to; without it, what the experiment says.")
    ] = None,
) -> None:
    """Train, score and compare the runs of an experiment, and write the page.

    Stop it with Ctrl-C when you like: the same command goes on where it was.

    Example: `refine run configs/quickstart.yaml`
    """
    from refine_harness.config import Experiment, load

    config = load(Experiment, find_config(path))

    from refine_harness import run

    run.experiment(config, out, sys.argv)


@command(pages, "build")
def build_page(
    records: Annotated[
        list[Path] | None,
        typer.Option(
            "--records", help="Folder of records, repeatable; without it, leaderboard/records.", show_default=False
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder to write index.html and records.json to.")] = Path(
        "leaderboard"
    ),
    readme: Annotated[
        Path | None, typer.Option("--readme", help="Also put the table between a README's results marks.")
    ] = None,
) -> None:
    """Write the page: scores with standard errors, score against length, and the paper's rows marked as such.

    Example: `refine leaderboard build --records runs/quickstart/records --out page`
    """
    from refine_harness import leaderboard
    from refine_harness.records import in_order, read_records

    folders = _record_folders(records)
    print(leaderboard.build(folders, out))
    if readme is not None:
        found = in_order(record for folder in folders for record in read_records(folder))
        leaderboard.fill_readme(readme, found, f"{folders[0].name if records else 'leaderboard/records'}/")


@command(pages, "check")
def check_page(
    records: Annotated[
        list[Path] | None,
        typer.Option("--records", help="As for build.", show_default=False),
    ] = None,
    page: Annotated[Path, typer.Option("--page", help="The page to check.")] = Path("leaderboard/index.html"),
) -> None:
    """Say whether the page is what its records make now; exit code 1 if it is not."""
    from refine_harness import leaderboard

    if not leaderboard.check(_record_folders(records), page):
        _complain("out of date", f"{page} is not what the records make now. Run refine leaderboard build.", "bold red")
        raise typer.Exit(1)
    print(f"{page} is up to date")


@command(app, "init")
def init(
    config: Annotated[Path, typer.Argument(help="A model's config.json.", metavar="CONFIG.json")],
    tokenizer: Annotated[str, typer.Option("--tokenizer", help="Folder or hub id of its tokenizer.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    seed: Annotated[int, typer.Option("--seed", help="Seeds the weights.")] = 0,
) -> None:
    """Make a model with random weights, to train from nothing.

    Example: `refine init config.json --tokenizer runs/tokenizer --out runs/untrained`
    """
    _require_new(out)

    from refine_harness.models.load import create_model

    print(create_model(config, tokenizer, out, seed=seed))


@command(app, "tokenizer")
def tokenizer(
    data: Annotated[str, typer.Option("--data", help="Parquet, jsonl or txt file, a folder of them, or a hub id.")],
    vocab_size: Annotated[int, typer.Option("--vocab-size", help="Tokens, special ones included.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to create.")],
    text_column: Annotated[str, typer.Option("--text-column", help="Where the text of a row is.")] = "text",
) -> None:
    """Train a byte-level BPE tokenizer.

    Example: `refine tokenizer --data books/ --vocab-size 4096 --out runs/tokenizer`
    """
    _require_new(out)

    from refine_harness.data.read import read_rows
    from refine_harness.data.tokenizer import train_tokenizer

    print(train_tokenizer((row[text_column] for row in read_rows(data, [text_column])), vocab_size, out))


@command(gpu, "tune")
def tune(
    out: Annotated[
        Path | None, typer.Option("--out", help="File to write; later processes read it if REFINE_TUNED names it.")
    ] = None,
) -> None:
    """Choose tile sizes for this GPU, once; later processes start without searching.

    Choices for the GPUs that could be measured are shipped. Takes a few minutes.
    Example: `refine kernels tune`
    """
    from refine_kernels.tune import tune as choose_tiles

    print(choose_tiles(path=out))


@command(app, "explain")
def explain(
    settings: Settings = None,
    stage: Annotated[
        Explained, typer.Option("--stage", help="mid, post, test-time, or eval for scoring.", show_choices=False)
    ] = Explained.MID,
) -> None:
    """Print all settings with their values and meanings: YAML that is itself a config.

    Examples:

    - `refine explain --stage post`

    - `refine explain configs/midtrain/deltanet_1b.yaml algorithm.reward=hybrid`
    """
    from refine_harness.config import STAGES, Evaluation, load

    kind = Evaluation if stage is Explained.EVAL else STAGES[stage.value]
    print("\n".join(explained(load(kind, *split_settings(settings)))))


def split_settings(arguments: Sequence[str] | None) -> tuple[Path | None, list[str]]:
    """The config file among positional arguments, if there is one, and the `key.path=value` overrides.

    Raises ConfigError for a second file and for a file that is neither here nor shipped.
    """
    files = [argument for argument in arguments or () if "=" not in argument]
    overrides = [argument for argument in arguments or () if "=" in argument]
    if len(files) > 1:
        raise ConfigError(
            f"{files[1]} is neither a setting (key.path=value) nor the config file, which is {files[0]}. Give one file."
        )
    return (find_config(files[0]) if files else None), overrides


def find_config(path: str) -> Path:
    """A config here or, under the same path, among those shipped. Raises ConfigError when it is neither."""
    from refine_harness.resources import find, resource

    found = find(path, "configs")
    if not found.is_file():
        shipped = sorted(
            f"configs/{file.relative_to(resource('configs'))}" for file in resource("configs").rglob("*.yaml")
        )
        near = suggest(path, shipped) or f" Shipped: {', '.join(shipped)}."
        raise ConfigError(f"there is no config file {path}.{near}")
    return found


def comma_list(option: str, text: str, item: Callable[[str], T]) -> tuple[T, ...]:
    """`a,b` of an option as a tuple. Raises ConfigError for an empty or repeated part, or one that `item` refuses."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"{option} {text!r} has an empty part. Write names with single commas between them.")
    try:
        items = tuple(item(part) for part in parts)
    except ValueError as error:
        raise ConfigError(f"{option} {text!r}: {error}.") from None
    if repeated := [part for part, value in zip(parts, items, strict=True) if items.count(value) > 1]:
        raise ConfigError(f"{option} {text!r} names {repeated[0]} twice. Leave one out.")
    return items


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def _length(part: str) -> int:
    if not (part.isascii() and part.isdigit() and int(part) > 0):
        raise ValueError(f"{part} is not a number of tokens; write lengths such as 1024,2048")
    return int(part)


def _evaluation(path: Path | None, overrides: Sequence[str], **options: Any) -> Evaluation:
    """Settings of an evaluation: defaults, then the file, then overrides, then options that were given."""
    from refine_harness.config import Evaluation, build, load

    if options["tasks"] is not None:
        options["tasks"] = comma_list("--tasks", options["tasks"], str)
    if options["lengths"] is not None:
        options["lengths"] = comma_list("--lengths", options["lengths"], _length)
    given = {name: value for name, value in options.items() if value is not None}
    return build(Evaluation, {**load(Evaluation, path, overrides).model_dump(), **given}, where="command line")


def _record_folders(records: Sequence[Path] | None) -> list[Path]:
    from refine_harness.resources import resource

    return list(records) if records else [resource("leaderboard") / "records"]


def _require_new(out: Path) -> None:
    """Raises RunError unless `out` is new or an empty folder."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists():
        raise RunError(f"{out} exists already. Choose another --out, or remove it.")


def explained(settings: Strict, indent: str = "") -> list[str]:
    """Lines of YAML for a block of settings, each setting below a comment that says what it means."""
    import textwrap

    from refine_harness.config import Strict

    lines: list[str] = []
    for name, field in type(settings).model_fields.items():
        value = getattr(settings, name)
        block = isinstance(value, Strict)
        meaning = field.description or (type(value).__doc__ if block else None)
        if block and lines:
            lines.append("")
        for paragraph in textwrap.wrap(" ".join((meaning or "").split()), 100):
            lines.append(f"{indent}# {paragraph}")
        if block:
            lines += [f"{indent}{name}:", *explained(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {_yaml_value(value)}")
    return lines


def _yaml_value(value: Any) -> str:
    """A value on one line, as YAML reads it back."""
    import yaml

    from refine_harness.config import Strict

    if isinstance(value, tuple):
        value = [part.model_dump(mode="json") if isinstance(part, Strict) else part for part in value]
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=float("inf"))
    return text.removesuffix("\n...\n").strip()


def main() -> None:
    """The `refine` console script."""
    try:
        app()
    except SystemExit as end:
        if not end.code and "torch" in sys.modules:
            from refine_harness.training.group import leave_group

            leave_group()
        raise
