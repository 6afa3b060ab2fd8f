"""The README's way to a bridge, command by command at reduced size."""

import json
import re

import numpy as np
import pyarrow.parquet as parquet
import pytest
import torch
from mlflow import MlflowClient

from cdm_ray.checkpoint import open_newest
from tests.cluster.commands import COMMANDS, README, command_with, only, run

SHORT = [
    "network.width=8",
    "simulation.paths=16",
    "train.iterations=20",
    "train.pairs=64",
    "train.log_every=20",
    "eval.every_iterations=10",
    "eval.course_paths=32",
    "eval.paths=64",
    "eval.steps=50",
    "eval.grid.points=[401]",
    "eval.grid.steps=400",
]
OWN = ["process.kind=user", "process.drift=my_well:drift", "process.height=null"]
"""The process of the recipe as a drift of one's own, which every process of a run has to find."""


@pytest.fixture
def with_modules(checkout, head):
    """Environment in which commands find the cluster and the modules in the working folder."""
    (checkout / "my_well.py").write_text("def drift(x):\n    return -20 * x * (x * x - 1)\n")
    return head | {"PYTHONPATH": str(checkout)}


def test_a_bridge_with_a_drift_of_ones_own_is_trained_evaluated_and_sampled(checkout, with_modules):
    command = command_with("python jobs/train_bridge.py double-well-5")
    told = run(command, checkout, with_modules, *SHORT, *OWN)
    assert "KL(truth || model), nats" in told
    assert "evaluation at step 40: kl_from_truth" in told
    folder = checkout / "runs" / "rare"
    results = json.loads((folder / "results.json").read_text())
    # That of the double well with a barrier of 5, on a grid of a quarter of the nodes, too.
    assert results["metrics"]["log_p_truth"] == pytest.approx(-7.6054, abs=1e-3)
    assert set(results["figures"]) == {"paths", "marginals", "drift", "course"}

    client = MlflowClient(f"sqlite:///{checkout}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("cdm_ray")
    tracked = only(client.search_runs([experiment.experiment_id], "params.`run.name` = 'rare'"))
    assert tracked.info.status == "FINISHED"
    course = client.get_metric_history(tracked.info.run_id, "eval/kl_from_truth")
    assert [point.step for point in course] == [40, 80]
    assert course[-1].value == results["metrics"]["kl_from_truth"]
    shown = {a.path for a in client.list_artifacts(tracked.info.run_id, "figures")}
    assert len(shown) == 4

    few = ["eval.paths=32", "eval.steps=50", "eval.grid.points=[401]", "eval.grid.steps=400"]
    told = run(command_with("python jobs/evaluate.py runs/rare"), checkout, with_modules, *few)
    assert "effective sample size" in told
    run(command_with("python jobs/sample.py runs/rare"), checkout, with_modules, *few)
    table = parquet.read_table(only(folder.rglob("paths.parquet")))
    assert len(table) == 32 * 51
    assert np.isfinite(table["log_weight"].to_numpy()).all()

    refused = run(
        "python jobs/sample.py runs/rare bridge.duration=3", checkout, with_modules, code=2
    )
    assert "bridge.duration was 1" in refused


def test_the_lines_of_the_readme_import_the_learned_control(checkout, monkeypatch):
    lines = only(re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
    assert len([line for line in lines.splitlines() if line]) == 3
    monkeypatch.chdir(checkout)
    monkeypatch.syspath_prepend(checkout)
    names = {"x": torch.zeros(3, 1), "t": torch.tensor(0.5)}
    exec(lines, names)
    checkpoint = open_newest(checkout / "runs" / "rare")
    assert names["drift"].shape == (3, 1)
    weights = checkpoint.tensors("ema")
    for name, tensor in names["control"].state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_drift_of_ones_own_is_planned_and_a_mistake_is_one_line(checkout, head, with_modules):
    recipe = re.search(r"```yaml\n(process:.*?)```", README, re.DOTALL)[1]
    (checkout / "mine.yaml").write_text(recipe)
    (checkout / "my_model.py").write_text("def drift(x):\n    return -(x**3)\n")
    assert "lanes" in run("python jobs/train_bridge.py mine.yaml --dry-run", checkout, with_modules)
    answer = run("python jobs/train_bridge.py mine.yaml", checkout, head, code=2)
    assert re.search(r"^error: drift=my_model:drift: cannot import my_model", answer, re.M)
    assert "process.kind = " in run(command_with("python jobs/train_bridge.py --h"), checkout, head)
    assert "make bridge" in COMMANDS
