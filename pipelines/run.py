"""The pipeline: autoencoder, encode, train and evaluate in this order, each skipped if its artifact is up to date."""

from evaluation.report import EvaluationReport
from pipelines.autoencoder import train_autoencoder
from pipelines.config.reader import resolved
from pipelines.config.recipe import Recipe
from pipelines.encode import encode
from pipelines.evaluate import evaluate
from pipelines.stage import StageContext, job
from pipelines.train import train


@job
def run_pipeline(config: Recipe, *, context: StageContext) -> EvaluationReport:
    """Run all stages of a recipe and return the report of the newest checkpoint.

    After an interruption, running it again resumes.
    """
    with context.pipeline(resolved(config)):
        train_autoencoder(config, context=context)
        encode(config, context=context)
        checkpoint = train(config, context=context)
        return evaluate(checkpoint, config=config, context=context)
