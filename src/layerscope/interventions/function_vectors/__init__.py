"""Function vectors (Todd et al. 2024): the heads that carry a task, and the vector they write."""
