import pytest

from cdm_ray.cli import run_checkpoint_job, run_job
from cdm_ray.config import BridgeConfig, ImageConfig, load_config
from cdm_ray.errors import ConfigError, RunFailed
from cdm_ray.storage import path_of
from tests.checkpoints import make_checkpoint


def call(arguments, main=lambda config, dry_run: None):
    return run_job(
        ImageConfig,
        main,
        description="Trains.",
        examples="python job.py digits",
        default_recipe="digits",
        arguments=arguments,
    )


def test_recipe_overrides_and_dry_run_reach_the_job_in_any_order():
    seen = []
    for arguments in (
        ["digits", "cp.weight=3", "--dry-run"],
        ["--dry-run", "digits", "cp.weight=3"],
        ["cp.weight=3", "--dry-run"],
    ):
        assert call(arguments, lambda config, dry_run: seen.append((config, dry_run))) == 0
    assert all(dry_run and config.cp.weight == 3 for config, dry_run in seen)
    assert len({config.run_name for config, _ in seen}) == 1


def test_mistakes_are_one_line_on_stderr_and_exit_code_2(capsys):
    assert call(["digits", "cp.wieght=3"]) == 2
    assert capsys.readouterr().err == "error: cp.wieght: unknown key; did you mean cp.weight?\n"

    def refuse(config, dry_run):
        raise ConfigError("data.path=x: nothing there")

    def fail(config, dry_run):
        raise RunFailed("step 7: gradients were not finite")

    assert call([], fail) == 1
    assert capsys.readouterr().err == "error: step 7: gradients were not finite\n"
    assert call([], refuse) == 2
    assert capsys.readouterr().err == "error: data.path=x: nothing there\n"


def test_help_shows_recipes_examples_and_every_field(capsys):
    with pytest.raises(SystemExit, match="0"):
        call(["--help"])
    text = capsys.readouterr().out
    for part in ("digits", "python job.py digits", "cp.weight = 0.0", "train.zero_stage = 1"):
        assert part in text


def call_with_checkpoint(arguments):
    seen = []
    code = run_checkpoint_job(
        {ImageConfig: lambda config, checkpoint, dry_run: seen.append((config, checkpoint))},
        description="Evaluates.",
        examples="python job.py runs/mine",
        arguments=arguments,
    )
    return code, seen


def test_a_checkpoint_brings_its_configuration_and_a_run_its_newest_checkpoint(tmp_path):
    for step in (3, 12):
        config = load_config(ImageConfig, "digits", ["dsm.p_mean=-1"])
        make_checkpoint(tmp_path, config, {}, step=step)
    for named, step in ((tmp_path, 12), (tmp_path / "checkpoints" / "step-00000003", 3)):
        code, ((config, checkpoint),) = call_with_checkpoint([str(named), "eval.images=7"])
        assert code == 0
        assert checkpoint.state.step == step
        assert checkpoint.run_folder == tmp_path
        assert (config.recipe, config.dsm.p_mean, config.eval.images) == ("digits", -1.0, 7)


def test_a_checkpoint_may_lie_at_a_url(memory, capsys):
    make_checkpoint(path_of(f"{memory}/mine"), load_config(ImageConfig, "digits"), {})
    code, ((config, checkpoint),) = call_with_checkpoint([f"{memory}/mine", "eval.images=7"])
    assert (code, config.eval.images) == (0, 7)
    assert str(checkpoint.run_folder) == f"{memory}/mine"
    assert call_with_checkpoint(["ftp://me:hunter2@127.0.0.1:1/x"]) == (2, [])
    error = capsys.readouterr().err
    assert error.startswith("error: ftp://***@127.0.0.1:1/x: cannot be opened")
    assert "hunter2" not in error


def test_what_is_no_checkpoint_is_refused_by_name(tmp_path, capsys):
    assert call_with_checkpoint([str(tmp_path)]) == (2, [])
    assert f"{tmp_path}: neither a checkpoint nor the folder of a run" in capsys.readouterr().err
    assert call_with_checkpoint(["eval.images=7"]) == (2, [])
    assert "no checkpoint given" in capsys.readouterr().err


def test_what_a_checkpoint_has_learned_cannot_be_overridden(tmp_path, capsys):
    make_checkpoint(tmp_path, load_config(ImageConfig, "digits"), {})
    assert call_with_checkpoint([str(tmp_path), "dsm.p_mean=-1"]) == (2, [])
    assert "(dsm.p_mean was -1.2, is -1.0); leave that out" in capsys.readouterr().err


def test_a_checkpoint_of_another_kind_of_run_is_refused(tmp_path, capsys):
    make_checkpoint(tmp_path, load_config(BridgeConfig, None), {})
    assert call_with_checkpoint([str(tmp_path)]) == (2, [])
    assert "not a checkpoint that this job takes; it is for those of" in capsys.readouterr().err
