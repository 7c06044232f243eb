"""Data sets by their id on the Hugging Face hub, read by huggingface_hub from a server on this machine."""

import pytest
from hub import hub  # noqa: F401
from pictures import CLASSES, pictures, value_of, write_class_folders, write_repository, write_webdataset

from pipelines.config.recipe import ImagesConfig
from pipelines.images.open import open_source, with_absolute_paths
from pipelines.images.sources import huggingface

NAME = "someone/pictures"


@pytest.fixture(autouse=True)
def new_process():
    """Forget downloads, which a process looks up once."""
    huggingface._download.cache_clear()


def config(path=NAME, **settings) -> ImagesConfig:
    return ImagesConfig(path=path, **settings)


def values(settings: ImagesConfig) -> list[int]:
    """Return the grey values of the images that can be decoded."""
    source = open_source(settings)
    listing = source.listing()
    images = source.read(listing.keys, listing.locations)
    return [value_of(image) for image in images if not isinstance(image, Exception)]


@pytest.fixture
def repository(hub, tmp_path):  # noqa: F811
    """Return a hub with forty pictures, four of them broken, and twelve in an earlier version."""
    write_repository(tmp_path / "newest", pictures(40))
    write_repository(tmp_path / "earlier", pictures(60)[:12])
    hub.commit(NAME, tmp_path / "newest", "main")
    hub.earlier = hub.commit(NAME, tmp_path / "earlier", "v1")
    return hub


def test_an_id_gives_the_same_images_as_a_copy_of_the_repository(repository, tmp_path):
    listing = open_source(config()).listing()
    copy = open_source(config(str(tmp_path / "newest"))).listing()
    assert (listing.digest, listing.keys, listing.class_names) == (copy.digest, copy.keys, CLASSES)
    assert values(config()) == values(config(str(tmp_path / "newest"))) and len(values(config())) == 36


def test_only_the_wanted_part_is_fetched_and_only_once(repository):
    values(config())
    values(config())
    expected = ["README.md", "train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
    assert sorted(repository.fetched) == expected
    huggingface._download.cache_clear()
    values(config())
    assert sorted(repository.fetched) == expected
    assert values(config(split="test")) == [0, 1, 2]
    assert sorted(repository.fetched) == sorted([*expected, "test-00000-of-00001.parquet"])


@pytest.mark.parametrize("revision", ["v1", "commit"])
def test_a_revision_is_a_tag_a_branch_or_a_commit(repository, revision):
    name = repository.earlier if revision == "commit" else revision
    assert values(config(f"{NAME}@{name}")) == [*range(10), 11]


def test_class_names_come_from_the_card_if_the_files_have_none(hub, tmp_path):  # noqa: F811
    import pyarrow.parquet as pq

    write_repository(tmp_path / "set", pictures(40))
    for file in (tmp_path / "set" / "data").glob("*.parquet"):
        pq.write_table(pq.read_table(file).replace_schema_metadata(None), file)
    names = "".join(f"          '{number}': {name}\n" for number, name in enumerate(CLASSES))
    features = f"  - name: label\n    dtype:\n      class_label:\n        names:\n{names}"
    card = f"---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n{features}---\n"
    (tmp_path / "set" / "README.md").write_text(card)
    hub.commit(NAME, tmp_path / "set", "main")
    assert open_source(config()).listing().class_names == CLASSES


def test_tar_shards_on_the_hub_are_read(hub, tmp_path):  # noqa: F811
    settings = write_webdataset(tmp_path / "set", pictures(40))
    hub.commit(NAME, tmp_path / "set", "main")
    assert values(config(**settings)) == [picture.value for picture in pictures(40) if picture.value is not None]


def test_an_earlier_download_is_used_without_a_network(repository):
    expected = values(config())
    assert not any("downloaded earlier" in note for note in open_source(config()).listing().notes)
    repository.stop()
    huggingface._download.cache_clear()
    assert values(config()) == expected
    assert any("that were downloaded earlier, perhaps not" in note for note in open_source(config()).listing().notes)


def test_workers_read_the_version_that_was_listed(repository):
    """Others may push to the hub while a job runs."""
    open_source(config(f"{NAME}@v1")).listing()
    repository.revisions[NAME, "v1"] = repository.revisions[NAME, "main"]
    listed = with_absolute_paths(config(f"{NAME}@v1"))
    assert listed.path == f"{NAME}@{repository.earlier}"
    huggingface._download.cache_clear()
    assert values(listed) == [*range(10), 11]
    assert len(values(config(f"{NAME}@v1"))) == 36


def test_without_network_and_download_the_error_says_so(repository):
    repository.stop()
    with pytest.raises(
        FileNotFoundError,
        match=f"found no folder {NAME}, and no data set of this name could be fetched from the Hugging Face hub "
        r"\(ConnectError: .*\), expected a folder, or a hub id and a network. .* copy its files here",
    ):
        open_source(config())


@pytest.mark.parametrize(
    ("path", "reason"),
    [("someone/else", "RepositoryNotFoundError: .*404"), (f"{NAME}@v9", "RevisionNotFoundError: .*404")],
)
def test_the_error_names_what_is_not_on_the_hub(repository, path, reason):
    with pytest.raises(FileNotFoundError, match=rf"found no folder {path.partition('@')[0]}, .* \({reason}"):
        open_source(config(path))


def test_loose_images_on_the_hub_are_refused_with_what_to_do(hub, tmp_path):  # noqa: F811
    write_class_folders(tmp_path / "set", pictures(40))
    hub.commit(NAME, tmp_path / "set", "main")
    with pytest.raises(FileNotFoundError, match="no Parquet, Arrow or tar files in someone/pictures on the Hugging"):
        open_source(config()).listing()
