"""Configuration of image diffusion runs (`jobs/train_cp.py`).

Every value that changes what is computed is a field, its docstring is its help text, and a
combination that cannot work is refused here, before any worker starts.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cdm_ray.config.base import (
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveCount,
    PowerOfTwo,
    Section,
)
from cdm_ray.config.common import (
    CheckpointConfig,
    JobConfig,
    OptimizerConfig,
    TrainConfig,
)
from cdm_ray.errors import ConfigError
from cdm_ray.storage import absolute

AUGMENT_DIM = 9
"""Labels that EDM's augmentation pipe gives an image."""


class DataConfig(Section):
    path: str = "data"
    """Folder or fsspec URL with the shards and their manifest.json."""
    source: str | None = None
    """What to pack into shards when `data.path` holds none: `digits`, a folder of images (class
    folders become labels), an EDM-style zip, an FFHQ or AFHQ folder, or CIFAR-10's python
    archive."""
    resolution: Annotated[int, Field(ge=1)] = 32
    """Images are centre-cropped and resized to this many pixels, squared."""
    channels: Literal[1, 3] = 3
    """1 for greyscale, 3 for RGB."""
    samples_per_shard: PositiveCount = 1000
    """Images in one shard when packing."""
    lanes: PowerOfTwo = 16
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


class NetworkConfig(Section):
    architecture: Literal["ddpmpp", "ncsnpp", "adm"] = "ddpmpp"
    """DDPM++ or NCSN++ (Song et al. 2021) as configured by EDM, or ADM (Dhariwal & Nichol 2021)."""
    init: str | None = None
    """Weights to start from: EDM's .pkl, a .safetensors file, or a checkpoint folder of a run."""
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
    activation_checkpointing: bool = False
    """Compute each block's activations again in the backward pass: less memory, about a third more
    time."""


class AugmentConfig(Section):
    p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability of each transformation of EDM's augmentation pipe; above 0 the network is also
    told what was done, and images are mirrored in half of the cases."""


class DSMConfig(Section):
    p_mean: float = -1.2
    """Mean of ln sigma during training (EDM, table 1)."""
    p_std: Positive = 1.2
    """Standard deviation of ln sigma during training (EDM, table 1)."""
    input_perturbation: NonNegative = 0.0
    """Train on noise that is sqrt(1 + gamma^2) times stronger than the network is told (Ning et al.
    2023, input perturbation; they use gamma 0.1 to 0.15); 0: off."""


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
    image against 3 without CP, with one step and `reuse_d0`. Those images have no dropout, unless
    `dropout` is set."""
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
    dropout: bool = False
    """Keep dropout in every pass of the loss (released code): its variance then enters the
    value."""
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


class SamplerConfig(Section):
    kind: Literal["ode", "sde"] = "ode"
    """What `jobs/sample.py` runs; an evaluation runs both."""
    ode_solver: Literal["euler", "heun", "dpmpp_2m", "dpmpp_3m"] = "heun"
    """Solver of the probability-flow ODE: heun evaluates the network twice per step (EDM), the
    others once."""
    ode_steps: Annotated[int, Field(ge=2)] = 18
    """Steps of the ODE solver, that to 0 included."""
    sde_solver: Literal["ancestral", "euler_maruyama", "churn"] = "ancestral"
    """Solver of the reverse SDE; churn is EDM's stochastic sampler, two evaluations per step."""
    sde_steps: Annotated[int, Field(ge=2)] = 100
    """Steps of the SDE solver, that to 0 included."""
    sigma_min: Positive = 0.002
    """Last noise level before 0 (EDM, table 1)."""
    sigma_max: Positive = 80.0
    """First noise level."""
    rho: Positive = 7.0
    """Exponent of the spacing of the noise levels."""
    churn: NonNegative = 40.0
    """S_churn of sde_solver=churn: how much noise is added and taken away again, over all steps."""
    churn_min: NonNegative = 0.05
    """S_min: no churn below this noise level."""
    churn_max: Positive = 50.0
    """S_max: no churn above this noise level."""
    churn_noise: Positive = 1.003
    """S_noise: scale of the noise that churn adds."""
    epsilon_scale: Positive = 1.0
    """The predicted noise is divided by this at every evaluation (epsilon scaling, Ning et al.
    2024, who use 1.0005 to 1.005); 1: off."""


class EvalConfig(Section):
    images: Annotated[Count, Field(ge=2)] = 50_000
    """Generated images behind each Fréchet distance."""
    first_seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    """One evaluation for each: its image i is made from seed first_seed + i, whatever the batch
    size and number of workers. EDM reports the minimum over [0, 50000, 100000]."""
    batch: PositiveCount = 256
    """Images generated at once."""
    every_kimg: Positive | None = None
    """Thousands of training images between two evaluations during training, which does not wait
    for them; None: only at the end."""
    extractor: Literal["digits", "inception"] = "inception"
    """Feature network of the Fréchet distance; only `inception` is called fid."""
    extractor_file: str | None = None
    """TorchScript Inception file, for `inception`."""
    reference: str | None = None
    """EDM-format npz (mu, sigma) to measure the Fréchet distance from; None: the data set's own
    statistics."""
    kid_subset: Annotated[Count, Field(ge=2)] = 1000
    """Images in each of the subsets whose mean is the kernel inception distance."""
    kid_subsets: PositiveCount = 100
    """Subsets of the kernel inception distance."""
    pr_images: Annotated[Count, Field(ge=2)] = 10_000
    """Most generated and most real images behind precision and recall."""
    grid: PositiveCount = 64
    """Images in the sample grid."""
    drift_images: Annotated[Count, Field(ge=2)] = 512
    """Images behind each point of the drift curves."""
    drift_sigmas: Annotated[int, Field(ge=2)] = 8
    """Noise levels of the drift curves."""


class ImageTrainConfig(TrainConfig):
    images: PositiveCount = 200_000_000
    """Training images until the end, repeats counted."""
    batch: PositiveCount = 256
    """Global batch over all workers."""
    micro_batch: PositiveCount | None = None
    """Most images that a worker puts through the network at once; None: its whole share."""


class ImageOptimizerConfig(OptimizerConfig):
    rampup_images: Count = 10_000_000
    """The learning rate grows linearly from 0 over this many images."""


class EMAConfig(Section):
    halflife_images: PositiveCount = 500_000
    """Half-life of the weight average in images."""
    rampup_ratio: NonNegative = 0.05
    """The half-life is at most this share of the images seen so far."""


class ImageCheckpointConfig(CheckpointConfig):
    every_images: PositiveCount = 1_000_000
    """Training images between two checkpoints; one more is written at the end."""


class ImageConfig(JobConfig):
    """Configuration of an image diffusion run (`jobs/train_cp.py`)."""

    JOB: ClassVar[str] = "jobs/train_cp.py"
    RECIPES: ClassVar[str] = ""
    NOT_LEARNED: ClassVar[tuple[str, ...]] = (
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
        "network.activation_checkpointing",
    )
    LENGTH: ClassVar[str] = "train.images"
    CHANGEABLE: ClassVar[tuple[str, ...]] = ("optimizer.lr", "cp.", "dsm.", "ema.")

    data: DataConfig = DataConfig()
    network: NetworkConfig = NetworkConfig()
    augment: AugmentConfig = AugmentConfig()
    dsm: DSMConfig = DSMConfig()
    cp: CPConfig = CPConfig()
    train: ImageTrainConfig = ImageTrainConfig()
    optimizer: ImageOptimizerConfig = ImageOptimizerConfig()
    ema: EMAConfig = EMAConfig()
    checkpoint: ImageCheckpointConfig = ImageCheckpointConfig()
    sampler: SamplerConfig = SamplerConfig()
    eval: EvalConfig = EvalConfig()

    @property
    def lane_batch(self) -> int:
        """Images of one lane in one step."""
        return self.train.batch // self.data.lanes

    @property
    def steps(self) -> int:
        return self.first_step(self.train.images)

    def first_step(self, count: int) -> int:
        return math.ceil(count / self.train.batch)

    def count_at(self, step: int) -> int:
        return step * self.train.batch

    @property
    def checkpoint_steps(self) -> int:
        return max(1, round(self.checkpoint.every_images / self.train.batch))

    @property
    def length_field(self) -> str | None:
        return self.LENGTH

    @property
    def evaluation_steps(self) -> range:
        if self.eval.every_kimg is None:
            return range(0)
        every = max(1, round(self.eval.every_kimg * 1000 / self.train.batch))
        return range(every, self.steps, every)

    @property
    def augment_dim(self) -> int:
        """Width of the augmentation labels that the network takes."""
        return AUGMENT_DIM if self.augment.p > 0 else 0

    def without_cp(self) -> Self:
        """The same with denoising score matching alone."""
        values = self.model_dump()
        values["cp"]["weight"] = 0.0
        changes = [
            (change.after, {k: v for k, v in change.set.items() if not k.startswith("cp.")})
            for change in self.schedule
        ]
        values["schedule"] = [{"after": after, "set": kept} for after, kept in changes if kept]
        return type(self).model_validate(values)

    def resolved(self) -> Self:
        values = super().resolved().model_dump()
        values["data"]["path"] = absolute(self.data.path)
        for section, key in (
            ("network", "init"),
            ("eval", "extractor_file"),
            ("eval", "reference"),
        ):
            if values[section][key] is not None:
                values[section][key] = absolute(values[section][key])
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
        self._check_schedule()
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

    def _check_schedule(self) -> None:
        super()._check_schedule()
        for index, change in enumerate(self.schedule):
            weight = change.set.get("cp.weight", self.cp.weight)
            if (weight == 0) != (self.cp.weight == 0):
                raise ConfigError(
                    f"schedule.{index}: cp.weight={weight:g} and at first {self.cp.weight:g}: CP "
                    "cannot be turned on or off on the way; use a small weight instead of 0"
                )
