"""Every hyperparameter, with where its value comes from, and the three presets, which differ in nothing else."""

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class AutoencoderSettings:
    """Stage 1, the convolutional autoencoder.  Section 4.1."""

    reading: str = "centred"  # ours: biases, less the empty image's code; "bias-free" shows the negatives
    channels: int = 128  # paper
    capsule_dim: int = 8  # paper
    slope: float = 0.2  # leaky ReLU; the paper gives none
    dropout: float = 0.1  # the paper gives no rate
    epochs: float = 3.0  # ours: the test error falls little after
    batch: int = 128  # ours
    learning_rate: float = 2e-3  # ours: Adam, warmed up and decayed to 0


@dataclass(frozen=True)
class SparsitySettings:
    """Which capsules may fire for an image.  Rank mask and boosting after Rawlinson 2018; the rest is ours."""

    gamma_first: float = 25.0  # sharpness of the rank mask exp(-gamma rank / (J - 1)) at first; ours, for 20 capsules
    gamma_last: float = 90.0  # and at last
    cut: float = 0.01  # mask values below are 0 (Rawlinson 2018, section 2.2)
    boost_step: float = 0.004  # ours, a change of the explanation, which is a cosine
    share_low: float = 0.5  # boost up when a capsule wins less than this / J of the images
    share_high: float = 2.0  # boost down when it wins more than this / J
    running: float = 0.9  # memory of the winning share
    conscience: float = 0.0  # a score falls by this for every 1/J that its capsule wins above its 1/J (DeSieno 1988)
    on_after_training: int = 1  # capsules left on when an image is encoded


@dataclass(frozen=True)
class ViewsSettings:
    """What stage 2 takes for the same thing seen again: an image and its like, each a little deformed.  All ours."""

    count: int = 12  # views of a thing; their mean explanation decides which capsule it belongs to
    learned: int = 4  # views that W learns from; the others only have a say
    neighbours: int = 5  # a view shows the image itself or one of so many nearest training images
    shift: float = 2.0  # pixels that a view is moved at most, each way
    rotation: float = 12.0  # degrees that it is turned at most
    shear: float = 0.15  # at most
    scale: float = 0.12  # share by which it is stretched at most, each axis for itself


@dataclass(frozen=True)
class StartSettings:
    """K-subspaces, which W starts from instead of random numbers.  All ours; the method is that of Bradley 2000."""

    groups: int = 15_000  # groups of views that are clustered
    components: int = 200  # principal directions of the lower capsules in which that is done
    tries: int = 10  # from different first clusters; the one that explains most is kept, as in k-means
    sweeps: int = 8  # of assigning groups and fitting subspaces; few groups move later
    length: float = 8.0  # of every row of W; training moves it to about 12


@dataclass(frozen=True)
class EncoderSettings:
    """Stage 2, the capsule encoder W.  Section 3, Algorithm 1."""

    capsules: int = 20  # paper
    dim: int = 16  # paper
    rounds: int = 3  # the paper gives none; Sabour 2017
    over: str = "upper"  # "lower" is the paper's sum over i
    agreement: str = "cosine"  # ours: unlike "inner", which is Sabour 2017's, it does not grow with W
    sharpness: float = 1.0  # factor on the agreement, 1/temperature; the paper and Sabour 2017 have none
    input_scale: float = 1.7  # ours: brings the lower capsules to lengths of about 1.5 before the squash
    sparsity: SparsitySettings | None = None
    views: ViewsSettings | None = None
    start: StartSettings | None = None
    initial_deviation: float = 0.1  # paper: N(0, 0.01), read as the variance
    optimiser: str = "sgd"  # paper: momentum SGD; "orthogonal" and "adam" precondition the same update
    learning_rate: float = 0.1
    momentum: float = 0.9  # the paper names momentum without a value
    weight_decay: float = 1e-5  # the paper names l2 without a value
    steps: int = 1500
    batch: int = 128  # images, or learned views, an update


@dataclass(frozen=True)
class DecoderSettings:
    """Stage 3, the capsule decoder U.  Section 4.1."""

    rule: str = "least-squares"  # ours, in closed form; "gradient" descends it; "literal" is the paper's update
    ridge: float = 1e-3  # ours: share of the mean code variance added to the diagonal of the normal equations
    optimiser: str = "sgd"  # this and the rest: for the "literal" and "gradient" rules, as in stage 2
    learning_rate: float = 0.02
    momentum: float = 0.9
    weight_decay: float = 1e-5
    steps: int = 1500
    batch: int = 128


@dataclass(frozen=True)
class Settings:
    """All three stages."""

    preset: str
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    encoder: EncoderSettings = field(default_factory=EncoderSettings)
    decoder: DecoderSettings = field(default_factory=DecoderSettings)


PRESETS = {
    "sparse": Settings(
        "sparse",
        encoder=EncoderSettings(
            sharpness=10.0,
            sparsity=SparsitySettings(gamma_first=70.0, conscience=0.03),
            views=ViewsSettings(),
            start=StartSettings(),
            initial_deviation=0.01,
            optimiser="orthogonal",
            learning_rate=0.4,
            momentum=0.95,
            weight_decay=0.02,
            steps=800,
        ),
    ),
    "dense": Settings(
        "dense",
        encoder=EncoderSettings(),
        decoder=DecoderSettings(rule="gradient", optimiser="adam", learning_rate=3e-3, weight_decay=0.0),
    ),
    "paper": Settings(
        "paper",
        encoder=EncoderSettings(over="lower", learning_rate=10.0),
        decoder=DecoderSettings(rule="literal", learning_rate=0.05, steps=500),
    ),
}


def quick(settings: Settings) -> Settings:
    """The same settings with few updates, for checks only: nothing trained so is worth looking at."""
    start = settings.encoder.start
    return replace(
        settings,
        autoencoder=replace(settings.autoencoder, epochs=4.0),
        encoder=replace(settings.encoder, steps=40, start=start and replace(start, groups=200, components=50, tries=2)),
        decoder=replace(settings.decoder, steps=40),
    )


def from_dict(content: dict) -> Settings:
    """Settings from what ``dataclasses.asdict`` gave, as stored in weight files."""
    encoder = dict(content["encoder"])
    if encoder["sparsity"]:
        encoder["sparsity"] = SparsitySettings(**encoder["sparsity"])
    for name, kind in (("views", ViewsSettings), ("start", StartSettings)):
        if encoder.get(name):
            encoder[name] = kind(**encoder[name])
    autoencoder, decoder = AutoencoderSettings(**content["autoencoder"]), DecoderSettings(**content["decoder"])
    return Settings(content["preset"], autoencoder, EncoderSettings(**encoder), decoder)
