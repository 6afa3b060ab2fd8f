"""What a job prints before a run: its cost, changes on the way included."""

from cdm_ray.config import ImageConfig, load_config
from cdm_ray.report import print_plan


def cost_of(capsys, *overrides):
    print_plan(load_config(ImageConfig, "digits", ["train.images=12800", *overrides]))
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("cost"))
    return line


def test_the_cost_is_the_mean_over_the_run(capsys):
    assert "100 steps of 128 images" in cost_of(capsys)
    assert "; 4.5 forward passes per image, 1.50 times" in cost_of(capsys)
    later = "schedule=[{after: 9600, set: {cp.fraction: 0.75}}]"  # 7.5 passes, for a quarter
    assert "; 5.25 forward passes per image, 1.75 times" in cost_of(capsys, later)
