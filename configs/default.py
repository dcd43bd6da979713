"""Defines all fields; the defaults are the published system with ImageNet weights."""

from ml_collections import ConfigDict


def get_config(category: str = "all") -> ConfigDict:
    """Returns the published system; set `dataset.name` and `dataset.root` yourself.

    Args:
        category: name of a category, several names separated by commas, or "all".
    """
    config = ConfigDict()
    # Seed of everything random in a run: initial weights, the order of the images, the
    # validation split, random trunks.
    config.seed = 0
    # A built-in method such as "ulsad" or "padim", "module:attribute" of your own, or
    # several joined with "+", such as "ulsad+pooled": see docs/methods.md.
    config.method = "ulsad"
    # (height, width) in pixels, multiples of 32 from 64 up. Images are resized to it
    # without keeping their aspect ratio.
    config.image_size = (256, 256)
    # The checkpoint to evaluate: "last", "best_validation_loss", or the reference's
    # "best_test_auroc", whose results are selected on the test set.
    config.selection = "last"
    # How a method's maps are brought to one scale before they are averaged: "quantile",
    # by their quantiles on the validation normals, or "none".
    config.calibration = "quantile"
    config.score = _score()
    config.threshold = _threshold()
    config.dataset = _dataset(category)
    config.trunk = _trunk()
    config.model = _model()
    config.losses = _losses()
    config.methods = _methods()
    config.optimizer = _optimizer()
    config.train = _train()
    config.parallel = _parallel()
    config.evaluation = _evaluation()
    return config


def _score() -> ConfigDict:
    """Returns how an image's score is made."""
    score = ConfigDict()
    # The score of an image: "map", that of the anomaly map, as published, or "scores",
    # the weighted sum of the z-scores of every map and of a method's own scores.
    score.fusion = "map"
    # Weights in that sum by a score's name; others have weight 1, and 0 leaves one out.
    score.weights = ConfigDict()
    # The score of a map is the mean over this share of its pixels, those with the
    # largest values; 0 for the maximum, as published.
    score.top_share = 0.0
    return score


def _threshold() -> ConfigDict:
    """Returns the shares of normals that thresholds allow."""
    threshold = ConfigDict()
    # Share of normal images that may be called anomalous. With fewer than
    # 1 / image_fpr - 1 validation images it cannot be guaranteed: see
    # docs/thresholds.md.
    threshold.image_fpr = 0.05
    # Share of the pixels of normal images that may be in the predicted mask.
    threshold.pixel_fpr = 0.005
    return threshold


def _dataset(category: str) -> ConfigDict:
    """Returns where images come from."""
    dataset = ConfigDict()
    # mvtec_ad, mvtec_loco, btad, mpdd, visa, magnetic_tile, folder, table, synthetic.
    dataset.name = ""
    # Folder that the archive was unpacked to; for "table" the CSV file; for "synthetic"
    # the folder to draw it in, or empty for a folder in `cache_dir`.
    dataset.root = ""
    dataset.category = category
    # Share of the training images that are held out for validation if the data set has
    # no validation split.
    dataset.validation_fraction = 0.1
    # Pixel value that means white in files with more than 8 bits per channel, such as
    # 4095 for 12-bit values in 16-bit files, or 1.0 for most floating-point files.
    # Larger values become white, too. With 0, white is 65535 in 16-bit files, and other
    # deep files are rejected. 8-bit files are not changed.
    dataset.white_level = 0.0
    # Folder for prepared data sets, drawn data sets and compiled programs. It may be
    # deleted.
    dataset.cache_dir = "~/.cache/ulsad_jax"
    # The images to draw if `name` is "synthetic" and the category does not exist yet.
    dataset.synthetic = ConfigDict()
    dataset.synthetic.seed = 0
    dataset.synthetic.image_size = 256  # height and width in pixels
    dataset.synthetic.train = 100  # normal training images
    dataset.synthetic.validation = 20  # normal validation images
    dataset.synthetic.good = 60  # normal test images
    dataset.synthetic.per_kind = 6  # test images of each kind of anomaly
    return dataset


def _trunk() -> ConfigDict:
    """Returns the frozen network whose outputs are the features."""
    trunk = ConfigDict()
    # resnet18, resnet34, resnet50, wide_resnet50_2, wide_resnet101_2,
    # tf_efficientnet_lite0 to 2, vit_small_patch14_dinov2, vit_base_patch14_dinov2,
    # vit_small_patch16_dinov3, vit_base_patch16_dinov3, or "module:attribute" of your
    # own: see ulsad_jax/trunks/base.py.
    trunk.architecture = "wide_resnet50_2"
    # "hub" downloads `repository`, "file" reads `path`, "builtin" takes weights in
    # this package (tf_efficientnet_lite0), "random" draws weights from
    # `config.seed`.
    trunk.source = "hub"
    # A timm repository on the Hugging Face hub that has a model.safetensors.
    trunk.repository = "timm/wide_resnet50_2.racm_in1k"
    # A .safetensors file, or a .pth file where PyTorch is installed.
    trunk.path = ""
    # Outputs of the trunk to use as features, joined with "+"; a ResNet has layer1 to
    # layer3, an EfficientNet-Lite stage1 to stage5, a ViT block1 to block12. "auto" is
    # the architecture's default for the method: layer2+layer3 of ResNets for ULSAD, as
    # published.
    trunk.layers = "auto"
    # (height, width) in pixels at which images enter and the trunk sees them, or () for
    # `image_size`. The method gets them resized to `image_size`, the size of its maps.
    trunk.image_size = ()
    # Whether features are decorrelated over the training images, in addition to the
    # scaling to unit variance that was published: "always", "never", or "auto", which
    # is the architecture's default: "never" for ResNets, as published, but "always" for
    # the others and for those that have weights built in.
    trunk.whiten = "auto"
    return trunk


def _model() -> ConfigDict:
    """Returns the sizes of ULSAD's networks."""
    model = ConfigDict()
    # Channels of the local reconstructor's smallest grid; 1536 gives 65 M parameters.
    model.local_width = 1536
    # Output activation of the local reconstructor: "relu" as published, or "identity".
    model.output_activation = "relu"
    return model


def _losses() -> ConfigDict:
    """Returns ULSAD's loss terms."""
    losses = ConfigDict()
    # Loss terms by a name of your choice. Each has a `term` (one of these three, or
    # "module:function" of your own), a `weight`, and the term's keyword arguments.
    losses.local = {"term": "local", "weight": 1.0, "cosine_weight": 0.5}
    losses.attention = {"term": "attention", "weight": 1.0, "cosine_weight": 0.5}
    losses.consistency = {"term": "consistency", "weight": 1.0, "cosine_weight": 0.5}
    return losses


def _methods() -> ConfigDict:
    """Returns the fields of methods other than ULSAD."""
    methods = ConfigDict()
    # PaDiM fits a Gaussian at every position to `channels` feature channels, chosen at
    # random. `epsilon` is added to their variances.
    methods.padim = ConfigDict({"channels": 100, "epsilon": 0.01})
    # PatchCore keeps a `share` of the training patches, chosen in a random projection
    # to so many `dimensions`. So many `neighbors` reweight its image score.
    methods.patchcore = ConfigDict({"share": 0.1, "neighbors": 9, "dimensions": 128})
    # PCA of all features: the smallest principal subspace with more than this share of
    # the variance.
    methods.pca = ConfigDict({"variance": 0.97})
    # DFR's code has `latent` channels, or with 0 as many as there are principal
    # components with the share `variance` of the variance. `learning_rate` is Adam's.
    methods.dfr = ConfigDict({"latent": 0, "variance": 0.9, "learning_rate": 1e-4})
    # Adam of reverse distillation.
    methods.rd = ConfigDict({"learning_rate": 0.005, "b1": 0.5, "b2": 0.999})
    # A flow of FastFlow has so many `steps`, whose convolutions have the `ratio` of
    # hidden channels and are 1 x 1 in every second step, unless `conv3x3_only`.
    methods.fastflow = ConfigDict({"steps": 8, "ratio": 1.0, "conv3x3_only": False})
    methods.fastflow.update({"learning_rate": 1e-3, "weight_decay": 1e-5})
    # A flow of CFLOW has so many `steps`, each of which is told where a position is, in
    # a code of `condition` channels. A step of Adam takes so many `positions`.
    methods.cflow = ConfigDict({"steps": 8, "condition": 128, "positions": 256})
    methods.cflow.learning_rate = 2e-4
    # DRAEM's networks have so many channels at the images' size: the one that repairs
    # and the one that segments. `learning_rate` is Adam's.
    methods.draem = ConfigDict(
        {"repair_width": 128, "segment_width": 64, "learning_rate": 1e-4}
    )
    # EfficientAD's teacher and student are "small" or "medium". The share
    # `distill_share` of the updates trains the teacher, the rest student and
    # autoencoder. `learning_rate` and `weight_decay` (L2) are Adam's.
    methods.efficientad = ConfigDict(
        {
            "size": "small",
            "distill_share": 0.5,
            "learning_rate": 1e-4,
            "weight_decay": 1e-5,
        }
    )
    # Visual words that are counted.
    methods.words = ConfigDict({"count": 64})
    return methods


def _optimizer() -> ConfigDict:
    """Returns the fields of ULSAD's optimizer."""
    optimizer = ConfigDict()
    # Adam, with L2 decay (`weight_decay`) added to the gradient.
    optimizer.learning_rate = 2e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 2e-5
    return optimizer


def _train() -> ConfigDict:
    """Returns length, batches and memory of training."""
    train = ConfigDict()
    train.batch_size = 8
    # Ignored by methods with a fixed number of passes over the training images, such as
    # "padim", which takes one.
    train.num_epochs = 200
    # Number of updates, rounded up to whole epochs of the category's training images.
    # Either this or `num_epochs` is 0.
    train.num_updates = 0
    # Number of epochs between checkpoints, each of which is validated. The last epoch
    # always has one.
    train.checkpoint_every = 10
    # Computation type of trunk and networks: "float32" or "bfloat16". Parameters,
    # losses and scores are float32.
    train.dtype = "float32"
    # Share of the machine's memory that the training and validation images and their
    # features may take. If they need more, features are not kept, and the trunk runs in
    # every step; 0 always does this.
    train.feature_memory = 0.5
    # (first, end): writes a trace of the updates from `first` to before `end`, counted
    # from 0, to the folder profile of the category, for XProf; () for none. Sweeps
    # ignore it.
    train.profile = ()
    return train


def _parallel() -> ConfigDict:
    """Returns how devices are used."""
    parallel = ConfigDict()
    # Number of devices to split a batch over, counted from the first, or 0 for all.
    # `train.batch_size` must be a multiple of it.
    parallel.devices = 0
    # "jit", or "pmap" to run the same training step with `jax.pmap`.
    parallel.backend = "jit"
    # Whether each device keeps a share of the parameters and of the optimizer's state
    # only, instead of all of them. Sweeps ignore it.
    parallel.shard_state = False
    return parallel


def _evaluation() -> ConfigDict:
    """Returns what evaluation measures and writes."""
    evaluation = ConfigDict()
    # Rounded up to a multiple of the number of devices.
    evaluation.batch_size = 8
    # Number of heatmap pictures of each type of test image, -1 for all. Half of them
    # show the most wrongly scored images. The report contains them.
    evaluation.pictures_per_type = 8
    # Whether to measure pixel metrics at the images' own resolution, too: AUROC and
    # AUPRO, and for mvtec_loco and synthetic AU-sPRO, the metric of MVTec LOCO.
    evaluation.original_resolution = False
    # Metrics of your own in addition to the built-in ones, ("module:attribute", ...);
    # see docs/runs.md.
    evaluation.metrics = ()
    # Whether to write the map of each test image, float32 at the image's own resolution
    # (4 bytes per pixel), to maps/<category>/test/<type>/<id>.tiff in the run's folder.
    evaluation.write_maps = False
    return evaluation
