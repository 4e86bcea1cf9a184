"""A small Django project that defers work: an upload is answered at once; a task and a mail follow the response.

    python manage.py migrate
    python -m uvicorn project.asgi:application      # or: python -m daphne project.asgi:application
    curl -F email=ada@example.org -F file=@manage.py http://127.0.0.1:8000/documents/

DATABASE_URL=postgresql://user:password@host:5432/name takes PostgreSQL and not SQLite; EMAIL_HOST and EMAIL_PORT name a
mail server, without which mails are printed. It needs Django 6.0 or later.
"""

import os
import sys

from django.core.management import execute_from_command_line

if __name__ == "__main__":
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")
    execute_from_command_line(sys.argv)
