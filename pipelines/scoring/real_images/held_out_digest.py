"""Identify the real images behind a report where its protocol does not: the held-out images, and the column of
images."""

from evaluation.report import EvaluationReport
from pipelines.artifacts import digest_of
from pipelines.scoring.real_images.references import RealImages
from pipelines.scoring.settings import ScoringSettings
from raydit.errors import NotFound


def held_out_digest(real: RealImages) -> str:
    """Return the digest of the held-out images for the report; empty if protocols have it, or there are no images.

    Protocols have that of images.validation, and a share of the images follows from a reference of the others. Where
    the reference is given, neither says which images are held out.
    """
    images, each_extractor = real.settings.images, real.settings.each_extractor
    is_given = any(each.reference is not None for each in each_extractor)
    if not is_given or not images.path or images.validation is not None:
        return ""
    return digest_of({"images": real.held_out.digest, "size": images.size, "crop": images.crop})


def has_other_real_images(report: EvaluationReport, settings: ScoringSettings) -> bool:
    """Return whether a report is known to be of other real images than today's, although its protocol is the same.

    That is of other held-out images, or of another column of images. Reports of earlier versions do not say. It is
    unknown, too, where the images are not on this machine.
    """
    if not report.held_out_digest and not report.image_column:
        return False
    try:
        real = RealImages.of(settings)
    except NotFound:
        return False
    pairs = ((report.held_out_digest, held_out_digest(real)), (report.image_column, real.training.image_column))
    return any(recorded and today and recorded != today for recorded, today in pairs)
