import os

from asgi_deferred.django import DeferredMiddleware
from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

application = DeferredMiddleware(get_asgi_application())
