"""Comparison of sources with a folder of the same images, and tar shards of it."""

import io
import tarfile

import jax
import numpy as np
import pytest

from mae_jax.data.sources import FolderSource
from mae_jax.train import recipes
from mae_jax.train.build_data import make_loader
from mae_jax.train.build_sources import make_eval_source, make_train_source
from mae_jax.train.config import from_config_dict


def config_of(**data):
    config = recipes.base()
    config.batch_size = 8
    config.model.update(image_size=(16, 16), patch=8)
    config.data.update(threads=1, **data)
    return from_config_dict(config)


def batches(config, index_dir, host=0, hosts=1, start=0):
    """Return the training batches of a host, from a step to the third."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "process_index", lambda: host)
        patch.setattr(jax, "process_count", lambda: hosts)
        source = make_train_source(config, index_dir)
        iterator = make_loader(config, source, 2, np.dtype(np.uint8)).batches(start)
        found = [{k: v.copy() for k, v in next(iterator).items()} for _ in range(4 - start)]
        iterator.close()
    return found


def assert_same_as_folder(folder, index_dir, **data):
    """Assert that the batches of a dataset are bit-identical to those of a folder of its images.

    On one host and two, after resuming, and in evaluation.
    """
    expected = batches(config_of(source="folder", path=str(folder)), index_dir)
    config = config_of(**data)
    for host in range(2):
        rows = slice(4 * host, 4 * host + 4)
        for batch, other in zip(batches(config, index_dir, host, 2), expected, strict=True):
            for name in other:
                np.testing.assert_array_equal(batch[name], other[name][rows])
    for name, array in batches(config, index_dir, start=3)[0].items():
        np.testing.assert_array_equal(array, expected[3][name])
    evaluation, images = make_eval_source(config, (), None), FolderSource(str(folder), "validation")
    assert [evaluation[i] for i in range(len(evaluation))] == [images[i] for i in range(20)]


def write_tar(path, members, **options):
    """Write a tar file of members (bytes or text by name); return its path."""
    with tarfile.open(path, "w", **options) as file:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return path


def write_shards(source, folder, name, count=3):
    """Write the images of a folder of classes to shards, in order, with labels."""
    folder.mkdir(exist_ok=True)
    for shard, indices in enumerate(np.array_split(np.arange(len(source)), count)):
        members = {}
        for index in indices:
            key = source.files[index].replace("/", "_").removesuffix(".png")
            members |= {
                f"{key}.cls": str(source.label(index)),
                f"{key}.png": source[index]["image"],
            }
        write_tar(folder / f"{name}-{shard:03}.tar", members)
