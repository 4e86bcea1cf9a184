from django.db import models


class Document(models.Model):
    file = models.FileField(upload_to="documents")
    email = models.EmailField()
    sha256 = models.CharField(max_length=64, blank=True)
