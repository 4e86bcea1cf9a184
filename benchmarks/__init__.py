"""asgi-deferred beside its peers, measured in the same run: `python -m benchmarks`, `python -m benchmarks NAME`."""
