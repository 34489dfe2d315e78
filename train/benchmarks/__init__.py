"""The eleven columns of the paper's table: one benchmark a file, scored from files on disk."""
