"""Group the members of a tar file into samples by their names, as WebDataset does."""

from collections.abc import Collection, Iterable, Iterator

from pipelines.images.listing import shorten_list
from pipelines.images.tar import LeftOut, Member
from raydit.errors import InvalidInput

Sample = dict[str, Member]
"""Files of one sample by their suffixes, in lower case and without the first dot."""
HERE = "./"
"""Start of the names in archives of a working directory."""


def group_samples(members: Iterator[Member | LeftOut], where: str, left_out: list[str]) -> dict[str, Sample]:
    """Group files into samples by their stem. A suffix begins at the first dot of the name, as in WebDataset.

    left_out: members that cannot be read as files are added to it, each with the reason.
    """
    samples: dict[str, Sample] = {}
    for member in members:
        folder, slash, name = member.name.rpartition("/")
        stem, dot, kind = name.partition(".")
        if not stem or not dot:  # a hidden file, or one without a suffix
            continue
        if isinstance(member, LeftOut):
            left_out.append(f"{member.name} ({member.reason})")
            continue
        sample = samples.setdefault(f"{folder}{slash}{stem}", {})
        if kind.lower() in sample:
            raise InvalidInput(
                f"images.path: {where}: found {member.name} twice", "each name once", "write the tar again"
            )
        sample[kind.lower()] = member
    return samples


def join_samples(samples: dict[str, Sample], images: Collection[str]) -> None:
    """Add to each sample with an image the files whose names differ from its own by a leading "./" alone.

    Tars of two programs that were joined have such names. The stem of the image remains, because keys are made of it.
    Samples that both have an image, or a file of the same suffix, stay as they are. images: stems of the samples that
    have one.
    """
    for stem in images:
        other = stem.removeprefix(HERE) if stem.startswith(HERE) else HERE + stem
        if other in samples and other not in images and not samples[stem].keys() & samples[other].keys():
            samples[stem] |= samples[other]


def note_folders(stems: Iterable[str]) -> tuple[str, ...]:
    """Return a line if images without labels lie in several folders of tar files, which may be meant as classes.

    stems: of the samples with an image.
    """
    folders = sorted({stem.removeprefix(HERE).rpartition("/")[0] for stem in stems})
    if len(folders) < 2 or "" in folders:
        return ()
    return (
        f"the images lie in {len(folders):,} folders of tar files ({shorten_list(folders, 3)}), which are not read as "
        "classes: labels are the .cls or a field of the .json with the name of the image; unpack the tar files to use "
        "folders as classes",
    )
