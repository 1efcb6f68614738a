"""The closed tree of settings: every type, default, bound and meaning, once.

Defaults are the paper's (arXiv 2602.16704, settings table and released code). YAML is for people,
`key.path=value` for the command line, JSON for the resolved copy beside every checkpoint. This
file imports no torch, so that a typo is reported before anything slow starts.
"""

from __future__ import annotations

import re
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from refine_harness.errors import ConfigError, suggest

Stage = Literal["mid", "post", "test-time"]

REWARD_NAMES = ("cosine", "exact", "hybrid")
_FUNCTION_PATH = re.compile(r"[A-Za-z_]\w*((\.[A-Za-z_]\w*)*:|(\.[A-Za-z_]\w*)*\.)[A-Za-z_]\w*", re.ASCII)


class Strict(BaseModel):
    """A block of settings: unknown keys are refused, values cannot change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Algorithm(Strict):
    """ReFINE itself (PAPER: method, steps 1-6)."""

    chunks: PositiveInt = 8
    """c: equal chunks per document; one position is picked in each."""
    rollout_length: PositiveInt = 5
    """k: tokens of every rollout; also the window of the entropy pooling."""
    rollouts: PositiveInt = 1
    """n: rollouts per position."""
    positions: Literal["entropy", "uniform", "argmax", "argmin"] = "entropy"
    """How a chunk's position is drawn: softmax of the pooled entropy, or an ablation."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the log-probabilities of the update use it too."""
    top_k: NonNegativeInt = 0
    """Sample among the so many likeliest tokens; 0 keeps all. The update's log-probabilities, here as with top_p, stay
    those of the whole distribution at the sampling temperature."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus of the sampling distribution (of what top_k leaves of it); 1 keeps all of it."""
    suppress_end: bool = True
    """Never sample the end-of-text token, so that every rollout has k tokens; log-probabilities keep it."""
    reward: str = "cosine"
    """How a rollout is compared with what the document really said next: cosine, exact, hybrid, or a function of
    yours, package.module:function, with the signature of `algorithm.reward.Reward`."""
    group: Literal["document", "position"] = "document"
    """Whose mean an advantage is relative to: all rollouts of a document, or those of one position."""
    scale: Literal["std", "none"] = "std"
    """Whether advantages are divided by the group's standard deviation; those of dr_grpo never are."""
    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """The policy loss, by TRL's names; `algorithm.loss` has formulas and sources. All are averaged over tokens."""
    lambda_ntp: NonNegativeFloat = 1.0
    """Weight of next-token prediction."""
    lambda_rl: NonNegativeFloat = 0.2
    """Weight of the policy loss; 0 is plain next-token prediction."""
    clip_low: PositiveFloat = 0.2
    """The probability ratio is clipped below at 1 - clip_low."""
    clip_high: PositiveFloat = 0.2
    """The probability ratio is clipped above at 1 + clip_high."""
    dual_clip: float | None = Field(default=3.0, gt=1)
    """Bound on the loss of a negative advantage, in units of it; null for none. cispo has no use for it."""
    kl_weight: NonNegativeFloat = 0.0
    """Weight, within the policy loss, of the KL divergence from the model as it was when training started; above 0
    a frozen copy of the model is kept."""
    rollouts_from: Literal["batch", "step"] = "batch"
    """When rollouts are sampled: once for the whole batch, which the later optimizer steps of that batch then meet
    off-policy (the paper's flow), or anew at every optimizer step, on-policy. Where the weights are those of the step
    itself, as at the first of a batch, sampling takes no extra forward."""

    @property
    def advantage_scale(self) -> Literal["std", "none"]:
        """`scale`, or none where the loss itself says so."""
        return "none" if self.loss == "dr_grpo" else self.scale

    @field_validator("reward")
    @classmethod
    def _names_a_reward(cls, reward: str) -> str:
        if reward not in REWARD_NAMES and not _FUNCTION_PATH.fullmatch(reward):
            raise ValueError(
                f"{reward!r} is no reward; expected {', '.join(REWARD_NAMES)}, or a function of yours as "
                "package.module:function"
            )
        return reward

    @model_validator(mode="after")
    def _spread(self) -> Algorithm:
        if self.lambda_rl > 0 and self.group == "position" and self.rollouts == 1:
            raise ValueError(
                "group is position with rollouts = 1: a single rollout has no spread to learn from. "
                "Raise algorithm.rollouts or set algorithm.group=document"
            )
        if self.lambda_rl > 0 and self.group == "document" and self.chunks * self.rollouts == 1:
            raise ValueError(
                "chunks = 1 and rollouts = 1: one rollout per document has no spread to learn from. "
                "Raise algorithm.chunks or algorithm.rollouts"
            )
        return self


class Optim(Strict):
    """AdamW and its schedule."""

    lr: PositiveFloat = 1e-6
    betas: tuple[float, float] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.01
    grad_norm: PositiveFloat = 1.0
    """Gradients are scaled down to this global norm."""
    warmup_steps: NonNegativeInt = 0
    """Steps over which the rate rises linearly from 0."""
    schedule: Literal["constant", "cosine"] = "constant"
    """What follows the warm-up; cosine falls to `min_lr_ratio` of lr at the last step."""
    min_lr_ratio: float = Field(default=0.1, ge=0, le=1)


class Batching(Strict):
    """How many documents make a batch, and into how many optimizer steps it is cut."""

    sequences: PositiveInt = 128
    """Documents per batch, over all processes."""
    steps: PositiveInt = 4
    """Optimizer steps per batch: each takes sequences / steps documents."""
    micro: PositiveInt = 1
    """Documents in memory at once; changes speed and memory, not the result."""

    @model_validator(mode="after")
    def _divides(self) -> Batching:
        if self.sequences % self.steps:
            raise ValueError(
                f"sequences = {self.sequences} is not a multiple of steps = {self.steps}. Make one divide the other"
            )
        return self

    @property
    def per_step(self) -> int:
        """Documents per optimizer step."""
        return self.sequences // self.steps


class Source(Strict):
    """One source of training documents."""

    kind: Literal["text", "needles", "questions"] = "text"
    """text: windows of long documents. needles: generated needle-in-a-haystack documents (RULER-like), whose
    haystack is the text at `path`. questions: many paragraphs, one or more questions and their answers."""
    path: str | None = None
    """A parquet, jsonl or txt file, a folder of them, or a hub data set id."""
    weight: PositiveFloat = 1.0
    """Share of the documents that come from here, relative to the other sources."""
    text_column: str = "text"
    """Where the text of a row is (text and needles)."""
    exclude: str | None = None
    """A parquet file with a column `id` or `title`: rows of this source named there are left out."""

    @model_validator(mode="after")
    def _has_path(self) -> Source:
        if self.path is None:
            raise ValueError(f"a source of kind {self.kind} needs a path")
        return self


class CorpusData(Strict):
    """Mid-training documents."""

    path: str | None = None
    """Short for one text source: a parquet, jsonl or txt file, a folder of them, or a hub data set id."""
    sources: tuple[Source, ...] = ()
    """Several weighted sources instead of `path`."""
    window: PositiveInt = 16384
    """Tokens per document; longer texts are cut into windows, shorter ones are left out and counted."""
    text_column: str = "text"
    """Where the text of a row is, for `path`."""
    workers: NonNegativeInt = 0
    """Processes that make batches ahead of time; changes speed, not content."""

    @model_validator(mode="after")
    def _one_way(self) -> CorpusData:
        if self.path is not None and self.sources:
            raise ValueError("both path and sources are given. Keep one")
        return self

    @property
    def all_sources(self) -> tuple[Source, ...]:
        """`sources`, or the one that `path` stands for; empty when neither is set."""
        if self.sources or self.path is None:
            return self.sources
        return (Source(path=self.path, text_column=self.text_column),)


class QuestionData(Strict):
    """Post-training examples: a long prompt and its short answer."""

    path: str | None = None
    """A parquet or jsonl file, or a folder of them, with columns `prompt` and `answer`; or with `context`,
    `question`, `answers` (one paragraph a row) or `question`, `answers`, `paragraphs` (a list), from which
    long prompts are built as RULER builds them."""
    prompt_tokens: PositiveInt = 8160
    """Length that built prompts are filled to, and the bound above which given prompts are left out."""
    answer_tokens: PositiveInt = 32
    """Longest answer; longer ones are left out and counted."""


class TrainConfig(Strict):
    """What every training stage has."""

    seed: int = 0
    """Seeds data order, positions and sampling."""
    steps: PositiveInt = 400
    """Optimizer steps on documents (post-training: not counting answer steps)."""
    device: str = "auto"
    """auto: CUDA where there is one, else the CPU."""
    dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    """Of weights and optimizer. In bfloat16 a step below 1/512 of a weight is lost: nearly all, at the paper's rate."""
    autocast: Literal["auto", "no", "bf16"] = "auto"
    """Mixed precision of the forward pass; auto is bf16 on CUDA and none on a CPU."""
    activation_checkpointing: bool = False
    """Make activations again in the backward pass instead of keeping them: several times longer documents, a third more
    time."""
    checkpoint_every: NonNegativeInt = 100
    """Optimizer steps between resumable checkpoints; 0 for the last step only."""
    algorithm: Algorithm = Algorithm()
    optim: Optim = Optim()
    batch: Batching = Batching()

    @field_validator("autocast", mode="before")
    @classmethod
    def _no_is_a_word(cls, autocast: Any) -> Any:
        """YAML reads an unquoted no as False."""
        return "no" if autocast is False else autocast

    @field_validator("device")
    @classmethod
    def _known_device(cls, device: str) -> str:
        if device.split(":")[0] not in ("auto", "cpu", "cuda", "mps", "xpu"):
            raise ValueError(f"{device} is not a device; expected auto, cpu, cuda or cuda:N")
        return device


class MidConfig(TrainConfig):
    """Mid-training: long documents (paper: 100 batches of 128 windows of 16,384 tokens)."""

    data: CorpusData = CorpusData()


class PostConfig(TrainConfig):
    """Nested post-training: document steps on the prompt, then one cross-entropy step on the answer."""

    data: QuestionData = QuestionData()
    batch: Batching = Batching(sequences=64, steps=4)
    algorithm: Algorithm = Algorithm(reward="hybrid")
    nested: bool = True
    """Whether each batch's answer step follows steps on its prompts; false is plain fine-tuning on answers."""


class TestTimeConfig(TrainConfig):
    """Test-time training: adapt on evaluation prompts, answer, restore or carry over."""

    __test__ = False  # not a test, whatever pytest makes of the name

    restore: Literal["prompt", "never"] = "prompt"
    """prompt: adapt on each prompt alone and put weights and optimizer back after its answer. never: adapt on
    batches of prompts one after another and keep what was learned (the paper's flow; depends on their order)."""
    steps: PositiveInt = 2
    """Optimizer steps per prompt (restore: prompt); ignored for restore: never, where batch.steps counts."""
    batch: Batching = Batching(sequences=8, steps=2)
    algorithm: Algorithm = Algorithm(reward="exact", lambda_rl=0.4)


STAGES: dict[str, type[TrainConfig]] = {"mid": MidConfig, "post": PostConfig, "test-time": TestTimeConfig}


class Evaluation(Strict):
    """How a checkpoint is scored."""

    tasks: tuple[str, ...] = ("niah", "longqa", "longbench")
    """Groups (ruler, niah, longqa, longbench, babilong, short), single tasks of ours, or any stock lm-eval task."""
    lengths: tuple[PositiveInt, ...] = (4096,)
    """Context lengths in tokens for generated tasks."""
    limit: PositiveInt | None = None
    """Examples per task (and per length); null for all."""
    data: str | None = None
    """Folder with local data for tasks that are not generated; null reads the hub."""
    samples: PositiveInt = 500
    """Examples generated per task and length, before `limit`."""
    seed: int = 42
    """Seeds generated examples."""
    max_length: PositiveInt | None = None
    """Longest prompt plus answer in tokens; null for no bound. Longer prompts are counted."""
    truncation: Literal["middle", "left", "error", "none"] = "middle"
    """What is done with a prompt over max_length: cut in its middle or from the left, refused, or left whole."""
    batch_size: PositiveInt | Literal["auto"] = "auto"
    """Prompts answered at once; auto: as many as keep the device busy. Changes speed and memory, scores by rounding."""
    device: str = "auto"
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"
    """auto: bfloat16 on CUDA, float32 on a CPU."""


class Run(Strict):
    """One row of an experiment: a checkpoint trained from another, or only scored."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Folder and label of the row."""
    stage: Literal["base", "mid", "post", "test-time"]
    """base: scored as it is."""
    parent: str | None = None
    """The earlier run whose checkpoint this one starts from; null for the experiment's model."""
    label: str | None = None
    """What tables call it; null for the name."""
    config: dict[str, Any] = {}
    """Settings of the stage, as in a training YAML."""

    @model_validator(mode="after")
    def _valid_settings(self) -> Run:
        if self.stage == "base":
            if self.config:
                raise ValueError(f"run {self.name} is only scored (stage: base) and takes no config")
            return self
        build(STAGES[self.stage], self.config, where=f"run {self.name}")
        return self

    @property
    def training(self) -> TrainConfig | None:
        """The stage's settings; None for a run that is only scored."""
        return None if self.stage == "base" else build(STAGES[self.stage], self.config, where=f"run {self.name}")


class Experiment(Strict):
    """Several runs, scored alike and put on one page: what `refine run` does."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    model: str
    """Base checkpoint: a folder, the name of an embedded model, or a hub id."""
    out: str | None = None
    """Where to write; null for runs/<name>."""
    evaluation: Evaluation = Evaluation()
    runs: tuple[Run, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _parents(self) -> Experiment:
        seen: list[str] = []
        for run in self.runs:
            if run.name in seen:
                raise ValueError(f"two runs are named {run.name}. Names are folders: make them differ")
            if run.parent is not None and run.parent not in seen:
                raise ValueError(
                    f"run {run.name} starts from {run.parent}, which is no earlier run.{suggest(run.parent, seen)}"
                )
            seen.append(run.name)
        return self


M = TypeVar("M", bound=Strict)


def load(kind: type[M], path: str | Path | None = None, overrides: Sequence[str] = ()) -> M:
    """Settings of type `kind` from a YAML file and `key.path=value` overrides, later ones winning.

    Raises ConfigError, with the file or override and the key in the sentence.
    """
    tree: dict[str, Any] = {}
    where = "settings"
    if path is not None:
        where = str(path)
        tree = read_yaml(path)
    for override in overrides:
        _set(tree, override, kind)
        where = f"{where} with {override}" if path is not None else override
    return build(kind, tree, where=str(path) if path is not None else "command line")


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (safe loader). Raises ConfigError."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a YAML file ({error}). Give the path of a config.") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"{path} is not valid YAML{place}. Mend it, or compare it with one in configs/.") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path} holds a {type(tree).__name__}; expected a mapping of settings such as `steps: 100`.")
    return tree


def build(kind: type[M], tree: dict[str, Any], *, where: str) -> M:
    """`tree` checked and completed with defaults; stage defaults fill blocks given in part."""
    try:
        return kind.model_validate(_with_defaults(kind, tree))
    except ValidationError as error:
        raise ConfigError(f"{where}: {_sentence(kind, error)}") from None


def _with_defaults(kind: type[BaseModel], tree: Any) -> Any:
    """A block given in part keeps the *stage's* defaults for the rest, not the block's own."""
    if not isinstance(tree, dict):
        return tree
    out = dict(tree)
    for name, field in kind.model_fields.items():
        default = field.default
        if isinstance(default, Strict) and isinstance(out.get(name), dict):
            block = _with_defaults(type(default), out[name])
            out[name] = {**default.model_dump(), **block}
    return out


def _set(tree: dict[str, Any], override: str, kind: type[BaseModel]) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override} is not a setting. Write key.path=value, such as optim.lr=3e-6.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    node = tree
    *parents, last = key.split(".")
    for name in parents:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{key} is not a setting: {name} is a value, not a block.")
        node = child
    node[last] = value


def _sentence(kind: type[BaseModel], error: ValidationError) -> str:
    """The first problem as one sentence that says what to do."""
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    key = ".".join(path) or "the file"
    if first["type"] == "extra_forbidden":
        block = _block(kind, path[:-1])
        near = suggest(path[-1], block.model_fields) if block else ""
        if near and len(path) > 1:
            near = near.replace("mean ", f"mean {'.'.join(path[:-1])}.")
        known = "" if near or block is None else f" Known here: {', '.join(block.model_fields)}."
        return f"{key} is not a setting.{near}{known}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"{message}." if not path else f"{key}: {message}."
    if first["type"] == "missing":
        return f"{key} is missing. Set it."
    expected = message[0].lower() + message[1:]
    return f"{key} is {first['input']!r}; {expected.replace('input should', 'it should')}."


def _block(kind: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The settings class at a dotted path, for suggestions; None where there is none."""
    found: type[BaseModel] | None = kind
    for name in path:
        if found is None:
            return None
        if name.isdigit():
            continue
        field = found.model_fields.get(name)
        found = _model_in(field.annotation) if field is not None else None
    return found


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (tuple, list, Union, types.UnionType):
        for part in get_args(annotation):
            if (model := _model_in(part)) is not None:
                return model
    return None
