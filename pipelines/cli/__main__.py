"""`python -m pipelines.cli`: the `raydit` command where that script is not installed, such as in a Ray job."""

from pipelines.cli.entry import main

main()
