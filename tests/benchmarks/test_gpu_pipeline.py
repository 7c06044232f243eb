"""The recipe of the pipeline's benchmark, and what its script reads from the command's lines."""

from gpu_jobs import STAGES, Watch
from run_gpu_pipeline import RECIPE, SMALL

from pipelines.config.reader import load_recipe


def test_the_recipe_and_its_rehearsal_are_valid():
    config, small = load_recipe(RECIPE), load_recipe(RECIPE, tuple(SMALL))
    assert (config.train.gpus_per_worker, small.train.gpus_per_worker) == (1, 0)
    assert config.train.compile and config.train.dtype == "bfloat16"


def test_a_stage_works_from_its_first_step_or_image_on():
    watch = Watch(0.0)
    for line in (
        "autoencoder  starting Ray\n",
        "autoencoder    0/400 steps | starting\n",
        "autoencoder  1,020/2,000 steps | mse 0.2\n",
        "autoencoder  2,000/2,000 steps\n",
        "encode       20,000 images in 10 classes\n",
        "train        0/40 steps | starting\n",
        "report       4/4 images\n",
    ):
        watch.read(line)
    assert list(watch.begun) == list(STAGES[:3])
    assert watch.first.keys() == {"autoencoder"} and watch.first["autoencoder"][1] == 1020
