"""One stage of training, step by step, on one process or several ranks."""
