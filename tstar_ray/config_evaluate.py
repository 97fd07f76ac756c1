"""Settings of an evaluation: which model, on what, decoded how. Imports no torch, ray or vllm.

data sets x block sizes x strategies (x thresholds, tokens per step or bounds) x reveal orders = cells
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tstar_ray.config import (
    ARITHMETIC,
    ActorsConfig,
    ClusterConfig,
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    Prompt,
    RewardConfig,
    default_prompt,
    load_config,
)
from tstar_ray.config_base import Section
from tstar_ray.settings import validated

PRESETS: dict[str, dict[str, Any]] = {
    ARITHMETIC: {"source": ARITHMETIC},
    "gsm8k": {"source": "openai/gsm8k", "subset": "main", "split": "test"},
    "math500": {"source": "HuggingFaceH4/MATH-500", "split": "test", "question_field": "problem"},
    "aime24": {"source": "HuggingFaceH4/aime_2024", "split": "train", "question_field": "problem"},
}
"""Names that stand for a data set on the hub; the built-in arithmetic needs none."""


class DataSet(Section):
    """One set of problems."""

    name: str = ""
    """Shown with every score; empty: the file's or hub data set's own name."""
    source: str
    """`arithmetic` (its held-out split), a .jsonl or .parquet file, or a hub data set."""
    subset: str = ""
    """Hub data sets: configuration name."""
    split: str = "test"
    """Hub data sets: split."""
    question_field: str = "question"
    """Column with the question."""
    answer_field: str = "answer"
    """Column with the final answer."""
    answer_after: str = "####"
    """Where the answer column holds the working too: the answer is what follows the last of these marks."""
    prompt: Prompt = ""
    """Prompt with a {question} placeholder; empty: the bare question for `arithmetic`, else a request to reason step by
    step and box the answer."""
    max_prompt_tokens: int = Field(1024, ge=1)
    """Longer prompts are left out, and counted."""
    limit: int = Field(0, ge=0)
    """Use only the first so many problems; 0: all (512 of the built-in arithmetic)."""

    @property
    def label(self) -> str:
        """What scores are shown under."""
        return self.name or Path(self.source).stem

    @property
    def template(self) -> str:
        """The prompt that is used."""
        return self.prompt or default_prompt(self.source)

    def columns(self) -> DataConfig:
        """How `tstar_ray.data` reads it."""
        return DataConfig(
            subset=self.subset,
            question_field=self.question_field,
            answer_field=self.answer_field,
            answer_after=self.answer_after,
        )


class GridConfig(Section):
    """How each problem is decoded: every combination is a cell with a score of its own."""

    blocks: tuple[Annotated[int, Field(ge=1)], ...] = (4, 8, 16)
    """Block sizes. 1 decodes as an autoregressive model does; one that holds prompt and answer is full-sequence masked
    diffusion."""
    strategies: tuple[Literal["dynamic", "static", "sequential", "entropy"], ...] = ("dynamic",)
    """Unmasking strategies."""
    thresholds: tuple[Annotated[float, Field(ge=0, le=1)], ...] = (0.9,)
    """`dynamic`: confidences above which tokens are revealed."""
    tokens_per_step: tuple[Annotated[int, Field(ge=1)], ...] = (1,)
    """`static` and `sequential`: tokens a step; those beyond the block size are left out."""
    entropy_bounds: tuple[Annotated[float, Field(gt=0)], ...] = (0.35,)
    """`entropy`: bounds in nats."""
    orders: tuple[Literal["learned", "left_to_right", "random", "sub_blocks"], ...] = ("learned",)
    """Reveal orders; all but `learned` force the positions and leave their number to the strategy (ablation of the
    learned schedule)."""
    sub_block: int = Field(4, ge=1)
    """`sub_blocks`: their size; smaller blocks than two of them are left out."""
    samples: int = Field(1, ge=1)
    """Samples a problem. Greedy decoding gives the same one every time, so one is enough there."""
    max_new_tokens: int = Field(96, ge=1)
    """Cap on completion tokens, aligned down to the block grid."""
    temperature: float = Field(0.0, ge=0)
    """0 is greedy."""
    top_k: int = Field(0, ge=0)
    """Sample among the k most likely tokens; 0 keeps all."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Sample within the smallest set of tokens that holds this probability."""
    confidence: Literal["raw", "sampled"] = "raw"
    """Confidence of a token: its probability at temperature 1, or under the distribution it was drawn from."""
    seed: int = Field(20_11_14, ge=0)
    """Of sampling."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for name in ("blocks", "strategies", "orders"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]; name at least one")
        if self.max_new_tokens < max(self.blocks):
            raise ValueError(f"max_new_tokens={self.max_new_tokens} cannot hold a block of {max(self.blocks)}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples={self.samples} of greedy decoding are {self.samples} times the same; set temperature"
            )
        return self


class EvaluateConfig(Section):
    """A whole evaluation."""

    folder: Path = Path("")
    """Where results go; empty: evaluations/MODEL. Cells that are there already are kept."""
    model: ModelConfig = ModelConfig()
    data: tuple[DataSet, ...] = (DataSet(source=ARITHMETIC),)
    """Data sets: gsm8k, math500, aime24, arithmetic, files or hub names; or mappings with the settings below."""
    grid: GridConfig = GridConfig()
    actors: ActorsConfig = ActorsConfig()
    reward: RewardConfig = RewardConfig()
    cluster: ClusterConfig = ClusterConfig()
    save_traces: bool = True
    """Keep every trajectory as Parquet, for `tstar_ray.analyze` and the trace viewer."""

    @model_validator(mode="before")
    @classmethod
    def _as_the_run(cls, values: Any) -> Any:
        """What is not given of data and grid is that of the run, where the model is a run folder."""
        model, grid = (values.get(name) or {} for name in ("model", "grid"))
        if not (isinstance(model, dict) and isinstance(grid, dict)):
            return values
        folder = Path(model.get("path") or "")
        if not (_is_run(folder) and (folder / "config.yaml").is_file()):
            return values
        try:
            run = load_config(folder / "config.yaml")
        except ConfigError:  # of `adapt`, or of another version
            return values
        own = {
            "blocks": run.eval_blocks,
            "strategies": (run.curriculum.strategy,),
            "thresholds": (run.curriculum.threshold,),
            "entropy_bounds": (run.rollout.entropy_bound,),
            "max_new_tokens": run.rollout.max_new_tokens,
            "temperature": run.eval.temperature,
            "confidence": run.rollout.confidence,
        }
        data = values["data"] if "data" in values else (held_out_set(run),)
        return values | {"data": data, "grid": own | grid}

    @field_validator("data", mode="before")
    @classmethod
    def _names(cls, data: Any) -> Any:
        entries = [data] if isinstance(data, str) else data
        if not isinstance(entries, (list, tuple)):
            return entries
        return tuple(_data_set(entry) if isinstance(entry, str) else entry for entry in entries)

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        labels = [data.label for data in self.data]
        if not labels:
            raise ValueError("data=[]; name at least one data set")
        if len(set(labels)) < len(labels):
            raise ValueError(f"data: {', '.join(labels)} share a name; give each its own `name`")
        return self

    @property
    def model_folder(self) -> str:
        """The checkpoint; a run folder stands for its trained model."""
        path = Path(self.model.path)
        return str(path / "final") if _is_run(path) else self.model.path

    def resolve_folder(self) -> Path:
        """Where results go."""
        if self.folder != Path(""):
            return self.folder.resolve()
        path = Path(self.model_folder)
        name = path.parent.name if path.name == "final" else path.name
        return (Path("evaluations") / name).resolve()

    def as_run(self) -> Config:
        """The settings that placement and actors read; there is no learner. Raises ConfigError."""
        gpus, grid = self.actors.gpus, self.grid
        dtype = self.model.dtype if self.model.dtype != "auto" else ("bfloat16" if gpus else "float32")
        return validated(
            Config,
            {
                "run": {"seed": grid.seed},
                "model": self.model.model_dump() | {"path": self.model_folder, "dtype": dtype},
                "data": {"max_prompt_tokens": max(data.max_prompt_tokens for data in self.data)},
                # Units small enough that engines stay filled.
                "rollout": {"max_new_tokens": grid.max_new_tokens, "max_staleness": 1},
                "actors": self.actors.model_dump(),
                "reward": self.reward.model_dump(),
                "learner": {"gpus": gpus},
                "curriculum": {"blocks": (min(grid.blocks),), "updates": (1,)},
                "eval": {"blocks": grid.blocks},
                "cluster": self.cluster.model_dump(),
            },
        )


def held_out_set(run: Config) -> DataSet:
    """The held-out problems of a run; raises ConfigError where they are a part of its training data."""
    data = run.data
    source, asked = data.eval or data.train, default_prompt(data.train)
    if not data.eval and data.train != ARITHMETIC:
        raise ConfigError(
            f"data.eval is empty, and only the run knows the part of {data.train} it holds out; give a set of its own"
        )
    return DataSet(
        name="held-out",
        source=source,
        subset=data.subset,
        split=data.eval_split,
        question_field=data.question_field,
        answer_field=data.answer_field,
        answer_after=data.answer_after,
        prompt=data.prompt or ("" if default_prompt(source) == asked else asked),
        max_prompt_tokens=data.max_prompt_tokens,
        limit=run.eval.problems,
    )


def _is_run(folder: Path) -> bool:
    return (folder / "final" / "config.json").is_file()


def _data_set(name: str) -> dict[str, Any]:
    return {"name": name, **PRESETS[name]} if name in PRESETS else {"source": name}
