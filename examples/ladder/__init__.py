"""The ladder: one application on four rungs, from no promise at a crash to workers on many machines.

1. `memory`: in memory.
2. `examples.durable_sqlite`: an SQLite file, or PostgreSQL.
3. `broker`: taskiq and RabbitMQ, on one machine.
4. `machines`: Celery and RabbitMQ, on many.

From `def welcome` on, the four files are the same. Above it stand the decorator and the one place that chooses.
"""
