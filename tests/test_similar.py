"""Most similar images and near-duplicates against brute force; the command and its errors."""

import csv
import shutil

import numpy as np
import pytest
from image_helpers import noise_image
from PIL import Image

from mae_jax.evaluate import similar
from mae_jax.utils.errors import UserError

CHECKPOINT = "hf/hf_tiny/pretrained_v5"


def random_vectors(count, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


def cosines_of(a, b):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit(a.astype(np.float64)) @ unit(b.astype(np.float64)).T


@pytest.mark.parametrize("tiles", [dict(), dict(bank_tile=32, query_tile=4)], ids=["one", "many"])
def test_the_most_similar_are_those_of_brute_force(tiles):
    bank = random_vectors(101)
    queries, own = bank[:11], [[q, 50] for q in range(11)]  # each without itself and another
    cosines, index = similar.most_similar(bank, queries, own, 7, **tiles)
    expected = cosines_of(queries, bank)
    for query, left_out in enumerate(own):
        expected[query, left_out] = -np.inf
    np.testing.assert_array_equal(index, np.argsort(-expected, axis=1)[:, :7])
    np.testing.assert_allclose(cosines, -np.sort(-expected, axis=1)[:, :7], atol=1e-6)


def connected(near):
    """Return the groups of a symmetric relation, by walking along it."""
    groups, seen = [], set()
    for start in range(len(near)):
        group, border = set(), {start} - seen
        while border:
            group |= border
            border = set(np.flatnonzero(near[list(border)].any(axis=0))) - group
        seen |= group
        if len(group) > 1:
            groups.append(sorted(group))
    return groups


@pytest.mark.parametrize("tile", [7, 32, 1000])
def test_groups_of_duplicates_are_those_of_brute_force(tile):
    vectors = random_vectors(100, 4)
    groups = similar.duplicate_groups(vectors, 0.98, tile=tile)
    assert [group.tolist() for group in groups] == connected(cosines_of(vectors, vectors) >= 0.98)
    assert max(map(len, groups)) > 2


def test_duplicates_far_apart_and_through_others():
    vectors = random_vectors(50, 16)
    vectors[41] = 3 * vectors[2]  # the length does not matter
    step = np.linspace(0, 1, 4, dtype=np.float32)[:, None]
    vectors[[48, 5, 30, 11]] = (1 - step) * vectors[48] + step * vectors[11]
    ends = cosines_of(vectors[[48]], vectors[[11]]).item()
    groups = similar.duplicate_groups(vectors, 0.75, tile=8)
    assert ends < 0.75
    assert [2, 41] in [group.tolist() for group in groups]
    assert [5, 11, 30, 48] in [group.tolist() for group in groups]
    exact = [group.tolist() for group in similar.duplicate_groups(vectors, 1.0, tile=8)]
    assert exact == [[2, 41]]
    assert similar.duplicate_groups(np.zeros((3, 4), np.float32), 0.5) == []  # without direction


@pytest.fixture
def images(tmp_path):
    """Six images in a folder; two of them are copies of the first one, one of these as JPEG."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        noise_image(number, (40, 40)).resize((60, 60)).save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "copy.png")
    with Image.open(folder / "0.png") as image:
        image.save(folder / "small.jpg", quality=95)
    return folder


def search(golden, images, tmp_path, *argv):
    """Run the command; return the rows of the table and the size of the picture."""
    table, picture = tmp_path / "out" / "s.csv", tmp_path / "out" / "s.png"
    flags = ["--among", str(images), "--checkpoint", str(golden / CHECKPOINT), "--batch-size", "4"]
    similar.main([*map(str, argv), *flags, "--out", str(picture), "--csv", str(table)])
    with Image.open(picture) as image:
        size = image.size
    return list(csv.DictReader(table.read_text().splitlines())), size


def test_similar_images_on_the_command_line(golden, images, tmp_path, capsys):
    (tmp_path / "link.png").symlink_to(images / "0.png")
    rows, size = search(
        golden, images, tmp_path, images / "1.png", tmp_path / "link.png", "--top=3"
    )
    assert capsys.readouterr().out.startswith("2 images looked up among 6\n")
    assert size == (6 + 4 * (128 + 6), 6 + 2 * (128 + 36 + 6))
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2
    assert not [row for row in rows[:3] if row["file"].endswith("1.png")]
    assert [row["file"].rsplit("/")[-1] for row in rows[3:5]] == ["copy.png", "small.jpg"]
    assert float(rows[3]["cosine"]) == pytest.approx(1, abs=1e-5)
    assert 0.9 < float(rows[4]["cosine"]) < 1
    assert rows[3]["query"].endswith("link.png")


def test_duplicates_on_the_command_line(golden, images, tmp_path, capsys):
    rows, _ = search(golden, images, tmp_path, "--duplicates", "0.9999")
    assert (
        "1 group of near-duplicates: 2 of 6 images, 1 without the first" in capsys.readouterr().out
    )
    assert [row["file"].rsplit("/")[-1] for row in rows] == ["0.png", "copy.png"]
    assert {row["group"] for row in rows} == {"1"}


def test_no_duplicates_have_a_table_without_rows(golden, images, tmp_path, capsys):
    argv = ["--among", str(images / "1.png"), str(images / "2.png"), "--duplicates", "1"]
    argv += ["--checkpoint", str(golden / CHECKPOINT)]
    table, picture = tmp_path / "s.csv", tmp_path / "s.png"
    similar.main([*argv, "--csv", str(table), "--out", str(picture)])
    assert table.read_text().splitlines() == ["group,file,cosine"]
    assert "0 groups of near-duplicates" in capsys.readouterr().out
    assert not picture.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["{}/0.png", "--top", "6"], "--top 6 is too large: --among .*/images has 5 images"),
        (["{}/0.png", "--duplicates", "0.98"], "--duplicates 0.98 compares .*leave out .*0.png"),
        ([], "nothing to look up: name images, or set --duplicates 0.98"),
        (["{}/none.png"], "none.png does not exist"),
        (["{}/0.png", "--channels", "4"], "0.png is bad: .*model.channels=4"),
    ],
)
def test_bad_flags_are_errors_without_output(golden, images, tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        search(golden, images, tmp_path, *(flag.format(images) for flag in flags))
    assert not (tmp_path / "out").exists()


def test_outputs_are_checked_first(images):
    argv = [str(images), "--among", str(images), "--checkpoint", "nowhere"]
    for flags, message in (
        ([], "nothing to write: set --out OUT.png, --csv OUT.csv or both"),
        (["--csv", "s.txt"], "--csv s.txt must end in .csv"),
        (["--out", "s.csv"], "--out s.csv must end in .png"),
    ):
        with pytest.raises(UserError, match=message):
            similar.main([*argv, *flags])


def test_a_file_is_no_duplicate_of_itself(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / "0.png").symlink_to("a.png")
    files = [tmp_path / name for name in ("0.png", "a.png", "a.png")]
    assert similar.distinct_files(files) == [tmp_path / "a.png"]
