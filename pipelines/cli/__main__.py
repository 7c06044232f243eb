"""`python -m pipelines.cli`: the `raydit` command where no script of that name is installed, as in a Ray job."""

from pipelines.cli.main import main

main()
