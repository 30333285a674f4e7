"""What other extensions of this package may call. A build that differs is refused at import."""

# The client that a ClientCache holds for an exact `str`, as a new reference and counted as a
# hit; NULL, without an error, if it holds none. Runs no Python code.
cdef void *live_client(void *cache, void *url) noexcept
