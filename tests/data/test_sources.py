"""Every layout that people have is found with its labels; what cannot be packed is refused."""

from __future__ import annotations

import io
import json
import zipfile

import numpy as np
import pytest
from data_sets import image_bytes, save_image
from PIL import Image
from sklearn.datasets import load_digits

from cdm_ray.data.sources import find_images, open_source
from cdm_ray.errors import ConfigError


def labels(source) -> dict[str, int | None]:
    return {image.name: image.label for image in source.images}


def write_zip(path, members: dict[str, bytes]):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def edm_zip(path, dataset: object = None, names=("00000/img00000000.png", "00000/img00000001.png")):
    """A zip as EDM's dataset tool writes it."""
    members = {name: image_bytes() for name in names}
    if dataset is not None:
        members["dataset.json"] = json.dumps(dataset).encode()
    return write_zip(path, members)


def test_digits_are_the_1797_images_of_scikit_learn():
    source = find_images("digits")
    bunch = load_digits()
    assert len(source.images) == 1797
    assert source.class_names == tuple("0123456789")
    assert source.num_classes == 10
    assert [image.label for image in source.images] == bunch.target.tolist()
    with open_source(source.kind, source.location) as read:
        for index in (0, 500, 1796):
            pixels = np.asarray(Image.open(io.BytesIO(read(source.images[index].name))))
            # round(v * 255 / 16): 16 -> 255, 8 -> 128, 1 -> 16
            exact = bunch.images[index] * 255 / 16
            assert np.abs(pixels - exact).max() <= 0.5
            assert pixels.max() == 255 or bunch.images[index].max() < 16


def test_a_folder_of_images_has_sorted_names_and_no_labels(tmp_path):
    for name in ("b.png", "a.JPG", "c.webp", "sub/d.bmp", "Z.jpeg"):
        save_image(tmp_path / name)
    (tmp_path / "README.txt").write_text("hello")
    (tmp_path / "._b.png").write_bytes(b"a resource fork")
    source = find_images(str(tmp_path))
    assert [image.name for image in source.images] == [
        "Z.jpeg", "a.JPG", "b.png", "c.webp", "sub/d.bmp",
    ]  # fmt: skip
    assert (source.num_classes, source.class_names, source.other_files) == (0, (), 2)
    assert source.images[2].size == (tmp_path / "b.png").stat().st_size


def test_class_folders_are_labels_at_any_depth(tmp_path):
    for name in ("dog/1.png", "cat/deep/er/2.png", "cat/3.png", "emu/4.png"):
        save_image(tmp_path / name)
    source = find_images(str(tmp_path))
    assert source.class_names == ("cat", "dog", "emu")
    assert labels(source) == {
        "cat/3.png": 0, "cat/deep/er/2.png": 0, "dog/1.png": 1, "emu/4.png": 2,
    }  # fmt: skip


def test_one_image_outside_the_class_folders_means_no_labels(tmp_path):
    for name in ("dog/1.png", "cat/2.png", "3.png"):
        save_image(tmp_path / name)
    assert find_images(str(tmp_path)).num_classes == 0


def test_a_single_folder_is_no_class(tmp_path):
    save_image(tmp_path / "images/1.png")
    assert find_images(str(tmp_path)).num_classes == 0


FFHQ = [f"{number // 1000 * 1000:05d}/{number:05d}.png" for number in (0, 1, 999, 1000, 69_999)]


def ffhq_look_alike(root, *versions):
    """FFHQ as its download script leaves it: numbered folders with a licence in each version."""
    sides = {"images1024x1024": 40, "thumbnails128x128": 12, "in-the-wild-images": 30}
    for version in versions:
        for i, name in enumerate(FFHQ):
            save_image(root / version / name, size=(sides.get(version, 8),) * 2, color=(i, 0, 0))
        (root / version / "LICENSE.txt").write_text("CC")
    (root / "ffhq-dataset-v2.json").write_text("{}")
    return root


@pytest.mark.parametrize("version", ["images1024x1024", "thumbnails128x128", "."])
def test_the_numbered_folders_of_ffhq_are_no_classes(tmp_path, version):
    source = find_images(str(ffhq_look_alike(tmp_path, version) / version))
    assert [image.name for image in source.images] == FFHQ
    assert source.num_classes == 0
    assert source.other_files >= 1


@pytest.mark.parametrize(
    ("versions", "taken"),
    [
        (("images1024x1024", "thumbnails128x128", "in-the-wild-images"), "images1024x1024"),
        (("thumbnails128x128", "in-the-wild-images"), "thumbnails128x128"),
        (("images1024x1024",), "images1024x1024"),
    ],
)
def test_of_the_versions_of_ffhq_side_by_side_one_is_the_source(tmp_path, versions, taken):
    root = ffhq_look_alike(tmp_path / "ffhq-dataset", *versions)
    source = find_images(str(root))
    assert source.location == str(root / taken)
    assert ([image.name for image in source.images], source.num_classes) == (FFHQ, 0)
    files = {file.relative_to(tmp_path).as_posix(): file for file in root.rglob("*.*")}
    zipped = find_images(
        write_zip(tmp_path / "f.zip", {name: file.read_bytes() for name, file in files.items()})
    )
    assert [image.name for image in zipped.images] == [f"ffhq-dataset/{taken}/{n}" for n in FFHQ]
    assert zipped.num_classes == 0


def test_numbered_folders_of_more_images_than_ffhq_has_are_classes(tmp_path, monkeypatch):
    monkeypatch.setattr("cdm_ray.data.sources._FFHQ_FOLDER", 3)
    for folder, count in (("00000", 4), ("00001", 1)):
        for number in range(count):
            save_image(tmp_path / f"{folder}/{number}.png")
    assert find_images(str(tmp_path)).class_names == ("00000", "00001")


AFHQ = {"cat/2.png": 0, "dog/3.png": 1, "wild/1.jpg": 2}


def afhq_look_alike(root):
    for split in ("train", "test", "val"):
        for name in AFHQ:
            save_image(root / split / name)
    save_image(root / "teaser.png")
    return root


def test_the_training_images_of_afhq_are_taken_with_their_three_classes(tmp_path):
    root = afhq_look_alike(tmp_path / "afhq_v2")
    for folder in (root, root / "train"):
        source = find_images(str(folder))
        assert source.class_names == ("cat", "dog", "wild")
        assert (labels(source), source.location) == (AFHQ, str(root / "train"))
    (root / "teaser.png").unlink()
    assert labels(find_images(str(tmp_path))) == AFHQ


@pytest.mark.parametrize("inside", ["", "afhq/"])
def test_afhq_as_a_zip_gives_its_training_images_too(tmp_path, inside):
    root = afhq_look_alike(tmp_path / "afhq_v2")
    (root / "teaser.png").unlink()
    members = {f"{inside}{f.relative_to(root).as_posix()}": f for f in root.rglob("*.*")}
    path = write_zip(tmp_path / "a.zip", {name: f.read_bytes() for name, f in members.items()})
    source = find_images(path)
    assert source.class_names == ("cat", "dog", "wild")
    assert labels(source) == {f"{inside}train/{name}": label for name, label in AFHQ.items()}
    with open_source(source.kind, source.location) as read:
        assert read(f"{inside}train/cat/2.png") == (root / "train/cat/2.png").read_bytes()


def test_a_folder_around_the_class_folders_changes_nothing(tmp_path):
    for name in ("dog/1.png", "cat/2.png"):
        save_image(tmp_path / "photos" / name)
    assert labels(find_images(str(tmp_path))) == {"cat/2.png": 0, "dog/1.png": 1}


def test_a_class_called_train_among_others_is_a_class(tmp_path):
    for name in ("train/1.png", "tram/2.png"):
        save_image(tmp_path / name)
    assert find_images(str(tmp_path)).class_names == ("train", "tram")


def test_links_to_folders_are_followed_but_not_in_circles(tmp_path):
    save_image(tmp_path / "elsewhere/1.png")
    save_image(tmp_path / "root/dog/2.png")
    (tmp_path / "root/cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root/dog/again").symlink_to(tmp_path / "root")
    assert labels(find_images(str(tmp_path / "root"))) == {"cat/1.png": 0, "dog/2.png": 1}


def test_an_edm_zip_has_the_labels_of_its_dataset_json(tmp_path):
    pairs = [["00000/img00000001.png", 3], ["00000/img00000000.png", 7]]
    source = find_images(edm_zip(tmp_path / "d.zip", {"labels": pairs}))
    assert labels(source) == {"00000/img00000000.png": 7, "00000/img00000001.png": 3}
    assert (source.num_classes, source.class_names, source.other_files) == (8, (), 0)
    with open_source(source.kind, source.location) as read:
        assert read("00000/img00000000.png") == image_bytes()


def test_an_edm_zip_without_labels_has_none(tmp_path):
    assert find_images(edm_zip(tmp_path / "d.zip", {"labels": None})).num_classes == 0
    # null also says that folders which look like classes are none
    names = ("cat/1.png", "dog/2.png")
    unlabelled = edm_zip(tmp_path / "e.zip", {"labels": None}, names)
    assert find_images(unlabelled).num_classes == 0


def test_a_zip_without_dataset_json_is_taken_like_a_folder(tmp_path):
    source = find_images(edm_zip(tmp_path / "d.zip", None, ("cat/1.png", "dog/2.png")))
    assert (source.class_names, source.num_classes) == (("cat", "dog"), 2)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ([], "must be"),
        ({"classes": 3}, "must be"),
        ({"labels": 3}, "must be"),
        ({"labels": [["a.png", 1, 2]]}, "must be"),
        ({"labels": [["a.png", "1"]]}, "label '1'"),
        ({"labels": [["a.png", 1.5]]}, r"label 1\.5"),
        ({"labels": [["a.png", True]]}, "label True"),
        ({"labels": [["a.png", -1]]}, "label -1"),
        ({"labels": [["a.png", 10**9]]}, "label 1000000000"),
        ({"labels": [["00000/img00000000.png", 1]]}, "no label for 1 of 2 images"),
        ({"labels": []}, "no label for 2 of 2 images"),
    ],
)
def test_wrong_labels_in_dataset_json_are_refused(tmp_path, dataset, message):
    with pytest.raises(ConfigError, match=message):
        find_images(edm_zip(tmp_path / "d.zip", dataset))


def test_a_dataset_json_that_is_no_json_is_refused(tmp_path):
    path = write_zip(tmp_path / "d.zip", {"a.png": image_bytes(), "dataset.json": b"{"})
    with pytest.raises(ConfigError, match=r"dataset\.json must be"):
        find_images(path)


@pytest.mark.parametrize(
    "name",
    ["/etc/a.png", "../a.png", "x/../../a.png", "x\\..\\a.png", "C:/a.png", "..", "/etc/passwd"],
)
def test_a_zip_with_names_that_point_outside_is_refused(tmp_path, name):
    path = write_zip(tmp_path / "d.zip", {"good.png": image_bytes(), name: image_bytes()})
    with pytest.raises(ConfigError, match="unsafe name"):
        find_images(path)


def test_a_zip_that_holds_a_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("a.png", image_bytes())
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.png", image_bytes((1, 1, 1)))
    with pytest.raises(ConfigError, match=r"'a\.png' more than once"):
        find_images(str(tmp_path / "d.zip"))


def test_an_encrypted_zip_is_refused(tmp_path):
    path = tmp_path / "d.zip"
    write_zip(path, {"a.png": image_bytes()})
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 8] |= 1  # the flag in the central directory
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="encrypted"):
        find_images(str(path))


def test_a_zip_member_of_absurd_size_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "d.zip"
    write_zip(path, {"a.png": image_bytes()})
    content = bytearray(path.read_bytes())
    start = content.index(b"PK\1\2") + 24
    content[start : start + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="2147483648 bytes"):
        find_images(str(path))


def test_a_wrong_source_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "notes.txt").write_text("no images")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.zip").write_bytes(b"PK\3\4" + bytes(100))
    for source, message in [
        ("nowhere", "no such file or folder; use `digits`"),
        ("notes.txt", "neither a folder, a zip nor a tar"),
        ("cut.zip", "neither a folder, a zip nor a tar"),
        ("empty", "holds no images"),
        (".", "holds no images, only 2 other files"),
    ]:
        with pytest.raises(ConfigError, match=message):
            find_images(str(tmp_path / source))
    with pytest.raises(ConfigError, match="this machine's files"):
        find_images("s3://bucket/images")
