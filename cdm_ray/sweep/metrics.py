"""Which metrics a sweep may be decided by, known before a trial has run."""

from __future__ import annotations

import difflib
from typing import get_args

from cdm_ray.bridges import bridge_of
from cdm_ray.config import BridgeConfig, ImageConfig, JobConfig, SweepConfig
from cdm_ray.errors import ConfigError
from cdm_ray.evaluation.bridge_evaluation import has_closed_form
from cdm_ray.evaluation.features import FEATURE_DIMS
from cdm_ray.evaluation.generate import KINDS
from cdm_ray.evaluation.scores import Quantity, metric_name


def check_metric(sweep: SweepConfig) -> None:
    """Raises ConfigError for a `metric` that its trials do not report."""
    known = known_metrics(sweep.base)
    if sweep.metric not in known:
        near = difflib.get_close_matches(sweep.metric, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(
            f"metric={sweep.metric}: not a metric of these trials; {hint}known: {', '.join(known)}"
        )


def known_metrics(config: JobConfig) -> list[str]:
    """Names of what evaluations of such runs measure, counts and errors left out."""
    if isinstance(config, ImageConfig):
        extractor = config.eval.extractor
        dim = FEATURE_DIMS[extractor]
        names = [
            metric_name(quantity, kind, extractor, dim)
            for kind in KINDS
            for quantity in get_args(Quantity)
            if quantity != "kd_std"
        ]
        return [*names, "cp_residual", "cp_residual_on_data"]
    assert isinstance(config, BridgeConfig)
    names = ["cost", "endpoint_error", "ess", "log_p", "log_p_bound"]
    if config.eval.grid is not None or has_closed_form(bridge_of(config).process):
        names = ["kl_from_truth", "kl_to_truth", *names]
    return names
