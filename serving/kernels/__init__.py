"""Delta kernels: one contract, a plain torch reference, faster executors beside it."""
