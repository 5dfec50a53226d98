"""The config of a run: every key with its type, default, bounds, unit and meaning.

Recipes (`configs/`) set values on the ConfigDict of `recipes.base()`, and the command line
overrides them: `--config.optim.base_lr=1e-4`. `from_config_dict` turns that back into a `Config`,
once, when a run starts; everything below reads typed attributes.

To add a key, declare it here and read it where it is used.
"""

from dataclasses import dataclass
from typing import ClassVar

from ml_collections import ConfigDict

from mae_jax.data.factory import SHARDS, SOURCE_TYPES
from mae_jax.data.read_options import ReadOptions
from mae_jax.data.transforms import AUGMENTS
from mae_jax.distributed.sharding import MAX_REPLICATED, MIN_SPLIT_BYTES
from mae_jax.evaluate.figures import PATCH_STATS
from mae_jax.models.classifier import POOLS
from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.models.layers import REMAT_POLICIES
from mae_jax.models.segmentation import HEADS
from mae_jax.models.variants import get_variant
from mae_jax.models.vit import POS_EMBEDS
from mae_jax.tasks.masking import SAMPLERS
from mae_jax.tasks.mixup import MODES
from mae_jax.train.config_schema import Group, group_from_dict, key
from mae_jax.train.loggers import NAMES
from mae_jax.utils.paths import is_address
from mae_jax.utils.sides import Sides

_B = get_variant("vit_b16")


@dataclass(frozen=True)
class InitConfig(Group):
    """Where the first parameters come from (warm start)."""

    prefix: ClassVar[str] = "init."
    resumable: ClassVar[bool] = True
    path: str | None = key(
        None,
        "checkpoint to start from: official, Hugging Face, timm, a workdir, or org/name on the hub;"
        " 'random' starts from random weights, which tasks with labels do only when asked",
        checkpoint=True,
    )
    ema: bool = key(False, "load the EMA parameters of a workdir")
    encoder_only: bool = key(False, "ignore the decoder of the checkpoint")
    new_head: bool = key(False, "ignore the head of the checkpoint (reset the head)")


@dataclass(frozen=True)
class ModelConfig(Group):
    """The ViT encoder and the MAE decoder."""

    prefix: ClassVar[str] = "model."
    image_size: tuple[int, int] = key((224, 224), "height and width, pixels", low=1)
    channels: int = key(
        3, "1 (gray), 3 (RGB), or as many as the arrays of the dataset have", low=1, reshapes=True
    )
    patch: Sides = key(
        _B.patch, "side of a patch, or (height, width), pixels", low=1, reshapes=True
    )
    width: int = key(_B.width, "embedding dimension of the encoder", low=1, reshapes=True)
    depth: int = key(_B.depth, "encoder blocks", low=1, reshapes=True)
    heads: int = key(_B.heads, "attention heads of the encoder", low=1)
    decoder_width: int = key(
        _B.decoder_width, "embedding dimension of the decoder", low=1, reshapes=True
    )
    decoder_depth: int = key(_B.decoder_depth, "decoder blocks", low=1, reshapes=True)
    decoder_heads: int = key(_B.decoder_heads, "attention heads of the decoder", low=1)
    mlp_ratio: float = key(4.0, "hidden width of an MLP over its width", above=0, reshapes=True)
    class_tokens: int = key(
        1,
        "learned tokens before those of the patches, each with a position of its own",
        low=1,
        reshapes=True,
        implied=1,
    )
    position: str = key(
        "sincos",
        "positional embedding: 'sincos' is fixed; 'learned' starts from the same table;"
        " 'learned_random' starts from N(0, 0.02), as Pixio's",
        choices=POS_EMBEDS,
    )
    layer_norm_eps: float = key(1e-6, "epsilon of layer normalization", low=0)
    dtype: str = key(
        "float32",
        "of activations (mixed precision with 'bfloat16'); parameters are always float32",
        choices=("float32", "bfloat16"),
    )
    attention: str = key(
        "auto",
        "attention implementation: 'xla', 'cudnn' (fused), or 'auto': a fused kernel in bfloat16 on"
        " TPUs and on NVIDIA GPUs of compute capability 8.0 or higher, where a trial at the start"
        " succeeds; else xla",
        resumable=True,
    )
    remat: str = key(
        "none",
        "rematerialization (activation checkpointing): 'none', 'dots' (recompute all but matmuls)"
        " or 'full'",
        choices=tuple(REMAT_POLICIES),
        resumable=True,
    )
    scan_unroll: int | None = key(
        None,
        "blocks per iteration of the loop over depth; by default all, without a loop, which runs"
        " faster; 1 compiles faster",
        low=1,
        resumable=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mlp_ratio * min(self.width, self.decoder_width) < 1:
            raise self.error("mlp_ratio", "gives an MLP without hidden units")


@dataclass(frozen=True)
class MaskConfig(Group):
    """Which patches are hidden from the encoder."""

    prefix: ClassVar[str] = "mask."
    kind: str = key(
        "random",
        "masking strategy: 'random', 'block', 'grid' (paper Table 1f), or 'user' (mask.path)",
        choices=(*SAMPLERS, "user"),
    )
    ratio: float = key(
        0.75, "fraction of patches (of cells) to hide, between 0 and 1; some must stay visible"
    )
    cell: int = key(
        1,
        "for kind 'random': hide whole cells of so many patches a side, as Pixio's 4; 1 is MAE",
        low=1,
        implied=1,
    )
    path: str | None = key(
        None,
        "for kind 'user': .npy of bool [patches] or [batch, patches], True where hidden",
        path=True,
    )


@dataclass(frozen=True)
class PretrainConfig(Group):
    """Regularization of task='pretrain'."""

    prefix: ClassVar[str] = "pretrain."
    drop_path: float = key(
        0.0,
        "stochastic depth rate of the encoder's last block, falling to 0 in the first",
        low=0,
        below=1,
        implied=0.0,
    )


@dataclass(frozen=True)
class DecoderConfig(Group):
    """What the decoder predicts in training."""

    prefix: ClassVar[str] = "decoder."
    predict_ratio: float = key(
        1.0,
        "fraction of the masked patches, sampled per image and step, that the decoder sees and"
        " predicts; less than 1 is faster and differs from the paper",
        above=0,
        high=1,
        implied=1.0,
    )


@dataclass(frozen=True)
class TargetConfig(Group):
    """The regression target."""

    prefix: ClassVar[str] = "target."
    norm_pix: bool = key(True, "predict pixels normalized per patch (norm_pix_loss, Table 1d)")
    norm_pix_eps: float = key(1e-6, "added to the variance of a patch", low=0)


@dataclass(frozen=True)
class ClassifyConfig(Group):
    """Heads and regularization of task='classify'."""

    prefix: ClassVar[str] = "classify."
    head: bool = key(True, "False has no head, for k-NN alone (needs steps=0)")
    num_classes: int | None = key(None, "None: as many as the dataset has", low=1)
    pool: str = key(
        "cls",
        "'cls' token, 'mean' of the patches, or 'attention' of a learned query",
        choices=POOLS,
    )
    fc_norm: bool = key(False, "normalize after pooling instead of before")
    head_norm: bool = key(False, "BatchNorm without affine parameters before the linear layer")
    head_init_std: float = key(0.01, "standard deviation of the head's first weights", low=0)
    drop_path: float = key(
        0.0, "stochastic depth rate of the last block, falling to 0 in the first", low=0, below=1
    )
    smoothing: float = key(0.0, "label smoothing", low=0, high=1)
    mixup: float = key(0.0, "alpha of mixup's Beta distribution; 0 is off", low=0)
    cutmix: float = key(0.0, "alpha of CutMix's Beta distribution; 0 is off", low=0)
    mixup_prob: float = key(1.0, "probability that a batch is mixed", low=0, high=1)
    mixup_switch: float = key(0.5, "probability of CutMix if both are on", low=0, high=1)
    mixup_mode: str = key(
        "batch", "one sample per 'batch', per 'pair', or per image ('elem')", choices=MODES
    )
    erase: float = key(0.0, "probability of random erasing, per image", low=0, high=1)

    def __post_init__(self):
        super().__post_init__()
        if self.pool == "attention" and self.fc_norm:
            raise self.error("pool", "pools patches after the final norm: it needs fc_norm=False")


@dataclass(frozen=True)
class SegmentConfig(Group):
    """Masks, head and augmentation of task='segment'."""

    prefix: ClassVar[str] = "segment."
    head: str = key(
        "linear",
        "'linear': one layer for every patch; 'upsample': four levels of convolution and bilinear"
        " upsampling before it (SETR-PUP)",
        choices=HEADS,
        reshapes=True,
        implied="linear",
    )
    head_width: int = key(256, "features of head='upsample'", low=1, reshapes=True, implied=256)
    head_norm: bool = key(
        False, "BatchNorm without affine parameters before the linear layer", implied=False
    )
    num_classes: int | None = key(
        None, "None: as many as classes.txt, or the TFDS mask feature, has names", low=1
    )
    mask_feature: str = key(
        "segmentation_mask",
        "for data.source 'tfds': the mask feature",
        implied="segmentation_mask",
    )
    ignore: int = key(255, "class number of pixels that do not count", implied=255)
    drop_path: float = key(
        0.0,
        "stochastic depth rate of the last block, falling to 0 in the first",
        low=0,
        below=1,
        implied=0.0,
    )
    scale: tuple[float, float] = key(
        (0.5, 2.0),
        "data.augment 'crop': range of the size of a resized image over that which just covers the"
        " crop; the part that a smaller one leaves is ignored",
        above=0,
        implied=[0.5, 2.0],
    )

    def __post_init__(self):
        super().__post_init__()
        if self.scale[0] > self.scale[1]:
            raise self.error("scale", "must increase, as in (0.5, 2.0)")
        if self.head_norm and self.head != "linear":
            raise self.error("head_norm", "is for segment.head='linear' only")


@dataclass(frozen=True)
class OptimConfig(Group):
    """Optimizer and learning rate schedule."""

    prefix: ClassVar[str] = "optim."
    name: str = key("adamw", "'lars' is for linear probing", choices=("adamw", "lars"))
    base_lr: float = key(1.5e-4, "learning rate = base_lr * batch_size / 256", low=0)
    min_lr: float = key(0.0, "learning rate at the end of the cosine", low=0)
    warmup_epochs: float = key(40.0, "linear warm-up, epochs", low=0)
    warmup_steps: int | None = key(None, "linear warm-up, steps; overrides warmup_epochs", low=0)
    b1: float = key(0.9, "adamw: decay of the first moment", low=0, below=1)
    b2: float = key(0.95, "adamw: decay of the second moment", low=0, below=1)
    eps: float = key(1e-8, "adamw: added to the denominator", above=0)
    momentum: float = key(0.9, "lars: momentum", low=0, below=1)
    weight_decay: float = key(0.05, "of everything but biases and norms", low=0)
    decay_embeddings: bool = key(True, "weight decay of the cls token and learned positions too")
    layer_decay: float = key(
        1.0, "adamw: learning rate of a layer over that of the next (layer-wise)", above=0, high=1
    )
    train_last_blocks: int | None = key(
        None, "0 trains the head only, k also the last k blocks; None trains everything"
    )
    clip_norm: float | None = key(None, "gradient clipping: largest global norm", above=0)
    ema: float | None = key(None, "decay of the parameters' moving average", low=0, below=1)

    def __post_init__(self):
        super().__post_init__()
        if self.name == "lars" and self.layer_decay != 1:
            raise self.error("layer_decay", "is for adamw only: optim.name='lars' needs 1.0")
        if self.name == "lars" and self.clip_norm is not None:
            raise self.error("clip_norm", "is for adamw only: optim.name='lars' needs None")


@dataclass(frozen=True)
class SamplingConfig(Group):
    """Which training images are used, by their scores."""

    prefix: ClassVar[str] = "data.sampling."
    scores: str | None = key(
        None, ".npz of mae-jax data score; None uses all images", resumable=True, path=True
    )
    loss: float | None = key(
        None,
        "soft sampling: an image is kept with probability min(1, its reconstruction loss / this)",
        above=0,
    )
    min_entropy: float = key(
        0.0, "smallest entropy of an image's color histogram, bits", low=0, high=8, implied=0.0
    )
    min_side: int = key(0, "smallest short side of an image file, pixels", low=0, implied=0)

    def __post_init__(self):
        super().__post_init__()
        for name in ("loss", "min_entropy", "min_side"):
            if self.scores is None and getattr(self, name):
                raise self.error(name, "needs data.sampling.scores, by mae-jax data score")


@dataclass(frozen=True)
class DataConfig(Group):
    """Datasets and the input pipeline."""

    prefix: ClassVar[str] = "data."
    source: str = key(
        "tfds",
        "'tfds', 'folder' (of images), 'tar' (WebDataset), 'parquet', 'hf' (the cache of Hugging"
        " Face datasets), or 'arrays' (TRAIN_SPLIT.npz, EVAL_SPLIT.npz in a folder)",
        choices=SOURCE_TYPES,
    )
    name: str = key("imagenet2012", "for sources 'tfds' and 'hf': the dataset")
    path: str | None = key(
        None,
        "folder of images or shards; pattern of shards, as shards/{split}-{000..127}.tar; TFDS"
        " data_dir, or cache of 'hf', or None for their defaults",
        resumable=True,
        remote=True,
    )
    image_feature: str = key(
        "image", "name of the image feature or column; for 'tar': suffix of the images, if several"
    )
    train_split: str = key("train", "split, subfolder or .npz to train on")
    eval_split: str = key("validation", "split for k-NN, accuracy and reconstruction figures")
    shots: int | None = key(None, "few-shot: train on this many images per class", low=1)
    shots_seed: int = key(0, "seed that selects the few-shot images", low=0, high=2**32 - 1)
    sampling: SamplingConfig = SamplingConfig()
    exif: bool = key(False, "apply EXIF orientation; the reference does not")
    bit_depth: int | None = key(
        None,
        "bits that values of 16-bit files use, as 12: all levels are kept, as fractions of that"
        " range, which mean and std are for too; None reads gray and RGB pictures with 8 bits",
        low=1,
        high=16,
    )
    nodata: str | None = key(
        None,
        "values without data, per channel: a number, as -9999; 'nan'; or 'file', GDAL's NoData of"
        " each TIFF. The encoder sees data.mean there, and the loss leaves them out",
    )
    bands: str | None = key(
        None,
        "bands of TIFFs to read, in this order: names, as B04,B03,B02, or numbers from 1, as 4,3,2;"
        " None reads all",
    )
    dicom_window: str | None = key(
        None,
        "gray DICOM images in 8 bits, from a window: CENTER,WIDTH in their units, as 40,400, or"
        " 'file', that of each file; None keeps their units, as Hounsfield units",
    )
    augment: str = key(
        "crop",
        "'none'; 'crop': random resized crop (task='segment': segment.scale); 'weak_crop': linear"
        " probing's variant of it; 'randaugment': crop and RandAugment",
        choices=tuple(AUGMENTS),
    )
    crop_scale: tuple[float, float] = key(
        (0.2, 1.0), "range of a random crop's area over the image's", above=0, high=1
    )
    flip: bool = key(True, "flip half of the training images horizontally")
    randaugment_magnitude: float = key(9.0, "mean magnitude", low=0, high=10)
    randaugment_std: float = key(0.5, "standard deviation of the magnitude", low=0)
    randaugment_layers: int = key(
        2, "operations per image, each skipped with probability 0.5", low=0
    )
    cache_features: bool = key(
        False, "frozen encoder without augmentation: compute the features of each image once"
    )
    eval_crop: float | None = key(
        None,
        "center crop of evaluation over the image's sides; None, as in the reference: 224/256, and"
        " the full image above 224 pixels",
        above=0,
        high=1,
    )
    mean: tuple[float, ...] = key(
        IMAGENET_MEAN, "per channel; of uint8 images as fractions of 255, else in their units"
    )
    std: tuple[float, ...] = key(IMAGENET_STD, "per channel, in the same units", above=0)
    resize_on: str = key(
        "auto",
        "where crops are resized: 'host', 'device', or 'auto' (device on a GPU)",
        choices=("auto", "host", "device"),
        resumable=True,
    )
    canvas: int = key(
        512,
        "pixels: buffer side for on-device resize; larger crops are resized on the host",
        low=1,
        resumable=True,
    )
    in_memory: bool = key(
        False, "decode all images once and keep them, for small datasets", resumable=True
    )
    workers: int = key(
        0,
        "processes that read images; 0 uses threads of the main process, which cost less as long as"
        " its Python keeps up (docs/data.md)",
        low=0,
        resumable=True,
    )
    threads: int | None = key(
        None,
        "threads per process; None: as many as cores over all processes",
        low=1,
        resumable=True,
    )
    on_bad: str = key(
        "raise",
        "on a decode error: 'raise', or 'skip' to the next good image, counted and logged",
        choices=("raise", "skip"),
        resumable=True,
    )
    max_bad: int = key(
        100, "distinct bad images that a process skips before it gives up", low=0, resumable=True
    )

    def __post_init__(self):
        super().__post_init__()
        if self.crop_scale[0] > self.crop_scale[1]:
            raise self.error("crop_scale", "must increase, as in (0.2, 1.0)")
        if self.path and is_address(self.path) and self.source not in SHARDS:
            raise self.error(
                "path",
                f"is in an object store, which data.source={self.source!r} cannot read, only "
                f"{' and '.join(SHARDS)}: write the images to tar files, or copy the data to a "
                "local disk (docs/data.md)",
            )
        if self.nodata is not None and self.augment == "randaugment":
            raise self.error("nodata", "is not for data.augment='randaugment', of uint8 images")
        assert self.read_options  # raises an error if its texts are invalid
        if self.bands is not None and self.source == "arrays":
            raise self.error("bands", "is for TIFFs: arrays have no others than those of the file")
        if self.workers and (self.in_memory or self.source == "arrays"):
            raise self.error(
                "workers",
                "must be 0 for images in memory, which threads of the main process read; each "
                "worker process would hold a copy of them",
            )

    @property
    def read_options(self) -> ReadOptions:
        """Return how image files are read."""
        return ReadOptions(self.nodata, self.bands, self.dicom_window)


@dataclass(frozen=True)
class EvalConfig(Group):
    """Evaluation during and after training."""

    prefix: ClassVar[str] = "eval."
    resumable: ClassVar[bool] = True
    accuracy_every_epochs: float = key(
        1.0, "classify: top-1, segment: mIoU; 0 evaluates at the end only"
    )
    knn_every_epochs: float = key(20.0, "0 evaluates at the end only; negative: never")
    knn_k: tuple[int, ...] = key(
        (10,), "numbers of neighbors; the first is logged in training", low=1
    )
    knn_temperature: float = key(0.07, "of the softmax over similarities", above=0)
    knn_bank: int = key(50_000, "training images at most, evenly spaced", low=1)
    knn_queries: int = key(10_000, "evaluation images at most", low=1)
    rankme: bool = key(
        True,
        "with k-NN, and at its intervals also without labels: RankMe, the effective rank of the"
        " encoder's features of training images",
        implied=False,
    )
    segment_knn: bool = key(
        False,
        "with k-NN, on data with masks: mIoU of the k-NN of patches; in runs of one process",
        implied=False,
    )
    linear: bool = key(False, "at the end, also a linear probe on the same images")
    baselines: bool = key(
        False,
        "at the end, also raw pixels and a random encoder; the pixels of knn_bank images must fit"
        " into memory, 12 bytes each",
    )
    pictures_every_epochs: float = key(
        20.0, "figures of reconstructions or segmentations; 0 draws them at the end only"
    )
    pictures: int = key(8, "images per figure", low=1)
    show_channels: tuple[int, ...] = key(
        (0, 1, 2), "shown as red, green, blue, of images with more than three channels"
    )
    stats: str = key(
        "visible",
        "brightness of norm_pix figures: of 'visible' patches, or of the ground truth ('gt')",
        choices=tuple(PATCH_STATS),
    )
    batch_size: int = key(256, "images", low=1)

    def __post_init__(self):
        super().__post_init__()
        if len(self.show_channels) not in (1, 3):
            raise self.error("show_channels", "must be one or three numbers, as in (0, 1, 2)")


@dataclass(frozen=True)
class LogConfig(Group):
    """Metrics and profiles."""

    prefix: ClassVar[str] = "log."
    resumable: ClassVar[bool] = True
    every_steps: int = key(50, "steps between lines of metrics.jsonl", low=1)
    to: tuple[str, ...] = key(
        ("jsonl", "tensorboard"),
        "loggers: 'jsonl' (metrics.jsonl), 'tensorboard', 'wandb' (Weights & Biases), 'mlflow'",
        choices=NAMES,
        implied=["jsonl", "tensorboard"],
    )
    project: str = key("mae_jax", "W&B project, MLflow experiment", implied="mae_jax")
    run_name: str | None = key(None, "name of the run in W&B and MLflow; None: of the workdir")
    profile_from: int | None = key(
        None, "first step of a profile, written to WORKDIR/profile", low=1
    )
    profile_steps: int = key(5, "steps to profile", low=1)


@dataclass(frozen=True)
class HealthConfig(Group):
    """Fault tolerance: NaN/Inf steps, loss spikes, hangs."""

    prefix: ClassVar[str] = "health."
    resumable: ClassVar[bool] = True
    max_bad_steps: int = key(
        10, "consecutive NaN/Inf steps, each of which is skipped, before the run aborts", low=1
    )
    rollbacks: int = key(
        0, "times to restore the last checkpoint and skip that data instead of aborting", low=0
    )
    spike_sigmas: float = key(
        6.0, "log a loss this many standard deviations above the last 128; 0 is off", low=0
    )
    hang_minutes: float = key(
        30.0, "watchdog timeout: minutes without progress before the process exits; 0: never", low=0
    )


@dataclass(frozen=True)
class CheckpointConfig(Group):
    """Checkpoints."""

    prefix: ClassVar[str] = "checkpoint."
    resumable: ClassVar[bool] = True
    every_steps: int = key(1000, "steps between checkpoints", low=1)
    max_to_keep: int = key(3, "checkpoints to keep", low=1)
    mirror: str | None = key(
        None,
        "s3:// or gs:// address of this run alone: checkpoints are copied there, and a machine"
        " without them resumes from there",
        remote=True,
    )

    def __post_init__(self):
        super().__post_init__()
        if self.mirror and not is_address(self.mirror):
            raise self.error("mirror", "is no address, as s3://bucket/run; --workdir is the folder")


@dataclass(frozen=True)
class ResumeConfig(Group):
    """Resuming."""

    prefix: ClassVar[str] = "resume."
    resumable: ClassVar[bool] = True
    allow: str = key("", "comma-separated keys that may differ from the checkpoint's")


@dataclass(frozen=True)
class MeshConfig(Group):
    """Sharding over devices; the batch is always split over all of them (data parallel)."""

    prefix: ClassVar[str] = "mesh."
    resumable: ClassVar[bool] = True
    fsdp: int = key(
        1, "FSDP: devices to shard parameters and optimizer state over; 1 replicates them", low=1
    )
    min_split_bytes: int = key(MIN_SPLIT_BYTES, "smaller arrays stay replicated", low=1)
    max_whole: float = key(
        MAX_REPLICATED, "largest fraction of all bytes that may stay replicated", low=0, high=1
    )


@dataclass(frozen=True)
class Config(Group):
    """The paper's pretraining recipe (appendix A.1) with a ViT-B/16, by default."""

    task: str = key(
        "pretrain",
        "'classify' is fine-tuning, probing and supervised training from scratch; 'segment' is"
        " semantic segmentation",
        choices=("pretrain", "classify", "segment"),
    )
    seed: int = key(0, "of parameters, data order, augmentation and masks", low=0, high=2**32 - 1)
    batch_size: int = key(
        4096, "global batch size: images per optimizer step over all devices", low=1
    )
    accumulate: int = key(1, "gradient accumulation steps: micro-batches per batch", low=1)
    epochs: float = key(800.0, "length of the run in passes over the dataset")
    steps: int | None = key(None, "length of the run in optimizer steps; overrides epochs")
    init: InitConfig = InitConfig()
    model: ModelConfig = ModelConfig()
    mask: MaskConfig = MaskConfig()
    pretrain: PretrainConfig = PretrainConfig()
    decoder: DecoderConfig = DecoderConfig()
    target: TargetConfig = TargetConfig()
    classify: ClassifyConfig = ClassifyConfig()
    segment: SegmentConfig = SegmentConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    health: HealthConfig = HealthConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    resume: ResumeConfig = ResumeConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self):
        super().__post_init__()
        self._check_stats("mean", IMAGENET_MEAN)
        self._check_stats("std", IMAGENET_STD)
        bands = len(self.data.read_options.band_list)
        if bands not in (0, self.model.channels):
            problem = f"selects {bands} bands, but model.channels is {self.model.channels}"
            raise self.data.error("bands", problem)
        if self.task != "pretrain" and self.eval.segment_knn:
            raise self.eval.error("segment_knn", "is for pretraining")
        if self.task == "classify":
            self._check_classify()
            return
        if self.task == "segment":
            self._check_segment()
            return
        problem = "is for task='classify': pretraining trains everything"
        if self.optim.train_last_blocks is not None:
            raise self.optim.error("train_last_blocks", problem)
        if self.data.cache_features:
            raise self.data.error("cache_features", problem)

    def _check_stats(self, name: str, default: tuple[float, ...]) -> None:
        """Check for one value per channel; fewer channels may use the first default values."""
        values, channels = getattr(self.data, name), self.model.channels
        is_default = values == default and len(values) > channels
        if len(values) != channels and not is_default:
            raise self.data.error(
                name,
                f"needs a value for each of {channels} channels (model.channels), and no more: "
                "mae-jax data stats computes them",
            )

    def _check_classify(self) -> None:
        classify = self.classify
        if not classify.head and self.steps != 0:
            raise classify.error("head", "leaves nothing to train: it needs steps=0")
        if not classify.head and self.eval.knn_every_epochs < 0:
            raise classify.error(
                "head", "with eval.knn_every_epochs below 0 leaves nothing to evaluate"
            )
        stochastic = classify.mixup or classify.cutmix or classify.erase or classify.drop_path
        fixed = self.data.augment == "none" and not stochastic
        if self.data.cache_features and not (fixed and self.optim.train_last_blocks == 0):
            raise self.data.error(
                "cache_features",
                "computes the features of each image once: it needs a frozen encoder "
                "(optim.train_last_blocks=0) and images that do not change (data.augment=none, "
                "classify.mixup, cutmix, erase and drop_path 0.0)",
            )

    def _check_segment(self) -> None:
        data = self.data
        if data.augment not in ("none", "crop"):
            raise data.error("augment", "must be none or crop for task='segment'")
        if data.path and is_address(data.path):
            raise data.error("path", "is in an object store: masks are read from a local disk only")
        for name in ("cache_features", "exif", "shots"):
            if getattr(data, name):
                raise data.error(name, "is not for task='segment'")
        if data.sampling.scores:
            raise data.sampling.error("scores", "is not for task='segment'")

    @property
    def pixel_stats(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and standard deviation of the channels of the model."""
        channels = self.model.channels
        return self.data.mean[:channels], self.data.std[:channels]


def from_config_dict(values: ConfigDict) -> Config:
    """Return the typed config.

    Raises:
      UserError: a value has the wrong type or is out of bounds; the error has the key.
    """
    return group_from_dict(Config, values.to_dict())
