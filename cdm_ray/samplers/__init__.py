"""Samplers: how a trained model is run."""

from __future__ import annotations

from cdm_ray.processes.edm import REVERSE_STEPS
from cdm_ray.samplers.denoisers import in_float32, scale_epsilon
from cdm_ray.samplers.ode import dpmpp_2m_path, dpmpp_3m_path, euler_path, heun_path
from cdm_ray.samplers.sde import churn, reverse_sde
from cdm_ray.samplers.solver import Solver

_ALL = (
    Solver("euler", euler_path, evaluations_per_step=1, stochastic=False, order=1),
    Solver("heun", heun_path, evaluations_per_step=2, stochastic=False, order=2),
    Solver("dpmpp_2m", dpmpp_2m_path, evaluations_per_step=1, stochastic=False, order=2),
    Solver("dpmpp_3m", dpmpp_3m_path, evaluations_per_step=1, stochastic=False, order=3),
    *(reverse_sde(name) for name in REVERSE_STEPS),
    churn(),
)
SOLVERS: dict[str, Solver] = {solver.name: solver for solver in _ALL}
"""All solvers by the names that the configuration uses; `churn` with its default settings."""

__all__ = ["SOLVERS", "Solver", "churn", "in_float32", "scale_epsilon"]
