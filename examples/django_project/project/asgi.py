import os

from django.core.asgi import get_asgi_application

from asgi_deferred.django import DeferredMiddleware

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "project.settings")

application = DeferredMiddleware(get_asgi_application())
