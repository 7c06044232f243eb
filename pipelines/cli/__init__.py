"""The `raydit` command: one file for each subcommand in commands/, and the submission of jobs in submission/."""
