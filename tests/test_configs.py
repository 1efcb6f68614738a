"""Every YAML that is shipped loads as what its folder says it is, and says the paper's settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from refine_harness.config import (
    Evaluation,
    Experiment,
    MidConfig,
    PostConfig,
    Strict,
    TestTimeConfig,
    TrainConfig,
    load,
    read_yaml,
)
from refine_harness.evaluation.tasks import resolve
from refine_harness.resources import resource

CONFIGS = resource("configs")
KINDS: dict[str, type[Strict]] = {
    ".": Experiment,
    "base": MidConfig,
    "midtrain": MidConfig,
    "posttrain": PostConfig,
    "testtime": TestTimeConfig,
    "eval": Evaluation,
}
SHIPPED = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml"))
OF_THE_PAPER = [name for name in SHIPPED if Path(name).parent.name in ("midtrain", "posttrain", "testtime", "eval")]


@pytest.mark.parametrize("name", SHIPPED)
def test_every_config_loads(name: str) -> None:
    load(KINDS[Path(name).parent.as_posix()], CONFIGS / name)


def test_there_is_a_config_for_every_stage_and_for_scoring() -> None:
    assert {Path(name).parent.name for name in OF_THE_PAPER} == {"midtrain", "posttrain", "testtime", "eval"}


@pytest.mark.parametrize("name", OF_THE_PAPER)
def test_every_config_of_the_paper_names_its_table(name: str) -> None:
    heading = [line for line in (CONFIGS / name).read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert "2602.16704" in " ".join(heading)
    assert "table" in " ".join(heading)


@pytest.mark.parametrize("name", [name for name in OF_THE_PAPER if not name.startswith("eval/")])
def test_defaults_are_the_papers(name: str) -> None:
    """What a stage's YAML spells out is what the stage does without it, but for what it must choose."""
    kind = KINDS[Path(name).parent.name]
    assert issubclass(kind, TrainConfig)
    chosen = {"steps", "restore"}
    spelt_out = load(kind, CONFIGS / name).model_dump(exclude=chosen)
    assert spelt_out == kind().model_dump(exclude=chosen)
    assert read_yaml(CONFIGS / name).keys() >= {"algorithm", "optim", "batch"}


@pytest.mark.parametrize("name", [name for name in OF_THE_PAPER if name.startswith("eval/")])
def test_evaluations_name_tasks_that_there_are(name: str) -> None:
    evaluation = load(Evaluation, CONFIGS / name)
    assert len(resolve(evaluation.tasks, evaluation, "no-tokenizer-yet").names) == len(evaluation.tasks)


def test_autocast_can_be_turned_off_without_quotes(tmp_path: Path) -> None:
    (tmp_path / "off.yaml").write_text("autocast: no\n")
    assert load(MidConfig, tmp_path / "off.yaml").autocast == "no"
    assert load(MidConfig, None, ["autocast=no"]).autocast == "no"
