"""Where images come from: a file for each layout. pipelines.images opens the right one."""
