"""The model card of exported weights: what they are, how they were made and judged, how to use
them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from cdm_ray.checkpoint import Checkpoint
from cdm_ray.config import ImageConfig
from cdm_ray.data.manifest import Manifest
from cdm_ray.evaluation.launch import evaluation_folder
from cdm_ray.evaluation.results import RESULTS_NAME
from cdm_ray.storage import matching

ARCHITECTURES = {"ddpmpp": "DDPM++", "ncsnpp": "NCSN++", "adm": "ADM"}


def model_card(
    config: ImageConfig,
    checkpoint: Checkpoint,
    arguments: dict[str, Any],
    tensors: dict[str, Tensor],
) -> str:
    """Markdown. `arguments` are those of the network, `tensors` its weights.

    The numbers are those of the evaluations that lie in the run's folder. Raises ConfigError when
    there is none and the data set's manifest cannot be read.
    """
    evaluations = _evaluations(checkpoint)
    sections = [
        _model(config, arguments, tensors),
        _training(config, checkpoint),
        _data(config, arguments, evaluations),
        _results(evaluations),
        f"## Loading\n\n{_loading(config, arguments)}",
        _licence(config),
    ]
    return "\n\n".join(sections) + "\n"


def _evaluations(checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """Content of every `results.json` of this checkpoint."""
    folder = evaluation_folder(checkpoint.run_folder, checkpoint.name)
    return [json.loads(path.read_text()) for path in matching(folder, f"*/{RESULTS_NAME}")]


def _model(config: ImageConfig, arguments: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    data, classes = config.data, arguments["label_dim"]
    numbers = sum(tensor.numel() for tensor in tensors.values())
    labels = f"{classes} classes" if classes else "without classes"
    return (
        f"# {config.run_name}\n\n"
        f"Diffusion model of {data.resolution}x{data.resolution} images with {data.channels} "
        f"channel{'s' if data.channels > 1 else ''}, {labels}: a "
        f"{ARCHITECTURES[config.network.architecture]} with EDM preconditioning (Karras et al. "
        f"2022, sigma_data = {config.network.sigma_data:g}), {numbers:,} float32 numbers. "
        "The weights are the exponential moving average over the training."
    )


def _training(config: ImageConfig, checkpoint: Checkpoint) -> str:
    state, cp = checkpoint.state, config.cp
    rows = {
        "recipe": config.recipe,
        "training images": f"{state.samples_seen:,} (step {state.step:,})",
        "objective": "denoising score matching"
        + (f" + {cp.weight:g} x Consistency Property" if cp.weight else ""),
        "batch, learning rate": f"{config.train.batch}, {config.optimizer.lr:g}",
        "dropout, augmentation": f"{config.network.dropout:g}, p = {config.augment.p:g}",
        "seed": str(config.run.seed),
    }
    for change in config.schedule:
        if config.first_step(change.after) < state.step:
            rows[f"after {change.after:,} images"] = f"`{json.dumps(change.set)}`"
    if config.network.init is not None:
        rows["started from"] = f"`{Path(config.network.init).name}`"
    if cp.weight:
        settings = cp.model_dump(mode="json")
        rows |= {f"`cp.{name}`": json.dumps(value) for name, value in settings.items()}
    return "\n".join(["## Training", "", "| | |", "|---|---|", *_rows(rows)])


def _data(config: ImageConfig, arguments: dict[str, Any], evaluations: list[dict[str, Any]]) -> str:
    manifest = None if evaluations else Manifest.find(config.data.path)
    fingerprint = evaluations[0]["dataset"]["fingerprint"] if evaluations else None
    if manifest is not None:
        fingerprint = manifest.fingerprint
    rows = {
        "name": Path(config.data.path).name,
        "fingerprint": f"`{fingerprint}`" if fingerprint else "not at hand at the export",
        "classes": str(arguments["label_dim"] or "not used"),
    }
    return "\n".join(["## Data", "", "| | |", "|---|---|", *_rows(rows)])


def _results(evaluations: list[dict[str, Any]]) -> str:
    lines = ["## Results"]
    if not evaluations:
        lines += ["", "These weights were not evaluated."]
    for content in evaluations:
        metrics, sampler = content["metrics"], content["sampler"]
        seeds = ", ".join(f"{first:,}" for first in content["first_seeds"])
        lines += [
            "",
            f"{int(metrics['fd_images']):,} generated images from each of the first seeds {seeds}; "
            f"features of `{content['extractor']['name']}`; ODE: {sampler['ode_solver']}, "
            f"{sampler['ode_steps']} steps; SDE: {sampler['sde_solver']}, "
            f"{sampler['sde_steps']} steps.",
            "",
            *("| metric | value |", "|---|---|"),
            *_rows({f"`{name}`": f"{value:.6g}" for name, value in metrics.items()}),
        ]
    return "\n".join(lines)


def _rows(cells: dict[str, str]) -> list[str]:
    return [f"| {name} | {value} |" for name, value in cells.items()]


def _loading(config: ImageConfig, arguments: dict[str, Any]) -> str:
    classes, sampler = arguments["label_dim"], config.sampler
    shape = f"4, {config.data.channels}, {config.data.resolution}, {config.data.resolution}"
    labels = f"torch.eye({classes})[torch.arange(4) % {classes}]" if classes else "None"
    top, bottom, rho = (f"{x:g}" for x in (sampler.sigma_max, sampler.sigma_min, sampler.rho))
    return f"""\
In this folder, with torch, numpy, safetensors and `cdm_ray`:

```python
import torch

from cdm_ray.networks.exported import load_exported

network = load_exported("model.safetensors")
ramp = torch.linspace(0, 1, {sampler.ode_steps})
top, bottom = {top} ** (1 / {rho}), {bottom} ** (1 / {rho})
sigmas = [*(top + ramp * (bottom - top)) ** {rho}, torch.tensor(0.0)]
labels = {labels}
images = sigmas[0] * torch.randn({shape}, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    for sigma, lower in zip(sigmas, sigmas[1:]):  # Euler steps of the ODE
        denoised = network(images, sigma, labels)
        images = denoised + lower / sigma * (images - denoised)
pixels = (images * 127.5 + 128).clip(0, 255).to(torch.uint8)
```"""


def _licence(config: ImageConfig) -> str:
    start = "" if config.network.init is None else " and of the weights that training started from"
    return (
        "## Licence\n\nNone is stated yet. Whoever publishes these weights chooses one, which "
        f"that of the data{start} has to permit."
    )
