"""Find the images of a folder that are most similar to others, or near-duplicates in it.

mae-jax similar IMAGE_OR_DIR... --among DIR --checkpoint ANY --out OUT.png --csv OUT.csv
mae-jax similar --among DIR --checkpoint ANY --duplicates 0.98 --csv OUT.csv
"""

import argparse
import csv
import logging
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mae_jax.convert import cli as convert_cli
from mae_jax.convert.pretrained import POOLED
from mae_jax.data.sources import FileSource, printable_path
from mae_jax.evaluate.feature_figures import read_tiles, tile_rows
from mae_jax.evaluate.figures import check_display_channels, save_png
from mae_jax.evaluate.knn import BANK_TILE, QUERY_TILE, NearestNeighbors
from mae_jax.utils import cli, console
from mae_jax.utils.atomic import atomic_path
from mae_jax.utils.errors import UserError

log = logging.getLogger("mae_jax")

TOP = 8
MAX_ROWS = 16  # of the picture
SIDE = 128  # pixels of an image in it
PAIR_TILE = 4096  # images that are compared with as many at a time
ROUNDING = 1e-6  # of cosines in float32


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, as shell completion reads it."""
    parser = cli.make_parser("mae_jax.evaluate.similar", __doc__)
    parser.add_argument(
        "queries", nargs="*", type=cli.path_text, help="image files, or folders of them, to look up"
    )
    parser.add_argument(
        "--among",
        nargs="+",
        type=cli.path_text,
        required=True,
        help="folders or files to search. Their features are held in memory, twice: 4 d bytes per "
        "image, 307 MB for 100,000 images and d = 768, besides 0.3 GB of cosines",
    )
    convert_cli.add_checkpoint(parser)
    convert_cli.add_batch_size(parser)
    parser.add_argument(
        "--features", choices=POOLED, default="mean", help="to compare (mean); global: of Pixio's"
    )
    parser.add_argument(
        "--top", type=cli.positive_int, help=f"images per query; drawn per group ({TOP}, or all)"
    )
    parser.add_argument(
        "--duplicates",
        type=cli.fraction,
        metavar="COSINE",
        help="find the groups of --among in which every image has a cosine of at least that, such "
        "as 0.98, to another one; without queries",
    )
    parser.add_argument(
        "--out",
        type=cli.path_argument,
        help=f".png of the first {MAX_ROWS} queries and the images most similar to them, or groups",
    )
    parser.add_argument(
        "--csv",
        type=cli.path_argument,
        help=".csv with query, rank, file, cosine; or of duplicates group, file, cosine (to the "
        "first of the group)",
    )
    convert_cli.add_show(parser)
    return parser


def main(argv: list[str]) -> None:
    arguments = build_parser().parse_args(argv)
    _check_flags(arguments)
    among = FileSource(arguments.among)
    among.files = distinct_files(among.files)
    queries = FileSource(arguments.queries) if arguments.queries else None
    own = same_files(queries.files, among.files) if queries else []
    top = _check_top(arguments, len(among) - max(map(len, own), default=0))
    model, params = convert_cli.load_model(arguments)
    show = check_display_channels(arguments.show, model.info.channels)

    name = arguments.features
    model.check_pooled(name)
    function = jax.jit(lambda params, images: {name: model.features(params, images)[name]})

    def extract(source: FileSource) -> Float[np.ndarray, "n d"]:
        features = convert_cli.map_images(
            model, source, arguments.batch_size, lambda images: function(params, images)
        )
        convert_cli.check_finite(features, source)
        return features[name]

    bank = extract(among)
    if queries:
        nearest = most_similar(bank, extract(queries), own, top)
        result = _similar_result(queries, among, *nearest)
    else:
        groups = duplicate_groups(bank, arguments.duplicates)
        result = _duplicates_result(among, bank, groups)

    if arguments.csv:
        with atomic_path(arguments.csv) as part, part.open("w", newline="") as file:
            csv.writer(file).writerows([result.columns, *result.rows])
    if arguments.out and result.pictures:
        rows = [row[: top + 1] for row in result.pictures[:MAX_ROWS]]
        tiles = iter(read_tiles(model, [file for row in rows for file, _ in row], show, SIDE))
        figure = tile_rows([[(next(tiles), caption) for _, caption in row] for row in rows])
        save_png(arguments.out, figure)
    print(result.summary)
    for path in filter(None, [arguments.out if result.pictures else None, arguments.csv]):
        print(path)


def _check_flags(arguments: argparse.Namespace) -> None:
    """Raise UserError for outputs that cannot be written, and for none or two things to do."""
    if not arguments.out and not arguments.csv:
        raise UserError("nothing to write: set --out OUT.png, --csv OUT.csv or both")
    for flag, path, suffix in (("--out", arguments.out, ".png"), ("--csv", arguments.csv, ".csv")):
        if path:
            cli.check_output(flag, path, suffix)
    if not arguments.queries and arguments.duplicates is None:
        raise UserError("nothing to look up: name images, or set --duplicates 0.98")
    if arguments.queries and arguments.duplicates is not None:
        raise UserError(
            f"--duplicates {arguments.duplicates} compares the images of --among with each other: "
            f"leave out {' '.join(arguments.queries)}"
        )


def _check_top(arguments: argparse.Namespace, count: int) -> int:
    """Return how many images to find for a query, or to draw of a group, of at most `count`."""
    if arguments.queries and count < (wanted := arguments.top or 1):
        raise UserError(
            f"--top {wanted} is too large: --among {' '.join(arguments.among)} has "
            f"{cli.pluralize(count, 'image')} besides the query itself"
        )
    return arguments.top or min(count, TOP)


class Result(NamedTuple):
    """What a search found.

    rows: of a table with `columns`; pictures: rows of files with their captions.
    """

    columns: list[str]
    rows: list[list[Any]]
    pictures: list[list[tuple[Path, str]]]
    summary: str


def _similar_result(
    queries: FileSource,
    among: FileSource,
    cosines: Float[np.ndarray, "q k"],
    index: Int[np.ndarray, "q k"],
) -> Result:
    rows, pictures = [], []
    for query, file in enumerate(queries.files):
        found = [(int(i), float(cosine)) for i, cosine in zip(index[query], cosines[query])]
        for rank, (i, cosine) in enumerate(found, start=1):
            rows.append([queries.describe(query), rank, among.describe(i), f"{cosine:.6f}"])
        captions = [(among.files[i], f"{cosine:.3f}") for i, cosine in found]
        pictures.append(_captioned([(file, "query"), *captions]))
    summary = f"{cli.pluralize(len(queries), 'image')} looked up among {len(among):,}"
    return Result(["query", "rank", "file", "cosine"], rows, pictures, summary)


def _duplicates_result(
    among: FileSource, vectors: Float[np.ndarray, "n d"], groups: list[Int[np.ndarray, " m"]]
) -> Result:
    rows, pictures = [], []
    for number, group in enumerate(groups, start=1):
        unit = _unit(vectors[group])
        cosines = unit @ unit[0]
        for i, cosine in zip(group, cosines):
            rows.append([number, among.describe(i), f"{cosine:.6f}"])
        captions = [f"group {number}", *(f"{cosine:.3f}" for cosine in cosines[1:])]
        pictures.append(_captioned([(among.files[i], text) for i, text in zip(group, captions)]))
    count = sum(map(len, groups))
    summary = (
        f"{cli.pluralize(len(groups), 'group')} of near-duplicates: {count:,} of {len(among):,} "
        f"images, {count - len(groups):,} without the first of each group"
    )
    return Result(["group", "file", "cosine"], rows, pictures, summary)


def _captioned(files: Sequence[tuple[Path, str]]) -> list[tuple[Path, str]]:
    return [(file, f"{text}\n{printable_path(file)}") for file, text in files]


def distinct_files(files: Sequence[Path]) -> list[Path]:
    """Return files once each, where possible by a path that is no symlink."""
    distinct: dict[str, Path] = {}
    for file in files:
        path = os.path.realpath(file)
        if path not in distinct or (distinct[path].is_symlink() and not file.is_symlink()):
            distinct[path] = file
    if repeated := len(files) - len(distinct):
        log.info("%d files of --among are there more than once, and count once", repeated)
    return list(distinct.values())


def same_files(queries: Sequence[Path], among: Sequence[Path]) -> list[list[int]]:
    """Return for each query the positions of the same file in `among`, through links, too."""
    positions = defaultdict(list)
    for index, file in enumerate(among):
        positions[os.path.realpath(file)].append(index)
    return [positions.get(os.path.realpath(file), []) for file in queries]


def most_similar(
    bank: Float[np.ndarray, "n d"],
    queries: Float[np.ndarray, "q d"],
    own: Sequence[Sequence[int]],
    top: int,
    *,
    bank_tile: int = BANK_TILE,
    query_tile: int = QUERY_TILE,
) -> tuple[Float[np.ndarray, "q top"], Int[np.ndarray, "q top"]]:
    """Return cosines and indices of the `top` vectors nearest to each query, nearest first.

    Args:
      own: indices that a query must not find.
    """
    neighbors = NearestNeighbors(bank, bank_tile)
    cosines, index = np.empty((len(queries), top), np.float32), np.empty((len(queries), top), int)
    for start in range(0, len(queries), query_tile):
        found = neighbors.search(queries[start : start + query_tile], top + max(map(len, own)))
        for query, (row, columns) in enumerate(zip(*found), start):
            others = np.flatnonzero(~np.isin(columns, own[query]))[:top]
            cosines[query], index[query] = row[others], columns[others]
    return cosines, index


def duplicate_groups(
    vectors: Float[np.ndarray, "n d"], threshold: float, *, tile: int = PAIR_TILE
) -> list[Int[np.ndarray, " m"]]:
    """Return groups of at least two vectors, ordered by their first ones.

    Two vectors are in one group if their cosine is at least `threshold`, or if others connect them.
    """
    unit, count = _unit(vectors), len(vectors)
    first = np.arange(count)  # of the group of each vector
    size = lambda start: min(tile, count - start)
    for start in console.progress(range(0, count, tile), count, "images", size):
        for other in range(start, count, tile):
            near = np.asarray(
                _are_near(_rows(unit, start, tile), _rows(unit, other, tile), threshold)
            )
            for row in np.flatnonzero(near.any(axis=1)):
                members = np.append(other + np.flatnonzero(near[row]), start + row)
                merged = np.unique(first[members])
                if len(merged) > 1:
                    first[np.isin(first, merged)] = merged[0]
    members = np.argsort(first, kind="stable")
    groups = np.split(members, np.flatnonzero(np.diff(first[members])) + 1)
    return [group for group in groups if len(group) > 1]


def _rows(vectors: np.ndarray, start: int, size: int) -> np.ndarray:
    """Return `size` vectors, with zeros, which are near none, after the last."""
    rows = vectors[start : start + size]
    return np.pad(rows, ((0, min(size, len(vectors)) - len(rows)), (0, 0)))


@jax.jit
def _are_near(
    vectors: Float[Array, "a d"], others: Float[Array, "b d"], threshold: float
) -> Bool[Array, "a b"]:
    cosines = jnp.matmul(vectors, others.T, precision=jax.lax.Precision.HIGHEST)
    return cosines >= threshold - ROUNDING


def _unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


if __name__ == "__main__":
    cli.run_command(main)
