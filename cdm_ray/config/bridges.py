"""Configuration of diffusion bridges (`jobs/train_bridge.py`).

Mathematics and names: arXiv 2512.05070, and `cdm_ray/objectives/bridge.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

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

Vector = Annotated[tuple[float, ...], Field(min_length=1)]

PARAMETERS: dict[str, dict[str, Any]] = {
    "brownian": {"sigma": 1.0},
    "ou": {"sigma": 1.0, "rate": 1.0, "mean": (0.0,)},
    "double-well": {"sigma": 1.0, "height": 3.0, "well": 1.0},
    "cell": {"sigma": 0.1},
    "mueller-brown": {"sigma": 3.0},
    "cir": {"rate": 1.0, "mean": (2.0,), "volatility": 1.0},
    "user": {"sigma": 1.0, "drift": None},
}
"""Parameters of each kind of process with their defaults."""


class SigmaSchedule(Section):
    times: Vector
    """Increasing times."""
    values: Vector
    """sigma at these times; linear in between, constant before and after."""


class ProcessConfig(Section):
    kind: Literal["brownian", "ou", "double-well", "cell", "mueller-brown", "cir", "user"] = (
        "double-well"
    )
    """Reference process dX = b(X) dt + sigma dB."""
    sigma: Positive | SigmaSchedule | None = None
    """Diffusion coefficient, a number or {times: [...], values: [...]}; None: the default of the
    process. cir has none: its sigma depends on the state (`process.volatility`)."""
    rate: float | None = None
    """ou: b = -rate (x - mean); cir: dX = rate (mean - X) dt + volatility sqrt(X) dB."""
    mean: Vector | None = None
    """ou: one number or one for each dimension; cir: one number."""
    volatility: Positive | None = None
    """cir: see `process.rate`."""
    height: Positive | None = None
    """double-well: U = height (x^2 - well^2)^2."""
    well: Positive | None = None
    """double-well: distance of the minima from 0."""
    drift: str | None = None
    """user: the drift b as module:function, from states [N, d] to [N, d]."""

    @model_validator(mode="after")
    def _only_its_own(self) -> Self:
        own = PARAMETERS[self.kind]
        for name in type(self).model_fields:
            if name != "kind" and name not in own and getattr(self, name) is not None:
                raise ValueError(
                    f"process.{name} is no parameter of process.kind={self.kind}, which has "
                    f"{', '.join(own)}; leave it out"
                )
        if self.kind == "user" and self.drift is None:
            raise ValueError("process.kind=user needs process.drift=module:function")
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters of this kind of process, defaults filled in."""
        own = PARAMETERS[self.kind]
        given = {name: getattr(self, name) for name in own}
        return {name: own[name] if value is None else value for name, value in given.items()}


class BridgeProblemConfig(Section):
    start: Vector = (1.0,)
    """State at time 0, one number for each dimension."""
    end: Vector = (-1.0,)
    """State at time `bridge.duration`."""
    duration: Positive = 1.0
    """Time from start to end."""


class ControlNetworkConfig(Section):
    width: Annotated[int, Field(ge=1)] = 64
    """Units of a hidden layer."""
    depth: Annotated[int, Field(ge=1)] = 2
    """Hidden layers."""
    form: Literal["auto", "gradient", "free"] = "auto"
    """gradient: the learned field is the gradient of a scalar, as the true score is; free: any
    field; auto: free in one dimension, else gradient."""
    guide: Literal["brownian", "none"] = "brownian"
    """What the learned part is added to: brownian is the drift (end - x) / (T - t)."""
    drift_coefficient: Annotated[float, Field(ge=0, le=1)] | None = None
    """Share of the process's own drift in the parametrised drift; None: 0 in one dimension, else
    1, with which the score is a gradient even if the drift is not."""
    coefficient: Literal["one", "sqrt"] = "one"
    """Factor of the learned part: 1 or sqrt(T - t)."""
    location: Vector | None = None
    """The network sees (x - location) / scale; None: the middle between start and end."""
    scale: Annotated[tuple[Positive, ...], Field(min_length=1)] = (1.0,)
    """One number or one for each dimension."""


class ControlConfig(Section):
    consistency: Literal["sc2", "sc1", "auxiliary"] = "sc2"
    """Auxiliary drift f of the identity: sc2 none, sc1 the process's own, auxiliary that of
    `control.auxiliary`. sc1 is for short windows or contracting drifts: over a barrier it is
    carried by events that are never sampled."""
    auxiliary: str | None = None
    """consistency=auxiliary: the drift f as module:function."""
    weighting: Literal["inclusive", "average", "sqrt", "geom", "next", "endpoint", "window"] = (
        "geom"
    )
    """How the targets along a path are mixed; endpoint is adjoint matching."""
    decay: Annotated[float, Field(ge=0, le=1)] = 0.9
    """weighting=geom: weight of later targets per step; they look 1 / (1 - decay) steps ahead."""
    window: Annotated[int, Field(ge=1)] = 20
    """weighting=window: steps."""
    variate: Literal["none", "noise", "innovation"] = "noise"
    """Control variate: noise subtracts what the noise of each step adds to the target;
    innovation does so on replayed paths too; none costs less per iteration."""


class AnnealConfig(Section):
    drift: Literal["off", "linear", "sine"] = "off"
    """The process's drift grows from 0 to its own."""
    sigma: Annotated[float, Field(ge=1)] = 1.0
    """sigma falls linearly from this many times its own; 1: off."""
    tolerance: NonNegative = 0.0
    """The end is known up to this standard deviation at first, which falls geometrically to
    `anneal.last_tolerance` and is 0 after the anneal; 0: off."""
    last_tolerance: Positive = 1e-4
    """Where the tolerance ends."""
    share: Fraction = 0.5
    """Share of the iterations that the anneals take."""


class SimulationConfig(Section):
    steps: Annotated[int, Field(ge=3)] = 100
    """Time steps of a path."""
    paths: PositiveCount = 64
    """Paths of an iteration over all workers."""
    lanes: PowerOfTwo = 8
    """Parts of the paths with their own random numbers; a power of two. The result of a run
    depends on it, and not on the number of workers, which may be at most this."""
    scheme: Literal["guided", "euler"] = "guided"
    """guided: exact for the guide to the end, of second order for the rest; euler: Euler-Maruyama.
    Both call the network once a step."""
    replay: Count = 0
    """Earlier rollouts that an iteration's paths are drawn from, besides its own."""


class BridgeTrainConfig(TrainConfig):
    iterations: PositiveCount = 1200
    """Iterations: paths by the averaged weights, their targets, optimizer steps."""
    inner_steps: Annotated[int, Field(ge=1)] = 4
    """Optimizer steps of an iteration."""
    pairs: PositiveCount | None = 2048
    """Random (path, time) pairs of an optimizer step, over all workers; None: all of them."""
    log_every: Annotated[int, Field(ge=1)] = 200
    """Steps between two records of loss, speed and gradient norm."""
    precision: Literal["fp32"] = "fp32"
    """Control networks are too small for less."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed shards: nothing, optimizer state, + gradients, + weights."""


class BridgeOptimizerConfig(OptimizerConfig):
    lr: Positive = 1e-2
    """Largest learning rate of Adam."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: from `optimizer.lr` to 0 over the run."""
    clip_norm: Positive | None = 1.0
    """Largest global gradient norm; None: no clipping."""


class BridgeEMAConfig(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99
    """Decay per step of the weight average, which simulates, makes the targets, and is what is
    evaluated; 0: the weights themselves."""


class BridgeCheckpointConfig(CheckpointConfig):
    every_iterations: PositiveCount = 300
    """Iterations between two checkpoints; one more is written at the end."""


class GridConfig(Section):
    lower: Vector
    """Lower corner of the box that the backward equation is solved in."""
    upper: Vector
    """Upper corner."""
    points: Annotated[tuple[Annotated[int, Field(ge=3)], ...], Field(min_length=1)]
    """Nodes of each axis, odd."""
    steps: Annotated[int, Field(ge=2)]
    """Time steps, a multiple of twice the slices."""
    slices: Annotated[int, Field(ge=1)] = 100
    """Times at which the solution is kept."""
    substeps: Annotated[int, Field(ge=1)] = 1
    """Steps of the drift within a time step of the second scheme."""


class BridgeEvalConfig(Section):
    paths: Annotated[Count, Field(ge=2)] = 1024
    """Paths behind every number, of the model and of the truth each."""
    steps: Annotated[int, Field(ge=3)] = 1000
    """Time steps of these paths."""
    course_paths: Annotated[Count, Field(ge=2)] = 256
    """Paths behind the numbers of evaluations during training."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of their noise."""
    every_iterations: PositiveCount | None = 300
    """Iterations between two evaluations during training, which does not wait for them; None: only
    at the end."""
    grid: GridConfig | None = None
    """Grid for the truth of a process of 1 or 2 dimensions that has no closed form; None: without
    truth where there is none."""
    format: Literal["npz", "parquet"] = "npz"
    """What `jobs/sample.py` writes paths as: npz, arrays; parquet, a table with a row for each path
    and step, for which pyarrow has to be installed."""


class BridgeConfig(JobConfig):
    """Configuration of a diffusion bridge (`jobs/train_bridge.py`)."""

    JOB: ClassVar[str] = "jobs/train_bridge.py"
    RECIPES: ClassVar[str] = "bridges"
    NOT_LEARNED: ClassVar[tuple[str, ...]] = (
        "ray.",
        "tracking.",
        "checkpoint.",
        "eval.",
        "run.storage",
        "train.zero_stage",
        "train.log_every",
    )
    LENGTH: ClassVar[str] = "train.iterations"
    CHANGEABLE: ClassVar[tuple[str, ...]] = ("optimizer.lr", "control.", "ema.")

    process: ProcessConfig = ProcessConfig()
    bridge: BridgeProblemConfig = BridgeProblemConfig()
    network: ControlNetworkConfig = ControlNetworkConfig()
    control: ControlConfig = ControlConfig()
    anneal: AnnealConfig = AnnealConfig()
    simulation: SimulationConfig = SimulationConfig()
    train: BridgeTrainConfig = BridgeTrainConfig()
    optimizer: BridgeOptimizerConfig = BridgeOptimizerConfig()
    ema: BridgeEMAConfig = BridgeEMAConfig()
    checkpoint: BridgeCheckpointConfig = BridgeCheckpointConfig()
    eval: BridgeEvalConfig = BridgeEvalConfig()

    @property
    def dim(self) -> int:
        """Dimension of the states."""
        return len(self.bridge.start)

    @property
    def pairs(self) -> int:
        """(path, time) pairs of an optimizer step over all workers."""
        return self.train.pairs or self.simulation.paths * self.simulation.steps

    @property
    def lane_paths(self) -> int:
        """Paths of one lane."""
        return self.simulation.paths // self.simulation.lanes

    @property
    def lane_pairs(self) -> int:
        """Pairs of one lane in an optimizer step."""
        return self.pairs // self.simulation.lanes

    @property
    def steps(self) -> int:
        return self.first_step(self.train.iterations)

    def first_step(self, count: int) -> int:
        return count * self.train.inner_steps

    def count_at(self, step: int) -> int:
        return step // self.train.inner_steps

    @property
    def checkpoint_steps(self) -> int:
        return self.checkpoint.every_iterations * self.train.inner_steps

    @property
    def length_field(self) -> str | None:
        fixed = self.optimizer.schedule == "constant" and self.anneal == AnnealConfig()
        return self.LENGTH if fixed else None

    @property
    def evaluation_steps(self) -> range:
        if self.eval.every_iterations is None:
            return range(0)
        every = self.eval.every_iterations * self.train.inner_steps
        return range(every, self.steps, every)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_dimensions()
        self._check_split()
        control = self.control
        if (control.consistency == "auxiliary") != (control.auxiliary is not None):
            raise ValueError(
                "control.consistency=auxiliary and control.auxiliary=module:function go together; "
                f"given: {control.consistency} and {control.auxiliary}"
            )
        if self.simulation.replay and control.variate == "noise":
            raise ValueError(
                "simulation.replay and control.variate=noise: the paths of other weights need "
                "control.variate=innovation (or none, with a bias)"
            )
        if self.simulation.replay and self.anneal.sigma != 1:
            raise ValueError(
                "simulation.replay and anneal.sigma: paths of another sigma teach another bridge; "
                "use one of the two"
            )
        if self.network.guide == "none":
            if self.anneal.tolerance:
                raise ValueError(
                    "anneal.tolerance softens the guide; with network.guide=none there is none: "
                    "set anneal.tolerance=0"
                )
            if self.simulation.scheme == "guided":
                raise ValueError(
                    "simulation.scheme=guided steps along the guide; with network.guide=none set "
                    "simulation.scheme=euler"
                )
        self._check_schedule()
        return self

    def _check_dimensions(self) -> None:
        dim, kind = self.dim, self.process.kind
        fixed = {"double-well": 1, "cir": 1, "cell": 2, "mueller-brown": 2}.get(kind)
        if fixed is not None and dim != fixed:
            raise ValueError(
                f"bridge.start={list(self.bridge.start)}: process.kind={kind} has {fixed} "
                f"dimension{'s' if fixed > 1 else ''}"
            )
        vectors = {"bridge.end": (self.bridge.end, False)}
        vectors["network.scale"] = (self.network.scale, True)
        if self.network.location is not None:
            vectors["network.location"] = (self.network.location, True)
        if self.process.mean is not None:
            vectors["process.mean"] = (self.process.mean, True)
        if (grid := self.eval.grid) is not None:
            for name in ("lower", "upper", "points"):
                vectors[f"eval.grid.{name}"] = (getattr(grid, name), False)
        for name, (value, one_will_do) in vectors.items():
            if len(value) != dim and not (one_will_do and len(value) == 1):
                raise ValueError(
                    f"{name}={list(value)} has {len(value)} numbers, bridge.start {dim}; give "
                    f"{'1 or ' if one_will_do else ''}{dim}"
                )

    def _check_split(self) -> None:
        lanes = self.simulation.lanes
        for name, value in (
            ("simulation.paths", self.simulation.paths),
            ("train.pairs", self.train.pairs),
        ):
            if value is not None and value % lanes:
                raise ValueError(
                    f"{name}={value} is not divisible by simulation.lanes={lanes}; use a multiple "
                    f"of {lanes}, or fewer lanes"
                )
        if self.ray.workers > lanes:
            raise ValueError(
                f"ray.workers={self.ray.workers} is more than simulation.lanes={lanes}; use at "
                f"most {lanes} workers, or more lanes"
            )
