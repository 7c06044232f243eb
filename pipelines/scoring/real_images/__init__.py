"""The real images that samples are compared with: their listing, features and reference statistics."""
