"""Every config key reaches the object that it configures."""

from functools import cached_property, partial
from operator import attrgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_tfds import TFRECORDS

from configs import finetune, knn, linprobe, pretrain, segment
from mae_jax.convert.model_info import ConvertError
from mae_jax.data.sources import DataError
from mae_jax.distributed.sharding import make_mesh
from mae_jax.tasks.optimizer import adamw, lars
from mae_jax.tasks.train_step import init_state
from mae_jax.train import build_data, build_evaluators, build_model, build_sources, recipes
from mae_jax.train.config import from_config_dict
from mae_jax.train.init_state import split_rng
from mae_jax.train.loop import make_prefetcher
from mae_jax.train.setup import build, make_step, select_attention
from mae_jax.train.warm_start import load_init_weights
from mae_jax.utils.errors import UserError
from mae_jax.utils.pytree import flatten, map_with_path

TINY = {
    "batch_size": 8,
    "steps": 10,
    "model.image_size": (16, 24),
    "model.patch": 8,
    "model.width": 16,
    "model.depth": 2,
    "model.heads": 2,
    "model.dtype": "float32",
    "model.decoder_width": 16,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "optim.warmup_steps": 4,
    "data.source": "folder",
    "eval.knn_every_epochs": 3.0,
    "init.path": "random",
}
BANDS = {"data.train_split": "bands", "data.eval_split": "bands", "model.channels": 5}
BANDS |= {"data.source": "arrays", "data.mean": (0.5,) * 5, "data.std": (0.2,) * 5}
MASKED = {"data.train_split": "masked", "data.eval_split": "masked", "data.source": "arrays"}
MASKED |= {"segment.num_classes": 4}
# Where rows begin: a recipe, and what has to be set for a key to matter.
FLAVORS = {
    "pretrain": (pretrain, {}),
    "bands": (pretrain, BANDS),
    "epochs": (pretrain, {"steps": None, "optim.warmup_steps": None}),
    "on device": (pretrain, {"data.resize_on": "device"}),
    "finetune": (finetune, {}),
    "linprobe": (linprobe, {}),
    "lars": (finetune, {"optim.name": "lars", "optim.layer_decay": 1.0}),
    "on fixed images": (linprobe, {"data.augment": "none"}),
    "knn": (knn, {"steps": 0, "classify.head": True}),
    "segment": (segment, MASKED),
    "upsample": (segment, MASKED | {"segment.head": "upsample"}),
}


def config_of(flavor, folder, changes):
    recipe, values = FLAVORS[flavor]
    config = recipe.get_config()
    config.update_from_flattened_dict({**TINY, "data.path": str(folder), **values, **changes})
    return from_config_dict(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Noise in two classes: 32 images to train on, 8 to evaluate on, and 8 of 5 channels."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("validation", 4)):
        for label in "ab":
            (folder / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{number}.png")
    bands, labels = rng.integers(0, 256, (8, 20, 30, 5), dtype=np.uint8), np.arange(8) % 2
    np.savez(folder / "bands.npz", image=bands, label=labels)
    np.savez(folder / "train.npz", image=bands[..., :3], label=labels)
    np.savez(folder / "masked.npz", image=bands[..., :3], mask=bands[..., 3] % 4)
    return folder


class Parts:
    """What is built from a config, on demand."""

    def __init__(self, config, folder):
        self.config, self.folder = config, folder

    @cached_property
    def train_source(self):
        return build_sources.make_train_source(self.config, self.folder)

    @cached_property
    def eval_source(self):
        return build_sources.make_eval_source(self.config, self.train_source.classes, self.folder)

    @property
    def train_images(self):
        return len(self.train_source)

    @property
    def first_split(self):
        return self.train_source.describe(0).split("/")[-3]

    @cached_property
    def task(self):
        return build_model.make_task(self.config, make_mesh(), self.train_source.classes)

    @property
    def cost(self):
        """Of the encoder and its gradients, per image."""
        return build_model.flops_per_image(self.config, self.task)

    @cached_property
    def loader(self):
        classes = getattr(self.task.model, "num_classes", None)
        return build_data.make_loader(self.config, self.train_source, classes, np.dtype(np.uint8))

    @cached_property
    def eval_transform(self):
        return build_data.make_eval_transform(self.config)

    @cached_property
    def length(self):
        return build_model.make_run_length(self.config, len(self.train_source))

    @cached_property
    def rates(self):
        """Learning rates: the largest, the step that has it, and the last."""
        rate = build_model.make_learning_rate(self.config, self.length)
        rates = [float(rate(step)) for step in range(self.length.total_steps + 1)]
        return max(rates), rates.index(max(rates)), rates[-1]

    @cached_property
    def evaluators(self):
        """Evaluators by name; none of them is run, so there is nothing to log."""
        built = build_evaluators.make_evaluators(
            self.config,
            self.task,
            train_source=self.train_source,
            eval_source=self.eval_source,
            length=self.length,
            mesh=make_mesh(),
            writer=None,
            workdir=self.folder,
            init_key=jax.random.key(0),
            heartbeat=lambda _: None,
        )
        return {type(evaluator).__name__: evaluator for evaluator in built}

    @property
    def accuracy(self):
        return self.evaluators["AccuracyEvaluator"]

    @property
    def segmentation(self):
        return self.evaluators["SegmentationEvaluator"]

    @property
    def masks_drawn(self):
        return len(self.evaluators["SegmentationPictures"].masks)

    @property
    def features(self):
        return self.evaluators["FeatureEvaluator"]

    @property
    def drawn(self):
        return self.evaluators["ReconstructionEvaluator"]

    @property
    def has_baselines(self):
        return self.features.baseline_key is not None

    @property
    def pictures_drawn(self):
        return len(self.drawn.pictures.images)

    @property
    def eval_rows(self):
        return len(next(iter(self.features.bank.read()))["image"])


close = partial(pytest.approx, rel=1e-5)
ENCODER, DECODER, AUGMENT = (
    "task.model.encoder.",
    "task.model.decoder.",
    "loader.transform.augment.",
)
BOTH = (ENCODER, DECODER)
# Flavor -> (key, value, where it is to be found[, as what, if not as the value itself]).
ROWS = {
    "pretrain": [
        ("task", "classify", "task.__class__.__name__", "Classify"),
        ("seed", 7, "loader.seed"),
        ("batch_size", 16, "loader.batch_size"),
        ("batch_size", 16, "length.steps_per_epoch", 2),
        ("batch_size", 16, "rates", close((1.5e-4 * 16 / 256, 4, 0.0))),
        ("steps", 20, "length.total_steps"),
        ("model.image_size", (24, 32), "loader.transform.image_size"),
        ("model.image_size", (24, 32), "eval_transform.image_size"),
        ("model.image_size", (24, 32), "task.grid", (3, 4)),
        ("model.image_size", (24, 32), ENCODER + "grid", (3, 4)),
        ("model.image_size", (24, 32), DECODER + "grid", (3, 4)),
        ("model.channels", 1, "loader.transform.channels"),
        ("model.channels", 1, "eval_transform.channels"),
        ("model.channels", 1, DECODER + "patch_values", 8 * 8),
        ("model.patch", 4, "task.patch"),
        ("model.patch", 4, "task.grid", (4, 6)),
        ("model.width", 32, ENCODER + "width"),
        ("model.depth", 3, ENCODER + "depth"),
        ("model.heads", 4, ENCODER + "num_heads"),
        ("model.decoder_width", 32, DECODER + "width"),
        ("model.decoder_depth", 3, DECODER + "depth"),
        ("model.decoder_heads", 4, DECODER + "num_heads"),
        *[("model.mlp_ratio", 2.0, part + "mlp_ratio") for part in BOTH],
        *[("model.class_tokens", 3, part + "class_tokens") for part in BOTH],
        *[("model.position", "learned", part + "pos_embed") for part in BOTH],
        *[("model.layer_norm_eps", 0.1, part + "layer_norm_eps") for part in BOTH],
        *[("model.dtype", "bfloat16", part + "execution.dtype", jnp.bfloat16) for part in BOTH],
        *[("model.remat", "dots", part + "execution.remat") for part in BOTH],
        *[("model.scan_unroll", 1, part + "execution.scan_unroll") for part in BOTH],
        ("mask.kind", "block", "task.mask"),
        ("mask.ratio", 0.5, "task.mask_ratio"),
        ("pretrain.drop_path", 0.5, ENCODER + "drop_path"),
        ("decoder.predict_ratio", 0.5, "task.predict_ratio"),
        ("target.norm_pix", False, "task.norm_pix"),
        ("target.norm_pix_eps", 0.1, "task.norm_pix_eps"),
        ("optim.base_lr", 0.32, "rates", close((0.01, 4, 0.0))),
        ("optim.min_lr", 1e-6, "rates", close((1.5e-4 * 8 / 256, 4, 1e-6))),
        ("optim.warmup_steps", 2, "rates", close((1.5e-4 * 8 / 256, 2, 0.0))),
        ("data.source", "arrays", "train_source.__class__.__name__", "ArraySource"),
        ("data.train_split", "validation", "first_split"),
        ("data.eval_split", "elsewhere", "eval_source", None),
        ("data.shots", 3, "train_images", 6),
        ("data.exif", True, "loader.transform.exif"),
        ("data.exif", True, "eval_transform.exif"),
        ("data.bit_depth", 12, "loader.transform.bit_depth"),
        ("data.bit_depth", 12, "eval_transform.bit_depth"),
        ("data.augment", "weak_crop", "loader.transform.weak", True),
        ("data.augment", "none", "loader.transform.__class__.__name__", "EvalTransform"),
        ("data.crop_scale", (0.3, 0.4), "loader.transform.scale"),
        ("data.flip", False, "loader.transform.flip"),
        ("data.eval_crop", 0.6, "eval_transform.crop"),
        ("data.mean", (0.1, 0.2, 0.3), "task.mean"),
        ("data.std", (0.1, 0.2, 0.3), "task.std"),
        (
            "data.resize_on",
            "device",
            "loader.transform.__class__.__name__",
            "DeviceResizeTransform",
        ),
        ("data.in_memory", True, "train_source.__class__.__name__", "InMemory"),
        ("data.in_memory", True, "eval_source.__class__.__name__", "InMemory"),
        ("data.workers", 2, "loader.workers"),
        ("data.threads", 9, "loader.threads"),
        ("data.on_bad", "skip", "loader.skip", True),
        ("data.max_bad", 5, "loader.max_bad"),
        ("eval.knn_every_epochs", 2.0, "features.every", 8),
        ("eval.knn_k", (3, 4), "features.ks"),
        ("eval.knn_temperature", 0.5, "features.temperature"),
        ("eval.knn_bank", 6, "features.bank.count"),
        ("eval.knn_queries", 6, "features.queries.count"),
        ("eval.rankme", False, "features.rankme"),
        ("eval.linear", True, "features.linear"),
        ("eval.baselines", True, "has_baselines"),
        ("eval.pictures_every_epochs", 2.0, "drawn.every", 8),
        ("eval.pictures", 3, "pictures_drawn"),
        ("eval.stats", "gt", "drawn.pictures.stats"),
        ("eval.batch_size", 12, "eval_rows"),
    ],
    "bands": [("eval.show_channels", (4, 2, 0), "drawn.pictures.show")],
    "epochs": [
        ("epochs", 200.0, "length.total_steps", 800),
        ("optim.warmup_epochs", 5.0, "length.warmup_steps", 20.0),
    ],
    "on device": [("data.canvas", 64, "loader.transform.side")],
    "finetune": [
        ("model.image_size", (24, 32), ENCODER + "grid", (3, 4)),
        ("model.width", 32, ENCODER + "width"),
        ("model.depth", 3, ENCODER + "depth"),
        ("model.heads", 4, ENCODER + "num_heads"),
        ("model.patch", 4, "task.patch"),
        ("model.mlp_ratio", 2.0, ENCODER + "mlp_ratio"),
        ("model.position", "sincos", ENCODER + "pos_embed"),
        ("model.layer_norm_eps", 0.1, ENCODER + "layer_norm_eps"),
        ("model.dtype", "bfloat16", ENCODER + "execution.dtype", jnp.bfloat16),
        ("model.remat", "dots", ENCODER + "execution.remat"),
        ("classify.num_classes", 5, "task.model.num_classes"),
        ("classify.num_classes", 5, "loader.num_classes"),
        ("classify.pool", "cls", "task.model.pool"),
        ("classify.fc_norm", False, "task.model.fc_norm"),
        ("classify.fc_norm", False, ENCODER + "final_norm", True),
        ("classify.head_norm", True, "task.model.head_norm"),
        ("classify.head_init_std", 0.5, "task.model.head_init_std"),
        ("classify.drop_path", 0.5, ENCODER + "drop_path"),
        ("classify.smoothing", 0.5, "task.smoothing"),
        ("classify.mixup", 0.3, "task.mixup.mixup"),
        ("classify.cutmix", 0.3, "task.mixup.cutmix"),
        ("classify.mixup_prob", 0.3, "task.mixup.prob"),
        ("classify.mixup_switch", 0.3, "task.mixup.switch"),
        ("classify.mixup_mode", "elem", "task.mixup.mode"),
        ("classify.erase", 0.3, "task.erase"),
        ("data.mean", (0.1, 0.2, 0.3), "task.mean"),
        ("data.mean", (0.2, 0.4, 0.6), AUGMENT + "fill", (51, 102, 153)),
        ("data.std", (0.1, 0.2, 0.3), "task.std"),
        ("data.augment", "crop", "loader.transform.augment", None),
        ("data.randaugment_magnitude", 5.0, AUGMENT + "magnitude"),
        ("data.randaugment_std", 0.1, AUGMENT + "std"),
        ("data.randaugment_layers", 5, AUGMENT + "layers"),
        ("eval.accuracy_every_epochs", 3.0, "accuracy.every", 12),
    ],
    "on fixed images": [("data.cache_features", True, "cost", 0.0)],
    "linprobe": [("data.augment", "crop", "loader.transform.weak", False)],
    "knn": [("classify.head", False, "task.model.num_classes", 0)],
    "segment": [
        ("segment.head", "upsample", "task.model.upsample_width", 256),
        ("segment.head_norm", True, "task.model.head_norm"),
        ("segment.num_classes", 5, "task.model.num_classes"),
        ("segment.num_classes", 5, "loader.transform.num_classes"),
        ("segment.ignore", 3, "task.ignore"),
        ("segment.ignore", 3, "loader.transform.ignore"),
        ("segment.ignore", 3, "eval_transform.ignore"),
        ("segment.drop_path", 0.5, ENCODER + "drop_path"),
        ("segment.scale", (0.3, 0.4), "loader.transform.scale"),
        ("data.flip", False, "loader.transform.flip"),
        ("data.mean", (0.2, 0.4, 0.6), "loader.transform.fill", (51, 102, 153)),
        ("data.bit_depth", 12, "loader.transform.bit_depth"),
        ("data.augment", "none", "loader.transform.__class__.__name__", "WholeTransform"),
        ("eval.accuracy_every_epochs", 3.0, "segmentation.every", 3),
        ("eval.pictures", 3, "masks_drawn"),
    ],
    "upsample": [("segment.head_width", 8, "task.model.upsample_width")],
}
FLAT = [(flavor, *row) for flavor, rows in ROWS.items() for row in rows]


@pytest.mark.parametrize("row", FLAT, ids=lambda row: f"{row[0]}: {row[1]}: {row[3]}")
def test_a_key_reaches_its_place(folder, row):
    flavor, key, value, place, *expected = row
    expected = expected[0] if expected else value
    plain, changed = (
        Parts(config_of(flavor, folder, changes), folder) for changes in ({}, {key: value})
    )
    see = attrgetter(place)
    assert see(plain) != expected
    assert see(changed) == expected


# Two blocks, and all that an optimizer treats otherwise than the rest; few shapes, to compile less.
SHAPES = {
    "encoder": {
        "cls_token": (1, 2, 2),
        "pos_embed": {"table": (1, 2, 2)},
        "blocks": {"kernel": (2, 2, 2), "bias": (2, 2)},
        "norm": {"scale": (2,)},
    },
    "head": {"kernel": (2, 2), "bias": (2,)},
}
PRETRAINED = partial(adamw, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05)
FINETUNED = partial(
    PRETRAINED, b2=0.999, layer_decay=0.65, no_weight_decay=("cls_token", "pos_embed")
)
PROBED = partial(lars, momentum=0.9, weight_decay=0.0, train_last_blocks=0)
LARS = partial(lars, momentum=0.9, weight_decay=0.05, no_weight_decay=("cls_token", "pos_embed"))
OPTIMIZERS = {"pretrain": PRETRAINED, "finetune": FINETUNED, "linprobe": PROBED, "lars": LARS}
OPTIMIZER_ROWS = [
    ("pretrain", "optim.b1", 0.5, partial(PRETRAINED, b1=0.5)),
    ("pretrain", "optim.b2", 0.5, partial(PRETRAINED, b2=0.5)),
    ("pretrain", "optim.eps", 0.5, partial(PRETRAINED, eps=0.5)),
    ("pretrain", "optim.weight_decay", 0.5, partial(PRETRAINED, weight_decay=0.5)),
    ("pretrain", "optim.clip_norm", 0.5, partial(PRETRAINED, clip_norm=0.5)),
    ("finetune", "optim.layer_decay", 0.5, partial(FINETUNED, layer_decay=0.5)),
    ("finetune", "optim.decay_embeddings", True, partial(FINETUNED, no_weight_decay=())),
    ("finetune", "optim.train_last_blocks", 1, partial(FINETUNED, train_last_blocks=1)),
    ("lars", "optim.decay_embeddings", True, partial(LARS, no_weight_decay=())),
    ("linprobe", "optim.momentum", 0.5, partial(PROBED, momentum=0.5)),
    ("linprobe", "optim.weight_decay", 0.5, partial(PROBED, weight_decay=0.5)),
    ("linprobe", "optim.train_last_blocks", None, partial(PROBED, train_last_blocks=None)),
    (
        "linprobe",
        "optim.name",
        "adamw",
        partial(PRETRAINED, weight_decay=0.0, train_last_blocks=0),
    ),
]


def second_update(tx):
    """Of gradients that grow: the first update of AdamW knows nothing of its averages."""
    rng = np.random.default_rng(0)
    draw = lambda size: map_with_path(
        lambda _, shape: size * jnp.array(rng.normal(size=shape)), SHAPES
    )
    params = draw(1.0)
    _, state = tx.update(draw(1.0), tx.init(params), params)
    updates, _ = tx.update(draw(5.0), state, params)
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(updates)])


@pytest.fixture(scope="module")
def plain_runs(folder):
    return {name: build(config_of(name, folder, {}), folder / "run") for name in OPTIMIZERS}


@pytest.mark.parametrize("flavor", OPTIMIZERS)
def test_optimizers_of_the_recipes(plain_runs, flavor):
    run = plain_runs[flavor]
    expected = second_update(OPTIMIZERS[flavor](run.learning_rate))
    np.testing.assert_array_equal(second_update(run.tx), expected)


@pytest.mark.parametrize("row", OPTIMIZER_ROWS, ids=lambda row: f"{row[0]}: {row[1]}")
def test_a_key_reaches_the_optimizer(folder, plain_runs, row):
    """It updates parameters as one that is made by hand, and not as without the change."""
    flavor, key, value, expected = row
    run = build(config_of(flavor, folder, {key: value}), folder / "run")
    updates = second_update(run.tx)
    np.testing.assert_array_equal(updates, second_update(expected(run.learning_rate)))
    assert np.any(updates != second_update(plain_runs[flavor].tx))


def test_accumulation_and_the_average_reach_the_step(folder):
    """A BatchNorm counts the parts of a batch; the average goes a tenth of the way."""
    changes = {"accumulate": 2, "optim.ema": 0.9, "optim.warmup_steps": 0, "optim.base_lr": 1e4}
    run = build(config_of("linprobe", folder, changes), folder / "run")
    state = jax.jit(lambda key: init_state(run.task, run.tx, key, with_ema=True))(jax.random.key(0))
    state = jax.device_put(state, run.layout.shardings)
    before = np.asarray(state.params["head"]["kernel"])
    feed = make_prefetcher(run.loader, 0, run.mesh, lambda _: None)
    state, _ = make_step(run)(state, next(feed))
    feed.close()
    assert state.batch_stats["head_norm"]["count"] == 2
    after, average = (np.asarray(x["head"]["kernel"]) for x in (state.params, state.ema))
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(average - before, 0.1 * (after - before), rtol=1e-4, atol=1e-7)


def test_the_seed_is_that_of_the_first_parameters_and_of_what_is_drawn(folder):
    for seed in (0, 7):
        config = config_of("pretrain", folder, {"seed": seed})
        for found, expected in zip(split_rng(config.seed), jax.random.split(jax.random.key(seed))):
            assert found == expected


def test_first_weights_of_a_head_are_as_large_as_told(folder):
    kernels = []
    for std in (0.5, 1.0):
        config = config_of("finetune", folder, {"classify.head_init_std": std})
        init = Parts(config, folder).task.init
        kernels.append(
            jax.jit(lambda key, init=init: init(key)["head"]["kernel"])(jax.random.key(0))
        )
    np.testing.assert_allclose(2 * kernels[0], kernels[1], rtol=1e-6)
    assert 0.7 < np.std(kernels[1]) < 1.4


def test_a_mask_of_the_users(folder, tmp_path):
    mask = np.arange(6) < 4
    np.save(tmp_path / "mask.npy", mask)
    changes = {"mask.kind": "user", "mask.path": str(tmp_path / "mask.npy")}
    task = Parts(config_of("pretrain", folder, changes), folder).task
    np.testing.assert_array_equal(task.user_mask, mask)


def test_attention_that_does_not_run_here_is_refused(folder):
    run = build(config_of("pretrain", folder, {"model.attention": "cudnn"}), folder / "run")
    with pytest.raises(UserError, match="model.attention='cudnn'"):
        select_attention(run)


def test_a_tfds_data_set_is_found_by_its_name_folder_and_feature(folder, tmp_path):
    changes = {"data.source": "tfds", "data.name": "many_bands", "data.path": str(TFRECORDS)}
    config = config_of("pretrain", folder, changes | {"data.image_feature": "bands"})
    assert build_sources.make_train_source(config, tmp_path)[0]["image"].shape[-1] > 3


def test_evaluation_skips_as_many_bad_images_as_it_may(folder, tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.png").write_bytes(b"no image")
        Image.new("RGB", (20, 30)).save(tmp_path / f"good{number}.png")

    def parts(**changes):
        changes = {f"data.{name}": value for name, value in changes.items()}
        return Parts(config_of("pretrain", tmp_path, changes | {"eval.pictures": 8}), tmp_path)

    def valid(parts):
        images = build_data.make_eval_batches(parts.config, parts.train_source, make_mesh())
        return sum(batch["valid"].sum() for batch in images.read())

    assert valid(parts(on_bad="skip", max_bad=4)) == 4
    assert parts(on_bad="skip", max_bad=4).pictures_drawn == 8
    for few in (parts(on_bad="skip", max_bad=3), parts()):
        with pytest.raises(DataError, match=r"data.max_bad=3|is bad"):
            valid(few)
        with pytest.raises(DataError, match=r"data.max_bad=3|is bad"):
            _ = few.evaluators


def test_a_decoder_is_left_out_where_asked(folder, golden):
    pretrained = str(golden / "mae" / "p0_plain" / "state_dict.safetensors")
    shape = {"init.path": pretrained, "model.image_size": (32, 32), "model.width": 32}
    shape |= {"model.decoder_width": 32}

    def start(**changes):
        changes = {f"init.{name}": value for name, value in changes.items()}
        config = config_of("pretrain", folder, shape | changes)
        task = Parts(config, folder).task
        arrays = jax.eval_shape(task.init, jax.random.key(0))
        return load_init_weights(config, task, arrays, ())

    assert start().missing == []
    assert {name.split("/")[0] for name in start(encoder_only=True).loaded} == {"encoder"}
    with pytest.raises(ConvertError, match="only these have EMA parameters"):
        start(ema=True)


SEEN = {
    "accumulate": "test_accumulation_and_the_average_reach_the_step",
    "optim.ema": "test_accumulation_and_the_average_reach_the_step",
    "mask.path": "test_a_mask_of_the_users",
    "mask.cell": "test_pixio_recipe.py: test_recipe",
    "model.attention": "test_attention_that_does_not_run_here_is_refused",
    "data.name": "test_a_tfds_data_set_is_found_by_its_name_folder_and_feature",
    "data.image_feature": "test_a_tfds_data_set_is_found_by_its_name_folder_and_feature",
    "data.path": "without it no test here would find an image",
    "data.sampling.scores": "test_sampling.py: which images are kept",
    "data.sampling.loss": "test_sampling.py: which images are kept",
    "data.sampling.min_entropy": "test_sampling.py: which images are kept",
    "data.sampling.min_side": "test_sampling.py: which images are kept",
    "data.nodata": "test_nodata_training.py: test_every_task_fills_what_the_config_names",
    "data.bands": "test_bands.py: which bands are read",
    "data.dicom_window": "test_dicom.py: which values are read",
    "data.shots_seed": "test_config.py: which images are chosen",
    "init.encoder_only": "test_a_decoder_is_left_out_where_asked",
    "init.ema": "test_a_decoder_is_left_out_where_asked",
    "init.path": "test_classify_runs.py: what is loaded from it",
    "init.new_head": "test_classify_runs.py: which arrays are fresh",
    "eval.segment_knn": "test_segmentation.py: what is measured in a run",
    "segment.mask_feature": "test_segment_runs.py: which feature is missing",
    "resume.allow": "test_checkpoint.py, test_cli.py: what is refused",
}
# Keys that change when and where things are done, written or given up, but no number.
NOTHING_COMPUTED = ("log.", "health.", "checkpoint.", "mesh.")


def test_no_key_is_forgotten():
    """A new key has to go into a table above, or into SEEN with what tests it."""
    tabled = {row[1] for row in FLAT + OPTIMIZER_ROWS}
    assert not tabled & SEEN.keys()
    keys = {
        key
        for key in flatten(recipes.base().to_dict(), sep=".")
        if not key.startswith(NOTHING_COMPUTED)
    }
    assert tabled | SEEN.keys() == keys
