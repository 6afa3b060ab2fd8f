"""Typed run configuration: pydantic models, YAML recipes and `section.field=value` overrides.

A configuration is the only input of a run besides the data: every value that changes what is
computed is a field here, its docstring is its help text, and a combination that cannot work is
refused here, before any worker starts.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)


class ConfigError(ValueError):
    """A mistake of the user's: one line that names the key or file and what would be right."""


class RunFailed(RuntimeError):
    """A run that cannot go on through no mistake of the command's, and that a restart from the
    checkpoint would only bring to the same end; one line that says why and what to do."""


_COUNT_UNITS = {"": 1, "k": 10**3, "M": 10**6}


def parse_count(value: Any) -> Any:
    """`50k` -> 50000, `200M` -> 200000000, `1.5k` -> 1500; anything else is left to pydantic."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a count; write a number such as 50000, 50k or 200M")
    if isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kM]?)\s*", value)
        if match is None:
            raise ValueError(f"'{value}' is not a count; write a number such as 50000, 50k or 200M")
        number = float(match[1]) * _COUNT_UNITS[match[2]]
        if number != int(number):
            raise ValueError(f"'{value}' is not a whole number")
        return int(number)
    return value


Count = Annotated[int, BeforeValidator(parse_count), Field(ge=0)]
PositiveCount = Annotated[int, BeforeValidator(parse_count), Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of all sections: unknown keys refused, immutable, docstrings are help texts."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        validate_default=True,
        allow_inf_nan=False,
    )


class RunConfig(Section):
    name: str | None = None
    """Name of the run and of its folder; by default the recipe and a digest of the configuration,
    so that the same command continues the same run."""
    storage: str = "runs"
    """Folder that holds the run folders and the default MLflow database; shared by all nodes."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of everything random: weights, data order, noise."""

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(f"'{name}' is no folder name; use letters, digits, '.', '_' and '-'")
        return name


class DataConfig(Section):
    path: str = "data"
    """Folder or fsspec URL with the shards and their manifest.json."""
    source: str | None = None
    """What to pack into shards when `data.path` holds none: `digits`, a folder of images (class
    folders become labels), an EDM-style zip, or an FFHQ or AFHQ folder."""
    resolution: Annotated[int, Field(ge=1)] = 32
    """Images are centre-cropped and resized to this many pixels, squared."""
    channels: Literal[1, 3] = 3
    """1 for greyscale, 3 for RGB."""
    samples_per_shard: PositiveCount = 1000
    """Images in one shard when packing."""
    lanes: Annotated[int, Field(ge=1)] = 16
    """Parts of the global batch with their own data order and random numbers; a power of two. The
    result of a run depends on it, and not on the number of workers, which may be at most this."""
    decode_threads: Annotated[int, Field(ge=1)] = 1
    """Background threads of each worker that decode images, and as many that fetch shards; more
    than one only pays for large images."""
    prefetch: Annotated[int, Field(ge=1)] = 4
    """Batches decoded ahead of the training step."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)] = 0.001
    """Damaged images are skipped and logged up to this share of those read; beyond it the run
    fails."""

    @field_validator("lanes")
    @classmethod
    def _power_of_two(cls, lanes: int) -> int:
        if lanes & (lanes - 1):
            raise ValueError(f"{lanes} is not a power of two; use 1, 2, 4, 8, 16, ...")
        return lanes


class NetworkConfig(Section):
    architecture: Literal["ddpmpp"] = "ddpmpp"
    """DDPM++ (Song et al. 2021, as configured by EDM)."""
    model_channels: Annotated[int, Field(ge=4, multiple_of=4)] = 128
    """Channels of the first level."""
    channel_mult: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] = (
        2,
        2,
        2,
    )
    """Channels of each level as multiples of `model_channels`; each further level halves the
    resolution."""
    num_blocks: Annotated[int, Field(ge=1)] = 4
    """Residual blocks per level."""
    attn_resolutions: tuple[int, ...] = (16,)
    """Resolutions with self-attention."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability inside the residual blocks."""
    class_conditional: bool = False
    """Train p(x | label); the shards must carry labels."""
    sigma_data: Positive = 0.5
    """Standard deviation of the data that the preconditioning assumes (EDM, table 1)."""


class DSMConfig(Section):
    p_mean: float = -1.2
    """Mean of ln sigma during training (EDM, table 1)."""
    p_std: Positive = 1.2
    """Standard deviation of ln sigma during training (EDM, table 1)."""


class CPConfig(Section):
    weight: NonNegative = 0.0
    """Weight of the Consistency Property loss; 0 trains with denoising score matching alone."""
    warmup_images: Count = 0
    """The weight grows linearly from 0 over this many images."""
    window: Positive = 0.25
    """Largest step down in sigma, drawn uniformly from (0, window]: a share of sigma or, with
    `window_kind=absolute`, a difference."""
    window_kind: Literal["relative", "absolute"] = "relative"
    """Whether `window` is a share of sigma or a difference in sigma (released code: 0.05)."""
    rollout_steps: Annotated[int, Field(ge=1)] = 1
    """Reverse SDE steps from sigma to sigma' (released code: 5)."""
    step_kind: Literal["ancestral", "euler_maruyama"] = "ancestral"
    """Reverse SDE step (released code: euler_maruyama)."""
    fraction: Fraction = 0.25
    """Share of each lane's images that takes part; the cost is 3 + 6 * fraction forward passes per
    image against 3 without CP, with one step and `reuse_d0`. Those images have no dropout."""
    estimator: Literal["product", "regress"] = "product"
    """`product`: (D1 - D0).(D2 - D0) over two rollouts, an unbiased value. `regress`: one rollout
    as a fixed target of D0, an unbiased gradient only."""
    gradient: Literal["low", "high", "both"] = "low"
    """Side that learns: the low-noise ends (D0 detached; carries the truth down), the high-noise
    start (ends detached), or both (released code)."""
    sigma_weight: Literal["none", "edm"] = "none"
    """Weight over sigma: none (released code) or the w(sigma) of denoising score matching."""
    reuse_d0: bool = True
    """Use D0 as the first rollout step instead of evaluating it again (released code: false)."""
    rollout_weights: Literal["live", "ema"] = "live"
    """Weights that drive the rollouts."""
    sigma_min: Positive = 0.002
    """Lowest sigma' of a pair."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.window_kind == "relative" and self.window > 1:
            raise ValueError(
                f"cp.window={self.window} as a share of sigma must be at most 1; "
                "or set cp.window_kind=absolute"
            )
        if self.estimator == "regress" and self.gradient != "high":
            raise ValueError(
                "cp.estimator=regress trains the high-noise start only: set cp.gradient=high "
                f"(given: {self.gradient})"
            )
        if self.rollout_weights == "ema" and self.reuse_d0:
            raise ValueError(
                "cp.rollout_weights=ema needs cp.reuse_d0=false: "
                "the first rollout step would otherwise be D0 of the live weights"
            )
        return self


class TrainConfig(Section):
    images: PositiveCount = 200_000_000
    """Training images until the end, repeats counted."""
    batch: PositiveCount = 256
    """Global batch over all workers."""
    micro_batch: PositiveCount | None = None
    """Most images that a worker puts through the network at once; None: its whole share."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 on GPUs, fp32 on CPUs. Master weights are fp32 always."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: nothing, optimizer state, + gradients, + weights."""
    log_every: Annotated[int, Field(ge=1)] = 50
    """Steps between two records of loss, speed and gradient norm."""
    max_nonfinite_in_row: Annotated[int, Field(ge=1)] = 50
    """Steps with non-finite gradients are skipped and counted; this many in a row stop the run."""


class OptimizerConfig(Section):
    lr: Positive = 1e-3
    """Adam learning rate after the ramp."""
    rampup_images: Count = 10_000_000
    """The learning rate grows linearly from 0 over this many images."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )
    """Adam moment decays."""
    eps: Positive = 1e-8
    """Adam denominator offset."""
    clip_norm: Positive | None = None
    """Largest global gradient norm; None: no clipping, as in EDM."""


class EMAConfig(Section):
    halflife_images: PositiveCount = 500_000
    """Half-life of the weight average in images."""
    rampup_ratio: NonNegative = 0.05
    """The half-life is at most this share of the images seen so far."""


class CheckpointConfig(Section):
    every_images: PositiveCount = 1_000_000
    """Training images between two checkpoints; one more is written at the end."""
    keep_last: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints that are kept."""


class SamplerConfig(Section):
    ode_steps: Annotated[int, Field(ge=2)] = 18
    """Heun steps of the probability-flow ODE: 2 * steps - 1 network evaluations."""
    sde_steps: Annotated[int, Field(ge=2)] = 100
    """Steps of the reverse SDE: as many network evaluations."""
    sde_step: Literal["ancestral", "euler_maruyama"] = "ancestral"
    """Reverse SDE step."""
    sigma_min: Positive = 0.002
    """Last noise level before 0 (EDM, table 1)."""
    sigma_max: Positive = 80.0
    """First noise level."""
    rho: Positive = 7.0
    """Exponent of the spacing of the noise levels."""


class EvalConfig(Section):
    images: Annotated[Count, Field(ge=2)] = 50_000
    """Generated images behind each Fréchet distance."""
    first_seed: Annotated[int, Field(ge=0)] = 0
    """Image i is made from seed first_seed + i, whatever the batch size and number of workers."""
    batch: PositiveCount = 256
    """Images generated at once."""
    extractor: Literal["digits", "inception"] = "inception"
    """Feature network of the Fréchet distance; only `inception` is called fid."""
    extractor_file: str | None = None
    """TorchScript Inception file, for `inception`."""
    grid: PositiveCount = 64
    """Images in the sample grid."""
    drift_images: Annotated[Count, Field(ge=2)] = 512
    """Images behind each point of the drift curves."""
    drift_sigmas: Annotated[int, Field(ge=2)] = 8
    """Noise levels of the drift curves."""


class RayConfig(Section):
    workers: Annotated[int, Field(ge=1)] = 2
    """Training workers."""
    address: str | None = None
    """Ray cluster to join; None: that of RAY_ADDRESS, else a local one that ends with the job."""
    use_gpu: bool | Literal["auto"] = "auto"
    """One GPU per worker; auto: if the cluster has any."""
    cpus_per_worker: Positive = 1
    """CPUs reserved for each worker."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the newest checkpoint after a worker or node is lost."""


class TrackingConfig(Section):
    uri: str | None = None
    """MLflow tracking server; None: MLFLOW_TRACKING_URI, else sqlite in `run.storage`."""
    experiment: str = "cdm_ray"
    """MLflow experiment."""


NOT_LEARNED = (
    "ray.",
    "tracking.",
    "checkpoint.",
    "eval.",
    "sampler.",
    "run.storage",
    "data.path",
    "data.source",
    "data.decode_threads",
    "data.prefetch",
    "train.micro_batch",
    "train.zero_stage",
    "train.log_every",
)
"""Sections and fields that change how a run is carried out or judged, not what it learns: they are
no part of its identity, and may differ when a run is continued."""


class ImageConfig(Section):
    """Configuration of an image diffusion run (`jobs/train_cp.py`)."""

    recipe: str = "custom"
    """Name of the recipe that the run started from."""
    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    dsm: DSMConfig = DSMConfig()
    cp: CPConfig = CPConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sampler: SamplerConfig = SamplerConfig()
    eval: EvalConfig = EvalConfig()
    ray: RayConfig = RayConfig()
    tracking: TrackingConfig = TrackingConfig()

    @property
    def lane_batch(self) -> int:
        """Images of one lane in one step."""
        return self.train.batch // self.data.lanes

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return math.ceil(self.train.images / self.train.batch)

    @property
    def run_name(self) -> str:
        """`run.name`, or the recipe and a digest of everything that changes the result."""
        if self.run.name is not None:
            return self.run.name
        identity = {k: v for k, v in flatten(self).items() if not k.startswith(NOT_LEARNED)}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return f"{self.recipe}-{digest[:8]}"

    @property
    def run_folder(self) -> Path:
        """Folder of this run, absolute."""
        return Path(self.run.storage).absolute() / self.run_name

    def resolved(self) -> Self:
        """The same with the run's name fixed and every local path absolute, so that a worker with
        another working directory reads it alike."""
        values = self.model_dump()
        values["run"] |= {"name": self.run_name, "storage": _absolute(self.run.storage)}
        values["data"]["path"] = _absolute(self.data.path)
        if self.eval.extractor_file is not None:
            values["eval"]["extractor_file"] = _absolute(self.eval.extractor_file)
        return type(self).model_validate(values)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        lanes, batch = self.data.lanes, self.train.batch
        if batch % lanes:
            raise ValueError(
                f"train.batch={batch} is not divisible by data.lanes={lanes}; "
                f"use a multiple of {lanes}, or fewer lanes"
            )
        if self.ray.workers > lanes:
            raise ValueError(
                f"ray.workers={self.ray.workers} is more than data.lanes={lanes}; "
                f"use at most {lanes} workers, or more lanes"
            )
        micro = self.train.micro_batch
        if micro is not None and micro < self.lane_batch:
            raise ValueError(
                f"train.micro_batch={micro} is less than one lane's share of the batch, "
                f"train.batch/data.lanes={self.lane_batch}; use at least that, or more lanes"
            )
        if self.train.precision == "bf16" and self.train.zero_stage == 0:
            raise ValueError(
                "train.precision=bf16 needs train.zero_stage=1, 2 or 3 "
                "(stage 0 keeps no fp32 master weights)"
            )
        self._check_cp()
        levels = len(self.network.channel_mult)
        if self.data.resolution % 2 ** (levels - 1):
            raise ValueError(
                f"data.resolution={self.data.resolution} cannot be halved {levels - 1} times for "
                f"the {levels} levels of network.channel_mult; "
                f"use a multiple of {2 ** (levels - 1)}"
            )
        resolutions = [self.data.resolution >> level for level in range(levels)]
        if not set(self.network.attn_resolutions) <= set(resolutions):
            raise ValueError(
                f"network.attn_resolutions={list(self.network.attn_resolutions)}: the levels of "
                f"the network have the resolutions {resolutions}; use some of these, or []"
            )
        if self.sampler.sigma_min >= self.sampler.sigma_max:
            raise ValueError(
                f"sampler.sigma_min={self.sampler.sigma_min} must be below "
                f"sampler.sigma_max={self.sampler.sigma_max}"
            )
        if self.eval.extractor == "inception" and self.eval.extractor_file is None:
            raise ValueError(
                "eval.extractor=inception needs eval.extractor_file, "
                "the TorchScript Inception file (inception-2015-12-05.pt)"
            )
        if self.eval.extractor == "digits" and (self.data.resolution, self.data.channels) != (8, 1):
            raise ValueError(
                f"eval.extractor=digits is for 8x8 greyscale images, not {self.data.resolution}x"
                f"{self.data.resolution} with {self.data.channels} channels; "
                "use eval.extractor=inception"
            )
        return self

    def _check_cp(self) -> None:
        cp = self.cp
        if cp.weight == 0:
            return
        share = cp.fraction * self.lane_batch
        if abs(share - round(share)) > 1e-9:
            raise ValueError(
                f"cp.fraction={cp.fraction} of the {self.lane_batch} images that a lane has in "
                f"a batch is not whole; use a multiple of 1/{self.lane_batch}"
            )


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).absolute())


C = TypeVar("C", bound=Section)


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    folder = resources.files("cdm_ray.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(root: type[C], recipe: str | None, overrides: Sequence[str] = ()) -> C:
    """Recipe (a name of `recipe_names()`, a YAML file, or None for the defaults) with overrides.

    Raises ConfigError for an unknown recipe, unknown keys, wrong types and values that do not fit
    together.
    """
    values: dict[str, Any] = {}
    if recipe is not None:
        name, values = _read_recipe(recipe)
        values.setdefault("recipe", name)
    for override in overrides:
        _apply_override(values, override)
    return build_config(root, values)


def build_config(root: type[C], values: dict[str, Any]) -> C:
    """Validate nested values; the message of a ConfigError is one line per mistake."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        messages = [_explain(root, dict(entry)) for entry in error.errors()]
        raise ConfigError("; ".join(messages)) from None


def to_yaml(config: Section) -> str:
    """YAML text that `load_config` reads back to an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(config: Section) -> dict[str, Any]:
    """`section.field` -> plain value of every field."""
    flat: dict[str, Any] = {}
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            flat |= {f"{name}.{field}": inner for field, inner in value.items()}
        else:
            flat[name] = value
    return flat


def describe(root: type[Section], prefix: str = "") -> Iterable[tuple[str, str, str]]:
    """(key, default, help) of every field, for --help."""
    for name, field in root.model_fields.items():
        key = f"{prefix}{name}"
        if isinstance(field.default, Section):
            yield from describe(type(field.default), f"{key}.")
        else:
            default = json.dumps(field.default) if field.default is not None else "null"
            yield key, default, " ".join((field.description or "").split())


def _read_recipe(recipe: str) -> tuple[str, dict[str, Any]]:
    path = Path(recipe)
    if path.suffix in {".yaml", ".yml"}:
        if not path.is_file():
            raise ConfigError(f"recipe {recipe}: no such file")
        name, text = path.stem, path.read_text()
    else:
        names = recipe_names()
        if recipe not in names:
            near = difflib.get_close_matches(recipe, names, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"unknown recipe '{recipe}'; {hint}use one of {', '.join(names)}, or a .yaml file"
            )
        name = recipe
        text = resources.files("cdm_ray.recipes").joinpath(f"{recipe}.yaml").read_text()
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(
            f"recipe {recipe}: not valid YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {recipe}: must be a mapping of sections, not {values!r}")
    return name, values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"'{override}' is not an override; write section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"{key}: '{text}' is not a YAML value") from None
    *sections, field = key.split(".")
    node = values
    for depth, section in enumerate(sections):
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{key}: {'.'.join(sections[: depth + 1])} has no fields")
    node[field] = value


def _explain(root: type[Section], error: dict[str, Any]) -> str:
    """One line for one pydantic error: the key's full path, what is wrong, the nearest key."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest_key(root, location)}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return message if message.startswith(key) else f"{key}: {message}"
    section = next((p for p in root.model_fields if p == key), None)
    if section is not None and not isinstance(error["input"], dict):
        message = "is a section; set its fields, e.g. " + _example_field(root, section)
    return f"{key}={error['input']!r}: {message[0].lower()}{message[1:]}"


def _example_field(root: type[Section], section: str) -> str:
    default = root.model_fields[section].default
    if isinstance(default, Section):
        return f"{section}.{next(iter(type(default).model_fields))}=..."
    return f"{section}=..."


def _nearest_key(root: type[Section], location: list[str]) -> str:
    """The most similar key, looked for in the same section first, then everywhere."""
    known = [key for key, _, _ in describe(root)]
    same = [key for key in known if key.split(".")[:-1] == location[:-1]]
    sections = list(root.model_fields) if len(location) == 1 else []
    wanted = ".".join(location)
    near = (
        difflib.get_close_matches(wanted, same + sections, n=1, cutoff=0.7)
        or [key for key in known if key.split(".")[-1] == location[-1]]
        or difflib.get_close_matches(wanted, known, n=1, cutoff=0.5)
    )
    return f"; did you mean {near[0]}?" if near else f"; known here: {', '.join(sections or same)}"
