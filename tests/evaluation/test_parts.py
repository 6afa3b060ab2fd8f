import logging

import pytest
import torch
from safetensors.torch import save_file

from cdm_ray.errors import RunFailed
from cdm_ray.evaluation.parts import DamagedPart, compute_parts, read_part, rows_of, write_part
from cdm_ray.storage import path_of


class Work:
    """Remembers what it was asked for."""

    def __init__(self):
        self.items = []

    def __call__(self, item):
        self.items.append(item)
        return {"value": torch.full((item + 1, 2), float(item)), "extra": torch.tensor([item])}


def in_process(function, items, description):
    return [function(item) for item in items]


def compute(folder, work, items=range(4)):
    return compute_parts(work, list(items), folder, in_process, "numbers")


def test_every_item_has_its_tensors_in_order(tmp_path):
    paths = compute(tmp_path / "parts", Work())
    for item, path in enumerate(paths):
        part = read_part(path)
        assert torch.equal(part["value"], torch.full((item + 1, 2), float(item)))
        assert part["extra"].tolist() == [item]
        assert rows_of(path, "value") == item + 1


def test_what_is_there_is_not_computed_again_and_the_user_is_told(tmp_path):
    paths, work = compute(tmp_path, Work()), Work()
    assert compute(tmp_path, work) == paths
    assert work.items == []
    paths[2].unlink()
    told = []

    def telling(function, items, description):
        told.append(description)
        return in_process(function, items, description)

    compute_parts(work, range(4), tmp_path, telling, "numbers")
    assert work.items == [2]
    assert told == ["numbers (3 of 4 parts done before)"]


def test_parts_may_lie_at_a_url(memory):
    folder = path_of(f"{memory}/parts")
    paths, work = compute(folder, Work()), Work()
    assert read_part(paths[3])["extra"].tolist() == [3]
    assert rows_of(paths[3], "value") == 4
    paths[1].write_bytes(b"half")
    paths[2].unlink()
    assert compute(folder, work) == paths
    assert work.items == [1, 2]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "empty", "no digest"])
def test_a_damaged_part_is_named_and_computed_again(tmp_path, caplog, damage):
    path, work = compute(tmp_path, Work())[1], Work()
    content = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(content[:-3])
    elif damage == "garbage":
        path.write_bytes(b"garbage" * 10)
    elif damage == "flipped":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "empty":
        path.write_bytes(b"")
    else:
        save_file(read_part(path), path)
    with pytest.raises(DamagedPart, match=path.name):
        read_part(path)
    with caplog.at_level(logging.WARNING):
        compute(tmp_path, work)
    assert work.items == [1]
    (record,) = caplog.records
    assert path.name in record.message
    assert "computing it again" in record.message
    assert path.read_bytes() == content


def test_a_write_that_dies_leaves_no_part(tmp_path, monkeypatch):
    path = tmp_path / "00000.safetensors"
    write_part(path, {"value": torch.ones(2)})

    def dies(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("pathlib.Path.replace", dies)
    with pytest.raises(KeyboardInterrupt):
        write_part(path, {"value": torch.zeros(2)})
    with pytest.raises(KeyboardInterrupt):
        write_part(tmp_path / "00001.safetensors", {"value": torch.zeros(2)})
    assert torch.equal(read_part(path)["value"], torch.ones(2))
    assert not (tmp_path / "00001.safetensors").exists()


def test_parts_that_stay_on_another_machine_are_a_failure_that_says_so(tmp_path):
    def elsewhere(function, items, description):
        return [None for _ in items]

    with pytest.raises(RunFailed, match="2 of 2 parts .* storage that all machines share"):
        compute_parts(Work(), [0, 1], tmp_path / "local", elsewhere, "numbers")
