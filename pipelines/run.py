"""The pipeline: autoencoder, encode, train and evaluate in a row, each skipped where its artifact fits."""

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
    """From images to metrics of the newest checkpoint. Run again after any interruption: it goes on."""
    with context.pipeline(resolved(config)):
        train_autoencoder(config, context=context)
        encode(config, context=context)
        checkpoint = train(config, context=context)
        return evaluate(checkpoint, config=config, context=context)
