"""Ways to make the same training step, from the original loop to compiled CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu.draws import Tape
from benchmarks.gpu.graphs import Capture, GraphedDenoiser, cuda_capture
from benchmarks.gpu.settings import AUGMENT_DIM, DSM, OBJECTIVES, Sizes, new_network, section
from cdm_ray.networks.block import UNetBlock
from cdm_ray.objectives.base import ImageBatch
from cdm_ray.objectives.image import ImageObjective
from cdm_ray.randomness import BlockRng

Graph = Literal["no", "rollouts", "step"]
"""What is a CUDA graph: nothing; the network's calls without gradient, which also works where
another library runs the backward pass; or forward and backward pass together."""


@dataclass(frozen=True)
class Variant:
    """A network with its optimizer; steps of several batches and objectives share it."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    """Of the network. bf16 is as DeepSpeed does it: the weights that compute are bf16, Adam and the
    average work on float32 master weights, no autocast."""
    tf32: bool = False
    channels_last: bool = True
    compiled: Literal["no", "network", "blocks"] = "no"
    """torch.compile of the whole network, or of each block on its own (compiles faster)."""
    original: bool = False
    """The loop as EDM published it: Adam unfused, gradients and average in Python loops."""
    dropout: float = 0.0


ORIGINAL = Variant("original EDM loop, fp32", torch.float32, channels_last=False, original=True)
TF32 = Variant("eager, fp32/TF32", torch.float32, tf32=True)
EAGER = Variant("eager, bf16")
EAGER_NCHW = Variant("eager, bf16, not channels-last", channels_last=False)
COMPILED = Variant("compiled, bf16", compiled="network")
BLOCKS = Variant("compiled by blocks, bf16", compiled="blocks")


@contextlib.contextmanager
def matmul_precision(tf32: bool) -> Iterator[None]:
    """float32 matmuls and convolutions by TF32, or in full precision as in the original."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def initial_weights(sizes: Sizes) -> dict[str, Tensor]:
    """Weights as after some training: layers that begin at nearly zero, behind which every error
    would be hidden, get the size of the others."""
    torch.manual_seed(0)
    network = new_network(sizes)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.std() < 1e-3:
            torch.nn.init.xavier_uniform_(module.weight)
    return network.state_dict()


def network_with(weights: dict[str, Tensor], sizes: Sizes, **changes: Any) -> torch.nn.Module:
    """On the device of the weights, which it copies; without initialising it first."""
    with torch.device("meta"):
        network = new_network(sizes, **changes)
    network.to_empty(device=next(iter(weights.values())).device)
    network.load_state_dict(weights)
    return network


class Trainer:
    """A network, float32 master weights, Adam and the average of the weights."""

    def __init__(self, variant: Variant, sizes: Sizes, weights: dict[str, Tensor]) -> None:
        self.variant = variant
        network = network_with(weights, sizes, dropout=variant.dropout).to(variant.dtype)
        if variant.channels_last:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.weights: list[Tensor] = list(network.parameters())
        self.network: torch.nn.Module = network
        self.model = _compiled(network, variant.compiled, sizes.compiler)
        """What computes D: `network`, or its compiled form."""
        with torch.no_grad():
            low = variant.dtype != torch.float32
            self.masters = [p.float() for p in self.weights] if low else self.weights
            self.averages = [p.clone() for p in self.masters]
        self.load(weights)
        self.decay = sizes.ema_decay
        self.optimizer = torch.optim.Adam(
            self.masters, lr=sizes.lr, fused=None if variant.original else True
        )

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        """In place, where a graph may read them."""
        self.network.load_state_dict(weights)
        names = [name for name, _ in self.network.named_parameters()]
        for name, master, average in zip(names, self.masters, self.averages, strict=True):
            master.copy_(weights[name])
            average.copy_(weights[name])

    @torch.no_grad()
    def update(self) -> None:
        """Adam and the average, from the gradients of `weights`."""
        if self.variant.original:
            for weight in self.weights:
                if weight.grad is not None:
                    torch.nan_to_num(weight.grad, nan=0, posinf=1e5, neginf=-1e5, out=weight.grad)
            self.optimizer.step()
            for average, weight in zip(self.averages, self.weights, strict=True):
                average.lerp_(weight, 1 - self.decay)
            return
        low = self.masters is not self.weights
        if low:
            for master in self.masters:
                if master.grad is None:
                    master.grad = torch.empty_like(master)
            torch._foreach_copy_(_gradients(self.masters), _gradients(self.weights))
        self.optimizer.step()
        if low:
            torch._foreach_copy_(self.weights, self.masters)
        torch._foreach_lerp_(self.averages, self.masters, 1 - self.decay)


def _compiled(network: torch.nn.Module, region: str, backend: str) -> Callable[..., Tensor]:
    # Every batch and every kind of block is compiled on its own; one too many is an error, since
    # the rest would quietly run as it is.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    if region == "network":
        return torch.compile(network, dynamic=False, backend=backend)
    if region == "blocks":
        for module in network.modules():
            if isinstance(module, UNetBlock):
                module.compile(dynamic=False, fullgraph=True, backend=backend)
    return network


def graph_breaks() -> int:
    """Since the process began: places where compiled code went back to Python."""
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def _gradients(weights: Iterable[Tensor]) -> list[Tensor]:
    gradients = [w.grad for w in weights]
    assert all(g is not None for g in gradients)
    return [g for g in gradients if g is not None]


class TrainingStep:
    """Draw, forward, backward, update; called for each step.

    Everything that the forward and the backward pass read stays in place, so that `capture` can
    make graphs of them.
    """

    def __init__(
        self,
        trainer: Trainer,
        objective: str,
        batch: int,
        sizes: Sizes,
        *,
        graph: Graph = "no",
        capture: Capture = cuda_capture,
    ) -> None:
        self.trainer, self.batch = trainer, batch
        self.lanes = max(1, batch // sizes.lane_batch)
        self.device = trainer.weights[0].device
        self.objective = image_objective(objective, sizes)
        self.steps = 0
        rng = self._rng()
        shape = (batch, sizes.channels, sizes.resolution, sizes.resolution)
        self.data = ImageBatch(
            rng.uniform(*shape) * 2 - 1, augment_labels=rng.normal(batch, AUGMENT_DIM)
        )
        self.model: Callable[..., Tensor] = trainer.model
        if graph == "rollouts":
            assert trainer.variant.dropout == 0, "one graph would repeat its masks"
            self.model = GraphedDenoiser(trainer.model, capture)
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            self.tape = Tape(self._consume(trainer.network), rng)
        self.tape.refill(rng)
        self.loss = torch.zeros((), device=self.device)
        self.forward_backward: Callable[[], object] = self._forward_backward
        if graph == "step":
            with matmul_precision(trainer.variant.tf32):
                self.forward_backward = capture(self._forward_backward)

    def __call__(self) -> None:
        self.tape.refill(self._rng())
        self.compute()
        self.trainer.update()

    def compute(self) -> None:
        """Loss and gradients from the numbers drawn last."""
        with matmul_precision(self.trainer.variant.tf32):
            self.forward_backward()

    def fresh_inputs(self) -> None:
        """Other images, labels and numbers than at the capture."""
        rng = self._rng()
        self.data.images.copy_(rng.uniform(*self.data.images.shape) * 2 - 1)
        assert self.data.augment_labels is not None
        self.data.augment_labels.copy_(rng.normal(*self.data.augment_labels.shape))
        self.tape.refill(rng)

    def loss_of(self, model: Callable[..., Tensor]) -> Tensor:
        """Mean loss of `model` on the numbers drawn last."""
        self.tape.rewind()
        terms = self._consume(model)(self.tape).values()
        total = torch.stack([term.weight * term.value for term in terms]).sum()
        return total / self.batch

    def _forward_backward(self) -> None:
        for weight in self.trainer.weights:
            weight.grad = None
        loss = self.loss_of(self.model)
        loss.backward()
        self.loss = loss.detach()

    def _consume(self, model: Callable[..., Tensor]) -> Callable[[BlockRng], dict[str, Any]]:
        return lambda rng: self.objective(model, self.data, rng, 0)

    def _rng(self) -> BlockRng:
        self.steps += 1
        return BlockRng.for_lanes(0, self.steps, range(self.lanes), self.device)


def image_objective(name: str, sizes: Sizes) -> ImageObjective:
    """Of OBJECTIVES."""
    dsm, cp = section(DSM), section(OBJECTIVES[name])
    return ImageObjective(dsm, cp, sizes.network["sigma_data"])


def errors(step: TrainingStep, reference: torch.nn.Module) -> tuple[float, float]:
    """Relative errors of loss and gradient, against `reference`: the float32 network with the same
    weights, eager, without TF32, on the same new inputs."""
    step.fresh_inputs()
    step.compute()
    gradient = torch.cat([g.float().flatten() for g in _gradients(step.trainer.weights)])
    reference.zero_grad()
    with matmul_precision(False):
        loss = step.loss_of(reference)
        loss.backward()
    truth = torch.cat([g.flatten() for g in _gradients(reference.parameters())])
    return (
        float((step.loss - loss.detach()).abs() / loss.detach().abs()),
        float((gradient - truth).norm() / truth.norm()),
    )
