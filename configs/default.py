"""Every field; the defaults are the published system, with ImageNet's trunk."""

from ml_collections import ConfigDict


def get_config(category: str = "all") -> ConfigDict:
    """Returns the published system; `dataset.name` and `.root` remain to be set.

    Args:
        category: a category's name, several separated by commas, or "all".
    """
    config = ConfigDict()
    # Everything random in a run follows from it: initial weights, the order of the
    # images, the validation split, random trunks.
    config.seed = 0
    # (height, width) in pixels, multiples of 32 from 64; images are squashed to it.
    config.image_size = (256, 256)
    # Which checkpoint is evaluated: "last", "best_validation_loss", or the
    # reference's "best_test_auroc", whose results are selected on the test set.
    config.selection = "last"
    # How local and global maps are made comparable: "quantile" on validation
    # normals, or "none" for the plain average of raw maps.
    config.calibration = "quantile"

    config.threshold = threshold = ConfigDict()
    # Share of normal images that may be called anomalous. Fewer validation images than
    # 1 / image_fpr - 1 cannot promise it: see README, section Decisions.
    threshold.image_fpr = 0.05
    # Share of normal images' pixels that may be in the predicted mask.
    threshold.pixel_fpr = 0.005

    config.dataset = dataset = ConfigDict()
    # mvtec_ad, mvtec_loco, btad, mpdd, visa, magnetic_tile, folder, table, synthetic.
    dataset.name = ""
    # The folder the archive was unpacked to; for "table" the CSV file; for
    # "synthetic" where to write it, or empty for a place under `cache_dir`.
    dataset.root = ""
    dataset.category = category
    # Share of the training normals held out where there is no validation split.
    dataset.validation_fraction = 0.1
    # The value that means white in files of more than 8 bits a channel: 4095 of 12 bits
    # in 16-bit files, 1.0 of most floating-point ones. What is above is white, too. 0:
    # 65535 in 16-bit files, others are refused. 8-bit files stay as they are.
    dataset.white_level = 0.0
    # Where prepared and drawn data sets and compiled programs are kept; safe to delete.
    dataset.cache_dir = "~/.cache/ulsad_jax"
    # What is drawn when `name` is "synthetic" and the category is not there yet.
    dataset.synthetic = ConfigDict()
    dataset.synthetic.seed = 0
    dataset.synthetic.image_size = 256  # pixels a side
    dataset.synthetic.train = 100  # normal training images
    dataset.synthetic.validation = 20  # normal validation images
    dataset.synthetic.good = 60  # normal test images
    dataset.synthetic.per_kind = 6  # test images of each kind of anomaly

    config.trunk = trunk = ConfigDict()
    # resnet18, resnet34, resnet50, wide_resnet50_2 or wide_resnet101_2.
    trunk.architecture = "wide_resnet50_2"
    # "hub" downloads `repository`, "file" reads `path`, "builtin" is a resnet18 that
    # comes with the package, "random" draws from `seed`.
    trunk.source = "hub"
    # A timm repository on the Hugging Face hub with a model.safetensors.
    trunk.repository = "timm/wide_resnet50_2.racm_in1k"
    # A .safetensors file, or a .pth file where PyTorch is installed.
    trunk.path = ""
    # Whose outputs are the features: "layer2+layer3" as published, "layer2", "layer3",
    # or "auto", which is "layer2" with the built-in trunk, of which that is the better
    # part, and both with others.
    trunk.layers = "auto"
    # Whether features are decorrelated over the training images, not only scaled to
    # unit variance as published: "always", "never", or "auto", which is always with the
    # built-in trunk, because it needs that, and never with others.
    trunk.whiten = "auto"

    config.model = model = ConfigDict()
    # Channels of the local reconstructor's narrowest grid: 1536 is 65 M parameters.
    model.local_width = 1536
    # Of the local reconstructor: "relu" as published, or "identity".
    model.output_activation = "relu"

    # Loss terms: any name -> `term` (one of these three, or "module:function" of your
    # own), `weight`, and the term's own keyword arguments.
    config.losses = losses = ConfigDict()
    losses.local = {"term": "local", "weight": 1.0, "cosine_weight": 0.5}
    losses.attention = {"term": "attention", "weight": 1.0, "cosine_weight": 0.5}
    losses.consistency = {"term": "consistency", "weight": 1.0, "cosine_weight": 0.5}

    # Adam with L2 decay added to the gradient.
    config.optimizer = optimizer = ConfigDict()
    optimizer.learning_rate = 2e-4
    optimizer.b1 = 0.9
    optimizer.b2 = 0.999
    optimizer.eps = 1e-8
    optimizer.weight_decay = 2e-5

    config.train = train = ConfigDict()
    train.batch_size = 8
    train.num_epochs = 200
    # Epochs between checkpoints; each is validated. The last epoch always is.
    train.checkpoint_every = 10
    # Computation type of trunk and networks: "float32" or "bfloat16". Parameters,
    # losses and scores are float32.
    train.dtype = "float32"
    # Share of the machine's memory that the training and validation images and their
    # features may take. Where they need more, features are not kept, and each step
    # runs the trunk, too; 0 does so always.
    train.feature_memory = 0.5

    config.parallel = parallel = ConfigDict()
    # How many devices a batch is split over: the first so many, or 0 for all.
    # `train.batch_size` has to be a multiple of them.
    parallel.devices = 0
    # "jit", or "pmap" for the same training step through `jax.pmap`.
    parallel.backend = "jit"

    config.evaluation = evaluation = ConfigDict()
    # Rounded up to a multiple of the devices.
    evaluation.batch_size = 8
    # Heatmap pictures of each type of test image, half of them the most wrongly
    # scored; -1 for all. The report shows them.
    evaluation.pictures_per_type = 8
    # Whether to measure pixels at the images' own resolution, too: AUROC and AUPRO;
    # for mvtec_loco and synthetic AU-sPRO, the data set's own metric.
    evaluation.original_resolution = False
    # Whether to write each test image's map to maps/<category>/test/<type>/<id>.tiff
    # in the run's folder: float32 at the image's own resolution, 4 bytes a pixel.
    evaluation.write_maps = False
    return config
