"""The plot of an evaluation's timings."""

from pipelines.scoring.reports.log_report import plot_timings


def test_timings_of_workers_have_a_row_of_their_own():
    own = {"features_seconds": 10.0, "scoring_seconds": 1.0}
    both = plot_timings(own | {"workers_sampling_seconds": 8.0, "workers_extraction_seconds": 2.0})
    assert both.size[1] > plot_timings(own).size[1]
