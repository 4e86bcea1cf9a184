"""An application and, for each engine, a module with one job: what the web process and the worker process import."""
