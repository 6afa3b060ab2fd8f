"""The manifest is read back as written, refused when damaged, and checked against the run."""

from __future__ import annotations

import json

import pytest
from data_sets import write_data_set

from cdm_ray.config import DataConfig, ImageConfig, build_config
from cdm_ray.data.manifest import Manifest, check_matches
from cdm_ray.data.prepare import ensure_prepared
from cdm_ray.errors import ConfigError


def test_a_manifest_is_read_back_as_it_was_written(tmp_path):
    manifest = write_data_set(tmp_path, [3, 2])
    assert Manifest.load(str(tmp_path)) == manifest
    assert manifest.num_samples == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "manifest.json",
        "shard-000000.tar",
        "shard-000001.tar",
    ]


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"resolution": 0}, "resolution"),
        ({"channels": 2}, "channels"),
        ({"format": 2}, "format"),
        ({"shards": []}, "shards"),
        ({"fingerprint": "../../etc/x"}, "fingerprint"),
        ({"class_names": ["a"]}, "class_names"),
        ({"unknown": 1}, "unknown"),
        ({"shards": [{"name": "../x.tar", "samples": 1, "sha256": "0" * 64}]}, "name"),
        ({"shards": [{"name": "/x.tar", "samples": 1, "sha256": "0" * 64}]}, "name"),
        ({"shards": [{"name": "x.tar", "samples": 0, "sha256": "0" * 64}]}, "samples"),
        ({"shards": [{"name": "x.tar", "samples": 1, "sha256": "0"}]}, "sha256"),
        ({"shards": [{"name": "x.tar", "samples": 1, "sha256": "0" * 64}] * 2}, "same name"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(tmp_path, change, where):
    write_data_set(tmp_path, [3])
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=f"manifest.json is damaged .*{where}"):
        Manifest.load(str(tmp_path))


def test_a_truncated_manifest_is_refused(tmp_path):
    write_data_set(tmp_path, [3])
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ConfigError, match=r"manifest\.json is damaged"):
        Manifest.load(str(tmp_path))


def test_without_a_manifest_the_command_that_packs_one_is_named(tmp_path, http_server):
    for path in (str(tmp_path), str(tmp_path / "nothing"), f"{http_server}/x", "memory://nothing"):
        assert Manifest.find(path) is None
        with pytest.raises(ConfigError, match=r"prepare_data\.py data\.source=\.\.\. data\.path="):
            Manifest.load(path)
        with pytest.raises(ConfigError, match="no packed data set"):
            ensure_prepared(DataConfig(path=path), lambda *_: [])


def test_an_unknown_protocol_is_a_mistake_of_the_user():
    with pytest.raises(ConfigError, match=r"data\.path=nope://x: manifest\.json cannot be read"):
        Manifest.load("nope://x")


def config(**sections) -> ImageConfig:
    base = {
        "data": {"resolution": 4, "channels": 1, "lanes": 2, "path": "here"},
        "network": {"channel_mult": [1], "attn_resolutions": []},
        "train": {"batch": 4},
        "eval": {"extractor_file": "x.pt"},
        "ray": {"workers": 1},
    }
    for section, values in sections.items():
        base[section] |= values
    return build_config(ImageConfig, base)


def test_a_data_set_that_fits_the_run_is_accepted(tmp_path):
    check_matches(write_data_set(tmp_path, [3]), config())
    check_matches(write_data_set(tmp_path, [3]), config(network={"class_conditional": True}))


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"data": {"resolution": 8}}, r"data\.resolution=8.*here.*data\.resolution=4"),
        ({"data": {"channels": 3}}, r"data\.channels=3.*here.*data\.channels=1"),
        ({"data": {"lanes": 4}}, r"data\.lanes=4 .* 3 images"),
        ({"network": {"class_conditional": True}}, r"class_conditional=true needs labels"),
    ],
)
def test_a_data_set_that_cannot_feed_the_run_is_refused(tmp_path, sections, message):
    manifest = write_data_set(tmp_path, [3], num_classes=0)
    with pytest.raises(ConfigError, match=message):
        check_matches(manifest, config(**sections))
