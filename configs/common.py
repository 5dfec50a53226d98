"""Every config key there is, with its default, unit and meaning. Recipes only set values.

Override any of them on the command line, as in --config.optim.base_lr=1e-4. Keys whose default is
None take a value of the type named here.
"""

from ml_collections import ConfigDict, config_dict

from mae_jax.distributed.sharding import MAX_REPLICATED, MIN_SPLIT_BYTES
from mae_jax.models.image_ops import IMAGENET_MEAN, IMAGENET_STD
from mae_jax.models.variants import get_variant


def base() -> ConfigDict:
    """The paper's pretraining recipe (appendix A.1) with a ViT-B/16."""
    optional = config_dict.placeholder
    config = ConfigDict()
    config.task = "pretrain"  # or "classify": fine-tuning, probing, training from scratch
    config.seed = 0
    config.batch_size = 4096  # images per optimizer step, over all devices and hosts
    config.accumulate = 1  # parts that a batch is computed in, to save memory
    config.epochs = 800.0  # length of the run in passes over the data ...
    config.steps = optional(int)  # ... or in optimizer steps, which wins where given

    config.init = ConfigDict()
    config.init.path = optional(str)  # checkpoint to start from: official, HF, timm or a workdir;
    # "random" says that there is none on purpose, which classify insists on
    config.init.ema = False  # of a workdir, the averaged parameters
    config.init.encoder_only = False  # leave a decoder in it out
    config.init.new_head = False  # leave a classification head in it out, and begin with a new one

    config.model = model = ConfigDict()
    model.image_size = (224, 224)  # height and width, pixels
    model.channels = 3  # 1 (grey), 3 (RGB), or as many as the arrays of the data have
    model.mlp_ratio = 4.0  # hidden width of an MLP over its width
    model.position = "sincos"  # or "learned", which starts from the same table
    model.layer_norm_eps = 1e-6
    model.dtype = "float32"  # or "bfloat16": of activations; parameters are always float32
    model.attention = "auto"  # "xla", "cudnn", or the faster one, tried at the start (on GPUs, in
    # bfloat16; elsewhere there is only xla)
    model.remat = "none"  # recompute in the backward pass: "none", "dots" (all but matmuls), "full"
    model.scan_unroll = 1  # blocks per iteration of the loop over depth
    set_size(config, "vit_b16")

    config.mask = mask = ConfigDict()
    mask.kind = "random"  # or "block", "grid" (paper Table 1f), "user"
    mask.ratio = 0.75  # share of patches hidden from the encoder
    mask.path = optional(str)  # kind "user": .npy of bool [patches] or [batch, patches]: hidden?

    config.decoder = ConfigDict()
    config.decoder.predict_ratio = 1.0  # share of the masked patches, drawn anew for each image and
    # step, that it sees and predicts in training; less is faster, and not the paper

    config.target = target = ConfigDict()
    target.norm_pix = True  # predict pixels normalised per patch (paper Table 1d)
    target.norm_pix_eps = 1e-6  # added to the variance of a patch

    config.classify = _classify()

    config.optim = optim = ConfigDict()
    optim.name = "adamw"  # or "lars", for linear probing
    optim.base_lr = 1.5e-4  # learning rate = base_lr * batch_size / 256
    optim.min_lr = 0.0  # learning rate at the end of the cosine
    optim.warmup_epochs = 40.0  # linear warm-up ...
    optim.warmup_steps = optional(int)  # ... or in steps, which wins where given
    optim.b1 = 0.9  # adamw
    optim.b2 = 0.95  # adamw
    optim.eps = 1e-8  # adamw
    optim.momentum = 0.9  # lars
    optim.weight_decay = 0.05  # of everything but biases and norms
    optim.decay_embeddings = True  # weight decay of the cls token and learned positions too
    optim.layer_decay = 1.0  # factor of a layer's learning rate to that of the next (adamw)
    optim.train_last_blocks = optional(int)  # 0 trains the head alone, k also the last k blocks
    optim.clip_norm = optional(float)  # largest global gradient norm; None does not clip
    optim.ema = optional(float)  # decay of an average of the parameters; None keeps none

    config.data = _data()
    config.eval = _evaluation()

    config.log = ConfigDict()
    config.log.every_steps = 50
    config.log.profile_from = optional(int)  # step from which on a profile is written ...
    config.log.profile_steps = 5  # ... and of how many, to WORKDIR/profile

    config.health = _health()

    config.checkpoint = checkpoint = ConfigDict()
    checkpoint.every_steps = 1000
    checkpoint.max_to_keep = 3

    config.resume = ConfigDict()
    config.resume.allow = ""  # keys, comma separated, that may differ from the checkpoint's

    config.mesh = ConfigDict()
    config.mesh.fsdp = 1  # devices to split parameters and optimizer over; 1 copies them to each
    config.mesh.min_split_bytes = MIN_SPLIT_BYTES  # smaller arrays stay whole on every device ...
    config.mesh.max_whole = MAX_REPLICATED  # ... but no larger share of all bytes than this
    return config


def _health() -> ConfigDict:
    health = ConfigDict()
    health.max_bad_steps = 10  # steps with a loss or gradients that are not finite, which are
    # skipped, in a row before the run halts
    health.rollbacks = 0  # how often, instead of halting, to go back to the last checkpoint and on
    # with the data after those steps
    health.spike_sigmas = 6.0  # a loss so many deviations above the last 128 is named; 0.0: none
    health.hang_minutes = 30.0  # without progress before the process ends itself; 0.0: never
    return health


def _classify() -> ConfigDict:
    classify = ConfigDict()
    classify.head = True  # False has no head, for k-NN alone (steps=0)
    classify.num_classes = config_dict.placeholder(int)  # None: as many as the data set has
    classify.pool = "cls"  # token, "mean" of the patches, or "attention" of a learned query
    classify.fc_norm = False  # normalise after pooling instead of before
    classify.head_norm = False  # BatchNorm without affine before the linear layer
    classify.head_init_std = 0.01  # of the linear layer's first weights
    classify.drop_path = 0.0  # rate in the last block, falling to 0 in the first
    classify.smoothing = 0.0  # of labels
    classify.mixup = 0.0  # alpha of the Beta distribution of shares; 0.0 is off
    classify.cutmix = 0.0  # the same
    classify.mixup_prob = 1.0  # that a batch is mixed at all
    classify.mixup_switch = 0.5  # probability of cutmix where both are on
    classify.mixup_mode = "batch"  # one draw for a "batch", "pair" or image ("elem")
    classify.erase = 0.0  # share of images in which a box is erased (random erasing)
    return classify


def _data() -> ConfigDict:
    data = ConfigDict()
    data.source = "tfds"  # or "folder", or "arrays": TRAIN_SPLIT.npz and EVAL_SPLIT.npz in a folder
    data.name = "imagenet2012"  # source "tfds": the data set
    optional = config_dict.placeholder
    data.path = optional(str)  # folder of images, or where TFDS data sets are; None is TFDS's own
    data.image_feature = "image"  # source "tfds": the feature that is the image
    data.train_split = "train"
    data.eval_split = "validation"  # of k-NN, accuracy and pictures
    data.shots = optional(int)  # train on so many images of every class only ...
    data.shots_seed = 0  # ... which this seed chooses
    data.exif = False  # turn photographs as their EXIF tells; the reference does not
    data.augment = "crop"  # "none"; "weak_crop": linear probing's law; "randaugment": a crop too
    data.crop_scale = (0.2, 1.0)  # range of a random crop's share of the image
    data.flip = True  # mirror half of the training images
    data.randaugment_magnitude = 9.0  # mean, 0.0 to 10.0
    data.randaugment_std = 0.5  # standard deviation of the magnitude
    data.randaugment_layers = 2  # operations per image, each skipped half of the time
    data.cache_features = False  # of a frozen encoder without augmentation: compute them only once
    data.eval_crop = optional(float)  # share of an image's sides that evaluation looks at; None, as
    # in the reference: 224/256, and all of it where the model's images are larger than 224 pixels
    data.mean = IMAGENET_MEAN  # per channel: of photographs of values 0..1, else in their units
    data.std = IMAGENET_STD
    data.resize_on = "auto"  # where crops are resized: "host", "device", auto is device on a GPU
    data.canvas = 512  # pixels: larger crops are resized on the host all the same
    data.in_memory = False  # decode all images once and keep them, for sets of small images
    data.workers = 0  # processes that read images; 0: threads of the main one, which cost less as
    # long as its Python keeps up (docs/data.md)
    data.threads = optional(int)  # per process; None: as many as cores, in all
    data.on_bad = "raise"  # or "skip": the next good image instead, counted and named
    data.max_bad = 100  # different bad images that a process skips before it gives up
    return data


def _evaluation() -> ConfigDict:
    evaluation = ConfigDict()
    evaluation.accuracy_every_epochs = 1.0  # classify; 0.0 evaluates at the end only
    evaluation.knn_every_epochs = 20.0  # 0.0 evaluates at the end only; negative: never
    evaluation.knn_k = (10,)  # neighbours; the first is the one that is logged while training
    evaluation.knn_temperature = 0.07
    evaluation.knn_bank = 50_000  # training images at most, evenly spaced
    evaluation.knn_queries = 10_000  # evaluation images at most
    evaluation.linear = False  # at the end, also a linear probe on the same images
    evaluation.baselines = False  # at the end, also of raw pixels and 3 random encoders; pixels of
    # knn_bank images have to fit into memory, 12 bytes each
    evaluation.pictures_every_epochs = 20.0  # 0.0 draws at the end only
    evaluation.pictures = 8  # images per picture
    evaluation.show_channels = (0, 1, 2)  # as red, green, blue, of images with more than three
    evaluation.stats = "visible"  # brightness of norm_pix pictures: of "visible" patches or "gt"
    evaluation.batch_size = 256  # images
    return evaluation


def set_size(config: ConfigDict, name: str) -> None:
    """Sets the shape of the model to one of mae_jax.models.variants."""
    size = get_variant(name)
    config.model.update(
        patch=size.patch,  # pixels
        width=size.width,
        depth=size.depth,
        heads=size.heads,
        decoder_width=size.decoder_width,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
    )
