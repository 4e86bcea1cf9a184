from django.urls import path
from documents import views

urlpatterns = [
    path("documents/", views.upload),
    path("documents/<int:pk>/", views.document),
]
