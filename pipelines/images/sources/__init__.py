"""Image sources: one file for each layout. `pipelines.images.open` chooses among them."""
