"""The section [autoencoder.train]: training of an autoencoder on the recipe's images."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt

from dit.schedule import LearningRateSchedule, TrainingConfig
from pipelines.config.defaults import leave_out_defaults
from pipelines.config.model import PositiveInt
from pipelines.config.training import ComputeDtype, ElasticWorkersConfig, WorkersConfig, check_batch_divides
from raydit.errors import InvalidInput

PerceptualNetwork = Literal["efficientnet-lite0", "efficientnet-lite2"]
"""The keys of `dit.autoencoders.losses.PERCEPTUAL_NETWORKS`, which imports torch; a test compares them."""
MEASURED_BATCH, MEASURED_PIXELS = 64, 64 * 64**2
"""Most images, and their most pixels, that are encoded or decoded at once where an autoencoder is measured."""

AUTOENCODER_DEFAULTS: dict[str, Any] = {
    "reconstruction": "mse",
    "dtype": "float32",
    "compile": False,
    "on_nonfinite": "stop",
    "max_skipped": 3,
    "perceptual_weight": 1.0,
    "adversarial_start": 0,
    "decoder_only": False,
}
"""Values that apply where these fields are left out; a recipe that writes them out is the same recipe."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderTrainConfig(TrainingConfig, WorkersConfig):
    """Training of a small KL autoencoder, for images that no pretrained one fits.

    Defaults are raydit's own: they suit the demo's handwritten digits of 32 x 32 pixels.
    """

    steps: PositiveInt = 400
    """Optimizer steps in total."""
    global_batch_size: PositiveInt = 32
    """Images per step over all workers."""
    learning_rate: Annotated[float, Gt(0)] = 2e-3
    """Peak learning rate of AdamW."""
    lr_schedule: LearningRateSchedule = "linear"
    """Learning rate after warm-up: constant, or a decay to zero at the last step."""
    warmup_steps: Annotated[int, Ge(0)] = 30
    """Steps of linear warm-up from zero."""
    betas: tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]] = (0.9, 0.99)
    """AdamW's decay rates of the first and second moment."""
    grad_clip: Annotated[float, Ge(0)] = 1.0
    """Largest gradient norm; 0 does not clip."""
    ema_decay: Annotated[float, Ge(0), Lt(1)] = 0.99
    """Decay of the averaged weights, which become the autoencoder."""
    ema_warmup: bool = True
    """Average over a short window first: decay min(ema_decay, (1 + n) / (10 + n)) after n steps."""
    checkpoint_every: PositiveInt = 200
    """Steps between checkpoints from which training can resume."""
    log_every: PositiveInt = 20
    """Steps between reports of the loss."""
    latent_channels: PositiveInt = 4
    """Channels of the latents; 4 as in Stable Diffusion's autoencoder."""
    downsample: Literal[2, 4, 8, 16, 32] = 4
    """Image pixels per latent pixel, along each side."""
    width: Annotated[int, Ge(8)] = 16
    """Channels at full resolution, a multiple of 8; lower resolutions have twice as many."""
    kl_weight: Annotated[float, Ge(0)] = 1e-6
    """Weight of the KL term relative to the reconstruction's error; 1e-6 as in latent diffusion (arXiv 2112.10752)."""
    reconstruction: Literal["mse", "l1"] | None = None
    """Error of the reconstruction that is trained on: the mean of squared differences ("mse", the same as None), or of
    absolute ones ("l1"), with which edges come out sharper."""

    dtype: ComputeDtype | None = None
    """Precision of the networks, as of train.dtype: "float32" when left out. Weights and losses stay float32."""
    compile: bool | None = None
    """Compile the blocks of encoder and decoder, as train.compile does; not compiled when left out."""
    on_nonfinite: Literal["skip", "stop"] | None = None
    """What happens to a batch whose loss or gradient is not finite, as train.on_nonfinite; "stop" when left out."""
    max_skipped: PositiveInt | None = None
    """Consecutive skipped batches after which training rolls back, as train.max_skipped; 3 when left out."""
    crop: PositiveInt | None = None
    """Side in pixels of random crops of the images, a multiple of downsample, to train on: the decoder has to fit
    larger images, and is convolutional. Whole images when left out; the autoencoder is measured on those anyway."""
    perceptual_network: PerceptualNetwork | None = None
    """Frozen network in whose features images are compared to their reconstructions, as LPIPS does (arXiv 1801.03924).
    Distances in the features of the same network favour what was
    trained on them. No perceptual term when left out."""
    perceptual_weight: Annotated[float, Gt(0)] | None = None
    """Weight of the perceptual distance relative to the reconstruction's error; 1, as in latent diffusion, when left
    out."""
    adversarial_weight: Annotated[float, Gt(0)] | None = None
    """Weight of the adversarial term, against a discriminator of patches (arXiv 1611.07004) with the hinge loss;
    latent diffusion has 0.5. A weight of 1 makes its gradient at the decoder's last layer as long as that of the other
    errors. No discriminator when left out."""
    adversarial_start: Annotated[int, Ge(0)] | None = None
    """Batch from which the adversarial term counts and the discriminator is trained, which should be late: latent
    diffusion has 50,001. From the first when left out."""
    start: str | None = None
    """Pretrained AutoencoderKL to continue from: a diffusers folder, or a hub id as in autoencoder.id. Its shape is
    kept, so that `width` does not count. A new autoencoder when left out."""
    decoder_only: bool | None = None
    """Train the decoder alone, with the encoder and the scale of `start`: latents stay those of `start`. Both are
    trained when left out."""
    validate_every: PositiveInt | None = None
    """Steps between measurements on held-out images, with the averaged weights: PSNR, SSIM, and the Frechet distance
    in the features of evaluate.extractor; also after the last step. None are made when left out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ElasticWorkersConfig.__post_init__(self)
        check_batch_divides(self, self.num_workers)
        if self.width % 8:
            raise InvalidInput(
                f"width: found {self.width}",
                "a multiple of 8, because group normalisation has 8 groups",
                f"set width = {8 * max(1, round(self.width / 8))}",
            )
        self._check_losses()
        leave_out_defaults(self, AUTOENCODER_DEFAULTS)
        if self.decoder_only and self.start is None:
            raise InvalidInput(
                "decoder_only: found true without start, so that the encoder would stay random",
                "a pretrained autoencoder",
                "set start, or remove decoder_only",
            )

    def _check_losses(self) -> None:
        for name, value, needed in (
            ("perceptual_weight", self.perceptual_weight, "perceptual_network"),
            ("adversarial_start", self.adversarial_start, "adversarial_weight"),
        ):
            if value is not None and getattr(self, needed) is None:
                raise InvalidInput(f"{name}: found {value} without {needed}", "both", f"set {needed}, or remove {name}")
        if self.adversarial_weight and self.accumulation_steps > 1:
            raise InvalidInput(
                f"accumulation_steps: found {self.accumulation_steps} with adversarial_weight, whose adaptive weight "
                "is that of a whole batch",
                "1",
                "remove accumulation_steps, or train on smaller crops",
            )

    def check_image_size(self, size: int) -> None:
        """Raise InvalidInput if images of some side in pixels, or crops of them, cannot be trained on."""
        for name, side in (("images.size", size), ("autoencoder.train.crop", self.crop or size)):
            if side % self.downsample:
                raise InvalidInput(
                    f"{name}: found {side}",
                    f"a multiple of autoencoder.train.downsample = {self.downsample}",
                    "change one of them",
                )
        if (self.crop or 0) > size:
            raise InvalidInput(
                f"autoencoder.train.crop: found {self.crop}", f"at most images.size = {size}", "change one of them"
            )


def measured_at_once(size: int) -> int:
    """Return how many images of a side in pixels are encoded or decoded at once where an autoencoder is measured.

    It is the same for any batch and number of workers, on which the figures must not depend, and at least 1.
    """
    return max(1, min(MEASURED_BATCH, MEASURED_PIXELS // size**2))
