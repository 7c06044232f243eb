"""What all four packages share: the errors that a user can cause."""
