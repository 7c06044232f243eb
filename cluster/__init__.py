"""Where raydit runs: Ray sessions, job submission, storage, and the doctor."""
